"""Selection on small work folders whose masks and probabilities are drawn by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from autoseg.errors import RecordError, RunError
from autoseg.files.images import read_label, write_label
from autoseg.files.workspace import Workspace, load_record, save_record
from autoseg.stages import contest, outoffold
from autoseg.stages.candidates import cost_line
from autoseg.stages.evaluate import evaluate
from autoseg.stages.select import Options, select
from autoseg.types.dataset import CaseFiles, Dataset, Split
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.report import Report
from autoseg.types.selection import Candidate, Selection

SHAPE = (4, 12, 12)
GRID = Grid(shape=SHAPE, spacing=(2.0, 1.0, 1.0))
LABELS = Labels(foreground=(Label(name="liver", value=10), Label(name="tumour", value=20)))
CASES = tuple(f"c{i:02}" for i in range(12))
FOLDS = tuple(Split(train=tuple(c for c in CASES if c not in CASES[f::3]), val=CASES[f::3]) for f in range(3))
MASKS = Options(networks=False)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_label(path, np.asarray(array, np.uint8), GRID)


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


def number(case):
    return int(case[1:])


def make_workspace(root, runs, labels=LABELS, cases=CASES, folds=FOLDS, groups=None):
    """A work folder with references, images that hold the case's number, and per run the masks that `runs[name](case)` draws."""
    workspace = Workspace(root / "work")
    for case in cases:
        write(root / "labels" / f"{case}.nii.gz", truth())
        write(root / "images" / f"{case}.nii.gz", np.full(SHAPE, number(case)))
    dataset = Dataset(
        name="toy", source="folder", root=str(root), channels=("CT",), labels=labels, cases=tuple(CaseFiles(
            case=c, images=(str(root / "images" / f"{c}.nii.gz"),), label=str(root / "labels" / f"{c}.nii.gz"),
            group=groups(c) if groups else None) for c in cases))
    save_record(workspace.dataset_path, dataset)
    save_record(workspace.splits_path, list(folds), list[Split])
    workspace.plan_path.write_text("{}")
    for name, draw in runs.items():
        for fold in range(len(folds)):
            add_fold(workspace, name, fold, draw, labels, folds)
    return workspace


def add_fold(workspace, name, fold, draw, labels=LABELS, folds=FOLDS):
    folder = workspace.fold(name, fold) / "validation"
    for case in folds[fold].val:
        write(folder / f"{case}.nii.gz", draw(case))
    references = {case: workspace.root.parent / "labels" / f"{case}.nii.gz" for case in folds[fold].val}
    save_record(folder / "report.json", evaluate(folder, references, labels, threads=0))


class FakeModel:
    """Says what `draw(case)` says: probabilities (outputs, z, y, x)."""

    def __init__(self, draw, calls, labels, mirrors):
        self.draw, self.calls, self.labels, self.mirror = draw, calls, labels, True
        self.members = [SimpleNamespace(mirror_axes=(0, 1, 2) if mirrors else ())]

    def predict_image(self, image, probabilities=False):
        case = f"c{int(image.array_czyx.max()):02}"
        p = self.draw(case)
        self.calls.append((case, self.mirror))
        label = self.labels.decode(outoffold.Targets.of(self.labels).decide(p))
        seconds = {"preprocess": 0.5, "network": 8.0 if self.mirror else 1.0, "restore": 0.5}
        dense = p.astype(np.float32) if probabilities else None
        return SimpleNamespace(label_zyx=label, probabilities_czyx=dense, seconds=seconds)


@pytest.fixture
def networks(monkeypatch):
    """Stand in for trained networks: `drawn[run](case)` gives probabilities; `calls` remembers what was predicted."""
    state = SimpleNamespace(drawn={}, calls=[], labels=LABELS, mirrors=True)

    def open_model(contest, run, fold, options):
        return FakeModel(state.drawn[run], state.calls, state.labels, state.mirrors)

    monkeypatch.setattr(outoffold, "open_model", open_model)
    monkeypatch.setattr(outoffold, "network_key", lambda contest, run, fold: f"{run}/{fold}")
    monkeypatch.setattr(contest, "finished_folds", lambda workspace, run: [0, 1, 2])
    return state


def sure(array, confidence=0.9):
    """Softmax probabilities of a label map in disk values."""
    index = LABELS.encode(array)
    p = np.full((3, *SHAPE), (1 - confidence) / 2)
    np.put_along_axis(p, index[None].astype(np.int64), confidence, 0)
    return p


def masks_of(draw):
    """The masks that probabilities lead to."""
    return lambda case: LABELS.decode(draw(case).argmax(0))


def test_a_run_that_is_better_on_folds_it_was_not_chosen_on_replaces_the_default(tmp_path):
    workspace = make_workspace(tmp_path, {"2d": lambda case: wider(1), "3d_fullres": lambda case: wider(2 + number(case) % 2)})
    selection = select(workspace, threads=0, options=MASKS)
    assert selection.runs == ("2d",) and selection.folds == (0, 1, 2) and selection.cases == 12
    decision, = selection.decisions
    assert (decision.question, decision.default, decision.best, decision.kept) == ("which run", "3d_fullres", "2d", True)
    first, second = selection.candidates
    assert (first.runs, second.runs) == (("2d",), ("3d_fullres",)) and first.networks == 3
    assert first.behind is None and first.first == 1 and first.low <= first.foreground_mean_dice <= first.high
    assert second.behind.mean == pytest.approx(first.foreground_mean_dice - second.foreground_mean_dice)
    assert second.behind.low > 0 and second.behind.p_value == pytest.approx(2 / 2**12)
    assert decision.gain.mean == pytest.approx(second.behind.mean) and 0 < decision.gain.low < decision.gain.mean
    assert selection.nested_dice == pytest.approx(first.foreground_mean_dice)
    assert selection.run_folds == {"2d": (0, 1, 2)} and not selection.missing and "not optimistic" in selection.note
    assert load_record(workspace.selection_path, Selection) == selection
    report = load_record(workspace.root / "report" / "report.json", Report)
    assert [case.case for case in report.cases] == list(CASES)
    assert report.foreground_mean["dice"] == selection.foreground_mean_dice == pytest.approx(first.foreground_mean_dice)


def test_the_default_run_stays_where_another_is_better_by_luck_only(tmp_path):
    rng = np.random.default_rng(0)
    columns = {case: rng.integers(0, 5, 2) for case in CASES}
    runs = {"2d": lambda case: wider(columns[case][0]), "3d_fullres": lambda case: wider(columns[case][1])}
    selection = select(make_workspace(tmp_path, runs), options=MASKS)
    assert selection.candidates[0].runs == ("2d",) and selection.runs == ("3d_fullres",)
    decision, = selection.decisions
    assert not decision.kept and decision.gain.naive > 0 > decision.gain.low and decision.best == "2d"
    assert selection.nested_dice == pytest.approx(selection.foreground_mean_dice)


def test_few_patients_prove_nothing(tmp_path):
    folds = tuple(Split(train=(), val=CASES[f:6:3]) for f in range(3))
    runs = {"2d": lambda case: truth(), "3d_fullres": lambda case: wider(2)}
    whole = select(make_workspace(tmp_path / "a", runs, cases=CASES[:6], folds=folds), options=MASKS)
    assert whole.runs == ("2d",) and whole.patients == 6
    pairs = select(make_workspace(tmp_path / "b", runs, cases=CASES[:6], folds=folds, groups=lambda c: f"p{number(c) % 3}"),
                   options=MASKS)
    assert pairs.runs == ("3d_fullres",) and pairs.patients == 3 and "fewer than 6 patients" in pairs.note


def test_one_fold_is_enough_and_is_said(tmp_path):
    folds = (Split(train=(), val=CASES),)
    runs = {"2d": lambda case: truth(), "3d_fullres": lambda case: wider(2)}
    selection = select(make_workspace(tmp_path, runs, folds=folds), options=MASKS)
    assert selection.runs == ("2d",) and selection.folds == (0,) and "fewer than 3 folds" in selection.note


def test_folds_that_a_run_lacks_are_named_and_left_out(tmp_path):
    workspace = make_workspace(tmp_path, {"2d": lambda case: truth()})
    for fold in (1, 2):
        add_fold(workspace, "3d", fold, lambda case: wider(1))
    (workspace.fold("3d_lowres", 0) / "validation").mkdir(parents=True)
    selection = select(workspace, options=MASKS)
    assert selection.folds == (1, 2) and selection.cases == 8
    assert selection.missing == ("run 3d, fold 0: not finished (no validation report)",
                                 "run 3d_lowres has no finished fold and is not compared")
    assert selection.candidates[0].networks == 3 and selection.candidates[1].networks == 2


def test_a_fold_without_a_mask_or_without_networks_is_not_finished(tmp_path, networks):
    networks.drawn["2d"] = lambda case: sure(truth())
    workspace = make_workspace(tmp_path, {"2d": lambda case: truth()})
    (workspace.fold("2d", 0) / "validation" / "c03.nii.gz").unlink()
    selection = select(workspace, options=MASKS)
    assert selection.folds == (1, 2) and selection.missing == ("run 2d, fold 0: validation lacks masks of c03",)
    contest.finished_folds = lambda workspace, run: [0, 1]
    selection = select(workspace)
    assert selection.folds == (1,) and selection.missing[1] == "run 2d, fold 2: its trained weights are not there"


def test_nothing_to_compare_is_an_error_that_says_what_to_do(tmp_path):
    workspace = make_workspace(tmp_path, {})
    with pytest.raises(RunError, match=r"nothing to select from \(there are no runs\); train first: autoseg train"):
        select(workspace, options=MASKS)
    add_fold(workspace, "2d", 0, lambda case: truth())
    add_fold(workspace, "3d", 1, lambda case: truth())
    with pytest.raises(RunError, match=r"no fold is finished in every run \(2d has folds 0; 3d has folds 1\)"):
        select(workspace, options=MASKS)
    assert not workspace.selection_path.exists()


def half_wrong(run):
    """Two runs, each unsurely wrong in one half of the slices, where the other one is surely right."""
    def draw(case):
        right, wrong = sure(truth(), 0.95), sure(wider(3 + number(case) % 2), 0.6)
        return np.where((np.arange(4) < 2)[:, None, None] == (run == "2d"), wrong, right)
    return draw


def test_an_ensemble_that_is_better_is_built_with_weights_and_measured(tmp_path, networks):
    networks.drawn = {run: half_wrong(run) for run in ("2d", "3d_fullres")}
    workspace = make_workspace(tmp_path, {run: masks_of(draw) for run, draw in networks.drawn.items()})
    selection = select(workspace)
    assert selection.runs == ("2d", "3d_fullres") and selection.run_weights == (0.5, 0.5)
    assert [d.question for d in selection.decisions] == ["which run", "one run or an ensemble"]
    assert selection.decisions[1].kept and selection.decisions[1].best == "2d + 3d_fullres"
    assert selection.foreground_mean_dice == 1 and selection.nested_dice == pytest.approx(1)
    array, _ = read_label(workspace.runs / "_ensembles" / "selected" / "c07.nii.gz")
    np.testing.assert_array_equal(array, truth())
    assert not (workspace.runs / "_ensembles" / "probabilities").exists()
    assert selection.candidates[0].networks == 6 and selection.candidates[0].seconds == pytest.approx(2 * (3 * 8 + 1), abs=0.5)


def test_two_cases_are_compared_although_nothing_can_be_proved(tmp_path, networks):
    folds = tuple(Split(train=(), val=(case,)) for case in CASES[:2])
    networks.drawn = {run: half_wrong(run) for run in ("2d", "3d_fullres")}
    runs = {run: masks_of(draw) for run, draw in networks.drawn.items()}
    selection = select(make_workspace(tmp_path, runs, cases=CASES[:2], folds=folds))
    assert selection.runs == ("3d_fullres",) and not selection.postprocessing
    assert ("2d", "3d_fullres") in {c.runs for c in selection.candidates}


def test_a_surer_run_gets_more_weight(tmp_path, networks):
    rows = np.arange(SHAPE[1])[:, None]

    def draw(run):
        def one(case):
            wrong = wider(3 + number(case) % 2)
            if run == "a":
                p = np.where(rows == 5, sure(truth(), 0.6), sure(truth(), 0.995))
                return np.where(rows % 3 == 0, sure(wrong, 0.6), p)
            p = np.where(rows == 5, sure(wrong, 0.7), sure(wrong, 0.9))
            return np.where(rows % 3 == 0, sure(truth(), 0.99), p)
        return one

    networks.drawn = {"a": draw("a"), "b": draw("b")}
    workspace = make_workspace(tmp_path, {run: masks_of(one) for run, one in networks.drawn.items()})
    selection = select(workspace)
    assert selection.runs == ("a", "b") and selection.weights == (2, 1) and selection.foreground_mean_dice == 1
    assert selection.candidates[0].title == "a x 2 + b"


def test_cost_stands_beside_dice_with_and_without_mirroring(tmp_path, networks):
    networks.drawn = {"2d": lambda case: sure(wider(1))}
    workspace = make_workspace(tmp_path, {"2d": lambda case: wider(1)})
    candidate, = select(workspace).candidates
    assert candidate.plain_seconds == pytest.approx(2, abs=0.3) and candidate.fold_seconds == pytest.approx(9, abs=0.3)
    assert candidate.plain_dice == pytest.approx(candidate.foreground_mean_dice)
    assert {mirror for _, mirror in networks.calls} == {True, False}
    line = cost_line(Candidate(runs=("2d",), foreground_mean_dice=0.912, per_label={}, networks=5, seconds=246, fold_seconds=50,
                               plain_dice=0.907, plain_seconds=25))
    assert line == ("one fold, no mirroring: 0.907 at 25 s; one fold: 0.912 at 50 s; "
                    "5 folds: not less than about 0.912, at about 246 s")
    assert cost_line(Candidate(runs=("2d",), foreground_mean_dice=0.9, per_label={}, networks=1)) == "1 network per image"


def test_a_second_call_does_nothing_and_a_new_training_is_seen(tmp_path, networks):
    networks.drawn = {"2d": lambda case: sure(truth())}
    workspace = make_workspace(tmp_path, {"2d": lambda case: truth()})
    first = select(workspace)
    calls = len(networks.calls)
    assert calls == 24 and select(workspace) == first and len(networks.calls) == calls
    select(workspace, options=Options(crf=True))
    assert len(networks.calls) == 2 * calls
    add_fold(workspace, "2d", 0, lambda case: wider(1))
    assert select(workspace).inputs != first.inputs and len(networks.calls) == 3 * calls


def test_what_was_predicted_before_an_interruption_is_not_predicted_again(tmp_path, networks):
    networks.mirrors = False

    def stop(case):
        if case == "c05":
            raise KeyboardInterrupt
        return sure(truth())

    networks.drawn = {"2d": stop}
    workspace = make_workspace(tmp_path, {"2d": lambda case: truth()})
    with pytest.raises(KeyboardInterrupt):
        select(workspace)
    done = [case for case, _ in networks.calls]
    assert not workspace.selection_path.exists() and done == [*CASES[::3], *CASES[1::3], "c02"]
    networks.drawn["2d"] = lambda case: sure(truth())
    candidate, = select(workspace).candidates
    assert [case for case, _ in networks.calls] == [*done, "c05", "c08", "c11"] and candidate.plain_dice is None


def test_a_case_that_does_not_fit_into_memory_is_named(tmp_path, networks):
    def full(case):
        raise MemoryError

    networks.drawn = {"2d": full}
    workspace = make_workspace(tmp_path, {"2d": lambda case: truth()})
    with pytest.raises(RunError, match="case c00, run 2d: out of memory; compare masks only with --masks-only"):
        select(workspace)


def test_a_step_that_gains_for_sure_stays_and_the_selected_masks_have_it(tmp_path):
    def draw(case):
        array = truth()
        array[0, 11, 8:11] = 10
        return array

    workspace = make_workspace(tmp_path, {"2d": draw})
    selection = select(workspace, options=MASKS)
    kept = [trial for trial in selection.postprocessing_tried if trial.kept]
    assert len(kept) == len(selection.postprocessing) == 1 and kept[0].step == selection.postprocessing[0]
    assert kept[0].gain.low > 0 and kept[0].seconds > 0
    assert selection.foreground_mean_dice == 1 and selection.nested_dice == pytest.approx(1)
    report = load_record(workspace.root / "report" / "report.json", Report)
    assert report.foreground_mean["dice"] == 1 and report.mean["liver"]["hd95"] == 0
    array, _ = read_label(workspace.fold("2d", 0) / "validation" / "c00.nii.gz")
    assert array[0, 11, 9] == 10
    names = {trial.name for trial in selection.postprocessing_tried}
    assert {"liver: largest component", "tumour: holes filled", "all foreground: largest component"} <= names
    assert not any("above" in name or "field" in name for name in names)


def test_a_step_that_helps_one_label_only_is_kept_for_that_label(tmp_path):
    def draw(case):
        array = speckled(20, (0, 5, 5))
        array[3, 1, 9] = 10 if number(case) % 2 else 0
        return array

    selection = select(make_workspace(tmp_path, {"2d": draw}), options=MASKS)
    assert {tuple(step.options["labels"]) for step in selection.postprocessing} >= {(2,)}
    tumour = next(t for t in selection.postprocessing_tried if t.kept and t.name.startswith("tumour"))
    assert tumour.before == pytest.approx(16 / 17) and tumour.after == 1


def test_a_step_that_helps_in_a_few_cases_is_dropped_with_its_gain(tmp_path):
    runs = {"2d": lambda case: speckled(10) if number(case) < 3 else truth()}
    selection = select(make_workspace(tmp_path, runs), options=MASKS)
    assert not selection.postprocessing
    trial = next(t for t in selection.postprocessing_tried if t.name == "liver: largest component")
    assert not trial.kept and trial.gain.naive > 0 and trial.gain.low <= 0 and trial.after > trial.before


def hesitant(case):
    """Liver is found with too little confidence: 0.35 in a column that belongs to it."""
    p = sure(truth())
    column = np.zeros(SHAPE, bool)
    column[:, 1:7, 6] = True
    p[:, column] = np.array([0.6, 0.35, 0.05])[:, None]
    return p


def test_a_threshold_that_helps_is_found_kept_and_applied(tmp_path, networks):
    networks.drawn = {"2d": hesitant}
    workspace = make_workspace(tmp_path, {"2d": masks_of(hesitant)})
    selection = select(workspace)
    assert [step.kind for step in selection.postprocessing] == ["threshold"]
    assert selection.postprocessing[0].options["values"] in ([0.5, 0.2, 0.5], [0.5, 0.3, 0.5])
    assert selection.foreground_mean_dice == 1
    array, _ = read_label(workspace.runs / "_ensembles" / "selected" / "c04.nii.gz")
    np.testing.assert_array_equal(array, truth())


def test_the_random_field_is_tried_on_request(tmp_path, networks):
    networks.drawn = {"2d": lambda case: sure(truth())}
    workspace = make_workspace(tmp_path, {"2d": lambda case: truth()})
    tried = {trial.step.kind for trial in select(workspace, options=Options(crf=True)).postprocessing_tried}
    assert "crf" in tried and "threshold" in tried


def test_overlapping_regions_are_selected_and_thresholded_by_output(tmp_path, networks):
    labels = LABELS.model_copy(update={
        "regions": (Region(name="whole", values=(10, 20)), Region(name="core", values=(20,))), "region_order": (10, 20)})

    def draw(case):
        p = np.stack([truth() > 0, truth() == 20]) * 0.8 + 0.1
        p[0, :, 1:7, 6] = 0.35
        return p

    def mask(case):
        array = truth()
        array[:, 1:7, 6] = 0
        return array

    networks.drawn, networks.labels = {"2d": draw}, labels
    workspace = make_workspace(tmp_path, {"2d": mask}, labels)
    selection = select(workspace)
    assert set(selection.candidates[0].per_label) == {"whole", "core"}
    step, = selection.postprocessing
    assert step.kind == "threshold" and step.options["regions"] == [1, 2] and step.options["values"][0] < 0.35
    assert selection.foreground_mean_dice == 1


def test_a_selection_of_before_still_loads_and_is_made_anew(tmp_path):
    workspace = make_workspace(tmp_path, {"2d": lambda case: truth()})
    workspace.selection_path.write_text(
        '{"format": 1, "runs": ["2d"], "postprocessing": [{"kind": "largest_component", "options": {"labels": [1]}}], '
        '"folds": [0], "run_folds": {"2d": [0]}, "cases": 4, "foreground_mean_dice": 0.9, "candidates": [{"runs": ["2d"], '
        '"foreground_mean_dice": 0.9, "per_label": {"liver": 0.9}, "networks": 1, "cost": "1 network"}], '
        '"postprocessing_tried": [{"step": {"kind": "largest_component", "options": {"labels": [1]}}, "name": "liver", '
        '"before": 0.8, "after": 0.9, "kept": true}], "missing": [], "note": ""}')
    old = load_record(workspace.selection_path, Selection)
    assert old.run_weights == (1.0,) and old.postprocessing[0].kind == "largest_component"
    assert select(workspace, options=MASKS).cases == 12
    workspace.selection_path.write_text('{"runs": ["2d"], "weights": [1, 2], "folds": [0], "cases": 1}')
    with pytest.raises(RecordError, match=r"weights needs one positive number for each of 1 runs, found \[1.0, 2.0\]"):
        load_record(workspace.selection_path, Selection)
    assert select(workspace, options=MASKS).cases == 12
