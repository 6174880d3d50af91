"""Planted causes are named and others are not; what a diagnosis of a work folder or of two folders holds."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from autoseg.errors import DatasetError, RunError
from autoseg.files.images import write_label
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace, load_record, save_record
from autoseg.stages.curve_rules import curve_findings
from autoseg.stages.diagnose import describe_diagnosis, diagnose, diagnose_masks, judge
from autoseg.stages.remedies import Context, advise, given_settings
from autoseg.stages.settings import apply_settings
from autoseg.trainers.losses import make_loss
from autoseg.types.dataset import CaseFiles, Dataset, Split
from autoseg.types.diagnosis import SYMPTOMS, Diagnosis, Finding
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, LabelFingerprint
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan
from autoseg.types.run import AugmentSpec, LossSpec, RunRecord, SamplerSpec, TrainSpec

SCENES = Path(__file__).resolve().parents[1] / "benchmarks" / "diagnosis.py"
HIPPOCAMPUS = Path(__file__).resolve().parents[3] / "shared" / "data" / "hippocampus"
CASES, SIZE = 20, 0.5

spec = importlib.util.spec_from_file_location("diagnosis_scenes", SCENES)
scenes = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = scenes
spec.loader.exec_module(scenes)


@pytest.fixture(scope="module")
def truths():
    return [scenes.chest_truth(index, SIZE) for index in range(CASES)]


@pytest.fixture(scope="module")
def healthy(truths):
    return scenes.healthy_samples(truths, 0)


@pytest.fixture(scope="module")
def real():
    truths = scenes.hippocampus_truths(HIPPOCAMPUS, range(40, 40 + CASES))
    return truths, scenes.healthy_samples(truths, 0, scenes.HIPPOCAMPUS, ())


@pytest.mark.parametrize("planted", scenes.PLANTED, ids=lambda planted: planted.name)
def test_a_planted_cause_is_named_and_no_other(planted, truths, healthy):
    assert scenes.named(scenes.planted_samples(planted, truths, healthy, 0)) == set(planted.expected)


@pytest.mark.parametrize("name", scenes.CURVES)
@pytest.mark.parametrize("seed", [0, 1])
def test_curves_are_named_for_what_they_are(name, seed):
    kind, expected = scenes.CURVES[name]
    assert scenes.named_by_curves(kind, seed) == set(expected)


@pytest.mark.real_data
@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus data is not here")
@pytest.mark.parametrize("planted", [p for p in scenes.PLANTED if not p.chest_only], ids=lambda planted: planted.name)
def test_a_planted_cause_is_named_on_real_labels(planted, real):
    samples = scenes.planted_samples(planted, *real, 0, scenes.HIPPOCAMPUS, ())
    assert scenes.named(samples) == set(planted.expected)


def test_every_symptom_is_planted():
    planted = {s for p in scenes.PLANTED for s in p.expected} | {s for _, expected in scenes.CURVES.values() for s in expected}
    assert planted == set(SYMPTOMS)


def planted(change, truths, healthy, count=CASES, site=lambda index: "A"):
    samples = scenes.planted_samples(scenes.Planted("", (), change), truths[:count], healthy[:count], 0)
    return [replace(sample, groups={"site": site(index)}) for index, sample in enumerate(samples)]


def test_two_cases_are_too_few_to_tell(truths, healthy):
    findings, untold = judge(planted(scenes.eroded, truths, healthy, 2))
    assert findings == [] and any("heart: too few cases" in line for line in untold)
    assert any(line.startswith("outlier cases: 0 cases") for line in untold)


def test_folds_of_one_case_are_not_compared(truths, healthy):
    _, untold = judge(planted(scenes.healthy, truths, healthy, 5))
    assert any(line.startswith("whether a fold is worse") and "of 5" in line for line in untold)


def test_a_fold_that_is_a_site_is_named_as_both(truths, healthy):
    def site(index):
        return "B" if index % scenes.FOLDS == 2 else "A"
    found = {f.symptom: f for f in judge(planted(scenes.bad_fold, truths, healthy, site=site))[0]}
    assert set(found) == {"bad_fold", "shifted_group"}
    assert found["bad_fold"].target == "fold 2" and found["bad_fold"].causes == ("4 of its 4 cases are of site B",)
    assert found["shifted_group"].target == "site B"


def test_a_column_of_names_is_no_grouping(truths, healthy):
    findings, untold = judge(planted(scenes.healthy, truths, healthy, 8, site=str))
    assert not findings and not any("site" in line for line in untold)


def test_missed_objects_are_told_by_size(truths, healthy):
    finding, = judge(planted(scenes.small_dropped, truths, healthy))[0]
    assert finding.target == "lesion" and finding.evidence[0].value <= 0.5 <= 0.8 <= finding.evidence[1].value
    assert finding.cases


def test_a_few_epochs_tell_nothing():
    epochs = scenes.curves("overfit", np.random.default_rng(0))[:4]
    assert curve_findings({0: epochs}, [0]) == ([], ["fold 0: over- and underfitting: 4 epochs, 5 are needed"])


def test_a_run_that_goes_on_has_not_ended_too_early():
    epochs = scenes.curves("underfit", np.random.default_rng(0))
    assert curve_findings({0: epochs}, [])[0] == [] and curve_findings({0: epochs}, [0])[0][0].symptom == "underfitting"


def test_a_label_that_was_not_learned_is_named_beside_those_that_were():
    epochs = [e.model_copy(update={"pseudo_dice": {**e.pseudo_dice, "b": 0.0, "c": None}})
              for e in scenes.curves("healthy", np.random.default_rng(0))]
    assert [(f.symptom, f.target) for f in curve_findings({0: epochs}, [0])[0]] == [("nothing_learned", "b")]


LABELS = Labels(foreground=(Label(name="kidney left", value=1), Label(name="kidney right", value=2)))
SHAPE = (24, 24, 40)


def kidneys(index):
    array = np.zeros(SHAPE, np.uint8)
    grid = np.ogrid[tuple(slice(0, n) for n in SHAPE)]
    for value, x in ((2, 10), (1, 30)):  # LPS: x runs to the left
        array[sum(((g - c) / r) ** 2 for g, c, r in zip(grid, (12, 12 + index % 3, x), (8, 6, 6), strict=True)) < 1] = value
    return array


def put(path, array, direction=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_label(path, array, Grid(shape=array.shape, spacing=(1.0, 1.0, 1.0), direction=direction))


def plan():
    configuration = Configuration(
        patch_size=(16, 16, 16), batch_size=2, spacing=(3.0, 3.0, 3.0), median_shape=(8, 8, 13), strides=((1, 1, 1), (2, 2, 2)),
        kernel_sizes=((3, 3, 3), (3, 3, 3)), features_per_stage=(8, 16), blocks_per_stage=(2, 2), decoder_blocks_per_stage=(2,),
        batch_dice=False, normalization=("CTNormalization",), use_mask_for_norm=(False,))
    return Plan(dataset_name="toy", planner="default", gpu_memory_gb=8, transpose_forward=(0, 1, 2), channels=("CT",),
                labels=LABELS, intensities=(), configurations={"3d_fullres": configuration})


def make_workspace(root, draw, spec=TrainSpec(), cases=10, folds=2, curve="healthy"):
    """A work folder with one run whose validation masks `draw(index, reference)` draws."""
    workspace, names = Workspace(root / "work"), [f"c{i}" for i in range(cases)]
    files = []
    for index, name in enumerate(names):
        put(root / "labels" / f"{name}.nii.gz", kidneys(index))
        files.append(CaseFiles(case=name, images=(f"{name}.nii.gz",), label=str(root / "labels" / f"{name}.nii.gz"),
                               attributes={"site": "ab"[index % 2]}))
    dataset = Dataset(name="toy", source="folder", root=str(root), channels=("CT",), labels=LABELS, cases=tuple(files))
    splits = [Split(train=tuple(names[1 - k::2]), val=tuple(names[k::2])) for k in range(2)]
    save_record(workspace.dataset_path, dataset)
    save_record(workspace.plan_path, plan())
    save_record(workspace.splits_path, splits, list[Split])
    label = LabelFingerprint(voxels=9, volume_ml=1.0, components=1, mean_intensity=(40.0,), std_intensity=(1.0,))
    save_record(workspace.fingerprint_path, Fingerprint(cases=tuple(
        CaseFingerprint(case=n, shape=SHAPE, shape_after_crop=SHAPE, spacing=(1, 1, 1), relative_size_after_crop=1.0,
                        labels={"kidney left": label}) for n in names),
        intensities=(), median_relative_size_after_cropping=1.0))
    for k in range(folds):
        folder = RunFolder(workspace.fold("3d_fullres", k))
        folder.path.mkdir(parents=True)
        folder.save_record(RunRecord(name="3d_fullres", configuration="3d_fullres", fold=k, spec=spec, plan=plan(),
                                     split=splits[k], data="", device="cpu"))
        folder.save_metrics(scenes.curves(curve, np.random.default_rng(k)))
        folder.weights_path.write_bytes(b"")
        for index in range(k, cases, 2):
            put(folder.validation / f"c{index}.nii.gz", draw(index, kidneys(index)))
    return workspace


def exchanged(index, mask):
    return np.choose(mask, [0, 2, 1]).astype(np.uint8) if index % 3 == 0 else mask


def test_a_work_folder_is_diagnosed_and_the_record_saved(tmp_path):
    workspace = make_workspace(tmp_path, exchanged, curve="overfit")
    diagnosis = diagnose(workspace, threads=1)
    assert diagnosis.symptoms == ("left_right_swap", "overfitting")
    assert (diagnosis.run, diagnosis.folds, diagnosis.cases) == ("3d_fullres", (0, 1), 10)
    swap = diagnosis.findings[0]
    assert swap.target == "kidney left and kidney right" and set(swap.cases) == {"c0", "c3", "c6", "c9"}
    assert "mirrored patches" in swap.causes[0]
    assert f"autoseg train {workspace.root} --config 3d_fullres --name 3d_fullres-sides --set augment.mirror=[0,1]" in (
        shlex.join(shlex.split(swap.remedies[0].command)).replace("'", ""))
    assert load_record(workspace.root / "report" / "diagnosis.json", Diagnosis) == diagnosis
    text = "\n".join(describe_diagnosis(diagnosis))
    assert "kidney left and kidney right: left and right are mixed up" in text and "look at: c0, c3, c6, c9" in text


def test_nothing_stands_out_in_good_masks(tmp_path):
    diagnosis = diagnose(make_workspace(tmp_path, lambda index, mask: mask), threads=2)
    assert diagnosis.findings == () and describe_diagnosis(diagnosis)[0].endswith("nothing stands out")


def test_where_mirroring_was_off_the_labels_are_doubted(tmp_path):
    spec = TrainSpec(augment=AugmentSpec(mirror=(0, 1)))
    swap = diagnose(make_workspace(tmp_path, exchanged, spec), threads=1).findings[0]
    assert [r.command.split()[1] for r in swap.remedies] == ["check"] and not swap.causes


def test_a_coarse_plan_is_told_as_a_cause(tmp_path):
    def blocks(index, mask):
        places = [np.clip(np.arange(n) // 5 * 5 + 2, 0, n - 1) for n in mask.shape]
        return scenes.warped(scenes.Truth("", mask[np.ix_(*places)], (1.0, 1.0, 1.0)), 1.0, np.random.default_rng(index))
    diagnosis = diagnose(make_workspace(tmp_path, blocks), threads=1)
    assert diagnosis.symptoms == ("blurred_boundary",)
    assert "voxels of 3 x 3 x 3 mm, most images have 1 x 1 x 1 mm" in diagnosis.findings[0].causes[0]


def test_an_outlier_is_looked_at_once_more(tmp_path):
    diagnosis = diagnose(make_workspace(tmp_path, lambda i, m: np.roll(m, -7, 1) if i == 5 else m), threads=1)
    assert diagnosis.symptoms == ("outlier_cases",) and diagnosis.findings[0].cases == ("c5",)
    assert "c5: the prediction is moved by about -7 along y voxels" in diagnosis.findings[0].causes[0]


def test_only_finished_folds_are_judged_and_curves_even_without_masks(tmp_path):
    workspace = make_workspace(tmp_path, lambda index, mask: mask, curve="nan")
    for path in workspace.fold("3d_fullres", 0).joinpath("validation").glob("*"):
        path.unlink()
    diagnosis = diagnose(workspace, threads=1)
    assert diagnosis.folds == (1,) and diagnosis.cases == 5 and diagnosis.symptoms == ("nothing_learned",)
    for path in workspace.fold("3d_fullres", 1).joinpath("validation").glob("*"):
        path.unlink()
    assert diagnose(workspace, threads=1).symptoms == ("nothing_learned",)


def test_a_run_that_is_not_there_is_an_error_that_says_what_is(tmp_path):
    workspace = make_workspace(tmp_path, lambda index, mask: mask, cases=2)
    with pytest.raises(RunError, match=r"no run 'x'; it has 3d_fullres"):
        diagnose(workspace, "x")
    (tmp_path / "work" / "runs").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="train first: autoseg train"):
        diagnose(workspace)


def test_two_folders_of_masks_in_any_orientation(tmp_path):
    turned = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
    for index in range(6):
        mask = kidneys(index)
        put(tmp_path / "labels" / f"c{index}.nii.gz", mask, turned)
        put(tmp_path / "masks" / f"c{index}.nii.gz", ndimage.binary_erosion(mask) * mask, turned)
    diagnosis = diagnose_masks(tmp_path / "masks", tmp_path / "labels", threads=1)
    assert diagnosis.symptoms == ("over_predicted_background",) and {f.target for f in diagnosis.findings} == {"1", "2"}
    (tmp_path / "labels" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "left": 1, "right": 2}}))
    assert {f.target for f in diagnose_masks(tmp_path / "masks", tmp_path / "labels").findings} == {"left", "right"}
    (tmp_path / "masks" / "c3.nii.gz").unlink()
    with pytest.raises(DatasetError, match="c3"):
        diagnose_masks(tmp_path / "masks", tmp_path / "labels")


FLAGS = {
    "check": set(), "select": set(), "report": set(), "predict": {"--out", "--no-mirror"},
    "plan": {"--out", "--planner", "--gpu-memory", "--groups"}, "train": {"--config", "--name", "--set", "--folds"},
}
CONTEXTS = (
    Context(), Context("my work", "/data", "3d_fullres", "3d_fullres", plan=plan()), Context(mirrored=False),
    Context("w", "d", "mine", "2d", TrainSpec(epochs=7, sampler=SamplerSpec(foreground=0.9), augment=AugmentSpec(mirror=())),
            side_axis=1),
)


@pytest.mark.parametrize("context", CONTEXTS, ids=["folders", "work", "not mirrored", "2d"])
@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_every_remedy_is_a_command_with_flags_and_settings_that_exist(symptom, context):
    target = {"bad_fold": "fold 2", "shifted_group": "site b"}.get(symptom, "liver")
    advised = advise(Finding(symptom=symptom, target=target, evidence=()), context, [])
    assert advised.remedies
    for remedy in advised.remedies:
        program, command, *rest = shlex.split(remedy.command)
        assert program == "autoseg" and {part for part in rest if part.startswith("--")} <= FLAGS[command]
        spec = apply_settings(TrainSpec(), [value for flag, value in pairwise(rest) if flag == "--set"])
        make_loss(spec.loss, Labels(foreground=(Label(name="liver", value=1),)), False)


def test_another_loss_is_not_given_the_options_of_the_present_one():
    spec = TrainSpec(loss=LossSpec(options={"dice": 2.0}))
    command = Context("w", spec=spec).train("x", "loss.kind=tversky")
    settings = [part for flag, part in pairwise(shlex.split(command)) if flag == "--set"]
    assert settings == ["loss.kind=tversky"]
    finding = Finding(symptom="small_objects_missed", target="liver", evidence=())
    kinds = ["loss.kind=tversky" in remedy.command for remedy in advise(finding, Context("w", spec=spec), []).remedies]
    assert any(kinds)
    trained = Context("w", spec=TrainSpec(loss=LossSpec(kind="tversky")))
    assert not any("loss-" in remedy.command or "--name 3d_fullres-tversky" in remedy.command
                   for remedy in advise(finding, trained, []).remedies)


def test_what_a_run_was_given_is_given_again():
    spec = TrainSpec(epochs=7, loss=LossSpec(kind="ce"), augment=AugmentSpec(mirror=()), precision="bf16",
                     sampler=SamplerSpec(options={"a": 1}))
    assert given_settings(TrainSpec()) == []
    assert apply_settings(TrainSpec(), given_settings(spec)) == spec
    command = Context("w", "d", "r", "3d_fullres", spec).train("long", "epochs=14")
    settings = [part for flag, part in pairwise(shlex.split(command)) if flag == "--set"]
    assert apply_settings(TrainSpec(), settings) == spec.model_copy(update={"epochs": 14}) and "--name r-long" in command
