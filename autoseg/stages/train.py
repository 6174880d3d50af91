"""Train: folds of configurations in the order they need one another, each resumed where it stopped, then validated."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.datasets.splits import check_splits
from autoseg.errors import CasesFailed, RunError
from autoseg.files.machine import cores
from autoseg.files.preprocessed import StoredCase, digest, open_case
from autoseg.files.runs import ReadOnlyRunFolder, RunFolder
from autoseg.files.workspace import Workspace, save_record
from autoseg.interrupts import Interrupts
from autoseg.logs import SILENT, Reporter
from autoseg.networks.describe import describe
from autoseg.stages import cascade
from autoseg.stages.budget import Budget, Pace, RandomCase, Share, case_seconds, duration, fit_length
from autoseg.stages.evaluate import evaluate
from autoseg.stages.fold import train_fold
from autoseg.stages.initial import InitialModel, open_initial, write_start
from autoseg.stages.midway import Midway
from autoseg.stages.predict import predict_validation
from autoseg.stages.preprocess import data_folder, preprocess
from autoseg.stages.records import Options, make_record
from autoseg.stages.trackers import Trackers, require_trackers
from autoseg.types.plan import Plan
from autoseg.types.run import RunRecord, TrainSpec

if TYPE_CHECKING:
    from autoseg.trainers.default import Job
    from autoseg.trainers.measure import Measured
    from autoseg.trainers.sampling import PatchSource

MEASURE_SECONDS, MEASURE_SHARE = 4.0, 0.02  # of training steps, before a time budget is divided; of the budget at most

__all__ = ["Arranged", "Key", "Options", "arrange", "train", "validate"]
Key = tuple[str, int]  # run, fold


@dataclass(frozen=True)
class Arranged:
    """What is to be trained and validated: records in the order of need, those asked for, and the model to start from."""

    records: dict[Key, RunRecord]
    asked: frozenset[Key]
    initial: InitialModel | None


def train(
    workspace: Workspace,
    configurations: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    name: str | None = None,
    spec: TrainSpec = TrainSpec(),
    options: Options = Options(),
    reporter: Reporter = SILENT,
    interrupts: Interrupts | None = None,
    started: float | None = None,
) -> None:
    """Train and validate the wanted folds of the wanted configurations (all of them by default); finished ones are skipped.

    A configuration that builds on a previous stage brings that stage with it, all folds of it, since every training case needs
    the prediction of a network that has not seen it. With a time budget the epochs are chosen so that everything ends in time,
    which counts from `started` (of time.monotonic; now if None).

    Raises:
        RunError: unknown configuration or fold, or a run of that name was made with other settings.
        RecordError: plan or splits are invalid.
    """
    begun = time.monotonic() if started is None else started
    if not options.leads:
        options.wait()  # until the first process has prepared everything
    arranged = arrange(workspace, configurations, folds, name, spec, options, reporter)
    records = arranged.records
    fresh = set(arranged.asked if options.restart else ())  # not what only a next stage needs
    work = _Work(workspace, options, reporter, interrupts or Interrupts(), fresh, arranged.initial)
    budget = work.measure(records, spec, begun) if options.ranks is None else None
    if options.leads:
        for run, fold in fresh:
            RunFolder(workspace.fold(run, fold)).clear()
        options.wait()
    failures: list[str] = []
    for key, record in records.items():
        try:
            work.fold(key, record, budget)
        except CasesFailed as error:
            failures.append(f"validation of {key[0]} fold {key[1]}: {error}")
    if failures:
        raise CasesFailed("\n".join(failures))


def arrange(
    workspace: Workspace,
    configurations: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    name: str | None = None,
    spec: TrainSpec = TrainSpec(),
    options: Options = Options(),
    reporter: Reporter = SILENT,
) -> Arranged:
    """Everything that comes before the first step: what is asked for is checked, and the cases are preprocessed.

    Raises:
        RunError: unknown configuration, fold or tracker, or a run of that name was made with other settings.
        RecordError: plan, splits or the model to start from are invalid.
    """
    plan, splits = workspace.plan(), workspace.splits()
    check_splits(splits, workspace.dataset().cases)
    names = list(configurations or plan.configurations)
    wanted = list(range(len(splits))) if folds is None else list(folds)
    _require_sense(plan, names, wanted, len(splits), name, spec)
    require_trackers(options.trackers)
    initial = None if options.init is None else open_initial(options.init, workspace)
    records = _records(workspace, plan, names, wanted, name, spec, options, initial)
    for record in records.values():  # before long work
        describe(record.plan.configurations[record.configuration], len(plan.channels), plan.labels.output_count)
    stages = [(plan.configurations[r.configuration].previous_stage, r.configuration) for r in records.values()]
    needed = list(dict.fromkeys(name for pair in stages for name in pair if name is not None))
    preprocess(workspace, needed, threads=options.threads, reporter=reporter)
    return Arranged(records, frozenset((name or n, fold) for n in names for fold in wanted), initial)


def _records(
    workspace: Workspace, plan: Plan, names: Sequence[str], folds: Sequence[int], name: str | None, spec: TrainSpec,
    options: Options, initial: InitialModel | None,
) -> dict[Key, RunRecord]:
    """Records of everything to train and validate, in the order of need.

    Folds that only the next stage needs are left out once they are finished, and go on with their own settings if they were
    begun with others.
    """
    records: dict[Key, RunRecord] = {}
    for configuration in names:
        previous = plan.configurations[configuration].previous_stage
        if previous is None:
            continue
        cascade.case_folds(workspace, previous, configuration)  # before long work: every case needs a fold that has not seen it
        for fold in range(len(workspace.splits())):
            folder = RunFolder(workspace.fold(previous, fold))
            if not folder.finished or (previous in names and fold in folds):
                asked = previous in names and fold in folds
                own = folder.record().spec if folder.record_path.exists() and not asked else spec
                kept = options if asked else replace(options, restart=False, longer=False)
                start = initial if asked or not folder.record_path.exists() else None
                records[previous, fold] = make_record(workspace, plan, previous, previous, fold, own, kept, start)
    for configuration in names:
        for fold in folds:
            run = name or configuration
            if (run, fold) not in records:
                records[run, fold] = make_record(workspace, plan, configuration, run, fold, spec, options, initial)
    return dict(sorted(records.items(), key=lambda item: item[1].previous is not None))  # stable: first stages first


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


class _Work:
    """What training a fold needs to know, and how it is done."""

    def __init__(
        self, workspace: Workspace, options: Options, reporter: Reporter, interrupts: Interrupts, fresh: set[Key],
        initial: InitialModel | None,
    ) -> None:
        self.workspace, self.options, self.reporter, self.interrupts = workspace, options, reporter, interrupts
        self.fresh, self.initial = fresh, initial  # folds that begin anew, and from what

    def fold(self, key: Key, record: RunRecord, budget: Budget | None) -> None:
        """Train one fold, then segment and judge its validation cases; what is done already is skipped.

        Raises:
            CasesFailed: some validation cases failed.
        """
        folder, leads = RunFolder(self.workspace.fold(*key)), self.options.leads
        if record.previous is not None and leads:
            cascade.prepare(
                self.workspace, record.previous, record.configuration, device=self.options.device, reporter=self.reporter
            )
        self.options.wait()
        due = leads and not self._done(key, record)  # the first process says so for all
        if due if self.options.ranks is None else self.options.ranks.any(int(due)):
            self._train(key, record, folder, budget)
        elif leads and record.previous is not None and folder.record().data != self._data(record):
            self.reporter.warn(
                f"{key[0]} fold {key[1]} was trained on other cases or on other segmentations by {record.previous} than there "
                "are now; train it again with --restart"
            )
            (folder.validation / "report.json").unlink(missing_ok=True)
        self.options.wait()
        if leads:
            begun = time.monotonic()
            try:
                validate(self.workspace, key[0], key[1], self.options, self.reporter)
            except CasesFailed:
                self.options.wait()  # the others go on too
                raise
            if budget is not None and key in budget.shares:
                budget.finish(key, time.monotonic() - begun)
        self.options.wait()

    def _train(self, key: Key, record: RunRecord, folder: RunFolder, budget: Budget | None) -> None:
        """Train one fold to its end."""
        if budget is not None:
            record = record.model_copy(update={"spec": budget.length(key, record.spec)})
        record = record.model_copy(update={"data": self._data(record)})
        validation = self._cases(record, record.split.val)
        job = self._job(record, self._cases(record, record.split.train), validation)
        if not self.options.leads:
            self.options.wait()  # until the first process has written what training starts from
            train_fold(job, ReadOnlyRunFolder(folder.path), record, self.reporter, self.interrupts)
            return
        self._start(record, job, folder)
        self.options.wait()
        begun, first = time.monotonic(), budget.shares[key].done if budget else 0
        adjust = (lambda training: budget.adjust(key, training, begun, first)) if budget else (lambda training: None)
        watch = Midway(self.workspace, record, validation, folder)
        trackers = Trackers(self.options.trackers, folder.path, record, self.options.tracker_mode, self.reporter)
        try:
            train_fold(job, folder, record, self.reporter, self.interrupts, adjust, watch, trackers.add)
        finally:
            trackers.close(folder.finished)

    def _start(self, record: RunRecord, job: Job, folder: RunFolder) -> None:
        """Give a fold that starts from a model its first weights, unless it has gone on from them already."""
        if record.init is None or folder.usable or folder.load_checkpoint() is not None:
            return
        if self.initial is None:
            raise RunError(
                f"{record.name} fold {record.fold} starts from a model, but has no weights of its own yet; give the same --init "
                "again, or --restart to begin without"
            )
        planned = self.workspace.plan().configurations[record.configuration]
        write_start(record, planned, job, folder, self.initial, self.reporter)

    def measure(self, records: Mapping[Key, RunRecord], spec: TrainSpec, begun: float) -> Budget | None:
        """Measure a step of every configuration that has something to train; say how long it will take, or divide the budget.

        With `restart` this also shows whatever is wrong with the settings before anything is removed.
        """
        options, total = self.options, 0.0
        left = {key: record for key, record in records.items() if key in self.fresh or not self._done(key, record)}
        paces: dict[str, Pace] = {}
        for configuration in dict.fromkeys(record.configuration for record in left.values()):
            own = [record for record in left.values() if record.configuration == configuration]
            pace = self._pace(own[0], seconds=min(MEASURE_SECONDS, MEASURE_SHARE * (options.time_budget_s or 0.0)))
            if pace is None:
                continue
            paces[configuration] = pace
            seconds = [record.spec.total_steps * pace.per_step(record.spec) for record in own]
            total += sum(seconds)
            if options.time_budget_s is None:
                lengths = f"{own[0].spec.epochs} epochs of {own[0].spec.steps_per_epoch} steps"
                self.reporter.info(
                    f"{configuration}: {lengths}, measured {pace.step:.3g} s per step in {own[0].spec.precision}: about "
                    f"{duration(seconds[0])} per fold, {duration(sum(seconds))} for {len(own)} fold(s)"
                )
        if not paces:
            return None
        if options.time_budget_s is None:
            self.reporter.info(f"training takes about {duration(total)} in all; each fold's cases are then validated")
            return None
        shares = {
            key: Share(record.configuration, self._steps_done(key), len(record.split.val))
            for key, record in left.items() if record.configuration in paces
        }
        budget = Budget(options.time_budget_s, spec, paces, shares, begun)
        self._tell_choice(budget)
        return budget

    def _tell_choice(self, budget: Budget) -> None:
        """Say what the budget buys. Raises RunError when it does not even hold validation and a few steps."""
        if budget.shortfall() > 0:
            rates = ", ".join(f"{name} {pace.step:.3g} s a step" for name, pace in budget.paces.items())
            raise RunError(
                f"a time budget of {duration(budget.seconds)} is too short for {len(budget.shares)} fold(s) on this machine "
                f"({rates}): it would take about {duration(1.1 * (budget.seconds + budget.shortfall()))}; give more time, fewer "
                "--folds, or one --config"
            )
        fitted = fit_length(budget.spec, budget.steps())
        validation = sum(share.cases * budget.paces[share.configuration].case for share in budget.shares.values())
        rates = ", ".join(f"{name} {pace.step:.3g} s" for name, pace in budget.paces.items())
        self.reporter.info(
            f"time budget {duration(budget.seconds)}, of which {duration(max(budget.left, 0))} are left for {len(budget.shares)} "
            f"fold(s); a step takes {rates}, validation about {duration(validation)}: {fitted.epochs} epochs of "
            f"{fitted.steps_per_epoch} steps for every fold, where the schedule ends; corrected by what steps really take"
        )

    def _done(self, key: Key, record: RunRecord) -> bool:
        folder = RunFolder(self.workspace.fold(*key))
        return folder.finished and folder.record().spec.epochs == record.spec.epochs

    def _steps_done(self, key: Key) -> int:
        folder = RunFolder(self.workspace.fold(*key))
        return 0 if key in self.fresh else folder.checkpoint_step()

    def _pace(self, record: RunRecord, seconds: float) -> Pace | None:
        """Measured seconds of a step, and with a budget of a validation case; None where training will say what is wrong."""
        from autoseg.trainers.default import Training
        from autoseg.trainers.measure import measure_step

        if record.previous is None:
            cases: Sequence[PatchSource] = self._cases(record, record.split.train)
        else:  # its previous stage may not be trained yet
            case = self._cases(record.model_copy(update={"previous": None}), record.split.train[:1])[0]
            cases = [RandomCase(case.shape, len(record.plan.channels), len(record.plan.labels.foreground))]
        job = self._job(record, cases, [])
        try:
            measured = measure_step(job, seconds)
        except RunError:  # it will come up in training, with the cases that caused it
            return None
        self._tell_memory(record, measured)
        if self.options.time_budget_s is None:
            return Pace(measured.seconds, 0.0)
        network = Training(job).network  # only now: beside the measured one it would count as that one's memory
        return Pace(measured.seconds, case_seconds(self.workspace, record, network, job.device))

    def _tell_memory(self, record: RunRecord, measured: Measured) -> None:
        """Say what one real step needed, and warn where that is more than was planned for."""
        if measured.peak_bytes is None:
            return
        peak, planned = measured.peak_bytes / 2**30, record.plan.gpu_memory_gb
        self.reporter.info(f"{record.configuration}: one step needs {peak:.2f} GB of GPU memory (planned for {planned:g} GB)")
        if peak > planned:
            self.reporter.warn(f"{record.configuration} needs more than planned; --planner fit keeps to the memory it is given")

    def _cases(self, record: RunRecord, names: Sequence[str]) -> Sequence[StoredCase]:
        folder = data_folder(self.workspace, self.workspace.plan(), record.configuration)
        if record.previous is not None:
            return cascade.open_cases(self.workspace, record.previous, record.configuration, names)
        return [open_case(folder / name) for name in names]

    def _data(self, record: RunRecord) -> str:
        """One hash of what the fold sees: preprocessed images and labels, previous stage's segmentations, what is annotated."""
        cases = self._cases(record, (*record.split.train, *record.split.val))
        keys, labelled = [case.key for case in cases], self._labelled(record)
        return digest([keys, {case.name: labelled[case.name] for case in cases if case.name in labelled}] if labelled else keys)

    def _labelled(self, record: RunRecord) -> dict[str, tuple[int, ...]]:
        """Indices of the annotated targets of each case that lacks some."""
        labels, cases = record.plan.labels, self.workspace.dataset().cases
        return {case.case: labels.annotated(case.labelled) for case in cases if case.labelled is not None}

    def _job(self, record: RunRecord, training: Sequence[PatchSource], validation: Sequence[PatchSource]) -> Job:
        from autoseg.networks.hardware import pick_device, pick_precision
        from autoseg.trainers.default import Job

        device, ranks = pick_device(self.options.device), self.options.ranks
        size = record.spec.batch_size or record.plan.configurations[record.configuration].batch_size
        if ranks is not None and size < ranks.world:
            raise RunError(
                f"a batch of {size} cannot be divided among {ranks.world} processes; give --set batch_size={ranks.world}"
            )
        threads = self.options.threads if self.options.threads is not None else (1 if device.type == "cpu" else min(8, cores()))
        previous = len(record.plan.labels.foreground) if record.previous is not None else 0
        plan, precision = record.plan, pick_precision(device, record.spec.precision)
        return Job(
            plan.configurations[record.configuration], plan.labels, len(plan.channels), record.spec, record.fold, training,
            validation, device, precision, threads, previous, self._labelled(record), ranks,
        )


def validate(workspace: Workspace, run: str, fold: int, options: Options, reporter: Reporter) -> None:
    """Predict and evaluate the fold's validation cases; writes validation/report.json."""
    folder = RunFolder(workspace.fold(run, fold))
    report_path = folder.validation / "report.json"
    if report_path.exists():
        return
    record = folder.record()
    predict_validation(workspace, [run], fold, folder.validation, reporter, options.device, record.spec.precision)
    cases = workspace.dataset().cases
    references = {c.case: Path(c.label) for c in cases if c.case in set(record.split.val) and c.label}
    report = evaluate(folder.validation, references, labels=record.plan.labels, reporter=reporter, cases=cases)
    save_record(report_path, report)
    reporter.info(
        f"{run} fold {fold}: mean foreground Dice {report.foreground_mean.get('dice') or 0:.4f} on {len(references)} cases"
    )
