"""Labels images, local or in object storage, into a label store of Parquet.

    python jobs/label.py photos labels --model deeplabv3_resnet50
    python jobs/label.py s3://bucket/photos s3://bucket/labels --model s3://bucket/model.safetensors

On a cluster:

    ray job submit --working-dir . -- \
        python jobs/label.py s3://bucket/photos s3://bucket/labels --model deeplabv3_resnet50
"""

from segray.cli import main

if __name__ == "__main__":
    main("label")
