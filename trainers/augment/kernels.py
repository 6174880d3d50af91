"""Compiled single-thread kernels for patches in main memory; the torch versions beside them say the same for any device.

Importing this module needs numba and a place for its cache. Kernels release the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., object])
TIE = 1e-6  # scores this close are a tie, which the nearest voxel settles

Floats = NDArray[np.float32]
Labels = NDArray[np.int16]


def _compiled(function: F) -> F:
    return cast(F, numba.njit(cache=True, nogil=True, fastmath={"contract"})(function))


@_compiled
def _winner(labels: Labels, at: int, steps: tuple[int, int, int], f: tuple[float, float, float]) -> np.int16:
    """The label with the largest sum of trilinear weights among the 8 corners of a cell."""
    sz, sy, sx = steps
    fz, fy, fx = np.float32(f[0]), np.float32(f[1]), np.float32(f[2])
    one = np.float32(1)
    gz, gy, gx = one - fz, one - fy, one - fx
    a, b, c, d = labels[at], labels[at + sx], labels[at + sy], labels[at + sy + sx]
    at += sz
    p, q, r, s = labels[at], labels[at + sx], labels[at + sy], labels[at + sy + sx]
    near, far = gz * gy, gz * fy
    wa, wb, wc, wd = near * gx, near * fx, far * gx, far * fx
    near, far = fz * gy, fz * fy
    wp, wq, wr, ws = near * gx, near * fx, far * gx, far * fx
    if fz > 0.5:
        upper, lower = (s if fx > 0.5 else r), (q if fx > 0.5 else p)
    else:
        upper, lower = (d if fx > 0.5 else c), (b if fx > 0.5 else a)
    winner: np.int16 = upper if fy > 0.5 else lower
    zero = np.float32(0)
    best = (wa if a == winner else zero) + (wb if b == winner else zero) + (wc if c == winner else zero)
    best += (wd if d == winner else zero) + (wp if p == winner else zero) + (wq if q == winner else zero)
    best += (wr if r == winner else zero) + (ws if s == winner else zero)
    if best >= 0.5:  # the others together have no more
        return winner
    values, weights = (a, b, c, d, p, q, r, s), (wa, wb, wc, wd, wp, wq, wr, ws)
    for k in range(8):
        if values[k] != winner:
            score = zero
            for j in range(8):
                if values[j] == values[k]:
                    score += weights[j]
            if score > best + TIE:
                best, winner = score, values[k]
    return winner


@_compiled
def _cells(
    position: NDArray[np.float64], step: NDArray[np.float64], field: Floats, shape: tuple[int, int, int],
    at: NDArray[np.int64], f: Floats,
) -> None:
    """Per voxel of a row: the flat index of its cell's low corner, and where it lies in the cell (3, row).

    The row starts at `position` and goes on by `step`; `field` (3, row) is added, or has no voxels. Points outside are moved
    to the border.
    """
    z_end, y_end, x_end = max(shape[0] - 2, 0), max(shape[1] - 2, 0), max(shape[2] - 2, 0)
    z_top, y_top, x_top = float(shape[0] - 1), float(shape[1] - 1), float(shape[2] - 1)
    bent = field.shape[1] > 0
    for i in range(at.size):
        z, y, x = position[0] + step[0] * i, position[1] + step[1] * i, position[2] + step[2] * i
        if bent:
            z, y, x = z + field[0, i], y + field[1, i], x + field[2, i]
        z, y, x = min(max(z, 0.0), z_top), min(max(y, 0.0), y_top), min(max(x, 0.0), x_top)
        low_z, low_y, low_x = min(int(z), z_end), min(int(y), y_end), min(int(x), x_end)
        at[i] = (low_z * shape[1] + low_y) * shape[2] + low_x
        f[0, i], f[1, i], f[2, i] = z - low_z, y - low_y, x - low_x


@_compiled
def resample(
    images: Floats, labels: Labels, shape: tuple[int, int, int], matrix: NDArray[np.float64], centre: NDArray[np.float64],
    field: Floats, out_images: Floats, out_labels: Labels,
) -> None:
    """Trilinear images, and labels by the largest sum of weights, at `centre + matrix @ offset from the patch's centre + field`.

    `images` (channel, voxels) and `labels` (maps, voxels) are crops of `shape`, flat; `field` (3, z, y, x), without voxels where
    there is none, is along the crop's axes; the results are (channel or map, z, y, x).
    """
    sizes = out_images.shape[1:]
    # a patch whose slices lie on the crop's needs no neighbours along z
    flat = matrix[0, 1] == 0.0 and matrix[0, 2] == 0.0 and abs(matrix[0, 0]) == 1.0 and field.size == 0
    sz = 0 if flat or shape[0] == 1 else shape[1] * shape[2]
    sy = 0 if shape[1] == 1 else shape[2]
    sx = 0 if shape[2] == 1 else 1
    at, f = np.empty(sizes[2], np.int64), np.empty((3, sizes[2]), np.float32)
    start, step = np.empty(3), np.empty(3)
    step[:] = matrix[:, 2]
    bend, none = np.empty((3, field.shape[3]), np.float32), np.empty((3, 0), np.float32)
    for z in range(sizes[0]):
        for y in range(sizes[1]):
            dz, dy, dx = z - (sizes[0] - 1) / 2, y - (sizes[1] - 1) / 2, -(sizes[2] - 1) / 2
            for axis in range(3):
                start[axis] = centre[axis] + matrix[axis, 0] * dz + matrix[axis, 1] * dy + matrix[axis, 2] * dx
            if flat:
                slice_z = min(max(round(start[0]), 0), shape[0] - 1)
                start[0] = 0.0
                _cells(start, step, none, (1, shape[1], shape[2]), at, f)
                at += slice_z * shape[1] * shape[2]
            else:
                if field.size:
                    bend[:] = field[:, z, y]
                _cells(start, step, bend, shape, at, f)
            for c in range(images.shape[0]):
                image, out = images[c], out_images[c, z, y]
                for i in range(at.size):
                    k, fz, fy, fx = at[i], f[0, i], f[1, i], f[2, i]
                    a = image[k] + fx * (image[k + sx] - image[k])
                    b = image[k + sy] + fx * (image[k + sy + sx] - image[k + sy])
                    a += fy * (b - a)
                    if sz:
                        m = k + sz
                        c0 = image[m] + fx * (image[m + sx] - image[m])
                        c1 = image[m + sy] + fx * (image[m + sy + sx] - image[m + sy])
                        c0 += fy * (c1 - c0)
                        a += fz * (c0 - a)
                    out[i] = a
            for c in range(labels.shape[0]):
                label, row = labels[c], out_labels[c, z, y]
                for i in range(at.size):
                    k = at[i]
                    v = label[k]
                    m = k + sz
                    mixed = (
                        (label[k + sx] ^ v) | (label[k + sy] ^ v) | (label[k + sy + sx] ^ v)
                        | (label[m] ^ v) | (label[m + sx] ^ v) | (label[m + sy] ^ v) | (label[m + sy + sx] ^ v)
                    )
                    row[i] = _winner(label, k, (sz, sy, sx), (f[0, i], f[1, i], f[2, i])) if mixed else v


@_compiled
def _reflected(index: int, size: int) -> int:
    """The index mirrored at the first and the last voxel, which are not repeated."""
    if size == 1:
        return 0
    index = abs(index) % (2 * size - 2)
    return index if index < size else 2 * size - 2 - index


@_compiled
def blur(image: Floats, taps_z: Floats, taps_y: Floats, taps_x: Floats, out: Floats) -> None:
    """Blur (z, y, x) by a symmetric kernel per axis, given from its middle outwards; both arrays are overwritten, `out` last."""
    size_z, size_y, size_x = image.shape
    for z in range(size_z):
        for y in range(size_y):
            row = out[z, y]
            row[:] = taps_z[0] * image[z, y]
            for k in range(1, taps_z.size):
                low, high = image[_reflected(z - k, size_z), y], image[_reflected(z + k, size_z), y]
                tap = taps_z[k]
                for x in range(size_x):
                    row[x] += tap * (low[x] + high[x])
    for z in range(size_z):
        for y in range(size_y):
            row = image[z, y]
            row[:] = taps_y[0] * out[z, y]
            for k in range(1, taps_y.size):
                low, high = out[z, _reflected(y - k, size_y)], out[z, _reflected(y + k, size_y)]
                tap = taps_y[k]
                for x in range(size_x):
                    row[x] += tap * (low[x] + high[x])
    reach = taps_x.size - 1
    wide = np.empty(size_x + 2 * reach, np.float32)
    for z in range(size_z):
        for y in range(size_y):
            wide[reach : reach + size_x] = image[z, y]
            for k in range(reach):
                wide[k] = image[z, y, _reflected(k - reach, size_x)]
                wide[reach + size_x + k] = image[z, y, _reflected(size_x + k, size_x)]
            row = out[z, y]
            row[:] = taps_x[0] * image[z, y]
            for k in range(1, taps_x.size):
                low, high = wide[reach - k : reach - k + size_x], wide[reach + k : reach + k + size_x]
                tap = taps_x[k]
                for x in range(size_x):
                    row[x] += tap * (low[x] + high[x])


@_compiled
def _axis(size: int, small: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Per voxel of an axis: the two voxels of the axis whose values it lies between after shrinking to `small`, and how far."""
    picked, scale = np.empty(small, np.int64), np.float32(size) / np.float32(small)  # float32 as in torch: it decides ties
    for i in range(small):
        picked[i] = min(int((np.float32(i) + np.float32(0.5)) * scale), size - 1)
    low, high, share = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32)
    for i in range(size):
        at = max((i + 0.5) * (small / size) - 0.5, 0.0)
        first = min(int(at), small - 1)
        low[i], high[i] = picked[first], picked[min(first + 1, small - 1)]
        share[i] = at - first
    return low, high, share


@_compiled
def low_resolution(image: Floats, small: tuple[int, int, int], out: Floats) -> None:
    """Shrink (z, y, x) to the size `small` by picking voxels, and enlarge it again linearly."""
    size_z, size_y, size_x = image.shape
    low_z, high_z, share_z = _axis(size_z, small[0])
    low_y, high_y, share_y = _axis(size_y, small[1])
    low_x, high_x, share_x = _axis(size_x, small[2])
    mixed = np.empty(size_x, np.float32)
    for z in range(size_z):
        for y in range(size_y):
            fz, fy = share_z[z], share_y[y]
            a, b = (np.float32(1) - fz) * (np.float32(1) - fy), (np.float32(1) - fz) * fy
            c, d = fz * (np.float32(1) - fy), fz * fy
            row_a, row_b = image[low_z[z], low_y[y]], image[low_z[z], high_y[y]]
            row_c, row_d = image[high_z[z], low_y[y]], image[high_z[z], high_y[y]]
            for x in range(size_x):
                mixed[x] = a * row_a[x] + b * row_b[x] + c * row_c[x] + d * row_d[x]
            row = out[z, y]
            for x in range(size_x):
                v = mixed[low_x[x]]
                row[x] = v + share_x[x] * (mixed[high_x[x]] - v)


def warm_up() -> None:
    """Compile every kernel, or read it from the cache; raises what goes wrong there."""
    image, label, flat = np.zeros((1, 2, 2, 2), np.float32), np.zeros((1, 2, 2, 2), np.int16), (1, 8)
    none, half = np.empty((3, 0, 0, 0), np.float32), np.ones(1, np.float32)
    resample(image.reshape(flat), label.reshape(flat), (2, 2, 2), np.eye(3), np.zeros(3), none, image.copy(), label.copy())
    blur(image[0], half, half, half, np.zeros_like(image[0]))
    low_resolution(image[0], (1, 1, 1), np.zeros_like(image[0]))
