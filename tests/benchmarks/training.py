"""Images per second of training: the step alone, with its batch in memory, and the whole job.

    python -m tests.benchmarks.training [--device cpu] [--num-threads 1] [--dtype float32]

The model is a U-Net with a ResNet-34, on crops of 256×256 of drawn scenes (480×360, JPEG in tar shards), eight a step.
The step alone runs before and after the job, and the ratio is to the mean of both, since other work on the machine
moves all of them. The job's rate counts from the second line of its metrics on, without validation. With one thread a
machine of two cores has the other for the tasks that feed the model.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from segray import model
from segray.augment import Augmentation, augment
from segray.demo import CLASSES, Draw, draw, scene
from segray.journal import Journal
from segray.learn import Learner
from segray.loss import Loss
from segray.schedule import Optimization

ROOT = Path(__file__).parents[2]
NAME = "unet_resnet34"
BATCH_SIZE = 8
NUM_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Training:
    """Times training."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Of the model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of its forward and backward passes."""
    num_threads: int = 1
    """Of the model, on a CPU."""
    num_images: int = 160
    """That the job trains on, in two epochs."""


def step_alone(settings: Training) -> float:
    """Images a second."""
    torch.set_num_threads(settings.num_threads)
    learner = Learner(
        model.untrained(NAME, CLASSES),
        Optimization(),
        Loss.parse("ce", CLASSES),
        NUM_STEPS,
        device=settings.device,
        dtype=settings.dtype,
    )
    crops = [augment(*scene(seed), Augmentation(), CLASSES.ignore_index, seed) for seed in range(BATCH_SIZE)]
    images, targets = (torch.from_numpy(np.stack(some)) for some in zip(*crops, strict=True))
    for _ in range(2):
        learner.step(images, targets.long())
    begin = time.perf_counter()
    for _ in range(NUM_STEPS):
        loss = learner.step(images, targets.long())
    float(loss)  # waits for a GPU
    return NUM_STEPS * BATCH_SIZE / (time.perf_counter() - begin)


def job(settings: Training, folder: str) -> float:
    """Images a second."""
    draw(Draw(sink=f"{folder}/train", num_scenes=settings.num_images, first_seed=0, format="tar", shard_scenes=64))
    draw(Draw(sink=f"{folder}/val", num_scenes=4, first_seed=1_000_000, format="tar"))
    options = {
        "val": f"{folder}/val",
        "model": NAME,
        "num-epochs": 2,
        "batch-size": BATCH_SIZE,
        "device": settings.device,
        "dtype": settings.dtype,
        "num-threads": settings.num_threads,
    }
    flat = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "jobs/train.py", f"{folder}/train", f"{folder}/model", *flat]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [line for line in Journal(f"{folder}/model").metrics() if line["kind"] == "steps"][1:]
    num_steps, seconds = (sum(line[name] for line in lines) for name in ("num_steps", "seconds"))
    return float(num_steps * BATCH_SIZE / seconds)


def main() -> None:
    """Prints a table."""
    settings = tyro.cli(Training)
    before = step_alone(settings)
    with tempfile.TemporaryDirectory() as folder:
        whole = job(settings, folder)
    after = step_alone(settings)
    alone = (before + after) / 2
    print("| training | images/s | of the step alone |\n|---|---|---|")
    print(f"| the step alone | {alone:.2f} | 1.00 |\n| the job | {whole:.2f} | {whole / alone:.2f} |")
    where = f"{settings.num_threads} threads" if settings.device == "cpu" else torch.cuda.get_device_name()
    print(f"\nsteps alone: {before:.2f}, {after:.2f}; {NAME}, {settings.dtype}, {where}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
