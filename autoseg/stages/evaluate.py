"""Compare masks with references: metrics per case and label, one report, and the table that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.components import apply_postprocessing
from autoseg.arrays.metrics import Target, default_tolerance_mm, label_values, measure
from autoseg.datasets.description import describe_beside
from autoseg.errors import AutosegError, DatasetError, GeometryError
from autoseg.files.images import ENDINGS, compare_grids, read_label, split_ending
from autoseg.logs import SILENT, Reporter
from autoseg.types.geometry import Grid
from autoseg.types.labels import Labels
from autoseg.types.record import Spec
from autoseg.types.report import COUNTS, METRICS, CaseMetrics, Report, Value, Values

Masks = Path | Mapping[str, Path]
Ints = NDArray[np.integer]
Pair = tuple[str, Path, Path]
Outcome = tuple[str, CaseMetrics | AutosegError]
PROBABILITIES = "_probabilities"  # predict writes these beside the masks
LISTED = 20  # faults and names listed in one message


def find_masks(masks: Masks) -> dict[str, Path]:
    """Mask files by case name, sorted; a folder's cases are its image files without their ending, probabilities left out.

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
        if case.endswith(PROBABILITIES):
            continue
        if case in found:
            raise DatasetError(f"{masks} holds case {case} twice: {found[case].name} and {path.name}; keep one of them")
        found[case] = path
    return found


def labels_beside(references: Path) -> Labels | None:
    """The labels that a dataset.json in or above the folder declares, when they hold regions or an ignore label; else None.

    Without it every value is measured as it is found in the files, which is right for plain labels only.
    """
    for folder in (references, references.parent):
        description, _ = describe_beside(folder / "dataset.json")
        if description.labels and (description.labels.regions or description.labels.ignore):
            return description.labels
    return None


def targets_of(labels: Labels) -> list[Target]:
    """Names and disk values of what is measured: the regions, or the foreground labels."""
    if labels.regions:
        return [(region.name, region.values) for region in labels.regions]
    return [(label.name, (label.value,)) for label in labels.foreground]


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


def postprocess(label_zyx: Ints, labels: Labels, steps: Sequence[Spec]) -> Ints:
    """Apply post-processing steps, which speak in inside indices, to a label map in disk values."""
    if not steps:
        return label_zyx
    index = np.asarray(labels.encode(label_zyx))
    done = apply_postprocessing(index, steps)
    kind = np.promote_types(label_zyx.dtype, np.min_scalar_type(labels.background.value))
    return np.where(done != index, np.asarray(labels.background.value, kind), label_zyx)


def _measure_case(pair: Pair, labels: Labels | None, tolerance_mm: float | None, steps: Sequence[Spec]) -> CaseMetrics:
    """Read and measure one case; without `labels`, the values other than 0 that occur in it."""
    case, prediction_path, reference_path = pair
    prediction, reference, grid = read_pair(prediction_path, reference_path, labels, case)
    ignore = labels.ignore.value if labels and labels.ignore else None
    if labels is not None:
        targets = targets_of(labels)
        prediction = postprocess(prediction, labels, steps)
    else:
        found = sorted({*label_values(prediction), *label_values(reference)} - {0})
        targets = [(str(value), (value,)) for value in found]
    tolerance = default_tolerance_mm(grid.shape, grid.spacing) if tolerance_mm is None else tolerance_mm
    metrics = measure(reference, prediction, grid.spacing, targets, tolerance, ignore)
    return CaseMetrics(case=case, metrics=metrics, tolerance_mm=tolerance)


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
    reporter: Reporter = SILENT, postprocessing: Sequence[Spec] = (),
) -> Report:
    """Measure every reference's prediction; files belong together by case name, their endings may differ.

    predictions, references: a folder, or files by case. labels: what is measured and which values may occur; without it every
    value but 0 that is found in any file. nsd_tolerance_mm: None for one voxel in-plane of each case. postprocessing: steps in
    inside indices, applied to the predictions first (needs `labels`).
    Raises DatasetError when predictions are missing or a file is faulty, GeometryError when a prediction lies on another grid
    than its reference; all faulty cases are listed at once.
    """
    if postprocessing and labels is None:
        raise ValueError("post-processing needs labels")
    if nsd_tolerance_mm is not None and not (np.isfinite(nsd_tolerance_mm) and nsd_tolerance_mm >= 0):
        raise DatasetError(f"the tolerance of NSD must be 0 mm or more, found {nsd_tolerance_mm}")
    pairs, unused = pairs_of(predictions, references)
    if unused:
        reporter.warn(f"{len(unused)} predictions have no reference and are not measured: {', '.join(unused[:LISTED])}")
    cases: list[CaseMetrics] = []
    faults: list[AutosegError] = []
    with reporter.task("evaluate", len(pairs)) as task:
        for case, result in run_cases(lambda p: _measure_case(p, labels, nsd_tolerance_mm, postprocessing), pairs, threads):
            if isinstance(result, AutosegError):
                faults.append(result)
            else:
                cases.append(result)
            task.advance(note=case)
    if faults:
        raise _together(faults)
    return Report.of(_with_all_labels(cases) if labels is None else cases, nsd_tolerance_mm)


def _together(faults: Sequence[AutosegError]) -> AutosegError:
    """One error for all faulty cases, of their common kind."""
    kinds = {type(fault) for fault in faults}
    lines = sorted(str(fault) for fault in faults)
    text = "\n".join(lines[:LISTED]) + (f"\n... and {len(lines) - LISTED} more" if len(lines) > LISTED else "")
    return kinds.pop()(text) if len(kinds) == 1 else DatasetError(text)


def _with_all_labels(cases: Sequence[CaseMetrics]) -> list[CaseMetrics]:
    """Give each case an entry for the labels that only other cases hold: nothing defined but the zero counts."""
    names = sorted({label for case in cases for label in case.metrics}, key=int)
    absent: Values = {**dict.fromkeys(METRICS), **dict.fromkeys(COUNTS, 0), "specificity": 1.0}
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
    return Report.of(cases, tolerances.pop() if tolerances else None)


def report_table(report: Report) -> list[list[str]]:
    """The report's means as rows of text: a heading, one row per label, the foreground mean.

    A mean over fewer cases than the report holds says over how many; the last columns count the cases in which a label is in
    neither mask, was missed entirely, or was found where there is none.
    """
    names = [name for name in METRICS if name in report.foreground_mean]
    rows = [["label", *names, "absent", "missed", "spurious"]]
    for label, values in report.mean.items():
        empty, defined = report.empty.get(label), report.defined.get(label, {})
        cells = [_cell(name, values.get(name), defined.get(name, 0), len(report.cases)) for name in names]
        rows.append([label, *cells, *([str(n) for n in (empty.absent, empty.missed, empty.spurious)] if empty else [""] * 3)])
    whole = len(report.cases)
    rows.append(["foreground mean", *(_cell(name, report.foreground_mean[name], whole, whole) for name in names), "", "", ""])
    return rows


def _cell(name: str, value: Value, defined: int, cases: int) -> str:
    if value is None:
        return "-"
    text = f"{value:+.3f}" if name == "volume_error" else f"{value:.2f} mm" if name.startswith("hd") else f"{value:.4f}"
    return text if defined == cases else f"{text} ({defined})"
