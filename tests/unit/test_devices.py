"""Folds side by side: each device gets the next fold when it is free, failures stop nothing else, signals reach every process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoseg.errors import CasesFailed, RunError
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace
from autoseg.interrupts import Interrupted, Interrupts
from autoseg.logs import Silent
from autoseg.stages import devices
from autoseg.stages.devices import Wanted, pick_devices
from autoseg.stages.records import Options
from autoseg.stages.train import Arranged, Key
from autoseg.types.dataset import Split
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Plan
from autoseg.types.run import RunRecord, TrainSpec

PLAN = Plan(
    dataset_name="livers", planner="default", gpu_memory_gb=8, transpose_forward=(0, 1, 2), channels=("CT",),
    labels=Labels(foreground=(Label(name="liver", value=1),)), intensities=(), configurations={},
)


class Told(Silent):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str) -> None:
        self.lines.append(message)


def record(run: str, fold: int, previous: str | None = None) -> RunRecord:
    return RunRecord(name=run, configuration=run, fold=fold, spec=TrainSpec(), plan=PLAN, split=Split(train=("a",), val=("b",)),
                     data="d", device="cpu", previous=previous)


def crew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, folds: int = 4, places: Sequence[str] = ("cpu", "mps"),
    **options: Any,
) -> Any:
    """A crew whose processes run a Python script with `fold` and `device`."""
    records: dict[Key, RunRecord] = {("3d", fold): record("3d", fold) for fold in range(folds)}
    wanted = Wanted(None, None, None, TrainSpec(), Options(**options), ("--seed", "1"))
    arranged = Arranged(records, frozenset(records), None)
    made = devices._Crew(Workspace(tmp_path), wanted, arranged, list(places), dict(os.environ), Told(), Interrupts())

    def command(key: Key, device: str, budget: float | None) -> list[str]:
        text = f"fold, device, budget, folder = {key[1]}, {device!r}, {budget}, {str(tmp_path)!r}\nimport sys, time\n{script}"
        return [sys.executable, "-c", text]

    monkeypatch.setattr(made, "command", command, raising=False)
    return made


def keys(made: Any) -> list[Key]:
    return list(made.arranged.records)


def test_the_next_fold_goes_to_the_device_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = crew(tmp_path, monkeypatch, "print(f'{fold} on {device}', flush=True); time.sleep(1.2 if fold == 0 else 0.05)")
    made.work(keys(made), None)
    made.tell()
    assert made.done == 4
    assert sorted(made.reporter.lines) == [
        "[3d 0 cpu] 0 on cpu", "[3d 1 mps] 1 on mps", "[3d 2 mps] 2 on mps", "[3d 3 mps] 3 on mps"]


def test_a_fold_that_fails_is_told_at_the_end_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "print('error: no room' if fold == 1 else 'fine'); print('more'); sys.exit(2 if fold == 1 else 0)"
    made = crew(tmp_path, monkeypatch, script)
    made.work(keys(made), None)
    with pytest.raises(CasesFailed, match=r"(?s)1 of 4 folds failed:\n3d fold 1: ended with code 2 on \w+: no room$"):
        made.tell()


def test_when_every_fold_fails_the_error_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = crew(tmp_path, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", folds=2)
    made.work(keys(made), None)
    with pytest.raises(RunError, match="2 of 2 folds failed:\n3d fold 0: was ended by SIGKILL"):
        made.tell()


def test_failed_cases_are_not_a_failed_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = crew(tmp_path, monkeypatch, "sys.exit(3)", folds=1)
    made.work(keys(made), None)
    with pytest.raises(CasesFailed):
        made.tell()


def soon(do: Callable[[], object], when: Callable[[], bool]) -> None:
    """Do something in a thread as soon as something is so."""

    def wait() -> None:
        limit = time.monotonic() + 20
        while not when() and time.monotonic() < limit:
            time.sleep(0.01)
        do()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_processes_once_and_no_fold_begins_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    script = """
import signal, pathlib
def note(signum, frame):
    with open(f"{folder}/{fold}", "a") as file:
        file.write(f"{signum} ")
for one in (signal.SIGTERM, signal.SIGINT):
    signal.signal(one, note)
pathlib.Path(f"{folder}/{fold}").touch()
while not pathlib.Path(f"{folder}/{fold}").read_text():
    time.sleep(0.01)
time.sleep(0.4)
sys.exit(128 + 15)
"""
    made = crew(tmp_path, monkeypatch, script)
    there = lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists()  # noqa: E731
    soon(lambda: setattr(made.interrupts, "signum", int(kind)), there)
    with pytest.raises(Interrupted):
        made.work(keys(made), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == [f"{int(kind)} "] * 2 and not made.failures


def test_a_process_that_was_stopped_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = crew(tmp_path, monkeypatch, "sys.exit(143) if fold == 1 else time.sleep(60)")
    with pytest.raises(Interrupted) as caught:
        made.work(keys(made), None)
    assert caught.value.signum == signal.SIGTERM and not made.failures and not made.done


def test_a_second_signal_ends_processes_that_do_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LAST_SECONDS", 0.3)
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(f'{folder}/{fold}', 'w').close(); time.sleep(60)"
    made = crew(tmp_path, monkeypatch, script, folds=1)
    listen, calls = made._listen, []

    def again() -> object:
        calls.append(1)
        if (tmp_path / "0").exists():
            raise Interrupted(signal.SIGTERM)
        return listen()

    monkeypatch.setattr(made, "_listen", again)
    begin = time.monotonic()
    with pytest.raises(Interrupted):
        made.work(keys(made), None)
    assert time.monotonic() - begin < 30


def test_a_time_budget_is_divided_by_the_rounds_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = crew(tmp_path, monkeypatch, "print(round(budget, -1), flush=True)", folds=3)
    made.work(keys(made), time.monotonic() + 600, rounds_after=1)
    budgets = sorted(line.split()[-1] for line in made.reporter.lines)
    assert budgets == ["200.0", "300.0", "300.0"]


def test_every_process_is_given_one_fold_its_device_and_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 6)
    records: dict[Key, RunRecord] = {("low", 0): record("low", 0), ("mine", 1): record("high", 1, "low")}
    wanted = Wanted(["high"], [1], "mine", TrainSpec(), Options(restart=True), ("--set", "epochs=3"))
    arranged = Arranged(records, frozenset({("mine", 1)}), None)
    made = devices._Crew(Workspace(tmp_path), wanted, arranged, ["cuda:0", "cuda:1"], {}, Told(), Interrupts())
    command = made.command(("mine", 1), "cuda:1", None)
    assert command[1:] == ["-m", "autoseg.cli", "train", str(tmp_path), "--config", "high", "--folds", "1", "--device", "cuda:1",
                           "--set", "epochs=3", "--name", "mine", "--restart", "--threads", "3"]
    command = made.command(("low", 0), "cpu", 90.4)
    assert command[5:] == ["--config", "low", "--folds", "0", "--device", "cpu", "--set", "epochs=3", "--time-budget", "90s"]
    begun = made.arranged.records[("low", 0)].model_copy(update={"init": "hash of a model"})
    RunFolder(Workspace(tmp_path).fold("low", 0)).save_record(begun)
    made.arranged.records[("low", 0)] = begun
    assert "--init" not in made.command(("low", 0), "cpu", None)
    made.wanted = replace(wanted, options=Options(init=Path("model.zip")))
    assert made.command(("low", 0), "cpu", None)[-2:] == ["--init", "model.zip"]
    assert devices._divided({"A": "1"}, 4) == {"A": "1", "OMP_NUM_THREADS": "1"}
    assert devices._divided({"OMP_NUM_THREADS": "5"}, 2) == {"OMP_NUM_THREADS": "5"}


def test_a_process_for_one_fold_does_not_wait_for_others_that_a_launcher_started(tmp_path: Path) -> None:
    launched = {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1", "SLURM_PROCID": "0",
        "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7",
    }
    assert set(devices._divided(launched, 2)) == {"SLURM_JOB_ID", "OMP_NUM_THREADS"}
    wanted = Wanted(None, None, None, TrainSpec(), Options(), ())
    with pytest.raises(RunError, match="WORLD_SIZE says that 2 processes train one fold together"):
        devices.train_on(Workspace(tmp_path), wanted, ["cpu", "cpu"], launched, Told(), Interrupts())


def test_the_next_stage_is_not_begun_where_the_first_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = crew(tmp_path, monkeypatch, "pass", folds=0)
    made.arranged = Arranged({("high", 0): record("high", 0, "low"), ("high", 1): record("high", 1, "low")}, frozenset(), None)
    made.failures["low", 3] = "ended with code 2"
    assert made.prepared(keys(made)) == []
    assert made.failures["high", 1] == "not begun, since it needs low fold 3"


def test_the_first_stage_segments_once_for_all_folds_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr("autoseg.stages.cascade.prepare", lambda *given, **more: asked.append((*given[1:], more["device"])))
    made = crew(tmp_path, monkeypatch, "pass", folds=0)
    made.arranged = Arranged({("mine", fold): record("high", fold, "low") for fold in range(3)}, frozenset(), None)
    assert made.prepared(keys(made)) == keys(made) and asked == [("low", "high", "cpu")]


def test_devices_are_numbers_or_names_and_all_cuda_devices_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_devices(None, "auto") == ["cuda:0", "cuda:1"] and pick_devices(None, "cuda:1") == ["cuda:1"]
    assert pick_devices(None, "cpu") == ["cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_devices(None, "auto") == ["auto"]
    assert pick_devices("cpu, cpu", "auto") == ["cpu", "cpu"]
    asked: list[str] = []
    monkeypatch.setattr("autoseg.networks.hardware.pick_device", asked.append)
    with pytest.raises(RunError, match="'cuda:0' cannot be used here: there is no CUDA device"):
        pick_devices("0", "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_devices("0,1,cuda:1,cpu", "auto") == ["cuda:0", "cuda:1", "cuda:1", "cpu"]
    assert asked == ["cpu"], "trying a CUDA device takes memory on it"
    with pytest.raises(RunError, match="'cuda:2' cannot be used here: there are 2 CUDA devices"):
        pick_devices("0,2", "auto")


@pytest.mark.parametrize(("text", "device", "message"), [
    ("0,1", "cuda", "exclude each other"),
    ("cpu,,cpu", "auto", "--devices takes numbers or names"),
    ("tpu", "auto", "device 'tpu' cannot be used here"),
])
def test_devices_that_make_no_sense_are_refused(text: str, device: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        pick_devices(text, device)
