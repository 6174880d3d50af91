"""Intensity normalisation."""

from __future__ import annotations

import numpy as np
import pytest

from autoseg.arrays import normalize as normalizing
from autoseg.arrays.normalize import normalize
from autoseg.types.fingerprint import Intensities
from autoseg.types.plan import NORMALIZATIONS

CT = Intensities(mean=100, median=90, std=50, min=-500, max=900, percentile_99_5=300, percentile_00_5=-200)
EVERYWHERE = np.ones((1, 2, 3), bool)


def image(*values: float) -> np.ndarray:
    """One channel of shape (1, 2, 3)."""
    return np.array(values, np.float32).reshape(1, 1, 2, 3)


def test_z_score_uses_the_whole_image_without_the_mask_flag() -> None:
    array = image(0, 1, 2, 3, 4, 5)
    normalize(array, EVERYWHERE, ["ZScoreNormalization"], [False], [CT])
    assert array.mean() == pytest.approx(0, abs=1e-6)
    assert array.std() == pytest.approx(1, abs=1e-6)


def test_masked_z_score_uses_the_voxels_inside_and_leaves_the_others() -> None:
    array = image(0, 0, 2, 4, 6, 0)
    mask = np.array([False, False, True, True, True, False]).reshape(1, 2, 3)
    normalize(array, mask, ["ZScoreNormalization"], [True], [CT])
    step = 2 / np.sqrt(8 / 3)
    np.testing.assert_allclose(array.ravel(), [0, 0, -step, 0, step, 0], rtol=1e-6)


def test_a_constant_or_empty_image_stays_finite() -> None:
    array = image(5, 5, 5, 5, 5, 5)
    normalize(array, EVERYWHERE, ["ZScoreNormalization"], [False], [CT])
    assert (array == 0).all()
    zeros = image(0, 0, 0, 0, 0, 0)
    normalize(zeros, ~EVERYWHERE, ["ZScoreNormalization"], [True], [CT])
    assert (zeros == 0).all()
    for scheme in NORMALIZATIONS:
        normalize(zeros, EVERYWHERE, [scheme], [False], [CT])
        assert np.isfinite(zeros).all()


def test_ct_is_clipped_to_the_percentiles_and_scaled_by_the_data_sets_statistics() -> None:
    array = image(-1000, -200, 100, 150, 300, 3000)
    normalize(array, EVERYWHERE, ["CTNormalization"], [False], [CT])
    np.testing.assert_allclose(array.ravel(), [-6, -6, 0, 1, 4, 4], rtol=1e-6)


def test_ct_without_statistics_is_an_error() -> None:
    with pytest.raises(ValueError, match="CTNormalization needs"):
        normalize(image(0, 1, 2, 3, 4, 5), EVERYWHERE, ["CTNormalization"], [False], [])


def test_rescale_maps_the_range_to_zero_one_and_rgb_divides_by_255() -> None:
    array = image(-10, 0, 10, 20, 30, 40)
    normalize(array, EVERYWHERE, ["RescaleTo01Normalization"], [False], [CT])
    np.testing.assert_allclose(array.ravel(), [0, 0.2, 0.4, 0.6, 0.8, 1], rtol=1e-6)
    array = image(0, 51, 102, 153, 204, 255)
    normalize(array, EVERYWHERE, ["RGBTo01Normalization"], [False], [CT])
    np.testing.assert_allclose(array.ravel(), [0, 0.2, 0.4, 0.6, 0.8, 1], rtol=1e-6)


def test_rgb_refuses_other_ranges() -> None:
    with pytest.raises(ValueError, match="from 0 to 255, found -1 to 300"):
        normalize(image(-1, 0, 0, 0, 0, 300), EVERYWHERE, ["RGBTo01Normalization"], [False], [CT])


def test_no_normalization_changes_nothing_and_channels_are_independent() -> None:
    array = np.concatenate([image(0, 1, 2, 3, 4, 5), image(0, 1, 2, 3, 4, 5)])
    normalize(array, EVERYWHERE, ["NoNormalization", "ZScoreNormalization"], [False, False], [CT, CT])
    assert array[0].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert abs(array[1].mean()) < 1e-6


def test_the_number_of_channels_must_fit() -> None:
    with pytest.raises(ValueError, match="expected 2 channels, found 1"):
        normalize(image(0, 1, 2, 3, 4, 5), EVERYWHERE, ["NoNormalization"] * 2, [False] * 2, [CT])


@pytest.mark.parametrize("masked", [False, True])
def test_z_scores_do_not_depend_on_how_many_voxels_are_reckoned_at_once(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).normal(500, 3, (1, 7, 8, 9)).astype(np.float32)
    mask = np.random.default_rng(1).random((7, 8, 9)) > 0.3
    inside = array[0][mask] if masked else array[0]
    expected = array[0].copy()
    expected[mask if masked else ...] = ((inside - inside.mean(dtype=float)) / inside.std(dtype=float)).reshape(inside.shape)
    monkeypatch.setattr(normalizing, "_BLOCK", 80)
    normalize(array, mask if masked else None, ["ZScoreNormalization"], [masked], [CT])
    np.testing.assert_allclose(array[0], expected, atol=1e-4)
