"""Evaluate and select on the command line: reports, comparisons, and the choice that predict uses."""

from __future__ import annotations

import json
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

NAMES = ("lungs", "heart", "spine", "nodule")
METRICS = {"dice", "iou", "sensitivity", "specificity", "precision", "hd95", "nsd", "volume_error"}


@pytest.fixture(scope="module")
def masks(cli, trained, chest, tmp_path_factory):
    """Masks of the unseen cases; not to be altered."""
    out = tmp_path_factory.mktemp("predicted") / "masks"
    cli.call("predict", trained, chest / "unseen" / "images", "--out", out).ok()
    return out


def test_evaluate_writes_the_promised_report(cli, masks, chest, tmp_path):
    path, references = tmp_path / "report.json", chest / "unseen" / "labels"
    ran = cli.call("evaluate", masks, references, "--out", path).ok()
    report = json.loads(path.read_text())
    assert [case["case"] for case in report["cases"]] == ["chest1000", "chest1001"]
    labels = {"1", "2", "3", "4"}
    assert set(report["mean"]) == labels and set(report["foreground_mean"]) >= METRICS
    dice = {}
    for case in report["cases"]:
        assert set(case["metrics"]) == labels and all(set(values) >= METRICS for values in case["metrics"].values())
        found, true = (np.asarray(nibabel.load(p / f"{case['case']}.nii.gz").dataobj) for p in (masks, references))
        for label in labels:
            a, b = found == int(label), true == int(label)
            expected = 2 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else None
            assert case["metrics"][label]["dice"] == (None if expected is None else pytest.approx(expected))
            dice.setdefault(label, []).append(expected)
    means = {label: np.mean([v for v in values if v is not None]) for label, values in dice.items()}
    assert {label: report["mean"][label]["dice"] for label in labels} == pytest.approx(means)
    assert report["foreground_mean"]["dice"] == pytest.approx(np.mean(list(means.values())))
    assert "dice" in ran.out and f"{report['mean']['1']['dice']:.4f}" in ran.out


def test_evaluating_references_against_themselves_is_perfect(cli, chest, tmp_path):
    labels = chest / "labels"
    cli.call("evaluate", labels, labels, "--out", tmp_path / "report.json").ok()
    mean = json.loads((tmp_path / "report.json").read_text())["foreground_mean"]
    assert mean["dice"] == mean["nsd"] == 1 and mean["hd95"] == mean["volume_error"] == 0


def test_evaluate_refuses_what_does_not_belong_together(cli, masks, chest, tmp_path):
    report = tmp_path / "report.json"
    cli.call("evaluate", masks, chest / "labels", "--out", report).refused("4 of 4 cases", "chest000")
    cli.call("evaluate", tmp_path / "nowhere", chest / "labels", "--out", report).refused("nowhere", "not a folder")
    other = tmp_path / "other"
    shutil.copytree(chest / "unseen" / "labels", other)
    for name in ("chest1000.nii.gz", "chest1001.nii.gz"):
        image = sitk.ReadImage(str(other / name))
        image.SetSpacing([2 * s for s in image.GetSpacing()])
        sitk.WriteImage(image, str(other / name))
    cli.call("evaluate", masks, other, "--out", report).refused("chest1000", "chest1001", "spacing")
    assert not report.exists()


def test_select_writes_its_choice_and_the_report_of_the_cross_validation(cli, trained, tmp_path):
    work = cli.copied(trained, tmp_path / "work")
    selection = json.loads((work / "selection.json").read_text())
    assert selection["runs"] == ["3d_fullres"] and selection["folds"] == [0, 1] and selection["cases"] == 2
    report = json.loads((work / "report" / "report.json").read_text())
    cases = {case for fold in json.loads((work / "splits.json").read_text())[:2] for case in fold["val"]}
    assert {case["case"] for case in report["cases"]} == cases
    assert {"cases", "mean", "foreground_mean"} <= set(report) and set(report["mean"]) == set(NAMES)
    before = (work / "selection.json").read_bytes()
    ran = cli.call("select", work).ok()
    assert "selected: 3d_fullres" in ran.out
    assert (work / "selection.json").read_bytes() == before


def test_select_compares_configurations_and_predict_uses_its_choice(cli, trained, chest, tmp_path):
    work = cli.copied(trained, tmp_path / "work")
    cli.train(work, "--config", "2d", "--folds", "0,1", epochs=1).ok()
    ran = cli.call("select", work, "--no-trust").ok()  # temperatures would differ from run to run
    assert "2d + 3d_fullres" in ran.out
    selection = json.loads((work / "selection.json").read_text())
    assert {tuple(c["runs"]) for c in selection["candidates"]} == {("2d",), ("3d_fullres",), ("2d", "3d_fullres")}
    image = chest / "unseen" / "images" / "chest1000_0000.nii.gz"
    found = {}
    for runs in (["2d"], ["3d_fullres"], ["2d", "3d_fullres"]):
        cli.edit(work / "selection.json", lambda s, runs=runs: s.update(runs=runs, postprocessing=[]))
        out = tmp_path / "+".join(runs)
        cli.call("predict", work, image, "--out", out, "--probabilities").ok()
        found["+".join(runs)] = np.asarray(nibabel.load(out / "chest1000_probabilities.nii.gz").dataobj)
    np.testing.assert_allclose(found["2d+3d_fullres"], (found["2d"] + found["3d_fullres"]) / 2, atol=1e-5)
