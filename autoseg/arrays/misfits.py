"""Why a single mask fails altogether: empty, stored the wrong way round, moved, or with its labels exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]

GAIN = 0.3  # Dice that a change must bring to be called the reason
GOOD = 0.5  # and the Dice that it must reach
AXES = ("z", "y", "x")


def explain_misfit(reference_zyx: Ints, prediction_zyx: Ints, values: Sequence[int]) -> str:
    """One sentence on what makes a prediction fit its reference, or that it is empty; "" where nothing simple does.

    Both are integer label maps (z, y, x) of one shape; `values` are the foreground values. Tried are flips along one or two
    axes, the shift that brings the foregrounds' centres together, and exchanging labels.
    """
    if not np.isin(prediction_zyx, values).any():
        return "the prediction is empty"
    before = _dice(reference_zyx, prediction_zyx, values)
    tried = {
        **{f"the prediction is flipped along {' and '.join(AXES[a] for a in axes)}": np.flip(prediction_zyx, axes)
           for count in (1, 2) for axes in combinations(range(3), count)},
        **_shifted(reference_zyx, prediction_zyx, values), **_renamed(reference_zyx, prediction_zyx, values),
    }
    best, told = max(((_dice(reference_zyx, mask, values), told) for told, mask in tried.items()), default=(0.0, ""))
    if best < max(before + GAIN, GOOD):
        return ""
    return f"{told}: undone, its Dice rises from {before:.2f} to {best:.2f}; the image or the label of this case is likely wrong"


def _dice(reference: Ints, prediction: Ints, values: Sequence[int]) -> float:
    """Mean Dice of the labels that either holds."""
    scores = []
    for value in values:
        a, b = reference == value, prediction == value
        whole = int(a.sum()) + int(b.sum())
        if whole:
            scores.append(2 * int((a & b).sum()) / whole)
    return float(np.mean(scores)) if scores else 0.0


def _shifted(reference: Ints, prediction: Ints, values: Sequence[int]) -> dict[str, Ints]:
    masks = [np.isin(array, values) for array in (reference, prediction)]
    if not masks[0].any():
        return {}
    centres = [np.array([np.average(np.arange(n), weights=mask.sum(axis=tuple(b for b in range(3) if b != a)))
                         for a, n in enumerate(mask.shape)]) for mask in masks]
    move = np.round(centres[0] - centres[1]).astype(int)
    if not move.any():
        return {}
    told = ", ".join(f"{-m} along {axis}" for m, axis in zip(move, AXES, strict=True) if m)
    return {f"the prediction is moved by about {told} voxels": np.roll(prediction, tuple(move.tolist()), (0, 1, 2))}


def _renamed(reference: Ints, prediction: Ints, values: Sequence[int]) -> dict[str, Ints]:
    """The prediction with the labels exchanged that fits best (the assignment that most voxels agree with)."""
    from scipy.optimize import linear_sum_assignment

    from autoseg.arrays.metrics import confusion_matrix

    if len(values) < 2:
        return {}
    order = np.zeros(max(int(reference.max()), int(prediction.max()), *values) + 1, np.intp)
    order[list(values)] = np.arange(1, len(values) + 1)
    table = confusion_matrix(order[reference], order[prediction], len(values) + 1)[1:, 1:]
    rows, columns = (found.tolist() for found in linear_sum_assignment(table, maximize=True))
    if rows == columns:
        return {}
    renamed = prediction.copy()
    for row, column in zip(rows, columns, strict=True):
        renamed[prediction == values[column]] = values[row]
    told = ", ".join(f"{values[c]} stands for {values[r]}" for r, c in zip(rows, columns, strict=True) if r != c and table[r, c])
    return {f"labels are exchanged ({told})": renamed}
