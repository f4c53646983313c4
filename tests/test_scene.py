import json
import math
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import s3fs
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Geod, Transformer
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.rpc import RPC
from rasterio.vrt import WarpedVRT

from segray.errors import Reject, RunError, SettingsError
from segray.scene import Scene, describe, gdal, read
from segray.scene.gdal import gdal_path
from segray.tile import Window
from tests.proxy import proxy
from tests.s3 import BUCKET, Server

UTM = "EPSG:32616"
NORTH_UP = Affine(10, 0, 452475, 0, -10, 3408645)
WGS84 = Geod(ellps="WGS84")


def draw(
    path: Path, samples: np.ndarray, crs: str | None = UTM, transform: Affine | None = NORTH_UP, **how: Any
) -> str:
    """Writes a raster; (bands, height, width), or a band."""
    samples = samples if samples.ndim == 3 else samples[None]
    more = {name: how.pop(name) for name in ("descriptions", "scales", "offsets", "mask", "colorinterp") if name in how}
    profile = {"driver": "GTiff", "dtype": samples.dtype, "crs": crs, "transform": transform} | how
    count, height, width = samples.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", count=count, height=height, width=width, **profile) as file:
            for name, value in more.items():
                if name == "mask":
                    file.write_mask(value)
                else:
                    setattr(file, name, value)
            file.write(samples)
    return str(path)


def numbers(*shape: int, dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    """Samples between 1 and 100."""
    return np.random.default_rng(seed).integers(1, 101, shape).astype(dtype)


def whole(scene: Scene) -> Window:
    return Window(0, 0, scene.width, scene.height)


def read_all(path: str, **how: Any) -> tuple[np.ndarray, np.ndarray]:
    scene = describe(path, "1", **how)
    return read(scene, whole(scene))


def rejected(make: Callable[[], object]) -> Reject:
    with pytest.raises(Reject) as caught:
        make()
    assert "\n" not in caught.value.reason
    return caught.value


# What a raster is


FORMATS: dict[str, dict[str, Any]] = {
    "striped.tif": {},
    "deflate.tif": {"compress": "deflate", "interleave": "pixel"},
    "tiled.tif": {"tiled": True, "blockxsize": 16, "blockysize": 32, "interleave": "band"},
    "cog.tif": {"driver": "COG", "blocksize": 128, "compress": "lzw"},
    "lossless.jp2": {"driver": "JP2OpenJPEG", "quality": "100", "reversible": "YES"},
    "bigtiff.tif": {"bigtiff": "YES"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_raster_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    samples = numbers(4, 90, 70)
    scene = describe(draw(tmp_path / name, samples, **FORMATS[name]), "7")
    assert (scene.version, scene.height, scene.width, scene.crs) == ("7", 90, 70, UTM)
    assert scene.transform == NORTH_UP[:6]
    values, valid = read(scene, Window(11, 22, 33, 44))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, samples[:, 22:66, 11:44])
    assert valid.all()


def test_a_vrt_is_read_like_what_it_names(tmp_path: Path) -> None:
    for name, dtype in (("a", "uint8"), ("b", "float32")):
        draw(tmp_path / f"{name}.tif", numbers(20, 30, dtype=dtype))
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{index}"><Description>{name}</Description><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">{name}.tif</SourceFilename></SimpleSource></VRTRasterBand>'
        for index, name, kind in ((1, "a", "Byte"), (2, "b", "Float32"))
    )
    path = tmp_path / "both.vrt"
    path.write_text(
        f'<VRTDataset rasterXSize="30" rasterYSize="20"><SRS>{UTM}</SRS>'
        f"<GeoTransform>452475,10,0,3408645,0,-10</GeoTransform>{bands}</VRTDataset>"
    )
    values, valid = read_all(str(path))
    np.testing.assert_array_equal(values, np.stack([numbers(20, 30)] * 2))
    assert valid.all()
    lacking = tmp_path / "lacking.vrt"
    lacking.write_text(path.read_text().replace("b.tif", "gone.tif"))
    assert rejected(lambda: read_all(str(lacking))).stage == "decode"


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1)])
def test_a_raster_one_pixel_wide_or_high_is_one_too(shape: tuple[int, int], tmp_path: Path) -> None:
    path = draw(tmp_path / "thin.tif", numbers(*shape))
    values, valid = read_all(path)
    np.testing.assert_array_equal(values[0], numbers(*shape))
    scene = describe(path, "1")
    assert valid.all() and scene.pixel_areas(whole(scene)).shape == shape


def test_bands_are_called_by_description_else_colour_else_number(tmp_path: Path) -> None:
    samples = numbers(5, 4, 4)
    colours = (ColorInterp.red, ColorInterp.green, ColorInterp.undefined, ColorInterp.nir, ColorInterp.undefined)
    path = draw(tmp_path / "a.tif", samples, colorinterp=colours, descriptions=("", "G", "twice", "", "twice"))
    assert [band.name for band in describe(path, "1").bands] == ["red", "G", "3", "nir", "5"]


def test_select_puts_bands_in_order_by_name_or_number(tmp_path: Path) -> None:
    samples = numbers(3, 4, 5)
    scene = describe(draw(tmp_path / "a.tif", samples, descriptions=("B4", "B3", "B2")), "1")
    some = scene.select(["B2", "1"])
    assert [band.name for band in some.bands] == ["B2", "1"]
    np.testing.assert_array_equal(read(some, whole(some))[0], samples[[2, 0]])
    assert scene.select(["B4", "B3", "B2"]).bands == scene.bands


def test_a_band_that_is_not_there_is_a_reject_that_lists_both_sides(tmp_path: Path) -> None:
    scene = describe(draw(tmp_path / "a.tif", numbers(2, 4, 5), descriptions=("red", "green")), "1")
    reject = rejected(lambda: scene.select(["red", "nir"]))
    assert (reject.stage, reject.kind) == ("decode", "bands missing")
    assert "nir of red, nir" in reject.detail and "red, green" in reject.detail
    assert rejected(lambda: scene.select([])).kind == "no bands"


def test_bands_are_named_by_who_knows_them(tmp_path: Path) -> None:
    samples = numbers(4, 6, 5, dtype="uint8")
    path = draw(tmp_path / "a.tif", samples)  # the fourth of four bands of uint8 is written as alpha
    assert [band.name for band in describe(path, "1").bands] == ["red", "green", "blue"]
    scene = describe(path, "1", bands={"nir": "4", "red": "red"})
    assert [band.name for band in scene.bands] == ["nir", "red"]
    samples[3, 2, 2] = 0
    values, valid = read(describe(draw(tmp_path / "b.tif", samples), "1", bands={"nir": "4"}), Window(0, 0, 5, 6))
    np.testing.assert_array_equal(values[0], samples[3])
    assert valid.all()


def test_a_scene_travels(tmp_path: Path) -> None:
    scene = describe(draw(tmp_path / "a.tif", numbers(3, 9, 7)), "1")
    there = pickle.loads(pickle.dumps(scene))
    assert there == scene
    np.testing.assert_array_equal(read(there, whole(there))[0], numbers(3, 9, 7))


# Where there is data


DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_declared_nodata_is_not_valid(dtype: str, tmp_path: Path) -> None:
    samples = numbers(2, 8, 9, dtype=dtype)
    nodata = {"u": np.iinfo, "i": np.iinfo, "f": np.finfo}[np.dtype(dtype).kind](dtype).min
    samples[0, 3, 4] = samples[1, 5, 6] = nodata
    values, valid = read_all(draw(tmp_path / "a.tif", samples, nodata=float(nodata)))
    assert np.argwhere(~valid).tolist() == [[3, 4], [5, 6]]
    assert (values[:, ~valid] == 0).all()
    np.testing.assert_array_equal(values[:, valid], samples[:, valid].astype(np.float32))


@pytest.mark.parametrize("nodata", [None, math.nan, -9999.0])
def test_nan_and_infinity_are_not_valid_whatever_is_declared(nodata: float | None, tmp_path: Path) -> None:
    samples = numbers(8, 9, dtype="float32")
    samples[1, 2], samples[3, 4], samples[5, 6] = math.nan, math.inf, -9999.0
    _, valid = read_all(draw(tmp_path / "a.tif", samples, nodata=nodata))
    expected = [[1, 2], [3, 4], *([[5, 6]] if nodata == -9999 else [])]
    assert np.argwhere(~valid).tolist() == expected


def test_nodata_that_no_sample_can_be_declares_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    draw(path, numbers(8, 9, dtype="uint8"))
    for nodata in ("-9999", "nan", "7.5"):
        Path(f"{path}.aux.xml").write_text(
            f'<PAMDataset><PAMRasterBand band="1"><NoDataValue>{nodata}</NoDataValue></PAMRasterBand></PAMDataset>'
        )
        scene = describe(str(path), nodata)
        assert read(scene, whole(scene))[1].all()


@pytest.mark.parametrize("where", ["inside", "beside", "alpha", "alpha and nodata"])
def test_a_mask_says_what_is_valid(where: str, tmp_path: Path) -> None:
    mask = np.ones((8, 9), bool)
    mask[2, 3:5] = False
    samples = numbers(3, 8, 9)
    path = tmp_path / "a.tif"
    if where.startswith("alpha"):
        how: dict[str, Any] = {"nodata": 0} if "nodata" in where else {}
        samples[1, 7, 7] = 0
        with_alpha = np.concatenate([samples, mask[None] * np.uint16(65535)])
        draw(path, with_alpha, photometric="RGB", alpha="YES", **how)
        mask[7, 7] = "nodata" not in where
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=where == "inside"):
            draw(path, samples, mask=mask)
        assert Path(f"{path}.msk").exists() == (where == "beside")
    values, valid = read_all(str(path))
    np.testing.assert_array_equal(valid, mask)
    np.testing.assert_array_equal(values, samples * mask)


def test_a_band_may_have_a_mask_of_its_own(tmp_path: Path) -> None:
    masks = np.ones((2, 8, 9), np.uint8)
    masks[0, :2], masks[1, :, :3] = 0, 0
    for name, samples in (("a", numbers(2, 8, 9)), ("masks", masks)):
        draw(tmp_path / f"{name}.tif", samples)
    bands = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{band}">{_source("a", band)}<MaskBand><VRTRasterBand dataType="Byte">'
        f"{_source('masks', band)}</VRTRasterBand></MaskBand></VRTRasterBand>"
        for band in (1, 2)
    )
    path = tmp_path / "a.vrt"
    path.write_text(
        f'<VRTDataset rasterXSize="9" rasterYSize="8"><SRS>{UTM}</SRS>'
        f"<GeoTransform>452475,10,0,3408645,0,-10</GeoTransform>{bands}</VRTDataset>"
    )
    values, valid = read_all(str(path))
    np.testing.assert_array_equal(valid, masks.all(0))
    np.testing.assert_array_equal(values, numbers(2, 8, 9) * masks.all(0))


def _source(name: str, band: int) -> str:
    return (
        f'<SimpleSource><SourceFilename relativeToVRT="1">{name}.tif</SourceFilename><SourceBand>{band}</SourceBand>'
        "</SimpleSource>"
    )


def test_a_fourth_band_with_a_name_of_its_own_is_no_alpha(tmp_path: Path) -> None:
    samples = numbers(4, 5, 6, dtype="uint8")
    samples[3, :2] = 0
    for names, expected in ((("red", "green", "blue", "nir"), 4), (("red", "green", "blue", "Alpha band"), 3)):
        path = draw(tmp_path / f"{expected}.tif", samples, descriptions=names)
        with rasterio.open(path) as file:
            assert file.colorinterp[3] == ColorInterp.alpha, "as GDAL takes it"
        values, valid = read_all(path)
        assert len(values) == expected
        assert valid[:2].all() == (expected == 4)


def test_scale_and_offset_make_values_of_samples(tmp_path: Path) -> None:
    samples = numbers(2, 8, 9)
    samples[0, 0, 0] = 0
    path = draw(tmp_path / "a.tif", samples, scales=(2e-5, 1.0), offsets=(-0.1, 3.0), nodata=0)
    values, valid = read_all(path)
    scales, offsets = np.array([[2e-5, 1], [-0.1, 3]], "float32")[:, :, None, None]
    expected = samples * scales + offsets
    np.testing.assert_allclose(values[:, valid], expected[:, valid], rtol=1e-6)
    assert np.argwhere(~valid).tolist() == [[0, 0]]


def test_complex_samples_are_a_reject(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.tif", numbers(4, 4).astype("complex64"))
    assert rejected(lambda: describe(path, "1")).kind == "unsupported"


# Where on Earth


def test_rotated_and_south_up_rasters_have_their_place(tmp_path: Path) -> None:
    turned = NORTH_UP @ Affine.rotation(30)
    south_up = Affine(10, 0, 452475, 0, 10, 3400000)
    for name, transform in (("turned", turned), ("south-up", south_up)):
        scene = describe(draw(tmp_path / f"{name}.tif", numbers(20, 30), transform=transform), "1")
        assert scene.transform == pytest.approx(transform[:6])
        window = Window(7, 5, 4, 3)
        assert Affine(*scene.window_transform(window)) @ (1, 2) == pytest.approx(transform @ (8, 7))
        west, south, east, north = scene.bounds(window)
        to_degrees = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True)
        for col, row in ((7, 5), (11, 5), (7, 8), (11, 8), (9, 6.5)):
            longitude, latitude = to_degrees.transform(*transform @ (col, row))
            assert west <= longitude <= east and south <= latitude <= north
        assert scene.pixel_areas(window) == pytest.approx(100.07, abs=0.02)
        np.testing.assert_array_equal(read(scene, whole(scene))[0][0], numbers(20, 30))


def control_points(bend: float = 0) -> list[GroundControlPoint]:
    def point(row: float, col: float) -> GroundControlPoint:
        x, y = NORTH_UP @ Affine.rotation(5) @ (col, row)
        return GroundControlPoint(row, col, x + bend * row * col, y)

    return [point(row, col) for row in (0, 10, 20) for col in (0, 15, 30)]


def test_ground_control_points_give_a_place(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.tif", numbers(20, 30), transform=None, gcps=control_points())
    scene = describe(path, "1")
    assert scene.crs == UTM
    assert scene.transform == pytest.approx((NORTH_UP @ Affine.rotation(5))[:6])


RPCS = RPC(
    *(1000.0, 500.0, 30.0, 0.1, [0.0] * 19 + [1.0], [0.0] * 20, 100.0, 100.0, -87.0, 0.1),
    *([1.0] + [0.0] * 19, [0.0] * 20, 100.0, 100.0, 1.0, 1.0),
)
GEOSTATIONARY = "+proj=geos +h=35786023 +lon_0=-75 +sweep=x"
LOCAL = 'LOCAL_CS["of a building site",UNIT["metre",1]]'
NOWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"crs": None, "transform": None}, "no CRS and no geotransform; .* gdal_translate -a_srs"),
    "no CRS": ({"crs": None}, "no CRS; .* gdal_translate -a_srs"),
    "no geotransform": ({"transform": None}, "no geotransform; .* -a_ullr"),
    "RPCs alone": ({"crs": None, "transform": None, "rpcs": RPCS}, "RPCs alone; .* gdalwarp -rpc"),
    "points that bend": ({"transform": None, "gcps": control_points(0.2)}, "9 ground control points .* gdalwarp -tps"),
    "points in a line": ({"transform": None, "gcps": control_points()[:3]}, "its 3 ground control points do not span"),
    "no size": ({"transform": Affine(10, 0, 5e5, 0, 0, 4e6)}, "a pixel has no size"),
    "metres for degrees": ({"crs": "EPSG:4326"}, "outside its CRS"),
    "beyond its CRS": ({"transform": Affine(10, 0, 1e9, 0, -10, 1e9)}, "outside its CRS"),
    "a full disk": (
        {"crs": GEOSTATIONARY, "transform": Affine(4e5, 0, -6e6, 0, -6e5, 6e6)},
        "edges lie off the Earth, as of a full disk, warp it: gdalwarp",
    ),
    "local": ({"crs": LOCAL}, "no way leads from its CRS"),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_a_raster_without_a_place_is_a_reject_that_says_what_is_missing(name: str, tmp_path: Path) -> None:
    how, words = NOWHERE[name]
    path = draw(tmp_path / "a.tif", numbers(20, 30), **how)
    reject = rejected(lambda: describe(path, "1"))
    assert (reject.stage, reject.kind) == ("decode", "no place")
    assert re.search(words, reject.detail), reject.detail


def test_ground_control_points_without_a_crs_are_a_reject(tmp_path: Path) -> None:
    draw(tmp_path / "a.tif", numbers(20, 30))
    points = "".join(
        f'<GCP Pixel="{point.col}" Line="{point.row}" X="{point.x}" Y="{point.y}"/>' for point in control_points()
    )
    path = tmp_path / "a.vrt"
    path.write_text(
        f'<VRTDataset rasterXSize="30" rasterYSize="20"><GCPList>{points}</GCPList><VRTRasterBand dataType="UInt16" '
        'band="1"><SimpleSource><SourceFilename relativeToVRT="1">a.tif</SourceFilename></SimpleSource>'
        "</VRTRasterBand></VRTDataset>"
    )
    reject = rejected(lambda: describe(str(path), "1"))
    assert reject.kind == "no place" and reject.detail.startswith("it has no CRS;")


def test_a_place_beside_a_local_raster_is_found(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.tif", numbers(20, 30), crs=None, transform=None)
    (tmp_path / "a.tfw").write_text("10\n0\n0\n-10\n452480\n3408640\n")
    Path(f"{path}.aux.xml").write_text(f"<PAMDataset><SRS>{UTM}</SRS></PAMDataset>")
    scene = describe(path, "1")
    assert (scene.crs, scene.transform) == (UTM, NORTH_UP[:6])


BOUNDS = {
    "over the antimeridian": ("EPSG:32660", Affine(1e4, 0, 5e5, 0, -1e4, 1e5), 10, 50, (177.0, 0.0, -178.5107, 0.9047)),
    "degrees from 0 to 360": ("EPSG:4326", Affine(1, 0, 200, 0, -1, 10), 20, 30, (-160.0, -10.0, -130.0, 10.0)),
    "over 180 of those": ("EPSG:4326", Affine(1, 0, 170, 0, -1, 10), 20, 20, (170.0, -10.0, -170.0, 10.0)),
    "up to 180": ("EPSG:4326", Affine(1, 0, 170, 0, -1, 10), 20, 10, (170.0, -10.0, 180.0, 10.0)),
    "from 180": ("EPSG:4326", Affine(1, 0, 180, 0, -1, 10), 20, 10, (-180.0, -10.0, -170.0, 10.0)),
    "the world": ("EPSG:4326", Affine(0.25, 0, -0.125, 0, -0.25, 90.125), 721, 1440, (-180.0, -90.0, 180.0, 90.0)),
    "from 180 in metres": (
        *("EPSG:3857", Affine(500, 0, 20037508.342789244, 0, -500, 5e6), 50, 50),
        (-180.0, 40.7463, -179.7754, 40.9163),
    ),
    "up to 180 by a pole": (
        "EPSG:3031",
        Affine(500, 0, 0, 0, -500, -1e6),
        100,
        100,
        (177.1376, -80.8153, 180, -80.3472),
    ),
    "around a pole": ("EPSG:3031", Affine(1e3, 0, -5e4, 0, -1e3, 5e4), 100, 100, (-180.0, -90.0, 180.0, -89.3492)),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_those_of_geojson(name: str, tmp_path: Path) -> None:
    crs, transform, height, width, expected = BOUNDS[name]
    scene = describe(draw(tmp_path / "a.tif", numbers(height, width, dtype="uint8"), crs, transform), "1")
    assert scene.bounds(whole(scene)) == pytest.approx(expected, abs=1e-4)


def test_bounds_follow_bent_edges(tmp_path: Path) -> None:
    scene = describe(draw(tmp_path / "a.tif", numbers(100, 100), transform=Affine(4e3, 0, 3e5, 0, -4e3, 6e6)), "1")
    to_degrees = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True)
    edge = to_degrees.transform(np.linspace(3e5, 7e5, 1001), np.full(1001, 6e6))
    assert scene.bounds(whole(scene))[3] == pytest.approx(edge[1].max(), abs=1e-4)
    assert edge[1].max() > max(edge[1][[0, -1]]) + 0.01


def footprint(scene: Scene, window: Window) -> float:
    """The area on the ellipsoid of a window's outline, with many points."""
    transform = Affine(*scene.window_transform(window))
    along = np.linspace(0, 1, 4000, endpoint=False)
    cols = np.concatenate([along, np.ones(4000), 1 - along, np.zeros(4000)]) * window.width
    rows = np.concatenate([np.zeros(4000), along, np.ones(4000), 1 - along]) * window.height
    a, b, c, d, e, f = transform[:6]
    crs = CRS(scene.crs)
    to_degrees = Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True)
    geod = crs.get_geod()
    assert geod is not None
    if crs.equals(CRS(3857)):
        geod = WGS84
    return abs(geod.polygon_area_perimeter(*to_degrees.transform(a * cols + b * rows + c, d * cols + e * rows + f))[0])


AREAS = {
    "UTM": (UTM, NORTH_UP, 300, 400),
    "UTM, far from its middle": (UTM, Affine(100, 0, 8e5, 0, -100, 6e6), 500, 600),
    "UTM, south-up": (UTM, Affine(10, 0, 4e5, 0, 10, -3e6), 100, 90),
    "UTM, turned": (UTM, NORTH_UP @ Affine.rotation(30), 200, 300),
    "UTM, 5 cm": (UTM, Affine(0.05, 0, 452475, 0, -0.05, 3408645), 500, 400),
    "degrees": ("EPSG:4326", Affine(1e-4, 0, 11.5, 0, -1e-4, 48.2), 300, 400),
    "degrees, coarse": ("EPSG:4326", Affine(0.25, 0, 10, 0, -0.25, 60), 40, 50),
    "degrees, south-up": ("EPSG:4326", Affine(0.01, 0, -70, 0, 0.01, -40), 100, 90),
    "degrees, turned": ("EPSG:4326", Affine(1e-4, 0, 11.5, 0, -1e-4, 48.2) @ Affine.rotation(20), 200, 300),
    "degrees of another datum": ("EPSG:4267", Affine(1e-3, 0, -100, 0, -1e-3, 40), 200, 300),
    "Web Mercator": ("EPSG:3857", Affine(10, 0, 1e6, 0, -10, 8e6), 300, 400),
    "US feet": ("EPSG:2263", Affine(5, 0, 950_000, 0, -5, 200_000), 300, 400),
    "polar": ("EPSG:3031", Affine(100, 0, 2e5, 0, -100, -3e5), 300, 400),
}


@pytest.mark.parametrize("name", AREAS)
def test_areas_of_pixels_add_up_to_the_footprint(name: str, tmp_path: Path) -> None:
    crs, transform, height, width = AREAS[name]
    scene = describe(draw(tmp_path / "a.tif", numbers(height, width, dtype="uint8"), crs, transform), "1")
    areas = scene.pixel_areas(whole(scene))
    assert areas.shape == (height, width) and areas.dtype == np.float64
    # A line of constant latitude is followed by 4,000 geodesics, which cut a little off at 0.25°.
    assert areas.sum() == pytest.approx(footprint(scene, whole(scene)), rel=1e-6)
    half = width // 2 + 3
    parts = [
        Window(col_off, row_off, cols, rows)
        for col_off, cols in ((0, half), (half, width - half))
        for row_off, rows in ((0, 31), (31, height - 31))
    ]
    assert sum(scene.pixel_areas(part).sum() for part in parts) == pytest.approx(areas.sum(), rel=1e-7)
    some = Window(width - 2, height - 3, 1, 2)
    np.testing.assert_allclose(scene.pixel_areas(some), areas[-3:-1, -2:-1], rtol=1e-6)


def test_the_world_has_the_area_of_the_ellipsoid(tmp_path: Path) -> None:
    transform = Affine(0.5, 0, -180, 0, -0.5, 90.25)  # centred on both poles
    scene = describe(draw(tmp_path / "a.tif", numbers(361, 720, dtype="uint8"), "EPSG:4326", transform), "1")
    assert scene.pixel_areas(whole(scene)).sum() == pytest.approx(510_065_621_724_088.44, rel=1e-12)


# Bands on several grids


SIZES = st.sampled_from([2.5, 5.0, 6.0, 10.0, 15.0, 20.0, 30.0, 60.0, 7.3, 33.3])  # metres; the reference's are 10
OFFSETS = st.sampled_from([0.0, 7.5, -5.0, 3.21, 40.0])


def with_other(folder: Path, other: np.ndarray, size: float, dx: float = 0, dy: float = 0) -> Scene:
    """A scene of 70 × 75 pixels of 10 m, and another band."""
    draw(folder / "a_first.tif", numbers(70, 75))
    draw(folder / "a_other.tif", other, transform=Affine(size, 0, 452475 + dx, 0, -size, 3408645 + dy), nodata=0)
    return describe(str(folder / "a_{band}.tif"), "1", bands={"first": "first", "other": "other"})


@given(SIZES, OFFSETS, OFFSETS, st.integers(0, 2**32), st.data())
@settings(max_examples=40, deadline=None)
def test_windows_side_by_side_join_without_a_seam(
    tmp_path_factory: pytest.TempPathFactory, size: float, dx: float, dy: float, seed: int, data: st.DataObject
) -> None:
    count = math.ceil(800 / size)
    other = numbers(count, count, dtype="float32", seed=seed)
    other[np.random.default_rng(seed).random((count, count)) < 0.2] = 0
    scene = with_other(tmp_path_factory.mktemp("seam"), other, size, dx, dy)
    values, valid = read(scene, whole(scene))
    col_off, row_off = data.draw(st.integers(0, 74)), data.draw(st.integers(0, 69))
    window = Window(col_off, row_off, data.draw(st.integers(1, 75 - col_off)), data.draw(st.integers(1, 70 - row_off)))
    part, part_valid = read(scene, window)
    np.testing.assert_array_equal(part, values[:, window.rows, window.cols])
    np.testing.assert_array_equal(part_valid, valid[window.rows, window.cols])
    assert 0.3 < valid.mean() <= 1


@given(SIZES, OFFSETS, OFFSETS)
@settings(max_examples=20, deadline=None)
def test_a_slope_stays_a_slope_on_another_grid(
    tmp_path_factory: pytest.TempPathFactory, size: float, dx: float, dy: float
) -> None:
    rows, cols = np.mgrid[: math.ceil(900 / size), : math.ceil(900 / size)]
    other = (1e4 + 3 * (cols + 0.5) * size - 2 * (rows + 0.5) * size).astype("float32")
    scene = with_other(tmp_path_factory.mktemp("slope"), other, size, dx, dy)
    values, valid = read(scene, whole(scene))
    row, col = np.mgrid[:70, :75] * 10 + 5
    expected = 1e4 + 3 * (col - dx) - 2 * (row + dy)
    inner = (slice(10, 60), slice(10, 65))  # at its border a band is carried on level
    # Where a pixel of 10 m cuts finer ones, those count as level inside.
    tolerance = 0.1 if size >= 10 or 10 % size == 0 else size
    np.testing.assert_allclose(values[1][inner], expected[inner], rtol=0, atol=tolerance)
    assert valid[inner].all()


@pytest.mark.parametrize("size", [2.5, 6.0, 15.0, 33.3])
def test_other_resolutions_are_what_gdal_makes_of_them(size: float, tmp_path: Path) -> None:
    other = numbers(*[math.ceil(900 / size)] * 2, dtype="float32")
    scene = with_other(tmp_path, other, size, -50, 50)
    how = Resampling.average if size < 10 else Resampling.bilinear
    with rasterio.open(tmp_path / "a_other.tif") as file:
        with WarpedVRT(file, crs=UTM, transform=NORTH_UP, width=75, height=70, resampling=how) as warped:
            expected = warped.read(1)
    values, _ = read(scene, whole(scene))
    np.testing.assert_allclose(values[1], expected, rtol=0, atol=0.03)  # samples differ by up to 99


def test_half_of_a_pixel_decides_whether_it_is_valid(tmp_path: Path) -> None:
    coarse = np.ones((24, 26), "float32")
    coarse[3, 5] = 0
    scene = with_other(tmp_path, coarse, 30)
    _, valid = read(scene, whole(scene))
    assert np.argwhere(~valid).tolist() == [[row, col] for row in (9, 10, 11) for col in (15, 16, 17)]
    fine = np.ones((140, 150), "float32")
    fine[10, 20] = fine[40:42, 60] = fine[40, 61] = fine[80:82, 100] = 0
    (tmp_path / "fine").mkdir()
    scene = with_other(tmp_path / "fine", fine, 5)
    values, valid = read(scene, whole(scene))
    assert np.argwhere(~valid).tolist() == [[20, 30]]  # three quarters of it are missing
    np.testing.assert_array_equal(values[1][valid], 1)


def test_a_band_that_ends_early_has_no_data_there(tmp_path: Path) -> None:
    scene = with_other(tmp_path, numbers(20, 30), 20)
    _, valid = read(scene, whole(scene))
    assert valid[:40, :60].all() and valid.sum() == 40 * 60
    values, valid = read(scene, Window(62, 42, 5, 5))
    assert not valid.any() and not values.any()


def test_a_band_may_be_south_up_where_another_is_north_up(tmp_path: Path) -> None:
    scene = with_other(tmp_path, numbers(35, 38), 20)
    south_up = Affine(20, 0, 452475, 0, 20, 3408645 - 35 * 20)
    draw(tmp_path / "b_first.tif", numbers(70, 75))
    draw(tmp_path / "b_other.tif", numbers(35, 38)[::-1], transform=south_up, nodata=0)
    upside = describe(str(tmp_path / "b_{band}.tif"), "1", bands={"first": "first", "other": "other"})
    for one, other in zip(read(scene, whole(scene)), read(upside, whole(scene)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_first_band_chosen_has_the_grid(tmp_path: Path) -> None:
    scene = with_other(tmp_path, numbers(35, 38), 20).select(["other", "first"])
    assert (scene.height, scene.width, scene.transform[0]) == (35, 38, 20)
    values, _ = read(scene, Window(0, 0, 37, 35))
    np.testing.assert_array_equal(values[0], numbers(35, 38)[:, :37])
    expected = numbers(70, 75)[:, :74].reshape(35, 2, 37, 2).mean((1, 3))
    np.testing.assert_allclose(values[1], expected, rtol=1e-6)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "another CRS": ({"crs": "EPSG:32617"}, "first in EPSG:32616, other in EPSG:32617"),
    "turned": ({"transform": NORTH_UP @ Affine.rotation(1)}, "other is turned against first"),
    "beside": ({"transform": NORTH_UP @ Affine.translation(75, 0)}, "other lies beside first"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_bands_that_do_not_fit_together_are_a_reject(name: str, tmp_path: Path) -> None:
    how, words = MISFITS[name]
    draw(tmp_path / "first.tif", numbers(70, 75))
    draw(tmp_path / "other.tif", numbers(70, 75), **how)
    reject = rejected(lambda: describe(str(tmp_path / "{band}.tif"), "1", bands={"first": "first", "other": "other"}))
    assert (reject.stage, reject.kind) == ("decode", "grids do not fit")
    assert words in reject.detail


def test_bands_turned_alike_fit_together(tmp_path: Path) -> None:
    turned = NORTH_UP @ Affine.rotation(20)
    draw(tmp_path / "first.tif", numbers(40, 60), transform=turned)
    draw(tmp_path / "other.tif", numbers(20, 30), transform=turned @ Affine.scale(2))
    scene = describe(str(tmp_path / "{band}.tif"), "1", bands={"first": "first", "other": "other"})
    values, valid = read(scene, whole(scene))
    assert valid.all()
    np.testing.assert_allclose(values[1, 1:-1:2, 1:-1:2].mean(), numbers(20, 30).mean(), rtol=0.05)


def test_a_template_wants_to_know_its_bands(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing says what stands for"):
        describe(str(tmp_path / "{band}.tif"), "1")


# STAC


def item_of(assets: dict[str, Any], version: str = "1.0.0") -> dict[str, Any]:
    square = [[[-88, 30], [-87, 30], [-87, 31], [-88, 31], [-88, 30]]]
    return {
        "type": "Feature",
        "stac_version": version,
        "id": "one",
        "geometry": {"type": "Polygon", "coordinates": square},
        "bbox": [-88, 30, -87, 31],
        "properties": {"datetime": "2024-05-06T07:08:09Z"},
        "links": [],
        "assets": assets,
    }


def asset(href: str, *names: str, role: str = "data", more: dict[str, Any] | None = None) -> dict[str, Any]:
    bands = [dict(zip(("name", "common_name"), name.split("="), strict=False)) for name in names]
    kind = "image/jp2" if href.endswith("jp2") else "image/tiff; application=geotiff"
    return {"href": href, "type": kind, "roles": [role]} | ({"eo:bands": bands} if bands else {}) | (more or {})


def test_a_stac_item_names_the_bands_of_its_assets(tmp_path: Path) -> None:
    """As Earth Search has Sentinel-2."""
    (tmp_path / "tiles").mkdir()
    (tmp_path / "items").mkdir()
    for index, name in enumerate(("B04", "B05", "B06", "scl")):
        draw(tmp_path / "tiles" / f"{name}.tif", numbers(20, 30, seed=index))
    draw(tmp_path / "tiles" / "B04.jp2", numbers(10, 15), driver="JP2OpenJPEG")
    fields = item_of(
        {
            "visual": asset("gone.tif", "red=red", "green=green", "blue=blue", role="visual"),
            "thumbnail": {"href": "preview.jpg", "type": "image/jpeg", "roles": ["thumbnail"]},
            "metadata": {"href": "MTD.xml", "type": "application/xml", "roles": ["metadata"]},
            "red-jp2": asset("../tiles/B04.jp2", "red=red", more={"gsd": 20}),
            "red": asset(
                "../tiles/B04.tif",
                "red=red",
                more={"gsd": 10, "raster:bands": [{"nodata": 0, "scale": 0.0001, "offset": -0.1}]},
            ),
            "rededge1": asset(str(tmp_path / "tiles" / "B05.tif"), "B05=rededge"),
            "rededge2": asset(f"file://{tmp_path}/tiles/B06.tif", "B06=rededge"),
            "scl": asset("../tiles/scl.tif", more={"gsd": 10, "raster:bands": [{"nodata": "nan"}]}),
        }
    )
    path = tmp_path / "items" / "one.json"
    path.write_text(json.dumps(fields))
    scene = describe(str(path), "1")
    assert {band.name for band in scene.bands} == {"red", "B05", "B06", "scl"}
    assert [band.name for band in describe(str(path), "1", bands={"coarse": "red-jp2"}).bands] == ["coarse"]
    chosen = scene.select(["red", "rededge2", "B05"])
    values, _ = read(chosen, whole(chosen))
    np.testing.assert_allclose(values[0], numbers(20, 30) * np.float32(0.0001) - np.float32(0.1), rtol=1e-5)
    np.testing.assert_array_equal(values[1:], np.stack([numbers(20, 30, seed=seed) for seed in (2, 1)]))
    path.unlink()
    assert describe(str(path), "1", item=fields) == scene


def test_a_stac_item_may_call_bands_as_stac_1_1_does(tmp_path: Path) -> None:
    draw(tmp_path / "a.tif", numbers(2, 20, 30))
    bands = [
        {"name": "B4", "eo:common_name": "red", "raster:scale": 2.0},
        {"name": "B5", "eo:common_name": "nir", "raster:offset": 5.0, "raster:scale": 3.0},
    ]
    fields = item_of({"data": asset("a.tif", more={"bands": bands, "raster:scale": 7.0, "nodata": 1})}, "1.1.0")
    (tmp_path / "one.geojson").write_text(json.dumps(fields))
    scene = describe(str(tmp_path / "one.geojson"), "1", bands={"ir": "B5", "red": "red"})
    assert [(b.name, b.index, b.scale, b.offset, b.nodata) for b in scene.bands] == [
        ("ir", 2, 3.0, 5.0, 1.0),
        ("red", 1, 2.0, 0.0, 1.0),
    ]


def test_an_item_with_one_raster_says_no_more_than_that(tmp_path: Path) -> None:
    draw(tmp_path / "a.tif", numbers(3, 20, 30), descriptions=("x", "y", "z"))
    (tmp_path / "one.json").write_text(json.dumps(item_of({"image": asset("a.tif")})))
    assert [band.name for band in describe(str(tmp_path / "one.json"), "1").bands] == ["x", "y", "z"]


NO_ITEMS = {
    "not JSON": ("{", "not a STAC item"),
    "a list": ("[]", "not a STAC item"),
    "a collection": ('{"type": "Collection", "id": "x"}', "not a STAC item"),
    "no raster": (json.dumps(item_of({"doc": {"href": "a.pdf", "type": "application/pdf"}})), "no bands"),
    "no file": (json.dumps(item_of({"red": asset("gone.tif", "red")})), "missing"),
    "no such band": (json.dumps(item_of({"rgb": asset("there.tif", "r", "g", "b")})), "bands missing"),
    "no such scheme": (json.dumps(item_of({"red": asset("ftp://x/gone.tif", "red")})), "unreadable"),
}


@pytest.mark.parametrize("name", NO_ITEMS)
def test_what_is_no_item_or_holds_no_raster_is_a_reject(name: str, tmp_path: Path) -> None:
    text, kind = NO_ITEMS[name]
    draw(tmp_path / "there.tif", numbers(20, 30))
    (tmp_path / "one.json").write_text(text)
    assert rejected(lambda: describe(str(tmp_path / "one.json"), "1")).kind == kind


# Faults


@pytest.mark.parametrize("name", ["striped.tif", "deflate.tif", "tiled.tif", "cog.tif"])
@pytest.mark.parametrize("part", [0.0, 0.004, 0.02, 0.3, 0.9])
def test_a_truncated_file_is_a_reject(name: str, part: float, tmp_path: Path) -> None:
    path = Path(draw(tmp_path / name, numbers(4, 300, 200), **FORMATS[name]))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    reject = rejected(lambda: read_all(str(path)))
    assert (reject.stage, reject.kind) == ("decode", "truncated" if part else "not a raster")


@pytest.mark.parametrize("part", [0.004, 0.1, 0.6, 0.95])
def test_a_truncated_jpeg_2000_is_a_reject(part: float, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(0, 9999, (512, 512)).astype("uint16")
    path = Path(draw(tmp_path / "a.jp2", samples, blockxsize=128, blockysize=128, **FORMATS["lossless.jp2"]))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    reject = rejected(lambda: read_all(str(path)))
    assert reject.stage == "decode" and reject.kind in ("corrupt", "truncated")  # OpenJPEG cannot tell in every place


def test_a_damaged_file_is_a_reject(tmp_path: Path) -> None:
    path = Path(draw(tmp_path / "a.tif", numbers(4, 300, 200), **FORMATS["deflate.tif"]))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    assert rejected(lambda: read_all(str(path))).kind == "corrupt"


# The log of rasterio stumbles over words of GDAL that are no UTF-8.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["deflate.tif", "tiled.tif", "cog.tif", "lossless.jp2"])
def test_a_damaged_header_is_a_reject_or_does_no_harm(name: str, tmp_path: Path) -> None:
    path = Path(draw(tmp_path / name, numbers(3, 90, 70), **FORMATS[name]))
    data = path.read_bytes()
    kinds: Counter[str] = Counter()
    for seed in range(60):
        random = np.random.default_rng(seed)
        damaged = bytearray(data)
        for place in random.integers(8, 900, 3):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            scene = describe(str(path), str(seed))
            window = Window(0, 0, min(64, scene.width), min(64, scene.height))
            values, _ = read(scene, window)
            assert np.isfinite(values).all() and np.isfinite(scene.pixel_areas(window)).all()
        except Reject as reject:
            kinds[reject.kind] += 1
    assert {"no place", "corrupt"} & set(kinds) and kinds.total() < 60


def test_a_file_that_is_no_raster_or_not_there_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_text("a text")
    assert rejected(lambda: describe(str(tmp_path / "a.tif"), "1")).kind == "not a raster"
    reject = rejected(lambda: describe(str(tmp_path / "b.tif"), "1"))
    assert (reject.stage, reject.kind) == ("fetch", "missing")
    assert rejected(lambda: describe(str(tmp_path), "1")).kind == "unreadable"
    for name in ("one", "two"):
        draw(
            tmp_path / "c.gpkg",
            numbers(4, 5, dtype="uint8"),
            driver="GPKG",
            raster_table=name,
            append_subdataset=name == "two",
        )
    reject = rejected(lambda: describe(str(tmp_path / "c.gpkg"), "1"))
    assert reject.kind == "no bands" and "c.gpkg:one" in reject.detail


def test_a_new_version_is_read_anew(tmp_path: Path) -> None:
    for version in ("1", "2"):
        samples = numbers(20, 30, seed=int(version))
        scene = describe(draw(tmp_path / "a.tif", samples), version)
        np.testing.assert_array_equal(read(scene, whole(scene))[0][0], samples)


def test_threads_read_at_the_same_time(tmp_path: Path) -> None:
    samples = numbers(3, 256, 256)
    scene = describe(draw(tmp_path / "a.tif", samples, **FORMATS["tiled.tif"]), "1")
    windows = [Window(col_off, row_off, 32, 32) for col_off in range(0, 256, 32) for row_off in range(0, 256, 32)]
    with ThreadPoolExecutor(8) as pool:
        for window, (values, _) in zip(windows, pool.map(lambda window: read(scene, window), windows), strict=True):
            np.testing.assert_array_equal(values, samples[:, window.rows, window.cols])


def test_more_files_than_stay_open_are_read(tmp_path: Path) -> None:
    names = {f"b{index}": f"b{index}" for index in range(40)}
    for index, name in enumerate(names):
        draw(tmp_path / f"{name}.tif", numbers(4, 5, seed=index))
    scene = describe(str(tmp_path / "{band}.tif"), "1", bands=names)
    for _ in range(2):
        expected = np.stack([numbers(4, 5, seed=index) for index in range(40)])
        np.testing.assert_array_equal(read(scene, whole(scene))[0], expected)


# Stores


PATHS = {
    "s3://b/k/a b.tif": "/vsis3/b/k/a b.tif",
    "gs://b/a.tif": "/vsigs/b/a.tif",
    "az://c/a.tif": "/vsiaz/c/a.tif",
    "abfs://c@account.dfs.core.windows.net/d/a.tif": "/vsiaz/c/d/a.tif",
    "https://h/a.tif?sig=1": "/vsicurl/https://h/a.tif?sig=1",
    "file:///d/a.tif": "/d/a.tif",
    "/d/a.tif": "/d/a.tif",
    "/vsizip//d/a.zip/a.tif": "/vsizip//d/a.zip/a.tif",
}


@pytest.mark.parametrize("uri", PATHS)
def test_gdal_opens_what_fsspec_opens(uri: str) -> None:
    assert gdal_path(uri) == PATHS[uri]


@pytest.fixture
def bucket(s3: Server, request: pytest.FixtureRequest) -> str:
    """A prefix of a test's own."""
    return f"s3://{BUCKET}/scenes/{abs(hash(request.node.name))}"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Points GDAL and s3fs, which remembers, at another server."""

    def change(url: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()

    yield change
    s3fs.S3FileSystem.clear_instance_cache()


def put(path: str | Path, uri: str) -> str:
    s3fs.S3FileSystem(use_listings_cache=False).put(str(path), uri)
    return uri


def test_a_window_from_s3_takes_few_requests_and_no_listing(
    s3: Server, bucket: str, tmp_path: Path, endpoint: Callable[[str], None]
) -> None:
    samples = numbers(4, 1024, 1024)
    path = draw(tmp_path / "a.tif", samples, driver="COG", blocksize=128, compress="deflate", interleave="pixel")
    uri = put(path, f"{bucket}/a.tif")
    with proxy(s3.host, s3.port, tmp_path) as between:
        endpoint(between.url)
        scene = describe(uri, "1")
        looked = between.requests()
        assert len(looked) <= 3, looked  # the header, and whether there is a mask
        counts = []
        for window in (Window(100, 150, 300, 300), Window(600, 150, 300, 300)):
            values, _ = read(scene, window)
            np.testing.assert_array_equal(values, samples[:, window.rows, window.cols])
            counts.append(between.requests())
        assert max(map(len, counts)) <= 5, counts
        for _, path_and_query, _ in [*looked, *counts[0], *counts[1]]:
            assert "/a.tif" in path_and_query and "list-type" not in path_and_query


def test_a_remote_raster_that_was_replaced_is_read_anew(bucket: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        samples = numbers(20, 30, seed=seed)
        scene = describe(put(draw(tmp_path / "a.tif", samples), f"{bucket}/a.tif"), str(seed))
        np.testing.assert_array_equal(read(scene, whole(scene))[0][0], samples)


def test_a_mask_beside_a_remote_raster_is_found(bucket: str, tmp_path: Path) -> None:
    mask = np.eye(20, 30, dtype=bool)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        path = draw(tmp_path / "a.tif", numbers(20, 30), mask=mask)
    uri = put(path, f"{bucket}/a.tif")
    put(f"{path}.msk", f"{uri}.msk")
    values, valid = read_all(uri)
    np.testing.assert_array_equal(valid, mask)
    np.testing.assert_array_equal(values[0], numbers(20, 30) * mask)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        draw(tmp_path / "a.tif", numbers(20, 30), mask=~mask)
    put(f"{path}.msk", f"{uri}.msk")
    scene = describe(uri, "2")
    np.testing.assert_array_equal(read(scene, whole(scene))[1], ~mask)


def test_an_item_on_s3_names_its_neighbours(bucket: str, tmp_path: Path) -> None:
    put(draw(tmp_path / "a.tif", numbers(20, 30)), f"{bucket}/bands/a.tif")
    (tmp_path / "one.json").write_text(json.dumps(item_of({"red": asset("bands/a.tif", "B4=red")})))
    scene = describe(put(tmp_path / "one.json", f"{bucket}/one.json"), "1")
    assert [(band.name, band.path) for band in scene.bands] == [("red", f"/vsis3{bucket[4:]}/bands/a.tif")]
    np.testing.assert_array_equal(read(scene, whole(scene))[0][0], numbers(20, 30))


def test_faults_of_a_store_are_told_from_faults_of_a_file(
    s3: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: Callable[[str], None]
) -> None:
    monkeypatch.setattr(gdal, "PAUSES_SECONDS", (0.1, 0.1))
    monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "0")
    path = Path(draw(tmp_path / "a.tif", numbers(4, 600, 600)))
    uri = put(path, f"{bucket}/a.tif")
    scene = describe(uri, "1")
    cut = tmp_path / "cut.tif"
    cut.write_bytes(path.read_bytes()[:-100_000])
    cut_scene = describe(put(cut, f"{bucket}/cut.tif"), "1")
    reject = rejected(lambda: read(cut_scene, whole(cut_scene)))
    assert (reject.stage, reject.kind) == ("decode", "truncated")
    assert rejected(lambda: describe(f"{bucket}/gone.tif", "1")).reason.startswith("missing")
    with proxy(s3.host, s3.port, tmp_path) as between:
        endpoint(between.url)
        away = describe(uri, "2")
    for make in (lambda: read(away, whole(away)), lambda: describe(uri, "3")):
        with pytest.raises(RunError, match="in vain"):
            make()
    endpoint(s3.environment["AWS_ENDPOINT_URL"])
    np.testing.assert_array_equal(read(away, whole(away))[0], numbers(4, 600, 600))
    assert read(scene, whole(scene))[1].all()


def test_the_environment_has_the_last_word_on_gdal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = draw(tmp_path / "a.tif", numbers(20, 30))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example.org:9000/")
    monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "9")

    def options(_: object) -> dict[str, object]:
        found: dict[str, object] = rasterio.env.getenv()
        return found

    found = gdal.with_dataset(path, "1", options)
    assert "GDAL_HTTP_MAX_RETRY" not in found
    assert (found["AWS_S3_ENDPOINT"], found["AWS_HTTPS"]) == ("s3.example.org:9000", "YES")


def test_a_signature_is_in_no_reason_and_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gdal, "PAUSES_SECONDS", (0.1,))
    with pytest.raises(RunError, match="in vain") as caught:
        describe("http://127.0.0.1:9/a.tif?X-Amz-Signature=secret", "1")
    assert "secret" not in f"{caught.value} {caplog.text}"


# A real scene


LANDSAT = {"coastal": "B1", "blue": "B2", "green": "B3", "red": "B4", "nir": "B5", "pan": "B8"}


@pytest.fixture(scope="module")
def landsat(landsat8: Path) -> Scene:
    return describe(str(landsat8 / "l8_{band}.tif"), "1", bands=LANDSAT)


def test_a_real_scene_has_its_place(landsat: Scene) -> None:
    assert (landsat.crs, landsat.height, landsat.width) == (UTM, 603, 627)
    west, south, east, north = landsat.bounds(whole(landsat))
    assert (west, south, east, north) == pytest.approx((-87.4968, 30.6467, -87.2997, 30.8106), abs=1e-3)
    areas = landsat.pixel_areas(whole(landsat))
    assert areas.sum() == pytest.approx(footprint(landsat, whole(landsat)), rel=1e-6)


def test_real_bands_of_15_and_30_metres_lie_on_one_grid(landsat: Scene, landsat8: Path) -> None:
    values, valid = read(landsat, whole(landsat))
    assert valid.all()
    with rasterio.open(landsat8 / "l8_B4.tif") as file:
        np.testing.assert_array_equal(values[3], file.read(1))
    how = {"transform": Affine(*landsat.transform), "width": 627, "height": 603, "resampling": Resampling.average}
    with rasterio.open(landsat8 / "l8_B8.tif") as file, WarpedVRT(file, crs=file.crs, **how) as warped:
        expected = warped.read(1)
    # GDAL rounds; and band 8 ends in the middle of the last column.
    np.testing.assert_allclose(values[5, :, :-1], expected[:, :-1], rtol=0, atol=0.51)


def test_quarters_of_a_real_scene_are_the_whole(landsat: Scene) -> None:
    values, valid = read(landsat, whole(landsat))
    for window in (
        Window(0, 0, 300, 301),
        Window(300, 0, 327, 301),
        Window(0, 301, 300, 302),
        Window(300, 301, 327, 302),
    ):
        part, part_valid = read(landsat, window)
        np.testing.assert_array_equal(part, values[:, window.rows, window.cols])
        np.testing.assert_array_equal(part_valid, valid[window.rows, window.cols])
