"""Overlap of weighted ensembles with references, and the greedy search for good weights (Caruana et al. 2004).

Where all runs agree on a label so does every weighted mean of their probabilities, so of each case only the voxels on which runs
disagree are kept; on these any ensemble is scored in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.postprocess import ThresholdOptions, decide
from autoseg.arrays.statistics import Floats
from autoseg.types.labels import Labels

Ints = NDArray[np.integer]
Counts = NDArray[np.int64]
Weights = tuple[int, ...]

MAX_STEPS = 12  # runs added to an ensemble at most, repeats counted
_CHUNK = 1 << 20  # voxels decided or counted at a time
_RISE = 1e-6  # Dice; a smaller rise does not go on


@dataclass(frozen=True)
class Targets:
    """What is measured, in inside indices: `members[t, i]` says whether index i belongs to target t.

    `regions` are the indices that sigmoid outputs write, None for softmax; `ignore` is the index that is not counted.
    """

    members: NDArray[np.bool_]
    regions: tuple[int, ...] | None
    ignore: int | None

    @classmethod
    def of(cls, labels: Labels) -> Targets:
        """The targets of a data set."""
        members = np.zeros((len(labels.targets), len(labels.foreground) + 2), bool)
        for row, (_, indices) in zip(members, labels.targets, strict=True):
            row[list(indices)] = True
        index = {label.value: i + 1 for i, label in enumerate(labels.foreground)}
        regions = tuple(index[value] for value in labels.region_order) if labels.regions else None
        return cls(members, regions, labels.ignore_index)

    def only(self, annotated: Sequence[int]) -> Targets:
        """The same where only some targets are annotated: the others have no voxels, neither true nor predicted ones."""
        return replace(self, members=self.members & np.isin(np.arange(len(self.members)), annotated)[:, None])

    def confusion(self, truth: Ints, predicted: Ints) -> Counts:
        """Voxels by true (row) and predicted (column) index; ignored ones are left out."""
        size = self.members.shape[1]
        matrix = np.zeros(size * size, np.int64)
        rows, columns = truth.reshape(-1), predicted.reshape(-1)
        for start in range(0, rows.size, _CHUNK):
            joint = rows[start:start + _CHUNK].astype(np.intp) * size + columns[start:start + _CHUNK]
            matrix += np.bincount(joint, minlength=size * size)
        matrix = matrix.reshape(size, size)
        if self.ignore is not None:
            matrix[self.ignore] = 0
        return matrix

    def overlap(self, matrix: Counts) -> Counts:
        """(2, targets): true positives and predicted voxels of each target."""
        inside = self.members.astype(np.int64)
        return np.stack([((inside @ matrix) * inside).sum(1), inside @ matrix.sum(0)])

    def totals(self, truth: Ints) -> Counts:
        """(targets,): voxels of each target in a whole reference."""
        found = np.bincount(truth.reshape(-1).astype(np.intp), minlength=self.members.shape[1])
        return self.members.astype(np.int64) @ found

    def decide(self, probabilities: NDArray[np.floating]) -> Ints:
        """Labels of probabilities (outputs, ...), argmax or regions above 0.5."""
        kind = np.dtype(np.uint8 if self.members.shape[1] < 256 else np.int16)
        return decide(probabilities, ThresholdOptions(values=(0.5,) * len(probabilities), regions=self.regions), kind)

    def places(self, probabilities: NDArray[np.floating]) -> Ints:
        """Like `decide`, but which output wins: for regions 1 + the last one above 0.5, also where two write one label."""
        if self.regions is None:
            return self.decide(probabilities)
        numbered = ThresholdOptions(values=(0.5,) * len(probabilities), regions=tuple(range(1, len(probabilities) + 1)))
        return decide(probabilities, numbered, np.dtype(np.int16))


def dice_of(overlap: Counts, totals: Counts) -> Floats:
    """Dice by target, NaN where reference and prediction are both empty."""
    size = overlap[1] + totals
    return np.where(size > 0, 2 * overlap[0] / np.maximum(size, 1), np.nan)


@dataclass(frozen=True)
class CaseTable:
    """A case reduced to what ensembles can differ in.

    `agreed` (2, targets) is the overlap of the other voxels, `totals` (targets,) the reference's voxels, `truth` (voxels,) and
    `probabilities` (runs, outputs, voxels) those of the disputed voxels.
    """

    agreed: Counts
    totals: Counts
    truth: Ints
    probabilities: NDArray[np.float16]

    @classmethod
    def of(
        cls, probabilities: Sequence[NDArray[np.floating]], truth_zyx: Ints, totals: Counts, targets: Targets,
    ) -> CaseTable:
        """Reduce probabilities of each run, (outputs, z, y, x), on a box that holds all of their foreground."""
        places = [targets.places(one) for one in probabilities]
        disputed = np.zeros(truth_zyx.shape, bool)
        for place in places[1:]:
            disputed |= place != places[0]
        labels = targets.decide(probabilities[0])
        agreed = targets.overlap(targets.confusion(truth_zyx[~disputed], labels[~disputed]))
        kept = np.stack([one[:, disputed] for one in probabilities]).astype(np.float16)
        return cls(agreed, totals, truth_zyx[disputed].astype(np.int16), kept)

    def dice(self, weights: Sequence[float], targets: Targets) -> Floats:
        """Dice by target of a weighted ensemble; 0 leaves a run out."""
        used = np.flatnonzero(weights)
        shares = (np.asarray(weights, np.float32) / np.float32(sum(weights)))[used]
        matrix = np.zeros((targets.members.shape[1],) * 2, np.int64)
        for start in range(0, len(self.truth), _CHUNK):
            part = slice(start, start + _CHUNK)
            mean = sum(s * self.probabilities[r, :, part].astype(np.float32) for r, s in zip(used, shares, strict=True))
            matrix += targets.confusion(self.truth[part], targets.decide(np.asarray(mean)))
        return dice_of(self.agreed + targets.overlap(matrix), self.totals)


def case_values(dice: Floats) -> Floats:
    """Values by case, whose mean over cases is the mean over targets of their mean Dice.

    dice: (candidates, cases, targets), NaN where reference and prediction are both empty. There a candidate gets 1 if another
    one found something, since it is right and the other is wrong; where all are empty the case does not count for that target.
    Returns (candidates, cases).
    """
    defined = np.isfinite(dice).any(0)
    counts = defined.sum(0)
    used = counts > 0
    if not used.any():
        return np.zeros(dice.shape[:2])
    filled = np.where(np.isfinite(dice), dice, 1.0) * defined
    values: Floats = (filled[:, :, used] / counts[used]).sum(2) * (dice.shape[1] / used.sum())
    return values


def pooled_dice(dice: Floats) -> tuple[float | None, list[float | None]]:
    """Foreground mean and means by target of (cases, targets), undefined values left out; None where nothing is defined."""
    means = [float(np.mean(column[np.isfinite(column)])) if np.isfinite(column).any() else None for column in dice.T]
    defined = [mean for mean in means if mean is not None]
    return (sum(defined) / len(defined) if defined else None), means


def simplest(weights: Sequence[int]) -> Weights:
    """The same ensemble in smallest numbers: (2, 0, 4) is (1, 0, 2)."""
    common = math.gcd(*weights)
    return tuple(w // common for w in weights)


@dataclass(frozen=True)
class Search:
    """What greedy searches tried: ensembles, single runs first, and their Dice (ensembles, cases, targets).

    `allowed[e, p]` says whether ensemble e was found without the cases of part p. `best` was found on all cases.
    """

    ensembles: list[Weights]
    dice: Floats
    allowed: NDArray[np.bool_]
    best: Weights


def greedy_search(
    runs: int, parts: NDArray[np.intp], count: int, score: Callable[[Sequence[Weights]], Floats],
    advance: Callable[[int], None] = lambda n: None,
) -> Search:
    """Build ensembles greedily, with replacement, on all cases and on all but each part.

    A path begins at its best single run and adds the run that raises the foreground mean most, until none does or `MAX_STEPS`
    is reached. parts: of each case, out of `count` numbered from 0. score: Dice (ensembles, cases, targets) of ensembles; all
    that a round needs are asked for at once. advance: called after each round.
    """
    pool = {tuple(int(i == r) for i in range(runs)): r for r in range(runs)}
    dice = score(list(pool))
    advance(1)
    allowed = [np.ones(count, bool) for _ in pool]
    held_out: list[int | None] = [None, *range(count)]
    at = {part: _leader(case_values(dice), parts, part, range(runs)) for part in held_out}
    names = list(pool)
    state = {part: names[at[part]] for part in held_out}
    active = set(held_out)
    for _ in range(MAX_STEPS if runs > 1 else 0):
        reach = {part: _additions(state[part]) for part in active}
        new = list(dict.fromkeys(e for options in reach.values() for e in options if e not in pool))
        if new:
            dice = np.concatenate([dice, score(new)])
            for ensemble in new:
                pool[ensemble] = len(pool)
                allowed.append(np.zeros(count, bool))
        advance(1)
        values = case_values(dice)
        for part in list(active):
            if part is not None:
                for ensemble in reach[part]:
                    allowed[pool[ensemble]][part] = True
            here = pool[simplest(state[part])]
            best = _leader(values, parts, part, [here, *(pool[e] for e in reach[part])])
            if best == here or _mean(values, parts, part, best) - _mean(values, parts, part, here) < _RISE:
                active.discard(part)
            else:
                state[part] = next(
                    grown for grown in _grown(state[part]) if pool[simplest(grown)] == best)
        if not active:
            break
    return Search(list(pool), dice, np.array(allowed), simplest(state[None]))


def _grown(weights: Weights) -> list[Weights]:
    return [tuple(w + (i == r) for i, w in enumerate(weights)) for r in range(len(weights))]


def _additions(weights: Weights) -> list[Weights]:
    """The ensembles one run further."""
    return [simplest(grown) for grown in _grown(weights)]


def _mean(values: Floats, parts: NDArray[np.intp], without: int | None, index: int) -> float:
    chosen = values[index] if without is None else values[index, parts != without]
    return float(chosen.mean()) if chosen.size else 0.0


def _leader(values: Floats, parts: NDArray[np.intp], without: int | None, among: Iterable[int]) -> int:
    """The first of the best by mean value outside a part."""
    options = list(among)
    means = [_mean(values, parts, without, index) for index in options]
    return options[int(np.argmax(np.asarray(means) >= max(means) - _RISE / 10))]
