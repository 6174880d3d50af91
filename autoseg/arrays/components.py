"""Connected components of masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CONNECTIVITY: Literal[26] = 26  # voxels that share a face, an edge or a corner belong together (nnU-Net, postprocessing)
COMPONENTS_KEPT, LOCATIONS_KEPT = 1000, 200  # of a target, and voxels of a component


def bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    """The smallest box that holds every true voxel, as slices; None for an empty mask."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        part = mask[tuple(box)]  # only within what the axes before have left
        hit = np.flatnonzero(part.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
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


def component_locations(
    label_zyx: NDArray[np.integer], targets: Sequence[tuple[int, ...]], seed: int
) -> dict[int, list[NDArray[np.int16]]]:
    """Some voxels (n, 3) of every connected component of each target that is present, keyed by its place in `targets`.

    A target is the label values it consists of. At most 200 voxels of a component, drawn with `seed`, and the 1000 largest
    components of a target, largest first.
    """
    import cc3d

    box = bounding_box(label_zyx > 0)
    if box is None:
        return {}
    part_zyx = np.where(label_zyx[box] > 0, label_zyx[box], 0).astype(np.uint16)
    single = {group[0]: number for number, group in enumerate(targets) if len(group) == 1}
    found: dict[int, list[NDArray[np.int16]]] = {}
    passes = [(part_zyx, single)] if len(single) == len(targets) else [  # one for all labels, or one for each region
        (np.isin(part_zyx, group).astype(np.uint16), {1: number}) for number, group in enumerate(targets)
    ]
    offset = np.array([part.start for part in box])
    for which, (values_zyx, numbers) in enumerate(passes):
        components_zyx = cc3d.connected_components(values_zyx, connectivity=CONNECTIVITY)
        for places in _some_of_each(np.asarray(components_zyx).reshape(-1), np.random.default_rng([seed, which])):
            number = numbers.get(int(values_zyx.flat[places[0]]))
            if number is not None and len(found.setdefault(number, [])) < COMPONENTS_KEPT:
                voxels = np.stack(np.unravel_index(places, values_zyx.shape), axis=1) + offset
                found[number].append(voxels.astype(np.int16))
    return {number: found[number] for number in sorted(found)}


def _some_of_each(numbers: NDArray[np.integer], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Where each number above 0 stands, at most 200 places of each, those of the most frequent number first."""
    places = np.flatnonzero(numbers)
    numbers = numbers[places]
    sizes = np.bincount(numbers)
    chance = rng.random(len(places), np.float32)
    share = np.minimum(2 * LOCATIONS_KEPT / np.maximum(sizes, 1), 2.0).astype(np.float32)  # of these only is an order needed
    kept = np.flatnonzero(chance < share[numbers])
    order = np.lexsort((chance[kept], numbers[kept], -sizes[numbers[kept]]))
    places, numbers = places[kept][order], numbers[kept][order]
    groups = np.split(places, np.flatnonzero(np.diff(numbers)) + 1)
    return [np.sort(group[:LOCATIONS_KEPT]) for group in groups if len(group)]
