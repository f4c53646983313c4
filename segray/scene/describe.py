"""describe: a look at the files of a scene."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rasterio
from affine import Affine
from rasterio.enums import ColorInterp, MaskFlags

from segray.errors import Reject, SettingsError
from segray.scene.bands import Band, Listed, Scene, chosen, declared_nodata, placed
from segray.scene.gdal import begins_with, gdal_path, one_line, with_dataset
from segray.scene.place import Grid, Transform, six
from segray.scene.stac import in_item, item_at
from segray.tile import Window

__all__ = ["describe"]

_SLOT = "{band}"
_COLOURS = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.nir)
_GCP_ERROR_PIXELS = 1.0
_ALPHA = re.compile("alpha|mask", re.IGNORECASE)
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def describe(
    uri: str, version: str, *, bands: Mapping[str, str] | None = None, item: Mapping[str, Any] | None = None
) -> Scene:
    """Looks at the files of a scene; no pixel is read.

    Args:
        uri: a raster; a STAC item (it ends in `.json` or `.geojson`, or is a web address without such an ending), or
            one of a collection of items, with `#` and its id; or a template, which has `{band}` in it.
        version: of what is there.
        bands: the bands that are wanted, in order, and no other file is looked at: from the name that each is to have
            to what the scene calls it. In a raster that is its description, its colour or its number from 1, in a
            STAC item a common name, the band's own or the key of its asset, in a template what stands for `{band}`.
            None: all there are, as the scene calls them.
        item: the STAC item, where it is at hand: then it is not fetched.

    Raises:
        SettingsError: a template comes without `bands`.
        Reject: files are missing or damaged, they do not fit together, or nothing says where on Earth they lie.
        RunError: the store cannot be reached.
    """
    look = functools.cache(lambda path: with_dataset(path, version, _looked_at))
    if _SLOT in uri:
        if not bands:
            raise SettingsError(f"{uri}: nothing says what stands for {_SLOT}; name bands, such as red=B4 and nir=B5")
        wanted = [Listed(name, gdal_path(uri.replace(_SLOT, text))) for name, text in bands.items()]
    else:
        in_file = functools.partial(_in_file, look=look)
        item = item_at(uri) if item is None else item
        listed = in_file(gdal_path(uri)) if item is None else in_item(item, uri, in_file)
        wanted = [band for band in listed if not band.is_hidden] if bands is None else chosen(listed, bands)
    scene = placed(uri, version, _crs(wanted, look), _bands(wanted, look))
    scene.bounds(Window(0, 0, scene.width, scene.height))  # it raises where that is nowhere on Earth
    return scene


class _File(NamedTuple):
    """What a look at a raster finds; of each band, alpha too, in order."""

    crs: str
    grid: Grid
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    nodata: tuple[float | None, ...]
    alpha: int | None
    mask: str | None


_Look = Callable[[str], _File]


def _in_file(path: str, look: _Look) -> list[Listed]:
    file = look(path)
    return [
        Listed(name, path, index, (str(index),), is_hidden=index == file.alpha)
        for index, name in enumerate(file.names, 1)
    ]


def _crs(wanted: Sequence[Listed], look: _Look) -> str:
    by_crs: dict[str, str] = {}
    for band in wanted:
        by_crs.setdefault(look(band.path).crs, band.name)
    if len(by_crs) > 1:
        places = ", ".join(f"{name} in {crs[:40]}" for crs, name in by_crs.items())
        raise Reject("decode", "grids do not fit", f"{places}; warp them to one CRS with gdalwarp -t_srs")
    return next(iter(by_crs), "")


def _bands(wanted: Sequence[Listed], look: _Look) -> list[tuple[Band, Grid]]:
    by_name = {(band.path, band.index) for band in wanted}
    bands = []
    for band in wanted:
        file = look(band.path)
        if band.index > len(file.names):
            detail = f"{band.name} is said to be band {band.index} of a file that has {len(file.names)}"
            raise Reject("decode", "bands missing", detail)
        described = Band(
            band.name,
            band.path,
            band.index,
            file.dtypes[band.index - 1],
            scale=file.scales[band.index - 1] if band.scale is None else band.scale,
            offset=file.offsets[band.index - 1] if band.offset is None else band.offset,
            nodata=file.nodata[band.index - 1] if band.nodata is None else band.nodata,
            # Many a writer takes the fourth of four bands for alpha; whoever wants it as a band knows better.
            alpha=None if (band.path, file.alpha) in by_name else file.alpha,
            mask=file.mask,
            aliases=band.aliases,
        )
        bands.append((described, file.grid))
    return bands


def _looked_at(dataset: rasterio.DatasetReader) -> _File:
    if not dataset.count:
        others = ", ".join(one_line(name) for name in dataset.subdatasets[:3])
        raise Reject("decode", "no bands", f"it holds other rasters: {others}; name files" if others else "it is empty")
    if any(dtype.startswith("complex") for dtype in dataset.dtypes):
        raise Reject("decode", "unsupported", "samples are complex numbers; give their magnitude")
    crs, transform = _place(dataset)
    colours = dataset.colorinterp
    is_masked = any(MaskFlags.per_dataset in flags for flags in dataset.mask_flag_enums)
    return _File(
        crs,
        Grid(dataset.height, dataset.width, transform),
        _names(dataset.descriptions, colours),
        dataset.dtypes,
        dataset.scales,
        dataset.offsets,
        tuple(declared_nodata(nodata) for nodata in dataset.nodatavals),
        _alpha(dataset.descriptions, colours),
        None if is_masked else _mask_beside(dataset.name),
    )


def _names(descriptions: Sequence[str | None], colours: Sequence[ColorInterp]) -> tuple[str, ...]:
    """What tells a band from the others: its description, else its colour, else its number."""
    names = []
    for index, (description, colour) in enumerate(zip(descriptions, colours, strict=True), 1):
        if description and descriptions.count(description) == 1:
            names.append(description)
        elif colour in _COLOURS and colours.count(colour) == 1:
            names.append(colour.name)
        else:
            names.append(str(index))
    return tuple(names)


def _alpha(descriptions: Sequence[str | None], colours: Sequence[ColorInterp]) -> int | None:
    """The alpha band; writers call the fourth of four one, unless told, but do not describe it as another."""
    for index, (description, colour) in enumerate(zip(descriptions, colours, strict=True), 1):
        if colour == ColorInterp.alpha and (not description or _ALPHA.search(description)):
            return index
    return None


def _mask_beside(path: str) -> str | None:
    """The mask beside a remote raster, where GDAL is told to look for nothing."""
    mask = f"{path}.msk"
    return mask if path.startswith("/vsi") and begins_with(mask, _TIFF) else None


def _place(dataset: rasterio.DatasetReader) -> tuple[str, Transform]:
    """The CRS and the transform.

    Raises:
        Reject: one of them is missing.
    """
    crs, transform = dataset.crs, dataset.transform
    points, points_crs = dataset.gcps
    if points and transform.is_identity:
        crs, transform = points_crs, _fitted(points)
    elif transform.is_identity and dataset.rpcs:
        detail = "it has RPCs alone; orthorectify it: gdalwarp -rpc, with -to RPC_DEM=… where the land is not flat"
        raise Reject("decode", "no place", detail)
    missing = [*([] if crs else ["CRS"]), *(["geotransform"] if transform.is_identity else [])]
    if missing:
        raise Reject(
            "decode",
            "no place",
            f"it has no {' and no '.join(missing)}; write them into it: gdal_translate -a_srs EPSG:… -a_ullr … "
            "(files beside remote ones are not read)",
        )
    if transform.is_degenerate or not all(map(math.isfinite, transform)):
        raise Reject("decode", "no place", f"by its geotransform {six(transform)} a pixel has no size")
    return crs.to_string(), six(transform)


def _fitted(points: Sequence[Any]) -> Affine:
    """The transform of ground control points; that of rasterio is of arbitrary numbers where there is none.

    Raises:
        Reject: they are too few, or lie on no straight grid.
    """
    pixels = np.array([(point.col, point.row, 1.0) for point in points])
    places = np.array([(point.x, point.y) for point in points])
    origin = places.mean(axis=0)
    fit, _, rank, _ = np.linalg.lstsq(pixels, places - origin)
    if rank < 3:
        detail = f"its {len(points)} ground control points do not span a grid: three are needed that are not in line"
        raise Reject("decode", "no place", detail)
    fit[2] += origin
    transform = Affine(*fit.T.ravel())
    if transform.is_degenerate:
        return transform
    errors = [math.dist(~transform @ (point.x, point.y), (point.col, point.row)) for point in points]
    if max(errors) > _GCP_ERROR_PIXELS:
        raise Reject(
            "decode",
            "no place",
            f"its {len(points)} ground control points lie up to {max(errors):.1f} pixels off a straight grid; "
            "warp it: gdalwarp -tps",
        )
    return transform
