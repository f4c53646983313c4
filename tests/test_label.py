"""The job end to end, on a real Ray cluster, from and to a real S3 server."""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import tarfile
import threading
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import ray
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from segray import demo
from segray.crf import Crf
from segray.decode import MAX_PIXELS, decode, decode_for
from segray.errors import Locked, RunError, SettingsError, SourceError
from segray.label import (
    _IMAGES_PER_BLOCK,
    Label,
    _deadline,
    _index,
    _Page,
    _Predictor,
    _start_ledger,
    label,
    place,
)
from segray.labelmap import decode_png
from segray.lock import hold
from segray.model import Checkpoint, Preprocessing, load
from segray.predict import Prediction, Predictor
from segray.source import Source
from segray.tile import Tiling
from tests.awful import awful_files
from tests.conftest import random_checkpoint
from tests.graphs import convolutions, described, write
from tests.label_store import newest_run
from tests.s3 import Server

FORMS = ("loose", "tar", "parquet")
NUM_FRAMES = 21
NUM_PHOTOS = 160
STORE_BYTES = 2.0**30


def jpeg(seed: int, height: int = 48, width: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def read_store(sink: str, kind: str) -> pa.Table:
    """What any reader sees: pyarrow alone, with hive partitions."""
    fs, path = fsspec.core.url_to_fs(sink, use_listings_cache=False)
    return pads.dataset(f"{path}/{kind}", filesystem=fs, format="parquet", partitioning="hive").to_table()


def name_of(uri: str) -> str:
    return re.split("[/#]", uri)[-1]


@pytest.fixture(scope="session")
def frames_on_s3(camvid: Path, s3: Server) -> str:
    """A fifth of CamVid's validation frames, each as a loose object, in a tar shard and in a Parquet shard."""
    frames = sorted((camvid / "val").glob("*.png"))[::5]
    root = "s3://segray/label/camvid"
    fs, _ = fsspec.core.url_to_fs(root, use_listings_cache=False)
    fs.pipe({f"{root}/loose/{index % 3}/{frame.name}": frame.read_bytes() for index, frame in enumerate(frames)})
    for shard in range(3):
        some = frames[shard::3]
        with fs.open(f"{root}/tar/shard-{shard:06d}.tar", "wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
            for frame in some:
                tar.add(frame, frame.name)
                note = tarfile.TarInfo(f"{frame.stem}.json")
                tar.addfile(note, io.BytesIO())
        table = pa.table({"name": [f.name for f in some], "image": [f.read_bytes() for f in some]})
        with fs.open(f"{root}/parquet/shard-{shard:06d}.parquet", "wb") as file:
            pq.write_table(table, file, row_group_size=10)
    return root


def label_frames(frames: str, name: str, resize: int | None, folder: Path, sink_root: str) -> None:
    checkpoint, sink, num_images = folder / f"{name}.safetensors", f"{sink_root}/{name}-{resize}", 3 * NUM_FRAMES
    checkpoint.write_bytes(random_checkpoint(name, preprocessing=Preprocessing(resize=resize)).to_bytes())
    label(Label(source=frames, sink=sink, model=str(checkpoint)))
    label_maps: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
    for row in read_store(sink, "label_maps").to_pylist():
        form = row["uri"].removeprefix(f"{frames}/").partition("/")[0]
        label_maps[form][name_of(row["uri"])] = row["label_map"]
        with Image.open(io.BytesIO(row["label_map"])) as image:
            assert image.size == (480, 360)
            assert (image.mode, row["height"], row["width"]) == ("P", 360, 480)
    assert {form: len(of_form) for form, of_form in label_maps.items()} == dict.fromkeys(FORMS, NUM_FRAMES)

    statistics = read_store(sink, "statistics")
    per_image = statistics.group_by("image_id").aggregate([("num_pixels", "sum"), ("fraction", "sum")])
    assert per_image.num_rows == num_images
    assert pc.unique(per_image["num_pixels_sum"]).to_pylist() == [360 * 480]
    assert np.allclose(per_image["fraction_sum"], 1)

    counts = newest_run(sink)["counts"]
    assert counts == {"seen": num_images, "labelled": num_images, "rejected": 0, "present": 0, "other_files": 0}
    read_by_duckdb(sink, statistics)
    first, *others = label_maps.values()
    assert all(other == first for other in others)
    assert len(set(first.values())) > NUM_FRAMES // 2, "the model says the same of all frames"


def read_by_duckdb(sink: str, statistics: pa.Table) -> None:
    """DuckDB reads the parts from disk as they stand (its own S3 client would have to be downloaded)."""
    fs, path = fsspec.core.url_to_fs(sink, use_listings_cache=False)
    with duckdb.connect() as db:
        db.register_filesystem(fs)
        for kind in ("label_maps", "statistics"):
            db.execute(f"create view {kind} as select * from read_parquet('s3://{path}/{kind}/*/*.parquet')")
        [(num_images, num_recipes)] = db.sql(
            "select count(distinct image_id), count(distinct recipe) from label_maps"
        ).fetchall()
        assert (num_images, num_recipes) == (3 * NUM_FRAMES, 1)
        by_class = db.sql("select class_name, sum(num_pixels) from statistics group by all").fetchall()
    expected = statistics.group_by("class_name").aggregate([("num_pixels", "sum")]).to_pylist()
    assert {name: int(total) for name, total in by_class} == {r["class_name"]: r["num_pixels_sum"] for r in expected}


def test_loose_tar_and_parquet_on_s3_give_the_same_label_maps(
    frames_on_s3: str, tmp_path: Path, s3: Server, ray_cluster: None
) -> None:
    label_frames(frames_on_s3, "unet_resnet18", 96, tmp_path, "s3://segray/label/camvid-labels")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["unet_resnet18", "pspnet_resnet18", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"])
def test_loose_tar_and_parquet_on_s3_give_the_same_label_maps_at_full_size(
    name: str, frames_on_s3: str, tmp_path: Path, s3: Server, ray_cluster: None
) -> None:
    label_frames(frames_on_s3, name, None, tmp_path, "s3://segray/label/camvid-labels")


@pytest.fixture(scope="session")
def small_model(checkpoint_file: Callable[[str], Path]) -> str:
    return str(checkpoint_file("lraspp_mobilenet_v3_large"))


def write_photos(folder: Path) -> Path:
    """Ten good photographs of three sizes."""
    photos = folder / "photos"
    photos.mkdir()
    for index in range(10):
        (photos / f"{index}.jpg").write_bytes(jpeg(index, height=48 + 16 * (index % 3)))
    return photos


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path)


@pytest.fixture(scope="module")
def labelled(small_model: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Label:
    """A run over ten photographs, whose sink tests copy."""
    folder = tmp_path_factory.mktemp("labelled")
    job = Label(source=str(write_photos(folder)), sink=str(folder / "labels"), model=small_model)
    label(job)
    return job


def copied(job: Label, folder: Path) -> Label:
    """The job with a sink of its own, which holds the same."""
    return dataclasses.replace(job, sink=str(shutil.copytree(job.sink, folder / "labels")))


def test_every_awful_file_is_a_reject_with_its_reason_and_every_good_one_is_labelled(
    photos: Path, tmp_path: Path, small_model: str, ray_cluster: None
) -> None:
    awful = awful_files()
    assert len(awful) >= 15
    for name, (data, _) in awful.items():
        (photos / name).write_bytes(data)
    (photos / "notes.md").write_text("not an image, and not taken for one")
    sink = tmp_path / "labels"
    with pytest.raises(RunError, match=rf"{len(awful)} of {len(awful) + 10} images were rejected, more than"):
        label(Label(source=str(photos), sink=str(sink), model=small_model))

    rejects = read_store(str(sink), "rejects").to_pylist()
    assert {name_of(r["uri"]): (r["stage"], r["reason"].partition(":")[0]) for r in rejects} == {
        name: ("decode", kind) for name, (_, kind) in awful.items()
    }
    labelled = read_store(str(sink), "label_maps").to_pylist()
    assert {name_of(row["uri"]) for row in labelled} == {f"{index}.jpg" for index in range(10)}
    assert {(row["height"], row["width"]) for row in labelled} == {(48, 64), (64, 64), (80, 64)}
    run = newest_run(str(sink))
    assert run["status"] == "finished"
    assert run["counts"] == {
        "seen": len(awful) + 10,
        "labelled": 10,
        "rejected": len(awful),
        "present": 0,
        "other_files": 1,
    }
    assert sum(reject["num_images"] for reject in run["rejects"]) == len(awful)


@pytest.mark.slow
def test_what_a_manifest_named_in_vain_loses_its_reject_when_it_is_there(
    photos: Path, tmp_path: Path, small_model: str, ray_cluster: None
) -> None:
    manifest, sink = photos / "manifest.txt", str(tmp_path / "labels")
    manifest.write_text("0.jpg\nlate.jpg\nnever.jpg\n")
    job = Label(source=str(manifest), sink=sink, model=small_model, max_rejects=1)
    label(job)
    (photos / "late.jpg").write_bytes(jpeg(100))
    label(job)
    assert newest_run(sink)["counts"] == {"seen": 3, "labelled": 1, "rejected": 0, "present": 2, "other_files": 0}
    assert {name_of(row["uri"]) for row in read_store(sink, "label_maps").to_pylist()} == {"0.jpg", "late.jpg"}
    assert [name_of(row["uri"]) for row in read_store(sink, "rejects").to_pylist()] == ["never.jpg"]


def test_a_second_run_labels_only_what_is_new_or_changed(
    photos: Path, tmp_path: Path, small_model: str, ray_cluster: None
) -> None:
    sink = str(tmp_path / "labels")
    job = Label(source=str(photos), sink=sink, model=small_model)
    label(job)
    before = read_store(sink, "label_maps")
    label(job)
    assert newest_run(sink)["counts"] == {"seen": 10, "labelled": 0, "rejected": 0, "present": 10, "other_files": 0}
    assert read_store(sink, "label_maps").equals(before)

    (photos / "new.jpg").write_bytes(jpeg(100))
    (photos / "0.jpg").write_bytes(jpeg(101, width=96))
    label(job)
    assert newest_run(sink)["counts"] == {"seen": 11, "labelled": 2, "rejected": 0, "present": 9, "other_files": 0}
    image_ids = read_store(sink, "label_maps")["image_id"].to_pylist()
    assert len(image_ids) == len(set(image_ids)) == 12


def test_members_of_a_shard_that_are_done_are_skipped_and_the_counts_add_up(
    tmp_path: Path, small_model: str, ray_cluster: None
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    good, bad = [jpeg(index) for index in range(5)], b"broken"
    pq.write_table(pa.table({"image": [*good, bad]}), shards / "a.parquet")
    sink = str(tmp_path / "labels")
    job = Label(source=str(shards), sink=sink, model=small_model, max_rejects=1)
    label(job)
    assert newest_run(sink)["counts"] == {"seen": 6, "labelled": 5, "rejected": 1, "present": 0, "other_files": 0}
    pq.write_table(pa.table({"image": good[:2]}), shards / "b.parquet")
    (shards / "c.tar").write_bytes(b"no archive, however long one looks at it" * 100)
    label(job)
    assert newest_run(sink)["counts"] == {"seen": 9, "labelled": 2, "rejected": 1, "present": 6, "other_files": 0}
    label(job)
    assert newest_run(sink)["counts"] == {"seen": 9, "labelled": 0, "rejected": 0, "present": 9, "other_files": 0}


@pytest.mark.parametrize("by_manifest", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_shard_of_which_all_is_done_is_not_opened(
    by_manifest: bool, tmp_path: Path, small_model: str, ray_cluster: None
) -> None:
    def write_shard(path: Path, num_images: int) -> None:
        with tarfile.open(path, "w") as tar:
            for index in range(num_images):
                info = tarfile.TarInfo(f"{index}.jpg")
                data = jpeg(index)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    source, sink = tmp_path / "shards", tmp_path / "labels"
    source.mkdir()
    whole, broken = source / "whole.tar", source / "broken.tar"
    write_shard(whole, 20)
    write_shard(broken, 20)
    os.truncate(broken, broken.stat().st_size // 2 // 512 * 512 + 100)
    manifest = tmp_path / "manifest.txt"
    manifest.write_text(f"{whole}\n{broken}\n")
    job = Label(source=str(manifest if by_manifest else source), sink=str(sink), model=small_model, max_rejects=1)
    label(job)
    first = newest_run(str(sink))["counts"]
    assert (first["labelled"] > 20, first["rejected"]) == (True, 1)

    for shard in (whole, broken):  # another content under the same version: whoever opens it finds no image
        before = shard.stat()
        shard.write_bytes(bytes(before.st_size))
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    label(job)
    again = newest_run(str(sink))["counts"]
    assert again == first | {"labelled": 0, "rejected": 0, "present": first["seen"]}


@pytest.mark.slow
def test_another_tiling_is_another_recipe_beside_the_first(
    photos: Path, tmp_path: Path, small_model: str, ray_cluster: None
) -> None:
    sink = str(tmp_path / "labels")
    label(Label(source=str(photos), sink=sink, model=small_model))
    label(Label(source=str(photos), sink=sink, model=small_model, tiling=Tiling(size=32, overlap=8)))
    per_recipe = read_store(sink, "label_maps").group_by("recipe").aggregate([("image_id", "count_distinct")])
    assert per_recipe["image_id_count_distinct"].to_pylist() == [10, 10]
    assert {path.stem for path in (tmp_path / "labels/recipes").iterdir()} == set(per_recipe["recipe"].to_pylist())


def test_an_onnx_model_labels_in_the_same_actors(photos: Path, tmp_path: Path, ray_cluster: None) -> None:
    fields = {"classes": ["soil", "crop", "weed"], "bands": "RGB"}
    path = write(tmp_path / "m.onnx", convolutions(3, size=(32, 32), batch=1), fields)
    sink = str(tmp_path / "labels")
    label(Label(source=str(photos), sink=sink, model=path))
    run = newest_run(sink)
    assert run["counts"] == {"seen": 10, "labelled": 10, "rejected": 0, "present": 0, "other_files": 0}
    recipe = json.loads((tmp_path / "labels/recipes" / f"{run['recipe']}.json").read_text())
    assert recipe["tiling"] == {"size": 32, "overlap": 4, "blend": "cosine"}
    assert recipe["model"]["digest"] == load(path).digest()
    predictor = Predictor(load(path).to_bytes)
    for row in read_store(sink, "label_maps").to_pylist():
        with Image.open(photos / name_of(row["uri"])) as image:
            (expected,) = predictor.predict([np.asarray(image)])
        assert isinstance(expected, Prediction)
        np.testing.assert_array_equal(decode_png(row["label_map"]), expected.label_map)


def test_models_that_do_not_go_with_the_settings_are_refused(photos: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", convolutions(), described())
    with pytest.raises(SettingsError, match=r"sees the bands red, green, blue, nir of scenes; give --scenes\.size"):
        label(Label(source=str(photos), sink=str(tmp_path / "labels"), model=path))
    path = write(tmp_path / "rgb.onnx", convolutions(3), {"classes": 3, "bands": "RGB"})
    with pytest.raises(SettingsError, match=r"--dtype bfloat16: what .* computes in stands in its graph; leave it out"):
        label(Label(source=str(photos), sink=str(tmp_path / "labels"), model=path, dtype="bfloat16"))
    assert not (tmp_path / "labels").exists()


def test_a_crf_is_another_recipe_and_the_run_says_what_it_took_and_in_which_precision(
    labelled: Label, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = copied(labelled, tmp_path)
    sink = job.sink
    assert newest_run(sink)["crf_ms_per_image"] is None
    refining = dataclasses.replace(job, crf=True)
    label(dataclasses.replace(refining, dry_run=True))
    assert re.search(r"refined by\s+│\s+a CRF ", capsys.readouterr().out)
    label(refining)
    run = newest_run(sink)
    assert 0 < run["crf_ms_per_image"] < 60_000
    models = run["models"][0]
    assert 1 <= models["num_models"] <= run["placement"]["max_actors"]
    assert 0.99 <= models["agreement"] <= 1
    assert models["error"] is None
    told = capsys.readouterr().out
    assert f"the CRF took {run['crf_ms_per_image']:,.1f} ms an image" in told
    assert f"computed in {models['dtype']}: {models['agreement']:.2%} of the first batch's pixels as in float32" in told
    assert run["counts"] == {"seen": 10, "labelled": 10, "rejected": 0, "present": 0, "other_files": 0}

    recipes = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "labels/recipes").iterdir()}
    decisive = {
        "labelling": 4,
        "model": recipes[run["recipe"]]["model"]["digest"],
        "tiling": {"size": 1024, "overlap": 128, "blend": "cosine"},
        "dtype": "auto",
    }
    plain = f"r{hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:15]}"
    assert recipes.keys() == {plain, run["recipe"]}, "the id of a recipe without a CRF must stay what it was"
    assert "crf" not in recipes[plain]
    assert recipes[run["recipe"]]["crf"] == dataclasses.asdict(Crf())

    label_maps: dict[str, dict[str, bytes]] = {plain: {}, run["recipe"]: {}}
    for row in read_store(sink, "label_maps").to_pylist():
        label_maps[row["recipe"]][name_of(row["uri"])] = row["label_map"]
    assert label_maps[plain].keys() == label_maps[run["recipe"]].keys()
    assert label_maps[plain] != label_maps[run["recipe"]]


def test_photographs_that_are_decoded_to_fewer_pixels_get_label_maps_of_their_own_size(
    tmp_path: Path, ray_cluster: None
) -> None:
    demo_model = Checkpoint.from_bytes(Path(demo.__file__).with_name("demo.safetensors").read_bytes())
    preprocessing = dataclasses.replace(demo_model.preprocessing, resize=96)
    resizing = tmp_path / "resizing.safetensors"
    resizing.write_bytes(dataclasses.replace(demo_model, preprocessing=preprocessing).to_bytes())
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        Image.fromarray(demo.scene(seed)[0]).resize((640, 480)).save(photos / f"{seed}.jpg", quality=95)
    job = Label(source=str(photos), sink=str(tmp_path / "labels"), model=str(resizing), dtype="float32")
    label(job)
    predictor = Predictor(resizing.read_bytes)
    rows = read_store(job.sink, "label_maps").to_pylist()
    assert len(rows) == 3
    for row in rows:
        label_map = decode_png(row["label_map"])
        data = (photos / name_of(row["uri"])).read_bytes()
        [reduced] = predictor.predict_decoded([decode_for(data, MAX_PIXELS, 96)])
        [whole] = predictor.predict([decode(data, MAX_PIXELS)])
        assert isinstance(reduced, Prediction)
        assert isinstance(whole, Prediction)
        np.testing.assert_array_equal(label_map, reduced.label_map)
        assert label_map.shape == (480, 640)
        assert 0.98 < (label_map == whole.label_map).mean() < 1

    refining = dataclasses.replace(job, sink=str(tmp_path / "refined"), crf=True)
    label(refining)
    predictor = Predictor(resizing.read_bytes, crf=Crf())
    for row in read_store(refining.sink, "label_maps").to_pylist():
        data = (photos / name_of(row["uri"])).read_bytes()
        [whole] = predictor.predict([decode(data, MAX_PIXELS)])
        assert isinstance(whole, Prediction)
        np.testing.assert_array_equal(decode_png(row["label_map"]), whole.label_map, "a CRF sees every pixel")


def test_label_maps_that_are_larger_than_what_was_decoded_come_in_parts(
    small_model: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segray.label._PIXEL_BYTES", 2 * 20 * 30)
    predictor = _Predictor(
        read_checkpoint=Path(small_model).read_bytes, ledger=_start_ledger(ray, "run", None, None), num_threads=1
    )
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), np.uint8)
    decoded = pa.table(
        {
            "image_id": [str(number) for number in range(6)],
            "pixels": [*(image.tobytes() for image in pixels), b""],
            "num_rows": pa.array([20] * 5 + [0], pa.int32()),
            "height": pa.array([20] * 5 + [None], pa.int32()),  # as of a scene
            "width": pa.array([30] * 5 + [None], pa.int32()),
            "stage": pa.array([None] * 5 + ["decode"], pa.string()),
            "reason": pa.array([None] * 5 + ["empty: the file has 0 bytes"], pa.string()),
        }
    )
    parts = list(predictor(decoded))
    assert [part.num_rows for part in parts] == [2, 2, 2]
    assert pa.concat_tables(parts)["image_id"] == decoded["image_id"]
    assert [len(label_map or b"") for part in parts for label_map in part["label_map"].to_pylist()] == [600] * 5 + [0]
    [none] = predictor(decoded.slice(0, 0))
    assert none.schema == parts[0].schema


def test_a_killed_actor_starts_again_with_its_weights_and_no_image_is_lost(
    tmp_path: Path, small_model: str, ray_cluster: None
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(NUM_PHOTOS):
        (folder / f"{index}.jpg").write_bytes(jpeg(index, 96, 128))
    killed: list[int] = []
    done = threading.Event()

    def kill_first_predictor() -> None:
        while not done.wait(0.2):
            for process in psutil.process_iter(["cmdline"]):
                if (process.info["cmdline"] or [""])[0].startswith("ray::MapWorker(MapBatches(_Predictor)).submit"):
                    process.kill()
                    killed.append(process.pid)
                    return

    killer = threading.Thread(target=kill_first_predictor)
    killer.start()
    try:
        label(Label(source=str(folder), sink=str(tmp_path / "labels"), model=small_model, actors="1"))
    finally:
        done.set()
        killer.join()
    assert killed
    counts = newest_run(str(tmp_path / "labels"))["counts"]
    assert counts == {"seen": NUM_PHOTOS, "labelled": NUM_PHOTOS, "rejected": 0, "present": 0, "other_files": 0}
    image_ids = read_store(str(tmp_path / "labels"), "label_maps")["image_id"].to_pylist()
    assert len(image_ids) == len(set(image_ids)) == NUM_PHOTOS


def test_statistics_whose_label_maps_never_came_are_removed(labelled: Label, tmp_path: Path) -> None:
    job = copied(labelled, tmp_path)
    sink = Path(job.sink)
    [part] = (sink / "label_maps").glob("*/*.parquet")
    [twin] = (sink / "statistics").glob("*/*.parquet")
    orphan = twin.with_name("part-00000000000000000000000000000000.parquet")
    orphan.write_bytes(twin.read_bytes())
    note = twin.with_name("note.txt")
    note.write_text("not of this store")
    label(job)
    assert (part.exists(), twin.exists(), orphan.exists(), note.exists()) == (True, True, False, True)


def test_rejects_are_taken_up_again_on_request_and_their_rows_replaced(
    photos: Path, tmp_path: Path, small_model: str, ray_cluster: None
) -> None:
    sink = str(tmp_path / "labels")
    (photos / "broken.jpg").write_bytes(b"no image")
    job = Label(source=str(photos), sink=sink, model=small_model, max_rejects=1, max_pixels=64 * 64)
    label(job)
    assert newest_run(sink)["counts"] == {"seen": 11, "labelled": 7, "rejected": 4, "present": 0, "other_files": 0}
    again = dataclasses.replace(job, max_pixels=10**6)
    label(again)
    assert newest_run(sink)["counts"]["present"] == 11, "rejects are done unless asked for"
    label(dataclasses.replace(again, retry_rejects=True))
    assert newest_run(sink)["counts"] == {"seen": 11, "labelled": 3, "rejected": 1, "present": 7, "other_files": 0}
    rejects = read_store(sink, "rejects").to_pylist()
    assert [(name_of(r["uri"]), r["run_id"]) for r in rejects] == [("broken.jpg", newest_run(sink)["run_id"])]
    assert read_store(sink, "label_maps").num_rows == 10


@pytest.mark.slow
def test_a_run_ends_at_its_bound_and_the_next_goes_on(
    photos: Path, tmp_path: Path, small_model: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = str(tmp_path / "labels")
    shards = tmp_path / "photos/shards"
    shards.mkdir()
    pq.write_table(pa.table({"image": [jpeg(100 + index) for index in range(30)]}), shards / "a.parquet")
    job = Label(source=str(photos), sink=sink, model=small_model)
    label(dataclasses.replace(job, max_images=15))
    run = newest_run(sink)
    assert (run["status"], run["ended"], run["counts"]["labelled"]) == ("finished", "at its bound", 15)
    assert "run the same command again" in capsys.readouterr().out
    label(job)
    run = newest_run(sink)
    assert (run["status"], run["ended"]) == ("finished", None)
    assert run["counts"] == {"seen": 40, "labelled": 25, "rejected": 0, "present": 15, "other_files": 0}
    image_ids = read_store(sink, "label_maps")["image_id"].to_pylist()
    assert len(image_ids) == len(set(image_ids)) == 40


def test_a_dry_run_counts_and_does_nothing(
    photos: Path, tmp_path: Path, small_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    label(Label(source=str(photos), sink=str(tmp_path / "labels"), model=small_model, dry_run=True))
    printed = capsys.readouterr().out
    assert re.search(r"loose images to label\s+│\s+10 ", printed)
    assert "about 10 images; no run of this recipe" in printed
    assert not (tmp_path / "labels").exists()


@pytest.mark.slow
def test_a_dry_run_tells_time_and_cost_by_a_sample_or_by_the_last_run(
    photos: Path, tmp_path: Path, small_model: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = tmp_path / "labels"
    for index in range(90):
        (photos / f"more-{index:02d}.jpg").write_bytes(jpeg(200 + index))
    pq.write_table(pa.table({"image": [jpeg(100 + index) for index in range(30)]}), photos / "a.parquet")
    job = Label(source=str(photos), sink=str(sink), model=small_model)
    dry = dataclasses.replace(job, dry_run=True, hourly_cost=3600.0)
    label(dataclasses.replace(dry, sample=80))
    printed = capsys.readouterr().out
    assert re.search(r"shards to open\s+│\s+1, of about 30 images", printed)
    assert re.search(r"about 130 images in 0:.*, at a cost of [\d.]+, at the [\d.]+ images/s of a sample", printed)
    assert not sink.exists()

    label(job)
    before = {path: path.stat().st_mtime_ns for path in sink.rglob("*")}
    (photos / "more-00.jpg").write_bytes(jpeg(500))
    (photos / "new.jpg").write_bytes(jpeg(501))
    pq.write_table(pa.table({"image": [jpeg(600)]}), photos / "a.parquet")
    capsys.readouterr()
    label(dry)
    printed = capsys.readouterr().out
    for row, number in [
        ("loose images to label", 2),
        ("shards to open", 1),
        ("of these, changed since they were labelled", 2),
        ("images already there", 99),
        ("shards of which all is there", 0),
    ]:
        assert re.search(rf"{row}\s+│\s+{number}\D", printed), f"{row}: {printed}"
    assert f"images/s of run {newest_run(str(sink))['run_id']}" in printed
    assert {path: path.stat().st_mtime_ns for path in sink.rglob("*")} == before, "a dry run writes nothing"


def test_a_sink_in_use_is_refused_with_its_holders_name(photos: Path, tmp_path: Path, small_model: str) -> None:
    sink = tmp_path / "labels"
    with (
        hold(LocalFileSystem(), str(sink), "another-run", wait_seconds=0, say=print, lost=lambda: None),
        pytest.raises(Locked, match="run another-run on "),
    ):
        label(Label(source=str(photos), sink=str(sink), model=small_model))
    assert {path.name for path in sink.iterdir()} == {"lock"}


@pytest.mark.parametrize(
    ("num_images", "num_models", "sizes"),
    [
        (10, 1, [10]),
        (100, 1, [16, 25, 25, 25, 9]),
        (100, 8, [16] * 6 + [4]),  # no less than a batch
        (640, 2, [16, *[64] * 9, 48]),
        (640, 8, [16, *[20] * 31, 4]),
        (200_000, 2, [16, *[200] * 999, 184]),
    ],
)
def test_blocks_are_so_many_that_all_models_have_some_and_so_few_that_they_are_cheap(
    num_images: int, num_models: int, sizes: list[int]
) -> None:
    page = _Page(
        loose=pa.table({"uri": [str(number) for number in range(num_images)]}),
        shards=pa.table({"uri": pa.array([], pa.string())}),
        num_present=0,
        num_shards_done=0,
        num_in_shards_done=0,
        is_unversioned=False,
    )
    index = _index(iter([page]), Source("."), _IMAGES_PER_BLOCK, 16, num_models)
    assert [block.num_rows for block in index.blocks] == sizes


@pytest.mark.slow
def test_a_run_in_which_nothing_goes_on_ends_and_names_what_is_outstanding(
    photos: Path, tmp_path: Path, small_model: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(photos / "never-ends.jpg")  # whoever reads it waits for a writer
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    monkeypatch.setattr("segray.label._IMAGES_PER_BLOCK", (5, 5, 5))
    sink = str(tmp_path / "labels")
    with (
        monkeypatch.context() as soon,
        pytest.raises(RunError, match=r"nothing went on for .*; begun and not read to the end: file://.*photos/"),
    ):
        soon.setattr("segray.progress.STALL_SECONDS", 8.0)
        label(Label(source=str(photos), sink=sink, model=small_model))
    assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN
    assert newest_run(sink)["status"] == "failed"
    (photos / "never-ends.jpg").unlink()
    label(Label(source=str(photos), sink=sink, model=small_model))
    assert read_store(sink, "label_maps").num_rows == 10


NOON = datetime(2026, 11, 22, 12, 0)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("13:30", datetime(2026, 11, 22, 13, 30)),
        ("06:00", datetime(2026, 11, 23, 6, 0)),
        ("2026-11-24T06:00", datetime(2026, 11, 24, 6, 0)),
    ],
)
def test_a_deadline_is_the_next_such_time(text: str, moment: datetime) -> None:
    assert _deadline(text, NOON) == moment


@pytest.mark.parametrize("text", ["tomorrow", "2026-11-21T06:00"])
def test_a_deadline_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=f"--deadline {text}"):
        _deadline(text, NOON)


@pytest.mark.parametrize(
    ("nodes", "job", "expected"),
    [
        ([{"CPU": 1}], {}, (1, 1, 0.5)),
        ([{"CPU": 2}], {}, (1, 2, 1)),
        ([{"CPU": 16}], {}, (4, 4, 3)),
        ([{"CPU": 0}, {"CPU": 8}, {"CPU": 6}], {}, (3, 4, 3)),
        ([{"CPU": 16}], {"actors": "2", "threads": 8}, (2, 8, 7)),
        ([{"CPU": 16, "GPU": 4}], {}, (4, 1, 1)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 8}], {}, (4, 1, 0)),
        ([{"CPU": 16, "GPU": 4}], {"device": "cpu"}, (4, 4, 3)),
    ],
)
def test_models_leave_room_for_the_other_stages(
    nodes: list[dict[str, float]], job: dict[str, Any], expected: tuple[int, int, float]
) -> None:
    placement = place(Label(source="a", sink="b", model="m", **job), alive(nodes))
    assert (placement.min_actors, placement.threads, placement.actor_cpus) == expected
    assert placement.max_actors == placement.min_actors
    left = sum(node["CPU"] for node in nodes) - placement.min_actors * placement.actor_cpus
    assert 0 < 4 * placement.task_cpus <= left
    num_tasks = (placement.max_cpus or left) / placement.task_cpus
    num_blocks = STORE_BYTES * len(nodes) / 4 / placement.block_bytes
    assert 2 * num_tasks + 4 * placement.min_actors <= num_blocks, "more than a quarter of the object stores"


@pytest.mark.parametrize(
    ("nodes", "job", "numbers"),
    [
        ([{"CPU": 4}], {"device": "cuda"}, "4 CPUs and 0 GPUs"),
        ([{"CPU": 4}], {"actors": "5"}, "5 × the model at 3 CPU each"),
        ([{"CPU": 2}], {"threads": 8}, "1 × the model at 7 CPU each"),
        ([{"CPU": 4, "GPU": 1}], {"actors": "2"}, "2 × the model at 1 CPU and 1 GPU each"),
        ([{"CPU": 1, "GPU": 1}], {}, "1 CPUs and 1 GPUs on 1 nodes"),
        ([], {}, "no CPUs"),
    ],
)
def test_what_does_not_fit_the_cluster_is_refused_with_the_numbers(
    nodes: list[dict[str, float]], job: dict[str, Any], numbers: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(numbers)):
        place(Label(source="a", sink="b", model="m", **job), alive(nodes))


def alive(nodes: list[dict[str, float]]) -> list[dict[str, Any]]:
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    store = {"object_store_memory": STORE_BYTES}
    there = [{name: amount for name, amount in node.items() if amount} | store for node in nodes]
    told = ({"NodeID": f"{number:x}", "Labels": {}, "Resources": node} for number, node in enumerate(there, 10))
    return [dead, *({"Alive": True, **node} for node in told)]


def test_with_workers_without_gpus_the_other_stages_keep_away_from_gpus_there_and_to_come() -> None:
    head = {"CPU": 2.0, "node:__internal_head__": 1.0}
    nodes = alive([head, {"CPU": 8}, {"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}])
    for node, kind in zip(nodes[-2:], ("L4", "A-NEW-KIND"), strict=True):
        node["Labels"]["ray.io/accelerator-type"] = kind
    job = Label(source="a", sink="b", model="m")
    labels = place(job, nodes).task_labels
    kinds = re.findall(r"[\w-]+", labels["ray.io/accelerator-type"].removeprefix("!in"))
    assert {"L4", "A-NEW-KIND", "H100"} <= set(kinds)
    assert labels["ray.io/node-id"] == "!in(c)"
    assert place(job, nodes).max_cpus == 10, "those without GPUs, which a fixed number of models does not ask for"
    # All that could decode is the head: nodes with GPUs then do it too.
    assert place(job, [nodes[1], nodes[3]]).task_labels == {}
    assert place(dataclasses.replace(job, device="cpu"), nodes).task_labels == {}


def test_a_range_of_actors_may_wait_for_nodes_to_come() -> None:
    nodes = alive([{"CPU": 8}])
    placement = place(Label(source="a", sink="b", model="m", device="cuda", actors="1:8"), nodes)
    assert (placement.min_actors, placement.max_actors, placement.actor_gpus) == (1, 8, 1)
    assert "H100" in placement.task_labels["ray.io/accelerator-type"]
    on_cpus = place(Label(source="a", sink="b", model="m", device="cpu", actors="4:8"), alive([{"CPU": 4}]))
    assert (on_cpus.min_actors, on_cpus.max_actors) == (4, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"actors": "-1"}, "--actors -1"),
        ({"actors": "8:2"}, "--actors 8:2"),
        ({"actors": "8:"}, "--actors 8:"),
        ({"actors": "many"}, "--actors many"),
        ({"max_rejects": 1.5}, "--max-rejects 1.5"),
        ({"dtype": "float16", "device": "cpu"}, "bfloat16"),
        ({"hourly_cost": 3.0}, "give --dry-run"),
        ({"dry_run": True, "sample": 0}, "--sample 0: must be at least 1"),
        ({"sink": "photos/labels"}, "lies in SOURCE"),
        ({"source": "s3://bucket/a/", "sink": "s3://bucket/a/labels"}, "lies in SOURCE"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        Label(**{"source": "photos", "sink": "labels", "model": "unet_resnet34", **settings})


def test_a_source_without_images_is_refused_and_nothing_is_written(tmp_path: Path, small_model: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.md").write_text("no image")
    with pytest.raises(SourceError, match="holds no images and no shards, only 1 files of other kinds"):
        label(Label(source=str(tmp_path / "empty"), sink=str(tmp_path / "labels"), model=small_model))
    assert not (tmp_path / "labels").exists()
