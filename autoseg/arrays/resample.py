"""Resampling of images (cubic spline) and label maps (linear per label, then the winner) to another spacing.

Positions are half-pixel centred and the border repeats. The results are those of skimage.transform.resize with mode "edge"
and no anti-aliasing, as nnU-Net uses it, computed as small matrix products (images) or only where labels meet (labels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.types.geometry import Shape, Vector

ANISOTROPY_THRESHOLD = 3.0  # nnU-Net: above this ratio of spacings the coarse axis is resampled on its own
_BLOCK = 32  # output rows per matrix product
_POLE = 3**0.5 - 2  # of the cubic B-spline: a voxel's weight falls by 0.27 per voxel of distance
_REACH = 14  # voxels on either side whose weight counts; beyond, it is below 2e-8
_SCRATCH = 1 << 18  # voxels between two matrix products: they stay in the processor's cache
_SLAB = 1 << 21  # output voxels worked on at once where neighbours are gathered
_CHUNK = 1 << 14  # voxels whose corners are compared at once


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
    """Return the cubic-spline matrix from `old` to `new` voxels as blocks of rows, each cut to its nonzero columns.

    A row is the four B-spline weights of its position times the inverse of the B-spline's samples, sqrt(3) p^|k| with the pole
    p = sqrt(3) - 2, on a signal whose border repeats (Unser, Splines, IEEE Signal Processing Magazine 1999).
    """
    position: NDArray[np.float64] = old / new * (np.arange(new, dtype=np.float64) + 0.5) - 0.5
    low = np.floor(position).astype(np.intp)
    t = position - low
    weights = np.stack([(1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3], axis=1) / 6
    offset = np.arange(-1 - _REACH, 3 + _REACH)  # of the voxels that a row reads from the one below its position
    inverse = np.sqrt(3.0) * _POLE ** np.abs(np.arange(-1, 3)[:, None] - offset)
    rows = weights @ inverse
    columns = np.clip(low[:, None] + offset, 0, old - 1)
    bands = []
    for start in range(0, new, _BLOCK):
        part = slice(start, min(start + _BLOCK, new))
        read = slice(int(columns[part].min()), int(columns[part].max()) + 1)
        matrix = np.zeros((part.stop - start, read.stop - read.start))
        np.add.at(matrix, (np.arange(len(matrix))[:, None], columns[part] - read.start), rows[part])
        bands.append(_Band(part, read, matrix.astype(np.float32)))
    return tuple(bands)


def _along(volume: NDArray[np.float32], axis: int, out: NDArray[np.float32]) -> None:
    """Resample the second or third axis of a volume (z, y, x) into `out`."""
    if volume.shape[axis] == out.shape[axis]:
        out[...] = volume
        return
    for band in _spline_bands(volume.shape[axis], out.shape[axis]):
        if axis == 1:
            np.matmul(band.matrix, volume[:, band.read], out=out[:, band.out])
        else:
            np.matmul(volume[..., band.read], band.matrix.T, out=out[..., band.out])


def _in_plane(slices: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Resample the last two axes into `out`, the axis that shrinks more (or grows less) first, a few slices at a time."""
    changed = [axis for axis in (1, 2) if slices.shape[axis] != out.shape[axis]]
    if len(changed) < 2:
        _along(slices, changed[0] if changed else 1, out)
        return
    first, second = sorted(changed, key=lambda axis: out.shape[axis] / slices.shape[axis])
    size = (out.shape[1], slices.shape[2]) if first == 1 else (slices.shape[1], out.shape[2])
    count = max(1, min(len(slices), _SCRATCH // (size[0] * size[1])))
    scratch = np.empty((count, *size), np.float32)
    for start in range(0, len(slices), count):
        part = slices[start:start + count]
        between = scratch[:len(part)]
        _along(part, first, between)
        _along(between, second, out[start:start + count])


def _cubic(volume: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Resample a contiguous volume into `out`, clipped to its own range, with a few slices of working memory."""
    low, high = volume.min(), volume.max()
    if len(volume) == len(out):
        for start in range(0, len(out), _BLOCK):
            part = out[start:start + _BLOCK]
            _in_plane(volume[start:start + _BLOCK], part)
            np.clip(part, low, high, out=part)
        return
    through = len(out) / len(volume) <= out[0].size / volume[0].size  # along z first
    bands = _spline_bands(len(volume), len(out))
    depth = max(len(band.matrix) if through else band.matrix.shape[1] for band in bands)
    window = np.empty((depth, *(volume if through else out).shape[1:]), np.float32)
    done = before = 0
    for band in bands:
        rows, reads = band.matrix.shape
        part = out[band.out]
        if through:
            np.matmul(band.matrix, volume[band.read].reshape(reads, -1), out=window[:rows].reshape(rows, -1))
            _in_plane(window[:rows], part)
        else:
            kept = max(0, done - band.read.start)  # slices that the block before has resampled already
            window[:kept] = window[before - kept:before]
            _in_plane(volume[done if kept else band.read.start:band.read.stop], window[kept:reads])
            np.matmul(band.matrix, window[:reads].reshape(reads, -1), out=part.reshape(rows, -1))
            done, before = band.read.stop, reads
        np.clip(part, low, high, out=part)


def _cubic_slices(volume: NDArray[np.float32], axis: int, out: NDArray[np.float32]) -> None:
    """Resample each slice across `axis` on its own, clipped to its own range, and repeat the nearest slice along `axis`."""
    volume, out = np.moveaxis(volume, axis, 0), np.moveaxis(out, axis, 0)
    nearest = linear_taps(volume.shape[0], out.shape[0], True).nearest
    result = np.empty((1, *out.shape[1:]), np.float32)
    for source in np.unique(nearest):
        slab = np.ascontiguousarray(volume[source:source + 1])
        _in_plane(slab, result)
        out[nearest == source] = np.clip(result, slab.min(), slab.max())


def _slabs(taps: Taps, plane: int) -> Iterator[tuple[slice, slice, Taps]]:
    """Yield parts of the first axis of an output with `plane` voxels per slice: where each lies, what it reads, its own taps."""
    depth = max(1, _SLAB // plane)
    for start in range(0, len(taps.low), depth):
        part = slice(start, start + depth)
        low, high, nearest = taps.low[part], taps.high[part], taps.nearest[part]
        first, last = int(min(low.min(), nearest.min())), int(max(high.max(), nearest.max()))
        yield part, slice(first, last + 1), Taps(low - first, high - first, taps.weight[part], nearest - first)


def _linear(volume: NDArray[np.float32], coarse: int | None, out: NDArray[np.float32]) -> None:
    """Resample a volume linearly, the axis that shrinks most first; of a coarse axis the nearest slice is taken."""
    shape = out.shape
    order = sorted(range(3), key=lambda axis: shape[axis] / volume.shape[axis])
    taps = [linear_taps(volume.shape[axis], shape[axis], axis == coarse) for axis in range(3)]
    for part, read, along in _slabs(taps[0], shape[1] * shape[2]):
        slab = volume[read]
        for axis in order:
            tap = (along, *taps[1:])[axis]
            low = np.take(slab, tap.low, axis)
            if tap.weight.any():
                weight = tap.weight.astype(np.float32).reshape(*(-1 if a == axis else 1 for a in range(3)))
                low += (np.take(slab, tap.high, axis) - low) * weight
            slab = low
        out[part] = slab


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
            _linear(volume, axis, result)
        elif axis is None:
            _cubic(volume, result)
        else:
            _cubic_slices(volume, axis, result)
    return out


def _gather(array_zyx: NDArray[Any], indices: Sequence[NDArray[np.intp]]) -> NDArray[Any]:
    """Return a contiguous array of the voxels at the crossings of `indices`, the axis that shrinks most first."""
    for axis in sorted(range(3), key=lambda a: len(indices[a]) / array_zyx.shape[a]):
        array_zyx = np.take(array_zyx, indices[axis], axis)
    return np.ascontiguousarray(array_zyx)


def _mixed_cells(label_zyx: NDArray[Any], axes: list[int]) -> NDArray[np.bool_]:
    """Return, at the low corner of each cell of 2 voxels along `axes`, whether its corners hold different labels."""
    low, high = label_zyx.copy(), label_zyx.copy()
    for axis in axes:
        here, after = [tuple(part if a == axis else slice(None) for a in range(3)) for part in (slice(-1), slice(1, None))]
        np.minimum(low[here], low[after], out=low[here])
        np.maximum(high[here], high[after], out=high[here])
    mixed: NDArray[np.bool_] = low != high
    return mixed


def _corners(
    label_zyx: NDArray[Any], taps: list[Taps], where: tuple[NDArray[np.intp], ...],
) -> tuple[list[NDArray[Any]], list[NDArray[np.float64]], NDArray[Any]]:
    """Return labels and linear weights of the corners around the output voxels `where`, and the labels of the nearest voxels."""
    strides = (label_zyx.shape[1] * label_zyx.shape[2], label_zyx.shape[2], 1)
    nearest = np.zeros(len(where[0]), np.intp)
    corners = [(nearest, np.ones(len(nearest)))]
    for tap, index, stride in zip(taps, where, strides, strict=True):
        nearest = nearest + tap.nearest[index] * stride
        low = tap.low[index] * stride
        if tap.weight.any():
            weight, high = tap.weight[index], tap.high[index] * stride
            rest = 1 - weight
            corners = [pair for place, share in corners for pair in ((place + low, share * rest), (place + high, share * weight))]
        else:
            corners = [(place + low, share) for place, share in corners]
    flat = label_zyx.reshape(-1)
    return [flat[place] for place, _ in corners], [share for _, share in corners], flat[nearest]


def _winners(label_zyx: NDArray[Any], taps: list[Taps], where: tuple[NDArray[np.intp], ...]) -> NDArray[Any]:
    """Return the label with the largest linear weight at each of the output voxels `where`.

    A tie goes to the nearest neighbour's label if it is one of the tied, else to the smallest (batchgenerators 0.25.5). Weights
    are float64 and added in scipy's order of corners, so that what ties there by rounding ties here too.
    """
    labels, weights, nearest = _corners(label_zyx, taps, where)
    first, second = labels[0], labels[0].copy()  # most cells hold two labels
    for label in labels[1:]:
        np.copyto(second, label, where=(second == first) & (label != first))
    scores = np.zeros((2, len(first)))
    more = np.zeros(len(first), bool)
    for label, weight in zip(labels, weights, strict=True):
        ours = label == first
        scores[0] += weight * ours
        scores[1] += weight * ~ours
        more |= ~ours & (label != second)
    result = np.where(scores[0] > scores[1], first, np.where(scores[0] < scores[1], second, nearest))
    rest = np.flatnonzero(more)
    if rest.size:
        result[rest] = _winners_of_many([label[rest] for label in labels], [weight[rest] for weight in weights], nearest[rest])
    return result


def _winners_of_many(labels: list[NDArray[Any]], weights: list[NDArray[np.float64]], nearest: NDArray[Any]) -> NDArray[Any]:
    """The same for cells with any number of labels."""
    scores = [np.zeros(len(nearest)) for _ in labels]
    for i, label in enumerate(labels):
        for other, weight in zip(labels, weights, strict=True):
            scores[i] += weight * (label == other)
    least = np.max(scores, axis=0)
    smallest = np.full(len(nearest), np.iinfo(nearest.dtype).max, nearest.dtype)
    nearest_wins = np.zeros(len(nearest), bool)
    for label, score in zip(labels, scores, strict=True):
        top = score >= least
        np.minimum(smallest, label, out=smallest, where=top)
        nearest_wins |= top & (label == nearest)
    return np.where(nearest_wins, nearest, smallest)


def _label_slab(label_zyx: NDArray[Any], taps: list[Taps], out: NDArray[np.int16], lowest: int) -> None:
    """Resample a contiguous label map, whose values count from `lowest`, into `out` by taps of that size."""
    result = _gather(label_zyx, [tap.nearest for tap in taps])
    mixed = _mixed_cells(label_zyx, [axis for axis, tap in enumerate(taps) if tap.weight.any()])
    places = np.flatnonzero(_gather(mixed, [tap.low for tap in taps]))
    flat = result.reshape(-1)
    for start in range(0, len(places), _CHUNK):
        part = places[start:start + _CHUNK]
        flat[part] = _winners(label_zyx, taps, np.unravel_index(part, result.shape))
    np.add(result, lowest, out=out, dtype=np.int16)


def resample_label(label_zyx: NDArray[np.int16], shape: Shape, old_spacing: Vector, new_spacing: Vector) -> NDArray[np.int16]:
    """Resample an int16 label map to `shape`: linear interpolation of each label's indicator, the largest takes the voxel.

    Every value counts as a label, -1 (outside) too. Where one axis is too coarse (`separate_axis`) the nearest slice is taken
    along it. Away from borders between labels the nearest voxel is the answer, so only cells with different corners are computed.
    """
    if label_zyx.shape == tuple(shape):
        return label_zyx
    coarse = separate_axis(old_spacing, new_spacing)
    taps = [linear_taps(old, new, axis == coarse) for axis, (old, new) in enumerate(zip(label_zyx.shape, shape, strict=True))]
    lowest, highest = int(label_zyx.min()), int(label_zyx.max())
    small = highest - lowest <= np.iinfo(np.uint8).max  # a byte per voxel is four times faster than two
    result = np.empty(shape, np.int16)
    for part, read, along in _slabs(taps[0], shape[1] * shape[2]):
        slab = np.ascontiguousarray(label_zyx[read])
        slab = (slab - np.int16(lowest)).astype(np.uint8) if small else slab
        _label_slab(slab, [along, *taps[1:]], result[part], lowest if small else 0)
    return result
