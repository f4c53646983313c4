"""Training on a real Ray cluster: what comes out, what goes on after a break, what is refused before it begins."""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from affine import Affine
from PIL import Image

from segray import demo, model
from segray.augment import Augmentation
from segray.classes import Classes
from segray.demo import CLASSES, Draw
from segray.errors import ModelError, RunError, SettingsError, SourceError
from segray.evaluate import Evaluate, evaluate
from segray.journal import Journal
from segray.label import Label, label
from segray.labelmap import encode_png
from segray.model import Preprocessing
from segray.pack import Pack, pack
from segray.predict import Prediction, Predictor
from segray.report import Report, report
from segray.schedule import Optimization
from segray.tile import Scenes
from segray.train import Train, _place, train
from segray.worker import Parallel, Placement
from tests.cluster import cluster, head_options
from tests.test_report import page_data

ROOT = Path(__file__).parents[1]
ARGUMENTS = '{"encoder_depth": 3, "decoder_channels": [16, 8, 8]}'
MODEL = "unet_tu-mobilenetv3_small_050"


def job(source: object, sink: object, **settings: Any) -> Train:
    """A job of a few steps with a very small model."""
    small = {
        "model": MODEL,
        "arguments": ARGUMENTS,
        "num_epochs": 3,
        "batch_size": 4,
        "augmentation": Augmentation(crop=64),
        "optimization": Optimization(learning_rate=3e-3),
        "parallel": Parallel(num_threads=1),
    }
    return Train(source=str(source), sink=str(sink), **{**small, **settings})


@pytest.fixture(scope="session")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen drawn scenes in two tar shards."""
    folder = tmp_path_factory.mktemp("fields")
    demo.draw(Draw(sink=str(folder), num_scenes=16, first_seed=0, format="tar", shard_scenes=8))
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


def run(settings: Train) -> list[str]:
    """Trains; what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(settings)
    return printed.getvalue().splitlines()


@pytest.fixture(scope="session")
def trained(fields: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Train, list[str]]:
    """A job that has run, and the lines that it printed."""
    settings = job(fields, tmp_path_factory.mktemp("trained"), num_epochs=4, save_steps=1)
    return settings, run(settings)


def test_a_run_on_ray_writes_a_checkpoint_that_labels(trained: tuple[Train, list[str]]) -> None:
    settings, printed = trained
    checkpoint = model.load(f"{settings.sink}/checkpoint.safetensors")
    assert checkpoint.classes == CLASSES
    assert checkpoint.arguments == {"encoder_name": "tu-mobilenetv3_small_050", **json.loads(ARGUMENTS)}
    assert checkpoint.preprocessing != Preprocessing(), "the mean and std are those of the images"
    origin = checkpoint.origin
    assert origin["command"] == settings.command()
    assert origin["seed"] == settings.seed
    assert (origin["data"]["train"]["images"], origin["data"]["val"]["images"]) == (8, 8), "the last shard validates"
    assert origin["data"]["train"]["command"].startswith("python -m segray.demo")
    assert origin["versions"].keys() >= {"segray", "torch", "ray"}
    assert list(origin["metrics"]["iou"]) == list(CLASSES.names)
    image, target = demo.scene(99)
    (prediction,) = Predictor(checkpoint.to_bytes).predict([image])
    assert isinstance(prediction, Prediction)
    assert prediction.label_map.shape == target.shape
    assert printed[-1] == f"wrote {settings.sink}/checkpoint.safetensors"
    assert sum(line.startswith("epoch ") for line in printed) == 4


def test_the_sink_tells_how_it_went(trained: tuple[Train, list[str]]) -> None:
    settings, _ = trained
    journal = Journal(settings.sink)
    told = journal.training()
    assert told is not None
    assert (told["status"], told["num_steps"], told["steps_per_epoch"]) == ("finished", 8, 2)
    lines = journal.metrics()
    steps, epochs = ([line for line in lines if line["kind"] == kind] for kind in ("steps", "epoch"))
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in epochs] == [2, 4, 6, 8]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    best = max(epochs, key=lambda line: line["miou"])
    assert told["best_epoch"] == best["epoch"]
    assert model.load(f"{settings.sink}/checkpoint.safetensors").origin["metrics"]["miou"] == best["miou"]
    assert model.load(f"{settings.sink}/last.safetensors").origin["metrics"]["epoch"] == 4
    seen = json.loads(journal.read("validation/epoch-0004.json") or b"")
    num_pixels = sum(target.size for _, target in map(demo.scene, range(8, 16)))
    assert np.array(seen["confusion"]).sum() == num_pixels, "the whole set, each image once"
    assert [image["miou"] for image in seen["worst"]] == sorted(image["miou"] for image in seen["worst"])
    assert len({image["uri"] for image in seen["worst"]}) == 8
    assert journal.read("tensorboard/events.out.tfevents.segray")


def test_the_same_command_again_has_nothing_to_do_and_another_is_refused(trained: tuple[Train, list[str]]) -> None:
    settings, _ = trained
    before = {path: path.stat().st_mtime_ns for path in Path(settings.sink).rglob("*.safetensors")}
    assert "holds this training, finished" in run(settings)[-1]
    other = dataclasses.replace(settings, optimization=Optimization(learning_rate=0.01), seed=1)
    with pytest.raises(SettingsError, match=r"learning-rate was 0\.003, is 0\.01, seed was 0, is 1"):
        train(other)
    assert {path: path.stat().st_mtime_ns for path in Path(settings.sink).rglob("*.safetensors")} == before


def losses(sink: object) -> dict[int, float]:
    """By step."""
    return {line["step"]: line["loss"] for line in Journal(str(sink)).metrics() if line["kind"] == "steps"}


def assert_same_training(sink: object, other: object) -> None:
    """The same curve, and the same models."""
    assert losses(sink) == losses(other)
    for name in ("checkpoint", "last"):
        assert len({model.load(f"{folder}/{name}.safetensors").digest() for folder in (sink, other)}) == 1


def wait_for_step(sink: Path, step: int, alive: Any) -> None:
    deadline = time.monotonic() + 240
    while not list(sink.glob(f"state/step-{step:08d}.safetensors")):
        assert alive(), "it had ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_worker_costs_a_start_and_nothing_else(trained: tuple[Train, list[str]], tmp_path: Path) -> None:
    settings, _ = trained
    failures: list[BaseException] = []

    def work() -> None:
        try:
            train(dataclasses.replace(settings, sink=str(tmp_path)))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for_step(tmp_path, 3, thread.is_alive)
    children = psutil.Process().children(recursive=True)
    [worker] = [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]
    worker.kill()
    thread.join(300)
    assert not failures
    assert not thread.is_alive()
    assert_same_training(settings.sink, tmp_path)


@pytest.mark.slow
def test_what_is_stopped_in_the_middle_goes_on_with_the_same_command(
    trained: tuple[Train, list[str]], tmp_path: Path
) -> None:
    settings, _ = trained
    stopped = dataclasses.replace(settings, sink=str(tmp_path))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, *shlex.split(stopped.command())[1:]],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(tmp_path, 3, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    told = Journal(str(tmp_path)).training()
    assert told is not None
    assert told["status"] == "interrupted"
    printed = run(stopped)
    assert any(line.startswith("goes on from step ") for line in printed)
    assert_same_training(settings.sink, tmp_path)


def batch_normless(source: object, sink: object, **settings: Any) -> Train:
    """A job without batch norms that learn, so that any number of workers learns the same."""
    return job(
        source,
        sink,
        save_steps=1,
        arguments=json.dumps({**json.loads(ARGUMENTS), "decoder_use_norm": False}),
        optimization=Optimization(learning_rate=3e-3, backbone_rate=0.0),
        **settings,
    )


@pytest.mark.slow
def test_a_lost_node_costs_a_start_and_nothing_else(fields: Path, tmp_path: Path, ray_cluster: None) -> None:
    settings = batch_normless(fields, tmp_path / "alone", num_epochs=6)
    run(settings)
    sink = tmp_path / "sink"
    command = dataclasses.replace(settings, sink=str(sink), parallel=Parallel(workers="1:2", num_threads=1)).command()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, cluster(folder) as made:
        made.add(*head_options(made), num_cpus=0)
        nodes = [made.add(num_cpus=2) for _ in range(2)]
        process = made.start("job", "submit", f"--working-dir={ROOT}", "--", *shlex.split(command))
        wait_for_step(sink, 3, lambda: process.poll() is None)
        made.kill(nodes[0])
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "goes on by itself" in output
    assert losses(sink) == pytest.approx(losses(f"{tmp_path}/alone"), rel=1e-3)


GROWS = """\
from segray import train
from segray.cli import main
from segray.worker import Placement

train._RESIZE_SECONDS = 5.0
train._place = lambda *_: Placement(device="cpu", workers=(1, 2), worker_cpus=0.9)  # one to a node, as on GPUs
main("train")
"""


@pytest.mark.slow
def test_a_node_that_comes_is_taken_up(fields: Path, tmp_path: Path, ray_cluster: None) -> None:
    alone = batch_normless(fields, tmp_path / "alone", num_epochs=40)
    run(alone)
    settings = dataclasses.replace(
        alone, sink=str(tmp_path / "sink"), parallel=Parallel(workers="1:2", num_threads=1, device="cpu")
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, cluster(folder) as made:
        made.add(*head_options(made), num_cpus=0)
        made.add(num_cpus=1)
        (tmp_path / "grows.py").write_text(GROWS)
        command = ["python", str(tmp_path / "grows.py"), *shlex.split(settings.command())[2:]]
        process = made.start("job", "submit", f"--working-dir={ROOT}", "--", *command)
        wait_for_step(Path(settings.sink), 3, lambda: process.poll() is None)
        made.add(num_cpus=1)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    workers = [line["num_workers"] for line in Journal(settings.sink).metrics() if line["kind"] == "steps"]
    assert (workers[0], workers[-1]) == (1, 2)
    assert losses(settings.sink) == pytest.approx(losses(alone.sink), rel=1e-3)


@pytest.mark.slow
def test_data_that_changed_behind_its_index_is_named(tmp_path: Path, ray_cluster: None) -> None:
    from segray.pack import Pack, pack

    demo.draw(Draw(sink=str(tmp_path / "fields"), num_scenes=12, first_seed=0))
    pack(Pack(source=str(tmp_path / "fields"), sink=str(tmp_path / "shards"), val_fraction=0.3))
    [shard] = (tmp_path / "shards/train").glob("*.tar")
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(RunError, match=r"shard-\w+\.tar#.*: the image cannot be decoded.*the same command goes on"):
        train(job(tmp_path / "shards", tmp_path / "sink"))


def test_two_workers_pack_train_label_and_evaluate_from_and_to_object_storage(s3: Any, ray_cluster: None) -> None:
    from segray.label import Label, label
    from segray.pack import Pack, pack

    root = "s3://segray/train-test"
    demo.draw(Draw(sink=f"{root}/fields", num_scenes=16, first_seed=0))
    pack(Pack(source=f"{root}/fields", sink=f"{root}/shards", shard_images=8, val_fraction=0.3))
    settings = job(
        f"{root}/shards",
        f"{root}/model",
        resize=160,
        loss="ce+0.5*dice",
        class_weights="balanced",
        auxiliary=0.4,
        optimization=Optimization(learning_rate=3e-3, ema=0.5, clip=1.0, accumulate=2),
        parallel=Parallel(workers="2", num_threads=1),
    )
    assert f"wrote {root}/model/checkpoint.safetensors" in run(settings)
    journal, trained = Journal(settings.sink), model.load(f"{root}/model/checkpoint.safetensors")
    steps = [line for line in journal.metrics() if line["kind"] == "steps"]
    assert {line["num_workers"] for line in steps} == {2}
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert trained.preprocessing.resize == 160
    model_file = f"{root}/model/checkpoint.safetensors"
    label(Label(source=f"{root}/shards/val", sink=f"{root}/labels", model=model_file, dtype="float32"))
    evaluation = evaluate(Evaluate(sink=f"{root}/labels", targets=f"{root}/fields/targets"))
    seen = json.loads(journal.read(f"validation/epoch-{trained.origin['metrics']['epoch']:04d}.json") or b"")
    assert evaluation.confusion_matrix.counts.tolist() == seen["confusion"], "labelling is what was validated"


@pytest.mark.slow
def test_without_a_better_epoch_it_ends_early(fields: Path, tmp_path: Path, ray_cluster: None) -> None:
    settings = job(fields, tmp_path, num_epochs=9, patience=1, optimization=Optimization(learning_rate=1e-12))
    run(settings)
    told = Journal(str(tmp_path)).training()
    assert told is not None
    assert told["status"] == "stopped early"
    # Batch norms move though weights do not.
    assert len([line for line in Journal(str(tmp_path)).metrics() if line["kind"] == "epoch"]) < 9
    assert "stopped early" in run(settings)[-1]


def test_a_loss_that_is_no_number_ends_it_and_names_the_images(fields: Path, tmp_path: Path, ray_cluster: None) -> None:
    settings = job(fields, tmp_path, optimization=Optimization(optimizer="sgd", learning_rate=1e30, warm_up=0.0))
    with pytest.raises(
        RunError, match=r"the loss is (nan|inf) in step \d.*shard-000000\.tar#scene-000000\d, "
    ) as raised:
        train(settings)
    assert "--learning-rate" in str(raised.value)
    told = Journal(str(tmp_path)).training()
    assert told is not None
    assert told["status"] == "failed"


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(
    fields: Path, tmp_path: Path, ray_cluster: None
) -> None:
    printed = "\n".join(run(job(fields, tmp_path / "sink", dry_run=True)))
    for text in ("8 images to train on, 8 to validate on", "parameters; 6 steps of 4", "s each", "GiB", "nothing was"):
        assert text in printed
    assert not (tmp_path / "sink").exists()


@pytest.mark.slow
def test_a_checkpoint_is_trained_further_with_other_classes(
    trained: tuple[Train, list[str]], tmp_path: Path, ray_cluster: None
) -> None:
    before, _ = trained
    source = tmp_path / "source"
    source.mkdir()
    image, target = encoded_pair(np.repeat(np.arange(2, dtype=np.uint8), 32 * 64).reshape(64, 64))
    for shard in range(2):
        members = {f"{n}.{end}": data for n in range(4) for end, data in (("jpg", image), ("target.png", target))}
        write_tar(source / f"{shard}.tar", members)
    (source / "classes.json").write_text(json.dumps(["dark", "bright"]))
    start = f"{before.sink}/checkpoint.safetensors"
    printed = run(job(source, tmp_path / "sink", model=start, arguments="{}", num_epochs=1))
    assert any("random is segmentation_head.0.bias, segmentation_head.0.weight" in line for line in printed)
    after = model.load(f"{tmp_path}/sink/checkpoint.safetensors")
    assert after.classes.names == ("dark", "bright")
    assert after.preprocessing == model.load(start).preprocessing


def test_a_class_without_a_pixel_is_named_before_anything_is_trained(
    fields: Path, tmp_path: Path, ray_cluster: None
) -> None:
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps([*CLASSES.names, "gnome", "flamingo"]))
    with pytest.raises(SourceError, match="no target to train on has a pixel of gnome, flamingo"):
        train(job(fields, tmp_path / "sink", classes=str(classes)))
    assert not (tmp_path / "sink").exists()


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


GPU_NODE = {"Alive": True, "Resources": {"GPU": 8.0, "object_store_memory": 1e9}}
CPU_NODE = {"Alive": True, "Resources": {"CPU": 16.0, "object_store_memory": 1e9}}
BOTH_NODE = {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 8.0, "object_store_memory": 1e9}}


@pytest.mark.parametrize(
    ("workers", "device", "nodes", "placed"),
    [
        ("1:8", "cuda", [CPU_NODE], ("cuda", (1, 8), 0.0)),  # as cluster/kuberay/rayjob-train.yaml begins
        ("1:8", "cuda", [CPU_NODE, GPU_NODE], ("cuda", (1, 8), 0.0)),
        (None, "auto", [CPU_NODE, GPU_NODE], ("cuda", 8, 0.0)),
        (None, "auto", [BOTH_NODE], ("cuda", 8, 1.0)),
        (None, "auto", [CPU_NODE], ("cpu", 1, 0.9)),
        ("8:16", "cpu", [CPU_NODE], ("cpu", (8, 16), 0.5)),
    ],
)
def test_workers_ask_for_what_their_nodes_have(
    workers: str | None, device: Any, nodes: list[dict[str, Any]], placed: tuple[Any, ...]
) -> None:
    settings = job("source", "sink", batch_size=16, parallel=Parallel(workers=workers, device=device))
    placement = _place(settings, nodes)
    assert (placement.device, placement.workers, placement.worker_cpus) == placed


def test_tasks_share_what_workers_leave() -> None:
    on_gpus = Placement(device="cuda", workers=(1, 8), worker_cpus=0.0)
    tasks = on_gpus.tasks(4, {"CPU": 16.0, "object_store_memory": 8e9})
    assert (tasks.num_cpus, tasks.concurrency, tasks.store_bytes) == (1.0, 4, 1e9)
    assert on_gpus.tasks(8, {"CPU": 4.0, "object_store_memory": 8e9}).num_cpus == 0.25
    assert on_gpus.tasks(8, {"object_store_memory": 8e9}).num_cpus == 0, "while no node with CPUs is there"
    beside = Placement(device="cpu", workers=2, worker_cpus=0.9).tasks(2, {"CPU": 2.0, "object_store_memory": 8e9})
    assert beside.num_cpus < 0.1, "there is room for them on whole CPUs that workers took"
    assert beside.concurrency == 2


def test_shards_of_other_classes_are_not_validated_on(fields: Path, tmp_path: Path, ray_cluster: None) -> None:
    for shard in fields.glob("*.tar"):
        (tmp_path / shard.name).symlink_to(shard)
    (tmp_path / "classes.json").write_text(json.dumps([*CLASSES.names[::-1]]))
    with pytest.raises(SettingsError, match="has the classes track, weed, crop, soil, and"):
        train(job(fields, tmp_path / "sink", val=str(tmp_path)))


def test_settings_that_do_not_fit_are_refused(fields: Path, tmp_path: Path, ray_cluster: None) -> None:
    with pytest.raises(SettingsError, match="--crop 63 is no multiple of"):
        train(job(fields, tmp_path, model="unetplusplus_tu-mobilenetv3_small_050", augmentation=Augmentation(crop=63)))
    with pytest.raises(SettingsError, match="--batch-size 9 is more than the 8 images"):
        train(job(fields, tmp_path, batch_size=9))
    with pytest.raises(SettingsError, match="--batch-size 3 is too small to be shared by 4 workers"):
        train(job(fields, tmp_path, batch_size=3, parallel=Parallel(workers="2:4")))
    with pytest.raises(SettingsError, match="cannot learn from one crop at a time"):
        train(job(fields, tmp_path, model="deeplabv3_resnet18", arguments="{}", batch_size=1))
    with pytest.raises(ModelError, match="no model 'nonsense'"):
        train(job(fields, tmp_path, model="nonsense"))
    of_bands = Preprocessing(channels=("red", "nir"), mean=(0, 0), std=(1, 1))
    path = tmp_path / "bands.safetensors"
    path.write_bytes(model.untrained("unet_resnet18", CLASSES, preprocessing=of_bands).to_bytes())
    with pytest.raises(SettingsError, match=r"sees the bands red, nir, and .* holds red, green and blue \(images\)"):
        train(job(fields, tmp_path, model=str(path), arguments="{}"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_epochs": 0}, "--num-epochs 0"),
        ({"patience": 0}, "--patience 0"),
        ({"resize": 0}, "--resize 0"),
        ({"save_steps": 0}, "--save-steps 0"),
        ({"seed": -1}, "--seed -1"),
        ({"auxiliary": -0.1}, "--auxiliary -0.1"),
        ({"arguments": "decoder"}, "not JSON"),
        ({"arguments": "[1]"}, "JSON object"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        job("source", "sink", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": "0"}, "--workers 0: give a number from 1 on"),
        ({"workers": "4:2"}, "--workers 4:2"),
        ({"workers": "many"}, "--workers many"),
        ({"num_threads": 0}, "--num-threads 0"),
        ({"dtype": "float16", "strategy": "fsdp"}, "--strategy fsdp; bfloat16 does"),
    ],
)
def test_ways_to_compute_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Parallel(**settings)


def test_the_command_gives_the_settings_back() -> None:
    settings = job("a folder", "sink", seed=3, augmentation=Augmentation(scale=(1.0, 1.5)), dry_run=True)
    code = (
        "import shlex, sys, tyro; from segray.train import Augmentation, Optimization, Parallel, Train; "
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


def write_bands(folder: Path) -> int:
    """A scene of four bands, of which the last alone tells a class from the next; how many of its pixels hold data."""
    height, width = 192, 224
    target = (np.indices((height, width)) // 24).sum(0).astype(np.uint8) % 3
    samples = np.random.default_rng(0).integers(5000, 6000, (4, height, width), np.uint16)
    samples[3] += target * np.uint16(1500)
    samples[:, :10] = 0
    how: dict[str, Any] = {"driver": "GTiff", "height": height, "width": width, "crs": "EPSG:32633"}
    how |= {"transform": Affine(10, 0, 500_000, 0, -10, 5_400_000)}
    for name in ("images", "targets"):
        (folder / name).mkdir()
    with rasterio.open(folder / "images/field.tif", "w", count=4, dtype="uint16", nodata=0, **how) as file:
        file.write(samples)
        file.descriptions = ("red", "green", "blue", "nir")
        file.scales = (1e-4,) * 4
    with rasterio.open(folder / "targets/field.tif", "w", count=1, dtype="uint8", **how) as file:
        file.write(target, 1)
    (folder / "classes.json").write_text(json.dumps(["soil", "crop", "water"]))
    return int((samples[0] > 0).sum())


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, Path, int]:
    """A scene with its target, its windows in shards, and how many of its pixels hold data."""
    folder = tmp_path_factory.mktemp("bands")
    (folder / "scenes").mkdir()
    num_valid = write_bands(folder / "scenes")
    settings: dict[str, Any] = {
        "window": 24,
        "shard_images": 16,
        "val_fraction": 0.3,
        "block_metres": 640.0,
        "gap_metres": 0.0,
    }
    pack(Pack(source=str(folder / "scenes"), sink=str(folder / "shards"), dataset="scenes", **settings))
    return folder / "scenes", folder / "shards", num_valid


def test_what_is_trained_on_bands_labels_the_scene(bands: tuple[Path, Path, int], tmp_path: Path) -> None:
    scenes, shards, num_valid = bands
    still = Augmentation(crop=24, scale=(1.0, 1.0), rotation=0.0)
    printed = run(job(shards, tmp_path / "model", num_epochs=8, augmentation=still))
    assert printed[-1].startswith("wrote ")
    checkpoint = model.load(f"{tmp_path}/model/checkpoint.safetensors")
    fed = checkpoint.preprocessing
    assert fed.bands == ("red", "green", "blue", "nir")
    assert fed.mean[0] == pytest.approx(0.55, abs=0.01), "of reflectances, where there are data"
    assert fed.std[3] > 3 * fed.std[0]
    label(
        Label(
            source=f"{scenes}/images",
            sink=str(tmp_path / "labels"),
            model=f"{tmp_path}/model/checkpoint.safetensors",
            scenes=Scenes(size=96, halo=32),
            actors="1",
        )
    )
    found = evaluate(Evaluate(sink=str(tmp_path / "labels"), targets=str(scenes / "targets")))
    assert found.num_images == 6, "windows"
    assert found.confusion_matrix.counts.sum() == num_valid
    assert found.confusion_matrix.pixel_accuracy() > 0.7
    page = page_data(report(Report(sink=str(tmp_path / "model"))))
    assert page["worst"]
    for window in page["worst"]:
        assert window["missing"] is None
        assert window["image"].startswith("data:image/jpeg")


def test_bands_and_images_do_not_go_together(
    bands: tuple[Path, Path, int], fields: Path, trained: tuple[Train, list[str]], tmp_path: Path
) -> None:
    _, shards, _ = bands
    ours = f"{trained[0].sink}/checkpoint.safetensors"
    classes = f"{shards}/classes.json"
    with pytest.raises(SettingsError, match=r"to train on, and .* the bands red, green, blue, nir to validate on"):
        train(job(fields, tmp_path, val=f"{shards}/val", classes=str(fields / "classes.json")))
    with pytest.raises(SettingsError, match=r"sees red, green and blue \(images\), and .* the bands red, green, blue"):
        train(job(shards, tmp_path, model=ours, arguments="{}", classes=classes, augmentation=Augmentation(crop=32)))
