"""How a run with many models is scheduled, and what it holds in memory before a slow sink; no model computes.

    python -m tests.benchmarks.scale [--num-actors 64] [--num-nodes 4]

Several nodes on this machine pretend to have GPUs; on each sits a stand-in that sleeps in place of computing, the same
time for each image. Efficiency is the time that stand-ins sleep over the time that they are there, from the moment that
the last of them begins its first batch to the moment that the first of them has ended its last. Then stand-ins that
take no time label larger images into a sink that takes its time, while one looks at what the object store holds: Ray
Data fills half of it, and what is taken out is freed within a second or so. It is sound when efficiency is 0.95 and
nothing was spilled on a disk.

The sleep is so long that two cores can feed all of the stand-ins, of which each is a process of some 80 MiB. How many
images a second the cores can feed at most, and what the driver costs an image, is told by `make soak`.
"""

import contextlib
import io
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro
from PIL import Image

from segray import label, model, sink
from segray.classes import Classes
from segray.progress import print_table
from tests.label_store import newest_run

SIDE, LARGE_SIDE = 32, 512
CLASSES = Classes(("soil", "crop", "weed", "track"))
LINKS_PER_FILE = 30_000  # file systems have a bound
LOOK_SECONDS = 0.2
MIN_EFFICIENCY = 0.95


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Measures both."""

    num_actors: int = 64
    """Stand-ins, each on a pretended GPU."""
    num_nodes: int = 4
    """Nodes that have these."""
    num_images: int = 40_000
    """Of 32×32 pixels, for the stand-ins to share."""
    latency_ms: float = 400.0
    """What a stand-in takes for one of them."""
    num_large: int = 2000
    """Images of 512×512 pixels that go to the slow sink."""
    store_mib: int = 256
    """The object store before it."""
    write_seconds: float = 60.0
    """What it takes for a part; so long that label maps pile up."""


@dataclass(frozen=True, slots=True)
class Call:
    """A batch of a stand-in."""

    actor: str
    began: float
    ended: float
    slept: float
    num_images: int


def stand_in(latency_seconds: float, folder: Path) -> type:
    """In place of the actor `label._Predictor`; it notes its calls in a folder."""

    class StandIn:  # local, so that it travels whole: workers need not import what this module does
        def __init__(self, *, ledger: Any, **_: Any) -> None:
            self._ledger, self._random = ledger, np.random.default_rng(0)
            ledger.beat.remote()

        def __call__(self, decoded: pa.Table) -> pa.Table:
            began, slept = time.time(), latency_seconds * decoded.num_rows
            time.sleep(slept)
            shapes = zip(decoded["height"].to_pylist(), decoded["width"].to_pylist(), strict=True)
            # Noise, as the PNG of a single class would be next to nothing.
            label_maps = [self._random.integers(0, len(CLASSES), shape, np.uint8) for shape in shapes]
            counts = [np.bincount(one.reshape(-1), minlength=len(CLASSES)) for one in label_maps]
            predicted = decoded.drop_columns(["pixels", "num_rows", "stage", "reason"])
            for name, column in {
                "label_map": pa.array([one.tobytes() for one in label_maps], pa.binary()),
                "num_pixels": pa.array(counts, pa.list_(pa.int64())),
                "confidence_sum": pa.array([count / 2 for count in counts], pa.list_(pa.float64())),
                "stage": decoded["stage"],
                "reason": decoded["reason"],
            }.items():
                predicted = predicted.append_column(name, column)
            self._ledger.predicted.remote(predicted.num_rows)
            with (folder / str(os.getpid())).open("a") as file:
                file.write(f"{began} {time.time()} {slept} {decoded.num_rows}\n")
            return predicted

    return StandIn


def slow_sink(seconds: float) -> type:
    """In place of `sink.PartSink`."""

    class SlowSink(sink.PartSink):
        def write(self, blocks: Any, ctx: object) -> None:
            time.sleep(seconds)
            sink.PartSink.write(self, blocks, ctx)

    return SlowSink


@contextlib.contextmanager
def replaced(module: Any, name: str, value: object) -> Iterator[None]:
    """An attribute of a module, for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def write_photos(folder: Path, num_images: int, side: int) -> Path:
    """So many files, of a few photographs of noise."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), np.uint8))
    buffer = io.BytesIO()
    image.resize((side, side)).save(buffer, "JPEG")
    for first in range(0, num_images, LINKS_PER_FILE):
        file = folder / f"{first}.jpg"
        file.write_bytes(buffer.getvalue())
        for number in range(first, min(first + LINKS_PER_FILE, num_images)):
            (photos / f"{number:07d}.jpg").hardlink_to(file)
    return photos


def run(folder: Path, photos: Path, latency_seconds: float) -> list[Call]:
    """Labels photographs with stand-ins on the cluster that Ray is connected to; what these did."""
    calls, checkpoint = folder / "calls", folder / "m.safetensors"
    calls.mkdir()
    small = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    checkpoint.write_bytes(model.untrained("unet_tu-mobilenetv3_small_050", CLASSES, arguments=small).to_bytes())
    job = label.Label(source=str(photos), sink=str(folder / "labels"), model=str(checkpoint))
    with replaced(label, "_Predictor", stand_in(latency_seconds, calls)), contextlib.redirect_stdout(io.StringIO()):
        label.label(job)
    found = []
    for path in calls.iterdir():
        for line in path.read_text().splitlines():
            began, ended, slept, num_images = map(float, line.split())
            found.append(Call(path.name, began, ended, slept, int(num_images)))
    return found


def efficiency(calls: list[Call]) -> tuple[float, float, float]:
    """Busy time over the time that all stand-ins are at work, and when that begins and ends."""
    actors = {call.actor for call in calls}
    begins = max(min(call.began for call in calls if call.actor == actor) for actor in actors)
    ends = min(max(call.ended for call in calls if call.actor == actor) for actor in actors)
    busy = sum(
        call.slept * max(0.0, min(call.ended, ends) - max(call.began, begins)) / (call.ended - call.began)
        for call in calls
    )
    return busy / (len(actors) * (ends - begins)), begins, ends


class Look:
    """A thread that looks at the object store."""

    def __init__(self) -> None:
        self.used_bytes, self.spilled_bytes = 0, 0
        self._stop = threading.Event()

    def __enter__(self) -> "Look":
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        import ray
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)  # type: ignore[no-untyped-call]
        while not self._stop.wait(LOOK_SECONDS):
            stats = get_memory_info_reply(state).store_stats  # type: ignore[no-untyped-call]
            self.used_bytes = max(self.used_bytes, stats.object_store_bytes_used)
            self.spilled_bytes = max(self.spilled_bytes, stats.spilled_bytes_total)


@contextlib.contextmanager
def nodes(head: dict[str, Any], others: list[dict[str, Any]]) -> Iterator[None]:
    """A cluster that this process is connected to."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
    try:
        for node in others:
            cluster.add_node(**node)
        ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


def schedule(settings: Scale, folder: Path) -> float:
    """Prints, and returns, how much of their time stand-ins had work."""
    photos = write_photos(folder, settings.num_images, SIDE)
    gpus = {"num_cpus": 0, "num_gpus": settings.num_actors // settings.num_nodes, "object_store_memory": 2**28}
    feeding = {"num_cpus": 2, "object_store_memory": 2**29}
    with nodes({"num_cpus": 0}, [feeding, *[gpus] * settings.num_nodes]):
        began = time.time()
        calls = run(folder, photos, settings.latency_ms / 1000)
        seconds = time.time() - began
    told = newest_run(str(folder / "labels"))
    share, begins, ends = efficiency(calls)
    print_table(
        ["models", "images", "batches", "start", "all at work", "tail", "images/s", "efficiency"],
        [
            [
                str(len({call.actor for call in calls})),
                f"{told['counts']['labelled']:,}",
                str(len(calls)),
                f"{begins - began:.0f} s",
                f"{ends - begins:.0f} s",
                f"{began + seconds - ends:.0f} s",
                f"{sum(c.num_images for c in calls if begins < c.ended <= ends) / (ends - begins):,.0f}",
                f"{share:.3f}",
            ]
        ],
    )
    return share


def bounded(folder: Path, num_images: int, side: int, write_seconds: float) -> tuple[Look, int]:
    """Labels into a slow sink on the cluster that Ray is connected to; what the store held, and bytes of pixels."""
    photos = write_photos(folder, num_images, side)
    with replaced(sink, "PartSink", slow_sink(write_seconds)), Look() as look:
        run(folder, photos, 0.0)
    return look, num_images * side * side * 3


def main() -> None:
    """Prints both tables."""
    settings = tyro.cli(Scale)
    logging.getLogger("ray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        share = schedule(settings, Path(folder))
    store_bytes = settings.store_mib * 2**20
    with tempfile.TemporaryDirectory() as folder, nodes({"num_cpus": 4, "object_store_memory": store_bytes}, []):
        look, pixel_bytes = bounded(Path(folder), settings.num_large, LARGE_SIDE, settings.write_seconds)
    print_table(
        ["object store", "pixels in all", "in the store, at most", "of it", "spilled"],
        [
            [
                *(f"{size / 2**20:,.0f} MiB" for size in (store_bytes, pixel_bytes, look.used_bytes)),
                f"{look.used_bytes / store_bytes:.2f}",
                f"{look.spilled_bytes / 2**20:,.0f} MiB",
            ]
        ],
    )
    sys.exit(not (share >= MIN_EFFICIENCY and look.spilled_bytes == 0))


if __name__ == "__main__":
    main()
