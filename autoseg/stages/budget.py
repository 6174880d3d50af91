"""Time: how long a step takes here, how long everything will take, and how many epochs fit into a time budget."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import RunError
from autoseg.files.workspace import Workspace
from autoseg.types.plan import Configuration, Plan
from autoseg.types.run import RunRecord, TrainSpec

if TYPE_CHECKING:
    import torch

    from autoseg.networks.build import Network
    from autoseg.trainers.default import Training
    from autoseg.trainers.measure import Measured

VALIDATION_STEP = 0.35  # seconds of a validation step, as a share of a training step
RESERVE, RESERVE_SECONDS = 0.04, 2.0  # of the budget, for what cannot be foreseen
EPOCHS_AT_LEAST = 20  # shorter runs get shorter epochs, so that curves can still be read and the length be adjusted
STEPS_AT_LEAST = 20  # of a run; a budget for less is refused
WORTH_A_CHANGE = 0.03  # a run's length is changed only by more than this share
WARM_SECONDS = 20.0  # of a case, beside which warming up does not count
UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Seconds of a text like 90s, 10m, 6h, 1.5h, 1h30m or 2d. Raises RunError for anything else."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(min|[smhd])\s*", text.strip().lower())
    if not parts or "".join(f"{n}{u}" for n, u in parts) != re.sub(r"\s", "", text.lower()):
        raise RunError(f"a time is given like 90s, 10m, 6h, 1h30m or 2d, found {text!r}")
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if seconds <= 0:
        raise RunError(f"a time budget must be more than nothing, found {text!r}")
    return seconds


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 17 min, 3 h 05 min, 4 d 2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


@dataclass(frozen=True)
class Pace:
    """What a configuration costs here, in seconds: a training step, and segmenting and judging one validation case."""

    step: float
    case: float

    def per_step(self, spec: TrainSpec) -> float:
        """Seconds per training step with the validation steps that go with it."""
        return self.step * (1 + VALIDATION_STEP * spec.val_steps / spec.steps_per_epoch)


@dataclass(frozen=True)
class Share:
    """One fold that is still to be done: its configuration, the steps it has, and how many cases will then be segmented."""

    configuration: str
    done: int
    cases: int


def affordable_steps(seconds: float, shares: Sequence[Share], paces: Mapping[str, Pace], spec: TrainSpec) -> int:
    """The largest number of steps N, the same for every fold, so that all of them end within `seconds`; at least 1."""
    left = seconds - sum(share.cases * paces[share.configuration].case for share in shares)
    costs = sorted((share.done, paces[share.configuration].per_step(spec)) for share in shares)
    rate, spent, steps = 0.0, 0.0, 0.0
    for index, (done, cost) in enumerate(costs):  # folds join one after another as N passes what they have
        rate, spent = rate + cost, spent + cost * done
        steps = (left + spent) / rate
        if index + 1 == len(costs) or steps <= costs[index + 1][0]:
            break
    return max(1, int(steps))


def fit_length(spec: TrainSpec, steps: int) -> TrainSpec:
    """`spec` with about `steps` steps, never more than it had: epochs of the usual length, or shorter ones for a short run."""
    steps = min(steps, spec.total_steps)
    per_epoch = max(1, min(spec.steps_per_epoch, steps // EPOCHS_AT_LEAST))
    validation = min(spec.val_steps, max(1, round(spec.val_steps * per_epoch / spec.steps_per_epoch)))
    return spec.model_copy(update={"epochs": max(1, steps // per_epoch), "steps_per_epoch": per_epoch, "val_steps": validation})


@dataclass
class Budget:
    """A time budget that several folds share; what they really take corrects what was measured at the start."""

    seconds: float
    spec: TrainSpec
    paces: dict[str, Pace]
    shares: dict[tuple[str, int], Share]
    started: float = field(default_factory=time.monotonic)
    _epoch: TrainSpec | None = None

    @property
    def left(self) -> float:
        """Seconds left to spend, the reserve put aside."""
        reserve = RESERVE * self.seconds + RESERVE_SECONDS
        return self.started + self.seconds - reserve - time.monotonic()

    def steps(self) -> int:
        """Steps that every fold can have."""
        return affordable_steps(self.left, list(self.shares.values()), self.paces, self.spec)

    def shortfall(self) -> float:
        """Seconds that lack for validation and the fewest sensible steps of every fold; 0 or less when the budget suffices."""
        return sum(
            share.cases * self.paces[share.configuration].case
            + max(0, STEPS_AT_LEAST - share.done) * self.paces[share.configuration].per_step(self.spec)
            for share in self.shares.values()
        ) - self.left

    def length(self, key: tuple[str, int], spec: TrainSpec) -> TrainSpec:
        """The record of a fold that is about to begin, or to go on with epochs as long as they were.

        Epochs are as long in every fold as in the first one that begins: folds then differ in their number of epochs alone, which
        one command can make longer.
        """
        done = self.shares[key].done
        if not done:
            self._epoch = self._epoch or fit_length(self.spec, self.steps())
            shape = {name: getattr(self._epoch, name) for name in ("steps_per_epoch", "val_steps")}
            spec = spec.model_copy(update=shape)
        return spec.model_copy(update={"epochs": self._epochs(spec, done)})

    def _epochs(self, spec: TrainSpec, done: int) -> int:
        """Epochs that fit, no fewer than are done and no more than were asked for."""
        steps = min(self.steps(), self.spec.total_steps)
        return max(steps // spec.steps_per_epoch, -(-done // spec.steps_per_epoch), 1)

    def adjust(self, key: tuple[str, int], training: Training, begun: float, first_step: int) -> int | None:
        """After an epoch: correct the pace by what the steps really took; the new number of epochs if it differs enough."""
        spec, share = training.job.spec, self.shares[key]
        done = _mean_steps(training, training.step)
        fresh = done - _mean_steps(training, first_step)
        if fresh > 0:
            per_step = (time.monotonic() - begun) / fresh
            pace = self.paces[share.configuration]
            self.paces[share.configuration] = replace(pace, step=pace.step * per_step / pace.per_step(spec))
        self.shares[key] = replace(share, done=round(done))
        epochs = self._epochs(spec, training.step)
        changed = abs(epochs - spec.epochs) * spec.steps_per_epoch > WORTH_A_CHANGE * spec.total_steps
        return epochs if changed else None

    def finish(self, key: tuple[str, int], validation_seconds: float) -> None:
        """A fold is done: what its validation took is what the next one's will take."""
        share = self.shares.pop(key)
        if share.cases:
            pace = self.paces[share.configuration]
            self.paces[share.configuration] = replace(pace, case=validation_seconds / share.cases)


def _mean_steps(training: Training, step: int) -> float:
    """Steps of mean duration that the first `step` steps are worth; where patches grow, the first ones are short."""
    spec = training.job.spec
    if spec.growth.kind == "none":
        return step
    from autoseg.trainers.growth import make_sizes

    return make_sizes(spec.growth, training.job.configuration, training.batch_size, spec.total_steps).mean_steps(step)


class RandomCase:
    """A case of noise, for measuring steps before there is data; also as its own previous stage."""

    name = "noise"

    def __init__(self, shape: tuple[int, int, int], channels: int, labels: int) -> None:
        rng = np.random.default_rng(0)
        self.shape = shape
        self.image = rng.standard_normal((channels, *shape), dtype=np.float32)
        self.label = rng.integers(0, labels + 1, shape, dtype=np.int16)
        self.locations: Mapping[int, NDArray[np.integer]] = {}
        self.components: Mapping[int, Sequence[NDArray[np.integer]]] = {}

    def read_image(self, box: tuple[slice, slice, slice]) -> NDArray[np.float32]:
        """Noise (channel, z, y, x)."""
        return self.image[(slice(None), *box)]

    def read_label(self, box: tuple[slice, slice, slice]) -> NDArray[np.int16]:
        """Random labels (z, y, x)."""
        return self.label[box]

    def read_previous(self, box: tuple[slice, slice, slice]) -> NDArray[np.int16]:
        """Random labels (z, y, x)."""
        return self.label[box]


def measure_configuration(
    plan: Plan, configuration: Configuration, spec: TrainSpec, device: str = "auto", seconds: float = 2.0
) -> Measured:
    """Measure a training step of a configuration on this machine with noise for data."""
    from autoseg.networks.hardware import pick_device, pick_precision
    from autoseg.trainers.default import Job
    from autoseg.trainers.measure import measure_step

    patch = configuration.patch_size if configuration.dims == 3 else (1, *configuration.patch_size)
    labels = len(plan.labels.foreground)
    case = RandomCase((patch[0], patch[1], patch[2]), len(plan.channels), labels)
    chosen = pick_device(device)
    previous = labels if configuration.previous_stage is not None else 0
    precision = pick_precision(chosen, spec.precision)
    job = Job(configuration, plan.labels, len(plan.channels), spec, 0, [case], [], chosen, precision, 0, previous)
    return measure_step(job, seconds, steps=2)


def expected_length(plan: Plan, folds: int, spec: TrainSpec = TrainSpec(), device: str = "auto") -> str:
    """What the plan's time budget will buy on this machine, as a sentence; measures a few steps of every configuration."""
    assert plan.time_budget_s is not None
    paces = {
        name: Pace(measure_configuration(plan, configuration, spec, device).seconds, 0.0)
        for name, configuration in plan.configurations.items()
    }
    budget = Budget(plan.time_budget_s, spec, paces, {(name, fold): Share(name, 0, 0) for name in paces for fold in range(folds)})
    fitted = fit_length(spec, budget.steps())
    rates = ", ".join(f"{name} {pace.step:.3g} s" for name, pace in paces.items())
    return (
        f"time budget {duration(plan.time_budget_s)}: a training step takes {rates} here, which gives {fitted.epochs} epochs of "
        f"{fitted.steps_per_epoch} steps for each of {folds} folds of {len(paces)} configuration(s), less what preprocessing and "
        "validation take; train measures again"
    )


def case_seconds(workspace: Workspace, record: RunRecord, network: Network, device: torch.device) -> float:
    """Seconds to segment and judge one validation case with an untrained network, measured on the first one."""
    from autoseg.files.images import read_case
    from autoseg.inference import Member, Model
    from autoseg.networks.build import build
    from autoseg.networks.describe import describe
    from autoseg.networks.hardware import pick_precision
    from autoseg.stages.evaluate import evaluate

    plan, spec = record.plan, record.spec
    configuration = plan.configurations[record.configuration]
    previous = None
    if configuration.previous_stage is not None:
        coarse = plan.configurations[configuration.previous_stage]
        untrained = build(describe(coarse, len(plan.channels), plan.labels.output_count))
        previous = Member(plan, configuration.previous_stage, (untrained,), spec.mirror_axes(coarse))
    member = Member(plan, record.configuration, (network,), spec.mirror_axes(configuration), previous)
    model = Model([member], device, pick_precision(device, spec.precision))
    files = next(case for case in workspace.dataset().cases if case.case in (*record.split.val, *record.split.train))
    seconds = 0.0
    for _ in range(2):  # the first time loads and warms up
        begin = time.monotonic()
        model.predict_image(read_case([Path(path) for path in files.images]))
        if files.label is not None:
            evaluate({files.case: Path(files.label)}, {files.case: Path(files.label)}, plan.labels)
        seconds = time.monotonic() - begin
        if seconds > WARM_SECONDS:
            break
    return seconds
