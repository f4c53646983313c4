"""Scenes → windows, each a task's work: which there are, and their pixels."""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
import shapely.affinity
from affine import Affine
from jaxtyping import Bool, Float64, UInt
from rasterio.features import geometry_mask
from rasterio.warp import transform_geom

from segray.catalog import described
from segray.columns import binary
from segray.errors import Reject, RunError, SettingsError
from segray.preprocessing import Preprocessing, match_bands
from segray.scene import Grid, Scene, Transform, read
from segray.scene.gdal import fetched
from segray.scene.place import pixel_areas
from segray.scene.stac import is_item
from segray.source import image_id
from segray.tile import Scenes, Window, cores, window_uri

__all__ = ["RASTERS", "WINDOWS", "Area", "areas_by_class", "read_windows", "windows_of"]

_IDENTITY = [pa.field(name, pa.string()) for name in ("image_id", "uri", "version")]
_REJECTED = [pa.field(name, pa.string()) for name in ("stage", "reason")]

WINDOWS = pa.schema(
    [
        *_IDENTITY,
        pa.field("pickled", pa.dictionary(pa.int32(), pa.binary())),
        *(pa.field(name, pa.int32()) for name in ("col_off", "row_off", "width", "height")),
        *_REJECTED,
    ]
)
"""A row a window that is to be read, with its scene (pickled, once for all of its windows); or a scene that is a
reject, for `reason`."""

RASTERS = pa.schema(
    [
        *_IDENTITY,
        *(pa.field(name, pa.large_binary()) for name in ("values", "valid", "wanted")),
        *(pa.field(name, pa.int32()) for name in ("height", "width")),
        *(pa.field(f"core_{name}", pa.int32()) for name in ("col_off", "row_off", "width", "height")),
        pa.field("scene", pa.string()),
        *(pa.field(name, pa.int32()) for name in ("col_off", "row_off")),
        pa.field("crs", pa.string()),
        *(pa.field(f"transform_{letter}", pa.float64()) for letter in "abcdef"),
        *(pa.field(side, pa.float64()) for side in ("west", "south", "east", "north")),
        *_REJECTED,
    ]
)
"""A row a window that was read, as `predict.Predictor` takes it, with what `sink.LABEL_MAPS` says of its place; or a
reject."""

_VALUES_BYTES = 64 * 2**20
_EDGE_PARTS = 64  # that a side of a window is worth
_MARGIN = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class Area:
    """What of the Earth is wanted."""

    polygons: shapely.MultiPolygon
    """In longitude and latitude."""

    @classmethod
    def load(cls, uri: str) -> "Area":
        """Reads a GeoJSON file: polygons, or features that are such; of those that cross themselves every loop.

        Raises:
            SettingsError: it cannot be read, holds other things or nothing, or not longitudes and latitudes.
            RunError: the store cannot be reached.
        """
        try:
            found = json.loads(fetched(uri))
            features = found["features"] if found["type"] == "FeatureCollection" else [found]
            geometries = [shapely.geometry.shape(feature.get("geometry", feature)) for feature in features]
            given = shapely.MultiPolygon([part for one in geometries for part in shapely.get_parts(one)])
        except RunError:
            raise
        except Exception as error:  # what is wrong with the file, and whatever shapely makes of what is not GeoJSON
            fault = " ".join(f"{type(error).__name__}: {error}".split())
            raise SettingsError(f"--scenes.area {uri} is no GeoJSON file of polygons: {fault}") from error
        # Of a polygon that crosses itself clipping would lose loops.
        valid = (
            one if one.is_valid else shapely.make_valid(one, method="structure", keep_collapsed=False)
            for one in given.geoms
        )
        polygons = shapely.MultiPolygon([part for one in valid for part in shapely.get_parts(one) if not part.is_empty])
        if polygons.is_empty:
            raise SettingsError(f"--scenes.area {uri} holds no polygon")
        west, south, east, north = polygons.bounds
        if not (-180 <= west <= east <= 180 and -90 <= south <= north <= 90):
            raise SettingsError(
                f"--scenes.area {uri} reaches from {west}, {south} to {east}, {north}, which are no longitudes and "
                "latitudes; warp it to EPSG:4326: ogr2ogr -t_srs EPSG:4326"
            )
        return cls(shapely.force_2d(polygons))

    def to_dict(self) -> dict[str, Any]:
        """It as GeoJSON."""
        geojson: dict[str, Any] = json.loads(shapely.to_geojson(self.polygons))
        return geojson

    def touches(self, scene: Scene, size: int) -> Bool[np.ndarray, "rows cols"]:
        """Which windows of a scene's grid it touches, or misses by less than a pixel.

        Raises:
            Reject: the scene is not on Earth.
        """
        shape = (-(-scene.height // size), -(-scene.width // size))
        # As finely as `covers` does, and a pixel more, so that no window is lost of which it would have a pixel.
        there = self._in_crs(scene, Window(0, 0, scene.width, scene.height), _EDGE_PARTS * max(shape))
        if not there:
            return np.zeros(shape, bool)
        transform = Affine(*scene.transform)
        masks = [
            geometry_mask(
                there, shape, transform @ Affine.translation(*off) @ Affine.scale(size), all_touched=True, invert=True
            )
            for off in ((-1, -1), (-1, 1), (1, -1), (1, 1))
        ]
        touched: np.ndarray = np.any(masks, axis=0)
        return touched

    def covers(self, scene: Scene, window: Window) -> Bool[np.ndarray, "height width"]:
        """Which pixels of a window have their centre in it.

        Raises:
            Reject: the window is not on Earth.
        """
        shape = (window.height, window.width)
        there = self._in_crs(scene, window, _EDGE_PARTS)
        if not there:
            return np.zeros(shape, bool)
        mask: np.ndarray = geometry_mask(there, shape, Affine(*scene.window_transform(window)), invert=True)
        return mask

    def _in_crs(self, scene: Scene, window: Window, num_parts: int) -> list[dict[str, Any]]:
        """What of it is near a window, in the scene's CRS; edges bend after so many parts of a window's side."""
        west, south, east, north = scene.bounds(window)
        # What lies far away may have no place in the scene's CRS.
        boxes = [(west, east)] if west <= east else [(west, 180.0), (-180.0, east)]
        near: list[shapely.Polygon] = []
        for first, last in boxes:
            if first == last:
                continue
            dx, dy = _MARGIN * (last - first), _MARGIN * (north - south)
            clipped = shapely.clip_by_rect(self.polygons, first - dx, south - dy, last + dx, north + dy)
            # Edges are straight in longitude and latitude, which they are not in the scene.
            bending = shapely.segmentize(clipped, max(last - first, north - south) / num_parts)
            near += [part for part in shapely.get_parts(bending) if isinstance(part, shapely.Polygon)]
        if not near:
            return []
        there = transform_geom("EPSG:4326", scene.crs, [shapely.geometry.mapping(polygon) for polygon in near])
        polygons = [shapely.geometry.shape(polygon) for polygon in there]
        return [
            shapely.geometry.mapping(shapely.affinity.translate(polygon, *turn))
            for turn in scene.turns(window)
            for polygon in polygons
        ]


def windows_of(
    uri: str,
    version: str | Reject,
    scenes: Scenes,
    area: Area | None,
    preprocessing: Preprocessing,
    item: str | None = None,
) -> pa.Table:
    """The windows of a scene, row by row, or the scene as a reject.

    Args:
        uri: the scene's.
        version: its version, or what is wrong with it.
        scenes: how it is cut.
        area: what of it is wanted. None: all.
        preprocessing: the model's, which says what bands it sees.
        item: the scene's STAC item (JSON), where that is at hand.

    Returns:
        A table with the schema `WINDOWS`; without rows where nothing of the scene lies in the area.

    Raises:
        RunError: the store cannot be reached.
    """
    assert scenes.size is not None
    try:
        if isinstance(version, Reject):
            raise version
        scene = _described(uri, version, item, scenes, preprocessing)
        if preprocessing.bands is None and scenes.scale is None:
            _check_is_image(scene)
        wanted = cores(scene.height, scene.width, scenes.size)
        if area is not None:
            touched = area.touches(scene, scenes.size)
            wanted = [core for core, is_touched in zip(wanted, touched.ravel(), strict=True) if is_touched]
    except Reject as reject:
        known_version = "" if isinstance(version, Reject) else version
        row = {"image_id": image_id(uri, known_version), "uri": uri, "version": known_version}
        return pa.Table.from_pylist([row | {"stage": reject.stage, "reason": reject.reason}], WINDOWS)
    uris = [window_uri(scene.uri, core) for core in wanted]
    columns = {
        "image_id": [image_id(of_window, scene.version) for of_window in uris],
        "uri": uris,
        "version": [scene.version] * len(wanted),
        "pickled": pa.DictionaryArray.from_arrays(np.zeros(len(wanted), np.int32), [pickle.dumps(scene)]),
        **{name: [getattr(core, name) for core in wanted] for name in ("col_off", "row_off", "width", "height")},
        "stage": [None] * len(wanted),
        "reason": [None] * len(wanted),
    }
    return pa.table(columns, WINDOWS)


def _described(uri: str, version: str, item: str | None, scenes: Scenes, preprocessing: Preprocessing) -> Scene:
    """A scene with the bands that a model sees, in its order.

    Raises:
        Reject: it cannot be opened, or lacks a band.
    """
    match = partial(match_bands, preprocessing)
    if preprocessing.bands is not None and not scenes.bands and item is None and not is_item(uri):
        # By name no other file is looked at, and the last of four bands is found though writers call it alpha.
        by_name = replace(scenes, bands=tuple(f"{name}={name}" for name in preprocessing.bands))
        try:
            return described(uri, version, None, by_name, match)
        except Reject as reject:
            if reject.kind != "bands missing":
                raise
    return described(uri, version, None if item is None else json.loads(item), scenes, match)


def _check_is_image(scene: Scene) -> None:
    """Raises: Reject: nothing says that the scene's values lie in 0–255, as those of images do."""
    for band in scene.bands:
        if (band.dtype, band.scale, band.offset) != ("uint8", 1.0, 0.0):
            raise Reject(
                "decode",
                "no image",
                f"the model sees images, whose values lie in 0–255, and the samples of {band.name} are {band.dtype}, "
                f"of scale {band.scale:g} and offset {band.offset:g}; say what brings them there: --scenes.scale 0.085 "
                "where 3000 is to be white, --scenes.scale 1 where they lie there",
            )


def read_windows(windows: pa.Table, scenes: Scenes, area: Area | None) -> Iterator[pa.Table]:
    """Reads windows with their halos.

    Args:
        windows: rows with the schema `WINDOWS`.
        scenes: how they are cut.
        area: what of them is wanted. None: all.

    Yields:
        Tables of about 64 MiB with the schema `RASTERS`.

    Raises:
        RunError: the store cannot be reached.
    """
    rows: list[dict[str, Any]] = []
    size_bytes = 0
    for window in windows.to_pylist():
        rows.append(_read_row(window, scenes, area))
        size_bytes += rows[-1]["values"].nbytes
        if size_bytes >= _VALUES_BYTES:
            yield _table(rows)
            rows, size_bytes = [], 0
    if rows:
        yield _table(rows)


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    def column(field: pa.Field) -> pa.Array:
        if pa.types.is_large_binary(field.type):
            return binary([row[field.name] for row in rows])
        return pa.array([row.get(field.name) for row in rows], field.type)

    return pa.table([column(field) for field in RASTERS], schema=RASTERS)


def _read_row(row: Mapping[str, Any], scenes: Scenes, area: Area | None) -> dict[str, Any]:
    """A row of `RASTERS`, with arrays in place of their bytes."""
    nothing = np.empty(0, bool)
    told = {name: row[name] for name in ("image_id", "uri", "version", "stage", "reason")}
    rejected = told | {"values": nothing, "valid": nothing, "wanted": nothing}
    if row["reason"] is not None:
        return rejected
    scene: Scene = pickle.loads(row["pickled"])
    core = Window(*(row[name] for name in ("col_off", "row_off", "width", "height")))
    window = scenes.around(core, scene.height, scene.width)
    try:
        values, valid = read(scene, window)
        wanted = np.ones((core.height, core.width), bool) if area is None else area.covers(scene, core)
        west, south, east, north = scene.bounds(core)
    except Reject as reject:
        return rejected | {"stage": reject.stage, "reason": reject.reason}
    return told | {
        "values": values,
        "valid": valid,
        "wanted": wanted,
        "height": window.height,
        "width": window.width,
        "core_col_off": core.col_off - window.col_off,
        "core_row_off": core.row_off - window.row_off,
        "core_width": core.width,
        "core_height": core.height,
        "scene": scene.uri,
        "col_off": core.col_off,
        "row_off": core.row_off,
        "crs": scene.crs,
        **{f"transform_{letter}": c for letter, c in zip("abcdef", scene.window_transform(core), strict=True)},
        **{"west": west, "south": south, "east": east, "north": north},
    }


def areas_by_class(
    label_map: UInt[np.ndarray, "height width"], crs: str, transform: Transform, num_classes: int
) -> Float64[np.ndarray, " num_classes"]:
    """Square metres of each class in a window.

    Args:
        label_map: its class ids; what is beyond the classes counts in none.
        crs: the scene's.
        transform: the window's.
        num_classes: how many there are.
    """
    height, width = label_map.shape
    areas = pixel_areas(crs, Grid(height, width, transform))
    sums: np.ndarray = np.bincount(np.minimum(label_map, num_classes).ravel(), areas.ravel(), num_classes + 1)
    return sums[:num_classes]
