"""A label store, read back: without Ray, a part or a batch at a time."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from segray.errors import SinkError
from segray.source import filesystem
from segray.tile import scene_and_window

__all__ = ["LabelStore", "image_name"]

_ITEM = re.compile(r"(?i:.+\.(?:geo)?json|https?://.+/[^/.#]+)#(?P<id>[^/#]+)", re.DOTALL)
_API_ITEM = re.compile(
    r"https?://.+/items/(?P<id>[^/#?]+)(?<!\.tif|\.vrt|\.jp2)(?<!\.json|\.tiff)(?<!\.geojson)(\?.*)?"
)


def image_name(uri: str) -> str:
    """The name by which an image and its target find each other: the stem of the URI's last component.

    `file:///a/1.jpg`, `s3://b/x.tar#dir/1.jpg` and `s3://b/x.parquet#12/1.jpg` are all called `1`;
    `s3://b/x.parquet#12`, a row without a name, is called `12`. A window is called what its scene is, and an item of a
    collection, such as `file:///a/found.json#S2A_1`, by its id as it stands there, and so
    are those of an API.
    """
    uri, _ = scene_and_window(uri) or (uri, None)
    if item := _ITEM.fullmatch(uri):
        return item["id"]
    if item := _API_ITEM.fullmatch(uri):
        return item["id"]
    member = re.split(r"\.(?:tar|tar\.gz|tgz|parquet)#", uri, maxsplit=1)[-1]
    return PurePosixPath(member).stem


@dataclass(frozen=True, slots=True)
class LabelStore:
    """A label store, to read from."""

    uri: str
    """As the person gave it."""

    filesystem: Any
    """The fsspec file system that holds it."""

    path: str
    """Where it begins there."""

    @classmethod
    def open(cls, uri: str) -> Self:
        """Opens a label store.

        Raises:
            SinkError: it cannot be listed, or there is none.
        """
        try:
            fs, path = filesystem(uri)
            entries = fs.ls(path, detail=False)
        except FileNotFoundError as error:
            raise SinkError(f"{uri}: there is no label store; `segray label SOURCE {uri}` makes one") from error
        except Exception as error:  # each store's client has exceptions of its own
            raise SinkError(f"{uri}: the label store cannot be listed: {error or type(error).__name__}") from error
        names = {PurePosixPath(entry).name for entry in entries}
        if not names & {"label_maps", "rejects", "runs"}:
            raise SinkError(
                f"{uri}: not a label store: neither label_maps/ nor rejects/ nor runs/ is in it; "
                f"`segray label SOURCE {uri}` makes one"
            )
        return cls(uri, fs, path.rstrip("/"))

    def runs(self) -> Iterator[dict[str, Any]]:
        """The records of runs, newest first."""
        for path in reversed(self.files("runs", ".json")):
            yield self.document(path)

    def recipe(self, recipe_id: str) -> dict[str, Any]:
        """The record of a recipe.

        Raises:
            SinkError: there is none.
        """
        path = f"{self.path}/recipes/{recipe_id}.json"
        try:
            return self.document(path)
        except FileNotFoundError as error:
            raise SinkError(f"{self.uri}: there is no recipe {recipe_id}; {self.other_recipes(recipe_id)}") from error

    def choose(self, recipe_id: str | None) -> tuple[str, dict[str, Any] | None]:
        """The recipe that is meant, and its newest run.

        Args:
            recipe_id: None means that of the newest run.

        Raises:
            SinkError: there is nothing to choose from.
        """
        for run in self.runs():
            if recipe_id in (None, run["recipe"]):
                return run["recipe"], run
        if recipe_id is None:
            recipe_ids = self.recipe_ids()
            if not recipe_ids:
                raise SinkError(f"{self.uri}: the label store is empty; `segray label SOURCE {self.uri}` fills it")
            if len(recipe_ids) > 1:
                raise SinkError(f"{self.uri}: no run is recorded; choose with --recipe among {', '.join(recipe_ids)}")
            recipe_id = recipe_ids[0]
        return recipe_id, None

    def recipe_ids(self) -> list[str]:
        """The recipes that are in the store, in alphabetical order."""
        return [PurePosixPath(path).stem for path in self.files("recipes", ".json")]

    def other_recipes(self, recipe_id: str) -> str:
        """What an error says about the way out: the recipes that there are besides this one."""
        others = [other for other in self.recipe_ids() if other != recipe_id]
        return f"--recipe can be {', '.join(others)}" if others else "there is no other recipe either"

    def parts(self, table: str, recipe_id: str, *, orphans: bool = False) -> list[str]:
        """The names of a table's parts; of `statistics` only those whose label maps are committed, or orphans too."""
        paths = self.files(f"{table}/recipe={recipe_id}", ".parquet")
        names = [name for name in (PurePosixPath(path).name for path in paths) if name.startswith("part-")]
        if table == "statistics" and not orphans:
            committed = set(self.parts("label_maps", recipe_id))
            names = [name for name in names if name in committed]
        return names

    def batches(
        self, table: str, recipe_id: str, columns: list[str], parts: Iterable[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows of a table, a small batch at a time.

        Args:
            table: `label_maps`, `statistics` or `rejects`.
            recipe_id: the recipe whose rows are wanted.
            columns: what is read; the batches have them in this order, null where a part has no such column.
            parts: names of parts. Default: all of them.
        """
        size = 64 if "label_map" in columns else 65_536
        for part in self.parts(table, recipe_id) if parts is None else parts:
            path = f"{self.path}/{table}/recipe={recipe_id}/{part}"
            with _reading(path), self.filesystem.open(path, "rb") as file:
                for batch in pq.ParquetFile(file).iter_batches(size, columns=columns):
                    yield pa.RecordBatch.from_arrays(_columns(batch, columns), columns)

    def read(self, table: str, recipe_id: str, part: str, columns: list[str]) -> pa.Table:
        """These columns of a part, whole; null where it has no such column, as an earlier version wrote it."""
        path = f"{self.path}/{table}/recipe={recipe_id}/{part}"
        with _reading(path), self.filesystem.open(path, "rb") as file:
            table = pq.ParquetFile(file).read(columns)
        return pa.table(_columns(table, columns), columns)

    def document(self, path: str) -> dict[str, Any]:
        """What a JSON file holds."""
        with _reading(path):
            fields: dict[str, Any] = json.loads(self.filesystem.cat_file(path))
        return fields

    def files(self, folder: str, suffix: str = "") -> list[str]:
        """The paths of what lies in a folder of the store, in alphabetical order."""
        try:
            entries = self.filesystem.ls(f"{self.path}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry for entry in entries if entry.endswith(suffix))


def _columns(rows: pa.RecordBatch | pa.Table, columns: list[str]) -> list[pa.Array | pa.ChunkedArray]:
    there = rows.schema.names
    return [rows.column(name) if name in there else pa.nulls(rows.num_rows) for name in columns]


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # each store's client has exceptions of its own, and so has a damaged file
        raise SinkError(f"{path}: cannot be read: {error or type(error).__name__}") from error
