from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from segray.classes import Classes
from segray.errors import SinkError
from segray.sink import OPTIONAL
from segray.store import LabelStore, image_name
from tests.label_store import Image, write_store

CLASSES = Classes(("soil", "crop"))


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("file:///a/photo.jpg", "photo"),
        ("s3://bucket/a#b/photo.v2.jpeg", "photo.v2"),
        ("file:///a/b#1.jpg", "b#1"),
        ("file:///a/shard-000000.tar#dir/0001.jpg", "0001"),
        ("file:///a/shard-000000.tar.gz#0001.jpg", "0001"),
        ("s3://b/x.parquet#12/0001.jpg", "0001"),
        ("s3://b/x.parquet#12", "12"),
        ("s3://b/scene.v2.tif#0,512,512,256", "scene.v2"),
        ("file:///a/found.json#S2A_1.v2", "S2A_1.v2"),
        ("file:///a/found.json#S2%2FA_1#0,512,512,256", "S2%2FA_1"),
        ("s3://b/found.GEOJSON#S2A_1", "S2A_1"),
        ("https://api/v1.0/search#S2A_1", "S2A_1"),
        ("https://api/v1.0/collections/s2/items/S2A_1", "S2A_1"),
        ("https://api/v1.0/collections/modis/items/MYD09A1.A2023001.h08", "MYD09A1.A2023001.h08"),
        ("https://host/items/a.tif", "a"),
        ("file:///a/item.json", "item"),
    ],
)
def test_names(uri: str, name: str) -> None:
    assert image_name(uri) == name


def images(*names: str) -> list[Image]:
    return [Image(uri=f"file:///p/{name}.jpg", label_map=np.zeros((2, 3), np.uint8)) for name in names]


def test_rows_come_in_the_order_of_parts_and_columns(tmp_path: Path) -> None:
    write_store(tmp_path, images(*"abcde"), CLASSES, per_part=2)
    store = LabelStore.open(str(tmp_path))
    batches = list(store.batches("label_maps", "a1b2c3d4", ["width", "uri"]))
    assert [batch.schema.names for batch in batches] == [["width", "uri"]] * 3
    assert [uri for batch in batches for uri in batch["uri"].to_pylist()] == [f"file:///p/{n}.jpg" for n in "abcde"]
    first = store.parts("label_maps", "a1b2c3d4")[:1]
    assert sum(batch.num_rows for batch in store.batches("label_maps", "a1b2c3d4", ["uri"], first)) == 2
    assert store.read("statistics", "a1b2c3d4", first[0], ["uri"]).num_rows == 2


def test_statistics_without_label_maps_are_not_there(tmp_path: Path) -> None:
    write_store(tmp_path, images(*"abcd"), CLASSES, per_part=2)
    store = LabelStore.open(str(tmp_path))
    orphan, kept = store.parts("statistics", "a1b2c3d4")
    (tmp_path / "label_maps" / "recipe=a1b2c3d4" / orphan).unlink()
    assert store.parts("statistics", "a1b2c3d4") == [kept]


def test_what_is_no_part_is_passed_over(tmp_path: Path) -> None:
    write_store(tmp_path, images("a"), CLASSES)
    folder = tmp_path / "label_maps" / "recipe=a1b2c3d4"
    (folder / ".part-half.parquet.tmp").write_bytes(b"half")
    (folder / "_SUCCESS").write_bytes(b"")
    assert len(LabelStore.open(str(tmp_path)).parts("label_maps", "a1b2c3d4")) == 1


def test_runs_come_newest_first(tmp_path: Path) -> None:
    for run_id in ("20261122T000000Z-bb", "20261123T000000Z-aa", "20261121T000000Z-cc"):
        write_store(tmp_path, [], CLASSES, run_id=run_id)
    runs = LabelStore.open(str(tmp_path)).runs()
    assert [run["run_id"] for run in runs] == ["20261123T000000Z-aa", "20261122T000000Z-bb", "20261121T000000Z-cc"]


def test_without_a_run_the_only_recipe_is_meant(tmp_path: Path) -> None:
    write_store(tmp_path, images("a"), CLASSES, recipe="one", run_id=None)
    assert LabelStore.open(str(tmp_path)).choose(None) == ("one", None)
    write_store(tmp_path, images("a"), CLASSES, recipe="two", run_id=None)
    with pytest.raises(SinkError, match="choose with --recipe among one, two"):
        LabelStore.open(str(tmp_path)).choose(None)


def test_damage_is_named(tmp_path: Path) -> None:
    write_store(tmp_path, images("a"), CLASSES)
    (part,) = (tmp_path / "label_maps" / "recipe=a1b2c3d4").iterdir()
    part.write_bytes(b"PAR1 no more")
    store = LabelStore.open(str(tmp_path))
    with pytest.raises(SinkError, match=r"part-.*\.parquet: cannot be read"):
        list(store.batches("label_maps", "a1b2c3d4", ["uri"]))
    (tmp_path / "runs" / "20261122T080301Z-1a2b3c4d.json").write_text("{")
    with pytest.raises(SinkError, match=r"4d\.json: cannot be read"):
        list(store.runs())


def test_columns_that_an_earlier_version_did_not_write_are_null(tmp_path: Path) -> None:
    write_store(tmp_path, images("a"), CLASSES)
    (part,) = (tmp_path / "label_maps" / "recipe=a1b2c3d4").iterdir()
    table = pq.read_table(part, partitioning=None)
    pq.write_table(table.drop_columns([*OPTIONAL & set(table.column_names)]), part)
    store = LabelStore.open(str(tmp_path))
    columns = ["scene", "uri", "col_off"]
    expected = [{"scene": None, "uri": images("a")[0].uri, "col_off": None}]
    assert store.read("label_maps", "a1b2c3d4", part.name, columns).to_pylist() == expected
    assert [row for batch in store.batches("label_maps", "a1b2c3d4", columns) for row in batch.to_pylist()] == expected
