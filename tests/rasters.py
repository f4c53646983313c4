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


def write(
    path: Path,
    bands: np.ndarray,
    *,
    names: Sequence[str] = BANDS,
    crs: str = UTM,
    transform: Affine = UTM_GRID,
    **how: Any,
) -> str:
    """Writes (bands, height, width) as a GeoTIFF in blocks of 32 pixels, and returns its path."""
    count, height, width = bands.shape
    profile = {"dtype": bands.dtype, "crs": crs, "transform": transform, "nodata": NODATA, **how}
    tiling = {"tiled": True, "blockxsize": 32, "blockysize": 32}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", "GTiff", count=count, height=height, width=width, **tiling, **profile) as file:
        file.descriptions = names
        file.write(bands)
    return str(path)


def write_raster(path: Path, samples: np.ndarray, names: tuple[str, ...] = (), **form: Any) -> Path:
    """Writes a GeoTIFF of (bands, height, width), in EPSG:32633 unless told; returns its path."""
    count, height, width = samples.shape
    place = {"crs": "EPSG:32633", "transform": TRANSFORM} | form
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", "GTiff", width, height, count, dtype=samples.dtype, **place) as raster:
        raster.write(samples)
        for index, name in enumerate(names, 1):
            raster.set_band_description(index, name)
    return path


def write_area(path: Path, *rings: Sequence[tuple[float, float]]) -> str:
    """Writes polygons of longitudes and latitudes as GeoJSON, and returns the path."""
    features = [
        {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}}
        for ring in rings
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return str(path)
