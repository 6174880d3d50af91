"""Trackers: every number of an epoch arrives, a run that goes on stays one run, and a failing tracker stops nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from autoseg.errors import RunError
from autoseg.logs import Silent
from autoseg.stages.trackers import Trackers, numbers, parameters, require_trackers
from autoseg.types.dataset import Split
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Plan
from autoseg.types.run import EpochRecord, RunRecord, TrainSpec

PLAN = Plan(
    dataset_name="livers", planner="default", gpu_memory_gb=8, transpose_forward=(0, 1, 2), channels=("CT",),
    labels=Labels(foreground=(Label(name="liver", value=1),)), intensities=(), configurations={},
)
RECORD = RunRecord(
    name="3d", configuration="3d_fullres", fold=2, spec=TrainSpec(epochs=7), plan=PLAN, split=Split(train=("a",), val=("b",)),
    data="d", device="cpu",
)


def epoch(number: int, **changes: Any) -> EpochRecord:
    values = {"epoch": number, "step": 10 * number + 10, "train_loss": 0.5 - number, "val_loss": 0.25,
              "pseudo_dice": {"liver": 0.75, "spot (1)": None}, "learning_rate": 0.01, "seconds": 3.0, "data_wait": 0.125}
    return EpochRecord.model_validate({**values, **changes})


EXPECTED = {"loss/train": 0.5, "loss/val": 0.25, "pseudo_dice/liver": 0.75, "learning_rate": 0.01, "seconds": 3.0,
            "data_wait": 0.125, "skipped": 0.0, "step": 10.0}


class Told(Silent):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class Wandb(ModuleType):
    """Stands in for wandb."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.codes: list[int] = []

    def init(self, **given: Any) -> SimpleNamespace:
        self.inits.append(given)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)), finish=lambda exit_code: self.codes.append(exit_code)
        )


class Mlflow(ModuleType):
    """Stands in for mlflow and its client."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[Any, ...]] = []
        self.fails = fails
        self.MlflowClient = lambda: self

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return "4"

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        self.calls.append(("create", experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="m1"))

    def update_run(self, run: str, status: str) -> None:
        self.calls.append(("update", run, status))

    def log_param(self, run: str, name: str, value: str) -> None:
        self.calls.append(("param", name, value))

    def log_metric(self, run: str, name: str, value: float, step: int) -> None:
        if self.fails:
            raise ConnectionError("no such\nserver")
        self.calls.append(("metric", run, name, value, step))

    def set_terminated(self, run: str, status: str) -> None:
        self.calls.append(("end", run, status))


def test_the_numbers_of_an_epoch_are_those_that_are_known() -> None:
    assert numbers(epoch(0)) == EXPECTED
    assert "loss/val" not in numbers(epoch(0, val_loss=None))
    assert parameters(RECORD)["optimizer.lr"] == "0.01" and parameters(RECORD)["epochs"] == "7"


def test_wandb_stays_offline_and_a_run_that_goes_on_is_the_same_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    require_trackers(["wandb"])
    for begin in (0, 2):
        trackers = Trackers(["wandb"], tmp_path, RECORD, "offline", Told())
        for number in range(begin, begin + 2):
            trackers.add(epoch(number))
        trackers.close(begin == 2)
    number = wandb.inits[0]["id"]
    assert number and wandb.inits[1]["id"] == number and {given["mode"] for given in wandb.inits} == {"offline"}
    assert wandb.inits[0]["name"] == "livers 3d fold 2" and wandb.inits[0]["dir"] == str(tmp_path)
    assert [step for step, _ in wandb.logged] == [0, 1, 2, 3] and wandb.logged[0][1] == EXPECTED
    assert wandb.codes == [1, 0] and json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": number}


def test_mlflow_gets_names_it_accepts_and_goes_on_with_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mlflow = Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for number in (0, 1):
        trackers = Trackers(["mlflow"], tmp_path, RECORD, "offline", Told())
        trackers.add(epoch(number, pseudo_dice={"spot (1)": 0.5}))
        trackers.close(number == 1)
    assert ("create", "4", "livers 3d fold 2") in mlflow.calls and ("update", "m1", "RUNNING") in mlflow.calls
    assert ("param", "seed", "0") in mlflow.calls and ("metric", "m1", "pseudo_dice/spot _1_", 0.5, 1) in mlflow.calls
    assert [call for call in mlflow.calls if call[0] == "end"] == [("end", "m1", "KILLED"), ("end", "m1", "FINISHED")]


def test_a_failing_tracker_is_told_once_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", Mlflow(fails=True))
    told = Told()
    trackers = Trackers(["mlflow", "wandb"], tmp_path, RECORD, "offline", told)
    for number in range(3):
        trackers.add(epoch(number))
    trackers.close(True)
    assert len(told.warnings) == 1 and "the tracker mlflow failed" in told.warnings[0]
    assert "ConnectionError: no such)" in told.warnings[0] and len(wandb.logged) == 3


def test_a_tracker_that_cannot_even_open_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb, told = Wandb(), Told()
    monkeypatch.setattr(wandb, "init", lambda **given: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = Trackers(["wandb"], tmp_path, RECORD, "offline", told)
    trackers.add(epoch(0))
    trackers.add(epoch(1))
    trackers.close(True)
    assert len(told.warnings) == 1 and "ZeroDivisionError" in told.warnings[0] and not (tmp_path / "trackers.json").exists()


def test_tensorboard_begins_where_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[str, int]] = []
    scalars: list[tuple[str, float, int]] = []
    module = ModuleType("torch.utils.tensorboard")

    def writer(folder: str, purge_step: int) -> SimpleNamespace:
        made.append((folder, purge_step))
        return SimpleNamespace(add_scalar=lambda *row: scalars.append(row), flush=lambda: None, close=lambda: None)

    module.SummaryWriter = writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trackers = Trackers(["tensorboard"], tmp_path, RECORD, "offline", Told())
    trackers.add(epoch(5))
    trackers.close(True)
    assert made == [(str(tmp_path / "tensorboard"), 5)] and ("pseudo_dice/liver", 0.75, 5) in scalars
    assert len(scalars) == len(EXPECTED)


def test_real_event_files_hold_each_epoch_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin in (0, 1):  # epoch 1 is done again after an interruption
        trackers = Trackers(["tensorboard"], tmp_path, RECORD, "offline", Told())
        for number in range(begin, begin + 2):
            trackers.add(epoch(number))
        trackers.close(True)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in read.Scalars("loss/train")] == [(0, 0.5), (1, -0.5), (2, -1.5)]


def test_what_is_unknown_or_not_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    require_trackers([])
    with pytest.raises(RunError, match="unknown tracker 'excel'; choose from tensorboard, mlflow, wandb"):
        require_trackers(["excel"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunError, match=r"the tracker wandb cannot be used: .*pip install autoseg-framework\[trackers\]"):
        require_trackers(["wandb"])
