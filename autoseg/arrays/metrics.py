"""How well two label maps agree: overlap from one confusion pass, surface distances on surface elements.

Undefined values are None: which they are stands in `autoseg.types.report.DEFINITIONS`. Surface elements follow Nikolov et al.
2018 (arXiv 1809.04430): a point lies at every corner between voxels whose 2x2x2 neighbourhood is mixed, and weighs as much as
the area of the marching cubes triangles in that neighbourhood at true spacing. Distances run between these points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autoseg.types.report import Value, Values

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]
Box = tuple[slice, ...]
Target = tuple[str, tuple[int, ...]]
"""A label or region: its name and the values of its voxels."""

CHUNK = 1 << 20  # voxels counted at a time, which bounds the memory of the confusion pass
ROUNDING = 1e-6  # relative; distances are float32, so that a distance of exactly the tolerance counts as within it
PERCENTILE = 95.0


@dataclass(frozen=True)
class Counts:
    """Voxels of one target: true positives, false positives, false negatives, true negatives."""

    tp: int
    fp: int
    fn: int
    tn: int


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances in mm from each surface element to the other surface, rising, with the elements' sizes in the same order.

    Sizes are areas in mm2, in 2D lengths in mm. Where one mask is empty its arrays are empty and the other's distances infinite.
    """

    reference_mm: Floats
    reference_size: Floats
    prediction_mm: Floats
    prediction_size: Floats


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


def overlap_metrics(counts: Counts) -> Values:
    """Dice, IoU, sensitivity, specificity, precision, relative volume error and voxel counts; None where undefined."""
    tp, fp, fn, tn = counts.tp, counts.fp, counts.fn, counts.tn
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn), "iou": _ratio(tp, tp + fp + fn), "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp), "precision": _ratio(tp, tp + fp), "volume_error": _ratio(fp - fn, tp + fn),
        "n_reference": tp + fn, "n_prediction": tp + fp,
    }


@lru_cache(maxsize=1)
def _surface_triangles() -> tuple[Floats, NDArray[np.intp]]:
    """Area vectors (n, 3) of all triangles of the 256 neighbourhoods at unit spacing, and the neighbourhood each belongs to.

    Bit 4 dz + 2 dy + dx of a code is the voxel at offset (dz, dy, dx). The surface of a mask and of its complement is the same.
    """
    from skimage.measure import marching_cubes

    vectors, codes = [], []
    for code in range(1, 255):
        shape = code if code.bit_count() <= 4 else 255 - code
        corners = np.array([(shape >> bit) & 1 for bit in range(8)], np.float32).reshape(2, 2, 2)
        vertices, faces, _, _ = marching_cubes(corners, 0.5, method="lorensen")  # type: ignore[no-untyped-call]
        triangles = np.asarray(vertices, np.float64)[faces]
        vectors.append(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]) / 2)
        codes.append(np.full(len(faces), code))
    return np.concatenate(vectors), np.concatenate(codes)


@lru_cache(maxsize=64)
def element_sizes(spacing_mm: tuple[float, ...]) -> Floats:
    """Surface area in mm2 of each of the 256 neighbourhood codes in 3D, or contour length in mm of each of the 16 in 2D."""
    if len(spacing_mm) == 2:
        y, x = spacing_mm
        diagonal = float(np.hypot(y, x)) / 2
        across = {0b0011: x, 0b1100: x, 0b0101: y, 0b1010: y, 0b0110: 2 * diagonal, 0b1001: 2 * diagonal, 0: 0.0, 0b1111: 0.0}
        return np.array([across.get(code, diagonal) for code in range(16)])
    vectors, codes = _surface_triangles()
    z, y, x = spacing_mm
    areas = np.linalg.norm(vectors * (y * x, z * x, z * y), axis=1)
    return np.asarray(np.bincount(codes, weights=areas, minlength=256), np.float64)


def _neighbourhoods(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Codes of the voxel corners of a mask, one more than voxels along each axis; outside counts as background."""
    code = np.pad(mask, 1).astype(np.uint8)
    for step, axis in enumerate(reversed(range(mask.ndim))):
        before = (slice(None),) * axis
        low, high = code[(*before, slice(None, -1))], code[(*before, slice(1, None))]
        code = np.bitwise_or(low, np.left_shift(high, np.uint8(1 << step)))
    return code


def surface_distances(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing_mm: Sequence[float],
) -> SurfaceDistances:
    """Distances between the surfaces of two masks, computed once, to be summarised as often as wanted.

    reference, prediction: bool, of one shape (z, y, x) or (y, x), cropped or not; spacing_mm: one number per axis. A 3D mask of
    a single slice is measured in-plane.
    """
    import edt

    if reference.ndim == 3 and reference.shape[0] == 1:
        return surface_distances(reference[0], prediction[0], spacing_mm[1:])
    spacing = tuple(float(s) for s in spacing_mm)
    sizes, full = element_sizes(spacing), (1 << (1 << reference.ndim)) - 1
    codes = [_neighbourhoods(mask) for mask in (reference, prediction)]
    surfaces = [(code != 0) & (code != full) for code in codes]
    results: list[Floats] = []
    for code, surface, other in zip(codes, surfaces, surfaces[::-1], strict=True):
        if other.any():
            distances = edt.edt(~other, anisotropy=spacing)[surface].astype(np.float64)
        else:
            distances = np.full(int(surface.sum()), np.inf)
        order = np.argsort(distances, kind="stable")
        results += [distances[order], sizes[code[surface]][order]]
    return SurfaceDistances(*results)


def _percentile(distances_mm: Floats, sizes: Floats, percent: float) -> float:
    """The smallest distance within which at least `percent` of the surface lies."""
    reached = np.cumsum(sizes)
    place = int(np.searchsorted(reached, reached[-1] * percent / 100 * (1 - 1e-12)))
    return float(distances_mm[min(place, len(distances_mm) - 1)])


def hausdorff_mm(distances: SurfaceDistances, percent: float = PERCENTILE) -> float | None:
    """The larger of the two directed percentiles of surface distance, in mm; None when a mask is empty."""
    if not len(distances.reference_mm) or not len(distances.prediction_mm):
        return None
    return max(
        _percentile(distances.reference_mm, distances.reference_size, percent),
        _percentile(distances.prediction_mm, distances.prediction_size, percent),
    )


def surface_dice(distances: SurfaceDistances, tolerance_mm: float) -> float | None:
    """Share of both surfaces that lies within `tolerance_mm` of the other; None when both masks are empty."""
    whole = float(distances.reference_size.sum() + distances.prediction_size.sum())
    if not whole:
        return None
    limit = tolerance_mm * (1 + ROUNDING)
    within = distances.reference_size[distances.reference_mm <= limit].sum()
    return float(within + distances.prediction_size[distances.prediction_mm <= limit].sum()) / whole


def default_tolerance_mm(shape_zyx: Sequence[int], spacing_zyx_mm: Sequence[float]) -> float:
    """One voxel in-plane: the second finest of three spacings, for a single slice the coarser of its two."""
    return float(max(spacing_zyx_mm[1:]) if shape_zyx[0] == 1 else sorted(spacing_zyx_mm)[1])


def _union(boxes: Sequence[Box | None]) -> Box | None:
    """The box around all boxes that are there."""
    there = [box for box in boxes if box is not None]
    if not there:
        return None
    return tuple(slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*there, strict=True))


def measure(
    reference_zyx: Ints, prediction_zyx: Ints, spacing_zyx_mm: Sequence[float], targets: Sequence[Target], tolerance_mm: float,
    ignore: int | None = None, surfaces: bool = True,
) -> dict[str, Values]:
    """All metrics of all targets of one case, by target and metric; undefined values are None.

    reference_zyx, prediction_zyx: integer label maps of one shape (z, y, x), z = 1 for 2D; `targets` and `ignore` speak in their
    values. Voxels whose reference is `ignore` are left out. Without `surfaces` only overlap is measured.
    Raises ValueError when the shapes differ.
    """
    from scipy.ndimage import find_objects

    if reference_zyx.shape != prediction_zyx.shape:
        raise ValueError(f"reference and prediction must have one shape, found {reference_zyx.shape} and {prediction_zyx.shape}")
    values = sorted({value for _, members in targets for value in members})
    place = {value: i + 1 for i, value in enumerate(values)}
    known = [*values, *([ignore] if ignore is not None else [])]
    reference, prediction = _indexed(reference_zyx, known), _indexed(prediction_zyx, values)
    matrix = confusion_matrix(reference, prediction, len(known) + 1)[: len(values) + 1]
    if ignore is not None:
        prediction[reference == len(known)] = 0
        matrix = matrix[:, : len(values) + 1]
    counts = {name: target_counts(matrix, [place[v] for v in members]) for name, members in targets}
    metrics = {name: overlap_metrics(count) for name, count in counts.items()}
    if not surfaces:
        return metrics
    boxes = [find_objects(index, max_label=len(values)) for index in (reference, prediction)]
    for name, members in targets:
        inside = np.zeros(len(known) + 1, bool)
        inside[[place[v] for v in members]] = True
        box = _union([found[place[v] - 1] for found in boxes for v in members])
        distances = None if box is None else surface_distances(inside[reference[box]], inside[prediction[box]], spacing_zyx_mm)
        metrics[name]["hd95"] = None if distances is None else hausdorff_mm(distances)
        metrics[name]["nsd"] = None if distances is None else surface_dice(distances, tolerance_mm)
    return metrics
