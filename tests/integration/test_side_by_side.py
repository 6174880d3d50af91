"""Folds side by side, presets and trackers on the command line."""

from __future__ import annotations

import json
import signal

import pytest

SIDE = ("--config", "3d_fullres", "--folds", "0,1", "--devices", "cpu,cpu", "--threads", "0")


@pytest.fixture
def untrained(cli, planned, tmp_path):
    """A planned and preprocessed work folder of one's own."""
    return cli.copied(planned, tmp_path / "work", runs=False)


def own(cli):
    """Short training, without the device."""
    return [part for part in cli.TRAINING if part not in ("--device", "cpu")]


def run_folder(work, fold):
    return work / "runs" / "3d_fullres" / f"fold_{fold}"


def test_folds_side_by_side_stop_together_and_end_as_one_after_the_other(cli, untrained, trained):
    arguments = ("train", untrained, *SIDE, "--epochs", "4", *own(cli))
    child = cli.start(*arguments)
    cli.wait_for(child, lambda: all((run_folder(untrained, fold) / "run.json").exists() for fold in (0, 1)))
    child.send_signal(signal.SIGTERM)
    ran = cli.ended(child)
    assert ran.code == 143 and "Go on with: autoseg train" in ran.err and "Traceback" not in ran.out + ran.err
    assert "2 folds on cpu, cpu, 2 at a time" in ran.out
    assert any((run_folder(untrained, fold) / "resume").exists() for fold in (0, 1))
    ran = cli.call(*arguments).ok()
    for fold in (0, 1):
        assert f"[3d_fullres {fold} cpu] " in ran.out
        files = [run_folder(work, fold) / "weights.safetensors" for work in (untrained, trained)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert (run_folder(untrained, fold) / "validation" / "report.json").exists()
    before = cli.states(untrained / "runs")
    again = cli.call(*arguments).ok()
    assert cli.states(untrained / "runs") == before and "side" not in again.out and "[3d_fullres" not in again.out


def test_what_is_wrong_is_told_once_before_any_process_starts(cli, untrained):
    cli.call("train", untrained, *SIDE, "--device", "cpu").refused("exclude each other")
    cli.call("train", untrained, *SIDE, "--set", "loss.knd=x").refused("loss has no 'knd'")
    cli.call("train", untrained, *SIDE, "--config", "4d").refused("the plan has no configuration 4d")
    cli.train(untrained, "--preset", "fast").refused("unknown preset 'fast'; choose from standard, quick")
    cli.train(untrained, "--tracker", "excel").refused("unknown tracker 'excel'; choose from tensorboard, mlflow, wandb")
    assert not (untrained / "runs").exists()


def test_a_preset_is_what_settings_start_from_and_is_kept_resolved(cli, untrained):
    from autoseg.stages.settings import preset

    quick = preset("quick")
    fold = ("--config", "3d_fullres", "--folds", "0")
    cli.train(untrained, *fold, "--preset", "quick", "--set", "steps_per_epoch=2", epochs=2).ok()
    spec = json.loads((run_folder(untrained, 0) / "run.json").read_text())["spec"]
    assert spec["growth"]["kind"] == quick.growth.kind == "grow" and spec["epochs"] == 2
    assert quick != preset("standard") and "preset" not in spec
    plain = cli.train(untrained, *fold, "--set", "steps_per_epoch=2", epochs=2)
    plain.refused("spec.growth.kind: grow", "made with other settings")


def test_a_tracker_changes_nothing_but_where_numbers_go(cli, untrained, trained):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ran = cli.train(untrained, "--config", "3d_fullres", "--folds", "0", "--tracker", "tensorboard").ok()
    assert "tracker" not in ran.err
    weights = [run_folder(work, 0) / "weights.safetensors" for work in (untrained, trained)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    lines = [json.loads(line) for line in (run_folder(untrained, 0) / "metrics.jsonl").read_text().splitlines()]
    read = EventAccumulator(str(run_folder(untrained, 0) / "tensorboard")).Reload()
    assert [one.value for one in read.Scalars("loss/train")] == pytest.approx([line["train_loss"] for line in lines])
    assert {f"pseudo_dice/{name}" for name in lines[0]["pseudo_dice"]} <= set(read.Tags()["scalars"])
