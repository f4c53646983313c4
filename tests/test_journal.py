import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from segray.errors import SinkError
from segray.journal import Journal

TENSORS = {
    "net.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "net.transposed": torch.arange(12.0).view(3, 4).t(),
    "net.channels_last": torch.arange(48.0).view(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
    "net.num_batches_tracked": torch.tensor(2**53 + 1),
    "optimizer.weight.step": torch.tensor(7.0),
    "average.half": torch.tensor([1.5, float("inf"), float("-inf")], dtype=torch.float16),
    "average.bfloat16": torch.tensor([1e30, 1e-30, -0.0], dtype=torch.bfloat16),
    "double": torch.tensor([1 / 3], dtype=torch.float64),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "truths": torch.tensor([True, False]),
    "nothing": torch.zeros(0, 5),
}
SCALARS = {"step": 7, "scaler": {"scale": 65536.0, "factor": 0.1 + 0.2, "growth": None}, "names": ["sky", "Straße"]}


def newest(journal: Journal) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    name = journal.newest_state()
    return None if name is None else journal.read_state(name)


@pytest.fixture(params=["disk", "s3"])
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "a sink")
    request.getfixturevalue("s3")
    return f"s3://segray/journal-test/{uuid.uuid4().hex}"


def states(journal: Journal) -> list[str]:
    return sorted(path.rpartition("/")[2] for path in journal.filesystem.ls(f"{journal.root}/state", detail=False))


def save(journal: Journal, step: int) -> None:
    journal.write_state({"weight": torch.full((2,), float(step))}, {"step": step})


def events(data: bytes) -> Iterator[Event]:
    """What a file of TensorBoard's records holds: a length, its checksum, so many bytes, and their checksum."""
    begin = 0
    while begin < len(data):
        (num_bytes,) = struct.unpack_from("<Q", data, begin)
        yield Event.FromString(data[begin + 12 : begin + 12 + num_bytes])
        begin += 12 + num_bytes + 4


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    save(journal, 1)
    left = [".checkpoint.safetensors.ab1_.tmp", "state/.step-00000002.safetensors.x.tmp", ".metrics.jsonl.q8.tmp"]
    others = ["lock/.000000001.json.77.tmp", ".notes.txt", "state/step-00000001.safetensors", "a.tmp"]
    for name in (*left, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    journal.sweep()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(others)


def test_an_empty_sink_holds_nothing(sink: str) -> None:
    journal = Journal(sink)
    assert journal.read("checkpoint.safetensors") is None
    assert journal.training() is None
    assert journal.metrics() == []
    assert journal.newest_state() is None
    journal.finish()


def test_what_is_written_is_read(sink: str) -> None:
    journal = Journal(f"{sink}/")
    for content in (b"first", b"", b"\0" * 100_000):
        journal.write("validation/epoch-0001.json", content)
        assert journal.read("validation/epoch-0001.json") == content
        assert Journal(sink).read("validation/epoch-0001.json") == content
    journal.write("training.json", '{"status": "läuft", "num_steps": 12}'.encode())
    assert journal.training() == {"status": "läuft", "num_steps": 12}


def test_metrics_are_read_as_they_were_written(sink: str) -> None:
    journal = Journal(sink)
    lines: list[dict[str, Any]] = [
        {"kind": "steps", "step": 50, "loss": 0.1 + 0.2, "learning_rate": 1e-300},
        {"kind": "epoch", "step": 100, "loss": 1 / 3, "iou": {"sky": 0.5, "two\nlines\u2028": None}},
    ]
    for number in (1, 2):
        journal.write_metrics(lines[:number])
        assert journal.metrics() == lines[:number]


def test_a_state_comes_back_exactly(sink: str) -> None:
    journal = Journal(sink)
    journal.write_state(TENSORS, SCALARS)
    found = newest(Journal(sink))
    assert found is not None
    tensors, scalars = found
    assert scalars == SCALARS
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert tensors[name].shape == tensor.shape, name
        assert torch.equal(tensors[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_the_newest_state_counts_and_the_newest_two_are_kept(sink: str) -> None:
    journal = Journal(sink)
    for step, kept in ((9, [9]), (10, [9, 10]), (99, [10, 99]), (100_000, [99, 100_000]), (1_234_567, None)):
        save(journal, step)
        found = newest(journal)
        assert found is not None
        assert found[1] == {"step": step}
        assert found[0]["weight"].tolist() == [step, step]
        assert states(journal) == [f"step-{number:08d}.safetensors" for number in kept or (100_000, step)]
    save(journal, 1_234_567)  # again, as after a break
    assert len(states(journal)) == 2


def test_what_is_no_whole_state_is_left_alone(sink: str) -> None:
    journal = Journal(sink)
    others = [".step-00000009.safetensors.x7.tmp", "step-00000009.safetensors.tmp", "old-step-00000009.safetensors"]
    for name in (*others, "notes.txt"):
        journal.write(f"state/{name}", b"torn")
    assert journal.newest_state() is None
    for step in range(1, 5):
        save(journal, step)
    found = newest(journal)
    assert found is not None
    assert found[1] == {"step": 4}
    assert set(states(journal)) == {*others, "notes.txt", "step-00000003.safetensors", "step-00000004.safetensors"}


def test_tensorboard_reads_the_same_numbers(sink: str) -> None:
    journal = Journal(sink)
    lines: list[dict[str, Any]] = [
        {"kind": "steps", "epoch": 1, "step": 50, "loss": 0.75, "learning_rate": 1e-3},
        {"kind": "steps", "epoch": 1, "step": 100, "loss": 0.5, "learning_rate": 5e-4},
        {"kind": "epoch", "epoch": 1, "step": 100, "miou": 0.25, "iou": {"sky": 0.5, "tree": 0.0, "absent": None}},
    ]
    journal.write_tensorboard(lines[:1])
    journal.write_tensorboard(lines)
    folder = f"{journal.root}/tensorboard"
    (name,) = [path.rpartition("/")[2] for path in journal.filesystem.ls(folder, detail=False)]
    assert "tfevents" in name, "as TensorBoard looks for"
    data = journal.read(f"tensorboard/{name}")
    assert data is not None
    first, *rest = events(data)
    assert first.file_version == "brain.Event:2"
    found = {(value.tag, event.step): value.simple_value for event in rest for value in event.summary.value}
    assert found == pytest.approx(
        {
            ("steps/loss", 50): 0.75,
            ("steps/learning_rate", 50): 1e-3,
            ("steps/loss", 100): 0.5,
            ("steps/learning_rate", 100): 5e-4,
            ("epoch/miou", 100): 0.25,
            ("epoch/iou/sky", 100): 0.5,
            ("epoch/iou/tree", 100): 0.0,
        }
    )


def test_a_file_is_there_whole_at_every_moment(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    contents = {bytes([number]) * (number + 1) * 300_000 for number in range(3)}
    journal.write(last := "last.safetensors", next(iter(contents)))
    done = threading.Event()
    seen = []

    def look() -> None:
        while not done.is_set():
            seen.append(Journal(str(tmp_path)).read(last) in contents)

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(20):
        for content in contents:
            journal.write(last, content)
    done.set()
    reader.join()
    assert len(seen) > 5
    assert all(seen)
    assert [path.name for path in tmp_path.iterdir()] == [last], "nothing half-written is left behind"


def test_what_is_given_is_written_in_its_order_while_the_caller_goes_on(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    go, written = threading.Event(), []

    def first() -> None:
        assert go.wait(60)
        written.append(0)

    journal.later(first)
    for number in range(1, 8):
        journal.later(lambda number=number: written.append(number))  # type: ignore[misc]
    assert written == []
    go.set()
    journal.finish()
    assert written == list(range(8))
    journal.later(lambda: written.append(8))
    journal.finish()
    assert written[-1] == 8
    journal.finish()


def test_a_write_that_failed_is_told_when_all_is_finished_and_nothing_follows_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    journal, written = Journal(str(tmp_path / "file" / "sink")), []
    journal.later(lambda: journal.write("last.safetensors", b"content"))
    journal.later(lambda: written.append("what builds on it"))
    with pytest.raises(SinkError, match=r"file/sink/last\.safetensors cannot be written: NotADirectoryError"):
        journal.finish()
    assert written == []


def test_a_write_that_failed_is_told_by_the_next_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    journal, written = Journal(str(tmp_path / "file")), []
    journal.later(lambda: journal.write_metrics([{"step": 1}]))
    deadline = time.monotonic() + 60
    with pytest.raises(SinkError, match=r"metrics\.jsonl cannot be written"):
        while time.monotonic() < deadline:
            journal.later(lambda: None)
            time.sleep(0.01)
    with pytest.raises(SinkError):
        journal.later(lambda: written.append("later"))
    with pytest.raises(SinkError):
        journal.finish()
    assert written == []


def test_an_old_state_that_cannot_be_removed_is_told(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    (tmp_path / "state" / "step-00000001.safetensors").mkdir(parents=True)  # which is no file to remove
    save(journal, 2)
    with pytest.raises(SinkError, match=r"step-00000001\.safetensors cannot be removed"):
        save(journal, 3)
    found = newest(journal)
    assert found is not None
    assert found[1] == {"step": 3}


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "training.json").mkdir()
    with pytest.raises(SinkError, match=r"training\.json cannot be read: IsADirectoryError"):
        Journal(str(tmp_path)).training()
    with pytest.raises(SinkError, match="nosuch://bucket/sink cannot be opened"):
        Journal("nosuch://bucket/sink")


def test_it_is_imported_without_torch_or_ray() -> None:
    code = "import sys, segray.journal; sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
