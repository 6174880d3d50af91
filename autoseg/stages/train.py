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
from autoseg.errors import RunError
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
    validate: bool = True


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
    from autoseg.trainers.default import Training

    plan, splits = workspace.plan(), workspace.splits()
    dataset = workspace.dataset()
    check_splits(splits, dataset.cases)
    names = list(configurations or plan.configurations)
    unknown = [n for n in names if n not in plan.configurations]
    if unknown:
        raise RunError(f"the plan has no configuration {', '.join(unknown)}; it has {', '.join(plan.configurations)}")
    if name is not None and len(names) > 1:
        raise RunError(f"--name names one run, but {len(names)} configurations would be trained; add --config {names[0]}")
    wanted = list(range(len(splits))) if folds is None else list(folds)
    if wanted and (max(wanted) >= len(splits) or min(wanted) < 0):
        raise RunError(f"splits.json has folds 0 to {len(splits) - 1}, found {wanted}")
    plan_runs = [(n, name or n, fold) for n in names for fold in wanted]
    records = {
        (run, fold): _record(workspace, plan, configuration, run, fold, spec, options) for configuration, run, fold in plan_runs
    }
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RunError(
            f"--name takes letters, digits, dots, dashes and underscores, and begins with a letter or digit; found {name!r}"
        )
    threads = options.threads if options.threads is not None else 1
    preprocess(workspace, names, threads=max(1, threads), reporter=reporter)
    if options.restart:
        for record in {record.configuration: record for record in records.values()}.values():
            Training(_job(workspace, record, options))  # whatever is wrong with the settings shows before anything is removed
        for run, fold in records:
            RunFolder(workspace.fold(run, fold)).clear()
    told: set[str] = set()
    for index, (configuration, run, fold) in enumerate(plan_runs):
        folder, record = RunFolder(workspace.fold(run, fold)), records[run, fold]
        if not folder.finished:
            record = record.model_copy(update={"data": _data(workspace, record)})
            job = _job(workspace, record, options)
            if configuration not in told:
                told.add(configuration)
                left = sum(
                    1 for c, r, f in plan_runs[index:] if c == configuration and not RunFolder(workspace.fold(r, f)).finished
                )
                _tell_time(job, left, reporter)
            _train_fold(job, folder, record, options, reporter, interrupts or Interrupts())
        if options.validate:
            validate(workspace, run, fold, options, reporter)


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
    dims = plan.configurations[configuration].dims
    mirror = resolved.augment.mirror
    if mirror is not None and (len(set(mirror)) != len(mirror) or any(not 0 <= axis < dims for axis in mirror)):
        raise RunError(
            f"augment.mirror must list different axes between 0 and {dims - 1} for {configuration}, found {list(mirror)}"
        )
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
    if old is not None:
        differences = _differences(old.model_dump(mode="json"), record.model_dump(mode="json"))
        if differences:
            raise RunError(
                f"run {run!r} fold {fold} exists already and was made with other settings:\n  "
                + "\n  ".join(differences[:12])
                + "\ngive --name NEW to train beside it, or --restart to replace it"
            )
    return record


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    ignored = {"device", "versions", "data", "plan.notes", "plan.planner", "plan.gpu_memory_gb"}
    if where in ignored:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
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
    threads = options.threads if options.threads is not None else (1 if device.type == "cpu" else 8)
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


def _tell_time(job: Job, folds: int, reporter: Reporter) -> None:
    from autoseg.trainers.default import seconds_per_step

    try:
        step = seconds_per_step(job)
    except RunError:  # it will come up in training, with the cases that caused it
        return
    validation = 0.35 * job.spec.epochs * job.spec.val_steps if job.validation else 0
    fold = (job.spec.total_steps + validation) * step
    reporter.info(
        f"{job.spec.epochs} epochs of {job.spec.steps_per_epoch} steps, {step:.3g} s each on {job.device} in {job.precision}: "
        f"measured, about {duration(fold)} per fold, {duration(fold * folds)} for {folds} fold(s); then their cases are validated"
    )


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


def _train_fold(
    job: Job, folder: RunFolder, record: RunRecord, options: Options, reporter: Reporter, interrupts: Interrupts
) -> None:
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

        for epoch in training.run(after_step):
            log.add(epoch)
            after = log.note()
            task.advance(0, after)
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
