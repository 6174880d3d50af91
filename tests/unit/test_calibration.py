"""Calibration: temperatures that were planted are found again, and scores agree with what can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.special import expit, softmax

from autoseg.arrays.calibration import (
    BAND,
    BINS,
    VoxelSample,
    calibrate_sample,
    draw,
    fit_temperature,
    nll,
    score,
    strata,
)


def classes(count: int, temperature: float, seed: int = 0, number: int = 3) -> VoxelSample:
    """Voxels whose classes are drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (count, number))
    cumulative = softmax(logits / temperature, 1).cumsum(1)
    truth = (rng.random(count)[:, None] > cumulative).sum(1).clip(0, number - 1)
    return VoxelSample(logits, truth, np.ones(count), np.ones(count, bool))


def yes_or_no(count: int, temperature: float, seed: int = 0) -> VoxelSample:
    """Voxels with two regions, each drawn from sigmoid(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (count, 2))
    truth = (rng.random((count, 2)) < expit(logits / temperature)).astype(int)
    return VoxelSample(logits, truth, np.ones(count), np.ones(count, bool))


@pytest.mark.parametrize("make", [classes, yes_or_no])
@pytest.mark.parametrize("planted", [0.5, 1.0, 2.5])
def test_a_planted_temperature_is_found_and_makes_probabilities_right(make, planted):
    sample = make(30_000, planted)
    found = fit_temperature(sample)
    assert found == pytest.approx(planted, rel=0.05)
    assert nll(sample, found) <= min(nll(sample, t) for t in (0.8 * found, 1.25 * found))
    after, before = score(sample, found), score(sample, 1.0)
    assert after.ece < 0.015
    if planted != 1:
        assert before.ece > 0.03 and after.nll < before.nll and after.brier < before.brier


def test_weights_count_like_repeated_voxels():
    sample = classes(2000, 2.0)
    times = np.random.default_rng(1).integers(1, 4, 2000)
    heavy = VoxelSample(sample.logits, sample.truth, times, sample.near)
    repeated = VoxelSample(*(np.repeat(a, times, 0) for a in (sample.logits, sample.truth, np.ones(2000), sample.near)))
    assert nll(heavy, 1.3) == pytest.approx(nll(repeated, 1.3))
    one, other = score(heavy, 1.3), score(repeated, 1.3)
    assert one.ece == pytest.approx(other.ece) and one.brier == pytest.approx(other.brier)
    assert fit_temperature(heavy) == pytest.approx(fit_temperature(repeated), rel=1e-3)


def test_the_error_and_the_table_are_those_worked_out_by_hand():
    """Four voxels at 0.8, three right; two at 0.6, none right: |0.75 - 0.8| 4/6 + |0 - 0.6| 2/6."""
    probabilities = np.array([[0.2, 0.8]] * 4 + [[0.6, 0.4]] * 2)
    truth = np.array([1, 1, 1, 0, 1, 1])
    sample = VoxelSample(np.log(probabilities), truth, np.ones(6), np.ones(6, bool))
    found = score(sample, 1.0)
    assert found.ece == pytest.approx(0.05 * 4 / 6 + 0.6 * 2 / 6)
    assert found.nll == pytest.approx(-np.log([0.8, 0.8, 0.8, 0.2, 0.4, 0.4]).mean())
    assert found.brier == pytest.approx((3 * 0.08 + 1.28 + 2 * 0.72) / 6)
    table = {round(b.confidence, 3): (b.share, b.accuracy) for b in found.reliability}
    assert table == {0.6: (pytest.approx(1 / 3), 0.0), 0.8: (pytest.approx(2 / 3), 0.75)}
    assert all(b.low < b.confidence <= b.high and b.high - b.low == pytest.approx(1 / BINS) for b in found.reliability)


def test_certain_and_right_is_no_error_at_all():
    sample = VoxelSample(np.array([[90.0, 0.0], [0.0, 90.0]]), np.array([0, 1]), np.ones(2), np.ones(2, bool))
    found = score(sample, 1.0)
    assert found.ece == pytest.approx(0) and found.brier == pytest.approx(0)
    assert fit_temperature(sample) < 1 and np.isfinite(nll(sample, 0.1))


def test_no_temperature_changes_what_is_most_probable():
    sample = classes(500, 1.0)
    assert np.array_equal(softmax(sample.logits / 7, 1).argmax(1), sample.logits.argmax(1))


def test_each_part_is_scored_with_a_temperature_fitted_without_it():
    samples = [classes(4000, t, seed) for seed, t in enumerate((2.0, 2.0, 0.7))]
    found = calibrate_sample(samples, [0, 1, 2], "folds")
    assert found.parts == "folds" and found.cases == 3 and found.voxels == 12_000
    assert found.temperature == pytest.approx(fit_temperature(VoxelSample.joined(samples)))
    for part in range(3):
        others = VoxelSample.joined([s for i, s in enumerate(samples) if i != part])
        assert found.part_temperatures[part] == pytest.approx(fit_temperature(others))
    assert found.whole_after is not None
    each = np.repeat([found.part_temperatures[i] for i in range(3)], 4000)
    assert found.whole_after == score(VoxelSample.joined(samples), each)
    naive = score(VoxelSample.joined(samples), found.temperature)
    assert found.whole_after.nll > naive.nll, "what is held back does worse than what was fitted on"


def test_the_temperature_is_fitted_near_structures_and_told_for_all_voxels():
    samples = []
    for seed in range(3):
        near, far = classes(4000, 2.0, seed), classes(8000, 0.5, 10 + seed)
        samples.append(VoxelSample.joined([near, VoxelSample(far.logits, far.truth, far.weights, np.zeros(8000, bool))]))
    found = calibrate_sample(samples, [0, 1, 2], "folds")
    assert found.temperature == pytest.approx(2.0, rel=0.08)
    assert found.near_before is not None and found.near_after is not None
    assert found.near_after.ece < 0.02 < found.near_before.ece
    assert found.whole_before is not None and found.whole_after is not None
    assert found.whole_after.nll > found.whole_before.nll, "what it costs elsewhere is not hidden"
    none = [VoxelSample(s.logits, s.truth, s.weights, np.zeros(12_000, bool)) for s in samples]
    blind = calibrate_sample(none, [0, 1, 2], "folds")
    assert blind.near_before is None and blind.temperature < 2


def test_a_single_part_has_a_temperature_and_no_scores():
    found = calibrate_sample([classes(500, 2.0)], [0], "none")
    assert found.temperature > 1 and found.whole_after is None and found.near_before is None


def scene() -> tuple[np.ndarray, np.ndarray]:
    truth, found = np.zeros((20, 24, 28), np.int16), np.zeros((20, 24, 28), np.int16)
    truth[5:14, 6:16, 8:20] = 1
    truth[5:14, 6:16, 14:20] = 2
    found[6:14, 6:16, 8:20] = 1
    return truth, found


def test_strata_are_bands_around_every_boundary_of_truth_and_prediction():
    truth, found = scene()
    kind = strata(truth, found)
    expected = np.full(truth.shape, 3)
    expected[(truth > 0) | (found > 0)] = 2
    structure = np.ones((3, 3, 3), bool)
    for label in (truth, found):
        for value in range(3):
            mask = label == value
            inner = mask & ~ndimage.binary_erosion(mask, structure, BAND, border_value=1)
            outer = ndimage.binary_dilation(mask, structure, BAND) & ~mask
            expected[inner | outer] = 1
    assert np.array_equal(kind, expected)


def test_ignored_voxels_are_never_drawn_and_outside_counts_as_background():
    truth, found = scene()
    truth[:3] = 3
    truth[:, :2] = -1
    truth[:3, :2] = 3
    kind = strata(truth, found, ignore=3)
    assert (kind[:3] == 0).all() and (kind[3:] > 0).all() and (kind[16:, 0] == 3).all()
    places, _ = draw(kind, 3000, np.random.default_rng(0))
    assert (truth.reshape(-1)[places] != 3).all()
    nothing = np.zeros((4, 4, 4), int)
    assert (strata(nothing, nothing) == 3).all()


def test_a_sample_stands_for_the_whole():
    kind = strata(*scene())
    for count in (300, 5000, 10**6):
        places, weights = draw(kind, count, np.random.default_rng(0))
        assert len(set(places.tolist())) == len(places) <= count
        drawn = kind.reshape(-1)[places]
        for number in (1, 2, 3):
            assert weights[drawn == number].sum() == pytest.approx((kind == number).sum())
    assert (weights == 1).all() and len(places) == kind.size, "with room for all, all are taken"
    few, _ = draw(kind, 300, np.random.default_rng(0))
    assert np.array_equal(few, draw(kind, 300, np.random.default_rng(0))[0])
    assert len(draw(np.zeros((2, 2, 2), np.uint8), 5, np.random.default_rng(0))[0]) == 0


def test_what_a_small_stratum_leaves_goes_to_the_others():
    kind = np.array([1] * 10 + [2] * 1000 + [3] * 5000, np.uint8)
    places, _ = draw(kind, 600, np.random.default_rng(0))
    drawn = np.bincount(kind[places], minlength=4)
    assert drawn.tolist() == [0, 10, 295, 295]
