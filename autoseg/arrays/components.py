"""Connected components, and the post-processing of masks that rests on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import PluginError
from autoseg.types.record import Spec

CONNECTIVITY: Literal[26] = 26  # voxels that share a face, an edge or a corner belong together (nnU-Net, postprocessing)

Postprocess = Callable[[NDArray[np.integer], Mapping[str, Any]], NDArray[np.integer]]


def bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    """The smallest box that holds every true voxel, as slices; None for an empty mask."""
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not hit.size:
            return None
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def keep_largest(mask_zyx: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected component of a mask; components of the same, largest size all stay, an empty mask stays empty."""
    import cc3d

    kept = np.zeros(mask_zyx.shape, bool)
    box = bounding_box(mask_zyx)
    if box is None:
        return kept
    voxels_zyx = np.ascontiguousarray(mask_zyx[box]).view(np.uint8)  # cc3d 4.1 fails on bool masks that are a single line
    components = cc3d.connected_components(voxels_zyx, connectivity=CONNECTIVITY)
    voxels = np.asarray(cc3d.statistics(components)["voxel_counts"]).astype(np.int64)
    voxels[0] = 0
    kept[box] = (voxels == voxels.max())[components]
    return kept


def _largest_component(index_zyx: NDArray[np.integer], options: Mapping[str, Any]) -> NDArray[np.integer]:
    """Keep the largest component of all voxels of `options["labels"]` taken together."""
    mask = np.isin(index_zyx, np.asarray(options["labels"], index_zyx.dtype))
    cleaned = index_zyx.copy()
    cleaned[mask & ~keep_largest(mask)] = 0
    return cleaned


POSTPROCESSING: dict[str, Postprocess] = {"largest_component": _largest_component}


def apply_postprocessing(index_zyx: NDArray[np.integer], steps: Sequence[Spec]) -> NDArray[np.integer]:
    """Apply post-processing steps in order to a label map of inside indices; removed voxels become background, 0.

    index_zyx: integers, (z, y, x), not changed. Kinds: `largest_component` with `labels`, a list of inside indices whose union
    keeps only its largest component (26-connected, equally large ones all stay). Returns an array of the same shape and dtype.
    Raises PluginError for an unknown kind or wrong options.
    """
    for step in steps:
        if step.kind not in POSTPROCESSING:
            raise PluginError(f"unknown post-processing {step.kind!r}; choose from {', '.join(POSTPROCESSING)}")
        labels = step.options.get("labels")
        listed = isinstance(labels, (list, tuple)) and all(isinstance(value, int) for value in labels)
        if set(step.options) != {"labels"} or not listed:
            raise PluginError(f"post-processing {step.kind} needs one option, labels (label indices), found {step.options}")
        index_zyx = POSTPROCESSING[step.kind](index_zyx, step.options)
    return index_zyx
