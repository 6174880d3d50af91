"""How unsure a prediction is, voxel by voxel, in bits: entropy, and how far folds and mirrored copies disagree.

Passes (one network on one mirrored copy) are combined by averaging logits l. With the log-partition A (log-sum-exp for softmax,
the sum of softplus for independent sigmoids), the mean Kullback-Leibler divergence from the combined answer to the passes is
mean A(l_i) - A(mean l): never negative, and kept in one channel however many classes there are. It is the reverse form of
mutual information (Malinin and Gales 2021) for a geometric mean. It is the sum of what mirrored copies of one network disagree
on, averaged over networks, and what the networks disagree on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.arrays.crop import box_slices
from autoseg.arrays.resample import Taps, linear_taps, separate_axis
from autoseg.arrays.restore import Regions, restore_ensemble
from autoseg.types.case import Placement
from autoseg.types.geometry import AxisMap, Grid

MAPS = ("member_entropy", "mirror_disagreement", "disagreement")
"""Channels that follow the logits, bits: the mean entropy of single networks, the mean disagreement of their mirrored copies,
and the disagreement of all passes. Only the last is taken after division by the temperature."""

_BITS = 1 / math.log(2)
_IDENTITY = AxisMap((0, 1, 2), (False, False, False))


def log_partition(logits: Tensor, regions: bool, axis: int = 1) -> Tensor:
    """The log-partition of logits along the class `axis`, nats; it loses that axis."""
    return torch.nn.functional.softplus(logits).sum(axis) if regions else torch.logsumexp(logits, axis)


def entropy_bits(logits: Tensor, regions: bool, axis: int = 1) -> Tensor:
    """Entropy of softmax(logits), or the sum of the entropies of sigmoids, in bits; the class `axis` is lost.

    1 bit is a tie between two answers.
    """
    probable = torch.sigmoid(logits) if regions else torch.softmax(logits, axis)
    nats = log_partition(logits, regions, axis) - (probable * logits).sum(axis)
    return (nats * _BITS).clamp_min(0)


def entropy_of(probabilities: Tensor, regions: bool, axis: int = 0) -> Tensor:
    """Entropy of probabilities in bits, as `entropy_bits`."""
    total: Tensor = torch.special.entr(probabilities).sum(axis)
    if regions:
        total += torch.special.entr(1 - probabilities).sum(axis)
    return total * _BITS


class PassStatistics:
    """Gathers what `MAPS` need of each pass over a batch of tiles (tile, classes, ...)."""

    def __init__(self, temperature: float, regions: bool) -> None:
        self.temperature, self.regions = temperature, regions
        self._passes = self._tempered = self._networks = self._entropy = torch.zeros(())  # sums; all but the last log-partitions
        self._pass_count = self._network_count = 0

    def add_pass(self, logits: Tensor) -> None:
        """One network's answer to one mirrored copy."""
        self._passes = self._passes + log_partition(logits, self.regions)
        if self.temperature != 1:
            self._tempered = self._tempered + log_partition(logits / self.temperature, self.regions)
        self._pass_count += 1

    def add_network(self, mean_logits: Tensor) -> None:
        """One network's mean over its mirrored copies."""
        self._networks = self._networks + log_partition(mean_logits, self.regions)
        self._entropy = self._entropy + entropy_bits(mean_logits, self.regions)
        self._network_count += 1

    def maps(self, mean_logits: Tensor) -> Tensor:
        """The channels `MAPS`, (tile, 3, ...), given the mean over all passes."""
        passes, networks = self._passes / self._pass_count, self._networks / self._network_count
        tempered = passes if self.temperature == 1 else self._tempered / self._pass_count
        whole = log_partition(mean_logits / self.temperature, self.regions)
        mirrors, every = ((passes - networks) * _BITS).clamp_min(0), ((tempered - whole) * _BITS).clamp_min(0)
        return torch.stack([self._entropy / self._network_count, mirrors, every], 1)


def entropy_map(logits_czyx: Tensor, temperature: float, regions: bool) -> Tensor:
    """Entropy (z, y, x) in bits of whole logits, plane by plane."""
    planes = [entropy_bits(logits_czyx[:, z].float() / temperature, regions, 0) for z in range(logits_czyx.shape[1])]
    return torch.stack(planes)


def restore_maps(maps_kzyx: Tensor, placement: Placement) -> NDArray[np.float32]:
    """Maps (k, *placement.shape) interpolated to the stored grid as logits are, float32 (k, z, y, x); 0 outside the crop."""
    coarse = separate_axis(placement.spacing_zyx_mm, placement.cropped_spacing_zyx_mm)
    size = placement.cropped_shape
    taps = [linear_taps(o, n, axis == coarse) for axis, (o, n) in enumerate(zip(placement.shape, size, strict=True))]
    found = np.zeros((len(maps_kzyx), *placement.stored.shape), np.float32)
    lead = (0, *(1 + axis for axis in placement.transpose))
    view = placement.axis_map.apply(found).transpose(lead)[(slice(None), *box_slices(placement.crop_zyx))]
    for target, source in zip(view, maps_kzyx, strict=True):
        for z in range(size[0]):  # one output plane at a time
            low, high, weight = int(taps[0].low[z]), int(taps[0].high[z]), float(taps[0].weight[z])
            plane = torch.lerp(source[low], source[high], weight) if weight else source[low]
            target[z] = _along(_along(plane, taps[1], 0), taps[2], 1).cpu().numpy()
    return found


def _along(plane: Tensor, taps: Taps, axis: int) -> Tensor:
    low, high = (torch.as_tensor(index, device=plane.device) for index in (taps.low, taps.high))
    if not taps.weight.any():
        return plane.index_select(axis, low)
    weight = torch.as_tensor(taps.weight.astype(np.float32), device=plane.device)
    weight = weight[:, None] if axis == 0 else weight
    return torch.lerp(plane.index_select(axis, low), plane.index_select(axis, high), weight)


@torch.no_grad()
def uncertainty_maps(
    members: Sequence[tuple[Tensor, Tensor, Placement]], temperatures: Sequence[float], weights: Sequence[float],
    region_values: Regions = None,
) -> NDArray[np.float32]:
    """Entropy and disagreement of a prediction on the stored grid, bits, float32 (2, z, y, x).

    Each member is logits (C, *placement.shape), maps (3, *placement.shape) and its placement. Of several members the entropy is
    that of their weighted mean probabilities; to the mean of their own disagreements comes their mutual information.
    """
    regions = region_values is not None
    logits, maps, first = members[0]
    if len(members) == 1:
        both = torch.stack([entropy_map(logits, temperatures[0], regions), maps[2]])
        return restore_maps(both, first)
    shares = [weight / sum(weights) for weight in weights]
    grids = [_onto(first, placement) for _, _, placement in members]
    scaled = [(one / t, grid) for (one, _, _), t, grid in zip(members, temperatures, grids, strict=True)]
    probable = restore_ensemble(scaled, region_values, True, shares)[1]
    assert probable is not None
    entropy = torch.stack([entropy_of(torch.from_numpy(probable[:, z]), regions) for z in range(probable.shape[1])])
    single = disagreement = torch.zeros(())
    for (one, own, _), temperature, grid, share in zip(members, temperatures, grids, shares, strict=True):
        pair = torch.stack([entropy_map(one, temperature, regions), own[2]])
        unsure, apart = torch.from_numpy(restore_maps(pair, grid))
        single, disagreement = single + share * unsure, disagreement + share * apart
    return restore_maps(torch.stack([entropy, disagreement + (entropy - single).clamp_min_(0)]), first)


def _onto(target: Placement, source: Placement) -> Placement:
    """The placement of `source` in an image that is the preprocessed array of `target`."""
    z, y, x = target.shape
    return Placement(
        stored=Grid(shape=target.shape, spacing=target.spacing_zyx_mm, has_direction=False), axis_map=_IDENTITY,
        transpose=(0, 1, 2), crop_zyx=((0, z), (0, y), (0, x)), cropped_spacing_zyx_mm=target.spacing_zyx_mm,
        shape=source.shape, spacing_zyx_mm=source.spacing_zyx_mm,
    )
