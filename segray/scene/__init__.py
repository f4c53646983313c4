"""Scenes: rasters with a place on Earth, and their pixels, a window at a time.

A scene is one raster (GeoTIFF, COG, JPEG 2000, VRT, what else GDAL reads), a file a band that a STAC item lists, or
a template with `{band}` in it that is filled in. `describe` looks at the files once; what it returns travels to
whichever process reads windows of it.

`gdal.py` opens files wherever they lie, `place.py` knows where pixels are and how large, `bands.py` says what a scene
is, `stac.py` finds the bands of an item, `describe.py` looks at files, and `read.py` reads windows.
"""

from segray.scene.bands import Band, Scene
from segray.scene.describe import describe
from segray.scene.place import Grid, Transform
from segray.scene.read import read, read_ids

__all__ = ["Band", "Grid", "Scene", "Transform", "describe", "read", "read_ids"]
