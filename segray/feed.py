"""Pairs to those who train on them: where they lie, and which of them a step sees.

The order of an epoch is a permutation of all its images that the seed and the epoch decide; a step takes the next
`batch_size` of it, and each worker its share of those. So what a step sees does not depend on how many workers there
are or on where training began, and in an epoch no image comes twice; the few that fill no batch are left out of it.
"""

import dataclasses
import functools
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from segray.augment import Augmentation, augment
from segray.classes import Classes
from segray.errors import RunError, SourceError
from segray.pairs import SHAPE, Census, decode_pair, read, read_index, survey
from segray.session import root_cause

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` waits for none
    from torch import Tensor

__all__ = ["Order", "Split", "Tasks", "batches", "find", "pairs", "surveyed"]

_STEPS_PER_EXECUTION = 1000
_PAIRS_PER_TASK = 4
_BATCHES_AHEAD = 2
_STEPS_AHEAD = 4  # of each task
_ID_BYTES = 2
_PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Pairs, and what they hold in all."""

    uri: str
    """Where they are, as a person gave it."""
    index: pa.Table
    """A row a pair, with the schema `pairs.INDEX`."""
    census: Census
    """What they hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which images a step sees."""

    num_images: int
    """Of the split."""
    batch_size: int
    """Images in a step, over all workers."""
    seed: int
    """Decides the order."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.num_images // self.batch_size

    def share(self, step: int, rank: int, num_workers: int) -> Int64[np.ndarray, " share"]:
        """The rows of the split's index that a worker takes in a step, both counted from 0; shares differ by one."""
        begin, end = (self.batch_size * place // num_workers for place in (rank, rank + 1))
        return self.batch(step)[begin:end]

    def batch(self, step: int) -> Int64[np.ndarray, " batch_size"]:
        """Those of all workers."""
        epoch, number = divmod(step, self.steps_per_epoch)
        first = number * self.batch_size
        return _permutation(self.seed, epoch, self.num_images)[first : first + self.batch_size]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """What those that feed one worker may take of the cluster."""

    num_cpus: float
    """That each asks for."""
    concurrency: int
    """How many run at once."""
    store_bytes: float
    """Of the object store, for what they have made."""


@functools.lru_cache(2)
def _permutation(seed: int, epoch: int, num_images: int) -> Int64[np.ndarray, " num_images"]:
    return np.random.default_rng([seed, epoch]).permutation(num_images)


def find(source: str, val: str | None) -> tuple[dict[str, int], dict[str, int]]:
    """The shards to train on and those to validate on, with their sizes in bytes.

    Those to train on lie in `SOURCE/train`, or in SOURCE but for `SOURCE/val`; those to validate on are `val`, or
    `SOURCE/val`, or else the last of SOURCE.

    Raises:
        SourceError: there are none.
    """
    shards = _listed(source)
    folders: dict[str, dict[str, int]] = defaultdict(dict)
    for uri, size in shards.items():
        folders[uri.rpartition("/")[0].rpartition("/")[2]][uri] = size
    in_val = folders.get("val", {})
    to_train = folders.get("train") or {uri: size for uri, size in shards.items() if uri not in in_val}
    to_validate = in_val if val is None else _listed(val)
    if not to_train:
        raise SourceError(f"{source} has shards to validate on alone; those to train on go into {source}/train")
    if to_validate:
        return to_train, to_validate
    if len(to_train) < 2:
        raise SourceError(f"{source} holds one shard, so that none is left to validate on; give --val SHARDS")
    *others, last = to_train
    return {uri: to_train[uri] for uri in others}, {last: to_train[last]}


def surveyed(uri: str, shards: dict[str, int], classes: Classes, *, is_packed: bool) -> Split:
    """What is in shards: as the index beside them says, where it is theirs, or by reading all of them once.

    Args:
        uri: where they are, for a person.
        shards: their URIs and sizes in bytes.
        classes: what their targets are of.
        is_packed: whether these are the classes beside the shards, of which an index beside them tells.

    Raises:
        SourceError: the first fault that was found, or there is no pair.
    """
    folders = {shard.rpartition("/")[0] for shard in shards}
    found = read_index(folders.pop(), shards) if is_packed and len(folders) == 1 else None
    if found is None or len(found[1].num_pixels) != len(classes):
        found = _survey(list(shards), classes)
    index, census = found
    if not index.num_rows:
        raise SourceError(f"{next(iter(shards))}: there is no image in it; {SHAPE}")
    return Split(uri, index, census)


def batches(
    split: Split,
    classes: Classes,
    order: Order,
    augmentation: Augmentation,
    *,
    resize: int | None,
    steps: range,
    rank: int,
    num_workers: int,
    tasks: Tasks,
) -> Iterator[dict[str, "Tensor"]]:
    """A worker's share of each step, read, decoded and augmented by Ray Data on the cluster's CPUs.

    Args:
        split: to train on.
        classes: of its targets.
        order: which images a step sees.
        augmentation: what happens to them.
        resize: pixels of the shorter side to which each is brought first. None: they stay as they are.
        steps: which ones.
        rank: of the worker.
        num_workers: of them all.
        tasks: that feed this worker.

    Yields:
        `image`, (share, crop, crop, 3) uint8, or of bands float32 with NaN where there are no data; `target`, (share,
        crop, crop) class ids; `row`, those of the index.
    """
    import ray

    index = ray.put(split.index)
    # Tasks that ran as far ahead as the object store lets them would take the cores of a model on CPUs.
    bands = split.census.bands
    pixel_bytes = _ID_BYTES + (3 if bands is None else 4 * len(bands))
    step_bytes = -(-order.batch_size // num_workers) * augmentation.crop**2 * pixel_bytes
    ahead_bytes = _STEPS_AHEAD * tasks.concurrency * step_bytes
    tasks = dataclasses.replace(tasks, store_bytes=min(tasks.store_bytes, ahead_bytes))

    def load(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        step = int(batch["item"][0])
        epoch = step // order.steps_per_epoch
        rows = order.share(step, rank, num_workers)
        crops = []
        for row, (uri, image_data, target_data) in zip(rows, read(ray.get(index).take(rows)), strict=True):
            image, target = decode_pair(uri, image_data, target_data, classes)
            # What happens to an image depends on nothing but the seed, the epoch and its place.
            seed = zlib.crc32(f"{order.seed} {epoch} {row}".encode())
            crops.append(augment(image, target, augmentation, classes.ignore_index, seed, resize))
        images, targets = zip(*crops, strict=True)
        return {"image": np.stack(images), "target": np.stack(targets), "row": rows}

    # In portions, as Ray Data plans all tasks of an execution before the first.
    for first in range(steps.start, steps.stop, _STEPS_PER_EXECUTION):
        some = steps[first - steps.start : first - steps.start + _STEPS_PER_EXECUTION]
        # Not `ray.data.range`, whose read tasks would want a whole CPU.
        loaded = _mapped(ray.data.from_items(list(some), override_num_blocks=len(some)), load, 1, tasks)
        yield from loaded.iter_torch_batches(batch_size=None, prefetch_batches=_BATCHES_AHEAD)


def pairs(split: Split, classes: Classes, rows: Sequence[int], tasks: Tasks) -> Iterator[dict[str, Any]]:
    """Whole images and their targets, read and decoded by Ray Data.

    Args:
        split: where they are.
        classes: of its targets.
        rows: of the split's index.
        tasks: that feed this worker.

    Yields:
        `uri`; `image` and `target`, as `pairs.decode_pair` gives them.
    """
    import ray

    if not rows:  # of which Ray Data makes no stream
        return
    index = ray.put(split.index)

    def load(batch: dict[str, np.ndarray]) -> Iterator[dict[str, list[Any]]]:
        for uri, image_data, target_data in read(ray.get(index).take(batch["item"])):
            image, target = decode_pair(uri, image_data, target_data, classes)
            yield {"uri": [uri], "image": [image], "target": [target]}

    num_blocks = -(-len(rows) // _PAIRS_PER_TASK)
    items = ray.data.from_items([int(row) for row in rows], override_num_blocks=num_blocks)
    yield from _mapped(items, load, _PAIRS_PER_TASK, tasks).iter_rows()


class _Pausing:
    """Rests after each turn of Ray Data's loop, which while no task may start would take a core of the model's."""

    def before_execution_starts(self, executor: Any) -> None:
        """Is what Ray Data calls; so are the others."""

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(_PAUSE_SECONDS)

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


def _mapped(items: Any, load: Callable[..., Any], batch_size: int, tasks: Tasks) -> Any:
    """What `load` makes of a dataset's batches, in its order."""
    import ray

    items.context.target_max_block_size = None  # what a task gives is never cut up
    items.context.raise_original_map_exception = True  # a wrapping of Ray's would lose it on the way here
    items.context.custom_execution_callback_classes = [_Pausing]
    options = items.context.execution_options
    options.preserve_order = True
    options.resource_limits = ray.data.ExecutionResources(object_store_memory=tasks.store_bytes)
    pool = ray.data.TaskPoolStrategy(tasks.concurrency)
    return items.map_batches(load, batch_size=batch_size, num_cpus=tasks.num_cpus, compute=pool)


def _listed(uri: str) -> dict[str, int]:
    from segray.source import Source, is_shard

    sizes = {}
    for page in Source(uri).entries():
        for row in page.to_pylist():
            if is_shard(row["uri"]):
                sizes[row["uri"]] = row["size_bytes"]
    if not sizes:
        raise SourceError(f"{uri}: there are no shards (.tar or .parquet) in it; {SHAPE}")
    return dict(sorted(sizes.items()))


def _survey(shards: Sequence[str], classes: Classes) -> tuple[pa.Table, Census]:
    import ray

    @ray.remote
    def look(shard: str) -> tuple[pa.Table, Census] | str:
        try:
            return survey(shard, classes)
        except SourceError as error:
            return str(error)

    try:
        found = ray.get([look.remote(shard) for shard in shards])
    except ray.exceptions.RayError as error:
        raise RunError(f"the shards could not be read: {root_cause(error)}; run it again") from error
    faults = sorted(fault for fault in found if isinstance(fault, str))
    if faults:
        more = f" ({len(faults) - 1} more shards have faults)" if len(faults) > 1 else ""
        raise SourceError(faults[0] + more)
    tables, censuses = zip(*found, strict=True)
    return pa.concat_tables(tables), sum(censuses, Census.zeros(len(classes)))
