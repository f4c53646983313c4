import contextlib
import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from segray import demo, model
from segray.classes import Classes
from segray.demo import CLASSES, Draw
from segray.errors import ModelError, SettingsError, SourceError
from segray.labelmap import encode_png
from segray.model import Preprocessing
from segray.predict import Prediction, Predictor
from segray.train import Train, augmented, pairs, train, train_one_epoch

ARGUMENTS = '{"encoder_depth": 3, "decoder_channels": [16, 8, 8]}'
MODEL = "unet_tu-mobilenetv3_small_050"


def job(source: Path, sink: Path, **settings: object) -> Train:
    """A job of a few steps with a very small model."""
    small = {"model": MODEL, "arguments": ARGUMENTS, "num_epochs": 3, "batch_size": 4, "crop": 64, "num_threads": 1}
    return Train(source=str(source), sink=str(sink), **{**small, **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen drawn scenes, in two tar shards and in two Parquet shards."""
    folder = tmp_path_factory.mktemp("fields")
    for form in ("tar", "parquet"):
        demo.draw(Draw(sink=str(folder / form), num_scenes=16, first_seed=0, format=form, shard_scenes=8))
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))


def write_source(folder: Path, image: bytes, target: bytes | None) -> Path:
    """Two shards, of which the first holds one pair, and the classes."""
    good_image, good_target = encoded_pair(np.zeros((64, 64), np.uint8))
    bad = {"a.jpg": image} | ({"a.target.png": target} if target is not None else {})
    write_tar(folder / "shard-000000.tar", bad)
    write_tar(folder / "shard-000001.tar", {"b.jpg": good_image, "b.target.png": good_target})
    (folder / "classes.json").write_text(json.dumps(CLASSES.to_dict()))
    return folder


def encoded_pair(target: np.ndarray) -> tuple[bytes, bytes]:
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(target[..., None] * 50, 3, axis=2)).save(buffer, "JPEG")
    return buffer.getvalue(), encode_png(target, CLASSES.palette)


@pytest.fixture(scope="session")
def trained(fields: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Train, list[str]]:
    """A job that has run, and the lines that it printed."""
    settings = job(fields / "tar", tmp_path_factory.mktemp("trained"), num_epochs=4)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(settings)
    return settings, printed.getvalue().splitlines()


def test_a_run_on_ray_writes_a_checkpoint_that_labels(trained: tuple[Train, list[str]]) -> None:
    settings, printed = trained
    checkpoint = model.load(f"{settings.sink}/checkpoint.safetensors")
    assert checkpoint.classes == CLASSES
    assert checkpoint.arguments == {"encoder_name": "tu-mobilenetv3_small_050", **json.loads(ARGUMENTS)}
    assert checkpoint.origin["command"] == settings.command()
    data = checkpoint.origin["data"]
    assert (data["train"]["images"], data["val"]["images"]) == (8, 8), "the last shard is for validation"
    assert data["train"]["command"].startswith("python -m segray.demo")
    assert checkpoint.origin["versions"].keys() >= {"segray", "torch"}
    metrics = checkpoint.origin["metrics"]
    assert list(metrics["iou"]) == list(CLASSES.names)
    assert 0 < metrics["miou"] < 1

    image, target = demo.scene(99)
    (prediction,) = Predictor(checkpoint.to_bytes).predict([image])
    assert isinstance(prediction, Prediction)
    assert prediction.label_map.shape == target.shape

    losses = [float(line.split("loss ")[1].split(",")[0]) for line in printed if line.startswith("epoch")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert printed[-1] == f"wrote {settings.sink}/checkpoint.safetensors"


@pytest.mark.slow
def test_one_seed_gives_one_checkpoint(trained: tuple[Train, list[str]], tmp_path: Path) -> None:
    settings, _ = trained
    train(dataclasses.replace(settings, sink=str(tmp_path)))
    digests = {model.load(f"{sink}/checkpoint.safetensors").digest() for sink in (settings.sink, tmp_path)}
    assert len(digests) == 1


def test_the_step_learns_without_ray() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
    targets = (images[..., 0] > 127).to(torch.uint8)
    module = nn.Conv2d(3, 2, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    batches = [{"image": images, "target": targets}] * 20
    losses = [train_one_epoch(module, batches, optimizer, schedule, Preprocessing(), 255) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < 0.2


def test_void_pixels_teach_nothing() -> None:
    def trained(images: Tensor, targets: Tensor) -> Tensor:
        torch.manual_seed(0)
        module = nn.Conv2d(3, 2, 1)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        loss = train_one_epoch(
            module, [{"image": images, "target": targets}], optimizer, schedule, Preprocessing(), 255
        )
        assert np.isfinite(loss)
        return module.weight.detach()

    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    targets = torch.randint(0, 2, (2, 8, 8), dtype=torch.uint8)
    targets[:, :, :4] = 255
    other = images.clone()
    other[:, :, :4] = 255 - other[:, :, :4]
    assert torch.equal(trained(images, targets), trained(other, targets))

    nothing = torch.full_like(targets, 255)
    after = trained(images, nothing)
    torch.manual_seed(0)
    assert torch.equal(after, nn.Conv2d(3, 2, 1).weight)


def test_augmentation_moves_image_and_target_together() -> None:
    ids = np.arange(40 * 50, dtype=np.int32).reshape(40, 50)
    image = np.stack([ids // 50 * 6, ids % 50 * 5, np.zeros_like(ids)], axis=2).astype(np.uint8)
    target = (image[..., 0] > image[..., 1]).astype(np.uint8)
    seen = set()
    for seed in range(20):
        cut, cut_target = augmented(image, target, 32, 255, np.random.default_rng(seed))
        assert cut.shape == (32, 32, 3)
        assert cut_target.shape == (32, 32)
        # A change of light keeps the order of two channels but for its tint of at most 15 %.
        bright, dim = cut[..., 0].astype(float), cut[..., 1].astype(float)
        clear = np.abs(bright - dim) > 0.2 * np.maximum(bright, dim) + 3
        assert clear.sum() > 100
        np.testing.assert_array_equal((bright > dim)[clear], cut_target[clear] == 1)
        seen.add(cut_target.tobytes())
    assert len(seen) > 10


def test_what_lies_beyond_a_small_image_is_void() -> None:
    image, target = np.full((20, 70, 3), 200, np.uint8), np.ones((20, 70), np.uint8)
    cut, cut_target = augmented(image, target, 32, 255, np.random.default_rng(0))
    assert cut.shape == (32, 32, 3)
    assert (cut_target == 1).sum() == 20 * 32
    assert (cut_target == 255).sum() == 12 * 32


def test_tar_and_parquet_shards_hold_the_same_pairs(fields: Path) -> None:
    def read(form: str) -> Iterator[tuple[bytes, bytes]]:
        for shard in sorted((fields / form).glob("shard-*")):
            for uri, image, target in pairs(str(shard)):
                assert uri.startswith(f"{shard}#")
                yield image, target

    both = list(itertools.zip_longest(read("tar"), read("parquet")))
    assert len(both) == 16
    assert all(of_tar == of_parquet for of_tar, of_parquet in both)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no target", r"shard-000000\.tar#a is an image without target"),
        ("unknown id", r"shard-000000\.tar#a: the target holds the ids \[9\]"),
        ("another size", r"shard-000000\.tar#a: the target has 32×64 pixels"),
        ("no image", r"shard-000000\.tar#a: the image cannot be decoded: not an image"),
        ("no png", r"shard-000000\.tar#a: the target cannot be decoded"),
        ("truncated shard", r"shard-000000\.tar cannot be read"),
    ],
)
def test_a_bad_pair_is_named_before_anything_is_trained(
    fault: str, message: str, tmp_path: Path, ray_cluster: None
) -> None:
    target = np.zeros((64, 64), np.uint8)
    image, encoded_target = encoded_pair(target)
    cases: dict[str, tuple[bytes, bytes | None]] = {
        "no target": (image, None),
        "unknown id": (image, encode_png(target + 9, CLASSES.palette * 3)),
        "another size": (image, encode_png(target[:32], CLASSES.palette)),
        "no image": (b"these are words", encoded_target),
        "no png": (image, b"these are words"),
        "truncated shard": (image, encoded_target),
    }
    source = write_source(tmp_path, *cases[fault])
    if fault == "truncated shard":
        shard = source / "shard-000000.tar"
        shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(SourceError, match=message):
        train(job(source, tmp_path / "sink"))
    assert not (tmp_path / "sink").exists()


def test_a_parquet_shard_without_targets_is_named(tmp_path: Path, ray_cluster: None) -> None:
    for index in range(2):
        pq.write_table(pa.table({"image": [b"x"], "height": [1]}), tmp_path / f"shard-00000{index}.parquet")
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES.to_dict()))
    with pytest.raises(SourceError, match=r"shard-000000\.parquet.*no column target"):
        train(job(tmp_path, tmp_path / "sink"))


def test_a_source_without_shards_or_with_one_says_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES.to_dict()))
    with pytest.raises(SourceError, match="no shards"):
        train(job(tmp_path, tmp_path / "sink"))
    write_tar(tmp_path / "shard-000000.tar", {})
    with pytest.raises(SourceError, match="give --val"):
        train(job(tmp_path, tmp_path / "sink"))


def test_settings_that_do_not_fit_are_refused(fields: Path, tmp_path: Path, ray_cluster: None) -> None:
    with pytest.raises(SettingsError, match="--crop 63 must be a multiple of"):
        train(job(fields / "tar", tmp_path, model="unetplusplus_tu-mobilenetv3_small_050", crop=63))
    with pytest.raises(SettingsError, match="--batch-size 9 is more than the 8 images"):
        train(job(fields / "tar", tmp_path, batch_size=9))
    with pytest.raises(ModelError, match="no model 'nonsense'"):
        train(job(fields / "tar", tmp_path, model="nonsense"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_epochs": 0}, "--num-epochs 0"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"warm_up": 1.0}, "--warm-up"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"num_threads": 0}, "--num-threads 0"),
        ({"seed": -1}, "--seed -1"),
        ({"arguments": "decoder"}, "not JSON"),
        ({"arguments": "[1]"}, "JSON object"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        job(Path("source"), Path("sink"), **settings)


def test_the_command_gives_the_settings_back() -> None:
    settings = job(Path("a folder"), Path("sink"), seed=3)
    code = (
        "import shlex, sys, tyro; from segray.train import Train; "
        "print(tyro.cli(Train, args=shlex.split(sys.argv[1])[2:]) == eval(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, settings.command(), repr(settings)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_settings_are_read_without_torch_or_ray() -> None:
    code = "import sys, segray.train; sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_demo_checkpoint_is_small_and_tells_where_it_came_from() -> None:
    path = Path(demo.__file__).with_name("demo.safetensors")
    assert os.path.getsize(path) <= 8_000_000
    checkpoint = model.load(str(path))
    assert checkpoint.classes == Classes.from_dict(CLASSES.to_dict())
    assert checkpoint.origin["command"].startswith("python jobs/train.py ")
    assert checkpoint.origin["data"]["train"]["command"].startswith("python -m segray.demo ")


def test_the_demo_checkpoint_knows_scenes_that_it_never_saw() -> None:
    from segray.statistics import ConfusionMatrix

    predictor = Predictor(model.load(str(Path(demo.__file__).with_name("demo.safetensors"))).to_bytes)
    confusion = ConfusionMatrix.zeros(len(CLASSES))
    for seed in range(1_000_000, 1_000_012):
        image, target = demo.scene(seed)
        (prediction,) = predictor.predict([image])
        assert isinstance(prediction, Prediction)
        confusion += ConfusionMatrix.of(target, prediction.label_map, len(CLASSES), CLASSES.ignore_index)
    assert confusion.miou() > 0.85
