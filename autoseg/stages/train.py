"""Train: folds of a configuration, each resumed where it stopped, then validated on its own cases."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoseg.datasets.splits import check_splits
from autoseg.errors import CasesFailed, RunError
from autoseg.files.machine import cores
from autoseg.files.preprocessed import StoredCase, digest, open_case
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace, save_record
from autoseg.interrupts import Interrupts
from autoseg.logs import SILENT, Reporter
from autoseg.stages.evaluate import evaluate
from autoseg.stages.figures import progress_figure
from autoseg.stages.predict import predict_validation
from autoseg.stages.preprocess import data_folder, preprocess
from autoseg.types.plan import Plan
from autoseg.types.run import EpochRecord, RunRecord, TrainSpec

if TYPE_CHECKING:
    from autoseg.trainers.default import Job, Training

CHECKPOINT_SECONDS = 120.0  # between timed checkpoints
FIGURE_SECONDS = 20.0  # between redraws of progress.png


@dataclass(frozen=True)
class Options:
    """Where and how to train; nothing here changes the result beyond rounding."""

    device: str = "auto"
    threads: int | None = None
    restart: bool = False


def train(
    workspace: Workspace,
    configurations: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    name: str | None = None,
    spec: TrainSpec = TrainSpec(),
    options: Options = Options(),
    reporter: Reporter = SILENT,
    interrupts: Interrupts | None = None,
) -> None:
    """Train and validate the wanted folds of the wanted configurations (all of them by default); finished ones are skipped.

    Raises:
        RunError: unknown configuration or fold, or a run of that name was made with other settings.
        RecordError: plan or splits are invalid.
    """
    plan, splits = workspace.plan(), workspace.splits()
    dataset = workspace.dataset()
    check_splits(splits, dataset.cases)
    names = list(configurations or plan.configurations)
    wanted = list(range(len(splits))) if folds is None else list(folds)
    _require_sense(plan, names, wanted, len(splits), name, spec)
    plan_runs = [(n, name or n, fold) for n in names for fold in wanted]
    records = {(run, fold): _record(workspace, plan, n, run, fold, spec, options) for n, run, fold in plan_runs}
    preprocess(workspace, names, threads=options.threads, reporter=reporter)
    records = {key: record.model_copy(update={"data": _data(workspace, record)}) for key, record in records.items()}
    _tell_time(workspace, list(records.values()), options, reporter)
    if options.restart:
        for run, fold in records:
            RunFolder(workspace.fold(run, fold)).clear()
    failures: list[str] = []
    for (run, fold), record in records.items():
        folder = RunFolder(workspace.fold(run, fold))
        if not folder.finished:
            _train_fold(_job(workspace, record, options), folder, record, reporter, interrupts or Interrupts())
        try:
            validate(workspace, run, fold, options, reporter)
        except CasesFailed as error:
            failures.append(f"validation of {run} fold {fold}: {error}")
    if failures:
        raise CasesFailed("\n".join(failures))


def _require_sense(plan: Plan, names: Sequence[str], folds: Sequence[int], count: int, name: str | None, spec: TrainSpec) -> None:
    """Refuse what the plan and the folds do not have."""
    unknown = [n for n in names if n not in plan.configurations]
    if unknown:
        raise RunError(f"the plan has no configuration {', '.join(unknown)}; it has {', '.join(plan.configurations)}")
    if name is not None and len(names) > 1:
        raise RunError(f"--name names one run, but {len(names)} configurations would be trained; add --config {names[0]}")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RunError(f"--name takes letters, digits, dots, dashes and underscores, the first a letter or digit; found {name!r}")
    if folds and (max(folds) >= count or min(folds) < 0):
        raise RunError(f"splits.json has folds 0 to {count - 1}, found {list(folds)}")
    dims = {plan.configurations[n].dims for n in names}
    mirror = spec.augment.mirror
    if mirror and len(dims) > 1:
        raise RunError("augment.mirror counts a patch's axes, which differ between 2D and 3D; train one at a time with --config")
    if mirror is not None and (len(set(mirror)) != len(mirror) or any(not 0 <= axis < max(dims) for axis in mirror)):
        raise RunError(f"augment.mirror must list different axes between 0 and {max(dims) - 1}, found {list(mirror)}")


def validate(workspace: Workspace, run: str, fold: int, options: Options, reporter: Reporter) -> None:
    """Predict and evaluate the fold's validation cases; writes validation/report.json."""
    folder = RunFolder(workspace.fold(run, fold))
    report_path = folder.validation / "report.json"
    if report_path.exists():
        return
    record = folder.record()
    predict_validation(workspace, [run], fold, folder.validation, reporter, options.device, record.spec.precision)
    references = {c.case: Path(c.label) for c in workspace.dataset().cases if c.case in set(record.split.val) and c.label}
    report = evaluate(folder.validation, references, labels=record.plan.labels, reporter=reporter)
    save_record(report_path, report)
    reporter.info(
        f"{run} fold {fold}: mean foreground Dice {report.foreground_mean.get('dice') or 0:.4f} on {len(references)} cases"
    )


def _record(
    workspace: Workspace, plan: Plan, configuration: str, run: str, fold: int, spec: TrainSpec, options: Options
) -> RunRecord:
    """The record of this run; an existing one must agree with it."""
    from autoseg.networks.hardware import pick_device, pick_precision

    folder = RunFolder(workspace.fold(run, fold))
    old = folder.record() if folder.record_path.exists() and not options.restart else None
    device = pick_device(options.device)
    wanted = old.spec.precision if old is not None and spec.precision == "auto" else spec.precision
    resolved = spec.model_copy(update={"precision": pick_precision(device, wanted)})
    split = workspace.splits()[fold]
    own = plan.model_copy(
        update={
            "configurations": {
                configuration: plan.configurations[configuration].model_copy(
                    update={"next_stage": None, "previous_stage": None, "inherits_from": None}
                )
            }
        }
    )
    record = RunRecord(
        name=run,
        configuration=configuration,
        fold=fold,
        spec=resolved,
        plan=own,
        split=split,
        data="",
        device=str(device),
        versions=_versions(),
    )
    others = [] if options.restart else [p for p in (workspace.runs / run).glob("fold_*") if p != folder.path]
    siblings = [sibling.record() for sibling in map(RunFolder, others) if sibling.record_path.exists()]
    for other in [*([old] if old is not None else []), *siblings]:
        differences = _differences(other.model_dump(mode="json"), record.model_dump(mode="json"), same_fold=other is old)
        if differences:
            raise RunError(
                f"run {run!r} fold {other.fold} exists already and was made with other settings:\n  "
                + "\n  ".join(differences[:12])
                + "\ngive --name NEW to train beside it, or --restart to replace it"
            )
    return record


def _differences(old: Any, new: Any, where: str = "", same_fold: bool = True) -> list[str]:
    ignored = {"device", "versions", "data", "plan.notes", "plan.planner", "plan.gpu_memory_gb"}
    if not same_fold:  # folds are combined at prediction: what shapes images and network must agree
        ignored |= {"fold", "split", *(f"spec.{key}" for key in TrainSpec.model_fields if key != "augment")}
    if where in ignored:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        inside = [(key, f"{where}.{key}" if where else key) for key in keys]
        return [line for key, path in inside for line in _differences(old.get(key), new.get(key), path, same_fold)]
    return [] if old == new else [f"{where}: {str(old)[:100]} (in run.json), {str(new)[:100]} (wanted)"]


def _versions() -> dict[str, str]:
    found = {}
    for package in ("autoseg-framework", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _opened(workspace: Workspace, record: RunRecord, cases: Sequence[str]) -> list[StoredCase]:
    folder = data_folder(workspace, workspace.plan(), record.configuration)
    return [open_case(folder / case) for case in cases]


def _data(workspace: Workspace, record: RunRecord) -> str:
    """One hash of all images and labels, as preprocessed, that the fold sees."""
    return digest([case.key for case in _opened(workspace, record, (*record.split.train, *record.split.val))])


def _job(workspace: Workspace, record: RunRecord, options: Options) -> Job:
    from autoseg.networks.hardware import pick_device, pick_precision
    from autoseg.trainers.default import Job

    device = pick_device(options.device)
    threads = options.threads if options.threads is not None else (1 if device.type == "cpu" else min(8, cores()))
    return Job(
        record.plan.configurations[record.configuration],
        record.plan.labels,
        len(record.plan.channels),
        record.spec,
        record.fold,
        _opened(workspace, record, record.split.train),
        _opened(workspace, record, record.split.val),
        device,
        pick_precision(device, record.spec.precision),
        threads,
    )


def _tell_time(workspace: Workspace, records: Sequence[RunRecord], options: Options, reporter: Reporter) -> None:
    """Measure a step of every configuration that has something to train, and say how long all of it will take.

    With `restart` this also shows whatever is wrong with the settings before anything is removed.
    """
    from autoseg.trainers.default import Training, seconds_per_step

    total = 0.0
    for configuration in dict.fromkeys(record.configuration for record in records):
        own = [record for record in records if record.configuration == configuration]
        left = [r for r in own if options.restart or not RunFolder(workspace.fold(r.name, r.fold)).finished]
        if not left:
            continue
        job = _job(workspace, left[0], options)
        Training(job)
        try:
            step = seconds_per_step(job)
        except RunError:  # it will come up in training, with the cases that caused it
            continue
        spec = job.spec
        steps = spec.total_steps + (0.35 * spec.epochs * spec.val_steps if job.validation else 0)
        total += steps * step * len(left)
        reporter.info(
            f"{configuration}: {spec.epochs} epochs of {spec.steps_per_epoch} steps, measured {step:.3g} s per step on "
            f"{job.device} in {job.precision}: about {duration(steps * step)} per fold, "
            f"{duration(steps * step * len(left))} for {len(left)} fold(s)"
        )
    if total:
        reporter.info(f"training takes about {duration(total)} in all; each fold's cases are then validated")


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 17 min, 3 h 05 min, 4 d 2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _train_fold(job: Job, folder: RunFolder, record: RunRecord, reporter: Reporter, interrupts: Interrupts) -> None:
    from autoseg.networks.hardware import is_out_of_memory
    from autoseg.trainers.default import State, Training

    folder.remove_leftovers()
    training = Training(job)
    checkpoint = folder.load_checkpoint()
    if checkpoint is not None and folder.record_path.exists() and folder.record().data != record.data:
        raise RunError(
            f"the images or labels of run {record.name!r} fold {record.fold} changed since its training began; "
            "give --restart to begin anew with them, or --name NEW to train beside it"
        )
    if checkpoint is not None:
        training.restore(State(*checkpoint))
    epochs = [e for e in folder.metrics() if e.epoch < training.epoch]
    folder.save_record(record)
    log = _Log(training, folder, epochs)
    name = f"{record.name} fold {record.fold}"
    if training.step:
        reporter.info(f"{name}: going on from step {training.step} of {job.spec.total_steps}")
    with interrupts.deferred(), reporter.task(name, job.spec.total_steps, "steps") as task:
        task.advance(training.step, log.note())

        def after_step() -> None:
            if interrupts.signum is not None:
                log.checkpoint()
                interrupts.raise_if_requested()
            log.checkpoint_if_due()
            task.advance(1, log.note())

        try:
            for epoch in training.run(after_step):
                log.add(epoch)
                task.advance(0, log.note())
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"out of memory at step {training.step} with batch {training.batch_size} on {job.device}; the last checkpoint is "
                "intact. Train with a smaller --set batch_size=..., or plan for less with --replan --gpu-memory. "
                f"torch says: {str(error).splitlines()[0][:120]}"
            ) from None
        folder.save_weights(training.weights())
    log.draw()
    interrupts.raise_if_requested()


class _Log:
    """Keeps the metrics, the picture and the checkpoints of one fold up to date."""

    def __init__(self, training: Training, folder: RunFolder, epochs: list[EpochRecord]) -> None:
        self.training, self.folder, self.epochs = training, folder, epochs
        self._saved = self._drawn = time.monotonic()
        self._cost = 0.0

    def add(self, epoch: EpochRecord) -> None:
        self.epochs.append(epoch)
        self.folder.save_metrics(self.epochs)
        if time.monotonic() - self._drawn > FIGURE_SECONDS:
            self.draw()

    def draw(self) -> None:
        progress_figure(self.folder.path / "progress.png", [e.model_dump() for e in self.epochs])
        self._drawn = time.monotonic()

    def checkpoint(self) -> None:
        begin = time.monotonic()
        state = self.training.state()
        self.folder.save_checkpoint(self.training.step, state.tensors, state.numbers)
        self._saved = time.monotonic()
        self._cost = self._saved - begin

    def checkpoint_if_due(self) -> None:
        if time.monotonic() - self._saved > max(CHECKPOINT_SECONDS, 50 * self._cost):
            self.checkpoint()

    def note(self) -> str:
        spec = self.training.job.spec
        text = f"epoch {min(self.training.epoch + 1, spec.epochs)}/{spec.epochs}"
        if self.epochs:
            last = self.epochs[-1]
            dice = " ".join("-" if d is None else f"{d:.2f}" for d in list(last.pseudo_dice.values())[:6])
            text += f", loss {last.train_loss:.3f}, pseudo Dice {dice}" if last.pseudo_dice else f", loss {last.train_loss:.3f}"
        return text
