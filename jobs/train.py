"""Train a model on shards of images with their targets, and write it as a segray checkpoint.

    python jobs/train.py SOURCE SINK --model unet_resnet34 --num-epochs 30
    ray job submit --working-dir . -- python jobs/train.py s3://bucket/shards s3://bucket/model --num-epochs 30

SOURCE holds tar shards (NAME.jpg with NAME.target.png) or Parquet shards (columns image and
target), and classes.json, as jobs/pack.py writes them. SINK receives checkpoint.safetensors, which
`--model` of the label job takes, and all that the same command goes on from when it was broken off.
"""

from segray.cli import main

if __name__ == "__main__":
    main("train")
