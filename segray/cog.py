"""The label map of a scene as a Cloud-Optimised GeoTIFF, from windows that come in any order.

They go into a tiled raster on a local disk first, from which windows can be read back, and which then becomes the COG.
Neither is ever in memory as a whole: GDAL keeps `CACHE_BYTES` of them.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import rasterio.errors
import rasterio.shutil
from jaxtyping import UInt

from segray.classes import Classes
from segray.errors import SettingsError
from segray.tile import Window

__all__ = ["CACHE_BYTES", "Canvas", "category_names", "classification", "dtype_of"]

CACHE_BYTES = 64 * 2**20
"""What GDAL may keep in memory."""

_BLOCK = 512


def dtype_of(classes: Classes) -> type[np.uint8] | type[np.uint16]:
    """The dtype of a raster that holds these classes, and their ignore_index where there is no data.

    Raises:
        SettingsError: ignore_index fits neither 8 nor 16 bits.
    """
    if not 0 <= classes.ignore_index <= 0xFFFF:
        raise SettingsError(
            f"ignore_index {classes.ignore_index} cannot be the nodata value of a raster: not in 0–65535"
        )
    return np.uint8 if max(len(classes) - 1, classes.ignore_index) <= 0xFF else np.uint16


def classification(classes: Classes) -> list[dict[str, Any]]:
    """The classes as STAC's classification extension has them, void as nodata."""
    found: list[dict[str, Any]] = []
    for value, (name, (red, green, blue)) in enumerate(zip(classes.names, classes.palette, strict=True)):
        machine = re.sub(r"[^\w-]|[^\x00-\x7f]", "_", name)
        hint = f"{red:02X}{green:02X}{blue:02X}"
        found.append({"value": value, "name": machine, "title": name, "color_hint": hint})
    return [*found, {"value": classes.ignore_index, "name": "nodata", "title": "no data", "nodata": True}]


def category_names(classes: Classes) -> bytes:
    """What lies beside a GeoTIFF (`.aux.xml`) and gives its values the names of classes, in GDAL and QGIS."""
    categories = "".join(f"<Category>{escape(name)}</Category>" for name in classes.names)
    band = f'<PAMRasterBand band="1"><CategoryNames>{categories}</CategoryNames></PAMRasterBand>'
    return f"<PAMDataset>{band}</PAMDataset>".encode()


class Canvas:
    """A raster on a local disk that holds no data at first, and takes maps of windows in any order: labels, confidence.

    A context manager, which closes the file and leaves it there.
    """

    def __init__(
        self,
        path: str,
        *,
        height: int,
        width: int,
        crs: str,
        transform: Sequence[float],
        classes: Classes | None,
        tags: Mapping[str, str],
    ) -> None:
        """Creates the file; what is never written takes no room in it.

        Args:
            path: on a local disk.
            height: rows of pixels.
            width: columns of pixels.
            crs: the coordinate reference system, a code or WKT.
            transform: the affine transform's coefficients a to f.
            classes: what the ids stand for; ignore_index is nodata. None: it holds the confidence of pixels, in 255ths,
                and 0 is nodata.
            tags: the raster's metadata, beside that of the classes.
        """
        self._path, self._resampling = path, "AVERAGE" if classes is None else "MODE"
        # Not compressed: windows that are no multiple of its blocks would be, again and again.
        with warnings.catch_warnings():
            # Of a scene without a transform that is known.
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            self._raster: Any = rasterio.open(
                path,
                "w+",
                driver="GTiff",
                height=height,
                width=width,
                count=1,
                dtype=np.uint8 if classes is None else dtype_of(classes),
                nodata=0 if classes is None else classes.ignore_index,
                crs=crs,
                transform=rasterio.Affine(*transform),
                tiled=True,
                blockxsize=_BLOCK,
                blockysize=_BLOCK,
                sparse_ok=True,
                bigtiff="IF_SAFER",
            )
        self._raster.update_tags(**tags)
        if classes is None:
            self._raster.set_band_description(1, "confidence")
            self._raster.scales = (1 / 255,)
            return
        self._raster.write_colormap(1, dict(enumerate(classes.palette)))
        self._raster.set_band_description(1, "label map")
        self._raster.update_tags(CLASSIFICATION_CLASSES=json.dumps(classification(classes)))
        self._raster.update_tags(1, **{f"CLASS_{class_id}": name for class_id, name in enumerate(classes.names)})

    def __enter__(self) -> "Canvas":
        return self

    def __exit__(self, *_: object) -> None:
        self._raster.close()

    def write(self, window: Window, values: UInt[np.ndarray, "height width"]) -> None:
        """Puts a map where its window is."""
        self._raster.write(values, 1, window=(window.rows, window.cols))

    def read(self, window: Window) -> UInt[np.ndarray, "height width"]:
        """The map of a window."""
        return np.asarray(self._raster.read(1, window=(window.rows, window.cols)))

    def save(self, path: str) -> None:
        """Closes it, and writes its Cloud-Optimised GeoTIFF.

        An overview's pixels are what most of theirs are, and the mean of their confidence.
        """
        self._raster.close()
        options = {"COMPRESS": "DEFLATE", "BLOCKSIZE": _BLOCK, "BIGTIFF": "IF_SAFER", "SPARSE_OK": "TRUE"}
        rasterio.shutil.copy(self._path, path, driver="COG", OVERVIEW_RESAMPLING=self._resampling, **options)
