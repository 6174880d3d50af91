"""Labels and probabilities of one or several members, plane after plane or whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.arrays.crop import box_slices
from autoseg.arrays.restore.compiled import compiled_planes, kernels
from autoseg.arrays.restore.plain import plain_planes
from autoseg.arrays.restore.sources import Job, LogitSource, Member, Regions, RestoredPlane, WholeLogits
from autoseg.types.case import Placement

COMPILED_FROM = 4_000_000  # voxels times channels


def restore_planes(
    members: Sequence[tuple[Tensor | LogitSource, Placement]], region_values: Regions = None, with_probabilities: bool = False,
    weights: Sequence[float] | None = None, half: bool = False, temperatures: Sequence[float] | None = None,
) -> Iterator[RestoredPlane]:
    """Yield each plane of the cropped image grid, z rising: labels (inside indices, uint8 or int16), probabilities if asked for.

    Arguments and errors are those of `restore_ensemble`. Planes of the sources are pulled as they are needed, each once, and a
    few are held at a time.
    """
    return _run(_job(members, region_values, with_probabilities, weights, half, temperatures))


def restore_ensemble(
    members: Sequence[tuple[Tensor | LogitSource, Placement]], region_values: Regions = None, with_probabilities: bool = False,
    weights: Sequence[float] | None = None, half: bool = False, temperatures: Sequence[float] | None = None,
) -> tuple[NDArray[np.integer], NDArray[np.float32] | None]:
    """Return labels (inside indices, uint8 or int16, z y x) on the stored grid, and float32 (C, z, y, x) probabilities if asked.

    Each member is logits (C, *placement.shape), any float type and device, or a source of them, with its placement; all must
    come from one image and plan (same crop), and their spacings may differ. Several members are averaged as probabilities after
    interpolation, each counted by its positive number in `weights` (equal ones when None; they need not add up to 1).
    `region_values` None: softmax and the largest class; else sigmoid, and region i writes `region_values[i]` where it exceeds
    0.5, later regions over earlier ones. Outside the crop background is certain. With `half` interpolated logits of a single
    member are rounded to float16 before the largest is taken, of equal ones the first, as nnU-Net does. The probabilities that
    are returned are of logits divided by the member's number in `temperatures` (1 when None); labels do not depend on these.
    Raises ValueError when members, weights or temperatures do not fit.
    """
    job, placement = _job(members, region_values, with_probabilities, weights, half, temperatures), members[0][1]
    labels = np.zeros(placement.stored.shape, job.table.dtype)
    inside = _cropped_view(labels, placement)
    probabilities = probable = None
    if with_probabilities:
        probabilities = np.zeros((job.classes, *placement.stored.shape), np.float32)
        probabilities[0] = region_values is None
        probable = _cropped_view(probabilities, placement)
    for z, label, mean in _run(job):
        inside[z] = label
        if mean is not None and probable is not None:
            probable[:, z] = mean
    return labels, probabilities


def restore_labels(
    logits_czyx: Tensor | LogitSource, placement: Placement, region_values: Regions = None,
) -> NDArray[np.integer]:
    """Return the labels (inside indices, uint8 or int16) of one prediction on the stored grid; see `restore_ensemble`."""
    return restore_ensemble([(logits_czyx, placement)], region_values)[0]


def restore_probabilities(
    logits_czyx: Tensor | LogitSource, placement: Placement, regions: bool = False,
) -> NDArray[np.float32]:
    """Return float32 (C, z, y, x) probabilities on the stored grid: softmax, or sigmoid for regions, of interpolated logits.

    Outside the crop background is 1 and everything else 0.
    """
    source = WholeLogits(logits_czyx) if isinstance(logits_czyx, Tensor) else logits_czyx
    values = tuple(range(1, source.classes + 1)) if regions else None
    probabilities = restore_ensemble([(source, placement)], values, with_probabilities=True)[1]
    assert probabilities is not None
    return probabilities


def _run(job: Job) -> Iterator[RestoredPlane]:
    in_memory = all(member.source.device.type == "cpu" for member in job.members)
    large = worth_compiling(job.size, len(job.members) * job.classes)
    compiled = in_memory and large and kernels() is not None
    return compiled_planes(job, torch.get_num_threads()) if compiled else plain_planes(job)


def worth_compiling(shape: Sequence[int], channels: int) -> bool:
    """Whether a volume of so many voxels and channels of logits wins back what loading the compiled loops takes (0.5 s)."""
    return math.prod(shape) * channels >= COMPILED_FROM


def _job(
    members: Sequence[tuple[Tensor | LogitSource, Placement]], region_values: Regions, with_probabilities: bool,
    weights: Sequence[float] | None, half: bool, temperatures: Sequence[float] | None,
) -> Job:
    shares, placement = _shares(len(members), weights), members[0][1]
    degrees = [1.0] * len(members) if temperatures is None else list(temperatures)
    if len(degrees) != len(members) or not all(0 < degree < math.inf for degree in degrees):
        raise ValueError(f"expected one positive temperature for each of {len(members)} members, found {degrees}")
    if any(not _same_crop(placement, other) for _, other in members[1:]):
        raise ValueError("members of an ensemble must share one crop of one image")
    found = []
    for (logits, own), share, degree in zip(members, shares, degrees, strict=True):
        if isinstance(logits, Tensor) and logits.ndim != 4:
            raise ValueError(f"expected logits of shape (C, *{own.shape}), found {tuple(logits.shape)}")
        source = WholeLogits(logits) if isinstance(logits, Tensor) else logits
        if tuple(source.shape) != tuple(own.shape):
            raise ValueError(f"expected logits of shape (C, *{own.shape}), found {(source.classes, *source.shape)}")
        found.append(Member(source, own, share, 1 / degree))
    classes = found[0].classes
    if any(member.classes != classes for member in found) or (region_values is not None and len(region_values) != classes):
        counts = [member.classes for member in found]
        raise ValueError(f"members and regions must agree in classes, found {counts} and {region_values}")
    table = _table(classes, region_values)
    return Job(found, placement.cropped_shape, table, region_values is not None, half and len(found) == 1, with_probabilities)


def _table(classes: int, region_values: Regions) -> NDArray[np.integer]:
    """Labels by decision, in the type that label maps have."""
    table = np.arange(classes) if region_values is None else np.array([0, *region_values])
    return table.astype(np.uint8 if table.max() < 256 else np.int16)


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """One share per member; they add up to 1."""
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count or not all(0 < weight < math.inf for weight in given):
        raise ValueError(f"expected one positive weight for each of {count} members, found {given}")
    return [weight / sum(given) for weight in given]


def _cropped_view(array: NDArray[np.generic], placement: Placement) -> NDArray[np.generic]:
    """Return the view of an array on the stored grid (leading axes allowed) that is the transposed, cropped grid."""
    lead = array.ndim - 3
    view = placement.axis_map.apply(array).transpose(*range(lead), *(lead + a for a in placement.transpose))
    result: NDArray[np.generic] = view[(..., *box_slices(placement.crop_zyx))]
    return result


def _same_crop(a: Placement, b: Placement) -> bool:
    return (a.stored, a.axis_map, a.transpose, a.crop_zyx) == (b.stored, b.axis_map, b.transpose, b.crop_zyx)
