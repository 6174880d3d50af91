"""Choosing among candidates on the scores that are reported, without being fooled by it.

Gains are nested: for each part of the cases the choice is made without it and scored on it, so that on average nothing is gained
where there is nothing to gain. That alone does not keep chance out: of many candidates one may win in all parts by luck, and the
usual interval of its cases does not know how many were tried. So the whole procedure is repeated on data without gain, made in
two ways, and what it reports there at most is taken off: signs of patients are flipped (exact for few patients, wrong for
lopsided differences), and patients are drawn from centred differences (right for lopsided ones, too bold for few patients). Where
trainings differ from fold to fold by more than their cases explain, that noise is added to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autoseg.arrays.statistics import Floats, Groups, group_index, sign_patterns

DRAWS = 10_000
TAIL = 0.025  # one-sided: the lower end of a 95 % interval
MIN_PARTS = 3  # with fewer folds the patients are dealt into PARTS parts instead
PARTS = 5
_BLOCK = 8 << 20  # entries of a table of draws that is worked on at once
_SLACK = 1e-9  # relative to what is compared


@dataclass(frozen=True)
class Choice:
    """The outcome for one family of candidates, all against the baseline.

    `best` leads on all cases and is `chosen` if `kept`, else the baseline is. `gain` is the nested mean over cases with bounds
    `low` and `high`, `naive` the mean gain of `best` on the cases it was chosen on. `p_value` is one-sided, for all families.
    """

    best: int
    kept: bool
    chosen: int
    gain: float
    low: float
    high: float
    naive: float
    p_value: float


def deal_parts(folds: Sequence[int] | NDArray[np.integer], groups: Groups = None) -> tuple[NDArray[np.intp], int]:
    """The part of each case, numbered from 0, and how many parts there are.

    Parts are the folds, in rising order; with fewer than three folds patients are dealt at random into five parts.
    """
    distinct, part = np.unique(np.asarray(folds), return_inverse=True)
    if len(distinct) >= MIN_PARTS:
        return part.astype(np.intp), len(distinct)
    patient = group_index(groups, len(part))
    order = np.random.default_rng(0).permutation(int(patient.max()) + 1 if len(patient) else 0)
    return (order % PARTS)[patient], PARTS


def choose(
    scores: ArrayLike, folds: Sequence[int] | NDArray[np.integer], groups: Groups = None, baseline: int = 0,
    allowed: ArrayLike | None = None, tail: float = TAIL, draws: int = DRAWS, seed: int = 0,
) -> Choice:
    """Choose among candidates by their mean score, `choose_families` with one family of all of them.

    allowed: (candidates, parts) of bool, parts as in `deal_parts`; see `choose_families`.
    """
    count = len(np.asarray(scores))
    family = [[index for index in range(count) if index != baseline]]
    return choose_families(scores, folds, family, groups, baseline, allowed, tail, draws, seed)[0]


def choose_families(
    scores: ArrayLike, folds: Sequence[int] | NDArray[np.integer], families: Sequence[Sequence[int]], groups: Groups = None,
    baseline: int = 0, allowed: ArrayLike | None = None, tail: float = TAIL, draws: int = DRAWS, seed: int = 0,
) -> list[Choice]:
    """For each family of candidates choose the best or stay with the baseline; the bounds hold for all families at once.

    scores: (candidates, cases), higher is better, all defined. folds: of each case, see `deal_parts`. families: indices of
    candidates in order of preference: where scores are equal the baseline and then the earlier one wins. groups: the patient of
    each case. allowed: (candidates, parts) of bool, which candidates may be chosen when a part is held out (for those that were
    made from cases of the others).
    A choice is kept when its lower bound (at `tail`, one-sided) is above zero.
    Raises ValueError when shapes do not fit or a score is undefined.
    """
    gains = np.asarray(scores, np.float64) - np.asarray(scores, np.float64)[baseline]
    if not np.isfinite(gains).all():
        raise ValueError("scores must be defined for every candidate and case")
    table = _Table.of(gains, np.asarray(folds), group_index(groups, gains.shape[1]))
    may = np.ones((len(gains), table.parts), bool) if allowed is None else np.asarray(allowed, bool)
    if may.shape != (len(gains), table.parts):
        raise ValueError(f"expected `allowed` of shape {(len(gains), table.parts)}, found {may.shape}")
    rng = np.random.default_rng(seed)
    members = [np.array([baseline, *family], np.intp) for family in families]
    observed = [table.nested(table.sums[None, m], table.squares[None, m], may[m]) for m in members]
    nulls = [
        np.stack([table.statistics(sums[:, m], squares[:, m], may[m]) for m in members], 1)
        for sums, squares in (table.flipped(draws, rng), table.drawn(draws, rng))
    ]
    statistics = np.array([total[0] / np.sqrt(power[0]) if power[0] > 0 else 0.0 for total, power in observed])
    judged = [_simultaneous(null, statistics, tail) for null in nulls]
    limits, p_values = np.max([limit for limit, _ in judged], 0), np.max([p_value for _, p_value in judged], 0)
    return [
        _outcome(gains, m, float(total[0]), float(power[0]), float(limit), float(p_value))
        for m, (total, power), limit, p_value in zip(members, observed, limits, p_values, strict=True)
    ]


def _simultaneous(null: Floats, observed: Floats, tail: float) -> tuple[Floats, Floats]:
    """Limits that any family exceeds with probability `tail` at most, and p-values corrected for their number.

    null: statistics (draws, families) without gain. Each family is judged by its own distribution and the smallest p-value of a
    draw counts (Westfall and Young 1993, step one of min-P), so that one with a wild statistic does not mask the others.
    """
    draws = len(null)
    rising = np.sort(null, 0)
    columns = range(null.shape[1])
    own = [draws - np.searchsorted(rising[:, f], null[:, f] - _SLACK) for f in columns]  # draws at least as large
    smallest = np.sort(np.min(own, 0))
    rank = np.array([draws - np.searchsorted(rising[:, f], observed[f] - _SLACK) for f in columns])
    p_values = np.searchsorted(smallest, rank, side="right") / draws
    allowed = [int(r) for r in np.unique(smallest) if np.searchsorted(smallest, r, side="right") <= tail * draws]
    limits: Floats = rising[draws - 1 - (allowed[-1] if allowed else 0)]
    return limits, p_values


def _outcome(
    gains: Floats, members: NDArray[np.intp], total: float, power: float, limit: float, p_value: float,
) -> Choice:
    means = gains[members].mean(1)
    lead = int(_first_best(means[None, :])[0])
    cases, spread = gains.shape[1], max(limit, 0.0) * np.sqrt(power)
    kept = bool(lead != 0 and total > spread + _SLACK * np.sqrt(power))
    return Choice(
        best=int(members[lead]), kept=kept, chosen=int(members[lead if kept else 0]), gain=total / cases,
        low=float(total - spread) / cases, high=float(total + spread) / cases, naive=float(means[lead]), p_value=p_value)


def _first_best(values: Floats) -> NDArray[np.intp]:
    """The first of the largest entries along axis 1; differences by rounding do not count."""
    top = values.max(1, keepdims=True)
    slack = _SLACK * np.abs(values).max(1, keepdims=True)
    found: NDArray[np.intp] = (values >= top - slack).argmax(1)
    return found


@dataclass(frozen=True)
class _Table:
    """Gains summed by cell, a cell being one patient's cases in one part, and what resampling needs to know of them."""

    cells: Floats  # (candidates, cells)
    part: NDArray[np.intp]  # of each cell
    patient: NDArray[np.intp]
    parts: int
    noise: Floats  # (candidates,) standard deviation over folds that is not explained by cases, per cell

    @classmethod
    def of(cls, gains: Floats, folds: NDArray[np.integer], patient: NDArray[np.intp]) -> _Table:
        """Sum the cases of each patient in each part."""
        if len(folds) != gains.shape[1]:
            raise ValueError(f"expected one fold for each of {gains.shape[1]} cases, found {len(folds)}")
        part, parts = deal_parts(folds, list(patient))
        trained = len(np.unique(folds)) >= MIN_PARTS
        pairs, cell = np.unique(np.stack([part, patient]), axis=1, return_inverse=True)
        sums: Floats = np.stack([np.bincount(cell.ravel(), row, pairs.shape[1]).astype(np.float64) for row in gains])
        noise = _fold_noise(sums, pairs[0], parts) if trained else np.zeros(len(sums))
        return cls(sums, pairs[0], pairs[1], parts, noise)

    @property
    def counts(self) -> NDArray[np.intp]:
        """Cells of each part."""
        return np.bincount(self.part, minlength=self.parts)

    def by_part(self, values: Floats, weights: Floats) -> Floats:
        """Sums of `values` (candidates, cells) under each row of `weights` (draws, cells), as (draws, candidates, parts)."""
        return np.stack([weights[:, self.part == p] @ values[:, self.part == p].T for p in range(self.parts)], 2)

    @property
    def sums(self) -> Floats:
        """Gains by part (candidates, parts)."""
        found: Floats = self.by_part(self.cells, np.ones((1, len(self.part))))[0]
        return found

    @property
    def squares(self) -> Floats:
        """Squared gains of cells by part (candidates, parts)."""
        found: Floats = self.by_part(self.cells**2, np.ones((1, len(self.part))))[0]
        return found

    def nested(self, sums: Floats, squares: Floats, allowed: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Total gain, and sum of its squares, of choices made without the part that they are scored on; one per draw.

        sums, squares: (draws, candidates, parts), candidate 0 the baseline.
        """
        rest = sums.sum(2, keepdims=True) - sums
        total, power = np.zeros(len(sums)), np.zeros(len(sums))
        for p in range(self.parts):
            pick = _first_best(np.where(allowed[:, p] | (np.arange(len(allowed)) == 0), rest[:, :, p], -np.inf))[:, None]
            total += np.take_along_axis(sums[:, :, p], pick, 1)[:, 0]
            power += np.take_along_axis(squares[:, :, p], pick, 1)[:, 0]
        return total, power

    def statistics(self, sums: Floats, squares: Floats, allowed: NDArray[np.bool_]) -> Floats:
        """Total gain over the root of its sum of squares; 0 where the baseline is chosen throughout."""
        total, power = self.nested(sums, np.broadcast_to(squares, sums.shape), allowed)
        return np.where(power > 0, total / np.sqrt(np.where(power > 0, power, 1)), 0.0)

    def flipped(self, draws: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Sums and squares by part (draws, candidates, parts) with patients' signs flipped."""
        patterns, exact = sign_patterns(int(self.patient.max()) + 1, draws, int(rng.integers(1 << 31)))
        if exact and len(patterns) < draws:
            patterns = np.tile(patterns, (draws // len(patterns), 1))
        sums = np.concatenate([
            self.by_part(self.cells, block[:, self.patient].astype(np.float64)) for block in _blocks(patterns, len(self.part))])
        return self._noisy(sums, rng), self.squares[None]

    def drawn(self, draws: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """The same for patients drawn with replacement within each part from gains whose mean there is taken off."""
        counts = self.counts
        means = self.sums / np.maximum(counts, 1)
        widen = np.sqrt(counts / np.maximum(counts - 1, 1))
        centred = (self.cells - means[:, self.part]) * widen[self.part]
        times = np.zeros((draws, len(self.part)), np.int16)
        for p, count in enumerate(counts):
            if count:
                times[:, self.part == p] = rng.multinomial(count, np.full(count, 1 / count), draws)
        blocks = [block.astype(np.float64) for block in _blocks(times, len(self.part))]
        sums = np.concatenate([self.by_part(centred, block) for block in blocks])
        squares = np.concatenate([self.by_part(centred**2, block) for block in blocks])
        return self._noisy(sums, rng), squares

    def _noisy(self, sums: Floats, rng: np.random.Generator) -> Floats:
        """Add what trainings differ by from fold to fold."""
        if not self.noise.any():
            return sums
        noisy: Floats = sums + rng.normal(size=sums.shape) * self.noise[:, None] * self.counts
        return noisy


def _blocks(rows: NDArray[np.integer], width: int) -> list[NDArray[np.integer]]:
    """Cut the draws so that a table of floats stays small."""
    step = max(1, _BLOCK // max(width, 1))
    return [rows[start:start + step] for start in range(0, len(rows), step)]


def _fold_noise(cells: Floats, part: NDArray[np.intp], parts: int) -> Floats:
    """Standard deviation of each candidate's gain over folds beyond what cells explain; (candidates,).

    One-way analysis of variance; the ratio of the two variances is pooled over candidates, as they share cases and trainings.
    """
    counts = np.bincount(part, minlength=parts)
    means = np.stack([np.bincount(part, row, parts) for row in cells]) / counts
    whole = cells.mean(1, keepdims=True)
    between = (counts * (means - whole) ** 2).sum(1) / (parts - 1)
    freedom = len(part) - parts
    if freedom < 1:
        return np.zeros(len(cells))
    within: Floats = ((cells - means[:, part]) ** 2).sum(1) / freedom
    varied = within > _SLACK * (cells**2).max(initial=0.0)
    if not varied.any():
        return np.zeros(len(cells))
    size = (len(part) - (counts**2).sum() / len(part)) / (parts - 1)
    ratio = max(0.0, float((between[varied] / within[varied]).mean()) - 1) / size
    noise: Floats = np.sqrt(ratio * within)
    return noise
