"""Windows of scenes, as a person can look at them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from segray.catalog import described
from segray.errors import Reject
from segray.preprocessing import Preprocessing, match_bands
from segray.scene import Scene, read
from segray.tile import Scenes, Window

__all__ = ["picture", "stretched"]

_COLOURS = ("red", "green", "blue")
_PERCENTILES = (2, 98)
_NUM_SCENES = 64


def picture(
    row: Mapping[str, Any], preprocessing: Preprocessing, scenes: Scenes
) -> UInt8[np.ndarray, "height width 3"]:
    """What a window shows: red, green and blue where the scene has them, else its first three bands, or its first.

    Args:
        row: of a window, with what `sink.LABEL_MAPS` says of its place.
        preprocessing: of the model that labelled it, whose first band's grid is the window's.
        scenes: how it was cut, and what its bands are called.

    Returns:
        (height, width, 3) uint8, RGB; black where there is no data.

    Raises:
        Reject: the scene is gone or damaged, lies elsewhere by now, or has no longer the bands that the model sees.
        RunError: the store cannot be reached.
    """
    scene, positions = _looked_at(row["scene"], row["version"], preprocessing, scenes)
    window = Window(*(row[name] for name in ("col_off", "row_off", "width", "height")))
    place = scene.crs, scene.window_transform(window)
    is_inside = window.col_off + window.width <= scene.width and window.row_off + window.height <= scene.height
    if not is_inside or place != (row["crs"], tuple(row[f"transform_{letter}"] for letter in "abcdef")):
        raise Reject("decode", "changed", "the scene has another grid now than when it was labelled")
    values, valid = read(scene, window)
    return stretched(values[positions], valid)


@functools.lru_cache(_NUM_SCENES)
def _looked_at(uri: str, version: str, preprocessing: Preprocessing, scenes: Scenes) -> tuple[Scene, list[int]]:
    """A scene on the grid on which it was labelled, and which of its bands are red, green and blue."""
    shown: list[str] = []
    wanted: list[str] = []

    def match(names: Sequence[str]) -> list[str]:
        by_colour = {name.casefold(): name for name in names}
        shown.extend(by_colour[colour] for colour in _COLOURS if colour in by_colour)
        if len(shown) < len(_COLOURS):
            shown[:] = names[:3] if len(names) >= 3 else [names[0]] * 3
        wanted.extend(dict.fromkeys([match_bands(preprocessing, names)[0], *shown]))
        return wanted

    scene = described(uri, version, None, scenes, match)
    return scene, [wanted.index(name) for name in shown]


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
