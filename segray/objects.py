"""Whole objects of S3 at a fraction of what s3fs spends on each; what cannot be read this way is left to s3fs.

So no error is told from another here: s3fs meets it again, and its errors are known.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from obstore.store import S3Store

from segray.retry import CONNECT_SECONDS, READ_SECONDS, S3_SETTINGS

if TYPE_CHECKING:
    from obstore.store import S3Credential

__all__ = ["read"]

_PATIENCE_SECONDS = 5.0
_REST_SECONDS = 60.0
_ASK_AGAIN = timedelta(minutes=6)  # less the five that object_store wants credentials to last
_GLOBAL_ENDPOINT = "https://s3.amazonaws.com"


def read(
    fs: Any, paths: Sequence[str], others: Callable[[list[str]], list[bytes | Exception]], threads: Executor
) -> list[bytes | Exception]:
    """The bytes of objects, or what is wrong with them.

    Args:
        fs: s3fs's file system.
        paths: as it takes them.
        others: reads the rest with it.
        threads: wait for the store, a request each.
    """
    places = {path: fs.split_path(path)[:2] for path in paths}
    buckets = _buckets(fs, {name for name, _ in places.values()})
    asked = {p: (buckets[name], key) for p, (name, key) in places.items() if name in buckets and _is_plain(key)}
    answers = zip(asked, threads.map(lambda place: place[0].get(place[1]), asked.values()), strict=True)
    contents: dict[str, bytes | Exception] = {path: data for path, data in answers if data is not None}
    left = [path for path in paths if path not in contents]
    for path, data in zip(left, others(left) if left else [], strict=True):
        contents[path] = data
        if path in asked and isinstance(data, bytes):
            asked[path][0].was_read_by_others()
    return [contents[path] for path in paths]


class _Bucket:
    """A bucket, for as long as it is worth asking."""

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._has_read = False
        self._rests_until = 0.0

    def get(self, key: str) -> bytes | None:
        begun = time.monotonic()
        if begun < self._rests_until:
            return None
        try:
            data = self._store.get(key).bytes().to_bytes()
        except Exception:  # whatever obstore raises
            # What is refused at once costs little; but a store that is away is waited for once, and not in turns.
            if time.monotonic() - begun > _PATIENCE_SECONDS:
                self._rests_until = time.monotonic() + _REST_SECONDS
            return None
        self._has_read = True
        return data

    def was_read_by_others(self) -> None:
        """Gives up a bucket that others can read, and this has never: one of another region, for example."""
        if not self._has_read:
            self._rests_until = math.inf


def _is_plain(key: str) -> bool:
    """Whether object_store asks for just this key; some it would tidy up, and others it refuses."""
    return key.isprintable() and not {"", ".", ".."} & set(key.split("/"))


def _buckets(fs: Any, names: set[str]) -> dict[str, _Bucket]:
    """Those that can be read: none without credentials, or where fsspec's configuration tells s3fs anything."""
    if fs.storage_options.keys() - {"use_listings_cache", *S3_SETTINGS}:
        return {}
    try:
        client = fs.s3
        return {name: _bucket(client, name) for name in names if _credentials(client)}
    except Exception:  # whatever botocore raises, and s3fs will meet
        return {}


@functools.lru_cache
def _bucket(client: Any, name: str) -> _Bucket:
    """A bucket as s3fs's client reaches it."""
    region, endpoint = client.meta.region_name, client.meta.endpoint_url
    if endpoint == _GLOBAL_ENDPOINT:  # botocore, which does not read AWS_REGION, waits to be redirected
        region = os.environ.get("AWS_REGION", region)
        endpoint = f"https://s3.{region}.amazonaws.com"
    store = S3Store(
        name,
        # All of these, lest obstore looks for them in the environment.
        region=region,
        aws_endpoint_url_s3=endpoint,
        virtual_hosted_style_request=False,
        credential_provider=functools.partial(_frozen, _credentials(client)),
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "read_timeout": timedelta(seconds=READ_SECONDS),
            "timeout": timedelta(hours=1),  # for the whole of an object
        },
        retry_config={"max_retries": 0},
    )
    return _Bucket(store)


@functools.lru_cache
def _credentials(client: Any) -> Any:
    """What botocore finds; looked for once for each client of s3fs, as its own are."""
    import botocore.session  # which takes as long as all the rest of segray.source; local sources need it not

    return botocore.session.get_session().get_credentials()


def _frozen(credentials: Any) -> "S3Credential":
    """Credentials of the moment; botocore renews them in time, where they expire, if it is asked now and then."""
    now = credentials.get_frozen_credentials()
    return {
        "access_key_id": now.access_key,
        "secret_access_key": now.secret_key,
        "token": now.token,
        "expires_at": datetime.now(UTC) + _ASK_AGAIN,
    }
