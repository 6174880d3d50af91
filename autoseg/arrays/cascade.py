"""The previous stage's segmentation as input of the next stage: on its grid, altered in training, one channel per label.

A segmentation is a map of inside indices, 0 for background and 1..K for the labels; where there is none it is 0.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.arrays.components import CONNECTIVITY
from autoseg.arrays.restore import LogitSource, Regions, restore_labels
from autoseg.types.case import Placement
from autoseg.types.geometry import AxisMap, Grid

Operation = Literal["dilate", "erode", "open", "close"]
OPERATIONS: tuple[Operation, ...] = ("dilate", "erode", "open", "close")
MAX_RADIUS = 11.0  # squared distances up to this, and one step beyond, fit into a byte
_IDENTITY = AxisMap((0, 1, 2), (False, False, False))


def labels_on_grid(
    logits_czyx: Tensor | LogitSource, source: Placement, target: Placement, region_values: Regions = None,
) -> NDArray[np.integer]:
    """Return the segmentation that logits of one stage are on the preprocessed grid of the next: inside indices, uint8 or int16.

    Logits (C, *source.shape) are interpolated as `restore_ensemble` does and then decided. Raises ValueError when the two
    placements are not of one crop of one image.
    """
    crops = [(p.stored, p.axis_map, p.transpose, p.crop_zyx) for p in (source, target)]
    if crops[0] != crops[1]:
        raise ValueError("both stages must be preprocessed from one crop of one image")
    z, y, x = target.shape
    between = Placement(
        stored=Grid(shape=target.shape, spacing=target.spacing_zyx_mm, has_direction=False), axis_map=_IDENTITY,
        transpose=(0, 1, 2), crop_zyx=((0, z), (0, y), (0, x)), cropped_spacing_zyx_mm=target.spacing_zyx_mm,
        shape=source.shape, spacing_zyx_mm=source.spacing_zyx_mm,
    )
    return restore_labels(logits_czyx, between, region_values)


def one_hot(label: Tensor, count: int) -> Tensor:
    """Labels (..., z, y, x), whole numbers of any type, as float32 channels (..., count, z, y, x) of labels 1 to `count`."""
    values = torch.arange(1, count + 1, device=label.device).view(-1, 1, 1, 1)
    return (label.unsqueeze(-4) == values).float()


def morph(mask_zyx: Tensor, operation: Operation, radius: float) -> Tensor:
    """A bool mask dilated, eroded, opened or closed by the ball of all offsets of length up to `radius` (in voxels, up to 11).

    Beyond the border nothing is dilated from and nothing eroded from, as in skimage.morphology with mode "ignore".
    """
    if operation == "dilate":
        return _near(mask_zyx, radius)
    if operation == "erode":
        return ~_near(~mask_zyx, radius)
    if operation == "close":
        return ~_near(~_near(mask_zyx, radius), radius)
    return _near(~_near(~mask_zyx, radius), radius)


def _near(mask_zyx: Tensor, radius: float) -> Tensor:
    """Where a true voxel lies within `radius`: squared distances, cut off there, one axis after the other (lower envelope)."""
    if radius > MAX_RADIUS:
        raise ValueError(f"the radius must be at most {MAX_RADIUS:g} voxels, found {radius:g}")
    limit = math.floor(radius**2)
    distance = torch.where(mask_zyx, 0, limit + 1).to(torch.uint8)
    for axis, size in enumerate(mask_zyx.shape):
        nearest = distance.clone()
        for step in range(1, min(math.floor(radius), size - 1) + 1):
            rest = size - step
            for there, here in ((0, step), (step, 0)):
                part = nearest.narrow(axis, here, rest)
                torch.minimum(part, distance.narrow(axis, there, rest) + step**2, out=part)
        distance = nearest
    return distance <= limit


def morph_label(label_zyx: Tensor, label: int, operation: Operation, radius: float) -> Tensor:
    """The segmentation with one label's mask altered by `morph`: voxels that it gains are taken from other labels."""
    mask = label_zyx == label
    changed = morph(mask, operation, radius)
    return torch.where(changed, label, torch.where(mask, 0, label_zyx)).to(label_zyx.dtype)


def remove_component(label_zyx: Tensor, label: int, choice: float, largest_share: float) -> Tensor:
    """The segmentation without one 26-connected component of a label, among those smaller than a share of all voxels.

    `choice` in [0, 1) picks it among these, in the order of their first voxels; without any nothing changes.
    """
    import cc3d

    mask = (label_zyx == label).cpu().numpy()
    if not mask.any():
        return label_zyx
    components = cc3d.connected_components(mask.view(np.uint8), connectivity=CONNECTIVITY)
    sizes = np.bincount(components.reshape(-1))
    candidates = np.flatnonzero(sizes[1:] < largest_share * components.size) + 1
    if not len(candidates):
        return label_zyx
    gone = torch.from_numpy(components == candidates[int(choice * len(candidates))]).to(label_zyx.device)
    return label_zyx.masked_fill(gone, 0)
