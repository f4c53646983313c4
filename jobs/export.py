"""Writes labelled scenes as Cloud-Optimised GeoTIFFs, polygons (GeoParquet) and STAC items.

    python jobs/export.py SINK DEST
    python jobs/export.py s3://bucket/labels s3://bucket/maps --scene 's3://bucket/scenes/2026/*' --simplify 15
    ray job submit --working-dir . -- python jobs/export.py s3://bucket/labels s3://bucket/maps

It runs on one machine, without Ray. `--help` lists every option.
"""

from segray.cli import main

if __name__ == "__main__":
    main("export")
