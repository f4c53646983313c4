"""What each worker of Ray Train does: steps, validation after each epoch, and a word of both."""

import dataclasses
import functools
import json
import os
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from segray import feed
from segray.augment import Augmentation
from segray.classes import Classes
from segray.errors import RunError, SegrayError, SettingsError
from segray.journal import BEST, LAST, Journal
from segray.schedule import Optimization
from segray.session import root_cause
from segray.statistics import ConfusionMatrix

if TYPE_CHECKING:  # torch and Ray take seconds to import, and `--help` waits for neither
    import torch

    from segray.loss import Loss
    from segray.model import Checkpoint

__all__ = ["Parallel", "Placement", "Plan", "train_on_worker", "versions"]

_DTYPE = Literal["float32", "bfloat16", "float16"]
_LOGS_PER_EPOCH = 10
_MAX_LOG_STEPS = 50
_NUM_WORST = 16
_DRY_STEPS = 8
_DRY_IMAGES = 8
_VALIDATION_BATCH = 16
_MIN_TASKS = 2
_TASK_CPUS_BESIDE_WORKERS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Where and in what precision it computes.

    Raises:
        SettingsError: a setting is out of its bounds.
    """

    workers: str | None = None
    """How many, each with a GPU where there are any: a number, or the least and the most, e.g. 2:8, which then follow
    what the cluster has. None: one a GPU, or one."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Whether each worker holds the whole model (DDP) or a piece of it (FSDP2), where gradients and the state of the
    optimiser leave a GPU too little room."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where the cluster has any."""
    dtype: _DTYPE = "float32"
    """What forward and backward passes compute in; weights and losses are float32."""
    compile: bool = False
    """Use torch.compile: a minute or two at the start for faster steps."""
    sync_batch_norm: bool = False
    """Batch norms see the whole batch, of all workers; on GPUs."""
    num_threads: int | None = None
    """Threads of a worker's model on CPUs. None: all cores of its machine."""

    def __post_init__(self) -> None:
        self.bounds()
        if self.num_threads is not None and self.num_threads < 1:
            raise SettingsError(f"--num-threads {self.num_threads} must be at least 1")
        if self.dtype == "float16" and self.strategy == "fsdp":
            raise SettingsError("--dtype float16 does not go with --strategy fsdp; bfloat16 does")

    def bounds(self) -> tuple[int, int] | None:
        """The least and the most workers; None where that is left open."""
        if self.workers is None:
            return None
        least, colon, most = self.workers.partition(":")
        most = most if colon else least
        if not least.isdecimal() or not most.isdecimal() or not 1 <= int(least) <= int(most):
            raise SettingsError(
                f"--workers {self.workers}: give a number from 1 on (4), or the least and the most (2:8)"
            )
        return int(least), int(most)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What workers ask for."""

    device: Literal["cpu", "cuda"]
    workers: int | tuple[int, int]
    worker_cpus: float

    def tasks(self, num_workers: int, resources: Mapping[str, float]) -> feed.Tasks:
        """Those that feed one of so many workers, on a cluster that has these resources."""
        share = max(resources.get("CPU", 0.0) / num_workers - self.worker_cpus, 0.0)
        return feed.Tasks(
            # Where a worker on CPUs has taken the last whole one there is room for tasks.
            num_cpus=_TASK_CPUS_BESIDE_WORKERS if self.device == "cpu" else min(1.0, share / _MIN_TASKS),
            concurrency=max(int(share), _MIN_TASKS),
            store_bytes=resources["object_store_memory"] / (2 * num_workers),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What every worker is told."""

    command: str
    """The command line."""
    seed: int
    num_epochs: int
    save_steps: int
    patience: int | None
    auxiliary: float
    is_dry_run: bool
    augmentation: Augmentation
    optimization: Optimization
    parallel: Parallel
    classes: Classes
    begin: bytes
    """The checkpoint that it starts from."""
    loss: "Loss"
    order: feed.Order
    to_train: feed.Split
    to_validate: feed.Split
    placement: "Placement"
    sink: str
    """Absolute, as workers have folders of their own."""
    data: dict[str, Any]
    """What is told of the splits."""

    @property
    def num_steps(self) -> int:
        """Of all epochs."""
        return self.order.steps_per_epoch * self.num_epochs


def versions() -> dict[str, str]:
    """Of the libraries that decide what is learned."""
    return {name: version(name) for name in ("segray", "torch", "torchvision", "segmentation-models-pytorch", "ray")}


def train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker of Ray Train runs.

    Returns:
        `status`, and `fault`: what a person has to mend, of which there is no sense in trying again.
    """
    import ray
    import torch

    plan: Plan = ray.get(config["plan"])
    torch.set_num_threads(plan.parallel.num_threads or os.cpu_count() or 1)
    try:
        worker = _Worker(plan, config["lines"])
        return {"status": worker.dry_run() if plan.is_dry_run else worker.run(), "fault": ""}
    except (RunError, SettingsError) as error:  # which all workers raise alike
        return {"status": "failed", "fault": str(error)}
    except Exception as error:  # of which Ray Train would keep the outermost words alone
        if isinstance(error, SegrayError):
            raise RunError(root_cause(error)) from error
        raise RuntimeError(root_cause(error)) from error


class _Worker:
    """One of those that train together."""

    def __init__(self, plan: Plan, lines: Any) -> None:
        """Builds the model, and takes up where the sink's newest state is."""
        import ray
        import ray.train
        import ray.train.torch

        from segray.learn import Learner
        from segray.model import Checkpoint

        context = ray.train.get_context()
        self._plan = plan
        self._lines = lines
        self._rank: int = context.get_world_rank()
        self._num_workers: int = context.get_world_size()
        self._device = str(ray.train.torch.get_device()) if plan.placement.device == "cuda" else "cpu"
        begin = Checkpoint.from_bytes(plan.begin)
        self._resize = begin.preprocessing.resize
        self._learner = Learner(
            begin,
            plan.optimization,
            plan.loss,
            plan.num_steps,
            device=self._device,
            dtype=plan.parallel.dtype,
            strategy=plan.parallel.strategy,
            auxiliary=plan.auxiliary,
            compiled=plan.parallel.compile,
            sync_batch_norm=plan.parallel.sync_batch_norm,
            seed=plan.seed,
        )
        self._tasks = plan.placement.tasks(self._num_workers, ray.cluster_resources())  # type: ignore[no-untyped-call]
        self._journal = Journal(plan.sink)
        self._metrics: list[dict[str, Any]] = []
        self._losses: list[torch.Tensor] = []
        """Of the steps since the last line, this worker's part."""
        self._watch = time.monotonic()

    def run(self) -> str:
        """All that is left of the training; how it ended."""
        plan, learner = self._plan, self._learner
        self._agree(
            "" if self._journal.training() else f"{plan.sink} cannot be seen from all nodes; share it, or give a URI"
        )
        # One decides, as what is newest may change while they look.
        [name] = self._gathered(self._journal.newest_state() if self._rank == 0 else None)[:1]
        if name is not None:
            learner.load(*self._journal.read_state(name))
            self._metrics = [line for line in self._journal.metrics() if line["step"] <= learner.num_steps_done]
            self._say(f"goes on from step {learner.num_steps_done} of {plan.num_steps}")
        try:
            return self._learn()
        finally:
            self._journal.finish()

    def _learn(self) -> str:
        plan, learner = self._plan, self._learner
        steps_per_epoch = plan.order.steps_per_epoch
        log_steps = min(max(steps_per_epoch // _LOGS_PER_EPOCH, 1), _MAX_LOG_STEPS)
        status = "stopped early" if self._is_stuck() else "finished"
        steps = range(learner.num_steps_done, plan.num_steps if status == "finished" else 0)
        self._watch = time.monotonic()
        for batch in self._batches(steps):
            share = plan.order.share(learner.num_steps_done, self._rank, self._num_workers)
            assert batch["row"].tolist() == share.tolist(), "a batch is a step, or workers would part"
            self._losses.append(learner.step(batch["image"], batch["target"].long()))
            is_end = learner.num_steps_done % steps_per_epoch == 0
            is_saved = is_end or learner.num_steps_done % plan.save_steps == 0
            if is_saved or learner.num_steps_done % steps_per_epoch % log_steps == 0:
                self._log()
            if is_end:
                self._end_epoch()
            if is_saved:
                self._save()
            if is_end and self._is_stuck():
                status = "stopped early"
                break
        return status

    def _gathered(self, value: Any) -> list[Any]:
        """That of each worker, by rank."""
        import torch

        of_all: list[Any] = [value] * self._num_workers
        if self._num_workers > 1:
            torch.distributed.all_gather_object(of_all, value)
        return of_all

    def _agree(self, fault: str) -> None:
        """Ends all workers where one has a fault: on its own it would leave the others waiting."""
        if faults := [text for text in self._gathered(fault) if text]:
            raise RunError(faults[0])

    def dry_run(self) -> str:
        """A few steps, and what they tell of all."""
        import torch

        plan, learner = self._plan, self._learner
        ends = [time.monotonic()]
        for batch in self._batches(range(min(_DRY_STEPS, plan.num_steps))):
            float(learner.step(batch["image"], batch["target"].long()))
            ends.append(time.monotonic())
        seconds = np.diff(ends)
        step_seconds = float(
            np.median(seconds[1:] if len(seconds) > 1 else seconds)
        )  # with what it waits for its batch
        num_to_validate = plan.to_validate.index.num_rows
        some = range(min(_DRY_IMAGES * self._num_workers, num_to_validate))
        begin = time.monotonic()
        self._confusion(some)
        validation_seconds = (time.monotonic() - begin) * num_to_validate / len(some)
        if self._device == "cpu":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10  # which Linux gives in KiB
            memory = f"{peak / 2**30:.1f} GiB of memory at most"
        else:
            memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory at most"
        order = plan.order
        self._say(
            f"{len(seconds)} steps taken: {step_seconds:.3f} s each, {order.batch_size / step_seconds:.1f} images/s; "
            f"a worker uses {memory}"
        )
        self._say(
            f"{plan.num_epochs} epochs of {order.steps_per_epoch} steps: {plan.num_steps * step_seconds / 60:.1f} min; "
            f"validation on {num_to_validate} images after each: {plan.num_epochs * validation_seconds / 60:.1f} min "
            "at most; nothing was written"
        )
        return "finished"

    def _batches(self, steps: range) -> "Iterator[dict[str, torch.Tensor]]":
        plan = self._plan
        return feed.batches(
            plan.to_train,
            plan.classes,
            plan.order,
            plan.augmentation,
            resize=self._resize,
            steps=steps,
            rank=self._rank,
            num_workers=self._num_workers,
            tasks=self._tasks,
        )

    def _log(self) -> None:
        """A line of what the steps since the last one did, and the end of it all where a loss is no number."""
        import torch

        learner, order = self._learner, self._plan.order
        losses = torch.stack(self._losses).double()
        if self._num_workers > 1:
            torch.distributed.all_reduce(losses)
        seconds = time.monotonic() - self._watch
        if not bool(torch.isfinite(losses).all()):
            first = int((~torch.isfinite(losses)).nonzero()[0])
            step = learner.num_steps_done - len(losses) + first + 1
            batch = order.batch(step - 1)
            index = self._plan.to_train.index.take(batch)
            uris = [f"{row['shard']}#{row['name']}" for row in index.to_pylist()]
            raise RunError(
                f"the loss is {float(losses[first])} in step {step}; a lower --learning-rate, or --clip 1, and "
                "another SINK may help. "
                f"Its images: {', '.join(uris)}"
            )
        self._metrics.append(
            {
                "kind": "steps",
                "epoch": self._epoch,
                "step": learner.num_steps_done,
                "num_steps": len(losses),
                "loss": float(losses.mean()),
                "learning_rate": learner.learning_rate,
                "images_per_second": len(losses) * order.batch_size / seconds,
                "seconds": seconds,
                "num_workers": self._num_workers,
            }
        )
        self._losses = []
        if self._rank == 0:
            self._journal.later(functools.partial(self._journal.write_metrics, list(self._metrics)))
        self._watch = time.monotonic()

    @property
    def _epoch(self) -> int:
        return -(-self._learner.num_steps_done // self._plan.order.steps_per_epoch)

    def _end_epoch(self) -> None:
        """Validates, and writes what came of it."""
        plan, epoch, journal = self._plan, self._epoch, self._journal
        begin = time.monotonic()
        confusion, worst, trained = self._confusion(range(plan.to_validate.index.num_rows))
        lines = [line for line in self._metrics if line["kind"] == "steps" and line["epoch"] == epoch]
        best = max((line["miou"] for line in self._epochs()), default=-1.0)
        iou = [None if np.isnan(value) else round(float(value), 4) for value in confusion.iou()]
        line = {
            "kind": "epoch",
            "epoch": epoch,
            "step": self._learner.num_steps_done,
            "loss": sum(line["loss"] * line["num_steps"] for line in lines) / sum(line["num_steps"] for line in lines),
            "learning_rate": self._learner.learning_rate,
            "miou": round(confusion.miou(), 4),
            "pixel_accuracy": round(confusion.pixel_accuracy(), 4),
            "iou": dict(zip(plan.classes.names, iou, strict=True)),
            "seconds": sum(line["seconds"] for line in lines),
            "validation_seconds": time.monotonic() - begin,
        }
        self._metrics.append(line)
        if self._rank == 0:
            origin = {
                **trained.origin,
                "command": plan.command,
                "data": plan.data,
                "seed": plan.seed,
                "metrics": {name: line[name] for name in ("epoch", "loss", "miou", "iou", "pixel_accuracy")},
                "versions": versions(),
            }
            data = dataclasses.replace(trained, origin=origin).to_bytes()
            seen = {"epoch": epoch, "confusion": confusion.counts.tolist(), "worst": worst}
            files = {LAST: data, f"validation/epoch-{epoch:04d}.json": json.dumps(seen).encode()}
            files |= {BEST: data} if line["miou"] > best else {}
            for name, content in files.items():
                journal.later(functools.partial(journal.write, name, content))
            journal.later(functools.partial(journal.write_metrics, list(self._metrics)))
            journal.later(functools.partial(journal.write_tensorboard, list(self._metrics)))
            self._say(
                f"epoch {epoch}/{plan.num_epochs}: loss {line['loss']:.4f}, mIoU {line['miou']:.3f}, "
                f"{line['seconds']:.1f} s and {line['validation_seconds']:.1f} s of validation"
            )
        self._watch = time.monotonic()

    def _confusion(self, rows: range) -> "tuple[ConfusionMatrix, list[dict[str, Any]], Checkpoint]":
        """Labels whole images as the label job does, each worker its share.

        Returns:
            The confusion matrix of all, the images whose own mIoU is lowest, and the model.
        """
        import torch

        from segray.predict import Prediction, Predictor

        plan, classes = self._plan, self._plan.classes
        trained = self._learner.checkpoint()
        before = torch.backends.cudnn.allow_tf32
        predictor = Predictor(trained.to_bytes, device=self._device, dtype=plan.parallel.dtype)
        torch.backends.cudnn.allow_tf32 = before  # a label's float32 is exact; the steps' is what they began with
        confusion, seen, fault = ConfusionMatrix.zeros(len(classes)), [], ""
        mine = rows[self._rank :: self._num_workers]
        found = feed.pairs(plan.to_validate, classes, mine, self._tasks)
        while some := list(islice(found, _VALIDATION_BATCH)):
            for pair, prediction in zip(some, predictor.predict([one["image"] for one in some]), strict=True):
                if not isinstance(prediction, Prediction):
                    fault = f"{pair['uri']}: {prediction}"
                    continue
                of_image = ConfusionMatrix.of(pair["target"], prediction.label_map, len(classes), classes.ignore_index)
                confusion += of_image
                miou, accuracy = of_image.miou(), of_image.pixel_accuracy()
                if not np.isnan(miou):
                    seen.append({"uri": pair["uri"], "miou": round(miou, 4), "pixel_accuracy": round(accuracy, 4)})
        self._agree(fault)
        if self._num_workers > 1:
            counts = torch.from_numpy(confusion.counts).to(self._device)
            torch.distributed.all_reduce(counts)
            confusion = ConfusionMatrix(counts.cpu().numpy())
        seen = [image for of_worker in self._gathered(seen) for image in of_worker]
        worst = sorted(seen, key=lambda image: (image["miou"], image["uri"]))[:_NUM_WORST]
        return confusion, worst, trained

    def _save(self) -> None:
        """Has all that training goes on from written behind what was known before."""
        import torch

        tensors, scalars = self._learner.state()
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise RunError(
                f"after step {scalars['step']} the weights are no numbers any more, though its loss was; "
                "give a lower --learning-rate, or --clip 1, and another SINK"
            )
        if self._rank == 0:
            self._journal.later(functools.partial(self._journal.write_state, tensors, scalars))
        self._watch = time.monotonic()

    def _epochs(self) -> list[dict[str, Any]]:
        return [line for line in self._metrics if line["kind"] == "epoch"]

    def _is_stuck(self) -> bool:
        """Whether so many epochs as the patience has were none better."""
        mious = [line["miou"] for line in self._epochs()]
        patience = self._plan.patience
        return patience is not None and len(mious) > patience and int(np.argmax(mious)) < len(mious) - patience

    def _say(self, text: str) -> None:
        if self._rank == 0:
            self._lines.put(text)
