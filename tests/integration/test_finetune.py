"""Fine-tuning on the command line: training starts from a model file or a work folder, goes on without it, tells what it took."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

FOLD = ("--config", "3d_fullres", "--folds", "0")
SLOW = """
import time
import autoseg.stages.train, autoseg.trainers.default
step = autoseg.trainers.default.Training.train_step
def slow(self, batch):
    time.sleep(0.05)
    return step(self, batch)
autoseg.trainers.default.Training.train_step = slow
"""


@pytest.fixture(scope="module")
def packed(cli, trained, tmp_path_factory):
    """The trained folder as a model file."""
    path = tmp_path_factory.mktemp("packed") / "chest.autoseg"
    cli.call("pack", trained, "--out", path).ok()
    return path


@pytest.fixture
def target(cli, planned, tmp_path):
    """A planned folder of the same cases with wider networks."""
    work = cli.copied(planned, tmp_path / "work", runs=False)

    def change(plan):
        for entry in plan["configurations"].values():
            entry["features_per_stage"] = [features + 2 for features in entry["features_per_stage"]]

    cli.edit(work / "plan.json", change)
    return work


def run_folder(work, fold=0, run="3d_fullres"):
    return work / "runs" / run / f"fold_{fold}"


def test_a_run_takes_the_models_network_and_tells_what_it_took(cli, target, packed):
    planned = json.loads((target / "plan.json").read_text())["configurations"]["3d_fullres"]
    ran = cli.train(target, *FOLD, "--init", packed, epochs=1).ok()
    record = json.loads((run_folder(target) / "run.json").read_text())
    own = record["plan"]["configurations"]["3d_fullres"]
    assert own["features_per_stage"] == [features - 2 for features in planned["features_per_stage"]]
    assert own["patch_size"] == planned["patch_size"] and own["spacing"] == planned["spacing"]
    report = json.loads((run_folder(target) / "init.json").read_text())
    assert report["init"] == record["init"] and report["network"] == "3d_fullres fold 0" and report["model"] == str(packed)
    assert report["new_weights"] == report["adapted_weights"] == 0 and {part["state"] for part in report["parts"]} == {"kept"}
    assert f"3d_fullres fold 0 starts from {packed}" in ran.out and "output nodule" in ran.out and "100 % kept" in ran.out
    again = cli.train(target, *FOLD, epochs=1).ok()
    assert "starts from" not in again.out


def test_training_begins_at_the_models_weights(cli, target, packed, trained):
    tiny = ("--set", "optimizer.lr=1e-12", "--set", "optimizer.weight_decay=0", "--set", "steps_per_epoch=1")
    cli.train(target, *FOLD, "--init", packed, *tiny, epochs=1).ok()
    before, after = (load_file(run_folder(work) / "weights.safetensors") for work in (trained, target))
    assert before.keys() == after.keys()
    assert all(np.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_renamed_labels_begin_anew(cli, chest, trained, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(chest, data)
    cli.edit(data / "dataset.json", lambda description: description["labels"].update(
        {"tumour": description["labels"].pop("nodule")}
    ))
    work = tmp_path / "work"
    cli.call("plan", data, "--out", work).ok()
    cli.thin(work, keep=("3d_fullres",))
    ran = cli.train(work, "--folds", "0", "--init", trained, epochs=1).ok()
    states = {part["part"]: part["state"] for part in json.loads((run_folder(work) / "init.json").read_text())["parts"]}
    assert states["output tumour"] == "new" and states["output nodule"] == "left out" and states["output lungs"] == "kept"
    assert "output nodule" in ran.out and "left out" in ran.out


def test_going_on_does_not_need_the_model_and_ends_as_if_undisturbed(cli, target, packed, tmp_path):
    undisturbed = cli.copied(target, tmp_path / "undisturbed")
    cli.train(undisturbed, *FOLD, "--init", packed, epochs=2).ok()
    model = shutil.copy(packed, tmp_path / "moved.autoseg")
    arguments = ("train", target, *FOLD, "--epochs", "2", "--threads", "0", *cli.TRAINING)
    child = cli.start(*arguments, "--init", model, before=SLOW)
    cli.wait_for(child, lambda: any(run_folder(target).glob("resume/step_*")))
    child.kill()
    child.wait()
    (tmp_path / "moved.autoseg").unlink()
    cli.call(*arguments).ok()
    assert (run_folder(target) / "weights.safetensors").read_bytes() == (
        run_folder(undisturbed) / "weights.safetensors").read_bytes()


def test_a_run_that_starts_from_a_model_is_another_run(cli, target, packed, trained):
    cli.train(target, *FOLD, "--init", packed, epochs=1).ok()
    refused = cli.train(target, "--config", "3d_fullres", "--folds", "1", epochs=1)
    refused.refused("init:", "give the same --init", "features_per_stage")
    shutil.rmtree(run_folder(target) / "resume", ignore_errors=True)
    (run_folder(target) / "weights.safetensors").unlink()
    cli.train(target, *FOLD, epochs=1).refused("has no weights of its own yet; give the same --init")
    cli.train(target, *FOLD, "--restart", epochs=1).ok()
    assert json.loads((run_folder(target) / "run.json").read_text())["init"] is None


def test_a_model_that_knows_validation_cases_is_told_of(cli, target, trained):
    ran = cli.train(target, "--config", "3d_fullres", "--folds", "2", "--init", trained, epochs=1).ok()
    record = json.loads((run_folder(target, 2) / "run.json").read_text())
    assert "trained on validation cases of this fold" in ran.err and record["split"]["val"][0] in ran.err
    assert "3d_fullres fold 0" in json.loads((run_folder(target, 2) / "init.json").read_text())["network"]
    ran = cli.train(target, "--config", "3d_fullres", "--folds", "1", "--init", trained, epochs=1).ok()
    assert "validation cases of this fold" not in ran.err
    assert json.loads((run_folder(target, 1) / "init.json").read_text())["network"] == "3d_fullres fold 1"


def test_what_cannot_be_started_from_is_refused_before_anything_is_trained(cli, target, packed, trained, tmp_path):
    cli.train(target, *FOLD, "--init", tmp_path / "none").refused("does not exist")
    cli.train(target, *FOLD, "--init", tmp_path).refused("is not a work folder")
    cli.train(target, *FOLD, "--init", target).refused("holds no finished training")
    cli.train(target, "--config", "2d", "--folds", "0", "--init", packed).refused("has no network that 2d could start from")
    cli.train(trained, *FOLD, "--init", trained).refused("would start from itself")
    assert not (target / "runs").exists()
