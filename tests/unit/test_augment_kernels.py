"""Compiled kernels and torch say the same, and whatever is missing for the kernels, training goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from autoseg.trainers.augment import AugmentParams, DefaultAugmentation, Elastic, Step, spatial
from autoseg.trainers.augment import intensity as changes
from autoseg.trainers.augment.default import rotation_about

pytestmark = pytest.mark.skipif(spatial.compiled() is None, reason="numba is missing or has no place for its cache")


def scene(shape: tuple[int, int, int], channels: int, labels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(channels, *shape)), (0, 1, 1, 1)) * 5
    label = rng.integers(-1, labels, shape)
    label[: shape[0] // 2] = (label[: shape[0] // 2] > 3) + 0
    return torch.from_numpy(image.astype(np.float32)), torch.from_numpy(label.astype(np.int16))


def turned(seed: int, in_plane: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    matrix = np.eye(3)
    for axis in (0,) if in_plane else (0, 1, 2):
        matrix = rotation_about(axis, rng.uniform(-1, 1)) @ matrix
    factor = rng.uniform(0.7, 1.4)
    return matrix @ np.diag([1 if in_plane else factor, factor, factor])


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize("mirror", [(), (1,), (0, 2)])
@pytest.mark.parametrize(("patch", "shape", "in_plane"), [
    ((12, 14, 16), (20, 18, 19), False), ((1, 16, 20), (1, 19, 24), True), ((5, 14, 12), (5, 15, 20), True),
    ((3, 4, 1), (6, 5, 1), False), ((8, 8, 8), (2, 3, 30), False),
])
def test_resampling_is_the_same_in_torch_also_where_points_leave_the_crop(
    patch: tuple[int, int, int], shape: tuple[int, int, int], in_plane: bool, mirror: tuple[int, ...], elastic: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, label = scene(shape, 2)
    other = torch.flip(label, [2])
    centre = (np.asarray(shape) - 1) / 2 + (0 if in_plane else 0.3)
    shifts = spatial.displacement(Elastic(0.3, 0.3, 1), patch, in_plane, torch.device("cpu")) if elastic else None
    asked = (image, [label, other], centre, turned(3, in_plane), mirror, shifts, patch)
    new_image, new_labels = spatial.resample(*asked)
    monkeypatch.setattr(spatial, "compiled", lambda: None)
    torch_image, torch_labels = spatial.resample(*asked)
    torch.testing.assert_close(new_image, torch_image, atol=2e-4, rtol=0)
    for one, two in zip(new_labels, torch_labels, strict=True):
        assert one.dtype == two.dtype == torch.int16 and (one == two).float().mean() > 0.999


def test_voting_is_linear_indicators_and_argmax_label_by_label() -> None:
    shape, patch, matrix = (20, 20, 20), (14, 14, 14), turned(5, False) * 0.8
    _, label = scene(shape, 1, labels=30)
    centre = np.full(3, 9.5)
    offset = centre - matrix @ ((np.asarray(patch) - 1) / 2)
    values = np.unique(label)
    indicators = [(label.numpy() == value).astype(float) for value in values]
    scores = [ndimage.affine_transform(one, matrix, offset, patch, order=1, mode="nearest") for one in indicators]
    expected = values[np.argmax(scores, 0)]
    clear = np.diff(np.sort(scores, 0)[-2:], axis=0)[0] > 1e-5
    for found in (
        spatial.resample(torch.zeros(1, *shape), [label], centre, matrix, (), None, patch)[1],
        spatial.resample_anywhere(torch.zeros(1, *shape), [label], centre, matrix, None, patch)[1],
        spatial.resample_anywhere(torch.zeros(1, *shape), [label], centre, matrix, None, patch, everywhere=True)[1],
    ):
        assert np.array_equal(found[0].numpy()[clear], expected[clear]) and clear.mean() > 0.99


def test_a_tie_goes_to_the_nearest_voxel_not_to_the_smaller_label() -> None:
    label = torch.tensor([1, 2, 3, 4], dtype=torch.int16).view(1, 1, 4).expand(2, 2, 4).contiguous()
    label[0, 0, 2], label[1, 1, 2] = 9, 9  # halfway between rows every corner has the same weight
    given = (torch.zeros(1, 2, 2, 4), [label], np.array([0.5, 0.5, 2.0]), np.eye(3))
    for found in (spatial.resample(*given, (), None, (1, 1, 1)), spatial.resample_anywhere(*given, None, (1, 1, 1))):
        assert found[1][0].item() == 9, "the low corner is the nearest of equals"


@pytest.mark.parametrize("shape", [(12, 14, 16), (1, 9, 11), (3, 2, 30)])
def test_blur_is_the_same_in_torch(shape: tuple[int, int, int]) -> None:
    image = scene(shape, 1)[0][0]
    one, two = image.clone(), image.clone()
    sigmas = (1.0, 0.5, 0.8)
    changes.blur(one, sigmas, 0, False)
    changes.blur_anywhere(two, [changes.taps(s) if n > 1 else [1.0] for s, n in zip(sigmas, shape, strict=True)])
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert not torch.equal(one, image)


@pytest.mark.parametrize("size", range(1, 70, 3))
def test_low_resolution_is_the_same_in_torch_at_every_zoom(size: int) -> None:
    image = scene((5, 3, size), 1)[0][0]
    for zoom in np.linspace(0.5, 1, 21):
        small = (5, 3, max(1, round(size * float(zoom))))
        one, two = image.clone(), image.clone()
        spatial.compiled().low_resolution(image.numpy(), small, one.numpy())  # type: ignore[union-attr]
        changes.low_resolution_anywhere(two, small)
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["blur", "low_resolution", "contrast", "gamma", "noise"])
def test_a_patch_of_several_channels_is_changed_channel_by_channel_whatever_its_memory_layout(name: str) -> None:
    augmentation = DefaultAugmentation((6, 7, 8), 2, False, 0.5, ())
    image, label = scene((6, 7, 8), 2)
    laid_out = torch.empty(2, 8, 7, 6).permute(0, 3, 2, 1).copy_(image)
    values = {"blur": (0.7, 0.7, 0.7)}.get(name, (0.8,))
    params = AugmentParams(steps=(Step(name, (values, values), 3),))  # type: ignore[arg-type]
    one, two = (augmentation.apply(x, label, np.zeros(3), params, (False, False))[0] for x in (image, laid_out))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_without_numba_everything_works_in_torch(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('not here')")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np, torch\n"
        "from autoseg.trainers.augment import AugmentParams, DefaultAugmentation, Step\n"
        "from autoseg.trainers.augment.spatial import compiled\n"
        "assert 'numba' not in sys.modules\n"
        "steps = (Step('blur', ((0.7, 0.7, 0.7),)), Step('low_resolution', ((0.7,),)))\n"
        "image, label = torch.rand(1, 8, 8, 8), torch.ones(8, 8, 8, dtype=torch.int16)\n"
        "augmentation = DefaultAugmentation((4, 5, 6), 1, False, 0.5, ())\n"
        "image, label = augmentation.apply(image, label, np.full(3, 3.5), AugmentParams(np.eye(3), steps), (False,))\n"
        "assert compiled() is None and image.isfinite().all() and bool((label == 1).all())\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
