"""Lesion-wise agreement: which connected components of a mask are found, and which are invented.

A lesion is a connected component of one target (26 neighbours, 8 in a slice). A reference lesion is found when at least one of
its voxels is in the prediction of the same target; a predicted lesion is false when none of its voxels is in the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.components import CONNECTIVITY
from autoseg.types.report import LESION_BORDERS, LesionCount, Values, lesion_classes

Ints = NDArray[np.integer]
CHUNK = 1 << 20  # voxels looked at together: they stay in the processor's cache


@dataclass(frozen=True)
class Lesions:
    """All components of one label map: the target each belongs to (1, 2, ...), its voxels, and does it meet the other map."""

    target: NDArray[np.intp]
    voxels: NDArray[np.int64]
    met: NDArray[np.bool_]

    def of(self, target: int) -> Lesions:
        """The components of one target."""
        mine = self.target == target
        return Lesions(self.target[mine], self.voxels[mine], self.met[mine])


def find_lesions(reference_zyx: Ints, prediction_zyx: Ints) -> tuple[Lesions, Lesions]:
    """Components of all targets of both label maps in one pass each.

    reference_zyx, prediction_zyx: targets numbered from 1, background 0, of one shape (z, y, x), 8 or 16 bits.
    """
    import cc3d

    maps = [np.ascontiguousarray(array) for array in (reference_zyx, prediction_zyx)]
    flat = [array.reshape(-1) for array in maps]
    parts, targets, met = [], [], []
    for array in maps:
        labelled, count = cc3d.connected_components(array, connectivity=CONNECTIVITY, return_N=True)
        parts.append(labelled)
        targets.append(np.zeros(count + 1, np.intp))
        met.append(np.zeros(count + 1, bool))
    numbers = [labelled.reshape(-1) for labelled in parts]
    for start in range(0, flat[0].size, CHUNK):
        place = start + _run_starts([array[start:start + CHUNK] for array in numbers])
        agree = (flat[0][place] == flat[1][place]) & (flat[0][place] != 0)
        for labels, component, target, hit in zip(flat, numbers, targets, met, strict=True):
            target[component[place]] = labels[place]
            hit[component[place[agree]]] = True
    sizes = [np.asarray(cc3d.statistics(labelled)["voxel_counts"], np.int64)[1:] for labelled in parts]
    first, second = (Lesions(t[1:], s, m[1:]) for t, s, m in zip(targets, sizes, met, strict=True))
    return first, second


def _run_starts(rows: list[Ints]) -> NDArray[np.intp]:
    """Where in a stretch of voxels any of several rows has another value than before; the first voxel counts."""
    changes = np.ones(len(rows[0]), bool)
    np.not_equal(rows[0][1:], rows[0][:-1], out=changes[1:])
    for row in rows[1:]:
        changes[1:] |= row[1:] != row[:-1]
    return np.flatnonzero(changes)


def lesion_metrics(reference: Lesions, prediction: Lesions) -> Values:
    """Recall, precision and F1 over the lesions of one target, false positives, and the counts they rest on."""
    found, false = int(reference.met.sum()), int((~prediction.met).sum())
    wanted, given = len(reference.met), len(prediction.met)
    return {
        "lesion_recall": found / wanted if wanted else None,
        "lesion_precision": (given - false) / given if given else None,
        "lesion_f1": 2 * found / (2 * found + false + wanted - found) if wanted or given else None,
        "lesion_false_positives": false, "lesions_reference": wanted, "lesions_prediction": given, "lesions_found": found,
    }


def lesion_counts(reference: Lesions, prediction: Lesions, voxel_size: float, unit: str) -> dict[str, LesionCount]:
    """Lesions of one target by size class, each lesion in the class of its own size; classes without any are left out.

    voxel_size: volume of a voxel in `unit` ("ml"), or in a single slice its area ("cm2").
    """
    classes = lesion_classes(unit)
    places = [np.searchsorted(LESION_BORDERS, lesions.voxels * voxel_size, side="right") for lesions in (reference, prediction)]
    counts = {}
    for number, name in enumerate(classes):
        true, given = (place == number for place in places)
        if true.any() or given.any():
            counts[name] = LesionCount(
                reference=int(true.sum()), found=int(reference.met[true].sum()),
                prediction=int(given.sum()), false=int((~prediction.met[given]).sum()))
    return counts
