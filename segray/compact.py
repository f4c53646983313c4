"""Merges the small parts of a label store, such as many short nights leave, into parts of a useful size."""

import secrets
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from tyro.conf import Positional

from segray.errors import RunError, SettingsError, SinkError
from segray.lock import hold
from segray.progress import note, print_table
from segray.store import LabelStore

__all__ = ["Compact", "compact"]

# The sink's module imports Ray, and is imported when the job starts, so that `--help` answers at once.

_NUM_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Compact:
    """Merges the small parts of a label store. While it runs a reader sees some images twice, and none not at all."""

    sink: Positional[str]
    """The label store: a folder or prefix that `label` wrote."""

    recipe: str | None = None
    """The recipe whose parts are merged. Default: all that are in the store."""

    wait: float = 0.0
    """Seconds to wait for a run that holds the sink's lock."""

    def __post_init__(self) -> None:
        if self.wait < 0:
            raise SettingsError(f"--wait {self.wait}: must be at least 0 seconds")


def compact(job: Compact) -> None:
    """Merges small parts and prints how many there were.

    Each group of parts is written as one, statistics first, before its parts go: whoever lists the store
    in between sees the images of that group twice, and whoever has listed it before may find parts gone.

    Raises:
        SinkError: there is no such store or recipe, or a part cannot be read.
        Locked: a run holds the sink's lock.
        RunError: the lock was lost, or the store failed; no row is lost, and to compact again puts it in order.
    """
    from segray.sink import Sink

    store = LabelStore.open(job.sink)
    if job.recipe is not None:
        store.recipe(job.recipe)  # or there is none
    rows: list[list[str]] = []
    lost = threading.Event()
    name = f"compaction-{secrets.token_hex(4)}"
    with hold(store.filesystem, store.path, name, wait_seconds=job.wait, say=note, lost=lost.set):
        for recipe_id in store.recipe_ids() if job.recipe is None else [job.recipe]:
            sink = Sink(job.sink, recipe_id)
            sink.done()  # of two rejects of an image the newer stays, which merging them would not tell
            for kind in ("label_maps", "rejects"):
                num_before = len(store.parts(kind, recipe_id))
                _merge(sink, kind, lost)
                rows.append([recipe_id, kind, f"{num_before:,}", f"{len(store.parts(kind, recipe_id)):,}"])
    print_table(["recipe", "table", "parts before", "now"], rows)


def _merge(sink: Any, kind: str, lost: threading.Event) -> None:
    def merge(group: list[str]) -> None:
        if lost.is_set():
            raise RunError("the sink's lock was lost to another run; compact again when that has ended")
        sink.merge(kind, group)

    groups = sink.mergeable(kind)
    pool = ThreadPoolExecutor(_NUM_THREADS)
    how: dict[str, Any] = {"total": len(groups), "console": Console(stderr=True), "transient": True}
    try:
        for _ in track(pool.map(merge, groups), f"Merging {kind}", **how, disable=not sys.stderr.isatty()):
            pass
    except SinkError as error:
        raise RunError(f"broke off: {error}; no row is lost, and to compact again goes on from there") from error
    finally:
        pool.shutdown(cancel_futures=True)
