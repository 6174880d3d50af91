"""Intervals and tests for scores of cases that belong to patients: bootstrap, sign flips, correction for many, rankings.

A patient's cases are not independent, so patients are what is drawn and what is flipped. Undefined scores are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Groups = Sequence[Any] | NDArray[Any] | None
Statistic = Literal["mean", "median"]

EXACT_PATIENTS = 14  # up to here all sign patterns are enumerated
FLIPS = 10_000  # sign patterns drawn beyond that
_BLOCK = 4 << 20  # entries of a table of draws that is worked on at once
_TIE = 1e-12  # relative; sums that differ by rounding count as equal


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over `cases` pairs in which both are defined, its interval over patients, and a two-sided p-value.

    NaN where it cannot be told: the mean of no pair, the interval of one patient.
    """

    mean: float
    low: float
    high: float
    p_value: float
    cases: int


@dataclass(frozen=True)
class RankingStability:
    """How firm a ranking is: `shares[c, r]` of the draws gave candidate c rank r (0 is best), and Kendall's tau-b.

    `ranks` are those on all cases; `tau` is the mean correlation of the draws' rankings with it, `tau_low` its 5th percentile.
    Equal scores take the better rank.
    """

    shares: Floats
    ranks: NDArray[np.intp]
    tau: float
    tau_low: float


def group_index(groups: Groups, count: int) -> NDArray[np.intp]:
    """Number of each case's patient, counted from 0 in order of appearance; None makes each case its own patient.

    Raises ValueError when `groups` does not have `count` entries.
    """
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise ValueError(f"expected one group for each of {count} values, found {len(groups)}")
    seen: dict[Any, int] = {}
    return np.array([seen.setdefault(group, len(seen)) for group in groups], np.intp)


def bootstrap_interval(
    values: ArrayLike, groups: Groups = None, statistic: Statistic = "mean", level: float = 0.95, draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of the mean or median over cases when patients are drawn with replacement; NaNs are left out.

    values: (cases,). groups: the patient of each case, None when each is its own. Percentile interval, widened for few patients
    so that it agrees with Student's t where values are normal (Hesterberg 2015, "What teachers should know about the
    bootstrap", expanded percentile). (NaN, NaN) with fewer than two patients.
    """
    array = np.asarray(values, np.float64)
    index = group_index(groups, len(array))
    defined = np.isfinite(array)
    array, index = array[defined], group_index(list(index[defined]), int(defined.sum()))
    patients = int(index.max()) + 1 if len(index) else 0
    if patients < 2:
        return math.nan, math.nan
    drawn = _resampled(array, index, patients, statistic, draws, seed)
    tail = stats.norm.cdf(math.sqrt(patients / (patients - 1)) * stats.t.ppf((1 - level) / 2, patients - 1))
    low, high = np.quantile(drawn[np.isfinite(drawn)], [tail, 1 - tail])
    return float(low), float(high)


def _resampled(values: Floats, index: NDArray[np.intp], patients: int, statistic: Statistic, draws: int, seed: int) -> Floats:
    """The statistic in each draw of patients."""
    rng = np.random.default_rng(seed)
    order = np.argsort(values)
    sums, counts = np.bincount(index, values, patients), np.bincount(index, minlength=patients).astype(np.float64)
    results = []
    step = max(1, _BLOCK // max(patients, len(values)))
    for start in range(0, draws, step):
        times = rng.multinomial(patients, np.full(patients, 1 / patients), min(step, draws - start))
        if statistic == "mean":
            results.append(times @ sums / (times @ counts))
        else:
            results.append(_weighted_medians(values[order], times[:, index[order]]))
    return np.concatenate(results)


def _weighted_medians(rising: Floats, times: NDArray[np.int64]) -> Floats:
    """Median of `rising` values of which each counts `times` (draws, values) times."""
    total = times.cumsum(1)
    count = total[:, -1]
    lower = (total > ((count - 1) // 2)[:, None]).argmax(1)
    upper = (total > (count // 2)[:, None]).argmax(1)
    medians: Floats = (rising[lower] + rising[upper]) / 2
    return medians


def sign_patterns(patients: int, flips: int = FLIPS, seed: int = 0) -> tuple[NDArray[np.int8], bool]:
    """Sign patterns (patterns, patients) of +1 and -1, the unchanged one first, and whether they are all there are."""
    if patients <= EXACT_PATIENTS:
        bits = np.arange(1 << patients)[:, None] >> np.arange(patients) & 1
        return (1 - 2 * bits).astype(np.int8), True
    drawn = np.random.default_rng(seed).integers(0, 2, (flips + 1, patients), np.int8)
    drawn[0] = 0
    return 1 - 2 * drawn, False


def sign_flip_p_value(differences: ArrayLike, groups: Groups = None, seed: int = 0) -> float:
    """Two-sided p-value of the mean of paired differences: how often flipping patients' signs gives one as far from 0.

    Exact (all patterns) up to 14 patients, else from 10,000 random patterns and the observed one, so never below 1/10,001.
    NaNs are left out; 1.0 when nothing is left.
    """
    array = np.asarray(differences, np.float64)
    index = group_index(groups, len(array))
    defined = np.isfinite(array)
    sums = np.bincount(index[defined], array[defined]) if defined.any() else np.zeros(0)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    patterns, _ = sign_patterns(len(sums), seed=seed)
    observed = abs(sums.sum())
    return float((np.abs(patterns @ sums) >= observed - _TIE * np.abs(sums).sum()).mean())


def paired_difference(
    a: ArrayLike, b: ArrayLike, groups: Groups = None, level: float = 0.95, draws: int = 2000, seed: int = 0,
) -> PairedDifference:
    """Compare two scores of the same cases; pairs with an undefined value are left out.

    a, b: (cases,). Interval: `bootstrap_interval` of the differences. p-value: `sign_flip_p_value`.
    """
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    defined = np.isfinite(difference)
    if not defined.any():
        return PairedDifference(math.nan, math.nan, math.nan, 1.0, 0)
    low, high = bootstrap_interval(difference, groups, "mean", level, draws, seed)
    return PairedDifference(
        float(difference[defined].mean()), low, high, sign_flip_p_value(difference, groups, seed), int(defined.sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979, step-down), in the order given; NaN stays and is not counted."""
    adjusted = [math.nan] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    largest = 0.0
    for position, index in enumerate(order):
        largest = max(largest, p_values[index] * (len(order) - position))
        adjusted[index] = min(largest, 1.0)
    return adjusted


def ranking_stability(
    scores_by_candidate: ArrayLike, draws: int = 2000, seed: int = 0, groups: Groups = None,
) -> RankingStability:
    """How often each candidate takes each rank by mean score when patients are drawn with replacement.

    scores_by_candidate: (cases, candidates), higher is better; cases with an undefined score are left out.
    Raises ValueError when no case is left.
    """
    scores = np.asarray(scores_by_candidate, np.float64)
    index = group_index(groups, len(scores))
    defined = np.isfinite(scores).all(1)
    if not defined.any():
        raise ValueError("no case has a defined score of every candidate")
    scores, index = scores[defined], group_index(list(index[defined]), int(defined.sum()))
    patients, count = int(index.max()) + 1, scores.shape[1]
    sums = np.stack([np.bincount(index, column, patients) for column in scores.T], 1)
    rng = np.random.default_rng(seed)
    means: Floats = rng.multinomial(patients, np.full(patients, 1 / patients), draws).astype(np.float64) @ sums
    ranks, whole = _ranks(means), _ranks(sums.sum(0)[None])[0]
    shares = np.stack([np.bincount(ranks[:, candidate], minlength=count) / draws for candidate in range(count)])
    taus = _kendall(whole, ranks)
    return RankingStability(shares, whole, float(taus.mean()), float(np.quantile(taus, 0.05)))


def _ranks(totals: Floats) -> NDArray[np.intp]:
    """Rank (0 best) of each candidate in each row; sums that differ by rounding only are equal and take the better rank."""
    slack = _TIE * np.abs(totals).max(1, initial=0.0)[:, None, None]
    better: NDArray[np.intp] = (totals[:, None, :] > totals[:, :, None] + slack).sum(2)
    return better


def _kendall(ranks: NDArray[np.intp], drawn: NDArray[np.intp]) -> Floats:
    """Kendall's tau-b between one ranking and each of several; 1 where there is nothing to order."""
    first, second = np.triu_indices(len(ranks), 1)
    a, b = np.sign(ranks[first] - ranks[second]), np.sign(drawn[:, first] - drawn[:, second])
    norm = np.sqrt((a != 0).sum() * (b != 0).sum(1))
    taus: Floats = np.where(norm > 0, (b @ a) / np.maximum(norm, 1), 1.0)
    return taus
