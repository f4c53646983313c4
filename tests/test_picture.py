import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segray.errors import Reject
from segray.picture import picture
from segray.preprocessing import Preprocessing
from segray.rgb import stretched
from segray.tile import Scenes
from tests.label_store import windows
from tests.rasters import TRANSFORM, write_raster

SHAPE = (40, 50)
SCENES = Scenes(size=32)


def samples(num_bands: int) -> np.ndarray:
    """Bands of noise around levels of their own, 0 (nodata) in the last ten columns."""
    rng = np.random.default_rng(0)
    bands = np.stack([1000 * (band + 1) + rng.integers(0, 100 * (band + 1), SHAPE) for band in range(num_bands)])
    bands[:, :, 40:] = 0
    return bands.astype(np.uint16)


def rows(raster: Path, size: int = 32) -> list[dict[str, Any]]:
    """What a label store says of the windows of a raster, row by row."""
    images = windows(raster, np.zeros(SHAPE, np.uint8), size)
    shapes = [dict(zip(("height", "width"), image.label_map.shape, strict=True)) for image in images]
    return [{"version": "1", **image.place, **shape} for image, shape in zip(images, shapes, strict=True)]


def test_red_green_and_blue_are_shown_in_this_order(tmp_path: Path) -> None:
    values = samples(4)
    names = ("nir", "blue", "green", "red")
    raster = write_raster(tmp_path / "a.tif", values, names, nodata=0)
    bands = Preprocessing(channels=("nir", "red"), mean=(0, 0), std=(1, 1))
    _, right, *_ = rows(raster)
    seen = picture(right, bands, SCENES)
    assert seen.shape == (32, 18, 3)
    assert seen.dtype == np.uint8
    part = values[[3, 2, 1], :32, 32:].astype(np.float32)
    valid = np.broadcast_to(np.arange(18) < 8, (32, 18))
    np.testing.assert_array_equal(seen, stretched(part, valid))
    assert (seen[:, 8:] == 0).all()
    assert seen[:, :8].std(axis=(0, 1)).min() > 50


def test_without_colours_the_first_three_bands_are_shown_or_the_first(tmp_path: Path) -> None:
    values = samples(4)
    for num_bands, shown in ((4, [0, 1, 2]), (2, [0, 0, 0])):
        names = ("b1", "b2", "b3", "b4")[:num_bands]
        raster = write_raster(tmp_path / f"{num_bands}.tif", values[:num_bands], names, nodata=0)
        bands = Preprocessing(channels=names[-1:], mean=(0,), std=(1,))
        seen = picture(rows(raster)[0], bands, SCENES)
        part = values[shown, :32, :32].astype(np.float32)
        np.testing.assert_array_equal(seen, stretched(part, np.ones((32, 32), bool)))


def test_the_window_is_on_the_grid_of_the_first_band_that_the_model_saw(tmp_path: Path) -> None:
    fine, coarse = samples(3), samples(1)[:, ::2, ::2]
    for name, band in zip(("red", "green", "blue"), fine, strict=True):
        write_raster(tmp_path / f"{name}.tif", band[None], nodata=0)
    write_raster(tmp_path / "swir.tif", coarse, nodata=0, transform=TRANSFORM @ TRANSFORM.scale(2))
    assets = {
        name: {"href": f"{name}.tif", "type": "image/tiff; application=geotiff", "bands": [{"name": name}]}
        for name in ("red", "green", "blue", "swir")
    }
    item: dict[str, Any] = {
        **{"type": "Feature", "stac_version": "1.1.0", "id": "i", "geometry": None, "links": [], "assets": assets},
        "properties": {"datetime": "2026-06-01T00:00:00Z"},
    }
    (tmp_path / "i.json").write_text(json.dumps(item))
    place = {
        **{"scene": f"file://{tmp_path}/i.json", "version": "1", "crs": "EPSG:32633"},
        **{"col_off": 4, "row_off": 2, "width": 8, "height": 6},
        **dict(zip([f"transform_{letter}" for letter in "abcdef"], [1, 0, 500_004, 0, -1, 5_399_998], strict=True)),
    }
    seen = picture(place, Preprocessing(channels=("swir",), mean=(0,), std=(1,)), SCENES)
    means = fine[:, 4:16, 8:24].reshape(3, 6, 2, 8, 2).astype(np.float32).mean((2, 4))
    assert np.abs(seen.astype(int) - stretched(means, np.ones((6, 8), bool))).max() <= 1


def test_bands_are_called_what_they_were_when_the_scene_was_labelled(tmp_path: Path) -> None:
    values = samples(4)
    raster = write_raster(tmp_path / "a.tif", values, nodata=0)
    for number, band in enumerate(values, 1):
        write_raster(tmp_path / f"L_B{number}.TIF", band[None], nodata=0)
    bands = Preprocessing(channels=("nir", "red"), mean=(0, 0), std=(1, 1))
    row = rows(raster)[0]
    part = values[[0, 1, 2], :32, :32].astype(np.float32)
    for uri, calls in ((row["scene"], "{}"), (f"file://{tmp_path}/L_{{band}}.TIF", "B{}")):
        named = zip(("red", "green", "blue", "nir"), range(1, 5), strict=True)
        scenes = Scenes(size=32, bands=tuple(f"{name}={calls.format(number)}" for name, number in named))
        seen = picture(row | {"scene": uri}, bands, scenes)
        np.testing.assert_array_equal(seen, stretched(part, np.ones((32, 32), bool)))


def test_an_item_of_a_search_that_was_saved_is_found_again(tmp_path: Path) -> None:
    values = samples(2)
    features = []
    for number, band in enumerate(values):
        write_raster(tmp_path / f"{number}.tif", band[None], nodata=0)
        assets = {"nir": {"href": f"./{number}.tif", "type": "image/tiff; application=geotiff"}}
        features.append(
            {
                **{"type": "Feature", "stac_version": "1.1.0", "id": f"S2/{number}", "geometry": None, "links": []},
                **{"assets": assets, "properties": {"datetime": "2026-06-01T00:00:00Z"}},
            }
        )
    (tmp_path / "found.json").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    bands = Preprocessing(channels=("nir",), mean=(0,), std=(1,))
    row = rows(tmp_path / "0.tif")[0]
    calls = Scenes(size=32, bands=("nir=1",))
    seen = picture(row | {"scene": f"file://{tmp_path}/found.json#S2%2F1"}, bands, calls)
    part = np.repeat(values[1:, :32, :32].astype(np.float32), 3, axis=0)
    np.testing.assert_array_equal(seen, stretched(part, np.ones((32, 32), bool)))
    with pytest.raises(Reject, match=r"found\.json holds no item S2/2"):
        picture(row | {"scene": f"file://{tmp_path}/found.json#S2%2F2"}, bands, calls)


def test_a_scene_that_lies_elsewhere_now_is_not_shown(tmp_path: Path) -> None:
    raster = write_raster(tmp_path / "a.tif", samples(3), nodata=0)
    row = rows(raster)[0]
    bands = Preprocessing(channels=("1",), mean=(0,), std=(1,))
    assert picture(row, bands, SCENES).shape == (32, 32, 3)
    for other in ({"transform_c": 500_001.0}, {"crs": "EPSG:32634"}, {"col_off": 500}):
        with pytest.raises(Reject, match="changed: the scene has another grid now"):
            picture(row | other, bands, SCENES)
    with pytest.raises(Reject, match="the model sees the bands red, and the scene has"):
        picture(row, Preprocessing(channels=("red",), mean=(0,), std=(1,)), SCENES)
    with pytest.raises(Reject, match="missing"):
        picture(row | {"scene": f"file://{tmp_path}/b.tif"}, bands, SCENES)
