"""The train stage around a fold: several processes go through it alike, and a pace is measured without another network."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoseg.cli import FILE_PROBLEMS
from autoseg.errors import CasesFailed, RunError
from autoseg.files.runs import ReadOnlyRunFolder
from autoseg.files.workspace import Workspace
from autoseg.interrupts import Interrupts
from autoseg.logs import SILENT
from autoseg.stages import train as stage
from autoseg.stages.fold import _nothing_lost
from autoseg.stages.records import Options
from autoseg.stages.train import _Work

RECORD: Any = SimpleNamespace(previous=None, configuration="3d", name="3d", fold=0)


class FakeRanks:
    """One of two processes; what the other one says is given."""

    def __init__(self, first: bool, other: int = 0) -> None:
        self.first, self.other, self.calls = first, other, list[str]()

    def wait(self) -> None:
        self.calls.append("wait")

    def any(self, number: int) -> int:
        self.calls.append(f"any {number}")
        return max(number, self.other)


def work(tmp_path: Path, ranks: FakeRanks, done: bool, monkeypatch: pytest.MonkeyPatch) -> _Work:
    made = _Work(Workspace(tmp_path), Options(ranks=ranks), SILENT, Interrupts(), set(), None)  # type: ignore[arg-type]
    monkeypatch.setattr(made, "_done", lambda key, record: done)
    monkeypatch.setattr(made, "_train", lambda *given: ranks.calls.append("train"))
    return made


def test_failed_cases_are_told_when_the_other_processes_have_been_let_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: object) -> None:
        ranks.calls.append("validate")
        raise CasesFailed("1 case failed")

    ranks = FakeRanks(first=True)
    monkeypatch.setattr(stage, "validate", failing)
    with pytest.raises(CasesFailed):
        work(tmp_path, ranks, True, monkeypatch).fold(("3d", 0), RECORD, None)
    assert ranks.calls == ["wait", "any 0", "wait", "validate", "wait"]


@pytest.mark.parametrize("leader_trains", [False, True])
def test_whether_there_is_anything_to_train_is_what_the_first_process_found(
    leader_trains: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = FakeRanks(first=False, other=int(leader_trains))
    work(tmp_path, ranks, leader_trains, monkeypatch).fold(("3d", 0), RECORD, None)  # it sees the opposite
    assert ranks.calls == ["wait", "any 0", *(["train"] if leader_trains else []), "wait", "wait"]


def test_only_a_process_that_saves_says_that_training_is_saved(tmp_path: Path) -> None:
    log: Any = SimpleNamespace(training=SimpleNamespace(step=7), folder=ReadOnlyRunFolder(tmp_path), checkpoint=lambda: None)
    with pytest.raises(RunError, match=r"^case a is gone$"), _nothing_lost(log):
        raise RunError("case a is gone")
    log.folder = SimpleNamespace(writes=True)
    with pytest.raises(RunError, match=r"^case a is gone\. Training is saved at step 7"), _nothing_lost(log):
        raise RunError("case a is gone")


@pytest.mark.parametrize("budget", [None, 60.0])
def test_a_network_for_validation_is_made_only_for_a_budget_and_after_the_step_was_measured(
    budget: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    device = SimpleNamespace(type="cpu")
    measured = SimpleNamespace(seconds=0.5, peak_bytes=None)
    monkeypatch.setattr("autoseg.trainers.default.Training", lambda job: made.append("network") or SimpleNamespace(network=0))
    monkeypatch.setattr("autoseg.trainers.measure.measure_step", lambda job, seconds: made.append("measured") or measured)
    monkeypatch.setattr(stage, "case_seconds", lambda *given: 2.0)
    maker = _Work(Workspace(tmp_path), Options(time_budget_s=budget), SILENT, Interrupts(), set(), None)
    monkeypatch.setattr(maker, "_cases", lambda *given: [])
    monkeypatch.setattr(maker, "_job", lambda *given: SimpleNamespace(device=device))
    record: Any = SimpleNamespace(previous=None, split=SimpleNamespace(train=()))
    pace = maker._pace(record, 1.0)
    assert pace is not None and (pace.step, pace.case) == (0.5, 2.0 if budget else 0.0)
    assert made == (["measured", "network"] if budget else ["measured"])


def test_a_full_quota_is_told_in_one_line() -> None:
    assert errno.EDQUOT in FILE_PROBLEMS
