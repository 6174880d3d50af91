"""Data sets on the command line: check, plan, preprocess, and what happens when data or records change."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import signal
from pathlib import Path

import nibabel
import numpy as np
import pytest

KEYS = {"code", "severity", "case", "file", "expected", "found", "fix"}
RECORDS = {"dataset.json", "fingerprint.json", "plan.json", "plan.schema.json", "splits.json"}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A folder with every kind of fault planted at once, as the unit tests of the check plant them, and what must be listed."""
    path = Path(__file__).parents[1] / "unit" / "test_check.py"
    spec = importlib.util.spec_from_file_location("planted_faults", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = module.Folder(tmp_path_factory.mktemp("faulty") / "data")
    folder.describe()
    return folder.root, module.plant(folder)


def write_pair(folder, case, image_xyz, label_xyz, spacing=(1.0, 1.0, 1.0)):
    """An image and its label as plain NIfTI files."""
    affine = np.diag([*spacing, 1.0])
    for side, array in (("images", image_xyz), ("labels", label_xyz)):
        (folder / side).mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / side / f"{case}.nii.gz")


def test_one_check_lists_every_planted_fault_as_json(cli, faulty):
    root, planted = faulty
    before = cli.states(root)
    ran = cli.spawn("check", root, "--json")
    faults = json.loads(ran.out)
    assert ran.code == 2 and "Traceback" not in ran.err
    assert all(set(fault) == KEYS and all(isinstance(value, str) for value in fault.values()) for fault in faults)
    assert {(fault["code"], fault["case"]) for fault in faults} == planted
    assert len({fault["code"] for fault in faults if fault["severity"] == "error"}) >= 15
    assert all(fault["file"] and fault["expected"] and fault["found"] and fault["fix"] for fault in faults)
    assert cli.states(root) == before


def test_check_without_json_shows_the_same_faults_as_text(cli, faulty):
    root, planted = faulty
    ran = cli.call("check", root)
    assert ran.code == 2
    for code, case in planted:
        assert f" {code}: case {case}," in ran.out
    assert "to do:" in ran.out and "error(s)" in ran.out


def test_plan_lists_the_same_errors_and_writes_nothing(cli, faulty, tmp_path):
    root, _ = faulty
    errors = [fault for fault in json.loads(cli.call("check", root, "--json").out) if fault["severity"] == "error"]
    ran = cli.call("plan", root, "--out", tmp_path / "work").refused(f"{len(errors)} error(s); nothing was written")
    for fault in errors:
        assert fault["code"] in ran.err and fault["file"] in ran.err and fault["found"] in ran.err
    assert not (tmp_path / "work").exists()


def test_a_clean_data_set_passes_the_check_and_nothing_is_written(cli, chest):
    before = cli.states(chest)
    ran = cli.call("check", chest, "--json").ok()
    assert all(fault["severity"] == "warning" for fault in json.loads(ran.out))
    assert "4 cases, 1 channel(s), 4 label(s): 0 error(s)" in cli.call("check", chest).ok().out
    assert cli.states(chest) == before


def test_what_is_no_data_set_is_refused_with_the_accepted_forms(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("nothing")
    for path in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "notes.txt"):
        for command in (("check", path), ("plan", path, "--out", tmp_path / "work")):
            cli.call(*command).refused(str(path), "images/", "manifest")
    assert not (tmp_path / "work").exists()


def test_the_only_case_is_trained_and_validated_on_and_the_plan_says_so(cli, tmp_path):
    image = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    write_pair(tmp_path / "data", "only", image, (image > 0).astype(np.uint8))
    assert "there is one case" in cli.call("plan", tmp_path / "data", "--out", tmp_path / "work").ok().out
    assert json.loads((tmp_path / "work" / "splits.json").read_text()) == [{"train": ["only"], "val": ["only"]}]


def test_plan_leaves_four_records_that_a_person_can_read(cli, planned, chest):
    assert {p.name for p in planned.iterdir() if p.is_file()} == RECORDS
    plan = json.loads((planned / "plan.json").read_text())
    assert plan["orientation"] == "LPS" and sorted(plan["transpose_forward"]) == [0, 1, 2]
    for entry in plan["configurations"].values():
        assert {"patch_size", "batch_size", "spacing", "strides", "kernel_sizes", "features_per_stage", "batch_dice",
                "normalization", "use_mask_for_norm", "next_stage", "previous_stage", "inherits_from"} <= set(entry)
    splits = json.loads((planned / "splits.json").read_text())
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (chest / "labels").iterdir())
    assert sorted(case for split in splits for case in split["val"]) == cases
    for split in splits:
        assert set(split) == {"train", "val"} and sorted(split["train"] + split["val"]) == cases


def test_records_are_written_with_short_lists_on_one_line(cli, chest, tmp_path):
    cli.call("plan", chest, "--out", tmp_path / "work").ok()
    lines = (tmp_path / "work" / "plan.json").read_text().splitlines()
    assert any('"patch_size": [' in line and "]" in line for line in lines) and len(lines) < 250


def test_planning_again_changes_no_record(cli, chest, tmp_path):
    work = tmp_path / "work"
    cli.call("plan", chest, "--out", work).ok()
    first = {name: (work / name).read_bytes() for name in RECORDS}
    cli.call("plan", chest, "--out", work).ok()
    assert {name: (work / name).read_bytes() for name in RECORDS} == first


def test_an_edited_plan_stays_until_replanning_which_prints_the_difference(cli, chest, tmp_path):
    work = tmp_path / "work"
    cli.call("plan", chest, "--out", work).ok()
    made = (work / "plan.json").read_bytes()
    cli.edit(work / "plan.json", lambda plan: plan["configurations"]["3d_fullres"].update(batch_size=7))
    cli.call("plan", chest, "--out", work).ok()
    assert json.loads((work / "plan.json").read_text())["configurations"]["3d_fullres"]["batch_size"] == 7
    cli.call("plan", chest, "--out", work, "--gpu-memory", 3).refused("plan.json", "--replan")
    ran = cli.call("plan", chest, "--out", work, "--replan").ok()
    assert "changed: configurations.3d_fullres.batch_size: 7 -> " in ran.out
    assert (work / "plan.json").read_bytes() == made


def test_an_unknown_planner_is_refused_with_the_list_of_planners(cli, chest, tmp_path):
    cli.call("plan", chest, "--out", tmp_path / "work", "--planner", "nonsense").refused("nonsense", "default")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("spoil", "parts"), [
    (lambda p: p["configurations"]["3d_fullres"].update(patch_size=[17, 20, 24]),
     ("configurations.3d_fullres", "patch_size[0] is 17", "16 and 20")),
    (lambda p: p["configurations"]["2d"].update(batch_size=0), ("configurations.2d.batch_size", "found 0")),
    (lambda p: p["configurations"]["2d"].update(typo=1), ("configurations.2d.typo",)),
    (lambda p: p["configurations"]["2d"].update(normalization=["Magic"]),
     ("configurations.2d.normalization", "Magic", "CTNormalization")),
    (lambda p: p["configurations"]["2d"].update(spacing=[0, 1]), ("configurations.2d.spacing", "positive")),
    (lambda p: p["configurations"]["2d"].update(inherits_from="nobody"), ("inherits_from", "nobody")),
    (lambda p: p.update(orientation="XYZ"), ("orientation", "XYZ")),
    (lambda p: p.update(transpose_forward=[0, 0, 1]), ("transpose_forward", "permutation")),
    (lambda p: p.pop("labels"), ("labels",)),
])
def test_a_wrong_value_in_the_plan_is_refused_with_its_exact_place(cli, planned, tmp_path, spoil, parts):
    work = cli.copied(planned, tmp_path / "work")
    cli.edit(work / "plan.json", spoil)
    for command in ("preprocess", "train"):
        cli.call(command, work).refused(str(work / "plan.json"), *parts)
    assert not (work / "runs").exists()


def test_a_plan_that_is_no_json_is_refused(cli, planned, tmp_path):
    work = cli.copied(planned, tmp_path / "work")
    (work / "plan.json").write_text("{not json")
    cli.call("train", work).refused(str(work / "plan.json"), "not valid JSON")


def test_commands_on_a_folder_that_is_no_work_folder_say_how_to_make_one(cli, chest, tmp_path):
    for missing in (tmp_path / "nowhere", chest):
        for command in (("preprocess", missing), ("train", missing), ("select", missing),
                        ("predict", missing, chest / "unseen" / "images", "--out", tmp_path / "masks")):
            cli.call(*command).refused(str(missing), "plan.json", "autoseg plan")
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "masks").exists()


def test_a_patient_on_both_sides_of_a_fold_is_refused(cli, chest, tmp_path):
    rows = [("image", "label", "group")]
    for i in range(4):
        rows.append((chest / f"images/chest{i:03d}_0000.nii.gz", chest / f"labels/chest{i:03d}.nii.gz", f"patient{i // 2}"))
    manifest = tmp_path / "data.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    work = tmp_path / "work"
    ran = cli.call("plan", manifest, "--out", work).ok()
    assert "2 folds" in ran.out and "2 groups from manifest kept together" in ran.out
    splits = json.loads((work / "splits.json").read_text())
    assert [sorted(s["val"]) for s in splits] in ([["chest000", "chest001"], ["chest002", "chest003"]],
                                                  [["chest002", "chest003"], ["chest000", "chest001"]])
    (work / "splits.json").write_text(json.dumps([{"train": ["chest000", "chest002"], "val": ["chest001", "chest003"]}]))
    for command in (("train", work), ("plan", manifest, "--out", work)):
        cli.call(*command).refused("patient0 is in train and in val", "chest000, chest001", "splits")
    assert not (work / "runs").exists()
    assert "4 folds" in cli.call("plan", manifest, "--out", tmp_path / "other", "--groups", "none").ok().out


@pytest.mark.parametrize(("splits", "part"), [
    ([{"train": ["chest000"], "val": ["chest000"]}], "chest000 in train and in val"),
    ([{"train": ["chest000", "nobody"], "val": ["chest001"]}], "nobody"),
    ([{"train": [], "val": ["chest001"]}], "train is empty"),
    ([], "no fold"),
    ([{"train": ["chest000"]}], "val"),
    ({"train": ["chest000"]}, "list"),
])
def test_a_spoiled_splits_file_is_refused(cli, planned, tmp_path, splits, part):
    work = cli.copied(planned, tmp_path / "work")
    (work / "splits.json").write_text(json.dumps(splits))
    cli.call("train", work).refused("splits", part)
    assert not (work / "runs").exists()


def test_splits_that_come_with_the_data_are_used(cli, chest, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(chest, data, ignore=shutil.ignore_patterns("unseen"))
    given = [{"train": ["chest000", "chest001", "chest002"], "val": ["chest003"]}]
    (data / "splits_final.json").write_text(json.dumps(given))
    cli.call("plan", data, "--out", tmp_path / "work").ok()
    assert json.loads((tmp_path / "work" / "splits.json").read_text()) == given


@pytest.fixture
def growing(cli, tmp_path):
    """A data set of three cases that may grow, planned, made thin and preprocessed."""
    from autoseg.datasets.phantom import write_dataset

    data, work = tmp_path / "data", tmp_path / "work"
    write_dataset(data, "chest", 3, 0, cli.SEED, size=cli.SIZE)
    cli.call("plan", data, "--out", work).ok()
    cli.thin(work, keep=["3d_fullres"])
    cli.call("preprocess", work).ok()
    return data, work


def changed_cases(before, after):
    """Names of the preprocessed cases whose files are other files now."""
    return {Path(name).parts[1] for name in after if before.get(name) != after[name]}


def test_a_new_case_joins_the_folds_and_only_it_is_preprocessed(cli, growing):
    from autoseg.datasets.phantom import write_dataset

    data, work = growing
    plan, splits = (work / "plan.json").read_bytes(), json.loads((work / "splits.json").read_text())
    before = cli.states(work / "preprocessed")
    write_dataset(data, "chest", 4, 0, cli.SEED, size=cli.SIZE)
    cli.call("plan", data, "--out", work).ok()
    assert (work / "plan.json").read_bytes() == plan
    grown = json.loads((work / "splits.json").read_text())
    assert len(grown) == len(splits)
    for old, new in zip(splits, grown, strict=True):
        assert set(old["train"]) <= set(new["train"]) and set(old["val"]) <= set(new["val"])
        assert set(new["train"]) | set(new["val"]) == {f"chest{i:03d}" for i in range(4)}
    assert sum("chest003" in split["val"] for split in grown) == 1
    assert [case["case"] for case in json.loads((work / "dataset.json").read_text())["cases"]][-1] == "chest003"
    cli.call("preprocess", work).ok()
    after = cli.states(work / "preprocessed")
    assert changed_cases(before, after) == {"chest003"} and set(before) < set(after)
    cli.call("preprocess", work).ok()
    assert cli.states(work / "preprocessed") == after


def test_an_edited_label_redoes_only_its_case(cli, growing):
    data, work = growing
    before = cli.states(work / "preprocessed")
    path = data / "labels" / "chest001.nii.gz"
    image = nibabel.load(path)
    label = np.asarray(image.dataobj).copy()
    label[label == 2] = 1
    nibabel.save(nibabel.Nifti1Image(label, image.affine, image.header), path)
    cli.call("plan", data, "--out", work).ok()
    cli.call("preprocess", work).ok()
    after = cli.states(work / "preprocessed")
    assert changed_cases(before, after) == {"chest001"}
    assert changed_cases(after, before) == {"chest001"}


def test_a_touched_file_redoes_nothing(cli, growing):
    data, work = growing
    before = cli.states(work / "preprocessed")
    (data / "images" / "chest000_0000.nii.gz").touch()
    cli.call("preprocess", work).ok()
    assert cli.states(work / "preprocessed") == before


def test_a_removed_case_leaves_folds_and_store_unless_a_fold_would_be_empty(cli, growing):
    data, work = growing
    before = cli.states(work / "preprocessed")
    (work / "splits.json").write_text(json.dumps([{"train": ["chest000"], "val": ["chest001", "chest002"]},
                                                  {"train": ["chest001", "chest002"], "val": ["chest000"]}]))
    for side, name in (("images", "chest002_0000"), ("labels", "chest002")):
        (data / side / f"{name}.nii.gz").unlink()
    cli.call("plan", data, "--out", work).ok()
    assert json.loads((work / "splits.json").read_text()) == [{"train": ["chest000"], "val": ["chest001"]},
                                                              {"train": ["chest001"], "val": ["chest000"]}]
    cli.call("preprocess", work).ok()
    assert cli.states(work / "preprocessed") == {name: state for name, state in before.items() if "chest002" not in name}
    splits = [{"train": ["chest000"], "val": ["chest001"]}, {"train": ["chest000", "chest001"], "val": ["chest002"]}]
    (work / "splits.json").write_text(json.dumps(splits))
    cli.call("plan", data, "--out", work).refused("fold 1: val is empty", "splits")
    assert json.loads((work / "splits.json").read_text()) == splits


def test_only_plan_values_that_preprocessing_reads_redo_cases(cli, growing):
    _, work = growing
    before = cli.states(work / "preprocessed")
    cli.edit(work / "plan.json", lambda plan: plan["configurations"]["3d_fullres"].update(batch_size=3, batch_dice=True))
    cli.call("preprocess", work).ok()
    assert cli.states(work / "preprocessed") == before
    cli.edit(work / "plan.json", lambda plan: plan["configurations"]["3d_fullres"].update(spacing=[12.0, 12.0, 12.0]))
    cli.call("preprocess", work).ok()
    assert changed_cases(before, cli.states(work / "preprocessed")) == {"chest000", "chest001", "chest002"}


def test_a_data_set_with_other_labels_does_not_suit_an_existing_plan(cli, growing):
    data, work = growing
    before = {name: (work / name).read_bytes() for name in RECORDS}
    cli.edit(data / "dataset.json", lambda d: d["labels"].update(lungs=1, heart=2, spine=3, nodule=4, liver=5))
    cli.call("plan", data, "--out", work).refused("other labels", "--replan")
    assert {name: (work / name).read_bytes() for name in RECORDS} == before


def test_an_unknown_configuration_is_refused_with_those_there_are(cli, planned):
    for command in ("preprocess", "train"):
        cli.call(command, planned, "--config", "4d").refused("4d", "3d_fullres")


def test_a_case_that_vanished_after_planning_is_named_and_the_others_are_preprocessed(cli, growing):
    data, work = growing
    shutil.rmtree(work / "preprocessed")
    (data / "images" / "chest001_0000.nii.gz").write_bytes(b"spoiled")
    cli.call("preprocess", work).refused("chest001")
    assert {p.name for p in (work / "preprocessed" / "3d_fullres").iterdir()} == {"chest000", "chest002"}


DIE = """
import os, signal
flush = os.fsync
def dying(handle):
    if {name!r} in os.readlink(f"/proc/self/fd/{{handle}}"):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(handle)
os.fsync = dying
"""


@pytest.mark.parametrize("name", ["fingerprint", "splits", "plan"])
def test_a_planning_killed_while_writing_a_record_is_simply_done_again(cli, chest, tmp_path, name):
    work, whole = tmp_path / "work", tmp_path / "whole"
    assert cli.spawn("plan", chest, "--out", work, before=DIE.format(name=f"/.{name}-")).code == -signal.SIGKILL
    assert not (work / "plan.json").exists()
    for command in (("train", work), ("preprocess", work)):
        cli.call(*command).refused("plan.json")
    cli.call("plan", chest, "--out", work).ok()
    cli.call("plan", chest, "--out", whole).ok()
    assert {n: (work / n).read_bytes() for n in RECORDS} == {n: (whole / n).read_bytes() for n in RECORDS}


def test_a_killed_preprocessing_goes_on_where_it_was(cli, planned, tmp_path):
    work = cli.copied(planned, tmp_path / "work")
    shutil.rmtree(work / "preprocessed")
    ran = cli.spawn("preprocess", work, "--threads", "1", before=DIE.format(name="/.chest002-"))
    assert ran.code == -signal.SIGKILL
    before = {name: state for name, state in cli.states(work / "preprocessed").items() if "/." not in name}
    assert changed_cases({}, before) == {"chest000", "chest001"}
    cli.call("preprocess", work).ok()
    after = cli.states(work / "preprocessed")
    assert {name: after[name] for name in before} == before
    for path in sorted((planned / "preprocessed").rglob("*.b2nd")):
        assert (work / "preprocessed" / path.relative_to(planned / "preprocessed")).read_bytes() == path.read_bytes()


def test_paths_with_spaces_and_unusual_letters_are_fine(cli, chest, tmp_path):
    data, work = tmp_path / "Größe [bold] x", tmp_path / "my work"
    for side, suffix in (("images", "_0000"), ("labels", "")):
        (data / side).mkdir(parents=True)
        for number, name in enumerate(("fall eins", "[red]zwei", "drei,3")):
            shutil.copy(chest / side / f"chest{number:03d}{suffix}.nii.gz", data / side / f"{name}{suffix}.nii.gz")
    ran = cli.call("plan", data, "--out", work).ok()
    assert f"next: autoseg train '{work}'" in ran.out and "Größe [bold] x" in ran.out
    cli.call("preprocess", work).ok()
    names = {"fall eins", "[red]zwei", "drei,3"}
    assert {case["case"] for case in json.loads((work / "dataset.json").read_text())["cases"]} == names
    (data / "labels" / "fall eins.nii.gz").unlink()
    cli.call("plan", data, "--out", work).refused("case fall eins, ", "missing-partner")
