"""Sizes of patch and batch over a run: as planned, or patches that grow to that (Fischer et al. 2024, arXiv 2407.07853)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autoseg.errors import PluginError
from autoseg.plugins import resolve
from autoseg.types.plan import Configuration, Ints
from autoseg.types.run import GrowthSpec

UNTIL = 0.8  # of the run, after which patches have the planned size
LEAST = 2  # voxels along an axis at the lowest stage, over which instance normalisation still tells something
BATCH_POWERS = {"constant": 0.0, "inverse": 1.0}


@dataclass(frozen=True)
class Phase:
    """From the fraction `begin` of the run on, patches have this size (axes as planned) and batches so many of them."""

    begin: float
    patch: Ints
    batch: int


@dataclass(frozen=True)
class Sizes:
    """The phases of a run of `total_steps`, in order; the first begins at 0."""

    phases: tuple[Phase, ...]
    total_steps: int

    def at(self, step: int) -> Phase:
        """The phase that a training step is in."""
        return next(phase for phase in reversed(self.phases) if self.first_step(phase) <= step)

    def first_step(self, phase: Phase) -> int:
        """The step at which a phase begins."""
        return math.ceil(round(phase.begin * self.total_steps, 6))

    @property
    def constant_batch(self) -> bool:
        """Whether all batches have the same size."""
        return len({phase.batch for phase in self.phases}) == 1

    @property
    def work(self) -> float:
        """Voxels of all batches, as a share of what they would be with the last phase's sizes alone."""
        return self._work_until(self.total_steps) / self.total_steps

    def mean_steps(self, step: int) -> float:
        """How many steps of the run's mean size are as much work as its first `step` steps."""
        return self._work_until(step) / self.work

    def _work_until(self, step: int) -> float:
        """Voxels of the first `step` batches, in batches of the last phase."""
        begins = [self.first_step(phase) for phase in self.phases]
        spans = [max(0, min(end, step) - begin) for begin, end in zip(begins, [*begins[1:], step], strict=True)]
        voxels = [math.prod(phase.patch) * phase.batch for phase in self.phases]
        return sum(span * size for span, size in zip(spans, voxels, strict=True)) / voxels[-1]


def grow(
    configuration: Configuration, batch_size: int, /, start: float = 0.0, until: float = UNTIL, stages: int | None = None,
    batch: str | float = "constant",
) -> tuple[Phase, ...]:
    """Patches that grow in steps of equal length from the smallest that the network can take to the planned one.

    Args:
        configuration: what is planned.
        batch_size: patches per batch of the planned size.
        start: share of the planned edges to begin with, at least the smallest patch; 0 begins with that.
        until: fraction of the run after which patches have the planned size.
        stages: how many sizes there are, the planned one included; None: as many as there are, one axis growing at a time.
        batch: "constant" keeps the batch; "inverse" keeps the voxels of a batch; a number between 0 and 1 lies in between (the
            power of the ratio of voxels).

    Raises:
        PluginError: a value that makes no sense.
    """
    power = BATCH_POWERS.get(batch) if isinstance(batch, str) else float(batch)
    if power is None or not 0 <= power <= 1:
        raise PluginError(f"growth option batch must be constant, inverse or a number from 0 to 1, found {batch!r}")
    if not 0 <= start <= 1 or not 0 <= until <= 1 or (stages is not None and stages < 1):
        raise PluginError(f"growth takes start and until from 0 to 1 and stages from 1, found {start=}, {until=}, {stages=}")
    sizes = patch_sizes(configuration, start, stages)
    voxels = math.prod(configuration.patch_size)
    batches = [int(batch_size * (voxels / math.prod(size)) ** power + 1e-9) for size in sizes]
    begins = [until * i / max(1, len(sizes) - 1) for i in range(len(sizes))]
    return tuple(Phase(begin, size, count) for begin, size, count in zip(begins, sizes, batches, strict=True))


def planned(configuration: Configuration, batch_size: int, /) -> tuple[Phase, ...]:
    """The planned patch and batch from beginning to end."""
    return (Phase(0.0, configuration.patch_size, batch_size),)


Growth = Callable[..., tuple[Phase, ...]]  # (configuration, batch size, **options) -> phases, the first of which begins at 0
GROWTHS: Mapping[str, Growth] = {"none": planned, "grow": grow}


def make_sizes(spec: GrowthSpec, configuration: Configuration, batch_size: int, total_steps: int) -> Sizes:
    """The sizes over a run, by a built-in growth or a plug-in.

    Raises:
        PluginError: unknown kind, options that it does not take, or phases that do not suit the plan.
    """
    growth = resolve(spec.kind, GROWTHS, "growth")
    try:
        phases = tuple(growth(configuration, batch_size, **spec.options))
    except TypeError as error:
        raise PluginError(f"growth {spec.kind!r} does not take the options {spec.options}: {error}") from None
    divisor = divisors(configuration)
    ordered = bool(phases) and phases[0].begin == 0 and all(a.begin <= b.begin for a, b in itertools.pairwise(phases))
    fitting = all(
        phase.batch >= 1
        and len(phase.patch) == configuration.dims
        and all(0 < e <= p and e % d == 0 for e, p, d in zip(phase.patch, configuration.patch_size, divisor, strict=True))
        and math.prod(phase.patch) > math.prod(divisor)
        for phase in phases
    )
    if not ordered or not fitting:
        raise PluginError(
            f"growth {spec.kind!r} must give phases from fraction 0 on, with patches in multiples of {divisor}, larger than that "
            f"and up to {configuration.patch_size}; found {phases}"
        )
    return Sizes(phases, total_steps)


def patch_at(spec: GrowthSpec, configuration: Configuration, fraction: float, batch_size: int | None = None) -> tuple[Ints, int]:
    """Patch and batch size after a fraction (0 to 1) of a run."""
    phases = make_sizes(spec, configuration, batch_size or configuration.batch_size, 1).phases
    phase = next(phase for phase in reversed(phases) if phase.begin <= fraction)
    return phase.patch, phase.batch


def patch_sizes(configuration: Configuration, start: float = 0.0, stages: int | None = None) -> list[Ints]:
    """Patches from the smallest (or `start` of the planned edges, if that is more) to the planned one."""
    units = divisors(configuration)
    ends = [edge // unit for edge, unit in zip(configuration.patch_size, units, strict=True)]
    begins = [min(end, max(LEAST, round(start * end))) for end in ends]
    spans = [end - begin for begin, end in zip(begins, ends, strict=True)]
    if stages is None:  # axes take turns so that all arrive together
        turns = [axis for _, axis in sorted(((i + 0.5) / span, axis) for axis, span in enumerate(spans) for i in range(span))]
        grown = [[turns[:count].count(axis) for axis in range(len(units))] for count in range(len(turns) + 1)]
    else:
        grown = [[round(span * (i + 1 - (stages > 1)) / max(1, stages - 1)) for span in spans] for i in range(stages)]
    sizes = [tuple((b + g) * u for b, g, u in zip(begins, steps, units, strict=True)) for steps in grown]
    return list(dict.fromkeys(sizes))


def divisors(configuration: Configuration) -> Ints:
    """What the edges of a patch must be multiples of: the product of the strides along each axis."""
    return tuple(math.prod(row[axis] for row in configuration.strides) for axis in range(configuration.dims))
