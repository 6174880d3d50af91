"""Cropping to nonzero."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import binary_fill_holes

from autoseg.arrays.crop import box_slices, mark_outside, nonzero_bounds, nonzero_mask


def test_the_box_encloses_every_channel_and_is_half_open() -> None:
    image = np.zeros((2, 5, 6, 7), np.float32)
    image[0, 1, 2, 3] = 1
    image[1, 3, 4, 3] = -1
    assert nonzero_bounds(nonzero_mask(image)) == ((1, 4), (2, 5), (3, 4))


def test_an_image_of_zeros_keeps_its_full_box() -> None:
    assert nonzero_bounds(nonzero_mask(np.zeros((1, 3, 4, 5), np.float32))) == ((0, 3), (0, 4), (0, 5))


def test_enclosed_holes_count_as_inside_and_open_ones_do_not() -> None:
    image = np.ones((1, 7, 7, 7), np.float32)
    image[0, 3, 3, 3] = 0
    image[0, 0:2, 1, 1] = 0
    mask = nonzero_mask(image)
    assert mask[3, 3, 3]
    assert not mask[0, 1, 1]


def test_hole_filling_equals_scipy_on_random_blobs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        image = (rng.random((1, 12, 13, 14)) > 0.4).astype(np.float32)
        np.testing.assert_array_equal(nonzero_mask(image), binary_fill_holes(image[0] != 0))


def test_background_outside_the_mask_becomes_minus_one_and_labels_stay() -> None:
    label = np.array([[[0, 0, 2, 1]]], np.uint8)
    mask = np.array([[[False, True, False, True]]])
    marked = mark_outside(label, mask)
    assert marked.dtype == np.int16
    assert marked.tolist() == [[[-1, 0, 2, 1]]]
    assert label.tolist() == [[[0, 0, 2, 1]]]


def test_slices_cut_the_box() -> None:
    assert np.arange(24).reshape(2, 3, 4)[box_slices(((0, 1), (1, 3), (2, 4)))].tolist() == [[[6, 7], [10, 11]]]


def test_the_mask_is_the_same_however_the_image_lies_in_memory() -> None:
    image = np.zeros((1, 9, 10, 11), np.int16)
    image[0, 1:8, 2:9, 1:10] = 5
    image[0, 3:5, 3:6, 4:7] = 0
    image[0, 3, 4, 0] = 5
    for turned in (image, image[:, ::-1, :, ::-1], image.transpose(0, 3, 1, 2), image.transpose(0, 2, 3, 1)[:, :, ::-1]):
        np.testing.assert_array_equal(nonzero_mask(turned), binary_fill_holes(turned[0] != 0))


def test_an_image_without_zeros_on_its_border_is_taken_whole() -> None:
    image = np.ones((1, 5, 6, 7), np.int16)
    image[0, 1:4, 1:5, 1:6] = 0
    assert nonzero_mask(image).all()
