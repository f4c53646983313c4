"""Which scenes a SOURCE holds, and a look at each.

A scene is a raster; a STAC item: a file, one of a search result on disk, in a static catalog or from an API; or a file
a band: a template with `{band}` in it. Its URI is the raster's, the item's own (its link to itself), `FILE#ID` of an
item that has none, or the template with all but `{band}` filled in.
"""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, urljoin, urlsplit

import pyarrow as pa
import pystac
import pystac.utils
from fsspec.utils import glob_translate
from pystac.stac_io import DefaultStacIO
from pystac_client import ItemSearch
from pystac_client.stac_api_io import StacApiIO
from shapely.geometry import shape

from segray.errors import Reject, SettingsError, SourceError
from segray.scene import Band, Scene, describe
from segray.scene.bands import Listed
from segray.scene.describe import filled
from segray.scene.gdal import fetched, gdal_path, one_line
from segray.scene.stac import files_of, in_item, is_item, item_at
from segray.source import ENTRIES, Source, filesystem, look_up, version_in
from segray.tile import Scenes

__all__ = ["SCENES", "SceneSource", "described", "scene_version"]

SCENES = pa.schema([*ENTRIES, pa.field("item", pa.string())])
"""What an index of scenes holds: a row a scene, with its STAC item (JSON) where that is at hand."""

_SLOT = "{band}"
_SCENES_PER_TABLE = 500
_REQUESTS_IN_FLIGHT = 64
_PARAMETERS = {
    *("collections", "ids", "bbox", "intersects", "datetime", "limit"),
    *("query", "filter", "filter-lang", "sortby", "fields"),
}
_TIMEOUTS_SECONDS = (10, 60)  # to connect, to answer

_Row = dict[str, Any]


class SceneSource:
    """What a person names as SOURCE, and the scenes in it.

    Attributes:
        uri: as it was given.
        column: as it was given.
        is_search: whether it is a search, or a collection of an API, in which there may be nothing.
        num_other: objects met by the newest `entries` that are no scenes.
    """

    def __init__(
        self,
        uri: str,
        column: str | None = None,
        *,
        bands: Mapping[str, str] | None = None,
        area: Mapping[str, Any] | None = None,
    ) -> None:
        """Looks that something is there.

        Args:
            uri: a folder or prefix, a glob, a raster, a template, or a manifest, for any fsspec protocol; a STAC item,
                a collection of items, a static collection or catalog; or a collection or search of a STAC API.
            column: the column of a manifest to read. None: it is found.
            bands: what stands for `{band}` in a template, by the name of the band.
            area: a GeoJSON geometry that an API is asked for, where its URL names none.

        Raises:
            SettingsError: a template comes without `bands`.
            SourceError: nothing is there, it cannot be read, or it is no scene.
        """
        self.uri = uri
        self.column = column
        self.is_search = False
        self.num_other = 0
        self._bands = dict(bands or {})
        self._area = area
        self._rows = self._way()

    def entries(self) -> Iterator[pa.Table]:
        """Lists the scenes, a page at a time, without opening rasters.

        Where a folder holds STAC items, the rasters that belong to them are no scenes of their own.

        Yields:
            Tables of at most 500 rows with the schema `SCENES`; no scene comes twice.

        Raises:
            SourceError: the listing fails, or a manifest cannot be understood.
        """
        self.num_other = 0
        seen: set[tuple[str, str | None]] = set()

        def version(row: _Row) -> str | None:
            found = row["version"] or scene_version(row["uri"], self._bands)
            return None if isinstance(found, Reject) else found

        try:
            rows = iter(self._rows())
            with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
                while page := list(islice(rows, _SCENES_PER_TABLE)):
                    versions = pool.map(version, page)
                    by_key = {
                        (row["uri"], found): row | {"version": found} for row, found in zip(page, versions, strict=True)
                    }
                    yield pa.Table.from_pylist([row for key, row in by_key.items() if key not in seen], SCENES)
                    seen |= by_key.keys()
        except SourceError:
            raise
        except Exception as error:  # whatever a store's client, an API or pystac raises
            raise SourceError(f"{self.uri} cannot be listed: {_text(error)}") from error

    def _way(self) -> Callable[[], Iterable[_Row]]:
        """How scenes are found in it."""
        uri = self.uri
        if _SLOT in uri:
            if not self._bands:
                raise SettingsError(
                    f"{uri}: nothing says what stands for {_SLOT}; name bands, such as --scenes.bands red=B4 nir=B5"
                )
            return self._templates
        is_web = uri.startswith(("http://", "https://"))
        if is_web and urlsplit(uri).path.endswith(("/search", "/items")):
            self.is_search = True
            return lambda: self._found(uri)
        if "*" not in uri and is_item(uri):
            try:
                fields = json.loads(fetched(uri))
            except ValueError as error:
                if not is_web:
                    raise SourceError(f"{uri} is not JSON: {_text(error)}") from error
            except Exception as error:  # whatever the store's client raises
                raise SourceError(f"{uri} cannot be read: {_text(error)}") from error
            else:
                return self._in_document(fields)
        source = Source(uri, self.column, of_scenes=True)
        return lambda: self._listed(source)

    def _in_document(self, fields: Any) -> Callable[[], Iterable[_Row]]:
        fs, path = filesystem(self.uri)
        uri = fs.unstrip_protocol(path)
        kind = _kind(fields)
        if kind == "item":
            return lambda: [_row(uri, None, fields)]
        if kind == "items":
            if uri.startswith("http"):
                return lambda: (
                    _of_item(item, uri)
                    for page in StacApiIO(timeout=_TIMEOUTS_SECONDS).get_pages(uri)
                    for item in page["features"]
                )
            return lambda: (_of_item(item, uri) for item in fields["features"])
        if kind == "catalog":
            links = {link.get("rel"): link.get("href") for link in fields.get("links", ())}
            if "items" in links:
                self.is_search = True
                return lambda: self._found(urljoin(uri, links["items"]))
            if "search" in links:
                raise SourceError(
                    f"{uri} is all of an API; name a collection of it, or a search: "
                    f"{links['search']}?collections=…&datetime=2030-01-31/.."
                )
            return lambda: _walked(path if uri.startswith("file:") else uri)
        raise SourceError(f"{uri} is no STAC item, collection of items or catalog")

    def _templates(self) -> Iterator[_Row]:
        """One scene for each way to fill in a template but for `{band}`."""
        fs, path = filesystem(self.uri)
        is_web = self.uri.startswith(("http://", "https://"))
        if not set("*" if is_web else "*?[") & set(path):
            yield _row(fs.unstrip_protocol(path), None)
            return
        # Of two bands that would fit, the one with the longer name: B11 is not B1.
        texts = sorted(set(self._bands.values()), key=len, reverse=True)
        pieces = glob_translate(path).removeprefix("(?s:").removesuffix(r")\Z").split(re.escape(_SLOT))
        grouped = _SLOT.join(f"({piece})" for piece in pieces)
        patterns = {text: re.compile(f"(?s:{filled(grouped, re.escape(text))})") for text in texts}
        found: dict[str, Any] = {}
        for glob in {filled(path, re.sub("[^/]+", "*", text)) for text in texts}:
            found |= fs.glob(glob, detail=True)
        files: dict[str, dict[str, str]] = {}
        for name, info in sorted(found.items()):
            of_bands = ((text, match) for text, pattern in patterns.items() if (match := pattern.fullmatch(name)))
            for text, match in islice(of_bands, 1):
                files.setdefault(_SLOT.join(match.groups()), {})[text] = version_in(info)
        for template, versions in files.items():
            yield _row(fs.unstrip_protocol(template), _of_all(versions))

    def _found(self, url: str) -> Iterator[_Row]:
        """The items of a search, or of a collection of an API."""
        parts = urlsplit(url)
        wanted: dict[str, Any] = dict(parse_qsl(parts.query))
        if unknown := sorted(set(wanted) - _PARAMETERS):
            raise SourceError(f"{url}: {', '.join(unknown)} is not of a search, which has {', '.join(_PARAMETERS)}")
        is_text = "filter" in wanted and wanted.setdefault("filter-lang", "cql2-text") == "cql2-text"
        if "filter" in wanted and not is_text:
            wanted["filter"] = json.loads(wanted["filter"])
        method: Literal["GET", "POST"] = "GET"
        if self._area is not None and not {"bbox", "intersects"} & set(wanted):
            if parts.path.endswith("/search") and not is_text:
                wanted["intersects"], method = self._area, "POST"  # it may be too long for a URL
            else:  # a POST takes no text for a filter
                wanted["bbox"] = shape(self._area).bounds
        if "limit" in wanted:
            wanted["limit"] = int(wanted["limit"])
        if "query" in wanted:
            wanted["query"] = [wanted["query"]]
        search = ItemSearch(
            parts._replace(query="").geturl(),
            method=method,
            stac_io=StacApiIO(timeout=_TIMEOUTS_SECONDS),
            **{name.replace("-", "_"): value for name, value in wanted.items()},
        )
        for item in search.items_as_dicts():
            yield _of_item(item, parts._replace(query="").geturl())

    def _listed(self, source: Source) -> Iterator[_Row]:
        rasters: list[_Row] = []
        documents: list[_Row] = []
        for table in source.entries():
            for entry in table.to_pylist():
                row = _row(entry["uri"], entry["version"])
                is_named = entry["size_bytes"] is None  # by a manifest, which means what it says
                if is_named:
                    yield row
                else:
                    (documents if is_item(entry["uri"]) else rasters).append(row)
        self.num_other = source.num_other
        taken: set[str] = set()
        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            for first in range(0, len(documents), _SCENES_PER_TABLE):
                for found in pool.map(_in_listed, documents[first : first + _SCENES_PER_TABLE]):
                    self.num_other += not found
                    for row in found:
                        if row["item"] is not None:
                            taken |= files_of(json.loads(row["item"]), row["uri"])
                        yield row
        yield from (row for row in rasters if gdal_path(row["uri"]) not in taken)


def scene_version(uri: str, bands: Mapping[str, str]) -> str | Reject:
    """The version of a scene, of a template that of all its files, or what is wrong with it.

    Raises:
        RunError: the store cannot be reached.
    """
    if _SLOT not in uri:
        found = look_up({"uri": uri, "version": None})
        if is_item(uri) and isinstance(found, str) and found.endswith("-"):
            # The store tells its length alone, as services do: that rarely changes where an item is updated.
            with contextlib.suppress(Reject, ValueError, AttributeError, TypeError):  # of which `describe` says more
                found = str(_of_item(json.loads(fetched(uri)), uri)["version"])
        return found
    versions = {}
    for text in bands.values():
        found = look_up({"uri": filled(uri, text), "version": None})
        if isinstance(found, Reject):
            return found
        versions[text] = found
    return _of_all(versions)


def described(
    uri: str,
    version: str,
    item: Mapping[str, Any] | None,
    scenes: Scenes,
    match: Callable[[Sequence[str]], Sequence[str]],
) -> Scene:
    """Looks at those files of a scene that hold what a model is fed.

    Args:
        uri: the scene's.
        version: the scene's.
        item: its STAC item, where that is at hand.
        scenes: what its bands are called, and what their samples mean.
        match: the bands that the model is fed, of those that are there; it raises SettingsError where some are missing.

    Raises:
        Reject: as `describe`.
        RunError: the store cannot be reached.
    """
    if item is None:
        item = item_at(uri)
    calls = scenes.calls
    try:
        if calls:
            scene = describe(uri, version, bands={name: calls[name] for name in match(list(calls))}, item=item)
        elif item is not None and (listed := in_item(item, uri, lambda path: [])):
            names = _matched([band for band in listed if not band.is_hidden], match)
            scene = describe(uri, version, bands={name: name for name in names}, item=item)
        else:
            scene = describe(uri, version, item=item)
            scene = scene.select(_matched(scene.bands, match))
    except SettingsError as error:
        raise Reject("decode", "bands missing", str(error)) from error
    return replace(
        scene,
        bands=tuple(
            replace(
                band,
                scale=band.scale if scenes.scale is None else scenes.scale,
                offset=band.offset if scenes.offset is None else scenes.offset,
                nodata=band.nodata if scenes.nodata is None else scenes.nodata,
            )
            for band in scene.bands
        ),
    )


def _matched(bands: Sequence[Band | Listed], match: Callable[[Sequence[str]], Sequence[str]]) -> Sequence[str]:
    """What is matched by name or, where names do not do, by what else tells a single band: B04 beside red."""
    names = [band.name for band in bands]
    try:
        return match(names)
    except SettingsError:
        times = Counter(name.casefold() for band in bands for name in {band.name, *band.aliases})
        aliases = [alias for band in bands for alias in band.aliases if times[alias.casefold()] == 1]
        with contextlib.suppress(SettingsError):
            return match([*names, *aliases])
        raise  # which lists the names


class _StacIo(DefaultStacIO):
    """Reads a static catalog from wherever fsspec does."""

    def read_text(self, source: Any, *args: Any, **kwargs: Any) -> str:
        return fetched(str(source)).decode()


def _walked(uri: str) -> Iterator[_Row]:
    """The items of a static catalog; only catalogs are read."""
    root = pystac.read_file(uri, stac_io=_StacIo())
    assert isinstance(root, pystac.Catalog)  # by what it says of itself
    for catalog, _, _ in root.walk():
        for link in catalog.get_item_links():
            href = str(link.absolute_href)
            yield _row(href if "://" in href else f"file://{href}", None)


def _kind(fields: Any) -> Literal["item", "items", "catalog"] | None:
    """What a JSON document is."""
    if not isinstance(fields, dict):
        return None
    kind = fields.get("type")
    if kind == "FeatureCollection":
        features = fields.get("features")
        return "items" if isinstance(features, list) and all(map(_is_item, features)) else None
    if "stac_version" not in fields:
        return None
    return "item" if kind == "Feature" else "catalog" if kind in ("Catalog", "Collection") else None


def _is_item(fields: Any) -> bool:
    return _kind(fields) == "item"


def _in_listed(row: _Row) -> list[_Row]:
    """The scenes in a JSON file that was found in a folder; of catalogs none, as their items are found there too."""
    try:
        data = fetched(row["uri"])
    except Reject:
        return [row]  # `describe` says why
    if b'"stac_version"' not in data:
        return []
    try:
        fields = json.loads(data)
    except ValueError:
        return [row]
    kind = _kind(fields)
    if kind == "items":
        return [_of_item(item, row["uri"]) for item in fields["features"]]
    return [row | {"item": json.dumps(fields)}] if kind == "item" else []


def _of_item(item: Mapping[str, Any], within: str) -> _Row:
    """An item of a document or an API."""
    # Signatures, which are new in each answer, make no other item.
    text = re.sub(r'\?[^"]*', "", json.dumps(item, sort_keys=True))
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    link = next((link.get("href", "") for link in item.get("links", ()) if link.get("rel") == "self"), "")
    if link.startswith("/"):
        link = f"file://{link}"
    elif "://" not in link:
        link = f"{within}#{quote(str(item.get('id') or digest), safe='')}"
    return _row(link, str(item.get("properties", {}).get("updated") or digest), item)


def _row(uri: str, version: str | None, item: Mapping[str, Any] | None = None) -> _Row:
    return {"uri": uri, "version": version, "size_bytes": None, "item": None if item is None else json.dumps(item)}


def _of_all(versions: Mapping[str, str]) -> str:
    return hashlib.blake2b(json.dumps(sorted(versions.items())).encode(), digest_size=16).hexdigest()


def _text(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")
