"""Compares the label maps of a sink with targets: IoU of each class, mIoU, pixel accuracy.

    python jobs/evaluate.py SINK TARGETS
    python jobs/evaluate.py s3://bucket/labels s3://bucket/targets --ignore-index 11 --json scores.json
    ray job submit --working-dir . -- python jobs/evaluate.py s3://bucket/labels s3://bucket/targets

TARGETS is a folder or prefix of label PNGs, grey or palette, that bear the names of the images.
`--help` lists every option.
"""

from segray.cli import main

if __name__ == "__main__":
    main("evaluate")
