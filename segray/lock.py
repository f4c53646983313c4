"""One writer at a time: a lock in the sink, with a lease that a live run renews and a dead run loses.

    SINK/lock/<generation>.json

Whoever creates the next generation holds the lock. The creation is conditional (If-None-Match on
S3, O_EXCL on disk), so that of two that try one succeeds, and a generation never comes twice. It
may be succeeded once it is released, once its lease has run out, or once its process, where that
can be seen from here, is gone.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from segray.errors import Locked, SinkError
from segray.retry import codes, retrying

__all__ = ["LEASE_SECONDS", "Holder", "hold"]

LEASE_SECONDS = 60.0
"""How long a holder that is not heard of keeps the lock. Clocks must agree to a fraction of it."""

_RENEW_SECONDS = LEASE_SECONDS / 4
_GIVE_UP_SECONDS = LEASE_SECONDS * 3 / 4  # before another may take it
_LOOK_SECONDS = 1.0
_TAKEN_CODES = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}  # it exists, or two create at once
_SETTLE_SECONDS = 5.0  # after a run that was killed: what its workers had begun to write


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What a generation of the lock says of whoever holds it."""

    run_id: str
    """The run."""
    host: str
    """The machine of its driver."""
    place: str
    """Boot and process namespace, within which `pid` means something."""
    pid: int
    """Its driver's process."""
    since: float
    """When it took the lock, seconds since the epoch."""
    renewed: float
    """When it was last heard of."""
    released: bool = False
    """Whether it has given the lock back."""

    def may_be_succeeded(self, now: float, place: str, is_running: Callable[[int], bool]) -> bool:
        """Whether the lock is free: given back, run out, or its process gone.

        Args:
            now: seconds since the epoch.
            place: that of whoever asks.
            is_running: whether a process of this place runs.
        """
        if self.released or now - self.renewed > LEASE_SECONDS:
            return True
        return self.place == place and not is_running(self.pid)

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).isoformat(timespec="seconds")
        return f"run {self.run_id} on {self.host}, process {self.pid}, since {since}"


class _Store:
    """The generations in a sink."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self._folder = f"{root}/lock"

    def newest(self) -> tuple[int, Holder | None]:
        """The highest generation (0: there is none yet) and its holder."""
        try:
            paths = retrying(lambda: self._fs.ls(self._folder, detail=False))
        except FileNotFoundError:
            return 0, None
        names = (path.rpartition("/")[2] for path in paths)
        generations = [int(stem) for stem, _, suffix in (name.partition(".") for name in names) if suffix == "json"]
        if not generations:
            return 0, None
        newest = max(generations)
        return newest, self._read(newest)

    def _read(self, generation: int) -> Holder | None:
        try:
            return Holder(**json.loads(self._fs.cat_file(self._path(generation))))
        except FileNotFoundError:  # a later one has come
            return None
        except json.JSONDecodeError:  # created, and not filled yet
            created = self._fs.info(self._path(generation))["mtime"]
            return Holder(run_id="?", host="?", place="", pid=0, since=created, renewed=created)

    def create(self, generation: int, holder: Holder) -> bool:
        """Creates a generation; False where it exists."""
        data = json.dumps(dataclasses.asdict(holder)).encode()
        try:
            if isinstance(self._fs, LocalFileSystem):
                os.makedirs(self._folder, exist_ok=True)
                with open(self._path(generation), "xb") as file:
                    file.write(data)
            else:
                retrying(lambda: self._fs.pipe_file(self._path(generation), data, mode="create"))
        except FileExistsError:
            return False
        except OSError as error:
            if codes(error) & _TAKEN_CODES:
                return False
            raise
        return True

    def overwrite(self, generation: int, holder: Holder) -> None:
        """Says something new of a generation that is ours."""
        data = json.dumps(dataclasses.asdict(holder)).encode()
        if isinstance(self._fs, LocalFileSystem):
            temporary = f"{self._folder}/.{generation:09d}.json.{os.getpid()}.tmp"
            with open(temporary, "wb") as file:
                file.write(data)
            os.replace(temporary, self._path(generation))
        else:
            self._fs.pipe_file(self._path(generation), data)

    def remove(self, generation: int) -> None:
        """Takes a generation of ours back."""
        self._fs.rm_file(self._path(generation))

    def forget_before(self, generation: int) -> None:
        """Removes earlier generations."""
        for path in self._fs.ls(self._folder, detail=False):
            stem, _, suffix = path.rpartition("/")[2].partition(".")
            if suffix == "json" and int(stem) < generation:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(path)

    def _path(self, generation: int) -> str:
        return f"{self._folder}/{generation:09d}.json"


@contextlib.contextmanager
def hold(
    filesystem: Any,
    root: str,
    run_id: str,
    *,
    wait_seconds: float,
    say: Callable[[str], None],
    lost: Callable[[], None],
) -> Iterator[None]:
    """Holds the lock of a sink.

    Args:
        filesystem: the sink's, of fsspec, without a cache of listings.
        root: the sink's path there.
        run_id: who wants it.
        wait_seconds: how long to wait for another holder.
        say: is told, in a line each, who is waited for, and where the store cannot keep two out.
        lost: is called, in another thread, when another run has taken the lock or it could not be
            renewed in time; whoever holds it must stop writing.

    Raises:
        Locked: another run holds it.
        SinkError: the sink cannot be written.
    """
    store = _Store(filesystem, root)
    try:
        generation, holder = _acquire(store, run_id, wait_seconds, say)
        if store.create(generation, holder):
            say(
                "this store ignores conditional writes (If-None-Match): "
                "two runs at once on this sink would not notice each other"
            )
        store.forget_before(generation)
    except Locked:
        raise
    except Exception as error:  # whatever the store's client raises
        raise SinkError(f"{root} cannot be locked: {type(error).__name__}: {error}") from error

    stop = threading.Event()
    heard = holder.renewed

    def renew() -> None:
        nonlocal heard
        while not stop.wait(_RENEW_SECONDS):
            with contextlib.suppress(Exception):  # of the network; what counts is when it last went well
                newest, _ = store.newest()
                if newest > generation and not stop.is_set():
                    lost()
                    return
                now = time.time()
                store.overwrite(generation, dataclasses.replace(holder, renewed=now))
                heard = now

    def look() -> None:
        while not stop.wait(_LOOK_SECONDS):
            if time.time() - heard > _GIVE_UP_SECONDS:
                lost()
                return

    threads = [threading.Thread(target=work, daemon=True) for work in (renew, look)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(_LOOK_SECONDS)  # or what it has begun to write would come after our last word
        with contextlib.suppress(Exception):  # then its lease runs out, or its process is seen to be gone
            if store.newest()[0] == generation:
                store.overwrite(generation, dataclasses.replace(holder, renewed=time.time(), released=True))


def _acquire(store: _Store, run_id: str, wait_seconds: float, say: Callable[[str], None]) -> tuple[int, Holder]:
    deadline = time.monotonic() + wait_seconds
    place, told = _place(), False
    while True:
        generation, other = store.newest()
        if other is not None and other.run_id == run_id:  # created, and the answer was lost on its way
            return generation, other
        now = time.time()
        if other is None or other.may_be_succeeded(now, place, _is_running):
            holder = Holder(
                run_id=run_id, host=socket.gethostname(), place=place, pid=os.getpid(), since=now, renewed=now
            )
            if store.create(generation + 1, holder):
                if store.newest()[0] > generation + 1:  # ours had been there before, and was forgotten
                    store.remove(generation + 1)
                    continue
                if other is not None and not other.released:
                    say(f"taking over from {other}, which has ended without a word")
                    time.sleep(_SETTLE_SECONDS)
                    holder = dataclasses.replace(holder, renewed=time.time())
                    store.overwrite(generation + 1, holder)
                return generation + 1, holder
            continue
        if time.monotonic() >= deadline:
            raise Locked(
                f"another run holds the lock of this sink: {other}; the same command goes on after it, and the label "
                "job waits with --wait SECONDS (one that has died loses the lock "
                f"{LEASE_SECONDS:.0f} s after it was last heard of)"
            )
        if not told:
            say(f"waiting for {other}")
            told = True
        time.sleep(min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic())))


def _place() -> str:
    """This boot and process namespace; containers of one host have different ones."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux: one namespace a host
        return socket.gethostname()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True
