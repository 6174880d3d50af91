"""Intervals, tests and rankings against scipy and values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from autoseg.arrays.statistics import (
    bootstrap_interval,
    holm,
    paired_difference,
    ranking_stability,
    sign_flip_p_value,
    sign_patterns,
)


def test_the_interval_of_a_mean_agrees_with_students_t_on_normal_values() -> None:
    rng = np.random.default_rng(0)
    for count in (8, 20, 100):
        values = rng.normal(0.8, 0.1, count)
        expected = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
        width = expected[1] - expected[0]
        assert bootstrap_interval(values, draws=20000) == pytest.approx(expected, abs=0.08 * width)


def test_the_interval_agrees_with_scipys_bootstrap_of_many_patients() -> None:
    values = np.random.default_rng(1).exponential(1, 400)
    for statistic, function in (("mean", np.mean), ("median", np.median)):
        result = stats.bootstrap((values,), function, method="percentile", n_resamples=4000, rng=np.random.default_rng(2))
        expected = result.confidence_interval
        width = expected.high - expected.low
        assert bootstrap_interval(values, statistic=statistic, draws=4000) == pytest.approx(  # type: ignore[arg-type]
            (expected.low, expected.high), abs=0.1 * width)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(400):
        low, high = bootstrap_interval(rng.normal(0, 1, 10), draws=500, seed=seed)
        covered += low <= 0 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_cases_of_one_patient_count_as_one_observation() -> None:
    rng = np.random.default_rng(4)
    patients = rng.normal(0, 1, 15)
    repeated, groups = np.repeat(patients, 6), np.repeat(np.arange(15), 6)
    assert bootstrap_interval(repeated, groups, draws=500) == pytest.approx(bootstrap_interval(patients, draws=500))
    low, high = bootstrap_interval(repeated)
    clustered = bootstrap_interval(repeated, [f"p{g}" for g in groups])
    assert clustered[1] - clustered[0] > 2 * (high - low)
    assert paired_difference(repeated, 0 * repeated, groups).p_value == pytest.approx(
        paired_difference(patients, 0 * patients).p_value, abs=0.02)


def test_undefined_values_are_left_out_and_one_patient_has_no_interval() -> None:
    values = [0.5, math.nan, 0.7, 0.6]
    assert bootstrap_interval(values, ["a", "b", "c", "d"]) == bootstrap_interval([0.5, 0.7, 0.6])
    assert all(math.isnan(v) for v in bootstrap_interval([0.5, 0.6], ["a", "a"]))
    assert all(math.isnan(v) for v in bootstrap_interval([]))
    assert bootstrap_interval([0.5] * 5) == (0.5, 0.5)
    with pytest.raises(ValueError, match="one group for each of 2 values, found 1"):
        bootstrap_interval([1, 2], ["a"])


def test_the_median_of_a_draw_is_the_middle_of_what_was_drawn() -> None:
    low, high = bootstrap_interval([0, 1], statistic="median", level=0.5, draws=4000)
    assert (low, high) == (0, 1)
    assert bootstrap_interval([3] * 9 + [9], statistic="median", level=0.5) == (3, 3)


def test_few_pairs_are_tested_exactly_by_hand_and_by_scipy() -> None:
    assert sign_flip_p_value([1, 1, 1, 1, 1]) == 2 / 32
    assert sign_flip_p_value([1, 2, -3]) == 1
    assert sign_flip_p_value([3, 2, -1]) == 4 / 8
    assert sign_flip_p_value([0, 0]) == sign_flip_p_value([]) == 1
    differences = np.random.default_rng(5).normal(0.5, 1, 12)
    oracle = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p_value(differences) == pytest.approx(oracle.pvalue)


def test_many_pairs_are_tested_by_random_flips_close_to_the_t_test() -> None:
    rng = np.random.default_rng(6)
    for shift in (0.0, 0.15, 0.25):
        differences = rng.normal(shift, 1, 120)
        assert sign_flip_p_value(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)
    assert sign_flip_p_value(np.ones(50)) == pytest.approx(1 / 10_001)


def test_sign_flips_reject_a_true_null_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    rejected = sum(sign_flip_p_value(rng.standard_t(3, 10)) <= 0.05 for _ in range(500))
    assert rejected / 500 <= 0.08


def test_a_paired_difference_has_mean_interval_and_count_of_the_defined_pairs() -> None:
    a, b = np.array([0.9, 0.8, math.nan, 0.7]), np.array([0.8, 0.75, 0.5, 0.6])
    found = paired_difference(a, b)
    assert found.cases == 3 and found.mean == pytest.approx(0.25 / 3) and found.p_value == 2 / 8
    assert found.low <= found.mean <= found.high
    empty = paired_difference([math.nan], [1.0])
    assert empty.cases == 0 and empty.p_value == 1 and math.isnan(empty.mean)


def test_all_sign_patterns_are_listed_for_few_patients() -> None:
    patterns, exact = sign_patterns(3)
    assert exact and patterns.shape == (8, 3) and len({tuple(row) for row in patterns}) == 8 and patterns[0].tolist() == [1, 1, 1]
    patterns, exact = sign_patterns(30, flips=100)
    assert not exact and patterns.shape == (101, 30) and set(np.unique(patterns)) == {-1, 1} and (patterns[0] == 1).all()


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0]) and holm([]) == []
    found = holm([0.02, math.nan, 0.03])
    assert found[0] == pytest.approx(0.04) and math.isnan(found[1]) and found[2] == pytest.approx(0.04)


def test_a_clear_ranking_is_stable_and_a_tie_is_not() -> None:
    rng = np.random.default_rng(8)
    base = rng.normal(0, 0.2, (60, 1))
    clear = ranking_stability(base + np.array([0.5, 0.9, 0.7]) + rng.normal(0, 0.01, (60, 3)), draws=300)
    assert clear.ranks.tolist() == [2, 0, 1] and clear.tau == 1 and clear.tau_low == 1
    np.testing.assert_array_equal(clear.shares, [[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    unclear = ranking_stability(rng.normal(0, 1, (60, 4)), draws=300)
    np.testing.assert_allclose(unclear.shares.sum(1), 1)
    assert unclear.tau < 0.95 and unclear.shares.max() < 1


def test_equal_candidates_share_the_better_rank_and_tau_is_scipys() -> None:
    scores = np.random.default_rng(9).normal(0, 1, (20, 1)) * np.ones(3) + np.array([0, 0, 1.0])
    found = ranking_stability(scores, draws=50)
    assert found.ranks.tolist() == [1, 1, 0] and found.tau == 1
    assert ranking_stability(np.ones((5, 1)), draws=10).tau == 1
    noisy = np.random.default_rng(10).normal(0, 1, (12, 5))
    rng = np.random.default_rng(0)
    counts = rng.multinomial(12, np.full(12, 1 / 12), 40)
    taus = [stats.kendalltau(noisy.mean(0), row @ noisy / 12).statistic for row in counts]
    assert ranking_stability(noisy, draws=40, seed=0).tau == pytest.approx(np.mean(taus))
    with pytest.raises(ValueError, match="no case"):
        ranking_stability([[math.nan, 1.0]])
