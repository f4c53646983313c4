"""Scenes with their targets: what windows hold, what is refused, and which ground is validated on."""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from pyproj import CRS, Geod, Transformer
from rasterio import Affine

from segray.classes import Classes
from segray.datasets import Pair
from segray.datasets.scenes import (
    Blocks,
    ScenePair,
    _polygons,
    _read_polygons,
    look_at,
    pairs_of,
    read_window,
    side_metres,
)
from segray.datasets.tree import Tree
from segray.errors import Reject, SourceError
from segray.scene import describe
from segray.tile import Window, cores

CLASSES = Classes(("soil", "crop", "water"))
VOID = CLASSES.ignore_index
BANDS = ("red", "nir")
SIZE = 40, 60
TRANSFORM = Affine(10, 0, 500_000, 0, -10, 5_400_000)
UTM = "EPSG:32633"
WHOLE = Window(0, 0, SIZE[1], SIZE[0])


def write_raster(path: Path, samples: np.ndarray, **profile: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = samples.shape
    descriptions, scales = profile.pop("descriptions", None), profile.pop("scales", None)
    told = {"crs": UTM, "transform": TRANSFORM, "dtype": samples.dtype, **profile}
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, **told) as file:
        file.write(samples)
        file.descriptions = descriptions or file.descriptions
        file.scales = scales or file.scales
    return path


def write_scene(path: Path) -> np.ndarray:
    """A scene whose first rows hold no data; its values, NaN there."""
    samples = np.random.default_rng(0).integers(1, 10_000, (2, *SIZE), np.uint16)
    samples[:, :5] = 0
    write_raster(path, samples, nodata=0, descriptions=BANDS, scales=(1e-4,) * 2)
    return np.where(samples > 0, samples.astype(np.float32) * np.float32(1e-4), np.nan).transpose(1, 2, 0)


def ids() -> np.ndarray:
    target = np.random.default_rng(1).integers(0, 3, SIZE, np.uint8)
    target[:, -7:] = VOID
    return target


def write_pair(folder: Path, target: np.ndarray, **profile: Any) -> Pair:
    write_scene(folder / "images/a.tif")
    write_raster(folder / "targets/a.tif", target[None], **profile)
    [pair] = pairs_of(Tree(str(folder)))
    return pair


def test_rasters_of_an_item_beside_them_are_no_scenes_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "a_B08", "b"):
        write_scene(tmp_path / f"images/{name}.tif")
    assets = {name: {"href": f"./{name}.tif"} for name in ("a", "a_B08")}
    (tmp_path / "images/a.json").write_text(json.dumps({"type": "Feature", "assets": assets}))
    (tmp_path / "images/c.json").write_text("{")
    for name in ("a", "b", "c"):
        write_raster(tmp_path / f"targets/{name}.tif", ids()[None])
    names = [pair.image.rpartition("/")[2] for pair in pairs_of(Tree(str(tmp_path)))]
    assert names == ["a.json", "b.tif", "c.json"]


def rectangle(west: float, north: float, width: float, height: float) -> shapely.Polygon:
    """In pixels of the scene, to coordinates of its CRS."""
    (left, top), (right, bottom) = TRANSFORM @ (west, north), TRANSFORM @ (west + width, north + height)
    return shapely.box(left, bottom, right, top)


def test_a_window_is_its_values_after_scale_and_its_target_void_where_there_are_no_data(tmp_path: Path) -> None:
    pair = look_at(write_pair(tmp_path, ids()), None, CLASSES)
    values = write_scene(tmp_path / "images/a.tif")
    assert [band.name for band in pair.scene.bands] == list(BANDS)
    for window in (WHOLE, Window(16, 0, 16, 16)):
        found = read_window(pair, window, CLASSES)
        assert found is not None
        np.testing.assert_allclose(found[0], values[window.rows, window.cols], rtol=1e-6)
        expected = np.where(np.isnan(values[:, :, 0]), VOID, ids())
        np.testing.assert_array_equal(found[1], expected[window.rows, window.cols])
    assert read_window(pair, Window(0, 0, 20, 5), CLASSES) is None, "there are no data"
    assert read_window(pair, Window(53, 0, 7, 40), CLASSES) is None, "it is void"


def test_bands_are_those_that_are_named_in_that_order(tmp_path: Path) -> None:
    pair = look_at(write_pair(tmp_path, ids()), {"infrared": "nir", "red": "red"}, CLASSES)
    values = write_scene(tmp_path / "images/a.tif")
    found = read_window(pair, WHOLE, CLASSES)
    assert found is not None
    np.testing.assert_allclose(found[0], values[:, :, ::-1], rtol=1e-6)
    with pytest.raises(Reject, match=r"a\.tif.*swir of swir not among red, nir"):
        look_at(write_pair(tmp_path, ids()), {"swir": "swir"}, CLASSES)


def test_nodata_of_a_target_is_void(tmp_path: Path) -> None:
    stored = ids().astype(np.int16)
    stored[stored == VOID] = -1
    found = read_window(look_at(write_pair(tmp_path, stored, nodata=-1), None, CLASSES), WHOLE, CLASSES)
    assert found is not None
    np.testing.assert_array_equal(found[1][5:], ids()[5:])
    undeclared = look_at(write_pair(tmp_path / "other", stored), None, CLASSES)
    with pytest.raises(Reject, match="it holds -1, which is no class id; declare it as nodata"):
        read_window(undeclared, WHOLE, CLASSES)


@pytest.mark.parametrize(
    "changed",
    [
        {"transform": TRANSFORM @ Affine.translation(0.5, 0)},
        {"transform": TRANSFORM @ Affine.scale(2)},
        {"crs": "EPSG:32634"},
    ],
)
def test_a_target_on_another_grid_is_a_reject_that_names_both(changed: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Reject, match=r"size mismatch: .*targets/a\.tif.*images/a\.tif.*gdalwarp"):
        look_at(write_pair(tmp_path, ids(), **changed), None, CLASSES)


def test_a_scene_without_a_target_is_a_reject_and_a_folder_without_scenes_an_error(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, ids())
    (tmp_path / "targets/a.tif").unlink()
    with pytest.raises(Reject, match=r"fetch: .*targets/a\.tif"):
        look_at(pair, None, CLASSES)
    with pytest.raises(SourceError, match="scenes is images/ with targets/"):
        pairs_of(Tree(str(tmp_path / "targets")))


def geojson(polygons: Sequence[tuple[shapely.Polygon, Any]]) -> bytes:
    """In longitude and latitude."""
    there = Transformer.from_crs(UTM, "OGC:CRS84", always_xy=True)
    features = [
        {
            "type": "Feature",
            "properties": {"class": value},
            "geometry": json.loads(shapely.to_geojson(shapely.transform(polygon, there.transform, interleaved=False))),
        }
        for polygon, value in polygons
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()


def geoparquet(polygons: Sequence[tuple[shapely.Polygon, Any]]) -> bytes:
    """In the CRS of the scene."""
    described = {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {"geometry": {"encoding": "WKB", "geometry_types": [], "crs": CRS(UTM).to_json_dict()}},
    }
    columns = {
        "geometry": [shapely.to_wkb(polygon) for polygon, _ in polygons],
        "class_name": [value for _, value in polygons],
    }
    table = pa.table(columns).replace_schema_metadata({"geo": json.dumps(described)})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    return bytes(buffer.getvalue())


def with_polygons(folder: Path, name: str, data: bytes, classes: Classes = CLASSES) -> ScenePair:
    write_scene(folder / "images/a.tif")
    (folder / "targets").mkdir(exist_ok=True)
    (folder / "targets" / name).write_bytes(data)
    [pair] = pairs_of(Tree(str(folder)))
    return look_at(pair, None, classes)


POLYGONS = [(rectangle(8, 10, 30, 20), "crop"), (rectangle(20, 12, 9, 5), "water")]


def polygons_drawn(outside: int, num_ids: int = 1) -> np.ndarray:
    expected = np.full(SIZE, outside, np.uint8)
    expected[10:30, 8:38], expected[12:17, 20:29] = num_ids, num_ids + 1
    expected[:5] = VOID
    return expected


@pytest.mark.parametrize(("name", "write"), [("a.geojson", geojson), ("a.parquet", geoparquet)])
def test_polygons_become_ids_the_later_in_front_and_void_outside(name: str, write: Any, tmp_path: Path) -> None:
    pair = with_polygons(tmp_path, name, write(POLYGONS))
    for window in (WHOLE, Window(16, 8, 24, 16)):
        found = read_window(pair, window, CLASSES)
        assert found is not None
        np.testing.assert_array_equal(found[1], polygons_drawn(VOID)[window.rows, window.cols])
    assert read_window(pair, Window(40, 0, 20, 40), CLASSES) is None


def test_outside_of_polygons_is_background_where_there_is_such_a_class(tmp_path: Path) -> None:
    classes = Classes(("background", "crop", "water"))
    found = read_window(with_polygons(tmp_path, "a.geojson", geojson(POLYGONS), classes), WHOLE, classes)
    assert found is not None
    np.testing.assert_array_equal(found[1], polygons_drawn(0))


def test_threads_that_ask_for_the_same_polygons_read_them_once(tmp_path: Path) -> None:
    pair = with_polygons(tmp_path, "a.geojson", geojson(POLYGONS * 200))
    assert isinstance(pair.target, str)
    _read_polygons.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(_polygons, pair.target, pair.target_version, UTM, CLASSES) for _ in range(8)]
    assert len({id(one.result()) for one in asked}) == 1


def test_class_ids_may_be_floats_and_a_crs_null(tmp_path: Path) -> None:
    document = json.loads(geojson([(polygon, float(CLASSES.names.index(name))) for polygon, name in POLYGONS]))
    found = read_window(
        with_polygons(tmp_path, "a.geojson", json.dumps(document | {"crs": None}).encode()), WHOLE, CLASSES
    )
    assert found is not None
    np.testing.assert_array_equal(found[1], polygons_drawn(VOID))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (geojson([(rectangle(0, 0, 9, 9), 1.5)]), "1.5, which is none of the classes soil, crop, water"),
        (geojson([(rectangle(0, 0, 9, 9), "road")]), "'road', which is none of the classes soil, crop, water"),
        (geojson([(rectangle(0, 0, 9, 9), None)]), "a polygon has no property class or class_name or class_id"),
        (b"{", "JSONDecodeError"),
        (geojson([(rectangle(0, 0, 9, 9).exterior, 1)]), "there are LineString in it; targets are of polygons"),
    ],
)
def test_polygons_that_cannot_be_used_are_a_reject(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(Reject, match=r"unreadable target: .*a\.geojson") as raised:
        with_polygons(tmp_path, "a.geojson", data)
    assert message in str(raised.value)


def empty_scene(path: Path, crs: str, transform: Affine, side: int = 640) -> Path:
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=1,
        height=side,
        width=side,
        dtype="uint8",
        crs=crs,
        transform=transform,
        sparse_ok=True,
    ):
        return path


PLACES = {
    "utm": (UTM, Affine(10, 0, 500_000, 0, -10, 5_400_000)),
    "degrees": ("EPSG:4326", Affine(1e-4, 0, 15.0, 0, -1e-4, 48.75)),
    "far north, rotated": ("EPSG:32633", Affine(8, 6, 480_000, 6, -8, 8_700_000)),
    "antimeridian": ("EPSG:32601", Affine(10, 0, 164_000, 0, -10, 5_400_000)),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_pixel_of_val_lies_nearer_than_the_gap_to_a_pixel_of_train(place: str, tmp_path: Path) -> None:
    crs, transform = PLACES[place]
    scene = describe(str(empty_scene(tmp_path / "a.tif", crs, transform)), "1")
    size = 32
    side = side_metres(scene, size)
    blocks = Blocks(side_metres=6 * side, gap_metres=1.5 * side, val_fraction=0.3)
    there = Transformer.from_crs(crs, "OGC:CRS84", always_xy=True)
    edges: dict[str | None, list[np.ndarray]] = {"train": [], "val": [], None: []}
    for window in cores(scene.height, scene.width, size):
        along = np.linspace(0, size, 5)
        ring = np.array([(x, y) for x in along for y in along if {x, y} & {0, size}])
        to_crs = Affine(*scene.window_transform(window))
        xs, ys = to_crs @ ring.T
        edges[blocks.split(scene.bounds(window))].append(np.stack(there.transform(xs, ys), 1))
    train, val = (np.concatenate(edges[split]) for split in ("train", "val"))
    assert len(edges[None]) < 0.6 * (scene.width // size) ** 2, "most of it is used"
    pairs = np.array(np.meshgrid(range(len(train)), range(len(val)))).reshape(2, -1)
    # Of all pairs of points those that a plane around here calls near are measured.
    flat = (train[pairs[0]] - val[pairs[1]] + 180) % 360 - 180
    rough = np.hypot(flat[:, 0] * math.cos(math.radians(train[0, 1])), flat[:, 1]) * 111_000
    near = pairs[:, rough < 2 * blocks.gap_metres]
    assert near.size, "some lie as near as they may"
    _, _, metres = Geod(ellps="WGS84").inv(*train[near[0]].T, *val[near[1]].T)
    assert metres.min() >= 0.999 * blocks.gap_metres


def test_a_place_is_of_one_split_in_whichever_scene_it_lies() -> None:
    blocks = Blocks(side_metres=1000.0, gap_metres=0.0, val_fraction=0.5)
    boxes = [(15 + i * 1e-2, 48.0, 15.001 + i * 1e-2, 48.0005) for i in range(400)]
    splits = [blocks.split(box) for box in boxes]
    inner = [blocks.split((west + 1e-4, south + 1e-4, east - 1e-4, north - 1e-4)) for west, south, east, north in boxes]
    for outer, within in zip(splits, inner, strict=True):
        assert outer in (within, None)
    assert 100 < splits.count("val") < 300, "about half of the blocks"
