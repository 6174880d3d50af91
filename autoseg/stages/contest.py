"""What selection compares: runs, the folds finished in all of them, references, patients, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.ensembles import Targets
from autoseg.errors import DatasetError, RunError
from autoseg.files.images import read_label
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace
from autoseg.stages.evaluate import find_masks
from autoseg.stages.predict import PREFERRED, finished_folds
from autoseg.types.dataset import CaseFiles
from autoseg.types.geometry import Grid
from autoseg.types.labels import Labels

ENSEMBLES = "_ensembles"
Ints = NDArray[np.integer]


@dataclass(frozen=True)
class Contest:
    """Runs with their finished folds; the folds finished in all of them; validation cases by fold; what is missing."""

    workspace: Workspace
    labels: Labels
    runs: dict[str, tuple[int, ...]]
    folds: tuple[int, ...]
    cases: dict[int, tuple[CaseFiles, ...]]
    missing: tuple[str, ...]

    @property
    def order(self) -> list[tuple[int, CaseFiles]]:
        """(fold, case) of every compared case; tables of scores have their cases in this order."""
        return [(fold, case) for fold in self.folds for case in self.cases[fold]]

    @property
    def case_folds(self) -> NDArray[np.intp]:
        """The fold of each case."""
        return np.array([fold for fold, _ in self.order], np.intp)

    @property
    def patients(self) -> list[str]:
        """The patient of each case: its group, or the case itself."""
        return [case.group or case.case for _, case in self.order]

    @property
    def references(self) -> dict[str, Path]:
        """Reference masks by case."""
        return {case.case: Path(case.label) for _, case in self.order if case.label}

    @property
    def folder(self) -> Path:
        """Where selection keeps what it needs again."""
        return self.workspace.runs / ENSEMBLES

    def validation(self, run: str, fold: int) -> Path:
        """Masks and report that validation left."""
        return self.workspace.fold(run, fold) / "validation"

    def masks(self, run: str) -> dict[str, Path]:
        """Validation masks of a run by case, those of the compared folds."""
        return {case: path for fold in self.folds for case, path in find_masks(self.validation(run, fold)).items()}

    def truth(self, case: CaseFiles) -> tuple[Ints, Grid]:
        """The reference of a case in inside indices. Raises DatasetError when it holds undeclared values."""
        label, grid = read_label(Path(str(case.label)))
        try:
            return self.labels.encode(label), grid
        except ValueError as error:
            raise DatasetError(f"case {case.case}: {case.label}: {error}") from error

    def targets(self, case: CaseFiles) -> Targets:
        """What is measured in a case: Dice of targets that are not annotated in it is undefined."""
        return Targets.of(self.labels).only(self.labels.annotated(case.labelled))

    @property
    def default(self) -> str:
        """The run that is used when nothing speaks for another one."""
        def trust(run: str) -> tuple[int, bool, str]:
            record = RunFolder(self.workspace.fold(run, self.runs[run][0])).record_path
            name = RunFolder(record.parent).record().configuration if record.exists() else run
            return (PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), run != name, run)

        return min(self.runs, key=trust)


def find_contest(workspace: Workspace, networks: bool = True) -> Contest:
    """Find the runs with finished folds and the folds that can be compared.

    A fold is finished when its validation holds a report and a mask of every validation case that has a reference, and, with
    `networks`, when its trained weights are there. Raises RunError when there is no such fold or none that all runs share.
    """
    dataset = workspace.require().dataset()
    known = {case.case: case for case in dataset.cases if case.label is not None}
    cases = {fold: tuple(known[c] for c in split.val if c in known) for fold, split in enumerate(workspace.splits())}
    missing: list[str] = []
    runs: dict[str, tuple[int, ...]] = {}
    for name in _run_names(workspace):
        trained = set(finished_folds(workspace, name)) if networks else set(cases)
        faults = {
            fold: _unfinished(workspace.fold(name, fold) / "validation", (c.case for c in wanted), fold in trained)
            for fold, wanted in cases.items()
        }
        finished = tuple(fold for fold, fault in faults.items() if not fault)
        if finished:
            runs[name] = finished
        else:
            missing.append(f"run {name} has no finished fold and is not compared")
        missing += [f"run {name}, fold {fold}: {fault}" for fold, fault in faults.items() if fault and finished]
    if not runs:
        text = "; ".join(missing) or "there are no runs"
        raise RunError(f"{workspace.runs}: nothing to select from ({text}); train first: autoseg train {workspace.root}")
    shared = tuple(fold for fold in cases if all(fold in finished for finished in runs.values()) and cases[fold])
    if not shared:
        listed = "; ".join(f"{name} has folds {', '.join(map(str, finished))}" for name, finished in runs.items())
        raise RunError(f"{workspace.runs}: no fold is finished in every run ({listed}), so they cannot be compared; "
                       f"finish one fold in all of them: autoseg train {workspace.root} --folds 0")
    return Contest(workspace, dataset.labels, runs, shared, {fold: cases[fold] for fold in shared}, tuple(missing))


def _run_names(workspace: Workspace) -> list[str]:
    """Runs that have a fold folder, by name."""
    return sorted({path.parent.name for path in workspace.runs.glob("*/fold_*") if not path.parent.name.startswith((".", "_"))})


def _unfinished(validation: Path, wanted: Iterable[str], trained: bool) -> str:
    """What a fold's validation lacks; empty when it is finished."""
    if not (validation / "report.json").exists():
        return "not finished (no validation report)"
    masks = find_masks(validation)
    lacking = [case for case in wanted if case not in masks]
    if lacking:
        return f"validation lacks masks of {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}"
    return "" if trained else "its trained weights are not there"
