"""A record's augmentation: options are checked and have effect, elastic deformation is smooth and bounded, plug-ins come in."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from autoseg.errors import PluginError
from autoseg.trainers.augment import (
    AugmentParams,
    DefaultAugmentation,
    Elastic,
    NoAugmentation,
    make_augmentation,
    source_box,
)
from autoseg.trainers.augment.spatial import displacement
from autoseg.types.plan import Configuration
from autoseg.types.run import AugmentSpec

CPU = torch.device("cpu")


def configuration(patch: tuple[int, ...]) -> Configuration:
    dims = len(patch)
    return Configuration(
        patch_size=patch, batch_size=2, spacing=(1.0,) * dims, median_shape=tuple(map(float, patch)),
        strides=((1,) * dims, (2,) * dims), kernel_sizes=((3,) * dims,) * 2, features_per_stage=(4, 8), blocks_per_stage=(1, 1),
        decoder_blocks_per_stage=(1,), batch_dice=False, normalization=("NoNormalization",), use_mask_for_norm=(False,),
    )


def make(patch: tuple[int, ...] = (16, 16, 16), kind: str = "default", **options: Any) -> DefaultAugmentation:
    made = make_augmentation(AugmentSpec(kind=kind, options=options), configuration(patch), 1, tuple(range(len(patch))))
    assert isinstance(made, DefaultAugmentation)
    return made


def drawn(augmentation: DefaultAugmentation, draws: int = 400) -> list[AugmentParams]:
    rng = np.random.default_rng(0)
    return [augmentation.make_params(rng) for _ in range(draws)]


ALWAYS = {
    "rotation_probability": lambda p: p.matrix is not None, "scaling_probability": lambda p: p.matrix is not None,
    "elastic_probability": lambda p: p.elastic is not None,
    **{f"{name}_probability": lambda p, name=name: any(s.name == name for s in p.steps)
       for name in ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma")},
    "mirror_probability": lambda p: p.mirror == (0, 1, 2),
}


@pytest.mark.parametrize("name", ALWAYS)
def test_a_probability_of_one_means_always_and_leaves_other_kinds_alone(name: str) -> None:
    others = {other: 0 for other in ALWAYS if other != name}
    params = drawn(make(**others, **{name: 1}), 50)
    assert all(ALWAYS[name](p) for p in params)
    kinds = {(p.matrix is not None, p.elastic is not None, tuple(s.name for s in p.steps), p.mirror) for p in params}
    assert len(kinds) == 1


@pytest.mark.parametrize(("name", "low", "high"), [
    ("noise", 1.0, 2.0), ("brightness", 0.2, 0.4), ("contrast", 2.0, 3.0), ("gamma", 0.9, 0.95), ("blur", 2.0, 3.0),
    ("low_resolution", 0.2, 0.3),
])
def test_ranges_are_kept_also_on_one_side_of_one(name: str, low: float, high: float) -> None:
    steps = [s for p in drawn(make(**{name: [low, high], f"{name}_probability": 1})) for s in p.steps if s.name == name]
    values = [v for s in steps for row in s.values for v in row]
    assert low <= min(values) < low + 0.2 * (high - low) and high - 0.2 * (high - low) < max(values) <= high


def test_rotation_is_in_degrees_and_scaling_in_its_range() -> None:
    params = drawn(make((16, 16), rotation=5, rotation_probability=1, scaling=[1.2, 1.3], scaling_probability=1))
    for p in params:
        assert p.matrix is not None
        factor = math.sqrt(np.linalg.det(p.matrix))
        assert 1.2 <= factor <= 1.3 and abs(math.degrees(math.acos(p.matrix[1, 1] / factor))) <= 5 + 1e-6


def test_options_that_stay_as_they_are_change_no_draw() -> None:
    plain, spelled = drawn(make()), drawn(make(gamma=[0.7, 1.5], elastic_probability=0))
    assert [(p.steps, p.mirror) for p in plain] == [(p.steps, p.mirror) for p in spelled]


@pytest.mark.parametrize(("options", "words"), [
    ({"rotation_probabilty": 0.4}, ("rotation_probabilty", "choose from rotation_probability, rotation, scaling_probability")),
    ({"gamma_probability": 1.5}, ("augment.options.gamma_probability", "less than or equal to 1", "1.5")),
    ({"scaling": [1.4, 0.7]}, ("augment.options.scaling", "first number must not be above the second")),
    ({"scaling": 3}, ("augment.options.scaling", "3")),
    ({"blur": [0, 1]}, ("augment.options.blur", "greater than 0")),
    ({"rotation": "much"}, ("augment.options.rotation", "much")),
    ({"low_resolution": [0.5, 2]}, ("augment.options.low_resolution", "less than or equal to 1")),
    ({"previous_radius": [1, 20]}, ("augment.options.previous_radius", "11")),
])
def test_what_makes_no_sense_is_refused_with_its_name(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(PluginError) as caught:
        make(**options)
    assert all(word in str(caught.value) for word in words)


def test_none_changes_nothing_and_takes_nothing() -> None:
    augmentation = make(kind="none")
    assert isinstance(augmentation, NoAugmentation) and augmentation.mirror_axes == ()
    params = augmentation.make_params(np.random.default_rng(0))
    assert params == AugmentParams() and augmentation.source_box((3, 4, 5), params) == ((3, 4, 5), (19, 20, 21))
    image, label = torch.rand(1, 16, 16, 16), torch.randint(-1, 3, (16, 16, 16), dtype=torch.int16)
    new_image, new_label = augmentation.apply(image, label, np.full(3, 7.5), params, (False,))
    assert torch.equal(new_image, image) and torch.equal(new_label, label.clamp_min(0).long())
    with pytest.raises(PluginError, match="'none' takes no options, found rotation"):
        make(kind="none", rotation=4)


def test_an_unknown_kind_names_those_there_are() -> None:
    with pytest.raises(PluginError, match=r"unknown augment 'flips'; choose from .*default.*none"):
        make(kind="flips")


def test_a_class_of_the_users_is_called_with_the_configuration_and_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_augmentation.py").write_text(
        "class Doubled:\n"
        "    previous_labels = 0\n"
        "    def __init__(self, configuration, channels, mirror, previous_labels, /, times=2):\n"
        "        self.patch, self.times, self.seen = configuration.patch_size, times, (channels, mirror, previous_labels)\n"
        "    def make_params(self, rng):\n"
        "        return rng.random()\n"
        "    def source_box(self, start, params):\n"
        "        return start, tuple(s + p for s, p in zip(start, self.patch))\n"
        "    def apply(self, image, label, centre, params, masked, previous=None):\n"
        "        return image * self.times, label.clamp_min(0).long()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = AugmentSpec(kind="my_augmentation:Doubled", options={"times": 3})
    made = make_augmentation(spec, configuration((8, 8, 8)), 2, (1, 2), 4)
    assert made.patch == (8, 8, 8) and made.seen == (2, (1, 2), 4)  # type: ignore[attr-defined]
    image, _ = made.apply(torch.ones(1, 8, 8, 8), torch.zeros(8, 8, 8, dtype=torch.int16), np.full(3, 3.5), None, (False,))
    assert image.max() == 3
    with pytest.raises(PluginError, match="does not take the options"):
        make_augmentation(spec.model_copy(update={"options": {"often": 3}}), configuration((8, 8, 8)), 1, (), 0)
    sys.modules.pop("my_augmentation", None)


class TestElastic:
    def test_shifts_are_smooth_centred_bounded_and_a_function_of_the_seed(self) -> None:
        patch = (24, 32, 40)
        for seed in range(5):
            shifts = displacement(Elastic(0.2, 0.4, seed), patch, False, CPU).numpy()
            assert np.array_equal(shifts, displacement(Elastic(0.2, 0.4, seed), patch, False, CPU).numpy())
            np.testing.assert_allclose(np.abs(shifts).max((1, 2, 3)), [0.4 * 0.2 * s for s in patch], rtol=1e-5)
            np.testing.assert_allclose(shifts.mean((1, 2, 3)), 0, atol=1e-4)
            slopes = [np.abs(np.diff(shifts[a], axis=b)).max() for a in range(3) for b in range(3)]
            assert max(np.abs(np.diff(shifts[a], axis=a)).max() for a in range(3)) < 1, "nothing is folded"
            assert max(slopes) < 2 and np.abs(np.diff(shifts, 2, axis=3)).max() < 0.3

    def test_in_a_plane_every_slice_moves_alike_and_none_moves_out_of_it(self) -> None:
        shifts = displacement(Elastic(0.2, 0.4, 1), (5, 20, 24), True, CPU)
        assert not shifts[0].any() and torch.equal(shifts[:, 0], shifts[:, 4]) and shifts[1].any() and shifts[2].any()

    @pytest.mark.parametrize("mirror", [(), (0,), (1, 2)])
    @pytest.mark.parametrize("patch", [(12, 14, 16), (14, 16)])
    def test_image_and_label_are_those_of_scipy_at_the_shifted_and_turned_points(
        self, patch: tuple[int, ...], mirror: tuple[int, ...]
    ) -> None:
        augmentation = make(patch, rotation_probability=1, elastic_probability=1, elastic_strength=[0.4, 0.4])
        size = augmentation.patch
        params = augmentation.make_params(np.random.default_rng(2))
        params = AugmentParams(params.matrix, (), mirror, elastic=params.elastic)
        low, high = augmentation.source_box((0, 0, 0), params)
        shape = tuple(h - a for a, h in zip(low, high, strict=True))
        rng = np.random.default_rng(0)
        image = ndimage.gaussian_filter(rng.normal(size=shape), 1.5).astype(np.float32) * 10
        label = np.digitize(ndimage.gaussian_filter(rng.normal(size=shape), 2), [-0.05, 0.05]).astype(np.int16)
        centre = (np.asarray(size) - 1) / 2 - np.asarray(low)
        new_image, new_label = augmentation.apply(
            torch.from_numpy(image)[None], torch.from_numpy(label), centre, params, (False,)
        )
        assert params.elastic is not None and params.matrix is not None
        shifts = displacement(params.elastic, size, augmentation.in_plane, CPU).numpy()
        offsets = np.stack(np.meshgrid(*[np.arange(s) - (s - 1) / 2 for s in size], indexing="ij")) + shifts
        points = np.einsum("ab,bzyx->azyx", params.matrix, offsets) + centre.reshape(3, 1, 1, 1)
        assert points.min() > -1e-3 and (points.max((1, 2, 3)) < np.asarray(shape) - 1 + 1e-3).all(), "the box covers every point"
        expected = np.flip(ndimage.map_coordinates(image.astype(float), points, order=1, mode="nearest"), mirror)
        np.testing.assert_allclose(new_image[0], expected, atol=1e-3)
        scores = [ndimage.map_coordinates((label == v).astype(float), points, order=1, mode="nearest") for v in range(3)]
        assert (new_label.numpy() == np.flip(np.argmax(scores, 0), mirror)).mean() > 0.998

    def test_it_is_off_unless_asked_for(self) -> None:
        assert all(p.elastic is None for p in drawn(make(), 2000))
        rate = np.mean([p.elastic is not None for p in drawn(make(elastic_probability=0.3), 2000)])
        assert rate == pytest.approx(0.3, abs=0.04)

    def test_without_it_the_box_is_that_of_the_matrix(self) -> None:
        augmentation = make()
        for p in drawn(augmentation, 50):
            assert augmentation.source_box((1, 2, 3), p) == source_box((1, 2, 3), augmentation.patch, p.matrix)
