import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

from segray import lock
from segray.errors import Locked
from segray.lock import LEASE_SECONDS, Holder, hold


def never() -> None:
    raise AssertionError("the lock was lost")


def held(
    root: str, run_id: str, wait_seconds: float = 0, said: list[str] | None = None
) -> contextlib.AbstractContextManager[None]:
    fs, path = fsspec.core.url_to_fs(root, use_listings_cache=False)
    lines: list[str] = [] if said is None else said
    return hold(fs, path, run_id, wait_seconds=wait_seconds, say=lines.append, lost=never)


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    request.getfixturevalue("s3")
    return f"s3://segray/lock/{tmp_path.name}"


def generations(root: str) -> list[str]:
    fs, path = fsspec.core.url_to_fs(root, use_listings_cache=False)
    return sorted(name.rpartition("/")[2] for name in fs.ls(f"{path}/lock", detail=False))


def test_a_second_run_is_told_who_holds_the_lock_and_a_third_gets_it(root: str) -> None:
    with held(root, "first"):
        with (
            pytest.raises(Locked, match=rf"run first on .*, process {os.getpid()}, since 20") as refused,
            held(root, "second"),
        ):
            pass
        assert refused.value.exit_status == 3
    said: list[str] = []
    with held(root, "third", said=said):
        assert generations(root) == ["000000002.json"], "what went before is forgotten"
    assert not said, "a store that keeps two out and a lock that was given back are no news"


def test_waiting_gets_the_lock_when_it_is_given_back(root: str) -> None:
    first = held(root, "first")
    first.__enter__()
    threading.Timer(1.5, first.__exit__, (None, None, None)).start()
    said: list[str] = []
    with held(root, "second", wait_seconds=20, said=said):
        pass
    [line] = said
    assert line.startswith("waiting for run first")


def test_of_many_that_try_at_once_one_gets_it(root: str) -> None:
    inside = []
    barrier, refusals = threading.Barrier(8), threading.Semaphore(0)

    def run(run_id: str) -> None:
        barrier.wait()
        try:
            with held(root, run_id):
                inside.append(run_id)
                for _ in range(7):  # or one that is late would rightly come after us
                    refusals.acquire(timeout=30)
        except Locked:
            refusals.release()

    threads = [threading.Thread(target=run, args=(str(index),)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 1


def test_a_process_that_was_killed_here_loses_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0)
    program = (
        "import time, fsspec; from segray.lock import hold\n"
        f"fs = fsspec.filesystem('file')\n"
        f"with hold(fs, {str(tmp_path)!r}, 'killed', wait_seconds=0, say=print, lost=print):\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Locked), held(str(tmp_path), "second"):
            pass
        process.kill()
    said: list[str] = []
    with held(str(tmp_path), "third", said=said):
        pass
    [line] = said
    assert "taking over from run killed" in line


def test_a_lock_that_another_run_took_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_RENEW_SECONDS", 0.05)
    lost = threading.Event()
    fs = LocalFileSystem()
    with hold(fs, str(tmp_path), "first", wait_seconds=0, say=print, lost=lost.set):
        time.sleep(0.3)
        assert not lost.is_set()
        ours = json.loads((tmp_path / "lock/000000001.json").read_text())
        assert ours["renewed"] > ours["since"]
        (tmp_path / "lock/000000002.json").write_text(json.dumps(ours | {"run_id": "second"}))
        assert lost.wait(5)
    theirs = json.loads((tmp_path / "lock/000000002.json").read_text())
    assert not theirs["released"], "a lock that is not ours is not given back"


def test_a_lock_that_cannot_be_renewed_is_given_up_before_others_may_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lock, "_GIVE_UP_SECONDS", 1.0)
    lost = threading.Event()
    with hold(LocalFileSystem(), str(tmp_path), "first", wait_seconds=0, say=print, lost=lost.set):
        assert not lost.wait(2), "it is renewed"
        shutil.rmtree(tmp_path)
        tmp_path.write_text("no folder any more")
        assert lost.wait(5)
    tmp_path.unlink()


def test_a_store_that_ignores_conditions_is_said_to() -> None:
    fs = fsspec.filesystem("memory")
    said: list[str] = []

    class Ignoring:
        """A memory store whose `create` overwrites."""

        def __getattr__(self, name: str) -> object:
            return getattr(fs, name)

        def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
            fs.pipe_file(path, data)

    with hold(Ignoring(), "/careless", "run", wait_seconds=0, say=said.append, lost=never):
        pass
    [line] = said
    assert "ignores conditional writes" in line


HOLDER = Holder(run_id="r", host="h", place="p", pid=1, since=0.0, renewed=1000.0)


@given(age=st.floats(0, 10 * LEASE_SECONDS), released=st.booleans(), is_here=st.booleans(), runs=st.booleans())
def test_a_holder_is_succeeded_only_when_it_gave_back_ran_out_or_is_seen_to_be_gone(
    age: float, released: bool, is_here: bool, runs: bool
) -> None:
    holder = dataclasses.replace(HOLDER, released=released)
    free = holder.may_be_succeeded(holder.renewed + age, "p" if is_here else "q", lambda _: runs)
    seen_alive = not released and holder.renewed + age - holder.renewed <= LEASE_SECONDS and (runs or not is_here)
    assert free != seen_alive
