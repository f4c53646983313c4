"""What a training keeps in its sink.

    SINK/checkpoint.safetensors      the best model by validation mIoU
    SINK/last.safetensors            that of the newest epoch
    SINK/training.json               settings, data, versions, and how it stands
    SINK/metrics.jsonl               a line every some steps, and one an epoch
    SINK/validation/epoch-0001.json  confusion matrix and worst images
    SINK/tensorboard/                the same numbers for TensorBoard
    SINK/state/step-00001234.safetensors   what training goes on from; the newest two

Each is written whole or not at all. A state comes after all that was known before its step, so what is newer than the
newest state is written again in the same way.
"""

import contextlib
import functools
import json
import queue
import re
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem

from segray.errors import SinkError
from segray.retry import retrying
from segray.source import filesystem

if TYPE_CHECKING:  # as the settings of a job are read without it
    from torch import Tensor

__all__ = ["BEST", "LAST", "Journal"]

BEST, LAST = "checkpoint.safetensors", "last.safetensors"
_NUM_STATES = 2
_MAX_WAITING = 8
_METADATA_KEY = "segray.state"
_STATE = re.compile(r"step-\d{8}\.safetensors")
_TEMPORARY = re.compile(r"\.(checkpoint|last|step-\d+|training|metrics|epoch-\d+|events[\w.]*)\.\w+\.\w+\.tmp")


class Journal:
    """A training's sink. Writing goes on in a thread, one thing after the other, while the model learns."""

    def __init__(self, sink: str) -> None:
        """Looks at nothing yet.

        Raises:
            SinkError: there is no such store.
        """
        self._sink = sink.rstrip("/")
        try:
            self.filesystem, self.root = filesystem(self._sink)
        except Exception as error:  # whatever fsspec raises
            raise SinkError(f"{sink} cannot be opened: {error}") from error
        # Bounded, as each state is a copy of all there is: who is far ahead of a slow store waits.
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def read(self, name: str) -> bytes | None:
        """What is in one of its files; None where it is not there.

        Raises:
            SinkError: it cannot be read.
        """
        try:
            data: bytes = retrying(lambda: self.filesystem.cat_file(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever the store's client raises
            raise SinkError(f"{self._sink}/{name} cannot be read: {type(error).__name__}: {error}") from error
        return data

    def write(self, name: str, data: bytes) -> None:
        """Writes one of its files, now.

        Raises:
            SinkError: it cannot be written.
        """
        from segray.sink import put

        try:
            put(self.filesystem, f"{self.root}/{name}", data)
        except Exception as error:  # as above
            raise SinkError(f"{self._sink}/{name} cannot be written: {type(error).__name__}: {error}") from error

    def sweep(self) -> None:
        """Removes what writers that were killed have left half written.

        Raises:
            OSError: it cannot be removed.
        """
        if isinstance(self.filesystem, LocalFileSystem):  # elsewhere nothing is half there
            for path in self.filesystem.find(self.root):
                if _TEMPORARY.fullmatch(path.rpartition("/")[2]):
                    with contextlib.suppress(FileNotFoundError):
                        self.filesystem.rm_file(path)

    def training(self) -> dict[str, Any] | None:
        """What `training.json` says."""
        data = self.read("training.json")
        return json.loads(data) if data else None

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return [json.loads(line) for line in (self.read("metrics.jsonl") or b"").splitlines()]

    def newest_state(self) -> str | None:
        """The name of the newest state; None where there is none."""
        names = self._states()
        return names[-1] if names else None

    def read_state(self, name: str) -> "tuple[dict[str, Tensor], dict[str, Any]]":
        """What `write_state` wrote under a name.

        Raises:
            SinkError: it cannot be read, or is not there any more.
        """
        import safetensors.torch

        data = self.read(f"state/{name}")
        if data is None:
            raise SinkError(f"{self._sink}/state/{name} is gone; another training writes to this sink")
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return safetensors.torch.load(data), json.loads(header["__metadata__"][_METADATA_KEY])

    def later(self, write: Callable[[], None]) -> None:
        """Has something written behind all that was given before.

        Raises:
            Exception: what a write before it raised, SinkError as a rule; nothing is written after that.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._check()
        self._queue.put(write)

    def finish(self) -> None:
        """Waits until all is written.

        Raises:
            Exception: what one of the writes raised, SinkError as a rule.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._check()

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Writes all lines there are, as files of object stores cannot grow."""
        self.write("metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())

    def write_state(self, tensors: "Mapping[str, Tensor]", scalars: Mapping[str, Any]) -> None:
        """Writes what a training goes on from, and removes those that are older than the one before."""
        import safetensors.torch

        name = f"step-{scalars['step']:08d}.safetensors"
        own = {key: tensor.contiguous() for key, tensor in tensors.items()}
        self.write(f"state/{name}", safetensors.torch.save(own, {_METADATA_KEY: json.dumps(scalars)}))
        for old in self._states()[:-_NUM_STATES]:
            try:
                retrying(functools.partial(self.filesystem.rm_file, f"{self.root}/state/{old}"))
            except Exception as error:  # as above
                raise SinkError(
                    f"{self._sink}/state/{old} cannot be removed: {type(error).__name__}: {error}"
                ) from error

    def write_tensorboard(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Writes the numbers of all lines as one file of events."""
        from tensorboardX import SummaryWriter

        with tempfile.TemporaryDirectory() as folder:
            with SummaryWriter(folder) as writer:
                for line in lines:
                    numbers = {name: value for name, value in line.items() if isinstance(value, float)}
                    numbers |= {
                        f"iou/{name}": value for name, value in line.get("iou", {}).items() if value is not None
                    }
                    for name, value in numbers.items():
                        writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])
            [events] = Path(folder).iterdir()
            self.write("tensorboard/events.out.tfevents.segray", events.read_bytes())

    def _states(self) -> list[str]:
        try:
            paths = retrying(lambda: self.filesystem.ls(f"{self.root}/state", detail=False))
        except FileNotFoundError:
            return []
        except Exception as error:  # as above
            raise SinkError(f"{self._sink}/state cannot be listed: {type(error).__name__}: {error}") from error
        names = (path.rpartition("/")[2] for path in paths)
        return sorted(name for name in names if _STATE.fullmatch(name))

    def _work(self) -> None:
        while (write := self._queue.get()) is not None:
            if self._error is None:
                try:
                    write()
                except Exception as error:  # told by whoever next writes
                    self._error = error

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
