"""The stage that keeps preprocessed cases up to date."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.errors import DatasetError, PlanError
from autoseg.files.preprocessed import open_case
from autoseg.files.workspace import Workspace, save_record
from autoseg.stages.fingerprint import fingerprint
from autoseg.stages.preprocess import data_folder, preprocess
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.fingerprint import Intensities
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan

LABELS = Labels(foreground=(Label(name="organ", value=3), Label(name="lesion", value=7)), ignore=Label(name="ignore", value=9))
STATISTICS = Intensities(mean=0, median=0, std=1, min=-1, max=1, percentile_99_5=1, percentile_00_5=-1)
NAMES = ("p1", "p2", "p3")


def configuration(*spacing: float, scheme: str = "ZScoreNormalization", **fields: Any) -> Configuration:
    """A small configuration."""
    dims = len(spacing)
    return Configuration(
        patch_size=(8,) * dims, batch_size=2, spacing=spacing, median_shape=(8.0,) * dims, strides=((1,) * dims, (2,) * dims),
        kernel_sizes=((3,) * dims,) * 2, features_per_stage=(4, 8), blocks_per_stage=(1, 1), decoder_blocks_per_stage=(1,),
        batch_dice=False, normalization=(scheme,), use_mask_for_norm=(False,), **fields,
    )


def write_volume(root: Path, name: str, seed: int) -> CaseFiles:
    """Files of one case."""
    rng = np.random.default_rng(seed)
    image, label = root / f"{name}.nii.gz", root / f"{name}_label.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(rng.uniform(1, 2, (8, 9, 10)).astype(np.float32)), str(image))
    sitk.WriteImage(sitk.GetImageFromArray(rng.choice([0, 3, 7, 9], (8, 9, 10)).astype(np.uint8)), str(label))
    return CaseFiles(case=name, images=(str(image),), label=str(label))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A work folder with three cases and four configurations, two of which share their data."""
    made = Workspace(tmp_path / "work")
    cases = tuple(write_volume(tmp_path, name, seed) for seed, name in enumerate(NAMES))
    dataset = Dataset(name="d", source="folder", root=str(tmp_path), channels=("mri",), labels=LABELS, cases=cases)
    save_record(made.dataset_path, dataset)
    save_record(made.fingerprint_path, fingerprint(dataset))
    save_plan(made, {
        "2d": configuration(1, 1), "3d_fullres": configuration(1, 1, 1), "3d_lowres": configuration(2, 2, 2),
        "3d_cascade_fullres": configuration(1, 1, 1, previous_stage="3d_lowres"),
    })
    return made


def save_plan(workspace: Workspace, configurations: dict[str, Configuration], **fields: Any) -> None:
    """Write plan.json."""
    values: dict[str, Any] = {"transpose_forward": (0, 1, 2), "intensities": (STATISTICS,), **fields}
    save_record(workspace.plan_path, Plan(dataset_name="d", planner="default", gpu_memory_gb=8, channels=("mri",), labels=LABELS,
                                          configurations=configurations, **values))


def times(workspace: Workspace, name: str) -> dict[str, int]:
    """When each stored case was made."""
    folder = data_folder(workspace, workspace.plan(), name)
    return {path.name: (path / "case.json").stat().st_mtime_ns for path in sorted(folder.iterdir())}


def test_every_configuration_gets_its_cases_and_a_cascade_shares_them(workspace: Workspace) -> None:
    preprocess(workspace)
    plan = workspace.plan()
    assert sorted(path.name for path in workspace.preprocessed.iterdir()) == ["2d", "3d_fullres", "3d_lowres"]
    assert data_folder(workspace, plan, "3d_cascade_fullres") == data_folder(workspace, plan, "3d_fullres")
    for name, shape in (("3d_fullres", (8, 9, 10)), ("3d_lowres", (4, 4, 5)), ("2d", (8, 9, 10))):
        case = open_case(data_folder(workspace, plan, name) / "p2")
        assert case.shape == shape
        assert set(np.unique(case.read_label())) <= {0, 1, 2, 3}
        assert set(case.locations) == {0, 1, 2}
        assert abs(case.read_image().mean()) < 0.1


def test_a_second_time_does_nothing_even_for_files_that_were_only_touched(workspace: Workspace) -> None:
    preprocess(workspace, threads=2)
    before = times(workspace, "3d_fullres")
    preprocess(workspace)
    os.utime(workspace.dataset().cases[0].images[0], (1, 1))
    preprocess(workspace)
    assert times(workspace, "3d_fullres") == before


def test_only_what_an_edit_concerns_is_redone(workspace: Workspace, tmp_path: Path) -> None:
    preprocess(workspace, ["3d_fullres", "3d_lowres"])
    full, low = times(workspace, "3d_fullres"), times(workspace, "3d_lowres")
    write_volume(tmp_path, "p2", 99)
    preprocess(workspace, ["3d_fullres", "3d_lowres"])
    after = times(workspace, "3d_fullres")
    assert {name for name in NAMES if after[name] != full[name]} == {"p2"}
    plan = workspace.plan()
    save_plan(workspace, {**plan.configurations, "3d_lowres": configuration(3, 3, 3)})
    preprocess(workspace, ["3d_fullres", "3d_lowres"])
    assert times(workspace, "3d_fullres") == after
    assert all(time != low[name] for name, time in times(workspace, "3d_lowres").items())


def test_plan_values_that_preprocessing_does_not_read_change_nothing(workspace: Workspace) -> None:
    preprocess(workspace, ["3d_fullres"])
    before = times(workspace, "3d_fullres")
    one = configuration(1, 1, 1).model_copy(update={"batch_size": 5, "patch_size": (16, 16, 16)})
    save_plan(workspace, {"3d_fullres": one}, intensities=(STATISTICS.model_copy(update={"mean": 5.0}),))
    preprocess(workspace)
    assert times(workspace, "3d_fullres") == before
    save_plan(workspace, {"3d_fullres": one}, transpose_forward=(2, 0, 1))
    preprocess(workspace)
    assert all(time != before[name] for name, time in times(workspace, "3d_fullres").items())


def test_cases_join_and_leave_with_the_data_set(workspace: Workspace, tmp_path: Path) -> None:
    preprocess(workspace, ["3d_fullres"])
    before = times(workspace, "3d_fullres")
    dataset = workspace.dataset()
    cases = (*dataset.cases[1:], write_volume(tmp_path, "p9", 9))
    save_record(workspace.dataset_path, dataset.model_copy(update={"cases": cases}))
    preprocess(workspace, ["3d_fullres"])
    after = times(workspace, "3d_fullres")
    assert sorted(after) == ["p2", "p3", "p9"]
    assert (after["p2"], after["p3"]) == (before["p2"], before["p3"])


def test_a_damaged_stored_case_is_made_again(workspace: Workspace) -> None:
    preprocess(workspace, ["3d_fullres"])
    folder = data_folder(workspace, workspace.plan(), "3d_fullres") / "p1"
    (folder / "image.b2nd").write_bytes(b"")
    preprocess(workspace, ["3d_fullres"])
    assert open_case(folder).read_image().shape == (1, 8, 9, 10)


def test_all_failures_are_listed_after_the_rest_is_done(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "p1.nii.gz").write_bytes(b"damaged")
    (tmp_path / "p3_label.nii.gz").unlink()
    with pytest.raises(DatasetError) as caught:
        preprocess(workspace, ["3d_fullres"], threads=2)
    text = str(caught.value)
    assert "2 of 3 cases could not be preprocessed" in text
    assert "p1 (" in text
    assert "p3 (" in text
    assert open_case(data_folder(workspace, workspace.plan(), "3d_fullres") / "p2").shape == (8, 9, 10)


def test_an_unknown_configuration_is_refused_with_what_there_is(workspace: Workspace) -> None:
    with pytest.raises(PlanError, match=r"no configuration '3d'; it has 2d, 3d_fullres"):
        preprocess(workspace, ["3d"])
