"""One large scene through the job: memory, windows per second against a bare loop, and the same from its quarters.

    python -m tests.benchmarks.scenes [--side 30000]

1. Memory. A drawn Cloud-Optimised GeoTIFF of SIDE × SIDE pixels and four bands of uint16 is labelled by an ONNX model
   that looks four pixels around, so that all the rest is what counts. Memory is the most that any process of the run
   has resident, looked at twice a second; pages of Ray's object store, which all processes of a node share and Ray
   bounds, are shown apart.
2. Quarters. Four rasters (VRT) that reach a window beyond the scene's middle are labelled likewise; each label map of
   the scene must be that of the quarter in which it lies.
3. Windows per second of the steady state, against a bare loop (rasterio read, forward pass, argmax) over the same
   windows of a part of the scene, with a U-Net of ResNet-18; the bare loop runs before and after.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.dataset as pads
import rasterio
import rasterio.shutil
import torch
import tyro
from affine import Affine

from segray import model
from segray.classes import Classes
from segray.preprocessing import Preprocessing
from segray.tile import Scenes, cores
from tests.graphs import BANDS, convolutions, described
from tests.graphs import write as write_model
from tests.label_store import newest_run
from tests.rasters import UTM, UTM_GRID

SIZE = 1024
PATTERN = 2048
RATE_SIDE, RATE_SIZE, RATE_HALO = 6144, 512, 64
LOOK_SECONDS = 0.5
MAX_BYTES = 2e9
MIN_RATIO = 0.9


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Labels a large scene."""

    side: int = 30_000
    """Its pixels a side."""


def draw(path: Path, side: int) -> None:
    """The scene, window by window: values from 0 to 3 in blocks, that are elsewhere in each window, and some nodata."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 4, (len(BANDS), PATTERN // 8, PATTERN // 8), np.uint16)
    pattern = blocks.repeat(8, 1).repeat(8, 2)
    plain = path.with_name("plain.tif")
    profile: dict[str, Any] = {"driver": "GTiff", "dtype": "uint16", "crs": UTM, "transform": UTM_GRID, "nodata": 9}
    profile |= {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "zstd", "bigtiff": "yes"}
    with rasterio.open(plain, "w", width=side, height=side, count=len(BANDS), **profile) as raster:
        raster.descriptions = BANDS
        for core in cores(side, side, PATTERN):
            drawn = np.roll(pattern, (core.row_off // 7, core.col_off // 5), (1, 2))[:, : core.height, : core.width]
            if core.row_off == core.col_off:
                drawn = drawn.copy()
                drawn[:, :SIZE, :SIZE] = 9
            raster.write(drawn, window=(core.rows, core.cols))
    rasterio.shutil.copy(plain, path, driver="COG", compress="zstd", num_threads="all_cpus", bigtiff="yes")
    plain.unlink()


def write_quarters(folder: Path, scene: Path, side: int, size: int) -> dict[str, tuple[int, int]]:
    """Writes rasters of a quarter and a window beyond it; by name, the column and the row where each begins."""
    middle, begin = middle_of(side, size), {}
    folder.mkdir()
    for number, (col_off, row_off) in enumerate([(0, 0), (middle, 0), (0, middle), (middle, middle)]):
        left, top = max(col_off - size, 0), max(row_off - size, 0)
        right, bottom = (min(middle + size, side) if offset == 0 else side for offset in (col_off, row_off))
        width, height = right - left, bottom - top
        transform = UTM_GRID @ Affine.translation(left, top)
        bands = "".join(
            f'<VRTRasterBand dataType="UInt16" band="{band}"><Description>{name}</Description>'
            f"<NoDataValue>9</NoDataValue><SimpleSource><SourceFilename>{scene}</SourceFilename>"
            f'<SourceBand>{band}</SourceBand><SrcRect xOff="{left}" yOff="{top}" xSize="{width}" ySize="{height}"/>'
            f'<DstRect xOff="0" yOff="0" xSize="{width}" ySize="{height}"/></SimpleSource></VRTRasterBand>'
            for band, name in enumerate(BANDS, 1)
        )
        geotransform = ", ".join(map(str, transform.to_gdal()))
        path = folder / f"{number}.vrt"
        path.write_text(
            f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}"><SRS>{UTM}</SRS>'
            f"<GeoTransform>{geotransform}</GeoTransform>{bands}</VRTDataset>"
        )
        begin[path.name] = left, top
    return begin


def middle_of(side: int, size: int) -> int:
    """Where quarters meet, a border of windows; there are to be four of them a side."""
    return side // 2 // size * size


def num_alike(scene: str, quarters: str, begin: Mapping[str, tuple[int, int]], side: int, size: int) -> int:
    """Compares the label map of each window of a scene with that of the quarter in which it lies.

    Args:
        scene: the label store of the scene.
        quarters: that of its quarters; the two may be one.
        begin: as `write_quarters` gives it.
        side: of the scene, in pixels.
        size: of windows.

    Returns:
        How many there are.
    """
    middle = middle_of(side, size)
    of_scene = {
        (row["col_off"], row["row_off"]): row["label_map"]
        for row in label_maps(scene)
        if Path(row["scene"]).name not in begin
    }
    num_windows = len(of_scene)
    for row in label_maps(quarters):
        if Path(row["scene"]).name not in begin:
            continue
        left, top = begin[Path(row["scene"]).name]
        place = left + row["col_off"], top + row["row_off"]
        is_own = (place[0] < middle) == (left == 0) and (place[1] < middle) == (top == 0)
        if is_own:
            assert of_scene.pop(place) == row["label_map"], f"the window at {place} is not the same in {row['scene']}"
    assert not of_scene, f"in no quarter: {sorted(of_scene)}"
    return num_windows


def label_maps(sink: str) -> Iterator[dict[str, Any]]:
    """The place of each window, and its label map as it is stored."""
    for batch in pads.dataset(f"{sink}/label_maps").to_batches(columns=["scene", "col_off", "row_off", "label_map"]):
        yield from batch.to_pylist()


@dataclass(slots=True)
class Memory:
    """The most that processes of a run had in memory, in bytes, by their kind."""

    own: Counter[str] = field(default_factory=Counter)
    in_store: Counter[str] = field(default_factory=Counter)
    """Of the object store, those pages that a process has seen."""

    def look(self, root: psutil.Process) -> None:
        """Takes in what there is now."""
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError, KeyError):  # it has ended, or is about to
                title = " ".join(process.cmdline()[:1])
                kind = title.partition("(")[0] if title.startswith("ray::") else process.name()
                told = dict(re.findall(r"(Rss\w+):\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()))
                anonymous, of_files, shared = (1024 * int(told[name]) for name in ("RssAnon", "RssFile", "RssShmem"))
                self.own[kind] = max(self.own[kind], anonymous + of_files)
                self.in_store[kind] = max(self.in_store[kind], shared)


def label(*arguments: object) -> Memory:
    """Runs the job; the memory of its processes."""
    command = [sys.executable, "jobs/label.py", *map(str, arguments)]
    memory = Memory()
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as job:
        root = psutil.Process(job.pid)
        while job.poll() is None:
            with contextlib.suppress(psutil.Error):
                memory.look(root)
            time.sleep(LOOK_SECONDS)
        log.seek(0)
        if job.returncode:
            sys.exit(log.read())
    return memory


def whole_and_quarters(folder: Path, side: int) -> tuple[Memory, dict[str, Any], int]:
    """Labels a scene and its quarters; memory and record of the first, and how many label maps were compared."""
    scene = folder / "scene.tif"
    draw(scene, side)
    checkpoint = write_model(folder / "m.onnx", convolutions(), described())
    how = ("--model", checkpoint, "--scenes.size", SIZE, "--scenes.halo", 64, "--device", "cpu")
    memory = label(scene, folder / "labels", *how)
    begin = write_quarters(folder / "quarters", scene, side, SIZE)
    label(folder / "quarters", folder / "of-quarters", *how)
    alike = num_alike(str(folder / "labels"), str(folder / "of-quarters"), begin, side, SIZE)
    return memory, newest_run(str(folder / "labels")), alike


def bare_loop(scene: Path, checkpoint: model.Checkpoint, threads: int) -> float:
    """Windows per second of reading, the forward pass and argmax."""
    torch.set_num_threads(threads)
    module = model.build(checkpoint).to(memory_format=torch.channels_last)
    scenes = Scenes(size=RATE_SIZE, halo=RATE_HALO)
    preprocessing = checkpoint.preprocessing
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (preprocessing.mean, preprocessing.std))
    windows = cores(RATE_SIDE, RATE_SIDE, RATE_SIZE)
    with rasterio.open(scene) as raster, torch.inference_mode():
        began = 0.0
        for number, core in enumerate(windows):
            if number == 1:  # the first warms up
                began = time.perf_counter()
            window = scenes.around(core, RATE_SIDE, RATE_SIDE)
            values = torch.from_numpy(raster.read(window=(window.rows, window.cols)).astype(np.float32))
            fed = ((values - mean) / std)[None].contiguous(memory_format=torch.channels_last)
            model.logits(module, fed).argmax(1).numpy()
    return (len(windows) - 1) / (time.perf_counter() - began)


def rates(folder: Path) -> tuple[list[float], float]:
    """Windows per second of the bare loop, before and after, and of the job."""
    threads = os.cpu_count() or 1
    scene = folder / "part.tif"
    draw(scene, RATE_SIDE)
    preprocessing = Preprocessing(channels=tuple(BANDS), mean=(1.5,) * 4, std=(1.2,) * 4)
    made = model.untrained("unet_resnet18", Classes(("soil", "crop", "weed")), preprocessing=preprocessing)
    checkpoint = folder / "unet.safetensors"
    checkpoint.write_bytes(made.to_bytes())
    bare = [bare_loop(scene, made, threads)]
    how = ("--scenes.size", RATE_SIZE, "--scenes.halo", RATE_HALO, "--device", "cpu")
    label(scene, folder / "rate", "--model", checkpoint, *how)
    bare.append(bare_loop(scene, made, threads))
    return bare, newest_run(str(folder / "rate"))["images_per_second"]


def main() -> None:
    """Runs all of it and prints what was found."""
    side = tyro.cli(Benchmark).side
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bare, rate = rates(folder)
        ratio = rate / np.mean(bare)
        print(
            f"U-Net/ResNet-18, windows of {RATE_SIZE} with a halo of {RATE_HALO}: the bare loop "
            f"{', '.join(f'{r:.2f}' for r in bare)} windows/s, the job {rate:.2f}: {ratio:.2f} of it",
            flush=True,
        )
        memory, run, alike = whole_and_quarters(folder, side)
    print(f"\n{side:,} × {side:,} × {len(BANDS)} uint16: {run['counts']['labelled']:,} windows of {SIZE}")
    print(f"labelled in {run['seconds']['total']:.0f} s, {alike:,} label maps equal to those of the quarters\n")
    print("| process | peak MiB | and of the object store |")
    print("|---|---|---|")
    for kind, size in memory.own.most_common(6):
        print(f"| {kind} | {size / 2**20:,.0f} | {memory.in_store[kind] / 2**20:,.0f} |")
    sys.exit(not (max(memory.own.values()) < MAX_BYTES and ratio >= MIN_RATIO))


if __name__ == "__main__":
    main()
