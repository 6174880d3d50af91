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
from autoseg.arrays.restore import LogitSource, Regions, restore_planes
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


class Shared:
    """Several readers of one source of logits, each of which sees every plane; what all have seen is let go."""

    def __init__(self, source: LogitSource, readers: int) -> None:
        self.source = source
        self._waiting: list[dict[int, Tensor]] = [{} for _ in range(readers)]
        self._next = 0

    def reader(self, number: int) -> LogitSource:
        """The source as one of the readers has it; no other reader is held up."""
        return _Reader(self, number)

    def planes(self, number: int, low: int, high: int) -> Tensor:
        """Planes for one reader."""
        if high > self._next:
            chunk = self.source.planes(self._next, high)
            for waiting in self._waiting:
                waiting.update(zip(range(self._next, high), chunk.unbind(1), strict=True))
            self._next = high
        mine = self._waiting[number]
        for z in [z for z in mine if z < low]:
            del mine[z]
        return torch.stack([mine.pop(z) for z in range(low, high)], 1)


class _Reader:
    def __init__(self, shared: Shared, number: int) -> None:
        self._shared, self._number = shared, number
        self.classes, self.shape, self.device = shared.source.classes, shared.source.shape, shared.source.device

    def planes(self, low: int, high: int) -> Tensor:
        return self._shared.planes(self._number, low, high)


class EntropyOfMean:
    """Entropy of the members' weighted mean probabilities on the grid of the first, bits, made plane by plane."""

    def __init__(
        self, members: Sequence[tuple[LogitSource, Placement]], temperatures: Sequence[float], weights: Sequence[float],
        region_values: Regions,
    ) -> None:
        first = members[0][1]
        onto = [(source, onto_grid(first, placement)) for source, placement in members]
        self._planes = restore_planes(onto, region_values, True, weights, temperatures=temperatures)
        self._regions, self._done = region_values is not None, 0
        self.map = torch.zeros(first.shape)

    def go_to(self, share: float) -> None:
        """Make this share of the planes."""
        while self._done < share * len(self.map):
            probable = next(self._planes).probability_cyx
            assert probable is not None
            self.map[self._done] = entropy_of(torch.from_numpy(probable), self._regions)
            self._done += 1


def uncertainty_of_mean(
    entropy: Tensor, singles: Sequence[tuple[Tensor, Tensor, Placement]], weights: Sequence[float]
) -> NDArray[np.float32]:
    """Entropy and disagreement of an ensemble on the stored grid, bits, float32 (2, z, y, x).

    entropy: that of the weighted mean probabilities, on the grid of the first. singles: each member's own entropy and the
    disagreement of its passes, (z, y, x), and its placement; to their weighted mean disagreement comes the members' mutual
    information.
    """
    first = singles[0][2]
    single = disagreement = torch.zeros(())
    for (unsure, apart, placement), weight in zip(singles, weights, strict=True):
        share = weight / sum(weights)
        both = torch.from_numpy(restore_maps(torch.stack([unsure, apart]), onto_grid(first, placement)))
        single, disagreement = single + share * both[0], disagreement + share * both[1]
    return restore_maps(torch.stack([entropy, disagreement + (entropy - single).clamp_min_(0)]), first)


def onto_grid(target: Placement, source: Placement) -> Placement:
    """The placement of `source` in an image that is the preprocessed array of `target`."""
    z, y, x = target.shape
    return Placement(
        stored=Grid(shape=target.shape, spacing=target.spacing_zyx_mm, has_direction=False), axis_map=_IDENTITY,
        transpose=(0, 1, 2), crop_zyx=((0, z), (0, y), (0, x)), cropped_spacing_zyx_mm=target.spacing_zyx_mm,
        shape=source.shape, spacing_zyx_mm=source.spacing_zyx_mm,
    )
