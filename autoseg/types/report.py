"""How good predictions are, and which runs and post-processing are used for predicting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from autoseg.types.record import Record, Spec

Value = int | float | None
Values = dict[str, Value]

COUNTS = ("n_reference", "n_prediction")
METRICS = ("dice", "iou", "sensitivity", "specificity", "precision", "hd95", "nsd", "volume_error")
"""Metrics in the order in which they are shown; counts stand beside them but are not averaged."""

DEFINITIONS: dict[str, str] = {
    "dice": "2 TP / (2 TP + FP + FN), voxels; undefined (null) when reference and prediction are both empty, 0 when one is",
    "iou": "TP / (TP + FP + FN), voxels; undefined when both are empty, 0 when one is",
    "sensitivity": "TP / (TP + FN), voxels; undefined when the reference is empty",
    "specificity": "TN / (TN + FP), voxels; undefined when the reference fills the image",
    "precision": "TP / (TP + FP), voxels; undefined when the prediction is empty",
    "hd95": "mm; the larger of the two directed 95th percentiles of surface distance, each weighted by surface area; "
            "undefined when reference or prediction is empty (see 'empty' for how often)",
    "nsd": "normalised surface distance (surface Dice): share of both surfaces, by area, within tolerance_mm of the other; "
           "undefined when both are empty, 0 when one is",
    "volume_error": "(prediction - reference) / reference, voxels, signed; undefined when the reference is empty",
    "n_reference": "voxels of the reference",
    "n_prediction": "voxels of the prediction",
    "surface": "surface elements lie on the corners between voxels, with the area of marching cubes' triangles at true spacing "
               "(Nikolov et al. 2018); in 2D the contour and its length in-plane; masks are closed at the image's border",
    "tolerance_mm": "unless given, one voxel in-plane of each case: the second finest of three spacings, in 2D the coarser one",
    "ignore": "voxels whose reference is the ignore label belong to neither mask and are not counted",
    "mean": "mean over the cases in which the value is defined; 'defined' says how many these are for each label and metric",
    "foreground_mean": "mean of the labels' means; labels whose mean is undefined do not take part",
    "empty": "cases where a label is in neither mask (absent), was not found at all (missed) or found where none is (spurious)",
}


class CaseMetrics(Record):
    """One case: its values by label and metric (null where undefined), and the tolerance of its NSD in mm."""

    case: str
    metrics: dict[str, Values]
    tolerance_mm: float | None = None


class EmptyCount(Record):
    """In how many cases a label is empty in both masks, only in the prediction, or only in the reference."""

    absent: int = 0
    missed: int = 0
    spurious: int = 0


class Report(Record):
    """Metrics of every case and label, and their means; an undefined value is None (null), never NaN."""

    format: Literal[1] = 1
    cases: tuple[CaseMetrics, ...]
    mean: dict[str, Values]
    foreground_mean: Values
    defined: dict[str, dict[str, int]] = Field(default_factory=dict)
    empty: dict[str, EmptyCount] = Field(default_factory=dict)
    tolerance_mm: float | None = None
    definitions: dict[str, str] = Field(default_factory=lambda: dict(DEFINITIONS))

    @classmethod
    def of(cls, cases: Iterable[CaseMetrics], tolerance_mm: float | None = None) -> Report:
        """The report of `cases`, sorted by name; labels in the order in which they first appear."""
        ordered = tuple(sorted(cases, key=lambda c: c.case))
        rows: dict[str, list[Values]] = {}
        for case in ordered:
            for label, values in case.metrics.items():
                rows.setdefault(label, []).append(values)
        mean = {label: _means(values) for label, values in rows.items()}
        return cls(
            cases=ordered, mean=mean, foreground_mean=_means(list(mean.values())), tolerance_mm=tolerance_mm,
            defined={label: {name: _count(values, name) for name in _names(values)} for label, values in rows.items()},
            empty={label: _empty(values) for label, values in rows.items()},
        )


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
    kinds = [(bool(row.get("n_reference")), bool(row.get("n_prediction"))) for row in rows]
    return EmptyCount(absent=kinds.count((False, False)), missed=kinds.count((True, False)), spurious=kinds.count((False, True)))


class Candidate(Record):
    """One run or ensemble of runs that selection compared, with its pooled cross-validation Dice."""

    runs: tuple[str, ...]
    foreground_mean_dice: float | None
    per_label: Values
    networks: int
    cost: str = ""


class PostprocessingTrial(Record):
    """A post-processing step that was tried: Dice (of its label, or the foreground mean) before and after; does it stay."""

    step: Spec
    name: str
    before: float | None
    after: float | None
    kept: bool


class Selection(Record):
    """What `predict` uses of a work folder: runs whose probabilities are averaged, and the post-processing steps in order.

    `folds` are those finished in every compared run, on which the comparison rests; `run_folds` are all finished folds of each
    selected run.
    """

    format: Literal[1] = 1
    runs: tuple[str, ...]
    postprocessing: tuple[Spec, ...] = ()
    folds: tuple[int, ...]
    run_folds: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    cases: int
    foreground_mean_dice: float | None = None
    candidates: tuple[Candidate, ...] = ()
    postprocessing_tried: tuple[PostprocessingTrial, ...] = ()
    missing: tuple[str, ...] = ()
    note: str = ""
