"""Stores that are whole and stores that are broken in each way, as `verify` sees them."""

import io
import json
import os
import re
import signal
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from affine import Affine
from fsspec.implementations.local import LocalFileSystem

from segray.classes import Classes
from segray.cli import main
from segray.cut import areas_by_class
from segray.errors import Locked, RunError, SettingsError, SinkError, SourceError
from segray.labelmap import encode_png
from segray.lock import hold
from segray.sink import LABEL_MAPS, LABELLED, OPTIONAL, REJECTS, STATISTICS, Sink, part_name
from segray.source import Source, fetch, image_id
from segray.store import LabelStore
from segray.verify import Verify, _count, verify
from tests.rasters import write_raster
from tests.s3 import Server

pytestmark = pytest.mark.usefixtures("ray_cluster")

CLASSES = Classes(("soil", "crop", "weed"))
RUN = {"run_id": "x", "recipe": "r1", "status": "finished"}


def rows(*images: tuple[str, str], reject: str | None = None) -> pa.Table:
    """A row for each (uri, version): label maps of 4×6 pixels, 9 of soil, 8 of crop and 7 of weed, or rejects."""
    label_map = np.repeat(np.arange(3, dtype=np.uint8), [9, 8, 7]).reshape(4, 6)
    of_image: dict[str, Any] = {"stage": "decode", "reason": reject}
    if reject is None:
        of_image = {
            **{"height": 4, "width": 6, "label_map": encode_png(label_map, CLASSES.palette)},
            **{"num_pixels": [9, 8, 7], "confidence_sum": [4.5, 8.0, 0.7]},
        }
    identities = [{"image_id": image_id(uri, v), "uri": uri, "version": v} for uri, v in images]
    return pa.Table.from_pylist([identity | of_image for identity in identities], schema=LABELLED)


def write(sink: str, *tables: pa.Table, recipe: str = "r1", **more: Any) -> None:
    store = Sink(sink, recipe)
    store.start({"recipe": recipe, "classes": CLASSES.to_dict(), **more})
    for table in tables:
        [*_] = store.write(table, CLASSES, "x")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two parts of label maps (a, b, c and d, e), one of rejects (f), and the record of their run."""
    sink = str(tmp_path / "labels")
    abc, de = rows(("a", "1"), ("b", "1"), ("c", "1")), rows(("d", "1"), ("e", "1"))
    write(sink, abc, de, rows(("f", "1"), reject="empty: 0 bytes"))
    counts = {"seen": 7, "labelled": 5, "rejected": 1, "present": 1}
    Sink(sink, "r1").write_json("runs/x.json", RUN | {"counts": counts})
    return tmp_path / "labels"


def files(store: Path) -> set[str]:
    found = {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}
    return {path for path in found if not path.startswith("lock/")}


def part(store: Path, kind: str, *names: str) -> Path:
    """The part that holds these images."""
    return store / kind / "recipe=r1" / part_name(rows(*((name, "1") for name in names)))


def tamper(path: Path, column: str, value: Any, schema: pa.Schema, row: int = 1) -> None:
    """Changes one value; the part stays well formed."""
    table = pq.read_table(path, partitioning=None).to_pylist()
    table[row][column] = value(table[row][column]) if callable(value) else value
    pq.write_table(pa.Table.from_pylist(table, schema), path)


def fails(capsys: pytest.CaptureFixture[str], sink: object, num_problems: int, **options: Any) -> tuple[str, str]:
    """What is printed of a store that is not whole, and the error."""
    capsys.readouterr()
    with pytest.raises(RunError) as error:
        verify(Verify(sink=str(sink), **options))
    assert f": {num_problems} problem{'s' * (num_problems > 1)}; " in str(error.value)
    return capsys.readouterr().out, str(error.value)


def test_a_store_that_is_whole_passes_and_says_what_was_checked(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(store)
    verify(Verify(sink=str(store), repair=True))
    told = dict(re.findall(r"│ ([\w ]+?) +│ +(\d+) │", capsys.readouterr().out))
    assert told == {
        **{"recipes": "1", "runs": "1", "parts": "5", "label maps": "5", "pixels": "120", "rejects": "1"},
        **{"problems": "0", "files moved to quarantine": "0"},
    }
    assert files(store) == before


def test_what_an_earlier_version_wrote_passes(store: Path) -> None:
    for kind in ("label_maps", "statistics"):
        path = part(store, kind, "d", "e")
        table = pq.read_table(path, partitioning=None)
        pq.write_table(table.drop_columns([*OPTIONAL & set(table.column_names)]), path)
    verify(Verify(sink=str(store)))


GRID = (10.0, 0.0, 500_120.0, 0.0, -10.0, 5_399_920.0)


def window() -> pa.Table:
    """A window of 4×6 pixels, 4 of each class and 12 without data."""
    label_map = np.repeat(np.array([0, 1, 2, 255], np.uint8), [4, 4, 4, 12]).reshape(4, 6)
    [row] = rows(("scene.tif#12,8,6,4", "1")).to_pylist()
    row |= {"label_map": encode_png(label_map, CLASSES.palette), "num_pixels": [4, 4, 4], "confidence_sum": [2.0] * 3}
    row |= {"scene": "scene.tif", "col_off": 12, "row_off": 8, "crs": "EPSG:32633"}
    row |= dict(zip([f"transform_{letter}" for letter in "abcdef"], GRID, strict=True))
    row["area_sum"] = areas_by_class(label_map, "EPSG:32633", GRID, 3).tolist()
    of_scenes = [field for field in LABEL_MAPS if field.name in row and field.name not in LABELLED.names]
    schema = pa.schema([*LABELLED, *of_scenes, pa.field("area_sum", pa.list_(pa.float64()))])
    return pa.Table.from_pylist([row], schema)


def test_a_window_of_a_scene_may_hold_no_data_and_a_plain_image_may_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(str(tmp_path / "labels"), window())
    verify(Verify(sink=str(tmp_path / "labels")))
    tamper(next((tmp_path / "labels/label_maps/recipe=r1").iterdir()), "scene", None, LABEL_MAPS, 0)
    out, _ = fails(capsys, tmp_path / "labels", 1)
    assert "the label map holds the id 255, and there are 3 classes" in out


@pytest.mark.parametrize(
    ("kind", "column", "value", "message"),
    [
        ("label_maps", "col_off", 18, "its columns say that it is scene.tif#18,8,6,4"),
        ("label_maps", "scene", "other.tif", "its columns say that it is other.tif#12,8,6,4"),
        ("label_maps", "transform_a", 20.0, "the area_m2 of class 0 is 400.*, by its place 800"),
        ("label_maps", "crs", "EPSG:4326", "the area_m2 of class 0 is 400.*, by its place"),
        ("label_maps", "crs", "nowhere", "its columns tell no place on Earth: .*nowhere"),
        ("label_maps", "transform_f", None, "its columns tell no place on Earth"),
        ("statistics", "area_m2", 399.0, r"the area_m2 of class 0 is 399.0, by its place 400"),
        ("statistics", "area_m2", None, "the area_m2 of class 0 is None, by its place 400"),
    ],
)
def test_a_window_lies_where_it_says(
    kind: str, column: str, value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(str(tmp_path / "labels"), window())
    schema = LABEL_MAPS if kind == "label_maps" else STATISTICS
    tamper(next((tmp_path / f"labels/{kind}/recipe=r1").iterdir()), column, value, schema, 0)
    out, _ = fails(capsys, tmp_path / "labels", 1)
    assert re.search(rf"scene.tif#12,8,6,4: {message}", out)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def png(label_map: Sequence[Sequence[int]]) -> bytes:
    return encode_png(np.array(label_map, np.uint8), CLASSES.palette)


def beyond(store: Path) -> None:
    ids = np.zeros((4, 6), np.uint8)
    ids[1, 2] = 3
    tamper(part(store, "label_maps", "d", "e"), "label_map", encode_png(ids, CLASSES.palette), LABEL_MAPS)


def in_two_parts(store: Path) -> None:
    write(str(store), rows(("d", "1"), ("g", "1")))


def labelled_and_rejected(store: Path) -> None:
    write(str(store), rows(("a", "1"), reject="empty: 0 bytes"))


def without_a_column(store: Path) -> None:
    path = part(store, "statistics", "d", "e")
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns("fraction"), path)


def twice_in_one_part(store: Path) -> None:
    write(str(store), rows(("g", "1"), ("g", "1")))


def renamed(store: Path) -> None:
    for kind in ("label_maps", "statistics"):
        path = part(store, kind, "d", "e")
        path.rename(path.with_name("part-0.parquet"))


DE = part_name(rows(("d", "1"), ("e", "1")))
DG = part_name(rows(("d", "1"), ("g", "1")))  # by name before the other


@pytest.mark.parametrize(
    ("damage", "messages", "moved"),
    [
        (
            lambda store: truncate(part(store, "label_maps", "d", "e")),
            [f"label_maps/recipe=r1/{DE}: cannot be read: ArrowInvalid"],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: truncate(part(store, "statistics", "d", "e")),
            [f"statistics/recipe=r1/{DE}: cannot be read: ArrowInvalid"],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: truncate(next((store / "rejects/recipe=r1").iterdir())),
            [r"rejects/recipe=r1/part-\w+.parquet: cannot be read: ArrowInvalid"],
            ["rejects"],
        ),
        (
            without_a_column,
            [f"statistics/recipe=r1/{DE}: not the columns of statistics: fraction"],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: part(store, "statistics", "d", "e").unlink(),
            [f"label_maps/recipe=r1/{DE}: there is no statistics part of its name"],
            ["label_maps"],
        ),
        (
            lambda store: part(store, "label_maps", "d", "e").unlink(),
            [f"statistics/recipe=r1/{DE}: an orphan, there is no label_maps part of its name"],
            ["statistics"],
        ),
        (
            lambda store: tamper(part(store, "statistics", "d", "e"), "num_pixels", 10, STATISTICS),
            [
                rf"label_maps/recipe=r1/{DE}: d: the statistics say \(1, 'crop', 10, 0.33+\), "
                r"the label map \(1, 'crop', 8, 0.33+\)"
            ],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: tamper(part(store, "statistics", "d", "e"), "fraction", 0.5, STATISTICS),
            ["d: the statistics say .1, 'crop', 8, 0.5., the label map .1, 'crop', 8, 0.33"],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: tamper(part(store, "statistics", "d", "e"), "mean_confidence", 1.5, STATISTICS),
            [r"d: the mean_confidence of class 1 is 1.5, not in \(0, 1\]"],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: tamper(part(store, "statistics", "d", "e"), "mean_confidence", float("nan"), STATISTICS),
            ["d: the mean_confidence of class 1 is nan"],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: tamper(part(store, "statistics", "d", "e"), "uri", "z", STATISTICS),
            [
                "d: the statistics say no more, the label map .1, 'crop', 8, 0.33",
                f"statistics/recipe=r1/{DE}: z: statistics without a label map",
            ],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: tamper(part(store, "label_maps", "d", "e"), "label_map", png([[0] * 4] * 6), LABEL_MAPS),
            [r"e: the label map has 6×4 pixels \(height×width\), its row says 4×6"],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: tamper(part(store, "label_maps", "d", "e"), "label_map", png([[0] * 6] * 4), LABEL_MAPS),
            [r"e: the statistics say \(0, 'soil', 9, 0.375\), the label map \(0, 'soil', 24, 1.0\)"],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: tamper(part(store, "label_maps", "d", "e"), "label_map", lambda p: p[:-30], LABEL_MAPS),
            ["e: the label map cannot be decoded: "],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: tamper(part(store, "label_maps", "d", "e"), "confidence", b"no PNG", LABEL_MAPS),
            ["e: the confidence cannot be decoded: "],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: tamper(part(store, "label_maps", "d", "e"), "confidence", png([[0] * 6] * 4), LABEL_MAPS),
            ["e: the confidence is not that of the pixels that have a class"],
            ["label_maps", "statistics"],
        ),
        (beyond, ["e: the label map holds the id 3, and there are 3 classes"], ["label_maps", "statistics"]),
        (
            lambda store: tamper(part(store, "label_maps", "d", "e"), "version", "2", LABEL_MAPS),
            ["e: its image_id is not the digest of its uri and version"],
            ["label_maps", "statistics"],
        ),
        (
            lambda store: tamper(next((store / "rejects/recipe=r1").iterdir()), "uri", "z", REJECTS, row=0),
            ["z: its image_id is not the digest of its uri and version"],
            ["rejects"],
        ),
        (
            renamed,
            [f"part-0.parquet: the name is not the digest of its image_ids, which is {DE}"],
            ["label_maps", "statistics"],
        ),
        (
            in_two_parts,
            [f"{DE}: 1 of its image_ids are in other parts, such as {image_id('d', '1')} in label_maps/recipe=r1/{DG}"],
            ["label_maps", "statistics"],
        ),
        (
            labelled_and_rejected,
            [rf"rejects/recipe=r1/part-\w+.parquet: 1 of its image_ids .* as {image_id('a', '1')} in label_maps/"],
            ["rejects"],
        ),
        (
            twice_in_one_part,
            [f"2 rows have the image_id {image_id('g', '1')}", "g: the statistics say .*", "g: the statistics say .*"],
            ["label_maps", "statistics"],
        ),
    ],
)
def test_what_is_broken_is_named_and_repaired(
    damage: Callable[[Path], None],
    messages: list[str],
    moved: list[str],
    store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(store)
    before = files(store)
    printed, error = fails(capsys, store, len(messages))
    lines = printed.partition("┏")[0].splitlines()
    for line, message in zip(lines, messages, strict=True):
        assert re.match(r"(label_maps|statistics|rejects)/recipe=r1/part-\w+\.parquet: ", line)
        assert re.search(message, line)
    assert "--repair" in error
    assert files(store) == before, "without --repair nothing moves"

    _, error = fails(capsys, store, len(messages), repair=True)
    assert "label again" in error
    after = files(store)
    quarantined = {path for path in after if path.startswith("quarantine/")}
    assert sorted(path.split("/")[1] for path in quarantined) == moved
    assert after - quarantined == before - {path.removeprefix("quarantine/") for path in quarantined}
    verify(Verify(sink=str(store)))


@pytest.mark.parametrize(("broken", "num_problems", "moved"), [(None, 1, ["eg"]), ("gh", 3, ["de", "gh"])])
def test_of_parts_that_share_images_the_first_sound_one_is_kept(
    broken: str | None, num_problems: int, moved: list[str], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {names: part(store, "label_maps", *names) for names in ("gh", "eg", "de")}
    assert [*paths] == sorted(paths, key=lambda names: paths[names]), "so their names order them"
    write(str(store), rows(("e", "1"), ("g", "1")), rows(("g", "1"), ("h", "1")))
    if broken:
        tamper(part(store, "statistics", *broken), "num_pixels", 10, STATISTICS)
    fails(capsys, store, num_problems, repair=True)
    assert sorted(names for names, path in paths.items() if not path.exists()) == moved
    verify(Verify(sink=str(store)))


def test_what_the_store_does_not_give_is_named_and_stays(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = part(store, "label_maps", "d", "e")
    path.unlink()
    path.mkdir()
    printed, error = fails(capsys, store, 1, repair=True)
    assert f"{DE}: the store does not give it: IsADirectoryError" in printed
    assert "no part is broken" in error
    assert path.is_dir()


def test_only_what_the_store_wrote_is_moved(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strangers = [store / "label_maps/recipe=r1/notes.parquet", store / "statistics/recipe=r1/part-1.csv"]
    for path in strangers:
        path.write_bytes(b"mine")
    truncate(part(store, "label_maps", "d", "e"))
    fails(capsys, store, 1, repair=True)
    assert all(path.exists() for path in strangers)
    verify(Verify(sink=str(store)))


def test_many_problems_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uris = [str(index) for index in range(60)]
    table = rows(*((uri, "1") for uri in uris))
    heights = table.schema.get_field_index("height")
    write(str(tmp_path), table.set_column(heights, "height", pa.array([5] * 60, pa.int32())))
    printed, _ = fails(capsys, tmp_path, 60)
    assert printed.count("its row says 5×6") == 50
    assert "… 60 problems in all" in printed


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            RUN | {"counts": {"seen": 9, "labelled": 5, "rejected": 1, "present": 1}},
            "runs/y.json: seen 9 is not labelled 5 + rejected 1 + present 1",
        ),
        (RUN, "runs/y.json: not the record of a run: KeyError: 'counts'"),
        ([], "runs/y.json: not the record of a run: TypeError"),
        (None, "runs/y.json: cannot be read: Expecting property name"),
    ],
)
def test_records_of_runs_are_checked(
    record: Any, message: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "runs/y.json").write_text("{" if record is None else json.dumps(record))
    printed, error = fails(capsys, store, 1, repair=True)
    assert message in printed
    assert "no part is broken" in error
    assert (store / "runs/y.json").exists()


def test_a_run_that_did_not_finish_need_not_add_up(store: Path) -> None:
    counts = {"seen": 9, "labelled": 5, "rejected": 1, "present": 1}
    (store / "runs/y.json").write_text(json.dumps(RUN | {"status": "interrupted", "counts": counts}))
    verify(Verify(sink=str(store)))


def test_every_recipe_is_verified_unless_one_is_named(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(str(store), rows(("a", "1")), recipe="r2")  # the same image in another recipe is no duplicate
    verify(Verify(sink=str(store)))
    [path] = (store / "statistics/recipe=r2").iterdir()
    truncate(path)
    printed, _ = fails(capsys, store, 1)
    assert f"statistics/recipe=r2/{path.name}: cannot be read" in printed
    verify(Verify(sink=str(store), recipe="r1"))
    with pytest.raises(SinkError, match="no recipe r3; --recipe can be r1, r2"):
        verify(Verify(sink=str(store), recipe="r3"))
    (store / "recipes/r2.json").unlink()
    printed, _ = fails(capsys, store, 1)
    assert "recipes/r2.json does not tell the classes" in printed


def test_an_empty_store_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "label_maps").mkdir()
    with pytest.raises(SinkError, match="the label store is empty"):
        verify(Verify(sink=str(tmp_path)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four loose images and a shard of three; none of them is ever decoded."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.jpg").write_bytes(b"photo")
    add_shard(folder, 3)
    return folder


def add_shard(folder: Path, num_members: int) -> None:
    with tarfile.open(folder / "shard-000000.tar", "w") as shard:
        for index in range(num_members):
            member = tarfile.TarInfo(f"{index:04d}.jpg")
            member.size = 5
            shard.addfile(member, io.BytesIO(b"photo"))


def label(source: Path, sink: Path) -> None:
    """Labels all that is there: the first image of each page is a reject."""
    for page in Source(str(source)).entries():
        for fetched, _ in fetch(page, done=np.array([], "S32")):
            images = list(zip(fetched["uri"].to_pylist(), fetched["version"].to_pylist(), strict=True))
            write(str(sink), rows(*images[1:]), rows(*images[:1], reject="empty: 0 bytes"))


def test_every_image_of_the_source_is_labelled_or_rejected(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = tmp_path / "labels"
    label(source, sink)
    manifest = tmp_path / "photos.txt"
    manifest.write_text("".join(f"photos/{index}.jpg\n" for index in range(4)))
    for given, count in ((source, 7), (manifest, 4)):
        verify(Verify(sink=str(sink), source=str(given)))
        assert re.search(rf"images of SOURCE +│ +{count} │", capsys.readouterr().out)

    (source / "more").mkdir()
    for index in range(25):
        (source / f"more/{index}.jpg").write_bytes(b"photo")
    add_shard(source, 4)  # other bytes, so another version: all four are new
    manifest.write_text("photos/0.jpg\nphotos/more/7.jpg\nphotos/nowhere.jpg\n")
    printed, error = fails(capsys, sink, 29, source=str(source))
    assert len(re.findall(r"^file://.*/photos/more/\d+\.jpg: neither labelled nor rejected", printed, re.M)) == 25
    assert "no part is broken; label the same source again" in error

    for path in (source / "more").iterdir():
        path.unlink()
    printed, _ = fails(capsys, sink, 4, source=str(source))
    assert re.findall(r"tar#(\d+)\.jpg: neither", printed) == ["0000", "0001", "0002", "0003"]

    printed, _ = fails(capsys, sink, 2, source=str(manifest))
    assert re.search(r"nowhere\.jpg \(missing: .*\): neither labelled nor rejected \(recipe r1\)", printed)
    assert re.search(r"/more/7\.jpg \(missing", printed), "it was removed again"


def test_a_repair_with_its_source_forgets_what_shards_hold_where_images_are_missing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = tmp_path / "labels"
    label(source, sink)
    Sink(str(sink), "r1").write_shard("0" * 32, [image_id("a", "1")])
    verify(Verify(sink=str(sink), source=str(source), repair=True))
    assert list((sink / "shards").iterdir())
    add_shard(source, 4)
    fails(capsys, sink, 4, source=str(source))
    assert list((sink / "shards").iterdir())
    fails(capsys, sink, 4, source=str(source), repair=True)
    assert not list((sink / "shards").iterdir())


def test_a_store_that_is_written_is_not_repaired(store: Path) -> None:
    with hold(LocalFileSystem(), str(store), "a-run", wait_seconds=0, say=print, lost=lambda: None):
        verify(Verify(sink=str(store)))
        with pytest.raises(Locked, match="run a-run on "):
            verify(Verify(sink=str(store), repair=True))


def test_a_source_without_images_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(SourceError, match="holds no images and no shards"):
        verify(Verify(sink=str(store), source=str(tmp_path / "notes")))
    with pytest.raises(SettingsError, match=r"--column image .* give SOURCE"):
        Verify(sink=str(store), column="image")


def test_a_store_in_object_storage_is_repaired(s3: Server, capsys: pytest.CaptureFixture[str]) -> None:
    sink = "s3://segray/verify-test"
    write(sink, rows(("a", "1")), rows(("b", "1"), reject="empty: 0 bytes"))
    verify(Verify(sink=sink))
    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    [path] = fs.glob(f"{sink}/label_maps/*/*.parquet")
    fs.pipe_file(path, fs.cat_file(path)[:-20])
    fails(capsys, sink, 1, repair=True)
    moved = path.replace("/verify-test/", "/verify-test/quarantine/")
    assert sorted(fs.find(f"{sink}/quarantine")) == [moved, moved.replace("label_maps", "statistics")]
    assert not fs.exists(path)
    verify(Verify(sink=sink))
    assert LabelStore.open(sink).parts("rejects", "r1")


def test_the_command_exits_with_1_and_one_line(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for status in (0, 1):
        monkeypatch.setattr("sys.argv", ["segray", "verify", str(store)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == status
        os.truncate(part(store, "label_maps", "d", "e"), 100)
    signal.signal(signal.SIGTERM, before)
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"segray: {store}: 1 problem; --repair")
    assert stderr.count("\n") == 1


def test_pixels_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segray.verify._PIXELS", 5)
    label_map = np.array([[0, 2, 2], [1, 2, 0], [300, 2, 2]], np.uint16)
    counts = _count(label_map, 301)
    assert {int(i): int(counts[i]) for i in np.flatnonzero(counts)} == {0: 2, 1: 1, 2: 5, 300: 1}


CORNER = {
    "type": "Polygon",
    "coordinates": [[[15.0, 48.745], [15.0, 48.76], [14.9, 48.76], [14.9, 48.745], [15.0, 48.745]]],
}


@pytest.mark.parametrize(
    ("area", "cores"),
    [
        (None, ["0,0,32,32", "32,0,18,32", "0,32,32,8", "32,32,18,8"]),
        ({"type": "MultiPolygon", "coordinates": [CORNER["coordinates"]]}, ["0,0,32,32", "0,32,32,8"]),
    ],
)
def test_every_window_of_the_sources_scenes_is_labelled_or_the_scene_rejected(
    area: dict[str, Any] | None, cores: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"transform": Affine(0.001, 0, 14.98, 0, -0.001, 48.78), "crs": "EPSG:4326"}
    raster = write_raster(tmp_path / "scenes/a.tif", np.ones((3, 40, 50), np.uint8), ("red", "green", "blue"), **place)
    (tmp_path / "scenes/b.tif").write_bytes(b"no raster")
    (tmp_path / "scenes/notes.txt").write_text("no scene")
    [entries] = Source(str(tmp_path / "scenes"), of_scenes=True).entries()
    scene, broken = zip(entries["uri"].to_pylist(), entries["version"].to_pylist(), strict=True)
    windows = [(f"{scene[0]}#{core}", scene[1]) for core in cores]
    recipe: dict[str, Any] = {"scenes": {"size": 32, "halo": 4, "area": area}, "preprocessing": {"channels": "RGB"}}
    sink = tmp_path / "labels"
    write(str(sink), rows(*windows[1:]), rows(broken, reject="not a raster: b.tif"), **recipe)
    printed, error = fails(capsys, sink, 1, source=str(tmp_path / "scenes"))
    assert f"{scene[0]}#0,0,32,32: neither labelled nor rejected (recipe r1)" in printed
    assert "label the same source again" in error

    write(str(sink), rows(windows[0]), **recipe)
    verify(Verify(sink=str(sink), source=str(tmp_path / "scenes")))
    assert re.search(rf"images of SOURCE +│ +{len(cores) + 1} │", capsys.readouterr().out)

    os.utime(raster, (1, 1))
    fails(capsys, sink, len(cores), source=str(tmp_path / "scenes"))
