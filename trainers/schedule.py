"""Learning-rate schedules, as functions of the fraction of the run that is done."""

from __future__ import annotations

import math
from collections.abc import Callable

from autoseg.errors import PluginError
from autoseg.plugins import resolve
from autoseg.types.run import ScheduleSpec


def polynomial(fraction: float, spec: ScheduleSpec) -> float:
    """(1 - fraction) ** power: the reference's schedule, which takes its steps once an epoch, taken at every step."""
    return float((1 - fraction) ** spec.power)


def cosine(fraction: float, spec: ScheduleSpec) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * fraction))


Schedule = Callable[[float, ScheduleSpec], float]
SCHEDULES: dict[str, Schedule] = {"polynomial": polynomial, "cosine": cosine}


def make_schedule(spec: ScheduleSpec) -> Callable[[float], float]:
    """The factor on the base learning rate after a fraction (0 to 1) of the run; a warm-up rises linearly first.

    Raises:
        PluginError: unknown kind, or options that a built-in schedule does not take.
    """
    schedule = resolve(spec.kind, SCHEDULES, "schedule")
    if spec.kind in SCHEDULES and spec.options:
        raise PluginError(f"schedule {spec.kind!r} takes no options, found {', '.join(spec.options)}")

    def factor(fraction: float) -> float:
        if fraction < spec.warmup:
            return (fraction + 1e-3) / (spec.warmup + 1e-3)
        return schedule((fraction - spec.warmup) / (1 - spec.warmup), spec)

    return factor
