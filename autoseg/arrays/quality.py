"""How good a mask without a reference is likely to be: features of the prediction, and a regression on cross-validation.

Every feature means the same for one network (cross-validation) and for several (prediction): entropy is that of single networks,
disagreement that between mirrored copies of one network, both as the networks say, without a temperature. Two differ: the mask,
and the probabilities behind `expected_dice`, are those of all networks together, as is the better Dice that they reach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, special, stats
from torch import Tensor

from autoseg.arrays.components import CONNECTIVITY, bounding_box
from autoseg.types.trust import QualityModel

Floats = NDArray[np.float64]
Features = dict[str, float]

FEATURES = (
    "expected_dice", "entropy_inside", "entropy_boundary", "disagreement_boundary", "log_volume", "log_components", "missing",
)
DEVIATION = "volume_deviation"  # how far the log volume is from the training cases' median
MIN_CASES = 20  # fewer give no estimate
LEVEL = 0.9  # of the interval
PENALTIES = (1.0, 10.0, 100.0, 300.0)
DICE_RANGE = (0.01, 0.999)  # beyond it a logit says nothing
_FLOORS = {"entropy": 1e-3, "disagreement": 1e-4}  # bits below which logarithms are not told apart


@torch.no_grad()
def beliefs(logits_czyx: Tensor, regions: bool) -> tuple[NDArray[np.integer], Floats, Floats]:
    """What whole logits say: the decision, and for each output the sum of its probabilities over all voxels and over its own.

    The decision is the class of each voxel (z, y, x), or for regions whether it is in each (1) or not (0), (R, z, y, x).
    """
    count, depth = logits_czyx.shape[:2]
    everywhere, own = np.zeros(count), np.zeros(count)
    decided: list[NDArray[np.integer]] = []
    for z in range(depth):
        plane = logits_czyx[:, z].float()
        if regions:
            probable, inside = torch.sigmoid(plane), plane > 0
            decided.append(inside.to(torch.uint8).cpu().numpy())
        else:
            probable, winner = torch.softmax(plane, 0), plane.argmax(0)
            inside = winner[None] == torch.arange(count, device=plane.device)[:, None, None]
            decided.append(winner.cpu().numpy().astype(np.uint8 if count < 256 else np.int16))
        everywhere += probable.sum((1, 2), dtype=torch.float64).cpu().numpy()
        own += (probable * inside).sum((1, 2), dtype=torch.float64).cpu().numpy()
    return np.stack(decided, 1 if regions else 0), everywhere, own


def target_features(
    mask_zyx: NDArray[np.bool_], entropy_zyx: NDArray[np.floating], disagreement_zyx: NDArray[np.floating],
    probability: tuple[float, float], voxel_ml: float, flat: bool = False,
) -> Features | None:
    """Features of one structure; None where its mask is empty.

    probability: sums of the structure's probability over all voxels and over the mask; their `expected_dice` is the Dice if
    probabilities were frequencies. flat: the boundary's band, a voxel on each side, lies in-plane only.
    """
    import cc3d

    box = bounding_box(mask_zyx)
    if box is None:
        return None
    around = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in box)
    mask = np.ascontiguousarray(mask_zyx[around])
    structure = np.ones((1, 3, 3) if flat else (3, 3, 3), bool)
    band = ndimage.binary_dilation(mask, structure) & ~ndimage.binary_erosion(mask, structure, border_value=1)
    entropy, disagreement = entropy_zyx[around], disagreement_zyx[around]
    edge = band if band.any() else mask
    voxels = int(mask.sum())
    everywhere, own = probability
    _, components = cc3d.connected_components(mask.view(np.uint8), connectivity=CONNECTIVITY, return_N=True)
    return {
        "expected_dice": logit(2 * own / (voxels + everywhere)),
        "entropy_inside": math.log(float(entropy[mask].mean()) + _FLOORS["entropy"]),
        "entropy_boundary": math.log(float(entropy[edge].mean()) + _FLOORS["entropy"]),
        "disagreement_boundary": math.log(float(disagreement[edge].mean()) + _FLOORS["disagreement"]),
        "log_volume": math.log(voxels * voxel_ml),
        "log_components": math.log(components),
        "missing": 0.0,
    }


def mean_features(targets: Mapping[str, Features | None]) -> Features | None:
    """The means over the structures that were found, and the share that was not; None where nothing was found."""
    found = [features for features in targets.values() if features is not None]
    if not found:
        return None
    means = {name: float(np.mean([one[name] for one in found])) for name in FEATURES}
    return {**means, "missing": 1 - len(found) / len(targets)}


def mean_entropy(targets: Mapping[str, Features | None]) -> float | None:
    """The mean over the structures that were found of their voxels' mean entropy, bits."""
    found = [math.exp(one["entropy_inside"]) - _FLOORS["entropy"] for one in targets.values() if one is not None]
    return max(0.0, float(np.mean(found))) if found else None


def weighted(features: Sequence[Features | None], weights: Sequence[float]) -> Features | None:
    """The weighted mean over the members of an ensemble that found the structure."""
    found = [(one, weight) for one, weight in zip(features, weights, strict=True) if one is not None]
    total = sum(weight for _, weight in found)
    return {name: sum(one[name] * weight for one, weight in found) / total for name in FEATURES} if found else None


def logit(dice: float) -> float:
    """The logit of a Dice, which is first kept within `DICE_RANGE`."""
    return float(special.logit(min(max(dice, DICE_RANGE[0]), DICE_RANGE[1])))


def fit_quality(features: Sequence[Features | None], dice: Sequence[float | None], parts: Sequence[int]) -> QualityModel | None:
    """Regress the logit of the Dice on the features; entries of cases in which either is undefined are left out.

    parts: which part (fold) each case is in; every part is predicted by a regression on the others, whose strength of
    regularisation was chosen without it too. None with fewer than `MIN_CASES` cases or three parts.
    """
    known = [(f, d, p) for f, d, p in zip(features, dice, parts, strict=True) if f is not None and d is not None]
    if len(known) < MIN_CASES or len({part for _, _, part in known}) < 3:
        return None
    rows = np.array([[f[name] for name in FEATURES] for f, _, _ in known])
    true = np.array([d for _, d, _ in known])
    part = np.array([p for _, _, p in known])
    target = special.logit(np.clip(true, *DICE_RANGE))
    held, plain = np.empty(len(rows)), np.empty(len(rows))
    for number in np.unique(part):
        out, rest = part == number, part != number
        held[out] = _Ridge.fit(rows[rest], target[rest], _best_penalty(rows[rest], target[rest], part[rest])).predict(rows[out])
        plain[out] = true[rest].mean()
    residuals = target - held
    estimate = special.expit(held)
    penalty = _best_penalty(rows, target, part)
    model = _Ridge.fit(rows, target, penalty)
    low, high = _interval(residuals)
    inside = np.concatenate([_covered(residuals[part == number], residuals[part != number]) for number in np.unique(part)])
    varied = np.ptp(true) > 0 and np.ptp(estimate) > 0
    return QualityModel(
        features=(*FEATURES, DEVIATION), centres=tuple(model.centres), scales=tuple(model.scales), weights=tuple(model.weights),
        intercept=model.intercept, volume_centre=model.volume_centre, penalty=penalty, low=low, high=high, level=LEVEL,
        cases=len(rows), spearman=float(stats.spearmanr(estimate, true).statistic) if varied else None,
        error=float(np.abs(estimate - true).mean()), plain_error=float(np.abs(plain - true).mean()),
        coverage=float(inside.mean()),
    )


def estimate_quality(model: QualityModel, features: Features) -> tuple[float, float, float]:
    """The likely Dice of a prediction, and the bounds of the interval."""
    row = np.array([[features[name] for name in FEATURES]])
    ridge = _Ridge(np.array(model.centres), np.array(model.scales), np.array(model.weights), model.intercept, model.volume_centre)
    middle = float(ridge.predict(row)[0])
    value, low, high = (float(special.expit(middle + shift)) for shift in (0.0, model.low, model.high))
    return value, low, high


class _Ridge:
    """A ridge regression on standardised features and the deviation of the volume."""

    def __init__(self, centres: Floats, scales: Floats, weights: Floats, intercept: float, volume_centre: float) -> None:
        self.centres, self.scales, self.weights = centres, scales, weights
        self.intercept, self.volume_centre = intercept, volume_centre

    @classmethod
    def fit(cls, rows: Floats, target: Floats, penalty: float) -> _Ridge:
        volume_centre = float(np.median(rows[:, FEATURES.index("log_volume")]))
        columns = _columns(rows, volume_centre)
        centres, scales = columns.mean(0), columns.std(0)
        scales[scales < 1e-9] = 1.0
        design = (columns - centres) / scales
        middle = float(target.mean())
        normal = design.T @ design + penalty * np.eye(design.shape[1])
        return cls(centres, scales, np.linalg.solve(normal, design.T @ (target - middle)), middle, volume_centre)

    def predict(self, rows: Floats) -> Floats:
        """Logits of Dice; features are kept within four standard deviations, beyond which a line says nothing."""
        design = np.clip((_columns(rows, self.volume_centre) - self.centres) / self.scales, -4, 4)
        result: Floats = design @ self.weights + self.intercept
        return result


def _columns(rows: Floats, volume_centre: float) -> Floats:
    return np.column_stack([rows, np.abs(rows[:, FEATURES.index("log_volume")] - volume_centre)])


def _best_penalty(rows: Floats, target: Floats, part: NDArray[np.intp]) -> float:
    """The penalty with the smallest absolute error when each part is predicted from the others; the strongest without parts."""
    numbers = np.unique(part)
    if len(numbers) < 2:
        return PENALTIES[-1]
    errors = []
    for penalty in PENALTIES:
        misses = [
            np.abs(_Ridge.fit(rows[part != n], target[part != n], penalty).predict(rows[part == n]) - target[part == n])
            for n in numbers
        ]
        errors.append(float(np.concatenate(misses).mean()))
    return PENALTIES[int(np.argmin(errors))]


def _interval(residuals: Floats) -> tuple[float, float]:
    """Quantiles of held-back residuals that hold `LEVEL` of new ones, widened for their number (split conformal)."""
    rising, count = np.sort(residuals), len(residuals)
    tail = max(0, math.floor((count + 1) * (1 - LEVEL) / 2) - 1)
    return float(rising[tail]), float(rising[count - 1 - tail])


def _covered(residuals: Floats, others: Floats) -> NDArray[np.bool_]:
    low, high = _interval(others)
    covered: NDArray[np.bool_] = (residuals >= low) & (residuals <= high)
    return covered
