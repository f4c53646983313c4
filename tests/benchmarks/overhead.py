"""CPU time by process: what it takes until the first label map, and what an image costs apart from its model.

    python -m tests.benchmarks.overhead

The job labels drawn scenes, 480×360 JPEG, on this machine: few of them, and then more, with a model that sees them at
64 pixels. What the second run needs more is what its images cost; all else is the start. Seconds to the first label map
are those of the first run, from the command on. CPU time is that of all processes but the model's actor, which is
shown apart; a machine that does nothing else measures it best.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import psutil
from PIL import Image

from segray.classes import Classes
from segray.demo import scene
from segray.model import untrained
from segray.preprocessing import Preprocessing

FEW, MORE = 64, 1600
NUM_DRAWN = 64
LOOK_SECONDS = 0.2
MODEL = "MapBatches(_Predictor)"


def role(text: str) -> str:
    """What a process is there for, by how it calls itself."""
    if "ray::" in text:
        if MODEL in text:
            return "model"
        is_task = "IDLE" in text or "MapBatches" in text or "Write" in text
        return "tasks" if is_task else text.split("ray::")[1].split(".")[0].strip()
    return next((name for name in ("gcs_server", "raylet", "jobs/label.py") if name in text), "other")


def cpu_seconds(command: list[str]) -> Mapping[str, float]:
    """CPU seconds of a command and all that it starts, by role."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: dict[int, tuple[str, float]] = {}
    while process.poll() is None:
        try:
            for one in (process, *process.children(recursive=True)):
                if text := " ".join(one.cmdline()):  # a process that has ended says nothing
                    times = one.cpu_times()
                    found[one.pid] = (role(text), times.user + times.system)
        except psutil.Error:  # it has ended since
            pass
        time.sleep(LOOK_SECONDS)
    assert process.wait() == 0, command
    totals: dict[str, float] = defaultdict(float)
    for name, seconds in found.values():
        totals[name] += seconds
    return totals


def draw_frames(folder: Path, num_frames: int) -> None:
    """480×360 JPEG files."""
    folder.mkdir()
    frames = [Image.fromarray(scene(seed)[0]).resize((480, 360)) for seed in range(NUM_DRAWN)]
    for index in range(num_frames):
        frames[index % NUM_DRAWN].save(folder / f"{index:05d}.jpg", quality=92)


def label(root: Path, num_frames: int) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """CPU seconds of a run, and seconds from its command to the first label map and to its end."""
    frames, sink = root / f"frames-{num_frames}", root / f"labels-{num_frames}"
    draw_frames(frames, num_frames)
    began = time.time()
    model = str(root / "model.safetensors")
    used = cpu_seconds([sys.executable, "jobs/label.py", str(frames), str(sink), "--model", model, "--device", "cpu"])
    [path] = (sink / "runs").iterdir()
    record = json.loads(path.read_text())
    assert record["counts"]["labelled"] == num_frames
    return used, {"first": record["seconds"]["start"], "all": time.time() - began, "rate": record["images_per_second"]}


def main() -> None:
    """Prints a table, and the seconds."""
    classes = Classes(tuple(f"class {index}" for index in range(21)))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        small = untrained("lraspp_mobilenet_v3_large", classes, preprocessing=Preprocessing(resize=64))
        (root / "model.safetensors").write_bytes(small.to_bytes())
        few, of_few = label(root, FEW)
        more, of_more = label(root, MORE)
    print("| processes | start, CPU s | an image, CPU ms |\n|---|---|---|")
    per_image = {name: 1000 * (more[name] - few[name]) / (MORE - FEW) for name in more}
    for name in sorted(per_image, key=lambda name: -per_image[name]):
        print(f"| {name} | {few[name] - FEW * per_image[name] / 1000:.1f} | {per_image[name]:.2f} |")
    apart = sum(per_image.values()) - per_image["model"]
    print(
        f"\n{of_few['first']:.1f} s to the first label map; {apart:.1f} CPU ms an image apart from the model, ", end=""
    )
    print(f"at {of_more['rate']:.0f} images/s")


if __name__ == "__main__":
    main()
