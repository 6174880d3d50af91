"""What a plug-in must offer: protocols of one or two methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Plan

if TYPE_CHECKING:
    import torch


class Planner(Protocol):
    """Derives a plan from a data set and its fingerprint; `gpu_memory_gb` None means the planner's own default."""

    def __call__(self, dataset: Dataset, fingerprint: Fingerprint, gpu_memory_gb: float | None = None) -> Plan:
        """Return the plan; raises PlanError when none can be made."""
        ...


@dataclass(frozen=True)
class Batch:
    """One training batch on the device.

    `image` is (batch, channel, *patch) float32, `label` (batch, *patch) int64 inside indices (ignore label K+1 included, voxels
    outside the image are background). `cases` names where each sample came from. `labelled`, (batch, targets) bool, says which
    targets are annotated in each sample's case; None: all of them.
    """

    image: torch.Tensor
    label: torch.Tensor
    cases: tuple[str, ...]
    labelled: torch.Tensor | None = None


class Loss(Protocol):
    """Turns network outputs into one number."""

    def __call__(self, outputs: list[torch.Tensor], batch: Batch, progress: float) -> torch.Tensor:
        """Return the scalar loss; `outputs` are logits (batch, classes, *size), finest first, `progress` runs from 0 to 1."""
        ...
