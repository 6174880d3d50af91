"""Forecast: the memory and the time that a plan will need, and what other memory budgets would give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from autoseg.errors import AutosegError
from autoseg.planners.reasons import percent
from autoseg.planners.registry import get_planner
from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Configuration, Plan

Rows = list[list[str]]
Seconds = Callable[[Configuration, Plan], float]

GB = 2**30  # as graphics cards count theirs
EPOCHS, STEPS = 1000, 250  # nnU-Net's full training


def network_channels(plan: Plan, configuration: Configuration) -> tuple[int, int]:
    """Input and output channels of a configuration's network; a previous stage adds one input channel per label."""
    previous = len(plan.labels.foreground) if configuration.previous_stage else 0
    return len(plan.channels) + previous, plan.labels.output_count


def peak_gb(plan: Plan, configuration: Configuration) -> float | None:
    """Predicted peak memory of one training step in GB (2^30 bytes); None for a network that cannot be walked."""
    from autoseg.networks.memory import training_memory

    regions, ignore = bool(plan.labels.regions), plan.labels.ignore is not None
    try:
        return training_memory(
            configuration, *network_channels(plan, configuration), precision=plan.precision, regions=regions, ignore=ignore
        ).total / GB
    except AutosegError:
        return None


def coverage(configuration: Configuration) -> float:
    """The share of the median image that a patch sees, 0 to 1."""
    pairs = zip(configuration.patch_size, configuration.median_shape, strict=True)
    return math.prod(min(edge / size, 1.0) for edge, size in pairs)


def what_if(
    dataset: Dataset, fingerprint: Fingerprint, planner: str, budgets_gb: Sequence[float], seconds: Seconds | None = None,
    epochs: int = EPOCHS, steps_per_epoch: int = STEPS,
) -> Rows:
    """What a planner makes of each memory budget: a heading and one row per budget and configuration.

    `seconds` measures a training step on this device, in seconds. It is called for the first 2D and the first 3D configuration;
    other steps are estimated from them by multiply-adds times batch, and marked with ~. Without it, or where it raises an
    AutosegError, times are left out.

    Raises:
        PlanError: a budget for which no plan can be made; PluginError: unknown planner.
    """
    rows = [["budget GB", "configuration", "patch", "of median case", "batch", "peak GB", "s per step", "hours per fold", "time"]]
    clock = _Clock(seconds)
    for budget_gb in budgets_gb:
        plan = get_planner(planner)(dataset, fingerprint, budget_gb)
        for name, configuration in plan.configurations.items():
            peak = peak_gb(plan, configuration)
            timed = clock.seconds(configuration, plan)
            rows.append([
                f"{budget_gb:g}", name, "x".join(map(str, configuration.patch_size)), percent(coverage(configuration)),
                str(configuration.batch_size), "-" if peak is None else f"{peak:.1f}",
                *_times(timed, epochs * steps_per_epoch),
            ])
    return rows


def _times(timed: tuple[float, bool] | None, steps: int) -> Iterator[str]:
    if timed is None:
        yield from ("-", "-", "not measured")
        return
    step, measured = timed
    mark = "" if measured else "~"
    yield f"{mark}{step:.3g}"
    yield f"{mark}{step * steps / 3600:.3g}"
    yield "measured" if measured else "estimate"


class _Clock:
    """Seconds per step: measured once for each number of dimensions, scaled by arithmetic for the rest."""

    def __init__(self, measure: Seconds | None) -> None:
        self.measure = measure
        self.rates: dict[int, float | None] = {}
        self.known: list[tuple[Configuration, float]] = []

    def seconds(self, configuration: Configuration, plan: Plan) -> tuple[float, bool] | None:
        """Seconds and whether they were measured; None where nothing could be."""
        from autoseg.networks.memory import multiply_adds

        if self.measure is None:
            return None
        for other, step in self.known:
            if _same_work(other, configuration):
                return step, True
        try:
            work = configuration.batch_size * float(multiply_adds(configuration, *network_channels(plan, configuration)))
            if configuration.dims not in self.rates:
                self.rates[configuration.dims] = None
                step = self.measure(configuration, plan)
                self.rates[configuration.dims] = step / work
                self.known.append((configuration, step))
                return step, True
        except AutosegError:
            return None
        rate = self.rates[configuration.dims]
        return None if rate is None else (rate * work, False)


def _same_work(a: Configuration, b: Configuration) -> bool:
    fields = ("patch_size", "batch_size", "network", "strides", "kernel_sizes", "features_per_stage", "blocks_per_stage",
              "decoder_blocks_per_stage", "checkpointing", "previous_stage")
    return all(getattr(a, field) == getattr(b, field) for field in fields)
