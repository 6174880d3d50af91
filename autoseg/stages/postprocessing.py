"""Search for post-processing on out-of-fold predictions, label by label; what stays must gain on folds it was not chosen on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.choice import Choice, choose_families
from autoseg.arrays.components import bounding_box
from autoseg.arrays.ensembles import Targets, case_values, dice_of, pooled_dice
from autoseg.arrays.postprocess import ThresholdOptions, apply_postprocessing, decide, needs_image, needs_probabilities
from autoseg.arrays.statistics import Floats
from autoseg.files.images import read_case, read_header
from autoseg.files.probabilities import Box, with_margin
from autoseg.logs import Reporter
from autoseg.stages.contest import Contest, Ints
from autoseg.stages.outoffold import Averaged
from autoseg.types.dataset import CaseFiles
from autoseg.types.labels import Labels
from autoseg.types.record import Spec
from autoseg.types.selection import Gain, PostprocessingTrial

Load = Callable[[int, CaseFiles], Averaged]

THRESHOLDS = (0.2, 0.3, 0.4, 0.6, 0.7, 0.8)
SIZES_VOXELS = (5, 20, 80, 320, 1280)  # of the median voxel volume of the cases
OPENINGS = (1.0, 2.0)  # of the median in-plane spacing
FIELDS: tuple[dict[str, float], ...] = ({}, {"smooth_weight": 0.5, "bilateral_weight": 1.0, "bilateral_mm": 4.0})
ROUNDS = 4
POSSIBLE = 0.02  # probability of a target; below it no threshold that is tried matters
ALL = "all foreground"


@dataclass(frozen=True)
class Alternative:
    """One setting of one kind of step for one target; `target` None works on all of them, `decides` replaces the label map."""

    step: Spec
    kind: str
    target: int | None
    text: str

    @property
    def decides(self) -> bool:
        """Whether it decides anew from probabilities."""
        return needs_probabilities([self.step])

    @property
    def family(self) -> tuple[str, int | None]:
        """Settings of one kind for one target are alternatives to each other."""
        return (self.kind, self.target)


@dataclass
class _State:
    """Steps that were kept so far, what was tried, and gains of what was kept."""

    steps: list[Spec] = field(default_factory=list)
    trials: dict[tuple[str, int | None], PostprocessingTrial] = field(default_factory=dict)
    gains: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Postprocessing:
    """The steps that stay, all that were tried, and the sum of the nested gains of those that stay."""

    steps: tuple[Spec, ...]
    trials: tuple[PostprocessingTrial, ...]
    gain: float


def alternatives(
    labels: Labels, targets: Targets, steps: Sequence[Spec], mm3: float, mm: float, networks: bool, crf: bool,
) -> list[Alternative]:
    """All that is tried on top of `steps`. mm3, mm: volume of a voxel and in-plane spacing that sizes are multiples of."""
    found: list[Alternative] = []
    names = labels.targets
    everything = tuple(range(1, len(labels.foreground) + 1))

    def mask_step(target: int | None, members: Sequence[int], kind: str, text: str, **options: float) -> None:
        step = Spec(kind=kind, options={"labels": list(members), **options})
        if step not in steps:
            found.append(Alternative(step, kind, target, f"{names[target][0] if target is not None else ALL}: {text}"))

    if len(names) > 1:
        mask_step(None, everything, "largest_component", "largest component")
    for target, (_, members) in enumerate(names):
        mask_step(target, members, "largest_component", "largest component")
        for voxels in SIZES_VOXELS:
            size = float(f"{voxels * mm3:.3g}")
            mask_step(target, members, "minimum_size", f"at least {size:g} mm3", mm3=size)
        mask_step(target, members, "fill_holes", "holes filled")
        for spacings in OPENINGS:
            radius = float(f"{spacings * mm:.3g}")
            mask_step(target, members, "opening", f"opened by {radius:g} mm", mm=radius)
    kinds = {step.kind for step in steps}
    if networks and "crf" not in kinds:
        found += _thresholds(labels, targets, steps)
    if networks and crf and not kinds & {"crf", "threshold"}:
        regions = {"regions": list(targets.regions)} if targets.regions is not None else {}
        for number, options in enumerate(FIELDS):
            step = Spec(kind="crf", options={**options, **regions})
            found.append(Alternative(step, "crf", None, f"{ALL}: random field, setting {number + 1}"))
    return found


def _thresholds(labels: Labels, targets: Targets, steps: Sequence[Spec]) -> list[Alternative]:
    """For each target thresholds other than now; those of the other targets stay as they are."""
    regions = targets.regions
    outputs = len(labels.targets) + (regions is None)
    now = next((list(step.options["values"]) for step in steps if step.kind == "threshold"), [0.5] * outputs)
    found = []
    for target, (name, _) in enumerate(labels.targets):
        output = target + (regions is None)
        for threshold in THRESHOLDS:
            values = [threshold if i == output else value for i, value in enumerate(now)]
            if values == now:
                continue
            step = Spec(kind="threshold", options={"values": values, **({"regions": list(regions)} if regions else {})})
            found.append(Alternative(step, "threshold", target, f"{name}: above {threshold:g}"))
    return found


def with_step(steps: Sequence[Spec], added: Spec) -> list[Spec]:
    """The steps with one more: those that decide from probabilities come first and replace one another."""
    if needs_probabilities([added]):
        return [added, *(step for step in steps if not needs_probabilities([step]))]
    return [*steps, added]


def search_postprocessing(
    contest: Contest, load: Load, networks: bool, crf: bool, tail: float, reporter: Reporter, threads: int,
) -> Postprocessing:
    """Try every kind of step for every target, keep what gains for sure, and go on from there until nothing does.

    load: the out-of-fold prediction of a case. networks: whether it has probabilities. tail: one-sided error that something is
    kept wrongly.
    """
    targets, state = Targets.of(contest.labels), _State()
    mm3, mm = _voxel(contest)
    for number in range(ROUNDS):
        tried = alternatives(contest.labels, targets, state.steps, mm3, mm, networks, crf)
        dice, seconds = _try_all(contest, load, state.steps, tried, number, reporter, threads)
        if not _keep(state, tried, dice, seconds, contest, targets, tail):
            break
    return Postprocessing(tuple(state.steps), tuple(state.trials.values()), sum(state.gains))


def _voxel(contest: Contest) -> tuple[float, float]:
    """Medians over cases: volume of a voxel in mm3 (in a single slice its area in mm2), and in-plane spacing in mm."""
    grids = [read_header(path).grid for path in contest.references.values()]
    sizes = [float(np.prod(grid.spacing[1:] if grid.shape[0] == 1 else grid.spacing)) for grid in grids]
    return float(np.median(sizes)), float(np.median([sorted(grid.spacing)[1] for grid in grids]))


def _try_all(
    contest: Contest, load: Load, steps: Sequence[Spec], tried: Sequence[Alternative], number: int, reporter: Reporter,
    threads: int,
) -> tuple[Floats, Floats]:
    """Dice (1 + alternatives, cases, targets), unchanged first, and mean seconds per case (alternatives,)."""
    name = f"post-processing, {len(tried)} settings" if not number else f"post-processing, round {number + 1}"
    results = []
    with reporter.task(name, len(contest.order)) as task, ThreadPoolExecutor(max(threads, 1)) as pool:
        for found in pool.map(lambda one: _try_case(load, one[0], one[1], contest.targets(one[1]), steps, tried), contest.order):
            results.append(found)
            task.advance(note=contest.order[len(results) - 1][1].case)
    return np.stack([dice for dice, _ in results], 1), np.mean([seconds for _, seconds in results], 0)


def _try_case(
    load: Load, fold: int, case: CaseFiles, targets: Targets, steps: Sequence[Spec], tried: Sequence[Alternative],
) -> tuple[Floats, list[float]]:
    """Dice (1 + alternatives, targets) of one case, and the seconds each alternative took."""
    found = load(fold, case)
    image = read_image(found, case) if needs_image([*steps, *(one.step for one in tried)]) else None
    trial = _Trial(found, image, targets, list(steps))
    dice, seconds = [trial.dice(trial.whole)], []
    for one in tried:
        begin = time.perf_counter()
        dice.append(trial.dice(trial.after(one)))
        seconds.append(time.perf_counter() - begin)
    return np.stack(dice), seconds


def read_image(found: Averaged, case: CaseFiles) -> NDArray[np.generic]:
    """The part of a case's image that its prediction was cut to."""
    return read_case([Path(p) for p in case.images]).array_czyx[(slice(None), *found.box)]


class _Trial:
    """One case on which alternatives are tried; only the box that a step can change is counted anew."""

    def __init__(self, found: Averaged, image: NDArray[np.generic] | None, targets: Targets, steps: list[Spec]) -> None:
        self.found, self.image, self.targets, self.steps = found, image, targets, steps
        self.base = self._apply(found.index, steps)
        self.whole = targets.confusion(found.truth, self.base)
        self._boxes: dict[tuple[int, ...], Box | None] = {}

    def _apply(self, index: Ints, steps: Sequence[Spec]) -> Ints:
        return apply_postprocessing(index, steps, self.found.probabilities, self.image, self.found.grid.spacing)

    def dice(self, matrix: NDArray[np.int64]) -> Floats:
        """Dice by target."""
        return dice_of(self.targets.overlap(matrix), self.found.totals)

    def after(self, one: Alternative) -> NDArray[np.int64]:
        """The confusion after an alternative."""
        found, targets = self.found, self.targets
        if one.decides and (self.steps or one.target is None):
            return targets.confusion(found.truth, self._apply(found.index, with_step(self.steps, one.step)))
        box = self._likely(one) if one.decides else self._mask_box(tuple(one.step.options["labels"]))
        if box is None:
            return self.whole
        if one.decides:
            assert found.probabilities is not None
            options = ThresholdOptions.model_validate(one.step.options)
            changed = decide(found.probabilities[(slice(None), *box)], options, self.base.dtype)
        else:
            changed = apply_postprocessing(self.base[box], [one.step], spacing=found.grid.spacing)
        return self.whole - targets.confusion(found.truth[box], self.base[box]) + targets.confusion(found.truth[box], changed)

    def _mask_box(self, labels: tuple[int, ...]) -> Box | None:
        if labels not in self._boxes:
            self._boxes[labels] = _roomy(np.isin(self.base, labels))
        return self._boxes[labels]

    def _likely(self, one: Alternative) -> Box | None:
        """Where a target is at all likely, so that a threshold can matter."""
        assert self.found.probabilities is not None and one.target is not None
        output = one.target + (self.targets.regions is None)
        if (-1, output) not in self._boxes:
            self._boxes[-1, output] = _roomy(self.found.probabilities[output] > POSSIBLE)
        return self._boxes[-1, output]


def _roomy(mask: NDArray[np.bool_]) -> Box | None:
    """The box of a mask with one voxel around it, so that its outside stays its outside and a volume does not become a slice."""
    box = bounding_box(mask)
    return None if box is None else with_margin(box, mask.shape)


def _keep(
    state: _State, tried: Sequence[Alternative], dice: Floats, seconds: Floats, contest: Contest, targets: Targets, tail: float,
) -> bool:
    """Keep what gains for sure and does not get into another's way; note everything. Returns whether anything was kept."""
    values = case_values(dice)
    families: dict[tuple[str, int | None], list[int]] = {}
    for position, one in enumerate(tried):
        families.setdefault(one.family, []).append(position + 1)
    choices = choose_families(values, contest.case_folds, list(families.values()), contest.patients, tail=tail)
    accepted: list[Alternative] = []
    for (family, members), choice in sorted(zip(families.items(), choices, strict=True), key=lambda pair: -pair[1].gain):
        best = choice.best or members[int(values[members].mean(1).argmax())]
        one = tried[best - 1]
        keeps = choice.kept and not any(_collide(one, other, targets) for other in accepted)
        if keeps:
            accepted.append(one)
            state.steps = with_step(state.steps, one.step)
            state.gains.append(choice.gain)
        if keeps or family not in state.trials:
            before, after = _shown(dice[0], one), _shown(dice[best], one)
            state.trials[family] = PostprocessingTrial(
                step=one.step, name=one.text, before=before, after=after, kept=keeps, gain=gain_of(choice),
                seconds=float(seconds[best - 1]))
    return bool(accepted)


def _collide(one: Alternative, other: Alternative, targets: Targets) -> bool:
    """Whether the effect of one was measured without the other one, although they touch the same voxels."""
    if one.target is None or other.target is None or one.decides or other.decides:
        return True
    return bool((targets.members[one.target] & targets.members[other.target]).any())


def _shown(dice: Floats, one: Alternative) -> float | None:
    """Dice of the alternative's target, or the foreground mean."""
    mean, by_target = pooled_dice(dice)
    return mean if one.target is None else by_target[one.target]


def gain_of(choice: Choice) -> Gain:
    """The record of a choice's gain."""
    return Gain(mean=choice.gain, low=choice.low, high=choice.high, naive=choice.naive, p_value=choice.p_value)
