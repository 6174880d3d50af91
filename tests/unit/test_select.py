"""Selection on small work folders whose masks are drawn by hand."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from autoseg.errors import RunError
from autoseg.files.images import read_label, write_label
from autoseg.files.workspace import Workspace, load_record, save_record
from autoseg.stages.evaluate import evaluate
from autoseg.stages.select import select
from autoseg.types.dataset import CaseFiles, Dataset, Split
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.report import Report, Selection

SHAPE = (4, 12, 12)
LABELS = Labels(foreground=(Label(name="liver", value=10), Label(name="tumour", value=20)))
CASES = ("c0", "c1", "c2", "c3")
FOLDS = (Split(train=("c2", "c3"), val=("c0", "c1")), Split(train=("c0", "c1"), val=("c2", "c3")))


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_label(path, np.asarray(array, np.uint8), Grid(shape=SHAPE, spacing=(2.0, 1.0, 1.0)))


def truth():
    array = np.zeros(SHAPE, np.uint8)
    array[:, 1:7, 1:7] = 10
    array[1:3, 2:4, 2:4] = 20
    return array


def wider(columns):
    array = truth()
    array[:, 1:7, 7:7 + columns] = 10
    return array


def speckled(value, at=(0, 11, 11)):
    array = truth()
    array[at] = value
    return array


def make_workspace(root, runs, labels=LABELS):
    """A work folder with references and, per run, fold and case, the mask that `runs[name](case)` draws."""
    workspace = Workspace(root / "work")
    for case in CASES:
        write(root / "labels" / f"{case}.nii.gz", truth())
    dataset = Dataset(
        name="toy", source="folder", root=str(root), channels=("CT",), labels=labels,
        cases=tuple(CaseFiles(case=c, images=(f"{c}.nii.gz",), label=str(root / "labels" / f"{c}.nii.gz")) for c in CASES))
    save_record(workspace.dataset_path, dataset)
    save_record(workspace.splits_path, list(FOLDS), list[Split])
    workspace.plan_path.write_text("{}")
    for name, draw in runs.items():
        for fold in range(len(FOLDS)):
            add_fold(workspace, name, fold, draw, labels)
    return workspace


def add_fold(workspace, name, fold, draw, labels=LABELS):
    folder = workspace.fold(name, fold) / "validation"
    for case in FOLDS[fold].val:
        write(folder / f"{case}.nii.gz", draw(case))
    references = {case: workspace.root.parent / "labels" / f"{case}.nii.gz" for case in FOLDS[fold].val}
    save_record(folder / "report.json", evaluate(folder, references, labels, threads=0))


@pytest.fixture
def ensembles(monkeypatch):
    """Stand in for prediction: an ensemble finds what `drawn[runs]` says; `calls` remembers what was predicted."""
    drawn, calls = {}, []

    def predict_validation(workspace, runs, fold, out, reporter=None):
        calls.append((tuple(runs), fold))
        for case in FOLDS[fold].val:
            write(out / f"{case}.nii.gz", drawn.get(tuple(runs), lambda case: np.zeros(SHAPE))(case))

    module = types.ModuleType("autoseg.stages.predict")
    module.predict_validation = predict_validation
    monkeypatch.setitem(sys.modules, "autoseg.stages.predict", module)
    return drawn, calls


def test_the_best_single_run_wins_and_is_recorded(tmp_path, ensembles):
    workspace = make_workspace(tmp_path, {"2d": lambda case: wider(3), "3d_fullres": lambda case: wider(1)})
    selection = select(workspace, threads=0)
    assert selection.runs == ("3d_fullres",) and selection.folds == (0, 1) and selection.cases == 4
    assert [c.runs for c in selection.candidates] == [("3d_fullres",), ("2d",), ("2d", "3d_fullres")]
    assert selection.candidates[0].networks == 2 and selection.candidates[2].networks == 4
    assert selection.run_folds == {"3d_fullres": (0, 1)} and not selection.missing and "optimistic" in selection.note
    assert load_record(workspace.selection_path, Selection) == selection
    report = load_record(workspace.root / "report" / "report.json", Report)
    assert [case.case for case in report.cases] == list(CASES)
    assert report.foreground_mean["dice"] == selection.foreground_mean_dice == selection.candidates[0].foreground_mean_dice


def test_the_score_is_pooled_over_all_cases_of_all_folds(tmp_path, ensembles):
    workspace = make_workspace(tmp_path, {"2d": lambda case: wider(int(case[1]))})
    liver = [2 * 136 / (272 + 24 * columns) for columns in range(4)]
    assert select(workspace).candidates[0].per_label["liver"] == pytest.approx(np.mean(liver))


def test_an_ensemble_wins_where_it_is_better_and_a_tie_goes_to_fewer_runs(tmp_path, ensembles):
    drawn, _ = ensembles
    workspace = make_workspace(tmp_path, {"2d": lambda case: wider(3), "3d_fullres": lambda case: wider(2)})
    drawn["2d", "3d_fullres"] = lambda case: wider(1)
    assert select(workspace).runs == ("2d", "3d_fullres")
    other = make_workspace(tmp_path / "other", {"2d": lambda case: wider(3), "3d_fullres": lambda case: wider(2)})
    drawn["2d", "3d_fullres"] = lambda case: wider(2)
    assert select(other).runs == ("3d_fullres",)


def test_all_pairs_and_triples_are_tried(tmp_path, ensembles):
    _, calls = ensembles
    workspace = make_workspace(tmp_path, {name: lambda case: truth() for name in "abcd"})
    assert len(select(workspace).candidates) == 4 + 6 + 4
    assert len(calls) == (6 + 4) * 2


def test_selecting_again_predicts_nothing_new_unless_a_member_was_trained_again(tmp_path, ensembles):
    drawn, calls = ensembles
    drawn["2d", "3d"] = lambda case: wider(2)
    workspace = make_workspace(tmp_path, {"2d": lambda case: wider(3), "3d": lambda case: wider(1)})
    first = select(workspace)
    assert len(calls) == 2
    assert select(workspace) == first and len(calls) == 2
    (workspace.runs / "_ensembles" / "2d+3d" / "fold_1" / "c3.nii.gz").unlink()
    assert select(workspace) == first and calls[2:] == [(("2d", "3d"), 1)]
    add_fold(workspace, "2d", 0, lambda case: wider(4))
    drawn["2d", "3d"] = lambda case: truth()
    assert select(workspace).candidates[0].runs == ("2d", "3d") and calls[3:] == [(("2d", "3d"), 0)]


def test_only_folds_finished_in_every_run_are_compared_and_the_rest_is_told(tmp_path, ensembles):
    workspace = make_workspace(tmp_path, {"2d": lambda case: wider(1)})
    add_fold(workspace, "3d", 1, lambda case: truth())
    workspace.fold("3d_lowres", 0).mkdir(parents=True)
    selection = select(workspace)
    assert selection.folds == (1,) and selection.runs == ("3d",) and selection.cases == 2
    assert "run 3d, fold 0: not finished (no validation report)" in selection.missing
    assert "run 3d_lowres has no finished fold and is not compared" in selection.missing
    assert {run for c in selection.candidates for run in c.runs} == {"2d", "3d"}


def test_a_fold_that_lacks_a_mask_is_not_finished(tmp_path, ensembles):
    workspace = make_workspace(tmp_path, {"2d": lambda case: truth()})
    (workspace.fold("2d", 0) / "validation" / "c1.nii.gz").unlink()
    selection = select(workspace)
    assert selection.folds == (1,) and selection.missing == ("run 2d, fold 0: validation lacks masks of c1",)


def test_nothing_to_compare_is_an_error_that_says_what_to_do(tmp_path, ensembles):
    workspace = make_workspace(tmp_path, {})
    with pytest.raises(RunError, match=r"nothing to select from \(there are no runs\); train first: autoseg train"):
        select(workspace)
    add_fold(workspace, "2d", 0, lambda case: truth())
    add_fold(workspace, "3d", 1, lambda case: truth())
    with pytest.raises(RunError, match=r"no fold is finished in every run \(2d has folds 0; 3d has folds 1\)"):
        select(workspace)
    assert not workspace.selection_path.exists()


def test_largest_component_of_all_foreground_is_kept_where_it_helps(tmp_path, ensembles):
    workspace = make_workspace(tmp_path, {"2d": lambda case: speckled(10)})
    selection = select(workspace)
    assert [step.options for step in selection.postprocessing] == [{"labels": [1, 2]}]
    first, *rest = selection.postprocessing_tried
    assert first.name == "all foreground" and first.kept and first.after == 1 and first.before < 1
    assert [(trial.name, trial.kept) for trial in rest] == [("liver", False), ("tumour", False)]
    assert selection.foreground_mean_dice == 1
    report = load_record(workspace.root / "report" / "report.json", Report)
    assert report.foreground_mean["dice"] == 1 and report.mean["liver"]["hd95"] == 0
    array, _ = read_label(workspace.fold("2d", 0) / "validation" / "c0.nii.gz")
    assert array[0, 11, 11] == 10


def test_a_step_for_one_label_is_kept_alone_where_it_alone_helps(tmp_path, ensembles):
    workspace = make_workspace(tmp_path, {"2d": lambda case: speckled(20, (0, 5, 5))})
    selection = select(workspace)
    assert [step.options for step in selection.postprocessing] == [{"labels": [2]}]
    everything, liver, tumour = selection.postprocessing_tried
    assert (everything.name, liver.name, tumour.name) == ("all foreground", "liver", "tumour")
    assert not everything.kept and not liver.kept and tumour.kept
    assert tumour.before == pytest.approx(16 / 17) and tumour.after == 1


def test_a_step_that_lowers_one_label_is_not_kept(tmp_path, ensembles):
    def split(case):
        array = np.zeros(SHAPE, np.uint8)
        array[:, 1:7, 1:7] = 10
        array[:, 2:6, 11] = 10
        array[1:3, 2:4, 2:4] = 20
        return array
    workspace = make_workspace(tmp_path, {"2d": split})
    for case in CASES:
        array = truth()
        array[1, 9, 9:11] = 20
        write(tmp_path / "labels" / f"{case}.nii.gz", array)

    def apart(case):
        array = split(case)
        array[1, 9, 9:11] = 20
        array[:, 2:6, 11] = 0
        array[0, 11, 0] = 10
        return array
    for fold in range(2):
        add_fold(workspace, "2d", fold, apart)
    tried = {trial.name: trial.kept for trial in select(workspace).postprocessing_tried}
    assert tried == {"all foreground": False, "liver": True, "tumour": False}


def test_overlapping_regions_are_tried_one_after_the_other(tmp_path, ensembles):
    labels = LABELS.model_copy(update={
        "regions": (Region(name="whole", values=(10, 20)), Region(name="core", values=(20,))), "region_order": (10, 20)})
    workspace = make_workspace(tmp_path, {"2d": lambda case: speckled(20)}, labels)
    selection = select(workspace)
    assert [trial.name for trial in selection.postprocessing_tried] == ["all foreground", "whole", "core"]
    assert [trial.kept for trial in selection.postprocessing_tried] == [True, False, False]
    assert set(selection.candidates[0].per_label) == {"whole", "core"}


def test_one_label_is_tried_once(tmp_path, ensembles):
    labels = Labels(foreground=(Label(name="liver", value=10),))
    array = truth()
    array[array == 20] = 10
    workspace = make_workspace(tmp_path, {}, labels)
    for case in CASES:
        write(tmp_path / "labels" / f"{case}.nii.gz", array)
    for fold in range(2):
        add_fold(workspace, "2d", fold, lambda case: np.where(np.indices(SHAPE).sum(0) == 0, 10, array), labels)
    selection = select(workspace)
    assert [trial.name for trial in selection.postprocessing_tried] == ["all foreground"]
