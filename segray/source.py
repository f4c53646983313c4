"""URI → what is there → its bytes: loose images, tar and Parquet shards, manifests.

An image's URI is that of its object, or that of its shard with the member behind a `#`:
`s3://bucket/a.jpg`, `s3://bucket/shard-000000.tar#sub/a.jpg`, `s3://bucket/shard.parquet#12/a.jpg`
(row 12, and its name where the shard has a column of names). Its version is the object's
etag, or size and modification time; the digest of both is its image_id.
"""

import contextlib
import functools
import hashlib
import os
import re
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from jaxtyping import Bool, Shaped

from segray import objects
from segray.errors import Reject, RunError, SourceError
from segray.retry import PAUSES_SECONDS, S3_SETTINGS, ShortRead, codes, is_refusal, is_transient, retrying

__all__ = [
    "ENTRIES",
    "FETCHED",
    "Member",
    "Source",
    "fetch",
    "filesystem",
    "image_id",
    "is_shard",
    "known",
    "look_up",
    "num_members",
    "read_images",
    "shard_id",
    "tar_samples",
    "version_in",
]

ENTRIES = pa.schema({"uri": pa.string(), "version": pa.string(), "size_bytes": pa.int64()})
"""What an index holds: a row an object. A manifest knows no sizes, and versions of shards alone (else null)."""

FETCHED = pa.schema(
    {
        "image_id": pa.string(),
        "uri": pa.string(),
        "version": pa.string(),
        "data": pa.large_binary(),
        "stage": pa.string(),
        "reason": pa.string(),
    }
)
"""What `fetch` yields: a row an image, with its bytes, or with the stage and reason of its reject."""

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif")
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SHARD_SUFFIXES = (*_TAR_SUFFIXES, ".parquet")
_SCENE_SUFFIXES = (".tif", ".tiff", ".jp2", ".vrt", ".json", ".geojson")
_MANIFEST_SUFFIXES = (".csv", ".txt")
_MEMBER = re.compile(r"(?P<shard>.+?\.(?:tar|tar\.gz|tgz|parquet))#(?P<member>.+)", re.DOTALL | re.IGNORECASE)
_BYTES_NAMES = ("image", "bytes", "image_bytes", "jpg", "jpeg", "png", "webp", "content", "data")
_URI_NAMES = ("uri", "url", "path", "image", "file", "file_name", "filename", "key", "image_url", "image_path")
_NAME_NAMES = ("name", "file_name", "filename", "path", "key", "__key__", "uri", "url", "id", "image_id")
_ENTRIES_PER_TABLE = 10_000
_IMAGES_PER_BATCH = 64
_BYTES_PER_BATCH = 64 * 2**20
_READ_BYTES = 8 * 2**20
_MAX_SAMPLE_MEMBERS = 64  # names with dots share a key for a whole shard: those are no sample
_ASSUMED_BYTES = 4 * 2**20
_REQUESTS_IN_FLIGHT = 64
_SIGN_SECONDS = 10.0
_READING = 1  # to be raised with any change of code that finds other images in a shard

_Wanted = tuple[str, str, str, int | Reject | None]  # image_id, uri, version, size in bytes where it is known


def image_id(uri: str, version: str) -> str:
    """The digest of an image's URI and version: 32 hexadecimal digits (BLAKE2b)."""
    return hashlib.blake2b(f"{uri}\0{version}".encode(), digest_size=16).hexdigest()


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI or local path, without a cache of listings, and the path in it.

    Raises:
        Exception: whatever fsspec raises where it knows no such protocol, or its package is not installed.
    """
    if "://" not in uri:
        uri = os.path.abspath(uri)
    settings = S3_SETTINGS if uri.startswith(("s3://", "s3a://")) else {}
    # A listing kept for the next call would hold every key of a bucket in memory.
    fs, path = url_to_fs(uri, use_listings_cache=False, **settings)
    return fs, path


def shard_id(uri: str, version: str, column: str | None) -> str:
    """The digest of all that decides which images a shard holds: 32 hexadecimal digits."""
    return image_id(uri, f"{version}\0{column or ''}\0{_READING}")


def is_shard(uri: str) -> bool:
    """Whether the URI's ending says that there are many images in it."""
    return uri.lower().endswith(_SHARD_SUFFIXES)


def known(ids: Shaped[np.ndarray, " n"], done: Shaped[np.ndarray, " m"]) -> Bool[np.ndarray, " n"]:
    """Which of the image_ids are among the sorted `done`; both numpy's `S32`."""
    if not len(done):
        return np.zeros(len(ids), bool)
    positions = np.minimum(np.searchsorted(done, ids), len(done) - 1)
    return np.asarray(done[positions] == ids)


class Source:
    """What a person names as SOURCE, and what is there.

    Attributes:
        uri: as it was given.
        column: as it was given.
        num_other: objects met by the newest `entries` that are neither images nor shards.
    """

    def __init__(self, uri: str, column: str | None = None, *, of_scenes: bool = False) -> None:
        """Looks that something is there.

        Args:
            uri: a folder or prefix, a glob, an image, a shard, or a manifest, for any fsspec protocol.
            column: the column of a manifest or shard to read. None: it is found.
            of_scenes: whether rasters and STAC items are wanted, in place of images and shards.

        Raises:
            SourceError: nothing is there, or it cannot be read.
        """
        self.uri = uri
        self.column = column
        self.num_other = 0
        self._suffixes = _SCENE_SUFFIXES if of_scenes else (*_IMAGE_SUFFIXES, *_SHARD_SUFFIXES)
        self._may_lack_suffix = not of_scenes
        try:
            self._fs, self._path = filesystem(uri)
            self._is_file = not uri.endswith("/") and self._fs.isfile(self._path)
            self._is_glob = not self._is_file and ("*" in self._path or "?" in self._path)
            there = self._is_glob or self._is_file or self._fs.isdir(self._path)
        except Exception as error:  # whatever the store's client raises: credentials, endpoint, DNS, …
            raise SourceError(f"{uri} cannot be read: {_text(error)}") from error
        if not there:
            raise SourceError(f"{uri}: there is no such file, folder or prefix")

    def entries(self) -> Iterator[pa.Table]:
        """Lists the source, a page at a time, without opening images or shards.

        Yields:
            Tables of at most 10,000 rows with the schema `ENTRIES`; no URI comes twice.

        Raises:
            SourceError: the listing fails, or a manifest cannot be understood.
        """
        self.num_other = 0
        try:
            if self._is_file and self._is_manifest():
                yield from self._manifest_entries()
                return
            if self._is_file:
                infos: Iterable[dict[str, Any]] = [self._fs.info(self._path)]
            elif self._is_glob:
                found = self._fs.glob(self._path, detail=True).values()
                # A pattern with an ending, such as *.dat, is taken at its word.
                any_ending = "." not in PurePosixPath(self._path).name
                infos = (i for i in found if i["type"] == "file" and (not any_ending or self._is_wanted(i["name"])))
            else:
                infos = (info for info in _walk(self._fs, self._path) if self._is_wanted(info["name"]))
            yield from _tables(
                (self._fs.unstrip_protocol(info["name"]), version_in(info), info["size"]) for info in infos
            )
        except SourceError:
            raise
        except Exception as error:  # as above
            raise SourceError(f"{self.uri} cannot be listed: {_text(error)}") from error

    def _is_wanted(self, path: str) -> bool:
        """By its name. An object without an extension may be an image; hidden ones are not."""
        name = PurePosixPath(path).name.lower()
        root = self._path.partition("*")[0].rpartition("/")[0] if self._is_glob else self._path
        hidden = any(part.startswith((".", "_")) for part in PurePosixPath(path[len(root) :]).parts)
        wanted = not hidden and (name.endswith(self._suffixes) or (self._may_lack_suffix and "." not in name))
        self.num_other += not wanted
        return wanted

    def _is_manifest(self) -> bool:
        if self._path.lower().endswith(_MANIFEST_SUFFIXES):
            return True
        if not self._path.lower().endswith(".parquet"):
            return False
        with self._fs.open(self._path, "rb") as file:
            schema = pq.read_schema(file)
        if _bytes_column(schema, self.column) is not None:
            return False
        several = _bytes_columns(schema)
        if self.column is None and len(several) > 1:
            raise SourceError(
                f"{self.uri} has {len(several)} columns that may hold images ({', '.join(several)}); "
                "name one with --column"
            )
        return True

    def _manifest_entries(self) -> Iterator[pa.Table]:
        """The URIs of a manifest, relative ones taken from its folder."""
        with self._fs.open(self._path, "rb") as file:
            if self._path.lower().endswith(".parquet"):
                schema = pq.read_schema(file)
                uris = pq.read_table(file, columns=[self._uri_column(schema)]).column(0)
            elif self._path.lower().endswith(".csv"):
                table = pyarrow.csv.read_csv(file)
                uris = table.column(self._uri_column(table.schema))
            else:
                lines = (line.strip() for line in file.read().decode("utf-8-sig").splitlines())
                uris = pa.chunked_array([pa.array([line for line in lines if line], pa.string())])
        folder = self._fs.unstrip_protocol(self._path).rpartition("/")[0]
        unique = pc.unique(pc.drop_null(pc.cast(uris, pa.string())))
        absolute = (_absolute(str(uri), folder) for uri in unique)
        yield from _tables(self._looked_up(dict.fromkeys(absolute)))

    @staticmethod
    def _looked_up(uris: Iterable[str]) -> Iterator[tuple[str, str | None, None]]:
        """Each with its version where it is a shard that is there: a look at it may spare its being read."""

        def version(uri: str) -> str | None:
            found = look_up({"uri": uri, "version": None}) if is_shard(uri) else None
            return None if isinstance(found, Reject) else found

        remaining = iter(uris)
        while page := list(islice(remaining, _ENTRIES_PER_TABLE)):
            yield from ((uri, found, None) for uri, found in zip(page, _threads().map(version, page), strict=True))

    def _uri_column(self, schema: pa.Schema) -> str:
        if self.column is not None:
            if self.column not in schema.names:
                raise SourceError(f"{self.uri} has no column {self.column!r}; there are {', '.join(schema.names)}")
            return self.column
        texts = [field.name for field in schema if _is_text(field.type)]
        named = [name for name in texts if name.lower() in _URI_NAMES]
        found = named if named else texts
        if len(found) != 1:
            raise SourceError(
                f"{self.uri} has {len(found)} columns that may hold URIs ({', '.join(found) or 'none'}); "
                "name one with --column"
            )
        return str(found[0])


def fetch(
    entries: pa.Table,
    *,
    done: np.ndarray,
    column: str | None = None,
    alive: Callable[[], object] = lambda: None,
    whole: Callable[[str, list[str]], object] = lambda shard, members: None,
) -> Iterator[tuple[pa.Table, int]]:
    """Reads the images of an index, leaving out what is done before its bytes are decoded.

    Loose images are read with many requests in flight, a shard once from front to back.

    Args:
        entries: rows with the schema `ENTRIES`.
        done: sorted image_ids (`S32`) that need no labelling.
        column: as `Source` takes it.
        alive: is called now and then while a shard is read in which nothing is new.
        whole: is called with the `shard_id` of a shard that was read as far as it can be, and the image_ids in it
            (the shard's own among them where it breaks off).

    Yields:
        A table with the schema `FETCHED`, of at most 64 images and about 64 MiB, and how many
        images were left out since the last one. What cannot be read is a reject in it.
    """
    rows = entries.to_pylist()
    yield from _fetch_loose([row for row in rows if not is_shard(row["uri"])], done)
    for row in rows:
        if is_shard(row["uri"]):
            yield from _fetch_shard(row["uri"], row["version"], done, column, alive, whole)


def num_members(shard: str, column: str | None = None) -> int:
    """How many images are in a shard, as far as it can be read."""
    number = 0
    with contextlib.suppress(Exception):  # whatever the store's client raises, and damaged shards
        for _ in _members(shard, column):
            number += 1
    return number


def read_images(uris: Iterable[str]) -> dict[str, bytes | Reject]:
    """Reads single images by their URIs, members of shards too; each shard once."""
    images: dict[str, bytes | Reject] = {}
    by_shard: dict[str, set[str]] = {}
    for uri in uris:
        if match := _MEMBER.fullmatch(uri):
            by_shard.setdefault(match["shard"], set()).add(uri)
        else:
            fs, path = filesystem(uri)
            try:
                images[uri] = fs.cat_file(path)
            except Exception as error:  # whatever the store's client raises
                images[uri] = _reject(error)
    for shard, wanted in by_shard.items():
        try:
            for uri, data in _members(shard, None):
                if uri in wanted:
                    images[uri] = data if data is not None else Reject("fetch", "missing", "the row holds no bytes")
                    wanted.discard(uri)
                if not wanted:
                    break
        except Exception as error:  # as above, and damaged shards
            images |= {uri: _reject(error) for uri in wanted}
        else:
            images |= {uri: Reject("fetch", "missing", "the shard has no such member") for uri in wanted}
    return images


class _Member(tarfile.TarInfo):
    """A member; a damaged header is an error, where tarfile would take it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


class Member(NamedTuple):
    """A member of a tar."""

    data: bytes
    """What is in it."""
    offset: int
    """Where that begins, in bytes from the begin of the (uncompressed) archive."""


def tar_samples(file: BinaryIO) -> Iterator[tuple[str, dict[str, Member]]]:
    """Reads a tar once, front to back, in the WebDataset convention.

    Yields:
        For each run of members that share folder and basename up to its first dot, that key and
        the members by their extension, which is all behind that dot.

    Raises:
        tarfile.TarError, OSError, EOFError: the archive is truncated or damaged; what came before it was yielded.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    with tarfile.open(fileobj=file, mode="r|*", bufsize=2**20, tarinfo=_Member) as archive:
        try:
            for member in archive:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.name.startswith("."):
                    continue
                name, _, extension = path.name.partition(".")
                member_key = str(path.with_name(name))
                if member_key != key or extension in members or len(members) == _MAX_SAMPLE_MEMBERS:
                    if key is not None:
                        yield key, members
                    key, members = member_key, {}
                content = archive.extractfile(member)
                assert content is not None  # as it is a file
                members[extension] = Member(content.read(), member.offset_data)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            if members and key is not None and not is_transient(error):  # else there is more to come of it
                yield key, members
            raise
        if key is not None:
            yield key, members


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _reject(error: Exception) -> Reject:
    # fsspec's HTTP client calls every refusal a missing file; the status is in the cause.
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    if isinstance(error, PermissionError) or status in (401, 403):
        kind = "forbidden"
    elif isinstance(error, FileNotFoundError):
        kind = "missing"
    else:
        kind = "unreadable"
    return Reject("fetch", kind, _text(error))


def _final(error: Exception) -> Reject:
    """What is wrong with one image, after all tries.

    Raises:
        RunError: it is the store that cannot be reached; nothing is known of the image.
    """
    if isinstance(error, ShortRead):  # it was replaced by a smaller one since; the next listing has its new version
        return Reject("fetch", "shorter than listed", _text(error))
    if is_transient(error):
        raise RunError(f"the source was tried {len(PAUSES_SECONDS) + 1} times in vain: {_text(error)}") from error
    if is_refusal(error):
        raise RunError(f"the source refuses the credentials: {_text(error)}") from error
    return _reject(error)


def version_in(info: Mapping[str, Any]) -> str:
    """The version of an object, by what a listing of fsspec says of it."""
    for name in ("ETag", "etag", "e_tag"):
        if info.get(name):
            return str(info[name]).strip('"')
    modified = next(
        (info[name] for name in ("mtime", "LastModified", "last_modified", "updated") if info.get(name)), ""
    )
    return f"{info['size']}-{modified}"


def _walk(fs: Any, path: str) -> Iterator[dict[str, Any]]:
    """The files below a path, without holding them all."""
    if "s3" in fs.protocol:
        # fsspec's listings are whole; of a bucket with millions of keys only a page is wanted at a time.
        bucket, key, _ = fs.split_path(path)
        token: dict[str, str] = {}
        while True:
            list_page = functools.partial(fs.call_s3, "list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "")
            page = retrying(functools.partial(list_page, **token))
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):
                    yield {**item, "name": f"{bucket}/{item['Key']}", "size": item["Size"]}
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}
    for _, _, files in fs.walk(path, detail=True, on_error="raise"):
        yield from (files[name] for name in sorted(files))


def _tables(rows: Iterable[tuple[str, str | None, int | None]]) -> Iterator[pa.Table]:
    rows = iter(rows)
    while page := list(islice(rows, _ENTRIES_PER_TABLE)):
        uris, versions, sizes = zip(*page, strict=True)
        yield pa.table([uris, versions, sizes], schema=ENTRIES)


def _absolute(uri: str, folder: str) -> str:
    if "://" in uri:
        return uri
    return f"file://{uri}" if uri.startswith("/") else f"{folder}/{uri}"


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _bytes_columns(schema: pa.Schema) -> list[str]:
    """The columns that may hold image bytes: binary, or structs with a binary field `bytes`."""

    def holds_bytes(field: pa.Field) -> bool:
        kind = field.type
        if pa.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            kind = kind.field(index).type if index >= 0 else kind
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return [field.name for field in schema if holds_bytes(field)]


def _bytes_column(schema: pa.Schema, column: str | None) -> str | None:
    """The one column of image bytes. None: there is none, or none that can be told from others."""
    names = _bytes_columns(schema)
    if column is not None:
        return column if column in names else None
    for name in _BYTES_NAMES:
        if name in names:
            return name
    return names[0] if len(names) == 1 else None


def _known(image: str, done: np.ndarray) -> bool:
    return bool(known(np.array([image], "S32"), done)[0])


def _batches(images: Iterable[tuple[str, str, str, bytes | Reject]]) -> Iterator[pa.Table]:
    rows: list[tuple[Any, ...]] = []
    size_bytes = 0
    for identity, uri, version, data in images:
        if isinstance(data, Reject):
            rows.append((identity, uri, version, None, data.stage, data.reason))
        else:
            rows.append((identity, uri, version, data, None, None))
            size_bytes += len(data)
        if len(rows) == _IMAGES_PER_BATCH or size_bytes >= _BYTES_PER_BATCH:
            yield pa.table(list(zip(*rows, strict=True)), schema=FETCHED)
            rows, size_bytes = [], 0
    if rows:
        yield pa.table(list(zip(*rows, strict=True)), schema=FETCHED)


def _fetch_loose(rows: Sequence[dict[str, Any]], done: np.ndarray) -> Iterator[tuple[pa.Table, int]]:
    """Loose images, a batch of requests at a time."""
    versions = list(_threads().map(look_up, rows))
    num_present = 0
    wanted: list[_Wanted] = []
    for row, version in zip(rows, versions, strict=True):
        known_version = "" if isinstance(version, Reject) else version
        identity = image_id(row["uri"], known_version)
        if _known(identity, done):
            num_present += 1
        else:
            size = version if isinstance(version, Reject) else row["size_bytes"]
            wanted.append((identity, row["uri"], known_version, size))
    for some in _by_bytes(wanted):
        contents = _cat({uri: size for _, uri, _, size in some if not isinstance(size, Reject)})
        for table in _batches((i, uri, v, s if isinstance(s, Reject) else contents[uri]) for i, uri, v, s in some):
            yield table, num_present
            num_present = 0
    if num_present:
        yield FETCHED.empty_table(), num_present


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Those of this process that wait for stores; they start as they are needed, and stay for the next block."""
    return ThreadPoolExecutor(_REQUESTS_IN_FLIGHT)


def _by_bytes(wanted: Iterable[_Wanted]) -> Iterator[list[_Wanted]]:
    """Runs of images that may be in memory together."""
    some: list[_Wanted] = []
    size_bytes = 0
    for image in wanted:
        some.append(image)
        size_bytes += 0 if isinstance(image[3], Reject) else image[3] or _ASSUMED_BYTES
        if size_bytes >= _BYTES_PER_BATCH:
            yield some
            some, size_bytes = [], 0
    if some:
        yield some


def look_up(row: Mapping[str, Any]) -> str | Reject:
    """The version of an object of an index, or what is wrong with it; where the index tells it, nothing is asked.

    Raises:
        RunError: the store cannot be reached.
    """
    if row["version"] is not None:
        return str(row["version"])
    try:
        fs, path = filesystem(row["uri"])
        return version_in(retrying(lambda: fs.info(path)))
    except Exception as error:  # whatever the store's client raises
        if codes(error) & {"400", "403"}:  # S3's answer to HEAD has no body to say which refusal it is
            return _refused(fs, path, error)
        return _final(error)


def _refused(fs: Any, path: str, error: Exception) -> Reject:
    """What is wrong with an object of which S3 said no more than its status."""
    try:
        fs.cat_file(path, start=0, end=1)
    except Exception as told:  # as above
        return _final(told)
    return _final(error)


def _cat(sizes: Mapping[str, int | None]) -> dict[str, bytes | Reject]:
    """The bytes of objects, with many requests in flight; what fails for a while is asked for again.

    Args:
        sizes: how many bytes each URI should give, where that is known.
    """
    contents: dict[str, bytes | Reject] = {}
    wanted = list(sizes)
    for pause in (*PAUSES_SECONDS, None):
        failed = []
        for uri, data in _cat_once(wanted):
            size = sizes[uri]
            if isinstance(data, bytes) and size is not None and len(data) < size:
                data = ShortRead(uri, len(data), size)
            if isinstance(data, bytes):
                contents[uri] = data
            elif pause is not None and is_transient(data):
                failed.append(uri)
            else:
                contents[uri] = _final(data)
        if pause is None or not failed:
            break
        time.sleep(pause)
        wanted = failed
    return contents


def _cat_once(uris: Iterable[str]) -> Iterator[tuple[str, bytes | Exception]]:
    by_protocol: dict[str, list[str]] = {}
    for uri in uris:
        by_protocol.setdefault(uri.partition("://")[0], []).append(uri)
    for same in by_protocol.values():
        fs, _ = filesystem(same[0])
        paths = [fs._strip_protocol(uri) for uri in same]
        # Unlike cat, cat_ranges takes a name as it is: `photo[1].jpg` is no pattern.
        read = functools.partial(fs.cat_ranges, starts=None, ends=None, on_error="return")
        if "s3" in fs.protocol:
            found = objects.read(fs, paths, read, _threads())
        elif fs.async_impl:
            found = read(paths)
        else:  # such file systems would read one after the other
            found = [data for [data] in _threads().map(read, [[path] for path in paths])]
        yield from zip(same, found, strict=True)


def _fetch_shard(
    shard: str,
    version: str | None,
    done: np.ndarray,
    column: str | None,
    alive: Callable[[], object],
    whole: Callable[[str, list[str]], object],
) -> Iterator[tuple[pa.Table, int]]:
    """The images of a shard; where it breaks off, the shard itself is a reject."""
    num_present = 0
    members: list[str] = []

    def images() -> Iterator[tuple[str, str, str, bytes | Reject]]:
        nonlocal num_present
        looked_up = look_up({"uri": shard, "version": version})
        known_version = "" if isinstance(looked_up, Reject) else looked_up
        pauses, last_sign = iter(PAUSES_SECONDS), time.monotonic()
        while True:
            num_before = len(members)
            try:
                if isinstance(looked_up, Reject):
                    raise looked_up
                for uri, data in islice(_members(shard, column), num_before, None):
                    identity = image_id(uri, known_version)
                    members.append(identity)
                    if _known(identity, done):
                        num_present += 1
                        if time.monotonic() - last_sign >= _SIGN_SECONDS:
                            alive()
                            last_sign = time.monotonic()
                    else:
                        missing = Reject("fetch", "missing", "the row holds no bytes")
                        yield identity, uri, known_version, missing if data is None else data
                return
            except Exception as error:  # whatever the store's client raises, and damaged shards
                if len(members) > num_before:
                    pauses = iter(PAUSES_SECONDS)
                if is_transient(error) and (pause := next(pauses, None)):
                    time.sleep(pause)
                    continue  # from its beginning, past what has been read
                identity = image_id(shard, known_version)
                members.append(identity)
                if _known(identity, done):
                    num_present += 1
                    return
                final = error if isinstance(error, Reject) else _final(error)
                broken = Reject("fetch", "broken shard", f"what follows could not be read: {_text(error)}")
                yield identity, shard, known_version, final if final is error else broken
                return

    for table in _batches(images()):
        yield table, num_present
        num_present = 0
    if num_present:
        yield FETCHED.empty_table(), num_present
    if version is not None:
        whole(shard_id(shard, version, column), members)


def _members(shard: str, column: str | None) -> Iterator[tuple[str, bytes | None]]:
    """The URI and bytes of each image in a shard, in its order."""
    fs, path = filesystem(shard)
    with fs.open(path, "rb", block_size=_READ_BYTES, cache_type="readahead") as file:
        found = _parquet_images(file, shard, column) if path.lower().endswith(".parquet") else _tar_images(file)
        times: Counter[str] = Counter()
        for member, data in found:
            times[member] += 1
            repeated = f"@{times[member]}" if times[member] > 1 else ""
            yield f"{shard}#{member}{repeated}", data


def _tar_images(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """One image a sample: of `0001.jpg`, `0001.seg.png`, `0001.json` the first.

    Where no extension is an image's, names are not in the convention but hold dots
    (`IMG.2024.05.jpg`), and every member that ends like an image is one.
    """
    for key, members in tar_samples(file):
        extensions = sorted(
            (e for e in members if f".{e.lower()}" in _IMAGE_SUFFIXES),
            key=lambda e: _IMAGE_SUFFIXES.index(f".{e.lower()}"),
        )[:1] or [e for e in members if e.lower().endswith(_IMAGE_SUFFIXES)]
        for extension in extensions:
            yield f"{key}.{extension}", members[extension].data


def _parquet_images(file: BinaryIO, shard: str, column: str | None) -> Iterator[tuple[str, bytes | None]]:
    parquet = pq.ParquetFile(file)
    schema = parquet.schema_arrow
    bytes_column = _bytes_column(schema, column)
    if bytes_column is None:
        raise SourceError(
            f"{shard} has no one column of image bytes (columns: {', '.join(schema.names)}); name it with --column"
        )
    texts = {field.name.lower(): field.name for field in schema if _is_text(field.type)}
    name_column = next((texts[name] for name in _NAME_NAMES if name in texts), None)
    row = 0
    for batch in parquet.iter_batches(
        _IMAGES_PER_BATCH, columns=[bytes_column, *([name_column] if name_column else [])]
    ):
        images = batch.column(bytes_column)
        names = batch.column(name_column) if name_column else None
        if pa.types.is_struct(images.type):
            if names is None and images.type.get_field_index("path") >= 0:
                names = images.field("path")
            images = images.field("bytes")
        for index, image in enumerate(images):
            name = names[index].as_py() if names is not None else None
            yield f"{row}/{name}" if name else str(row), image.as_py()
            row += 1
