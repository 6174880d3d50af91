"""What whole predictions are judged by, gathered from planes of logits as they go by: never classes times volume."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autoseg.arrays.restore import LogitSource
from autoseg.arrays.uncertainty import MAPS, entropy_bits
from autoseg.types.geometry import Shape

if TYPE_CHECKING:
    from autoseg.arrays.quality import Beliefs


class Gauge:
    """What one member's prediction is judged by, on its own grid.

    `maps` (3, z, y, x) are the channels `MAPS`, `entropy_zyx` is the entropy after division by the temperature, both in bits and
    float32 in main memory; `beliefs` are the decision and sums of probabilities.
    """

    def __init__(
        self, classes: int, shape: Shape, regions: bool, temperature: float = 1.0, judged: bool = True, mapped: bool = True
    ) -> None:
        self.regions, self.temperature = regions, temperature
        self.maps = torch.zeros(len(MAPS), *shape)
        self.beliefs: Beliefs | None = None
        if judged:
            from autoseg.arrays.quality import Beliefs

            self.beliefs = Beliefs(classes, shape, regions)
        self.entropy_zyx = torch.zeros(shape) if mapped else None

    def look(self, low: int, planes: Tensor) -> None:
        """See logits followed by `MAPS`, (classes + 3, planes, y, x), which begin at plane `low`."""
        classes, high = len(planes) - len(MAPS), low + planes.shape[1]
        planes = planes.cpu() if planes.device.type == "mps" else planes  # sums are in float64, which it has not
        self.maps[:, low:high] = planes[classes:].cpu()
        for z in range(low, high):
            plane = planes[:classes, z - low].float()
            if self.beliefs is not None:
                self.beliefs.look(z, plane)
            if self.entropy_zyx is not None:
                self.entropy_zyx[z] = entropy_bits(plane / self.temperature, self.regions, 0).cpu()


class Gauged:
    """The logits of a stream whose last channels are `MAPS`; a gauge sees every plane once, before anybody gets it."""

    def __init__(self, source: LogitSource, gauge: Gauge) -> None:
        self.source, self.gauge, self._seen = source, gauge, 0

    @property
    def shape(self) -> Shape:
        """The stream's."""
        return self.source.shape

    @property
    def classes(self) -> int:
        """Channels of logits alone."""
        return self.source.classes - len(MAPS)

    @property
    def device(self) -> torch.device:
        """Where the planes lie."""
        return self.source.device

    def planes(self, low: int, high: int) -> Tensor:
        """Logits (classes, high - low, y, x)."""
        first = min(low, self._seen)
        planes = self.source.planes(first, high)
        if high > self._seen:
            self.gauge.look(self._seen, planes[:, self._seen - first :])
            self._seen = high
        return planes[: self.classes, low - first :]

    def finish(self) -> Gauge:
        """Let the gauge see what nobody asked for, and return it."""
        for z in range(self._seen, self.shape[0]):
            self.planes(z, z + 1)
        return self.gauge
