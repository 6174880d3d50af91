"""Post-processing steps against scipy, skimage and scenes drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from autoseg.arrays.crf import CrfOptions, dense_crf
from autoseg.arrays.postprocess import POSTPROCESSING, apply_postprocessing, needs_image, needs_probabilities
from autoseg.errors import PluginError
from autoseg.types.record import Spec

CUBE = np.ones((3, 3, 3), bool)


def step(kind, *labels, **options):
    return Spec(kind=kind, options={"labels": list(labels), **options} if labels else options)


def speckle(shape=(8, 20, 24), seed=0, share=0.4):
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.2)
    return (smooth > np.quantile(smooth, 1 - share)).astype(np.uint8)


def test_labels_of_one_step_are_one_mask_and_removed_voxels_become_background():
    index = np.array([[[1, 1, 2, 0, 2, 0, 1, 3]]], np.int16)
    before = index.copy()
    for labels, expected in (((1, 2), [1, 1, 2, 0, 0, 0, 0, 3]), ((1,), [1, 1, 2, 0, 2, 0, 0, 3])):
        assert apply_postprocessing(index, [step("largest_component", *labels)])[0, 0].tolist() == expected
    both = [step("largest_component", 1), step("largest_component", 2)]
    assert apply_postprocessing(index, both)[0, 0].tolist() == [1, 1, 2, 0, 2, 0, 0, 3]
    np.testing.assert_array_equal(index, before)
    assert apply_postprocessing(index, both).dtype == np.int16
    assert apply_postprocessing(index, []) is index


def test_components_below_a_size_in_cubic_millimetres_go():
    index = speckle(share=0.15)
    for spacing, mm3 in (((1.0, 1.0, 1.0), 10.0), ((2.0, 0.5, 0.5), 10.0)):
        components, _ = ndimage.label(index, CUBE)
        sizes = np.bincount(components.ravel()) * np.prod(spacing)
        expected = (sizes >= mm3)[components] & (components > 0)
        found = apply_postprocessing(index, [step("minimum_size", 1, mm3=mm3)], spacing=spacing)
        np.testing.assert_array_equal(found, expected)
    assert found.sum() < index.sum()


def test_in_a_single_slice_sizes_are_areas():
    index = np.zeros((1, 6, 9), np.uint8)
    index[0, 1:3, 1:3], index[0, 4, 6] = 1, 1
    found = apply_postprocessing(index, [step("minimum_size", 1, mm3=0.9)], spacing=(99.0, 0.5, 0.5))
    assert found[0, 1, 1] and not found[0, 4, 6]


def test_a_component_of_exactly_the_size_stays():
    index = np.array([[[1, 1, 0, 1]]], np.uint8)
    assert apply_postprocessing(index, [step("minimum_size", 1, mm3=2)], spacing=(1, 1, 1))[0, 0].tolist() == [1, 1, 0, 0]


def test_holes_are_those_that_scipy_finds_and_other_labels_in_them_stay():
    for index in (speckle(), speckle((1, 40, 40))):
        expected = ndimage.binary_fill_holes(index[0])[None] if len(index) == 1 else ndimage.binary_fill_holes(index)
        np.testing.assert_array_equal(apply_postprocessing(index, [step("fill_holes", 1)]), expected)
    ring = np.array([[[1, 1, 1, 1], [1, 0, 2, 1], [1, 1, 1, 1]]], np.uint8)
    assert apply_postprocessing(ring, [step("fill_holes", 1)])[0, 1].tolist() == [1, 1, 2, 1]


def test_a_hole_between_two_labels_takes_the_nearest_one():
    index = np.zeros((1, 5, 9), np.uint8)
    index[0], index[0, :, 5:] = 1, 2
    index[0, 2, 2], index[0, 2, 6] = 0, 0
    filled = apply_postprocessing(index, [step("fill_holes", 1, 2)])
    assert filled[0, 2, 2] == 1 and filled[0, 2, 6] == 2 and (filled > 0).all()


def test_opening_is_erosion_and_dilation_by_a_ball_in_millimetres():
    index = np.pad(speckle(share=0.6, seed=3), 3)
    for spacing, mm in (((1.0, 1.0, 1.0), 1.0), ((1.0, 1.0, 1.0), 2.0), ((3.0, 1.0, 0.5), 1.0)):
        reach = [int(mm / s) + 1 for s in spacing]
        distance = sum((np.arange(-r, r + 1).reshape([-1 if a == b else 1 for b in range(3)]) * s) ** 2
                       for a, (r, s) in enumerate(zip(reach, spacing, strict=True)))
        expected = ndimage.binary_opening(index, np.sqrt(distance) <= mm + 1e-6)
        found = apply_postprocessing(index, [step("opening", 1, mm=mm)], spacing=spacing)
        np.testing.assert_array_equal(found, expected)


def test_opening_does_not_eat_at_the_images_border():
    index = np.ones((3, 6, 6), np.uint8)
    index[1, 3, 3] = 1
    assert apply_postprocessing(index, [step("opening", 1, mm=2)], spacing=(1, 1, 1)).all()
    index[:, :, 5] = 0
    np.testing.assert_array_equal(apply_postprocessing(index, [step("opening", 1, mm=1)], spacing=(1, 1, 1)), index)


def test_thresholds_of_softmax_outputs_shift_a_contest_of_two():
    p = np.linspace(0.003, 0.997, 101)
    probabilities = np.stack([1 - p, p])[:, None, None]
    for threshold in (0.2, 0.5, 0.7):
        found = apply_postprocessing(
            np.zeros((1, 1, 101), np.uint8), [step("threshold", values=[0.5, threshold])], probabilities)
        np.testing.assert_array_equal(found[0, 0], p > threshold)
    noise = np.random.default_rng(0).dirichlet(np.ones(4), (3, 5, 7)).transpose(3, 0, 1, 2)
    found = apply_postprocessing(np.zeros((3, 5, 7), np.uint8), [step("threshold", values=[0.5] * 4)], noise)
    np.testing.assert_array_equal(found, noise.argmax(0))


def test_thresholds_of_regions_are_placed_in_order():
    probabilities = np.array([0.9, 0.4, 0.9])[:, None, None, None] * np.ones((1, 1, 1, 3))
    probabilities[2, 0, 0, 1:] = 0.1
    index = np.zeros((1, 1, 3), np.uint8)
    found = apply_postprocessing(index, [step("threshold", values=[0.5, 0.3, 0.5], regions=[2, 1, 3])], probabilities)
    assert found[0, 0].tolist() == [3, 1, 1]
    found = apply_postprocessing(index, [step("threshold", values=[0.5, 0.5, 0.5], regions=[2, 1, 3])], probabilities)
    assert found[0, 0].tolist() == [3, 2, 2]


def noisy_scene(shape=(12, 40, 40), seed=0):
    """A bright ball, an image that shows it, and probabilities that are noisy."""
    rng = np.random.default_rng(seed)
    z, y, x = np.ogrid[tuple(slice(0, n) for n in shape)]
    truth = ((z - shape[0] / 2) * 2) ** 2 + (y - 20) ** 2 + (x - 20) ** 2 < 9**2
    image = truth * 1.0 + rng.normal(0, 0.1, shape)
    p = np.clip(0.5 + 0.25 * (2.0 * truth - 1) + rng.normal(0, 0.25, shape), 0.02, 0.98)
    return truth, image, np.stack([1 - p, p]).astype(np.float32)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_the_random_field_follows_the_edges_of_the_image():
    truth, image, probabilities = noisy_scene()
    before = probabilities.argmax(0) == 1
    field = apply_postprocessing(before.astype(np.uint8), [step("crf")], probabilities, image[None], (2.0, 1.0, 1.0)) == 1
    assert dice(field, truth) > 0.97 > 0.9 > dice(before, truth)
    blind = dense_crf(probabilities, np.zeros_like(image), (2, 1, 1), CrfOptions(bilateral_weight=0)).argmax(0) == 1
    assert dice(field, truth) > dice(blind, truth)


def test_a_random_field_without_weights_changes_nothing_and_stays_a_distribution():
    _, image, probabilities = noisy_scene()
    same = dense_crf(probabilities, image, (2, 1, 1), CrfOptions(smooth_weight=0, bilateral_weight=0))
    np.testing.assert_allclose(same, probabilities, atol=1e-5)
    field = dense_crf(probabilities, image, (2, 1, 1))
    np.testing.assert_allclose(field.sum(0), 1, atol=1e-5)
    empty = np.stack([np.ones((2, 3, 4)), np.zeros((2, 3, 4))]).astype(np.float32)
    np.testing.assert_array_equal(dense_crf(empty, np.zeros((2, 3, 4)), (1, 1, 1)), empty)


def test_the_bilateral_mean_is_that_of_the_exact_kernel():
    from autoseg.arrays.crf import _BilateralGrid

    rng = np.random.default_rng(0)
    image = np.zeros((1, 24, 24), np.float32)
    image[0, :, 12:] = 1
    image += rng.normal(0, 0.02, image.shape).astype(np.float32)
    values = rng.random(image.shape).astype(np.float32)
    grid = _BilateralGrid(image, (1, 1, 1), CrfOptions(bilateral_mm=4, bilateral_intensity=0.25))
    y, x = np.mgrid[:24, :24]
    low, high = np.percentile(image, [1, 99])
    scaled = ((np.clip(image, low, high) - low) / (high - low) / 0.25).ravel()
    place = np.stack([y.ravel() / 4, x.ravel() / 4, scaled])
    kernel = np.exp(-0.5 * ((place[:, :, None] - place[:, None]) ** 2).sum(0))
    exact = (kernel @ values.ravel() / kernel.sum(1)).reshape(image.shape)
    assert np.abs(grid.mean(values) - exact).mean() < 0.015


def test_the_random_field_works_on_regions_and_in_a_single_slice():
    truth, image, probabilities = noisy_scene((1, 40, 40))
    regions = np.stack([probabilities[1], probabilities[1]])
    found = apply_postprocessing(
        np.zeros(truth.shape, np.uint8), [step("crf", regions=[2, 1])], regions, image[None], (5.0, 1.0, 1.0))
    assert set(np.unique(found)) == {0, 1} and dice(found == 1, truth) > 0.95


def test_steps_say_what_they_need():
    mask = [step(kind, 1) for kind in ("largest_component", "minimum_size", "fill_holes", "opening")]
    assert not needs_probabilities(mask) and not needs_image(mask)
    assert needs_probabilities([*mask, step("threshold", values=[0.5])]) and not needs_image([step("threshold", values=[0.5])])
    assert needs_image([step("crf")])
    index = np.ones((2, 2, 2), np.uint8)
    for bad, word in ((step("threshold", values=[0.5]), "probabilities"), (step("minimum_size", 1, mm3=2), "spacing")):
        with pytest.raises(ValueError, match=f"post-processing {bad.kind}: .*needs.* {word}"):
            apply_postprocessing(index, [bad])
    with pytest.raises(ValueError, match="needs the image"):
        apply_postprocessing(index, [step("crf")], np.ones((2, 2, 2, 2)), None, (1, 1, 1))


def test_an_unknown_step_or_option_is_refused_with_the_choices():
    index = np.zeros((1, 1, 1), int)
    with pytest.raises(PluginError, match="unknown post-processing 'erase'; choose from threshold, crf, largest_component"):
        apply_postprocessing(index, [Spec(kind="erase")])
    with pytest.raises(PluginError, match="largest_component has options labels; labels: Field required"):
        apply_postprocessing(index, [step("largest_component", label=1)])
    with pytest.raises(PluginError, match="mm3: Input should be greater than 0"):
        apply_postprocessing(index, [step("minimum_size", 1, mm3=0)])


@pytest.mark.parametrize("kind", POSTPROCESSING)
def test_an_empty_mask_stays_empty_and_keeps_its_type(kind):
    options = {"threshold": {"values": [0.5, 0.5]}, "crf": {}}.get(kind, {"labels": [1]})
    options |= {"minimum_size": {"mm3": 5.0}, "opening": {"mm": 1.0}}.get(kind, {})
    index = np.zeros((2, 5, 5), np.int16)
    background = np.stack([np.ones(index.shape), np.zeros(index.shape)])
    found = apply_postprocessing(index, [Spec(kind=kind, options=options)], background, np.zeros((1, 2, 5, 5)), (1, 1, 1))
    assert found.dtype == np.int16 and not found.any() and found.shape == index.shape
