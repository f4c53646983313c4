"""Polygons of windows, joined: the same as of the whole, whatever the windows are and whichever are missing."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import rasterio.features
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from segray.polygons import Joiner, Polygons, components
from segray.tile import Window

NODATA = 255
CONFIDENCE = np.array([0.25, 0.5])
SHAPES = npst.array_shapes(min_dims=2, max_dims=2, max_side=11)
LABEL_MAPS = npst.arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 1, NODATA]))


def cut(label_map: np.ndarray, size: int) -> list[Window]:
    height, width = label_map.shape
    return [
        Window(col, row, min(size, width - col), min(size, height - row))
        for row in range(0, height, size)
        for col in range(0, width, size)
    ]


def joined(label_map: np.ndarray, windows: list[Window], tolerance: float) -> Iterator[Polygons]:
    """With areas that tell each pixel from every other."""
    areas = np.arange(label_map.size, dtype=np.float64).reshape(label_map.shape)
    joiner = Joiner(label_map.shape[1], NODATA, tolerance)
    for window in windows:
        where = window.rows, window.cols
        confidence = np.append(CONFIDENCE, np.full(NODATA - 1, np.nan))[label_map[where]]
        yield from joiner.add(window, label_map[where], areas[where], confidence)
    yield from joiner.finish()


@settings(deadline=None, max_examples=100)
@given(LABEL_MAPS, st.integers(1, 9), st.sets(st.integers(0, 40), max_size=8), st.sampled_from([0.0, 1.5]))
def test_joined_polygons_are_those_of_the_whole(
    label_map: np.ndarray, size: int, left_out: set[int], tolerance: float
) -> None:
    windows = [window for number, window in enumerate(cut(label_map, size)) if number not in left_out]
    whole = np.full_like(label_map, NODATA)
    for window in windows:
        whole[window.rows, window.cols] = label_map[window.rows, window.cols]
    numbers, class_ids = components(whole)
    expected = sorted(
        (int(class_id), int(np.sum(numbers == number)), float(np.flatnonzero(numbers == number).sum()))
        for number, class_id in enumerate(class_ids)
        if class_id != NODATA
    )

    found = list(joined(label_map, windows, tolerance))
    told = [zip(some.class_id, some.num_pixels, some.area_m2, strict=True) for some in found]
    assert sorted(row for rows in told for row in rows) == expected
    for some in found:
        assert some.confidence_sum == pytest.approx(CONFIDENCE[some.class_id] * some.num_pixels)
    outlines = np.concatenate([np.array([], object), *(some.outline for some in found)])
    assert shapely.is_valid(outlines).all()
    assert set(shapely.get_type_id(outlines)) <= {shapely.GeometryType.POLYGON}
    assert sum(shapely.area(outlines)) == pytest.approx(shapely.union_all(outlines).area)
    if not tolerance:
        classes = np.concatenate([np.array([], int), *(some.class_id for some in found)])
        shapes = [*zip(outlines, classes.tolist(), strict=True), (shapely.box(-2, -2, -1, -1), 0)]
        again = rasterio.features.rasterize(shapes, whole.shape, fill=NODATA, dtype="uint8")
        assert np.array_equal(again, whole)
        assert shapely.get_num_coordinates(outlines).sum() == sum(
            len(ring)
            for shape, _ in rasterio.features.shapes(whole, whole != NODATA, connectivity=4)
            for ring in shape["coordinates"]
        ), "there are points on straight lines"


def test_what_joining_costs_does_not_hang_on_holes() -> None:
    side, size = 2048, 512
    label_map = (np.random.default_rng(0).random((side, side)) < 0.01).astype(np.uint8)
    joiner, ones = Joiner(side, NODATA), np.ones((size, size))
    began = time.process_time()
    for window in cut(label_map, size):
        for _ in joiner.add(window, label_map[window.rows, window.cols], ones, ones):
            pass
    traced = time.process_time()
    outlines = np.concatenate([some.outline for some in joiner.finish()])
    seconds = time.process_time() - traced
    assert max(map(shapely.get_num_interior_rings, outlines)) > 30_000
    assert seconds < (traced - began) / 2
