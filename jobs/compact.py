"""Merges the small parts of a label store, such as many short nights leave, into parts of a useful size.

    python jobs/compact.py SINK
    ray job submit --working-dir . -- python jobs/compact.py s3://bucket/labels --wait 600

It holds the sink's lock, so no run writes meanwhile. `--help` lists every option.
"""

from segray.cli import main

if __name__ == "__main__":
    main("compact")
