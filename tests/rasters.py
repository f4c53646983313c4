"""Small rasters with a place on Earth, for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine

UTM = "EPSG:32616"
UTM_GRID = Affine(10, 0, 452475, 0, -10, 3408645)
DEGREES = "EPSG:4326"
DEGREES_GRID = Affine(1e-4, 0, 11.3, 0, -1e-4, 48.2)
BANDS = ("red", "green", "blue", "nir")
NODATA = 255

TRANSFORM = Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000)


def samples(height: int, width: int, num_bands: int = len(BANDS), seed: int = 0) -> np.ndarray:
    """Whole numbers from 0 to 3, uint8."""
    drawn: np.ndarray = np.random.default_rng(seed).integers(0, 4, (num_bands, height, width), np.uint8)
    return drawn


def write_raster(path: Path, samples: np.ndarray, names: tuple[str, ...] = (), **form: Any) -> Path:
    """Writes a GeoTIFF of (bands, height, width), in EPSG:32633 unless told; returns its path."""
    count, height, width = samples.shape
    place = {"crs": "EPSG:32633", "transform": TRANSFORM} | form
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", "GTiff", width, height, count, dtype=samples.dtype, **place) as raster:
        for index, name in enumerate(names, 1):
            raster.set_band_description(index, name)
        raster.write(samples)
    return path


def write(path: Path, bands: np.ndarray, *, names: tuple[str, ...] = BANDS, **form: Any) -> str:
    """Writes (bands, height, width) in blocks of 32 pixels, in UTM unless told, and returns the path."""
    blocks = {"tiled": True, "blockxsize": 32, "blockysize": 32}
    place = {"crs": UTM, "transform": UTM_GRID, "nodata": NODATA}
    return str(write_raster(path, bands, names, **(blocks | place | form)))


def write_area(path: Path, *rings: Sequence[tuple[float, float]]) -> str:
    """Writes polygons of longitudes and latitudes as GeoJSON, and returns the path."""
    features = [
        {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}}
        for ring in rings
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return str(path)
