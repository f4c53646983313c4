"""Scenes with their targets: rasters of class ids on the scenes' grids, or polygons.

Windows are cut out of them, and go to train or to val by where on Earth they lie.
"""

import functools
import hashlib
import io
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
import shapely
from affine import Affine
from jaxtyping import Float32, Int64, Shaped, UInt
from pyproj import CRS, Transformer
from rasterio.features import rasterize

from segray.classes import Classes
from segray.datasets.dataset import Pair, own_ids, to_class_ids
from segray.datasets.tree import Tree, match
from segray.errors import Reject
from segray.retry import retrying
from segray.scene import Grid, Scene, describe, read, read_ids
from segray.scene.gdal import gdal_path
from segray.scene.place import is_one_crs, is_one_grid
from segray.scene.stac import files_of, is_item, item_at
from segray.source import filesystem, look_up
from segray.tile import Window

__all__ = ["Blocks", "ScenePair", "look_at", "pairs_of", "read_window", "side_metres"]

_LAYOUT = (
    "scenes is images/ with targets/, or {train,val,test}/{images,targets}/, where an image (.tif, .jp2, .vrt, or "
    "a STAC item's .json) and its target (.tif of class ids on the same grid; .geojson or .parquet of polygons) "
    "differ in their endings alone"
)
_SCENES = (".tif", ".tiff", ".jp2", ".vrt", ".json")
_RASTERS = (".tif", ".tiff")
_POLYGONS = (".geojson", ".parquet")
_PROPERTIES = ("class", "class_name", "class_id")
_BACKGROUND = "background"
_LONGITUDE_LATITUDE = "OGC:CRS84"
_OPEN_FILES = 16
_REQUESTS_IN_FLIGHT = 32
# A degree is no shorter than this, along a meridian and along the equator.
_LATITUDE_METRES, _LONGITUDE_METRES = 110_574.0, 111_319.0

_Bounds = tuple[float, float, float, float]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePair:
    """A scene with its target."""

    scene: Scene
    """With the bands that are wanted."""
    target: Scene | str
    """A raster on the same grid, or the URI of polygons."""
    target_version: str
    """Of what is there."""


def pairs_of(tree: Tree) -> list[Pair]:
    """Scenes and targets of the same names: all as the split train, or the splits train, val and test.

    Where there are STAC items, the rasters that belong to them are no scenes of their own.

    Raises:
        SourceError: there is no such layout.
    """
    splits = {split: (f"{split}/images", f"{split}/targets") for split in ("train", "val", "test")}
    folders = {"train": ("images", "targets")} if tree.has("images") else splits
    pairs = match(tree, folders, _LAYOUT, _SCENES, (*_RASTERS, *_POLYGONS), _of_items(tree, folders.values()))
    return sorted(pairs, key=lambda pair: (pair.split, pair.name))


def _of_items(tree: Tree, folders: Iterable[tuple[str, str]]) -> set[str]:
    """The URIs of rasters that belong to a STAC item beside them."""
    uris = [tree.uri(f"{images}/{file}") for images, _ in folders for file in tree.files(images)]
    items = [uri for uri in uris if is_item(uri)]

    def files(uri: str) -> set[str]:
        try:
            return files_of(item_at(uri) or {}, uri)
        except Reject:  # of which `look_at` says more
            return set()

    with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
        taken = set().union(*pool.map(files, items))
    return {uri for uri in uris if gdal_path(uri) in taken} if taken else set()


def look_at(pair: Pair, bands: Mapping[str, str] | None, classes: Classes) -> ScenePair:
    """Describes a scene and its target; polygons are read, to see that they can be.

    Args:
        pair: one of `pairs_of`.
        bands: those that are wanted, as `describe` takes them. None: all.
        classes: of the target.

    Raises:
        Reject: one of the two is missing or damaged, or they do not fit together; it names the file.
    """
    assert pair.target is not None
    scene = _named(pair.image, lambda: describe(pair.image, _version(pair.image), bands=bands))
    version = _named(pair.target, lambda: _version(pair.target or ""))
    if pair.target.lower().endswith(_POLYGONS):
        _polygons(pair.target, version, scene.crs, classes)
        return ScenePair(scene=scene, target=pair.target, target_version=version)
    target = _named(pair.target, lambda: describe(pair.target or "", version))
    if len(target.bands) != 1:
        detail = f"{pair.target}: it has {len(target.bands)} bands, where class ids are one"
        raise Reject("decode", "unreadable target", detail)
    grid = Grid(scene.height, scene.width, scene.transform)
    is_alike = is_one_crs(scene.crs, target.crs) and is_one_grid(target.transform, grid)
    if not is_alike or (scene.height, scene.width) != (target.height, target.width):
        raise Reject(
            "decode",
            "size mismatch",
            f"{pair.target}: its grid ({target.height}×{target.width} pixels, {target.crs}, {target.transform}) is not "
            f"that of {pair.image} ({scene.height}×{scene.width} pixels, {scene.crs}, {scene.transform}); "
            "warp it onto that with gdalwarp -r near",
        )
    return ScenePair(scene=scene, target=target, target_version=version)


def read_window(
    pair: ScenePair, window: Window, classes: Classes
) -> tuple[Float32[np.ndarray, "height width bands"], UInt[np.ndarray, "height width"]] | None:
    """The values of a window and its target.

    Returns:
        Values of the bands after scale and offset, NaN where there are no data; class ids, void there and where the
        target says so. None: no pixel has both data and a class.

    Raises:
        Reject: a file is damaged, or what a pixel of the target holds stands for no class; it names the file.
        RunError: the store cannot be reached.
    """
    if isinstance(pair.target, str):
        target = _drawn(pair, pair.target, window, classes)
    else:
        ids = _named(pair.target.uri, functools.partial(read_ids, pair.target, window, classes.ignore_index))
        target = to_class_ids(ids, own_ids(classes), pair.target.uri)
    if (target == classes.ignore_index).all():
        return None
    values, valid = _named(pair.scene.uri, lambda: read(pair.scene, window))
    target[~valid] = classes.ignore_index
    if (target == classes.ignore_index).all():
        return None
    return np.moveaxis(np.where(valid, values, np.float32(np.nan)), 0, 2), target


def side_metres(scene: Scene, size: int) -> float:
    """How long a window of so many pixels is on the ground, in the middle of a scene."""
    middle = Window(scene.width // 2, scene.height // 2, 1, 1)
    return size * math.sqrt(float(scene.pixel_areas(middle)[0, 0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The Earth in blocks, each of which is to be trained or validated on, whichever scene lies there.

    Blocks are about square: rows along circles of latitude, each cut into equal parts.
    """

    side_metres: float
    """Of a block."""
    gap_metres: float
    """At least so far from each other do pixels lie of which one is trained and one validated on."""
    val_fraction: float
    """Share of blocks that are validated on."""

    def split(self, bounds: _Bounds) -> str | None:
        """`train` or `val`. None: it lies between.

        Args:
            bounds: of a window, as `Scene.bounds` gives them.
        """
        # With half of the gap around it a window lies in blocks of one kind; so two of different kinds have all of it.
        kinds = {self._is_val(row, col) for row, col in self._around(bounds)}
        return None if len(kinds) > 1 else "val" if kinds.pop() else "train"

    def _around(self, bounds: _Bounds) -> Iterator[tuple[int, int]]:
        """The row and column of each block in reach of a window."""
        west, south, east, north = bounds
        east += 360.0 if east < west else 0.0
        beside = self.gap_metres / 2 / _LATITUDE_METRES
        south, north = max(south - beside, -90.0), min(north + beside, 90.0)
        shortest = max(math.cos(math.radians(max(-south, north))), 1e-9)
        beside = self.gap_metres / 2 / (_LONGITUDE_METRES * shortest)
        for row in range(self._row(south), self._row(north) + 1):
            num_cols = self._num_cols(row)
            first, last = (
                math.floor((longitude + 180) / 360 * num_cols) for longitude in (west - beside, east + beside)
            )
            yield from ((row, col % num_cols) for col in range(first, min(last, first + num_cols - 1) + 1))

    def _row(self, latitude: float) -> int:
        return math.floor((latitude + 90) * _LATITUDE_METRES / self.side_metres)

    def _num_cols(self, row: int) -> int:
        latitude = (row + 0.5) * self.side_metres / _LATITUDE_METRES - 90
        around = 360 * _LONGITUDE_METRES * max(math.cos(math.radians(latitude)), 0.0)
        return max(round(around / self.side_metres), 1)

    def _is_val(self, row: int, col: int) -> bool:
        number = int.from_bytes(hashlib.blake2b(f"{row} {col}".encode(), digest_size=8).digest())
        return number < self.val_fraction * 2**64


def _named(uri: str, call: Callable[[], T]) -> T:
    """What a call gives; its reject says of which file it is."""
    try:
        return call()
    except Reject as reject:
        detail = reject.detail if uri in reject.detail else f"{uri}: {reject.detail}"
        raise Reject(reject.stage, reject.kind, detail) from reject


def _version(uri: str) -> str:
    version = look_up({"uri": uri, "version": None})
    if isinstance(version, Reject):
        raise version
    return version


def _drawn(pair: ScenePair, uri: str, window: Window, classes: Classes) -> UInt[np.ndarray, "height width"]:
    """The target that polygons give: a pixel is of that in which its centre lies, the last one where they overlap."""
    transform = Affine(*pair.scene.window_transform(window))
    corners = [transform @ (col, row) for col in (0, window.width) for row in (0, window.height)]
    polygons = _polygons(uri, pair.target_version, pair.scene.crs, classes)
    touching = np.sort(polygons.tree.query(shapely.box(*np.min(corners, axis=0), *np.max(corners, axis=0))))
    # Where everything else has a class of its own, that is what lies outside; else nobody has said what does.
    ground = classes.names.index(_BACKGROUND) if _BACKGROUND in classes.names else classes.ignore_index
    dtype = np.min_scalar_type(max(len(classes) - 1, classes.ignore_index))
    target = np.full((window.height, window.width), ground, dtype)
    if touching.size:
        shapes = zip(polygons.tree.geometries[touching], polygons.class_ids[touching].tolist(), strict=True)
        rasterize(shapes, out=target, transform=transform)
    return target


@dataclass(frozen=True, slots=True, eq=False)
class _Polygons:
    """Polygons in a scene's CRS."""

    tree: shapely.STRtree
    """Holds them, in their file's order."""
    class_ids: Int64[np.ndarray, " n"]
    """The class of each."""


def _polygons(uri: str, version: str, crs: str, classes: Classes) -> _Polygons:
    """The polygons of a file, which is read once, however many threads ask for it.

    Raises:
        Reject: there is something else in the file, or a polygon is of no class.
    """
    with _locks[hash(uri) % len(_locks)]:
        return _read_polygons(uri, version, crs, classes)


_locks = [threading.Lock() for _ in range(_OPEN_FILES)]


@functools.lru_cache(_OPEN_FILES)
def _read_polygons(uri: str, version: str, crs: str, classes: Classes) -> _Polygons:
    try:
        fs, path = filesystem(uri)
        data = bytes(retrying(functools.partial(fs.cat_file, path)))
        from_crs, polygons, values = (_in_parquet if uri.lower().endswith(".parquet") else _in_geojson)(data)
        others = {one.geom_type for one in polygons} - {"Polygon", "MultiPolygon"}
        if others:
            raise ValueError(f"there are {', '.join(sorted(others))} in it; targets are of polygons")
        class_ids = np.array([_class_id(value, classes) for value in values], np.int64)
        there = functools.partial(Transformer.from_crs(from_crs, crs, always_xy=True).transform, errcheck=True)
        return _Polygons(shapely.STRtree(shapely.transform(polygons, there, interleaved=False)), class_ids)
    except Exception as error:  # whatever the store's client raises, and what is neither GeoJSON nor GeoParquet
        detail = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise Reject("decode", "unreadable target", f"{uri}: {detail}") from error


def _in_geojson(data: bytes) -> tuple[CRS, Shaped[np.ndarray, " n"], list[Any]]:
    """The CRS, the geometries and what their classes are called."""
    found = json.loads(data)
    features = [feature for feature in found["features"] if feature["geometry"] is not None]
    # Before RFC 7946 a file said so if it was not in longitude and latitude; GDAL and QGIS still write it.
    named = ((found.get("crs") or {}).get("properties") or {}).get("name")
    geometries = np.array([shapely.geometry.shape(feature["geometry"]) for feature in features], object)
    crs = CRS.from_user_input(named or _LONGITUDE_LATITUDE)
    return crs, geometries, [_value(feature["properties"]) for feature in features]


def _in_parquet(data: bytes) -> tuple[CRS, Shaped[np.ndarray, " n"], list[Any]]:
    """As `_in_geojson`, of GeoParquet."""
    table = pq.read_table(io.BytesIO(data))
    described = json.loads(table.schema.metadata[b"geo"])
    column = described["primary_column"]
    told = described["columns"][column].get("crs", _LONGITUDE_LATITUDE)
    if told is None:
        raise ValueError("it does not say in which CRS its polygons are")
    names = [name for name in _PROPERTIES if name in table.column_names]
    table = table.filter(table[column].is_valid())
    values = [_value(row) for row in table.select(names).to_pylist()]
    return CRS.from_user_input(told), shapely.from_wkb(table[column].to_numpy()), values


def _value(properties: Mapping[str, Any] | None) -> Any:
    there = {name: value for name in _PROPERTIES if (value := (properties or {}).get(name)) is not None}
    if not there:
        raise ValueError(f"a polygon has no property {' or '.join(_PROPERTIES)}")
    return next(iter(there.values()))


def _class_id(value: Any, classes: Classes) -> int:
    if value in classes.names:
        return classes.names.index(value)
    # Some programs write all numbers as floats.
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if is_whole and (0 <= value < len(classes) or value == classes.ignore_index):
        return int(value)
    raise ValueError(f"a polygon is of {value!r}, which is none of the classes {', '.join(classes.names)}, nor an id")
