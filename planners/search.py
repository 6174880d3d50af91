"""The search of the planner `fit`: the largest patch, then the largest batch, whose predicted peak memory stays in a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from autoseg.networks.memory import Precision, recomputed_share, training_memory
from autoseg.planners import rules
from autoseg.types.plan import Configuration
from autoseg.types.record import Spec

GB = 2**30
CONTEXT_GB = 0.5  # of the card, taken by the CUDA context and the libraries' kernels before the first tensor
ALLOCATOR_SHARE = 0.1  # of the budget, left for gaps between the allocator's blocks and for larger convolution workspaces
DATA_SHARE = 0.05  # of the data set's voxels that one batch may hold (nnU-Net)
RECOMPUTE_COVERAGE = 0.25  # recomputing is considered where the patch sees less than this of the median image,
RECOMPUTE_GAIN = 1.5  # must give at least so many times the voxels per patch,
RECOMPUTE_COST = 0.35  # and may add at most this share of multiply-adds per voxel to a training step
RECOMPUTE_STAGES = 3  # the finest ones; deeper ones hold little
SMALLEST_VOXELS = {2: 32**2, 3: 16**3}  # of a patch, unless the images are smaller
PLAUSIBLE = (1.5, 2.5)  # times the voxels expected from memory per voxel that are looked at, without and with recomputing

Limit = Literal["memory", "data", "larger patch", "minimum"]


@dataclass(frozen=True)
class Card:
    """What a training step has to fit: the budget, and what the step depends on beside the configuration."""

    memory_gb: float
    precision: Precision
    network: rules.Network
    channels: int
    outputs: int
    regions: bool
    ignore: bool

    @property
    def usable(self) -> float:
        """Bytes that tensors may take: the budget without the context and the allocator's share."""
        return max((self.memory_gb * (1 - ALLOCATOR_SHARE) - CONTEXT_GB) * GB, 0.0)

    def peak(self, configuration: Configuration) -> int:
        """Predicted peak of a training step in bytes."""
        return training_memory(
            configuration, self.channels, self.outputs, self.precision, regions=self.regions, ignore=self.ignore
        ).total


@dataclass(frozen=True)
class Choice:
    """A sized configuration and its predicted `peak` in bytes.

    `limit` is what keeps the batch from being larger, `data_allows` how many patches the allowed share of the data set comes
    to. Where activations are recomputed, `cost` is the share of multiply-adds this adds, and `plain_patch` the one without.
    """

    configuration: Configuration
    layout: rules.Topology
    peak: int
    fits: bool
    limit: Limit
    data_allows: int
    cost: float = 0.0
    plain_patch: rules.Ints = ()

    @property
    def voxels(self) -> int:
        """Voxels of the patch."""
        return math.prod(self.layout.patch_size)

    @property
    def share(self) -> float:
        """Voxels of the patch against those of the median image."""
        return self.voxels / math.prod(self.configuration.median_shape)


def nested_patches(spacing: rules.Floats, median_shape: rules.Floats) -> Iterator[rules.Topology]:
    """Legal patches from the largest that makes sense to the smallest, none with an edge longer than the one before."""
    layout: rules.Topology | None = rules.topology(spacing, rules.initial_patch(spacing, median_shape))
    last: rules.Ints = ()
    seen: set[rules.Ints] = set()
    while layout is not None and layout.patch_size not in seen:
        seen.add(layout.patch_size)
        if last and math.prod(layout.patch_size) < SMALLEST_VOXELS[len(spacing)]:
            break
        if not last or all(a <= b for a, b in zip(layout.patch_size, last, strict=True)):
            last = layout.patch_size
            yield layout
        layout = rules.smaller(spacing, layout, median_shape)


class Search:
    """Sizes a configuration: `template` gives spacing, median shape and everything that does not depend on size.

    Whether a patch may be reached by recomputing is asked at the smallest budget at which it could be, not at the one at hand:
    so a larger budget never gives a smaller patch.
    """

    def __init__(self, card: Card, template: Configuration) -> None:
        self.card, self.template = card, template
        self._smaller = nested_patches(template.spacing, template.median_shape)
        self.chain = [next(self._smaller)]  # as far as it was looked at
        self.voxels = [math.prod(self.chain[0].patch_size)]
        self._peaks: dict[tuple[int, int, int], int] = {}
        self._per_voxel = self.peak(0) / self.voxels[0]

    @property
    def expected_voxels(self) -> float:
        """About how many voxels a patch of which two fill the budget has."""
        return self.card.usable / self._per_voxel

    def covers(self, voxels: float, share: float) -> bool:
        """Whether the largest patch of which two fit the budget, or else the smallest there is, has that share of `voxels`.

        Looks no further than at patches that are too small.
        """
        index = 0
        while self._reaches(index):
            if self.voxels[index] / voxels < share:
                return False
            if self._within(index, self.card.usable):
                return True
            index += 1
        return True

    def choose(self, dataset_voxels: float, recompute: bool = True) -> Choice:
        """The largest patch of which two fit the budget, then as many as fit and the data set allows."""
        plain = self._first_within(self.card.usable)
        found = self._recomputed(len(self.chain) if plain is None else plain) if recompute else None
        if found is not None:  # what was saved has gone into the patch, so the batch is the smallest
            index, stages = found
            made = self._choice(index, rules.MIN_BATCH, stages, "larger patch", self._allowed(index, dataset_voxels))
            without = () if plain is None else self.chain[plain].patch_size
            return replace(made, cost=self._cost(index, stages), plain_patch=without)
        if plain is None:
            allowed = self._allowed(-1, dataset_voxels)
            return replace(self._choice(-1, rules.MIN_BATCH, 0, "minimum", allowed), fits=False)
        allowed = self._allowed(plain, dataset_voxels)
        batch, limit = self._batch(plain, allowed)
        return self._choice(plain, batch, 0, limit, allowed)

    def _allowed(self, index: int, dataset_voxels: float) -> int:
        """How many patches the allowed share of the data set comes to."""
        return int(DATA_SHARE * dataset_voxels / self.voxels[index])

    def _choice(self, index: int, batch: int, stages: int, limit: Limit, data_allows: int) -> Choice:
        made, peak = self.configuration(index, batch, stages), self.peak(index, batch, stages)
        return Choice(made, self.chain[index], peak, True, limit, data_allows)

    def configuration(self, index: int, batch: int = rules.MIN_BATCH, stages: int = 0) -> Configuration:
        """The template with a patch of the chain, a batch size, and so many finest stages recomputed."""
        layout, network = self.chain[index], self.card.network
        depth, dims = len(layout.strides), len(layout.patch_size)
        return self.template.model_copy(update={
            "patch_size": layout.patch_size, "batch_size": batch, "network": Spec(kind=network), "checkpointing": stages,
            "strides": layout.strides, "kernel_sizes": layout.kernel_sizes,
            "features_per_stage": rules.features_per_stage(depth, dims),
            "blocks_per_stage": rules.blocks_per_stage(network, depth),
            "decoder_blocks_per_stage": rules.decoder_blocks_per_stage(network, depth),
        })

    def peak(self, index: int, batch: int = rules.MIN_BATCH, stages: int = 0) -> int:
        """Predicted peak of a training step in bytes."""
        key = (index, batch, stages)
        if key not in self._peaks:
            self._peaks[key] = self.card.peak(self.configuration(*key))
        return self._peaks[key]

    def _first_within(self, budget: float) -> int | None:
        """The largest patch of which two fit `budget` bytes with nothing recomputed."""
        index = 0
        while self._reaches(index):
            if self._within(index, budget):
                return index
            index += 1
        return None

    def _reaches(self, index: int) -> bool:
        """Whether there are so many patches; the chain is made as it is looked at."""
        while len(self.chain) <= index:
            layout = next(self._smaller, None)
            if layout is None:
                return False
            self.chain.append(layout)
            self.voxels.append(math.prod(layout.patch_size))
        return True

    def _within(self, index: int, budget: float) -> bool:
        return self._plausible(index, budget, PLAUSIBLE[0]) and self.peak(index) <= budget

    def _plausible(self, index: int, budget: float, factor: float) -> bool:
        """Whether the patch is worth a look: memory grows about as its voxels."""
        return self.voxels[index] * self._per_voxel <= factor * budget

    def _recomputed(self, plain: int) -> tuple[int, int] | None:
        """The largest patch above number `plain` that recomputing brings within the budget where it pays, and how many stages."""
        for index in range(plain):
            if not self._plausible(index, self.card.usable, PLAUSIBLE[1]):
                continue
            for stages in range(1, min(RECOMPUTE_STAGES, len(self.chain[index].strides) - 1) + 1):
                if self.peak(index, stages=stages) <= self.card.usable and self._pays(index, stages):
                    return index, stages
        return None

    def _pays(self, index: int, stages: int) -> bool:
        """Whether recomputing gives enough over what would fit the same memory without."""
        plain = self._first_within(self.peak(index, stages=stages))
        if plain is not None:
            enough = self.voxels[plain] / math.prod(self.template.median_shape) >= RECOMPUTE_COVERAGE
            if enough or self.voxels[index] < RECOMPUTE_GAIN * self.voxels[plain]:
                return False
        return self._cost(index, stages) <= RECOMPUTE_COST

    def _cost(self, index: int, stages: int) -> float:
        return recomputed_share(self.configuration(index, stages=stages), self.card.channels, self.card.outputs)

    def _batch(self, index: int, data_allows: int) -> tuple[int, Limit]:
        """How many patches fit the budget, and what keeps them from being more.

        Never more voxels than the smallest batch of the next larger patch, so that a larger budget gives no fewer.
        """
        usable, least = self.card.usable, rules.MIN_BATCH
        larger = least * self.voxels[index - 1] // self.voxels[index] if index else data_allows
        most = max(min(larger, data_allows), least)
        batch, above = least, most + 1
        while above - batch > 1:
            middle = (batch + above) // 2
            batch, above = (middle, above) if self.peak(index, middle) <= usable else (batch, middle)
        if batch < most or self.peak(index, batch + 1) > usable:
            return batch, "memory"
        if data_allows < least:
            return batch, "minimum"
        return batch, "data" if most == data_allows else "larger patch"
