"""What an image costs in each stage of the job, apart from moving it between them.

    python -m tests.benchmarks.stages [--device cpu] [--dtype float32] [--batch-size 16] [--num-images 64]

Images are drawn scenes, scaled to the size; label maps are their targets, scaled likewise. Decode and encode
are the functions of the job, on one thread, best of five rounds. The model's time is that of its actor without
Ray: pixels in, label maps and statistics out, for the images of 480×360 alone; its weights are random.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import tyro
from PIL import Image

from segray import model
from segray.classes import Classes
from segray.decode import MAX_PIXELS, decode
from segray.demo import CLASSES, scene
from segray.forward import DType
from segray.labelmap import encode_png
from segray.predict import Predictor
from segray.source import Source, fetch
from segray.tail import Grid
from segray.tile import Window
from tests.benchmarks import actor, eager

T = TypeVar("T")

SIZES = ((360, 480), (1024, 2048))
FORMATS = ("JPEG", "PNG")
MODELS = ("lraspp_mobilenet_v3_large", "deeplabv3_resnet50")
NUM_SCENES = 8
PART_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Times the stages of an image."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Of the models."""
    dtype: DType = "auto"
    """Of the models."""
    batch_size: int = 16
    """Of the models."""
    num_images: int = 64
    """That each model labels; two batches before them are not timed."""


def milliseconds(work: Callable[[T], object], items: Sequence[T]) -> float:
    """Of the work on one item, in the best of five rounds."""
    rounds = []
    for _ in range(5):
        begin = time.perf_counter()
        for item in items:
            work(item)
        rounds.append(time.perf_counter() - begin)
    return 1000 * min(rounds) / len(items)


def scaled(height: int, width: int) -> list[tuple[Image.Image, np.ndarray]]:
    """Scenes and their targets, of this size."""
    pairs = [scene(seed)[:2] for seed in range(NUM_SCENES)]
    return [
        (
            Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC),
            np.asarray(Image.fromarray(target).resize((width, height), Image.Resampling.NEAREST)),
        )
        for image, target in pairs
    ]


def compress(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return buffer.getvalue()


def images_per_second(name: str, settings: Stages) -> float:
    """Of one actor's work on images of the first size."""
    checkpoint = model.untrained(name, Classes(tuple(f"class {index}" for index in range(21))))
    predictor = Predictor(
        checkpoint.to_bytes, batch_size=settings.batch_size, device=settings.device, dtype=settings.dtype
    )
    images = [np.asarray(image) for image, _ in scaled(*SIZES[0])]
    batch = [images[index % NUM_SCENES] for index in range(settings.batch_size)]
    for _ in range(2):
        predictor.predict(batch)
    num_batches = -(-settings.num_images // settings.batch_size)
    begin = time.perf_counter()
    for _ in range(num_batches):
        predictor.predict(batch)
    return num_batches * settings.batch_size / (time.perf_counter() - begin)


def of_model(way: eager.Way, frames: Sequence[Path], device: str, dtype: str) -> tuple[float, float, float]:
    """Milliseconds for an image of `Predictor`'s forward pass, with what comes before, of its tail, and of a plain one.

    Args:
        way: of it model, weights and threads, which is to be one.
        frames: JPEG files of one size.
        device: where it runs.
        dtype: as `Predictor` takes it.
    """
    beats: list[tuple[float, int]] = []

    def beat(num_images: int) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        beats.append((time.perf_counter(), num_images))

    predictor = actor.build(way, device, dtype, beat=beat)
    images = [decode(frame.read_bytes(), MAX_PIXELS) for frame in frames[: eager.BATCH_SIZE]]
    predictor.predict(images)
    batch = images[: max(num_images for _, num_images in beats)]  # what one forward pass takes
    coarse, fused = [], predictor._tail

    def remember(logits: torch.Tensor, grid: Grid, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
        coarse.append((logits, grid))
        return fused(logits, grid, window)

    predictor._tail = remember
    predictor.predict(batch)
    predictor._tail = fused
    forward, tail, plain = [], [], []
    for _ in range(5):
        beats.clear()
        began = time.perf_counter()
        predictor.predict(batch)
        ended = time.perf_counter()
        [(between, _)] = beats
        forward.append(between - began)
        tail.append(ended - between)
        _plain_tail(*coarse[-1])
        plain.append(time.perf_counter() - ended)
    per_image = 1000 / len(batch)
    return min(forward) * per_image, min(tail) * per_image, min(plain) * per_image


@torch.inference_mode()
def _plain_tail(logits: torch.Tensor, grid: Grid) -> None:
    """As it is written without one: logits and probabilities at full size, then classes, their counts and sums."""
    full = F.interpolate(logits, (grid.height, grid.width), mode="bilinear", align_corners=grid.align_corners)
    confidence, label_maps = full.softmax(1).max(1)
    num_bins = len(logits) * eager.NUM_CLASSES
    bins = label_maps + torch.arange(0, num_bins, eager.NUM_CLASSES, device=logits.device)[:, None, None]
    torch.bincount(bins.flatten(), minlength=num_bins).cpu()
    torch.bincount(bins.flatten(), confidence.flatten().double(), num_bins).cpu()
    label_maps.byte().cpu().numpy()


def of_feeding(frames: Sequence[Path], source: str | None = None, sink: str | None = None) -> dict[str, float]:
    """Milliseconds for an image of the other stages, on one thread; fetch and write as tasks do them, many at a time.

    Args:
        frames: JPEG files of one size.
        source: where to fetch such files from. None: they are not.
        sink: where to write their label maps. None: they are not.
    """
    files = [frame.read_bytes() for frame in frames]
    height, width = decode(files[0], MAX_PIXELS).shape[:2]
    targets = [target for _, target in scaled(height, width)]
    stages = {
        "decode": milliseconds(partial(decode, max_pixels=MAX_PIXELS), files),
        "encode": milliseconds(partial(encode_png, palette=CLASSES.palette), targets),
    }
    if source is not None:
        entries = next(Source(source).entries())
        stages["fetch"] = milliseconds(_fetch, [entries]) / entries.num_rows
    if sink is not None:
        rows = _labelled(height, width, [encode_png(target, CLASSES.palette) for target in targets])
        stages["write"] = milliseconds(partial(_write, sink), [rows]) / rows.num_rows
    return stages


def _fetch(entries: pa.Table) -> None:
    assert not any(table["reason"].drop_null() for table, _ in fetch(entries, done=np.empty(0, "S32")))


def _labelled(height: int, width: int, pngs: Sequence[bytes]) -> pa.Table:
    """As many images as a part has at least."""
    from segray.sink import LABELLED

    counts = [height * width] + [0] * (len(CLASSES) - 1)
    rows = [
        (f"{number:032x}", f"file:///{number}.jpg", "1", height, width, pngs[number % len(pngs)], counts, counts)
        for number in range(PART_ROWS)
    ]
    columns = [*zip(*rows, strict=True), [None] * PART_ROWS, [None] * PART_ROWS]
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, LABELLED.types, strict=True)], LABELLED)


def _write(sink: str, rows: pa.Table) -> None:
    from segray.sink import Sink

    assert sum(receipt.num_labelled for receipt in Sink(sink, "r0").write(rows, CLASSES, "run")) == rows.num_rows


def main() -> None:
    """Prints two tables."""
    settings = tyro.cli(Stages)
    print("| image | kB | decode ms | encode ms |\n|---|---|---|---|")
    for height, width in SIZES:
        pairs = scaled(height, width)
        encode = milliseconds(partial(encode_png, palette=CLASSES.palette), [target for _, target in pairs])
        for kind in FORMATS:
            files = [compress(image, kind) for image, _ in pairs]
            kilobytes = sum(map(len, files)) / len(files) / 1000
            decoded = milliseconds(partial(decode, max_pixels=height * width), files)
            print(f"| {width}×{height} {kind} | {kilobytes:,.0f} | {decoded:.1f} | {encode:.1f} |")
    where = torch.cuda.get_device_name() if settings.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"\n| model | {settings.dtype}, {where}, images/s |\n|---|---|")
    for name in MODELS:
        print(f"| {name} | {images_per_second(name, settings):.1f} |", flush=True)


if __name__ == "__main__":
    main()
