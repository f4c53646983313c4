"""Labels images: source → fetch → decode → predict → encode → sink, as one Ray Data pipeline."""

import _thread
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from datetime import time as clock
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tyro.conf import Positional

import segray
from segray import architecture, metrics, progress
from segray.classes import Classes
from segray.columns import binary
from segray.decode import MAX_PIXELS, Decoded, decode_for
from segray.errors import Reject, RunError, SettingsError, SinkError, SourceError, extra
from segray.labelmap import dtype_for, encode_png
from segray.progress import Fetched, Ledger, Snapshot, Totals, is_json, note, print_table, say, say_as, watch
from segray.tile import Scenes, Tiling

__all__ = ["Label", "Placement", "label", "place"]

# Ray and torch are imported when the job starts, so that `--help` answers at once.

_LABELLING = 4  # to be raised with any change of code that changes label maps: it begins new recipes
_IMAGES_PER_BLOCK = 16, 64, 512  # in a short run, in others at first, and at most
_WINDOWS_PER_BLOCK = 16, 16, 64  # likewise; neighbours, which one task reads, decode what they share once
_NUM_SMALL_BLOCKS = 1000
_BLOCKS_PER_MODEL = 4  # a run is short that has fewer: all models are to begin, and to end at about the same time
_NUM_SAMPLE_BLOCKS = 4  # at least, that time passes between images
_PIXEL_BYTES = 64 * 2**20
_BLOCK_BYTES = 64 * 2**20  # at most; Ray's own, twice as many, would fill a small object store before it can tell
_TASK_CPUS = 0.25  # beside a model that computes on all cores, the other stages mostly wait
_THREADS = 4
_LEDGER_SECONDS = 30
_LOADING_PRIORITY = 5  # about a third of the time of others that want the same core
_MAX_NAMED = 20
_REQUESTS_IN_FLIGHT = 32
_TRANSFORM = tuple(f"transform_{letter}" for letter in "abcdef")
_ACCELERATOR, _HEAD = "ray.io/accelerator-type", "node:__internal_head__"  # Ray's own names of a label, a resource
_IMAGES_PER_SHARD = 1000  # as good a guess as any of what is in one that nobody has read


@dataclass(frozen=True, kw_only=True)
class Label:
    """Labels the images of SOURCE with MODEL, into the label store SINK.

    Raises:
        SettingsError: a setting is out of its bounds.
    """

    source: Positional[str]
    """Images: a folder, prefix or glob, a file, tar or Parquet shards, or a manifest (Parquet, CSV, text) of URIs.
    With --scenes.size scenes: likewise rasters, {band} for a file a band, and STAC items, catalogs and searches."""

    sink: Positional[str]
    """Folder or prefix of the label store; images that it already holds are skipped."""

    retry_rejects: bool = False
    """Take up again what was rejected; the new rows replace the old."""

    max_images: int | None = None
    """End after so many images, to go on another time."""

    deadline: str | None = None
    """End at this time, to go on another time: 06:00 (the next one, local), or ISO 8601."""

    wait: float = 0.0
    """Seconds to wait for another run that holds the sink's lock."""

    dry_run: bool = False
    """Say what would be labelled, what has changed, and how long it may take; write nothing."""

    sample: int | None = None
    """With --dry-run: label so many images, without writing them, to tell the time by."""

    hourly_cost: float | None = None
    """With --dry-run: what an hour of the cluster costs, to tell the cost."""

    model: str
    """A model's name (deeplabv3_resnet50, unet_resnet34, …), a segray checkpoint (.safetensors), or an ONNX model."""

    weights: str | None = None
    """With a model's name: a state dict (.safetensors or .pth) in place of the published weights."""

    classes: str | None = None
    """With --weights: the names of the classes, as JSON or one a line. An ONNX model's own, unless given."""

    column: str | None = None
    """Column of URIs in a manifest, or of image bytes in Parquet shards; None: it is found."""

    max_pixels: int = MAX_PIXELS
    """Images with more pixels are rejected before they are decoded."""

    max_rejects: float = 0.1
    """Share of rejects among the run's images beyond which it ends with exit status 1."""

    tiling: Tiling = field(default_factory=Tiling)
    """How large images are cut."""

    scenes: Scenes = field(default_factory=Scenes)
    """Scenes in place of images."""

    crf: bool = False
    """Refine what the model says with DeepLab's CRF; a tiled image is refined whole, in 4 times its logits' memory."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: on GPUs where the cluster has any."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the forward pass computes in; auto: bfloat16 where the device is fast in it and it gives 99 % of the first
    batch's pixels the class of float32, else float32; float16 on GPUs alone."""

    batch_size: int = 16
    """Images, or tiles, that share a forward pass; beyond 640×640 pixels (on a CPU 360×360) in proportion fewer."""

    actors: str | None = None
    """Copies of the model: 4, or from 2:8 as the load asks; None: one a GPU, or one for each --threads CPUs."""

    threads: int | None = None
    """CPU threads of each copy, which share large images only; None: 4, or what the smallest node has; with GPUs 1."""

    def __post_init__(self) -> None:
        _bounds(self.actors)
        for name in ("batch_size", "threads", "max_pixels", "max_images", "sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.wait < 0:
            raise SettingsError(f"--wait {self.wait}: must be at least 0 seconds")
        if not self.dry_run and (self.sample, self.hourly_cost) != (None, None):
            raise SettingsError("--sample and --hourly-cost are of a dry run; give --dry-run")
        if self.hourly_cost is not None and self.hourly_cost < 0:
            raise SettingsError(f"--hourly-cost {self.hourly_cost}: must be at least 0")
        if self.deadline is not None:
            _deadline(self.deadline, datetime.now())
        if not 0 <= self.max_rejects <= 1:
            raise SettingsError(f"--max-rejects {self.max_rejects}: is a share, from 0 to 1")
        if self.dtype == "float16" and self.device == "cpu":
            raise SettingsError("--dtype float16 runs on GPUs alone; on a CPU take bfloat16 or float32")
        if self.scenes.size is not None:
            if self.crf:
                raise SettingsError("--crf is of images, which it sees whole; leave it out beside --scenes.size")
            if self.max_pixels != MAX_PIXELS:
                raise SettingsError("--max-pixels is of images; leave it out beside --scenes.size, which has no bound")
        within, _, is_deep = self.source.partition("**")
        if not is_deep and set("*?") & set(self.source):
            return  # a pattern of one level does not reach into a sink beside its files
        source, sink = (
            uri if "://" in uri else os.path.abspath(uri) for uri in (within, self.sink.removeprefix("file://"))
        )
        source = source.removeprefix("file://")
        if f"{sink.rstrip('/')}/".startswith(f"{source.rstrip('/')}/"):
            raise SettingsError(f"SINK {self.sink} lies in SOURCE {self.source}: its parts would be read as shards")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What the pipeline asks of the cluster."""

    device: Literal["cpu", "cuda"]
    """Where the model runs."""
    min_actors: int
    """Copies of the model, at least."""
    max_actors: int
    """And at most."""
    threads: int
    """CPU threads of each."""
    actor_cpus: float
    """CPUs that each reserves."""
    actor_gpus: int
    """GPUs that each reserves."""
    task_cpus: float
    """CPUs that a task of the other stages reserves."""
    task_labels: dict[str, str]
    """What the labels of a node must be that runs such a task, in Ray's syntax."""
    max_cpus: float | None
    """CPUs that all tasks together may reserve; None: those of the cluster, as it grows."""
    block_bytes: int
    """What a task hands on together, so that what tasks hold out, unasked, fits a quarter of the object stores."""


def label(job: Label) -> None:
    """Runs the job and prints what it did.

    Raises:
        Refused: nothing was started.
        RunError: the run ended badly, or its rejects pass `max_rejects`.
        KeyboardInterrupt: it was stopped; what it had committed is kept.
    """
    run = _Run(job)
    say_as(run.run_id)

    from segray.lock import hold
    from segray.session import root_cause, session

    area = _area(job)
    source, entries = _source(job, area)
    architecture.check(job.model, job.weights, job.classes)
    if job.dry_run:
        _print_prospect(entries, area, *_load(job, area))
        return

    import ray  # first, as each import waits for the other

    # Ray takes longer to start than torch to import, and the processes that it starts have precedence.
    loading = ThreadPoolExecutor(1, initializer=_step_back).submit(_load, job, area)
    if os.environ.get("RAY_ADDRESS"):
        loading.result()  # the folder that a job was submitted with is gone for it once it is connected
    with contextlib.ExitStack() as lock, session():
        placement = _placed(job, ray)
        job, checkpoint, recipe, sink = loading.result()
        lost = functools.partial(run.end, "the sink's lock was lost to another run, or could not be renewed")
        lock.enter_context(hold(sink.filesystem, sink.root, run.run_id, wait_seconds=job.wait, say=note, lost=lost))
        parts = sink.parts()  # before what is done: what a dying run commits in between is then seen at the end
        done = sink.done(with_rejects=not job.retry_rejects)
        pages = _pages(job, entries, area, sink, done, checkpoint, recipe["recipe"])
        index = _index(pages, source, _per_block(job), job.batch_size, placement.max_actors)
        sink.start(recipe)
        ledger = _start_ledger(ray, run.run_id, job.max_images, run.deadline)
        metrics.add_images("present", run.run_id, index.num_present)
        failure: str | None = None
        try:
            if index.blocks and not run.ended:
                from segray.sink import PartSink

                labelled = _chain(job, area, checkpoint, placement, index.blocks, done, ledger, sink.write_shard)
                with run.in_pipeline(), _watched(run, index, placement, ledger):
                    labelled.write_datasink(
                        PartSink(sink, checkpoint.classes, run.run_id, ledger, index.num_images),
                        # Less than the task before it, or Ray would fuse the two and keep a
                        # whole part's label maps in memory until they are encoded.
                        ray_remote_args={
                            "num_cpus": placement.task_cpus / 2,
                            "label_selector": placement.task_labels,
                        },
                    )
            run.status, failure = ("failed", run.ended) if run.ended else ("finished", None)
        except KeyboardInterrupt:
            run.status, failure = ("failed", run.ended) if run.ended else ("interrupted", None)
        except Exception as error:  # Ray's wrapping of whatever happened in a worker
            run.status, failure = "failed", root_cause(error)
        try:
            receipts = ray.get(ledger.receipts.remote(), timeout=_LEDGER_SECONDS)
            state = ray.get(ledger.snapshot.remote(), timeout=_LEDGER_SECONDS)
            if run.status == "finished":
                written = {part for receipt in receipts for part in receipt.parts}
                if job.retry_rejects or sink.parts() - parts - written:
                    sink.done()  # a worker that died, or outlived an earlier driver, wrote rows that came twice
                if job.retry_rejects or index.is_unversioned:
                    sink.drop_superseded()
            choices = ray.get(ledger.choices.remote(), timeout=_LEDGER_SECONDS)
            totals = Totals.of(receipts, checkpoint.classes)
            record = run.record(recipe["recipe"], index, state, choices, totals, placement)
            sink.write_json(f"runs/{run.run_id}.json", record)
            _print_summary(job, record)
        except Exception as error:  # the store or the cluster is gone; what matters is why the run ended
            failure = failure or f"its record could not be written: {root_cause(error)}"
    if failure:
        raise RunError(
            f"the run broke off: {failure}; what is committed stays, and the same command goes on from there"
        )
    if run.status == "interrupted":
        raise KeyboardInterrupt
    counts = record["counts"]
    if counts["seen"] != counts["labelled"] + counts["rejected"] + counts["present"]:
        raise RunError(f"the counts do not add up: {counts}; the same command labels what is missing")
    attempted = counts["labelled"] + counts["rejected"]
    if attempted and counts["rejected"] > job.max_rejects * attempted:
        raise RunError(
            f"{counts['rejected']} of {attempted} {_noun(job)} were rejected, more than --max-rejects "
            f"{job.max_rejects}; all else is committed, and {job.sink}/rejects says why"
        )


def _area(job: Label) -> Any:
    if job.scenes.area is None:
        return None
    with extra("geo", "--scenes.area"):
        from segray.cut import Area

    return Area.load(job.scenes.area)


def _source(job: Label, area: Any) -> tuple[Any, Iterator[pa.Table]]:
    """What SOURCE names, and its entries, which are asked for once.

    Raises:
        SourceError: there is nothing, unless it is a search: that may find nothing new.
    """
    from segray.source import Source

    if job.scenes.size is None:
        source: Any = Source(job.source, job.column)
        wanted = "images and no shards"
    else:
        with extra("geo", "--scenes.size"):
            from segray.catalog import SceneSource

        of_area = None if area is None else area.to_dict()
        source = SceneSource(job.source, job.column, bands=job.scenes.calls, area=of_area)
        wanted = "scenes"
    entries = source.entries()
    if job.scenes.size is not None and source.is_search:
        return source, entries
    first = next(entries, None)
    if first is None:
        raise SourceError(
            f"{source.uri} holds no {wanted}"
            + (f", only {source.num_other} files of other kinds" if source.num_other else "")
        )
    return source, itertools.chain([first], entries)


def _step_back() -> None:
    """Lowers the priority of this thread, where a thread has one of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOADING_PRIORITY)


def _load(job: Label, area: Any) -> tuple[Label, Any, dict[str, Any], Any]:
    """The job as the model needs it, the model, the recipe, and its sink.

    Raises:
        ModelError: the model cannot be had.
        SettingsError: it does not go with what the settings say.
        SinkError: there is no such kind of store.
    """
    from segray import model
    from segray.sink import Sink

    checkpoint = model.load(job.model, job.weights, job.classes)
    for notice in model.notices(checkpoint):
        note(notice)
    job = _fitted(job, checkpoint)
    recipe = _recipe(job, checkpoint, area)
    return job, checkpoint, recipe, Sink(job.sink, recipe["recipe"])


def _fitted(job: Label, checkpoint: Any) -> Label:
    """The job with its tiles and windows as the model needs them.

    Raises:
        SettingsError: the model does not go with what the settings say.
    """
    from segray.model import fitted_tiling, tile_size, window_multiple
    from segray.preprocessing import match_bands

    if checkpoint.architecture == "onnx":
        if job.dtype not in ("auto", "float32"):
            raise SettingsError(f"--dtype {job.dtype}: what {job.model} computes in stands in its graph; leave it out")
        job = dataclasses.replace(job, dtype="float32")
    if job.scenes.size is None:
        if checkpoint.preprocessing.bands is not None:
            bands = ", ".join(checkpoint.preprocessing.bands)
            raise SettingsError(f"{job.model} sees the bands {bands} of scenes; give --scenes.size, such as 1024")
        return dataclasses.replace(job, tiling=fitted_tiling(checkpoint, job.tiling))
    if job.scenes.bands:
        match_bands(checkpoint.preprocessing, list(job.scenes.calls))  # it raises where some are missing
    if checkpoint.preprocessing.resize is not None:
        raise SettingsError(
            f"{job.model} resizes images to {checkpoint.preprocessing.resize} pixels, and a window of a scene has no "
            "size of its own; take a model that does not (trained without --resize)"
        )
    void, most = checkpoint.classes.ignore_index, np.iinfo(dtype_for(len(checkpoint.classes))).max
    if not 0 <= void <= most:
        raise SettingsError(
            f"classes: ignore_index {void}, which pixels of scenes without data get, must lie in [0, {most}]"
        )
    has_own_size = tile_size(checkpoint) is not None
    if not has_own_size and job.tiling != Tiling():
        raise SettingsError(f"--tiling is of images; {job.model} sees a window whole, so give --scenes.size alone")
    multiple, tiling = window_multiple(checkpoint, job.tiling), fitted_tiling(checkpoint, job.tiling)
    # Windows and halos on the grid of the model's stride, or of its tiles, see what the whole scene would.
    size = job.scenes.size + -job.scenes.size % multiple
    halo = max(job.scenes.halo, tiling.overlap) if has_own_size else job.scenes.halo
    halo += -halo % multiple
    if not has_own_size:  # a window is a tile
        tiling = dataclasses.replace(tiling, size=size + 2 * halo, overlap=0)
    return dataclasses.replace(job, tiling=tiling, scenes=dataclasses.replace(job.scenes, size=size, halo=halo))


def _start_ledger(ray: Any, run_id: str, max_images: int | None, deadline: float | None) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Ledger).remote(run_id, max_images, deadline)


def _chain(
    job: Label,
    area: Any,
    checkpoint: Any,
    placement: Placement,
    blocks: list[pa.Table],
    done: np.ndarray,
    ledger: Any,
    whole: Callable[[str, list[str]], object],
) -> Any:
    """From the index to rows with the schema `sink.LABELLED`, as a dataset of Ray that nobody has asked for yet."""
    import ray
    from ray.data import ExecutionResources

    from segray.crf import Crf
    from segray.predict import CPU_ENVIRONMENT

    context = ray.data.DataContext.get_current()
    context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=placement.max_cpus)
    context.target_max_block_size = placement.block_bytes
    done_ref, checkpoint_ref = ray.put(done), ray.put(checkpoint.to_bytes())
    where = {"num_cpus": placement.task_cpus, "label_selector": placement.task_labels}
    task: dict[str, Any] = {"batch_format": "pyarrow", **where}
    fetch_arguments = {"done": done_ref, "column": job.column, "ledger": ledger, "whole": whole}
    entries: Any = ray.data.from_blocks(blocks)
    if job.scenes.size is None:
        side = None if job.crf else checkpoint.preprocessing.resize  # a CRF sees every pixel
        decoded = entries.map_batches(_fetch, **task, fn_kwargs=fetch_arguments).map_batches(
            _decode, **task, fn_kwargs={"max_pixels": job.max_pixels, "side": side}
        )
    else:
        read_arguments = {"scenes": job.scenes, "area": area, "ledger": ledger}
        decoded = entries.map_batches(_read, **task, fn_kwargs=read_arguments)
    return (
        # map_batches would insist on a number of rows with a GPU. Ours are whole blocks,
        # which Ray bounds in bytes, however large the images are.
        decoded.map_batches_internal(
            _Predictor,
            batch_format="pyarrow",
            fn_constructor_kwargs={
                # The driver keeps the reference, so that an actor may start again.
                "read_checkpoint": functools.partial(ray.get, checkpoint_ref),
                "ledger": ledger,
                "tiling": job.tiling,
                "crf": Crf() if job.crf else None,
                "batch_size": job.batch_size,
                "device": placement.device,
                "dtype": job.dtype,
                "num_threads": placement.threads,
                "keeps_confidence": job.scenes.confidence,
            },
            compute=ray.data.ActorPoolStrategy(
                min_size=placement.min_actors, max_size=placement.max_actors, max_tasks_in_flight_per_actor=2
            ),
            num_cpus=placement.actor_cpus,
            num_gpus=placement.actor_gpus,
            runtime_env={"env_vars": CPU_ENVIRONMENT} if placement.device == "cpu" else None,
        ).map_batches(_encode, **task, fn_kwargs={"classes": checkpoint.classes, "ledger": ledger})
    )


@contextlib.contextmanager
def _watched(run: "_Run", index: "_Index", placement: Placement, ledger: Any) -> Iterator[None]:
    """Shows how the pipeline goes, and ends the run when it stalls."""
    import ray

    def snapshot() -> Snapshot:
        state: Snapshot = ray.get(ledger.snapshot.remote(), timeout=_LEDGER_SECONDS)
        return state

    def lacks_nodes() -> bool:
        alive = []
        with contextlib.suppress(Exception):  # the cluster is part of what hangs
            alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        wanted = [("CPU", placement.task_cpus), ("GPU", placement.actor_gpus)]
        return bool(alive) and not all(any(r.get(name, 0) >= least for r in alive) for name, least in wanted)

    def stalled(had_begun: bool, seconds: float) -> None:
        if not had_begun:
            run.end(f"no model was built for {seconds:.0f} s; `ray status` shows what the cluster lacks")
            return
        unread: list[str] = []
        with contextlib.suppress(Exception):  # the ledger is part of what hangs
            unread = ray.get(ledger.unread.remote(), timeout=_LEDGER_SECONDS)
        some = f"; begun and not read to the end: {', '.join(unread[:_MAX_NAMED])}" if unread else ""
        more = f" and {len(unread) - _MAX_NAMED} more" if len(unread) > _MAX_NAMED else ""
        run.end(f"nothing went on for {seconds:.0f} s{some}{more}")

    started, noun = run.started.timestamp(), _noun(run.job)
    with watch(snapshot, index.num_loose, index.num_shards, started, run.samples, lacks_nodes, stalled, noun):
        yield


def _deadline(text: str, now: datetime) -> datetime:
    """The moment that is meant: the next time of day, or a date and time; local unless it says otherwise.

    Raises:
        SettingsError: it is neither, or has passed.
    """
    with contextlib.suppress(ValueError):
        moment = datetime.combine(now, clock.fromisoformat(text))
        return moment if moment > now else moment + timedelta(days=1)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise SettingsError(f"--deadline {text}: give a time (06:00) or date and time (2030-01-31T06:00)") from error
    if moment.timestamp() <= now.timestamp():
        raise SettingsError(f"--deadline {text}: has passed; it is {now.isoformat(timespec='minutes')}")
    return moment


def _bounds(actors: str | None) -> tuple[int, int] | None:
    """The least and the most.

    Raises:
        SettingsError: it is no number and no range.
    """
    if actors is None:
        return None
    least, colon, most = actors.partition(":")
    most = most if colon else least
    if not least.isdecimal() or not most.isdecimal() or not 1 <= int(least) <= int(most):
        raise SettingsError(f"--actors {actors}: give a number from 1 on (4), or the least and the most (2:8)")
    return int(least), int(most)


def _may_grow(actors: str | None) -> bool:
    """Whether it says that nodes come and go."""
    bounds = _bounds(actors)
    return bounds is not None and bounds[0] < bounds[1]


def place(job: Label, nodes: Sequence[Mapping[str, Any]]) -> Placement:
    """Decides how many models run, and what they and the other stages ask for, so that every stage finds a CPU.

    Models with GPUs go where GPUs are. If there are workers without, the other stages keep to
    nodes without, by the label `ray.io/accelerator-type` that Ray gives to nodes with GPUs; so
    they never hold up a GPU, and nodes that come later are sorted likewise. Of the CPUs beside
    GPUs nothing is asked then, and Ray Data, which knows no labels, is not to count on them.

    Args:
        job: the settings.
        nodes: as `ray.nodes()` gives them.

    Raises:
        SettingsError: the cluster cannot hold it; the message has the numbers.
    """
    alive = [node for node in nodes if node["Alive"]]
    resources = [node["Resources"] for node in alive]
    cpus = [r["CPU"] for r in resources if r.get("CPU")]
    num_gpus = int(sum(r.get("GPU", 0) for r in resources))
    bounds, may_grow = _bounds(job.actors), _may_grow(job.actors)
    if not cpus:
        raise SettingsError("the cluster has no CPUs; `ray status` shows its nodes")
    task_labels: dict[str, str] = {}
    max_cpus: float | None = None
    device: Literal["cpu", "cuda"] = "cuda" if job.device == "cuda" or (job.device == "auto" and num_gpus) else "cpu"
    if device == "cuda":
        threads = job.threads or 1
        least, most = bounds or (num_gpus, num_gpus)
        # The head alone would be too little to feed everyone else.
        if any(r.get("CPU") and not r.get("GPU") and _HEAD not in r for r in resources):
            actor_cpus: float = 0
            fitting = num_gpus
            left = sum(r.get("CPU", 0) for r in resources if not r.get("GPU"))
            task_labels = _without_gpu(alive)
            max_cpus = None if may_grow else left
        else:
            actor_cpus = threads
            fitting = sum(int(min(r.get("GPU", 0), r.get("CPU", 0) // actor_cpus)) for r in resources)
            left = sum(cpus) - min(least, fitting) * actor_cpus
    else:
        if job.dtype == "float16":
            raise SettingsError(
                "--dtype float16 runs on GPUs alone, and the cluster has none; take bfloat16 or float32"
            )
        threads = job.threads or int(min(_THREADS, *cpus))
        # One of its threads' CPUs is lent to the tasks that feed it and write what it gives.
        actor_cpus = threads - 1 if threads > 1 else 0.5
        fitting = int(sum(n // actor_cpus for n in cpus))
        least, most = bounds or 2 * (int(sum(max(1, n // threads) for n in cpus)),)
        left = sum(cpus) - min(least, fitting) * actor_cpus
    task_cpus = min(_TASK_CPUS, left / 4)
    # A range says that nodes come and go: what is not there yet is waited for.
    if (least > fitting and not may_grow) or least < 1 or task_cpus < _TASK_CPUS / 4:
        each = f"{actor_cpus:g} CPU{' and 1 GPU' if device == 'cuda' else ''}"
        raise SettingsError(
            f"{max(least, 1)} × the model at {each} each, and {_TASK_CPUS:g} CPU for the other stages, "
            f"do not fit the cluster's {sum(cpus):g} CPUs and {num_gpus} GPUs on {len(resources)} nodes, "
            f"which hold {fitting} models; lower --actors or --threads, take another --device, "
            "or, where nodes are still to come, a range such as --actors 1:8"
        )
    # Each task holds two blocks out; two wait for each model, and what it made of two others is about to be fetched.
    num_blocks = 2 * left / task_cpus + 4 * least
    store_bytes = sum(r["object_store_memory"] for r in resources)
    return Placement(
        device=device,
        min_actors=least,
        max_actors=most,
        threads=threads,
        actor_cpus=actor_cpus,
        actor_gpus=1 if device == "cuda" else 0,
        task_cpus=task_cpus,
        task_labels=task_labels,
        max_cpus=max_cpus,
        block_bytes=min(_BLOCK_BYTES, int(store_bytes / 4 / num_blocks)),
    )


def _placed(job: Label, ray: ModuleType) -> Placement:
    """`place` on the cluster's nodes; where a range of actors says that they come and go, one is waited for."""
    from segray.session import nodes_with_cpus

    wait_seconds = progress.START_SECONDS if _may_grow(job.actors) else 0.0
    return place(job, nodes_with_cpus(ray, wait_seconds, note))


def _without_gpu(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Labels that no node with a GPU has: neither those that are there nor those to come."""
    from ray.util.accelerators import accelerators

    kinds = {value for name, value in vars(accelerators).items() if isinstance(value, str) and not name.startswith("_")}
    nameless = []
    for node in nodes:
        if node["Resources"].get("GPU"):
            kind = node["Labels"].get(_ACCELERATOR)
            kinds |= {kind} if kind else set()
            nameless += [] if kind else [node["NodeID"]]
    labels = {_ACCELERATOR: f"!in({','.join(sorted(kinds))})"}
    return labels | ({"ray.io/node-id": f"!in({','.join(nameless)})"} if nameless else {})


def _fetch(
    entries: pa.Table, *, done: Any, column: str | None, ledger: Any, whole: Callable[[str, list[str]], object]
) -> Iterator[pa.Table]:
    import ray

    from segray.source import fetch, is_shard

    first = entries["uri"][0].as_py()
    if not ray.get(ledger.begin.remote(first)):
        return
    num_seen = num_present = 0
    fetched = fetch(entries, done=ray.get(done), column=column, alive=lambda: ledger.alive.remote(), whole=whole)
    for number, (table, num_skipped) in enumerate(metrics.staged("fetch", fetched)):
        metrics.fetched(pc.sum(pc.binary_length(table["data"])).as_py() or 0)
        num_granted = ray.get(ledger.grant.remote(first, number, table.num_rows)) if table.num_rows else 0
        num_seen += num_granted + num_skipped
        num_present += num_skipped
        if num_granted:
            yield table.slice(0, num_granted)
        if num_granted < table.num_rows:
            break
    state = Fetched(num_seen=num_seen, num_present=num_present, is_shard=is_shard(first))
    ray.get(ledger.fetched.remote(first, state))


def _read(windows: pa.Table, *, scenes: Scenes, area: Any, ledger: Any) -> Iterator[pa.Table]:
    """Windows of scenes become rasters."""
    import ray

    from segray.cut import read_windows

    first, num_seen = windows["uri"][0].as_py(), 0
    if not ray.get(ledger.begin.remote(first)):
        return
    for number, table in enumerate(metrics.staged("fetch", read_windows(windows, scenes, area))):
        metrics.fetched(pc.sum(pc.binary_length(table["values"])).as_py() or 0)
        num_granted = ray.get(ledger.grant.remote(first, number, table.num_rows))
        num_seen += num_granted
        if num_granted:
            yield table.slice(0, num_granted)
        if num_granted < table.num_rows:
            break
    ray.get(ledger.fetched.remote(first, Fetched(num_seen=num_seen, num_present=0, is_shard=False)))


def _decode(fetched: pa.Table, *, max_pixels: int, side: int | None) -> Iterator[pa.Table]:
    return metrics.staged("decode", _decoded(fetched, max_pixels, side))


def _decoded(fetched: pa.Table, max_pixels: int, side: int | None) -> Iterator[pa.Table]:
    """`data` becomes `pixels` (HWC uint8 in `num_rows`, empty in a reject), beside the image's `height` and `width`.

    Yields a table whenever there are some 64 MiB of pixels, however small the files were.
    """
    images: list[Decoded] = []
    stages, reasons = fetched["stage"].to_pylist(), fetched["reason"].to_pylist()
    first, size_bytes = 0, 0
    for row, data in enumerate(fetched["data"]):
        image = Decoded(np.empty((0, 0, 3), np.uint8), 0, 0)
        if reasons[row] is None:
            try:
                image = decode_for(memoryview(data.as_buffer()), max_pixels, side)
            except Reject as reject:
                stages[row], reasons[row] = reject.stage, reject.reason
        images.append(image)
        size_bytes += image.pixels.nbytes
        if size_bytes >= _PIXEL_BYTES or row == fetched.num_rows - 1:
            some = fetched.slice(first, len(images))
            yield pa.table(
                {
                    **{name: some[name] for name in ("image_id", "uri", "version")},
                    "pixels": binary([image.pixels for image in images]),
                    "num_rows": pa.array([len(image.pixels) for image in images], pa.int32()),
                    "height": pa.array([image.height for image in images], pa.int32()),
                    "width": pa.array([image.width for image in images], pa.int32()),
                    "stage": pa.array(stages[first : row + 1], pa.string()),
                    "reason": pa.array(reasons[first : row + 1], pa.string()),
                }
            )
            first, size_bytes, images = row + 1, 0, []


class _Predictor:
    """The actor: a `Predictor` that tells of itself."""

    def __init__(self, *, read_checkpoint: Callable[[], bytes], ledger: Any, **settings: Any) -> None:
        from segray.predict import Predictor

        def beat(num_images: int) -> None:
            ledger.beat.remote()
            metrics.batch(num_images)

        self._ledger = ledger
        self._predictor = Predictor(
            read_checkpoint,
            chosen=lambda choice: ledger.chosen.remote(dataclasses.asdict(choice)),
            beat=beat,
            refined=ledger.refined.remote,
            **settings,
        )
        ledger.beat.remote()

    def __call__(self, decoded: pa.Table) -> Iterator[pa.Table]:
        """Label maps of some 64 Mi pixels at a time, which may be many times as many as were decoded."""
        sides = (pc.fill_null(pc.cast(decoded[name], pa.int64()), 0) for name in ("height", "width"))  # null of rejects
        num_pixels = pc.multiply(*sides).to_numpy()
        parts = (np.cumsum(num_pixels) - num_pixels) // _PIXEL_BYTES
        for begin, end in pairwise([0, *np.flatnonzero(np.diff(parts)) + 1, decoded.num_rows]):
            with metrics.stage("predict"):
                predicted = self._predictor(decoded.slice(begin, end - begin))
            self._ledger.predicted.remote(predicted.num_rows)
            yield predicted


def _encode(predicted: pa.Table, *, classes: Classes, ledger: Any) -> pa.Table:
    """The raw `label_map` becomes a PNG; of a window of a scene the areas of its classes come beside it."""
    dtype = dtype_for(len(classes))
    shapes = zip(predicted["height"].to_pylist(), predicted["width"].to_pylist(), strict=True)
    with metrics.stage("encode"):
        label_maps = [
            np.frombuffer(raw.as_buffer(), dtype).reshape(shape) if raw.is_valid else None
            for raw, shape in zip(predicted["label_map"], shapes, strict=True)
        ]
        pngs = [None if one is None else encode_png(one, classes.palette) for one in label_maps]
        position = predicted.schema.get_field_index("label_map")
        encoded = predicted.set_column(position, "label_map", pa.array(pngs, pa.large_binary()))
        if "scene" in encoded.column_names:
            from segray.cut import areas_by_class

            places = zip(*(encoded[name].to_pylist() for name in ("crs", *_TRANSFORM)), strict=True)
            areas = [
                None if one is None else areas_by_class(one, crs, tuple(transform), len(classes))
                for one, (crs, *transform) in zip(label_maps, places, strict=True)
            ]
            encoded = encoded.append_column("area_sum", pa.array(areas, pa.list_(pa.float64())))
        if "confidence" in encoded.column_names:
            position = encoded.schema.get_field_index("confidence")
            confidences = [
                None if one is None else encode_png(np.frombuffer(raw.as_buffer(), np.uint8).reshape(one.shape), None)
                for raw, one in zip(encoded["confidence"], label_maps, strict=True)
            ]
            encoded = encoded.set_column(position, "confidence", pa.array(confidences, pa.large_binary()))
    ledger.encoded.remote(len(pngs), pngs.count(None))
    return encoded


@dataclass(frozen=True, slots=True)
class _Page:
    """Entries of the source, sorted out."""

    loose: pa.Table
    """Loose images that are not done, with the schema `source.ENTRIES`; of scenes windows, with `cut.WINDOWS`."""
    shards: pa.Table
    """Shards of which it is not known that they are done, likewise."""
    num_present: int
    """Images that are done, those in shards too."""
    num_shards_done: int
    """Shards of which every image is done."""
    num_in_shards_done: int
    """Images in them."""
    is_unversioned: bool
    """Whether entries have no version, or had none in an earlier run, so that its rejects may be put right."""


def _pages(
    job: Label,
    entries: Iterator[pa.Table],
    area: Any,
    sink: Any,
    done: np.ndarray,
    checkpoint: Any,
    recipe_id: str,
) -> Iterator[_Page]:
    """What is there and what of it is done, some thousand entries at a time."""
    if job.scenes.size is None:
        return _image_pages(entries, job.column, sink, done)
    return _scene_pages(job, entries, area, sink, done, checkpoint, recipe_id)


def _image_pages(entries: Iterator[pa.Table], column: str | None, sink: Any, done: np.ndarray) -> Iterator[_Page]:
    """What is there and what of it is done, some thousand entries at a time."""
    from segray.source import image_id, is_shard, known, shard_id

    noted = sink.shards() if len(done) else set()

    def num_done(shard: Mapping[str, Any]) -> int | None:
        name = shard_id(shard["uri"], shard["version"] or "", column)
        number: int | None = sink.num_done(name, done) if name in noted else None
        return number

    with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
        for table in entries:
            shards = np.array([is_shard(uri) for uri in table["uri"].to_pylist()], bool)
            loose, in_shards = table.filter(pa.array(~shards)), table.filter(pa.array(shards))
            versioned = zip(loose["uri"].to_pylist(), loose["version"].to_pylist(), strict=True)
            ids = np.array([image_id(uri, version or "") for uri, version in versioned], "S32")
            present = known(ids, done) & loose["version"].is_valid().to_numpy()
            numbers = list(pool.map(num_done, in_shards.to_pylist()))
            found = [number for number in numbers if number is not None]
            yield _Page(
                loose=loose.filter(pa.array(~present)),
                shards=in_shards.filter(pa.array([number is None for number in numbers], pa.bool_())),
                num_present=int(present.sum()) + sum(found),
                num_shards_done=len(found),
                num_in_shards_done=sum(found),
                is_unversioned=table["version"].null_count > 0,
            )


def _scene_pages(
    job: Label,
    entries: Iterator[pa.Table],
    area: Any,
    sink: Any,
    done: np.ndarray,
    checkpoint: Any,
    recipe_id: str,
) -> Iterator[_Page]:
    """Likewise of scenes, whose windows are loose images; what those are is noted in the sink, as it is of shards."""
    from segray.catalog import scene_version
    from segray.cut import WINDOWS, windows_of
    from segray.source import image_id, known, shard_id

    noted = sink.shards()

    def look_at(entry: Mapping[str, Any]) -> tuple[pa.Table, int, bool]:
        """The windows that are to be read, how many are done, and whether that is known without a look at the scene."""
        version = entry["version"] or scene_version(entry["uri"], job.scenes.calls)
        name = None if isinstance(version, Reject) else shard_id(entry["uri"], version, recipe_id)
        if name in noted and (number := sink.num_done(name, done)) is not None:
            return WINDOWS.empty_table(), number, True
        found = windows_of(entry["uri"], version, job.scenes, area, checkpoint.preprocessing, entry["item"])
        ids = found["image_id"].to_pylist()
        if name is not None and not job.dry_run:
            sink.write_shard(name, ids)
        present = known(np.array(ids, "S32"), done)
        return found.filter(pa.array(~present)), int(present.sum()), False

    num_scenes = num_outside = 0
    with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
        for table in entries:
            found = list(pool.map(look_at, table.to_pylist()))
            num_scenes += len(found)
            num_outside += sum(windows.num_rows + number == 0 for windows, number, _ in found)
            # By these an earlier run rejected what it could not look up.
            versionless = np.array([image_id(uri, "") for uri in table["uri"].to_pylist()], "S32")
            yield _Page(
                loose=pa.concat_tables([WINDOWS.empty_table(), *(windows for windows, _, _ in found)]),
                shards=WINDOWS.empty_table(),
                num_present=sum(number for _, number, _ in found),
                num_shards_done=sum(is_known for _, _, is_known in found),
                num_in_shards_done=sum(number for _, number, is_known in found if is_known),
                is_unversioned=bool(known(versionless, done).any()),
            )
    if num_outside:
        note(f"{num_outside:,} of {num_scenes:,} scenes lie outside of {job.scenes.area}; nothing of them is labelled")


@dataclass(frozen=True, slots=True)
class _Index:
    """What is to be done, in blocks that are one task's work each."""

    blocks: list[pa.Table]
    """With the schema `source.ENTRIES`, or `cut.WINDOWS`."""
    num_loose: int
    """Loose images in them."""
    num_shards: int
    """Shards in them, each a block of its own."""
    num_present: int
    """Images left out, as the sink holds them."""
    num_other: int
    """Objects that are neither images nor shards."""
    is_unversioned: bool
    """Whether entries have no version, or had none in an earlier run, so that its rejects may be put right."""

    @property
    def num_images(self) -> int:
        """About how many images there are."""
        return self.num_loose + self.num_shards * _IMAGES_PER_SHARD


def _per_block(job: Label) -> tuple[int, int, int]:
    return _IMAGES_PER_BLOCK if job.scenes.size is None else _WINDOWS_PER_BLOCK


def _noun(job: Label) -> str:
    """What the run labels, to a person."""
    return "images" if job.scenes.size is None else "windows"


def _index(pages: Iterator[_Page], source: Any, per_block: tuple[int, int, int], first: int, num_models: int) -> _Index:
    blocks: list[pa.Table] = []
    least, small, large = per_block
    num_loose = num_shards = num_present = 0
    is_unversioned = False
    for page in pages:
        num_loose += page.loose.num_rows
        # Few at first, that all may begin; then more, that millions of images are some thousand blocks.
        size = max(least, min(small, num_loose // (_BLOCKS_PER_MODEL * num_models)))
        size = max(size, min(large, num_loose // _NUM_SMALL_BLOCKS))
        # The very first is one batch, of which label maps are there soon.
        num_rows = page.loose.num_rows
        begins = range(0, num_rows, size) if blocks else [*range(min(num_rows, 1)), *range(first, num_rows, size)]
        blocks += [page.loose.slice(begin, end - begin) for begin, end in pairwise([*begins, num_rows])]
        blocks += [page.shards.slice(row, 1) for row in range(page.shards.num_rows)]
        num_shards += page.shards.num_rows
        num_present += page.num_present
        is_unversioned |= page.is_unversioned
    return _Index(blocks, num_loose, num_shards, num_present, source.num_other, is_unversioned)


class _Run:
    """One execution: its id, its clock, and what is told of it in the end."""

    def __init__(self, job: Label) -> None:
        self.job = job
        self.started = datetime.now(UTC)
        self.run_id = f"{self.started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        self.status: Literal["running", "finished", "interrupted", "failed"] = "running"
        self.ended: str | None = None
        self.deadline = None if job.deadline is None else _deadline(job.deadline, datetime.now()).timestamp()
        self._lock = threading.Lock()
        self._is_in_pipeline = False
        self.samples: list[tuple[float, int]] = []

    def end(self, reason: str) -> None:
        """Ends it from another thread: the pipeline at once, what is before and after it at its next look."""
        with self._lock:
            self.ended = self.ended or reason
            if self._is_in_pipeline:
                _thread.interrupt_main()

    @contextlib.contextmanager
    def in_pipeline(self) -> Iterator[None]:
        """While the main thread may be interrupted."""
        # Where SIGINT is ignored, as it is by default in a script's background, `end` would come to nothing.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with self._lock:
            self._is_in_pipeline = True
        try:
            yield
        finally:
            with self._lock:
                self._is_in_pipeline = False
            signal.signal(signal.SIGINT, before)

    def record(
        self,
        recipe: str,
        index: _Index,
        state: Snapshot,
        choices: Sequence[Mapping[str, Any]],
        totals: Totals,
        placement: Placement,
    ) -> dict[str, Any]:
        """`runs/<run_id>.json`."""
        began = self.started.timestamp()
        total_seconds = time.time() - began
        first, last = state.first_done or time.time(), state.last_done or time.time()
        if state.num_done:
            self.samples.append((round(last - began, 1), state.num_done))
        num_steady = state.num_done - state.num_done_first
        return {
            "run_id": self.run_id,
            "recipe": recipe,
            "status": self.status,
            "ended": self.ended or ("at its bound" if state.is_bounded else None),
            "segray": segray.__version__,
            "job": dataclasses.asdict(self.job),
            "placement": dataclasses.asdict(placement),
            "models": list(choices),
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(),
            "seconds": {"total": total_seconds, "start": first - began, "steady": last - first},
            "images_per_second": num_steady / (last - first) if last > first and num_steady else None,
            "crf_ms_per_image": state.crf_ms_per_image,
            "throughput": self.samples,
            "num_lost": max(0, state.num_predicted - totals.num_labelled - totals.rejects.total()),
            "counts": {
                "seen": index.num_present + state.num_seen,
                "labelled": totals.num_labelled,
                "rejected": totals.rejects.total(),
                "present": index.num_present + state.num_present,
                "other_files": index.num_other,
            },
            "rejects": [
                {"stage": stage, "kind": kind, "num_images": count}
                for (stage, kind), count in totals.rejects.most_common()
            ],
            "classes": totals.classes,
        }


def _recipe(job: Label, checkpoint: Any, area: Any) -> dict[str, Any]:
    """What decides a label, and its digest: the recipe's id."""
    from segray.crf import Crf

    tiling = dataclasses.asdict(job.tiling)
    more: dict[str, Any] = {"crf": dataclasses.asdict(Crf())} if job.crf else {}
    if job.scenes.size is not None:
        of_area = None if area is None else area.to_dict()
        more["scenes"] = dataclasses.asdict(job.scenes) | {"area": of_area}
    decisive = {
        "labelling": _LABELLING,
        "model": checkpoint.digest(),
        "tiling": tiling,
        "dtype": job.dtype,
        **more,
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return {
        # The letter keeps SQL engines from taking an id of digits for a number.
        "recipe": f"r{digest[:15]}",
        "labelling": _LABELLING,
        "model": {
            "name": job.model,
            "digest": checkpoint.digest(),
            "architecture": checkpoint.architecture,
            "arguments": dict(checkpoint.arguments),
            "origin": dict(checkpoint.origin),
        },
        "classes": checkpoint.classes.to_dict(),
        "preprocessing": dataclasses.asdict(checkpoint.preprocessing),
        "tiling": tiling,
        "dtype": job.dtype,
        **more,
        "segray": segray.__version__,
    }


def _print_prospect(
    entries: Iterator[pa.Table], area: Any, job: Label, checkpoint: Any, document: Mapping[str, Any], sink: Any
) -> None:
    """What a run would do, how long it would take and what it would cost."""
    from segray.source import num_members
    from segray.store import LabelStore

    recipe = document["recipe"]
    records, others = [], []
    with contextlib.suppress(SinkError):  # there is no store yet
        store = LabelStore.open(job.sink)
        records = [record for record in store.runs() if record["recipe"] == recipe and record["images_per_second"]]
        others = [other for other in store.recipe_ids() if other != recipe]
    done = sink.done(with_rejects=not job.retry_rejects, repair=False)
    if job.scenes.size is None:
        from segray.source import ENTRIES as schema
    else:
        from segray.cut import WINDOWS as schema
    some_loose, some_shards = [_kept(job, schema.empty_table())], [schema.empty_table()]
    num_present = num_shards_done = num_in_shards_done = 0
    for page in _pages(job, entries, area, sink, done, checkpoint, recipe):
        some_loose.append(_kept(job, page.loose))
        some_shards.append(page.shards)
        num_present += page.num_present
        num_shards_done += page.num_shards_done
        num_in_shards_done += page.num_in_shards_done
    loose, shards = pa.concat_tables(some_loose), pa.concat_tables(some_shards)
    num_loose, num_shards = loose.num_rows, shards.num_rows
    if num_shards_done:
        per_shard = num_in_shards_done / num_shards_done
    else:
        per_shard = num_members(shards["uri"][0].as_py(), job.column) if num_shards else 0
    beside = f" (beside {', '.join(others)})" if others else ""
    changed = ["of these, changed since they were labelled", f"{sink.num_changed(_versions(loose, shards)):,}"]
    if job.scenes.size is None:
        found = [
            ["loose images to label", f"{num_loose:,}"],
            ["shards to open", f"{num_shards:,}{f', of about {per_shard:,.0f} images' if num_shards else ''}"],
            changed,
            ["images already there", f"{num_present:,}"],
            ["shards of which all is there", f"{num_shards_done:,}"],
        ]
    else:
        found = [
            ["windows to label", f"{num_loose:,}"],
            changed,
            ["windows already there", f"{num_present:,}"],
            ["scenes of which all is there", f"{num_shards_done:,}"],
        ]
    print_table(
        ["dry run", ""],
        [
            ["recipe", f"{recipe}{', new' if not len(done) else ''}{beside}"],
            *([["refined by", "a CRF"]] if job.crf else []),
            *found,
        ],
    )
    if not num_loose and not num_shards:
        print("nothing to do")
        return
    noun, num_images = _noun(job), min(num_loose + round(num_shards * per_shard), job.max_images or sys.maxsize)
    if job.sample is not None:
        start_seconds, rate = _time_sample(job, area, checkpoint, loose, shards, done)
        basis = "a sample"
    elif records:
        start_seconds, rate = records[0]["seconds"]["start"], records[0]["images_per_second"]
        basis = f"run {records[0]['run_id']}"
    else:
        print(f"about {num_images:,} {noun}; no run of this recipe tells how long that takes: try --sample 500")
        return
    seconds = start_seconds + num_images / rate
    cost = f", at a cost of {job.hourly_cost * seconds / 3600:,.2f}" if job.hourly_cost is not None else ""
    print(
        f"about {num_images:,} {noun} in {timedelta(seconds=round(seconds))}{cost}, "
        f"at the {rate:.1f} {noun}/s of {basis}"
    )


def _kept(job: Label, loose: pa.Table) -> pa.Table:
    """What a dry run needs of images, of which there may be millions: all, where a sample is taken."""
    return loose if job.sample is not None else _versions(loose)


def _versions(*tables: pa.Table) -> pa.Table:
    return pa.concat_tables(table.select(["uri", "version"]) for table in tables)


def _time_sample(
    job: Label, area: Any, checkpoint: Any, loose: pa.Table, shards: pa.Table, done: np.ndarray
) -> tuple[float, float]:
    """Labels some images and forgets them: the seconds before the first, and images a second from there.

    Raises:
        RunError: they were too few to tell.
    """
    from segray.session import session

    assert job.sample is not None
    began = time.time()
    with session() as ray:
        blocks = []
        few = min(_per_block(job)[1], -(-job.sample // _NUM_SAMPLE_BLOCKS))
        for table, size in ((loose, few), (shards, 1)):
            # From all over the index, as its beginning may be like itself alone.
            rows = np.unique(np.linspace(0, table.num_rows, job.sample, endpoint=False, dtype=int))
            some = pa.concat_tables([table.slice(0, 0), *(table.slice(row, 1) for row in rows)])
            blocks += [some.slice(row, size) for row in range(0, some.num_rows, size)]
        ledger = _start_ledger(ray, "sample", job.sample, None)
        chain = _chain(job, area, checkpoint, _placed(job, ray), blocks, done, ledger, _forget)
        for _ in chain.iter_batches(batch_size=None):
            pass
        state: Snapshot = ray.get(ledger.snapshot.remote(), timeout=_LEDGER_SECONDS)
    if state.first_done is None or state.last_done is None or state.num_done == state.num_done_first:
        raise RunError(f"--sample {job.sample}: too few to tell the time by; take some hundred")
    rate = (state.num_done - state.num_done_first) / (state.last_done - state.first_done)
    return state.first_done - began, rate


def _forget(shard: str, members: list[str]) -> None:
    """Notes nothing."""


def _print_summary(job: Label, record: Mapping[str, Any]) -> None:
    if is_json():
        told = {
            name: record[name]
            for name in (
                "status",
                "ended",
                "counts",
                "num_lost",
                "models",
                "seconds",
                "images_per_second",
                "crf_ms_per_image",
            )
        }
        say(f"written to {job.sink}", **told)
        return
    counts, seconds, noun = record["counts"], record["seconds"], _noun(job)
    rows = [[name, f"{counts[name]:,}"] for name in ("seen", "labelled", "present", "rejected")]
    rows[2][0] = "already there"
    rows += [[f"  {r['stage']}: {r['kind']}", f"{r['num_images']:,}"] for r in record["rejects"]]
    if counts["other_files"]:
        rows.append(
            [f"other files, not {'images' if job.scenes.size is None else 'scenes'}", f"{counts['other_files']:,}"]
        )
    if record["num_lost"]:
        rows.append(["predicted, and lost before they were written", f"{record['num_lost']:,}"])
    ended = f" ({record['ended']})" if record["ended"] else ""
    print(f"run {record['run_id']} of recipe {record['recipe']}: {record['status']}{ended}")
    print_table([noun, ""], rows)
    if counts["labelled"]:
        has_areas = any(c["area_m2"] is not None for c in record["classes"])
        print_table(
            ["class", "pixels", "share", *(["hectares"] if has_areas else []), noun, "confidence"],
            [
                [
                    f"{c['class_id']} {c['class_name']}",
                    f"{c['num_pixels']:,}",
                    f"{c['fraction']:.2%}",
                    *([f"{c['area_m2'] / 10_000:,.2f}"] if has_areas else []),
                    f"{c['num_images']:,}",
                    "" if c["mean_confidence"] is None else f"{c['mean_confidence']:.3f}",
                ]
                for c in record["classes"]
            ],
        )
    for models in record["models"]:
        if models["refused"] is not None:
            print(
                f"of the first batch's pixels {models['refused']:.2%} had the class of float32 in the device's faster "
                "dtype, less than 99 %, which was not taken"
            )
        if models["agreement"] is not None:
            print(f"computed in {models['dtype']}: {models['agreement']:.2%} of the first batch's pixels as in float32")
        if models["error"] is not None:
            print(f"slower than it should be, as {models['error']}")
    rate, crf_ms = record["images_per_second"], record["crf_ms_per_image"]
    print(
        f"{seconds['total']:.1f} s in all"
        + (f", {seconds['start']:.1f} s of them to the first label map" if counts["labelled"] else "")
        + (f", then {rate:.1f} {noun}/s" if rate else "")
        + (f"; the CRF took {crf_ms:,.1f} ms an image" if crf_ms is not None else "")
    )
    print(f"written to {job.sink}")
    if record["status"] != "finished" or record["ended"]:
        print("what is committed stays; run the same command again and it goes on from there")
    script = Path(sys.argv[0])
    report = f"python {script.with_name('report.py')}" if script.name == "label.py" else "segray report"
    print(f"look at it: {report} {job.sink}")
