"""Images per second of several ways to label the same frames with the same model on the same threads.

    python -m tests.benchmarks.throughput [--model deeplabv3_resnet50] [--num-frames 640]

- The bare loops, without Ray, on frames that are decoded: the eager forward pass and argmax in float32; `Predictor`;
  the eager one compiled by torch with frozen weights, in the dtype in which the device is fast (left out where there is
  no C++ compiler).
- The peers, in eager float32 as their guides have it: a script with torch's DataLoader (`peer_dataloader.py`), the
  recipe of Ray's documentation (`peer_ray.py`), a query of Daft (`peer_daft.py`; left out where it is not installed).
- This job, from files to the label store: on the local disk, and on a real S3 server of the same machine.

Frames are drawn scenes as JPEG. Weights are random: as --dtype auto judges what a model was trained to tell apart, the
dtype in which the device is fast is asked for by name. A rate is that of the steady state: it counts from the first
batch of label maps to the last, and what goes before and comes after, from the start of the interpreter to its end, is
shown apart. The bare loops run before, between and after the others, and a ratio is to the mean of the two neighbours,
since other work on the machine moves all of them.

Then come what an image costs in each stage of the job (`stages.py`), and how far the forward pass is from what the
machine could do (`roofline.py`), both on one thread of a CPU. Where Ray is not installed, or with --no-ray, the actor's
path alone is measured: the loops, and from the bytes of JPEG files to label maps. Tables (Markdown, CSV) and a plot go
to build/benchmark.

The peers run on CPUs alone. On a GPU the eager loop's convolutions in float32 are of TF32, as torch has it by default.
"""

import contextlib
import csv
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import fsspec
import numpy as np
import torch
import tyro
from PIL import Image

from segray.classes import Classes
from segray.demo import scene
from segray.forward import DType, fast_dtype
from segray.model import Checkpoint
from segray.predict import CPU_ENVIRONMENT
from tests.benchmarks import actor, eager, roofline, stages

R = TypeVar("R")
Row = dict[str, str]

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build/benchmark"
THREADS = os.cpu_count() or 1

NUM_FRAMES = {
    ("lraspp_mobilenet_v3_large", "cpu"): (640, 128),
    ("deeplabv3_resnet50", "cpu"): (96, 16),
    ("lraspp_mobilenet_v3_large", "cuda"): (4096, 4096),
    ("deeplabv3_resnet50", "cuda"): (2048, 1024),
}
"""By model and device: those that a job labels, and a bare loop."""
NUM_DRAWN = 640
NUM_STAGE_FRAMES = 64
STAGES = ("fetch", "decode", "forward", "tail", "encode", "write")


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Times the ways to label."""

    model: Literal["lraspp_mobilenet_v3_large", "deeplabv3_resnet50"] = "lraspp_mobilenet_v3_large"
    """Torchvision's name of it."""
    size: tuple[int, int] = (360, 480)
    """Height and width of the frames."""
    num_frames: int | None = None
    """That each job labels. None: 640, of DeepLabV3 96; on a GPU 4096 and 2048."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model runs."""
    ray: bool = importlib.util.find_spec("ray") is not None
    """Measure the jobs, and not the actor's path alone."""

    @property
    def dtype(self) -> DType:
        """In which the device is fast."""
        return "bfloat16" if fast_dtype(torch.device(self.device)) == torch.bfloat16 else "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """How fast something was."""

    images_per_second: float
    """In the steady state."""
    dtype: str = "float32"
    """What its forward passes computed in."""
    around: tuple[float, float] | None = None
    """Seconds before the first label maps, and after the last."""


class Suite:
    """Times one way after the other, with the bare loops before, between and after."""

    def __init__(self, settings: Throughput, way: eager.Way, frames: Sequence[Path]) -> None:
        self._device = settings.device
        self._dtype = settings.dtype
        self._way = way
        self._frames = frames
        self._timed: list[tuple[str, Timed]] = []
        self._bare: list[tuple[Timed, Timed]] = []

    def run(self, name: str, job: Callable[[], Timed]) -> None:
        """Times one way."""
        if not self._bare:
            self._bare.append(self._loops())
        self._timed.append((name, job()))
        say(name, self._timed[-1][1])
        self._bare.append(self._loops())

    def _loops(self) -> tuple[Timed, Timed]:
        eager_rate = apart(actor.eager_loop, self._way, self._frames, self._device, "float32")
        fast_rate = as_actor(self._device, actor.fast_loop, self._way, self._frames, self._device, self._dtype)
        loops = Timed(images_per_second=eager_rate), Timed(images_per_second=fast_rate, dtype=self._dtype)
        for name, loop in zip(("eager loop", "fast loop"), loops, strict=True):
            say(name, loop)
        return loops

    def rows(self) -> list[Row]:
        """The table of all ways."""
        rates = np.array([[loop.images_per_second for loop in loops] for loops in self._bare])
        means = rates.mean(0)
        rows = [
            row("bare eager loop", Timed(images_per_second=means[0]), *means),
            row("bare fast loop", Timed(images_per_second=means[1], dtype=self._dtype), *means),
        ]
        for (name, timed), neighbours in zip(self._timed, (rates[:-1] + rates[1:]) / 2, strict=True):
            rows.append(row(name, timed, *neighbours))
        return rows


def row(way: str, timed: Timed, eager_rate: float, fast_rate: float) -> Row:
    """Of the table of ways."""
    before, after = ("", "") if timed.around is None else (f"{seconds:.1f}" for seconds in timed.around)
    return {
        "way": way,
        "dtype": timed.dtype,
        "images/s": f"{timed.images_per_second:.1f}",
        "of the eager loop": f"{timed.images_per_second / eager_rate:.2f}",
        "of the fast loop": f"{timed.images_per_second / fast_rate:.2f}",
        "seconds before the first": before,
        "after the last": after,
    }


def say(name: str, timed: Timed) -> None:
    """Tells that something is measured, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {name}: {timed.images_per_second:.1f} images/s", file=sys.stderr, flush=True)


def apart(function: Callable[..., R], *arguments: Any) -> R:
    """Calls it in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def as_actor(device: str, function: Callable[..., R], *arguments: Any) -> R:
    """Calls it in a process that begins as the job's actors do."""
    with environment(CPU_ENVIRONMENT if device == "cpu" else {}):
        return apart(function, *arguments)


@contextlib.contextmanager
def environment(given: dict[str, str]) -> Iterator[None]:
    """Of the processes that are started meanwhile."""
    before = dict(os.environ)
    os.environ |= given
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def draw(folder: Path, num_frames: int, height: int, width: int) -> list[Path]:
    """JPEG files; not all of them differ where they are many."""
    folder.mkdir()
    frames = [folder / f"{seed:04d}.jpg" for seed in range(num_frames)]
    for seed, frame in enumerate(frames[:NUM_DRAWN]):
        Image.fromarray(scene(seed)[0]).resize((width, height)).save(frame, quality=92)
    for number, frame in enumerate(frames[NUM_DRAWN:]):
        frame.hardlink_to(frames[number % NUM_DRAWN])
    return frames


def write_checkpoint(path: Path, name: str) -> None:
    """Of a model with random weights; the peers read its tensors."""
    classes = Classes(tuple(f"class {index}" for index in range(eager.NUM_CLASSES)))
    tensors = eager.bare(name).state_dict()
    path.write_bytes(Checkpoint(architecture=name, classes=classes, tensors=tensors).to_bytes())


def command(*arguments: str) -> tuple[str, float, float]:
    """Runs it: what it printed, and when it began and ended."""
    began = time.time()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(arguments)} failed:\n{done.stderr}")
    return done.stdout, began, time.time()


def peer(name: str, way: eager.Way) -> Timed:
    """Runs its script."""
    with tempfile.TemporaryDirectory() as sink:
        fields = dataclasses.asdict(dataclasses.replace(way, sink=Path(sink)))
        options = [word for field, value in fields.items() for word in (f"--{field}", str(value))]
        told, began, ended = command("-m", f"tests.benchmarks.peer_{name}", *options)
    at = np.array(json.loads(told))
    rate = np.sum(at > at[0]) / (at[-1] - at[0])
    return Timed(images_per_second=rate, around=(at[0] - began, ended - at[-1]))


def this_job(way: eager.Way, source: str, sink: str, settings: Throughput, num_frames: int) -> Timed:
    """Runs it."""
    options = ("--model", str(way.weights), "--device", settings.device, "--dtype", settings.dtype)
    _, began, ended = command("jobs/label.py", source, sink, *options)
    run = _read_json(f"{sink}/runs/*.json")
    assert run["counts"]["labelled"] == num_frames
    seconds = run["seconds"]
    first = datetime.fromisoformat(run["finished"]).timestamp() - seconds["total"] + seconds["start"]
    return Timed(
        images_per_second=run["images_per_second"],
        dtype=run["models"][0]["dtype"],
        around=(first - began, ended - first - seconds["steady"]),
    )


def _read_json(pattern: str) -> dict[str, Any]:
    [opened] = fsspec.open_files(pattern, "rb")
    with opened as file:
        read: dict[str, Any] = json.load(file)
    return read


@contextlib.contextmanager
def on_s3(folder: Path, frames: Path) -> Iterator[str]:
    """The URI of a bucket with the frames in it, on a server that runs meanwhile."""
    from tests import s3  # which a machine for the actor's path alone need not have

    server = s3.Server(str(folder))
    try:
        with environment(server.environment):
            fsspec.filesystem("s3").put(f"{frames}/", f"{s3.BUCKET}/frames/", recursive=True)
            yield f"s3://{s3.BUCKET}"
    finally:
        server.kill()


def compiled(suite: Suite, settings: Throughput, way: eager.Way, frames: Sequence[Path]) -> None:
    """Times the eager loop, compiled."""
    if not shutil.which("g++"):
        print("there is no g++, and torch.compile is left out", file=sys.stderr)
        return

    def loop() -> Timed:
        rate = apart(actor.eager_loop, way, frames, settings.device, settings.dtype, True)
        return Timed(images_per_second=rate, dtype=settings.dtype)

    suite.run("bare loop by torch.compile", loop)


def of_jobs(settings: Throughput, way: eager.Way, frames: Sequence[Path], root: Path) -> tuple[list[Row], list[Row]]:
    """The table of ways, and that of the stages that feed the model."""
    _, num_bare = NUM_FRAMES[settings.model, settings.device]
    suite = Suite(settings, way, frames[:num_bare])
    compiled(suite, settings, way, frames[:num_bare])
    if settings.device == "cpu":
        suite.run("torch DataLoader", partial(peer, "dataloader", way))
        suite.run("Ray's documented recipe", partial(peer, "ray", way))
        if importlib.util.find_spec("daft"):
            suite.run("Daft", partial(peer, "daft", way))
        else:
            print("Daft is not installed, and left out: pip install '.[benchmark]'", file=sys.stderr)
    job = partial(this_job, way, settings=settings, num_frames=len(frames))
    stage_frames = frames[:NUM_STAGE_FRAMES]
    suite.run("segray, from disk", partial(job, str(way.frames), str(root / "labels")))
    feeding = feeding_rows("disk", apart(stages.of_feeding, stage_frames, str(way.frames), str(root / "parts")))
    with on_s3(root / "s3", way.frames) as bucket:
        suite.run("segray, from S3", partial(job, f"{bucket}/frames", f"{bucket}/labels"))
        from_s3 = apart(stages.of_feeding, stage_frames, f"{bucket}/frames", f"{bucket}/parts")
        feeding += feeding_rows("S3", {name: from_s3[name] for name in ("fetch", "write")})
    return suite.rows(), feeding


def of_actor(settings: Throughput, way: eager.Way, frames: Sequence[Path]) -> tuple[list[Row], list[Row]]:
    """Likewise, of what runs without Ray."""
    frames = frames[: NUM_FRAMES[settings.model, settings.device][1]]
    suite = Suite(settings, way, frames)

    def loop(function: Callable[..., float], dtype: str) -> Timed:
        rate = as_actor(settings.device, function, way, frames, settings.device, dtype)
        return Timed(images_per_second=rate, dtype=dtype)

    suite.run("from JPEG bytes", partial(loop, actor.from_jpeg, settings.dtype))
    compiled(suite, settings, way, frames)
    if settings.dtype != "float32":
        eager_rate = partial(apart, actor.eager_loop, way, frames, settings.device, settings.dtype)
        suite.run("eager loop", lambda: Timed(images_per_second=eager_rate(), dtype=settings.dtype))
        suite.run("fast loop", partial(loop, actor.fast_loop, "float32"))
        suite.run("from JPEG bytes", partial(loop, actor.from_jpeg, "float32"))
    return suite.rows(), feeding_rows("memory", apart(stages.of_feeding, frames[:NUM_STAGE_FRAMES]))


def feeding_rows(where: str, milliseconds: dict[str, float]) -> list[Row]:
    """Of the table of stages; `where` is what is fetched from, and written to."""
    names = {"fetch": f"fetch, {where}", "write": f"write, {where}"}
    return [{"stage": names.get(name, name), "ms/image": f"{ms:.2f}"} for name, ms in milliseconds.items()]


def of_model(settings: Throughput, way: eager.Way, frames: Sequence[Path]) -> tuple[list[Row], list[Row]]:
    """Stages of the model, and the roofline: FLOPs and bytes of an image, ceilings, floor and gap of forward passes.

    On a CPU all of it is one thread's, as each has images of its own.
    """
    way = dataclasses.replace(way, threads=1)
    device, (height, width) = settings.device, settings.size
    convolutions = roofline.convolutions(settings.model, height, width)
    forward, tail, plain_tail = as_actor(device, stages.of_model, way, frames, device, settings.dtype)
    milliseconds = {f"forward, {settings.dtype}": forward, "tail": tail, "tail, as it is plainly written": plain_tail}
    passes = [("eager", "float32", apart(roofline.eager_milliseconds, way, device, height, width))]
    if settings.dtype != "float32":
        plain, *_ = as_actor(device, stages.of_model, way, frames, device, "float32")
        passes.append(("fast", "float32", plain))
    passes.append(("fast", settings.dtype, forward))
    ceilings = {dtype: apart(roofline.ceilings, device, way.threads, dtype) for _, dtype, _ in passes}
    rows = []
    for name, dtype, ms in passes:
        ceiling = ceilings[dtype]
        floor_ms = roofline.floor_milliseconds(convolutions, ceiling, dtype)
        num_bytes = sum(one.num_values for one in convolutions) * getattr(torch, dtype).itemsize
        rows.append(
            {
                "forward pass": f"{name}, {dtype}",
                "GFLOP/image": f"{sum(one.num_flops for one in convolutions) / 1e9:.2f}",
                "MB/image": f"{num_bytes / 1e6:.0f}",
                "matrix product, GFLOP/s": f"{ceiling.flops_per_second / 1e9:,.0f}",
                "copy, GB/s": f"{ceiling.bytes_per_second / 1e9:,.1f}",
                "floor, ms/image": f"{floor_ms:.3g}",
                "measured, ms/image": f"{ms:.3g}",
                "gap": f"{ms / floor_ms:.1f}",
            }
        )
    return [{"stage": name, "ms/image": f"{ms:.2f}"} for name, ms in milliseconds.items()], rows


def machine(device: str) -> str:
    """What it is called, and its cores or GPU."""
    with open("/proc/cpuinfo") as file:
        names = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    cpu = f"{', '.join(names)}, {THREADS} cores"
    return f"{torch.cuda.get_device_name()}, {cpu}" if device == "cuda" else cpu


def markdown(rows: Sequence[Row]) -> str:
    """A table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write(name: str, origin: Row, tables: dict[str, list[Row]]) -> str:
    """Writes the tables, all as Markdown and each as CSV; the Markdown."""
    OUT.mkdir(parents=True, exist_ok=True)
    told = "; ".join(origin.values())
    text = "\n".join([*(markdown(rows) for rows in tables.values()), f"({told})\n"])
    (OUT / f"{name}.md").write_text(text)
    for table, rows in tables.items():
        with open(OUT / f"{name}-{table}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *origin])
            writer.writeheader()
            writer.writerows(row | origin for row in rows)
    return text


def plot(path: Path, title: str, tables: dict[str, list[Row]]) -> None:
    """Images per second of each way, and milliseconds of each stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels = [("ways", "images/s", ("way", "dtype")), ("stages", "ms/image", ("stage",))]
    for axes, (table, unit, names) in zip(figure.subplots(1, 2, width_ratios=(3, 2)), panels, strict=True):
        rows = tables[table]
        labels = [", ".join(row[name] for name in names) for row in rows]
        colours = [
            "tab:green" if "segray" in label else "tab:gray" if "bare" in label else "tab:blue" for label in labels
        ]
        bars = axes.barh(range(len(rows)), [float(row[unit]) for row in rows], color=colours)
        axes.bar_label(bars, [row[unit] for row in rows], padding=3)
        axes.set_yticks(range(len(rows)), labels)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Times all of it, prints the tables and writes them."""
    settings = tyro.cli(Throughput)
    (height, width), (num_default, _) = settings.size, NUM_FRAMES[settings.model, settings.device]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        frames = draw(root / "frames", settings.num_frames or num_default, height, width)
        weights = root / f"{settings.model}.safetensors"
        write_checkpoint(weights, settings.model)
        way = eager.Way(frames=root / "frames", sink=root, model=settings.model, weights=weights, threads=THREADS)
        ways, feeding = of_jobs(settings, way, frames, root) if settings.ray else of_actor(settings, way, frames)
        model_stages, floors = of_model(settings, way, frames)
    in_order = sorted(feeding + model_stages, key=lambda row: STAGES.index(row["stage"].partition(",")[0]))
    tables = {"ways": ways, "stages": in_order, "roofline": floors}
    origin = {
        "date": date.today().isoformat(),
        "model": settings.model,
        "frames": f"{len(frames)} frames of {width}×{height}",
        "machine": machine(settings.device),
        "torch": f"torch {torch.__version__}",
        "command": shlex.join(["python", "-m", "tests.benchmarks.throughput", *sys.argv[1:]]),
    }
    print(write(settings.model, origin, tables))
    if importlib.util.find_spec("matplotlib"):
        plot(OUT / f"{settings.model}.png", f"{settings.model}; {origin['machine']}; {origin['date']}", tables)
    else:
        print("matplotlib is not installed, so that there is no plot: pip install '.[benchmark]'", file=sys.stderr)


if __name__ == "__main__":
    main()
