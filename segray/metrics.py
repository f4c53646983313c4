"""What Prometheus is told of a run, through the endpoint that Ray has on each node.

    ray_segray_images_total{outcome, run_id}   labelled and rejected as they are committed, present where they are met
    ray_segray_fetched_bytes_total             read from the source
    ray_segray_stage_seconds_total{stage}      spent in fetch, decode, predict, encode, write
    ray_segray_batch_images                    histogram: images, or tiles, that shared a forward pass

Ray adds the node and the worker (`NodeAddress`, `WorkerId`). What `rate` makes of the seconds of the
stage predict is the share of its time in which an actor was at work; its GPU was so at most as long.
What is done twice counts twice, but for images. How much waits before each stage, and what the object
stores hold, Ray tells by itself (`ray_data_*`).
"""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Histogram

__all__ = ["add_images", "batch", "fetched", "stage", "staged"]

T = TypeVar("T")

_BATCH_IMAGES = [float(2**power) for power in range(10)]


def add_images(outcome: str, run_id: str, num_images: int) -> None:
    """Counts images of a run that are `labelled`, `rejected` or `present`."""
    if num_images:
        _images().inc(num_images, {"outcome": outcome, "run_id": run_id})


def fetched(size_bytes: int) -> None:
    """Counts what was read."""
    if size_bytes:
        _fetched_bytes().inc(size_bytes)


def batch(num_images: int) -> None:
    """Notes the size of a forward pass."""
    _batch_images().observe(num_images)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Counts the seconds that its body takes."""
    began = time.perf_counter()
    try:
        yield
    finally:
        # Ray takes no zero, which a coarse clock may give.
        _stage_seconds().inc(max(time.perf_counter() - began, 1e-9), {"stage": name})


def staged(name: str, items: Iterator[T]) -> Iterator[T]:
    """The items; counts the seconds that it takes to make them, without those of whoever takes them."""
    while True:
        with stage(name):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


# Made where they are first used, in each process once; `--help` does not wait for Ray.


@functools.cache
def _images() -> "Counter":
    from ray.util.metrics import Counter

    return Counter("segray_images", "Images of a run, by what became of them", ("outcome", "run_id"))


@functools.cache
def _fetched_bytes() -> "Counter":
    from ray.util.metrics import Counter

    return Counter("segray_fetched_bytes", "Bytes of images that were read")


@functools.cache
def _stage_seconds() -> "Counter":
    from ray.util.metrics import Counter

    return Counter("segray_stage_seconds", "Seconds of work in a stage", ("stage",))


@functools.cache
def _batch_images() -> "Histogram":
    from ray.util.metrics import Histogram

    return Histogram("segray_batch_images", "Images or tiles in a forward pass", boundaries=_BATCH_IMAGES)
