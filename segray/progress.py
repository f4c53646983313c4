"""What a person sees of a run: counts while it goes on, tables when it ends."""

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from segray import metrics
from segray.classes import Classes
from segray.statistics import Receipt

__all__ = [
    "STALL_SECONDS",
    "START_SECONDS",
    "Fetched",
    "Ledger",
    "Snapshot",
    "Totals",
    "is_json",
    "note",
    "print_table",
    "say",
    "say_as",
    "watch",
]

STALL_SECONDS = 300.0
"""How long a run may show no sign of life."""

START_SECONDS = 1800.0
"""How long it may take until the first model is built, or until lost nodes are replaced where none is left."""

_LINE_SECONDS = 10
_LOOK_SECONDS = 0.5
_MAX_SAMPLES = 400
_context: dict[str, str] = {}  # what each line of JSON says beside its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What was met in one block of the index, read to its end."""

    num_seen: int
    """Images in it."""
    num_present: int
    """Those that the sink already held."""
    is_shard: bool
    """Whether it is a shard, of which nobody knew beforehand how many images it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Where a run stands."""

    num_done: int
    """Images predicted or rejected, committed or not."""
    num_rejected: int
    """Rejects among them."""
    num_predicted: int
    """Images that went through a model, some of them twice."""
    num_seen: int
    """Images met in the blocks that are read."""
    num_present: int
    """Those of them that the sink already held."""
    num_in_shards: int
    """Images met in shards."""
    num_shards_read: int
    """Shards that are read to their end."""
    first_done: float | None
    """When the first image was done, seconds since the epoch."""
    last_done: float | None
    """When the last one was."""
    num_done_first: int
    """Images that were done at `first_done`."""
    is_bounded: bool
    """Whether images were left for another time."""
    crf_ms_per_image: float | None
    """Milliseconds that the CRF took, on average; None where it refined nothing."""
    num_signs: int
    """Signs of life since the first model was built (nodes may take long to come); it grows as long as they do."""


class Ledger:
    """An actor that tasks and the driver share. Whatever a retried task tells twice counts once.

    `encoded` may count twice, and feeds the progress bar; `predicted` is there to count what was done twice.
    """

    def __init__(self, run_id: str, max_images: int | None = None, deadline: float | None = None) -> None:
        """Starts empty.

        Args:
            run_id: the run.
            max_images: how many may be read.
            deadline: when reading is to end, seconds since the epoch.
        """
        self._run_id = run_id
        self._left = max_images
        self._deadline = deadline
        self._grants: dict[str, int] = {}
        self._begun: set[str] = set()
        self._is_bounded = False
        self._choices: list[dict[str, Any]] = []
        self._num_beats = 0
        self._num_signs = 0
        self._fetched: dict[str, Fetched] = {}
        self._receipts: dict[str, Receipt] = {}
        self._num_predicted = 0
        self._num_refined = 0
        self._crf_seconds = 0.0
        self._num_done = 0
        self._num_rejected = 0
        self._num_done_first = 0
        self._first: float | None = None
        self._last: float | None = None

    def begin(self, key: str) -> bool:
        """Whether a block of the index, named by its first URI, may be read; no more when the bound is reached."""
        if (self._left == 0 or self._is_late()) and key not in self._begun:
            self._is_bounded = True
            return False
        self._begun.add(key)
        return True

    def grant(self, key: str, number: int, num_images: int) -> int:
        """How many images of a block's table of this number may go on."""
        asked = f"{key}\0{number}"
        if asked not in self._grants:
            self._grants[asked] = 0 if self._is_late() else num_images if self._left is None else self._left
            if self._left is not None:
                self._grants[asked] = min(self._grants[asked], num_images)
                self._left -= self._grants[asked]
        granted = self._grants[asked]
        if granted and self._left is None:
            granted = num_images  # a second try may find more in its table than the first
        self._is_bounded |= granted < num_images
        return min(granted, num_images)

    def fetched(self, key: str, state: Fetched) -> None:
        """A block of the index, named by its first URI, has been read."""
        if key not in self._fetched:
            metrics.add_images("present", self._run_id, state.num_present)
        self._fetched[key] = state

    def _is_late(self) -> bool:
        return self._deadline is not None and time.time() >= self._deadline

    def chosen(self, choice: dict[str, Any]) -> None:
        """How one more model computes: the fields of a `Choice`."""
        self._choices.append(choice)

    def choices(self) -> list[dict[str, Any]]:
        """For each dtype the models in it: the lowest agreement, the lowest that was refused, an error."""

        def lowest(name: str, of_dtype: list[dict[str, Any]]) -> float | None:
            return min((choice[name] for choice in of_dtype if choice[name] is not None), default=None)

        dtypes = sorted({choice["dtype"] for choice in self._choices})
        by_dtype = {dtype: [choice for choice in self._choices if choice["dtype"] == dtype] for dtype in dtypes}
        return [
            {
                "dtype": dtype,
                "num_models": len(of_dtype),
                "agreement": lowest("agreement", of_dtype),
                "refused": lowest("refused", of_dtype),
                "error": next((choice["error"] for choice in of_dtype if choice["error"]), None),
            }
            for dtype, of_dtype in by_dtype.items()
        ]

    def beat(self) -> None:
        """A model is built, or at work."""
        self._num_beats += 1

    def predicted(self, num_images: int) -> None:
        """So many more images went through a model."""
        self._num_predicted += num_images

    def refined(self, seconds: float) -> None:
        """The CRF is done with one more image."""
        self._num_refined += 1
        self._crf_seconds += seconds
        self.beat()

    def alive(self) -> None:
        """A shard is being read, though nothing in it is new."""
        self._num_signs += 1

    def unread(self) -> list[str]:
        """The blocks that were begun and are not read to their end, by their first URI."""
        return sorted(self._begun - self._fetched.keys())

    def encoded(self, num_done: int, num_rejected: int) -> None:
        """So many more images went through."""
        self._num_done += num_done
        self._num_rejected += num_rejected
        self._last = time.time()
        if self._first is None:
            self._first, self._num_done_first = self._last, num_done

    def commit(self, receipt: Receipt) -> None:
        """A part is in the sink."""
        if receipt.key not in self._receipts:
            metrics.add_images("labelled", self._run_id, receipt.num_labelled)
            metrics.add_images("rejected", self._run_id, receipt.rejects.total())
        self._receipts[receipt.key] = receipt

    def receipts(self) -> list[Receipt]:
        """All that is committed."""
        return list(self._receipts.values())

    def snapshot(self) -> Snapshot:
        """Where the run stands."""
        shards = [state for state in self._fetched.values() if state.is_shard]
        return Snapshot(
            num_done=self._num_done,
            num_rejected=self._num_rejected,
            num_predicted=self._num_predicted,
            num_seen=sum(state.num_seen for state in self._fetched.values()),
            num_present=sum(state.num_present for state in self._fetched.values()),
            num_in_shards=sum(state.num_seen for state in shards),
            num_shards_read=len(shards),
            first_done=self._first,
            last_done=self._last,
            num_done_first=self._num_done_first,
            is_bounded=self._is_bounded,
            crf_ms_per_image=1000 * self._crf_seconds / self._num_refined if self._num_refined else None,
            num_signs=self._num_beats
            and self._num_beats
            + self._num_signs
            + len(self._grants)
            + len(self._begun)
            + len(self._fetched)
            + len(self._receipts),
        )


@dataclass(slots=True)
class Totals:
    """What a run committed, added up over its receipts."""

    num_labelled: int
    """Images."""
    rejects: Counter[tuple[str, str]]
    """Images, by stage and kind."""
    classes: list[dict[str, Any]] = field(default_factory=list)
    """For each class its pixels, their share and square metres, the images it occurs in, the mean confidence."""

    @classmethod
    def of(cls, receipts: list[Receipt], classes: Classes) -> "Totals":
        """Adds receipts up."""
        zeros = np.zeros(len(classes))
        num_pixels = sum((r.num_pixels for r in receipts), zeros.astype(np.int64))
        num_images = sum((r.num_images for r in receipts), zeros.astype(np.int64))
        confidence_sum = sum((r.confidence_sum for r in receipts), zeros)
        area_sum = sum((r.area_sum for r in receipts), zeros)
        total = int(num_pixels.sum())
        return cls(
            num_labelled=sum(r.num_labelled for r in receipts),
            rejects=sum((r.rejects for r in receipts), Counter()),
            classes=[
                {
                    "class_id": class_id,
                    "class_name": name,
                    "num_pixels": int(num_pixels[class_id]),
                    "fraction": int(num_pixels[class_id]) / total if total else 0.0,
                    "area_m2": float(area_sum[class_id]) if area_sum.any() else None,
                    "num_images": int(num_images[class_id]),
                    "mean_confidence": float(confidence_sum[class_id] / num_pixels[class_id])
                    if num_pixels[class_id]
                    else None,
                }
                for class_id, name in enumerate(classes.names)
            ],
        )


@contextmanager
def watch(
    snapshot: Callable[[], Snapshot],
    num_loose: int,
    num_shards: int,
    started: float,
    samples: list[tuple[float, int]],
    lacks_nodes: Callable[[], bool],
    stalled: Callable[[bool, float], None],
    noun: str = "images",
) -> Iterator[None]:
    """Shows how a run goes: a live bar on a terminal, elsewhere a line every 10 seconds.

    Args:
        snapshot: asks the ledger.
        num_loose: loose images to do.
        num_shards: shards to read.
        started: when the run did, seconds since the epoch.
        samples: is given (seconds since then, images done), some hundred in all.
        lacks_nodes: whether the cluster has none left of a kind that the run needs.
        stalled: is called, in another thread, when nothing has gone on for 5 minutes, or for 30 where no model was
            built yet or nodes have to come first; it is told whether there had been a model, and the seconds.
        noun: what is labelled.
    """
    stop = threading.Event()
    console = Console(stderr=True)
    columns = [
        TextColumn("labelling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
    ]
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=None, text="starting")

    def show() -> None:
        next_line, next_sample, sample_seconds = time.time() + _LINE_SECONDS, 0.0, _LOOK_SECONDS
        num_signs = 0
        last_sign = waited = time.time()
        while not stop.wait(_LOOK_SECONDS):
            now = time.time()
            try:
                state = snapshot()
            except Exception:  # the ledger is late; or gone, and the run ends with a better word on it
                state = None
            if state is not None and state.num_signs != num_signs:
                num_signs, last_sign, waited = state.num_signs, now, now
            elif now - waited > (STALL_SECONDS if num_signs else START_SECONDS):
                if not (num_signs and now - last_sign < START_SECONDS and lacks_nodes()):
                    stalled(num_signs > 0, now - last_sign)
                    return
                waited = now  # a model that comes with its node has to be built too
            if state is None:
                continue
            total = _expected(state, num_loose, num_shards)
            text = _describe(state, total, noun)
            bar.update(task, completed=state.num_done, total=total, text=text)
            if not console.is_terminal and now >= next_line:
                say(
                    f"{state.num_done} of {total or '?'} {noun}, {text}",
                    num_done=state.num_done,
                    num_images=total,
                    num_rejected=state.num_rejected,
                )
                next_line += _LINE_SECONDS
            if now >= next_sample:
                samples.append((round(now - started, 1), state.num_done))
                next_sample = now + sample_seconds
            if len(samples) > _MAX_SAMPLES:
                del samples[1::2]
                sample_seconds *= 2

    thread = threading.Thread(target=show, daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=4 * _LOOK_SECONDS)


def _expected(state: Snapshot, num_loose: int, num_shards: int) -> int | None:
    """Images to do in all; shards not yet read to their end count as the mean of those that are."""
    if not num_shards:
        return num_loose
    if not state.num_shards_read:
        return None
    unread = num_shards - state.num_shards_read
    in_shards = state.num_in_shards + unread * state.num_in_shards // state.num_shards_read
    return max(num_loose + in_shards - state.num_present, state.num_done)


def _describe(state: Snapshot, total: int | None, noun: str) -> str:
    if state.first_done is None or state.last_done is None:
        return "starting"
    rejects = f"{state.num_rejected} rejects"
    if state.last_done <= state.first_done:
        return rejects
    rate = (state.num_done - state.num_done_first) / (state.last_done - state.first_done)
    left = f", {timedelta(seconds=round((total - state.num_done) / rate))} left" if total and rate else ""
    return f"{rate:.1f} {noun}/s{left}, {rejects}"


def is_json() -> bool:
    """Whether lines are to be JSON: where SEGRAY_LOG is json."""
    return os.environ.get("SEGRAY_LOG", "").lower() == "json"


def say(text: str, **fields: Any) -> None:
    """Writes a line on standard error: the text, or as JSON with the time, the run and these fields."""
    if is_json():
        time_ = datetime.now(UTC).isoformat(timespec="milliseconds")
        text = json.dumps({"time": time_, **_context, "message": text, **fields})
    print(text, file=sys.stderr, flush=True)


def say_as(run_id: str) -> None:
    """Lines of JSON name this run from here on."""
    _context["run_id"] = run_id


def note(text: str) -> None:
    """Says something beside the results."""
    say(text if is_json() else f"note: {text}")


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table on standard output; all columns but the first are aligned right."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=console.width if console.is_terminal else 120).print(table)
