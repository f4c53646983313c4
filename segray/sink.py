"""The label store: its Parquet parts, what is in it, and how a part gets there.

    SINK/label_maps/recipe=<id>/part-<digest>.parquet
    SINK/statistics/recipe=<id>/part-<digest>.parquet
    SINK/rejects/recipe=<id>/part-<digest>.parquet
    SINK/recipes/<id>.json
    SINK/runs/<run_id>.json

A part is named by the digest of the image_ids in it and is written whole or not at all. The
statistics part goes first; the label_maps part of the same name is the commit.
"""

import hashlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Float64, Int64
from ray.data import Datasink
from ray.data.block import Block

from segray.classes import Classes
from segray.errors import SinkError

__all__ = ["LABELLED", "LABEL_MAPS", "REJECTS", "STATISTICS", "PartSink", "Receipt", "Sink", "part_name"]

LABEL_MAPS = pa.schema(
    {
        "image_id": pa.string(),
        "uri": pa.string(),
        "version": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "label_map": pa.binary(),
        "run_id": pa.string(),
    }
)
"""One row an image: its label map as a PNG whose pixel values are class ids."""

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
    }
)
"""One row for each class that occurs in an image; its `num_pixels` add up to height × width."""

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
"""What `Sink.write` takes: a row an image, labelled (`reason` is null) or rejected."""

_PART_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Receipt:
    """What was committed in one go."""

    key: str
    """What it is of; the same for the same images, however often they are written."""
    num_labelled: int
    """Images labelled."""
    rejects: Counter[tuple[str, str]]
    """Images rejected, by stage and kind."""
    num_images: Int64[np.ndarray, " num_classes"]
    """Images in which each class occurs."""
    num_pixels: Int64[np.ndarray, " num_classes"]
    """Pixels of each class."""
    confidence_sum: Float64[np.ndarray, " num_classes"]
    """Sum of the confidence over the pixels of each class."""


class Sink:
    """One recipe's share of a sink."""

    def __init__(self, sink: str, recipe: str) -> None:
        """Names the place; nothing is read or written yet.

        Args:
            sink: folder or prefix, for any fsspec protocol.
            recipe: the recipe's id.

        Raises:
            SinkError: there is no such kind of store.
        """
        if "://" not in sink:
            sink = os.path.abspath(sink)
        try:
            self._fs, root = url_to_fs(sink, use_listings_cache=False)
        except Exception as error:  # an unknown protocol, or its package is not installed
            raise SinkError(f"{sink} cannot be used: {type(error).__name__}: {error}") from error
        self._root = root.rstrip("/")
        self._recipe = recipe

    def start(self, recipe: dict[str, Any]) -> None:
        """Describes the recipe, and removes statistics whose label maps were never committed.

        Raises:
            SinkError: the sink cannot be written.
        """
        try:
            self.write_json(f"recipes/{self._recipe}.json", recipe)
            for orphan in self._parts("statistics") - self._parts("label_maps"):
                self._fs.rm_file(f"{self._folder('statistics')}/{orphan}")
        except Exception as error:  # whatever the store's client raises
            raise SinkError(f"{self._root} cannot be written: {type(error).__name__}: {error}") from error

    def done(self) -> np.ndarray:
        """The image_ids that are labelled or rejected, sorted, as numpy's `S32`.

        Raises:
            SinkError: a part cannot be read.
        """
        found = [np.array([], "S32")]
        for kind in ("label_maps", "rejects"):
            for part in sorted(self._parts(kind)):
                path = f"{self._folder(kind)}/{part}"
                try:
                    with self._fs.open(path, "rb") as file:
                        ids = pq.read_table(file, columns=["image_id"]).column(0)
                except Exception as error:  # as above, and damaged parts
                    raise SinkError(
                        f"{path} cannot be read ({type(error).__name__}: {error}); "
                        "move it away and its images are done again"
                    ) from error
                for piece in pc.cast(pc.cast(ids, pa.binary()), pa.binary(32)).chunks:
                    found.append(np.frombuffer(piece.buffers()[1], "S32", len(piece), piece.offset * 32))
        return np.sort(np.concatenate(found))

    def write(self, rows: pa.Table, classes: Classes, run_id: str) -> Iterator[Receipt]:
        """Commits labelled and rejected images, in parts of at most about 64 MiB.

        Args:
            rows: with the schema `LABELLED`; `label_map` holds the PNG.
            classes: the recipe's.
            run_id: the run that they belong to.
        """
        sizes = pc.fill_null(pc.binary_length(rows["label_map"]), 0).to_numpy()
        first, size_bytes = 0, 0
        for row, size in enumerate(sizes):
            if row > first and size_bytes + size > _PART_BYTES:
                yield self._write_part(rows.slice(first, row - first), classes, run_id)
                first, size_bytes = row, 0
            size_bytes += int(size)
        yield self._write_part(rows.slice(first), classes, run_id)

    def write_json(self, path: str, value: dict[str, Any]) -> None:
        """Writes a small document, whole or not at all; `path` is relative to the sink."""
        self._put(f"{self._root}/{path}", json.dumps(value, indent=1).encode())

    def _write_part(self, rows: pa.Table, classes: Classes, run_id: str) -> Receipt:
        is_labelled = pc.is_null(rows["reason"])
        labelled, rejected = rows.filter(is_labelled), rows.filter(pc.invert(is_labelled))

        shape = (-1, len(classes))
        num_pixels = _flat(labelled["num_pixels"], np.int64).reshape(shape)
        confidence_sum = _flat(labelled["confidence_sum"], np.float64).reshape(shape)
        if labelled.num_rows:
            statistics = _statistics(labelled, num_pixels, confidence_sum, classes)
            part = part_name(labelled)
            self._put_table("statistics", part, statistics, STATISTICS, run_id)
            self._put_table("label_maps", part, labelled, LABEL_MAPS, run_id)
        if rejected.num_rows:
            self._put_table("rejects", part_name(rejected), rejected, REJECTS, run_id)
        reasons = zip(rejected["stage"].to_pylist(), rejected["reason"].to_pylist(), strict=True)
        return Receipt(
            key=part_name(rows),
            num_labelled=labelled.num_rows,
            rejects=Counter((stage, reason.partition(":")[0]) for stage, reason in reasons),
            num_images=(num_pixels > 0).sum(0),
            num_pixels=num_pixels.sum(0),
            confidence_sum=confidence_sum.sum(0),
        )

    def _put_table(self, kind: str, part: str, table: pa.Table, schema: pa.Schema, run_id: str) -> None:
        table = table.append_column("run_id", pa.repeat(run_id, table.num_rows))
        buffer = io.BytesIO()
        pq.write_table(table.select(schema.names).cast(schema), buffer, compression="zstd")
        self._put(f"{self._folder(kind)}/{part}", buffer.getvalue())

    def _folder(self, kind: str) -> str:
        return f"{self._root}/{kind}/recipe={self._recipe}"

    def _parts(self, kind: str) -> set[str]:
        try:
            paths = self._fs.ls(self._folder(kind), detail=False)
        except FileNotFoundError:
            return set()
        names = {path.rpartition("/")[2] for path in paths}
        return {name for name in names if name.startswith("part-") and name.endswith(".parquet")}

    def _put(self, path: str, data: bytes) -> None:
        if not isinstance(self._fs, LocalFileSystem):
            self._fs.pipe_file(path, data)  # an object appears whole or not at all
            return
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.unlink(file.name)
                raise
        os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
        os.replace(file.name, path)


class PartSink(Datasink[None]):
    """A `Sink` as Ray Data writes to it, a few hundred images a task.

    Each receipt goes to an actor as soon as its part is committed, so that a run that is cut
    short knows what it has.
    """

    min_rows_per_write = 256

    def __init__(self, sink: Sink, classes: Classes, run_id: str, ledger: Any) -> None:
        """Binds the sink to a run; `ledger` is a handle of an actor with a method `commit(receipt)`."""
        self._sink = sink
        self._classes = classes
        self._run_id = run_id
        self._ledger = ledger

    def write(self, blocks: Iterable[Block], ctx: object) -> None:
        """Commits the images of one task."""
        tables = [block for block in blocks if block.num_rows]
        if not tables:  # Ray hands on empty blocks, whose columns it does not know
            return
        rows = pa.concat_tables(tables)
        for receipt in self._sink.write(rows, self._classes, self._run_id):
            ray.get(self._ledger.commit.remote(receipt))


def part_name(rows: pa.Table) -> str:
    """The name of the part that holds these rows: the digest of their image_ids, in whatever order."""
    ids = "".join(sorted(rows["image_id"].to_pylist()))
    return f"part-{hashlib.blake2b(ids.encode(), digest_size=16).hexdigest()}.parquet"


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
