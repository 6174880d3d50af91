"""Compare masks with references: metrics per case and label, one report, and the table that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.metrics import Target, default_tolerance_mm, examine, label_values
from autoseg.datasets.description import describe_beside, with_annotated
from autoseg.datasets.manifest import MANIFEST_ENDINGS, read_manifest
from autoseg.datasets.splits import groups_from_names
from autoseg.errors import AutosegError, DatasetError, GeometryError
from autoseg.files.images import ENDINGS, compare_grids, read_label, split_ending
from autoseg.files.workspace import Workspace
from autoseg.logs import SILENT, Reporter
from autoseg.types.dataset import CaseFiles
from autoseg.types.geometry import Grid
from autoseg.types.labels import Labels
from autoseg.types.report import COUNTS, METRICS, CaseMetrics, Report, Value, Values

Masks = Path | Mapping[str, Path]
Ints = NDArray[np.integer]
Pair = tuple[str, Path, Path]
Outcome = tuple[str, CaseMetrics | AutosegError]
MAPS = ("_probabilities", "_uncertainty")  # what `predict` may write beside a mask
LISTED = 20  # faults and names listed in one message
SHOWN = ("dice", "sensitivity", "precision", "hd95", "assd", "nsd", "volume_error", "lesion_f1")  # in the printed table
EXPLAINED = ("lesion", "surface", "mean", "empty", "intervals")


def find_masks(masks: Masks) -> dict[str, Path]:
    """Mask files by case name, sorted; a folder's cases are its image files without their ending, maps beside them left out.

    Raises DatasetError when the folder does not exist or holds one case under two endings.
    """
    if not isinstance(masks, Path):
        return dict(sorted(masks.items()))
    if not masks.is_dir():
        raise DatasetError(f"{masks} is not a folder of masks")
    found: dict[str, Path] = {}
    for path in sorted(masks.iterdir()):
        if path.name.startswith(".") or not path.is_file() or not path.name.lower().endswith(tuple(ENDINGS)):
            continue
        case, _ = split_ending(path.name)
        if case.endswith(MAPS):
            continue
        if case in found:
            raise DatasetError(f"{masks} holds case {case} twice: {found[case].name} and {path.name}; keep one of them")
        found[case] = path
    return found


@dataclass(frozen=True)
class References:
    """Reference masks by case, what is known about their labels and cases, and may cases lack a prediction (`part`)."""

    masks: dict[str, Path]
    labels: Labels | None = None
    cases: tuple[CaseFiles, ...] = ()
    part: bool = False


def find_references(path: Path) -> References:
    """Reference masks of a folder of masks, a manifest, or a work folder.

    A dataset.json in or above a folder names its labels, regions and ignore label; without it every value is measured as it is
    found. A manifest's or work folder's cases bring patients and further columns, and need not all be predicted.
    Raises DatasetError when there is none.
    """
    if path.is_file() and path.suffix.lower() in MANIFEST_ENDINGS:
        listing = read_manifest(path)
        cases, labels = listing.cases, listing.description.labels
        if labels is not None:
            cases, _ = with_annotated(cases, labels, listing.description, path)
    elif Workspace(path).plan_path.is_file():
        dataset = Workspace(path).dataset()
        cases, labels = dataset.cases, dataset.labels
    else:
        return References(find_masks(path), labels_beside(path))
    masks = {case.case: Path(case.label) for case in cases if case.label}
    if not masks:
        raise DatasetError(f"{path} names no label file; expected one for each case that is to be measured")
    return References(masks, labels, cases, part=True)


def labels_beside(references: Path) -> Labels | None:
    """The labels that a dataset.json in or above the folder declares; None without it."""
    for folder in (references, references.parent):
        description, _ = describe_beside(folder / "dataset.json")
        if description.labels:
            return description.labels
    return None


def targets_of(labels: Labels, labelled: Sequence[str] | None = None) -> list[Target]:
    """Names and disk values of what is measured: the regions, or the foreground labels; those annotated where `labelled` are."""
    if labels.regions:
        targets = [(region.name, region.values) for region in labels.regions]
    else:
        targets = [(label.name, (label.value,)) for label in labels.foreground]
    return [targets[index] for index in labels.annotated(labelled)]


def read_pair(prediction: Path, reference: Path, labels: Labels | None, case: str) -> tuple[Ints, Ints, Grid]:
    """A prediction and its reference as label maps (z, y, x) in disk values, and their common grid.

    Raises GeometryError when their grids differ by more than rounding noise, DatasetError for values that `labels` lacks.
    """
    prediction_zyx, prediction_grid = read_label(prediction)
    reference_zyx, grid = read_label(reference)
    differences = [d for d in compare_grids(grid, prediction_grid) if not d.noise]
    if differences:
        listed = "; ".join(f"{d.field}: expected {d.expected}, found {d.found}" for d in differences)
        raise GeometryError(f"case {case}: {prediction} does not lie on the grid of {reference} ({listed}); predict it again")
    if labels is not None:
        for path, array in ((prediction, prediction_zyx), (reference, reference_zyx)):
            unknown = sorted(set(label_values(array)) - set(labels.values))
            if unknown:
                raise DatasetError(
                    f"case {case}: {path} holds label values {unknown[:10]}, expected only {sorted(labels.values)}; "
                    "correct the file or declare these labels")
    return prediction_zyx, reference_zyx, grid


def _measure_case(
    pair: Pair, labels: Labels | None, tolerance_mm: float | None, labelled: Sequence[str] | None = None,
) -> CaseMetrics:
    """Read and measure one case; without `labels`, the values other than 0 that occur in it.

    With `labelled`, only these labels are annotated in the reference: every value of the others is undefined.
    """
    case, prediction_path, reference_path = pair
    prediction, reference, grid = read_pair(prediction_path, reference_path, labels, case)
    ignore = labels.ignore.value if labels and labels.ignore else None
    if labels is not None:
        targets = targets_of(labels, labelled)
    else:
        values = sorted({*label_values(prediction), *label_values(reference)} - {0})
        targets = [(str(value), (value,)) for value in values]
    tolerance = default_tolerance_mm(grid.shape, grid.spacing) if tolerance_mm is None else tolerance_mm
    found = examine(reference, prediction, grid.spacing, targets, tolerance, ignore)
    metrics = found.metrics
    if labels is not None:
        metrics = {name: metrics.get(name, dict.fromkeys((*METRICS, *COUNTS))) for name, _ in targets_of(labels)}
    return CaseMetrics(case=case, metrics=metrics, lesions=found.lesions, tolerance_mm=tolerance)


def pairs_of(predictions: Masks, references: Masks) -> tuple[list[Pair], list[str]]:
    """Each reference with its prediction, and the predictions that have no reference.

    Raises DatasetError when there is no reference or when predictions are missing, and lists them.
    """
    found, wanted = find_masks(predictions), find_masks(references)
    if not wanted:
        raise DatasetError(f"{references} holds no reference masks (readable endings: {', '.join(ENDINGS)})")
    missing = [case for case in wanted if case not in found]
    if missing:
        where = predictions if isinstance(predictions, Path) else "the predictions given"
        listed = ", ".join(missing[:LISTED]) + (", ..." if len(missing) > LISTED else "")
        raise DatasetError(
            f"{where}: {len(missing)} of {len(wanted)} cases have a reference and no prediction: {listed}. "
            "Predict them, or give only the references that are meant")
    return [(case, found[case], wanted[case]) for case in wanted], [case for case in found if case not in wanted]


def run_cases(work: Callable[[Pair], CaseMetrics], pairs: Sequence[Pair], threads: int) -> Iterator[Outcome]:
    """Do `work` for each pair, in `threads` threads or (0) in this one; yields results and user errors as they come."""
    def attempt(pair: Pair) -> Outcome:
        try:
            return pair[0], work(pair)
        except AutosegError as error:
            return pair[0], error

    if threads <= 1:
        yield from map(attempt, pairs)
        return
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(attempt, pair) for pair in pairs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def evaluate(
    predictions: Masks, references: Masks, labels: Labels | None = None, nsd_tolerance_mm: float | None = None, threads: int = 2,
    reporter: Reporter = SILENT, cases: Iterable[CaseFiles] = (),
) -> Report:
    """Measure every reference's prediction; files belong together by case name, their endings may differ.

    predictions, references: a folder, or files by case. labels: what is measured and which values may occur; without it every
    value but 0 that is found in any file. nsd_tolerance_mm: None for one voxel in-plane of each case. cases: patients, further
    manifest columns and which labels are annotated, where known; without them patients are recognised in the cases' names.
    Raises DatasetError when predictions are missing or a file is faulty, GeometryError when a prediction lies on another grid
    than its reference; all faulty cases are listed at once.
    """
    if nsd_tolerance_mm is not None and not (np.isfinite(nsd_tolerance_mm) and nsd_tolerance_mm >= 0):
        raise DatasetError(f"the tolerance of NSD must be 0 mm or more, found {nsd_tolerance_mm}")
    pairs, unused = pairs_of(predictions, references)
    cases = tuple(cases)
    labelled = {case.case: case.labelled for case in cases}
    if unused:
        reporter.warn(f"{len(unused)} predictions have no reference and are not measured: {', '.join(unused[:LISTED])}")
    measured: list[CaseMetrics] = []
    faults: list[AutosegError] = []
    with reporter.task("evaluate", len(pairs)) as task:
        for case, result in run_cases(lambda p: _measure_case(p, labels, nsd_tolerance_mm, labelled.get(p[0])), pairs, threads):
            if isinstance(result, AutosegError):
                faults.append(result)
            else:
                measured.append(result)
            task.advance(note=case)
    if faults:
        raise _together(faults)
    whole = _with_all_labels(measured) if labels is None else measured
    return with_intervals(Report.of(_with_patients(whole, cases), nsd_tolerance_mm))


def _with_patients(measured: Sequence[CaseMetrics], cases: Iterable[CaseFiles]) -> list[CaseMetrics]:
    """The measured cases with their patients and attributes."""
    known = {case.case: case for case in cases}
    patients = {name: case.group for name, case in known.items()} if known else groups_from_names(c.case for c in measured) or {}
    return [
        case.model_copy(update={
            "patient": patients.get(case.case), "attributes": known[case.case].attributes if case.case in known else {}})
        for case in measured
    ]


def evaluate_folder(
    predictions: Path, references: Path, nsd_tolerance_mm: float | None = None, threads: int = 2, reporter: Reporter = SILENT,
) -> Report:
    """Measure a folder of masks against a folder of masks, a manifest, or the labels of a work folder.

    Of a manifest or work folder the predicted cases are measured, of a folder all must have a prediction.
    Raises what `evaluate` and `find_references` raise.
    """
    found = find_references(references)
    wanted: Masks = references
    if found.part:
        masks = find_masks(predictions)
        wanted = {case: path for case, path in found.masks.items() if case in masks} or found.masks
        if len(wanted) < len(found.masks):
            reporter.warn(f"{len(wanted)} of {len(found.masks)} labelled cases of {references} are predicted and measured")
    return evaluate(predictions, wanted, found.labels, nsd_tolerance_mm, threads, reporter, cases=found.cases)


def with_intervals(report: Report) -> Report:
    """The report with 95 % bootstrap intervals of its means, patients drawn with all of their cases."""
    from autoseg.arrays.intervals import mean_intervals, mean_of_means_interval

    patients = [case.patient or case.case for case in report.cases]
    pairs = [(label, name) for label, values in report.mean.items() for name in values]
    table = np.array(
        [[_float(case.metrics.get(label, {}).get(name)) for label, name in pairs] for case in report.cases], np.float64,
    ).reshape(len(report.cases), len(pairs))
    intervals: dict[str, dict[str, tuple[float, float]]] = {label: {} for label in report.mean}
    for (label, name), (low, high) in zip(pairs, mean_intervals(table, patients).tolist(), strict=True):
        if np.isfinite(low):
            intervals[label][name] = (low, high)
    foreground: dict[str, tuple[float, float]] = {}
    for name in report.foreground_mean:
        low, high = mean_of_means_interval(table[:, [other == name for _, other in pairs]], patients)
        if np.isfinite(low):
            foreground[name] = (low, high)
    return report.model_copy(update={"intervals": intervals, "foreground_intervals": foreground})


def _float(value: Value) -> float:
    return np.nan if value is None else float(value)


def _together(faults: Sequence[AutosegError]) -> AutosegError:
    """One error for all faulty cases, of their common kind."""
    kinds = {type(fault) for fault in faults}
    lines = sorted(str(fault) for fault in faults)
    text = "\n".join(lines[:LISTED]) + (f"\n... and {len(lines) - LISTED} more" if len(lines) > LISTED else "")
    return kinds.pop()(text) if len(kinds) == 1 else DatasetError(text)


def _with_all_labels(cases: Sequence[CaseMetrics]) -> list[CaseMetrics]:
    """Give each case an entry for the labels that only other cases hold: nothing defined but the zero counts."""
    names = sorted({label for case in cases for label in case.metrics}, key=int)
    absent: Values = {**dict.fromkeys(METRICS), **dict.fromkeys(COUNTS, 0), "specificity": 1.0, "lesion_false_positives": 0}
    return [case.model_copy(update={"metrics": {name: case.metrics.get(name, dict(absent)) for name in names}}) for case in cases]


def merge_reports(reports: Iterable[Report]) -> Report:
    """One report over the cases of several, for example the folds of a cross-validation.

    Raises ValueError when a case occurs twice or the reports used different tolerances.
    """
    given = list(reports)
    cases = [case for report in given for case in report.cases]
    if len({case.case for case in cases}) != len(cases):
        raise ValueError("a case occurs in two of the reports to be merged")
    tolerances = {report.tolerance_mm for report in given}
    if len(tolerances) > 1:
        raise ValueError(f"reports with different tolerances cannot be merged, found {sorted(map(str, tolerances))}")
    return with_intervals(Report.of(cases, tolerances.pop() if tolerances else None))


def report_table(report: Report) -> list[list[str]]:
    """The report's means as rows of text: a heading, one row per label, the foreground mean.

    The interval is that of Dice. A mean over fewer cases than the report holds says over how many; the last columns count the
    cases in which a label is in neither mask, was missed entirely, or was found where there is none.
    """
    names = [name for name in SHOWN if name in report.foreground_mean]
    rows = [["label", *_with_interval(names, "95 % interval"), "absent", "missed", "spurious"]]
    whole = len(report.cases)
    for label, values in report.mean.items():
        empty, defined = report.empty.get(label), report.defined.get(label, {})
        cells = [_cell(name, values.get(name), defined.get(name, 0), whole) for name in names]
        interval = _interval(report.intervals.get(label, {}).get("dice"))
        counts = [str(n) for n in (empty.absent, empty.missed, empty.spurious)] if empty else [""] * 3
        rows.append([label, *_with_interval(cells, interval), *counts])
    cells = [_cell(name, report.foreground_mean[name], whole, whole) for name in names]
    interval = _interval(report.foreground_intervals.get("dice"))
    rows.append(["foreground mean", *_with_interval(cells, interval), "", "", ""])
    return rows


def _with_interval(cells: Sequence[str], interval: str) -> list[str]:
    return [*cells[:1], interval, *cells[1:]]


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _cell(name: str, value: Value, defined: int, cases: int) -> str:
    if value is None:
        return "-"
    text = f"{value:+.3f}" if name == "volume_error" else f"{value:.2f} mm" if name in ("hd95", "assd") else f"{value:.4f}"
    return text if defined == cases else f"{text} ({defined})"


def group_table(report: Report) -> list[list[str]]:
    """Dice of each label by group of cases: a heading, then a row per column and value; the heading alone without groups."""
    labels = list(report.mean)
    rows = [["column", "value", "cases", *labels]]
    for column, values in report.groups.items():
        for value, means in values.items():
            cells = [_cell("dice", means.get(label, {}).get("dice"), 1, 1) for label in labels]
            rows.append([column, value, str(report.group_cases[column][value]), *cells])
    return rows


def lesion_table(report: Report) -> list[list[str]]:
    """Lesions by label and size class over all cases: in the reference, found, in the prediction, false."""
    rows = [["label", "size", "reference", "found", "prediction", "false"]]
    for label, classes in report.lesions.items():
        rows += [
            [label, size, *(str(n) for n in (count.reference, count.found, count.prediction, count.false))]
            for size, count in classes.items()
        ]
    return rows


def definition_lines(report: Report) -> list[str]:
    """The definitions of what `report_table` shows, a line each, and the tolerances that were used."""
    used = sorted({case.tolerance_mm for case in report.cases if case.tolerance_mm is not None})
    spread = f"{used[0]:g}" if len(used) == 1 else f"{used[0]:g} to {used[-1]:g}" if used else "none"
    names = [*(name for name in SHOWN if name in report.foreground_mean), *EXPLAINED]
    lines = [f"{name}: {report.definitions[name]}" for name in names if name in report.definitions]
    return [*lines, f"tolerance of NSD: {spread} mm; intervals over {report.patients} patients"]
