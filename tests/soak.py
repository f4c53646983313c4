"""Labels a million small drawn images from tar shards on S3, runs again, and verifies the store.

    python -m tests.soak [--num-images 1000000]

A real S3 server, a Ray cluster of one node, and jobs in processes of their own. The first tenth of the
shards is labelled into a sink of its own before, to see whether time is linear. The model is as small as
segmentation-models-pytorch has them, so what is timed is all the rest. It is sound when `segray verify
SINK SOURCE` finds each image exactly once, when the driver's memory, its CPU time an image and the images
a second stay what they were, and when the second run ends in two minutes without a request for a shard.
Where AWS_ENDPOINT_URL is set, the S3 server is that one.
"""

import contextlib
import io
import itertools
import logging
import os
import re
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import psutil
import tyro
from PIL import Image

from segray import model
from segray.demo import CLASSES, scene
from tests.chaos import proxied, s3_server, start
from tests.label_store import newest_run

IMAGES_PER_SHARD = 1000
SIDE = 32
SECOND_RUN_SECONDS = 120.0
MAX_GROWTH = 0.2
MIN_RATIO = 0.75
LOOK_SECONDS = 0.5
SOURCE = "s3://segray/soak"
SINK = "s3://segray/soak-labels"  # a bucket may have stores of others


@dataclass(frozen=True, kw_only=True)
class Soak:
    """Runs the job on many images."""

    num_images: int = 1_000_000
    """How many; thousands."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a run uses."""

    moment: float
    """Seconds since the epoch."""
    driver_seconds: float
    """CPU time that the driver has taken."""
    driver_bytes: int
    """Resident memory of the driver."""
    store_bytes: int
    """What is in the object store."""


def write_source(num_images: int) -> None:
    """Shards of images, drawn from a few scenes."""
    fs, _ = fsspec.core.url_to_fs(SOURCE, use_listings_cache=False)
    corners = [(row, col) for row in range(0, 160, 8) for col in range(0, 160, 8)]
    drawn = []
    for seed in range(10):
        image = Image.fromarray(scene(seed)[0])
        for row, col in corners:
            buffer = io.BytesIO()
            image.crop((col, row, col + SIDE, row + SIDE)).save(buffer, "JPEG")
            drawn.append(buffer.getvalue())

    def write(shard: int) -> None:
        buffer = io.BytesIO()
        pictures = itertools.islice(itertools.cycle(drawn), shard, shard + IMAGES_PER_SHARD)
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for member, data in enumerate(pictures):
                info = tarfile.TarInfo(f"{member:06d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        folder = "tenth" if shard < num_shards // 10 else "rest"
        fs.pipe_file(f"{SOURCE}/{folder}/{shard:06d}.tar", buffer.getvalue())

    num_shards = num_images // IMAGES_PER_SHARD
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(num_shards)))


def store_bytes() -> int:
    """How much is in the object stores of the cluster."""
    import ray

    there, left = (
        some["object_store_memory"]
        for some in (ray.cluster_resources(), ray.available_resources())  # type: ignore[no-untyped-call]
    )
    return int(there - left)


def label(source: str, sink: str, checkpoint: str) -> list[Sample]:
    """Labels a source; what that used."""
    began = time.monotonic()
    job = start("jobs/label.py", source, sink, "--model", checkpoint, "--batch-size", "256")
    lines: list[str] = []

    def read() -> None:
        for line in job.stdout or ():
            lines.append(line)
            if (found := re.match(r"(\d+) of", line)) and len(lines) % 6 == 0:
                print(f"  {time.monotonic() - began:6.0f} s  {int(found[1]):>9,} images", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    samples, driver = [], psutil.Process(job.pid)
    while job.poll() is None:
        with contextlib.suppress(psutil.Error):
            times = driver.cpu_times()
            samples.append(
                Sample(
                    moment=time.time(),
                    driver_seconds=times.user + times.system,
                    driver_bytes=driver.memory_info().rss,
                    store_bytes=store_bytes(),
                )
            )
        time.sleep(LOOK_SECONDS)
    reader.join(10)
    if job.returncode:
        sys.exit("".join(lines))
    return samples


def early_and_late(samples: list[Sample]) -> tuple[int, int]:
    """Memory of the driver in the second fifth of a run and in its last."""
    fifth = max(1, len(samples) // 5)
    early, late = (max(s.driver_bytes for s in some) for some in (samples[fifth : 2 * fifth], samples[-fifth:]))
    return early, late


def driver_ms(run: dict[str, Any], samples: list[Sample]) -> float:
    """CPU milliseconds of the driver for an image, from the first to the last; what comes before is paid once."""
    seconds = run["seconds"]
    first = datetime.fromisoformat(run["finished"]).timestamp() - seconds["total"] + seconds["start"]
    steady = [s.driver_seconds for s in samples if first <= s.moment <= first + seconds["steady"]]
    return 1000 * (steady[-1] - steady[0]) / run["counts"]["labelled"] if steady else 0.0


def tell(name: str, run: dict[str, Any], samples: list[Sample]) -> str:
    """A row of the table."""
    mib = [f"{size / 2**20:,.0f}" for size in early_and_late(samples)]
    stored = max(s.store_bytes for s in samples) / 2**20
    seconds = run["seconds"]
    rate = f"{run['images_per_second']:,.0f}" if run["images_per_second"] else ""
    cost = f"{driver_ms(run, samples):.3f}" if rate else ""
    return (
        f"| {name} | {run['counts']['labelled']:,} | {seconds['total']:,.0f} | {seconds['steady']:,.0f} | {rate} | "
        f"{cost} | {' → '.join(mib)} | {stored:,.0f} |"
    )


def main() -> None:
    """Runs all of it and prints a table."""
    settings = tyro.cli(Soak)
    import ray
    from ray.cluster_utils import Cluster

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        checkpoint = f"{folder}/small.safetensors"
        small = model.untrained(
            "unet_tu-mobilenetv3_small_050", CLASSES, arguments={"encoder_depth": 3, "decoder_channels": [8, 8, 8]}
        )
        Path(checkpoint).write_bytes(small.to_bytes())
        stack.enter_context(s3_server())
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        proxy = stack.enter_context(proxied(endpoint))
        began = time.monotonic()
        write_source(settings.num_images)
        print(f"{settings.num_images:,} images in tar shards, {time.monotonic() - began:.0f} s", flush=True)

        os.environ["RAY_idle_worker_killing_time_threshold_ms"] = "60000"  # as a run does for a cluster of its own
        head = {"num_cpus": os.cpu_count(), "include_dashboard": False, "object_store_memory": 2**30}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        stack.callback(cluster.shutdown)
        os.environ["RAY_ADDRESS"] = cluster.address
        ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        stack.callback(ray.shutdown)

        rows, rates, costs, growth = [], [], [], 0.0
        for name, source, into in (("a tenth", f"{SOURCE}/tenth", f"{SINK}-tenth"), ("all", SOURCE, SINK)):
            samples = label(source, into, checkpoint)
            early, late = early_and_late(samples)
            growth = late / early - 1
            rates.append(newest_run(into)["images_per_second"])
            costs.append(driver_ms(newest_run(into), samples))
            rows.append(tell(name, newest_run(into), samples))
            print(rows[-1], flush=True)

        # With workers of its own, whose requests the proxy sees too.
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.server_port}"
        os.environ.pop("RAY_ADDRESS")
        began = time.monotonic()
        samples = label(SOURCE, SINK, checkpoint)
        again_seconds = time.monotonic() - began
        rows.append(tell("all, again", newest_run(SINK), samples))
        fetched, noted = (
            [request for request in proxy.requests if re.match(f"GET /segray/{path}", request)]
            for path in ("soak/.*tar", "soak-labels/shards/.*parquet")
        )

        os.environ |= {"AWS_ENDPOINT_URL": endpoint, "RAY_ADDRESS": cluster.address}
        began = time.monotonic()
        check = start("jobs/verify.py", SINK, SOURCE)
        verdict, _ = check.communicate()
        verified_seconds = time.monotonic() - began

    print(
        "\n| run | images | seconds | of these labelling | images/s | driver ms/image "
        "| driver MiB, early → late | object store MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print(*rows, sep="\n")
    ratio = rates[1] / rates[0] if rates[0] else 1.0  # one shard is too few to tell a rate
    dearer = costs[1] / costs[0] - 1 if costs[0] else 0.0  # likewise
    print(f"\ndriver memory grew by {growth:.1%}; images/s of all are {ratio:.2f} of those of a tenth")
    print(f"the driver's CPU time an image, of all against a tenth: {dearer:+.1%}")
    print(f"the second run: {again_seconds:.0f} s, {len(fetched)} requests for shards, {len(noted)} for notes of them")
    print(f"verified in {verified_seconds:.0f} s: status {check.returncode}\n{verdict}")
    is_flat, is_linear = max(growth, dearer) < MAX_GROWTH, ratio > MIN_RATIO
    # That the notes were asked for shows that the proxy would have seen the others.
    is_skipped = not fetched and noted and again_seconds < SECOND_RUN_SECONDS
    sys.exit(not (check.returncode == 0 and is_flat and is_linear and is_skipped))


if __name__ == "__main__":
    main()
