"""The label store: parts that are whole or not there, and what they say is done."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from segray import sink
from segray.classes import Classes
from segray.errors import SinkError
from segray.sink import LABELLED, Sink
from segray.source import image_id
from tests.s3 import Server

CLASSES = Classes(("soil", "crop", "weed"))


def rows(*names: str, reject: str | None = None, png: bytes = b"png") -> pa.Table:
    """Images of 2×3 pixels: four of soil and two of weed."""
    labelled: dict[str, Any] = {
        "label_map": png,
        "num_pixels": [4, 0, 2],
        "confidence_sum": [2.0, 0.0, 1.5],
        "stage": None,
        "reason": None,
    }
    rejected = dict.fromkeys(labelled) | {"stage": "decode", "reason": reject}
    identities = [{"image_id": image_id(n, "1"), "uri": n, "version": "1", "height": 2, "width": 3} for n in names]
    return pa.Table.from_pylist([i | (rejected if reject else labelled) for i in identities], schema=LABELLED)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["local", "s3"])
def test_what_is_written_is_done(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if where == "s3":
        request.getfixturevalue("s3")
    uri = str(tmp_path) if where == "local" else "s3://segray/sink-test"
    store = Sink(uri, "r1")
    assert len(store.done()) == 0
    [*_] = store.write(pa.concat_tables([rows("a", "b"), rows("c", reject="empty: 0 bytes")]), CLASSES, "run")
    assert store.done().tolist() == sorted(image_id(name, "1").encode() for name in "abc")
    assert len(Sink(uri, "r2").done()) == 0


def test_a_note_of_a_shard_tells_whether_all_is_done_and_a_damaged_one_tells_nothing(tmp_path: Path) -> None:
    store, ids = Sink(str(tmp_path), "r1"), [image_id(name, "1") for name in "ab"]
    store.write_shard("0" * 32, ids)
    done = np.sort(np.array(ids, "S32"))
    assert store.shards() == {"0" * 32}
    assert (store.num_done("0" * 32, done), store.num_done("0" * 32, done[:1])) == (2, None)
    (tmp_path / f"shards/{'0' * 32}.parquet").write_bytes(b"no Parquet")
    assert store.num_done("0" * 32, done) is None


def test_rows_and_receipt_say_what_was_written(tmp_path: Path) -> None:
    table = pa.concat_tables([rows("a", "b"), rows("c", reject="empty: 0 bytes")])
    [receipt] = Sink(str(tmp_path), "r1").write(table, CLASSES, "run")
    assert (receipt.num_labelled, dict(receipt.rejects)) == (2, {("decode", "empty"): 1})
    assert receipt.num_pixels.tolist() == [8, 0, 4]
    assert receipt.num_images.tolist() == [2, 0, 2]
    assert receipt.confidence_sum.tolist() == [4.0, 0.0, 3.0]

    statistics = pq.read_table(tmp_path / "statistics").to_pylist()
    assert [(s["uri"], s["class_id"], s["class_name"], s["num_pixels"]) for s in statistics] == [
        ("a", 0, "soil", 4),
        ("a", 2, "weed", 2),
        ("b", 0, "soil", 4),
        ("b", 2, "weed", 2),
    ]
    assert [s["fraction"] for s in statistics[:2]] == [4 / 6, 2 / 6]
    assert [s["mean_confidence"] for s in statistics[:2]] == [0.5, 0.75]
    [reject] = pq.read_table(tmp_path / "rejects").to_pylist()
    assert (reject["uri"], reject["stage"], reject["reason"], reject["run_id"]) == (
        "c",
        "decode",
        "empty: 0 bytes",
        "run",
    )


def test_columns_are_flat_and_compressed_with_zstd(tmp_path: Path) -> None:
    [*_] = Sink(str(tmp_path), "r1").write(rows("a"), CLASSES, "run")
    for kind, schema in (("label_maps", sink.LABEL_MAPS), ("statistics", sink.STATISTICS)):
        [part] = (tmp_path / kind / "recipe=r1").iterdir()
        metadata = pq.read_metadata(part)
        assert pq.read_schema(part).equals(schema)
        assert metadata.num_columns == len(schema), "a column is nested"
        assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_part_written_twice_is_written_once(tmp_path: Path) -> None:
    store = Sink(str(tmp_path), "r1")
    [first] = store.write(rows("a", "b"), CLASSES, "run")
    before = files(tmp_path)
    [again] = store.write(rows("b", "a"), CLASSES, "run")
    assert files(tmp_path) == before
    assert again.key == first.key


def test_a_part_ends_at_its_limit_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "_PART_BYTES", 100)
    receipts = list(Sink(str(tmp_path), "r1").write(rows(*"abcde", png=bytes(40)), CLASSES, "run"))
    assert [receipt.num_labelled for receipt in receipts] == [2, 2, 1]
    parts = list((tmp_path / "label_maps/recipe=r1").iterdir())
    assert sorted(pq.read_metadata(part).num_rows for part in parts) == [1, 2, 2]


def test_a_write_that_fails_leaves_neither_part_nor_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    store = Sink(str(tmp_path), "r1")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        list(store.write(rows("a"), CLASSES, "run"))
    assert files(tmp_path) == set()


def test_a_torn_part_is_named(tmp_path: Path) -> None:
    store = Sink(str(tmp_path), "r1")
    [*_] = store.write(rows("a"), CLASSES, "run")
    [part] = (tmp_path / "label_maps/recipe=r1").iterdir()
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(SinkError, match=part.name):
        store.done()


def test_a_sink_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SinkError, match="cannot be written"):
        Sink(str(tmp_path / "file"), "r1").start({})


def test_done_is_sorted_for_many_parts(tmp_path: Path) -> None:
    store = Sink(str(tmp_path), "r1")
    for name in "zyxwv":
        [*_] = store.write(rows(name), CLASSES, "run")
    done = store.done()
    assert done.dtype == np.dtype("S32")
    assert done.tolist() == sorted(done.tolist())
    assert len(done) == 5


def test_documents_are_replaced_whole(tmp_path: Path, s3: Server) -> None:
    for uri in (str(tmp_path), "s3://segray/documents"):
        store = Sink(uri, "r1")
        store.start({"recipe": "r1", "try": 1})
        store.start({"recipe": "r1", "try": 2})
        fs = store.filesystem
        assert b'"try": 2' in fs.cat_file(f"{store.root}/recipes/r1.json")


def stored(store: Sink, kind: str) -> list[tuple[str, str]]:
    """(image_id, run_id) of each row that a reader finds."""
    paths = [path for path in store.filesystem.find(f"{store.root}/{kind}") if path.endswith(".parquet")]
    tables = [pq.read_table(path, filesystem=store.filesystem) for path in paths]
    found = [(row["image_id"], row["run_id"]) for table in tables for row in table.to_pylist()]
    return sorted(set(found) if kind == "statistics" else found)


NAMES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5, unique=True)


@settings(deadline=None, max_examples=100)
@example([(["a", "b"], False), (["a", "e", "b", "g"], False), (["g", "e"], False)])  # what is left of one is another
@given(st.lists(st.tuples(NAMES, st.booleans()), max_size=5))
def test_whatever_came_twice_keeps_one_row_and_labels_outweigh_rejects(writes: list[tuple[list[str], bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Sink(folder, "r1")
        for names, is_reject in writes:
            [*_] = store.write(rows(*names, reject="empty: 0 bytes" if is_reject else None), CLASSES, "run")
        every = {name for names, _ in writes for name in names}
        labelled = {name for names, is_reject in writes for name in names if not is_reject}

        done = store.done()

        assert done.tolist() == sorted(image_id(name, "1").encode() for name in every)
        assert stored(store, "label_maps") == sorted((image_id(name, "1"), "run") for name in labelled)
        assert stored(store, "statistics") == stored(store, "label_maps")
        assert stored(store, "rejects") == sorted((image_id(name, "1"), "run") for name in every - labelled)
        assert store.done(with_rejects=False).tolist() == sorted(image_id(name, "1").encode() for name in labelled)
        for kind in ("label_maps", "rejects"):
            for part in store.parts():
                if part.startswith(kind):
                    ids = pq.read_table(f"{folder}/{kind}/recipe=r1/{part.partition('/')[2]}")["image_id"].to_pylist()
                    digest = hashlib.blake2b("".join(sorted(ids)).encode(), digest_size=16).hexdigest()
                    assert part == f"{kind}/part-{digest}.parquet"


def test_an_image_that_is_twice_in_one_part_keeps_one_row(tmp_path: Path) -> None:
    store = Sink(str(tmp_path), "r1")
    [*_] = store.write(rows("a", "b", "a"), CLASSES, "run")
    store.done()
    assert stored(store, "label_maps") == sorted((image_id(name, "1"), "run") for name in "ab")


def test_of_two_rejects_the_newer_stays(tmp_path: Path) -> None:
    store = Sink(str(tmp_path), "r1")
    [*_] = store.write(rows("a", "b", reject="empty: 0 bytes"), CLASSES, "old")
    for part in (tmp_path / "rejects/recipe=r1").iterdir():
        os.utime(part, (1, 1))
    [*_] = store.write(rows("b", reject="corrupt: now"), CLASSES, "new")
    store.done()
    assert stored(store, "rejects") == sorted([(image_id("a", "1"), "old"), (image_id("b", "1"), "new")])


def test_a_dry_look_removes_nothing(tmp_path: Path) -> None:
    store = Sink(str(tmp_path), "r1")
    for names in ("ab", "bc"):
        [*_] = store.write(rows(*names), CLASSES, "run")
    before = files(tmp_path)
    assert len(store.done(repair=False)) == 3
    assert files(tmp_path) == before


def test_temporary_files_of_a_killed_run_are_removed_and_no_others(tmp_path: Path) -> None:
    store = Sink(str(tmp_path), "r1")
    [*_] = store.write(rows("a"), CLASSES, "run")
    folder = tmp_path / "label_maps/recipe=r1"
    [part] = folder.iterdir()
    (folder / f".{part.name}.x1y2_z3.tmp").write_bytes(b"torn")
    (folder / ".notes.tmp").write_text("of a person")
    (folder / "part-of-a-film.tmp").write_text("of a person")
    store.done()
    assert {path.name for path in folder.iterdir()} == {part.name, ".notes.tmp", "part-of-a-film.tmp"}


def test_label_maps_that_lost_their_twin_are_removed_and_no_sound_row_for_them(tmp_path: Path) -> None:
    store = Sink(str(tmp_path), "r1")
    [*_] = store.write(rows("a", "b", "d"), CLASSES, "late")
    [statistics] = (tmp_path / "statistics/recipe=r1").iterdir()
    statistics.unlink()
    [*_] = store.write(rows("a"), CLASSES, "good")
    [*_] = store.write(rows("b", "c"), CLASSES, "good")
    assert store.done(repair=False).tolist() == sorted(image_id(name, "1").encode() for name in "abc")
    store.done()
    assert stored(store, "label_maps") == sorted((image_id(name, "1"), "good") for name in "abc")
    assert stored(store, "statistics") == stored(store, "label_maps")


def images(*uris: str, version: str = "1", reject: str | None = None) -> pa.Table:
    """Rows of these URIs, each with the image_id of URI and version."""
    table = rows(*uris, reject=reject)
    ids = [image_id(uri, version) for uri in uris]
    table = table.set_column(0, "image_id", pa.array(ids, pa.string()))
    return table.set_column(2, "version", pa.repeat(version, len(uris)))


def rejects_in(folder: Path) -> list[dict[str, Any]]:
    paths = (folder / "rejects/recipe=r1").iterdir()
    return [row for path in paths for row in pq.read_table(path, partitioning=None).to_pylist()]


def test_rejects_that_a_later_run_put_right_under_other_ids_go_and_no_others(tmp_path: Path) -> None:
    store = Sink(str(tmp_path), "r1")
    why = "forbidden: 403"
    for run_id, table in [
        ("1", images("gone.jpg")),
        ("2", images("found.jpg", "gone.jpg", "never.jpg", "found.tar", version="", reject=why)),
        ("2", images("open.tar", "shut.tar", "half.tar", reject=why)),
        ("2", images("half.tar#1.jpg")),
        ("2", images("bad.jpg", reject=why)),
        ("3", images("found.jpg", "found.tar#1.jpg", "open.tar#1.jpg")),
        ("3", images("shut.tar#1.jpg", version="2")),
    ]:
        [*_] = store.write(table, CLASSES, run_id)
    store.drop_superseded()
    left = sorted(row["uri"] for row in rejects_in(tmp_path))
    assert left == ["bad.jpg", "gone.jpg", "half.tar", "never.jpg", "shut.tar"]


@pytest.mark.parametrize(
    "uri",
    [
        "file:///x/a.img",
        "file:///x/items.json#S2A_1",
        "https://h/a.tif?sig=1",
        "https://h/items/S2A_1.SAFE",
        "s3://b/LC08_{band}",
        "s3://b/a.tar",
    ],
)
def test_a_reject_of_what_holds_many_goes_when_a_part_of_it_is_labelled(uri: str, tmp_path: Path) -> None:
    store = Sink(str(tmp_path), "r1")
    [*_] = store.write(images(uri, "other.img#1", reject="truncated"), CLASSES, "1")
    [*_] = store.write(images(f"{uri}#0,0,64,64"), CLASSES, "2")
    store.drop_superseded()
    assert [row["uri"] for row in rejects_in(tmp_path)] == ["other.img#1"]
    entries = pa.table({"uri": [uri], "version": ["2"]})
    assert store.num_changed(entries) == 1
