"""Training on the command line: what it leaves, what it refuses, and going on after every kind of interruption."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal

import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file

RUN_FILES = {"run.json", "metrics.jsonl", "weights.safetensors", "weights_best.safetensors", "progress.png", "validation"}
METRIC_KEYS = {"epoch", "step", "train_loss", "val_loss", "pseudo_dice", "learning_rate", "seconds", "data_wait", "skipped"}
SLOW = """
import time
import autoseg.stages.train, autoseg.trainers.default
step = autoseg.trainers.default.Training.train_step
def slow(self, batch):
    time.sleep(0.02)
    return step(self, batch)
autoseg.trainers.default.Training.train_step = slow
"""
OFTEN = SLOW + "import autoseg.stages.fold\nautoseg.stages.fold.CHECKPOINT_SECONDS = 0\n"
DIE = """
import os, signal
flush = os.fsync
def dying(handle):
    if {name!r} in os.readlink(f"/proc/self/fd/{{handle}}"):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(handle)
os.fsync = dying
"""
FOLD = ("--config", "3d_fullres", "--folds", "0", "--epochs", "4")


@pytest.fixture
def untrained(cli, planned, tmp_path):
    """A planned and preprocessed work folder of one's own."""
    return cli.copied(planned, tmp_path / "work", runs=False)


@pytest.fixture
def own(cli, trained, tmp_path):
    """A trained work folder of one's own."""
    return cli.copied(trained, tmp_path / "work")


def fold_files(work, fold=0, run="3d_fullres"):
    """Files and folders of a fold; looks at whole cases may or may not have had time."""
    found = {p.name for p in (work / "runs" / run / f"fold_{fold}").iterdir() if not p.name.startswith(".")}
    return found - {"midway.jsonl"}


def weights(work, fold=0, run="3d_fullres"):
    return (work / "runs" / run / f"fold_{fold}" / "weights.safetensors").read_bytes()


def test_a_finished_fold_leaves_the_promised_files(trained):
    assert sorted(p.name for p in (trained / "runs" / "3d_fullres").iterdir()) == ["fold_0", "fold_1"]
    for fold in (0, 1):
        folder = trained / "runs" / "3d_fullres" / f"fold_{fold}"
        assert fold_files(trained, fold) == RUN_FILES
        record = json.loads((folder / "run.json").read_text())
        assert record["fold"] == fold and record["configuration"] == "3d_fullres" and record["spec"]["epochs"] == 4
        assert record["split"] == json.loads((trained / "splits.json").read_text())[fold]
        assert list(record["plan"]["configurations"]) == ["3d_fullres"]
        tensors = load_file(folder / "weights.safetensors")
        assert tensors and all(np.isfinite(tensor).all() for tensor in tensors.values())
        picture = PIL.Image.open(folder / "progress.png")
        assert picture.format == "PNG" and min(picture.size) > 200
        masks = {p.name for p in (folder / "validation").glob("*.nii.gz")}
        assert masks == {f"{case}.nii.gz" for case in record["split"]["val"]}
        report = json.loads((folder / "validation" / "report.json").read_text())
        assert [case["case"] for case in report["cases"]] == list(record["split"]["val"])
        assert set(report["mean"]) == {"lungs", "heart", "spine", "nodule"}
    assert weights(trained, 0) != weights(trained, 1)


def test_the_metrics_are_one_object_per_epoch(trained):
    lines = (trained / "runs" / "3d_fullres" / "fold_0" / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2, 3] and [epoch["step"] for epoch in epochs] == [15, 30, 45, 60]
    for epoch in epochs:
        assert set(epoch) == METRIC_KEYS
        assert math.isfinite(epoch["train_loss"]) and math.isfinite(epoch["val_loss"])
        assert set(epoch["pseudo_dice"]) == {"lungs", "heart", "spine", "nodule"}
        assert epoch["seconds"] > 0 and 0 <= epoch["data_wait"] <= 1
    rates = [epoch["learning_rate"] for epoch in epochs]
    assert rates == sorted(rates, reverse=True) and rates[0] < 0.01 and rates[-1] < 0.001
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


def test_training_says_first_how_long_it_will_take(cli, untrained):
    ran = cli.train(untrained, "--config", "2d", "--folds", "0", epochs=1).ok()
    told = re.search(r"about .* per fold, .* for 1 fold", ran.out)
    assert told and told.start() < ran.out.index("2d fold 0: 15/15 steps")
    assert "2d fold 0: mean foreground Dice" in ran.out
    assert fold_files(untrained, run="2d") == RUN_FILES


def test_the_same_command_again_does_nothing_new(cli, own):
    before = cli.states(own)
    cli.train(own, "--config", "3d_fullres", "--folds", "0,1").ok()
    assert cli.states(own) == before


def test_reader_threads_change_nothing_and_more_folds_leave_finished_ones_alone(cli, own):
    before = cli.states(own / "runs")
    ran = cli.call("train", own, "--config", "3d_fullres", "--folds", "all", "--epochs", 4, "--threads", 2, *cli.TRAINING).ok()
    after = cli.states(own / "runs")
    assert {name: after[name] for name in before} == before
    assert sorted({name.split("/")[1] for name in after if name not in before}) == ["fold_2", "fold_3"]
    assert "fold 0: 60/60" not in ran.out and "fold 3: 60/60" in ran.out
    cli.call("train", own, "--config", "3d_fullres", "--folds", "0", "--epochs", 4, "--threads", 2, "--name", "twin",
             *cli.TRAINING).ok()
    assert weights(own, run="twin") == weights(own)


def test_another_seed_gives_another_network(cli, own):
    cli.train(own, "--config", "3d_fullres", "--folds", "0", "--seed", "1", "--name", "seeded").ok()
    assert weights(own, run="seeded") != weights(own)


def test_a_run_with_other_settings_is_refused_with_the_difference_and_the_ways_out(cli, own):
    before = cli.states(own)
    other = ("--config", "3d_fullres", "--folds", "0,1")
    ran = cli.train(own, *other, epochs=3)
    ran.refused("run '3d_fullres' fold 0", "spec.epochs: 4 (in run.json), 3 (wanted)", "--name", "--restart")
    cli.train(own, *other, "--set", "loss.options.weight=2").refused("spec.loss.options")
    cli.train(own, *other, "--seed", 3).refused("spec.seed: 0 (in run.json), 3 (wanted)")
    cli.edit(own / "plan.json", lambda plan: plan["configurations"]["3d_fullres"].update(batch_dice=True))
    cli.train(own, *other).refused("plan.configurations.3d_fullres.batch_dice: False (in run.json), True (wanted)")
    (own / "plan.json").write_bytes((own / "plan.json").read_bytes().replace(b'"batch_dice": true', b'"batch_dice": false'))
    after = cli.states(own)
    assert {name: state for name, state in after.items() if name != "plan.json"} == {
        name: state for name, state in before.items() if name != "plan.json"}


def test_a_changed_fold_is_a_difference(cli, own):
    splits = json.loads((own / "splits.json").read_text())
    splits[0]["train"].pop()
    (own / "splits.json").write_text(json.dumps(splits))
    cli.train(own, "--config", "3d_fullres", "--folds", "0").refused("split.train", "--name", "--restart")


def test_another_name_trains_beside_and_restart_replaces(cli, own):
    before, old = cli.states(own / "runs"), weights(own)
    cli.train(own, "--config", "3d_fullres", "--folds", "0", "--name", "short", epochs=1).ok()
    assert {name: state for name, state in cli.states(own / "runs").items() if not name.startswith("short")} == before
    assert fold_files(own, run="short") == RUN_FILES
    cli.train(own, "--config", "3d_fullres", "--folds", "0", "--restart", epochs=1).ok()
    assert weights(own, 0) != old and weights(own) == weights(own, run="short")
    after = cli.states(own / "runs")
    assert {n: s for n, s in after.items() if "fold_1" in n} == {n: s for n, s in before.items() if "fold_1" in n}


@pytest.mark.parametrize(("setting", "parts"), [
    ("epochs", ("key=value", "'epochs'")),
    ("=3", ("key=value",)),
    ("nonsense=1", ("nonsense", "epochs, steps_per_epoch")),
    ("loss.nonsense=1", ("loss has no 'nonsense'", "kind, options")),
    ("epochs.deeper=1", ("epochs has no 'deeper'",)),
    ("optimizer.lr=fast", ("optimizer.lr", "number", "fast")),
    ("optimizer.lr=-1", ("optimizer.lr", "greater than 0")),
    ("optimizer=adamw", ("optimizer",)),
    ("steps_per_epoch=0", ("steps_per_epoch", "greater than or equal to 1")),
    ("val_steps=2.5", ("val_steps", "2.5")),
    ("sampler.foreground=2", ("sampler.foreground",)),
    ("augment.mirror=[5]", ("augment.mirror", "5")),
    ("optimizer.kind=nonsense", ("nonsense", "sgd", "adamw")),
    ("loss.kind=nonsense", ("nonsense", "dice_ce")),
    ("loss.kind=no_such_module:Loss", ("no_such_module",)),
    ("loss.kind=json:Nonsense", ("Nonsense",)),
    ("schedule.kind=nonsense", ("nonsense", "polynomial")),
    ("augment.kind=nonsense", ("nonsense", "default")),
    ("sampler.kind=nonsense", ("nonsense", "reference")),
])
def test_a_wrong_setting_is_refused_before_anything_is_trained(cli, untrained, setting, parts):
    cli.train(untrained, "--config", "3d_fullres", "--folds", "0", "--set", setting, epochs=1).refused(*parts)
    assert not (untrained / "runs").exists()


@pytest.mark.parametrize(("arguments", "parts"), [
    (("--folds", "9"), ("folds 0 to 3", "9")),
    (("--folds", "-1"), ("-1",)),
    (("--folds", "0,x"), ("--folds", "0,x")),
    (("--folds", ""), ("--folds",)),
    (("--config", "4d"), ("4d", "3d_fullres")),
    (("--name", "both"), ("--name", "--config")),
    (("--device", "abacus"), ("abacus", "cpu")),
    (("--precision", "fp8"), ("precision", "fp8")),
    (("--epochs", "0"), ("--epochs",)),
    (("--no-such-flag",), ("--no-such-flag",)),
])
def test_a_wrong_argument_is_refused_before_anything_is_trained(cli, untrained, arguments, parts):
    cli.train(untrained, *arguments, epochs=1).refused(*parts)
    assert not (untrained / "runs").exists() and not (untrained / "elsewhere").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "", "_ensembles", ".hidden"])
def test_a_run_name_must_be_a_plain_folder_name(cli, untrained, name):
    cli.train(untrained, "--config", "2d", "--folds", "0", "--name", name, epochs=1).refused("--name", name)
    assert not (untrained / "runs").exists() and not (untrained / "elsewhere").exists()


def test_a_restart_that_cannot_begin_keeps_what_is_there(cli, own):
    before = cli.states(own)
    for setting in ("loss.kind=nonsense", "optimizer.kind=nonsense"):
        cli.train(own, "--config", "3d_fullres", "--folds", "0", "--restart", "--set", setting).refused("nonsense")
    assert cli.states(own) == before


def test_a_loss_that_explodes_ends_with_a_message(cli, untrained):
    ran = cli.train(untrained, "--config", "3d_fullres", "--folds", "0", "--set", "optimizer.lr=1e30", epochs=1)
    ran.refused("the loss became", "step", "chest00", "optimizer.lr")
    assert not (untrained / "runs" / "3d_fullres" / "fold_0" / "weights.safetensors").exists()


def test_a_lost_validation_is_done_again_alone(cli, own):
    folder = own / "runs" / "3d_fullres" / "fold_0"
    before, masks = cli.states(folder), {p.name: p.read_bytes() for p in (folder / "validation").glob("*.nii.gz")}
    report = json.loads((folder / "validation" / "report.json").read_text())
    shutil.rmtree(folder / "validation")
    cli.train(own, "--config", "3d_fullres", "--folds", "0,1").ok()
    after = cli.states(folder)
    assert {n: s for n, s in after.items() if "validation" not in n} == {n: s for n, s in before.items() if "validation" not in n}
    assert {p.name: p.read_bytes() for p in (folder / "validation").glob("*.nii.gz")} == masks
    assert json.loads((folder / "validation" / "report.json").read_text()) == report


def test_damaged_preprocessed_cases_are_made_again(cli, untrained, trained):
    store = untrained / "preprocessed" / "3d_fullres"
    whole = (store / "chest001" / "image.b2nd").read_bytes()
    (store / "chest001" / "image.b2nd").write_bytes(whole[: len(whole) // 2])
    (store / "chest002" / "case.json").write_text("{")
    shutil.rmtree(store / "chest003")
    cli.train(untrained, "--config", "3d_fullres", "--folds", "0").ok()
    assert weights(untrained) == weights(trained)


def test_a_damaged_run_record_is_named(cli, own):
    path = own / "runs" / "3d_fullres" / "fold_0" / "run.json"
    cli.edit(path, lambda record: record["spec"].update(epochs="many"))
    cli.train(own, "--config", "3d_fullres", "--folds", "0").refused(str(path), "spec.epochs", "many")


def test_a_killed_training_goes_on_and_ends_as_if_undisturbed(cli, untrained, trained):
    folder = untrained / "runs" / "3d_fullres" / "fold_0"
    command = ("train", untrained, *FOLD, "--threads", "1", *cli.TRAINING)
    child = cli.start(*command, before=OFTEN)
    cli.wait_for(child, lambda: any((folder / "resume").glob("step_*")))
    child.kill()
    assert cli.ended(child).code == -signal.SIGKILL
    for name in ("state", "metrics", "weights"):  # killed again while each of these files is being written
        ran = cli.spawn(*command, before=OFTEN + DIE.format(name=name))
        assert ran.code == -signal.SIGKILL, ran.err
        assert not (folder / "weights.safetensors").exists()
    newest = max((folder / "resume").glob("step_*"))
    (newest / "tensors.safetensors").write_bytes(b"torn")
    ran = cli.call(*command).ok()
    going = re.search(r"going on from step (\d+) of 60", ran.out)
    assert going and 0 < int(going[1]) < 60
    assert weights(untrained) == weights(trained)
    assert fold_files(untrained) == RUN_FILES
    mine, other = ([json.loads(line) for line in (work / "runs/3d_fullres/fold_0/metrics.jsonl").read_text().splitlines()]
                   for work in (untrained, trained))
    for epoch in (*mine, *other):
        del epoch["seconds"], epoch["data_wait"]
    assert mine == other
    masks = [{p.name: p.read_bytes() for p in (work / "runs/3d_fullres/fold_0/validation").glob("*.nii.gz")}
             for work in (untrained, trained)]
    assert masks[0] == masks[1] and masks[0]
    cli.call("select", untrained).ok()


def test_a_killed_restart_does_not_come_back_with_old_results(cli, own):
    folder = own / "runs" / "3d_fullres" / "fold_0"
    old = weights(own)
    command = ("train", own, *FOLD[:-1], "1", "--restart", "--threads", "0", *cli.TRAINING)
    ran = cli.spawn(*command, before=DIE.format(name="metrics"))
    assert ran.code == -signal.SIGKILL
    assert not (folder / "validation").exists() and not (folder / "weights.safetensors").exists()
    cli.train(own, *FOLD[:-2], epochs=1).ok()
    assert weights(own) != old and len((folder / "metrics.jsonl").read_text().splitlines()) == 1


def test_an_interrupted_training_saves_its_state_and_says_how_to_go_on(cli, untrained, trained):
    folder = untrained / "runs" / "3d_fullres" / "fold_0"
    arguments = ["train", str(untrained), *FOLD, "--threads", "1", *cli.TRAINING]
    for kind, code, epochs in ((signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 2)):
        child = cli.start(*arguments, before=SLOW)
        path = folder / "metrics.jsonl"
        cli.wait_for(child, lambda path=path, epochs=epochs: path.exists() and path.read_text().count("\n") == epochs)
        child.send_signal(kind)
        ran = cli.ended(child)
        assert ran.code == code and "Traceback" not in ran.err
        found = re.search(r"saved\. Go on with: (autoseg .*)", ran.err)
        assert found, ran.err
        arguments = shlex.split(found[1])[1:]
        assert arguments == ["train", str(untrained), *FOLD, "--threads", "1", *cli.TRAINING]
    ran = cli.call(*arguments).ok()
    assert "going on from step" in ran.out
    assert weights(untrained) == weights(trained)


def test_the_command_that_goes_on_after_a_restart_does_not_restart(cli, own):
    child = cli.start("train", own, *FOLD, "--restart", *cli.TRAINING, before=SLOW)
    folder = own / "runs" / "3d_fullres" / "fold_0"
    cli.wait_for(child, lambda: (folder / "run.json").exists() and not (folder / "weights.safetensors").exists())
    child.send_signal(signal.SIGTERM)
    ran = cli.ended(child)
    assert ran.code == 143 and "Go on with: autoseg train" in ran.err and "--restart" not in ran.err


def test_a_signal_during_the_last_step_is_heard_before_validation(untrained):
    from autoseg.files.workspace import Workspace
    from autoseg.interrupts import Interrupted, Interrupts
    from autoseg.logs import Silent
    from autoseg.stages.train import Options
    from autoseg.stages.train import train as train_stage
    from autoseg.types.run import TrainSpec

    interrupts = Interrupts()

    class Pressing(Silent):
        def __init__(self):
            self.done = 0

        def task(self, name, total, unit="cases"):
            self.total = total
            return self

        def advance(self, steps=1, note=""):
            self.done += steps
            if self.total == 3 and self.done >= 3:
                interrupts.signum = signal.SIGINT

        def __enter__(self):
            self.done = 0
            return self

        def __exit__(self, *rest):
            return None

    spec = TrainSpec(epochs=1, steps_per_epoch=3, val_steps=1, precision="fp32")
    with pytest.raises(Interrupted):
        train_stage(Workspace(untrained), ["3d_fullres"], [0], None, spec, Options("cpu", 0), Pressing(), interrupts)
    assert not (untrained / "runs" / "3d_fullres" / "fold_0" / "validation" / "report.json").exists()
