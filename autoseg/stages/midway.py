"""While a fold trains: a few whole validation cases are segmented every so often, and judged with all metrics."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from autoseg.arrays.metrics import default_tolerance_mm, examine
from autoseg.arrays.tiles import make_tiling
from autoseg.errors import AutosegError
from autoseg.files.images import read_label
from autoseg.files.preprocessed import StoredCase
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace, write_text
from autoseg.logs import Reporter
from autoseg.stages.evaluate import targets_of
from autoseg.types.midway import MidwayRecord
from autoseg.types.report import CaseMetrics, Report
from autoseg.types.run import EpochRecord, RunRecord

if TYPE_CHECKING:
    from autoseg.inference import Model
    from autoseg.trainers.default import Training

FILE = "midway.jsonl"
CASES = 3
SHARE = 0.05  # of the training time
_PASSES = 4.0  # forward passes that a training step is taken to cost per patch, before the first look is measured


class Midway:
    """The looks at one fold: which cases, when, and what was found so far (`records`).

    The cases are fixed: those with the most structures, among them by a hash of their names. Looks take at most `SHARE` of the
    time that training took until then. The network that is looked at is a copy, and nothing random is drawn, so training goes on
    exactly as it would without.
    """

    def __init__(self, workspace: Workspace, record: RunRecord, validation: Sequence[StoredCase], folder: RunFolder) -> None:
        self.record, self.path = record, folder.path / FILE
        cases = workspace.dataset().cases
        labels = {c.case: Path(c.label) for c in cases if c.label is not None}
        self._labelled = {c.case: c.labelled for c in cases}
        usable = [case for case in validation if case.name in labels]
        chosen = sorted(usable, key=lambda case: (-len(case.record.locations), _hash(case.name)))[:CASES]
        self.cases = {case.name: (case, labels[case.name]) for case in chosen}
        self.records = load_midway(self.path)
        self._off = not self.cases

    def after_epoch(self, training: Training, epochs: Sequence[EpochRecord], reporter: Reporter) -> MidwayRecord | None:
        """Look if it is time to; `epochs` are all finished ones. What cannot be done is told once, and not tried again."""
        from autoseg.networks.hardware import is_out_of_memory

        self.records = [one for one in self.records if one.epoch < epochs[-1].epoch]  # of before an interruption
        if self._off or not self._due(epochs, training):
            return None
        try:
            found = self._look(training, epochs[-1])
        except (AutosegError, ValueError, OSError, MemoryError) as error:
            self._stop(reporter, str(error) or type(error).__name__)
            return None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._stop(reporter, "out of memory")
            return None
        self.records.append(found)
        write_text(self.path, "".join(json.dumps(one.model_dump(mode="json")) + "\n" for one in self.records))
        return found

    def _stop(self, reporter: Reporter, why: str) -> None:
        self._off = True
        reporter.warn(f"{self.record.name} fold {self.record.fold}: no more whole cases are segmented while training: {why}")

    def _due(self, epochs: Sequence[EpochRecord], training: Training) -> bool:
        """Whether one more look stays within the share of time."""
        elapsed = sum(one.seconds for one in epochs)
        spent = sum(one.seconds for one in self.records)
        expected = self.records[-1].seconds if self.records else self._guess(epochs[-1], training)
        return spent + expected <= SHARE * elapsed

    def _guess(self, epoch: EpochRecord, training: Training) -> float:
        """Seconds of the first look: its patches, at what training takes for one."""
        patch = self.record.plan.configurations[self.record.configuration].patch_size
        size = (1, *patch) if len(patch) == 2 else patch
        tiles = sum(len(make_tiling(case.shape, (size[0], size[1], size[2])).starts) for case, _ in self.cases.values())
        steps = training.job.spec.steps_per_epoch + training.job.spec.val_steps
        return tiles * epoch.seconds / (steps * training.batch_size * _PASSES)

    def _look(self, training: Training, epoch: EpochRecord) -> MidwayRecord:
        """Segment and judge all cases with a copy of the network as it is."""
        from autoseg.inference import Member, Model

        begin = time.perf_counter()
        member = Member(self.record.plan, self.record.configuration, (copy.deepcopy(training.result),), ())
        model = Model([member], training.job.device, training.job.precision, mirror=False)
        measured = [self._case(model, case, label) for case, label in self.cases.values()]
        return MidwayRecord(
            epoch=epoch.epoch, step=epoch.step, seconds=time.perf_counter() - begin,
            cases={case.case: case.metrics for case in measured}, mean=Report.of(measured).mean,
        )

    def _case(self, model: Model, case: StoredCase, label: Path) -> CaseMetrics:
        previous = case.read_previous() if self.record.previous is not None else None
        stream = model.slide(model.members[0], case.read_image(), previous)
        found = model.finish(model.settle([stream], [case.placement])).label_zyx
        truth, grid = read_label(label)
        labels = model.labels
        ignore = labels.ignore.value if labels.ignore else None
        targets, tolerance = targets_of(labels, self._labelled[case.name]), default_tolerance_mm(grid.shape, grid.spacing)
        metrics = examine(truth, found, grid.spacing, targets, tolerance, ignore).metrics
        return CaseMetrics(case=case.name, metrics=metrics)


def load_midway(path: Path) -> list[MidwayRecord]:
    """The lines of a midway.jsonl; none where there is no file or it is damaged."""
    try:
        return [MidwayRecord.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValidationError, UnicodeDecodeError):
        return []


def _hash(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
