import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import rasterio
from rio_cogeo.cogeo import cog_validate

from segray.classes import Classes
from segray.decode import decode
from segray.demo import CLASSES, Draw, draw, encoded, mosaic, scene
from segray.errors import SettingsError, SinkError
from segray.evaluate import Evaluate, evaluate
from segray.export import Export, export
from segray.label import Label, label
from segray.labelmap import decode_png
from segray.report import Report, report
from segray.scene import describe, read
from segray.tile import Scenes, Window
from segray.verify import Verify, verify

SEEDS = range(40, 52)


def test_a_seed_is_one_scene_and_another_seed_another() -> None:
    image, target = scene(7)
    again, target_again = scene(7)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(target, target_again)
    other, _ = scene(8)
    assert image.shape != other.shape or (image != other).mean() > 0.5


def test_a_target_fits_its_image_and_all_classes_occur() -> None:
    sizes, ids = set(), set()
    for seed in SEEDS:
        image, target = scene(seed)
        assert image.dtype == target.dtype == np.uint8
        assert image.shape == (*target.shape, 3)
        assert target.max() < len(CLASSES)
        sizes.add(target.shape)
        ids |= set(np.unique(target).tolist())
    assert ids == set(range(len(CLASSES)))
    assert len(sizes) > 1, "the labelling job is shown mixed sizes"


def test_the_target_is_where_the_plants_are() -> None:
    greenness: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        image, target = scene(seed)
        excess = 2.0 * image[..., 1] - image[..., 0] - image[..., 2]
        is_plant = np.isin(target, (1, 2))
        for of_plants in (True, False):
            greenness[of_plants].append(float(np.median(excess[is_plant == of_plants])))
    assert min(greenness[True]) > 15
    assert max(greenness[False]) < 15


def test_colour_alone_does_not_tell_crop_from_weed() -> None:
    pixels: dict[int, list[np.ndarray]] = {1: [], 2: []}
    for seed in SEEDS:
        image, target = scene(seed)
        hues = image[..., 0] / (image.sum(axis=2) + 1.0)
        for class_id, found in pixels.items():
            found.append(hues[target == class_id])
    crop, weed = (np.concatenate(found) for found in pixels.values())
    thresholds = np.linspace(0, 1, 101)[:, None]
    balanced = [((weed > t).mean() + (crop <= t).mean()) / 2 for t in thresholds]
    assert 0.5 < max(balanced) < 0.9


def test_the_formats_hold_the_same_bytes(tmp_path: Path) -> None:
    num_scenes, first_seed = 5, 300
    for form in ("loose", "tar", "parquet"):
        sink = str(tmp_path / form)
        draw(Draw(sink=sink, num_scenes=num_scenes, first_seed=first_seed, format=form, shard_scenes=3))
    expected = {name: (image, target) for name, image, target in map(encoded, range(300, 305))}

    loose = {
        path.stem: (path.read_bytes(), (tmp_path / "loose/targets" / f"{path.stem}.png").read_bytes())
        for path in (tmp_path / "loose/images").iterdir()
    }
    members: dict[str, bytes] = {}
    for shard in sorted((tmp_path / "tar").glob("shard-*.tar")):
        with tarfile.open(shard) as archive:
            for entry in archive:
                file = archive.extractfile(entry)
                assert file is not None
                members[entry.name] = file.read()
    tar = {
        name.removesuffix(".jpg"): (members[name], members[name.replace(".jpg", ".target.png")])
        for name in members
        if name.endswith(".jpg")
    }
    tables = [pq.read_table(shard) for shard in sorted((tmp_path / "parquet").glob("shard-*.parquet"))]
    parquet = {row["name"]: (row["image"], row["target"]) for table in tables for row in table.to_pylist()}
    assert [table.num_rows for table in tables] == [3, 2]
    assert len(members) == 2 * num_scenes
    assert loose == tar == parquet == expected


def test_what_is_written_decodes_to_the_scene(tmp_path: Path) -> None:
    draw(Draw(sink=str(tmp_path), num_scenes=2, first_seed=11))
    for seed in (11, 12):
        image, target = scene(seed)
        seen = decode((tmp_path / f"images/scene-{seed:07d}.jpg").read_bytes(), 10**6)
        assert np.abs(seen.astype(int) - image).mean() < 6
        np.testing.assert_array_equal(decode_png((tmp_path / f"targets/scene-{seed:07d}.png").read_bytes()), target)


def test_a_shard_is_the_same_bytes_whenever_it_is_drawn(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        draw(Draw(sink=str(tmp_path / folder), num_scenes=2, format="tar"))
    a, b = ((tmp_path / folder / "shard-000000.tar").read_bytes() for folder in ("a", "b"))
    assert a == b
    assert tarfile.open(fileobj=io.BytesIO(a)).getnames()[:2] == ["scene-1000000.jpg", "scene-1000000.target.png"]


def test_the_classes_file_reads_as_the_classes_and_tells_the_command(tmp_path: Path) -> None:
    job = Draw(sink=str(tmp_path), num_scenes=1)
    draw(job)
    assert Classes.read(str(tmp_path / "classes.json")) == CLASSES
    assert json.loads((tmp_path / "classes.json").read_text())["command"] == job.command()


def test_the_command_line_draws(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "segray.demo", str(tmp_path / "sink"), "--num-scenes", "1", "--format", "parquet"]
    subprocess.run(command, check=True, timeout=60)
    (name,) = pq.read_table(tmp_path / "sink/shard-000000.parquet")["name"].to_pylist()
    assert name == "scene-1000000"


@pytest.mark.parametrize("settings", [{"num_scenes": 0}, {"first_seed": -1}, {"shard_scenes": 0}])
def test_numbers_out_of_bounds_are_refused(settings: dict[str, int]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')} {value}"):
        Draw(sink="somewhere", **settings)  # type: ignore[arg-type]


def test_a_sink_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SinkError, match="file"):
        draw(Draw(sink=str(tmp_path / "file"), num_scenes=1))


def test_drawing_needs_neither_torch_nor_ray_nor_gdal() -> None:
    code = "import sys, segray.demo; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'rasterio')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_mosaic_holds_scenes_side_by_side_within_a_slanted_swath() -> None:
    image, target, is_seen = mosaic(range(40, 43))
    assert image.shape == (2 * 288, 2 * 320, 4)
    first, first_target = scene(40)
    last, last_target = scene(42)
    np.testing.assert_array_equal(image[:288, :320, :3], first[:288, :320])
    np.testing.assert_array_equal(target[:288, :320], first_target[:288, :320])
    np.testing.assert_array_equal(image[288:, :320, :3], last[:288, :320])
    np.testing.assert_array_equal(target[288:, :320], last_target[:288, :320])
    assert not is_seen[288:, 320:].any(), "there is no fourth"
    begins = is_seen[:288].argmax(axis=1)
    assert (begins[0], begins[-1]) == (144, 73), "the swath's left edge"
    assert is_seen[0, -1]
    assert not is_seen[4:288, -1].any(), "its right edge"
    is_plant = np.isin(target, (1, 2))
    assert np.median(image[is_plant, 3]) > np.median(image[~is_plant & is_seen, 3]) + 50


def test_a_raster_holds_a_mosaic_as_an_instrument_delivers_it(tmp_path: Path) -> None:
    draw(Draw(sink=str(tmp_path), num_scenes=2, first_seed=40, format="raster"))
    image, target, is_seen = mosaic(range(40, 42))
    fields, targets = tmp_path / "rasters/fields.tif", tmp_path / "targets/fields.tif"
    for path in (fields, targets):
        assert cog_validate(path)[0]
    scene_ = describe(str(fields), "1")
    assert [band.name for band in scene_.bands] == ["red", "green", "blue", "nir"]
    assert scene_.crs == "EPSG:32633"
    values, valid = read(scene_, Window(0, 0, scene_.width, scene_.height))
    np.testing.assert_array_equal(valid, is_seen)
    np.testing.assert_array_equal(values.transpose(1, 2, 0)[valid], image[is_seen])
    with rasterio.open(targets) as raster:
        assert (raster.crs.to_string(), raster.transform[:6]) == (scene_.crs, scene_.transform)
        np.testing.assert_array_equal(raster.read(1), np.where(is_seen, target, 255))
        assert raster.nodata == 255
        assert [raster.colormap(1)[index][:3] for index in range(4)] == list(CLASSES.palette)


def test_the_raster_is_labelled_exported_evaluated_and_shown(tmp_path: Path, ray_cluster: None) -> None:
    draw(Draw(sink=str(tmp_path), num_scenes=4, first_seed=2_000_000, format="raster"))
    rasters, labels = str(tmp_path / "rasters"), str(tmp_path / "labels")
    label(Label(source=rasters, sink=labels, model="segray/demo.safetensors", scenes=Scenes(size=256, halo=64)))
    verify(Verify(sink=labels, source=rasters))
    result = evaluate(Evaluate(sink=labels, targets=str(tmp_path / "targets"))).to_dict()
    assert (result["num_images"], result["images_without_target"]["count"]) == (9, 0)
    assert result["miou"] > 0.65
    assert result["pixel_accuracy"] > 0.88

    _, target, is_seen = mosaic(range(2_000_000, 2_000_004))
    assert result["num_pixels"] == is_seen.sum()
    areas = pads.dataset(tmp_path / "labels/statistics", partitioning="hive").to_table()["area_m2"]
    # In the middle of its zone UTM draws a metre 0.4 ‰ too short.
    assert pc.sum(areas).as_py() == pytest.approx(is_seen.sum() * 0.25 / 0.9996**2, rel=1e-4)

    export(Export(sink=labels, dest=str(tmp_path / "maps"), processes=1))
    [exported] = (tmp_path / "maps").rglob("*.tif")
    with rasterio.open(exported) as raster, rasterio.open(tmp_path / "rasters/fields.tif") as fields:
        label_map = raster.read(1)
        assert raster.bounds == fields.bounds
    np.testing.assert_array_equal(label_map == 255, ~is_seen)
    assert (label_map == target)[is_seen].mean() == result["pixel_accuracy"]

    page = Path(report(Report(sink=labels))).read_text()
    assert page.count('"photo":"data:image/jpeg') == 8, "there are no data in the last window"
