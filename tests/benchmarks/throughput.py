"""Images per second of three ways to label the same frames with the same model on the same threads.

    python tests/benchmarks/throughput.py

1. The bare loop: frames decoded beforehand, batched forward passes and argmax, no Ray.
2. The recipe of Ray's documentation: read_images → map_batches(actor) → write_parquet.
3. This job, from files to the label store.

The model is torchvision's LR-ASPP MobileNetV3 with random weights in float32; the frames are drawn
scenes, 480×360 JPEG. A rate is that of the steady state: it counts from the first batch of label
maps to the last, and what goes before and comes after is shown apart. The bare loop runs before,
between and after the jobs, and their ratio is to the mean of its neighbours, since other work on
the machine moves all of them.
"""

import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from segray.classes import Classes
from segray.demo import scene
from segray.model import Checkpoint

NAME = "lraspp_mobilenet_v3_large"
BATCH_SIZE = 16
NUM_FRAMES = 640
NUM_BARE = 128
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def build_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = torchvision.models.get_model(NAME, weights=None, weights_backbone=None, num_classes=21)
    return model.eval()


def draw_frames(folder: Path) -> list[Path]:
    """480×360 JPEG files."""
    folder.mkdir()
    frames = []
    for seed in range(NUM_FRAMES):
        frames.append(folder / f"{seed:04d}.jpg")
        Image.fromarray(scene(seed)[0]).resize((480, 360)).save(frames[-1], quality=92)
    return frames


def forward(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """(batch, height, width, 3) uint8 → (batch, height, width) class ids."""
    with torch.inference_mode():
        values = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
        return np.asarray(model(values)["out"].argmax(1))


def bare_loop(frames: list[Path], threads: int) -> float:
    """Images per second of the forward loop alone."""
    torch.set_num_threads(threads)
    model = build_model()
    images = [np.asarray(Image.open(frame).convert("RGB")) for frame in frames]
    forward(model, np.stack(images[:BATCH_SIZE]))
    started = time.perf_counter()
    for first in range(0, len(images), BATCH_SIZE):
        forward(model, np.stack(images[first : first + BATCH_SIZE]))
    return len(images) / (time.perf_counter() - started)


class Actor:
    """What Ray's documentation has one write."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = build_model()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        label_maps = forward(self.model, batch["image"])
        now = np.full(len(label_maps), time.time())
        return {"path": batch["path"], "label_map": label_maps.astype(np.uint8), "at": now}


def documented_recipe(folder: Path, sink: Path, threads: int) -> tuple[float, float, float]:
    """Images per second once it runs, the seconds until then, and those after the last."""
    import pyarrow.parquet as pq
    import ray

    started = time.time()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    (
        ray.data.read_images(str(folder), mode="RGB", include_paths=True)
        .map_batches(
            Actor,
            fn_constructor_args=[threads],
            batch_size=BATCH_SIZE,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=max(1, threads - 1),
        )
        .write_parquet(str(sink))
    )
    finished = time.time()
    ray.shutdown()
    at = np.sort(
        np.concatenate([pq.read_table(part, columns=["at"])["at"].to_numpy() for part in sink.glob("*.parquet")])
    )
    return np.sum(at > at[0]) / (at[-1] - at[0]), at[0] - started, finished - at[-1]


def this_job(folder: Path, sink: Path, checkpoint: Path) -> tuple[float, float, float]:
    """Images per second once it runs, the seconds until then, and those after the last."""
    command = [sys.executable, "jobs/label.py", str(folder), str(sink), "--model", str(checkpoint), "--device", "cpu"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    [run] = (json.loads(path.read_text()) for path in (sink / "runs").iterdir())
    assert run["counts"]["labelled"] == len(list(folder.iterdir()))
    seconds = run["seconds"]
    return run["images_per_second"], seconds["start"], seconds["total"] - seconds["start"] - seconds["steady"]


def main() -> None:
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        frames = draw_frames(root / "frames")
        checkpoint = root / f"{NAME}.safetensors"
        names = tuple(f"class {index}" for index in range(21))
        tensors = build_model().state_dict()
        checkpoint.write_bytes(Checkpoint(architecture=NAME, classes=Classes(names), tensors=tensors).to_bytes())

        bare = [bare_loop(frames[:NUM_BARE], threads)]
        recipe, *recipe_around = documented_recipe(root / "frames", root / "recipe", threads)
        bare.append(bare_loop(frames[:NUM_BARE], threads))
        job, *job_around = this_job(root / "frames", root / "labels", checkpoint)
        bare.append(bare_loop(frames[:NUM_BARE], threads))

    print(f"\n{NUM_FRAMES} frames, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| way | images/s | of the bare loop | seconds before the first | after the last |")
    print("|---|---|---|---|---|")
    print(f"| bare loop | {np.mean(bare):.1f} | 1.00 | | |")
    for way, rate, (before, after), neighbours in (
        ("Ray's documented recipe", recipe, recipe_around, bare[:2]),
        ("segray", job, job_around, bare[1:]),
    ):
        print(f"| {way} | {rate:.1f} | {rate / np.mean(neighbours):.2f} | {before:.1f} | {after:.1f} |")
    print(f"\nsegray / recipe: {job / recipe:.2f}; bare loops: {', '.join(f'{rate:.1f}' for rate in bare)}")


if __name__ == "__main__":
    main()
