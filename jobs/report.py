"""Makes one HTML page of a sink.

Of a label store: numbers, classes, rejects, and images under their label maps.

    python jobs/report.py SINK
    python jobs/report.py SINK --image-id ID --export masks
    ray job submit --working-dir . -- python jobs/report.py s3://bucket/labels --html s3://bucket/report.html

Of a training, finished or not: its curves, the confusion matrix, and the images that it gets most wrong.

    python jobs/report.py SINK --num-images 8

The page is a single file that opens from disk without a network. `--help` lists every option.
"""

from segray.cli import main

if __name__ == "__main__":
    main("report")
