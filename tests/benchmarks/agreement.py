r"""Whether the fast way to label gives the labels of the plain one: on CamVid's `val`, with a model that knows CamVid.

    python -m tests.benchmarks.agreement build/camvid/model/checkpoint.safetensors [--camvid ../shared/data/camvid]

compares `Predictor` as the job has it, and in float32, with the eager forward pass in float32 of the same weights: the
share of pixels that are labelled alike, and the mIoU against the targets. It fails below 99.9 %, and where the mIoUs
differ by more than 0.1 point. Such a model, in some minutes on one thread, is made by

    python jobs/pack.py ../shared/data/camvid build/camvid/shards --dataset camvid
    python jobs/train.py build/camvid/shards build/camvid/model --model lraspp_mobilenet_v3_large --resize 240 \
        --crop 192 --scale 0.75 1.5 --num-epochs 24 --batch-size 8 --loss ce+dice --learning-rate 0.002 --ema 0.99 \
        --dtype bfloat16 --num-threads 1
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
import tyro
from PIL import Image
from tyro.conf import Positional

from segray import model
from segray.decode import MAX_PIXELS, decode
from segray.label import Label
from segray.model import Checkpoint
from segray.predict import Prediction, Predictor
from segray.statistics import ConfusionMatrix
from tests.benchmarks.throughput import THREADS, machine, markdown

VOID = 11
"""In the files of targets."""
BATCH_SIZE = 8
MIN_AGREEMENT, MAX_DIFFERENCE = 0.999, 0.001


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Compares ways to label."""

    checkpoint: Positional[Path]
    """Of CamVid's eleven classes."""
    camvid: Path = Path(os.environ.get("SEGRAY_TEST_DATA", "../shared/data"), "camvid")
    """The folder that holds `val` and `valannot`."""
    device: str = "cpu"
    """Where the models run."""


def eager(checkpoint: Checkpoint, device: str) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    """Labels images of one size as the library's own forward pass in float32 does."""
    module = model.build(checkpoint).to(device)
    multiple, resize = model.input_multiple(module), checkpoint.preprocessing.resize

    @torch.inference_mode()
    def label(images: Sequence[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
        own_size = pixels.shape[-2:]
        if resize is not None:
            pixels = TF.resize(pixels, [resize], antialias=True)
        height, width = pixels.shape[-2:]
        values = model.normalised(pixels, checkpoint.preprocessing)
        values = F.pad(values, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        logits = F.interpolate(model.logits(module, values), values.shape[-2:], mode="bilinear")[..., :height, :width]
        label_maps: np.ndarray = F.interpolate(logits, own_size, mode="bilinear").argmax(1).byte().cpu().numpy()
        return label_maps

    return label


def fast(predictor: Predictor, images: Sequence[np.ndarray]) -> np.ndarray:
    """Labels images of one size with it."""
    predictions = predictor.predict(images)
    return np.stack([prediction.label_map for prediction in predictions if isinstance(prediction, Prediction)])


def main() -> None:
    """Prints a table; the exit status is 1 where the labels differ by more than they may."""
    settings = tyro.cli(Agreement)
    torch.set_num_threads(THREADS)
    data = settings.checkpoint.read_bytes()
    checkpoint = Checkpoint.from_bytes(data)
    num_classes = len(checkpoint.classes)

    def predictor(dtype: Any) -> Predictor:
        threads = THREADS
        return Predictor(lambda: data, batch_size=BATCH_SIZE, device=settings.device, dtype=dtype, num_threads=threads)

    default = predictor(Label.dtype)
    label: dict[str, Callable[[Sequence[np.ndarray]], np.ndarray]] = {
        "eager, float32": eager(checkpoint, settings.device),
        "Predictor, float32": partial(fast, predictor("float32")),
        f"Predictor, {Label.dtype}": partial(fast, default),
    }
    paths = sorted((settings.camvid / "val").iterdir())
    matrices = {name: ConfusionMatrix.zeros(num_classes) for name in label}
    alike = dict.fromkeys(label, 0)
    num_pixels = 0
    for first in range(0, len(paths), BATCH_SIZE):
        some = paths[first : first + BATCH_SIZE]
        images = [decode(path.read_bytes(), MAX_PIXELS) for path in some]
        targets = [np.asarray(Image.open(settings.camvid / "valannot" / path.name)) for path in some]
        label_maps = {name: way(images) for name, way in label.items()}
        num_pixels += sum(target.size for target in targets)
        for name, found in label_maps.items():
            alike[name] += int((found == label_maps["eager, float32"]).sum())
            for target, label_map in zip(targets, found, strict=True):
                matrices[name] += ConfusionMatrix.of(target, label_map, num_classes, VOID)
    miou = {name: matrix.miou() for name, matrix in matrices.items()}
    difference = {name: abs(value - miou["eager, float32"]) for name, value in miou.items()}
    rows = [
        {"way": name, "pixels alike": f"{alike[name] / num_pixels:.4%}", "mIoU": f"{miou[name]:.4f}"} for name in label
    ]
    print(markdown(rows))
    of_model = f"{checkpoint.architecture}, {Label.dtype} is {default._forward._dtype}"
    print(f"{len(paths)} images of CamVid's val, {of_model}, {machine(settings.device)}, torch {torch.__version__}")
    sys.exit(any(alike[name] < MIN_AGREEMENT * num_pixels or difference[name] > MAX_DIFFERENCE for name in label))


if __name__ == "__main__":
    main()
