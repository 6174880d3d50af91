"""Resampling, against skimage and batchgenerators."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from batchgenerators.augmentations.utils import resize_segmentation
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom
from skimage.transform import resize

from autoseg.arrays import resample
from autoseg.arrays.resample import linear_taps, resample_image, resample_label, resampled_shape, separate_axis
from autoseg.types.geometry import Shape

ISO = (1.0, 1.0, 1.0)
SHAPES = [
    ((20, 31, 17), (33, 25, 17)),
    ((40, 20, 30), (21, 50, 70)),
    ((1, 50, 60), (1, 33, 90)),
    ((5, 70, 80), (5, 100, 50)),
    ((90, 40, 40), (140, 25, 30)),
    ((3, 3, 3), (7, 2, 5)),
    ((1, 1, 4), (3, 2, 9)),
    ((2, 150, 9), (2, 131, 9)),
]


def smooth_labels(shape: Shape, count: int, seed: int = 0) -> NDArray[np.int16]:
    """Random smooth regions with values -1..count-2."""
    noise = np.random.default_rng(seed).normal(size=(count, *shape))
    return (gaussian_filter(noise, (0, 1, 1, 1)).argmax(0) - 1).astype(np.int16)


def resized(array: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The oracle for images."""
    result: NDArray[np.float64] = resize(array.astype(np.float64), shape, 3, mode="edge", anti_aliasing=False)
    return result


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("smooth", [False, True])
def test_images_equal_skimage_cubic_within_a_thousandth_of_their_deviation(old: Shape, new: Shape, smooth: bool) -> None:
    volume = np.random.default_rng(1).normal(size=old).astype(np.float32)
    if smooth:
        volume = gaussian_filter(volume, 1) * 10 + 100
    ours = resample_image(volume[None], new, ISO, ISO)
    assert ours.dtype == np.float32
    assert np.abs(ours[0] - resized(volume, new)).max() < 1e-3 * volume.std()


@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_labels_equal_one_float64_resize_per_label_and_argmax(old: Shape, new: Shape) -> None:
    label = smooth_labels(old, 6)
    ours = resample_label(label, new, ISO, ISO)
    assert ours.dtype == np.int16
    assert (ours == resize_segmentation(label, new, 1)).mean() >= 0.9999


def test_each_channel_is_clipped_to_its_own_range() -> None:
    image = np.zeros((2, 8, 8, 8), np.float32)
    image[0, 4:], image[1, 4:] = 1, 100
    ours = resample_image(image, (16, 16, 16), ISO, ISO)
    assert (ours[0].min(), ours[0].max()) == (0, 1)
    assert (ours[1].min(), ours[1].max()) == (0, 100)


@pytest.mark.parametrize(("spacing", "target", "shape", "axis"), [
    ((10.0, 1.0, 1.0), (6.0, 1.5, 1.3), (7, 40, 50), 0),
    ((1.0, 5.0, 1.0), (2.0, 8.0, 1.4), (20, 9, 30), 1),
    ((1.0, 1.2, 5.0), (2.0, 2.0, 5.0), (30, 40, 5), 2),
])
def test_a_coarse_axis_is_resampled_by_nearest_slice_and_slices_in_two_dimensions(
    spacing: tuple[float, float, float], target: tuple[float, float, float], shape: Shape, axis: int,
) -> None:
    new = resampled_shape(shape, spacing, target)
    volume = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    label = smooth_labels(shape, 5)
    plane = tuple(n for a, n in enumerate(new) if a != axis)
    nearest = np.clip(np.floor(shape[axis] / new[axis] * (np.arange(new[axis]) + 0.5)), 0, shape[axis] - 1).astype(int)
    slices = [resized(np.take(volume, k, axis), plane) for k in nearest]
    ours = resample_image(volume[None], new, spacing, target)[0]
    assert np.abs(ours - np.stack(slices, axis)).max() < 1e-3 * volume.std()
    labels = [resize_segmentation(np.take(label, k, axis), plane, 1) for k in nearest]
    assert (resample_label(label, new, spacing, target) == np.stack(labels, axis)).mean() >= 0.9999


def test_the_axis_is_chosen_from_the_original_then_the_target_spacing_and_ties_mean_none() -> None:
    assert separate_axis((1, 1, 3.1), (5, 1, 1)) == 2
    assert separate_axis((1, 1, 3), (5, 1, 1)) == 0
    assert separate_axis((1, 1, 3), (1, 1, 1)) is None
    assert separate_axis((1, 5, 5), (9, 1, 1)) is None


def test_the_new_shape_is_rounded_and_never_zero() -> None:
    assert resampled_shape((10, 11, 1), (1.0, 1.0, 1.0), (2.0, 2.0, 3.0)) == (5, 6, 1)
    assert resampled_shape((10, 20, 30), (3.0, 1.0, 1.0), (1.0, 1.1, 1.0)) == (30, 18, 30)


def test_a_constant_stays_constant_and_an_unchanged_shape_changes_nothing() -> None:
    flat = np.full((1, 6, 7, 8), 3.25, np.float32)
    np.testing.assert_allclose(resample_image(flat, (9, 4, 8), ISO, ISO), 3.25)
    volume = np.random.default_rng(0).normal(size=(1, 6, 7, 8)).astype(np.float32)
    assert resample_image(volume, (6, 7, 8), ISO, (1, 1, 2)) is volume
    label = smooth_labels((6, 7, 8), 3)
    assert resample_label(label, (6, 7, 8), ISO, (1, 1, 2)) is label


def test_resampling_many_labels_invents_none_and_needs_no_contiguous_input() -> None:
    label = smooth_labels((30, 24, 18), 30).transpose(2, 0, 1)
    ours = resample_label(label, (25, 41, 33), ISO, ISO)
    assert set(np.unique(ours)) <= set(np.unique(label))
    np.testing.assert_array_equal(ours, resample_label(np.ascontiguousarray(label), (25, 41, 33), ISO, ISO))


def test_linear_taps_are_half_pixel_centred_and_clamped() -> None:
    taps = linear_taps(2, 4)
    assert taps.low.tolist() == [0, 0, 0, 1]
    assert taps.high.tolist() == [1, 1, 1, 1]
    assert taps.weight.tolist() == [0, 0.25, 0.75, 0]
    assert taps.nearest.tolist() == [0, 0, 1, 1]


def test_the_spline_matrix_is_that_of_scipys_zoom() -> None:
    for old, new in ((128, 192), (320, 240), (1, 5), (3, 2), (60, 7), (9, 9)):
        matrix = np.zeros((new, old))
        for band in resample._spline_bands(old, new):
            matrix[band.out, band.read] += band.matrix
        expected = zoom(np.eye(old), (new / old, 1), order=3, mode="nearest", grid_mode=True)
        np.testing.assert_allclose(matrix, expected, atol=1e-7)


@pytest.mark.parametrize(("old", "new"), [((20, 10, 15), (31, 8, 15)), ((20, 10, 15), (15, 25, 17)), ((5, 40, 9), (20, 9, 8))])
def test_results_do_not_depend_on_how_many_voxels_are_worked_on_at_once(
    old: Shape, new: Shape, monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, label = np.random.default_rng(4).normal(size=(1, *old)).astype(np.float32), smooth_labels(old, 30)
    spacings = (ISO, (5.0, 1.0, 1.0))

    def run() -> list[NDArray[np.generic]]:
        return [f for s in spacings for f in (resample_image(image, new, s, ISO), resample_image(image, new, s, ISO, linear=True),
                                              resample_label(label, new, s, ISO))]

    expected = run()
    monkeypatch.setattr(resample, "_SLAB", 1)
    monkeypatch.setattr(resample, "_SCRATCH", 1)
    monkeypatch.setattr(resample, "_CHUNK", 100)
    monkeypatch.setattr(resample, "_BLOCK", 5)
    resample._spline_bands.cache_clear()
    for found, wanted in zip(run(), expected, strict=True):
        if wanted.dtype == np.int16:
            np.testing.assert_array_equal(found, wanted)
        else:
            np.testing.assert_allclose(found, wanted, atol=3e-6)
    resample._spline_bands.cache_clear()


def one_by_one(label: NDArray[np.int16], shape: Shape) -> NDArray[np.int16]:
    """Every voxel on its own: weights of the labels at the eight corners; of tied ones the nearest voxel's, else the smallest."""
    taps = [linear_taps(old, new) for old, new in zip(label.shape, shape, strict=True)]
    result = np.empty(shape, np.int16)
    for place in np.ndindex(*shape):
        score: dict[int, float] = {}
        for corner in itertools.product((0, 1), repeat=3):
            ends = [(tap.low[i], tap.high[i])[side] for tap, i, side in zip(taps, place, corner, strict=True)]
            weight = 1.0
            for tap, i, side in zip(taps, place, corner, strict=True):
                weight *= tap.weight[i] if side else 1 - tap.weight[i]
            value = int(label[tuple(ends)])
            score[value] = score.get(value, 0.0) + weight
        tied = [value for value, weight in score.items() if weight == max(score.values())]
        nearest = int(label[tuple(tap.nearest[i] for tap, i in zip(taps, place, strict=True))])
        result[place] = nearest if nearest in tied else min(tied)
    return result


@pytest.mark.parametrize("count", [2, 4, 400])
@pytest.mark.parametrize("shape", [(10, 12, 8), (5, 6, 4), (7, 9, 11)])
def test_labels_equal_a_reckoning_voxel_by_voxel_also_where_they_tie(count: int, shape: Shape) -> None:
    label = np.repeat(np.random.default_rng(count).integers(-1, count, (5, 6, 4), np.int16), 2, 0)
    np.testing.assert_array_equal(resample_label(label, shape, ISO, ISO), one_by_one(label, shape))
