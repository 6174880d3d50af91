"""One run over two processes: what it computes is what one process computes, and it can be stopped and gone on with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "autoseg.cli", "train", *map(str, arguments)]
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
