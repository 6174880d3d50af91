"""Data sets that break recipes made for ordinary ones: each gets a sensible plan that says what is odd, trains and predicts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from autoseg.datasets.folder import read_inputs
from autoseg.files.images import read_label
from autoseg.files.workspace import Workspace, save_record
from autoseg.planners.registry import get_planner
from autoseg.stages.plan import Planned, plan
from autoseg.stages.predict import Options as PredictOptions
from autoseg.stages.predict import predict
from autoseg.stages.records import Options
from autoseg.stages.train import train
from autoseg.types.plan import Configuration, Plan
from autoseg.types.run import AugmentSpec, TrainSpec

Label = NDArray[np.uint8]
Paint = Callable[[Label, int], object]
FEATURES = (4, 8, 8, 8, 8, 8, 8, 8, 8)


def block(label: Label, case: int) -> None:
    """Half of the image along every axis."""
    label[tuple(slice(edge // 4, max(edge // 4 + 1, 3 * edge // 4)) for edge in label.shape)] = 1


def rare(label: Label, case: int) -> None:
    """A second label in the last of the cases."""
    block(label, case)
    if case == 7:
        label[1:3, 1:3, 1:3] = 2


def many(label: Label, case: int) -> None:
    """Sixty labels in blocks that lie elsewhere in every case; four blocks are background."""
    values = np.random.default_rng(case).permutation(64).reshape(4, 4, 4)
    label[:] = np.where(values < 60, values + 1, 0).repeat(6, 0).repeat(6, 1).repeat(6, 2)


def dot(label: Label, case: int) -> None:
    """One voxel."""
    label[5, 6, 7 + case] = 1


@dataclass(frozen=True)
class Odd:
    """A data set, and what its plan must hold: patch and batch by configuration, folds, and words of the notes."""

    name: str
    shape: tuple[int, ...]
    cases: int
    patches: dict[str, tuple[tuple[int, ...], int]]
    folds: int = 5
    notes: tuple[str, ...] = ()
    paint: Paint = block
    spacing: tuple[float, ...] | None = None
    planner: str = "default"
    batch: int = 2
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of cases that differ
    edit: Callable[[Configuration], dict[str, object]] | None = None
    mirror: tuple[int, ...] | None = None

    @property
    def ending(self) -> str:
        return ".png" if len(self.shape) == 2 else ".nii.gz"


def crop(configuration: Configuration) -> dict[str, object]:
    """A smaller patch and a shallower network, so that the test is quick."""
    stages = 5
    return {
        "patch_size": (128, 512), "strides": configuration.strides[:stages], "kernel_sizes": configuration.kernel_sizes[:stages],
        "features_per_stage": FEATURES[:stages], "blocks_per_stage": configuration.blocks_per_stage[:stages],
        "decoder_blocks_per_stage": configuration.decoder_blocks_per_stage[: stages - 1],
    }


ODD = [
    Odd("all edges under 16", (14, 14, 14), 6, {"2d": ((14, 14), 4), "3d_fullres": ((14, 14, 14), 2)},
        notes=("2d: the images are so small", "3d_fullres: the images are so small")),
    Odd("pictures under 16", (14, 14), 6, {"2d": ((14, 14), 2)}, notes=("2d: the images are so small", "one slice")),
    Odd("all edges under 8", (6, 7, 7), 6, {"2d": ((8, 8), 2), "3d_fullres": ((6, 8, 8), 2)},
        notes=("2d: the images are so small",)),
    Odd("pictures under 8", (7, 7), 6, {"2d": ((8, 8), 2)}, notes=("2d: the images are so small",)),
    Odd("a few voxels", (3, 2, 3), 6, {"2d": ((4, 4), 2), "3d_fullres": ((4, 4, 4), 2)}),
    Odd("one case", (16, 16, 16), 1, {"2d": ((16, 16), 2), "3d_fullres": ((16, 16, 16), 2)}, folds=1,
        notes=("one case, which is trained and validated on",)),
    Odd("two cases", (16, 16, 16), 2, {"2d": ((16, 16), 2), "3d_fullres": ((16, 16, 16), 2)}, folds=2,
        notes=("2 cases make 2 folds",)),
    Odd("three cases", (16, 16, 16), 3, {"2d": ((16, 16), 2), "3d_fullres": ((16, 16, 16), 2)}, folds=3,
        notes=("3 cases make 3 folds",)),
    Odd("four cases", (16, 16, 16), 4, {"2d": ((16, 16), 3), "3d_fullres": ((16, 16, 16), 2)}, folds=4,
        notes=("4 cases make 4 folds",)),
    Odd("one slice thick", (1, 40, 40), 6, {"2d": ((40, 40), 2)}, notes=("one slice",)),
    Odd("two slices thick", (2, 40, 40), 6, {"2d": ((40, 40), 2), "3d_fullres": ((2, 40, 40), 2)}),
    Odd("very thick slices", (6, 64, 64), 6, {"2d": ((64, 64), 2), "3d_fullres": ((6, 64, 64), 2)}, spacing=(12, 0.5, 0.5)),
    Odd("a label absent from most cases", (20, 20, 20), 8, {"2d": ((20, 20), 8), "3d_fullres": ((20, 20, 20), 2)},
        notes=("of 8 cases hold label_2 in 1",), paint=rare),
    Odd("sixty labels", (24, 24, 24), 5, {"2d": ((24, 24), 6), "3d_fullres": ((24, 24, 24), 2)}, paint=many),
    Odd("one voxel of foreground", (20, 20, 20), 5, {"2d": ((20, 20), 5), "3d_fullres": ((20, 20, 20), 2)}, paint=dot),
    Odd("an image smaller than the patch", (30, 30, 30), 5, {"2d": ((32, 32), 7), "3d_fullres": ((32, 32, 32), 2)},
        shapes={0: (6, 7, 5)}),
    Odd("a batch as large as the data set", (36, 50, 35), 20, {"2d": ((56, 40), 562)}, batch=28, planner="residual-m",
        notes=("2d: 562 patches a batch hold as many voxels as 100% of all cases", "--set batch_size=28")),
    Odd("pictures of 10,000 pixels", (256, 10000), 2, {"2d": ((256, 2048), 2)}, folds=2, edit=crop, mirror=(),
        notes=("2d: a patch covers 20% of the median image", "2 cases make 2 folds")),
]


def write(odd: Odd, folder: Path) -> Path:
    """The data set on disk: noise, brighter where there is a label."""
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    for case in range(odd.cases):
        rng = np.random.default_rng(case)
        label = np.zeros(odd.shapes.get(case, odd.shape), np.uint8)
        odd.paint(label, case)
        image = rng.normal(100, 10, label.shape) + 40 * (label > 0) + label
        for sub, array in (("images", image.astype(np.uint8 if odd.ending == ".png" else np.float32)), ("labels", label)):
            stored = sitk.GetImageFromArray(array)
            if odd.spacing:
                stored.SetSpacing(odd.spacing[::-1])
            sitk.WriteImage(stored, str(folder / sub / f"c{case:02d}{odd.ending}"))
    return folder


def thin(workspace: Workspace, made: Plan, keep: set[str], odd: Odd) -> None:
    """Make the networks tiny, as a hand-edited plan."""
    configurations = {}
    for name in keep:
        configuration = made.configurations[name]
        features = {"features_per_stage": FEATURES[: len(configuration.strides)]}
        changed = odd.edit(configuration) if odd.edit else features
        configurations[name] = Configuration.model_validate({**configuration.model_dump(), **changed})
    save_record(workspace.plan_path, made.model_copy(update={"configurations": configurations, "reasons": {}}))


def require_plan(odd: Odd, planned: Planned) -> None:
    """The numbers and notes of the table."""
    made = planned.plan
    for name, (patch, batch) in odd.patches.items():
        assert (made.configurations[name].patch_size, made.configurations[name].batch_size) == (patch, batch)
        assert all(step == 1 for step in made.configurations[name].strides[0])
        assert len(made.configurations[name].strides) >= 2, "a network without a second stage has no deep supervision to weigh"
    if any(word.endswith("one slice") for word in odd.notes):
        assert list(made.configurations) == ["2d"]
    assert len(planned.splits) == odd.folds
    assert sorted(case for split in planned.splits for case in split.val) == [f"c{i:02d}" for i in range(odd.cases)]
    text = "\n".join(made.notes)
    for part in odd.notes:
        assert part in text


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name.replace(" ", "-").replace(",", ""))
def test_an_odd_data_set_is_planned_trained_and_predicted(odd: Odd, tmp_path: Path) -> None:
    data, workspace = write(odd, tmp_path / "data"), Workspace(tmp_path / "work")
    planned = plan(data, workspace, planner=odd.planner, threads=0)
    require_plan(odd, planned)

    thin(workspace, planned.plan, set(odd.patches), odd)
    spec = TrainSpec(epochs=1, steps_per_epoch=2, val_steps=1, batch_size=odd.batch, precision="fp32",
                     augment=AugmentSpec(mirror=odd.mirror))
    train(workspace, folds=[0], spec=spec, options=Options(device="cpu", threads=0))
    for name in odd.patches:
        fold = workspace.fold(name, 0)
        rows = [json.loads(line) for line in (fold / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2]
        assert all(math.isfinite(row[key]) for row in rows for key in ("train_loss", "val_loss"))
        assert (fold / "validation" / "report.json").exists()

    if odd.edit:
        return  # its masks took long enough in validation
    inputs = read_inputs([data / "images" / f"c00{odd.ending}"], channels=1)
    predict(workspace, inputs, tmp_path / "masks", PredictOptions(device="cpu"))
    mask, _ = read_label(tmp_path / "masks" / f"c00{odd.ending}")
    shape = odd.shapes.get(0, odd.shape)
    assert mask.shape == (shape if len(shape) == 3 else (1, *shape))
    assert set(np.unique(mask)) <= set(planned.plan.labels.values)


def test_square_pictures_of_10000_pixels_are_planned_within_memory(tmp_path: Path) -> None:
    small = next(odd for odd in ODD if odd.name == "pictures under 16")
    planned = plan(write(small, tmp_path / "data"), Workspace(tmp_path / "work"), threads=0)
    cases = tuple(case.model_copy(update={"shape": (1, 10000, 10000), "shape_after_crop": (1, 10000, 10000)})
                  for case in planned.fingerprint.cases)
    for planner in ("default", "residual-m"):
        made = get_planner(planner)(planned.dataset, planned.fingerprint.model_copy(update={"cases": cases}), 8)
        configuration = made.configurations["2d"]
        assert list(made.configurations) == ["2d"]
        assert 512 <= min(configuration.patch_size) <= max(configuration.patch_size) <= 2048
        assert any("2d: a patch covers" in note and "overlapping tiles" in note for note in made.notes)


def test_notes_stay_away_from_ordinary_data_sets(tmp_path: Path) -> None:
    ordinary = Odd("ordinary", (32, 32, 32), 10, {})
    planned = plan(write(ordinary, tmp_path / "data"), Workspace(tmp_path / "work"), threads=0)
    assert planned.plan.notes == ()
