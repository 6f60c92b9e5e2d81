"""--max_minutes and --max_cost against a clock that the test turns."""

from __future__ import annotations

import pytest

from train.engine import TrainingConfig
from train.engine.limits import LAST_WORDS, Limits


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("train.engine.limits.time.time", lambda: self.now)
        monkeypatch.setattr("train.engine.limits.psutil.Process", lambda: self)

    def create_time(self) -> float:
        return 1000.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def simulate(
    clock: Clock, limits: Limits, step_seconds: float, pause: float, slower_by: float = 1.0
) -> tuple[int, int]:
    """(steps taken, total planned) of a run whose steps get slower after the total was fixed."""
    done, total, every = 0, None, None
    while done != total and not limits.out_of_time(step_seconds * slower_by, pause):
        clock.now += step_seconds * (slower_by if total else 1.0)
        done += 1
        if total is None and done >= limits.steps_to_measure:
            total, every = limits.fix(done, step_seconds, pause)
        elif every and done % every.evaluate == 0 and done != total:
            clock.now += pause
    return done, total


@pytest.mark.parametrize(("step_seconds", "pause"), [(0.01, 0.1), (1.0, 4.0), (3.0, 10.0), (20.0, 1.0)])
def test_the_schedule_ends_when_the_time_does(clock, step_seconds, pause):
    limits = Limits(TrainingConfig(max_minutes=5), steps_per_epoch=1e6, spent=0)
    clock.now += 20  # imports and data
    done, total = simulate(clock, limits, step_seconds, pause)
    ended = clock.now + pause + LAST_WORDS - 1000
    assert done == total
    assert 300 * 0.75 - step_seconds < ended <= 300


def test_a_machine_that_slows_down_is_stopped_by_the_clock(clock):
    limits = Limits(TrainingConfig(max_minutes=5), steps_per_epoch=1e6, spent=0)
    done, total = simulate(clock, limits, 1.0, 4.0, slower_by=2.0)
    assert done < total and clock.now + 4.0 + LAST_WORDS - 1000 <= 300
    assert limits.reason(done, late=True) == "max_minutes"


def test_money_is_time_and_counts_what_earlier_parts_spent(clock):
    config = TrainingConfig(max_cost=1.0, hourly_rate=6.0)
    assert Limits(config, 10, spent=0).deadline == pytest.approx(1600)
    later = Limits(config, 10, spent=400)
    assert later.deadline == pytest.approx(1200)
    clock.now = 1200.0
    assert later.spent == pytest.approx(600)
    assert later.out_of_time(0.1, 0.1) and later.reason(3, late=True) == "max_cost"


def test_the_first_limit_counts(clock):
    assert Limits(TrainingConfig(), 10.5, 0).max_steps == 11  # one epoch
    assert Limits(TrainingConfig(epochs=2, max_steps=30), 10.5, 0).max_steps == 21
    assert Limits(TrainingConfig(max_minutes=1), 10.5, 0).max_steps is None
    both = Limits(TrainingConfig(max_minutes=1, max_steps=30), 10.5, 0)
    assert both.fix(4, 0.01, 0.1)[0] == 30 and both.reason(30, late=False) == "max_steps"
