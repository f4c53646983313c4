"""Files as GDAL opens them: by fsspec's URIs, tuned for object storage, and with faults told apart.

Credentials and endpoints come from the standard chains of each store. Beside a remote raster nothing is looked for
but a mask: a listing of its folder can cost more than the scene.
"""

import contextlib
import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import rasterio
from fsspec.core import url_to_fs
from rasterio._err import CPLE_BaseError
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError, RPCError
from rasterio.session import DummySession

from segray.errors import Reject, RunError
from segray.retry import PAUSES_SECONDS, S3_SETTINGS, is_refusal, is_transient, retrying

__all__ = ["begins_with", "fetched", "gdal_path", "one_line", "opened", "with_dataset"]

T = TypeVar("T")

_SCHEMES = {
    "s3": "/vsis3/",
    "s3a": "/vsis3/",
    "gs": "/vsigs/",
    "gcs": "/vsigs/",
    "az": "/vsiaz/",
    "abfs": "/vsiaz/",
    "abfss": "/vsiaz/",
}

_OPTIONS = {
    # Without this GDAL would hold an object that was replaced, or a store that was away, for what it was at first, as
    # long as the process lives. A header is kept as long as its dataset is open.
    "CPL_VSIL_CURL_NON_CACHED": "/vsis3:/vsigs:/vsiaz:/vsicurl",
    "GDAL_CACHEMAX": 256 * 2**20,  # bytes; of itself it would take a twentieth of the machine in every process
    "GDAL_HTTP_CONNECTTIMEOUT": "10",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1",  # byte a second
    "GDAL_HTTP_LOW_SPEED_TIME": "30",
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "VSI_CACHE": "TRUE",
}

# The last two slip through rasterio where a header is damaged.
_GDAL_ERRORS = (RasterioError, CRSError, RPCError, CPLE_BaseError, UnicodeDecodeError)

_MAX_IDLE_DATASETS = 32
_DAMAGED_TRIES = 3

_CUT = re.compile(
    r"got \d+ bytes, expected|Cannot read offset/size|Failed to read directory|IO error during reading"
    r"|No code-stream|Stream too short|truncated"
)
_AWAY = re.compile(r"CURL error|response code: (408|429|5..)")

# What GDAL says is in the reasons. In its log are addresses with their signatures.
logging.getLogger("rasterio").setLevel(logging.CRITICAL)

_idle: list[tuple[tuple[str, str], rasterio.DatasetReader]] = []  # the newest last
_idle_lock = threading.Lock()
_vrt_lock = threading.Lock()


def gdal_path(uri: str) -> str:
    """What GDAL opens where fsspec opens a URI or local path.

    Raises:
        Reject: GDAL does not read from there.
    """
    if uri.startswith("/vsi"):
        return uri
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return os.path.abspath(uri)
    if scheme == "file":
        return rest
    if scheme in ("http", "https"):
        return f"/vsicurl/{uri}"
    if scheme not in _SCHEMES:
        raise Reject(
            "fetch", "unreadable", f"GDAL does not read {scheme}://; it reads {', '.join(_SCHEMES)}, http, https, file"
        )
    container, slash, key = rest.partition("/")
    return f"{_SCHEMES[scheme]}{container.partition('@')[0]}{slash}{key}"


def with_dataset(path: str, version: str, action: Callable[[rasterio.DatasetReader], T]) -> T:
    """What `action` makes of a raster.

    GDAL takes a store that fails in the middle of a file for the end of that file. So the store is asked by another
    client, and what is remote is damaged only if it fails again and again while its store answers.

    Args:
        path: as `gdal_path` gives it.
        version: of the file; a dataset of another version is not used again.
        action: is called again where the store was away.

    Raises:
        Reject: it is gone, truncated, corrupt or no raster.
        RunError: the store cannot be reached; nothing is known of the raster.
    """
    is_remote = path.startswith("/vsi") or _is_vrt(path)  # which may name what is remote
    num_damaged = 0
    pauses = iter(PAUSES_SECONDS)
    while True:
        try:
            with _environment(path), opened(path, version) as dataset:
                return action(dataset)
        except _GDAL_ERRORS as error:
            said = _said(error)
            fault = _asked(path)
            if fault is not None and not is_transient(fault):
                raise _final(path, fault) from fault
            if fault is None and not _AWAY.search(said):
                num_damaged += 1
                if not is_remote or num_damaged == _DAMAGED_TRIES:
                    raise _damaged(said) from error
            pause = next(pauses, None)
            if pause is None:
                raise RunError(f"the source was tried {len(PAUSES_SECONDS) + 1} times in vain: {said}") from error
        time.sleep(pause)


@contextlib.contextmanager
def opened(path: str, version: str) -> Iterator[rasterio.DatasetReader]:
    """A dataset that no other thread uses meanwhile; it stays open, with blocks in its cache, for the next window.

    VRTs do not, and there is one at a time: while another one is open, GDAL reads zeros, and says nothing, where a
    file that a VRT names could not be opened before.
    """
    if _is_vrt(path):
        with _vrt_lock, _newly_opened(path) as dataset:
            yield dataset
        return
    with _idle_lock:
        position = next((p for p, (key, _) in enumerate(_idle) if key == (path, version)), None)
        dataset = None if position is None else _idle.pop(position)[1]
        # As long as one of another version is open, GDAL takes what it knows of that for the new one.
        outdated = [one for (there, other), one in _idle if there == path and other != version]
        _idle[:] = [entry for entry in _idle if entry[1] not in outdated]
    for one in outdated:
        one.close()
    if dataset is None:
        dataset = _newly_opened(path)
    try:
        yield dataset
    except BaseException:
        dataset.close()
        raise
    with _idle_lock:
        _idle.append(((path, version), dataset))
        oldest = _idle.pop(0)[1] if len(_idle) > _MAX_IDLE_DATASETS else None
    if oldest is not None:
        oldest.close()


def _newly_opened(path: str) -> rasterio.DatasetReader:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path)


def _is_vrt(path: str) -> bool:
    return path.lower().endswith(".vrt")


def fetched(uri: str) -> bytes:
    """The bytes of a small file.

    Raises:
        Reject: it is gone, or may not be read.
        RunError: the store cannot be reached.
    """
    try:
        fs, path = _filesystem(uri)
        data: bytes = retrying(lambda: fs.cat_file(path))
    except Exception as error:  # whatever the store's client raises
        raise _final(uri, error) from error
    return data


def begins_with(path: str, signatures: tuple[bytes, ...]) -> bool:
    """Whether a file is there and begins so.

    Raises:
        RunError: the store cannot be reached.
    """
    try:
        return retrying(lambda: _start(path)).startswith(signatures)
    except Exception as error:  # whatever the store's client raises; some call it forbidden where nothing is
        if is_transient(error):
            raise _final(path, error) from error
        return False


def one_line(text: str) -> str:
    """A text that fits into a reason. What follows a question mark is left out: it may be a signature."""
    return re.sub(r"\?\S+", "?…", " ".join(text.split()))[:500]


def _environment(path: str) -> rasterio.Env:
    """GDAL as it suits a file; what the process's environment says of GDAL holds before that."""
    options = _OPTIONS | {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR" if path.startswith("/vsi") else "TRUE"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {
            "AWS_S3_ENDPOINT": f"{parts.netloc}{parts.path}".rstrip("/"),
            "AWS_HTTPS": "NO" if parts.scheme == "http" else "YES",
            "AWS_VIRTUAL_HOSTING": "FALSE",
        }
    options = {name: option for name, option in options.items() if name not in os.environ}
    # On several threads what is wrong with a tile of JPEG 2000 is lost, and the tile is 0.
    options["GDAL_NUM_THREADS"] = "1"
    # Another session would hand over credentials once, which GDAL finds, and renews, by itself.
    return rasterio.Env(DummySession(), **options)


def _asked(path: str) -> Exception | None:
    """What is wrong with a file by the word of its store; None where it hands it out."""
    try:
        _start(path)
    except Exception as error:  # whatever the store's client raises
        return error
    return None


def _start(path: str) -> bytes:
    fs, key = _filesystem(_uri(path))
    start: bytes = fs.cat_file(key, start=0, end=4)
    return start


def _filesystem(uri: str) -> tuple[Any, str]:
    settings = S3_SETTINGS if uri.startswith("s3") else {}
    fs, key = url_to_fs(uri, use_listings_cache=False, **settings)
    return fs, key


def _uri(path: str) -> str:
    """What fsspec opens where GDAL opens a path."""
    if path.startswith("/vsicurl/"):
        return path.removeprefix("/vsicurl/")
    for scheme, prefix in _SCHEMES.items():
        if path.startswith(prefix):
            return f"{scheme}://{path.removeprefix(prefix)}"
    return path


def _final(path: str, error: Exception) -> Reject | RunError:
    """What is wrong with a file, after all tries."""
    text = one_line(f"{_uri(path)}: {type(error).__name__}: {error}")
    if is_transient(error):
        return RunError(f"the source was tried {len(PAUSES_SECONDS) + 1} times in vain: {text}")
    if is_refusal(error):
        return RunError(f"the source refuses the credentials: {text}")
    # fsspec's HTTP client calls every refusal a missing file; the status is in the cause.
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    if isinstance(error, PermissionError) or status in (401, 403):
        return Reject("fetch", "forbidden", text)
    return Reject("fetch", "missing" if isinstance(error, FileNotFoundError) else "unreadable", text)


def _damaged(said: str) -> Reject:
    if "not recognized as" in said:
        return Reject("decode", "not a raster", said)
    return Reject("decode", "truncated" if _CUT.search(said) else "corrupt", said)


def _said(error: BaseException | None) -> str:
    """What GDAL said, from its last word to its first."""
    texts: list[str] = []
    while error is not None:
        text = str(error).strip()
        if "See previous exception" not in text and not any(text in said for said in texts):
            texts.append(text)
        error = error.__cause__
    return one_line("; ".join(texts))
