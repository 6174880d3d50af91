"""Trackers: TensorBoard, MLflow and Weights & Biases as sinks of what an epoch gave, for whoever asks for them.

They add nothing to a run and take nothing from it: metrics.jsonl holds the same numbers, and a tracker that fails is told once
and left alone. What a tracker calls the run is kept in trackers.json, so that a run which goes on stays one run there.
"""

from __future__ import annotations

import importlib
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from autoseg.errors import RunError
from autoseg.files.workspace import write_text
from autoseg.logs import Reporter
from autoseg.types.run import EpochRecord, RunRecord

FILE = "trackers.json"
PROJECT = "autoseg"
Ids = dict[str, str]  # what each tracker calls the run


class Sink(Protocol):
    """One tracker of one fold."""

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Take the numbers of an epoch."""
        ...

    def close(self, finished: bool) -> None:
        """Write out what is pending; `finished` says whether training came to its end."""
        ...


class _TensorBoard:
    """Event files in the fold's folder `tensorboard`; epochs that are done again replace those of before."""

    def __init__(self, folder: Path, record: RunRecord, ids: Ids, first_epoch: int, mode: str) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.writer: Any = writer(str(folder / "tensorboard"), purge_step=first_epoch)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self, finished: bool) -> None:
        self.writer.close()


class _MLflow:
    """A run of the experiment `autoseg`, where the user's MLflow keeps its runs."""

    def __init__(self, folder: Path, record: RunRecord, ids: Ids, first_epoch: int, mode: str) -> None:
        self.client: Any = importlib.import_module("mlflow").MlflowClient()
        self.run = ids.get("mlflow", "")
        if self.run:
            self.client.update_run(self.run, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(PROJECT)
        number = self.client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
        self.run = ids["mlflow"] = self.client.create_run(number, run_name=run_name(record)).info.run_id
        for name, value in parameters(record).items():
            self.client.log_param(self.run, name, value)

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run, re.sub(r"[^\w/. -]", "_", name), value, step=epoch)  # others are refused

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run, status="FINISHED" if finished else "KILLED")


class _Wandb:
    """A run of the project `autoseg`, kept in the fold's folder `wandb` and, unless the user has it otherwise, sent nowhere."""

    def __init__(self, folder: Path, record: RunRecord, ids: Ids, first_epoch: int, mode: str) -> None:
        wandb: Any = importlib.import_module("wandb")
        number = ids.get("wandb") or uuid.uuid4().hex
        self.run: Any = wandb.init(
            project=PROJECT, name=run_name(record), id=number, resume="allow", dir=str(folder), mode=mode,
            config=parameters(record),
        )
        ids["wandb"] = number

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.run.log(dict(values), step=epoch)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


Make = Callable[[Path, RunRecord, Ids, int, str], Sink]
TRACKERS: dict[str, tuple[str, Make]] = {
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "mlflow": ("mlflow", _MLflow),
    "wandb": ("wandb", _Wandb),
}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed, before long work.

    Raises RunError.
    """
    for name in names:
        if name not in TRACKERS:
            raise RunError(f"unknown tracker {name!r}; choose from {', '.join(TRACKERS)}")
        try:
            importlib.import_module(TRACKERS[name][0])
        except ImportError as error:
            raise RunError(
                f"the tracker {name} cannot be used: {error}; install it with: pip install autoseg-framework[trackers]"
            ) from None


class Trackers:
    """The sinks of one fold, opened at its first epoch."""

    def __init__(self, names: Sequence[str], folder: Path, record: RunRecord, mode: str, reporter: Reporter) -> None:
        self.names, self.folder, self.record, self.mode, self.reporter = names, folder, record, mode, reporter
        self._sinks: dict[str, Sink] | None = None

    def add(self, epoch: EpochRecord) -> None:
        """Hand an epoch to all of them."""
        if self._sinks is None:
            self._sinks = self._open(epoch.epoch)
        values = numbers(epoch)
        for name, sink in list(self._sinks.items()):
            self._attempt(name, lambda sink=sink: sink.log(values, epoch.epoch))  # type: ignore[misc]

    def close(self, finished: bool) -> None:
        """Close all of them."""
        for name, sink in list((self._sinks or {}).items()):
            self._attempt(name, lambda sink=sink: sink.close(finished))  # type: ignore[misc]
        self._sinks = {}

    def _open(self, first_epoch: int) -> dict[str, Sink]:
        ids = _load_ids(self.folder / FILE)
        known, sinks = dict(ids), {}

        def open_one(name: str) -> None:
            sinks[name] = TRACKERS[name][1](self.folder, self.record, ids, first_epoch, self.mode)

        for name in self.names:
            self._attempt(name, lambda name=name: open_one(name))  # type: ignore[misc]
        if ids != known:
            write_text(self.folder / FILE, json.dumps(ids) + "\n")
        return sinks

    def _attempt(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # of any package, network or disk: training is worth more than its log elsewhere
            if self._sinks is not None:
                self._sinks.pop(name, None)
            self.reporter.warn(
                f"{run_name(self.record)}: the tracker {name} failed and gets nothing more of this run "
                f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}); training goes on"
            )


def run_name(record: RunRecord) -> str:
    """What the run is called in trackers."""
    return f"{record.plan.dataset_name} {record.name} fold {record.fold}"


def parameters(record: RunRecord) -> dict[str, str]:
    """What was set, for tables in trackers: the training record by dotted path, and what else tells runs apart."""
    found = {"configuration": record.configuration, "fold": str(record.fold), "data": record.data, "init": record.init or ""}

    def walk(data: Mapping[str, Any], path: str) -> None:
        for key, value in data.items():
            if isinstance(value, dict) and value:
                walk(value, f"{path}{key}.")
            else:
                found[path + key] = json.dumps(value) if not isinstance(value, str) else value

    walk(record.spec.model_dump(mode="json"), "")
    return found


def numbers(epoch: EpochRecord) -> dict[str, float]:
    """The numbers of an epoch by name; those that are not known are left out."""
    values: dict[str, float | None] = {
        "loss/train": epoch.train_loss, "loss/val": epoch.val_loss, "learning_rate": epoch.learning_rate,
        "seconds": epoch.seconds, "data_wait": epoch.data_wait, "skipped": float(epoch.skipped), "step": float(epoch.step),
        **{f"pseudo_dice/{name}": value for name, value in epoch.pseudo_dice.items()},
    }
    return {name: value for name, value in values.items() if value is not None}


def _load_ids(path: Path) -> Ids:
    """What trackers called the run before; nothing where there is no such file or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
