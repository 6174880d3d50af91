"""Intervals of whole tables against the interval of one column, and against theory."""

from __future__ import annotations

import numpy as np
import pytest

from autoseg.arrays.intervals import mean_intervals, mean_of_means_interval
from autoseg.arrays.statistics import bootstrap_interval


def test_each_column_has_the_interval_it_has_alone():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(24, 7))
    table[[3, 9], 2] = table[5, 4] = np.nan
    table[:, 5] = np.nan
    table[1:, 6] = np.nan
    patients = [f"p{i // 2}" for i in range(24)]
    for groups in (None, patients):
        expected = [bootstrap_interval(column, groups) for column in table.T]
        np.testing.assert_allclose(mean_intervals(table, groups), expected, atol=1e-12)


def test_the_mean_of_one_column_is_that_column():
    values = np.random.default_rng(1).normal(size=(30, 1))
    assert mean_of_means_interval(values) == pytest.approx(bootstrap_interval(values[:, 0]))


def test_the_mean_of_full_columns_is_the_mean_of_each_case():
    table = np.random.default_rng(2).normal(size=(25, 4))
    patients = np.arange(25) // 3
    assert mean_of_means_interval(table, patients) == pytest.approx(bootstrap_interval(table.mean(1), patients))


def test_a_label_that_few_cases_hold_still_counts_as_much_as_the_others():
    table = np.full((40, 2), np.nan)
    table[:, 0] = 0.9
    table[:3, 1] = 0.1
    low, high = mean_of_means_interval(table)
    assert low == pytest.approx(0.5) and 0.5 <= high <= 0.9


def test_fewer_than_two_patients_have_no_interval():
    table = np.array([[1.0, np.nan], [2.0, np.nan]])
    assert np.isnan(mean_intervals(table, ["a", "a"])).all() and np.isnan(mean_of_means_interval(table, ["a", "a"])).all()
    assert np.isnan(mean_of_means_interval(np.full((3, 2), np.nan))).all()
    assert mean_intervals(np.zeros((0, 0))).shape == (0, 2) and mean_intervals(np.zeros((3, 0))).shape == (0, 2)
    assert np.isnan(mean_intervals(np.zeros((0, 3)))).all()
