"""Which masks a work folder stands for: those of the selected runs on cases that their networks had not seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoseg.errors import RunError
from autoseg.files.workspace import Workspace, load_record
from autoseg.stages.evaluate import find_masks
from autoseg.stages.predict import PREFERRED
from autoseg.types.dataset import CaseFiles
from autoseg.types.labels import Labels
from autoseg.types.selection import Selection

SELECTED = Path("_ensembles") / "selected"


@dataclass(frozen=True)
class Outcome:
    """Masks by case with the fold of each, the labelled cases, and what made the masks; `selection` where there is one."""

    labels: Labels
    cases: dict[str, CaseFiles]
    masks: dict[str, Path]
    folds: dict[str, int]
    runs: tuple[str, ...]
    selection: Selection | None = None

    @property
    def references(self) -> dict[str, Path]:
        """Reference masks of the cases that have a mask."""
        return {case: Path(str(self.cases[case].label)) for case in self.masks}

    @property
    def title(self) -> str:
        """The runs, and that their masks were post-processed."""
        if self.selection is None:
            return " + ".join(self.runs)
        weights = self.selection.weights or (1.0,) * len(self.runs)
        runs = " + ".join(run if weight == 1 else f"{run} x {weight:g}" for run, weight in zip(self.runs, weights, strict=True))
        return f"{runs}, post-processed" if self.selection.postprocessing else runs


def find_outcome(workspace: Workspace, run: str | None = None) -> Outcome:
    """The out-of-fold masks of `run`, else of the selection, else of the run with the most finished folds.

    Raises RunError when nothing has been validated, or when the masks of an ensemble are no longer there.
    """
    dataset = workspace.require().dataset()
    known = {case.case: case for case in dataset.cases if case.label is not None}
    fold_of = {case: fold for fold, split in enumerate(workspace.splits()) for case in split.val if case in known}
    selection = load_record(workspace.selection_path, Selection) if run is None and workspace.selection_path.exists() else None
    if selection is not None and (len(selection.runs) > 1 or selection.postprocessing):
        folder = workspace.runs / SELECTED
        masks = find_masks(folder) if folder.is_dir() else {}
        wanted = {case for case, fold in fold_of.items() if fold in selection.folds}
        if not masks or not set(masks) <= set(known):
            raise RunError(f"{folder} does not hold the selected masks; make them again: autoseg select {workspace.root}")
        kept = {case: path for case, path in masks.items() if case in wanted}
        return Outcome(dataset.labels, known, kept, {case: fold_of[case] for case in kept}, selection.runs, selection)
    validated = {
        name: {case: path for fold in folds for case, path in find_masks(workspace.fold(name, fold) / "validation").items()
               if fold_of.get(case) == fold}
        for name, folds in validated_folds(workspace).items()
    }
    name = run or (next(iter(selection.runs)) if selection is not None else _first(validated))
    if selection is not None:
        validated = {k: {c: p for c, p in v.items() if fold_of[c] in selection.folds} for k, v in validated.items()}
    if name is None or not validated.get(name):
        what = f"run {name!r} has" if name else "there are"
        raise RunError(f"{workspace.runs}: {what} no validated folds; train first: autoseg train {workspace.root}")
    masks = validated[name]
    return Outcome(dataset.labels, known, masks, {case: fold_of[case] for case in masks}, (name,), selection)


def validated_folds(workspace: Workspace) -> dict[str, tuple[int, ...]]:
    """Folds of each run whose validation holds a report, by the run's name."""
    found: dict[str, list[int]] = {}
    for path in sorted(workspace.runs.glob("*/fold_*/validation/report.json")):
        name, number = path.parts[-4], path.parts[-3].removeprefix("fold_")
        if not name.startswith((".", "_")) and number.isdigit():
            found.setdefault(name, []).append(int(number))
    return {name: tuple(sorted(folds)) for name, folds in found.items()}


def _first(validated: dict[str, dict[str, Path]]) -> str | None:
    """The run with the most validated cases; of equal ones the usual configurations first."""
    def rank(name: str) -> tuple[int, int, str]:
        return (-len(validated[name]), PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), name)

    return min(validated, key=rank, default=None)
