"""Cropping to the part of an image that holds data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bounds = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

OUTSIDE = -1  # label of background voxels outside the nonzero mask


def nonzero_mask(image_czyx: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where any channel differs from zero, with enclosed holes filled (nnU-Net; holes are three-dimensional)."""
    import fill_voids

    mask: NDArray[np.bool_] = np.asarray(image_czyx[0] != 0)
    for channel in image_czyx[1:]:
        mask |= channel != 0
    if mask.all():
        return mask
    return np.asarray(fill_voids.fill(np.ascontiguousarray(mask)), dtype=np.bool_)


def bounding_box(mask_zyx: NDArray[np.bool_]) -> Bounds:
    """Return the half-open bounds of the true voxels; the whole array when there are none."""
    bounds = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hits = np.flatnonzero(mask_zyx.any(axis=others))
        bounds.append((int(hits[0]), int(hits[-1]) + 1) if hits.size else (0, mask_zyx.shape[axis]))
    return bounds[0], bounds[1], bounds[2]


def box_slices(bounds: Bounds) -> tuple[slice, slice, slice]:
    """Return the slices of a box given by half-open bounds."""
    (a, b), (c, d), (e, f) = bounds
    return slice(a, b), slice(c, d), slice(e, f)


def mark_outside(label_zyx: NDArray[np.integer], mask_zyx: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Return an int16 copy of the labels with -1 where the label is 0 and the voxel lies outside the filled nonzero mask."""
    marked = label_zyx.astype(np.int16, order="C")
    marked[(marked == 0) & ~mask_zyx] = OUTSIDE
    return marked
