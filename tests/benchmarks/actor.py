"""The actor's path alone, without Ray: loops of one process, from decoded frames or JPEG bytes to label maps.

Each is to run in a process of its own, and `fast` and `from_jpeg` under `predict.CPU_ENVIRONMENT` on a CPU.
"""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from segray.decode import MAX_PIXELS, decode
from segray.predict import Predictor
from tests.benchmarks import eager

T = TypeVar("T")

BLOCK = 128
"""Frames of 480×360 in some 64 MiB, which an actor is handed at a time."""

WARM_UP = 2
"""Rounds over the first block or batch that are not timed: what is compiled is compiled there."""


def eager_loop(way: eager.Way, frames: Sequence[Path], device: str, dtype: str, is_compiled: bool = False) -> float:
    """Images per second of the plain forward pass and argmax, on frames that are decoded.

    Args:
        way: of it model, weights and threads.
        frames: JPEG files of one size.
        device: where it runs.
        dtype: of autocast.
        is_compiled: whether torch's compiler makes the forward pass of it, with frozen weights.
    """
    model = eager.build(way).to(device)
    if is_compiled:
        torch._inductor.config.freezing = True
        model.compile()
    images = [decode(frame.read_bytes(), MAX_PIXELS) for frame in frames]
    batches = list(_split(images, eager.BATCH_SIZE))
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
        for batch in [batches[0], batches[-1]] * WARM_UP:
            eager.label_images(model, batch)
        began = time.perf_counter()
        for batch in batches:
            eager.label_images(model, batch)
    return len(images) / (time.perf_counter() - began)


def fast_loop(way: eager.Way, frames: Sequence[Path], device: str, dtype: str) -> float:
    """Images per second of `Predictor` on frames that are decoded."""
    predictor = build(way, device, dtype)
    images = [decode(frame.read_bytes(), MAX_PIXELS) for frame in frames]
    blocks = list(_split(images, BLOCK))
    for _ in range(WARM_UP):
        predictor.predict(blocks[0][: 2 * eager.BATCH_SIZE])
    began = time.perf_counter()
    for block in blocks:
        predictor.predict(block)
    return len(images) / (time.perf_counter() - began)


def from_jpeg(way: eager.Way, frames: Sequence[Path], device: str, dtype: str) -> float:
    """Likewise from the bytes of JPEG files in memory; all cores decode a block while the model labels the last."""
    predictor = build(way, device, dtype)
    blocks = list(_split([frame.read_bytes() for frame in frames], BLOCK))
    for _ in range(WARM_UP):
        predictor.predict([decode(data, MAX_PIXELS) for data in blocks[0][: 2 * eager.BATCH_SIZE]])
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def decoded() -> Iterator[list[np.ndarray]]:
            ahead = pool.map(decode, blocks[0], [MAX_PIXELS] * len(blocks[0]))
            for block in blocks[1:]:
                images, ahead = list(ahead), pool.map(decode, block, [MAX_PIXELS] * len(block))
                yield images
            yield list(ahead)

        began = time.perf_counter()
        for images in decoded():
            predictor.predict(images)
        return len(frames) / (time.perf_counter() - began)


def build(way: eager.Way, device: str, dtype: str, **more: Any) -> Predictor:
    """The job's own; `more` are further settings."""
    more |= {"batch_size": eager.BATCH_SIZE, "device": device, "dtype": dtype, "num_threads": way.threads}
    return Predictor(way.weights.read_bytes, **more)


def _split(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
