"""Prediction from Python: arrays, SimpleITK and nibabel images, several threads, memory."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import nn

from autoseg.errors import GeometryError
from autoseg.files.allocator import give_back
from autoseg.inference import ImagePrediction, Member, Model, Prediction
from autoseg.inference.foreign import from_foreign, is_foreign
from autoseg.inference.memory import resident_bytes
from autoseg.networks.build import build
from autoseg.networks.describe import describe
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan

CPU = torch.device("cpu")
LABELS = Labels(foreground=(Label(name="a", value=3), Label(name="b", value=300)))


class Levels(nn.Module):
    """a where the first channel is about 1, b where it is 2 or more; the last channel shifts it."""

    def forward(self, x: torch.Tensor, head_count: int = 1) -> list[torch.Tensor]:
        value = x[:, 0] + (x[:, 1] if x.shape[1] > 1 else 0)
        return [torch.stack([torch.full_like(value, 0.25), value - 0.25, 2 * value - 2.0], 1)]


def model(network: Any = None, patch: tuple[int, ...] = (8, 8, 8), channels: int = 1, orientation: str = "LPS") -> Model:
    dims = len(patch)
    configuration = Configuration(
        patch_size=patch, batch_size=2, spacing=(1.0,) * dims, median_shape=tuple(map(float, patch)),
        strides=((1,) * dims, (2,) * dims), kernel_sizes=((3,) * dims,) * 2, features_per_stage=(4, 8), blocks_per_stage=(1, 1),
        decoder_blocks_per_stage=(1,), batch_dice=False, normalization=("NoNormalization",) * channels,
        use_mask_for_norm=(False,) * channels,
    )
    plan = Plan(
        dataset_name="x", planner="default", gpu_memory_gb=8, transpose_forward=(0, 1, 2), orientation=orientation,
        channels=tuple(f"channel{i}" for i in range(channels)), labels=LABELS, intensities=(), resampling="none",
        configurations={"c": configuration},
    )
    made = Levels() if network is None else build(describe(configuration, channels, 3), seed=0)
    return Model([Member(plan, "c", (made,), (0, 1, 2)[:dims])], CPU, "fp32")  # type: ignore[arg-type]


def scene(shape: tuple[int, ...] = (9, 10, 11), seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 3, shape).astype(np.int16)


def by_hand(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.select([values >= 2, values >= 1], [300, 3], 0)


DIRECTIONS = {
    "lps": np.eye(3), "flipped": np.diag([-1.0, 1.0, -1.0]), "turned": np.eye(3)[[2, 0, 1]],
    "oblique": np.array([[0.0, 0.96, 0.28], [-1.0, 0.0, 0.0], [0.0, -0.28, 0.96]]),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("orientation", ["LPS", "RAS", "as_stored"])
def test_a_simpleitk_image_gives_one_on_its_own_grid(direction: str, orientation: str) -> None:
    image = sitk.GetImageFromArray(scene())
    image.SetSpacing((0.7, 1.1, 2.5))
    image.SetOrigin((5.0, -7.0, 11.0))
    image.SetDirection(DIRECTIONS[direction].ravel().tolist())
    found = model(orientation=orientation).predict(image)
    assert isinstance(found, sitk.Image) and found.GetSize() == image.GetSize()
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(found, get)() == getattr(image, get)()
    assert np.array_equal(sitk.GetArrayFromImage(found), by_hand(scene()))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_nibabel_image_gives_one_with_its_own_affine(direction: str, kind: Any) -> None:
    affine = np.eye(4)
    affine[:3, :3] = DIRECTIONS[direction] * [0.7, 1.1, 2.5]
    affine[:3, 3] = (5, -7, 11)
    image = kind(scene(), affine)
    found = model().predict(image)
    assert isinstance(found, kind) and np.array_equal(found.affine, affine) and found.get_data_dtype() == np.uint16
    assert np.array_equal(np.asarray(found.dataobj), by_hand(scene()))
    again = kind.from_bytes(found.to_bytes())
    assert np.array_equal(np.asarray(again.dataobj), by_hand(scene()))


def test_both_libraries_mean_the_same_grid(tmp_path: Any) -> None:
    image = sitk.GetImageFromArray(scene())
    image.SetSpacing((0.7, 1.1, 2.5))
    image.SetOrigin((5.0, -7.0, 11.0))
    image.SetDirection(DIRECTIONS["oblique"].ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    one, other = from_foreign(sitk.ReadImage(str(tmp_path / "a.nii"))), from_foreign(nibabel.load(tmp_path / "a.nii"))
    assert np.array_equal(one.array_czyx, other.array_czyx) and one.grid.shape == other.grid.shape
    for name in ("spacing", "origin", "direction"):
        np.testing.assert_allclose(getattr(one.grid, name), getattr(other.grid, name), atol=1e-5)


def test_channels_come_as_a_list_as_vectors_or_in_the_fourth_axis() -> None:
    two, net = [scene(seed=0), scene(seed=1)], model(channels=2)
    expected = by_hand(two[0].astype(int) + two[1])
    pair = [sitk.GetImageFromArray(array) for array in two]
    assert np.array_equal(sitk.GetArrayFromImage(net.predict(pair)), expected)
    assert np.array_equal(sitk.GetArrayFromImage(net.predict(sitk.Compose(pair))), expected)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    pair = [nibabel.Nifti1Image(array.T, affine) for array in two]
    assert np.array_equal(np.asarray(net.predict(pair).dataobj).T, expected)
    together = nibabel.Nifti1Image(np.stack([array.T for array in two], -1), affine)
    assert np.array_equal(np.asarray(net.predict(together).dataobj).T, expected)
    moved = nibabel.Nifti1Image(two[1].T, affine + 0.5 * np.eye(4)[:, 3:] @ np.eye(4)[3:])
    with pytest.raises(GeometryError, match="different grids"):
        net.predict([pair[0], nibabel.Nifti1Image(moved.dataobj, np.diag([-1.0, -1.0, 2.0, 1.0]))])


def test_a_picture_of_two_dimensions_stays_one() -> None:
    image = sitk.GetImageFromArray(scene((13, 9)))
    found = model(patch=(8, 8)).predict(image, probabilities=True)
    assert isinstance(found, ImagePrediction) and found.label.GetDimension() == 2
    assert np.array_equal(sitk.GetArrayFromImage(found.label), by_hand(scene((13, 9))))
    assert sitk.GetArrayFromImage(found.probabilities).shape == (13, 9, 3)


def test_more_than_labels_comes_as_a_record() -> None:
    net, image = model(), scene()[None]
    label = net.predict(image)
    assert isinstance(label, np.ndarray)
    found = net.predict(image, timings=True)
    assert isinstance(found, Prediction) and np.array_equal(found.label_zyx, label) and found.probabilities_czyx is None
    assert set(found.seconds) == {"preprocess", "network", "restore"} and all(s >= 0 for s in found.seconds.values())
    found = net.predict(image, probabilities=True, uncertainty=True)
    assert found.probabilities_czyx is not None and found.probabilities_czyx.shape == (3, *image.shape[1:])
    assert found.uncertainty_kzyx is not None and found.uncertainty_kzyx.shape == (2, *image.shape[1:])
    flat = model(patch=(8, 8)).predict(scene((1, 9, 8)), probabilities=True, uncertainty=True)
    assert flat.label_zyx.shape == (9, 8) and flat.probabilities_czyx is not None and flat.probabilities_czyx.shape == (3, 9, 8)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    images = net.predict(nibabel.Nifti1Image(scene().T, affine), probabilities=True, uncertainty=True)
    assert images.probabilities.shape == (*scene().T.shape, 3) and images.uncertainty.get_data_dtype() == np.float32
    np.testing.assert_allclose(np.asarray(images.probabilities.dataobj).T, found.probabilities_czyx, atol=1e-6)


def test_what_is_no_image_is_refused() -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.3
    with pytest.raises(GeometryError, match="sheared"):
        model().predict(nibabel.Nifti1Image(scene(), sheared))
    with pytest.raises(GeometryError, match="no usable axes"):
        model().predict(SimpleNamespace(affine=np.zeros((4, 4)), dataobj=scene()))
    with pytest.raises(GeometryError, match="2 or 3 dimensions, found 4"):
        model().predict(sitk.Image([4, 4, 4, 2], sitk.sitkInt16))
    with pytest.raises(GeometryError, match="expected a SimpleITK or nibabel image, found ndarray"):
        model(channels=2).predict([sitk.GetImageFromArray(scene()), scene()])
    assert not is_foreign(scene()) and not is_foreign([]) and not is_foreign([scene()])
    with pytest.raises(GeometryError, match=r"trained on 1 channel\(s\)"):
        model().predict(sitk.GetImageFromArray(np.zeros((4, 4, 4, 2), np.float32), isVector=True))


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "as_stored"])
def test_arrays_reach_the_networks_as_they_are_given(orientation: str) -> None:
    seen: list[torch.Tensor] = []

    class Look(Levels):
        def forward(self, x: torch.Tensor, head_count: int = 1) -> list[torch.Tensor]:
            seen.append(x)
            return super().forward(x)

    net = model(orientation=orientation)
    net = Model([Member(net.members[0].plan, "c", (Look(),), ())], CPU, "fp32")  # type: ignore[arg-type]
    array = scene((8, 8, 8)) + 1
    assert np.array_equal(net.predict(array[None]), by_hand(array))
    assert np.array_equal(seen[0][0, 0].numpy(), array)


def test_several_threads_share_a_model_and_memory_stays_flat() -> None:
    net = model("real")
    net.mirror = False
    images = [np.random.default_rng(seed).normal(size=(1, 14 + seed % 3, 20, 17)).astype(np.float32) for seed in range(6)]
    alone = [net.predict(image) for image in images]
    assert len({int(label.sum()) for label in alone}) > 1
    jobs = [index % len(images) for index in range(100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: net.predict(images[i]), jobs))  # threads keep caches of their own
        gc.collect()
        give_back()
        before = resident_bytes()
        found = list(pool.map(lambda i: net.predict(images[i]), jobs))
        assert all(np.array_equal(label, alone[i]) for label, i in zip(found, jobs, strict=True))
        del found
        gc.collect()
        give_back()
        assert resident_bytes() - before < 8 << 20
