"""Bringing logits back to the image grid."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from autoseg.arrays.restore import restore_ensemble, restore_labels, restore_probabilities
from autoseg.types.case import Placement
from autoseg.types.geometry import AxisMap, Grid, Shape

PLAIN = AxisMap((0, 1, 2), (False, False, False))


def placed(shape: Shape, new: Shape, spacing: tuple[float, float, float] = (1, 1, 1)) -> Placement:
    """Logits of `shape` for an uncropped image of shape `new`."""
    target = tuple(s * n / m for s, n, m in zip(spacing, new, shape, strict=True))
    return Placement(Grid(shape=new, spacing=spacing), PLAIN, (0, 1, 2), ((0, new[0]), (0, new[1]), (0, new[2])), spacing, shape,
                     (target[0], target[1], target[2]))


def blobs(classes: int, shape: Shape, seed: int = 0) -> torch.Tensor:
    """Logits of smooth regions, with some noise at their borders."""
    rng = np.random.default_rng(seed)
    values = gaussian_filter(rng.normal(size=(classes, *shape)), (0, 3, 3, 3)) * 30 + 0.1 * rng.normal(size=(classes, *shape))
    return torch.from_numpy(values.astype(np.float32))


def upsampled(logits: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The oracle, in float64."""
    return functional.interpolate(logits[None].double(), size=shape, mode="trilinear", align_corners=False)[0]


CASES = [((24, 30, 26), (41, 33, 50)), ((30, 30, 30), (22, 55, 25)), ((1, 40, 40), (1, 90, 75)), ((20, 20, 20), (20, 20, 20)),
         ((16, 48, 40), (16, 31, 77))]


@pytest.mark.parametrize(("shape", "new"), CASES)
@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("noise", [False, True])
def test_labels_equal_trilinear_interpolation_and_argmax(shape: Shape, new: Shape, classes: int, noise: bool) -> None:
    logits = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(0)) if noise else blobs(classes, shape)
    ours = restore_labels(logits, placed(shape, new))
    assert ours.dtype == np.uint8
    assert (ours != upsampled(logits, new).argmax(0).numpy()).mean() <= 1e-6


def test_half_precision_and_channels_last_logits_give_the_labels_of_their_values() -> None:
    logits = blobs(5, (20, 22, 24)).half()
    place = placed((20, 22, 24), (31, 30, 29))
    expected = upsampled(logits, (31, 30, 29)).argmax(0).numpy()
    last = logits.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for variant in (logits, last, logits.float(), logits.double()):
        assert (restore_labels(variant, place) != expected).mean() <= 1e-4
    assert restore_labels(logits.bfloat16(), place).shape == (31, 30, 29)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_coarse_axis_takes_the_nearest_slice(axis: int) -> None:
    shape, new = [20, 20, 20], [27, 27, 27]
    shape[axis], new[axis] = 5, 11
    size, target = (shape[0], shape[1], shape[2]), (new[0], new[1], new[2])
    spacing = tuple(10.0 if a == axis else 1.0 for a in range(3))
    logits = blobs(4, size)
    planes = [n for a, n in enumerate(target) if a != axis]
    nearest = np.floor(5 / 11 * (np.arange(11) + 0.5)).astype(int)
    slices = [logits.select(axis + 1, int(k))[None].double() for k in nearest]
    flat = [functional.interpolate(plane, size=planes, mode="bilinear")[0] for plane in slices]
    expected = torch.stack(flat, axis + 1).argmax(0).numpy()
    ours = restore_labels(logits, placed(size, target, (spacing[0], spacing[1], spacing[2])))
    assert (ours != expected).mean() <= 1e-6


def test_regions_are_placed_in_order_where_their_logit_is_positive() -> None:
    logits = blobs(3, (20, 20, 20), seed=2)
    shape = (33, 25, 40)
    fine = upsampled(logits, shape).numpy() > 0
    expected = np.zeros(shape, int)
    for value, mask in zip((2, 1, 2), fine, strict=True):
        expected[mask] = value
    assert (restore_labels(logits, placed((20, 20, 20), shape), (2, 1, 2)) != expected).mean() <= 1e-6


def random_placement(rng: np.random.Generator) -> tuple[Placement, NDArray[np.int16]]:
    """A random orientation, transpose and crop without resampling, and what labels 1.. inside look like on the stored grid."""
    stored_shape = tuple(int(n) for n in rng.integers(6, 12, 3))
    axes, order = rng.permutation(3), rng.permutation(3)
    axis_map = AxisMap((int(axes[0]), int(axes[1]), int(axes[2])), tuple(bool(f) for f in rng.integers(0, 2, 3)))  # type: ignore[arg-type]
    transpose = (int(order[0]), int(order[1]), int(order[2]))
    label = np.zeros(stored_shape, np.int16)
    moved = axis_map.apply(label).transpose(transpose)
    low, high = rng.integers(0, 3, 3), np.array(moved.shape) - rng.integers(0, 3, 3)
    bounds = tuple((int(a), int(b)) for a, b in zip(low, high, strict=True))
    box = tuple(slice(a, b) for a, b in bounds)
    size = moved[box].shape
    moved[box] = rng.integers(0, 4, size)
    grid = Grid(shape=stored_shape, spacing=(1, 1, 1))  # type: ignore[arg-type]
    return Placement(grid, axis_map, transpose, bounds, (1, 1, 1), size, (1, 1, 1)), label  # type: ignore[arg-type]


def test_a_round_trip_through_any_orientation_transpose_and_crop_lands_on_the_stored_grid() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        placement, label = random_placement(rng)
        inside = placement.axis_map.apply(label).transpose(placement.transpose)
        inside = inside[tuple(slice(a, b) for a, b in placement.crop_zyx)]
        logits = functional.one_hot(torch.from_numpy(inside.astype(np.int64)), 4).permute(3, 0, 1, 2).float() * 9
        labels, probabilities = restore_ensemble([(logits, placement)], None, with_probabilities=True)
        np.testing.assert_array_equal(labels, label)
        assert probabilities is not None
        np.testing.assert_array_equal(probabilities.argmax(0), label)
        assert labels.flags.c_contiguous


def test_probabilities_are_the_softmax_of_interpolated_logits_with_certain_background_outside_the_crop() -> None:
    logits = blobs(3, (10, 12, 14)) / 5
    whole = placed((10, 12, 14), (15, 18, 21))
    place = dataclasses.replace(whole, stored=Grid(shape=(17, 20, 25), spacing=(1, 1, 1)), crop_zyx=((1, 16), (2, 20), (0, 21)))
    ours = restore_probabilities(logits, place)
    assert ours.dtype == np.float32
    expected = np.zeros((3, 17, 20, 25))
    expected[0] = 1
    expected[:, 1:16, 2:20, 0:21] = upsampled(logits, (15, 18, 21)).softmax(0).numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    regions = restore_probabilities(logits, place, regions=True)
    expected[:] = 0
    expected[:, 1:16, 2:20, 0:21] = upsampled(logits, (15, 18, 21)).sigmoid().numpy()
    np.testing.assert_allclose(regions, expected, atol=2e-5)


def test_an_ensemble_averages_probabilities_of_different_spacings_on_the_image_grid() -> None:
    new = (30, 28, 26)
    first, second = blobs(4, (20, 18, 16), 1) / 3, blobs(4, (15, 28, 30), 2) / 3
    members = [(first, placed((20, 18, 16), new)), (second, placed((15, 28, 30), new))]
    mean = (upsampled(first, new).softmax(0) + upsampled(second, new).softmax(0)).numpy() / 2
    labels, probabilities = restore_ensemble(members, None, with_probabilities=True)
    assert probabilities is not None
    np.testing.assert_allclose(probabilities, mean, atol=2e-5)
    assert (labels != mean.argmax(0)).mean() <= 1e-4
    np.testing.assert_array_equal(restore_ensemble(members)[0], labels)
    regions = restore_ensemble(members, (1, 2, 3, 1))[0]
    sigmoid = (upsampled(first, new).sigmoid() + upsampled(second, new).sigmoid()).numpy() / 2
    expected = np.zeros(new, int)
    for value, mask in zip((1, 2, 3, 1), sigmoid > 0.5, strict=True):
        expected[mask] = value
    assert (regions != expected).mean() <= 1e-4


def test_weights_count_members_and_need_not_add_up_to_one() -> None:
    new = (20, 24, 22)
    sizes = ((14, 18, 16), (12, 20, 18), (16, 16, 16))
    logits = [blobs(3, size, seed) / 3 for seed, size in enumerate(sizes)]
    members = [(values, placed(size, new)) for values, size in zip(logits, sizes, strict=True)]
    softmax = [upsampled(values, new).softmax(0).numpy() for values in logits]
    mean = (3 * softmax[0] + softmax[1] + 2 * softmax[2]) / 6
    labels, probabilities = restore_ensemble(members, None, with_probabilities=True, weights=(3, 1, 2))
    assert probabilities is not None
    np.testing.assert_allclose(probabilities, mean, atol=2e-5)
    assert (labels != mean.argmax(0)).mean() <= 1e-4
    np.testing.assert_array_equal(restore_ensemble(members, None, weights=(0.3, 0.1, 0.2))[0], labels)
    np.testing.assert_array_equal(restore_ensemble(members, None, weights=(2, 2, 2))[0], restore_ensemble(members)[0])
    for wrong in ((1, 1), (1, 1, 0), (1, 1, -1)):
        with pytest.raises(ValueError, match="one positive weight for each of 3 members"):
            restore_ensemble(members, weights=wrong)


def test_more_than_255_classes_need_int16_only_when_values_do() -> None:
    place = placed((4, 4, 4), (6, 6, 6))
    logits = torch.zeros(300, 4, 4, 4)
    logits[299] = 1
    labels = restore_labels(logits, place)
    assert labels.dtype == np.int16
    assert (labels == 299).all()


def test_labels_of_wide_planes_do_not_depend_on_how_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, place = blobs(3, (6, 40, 40)), placed((6, 40, 40), (9, 70, 65))
    expected = restore_labels(logits, place)
    for size in (1, 3000, 20_000):
        monkeypatch.setattr("autoseg.arrays.restore.plain._BLOCK_BYTES", size)
        np.testing.assert_array_equal(restore_labels(logits, place), expected)


def test_members_and_shapes_that_do_not_fit_are_errors() -> None:
    place = placed((4, 4, 4), (6, 6, 6))
    with pytest.raises(ValueError, match="expected logits of shape"):
        restore_labels(torch.zeros(2, 4, 4, 5), place)
    other = dataclasses.replace(place, crop_zyx=((0, 5), (0, 6), (0, 6)))
    with pytest.raises(ValueError, match="share one crop"):
        restore_ensemble([(torch.zeros(2, 4, 4, 4), place), (torch.zeros(2, 4, 4, 4), other)])
    with pytest.raises(ValueError, match="agree in classes"):
        restore_labels(torch.zeros(2, 4, 4, 4), place, (1, 2, 3))
