"""Exported scenes: rasters, polygons and items that say what the label store says, and nothing else."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import duckdb
import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import pystac
import pytest
import rasterio
import rasterio.features
import rasterio.shutil
import rasterio.warp
import shapely
from pystac.validation.local_validator import get_local_schema_cache
from referencing import Registry, Resource
from rio_cogeo.cogeo import cog_validate

from segray.classes import Classes
from segray.errors import Refused, RunError, SegrayError, SinkError
from segray.export import Export, export
from segray.labelmap import encode_png
from segray.sink import LABEL_MAPS, REJECTS, STATISTICS, part_name
from segray.source import filesystem, image_id
from segray.tile import Window
from tests.stac import serving

CLASSES = Classes(("water", "bare soil", "trees & shrubs"), ((0, 0, 255), (200, 150, 90), (0, 120, 0)))
UTM = ("EPSG:32616", (10.0, 0.0, 600_000.0, 0.0, -10.0, 4_000_000.0))
DEGREES = ("EPSG:4326", (0.001, 0.0, -87.0, 0.0, -0.001, 41.0))
SOUTH_UP = ("EPSG:4326", (0.001, 0.0, -87.0, 0.0, 0.001, 41.0))
ROTATED = ("EPSG:32616", (8.0, 6.0, 600_000.0, 6.0, -8.0, 4_000_000.0))
GRIDS = {"utm": UTM, "degrees": DEGREES, "south_up": SOUTH_UP, "rotated": ROTATED}
SINUSOIDAL = "+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R=6371007.181 +units=m +no_defs"
RUN_ID = "20261122T080301Z-1a2b3c4d"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A scene of a store."""

    uri: str
    label_map: np.ndarray
    grid: tuple[str, tuple[float, ...]] = UTM
    size: int = 64
    version: str = "1"
    run_id: str = RUN_ID
    left_out: frozenset[int] = frozenset()
    """Windows that have no label map, by their number."""
    rejected: frozenset[int] = frozenset()
    """Those of them that are rejects."""
    pixel_confidence: np.ndarray | None = None
    """In 255ths, where the store keeps it."""

    def windows(self) -> list[Window]:
        height, width = self.label_map.shape
        return [
            Window(col, row, min(self.size, width - col), min(self.size, height - row))
            for row in range(0, height, self.size)
            for col in range(0, width, self.size)
        ]

    def window_uri(self, window: Window) -> str:
        return f"{self.uri}#{window.col_off},{window.row_off},{window.width},{window.height}"

    def confidence(self, window: Window, class_id: int) -> float:
        return 0.5 + (window.col_off + 2 * window.row_off + class_id) % 97 / 200

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
        """Those of label_maps, statistics and rejects."""
        label_maps, statistics, rejects = [], [], []
        crs, (a, b, c, d, e, f) = self.grid
        for number, window in enumerate(self.windows()):
            uri = self.window_uri(window)
            names = {"image_id": image_id(uri, self.version), "uri": uri, "run_id": self.run_id}
            if number in self.rejected:
                rejects.append({**names, "version": self.version, "stage": "fetch", "reason": "unreadable: torn"})
            if number in self.left_out:
                continue
            label_map = self.label_map[window.rows, window.cols]
            origin = (a * window.col_off + b * window.row_off + c, d * window.col_off + e * window.row_off + f)
            transform = dict(zip("abcdef", (a, b, origin[0], d, e, origin[1]), strict=True))
            label_maps.append(
                {
                    **names,
                    "version": self.version,
                    "height": window.height,
                    "width": window.width,
                    "label_map": encode_png(label_map, CLASSES.palette),
                    "scene": self.uri,
                    "col_off": window.col_off,
                    "row_off": window.row_off,
                    "crs": crs,
                    **{f"transform_{name}": value for name, value in transform.items()},
                    "confidence": None
                    if self.pixel_confidence is None
                    else encode_png(self.pixel_confidence[window.rows, window.cols], None),
                }
            )
            counts = np.bincount(label_map.ravel(), minlength=256)[: len(CLASSES)]
            for class_id in np.flatnonzero(counts).tolist():
                statistics.append(
                    {
                        **names,
                        "class_id": class_id,
                        "class_name": CLASSES.names[class_id],
                        "num_pixels": counts[class_id],
                        "fraction": counts[class_id] / counts.sum(),
                        "mean_confidence": self.confidence(window, class_id),
                    }
                )
        return label_maps, statistics, rejects


def write_store(
    sink: str,
    scenes: Sequence[Drawn],
    *,
    recipe: str = "r1",
    per_part: int = 3,
    seed: int = 0,
    area: dict[str, Any] | None = None,
) -> None:
    """Writes the windows of scenes in no order, some to a part."""
    fs, root = filesystem(sink)
    found: list[Any] = [[row for scene in scenes for row in scene.rows()[table]] for table in range(3)]
    label_maps, statistics, rejects = found
    order = np.random.default_rng(seed).permutation(len(label_maps))
    for start in range(0, len(order), per_part):
        some = [label_maps[number] for number in order[start : start + per_part]]
        ids = {row["image_id"] for row in some}
        table = pa.Table.from_pylist(some, LABEL_MAPS)
        tables = {
            "label_maps": table,
            "statistics": pa.Table.from_pylist([row for row in statistics if row["image_id"] in ids], STATISTICS),
        }
        for kind, rows in tables.items():
            _write(fs, f"{root}/{kind}/recipe={recipe}/{part_name(table)}", rows)
    if rejects:
        table = pa.Table.from_pylist(rejects, REJECTS)
        _write(fs, f"{root}/rejects/recipe={recipe}/{part_name(table)}", table)
    model = {"name": "unet_resnet18", "digest": "0" * 64, "architecture": "unet", "arguments": {}}
    keeps = any(scene.pixel_confidence is not None for scene in scenes)
    of_scenes = {"confidence": keeps, "area": area}
    described = {"recipe": recipe, "model": model, "classes": CLASSES.to_dict(), "scenes": of_scenes}
    fs.makedirs(f"{root}/recipes", exist_ok=True)
    fs.pipe_file(f"{root}/recipes/{recipe}.json", json.dumps(described).encode())


def _write(fs: Any, path: str, table: pa.Table) -> None:
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    with fs.open(path, "wb") as file:
        pq.write_table(table, file)


def blobs(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Classes in blobs with holes, with specks, and a wedge and a hole without data."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, len(CLASSES), (height // 9 + 1, width // 9 + 1), np.uint8)
    label_map = np.kron(coarse, np.ones((9, 9), np.uint8))[:height, :width].copy()
    specks = rng.random(label_map.shape) < 0.05
    label_map[specks] = rng.integers(0, len(CLASSES), int(specks.sum()))
    rows, cols = np.indices(label_map.shape)
    label_map[cols < (height - rows) // 4] = 255
    label_map[height // 2 : height // 2 + 7, width // 2 : width // 2 + 11] = 255
    return label_map


def files(dest: Path, *more: str) -> dict[str, Path]:
    """What is written of the only scene, by its suffix."""
    [folder] = (dest / "recipe=r1").iterdir()
    assert {path.name.removeprefix(folder.name) for path in folder.iterdir()} == {
        *(".tif", ".tif.aux.xml", ".parquet", ".json", *more),
    }
    return {path.name.removeprefix(folder.name): path for path in folder.iterdir()}


def polygons_of(path: Path) -> tuple[list[dict[str, Any]], np.ndarray]:
    rows = pq.read_table(path).to_pylist()
    return rows, np.array([shapely.from_wkb(row["geometry"]) for row in rows], object)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_raster_is_the_windows_put_together(grid: str, tmp_path: Path) -> None:
    crs, transform = GRIDS[grid]
    drawn = Drawn(uri="file:///scenes/a.tif", label_map=blobs(150, 233), grid=GRIDS[grid])
    write_store(str(tmp_path / "labels"), [drawn])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    path = files(tmp_path / "maps")[".tif"]
    with rasterio.open(path) as raster:
        assert raster.crs == rasterio.CRS.from_user_input(crs)
        assert tuple(raster.transform)[:6] == transform
        assert (raster.nodata, raster.dtypes) == (255, ("uint8",))
        assert np.array_equal(raster.read(1), drawn.label_map)
        assert [raster.colormap(1)[i][:3] for i in range(3)] == list(CLASSES.palette)
        assert [raster.tags(1)[f"CLASS_{i}"] for i in range(3)] == list(CLASSES.names)
        tags = raster.tags()
    assert (tags["SCENE"], tags["RECIPE"], tags["MODEL_DIGEST"]) == (drawn.uri, "r1", "0" * 64)
    assert [fields["title"] for fields in json.loads(tags["CLASSIFICATION_CLASSES"])] == [*CLASSES.names, "no data"]


@pytest.mark.parametrize("shape", [(150, 233), (1, 700), (700, 1), (1, 1)])
def test_the_raster_is_a_valid_cog_with_overviews_where_it_is_large(shape: tuple[int, int], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    large = np.kron(rng.integers(0, 3, (shape[0], shape[1]), np.uint8), np.ones((5, 5), np.uint8))
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=large, size=500)])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    path = files(tmp_path / "maps")[".tif"]
    is_valid, errors, warnings = cog_validate(str(path), strict=True, quiet=True)
    assert (is_valid, errors, warnings) == (True, [], [])
    with rasterio.open(path) as raster:
        assert bool(raster.overviews(1)) == (max(large.shape) > 512)


def test_gdal_reads_the_names_of_the_classes(tmp_path: Path) -> None:
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=blobs(40, 50))])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    rasterio.shutil.copy(files(tmp_path / "maps")[".tif"], tmp_path / "names.vrt", driver="VRT")
    text = (tmp_path / "names.vrt").read_text()
    categories = "".join(f"<Category>{name}</Category>" for name in ("water", "bare soil", "trees &amp; shrubs"))
    assert categories in "".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize("grid", GRIDS)
def test_polygons_drawn_again_are_the_label_map(grid: str, tmp_path: Path) -> None:
    _, transform = GRIDS[grid]
    drawn = Drawn(uri="a.tif", label_map=blobs(150, 233), grid=GRIDS[grid])
    write_store(str(tmp_path / "labels"), [drawn])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    rows, outlines = polygons_of(files(tmp_path / "maps")[".parquet"])
    again = rasterio.features.rasterize(
        [(outline, row["class_id"]) for outline, row in zip(outlines, rows, strict=True)],
        drawn.label_map.shape,
        fill=255,
        transform=rasterio.Affine(*transform),
        dtype="uint8",
    )
    assert np.array_equal(again, drawn.label_map)
    assert shapely.is_valid(outlines).all()
    assert shapely.is_ccw(shapely.get_exterior_ring(outlines)).all()
    assert [row["class_name"] for row in rows] == [CLASSES.names[row["class_id"]] for row in rows]
    assert {row["scene"] for row in rows} == {"a.tif"}
    bounds = [[row["bbox"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for row in rows]
    assert np.array_equal(bounds, shapely.bounds(outlines))


@pytest.mark.parametrize("size", [32, 100, 1000])
def test_polygons_do_not_depend_on_the_windows(size: int, tmp_path: Path) -> None:
    label_map = blobs(150, 233)
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=label_map, size=size)])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    _, outlines = polygons_of(files(tmp_path / "maps")[".parquet"])
    mask = label_map != 255
    whole = rasterio.features.shapes(label_map, mask, connectivity=4, transform=rasterio.Affine(*UTM[1]))
    expected = shapely.normalize([shapely.geometry.shape(shape) for shape, _ in whole])
    assert sorted(shapely.to_wkt(shapely.normalize(outlines))) == sorted(shapely.to_wkt(expected))


def test_a_polygon_across_four_windows_is_one_and_what_meets_at_a_corner_is_two(tmp_path: Path) -> None:
    label_map = np.zeros((128, 128), np.uint8)
    label_map[50:80, 40:90] = 1
    label_map[10:20, 10:20] = label_map[20:30, 20:30] = 2
    drawn = Drawn(uri="a.tif", label_map=label_map)
    write_store(str(tmp_path / "labels"), [drawn])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    rows, outlines = polygons_of(files(tmp_path / "maps")[".parquet"])
    assert sorted((row["class_id"], row["num_pixels"]) for row in rows) == [
        *((0, 128 * 128 - 1700), (1, 1500), (2, 100), (2, 100))
    ]
    [(row, outline)] = [pair for pair in zip(rows, outlines, strict=True) if pair[0]["class_id"] == 1]
    assert outline.normalize() == shapely.box(600_400, 3_999_200, 600_900, 3_999_500).normalize()
    weights = {window: np.sum(label_map[window.rows, window.cols] == 1) for window in drawn.windows()}
    expected = sum(weight * drawn.confidence(window, 1) for window, weight in weights.items()) / 1500
    assert row["mean_confidence"] == pytest.approx(expected, rel=1e-12)


def test_kept_confidence_is_a_raster_and_that_of_a_polygon_is_its_pixels_mean(tmp_path: Path) -> None:
    label_map = np.kron(np.array([[0, 1], [2, 255]], np.uint8), np.ones((60, 70), np.uint8))
    confidence = np.random.default_rng(0).integers(1, 256, label_map.shape, np.uint8)
    confidence[label_map == 255] = 0
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=label_map, pixel_confidence=confidence)])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    written = files(tmp_path / "maps", "-confidence.tif")
    with rasterio.open(written["-confidence.tif"]) as raster:
        assert np.array_equal(raster.read(1), confidence)
        assert (raster.nodata, raster.scales, raster.crs.to_epsg()) == (0, (1 / 255,), 32616)
    assert cog_validate(str(written["-confidence.tif"]), strict=True, quiet=True)[0]
    rows, _ = polygons_of(written[".parquet"])
    expected = [confidence[label_map == class_id].mean() / 255 for class_id in range(3)]
    assert [row["mean_confidence"] for row in sorted(rows, key=lambda row: row["class_id"])] == pytest.approx(expected)
    item = json.loads(written[".json"].read_text())
    validate(item)
    assert item["assets"]["confidence"]["href"] == f"./{written['-confidence.tif'].name}"
    told = item["properties"]["segray:classes"]
    assert [fields["mean_confidence"] for fields in told] == pytest.approx(expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_areas_and_nodata_add_up_to_the_footprint(grid: str, tmp_path: Path) -> None:
    crs, (a, b, c, d, e, f) = GRIDS[grid]
    drawn = Drawn(uri="a.tif", label_map=blobs(120, 90), grid=GRIDS[grid], size=50)
    write_store(str(tmp_path / "labels"), [drawn])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    written = files(tmp_path / "maps")
    rows, _ = polygons_of(written[".parquet"])
    by_class = [sum(row["area_m2"] for row in rows if row["class_id"] == class_id) for class_id in range(3)]

    def area(rows_: slice, cols: slice) -> float:
        """On the ellipsoid, along sides that are drawn with many points."""
        along, back = np.linspace(0, 1, 200), np.linspace(1, 0, 200)
        across = cols.start + (cols.stop - cols.start) * np.concatenate([along, 0 * along + 1, back, 0 * along])
        down = rows_.start + (rows_.stop - rows_.start) * np.concatenate([0 * along, along, 0 * along + 1, back])
        xs, ys = a * across + b * down + c, d * across + e * down + f
        ring = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(xs, ys)
        area_m2: float = pyproj.Geod(ellps="WGS84").polygon_area_perimeter(*ring)[0]
        return abs(area_m2)

    void = sum(
        area(slice(row, row + 1), slice(0, int(np.sum(drawn.label_map[row] == 255))))
        for row in range(120)
        if (drawn.label_map[row] == 255).any()
    )
    assert sum(by_class) + void == pytest.approx(area(slice(0, 120), slice(0, 90)), rel=1e-6)
    item = json.loads(written[".json"].read_text())
    told = item["properties"]["segray:classes"]
    assert [fields["area_m2"] for fields in told] == pytest.approx(by_class, rel=1e-9)
    assert [fields["num_pixels"] for fields in told] == [int(np.sum(drawn.label_map == i)) for i in range(3)]


def test_simplified_polygons_neither_overlap_nor_leave_gaps(tmp_path: Path) -> None:
    rows, cols = np.indices((150, 233))
    label_map = (np.hypot(rows - 70, cols - 90) < 55).astype(np.uint8)
    label_map[cols > 60 + 1.3 * rows] = 2
    label_map[rows > 140 - cols // 7] = 255
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=label_map)])
    for name, metres in (("exact", None), ("simple", 20.0)):
        export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / name), simplify=metres))
    (before, outlines), (after, simplified) = (
        polygons_of(files(tmp_path / name)[".parquet"]) for name in ("exact", "simple")
    )
    assert shapely.is_valid(simplified).all()
    assert shapely.get_num_coordinates(simplified).sum() < 0.25 * shapely.get_num_coordinates(outlines).sum()
    whole, simplified_whole = shapely.union_all(outlines), shapely.union_all(simplified)
    assert sum(shapely.area(simplified)) == pytest.approx(simplified_whole.area, rel=1e-12), "they overlap"
    assert len(shapely.get_rings(simplified_whole)) == len(shapely.get_rings(whole)), "there are gaps"
    assert shapely.hausdorff_distance(whole.boundary, simplified_whole.boundary) < 40
    for name in ("class_id", "num_pixels", "area_m2", "mean_confidence"):
        assert sorted(row[name] for row in before) == sorted(row[name] for row in after)


def item_of(dest: Path) -> dict[str, Any]:
    item: dict[str, Any] = json.loads(files(dest)[".json"].read_text())
    return item


def test_windows_that_are_missing_hold_no_data_and_the_item_counts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label_map = np.minimum(blobs(150, 233), 2)
    drawn = Drawn(uri="a.tif", label_map=label_map, left_out=frozenset({1, 5, 11}), rejected=frozenset({11}))
    write_store(str(tmp_path / "labels"), [drawn])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    expected = label_map.copy()
    for number in drawn.left_out:
        window = drawn.windows()[number]
        expected[window.rows, window.cols] = 255
    with rasterio.open(files(tmp_path / "maps")[".tif"]) as raster:
        assert np.array_equal(raster.read(1), expected)
    rows, _ = polygons_of(files(tmp_path / "maps")[".parquet"])
    assert sum(row["num_pixels"] for row in rows) == np.sum(expected != 255)
    properties = item_of(tmp_path / "maps")["properties"]
    told = [properties[f"segray:num_{name}windows"] for name in ("", "missing_", "rejected_")]
    assert told == [9, 3, 1]
    note = "a.tif: 3 of 12 windows are not labelled (1 was rejected); they are nodata in its raster"
    assert note in capsys.readouterr().err


def test_windows_that_an_area_leaves_out_are_not_told_as_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = Drawn(uri="a.tif", label_map=blobs(150, 233), left_out=frozenset({1, 11}), rejected=frozenset({11}))
    write_store(str(tmp_path / "labels"), [drawn], area={"type": "MultiPolygon", "coordinates": []})
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    properties = item_of(tmp_path / "maps")["properties"]
    told = [properties[f"segray:num_{name}windows"] for name in ("", "missing_", "rejected_")]
    assert told == [10, None, 1]
    note = (
        "a.tif: 2 of 12 windows are not labelled, or lie outside of the recipe's area (1 was rejected); they are nodata"
    )
    assert note in capsys.readouterr().err


def test_a_scene_that_was_cut_begins_with_its_first_window(tmp_path: Path) -> None:
    drawn = Drawn(uri="a.tif", label_map=blobs(200, 200), left_out=frozenset({0, 1, 2, 3, 4, 8, 12}), grid=ROTATED)
    write_store(str(tmp_path / "labels"), [drawn])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    with rasterio.open(files(tmp_path / "maps")[".tif"]) as raster:
        assert np.array_equal(raster.read(1), drawn.label_map[64:, 64:])
        assert tuple(raster.transform)[:6] == (8.0, 6.0, 600_000.0 + 14 * 64, 6.0, -8.0, 4_000_000.0 - 2 * 64)


def test_of_a_scene_that_has_changed_only_the_newest_version_is_written(tmp_path: Path) -> None:
    old = Drawn(uri="a.tif", label_map=np.zeros((128, 128), np.uint8))
    new = Drawn(
        uri="a.tif",
        label_map=np.ones((128, 128), np.uint8),
        version="2",
        run_id="20261123T000000Z-00000000",
        left_out=frozenset({3}),
        rejected=frozenset({3}),
    )
    write_store(str(tmp_path / "labels"), [old, new])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    with rasterio.open(files(tmp_path / "maps")[".tif"]) as raster:
        assert np.unique(raster.read(1)).tolist() == [1, 255]
    assert item_of(tmp_path / "maps")["properties"]["segray:scene_version"] == "2"


def test_scenes_of_one_name_do_not_overwrite_one_another(tmp_path: Path) -> None:
    uris = ["file:///a/1/scene.tif", "file:///a/2/scene.tif", "file:///b/2/scene.tif", "file:///b/2/scene.TIF"]
    write_store(
        str(tmp_path / "labels"),
        [Drawn(uri=uri, label_map=np.full((9, 9), number % 3, np.uint8)) for number, uri in enumerate(uris)],
    )
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps"), processes=1))
    for number, uri in enumerate(uris):
        [path] = [
            path
            for path in (tmp_path / "maps").rglob("*.json")
            if json.loads(path.read_text())["properties"]["segray:scene"] == uri
        ]
        assert path.name.startswith("scene-")
        with rasterio.open(path.with_suffix(".tif")) as raster:
            assert np.unique(raster.read(1)) == [number % 3]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_second_run_writes_what_has_changed_and_no_more(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if where == "s3":
        request.getfixturevalue("s3")
    root = str(tmp_path) if where == "local" else "s3://segray/export-test"
    a = Drawn(uri="a.tif", label_map=blobs(100, 100), left_out=frozenset({3}))
    b = Drawn(uri="b.tif", label_map=blobs(100, 100, seed=1))
    write_store(f"{root}/labels", [a, b])
    job = Export(sink=f"{root}/labels", dest=f"{root}/maps", processes=1)
    fs, path = filesystem(f"{root}/maps")

    def written() -> dict[str, Any]:
        infos = fs.find(path, detail=True)
        return {name: (info.get("mtime") or info["LastModified"], fs.cat_file(name)) for name, info in infos.items()}

    export(job)
    first = written()
    assert len(first) == 8
    assert not [name for name in first if name.endswith("tmp")]
    export(job)
    assert written() == first
    write_store(f"{root}/labels", [dataclasses.replace(a, left_out=frozenset({0, 1, 2}))])
    export(job)
    changed = {name for name, there in written().items() if there != first[name]}
    # What did not change but was written again is told by the time alone, which S3 has by the second.
    assert {name.rpartition(".")[2] for name in changed} >= {"tif", "parquet", "json"}
    assert all("/a-" in name for name in changed)
    if where == "s3":
        time.sleep(1)
    export(dataclasses.replace(job, simplify=15.0, scene="b.*"))
    assert written().keys() == first.keys()
    assert {name for name, there in written().items() if there != first[name]} - changed == {
        name for name in first if "/b-" in name
    }


def test_engines_read_the_polygons_as_they_stand(tmp_path: Path) -> None:
    scenes = [Drawn(uri=f"{name}.tif", label_map=blobs(60, 70, seed)) for seed, name in enumerate("ab")]
    write_store(str(tmp_path / "labels"), scenes)
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps"), processes=1))
    query = f"""
        SELECT recipe, scene, class_name, sum(num_pixels)::BIGINT, sum(area_m2) / 10000 AS hectares, max(bbox.xmax)
        FROM '{tmp_path}/maps/*/*/*.parquet' WHERE class_id = 1 GROUP BY ALL ORDER BY scene
    """
    with duckdb.connect() as connection:
        found = connection.sql(query).fetchall()
    for scene, (recipe, uri, name, num_pixels, hectares, east) in zip(scenes, found, strict=True):
        assert (recipe, uri, name) == ("r1", scene.uri, "bare soil")
        assert num_pixels == np.sum(scene.label_map == 1)
        assert hectares == pytest.approx(num_pixels / 100, rel=2e-3), "on the ellipsoid, not on the map"
        assert 600_000 < east <= 600_700


@pytest.mark.parametrize("grid", ["utm", "degrees"])
def test_the_polygons_are_geoparquet(grid: str, tmp_path: Path) -> None:
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=blobs(60, 70), grid=GRIDS[grid])])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    path = files(tmp_path / "maps")[".parquet"]
    _, outlines = polygons_of(path)
    geo = json.loads(pq.read_metadata(path).metadata[b"geo"])
    assert (geo["version"], geo["primary_column"], list(geo["columns"])) == ("1.1.0", "geometry", ["geometry"])
    column = geo["columns"]["geometry"]
    assert column["bbox"] == list(shapely.total_bounds(outlines))
    assert (column["encoding"], column["geometry_types"]) == ("WKB", ["Polygon"])
    assert column["covering"]["bbox"] == {side: ["bbox", side] for side in ("xmin", "ymin", "xmax", "ymax")}
    assert pyproj.CRS.from_json_dict(column["crs"]) == pyproj.CRS(GRIDS[grid][0])


def test_many_polygons_are_many_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.polygons._GROUP_ROWS", 100)
    monkeypatch.setattr("segray.polygons._NUM_TRACED", 7)
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=blobs(128, 128))])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    path = files(tmp_path / "maps")[".parquet"]
    assert pq.read_metadata(path).num_row_groups > 3
    assert sum(row["num_pixels"] for row in polygons_of(path)[0]) == np.sum(blobs(128, 128) != 255)


def validate(item: dict[str, Any]) -> None:
    """By the schema of STAC that pystac brings; the schemas of extensions it would fetch."""
    pystac.Item.from_dict(item)
    registry = Registry().with_resources(
        [(uri, Resource.from_contents(schema)) for uri, schema in get_local_schema_cache().items()]
    )
    uri = f"https://schemas.stacspec.org/v{item['stac_version']}/item-spec/json-schema/item.json"
    jsonschema.Draft7Validator({"$ref": uri}, registry=registry).validate(item)


def test_the_item_says_where_when_and_by_what(tmp_path: Path) -> None:
    drawn = Drawn(uri="file:///scenes/a.tif", label_map=blobs(150, 233))
    write_store(str(tmp_path / "labels"), [drawn])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    written, item = files(tmp_path / "maps"), item_of(tmp_path / "maps")
    validate(item)
    assert item["id"] == written[".json"].stem
    properties = item["properties"]
    assert properties["proj:code"] == "EPSG:32616"
    assert properties["proj:shape"] == [150, 233]
    assert properties["proj:transform"] == list(UTM[1])
    assert (properties["segray:recipe"], properties["segray:model_digest"]) == ("r1", "0" * 64)
    assert (properties["datetime"], properties["start_datetime"]) == (None, "2026-11-22T08:03:01Z")
    assert properties["segray:classes"][1]["class_name"] == "bare soil"
    with rasterio.open(written[".tif"]) as raster:
        bounds = rasterio.warp.transform_bounds(raster.crs, "EPSG:4326", *raster.bounds)
    assert item["bbox"] == pytest.approx(bounds, abs=1e-6)
    outline = shapely.geometry.shape(item["geometry"])
    assert outline.is_valid
    assert outline.bounds == pytest.approx(bounds, abs=1e-6)
    assets = item["assets"]
    for asset in ("labels", "class_names", "polygons"):
        assert (written[".json"].parent / assets[asset]["href"]).exists()
    assert assets["source"]["href"] == "file:///scenes/a.tif"
    assert (assets["labels"]["data_type"], assets["labels"]["nodata"]) == ("uint8", 255)
    assert [fields.get("color_hint") for fields in assets["labels"]["classification:classes"]] == [
        *("0000FF", "C8965A", "007800", None)
    ]
    names = [fields["name"] for fields in assets["labels"]["classification:classes"]]
    assert names == ["water", "bare_soil", "trees___shrubs", "nodata"]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_the_item_has_the_time_that_the_scene_tells(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if where == "s3":
        request.getfixturevalue("s3")
    root = str(tmp_path) if where == "local" else "s3://segray/times"
    profile = {"driver": "GTiff", "width": 9, "height": 9, "count": 13, "dtype": "uint16"}
    with rasterio.open(tmp_path / "a.tif", "w", **profile, transform=rasterio.Affine(*UTM[1])) as raster:
        raster.update_tags(TIFFTAG_DATETIME="2024:05:01 10:11:12")
    told = {"datetime": None, "start_datetime": "2024-06-01T00:00:00Z", "end_datetime": "2024-06-30T00:00:00Z"}
    found = {"type": "FeatureCollection", "features": [{"id": "x"}, {"id": "S2/y", "properties": told}]}
    documents = {"b.json": {"properties": told}, "c.geojson": {"properties": told}, "found.json": found}
    fs, path = filesystem(root)
    fs.makedirs(f"{path}/scenes", exist_ok=True)
    fs.pipe_file(f"{path}/scenes/a.tif", (tmp_path / "a.tif").read_bytes())
    for name, fields in documents.items():
        fs.pipe_file(f"{path}/scenes/{name}", json.dumps(fields).encode())
    label_map = np.zeros((9, 9), np.uint8)
    items = ("b.json", "c.geojson", "found.json#S2%2Fy")
    scenes = [Drawn(uri=f"{root}/scenes/{name}", label_map=label_map) for name in ("a.tif", *items)]
    write_store(str(tmp_path / "labels"), scenes)
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps"), processes=1))
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / "maps").rglob("*.json")}
    by_scene = {item["properties"]["segray:scene"].rpartition("/")[2]: item for item in written.values()}
    assert sorted(name.partition("-")[0] for name in written) == ["S2_2Fy", "a", "b", "c"]
    assert by_scene["a.tif"]["properties"]["datetime"] == "2024-05-01T10:11:12Z"
    for name in items:
        assert {field: by_scene[name]["properties"][field] for field in told} == told
        [link] = by_scene[name]["links"]
        assert (link["rel"], link["href"]) == ("derived_from", f"{root}/scenes/{name}")
    for item in written.values():
        validate(item)


def test_a_store_that_is_away_is_waited_for_and_asked_again_and_a_scene_that_is_gone_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("segray.retry.PAUSES_SECONDS", (0.0, 0.0))
    told = {"properties": {"datetime": "2024-05-01T10:11:12Z"}}
    answers = {"/items/slow": [503, 503, 200], "/items/gone": [404], "/items/away": [503] * 3}

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers[self.path].pop(0))
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        def log_message(self, *args: Any) -> None:
            pass

    with serving(Api) as url:
        scenes = [Drawn(uri=url + path, label_map=np.zeros((9, 9), np.uint8)) for path in answers]
        write_store(str(tmp_path / "labels"), scenes)
        export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps"), processes=1))
    assert "/items/away: when it was taken is not known now (" in capsys.readouterr().err
    times = {path.name[:4]: json.loads(path.read_text()) for path in (tmp_path / "maps").rglob("*.json")}
    assert times["slow"]["properties"]["datetime"] == "2024-05-01T10:11:12Z"
    assert times["gone"]["properties"]["start_datetime"] == "2026-11-22T08:03:01Z"
    assert times["away"]["properties"]["start_datetime"] == "2026-11-22T08:03:01Z"
    assert [name for name, item in times.items() if item["properties"]["segray:digest"] is None] == ["away"], (
        "asked again"
    )


def test_a_footprint_is_cut_at_the_antimeridian(tmp_path: Path) -> None:
    grid = ("EPSG:32601", (1000.0, 0.0, 100_000.0, 0.0, -1000.0, 1_000_000.0))
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=blobs(100, 100), grid=grid)])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    item = item_of(tmp_path / "maps")
    validate(item)
    west, south, east, north = item["bbox"]
    assert item["geometry"]["type"] == "MultiPolygon"
    assert -180 < east < -178 < 178 < west < 180
    assert 8 < south < north < 10
    assert shapely.geometry.shape(item["geometry"]).bounds[::2] == (-180, 180)


@pytest.mark.parametrize(("west", "width"), [(0.0, 360), (-180.0, 360), (100.0, 359)])
def test_the_bounds_of_what_reaches_around_are_all_longitudes(west: float, width: int, tmp_path: Path) -> None:
    grid = ("EPSG:4326", (1.0, 0.0, west, 0.0, -1.0, 90.0))
    label_map = np.zeros((180, width), np.uint8)
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=label_map, grid=grid, size=360)])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    item = item_of(tmp_path / "maps")
    validate(item)
    assert item["bbox"] == ([-180, -90, 180, 90] if width == 360 else [100, -90, 99, 90])
    assert shapely.geometry.shape(item["geometry"]).area == pytest.approx(180 * width)


def test_a_footprint_that_crosses_itself_is_an_outline_all_the_same(tmp_path: Path) -> None:
    side = 1_111_950.5196666666  # of a tile of MODIS: one that lies beyond the sinusoidal world for the most part
    grid = (SINUSOIDAL, (side / 60, 0.0, 2 * side - 20_015_109.354, 0.0, -side / 60, 10_007_554.677))
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=blobs(60, 60), grid=grid)])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    item = item_of(tmp_path / "maps")
    validate(item)
    assert shapely.geometry.shape(item["geometry"]).is_valid


def test_a_footprint_with_a_pole_in_it_reaches_around(tmp_path: Path) -> None:
    grid = ("EPSG:3031", (1000.0, 0.0, -50_000.0, 0.0, -1000.0, 50_000.0))
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=blobs(100, 100), grid=grid)])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    item = item_of(tmp_path / "maps")
    validate(item)
    assert item["geometry"]["type"] == "Polygon"
    assert item["bbox"] == pytest.approx([-180, -90, 180, -89.35], abs=0.05)


def test_a_scene_of_nothing_is_a_raster_without_data_and_no_polygon(tmp_path: Path) -> None:
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=np.full((70, 70), 255, np.uint8))])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    written = files(tmp_path / "maps")
    assert pq.read_table(written[".parquet"]).num_rows == 0
    with rasterio.open(written[".tif"]) as raster:
        assert (raster.read(1) == 255).all()
    validate(item_of(tmp_path / "maps"))


def test_more_than_256_classes_make_a_raster_of_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = Classes(tuple(f"class {number}" for number in range(300)), ignore_index=65535)
    monkeypatch.setattr("tests.test_export.CLASSES", many)
    label_map = np.random.default_rng(0).integers(0, 300, (70, 70)).astype(np.uint16)
    label_map[3] = 65535
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=label_map)])
    export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
    with rasterio.open(files(tmp_path / "maps")[".tif"]) as raster:
        assert (raster.dtypes, raster.nodata) == (("uint16",), 65535)
        assert np.array_equal(raster.read(1), label_map)
        assert raster.colormap(1)[299][:3] == many.palette[299]


def test_two_processes_write_what_one_does_and_a_scene_that_fails_is_named(tmp_path: Path) -> None:
    scenes = [Drawn(uri=f"{name}.tif", label_map=blobs(70, 70, seed)) for seed, name in enumerate("abc")]
    torn = Drawn(uri="torn.tif", label_map=np.full((70, 70), 7, np.uint8))  # there is no such class
    write_store(str(tmp_path / "labels"), [*scenes, torn])
    message = r"torn.tif cannot be exported: the label map of Window\(.*\) is not what its row says"
    for processes in (1, 2):
        with pytest.raises(RunError, match=message):
            export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / str(processes)), processes=processes))
    one, two = (
        {path.relative_to(tmp_path / number): path.read_bytes() for path in (tmp_path / number).rglob("*.*")}
        for number in "12"
    )
    assert len(one) == 12
    assert one == two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scene": "b.*"}, "--scene b.*: is none of the scenes in .*, which are a.tif"),
        ({"recipe": "r2"}, "there is no recipe r2"),
        ({"sink": "nowhere"}, "nowhere: there is no label store"),
        ({"dest": "gopher://there/maps"}, "gopher://there/maps.* cannot be "),
        ({"simplify": 0.0}, "--simplify 0.0: must be more than 0 metres"),
        ({"processes": 0}, "--processes 0: must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=blobs(9, 9))])
    job = Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps"))
    with pytest.raises(Refused, match=message):
        export(dataclasses.replace(job, **change))
    assert not (tmp_path / "maps").exists()


def test_a_store_of_plain_images_has_no_scenes(tmp_path: Path) -> None:
    drawn = Drawn(uri="a.tif", label_map=blobs(9, 9))
    write_store(str(tmp_path), [drawn])
    [part] = (tmp_path / "label_maps/recipe=r1").iterdir()
    plain = pq.read_table(part).select(LABEL_MAPS.names[: LABEL_MAPS.get_field_index("scene")])
    pq.write_table(plain, part)
    with pytest.raises(SinkError, match="recipe r1 has no labelled scenes"):
        export(Export(sink=str(tmp_path), dest=str(tmp_path / "maps")))


def test_a_destination_that_cannot_be_written_ends_the_job(tmp_path: Path) -> None:
    write_store(str(tmp_path / "labels"), [Drawn(uri="a.tif", label_map=blobs(9, 9))])
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps/recipe=r1").write_text("not a folder")
    with pytest.raises(SegrayError, match=r"maps.* cannot be (read|written): NotADirectoryError"):
        export(Export(sink=str(tmp_path / "labels"), dest=str(tmp_path / "maps")))
