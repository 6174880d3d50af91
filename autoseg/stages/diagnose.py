"""Name what is wrong with the out-of-fold masks of a run, with the evidence, the cases to look at, and commands to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.metrics import label_values
from autoseg.arrays.misfits import explain_misfit
from autoseg.arrays.symptoms import CaseSymptoms, Target, measure_symptoms, select
from autoseg.datasets.description import describe_beside
from autoseg.errors import AutosegError, RunError
from autoseg.files.machine import for_each
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace, load_record, save_record
from autoseg.logs import SILENT, Reporter
from autoseg.planners.symmetry import pairs_by_name
from autoseg.stages.cohort_rules import compare_cases
from autoseg.stages.curve_rules import curve_findings
from autoseg.stages.evaluate import Pair, find_masks, pairs_of, read_pair, targets_of
from autoseg.stages.remedies import Context, advise
from autoseg.stages.symptom_rules import LEAST_CASES, Sample, kinds_of, rows_of, target_findings, target_names
from autoseg.types.dataset import CaseFiles
from autoseg.types.diagnosis import SYMPTOMS, Diagnosis, Finding
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Plan
from autoseg.types.report import Report
from autoseg.types.selection import Selection

FLAT_SPACING = 1.2  # spacings within this factor of one another: slices run along the plan's first axis
EXPLAINED_OUTLIERS = 5
APART = 3  # findings of one symptom that are told one by one
BYTES_PER_VOXEL = 60  # label maps, masks and distance maps that are in memory at once

Ints = NDArray[np.integer]


@dataclass(frozen=True)
class _Given:
    """Masks to be diagnosed: files of each case, its fold, groups and annotated labels (None: all), and how slices run."""

    pairs: tuple[Pair, ...]
    labels: Labels
    folds: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    slice_axis: int | None = None
    labelled: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)


def diagnose(workspace: Workspace, run: str | None = None, reporter: Reporter = SILENT, threads: int = 2) -> Diagnosis:
    """Diagnose a run on the validation masks of its finished folds and on its learning curves; saves report/diagnosis.json.

    run: a run of the work folder; None for the selected one, else the one with the best validation Dice.
    Raises RunError when there is no such run, or nothing of it to judge.
    """
    dataset = workspace.require().dataset()
    finished = _finished(workspace)
    name = _choose(workspace, finished, run)
    folders = {int(p.name.removeprefix("fold_")): RunFolder(p) for p in sorted((workspace.runs / name).glob("fold_*"))}
    by_case = {case.case: case for case in dataset.cases}
    fold_of, pairs = {}, []
    for fold in finished.get(name, ()):
        masks = find_masks(folders[fold].validation)
        for case in workspace.splits()[fold].val:
            if case in by_case and by_case[case].label is not None:
                fold_of[case] = fold
                pairs.append((case, masks[case], Path(str(by_case[case].label))))
    plan = workspace.plan()
    groups = {case: _groups(by_case[case]) for case in fold_of}
    labelled = {case: by_case[case].labelled for case in fold_of}
    given = _Given(tuple(pairs), dataset.labels, fold_of, groups, _slices_along(plan), labelled)
    samples, sides = _measure(given, reporter, threads)
    findings, untold = judge(samples)
    curves = {fold: epochs for fold, folder in folders.items() if (epochs := folder.metrics())}
    learned, unread = curve_findings(curves, [fold for fold, folder in folders.items() if folder.finished])
    context = _context(workspace, name, next(iter(folders.values())), plan, sides)
    told = _explained([*findings, *learned], given, samples)
    diagnosis = Diagnosis(
        run=name, folds=finished.get(name, ()), cases=len(samples), untold=(*untold, *unread),
        findings=tuple(advise(finding, context, samples) for finding in _sorted(told)))
    save_record(workspace.root / "report" / "diagnosis.json", diagnosis)
    return diagnosis


def diagnose_masks(
    predictions: Path, references: Path, labels: Labels | None = None, groups: Mapping[str, Mapping[str, str]] | None = None,
    reporter: Reporter = SILENT, threads: int = 2,
) -> Diagnosis:
    """Diagnose two folders of masks; nothing is known of folds, curves and training, so those rules are left out.

    labels: None for those that a dataset.json in or above `references` declares, else all values found. groups: columns (site,
    scanner, ...) by case. Raises DatasetError and GeometryError as `evaluate` does.
    """
    pairs, _ = pairs_of(predictions, references)
    known = labels or _declared(references) or _found_labels(pairs, threads)
    given = _Given(tuple(pairs), known, groups=groups or {})
    samples, _ = _measure(given, reporter, threads)
    findings, untold = judge(samples)
    told = _explained(findings, given, samples)
    return Diagnosis(cases=len(samples), untold=tuple(untold),
                     findings=tuple(advise(finding, Context(), samples) for finding in _sorted(told)))


def judge(samples: Sequence[Sample]) -> tuple[list[Finding], list[str]]:
    """All findings on the masks of many cases, and what there were too few cases to tell.

    Cases that a bad fold, a shifted group or a fault of their own explains say nothing about the labels in general: these are
    judged on the other cases.
    """
    first = target_findings(samples)
    cohorts = compare_cases(samples, kinds_of(first, target_names(samples)))
    rest = [sample for sample in samples if sample.case not in cohorts.explained]
    findings = target_findings(rest) if LEAST_CASES <= len(rest) < len(samples) else first
    few = [f"{name}: too few cases hold it to tell anything ({len(rows_of(samples, name))}, {LEAST_CASES} are needed)"
           for name in target_names(samples) if len(rows_of(samples, name)) < LEAST_CASES]
    return [*findings, *cohorts.findings], [*few, *cohorts.untold]


def _finished(workspace: Workspace) -> dict[str, tuple[int, ...]]:
    """Folds of each run whose validation holds a mask of every case that has a reference."""
    labelled = {case.case for case in workspace.dataset().cases if case.label is not None}
    splits = workspace.splits()
    runs: dict[str, list[int]] = {}
    for folder in sorted(workspace.runs.glob("*/fold_*")):
        name, number = folder.parent.name, folder.name.removeprefix("fold_")
        if name.startswith((".", "_")) or not number.isdigit() or int(number) >= len(splits):
            continue
        runs.setdefault(name, [])
        validation = folder / "validation"
        if validation.is_dir() and labelled & set(splits[int(number)].val) <= set(find_masks(validation)):
            runs[name].append(int(number))
    return {name: tuple(folds) for name, folds in runs.items()}


def _choose(workspace: Workspace, runs: Mapping[str, Sequence[int]], wanted: str | None) -> str:
    """The run to diagnose."""
    if wanted is not None:
        if wanted not in runs:
            raise RunError(f"{workspace.runs} has no run {wanted!r}; it has {', '.join(runs) or 'none'}")
        return wanted
    if not runs:
        raise RunError(f"{workspace.runs}: there is no run to diagnose; train first: autoseg train {workspace.root}")
    chosen = load_record(workspace.selection_path, Selection).runs if workspace.selection_path.exists() else ()
    candidates = [name for name in chosen if name in runs] or list(runs)
    return max(candidates, key=lambda name: (len(runs[name]) > 0, _dice(workspace, name, runs[name])))


def _dice(workspace: Workspace, run: str, folds: Sequence[int]) -> float:
    paths = [workspace.fold(run, fold) / "validation" / "report.json" for fold in folds]
    scores = [load_record(path, Report).foreground_mean.get("dice") for path in paths if path.exists()]
    known = [score for score in scores if score is not None]
    return fmean(known) if known else 0.0


def _groups(case: CaseFiles) -> dict[str, str]:
    return {**case.attributes, **({"group": case.group} if case.group is not None else {})}


def _slices_along(plan: Plan) -> int | None:
    """The axis in LPS along which slices lie when the spacing does not tell; None when masks are not brought to LPS."""
    return plan.transpose_forward[0] if plan.orientation == "LPS" else None


def _context(workspace: Workspace, run: str, folder: RunFolder, plan: Plan, sides: int | None) -> Context:
    dataset = workspace.dataset()
    data = "DATASET" if dataset.source == "manifest" else dataset.root
    if not folder.record_path.exists():
        return Context(str(workspace.root), data, run, run if run in plan.configurations else "", plan=plan)
    record = folder.record()
    configuration = record.plan.configurations[record.configuration]
    axis = None
    if sides is not None:
        axis = record.plan.transpose_forward.index(sides) - (3 - configuration.dims)
    allowed = record.spec.augment.mirror if record.spec.augment.mirror is not None else configuration.mirror_axes
    mirrored = allowed is None or (bool(allowed) if axis is None else axis in allowed)
    return Context(
        str(workspace.root), data, run, record.configuration, record.spec, record.plan, dataset.groups_from != "none",
        mirrored and (axis is None or axis >= 0), axis if axis is None or axis >= 0 else None,
        workspace.fingerprint().cases if workspace.fingerprint_path.exists() else ())


def _measure(given: _Given, reporter: Reporter, threads: int) -> tuple[list[Sample], int | None]:
    """The errors of every case, sorted by name, and the axis in LPS that most pairs of labels lie along."""
    names = [label.name for label in given.labels.foreground]
    values = {label.name: (label.value,) for label in given.labels.foreground}
    pairs = [((left, values[left]), (right, values[right])) for left, right in pairs_by_name(names)]
    samples: list[Sample] = []
    axes: list[int] = []
    ignore = given.labels.ignore.value if given.labels.ignore else None

    def work(pair: Pair) -> tuple[CaseSymptoms, list[int]]:
        prediction, reference, spacing = _read(pair, given.labels)
        axis = given.slice_axis if max(spacing) <= FLAT_SPACING * min(spacing) else None
        only = given.labelled.get(pair[0])
        both = [sides for sides in pairs if only is None or {name for name, _ in sides} <= set(only)]
        found = measure_symptoms(reference, prediction, spacing, targets_of(given.labels, only), both, ignore, axis)
        return found, [axis for left, right in both if (axis := _side_axis(reference, left, right, spacing)) is not None]

    with reporter.task("diagnose", len(given.pairs)) as task:
        for (case, *_), result in for_each(given.pairs, work, threads, _bytes, (AutosegError,)):
            if isinstance(result, Exception):
                raise result
            samples.append(Sample(case, result[0], given.folds.get(case), given.groups.get(case, {})))
            axes += result[1]
            task.advance(note=case)
    side = int(np.bincount(axes).argmax()) if axes else None
    return sorted(samples, key=lambda sample: sample.case), side


def _bytes(pair: Pair) -> int:
    from autoseg.files.images import read_header

    return int(np.prod(read_header(pair[2]).grid.shape, dtype=np.int64)) * BYTES_PER_VOXEL


def _read(pair: Pair, labels: Labels) -> tuple[Ints, Ints, tuple[float, float, float]]:
    """Prediction, reference and spacing of a case, brought to LPS."""
    case, prediction_path, reference_path = pair
    prediction, reference, grid = read_pair(prediction_path, reference_path, labels, case)
    axis_map = grid.to_lps()
    return np.asarray(axis_map.apply(prediction)), np.asarray(axis_map.apply(reference)), grid.mapped(axis_map).spacing


def _side_axis(reference: Ints, left: Target, right: Target, spacing: Sequence[float]) -> int | None:
    """The axis along which the centres of two labels lie farthest apart."""
    centres = []
    for _, values in (left, right):
        mask = select(reference, values)
        if not mask.any():
            return None
        profiles = [mask.sum(axis=tuple(b for b in range(3) if b != a)) for a in range(3)]
        centres.append([float(np.average(np.arange(len(profile)), weights=profile)) for profile in profiles])
    return int(np.argmax(np.abs(np.asarray(centres[0]) - np.asarray(centres[1])) * np.asarray(spacing)))


def _declared(references: Path) -> Labels | None:
    for folder in (references, references.parent):
        description, _ = describe_beside(folder / "dataset.json")
        if description.labels:
            return description.labels
    return None


def _found_labels(pairs: Sequence[Pair], threads: int) -> Labels:
    def values(pair: Pair) -> set[int]:
        prediction, reference, _ = read_pair(pair[1], pair[2], None, pair[0])
        return {*label_values(prediction), *label_values(reference)}

    found: set[int] = set()
    for _, result in for_each(pairs, values, threads, _bytes, (AutosegError,)):
        if isinstance(result, Exception):
            raise result
        found |= result
    if not found - {0}:
        raise RunError("neither predictions nor references hold any label, so there is nothing to diagnose")
    return Labels(foreground=tuple(Label(name=str(value), value=value) for value in sorted(found - {0})))


def _explained(findings: Sequence[Finding], given: _Given, samples: Sequence[Sample]) -> list[Finding]:
    """Outlier cases looked at once more: is there a simple reason?"""
    files = {pair[0]: pair for pair in given.pairs}
    values = [label.value for label in given.labels.foreground]
    told = []
    for finding in findings:
        if finding.symptom == "outlier_cases":
            reasons = []
            for case in finding.cases[:EXPLAINED_OUTLIERS]:
                prediction, reference, _ = _read(files[case], given.labels)
                if reason := explain_misfit(reference, prediction, values):
                    reasons.append(f"{case}: {reason}")
            finding = finding.model_copy(update={"causes": (*finding.causes, *reasons)})
        told.append(finding)
    return told


def _sorted(findings: Sequence[Finding]) -> list[Finding]:
    order = list(SYMPTOMS)
    return sorted(findings, key=lambda finding: order.index(finding.symptom))


def describe_diagnosis(diagnosis: Diagnosis) -> list[str]:
    """The diagnosis in plain lines: what is wrong, the numbers, likely causes, cases to look at, what to try."""
    of = f" of run {diagnosis.run}" if diagnosis.run else ""
    folds = f", folds {', '.join(map(str, diagnosis.folds))}" if diagnosis.folds else ""
    lines = [f"{diagnosis.cases} cases{of}{folds}" + (":" if diagnosis.findings else ": nothing stands out")]
    for symptom in diagnosis.symptoms:
        alike = [finding for finding in diagnosis.findings if finding.symptom == symptom]
        if len(alike) <= APART:
            for finding in alike:
                lines += ["", f"{finding.target}: {SYMPTOMS[symptom]}" if finding.target else SYMPTOMS[symptom], *_told(finding)]
        else:
            names = ", ".join(finding.target for finding in alike)
            lines += ["", f"{len(alike)} times: {SYMPTOMS[symptom]} ({names}); the first in numbers:", *_told(alike[0])]
    if diagnosis.untold:
        lines += ["", "could not be told:", *(f"  {line}" for line in diagnosis.untold)]
    return lines


def _told(finding: Finding) -> list[str]:
    lines = [f"  found:   {e.quantity}: {e.value:.3g} ({'limit: ' if e.source else ''}{e.rule})" for e in finding.evidence]
    lines += [f"  cause:   {cause}" for cause in finding.causes]
    if finding.cases:
        lines.append(f"  look at: {', '.join(finding.cases[:8])}" + (", ..." if len(finding.cases) > 8 else ""))
    for remedy in finding.remedies:
        lines += [f"  try:     {remedy.command}", f"           {remedy.why}"]
    return lines
