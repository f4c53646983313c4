"""Training: shards of pairs → a checkpoint that the other jobs take.

SOURCE ─index──▶ where each pair lies, or the first fault      before anything is trained
       ─stream─▶ crops, an image once an epoch in a new order   read, decode, augment (Ray Data)
       ─learn──▶ workers of Ray Train, each its share of a batch
       ─validate each epoch, with the Predictor that labels
       ─write──▶ SINK/checkpoint.safetensors, the best; last.safetensors; metrics.jsonl; state/

Which images a step sees, and how they are cut, follows from the seed and the step's number, however many workers there
are. So a training that was broken off goes on, with as many workers as there are then, from the newest state in the
sink: nothing else remembers. Where workers are lost, it does so by itself as long as it moves.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from queue import Empty
from typing import TYPE_CHECKING, Annotated, Any, Literal

import fsspec
from tyro.conf import OmitArgPrefixes, Positional

from segray import feed
from segray.augment import Augmentation
from segray.classes import Classes
from segray.errors import RunError, SegrayError, SettingsError, SourceError
from segray.journal import BEST, Journal
from segray.pairs import Census, shown
from segray.progress import START_SECONDS, note
from segray.schedule import Optimization
from segray.worker import Parallel, Placement, Plan, train_on_worker, versions

if TYPE_CHECKING:  # torch and Ray take seconds to import, and `--help` waits for neither
    from segray.model import Checkpoint, Preprocessing

__all__ = ["Train", "train"]

_MAX_FAILURES = 3  # one after the other, without a new state
_RESIZE_SECONDS = 600.0
_MAX_WORKER_CPUS = 0.9
_ENDS = ("finished", "stopped early")
_PORTABLE = ("sink", "dry_run", "parallel", "patience", "save_steps")
"""Settings that may be others when a training goes on."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains a model on shards of images with their targets.

    Raises:
        SettingsError: a setting is out of its bounds.
    """

    source: Positional[str]
    """Folder or prefix of shards: tar (NAME.jpg with NAME.target.png) or Parquet (columns image, target); of images,
    or of windows of scenes as the pack job cuts them."""
    sink: Positional[str]
    """Folder or prefix that receives checkpoint.safetensors, and all that training goes on from."""
    val: str | None = None
    """Shards to validate on. None: those in SOURCE/val, or else the last of SOURCE, which is then not trained on."""
    classes: str | None = None
    """Classes file. None: classes.json beside the shards."""

    model: str = "unet_resnet34"
    """The model, as the label job names it, or a segray checkpoint to train further."""
    arguments: str = "{}"
    """JSON: what else the model's constructor is given, e.g. '{"encoder_output_stride": 8}'."""
    weights: Literal["random", "imagenet", "published"] = "random"
    """What a named model begins with: its library's ImageNet weights for the backbone, or published ones."""
    resize: int | None = None
    """Bring images' shorter side to so many pixels, before they are cut here and before they are labelled. None: as a
    checkpoint that is trained further says; else they keep their size."""
    auxiliary: float = 0.0
    """Weight of the loss of a second head on the backbone's last but one features; 0.4 is usual. 0: none."""

    loss: str = "ce"
    """Weighted sum of ce, focal, dice, lovasz and ohem, e.g. ce+0.5*dice."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: pixels of rare classes weigh more in ce and ohem (median frequency balancing)."""
    label_smoothing: float = 0.0
    """Share of each pixel's target that ce and ohem spread over all classes."""

    num_epochs: int = 30
    """How often each image is shown."""
    batch_size: int = 16
    """Crops in a step, over all workers."""
    patience: int | None = None
    """End after so many epochs without a better mIoU. None: all epochs."""
    save_steps: int = 1000
    """Write what training goes on from after so many steps, besides at each epoch's end."""
    seed: int = 0
    """Of the weights, the crops and the order."""
    dry_run: bool = False
    """Say what would be trained, take a few timed steps, and write nothing."""

    augmentation: Annotated[Augmentation, OmitArgPrefixes] = field(default_factory=Augmentation)
    """How pairs are varied."""
    optimization: Annotated[Optimization, OmitArgPrefixes] = field(default_factory=Optimization)
    """By what, and at which rates."""
    parallel: Annotated[Parallel, OmitArgPrefixes] = field(default_factory=Parallel)
    """Where it computes."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "batch_size", "patience", "save_steps", "resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.seed < 0:
            raise SettingsError(f"--seed {self.seed} must be at least 0")
        if self.auxiliary < 0:
            raise SettingsError(f"--auxiliary {self.auxiliary} must be at least 0")
        try:
            arguments = json.loads(self.arguments)
        except json.JSONDecodeError as error:
            raise SettingsError(f"--arguments {self.arguments!r} is not JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise SettingsError(f"--arguments {self.arguments!r} must be a JSON object")

    def command(self) -> str:
        """The command line that gives these settings."""
        return shlex.join(["python", "jobs/train.py", self.source, self.sink, *_options(self)])


def train(job: Train) -> None:
    """Trains, and keeps the best model as `SINK/checkpoint.safetensors`.

    Goes on where an earlier training of the same settings was broken off.

    Raises:
        SourceError: there are no shards, an image lacks its target or has one that does not fit, or a class is in none.
        SettingsError: the settings do not fit the source or each other, or the sink holds another training.
        ModelError: the model is not known, or its weights cannot be had.
        RunError: training broke off.
        SinkError: the sink cannot be read or written.
        Locked: another training writes to the sink.
    """
    from segray import model
    from segray.loss import Loss, balanced_weights
    from segray.session import session

    shards = feed.find(job.source, job.val)
    classes = Classes.read(job.classes or f"{job.source.rstrip('/')}/classes.json")
    Loss.parse(job.loss, classes, label_smoothing=job.label_smoothing)  # before anything is read
    # The lock is given back once the session has ended, and with it whoever writes.
    with contextlib.ExitStack() as lock, session() as ray:
        placement = _place(job, ray.nodes())
        splits = [
            feed.surveyed(uri, some, classes, is_packed=job.classes is None)
            for uri, some in zip((job.source, job.val or job.source), shards, strict=True)
        ]
        _check(job, classes, *splits)
        to_train, to_validate = splits
        begin, fresh = model.start(
            job.model,
            classes,
            arguments=json.loads(job.arguments),
            weights=job.weights,
            preprocessing=_preprocessing(to_train.census),
            seed=job.seed,
        )
        if begin.preprocessing.bands != to_train.census.bands:
            raise SettingsError(
                f"{job.model} sees {shown(begin.preprocessing.bands)}, and {job.source} holds "
                f"{shown(to_train.census.bands)}; pack the same ones, in this order"
            )
        resized = dataclasses.replace(begin.preprocessing, resize=job.resize or begin.preprocessing.resize)
        begin = dataclasses.replace(begin, preprocessing=resized)
        module = model.build(begin)
        multiple, minimum = model.input_multiple(module), model.input_minimum(module)
        if job.augmentation.crop % multiple or job.augmentation.crop < minimum:
            raise SettingsError(
                f"--crop {job.augmentation.crop} is no multiple of {multiple}, or below {minimum}, for {job.model}"
            )
        _check_part(job, placement, module, len(begin.preprocessing.channels))
        weights = balanced_weights(to_train.census.num_pixels.tolist()) if job.class_weights == "balanced" else None
        order = feed.Order(num_images=to_train.index.num_rows, batch_size=job.batch_size, seed=job.seed)
        plan = Plan(
            command=job.command(),
            seed=job.seed,
            num_epochs=job.num_epochs,
            save_steps=job.save_steps,
            patience=job.patience,
            auxiliary=job.auxiliary,
            is_dry_run=job.dry_run,
            augmentation=job.augmentation,
            optimization=job.optimization,
            parallel=job.parallel,
            classes=classes,
            begin=begin.to_bytes(),
            loss=Loss.parse(job.loss, classes, class_weights=weights, label_smoothing=job.label_smoothing),
            order=order,
            to_train=to_train,
            to_validate=to_validate,
            placement=placement,
            sink=job.sink if "://" in job.sink else os.path.abspath(job.sink),
            data={
                name: _described(split, some)
                for name, split, some in zip(("train", "val"), splits, shards, strict=True)
            },
        )
        _tell(plan, begin, fresh, sum(parameter.numel() for parameter in module.parameters()))
        if job.dry_run:
            _fit(plan, threading.Event())
            return
        _run(job, plan, lock)


def _run(job: Train, plan: Plan, lock: contextlib.ExitStack) -> None:
    """Trains under the sink's lock, and keeps in `training.json` how it stands."""
    from segray.lock import LEASE_SECONDS, hold

    journal, lost = Journal(plan.sink), threading.Event()
    run_id = f"train-{os.urandom(4).hex()}"
    lock.enter_context(
        hold(journal.filesystem, journal.root, run_id, wait_seconds=LEASE_SECONDS + 15, say=note, lost=lost.set)
    )
    decisive = {
        "settings": _deciding(job),
        "classes": plan.classes.to_dict(),
        "data": plan.data,
        "num_steps": plan.num_steps,
        "steps_per_epoch": plan.order.steps_per_epoch,
    }
    decisive = json.loads(json.dumps(decisive))  # as it will be read
    before = journal.training()
    if before is not None and (others := _differences(before, decisive)):
        raise SettingsError(
            f"{job.sink} holds another training ({', '.join(others)}); give the same to go on with it, or another SINK"
        )
    may_go_on = before is not None and before["status"] == "stopped early" and before["patience"] != job.patience
    if before is not None and before["status"] in _ENDS and not may_go_on:
        print(f"{job.sink} holds this training, {before['status']}; {BEST} is its best model", flush=True)
        return
    told: dict[str, Any] = {
        **decisive,
        "command": job.command(),
        "seed": job.seed,
        "versions": versions(),
        "workers": job.parallel.workers,
        "patience": job.patience,
        "started": before["started"] if before else _now(),
    }

    def tell(status: str, **more: Any) -> None:
        journal.write("training.json", json.dumps({**told, "status": status, **more}, indent=1).encode())

    journal.sweep()
    tell("running", finished=None, best_epoch=None)
    status, best = "failed", None
    try:
        status = _fit_on(job, plan, lost, journal)
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        if not lost.is_set():  # or another training's words would be replaced
            epochs = [line for line in journal.metrics() if line["kind"] == "epoch"]
            best = max(epochs, key=lambda line: line["miou"], default=None)
            tell(status, finished=_now(), best_epoch=best["epoch"] if best else None)
    if best is not None:
        ious = ", ".join(f"{name} {'absent' if iou is None else f'{iou:.3f}'}" for name, iou in best["iou"].items())
        print(
            f"mIoU {best['miou']:.3f} ({ious}), epoch {best['epoch']}\nwrote {job.sink.rstrip('/')}/{BEST}", flush=True
        )


def _place(job: Train, nodes: Sequence[Mapping[str, Any]]) -> Placement:
    """Decides how many workers there are, and leaves CPUs to the tasks that feed them.

    Raises:
        SettingsError: the cluster cannot hold them; the message has the numbers.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    num_cpus = sum(r.get("CPU", 0.0) for r in resources)
    num_gpus = int(sum(r.get("GPU", 0.0) for r in resources))
    if not num_cpus:
        raise SettingsError("the cluster has no CPUs; `ray status` shows its nodes")
    asked = job.parallel.device
    device: Literal["cpu", "cuda"] = "cuda" if asked == "cuda" or (asked == "auto" and num_gpus) else "cpu"
    if job.parallel.sync_batch_norm and device == "cpu":
        raise SettingsError("--sync-batch-norm works on GPUs alone, and this trains on CPUs")
    least, most = job.parallel.bounds() or 2 * (max(num_gpus, 1) if device == "cuda" else 1,)
    if device == "cuda" and least > num_gpus and least == most:  # a range says that nodes come and go
        raise SettingsError(
            f"--workers {job.parallel.workers or least} need a GPU each, and the cluster has {num_gpus}; "
            "lower --workers, take --device cpu, or give the least and the most (1:8) where nodes are still to come"
        )
    if device == "cuda":
        with_gpus = [node for node in resources if node.get("GPU")]
        # GPU nodes, those to come too, may have no CPUs to ask for, and those that are left have to feed all.
        has_cpus = least == most and all(node.get("CPU", 0.0) >= node["GPU"] for node in with_gpus)
        worker_cpus = 1.0 if has_cpus and num_cpus - num_gpus >= 1 else 0.0
    else:
        worker_cpus = min(_MAX_WORKER_CPUS, num_cpus / (2 * most))
    if job.batch_size // most < job.optimization.accumulate:
        raise SettingsError(
            f"--batch-size {job.batch_size} is too small to be shared by {most} workers in "
            f"{job.optimization.accumulate} parts each; raise it, or lower --workers or --accumulate"
        )
    return Placement(
        device=device,
        workers=least if least == most else (least, most),
        worker_cpus=worker_cpus,
    )


def _check(job: Train, classes: Classes, to_train: feed.Split, to_validate: feed.Split) -> None:
    num_images = to_train.index.num_rows
    if num_images < job.batch_size:
        raise SettingsError(f"--batch-size {job.batch_size} is more than the {num_images} images to train on")
    absent = [name for name, number in zip(classes.names, to_train.census.num_pixels, strict=True) if not number]
    if absent:
        raise SourceError(
            f"{to_train.uri}: no target to train on has a pixel of {', '.join(absent)}, which could not be learned; "
            "pack again without them, or add images"
        )
    if job.val is not None and job.classes is None:
        try:
            of_val = Classes.read(f"{job.val.rstrip('/')}/classes.json")
        except SettingsError:  # none lies beside them
            of_val = classes
        if of_val.names != classes.names:
            raise SettingsError(
                f"{job.val} has the classes {', '.join(of_val.names)}, and {job.source} has "
                f"{', '.join(classes.names)}; pack both with the same ones"
            )
    if to_train.census.bands != to_validate.census.bands:
        raise SettingsError(
            f"{to_train.uri} holds {shown(to_train.census.bands)} to train on, and {to_validate.uri} "
            f"{shown(to_validate.census.bands)} to validate on; pack both alike"
        )
    if not to_validate.census.num_pixels.any():
        raise SourceError(f"{to_validate.uri}: the targets to validate on are void everywhere")


def _check_part(job: Train, placement: Placement, module: Any, num_channels: int) -> None:
    """Where a part of the batch is one crop: models that normalise an average over all of it cannot learn from that."""
    import torch

    most = placement.workers if isinstance(placement.workers, int) else placement.workers[1]
    if job.batch_size // most // job.optimization.accumulate > 1:
        return
    try:
        with torch.no_grad():
            module.train()(torch.zeros(1, num_channels, job.augmentation.crop, job.augmentation.crop))
    except ValueError as error:
        raise SettingsError(
            f"{job.model} cannot learn from one crop at a time: {error}; raise --batch-size, or lower --workers or "
            "--accumulate"
        ) from error


def _preprocessing(census: Census) -> "Preprocessing":
    """What a model with random weights is fed: the images' own mean and standard deviation."""
    from segray.model import Preprocessing

    mean, std = census.mean_and_std()
    if census.bands is None:
        return Preprocessing(
            mean=tuple(round(value, 4) for value in mean), std=tuple(max(round(value, 4), 1e-3) for value in std)
        )
    # Bands are in any unit: significant digits, and what is the same everywhere is divided by nothing.
    return Preprocessing(
        channels=census.bands,
        mean=tuple(float(f"{value:.6g}") for value in mean),
        std=tuple(float(f"{value:.6g}") or 1.0 for value in std),
    )


def _described(split: feed.Split, shards: Mapping[str, int]) -> dict[str, Any]:
    made_by = {}
    try:
        with fsspec.open(f"{split.uri.rstrip('/')}/classes.json", "rb") as file:
            fields = json.loads(file.read())
        made_by = {"command": fields["command"]} if "command" in fields else {}
    except (OSError, ValueError, TypeError):  # there is none, or it is a plain list of names
        pass
    census = split.census
    return {
        **made_by,
        "uri": split.uri,
        "shards": len(shards),
        "images": census.num_images,
        "pixels": census.num_pixels.tolist(),
        "void": census.num_void,
    }


def _options(settings: Any) -> list[str]:
    """The command line's options that are not at their defaults."""
    options: list[str] = []
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if one.name in ("source", "sink") or value == default:
            continue
        name = f"--{one.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            options += _options(value)
        elif value is True:
            options.append(name)
        else:
            options += [name, *map(str, value if isinstance(value, tuple) else [value])]
    return options


def _deciding(job: Train) -> dict[str, Any]:
    """The settings that decide what is learned, as JSON gives them back."""
    settings = {name: value for name, value in dataclasses.asdict(job).items() if name not in _PORTABLE}
    decided: dict[str, Any] = json.loads(json.dumps(settings))
    return decided


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of now was otherwise before."""
    texts: list[str] = []
    for name in sorted(now):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            texts += _differences(old, new)
        elif old != new:
            texts.append(f"{name.replace('_', '-')} was {old}, is {new}")
    return texts


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _tell(plan: Plan, begin: "Checkpoint", fresh: Sequence[str], num_parameters: int) -> None:
    """Prints what is about to be trained."""
    order = plan.order
    print(f"{order.num_images} images to train on, {plan.to_validate.index.num_rows} to validate on", flush=True)
    kind = f"{plan.placement.device}, {plan.parallel.dtype}"
    print(
        f"{begin.architecture} {dict(begin.arguments)}: {num_parameters:,} parameters; {plan.num_steps} steps of "
        f"{order.batch_size}; workers {plan.parallel.workers or plan.placement.workers} ({kind})",
        flush=True,
    )
    if begin.origin:
        shown = f"{', '.join(fresh[:4])}{', …' if len(fresh) > 4 else ''}" if fresh else "nothing"
        print(f"begins with {begin.origin['weights']} weights; random is {shown}", flush=True)


class _BrokenOff(RunError):
    """Workers were lost, or ended by what was no fault of the data or the settings."""


def _fit_on(job: Train, plan: Plan, lost: threading.Event, journal: Journal) -> str:
    """Has `_fit` go on where workers were lost, as often as that happens while the training moves."""
    import ray

    from segray.session import nodes_with_cpus

    failures = 0
    while True:
        before = journal.newest_state()
        try:
            return _fit(plan, lost)
        except _BrokenOff as error:
            failures = failures + 1 if journal.newest_state() == before else 0
            if failures > _MAX_FAILURES:
                raise RunError(f"{error}; the same command goes on") from error
            note(f"{error}; goes on by itself")
        if plan.placement.device == "cpu":  # workers that need a GPU each wait for it
            on_cpus = dataclasses.replace(job, parallel=dataclasses.replace(job.parallel, device="cpu"))
            plan = dataclasses.replace(plan, placement=_place(on_cpus, nodes_with_cpus(ray, START_SECONDS, note)))


def _fit(plan: Plan, lost: threading.Event) -> str:
    """Runs `train_on_worker` through Ray Train, and prints the lines that it sends, unless the lock is lost.

    Returns:
        How it ended: `finished` or `stopped early`.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from segray.session import root_cause

    placement = plan.placement
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lines = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    outcome: list[dict[str, Any] | BaseException] = []

    def fit(folder: str) -> None:
        trainer = TorchTrainer(
            train_on_worker,  # type: ignore[arg-type]  # Ray's own annotation forgets the value that it returns
            train_loop_config={"plan": ray.put(plan), "lines": lines},
            scaling_config=ScalingConfig(
                num_workers=placement.workers,  # type: ignore[arg-type]  # Ray's annotation forgets the range
                use_gpu=placement.device == "cuda",
                # A worker on CPUs computes on all of its machine's.
                placement_strategy="PACK" if placement.device == "cuda" else "SPREAD",
                resources_per_worker={"CPU": placement.worker_cpus, "GPU": int(placement.device == "cuda")},
                elastic_resize_monitor_interval_s=_RESIZE_SECONDS,  # type: ignore[call-arg]  # of V2, which is what runs
            ),
            run_config=RunConfig(  # a folder for Ray's own notes; ours are in the sink
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0),  # `_fit_on` knows whether the training moves
            ),
        )
        try:
            outcome.append(trainer.fit().return_value)  # type: ignore[attr-defined]  # as above
        except BaseException as error:  # told in the main thread
            outcome.append(error)

    with tempfile.TemporaryDirectory() as folder:
        # In a thread, as Ray would end the process on Ctrl-C with status 0.
        fitting = threading.Thread(target=fit, args=(folder,), daemon=True)
        fitting.start()
        while fitting.is_alive() or not lines.empty():
            if lost.is_set():
                raise RunError("the sink's lock was lost to another run, or could not be renewed")
            with contextlib.suppress(Empty):
                print(lines.get(timeout=0.2), flush=True)
    [ended] = outcome
    if isinstance(ended, BaseException):
        failures: dict[int, BaseException] = getattr(ended, "worker_failures", {})
        for cause in failures.values():
            if isinstance(cause, SegrayError):  # what the others say comes of it
                raise RunError(f"training broke off: {cause}; mended, the same command goes on") from ended
        raise _BrokenOff(f"training broke off: {root_cause(next(iter(failures.values()), ended))}") from ended
    if ended["fault"]:
        raise RunError(ended["fault"])
    status: str = ended["status"]
    return status
