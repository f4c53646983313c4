"""Packs images and their targets, however they lie, into the shards that training reads.

SOURCE ─list──▶ pairs, each with its split       nothing is opened yet
       ─order─▶ shuffled once, cut into shards
       ─read──▶ image and target, or a reject    a Ray task a shard, many pairs at once in it
       ─write─▶ one atomic object a shard        and then a receipt of it

    SINK/<split>/shard-000000.tar    NAME.jpg with NAME.target.png; or .parquet: name, image, target
                                     of scenes NAME.npz, a window of them (see `bandfile`)
    SINK/<split>/_index.parquet      where each pair lies, and what the split holds in all
    SINK/classes.json                what the targets are of
    SINK/_rejects.parquet            what could not be used, and why; hidden from whoever lists SINK for images
    SINK/pack.json                   command and digest, written first: whose shards these are
    SINK/statistics.json             written last; where it is, all is there

The digest is of the settings and of the list of pairs, and decides every shard but for the bytes of the files in it.
Until all is written, SINK/_receipts/ says of each shard what is in it. The same command leaves out those whose shards
are there in their size and which nothing was rejected from, and does the others again; what an earlier attempt wrote
under names that this one does not is removed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import shlex
import sys
import tarfile
import threading
import time
import zlib
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int64, UInt, UInt8
from PIL import Image
from rich.console import Console
from rich.progress import track
from tyro.conf import Positional

import segray
from segray import bandfile
from segray.classes import Classes
from segray.datasets import KINDS, Pair, ToTarget, open_dataset, read
from segray.datasets.dataset import unreadable_is_a_reject
from segray.datasets.folders import read_classes
from segray.datasets.tree import Tree, safe_name
from segray.decode import MAX_PIXELS, decode
from segray.errors import Reject, RunError, SettingsError, SinkError, SourceError, extra
from segray.labelmap import decode_png, encode_png
from segray.lock import hold
from segray.pairs import INDEX, INDEX_NAME, TARGET_EXTENSION, Census, shown, write_index
from segray.progress import note, print_table
from segray.session import root_cause, session
from segray.source import ENTRIES, Source, fetch, filesystem, is_shard
from segray.store import LabelStore
from segray.tile import Window, cores

if TYPE_CHECKING:  # of the extra `geo`, which not everyone has
    from segray.datasets.scenes import ScenePair

__all__ = ["REJECTS", "Pack", "pack"]

# The sink's module imports Ray, and is imported when the job starts, so that `--help` answers at once.

REJECTS = pa.schema(
    {"split": pa.string(), "name": pa.string(), "uri": pa.string(), "stage": pa.string(), "reason": pa.string()}
)
"""One row for each pair that could not be used: `uri` is that of its image, `reason` is `kind: detail`."""

_PACKING = 2  # to be raised with any change of code that packs other shards
_IMAGES, _LABELS, _SCENES = "images", "labels", "scenes"  # what is packed beside the kinds of data sets
_MIN_CONFIDENCE = 0.9
_WINDOW = 256
_BLOCK_WINDOWS, _GAP_WINDOWS = 8, 1
_ROUNDING = 1e-9  # of a mean of floats
_SHARD_BYTES = 128 * 2**20
_ROWS_PER_GROUP = 8  # what is read for one pair
_TASKS_IN_FLIGHT = 256
_THREADS = 8
_REQUESTS_IN_FLIGHT = 32
_NUM_SHOWN = 5
_CHANGED = {"stage": "fetch", "reason": "changed: it is no more what was labelled; label it again"}
_MISSING = {"stage": "fetch", "reason": "missing: the shard has no such member"}
_PLACES = ("source", "sink", "classes")  # what counts is what lies there
_NONE_DONE = np.array([], "S32")
_IN_SHARD = re.compile(r"\.(?:tar|tar\.gz|tgz|parquet)#", re.IGNORECASE)
_LABELLED = pa.schema({"image_id": pa.string(), "uri": pa.string(), "version": pa.string()})
_UNLABELLED = Classes(("any",))  # for a census of images without targets, whose pixels are all void

_Image = UInt8[np.ndarray, "height width 3"] | Float32[np.ndarray, "height width bands"]
_Target = UInt[np.ndarray, "height width"]
_Rows = Int64[np.ndarray, " num_rows"]
_Loaded = tuple[bytes, _Image, _Target | None]


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Packs images and their targets into shards for training, or images alone into shards for labelling.

    Raises:
        SettingsError: a setting is out of its bounds.
    """

    source: Positional[str]
    """Folder or prefix of a data set; with --dataset images, images as the label job takes them; with --dataset
    labels, a label store."""
    sink: Positional[str]
    """Folder or prefix that receives the shards: an empty one, or one that the same command has begun."""
    dataset: str = "folders"
    """What SOURCE is: voc, sbd, coco, coco-instances, cityscapes, ade20k, camvid, folders (of images and targets);
    images (without targets); labels (a label store, whose label maps become the targets); scenes (georeferenced
    rasters of any bands, with rasters of class ids or polygons)."""
    classes: str | None = None
    """With --dataset folders or scenes: classes file. None: classes.json beside the folders."""
    column: str | None = None
    """With --dataset images: column of URIs in a manifest, or of image bytes in Parquet shards; None: it is found."""
    recipe: str | None = None
    """With --dataset labels: the recipe whose label maps are taken. None: that of the newest run."""
    min_confidence: float | None = None
    """With --dataset labels: the mean confidence that an image's label map must have at least. None: 0.9."""
    window: int | None = None
    """With --dataset scenes: side in pixels of the windows that they are cut into. None: 256."""
    bands: str | None = None
    """With --dataset scenes: which of their bands, in which order, such as red,nir=B08 (NAME, or NAME=BAND where the
    scenes call it otherwise). None: all, as the first scene has them."""
    block_metres: float | None = None
    """With --dataset scenes and --val-fraction: side of the squares of ground that become val, or train, as a whole.
    None: that of eight windows."""
    gap_metres: float | None = None
    """Likewise: how far from each other pixels of train and of val lie at least; windows between are left out.
    None: the side of a window."""

    format: Literal["tar", "parquet"] = "tar"
    """WebDataset tar (NAME.jpg, NAME.target.png), or Parquet (columns name, image, target)."""
    shard_images: int = 512
    """Images in a shard, at most; what reaches 128 MiB goes on in another one. Each CPU holds a shard in memory."""
    val_fraction: float | None = None
    """Share of all pairs that makes the split val, drawn by their names, of scenes by where they lie; the others make
    train. None: the data set's own splits."""
    seed: int = 0
    """Of the order."""

    def __post_init__(self) -> None:
        kinds = (*KINDS, _IMAGES, _LABELS, _SCENES)
        if self.dataset not in kinds:
            raise SettingsError(f"--dataset {self.dataset}: there is no such kind; there are {', '.join(kinds)}")
        of = {"classes": ("folders", _SCENES), "column": (_IMAGES,), "recipe": (_LABELS,), "min_confidence": (_LABELS,)}
        of |= dict.fromkeys(("window", "bands", "block_metres", "gap_metres"), (_SCENES,))
        for name, some in of.items():
            if getattr(self, name) is not None and self.dataset not in some:
                raise SettingsError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is of --dataset {' or '.join(some)}, "
                    f"not of {self.dataset}; leave it out"
                )
        for name, least in (("window", 1), ("block_metres", 1), ("gap_metres", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise SettingsError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
            if value is not None and name != "window" and self.val_fraction is None:
                raise SettingsError(f"--{name.replace('_', '-')} {value} goes with --val-fraction")
        self.named_bands()
        if self.val_fraction is not None and self.dataset == _IMAGES:
            raise SettingsError(f"--val-fraction {self.val_fraction}: images without targets have no splits")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise SettingsError(f"--val-fraction {self.val_fraction}: is a share between 0 and 1")
        if self.min_confidence is not None and not 0 <= self.min_confidence <= 1:
            raise SettingsError(f"--min-confidence {self.min_confidence}: is a share, from 0 to 1")
        if self.shard_images < 1:
            raise SettingsError(f"--shard-images {self.shard_images}: must be at least 1")
        if self.seed < 0:
            raise SettingsError(f"--seed {self.seed}: must be at least 0")
        within, _, is_deep = self.source.partition("**")
        if not is_deep and set("*?") & set(self.source):
            return  # a pattern of one level does not reach into a sink beside its files
        source, sink = (_absolute(uri).rstrip("/") for uri in (within, self.sink))
        if f"{sink}/".startswith(f"{source}/"):
            raise SettingsError(f"SINK {self.sink} lies in SOURCE {self.source}, and would be packed with it")

    def named_bands(self) -> dict[str, str] | None:
        """The name that each band is to have, and what the scenes call it. None: all of them, as they are.

        Raises:
            SettingsError: a name is empty, or comes twice.
        """
        if self.bands is None:
            return None
        parts = [[text.strip() for text in part.partition("=")] for part in self.bands.split(",")]
        bands = {name: there if equals else name for name, equals, there in parts}
        if len({name.casefold() for name in bands}) < len(parts) or not all(bands) or not all(bands.values()):
            raise SettingsError(f"--bands {self.bands}: give names, each once, such as red,green,nir=B08")
        return bands

    def command(self) -> str:
        """The command line that gives these settings."""
        options: list[str] = []
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if setting.name not in ("source", "sink") and value != setting.default:
                options += [f"--{setting.name.replace('_', '-')}", str(value)]
        return shlex.join(["python", "jobs/pack.py", self.source, self.sink, *options])


class _Loadable(NamedTuple):
    """An image, with its target where there are any, that a thread is to load."""

    name: str
    uri: str
    load: Callable[[], _Loaded | None]
    """Gives the image file's bytes, the image and the target; None: there is nothing to learn from. Raises: Reject."""


class _Sample(NamedTuple):
    """What goes into a shard."""

    name: str
    extension: str
    image: bytes
    target: bytes | None
    census: Census


class _Task(NamedTuple):
    """What becomes one shard; or several, where it is more than one is to hold."""

    split: str
    """The folder in the sink; empty for the sink itself."""
    shard: str
    """The shard's name without its ending."""
    items: Any
    """What `_Packer.load` takes."""


@dataclass(frozen=True, slots=True)
class _Packer:
    """What all tasks share."""

    sink: str
    format: Literal["tar", "parquet"]
    shard_images: int
    classes: Classes | None
    """None: there are no targets."""
    load: Callable[[Any], Iterator[list[_Loadable]]]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What there is to do."""

    digest: str
    """Of the settings and of all pairs."""
    classes: Classes | None
    """None: there are no targets."""
    shards: list[tuple[str, str, _Rows]]
    """The split, the name and the rows of each task."""
    items: Callable[[_Rows], Any]
    """Gives what `load` takes of the pairs in these rows, on the driver."""
    load: Callable[[Any], Iterator[list[_Loadable]]]
    """Gives the pairs, in a task."""


@dataclass(slots=True)
class _Split:
    """What was packed of a split."""

    shard_bytes: dict[str, int] = field(default_factory=dict)
    index: list[pa.Table] = field(default_factory=list)
    census: Census | None = None
    """None: of nothing."""


@dataclass(slots=True)
class _Packed:
    """What was packed in all."""

    splits: dict[str, _Split] = field(default_factory=lambda: defaultdict(_Split))
    rejects: list[dict[str, str]] = field(default_factory=list)
    """With the schema `REJECTS`."""
    num_blank: int = 0
    """Windows of scenes that were left out, as no pixel of them has both data and a class."""

    def add(self, split: str, receipt: Mapping[str, Any]) -> None:
        """Adds what a task gave."""
        of_split = self.splits[split]
        for shard in receipt["shards"]:
            census = Census.from_dict(shard["census"])
            of_split.census = census if of_split.census is None else of_split.census + census
            of_split.shard_bytes[shard["name"]] = shard["bytes"]
            repeated = {"shard": [shard["name"]], "shard_bytes": [shard["bytes"]]}
            times = len(shard["index"]["name"])
            columns = {name: value * times for name, value in repeated.items()} | shard["index"]
            of_split.index.append(pa.table(columns, INDEX))
        self.rejects += receipt["rejects"]
        self.num_blank += receipt.get("num_blank", 0)  # of which nobody told before there were scenes

    @property
    def num_images(self) -> int:
        """How many there are in shards."""
        return sum(split.census.num_images for split in self.splits.values() if split.census)


def pack(job: Pack) -> None:
    """Packs, and prints what there is.

    Raises:
        SourceError: the source cannot be read, or holds nothing to pack.
        SinkError: the sink cannot be written, or holds other things.
        SettingsError: the settings do not fit the source.
        Locked: another packer is at work there.
        RunError: it broke off, or nothing could be used.
        KeyboardInterrupt: it was stopped; the same command goes on.
    """
    began = time.monotonic()
    plan = {_IMAGES: _plan_images, _LABELS: _plan_labels, _SCENES: _plan_scenes}.get(job.dataset, _plan_dataset)(job)
    try:
        fs, root = filesystem(job.sink)
    except Exception as error:  # an unknown protocol, or its package is not installed
        raise SinkError(f"{job.sink} cannot be used: {root_cause(error)}") from error
    root = root.rstrip("/")
    if _is_packed(job, fs, root, plan.digest):
        print(f"{job.sink} is packed already, from the same pairs with the same settings")
        return
    from segray.sink import put

    lost = threading.Event()
    lock = hold(fs, root, f"packing-{secrets.token_hex(4)}", wait_seconds=0, say=note, lost=lost.set)
    with lock, session() as ray:
        _is_packed(job, fs, root, plan.digest)  # or another has begun there in the meantime
        told = {"command": job.command(), "digest": plan.digest, "segray": segray.__version__}
        try:
            put(fs, f"{root}/pack.json", json.dumps(told, indent=1).encode())
        except Exception as error:  # whatever the store's client raises
            raise SinkError(f"{job.sink} cannot be written: {root_cause(error)}") from error
        packed = _Packed()
        try:
            packer = _Packer(_absolute(job.sink), job.format, job.shard_images, plan.classes, plan.load)
            with contextlib.closing(_receipts(ray, packer, plan)) as receipts:
                for split, receipt in receipts:
                    if lost.is_set():
                        raise RunError("the sink's lock was lost to another packer, or could not be renewed")
                    packed.add(split, receipt)
            if packed.num_images:
                _finish(packed, fs, root, plan.classes, told)
            fs.rm(f"{root}/_receipts", recursive=True)
            if not packed.num_images:  # nothing is there of these settings: others may be tried
                fs.rm_file(f"{root}/pack.json")
        except KeyboardInterrupt:
            note("what is packed stays; run the same command again and it goes on from there")
            raise
        except Exception as error:  # Ray's wrapping of what happened in a worker, or whatever the store's client raises
            raise RunError(f"packing broke off: {root_cause(error)}; the same command goes on from there") from error
    if not packed.num_images and not packed.rejects:
        raise RunError(f"none of {packed.num_blank:,} windows has a pixel with both data and a class")
    if not packed.num_images:
        raise RunError(f"all {len(packed.rejects):,} pairs were rejected; the first: {_described(packed.rejects[0])}")
    _print_summary(job, packed, plan.classes, time.monotonic() - began)


def _is_packed(job: Pack, fs: Any, root: str, digest: str) -> bool:
    """Whether all is there.

    Raises:
        SinkError: it holds other things, or cannot be read.
    """
    try:
        there = {path.rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False)} - {"lock"}
        begun = json.loads(fs.cat_file(f"{root}/pack.json")) if "pack.json" in there else None
    except FileNotFoundError:
        return False
    except Exception as error:  # whatever the store's client raises
        raise SinkError(f"{job.sink} cannot be read: {root_cause(error)}") from error
    if begun is None and there:
        raise SinkError(f"SINK {job.sink} holds {min(there)}, and no shards of this job; give an empty SINK")
    if begun is not None and begun["digest"] != digest:
        raise SinkError(
            f"SINK {job.sink} holds shards of other settings, or of other pairs ({begun['command']}); "
            "give another SINK, or remove this one"
        )
    return "statistics.json" in there


def _receipts(ray: Any, packer: _Packer, plan: _Plan) -> Generator[tuple[str, dict[str, Any]]]:
    """The split and the receipt of each task, in their order; some tasks are at work at a time."""
    remote = ray.remote(num_cpus=1)(_pack_shards)
    shared = ray.put(packer)
    waiting: deque[tuple[str, Any]] = deque()

    def first() -> tuple[str, dict[str, Any]]:
        split, reference = waiting[0]
        receipt = ray.get(reference)
        waiting.popleft()
        return split, receipt

    def all_of_them() -> Iterator[tuple[str, dict[str, Any]]]:
        for split, shard, rows in plan.shards:
            if len(waiting) == _TASKS_IN_FLIGHT:
                yield first()
            waiting.append((split, remote.remote(shared, _Task(split, shard, plan.items(rows)))))
        while waiting:
            yield first()

    how: dict[str, Any] = {"total": len(plan.shards), "console": Console(stderr=True), "transient": True}
    # What is left when this breaks off ends with the session, or writes the same bytes in one that goes on: where a
    # task is cancelled while it ends or is sent to its worker, Ray takes that for its own fault and exits with 1.
    yield from track(all_of_them(), "Packing shards", **how, disable=not sys.stderr.isatty())


def _pack_shards(packer: _Packer, task: _Task) -> dict[str, Any]:
    """Packs the images of a task, as a Ray task.

    Returns:
        The receipt: `shards` with their name, bytes, columns of the index, and census; `rejects` and `num_blank`.
    """
    from segray.sink import put

    fs, root = filesystem(packer.sink)
    root = root.rstrip("/")
    folder = f"{root}/{task.split}".rstrip("/")
    path = f"{root}/_receipts/{task.split}/{task.shard}.json".replace("//", "/")
    if (receipt := _receipt(fs, folder, path)) is not None:
        return receipt
    rejects: list[dict[str, str]] = []
    shards: list[dict[str, Any]] = []
    blanks: list[str] = []
    samples = _samples(packer, task, rejects, blanks)
    write = _tar if packer.format == "tar" else _parquet
    for some in _together(samples, packer.shard_images):
        name = f"{task.shard}{f'-{len(shards)}' if shards else ''}.{packer.format}"
        data, image_offsets, target_offsets = write(some)
        put(fs, f"{folder}/{name}", data)
        index = {
            "name": [sample.name for sample in some],
            "image_offset": image_offsets,
            "image_bytes": [len(sample.image) for sample in some],
            "target_offset": target_offsets,
            "target_bytes": [len(sample.target or b"") for sample in some],
        }
        census = sum((sample.census for sample in some[1:]), some[0].census)
        shards.append({"name": name, "bytes": len(data), "index": index, "census": census.to_dict()})
    receipt = {"shards": shards, "rejects": rejects, "num_blank": len(blanks)}
    put(fs, path, json.dumps(receipt).encode())
    return receipt


def _together(samples: Iterable[_Sample], max_images: int) -> Iterator[list[_Sample]]:
    """Those of each shard."""
    some: list[_Sample] = []
    size_bytes = 0
    for sample in samples:
        some.append(sample)
        size_bytes += len(sample.image) + len(sample.target or b"")
        if len(some) == max_images or size_bytes >= _SHARD_BYTES:
            yield some
            some, size_bytes = [], 0
    if some:
        yield some


def _receipt(fs: Any, folder: str, path: str) -> dict[str, Any] | None:
    """That of an earlier attempt, where it holds and nothing is to be tried again."""
    try:
        receipt: dict[str, Any] = json.loads(fs.cat_file(path))
        whole = all(fs.size(f"{folder}/{shard['name']}") == shard["bytes"] for shard in receipt["shards"])
    except FileNotFoundError:
        return None
    return receipt if whole and not receipt["rejects"] else None


def _samples(packer: _Packer, task: _Task, rejects: list[dict[str, str]], blanks: list[str]) -> Iterator[_Sample]:
    """Loads the images of a task, some at a time; those that cannot be used are added to the rejects, or the blanks."""
    names: set[str] = set()
    prepare = functools.partial(_prepare, classes=packer.classes)
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in packer.load(task.items):
            for loadable, found in zip(batch, pool.map(prepare, batch), strict=True):
                name, uri = loadable.name, loadable.uri
                if isinstance(found, Reject):
                    what = {"split": task.split, "name": name, "uri": uri}
                    rejects.append(what | {"stage": found.stage, "reason": found.reason})
                    continue
                if found is None:
                    blanks.append(name)
                    continue
                if name in names:  # of a shard of SOURCE, which nobody had read before
                    found = found._replace(name=_told_apart(name, uri))
                names.add(found.name)
                yield found


def _prepare(loadable: _Loadable, classes: Classes | None) -> _Sample | Reject | None:
    try:
        loaded = loadable.load()
    except Reject as reject:
        return reject
    if loaded is None:
        return None
    data, image, target = loaded
    extension = _extension(data)
    if extension is None:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        data, extension = buffer.getvalue(), "png"
    if classes is None or target is None:
        void = np.full(image.shape[:2], _UNLABELLED.ignore_index, np.uint8)
        return _Sample(loadable.name, extension, data, None, Census.of(image, void, _UNLABELLED))
    census = Census.of(image, target, classes, bandfile.bands_of(data))
    return _Sample(loadable.name, extension, data, encode_png(target, classes.palette), census)


def _extension(data: bytes) -> str | None:
    """What such a file is called in a shard. None: shards do not hold such files."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if bandfile.is_bandfile(data):
        return bandfile.EXTENSION
    return "webp" if data.startswith(b"RIFF") and data[8:12] == b"WEBP" else None


def _tar(samples: Sequence[_Sample]) -> tuple[bytes, list[int], list[int | None]]:
    """A shard's bytes, and where in it images and targets begin."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:

        def add(name: str, data: bytes) -> int:
            member = tarfile.TarInfo(name)  # without time and owner: the same pairs give the same bytes
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            return buffer.tell() - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

        image_offsets: list[int] = []
        target_offsets: list[int | None] = []
        for name, extension, image, target, _ in samples:
            image_offsets.append(add(f"{name}.{extension}", image))
            target_offsets.append(None if target is None else add(f"{name}.{TARGET_EXTENSION}", target))
    return buffer.getvalue(), image_offsets, target_offsets


def _parquet(samples: Sequence[_Sample]) -> tuple[bytes, list[int], list[int]]:
    """A shard's bytes, and twice the number of each pair's row."""
    columns = {"name": pa.string(), "image": pa.binary()} | ({"target": pa.binary()} if samples[0].target else {})
    schema = pa.schema(columns)
    buffer = io.BytesIO()
    # What is in it is compressed already, and differs from row to row.
    how: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(buffer, schema, **how) as writer:
        for first in range(0, len(samples), _ROWS_PER_GROUP):
            some = [sample._asdict() for sample in samples[first : first + _ROWS_PER_GROUP]]
            writer.write_table(pa.Table.from_pylist(some, schema))
    numbers = list(range(len(samples)))
    return buffer.getvalue(), numbers, numbers


def _finish(packed: _Packed, fs: Any, root: str, classes: Classes | None, told: Mapping[str, Any]) -> None:
    """Writes what describes the shards, and removes what an earlier attempt has left beside them."""
    from segray.sink import put

    def put_json(name: str, fields: Mapping[str, Any]) -> None:
        put(fs, f"{root}/{name}", json.dumps(fields, indent=1).encode())

    statistics = {}
    for name, split in packed.splits.items():
        folder = f"{root}/{name}".rstrip("/")
        with contextlib.suppress(FileNotFoundError):
            for path in fs.ls(folder, detail=False):
                there = path.rpartition("/")[2]
                if there.startswith(("shard-", ".shard-")) and there not in split.shard_bytes:
                    fs.rm_file(path)
        if split.census is None:
            continue
        mean, std = split.census.mean_and_std()
        of_split = {
            "num_images": split.census.num_images,
            "num_shards": len(split.shard_bytes),
            "mean": mean,
            "std": std,
        }
        if split.census.bands is not None:
            of_split["bands"] = split.census.bands
        if classes is not None:
            put(fs, f"{folder}/{INDEX_NAME}", write_index(pa.concat_tables(split.index), split.census))
            num_pixels = dict(zip(classes.names, split.census.num_pixels.tolist(), strict=True))
            of_split |= {"num_pixels": num_pixels, "num_void": split.census.num_void}
        statistics[name or _IMAGES] = of_split
    if classes is not None:
        put_json("classes.json", classes.to_dict() | {"command": told["command"]})
    rejects = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(packed.rejects, REJECTS), rejects, compression="zstd")
    put(fs, f"{root}/_rejects.parquet", rejects.getvalue())
    put_json("statistics.json", {**told, "num_rejects": len(packed.rejects), "splits": statistics})


def _print_summary(job: Pack, packed: _Packed, classes: Classes | None, seconds: float) -> None:
    num_rejects = Counter(reject["split"] for reject in packed.rejects)
    found = {name: split.census for name, split in packed.splits.items() if split.census}
    print_table(
        ["packed", "images", "shards", "rejected"],
        [
            [
                name or _IMAGES,
                f"{found[name].num_images if name in found else 0:,}",
                f"{len(split.shard_bytes):,}",
                f"{num_rejects[name]:,}",
            ]
            for name, split in packed.splits.items()
        ],
    )
    if classes is not None:
        num_pixels = np.stack([[*census.num_pixels, census.num_void] for census in found.values()])
        shares = (num_pixels / num_pixels.sum(1, keepdims=True)).T
        named = zip((*classes.names, "void"), shares, strict=True)
        print_table(["share of pixels", *found], [[name, *(f"{share:.2%}" for share in row)] for name, row in named])
    if classes is not None and "train" in found:
        absent = [classes.names[class_id] for class_id in np.flatnonzero(found["train"].num_pixels == 0)]
        if absent:
            note(f"in train no pixel is of {', '.join(absent)}; a model will not learn to tell that")
    for reject in packed.rejects[:_NUM_SHOWN]:
        print(f"rejected: {_described(reject)}")
    if packed.num_blank:
        print(f"{packed.num_blank:,} windows left out, as no pixel of theirs has both data and a class")
    if packed.rejects:
        print(f"{len(packed.rejects):,} rejected in all; {job.sink.rstrip('/')}/_rejects.parquet has them")
    print(f"{packed.num_images:,} images in {seconds:.1f} s, {packed.num_images / seconds:.1f} images/s")
    print(f"written to {job.sink}")


def _described(reject: Mapping[str, str]) -> str:
    return f"{reject['uri']}: {reject['stage']}: {reject['reason']}"


def _plan_dataset(job: Pack) -> _Plan:
    data = open_dataset(job.dataset, job.source, classes=job.classes)
    pairs = data.pairs
    identities = (f"{pair.image}\0{pair.target}\0{pair.annotations}" for pair in pairs)
    of_pairs = ((pair.split, pair.name, identity) for pair, identity in zip(pairs, identities, strict=True))
    listing = _listed(job, data.classes, of_pairs)
    shards = [shard for split, rows in listing.rows.items() for shard in _cut(job, split, rows)]

    def items(rows: _Rows) -> list[tuple[str, Pair]]:
        return [(listing.name(row, pairs[row].name, pairs[row].image), pairs[row]) for row in rows.tolist()]

    return _Plan(listing.digest, data.classes, shards, items, functools.partial(_load_pairs, to_target=data.to_target))


def _load_pairs(items: Sequence[tuple[str, Pair]], to_target: ToTarget) -> Iterator[list[_Loadable]]:
    yield [_Loadable(name, pair.image, functools.partial(read, pair, to_target)) for name, pair in items]


def _plan_images(job: Pack) -> _Plan:
    source = Source(job.source, job.column)
    entries = pa.concat_tables([ENTRIES.empty_table(), *source.entries()]).combine_chunks()
    uris, versions = (entries[name].to_pylist() for name in ("uri", "version"))
    if not uris:
        raise SourceError(f"{job.source} holds no images and no shards")
    folder = _common_folder(entries["uri"])
    of_images = (
        ("", _image_name(uri, folder), f"{uri}\0{version}") for uri, version in zip(uris, versions, strict=True)
    )
    listing = _listed(job, None, of_images)
    in_shard = np.array([is_shard(uri) for uri in uris], bool)
    shards = _cut(job, "", np.flatnonzero(~in_shard))
    shards += [("", _shard_name(len(shards) + i), row) for i, row in enumerate(np.flatnonzero(in_shard)[:, None])]

    def items(rows: _Rows) -> tuple[pa.Table, dict[str, str]]:
        names = {uris[row]: listing.name(row, _image_name(uris[row], folder), uris[row]) for row in rows.tolist()}
        return entries.take(rows), names

    load = functools.partial(_load_images, column=job.column, folder=folder)
    return _Plan(listing.digest, None, shards, items, load)


def _load_images(
    items: tuple[pa.Table, Mapping[str, str]], column: str | None, folder: str
) -> Iterator[list[_Loadable]]:
    entries, names = items

    def load(data: bytes) -> _Loaded:
        return data, decode(data, MAX_PIXELS), None

    for fetched, _ in fetch(entries, done=_NONE_DONE, column=column):
        loadables: list[_Loadable] = []
        for row in fetched.to_pylist():
            name = names.get(row["uri"]) or _image_name(row["uri"], folder)  # a member of a shard has none yet
            how = functools.partial(load, row["data"]) if row["reason"] is None else _refusing(row)
            loadables.append(_Loadable(name, row["uri"], how))
        yield loadables


def _plan_labels(job: Pack) -> _Plan:
    store = LabelStore.open(job.source)
    recipe_id, run = store.choose(job.recipe)
    recipe = store.recipe(recipe_id)
    if "scenes" in recipe:
        raise SourceError(
            f"{job.source}: recipe {recipe_id} is of scenes; `segray export {job.source} DEST` makes rasters of its "
            "label maps: put them into targets/, beside images/ with the scenes of the same names, and give "
            "--dataset scenes"
        )
    classes = Classes.from_dict(recipe["classes"])
    parts = store.parts("statistics", recipe_id)
    least = _MIN_CONFIDENCE if job.min_confidence is None else job.min_confidence
    with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
        found = list(pool.map(functools.partial(_sure_of, store, recipe_id, least), parts))
    sure = pa.concat_tables([_LABELLED.empty_table(), *(table for table, _ in found)])
    part_of = np.repeat(np.arange(len(parts)), np.array([table.num_rows for table, _ in found], np.int64))
    # While parts are merged their images are there twice.
    rows = np.sort(np.unique(sure["image_id"].to_numpy().astype("S32"), return_index=True)[1])
    sure, part_of = sure.take(rows).combine_chunks(), part_of[rows]
    num_label_maps = sum(number for _, number in found)
    if not sure.num_rows:
        raise SourceError(
            f"{job.source}: none of the {num_label_maps:,} label maps of recipe {recipe_id} has a mean confidence "
            f"of {least} or more; give a lower --min-confidence"
        )
    note(f"{sure.num_rows:,} of {num_label_maps:,} label maps have a mean confidence of {least} or more")
    uris, image_ids = sure["uri"].to_pylist(), sure["image_id"].to_pylist()
    folder = _common_folder(sure["uri"])
    of_images = (
        ("train", _image_name(uri, folder), f"{image_id}\0{parts[part]}")
        for uri, image_id, part in zip(uris, image_ids, part_of.tolist(), strict=True)
    )
    listing = _listed(job, classes, of_images)
    # What was labelled together stays together: parts, and the shards in which images lie, are read as a whole.
    shards = [shard for split, rows in listing.rows.items() for shard in _cut(job, split, rows, part_of)]

    def items(rows: _Rows) -> tuple[pa.Table, list[str]]:
        names = [listing.name(row, _image_name(uris[row], folder), image_ids[row]) for row in rows.tolist()]
        return sure.take(rows).append_column("name", [names]), [parts[part] for part in np.unique(part_of[rows])]

    column = run["job"].get("column") if run else None
    load = functools.partial(_load_labels, store=store, recipe_id=recipe_id, column=column)
    return _Plan(listing.digest, classes, shards, items, load)


def _sure_of(store: LabelStore, recipe_id: str, least: float, part: str) -> tuple[pa.Table, int]:
    """The images of a part whose label maps have this mean confidence or more, and how many there are in all."""
    statistics = store.read("statistics", recipe_id, part, ["image_id", "num_pixels", "mean_confidence"])
    weighted = pc.multiply(pc.fill_null(statistics["mean_confidence"], 0.0), statistics["num_pixels"])
    sums = statistics.append_column("weighted", weighted).group_by("image_id")
    sums = sums.aggregate([("weighted", "sum"), ("num_pixels", "sum")])
    mean = pc.divide(sums["weighted_sum"], sums["num_pixels_sum"])
    image_ids = sums["image_id"].filter(pc.greater_equal(mean, least - _ROUNDING))
    rows = store.read("label_maps", recipe_id, part, _LABELLED.names)
    return rows.filter(pc.is_in(rows["image_id"], image_ids.combine_chunks())), rows.num_rows


def _load_labels(
    items: tuple[pa.Table, Sequence[str]], store: LabelStore, recipe_id: str, column: str | None
) -> Iterator[list[_Loadable]]:
    rows, parts = items
    label_maps: dict[str, bytes] = {}
    for batch in store.batches("label_maps", recipe_id, ["image_id", "label_map"], parts):
        some = batch.filter(pc.is_in(batch["image_id"], rows["image_id"].combine_chunks()))
        label_maps |= zip(some["image_id"].to_pylist(), some["label_map"].to_pylist(), strict=True)
    left = {(row["uri"], row["version"]): row for row in rows.to_pylist()}
    rejects: dict[str, Callable[[], _Loaded]] = {}

    def load(data: bytes, label_map: bytes, uri: str) -> _Loaded:
        with unreadable_is_a_reject(f"the label map of {uri}"):
            target = decode_png(label_map)
        return data, decode(data, MAX_PIXELS), target

    objects = list(dict.fromkeys(_object(uri) for uri, _ in left))
    nulls = [None] * len(objects)
    for fetched, _ in fetch(pa.table([objects, nulls, nulls], schema=ENTRIES), done=_NONE_DONE, column=column):
        loadables: list[_Loadable] = []
        for image in fetched.to_pylist():
            uri = image["uri"]
            if image["reason"] is not None:
                rejects[uri] = _refusing(image)
            elif row := left.pop((uri, image["version"]), None):
                how = functools.partial(load, image["data"], label_maps[row["image_id"]], uri)
                loadables.append(_Loadable(row["name"], uri, how))
            else:
                rejects[uri] = _refusing(_CHANGED)
        yield loadables
    for (uri, _), row in left.items():
        yield [_Loadable(row["name"], uri, rejects.get(uri) or rejects.get(_object(uri)) or _refusing(_MISSING))]


class _Cut(NamedTuple):
    """A window of a scene; or a whole scene that is a reject."""

    split: str
    name: str
    number: int
    """Of the pair that it is cut out of."""
    window: Window | None


def _plan_scenes(job: Pack) -> _Plan:
    with extra("geo", "--dataset scenes"):
        from segray.datasets import scenes

    tree = Tree(job.source)
    classes = read_classes(tree, job.classes)
    pairs, bands = scenes.pairs_of(tree), job.named_bands()
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(functools.partial(_looked_at, bands=bands, classes=classes), pairs))
    usable = [one for one in found if not isinstance(one, Reject)]
    if not usable:
        raise SourceError(f"{job.source}: none of {len(pairs)} scenes can be used; {found[0]}")
    names = tuple(band.name for band in usable[0].scene.bands)
    found = [one if isinstance(one, Reject) else _with_bands(one, names) for one in found]
    note(f"{len(usable):,} scenes with {shown(names)}")
    cuts = _cuts(job, pairs, found)

    def identity(cut: _Cut) -> str:
        pair, one = pairs[cut.number], found[cut.number]
        versions = f"{one}" if isinstance(one, Reject) else f"{one.scene.version}\0{one.target_version}"
        return f"{pair.image}\0{pair.target}\0{versions}\0{cut.window}"

    listing = _listed(job, classes, ((cut.split, cut.name, identity(cut)) for cut in cuts))
    shards = [shard for split, rows in listing.rows.items() for shard in _cut(job, split, rows)]

    def items(rows: _Rows) -> tuple[dict[int, "tuple[str, ScenePair | Reject]"], list[_Cut]]:
        some = [cuts[row] for row in rows.tolist()]
        return {cut.number: (pairs[cut.number].image, found[cut.number]) for cut in some}, some

    return _Plan(listing.digest, classes, shards, items, functools.partial(_load_scenes, classes=classes))


def _looked_at(pair: Pair, bands: Mapping[str, str] | None, classes: Classes) -> "ScenePair | Reject":
    from segray.datasets.scenes import look_at

    try:
        return look_at(pair, bands, classes)
    except Reject as reject:
        return reject


def _with_bands(pair: "ScenePair", names: Sequence[str]) -> "ScenePair | Reject":
    """The scene with the same bands as the first one has."""
    try:
        return dataclasses.replace(pair, scene=pair.scene.select(names))
    except Reject as reject:
        return reject


def _cuts(job: Pack, pairs: Sequence[Pair], found: "Sequence[ScenePair | Reject]") -> list[_Cut]:
    """The windows of all scenes, with their splits.

    Raises:
        SettingsError: nothing is left to train on, or to validate on.
    """
    from segray.datasets.scenes import Blocks, side_metres

    size = job.window or _WINDOW
    blocks = None
    if job.val_fraction is not None:
        side = max(side_metres(one.scene, size) for one in found if not isinstance(one, Reject))
        blocks = Blocks(
            side_metres=_BLOCK_WINDOWS * side if job.block_metres is None else job.block_metres,
            gap_metres=_GAP_WINDOWS * side if job.gap_metres is None else job.gap_metres,
            val_fraction=job.val_fraction,
        )
    cuts: list[_Cut] = []
    splits: Counter[str | None] = Counter()
    for number, (pair, one) in enumerate(zip(pairs, found, strict=True)):
        if isinstance(one, Reject):
            cuts.append(_Cut("train" if blocks else pair.split, pair.name, number, None))
            continue
        for window in cores(one.scene.height, one.scene.width, size):
            split = blocks.split(one.scene.bounds(window)) if blocks else pair.split
            splits[split] += 1
            if split is not None:
                name = f"{pair.name}/{window.row_off:06d}-{window.col_off:06d}"
                cuts.append(_Cut(split, name, number, window))
    if blocks is None:
        if len(splits) == 1:
            note("all of it is one split; --val-fraction 0.2 sets areas aside to validate on")
        return cuts
    told = (
        f"{splits['train']:,} windows to train on, {splits['val']:,} to validate on and {splits[None]:,} between, in "
        f"blocks of {blocks.side_metres:g} m, {blocks.gap_metres:g} m apart"
    )
    if not (splits["train"] and splits["val"]):
        raise SettingsError(f"{told}; give smaller --block-metres or --gap-metres, or another --val-fraction")
    note(told)
    return cuts


def _load_scenes(
    items: "tuple[Mapping[int, tuple[str, ScenePair | Reject]], Sequence[_Cut]]", classes: Classes
) -> Iterator[list[_Loadable]]:
    from segray.datasets.scenes import read_window

    found, cuts = items

    def load(cut: _Cut) -> _Loaded | None:
        _, pair = found[cut.number]
        if isinstance(pair, Reject):
            raise pair
        assert cut.window is not None
        read = read_window(pair, cut.window, classes)
        if read is None:
            return None
        values, target = read
        return bandfile.encode_values(values, [band.name for band in pair.scene.bands]), values, target

    # Not all at once, as a window's values are larger than its file.
    for first in range(0, len(cuts), _THREADS):
        some = cuts[first : first + _THREADS]
        yield [_Loadable(cut.name, found[cut.number][0], functools.partial(load, cut)) for cut in some]


def _refusing(row: Mapping[str, str]) -> Callable[[], _Loaded]:
    """Raises what the stage and the reason of a row say."""
    kind, _, detail = row["reason"].partition(": ")

    def refuse() -> _Loaded:
        raise Reject(row["stage"], kind, detail)

    return refuse


@dataclass(frozen=True, slots=True, eq=False)
class _Listing:
    """The pairs of a source, by their numbers."""

    digest: str
    """Of them all, and of the settings."""
    rows: dict[str, _Rows]
    """Those of each split, in alphabetical order."""
    is_twice: Bool[np.ndarray, " num_pairs"]
    """Whether another of its split has the same name."""

    def name(self, row: int, name: str, uri: str) -> str:
        """What a pair is called in its shard."""
        return _told_apart(name, uri) if self.is_twice[row] else name


def _listed(job: Pack, classes: Classes | None, pairs: Iterable[tuple[str, str, str]]) -> _Listing:
    """Takes the split of each pair, its name, and whatever else it is."""
    settings = {name: value for name, value in dataclasses.asdict(job).items() if name not in _PLACES}
    decisive = settings | {"packing": _PACKING, "classes": classes and classes.to_dict()}
    digest = hashlib.blake2b(json.dumps(decisive).encode(), digest_size=16)
    numbers: dict[str, int] = {}
    split_of, keys = array("i"), array("Q")  # of a million pairs not much is to be held
    for split, name, identity in pairs:
        digest.update(f"{split}\0{name}\0{identity}\0".encode(errors="surrogateescape"))
        if job.val_fraction is not None and job.dataset != _SCENES:
            split = "val" if _hash(name) < job.val_fraction * 2**64 else "train"
        split_of.append(numbers.setdefault(split, len(numbers)))
        keys.append(_hash(f"{split}\0{name}"))
    _, places, counts = np.unique(np.array(keys), return_inverse=True, return_counts=True)
    of = np.array(split_of)
    rows = {split: np.flatnonzero(of == numbers[split]) for split in sorted(numbers)}
    return _Listing(digest.hexdigest(), rows, counts[places] > 1)


def _hash(text: str) -> int:
    """A number below 2⁶⁴."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _cut(job: Pack, split: str, rows: _Rows, group_of: _Rows | None = None) -> list[tuple[str, str, _Rows]]:
    """Shuffles the rows of a split, and cuts them into shards of about the same number.

    Args:
        job: has the seed and how many a shard may hold.
        split: the split.
        rows: its rows.
        group_of: the group of any row. Groups are shuffled, and stay together. None: each row for itself.

    Returns:
        The split, the name and the rows of each shard.
    """
    # The order of one split does not hang on which others there are.
    rng = np.random.default_rng([job.seed, zlib.crc32(split.encode())])
    order = rng.permutation(rows)
    if group_of is not None:
        ranks = rng.permutation(int(group_of.max()) + 1)
        order = order[np.argsort(ranks[group_of[order]], kind="stable")]
    some = np.array_split(order, math.ceil(len(rows) / job.shard_images)) if len(rows) else []
    return [(split, _shard_name(number), rows) for number, rows in enumerate(some)]


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}"


def _told_apart(name: str, uri: str) -> str:
    """The name of a pair with something of its own."""
    return f"{name}-{hashlib.blake2b(uri.encode(errors='surrogateescape'), digest_size=4).hexdigest()}"


def _common_folder(uris: pa.ChunkedArray) -> str:
    """What all begin with, up to a slash."""
    bounds = pc.min_max(uris).as_py()
    same = itertools.takewhile(lambda two: two[0] == two[1], zip(bounds["min"], bounds["max"], strict=False))
    return "".join(character for character, _ in same).rpartition("/")[0] + "/"


def _image_name(uri: str, folder: str) -> str:
    """What an image is called that only has a URI: its path in the folder, a shard being a folder too."""
    path = _IN_SHARD.sub("/", uri.removeprefix(folder), count=1)
    return safe_name(re.sub(r"\.[^./]*$", "", path).strip("/") or "image")


def _object(uri: str) -> str:
    """The object in which an image lies: its shard, or itself."""
    match = _IN_SHARD.search(uri)
    return uri[: match.end() - 1] if match else uri


def _absolute(uri: str) -> str:
    return uri.removeprefix("file://") if "://" in uri else os.path.abspath(uri)
