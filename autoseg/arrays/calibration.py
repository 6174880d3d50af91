"""Calibration: one temperature for logits, and how well probabilities agree with what is true.

A temperature divides all logits; it changes neither the most probable class nor the side of 0.5 (Guo et al. 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize, special

from autoseg.arrays.components import bounding_box
from autoseg.types.trust import Calibration, CalibrationScore, ReliabilityBin

Floats = NDArray[np.float64]
BINS = 15  # of equal width (Guo et al. 2017)
TEMPERATURES = (0.1, 20.0)
BAND = 2  # voxels on each side of a boundary
SHARES = (0.5, 0.25, 0.25)  # of a case's sample: at a boundary, inside a structure, elsewhere


@dataclass(frozen=True)
class VoxelSample:
    """Voxels that stand for whole images.

    logits: (n, classes) float. truth: (n,) class numbers, or (n, regions) 0 and 1 for sigmoid outputs. weights: (n,), how many
    voxels each stands for. near: (n,), whether it lies at a boundary or inside of what was predicted; to judge calibration on
    voxels that are chosen by what is true would be circular.
    """

    logits: NDArray[np.floating]
    truth: NDArray[np.integer]
    weights: NDArray[np.floating]
    near: NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence[VoxelSample]) -> VoxelSample:
        """Several samples as one."""
        return cls(
            np.concatenate([p.logits for p in parts]), np.concatenate([p.truth for p in parts]),
            np.concatenate([p.weights for p in parts]), np.concatenate([p.near for p in parts]),
        )

    def only(self, keep: NDArray[np.bool_]) -> VoxelSample:
        """The voxels where `keep`."""
        return VoxelSample(self.logits[keep], self.truth[keep], self.weights[keep], self.near[keep])

    @property
    def regions(self) -> bool:
        """Whether outputs are sigmoids."""
        return self.truth.ndim == 2


def strata(truth_zyx: NDArray[np.integer], found_zyx: NDArray[np.integer], ignore: int | None = None) -> NDArray[np.uint8]:
    """Where each voxel belongs: 1 at a boundary of truth or prediction, 2 inside a structure of either, 3 elsewhere; 0 ignored.

    A boundary's band is `BAND` voxels wide on each side. Negative labels count as background.
    """
    known = np.ones(truth_zyx.shape, bool) if ignore is None else truth_zyx != ignore
    truth = np.maximum(np.where(known, truth_zyx, 0), 0)
    kind = np.where(known, 3, 0).astype(np.uint8)
    box = bounding_box((truth > 0) | (found_zyx > 0))
    if box is None:
        return kind
    box = tuple(slice(max(0, s.start - BAND), s.stop + BAND) for s in box)
    edge, inside = np.zeros(kind[box].shape, bool), np.zeros(kind[box].shape, bool)
    for label in (truth[box], found_zyx[box]):
        edge |= ndimage.maximum_filter(label, 3, mode="nearest") != ndimage.minimum_filter(label, 3, mode="nearest")
        inside |= label > 0
    edge = ndimage.binary_dilation(edge, np.ones((3, 3, 3), bool), BAND - 1) if BAND > 1 else edge
    kind[box] = np.where(known[box], np.where(edge, 1, np.where(inside, 2, 3)), 0)
    return kind


def draw(kind_zyx: NDArray[np.uint8], count: int, rng: np.random.Generator) -> tuple[NDArray[np.intp], Floats]:
    """Flat positions of at most `count` voxels, drawn by stratum, and how many voxels each stands for.

    Each stratum gets its share of what is left, the smallest first, so that what it cannot use goes to the others.
    """
    flat = kind_zyx.reshape(-1)
    found = sorted(((np.flatnonzero(flat == number), share) for number, share in enumerate(SHARES, 1)), key=lambda f: len(f[0]))
    places, weights, left = [np.empty(0, np.intp)], [np.empty(0)], count
    for index, (where, share) in enumerate(found):
        wanted = min(len(where), round(left * share / sum(s for _, s in found[index:])))
        if wanted:
            places.append(np.sort(rng.choice(where, wanted, replace=False)))
            weights.append(np.full(wanted, len(where) / wanted))
            left -= wanted
    return np.concatenate(places), np.concatenate(weights)


def nll(sample: VoxelSample, temperature: float) -> float:
    """Weighted mean negative log-likelihood per voxel, nats; of several regions the sum."""
    logits = sample.logits.astype(np.float64) / temperature
    if sample.regions:
        losses = (np.logaddexp(0, logits) - sample.truth * logits).sum(1)
    else:
        losses = special.logsumexp(logits, axis=1) - np.take_along_axis(logits, sample.truth[:, None].astype(np.intp), 1)[:, 0]
    return float(np.average(losses, weights=sample.weights))


def fit_temperature(sample: VoxelSample) -> float:
    """The temperature with the smallest negative log-likelihood; 1 for an empty sample.

    The loss is convex in 1 / T, so the minimum is unique; it is kept within `TEMPERATURES`.
    """
    if not len(sample.weights):
        return 1.0
    low, high = (1 / t for t in reversed(TEMPERATURES))
    found = optimize.minimize_scalar(
        lambda x: nll(sample, float(np.exp(-x))), bounds=(np.log(low), np.log(high)), method="bounded", options={"xatol": 1e-4}
    )
    return float(np.exp(-found.x))


def score(sample: VoxelSample, temperatures: float | Floats) -> CalibrationScore:
    """Calibration of a sample after division by one temperature, or by one for each voxel.

    Confidence is the probability of the most probable class; each region counts as a decision between yes and no. Expected
    calibration error: the mean over voxels of |accuracy - confidence| of their bin, `BINS` bins of equal width.
    """
    divisor = np.broadcast_to(np.asarray(temperatures, np.float64), sample.weights.shape)[:, None]
    scaled = VoxelSample(sample.logits.astype(np.float64) / divisor, sample.truth, sample.weights, sample.near)
    if sample.regions:
        yes = special.expit(scaled.logits)
        confidence = np.maximum(yes, 1 - yes).reshape(-1)
        right = ((yes > 0.5) == (sample.truth > 0)).reshape(-1)
        weights = np.repeat(sample.weights, yes.shape[1])
        squares = ((yes - sample.truth) ** 2).sum(1)
    else:
        probable = special.softmax(scaled.logits, 1)
        confidence, right, weights = probable.max(1), probable.argmax(1) == sample.truth, sample.weights
        true = np.take_along_axis(probable, sample.truth[:, None].astype(np.intp), 1)[:, 0]
        squares = (probable**2).sum(1) - 2 * true + 1
    table = _reliability(confidence, right, np.asarray(weights, np.float64))
    return CalibrationScore(
        ece=sum(b.share * abs(b.accuracy - b.confidence) for b in table), nll=nll(scaled, 1.0),
        brier=float(np.average(squares, weights=sample.weights)), reliability=table,
    )


def _reliability(confidence: Floats, right: NDArray[np.bool_], weights: Floats) -> tuple[ReliabilityBin, ...]:
    """The bins that hold voxels."""
    place = np.clip(np.ceil(confidence * BINS).astype(np.intp) - 1, 0, BINS - 1)
    total = np.bincount(place, weights, BINS)
    sums = np.bincount(place, weights * confidence, BINS), np.bincount(place, weights * right, BINS)
    return tuple(
        ReliabilityBin(
            low=i / BINS, high=(i + 1) / BINS, share=float(total[i] / total.sum()), confidence=float(sums[0][i] / total[i]),
            accuracy=float(sums[1][i] / total[i]),
        )
        for i in np.flatnonzero(total)
    )


def calibrate_sample(
    samples: Sequence[VoxelSample], parts: Sequence[int], kind: Literal["folds", "patients", "none"],
) -> Calibration:
    """The temperature of all cases' near voxels, and scores of each part with the temperature that was fitted without it.

    samples, parts: one entry per case. With a single part there are no scores. It is fitted where probabilities decide something:
    certain background is most of an image, and would outvote boundaries. Where nothing is near, all voxels count.
    """
    sizes = [len(s.weights) for s in samples]
    whole = VoxelSample.joined(samples)
    near, some = whole.near, bool(whole.near.any())
    fitted = near if some else np.ones(len(near), bool)
    temperature = fit_temperature(whole.only(fitted))
    numbers = sorted(set(parts))
    plain = Calibration(temperature=temperature, voxels=sum(sizes), cases=len(samples))
    if len(numbers) < 2:
        return plain
    of_voxel = np.repeat(np.asarray(parts), sizes)
    held = {part: fit_temperature(whole.only(fitted & (of_voxel != part))) for part in numbers}
    each = np.repeat([held[part] for part in parts], sizes)
    return plain.model_copy(update={
        "parts": kind, "part_temperatures": held,
        "near_before": score(whole.only(near), 1.0) if some else None,
        "near_after": score(whole.only(near), each[near]) if some else None,
        "whole_before": score(whole, 1.0), "whole_after": score(whole, each),
    })
