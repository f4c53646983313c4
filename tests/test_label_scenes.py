"""The label job on scenes, end to end on a real Ray cluster."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
import ukis_csmask
from pyproj import Geod, Transformer
from rio_cogeo.cogeo import cog_validate

from segray import catalog
from segray.classes import Classes
from segray.cut import Area
from segray.errors import SettingsError, SourceError
from segray.export import Export, export
from segray.label import _WINDOWS_PER_BLOCK, Label, _area, _index, _Page, _recipe, label
from segray.labelmap import decode_png
from segray.model import Preprocessing, load, untrained
from segray.predict import Prediction, Predictor, Raster
from segray.report import Report, report
from segray.scene import describe, read
from segray.source import Source
from segray.tile import Scenes, Tiling, Window, cores
from segray.verify import Verify, verify
from tests.benchmarks import scenes
from tests.conftest import real
from tests.graphs import convolutions, described
from tests.graphs import write as write_model
from tests.label_store import newest_run
from tests.rasters import BANDS, DEGREES, DEGREES_GRID, NODATA, UTM, UTM_GRID, samples, write, write_area
from tests.s3 import BUCKET, Server
from tests.stac import NUM_A_PAGE, NUM_FOUND, Api, items, serving
from tests.test_cut import area_of
from tests.test_report import page_data
from tests.test_scene import asset, draw, item_of, numbers

pytestmark = pytest.mark.usefixtures("one_thread")

VOID = 255
CUT = Scenes(size=64, halo=8)  # the model looks 4 pixels around; its stride makes 32 of the halo


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model") / "m.onnx", convolutions(), described())


def rows(sink: str, kind: str) -> list[dict[str, Any]]:
    """What any reader sees."""
    fs, path = fsspec.core.url_to_fs(sink, use_listings_cache=False)
    if not fs.exists(f"{path}/{kind}"):
        return []
    found: list[dict[str, Any]] = (
        pads.dataset(f"{path}/{kind}", filesystem=fs, format="parquet", partitioning="hive").to_table().to_pylist()
    )
    return found


def whole(path: str, model: str) -> np.ndarray:
    """The label map of a scene in one piece."""
    scene = describe(path, "", bands={name: name for name in BANDS})
    everything = Window(0, 0, scene.width, scene.height)
    values, valid = read(scene, everything)
    predictor = Predictor(load(model).to_bytes, tiling=Tiling(size=1024, overlap=0), num_threads=1)
    (prediction,) = predictor.predict_windows([Raster(values=values, valid=valid, core=everything)])
    assert isinstance(prediction, Prediction)
    return prediction.label_map


def stitched(sink: str, uri: str, height: int, width: int) -> np.ndarray:
    """The label maps of a scene's windows, each pixel from the only one that has it; 99 where there is none."""
    label_map, times = np.full((height, width), 99, np.uint8), np.zeros((height, width), int)
    for row in rows(sink, "label_maps"):
        if row["scene"] == uri:
            there = (
                slice(row["row_off"], row["row_off"] + row["height"]),
                slice(row["col_off"], row["col_off"] + row["width"]),
            )
            label_map[there] = decode_png(row["label_map"])
            times[there] += 1
    assert times.max() <= 1
    return label_map


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A run over scenes of all kinds."""

    job: Label
    in_utm: str
    in_degrees: str
    truncated: str
    printed: str
    run: dict[str, Any]


@pytest.fixture(scope="module")
def labelled(
    small_model: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> Labelled:
    folder = tmp_path_factory.mktemp("scenes")
    drawn = samples(150, 200)
    drawn[:, :64, :70] = NODATA  # a window, and a bit of the next
    drawn[2, 100:120, 90:95] = NODATA  # in one band
    in_utm = write(folder / "a" / "scene.tif", drawn)
    in_degrees = write(folder / "b" / "scene.tif", samples(70, 130, seed=1), crs=DEGREES, transform=DEGREES_GRID)
    write(folder / "lacking.tif", samples(40, 50, 2), names=("red", "swir"))
    (folder / "damaged.tif").write_text("no raster")
    truncated = Path(write(folder / "truncated.tif", samples(64, 256), compress="deflate"))
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size * 4 // 5])
    (folder / "notes.md").write_text("no scene")
    job = Label(
        source=str(folder),
        sink=str(tmp_path_factory.mktemp("sink") / "labels"),
        model=small_model,
        scenes=dataclasses.replace(CUT, confidence=True),
        max_rejects=1,
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        label(job)
    return Labelled(
        job=job,
        in_utm=in_utm,
        in_degrees=in_degrees,
        truncated=str(truncated),
        printed=printed.getvalue(),
        run=newest_run(job.sink),
    )


def test_windows_put_together_are_the_label_map_of_the_scene(labelled: Labelled, small_model: str) -> None:
    for path, height, width in ((labelled.in_utm, 150, 200), (labelled.in_degrees, 70, 130)):
        expected = whole(path, small_model)
        assert len(np.unique(expected)) >= 3
        np.testing.assert_array_equal(stitched(labelled.job.sink, f"file://{path}", height, width), expected)


def test_areas_of_classes_and_void_add_up_to_the_footprint_on_the_ellipsoid(labelled: Labelled) -> None:
    statistics, label_maps = rows(labelled.job.sink, "statistics"), rows(labelled.job.sink, "label_maps")
    for path in (labelled.in_utm, labelled.in_degrees):
        scene = describe(path, "")
        own = {row["image_id"]: row for row in label_maps if row["scene"] == f"file://{path}"}
        of_classes = sum(row["area_m2"] for row in statistics if row["image_id"] in own)
        of_void = 0.0
        for row in own.values():
            label_map = decode_png(row["label_map"])
            there = Window(row["col_off"], row["row_off"], row["width"], row["height"])
            of_void += float(scene.pixel_areas(there)[label_map == VOID].sum())
        assert of_classes + of_void == pytest.approx(footprint(path), rel=1e-6)
        assert (of_void > 0) == (path == labelled.in_utm)


def footprint(path: str) -> float:
    """A scene's area by its outline."""
    with rasterio.open(path) as file:
        corners = [(0, 0), (file.width, 0), (file.width, file.height), (0, file.height)]
        outline = np.array([file.transform @ corner for corner in [*corners, corners[0]]])
        if file.crs.to_epsg() == 4326:  # its upper and lower edges are parallels, and no geodesics
            outline = shapely.get_coordinates(shapely.segmentize(shapely.LineString(outline), 1e-5))
        lons, lats = Transformer.from_crs(file.crs, DEGREES, always_xy=True).transform(*outline.T)
    return abs(Geod(ellps="WGS84").polygon_area_perimeter(lons, lats)[0])


def test_statistics_count_the_pixels_that_have_data(labelled: Labelled) -> None:
    statistics = rows(labelled.job.sink, "statistics")
    for row in rows(labelled.job.sink, "label_maps"):
        label_map = decode_png(row["label_map"])
        counted = {r["class_id"]: r["num_pixels"] for r in statistics if r["image_id"] == row["image_id"]}
        ids, counts = np.unique(label_map[label_map != VOID], return_counts=True)
        assert counted == dict(zip(ids.tolist(), counts.tolist(), strict=True))


def test_kept_confidence_is_that_of_the_pixels_that_have_a_class(labelled: Labelled) -> None:
    statistics = rows(labelled.job.sink, "statistics")
    for row in rows(labelled.job.sink, "label_maps"):
        label_map, confidence = decode_png(row["label_map"]), decode_png(row["confidence"])
        np.testing.assert_array_equal(confidence == 0, label_map == VOID)
        for told in statistics:
            if told["image_id"] == row["image_id"]:
                mean = confidence[label_map == told["class_id"]].mean() / 255
                assert mean == pytest.approx(told["mean_confidence"], abs=0.5 / 255)
    verify(Verify(sink=labelled.job.sink))


def test_a_window_without_data_is_a_label_map_of_void(labelled: Labelled) -> None:
    (row,) = (
        row for row in rows(labelled.job.sink, "label_maps") if row["uri"] == f"file://{labelled.in_utm}#0,0,64,64"
    )
    assert (decode_png(row["label_map"]) == VOID).all()


def test_scenes_that_cannot_be_labelled_are_rejects_and_nothing_else_is_lost(labelled: Labelled) -> None:
    rejects = rows(labelled.job.sink, "rejects")
    found = {
        (row["uri"].rpartition("/")[2].partition("#")[0], row["stage"], row["reason"].partition(":")[0])
        for row in rejects
    }
    assert found == {
        ("damaged.tif", "decode", "not a raster"),
        ("lacking.tif", "decode", "bands missing"),
        ("truncated.tif", "decode", "truncated"),
    }
    label_maps = rows(labelled.job.sink, "label_maps")
    by_scene = Counter(row["scene"] for row in label_maps)
    assert by_scene[f"file://{labelled.in_utm}"] == 12 and by_scene[f"file://{labelled.in_degrees}"] == 6
    of_truncated = by_scene[f"file://{labelled.truncated}"]
    assert 0 < of_truncated < 4
    counts = labelled.run["counts"]
    assert counts == {
        "seen": 12 + 6 + 4 + 2,
        "labelled": 12 + 6 + of_truncated,
        "rejected": 2 + 4 - of_truncated,
        "present": 0,
        "other_files": 1,
    }


def test_the_summary_speaks_of_windows_scenes_and_hectares(labelled: Labelled) -> None:
    statistics = rows(labelled.job.sink, "statistics")
    for told in labelled.run["classes"]:
        area_m2 = sum(row["area_m2"] for row in statistics if row["class_id"] == told["class_id"])
        assert told["area_m2"] == pytest.approx(area_m2, rel=1e-9)
        assert re.search(rf"{told['class_name']} │.*│ +{area_m2 / 10_000:,.2f} │", labelled.printed)
    assert re.search(r"windows ", labelled.printed)
    assert re.search(r"other files, not scenes\s+│\s+1 ", labelled.printed)
    assert "image" not in labelled.printed


def test_a_scene_is_labelled_as_its_quarters_are(small_model: str, ray_cluster: None, tmp_path: Path) -> None:
    side, size = 300, CUT.size
    assert size is not None
    scene = tmp_path / "scenes/whole.tif"
    write(scene, samples(side, side))
    begin = scenes.write_quarters(tmp_path / "scenes/quarters", scene, side, size)
    sink = str(tmp_path / "labels")
    label(Label(source=str(tmp_path / "scenes"), sink=sink, model=small_model, scenes=CUT))
    assert scenes.num_alike(sink, sink, begin, side, size) == 25


def test_no_process_of_a_run_holds_a_scene(small_model: str, tmp_path: Path) -> None:
    path, side = tmp_path / "scene.tif", 40_000  # 12.8 GB; what is not written takes no room in the file
    place: dict[str, Any] = {"crs": UTM, "transform": UTM_GRID, "nodata": NODATA}
    how = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "sparse_ok": True, "bigtiff": "yes"}
    with rasterio.open(path, "w", width=side, height=side, count=4, dtype="uint16", **place, **how) as file:
        file.descriptions = BANDS
        file.write(samples(2048, 2048).astype(np.uint16), window=(slice(2048), slice(2048)))
    area_of(describe(str(path), ""), tmp_path / "area.json", Window(100, 100, 1800, 1800))
    cut = ("--scenes.size", 1024, "--scenes.area", tmp_path / "area.json")
    memory = scenes.label(path, tmp_path / "labels", "--model", small_model, *cut)
    assert newest_run(str(tmp_path / "labels"))["counts"]["labelled"] == 4
    assert {"ray::MapBatches", "ray::MapWorker"} <= memory.own.keys()
    assert max(memory.own.values()) < scenes.MAX_BYTES


def test_a_second_run_does_nothing_and_opens_no_scene(labelled: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "describe", pytest.fail)
    before = listing(Path(labelled.job.sink))
    label(labelled.job)
    run = newest_run(labelled.job.sink)
    counts = labelled.run["counts"]
    assert run["counts"] == {**counts, "labelled": 0, "rejected": 0, "present": counts["seen"]}
    parts = {name for name in listing(Path(labelled.job.sink)) - before if not name.startswith(("runs/", "lock/"))}
    assert parts == set()


def test_a_scene_of_many_windows_is_in_few_blocks_from_the_first_on(monkeypatch: pytest.MonkeyPatch) -> None:
    page = _Page(
        loose=pa.table({"uri": [str(number) for number in range(70)]}),
        shards=pa.table({"uri": pa.array([], pa.string())}),
        num_present=0,
        num_shards_done=0,
        num_in_shards_done=0,
        is_unversioned=False,
    )
    monkeypatch.setattr("segray.label._NUM_SMALL_BLOCKS", 10)
    nothing = dataclasses.replace(page, loose=page.loose.slice(0, 0))
    index = _index(iter([nothing, page, page]), Source("."), (4, 4, 10), 3, 1)
    assert [block.num_rows for block in index.blocks] == [3, *[7] * 9, 4, *[10] * 7]


def test_tasks_decode_a_scene_in_tiles_fewer_than_three_times() -> None:
    side, tile, cut = 10_980, 1024, Scenes(size=1024)  # of Sentinel-2
    windows = cores(side, side, 1024)
    per_task, *_ = _WINDOWS_PER_BLOCK
    num_decoded = 0
    for first in range(0, len(windows), per_task):
        around = [cut.around(core, side, side) for core in windows[first : first + per_task]]
        num_decoded += len(
            {
                (row // tile, col // tile)
                for one in around
                for row in (one.rows.start, one.row_off + one.height // 2, one.rows.stop - 1)
                for col in (one.cols.start, one.col_off + one.width // 2, one.cols.stop - 1)
            }
        )
    assert num_decoded < 3 * math.ceil(side / tile) ** 2


@pytest.fixture
def scene(tmp_path: Path) -> str:
    return write(tmp_path / "scenes" / "scene.tif", samples(130, 130))


def job_of(scene: str, model: str, **more: Any) -> Label:
    folder = Path(scene).parent
    return Label(
        **{"source": str(folder), "sink": str(folder.parent / "labels"), "model": model, "scenes": CUT, **more}
    )


@pytest.mark.slow
def test_a_run_with_a_bound_goes_on_the_next_time(scene: str, small_model: str, ray_cluster: None) -> None:
    job = job_of(scene, small_model)
    label(dataclasses.replace(job, max_images=5))
    run = newest_run(job.sink)
    assert (run["ended"], run["counts"]["labelled"], run["counts"]["seen"]) == ("at its bound", 5, 5)
    label(job)
    assert newest_run(job.sink)["counts"]["labelled"] == 4
    np.testing.assert_array_equal(stitched(job.sink, f"file://{scene}", 130, 130), whole(scene, small_model))


def test_a_dry_run_tells_of_windows_and_writes_nothing(
    scene: str, small_model: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(scene, small_model, dry_run=True, sample=9)
    label(job)
    printed = capsys.readouterr().out
    assert re.search(r"windows to label\s+│\s+9 ", printed)
    assert re.search(r"about 9 windows in 0:.* at the [\d.]+ windows/s of a sample", printed)
    assert "image" not in printed
    assert not Path(job.sink).exists()


def test_an_area_cuts_what_is_labelled_and_the_model_sees_beyond_it(
    scene: str, small_model: str, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = Window(10, 70, 50, 40)
    area_of(describe(scene, ""), tmp_path / "area.geojson", wanted)
    far = write(Path(scene).parent / "far.tif", samples(20, 20), crs=DEGREES, transform=DEGREES_GRID)
    scenes = dataclasses.replace(CUT, area=str(tmp_path / "area.geojson"))
    job = job_of(scene, small_model, scenes=scenes)
    label(job)
    assert f"1 of 2 scenes lie outside of {scenes.area}" in capsys.readouterr().err
    assert [row["uri"].rpartition("#")[2] for row in rows(job.sink, "label_maps")] == ["0,64,64,64"]
    expected = np.full((130, 130), VOID, np.uint8)
    expected[wanted.rows, wanted.cols] = whole(scene, small_model)[wanted.rows, wanted.cols]
    expected[:64], expected[128:], expected[:, 64:] = 99, 99, 99
    np.testing.assert_array_equal(stitched(job.sink, f"file://{scene}", 130, 130), expected)
    assert far and sum(row["num_pixels"] for row in rows(job.sink, "statistics")) == 50 * 40


def test_where_all_lies_outside_of_the_area_the_run_says_so(
    scene: str, small_model: str, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    area = write_area(tmp_path / "area.geojson", [(10.0, 50.0), (11.0, 50.0), (11.0, 51.0)])
    job = job_of(scene, small_model, scenes=dataclasses.replace(CUT, area=area))
    label(job)
    assert f"1 of 1 scenes lie outside of {area}; nothing of them is labelled" in capsys.readouterr().err
    assert newest_run(job.sink)["counts"]["seen"] == 0


def test_a_search_is_asked_once_and_an_area_read_once(
    small_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    area = write_area(tmp_path / "area.geojson", [(-88.0, 30.0), (-87.0, 30.0), (-87.0, 31.0)])
    loaded, load_area = [], Area.load

    def load_(uri: str) -> Area:
        loaded.append(uri)
        return load_area(uri)

    monkeypatch.setattr(Area, "load", load_)
    Api.asked.clear()
    with serving(Api) as api:
        scenes = dataclasses.replace(CUT, area=area)
        source, sink = f"{api}/search?collections=s2", str(tmp_path / "labels")
        label(Label(source=source, sink=sink, model=small_model, scenes=scenes, dry_run=True))
    assert re.search(rf"windows to label\s+│\s+{NUM_FOUND} ", capsys.readouterr().out), "as their files are missing"
    assert [path for _, path, _ in Api.asked].count("/search") == -(-NUM_FOUND // NUM_A_PAGE)
    assert loaded == [area]


def test_a_dry_run_of_a_search_that_finds_nothing_says_so(
    small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Api) as api:
        source, sink = f"{api}/search?collections=empty", str(tmp_path / "labels")
        label(Label(source=source, sink=sink, model=small_model, scenes=CUT, dry_run=True))
    assert "nothing to do" in capsys.readouterr().out


def test_a_manifest_of_scenes_on_s3_is_labelled_and_not_opened_again(
    scene: str, small_model: str, s3: Server, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"s3://{BUCKET}/scenes-of-a-manifest"
    fs, _ = fsspec.core.url_to_fs(root, use_listings_cache=False)
    fs.pipe({f"{root}/in/scene.tif": Path(scene).read_bytes(), f"{root}/m.txt": b"in/scene.tif\nin/late.tif\n"})
    job = job_of(scene, small_model, source=f"{root}/m.txt", sink=f"{root}/labels", max_rejects=1)
    label(job)
    assert newest_run(job.sink)["counts"] == {"seen": 10, "labelled": 9, "rejected": 1, "present": 0, "other_files": 0}
    np.testing.assert_array_equal(stitched(job.sink, f"{root}/in/scene.tif", 130, 130), whole(scene, small_model))
    assert [(row["uri"], row["version"]) for row in rows(job.sink, "rejects")] == [(f"{root}/in/late.tif", "")]

    # What was missing is there, and the other one is not looked into.
    fs.pipe_file(f"{root}/in/late.tif", Path(scene).read_bytes())
    opened: list[str] = []

    def describe_(uri: str, *arguments: Any, **more: Any) -> Any:
        opened.append(uri)
        return describe(uri, *arguments, **more)

    monkeypatch.setattr(catalog, "describe", describe_)
    label(job)
    assert set(opened) == {f"{root}/in/late.tif"}
    counts = newest_run(job.sink)["counts"]
    assert (counts["seen"], counts["labelled"], counts["present"]) == (18, 9, 9)
    assert rows(job.sink, "rejects") == []


@pytest.mark.parametrize("kind", [pytest.param("a file a band", marks=pytest.mark.slow), "an item of a saved search"])
def test_scenes_that_are_no_file_are_verified_shown_and_exported(
    kind: str, small_model: str, ray_cluster: None, tmp_path: Path
) -> None:
    for number, band in enumerate(samples(70, 90), 1):
        write(tmp_path / f"L_B{number}.TIF", band[None], names=())
    assets = {name: {"href": f"./L_B{number}.TIF"} for number, name in enumerate(BANDS, 1)}
    item: dict[str, Any] = {
        **{"type": "Feature", "stac_version": "1.0.0", "id": "S2/1", "geometry": None, "links": []},
        **{"properties": {"datetime": "2026-06-01T10:11:12Z"}},
        "assets": {name: asset | {"eo:bands": [{"name": name}]} for name, asset in assets.items()},
    }
    (tmp_path / "found.json").write_text(json.dumps({"type": "FeatureCollection", "features": [item]}))
    bands = tuple(f"{name}=B{number}" for number, name in enumerate(BANDS, 1))
    source, scene, scenes = {
        "a file a band": ("L_{band}.TIF", "L_{band}.TIF", dataclasses.replace(CUT, bands=bands)),
        "an item of a saved search": ("found.json", "found.json#S2%2F1", CUT),
    }[kind]
    job = Label(source=f"{tmp_path}/{source}", sink=f"{tmp_path}/labels", model=small_model, scenes=scenes)
    label(job)
    assert {row["scene"] for row in rows(job.sink, "label_maps")} == {f"file://{tmp_path}/{scene}"}
    verify(Verify(sink=job.sink, source=job.source))
    [gallery, *others] = page_data(report(Report(sink=job.sink)))["galleries"]
    shown = [image for group in (gallery, *others) for image in group["images"]]
    assert len(shown) == 4
    assert not [image["missing"] for image in shown if image["missing"]]
    export(Export(sink=job.sink, dest=f"{tmp_path}/maps"))
    [written] = (json.loads(path.read_text()) for path in (tmp_path / "maps").rglob("*.json"))
    assert written["properties"]["datetime"] == (item["properties"]["datetime"] if "#" in scene else None)


@pytest.mark.slow
def test_rejects_of_scenes_are_taken_up_again_on_request_and_go_once_they_are_labelled(
    scene: str, small_model: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(scene).read_bytes()

    def hold(held: bytes) -> None:
        Path(scene).write_bytes(held)
        os.utime(scene, (1e9, 1e9))  # so the version stays

    hold(bytes(len(data)))
    job = job_of(scene, small_model, max_rejects=1)
    label(job)
    assert [row["uri"] for row in rows(job.sink, "rejects")] == [f"file://{scene}"]
    hold(data)
    for retry_rejects, num_windows in ((False, 0), (True, 9)):
        label(dataclasses.replace(job, dry_run=True, retry_rejects=retry_rejects))
        assert re.search(rf"windows to label\s+│\s+{num_windows} ", capsys.readouterr().out)
    label(dataclasses.replace(job, retry_rejects=True))
    assert rows(job.sink, "rejects") == []
    np.testing.assert_array_equal(stitched(job.sink, f"file://{scene}", 130, 130), whole(scene, small_model))


def test_every_setting_of_scenes_makes_another_recipe_and_so_does_what_the_area_holds(
    small_model: str, tmp_path: Path
) -> None:
    checkpoint, path = load(small_model), tmp_path / "area.geojson"
    write_area(path, [(10.0, 50.0), (11.0, 50.0), (11.0, 51.0)])
    others = {"size": 128, "halo": 32, "area": str(path), "bands": ("red=1", "green=2", "blue=3", "nir=4")}
    others |= {"scale": 0.5, "offset": 1.0, "nodata": 7.0, "confidence": True}
    assert others.keys() == {field.name for field in dataclasses.fields(Scenes)}

    def recipe(**settings: Any) -> str:
        job = Label(source=".", sink="../labels", model=small_model, scenes=dataclasses.replace(CUT, **settings))
        found: str = _recipe(job, checkpoint, _area(job))["recipe"]
        return found

    found = [recipe(), *(recipe(**{name: value}) for name, value in others.items())]
    assert len(set(found)) == len(found)
    same = path.rename(tmp_path / "moved.geojson")
    assert recipe(area=str(same)) == recipe(area=f"file://{same}") == found[list(others).index("area") + 1]
    write_area(same, [(10.0, 50.0), (11.0, 50.0), (11.0, 52.0)])
    assert recipe(area=str(same)) not in found


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a CRF": ({"crf": True}, "--crf is of images, which it sees whole; leave it out beside --scenes.size"),
    "a bound of pixels": ({"max_pixels": 100}, "--max-pixels is of images; leave it out beside --scenes.size"),
    "tiles": ({"tiling": Tiling(size=512)}, "--tiling is of images; .* sees a window whole"),
    "a model of bands without windows": ({"scenes": Scenes()}, "sees the bands red, green, blue, nir of scenes; give"),
    "a type beside a graph": ({"dtype": "bfloat16"}, "stands in its graph; leave it out"),
    "an area that is none": ({"scenes": Scenes(size=64, area="nowhere.geojson")}, "--scenes.area nowhere.geojson"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_runs(name: str, scene: str, small_model: str) -> None:
    settings, message = REFUSED[name]
    if name == "a model of bands without windows":
        message = message.replace("give", "give --scenes.size, such as 1024")
    with pytest.raises(SettingsError, match=message):
        label(job_of(scene, small_model, **settings))
    assert not (Path(scene).parent.parent / "labels").exists()


@pytest.mark.parametrize(
    ("classes", "preprocessing", "message"),
    [
        (("a", "b"), Preprocessing(resize=64), "resizes images to 64 pixels, and a window of a scene has no size"),
        (Classes(("a", "b"), ignore_index=-1), Preprocessing(), r"ignore_index -1, .* must lie in \[0, 255\]"),
    ],
)
def test_a_model_that_cannot_see_windows_is_refused(
    classes: Classes | tuple[str, ...], preprocessing: Preprocessing, message: str, scene: str, tmp_path: Path
) -> None:
    named = classes if isinstance(classes, Classes) else Classes(classes)
    path = tmp_path / "m.safetensors"
    path.write_bytes(untrained("unet_resnet18", named, preprocessing=preprocessing).to_bytes())
    with pytest.raises(SettingsError, match=message):
        label(job_of(scene, str(path)))


def test_a_source_without_scenes_is_refused(small_model: str, tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "notes.md").write_text("no scene")
    with pytest.raises(SourceError, match="holds no scenes, only 1 files of other kinds"):
        label(job_of(str(tmp_path / "scenes" / "scene.tif"), small_model))


@pytest.fixture(scope="session")
def landsat() -> Path:
    """A part of a Landsat 8 scene: a file a band, and its MTL file."""
    return real("landsat8-cloudy")


def reflectance(mtl: Path) -> tuple[float, float]:
    """Of all bands but the thermal ones: by what samples are multiplied, and what is added then."""
    fields = dict(re.findall(r"(\w+) = (\S+)", mtl.read_text()))
    sine = math.sin(math.radians(float(fields["SUN_ELEVATION"])))
    return tuple(float(fields[f"REFLECTANCE_{name}_BAND_4"]) / sine for name in ("MULT", "ADD"))  # type: ignore[return-value]


def test_clouds_of_a_landsat_scene_on_s3_are_labelled_by_the_published_model(
    landsat: Path, tmp_path: Path, s3: Server, ray_cluster: None
) -> None:
    root = "s3://segray/landsat"
    fs, _ = fsspec.core.url_to_fs(root, use_listings_cache=False)
    for band in ("B2", "B3", "B4", "B5", "BQA"):
        fs.put(str(landsat / f"l8_{band}.tif"), f"{root}/l8_{band}.tif")
    scale, offset = reflectance(landsat / "l8_MTL.txt")
    (tmp_path / "classes.txt").write_text("clear\ncloud\nshadow\n")
    job = Label(
        source=f"{root}/*_{{band}}.tif",
        sink=f"{root}-labels",
        model=str(Path(ukis_csmask.__file__).with_name("model_4b_l1c.onnx")),
        classes=str(tmp_path / "classes.txt"),
        tiling=Tiling(overlap=205),  # 51 of the 256 pixels that the model takes
        scenes=Scenes(size=1024, bands=("blue=B2", "green=B3", "red=B4", "nir=B5"), scale=scale, offset=offset),
    )
    label(job)
    counts = newest_run(job.sink)["counts"]
    assert counts == {"seen": 1, "labelled": 1, "rejected": 0, "present": 0, "other_files": 0}
    [row] = rows(job.sink, "label_maps")
    assert (row["scene"], row["crs"], row["height"], row["width"]) == (
        f"{root}/l8_{{band}}.tif",
        "EPSG:32616",
        603,
        627,
    )
    statistics = pa.Table.from_pylist(rows(job.sink, "statistics")).sort_by("class_id")
    # Clear, cloud and shadow, as the model says of the whole scene without this job.
    assert statistics["num_pixels"].to_pylist() == pytest.approx([71975, 247329, 58777], rel=0.01)
    assert sum(statistics["area_m2"].to_pylist()) == pytest.approx(603 * 627 * 900, rel=0.01)
    label(job)
    assert newest_run(job.sink)["counts"] == counts | {"labelled": 0, "present": 1}

    export(Export(sink=job.sink, dest=f"{root}-maps", processes=1))
    fs.get(f"{root}-maps/", f"{tmp_path}/maps/", recursive=True)
    [raster], [polygons] = ([*(tmp_path / "maps").rglob(f"l8_*{suffix}")] for suffix in (".tif", ".parquet"))
    assert cog_validate(str(raster), strict=True, quiet=True)[0]
    with rasterio.open(raster) as exported, rasterio.open(landsat / "l8_BQA.tif") as quality:
        assert (exported.transform, exported.crs) == (quality.transform, quality.crs)
        label_map = exported.read(1)
        is_cloud = quality.read(1) >> 14 == 3  # with high confidence
    np.testing.assert_array_equal(label_map, decode_png(row["label_map"]))
    assert (label_map[is_cloud] == 1).mean() > 0.99, "what the quality band is sure of"
    hectares = pq.read_table(polygons).group_by("class_name").aggregate([("area_m2", "sum")]).sort_by("class_name")
    by_name = statistics.sort_by("class_name")
    assert hectares["class_name"].to_pylist() == by_name["class_name"].to_pylist() == ["clear", "cloud", "shadow"]
    assert hectares["area_m2_sum"].to_pylist() == pytest.approx(by_name["area_m2"].to_pylist(), rel=1e-9)


def test_a_search_labels_what_is_new_in_the_area_alone(tmp_path: Path, ray_cluster: None) -> None:
    draw(tmp_path / "a.tif", np.stack([numbers(64, 96, seed=band) for band in range(4)]) % 4)
    one = item_of({"data": asset(str(tmp_path / "a.tif"), *(f"{name}={name}" for name in BANDS))})
    (tmp_path / "results.json").write_text(json.dumps(items(one)))
    left = describe(str(tmp_path / "a.tif"), "1").bounds(Window(0, 0, 20, 64))
    ring = [[left[0], left[1]], [left[2], left[1]], [left[2], left[3]], [left[0], left[3]], [left[0], left[1]]]
    (tmp_path / "area.json").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    job = Label(
        source=str(tmp_path / "results.json"),
        sink=str(tmp_path / "labels"),
        model=write_model(tmp_path / "m.onnx", convolutions(), described()),
        scenes=Scenes(size=32, halo=32, area=str(tmp_path / "area.json")),
    )
    label(dataclasses.replace(job, dry_run=True))
    label(job)
    found = rows(job.sink, "label_maps")
    scene = f"file://{tmp_path}/results.json#one"
    assert sorted(row["uri"] for row in found) == [f"{scene}#0,{top},32,32" for top in (0, 32)]
    label(job)
    counts = newest_run(job.sink)["counts"]
    assert counts == {"seen": 2, "labelled": 0, "rejected": 0, "present": 2, "other_files": 0}
    with serving(Api) as api:
        label(dataclasses.replace(job, source=f"{api}/search?collections=empty"))
    assert newest_run(job.sink)["counts"]["seen"] == 0


def test_bands_that_the_model_does_not_see_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", convolutions(), described())
    draw(tmp_path / "x_B4.tif", numbers(64, 96))
    scenes = Scenes(size=32, bands=("red=B4", "green=B3", "blue=B2"))
    job = Label(source=f"{tmp_path}/*_{{band}}.tif", sink=f"{tmp_path}-labels", model=path, scenes=scenes)
    with pytest.raises(SettingsError, match="sees the bands red, green, blue, nir, and the scene has red, green, blue"):
        label(job)
