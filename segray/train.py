"""Training: shards of images with their targets → a checkpoint that the other jobs take.

SOURCE ─survey─▶ counts, or the first fault              before anything is trained
       ─stream─▶ crops, for all epochs in one execution  read, decode, augment (Ray tasks)
       ─shuffle▶ batches
       ─train──▶ one worker of Ray Train
       ─validate, with the Predictor that labels
       ─write──▶ SINK/checkpoint.safetensors
"""

import dataclasses
import json
import math
import os
import shlex
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt, UInt8
from tyro.conf import Positional

from segray.classes import Classes
from segray.decode import decode
from segray.errors import Reject, RunError, SettingsError, SinkError, SourceError
from segray.labelmap import decode_png
from segray.statistics import ConfusionMatrix

if TYPE_CHECKING:  # torch and Ray take seconds to import, and `--help` waits for neither
    import ray.data
    import torch
    from torch import Tensor, nn

    from segray.model import Checkpoint, Preprocessing

__all__ = ["Train", "augmented", "pairs", "train", "train_one_epoch"]

_PAIRS = "a tar holds NAME.jpg with NAME.target.png, a Parquet shard the columns image and target"
_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_MAX_PIXELS = 200_000_000
_ROWS_PER_BLOCK = 64
_MAX_BLOCKS = 1000

_Image = UInt8[np.ndarray, "height width 3"]
_Target = UInt[np.ndarray, "height width"]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains a model on shards of images with their targets.

    Raises:
        SettingsError: a setting is out of its bounds.
    """

    source: Positional[str]
    """Folder or prefix of shards: tar (NAME.jpg with NAME.target.png) or Parquet (columns image, target)."""
    sink: Positional[str]
    """Folder or prefix that receives checkpoint.safetensors."""
    val: str | None = None
    """Shards to validate on. None: the last shard of SOURCE, which is then not trained on."""
    classes: str | None = None
    """Classes file. None: classes.json beside the shards."""

    model: str = "unet_resnet34"
    """The model, as the label job names it; it starts from random weights."""
    arguments: str = "{}"
    """JSON: what else the model's constructor is given, e.g. '{"decoder_channels": [64, 32, 16, 8, 4]}'."""

    num_epochs: int = 30
    """How often each image is shown."""
    batch_size: int = 16
    """Crops in a step."""
    crop: int = 256
    """Side in pixels of the square cut out of each image, anew in each epoch."""
    learning_rate: float = 1e-3
    """The largest: reached after the warm-up, from where it falls to nothing along a cosine."""
    warm_up: float = 0.05
    """Share of the steps in which the learning rate rises to it."""
    weight_decay: float = 0.01
    """AdamW's."""
    shuffle_images: int = 512
    """Crops held back to be drawn from at random."""
    seed: int = 0
    """Of the weights, the crops and the order."""
    num_threads: int | None = None
    """Threads of the model. None: all cores of the worker's machine."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "batch_size", "crop", "shuffle_images"):
            if getattr(self, name) < 1:
                raise SettingsError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise SettingsError(f"--seed {self.seed} must be at least 0")
        if self.num_threads is not None and self.num_threads < 1:
            raise SettingsError(f"--num-threads {self.num_threads} must be at least 1")
        if self.learning_rate <= 0:
            raise SettingsError(f"--learning-rate {self.learning_rate} must be above 0")
        if not 0 <= self.warm_up < 1:
            raise SettingsError(f"--warm-up {self.warm_up} must be at least 0 and below 1")
        if self.weight_decay < 0:
            raise SettingsError(f"--weight-decay {self.weight_decay} must be at least 0")
        try:
            arguments = json.loads(self.arguments)
        except json.JSONDecodeError as error:
            raise SettingsError(f"--arguments {self.arguments!r} is not JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise SettingsError(f"--arguments {self.arguments!r} must be a JSON object")

    def command(self) -> str:
        """The command line that gives these settings."""
        options: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("source", "sink") and value != field.default:
                options += [f"--{field.name.replace('_', '-')}", str(value)]
        return shlex.join(["python", "jobs/train.py", self.source, self.sink, *options])


def train(job: Train) -> None:
    """Trains, validates, and writes `SINK/checkpoint.safetensors`.

    Raises:
        SourceError: there are no shards, or an image lacks its target or has one that does not fit.
        SettingsError: the settings do not fit the source or each other.
        ModelError: the model is not known.
        RunError: training broke off.
        SinkError: the checkpoint cannot be written.
    """
    from segray import model
    from segray.session import session

    train_shards, val_shards = _shards(job)
    classes = Classes.read(job.classes or f"{job.source.rstrip('/')}/classes.json")
    multiple = model.input_multiple(model.build(_untrained(job, classes)))
    if job.crop % multiple:
        raise SettingsError(f"--crop {job.crop} must be a multiple of {multiple} for {job.model}")

    with session():
        num_train, num_val = _survey(train_shards, classes), _survey(val_shards, classes)
        if num_train < job.batch_size:
            raise SettingsError(f"--batch-size {job.batch_size} is more than the {num_train} images to train on")
        print(f"{num_train} images to train on, {num_val} to validate on", flush=True)
        data = {
            "train": {**_made_by(job.source), "uri": job.source, "shards": len(train_shards), "images": num_train},
            "val": {**_made_by(job.val or job.source), "uri": job.val or val_shards[0], "images": num_val},
        }
        origin = {"command": job.command(), "data": data, "seed": job.seed}
        streams = {"train": _stream(train_shards, job, classes), "val": _whole(val_shards)}
        trained = _fit({"job": job, "classes": classes, "num_train": num_train, "origin": origin}, streams)

    uri = f"{job.sink.rstrip('/')}/checkpoint.safetensors"
    try:
        with fsspec.open(uri, "wb") as file:
            file.write(trained)
    except OSError as error:
        raise SinkError(f"{uri} cannot be written: {error}") from error
    metrics = model.Checkpoint.from_bytes(trained).origin["metrics"]
    ious = ", ".join(f"{name} {'absent' if iou is None else f'{iou:.3f}'}" for name, iou in metrics["iou"].items())
    print(f"mIoU {metrics['miou']:.3f} ({ious})\nwrote {uri}", flush=True)


def train_one_epoch(
    module: "nn.Module",
    batches: Iterable[Mapping[str, "Tensor"]],
    optimizer: "torch.optim.Optimizer",
    schedule: "torch.optim.lr_scheduler.LRScheduler",
    preprocessing: "Preprocessing",
    ignore_index: int,
) -> float:
    """Takes a step for each batch.

    Args:
        module: on one device, in training mode.
        batches: each `image`, (batch, height, width, 3) uint8 RGB, and `target`, (batch, height, width) class ids.
        optimizer: of the module's parameters.
        schedule: of the optimizer; it advances with each step.
        preprocessing: what the model expects.
        ignore_index: the id of void pixels in targets.

    Returns:
        The mean over the steps of the cross-entropy of a pixel that is not void.
    """
    import torch
    import torch.nn.functional as F

    from segray.model import logits

    device = next(module.parameters()).device
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    losses = []
    for batch in batches:
        image = batch["image"].to(device).permute(0, 3, 1, 2).float() * (preprocessing.range / 255)
        target = batch["target"].to(device).long()
        output = logits(module, (image - mean) / std)
        if output.shape[-2:] != target.shape[-2:]:
            output = F.interpolate(output, target.shape[-2:], mode="bilinear", align_corners=False)
        # Not the mean, which is NaN where a batch holds nothing but void.
        total = F.cross_entropy(output, target, ignore_index=ignore_index, reduction="sum")
        loss = total / (target != ignore_index).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def pairs(shard: str) -> Iterator[tuple[str, bytes, bytes]]:
    """Reads a shard once, front to back.

    Args:
        shard: URI of a tar (NAME.jpg with NAME.target.png) or of a Parquet file (columns `image` and `target`).

    Yields:
        For each image its own URI (`SHARD#NAME`), its bytes, and its target's bytes.

    Raises:
        SourceError: the shard cannot be read, or an image has no target.
    """
    try:
        with fsspec.open(shard, "rb") as file:
            members = _parquet_pairs(file) if shard.endswith(".parquet") else _tar_pairs(file)
            for name, image, target in members:
                if image is None or target is None:
                    have, lack = ("a target", "image") if image is None else ("an image", "target")
                    raise SourceError(f"{shard}#{name} is {have} without {lack}; {_PAIRS}")
                yield f"{shard}#{name}", image, target
    except (OSError, EOFError, tarfile.TarError, pa.ArrowException) as error:
        raise SourceError(f"{shard} cannot be read: {error or type(error).__name__}") from error


def augmented(
    image: _Image, target: _Target, size: int, ignore_index: int, rng: np.random.Generator
) -> tuple[_Image, _Target]:
    """Cuts a square out of an image and its target, turns and mirrors both, and changes the image's light.

    Args:
        image: (height, width, 3) uint8.
        target: (height, width) class ids.
        size: of the square, in pixels; what lies beyond a smaller image is black, and void in the target.
        ignore_index: the id of void.
        rng: decides.

    Returns:
        (size, size, 3) uint8 and (size, size) of the target's dtype.
    """
    height, width = target.shape
    top = rng.integers(max(height - size, 0) + 1)
    left = rng.integers(max(width - size, 0) + 1)
    image, target = image[top : top + size, left : left + size], target[top : top + size, left : left + size]
    missing = [(0, size - target.shape[0]), (0, size - target.shape[1])]
    if (0, 0) != (missing[0][1], missing[1][1]):
        image = np.pad(image, [*missing, (0, 0)])
        target = np.pad(target, missing, constant_values=ignore_index)
    num_turns = int(rng.integers(4))
    image, target = np.rot90(image, num_turns), np.rot90(target, num_turns)
    if rng.random() < 0.5:
        image, target = image[:, ::-1], target[:, ::-1]
    gain = rng.uniform(0.75, 1.33) * rng.uniform(0.93, 1.07, 3)
    lit = image * gain.astype(np.float32) + np.float32(rng.uniform(-12, 12))
    return np.clip(lit, 0, 255).astype(np.uint8), np.ascontiguousarray(target)


def _fit(config: dict[str, Any], streams: dict[str, Any]) -> bytes:
    """Runs `_train_on_worker` through Ray Train, and prints the lines that it sends.

    Returns:
        The checkpoint's file.
    """
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.queue import Queue

    lines = Queue(actor_options={"num_cpus": 0})

    def print_lines() -> None:
        for line in iter(lines.get, None):
            print(line, flush=True)

    printer = threading.Thread(target=print_lines, daemon=True)
    printer.start()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            _train_on_worker,  # type: ignore[arg-type]  # Ray's own annotation forgets the value that it returns
            train_loop_config={**config, "lines": lines},
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            datasets=streams,
            # Blocks in their order, so that a seed stands for one sequence of batches.
            dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
            run_config=RunConfig(storage_path=folder),  # for Ray's own notes: the worker returns the checkpoint
        )
        try:
            trained: bytes = trainer.fit().return_value  # type: ignore[attr-defined]  # as above
        except TrainingFailedError as error:
            raise RunError(f"training broke off: {_last_line(error)}") from error
        finally:
            lines.put(None)
            printer.join(timeout=5)
            lines.shutdown()
    return trained


def _train_on_worker(config: dict[str, Any]) -> bytes:
    """What the worker of Ray Train runs: all epochs, then validation.

    Returns:
        The checkpoint's file.
    """
    import ray.train
    import torch

    from segray import model

    job: Train = config["job"]
    classes: Classes = config["classes"]
    torch.set_num_threads(job.num_threads or os.cpu_count() or 1)
    untrained = _untrained(job, classes)
    module = model.build(untrained).to(memory_format=torch.channels_last).train()

    steps_per_epoch = config["num_train"] // job.batch_size
    num_steps = steps_per_epoch * job.num_epochs
    optimizer = torch.optim.AdamW(module.parameters(), lr=job.learning_rate, weight_decay=job.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps, job.warm_up))
    stream = iter(
        ray.train.get_dataset_shard("train").iter_torch_batches(
            batch_size=job.batch_size,
            drop_last=True,
            local_shuffle_buffer_size=job.shuffle_images,
            local_shuffle_seed=job.seed,
        )
    )
    for epoch in range(1, job.num_epochs + 1):
        start = time.monotonic()
        batches = islice(stream, steps_per_epoch)
        loss = train_one_epoch(module, batches, optimizer, schedule, untrained.preprocessing, classes.ignore_index)
        config["lines"].put(f"epoch {epoch}/{job.num_epochs}: loss {loss:.4f}, {time.monotonic() - start:.1f} s")
        ray.train.report({"epoch": epoch, "loss": loss})

    trained = dataclasses.replace(untrained, tensors=module.state_dict())
    samples = ray.train.get_dataset_shard("val").iter_rows()
    confusion = _validate(trained, ((row["uri"], row["image"], row["target"]) for row in samples))
    iou = [None if np.isnan(value) else round(float(value), 4) for value in confusion.iou()]
    origin = {
        **config["origin"],
        "metrics": {
            "loss": round(loss, 4),
            "miou": round(confusion.miou(), 4),
            "iou": dict(zip(classes.names, iou, strict=True)),
            "pixel_accuracy": round(confusion.pixel_accuracy(), 4),
        },
        "versions": {name: version(name) for name in ("segray", "torch", "segmentation-models-pytorch", "ray")},
    }
    return dataclasses.replace(trained, origin=origin).to_bytes()


def _rate(step: int, num_steps: int, warm_up: float) -> float:
    """The share of the full learning rate in a step: a line up, then a cosine down."""
    num_rising = max(round(warm_up * num_steps), 1)
    if step < num_rising:
        return (step + 1) / num_rising
    return 0.5 * (1 + math.cos(math.pi * (step - num_rising) / max(num_steps - num_rising, 1)))


def _validate(checkpoint: "Checkpoint", samples: Iterable[tuple[str, bytes, bytes]]) -> ConfusionMatrix:
    """Labels whole images as the label job does."""
    from segray.predict import Prediction, Predictor

    predictor = Predictor(checkpoint.to_bytes)
    classes = checkpoint.classes
    confusion = ConfusionMatrix.zeros(len(classes))
    for uri, data, target_data in samples:
        image, target = _decode(uri, data, target_data, classes)
        (prediction,) = predictor.predict([image])
        if not isinstance(prediction, Prediction):
            raise RunError(f"{uri}: {prediction}; a smaller --learning-rate may help")
        confusion += ConfusionMatrix.of(target, prediction.label_map, len(classes), classes.ignore_index)
    return confusion


def _untrained(job: Train, classes: Classes) -> "Checkpoint":
    """The model before the first step, which the seed decides."""
    from segray import model

    return model.untrained(job.model, classes, arguments=json.loads(job.arguments), seed=job.seed)


def _shards(job: Train) -> tuple[list[str], list[str]]:
    """The shards to train on and those to validate on."""
    from segray.source import Source, is_shard

    def listed(uri: str) -> list[str]:
        uris = (uri for page in Source(uri).entries() for uri in page["uri"].to_pylist())
        if shards := sorted(uri for uri in uris if is_shard(uri)):
            return shards
        raise SourceError(f"{uri}: there are no shards (.tar or .parquet) in it; {_PAIRS}")

    shards = listed(job.source)
    if job.val is not None:
        return shards, listed(job.val)
    if len(shards) < 2:
        raise SourceError(f"{job.source} holds one shard, so that none is left to validate on; give --val SHARDS")
    return shards[:-1], shards[-1:]


def _made_by(folder: str) -> dict[str, str]:
    """The command that made the data, where classes.json beside the shards tells it."""
    try:
        with fsspec.open(f"{folder.rstrip('/')}/classes.json", "rb") as file:
            fields = json.loads(file.read())
    except (OSError, ValueError):
        return {}
    return {"command": fields["command"]} if isinstance(fields, dict) and "command" in fields else {}


def _survey(shards: Sequence[str], classes: Classes) -> int:
    """Reads every image and target once.

    Returns:
        How many images there are.

    Raises:
        SourceError: the first fault that was found, or there is no image.
    """
    import ray.data

    def look(batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        num_images, fault = 0, ""
        try:
            for uri, image, target in pairs(str(batch["shard"][0])):
                _decode(uri, image, target, classes)
                num_images += 1
        except SourceError as error:
            fault = str(error)
        return {"num_images": [num_images], "fault": [fault]}

    items = [{"shard": shard} for shard in shards]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(look, batch_size=1).take_all()
    faults = sorted(row["fault"] for row in rows if row["fault"])
    if faults:
        more = f" ({len(faults) - 1} more shards have faults)" if len(faults) > 1 else ""
        raise SourceError(faults[0] + more)
    num_images = sum(int(row["num_images"]) for row in rows)
    if not num_images:
        raise SourceError(f"{shards[0]}: there is no image in it; {_PAIRS}")
    return num_images


def _stream(shards: Sequence[str], job: Train, classes: Classes) -> "ray.data.Dataset":
    """The crops of all epochs, one epoch after the other: columns `image` and `target`, of one size."""
    import ray.data

    def crops(batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        epoch, shard = int(batch["epoch"][0]), str(batch["shard"][0])
        images: list[_Image] = []
        targets: list[_Target] = []
        for uri, image_data, target_data in pairs(shard):
            image, target = _decode(uri, image_data, target_data, classes)
            # What happens to an image depends on nothing but the seed, the epoch and its name.
            rng = np.random.default_rng([job.seed, epoch, zlib.crc32(uri.encode())])
            image, target = augmented(image, target, job.crop, classes.ignore_index, rng)
            images.append(image)
            targets.append(target)
            if len(images) == _ROWS_PER_BLOCK:
                yield {"image": np.stack(images), "target": np.stack(targets)}
                images, targets = [], []
        if images:
            yield {"image": np.stack(images), "target": np.stack(targets)}

    order = np.random.default_rng(job.seed)
    items = [
        {"epoch": epoch, "shard": shards[index]}
        for epoch in range(job.num_epochs)
        for index in order.permutation(len(shards))
    ]
    num_blocks = min(len(items), _MAX_BLOCKS)
    return ray.data.from_items(items, override_num_blocks=num_blocks).map_batches(crops, batch_size=1)


def _whole(shards: Sequence[str]) -> "ray.data.Dataset":
    """Whole images and their targets, encoded: columns `uri`, `image`, `target`."""
    import ray.data

    def rows(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"uri": uri, "image": image, "target": target} for uri, image, target in pairs(row["shard"])]

    items = [{"shard": shard} for shard in shards]
    return ray.data.from_items(items, override_num_blocks=len(items)).flat_map(rows)


def _decode(uri: str, image_data: bytes, target_data: bytes, classes: Classes) -> tuple[_Image, _Target]:
    try:
        image = decode(image_data, _MAX_PIXELS)
    except Reject as error:
        raise SourceError(f"{uri}: the image cannot be decoded: {error.reason}") from error
    try:
        target = decode_png(target_data)
    except (ValueError, OSError) as error:
        raise SourceError(f"{uri}: the target cannot be decoded: {error}") from error
    if target.shape != image.shape[:2]:
        raise SourceError(
            f"{uri}: the target has {target.shape[0]}×{target.shape[1]} pixels (height×width), "
            f"the image {image.shape[0]}×{image.shape[1]}"
        )
    present = np.flatnonzero(np.bincount(target.ravel()))
    unknown = [int(i) for i in present if i >= len(classes) and i != classes.ignore_index]
    if unknown:
        raise SourceError(
            f"{uri}: the target holds the ids {unknown}, which are neither one of the {len(classes)} classes "
            f"nor ignore_index {classes.ignore_index}"
        )
    return image, target


def _tar_pairs(file: Any) -> Iterator[tuple[str, bytes | None, bytes | None]]:
    from segray.source import tar_samples

    for name, members in tar_samples(file):
        image = next((members[extension] for extension in _IMAGE_EXTENSIONS if extension in members), None)
        target = members.get("target.png")
        if image is not None or target is not None:
            yield name, image, target


def _parquet_pairs(file: Any) -> Iterator[tuple[str, bytes | None, bytes | None]]:
    shard = pq.ParquetFile(file)
    columns = shard.schema_arrow.names
    if lacking := [name for name in ("image", "target") if name not in columns]:
        raise SourceError(f"{file.name}: there is no column {' and no '.join(lacking)} among {columns}; {_PAIRS}")
    row = 0
    for batch in shard.iter_batches(batch_size=64, columns=["image", "target"]):
        for image, target in zip(batch["image"].to_pylist(), batch["target"].to_pylist(), strict=True):
            yield str(row), image, target
            row += 1


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
