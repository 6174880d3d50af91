"""Resampling of images (cubic spline) and label maps (linear per label, then the winner) to another spacing.

Positions are half-pixel centred and the border repeats. The results are those of skimage.transform.resize with mode "edge"
and no anti-aliasing, as nnU-Net uses it, computed as small matrix products (images) or only where labels meet (labels).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.types.geometry import Shape, Vector

ANISOTROPY_THRESHOLD = 3.0  # nnU-Net: above this ratio of spacings the coarse axis is resampled on its own
_BLOCK = 64  # output rows per matrix product
_NEGLIGIBLE = 1e-8  # spline weights below this are dropped; they fall by 0.27 per voxel
_CHUNK = 1 << 15  # voxels whose corners are compared at once


def resampled_shape(shape: Shape, old_spacing: Vector, new_spacing: Vector) -> Shape:
    """Return round(old spacing / new spacing * shape) per axis, at least 1 (nnU-Net)."""
    z, y, x = (max(1, round(old / new * n)) for old, new, n in zip(old_spacing, new_spacing, shape, strict=True))
    return z, y, x


def separate_axis(old_spacing: Vector, new_spacing: Vector) -> int | None:
    """Return the axis that is too coarse to interpolate along, or None (nnU-Net).

    The first of the two spacings whose ratio of largest to smallest exceeds 3 decides; a tie for the largest means None.
    """
    for spacing in (old_spacing, new_spacing):
        if max(spacing) / min(spacing) > ANISOTROPY_THRESHOLD:
            coarse = [axis for axis in range(3) if spacing[axis] == max(spacing)]
            return coarse[0] if len(coarse) == 1 else None
    return None


class Taps(NamedTuple):
    """Linear interpolation along one axis: output i is (1 - weight[i]) * input[low[i]] + weight[i] * input[high[i]]."""

    low: NDArray[np.intp]
    high: NDArray[np.intp]
    weight: NDArray[np.float64]
    nearest: NDArray[np.intp]


@lru_cache(maxsize=256)
def linear_taps(old: int, new: int, only_nearest: bool = False) -> Taps:
    """Return the taps for resampling an axis from `old` to `new` voxels; with `only_nearest`, of order 0."""
    position: NDArray[np.float64] = old / new * (np.arange(new, dtype=np.float64) + 0.5) - 0.5
    nearest = np.clip(np.floor(position + 0.5), 0, old - 1).astype(np.intp)
    if only_nearest or old == new:
        return Taps(nearest, nearest, np.zeros(new), nearest)
    position = np.clip(position, 0, old - 1)
    low = np.floor(position).astype(np.intp)
    return Taps(low, np.minimum(low + 1, old - 1), np.asarray(position - low, np.float64), nearest)


class _Band(NamedTuple):
    """A block of rows of an interpolation matrix, with the input range it reads."""

    out: slice
    read: slice
    matrix: NDArray[np.float32]


@lru_cache(maxsize=128)
def _spline_bands(old: int, new: int) -> tuple[_Band, ...]:
    """Return the cubic-spline matrix from `old` to `new` voxels as blocks of rows, each cut to its nonzero columns."""
    from scipy.ndimage import zoom

    matrix: NDArray[np.float64] = np.asarray(zoom(np.eye(old), (new / old, 1), order=3, mode="nearest", grid_mode=True))
    bands = []
    for start in range(0, new, _BLOCK):
        rows = matrix[start:start + _BLOCK]
        columns = np.flatnonzero((np.abs(rows) > _NEGLIGIBLE).any(axis=0))
        read = slice(int(columns[0]), int(columns[-1]) + 1)
        bands.append(_Band(slice(start, start + len(rows)), read, np.ascontiguousarray(rows[:, read], dtype=np.float32)))
    return tuple(bands)


def _along(volume: NDArray[np.float32], axis: int, size: int, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Resample one axis of a volume (z, y, x) to `size` voxels."""
    if volume.shape[axis] == size and out is None:
        return volume
    shape = (*volume.shape[:axis], size, *volume.shape[axis + 1:])
    result: NDArray[np.float32] = np.empty(shape, np.float32) if out is None else out
    if volume.shape[axis] == size:
        result[...] = volume
        return result
    for band in _spline_bands(volume.shape[axis], size):
        if axis == 0:
            flat = volume[band.read].reshape(band.read.stop - band.read.start, -1)
            result[band.out] = (band.matrix @ flat).reshape(-1, *shape[1:])
        elif axis == 1:
            np.matmul(band.matrix, volume[:, band.read], out=result[:, band.out])
        else:
            np.matmul(volume[..., band.read], band.matrix.T, out=result[..., band.out])
    return result


def _in_plane(slices: NDArray[np.float32], size: tuple[int, int], out: NDArray[np.float32]) -> None:
    """Resample the last two axes into `out`, the axis that shrinks more (or grows less) first."""
    first, second = sorted((1, 2), key=lambda axis: size[axis - 1] / slices.shape[axis])
    _along(_along(slices, first, size[first - 1]), second, size[second - 1], out)


def _cubic(volume: NDArray[np.float32], shape: Shape, out: NDArray[np.float32]) -> None:
    """Resample a volume into `out`, in slabs, so that temporary arrays stay small beside input and output."""
    plane = (shape[1], shape[2])
    if shape[0] == volume.shape[0]:
        for start in range(0, shape[0], _BLOCK):
            _in_plane(volume[start:start + _BLOCK], plane, out[start:start + _BLOCK])
    elif shape[0] / volume.shape[0] <= shape[1] * shape[2] / (volume.shape[1] * volume.shape[2]):
        for band in _spline_bands(volume.shape[0], shape[0]):
            flat = volume[band.read].reshape(band.read.stop - band.read.start, -1)
            _in_plane((band.matrix @ flat).reshape(-1, *volume.shape[1:]), plane, out[band.out])
    else:
        middle = np.empty((volume.shape[0], *plane), np.float32)
        for start in range(0, len(middle), _BLOCK):
            _in_plane(volume[start:start + _BLOCK], plane, middle[start:start + _BLOCK])
        _along(middle, 0, shape[0], out)


def _cubic_slices(volume: NDArray[np.float32], shape: Shape, axis: int, out: NDArray[np.float32]) -> None:
    """Resample each slice across `axis` on its own, clipped to its own range, and repeat the nearest slice along `axis`."""
    volume, out = np.moveaxis(volume, axis, 0), np.moveaxis(out, axis, 0)
    nearest = linear_taps(volume.shape[0], out.shape[0], True).nearest
    for source in np.unique(nearest):
        slab = np.ascontiguousarray(volume[source:source + 1])
        result = np.empty((1, *out.shape[1:]), np.float32)
        _in_plane(slab, (out.shape[1], out.shape[2]), result)
        out[nearest == source] = np.clip(result, slab.min(), slab.max())


def _linear(volume: NDArray[np.float32], shape: Shape, coarse: int | None) -> NDArray[np.float32]:
    """Resample a volume linearly, the axis that shrinks most first; of a coarse axis the nearest slice is taken."""
    for axis in sorted(range(3), key=lambda a: shape[a] / volume.shape[a]):
        taps = linear_taps(volume.shape[axis], shape[axis], axis == coarse)
        low = np.take(volume, taps.low, axis)
        if taps.weight.any():
            weight = taps.weight.astype(np.float32).reshape(*(-1 if a == axis else 1 for a in range(3)))
            low += (np.take(volume, taps.high, axis) - low) * weight
        volume = low
    return volume


def resample_image(
    image_czyx: NDArray[np.float32], shape: Shape, old_spacing: Vector, new_spacing: Vector, linear: bool = False,
) -> NDArray[np.float32]:
    """Resample each channel to `shape` by cubic spline, clipped to the range of its input, or linearly; float32.

    The spacings (mm, z y x) decide only whether one axis is too coarse (`separate_axis`): then slices are resampled in two
    dimensions and the nearest slice is taken along that axis. An image that has the shape already is returned as it is.
    """
    if image_czyx.shape[1:] == tuple(shape):
        return image_czyx.astype(np.float32, copy=False)
    axis = separate_axis(old_spacing, new_spacing)
    out = np.empty((len(image_czyx), *shape), np.float32)
    for channel, result in zip(image_czyx, out, strict=True):
        volume = np.ascontiguousarray(channel, dtype=np.float32)
        if linear:
            result[...] = _linear(volume, shape, axis)
        elif axis is None:
            _cubic(volume, shape, result)
            np.clip(result, volume.min(), volume.max(), out=result)
        else:
            _cubic_slices(volume, shape, axis, result)
    return out


def _gather(array_zyx: NDArray[Any], indices: list[NDArray[np.intp]]) -> NDArray[Any]:
    """Return a contiguous array of the voxels at the crossings of `indices`, the axis that shrinks most first."""
    for axis in sorted(range(3), key=lambda a: len(indices[a]) / array_zyx.shape[a]):
        array_zyx = np.take(array_zyx, indices[axis], axis)
    return np.ascontiguousarray(array_zyx)


def _mixed_cells(label_zyx: NDArray[Any], axes: list[int]) -> NDArray[np.bool_]:
    """Return, at the low corner of each cell of 2 voxels along `axes`, whether its corners hold different labels."""
    low = high = label_zyx
    for axis in axes:
        size = low.shape[axis]
        after = np.minimum(np.arange(size) + 1, size - 1)
        low = np.minimum(low, np.take(low, after, axis))
        high = np.maximum(high, np.take(high, after, axis))
    mixed: NDArray[np.bool_] = low != high
    return mixed


def _winners(label_zyx: NDArray[np.int16], taps: list[Taps], where: tuple[NDArray[np.intp], ...]) -> NDArray[np.int16]:
    """Return the label with the largest linear weight at each of the output voxels `where`.

    A tie goes to the nearest neighbour's label if it is one of the tied, else to the smallest (batchgenerators 0.25.5). Weights
    are float64 and added in scipy's order of corners, so that what ties there by rounding ties here too.
    """
    count = len(where[0])
    corners = [(np.zeros(3, int), np.ones(count))]
    for axis, (tap, index) in enumerate(zip(taps, where, strict=True)):
        if tap.weight.any():
            high = tap.weight[index]
            side = np.eye(3, dtype=int)[axis]
            corners = [(c + side * s, w * share) for c, w in corners for s, share in ((0, 1 - high), (1, high))]
    ends = [(tap.low[index], tap.high[index]) for tap, index in zip(taps, where, strict=True)]
    labels = [label_zyx[ends[0][c[0]], ends[1][c[1]], ends[2][c[2]]] for c, _ in corners]
    scores = [np.zeros(count) for _ in corners]
    for i, label in enumerate(labels):
        for j, (_, weight) in enumerate(corners):
            scores[i] += np.where(label == labels[j], weight, 0)
    least = np.max(scores, axis=0)
    nearest = label_zyx[tuple(tap.nearest[index] for tap, index in zip(taps, where, strict=True))]
    smallest = np.full(count, np.iinfo(np.int16).max, np.int16)
    nearest_wins = np.zeros(count, bool)
    for label, score in zip(labels, scores, strict=True):
        top = score >= least
        np.minimum(smallest, label, out=smallest, where=top)
        nearest_wins |= top & (label == nearest)
    return np.where(nearest_wins, nearest, smallest)


def resample_label(label_zyx: NDArray[np.int16], shape: Shape, old_spacing: Vector, new_spacing: Vector) -> NDArray[np.int16]:
    """Resample an int16 label map to `shape`: linear interpolation of each label's indicator, the largest takes the voxel.

    Every value counts as a label, -1 (outside) too. Where one axis is too coarse (`separate_axis`) the nearest slice is taken
    along it. Away from borders between labels the nearest voxel is the answer, so only cells with different corners are computed.
    """
    if label_zyx.shape == tuple(shape):
        return label_zyx
    coarse = separate_axis(old_spacing, new_spacing)
    taps = [linear_taps(old, new, axis == coarse) for axis, (old, new) in enumerate(zip(label_zyx.shape, shape, strict=True))]
    result = _gather(label_zyx, [tap.nearest for tap in taps])
    mixed = _mixed_cells(label_zyx, [axis for axis, tap in enumerate(taps) if tap.weight.any()])
    places = np.flatnonzero(_gather(mixed, [tap.low for tap in taps]))
    flat = result.reshape(-1)
    for start in range(0, len(places), _CHUNK):
        part = places[start:start + _CHUNK]
        flat[part] = _winners(label_zyx, taps, np.unravel_index(part, shape))
    return result
