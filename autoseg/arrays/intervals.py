"""Bootstrap intervals of many means at once: the columns of a table share the draws of patients.

One column gives what `autoseg.arrays.statistics.bootstrap_interval` gives for it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.statistics import Groups, group_index

Floats = NDArray[np.float64]


def mean_intervals(table: Floats, groups: Groups = None, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Floats:
    """Intervals of the means of the columns when patients are drawn with replacement.

    table: (cases, columns), NaN where undefined. groups: the patient of each case, None when each is its own.
    Returns (columns, 2), NaN where fewer than two patients have a value. Columns defined for the same cases share their draws.
    """
    patients = group_index(groups, len(table))
    defined = np.isfinite(table)
    intervals = np.full((table.shape[1], 2), np.nan)
    if not table.size:
        return intervals
    patterns, pattern_of = np.unique(defined, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        columns = np.flatnonzero(pattern_of.reshape(-1) == number)
        index = group_index(list(patients[pattern]), int(pattern.sum()))
        if len(index) and index.max() > 0:
            sums, counts = _patient_sums(table[np.ix_(pattern, columns)], index)
            times = _draw(len(sums), draws, seed)
            intervals[columns] = _quantiles((times @ sums) / (times @ counts), len(sums), level)
    return intervals


def mean_of_means_interval(
    table: Floats, groups: Groups = None, level: float = 0.95, draws: int = 2000, seed: int = 0,
) -> tuple[float, float]:
    """Interval of the mean of the columns' means (such as a foreground mean); columns undefined in a draw do not take part in it.

    table: (cases, columns), NaN where undefined. (NaN, NaN) where fewer than two patients have a value.
    """
    some = np.isfinite(table).any(1)
    index = group_index(list(group_index(groups, len(table))[some]), int(some.sum()))
    if not len(index) or not index.max():
        return math.nan, math.nan
    sums, counts = _patient_sums(table[some], index)
    times = _draw(len(sums), draws, seed)
    totals, whole = times @ sums, times @ counts
    means = np.divide(totals, whole, out=np.zeros_like(totals), where=whole > 0)
    low, high = _quantiles((means.sum(1) / (whole > 0).sum(1))[:, None], len(sums), level)[0]
    return float(low), float(high)


def _patient_sums(table: Floats, index: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Sums and numbers of the defined values of each patient, (patients, columns) each."""
    shape = (int(index.max()) + 1, table.shape[1])
    sums, counts = np.zeros(shape), np.zeros(shape)
    defined = np.isfinite(table)
    np.add.at(sums, index, np.where(defined, table, 0.0))
    np.add.at(counts, index, defined)
    return sums, counts


def _draw(patients: int, draws: int, seed: int) -> Floats:
    """How often each patient occurs in each draw."""
    drawn = np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), draws)
    return drawn.astype(np.float64)


def _quantiles(means: Floats, patients: int, level: float) -> Floats:
    """The interval of each column of draws, widened for few patients (Hesterberg 2015, expanded percentile); (columns, 2)."""
    from scipy import stats

    tail = stats.norm.cdf(math.sqrt(patients / (patients - 1)) * stats.t.ppf((1 - level) / 2, patients - 1))
    return np.asarray(np.quantile(means, [tail, 1 - tail], axis=0).T, np.float64)
