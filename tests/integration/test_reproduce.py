"""Reproducing a benchmark end to end on tiny stand-ins: the protocol runs, ours stands beside the published table."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image as Pictures

from autoseg.datasets.jsrt import STRUCTURES
from autoseg.errors import DatasetError
from autoseg.files.workspace import Workspace, load_record, save_record
from autoseg.stages.catalogue import find_benchmark
from autoseg.stages.plan import plan
from autoseg.stages.records import Options
from autoseg.stages.reproduce import (
    plan_deviations,
    prepare,
    reproduce,
    reproduction_facts,
    reproduction_path,
    reproduction_table,
    unions,
)
from autoseg.types.benchmark import MEAN, Reproduction
from autoseg.types.run import OptimizerSpec, TrainSpec

SHORT = TrainSpec(epochs=1, steps_per_epoch=2, val_steps=1, precision="fp32")
CPU = Options("cpu", 0)
REAL = Path(__file__).resolve().parents[2] / "../shared/data/hippocampus"


def hippocampus(root: Path, count: int = 6) -> Path:
    """A stand-in for Task04: a bright block of two labels in noise."""
    task = root / "Task04_Hippocampus"
    for folder in ("imagesTr", "labelsTr"):
        (task / folder).mkdir(parents=True)
    random = np.random.default_rng(3)
    pairs = []
    for number in range(count):
        label = np.zeros((20, 24, 20), np.uint8)
        low = random.integers(3, 7)
        label[low:low + 8, 5:12, 5:14] = 1
        label[low:low + 8, 12:19, 5:14] = 2
        image = label * 100 + random.integers(0, 60, label.shape)
        for folder, array in (("imagesTr", image.astype(np.int16)), ("labelsTr", label)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), task / folder / f"hippocampus_{number:03d}.nii.gz")
        pairs.append({key: f"./{folder}/hippocampus_{number:03d}.nii.gz"
                      for key, folder in (("image", "imagesTr"), ("label", "labelsTr"))})
    (task / "dataset.json").write_text(json.dumps({
        "name": "Hippocampus", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "numTraining": count, "training": pairs, "test": []}))
    return root


def thin(workspace: Workspace) -> None:
    """Make the planned networks tiny."""
    made = workspace.plan()
    small = {name: c.model_copy(update={"features_per_stage": (4,) + (8,) * (len(c.features_per_stage) - 1), "batch_size": 2})
             for name, c in made.configurations.items()}
    save_record(workspace.plan_path, made.model_copy(update={"configurations": small}))


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Workspace, Reproduction]:
    folder = tmp_path_factory.mktemp("reproduce")
    data, workspace = hippocampus(folder / "down"), Workspace(folder / "work")
    with pytest.raises(DatasetError, match=r"(?s)not the complete Medical .*expected 260, found 6.*--partial"):
        reproduce("hippocampus", data, workspace, SHORT)
    prepared = prepare("hippocampus", data, workspace, partial=True)
    plan(prepared.manifest, workspace)
    thin(workspace)
    return data, workspace, reproduce("Task04", data, workspace, SHORT, folds=[0, 1], partial=True, options=CPU)


def test_ours_stands_beside_the_published_rows(reproduced: tuple[Path, Workspace, Reproduction]) -> None:
    _, workspace, result = reproduced
    ours = result.ours[0]
    assert ours.method == "ours, 3d_fullres" and ours.folds == (0, 1) and ours.cases == 3
    assert set(ours.values) == {MEAN, "Anterior", "Posterior"} and all(0 <= float(v or 0) <= 1 for v in ours.values.values())
    assert "2 of 5 folds, 2 steps each on cpu in fp32" in ours.protocol
    assert load_record(reproduction_path(workspace), Reproduction) == result
    table = reproduction_table(result)
    assert table[0] == ["method", "mean", "Anterior", "Posterior", "cases", "folds", "published in"]
    assert table[1][0] == "ours, 3d_fullres" and table[1][-3:] == ["3", "2", "here"]
    assert table[-1][0].startswith("DynUNet") and table[-1][0].endswith(" *") and table[-1][1:4] == ["0.8900", "-", "-"]


def test_everything_that_was_shortened_is_stated(reproduced: tuple[Path, Workspace, Reproduction]) -> None:
    _, _, result = reproduced
    text = "\n".join(result.deviations)
    assert "data: cases: expected 260, found 6" in text
    assert "training: 1 epochs of 2 steps (2 in all), the recipe has 1000 of 250 (250,000): 8e-06 of them" in text
    assert "plan.json was there before this command" in text
    assert "ours, 3d_fullres: 2 of 5 folds (0, 1)" in text
    assert "training record: val_steps: 50 -> 1" in text and "precision" not in text
    facts = "\n".join(reproduction_facts(result))
    assert "shortened, or different from the recipe:" in facts and "(* another protocol, not to be compared)" in facts
    assert "pull request 20" in facts


def test_a_second_call_adds_a_fold_and_tells_other_settings(reproduced: tuple[Path, Workspace, Reproduction]) -> None:
    data, workspace, _ = reproduced
    other = SHORT.model_copy(update={"optimizer": OptimizerSpec(kind="adamw", lr=0.001)})
    again = reproduce("hippocampus", data, workspace, SHORT, folds=[0, 1], partial=True, options=CPU)
    assert again.ours[0].folds == (0, 1)
    more = reproduce("hippocampus", data, workspace, other, folds=[2], partial=True, options=CPU)
    assert more.ours[0].folds == (0, 1, 2)
    assert any(line.startswith("training record: optimizer.kind: sgd -> adamw") for line in more.deviations)


def test_another_planner_and_edits_of_the_plan_are_told(
    reproduced: tuple[Path, Workspace, Reproduction], tmp_path: Path,
) -> None:
    _, workspace, result = reproduced
    current = workspace.plan()
    as_made = tmp_path / "plan.json"
    save_record(as_made, current)
    assert plan_deviations(result.benchmark, current, as_made) == []
    configuration = current.configurations["3d_fullres"].model_copy(update={"batch_size": 5})
    configurations = {**current.configurations, "3d_fullres": configuration}
    edited = current.model_copy(update={"configurations": configurations, "gpu_memory_gb": 4.0})
    assert plan_deviations(result.benchmark, edited, as_made) == [
        "planned for 4 GB of GPU memory, the recipe has 8",
        "plan.json was edited: configurations.3d_fullres.batch_size: 2 -> 5",
    ]
    other = current.model_copy(update={"planner": "residual-l", "gpu_memory_gb": 24.0})
    assert plan_deviations(result.benchmark, other, as_made) == ["planner: residual-l, the recipe has default"]


def test_unions_are_measured_where_labels_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = find_benchmark("jsrt")
    reader = benchmark.reader.model_copy(update={"options": {"size": 32}})
    monkeypatch.setattr("autoseg.stages.reproduce.find_benchmark", lambda _: benchmark.model_copy(update={"reader": reader}))
    radiographs(tmp_path / "down")
    workspace = Workspace(tmp_path / "work")
    plan(prepare("jsrt", tmp_path / "down", workspace, partial=True).manifest, workspace)
    thin(workspace)
    result = reproduce("jsrt", tmp_path / "down", workspace, SHORT, partial=True, options=CPU)
    assert [sorted(split.val) for split in workspace.splits()] == [["JPCLN001", "JPCLN002"], ["JPCLN003", "JPCLN004"]]
    assert result.metric == "iou" and set(result.ours[0].values) == {MEAN, "lungs", "heart", "clavicles"}
    assert result.ours[0].folds == (0, 1) and result.ours[0].cases == 4
    assert not [line for line in result.deviations if "folds" in line]
    labels = unions(benchmark, workspace.plan().labels)
    assert dict(labels.targets) == {"lungs": (1, 4), "heart": (2,), "clavicles": (3, 4)}


def radiographs(root: Path, size: int = 32) -> None:
    random = np.random.default_rng(5)
    for number in range(1, 5):
        masks = {name: np.zeros((size, size), np.uint8) for name in STRUCTURES}
        for place, mask in enumerate(masks.values()):
            mask[4:18, 6 * place: 6 * place + 9] = 255
        image = random.integers(0, 500, (2 * size, 2 * size)) + 1000 * np.kron(masks["heart"] > 0, np.ones((2, 2), int))
        (root / "All247images").mkdir(parents=True, exist_ok=True)
        image.astype(">u2").tofile(root / "All247images" / f"JPCLN{number:03d}.IMG")
        for name, mask in masks.items():
            target = root / f"fold{1 + (number > 2)}" / "masks" / name / f"JPCLN{number:03d}.gif"
            target.parent.mkdir(parents=True, exist_ok=True)
            Pictures.fromarray(mask).save(target)


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason="the real hippocampus cases are not there")
def test_the_real_hippocampus_cases_are_recognised_as_a_part_of_the_task(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cases: expected 260, found 200"):
        prepare("msd-hippocampus", REAL, Workspace(tmp_path))
    prepared = prepare("msd-hippocampus", REAL, Workspace(tmp_path), partial=True)
    assert prepared.cases == 200 and prepared.lacks == ("cases: expected 260, found 200",)
