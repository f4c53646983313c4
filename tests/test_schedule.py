import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segray.errors import SettingsError
from segray.schedule import Optimization, rate

SCHEDULES = ["cosine", "poly"]


def rates(num_steps: int, **options: object) -> list[float]:
    chosen = Optimization(**options)  # type: ignore[arg-type]
    return [rate(chosen, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_rises_on_a_line_and_is_full_at_the_warm_ups_end(schedule: str) -> None:
    found = rates(200, schedule=schedule, warm_up=0.1)
    assert found[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert found[19] == 1.0
    assert max(found) == 1.0


@pytest.mark.parametrize("warm_up", [0.0, 0.25])
def test_cosine_and_poly_are_their_formulas(warm_up: float) -> None:
    num_rising = int(80 * warm_up)
    shares = [step / (80 - num_rising) for step in range(80 - num_rising)]
    of_cosine, of_poly = (rates(80, schedule=schedule, warm_up=warm_up)[num_rising:] for schedule in SCHEDULES)
    assert of_cosine == pytest.approx([(1 + math.cos(math.pi * share)) / 2 for share in shares])
    assert of_poly == pytest.approx([(1 - share) ** 0.9 for share in shares])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_falls_from_step_to_step_to_nearly_nothing(schedule: str) -> None:
    falling = rates(1000, schedule=schedule, warm_up=0.05)[50:]
    assert all(later < earlier for earlier, later in itertools.pairwise(falling))
    assert falling[-1] < 0.003


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_few_steps_have_a_rate_each(schedule: str) -> None:
    assert rates(1, schedule=schedule) == [1.0]
    assert rates(1, schedule=schedule, warm_up=0.9) == [1.0]
    assert rates(2, schedule=schedule, warm_up=0.5) == [1.0, 1.0]
    assert rates(2, schedule=schedule, warm_up=0.9) == [0.5, 1.0]
    assert rates(2, schedule=schedule) == pytest.approx([1.0, 0.5 if schedule == "cosine" else 0.5**0.9])


@given(
    st.sampled_from(SCHEDULES),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 1_000_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
)
@settings(deadline=None)
def test_every_step_has_a_rate_above_0_and_at_most_1(
    schedule: str, warm_up: float, num_steps_and_step: tuple[int, int]
) -> None:
    num_steps, step = num_steps_and_step
    chosen = Optimization(schedule=schedule, warm_up=warm_up)  # type: ignore[arg-type]
    assert 0 < rate(chosen, step, num_steps) <= 1


def test_the_rate_is_a_share_whatever_the_learning_rate() -> None:
    assert rates(50, learning_rate=1e-3) == rates(50, learning_rate=7.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "--learning-rate 0.0 must be above 0"),
        ({"learning_rate": -1e-3}, "--learning-rate -0.001"),
        ({"learning_rate": math.nan}, "--learning-rate nan"),
        ({"learning_rate": math.inf}, "--learning-rate inf"),
        ({"backbone_rate": -0.1}, "--backbone-rate -0.1 must be at least 0"),
        ({"backbone_rate": math.nan}, "--backbone-rate nan"),
        ({"warm_up": 1.0}, "--warm-up 1.0 must be at least 0 and below 1"),
        ({"warm_up": -0.1}, "--warm-up -0.1"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0 must be at least 0"),
        ({"weight_decay": math.nan}, "--weight-decay nan"),
        ({"momentum": 1.0}, "--momentum 1.0 must be at least 0 and below 1"),
        ({"clip": 0.0}, "--clip 0.0 must be above 0"),
        ({"clip": math.nan}, "--clip nan"),
        ({"accumulate": 0}, "--accumulate 0 must be at least 1"),
        ({"ema": 1.0}, "--ema 1.0 must be at least 0 and below 1"),
        ({"ema": -0.5}, "--ema -0.5"),
    ],
)
def test_settings_out_of_bounds_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Optimization(**options)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(Optimization(), **options)  # type: ignore[arg-type]


def test_settings_at_their_bounds_are_taken() -> None:
    Optimization(backbone_rate=0.0, warm_up=0.0, weight_decay=0.0, momentum=0.0, clip=1e-9, accumulate=1, ema=0.0)


def test_settings_are_read_without_torch_or_ray() -> None:
    code = "import sys, segray.schedule; sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
