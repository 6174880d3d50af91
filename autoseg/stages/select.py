"""Choose the run or ensemble, and the post-processing, that did best in the cross-validation."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from autoseg.arrays.metrics import measure
from autoseg.errors import RunError
from autoseg.files.workspace import Workspace, load_record, save_record
from autoseg.logs import SILENT, Reporter, Task
from autoseg.stages.evaluate import Pair, evaluate, find_masks, merge_reports, postprocess, read_pair, targets_of
from autoseg.types.labels import Labels
from autoseg.types.record import Spec
from autoseg.types.report import Candidate, CaseMetrics, PostprocessingTrial, Report, Selection, Value

LARGEST_ENSEMBLE = 3  # runs averaged at most; every pair and every triple is tried
ENSEMBLES = "_ensembles"
MEMBERS = "members.json"
NOTE = ("Runs, ensembles and post-processing were chosen on the same cross-validation predictions that this Dice is computed on, "
        "so it is somewhat optimistic; a held-out test set gives an unbiased figure.")


@dataclass(frozen=True)
class Contest:
    """What is compared: runs, the folds finished in all of them, references and validation cases by fold, and what is missing."""

    workspace: Workspace
    labels: Labels
    runs: dict[str, tuple[int, ...]]
    folds: tuple[int, ...]
    cases: dict[int, tuple[str, ...]]
    references: dict[str, Path]
    missing: tuple[str, ...]

    def folder(self, runs: Sequence[str], fold: int) -> Path:
        """Where the validation masks and the report of a run or an ensemble lie."""
        if len(runs) == 1:
            return self.workspace.fold(runs[0], fold) / "validation"
        return self.workspace.runs / ENSEMBLES / "+".join(runs) / f"fold_{fold}"

    def references_of(self, fold: int) -> dict[str, Path]:
        """Reference masks of one fold's validation cases."""
        return {case: self.references[case] for case in self.cases[fold]}

    def pairs(self, runs: Sequence[str]) -> list[Pair]:
        """(case, prediction, reference) of all compared folds."""
        return [
            (case, masks[case], self.references[case])
            for fold in self.folds for masks in [find_masks(self.folder(runs, fold))] for case in self.cases[fold]
        ]


def select(workspace: Workspace, reporter: Reporter = SILENT, threads: int = 2) -> Selection:
    """Compare all runs and their ensembles of up to three on the cross-validation, then try largest-component post-processing.

    Writes selection.json and the winner's pooled report to report/report.json. Ensembles are predicted where that has not been
    done. Raises RunError when no fold is finished in every compared run.
    """
    contest = find_contest(workspace)
    for line in contest.missing:
        reporter.warn(line)
    candidates, reports = compare(contest, reporter, threads)
    best = candidates[0]
    steps, trials = choose_postprocessing(contest, best.runs, reporter, threads)
    report = reports[best.runs]
    if steps:
        reporter.info("measuring the selected masks after post-processing")
        pairs = contest.pairs(best.runs)
        report = evaluate({case: mask for case, mask, _ in pairs}, contest.references, contest.labels, report.tolerance_mm,
                          threads, reporter, steps)
    selection = Selection(
        runs=best.runs, postprocessing=tuple(steps), folds=contest.folds, run_folds={run: contest.runs[run] for run in best.runs},
        cases=len(report.cases), foreground_mean_dice=_dice(report.foreground_mean), candidates=tuple(candidates),
        postprocessing_tried=tuple(trials), missing=contest.missing, note=NOTE,
    )
    save_record(workspace.root / "report" / "report.json", report)
    save_record(workspace.selection_path, selection)
    return selection


def find_contest(workspace: Workspace) -> Contest:
    """Find the runs with finished folds and the folds that can be compared.

    A fold is finished when its validation holds a report and a mask of every validation case that has a reference.
    Raises RunError when there is no such fold or none that all runs share.
    """
    dataset = workspace.require().dataset()
    references = {case.case: Path(case.label) for case in dataset.cases if case.label is not None}
    cases = {fold: tuple(case for case in split.val if case in references) for fold, split in enumerate(workspace.splits())}
    missing: list[str] = []
    runs: dict[str, tuple[int, ...]] = {}
    for name in _run_names(workspace):
        faults = {fold: _unfinished(workspace.fold(name, fold) / "validation", wanted) for fold, wanted in cases.items()}
        finished = tuple(fold for fold, fault in faults.items() if not fault)
        if finished:
            runs[name] = finished
        else:
            missing.append(f"run {name} has no finished fold and is not compared")
        missing += [f"run {name}, fold {fold}: {fault}" for fold, fault in faults.items() if fault and finished]
    if not runs:
        text = "; ".join(missing) or "there are no runs"
        raise RunError(f"{workspace.runs}: nothing to select from ({text}); train first: autoseg train {workspace.root}")
    shared = tuple(fold for fold in cases if all(fold in finished for finished in runs.values()))
    if not shared:
        listed = "; ".join(f"{name} has folds {', '.join(map(str, finished))}" for name, finished in runs.items())
        raise RunError(f"{workspace.runs}: no fold is finished in every run ({listed}), so they cannot be compared; "
                       f"finish one fold in all of them: autoseg train {workspace.root} --folds 0")
    left = {case: references[case] for fold in shared for case in cases[fold]}
    return Contest(workspace, dataset.labels, runs, shared, cases, left, tuple(missing))


def _run_names(workspace: Workspace) -> list[str]:
    """Runs that have a fold folder, by name."""
    return sorted({path.parent.name for path in workspace.runs.glob("*/fold_*") if not path.parent.name.startswith((".", "_"))})


def _unfinished(validation: Path, wanted: Iterable[str]) -> str:
    """What a fold's validation lacks; empty when it is finished."""
    if not (validation / "report.json").exists():
        return "not finished (no validation report)"
    masks = find_masks(validation)
    lacking = [case for case in wanted if case not in masks]
    return f"validation lacks masks of {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}" if lacking else ""


def compare(contest: Contest, reporter: Reporter, threads: int) -> tuple[list[Candidate], dict[tuple[str, ...], Report]]:
    """All candidates, best first, and their pooled reports; equal scores go to fewer runs, then to the first name."""
    sizes = range(1, min(LARGEST_ENSEMBLE, len(contest.runs)) + 1)
    sets = [runs for size in sizes for runs in combinations(contest.runs, size)]
    reports = {}
    with reporter.task("compare", len(sets), unit="candidates") as task:
        for runs in sets:
            folds = [_fold_report(contest, runs, fold, reporter, threads) for fold in contest.folds]
            reports[runs] = merge_reports(folds)
            task.advance(note=" + ".join(runs))
    candidates = [_candidate(contest, runs, report) for runs, report in reports.items()]
    return sorted(candidates, key=lambda c: (-_number(c.foreground_mean_dice), len(c.runs))), reports


def _candidate(contest: Contest, runs: tuple[str, ...], report: Report) -> Candidate:
    networks = sum(len(contest.runs[run]) for run in runs)
    return Candidate(
        runs=runs, foreground_mean_dice=_dice(report.foreground_mean), networks=networks,
        per_label={label: values.get("dice") for label, values in report.mean.items()},
        cost=f"{networks} network{'s' if networks > 1 else ''} per image, one for each finished fold of {' and '.join(runs)}",
    )


def _fold_report(contest: Contest, runs: tuple[str, ...], fold: int, reporter: Reporter, threads: int) -> Report:
    """The report of one fold: what validation left for a run; for an ensemble predicted and measured unless that is done."""
    folder, wanted = contest.folder(runs, fold), set(contest.cases[fold])
    path = folder / "report.json"
    if len(runs) > 1:
        _predict_ensemble(contest, runs, fold, reporter)
    if path.exists():
        known = load_record(path, Report)
        kept = [case for case in known.cases if case.case in wanted]
        if len(kept) == len(wanted):
            return known if len(kept) == len(known.cases) else Report.of(kept, known.tolerance_mm)
    report = evaluate(folder, contest.references_of(fold), contest.labels, None, threads, reporter)
    save_record(path, report)
    return report


def _predict_ensemble(contest: Contest, runs: tuple[str, ...], fold: int, reporter: Reporter) -> None:
    """Predict an ensemble's validation cases; what an earlier training of its members left is thrown away first."""
    from autoseg.stages.predict import predict_validation

    folder = contest.folder(runs, fold)
    members = {run: _digest(contest.folder((run,), fold) / "report.json") for run in runs}
    record = folder / MEMBERS
    if not record.exists() or load_record(record, dict[str, str]) != members:
        shutil.rmtree(folder, ignore_errors=True)
        save_record(record, members, dict[str, str])
    masks = find_masks(folder)
    if any(case not in masks for case in contest.cases[fold]):
        (folder / "report.json").unlink(missing_ok=True)
        predict_validation(contest.workspace, runs, fold, folder, reporter)


def _digest(path: Path) -> str:
    """SHA-256 of a member's validation report: another training gives another report."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def choose_postprocessing(
    contest: Contest, runs: Sequence[str], reporter: Reporter, threads: int,
) -> tuple[list[Spec], list[PostprocessingTrial]]:
    """The largest-component steps that raise the Dice of the out-of-fold masks of `runs`, and all that were tried.

    First all foreground together, kept if the foreground mean rises and no target falls; then each target, kept if its own Dice
    rises and, where targets overlap, the foreground mean does not fall (nnU-Net, postprocessing).
    """
    labels, pairs = contest.labels, contest.pairs(runs)
    targets = dict(labels.targets)
    together = _largest(range(1, len(labels.foreground) + 1))
    rounds = _rounds(targets)
    with reporter.task("post-processing", len(pairs) * (1 + len(rounds))) as task:
        before, after = _scores(pairs, labels, [[], [together]], task, threads)
        first = _trial_together(together, before, after)
        trials, steps = [first], [together] if first.kept else []
        for names in rounds:
            singles = [_largest(targets[name]) for name in names]
            before, after = _scores(pairs, labels, [steps, [*steps, *singles]], task, threads)
            tried = [_trial_single(name, step, before, after, len(names) == 1) for name, step in zip(names, singles, strict=True)]
            trials += tried
            steps += [trial.step for trial in tried if trial.kept]
    return steps, trials


def _largest(indices: Iterable[int]) -> Spec:
    return Spec(kind="largest_component", options={"labels": list(indices)})


def _rounds(targets: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Targets tried at a time: all at once where none overlap, since then no step touches another's Dice; else one by one."""
    if len(targets) < 2:
        return []
    indices = [i for members in targets.values() for i in members]
    return [list(targets)] if len(set(indices)) == len(indices) else [[name] for name in targets]


def _trial_together(step: Spec, before: Report, after: Report) -> PostprocessingTrial:
    old, new = _dice(before.foreground_mean), _dice(after.foreground_mean)
    falls = any(_number(_dice(after.mean[name])) < _number(_dice(values)) for name, values in before.mean.items())
    kept = _number(new) > _number(old) and not falls
    return PostprocessingTrial(step=step, name="all foreground", before=old, after=new, kept=kept)


def _trial_single(name: str, step: Spec, before: Report, after: Report, alone: bool) -> PostprocessingTrial:
    old, new = _dice(before.mean[name]), _dice(after.mean[name])
    falls = alone and _number(_dice(after.foreground_mean)) < _number(_dice(before.foreground_mean))
    return PostprocessingTrial(step=step, name=name, before=old, after=new, kept=_number(new) > _number(old) and not falls)


def _scores(
    pairs: Sequence[Pair], labels: Labels, tried: Sequence[Sequence[Spec]], task: Task, threads: int,
) -> list[Report]:
    """The pooled overlap of all cases after each of several lists of steps."""
    columns: list[list[CaseMetrics]] = [[] for _ in tried]
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for found in pool.map(partial(_try_case, labels=labels, tried=tried), pairs):
            for column, metrics in zip(columns, found, strict=True):
                column.append(metrics)
            task.advance(note=found[0].case)
    return [Report.of(column) for column in columns]


def _try_case(pair: Pair, labels: Labels, tried: Sequence[Sequence[Spec]]) -> list[CaseMetrics]:
    """Overlap of one case after each of several lists of steps."""
    case, prediction_path, reference_path = pair
    prediction, reference, grid = read_pair(prediction_path, reference_path, labels, case)
    ignore = labels.ignore.value if labels.ignore else None
    return [
        CaseMetrics(case=case, metrics=measure(
            reference, postprocess(prediction, labels, steps), grid.spacing, targets_of(labels), 0.0, ignore, surfaces=False))
        for steps in tried
    ]


def _dice(values: Mapping[str, Value]) -> Value:
    return values.get("dice")


def _number(value: Value) -> float:
    """A score for comparing; undefined is worse than any."""
    return -1.0 if value is None else float(value)
