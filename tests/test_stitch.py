from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segray.stitch import stitch, weight
from segray.tile import Tiling, Window, windows


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    size = draw(st.integers(32, 48))
    return Tiling(size=size, overlap=draw(st.integers(0, size // 2)), blend=draw(st.sampled_from(["cosine", "flat"])))


lengths = st.integers(1, 110)


def documented_weight(length: int, position: int, tiling: Tiling) -> float:
    """Along one side: a raised cosine over the overlap, rounded up to 1/1024; 1 elsewhere."""
    distance = min(position, length - 1 - position)
    if tiling.blend == "flat" or length < tiling.size or distance >= tiling.overlap:
        return 1.0
    return float(np.ceil((0.5 - 0.5 * np.cos(np.pi * (distance + 0.5) / tiling.overlap)) * 1024) / 1024)


def stitched(image: np.ndarray, tiling: Tiling) -> np.ndarray:
    cut = windows(image.shape[1], image.shape[2], tiling)
    tiles = ((window, image[:, window.rows, window.cols]) for window in cut)
    bands = list(stitch(tiles, image.shape[2], weight(cut[0].height, cut[0].width, tiling), np.zeros))
    assert all(band.dtype == np.float64 and band.shape[1] > 0 for band in bands)
    return np.concatenate(bands, axis=1)


@given(lengths, lengths, tilings(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_tiles_that_agree_give_the_image_back_bit_for_bit(height: int, width: int, tiling: Tiling, seed: int) -> None:
    # Any bit pattern but NaN's: subnormal and huge numbers, both zeros.
    bits = np.random.default_rng(seed).integers(0, 2**32, (2, height, width), np.uint32)
    image = bits.view(np.float32)
    image[~np.isfinite(image)] = 1 / 3
    np.testing.assert_array_equal(stitched(image, tiling).astype(np.float32), image)
    np.testing.assert_array_equal(stitched(image, tiling), image.astype(np.float64))


@given(hnp.arrays(np.float32, (1, 70, 40), elements=st.floats(width=32, allow_nan=False)), tilings())
@settings(deadline=None, max_examples=30)
def test_extreme_logits_come_back_too(image: np.ndarray, tiling: Tiling) -> None:
    np.testing.assert_array_equal(stitched(image, tiling).astype(np.float32), image)


@given(lengths, lengths, tilings(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_torch_gives_the_image_back_bit_for_bit(height: int, width: int, tiling: Tiling, seed: int) -> None:
    image = torch.randn((3, height, width), generator=torch.Generator().manual_seed(seed))
    cut = windows(height, width, tiling)
    tiles = ((window, image[:, window.rows, window.cols]) for window in cut)
    weights = torch.from_numpy(weight(cut[0].height, cut[0].width, tiling))
    bands = list(stitch(tiles, width, weights, lambda shape: torch.zeros(shape, dtype=torch.float64)))
    assert torch.equal(torch.cat(bands, dim=1).float(), image)


@given(lengths, lengths, tilings(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_tiles_that_differ_are_averaged_with_their_weights(height: int, width: int, tiling: Tiling, seed: int) -> None:
    cut = windows(height, width, tiling)
    shape = (2, cut[0].height, cut[0].width)
    logits = np.random.default_rng(seed).standard_normal((len(cut), *shape)).astype(np.float32)
    weights = weight(*shape[1:], tiling)
    bands = list(stitch(zip(cut, logits, strict=True), width, weights, np.zeros))

    totals, counts = np.zeros((2, height, width)), np.zeros((height, width))
    for window, tile in zip(cut, logits, strict=True):
        for row in range(window.height):
            for_row = documented_weight(window.height, row, tiling)
            for_cols = [documented_weight(window.width, col, tiling) for col in range(window.width)]
            totals[:, window.row_off + row, window.cols] += tile[:, row] * (for_row * np.array(for_cols))
            counts[window.row_off + row, window.cols] += for_row * np.array(for_cols)
    np.testing.assert_allclose(np.concatenate(bands, axis=1), totals / counts, rtol=1e-12, atol=1e-12)


@given(tilings(), st.data())
def test_weights_are_positive_symmetric_and_of_at_most_20_bits(tiling: Tiling, data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(1, tiling.size)) for _ in range(2))
    weights = weight(height, width, tiling)
    assert weights.shape == (height, width)
    assert weights.min() > 0
    assert 0.99 < weights.max() <= 1
    np.testing.assert_array_equal(weights, weights[::-1, ::-1])
    np.testing.assert_array_equal(weights * 2**20, np.round(weights * 2**20))


def test_flat_weights_are_all_one_and_cosine_weights_fall_towards_the_edge() -> None:
    assert (weight(64, 64, Tiling(size=64, overlap=16, blend="flat")) == 1).all()
    middle = weight(64, 64, Tiling(size=64, overlap=16))[32]
    assert (np.diff(middle[:16]) > 0).all()
    assert (middle[16:48] == 1).all()
    assert middle[0] < 0.01
    assert (weight(64, 64, Tiling(size=64, overlap=0)) == 1).all()


def test_half_of_two_tiles_each_where_they_meet_evenly() -> None:
    tiling = Tiling(size=32, overlap=8, blend="flat")
    cut = windows(32, 56, tiling)
    tiles = [(window, np.full((1, 32, 32), value, np.float32)) for window, value in zip(cut, (1, 3), strict=True)]
    (band,) = stitch(tiles, 56, weight(32, 32, tiling), np.zeros)
    np.testing.assert_array_equal(band[0, 0], [1] * 24 + [2] * 8 + [3] * 24)


def test_bands_are_yielded_before_all_tiles_are_read_and_hold_only_what_is_open() -> None:
    tiling = Tiling(size=32, overlap=8)
    height, width = 32 + 24 * 9, 80
    cut = windows(height, width, tiling)
    per_row = len({window.col_off for window in cut})
    num_read = 0
    allocated: list[tuple[int, ...]] = []

    def tiles() -> Iterator[tuple[Window, np.ndarray]]:
        nonlocal num_read
        for window in cut:
            num_read += 1
            yield window, np.ones((3, window.height, window.width), np.float32)

    def zeros(shape: tuple[int, ...]) -> Any:
        allocated.append(shape)
        return np.zeros(shape)

    bands = stitch(tiles(), width, weight(32, 32, tiling), zeros)
    num_rows = 0
    for index, band in enumerate(bands):
        num_rows += band.shape[1]
        assert num_read == min(len(cut), (index + 1) * per_row + 1)
    assert (index, num_rows) == (9, height)
    assert {shape[-2] for shape in allocated} == {32}


@pytest.mark.parametrize("blend", ["cosine", "flat"])
def test_a_large_offset_does_not_leak_from_one_tile_into_pixels_beyond_it(blend: Any) -> None:
    tiling = Tiling(size=32, overlap=16, blend=blend)
    cut = windows(64, 64, tiling)
    tiles = []
    for window in cut:
        logits = np.zeros((1, 32, 32), np.float32)
        if (window.row_off, window.col_off) == (0, 0):
            logits += 1e30
        tiles.append((window, logits))
    image = np.concatenate(list(stitch(tiles, 64, weight(32, 32, tiling), np.zeros)), axis=1)[0]
    assert (image[:32, :32] > 0).all()
    assert (image[32:] == 0).all()
    assert (image[:, 32:] == 0).all()
