"""The label store: its Parquet parts, what is in it, and how a part gets there.

    SINK/label_maps/recipe=<id>/part-<digest>.parquet
    SINK/statistics/recipe=<id>/part-<digest>.parquet
    SINK/rejects/recipe=<id>/part-<digest>.parquet
    SINK/recipes/<id>.json
    SINK/runs/<run_id>.json
    SINK/shards/<shard_id>.parquet

A part is named by the digest of the image_ids in it and is written whole or not at all. The
statistics part goes first; the label_maps part of the same name is the commit.

What an interrupted run leaves is put in order by the next one: temporary files and statistics
without label maps are removed, and an image that came twice (a worker died between its commit
and its receipt, or outlived its driver) keeps one row.

What a shard holds cannot be listed, so whoever has read one to its end notes the image_ids in it.
The note says nothing of what is done, only what to look for among it: a shard whose images are
all done need not be opened.
"""

import functools
import hashlib
import io
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Float64, Int64
from ray.data import Datasink
from ray.data.block import Block

from segray import metrics
from segray.classes import Classes
from segray.errors import SinkError
from segray.retry import retrying
from segray.source import filesystem, known
from segray.statistics import Receipt

__all__ = [
    "LABELLED",
    "LABEL_MAPS",
    "OPTIONAL",
    "REJECTS",
    "SHARDS",
    "STATISTICS",
    "PartSink",
    "Sink",
    "part_name",
    "put",
]

LABEL_MAPS = pa.schema(
    {
        "image_id": pa.string(),
        "uri": pa.string(),
        "version": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "label_map": pa.binary(),
        "run_id": pa.string(),
        "scene": pa.string(),
        "col_off": pa.int32(),
        "row_off": pa.int32(),
        "crs": pa.string(),
        **{f"transform_{coefficient}": pa.float64() for coefficient in "abcdef"},
        **{side: pa.float64() for side in ("west", "south", "east", "north")},
        "confidence": pa.binary(),
    }
)
"""One row an image: its label map as a PNG whose pixel values are class ids.

From `scene` on the columns tell of a window of a scene, and are null for other images: where it begins in the scene
(in pixels), the scene's CRS (an authority's code, or WKT), the window's affine transform (pixel (col, row) lies at
x = a·col + b·row + c, y = d·col + e·row + f), its bounds in EPSG:4326, and, where the run keeps it, the confidence of
its pixels as a grey PNG, in 255ths. Pixels without data are `ignore_index`, and 0 in `confidence`.
"""

STATISTICS = pa.schema(
    {
        "image_id": pa.string(),
        "uri": pa.string(),
        "class_id": pa.int32(),
        "class_name": pa.string(),
        "num_pixels": pa.int64(),
        "fraction": pa.float64(),
        "mean_confidence": pa.float64(),
        "run_id": pa.string(),
        "area_m2": pa.float64(),
    }
)
"""One row for each class that occurs in an image; its `num_pixels` add up to height × width, in a window of a scene
without the pixels that hold no data. `area_m2` is null but for those."""

OPTIONAL = frozenset({"area_m2", *LABEL_MAPS.names[LABEL_MAPS.get_field_index("scene") :]})
"""The columns that tell of scenes: null for other images, and not in parts that an earlier version wrote."""

REJECTS = pa.schema(
    {
        "image_id": pa.string(),
        "uri": pa.string(),
        "version": pa.string(),
        "stage": pa.string(),
        "reason": pa.string(),
        "run_id": pa.string(),
    }
)
"""One row for each image that could not be labelled: `reason` is `kind: detail`."""

SHARDS = pa.schema({"image_id": pa.string()})
"""One row for each image of a shard."""

LABELLED = pa.schema(
    {
        "image_id": pa.string(),
        "uri": pa.string(),
        "version": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "label_map": pa.large_binary(),
        "num_pixels": pa.list_(pa.int64()),
        "confidence_sum": pa.list_(pa.float64()),
        "stage": pa.string(),
        "reason": pa.string(),
    }
)
"""What `Sink.write` takes: a row an image, labelled (`reason` is null) or rejected.

Windows of scenes have the columns of `LABEL_MAPS` that tell of them besides, and `area_sum` (lists of float64, the
square metres of each class); `confidence` where it is kept.
"""

_PART_BYTES = 64 * 2**20
_MAX_PUT_BYTES = 5 * 2**30 - 1  # of S3
_REQUESTS_IN_FLIGHT = 32
_READ_BYTES = 2**18
_TEMPORARY = re.compile(r"\.((part-)?[0-9a-f]{32}\.parquet|[\w-]+\.json)\.\w+\.tmp")
_PART_ROWS = 256, 2048  # at least and at most, where their bytes do not decide
_NUM_PARTS = 400
_MERGED_ROWS = 16_384


class Sink:
    """One recipe's share of a sink.

    Attributes:
        filesystem: fsspec's, without a cache of listings.
        root: the sink's path in it.
    """

    def __init__(self, sink: str, recipe: str) -> None:
        """Names the place; nothing is read or written yet.

        Args:
            sink: folder or prefix, for any fsspec protocol.
            recipe: the recipe's id.

        Raises:
            SinkError: there is no such kind of store.
        """
        try:
            self.filesystem, root = filesystem(sink)
        except Exception as error:  # an unknown protocol, or its package is not installed
            raise SinkError(f"{sink} cannot be used: {type(error).__name__}: {error}") from error
        self.root = root.rstrip("/")
        self._recipe = recipe

    def start(self, recipe: dict[str, Any]) -> None:
        """Describes the recipe.

        Raises:
            SinkError: the sink cannot be written.
        """
        try:
            self.write_json(f"recipes/{self._recipe}.json", recipe)
        except Exception as error:  # whatever the store's client raises
            raise SinkError(f"{self.root} cannot be written: {type(error).__name__}: {error}") from error

    def parts(self) -> set[str]:
        """All parts that hold images, as `label_maps/NAME` and `rejects/NAME`."""
        return {f"{kind}/{part}" for kind in ("label_maps", "rejects") for part in self._parts(kind)}

    def done(self, *, with_rejects: bool = True, repair: bool = True) -> np.ndarray:
        """The image_ids that are labelled or rejected, sorted, as numpy's `S32`.

        Args:
            with_rejects: whether rejects count as done.
            repair: whether what earlier runs left is put in order: temporary files and parts without their twin,
                and the second row of an image that came twice.

        Raises:
            SinkError: a part cannot be read, or not be replaced.
        """
        if repair:
            self._tidy()
        parts, ids, positions, first_rows = self._image_ids()
        order = np.argsort(ids, kind="stable")
        ids, positions = ids[order], positions[order]
        is_first = np.ones(len(ids), bool)
        is_first[1:] = ids[1:] != ids[:-1]
        kept: set[tuple[str, str]] = set()
        for position in np.unique(positions[~is_first]) if repair else ():
            # Stable, and the parts are in the order of their worth: the first row is the one to keep.
            kind, part = parts[position]
            if (kind, part) in kept:  # what an earlier part was left with is what this one holds, and so its name
                continue
            rows = np.sort(order[~is_first & (positions == position)]) - first_rows[position]
            kept.add((kind, self._drop(kind, part, rows)))
        if with_rejects:
            return ids[is_first]
        is_labelled = np.array([kind == "label_maps" for kind, _ in parts], bool)
        return ids[is_first & is_labelled[positions]] if parts else ids

    def drop_superseded(self) -> None:
        """Removes rejects that a later run has put right under other image_ids.

        Those of shards and scenes, whose images or windows it labelled, and those without a version, as the object
        could not be looked up.

        Raises:
            SinkError: a part cannot be read, or not be replaced.
        """
        columns = ["uri", "version", "run_id"]
        rejects = {part: self._read("rejects", part, columns).to_pylist() for part in self._parts("rejects")}
        wanted = {row["uri"] for rows in rejects.values() for row in rows}
        if not wanted:
            return

        def among(part: str) -> set[tuple[str, str, str]]:
            rows = self._read("label_maps", part, columns)
            found: set[tuple[str, str, str]] = set()
            for uris in _with_wholes(rows["uri"]):
                some = rows.set_column(0, "uri", uris).filter(pc.is_in(uris, pa.array(wanted)))
                found |= set(zip(*(column.to_pylist() for column in some.columns), strict=True))
            return found

        newest: dict[tuple[str, str], str] = {}
        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            for uri, version, run_id in set[tuple[str, str, str]]().union(*pool.map(among, self._parts("label_maps"))):
                for key in ((uri, version), (uri, "")):
                    newest[key] = max(run_id, newest.get(key, ""))
        for part, rows in rejects.items():
            is_later = [newest.get((row["uri"], row["version"]), "") > row["run_id"] for row in rows]
            if any(is_later):
                self._drop("rejects", part, np.flatnonzero(is_later))

    def num_changed(self, entries: pa.Table) -> int:
        """How many objects of an index were labelled as they are no more: in another version, and not in this one.

        Args:
            entries: rows with the columns `uri` and `version`.
        """
        parts = sorted(self._parts("label_maps")) if entries.num_rows else []
        rows: set[tuple[str, str]] = set()
        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            for first in range(0, len(parts), _REQUESTS_IN_FLIGHT):
                some = parts[first : first + _REQUESTS_IN_FLIGHT]
                read = functools.partial(self._read, "label_maps", columns=["uri", "version"])
                table = pa.concat_tables(pool.map(read, some))
                for uris in _with_wholes(table["uri"]):
                    found = pc.is_in(uris, entries["uri"].combine_chunks())
                    rows |= set(
                        zip(uris.filter(found).to_pylist(), table["version"].filter(found).to_pylist(), strict=True)
                    )
        labelled = {uri for uri, _ in rows}
        now = zip(entries["uri"].to_pylist(), entries["version"].to_pylist(), strict=True)
        return sum(uri in labelled and version is not None and (uri, version) not in rows for uri, version in now)

    def _image_ids(self) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray, np.ndarray]:
        """The parts, label maps before rejects and new rejects before old ones; every image_id; its part; each's first.

        Parts are told by their position in the list, and the first row of each by its position among the ids. Label
        maps without their twin are none of them.
        """
        label_maps = self._parts("label_maps").keys()  # before their twins, which are written first
        parts = [("label_maps", part) for part in sorted(label_maps & self._parts("statistics").keys())]
        rejects = sorted(self._parts("rejects").items(), key=lambda part: (_time(part[1]), part[0]), reverse=True)
        parts += [("rejects", part) for part, _ in rejects]
        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            found = list(pool.map(self._ids_of, parts))
        ids = np.concatenate([np.array([], "S32"), *found])
        lengths = np.array([len(some) for some in found], np.int64)
        return parts, ids, np.repeat(np.arange(len(parts), dtype=np.int32), lengths), np.cumsum(lengths) - lengths

    def _ids_of(self, part: tuple[str, str]) -> np.ndarray:
        return _ids(self._read(*part, ["image_id"]))

    def _read(self, kind: str, part: str, columns: list[str] | None = None) -> pa.Table:
        path = f"{self._folder(kind)}/{part}"

        def read() -> pa.Table:
            # Of one column little is read; s3fs would fetch 50 MiB at a time.
            with self.filesystem.open(path, "rb", block_size=_READ_BYTES if columns else None) as file:
                return pq.read_table(file, columns=columns)

        try:
            return retrying(read)
        except Exception as error:  # whatever the store's client raises, and damaged parts
            raise SinkError(
                f"{path} cannot be read ({type(error).__name__}: {error}); "
                "move it away, and the next run does its images again"
            ) from error

    def _tidy(self) -> None:
        """Removes temporary files and parts without their twin.

        Label maps lose theirs where a worker outlived its run, between its two writes.
        """
        label_maps = self._parts("label_maps").keys()  # before their twins, which are written first
        statistics = self._parts("statistics").keys()
        for kind, orphans in (("statistics", statistics - label_maps), ("label_maps", label_maps - statistics)):
            for orphan in orphans:
                self._remove(kind, orphan)
        if isinstance(self.filesystem, LocalFileSystem):
            folders = [f"{self.root}/{name}" for name in ("lock", "recipes", "runs", "shards")]
            for folder in (*map(self._folder, ("label_maps", "statistics", "rejects")), *folders):
                for path in self._list(folder):
                    if _TEMPORARY.fullmatch(path.rpartition("/")[2]):
                        self._remove_object(path)

    def _drop(self, kind: str, part: str, superfluous: Int64[np.ndarray, " n"]) -> str:
        """Rewrites a part without these rows, what stays before the part goes; the name of the new one.

        Raises:
            SinkError: it cannot be read, or not be written.
        """
        rows = self._read(kind, part)
        is_kept = np.ones(rows.num_rows, bool)
        is_kept[superfluous] = False
        return self._replace(kind, [part], rows.filter(pa.array(is_kept)))

    def mergeable(self, kind: str) -> list[list[str]]:
        """The small parts of `label_maps` or `rejects`, in groups that would make one of a useful size each.

        Raises:
            SinkError: a part cannot be read.
        """
        few = {part: info["size"] for part, info in self._parts(kind).items() if info["size"] < _PART_BYTES // 2}
        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            lengths = pool.map(lambda part: self._read(kind, part, ["image_id"]).num_rows, few)
        groups: list[list[str]] = [[]]
        num_rows = size_bytes = 0
        for (part, size), length in zip(few.items(), lengths, strict=True):
            if length >= _MERGED_ROWS // 2:
                continue
            if num_rows + length > _MERGED_ROWS or size_bytes + size > _PART_BYTES:
                groups.append([])
                num_rows = size_bytes = 0
            groups[-1].append(part)
            num_rows, size_bytes = num_rows + length, size_bytes + size
        return [group for group in groups if len(group) > 1]

    def merge(self, kind: str, parts: Sequence[str]) -> None:
        """Writes the rows of some parts of `label_maps` or `rejects` as one, and then removes those parts.

        From the one to the other whoever reads sees these rows twice. What is cut short in between
        `done` puts in order.

        Raises:
            SinkError: a part cannot be read, or not be replaced.
        """
        rows = (self._read(kind, part) for part in parts)
        # What an earlier version wrote has fewer columns.
        self._replace(kind, parts, pa.concat_tables(rows, promote_options="default"))

    def write(self, rows: pa.Table, classes: Classes, run_id: str) -> Iterator[Receipt]:
        """Commits labelled and rejected images, in parts of at most about 64 MiB.

        Args:
            rows: with the schema `LABELLED`; `label_map` holds the PNG.
            classes: the recipe's.
            run_id: the run that they belong to.
        """
        pngs = [rows[name] for name in ("label_map", "confidence") if name in rows.column_names]
        sizes = sum(pc.fill_null(pc.binary_length(column), 0).to_numpy() for column in pngs)
        first, size_bytes = 0, 0
        for row, size in enumerate(sizes):
            if row > first and size_bytes + size > _PART_BYTES:
                yield self._write_part(rows.slice(first, row - first), classes, run_id)
                first, size_bytes = row, 0
            size_bytes += int(size)
        yield self._write_part(rows.slice(first), classes, run_id)

    def write_shard(self, shard: str, image_ids: list[str]) -> None:
        """Notes which images a shard holds, named by its `source.shard_id`."""
        self._put(f"{self.root}/shards/{shard}.parquet", _parquet(pa.table([image_ids], schema=SHARDS)))

    def shards(self) -> set[str]:
        """The shards of which it is noted what they hold."""
        return {path.rpartition("/")[2].removesuffix(".parquet") for path in self._list(f"{self.root}/shards")}

    def num_done(self, shard: str, done: np.ndarray) -> int | None:
        """How many images a noted shard holds, where all of them are among the sorted `done`; else None."""
        try:
            data = self.filesystem.cat_file(f"{self.root}/shards/{shard}.parquet")
            ids = _ids(pq.ParquetFile(pa.BufferReader(data)).read())
        except Exception:  # of the store, or a damaged note: the shard is read, and noted again
            return None
        return len(ids) if known(ids, done).all() else None

    def write_json(self, path: str, value: dict[str, Any]) -> None:
        """Writes a small document, whole or not at all; `path` is relative to the sink."""
        self._put(f"{self.root}/{path}", json.dumps(value, indent=1).encode())

    def _write_part(self, rows: pa.Table, classes: Classes, run_id: str) -> Receipt:
        is_labelled = pc.is_null(rows["reason"])
        labelled, rejected = rows.filter(is_labelled), rows.filter(pc.invert(is_labelled))

        parts: list[str] = []
        shape = (-1, len(classes))
        num_pixels = _flat(labelled["num_pixels"], np.int64).reshape(shape)
        confidence_sum = _flat(labelled["confidence_sum"], np.float64).reshape(shape)
        area_sum = np.zeros((1, len(classes)))
        if labelled.num_rows:
            statistics = _statistics(labelled, num_pixels, confidence_sum, classes)
            if "area_sum" in labelled.column_names:
                area_sum = _flat(labelled["area_sum"], np.float64).reshape(shape)
                statistics = statistics.append_column("area_m2", pa.array(area_sum[np.nonzero(num_pixels)]))
            part = part_name(labelled)
            self._put_table("statistics", part, _of_run(statistics, run_id), STATISTICS)
            self._put_table("label_maps", part, _of_run(labelled, run_id), LABEL_MAPS)
            parts.append(f"label_maps/{part}")
        if rejected.num_rows:
            part = part_name(rejected)
            self._put_table("rejects", part, _of_run(rejected, run_id), REJECTS)
            parts.append(f"rejects/{part}")
        reasons = zip(rejected["stage"].to_pylist(), rejected["reason"].to_pylist(), strict=True)
        return Receipt(
            key=part_name(rows),
            num_labelled=labelled.num_rows,
            rejects=Counter((stage, reason.partition(":")[0]) for stage, reason in reasons),
            num_images=(num_pixels > 0).sum(0),
            num_pixels=num_pixels.sum(0),
            confidence_sum=confidence_sum.sum(0),
            area_sum=area_sum.sum(0),
            parts=tuple(parts),
        )

    def _replace(self, kind: str, parts: Sequence[str], rows: pa.Table) -> str:
        """Writes rows of these parts as one, before the parts themselves go; the name of the new one."""
        name = part_name(rows)
        statistics = None
        if kind == "label_maps":
            found = (self._read("statistics", part) for part in parts)
            statistics = pa.concat_tables(found, promote_options="default")
            statistics = statistics.filter(pc.is_in(statistics["image_id"], rows["image_id"].combine_chunks()))
        try:
            if rows.num_rows and statistics is not None:
                self._put_table("statistics", name, statistics, STATISTICS)
            if rows.num_rows:
                self._put_table(kind, name, rows, LABEL_MAPS if kind == "label_maps" else REJECTS)
        except Exception as error:  # whatever the store's client raises
            raise SinkError(
                f"{self._folder(kind)}/{name} cannot be written: {type(error).__name__}: {error}"
            ) from error
        for part in parts:
            self._remove(kind, part)
            if statistics is not None:
                self._remove("statistics", part)
        return name

    def _put_table(self, kind: str, part: str, table: pa.Table, schema: pa.Schema) -> None:
        for name in OPTIONAL & (set(schema.names) - set(table.column_names)):
            table = table.append_column(name, pa.nulls(table.num_rows))
        self._put(f"{self._folder(kind)}/{part}", _parquet(table.select(schema.names).cast(schema)))

    def _folder(self, kind: str) -> str:
        return f"{self.root}/{kind}/recipe={self._recipe}"

    def _parts(self, kind: str) -> dict[str, dict[str, Any]]:
        """The names of a table's parts, and what the store says of each."""
        found = {path.rpartition("/")[2]: info for path, info in self._list(self._folder(kind)).items()}
        return {n: info for n, info in found.items() if n.startswith("part-") and n.endswith(".parquet")}

    def _list(self, folder: str) -> dict[str, dict[str, Any]]:
        try:
            return {info["name"]: info for info in retrying(lambda: self.filesystem.ls(folder, detail=True))}
        except FileNotFoundError:
            return {}
        except Exception as error:  # whatever the store's client raises
            raise SinkError(f"{folder} cannot be listed: {type(error).__name__}: {error}") from error

    def _remove(self, kind: str, part: str) -> None:
        self._remove_object(f"{self._folder(kind)}/{part}")

    def _remove_object(self, path: str) -> None:
        try:
            retrying(lambda: self.filesystem.rm_file(path))
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever the store's client raises
            raise SinkError(f"{path} cannot be removed: {type(error).__name__}: {error}") from error

    def _put(self, path: str, data: bytes) -> None:
        put(self.filesystem, path, data)


class PartSink(Datasink[None]):
    """A `Sink` as Ray Data writes to it, a few hundred images a task, and in long runs some thousand.

    Each receipt goes to an actor as soon as its part is committed, so that a run that is cut
    short knows what it has.
    """

    def __init__(self, sink: Sink, classes: Classes, run_id: str, ledger: Any, num_images: int) -> None:
        """Binds the sink to a run.

        Args:
            sink: where the parts go.
            classes: the recipe's.
            run_id: the run.
            ledger: a handle of an actor with a method `commit(receipt)`.
            num_images: about how many there are in the run.
        """
        least, most = _PART_ROWS
        self._num_rows = max(least, min(most, num_images // _NUM_PARTS))
        self._sink = sink
        self._classes = classes
        self._run_id = run_id
        self._ledger = ledger

    @property
    def min_rows_per_write(self) -> int:
        """Rows that Ray Data gathers for a task."""
        return self._num_rows

    def write(self, blocks: Iterable[Block], ctx: object) -> None:
        """Commits the images of one task."""
        tables = [block for block in blocks if block.num_rows]
        if not tables:  # Ray hands on empty blocks, whose columns it does not know
            return
        rows = pa.concat_tables(tables)
        for receipt in metrics.staged("write", self._sink.write(rows, self._classes, self._run_id)):
            ray.get(self._ledger.commit.remote(receipt))


def put(filesystem: Any, path: str, data: bytes) -> None:
    """Writes an object, whole or not at all: in one request, or locally under another name first.

    Args:
        filesystem: fsspec's.
        path: where, in it; folders that are missing are made.
        data: at most 5 GiB on S3.

    Raises:
        Exception: whatever the store's client raises.
    """
    if not isinstance(filesystem, LocalFileSystem):
        # An object appears whole or not at all. In one request: what is cut short leaves nothing behind.
        whole = {"chunksize": _MAX_PUT_BYTES} if "s3" in filesystem.protocol else {}
        retrying(lambda: filesystem.pipe_file(path, data, **whole))
        return
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", suffix=".tmp", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
    os.replace(file.name, path)
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)  # or a power cut might keep the second of two parts and lose the first
    os.close(directory)


def _with_wholes(uris: pa.ChunkedArray) -> tuple[pa.ChunkedArray, ...]:
    """URIs as they are, as those of the scenes whose windows they are, and of the shards whose members."""
    # A scene's own may have a `#` before an item's id, and a member's name one within.
    return uris, *(pc.replace_substring_regex(uris, pattern, "") for pattern in ("#[^#]*$", "#.*"))


def part_name(rows: pa.Table) -> str:
    """The name of the part that holds these rows: the digest of their image_ids, in whatever order."""
    ids = "".join(sorted(rows["image_id"].to_pylist()))
    return f"part-{hashlib.blake2b(ids.encode(), digest_size=16).hexdigest()}.parquet"


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _ids(table: pa.Table) -> np.ndarray:
    chunks = table["image_id"].chunks
    return np.concatenate([np.array([], "S32"), *(chunk.to_numpy(False).astype("S32") for chunk in chunks)])


def _time(info: dict[str, Any]) -> str:
    """When an object was written, in the store's own form, which sorts."""
    return str(info.get("LastModified") or info.get("mtime") or "")


def _of_run(rows: pa.Table, run_id: str) -> pa.Table:
    return rows.append_column("run_id", pa.repeat(run_id, rows.num_rows))


def _flat(lists: pa.ChunkedArray, dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.array([], dtype), *(chunk.flatten().to_numpy() for chunk in lists.chunks)])


def _statistics(
    labelled: pa.Table,
    num_pixels: Int64[np.ndarray, "num_images num_classes"],
    confidence_sum: Float64[np.ndarray, "num_images num_classes"],
    classes: Classes,
) -> pa.Table:
    images, class_ids = np.nonzero(num_pixels)
    counts = num_pixels[images, class_ids]
    uris, ids = labelled["uri"].take(images), labelled["image_id"].take(images)
    return pa.table(
        {
            "image_id": ids,
            "uri": uris,
            "class_id": class_ids,
            "class_name": pa.array(classes.names).take(pa.array(class_ids)),
            "num_pixels": counts,
            "fraction": counts / num_pixels.sum(1)[images],
            "mean_confidence": confidence_sum[images, class_ids] / counts,
        }
    )
