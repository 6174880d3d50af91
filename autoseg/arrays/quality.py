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
CaseFeatures = Mapping[str, Features | None]  # by structure, None for one that was not found

FEATURES = (
    "expected_dice", "entropy_inside", "entropy_boundary", "disagreement_boundary", "log_volume", "log_components",
    "log_elongation",
)
MISSING = "missing"  # the share of structures that were not found
VOLUME = "log_volume"  # of its columns the distance from the mean is a feature too
CASES_PER_FEATURE = 10  # with fewer cases, each structure is judged by its own features only
MIN_CASES = 20  # fewer give no estimate
LEVEL = 0.9  # of the interval
PENALTIES = (3.0, 10.0, 30.0, 100.0, 300.0)
DICE_RANGE = (0.01, 0.999)  # beyond it a logit says nothing
_CONSTANT = 1e-9  # standard deviations below it are those of a constant
_FLOORS = {"entropy": 1e-3, "disagreement": 1e-4}  # bits below which logarithms are not told apart


class Beliefs:
    """What logits say, gathered plane by plane.

    `decision` is the class of each voxel (z, y, x), or for regions whether it is in each (1) or not (0), (R, z, y, x).
    `everywhere` and `own` are for each output the sums of its probabilities over all voxels, and over those it was decided for.
    """

    def __init__(self, count: int, shape: Sequence[int], regions: bool) -> None:
        self.regions = regions
        kind = np.uint8 if regions or count < 256 else np.int16
        self.decision: NDArray[np.integer] = np.zeros((count, *shape) if regions else shape, kind)
        self.everywhere, self.own = np.zeros(count), np.zeros(count)

    @torch.no_grad()
    def look(self, z: int, plane_cyx: Tensor) -> None:
        """See plane z of the logits, float32."""
        count = len(plane_cyx)
        if self.regions:
            probable, inside = torch.sigmoid(plane_cyx), plane_cyx > 0
            self.decision[:, z] = inside.cpu().numpy()
            self.own += (probable * inside).sum((1, 2), dtype=torch.float64).cpu().numpy()
        else:
            probable = torch.softmax(plane_cyx, 0)
            best, winner = probable.max(0)
            self.decision[z] = winner.cpu().numpy()
            self.own += np.bincount(winner.cpu().numpy().ravel(), best.double().cpu().numpy().ravel(), count)
        self.everywhere += probable.sum((1, 2), dtype=torch.float64).cpu().numpy()


def target_features(
    mask_zyx: NDArray[np.bool_], entropy_zyx: NDArray[np.floating], disagreement_zyx: NDArray[np.floating],
    probability: tuple[float, float], voxel_ml: float, spacing_zyx_mm: Sequence[float], flat: bool = False,
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
        "log_elongation": _log_elongation(mask, spacing_zyx_mm),
    }


def _log_elongation(mask_zyx: NDArray[np.bool_], spacing_zyx_mm: Sequence[float]) -> float:
    """The logarithm of the ratio of the largest to the smallest variance of a mask's voxels along any direction.

    Each voxel's own extent counts, so that a plane of voxels is not endlessly flat.
    """
    places = np.stack(np.nonzero(mask_zyx)) * np.asarray(spacing_zyx_mm)[:, None]
    own = np.diag(np.asarray(spacing_zyx_mm, np.float64) ** 2 / 12)
    values = np.linalg.eigvalsh(np.cov(places, bias=True).reshape(3, 3) + own)
    return float(np.log(values[-1] / values[0]))


def columns_of(case: CaseFeatures, own: str | None) -> Features | None:
    """Everything an estimate may rest on: the features of the structure `own`, or their means over those found when None, and the
    features of every structure, NaN where it was not found. None where there is nothing to estimate.
    """
    found = [one for one in case.values() if one is not None]
    mine = case.get(own) if own is not None else None
    if own is None and found:
        mine = {name: float(np.mean([one[name] for one in found])) for name in FEATURES}
    if mine is None:
        return None
    columns = {**mine, MISSING: 1 - len(found) / len(case)}
    for target, one in case.items():
        columns |= {f"{target}: {name}": math.nan if one is None else one[name] for name in FEATURES}
    return columns


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


def fit_quality(
    cases: Sequence[CaseFeatures], dice: Sequence[float | None], parts: Sequence[int], own: str | None = None,
) -> QualityModel | None:
    """Regress the logit of the Dice of the structure `own`, or of the foreground mean, on features of the prediction.

    parts: which part (fold) each case is in; every part is predicted by a regression on the others, whose strength of
    regularisation was chosen without it too. The features are those of all structures where there are `CASES_PER_FEATURE` cases
    for each, else the structure's own. Cases without estimate or Dice are left out. None with fewer than `MIN_CASES` cases or
    three parts.
    """
    columns = [columns_of(case, own) for case in cases]
    known = [(c, d, p) for c, d, p in zip(columns, dice, parts, strict=True) if c is not None and d is not None]
    if len(known) < MIN_CASES or len({part for _, _, part in known}) < 3:
        return None
    names = _features(list(cases[0]), len(known))
    data = _Data([c for c, _, _ in known], np.array([d for _, d, _ in known]), np.array([p for _, _, p in known]))
    held, plain = np.empty(len(known)), np.empty(len(known))
    for number in np.unique(data.part):
        out, rest = data.only(data.part == number), data.only(data.part != number)
        held[data.part == number] = _Ridge.fit(rest, names, _penalty(rest, names)).predict(out.columns)
        plain[data.part == number] = rest.dice.mean()
    residuals, estimate = data.target - held, special.expit(held)
    penalty = _penalty(data, names)
    model = _Ridge.fit(data, names, penalty)
    low, high = _interval(residuals)
    inside = [_covered(residuals[data.part == number], residuals[data.part != number]) for number in np.unique(data.part)]
    varied = np.ptp(data.dice) > 0 and np.ptp(estimate) > 0
    return QualityModel(
        features=names, centres=tuple(model.centres), scales=tuple(model.scales), deviations=tuple(model.deviations),
        weights=tuple(model.weights), intercept=model.intercept, penalty=penalty, low=low, high=high, level=LEVEL,
        cases=len(known), spearman=float(stats.spearmanr(estimate, data.dice).statistic) if varied else None,
        error=float(np.abs(estimate - data.dice).mean()), plain_error=float(np.abs(plain - data.dice).mean()),
        coverage=float(np.concatenate(inside).mean()),
    )


def estimate_quality(model: QualityModel, case: CaseFeatures, own: str | None = None) -> tuple[float, float, float] | None:
    """The likely Dice of a prediction, and the bounds of the interval; None where nothing was found."""
    columns = columns_of(case, own)
    if columns is None:
        return None
    centres, scales, deviations, weights = map(np.array, (model.centres, model.scales, model.deviations, model.weights))
    middle = float(_Ridge(model.features, centres, scales, deviations, weights, model.intercept).predict([columns])[0])
    value, low, high = (float(special.expit(middle + shift)) for shift in (0.0, model.low, model.high))
    return value, low, high


def _features(structures: Sequence[str], cases: int) -> tuple[str, ...]:
    """The columns that so many cases allow for."""
    every = (*(f"{structure}: {name}" for structure in structures for name in FEATURES), MISSING)
    return every if len(structures) > 1 and cases >= CASES_PER_FEATURE * len(every) else (*FEATURES, MISSING)


class _Data:
    """Cases to regress on: their columns, Dice, and parts."""

    def __init__(self, columns: Sequence[Features], dice: Floats, part: NDArray[np.intp]) -> None:
        self.columns, self.dice, self.part = columns, dice, part
        self.target: Floats = special.logit(np.clip(dice, *DICE_RANGE))

    def only(self, keep: NDArray[np.bool_]) -> _Data:
        """The cases where `keep`."""
        return _Data([one for one, kept in zip(self.columns, keep, strict=True) if kept], self.dice[keep], self.part[keep])


class _Ridge:
    """A ridge regression on standardised features and the deviations of volumes."""

    def __init__(
        self, names: tuple[str, ...], centres: Floats, scales: Floats, deviations: Floats, weights: Floats, intercept: float,
    ) -> None:
        self.names, self.centres, self.scales, self.deviations = names, centres, scales, deviations
        self.weights, self.intercept = weights, intercept

    @classmethod
    def fit(cls, data: _Data, names: tuple[str, ...], penalty: float) -> _Ridge:
        """Fit the weights of the columns `names`."""
        rows = np.array([[one[name] for name in names] for one in data.columns])
        known = np.maximum(np.isfinite(rows).sum(0), 1)
        centres = np.nansum(rows, 0) / known
        scales = np.sqrt(np.nansum((rows - centres) ** 2, 0) / known)
        scales[scales < _CONSTANT] = 1.0
        middle = float(data.target.mean())
        model = cls(names, centres, scales, np.zeros(sum(VOLUME in name for name in names)), np.zeros(0), middle)
        model.deviations = model._design(data.columns)[:, len(names):].mean(0)
        design = model._design(data.columns)
        normal = design.T @ design + penalty * np.eye(design.shape[1])
        model.weights = np.linalg.solve(normal, design.T @ (data.target - middle)).astype(np.float64)
        return model

    def _design(self, columns: Sequence[Features]) -> Floats:
        """Features in standard deviations, at most four, beyond which a line says nothing; unknown ones are the mean."""
        rows = np.array([[one[name] for name in self.names] for one in columns])
        scaled = np.clip(np.nan_to_num((rows - self.centres) / self.scales), -4, 4)
        volumes = np.abs(scaled[:, [VOLUME in name for name in self.names]])
        design: Floats = np.hstack([scaled, volumes - self.deviations])
        return design

    def predict(self, columns: Sequence[Features]) -> Floats:
        """Logits of Dice."""
        result: Floats = self._design(columns) @ self.weights + self.intercept
        return result


def _penalty(data: _Data, names: tuple[str, ...]) -> float:
    """The penalty with the smallest absolute error when each part is predicted from the others; the strongest without parts."""
    numbers = np.unique(data.part)
    if len(numbers) < 2:
        return PENALTIES[-1]
    pairs = [(data.only(data.part != n), data.only(data.part == n)) for n in numbers]
    errors = []
    for penalty in PENALTIES:
        misses = [np.abs(_Ridge.fit(rest, names, penalty).predict(out.columns) - out.target) for rest, out in pairs]
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
