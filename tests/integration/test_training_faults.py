"""Planted faults: whatever goes wrong during training, one clear message says so, and after repair the run goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

RUN = ("--config", "3d_fullres", "--folds", "0", "--epochs", "2", "--threads", "0", "--set", "steps_per_epoch=6", "--set",
       "val_steps=1", "--set", "optimizer.kind=adamw", "--set", "optimizer.lr=0.01", "--precision", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def undisturbed(cli, planned, tmp_path_factory):
    """The weights of a run in which nothing happened."""
    work = cli.copied(planned, tmp_path_factory.mktemp("undisturbed") / "work")
    train(cli, work).ok()
    return fold(work).joinpath("weights.safetensors").read_bytes()


@pytest.fixture
def work(cli, planned, tmp_path):
    return cli.copied(planned, tmp_path / "work")


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Save and look for stop files after every step."""
    monkeypatch.setattr("autoseg.stages.fold.CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr("autoseg.stages.fold.CHECKPOINT_COST", 0.0)
    monkeypatch.setattr("autoseg.stages.fold.STOP_SECONDS", -1.0)


def train(cli, work):
    """Train as a new process would, which has heard no signal yet."""
    from autoseg.cli.app import interrupts

    interrupts.signum = None
    return cli.call("train", work, *RUN)


def fold(work):
    return work / "runs" / "3d_fullres" / "fold_0"


def checkpoints(work):
    return sorted(p.name for p in (fold(work) / "resume").iterdir())


def at_step(monkeypatch, number, act):
    """Let something happen before the training step of that number, once."""
    from autoseg.trainers.default import Training

    step, done = Training.train_step, []

    def stepping(self, batch):
        if self.step == number and not done and self.job.spec.epochs == 2 and self.step_in_epoch == number % 6:
            done.append(1)
            act()
        return step(self, batch)

    monkeypatch.setattr(Training, "train_step", stepping)


def ends_as_undisturbed(cli, work, undisturbed):
    train(cli, work).ok()
    assert fold(work).joinpath("weights.safetensors").read_bytes() == undisturbed
    found = {p.name for p in fold(work).iterdir()} - {"midway.jsonl"}
    assert found == {"run.json", "metrics.jsonl", "weights.safetensors", "weights_best.safetensors", "progress.png", "validation"}


def rewrite(case, change):
    """Alter the image of a preprocessed case in a way that its record does not show."""
    import blosc2

    path = case / "image.b2nd"
    array = blosc2.open(str(path), mode="r")[...]
    meta = blosc2.open(str(path), mode="r")
    change(array)
    path.unlink()
    blosc2.asarray(array, urlpath=str(path), chunks=meta.chunks, blocks=meta.blocks, mode="w")
    record = json.loads((case / "case.json").read_text())
    record["files"]["image.b2nd"] = path.stat().st_size
    (case / "case.json").write_text(json.dumps(record))


def test_images_that_hold_nan_are_named_and_mended_and_the_run_goes_on(cli, work):
    split = json.loads((work / "splits.json").read_text())[0]
    cases = [work / "preprocessed" / "3d_fullres" / name for name in split["train"][:2]]
    for case in cases:
        rewrite(case, lambda image: image.fill(np.nan))
    ran = train(cli, work).refused("NaN or infinite", *map(str, cases), "same command", "is saved at step")
    assert all(f"case {case.name}: its preprocessed image holds NaN" in ran.err for case in cases)
    for case in cases:
        shutil.rmtree(case)
    assert "going on from step" in train(cli, work).ok().out
    rows = [json.loads(line) for line in (fold(work) / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["skipped"] for row in rows) >= 2
    assert all(np.isfinite(tensor).all() for tensor in load_file(fold(work) / "weights.safetensors").values())


def test_a_preprocessed_file_that_vanishes_is_named_and_the_run_goes_on_after_repair(cli, work, undisturbed, monkeypatch):
    split = json.loads((work / "splits.json").read_text())[0]
    cases = [work / "preprocessed" / "3d_fullres" / name for name in split["train"]]
    at_step(monkeypatch, 4, lambda: [(case / "image.b2nd").unlink() for case in cases])
    ran = train(cli, work).refused("image.b2nd", "autoseg preprocess", "the same command goes on from there")
    assert any(case.name in ran.err for case in cases) and len(ran.err.strip().splitlines()) == 1
    assert "step_000000005" in checkpoints(work)
    ends_as_undisturbed(cli, work, undisturbed)


def test_a_class_that_no_training_case_holds_is_told_at_the_start(cli, work):
    for path in (work / "preprocessed" / "3d_fullres").glob("*/case.json"):
        cli.edit(path, lambda record: record["locations"].pop("4", None))
    ran = train(cli, work).ok()
    assert "none of the 3 training cases holds nodule" in ran.err


@pytest.mark.parametrize("place", ["work", "fold"])
def test_a_stop_file_ends_the_run_cleanly_with_a_network_to_look_at(cli, work, undisturbed, monkeypatch, place):
    path = work / "stop" if place == "work" else fold(work) / "stop"
    at_step(monkeypatch, 8, path.touch)
    ran = train(cli, work)
    assert ran.code == 143 and "Go on with: autoseg train" in ran.err and "a file named stop" in ran.out
    so_far = fold(work) / "weights_so_far.safetensors"
    assert "stopped after step 9 of 12" in ran.out and "--folds 0" in ran.out
    assert not path.exists() and checkpoints(work)[-1] == "step_000000009"
    assert load_file(so_far).keys() == load_file(fold(work) / "weights_best.safetensors").keys()
    if place == "work":
        image = json.loads((work / "dataset.json").read_text())["cases"][0]["images"][0]
        masks = work / "masks"
        cli.call("predict", work, image, "--out", masks).refused("no finished training")
        told = cli.call("predict", work, image, "--out", masks, "--folds", "0", "--no-mirror").ok()
        assert "as they were when training was stopped" in told.err and len(list(masks.glob("*.nii.gz"))) == 1
        shutil.rmtree(masks)
    ends_as_undisturbed(cli, work, undisturbed)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_in_the_middle_of_a_save_leaves_whole_checkpoints(cli, work, undisturbed, monkeypatch, signals):
    from autoseg.files import runs

    write, sent = runs.write_text, []

    def signalled(path, text):
        if path.parent.name == ".step_4" and not sent:
            sent.append(1)
            for _ in range(signals):
                signal.raise_signal(signal.SIGTERM)
        write(path, text)

    monkeypatch.setattr(runs, "write_text", signalled)
    ran = train(cli, work)
    assert ran.code == 143 and "Go on with: autoseg train" in ran.err and "Traceback" not in ran.err
    assert checkpoints(work)[-1] == ("step_000000005" if signals == 1 else "step_000000003")
    ends_as_undisturbed(cli, work, undisturbed)


def test_a_disk_that_fills_up_is_told_with_what_is_missing_and_older_checkpoints_stay(cli, work, undisturbed, monkeypatch):
    from autoseg.files import runs

    save = runs.save_tensors

    def full(path, tensors, metadata=None):
        path.write_bytes(b"torn")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    at_step(monkeypatch, 5, lambda: monkeypatch.setattr(runs, "save_tensors", full))
    ran = train(cli, work).refused("is full", "MB are needed", "MB are free", "free some space", "same command")
    assert len(ran.err.strip().splitlines()) == 1
    assert checkpoints(work) == ["step_000000004", "step_000000005"]
    monkeypatch.setattr(runs, "save_tensors", save)
    ends_as_undisturbed(cli, work, undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB in memory; skipped where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", place], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=False, capture_output=True, timeout=20)


def test_a_really_full_disk_ends_the_run_and_space_lets_it_go_on(cli, planned, small_disk, undisturbed, monkeypatch):
    work = cli.copied(planned, small_disk / "work")
    filler = small_disk / "filler"

    def fill():
        with filler.open("wb") as file:
            file.write(b"x" * (shutil.disk_usage(small_disk).free - 20_000))

    at_step(monkeypatch, 5, fill)
    ran = train(cli, work).refused("is full", "MB are needed, 0.", "MB are free", "same command")
    assert "Traceback" not in ran.err
    kept = checkpoints(work)
    assert kept and all(name.startswith("step_") for name in kept)
    assert not list(fold(work).rglob(".*"))
    filler.unlink()
    ends_as_undisturbed(cli, work, undisturbed)
