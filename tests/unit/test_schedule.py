"""Learning rates as functions of the fraction of the run that is done."""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace

import pytest

from autoseg.errors import PluginError
from autoseg.trainers.schedule import make_schedule
from autoseg.types.run import ScheduleSpec


def test_the_default_is_the_references_polynomial() -> None:
    for fraction in (0.0, 0.1, 0.5, 0.999):
        assert make_schedule(ScheduleSpec())(fraction) == pytest.approx((1 - fraction) ** 0.9)


def test_the_power_can_be_set() -> None:
    assert make_schedule(ScheduleSpec(power=2.0))(0.25) == pytest.approx(0.75**2)


def test_cosine_is_half_a_cosine() -> None:
    spec = ScheduleSpec(kind="cosine")
    assert [make_schedule(spec)(f) for f in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)
    assert make_schedule(spec)(0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("kind", ["polynomial", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_it_rises_during_the_warm_up_then_falls_to_zero_without_a_jump(kind: str, warmup: float) -> None:
    spec = ScheduleSpec(kind=kind, warmup=warmup)
    steps = 1000
    factors = [make_schedule(spec)(i / steps) for i in range(steps + 1)]
    top = round(warmup * steps)
    assert all(a < b for a, b in itertools.pairwise(factors[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(factors[top:]))
    assert factors[top] == pytest.approx(1.0) and factors[-1] == pytest.approx(0.0) and 0 < factors[0] <= 1
    assert max(abs(a - b) for a, b in itertools.pairwise(factors[:-1])) < 0.02


def test_an_unknown_schedule_lists_the_known_ones() -> None:
    with pytest.raises(PluginError, match="unknown schedule 'step'; choose from cosine, polynomial, or give module:Name"):
        make_schedule(ScheduleSpec(kind="step"))


def test_options_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(PluginError, match="takes no options, found steps"):
        make_schedule(ScheduleSpec(options={"steps": 3}))


def halves(fraction: float, spec: ScheduleSpec) -> float:
    """A schedule that a person brings: half as much after each tenth, or after each share that the options name."""
    return float(0.5 ** int(fraction / spec.options.get("every", 0.1) + 1e-9))


def test_a_persons_own_schedule_gets_the_fraction_of_the_run_and_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_schedules", SimpleNamespace(halves=halves))  # type: ignore[arg-type]
    factor = make_schedule(ScheduleSpec(kind="own_schedules:halves"))
    assert [factor(f) for f in (0.0, 0.1, 0.25)] == [1.0, 0.5, 0.25]
    factor = make_schedule(ScheduleSpec(kind="own_schedules:halves", options={"every": 0.5}, warmup=0.2))
    assert factor(0.1) == pytest.approx(0.5, abs=0.01) and [factor(f) for f in (0.2, 0.59, 0.6)] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("spec", [ScheduleSpec(), ScheduleSpec(kind="cosine"), ScheduleSpec(kind="cosine", warmup=0.1)])
def test_a_run_of_another_length_goes_through_the_same_rates(spec: ScheduleSpec) -> None:
    short, long = ([make_schedule(spec)(step / steps) for step in range(0, steps, steps // 10)] for steps in (50, 3000))
    assert short == pytest.approx(long)
