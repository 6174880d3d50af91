"""How good predictions are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Literal

from pydantic import Field

from autoseg.types.record import Record

Value = int | float | None
Values = dict[str, Value]

COUNTS = ("n_reference", "n_prediction", "lesions_reference", "lesions_prediction", "lesions_found")
"""Numbers that stand beside the metrics of a case and are not averaged."""

METRICS = (
    "dice", "iou", "sensitivity", "specificity", "precision", "volume_error", "volume_error_abs", "volume_error_ml",
    "hd", "hd95", "assd", "nsd", "lesion_recall", "lesion_precision", "lesion_f1", "lesion_false_positives",
)
"""All metrics, in the order in which they are listed."""

LESION_BORDERS = (0.01, 0.1, 1.0, 10.0)
"""Borders of the lesions' size classes, in ml (spheres of 2.7, 5.8, 12.4 and 26.7 mm), in a single slice in cm2."""

MOST_GROUPS = 20  # different values of a column whose cases are reported as groups
NOT_STATED = "(not stated)"

DEFINITIONS: dict[str, str] = {
    "dice": "2 TP / (2 TP + FP + FN), voxels; undefined (null) when reference and prediction are both empty, 0 when one is",
    "iou": "TP / (TP + FP + FN), voxels; undefined when both are empty, 0 when one is",
    "sensitivity": "TP / (TP + FN), voxels; undefined when the reference is empty",
    "specificity": "TN / (TN + FP), voxels of the whole image; undefined when the reference fills it",
    "precision": "TP / (TP + FP), voxels; undefined when the prediction is empty",
    "volume_error": "(prediction - reference) / reference, signed; undefined when the reference is empty",
    "volume_error_abs": "|prediction - reference| / reference; undefined when the reference is empty",
    "volume_error_ml": "prediction - reference, ml, signed; undefined when both are empty, and in a single slice",
    "hd": "mm; Hausdorff distance, the largest distance from a point of one surface to the other surface; undefined when "
          "reference or prediction is empty (see 'empty' for how often)",
    "hd95": "mm; the larger of the two directed 95th percentiles of surface distance, each weighted by surface area; undefined "
            "as hd is",
    "assd": "mm; mean surface distance over both surfaces taken together, weighted by surface area; undefined as hd is",
    "nsd": "normalised surface distance (surface Dice): share of both surfaces, by area, within tolerance_mm of the other; "
           "undefined when both are empty, 0 when one is",
    "lesion_recall": "share of the reference's lesions that are found; undefined when it has none",
    "lesion_precision": "share of the prediction's lesions that are not false; undefined when it has none",
    "lesion_f1": "2 found / (2 found + false + missed); undefined when both are empty, 0 when one is",
    "lesion_false_positives": "false lesions per case",
    "n_reference": "voxels of the reference",
    "n_prediction": "voxels of the prediction",
    "lesions_reference": "lesions of the reference",
    "lesions_prediction": "lesions of the prediction",
    "lesions_found": "lesions of the reference that are found",
    "lesion": "a connected component (voxels that share a face, an edge or a corner belong together); one of the reference is "
              "found when at least one of its voxels is in the prediction, one of the prediction is false when none is in the "
              "reference",
    "lesions": "counts by the lesion's own size; the borders are 0.01, 0.1, 1 and 10 ml, in a single slice cm2; a lesion on a "
               "border is in the larger class",
    "surface": "surface elements lie on the corners between voxels, with the area of marching cubes' triangles at true spacing "
               "(Nikolov et al. 2018); in 2D the contour and its length in-plane; masks are closed at the image's border",
    "tolerance_mm": "unless given, one voxel in-plane of each case: the second finest of three spacings, in 2D the coarser one",
    "ignore": "voxels whose reference is the ignore label belong to neither mask and are not counted",
    "mean": "mean over the cases in which the value is defined; 'defined' says how many these are for each label and metric",
    "foreground_mean": "mean of the labels' means; labels whose mean is undefined do not take part",
    "empty": "cases where a label is in neither mask (absent), was not found at all (missed) or found where none is (spurious)",
    "intervals": "95 % bootstrap intervals of the means: patients are drawn with replacement, with all of their cases",
    "groups": f"means over the cases that share a value of a further manifest column (those with 2 to {MOST_GROUPS} values)",
}


class LesionCount(Record):
    """Lesions of one size class: in the reference, those of them found, in the prediction, those of them false."""

    reference: int = 0
    found: int = 0
    prediction: int = 0
    false: int = 0

    def plus(self, other: LesionCount) -> LesionCount:
        """Both counts together."""
        return LesionCount(reference=self.reference + other.reference, found=self.found + other.found,
                           prediction=self.prediction + other.prediction, false=self.false + other.false)


@cache
def lesion_classes(unit: str) -> tuple[str, ...]:
    """Names of the size classes in rising order; `unit` is ml, or cm2 in a single slice."""
    names = [f"{low:g}-{high:g} {unit}" for low, high in pairwise(LESION_BORDERS)]
    return (f"<{LESION_BORDERS[0]:g} {unit}", *names, f">={LESION_BORDERS[-1]:g} {unit}")


class CaseMetrics(Record):
    """One case: its values by label and metric (null where undefined), and the tolerance of its NSD in mm.

    `lesions` holds counts by label and size class; `patient` and `attributes` (site, scanner, ...) come from the data set.
    """

    case: str
    metrics: dict[str, Values]
    tolerance_mm: float | None = None
    lesions: dict[str, dict[str, LesionCount]] = {}
    patient: str | None = None
    attributes: dict[str, str] = {}


class EmptyCount(Record):
    """In how many cases a label is empty in both masks, only in the prediction, or only in the reference."""

    absent: int = 0
    missed: int = 0
    spurious: int = 0


class Report(Record):
    """Metrics of every case and label, and their means; an undefined value is None (null), never NaN.

    `lesions` are the cases' counts together. `intervals` (low, high) belong to `mean`, `foreground_intervals` to
    `foreground_mean`, and rest on `patients`; undefined ones are left out. `groups` holds means by column, value and label,
    `group_cases` how many cases these go over.
    """

    format: Literal[1] = 1
    cases: tuple[CaseMetrics, ...]
    mean: dict[str, Values]
    foreground_mean: Values
    defined: dict[str, dict[str, int]] = Field(default_factory=dict)
    empty: dict[str, EmptyCount] = Field(default_factory=dict)
    lesions: dict[str, dict[str, LesionCount]] = Field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = Field(default_factory=dict)
    foreground_intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    patients: int = 0
    groups: dict[str, dict[str, dict[str, Values]]] = Field(default_factory=dict)
    group_cases: dict[str, dict[str, int]] = Field(default_factory=dict)
    tolerance_mm: float | None = None
    definitions: dict[str, str] = Field(default_factory=lambda: dict(DEFINITIONS))

    @classmethod
    def of(cls, cases: Iterable[CaseMetrics], tolerance_mm: float | None = None) -> Report:
        """The report of `cases`, sorted by name, without intervals; labels in the order in which they first appear."""
        ordered = tuple(sorted(cases, key=lambda c: c.case))
        rows, mean = _rows(ordered), _label_means(ordered)
        grouped = _grouped(ordered)
        return cls(
            cases=ordered, mean=mean, foreground_mean=_means(list(mean.values())), tolerance_mm=tolerance_mm,
            defined={label: {name: _count(values, name) for name in _names(values)} for label, values in rows.items()},
            empty={label: _empty(values) for label, values in rows.items()}, lesions=_lesions(ordered),
            patients=len({case.patient or case.case for case in ordered}),
            groups={column: {value: _label_means(part) for value, part in parts.items()} for column, parts in grouped.items()},
            group_cases={column: {value: len(part) for value, part in parts.items()} for column, parts in grouped.items()},
        )


def _rows(cases: Iterable[CaseMetrics]) -> dict[str, list[Values]]:
    """The values of each label, case by case."""
    rows: dict[str, list[Values]] = {}
    for case in cases:
        for label, values in case.metrics.items():
            rows.setdefault(label, []).append(values)
    return rows


def _label_means(cases: Iterable[CaseMetrics]) -> dict[str, Values]:
    """The means of each label."""
    return {label: _means(values) for label, values in _rows(cases).items()}


def _grouped(cases: Sequence[CaseMetrics]) -> dict[str, dict[str, list[CaseMetrics]]]:
    """The cases by column and value; columns with one value only, or too many to be groups, are left out."""
    columns = dict.fromkeys(column for case in cases for column in case.attributes)
    grouped: dict[str, dict[str, list[CaseMetrics]]] = {}
    for column in columns:
        parts: dict[str, list[CaseMetrics]] = {}
        for case in cases:
            parts.setdefault(case.attributes.get(column, NOT_STATED), []).append(case)
        if 1 < len(parts) <= MOST_GROUPS and len(parts) < len(cases):
            grouped[column] = {value: parts[value] for value in sorted(parts, key=lambda v: (v == NOT_STATED, v))}
    return grouped


def _lesions(cases: Iterable[CaseMetrics]) -> dict[str, dict[str, LesionCount]]:
    """The cases' lesions together, size classes in rising order."""
    sums: dict[str, dict[str, LesionCount]] = {}
    for case in cases:
        for label, counts in case.lesions.items():
            kept = sums.setdefault(label, {})
            for name, count in counts.items():
                kept[name] = kept.get(name, LesionCount()).plus(count)
    order = [*lesion_classes("ml"), *lesion_classes("cm2")]
    return {label: {name: counts[name] for name in order if name in counts} for label, counts in sums.items()}


def _names(rows: Iterable[Mapping[str, Value]]) -> list[str]:
    """Names of all metrics in `rows`, counts left out."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in COUNTS))


def _count(rows: Iterable[Mapping[str, Value]], name: str) -> int:
    return sum(row.get(name) is not None for row in rows)


def _means(rows: list[Values]) -> Values:
    """Mean of each metric over the rows that define it; None where none does."""
    means: Values = {}
    for name in _names(rows):
        defined = [value for row in rows if (value := row.get(name)) is not None]
        means[name] = sum(defined) / len(defined) if defined else None
    return means


def _empty(rows: Iterable[Mapping[str, Value]]) -> EmptyCount:
    counted = [row for row in rows if row.get("n_reference") is not None]  # not where the label is not annotated
    kinds = [(bool(row["n_reference"]), bool(row.get("n_prediction"))) for row in counted]
    return EmptyCount(absent=kinds.count((False, False)), missed=kinds.count((True, False)), spurious=kinds.count((False, True)))
