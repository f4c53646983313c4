"""The jobs on a cluster of several nodes, submitted as a person does; the cluster asks for a token."""

import contextlib
import dataclasses
import io
import json
import os
import re
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from segray.demo import Draw, draw, scene
from segray.source import filesystem
from tests.chaos import write_source
from tests.cluster import ROOT, Cluster, cluster, head_options, submitted, wait_for_parts, write_runtime_env
from tests.label_store import newest_run
from tests.s3 import Server

NUM_PHOTOS = 1600  # a run is stopped, and a node killed, long before all are labelled
NUM_SCENES = 24
NUM_ON_GPUS = 256
L4 = {"ray.io/accelerator-type": "L4"}


@pytest.fixture(scope="module")
def nodes(s3: Server) -> Iterator[Cluster]:
    """A head without CPUs and two workers, which know of the S3 server only what a job tells them."""
    fs, _ = filesystem("s3://segray")
    write_source("s3://segray/photos", NUM_PHOTOS)
    draw(Draw(sink="s3://segray/drawn", num_scenes=NUM_SCENES, first_seed=3_000_000))
    for path in fs.ls("segray/drawn/images", detail=False):
        fs.copy(path, path.replace("drawn/images", "photos"))
    draw(Draw(sink="s3://segray/shards", num_scenes=48, first_seed=0, format="tar", shard_scenes=24))
    fs.put("segray/demo.safetensors", "segray/demo.safetensors")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # the paths of sockets are short
        without = {name: "" for name in os.environ if name.startswith("AWS_")}
        with cluster(folder, without) as made:
            made.add(*head_options(made), num_cpus=0)
            made.add(num_cpus=1)
            made.add(num_cpus=1)
            yield made


@pytest.fixture(scope="module")
def runtime_env(tmp_path_factory: pytest.TempPathFactory, s3: Server) -> str:
    return write_runtime_env(tmp_path_factory.mktemp("runtime_env"))


@dataclass
class Labelled:
    """What came of a store that took two runs: one was stopped, and in the next a node was killed."""

    stopped: str
    """The first job's log."""
    first: dict[str, Any]
    """The first run's record."""
    output: str
    """The second job's log."""
    metrics: list[str]
    """What the nodes' endpoints gave while it ran, and at last soon after."""
    afterwards: dict[str, tuple[str, int]]
    """Of the jobs that were submitted then what they said and how they ended."""


def scrape(made: Cluster) -> str:
    """What Prometheus would find, at the targets that Ray lists for it."""
    listed = json.loads(Path(f"{made.folder}/prom_metrics_service_discovery.json").read_text())
    texts = []
    for target in (target for entry in listed for target in entry["targets"]):
        with (
            contextlib.suppress(OSError),  # of a node that is gone
            urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer,
        ):
            texts.append(answer.read().decode())
    return "\n".join(texts)


@pytest.fixture(scope="module")
def labelled(nodes: Cluster, runtime_env: str) -> Labelled:
    command = submitted("label")
    sink = "s3://segray/labels"

    log_as_json = f"{runtime_env}.json.yaml"
    settings = yaml.safe_load(Path(runtime_env).read_text())
    settings["env_vars"]["SEGRAY_LOG"] = "json"
    Path(log_as_json).write_text(yaml.safe_dump(settings))
    job = nodes.start(*command[:2], "--submission-id=first", f"--runtime-env={log_as_json}", *command[2:])
    wait_for_parts(sink, job)
    told = nodes.ray("job", "stop", "first")
    assert told.returncode == 0, told.stdout
    stopped, _ = job.communicate(timeout=120)
    assert job.returncode == 0, "that is no failure"
    assert "was stopped" in told.stdout
    first = newest_run(sink)

    fs, _ = filesystem(sink)
    num_parts = len(fs.glob("segray/labels/label_maps/*/*.parquet"))
    job = nodes.start(*command[:2], f"--runtime-env={runtime_env}", *command[2:])
    wait_for_parts(sink, job, num_parts + 1)
    nodes.kill(nodes.nodes[-1])
    nodes.add(num_cpus=1)
    metrics = []
    while job.poll() is None:
        metrics.append(scrape(nodes))
        time.sleep(2)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    fs.copy("segray/drawn/targets", "segray/targets", recursive=True)
    # Side by side, as each mostly waits.
    submissions = {name: nodes.start_job(runtime_env, submitted(name)) for name in ("verify", "evaluate")}
    submissions["refused"] = nodes.start_job(runtime_env, command, "--batch-size", "0")
    afterwards = {name: (job.communicate(timeout=600)[0], job.returncode) for name, job in submissions.items()}
    return Labelled(stopped, first, output, [*metrics, scrape(nodes)], afterwards)  # by now every node has reported


def test_ray_job_stop_ends_a_run_cleanly_and_lines_of_json_name_the_run(labelled: Labelled) -> None:
    assert labelled.first["status"] == "interrupted"
    assert 0 < labelled.first["counts"]["labelled"] < NUM_PHOTOS
    lines = [json.loads(line) for line in labelled.stopped.splitlines() if line.startswith('{"time"')]
    assert lines[-1]["message"] == "segray: stopped"
    assert {line["run_id"] for line in lines} == {labelled.first["run_id"]}
    [told] = [line for line in lines if "counts" in line]
    assert told["counts"] == labelled.first["counts"]


def test_the_next_run_goes_on_and_labels_each_image_once_though_a_node_is_killed(
    labelled: Labelled,
) -> None:
    assert re.search(r"\d+ of \S+ images, ", labelled.output), "no progress in the job's log"
    counts = newest_run("s3://segray/labels")["counts"]
    assert counts["present"] >= labelled.first["counts"]["labelled"]
    assert counts["seen"] == counts["present"] + counts["labelled"] == NUM_PHOTOS + NUM_SCENES
    verdict, status = labelled.afterwards["verify"]
    assert status == 0, verdict


def test_what_reads_a_store_is_submitted_as_its_docstring_says(labelled: Labelled) -> None:
    evaluation, status = labelled.afterwards["evaluate"]
    assert status == 0, evaluation
    miou = re.search(r"mIoU (0\.\d+)", evaluation)
    assert miou, evaluation
    assert float(miou[1]) > 0.8
    assert f"on {NUM_SCENES} images" in evaluation


@pytest.mark.slow
@pytest.mark.parametrize("job", ["report", "compact"])
def test_other_readers_of_a_store_are_submitted_likewise(
    nodes: Cluster, runtime_env: str, labelled: Labelled, job: str
) -> None:
    done = nodes.submit(runtime_env, submitted(job))
    assert done.returncode == 0, done.stdout
    if job == "report":
        fs, _ = filesystem("s3://segray")
        assert b"<html" in fs.cat_file("segray/report.html")


@pytest.mark.slow
def test_a_model_is_trained_where_the_cluster_has_a_place_for_it(nodes: Cluster, runtime_env: str) -> None:
    done = nodes.submit(runtime_env, submitted("train"), "--model", "unet_tu-mobilenetv3_small_050", "--crop", "96")
    assert done.returncode == 0, done.stdout
    fs, _ = filesystem("s3://segray")
    assert fs.info("segray/model/checkpoint.safetensors")["size"] > 2**20


def test_a_job_that_is_refused_fails_at_the_command_line_too_and_says_why(labelled: Labelled) -> None:
    printed, status = labelled.afterwards["refused"]
    assert status == 1
    assert "--batch-size 0: must be at least 1" in printed
    assert "exit code 2" in printed


def test_without_the_token_nothing_is_submitted(nodes: Cluster) -> None:
    stranger = dataclasses.replace(nodes, environment={**nodes.environment, "RAY_AUTH_TOKEN": "0" * 64})
    done = stranger.ray("job", "submit", "--", "true")
    assert done.returncode
    assert "oken" in done.stdout


def test_the_endpoint_has_every_metric_that_the_dashboard_names(labelled: Labelled) -> None:
    dashboard = json.loads((ROOT / "cluster/grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    named = {name for expression in expressions for name in re.findall(r"\bray_\w+", expression)}
    assert len(named) > 5
    labels = defaultdict(set)
    for name, pairs in re.findall(r"^(ray_\w+)\{(.*)\}", "\n".join(labelled.metrics), re.MULTILINE):
        labels[name].update(re.findall(r'(\w+)="', pairs))
    assert not named - labels.keys()
    for expression in expressions:
        for name, selector in re.findall(r"(ray_\w+)\{([^}]*)\}", expression):
            by = re.findall(r"\bby \(([\w, ]*)\)", expression)
            wanted = {*re.findall(r"(\w+)=", selector), *(word for some in by for word in some.split(", "))}
            assert not wanted - labels[name], f"{name} has no such label"
    newest = newest_run("s3://segray/labels")
    counted = rf'^ray_segray_images_total\{{.*outcome="(\w+)",run_id="{newest["run_id"]}".* (\S+)$'
    total = {outcome: float(value) for outcome, value in re.findall(counted, labelled.metrics[-1], re.MULTILINE)}
    assert total["present"] == newest["counts"]["present"]
    # What is counted in a process's last seconds may go with it untold.
    assert newest["counts"]["labelled"] / 2 < total["labelled"] <= newest["counts"]["labelled"]


def where(made: Cluster, job_id: str, pattern: str) -> set[str]:
    """The nodes on which tasks of such names ran, or run."""
    tasks = made.listed("tasks", f"job_id={job_id}")
    return {task["node_id"] for task in tasks if task["node_id"] and re.search(pattern, task["name"])}


def predicted_on(made: Cluster, job_id: str) -> set[str]:
    """The nodes on which images were predicted; a task of an actor is named after its method."""
    return where(made, job_id, r"_Predictor.*\.submit")


def write_larger(source: str) -> None:
    """Photographs no two of which are alike."""
    image = Image.fromarray(scene(0)[0]).resize((192, 144))
    buffers = [io.BytesIO() for _ in range(NUM_ON_GPUS)]
    for index, buffer in enumerate(buffers):
        image.save(buffer, "JPEG", comment=str(index).encode())
    fs, path = filesystem(source)
    fs.pipe({f"{path}/{index}.jpg": buffer.getvalue() for index, buffer in enumerate(buffers)})


@pytest.mark.slow
def test_models_are_where_gpus_are_and_all_else_is_not_and_a_lost_gpu_costs_what_was_in_flight(
    nodes: Cluster, runtime_env: str
) -> None:
    gpus = [nodes.add(num_cpus=0, num_gpus=1, labels=L4), nodes.add(num_cpus=0, num_gpus=1)]
    with_gpu = {n["node_id"] for n in nodes.listed("nodes", "state=ALIVE") if n["resources_total"].get("GPU")}
    assert len(with_gpu) == 2
    sink = "s3://segray/gpus"
    write_larger("s3://segray/larger")
    job = nodes.start(
        *("job", "submit", f"--runtime-env={runtime_env}", "--working-dir", ".", "--"),
        *("python", "tests/logical_gpus.py", "s3://segray/larger", sink),
        # Enough to do that one model is not enough.
        *("--model", "s3://segray/demo.safetensors", "--tiling.size", "32", "--tiling.overlap", "16"),
        *("--actors", "1:2"),
    )
    running: list[dict[str, Any]] = []
    deadline = time.monotonic() + 300
    while len(running) < 2:  # it began with one
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        alive = nodes.listed("actors", "state=ALIVE")
        running = [actor for actor in alive if "_Predictor" in actor["class_name"]]
    assert {actor["node_id"] for actor in running} == with_gpu
    job_id = running[0]["job_id"]
    while predicted_on(nodes, job_id) != with_gpu:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
    nodes.kill(gpus[1])
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, output

    told = newest_run(sink)
    assert told["counts"]["seen"] == told["counts"]["labelled"] == NUM_ON_GPUS
    assert told["placement"]["actor_gpus"] == 1
    assert told["num_lost"] <= NUM_ON_GPUS / 2
    assert predicted_on(nodes, job_id) == with_gpu
    elsewhere = where(nodes, job_id, "_fetch|_decode|_encode|Write")
    assert elsewhere
    assert not elsewhere & with_gpu
    verify = [word.replace("labels", "gpus").replace("photos", "larger") for word in submitted("verify")]
    verified = nodes.submit(runtime_env, verify)
    assert verified.returncode == 0, verified.stdout
    nodes.kill(gpus[0])
