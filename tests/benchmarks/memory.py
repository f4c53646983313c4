"""Memory of the driver and of its workers while a job labels 20,000 small images.

    python tests/benchmarks/memory.py [NUM_IMAGES]

Memory is what a process has for itself (USS): the object store, which all share, is left out. The
figure to look at is the difference between the first thousand images and the last.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from PIL import Image

from segray.demo import scene


def own_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:  # it has just ended
        return 0


def kind(process: psutil.Process) -> str:
    try:
        name = process.cmdline()[0]
    except (psutil.Error, IndexError):
        return ""
    return re.sub(r"\(.*?_fn.*", "", name)[:60] if name.startswith("ray::") else ""


def main() -> None:
    num_images = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "images").mkdir()
        for seed in range(50):
            Image.fromarray(scene(seed)[0]).resize((64, 64)).save(root / f"{seed}.jpg")
        for index in range(num_images):
            os.link(root / f"{index % 50}.jpg", root / f"images/{index:06d}.jpg")
        command = [
            *(sys.executable, "jobs/label.py", str(root / "images"), str(root / "labels")),
            *("--model", "segray/demo.safetensors"),
        ]
        job = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert job.stderr is not None
        driver = psutil.Process(job.pid)
        print(f"{'images':>8}  {'driver':>9}  {'largest worker':>14}  {'all workers':>11}   MiB")
        for line in job.stderr:
            if match := re.match(r"(\d+) of", line):
                workers = [own_bytes(p) for p in driver.children(recursive=True) if kind(p)]
                figures = (own_bytes(driver), max(workers, default=0), sum(workers))
                columns = "  ".join(
                    f"{figure >> 20:>{width}}" for figure, width in zip(figures, (9, 14, 11), strict=True)
                )
                print(f"{match[1]:>8}  {columns}", flush=True)
        job.wait()


if __name__ == "__main__":
    main()
