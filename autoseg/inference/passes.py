"""One pass of tiles through the networks of a member: every fold and every mirrored copy, averaged before it leaves the tile."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from autoseg.arrays.cascade import one_hot
from autoseg.arrays.uncertainty import PassStatistics
from autoseg.networks.build import Network
from autoseg.networks.hardware import Resolved, autocast


@dataclass(frozen=True)
class Passes:
    """How tiles are forwarded.

    `axes` are the patch axes to mirror along, `flat` says that networks see (channel, y, x), `previous_labels` is the number of
    labels in the previous stage's segmentation, which is then the tile's last channel. With `uncertainty` the channels
    `uncertainty.MAPS` follow the logits. With `apart` the logits of every network come out on their own, one after the other.
    `copies` is how many tiles, mirrored copies included, go through a network at once.
    """

    networks: tuple[Network, ...]
    axes: tuple[int, ...]
    device: torch.device
    precision: Resolved
    flat: bool = False
    previous_labels: int = 0
    temperature: float = 1.0
    regions: bool = False
    uncertainty: bool = False
    apart: bool = False
    copies: int = 1

    @torch.inference_mode()
    def forward(self, tiles: Tensor) -> Tensor:
        """Tiles (tile, channel, z, y, x) on any device -> logits (tile, classes, z, y, x) on the networks' device."""
        tiles = tiles.to(self.device)
        if self.previous_labels:  # only now: channels for all labels of a whole volume would be large
            tiles = torch.cat([tiles[:, :-1], one_hot(tiles[:, -1], self.previous_labels)], 1)
        result = self._mean(tiles[:, :, 0] if self.flat else tiles)
        return result[:, :, None] if self.flat else result

    def _mean(self, tiles: Tensor) -> Tensor:
        """Mean logits (tile, classes, ...) of all networks and mirrorings, or with `apart` of each network."""
        statistics = PassStatistics(self.temperature, self.regions) if self.uncertainty else None
        if self.apart:
            return torch.cat([self._mirrored(network, tiles, None) for network in self.networks], 1)
        total: Tensor | None = None
        for network in self.networks:
            own = self._mirrored(network, tiles, statistics)
            if statistics is not None:
                statistics.add_network(own)
            total = own if total is None else total.add_(own)  # one after the other, so that two are alive at most
            del own
        assert total is not None
        if len(self.networks) > 1:
            total /= len(self.networks)
        return total if statistics is None else torch.cat([total, statistics.maps(total)], 1)

    def _mirrored(self, network: Network, tiles: Tensor, statistics: PassStatistics | None) -> Tensor:
        """Mean logits of one network over mirrored copies; float32 unless there is a single one that is only passed on."""
        axes = [axis + 2 for axis in self.axes]
        flips = [flip for count in range(len(axes) + 1) for flip in itertools.combinations(axes, count)]
        together = max(1, self.copies // len(tiles))
        own: Tensor | None = None
        for some in (flips[i : i + together] for i in range(0, len(flips), together)):
            copies = [tiles.flip(flip) if flip else tiles for flip in some]
            with autocast(self.device, self.precision):
                results = network(copies[0] if len(copies) == 1 else torch.cat(copies))[0]
            for flip, result in zip(some, results.chunk(len(some)), strict=True):
                result = result.flip(flip) if flip else result
                if statistics is not None:
                    result = result.float()
                    statistics.add_pass(result)
                if own is None:
                    alone = len(flips) == 1 and len(self.networks) == 1
                    own = result if alone and statistics is None else result.float()
                else:
                    own += result
        assert own is not None
        return own if len(flips) == 1 else own.div_(len(flips))
