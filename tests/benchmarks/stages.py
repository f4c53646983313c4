"""What an image costs: fetch, decode, encode and write on one core, and the model on its device.

    python tests/benchmarks/stages.py [--device cpu] [--dtype float32] [--batch-size 16] [--num-images 64]

Images are drawn scenes, scaled to the size; label maps are their targets, scaled likewise. Decode and encode
are the functions of the job, on one thread, best of five rounds; files are fetched from this machine's disk, and
parts written to it, 256 images each. The model's time is that of its actor without
Ray: pixels in, label maps and statistics out, for the images of 480×360 alone; its weights are random.
"""

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
import tyro
from PIL import Image

from segray import model
from segray.classes import Classes
from segray.decode import decode
from segray.demo import CLASSES, scene
from segray.labelmap import encode_png
from segray.predict import DType, Predictor
from segray.sink import LABELLED, Sink
from segray.source import Source, fetch, image_id

T = TypeVar("T")

SIZES = ((360, 480), (1024, 2048))
FORMATS = ("JPEG", "PNG")
MODELS = ("lraspp_mobilenet_v3_large", "deeplabv3_resnet50")
NUM_SCENES = 8
NUM_WRITTEN = 256


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Times the stages of an image."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Of the models."""
    dtype: DType = "float32"
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


def fetched(folder: str) -> int:
    """How many images of a folder were read."""
    return sum(
        table.num_rows for page in Source(folder).entries() for table, _ in fetch(page, done=np.array([], "S32"))
    )


def labelled(label_maps: Sequence[np.ndarray]) -> pa.Table:
    """What is written of so many images."""
    numbers = range(len(label_maps))
    num_pixels = [np.bincount(label_map.ravel(), minlength=len(CLASSES)) for label_map in label_maps]
    columns: dict[str, Sequence[object]] = {
        "image_id": [image_id(str(number), "") for number in numbers],
        "uri": [f"file:///images/{number:06d}.jpg" for number in numbers],
        "version": ["1"] * len(numbers),
        "height": [label_map.shape[0] for label_map in label_maps],
        "width": [label_map.shape[1] for label_map in label_maps],
        "label_map": [encode_png(label_map, CLASSES.palette) for label_map in label_maps],
        "num_pixels": num_pixels,
        "confidence_sum": [numbers * 0.9 for numbers in num_pixels],
        "stage": [None] * len(numbers),
        "reason": [None] * len(numbers),
    }
    return pa.table(list(columns.values()), schema=LABELLED)


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


def main() -> None:
    """Prints two tables."""
    settings = tyro.cli(Stages)
    print("| image | kB | fetch ms | decode ms | encode ms | write ms |\n|---|---|---|---|---|---|")
    for height, width in SIZES:
        pairs = scaled(height, width)
        targets = [target for _, target in pairs]
        encode = milliseconds(partial(encode_png, palette=CLASSES.palette), targets)
        rows = labelled([targets[index % NUM_SCENES] for index in range(NUM_WRITTEN)])
        with tempfile.TemporaryDirectory() as sink:
            write = milliseconds(lambda rows: [*Sink(sink, "r0").write(rows, CLASSES, "run")], [rows]) / NUM_WRITTEN
        for kind in FORMATS:
            files = [compress(image, kind) for image, _ in pairs]
            kilobytes = sum(map(len, files)) / len(files) / 1000
            decoded = milliseconds(partial(decode, max_pixels=height * width), files)
            with tempfile.TemporaryDirectory() as folder:
                for index in range(NUM_WRITTEN):
                    Path(folder, f"{index}.{kind.lower()}").write_bytes(files[index % NUM_SCENES])
                fetch_ = milliseconds(fetched, [folder]) / NUM_WRITTEN
            print(
                f"| {width}×{height} {kind} | {kilobytes:,.0f} | {fetch_:.2f} | {decoded:.2f} | {encode:.2f} "
                f"| {write:.2f} |"
            )
    where = torch.cuda.get_device_name() if settings.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"\n| model | {settings.dtype}, {where}, images/s |\n|---|---|")
    for name in MODELS:
        print(f"| {name} | {images_per_second(name, settings):.1f} |", flush=True)


if __name__ == "__main__":
    main()
