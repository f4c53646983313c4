import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import rasterio
from affine import Affine
from pyproj import Transformer
from rasterio.enums import ColorInterp
from ray._private.arrow_serialization import _arrow_table_reduce

from segray import cut
from segray.cut import RASTERS, WINDOWS, Area, areas_by_class, read_windows, windows_of
from segray.errors import Reject, SettingsError
from segray.predict import Predictor
from segray.preprocessing import Preprocessing
from segray.scene import Scene, describe, read
from segray.source import image_id
from segray.tile import Scenes, Window
from tests.conftest import random_checkpoint
from tests.rasters import BANDS, DEGREES, DEGREES_GRID, NODATA, UTM, UTM_GRID, samples, write, write_area

FOUR_BANDS = Preprocessing(channels=BANDS, mean=(1.5,) * 4, std=(1.0,) * 4)
CUT = Scenes(size=64, halo=32)


def windows(path: str, area: Area | None = None, scenes: Scenes = CUT) -> pa.Table:
    found = windows_of(path, "7", scenes, area, FOUR_BANDS)
    assert found.schema == WINDOWS
    return found


def rasters(found: pa.Table, area: Area | None = None, scenes: Scenes = CUT) -> list[dict[str, Any]]:
    read_: list[dict[str, Any]] = []
    for table in read_windows(found, scenes, area):
        assert table.schema == RASTERS
        read_ += table.to_pylist()
    return read_


def offsets(found: pa.Table) -> set[tuple[int, int]]:
    return set(zip(found["col_off"].to_pylist(), found["row_off"].to_pylist(), strict=True))


def array(row: dict[str, Any], name: str) -> np.ndarray:
    if name == "values":
        return np.frombuffer(row[name], np.float32).reshape(-1, row["height"], row["width"])
    side = "core_" if name == "wanted" else ""
    return np.frombuffer(row[name], np.bool_).reshape(row[f"{side}height"], row[f"{side}width"])


def corner(scene: Scene, col: float, row: float) -> tuple[float, float]:
    """The longitude and latitude of a pixel's upper left corner."""
    lon, lat = Transformer.from_crs(scene.crs, DEGREES, always_xy=True).transform(
        *(Affine(*scene.transform) @ (col, row))
    )
    return lon, lat


def area_of(scene: Scene, path: Path, window: Window) -> Area:
    left, top, right, bottom = window.col_off, window.row_off, window.cols.stop, window.rows.stop
    ring = [corner(scene, *there) for there in ((left, top), (right, top), (right, bottom), (left, bottom))]
    return Area.load(write_area(path, ring))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "scene.tif", samples(150, 200))


def test_the_windows_of_a_scene_are_its_cores_row_by_row_with_ids_of_their_own(path: str) -> None:
    found = windows(path).to_pylist()
    covered = np.zeros((150, 200), int)
    for row in found:
        window = Window(row["col_off"], row["row_off"], row["width"], row["height"])
        covered[window.rows, window.cols] += 1
        assert row["uri"] == f"{path}#{row['col_off']},{row['row_off']},{row['width']},{row['height']}"
        assert (row["version"], row["image_id"]) == ("7", image_id(row["uri"], "7"))
        assert (row["stage"], row["reason"]) == (None, None)
    assert (covered == 1).all()
    assert [(row["row_off"], row["col_off"]) for row in found] == [
        (r, c) for r in (0, 64, 128) for c in (0, 64, 128, 192)
    ]


def test_a_block_of_windows_holds_its_scenes_once_and_no_others(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.tif", samples(400, 400)) for name in "ab"]
    found = [windows(path, scenes=Scenes(size=4)) for path in paths]
    scenes = [one["pickled"][0].as_py() for one in found]
    index = pa.concat_tables([WINDOWS.empty_table(), *(one.filter(pa.array([True] * 100**2)) for one in found)])
    for first, expected in ((0, [1, 0]), (100**2 - 30, [1, 1]), (100**2 + 5000, [0, 1])):
        block = index.slice(first, 60)
        as_ray_keeps_it = pickle.dumps(_arrow_table_reduce(block))
        assert [as_ray_keeps_it.count(scene) for scene in scenes] == expected
        assert block.nbytes < len(as_ray_keeps_it) < 30_000
        assert pickle.loads(block["pickled"][-1].as_py()).uri == paths[expected[1]]


def test_bands_are_those_of_the_model_in_its_order(tmp_path: Path) -> None:
    names = ("coastal", "NIR", "blue", "green", "red")
    path = write(tmp_path / "a.tif", samples(20, 30, 5), names=names)
    (row,) = rasters(windows(path))
    np.testing.assert_array_equal(array(row, "values"), samples(20, 30, 5)[[4, 3, 2, 1]])


def test_a_model_of_images_takes_samples_of_8_bits_or_what_a_scale_is_given_for(tmp_path: Path) -> None:
    plain, deep = (
        write(tmp_path / f"{dtype}.tif", samples(20, 30, 3).astype(dtype), names=("red", "green", "blue"))
        for dtype in ("uint8", "uint16")
    )
    scaled = write(tmp_path / "scaled.tif", samples(20, 30, 3).astype(np.uint8), names=("red", "green", "blue"))
    with rasterio.open(scaled, "r+") as file:
        file.scales = (1e-4,) * 3

    def reason(path: str, scenes: Scenes) -> str | None:
        (found,) = windows_of(path, "7", scenes, None, Preprocessing())["reason"].to_pylist()
        return str(found) if found else None

    assert reason(plain, CUT) is None
    for path, said in ((deep, "red are uint16, of scale 1 "), (scaled, "red are uint8, of scale 0.0001 ")):
        told = reason(path, CUT)
        assert told is not None and said in told and "no image: the model sees images" in told
        assert "--scenes.scale 0.085 where 3000 is to be white" in told
        assert reason(path, dataclasses.replace(CUT, scale=0.085)) is None
    assert windows_of(deep, "7", CUT, None, dataclasses.replace(Preprocessing(), channels=("red", "green", "blue")))[
        "reason"
    ].to_pylist() == [None]


def test_the_last_of_four_bands_is_no_alpha_to_a_model_that_sees_it(path: str) -> None:
    with rasterio.open(path) as file:
        assert file.colorinterp[3] == ColorInterp.alpha, "as GDAL takes it"
    values = [array(row, "values") for row in rasters(windows(path))]
    assert all(len(one) == 4 for one in values)


@pytest.mark.parametrize("names", [("RED", "Green", "bLUE", "NIR"), ("1", "2", "3", "4")])
def test_bands_are_found_in_other_letters_and_by_numbers(names: tuple[str, ...], tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", samples(20, 30).astype(np.int16), names=("red", "green", "blue", "nir"))
    found = windows_of(path, "7", CUT, None, dataclasses.replace(FOUR_BANDS, channels=names))
    assert found["reason"].to_pylist() == [None]
    np.testing.assert_array_equal(array(rasters(found)[0], "values"), samples(20, 30))


def test_a_scene_that_lacks_a_band_is_a_reject_that_lists_both_sides(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", samples(20, 30, 2), names=("red", "swir"))
    (row,) = windows(path).to_pylist()
    assert (row["uri"], row["version"], row["image_id"]) == (path, "7", image_id(path, "7"))
    assert row["stage"] == "decode"
    assert row["reason"].startswith(
        "bands missing: the model sees the bands red, green, blue, nir, and the scene has red, swir"
    )
    (read_,) = rasters(windows(path))
    assert {name: read_[name] for name in ("image_id", "uri", "version", "stage", "reason")} == {
        name: row[name] for name in ("image_id", "uri", "version", "stage", "reason")
    }


def test_a_scene_that_cannot_be_opened_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_text("no raster")
    (row,) = windows(str(tmp_path / "a.tif")).to_pylist()
    assert (row["stage"], row["reason"].partition(":")[0]) == ("decode", "not a raster")


def test_a_scene_that_could_not_be_looked_up_is_a_reject_without_a_version() -> None:
    (row,) = windows_of("s3://a/b.tif", Reject("fetch", "missing", "it is gone"), CUT, None, FOUR_BANDS).to_pylist()
    assert (row["version"], row["image_id"]) == ("", image_id("s3://a/b.tif", ""))
    assert (row["stage"], row["reason"]) == ("fetch", "missing: it is gone")


def test_a_raster_is_its_window_with_a_halo_up_to_the_scenes_border(path: str) -> None:
    whole = samples(150, 200)
    for row in rasters(windows(path)):
        left, top = max(row["col_off"] - 32, 0), max(row["row_off"] - 32, 0)
        right = min(row["col_off"] + row["core_width"] + 32, 200)
        bottom = min(row["row_off"] + row["core_height"] + 32, 150)
        np.testing.assert_array_equal(array(row, "values"), whole[:, top:bottom, left:right])
        assert array(row, "valid").all() and array(row, "wanted").all()
        assert (row["core_col_off"], row["core_row_off"]) == (row["col_off"] - left, row["row_off"] - top)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        (UTM, UTM_GRID),
        (DEGREES, DEGREES_GRID),
        (UTM, UTM_GRID @ Affine.rotation(20)),
        (UTM, UTM_GRID @ Affine.scale(1, -1)),
    ],
)
def test_a_raster_tells_the_place_of_its_core(crs: str, transform: Affine, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", samples(150, 200), crs=crs, transform=transform)
    scene = describe(path, "7")
    for row in rasters(windows(path)):
        assert (row["scene"], row["crs"]) == (path, crs)
        own = Affine(*(row[f"transform_{letter}"] for letter in "abcdef"))
        for col, line in ((0, 0), (row["core_width"], row["core_height"])):
            expected = transform @ (col + row["col_off"], line + row["row_off"])
            assert own @ (col, line) == pytest.approx(expected, rel=1e-12)
            lon, lat = corner(scene, col + row["col_off"], line + row["row_off"])
            slack = 1e-9
            assert row["west"] - slack <= lon <= row["east"] + slack
            assert row["south"] - slack <= lat <= row["north"] + slack
        core = Window(row["col_off"], row["row_off"], row["core_width"], row["core_height"])
        assert (row["west"], row["south"], row["east"], row["north"]) == scene.bounds(core)


def test_large_windows_come_in_tables_that_fit_a_memory(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "_VALUES_BYTES", 2 * 96 * 96 * 4 * 4)
    found = windows(path)
    lengths = [table.num_rows for table in read_windows(found, CUT, None)]
    assert sum(lengths) == found.num_rows and len(lengths) > 3
    in_parts = [row for table in read_windows(found, CUT, None) for row in table.to_pylist()]
    monkeypatch.undo()
    assert in_parts == rasters(found)


def test_a_truncated_file_is_a_reject_for_the_windows_that_are_cut_off_alone(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.tif", samples(150, 200), interleave="pixel", compress="deflate"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    read_ = rasters(windows(str(path), scenes=Scenes(size=64, halo=0)), scenes=Scenes(size=64, halo=0))
    assert len(read_) == 12
    whole = samples(150, 200)
    is_read = [row["reason"] is None for row in read_]
    assert is_read == sorted(is_read, reverse=True) and 0 < sum(is_read) < 12, "blocks lie row by row in the file"
    for row in read_:
        if row["reason"] is None:
            there = (
                slice(row["row_off"], row["row_off"] + row["height"]),
                slice(row["col_off"], row["col_off"] + row["width"]),
            )
            np.testing.assert_array_equal(array(row, "values"), whole[:, *there])
        else:
            assert (row["stage"], row["reason"].partition(":")[0]) == ("decode", "truncated")
            assert "#" in row["uri"] and row["scene"] is None and row["values"] == b""


@pytest.mark.parametrize(("crs", "transform"), [(UTM, UTM_GRID), (DEGREES, DEGREES_GRID)])
def test_areas_by_class_and_void_add_up_to_the_footprint(crs: str, transform: Affine, tmp_path: Path) -> None:
    scene = describe(write(tmp_path / "a.tif", samples(150, 200), crs=crs, transform=transform), "7")
    label_map = np.random.default_rng(0).choice(np.array([0, 1, 3, 255], np.uint8), (150, 200))
    areas = areas_by_class(label_map, scene.crs, scene.transform, 4)
    of_pixels = scene.pixel_areas(Window(0, 0, 200, 150))
    assert areas.shape == (4,) and areas[2] == 0
    for class_id in (0, 1, 3):
        assert areas[class_id] == pytest.approx(of_pixels[label_map == class_id].sum(), rel=1e-12)
    assert areas.sum() + of_pixels[label_map == 255].sum() == pytest.approx(of_pixels.sum(), rel=1e-12)


def test_areas_of_windows_are_those_of_the_scene(path: str) -> None:
    scene = describe(path, "7")
    label_map = np.random.default_rng(0).integers(0, 3, (150, 200)).astype(np.uint8)
    total = np.zeros(3)
    for row in rasters(windows(path)):
        transform = tuple(row[f"transform_{letter}"] for letter in "abcdef")
        own = label_map[row["row_off"] :, row["col_off"] :][: row["core_height"], : row["core_width"]]
        total += areas_by_class(own, row["crs"], transform, 3)
    np.testing.assert_allclose(total, areas_by_class(label_map, scene.crs, scene.transform, 3), rtol=1e-7)


# The area


@pytest.mark.parametrize(
    ("crs", "transform"), [(UTM, UTM_GRID), (DEGREES, DEGREES_GRID), (UTM, UTM_GRID @ Affine.rotation(20))]
)
def test_an_area_cuts_windows_and_pixels(crs: str, transform: Affine, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", samples(150, 200), crs=crs, transform=transform)
    scene = describe(path, "7")
    wanted = Window(50, 70, 60, 50)
    area = area_of(scene, tmp_path / "area.geojson", wanted)
    found = windows(path, area)
    assert offsets(found) == {(0, 64), (64, 64)}
    labelled = np.zeros((150, 200), bool)
    for row in rasters(found, area):
        there = slice(row["row_off"], row["row_off"] + 64), slice(row["col_off"], row["col_off"] + 64)
        labelled[there] = array(row, "wanted")
        assert array(row, "valid").all(), "what is not wanted is seen"
    expected = np.zeros((150, 200), bool)
    expected[wanted.rows, wanted.cols] = True
    np.testing.assert_array_equal(labelled, expected)


def test_nothing_of_a_scene_outside_of_the_area_is_to_be_read(path: str, tmp_path: Path) -> None:
    for name, lon in (("near", -87.0), ("antipodes", 92.0)):
        ring = [(lon, 30.0), (lon + 0.5, 30.0), (lon + 0.5, 30.5)]
        area = Area.load(write_area(tmp_path / f"{name}.geojson", ring))
        assert windows(path, area).num_rows == 0
        assert not area.covers(describe(path, "7"), Window(0, 0, 200, 150)).any()


def test_an_area_may_reach_where_the_scenes_crs_has_no_place(path: str, tmp_path: Path) -> None:
    world = Area.load(write_area(tmp_path / "world.geojson", [(-180, -90), (180, -90), (180, 90), (-180, 90)]))
    assert windows(path, world).num_rows == 12
    assert world.covers(describe(path, "7"), Window(0, 0, 200, 150)).all()


ACROSS = {
    "UTM": ("EPSG:32760", Affine(10, 0, 832000, 0, -10, 9900000)),
    "degrees beyond 180": (DEGREES, Affine(0.01, 0, 179, 0, -0.01, 40)),
    "degrees beyond -180": (DEGREES, Affine(0.01, 0, -181, 0, -0.01, 40)),
    "degrees from 0 to 360": (DEGREES, Affine(1.8, 0, 0, 0, -0.9, 70)),
    "Mercator": ("EPSG:3857", Affine(500, 0, 20037508.342789244 - 50000, 0, -500, 5e6)),
}


@pytest.mark.parametrize("name", ACROSS)
def test_an_area_across_the_antimeridian_is_two_polygons(name: str, tmp_path: Path) -> None:
    crs, transform = ACROSS[name]
    path = write(tmp_path / "a.tif", samples(150, 200), crs=crs, transform=transform)
    scene = describe(path, "7")
    east = [(175, -85), (180, -85), (180, 85), (175, 85)]
    west = [(-180, -85), (-175, -85), (-175, 85), (-180, 85)]
    cols, rows = np.meshgrid(np.arange(200) + 0.5, np.arange(150) + 0.5)
    lons = Transformer.from_crs(crs, DEGREES, always_xy=True).transform(*(transform @ (cols, rows)))[0]
    lons = (lons + 180) % 360 - 180
    for number, (rings, expected) in enumerate(
        [([east], lons > 175), ([west], lons < -175), ([east, west], np.abs(lons) > 175)]
    ):
        area = Area.load(write_area(tmp_path / f"{number}.geojson", *rings))
        np.testing.assert_array_equal(area.covers(scene, Window(0, 0, 200, 150)), expected)
        in_windows = np.zeros((150, 200), bool)
        for row in windows(path, area).to_pylist():
            core = Window(*(row[side] for side in ("col_off", "row_off", "width", "height")))
            in_windows[core.rows, core.cols] = area.covers(scene, core)
        np.testing.assert_array_equal(in_windows, expected)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:3031", Affine(500, 0, 0, 0, -500, -1e6)),
        ("EPSG:3857", Affine(500, 0, 20037508.342789244, 0, -500, 5e6)),
        ("EPSG:3413", Affine(10000, 0, -1e6, 0, -10000, 1e6)),
    ],
)
def test_a_grid_that_begins_on_the_antimeridian_is_covered_by_the_world(
    crs: str, transform: Affine, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.tif", samples(150, 200), crs=crs, transform=transform)
    world = Area.load(write_area(tmp_path / "world.geojson", [(-180, -90), (180, -90), (180, 90), (-180, 90)]))
    found = windows(path, world).to_pylist()
    assert len(found) == 12
    for row in found:
        core = Window(*(row[side] for side in ("col_off", "row_off", "width", "height")))
        assert world.covers(describe(path, "7"), core).mean() > 0.99


def test_no_window_is_lost_of_which_an_area_covers_a_pixel(tmp_path: Path) -> None:
    """A parallel around a pole is a circle, of which the scene's extent and a window's make different polygons."""
    transform = Affine(40000, 0, -4e6, 0, -40000, 4e6)
    path = write(tmp_path / "a.tif", samples(200, 200), crs="EPSG:3031", transform=transform)
    scene = describe(path, "7")
    for latitude in (-60.0, -63.5, -71.2):
        ring = [(-180.0, -90.0), (180.0, -90.0), (180.0, latitude), (-180.0, latitude)]
        area = Area.load(write_area(tmp_path / "area.geojson", ring))
        for size in (10, 20):
            touched = area.touches(scene, size)
            grid = [(row, col) for row in range(200 // size) for col in range(200 // size)]
            covered = [area.covers(scene, Window(col * size, row * size, size, size)).any() for row, col in grid]
            assert 0 < sum(covered) < len(grid)
            assert not (np.array(covered) & ~touched.ravel()).any()


def test_straight_edges_of_an_area_bend_as_they_do_on_earth(tmp_path: Path) -> None:
    """A parallel is no straight line in UTM: over 100 km at 70° it lies 500 m off."""
    path = write(tmp_path / "a.tif", samples(100, 200), transform=Affine(1000, 0, 400000, 0, -1000, 7800000))
    scene = describe(path, "7")
    latitude = corner(scene, 100, 50)[1]
    area = Area.load(write_area(tmp_path / "area.geojson", [(-100, latitude), (-70, latitude), (-70, 80), (-100, 80)]))
    covered = area.covers(scene, Window(0, 0, 200, 100))
    cols, rows = np.meshgrid(np.arange(200) + 0.5, np.arange(100) + 0.5)
    to_degrees = Transformer.from_crs(scene.crs, DEGREES, always_xy=True)
    expected = np.array(to_degrees.transform(*(Affine(*scene.transform) @ (cols, rows)))[1]) > latitude
    assert (covered != expected).mean() < 1e-3
    assert len({tuple(line) for line in expected.T}) > 1, "it bends"


NO_AREAS: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "is no GeoJSON file of polygons"),
    "a list": ("[]", "is no GeoJSON file of polygons"),
    "a point": ('{"type": "Point", "coordinates": [1, 2]}', "is no GeoJSON file of polygons"),
    "nothing": ('{"type": "FeatureCollection", "features": []}', "holds no polygon"),
    "no geometry": ('{"type": "Feature", "geometry": null, "properties": {}}', "is no GeoJSON file of polygons"),
    "metres": (
        '{"type": "Polygon", "coordinates": [[[452475, 3408645], [452575, 3408645], [452575, 3408745]]]}',
        "are no longitudes and latitudes; warp it",
    ),
}


@pytest.mark.parametrize("name", NO_AREAS)
def test_what_is_no_area_is_refused(name: str, tmp_path: Path) -> None:
    text, message = NO_AREAS[name]
    (tmp_path / "area.geojson").write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        Area.load(str(tmp_path / "area.geojson"))
    assert "\n" not in str(caught.value)


def test_an_area_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="FileNotFoundError"):
        Area.load(str(tmp_path / "area.geojson"))


def test_an_area_may_be_a_geometry_a_feature_or_several_and_travels(tmp_path: Path) -> None:
    ring = [[1.0, 2.0], [3.0, 2.0], [3.0, 4.0], [1.0, 2.0]]
    polygon = {"type": "Polygon", "coordinates": [ring]}
    forms: list[dict[str, Any]] = [
        polygon,
        {"type": "MultiPolygon", "coordinates": [[[[*point, 100.0] for point in ring]]]},
        {"type": "Feature", "properties": {}, "geometry": polygon},
        {"type": "FeatureCollection", "features": [{"type": "Feature", "properties": {}, "geometry": polygon}]},
    ]
    for form in forms:
        (tmp_path / "area.geojson").write_text(json.dumps(form))
        area = pickle.loads(pickle.dumps(Area.load(str(tmp_path / "area.geojson"))))
        assert area.to_dict() == {"type": "MultiPolygon", "coordinates": [[ring]]}


LOOPS: dict[str, tuple[list[tuple[float, float]], float]] = {
    "a bow-tie": ([(0, 0), (1, 1), (1, 0), (0, 1)], 1 / 2),
    "a loop over itself": ([(0, 0), (0.75, 0), (0.75, 0.75), (0.25, 0.25), (1, 0.25), (1, 1), (0, 1)], 15 / 16),
    "a spike": ([(0, 0), (1, 0), (1, 1), (2, 2), (1, 1), (0, 1)], 1),
}


@pytest.mark.parametrize("name", LOOPS)
def test_an_area_that_crosses_itself_loses_no_loop(name: str, path: str, tmp_path: Path) -> None:
    ring, share = LOOPS[name]
    scene = describe(path, "7")
    corners = [corner(scene, 200 * x, 150 * (1 - y)) for x, y in ring]
    area = Area.load(write_area(tmp_path / "area.geojson", corners))
    assert area.covers(scene, Window(0, 0, 200, 150)).mean() == pytest.approx(share, abs=0.01)


# Without data


def test_a_window_without_data_is_void_and_costs_no_forward_pass(tmp_path: Path) -> None:
    drawn = samples(150, 200)
    drawn[:, :64, :130] = NODATA  # two whole windows, and a bit of the next
    drawn[1, 70:, 190:] = NODATA  # of one band; a window is left without a pixel
    path = write(tmp_path / "a.tif", drawn)
    signs: list[int] = []
    checkpoint = random_checkpoint("unet_resnet18", preprocessing=FOUR_BANDS)
    predictor = Predictor(checkpoint.to_bytes, batch_size=1, num_threads=1, beat=signs.append)
    tables = [predictor(table) for table in read_windows(windows(path), CUT, None)]
    label_map = np.full((150, 200), 99, np.uint8)
    for row in (row for table in tables for row in table.to_pylist()):
        own = np.frombuffer(row["label_map"], np.uint8).reshape(row["height"], row["width"])
        label_map[row["row_off"] :, row["col_off"] :][: row["height"], : row["width"]] = own
    assert sum(signs) == 9
    void = checkpoint.classes.ignore_index
    np.testing.assert_array_equal(label_map == void, (drawn == NODATA).any(0))


def test_values_are_those_that_the_scene_gives(tmp_path: Path) -> None:
    drawn = samples(70, 80)
    drawn[2, 10:20] = NODATA
    path = write(tmp_path / "a.tif", drawn)
    scene = describe(path, "7", bands={name: name for name in BANDS})
    for row in rasters(windows(path)):
        window = dataclasses.replace(
            Window(row["col_off"], row["row_off"], row["width"], row["height"]),
            col_off=row["col_off"] - row["core_col_off"],
            row_off=row["row_off"] - row["core_row_off"],
        )
        values, valid = read(scene, window)
        np.testing.assert_array_equal(array(row, "values"), values)
        np.testing.assert_array_equal(array(row, "valid"), valid)
