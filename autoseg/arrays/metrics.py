"""How well two label maps agree: overlap from one confusion pass, surface distances, lesions.

Undefined values are None: which they are stands in `autoseg.types.report.DEFINITIONS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.components import bounding_box
from autoseg.arrays.lesions import find_lesions, lesion_counts, lesion_metrics
from autoseg.arrays.surfaces import distances_between, surface_metrics, surfaces_of
from autoseg.types.report import LesionCount, Value, Values

Ints = NDArray[np.integer]
Box = tuple[slice, ...]
Target = tuple[str, tuple[int, ...]]
"""A label or region: its name and the values of its voxels."""

CHUNK = 1 << 20  # voxels counted at a time, which bounds the memory of the confusion pass
MM3_PER_ML, MM2_PER_CM2 = 1000.0, 100.0


@dataclass(frozen=True)
class Counts:
    """Voxels of one target: true positives, false positives, false negatives, true negatives."""

    tp: int
    fp: int
    fn: int
    tn: int


def label_values(label_zyx: Ints) -> tuple[int, ...]:
    """The values that occur in a label map, rising."""
    narrow = _narrow(label_zyx)
    if narrow is None:
        return tuple(int(v) for v in np.unique(label_zyx))
    seen = np.zeros(1 << 8 * narrow.dtype.itemsize, bool)
    flat = _unsigned(narrow)
    for start in range(0, flat.size, CHUNK):
        seen[flat[start:start + CHUNK]] = True
    found = np.flatnonzero(seen).astype(_unsigned(narrow[:0]).dtype).view(narrow.dtype)
    return tuple(sorted(int(v) for v in found))


def _narrow(array: Ints) -> Ints | None:
    """`array` in at most 16 bits, or None where its values do not fit."""
    if array.dtype.itemsize <= 2 or not array.size:
        return array if array.dtype.itemsize <= 2 else array.astype(np.uint16)
    low, high = int(array.min()), int(array.max())
    for kind in (np.uint16, np.int16):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return array.astype(kind)
    return None


def _unsigned(narrow: Ints) -> Ints:
    """The bits of an 8 or 16 bit array as a flat array of unsigned integers."""
    flat = np.ascontiguousarray(narrow).reshape(-1)
    bits: Ints = flat.view(np.dtype(f"u{narrow.dtype.itemsize}"))
    return bits


def _indexed(label_zyx: Ints, values: Sequence[int]) -> Ints:
    """Position of each voxel's value in `values`, counted from 1; 0 for any other value. Same shape, 8 or 16 bits."""
    kind = np.uint8 if len(values) < 256 else np.uint16
    narrow = _narrow(label_zyx)
    if narrow is None:
        order = np.argsort(values)
        rising = np.asarray(values)[order]
        place = np.minimum(np.searchsorted(rising, label_zyx), len(values) - 1)
        return np.where(rising[place] == label_zyx, order[place] + 1, 0).astype(kind)
    bits = 8 * narrow.dtype.itemsize
    table = np.zeros(1 << bits, kind)
    limits = np.iinfo(narrow.dtype)
    for position, value in enumerate(values):
        if limits.min <= value <= limits.max:
            table[value % (1 << bits)] = position + 1
    flat = _unsigned(narrow)
    index: Ints = np.empty(flat.shape, kind)
    for start in range(0, flat.size, CHUNK):
        np.take(table, flat[start:start + CHUNK], out=index[start:start + CHUNK], mode="clip")
    return index.reshape(label_zyx.shape)


def confusion_matrix(reference: Ints, prediction: Ints, count: int) -> NDArray[np.int64]:
    """Voxels by reference index (row) and prediction index (column); both of one shape, with indices 0..count-1."""
    matrix = np.zeros(count * count, np.int64)
    rows, columns = reference.reshape(-1), prediction.reshape(-1)
    for start in range(0, rows.size, CHUNK):
        joint = rows[start:start + CHUNK].astype(np.intp)
        joint *= count
        joint += columns[start:start + CHUNK]
        matrix += np.bincount(joint, minlength=count * count)
    return matrix.reshape(count, count)


def target_counts(matrix: NDArray[np.int64], members: Sequence[int]) -> Counts:
    """Counts of the target that consists of the indices `members` of a confusion matrix."""
    inside = np.zeros(len(matrix), bool)
    inside[list(members)] = True
    tp, reference, prediction = int(matrix[inside][:, inside].sum()), int(matrix[inside].sum()), int(matrix[:, inside].sum())
    fp, fn = prediction - tp, reference - tp
    return Counts(tp, fp, fn, int(matrix.sum()) - tp - fp - fn)


def _ratio(part: int, whole: int) -> Value:
    return part / whole if whole else None


def overlap_metrics(counts: Counts, voxel_ml: float | None = None) -> Values:
    """Dice, IoU, sensitivity, specificity, precision, volume errors and voxel counts; None where undefined.

    voxel_ml: volume of a voxel in ml; None where voxels have none (a single slice), which leaves the error in ml undefined.
    """
    tp, fp, fn, tn = counts.tp, counts.fp, counts.fn, counts.tn
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn), "iou": _ratio(tp, tp + fp + fn), "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp), "precision": _ratio(tp, tp + fp), "volume_error": _ratio(fp - fn, tp + fn),
        "volume_error_abs": _ratio(abs(fp - fn), tp + fn),
        "volume_error_ml": None if voxel_ml is None or not tp + fp + fn else (fp - fn) * voxel_ml,
        "n_reference": tp + fn, "n_prediction": tp + fp,
    }


def default_tolerance_mm(shape_zyx: Sequence[int], spacing_zyx_mm: Sequence[float]) -> float:
    """One voxel in-plane: the second finest of three spacings, for a single slice the coarser of its two."""
    return float(max(spacing_zyx_mm[1:]) if shape_zyx[0] == 1 else sorted(spacing_zyx_mm)[1])


@dataclass(frozen=True)
class Measured:
    """What was measured of one case: values by target and metric, and lesion counts by target and size class."""

    metrics: dict[str, Values]
    lesions: dict[str, dict[str, LesionCount]]


class _Maps:
    """Two label maps as positions in the values that matter, and what is counted over the whole volume, once for all targets."""

    def __init__(self, reference_zyx: Ints, prediction_zyx: Ints, targets: Sequence[Target], ignore: int | None) -> None:
        if reference_zyx.shape != prediction_zyx.shape:
            raise ValueError(
                f"reference and prediction must have one shape, found {reference_zyx.shape} and {prediction_zyx.shape}")
        self.targets = targets
        self.values = sorted({value for _, members in targets for value in members})
        place = {value: i + 1 for i, value in enumerate(self.values)}
        self.members = {name: [place[v] for v in values] for name, values in targets}
        self.known = [*self.values, *([ignore] if ignore is not None else [])]
        self.reference, self.prediction = _indexed(reference_zyx, self.known), _indexed(prediction_zyx, self.values)
        matrix = confusion_matrix(self.reference, self.prediction, len(self.known) + 1)
        self.matrix = matrix[: len(self.values) + 1]  # without the row of the ignore label
        if ignore is not None:
            self.matrix = self.matrix[:, : len(self.values) + 1]
            self.prediction[self.reference == len(self.known)] = 0

    def table(self, names: Sequence[str]) -> NDArray[np.integer]:
        """From positions to the numbers 1, 2, ... of the targets `names`, which must not overlap; 0 for all else."""
        table: Ints = np.zeros(len(self.known) + 1, np.uint8 if len(names) < 256 else np.uint16)
        for number, name in enumerate(names, start=1):
            table[self.members[name]] = number
        return table

    def box(self) -> Box:
        """The box around all targets in both maps; a single voxel where there is none."""
        there = self.prediction > 0
        there |= (self.reference > 0) & (self.reference <= len(self.values))
        return bounding_box(there) or (slice(0, 1),) * 3

    def layers(self) -> Iterator[list[str]]:
        """The targets in as few groups as a greedy pass finds, none overlapping another of its group."""
        groups: list[tuple[set[int], list[str]]] = []
        for name, members in self.members.items():
            group = next((g for g in groups if g[0].isdisjoint(members)), None)
            if group is None:
                group = (set(), [])
                groups.append(group)
            group[0].update(members)
            group[1].append(name)
        yield from (names for _, names in groups)


def examine(
    reference_zyx: Ints, prediction_zyx: Ints, spacing_zyx_mm: Sequence[float], targets: Sequence[Target], tolerance_mm: float,
    ignore: int | None = None, surfaces: bool = True,
) -> Measured:
    """All metrics of all targets of one case; undefined values are None.

    reference_zyx, prediction_zyx: integer label maps of one shape (z, y, x), z = 1 for 2D; `targets` and `ignore` speak in their
    values. Voxels whose reference is `ignore` are left out. Without `surfaces` only overlap is measured, neither distances nor
    lesions. Raises ValueError when the shapes differ.
    """
    maps = _Maps(reference_zyx, prediction_zyx, targets, ignore)
    flat = reference_zyx.shape[0] == 1
    size = float(np.prod(spacing_zyx_mm[1:])) / MM2_PER_CM2 if flat else float(np.prod(spacing_zyx_mm)) / MM3_PER_ML
    volume = None if flat else size
    metrics = {name: overlap_metrics(target_counts(maps.matrix, members), volume) for name, members in maps.members.items()}
    lesions: dict[str, dict[str, LesionCount]] = {}
    if not surfaces:
        return Measured(metrics, lesions)
    around, sides = maps.box(), tuple(spacing_zyx_mm[1:] if flat else spacing_zyx_mm)
    for names in maps.layers():
        table = maps.table(names)
        pair = table[maps.reference[around]], table[maps.prediction[around]]
        outlines = [surfaces_of(index[0] if flat else index, len(names)) for index in pair]
        reference, prediction = find_lesions(*pair)
        for number, name in enumerate(names, start=1):
            distances = distances_between(outlines[0][number - 1], outlines[1][number - 1], sides)
            mine = reference.of(number), prediction.of(number)
            metrics[name] |= surface_metrics(distances, tolerance_mm) | lesion_metrics(*mine)
            lesions[name] = lesion_counts(*mine, size, "cm2" if flat else "ml")
    return Measured(metrics, lesions)


def measure(
    reference_zyx: Ints, prediction_zyx: Ints, spacing_zyx_mm: Sequence[float], targets: Sequence[Target], tolerance_mm: float,
    ignore: int | None = None, surfaces: bool = True,
) -> dict[str, Values]:
    """The metrics of `examine` by target and name."""
    return examine(reference_zyx, prediction_zyx, spacing_zyx_mm, targets, tolerance_mm, ignore, surfaces).metrics
