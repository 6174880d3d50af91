"""Connected components of masks."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

CONNECTIVITY: Literal[26] = 26  # voxels that share a face, an edge or a corner belong together (nnU-Net, postprocessing)


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
