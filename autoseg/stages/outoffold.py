"""Probabilities of cases by networks that have not seen them, kept on disk while selection needs them."""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.components import bounding_box
from autoseg.arrays.ensembles import CaseTable, Counts, Targets
from autoseg.errors import RunError
from autoseg.files.images import read_case, read_label
from autoseg.files.preprocessed import digest, source_states
from autoseg.files.probabilities import Box, is_stored, joint_box, load_notes, load_probabilities, save_probabilities, with_margin
from autoseg.logs import Reporter
from autoseg.stages.contest import Contest, Ints
from autoseg.stages.predict import Options, load_model, network_hashes
from autoseg.types.dataset import CaseFiles
from autoseg.types.geometry import Grid

if TYPE_CHECKING:
    from autoseg.inference import Model

_STAGES = ("read", "preprocess", "network", "restore")


@dataclass(frozen=True)
class Pace:
    """Seconds per case on this machine with one fold: its network, and everything else."""

    network: float
    other: float


@dataclass(frozen=True)
class Averaged:
    """Probabilities (outputs, z, y, x) float32 of a weighted ensemble in a box of the image, with the reference there.

    `totals` are the whole reference's voxels by target, `grid` is the image's. Without networks `probabilities` is None and
    `index` is the mask.
    """

    probabilities: NDArray[np.float32] | None
    index: Ints
    truth: Ints
    totals: Counts
    box: Box
    grid: Grid


def open_model(contest: Contest, run: str, fold: int, options: Options) -> Model:
    """The network of one fold of a run, with the previous stages it needs."""
    return load_model(contest.workspace, (run,), Options((fold,), options.device, options.precision))


def network_key(contest: Contest, run: str, fold: int) -> str:
    """What predictions of a fold depend on."""
    return digest(network_hashes(contest.workspace, run, (fold,)))


class OutOfFold:
    """Out-of-fold predictions of all compared runs, made once; `close` removes them."""

    def __init__(self, contest: Contest) -> None:
        self.contest, self.targets = contest, Targets.of(contest.labels)
        self.runs = list(contest.runs)
        self.folder = contest.folder / "probabilities"

    def path(self, run: str, fold: int, case: CaseFiles) -> Path:
        """The file of a case."""
        return self.folder / run / f"fold_{fold}" / f"{case.case}.b2nd"

    def predict(self, options: Options, reporter: Reporter) -> None:
        """Predict what is not there yet: each case with mirroring and its probabilities kept, and without it as overlap only.

        Raises RunError naming the case when memory does not suffice, and what reading and predicting raise.
        """
        contest, regions = self.contest, bool(self.contest.labels.regions)
        with reporter.task("predict out of fold", len(self.runs) * len(contest.order)) as task:
            for run in self.runs:
                for fold, cases in contest.cases.items():
                    key = network_key(contest, run, fold)
                    todo = [case for case in cases if not is_stored(self.path(run, fold, case), self._case_key(key, case))]
                    task.advance(len(cases) - len(todo))
                    model = open_model(contest, run, fold, options) if todo else None
                    for case in todo:
                        assert model is not None
                        try:
                            probabilities, notes = self._predict_case(model, case)
                        except MemoryError as error:
                            raise RunError(f"case {case.case}, run {run}: {str(error) or 'out of memory'}; "
                                           "compare masks only with --masks-only") from error
                        path = self.path(run, fold, case)
                        save_probabilities(path, probabilities, regions, self._case_key(key, case), notes)
                        task.advance(note=f"{run} {case.case}")

    def _case_key(self, key: str, case: CaseFiles) -> str:
        states = source_states([Path(p) for p in (*case.images, str(case.label))])
        return digest([key, states] if case.labelled is None else [key, states, case.labelled])

    def _predict_case(self, model: Model, case: CaseFiles) -> tuple[NDArray[np.float32], dict[str, Any]]:
        begin = time.perf_counter()
        image = read_case([Path(p) for p in case.images])
        read = time.perf_counter() - begin
        found = model.predict_image(image, probabilities=True)
        assert found.probabilities_czyx is not None
        notes: dict[str, Any] = {"seconds": {"read": read, **found.seconds}}
        if any(member.mirror_axes for member in model.members):
            truth, _ = self.contest.truth(case)
            model.mirror = False
            try:
                plain = model.predict_image(image)
            finally:
                model.mirror = True
            index = self.contest.labels.encode(plain.label_zyx)
            targets = self.contest.targets(case)
            notes["plain"] = targets.overlap(targets.confusion(truth, index)).tolist()
            notes["totals"] = targets.totals(truth).tolist()
            notes["plain_seconds"] = {"read": read, **plain.seconds}
        return found.probabilities_czyx, notes

    def notes(self, run: str) -> list[dict[str, Any]]:
        """What was noted with each case of a run."""
        return [load_notes(self.path(run, fold, case)) for fold, case in self.contest.order]

    def table(self, fold: int, case: CaseFiles) -> CaseTable:
        """A case of all runs, reduced to the voxels on which they disagree."""
        stored = [load_probabilities(self.path(run, fold, case)) for run in self.runs]
        box, regions = joint_box([one.box for one in stored]), bool(self.contest.labels.regions)
        (truth, _), targets = self.contest.truth(case), self.contest.targets(case)
        return CaseTable.of([one.on(box, regions) for one in stored], truth[box], targets.totals(truth), targets)

    def averaged(self, fold: int, case: CaseFiles, runs: Sequence[str], weights: Sequence[float]) -> Averaged:
        """The weighted mean of some runs' probabilities."""
        stored = [load_probabilities(self.path(run, fold, case)) for run in runs]
        box, regions = with_margin(joint_box([one.box for one in stored]), stored[0].shape), bool(self.contest.labels.regions)
        shares = np.asarray(weights, np.float32) / np.float32(sum(weights))
        mean = np.zeros((), np.float32)
        for one, share in zip(stored, shares, strict=True):
            mean = mean + share * one.on(box, regions).astype(np.float32)
        truth, grid = self.contest.truth(case)
        index = self.targets.decide(mean)
        return Averaged(mean, index, truth[box], self.contest.targets(case).totals(truth), box, grid)

    def mask(self, fold: int, case: CaseFiles, run: str) -> Averaged:
        """The mask that validation left of one run, without probabilities."""
        label, grid = read_label(self.contest.masks(run)[case.case])
        index, (truth, _) = self.contest.labels.encode(label), self.contest.truth(case)
        box = with_margin(bounding_box(index > 0) or (slice(0, 1),) * 3, index.shape)
        return Averaged(None, index[box], truth[box], self.contest.targets(case).totals(truth), box, grid)

    def close(self) -> None:
        """Remove the stored probabilities."""
        shutil.rmtree(self.folder, ignore_errors=True)


def pace_of(seconds: Sequence[dict[str, float]]) -> Pace | None:
    """The mean over cases; None without any."""
    if not seconds:
        return None
    means = {stage: float(np.mean([one.get(stage, 0.0) for one in seconds])) for stage in _STAGES}
    return Pace(means["network"], sum(value for stage, value in means.items() if stage != "network"))


def validation_pace(contest: Contest, run: str) -> Pace | None:
    """The pace that the run's validation recorded in its summary.csv; None where there is none."""
    rows: list[dict[str, float]] = []
    for fold in contest.folds:
        path = contest.validation(run, fold) / "summary.csv"
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    found = {stage: row.get(f"seconds_{stage}") or "" for stage in _STAGES}
                    if found["network"]:
                        rows.append({stage: float(text) for stage, text in found.items() if text})
    return pace_of(rows)
