"""Packing: what goes into a model file of a work folder, and what a model of it predicts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autoseg
from autoseg.arrays.unusual import describe_image, unusual
from autoseg.errors import RecordError, RunError
from autoseg.files.model import open_model_file
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace, save_record
from autoseg.networks.build import build
from autoseg.networks.describe import describe
from autoseg.stages.judge import trust_path
from autoseg.stages.models import load, model_hashes, model_identity, open_model
from autoseg.stages.pack import collect, label_colours, pack
from autoseg.stages.predict import Options, network_hashes
from autoseg.stages.records import own_plan
from autoseg.types.case import Image
from autoseg.types.dataset import Split
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities, LabelFingerprint
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels
from autoseg.types.model import part_name
from autoseg.types.plan import Configuration, Plan
from autoseg.types.record import Spec
from autoseg.types.report import CaseMetrics, Report
from autoseg.types.run import AugmentSpec, RunRecord, TrainSpec
from autoseg.types.selection import Selection
from autoseg.types.trust import Calibration, TrainingCases, Trust

LABELS = Labels(foreground=(Label(name="liver", value=1), Label(name="tumour", value=7)))
CPU = Options(device="cpu", precision="fp32")
LOW, HIGH, FLAT = "3d_lowres", "3d_cascade_fullres", "2d"


def configuration(
    dims: int = 3, spacing: float = 1.0, previous: str | None = None, following: str | None = None,
) -> Configuration:
    return Configuration(
        patch_size=(8,) * dims, batch_size=2, spacing=(spacing,) * dims, median_shape=(8.0,) * dims,
        strides=((1,) * dims, (2,) * dims), kernel_sizes=((3,) * dims,) * 2, features_per_stage=(4, 6), blocks_per_stage=(1, 1),
        decoder_blocks_per_stage=(1,), batch_dice=False, normalization=("ZScoreNormalization",), use_mask_for_norm=(False,),
        previous_stage=previous, next_stage=following,
    )


PLAN = Plan(
    dataset_name="livers", planner="default", gpu_memory_gb=8, transpose_forward=(0, 1, 2), channels=("MRI",), labels=LABELS,
    intensities=(Intensities(mean=1, median=1, std=1, min=0, max=9, percentile_99_5=8, percentile_00_5=0),),
    configurations={FLAT: configuration(2), LOW: configuration(spacing=2.0, following=HIGH), HIGH: configuration(previous=LOW)},
    notes=("a note",),
)


def train(workspace: Workspace, run: str, folds: Sequence[int], plan: Plan = PLAN, name: str | None = None, **spec: Any) -> None:
    """A run whose networks have random weights."""
    own = own_plan(plan, run)
    made = own.configurations[run]
    channels = 1 + (len(LABELS.foreground) if made.previous_stage else 0)
    for fold in folds:
        folder = RunFolder(workspace.fold(name or run, fold))
        folder.save_record(RunRecord(
            name=name or run, configuration=run, fold=fold, spec=TrainSpec(precision="fp32", **spec), plan=own,
            split=Split(train=("a",), val=("b",)), data="", device="cpu", previous=made.previous_stage))
        network = build(describe(made, channels, LABELS.output_count), seed=17 * fold + len(run))
        folder.save_weights(network.state_dict(), epochs=1000)


def select(workspace: Workspace, *runs: str, **options: Any) -> Selection:
    selection = Selection(runs=runs, folds=(0, 1), cases=2, patients=2, nested_dice=0.71, **options)
    save_record(workspace.selection_path, selection)
    metrics = [{"liver": {"dice": 0.8 + 0.1 * i}, "tumour": {"dice": 0.5}} for i in range(2)]
    cases = [CaseMetrics(case=f"Jane Doe {i}", metrics=one) for i, one in enumerate(metrics)]
    save_record(workspace.root / "report" / "report.json", Report.of(cases))
    return selection


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    """A planned work folder with two folds of 2d and of both stages of the cascade, without a selection."""
    workspace = Workspace(tmp_path / "work")
    workspace.save_plan(PLAN)
    cases = tuple(CaseFingerprint(
        case=f"Jane Doe {i}", shape=(10, 20, 20), shape_after_crop=(10, 20, 20), spacing=(1.0 + 0.1 * i, 1.0, 1.0),
        relative_size_after_crop=1.0, labels={"liver": LabelFingerprint(
            voxels=100, volume_ml=0.1 + 0.01 * i, components=1, mean_intensity=(1.0,), std_intensity=(1.0,))}) for i in range(12))
    save_record(workspace.fingerprint_path, Fingerprint(
        cases=cases, intensities=PLAN.intensities, median_relative_size_after_cropping=1.0, channel_kinds=("MRI",)))
    train(workspace, FLAT, (0, 1), augment=AugmentSpec(mirror=(1,)))
    train(workspace, LOW, (0, 1))
    train(workspace, HIGH, (0, 1))
    return workspace


def image(seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(0, 1, (1, 9, 12, 11)).astype(np.float32)


def test_the_selection_is_packed_with_all_that_it_needs(work: Workspace, tmp_path: Path) -> None:
    steps = (Spec(kind="largest_component", options={"labels": [1]}),)
    select(work, FLAT, HIGH, weights=(3.0, 1.0), postprocessing=steps)
    path = pack(work, tmp_path / "m.autoseg", licence="CC-BY-4.0")
    record = open_model_file(path).record
    assert [(member.run, member.weight) for member in record.members] == [(FLAT, 3.0), (HIGH, 1.0)]
    assert {run: (n.configuration, n.folds, n.mirror_axes, n.previous, n.plan) for run, n in record.networks.items()} == {
        FLAT: (FLAT, (0, 1), (1,), None, None), HIGH: (HIGH, (0, 1), (0, 1, 2), LOW, None),
        LOW: (LOW, (0, 1), (0, 1, 2), None, None),
    }
    assert (record.name, record.licence, record.channels, record.labels) == ("livers", "CC-BY-4.0", ("MRI",), LABELS)
    assert record.postprocessing == steps and record.plan.reasons == {} and record.plan.notes == ()
    assert record.metrics is not None and record.metrics.mean["liver"]["dice"] == pytest.approx(0.85)
    assert (record.metrics.cases, record.metrics.folds, record.metrics.nested_dice) == (2, (0, 1), 0.71)
    assert record.metrics.foreground_mean["dice"] == pytest.approx(0.675)


def test_no_case_is_named(work: Workspace, tmp_path: Path) -> None:
    select(work, FLAT)
    path = pack(work, tmp_path / "m.autoseg")
    assert b"Jane" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize("runs", [(FLAT,), (HIGH,), (FLAT, HIGH), (LOW, HIGH)])
@pytest.mark.parametrize("folds", [None, (1,)])
def test_a_packed_model_predicts_what_the_work_folder_does(
    work: Workspace, tmp_path: Path, runs: tuple[str, ...], folds: tuple[int, ...] | None
) -> None:
    select(work, *runs, weights=tuple(float(i + 1) for i in range(len(runs))))
    path = pack(work, tmp_path / "m.autoseg", folds=folds)
    options = dataclasses.replace(CPU, folds=folds)
    for seed in range(2):
        expected = load(work.root, options).predict(image(seed))
        assert len(np.unique(expected)) > 1
        assert np.array_equal(open_model(path, CPU).predict(image(seed)), expected)
        assert np.array_equal(autoseg.load(path, "cpu", "fp32").predict(image(seed)), expected)


def test_folds_and_mirroring_are_chosen_when_a_file_is_loaded(work: Workspace, tmp_path: Path) -> None:
    path = pack(work, tmp_path / "m.autoseg", runs=[FLAT])
    one = autoseg.load(path, "cpu", "fp32", folds=[1], mirror=False)
    assert len(one.members[0].networks) == 1 and not one.mirror
    state, expected = one.members[0].networks[0].state_dict(), RunFolder(work.fold(FLAT, 1)).load_weights()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    for folds, said in (([2], r"holds fold\(s\) 0, 1 of run '2d', but not \[2\]"), ([], "empty list")):
        with pytest.raises(RunError, match=said):
            autoseg.load(path, "cpu", folds=folds)


def test_stages_that_two_members_share_are_loaded_once(work: Workspace, tmp_path: Path) -> None:
    low, high = open_model(pack(work, tmp_path / "m.autoseg", runs=[LOW, HIGH]), CPU).members
    assert high.previous is not None and high.previous.networks[0] is low.networks[0]


def test_equal_work_folders_give_equal_bytes_and_packing_again_changes_nothing(work: Workspace, tmp_path: Path) -> None:
    select(work, FLAT)
    first, second = pack(work, tmp_path / "a.autoseg"), pack(work, tmp_path / "b.autoseg")
    assert first.read_bytes() == second.read_bytes()
    before = first.stat().st_mtime_ns
    assert pack(work, first) == first and first.stat().st_mtime_ns == before
    with pytest.raises(RunError, match="exists and is not this model"):
        pack(work, first, folds=[0])
    assert open_model_file(pack(work, first, folds=[0], overwrite=True)).record.networks[FLAT].folds == (0,)


def test_fp32_parts_are_the_trained_files_themselves(work: Workspace, tmp_path: Path) -> None:
    file = open_model_file(pack(work, tmp_path / "m.autoseg", runs=[HIGH]))
    assert model_hashes(file) == network_hashes(work, HIGH, None)
    for fold in (0, 1):
        trained = RunFolder(work.fold(HIGH, fold)).weights_path.read_bytes()
        with zipfile.ZipFile(file.path) as archive:
            assert archive.read(part_name(HIGH, fold)) == trained
        assert file.record.parts[part_name(HIGH, fold)].sha256 == hashlib.sha256(trained).hexdigest()


def test_half_precision_makes_a_smaller_file_with_nearly_the_same_masks(work: Workspace, tmp_path: Path) -> None:
    whole = pack(work, tmp_path / "a.autoseg", runs=[FLAT])
    half = pack(work, tmp_path / "b.autoseg", runs=[FLAT], weights="fp16")
    a, b = (open_model(path, CPU).predict(image()) for path in (whole, half))
    assert (a == b).mean() > 0.98 and open_model_file(half).record.weights == "fp16"
    assert half.stat().st_size < whole.stat().st_size
    with pytest.raises(RunError, match="choose from fp32, fp16, bf16"):
        pack(work, tmp_path / "c.autoseg", weights="int8")  # type: ignore[arg-type]


def test_runs_that_were_not_selected_come_without_what_belongs_to_the_selection(work: Workspace, tmp_path: Path) -> None:
    select(work, FLAT, postprocessing=(Spec(kind="largest_component", options={"labels": [1]}),))
    record = open_model_file(pack(work, tmp_path / "m.autoseg", runs=[HIGH])).record
    assert record.postprocessing == () and record.metrics is None


def test_what_cannot_be_packed_is_said_and_nothing_is_left(work: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "m.autoseg"
    for options, said in (
        ({"runs": ["other"]}, "run 'other' has no finished training of fold.s. any"),
        ({"runs": [FLAT], "folds": [0, 4]}, r"run '2d' has no finished training of fold.s. \[4\] \(finished: \[0, 1\]\)"),
    ):
        with pytest.raises(RunError, match=said):
            pack(work, out, **options)
    train(work, FLAT, [1], augment=AugmentSpec(mirror=(0,)))
    with pytest.raises(RunError, match="the folds of run '2d' were trained with different plans"):
        pack(work, out, runs=[FLAT])
    turned = PLAN.model_copy(update={"transpose_forward": (1, 0, 2)})
    train(work, FLAT, [0], turned, name="turned")
    with pytest.raises(RecordError, match=r"networks\.turned\.plan\.transpose_forward must be that of the model's plan"):
        pack(work, out, runs=[LOW, "turned"])
    with pytest.raises(RecordError, match="not a work folder"):
        pack(Workspace(tmp_path / "nothing"), out)
    weights = RunFolder(work.fold(LOW, 0)).weights_path
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(RecordError, match=r"m\.autoseg is refused.*weights/3d_lowres/fold_0\.safetensors"):
        pack(work, out, runs=[LOW])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["work"]


def test_a_run_of_another_plan_keeps_its_own(work: Workspace, tmp_path: Path) -> None:
    finer = PLAN.model_copy(update={"configurations": {FLAT: configuration(2, spacing=0.5)}})
    train(work, FLAT, [0], finer, name="finer")
    record = open_model_file(pack(work, tmp_path / "m.autoseg", runs=[FLAT, "finer"], folds=[0])).record
    assert record.networks[FLAT].plan is None
    assert record.configuration_of("finer").spacing == (0.5, 0.5) and record.configuration_of(FLAT).spacing == (1.0, 1.0)


def test_masks_of_a_file_depend_on_networks_folds_weights_mirroring_and_steps(work: Workspace, tmp_path: Path) -> None:
    def identity(name: str, options: Options = CPU, **chosen: Any) -> str:
        select(work, FLAT, LOW, **chosen)
        return json.dumps(model_identity(open_model_file(pack(work, tmp_path / name)), options), sort_keys=True)

    step = (Spec(kind="largest_component", options={"labels": [1]}),)
    found = [
        identity("a"), identity("a", dataclasses.replace(CPU, folds=(0,))), identity("a", dataclasses.replace(CPU, mirror=False)),
        identity("b", weights=(1.0, 2.0)), identity("c", postprocessing=step),
    ]
    assert len(set(found)) == len(found) and identity("a") == found[0]
    assert identity("a", dataclasses.replace(CPU, device="auto", precision="bf16")) == found[0]


def test_what_trust_says_goes_along_if_it_is_about_these_networks(work: Workspace, tmp_path: Path) -> None:
    selection = select(work, FLAT)
    trust = Trust(
        inputs="x", runs=(FLAT,), weights=selection.run_weights, folds=(0, 1), networks=network_hashes(work, FLAT, None),
        calibration={FLAT: Calibration(temperature=1.7)}, training=TrainingCases(cases=3), cases=2)
    save_record(trust_path(work), trust)
    path = pack(work, tmp_path / "a.autoseg")
    record = open_model_file(path).record
    assert record.trust == trust and record.training is not None and record.training.ranges == trust.training
    assert open_model(path, CPU).members[0].temperature == load(work.root, CPU).members[0].temperature == 1.7
    save_record(trust_path(work), trust.model_copy(update={"networks": {"2d/fold_0": "other"}}))
    assert open_model_file(pack(work, tmp_path / "b.autoseg")).record.trust is None


def test_without_trust_the_fingerprint_tells_which_cases_are_unusual(work: Workspace, tmp_path: Path) -> None:
    training = open_model_file(pack(work, tmp_path / "m.autoseg", runs=[FLAT])).record.training
    assert training is not None and training.channel_kinds == ("MRI",) and training.intensities == PLAN.intensities
    assert (training.ranges.numbers["spacing z"].low, training.ranges.numbers["spacing z"].high) == pytest.approx((1.0, 2.1))
    assert training.ranges.found == {"liver": 12}

    def said(spacing: tuple[float, float, float]) -> str:
        grid = Grid(shape=(9, 12, 11), spacing=spacing)
        return "; ".join(unusual(describe_image(Image(image(), grid, ""), PLAN, PLAN.configurations[FLAT]), training.ranges))

    assert "spacing z 30 mm is outside 1 to 2.1 mm" in said((30.0, 1.0, 1.0)) and "spacing" not in said((1.5, 1.0, 1.0))


def test_every_label_has_a_colour_of_its_own() -> None:
    many = Labels(foreground=tuple(Label(name=f"l{i}", value=i) for i in range(1, 60)))
    colours = label_colours(many)
    assert list(colours) == [label.name for label in many.foreground] and len(set(colours.values())) == 59
    assert all(len(colour) == 7 and int(colour[1:], 16) >= 0 for colour in colours.values())


def test_a_record_without_parts_is_what_would_be_packed(work: Workspace) -> None:
    select(work, FLAT)
    assert collect(work, [1]).part_names == ("weights/2d/fold_1.safetensors",)
