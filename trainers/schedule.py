"""Learning-rate schedules, as functions of the fraction of the run that is done."""

from __future__ import annotations

import math
from collections.abc import Callable

from autoseg.types.run import ScheduleSpec


def polynomial(fraction: float, spec: ScheduleSpec) -> float:
    """(1 - fraction) ** power: the reference's schedule, which takes its steps once an epoch, taken at every step."""
    return float((1 - fraction) ** spec.power)


def cosine(fraction: float, spec: ScheduleSpec) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * fraction))


Schedule = Callable[[float, ScheduleSpec], float]
SCHEDULES: dict[str, Schedule] = {"polynomial": polynomial, "cosine": cosine}


def learning_rate_factor(fraction: float, spec: ScheduleSpec, schedule: Schedule) -> float:
    """Factor on the base learning rate after `fraction` (0 to 1) of the run; a warm-up rises linearly first."""
    if fraction < spec.warmup:
        return (fraction + 1e-3) / (spec.warmup + 1e-3)
    return schedule((fraction - spec.warmup) / (1 - spec.warmup), spec)
