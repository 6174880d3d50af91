"""Two plans side by side, with the reasons of both."""

from __future__ import annotations

import json
from pathlib import Path

from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace
from autoseg.planners import default, residual
from autoseg.stages.diff import diff, diff_plans
from autoseg.types.dataset import CaseFiles, Dataset, Split
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Plan
from autoseg.types.run import OptimizerSpec, RunRecord, TrainSpec

CT = Intensities(mean=1, median=1, std=1, min=0, max=2, percentile_99_5=2, percentile_00_5=0)


def scene(size: int, spacing: float = 1.0) -> tuple[Dataset, Fingerprint]:
    """A hundred CT cubes."""
    names, shape = [f"c{i}" for i in range(100)], (size, size, size)
    labels = Labels(foreground=(Label(name="l", value=1),))
    dataset = Dataset(name="d", source="folder", root="/", channels=("CT",), labels=labels,
                      cases=tuple(CaseFiles(case=name, images=()) for name in names))
    measured = tuple(CaseFingerprint(case=name, shape=shape, shape_after_crop=shape, spacing=(spacing,) * 3,
                                     relative_size_after_crop=1.0) for name in names)
    return dataset, Fingerprint(cases=measured, intensities=(CT,), median_relative_size_after_cropping=1.0)


LARGE = scene(400)
PLAN = default.plan(*LARGE)


def rows_of(rows: list[list[str]]) -> dict[str, list[str]]:
    assert {len(row) for row in rows} == {5}
    return {row[0]: row[1:] for row in rows[1:]}


def edit(plan: Plan, name: str, **changes: object) -> Plan:
    data = json.loads(plan.model_dump_json())
    data["configurations"][name].update(changes)
    return Plan.model_validate(data)


def test_equal_plans_have_no_rows_but_the_heading() -> None:
    assert diff_plans(PLAN, PLAN, ("x", "y")) == [["value", "x", "y", "why in x", "why in y"]]


def test_values_stand_side_by_side_with_the_rules_and_the_numbers_that_differ() -> None:
    rows = rows_of(diff_plans(PLAN, default.plan(*LARGE, 16)))
    assert rows["gpu_memory_gb"][:2] == ["8", "16"]
    patch = rows["configurations.3d_fullres.patch_size"]
    assert patch[0] == "128 x 128 x 128" and "until what training keeps" in patch[2] and "allowed in millions: 560" in patch[2]
    assert patch[3].startswith("the same rule. From: ") and "allowed in millions: 1120" in patch[3]
    assert "multiples" not in patch[2] + patch[3]
    assert "configurations.3d_fullres.spacing" not in rows and not any("reasons" in path or "notes" in path for path in rows)


def test_other_rules_are_told_on_both_sides() -> None:
    rows = rows_of(diff_plans(PLAN, residual.plan(*LARGE, "residual-m")))
    blocks = rows["configurations.3d_fullres.blocks_per_stage"]
    assert "two convolutions" in blocks[2] and "residual blocks per stage" in blocks[3]
    assert "plain U-Net" in rows["configurations.3d_fullres.network.kind"][2]


def test_a_value_set_by_hand_says_so() -> None:
    row = rows_of(diff_plans(PLAN, edit(PLAN, "3d_fullres", batch_size=9)))["configurations.3d_fullres.batch_size"]
    assert row[:2] == ["2", "9"] and "memory target" in row[2] and row[3] == "set by hand (planned: 2)"


def test_a_configuration_that_only_one_has_is_told_with_the_reasons() -> None:
    rows = rows_of(diff_plans(PLAN, default.plan(*scene(100))))
    row = rows["configurations.3d_lowres"]
    assert row[:2] == ["there", "-"] and "less than a quarter" in row[2] and "at least a quarter" in row[3]
    handmade = edit(PLAN, "2d")
    wide = Plan.model_validate({**handmade.model_dump(), "configurations": {
        **handmade.model_dump()["configurations"], "wide": {"inherits_from": "2d", "batch_size": 3}}})
    assert rows_of(diff_plans(PLAN, wide)) == {"configurations.wide": ["-", "there", "set by hand", "set by hand"]}


def test_plans_without_reasons_are_compared_too() -> None:
    bare = PLAN.model_copy(update={"reasons": {}})
    row = rows_of(diff_plans(bare, edit(bare, "2d", batch_size=5)))["configurations.2d.batch_size"]
    assert row[1:] == ["5", "", ""]


def record(name: str, spec: TrainSpec) -> RunRecord:
    split = Split(train=("c0",), val=("c1",))
    return RunRecord(name=name, configuration="2d", fold=0, spec=spec, plan=PLAN, split=split, data="", device="cpu")


def test_training_records_of_runs_are_compared_by_name(tmp_path: Path) -> None:
    a, b = Workspace(tmp_path / "a"), Workspace(tmp_path / "b")
    for workspace in (a, b):
        workspace.save_plan(PLAN)
    RunFolder(a.fold("2d", 0)).save_record(record("2d", TrainSpec()))
    RunFolder(b.fold("2d", 0)).save_record(record("2d", TrainSpec(epochs=20, optimizer=OptimizerSpec(lr=0.5))))
    RunFolder(b.fold("trial", 1)).save_record(record("trial", TrainSpec()))
    heading, *rows = diff(a, b)
    assert heading[1:3] == ["a", "b"]
    assert rows == [
        ["runs/2d: epochs", "1000", "20", "", ""], ["runs/2d: optimizer.lr", "0.01", "0.5", "", ""],
        ["runs/trial", "-", "there", "", ""],
    ]
