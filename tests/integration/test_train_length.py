"""How long a run is: a time budget, and a finished run that is made longer."""

from __future__ import annotations

import json
import signal

import pytest

RUN = ("runs", "3d_fullres", "fold_0")
SLOW = """
import time
import autoseg.stages.train, autoseg.trainers.default
step = autoseg.trainers.default.Training.train_step
def slow(self, batch):
    time.sleep(0.05)
    return step(self, batch)
autoseg.trainers.default.Training.train_step = slow
"""


@pytest.fixture
def own(cli, trained, tmp_path):
    """A trained work folder of one's own."""
    return cli.copied(trained, tmp_path / "work")


def record(work):
    return json.loads(work.joinpath(*RUN, "run.json").read_text())


def rows(work):
    return [json.loads(line) for line in work.joinpath(*RUN, "metrics.jsonl").read_text().splitlines()]


def weights(work):
    return work.joinpath(*RUN, "weights.safetensors").read_bytes()


QUICK = ("--set", "val_steps=1")
LONGER = ("--config", "3d_fullres", "--folds", "0")


def test_a_finished_run_is_made_longer_and_only_once(cli, own):
    before, old = weights(own), rows(own)
    ran = cli.train(own, *LONGER, epochs=6).ok()
    assert "made longer, from 4 to 6 epochs" in ran.out
    assert record(own)["spec"]["epochs"] == 6 and record(own)["extended"] == [4]
    assert rows(own)[:4] == old and [row["epoch"] for row in rows(own)] == list(range(6)) and weights(own) != before
    # the schedule is that of a run of 6 epochs of 15 steps: (1 - step / 90) ** 0.9
    assert rows(own)[5]["learning_rate"] == pytest.approx(0.01 * (1 / 90) ** 0.9)
    states = cli.states(own / "runs")
    cli.train(own, *LONGER, epochs=6).ok()
    assert cli.states(own / "runs") == states
    assert json.loads(own.joinpath(*RUN, "validation", "report.json").read_text())["cases"]


def test_a_run_that_is_made_longer_can_be_killed_and_its_old_weights_stay_of_use(cli, own, tmp_path, chest):
    twin = cli.copied(own, tmp_path / "twin")
    cli.train(twin, *LONGER, epochs=6).ok()
    before = weights(own)
    child = cli.start("train", own, *LONGER, "--epochs", 6, "--threads", 0, *cli.TRAINING, before=SLOW)
    cli.wait_for(child, lambda: record(own)["extended"] == [4] and len(rows(own)) == 5)
    child.send_signal(signal.SIGTERM)
    assert cli.ended(child).code == 143
    assert weights(own) == before
    cli.call("predict", own, chest / "unseen" / "images", "--out", tmp_path / "masks", "--folds", "0", "--device", "cpu").ok()
    ran = cli.train(own, *LONGER, epochs=6).ok()
    assert "going on from step" in ran.out
    assert weights(own) == weights(twin) and record(own)["extended"] == [4]


def test_a_run_is_not_made_longer_by_accident(cli, own):
    before = weights(own)
    ran = cli.call("train", own, *LONGER, "--threads", 0, *cli.TRAINING)
    ran.refused("spec.epochs: 4 (in run.json), 1000 (wanted)", "--epochs 1000")
    cli.train(own, *LONGER, epochs=3).refused("spec.epochs: 4 (in run.json), 3 (wanted)")
    assert weights(own) == before


def test_a_time_budget_sets_the_length_and_is_resumed_with_the_time_left(cli, planned, tmp_path):
    work = cli.copied(planned, tmp_path / "work", runs=False)
    arguments = (*LONGER, "--time-budget", "20s", "--threads", 0, "--device", "cpu", "--precision", "fp32", *QUICK)
    ran = cli.call("train", work, *arguments).ok()
    assert "time budget 20 s" in ran.out and "epochs of" in ran.out
    spec = record(work)["spec"]
    assert len(rows(work)) == spec["epochs"] < 1000 and rows(work)[-1]["step"] == spec["epochs"] * spec["steps_per_epoch"]
    states = cli.states(work / "runs")
    cli.call("train", work, *arguments).ok()
    assert cli.states(work / "runs") == states


def test_a_time_budget_and_a_number_of_epochs_exclude_each_other(cli, planned):
    cli.call("train", planned, "--time-budget", "1h", "--epochs", 3).refused("--time-budget", "--epochs")
    cli.call("train", planned, "--time-budget", "soon").refused("6h", "'soon'")


def test_a_time_budget_that_cannot_be_kept_is_refused_with_one_that_can(cli, planned, tmp_path):
    work = cli.copied(planned, tmp_path / "work", runs=False)
    cli.call("train", work, *LONGER, "--time-budget", "2s", "--threads", 0, "--device", "cpu").refused("too short", "about")
    assert not (work / "runs" / "3d_fullres" / "fold_0").exists()
