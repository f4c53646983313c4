import gzip
import io
import os
import re
import socket
import struct
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import s3fs
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

from segray.errors import Reject, RunError, SourceError
from segray.source import (
    ENTRIES,
    FETCHED,
    Source,
    fetch,
    filesystem,
    image_id,
    is_shard,
    known,
    read_images,
    tar_samples,
)

NOTHING = np.array([], "S32")


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(columns: dict[str, pa.Array]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def entries_of(source: Source) -> pa.Table:
    return pa.concat_tables([ENTRIES.empty_table(), *source.entries()])


def uris_of(uri: str, column: str | None = None) -> list[str]:
    return sorted(entries_of(Source(uri, column))["uri"].to_pylist())


def fetched(uri: str, *, done: np.ndarray = NOTHING, column: str | None = None) -> tuple[pa.Table, int]:
    """All that a source yields, and how many images it left out."""
    results = list(fetch(entries_of(Source(uri, column)), done=done, column=column))
    for table, _ in results:
        assert table.schema == FETCHED
        assert table.num_rows <= 64
    return pa.concat_tables([FETCHED.empty_table(), *(t for t, _ in results)]), sum(number for _, number in results)


def images_of(uri: str, column: str | None = None) -> dict[str, bytes]:
    """URI to bytes; there is no reject among them, and `read_images` finds the same."""
    table, num_present = fetched(uri, column=column)
    assert (num_present, table["reason"].null_count) == (0, table.num_rows)
    images = dict(zip(table["uri"].to_pylist(), table["data"].to_pylist(), strict=True))
    assert len(images) == table.num_rows
    if column is None:
        assert read_images(images) == images
    for row in table.select(["image_id", "uri", "version"]).to_pylist():
        assert row["image_id"] == image_id(row["uri"], row["version"])
    return images


ODD_NAMES = [
    *("a.jpg", "B.JPEG", "with space.png", "ha#sh.jpg", "[1].jpg", "sta*r.jpg", "ques?tion.jpg", "per%20cent.jpg"),
    *("grün-日本.png", "dotted.name.tif", "no-extension", "sub/deep/er/x.webp", "a+b&c=d.bmp", "x.tar.jpg"),
]


def test_a_folder_is_read_recursively_whatever_its_names(tmp_path: Path) -> None:
    for name in ODD_NAMES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    expected = {f"file://{tmp_path}/{name}": name.encode() for name in ODD_NAMES}
    assert images_of(str(tmp_path)) == expected
    assert images_of(f"{tmp_path}/") == expected
    assert images_of(f"file://{tmp_path}") == expected


def test_a_prefix_in_memory_is_read_like_a_folder() -> None:
    with fsspec.open("memory://prefix-test/sub/a b.jpg", "wb") as file:
        file.write(b"in memory")
    assert images_of("memory://prefix-test") == {"memory:///prefix-test/sub/a b.jpg": b"in memory"}


def test_hidden_files_are_left_out_and_others_are_counted(tmp_path: Path) -> None:
    for name in ("a.jpg", ".hidden.jpg", "_SUCCESS", "_temporary/b.jpg", ".git/c.jpg", "notes.txt", "sub/d.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    source = Source(str(tmp_path))
    assert entries_of(source)["uri"].to_pylist() == [f"file://{tmp_path}/a.jpg"]
    assert source.num_other == 6


def test_a_folder_that_is_itself_hidden_is_read(tmp_path: Path) -> None:
    (tmp_path / "_data").mkdir()
    (tmp_path / "_data" / "a.jpg").write_bytes(b"a")
    assert uris_of(str(tmp_path / "_data")) == [f"file://{tmp_path}/_data/a.jpg"]


def test_a_glob_matches_what_it_says(tmp_path: Path) -> None:
    for name in ("a1.jpg", "a2.jpg", "b.png", "sub/a3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    folder = f"file://{tmp_path}"
    assert uris_of(f"{tmp_path}/a*.jpg") == [f"{folder}/a1.jpg", f"{folder}/a2.jpg"]
    assert uris_of(f"{tmp_path}/**/*.jpg") == [f"{folder}/{name}" for name in ("a1.jpg", "a2.jpg", "sub/a3.jpg")]
    assert uris_of(f"{tmp_path}/?.png") == [f"{folder}/b.png"]
    assert uris_of(f"{tmp_path}/nosuch*.png") == []


@pytest.mark.parametrize("name", ["photo.jpg", "[1].jpg", "ha#sh.jpg", "without-extension"])
def test_one_file_is_a_source(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"one")
    assert images_of(str(tmp_path / name)) == {f"file://{tmp_path}/{name}": b"one"}
    monkeypatch.chdir(tmp_path)
    assert images_of(name) == {f"file://{tmp_path}/{name}": b"one"}


@pytest.mark.parametrize("uri", ["/nosuch/folder", "memory://nosuch", "/nosuch/a.tar", "/nosuch/list.csv"])
def test_nothing_there_is_refused_by_name(uri: str) -> None:
    with pytest.raises(SourceError, match=f"{uri}: there is no such file, folder or prefix"):
        Source(uri)


def test_an_unknown_protocol_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match="nosuch://bucket cannot be read: "):
        Source("nosuch://bucket")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three images."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b c.jpg", "sub/d#1.jpg"):
        (folder / name).write_bytes(name.encode())
    return folder


def manifest(folder: Path, kind: str, uris: list[str]) -> Path:
    path = folder / f"list.{kind}"
    if kind == "txt":
        path.write_text("\ufeff" + "\n".join([*uris, "", "  "]), encoding="utf-8")
    elif kind == "csv":
        pyarrow.csv.write_csv(pa.table({"width": [1] * len(uris), "uri": uris}), path)
    else:
        pq.write_table(pa.table({"note": ["x"] * len(uris), "Path": uris}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_a_manifest_lists_relative_and_absolute_uris_each_once(photos: Path, kind: str) -> None:
    uris = ["a.jpg", f"{photos}/b c.jpg", "sub/d#1.jpg", f"file://{photos}/a.jpg", "a.jpg", "memory://listed/e.jpg"]
    with fsspec.open("memory://listed/e.jpg", "wb") as file:
        file.write(b"e")
    path = manifest(photos, kind, uris)
    expected = {f"file://{photos}/{name}": name.encode() for name in ("a.jpg", "b c.jpg", "sub/d#1.jpg")}
    assert images_of(str(path)) == {**expected, "memory://listed/e.jpg": b"e"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_of_a_manifest_is_named_or_found(tmp_path: Path, kind: str) -> None:
    def write(columns: dict[str, list[str | int]]) -> str:
        path = tmp_path / f"list.{kind}"
        table = pa.table(columns)
        if kind == "csv":
            pyarrow.csv.write_csv(table, path)
        else:
            pq.write_table(table, path)
        return str(path)

    left, right = [f"file://{tmp_path}/{name}.jpg" for name in ("left", "right")]
    assert uris_of(write({"anything": ["left.jpg"], "number": [1]})) == [left]
    both = write({"left": ["left.jpg"], "right": ["right.jpg"]})
    assert uris_of(both, "right") == [right]
    with pytest.raises(SourceError, match=r"2 columns that may hold URIs \(left, right\); name one with --column"):
        uris_of(both)
    with pytest.raises(SourceError, match="has no column 'middle'; there are left, right"):
        uris_of(both, "middle")
    with pytest.raises(SourceError, match=r"0 columns that may hold URIs \(none\)"):
        uris_of(write({"number": [1]}))


@pytest.mark.parametrize(
    ("name", "content"), [("list.txt", b"\xff\xfe\x00"), ("list.csv", b""), ("a.parquet", b"PAR1")]
)
def test_a_manifest_that_cannot_be_understood_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"{name} cannot be listed: "):
        uris_of(str(tmp_path / name))


def test_what_a_manifest_lists_in_vain_is_a_reject_and_costs_nothing_else(photos: Path) -> None:
    (photos / "folder.jpg").mkdir()
    uris = ["a.jpg", "nosuch.jpg", "folder.jpg", "nosuch.tar", "nosuch://bucket/x.jpg", "b c.jpg"]
    table, _ = fetched(str(manifest(photos, "txt", uris)))
    rows = {row["uri"].rpartition("/")[2]: row for row in table.to_pylist()}
    assert len(rows) == 6
    assert [rows[name]["data"] for name in ("a.jpg", "b c.jpg")] == [b"a.jpg", b"b c.jpg"]
    kinds = {
        name: rows[name]["reason"].partition(":")[0] for name in ("nosuch.jpg", "folder.jpg", "nosuch.tar", "x.jpg")
    }
    assert kinds.pop("folder.jpg") == "unreadable"
    assert kinds == {"nosuch.jpg": "missing", "nosuch.tar": "missing", "x.jpg": "unreadable"}
    for row in table.filter(pa.compute.is_valid(table["reason"])).to_pylist():
        assert (row["stage"], row["data"]) == ("fetch", None)
        assert row["image_id"] == image_id(row["uri"], row["version"])


def test_images_that_vanish_after_the_listing_are_rejects(photos: Path) -> None:
    entries = entries_of(Source(str(photos)))
    (photos / "a.jpg").unlink()
    ((table, _),) = fetch(entries, done=NOTHING)
    by_uri = {row["uri"]: row for row in table.to_pylist()}
    assert by_uri[f"file://{photos}/a.jpg"]["reason"].startswith("missing: ")
    assert by_uri[f"file://{photos}/b c.jpg"]["data"] == b"b c.jpg"


def test_what_is_done_is_left_out_and_counted(photos: Path) -> None:
    (photos / "shard.tar").write_bytes(tar_of([("x.jpg", b"x"), ("y.jpg", b"y")]))
    table, _ = fetched(str(photos))
    ids = dict(zip(table["uri"].to_pylist(), table["image_id"].to_pylist(), strict=True))
    assert len(ids) == 5
    some = [f"file://{photos}/a.jpg", f"file://{photos}/shard.tar#x.jpg"]
    rest, num_present = fetched(str(photos), done=np.array(sorted(ids[uri] for uri in some), "S32"))
    assert num_present == 2
    assert set(rest["uri"].to_pylist()) == set(ids) - set(some)
    none, num_present = fetched(str(photos), done=np.array(sorted(ids.values()), "S32"))
    assert (none.num_rows, num_present) == (0, 5)


def test_an_image_id_changes_with_the_version_and_only_with_it(photos: Path) -> None:
    def ids() -> dict[str, str]:
        table, _ = fetched(str(photos))
        return dict(zip(table["uri"].to_pylist(), table["image_id"].to_pylist(), strict=True))

    before = ids()
    assert ids() == before
    listed, _ = fetched(str(manifest(photos, "txt", ["a.jpg"])))
    (photos / "list.txt").unlink()
    assert listed["image_id"][0].as_py() == before[f"file://{photos}/a.jpg"]
    (photos / "a.jpg").write_bytes(b"another")
    os.utime(photos / "b c.jpg", (1, 1))
    changed = {uri.rpartition("/")[2] for uri, identity in ids().items() if identity != before[uri]}
    assert changed == {"a.jpg", "b c.jpg"}


@given(st.lists(st.integers(0, 99)), st.lists(st.integers(0, 99)))
def test_known_finds_the_ids_that_are_done(ids: list[int], done: list[int]) -> None:
    some, all_done = ([image_id(str(number), "") for number in numbers] for numbers in (ids, done))
    found = known(np.array(some, "S32"), np.array(sorted(all_done), "S32"))
    assert found.tolist() == [number in done for number in ids]


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "TAR"])
def test_a_tar_shard_gives_the_image_of_each_sample(tmp_path: Path, ending: str) -> None:
    data = tar_of(
        [
            ("0001.jpg", b"one"),
            ("0001.json", b"{}"),
            ("0001.seg.png", b"its target"),
            ("0002.json", b"{}"),
            ("0002.PNG", b"two"),
            ("sub/0002.jpg", b"of another folder"),
            ("sub/._0003.jpg", b"of a Mac"),
            ("README", b"no image"),
            ("grün 4.webp", b"four"),
        ]
    )
    path = tmp_path / f"shard-000.{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    shard = f"file://{path}"
    assert images_of(str(path)) == {
        f"{shard}#0001.jpg": b"one",
        f"{shard}#0002.PNG": b"two",
        f"{shard}#sub/0002.jpg": b"of another folder",
        f"{shard}#grün 4.webp": b"four",
    }


def test_names_with_dots_are_images_of_their_own(tmp_path: Path) -> None:
    names = ["IMG.2024.05.jpg", "IMG.2024.06.jpg", "v1.0-a.png"]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of([(name, name.encode()) for name in names]))
    assert images_of(str(path)) == {f"file://{path}#{name}": name.encode() for name in names}


def test_a_name_that_comes_again_is_numbered(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.jpg", b"4")]))
    shard = f"file://{path}#"
    expected = {"a.jpg": b"1", "b.jpg": b"2", "a.jpg@2": b"3", "a.jpg@3": b"4"}
    assert images_of(str(path)) == {f"{shard}{name}": data for name, data in expected.items()}


@pytest.mark.parametrize("cut", [5 * 1536 + 600, 5 * 1536 + 100])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_tar_gives_what_came_before_and_one_reject(tmp_path: Path, cut: int, compressed: bool) -> None:
    # Each member takes a header of 512 bytes and 1024 of data; the sixth is cut in its data or its header.
    data = tar_of([(f"{index}.jpg", bytes([index]) * 1000) for index in range(9)])[:cut]
    path = tmp_path / ("a.tar.gz" if compressed else "a.tar")
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert_broken_after(path, [f"{index}.jpg" for index in range(5)])


def test_a_tar_with_a_damaged_header_gives_what_came_before_and_one_reject(tmp_path: Path) -> None:
    data = bytearray(tar_of([(f"{index}.jpg", b"x" * 1000) for index in range(9)]))
    data[5 * 1536 + 148 : 5 * 1536 + 156] = b"99999999"
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    assert_broken_after(path, [f"{index}.jpg" for index in range(5)])


def assert_broken_after(path: Path, names: list[str]) -> None:
    table, _ = fetched(str(path))
    *rows, last = table.to_pylist()
    assert [row["uri"] for row in rows] == [f"file://{path}#{name}" for name in names]
    assert all(row["reason"] is None for row in rows)
    assert (last["uri"], last["stage"], last["data"]) == (f"file://{path}", "fetch", None)
    assert last["reason"].startswith("broken shard: what follows could not be read: ")
    lost = f"file://{path}#8.jpg"
    assert isinstance(read_images([lost])[lost], Reject)


def test_a_gzip_that_ends_early_gives_what_came_before_and_one_reject(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    members = [(f"{index}.jpg", rng.bytes(100_000)) for index in range(9)]
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(tar_of(members))[:-250_000])
    table, _ = fetched(str(path))
    *rows, last = table.to_pylist()
    assert 1 <= len(rows) < 9
    assert [row["data"] for row in rows] == [data for _, data in members[: len(rows)]]
    assert last["reason"].startswith("broken shard: ")


@pytest.mark.parametrize("content", [b"", b"no tar", b"PAR1 no parquet PAR1"])
@pytest.mark.parametrize("ending", ["tar", "tar.gz", "parquet"])
def test_a_shard_that_is_none_is_one_reject_and_the_next_is_read(tmp_path: Path, content: bytes, ending: str) -> None:
    (tmp_path / f"a.{ending}").write_bytes(content)
    (tmp_path / "b.tar").write_bytes(tar_of([("b.jpg", b"b")]))
    table, _ = fetched(str(tmp_path))
    rows = {row["uri"]: row for row in table.to_pylist()}
    assert len(rows) == 2
    assert rows[f"file://{tmp_path}/a.{ending}"]["reason"].startswith("broken shard: ")
    assert rows[f"file://{tmp_path}/b.tar#b.jpg"]["data"] == b"b"


def test_tar_samples_group_members_by_folder_and_basename() -> None:
    data = tar_of([("a/1.jpg", b"x"), ("a/1.seg.png", b"y"), ("a/2.jpg", b"z"), ("b/2.jpg", b"w"), ("b/2.jpg", b"v")])
    samples = list(tar_samples(io.BytesIO(data)))
    assert [(key, {name: member.data for name, member in members.items()}) for key, members in samples] == [
        ("a/1", {"jpg": b"x", "seg.png": b"y"}),
        ("a/2", {"jpg": b"z"}),
        ("b/2", {"jpg": b"w"}),
        ("b/2", {"jpg": b"v"}),
    ]
    for _, members in samples:
        for member in members.values():
            assert data[member.offset :].startswith(member.data)


BYTES = [b"zero", b"one", b"two"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("column", ["image", "whatever"])
def test_a_parquet_shard_gives_the_bytes_of_each_row(tmp_path: Path, kind: pa.DataType, column: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_of({"label": pa.array([1, 2, 3]), column: pa.array(BYTES, kind)}))
    assert images_of(str(path)) == {f"file://{path}#{row}": data for row, data in enumerate(BYTES)}


@pytest.mark.parametrize("text", [pa.string(), pa.large_string()])
def test_a_column_of_names_is_in_the_uris(tmp_path: Path, text: pa.DataType) -> None:
    names = ["sub/a b.jpg", None, "c#1.jpg"]
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_of({"image": pa.array(BYTES, pa.binary()), "File_Name": pa.array(names, text)}))
    assert images_of(str(path)) == {
        f"file://{path}#0/sub/a b.jpg": b"zero",
        f"file://{path}#1": b"one",
        f"file://{path}#2/c#1.jpg": b"two",
    }


def test_hugging_faces_structs_are_read(tmp_path: Path) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": b"zero", "path": "a.jpg"}, {"bytes": b"one", "path": None}]
    path = tmp_path / "train-00000-of-00001.parquet"
    path.write_bytes(parquet_of({"image": pa.array(rows, kind), "label": pa.array([0, 1])}))
    assert images_of(str(path)) == {f"file://{path}#0/a.jpg": b"zero", f"file://{path}#1": b"one"}


def test_a_row_without_bytes_is_a_reject(tmp_path: Path) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": b"zero", "path": "a.jpg"}, None, {"bytes": None, "path": "c.jpg"}]
    for columns in ({"image": pa.array([b"zero", None, None], pa.binary())}, {"image": pa.array(rows, kind)}):
        path = tmp_path / "a.parquet"
        path.write_bytes(parquet_of(columns))
        table, _ = fetched(str(path))
        assert table["data"].to_pylist() == [b"zero", None, None]
        assert table["reason"].to_pylist() == [None, *["missing: the row holds no bytes"] * 2]
        for uri, data in read_images(table["uri"].to_pylist()[1:]).items():
            assert isinstance(data, Reject), uri


def test_of_several_columns_of_bytes_image_is_taken_or_the_one_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_of({"mask": pa.array([b"m"], pa.binary()), "image": pa.array([b"i"], pa.binary())}))
    assert images_of(str(path)) == {f"file://{path}#0": b"i"}
    assert images_of(str(path), "mask") == {f"file://{path}#0": b"m"}


def test_several_columns_of_bytes_without_a_telling_name_are_an_error_that_lists_them(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    path = folder / "a.parquet"
    columns = {
        "left": pa.array([b"l"], pa.binary()),
        "right": pa.array([b"r"], pa.binary()),
        "path": pa.array(["x.jpg"]),
    }
    path.write_bytes(parquet_of(columns))
    assert images_of(str(path), "right") == {f"file://{path}#0/x.jpg": b"r"}
    with pytest.raises(SourceError, match=r"left, right.*--column"):
        uris_of(str(path))
    table, _ = fetched(str(folder))
    assert "left, right" in table["reason"][0].as_py()


def test_batches_are_small_whatever_the_number_of_images(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(150):
        (folder / f"{index}.jpg").write_bytes(b"x" * index)
    (folder / "a.tar").write_bytes(tar_of([(f"{index}.jpg", b"y") for index in range(150)]))
    tables = [table for table, _ in fetch(entries_of(Source(str(folder))), done=NOTHING)]
    assert [table.num_rows for table in tables] == [64, 64, 22, 64, 64, 22]


def test_batches_of_large_images_are_cut_by_their_bytes(tmp_path: Path) -> None:
    for index in range(5):
        with (tmp_path / f"{index}.jpg").open("wb") as file:
            file.truncate(30 * 2**20)
    tables = [table for table, _ in fetch(entries_of(Source(str(tmp_path))), done=NOTHING)]
    assert [table.num_rows for table in tables] == [3, 2]


def test_reading_images_that_are_not_there_says_so(photos: Path) -> None:
    (photos / "a.tar").write_bytes(tar_of([("x.jpg", b"x")]))
    uris = [f"file://{photos}/{name}" for name in ("nosuch.jpg", "a.tar#nosuch.jpg", "nosuch.tar#x.jpg")]
    images = read_images([*uris, f"file://{photos}/a.tar#x.jpg"])
    assert images.pop(f"file://{photos}/a.tar#x.jpg") == b"x"
    assert {uri: str(reject).partition(": ")[2].partition(":")[0] for uri, reject in images.items()} == {
        uri: "missing" for uri in uris
    }


def test_a_shard_is_known_by_its_ending() -> None:
    assert all(is_shard(uri) for uri in ("s3://b/a.tar", "a.TAR.GZ", "a.tgz", "x/y.parquet"))
    assert not any(is_shard(uri) for uri in ("a.jpg", "tar", "a.tar.jpg", "a.csv", "s3://b/a.tar#x.jpg"))


class Faulty(BaseHTTPRequestHandler):
    """Serves `PATH?fault=KIND&times=N`: so many times with the fault, then well."""

    protocol_version = "HTTP/1.1"
    asked: Counter[str]
    body = b"the bytes of an image"

    def do_HEAD(self) -> None:
        fault = dict(parse_qsl(urlsplit(self.path).query))["fault"]
        self._answer(len(self.body), b"", int(fault) if fault in ("403", "404") else 200)

    def do_GET(self) -> None:
        query = dict(parse_qsl(urlsplit(self.path).query))
        self.asked[self.path] += 1
        if self.asked[self.path] > int(query["times"]):
            self._answer(len(self.body), self.body)
        elif query["fault"].isdecimal():
            self._answer(0, b"", int(query["fault"]))
        elif query["fault"] == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif query["fault"] == "truncated":
            self._answer(len(self.body), self.body[:5])
            self.close_connection = True

    def _answer(self, length: int, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("segray.source.PAUSES_SECONDS", (0.01, 0.01, 0.01))
    monkeypatch.setattr("segray.retry.PAUSES_SECONDS", (0.01, 0.01, 0.01))
    handler = type("Handler", (Faulty,), {"asked": Counter()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("s3")
def test_an_object_that_is_left_to_s3fs_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.objects._buckets", lambda fs, names: {})
    fs, _ = filesystem("s3://segray")
    paths = [f"segray/source/once/{number}.jpg" for number in range(3)]
    fs.pipe({path: path.encode() for path in paths})
    asked: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def recorded(self: s3fs.S3FileSystem, method: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(method)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", recorded)
    rows = asked_for(*(f"s3://{path}" for path in paths))
    assert [row["data"] for row in rows] == [path.encode() for path in paths]
    assert asked == ["get_object"] * 3


def asked_for(*uris: str, size_bytes: int | None = None) -> list[dict[str, Any]]:
    entries = pa.table([uris, ["1"] * len(uris), [size_bytes] * len(uris)], schema=ENTRIES)
    return [row for table, _ in fetch(entries, done=NOTHING) for row in table.to_pylist()]


@pytest.mark.parametrize("fault", ["503", "reset", "truncated"])
def test_faults_that_pass_cost_nothing(faulty: str, fault: str) -> None:
    found = asked_for(f"{faulty}/a.jpg?fault={fault}&times=2", f"{faulty}/b.jpg?fault=503&times=0")
    assert [(row["data"], row["reason"]) for row in found] == [(Faulty.body, None)] * 2


def test_missing_and_forbidden_images_are_rejects_and_cost_nothing_else(faulty: str, tmp_path: Path) -> None:
    uris = [f"{faulty}/{name}.jpg?fault={name}&times={times}" for name, times in (("403", 9), ("404", 9), ("503", 0))]
    table, _ = fetched(str(manifest(tmp_path, "txt", uris)))
    rows = {re.findall(r"(\d+)\.jpg", row["uri"])[0]: row for row in table.to_pylist()}
    assert [(rows[name]["stage"], rows[name]["reason"].partition(":")[0]) for name in ("403", "404")] == [
        ("fetch", "forbidden"),
        ("fetch", "missing"),
    ]
    assert rows["503"]["data"] == Faulty.body


@pytest.mark.parametrize("fault", ["503", "reset", "truncated"])
def test_a_store_that_stays_away_ends_the_run_and_makes_no_reject(faulty: str, fault: str) -> None:
    with pytest.raises(RunError, match=r"the source was tried 4 times in vain"):
        asked_for(f"{faulty}/a.jpg?fault={fault}&times=99")


def test_an_object_shorter_than_listed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.source.PAUSES_SECONDS", (0.5,))
    path = tmp_path / "a.jpg"
    path.write_bytes(b"half")
    threading.Timer(0.2, path.write_bytes, (b"half and half",)).start()
    [row] = asked_for(f"file://{path}", size_bytes=len(b"half and half"))
    assert row["data"] == b"half and half"


class Flaky:
    """A file that fails once, in the midst of its bytes."""

    failed = False

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if self._file.tell() > 2_000_000 and not Flaky.failed:
            Flaky.failed = True
            raise ConnectionResetError("in mid-shard")
        data: bytes = self._file.read(size)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Flaky":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


@pytest.mark.parametrize("mask_bytes", [0, 100_000, 170_000])
def test_a_shard_that_breaks_off_for_a_moment_is_read_on_without_a_member_twice(
    mask_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segray.source.PAUSES_SECONDS", (0.01,))
    Flaky.failed = False
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for index in range(40):
            # A sample cut in two must not pass for one: of a mask alone it would be the mask.
            for name, size in ((f"{index}.mask.png", mask_bytes), (f"{index}.jpg", 100_000)):
                member = tarfile.TarInfo(name)
                member.size = size
                if size:
                    tar.addfile(member, io.BytesIO(bytes([index]) * size))
    opened = LocalFileSystem.open
    monkeypatch.setattr(LocalFileSystem, "open", lambda self, path, *a, **k: Flaky(opened(self, path, *a, **k)))
    found = asked_for(f"file://{shard}")
    assert Flaky.failed
    assert [row["uri"].rpartition("#")[2] for row in found] == [f"{index}.jpg" for index in range(40)]
    assert [row["data"][0] for row in found] == list(range(40))


def test_an_object_that_stays_shorter_than_listed_is_a_reject_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segray.source.PAUSES_SECONDS", (0.01,))
    (tmp_path / "a.jpg").write_bytes(b"half")
    (tmp_path / "b.jpg").write_bytes(b"whole")
    found = asked_for(f"file://{tmp_path}/a.jpg", f"file://{tmp_path}/b.jpg", size_bytes=5)
    assert [row["data"] for row in found] == [None, b"whole"]
    assert found[0]["reason"].startswith("shorter than listed: ")


def test_a_shard_in_which_nothing_is_new_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.source._SIGN_SECONDS", 0.0)
    shard = tmp_path / "a.tar"
    shard.write_bytes(tar_of([(f"{index}.jpg", b"x") for index in range(35)]))
    entries = pa.table([[f"file://{shard}"], ["1"], [None]], schema=ENTRIES)
    ids = np.sort(np.array([image_id(f"file://{shard}#{index}.jpg", "1") for index in range(35)], "S32"))
    signs: list[int] = []
    [(table, num_present)] = fetch(entries, done=ids, alive=lambda: signs.append(1))
    assert (table.num_rows, num_present, len(signs)) == (0, 35, 35)
