"""Compaction: fewer parts, the same rows, none of them missing at any moment."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from segray.compact import Compact, compact
from segray.errors import Locked, RunError, SettingsError, SinkError
from segray.lock import hold
from segray.sink import LABEL_MAPS, OPTIONAL, STATISTICS, Sink
from tests.test_sink import CLASSES, rows

TABLES = ("label_maps", "statistics", "rejects")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Thirty nights, each of three images and a reject."""
    sink = Sink(str(tmp_path), "r1")
    for night in range(30):
        labelled, rejected = rows(*(f"{night}-{i}" for i in "abc")), rows(f"{night}-x", reject="empty: 0 bytes")
        [*_] = sink.write(pa.concat_tables([labelled, rejected]), CLASSES, f"night-{night}")
    sink.write_json("recipes/r1.json", {"classes": CLASSES.to_dict()})
    return tmp_path


def read(store: Path, table: str) -> pa.Table:
    """As any reader does that knows nothing of parts; twice the same row is twice in it."""
    columns = ["image_id", "run_id", *(["class_id"] if table == "statistics" else [])]
    found = pads.dataset(store / table, format="parquet", partitioning="hive").to_table(columns)
    return found.sort_by([(column, "ascending") for column in columns])


def parts(store: Path) -> dict[str, int]:
    return {table: len(list((store / table).glob("recipe=*/part-*.parquet"))) for table in TABLES}


def test_small_parts_become_one_and_its_rows_are_the_same(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {table: read(store, table) for table in TABLES}
    assert parts(store) == dict.fromkeys(TABLES, 30)
    compact(Compact(sink=str(store)))
    assert parts(store) == dict.fromkeys(TABLES, 1)
    assert {table: read(store, table) for table in TABLES} == before
    assert [line.split()[1::2] for line in capsys.readouterr().out.splitlines() if "r1" in line] == [
        ["r1", "label_maps", "30", "1"],
        ["r1", "rejects", "30", "1"],
    ]
    files = {path: path.stat().st_mtime_ns for table in TABLES for path in (store / table).rglob("*.parquet")}
    compact(Compact(sink=str(store)))
    assert {path: path.stat().st_mtime_ns for path in files} == files, "one part is not merged with itself"


def test_what_an_earlier_version_wrote_is_merged_with_windows_of_scenes(tmp_path: Path) -> None:
    sink = Sink(str(tmp_path), "r1")
    sink.write_json("recipes/r1.json", {"classes": CLASSES.to_dict()})
    [*_] = sink.write(rows("old-a", "old-b"), CLASSES, "old")
    told: dict[str, dict[str, Any]] = {
        "label_maps": {"scene": "s.tif", "col_off": 64, "transform_a": 10.0},
        "statistics": {"area_m2": 1.5},
    }
    for table in told:
        [part] = (tmp_path / table / "recipe=r1").iterdir()
        earlier = pq.read_table(part, partitioning=None)
        pq.write_table(earlier.drop_columns([*OPTIONAL & set(earlier.column_names)]), part)
    [*_] = sink.write(rows("new"), CLASSES, "new")
    for table, columns in told.items():
        [part] = [
            path
            for path in (tmp_path / table / "recipe=r1").iterdir()
            if "new" in pq.read_table(path, partitioning=None)["uri"].to_pylist()
        ]
        new = pq.read_table(part, partitioning=None)
        pq.write_table(pa.Table.from_pylist([row | columns for row in new.to_pylist()], new.schema), part)
    [*_] = sink.write(rows("old-a"), CLASSES, "twice")  # which is dropped, and so a part of the old ones rewritten
    compact(Compact(sink=str(tmp_path)))
    for table, columns in told.items():
        [part] = (tmp_path / table / "recipe=r1").iterdir()
        merged = pq.read_table(part, partitioning=None).to_pylist()
        assert {row["uri"] for row in merged} == {"old-a", "old-b", "new"}
        for row in merged:
            assert [row[name] for name in columns] == [
                value if row["uri"] == "new" else None for value in columns.values()
            ]


def test_parts_stay_within_their_bounds(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.sink._MERGED_ROWS", 20)
    compact(Compact(sink=str(store)))
    assert parts(store) == {"label_maps": 5, "statistics": 5, "rejects": 2}  # six of three rows, twenty of one


def test_at_no_moment_a_row_is_missing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.compact._NUM_THREADS", 1)
    whole = {table: read(store, table)["image_id"].unique().to_pylist() for table in ("label_maps", "rejects")}
    num_looks = 0

    def watched(method: Any) -> Any:
        def call(*arguments: Any) -> None:
            nonlocal num_looks
            method(*arguments)
            for table, image_ids in whole.items():
                assert read(store, table)["image_id"].unique().to_pylist() == image_ids
            assert set(whole["label_maps"]) == set(read(store, "statistics")["image_id"].to_pylist())
            num_looks += 1

        return call

    for name in ("_put", "_remove"):
        monkeypatch.setattr(Sink, name, watched(getattr(Sink, name)))
    compact(Compact(sink=str(store)))
    assert num_looks == 3 + 3 * 30


@pytest.mark.parametrize("num_removed", [0, 1, 17])
def test_what_is_cut_short_the_next_one_puts_in_order(
    num_removed: int, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {table: read(store, table) for table in TABLES}
    remove, left = Sink._remove, num_removed

    def fail(*arguments: Any) -> None:
        nonlocal left
        if left == 0:
            raise SinkError("the store is gone")
        left -= 1
        remove(*arguments)

    with monkeypatch.context() as broken, pytest.raises(RunError, match="broke off: the store is gone; no row is lost"):
        broken.setattr(Sink, "_remove", fail)
        compact(Compact(sink=str(store)))
    compact(Compact(sink=str(store)))
    assert {table: read(store, table) for table in TABLES} == before


def test_a_store_that_is_written_is_left_alone(store: Path) -> None:
    with (
        hold(LocalFileSystem(), str(store), "a-run", wait_seconds=0, say=print, lost=lambda: None),
        pytest.raises(Locked, match="run a-run on "),
    ):
        compact(Compact(sink=str(store)))
    assert parts(store)["label_maps"] == 30


def test_what_is_not_there_is_refused(store: Path, tmp_path: Path) -> None:
    job = Compact(sink=str(store))
    with pytest.raises(SinkError, match="there is no recipe r2"):
        compact(dataclasses.replace(job, recipe="r2"))
    with pytest.raises(SinkError, match="there is no label store"):
        compact(dataclasses.replace(job, sink=str(tmp_path / "nowhere")))
    with pytest.raises(SettingsError, match="--wait -1"):
        dataclasses.replace(job, wait=-1)


def test_what_tells_of_scenes_is_kept_beside_parts_of_an_earlier_version(tmp_path: Path) -> None:
    sink = Sink(str(tmp_path), "r1")
    sink.write_json("recipes/r1.json", {"classes": CLASSES.to_dict()})
    for night in range(3):
        place = {"scene": f"s{night}.tif", "col_off": night, "row_off": 7, "crs": "EPSG:32633"}
        place |= {f"transform_{letter}": float(night) for letter in "abcdef"}
        place |= dict.fromkeys(("west", "south", "east", "north"), night / 3)
        table = rows(f"s{night}.tif#{night},7,3,2")
        for name, value in place.items():
            table = table.append_column(LABEL_MAPS.field(name), pa.array([value], LABEL_MAPS.field(name).type))
        [*_] = sink.write(table.append_column("area_sum", pa.array([[4.5, 0.0, 2.5]])), CLASSES, f"night-{night}")
    [*_] = sink.write(rows("a"), CLASSES, "night-3")
    for table in ("label_maps", "statistics"):  # as an earlier version wrote it
        [path] = [
            path for path in (tmp_path / table).rglob("*.parquet") if "a" in pq.read_table(path)["uri"].to_pylist()
        ]
        old = pq.read_table(path, partitioning=None)
        pq.write_table(old.drop_columns([name for name in old.column_names if name in OPTIONAL]), path)

    def everything(table: str) -> pa.Table:
        schema = LABEL_MAPS if table == "label_maps" else STATISTICS
        found = pads.dataset(tmp_path / table, schema=schema, format="parquet").to_table()
        return found.sort_by([(column, "ascending") for column in ("uri", "class_id")[: 1 + (table == "statistics")]])

    before = {table: everything(table) for table in ("label_maps", "statistics")}
    compact(Compact(sink=str(tmp_path)))
    assert parts(tmp_path) == {"label_maps": 1, "statistics": 1, "rejects": 0}
    assert {table: everything(table) for table in before} == before
    assert before["label_maps"]["scene"].to_pylist() == [None, "s0.tif", "s1.tif", "s2.tif"]
    assert before["statistics"]["area_m2"].to_pylist() == [None, None, *[4.5, 2.5] * 3]
