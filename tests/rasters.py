"""Small rasters with a place on Earth, for tests."""

from pathlib import Path
from typing import Any

import numpy as np
import rasterio

TRANSFORM = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000)


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
