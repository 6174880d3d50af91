"""Data sets in which not every case has every label annotated: how they say so, how they are checked, and how they are judged."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autoseg.arrays.ensembles import Targets, dice_of
from autoseg.datasets.description import annotated
from autoseg.datasets.read import read_dataset
from autoseg.errors import DatasetError
from autoseg.files.images import write_label
from autoseg.files.preprocessed import digest
from autoseg.logs import SILENT
from autoseg.stages.check import check
from autoseg.stages.contest import Contest
from autoseg.stages.diagnose import _Given, _measure
from autoseg.stages.evaluate import evaluate, evaluate_folder
from autoseg.stages.train import _Work
from autoseg.stages.trust import _sample
from autoseg.trainers.default import Job, Training
from autoseg.types.dataset import CaseFiles, Split
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.plan import Configuration
from autoseg.types.run import TrainSpec

SHAPE = (4, 8, 9)
GRID = Grid(shape=SHAPE, spacing=(2.0, 1.0, 1.0))
LABELS = Labels(foreground=(Label(name="liver", value=1), Label(name="left kidney", value=2), Label(name="spleen", value=5)))
DECLARED = {"background": 0, "liver": 1, "left kidney": 2, "spleen": 5}


def scan(values):
    array = np.zeros(SHAPE, np.uint8)
    for place, value in enumerate(values):
        array[1:3, 1 + 2 * place : 3 + 2 * place, 2:6] = value
    return array


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_label(path, array, GRID)


def folder(root, cases, images="images", labels="labels", **described):
    """A data set whose `cases` hold the given label values, with a description beside it."""
    for number, (case, values) in enumerate(cases.items()):
        suffix = "_0000" if images == "imagesTr" else ""
        write(root / images / f"{case}{suffix}.nii.gz", np.random.default_rng(number).integers(0, 9, SHAPE).astype(np.uint8))
        write(root / labels / f"{case}.nii.gz", scan(values))
    data = {"channel_names": {"0": "CT"}, "labels": DECLARED, "file_ending": ".nii.gz", "numTraining": len(cases), **described}
    (root / "dataset.json").write_text(json.dumps(data))
    return root


def labelled(dataset):
    return {case.case: case.labelled for case in dataset.cases}


@pytest.mark.parametrize("images, labels", [("images", "labels"), ("imagesTr", "labelsTr")])
def test_a_dataset_json_says_which_labels_a_case_has(tmp_path, images, labels):
    said = {"a": ["left kidney", 5], "c": "Liver"}
    root = folder(tmp_path, {"a": (2, 5), "b": (1, 2, 5), "c": (1,)}, images, labels, labelled=said)
    dataset, faults = read_dataset(root)
    assert labelled(dataset) == {"a": ("left kidney", "spleen"), "b": None, "c": ("liver",)} and not faults
    assert [f.code for f in check(dataset, faults)] == []


@pytest.mark.parametrize("cell, names", [
    ("liver;spleen", ("liver", "spleen")), ("1 5", ("liver", "spleen")), ("left kidney", ("left kidney",)),
    ("left kidney; 1", ("liver", "left kidney")), ("spleen liver", ("liver", "spleen")), ("", None),
    ("liver;left kidney;spleen", None), ("1,2,5", None),
])
def test_a_manifest_has_a_column_for_it(tmp_path, cell, names):
    root = folder(tmp_path, {"a": (1, 2, 5), "b": (1, 2, 5)})
    (root / "cases.csv").write_text(
        f'image,label,labelled,site\nimages/a.nii.gz,labels/a.nii.gz,"{cell}",x\nimages/b.nii.gz,labels/b.nii.gz,,y\n')
    dataset, faults = read_dataset(root / "cases.csv")
    assert labelled(dataset) == {"a": names, "b": None} and not faults
    assert dataset.cases[0].attributes == {"site": "x"}


def test_a_json_manifest_may_list_them(tmp_path):
    root = folder(tmp_path, {"a": (1,), "b": (1, 2, 5)})
    cases = [{"image": "images/a.nii.gz", "label": "labels/a.nii.gz", "labelled": ["liver"]},
             {"image": "images/b.nii.gz", "label": "labels/b.nii.gz"}]
    (root / "cases.json").write_text(json.dumps({"cases": cases, "labels": DECLARED}))
    assert labelled(read_dataset(root / "cases.json")[0]) == {"a": ("liver",), "b": None}


def test_names_of_regions_stand_for_their_labels():
    labels = Labels(
        foreground=(Label(name="edema", value=1), Label(name="core", value=2)), region_order=(1, 2),
        regions=(Region(name="whole tumour", values=(1, 2)), Region(name="core", values=(2,))))
    assert annotated("whole tumour", labels) is None
    assert annotated("core", labels) == ("core",)
    with pytest.raises(DatasetError, match="expected some of edema, core, found lung"):
        annotated("core;lung", labels)


@pytest.mark.parametrize("said, case, expected, found", [
    ({"a": ["lung"]}, "a", "labelled: expected some of liver, left kidney, spleen", "lung"),
    ({"a": []}, "", "labelled.a: expected names or values of labels", "[]"),
    ({"zebra": ["liver"]}, "zebra", "a case of the data set", "labelled.zebra"),
    (["a"], "", 'labelled: expected an object such as {"case": ["name"]}', "['a']"),
])
def test_what_cannot_be_understood_is_one_fault(tmp_path, said, case, expected, found):
    faults = read_dataset(folder(tmp_path, {"a": (1,), "b": (1, 2, 5)}, labelled=said))[1]
    assert [(f.code, f.severity, f.case, f.expected, f.found) for f in faults] == [
        ("invalid-description", "error", case, expected, found)]


def test_labels_are_missed_only_where_they_are_annotated(tmp_path):
    said = {"a": ["liver"], "b": ["liver"], "c": ["liver", "spleen"]}
    dataset, _ = read_dataset(folder(tmp_path, {"a": (1,), "b": (1,), "c": (1,)}, labelled=said))
    faults = check(dataset)
    assert [(f.code, f.case, f.found) for f in faults] == [
        ("absent-label", "a", "annotated in none"), ("absent-label", "c", "absent from 1 of 1 cases: c")]
    assert faults[1].expected == "label 5 (spleen) in every case in which it is annotated"


def test_a_label_that_is_there_without_being_annotated_is_a_warning(tmp_path):
    dataset, _ = read_dataset(folder(tmp_path, {"a": (1, 2), "b": (1, 2, 5)}, labelled={"a": ["liver"]}))
    (fault,) = check(dataset)
    assert (fault.code, fault.severity, fault.case) == ("unannotated-label", "warning", "a")
    assert (fault.expected, fault.found) == ("only the labels liver", "2 (left kidney)")


@pytest.fixture
def judged(tmp_path):
    """Predictions of all labels, and references of which `a` has the liver alone."""
    for case, values in (("a", (1,)), ("b", (1, 2, 5))):
        write(tmp_path / "predicted" / f"{case}.nii.gz", scan((1, 2, 5)))
        write(tmp_path / "references" / f"{case}.nii.gz", scan(values))
    cases = tuple(CaseFiles(case=case, images=(), label=str(tmp_path / "references" / f"{case}.nii.gz"),
                            labelled=("liver",) if case == "a" else None) for case in "ab")
    return tmp_path, cases


def test_a_case_is_not_judged_by_what_it_does_not_annotate(judged):
    root, cases = judged
    report = evaluate(root / "predicted", root / "references", LABELS, cases=cases)
    first, second = report.cases
    assert list(first.metrics) == ["liver", "left kidney", "spleen"]
    assert first.metrics["liver"]["dice"] == 1 and set(first.metrics["spleen"].values()) == {None}
    assert first.metrics["spleen"].keys() == second.metrics["spleen"].keys()
    assert report.foreground_mean["dice"] == 1 and report.defined["spleen"]["dice"] == 1
    assert (report.empty["spleen"].spurious, report.empty["spleen"].absent) == (0, 0)
    unaware = evaluate(root / "predicted", root / "references", LABELS)
    assert unaware.empty["spleen"].spurious == 1 and unaware.mean["spleen"]["dice"] == 0.5


def test_a_manifest_of_references_says_so_too(judged):
    root, _ = judged
    (root / "dataset.json").write_text(json.dumps({"labels": DECLARED}))
    (root / "cases.csv").write_text(
        "case,image,label,labelled\na,references/a.nii.gz,references/a.nii.gz,liver\n"
        "b,references/b.nii.gz,references/b.nii.gz,\n")
    report = evaluate_folder(root / "predicted", root / "cases.csv")
    assert report.mean["spleen"]["dice"] == 1 and report.cases[0].metrics["spleen"]["dice"] is None


def test_a_diagnosis_looks_only_at_what_is_annotated(judged):
    root, cases = judged
    pairs = tuple((c.case, root / "predicted" / f"{c.case}.nii.gz", root / "references" / f"{c.case}.nii.gz") for c in cases)
    samples, _ = _measure(_Given(pairs, LABELS, labelled={c.case: c.labelled for c in cases}), SILENT, 1)
    assert [list(sample.found.targets) for sample in samples] == [["liver"], ["liver", "left kidney", "spleen"]]


def test_selection_leaves_dice_undefined_where_a_target_is_not_annotated():
    contest = Contest(SimpleNamespace(), LABELS, {}, (), {}, ())
    targets = contest.targets(CaseFiles(case="a", images=(), labelled=("liver",)))
    truth, found = LABELS.encode(scan((1,))), LABELS.encode(scan((1, 2, 5)))
    dice = dice_of(targets.overlap(targets.confusion(truth, found)), targets.totals(truth))
    assert dice[0] == 1 and np.isnan(dice[1:]).all()
    whole, every = contest.targets(CaseFiles(case="b", images=())), Targets.of(LABELS)
    assert (whole.members == every.members).all()


class Square:
    """A square of one of two labels in a noisy image."""

    def __init__(self, number):
        self.name, self.shape, self.value = f"case{number}", (1, 16, 16), 1 + number % 2
        self.label = np.zeros(self.shape, np.int16)
        self.label[0, 4:12, 4:12] = self.value
        self.image = (self.label + np.random.default_rng(number).normal(0, 0.1, self.shape))[None].astype(np.float32)
        self.locations = {self.value: np.argwhere(self.label)}

    def read_image(self, box):
        return self.image[(slice(None), *box)]

    def read_label(self, box):
        return self.label[box]


def test_training_tells_the_loss_what_is_annotated_and_scores_nothing_else():
    configuration = Configuration(
        patch_size=(16, 16), batch_size=2, spacing=(1.0, 1.0), median_shape=(16.0, 16.0), strides=((1, 1), (2, 2)),
        kernel_sizes=((3, 3),) * 2, features_per_stage=(4, 4), blocks_per_stage=(1, 1), decoder_blocks_per_stage=(1,),
        batch_dice=True, normalization=("ZScoreNormalization",), use_mask_for_norm=(False,))
    labels = Labels(foreground=(Label(name="a", value=1), Label(name="b", value=2)))
    cases = [Square(number) for number in range(4)]
    labelled = {case.name: (case.value - 1,) for case in cases[:3]}
    spec = TrainSpec(epochs=1, steps_per_epoch=6, val_steps=2)
    job = Job(configuration, labels, 1, spec, 0, cases, cases[:1], torch.device("cpu"), "fp32", 0, labelled=labelled)
    training = Training(job)
    loss, seen = training.loss, []

    def watched(outputs, batch, progress):
        rows = [labelled.get(name, (0, 1)) for name in batch.cases]
        assert batch.labelled is not None or all(row == (0, 1) for row in rows)
        if batch.labelled is not None:
            assert batch.labelled.tolist() == [[target in row for target in range(2)] for row in rows]
        seen.append(batch.cases)
        return loss(outputs, batch, progress)

    training.loss = watched
    (epoch,) = training.run()
    assert len(seen) == 8 and set(seen[-1]) == {"case0"}
    assert epoch.pseudo_dice["a"] is not None and epoch.pseudo_dice["b"] is None


def test_the_hash_of_a_folds_data_knows_what_is_annotated_and_is_the_old_one_where_everything_is():
    def data(labelled):
        cases = tuple(CaseFiles(case=name, images=(), labelled=names) for name, names in labelled.items())
        work = SimpleNamespace(workspace=SimpleNamespace(dataset=lambda: SimpleNamespace(cases=cases)))
        work._cases = lambda record, names: [SimpleNamespace(name=name, key=f"key of {name}") for name in names]
        work._labelled = partial(_Work._labelled, work)
        record = SimpleNamespace(split=Split(train=("a",), val=("b",)), plan=SimpleNamespace(labels=LABELS))
        return _Work._data(work, record), work._labelled(record)

    whole, part, other = (data({"a": names, "b": None}) for names in (None, ("liver",), ("spleen", "left kidney")))
    assert whole == (digest(["key of a", "key of b"]), {})
    assert (part[1], other[1]) == ({"a": (0,)}, {"a": (1, 2)}) and len({whole[0], part[0], other[0]}) == 3


def test_calibration_takes_what_is_not_annotated_for_background():
    labels = Labels(foreground=(Label(name="a", value=1), Label(name="b", value=2)))
    truth = np.array([[[0, 1], [0, 2]]], np.int16)
    logits = np.random.default_rng(0).normal(size=(3, 1, 2, 2)).astype(np.float32)
    prepared = SimpleNamespace(label_zyx=truth)
    sample = _sample(SimpleNamespace(labels=labels), prepared, logits, (0,), 4, np.random.default_rng(0))
    whole = _sample(SimpleNamespace(labels=labels), prepared, logits, (0, 1), 4, np.random.default_rng(0))
    p, q = (np.exp(one.logits) / np.exp(one.logits).sum(1, keepdims=True) for one in (sample, whole))
    assert p[:, 2] == pytest.approx(0) and p[:, 0] == pytest.approx(q[:, 0] + q[:, 2], abs=1e-6)
    assert (sample.truth == np.where(whole.truth == 2, 0, whole.truth)).all()
