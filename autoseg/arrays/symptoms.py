"""What kind of errors a mask has: each error is told apart by mending one kind after the other and counting what that changed.

The order is: voxels of the partner label (left for right), whole objects missed, objects far from any true one, slices that
leave the line of their neighbours; what then is left lies at the boundary or inside found objects. Lengths are in voxels of
one case's own size in the plane (`voxel_mm`: the second finest spacing, in 2D the coarser one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.components import bounding_box
from autoseg.arrays.surfaces import hausdorff_mm, surface_dice, surface_distances

Ints = NDArray[np.integer]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Target = tuple[str, tuple[int, ...]]
Kind = Literal["swapped", "missed", "far", "jumps"]

NEAR_VOXELS = 2.0  # errors within this distance of the true edge are errors of the boundary
FAR_VOXELS = 5.0  # a false object this far from every true one has nothing to do with it
FOUND_SHARE = 0.1  # an object is found when this share of its voxels is
SLICE_VOXELS = 1.5  # a slice's centre this far off the line of its neighbours is a jump,
SLICE_AREA = 0.4  # or the found share of its area, this much more or less than theirs
SLICE_LEAST = 80  # voxels of the reference in a slice that is looked at, and at least a quarter of the largest slice
SLICE_FOUND = 0.5  # share of a slice's area that must be there before its centre says anything
SLICES_LEAST = 5


@dataclass(frozen=True)
class TrueObject:
    """One connected object of the reference: voxels, largest distance from its edge in voxels, and whether it was found."""

    voxels: int
    depth_voxels: float
    found: bool


@dataclass(frozen=True)
class TargetSymptoms:
    """The errors of one target in one case.

    `explained` holds false positive and false negative voxels that mending each kind removed; bias, balance, near, nsd and
    hd95 are of what is left: the mean outward shift of the boundary, (FP - FN) / (FP + FN), the share of errors near the edge,
    the surface Dice at one voxel, and HD95. `jumps` is the share of slices that jump along the slice axis, `jumps_in_plane`
    the larger of the same along the other two. None where undefined.
    """

    tp: int
    fp: int
    fn: int
    explained: Mapping[Kind, tuple[int, int]]
    objects: tuple[TrueObject, ...]
    far_voxels: float | None
    jumps: float | None
    jumps_in_plane: float
    bias_voxels: float | None
    balance: float | None
    near: float | None
    nsd: float | None
    hd95_voxels: float | None

    @property
    def reference(self) -> int:
        """Voxels of the reference."""
        return self.tp + self.fn

    def counts(self, without: Sequence[Kind] = ()) -> tuple[int, int, int]:
        """True positives, false positives and false negatives as they were if the errors of some kinds were mended."""
        fp, fn = (sum(self.explained[kind][i] for kind in without) for i in (0, 1))
        return self.tp + fn, self.fp - fp, self.fn - fn

    def dice(self, without: Sequence[Kind] = ()) -> float | None:
        """Dice, if wanted without the errors of some kinds; None when reference and prediction are empty."""
        tp, fp, fn = self.counts(without)
        return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None

    def sensitivity(self, without: Sequence[Kind] = ()) -> float | None:
        """Sensitivity, if wanted without the errors of some kinds; None for an empty reference."""
        tp, _, fn = self.counts(without)
        return tp / (tp + fn) if tp + fn else None

    def precision(self, without: Sequence[Kind] = ()) -> float | None:
        """Precision, if wanted without the errors of some kinds; None for an empty prediction."""
        tp, fp, _ = self.counts(without)
        return tp / (tp + fp) if tp + fp else None


@dataclass(frozen=True)
class CaseSymptoms:
    """The errors of one case by target, the share of each pair of labels that took the other's name, and its size in voxels."""

    targets: Mapping[str, TargetSymptoms]
    swaps: Mapping[tuple[str, str], float]
    voxels: int
    dims: int


def measure_symptoms(
    reference_zyx: Ints, prediction_zyx: Ints, spacing_zyx_mm: Sequence[float], targets: Sequence[Target],
    pairs: Sequence[tuple[Target, Target]] = (), ignore: int | None = None, slice_axis: int | None = None,
) -> CaseSymptoms:
    """Tell the errors of one case apart.

    reference_zyx, prediction_zyx: integer label maps (z, y, x), z = 1 for 2D; `targets`, `pairs` (left and right) and `ignore`
    speak in their values. slice_axis: the axis along which slices may jump; None for the coarsest one.
    Raises ValueError when the shapes differ.
    """
    if reference_zyx.shape != prediction_zyx.shape:
        raise ValueError(f"reference and prediction must have one shape, found {reference_zyx.shape} and {prediction_zyx.shape}")
    reference, prediction, spacing = reference_zyx, prediction_zyx, tuple(float(s) for s in spacing_zyx_mm)
    if reference.shape[0] == 1:
        reference, prediction, spacing = reference[0], prediction[0], spacing[1:]
    if ignore is not None:
        outside = reference == ignore
        reference, prediction = np.where(outside, 0, reference), np.where(outside, 0, prediction)
    voxel_mm = sorted(spacing)[1]
    mended, swaps = _mend_swaps(reference, prediction, spacing, voxel_mm, pairs)
    axis = int(np.argmax(spacing)) if slice_axis is None else slice_axis
    found = {
        name: _target(select(reference, values), select(prediction, values), select(mended, values), spacing, voxel_mm, axis)
        for name, values in targets
    }
    return CaseSymptoms(found, swaps, int(reference.size), reference.ndim)


def select(label_zyx: Ints, values: Sequence[int]) -> Mask:
    """Where a label map holds one of `values`."""
    return label_zyx == values[0] if len(values) == 1 else np.isin(label_zyx, values)


def _mend_swaps(
    reference: Ints, prediction: Ints, spacing: Sequence[float], voxel_mm: float, pairs: Sequence[tuple[Target, Target]],
) -> tuple[Ints, dict[tuple[str, str], float]]:
    """The prediction with swapped voxels set right, and the swapped share of each pair; the border between the two is no swap.

    Voxels just outside a label that carry its partner's name are set right too, and not counted.
    """
    import edt

    def distance(mask: Mask) -> Floats:
        return np.asarray(edt.edt(np.ascontiguousarray(~mask), anisotropy=tuple(spacing))) / voxel_mm

    mended, swaps = prediction.copy(), {}
    for (left, left_values), (right, right_values) in pairs:
        on_left, on_right = select(reference, left_values), select(reference, right_values)
        whole, swapped = int(on_left.sum() + on_right.sum()), 0
        for mine, theirs, own, other in ((on_left, on_right, left_values, right_values),
                                         (on_right, on_left, right_values, left_values)):
            wrong = select(prediction, other) & ~theirs
            if mine.any() and (wrong & mine).any():
                wrong &= (distance(mine) <= NEAR_VOXELS) & ((distance(theirs) > NEAR_VOXELS) if theirs.any() else True)
                swapped += int((wrong & mine).sum())
                mended[wrong] = own[0]
        if whole:
            swaps[left, right] = swapped / whole
    return mended, swaps


def _errors(reference: Mask, prediction: Mask) -> tuple[int, int]:
    return int((prediction & ~reference).sum()), int((reference & ~prediction).sum())


def _target(
    reference: Mask, prediction: Mask, mended: Mask, spacing: Sequence[float], voxel_mm: float, slice_axis: int,
) -> TargetSymptoms:
    """Mend one kind of error after the other and count."""
    box = bounding_box(reference | prediction | mended)
    if box is not None:
        reference, prediction, mended = (np.ascontiguousarray(mask[box]) for mask in (reference, prediction, mended))
    fp, fn = _errors(reference, prediction)
    tp = int(reference.sum()) - fn
    if box is None:
        nothing: dict[Kind, tuple[int, int]] = {"swapped": (0, 0), "missed": (0, 0), "far": (0, 0), "jumps": (0, 0)}
        return TargetSymptoms(tp, fp, fn, nothing, (), None, None, 0.0, None, None, None, None, None)
    with_missed, objects = _mend_missed(reference, mended, spacing, voxel_mm)
    without_far, far_voxels = _mend_far(reference, with_missed, spacing, voxel_mm)
    smooth, jumps, in_plane = _mend_jumps(reference, without_far, spacing, voxel_mm, slice_axis)
    stages: dict[Kind, Mask] = {"swapped": mended, "missed": with_missed, "far": without_far, "jumps": smooth}
    explained: dict[Kind, tuple[int, int]] = {}
    before = (fp, fn)
    for kind, mask in stages.items():
        after = _errors(reference, mask)
        explained[kind] = (before[0] - after[0], before[1] - after[1])
        before = after
    return TargetSymptoms(tp, fp, fn, explained, objects, far_voxels, jumps, in_plane,
                          *_boundary(reference, smooth, spacing, voxel_mm))


def _mend_missed(
    reference: Mask, prediction: Mask, spacing: Sequence[float], voxel_mm: float,
) -> tuple[Mask, tuple[TrueObject, ...]]:
    """The prediction with all objects that were not found, and the objects."""
    import edt
    from scipy import ndimage

    parts, count = _components(reference)
    if not count:
        return prediction, ()
    voxels = np.bincount(parts.reshape(-1), minlength=count + 1)[1:]
    hit = np.bincount(parts[prediction], minlength=count + 1)[1:]
    depth = edt.edt(np.pad(reference, 1), anisotropy=tuple(spacing))[(slice(1, -1),) * reference.ndim]
    deepest = np.atleast_1d(ndimage.maximum(depth, parts, np.arange(1, count + 1))) / voxel_mm
    found = hit >= FOUND_SHARE * voxels
    objects = tuple(TrueObject(int(v), float(d), bool(f)) for v, d, f in zip(voxels, deepest, found, strict=True))
    return prediction | np.concatenate([[False], ~found])[parts], objects


def _components(mask: Mask) -> tuple[NDArray[np.integer], int]:
    import cc3d

    connectivity: Literal[8, 26] = 8 if mask.ndim == 2 else 26
    parts = np.asarray(cc3d.connected_components(np.ascontiguousarray(mask).view(np.uint8), connectivity=connectivity))
    return parts, int(parts.max(initial=0))


def _mend_far(
    reference: Mask, prediction: Mask, spacing: Sequence[float], voxel_mm: float,
) -> tuple[Mask, float | None]:
    """The prediction without objects that are far from any true one, and the largest distance in voxels of one of these."""
    import edt
    from scipy import ndimage

    if not (prediction & ~reference).any():
        return prediction, None
    parts, count = _components(prediction)
    apart = np.bincount(parts[reference], minlength=count + 1)[1:] == 0
    if not apart.any():
        return prediction, None
    if not reference.any():
        return np.zeros_like(prediction), None
    distance = edt.edt(~reference, anisotropy=tuple(spacing))
    nearest = np.atleast_1d(ndimage.minimum(distance, parts, np.arange(1, count + 1))) / voxel_mm
    far = apart & (nearest > FAR_VOXELS)
    if not far.any():
        return prediction, None
    return prediction & ~np.concatenate([[False], far])[parts], float(nearest[far].max())


def _mend_jumps(
    reference: Mask, prediction: Mask, spacing: Sequence[float], voxel_mm: float, slice_axis: int,
) -> tuple[Mask, float | None, float]:
    """The prediction with the reference in slices that jump, their share, and the larger share along the other axes."""
    if reference.ndim == 2:
        return prediction, None, 0.0
    looked, jumping = _jumping(reference, prediction, spacing, voxel_mm, slice_axis)
    if looked < SLICES_LEAST:
        return prediction, None, 0.0
    others = (_jumping(reference, prediction, spacing, voxel_mm, axis) for axis in range(3) if axis != slice_axis)
    in_plane = max(len(slices) / count if count else 0.0 for count, slices in others)
    mended = prediction.copy()
    place = (slice(None),) * slice_axis + (jumping,)
    mended[place] = reference[place]
    return mended, len(jumping) / looked, in_plane


def _jumping(
    reference: Mask, prediction: Mask, spacing: Sequence[float], voxel_mm: float, axis: int,
) -> tuple[int, NDArray[np.intp]]:
    """How many slices across `axis` can be judged, and those whose centre or area leaves both their sides the same way."""
    area, centres = _slice_profile(reference, spacing, axis)
    found, found_centres = _slice_profile(prediction, spacing, axis)
    slices = np.flatnonzero(area >= max(SLICE_LEAST, area.max(initial=0) / 4))
    if len(slices) < SLICES_LEAST:
        return 0, slices[:0]
    ratio = found[slices] / area[slices] / SLICE_AREA
    enough = found[slices, None] >= SLICE_FOUND * area[slices, None]
    offsets = np.where(enough, found_centres[slices] - centres[slices], 0.0) / (SLICE_VOXELS * voxel_mm)
    jumping = []
    for k in range(2, len(slices) - 2):
        for profile in (ratio, *offsets.T):
            left, right = profile[k] - np.median(profile[max(k - 3, 0):k]), profile[k] - np.median(profile[k + 1:k + 4])
            if left * right > 0 and min(abs(left), abs(right)) > 1:
                jumping.append(int(slices[k]))
                break
    return len(slices) - 4, np.asarray(jumping, np.intp)


def _slice_profile(mask: Mask, spacing: Sequence[float], axis: int) -> tuple[Floats, Floats]:
    """Area in voxels of each slice across `axis` (n), and its centre along the two other axes in mm (n, 2; 0 if empty)."""
    others = [a for a in range(3) if a != axis]
    area = mask.sum(axis=tuple(others)).astype(np.float64)
    centres = []
    for own, across in (others, others[::-1]):
        lines = mask.sum(axis=across)  # (axis, own) in the order of the array
        lines = lines if axis < own else lines.T
        centres.append(lines @ (np.arange(mask.shape[own]) * spacing[own]) / np.maximum(area, 1))
    return area, np.stack(centres, axis=1)


def _boundary(
    reference: Mask, prediction: Mask, spacing: Sequence[float], voxel_mm: float,
) -> tuple[float | None, float | None, float | None, float | None, float | None]:
    """Bias, balance, near, nsd and hd95 of `TargetSymptoms`."""
    import edt

    fp, fn = _errors(reference, prediction)
    balance = (fp - fn) / (fp + fn) if fp + fn else 0.0
    if not reference.any():
        return None, balance, None, None, None
    reference, prediction = np.pad(reference, 1), np.pad(prediction, 1)  # so that a crop of one slice stays a volume
    distances = surface_distances(reference, prediction, spacing)
    edge = float(distances.reference_size.sum())
    bias = (fp - fn) * float(np.prod(spacing)) / edge / voxel_mm
    if not prediction.any():
        return bias, balance, None, None, None
    wrong = reference != prediction
    away = np.maximum(*(edt.edt(mask, anisotropy=tuple(spacing))[wrong] for mask in (reference, ~reference)))
    near = float((away <= NEAR_VOXELS * voxel_mm).mean()) if wrong.any() else 1.0
    hd95 = hausdorff_mm(distances)
    return bias, balance, near, surface_dice(distances, voxel_mm), None if hd95 is None else hd95 / voxel_mm
