"""Largest components against scipy's labelling."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import generate_binary_structure
from scipy.ndimage import label as scipy_label

from autoseg.arrays.components import bounding_box, keep_largest


def test_the_largest_component_is_the_one_scipy_finds():
    rng = np.random.default_rng(0)
    for shape in ((9, 10, 11), (1, 25, 25)):
        for _ in range(5):
            mask = rng.random(shape) > (0.88 if shape[0] > 1 else 0.6)
            components, _ = scipy_label(mask, generate_binary_structure(3, 3))
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            np.testing.assert_array_equal(keep_largest(mask), np.isin(components, np.flatnonzero(sizes == sizes.max())))


def test_a_mask_that_is_a_single_line_of_voxels_is_handled():
    rng = np.random.default_rng(1)
    for length in range(1, 9):
        for _ in range(20):
            line = rng.random(length) > 0.4
            runs, _ = scipy_label(line)
            sizes = np.bincount(runs)
            sizes[0] = 0
            expected = np.isin(runs, np.flatnonzero(sizes == sizes.max())) & line
            for shape in ((length, 1, 1), (1, length, 1), (1, 1, length)):
                np.testing.assert_array_equal(keep_largest(line.reshape(shape)).ravel(), expected)


def test_voxels_that_share_a_corner_belong_together():
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    kept = keep_largest(mask)
    assert kept[0, 0, 0] and kept[1, 1, 1] and not kept[3, 3, 3]


def test_equally_large_components_all_stay_and_an_empty_mask_stays_empty():
    mask = np.zeros((1, 3, 9), bool)
    mask[0, 1, [0, 1, 3, 4, 7]] = True
    assert keep_largest(mask)[0, 1].tolist() == [1, 1, 0, 1, 1, 0, 0, 0, 0]
    assert not keep_largest(np.zeros((2, 3, 4), bool)).any()


def test_a_bounding_box_holds_every_true_voxel_and_no_more():
    mask = np.zeros((5, 6, 7), bool)
    mask[1, 2, 3] = mask[3, 2, 5] = True
    assert bounding_box(mask) == (slice(1, 4), slice(2, 3), slice(3, 6))
    assert bounding_box(np.zeros((2, 2), bool)) is None
