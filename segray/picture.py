"""Windows of scenes, as a person can look at them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from segray.catalog import described
from segray.errors import Reject
from segray.preprocessing import Preprocessing, match_bands
from segray.rgb import colours, stretched
from segray.scene import Scene, read
from segray.tile import Scenes, Window

__all__ = ["picture"]

_NUM_SCENES = 64


def picture(
    row: Mapping[str, Any], preprocessing: Preprocessing, scenes: Scenes
) -> UInt8[np.ndarray, "height width 3"]:
    """What a window shows, in three of the scene's bands.

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
    three: list[str] = []
    wanted: list[str] = []

    def match(names: Sequence[str]) -> list[str]:
        three.extend(names[position] for position in colours(names))
        wanted.extend(dict.fromkeys([match_bands(preprocessing, names)[0], *three]))
        return wanted

    scene = described(uri, version, None, scenes, match)
    return scene, [wanted.index(name) for name in three]
