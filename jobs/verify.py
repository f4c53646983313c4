"""Reads a label store back and proves it; with SOURCE also that every image of it is there.

    python jobs/verify.py labels photos
    python jobs/verify.py s3://bucket/labels s3://bucket/photos --repair

On a cluster:

    ray job submit --working-dir . -- python jobs/verify.py s3://bucket/labels s3://bucket/photos
"""

from segray.cli import main

if __name__ == "__main__":
    main("verify")
