"""Values of bands as red, green and blue, for a person to look at."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, UInt8

__all__ = ["colours", "stretched"]

_COLOURS = ("red", "green", "blue")
_PERCENTILES = (2, 98)


def colours(names: Sequence[str]) -> list[int]:
    """Which three bands are shown: those of these colours where they are there, else the first three, or the first.

    Args:
        names: of all bands; case makes no difference.
    """
    by_colour = {name.casefold(): position for position, name in enumerate(names)}
    if by_colour.keys() >= set(_COLOURS):
        return [by_colour[colour] for colour in _COLOURS]
    return [0, 1, 2] if len(names) >= 3 else [0, 0, 0]


def stretched(
    values: Float32[np.ndarray, "3 height width"], valid: Bool[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Brings the middle 96 % of each band's valid values to 0–255; 0 where not valid."""
    if not valid.any():
        return np.zeros((*valid.shape, 3), np.uint8)
    low, high = np.percentile(values[:, valid], _PERCENTILES, axis=1)[:, :, None, None]
    shares = np.divide(values - low, high - low, out=np.full(values.shape, 0.5), where=high > low)
    grey = (255 * np.clip(shares, 0, 1) + 0.5).astype(np.uint8)
    return np.ascontiguousarray(np.where(valid, grey, 0).transpose(1, 2, 0))
