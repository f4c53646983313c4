"""The ledger that tasks and the driver share, as a plain object, and the watch over it."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segray import progress
from segray.progress import Fetched, Ledger, Snapshot, watch


def test_without_a_bound_everything_is_granted() -> None:
    ledger = Ledger("run")
    assert ledger.begin("a")
    assert [ledger.grant("a", number, 64) for number in range(3)] == [64, 64, 64]
    assert not ledger.snapshot().is_bounded


@given(bound=st.integers(1, 50), sizes=st.lists(st.integers(1, 10), max_size=20))
def test_no_more_than_the_bound_is_granted_however_often_a_task_is_tried(bound: int, sizes: list[int]) -> None:
    ledger = Ledger("run", max_images=bound)
    granted = [ledger.grant("a", number, size) for number, size in enumerate(sizes)]
    assert sum(granted) == min(bound, sum(sizes))
    assert [ledger.grant("a", number, size) for number, size in enumerate(sizes)] == granted
    assert ledger.snapshot().is_bounded == (sum(sizes) > bound)
    if sum(sizes) >= bound:
        assert not ledger.begin("b"), "no further block"


def test_a_table_that_is_shorter_the_second_time_is_granted_no_more_than_it_has() -> None:
    ledger = Ledger("run", max_images=50)
    assert ledger.grant("a", 0, 40) == 40
    assert ledger.grant("a", 0, 30) == 30


def test_without_a_bound_a_second_try_may_find_more_than_the_first() -> None:
    ledger = Ledger("run")
    assert ledger.grant("a", 0, 11) == 11
    assert ledger.grant("a", 0, 64) == 64
    assert not ledger.snapshot().is_bounded


def test_after_the_deadline_nothing_more_is_read() -> None:
    ledger = Ledger("run", deadline=time.time() + 0.2)
    assert ledger.begin("a")
    assert ledger.grant("a", 0, 5) == 5
    time.sleep(0.3)
    assert ledger.grant("a", 1, 5) == 0
    assert ledger.grant("a", 0, 5) == 5, "what was granted, if its task is tried again"
    assert not ledger.begin("b")
    assert ledger.snapshot().is_bounded


def test_models_are_told_of_by_what_they_compute_in_with_the_lowest_agreement() -> None:
    ledger = Ledger("run")
    assert ledger.choices() == []
    for dtype, agreement, refused, error in (
        ("bfloat16", 0.999, None, None),
        ("float32", 1.0, 0.97, None),
        ("bfloat16", 0.995, None, "no compiler"),
        ("float32", 0.9999, 0.98, None),
    ):
        ledger.chosen({"dtype": dtype, "agreement": agreement, "refused": refused, "error": error})
    assert ledger.choices() == [
        {"dtype": "bfloat16", "num_models": 2, "agreement": 0.995, "refused": None, "error": "no compiler"},
        {"dtype": "float32", "num_models": 2, "agreement": 0.9999, "refused": 0.97, "error": None},
    ]


def test_what_is_begun_and_not_read_to_its_end_is_named() -> None:
    ledger = Ledger("run")
    for key in "cab":
        ledger.begin(key)
    ledger.fetched("a", Fetched(num_seen=3, num_present=0, is_shard=False))
    assert ledger.unread() == ["b", "c"]


SIGNS: dict[str, Callable[[Ledger], object]] = {
    "alive": Ledger.alive,
    "begin": lambda ledger: ledger.begin("a"),
    "fetched": lambda ledger: ledger.fetched("a", Fetched(num_seen=3, num_present=3, is_shard=True)),
    "grant": lambda ledger: ledger.grant("a", 0, 5),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_whatever_goes_on_is_a_sign_of_life_once_a_model_is_at_work(sign: str) -> None:
    ledger = Ledger("run")
    assert ledger.snapshot().num_signs == 0, "nodes may take long to come"
    ledger.beat()
    before = ledger.snapshot().num_signs
    assert before > 0
    SIGNS[sign](ledger)
    assert ledger.snapshot().num_signs > before


def test_a_stall_is_noticed_and_a_run_that_goes_on_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(progress, "STALL_SECONDS", 0.5)
    ledger, stalled = Ledger("run"), threading.Event()

    def tell(had_begun: bool, seconds: float) -> None:
        assert seconds >= 0.5
        stalled.set() if had_begun else None

    with watch(ledger.snapshot, 10, 0, time.time(), [], lambda: False, tell):
        assert not stalled.wait(0.8), "no model is at work yet"
        for _ in range(10):
            ledger.beat()
            time.sleep(0.1)
        assert not stalled.is_set()
        assert stalled.wait(3)


def test_a_run_whose_models_never_come_is_told_from_one_that_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(progress, "START_SECONDS", 0.5)
    told, stalled = list[bool](), threading.Event()

    def tell(had_begun: bool, _: float) -> None:
        told.append(had_begun)
        stalled.set()

    with watch(Ledger("run").snapshot, 10, 0, time.time(), [], lambda: False, tell):
        assert stalled.wait(5)
    assert told == [False]


def test_a_run_that_has_lost_its_last_node_with_a_gpu_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(progress, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(progress, "START_SECONDS", 2.0)
    ledger, lost, stalled = Ledger("run"), threading.Event(), threading.Event()
    ledger.beat()
    lost.set()
    with watch(ledger.snapshot, 10, 0, time.time(), [], lost.is_set, lambda *_: stalled.set()):
        assert not stalled.wait(1), "a node may come"
        ledger.beat()
        assert not stalled.wait(1.5), "it came, and was lost again"
        assert stalled.wait(3), "none comes for long"


def test_lines_of_json_name_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    progress.note("as a person reads it")
    monkeypatch.setenv("SEGRAY_LOG", "json")
    monkeypatch.setattr(progress, "_context", {})
    progress.say_as("20261122T000000Z-0")
    progress.note("as a machine does")
    progress.say("half of it", num_done=5)
    text, *lines = capsys.readouterr().err.splitlines()
    assert text == "note: as a person reads it"
    told = [json.loads(line) for line in lines]
    assert [line["message"] for line in told] == ["as a machine does", "half of it"]
    assert {line["run_id"] for line in told} == {"20261122T000000Z-0"}
    assert told[1]["num_done"] == 5


def test_a_ledger_that_does_not_answer_for_a_while_ends_neither_the_watch_nor_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.05)
    ledger, stalled, asked = Ledger("run"), threading.Event(), Counter[str]()
    ledger.beat()

    def snapshot() -> Snapshot:
        asked["times"] += 1
        if asked["times"] == 2:
            raise TimeoutError
        return ledger.snapshot()

    with watch(snapshot, 10, 0, time.time(), [], lambda: False, lambda *_: stalled.set()):
        time.sleep(0.5)
    assert asked["times"] > 3
    assert not stalled.is_set()
