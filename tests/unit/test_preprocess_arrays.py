"""Preprocessing of one case in memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from autoseg.arrays.preprocess import preprocess
from autoseg.types.case import Image
from autoseg.types.fingerprint import Intensities
from autoseg.types.geometry import AxisMap, Grid
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan

STATISTICS = Intensities(mean=0, median=0, std=1, min=-1, max=1, percentile_99_5=1, percentile_00_5=-1)
LABELS = Labels(foreground=(Label(name="a", value=1), Label(name="b", value=2)))


def configuration(spacing: tuple[float, ...], scheme: str = "NoNormalization", masked: bool = False) -> Configuration:
    """A configuration of which preprocessing reads spacing, scheme and mask flag."""
    dims = len(spacing)
    return Configuration(
        patch_size=(8,) * dims, batch_size=2, spacing=spacing, median_shape=(8.0,) * dims,
        strides=((1,) * dims, (2,) * dims), kernel_sizes=((3,) * dims,) * 2, features_per_stage=(4, 8), blocks_per_stage=(1, 1),
        decoder_blocks_per_stage=(1,),
        batch_dice=False, normalization=(scheme,), use_mask_for_norm=(masked,),
    )


def plan_of(one: Configuration, transpose: tuple[int, int, int] = (0, 1, 2), **fields: Any) -> Plan:
    """A plan with one configuration and one channel."""
    return Plan(dataset_name="d", planner="default", gpu_memory_gb=8, transpose_forward=transpose, channels=("mri",),
                labels=LABELS, intensities=(STATISTICS,), configurations={"x": one}, **fields)


def noise(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Random voxels, none of them zero."""
    return np.random.default_rng(seed).uniform(1, 2, (1, *shape)).astype(np.float32)


def test_an_image_that_needs_nothing_comes_through_unchanged() -> None:
    array, one = noise(5, 6, 7), configuration((1, 1, 1))
    case = preprocess(Image(array, Grid(shape=(5, 6, 7), spacing=(1, 1, 1)), ".nii.gz"), None, plan_of(one), one)
    np.testing.assert_array_equal(case.image_czyx, array)
    assert case.label_zyx is None
    assert case.placement.shape == (5, 6, 7)


def test_cropping_keeps_the_nonzero_box_and_labels_outside_become_minus_one() -> None:
    array = np.zeros((1, 6, 6, 6), np.float32)
    array[0, 1:5, 2:4, 3:6] = 1
    array[0, 1, 2, 3] = 0
    label = np.zeros((6, 6, 6), np.uint8)
    label[2, 3, 4] = 2
    one = configuration((1, 1, 1))
    case = preprocess(Image(array, Grid(shape=(6, 6, 6), spacing=(1, 1, 1)), ""), label, plan_of(one), one)
    assert case.placement.crop_zyx == ((1, 5), (2, 4), (3, 6))
    assert case.label_zyx is not None
    assert case.label_zyx[0, 0, 0] == -1
    assert case.label_zyx[1, 1, 1] == 2
    assert (case.label_zyx == 0).sum() == 4 * 2 * 3 - 2
    assert case.label_zyx.dtype == np.int16


def test_the_transpose_moves_axes_of_image_label_and_spacing() -> None:
    array, one = noise(5, 6, 7), configuration((3, 1, 2))
    label = np.random.default_rng(1).integers(0, 3, (5, 6, 7))
    case = preprocess(Image(array, Grid(shape=(5, 6, 7), spacing=(1, 2, 3)), ""), label, plan_of(one, (2, 0, 1)), one)
    np.testing.assert_array_equal(case.image_czyx[0], array[0].transpose(2, 0, 1))
    np.testing.assert_array_equal(case.label_zyx, label.transpose(2, 0, 1))
    assert case.placement.cropped_spacing_zyx_mm == (3, 1, 2)


def test_storage_orientation_does_not_matter_when_the_plan_says_lps() -> None:
    rng, one = np.random.default_rng(3), configuration((1.5, 1, 1.2), "ZScoreNormalization")
    array, label = noise(6, 8, 10), rng.integers(0, 3, (6, 8, 10))
    array[0, :, :2] = 0
    grid = Grid(shape=(6, 8, 10), spacing=(2, 1, 1.5))
    expected = preprocess(Image(array, grid, ""), label, plan_of(one, (2, 0, 1)), one)
    for axes, flips in (((2, 0, 1), (True, False, True)), ((1, 0, 2), (False, True, False)), ((0, 2, 1), (True, True, True))):
        change = AxisMap(axes, flips)
        stored = Image(change.apply(array), grid.mapped(change), "")
        case = preprocess(stored, change.apply(label), plan_of(one, (2, 0, 1)), one)
        np.testing.assert_array_equal(case.image_czyx, expected.image_czyx)
        np.testing.assert_array_equal(case.label_zyx, expected.label_zyx)
        assert case.placement.crop_zyx == expected.placement.crop_zyx
        assert case.placement.stored == stored.grid


def test_as_stored_leaves_the_orientation_alone() -> None:
    array, one = noise(4, 5, 6), configuration((1, 1, 1))
    grid = Grid(shape=(4, 5, 6), spacing=(1, 1, 1)).mapped(AxisMap((0, 1, 2), (True, True, False)))
    case = preprocess(Image(array, grid, ""), None, plan_of(one, orientation="as_stored"), one)
    np.testing.assert_array_equal(case.image_czyx, array)


def test_a_2d_configuration_keeps_slices_and_resamples_in_the_plane() -> None:
    one = configuration((2, 0.5))
    case = preprocess(Image(noise(3, 8, 8), Grid(shape=(3, 8, 8), spacing=(2.5, 1, 1)), ""), None, plan_of(one), one)
    assert case.placement.shape == (3, 4, 16)
    assert case.placement.spacing_zyx_mm == (2.5, 2, 0.5)
    flat = Grid(shape=(1, 8, 8), spacing=(999, 1, 1), has_direction=False)
    assert preprocess(Image(noise(1, 8, 8), flat, ".png"), None, plan_of(one), one).placement.shape == (1, 4, 16)


def test_normalisation_comes_before_resampling_and_after_cropping() -> None:
    array = np.zeros((1, 8, 8, 8), np.float32)
    array[0, 2:6, 2:6, 2:6] = np.random.default_rng(0).normal(50, 10, (4, 4, 4))
    one = configuration((0.5, 0.5, 0.5), "ZScoreNormalization")
    case = preprocess(Image(array, Grid(shape=(8, 8, 8), spacing=(1, 1, 1)), ""), None, plan_of(one), one)
    inside = array[0, 2:6, 2:6, 2:6]
    assert case.placement.shape == (8, 8, 8)
    assert case.image_czyx.max() <= (inside.max() - inside.mean()) / inside.std() + 1e-5


def test_the_mask_for_normalisation_is_the_same_with_and_without_a_label() -> None:
    array = noise(6, 6, 6)
    array[0, 0, :3] = 0
    label = np.random.default_rng(0).integers(0, 3, (6, 6, 6))
    one = configuration((1, 1, 1), "ZScoreNormalization", masked=True)
    image = Image(array, Grid(shape=(6, 6, 6), spacing=(1, 1, 1)), "")
    np.testing.assert_array_equal(preprocess(image, label, plan_of(one), one).image_czyx,
                                  preprocess(image, None, plan_of(one), one).image_czyx)


def test_the_inputs_are_not_altered() -> None:
    array, label = noise(4, 4, 4), np.ones((4, 4, 4), np.int16)
    array[0, 0] = 0
    before = array.copy()
    one = configuration((1, 1, 1), "ZScoreNormalization")
    preprocess(Image(array, Grid(shape=(4, 4, 4), spacing=(1, 1, 1)), ""), label, plan_of(one), one)
    np.testing.assert_array_equal(array, before)
    assert (label == 1).all()


def test_shapes_that_disagree_are_errors() -> None:
    one = configuration((1, 1, 1))
    image = Image(noise(4, 4, 4), Grid(shape=(4, 4, 5), spacing=(1, 1, 1)), "")
    with pytest.raises(ValueError, match=r"shape \(4, 4, 4\), its grid \(4, 4, 5\)"):
        preprocess(image, None, plan_of(one), one)
    image = Image(noise(4, 4, 4), Grid(shape=(4, 4, 4), spacing=(1, 1, 1)), "")
    with pytest.raises(ValueError, match=r"label has shape \(4, 4, 3\)"):
        preprocess(image, np.zeros((4, 4, 3), int), plan_of(one), one)
    with pytest.raises(ValueError, match="expected 1 channels, found 2"):
        preprocess(Image(np.ones((2, 4, 4, 4), np.float32), image.grid, ""), None, plan_of(one), one)


@pytest.mark.parametrize("scheme", ["ZScoreNormalization", "CTNormalization", "NoNormalization", "RescaleTo01Normalization"])
def test_short_integers_give_what_the_same_values_give_as_floats(scheme: str) -> None:
    array = np.random.default_rng(0).integers(-3, 4, (1, 9, 10, 11)).astype(np.int16)
    one, grid = configuration((1.5, 1, 0.7), scheme), Grid(shape=(9, 10, 11), spacing=(1, 1, 1))
    cases = [preprocess(Image(values, grid, ""), array[0] % 3, plan_of(one), one) for values in (array, array.astype(np.float32))]
    np.testing.assert_array_equal(cases[0].image_czyx, cases[1].image_czyx)
    np.testing.assert_array_equal(cases[0].label_zyx, cases[1].label_zyx)


def test_an_image_that_needs_no_resampling_takes_one_float_array_beside_itself() -> None:
    array = np.random.default_rng(0).integers(-900, 900, (1, 150, 160, 170), np.int16)
    one, grid = configuration((1, 1, 1), "ZScoreNormalization"), Grid(shape=(150, 160, 170), spacing=(1, 1, 1))
    tracemalloc.start()
    preprocess(Image(array, grid, ""), None, plan_of(one), one)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * 4 * array.size


def test_the_label_of_a_case_is_not_the_array_that_was_given() -> None:
    label, one = np.ones((4, 4, 4), np.int16), configuration((1, 1, 1))
    case = preprocess(Image(noise(4, 4, 4), Grid(shape=(4, 4, 4), spacing=(1, 1, 1)), ""), label, plan_of(one), one)
    assert not np.shares_memory(case.label_zyx, label)
