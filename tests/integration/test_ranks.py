"""One run over two processes: what it computes is what one process computes, and it can be stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from autoseg.errors import RunError
from autoseg.files.runs import RunFolder
from autoseg.stages.together import join_ranks
from autoseg.trainers.ranks import Ranks

STEPS = ("--config", "3d_fullres", "--folds", "0", "--epochs", "20", "--precision", "fp32", "--device", "cpu", "--threads", "0",
         "--set", "steps_per_epoch=1", "--set", "val_steps=1", "--set", "batch_size=3")


@pytest.fixture
def untrained(cli, planned, tmp_path):
    return cli.copied(planned, tmp_path / "work", runs=False)


def start_two(*arguments):
    """`train` in two processes that meet on a free port."""
    return start([sys.executable, "-m", "autoseg.cli", "train", *map(str, arguments)])


def start(command):
    """A command in two processes that meet on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]


def finish(processes):
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize("loss", ["dice_ce", "dice_ce over the batch"])
def test_two_ranks_take_the_steps_of_one_process(cli, untrained, loss):
    own = ("--set", "loss.options.dice=2") if loss == "dice_ce" else ()
    cli.call("train", untrained, "--name", "alone", *STEPS, *own).ok()
    codes, outputs = finish(start_two(untrained, "--name", "both", *STEPS, *own))
    assert codes == [0, 0], outputs
    alone, both = (RunFolder(untrained / "runs" / name / "fold_0") for name in ("alone", "both"))
    for one, two in zip(alone.metrics(), both.metrics(), strict=True):
        assert one.step == two.step
        assert two.train_loss == pytest.approx(one.train_loss, abs=1e-4)
        assert two.val_loss == pytest.approx(one.val_loss, abs=1e-3)
    assert (both.validation / "report.json").exists()
    assert "saved" not in outputs[1] and "epoch" not in outputs[1], "only the first process tells"


def test_two_ranks_stop_after_the_same_step_and_go_on(cli, untrained):
    steps = ("--set", "steps_per_epoch=10", "--epochs", "12")
    processes = start_two(untrained, *STEPS, *steps)
    metrics = untrained / "runs" / "3d_fullres" / "fold_0" / "metrics.jsonl"
    begin = time.monotonic()
    while not metrics.exists() and time.monotonic() - begin < 120:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # whichever of them is asked
    codes, outputs = finish(processes)
    assert codes == [143, 143], outputs
    folder = RunFolder(untrained / "runs" / "3d_fullres" / "fold_0")
    assert 0 < folder.checkpoint_step() < 120
    codes, outputs = finish(start_two(untrained, *STEPS, *steps))
    assert codes == [0, 0], outputs
    assert "going on from step" in outputs[0]
    tensors = load_file(folder.weights_path)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


TOGETHER = """
import dataclasses, json, os, sys
from pathlib import Path
from types import SimpleNamespace
import torch
sys.path.insert(0, sys.argv[1])
from test_training import Squares, job, out_of_memory_above
from autoseg.errors import AutosegError, RunError
from autoseg.files.runs import RunFolder
from autoseg.stages.fold import _go_on_alike
from autoseg.trainers.default import Training
from autoseg.trainers.ranks import join

rank, found = int(os.environ["RANK"]), {}
ranks = join(rank, 2, torch.device("cpu"))

def told(do):
    try:
        return do()
    except Exception as error:
        return [type(error).__name__, str(error)]

def failing(error):
    def do():
        if rank == 1 and error is not None:
            raise error
        return "done"
    return lambda: ranks.together("do it", do)

def training(**more):
    return Training(dataclasses.replace(job(epochs=1, **more), ranks=ranks))

errors = {"none": None, "memory": RuntimeError("CUDA error: out of memory"), "other": ImportError("no compiler"),
          "user": RunError("case a")}
found["together"] = {name: told(failing(error)) for name, error in errors.items()}

short = training()
if rank == 1:
    out_of_memory_above(short, 1)
losses = [epoch.train_loss for epoch in short.run()]
found["split"] = [short.micro_batch, losses]

class Gone(Squares):
    reads = 0
    def read_image(self, box):
        Gone.reads += 1
        if rank == 1 and Gone.reads > 3:
            raise AutosegError("case squares0 is damaged")
        return super().read_image(box)

reading = training(cases=[Gone(0)])
found["reading"] = [told(lambda: list(reading.run())), reading.step]

record = SimpleNamespace(name="r", extended=(), data="")
folder = RunFolder(Path(sys.argv[2]) / str(rank) / "runs" / "r" / "fold_0")
apart = training()
next(apart.network.parameters()).data.add_(rank)
found["fresh"] = _go_on_alike(apart, folder, record, "r fold 0")
found["weights"] = float(sum(value.double().sum() for value in apart.network.state_dict().values()))
found["good"] = float(sum(value.double().sum() for value in apart.good.values()))
if rank == 1:
    apart.epoch = 1
    state = apart.state()
    folder.save_checkpoint(3, state.tensors, state.numbers)
found["steps"] = told(lambda: _go_on_alike(training(), folder, record, "r fold 0"))
Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(found))
ranks.__exit__()
"""


@pytest.fixture(scope="module")
def both_told(tmp_path_factory):
    """What each of two processes met in which something fails on the second alone."""
    folder = tmp_path_factory.mktemp("together")
    codes, outputs = finish(start([sys.executable, "-c", TOGETHER, str(Path(__file__).parents[1] / "unit"), str(folder)]))
    assert codes == [0, 0], outputs
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_what_fails_on_one_fails_on_all_and_none_waits_for_another(both_told):
    first, second = (told["together"] for told in both_told)
    assert first == {
        "none": "done",
        "memory": ["OutOfMemoryError", "another process could not do it; its message says why (out of memory)"],
        "other": ["RuntimeError", "another process could not do it; its message says why"],
        "user": ["RunError", "another process could not do it; its message says why"],
    }
    assert second == {"none": "done", "memory": ["RuntimeError", "CUDA error: out of memory"],
                      "other": ["ImportError", "no compiler"], "user": ["RunError", "case a"]}


def test_where_one_runs_out_of_memory_all_split_and_the_losses_stay_what_they_are(both_told):
    splits = [told["split"] for told in both_told]
    assert splits[0] == splits[1] and splits[0][0] == 1
    sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
    try:
        from test_training import Training, job
    finally:
        sys.path.pop(0)
    (alone,) = Training(job(epochs=1)).run()
    assert splits[0][1] == [pytest.approx(alone.train_loss, abs=1e-5)]


def test_a_case_that_one_cannot_read_ends_all_after_the_same_step(both_told):
    (first, step), (second, other_step) = (told["reading"] for told in both_told)
    assert first == ["RunError", "another process could not read its part of a batch; its message says why"]
    assert second == ["AutosegError", "case squares0 is damaged"] and step == other_step == 1


def test_all_begin_with_the_first_ones_weights_and_at_the_same_step(both_told):
    for key in ("weights", "good"):
        assert both_told[0][key] == both_told[1][key] == both_told[0]["weights"]
    for rank, told in enumerate(both_told):
        assert told["fresh"] is False and told["steps"][0] == "RunError"
        assert f"would go on from different steps, 0 and 3, here {3 * rank}" in told["steps"][1]
        assert "the work folder must be the same one for all of them" in told["steps"][1]


def test_parts_of_a_batch_cover_it_once():
    for size in range(2, 12):
        for world in range(1, size + 1):
            seen = [sample for rank in range(world) for sample in range(size)[Ranks(rank, world).part(size)]]
            assert seen == list(range(size))


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(ValueError, match="cannot be divided"):
        Ranks(0, 3).part(2)


def test_alone_nothing_is_joined_and_a_missing_meeting_point_is_named():
    assert join_ranks({}, "cpu") == (None, "cpu")
    assert join_ranks({"RANK": "0", "WORLD_SIZE": "1"}, "cpu") == (None, "cpu")
    assert join_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "cpu") == (None, "cpu")
    with pytest.raises(RunError, match="MASTER_PORT is not set"):
        join_ranks({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, "cpu")
