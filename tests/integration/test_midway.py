"""Whole validation cases segmented while a fold trains: fixed, cheap, and without any trace in the training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autoseg.files.preprocessed import open_case
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace
from autoseg.logs import SILENT
from autoseg.stages import midway
from autoseg.stages.figures import progress_figure
from autoseg.stages.midway import Midway, load_midway
from autoseg.stages.preprocess import data_folder
from autoseg.trainers.default import Job, Training


@pytest.fixture
def made(trained, tmp_path):
    """A function that makes a fresh training of fold 0, and looks at it that write to a folder of their own."""
    workspace = Workspace(trained)
    record = RunFolder(workspace.fold("3d_fullres", 0)).record()
    spec = record.spec.model_copy(update={"epochs": 2, "steps_per_epoch": 2, "precision": "fp32"})
    record = record.model_copy(update={"spec": spec})
    folder = data_folder(workspace, workspace.plan(), record.configuration)
    cases = {name: open_case(folder / name) for name in (*record.split.train, *record.split.val)}

    def make(name="run", validation=None):
        plan = record.plan
        held = [cases[n] for n in validation or record.split.val]
        job = Job(
            plan.configurations[record.configuration], plan.labels, len(plan.channels), spec, 0,
            [cases[n] for n in record.split.train], held, torch.device("cpu"), "fp32", 0,
        )
        return Training(job), Midway(workspace, record, held, RunFolder(tmp_path / name))

    return make


def trained_with(made, looks, monkeypatch):
    monkeypatch.setattr(midway, "SHARE", 1e9 if looks else 0.0)
    training, watch = made(f"looks{looks}")
    epochs = []
    for epoch in training.run():
        epochs.append(epoch)
        watch.after_epoch(training, epochs, SILENT)
    return training, watch, epochs


def test_training_is_the_same_to_the_bit_with_and_without_looks(made, monkeypatch):
    torch.manual_seed(0)
    one, watch, epochs = trained_with(made, True, monkeypatch)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    other, idle, plain = trained_with(made, False, monkeypatch)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(watch.records) == 2 and not idle.records and not idle.path.exists()
    for (name, a), b in zip(one.weights().items(), other.weights().values(), strict=True):
        assert torch.equal(a, b), name
    assert [e.train_loss for e in epochs] == [e.train_loss for e in plain]
    assert [e.val_loss for e in epochs] == [e.val_loss for e in plain]
    assert all(p.requires_grad for p in one.network.parameters())


def test_each_look_has_all_metrics_of_every_case_and_label_and_is_kept(made, monkeypatch):
    _, watch, epochs = trained_with(made, True, monkeypatch)
    assert load_midway(watch.path) == watch.records
    lines = [json.loads(line) for line in watch.path.read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(e.epoch, e.step) for e in epochs]
    for line in lines:
        assert line["seconds"] > 0 and sorted(line["cases"]) == sorted(watch.cases)
        for metrics in line["cases"].values():
            assert set(metrics) == {"lungs", "heart", "spine", "nodule"}
            assert {"dice", "hd95", "nsd", "assd", "volume_error", "lesion_f1", "n_reference"} <= set(metrics["lungs"])
        values = [metrics["lungs"]["dice"] for metrics in line["cases"].values()]
        assert line["mean"]["lungs"]["dice"] == pytest.approx(sum(values) / len(values))


def test_a_look_says_what_segmenting_the_case_with_these_weights_says(made, trained, monkeypatch):
    from autoseg.arrays.metrics import measure
    from autoseg.files.images import read_case, read_label
    from autoseg.inference import Member, Model
    from autoseg.stages.evaluate import targets_of

    training, watch, _ = trained_with(made, True, monkeypatch)
    name = next(iter(watch.cases))
    files = next(c for c in Workspace(trained).dataset().cases if c.case == name)
    plan = watch.record.plan
    model = Model([Member(plan, "3d_fullres", (training.network,), ())], torch.device("cpu"), "fp32")
    found = model.predict_image(read_case([Path(files.images[0])])).label_zyx
    truth, grid = read_label(watch.cases[name][1])
    expected = measure(truth, found, grid.spacing, targets_of(plan.labels), 1.0, surfaces=False)
    for label, values in expected.items():
        assert watch.records[-1].cases[name][label]["dice"] == pytest.approx(values["dice"], abs=2e-3), "the store keeps float16"


def epochs_of(seconds, count):
    return [SimpleNamespace(epoch=i, step=i, seconds=seconds) for i in range(count)]


def test_looks_take_at_most_their_share_of_the_time(made, monkeypatch):
    training, watch = made()
    looked = []

    def look(training, epoch):
        looked.append(epoch.epoch)
        return midway.MidwayRecord(epoch=epoch.epoch, step=0, seconds=10.0, cases={}, mean={})

    monkeypatch.setattr(watch, "_look", look)
    monkeypatch.setattr(watch, "_guess", lambda epoch, training: 8.0)
    for count in range(1, 101):
        watch.after_epoch(training, epochs_of(20.0, count), SILENT)
    assert looked[0] == 7, "the first look fits after 160 seconds"
    assert looked[1:] == list(range(19, 100, 10)) and len(looked) * 10 <= 0.05 * 2000


def test_the_first_look_is_guessed_from_what_training_takes(made):
    training, watch = made()
    cheap, dear = (watch._guess(SimpleNamespace(seconds=s), training) for s in (1.0, 100.0))
    assert cheap > 0 and dear == pytest.approx(100 * cheap)


def test_looks_of_epochs_that_are_trained_again_are_dropped(made, monkeypatch):
    trained_with(made, True, monkeypatch)
    training, again = made("looksTrue")
    assert len(again.records) == 2
    again.after_epoch(training, epochs_of(1e9, 2), SILENT)
    assert [one.epoch for one in again.records] == [0, 1] and len(load_midway(again.path)) == 2


def test_the_cases_are_fixed_whatever_their_order(made, trained):
    names = [case.case for case in Workspace(trained).dataset().cases]
    one, other = made(validation=names)[1], made(validation=names[::-1])[1]
    assert list(one.cases) == list(other.cases) and len(one.cases) == midway.CASES < len(names)


def test_a_look_that_fails_is_told_once_and_training_goes_on(made, monkeypatch):
    training, watch = made()
    told = []
    reporter = SimpleNamespace(warn=told.append)
    monkeypatch.setattr(midway, "SHARE", 1e9)
    for error in (torch.OutOfMemoryError("out"), OSError("gone")):
        watch._off = False

        def broken(*arguments, error=error):
            raise error

        monkeypatch.setattr(watch, "_look", broken)
        for count in (1, 2, 3):
            assert watch.after_epoch(training, epochs_of(1.0, count), reporter) is None
    assert len(told) == 2 and "out of memory" in told[0] and "gone" in told[1]
    assert load_midway(watch.path) == []


def test_damaged_lines_count_as_none(tmp_path):
    (tmp_path / "midway.jsonl").write_text('{"epoch": 1}\n')
    assert load_midway(tmp_path / "midway.jsonl") == [] and load_midway(tmp_path / "nothing") == []


def test_looks_are_drawn_beside_the_pseudo_dice(tmp_path):
    epochs = [{"epoch": i, "train_loss": 1.0, "val_loss": 1.0, "pseudo_dice": {"a": 0.5}, "learning_rate": 0.1, "seconds": 1.0}
              for i in range(12)]
    looks = [{"epoch": 5, "mean": {"a": {"dice": 0.8}, "b": {"dice": None}}}, {"epoch": 9, "mean": {"a": {"dice": 0.9}}}]
    progress_figure(tmp_path / "with.png", epochs, looks)
    progress_figure(tmp_path / "without.png", epochs)
    progress_figure(tmp_path / "empty.png", epochs, [{"epoch": 1}])
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
