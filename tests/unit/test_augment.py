"""Augmentation: what is drawn follows the stated distributions, and what is applied equals independent oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.arrays.cascade import one_hot
from autoseg.trainers.augment import AugmentParams, DefaultAugmentation, Morph, Removal, Step, source_box
from autoseg.trainers.augment.default import rotation_about
from autoseg.trainers.augment.intensity import taps
from autoseg.types.plan import Configuration

CUBE = (12, 12, 12)


def configuration(patch: tuple[int, ...]) -> Configuration:
    dims = len(patch)
    return Configuration(
        patch_size=patch, batch_size=2, spacing=(1.0,) * dims, median_shape=tuple(map(float, patch)),
        strides=((1,) * dims, (2,) * dims), kernel_sizes=((3,) * dims,) * 2, features_per_stage=(4, 8), blocks_per_stage=(1, 1),
        decoder_blocks_per_stage=(1,), batch_dice=False, normalization=("NoNormalization",), use_mask_for_norm=(False,),
    )


def make(patch: tuple[int, ...], channels: int = 1, mirror: tuple[int, ...] | None = None) -> DefaultAugmentation:
    return DefaultAugmentation.from_configuration(configuration(patch), channels, mirror)


def smooth(shape: tuple[int, ...], seed: int = 0, sigma: float = 1.5) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, (0,) * (len(shape) - 3) + (sigma,) * 3).astype(np.float32) * 10


def random_matrix(seed: int, in_plane: bool = False) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    matrix = np.eye(3)
    for axis in (0,) if in_plane else (0, 1, 2):
        matrix = matrix @ rotation_about(axis, rng.uniform(-0.5, 0.5))
    factor = rng.uniform(0.7, 1.4)
    return matrix @ np.diag([1.0 if in_plane else factor, factor, factor])


def run(
    augmentation: DefaultAugmentation, image: NDArray[np.float32], label: NDArray[np.int16], params: AugmentParams,
    masked: tuple[bool, ...] = (False,), start: tuple[int, int, int] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Apply to the patch that starts at `start` (the middle of a whole case by default)."""
    patch = augmentation.patch
    first = start or tuple((s - p) // 2 for s, p in zip(label.shape, patch, strict=True))
    low, high = source_box(first, patch, params.matrix)
    assert min(low) >= 0 and all(h <= s for h, s in zip(high, label.shape, strict=True)), "choose a larger scene"
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    centre = np.asarray(first) + (np.asarray(patch) - 1) / 2 - np.asarray(low)
    crop, label_crop = image[(slice(None), *box)].copy(), label[box].copy()
    kept = crop.copy(), label_crop.copy()
    new_image, new_label = augmentation.apply(torch.from_numpy(crop), torch.from_numpy(label_crop), centre, params, masked)
    assert np.array_equal(crop, kept[0]) and np.array_equal(label_crop, kept[1]), "what was read must stay as it is"
    assert new_image.dtype == torch.float32 and new_label.dtype == torch.int64
    assert new_image.shape == (len(image), *patch) and new_label.shape == patch
    return new_image.numpy(), new_label.numpy()


def scene(shape: tuple[int, int, int] = (30, 30, 30), channels: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    image = smooth((channels, *shape))
    label = np.digitize(smooth(shape, seed=9), [-0.8, 0.5, 1.5]).astype(np.int16)
    return image, label


class TestDrawing:
    DRAWS = 10_000

    @pytest.fixture(scope="class")
    def drawn(self) -> list[AugmentParams]:
        rng = np.random.default_rng(0)
        augmentation = make(CUBE, channels=2)
        return [augmentation.make_params(rng) for _ in range(self.DRAWS)]

    def test_rotation_or_scaling_happens_to_36_percent(self, drawn: list[AugmentParams]) -> None:
        assert np.mean([p.matrix is not None for p in drawn]) == pytest.approx(1 - 0.8 * 0.8, abs=0.02)

    def test_matrices_are_rotations_up_to_30_degrees_times_one_scale(self, drawn: list[AugmentParams]) -> None:
        matrices = [p.matrix for p in drawn if p.matrix is not None]
        factors = np.array([np.linalg.det(m) ** (1 / 3) for m in matrices])
        for matrix, factor in zip(matrices, factors, strict=True):
            np.testing.assert_allclose(matrix @ matrix.T, factor**2 * np.eye(3), atol=1e-9)
        scaled = factors[np.abs(factors - 1) > 1e-9]
        assert scaled.min() >= 0.7 and scaled.max() <= 1.4
        assert len(scaled) / self.DRAWS == pytest.approx(0.2, abs=0.02)
        assert scaled.mean() == pytest.approx(1.05, abs=0.02)
        rotated = [m for m, f in zip(matrices, factors, strict=True) if np.abs(m / f - np.eye(3)).max() > 1e-9]
        assert len(rotated) / self.DRAWS == pytest.approx(0.2, abs=0.02)
        angle = max(math.acos(np.clip((np.trace(m) / np.linalg.det(m) ** (1 / 3) - 1) / 2, -1, 1)) for m in rotated)
        assert math.radians(30) < angle < math.radians(60)  # three axes of up to 30 degrees each

    @pytest.mark.parametrize(("name", "probability"), [
        ("noise", 0.1), ("blur", 0.2), ("brightness", 0.15), ("contrast", 0.15), ("low_resolution", 0.25),
        ("gamma_inverted", 0.1), ("gamma", 0.3),
    ])
    def test_each_step_happens_as_often_as_stated(self, drawn: list[AugmentParams], name: str, probability: float) -> None:
        count = sum(step.name == name for p in drawn for step in p.steps)
        assert count / self.DRAWS == pytest.approx(probability, abs=0.02)

    @pytest.mark.parametrize(("name", "low", "high", "channel_share"), [
        ("noise", 0.0, 0.1, 1.0), ("blur", 0.5, 1.0, 0.5), ("brightness", 0.75, 1.25, 1.0), ("contrast", 0.75, 1.25, 1.0),
        ("low_resolution", 0.5, 1.0, 0.5), ("gamma_inverted", 0.7, 1.5, 1.0), ("gamma", 0.7, 1.5, 1.0),
    ])
    def test_values_fill_their_range(
        self, drawn: list[AugmentParams], name: str, low: float, high: float, channel_share: float
    ) -> None:
        steps = [step for p in drawn for step in p.steps if step.name == name]
        assert all(len(step.values) == 2 for step in steps)
        given_values = [values for step in steps for values in step.values]
        assert np.mean([bool(values) for values in given_values]) == pytest.approx(channel_share, abs=0.04)
        flat = np.array([value for values in given_values for value in values])
        assert low <= flat.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < flat.max() <= high
        if name in ("brightness", "contrast", "gamma", "gamma_inverted"):
            assert (flat < 1).mean() == pytest.approx(0.5, abs=0.04)

    def test_noise_has_one_strength_for_all_channels_and_blur_one_for_each_axis(self, drawn: list[AugmentParams]) -> None:
        assert all(step.values[0] == step.values[1] for p in drawn for step in p.steps if step.name == "noise")
        blurred = [v for p in drawn for step in p.steps if step.name == "blur" for v in step.values if v]
        assert all(len(v) == 3 and len(set(v)) == 3 for v in blurred)

    def test_each_axis_is_mirrored_in_half_of_the_samples_independently(self, drawn: list[AugmentParams]) -> None:
        flips = np.array([[axis in p.mirror for axis in range(3)] for p in drawn])
        np.testing.assert_allclose(flips.mean(0), 0.5, atol=0.02)
        np.testing.assert_allclose(np.corrcoef(flips.T), np.eye(3), atol=0.05)

    def test_steps_come_in_the_recipes_order(self, drawn: list[AugmentParams]) -> None:
        order = ["noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma"]
        assert all([s.name for s in p.steps] == sorted((s.name for s in p.steps), key=order.index) for p in drawn)

    @pytest.mark.parametrize("patch", [(24, 24), (4, 16, 16)])
    def test_flat_patches_are_turned_and_scaled_in_their_plane_only(self, patch: tuple[int, ...]) -> None:
        rng = np.random.default_rng(1)
        augmentation = make(patch)
        matrices = [m for m in (augmentation.make_params(rng).matrix for _ in range(500)) if m is not None]
        assert matrices and all(m[0, 0] == 1 and not m[0, 1:].any() and not m[1:, 0].any() for m in matrices)


@pytest.mark.parametrize(("patch", "in_plane", "degrees"), [
    ((64, 64), True, 180),
    ((64, 96), True, 180),
    ((64, 100), True, 15),
    ((64, 64, 64), False, 30),
    ((32, 96, 96), False, 30),
    ((28, 96, 96), True, 180),
])
def test_rotation_range_follows_the_patch(patch: tuple[int, ...], in_plane: bool, degrees: float) -> None:
    augmentation = make(patch)
    assert augmentation.in_plane is in_plane
    assert math.degrees(augmentation.rotation) == pytest.approx(degrees)


def test_mirror_axes_of_a_2d_patch_are_its_own_and_can_be_restricted() -> None:
    assert make((16, 16)).mirror_axes == (1, 2)
    assert make((16, 16), mirror=(1,)).mirror_axes == (2,)
    assert make((8, 8, 8)).mirror_axes == (0, 1, 2)
    assert make((8, 8, 8), mirror=(0, 2)).mirror_axes == (0, 2)
    assert make((8, 8, 8), mirror=()).mirror_axes == ()


class TestSpatial:
    def test_without_parameters_nothing_changes(self) -> None:
        image, label = scene(CUBE)
        new_image, new_label = run(make(CUBE), image, label, AugmentParams())
        assert np.array_equal(new_image, image) and np.array_equal(new_label, label)

    def test_the_identity_matrix_changes_nothing_beyond_rounding(self) -> None:
        image, label = scene()
        new_image, new_label = run(make(CUBE), image, label, AugmentParams(np.eye(3)))
        inner = (slice(9, 21),) * 3
        np.testing.assert_allclose(new_image[0], image[0][inner], atol=1e-4)
        assert np.array_equal(new_label, label[inner])

    @pytest.mark.parametrize(("axis", "plane", "sign"), [(0, (1, 2), -1), (1, (0, 2), -1), (2, (0, 1), -1)])
    def test_a_quarter_turn_is_rot90(self, axis: int, plane: tuple[int, int], sign: int) -> None:
        image, label = scene(CUBE)
        params = AugmentParams(rotation_about(axis, math.pi / 2))
        new_image, new_label = run(make(CUBE), image, label, params)
        np.testing.assert_allclose(new_image[0], np.rot90(image[0], sign, plane), atol=1e-4)
        assert np.array_equal(new_label, np.rot90(label, sign, plane))

    @pytest.mark.parametrize("mirror", [(0,), (1, 2), (0, 1, 2)])
    def test_mirroring_is_a_flip_of_image_and_label(self, mirror: tuple[int, ...]) -> None:
        image, label = scene(CUBE)
        new_image, new_label = run(make(CUBE), image, label, AugmentParams(mirror=mirror))
        assert np.array_equal(new_image[0], np.flip(image[0], mirror)) and np.array_equal(new_label, np.flip(label, mirror))

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize(("patch", "shape"), [
        ((12, 14, 16), (40, 40, 40)), ((16, 20), (3, 44, 44)), ((4, 14, 14), (9, 40, 40)),
    ])
    def test_resampling_is_that_of_scipy(self, patch: tuple[int, ...], shape: tuple[int, int, int], seed: int) -> None:
        augmentation = make(patch, channels=2)
        image, label = scene(shape, channels=2)
        matrix = random_matrix(seed, augmentation.in_plane)
        start = tuple((s - p) // 2 for s, p in zip(shape, augmentation.patch, strict=True))
        new_image, new_label = run(augmentation, image, label, AugmentParams(matrix), (False, False), start)
        half = (np.asarray(augmentation.patch) - 1) / 2
        offset = np.asarray(start) + half - matrix @ half

        def sampled(volume: NDArray[np.floating]) -> NDArray[np.float64]:
            return np.asarray(
                ndimage.affine_transform(
                    volume.astype(np.float64), matrix, offset, output_shape=augmentation.patch, order=1, mode="nearest"
                )
            )

        for channel in range(2):
            np.testing.assert_allclose(new_image[channel], sampled(image[channel]), atol=1e-3)
        oracle = np.argmax([sampled((label == value).astype(np.float64)) for value in range(4)], axis=0)
        assert (new_label == oracle).mean() > 0.999

    def test_scaling_above_one_makes_things_smaller(self) -> None:
        label = np.zeros((40, 40, 40), np.int16)
        label[14:26, 14:26, 14:26] = 1
        image = label[None].astype(np.float32)
        counts = [int(run(make((20, 20, 20)), image, label, AugmentParams(f * np.eye(3)))[1].sum()) for f in (0.8, 1.0, 1.3)]
        assert counts[0] > counts[1] == 12**3 > counts[2]
        assert counts[2] == pytest.approx(12**3 / 1.3**3, rel=0.25)


@settings(max_examples=200, deadline=None)
@given(
    start=st.tuples(*[st.integers(-30, 200)] * 3), patch=st.tuples(*[st.integers(1, 40)] * 3), seed=st.integers(0, 10**6),
    in_plane=st.booleans(),
)
def test_the_source_box_covers_every_sampled_point_and_no_more(
    start: tuple[int, int, int], patch: tuple[int, int, int], seed: int, in_plane: bool
) -> None:
    matrix = random_matrix(seed, in_plane)
    low, high = source_box(start, patch, matrix)
    half = (np.asarray(patch) - 1) / 2
    corners = np.array(np.meshgrid(*[(-h, h) for h in half], indexing="ij")).reshape(3, -1)
    points = matrix @ corners + (np.asarray(start) + half)[:, None]
    assert (points.min(1) >= np.asarray(low) - 1e-5).all() and (points.max(1) <= np.asarray(high) - 1 + 1e-5).all()
    assert (points.min(1) < np.asarray(low) + 1 + 1e-5).all() and (points.max(1) > np.asarray(high) - 2 - 1e-5).all()
    if in_plane:
        assert (low[0], high[0]) == (start[0], start[0] + patch[0])


def test_without_a_matrix_the_source_box_is_the_patch() -> None:
    assert source_box((-3, 4, 5), (8, 2, 1), None) == ((-3, 4, 5), (5, 6, 6))


class TestIntensity:
    def apply(
        self, name: str, *values: float, image: NDArray[np.float32] | None = None, patch: tuple[int, ...] = CUBE
    ) -> NDArray[np.float32]:
        augmentation = make(patch)
        volume = smooth(augmentation.patch, sigma=0.7) + 3 if image is None else image
        params = AugmentParams(steps=(Step(name, (values,), 11),))  # type: ignore[arg-type]
        return run(augmentation, volume[None], np.zeros(augmentation.patch, np.int16), params)[0][0]

    def test_blur_is_scipys_gaussian(self) -> None:
        image = smooth(CUBE, sigma=0.7) + 3
        expected = ndimage.gaussian_filter(image.astype(np.float64), (0.5, 0.8, 1.0), mode="mirror", radius=(1, 2, 3))
        np.testing.assert_allclose(self.apply("blur", 0.5, 0.8, 1.0), expected, atol=1e-5)

    def test_blur_leaves_the_single_slice_axis_of_2d_alone(self) -> None:
        image = smooth((1, 16, 16), sigma=0.7)
        expected = ndimage.gaussian_filter(image[0].astype(np.float64), (0.8, 1.0), mode="mirror", radius=(2, 3))
        np.testing.assert_allclose(self.apply("blur", 0.6, 0.8, 1.0, image=image, patch=(16, 16))[0], expected, atol=1e-5)

    @pytest.mark.parametrize(("sigma", "count"), [(0.5, 1), (0.58, 1), (0.59, 2), (0.91, 2), (0.92, 3), (1.0, 3)])
    def test_blur_kernels_have_the_odd_length_nearest_to_six_sigma_and_a_half(self, sigma: float, count: int) -> None:
        half = taps(sigma)
        assert len(half) == count + 1 and 2 * sum(half) - half[0] == pytest.approx(1)

    def test_blur_works_on_edges_shorter_than_its_kernel(self) -> None:
        constant = np.full((2, 8, 8), 5, np.float32)
        np.testing.assert_allclose(self.apply("blur", 1.0, 1.0, 1.0, image=constant, patch=(2, 8, 8)), 5, rtol=1e-6)

    def test_brightness_multiplies(self) -> None:
        np.testing.assert_allclose(self.apply("brightness", 1.2), (smooth(CUBE, sigma=0.7) + 3) * np.float32(1.2), rtol=1e-6)

    def test_contrast_stretches_about_the_mean_within_the_old_range(self) -> None:
        image = smooth(CUBE, sigma=0.7) + 3
        expected = np.clip((image - image.mean()) * 1.25 + image.mean(), image.min(), image.max())
        np.testing.assert_allclose(self.apply("contrast", 1.25), expected, atol=1e-4)

    @pytest.mark.parametrize("zoom", [0.5, 0.7, 0.99])
    @pytest.mark.parametrize("patch", [CUBE, (4, 16, 16), (16, 20)])
    def test_low_resolution_is_nearest_down_and_linear_up(self, zoom: float, patch: tuple[int, ...]) -> None:
        augmentation = make(patch)
        image = smooth(augmentation.patch, sigma=0.7)
        expected = image.astype(np.float64)
        for axis, size in enumerate(augmentation.patch):
            if axis == 0 and augmentation.in_plane:
                continue
            small = max(1, round(size * zoom))
            picked = np.take(expected, np.floor((np.arange(small) + 0.5) * size / small).astype(int), axis)
            position = (np.arange(size) + 0.5) * small / size - 0.5
            grid = np.arange(small)
            expected = np.apply_along_axis(lambda row, at=position, g=grid: np.interp(at, g, row), axis, picked)
        np.testing.assert_allclose(self.apply("low_resolution", zoom, image=image, patch=patch), expected, atol=1e-4)

    @pytest.mark.parametrize("name", ["gamma", "gamma_inverted"])
    @pytest.mark.parametrize("exponent", [0.7, 1.5])
    def test_gamma_keeps_mean_deviation_and_order(self, name: str, exponent: float) -> None:
        image = smooth(CUBE, sigma=0.7) + 3
        changed = self.apply(name, exponent)
        assert changed.mean() == pytest.approx(image.mean(), abs=1e-3)
        assert changed.std() == pytest.approx(image.std(), rel=1e-3)
        assert (np.diff(changed.ravel()[np.argsort(image.ravel())]) >= -1e-4).all()
        shape = (image - image.min()) / np.ptp(image) if name == "gamma" else (image.max() - image) / np.ptp(image)
        curve = shape**exponent if name == "gamma" else -(shape**exponent)
        assert np.corrcoef(curve.ravel(), changed.ravel())[0, 1] > 0.99999

    @pytest.mark.parametrize("name", ["gamma", "gamma_inverted", "contrast"])
    def test_a_constant_patch_stays_as_it_is(self, name: str) -> None:
        constant = np.full(CUBE, 7, np.float32)
        np.testing.assert_allclose(self.apply(name, 1.3, image=constant), 7, rtol=1e-5)

    def test_noise_has_the_drawn_deviation_and_follows_its_seed(self) -> None:
        augmentation = make((32, 32, 32), channels=2)
        image, label = np.zeros((2, 32, 32, 32), np.float32), np.zeros((32, 32, 32), np.int16)
        params = AugmentParams(steps=(Step("noise", ((0.08,), (0.08,)), 5),))
        first, again = (run(augmentation, image, label, params, (False, False))[0] for _ in range(2))
        assert np.array_equal(first, again)
        assert first.std() == pytest.approx(0.08, rel=0.02) and abs(first.mean()) < 0.002
        assert abs(np.corrcoef(first[0].ravel(), first[1].ravel())[0, 1]) < 0.03

    def test_channels_without_values_stay_as_they_are(self) -> None:
        image, label = scene(CUBE, channels=3)
        params = AugmentParams(steps=(Step("blur", ((), (0.7, 0.7, 0.7), ())),))
        changed = run(make(CUBE, channels=3), image, label, params, (False,) * 3)[0]
        assert [np.array_equal(a, b) for a, b in zip(changed, image, strict=True)] == [True, False, True]

    def test_masked_channels_are_zero_outside_after_everything_and_outside_becomes_background(self) -> None:
        image, label = np.ones((2, *CUBE), np.float32), np.ones(CUBE, np.int16)
        label[:, :, 8:] = -1
        params = AugmentParams(steps=(Step("noise", ((0.1,), (0.1,)), 5),), mirror=(2,))
        changed, labels = run(make(CUBE, channels=2), image, label, params, (True, False))
        assert not changed[0][:, :, :4].any() and changed[0][:, :, 4:].all() and changed[1].all()
        assert not labels[:, :, :4].any() and (labels[:, :, 4:] == 1).all()


@pytest.mark.parametrize("patch", [CUBE, (4, 16, 16), (16, 16)])
def test_everything_drawn_at_random_can_be_applied_and_gives_finite_patches_again_and_again(patch: tuple[int, ...]) -> None:
    augmentation = make(patch, channels=2)
    shape = tuple(3 * p if p > 1 else 1 for p in augmentation.patch)
    image, label = scene((shape[0], shape[1], shape[2]), channels=2)
    rng = np.random.default_rng(4)
    for _ in range(60):
        params = augmentation.make_params(rng)
        first, second = (run(augmentation, image, label, params, (False, True)) for _ in range(2))
        assert np.isfinite(first[0]).all() and set(np.unique(first[1])) <= {0, 1, 2, 3}
        assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


class TestPreviousStage:
    DRAWS = 10_000

    def augmentation(self, labels: int = 2) -> DefaultAugmentation:
        return DefaultAugmentation.from_configuration(configuration(CUBE), 1, None, labels)

    @pytest.fixture(scope="class")
    def drawn(self) -> list[AugmentParams]:
        rng = np.random.default_rng(0)
        augmentation = self.augmentation()
        return [augmentation.make_params(rng) for _ in range(self.DRAWS)]

    def test_without_a_previous_stage_nothing_is_drawn_for_it_and_with_one_the_rest_stays(self) -> None:
        for seed in range(50):
            plain = self.augmentation(0).make_params(np.random.default_rng(seed))
            other = self.augmentation(3).make_params(np.random.default_rng(seed))
            assert plain.morphs == plain.removals == ()
            assert (plain.steps, plain.mirror) == (other.steps, other.mirror)
            assert plain.matrix is other.matrix or np.array_equal(plain.matrix, other.matrix)  # type: ignore[arg-type]

    def test_each_label_is_morphed_by_chance_of_4_in_10_times_a_half_and_loses_a_component_by_2_in_10_times_a_half(
        self, drawn: list[AugmentParams]
    ) -> None:
        for label in (1, 2):
            assert np.mean([any(m.label == label for m in p.morphs) for p in drawn]) == pytest.approx(0.2, abs=0.015)
            assert np.mean([any(r.label == label for r in p.removals) for p in drawn]) == pytest.approx(0.1, abs=0.015)
        assert np.mean([bool(p.morphs) for p in drawn]) == pytest.approx(0.4 * 0.75, abs=0.015)
        assert np.mean([bool(p.removals) for p in drawn]) == pytest.approx(0.2 * 0.75, abs=0.015)
        assert all(len({m.label for m in p.morphs}) == len(p.morphs) for p in drawn)

    def test_operations_are_drawn_equally_and_radii_fill_1_to_8_in_any_order_of_labels(self, drawn: list[AugmentParams]) -> None:
        morphs = [m for p in drawn for m in p.morphs]
        for operation in ("dilate", "erode", "open", "close"):
            assert np.mean([m.operation == operation for m in morphs]) == pytest.approx(0.25, abs=0.03)
        radii = np.array([m.radius for m in morphs])
        assert 1 <= radii.min() < 1.05 and 7.95 < radii.max() <= 8 and radii.mean() == pytest.approx(4.5, abs=0.15)
        assert np.mean([p.morphs[0].label == 1 for p in drawn if len(p.morphs) == 2]) == pytest.approx(0.5, abs=0.05)
        choices = np.array([r.choice for p in drawn for r in p.removals])
        assert 0 <= choices.min() < 0.01 and 0.99 < choices.max() < 1

    def apply(
        self, augmentation: DefaultAugmentation, label: NDArray[np.int16], previous: NDArray[np.int16], params: AugmentParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = (9, 9, 9)
        low, high = source_box(start, CUBE, params.matrix)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        centre = np.asarray(start) + (np.asarray(CUBE) - 1) / 2 - np.asarray(low)
        image = torch.from_numpy(smooth((1, *label.shape))[(slice(None), *box)].copy())
        crops = [torch.from_numpy(array[box].copy()) for array in (label, previous)]
        kept = crops[1].clone()
        result = augmentation.apply(image, crops[0], centre, params, (False,), crops[1])
        assert torch.equal(crops[1], kept), "what was read must stay as it is"
        return result

    @pytest.mark.parametrize("matrix", [None, random_matrix(1), random_matrix(2, in_plane=True)])
    @pytest.mark.parametrize("mirror", [(), (0,), (1, 2), (0, 1, 2)])
    def test_it_turns_and_flips_with_the_label(self, matrix: NDArray[np.float64] | None, mirror: tuple[int, ...]) -> None:
        _, label = scene()
        image, new_label = self.apply(self.augmentation(3), label, label, AugmentParams(matrix, (), mirror))
        assert image.shape == (4, *CUBE) and image.dtype == torch.float32
        assert len(new_label.unique()) > 2 and torch.equal(image[1:], one_hot(new_label, 3))

    def test_intensity_changes_leave_its_channels_alone(self) -> None:
        _, label = scene()
        steps = (Step("noise", ((0.1,),), 3), Step("brightness", ((1.2,),)), Step("gamma", ((0.8,),)))
        image, new_label = self.apply(self.augmentation(3), label, label, AugmentParams(steps=steps))
        assert torch.equal(image[1:], one_hot(new_label, 3))

    def test_labels_are_morphed_in_order_on_the_mirrored_patch_and_then_lose_a_component(self) -> None:
        previous = np.zeros((30, 30, 30), np.int16)
        previous[12, 12, 11], previous[12, 12, 13], previous[18, 18, 18] = 1, 2, 1  # in the patch 9 less, then x mirrored
        morphs = (Morph(2, "dilate", 2.0), Morph(1, "dilate", 1.0))
        params = AugmentParams(mirror=(2,), morphs=morphs, removals=(Removal(1, 0.0),))
        image, _ = self.apply(self.augmentation(), np.zeros_like(previous), previous, params)
        first, second = image[1].bool(), image[2].bool()
        places = np.indices(CUBE)
        grown = ((places - np.reshape((3, 3, 7), (3, 1, 1, 1))) ** 2).sum(0) <= 4
        assert np.array_equal(second.numpy(), grown), "the second label took the voxel of the first, which was then empty there"
        assert not first.any(), "its other component had the size of a ball of radius 1 and was removed"

    def test_it_must_be_given_exactly_when_it_is_wanted(self) -> None:
        image, label = torch.zeros(1, *CUBE), torch.zeros(CUBE, dtype=torch.int16)
        for augmentation, previous in ((self.augmentation(0), label), (self.augmentation(2), None)):
            with pytest.raises(ValueError, match="exactly when the network takes it as input"):
                augmentation.apply(image, label, np.full(3, 5.5), AugmentParams(), (False,), previous)
