"""From the members' logits to one decision on the stored grid, with what is asked for beside it, in one pass over the planes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from autoseg.arrays.crop import box_slices
from autoseg.arrays.restore import LogitSource, Regions, WholeLogits, restore_ensemble, restore_planes
from autoseg.arrays.tiles import gather
from autoseg.arrays.uncertainty import EntropyOfMean, Shared, restore_maps, uncertainty_of_mean
from autoseg.inference.gauge import Gauge, Gauged
from autoseg.inference.records import Decided, Wishes
from autoseg.types.case import Placement

Pairs = Sequence[tuple[LogitSource, Placement]]


@dataclass(frozen=True)
class Rules:
    """How members are decided together: their weights and temperatures, and the index that each region writes.

    `half` rounds logits to float16 first. `raw` says that the probabilities that decide are wanted, for post-processing.
    """

    classes: int
    regions: Regions
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    half: bool = False
    raw: bool = False


def settle(logits: Sequence[LogitSource], placements: Sequence[Placement], rules: Rules, wishes: Wishes) -> Decided:
    """Bring the members' logits to the stored grid, average where there are several, decide.

    With uncertainty or judgement wished for, they must have been made with uncertainty.
    """
    sources, gauged = list(logits), []
    if wishes.gauged:
        gauged = [
            Gauged(source, Gauge(
                rules.classes, placement.shape, rules.regions is not None, temperature, wishes.judged, wishes.uncertainty))
            for source, placement, temperature in zip(logits, placements, rules.temperatures, strict=True)
        ]
        sources = list(gauged)
    tempered = wishes.probabilities and set(rules.temperatures) != {1.0}
    twice = tempered and rules.raw
    if twice:  # rare: probabilities with and without temperatures
        sources = [WholeLogits(gather(source)) for source in sources]
    pairs = list(zip(sources, placements, strict=True))
    dense = wishes.probabilities or rules.raw
    degrees = rules.temperatures if tempered and not rules.raw else None
    entropy = None
    if wishes.uncertainty and len(pairs) > 1:
        inside, probable, entropy = _with_entropy(pairs, rules, dense, degrees)
    else:
        inside, probable = restore_ensemble(pairs, rules.regions, dense, rules.weights, rules.half, degrees)
    told = probable if wishes.probabilities else None
    if twice:
        told = restore_ensemble(pairs, rules.regions, True, rules.weights, False, rules.temperatures)[1]
    gauges = tuple(one.finish() for one in gauged)
    maps = _maps(gauges, placements, entropy, rules.weights) if wishes.uncertainty else None
    return Decided(inside, probable if rules.raw else None, told, maps, gauges, placements[0].stored.spacing, {})


def _with_entropy(
    pairs: Pairs, rules: Rules, dense: bool, temperatures: Sequence[float] | None
) -> tuple[NDArray[np.integer], NDArray[np.float32] | None, torch.Tensor]:
    """Labels and probabilities as `restore_ensemble`, and the entropy of the mean probabilities on the grid of the first member.

    Both are made side by side, so that the members' planes are needed only once.
    """
    shared = [Shared(source, 2) for source, _ in pairs]
    placements = [placement for _, placement in pairs]
    mean = EntropyOfMean(
        [(one.reader(1), placement) for one, placement in zip(shared, placements, strict=True)],
        rules.temperatures, rules.weights, rules.regions,
    )
    readers = [(one.reader(0), placement) for one, placement in zip(shared, placements, strict=True)]
    placement, depth = placements[0], placements[0].cropped_shape[0]
    label: NDArray[np.integer] | None = None
    probable: NDArray[np.float32] | None = None
    for z, label_yx, probability_cyx in restore_planes(
        readers, rules.regions, dense, rules.weights, rules.half, temperatures
    ):
        if label is None:
            label = np.zeros(placement.stored.shape, label_yx.dtype)
        _on_crop(label, placement)[z] = label_yx
        if probability_cyx is not None:
            if probable is None:
                probable = np.zeros((rules.classes, *placement.stored.shape), np.float32)
                probable[0] = rules.regions is None  # outside the crop background is certain
            _on_crop(probable, placement)[:, z] = probability_cyx
        mean.go_to((z + 1) / depth)
    assert label is not None
    return label, probable, mean.map


def _on_crop(array: NDArray[np.generic], placement: Placement) -> NDArray[np.generic]:
    """The view of an array on the stored grid (leading axes allowed) that is the transposed, cropped grid."""
    lead = array.ndim - 3
    turned = placement.axis_map.apply(array).transpose(*range(lead), *(lead + axis for axis in placement.transpose))
    view: NDArray[np.generic] = turned[(..., *box_slices(placement.crop_zyx))]
    return view


def _maps(
    gauges: Sequence[Gauge], placements: Sequence[Placement], entropy: torch.Tensor | None, weights: Sequence[float]
) -> NDArray[np.float32]:
    """The uncertainty maps on the stored grid."""
    singles = []
    for gauge, placement in zip(gauges, placements, strict=True):
        assert gauge.entropy_zyx is not None
        singles.append((gauge.entropy_zyx, gauge.maps[2], placement))
    if entropy is None:
        return restore_maps(torch.stack(singles[0][:2]), placements[0])
    return uncertainty_of_mean(entropy, singles, weights)
