"""Pipelines of batchgenerators' transforms: deterministic in any thread, shapes as promised, results as transforms give them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from autoseg.errors import PluginError
from autoseg.trainers.augment import make_augmentation
from autoseg.trainers.loading import Wanted, make_loader
from autoseg.trainers.sampling import TRAINING
from autoseg.types.plan import Configuration
from autoseg.types.run import AugmentSpec, TrainSpec

TRANSFORMS = [
    {"name": "SpatialTransform", "options": {"do_elastic_deform": False, "angle_x": (-0.4, 0.4), "scale": (0.8, 1.2),
                                             "border_mode_seg": "constant", "border_cval_seg": -1, "random_crop": False}},
    {"name": "GaussianNoiseTransform", "options": {"p_per_sample": 1.0}},
    {"name": "GammaTransform", "options": {"p_per_sample": 0.5, "retain_stats": True}},
    {"name": "MirrorTransform"},
]


def configuration(patch: tuple[int, ...] = (8, 10, 12), masked: bool = False) -> Configuration:
    dims = len(patch)
    return Configuration.model_validate({
        "patch_size": patch, "batch_size": 2, "spacing": (1.0,) * dims, "median_shape": patch,
        "strides": ((1,) * dims, (2,) * dims), "kernel_sizes": ((3,) * dims,) * 2,
        "features_per_stage": (4, 4), "blocks_per_stage": (1, 1),
        "decoder_blocks_per_stage": (1,), "batch_dice": False, "normalization": ("NoNormalization",) * 2,
        "use_mask_for_norm": (masked, False),
    })


def augmentation(
    patch: tuple[int, ...] = (8, 10, 12), previous: int = 0, mirror: tuple[int, ...] = (0, 1), **options: Any
) -> Any:
    spec = AugmentSpec(kind="batchgenerators", options={"transforms": TRANSFORMS, **options})
    return make_augmentation(spec, configuration(patch), 2, mirror, previous)


class Noise:
    """A two-channel case with labels 1 and 2, and -1 in a corner."""

    def __init__(self, number: int, shape: tuple[int, int, int] = (16, 16, 16)) -> None:
        rng = np.random.default_rng(number)
        self.name, self.shape = f"noise{number}", shape
        self.image = rng.normal(size=(2, *shape)).astype(np.float32)
        self.label = rng.integers(0, 3, shape).astype(np.int16)
        self.label[:3, :3, :3] = -1
        self.locations = {1: np.argwhere(self.label == 1)}

    def read_image(self, box: tuple[slice, slice, slice]) -> Any:
        return self.image[(slice(None), *box)]

    def read_label(self, box: tuple[slice, slice, slice]) -> Any:
        return self.label[box]


def crop(one: Any, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    case = Noise(seed, one.source)
    return torch.from_numpy(case.image), torch.from_numpy(case.label)


@pytest.mark.parametrize("patch", [(8, 10, 12), (10, 12)])
@pytest.mark.parametrize("source_scale", [1.0, 1.4])
def test_patches_have_the_promised_shapes_and_types(patch: tuple[int, ...], source_scale: float) -> None:
    one = augmentation(patch, source_scale=source_scale)
    low, high = one.source_box((5, 6, 7), one.make_params(np.random.default_rng(0)))
    assert tuple(b - a for a, b in zip(low, high, strict=True)) == one.source
    image, label = one.apply(*crop(one), np.zeros(3), 17, (False, False), None)
    assert image.shape == (2, *one.patch) and image.dtype == torch.float32
    assert label.shape == one.patch and label.dtype == torch.int64 and set(label.unique().tolist()) <= {0, 1, 2}


def test_a_seed_gives_the_same_patch_in_any_thread_and_order_and_the_global_random_numbers_go_on_as_before() -> None:
    one = augmentation()
    image, label = crop(one)
    expected = [one.apply(image, label, np.zeros(3), seed, (False, False), None) for seed in range(12)]
    assert not torch.equal(expected[0][0], expected[1][0])
    np.random.seed(3)
    wanted = np.random.rand(2)
    np.random.seed(3)
    first = np.random.rand()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda seed: one.apply(image, label, np.zeros(3), seed, (False, False), None), reversed(range(12))))
    assert [first, np.random.rand()] == wanted.tolist()
    for (a, b), (c, d) in zip(expected, reversed(found), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_it_is_what_the_transforms_themselves_return() -> None:
    from batchgenerators.transforms.spatial_transforms import MirrorTransform

    spec = [{"name": "MirrorTransform", "options": {"axes": (2,)}}]
    one = augmentation(transforms=spec)
    image, label = crop(one)
    np.random.seed(5)
    seg = label.numpy()[None, None].astype(np.float32)
    expected = MirrorTransform(axes=(2,))(data=image.numpy()[None].copy(), seg=seg)
    found, found_label = one.apply(image, label, np.zeros(3), 5, (False, False), None)
    assert np.array_equal(found.numpy(), expected["data"][0])
    assert np.array_equal(found_label.numpy(), np.maximum(expected["seg"][0, 0], 0))


def test_only_the_axes_that_the_plan_allows_are_mirrored() -> None:
    one = augmentation(transforms=[{"name": "MirrorTransform"}], mirror=(1,))
    image, label = crop(one)
    seen = {tuple(found.flatten()[:4].tolist()) for seed in range(20)
            for found, _ in [one.apply(image, label, np.zeros(3), seed, (False, False), None)]}
    assert seen == {tuple(x.flatten()[:4].tolist()) for x in (image, torch.flip(image, [2]))}


def test_masked_channels_are_zero_outside_and_what_is_given_stays_unchanged() -> None:
    one = augmentation(transforms=[{"name": "GaussianNoiseTransform", "options": {"p_per_sample": 1.0}}])
    image, label = crop(one)
    before = image.clone(), label.clone()
    found, _ = one.apply(image, label, np.zeros(3), 1, (True, False), None)
    outside = label < 0
    assert not found[0][outside].any() and found[1][outside].all() and found[0][~outside].all()
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])


def test_the_previous_stages_segmentation_moves_with_the_label() -> None:
    one = augmentation(previous=2, transforms=[{"name": "MirrorTransform", "options": {"axes": (0, 1, 2)}}])
    image, label = crop(one)
    for seed in range(6):
        found, found_label = one.apply(image, label, np.zeros(3), seed, (False, False), label.clamp_min(0))
        assert found.shape == (4, *one.patch)
        assert torch.equal(found[2:], torch.stack([found_label == 1, found_label == 2]).float())


def own(size: tuple[int, ...], keep: int = 1) -> Any:
    """A pipeline of a user."""
    def run(data: Any, seg: Any) -> dict[str, Any]:
        return {"data": data[:, :keep] + np.random.rand(), "seg": seg}

    return run


def test_a_pipeline_can_be_a_function_of_the_users_own() -> None:
    one = augmentation(transforms=None, pipeline=f"{__name__}:own", keep=2)
    image, label = crop(one)
    found, _ = one.apply(image, label, np.zeros(3), 1, (False, False), None)
    assert float((found - image).std()) < 1e-6 and float((found - image).mean()) > 0
    with pytest.raises(PluginError, match=r"returned an array \(1, 1, 8, 10, 12\), expected \(1, 2, 8, 10, 12\)"):
        augmentation(transforms=None, pipeline=f"{__name__}:own").apply(image, label, np.zeros(3), 1, (False, False), None)


@pytest.mark.parametrize(("options", "message"), [
    ({"transforms": [{"name": "os.system"}]}, "unknown batchgenerators transform"),
    ({"transforms": [{"name": "MirrorTransform", "p": 1}]}, "unknown batchgenerators transform"),
    ({"transforms": [{"name": "MirrorTransform", "options": {"speed": 1}}]}, "MirrorTransform cannot be built with options"),
    ({"transforms": None}, "takes the options transforms"),
    ({"pipeline": "a:b"}, "takes the options transforms"),
    ({"source_scale": 0.5}, "source_scale from 1"),
    ({"source_scale": "large"}, "source_scale from 1"),
    ({"transforms": None, "pipeline": f"{__name__}:own", "speed": 1}, "cannot be built with options .*speed"),
    ({"transforms": None, "pipeline": "nowhere:function"}, "cannot be imported"),
])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        augmentation(**options)


@pytest.mark.parametrize("growth", [{}, {"kind": "grow", "options": {"stages": 2}}])
def test_a_loader_gives_the_same_batches_whatever_its_threads(growth: dict[str, Any]) -> None:
    spec = TrainSpec.model_validate({
        "epochs": 1, "steps_per_epoch": 6, "growth": growth,
        "augment": {"kind": "batchgenerators", "options": {"transforms": TRANSFORMS, "source_scale": 1.25}},
    })
    runs = []
    for threads in (0, 1, 3):
        wanted = Wanted(spec, configuration(), 0, 2, 0)
        loader = make_loader(wanted, [Noise(i) for i in range(3)], torch.device("cpu"), threads)
        runs.append(list(loader.batches(TRAINING, 0, 6)))
        loader.close()
    assert runs[0][-1].image.shape == (2, 2, 8, 10, 12)
    for other in runs[1:]:
        assert all(torch.equal(a.image, b.image) and torch.equal(a.label, b.label) for a, b in zip(runs[0], other, strict=True))
