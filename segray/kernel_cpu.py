"""The tail of a network as a loop that Numba compiles, for CPUs: each row's logits in the first caches."""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numba
import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from segray.tail import LOG2_E, Grid, empty_maps, neighbours
from segray.tile import Window

__all__ = ["label"]

_LOG2_E = np.float32(LOG2_E)
_LEAST = np.float32(-126)  # of which 2 to the power of it is a number of full precision
_TAYLOR = tuple(np.float32(math.log(2) ** n / math.factorial(n)) for n in range(7))  # of 2^x; good to 1e-7 within ±1/2


def label(
    logits: Float32[Tensor, "batch num_classes h w"], grid: Grid, window: Window
) -> tuple[Int[Tensor, "batch height width"], Float32[Tensor, "batch height width"]]:
    """A `tail.Tail`. Takes as many threads as torch does."""
    num_images, num_classes, h, w = logits.shape
    label_maps, confidence = empty_maps(num_images, num_classes, window, logits.device)
    rows = neighbours(h, grid.height, grid.align_corners, window.rows, logits.device)
    columns = neighbours(w, grid.width, grid.align_corners, window.cols, logits.device)
    # Else one that is not finite would reach its neighbour, at weight 0.
    step = 0 if (h, w) == (grid.height, grid.width) else 1
    loop = _compiled(label_maps.numpy().dtype)

    def label_part(image: int, first: int, end: int) -> None:
        of_rows = *rows, label_maps[image], confidence[image]
        loop(logits[image].numpy(), *(some[first:end].numpy() for some in of_rows), *(c.numpy() for c in columns), step)

    num_parts = min(torch.get_num_threads(), window.height)
    bounds = [window.height * part // num_parts for part in range(num_parts + 1)]
    parts = [(image, *part) for image in range(num_images) for part in pairwise(bounds)]
    if num_parts == 1:
        for part in parts:
            label_part(*part)
    else:
        with ThreadPoolExecutor(num_parts) as threads:
            list(threads.map(label_part, *zip(*parts, strict=True)))
    return label_maps, confidence


@functools.cache
def _compiled(dtype: np.dtype) -> Callable[..., None]:
    """The loop for label maps of this dtype, which runs without Python's lock."""
    numbers, positions = numba.float32[::1], numba.int64[::1]
    maps = numba.from_dtype(dtype)[:, ::1], numba.float32[:, ::1]
    form = numba.void(numba.float32[:, :, :], positions, numbers, *maps, positions, numbers, numba.int64)
    try:
        loop: Callable[..., None] = numba.njit(form, nogil=True, error_model="numpy", cache=True)(_label)
    except RuntimeError:  # no folder can be written: each process compiles it anew
        loop = numba.njit(form, nogil=True, error_model="numpy")(_label)
    return loop


def _label(
    logits: Float32[np.ndarray, "num_classes h w"],
    tops: Int64[np.ndarray, " height"],
    row_weights: Float32[np.ndarray, " height"],
    label_map: Int[np.ndarray, "height width"],
    confidence: Float32[np.ndarray, "height width"],
    lefts: Int64[np.ndarray, " width"],
    column_weights: Float32[np.ndarray, " width"],
    step: int,
) -> None:
    num_classes, h, w = logits.shape
    width = len(lefts)
    # Of even and of odd coarse rows the newest, at full width.
    held = np.full(2, -1)
    wide = np.empty((2, num_classes, width), np.float32)
    values = np.empty((num_classes, width), np.float32)
    best, total = np.empty(width, np.float32), np.empty(width, np.float32)
    first = np.empty(width, np.int32)
    for row in range(len(tops)):
        top, row_weight = tops[row], row_weights[row]
        bottom = min(top + step, h - 1)
        for coarse in (top, bottom):
            if held[coarse % 2] != coarse:
                held[coarse % 2] = coarse
                for class_id in range(num_classes):
                    for x in range(width):
                        left = logits[class_id, coarse, lefts[x]]
                        right = logits[class_id, coarse, min(lefts[x] + step, w - 1)]
                        wide[coarse % 2, class_id, x] = left + column_weights[x] * (right - left)
        for class_id in range(num_classes):
            upper, lower = wide[top % 2, class_id], wide[bottom % 2, class_id]
            for x in range(width):
                value = upper[x] + row_weight * (lower[x] - upper[x])
                values[class_id, x] = value
                is_better = class_id == 0 or value > best[x]
                first[x] = class_id if is_better else first[x]
                best[x] = value if is_better else best[x]
        total[:] = 0
        for class_id in range(num_classes):
            for x in range(width):
                total[x] += _exp2((values[class_id, x] - best[x]) * _LOG2_E)
        for x in range(width):
            label_map[row, x] = first[x]
            confidence[row, x] = np.float32(1) / total[x]


@numba.njit(fastmath={"contract"})
def _exp2(power: np.float32) -> np.float32:
    """2 to a power of at most 0, in operations that compilers vectorise."""
    power = _LEAST if power < _LEAST else power  # not max, which NaN need not pass
    whole = np.float32(np.rint(power))
    part = power - whole
    fraction = _TAYLOR[6]
    for n in range(5, -1, -1):
        fraction = fraction * part + _TAYLOR[n]
    exponent = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return fraction * exponent.view(np.float32)
