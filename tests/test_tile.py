import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segray.errors import SettingsError
from segray.tile import Scenes, Tiling, Window, cores, scene_and_window, window_uri, windows, windows_into


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    size = draw(st.integers(32, 80))
    return Tiling(size=size, overlap=draw(st.integers(0, size // 2)), blend=draw(st.sampled_from(["cosine", "flat"])))


lengths = st.integers(1, 300)


@given(lengths, lengths, tilings())
def test_windows_cover_each_pixel_and_lie_inside_the_image(height: int, width: int, tiling: Tiling) -> None:
    covered = np.zeros((height, width), int)
    for window in windows(height, width, tiling):
        assert 0 <= window.col_off <= window.col_off + window.width <= width
        assert 0 <= window.row_off <= window.row_off + window.height <= height
        covered[window.rows, window.cols] += 1
    assert covered.min() >= 1


@given(lengths, lengths, tilings())
def test_windows_have_one_size_and_come_in_raster_order(height: int, width: int, tiling: Tiling) -> None:
    cut = windows(height, width, tiling)
    assert {(w.height, w.width) for w in cut} == {(min(height, tiling.size), min(width, tiling.size))}
    corners = [(w.row_off, w.col_off) for w in cut]
    assert corners == sorted(set(corners))


@given(lengths, lengths, tilings())
def test_neighbours_share_at_least_the_overlap_and_the_image_ends_with_the_last(
    height: int, width: int, tiling: Tiling
) -> None:
    cut = windows(height, width, tiling)
    rows, cols = sorted({w.row_off for w in cut}), sorted({w.col_off for w in cut})
    assert len(cut) == len(rows) * len(cols)
    for offsets, length in ((rows, height), (cols, width)):
        side = min(length, tiling.size)
        shared = [first + side - second for first, second in pairwise(offsets)]
        assert all(tiling.overlap <= pixels < side for pixels in shared)
        assert all(pixels == tiling.overlap for pixels in shared[:-1])
        assert offsets[0] == 0
        assert offsets[-1] + side == length


@given(tilings(), st.data())
def test_an_image_up_to_the_size_is_one_window(tiling: Tiling, data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(1, tiling.size)) for _ in range(2))
    assert windows(height, width, tiling) == [Window(0, 0, width, height)]


def test_the_windows_of_an_example() -> None:
    assert windows(32, 100, Tiling(size=48, overlap=16)) == [
        Window(0, 0, 48, 32),
        Window(32, 0, 48, 32),
        Window(52, 0, 48, 32),
    ]


def test_a_window_indexes_an_array() -> None:
    array = np.arange(30).reshape(5, 6)
    window = Window(col_off=2, row_off=1, width=3, height=2)
    np.testing.assert_array_equal(array[window.rows, window.cols], [[8, 9, 10], [14, 15, 16]])


def test_defaults_and_stride() -> None:
    assert dataclasses.asdict(Tiling()) == {"size": 1024, "overlap": 128, "blend": "cosine"}
    assert Tiling(size=100, overlap=30).stride == 70


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 31, "overlap": 0}, "tiling.size 31: must be at least 32 pixels"),
        ({"size": 0}, "tiling.size 0: must be at least 32 pixels"),
        ({"size": 64, "overlap": 33}, r"tiling.overlap 33: must lie in \[0, 32\], half of tiling.size 64"),
        ({"size": 64, "overlap": -1}, r"tiling.overlap -1: must lie in \[0, 32\]"),
        ({"size": 128}, r"tiling.overlap 128: must lie in \[0, 64\]"),
    ],
)
def test_a_setting_out_of_bounds_is_refused_with_value_and_bound(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Tiling(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bands": ("red=B4",)}, "other settings of scenes come with scenes.size"),
        ({"size": 32, "bands": ("red=",)}, r"scenes.bands red=: give each as NAME=WHAT, such as red=B4"),
        ({"size": 32, "bands": ("=B4",)}, r"scenes.bands =B4: give each as NAME=WHAT"),
        ({"size": 32, "bands": ("red=B4", "Red=B3")}, "a name stands there twice"),
    ],
)
def test_settings_of_scenes_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Scenes(**settings)


def test_a_band_without_another_name_is_called_as_it_is() -> None:
    assert Scenes(size=32, bands=("red=B4", "B5", "nir=a=b")).calls == {"red": "B4", "B5": "B5", "nir": "a=b"}


def test_bounds_themselves_are_allowed() -> None:
    assert Tiling(size=32, overlap=16).stride == 16
    assert Tiling(size=33, overlap=16).stride == 17
    assert Tiling(size=32, overlap=0).stride == 32


@st.composite
def parts(draw: st.DrawFn, height: int, width: int) -> Window:
    row_off, col_off = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return Window(col_off, row_off, draw(st.integers(1, width - col_off)), draw(st.integers(1, height - row_off)))


@given(lengths, lengths, tilings(), st.data())
def test_tiles_into_a_core_cover_it_and_are_those_of_the_whole_that_reach_it(
    height: int, width: int, tiling: Tiling, data: st.DataObject
) -> None:
    core = data.draw(parts(height, width))
    cut = windows_into(core, height, width, tiling)
    covered = np.zeros((height + tiling.size, width + tiling.size), int)
    for window in cut:
        covered[window.rows, window.cols] += 1
    assert covered[core.rows, core.cols].min() >= 1

    whole = windows_into(Window(0, 0, width, height), height, width, tiling)
    reach = [
        window
        for window in whole
        if window.row_off < core.row_off + core.height
        and window.row_off + window.height > core.row_off
        and window.col_off < core.col_off + core.width
        and window.col_off + window.width > core.col_off
    ]
    assert cut == reach


@given(st.integers(1, 400), tilings(), st.integers(1, 3), st.integers(1, 3), st.data())
def test_cores_on_a_grid_see_the_tiles_of_the_whole(
    length: int, tiling: Tiling, num_strides: int, num_halo_strides: int, data: st.DataObject
) -> None:
    core, halo = num_strides * tiling.stride, num_halo_strides * tiling.stride
    first = core * data.draw(st.integers(0, (length - 1) // core))
    last = min(first + core, length)
    start, end = max(0, first - halo), min(last + halo, length)
    pixel = data.draw(st.integers(first, last - 1))

    def seen(of: Window, raster: int, origin: int) -> set[int]:
        offsets = {window.row_off + origin for window in windows_into(of, raster, 1, tiling)}
        return {offset for offset in offsets if offset <= pixel < offset + tiling.size}

    in_window = seen(Window(0, first - start, 1, last - first), end - start, start)
    assert in_window == seen(Window(0, 0, 1, length), length, 0)


@given(lengths, lengths, st.integers(10, 320))
def test_cores_cover_each_pixel_once_on_a_regular_grid_row_by_row(height: int, width: int, size: int) -> None:
    cut = cores(height, width, size)
    covered = np.zeros((height, width), int)
    for core in cut:
        assert core.col_off % size == core.row_off % size == 0
        assert core.width == min(size, width - core.col_off)
        assert core.height == min(size, height - core.row_off)
        covered[core.rows, core.cols] += 1
    assert (covered == 1).all()
    corners = [(core.row_off, core.col_off) for core in cut]
    assert corners == sorted(corners)


@given(lengths, lengths, st.integers(10, 320), st.integers(0, 100), st.data())
def test_a_window_is_read_with_its_halo_up_to_the_scenes_border(
    height: int, width: int, size: int, halo: int, data: st.DataObject
) -> None:
    core = data.draw(st.sampled_from(cores(height, width, size)))
    around = Scenes(size=size, halo=halo).around(core, height, width)
    seen = np.zeros((height + 2 * halo, width + 2 * halo), bool)
    seen[core.row_off : core.row_off + core.height + 2 * halo, core.col_off : core.col_off + core.width + 2 * halo] = (
        True
    )
    expected = np.zeros((height, width), bool)
    expected[around.rows, around.cols] = True
    assert (around.height, around.width) == (expected.any(1).sum(), expected.any(0).sum()), "it leaves the scene"
    np.testing.assert_array_equal(seen[halo : halo + height, halo : halo + width], expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "scenes.size 0: must be at least 1 pixel"),
        ({"size": 64, "halo": -1}, "scenes.halo -1: must be at least 0 pixels"),
        ({"halo": 64}, "other settings of scenes come with scenes.size; give it, such as 1024"),
        ({"area": "fields.geojson"}, "other settings of scenes come with scenes.size"),
    ],
)
def test_a_setting_of_scenes_out_of_bounds_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Scenes(**settings)


def test_scenes_may_be_without_a_halo_and_are_not_meant_unless_a_size_is_given() -> None:
    assert Scenes().size is None
    assert Scenes(size=1, halo=0).around(Window(3, 4, 1, 1), 10, 10) == Window(3, 4, 1, 1)


def test_a_windows_uri_tells_the_scene_and_the_window() -> None:
    window = Window(512, 0, 30, 7)
    for scene in ("file:///a/b#1.tif", "file:///a/found.json#one", "s3://b/L_{band}.TIF", "a#1,2,3,4"):
        assert scene_and_window(window_uri(scene, window)) == (scene, window)
    assert scene_and_window("file:///a/photo.tif#12") is None
