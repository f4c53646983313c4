"""Scenes → windows, each a task's work: which there are, and their pixels."""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import fsspec
import numpy as np
import pyarrow as pa
from affine import Affine
from jaxtyping import Bool, Float64, UInt
from rasterio.features import geometry_mask
from rasterio.warp import transform_geom

from segray.catalog import described, scene_version
from segray.errors import Reject, SettingsError
from segray.scene import Scene, read
from segray.source import ENTRIES, image_id
from segray.tile import Scenes, Window, cores

__all__ = ["WINDOWS", "Area", "areas_by_class", "read_windows", "windows_of"]

WINDOWS = pa.schema(
    [
        *ENTRIES,
        pa.field("pickled", pa.binary()),
        *(pa.field(name, pa.int32()) for name in ("col_off", "row_off", "width", "height")),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
    ]
)
"""A row a window that is to be read, with its scene (pickled); or a scene that is a reject, for `reason`."""

_VALUES_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Area:
    """What of the Earth is wanted."""

    geometries: tuple[dict[str, Any], ...]
    """Polygons, as GeoJSON in longitude and latitude."""

    @classmethod
    def load(cls, uri: str) -> Self:
        """Reads a GeoJSON file.

        Raises:
            SettingsError: it cannot be read, or holds no polygon.
        """
        try:
            with fsspec.open(uri, "rb") as file:
                found = json.load(file)
            features = found["features"] if found["type"] == "FeatureCollection" else [found]
            geometries = [feature.get("geometry", feature) for feature in features]
            if {geometry["type"] for geometry in geometries} - {"Polygon", "MultiPolygon"} or not geometries:
                raise ValueError("it holds other things than polygons, or nothing")
        except Exception as error:  # whatever the store's client raises, and what is not GeoJSON
            raise SettingsError(f"--scenes.area {uri} is no GeoJSON file of polygons: {error!r}") from error
        return cls(tuple(geometries))

    def to_dict(self) -> dict[str, Any]:
        """It as one geometry of GeoJSON."""
        parts = [[one["coordinates"]] if one["type"] == "Polygon" else one["coordinates"] for one in self.geometries]
        return {"type": "MultiPolygon", "coordinates": [polygon for part in parts for polygon in part]}

    def touches(self, scene: Scene, size: int) -> Bool[np.ndarray, "rows cols"]:
        """Which windows of a scene's grid it touches."""
        shape = -(-scene.height // size), -(-scene.width // size)
        return self._mask(scene, shape, Affine(*scene.transform) @ Affine.scale(size), all_touched=True)

    def covers(self, scene: Scene, window: Window) -> Bool[np.ndarray, "height width"]:
        """Which pixels of a window have their centre in it."""
        return self._mask(scene, (window.height, window.width), Affine(*scene.window_transform(window)))

    def _mask(
        self, scene: Scene, shape: tuple[int, int], transform: Affine, *, all_touched: bool = False
    ) -> Bool[np.ndarray, "height width"]:
        there = transform_geom("EPSG:4326", scene.crs, self.geometries)
        mask: np.ndarray = geometry_mask(there, shape, transform, all_touched=all_touched, invert=True)
        return mask


def windows_of(
    entry: Mapping[str, Any], scenes: Scenes, area: Area | None, match: Callable[[Sequence[str]], Sequence[str]]
) -> pa.Table:
    """The windows of a scene, row by row, or the scene as a reject.

    Args:
        entry: a row with the schema `catalog.SCENES`.
        scenes: how it is cut.
        area: what of it is wanted. None: all.
        match: the bands that a model is fed, of those that are there.

    Returns:
        A table with the schema `WINDOWS`.
    """
    uri, version = entry["uri"], entry["version"] or scene_version(entry["uri"], scenes.calls)
    assert scenes.size is not None
    try:
        if isinstance(version, Reject):
            raise version
        item = None if entry["item"] is None else json.loads(entry["item"])
        scene = described(uri, version, item, scenes, match)
    except Reject as reject:
        row = {"uri": uri, "version": entry["version"], "stage": reject.stage, "reason": reject.reason}
        return pa.Table.from_pylist([row], WINDOWS)
    wanted = cores(scene.height, scene.width, scenes.size)
    if area is not None:
        touched = area.touches(scene, scenes.size)
        wanted = [core for core in wanted if touched[core.row_off // scenes.size, core.col_off // scenes.size]]
    pickled = pickle.dumps(scene)
    rows = [
        {
            "uri": f"{scene.uri}#{core.col_off},{core.row_off},{core.width},{core.height}",
            "version": scene.version,
            "pickled": pickled,
            "col_off": core.col_off,
            "row_off": core.row_off,
            "width": core.width,
            "height": core.height,
        }
        for core in wanted
    ]
    return pa.Table.from_pylist(rows, WINDOWS)


def read_windows(windows: pa.Table, scenes: Scenes, area: Area | None) -> Iterator[pa.Table]:
    """Reads windows with their halos.

    Args:
        windows: rows with the schema `WINDOWS`.
        scenes: how they are cut.
        area: what of them is wanted. None: all.

    Yields:
        Tables of about 64 MiB, as `Predictor` takes rasters, with what `sink.LABEL_MAPS` says of a window's place.
    """
    rows: list[dict[str, Any]] = []
    size_bytes = 0
    for row in windows.to_pylist():
        rows.append(_read_row(row, scenes, area))
        size_bytes += len(rows[-1]["values"] or b"")
        if size_bytes >= _VALUES_BYTES:
            yield pa.Table.from_pylist(rows, _RASTERS)
            rows, size_bytes = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, _RASTERS)


_RASTERS = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("version", pa.string()),
        *(pa.field(name, pa.int32()) for name in ("height", "width", "core_col_off", "core_row_off")),
        *(pa.field(name, pa.int32()) for name in ("core_width", "core_height")),
        pa.field("values", pa.large_binary()),
        pa.field("valid", pa.large_binary()),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("pickled", pa.binary()),
        pa.field("scene", pa.string()),
        *(pa.field(name, pa.int32()) for name in ("col_off", "row_off")),
        pa.field("crs", pa.string()),
        *(pa.field(f"transform_{letter}", pa.float64()) for letter in "abcdef"),
        *(pa.field(side, pa.float64()) for side in ("west", "south", "east", "north")),
    ]
)


def _read_row(row: Mapping[str, Any], scenes: Scenes, area: Area | None) -> dict[str, Any]:
    """A row of `_RASTERS`."""
    told = {
        "image_id": image_id(row["uri"], row["version"] or ""),
        **{name: row[name] for name in ("uri", "version", "stage", "reason")},
    }
    if row["reason"] is not None:
        return told
    scene: Scene = pickle.loads(row["pickled"])
    core = Window(*(row[name] for name in ("col_off", "row_off", "width", "height")))
    window = scenes.around(core, scene.height, scene.width)
    try:
        values, valid = read(scene, window)
    except Reject as reject:
        return told | {"stage": reject.stage, "reason": reject.reason}
    if area is not None:
        valid &= area.covers(scene, window)
    transform, bounds = scene.window_transform(core), scene.bounds(core)
    return told | {
        "height": window.height,
        "width": window.width,
        "core_col_off": core.col_off - window.col_off,
        "core_row_off": core.row_off - window.row_off,
        "core_width": core.width,
        "core_height": core.height,
        "values": values.tobytes(),
        "valid": valid.tobytes(),
        "pickled": row["pickled"],
        "scene": scene.uri,
        "col_off": core.col_off,
        "row_off": core.row_off,
        "crs": scene.crs,
        **{f"transform_{letter}": value for letter, value in zip("abcdef", transform, strict=True)},
        **dict(zip(("west", "south", "east", "north"), bounds, strict=True)),
    }


def areas_by_class(
    label_map: UInt[np.ndarray, "height width"], row: Mapping[str, Any], num_classes: int
) -> Float64[np.ndarray, " num_classes"]:
    """Square metres of each class in a window, of which `row` holds the scene (pickled) and the offsets."""
    height, width = label_map.shape
    scene: Scene = pickle.loads(row["pickled"])
    areas = scene.pixel_areas(Window(row["col_off"], row["row_off"], width, height))
    # Whoever holds no data has the id of void, which lies beyond the classes.
    sums: np.ndarray = np.bincount(np.minimum(label_map, num_classes).ravel(), areas.ravel(), num_classes + 1)
    return sums[:num_classes]
