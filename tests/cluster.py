"""A Ray cluster of several nodes on this machine, made with `ray start` as on many, its tokens checked."""

import contextlib
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from segray.source import filesystem
from tests.s3 import free_port

START_SECONDS = 120
OBJECT_STORE_BYTES = 256 * 2**20
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]


@dataclass
class Cluster:
    """Nodes, each a `ray start --block` with all that it started."""

    folder: str
    """Where Ray keeps its session; short, as sockets lie in it."""
    environment: dict[str, str]
    """That of the nodes, and of whoever submits a job to them."""
    gcs: str
    """Where nodes find the head."""
    dashboard: str
    """Where jobs are submitted."""
    nodes: list[psutil.Popen] = field(default_factory=list)
    """The head, then the workers."""

    def add(
        self,
        *options: str,
        num_cpus: int,
        num_gpus: int = 0,
        labels: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> psutil.Popen:
        """Starts a node and waits until it runs: those that start at once get in each other's way.

        Args:
            options: more of `ray start`'s.
            num_cpus: logical ones.
            num_gpus: likewise.
            labels: of the node.
            prefix: what runs the command elsewhere, such as in a network namespace.
        """
        shown = ",".join(f"{name}={value}" for name, value in (labels or {}).items())
        command = [
            *(*prefix, f"{BIN}/ray", "start", "--block", f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"),
            *(f"--object-store-memory={OBJECT_STORE_BYTES}", f"--dashboard-agent-listen-port={free_port()}"),
            *("--min-worker-port=0", "--max-worker-port=0"),  # or two nodes of a machine would try the same ones
            *((f"--labels={shown}",) if shown else ()),
            *(options or (f"--address={self.gcs}", "--node-ip-address=127.0.0.1")),
        ]
        path = Path(f"{self.folder}/{time.time_ns()}.log")
        with path.open("w") as log:
            # A session of its own: Ctrl-C at a terminal is for the tests.
            node = psutil.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.nodes.append(node)
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in path.read_text():
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the node does not start: {path.read_text()}")
            time.sleep(0.2)
        return node

    def kill(self, node: psutil.Popen) -> None:
        """Ends a node with all that runs on it, without a word, as a machine that is taken away."""
        for process in [*_family(node), node]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()
        self.nodes.remove(node)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts `ray` with these arguments, as a person types them at a shell."""
        return subprocess.Popen(
            [f"{BIN}/ray", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What `ray` says to these arguments, and how it ends."""
        started = self.start(*arguments)
        output, _ = started.communicate(timeout=600)
        return subprocess.CompletedProcess(started.args, started.returncode, output)

    def start_job(self, runtime_env: str, command: Sequence[str], *more: str) -> subprocess.Popen[str]:
        """Submits what is `submitted`, with more options for the job; the process ends with it."""
        return self.start(*command[:2], f"--runtime-env={runtime_env}", *command[2:], *more)

    def submit(self, runtime_env: str, command: Sequence[str], *more: str) -> subprocess.CompletedProcess[str]:
        """Submits likewise, and waits for its end."""
        job = self.start_job(runtime_env, command, *more)
        output, _ = job.communicate(timeout=600)
        return subprocess.CompletedProcess(job.args, job.returncode, output)

    def listed(self, what: str, *filters: str) -> list[dict[str, Any]]:
        """What Ray's state API tells."""
        options = [f"--filter={condition}" for condition in filters]
        command = [f"{BIN}/ray", "list", what, "--detail", "--format=json", "--limit=10000", *options]
        told = subprocess.check_output(command, env=self.environment, text=True)  # warnings go to stderr
        rows: list[dict[str, Any]] = json.loads(told if told.startswith("[") else "[]")
        return rows


@contextlib.contextmanager
def cluster(folder: str, environment: Mapping[str, str] | None = None, host: str = "127.0.0.1") -> Iterator[Cluster]:
    """An empty cluster; its nodes end with it.

    Args:
        folder: an empty one.
        environment: what else its nodes are told.
        host: the head's address.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    gcs, dashboard = (f"{host}:{free_port()}" for _ in range(2))
    made = Cluster(
        folder=folder,
        environment={
            **kept,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_API_SERVER_ADDRESS": f"http://{dashboard}",
            "RAY_idle_worker_killing_time_threshold_ms": "60000",
            # A node that is lost is given up within seconds, and what is counted is told as soon.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_metrics_report_interval_ms": "2000",
            **(environment or {}),
        },
        gcs=gcs,
        dashboard=f"http://{dashboard}",
    )
    try:
        yield made
    finally:
        for node in reversed(list(made.nodes)):
            made.kill(node)


def head_options(made: Cluster) -> tuple[str, ...]:
    """What makes a node the head."""
    host, gcs_port = made.gcs.split(":")
    return (
        *("--head", f"--node-ip-address={host}", f"--port={gcs_port}", f"--temp-dir={made.folder}"),
        *(f"--dashboard-host={host}", f"--dashboard-port={made.dashboard.rpartition(':')[2]}"),
        f"--ray-client-server-port={free_port()}",
    )


def _family(node: psutil.Popen) -> list[psutil.Popen]:
    try:
        return list(node.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def write_runtime_env(folder: Path) -> str:
    """Writes the project's file with lines changed as its reader would change them; its path."""
    settings = yaml.safe_load((ROOT / "cluster/runtime_env.yaml").read_text())
    settings["excludes"].remove("tests/")  # a driver of ours is in it
    settings["env_vars"] |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    path = folder / "runtime_env.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def submitted(job: str) -> list[str]:
    """How a job's docstring says that it is submitted, behind `ray`, with URIs that are there."""
    text = (ROOT / f"jobs/{job}.py").read_text().replace("\\\n", " ")
    [command] = re.findall(r"^ *ray (job submit .*)$", text, re.MULTILINE)
    command = command.replace("--num-epochs 30", "--num-epochs 1").replace("s3://bucket", "s3://segray")
    return shlex.split(command.replace("deeplabv3_resnet50", "s3://segray/demo.safetensors"))


def wait_for_parts(sink: str, job: subprocess.Popen[str], least: int = 1) -> None:
    """Waits until a running job has committed so many parts."""
    fs, path = filesystem(sink)
    deadline = time.monotonic() + 300
    while len(fs.glob(f"{path}/label_maps/*/*.parquet")) < least:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, "nothing is committed"
        time.sleep(0.2)
