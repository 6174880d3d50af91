"""The moving average of the weights, which is often a better network than the last step's."""

from __future__ import annotations

import copy

import torch

from autoseg.networks.build import Network


class Average:
    """A copy of a network whose weights are the exponential moving average of its weights, float32.

    The decay after t updates is min(decay, (1 + t) / (10 + t)), so that the average soon forgets the first weights.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.network = copy.deepcopy(network)
        self.network.requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, network: Network) -> None:
        """Move a little towards the network's weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        latest: list[torch.Tensor] = list(network.parameters())
        own: list[torch.Tensor] = list(self.network.parameters())
        torch._foreach_lerp_(own, latest, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        self.updates += 1

    def begin(self, weights: dict[str, torch.Tensor], updates: int = 0) -> None:
        """Be these weights, as if after so many updates."""
        self.network.load_state_dict(weights)
        self.updates = updates
