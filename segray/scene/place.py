"""Where pixels lie: their way to EPSG:4326, and how large they are."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from affine import Affine
from jaxtyping import Float64, Int64
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError, ProjError

from segray.errors import Reject
from segray.scene.gdal import one_line

__all__ = ["DRIFT_PIXELS", "Grid", "Transform", "bounds", "is_one_crs", "is_one_grid", "pixel_areas", "six", "turns"]

Transform = tuple[float, float, float, float, float, float]
"""Affine a, b, c, d, e, f: pixel (col, row) lies at x = a·col + b·row + c, y = d·col + e·row + f."""

DRIFT_PIXELS = 0.01
"""By which two grids may lie apart and be one."""

_NODE_PIXELS = 32


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the pixels of a raster lie in its CRS."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""
    transform: Transform
    """From pixels to the CRS."""


def six(transform: Affine) -> Transform:
    """The six numbers of an affine transform."""
    return (transform.a, transform.b, transform.c, transform.d, transform.e, transform.f)


def is_one_crs(one: str, other: str) -> bool:
    """Whether they are the same, whatever they are called."""
    return one == other or CRS.from_user_input(one) == CRS.from_user_input(other)


def is_one_grid(transform: Transform, grid: Grid) -> bool:
    """Whether pixels lie where those of a grid do, which has the same CRS."""
    there = ~Affine(*transform) @ Affine(*grid.transform)
    corners = [(col, row) for col in (0, grid.width) for row in (0, grid.height)]
    return all(math.dist(there @ corner, corner) <= DRIFT_PIXELS for corner in corners)


def bounds(crs: str, grid: Grid) -> tuple[float, float, float, float]:
    """West, south, east and north in degrees (EPSG:4326).

    Longitudes lie in [-180, 180]; as in GeoJSON, west is greater than east where the antimeridian is crossed.

    Raises:
        Reject: it is not on Earth.
    """
    transform = Affine(*grid.transform)
    corners = [transform @ (col, row) for col in (0, grid.width) for row in (0, grid.height)]
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    try:
        west, south, east, north = _projection(crs).to_wgs84.transform_bounds(
            min(xs), min(ys), max(xs), max(ys), densify_pts=21
        )
    except (CRSError, ProjError) as error:
        raise Reject("decode", "no place", f"no way leads from its CRS to EPSG:4326: {one_line(str(error))}") from error
    highest = 90 + abs(transform.d) + abs(transform.e)  # as pixels may be centred on a pole
    if not all(map(math.isfinite, (west, south, east, north))) or south < -highest or north > highest:
        detail = (
            f"x from {min(xs)} to {max(xs)} and y from {min(ys)} to {max(ys)} lie outside its CRS ({crs[:40]}); where "
            "edges lie off the Earth, as of a full disk, warp it: gdalwarp -t_srs EPSG:4326"
        )
        raise Reject("decode", "no place", detail)
    if west > east:  # as pyproj has it too
        east += 360
    if east - west >= 360:
        west, east = -180.0, 180.0
    turns = math.floor((west + 180) / 360)  # of a grid from 0 to 360
    west, east = west - 360 * turns, east - 360 * turns
    return west, max(south, -90.0), east - 360 if east > 180 else east, min(north, 90.0)


def turns(crs: str, grid: Grid) -> list[tuple[float, float]]:
    """By how much pixels lie off the places (x, y) that longitudes in [-180, 180] lead to; (0, 0) comes first.

    Cylindrical CRSs go on beyond the antimeridian, so that a place on Earth has several in them: the eastern half of a
    grid from 0° to 360° lies 360 off.
    """
    transform, to_wgs84 = Affine(*grid.transform), _projection(crs).to_wgs84
    cols, rows = np.meshgrid(*(np.linspace(0.5, length - 0.5, 5) for length in (grid.width, grid.height)))
    xs, ys = np.array([transform @ pixel for pixel in zip(cols.flat, rows.flat, strict=True)]).T
    side = math.sqrt(abs(transform.determinant))
    found = {(0, 0): (0.0, 0.0)}
    with np.errstate(invalid="ignore"):  # where there is no place on Earth
        lons, lats = to_wgs84.transform(xs, ys)
        there = to_wgs84.transform((lons + 180) % 360 - 180, lats, direction="INVERSE")
        for dx, dy in zip(xs - there[0], ys - there[1], strict=True):
            if not math.isfinite(dx + dy) or max(abs(dx), abs(dy)) < side:
                continue
            # Where meridians meet, as in pseudocylindrical CRSs, what lies beyond the edge is no second place.
            turned_lons, turned_lats = to_wgs84.transform(xs - dx, ys - dy)
            is_second = (np.abs((turned_lons - lons + 180) % 360 - 180) < 1e-6) & (np.abs(turned_lats - lats) < 1e-6)
            if is_second.all():
                found.setdefault((round(dx / side), round(dy / side)), (float(dx), float(dy)))
    return list(found.values())


def pixel_areas(crs: str, grid: Grid) -> Float64[np.ndarray, "height width"]:
    """The area of each pixel on the ellipsoid, in m²; perhaps a view that cannot be written to.

    Upright pixels of a geographic CRS are quadrangles between parallels, whose area has a closed form. All others are
    taken for parallelograms; one in 32 each way is measured, those between are interpolated.
    """
    a, b, c, d, e, f = grid.transform
    projection = _projection(crs)
    if projection.is_geographic and b == d == 0:
        latitudes = projection.radians * (f + e * np.arange(grid.height + 1))
        belts = projection.belt(np.clip(latitudes, -math.pi / 2, math.pi / 2))
        areas = np.abs(np.diff(belts)) * abs(a * projection.radians)
        return np.broadcast_to(areas[:, None], (grid.height, grid.width))

    def in_space(cols: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return projection.in_space(a * cols + b * rows + c, d * cols + e * rows + f)

    cols, rows = _nodes(grid.width), _nodes(grid.height)
    col, row = np.meshgrid(cols, rows)
    with np.errstate(invalid="ignore"):  # where the CRS has no place on Earth there is no area
        across = in_space(col + 0.5, row) - in_space(col - 0.5, row)
        down = in_space(col, row + 0.5) - in_space(col, row - 0.5)
        areas = np.nan_to_num(np.linalg.norm(np.cross(across, down), axis=-1), posinf=0.0)
    smooth: Float64[np.ndarray, "height width"] = _hats(rows, grid.height).T @ areas @ _hats(cols, grid.width)
    return smooth


class _Projection(NamedTuple):
    """From a CRS to the Earth."""

    to_wgs84: Transformer
    to_geodetic: Transformer  # of its own datum
    is_geographic: bool
    radians: float  # a unit of the axes of that datum
    semi_major: float  # metres
    eccentricity: float

    def belt(self, latitudes: np.ndarray) -> np.ndarray:
        """The area between the equator and parallels, by radian of longitude, in m²."""
        sine, eccentricity = np.sin(latitudes), self.eccentricity
        logarithm = np.arctanh(eccentricity * sine) / eccentricity if eccentricity else sine
        half = self.semi_major**2 * (1 - eccentricity**2) / 2
        return np.asarray(half * (sine / (1 - (eccentricity * sine) ** 2) + logarithm))

    def in_space(self, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
        """Points in metres from the centre of the Earth: (..., 3)."""
        longitudes, latitudes = np.multiply(self.to_geodetic.transform(xs, ys), self.radians)
        normal = self.semi_major / np.sqrt(1 - (self.eccentricity * np.sin(latitudes)) ** 2)
        ring = normal * np.cos(latitudes)
        height = normal * np.sin(latitudes) * (1 - self.eccentricity**2)
        return np.stack([ring * np.cos(longitudes), ring * np.sin(longitudes), height], axis=-1)


@functools.lru_cache(64)
def _projection(crs: str) -> _Projection:
    plane = CRS.from_user_input(crs).to_2d()
    to_wgs84 = Transformer.from_crs(plane, "EPSG:4326", always_xy=True)
    geodetic = plane.geodetic_crs
    assert geodetic is not None and geodetic.ellipsoid is not None  # as there is a way to EPSG:4326
    ellipsoid = geodetic.ellipsoid
    return _Projection(
        to_wgs84,
        Transformer.from_crs(plane, geodetic, always_xy=True),
        plane.is_geographic,
        geodetic.axis_info[0].unit_conversion_factor,
        ellipsoid.semi_major_metre,
        math.sqrt(1 - (ellipsoid.semi_minor_metre / ellipsoid.semi_major_metre) ** 2),
    )


def _nodes(length: int) -> Int64[np.ndarray, " nodes"]:
    return np.append(np.arange(0, length, _NODE_PIXELS), length)


def _hats(nodes: Int64[np.ndarray, " nodes"], length: int) -> Float64[np.ndarray, "nodes length"]:
    """How much each node counts at each pixel's centre, in linear interpolation."""
    return np.stack([np.interp(np.arange(length) + 0.5, nodes, one) for one in np.eye(len(nodes))])
