"""Where logits come from, and what is known before the first plane is restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.arrays.resample import Taps, linear_taps, separate_axis
from autoseg.types.case import Placement
from autoseg.types.geometry import Shape

Regions = tuple[int, ...] | None


class LogitSource(Protocol):
    """Logits (classes, z, y, x) whose planes are had from the lowest up."""

    @property
    def classes(self) -> int:
        """Number of output channels."""
        ...

    @property
    def shape(self) -> Shape:
        """z, y, x of the whole."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the planes lie."""
        ...

    def planes(self, low: int, high: int) -> Tensor:
        """Planes `low` to `high` - 1, (classes, high - low, y, x), any float type and strides; never changed afterwards.

        Each plane is asked for at most once and in rising order; some are not needed. Unit stride along x saves a copy.
        """
        ...


class WholeLogits:
    """A tensor (classes, z, y, x) as a source."""

    def __init__(self, logits_czyx: Tensor) -> None:
        self._logits = logits_czyx.detach()

    @property
    def classes(self) -> int:
        """Number of output channels."""
        return int(self._logits.shape[0])

    @property
    def shape(self) -> Shape:
        """z, y, x."""
        z, y, x = self._logits.shape[1:]
        return z, y, x

    @property
    def device(self) -> torch.device:
        """Where the tensor lies."""
        return self._logits.device

    def planes(self, low: int, high: int) -> Tensor:
        """A view of some planes."""
        return self._logits[:, low:high]


class Member:
    """One source with its interpolation taps, and the few planes that are held of it."""

    def __init__(self, source: LogitSource, placement: Placement, share: float, scale: float) -> None:
        self.source, self.share, self.scale = source, share, scale
        self.classes, self.shape = source.classes, source.shape
        coarse = separate_axis(placement.spacing_zyx_mm, placement.cropped_spacing_zyx_mm)
        pairs = enumerate(zip(placement.shape, placement.cropped_shape, strict=True))
        self.taps: list[Taps] = [linear_taps(old, new, axis == coarse) for axis, (old, new) in pairs]
        self.interpolates = [bool(taps.weight.any()) for taps in self.taps]
        self._held: dict[int, Tensor] = {}
        self._next = 0

    def ends(self, z: int) -> tuple[int, int, float]:
        """The source planes on both sides of output plane z, and the weight of the second; one plane twice where that is all."""
        taps = self.taps[0]
        low, high, weight = int(taps.low[z]), int(taps.high[z]), float(np.float32(taps.weight[z]))
        return (low, high, weight) if weight else (low, low, 0.0)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The source planes that output planes `first` to `last` need, half-open."""
        return self.ends(first)[0], max(self.ends(last)[1], self.ends(last)[0]) + 1

    def fetch(self, first: int, last: int) -> dict[int, Tensor]:
        """Hold the source planes that output planes `first` to `last` need; planes (classes, y, x) by their number."""
        low, high = self.span(first, last)
        self._held = {z: plane for z, plane in self._held.items() if z >= low}
        begin = max(low, self._next)
        if high > begin:
            chunk = self.source.planes(begin, high)
            self._held.update(zip(range(begin, high), chunk.unbind(1), strict=True))
            self._next = high
        return self._held


class RestoredPlane(NamedTuple):
    """A plane on the cropped image grid: labels (y, x), and mean probabilities (classes, y, x) if they were asked for."""

    z: int
    label_yx: NDArray[np.integer]
    probability_cyx: NDArray[np.float32] | None


@dataclass(frozen=True)
class Job:
    """Members that are decided together, and how."""

    members: Sequence[Member]
    size: Shape
    table: NDArray[np.integer]  # labels by decision: the class, or 1 + the region
    regions: bool
    half: bool
    with_probabilities: bool

    @property
    def classes(self) -> int:
        """Number of output channels."""
        return self.members[0].classes

    @cached_property
    def tempered(self) -> bool:
        """Whether probabilities are of divided logits."""
        return any(member.scale != 1 for member in self.members)

    @cached_property
    def dense(self) -> bool:
        """Whether labels come from probabilities that are computed everywhere."""
        return len(self.members) > 1 and self.with_probabilities and not self.tempered
