"""Left and right are not mixed up: no draw of the augmentation and no flip of a prediction shows a left label on the right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoseg.datasets.read import read_dataset
from autoseg.inference import Member, Model
from autoseg.planners.registry import get_planner
from autoseg.planners.symmetry import LeftRight, mirror_axes
from autoseg.stages.fingerprint import fingerprint
from autoseg.trainers.augment import DefaultAugmentation
from autoseg.trainers.default import Job, Training
from autoseg.types.case import Image
from autoseg.types.fingerprint import Intensities
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan
from autoseg.types.run import AugmentSpec, TrainSpec

OASIS = Path(__file__).resolve().parents[2] / "../shared/data/oasis_malf_2mm"
SIDES = Labels(foreground=(Label(name="eye_left", value=1), Label(name="eye_right", value=2)))
ALONG_X = LeftRight(2, (("eye_left", "eye_right"),), True, "along x")
DRAWS = 3000
SHAPE = (24, 40)


def configuration(patch: tuple[int, ...], mirror: tuple[int, ...] | None) -> Configuration:
    dims = len(patch)
    return Configuration.model_validate({
        "patch_size": patch, "batch_size": 8, "spacing": (1.0,) * dims, "median_shape": patch,
        "strides": ((1,) * dims, (2,) * dims, (2,) * dims), "kernel_sizes": ((3,) * dims,) * 3, "features_per_stage": (8, 16, 16),
        "blocks_per_stage": (2, 2, 2), "decoder_blocks_per_stage": (1, 1), "batch_dice": True, "mirror_axes": mirror,
        "normalization": ("NoNormalization",), "use_mask_for_norm": (False,),
    })


def maps(made: Configuration, spec: TrainSpec) -> NDArray[np.float64]:
    """Where the axes of the patch point in the image, (draws, 3, 3), for many draws of the training's augmentation."""
    augmentation = DefaultAugmentation.from_configuration(made, 1, spec.mirror_axes(made))
    rng = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS):
        params = augmentation.make_params(rng)
        flips = np.diag([-1.0 if axis in params.mirror else 1.0 for axis in range(3)])
        found.append((np.eye(3) if params.matrix is None else params.matrix) @ flips)
    return np.array(found)


def swap_sides(turns: NDArray[np.float64], in_plane: bool) -> NDArray[np.bool_]:
    """Which maps show the mirror image: x turned round, or, where slices are turned all the way, their plane seen from behind."""
    if in_plane:
        return np.asarray(np.linalg.det(turns[:, 1:, 1:]) < 0)
    return np.asarray(turns[:, 2, 2] < 0)


@pytest.mark.parametrize(("patch", "in_plane"), [((32, 32, 32), False), ((16, 64, 64), True), ((32, 32), True), ((32, 64), True)])
def test_no_training_patch_is_mirrored_across_the_midline(patch: tuple[int, ...], in_plane: bool) -> None:
    made = configuration(patch, mirror_axes(ALONG_X, (0, 1, 2), patch))
    assert not swap_sides(maps(made, TrainSpec()), in_plane).any()
    everything = swap_sides(maps(configuration(patch, None), TrainSpec()), in_plane)
    assert everything.mean() == pytest.approx(0.5, abs=0.05), "all flips show half of the patches mirrored"
    asked = TrainSpec(augment=AugmentSpec(mirror=(len(patch) - 1,)))
    assert swap_sides(maps(made, asked), in_plane).any(), "what the user sets goes before the plan"


@pytest.mark.parametrize("patch", [(16, 64, 64), (32, 32)])
def test_leaving_out_the_midline_alone_is_not_enough_where_slices_are_turned_round(patch: tuple[int, ...]) -> None:
    made = configuration(patch, tuple(range(len(patch) - 1)))
    turns = maps(made, TrainSpec())
    half_turn = swap_sides(turns, in_plane=True) & (turns[:, 2, 2] < -0.5)
    assert half_turn.any(), "a flip along y and half a turn are a flip along x"


class Face:
    """A picture of a midline with equal eyes at either side, which only their place tells apart, and a nose at the front."""

    def __init__(self, number: int) -> None:
        rng = np.random.default_rng(number)
        self.name, self.shape = f"face{number}", (1, *SHAPE)
        picture = rng.normal(0, 0.2, SHAPE)
        middle, height = int(rng.integers(18, 22)), int(rng.integers(9, 15))
        picture[:, middle] += 2
        picture[2:5, middle - 1 : middle + 2] += 3
        self.label = np.zeros(self.shape, np.int16)
        for side, value in ((1, 1), (-1, 2)):
            x = middle + side * int(rng.integers(6, 10))
            self.label[0, height : height + 4, x - 2 : x + 2] = value
        picture[self.label[0] > 0] -= 2
        self.image = picture[None, None].astype(np.float32)

    @property
    def locations(self) -> Mapping[int, NDArray[np.integer]]:
        return {value: np.argwhere(self.label == value) for value in (1, 2)}

    def read_image(self, box: tuple[slice, slice, slice]) -> NDArray[np.float32]:
        return self.image[(slice(None), *box)]

    def read_label(self, box: tuple[slice, slice, slice]) -> NDArray[np.int16]:
        return self.label[box]


def trained(made: Configuration) -> Training:
    """A network after a short training on faces with the augmentation that the configuration asks for."""
    spec = TrainSpec.model_validate({
        "epochs": 1, "steps_per_epoch": 70, "val_steps": 0, "precision": "fp32", "optimizer": {"kind": "adamw", "lr": 0.01}})
    training = Training(Job(made, SIDES, 1, spec, 0, [Face(i) for i in range(30)], [], torch.device("cpu"), "fp32", 0))
    list(training.run())
    return training


def right_side(training: Training, axes: tuple[int, ...]) -> float:
    """Share of the voxels found in unseen eyes that have the right side, when predictions are flipped along `axes`."""
    statistics = Intensities(mean=0, median=0, std=1, min=0, max=1, percentile_99_5=1, percentile_00_5=0)
    plan = Plan(dataset_name="faces", planner="default", gpu_memory_gb=8, transpose_forward=(0, 1, 2), channels=("a",),
                labels=SIDES, intensities=(statistics,), configurations={"2d": training.job.configuration})
    model = Model([Member(plan, "2d", (training.network,), axes)], torch.device("cpu"), "fp32")
    right = found = 0
    for face in map(Face, range(100, 110)):
        grid = Grid(shape=face.shape, spacing=(999.0, 1.0, 1.0), has_direction=False)
        label = model.predict_image(Image(face.image, grid, face.name)).label_zyx
        eyes = (face.label > 0) & (label > 0)
        right += int((label[eyes] == face.label[eyes]).sum())
        found += int(eyes.sum())
    assert found > 100, "the network finds eyes"
    return right / found


def test_a_network_confuses_sides_only_when_it_is_trained_or_asked_with_flips() -> None:
    planned = mirror_axes(ALONG_X, (0, 1, 2), SHAPE)
    assert planned is not None
    good = trained(configuration(SHAPE, planned))
    axes = good.job.spec.mirror_axes(good.job.configuration)
    assert right_side(good, axes) > 0.97
    assert right_side(good, (0, 1)) < 0.8, "flips in prediction confuse a network that knows the sides"
    assert right_side(trained(configuration(SHAPE, None)), ()) < 0.8, "and a network trained with all flips never learns them"


@pytest.mark.real_data
@pytest.mark.skipif(not OASIS.is_dir(), reason="the real data is not here")
def test_a_brain_atlas_is_not_mirrored_across_the_midline() -> None:
    dataset, _ = read_dataset(OASIS)
    assert dataset is not None
    some = dataset.model_copy(update={"cases": dataset.cases[:6]})
    plan = get_planner("default")(some, fingerprint(some, threads=0), None)
    assert any("11 pairs" in note and "not mirrored along x" in note for note in plan.notes)
    assert plan.transpose_forward == (0, 1, 2)
    assert plan.configurations["3d_fullres"].mirror_axes == (0, 1)
    assert plan.configurations["2d"].mirror_axes == ()
    for made in plan.configurations.values():
        assert not swap_sides(maps(made, TrainSpec()), made.dims == 2).any()
        assert made.dims - 1 not in TrainSpec().mirror_axes(made), "prediction flips along these axes"
