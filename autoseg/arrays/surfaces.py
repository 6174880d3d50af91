"""Distances between the surfaces of two masks, on surface elements with true spacing.

Surface elements follow Nikolov et al. 2018 (arXiv 1809.04430): a point lies at every corner between voxels whose 2x2x2
neighbourhood is mixed, and weighs as much as the area of the marching cubes triangles in that neighbourhood at true spacing.
Distances run between these points. The areas of all 256 neighbourhoods equal those of the package surface-distance 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autoseg.types.report import Values

Floats = NDArray[np.float64]

ROUNDING = 1e-6  # relative; distances are float32, so that a distance of exactly the tolerance counts as within it
PERCENTILE = 95.0
CHUNK = 1 << 20  # voxels looked at together: they stay in the processor's cache
VOXELS_PER_POINT = 50  # voxels of a distance transform that take as long as a point of a search tree (measured)
NEAR_STEPS, NEAR_PLACES = 4.0, 150  # how far, in voxels of the finest spacing, and in how many places near points are looked up


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances in mm from each surface element to the other surface, rising, with the elements' sizes in the same order.

    Sizes are areas in mm2, in 2D lengths in mm. Where one mask is empty its arrays are empty and the other's distances infinite.
    """

    reference_mm: Floats
    reference_size: Floats
    prediction_mm: Floats
    prediction_size: Floats


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


@dataclass(frozen=True)
class Surface:
    """Surface elements of one target: voxel corners (3, n) or in 2D (2, n), counted from the image's first, and their codes."""

    corners: NDArray[np.intp]
    codes: NDArray[np.uint8]


def surfaces_of(index: NDArray[np.integer], count: int) -> list[Surface]:
    """The surfaces of the targets 1..count of a label map in one pass; outside counts as background.

    index: targets by number, 0 elsewhere, (z, y, x) or (y, x). Worked on in slabs along the first axis, which bounds the memory.
    """
    padded = np.pad(index, 1)
    row = padded[0].size
    step = max(1, CHUNK // row)
    found = [_slab_surfaces(padded[start:start + step + 1], start * row) for start in range(0, len(padded) - 1, step)]
    targets, places, codes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(targets, kind="stable")
    ends = np.cumsum(np.bincount(targets, minlength=count + 1))
    corners = np.stack(np.unravel_index(places[order], padded.shape))
    codes = codes[order]
    return [Surface(corners[:, low:high], codes[low:high]) for low, high in pairwise(ends[:count + 1])]


def _slab_surfaces(slab: NDArray[np.integer], first: int) -> tuple[NDArray[np.integer], NDArray[np.intp], NDArray[np.uint8]]:
    """Target, place and code of each surface element of a slab; places count in the padded map, where the slab is at `first`."""
    mixed = np.zeros(slab[:-1].shape, bool)
    mixed[(slice(None), *(slice(None, -1),) * (slab.ndim - 1))] = _mixed(slab)
    base = np.flatnonzero(mixed)
    flat, corner = slab.reshape(-1), [0]
    for stride in reversed([int(np.prod(slab.shape[axis + 1:])) for axis in range(slab.ndim)]):
        corner += [offset + stride for offset in corner]
    around = [flat[base + offset] for offset in corner]
    results = []
    for bit, target in enumerate(around):
        new = target != 0
        for before in around[:bit]:
            new &= before != target
        here = np.flatnonzero(new)
        mine, code = target[here], np.full(len(here), 1 << bit, np.uint8)
        for other in range(bit + 1, len(around)):
            code |= (around[other][here] == mine).view(np.uint8) << np.uint8(other)
        results.append((mine, base[here] + first, code))
    targets, places, codes = (np.concatenate(parts) for parts in zip(*results, strict=True))
    return targets, places, codes


def _mixed(index: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Where neighbouring voxels (2x2x2, in 2D 2x2) are not all the same; one less along each axis."""
    whole, head, tail = slice(None), slice(None, -1), slice(1, None)
    mixed: NDArray[np.bool_] = index[..., 1:] != index[..., :-1]
    for axis in reversed(range(index.ndim - 1)):
        low, high = (*(whole,) * axis, head), (*(whole,) * axis, tail)
        after = (head,) * (index.ndim - 1 - axis)
        step: NDArray[np.bool_] = index[(*high, *after)] != index[(*low, *after)]
        step |= mixed[low]
        step |= mixed[high]
        mixed = step
    return mixed


def surface_distances(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing_mm: Sequence[float],
) -> SurfaceDistances:
    """Distances between the surfaces of two masks, computed once, to be summarised as often as wanted.

    reference, prediction: bool, of one shape (z, y, x) or (y, x), cropped or not; spacing_mm: one number per axis. A 3D mask of
    a single slice is measured in-plane.
    """
    if reference.ndim == 3 and reference.shape[0] == 1:
        return surface_distances(reference[0], prediction[0], spacing_mm[1:])
    surfaces = [surfaces_of(mask.view(np.uint8), 1)[0] for mask in (reference, prediction)]
    return distances_between(surfaces[0], surfaces[1], spacing_mm)


def distances_between(reference: Surface, prediction: Surface, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Distances between two surfaces of one image."""
    spacing = tuple(float(s) for s in spacing_mm)
    sizes = element_sizes(spacing)
    results: list[Floats] = []
    forth, back = _distances(reference.corners, prediction.corners, spacing)
    for surface, distances in ((reference, forth), (prediction, back)):
        order = np.argsort(distances, kind="stable")
        results += [distances[order], sizes[surface.codes[order]]]
    return SurfaceDistances(*results)


def _distances(one: NDArray[np.intp], other: NDArray[np.intp], spacing: tuple[float, ...]) -> tuple[Floats, Floats]:
    """Distance in mm from each point of `one` to the nearest of `other`, and the other way round; infinite without any."""
    if not one.size or not other.size:
        return np.full(one.shape[1], np.inf), np.full(other.shape[1], np.inf)
    low = np.minimum(one.min(1), other.min(1))[:, None]
    shape = tuple(int(n) for n in np.maximum(one.max(1), other.max(1)) - low[:, 0] + 1)
    return _nearest(one - low, other - low, shape, spacing), _nearest(other - low, one - low, shape, spacing)


def _nearest(start: NDArray[np.intp], target: NDArray[np.intp], shape: tuple[int, ...], spacing: tuple[float, ...]) -> Floats:
    """Distance from each point `start` to the nearest of `target`, (axes, n) each, within a box of `shape`.

    Most surfaces are a few voxels apart, so near places are looked up in rising distance. For the points that have found nothing
    a distance transform costs by the volume of the box, a tree by the number of points: the cheaper one is taken.
    """
    offsets, reach = _near_offsets(spacing)
    margin = np.abs(offsets).max(0)
    padded = tuple(int(n) for n in shape + 2 * margin)
    margin = margin[:, None]
    grid = np.zeros(int(np.prod(padded)), bool)
    grid[np.ravel_multi_index(tuple(target + margin), padded)] = True
    distances = np.empty(start.shape[1])
    left, place = np.arange(start.shape[1]), np.asarray(np.ravel_multi_index(tuple(start + margin), padded))
    strides = np.append(np.cumprod(padded[:0:-1])[::-1], 1)
    for step, distance in zip(offsets @ strides, reach, strict=True):
        missed = np.flatnonzero(~grid[place + step])
        if len(missed) < len(left):
            found = np.ones(len(left), bool)
            found[missed] = False
            distances[left[found]] = distance
            left, place = left[missed], place[missed]
        if not len(left):
            return distances
    far = _by_transform if np.prod(shape) <= VOXELS_PER_POINT * len(left) else _by_tree
    distances[left] = far(start[:, left], target, shape, spacing)
    return distances


@lru_cache(maxsize=64)
def _near_offsets(spacing: tuple[float, ...]) -> tuple[NDArray[np.intp], Floats]:
    """The steps to the nearest places (n, axes) and their lengths in mm, rising; none that is as near is missing."""
    reach = NEAR_STEPS * min(spacing)
    sides = [np.arange(-n, n + 1) for n in (int(reach / s) for s in spacing)]
    steps = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, len(spacing))
    lengths = np.linalg.norm(steps * spacing, axis=1)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] <= reach][:NEAR_PLACES]
    return steps[order], lengths[order]


def _by_transform(
    start: NDArray[np.intp], target: NDArray[np.intp], shape: tuple[int, ...], spacing: tuple[float, ...],
) -> Floats:
    """Distances by a distance transform."""
    import edt

    free = np.ones(shape, bool)
    free[tuple(target)] = False
    return np.asarray(edt.edt(free, anisotropy=spacing)[tuple(start)], np.float64)


def _by_tree(start: NDArray[np.intp], target: NDArray[np.intp], shape: tuple[int, ...], spacing: tuple[float, ...]) -> Floats:
    """Distances by a search tree; `shape` is not used."""
    from scipy.spatial import KDTree

    tree = KDTree(target.T * spacing, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(start.T * spacing)[0], np.float64)


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


def mean_distance_mm(distances: SurfaceDistances) -> float | None:
    """Mean distance in mm over both surfaces taken together, weighted by area (ASSD); None when a mask is empty."""
    if not len(distances.reference_mm) or not len(distances.prediction_mm):
        return None
    both = (distances.reference_mm, distances.reference_size), (distances.prediction_mm, distances.prediction_size)
    return float(sum(mm @ size for mm, size in both) / sum(size.sum() for _, size in both))


def surface_metrics(distances: SurfaceDistances, tolerance_mm: float) -> Values:
    """HD, HD95, ASSD and NSD; None where undefined."""
    return {
        "hd": hausdorff_mm(distances, 100.0), "hd95": hausdorff_mm(distances), "assd": mean_distance_mm(distances),
        "nsd": surface_dice(distances, tolerance_mm),
    }
