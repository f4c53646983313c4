"""Puts the logits of overlapping tiles back together: weight, accumulate, divide.

The arithmetic is exact. A weight has at most 20 significant bits and a float32 logit 24, so
that their products, and the sums of the few that meet in a pixel, fit float64 without rounding.
Where all tiles agree on a pixel the result is therefore that logit to the last bit.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64

from segray.tile import Tiling, Window

__all__ = ["stitch", "weight"]


def _ramp(length: int, tiling: Tiling) -> Float64[np.ndarray, " length"]:
    """Multiples of 1/1024 in (0, 1], rising over the overlap and falling again."""
    ramp = np.ones(length)
    if tiling.blend == "cosine" and length == tiling.size:
        rise = 0.5 - 0.5 * np.cos(np.pi * (np.arange(tiling.overlap) + 0.5) / tiling.overlap)
        ramp[: tiling.overlap] = np.ceil(rise * 1024) / 1024
        ramp[length - tiling.overlap :] = np.minimum(ramp[length - tiling.overlap :], ramp[: tiling.overlap][::-1])
    return ramp


def weight(height: int, width: int, tiling: Tiling) -> Float64[np.ndarray, "height width"]:
    """How much each pixel of a tile counts where it overlaps others; positive everywhere."""
    return np.outer(_ramp(height, tiling), _ramp(width, tiling))


def stitch(
    tiles: Iterable[tuple[Window, Any]], width: int, weights: Any, zeros: Callable[[tuple[int, ...]], Any]
) -> Iterator[Any]:
    """Averages overlapping tiles and yields the image in bands of finished rows, top to bottom.

    Only the rows that a later tile can still reach are held. The arrays may be numpy's or
    torch's, on any device; one kind throughout.

    Args:
        tiles: each window, in the order of `tile.windows`, with its logits, float32
            (classes, height, width). All have one size.
        width: columns of the image.
        weights: float64 (height, width) of a tile, from `weight`.
        zeros: makes a float64 array of zeros of that kind.

    Yields:
        float64 (classes, rows, width) bands, which together are the image.
    """
    top = 0
    totals: Any = None
    counts: Any = None
    for window, logits in tiles:
        if totals is None:
            totals = zeros((logits.shape[0], window.height, width))
            counts = zeros((window.height, width))
        if window.row_off > top:
            done = window.row_off - top
            yield totals[:, :done] / counts[:done]
            rest, rest_counts = totals[:, done:], counts[done:]
            totals, counts = zeros(tuple(totals.shape)), zeros(tuple(counts.shape))
            totals[:, : rest.shape[1]] += rest
            counts[: rest_counts.shape[0]] += rest_counts
            top = window.row_off
        totals[:, :, window.cols] += logits * weights
        counts[:, window.cols] += weights
    yield totals / counts
