"""From an image as read to the array that the network sees; training and prediction share it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.crop import box_slices, mark_outside, nonzero_bounds, nonzero_mask
from autoseg.arrays.normalize import normalize
from autoseg.arrays.resample import resample_image, resample_label, resampled_shape
from autoseg.types.case import Image, Placement, Preprocessed
from autoseg.types.geometry import Vector
from autoseg.types.plan import Configuration, Plan


def target_spacing(spacing_zyx_mm: Vector, configuration: Configuration, resampling: str = "cubic") -> Vector:
    """Return the spacing to resample to; a 2D configuration keeps the spacing between slices, without resampling all stays."""
    if resampling == "none":
        return spacing_zyx_mm
    if configuration.dims == 2:
        return spacing_zyx_mm[0], configuration.spacing[0], configuration.spacing[1]
    return configuration.spacing[0], configuration.spacing[1], configuration.spacing[2]


def preprocess(image: Image, label_zyx: NDArray[np.integer] | None, plan: Plan, configuration: Configuration) -> Preprocessed:
    """Orient, transpose, crop to nonzero, normalise and resample one case.

    `label_zyx` holds inside indices on the image's stored grid, or is None. The input arrays are not altered.
    Raises ValueError when shapes, the number of channels or the value range do not suit the plan.
    """
    if image.array_czyx.shape[1:] != image.grid.shape:
        raise ValueError(f"the image array has shape {image.array_czyx.shape[1:]}, its grid {image.grid.shape}")
    if label_zyx is not None and label_zyx.shape != image.grid.shape:
        raise ValueError(f"the label has shape {label_zyx.shape}, its image {image.grid.shape}")
    axis_map = image.grid.turned(plan.orientation)
    order = plan.transpose_forward

    def bring(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        lead = array.ndim - 3
        return axis_map.apply(array).transpose(*range(lead), *(lead + a for a in order))

    nonzero = bring(nonzero_mask(image.array_czyx))
    bounds = nonzero_bounds(nonzero)
    box = box_slices(bounds)
    read = label_zyx is not None or any(configuration.use_mask_for_norm)
    mask = np.ascontiguousarray(nonzero[box]) if read and not nonzero[box].all() else None
    del nonzero
    spacing = image.grid.mapped(axis_map).spacing
    spacing = (spacing[order[0]], spacing[order[1]], spacing[order[2]])
    target = target_spacing(spacing, configuration, plan.resampling)
    (a, b), (c, d), (e, f) = bounds
    placement = Placement(
        stored=image.grid, axis_map=axis_map, transpose=order, crop_zyx=bounds, cropped_spacing_zyx_mm=spacing,
        shape=resampled_shape((b - a, d - c, f - e), spacing, target), spacing_zyx_mm=target,
    )
    label = None if label_zyx is None else _label(bring(label_zyx)[box], mask, placement)
    cropped = np.array(bring(image.array_czyx)[(slice(None), *box)], dtype=np.float32, order="C")
    normalize(cropped, mask, configuration.normalization, configuration.use_mask_for_norm, plan.intensities)
    del mask
    return Preprocessed(
        resample_image(cropped, placement.shape, spacing, target, plan.resampling == "linear"), label, placement)


def _label(label_zyx: NDArray[np.integer], mask_zyx: NDArray[np.bool_] | None, place: Placement) -> NDArray[np.int16]:
    """Resample the cropped labels, -1 outside the mask (None: it holds every voxel)."""
    if mask_zyx is not None:
        marked = mark_outside(label_zyx, mask_zyx)
    else:
        marked = label_zyx.astype(np.int16, order="C", copy=label_zyx.shape == place.shape)  # else resampling makes the copy
    return resample_label(marked, place.shape, place.cropped_spacing_zyx_mm, place.spacing_zyx_mm)
