"""Several hosts on one machine: a Ray cluster whose nodes share neither a network nor a disk, and lose each other.

    python -m tests.netns

               ┌── s3        10.77.0.2   the S3 server
    laptop ────┼── head      10.77.0.3   Ray's head, without CPUs
    10.77.0.1  ├── worker-1  10.77.0.4   a node of one CPU
               └── worker-2  10.77.0.5   likewise

Each host is a network namespace, joined by a veth pair to a bridge of the laptop, with a /tmp, a /dev/shm, a name and
processes of its own; the disk, which has the code, is the same for all and read-only. Whoever submits jobs sits at the
laptop. Only root can make such hosts, on Linux; elsewhere this says so and ends with status 0.

They leave nothing behind, as they are gone with their processes, and those with this one, even if it is killed.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from segray.demo import Draw, draw
from segray.source import filesystem
from tests.chaos import write_source
from tests.cluster import BIN, ROOT, Cluster, cluster, head_options, submitted, wait_for_parts, write_runtime_env
from tests.label_store import newest_run
from tests.s3 import Server

INSIDE = "--inside"
NETWORK = "10.77.0"
NUM_IMAGES = 1200
SHORT_CUT_SECONDS = 2
BEGIN = time.monotonic()
# With whoever runs this, `unshare` ends, and with that all that is in the namespaces.
UNSHARE = (
    *("setpriv", "--pdeathsig=KILL"),
    *("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
)
BOOT = """
name=$1 address=$2
shift 2
mount -o remount,bind,ro /
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
printf '127.0.0.1 localhost\\n%s %s\\n' "$address" "$name" > /tmp/hosts
mount --bind /tmp/hosts /etc/hosts
hostname "$name"
ip link set lo up
exec "$@"
"""


@dataclass(frozen=True)
class Host:
    """The namespaces of a process that sleeps in them."""

    name: str
    """Also that of its link, at the bridge."""
    address: str
    """In the network."""
    pid: int
    """Of the process, as the laptop counts."""

    @property
    def enter(self) -> tuple[str, ...]:
        """What runs a command on it."""
        return ("nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--pid", "--")

    def cut_off(self) -> None:
        """Takes it from the network, as if its cable were pulled."""
        ip("link", "set", self.name, "down")

    def join(self) -> None:
        """Takes it back."""
        ip("link", "set", self.name, "up")


@dataclass(frozen=True)
class World:
    """What runs on the hosts."""

    made: Cluster
    workers: tuple[Host, Host]
    runtime_env: str
    """What jobs are told: the path of a file."""

    def start(self, worker: Host) -> psutil.Popen:
        """Has a host join the cluster."""
        options = (f"--address={self.made.gcs}", f"--node-ip-address={worker.address}")
        return self.made.add(*options, num_cpus=1, prefix=worker.enter)

    def submit(self, job: str, sink: str) -> subprocess.Popen[str]:
        """Submits what labels or verifies a sink."""
        words = [word.replace("s3://segray/labels", sink) for word in submitted(job)]
        return self.made.start(*words[:2], f"--runtime-env={self.runtime_env}", *words[2:])

    def is_given_up(self, worker: Host) -> bool:
        """Whether the head thinks that the host's node is dead."""
        return bool(self.made.listed("nodes", "state=DEAD", f"node_ip={worker.address}"))


def ip(*arguments: str, on: tuple[str, ...] = ()) -> None:
    """Runs `ip`, here or on a host."""
    subprocess.run([*on, "ip", *arguments], check=True)


def tell(what: str) -> None:
    """Prints what has been shown, and when."""
    print(f"{time.monotonic() - BEGIN:4.0f} s  {what}", flush=True)


def require(holds: object, what: str, output: str = "") -> None:
    """Ends with status 1 where something does not hold."""
    if not holds:
        sys.exit(f"{output}\n{time.monotonic() - BEGIN:4.0f} s  FAILED: {what}")


def booted(name: str, number: int, *command: str) -> list[str]:
    """What runs a command as the first process of a new host."""
    return [*UNSHARE, "sh", "-ec", BOOT, "sh", name, f"{NETWORK}.{number}", *command]


def host(name: str, number: int) -> Host:
    """A new one, in the network, with nothing on it."""
    first = psutil.Popen(booted(name, number, "sh", "-c", "echo up; exec sleep infinity"), stdout=subprocess.PIPE)
    require(first.stdout.readline() == b"up\n", f"{name} does not start")
    [sleeping] = first.children()
    made = Host(name, f"{NETWORK}.{number}", sleeping.pid)
    ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(made.pid))
    ip("link", "set", name, "master", "bridge", "up")
    ip("address", "add", f"{made.address}/24", "dev", "eth0", on=made.enter)
    ip("link", "set", "eth0", "up", on=made.enter)
    return made


@contextlib.contextmanager
def world() -> Iterator[World]:
    """The hosts, what runs on them, and images, shards and a model in the bucket."""
    ip("link", "add", "bridge", "type", "bridge")
    ip("address", "add", f"{NETWORK}.1/24", "dev", "bridge")
    ip("link", "set", "bridge", "up")
    server, head = host("s3", 2), host("head", 3)
    workers = host("worker-1", 4), host("worker-2", 5)
    os.environ |= Server("/tmp", server.address, server.enter).environment
    write_source("s3://segray/photos", NUM_IMAGES)
    draw(Draw(sink="s3://segray/shards", num_scenes=48, first_seed=0, format="tar", shard_scenes=24))
    filesystem("s3://segray")[0].put(f"{ROOT}/segray/demo.safetensors", "segray/demo.safetensors")

    folder = "/tmp/ray"
    Path(folder).mkdir()
    unknown = {name: "" for name in os.environ if name.startswith("AWS_")}  # but to those whom a job tells
    with cluster(folder, unknown, head.address) as made:
        made.add(*head_options(made), num_cpus=0, prefix=head.enter)
        of = World(made, workers, write_runtime_env(Path(folder)))
        for worker in workers:
            of.start(worker)
        yield of


def cut_off_until_given_up(of: World, sink: str) -> None:
    """A run outlives a host that is away for long, and the host is taken back while it goes on."""
    worker, node = of.workers[1], of.made.nodes[-1]
    job = of.submit("label", sink)
    wait_for_parts(sink, job)
    worker.cut_off()
    begin = time.monotonic()
    while not of.is_given_up(worker):
        require(time.monotonic() < begin + 120, "a host that is cut off is given up")
        time.sleep(0.5)
    given_up = time.monotonic() - begin
    require(job.poll() is None, "the run goes on when a host is given up", "the run had ended")
    worker.join()
    begin = time.monotonic()
    # It is told that it is dead, and ends; what watches over a host's services starts it again.
    node.wait(120)
    of.made.nodes.remove(node)
    of.start(worker)
    back = time.monotonic() - begin
    is_running = job.poll() is None
    output, _ = job.communicate(timeout=900)
    require(job.returncode == 0, "a run in which a host was cut off ends well", output)
    told = newest_run(sink)
    counts, lost = told["counts"], told["num_lost"]
    require(counts["seen"] == counts["labelled"] == NUM_IMAGES, "every image is labelled", f"{counts}")
    tell(
        f"label: {worker.name} cut off, given up after {given_up:.0f} s, joined, its node back after {back:.0f} s "
        f"({'while the run went on' if is_running else 'when the run had ended'}); status 0, "
        f"{counts['labelled']} images, {lost} of them lost with the host and labelled again"
    )


def verify(of: World, sink: str) -> None:
    """The store that a run left is whole."""
    job = of.submit("verify", sink)
    output, _ = job.communicate(timeout=600)
    require(job.returncode == 0, "the store is whole", output)
    tell("verify: each image exactly once")


def cut_off_for_a_moment(of: World, sink: str) -> None:
    """A run outlives a host that is away for so short that nobody gives it up."""
    worker = of.workers[0]
    job = of.submit("label", sink)
    wait_for_parts(sink, job)
    worker.cut_off()
    time.sleep(SHORT_CUT_SECONDS)
    worker.join()
    output, _ = job.communicate(timeout=900)
    require(job.returncode == 0, "a run in which a host was cut off for a moment ends well", output)
    counts = newest_run(sink)["counts"]
    require(counts["seen"] == counts["labelled"] == NUM_IMAGES, "every image is labelled", f"{counts}")
    kept = "given up all the same" if of.is_given_up(worker) else "its node kept"
    tell(f"label: {worker.name} cut off for {SHORT_CUT_SECONDS} s, {kept}; status 0, {counts['labelled']} images")


def train(of: World) -> None:
    """A model is trained where no disk is shared."""
    done = of.made.submit(
        of.runtime_env, submitted("train"), "--model", "unet_tu-mobilenetv3_small_050", "--crop", "96"
    )
    require(done.returncode == 0, "training needs no shared disk", done.stdout)
    num_bytes = filesystem("s3://segray")[0].info("segray/model/checkpoint.safetensors")["size"]
    tell(f"train: a checkpoint of {num_bytes:,} bytes")


def refuse_strangers(of: World) -> None:
    """Nothing is submitted without the token."""
    stranger = dataclasses.replace(of.made, environment={**of.made.environment, "RAY_AUTH_TOKEN": "0" * 64})
    done = stranger.ray("job", "submit", "--", "true")
    require(done.returncode and "oken" in done.stdout, "a wrong token is refused", done.stdout)
    tell("submit with another token: refused")


def hindrance() -> str | None:
    """Why there can be no hosts here."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if any(path.resolve().is_relative_to("/tmp") for path in (ROOT, BIN)):
        return "the code lies in /tmp, of which each host has its own"
    attempt = ("sh", "-ec", "ip link add one type veth peer name two; ip link add three type bridge")
    try:
        done = subprocess.run(booted("attempt", 1, *attempt), capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    return f"no hosts can be made here: {done.stderr.strip()}" if done.returncode else None


def main() -> None:
    """Shows one thing after the other; status 0 where all hold."""
    if sys.argv[1:] == [INSIDE]:
        with world() as of:
            tell("a head and two workers run")
            for show, sink in (
                (cut_off_until_given_up, "s3://segray/labels"),
                (cut_off_for_a_moment, "s3://segray/labels-again"),
            ):
                show(of, sink)
                verify(of, sink)
            train(of)
            refuse_strangers(of)
    elif reason := hindrance():
        print(f"skipped: {reason}")
    else:
        laptop = booted("laptop", 1, sys.executable, "-m", "tests.netns", INSIDE)
        sys.exit(subprocess.run(laptop, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
