"""Trust: what out-of-fold predictions say about calibration, quality and usual cases, and what predict makes of it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.special import softmax

from autoseg.arrays.quality import FEATURES
from autoseg.datasets.folder import read_inputs
from autoseg.files.images import read_case
from autoseg.files.workspace import Workspace, load_record, save_record
from autoseg.stages import trust as stage
from autoseg.stages.judge import trust_path
from autoseg.stages.predict import Options, load_model, predict, predict_validation
from autoseg.stages.trust import calibrate, describe_trust
from autoseg.types.trust import Calibration, QualityModel, Spread, Trust

FOLDS = Options(folds=(0, 1), device="cpu", precision="fp32")


class Notes:
    """A reporter that remembers what it was told."""

    def __init__(self):
        self.lines = []

    def info(self, message):
        self.lines.append(message)

    warn = info

    def task(self, name, total, unit="cases"):
        from autoseg.logs import SILENT

        return SILENT.task(name, total, unit)


@pytest.fixture(scope="module")
def known(cli, trained, tmp_path_factory):
    """The trained work folder with trust.json; not to be altered."""
    work = cli.copied(trained, tmp_path_factory.mktemp("trust") / "work")
    trust_path(Workspace(work)).unlink(missing_ok=True)
    return work, calibrate(Workspace(work), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def plain(cli, trained, chest, tmp_path_factory):
    """The same work folder without trust.json, and what it predicts; not to be altered."""
    work, out = cli.copied(trained, tmp_path_factory.mktemp("plain") / "work"), tmp_path_factory.mktemp("plain") / "masks"
    trust_path(Workspace(work)).unlink(missing_ok=True)
    predict(Workspace(work), inputs(chest), out, with_options(probabilities=True))
    return work, out


def with_options(**more):
    return Options(device="cpu", precision="fp32", **more)


def inputs(chest):
    return read_inputs([chest / "unseen" / "images"], channels=1)


def rows(out):
    with (out / "summary.csv").open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def edited(cli, known, target, **changes):
    """A copy of the work folder whose trust.json is changed."""
    work = cli.copied(known[0], target)
    save_record(trust_path(Workspace(work)), known[1].model_copy(update=changes))
    return Workspace(work)


def quality(**changes):
    """An estimate that is the expected Dice."""
    names = (*FEATURES, "missing")
    weights = tuple(float(name == "expected_dice") for name in (*names, "deviation"))
    whole = {"features": names, "centres": (0.0,) * len(names), "scales": (1.0,) * len(names), "deviations": (0.0,),
             "weights": weights, "intercept": 0.0, "penalty": 1.0, "low": -1.0, "high": 0.5, "level": 0.9, "cases": 40,
             "error": 0.01, "plain_error": 0.02}
    return QualityModel(**{**whole, **changes})


def test_trust_json_tells_temperatures_cases_and_why_there_is_no_estimate(known):
    work, trust = known
    assert load_record(trust_path(Workspace(work)), Trust) == trust
    splits = Workspace(work).splits()
    assert trust.runs == ("3d_fullres",) and trust.folds == (0, 1)
    assert trust.cases == len(splits[0].val) + len(splits[1].val) == trust.training.cases
    found = trust.calibration["3d_fullres"]
    assert 0.1 <= found.temperature <= 20 and set(found.part_temperatures) == {0, 1} and found.parts == "folds"
    assert found.whole_before is not None and found.whole_after is not None
    assert 0 <= found.whole_after.ece <= 1 and sum(b.share for b in found.whole_before.reliability) == pytest.approx(1)
    assert trust.quality_mean is None and "too few cases" in trust.quality_note and "20" in trust.quality_note
    assert set(trust.networks) == {"3d_fullres/fold_0", "3d_fullres/fold_1"}
    assert any("fold" in line for line in trust.missing), "the other folds are said to be missing"
    facts, table = describe_trust(trust)
    assert trust.quality_note in facts and table[1][0] == "3d_fullres" and len(table[0]) == len(table[1])
    assert not (work / "runs" / stage.CACHE).exists()


def test_the_dice_is_that_of_the_validation(known):
    """Out-of-fold cases are predicted as validation did: the networks have not seen them."""
    work = Workspace(known[0])
    fold = 1
    case = work.splits()[fold].val[0]
    model = load_model(work, ["3d_fullres"], Options(folds=(fold,), device="cpu", precision="fp32"))
    files = next(c for c in work.dataset().cases if c.case == case)
    evidence = stage._examine(model, fold, files, 500)
    report = json.loads((work.fold("3d_fullres", fold) / "validation" / "report.json").read_text())
    expected = next(c["metrics"] for c in report["cases"] if c["case"] == case)
    for name, dice in evidence.facts.dice.items():
        assert dice == pytest.approx(expected[name]["dice"], abs=0.02), "bf16 there, fp32 here"
    (sample,) = evidence.samples
    assert len(sample.weights) == 500 and sample.logits.shape == (500, 5) and set(sample.truth) <= set(range(5))
    probable = softmax(sample.logits, 1)
    right, wrong = (np.average(probable[np.arange(500), t], weights=sample.weights) for t in (sample.truth, sample.truth[::-1]))
    assert right > 1.2 * wrong, "logits and truth are of the same voxels"


def test_what_is_known_already_is_not_made_again(cli, known, monkeypatch):
    monkeypatch.setattr(stage, "_examine", lambda *arguments: pytest.fail("predicted again"))
    before, notes = cli.states(known[0]), Notes()
    assert calibrate(Workspace(known[0]), notes, "cpu") == known[1]
    assert cli.states(known[0]) == before and any("up to date" in line for line in notes.lines)


def test_an_interrupted_calibration_goes_on_and_ends_as_if_undisturbed(cli, plain, known, tmp_path, monkeypatch):
    work = Workspace(cli.copied(plain[0], tmp_path / "work"))
    examine, seen = stage._examine, []

    def dying(model, fold, case, count):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(case.case)
        return examine(model, fold, case, count)

    monkeypatch.setattr(stage, "_examine", dying)
    with pytest.raises(KeyboardInterrupt):
        calibrate(work, device="cpu", precision="fp32")
    assert not trust_path(work).exists() and len(list((work.runs / stage.CACHE).iterdir())) == 1
    again = []
    monkeypatch.setattr(stage, "_examine", lambda m, f, case, n: again.append(case.case) or examine(m, f, case, n))
    found = calibrate(work, device="cpu", precision="fp32")
    assert not set(seen) & set(again) and len(seen) + len(again) == known[1].cases
    assert found.calibration == known[1].calibration and found.training == known[1].training


def test_torn_evidence_and_a_damaged_record_are_made_anew(cli, known, tmp_path):
    work = Workspace(cli.copied(known[0], tmp_path / "work"))
    trust_path(work).write_text('{"format": 1')
    cache = work.runs / stage.CACHE
    cache.mkdir()
    for split in work.splits():
        for case in split.val:
            (cache / f"{case}.npz").write_bytes(b"PK torn")
    assert calibrate(work, device="cpu", precision="fp32").calibration == known[1].calibration


def test_masks_are_the_same_with_trust_and_the_summary_says_more(known, plain, chest, tmp_path):
    out = tmp_path / "masks"
    predict(Workspace(known[0]), inputs(chest), out, with_options(probabilities=True, uncertainty=True))
    found, before = rows(out), rows(plain[1])
    for case, row in found.items():
        assert (out / f"{case}.nii.gz").read_bytes() == (plain[1] / f"{case}.nii.gz").read_bytes()
        assert set(row) - set(before[case]) == {"quality", "quality_low", "quality_high", "unusual", "entropy"}
        assert row["quality"] == row["quality_low"] == row["quality_high"] == "", "too few cases"
        assert 0 <= float(row["entropy"]) <= np.log2(5) and row["status"] == "done"
        temperature = known[1].calibration["3d_fullres"].temperature
        ours, raw = voxels(out / f"{case}_probabilities.nii.gz"), voxels(plain[1] / f"{case}_probabilities.nii.gz")
        sharp = np.sort(raw, -1)
        clear = sharp[..., -1] - sharp[..., -2] > 1e-4
        assert np.array_equal(ours.argmax(-1)[clear], raw.argmax(-1)[clear])
        logits = np.log(np.clip(raw, 1e-30, 1)) / temperature
        some = (raw > 1e-12).all(-1)
        np.testing.assert_allclose(ours[some], softmax(logits[some], -1), atol=1e-4)


def test_uncertainty_maps_lie_on_the_image_and_are_large_where_the_answer_is_a_tie(known, plain, chest, tmp_path):
    for work, name in ((known[0], "calibrated"), (plain[0], "plain")):
        out = tmp_path / name
        predict(Workspace(work), inputs(chest), out, with_options(probabilities=True, uncertainty=True))
        for case in inputs(chest):
            image, found = nibabel.load(case.images[0]), nibabel.load(out / f"{case.case}_uncertainty.nii.gz")
            assert found.shape == (*image.shape, 2) and found.get_data_dtype() == np.float32
            np.testing.assert_allclose(found.affine, image.affine, rtol=0, atol=1e-6)
            entropy, disagreement = np.moveaxis(np.asarray(found.dataobj), -1, 0)
            assert entropy.min() >= 0 and entropy.max() <= np.log2(5) + 1e-5
            assert disagreement.min() >= 0 and disagreement.max() > 0
            best = np.sort(voxels(out / f"{case.case}_probabilities.nii.gz"), -1)
            margin = best[..., -1] - best[..., -2]
            assert entropy[margin < 0.1].mean() > 0.8 > 0.3 > entropy[margin > 0.99].mean()


def test_asking_for_uncertainty_later_makes_only_what_is_missing(known, chest, tmp_path):
    out, work = tmp_path / "masks", Workspace(known[0])
    predict(work, inputs(chest), out, with_options())
    assert not list(out.glob("*_uncertainty.nii.gz"))
    masks = {p.name: p.read_bytes() for p in out.glob("chest*.nii.gz")}
    predict(work, inputs(chest), out, with_options(uncertainty=True))
    assert len(list(out.glob("*_uncertainty.nii.gz"))) == 2
    assert {name: (out / name).read_bytes() for name in masks} == masks
    notes = Notes()
    predict(work, inputs(chest), out, with_options(uncertainty=True), notes)
    assert any("predicted already" in line for line in notes.lines)


def test_masks_made_before_are_judged_when_there_is_trust(cli, known, plain, chest, tmp_path):
    out = tmp_path / "masks"
    shutil.copytree(plain[1], out)
    predict(Workspace(known[0]), inputs(chest), out, with_options())
    assert all(row["entropy"] for row in rows(out).values())
    before = cli.states(out)
    predict(Workspace(known[0]), inputs(chest), out, with_options())
    assert cli.states(out) == before
    predict(Workspace(plain[0]), inputs(chest), out, with_options())
    assert cli.states(out) == before, "without trust nothing is missing"


def test_estimates_come_with_intervals_for_the_mean_and_each_structure(cli, known, chest, tmp_path):
    names = ("lungs", "heart")
    work = edited(cli, known, tmp_path / "work", quality_mean=quality(), quality={name: quality() for name in names})
    predict(work, inputs(chest), tmp_path / "masks", with_options())
    for row in rows(tmp_path / "masks").values():
        assert 0 < float(row["quality_low"]) < float(row["quality"]) < float(row["quality_high"]) < 1
        for name in names:
            assert bool(row[f"quality_{name}"]) == (int(row[f"voxels_{name}"]) > 0)
    predict(work, inputs(chest), tmp_path / "plain", with_options(mirror=False))
    for row in rows(tmp_path / "plain").values():
        assert row["quality"] == row["quality_lungs"] == "", "estimates were fitted on mirrored predictions"
        assert row["entropy"]


def test_an_unusual_case_is_told_in_words(cli, known, chest, tmp_path):
    spacing = Spread(low=0.8, high=1.2, mean=0.0, deviation=0.1, cases=260, log=True, unit="mm")
    training = known[1].training.model_copy(update={"numbers": {"spacing z": spacing, "spacing y": spacing}})
    work = edited(cli, known, tmp_path / "work", training=training)
    image = nibabel.load(inputs(chest)[0].images[0])
    affine = image.affine @ np.diag([1 / image.header.get_zooms()[0], 1 / image.header.get_zooms()[1], 1, 1])
    affine[:, 2] *= 5 / np.linalg.norm(affine[:3, 2])
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[..., :8], affine), tmp_path / "thick_0000.nii.gz")
    predict(work, read_inputs([tmp_path / "thick_0000.nii.gz"], channels=1), tmp_path / "masks", with_options())
    (row,) = rows(tmp_path / "masks").values()
    assert row["unusual"] == "spacing z 5 mm is outside 0.8 to 1.2 mm of 260 training cases"


def test_trust_of_other_networks_is_not_used_and_that_is_said(cli, known, plain, chest, tmp_path):
    for number, changes in enumerate(({"networks": {"3d_fullres/fold_0": "x"}}, {"runs": ("2d",)}, {"weights": (0.5, 0.5)})):
        work, notes = edited(cli, known, tmp_path / f"work{number}", **changes), Notes()
        out = tmp_path / f"masks{number}"
        predict(work, inputs(chest), out, with_options(), notes)
        assert any("trust.json" in line and "autoseg select" in line for line in notes.lines)
        assert all("quality" not in row for row in rows(out).values())


def test_one_fold_of_the_judged_ones_is_judged_too(known, chest, tmp_path):
    predict(Workspace(known[0]), inputs(chest)[:1], tmp_path / "masks", with_options(folds=(1,)))
    assert all(row["entropy"] for row in rows(tmp_path / "masks").values())


def test_validation_is_never_judged(known, tmp_path):
    predict_validation(Workspace(known[0]), ["3d_fullres"], 0, tmp_path / "masks", device="cpu", precision="fp32")
    assert all("entropy" not in row for row in rows(tmp_path / "masks").values())


def test_a_model_in_memory_gives_the_same_labels_and_maps_when_asked(known, chest):
    work, image = Workspace(known[0]), read_case([Path(inputs(chest)[0].images[0])])
    model = load_model(work, ["3d_fullres"], FOLDS)
    one, other = model.predict_image(image), model.predict_image(image, uncertainty=True)
    assert np.array_equal(one.label_zyx, other.label_zyx) and one.uncertainty_kzyx is None
    assert other.uncertainty_kzyx is not None and other.uncertainty_kzyx.shape == (2, *image.grid.shape)
    warm = load_model(work, ["3d_fullres"], FOLDS, temperatures={"3d_fullres": 3.0}).predict_image(image, uncertainty=True)
    assert warm.uncertainty_kzyx is not None and np.array_equal(warm.label_zyx, one.label_zyx)
    assert warm.uncertainty_kzyx[0].mean() > other.uncertainty_kzyx[0].mean()
    assert warm.uncertainty_kzyx[1].mean() < other.uncertainty_kzyx[1].mean()


def test_a_calibration_has_a_positive_temperature():
    with pytest.raises(ValueError, match="temperature"):
        Calibration(temperature=0.0)
