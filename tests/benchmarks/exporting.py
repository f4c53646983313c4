"""Seconds and memory of exporting one large labelled scene, exact and simplified.

    python tests/benchmarks/exporting.py [SIDE]

The scene has SIDE × SIDE pixels (20,000) of three classes, one pixel in a hundred a speck of another, and a wedge
without data; it lies in windows of 1024. In its western half the classes are regions some 40 pixels wide; the eastern
half is a background of one class, whose only polygon has a hole at almost every speck. Memory is the process's peak,
its imports included.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.ndimage import gaussian_filter

from tests.test_export import CLASSES, Drawn, write_store

PATTERN = 4096
SIZE = 1024


def draw(side: int) -> np.ndarray:
    """Patterns, repeated with a shift that no window knows."""
    rng = np.random.default_rng(0)
    fields = np.stack([gaussian_filter(rng.standard_normal((PATTERN, PATTERN), np.float32), 12) for _ in CLASSES.names])
    regions, background = fields.argmax(0).astype(np.uint8), np.zeros((PATTERN, PATTERN), np.uint8)
    specks = rng.random(regions.shape, np.float32) < 0.01
    regions[specks] = background[specks] = rng.integers(0, len(CLASSES), int(specks.sum()), np.uint8)
    label_map = np.empty((side, side), np.uint8)
    for row in range(0, side, PATTERN):
        for col in range(0, side, PATTERN):
            pattern = regions if col < side / 2 else background
            height, width = min(PATTERN, side - row), min(PATTERN, side - col)
            label_map[row : row + height, col : col + width] = np.roll(pattern, (row // 7, col // 5))[:height, :width]
    for row in range(side):
        label_map[row, : (side - row) // 10] = CLASSES.ignore_index
    return label_map


def write_scene(sink: str, side: int) -> None:
    """The store."""
    write_store(sink, [Drawn(uri="large.tif", label_map=draw(side), size=SIZE)], per_part=256)


def main() -> None:
    """Draws the scene, exports it twice, and prints what that took."""
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as folder:
        # Not in this process: a child's peak begins with what its parent has.
        drawing = multiprocessing.Process(target=write_scene, args=(f"{folder}/labels", side))
        drawing.start()
        drawing.join()
        for name, options in (("exact", []), ("simplified", ["--simplify", "15"])):
            command = [sys.executable, "jobs/export.py", f"{folder}/labels", f"{folder}/{name}", *options]
            began = time.monotonic()
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as job:
                _, job.returncode, used = os.wait4(job.pid, 0)
            seconds = time.monotonic() - began
            assert job.returncode == 0
            written = {path.suffix: path for path in Path(folder, name).rglob("large-*.*")}
            item = json.loads(written[".json"].read_text())["properties"]
            cpu_seconds = used.ru_utime + used.ru_stime
            num_pixels = sum(fields["num_pixels"] for fields in item["segray:classes"])
            sizes = ", ".join(f"{kind} {written[kind].stat().st_size >> 20:,} MiB" for kind in (".tif", ".parquet"))
            num_polygons = pq.read_metadata(written[".parquet"]).num_rows
            rate = num_pixels / cpu_seconds / 1e6
            print(
                f"{name}: {side:,} × {side:,}, {num_polygons:,} polygons in {seconds:.0f} s, {cpu_seconds:.0f} s of a "
                f"CPU ({rate:.1f} Mpixel/s), peak {used.ru_maxrss >> 10:,} MiB; {sizes}",
                flush=True,
            )


if __name__ == "__main__":
    main()
