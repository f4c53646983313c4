"""The bands of a STAC item: which asset holds which, and how its samples become values."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pystac
import pystac.utils

from segray.errors import Reject
from segray.scene.bands import Listed, declared_nodata
from segray.scene.gdal import fetched, gdal_path, one_line

__all__ = ["files_of", "in_item", "is_item", "item_at"]

_MEDIA_TYPES = {"image/tiff", "image/vnd.stac.geotiff", "image/geotiff", "image/jp2"}
_SUFFIXES = (".tif", ".tiff", ".jp2", ".vrt")
_PICTURE_ROLES = {"thumbnail", "overview", "visual", "metadata"}
_ONE_OF_MANY = re.compile(r"(?P<document>.+)#(?P<id>[^/#]+)", re.DOTALL)


def is_item(uri: str) -> bool:
    """Whether a URI is one of a STAC item.

    It is JSON by its ending; a web address without any, or below `/items/`, as APIs have it; or such a one of a
    collection of items, with `#` and the id of one.
    """
    return _is_document(uri) or _one_of_many(uri) is not None


def item_at(uri: str) -> Mapping[str, Any] | None:
    """The STAC item at a URI, as JSON has it. None: the URI is none of an item.

    Raises:
        Reject: it is gone, or not JSON.
        RunError: the store cannot be reached.
    """
    if not is_item(uri):
        return None
    document, name = _one_of_many(uri) or (uri, None)
    try:
        fields = json.loads(fetched(document))
    except ValueError as error:
        raise Reject("decode", "not a STAC item", f"it is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Reject("decode", "not a STAC item", f"it is a {type(fields).__name__} in JSON")
    if name is None:
        return fields
    for item in fields.get("features", ()):
        if isinstance(item, dict) and str(item.get("id")) == name:
            return item
    raise Reject("fetch", "missing", f"{document} holds no item {name}")


def files_of(fields: Mapping[str, Any], uri: str) -> set[str]:
    """The files of an item, as GDAL opens them.

    Args:
        fields: the item, as JSON has it; what is none has no files.
        uri: its own, against which relative ones are resolved.
    """
    files = set()
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        for asset in fields["assets"].values():
            with contextlib.suppress(Reject):  # of a scheme that GDAL does not read
                files.add(gdal_path(pystac.utils.make_absolute_href(asset["href"], uri, start_is_dir=False)))
    return files


def _one_of_many(uri: str) -> tuple[str, str] | None:
    """The document that holds an item, and the item's id."""
    match = _ONE_OF_MANY.fullmatch(uri)
    return (match["document"], unquote(match["id"])) if match and _is_document(match["document"]) else None


def _is_document(uri: str) -> bool:
    is_web = uri.startswith(("http://", "https://"))
    path = urlsplit(uri).path if is_web else uri
    suffix = PurePosixPath(path).suffix.lower()
    if is_web and "/items/" in path:  # of an API, where ids may have dots
        return suffix not in _SUFFIXES
    return suffix in (".json", ".geojson") or (is_web and not suffix)


def in_item(fields: Mapping[str, Any], uri: str, in_file: Callable[[str], list[Listed]]) -> list[Listed]:
    """The bands of a STAC item, by their common names where those tell them apart.

    Of several assets with the same band the finest one holds it; the others are there by the keys of their assets.
    Pictures to look at (thumbnails, overviews, true-colour images) are left out.

    Args:
        fields: the item, as JSON has it.
        uri: its own, against which relative ones are resolved.
        in_file: the bands of a raster, where a single one says nothing of them.

    Raises:
        Reject: it is no item, or no asset of it is a raster.
    """
    try:
        item = pystac.Item.from_dict(dict(fields))
        item.set_self_href(uri)
        rasters = {key: asset for key, asset in item.assets.items() if _is_raster(asset)}
        paths = {key: gdal_path(str(asset.get_absolute_href())) for key, asset in rasters.items()}
        declared = {key: _declared(asset) for key, asset in rasters.items()}
        if len(paths) == 1 and not any(declared.values()):
            return in_file(*paths.values())
        named = _named(paths, {key: bands or [{}] for key, bands in declared.items()})
    except Reject:
        raise
    except Exception as error:  # whatever pystac stumbles over
        detail = f"{type(error).__name__}: {one_line(str(error))}"
        raise Reject("decode", "not a STAC item", f"{detail}; an Item with assets is wanted") from error
    if not named:
        raise Reject("decode", "no bands", f"no asset is a raster; there are {', '.join(item.assets) or 'none'}")
    return named


def _is_raster(asset: pystac.Asset) -> bool:
    media_type = (asset.media_type or "").partition(";")[0].strip()
    is_raster = media_type in _MEDIA_TYPES or asset.href.partition("?")[0].lower().endswith(_SUFFIXES)
    return is_raster and not _PICTURE_ROLES & set(asset.roles or ())


def _declared(asset: pystac.Asset) -> list[dict[str, Any]]:
    """What an asset says of each of its bands, in STAC 1.1 or by the extensions before it, without their prefixes."""
    extra = asset.extra_fields
    lists = [extra.get(name) or [] for name in ("bands", "eo:bands", "raster:bands")]
    of_all = {name: extra[name] for name in ("gsd", "nodata", "raster:scale", "raster:offset") if name in extra}
    bands = [dict(of_all) for _ in range(max(map(len, lists)) or int(bool(of_all)))]
    for declared in lists:
        for band, fields in zip(bands, declared, strict=False):
            band |= fields
    return [{name.removeprefix("eo:").removeprefix("raster:"): value for name, value in b.items()} for b in bands]


def _named(paths: Mapping[str, str], declared: Mapping[str, list[dict[str, Any]]]) -> list[Listed]:
    def coarseness(key: str) -> tuple[int, float]:
        """Files with one band go before true-colour images and mosaics of them all."""
        bands = declared[key]
        return len(bands), float(bands[0].get("spatial_resolution") or bands[0].get("gsd") or 0)

    listed: dict[str, Listed] = {}
    common_names: dict[str, str] = {}
    for key in sorted(paths, key=coarseness):
        for index, band in enumerate(declared[key], 1):
            by_key = key if len(declared[key]) == 1 else f"{key}:{index}"
            name = str(band.get("name") or by_key)
            is_other = name in listed
            if is_other:
                name = by_key
            elif band.get("common_name"):
                common_names[name] = band["common_name"]
            listed[name] = Listed(
                name,
                paths[key],
                index,
                (by_key,),
                band.get("scale"),
                band.get("offset"),
                declared_nodata(band.get("nodata")),
                is_other,
            )
    # Three bands of Sentinel-2 are all called `rededge`: such a name tells none of them.
    times = Counter(common_names.values())
    return [
        replace(band, name=common, aliases=(name, *band.aliases))
        if times[common := common_names.get(name, "")] == 1
        else band
        for name, band in listed.items()
    ]
