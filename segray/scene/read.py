"""read: the values of a window, on the scene's grid."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import rasterio
from affine import Affine
from jaxtyping import Bool, Float32, Int64, UInt16
from rasterio.enums import MaskFlags

from segray.errors import Reject
from segray.scene.bands import Band, Scene
from segray.scene.gdal import opened, with_dataset
from segray.tile import Window

__all__ = ["read", "read_ids"]

_STEPS = 2**12  # of a pixel; such weights, and products of two of them, add up without rounding


def read(
    scene: Scene, window: Window
) -> tuple[Float32[np.ndarray, "bands height width"], Bool[np.ndarray, "height width"]]:
    """The values of a window, and where there are any.

    Bands of another resolution are brought to the scene's grid: coarser ones by bilinear interpolation, finer ones by
    the mean of what a pixel covers. Such a pixel is valid if half of it or more is. All that is reckoned from the
    pixel's place in the scene, so that windows side by side join without a seam.

    Args:
        scene: from `describe`.
        window: lies inside the scene.

    Returns:
        (bands, height, width) float32, sample · scale + offset, 0 where not valid; and (height, width) bool, False
        where one of the bands has no data: declared nodata, alpha or mask 0, NaN, infinite.

    Raises:
        Reject: a file is gone, truncated or corrupt.
        RunError: the store cannot be reached.
    """
    assert 0 <= window.col_off and window.col_off + window.width <= scene.width, (window, scene.width)
    assert 0 <= window.row_off and window.row_off + window.height <= scene.height, (window, scene.height)
    values = np.zeros((len(scene.bands), window.height, window.width), np.float32)
    valid = np.ones((window.height, window.width), bool)
    positions: dict[str, list[int]] = {}
    for position, band in enumerate(scene.bands):
        positions.setdefault(band.path, []).append(position)
    for path, some in positions.items():
        bands = [scene.bands[position] for position in some]
        in_window = functools.partial(_in_window, scene=scene, bands=bands, window=window)
        values[some], usable = with_dataset(path, scene.version, in_window)
        valid &= usable
    np.copyto(values, 0, where=~valid)
    return values, valid


def read_ids(scene: Scene, window: Window, void: int) -> UInt16[np.ndarray, "height width"]:
    """The class ids of a window, where the scene is a raster of one band that holds such.

    Args:
        scene: from `describe`.
        window: lies inside the scene.
        void: the id of pixels without data.

    Raises:
        Reject: as `read`; or what it holds are no ids.
        RunError: the store cannot be reached.
    """
    (values,), valid = read(scene, window)
    ids = np.where(valid, values, np.float32(void))
    if (strange := ids[(ids != ids.round()) | (ids < 0) | (ids > 0xFFFF)]).size:
        detail = f"it holds {strange[0]:g}, which is no class id; declare it as nodata if it stands for void"
        raise Reject("decode", "unknown id", detail)
    return ids.astype(np.uint16)


def _in_window(
    dataset: rasterio.DatasetReader, *, scene: Scene, bands: Sequence[Band], window: Window
) -> tuple[Float32[np.ndarray, "bands height width"], Bool[np.ndarray, "height width"]]:
    """Bands of one file on the scene's grid."""
    grid = bands[0].grid
    if grid is None:
        return _samples(dataset, bands, window, scene.version)
    there = ~Affine(*grid.transform) @ Affine(*scene.transform)
    rows = _axis(window.row_off, window.height, there.e, there.f, grid.height)
    cols = _axis(window.col_off, window.width, there.a, there.c, grid.width)
    values, valid = _samples(dataset, bands, Window(cols.first, rows.first, cols.length, rows.length), scene.version)
    if valid.all() and rows.is_whole and cols.is_whole:  # all below would divide by 1
        return _weighed(values, rows.values, cols.values), np.ones((window.height, window.width), bool)
    known = valid[None].astype(np.float32)
    weighed = _weighed(np.concatenate([values, known]), rows.values, cols.values)
    cover = _weighed(known, rows.cover, cols.cover)[0]
    valid = (cover > 0.4999) & (weighed[-1] > 0)
    return np.divide(weighed[:-1], weighed[-1], out=np.zeros_like(weighed[:-1]), where=valid), valid


class _Kernel(NamedTuple):
    """Which of the pixels read make up each pixel of an axis, and how much each of them counts."""

    sources: Int64[np.ndarray, "taps length"]
    weights: Float32[np.ndarray, "taps length"]


class _Axis(NamedTuple):
    """An axis of a window, on the grid of another raster."""

    values: _Kernel
    cover: _Kernel  # counts how much of a pixel lies in which of the other grid
    first: int  # the first pixel there that is needed
    length: int  # how many are
    is_whole: bool  # the weights of each pixel add up to 1, to the last bit


def _axis(first: int, length: int, scale: float, offset: float, source_length: int) -> _Axis:
    """An axis of pixels from `first` on; pixel p begins at scale · p + offset on the other grid."""
    # Rounded, as a quotient of resolutions is rarely exact, and half of a pixel decides whether it is valid.
    edges = np.round(offset + scale * np.arange(first, first + length + 1), 6)
    low, high = np.minimum(edges[:-1], edges[1:]), np.maximum(edges[:-1], edges[1:])
    ratio = abs(scale)
    covered = np.floor(low).astype(np.int64) + np.arange(math.ceil(ratio - 1e-6) + 1)[:, None]
    cover = np.clip(np.minimum(high, covered + 1) - np.maximum(low, covered), 0, None) / ratio
    sources, weights = covered, cover
    if ratio <= 1:
        centre = (low + high) / 2 - 0.5
        sources = np.floor(centre).astype(np.int64) + np.arange(2)[:, None]
        right = np.round((centre - sources[0]) * _STEPS) / _STEPS
        weights = np.stack([1 - right, right])
    begin = int(np.clip(min(sources.min(), covered.min()), 0, source_length - 1))
    end = int(np.clip(max(sources.max(), covered.max()) + 1, begin + 1, source_length))

    def kernel(sources: np.ndarray, weights: np.ndarray) -> _Kernel:
        is_inside = (sources >= 0) & (sources < source_length)
        return _Kernel(np.clip(sources, begin, end - 1) - begin, np.where(is_inside, weights, 0).astype(np.float32))

    is_whole = ratio <= 1 and sources.min() >= 0 and sources.max() < source_length
    return _Axis(kernel(sources, weights), kernel(covered, cover), begin, end - begin, bool(is_whole))


def _weighed(
    planes: Float32[np.ndarray, "planes source_height source_width"], rows: _Kernel, cols: _Kernel
) -> Float32[np.ndarray, "planes height width"]:
    # For each pixel the same sum in the same order, in whatever window; a matrix product would not promise that.
    high = np.zeros((planes.shape[0], rows.sources.shape[1], planes.shape[2]), np.float32)
    for source, weight in zip(rows.sources, rows.weights, strict=True):
        high += np.take(planes, source, axis=1) * weight[:, None]
    wide = np.zeros((*high.shape[:2], cols.sources.shape[1]), np.float32)
    for source, weight in zip(cols.sources, cols.weights, strict=True):
        wide += np.take(high, source, axis=2) * weight
    return wide


def _samples(
    dataset: rasterio.DatasetReader, bands: Sequence[Band], window: Window, version: str
) -> tuple[Float32[np.ndarray, "bands height width"], Bool[np.ndarray, "height width"]]:
    """Bands of one file on its own grid: values, 0 where not valid, and where they are."""
    place = rasterio.windows.Window(window.col_off, window.row_off, window.width, window.height)
    indexes = [band.index for band in bands]
    samples: Sequence[np.ndarray]
    if len({dataset.dtypes[index - 1] for index in indexes}) == 1:
        samples = dataset.read(indexes, window=place)
    else:
        samples = [dataset.read(index, window=place) for index in indexes]
    values = np.empty((len(bands), window.height, window.width), np.float32)
    valid = np.ones((window.height, window.width), bool)
    with np.errstate(over="ignore", invalid="ignore"):  # float64 that is too large for float32 is infinite
        for band, sample, value in zip(bands, samples, values, strict=True):
            if band.nodata is not None:
                valid &= sample != _as_sample(band.nodata, sample.dtype)  # NaN is found below
            value[:] = sample
            if (band.scale, band.offset) != (1.0, 0.0):
                value *= band.scale
                value += band.offset
            if sample.dtype.kind == "f":
                valid &= np.isfinite(value)
    flags = {index: dataset.mask_flag_enums[index - 1] for index in indexes}
    of_all = [
        index for index in indexes if MaskFlags.per_dataset in flags[index] and MaskFlags.alpha not in flags[index]
    ]
    for index in [*of_all[:1], *(index for index in indexes if not flags[index])]:  # without flags: one of its own
        valid &= dataset.read_masks(index, window=place) > 0
    if bands[0].alpha is not None:
        valid &= dataset.read(bands[0].alpha, window=place) > 0
    if bands[0].mask is not None:
        with opened(bands[0].mask, version) as mask:
            valid &= mask.read(1, window=place) > 0
    np.copyto(values, 0, where=~valid)
    return values, valid


def _as_sample(nodata: float, dtype: np.dtype[Any]) -> Any:
    """Nodata as samples have it: -3.4028234663852886e38 is given in decimal, and rarely to the last bit."""
    if dtype.kind == "f":
        return np.asarray(nodata, dtype)[()]
    return int(nodata) if nodata.is_integer() else nodata
