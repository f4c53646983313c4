"""Band and Scene: what a scene is, and which of its bands are meant."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from affine import Affine
from jaxtyping import Float64

from segray.errors import Reject
from segray.scene import place
from segray.scene.place import Grid, Transform
from segray.tile import Window

__all__ = ["Band", "Listed", "Scene", "chosen", "declared_nodata", "placed"]


@dataclass(frozen=True, slots=True)
class Band:
    """One band of a scene, and how its samples become values: sample · scale + offset."""

    name: str
    """By which it is chosen."""
    path: str
    """Of its file, as GDAL opens it."""
    index: int
    """In that file, from 1."""
    dtype: str
    """Of its samples, as numpy calls it."""
    scale: float = 1.0
    """That samples are multiplied by."""
    offset: float = 0.0
    """That is added then."""
    nodata: float | None = None
    """The sample that says that there is no data; NaN always does."""
    alpha: int | None = None
    """The band of the same file that is 0 where there is no data."""
    mask: str | None = None
    """The file that is 0 where there is no data, if GDAL does not find it by itself."""
    grid: Grid | None = None
    """Its own. None: it is the scene's."""
    aliases: tuple[str, ...] = ()
    """Further names by which it can be chosen."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A band before its file was looked at; None: it is as the file says."""

    name: str
    path: str
    index: int = 1
    aliases: tuple[str, ...] = ()
    scale: float | None = None
    offset: float | None = None
    nodata: float | None = None
    is_hidden: bool = False
    """It is there for who names it alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A raster with a place on Earth. Its grid is that of its first band.

    Raises:
        Reject: it has no band, or the grids of two bands do not fit together.
    """

    uri: str
    """The raster, the STAC item or the template, as it was named."""
    version: str
    """Of what is there."""
    bands: tuple[Band, ...]
    """In the order in which `read` returns them."""
    height: int
    """In pixels."""
    width: int
    """In pixels."""
    crs: str
    """As an authority calls it (`EPSG:32616`), else as WKT."""
    transform: Transform
    """From pixels to the CRS."""

    def __post_init__(self) -> None:
        if not self.bands:
            raise Reject("decode", "no bands", "there is nothing to read")
        for band in self.bands:
            if band.grid is not None:
                self._check_grid(band, band.grid)

    def _check_grid(self, band: Band, grid: Grid) -> None:
        there = ~Affine(*grid.transform) @ Affine(*self.transform)
        reference = self.bands[0].name
        if max(abs(there.b) * self.height, abs(there.d) * self.width) > place.DRIFT_PIXELS:
            detail = f"{band.name} is turned against {reference}; warp one onto the other with gdalwarp"
            raise Reject("decode", "grids do not fit", detail)
        cols = sorted((there.c, there.c + there.a * self.width))
        rows = sorted((there.f, there.f + there.e * self.height))
        if cols[0] >= grid.width or cols[1] <= 0 or rows[0] >= grid.height or rows[1] <= 0:
            detail = f"{band.name} lies beside {reference}: are they of one scene?"
            raise Reject("decode", "grids do not fit", detail)

    def select(self, names: Sequence[str]) -> "Scene":
        """The scene with these bands alone, in this order; its grid becomes that of the first one.

        Args:
            names: names of bands, or aliases of theirs; so they are called from then on.

        Raises:
            Reject: there is no such band, or the grids do not fit together.
        """
        own = Grid(self.height, self.width, self.transform)
        bands = chosen(self.bands, {name: name for name in names})
        return placed(self.uri, self.version, self.crs, [(band, band.grid or own) for band in bands])

    def window_transform(self, window: Window) -> Transform:
        """From pixels of a window to the CRS."""
        return place.six(Affine(*self.transform) @ Affine.translation(window.col_off, window.row_off))

    def bounds(self, window: Window) -> tuple[float, float, float, float]:
        """West, south, east and north of a window in degrees (EPSG:4326).

        Edges bend on their way there, so they are followed, not the corners alone; of a rotated window they are those
        of the upright rectangle around it. Longitudes lie in [-180, 180]; as in GeoJSON, west is greater than east
        where the window crosses the antimeridian.

        Raises:
            Reject: it is not on Earth.
        """
        return place.bounds(self.crs, self._grid(window))

    def turns(self, window: Window) -> list[tuple[float, float]]:
        """By how much (x, y) pixels of a window lie off the places that longitudes in [-180, 180] lead to."""
        return place.turns(self.crs, self._grid(window))

    def pixel_areas(self, window: Window) -> Float64[np.ndarray, "height width"]:
        """The area of each pixel of a window on the ellipsoid, in m²; perhaps a view that cannot be written to."""
        return place.pixel_areas(self.crs, self._grid(window))

    def _grid(self, window: Window) -> Grid:
        return Grid(window.height, window.width, self.window_transform(window))


def declared_nodata(nodata: float | int | str | None) -> float | None:
    """Nodata as a file or an item declares it, unless it is NaN: that is never valid, and equals not even itself."""
    return None if nodata is None or math.isnan(float(nodata)) else float(nodata)


Named = TypeVar("Named", Band, Listed)


def chosen(known: Sequence[Named], wanted: Mapping[str, str]) -> list[Named]:
    """Those of the known bands that are wanted.

    Args:
        known: bands; their names win over aliases.
        wanted: from the name that a band is to have to what it is called.

    Raises:
        Reject: there is no such band.
    """
    by_name = {alias: band for band in reversed(known) for alias in band.aliases} | {band.name: band for band in known}
    missing = [name for name in wanted.values() if name not in by_name]
    if missing:
        raise Reject(
            "decode",
            "bands missing",
            f"{', '.join(missing)} of {', '.join(wanted.values())} not among {', '.join(band.name for band in known)}; "
            f"say which they are, such as {missing[0]}={known[0].name}",
        )
    return [replace(by_name[text], name=name) for name, text in wanted.items()]


def placed(uri: str, version: str, crs: str, bands: Sequence[tuple[Band, Grid]]) -> Scene:
    """The scene on the grid of the first of its bands."""
    if not bands:
        raise Reject("decode", "no bands", "none is wanted")
    first = bands[0][1]
    return Scene(
        uri=uri,
        version=version,
        bands=tuple(replace(band, grid=None if grid == first else grid) for band, grid in bands),
        height=first.height,
        width=first.width,
        crs=crs,
        transform=first.transform,
    )
