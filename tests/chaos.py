"""Interrupts a job in every way that one machine can show, runs it again until it ends well, and verifies the store.

    python -m tests.chaos [--num-runs 50] [--first-seed 0]

A real S3 server behind a proxy that injects faults, a Ray cluster of two nodes, and jobs in processes
of their own. The seed decides the fault, its moment and its victim; `--first-seed N --num-runs 1` plays
run N again. Each run has a sink of its own; it is sound when the same command ends with status 0 in at most
four tries, and `segray verify SINK SOURCE` finds each image exactly once.

The disk that fills up is a small tmpfs, which only root can mount; for others that fault is left out. Where
AWS_ENDPOINT_URL is set, the S3 server is that one, and it is not killed.
"""

import contextlib
import functools
import http.client
import io
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import psutil
import tyro
from PIL import Image

from segray.demo import scene
from tests.s3 import Server

ROOT = Path(__file__).parents[1]
SOURCE = "s3://segray/chaos"
NUM_SHARDS = 4
DISK_BYTES = 64 * 2**20
FAULT_SECONDS = 6.0
FAULTS = (
    *("driver killed", "worker killed", "actor killed", "node lost", "store killed", "Ctrl-C"),
    *("503", "reset", "truncated", "slow", "disk full"),
)
MAX_TRIES = 4


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """Runs a job many times, each with a fault."""

    num_runs: int = 50
    """How many."""
    first_seed: int = 0
    """The seed of the first; the others follow."""
    num_images: int = 1200
    """Of the source; half of them loose, half in shards."""


class Proxy(ThreadingHTTPServer):
    """Hands requests on to the S3 server, some of them wrongly."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = target
        self.fault: str | None = None
        self.random = random.Random(0)
        self.num_faults = 0
        self.requests: list[str] = []

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is nothing to tell."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_hit = self.server.fault is not None and self.server.random.random() < 0.4
        fault = self.server.fault if is_hit else None
        self.server.num_faults += is_hit
        self.server.requests.append(f"{self.command} {self.path}")
        if fault == "slow":
            time.sleep(self.server.random.uniform(0.5, 3))
        if fault == "503":
            self._answer(503, {}, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>")
            return
        if fault == "reset" and self.server.random.random() < 0.5:
            self._reset()  # before it is done; else after it was done, and nobody was told
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
        except OSError:  # the server is down
            self._reset()
            return
        finally:
            connection.close()
        if fault == "reset":
            self._reset()
            return
        cut = len(data) // 2 if fault == "truncated" and self.command == "GET" else len(data)
        pause = self.server.random.uniform(0.5, 3) if fault == "slow" else 0.0
        self._answer(answer.status, dict(answer.getheaders()), data, cut, pause)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes, cut: int | None = None, pause: float = 0.0
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        half = len(data) // 2
        self.wfile.write(data[: min(half, cut or half)])
        time.sleep(pause)
        self.wfile.write(data[half:cut])
        self.close_connection = cut is not None and cut < len(data)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@dataclass
class World:
    """What a job runs in."""

    server: Server | None
    proxy: Proxy
    cluster: Any
    second: Any
    disk: str | None
    table: list[tuple[str, bool, bool]] = field(default_factory=list)
    """Of each run the fault, whether it struck, and whether the store was sound."""

    def kill_worker(self, rng: random.Random, *, is_actor: bool) -> str:
        """Kills one of Ray's workers of the running job."""
        workers = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                name = " ".join(process.cmdline())
                is_worker = name.startswith("ray::") and "Ledger" not in name
                # With one of its agents a whole node would go, and this is not that fault.
                if is_worker and "Agent" not in name and ("Predictor" in name) == is_actor:
                    workers.append(process)
        if not workers:
            return "no victim"
        victim = rng.choice(workers)
        with contextlib.suppress(psutil.Error):
            name = " ".join(victim.cmdline())
            victim.kill()
            return name[:40]
        return "it had ended"

    def kill_node(self) -> str:
        """Takes the second node away, and puts another in its place."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self.cluster.add_node(num_cpus=2)
        return "second node"

    def kill_server(self) -> str:
        """Kills the S3 server and starts it again."""
        assert self.server is not None
        self.server.kill()
        time.sleep(2)
        self.server.start()
        return "for 2 s"

    def fill_disk(self, job: subprocess.Popen[str]) -> str:
        """Leaves no room on the sink's disk, until the job has ended."""
        ballast = Path(f"{self.disk}/ballast")
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**12))
        num_bytes = ballast.stat().st_size
        job.wait(600)
        ballast.unlink()
        return f"{num_bytes} bytes of ballast"

    def faults(self) -> list[str]:
        """What can happen here."""
        impossible = {"store killed": self.server is None, "disk full": self.disk is None}
        return [name for name in FAULTS if not impossible.get(name)]

    def strike(self, name: str, job: subprocess.Popen[str], rng: random.Random) -> str:
        """Lets it happen to a job; what it hit."""
        match name:
            case "driver killed" | "Ctrl-C":
                os.kill(job.pid, signal.SIGKILL if name == "driver killed" else signal.SIGINT)
                return f"process {job.pid}"
            case "worker killed" | "actor killed":
                return self.kill_worker(rng, is_actor=name == "actor killed")
            case "node lost":
                return self.kill_node()
            case "store killed":
                return self.kill_server()
            case "disk full":
                return self.fill_disk(job)
            case _:
                return self.disturb(rng, name)

    def disturb(self, rng: random.Random, kind: str) -> str:
        """Has the proxy spoil some requests for a while."""
        before, self.proxy.random, self.proxy.fault = self.proxy.num_faults, rng, kind
        time.sleep(FAULT_SECONDS)
        self.proxy.fault = None
        return f"{self.proxy.num_faults - before} requests"


@contextlib.contextmanager
def s3_server() -> Iterator[Server | None]:
    """An S3 server of our own, to which the environment points; None where it points to one already."""
    if "AWS_ENDPOINT_URL" in os.environ:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder)
        os.environ |= server.environment
        try:
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def proxied(endpoint: str) -> Iterator[Proxy]:
    """A proxy before a server of this machine."""
    proxy = Proxy(int(endpoint.rpartition(":")[2]))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()


@contextlib.contextmanager
def small_disk() -> Iterator[str | None]:
    """A folder on a disk of its own, or None to those who may not mount one."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            yield None
            return
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def world(num_images: int) -> Iterator[World]:
    """Server, proxy, source, disk and cluster; the environment points at them."""
    from ray.cluster_utils import Cluster

    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk())
        server = stack.enter_context(s3_server())
        proxy = stack.enter_context(proxied(os.environ["AWS_ENDPOINT_URL"]))
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.server_port}"
        write_source(SOURCE, num_images)
        os.environ["RAY_idle_worker_killing_time_threshold_ms"] = "60000"  # as a run does for a cluster of its own
        head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 2**29}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        stack.callback(cluster.shutdown)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield World(server, proxy, cluster, cluster.add_node(num_cpus=2), disk)


def write_source(source: str, num_images: int) -> None:
    """Small drawn photographs, loose and in tar shards, no two alike."""
    fs, _ = fsspec.core.url_to_fs(source, use_listings_cache=False)
    drawn = [Image.fromarray(scene(seed)[0]).resize((96, 72)) for seed in range(8)]

    def jpeg(index: int) -> bytes:
        buffer = io.BytesIO()
        drawn[index % 8].save(buffer, "JPEG", quality=60 + index // 8 % 36, comment=str(index).encode())
        return buffer.getvalue()

    num_loose, num_members = num_images // 2, num_images // 2 // NUM_SHARDS
    fs.pipe({f"{source}/loose/{index:04d}.jpg": jpeg(index) for index in range(num_loose)})
    for shard in range(NUM_SHARDS):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for member in range(num_members):
                data = jpeg(num_loose + shard * num_members + member)
                info = tarfile.TarInfo(f"{member:04d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        fs.pipe_file(f"{source}/shards/{shard:06d}.tar", buffer.getvalue())


def start(*arguments: str) -> subprocess.Popen[str]:
    """A job in a process of its own, whose Ctrl-C is its own too."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def run(made: World, seed: int) -> bool:
    """One run with a fault; whether the store is sound after it."""
    rng = random.Random(seed)
    names = made.faults()
    name = names[seed % len(names)]
    folder = made.disk if name == "disk full" else "s3://segray"
    sink = f"{folder}/labels-{seed}-{time.time_ns()}"
    command = ["jobs/label.py", SOURCE, sink, "--model", "segray/demo.safetensors", "--wait", "90"]
    job = start(*command)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(job.stdout or ()), daemon=True)
    reader.start()
    deadline, moment = time.monotonic() + 120, rng.uniform(0, 12)
    # From the moment that the run holds the lock: before that there is nothing to lose.
    fs, _ = fsspec.core.url_to_fs(sink, use_listings_cache=False, skip_instance_cache=True)
    while job.poll() is None and time.monotonic() < deadline:
        if fs.exists(f"{sink}/lock"):
            break
        time.sleep(0.2)
    time.sleep(moment)
    hit = made.strike(name, job, rng) if job.poll() is None else "it had ended"
    statuses = [job.wait(600)]
    reader.join(10)
    while statuses[-1] != 0 and len(statuses) < MAX_TRIES:
        again = start(*command)
        text, _ = again.communicate(timeout=600)
        output.append(f"--- try {len(statuses) + 1}\n{text}")
        statuses.append(again.returncode)
    check = start("jobs/verify.py", sink, SOURCE)
    verdict, _ = check.communicate(timeout=600)
    is_sound = statuses[-1] == 0 and check.returncode == 0
    shown = " ".join(str(status) for status in statuses)
    print(
        f"seed {seed}: {name} ({hit}) after {moment:.1f} s; status {shown}; {'sound' if is_sound else 'NOT SOUND'}",
        flush=True,
    )
    if not is_sound:
        print("".join(output), verdict, sep="\n", flush=True)
    made.table.append((name, hit not in ("it had ended", "no victim", "0 requests"), is_sound))
    return is_sound


def main() -> None:
    """Runs them all and prints what was survived."""
    settings = tyro.cli(Chaos)
    with world(settings.num_images) as made:
        sound = [run(made, seed) for seed in range(settings.first_seed, settings.first_seed + settings.num_runs)]
    print("\n| fault | runs | struck | sound |\n|---|---|---|---|")
    for name in made.faults():
        if of_it := [(struck, is_sound) for fault, struck, is_sound in made.table if fault == name]:
            print(f"| {name} | {len(of_it)} | {sum(s for s, _ in of_it)} | {sum(s for _, s in of_it)} |")
    print(f"\n{sum(sound)} of {len(sound)}")
    sys.exit(not all(sound))


if __name__ == "__main__":
    main()
