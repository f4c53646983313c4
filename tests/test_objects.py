import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.session
import fsspec
import numpy as np
import pyarrow as pa
import pytest
import s3fs

from segray import objects
from segray.errors import RunError
from segray.source import ENTRIES, fetch, filesystem
from tests.proxy import proxy
from tests.s3 import BUCKET, Server

THREADS = ThreadPoolExecutor(4)
LEFT = FileNotFoundError("left to s3fs")


def rows_of(*uris: str, size_bytes: int | None = None) -> list[dict[str, Any]]:
    entries = pa.table([uris, ["1"] * len(uris), [size_bytes] * len(uris)], schema=ENTRIES)
    return [row for table, _ in fetch(entries, done=np.array([], "S32")) for row in table.to_pylist()]


def read(*paths: str, by_others: Callable[[str], bytes | Exception] = lambda path: LEFT) -> list[bytes | Exception]:
    """Reads without s3fs; what is left to it is `LEFT`, or what is told."""
    fs, _ = filesystem(f"s3://{BUCKET}")
    return objects.read(fs, paths, lambda left: list(map(by_others, left)), THREADS)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Points s3fs, which remembers, at another server."""

    def change(url: str) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "segray")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()

    yield change
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def without_s3fs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem, "cat_ranges", lambda self, paths, *_, **__: [LEFT for _ in paths])


@pytest.mark.usefixtures("without_s3fs")
@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_objects_are_read_without_s3fs_with_one_request_each(
    scheme: str, s3: Server, tmp_path: Path, endpoint: Callable[[str], None]
) -> None:
    names = [f"objects/once/{number}.jpg" for number in range(200)]
    fs, _ = filesystem(f"s3://{BUCKET}")
    fs.pipe({f"{BUCKET}/{name}": name.encode() * 1000 for name in names})
    with proxy(s3.host, s3.port, tmp_path) as between:
        endpoint(between.url)
        rows = rows_of(*(f"{scheme}://{BUCKET}/{name}" for name in names))
        assert [row["data"] for row in rows] == [name.encode() * 1000 for name in names]
        assert Counter(between.requests()) == Counter(("GET", f"/{BUCKET}/{name}", "") for name in names)


PLAIN_KEYS = [
    *("a b.jpg", "a+b.jpg", "a%20b.jpg", "a%2Bb.jpg", "a%2520b.jpg", "a%b.jpg", "a#b.jpg", "a?b.jpg", "a?b=c&d.jpg"),
    *(
        "a*b.jpg",
        "[1].jpg",
        "{1}.jpg",
        "grün.jpg",
        "gru\u0308n.jpg",
        "日本.jpg",
        "🌾.jpg",
        "a~b.jpg",
        "a:b@c$d!,;=.jpg",
    ),
    *("'\"<>|^`.jpg", "a\\b.jpg", "...jpg", ".a/..b/c...jpg", " a /b ", "A.JPG", "a.jpg", "no-extension", "d/e/f.jpg"),
]
OTHER_KEYS = ["a\x01b.jpg", "a\nb.jpg", "a\u00a0b.jpg", "a\u200bb.jpg"]
TIDIED_KEYS = ["g//h.jpg", "/g.jpg", "./g.jpg", "g/./h.jpg", "g/../h.jpg", "..", "g/."]


@pytest.mark.usefixtures("s3")
def test_each_key_gives_its_own_bytes() -> None:
    fs, _ = filesystem(f"s3://{BUCKET}")
    paths = [f"{BUCKET}/objects/odd/{key}" for key in [*PLAIN_KEYS, *OTHER_KEYS]]
    fs.pipe({path: path.encode() for path in paths})
    rows = rows_of(*(f"s3://{path}" for path in paths))
    assert [row["data"] for row in rows] == [path.encode() for path in paths]
    assert read(*paths) == [*(path.encode() for path in paths[: len(PLAIN_KEYS)]), *(LEFT for _ in OTHER_KEYS)]


@pytest.mark.parametrize("key", [*TIDIED_KEYS, ""])
def test_a_key_that_would_be_tidied_is_not_asked_for(key: str, store: "Store") -> None:
    assert read(f"{BUCKET}/{key}") == [LEFT]
    assert not store.asked


def test_a_version_that_a_uri_names_is_left_to_s3fs(store: "Store") -> None:
    fs, path = filesystem(f"s3://{BUCKET}/a.jpg?versionId=3")
    assert objects.read(fs, [path], lambda left: [b"the third"], THREADS) == [b"the third"]
    assert not store.asked


class Store(ThreadingHTTPServer):
    """An S3 server whose objects `KIND-TIMES` are called by the error that they give, and how many times they do."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.signed_by: list[str] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        self.server.signed_by.append(self.headers.get("Authorization", "").partition("Credential=")[2].split("/")[0])
        code, times = [*name.split("-"), "99"][:2]
        if self.server.asked[name] > int(times):
            code = "fine"
        if code == "hang":
            time.sleep(60)
        status = {"fine": 200, "NoSuchKey": 404, "SlowDown": 503, "PermanentRedirect": 301, "short": 200}.get(code, 403)
        body = b"bytes" if status == 200 else f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + (code == "short")))
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = code == "short"

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def store(endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """It runs, and s3fs knows it."""
    monkeypatch.setattr("segray.source.PAUSES_SECONDS", (0.01, 0.01, 0.01))
    server = Store()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint(f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_what_fails_is_what_it_is_to_s3fs(store: Store) -> None:
    names = ["fine", "NoSuchKey", "AccessDenied", "SlowDown-1", "short-1", "fine2-0"]
    rows = rows_of(*(f"s3://{BUCKET}/{name}" for name in names))
    assert [row["data"] for row in rows] == [b"bytes", None, None, b"bytes", b"bytes", b"bytes"]
    assert [(row["reason"] or "").partition(":")[0] for row in rows] == ["", "missing", "forbidden", "", "", ""]
    assert (store.asked["fine"], store.asked["fine2-0"]) == (1, 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SlowDown", "the source was tried 1 times in vain: "),
        ("short", "the source was tried 1 times in vain: "),
        ("InvalidAccessKeyId", "the source refuses the credentials: "),
    ],
)
def test_a_store_that_stays_away_or_refuses_ends_the_run(
    name: str, said: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segray.source.PAUSES_SECONDS", ())
    with pytest.raises(RunError, match=said):
        rows_of(f"s3://{BUCKET}/fine", f"s3://{BUCKET}/{name}")


def test_nobody_there_ends_the_run(endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.source.PAUSES_SECONDS", ())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RunError, match="the source was tried 1 times in vain"):
            rows_of(f"s3://{BUCKET}/fine")


def test_an_object_shorter_than_listed_is_a_reject(store: Store) -> None:
    [row] = rows_of(f"s3://{BUCKET}/fine", size_bytes=6)
    assert row["reason"].startswith("shorter than listed: ")


def test_a_store_that_hangs_is_waited_for_once_and_asked_again_after_a_rest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "READ_SECONDS", 1.0)
    monkeypatch.setattr(objects, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(objects, "_REST_SECONDS", 1.0)
    assert read(f"{BUCKET}/fine") == [b"bytes"]
    begun = time.monotonic()
    assert read(*(f"{BUCKET}/hang-9-{number}" for number in range(40))) == [LEFT] * 40
    assert time.monotonic() - begun < 5  # 10 in turns
    assert sum(number for name, number in store.asked.items() if name.startswith("hang")) == 4  # as many as threads
    assert read(f"{BUCKET}/fine") == [LEFT]
    time.sleep(1.1)
    assert read(f"{BUCKET}/fine") == [b"bytes"]


def test_a_bucket_that_only_s3fs_can_read_is_given_up(store: Store) -> None:
    paths = [f"{BUCKET}/PermanentRedirect-{number}" for number in (98, 99)]
    assert read(*paths) == [LEFT] * 2
    assert read(*paths, by_others=lambda path: b"bytes") == [b"bytes"] * 2  # not before s3fs has read one
    assert read(*paths, "other-bucket/fine") == [LEFT, LEFT, b"bytes"]
    assert store.asked == {"PermanentRedirect-98": 2, "PermanentRedirect-99": 2, "fine": 1}


def test_a_bucket_that_was_read_is_not_given_up_for_a_failure(store: Store) -> None:
    assert read(f"{BUCKET}/fine") == [b"bytes"]
    assert read(f"{BUCKET}/SlowDown", by_others=lambda path: b"bytes") == [b"bytes"]
    assert read(f"{BUCKET}/fine") == [b"bytes"]


def test_where_fsspec_is_configured_all_is_left_to_s3fs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(f"{BUCKET}/fine") == [b"bytes"]
    for protocol in ("s3", "s3a"):
        with monkeypatch.context() as patch:
            patch.setitem(fsspec.config.conf, protocol, {"anon": True})
            assert read(f"{BUCKET}/fine") == [LEFT]
            assert [row["data"] for row in rows_of(f"s3://{BUCKET}/fine")] == [b"bytes"]
    assert store.signed_by == ["segray", "", ""]


def test_without_credentials_all_is_left_to_s3fs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    assert read(f"{BUCKET}/fine") == [LEFT]
    assert objects._buckets(filesystem(f"s3://{BUCKET}")[0], {BUCKET}) == {}
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    s3fs.S3FileSystem.clear_instance_cache()
    assert read(f"{BUCKET}/fine") == [LEFT]
    assert not store.asked


def test_profile_endpoint_and_region_are_found_in_files(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config").write_text(
        f"[profile fields]\nregion = eu-west-3\nendpoint_url = http://127.0.0.1:{store.server_port}/\n"
    )
    (tmp_path / "credentials").write_text("[fields]\naws_access_key_id = farmer\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "fields")
    s3fs.S3FileSystem.clear_instance_cache()
    assert read(f"{BUCKET}/fine") == [b"bytes"]
    assert store.signed_by == ["farmer"]


@pytest.mark.parametrize(
    ("given", "region", "endpoint_url"),
    [
        ({}, "us-east-1", "https://s3.us-east-1.amazonaws.com"),
        ({"AWS_REGION": "eu-west-1"}, "eu-west-1", "https://s3.eu-west-1.amazonaws.com"),
        ({"AWS_DEFAULT_REGION": "cn-north-1"}, "cn-north-1", "https://s3.cn-north-1.amazonaws.com.cn"),
        ({"AWS_DEFAULT_REGION": "eu-west-3", "AWS_REGION": "x"}, "eu-west-3", "https://s3.eu-west-3.amazonaws.com"),
        ({"AWS_REGION": "x", "AWS_ENDPOINT_URL": "http://a:1"}, "us-east-1", "http://a:1"),
        ({"AWS_ENDPOINT_URL_S3": "http://b:1", "AWS_ENDPOINT_URL": "http://a:1"}, "us-east-1", "http://b:1"),
        ({"AWS_ENDPOINT": "http://a:1", "AWS_BUCKET": "another"}, "us-east-1", "https://s3.us-east-1.amazonaws.com"),
    ],
)
def test_a_bucket_is_where_s3fs_sees_it(
    given: dict[str, str],
    region: str,
    endpoint_url: str,
    endpoint: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint("")
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    fs, _ = filesystem(f"s3://{BUCKET}")
    config = dict(objects._bucket(fs.s3, BUCKET)._store.config)
    assert (config["bucket"], config["region"], config["endpoint_url_s3"]) == (BUCKET, region, endpoint_url)


def test_credentials_are_asked_for_again_before_they_expire(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Renewed:
        """As those of botocore that expire."""

        number = 0

        def get_frozen_credentials(self) -> SimpleNamespace:
            self.number += 1
            return SimpleNamespace(access_key=f"key{self.number}", secret_key="secret", token="token")

    renewed = Renewed()
    monkeypatch.setattr(botocore.session.Session, "get_credentials", lambda self: renewed)
    monkeypatch.setattr(objects, "_ASK_AGAIN", timedelta(minutes=5, seconds=1))
    for _ in range(3):
        assert read(f"{BUCKET}/fine", f"{BUCKET}/fine2-0") == [b"bytes"] * 2
    time.sleep(1.1)
    assert read(f"{BUCKET}/fine") == [b"bytes"]
    assert store.signed_by == ["key1"] * 6 + ["key2"]
