"""The plan told in words: complete, readable, and honest about what was set by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autoseg.files.workspace import Workspace, save_record
from autoseg.planners import default, residual
from autoseg.stages.explain import edited, explain, explain_plan, overview_rows, shown, stage_rows
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Plan

CT = Intensities(mean=99.3, median=101, std=37.1, min=-1000, max=2000, percentile_99_5=210.5, percentile_00_5=-20.25)
SHAPE, SPACING = (432, 512, 512), (1.0, 0.767, 0.767)
DATASET = Dataset(
    name="Livers", source="folder", root="/", channels=("CT",),
    cases=tuple(CaseFiles(case=f"c{i}", images=()) for i in range(131)),
    labels=Labels(foreground=(Label(name="liver", value=1), Label(name="tumour", value=2))),
)
FINGERPRINT = Fingerprint(
    cases=tuple(CaseFingerprint(case=case.case, shape=SHAPE, shape_after_crop=SHAPE, spacing=SPACING,
                                relative_size_after_crop=1.0) for case in DATASET.cases),
    intensities=(CT,), median_relative_size_after_cropping=1.0,
)
PLAN = default.plan(DATASET, FINGERPRINT)


def changed(place: list[str], value: Any) -> Plan:
    """The plan with one value edited, as a person would in the file."""
    data = json.loads(PLAN.model_dump_json())
    inside = data
    for part in place[:-1]:
        inside = inside[part]
    inside[place[-1]] = value
    return Plan.model_validate(data)


def test_all_of_a_plan_is_told() -> None:
    text = explain_plan(PLAN, DATASET, FINGERPRINT)
    for title in ("THE DATA", "WHAT IS TRAINED", "FOR ALL CONFIGURATIONS", *(f"CONFIGURATION {n}" for n in PLAN.configurations)):
        assert title in text.splitlines()
    for words in ("Cases: 131", "2 (liver, tumour)", "432 x 512 x 512 voxels of 1 x 0.767 x 0.767 mm", "1 x 0.767 x 0.767 mm",
                  "128 x 128 x 128 voxels (128 x 98 x 98 mm), 1.9% of the median image", "2 patches per training step",
                  "mean 99.3, standard deviation 37.1, 0.5 and 99.5 percentiles -20.25 and 210.5", "GB predicted",
                  "memory allows: 2; data allow: 354", "first patch: 215 x 280 x 280; steps: 13"):
        assert " ".join(words.split()) in " ".join(text.split()), words
    assert "by hand" not in text.lower() and "no reason was recorded" not in text
    table = [row for row in text.splitlines() if "Why" not in row]
    assert max(map(len, table)) <= 118


def test_a_rule_is_told_once_and_then_referred_to() -> None:
    text = " ".join(explain_plan(PLAN).split())
    assert text.count("feature maps at full size, twice as many at each further stage, at most 320 in 3D") == 1
    assert "Why: as for 2d." in text and "Why: as for 3d_fullres." in text


def test_a_configuration_that_inherits_tells_only_what_is_its_own() -> None:
    text = explain_plan(PLAN)
    own = text[text.index("CONFIGURATION 3d_cascade_fullres"):]
    assert "Input from: 3d_lowres" in own and "Inherits from: 3d_fullres" in own and "Patch:" not in own


def test_without_data_a_plan_can_be_told_too() -> None:
    text = explain_plan(PLAN)
    assert "Cases:" not in text and "Labels: 2 (liver, tumour)" in text


@pytest.mark.parametrize(("place", "value", "words"), [
    (["configurations", "3d_fullres", "batch_size"], 7, "Batch: 7 patches per training step Set by hand (planned: 2)."),
    (["configurations", "3d_cascade_fullres", "batch_size"], 7, "Batch: 7 patches per training step Set by hand (planned: 2)."),
    (["configurations", "2d", "mirror_axes"], [1], "Mirroring: along x only Set by hand (planned: none)."),
    (["configurations", "2d", "checkpointing"], 3, "Recomputing: 3 finest stages"),
    (["orientation"], "as_stored", "Orientation: as stored Set by hand (planned: LPS)."),
    (["orientation"], "RAS", "Orientation: turned to one orientation (head, front, right) Set by hand (planned: LPS)."),
])
def test_a_value_set_by_hand_is_told_with_the_planned_one(place: list[str], value: Any, words: str) -> None:
    plan = changed(place, value)
    text = " ".join(explain_plan(plan).split())
    assert words in text
    assert f"SET BY HAND SINCE PLANNING {'.'.join(place)}: {shown(value)} (planned:" in text
    assert list(edited(plan)) == [".".join(place)]


def test_configurations_added_and_removed_by_hand_are_told() -> None:
    data = json.loads(PLAN.model_dump_json())
    del data["configurations"]["2d"]
    data["configurations"]["wide"] = {"inherits_from": "3d_fullres", "patch_size": [128, 160, 160]}
    plan = Plan.model_validate(data)
    text = " ".join(explain_plan(plan).split())
    assert "2d: removed by hand" in text and "wide: made by hand" in text
    assert "CONFIGURATION wide Inherits from: 3d_fullres Set by hand. Patch: 128 x 160 x 160 voxels (128 x 123 x 123 mm)" in text
    assert edited(plan) == {"configurations.2d": (True, False)}


def test_a_plan_without_reasons_says_how_to_get_them() -> None:
    text = explain_plan(PLAN.model_copy(update={"reasons": {}}))
    assert "no reason was recorded for it; autoseg plan --replan" in " ".join(text.split())
    assert "by hand" not in text.lower()


def test_a_time_budget_asked_for_later_is_no_edit() -> None:
    plan = PLAN.model_copy(update={"time_budget_s": 6 * 3600.0})
    assert not edited(plan)
    assert "Time budget: 6 hours for all folds Why: it was asked for." in " ".join(explain_plan(plan).split())


def test_the_table_of_stages_is_that_of_the_network() -> None:
    rows = stage_rows(residual.plan(DATASET, FINGERPRINT, "residual-m").configurations["3d_fullres"])
    assert rows[0][5] == "residual blocks down" and rows[1] == ["1", "128x128x128", "1x1x1", "3x3x3", "32", "1", "1"]
    assert rows[-1] == ["6", "4x4x4", "2x2x2", "3x3x3", "320", "6", "-"]


def test_the_overview_has_a_row_for_each_configuration() -> None:
    rows = overview_rows(PLAN)
    assert [row[0] for row in rows[1:]] == list(PLAN.configurations) and {len(row) for row in rows} == {7}


@pytest.mark.parametrize(("value", "text"), [
    (True, "yes"), (None, "none"), (0.123456789, "0.123457"), ([1, 2, 3], "1 x 2 x 3"), ([1, 2, 3, 4], "1, 2, 3, 4"),
    ([], "none"), ([[1, 2], [2, 2]], "1 x 2, 2 x 2"), (["a", "b"], "a, b"), ({"a": 1, "b": [1, 2]}, "a: 1; b: 1 x 2"),
    ([True, False], "yes, no"),
])
def test_values_are_shown_plainly(value: Any, text: str) -> None:
    assert shown(value) == text


def test_a_work_folder_is_explained_from_its_files_without_torch(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.save_plan(PLAN)
    assert explain(workspace) == explain_plan(PLAN)
    save_record(workspace.dataset_path, DATASET)
    save_record(workspace.fingerprint_path, FINGERPRINT)
    assert explain(workspace) == explain_plan(PLAN, DATASET, FINGERPRINT)
    code = (
        "import sys\nfrom autoseg.files.workspace import Workspace\nimport autoseg\n"
        "from autoseg.stages.explain import explain_plan\nfrom autoseg.stages.summary import describe_plan\n"
        f"work = Workspace({str(tmp_path)!r})\ndataset, fingerprint = work.dataset(), work.fingerprint()\n"
        "made = autoseg.plan(dataset, fingerprint)\ndescribe_plan(dataset, fingerprint, made, [])\n"
        "assert explain_plan(made, dataset, fingerprint) and made == work.plan()\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
