"""Pairs that lie about in every way, packed on a real Ray cluster, and read back as training and labelling do."""

import contextlib
import dataclasses
import functools
import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import s3fs
from affine import Affine
from PIL import Image

import segray.pack
from segray import pairs
from segray.classes import Classes
from segray.cli import main
from segray.datasets import KINDS
from segray.decode import decode
from segray.errors import Locked, Reject, RunError, SettingsError, SinkError, SourceError
from segray.labelmap import decode_png, encode_png
from segray.lock import hold
from segray.pack import Pack, _Sample, _together, pack
from segray.pairs import Census
from segray.sink import LABELLED, Sink
from segray.source import Source, fetch, filesystem, image_id
from tests.s3 import Server

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("ray_cluster")

CLASSES = Classes(("soil", "crop", "weed", "track"))
VOID = CLASSES.ignore_index
FORMATS = ("jpg", "png", "webp")


def image_file(rng: np.random.Generator, extension: str = "png", size: tuple[int, int] = (13, 17)) -> bytes:
    buffer = io.BytesIO()
    pixels = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    pixels.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension))
    return buffer.getvalue()


def write_pair(folder: Path, name: str, extension: str, seed: int, num_classes: int = 3) -> None:
    """An image of random noise, and a target of random ids and some void; the last class has no pixel."""
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(8, 30)), int(rng.integers(8, 30)))
    target = rng.integers(0, num_classes + 1, size, np.uint8)
    target[target == num_classes] = VOID
    for kind, suffix, data in (
        ("images", extension, image_file(rng, extension, size)),
        ("targets", "png", encode_png(target, CLASSES.palette)),
    ):
        path = folder / kind / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_folders(folder: Path, num_train: int = 12, num_val: int = 5) -> Path:
    for split, number, seed in (("train", num_train, 0), ("val", num_val, 1000)):
        for index in range(number):
            name = f"field{index % 2}/{index:03d}"  # the same names in both splits
            name += "long" * 40 if index == 9 else ""  # such a name has a header of its own in a tar
            write_pair(folder / split, name, FORMATS[index % 3], seed + index)
    (folder / "classes.json").write_text(json.dumps(CLASSES.to_dict()))
    return folder


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("fields"))


def job(source: object, sink: object, **settings: Any) -> Pack:
    return Pack(**{"source": str(source), "sink": str(sink), "shard_images": 5, **settings})


def read_json(uri: str) -> dict[str, Any]:
    fs, path = filesystem(uri)
    fields: dict[str, Any] = json.loads(fs.cat_file(path))
    return fields


def index_of(folder: str) -> tuple[pa.Table, pairs.Census]:
    """What the index beside the shards says, which has to be what they say themselves."""
    listed = (row for page in Source(folder).entries() for row in page.to_pylist())
    shards = dict(sorted((row["uri"], row["size_bytes"]) for row in listed))
    found = pairs.read_index(next(iter(shards)).rpartition("/")[0], shards)
    assert found is not None
    tables, censuses = zip(*(pairs.survey(shard, CLASSES) for shard in shards), strict=True)
    assert found[0].equals(pa.concat_tables(tables))
    total = functools.reduce(pairs.Census.__add__, censuses)
    assert found[1].num_images == total.num_images
    assert found[1].num_pixels.tolist() == total.num_pixels.tolist()
    return found


def packed(sink: object, split: str) -> dict[str, tuple[bytes, bytes]]:
    """The bytes of each image and target by their name, read through the index."""
    index, _ = index_of(f"{sink}/{split}")
    found = {uri.partition("#")[2]: (image, target) for uri, image, target in pairs.read(index)}
    assert len(found) == index.num_rows, "names are unique"
    return found


def shards(sink: Path) -> dict[str, bytes]:
    return {str(path.relative_to(sink)): path.read_bytes() for path in sorted(sink.rglob("shard-*"))}


def rejects(sink: object) -> dict[str, tuple[str, str]]:
    """Stage and reason by the name."""
    rows = pq.read_table(f"{sink}/_rejects.parquet").to_pylist()
    found = {row["name"]: (row["stage"], row["reason"]) for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_each_pair_is_packed_once_and_read_through_the_index_as_it_was(
    format: str, fields: Path, tmp_path: Path
) -> None:
    pack(job(fields, tmp_path / "out", format=format))
    assert len(list((tmp_path / "out/train").glob(f"shard-*.{format}"))) == 3
    assert len(list((tmp_path / "out/val").glob(f"shard-*.{format}"))) == 1
    for split in ("train", "val"):
        found = packed(tmp_path / "out", split)
        images = {path.relative_to(fields / split / "images"): path for path in (fields / split / "images").glob("*/*")}
        assert found.keys() == {str(path.with_suffix("")) for path in images}
        for path, image in images.items():
            data, target = found[str(path.with_suffix(""))]
            assert data == image.read_bytes()
            wanted = (fields / split / "targets" / path).with_suffix(".png").read_bytes()
            assert np.array_equal(decode_png(target), decode_png(wanted))
    classes = read_json(f"{tmp_path}/out/classes.json")
    assert Classes.from_dict(classes) == CLASSES
    assert classes["command"].startswith("python jobs/pack.py ")
    assert pq.read_table(tmp_path / "out/_rejects.parquet").num_rows == 0
    assert not (tmp_path / "out/_receipts").exists()


def test_parquet_shards_have_small_row_groups_of_plain_bytes(fields: Path, tmp_path: Path) -> None:
    pack(job(fields, tmp_path / "out", format="parquet", shard_images=100))
    shard = pq.ParquetFile(tmp_path / "out/train/shard-000000.parquet")
    assert shard.schema_arrow.names == ["name", "image", "target"]
    assert [shard.metadata.row_group(group).num_rows for group in range(shard.num_row_groups)] == [8, 4]
    assert {shard.metadata.row_group(0).column(column).compression for column in range(3)} == {"UNCOMPRESSED"}


def test_a_seed_gives_the_same_bytes_and_another_another_order(fields: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        pack(job(fields, tmp_path / name, seed=seed))
    a, b, c = (shards(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a != c
    names = [index_of(f"{tmp_path}/{sink}/train")[0]["name"].to_pylist() for sink in "ac"]
    assert sorted(names[0]) == sorted(names[1])
    assert names[0] not in (sorted(names[0]), names[1])


def test_statistics_are_those_of_all_pixels(fields: Path, tmp_path: Path) -> None:
    pack(job(fields, tmp_path / "out"))
    statistics = read_json(f"{tmp_path}/out/statistics.json")
    assert statistics["num_rejects"] == 0
    assert statistics["splits"].keys() == {"train", "val"}
    for split, told in statistics["splits"].items():
        images = sorted((fields / split / "images").glob("*/*"))
        pixels = np.concatenate([np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3) for path in images]) / 255
        targets = sorted((fields / split / "targets").glob("*/*"))
        ids = np.concatenate([np.asarray(Image.open(path)).ravel() for path in targets])
        assert told["num_images"] == len(images)
        assert told["num_pixels"] == {name: int((ids == i).sum()) for i, name in enumerate(CLASSES.names)}
        assert told["num_void"] == int((ids == VOID).sum())
        np.testing.assert_allclose(told["mean"], pixels.mean(0), rtol=0, atol=1e-9)
        np.testing.assert_allclose(told["std"], pixels.std(0), rtol=0, atol=1e-9)


def test_a_class_without_a_pixel_to_train_on_is_named(
    fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(job(fields, tmp_path / "out"))
    assert "note: in train no pixel is of track;" in capsys.readouterr().err


def test_what_cannot_be_used_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_folders(tmp_path / "source", 8, 1)
    images, targets = (source / "train" / kind / "field0" for kind in ("images", "targets"))
    cut = images / "000.jpg"
    cut.write_bytes(cut.read_bytes()[:100])
    (targets / "002.png").write_bytes(encode_png(np.zeros((3, 4), np.uint8), CLASSES.palette))
    size = decode_png((targets / "004.png").read_bytes()).shape
    (targets / "004.png").write_bytes(encode_png(np.full(size, 9, np.uint8), CLASSES.palette))
    (targets / "006.png").unlink()
    pack(job(source, tmp_path / "out"))
    found = rejects(tmp_path / "out")
    assert found.keys() == {"field0/000", "field0/002", "field0/004", "field0/006"}
    assert {name: stage for name, (stage, _) in found.items()} == {
        **{"field0/000": "decode", "field0/002": "decode", "field0/004": "decode", "field0/006": "fetch"},
    }
    assert packed(tmp_path / "out", "train").keys() == {f"field1/00{index}" for index in (1, 3, 5, 7)}
    assert read_json(f"{tmp_path}/out/statistics.json")["num_rejects"] == 4
    told = capsys.readouterr().out
    assert re.search(r"train +│ +4 │ +2 │ +4 │", told)
    assert "000.jpg: decode: " in told
    assert "4 rejected in all" in told


def test_where_all_is_rejected_nothing_is_packed_and_other_settings_may_be_tried(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "source", 2, 1)
    for target in source.glob("*/targets/*/*"):
        target.unlink()
    with pytest.raises(RunError, match=r"all 3 pairs were rejected; the first: .*000\.jpg: fetch: missing"):
        pack(job(source, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.json"))
    write_folders(source, 2, 1)
    pack(job(source, tmp_path / "out", format="parquet"))


def test_val_by_fraction_takes_a_share_and_added_pairs_move_none(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "source", 40, 20)
    pack(job(source, tmp_path / "before", val_fraction=0.3, shard_images=50))
    write_folders(source, 60, 20)
    pack(job(source, tmp_path / "after", val_fraction=0.3, shard_images=50))
    before, after = (
        {split: set(packed(tmp_path / sink, split).values()) for split in ("train", "val")}
        for sink in ("before", "after")
    )
    assert sum(map(len, before.values())) == 60, "pairs of the same name in two splits are both there"
    assert 10 <= len(before["val"]) <= 30
    assert before["train"] < after["train"]
    assert before["val"] < after["val"]


def test_the_same_command_again_does_nothing_and_another_is_refused(
    fields: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = job(fields, tmp_path / "out")
    pack(first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    pack(first)
    assert "is packed already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    for other in ({"seed": 1}, {"shard_images": 6}, {"format": "parquet"}, {"val_fraction": 0.5}):
        with pytest.raises(SinkError, match=r"shards of other settings.*python jobs/pack\.py .*give another SINK"):
            pack(dataclasses.replace(first, **other))
    source = write_folders(tmp_path / "more", 13)
    with pytest.raises(SinkError, match="or of other pairs"):
        pack(job(source, tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_sink_with_other_things_or_another_packer_is_left_alone(fields: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"")
    with pytest.raises(SinkError, match=r"holds a\.jpg, and no shards of this job; give an empty SINK"):
        pack(job(fields, tmp_path / "photos"))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    fs, root = filesystem(str(tmp_path / "out"))
    lock = hold(fs, root, "other", wait_seconds=0, say=print, lost=lambda: None)
    with lock, pytest.raises(Locked, match="run other on "):
        pack(job(fields, tmp_path / "out"))
    assert not (tmp_path / "out/pack.json").exists()


def test_what_broke_off_goes_on_and_leaves_nothing_of_the_first_attempt(
    fields: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the store is gone")

    pack(job(fields, tmp_path / "whole"))
    with monkeypatch.context() as broken, pytest.raises(RunError, match="broke off: OSError: the store is gone; the "):
        broken.setattr(segray.pack, "_finish", fail)
        pack(job(fields, tmp_path / "out"))
    train = tmp_path / "out/train"
    (train / "shard-000000.tar").unlink()
    (train / "shard-000001.tar").write_bytes(b"half")
    (train / "shard-000009.tar").write_bytes(b"of a longer one")
    (train / ".shard-000002.tar.x.tmp").write_bytes(b"ha")
    kept = (train / "shard-000002.tar").stat()
    with pytest.raises(SinkError, match="other settings"):
        pack(job(fields, tmp_path / "out", seed=1))
    pack(job(fields, tmp_path / "out"))
    assert (train / "shard-000002.tar").stat() == kept
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    statistics = [read_json(f"{tmp_path}/{sink}/statistics.json")["splits"] for sink in ("out", "whole")]
    assert statistics[0] == statistics[1]
    assert {path.name for path in train.iterdir()} == {path.name for path in (tmp_path / "whole/train").iterdir()}


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def pixels_of(source: str) -> dict[bytes, str]:
    """The name of each image of a source, by its pixels."""
    found = {}
    for page in Source(source).entries():
        for table, _ in fetch(page, done=np.array([], "S32")):
            for row in table.to_pylist():
                with contextlib.suppress(Reject):
                    found[decode(row["data"], 10**6).tobytes()] = row["uri"].partition("#")[2]
    return found


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_images_without_targets_are_packed_to_be_labelled(format: str, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    (source / "a.b").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("1.jpg", "1.png", "2.tif", "3.bmp", "a.b/1.jpg", "a.b/4.2.webp"):
        (source / name).write_bytes(image_file(rng, name.rpartition(".")[2]))
    (source / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    members = {f"{index}.jpg": image_file(rng, "jpg") for index in range(5)}
    write_tar(source / "old.tar", members | {"5.jpg": b"nothing", "notes.txt": b"..."})
    sink = tmp_path / "out"
    pack(job(source, sink, dataset="images", format=format, shard_images=3))

    before, after = pixels_of(str(source)), pixels_of(str(sink))
    assert len(before) == 11
    assert after.keys() == before.keys()
    listed = [Path(uri).name for page in Source(str(sink)).entries() for uri in page["uri"].to_pylist()]
    numbers = ("000000", "000001", "000002", "000003", "000003-1")
    assert sorted(listed) == sorted(f"shard-{number}.{format}" for number in numbers)
    if format == "tar":
        names = set(after.values())
        assert {"3.png", "old/0.jpg", "old/4.jpg"} <= names
        assert len({name.partition(".")[0] for name in names}) == 11, "no two make one sample of WebDataset"
    assert rejects(sink).keys() == {"broken", "old/5"}
    told = read_json(f"{sink}/statistics.json")["splits"]["images"]
    assert told["num_images"] == 11
    assert "num_pixels" not in told
    values = np.concatenate([np.frombuffer(pixels, np.uint8).reshape(-1, 3) for pixels in before]) / 255
    np.testing.assert_allclose(told["mean"], values.mean(0), rtol=0, atol=1e-9)
    np.testing.assert_allclose(told["std"], values.std(0), rtol=0, atol=1e-9)


def write_label_store(
    sink: Path, source: str, confidence: Callable[[str], tuple[float, float]]
) -> dict[str, np.ndarray]:
    """Labels the images of a source at random, three images a part; gives the label maps by their URI.

    The confidence of an image is that of its first class and that of its second.
    """
    store, rng, label_maps = Sink(str(sink), "r1"), np.random.default_rng(7), {}
    rows = []
    for page in Source(source).entries():
        for table, _ in fetch(page, done=np.array([], "S32")):
            for row in table.to_pylist():
                height, width = decode(row["data"], 10**6).shape[:2]
                label_map = (rng.random((height, width)) < 0.25).astype(np.uint8)
                counts = np.bincount(label_map.ravel(), minlength=4)
                label_maps[row["uri"]] = label_map
                rows.append(
                    {
                        "image_id": image_id(row["uri"], row["version"]),
                        **{name: row[name] for name in ("uri", "version")},
                        **{"height": height, "width": width, "label_map": encode_png(label_map, CLASSES.palette)},
                        "num_pixels": counts.tolist(),
                        "confidence_sum": [*(counts[:2] * confidence(row["uri"])).tolist(), 0.0, 0.0],
                    }
                )
    store.start({"recipe": "r1", "classes": CLASSES.to_dict()})
    for first in range(0, len(rows), 3):
        [*_] = store.write(pa.Table.from_pylist(rows[first : first + 3], LABELLED), CLASSES, "x")
    store.write_json("runs/x.json", {"run_id": "x", "recipe": "r1", "job": {"column": None}})
    return label_maps


def test_a_shard_ends_with_its_last_image_or_with_its_last_byte() -> None:
    image, census = bytes(50 * 2**20), Census.of(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8), CLASSES)
    samples = [_Sample(str(number), "jpg", image, b"", census) for number in range(4)]
    samples += [_Sample(str(number), "jpg", b"", b"", census) for number in range(4, 9)]
    names = [[sample.name for sample in some] for some in _together(samples, 4)]
    assert names == [["0", "1", "2"], ["3", "4", "5", "6"], ["7", "8"]]


def test_label_maps_of_scenes_are_packed_once_they_are_exported(tmp_path: Path) -> None:
    sink = Sink(str(tmp_path / "labels"), "r1")
    sink.start({"recipe": "r1", "classes": CLASSES.to_dict(), "scenes": {"size": 32}})
    sink.write_json("runs/x.json", {"run_id": "x", "recipe": "r1", "job": {"column": None}})
    with pytest.raises(SourceError, match=r"r1 is of scenes; `segray export .* and give --dataset scenes"):
        pack(job(tmp_path / "labels", tmp_path / "out", dataset="labels"))


def test_sure_label_maps_of_a_label_store_become_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for index in range(8):
        (photos / f"{index}.png").write_bytes(image_file(rng))
    write_tar(photos / "old.tar", {f"{index}.jpg": image_file(rng, "jpg") for index in range(4)})
    # Of 1 the rarer class alone is unsure, and of 2 the commoner one.
    of = {"1.png": (0.96, 0.8), "2.png": (0.8, 0.96), "#1.jpg": (0.1, 0.1), "3.png": (0.9, 0.9)}
    label_maps = write_label_store(
        tmp_path / "labels", str(photos), lambda uri: next((of[end] for end in of if uri.endswith(end)), (0.99, 0.99))
    )
    (photos / "5.png").write_bytes(image_file(rng))
    (photos / "6.png").unlink()
    pack(job(tmp_path / "labels", tmp_path / "out", dataset="labels"))

    assert "10 of 12 label maps have a mean confidence of 0.9 or more" in capsys.readouterr().err
    found = packed(tmp_path / "out", "train")
    assert found.keys() == {"0", "1", "3", "4", "7", "old/0", "old/2", "old/3"}
    for name, (data, target) in found.items():
        uri = f"file://{photos}/{name}.png" if len(name) == 1 else f"file://{photos}/old.tar#{name[4:]}.jpg"
        assert np.array_equal(decode_png(target), label_maps[uri])
        assert name.startswith("old") or data == (photos / f"{name}.png").read_bytes()
    told = rejects(tmp_path / "out")
    assert {name: reason.partition(":")[0] for name, (_, reason) in told.items()} == {"5": "changed", "6": "missing"}
    assert Classes.read(f"{tmp_path}/out/classes.json") == CLASSES

    for kind in ("label_maps", "statistics"):  # as while the store is compacted
        few = sorted((tmp_path / "labels" / kind / "recipe=r1").iterdir())[:2]
        merged = pa.concat_tables([pq.read_table(part, partitioning=None) for part in few])
        pq.write_table(merged, few[0].with_name("part-merged.parquet"))
    pack(job(tmp_path / "labels", tmp_path / "all", dataset="labels", min_confidence=0.0, val_fraction=0.4))
    splits = {split: packed(tmp_path / "all", split).keys() for split in ("train", "val")}
    assert len(splits["train"]) + len(splits["val"]) == 10
    assert splits["train"].isdisjoint(splits["val"])
    with pytest.raises(SourceError, match=r"none of the 18 label maps of recipe r1 has a mean confidence of 1\.0"):
        pack(job(tmp_path / "labels", tmp_path / "none", dataset="labels", min_confidence=1.0))
    Sink(str(tmp_path / "new"), "r1").start({"recipe": "r1", "classes": CLASSES.to_dict()})
    (tmp_path / "new/label_maps").mkdir()
    with pytest.raises(SourceError, match="none of the 0 label maps"):
        pack(job(tmp_path / "new", tmp_path / "none", dataset="labels"))


def test_to_s3_and_from_there(fields: Path, tmp_path: Path, s3: Server) -> None:
    place = "s3://segray/pack-test"
    s3fs.S3FileSystem(use_listings_cache=False).put(str(fields), f"{place}/source", recursive=True)
    pack(job(f"{place}/source", f"{place}/out"))
    pack(job(fields, tmp_path / "out"))
    for split in ("train", "val"):
        assert packed(f"{place}/out", split) == packed(tmp_path / "out", split)
    receipts = s3fs.S3FileSystem(use_listings_cache=False).find(f"{place}/out/_receipts")
    assert not [path for path in receipts if path.endswith(".json")]
    before = read_json(f"{place}/out/statistics.json")
    pack(job(f"{place}/source", f"{place}/out"))
    assert read_json(f"{place}/out/statistics.json") == before


def test_camvid_is_packed_whole(camvid: Path, tmp_path: Path) -> None:
    pack(job(camvid, tmp_path / "out", dataset="camvid", shard_images=128))
    statistics = read_json(f"{tmp_path}/out/statistics.json")["splits"]
    assert {split: told["num_images"] for split, told in statistics.items()} == {"train": 367, "val": 101}
    ids = np.concatenate([np.asarray(Image.open(path)).ravel() for path in (camvid / "trainannot").glob("*.png")])
    assert [*statistics["train"]["num_pixels"].values(), statistics["train"]["num_void"]] == np.bincount(ids).tolist()
    classes = Classes.read(f"{tmp_path}/out/classes.json")
    index, _ = pairs.survey(f"{tmp_path}/out/val/shard-000000.tar", classes)
    for (_, data, _), name in zip(pairs.read(index), index["name"].to_pylist(), strict=True):
        assert data == (camvid / "val" / f"{name}.png").read_bytes()


def run(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The exit status of the command line, in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr("sys.argv", ["segray", "pack", *arguments])
    try:
        with pytest.raises(SystemExit) as exit_:
            main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return exit_.value.code


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    source, number = tmp_path / "source", 240
    write_pair(source / "one", "0", "png", 0)
    for kind in ("images", "targets"):
        (source / kind).mkdir()
        for index in range(number):
            os.link(source / f"one/{kind}/0.png", source / f"{kind}/{index}.png")
    (source / "classes.json").write_text(json.dumps(CLASSES.to_dict()))

    settings = job(source, tmp_path / "out", shard_images=4)
    process = subprocess.Popen(
        [sys.executable, *shlex.split(settings.command())[1:]],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a script, SIGINT is ignored, and that is inherited.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out").glob("_receipts/train/*.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    said = ["note: what is packed stays; run the same command again and it goes on from there", "segray: stopped"]
    assert stderr.splitlines() == said
    assert not (tmp_path / "out/statistics.json").exists()
    assert 0 < len(shards(tmp_path / "out")) < number / 4
    pack(settings)
    assert len(packed(tmp_path / "out", "train")) == number


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "pascal"}, "--dataset pascal: there is no such kind; there are voc, .*, labels"),
        ({"min_confidence": 0.5}, "--min-confidence 0.5 is of --dataset labels, not of folders"),
        ({"recipe": "r1", "dataset": "images"}, "--recipe r1 is of --dataset labels, not of images"),
        ({"column": "jpg"}, "--column jpg is of --dataset images, not of folders"),
        (
            {"classes": "c.json", "dataset": "camvid"},
            "--classes c.json is of --dataset folders or scenes, not",
        ),
        ({"dataset": "images", "val_fraction": 0.5}, "--val-fraction 0.5: images without targets"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0: is a share between 0 and 1"),
        ({"dataset": "labels", "min_confidence": 1.5}, "--min-confidence 1.5: is a share"),
        ({"bands": "red"}, "--bands red is of --dataset scenes, not of folders"),
        ({"dataset": "scenes", "bands": "red,,nir"}, "--bands red,,nir: give names, each once"),
        ({"dataset": "scenes", "bands": "red,Red=B4"}, "--bands red,Red=B4: give names, each once"),
        ({"dataset": "scenes", "window": 0}, "--window 0: must be at least 1"),
        ({"dataset": "scenes", "gap_metres": 100.0}, "--gap-metres 100.0 goes with --val-fraction"),
        ({"shard_images": 0}, "--shard-images 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"sink": "data/shards"}, "SINK data/shards lies in SOURCE data,"),
        ({"source": "s3://b/data/**/*.jpg", "sink": "s3://b/data/x"}, "lies in SOURCE"),
        ({"sink": "./data"}, "lies in SOURCE"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        job(**{"source": "data", "sink": "out"} | settings)


def test_a_wrong_path_or_an_empty_source_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for place in ("nowhere", "empty"):
        for kind in ("folders", "images", "labels"):
            status = run([str(tmp_path / place), str(tmp_path / "out"), "--dataset", kind], monkeypatch)
            stderr = capsys.readouterr().err
            assert (status, stderr.count("\n")) == (2, 1)
            assert str(tmp_path / place) in stderr
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_kind() -> None:
    text = inspect.getsource(Pack).partition("def __post_init__")[0]
    assert all(re.search(rf"\b{kind}\b", text) for kind in (*KINDS, "images", "labels"))


SIDE = 240
SCENES = {"north": (500_000, 5_400_000), "east": (501_200, 5_399_200)}
"""Where two scenes begin that overlap, in metres; a pixel has 10."""


def write_raster(path: Path, samples: np.ndarray, corner: tuple[int, int], bands: Sequence[str] = ("ids",)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = samples.shape
    west, north = corner
    how: dict[str, Any] = {"driver": "GTiff", "crs": "EPSG:32633", "transform": Affine(10, 0, west, 0, -10, north)}
    how |= {"count": count, "height": height, "width": width, "dtype": samples.dtype}
    with rasterio.open(path, "w", **how, nodata=0 if count > 1 else None) as file:
        file.write(samples)
        file.descriptions = bands


def write_scenes(folder: Path) -> Path:
    """Two scenes that overlap, with a strip without data and one that is void."""
    rng = np.random.default_rng(0)
    for name, corner in SCENES.items():
        samples = rng.integers(1, 9000, (3, SIDE, SIDE), np.uint16)
        samples[:, :30] = 0
        target = rng.integers(0, 3, (1, SIDE, SIDE), np.uint8)
        target[:, -30:] = VOID
        write_raster(folder / f"images/{name}.tif", samples, corner, ("red", "nir", "swir"))
        write_raster(folder / f"targets/{name}.tif", target, corner)
    (folder / "classes.json").write_text(json.dumps(CLASSES.to_dict()))
    return folder


def ground_of(name: str, size: int) -> tuple[float, float, float, float]:
    """West, south, east and north of a window, in metres."""
    scene, _, offsets = name.partition("/")
    row, col = map(int, offsets.split("-"))
    west, north = SCENES[scene][0] + 10 * col, SCENES[scene][1] - 10 * row
    return west, north - 10 * min(size, SIDE - row), west + 10 * min(size, SIDE - col), north


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_windows_of_scenes_are_packed_and_no_ground_of_val_lies_near_that_of_train(format: str, tmp_path: Path) -> None:
    source = write_scenes(tmp_path / "source")
    how = {"dataset": "scenes", "window": 16, "val_fraction": 0.3, "block_metres": 900.0, "gap_metres": 150.0}
    settings = job(source, tmp_path / "out", format=format, bands="infrared=nir,red", shard_images=40, **how)
    pack(settings)
    ground = {}
    for split in ("train", "val"):
        found = packed(tmp_path / "out", split)
        assert {name.partition("/")[0] for name in found} == set(SCENES)
        ground[split] = np.array([ground_of(name, 16) for name in found])
        for name, pair in found.items():
            values, target = pairs.decode_pair(name, *pair, CLASSES)
            scene, _, offsets = name.partition("/")
            row, col = map(int, offsets.split("-"))
            place = rasterio.windows.Window(col, row, 16, 16)
            with rasterio.open(source / f"images/{scene}.tif") as file:
                samples = file.read([2, 1], window=place).transpose(1, 2, 0)
            with rasterio.open(source / f"targets/{scene}.tif") as file:
                ids = file.read(1, window=place)
            np.testing.assert_array_equal(np.nan_to_num(values), samples)
            np.testing.assert_array_equal(target, np.where(samples[:, :, 0] > 0, ids, VOID))
            assert (target != VOID).any(), "what nobody can learn from is left out"
    train, val = ground["train"][:, None], ground["val"][None]
    beside = np.maximum(train[..., 0] - val[..., 2], val[..., 0] - train[..., 2])
    above = np.maximum(train[..., 1] - val[..., 3], val[..., 1] - train[..., 3])
    # To a thousandth, as a metre of UTM is not quite one on the ground.
    assert np.hypot(np.maximum(beside, 0), np.maximum(above, 0)).min() >= 0.999 * 150
    assert read_json(f"{tmp_path}/out/statistics.json")["splits"]["train"]["bands"] == ["infrared", "red"]
    before = shards(tmp_path / "out")
    pack(settings)
    assert shards(tmp_path / "out") == before


def test_scenes_without_splits_are_train_and_folders_of_splits_are_theirs(tmp_path: Path) -> None:
    source = write_scenes(tmp_path / "source")
    pack(job(source, tmp_path / "out", dataset="scenes", window=128))
    assert sorted(packed(tmp_path / "out", "train")) == sorted(
        f"{name}/{row:06d}-{col:06d}" for name in SCENES for row in (0, 128) for col in (0, 128)
    )
    (tmp_path / "split").mkdir()
    (source / "classes.json").rename(tmp_path / "split/classes.json")
    source.rename(tmp_path / "split/train")
    write_scenes(tmp_path / "split/val")
    pack(job(tmp_path / "split", tmp_path / "other", dataset="scenes", window=128))
    assert packed(tmp_path / "other", "train").keys() == packed(tmp_path / "other", "val").keys()


def test_a_scene_that_cannot_be_used_is_one_reject(tmp_path: Path) -> None:
    source = write_scenes(tmp_path / "source")
    write_raster(source / "targets/east.tif", np.zeros((1, 9, 9), np.uint8), SCENES["east"])
    rgb = np.ones((2, SIDE, SIDE), np.uint16)
    write_raster(source / "images/west.tif", rgb, SCENES["north"], ("red", "blue"))
    write_raster(source / "targets/west.tif", np.zeros((1, SIDE, SIDE), np.uint8), SCENES["north"])
    pack(job(source, tmp_path / "out", dataset="scenes", window=128))
    assert len(packed(tmp_path / "out", "train")) == 4
    found = rejects(tmp_path / "out")
    assert found.keys() == {"east", "west"}
    assert found["east"][1].startswith("size mismatch: ")
    assert found["west"][1].startswith("bands missing: nir, swir of red, nir, swir not among red, blue")


def test_ground_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    source = write_scenes(tmp_path / "source")
    with pytest.raises(SettingsError, match=r"0 to validate on.* give smaller --block-metres or --gap-metres"):
        pack(job(source, tmp_path / "out", dataset="scenes", window=16, val_fraction=0.01, block_metres=1e6))
    assert not (tmp_path / "out").exists()
