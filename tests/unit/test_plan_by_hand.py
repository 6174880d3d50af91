"""Plans on disk, edited by hand: the schema beside them, partial entries, and what planning again keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoseg.errors import PlanError, RecordError
from autoseg.files.workspace import Workspace
from autoseg.planners import default
from autoseg.stages.plan import plan as run_plan
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Plan

MR = Intensities(mean=1, median=1, std=1, min=0, max=2, percentile_99_5=2, percentile_00_5=0)
WIDE = {"inherits_from": "3d_fullres", "batch_size": 5}


def made(size: int = 400) -> Plan:
    names, shape = [f"c{i}" for i in range(60)], (size, size, size)
    labels = Labels(foreground=(Label(name="l", value=1),))
    dataset = Dataset(name="d", source="folder", root="/", channels=("MR",), labels=labels,
                      cases=tuple(CaseFiles(case=name, images=()) for name in names))
    cases = tuple(CaseFingerprint(case=name, shape=shape, shape_after_crop=shape, spacing=(1.0, 1.0, 1.0),
                                  relative_size_after_crop=1.0) for name in names)
    return default.plan(dataset, Fingerprint(cases=cases, intensities=(MR,), median_relative_size_after_cropping=1.0))


def edit(work: Workspace, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(work.plan_path.read_text())
    change(data)
    work.plan_path.write_text(json.dumps(data))


def entries(work: Workspace) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(work.plan_path.read_text())["configurations"]
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small volumes with a ball in them."""
    import SimpleITK as sitk

    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    inside = np.linalg.norm(np.indices((20, 24, 24)).reshape(3, -1).T - 11, axis=1).reshape(20, 24, 24) < 6
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for case in range(4):
        image = (rng.normal(size=inside.shape) + inside * 4).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(image), folder / "images" / f"c{case}.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(inside.astype(np.uint8)), folder / "labels" / f"c{case}.nii.gz")
    return folder


def test_a_saved_plan_names_its_schema_first_and_its_reasons_last(tmp_path: Path) -> None:
    work, plan = Workspace(tmp_path), made()
    work.save_plan(plan)
    data = json.loads(work.plan_path.read_text())
    assert next(iter(data)) == "$schema" and data["$schema"] == "plan.schema.json" and list(data)[-1] == "reasons"
    schema = json.loads((tmp_path / "plan.schema.json").read_text())
    assert set(data) <= set(schema["properties"])
    assert work.plan() == plan
    text = work.plan_path.read_text().splitlines()
    assert '"patch_size": [128, 128, 128],' in [line.strip() for line in text]
    inside = sum(path.startswith("configurations.") for path in plan.reasons)
    assert sum(line.startswith('  "configurations.') for line in text) == inside  # each reason in one line
    work.save_plan(plan.model_copy(update={"reasons": {}}))
    assert not work.plan().reasons


def test_an_entry_that_inherits_stays_as_it_is_written(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    work.save_plan(made())
    edit(work, lambda data: data["configurations"].update(wide=WIDE, wider={"inherits_from": "wide"}))
    plan = work.plan()
    assert plan.configurations["wider"].batch_size == 5 and plan.configurations["wider"].patch_size == (128, 128, 128)
    work.save_plan(plan)
    assert (entries(work)["wide"], entries(work)["wider"]) == (WIDE, {"inherits_from": "wide"})
    assert work.plan() == plan
    assert "patch_size" in entries(work)["3d_cascade_fullres"]  # written by the planner, in full


def test_an_entry_that_no_longer_means_the_same_is_written_out(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    work.save_plan(made())
    edit(work, lambda data: data["configurations"].update(wide=WIDE))
    plan = work.plan()
    other = plan.configurations["wide"].model_copy(update={"batch_size": 6})
    work.save_plan(plan.model_copy(update={"configurations": {**plan.configurations, "wide": other}}))
    assert entries(work)["wide"]["batch_size"] == 6 and "patch_size" in entries(work)["wide"]


def test_a_partial_entry_follows_its_parent(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    work.save_plan(made())
    edit(work, lambda data: (data["configurations"].update(wide=WIDE),
                             data["configurations"]["3d_fullres"].update(patch_size=[96, 96, 160])))
    assert work.plan().configurations["wide"].patch_size == (96, 96, 160)
    edit(work, lambda data: data["configurations"]["wide"].update(patch_size=[100, 96, 96]))
    with pytest.raises(RecordError, match=r"wide: patch_size\[0\] is 100, .* multiple of 32; nearest legal values: 96 and 128"):
        work.plan()


def test_planning_again_keeps_what_a_person_made_and_renews_what_the_planner_made(images: Path, tmp_path: Path) -> None:
    work = Workspace(tmp_path / "work")
    first = run_plan(images, work).plan
    whole = {**entries(work)["2d"], "batch_size": 3}
    edit(work, lambda data: (data["configurations"].update(wide=WIDE, flat=whole),
                             data["configurations"]["2d"].update(batch_size=11)))
    again = run_plan(images, work, replan=True, gpu_memory_gb=4)
    plan = again.plan
    assert plan == work.plan() and plan.configurations["2d"].batch_size == first.configurations["2d"].batch_size
    assert plan.configurations["wide"].batch_size == 5 and entries(work)["wide"] == WIDE and entries(work)["flat"] == whole
    assert "configurations.wide: made by hand, kept" in again.changes
    assert any(change.startswith("configurations.2d.batch_size: 11 -> ") for change in again.changes)
    assert any(change.startswith("gpu_memory_gb: 8.0 -> 4.0") for change in again.changes)
    assert not any("reasons" in change for change in again.changes)
    kept = run_plan(images, work).plan
    assert kept == plan and entries(work)["wide"] == WIDE


def test_a_configuration_by_hand_under_a_planners_name_is_kept_where_the_planner_makes_none(images: Path, tmp_path: Path) -> None:
    work = Workspace(tmp_path / "work")
    run_plan(images, work)
    assert "3d_lowres" not in entries(work)
    edit(work, lambda data: data["configurations"].update({"3d_lowres": WIDE}))
    assert run_plan(images, work, replan=True).plan.configurations["3d_lowres"].batch_size == 5


def test_a_configuration_by_hand_that_the_new_plan_cannot_hold_is_named(images: Path, tmp_path: Path) -> None:
    work = Workspace(tmp_path / "work")
    run_plan(images, work)
    two = {"normalization": ["CTNormalization"] * 2, "use_mask_for_norm": [False] * 2}

    def two_channels(data: dict[str, Any]) -> None:
        data["channels"] = ["a", "b"]
        data["configurations"]["other"] = dict(data["configurations"]["2d"])
        for entry in data["configurations"].values():
            entry.update(two)

    edit(work, two_channels)
    before = work.plan_path.read_bytes()
    with pytest.raises(PlanError, match=r"(?s)made by hand \(other\) that do not go with the new plan.*other\.normalization"):
        run_plan(images, work, replan=True)
    assert work.plan_path.read_bytes() == before


def test_in_a_plan_without_reasons_what_no_planner_calls_so_was_made_by_hand(images: Path, tmp_path: Path) -> None:
    work = Workspace(tmp_path / "work")
    run_plan(images, work)
    edit(work, lambda data: (data.pop("reasons"), data["configurations"].update({"wide": WIDE, "3d_lowres": WIDE})))
    kept = run_plan(images, work, replan=True).plan.configurations
    assert "wide" in kept and "3d_lowres" not in kept


def test_what_a_person_made_outlives_a_plan_that_is_invalid_elsewhere(images: Path, tmp_path: Path) -> None:
    work = Workspace(tmp_path / "work")
    run_plan(images, work)
    edit(work, lambda data: (data["configurations"].update(wide=WIDE), data["configurations"]["2d"].update(patch_size=[33, 32])))
    again = run_plan(images, work, replan=True)
    assert again.plan.configurations["wide"].batch_size == 5 and "configurations.wide: made by hand, kept" in again.changes


@pytest.mark.parametrize(("name", "entry", "message"), [
    ("../../x", {"inherits_from": "2d"}, "names a folder"),
    (".hidden", {"inherits_from": "2d"}, "names a folder"),
    ("third", {"inherits_from": "2d", "previous_stage": "second"}, "a cascade has two stages"),
    ("self", {"inherits_from": "2d", "previous_stage": "self"}, "a cascade has two stages"),
])
def test_names_that_are_paths_and_cascades_of_three_stages_are_refused(
    images: Path, tmp_path: Path, name: str, entry: dict[str, Any], message: str,
) -> None:
    work = Workspace(tmp_path / "work")
    run_plan(images, work)
    second = {"inherits_from": "2d", "previous_stage": "2d"}
    edit(work, lambda data: data["configurations"].update({"second": second, name: entry}))
    with pytest.raises(RecordError, match=message):
        work.plan()


def test_a_damaged_plan_has_no_entries_as_written(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    assert work.written_configurations() == {}
    for content in ("{", "[]", '{"configurations": 3}'):
        work.plan_path.write_text(content)
        assert work.written_configurations() == {}
