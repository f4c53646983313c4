"""Window, Tiling, Scenes: how what is too large for the model, or for the memory, is cut."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from segray.errors import SettingsError

__all__ = ["Scenes", "Tiling", "Window", "cores", "scene_and_window", "window_uri", "windows", "windows_into"]

_OF_SCENE = re.compile(r"(?P<scene>.+)#(?P<window>\d+,\d+,\d+,\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of pixels, in raster order: columns first."""

    col_off: int
    """Columns left of it."""
    row_off: int
    """Rows above it."""
    width: int
    """Columns in it."""
    height: int
    """Rows in it."""

    @property
    def rows(self) -> slice:
        """Its rows, to index an array with."""
        return slice(self.row_off, self.row_off + self.height)

    @property
    def cols(self) -> slice:
        """Its columns, to index an array with."""
        return slice(self.col_off, self.col_off + self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How images larger than the model should see at once are cut and blended.

    Raises:
        SettingsError: a value is out of its bounds.
    """

    size: int = 1024
    """Side of a tile in pixels, as the model sees them; larger images are cut. A model of a fixed size has its own."""

    overlap: int = 128
    """Pixels that neighbouring tiles share; of a fixed size as large a part."""

    blend: Literal["cosine", "flat"] = "cosine"
    """How overlaps are weighted: falling towards a tile's edge, or all alike."""

    def __post_init__(self) -> None:
        if self.size < 32:
            raise SettingsError(f"tiling.size {self.size}: must be at least 32 pixels")
        if not 0 <= self.overlap <= self.size // 2:
            raise SettingsError(
                f"tiling.overlap {self.overlap}: must lie in [0, {self.size // 2}], half of tiling.size {self.size}"
            )
        if self.blend not in ("cosine", "flat"):
            raise SettingsError(f"tiling.blend {self.blend!r}: must be 'cosine' or 'flat'")

    @property
    def stride(self) -> int:
        """Pixels from one tile to the next."""
        return self.size - self.overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenes:
    """How georeferenced rasters are cut, each window with its surroundings, so that windows are independent.

    Raises:
        SettingsError: a value is out of its bounds.
    """

    size: int | None = None
    """Take SOURCE for scenes (GeoTIFF, COG, JPEG 2000, VRT, STAC items), labelled in windows of so many pixels a side,
    or as many more as the model's stride asks for; 1024 is usual. None: for images."""

    halo: int = 128
    """Pixels around a window that the model sees too, and that are not kept; likewise."""

    area: str | None = None
    """A GeoJSON file in longitude and latitude; what lies outside of it is neither read nor labelled."""

    bands: tuple[str, ...] = ()
    """What scenes call the bands that the model is fed: red=B4 nir=B5, as in SOURCE/LC08_*_{band}.TIF, in STAC items,
    or by the numbers of a raster's bands. Left out: they are called alike."""

    scale: float | None = None
    """Samples are multiplied by it, such as 0.0001, to be reflectances. None: by what files or STAC items say."""

    offset: float | None = None
    """That is added then; likewise."""

    nodata: float | None = None
    """The sample that says that there is no data; likewise."""

    confidence: bool = False
    """Keep each pixel's confidence as well, which `export` makes a raster of; the label store grows several times."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise SettingsError(f"scenes.size {self.size}: must be at least 1 pixel")
        if self.halo < 0:
            raise SettingsError(f"scenes.halo {self.halo}: must be at least 0 pixels")
        if self.size is None and any(getattr(self, field.name) != field.default for field in fields(self)):
            raise SettingsError("other settings of scenes come with scenes.size; give it, such as 1024")
        names = [text.partition("=")[0] for text in self.bands]
        if not all(names) or not all(self.calls.values()):
            raise SettingsError(f"scenes.bands {' '.join(self.bands)}: give each as NAME=WHAT, such as red=B4")
        if len({name.casefold() for name in names}) < len(names):
            raise SettingsError(f"scenes.bands {' '.join(self.bands)}: a name stands there twice")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Scenes":
        """How the scenes of a recipe were cut; its area stands in the recipe itself."""
        told = {name: value for name, value in fields.items() if name != "area"}
        return cls(**told | {"bands": tuple(told.get("bands", ()))})

    @property
    def calls(self) -> dict[str, str]:
        """What scenes call the bands, by their names."""
        parts = (text.partition("=") for text in self.bands)
        return {name: called if equals else name for name, equals, called in parts}

    def around(self, core: Window, height: int, width: int) -> Window:
        """What is read for a window of a scene of so many pixels: the window and its halo, up to the scene's border."""
        left, top = max(core.col_off - self.halo, 0), max(core.row_off - self.halo, 0)
        right = min(core.col_off + core.width + self.halo, width)
        bottom = min(core.row_off + core.height + self.halo, height)
        return Window(left, top, right - left, bottom - top)


def _offsets(length: int, tiling: Tiling) -> list[int]:
    if length <= tiling.size:
        return [0]
    last = length - tiling.size
    return [*range(0, last, tiling.stride), last]


def windows(height: int, width: int, tiling: Tiling) -> list[Window]:
    """The tiles of an image, row by row.

    Each is `tiling.size` square, or as long as the image where that is shorter. The last
    one of a row or column is moved back to end with the image, so that all have one size.
    """
    tile_height, tile_width = min(height, tiling.size), min(width, tiling.size)
    return [
        Window(col_off, row_off, tile_width, tile_height)
        for row_off in _offsets(height, tiling)
        for col_off in _offsets(width, tiling)
    ]


def cores(height: int, width: int, size: int) -> list[Window]:
    """The windows of a scene, row by row: a grid without overlap, shorter at the right and at the bottom."""
    return [
        Window(left, top, min(size, width - left), min(size, height - top))
        for top in range(0, height, size)
        for left in range(0, width, size)
    ]


def window_uri(scene: str, window: Window) -> str:
    """The URI of a window of the scene at this one."""
    return f"{scene}#{window.col_off},{window.row_off},{window.width},{window.height}"


def scene_and_window(uri: str) -> tuple[str, Window] | None:
    """The inverse of `window_uri`. None: it is none of a window."""
    match = _OF_SCENE.fullmatch(uri)
    return (match["scene"], Window(*map(int, match["window"].split(",")))) if match else None


def windows_into(core: Window, height: int, width: int, tiling: Tiling) -> list[Window]:
    """The tiles of a raster that reach into its core, row by row.

    They lie on one grid with the raster's first pixel, and none is moved back to end with the raster: the last ones
    may reach beyond it. So rasters that overlap have the tiles in common that lie in both, wherever on that grid
    they begin.

    Args:
        core: of the raster's pixels those that count.
        height: of the raster.
        width: of the raster.
        tiling: how it is cut. Where one of its sides is no longer than `tiling.size`, tiles are as long as that.
    """

    def offsets(length: int, first: int, extent: int) -> list[int]:
        if length <= tiling.size:
            return [0]
        needed = range(0, length - tiling.overlap, tiling.stride)  # what follows is seen by the last of them
        return [offset for offset in needed if offset < first + extent and offset + tiling.size > first]

    tile_height, tile_width = min(height, tiling.size), min(width, tiling.size)
    return [
        Window(col_off, row_off, tile_width, tile_height)
        for row_off in offsets(height, core.row_off, core.height)
        for col_off in offsets(width, core.col_off, core.width)
    ]
