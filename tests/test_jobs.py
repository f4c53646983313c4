"""The jobs as a person runs them: in processes of their own, from the command line."""

import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pyarrow.dataset as pads
import pytest
from PIL import Image

from segray.cli import JOBS, main
from segray.demo import Draw, draw
from tests.label_store import newest_run

ROOT = Path(__file__).parents[1]
NUM_PHOTOS, NUM_SCENES = 400, 12

OPTIONS = {
    "label": [
        *("source", "sink", "retry_rejects", "max_images", "deadline", "wait", "dry_run", "sample", "hourly_cost"),
        *("model", "weights", "classes", "column", "max_pixels", "max_rejects"),
        *("tiling.size", "tiling.overlap", "tiling.blend"),
        *(
            "scenes.size",
            "scenes.halo",
            "scenes.area",
            "scenes.bands",
            "scenes.scale",
            "scenes.offset",
            "scenes.nodata",
            "scenes.confidence",
        ),
        *("crf", "device", "dtype", "batch_size", "actors", "threads"),
    ],
    "report": ["sink", "html", "recipe", "run", "num_images", "seed", "image_id", "export"],
    "evaluate": ["sink", "targets", "recipe", "ignore_index", "json"],
    "compact": ["sink", "recipe", "wait"],
    "verify": ["sink", "source", "column", "recipe", "repair"],
    "export": ["sink", "dest", "recipe", "scene", "simplify", "processes"],
    "pack": [
        *("source", "sink", "dataset", "classes", "column", "recipe", "min_confidence"),
        *("window", "bands", "block_metres", "gap_metres"),
        *("format", "shard_images", "val_fraction", "seed"),
    ],
    "train": [
        *("source", "sink", "val", "classes", "model", "arguments", "weights", "resize", "auxiliary"),
        *("loss", "class_weights", "label_smoothing"),
        *("num_epochs", "batch_size", "patience", "save_steps", "seed", "dry_run"),
        *("crop", "scale", "class_share", "flip", "rotation", "colour", "blur"),
        *("optimizer", "learning_rate", "backbone_rate", "schedule", "warm_up", "weight_decay", "momentum"),
        *("clip", "accumulate", "ema"),
        *("workers", "strategy", "device", "dtype", "compile", "sync_batch_norm", "num_threads"),
    ],
}


def settings_of(job: str) -> type:
    settings: type = getattr(importlib.import_module(f"segray.{job}"), job.capitalize())
    return settings


def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == status, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    draw(Draw(sink=str(folder), num_scenes=NUM_SCENES, first_seed=2_000_000))
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_the_options_of_a_job_are_these_and_no_others(job: str) -> None:
    names = []
    for field in dataclasses.fields(settings_of(job)):
        is_group = get_origin(field.type) is Annotated  # which goes without its name on the command line
        kind = get_args(field.type)[0] if is_group else field.type
        nested = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        names += [inner.name if is_group else f"{field.name}.{inner.name}" for inner in nested] or [field.name]
    assert names == OPTIONS[job]


@pytest.mark.parametrize("job", JOBS)
def test_help_tells_every_option_and_imports_neither_torch_nor_ray(job: str) -> None:
    program = (
        "import sys, segray.cli\n"
        f"sys.argv = ['segray', '{job}', '--help']\n"
        "try:\n    segray.cli.main()\n"
        "finally:\n    assert not {'torch', 'ray'} & set(sys.modules)\n"
    )
    text = run("-c", program).stdout
    for option in OPTIONS[job]:
        assert option.startswith(("source", "sink", "targets", "dest")) or f"--{option.replace('_', '-')}" in text


@pytest.mark.parametrize("job", JOBS)
def test_each_job_is_a_file_that_shows_how_it_is_submitted(job: str) -> None:
    text = (ROOT / f"jobs/{job}.py").read_text()
    assert f"python jobs/{job}.py" in text
    assert "ray job submit --working-dir . -- " in text
    assert run(f"jobs/{job}.py", "--help").stdout.startswith(f"usage: jobs/{job}.py")


@pytest.mark.parametrize("readme", ["README.md", "cluster/README.md"])
def test_the_readmes_name_no_job_and_no_option_that_is_not_there(readme: str) -> None:
    text = (ROOT / readme).read_text().replace("\\\n", " ")
    commands = re.findall(
        r"(?:python jobs/(\w+)\.py|segray (label|report|evaluate|compact|verify|export|pack|train))\b([^\n`]*)", text
    )
    assert readme != "README.md" or {script or job for script, job, _ in commands} == set(JOBS)
    for script, job, arguments in commands:
        for option in re.findall(r"--([a-z][a-z-.]*)", arguments):
            assert option.replace("-", "_") in OPTIONS[script or job], f"{script or job} has no --{option}"
    every_option = {option for options in OPTIONS.values() for option in options}
    for option in re.findall(r"`--([a-z][a-z-.]*)", text):
        assert option.replace("-", "_") in every_option | {"help"}, f"no job has --{option}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "OUT", "--model", "unet_resnet34"], "nowhere: there is no such file, folder or prefix"),
        (["SCENES", "OUT", "--model", "unet_resnet34"], "unet_resnet34 has no published segmentation weights"),
        (["SCENES", "OUT", "--model", "no_such_model"], "there is no model 'no_such_model'; there are"),
        (["SCENES", "OUT", "--model", "m.safetensors"], "m.safetensors cannot be read"),
        (["SCENES", "SCENES/out", "--model", "unet_resnet34"], "lies in SOURCE"),
    ],
)
def test_what_cannot_start_is_refused_in_one_line_with_status_2(
    arguments: list[str],
    message: str,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"SCENES": str(scenes), "OUT": str(tmp_path / "out")}
    given = [re.sub("SCENES|OUT", lambda match: places[match[0]], argument) for argument in arguments]
    monkeypatch.setattr("sys.argv", ["segray", "label", *given])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        main()
    signal.signal(signal.SIGTERM, before)
    assert exit_.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("segray: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A run that Ctrl-C ended, and the same command again."""

    sink: Path
    interrupted: subprocess.CompletedProcess[str]
    num_committed: int
    """Rows in the sink after the first."""
    first: dict[str, Any]
    """The first run's record."""
    again: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def labelled(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    folder = tmp_path_factory.mktemp("labelled")
    photos, sink = folder / "photos", folder / "labels"
    shutil.copytree(scenes / "images", photos)
    with Image.open(next(photos.iterdir())) as scene:
        scene.resize((96, 72)).save(folder / "small.jpg")
    for index in range(NUM_PHOTOS):
        os.link(folder / "small.jpg", photos / f"small-{index}.jpg")
    command = ["jobs/label.py", str(photos), str(sink), "--model", "segray/demo.safetensors"]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a script, SIGINT is ignored, and that is inherited.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 600
    while not list(sink.glob("label_maps/*/*.parquet")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the job and to all that it started
    stdout, stderr = process.communicate(timeout=240)
    [record] = (json.loads(path.read_text()) for path in (sink / "runs").iterdir())
    return Labelled(
        sink=sink,
        interrupted=subprocess.CompletedProcess(command, process.returncode, stdout, stderr),
        num_committed=pads.dataset(sink / "label_maps", format="parquet").count_rows(),
        first=record,
        again=run(*command),
    )


def test_ctrl_c_keeps_what_is_committed_and_the_same_command_goes_on(labelled: Labelled) -> None:
    assert labelled.interrupted.returncode == 130, labelled.interrupted.stderr
    assert "run the same command again" in labelled.interrupted.stdout
    assert "Traceback" not in labelled.interrupted.stderr
    assert labelled.first["status"] == "interrupted"
    num_images = NUM_PHOTOS + NUM_SCENES
    assert 0 < labelled.first["counts"]["labelled"] <= labelled.num_committed < num_images
    counts = newest_run(str(labelled.sink))["counts"]
    assert counts["present"] == labelled.num_committed
    assert counts["labelled"] == num_images - labelled.num_committed
    image_ids = pads.dataset(labelled.sink / "label_maps", format="parquet").to_table(["image_id"])["image_id"]
    assert len(image_ids) == len(image_ids.unique()) == num_images


def test_the_demo_in_small_labels_evaluates_and_reports(labelled: Labelled, scenes: Path, tmp_path: Path) -> None:
    assert str(newest_run(str(labelled.sink))["counts"]["labelled"]) in labelled.again.stdout
    assert "look at it: python jobs/report.py" in labelled.again.stdout
    assert "Traceback" not in labelled.again.stderr
    assert "core_worker" not in labelled.again.stderr, "Ray's own noise"
    segray = str(Path(sys.executable).with_name("segray"))
    run(segray, "evaluate", str(labelled.sink), str(scenes / "targets"), "--json", str(tmp_path / "evaluation.json"))
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["num_images"] == NUM_SCENES
    assert evaluation["miou"] > 0.85
    run("jobs/report.py", str(labelled.sink))
    assert "<html" in (labelled.sink / "report.html").read_text()
