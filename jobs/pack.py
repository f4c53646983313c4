"""Packs images and their targets, however they lie, into shards that the train job reads.

    python jobs/pack.py SOURCE SINK --dataset camvid
    python jobs/pack.py photos shards --dataset images
    python jobs/pack.py labels shards --dataset labels --min-confidence 0.95 --val-fraction 0.05

On a cluster:

    ray job submit --working-dir . -- python jobs/pack.py s3://bucket/cityscapes s3://bucket/shards --dataset cityscapes

`--help` lists every option, and the kinds of data sets.
"""

from segray.cli import main

if __name__ == "__main__":
    main("pack")
