"""A time budget: what fits into it, and how it is corrected on the way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoseg.errors import RunError
from autoseg.stages import budget as module
from autoseg.stages.budget import Budget, Pace, Share, affordable_steps, duration, fit_length, parse_duration
from autoseg.types.run import TrainSpec

SPEC = TrainSpec()


@pytest.mark.parametrize("text, seconds", [
    ("90s", 90), ("10m", 600), ("10 min", 600), ("6h", 21600), ("1.5h", 5400), ("1h30m", 5400), ("2d", 172800), ("1H 5M", 3900),
])
def test_durations_are_read_as_people_write_them(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "h", "ten minutes", "10m20", "-5m", "0h", "5 weeks"])
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(RunError, match=r"6h|more than nothing"):
        parse_duration(text)


def test_durations_are_told_as_people_say_them():
    assert [duration(s) for s in (42, 1020, 11100, 352800)] == ["42 s", "17 min", "3 h 05 min", "4 d 2 h"]


def test_by_hand_two_folds_and_their_validation():
    spec = TrainSpec(steps_per_epoch=100, val_steps=0)
    shares = [Share("a", 0, 10), Share("a", 0, 10)]
    assert affordable_steps(1020, shares, {"a": Pace(step=0.5, case=1.0)}, spec) == 1000
    assert affordable_steps(1020, [Share("a", 400, 10), Share("a", 0, 10)], {"a": Pace(0.5, 1.0)}, spec) == 1200
    # what one fold has already is more than the other can reach: all the time goes to the other
    assert affordable_steps(120, [Share("a", 5000, 10), Share("a", 0, 10)], {"a": Pace(0.5, 1.0)}, spec) == 200
    assert affordable_steps(1, shares, {"a": Pace(0.5, 1.0)}, spec) == 1


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3000), st.integers(0, 30)), min_size=1, max_size=6),
       st.floats(10, 1e5), st.floats(0.01, 5), st.floats(0.01, 5))
def test_what_is_affordable_fits_and_one_more_step_does_not(rows, seconds, one, two):
    shares, paces = [Share(*row) for row in rows], {"a": Pace(one, 0.1), "b": Pace(two, 0.2)}

    def needed(steps):
        own = [(paces[s.configuration], s) for s in shares]
        return sum(max(0, steps - s.done) * pace.per_step(SPEC) + s.cases * pace.case for pace, s in own)

    steps = affordable_steps(seconds, shares, paces, SPEC)
    if steps > max(1, min(s.done for s in shares)):
        assert needed(steps) <= seconds * (1 + 1e-9) + 1e-6
    if steps > max(s.done for s in shares):
        assert needed(steps + 2) > seconds


@given(st.integers(1, 400_000))
def test_a_run_is_never_longer_than_asked_and_short_runs_get_short_epochs(steps):
    fitted = fit_length(SPEC, steps)
    assert fitted.total_steps <= min(steps, SPEC.total_steps) and fitted.epochs >= 1
    assert fitted.total_steps > 0.94 * min(steps, SPEC.total_steps) or steps < 300
    assert fitted.epochs >= min(20, steps) and (steps < 5000 or fitted.steps_per_epoch == 250)


def test_a_budget_that_does_not_hold_validation_and_a_few_steps_falls_short():
    shares = {("run", 0): Share("a", 0, 10), ("run", 1): Share("a", 500, 10)}
    spec = TrainSpec(steps_per_epoch=100, val_steps=0)
    budget = Budget(100, spec, {"a": Pace(1.0, 3.0)}, shares)
    # 100 s less 6 in reserve; two validations of 30 s, 20 steps for the fold that has none
    assert budget.shortfall() == pytest.approx(80 - 94, abs=0.5)
    assert Budget(60, spec, {"a": Pace(1.0, 3.0)}, shares).shortfall() > 20


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


def simulate(monkeypatch, real_step, measured_step, seconds=600.0, folds=1):
    """Seconds that training takes whose steps are not as they were measured, and the epochs it came to."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    shares = {("run", k): Share("a", 0, 20) for k in range(folds)}
    budget = Budget(seconds, SPEC, {"a": Pace(measured_step, 0.5)}, shares, clock.now)
    begin, lengths = clock.now, set()
    for key in list(shares):
        spec = budget.length(key, SPEC)
        lengths.add((spec.steps_per_epoch, spec.val_steps))
        training = SimpleNamespace(job=SimpleNamespace(spec=spec), step=0, epoch=0)
        start = clock.now
        while training.epoch < training.job.spec.epochs:
            clock.now += spec.steps_per_epoch * real_step * (1 + 0.35 * spec.val_steps / spec.steps_per_epoch)
            training.epoch += 1
            training.step = training.epoch * spec.steps_per_epoch
            length = budget.adjust(key, training, start, 0)
            if length is not None:
                training.job.spec = training.job.spec.model_copy(update={"epochs": length})
        clock.now += 20 * 0.4
        budget.finish(key, 20 * 0.4)
    assert len(lengths) == 1  # else one command could not make all folds longer
    return clock.now - begin


@pytest.mark.parametrize("real", [0.2, 0.4, 0.5, 0.6, 1.1])
@pytest.mark.parametrize("folds", [1, 5])
def test_a_wrong_measurement_is_corrected_on_the_way(monkeypatch, real, folds):
    took = simulate(monkeypatch, real, 0.5, folds=folds)
    assert 480 <= took <= 600
