"""What a plug-in must offer: protocols of one or two methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Configuration, Ints, Plan

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


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


class Augmentation(Protocol):
    """Changes training patches at random: drawing is apart from applying, so that sample i is the same wherever it is made.

    Patch axes are always z, y, x (2D: the first is 1). Both methods that take `params` are called in any thread.
    """

    @property
    def patch(self) -> tuple[int, int, int]:
        """Size of the patches that `apply` returns."""
        ...

    @property
    def previous_labels(self) -> int:
        """How many labels of the previous stage's segmentation follow the image's channels; 0: there is no such input."""
        ...

    def make_params(self, rng: np.random.Generator, /) -> Any:
        """Draw everything that is random about one sample; the result is handed back to the other methods as it is."""
        ...

    def source_box(self, start: Ints, params: Any, /) -> tuple[Ints, Ints]:
        """Half-open box (low, high) of stored voxels that the patch starting at `start` needs; it may lie outside the case."""
        ...

    def apply(
        self,
        image: torch.Tensor,
        label: torch.Tensor,
        centre: NDArray[np.float64],
        params: Any,
        masked: tuple[bool, ...],
        previous: torch.Tensor | None = None,
        /,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the patch, a pure function of what is given, which stays unchanged.

        `image` (channel, z, y, x) float, `label` and `previous` (z, y, x) int16 are the box that was asked for, on the batch's
        device, padded where it runs past the case (image 0, label -1, previous 0). `centre` is where the patch's centre lies in
        it, in voxels. Channels that are `masked` must be 0 where the label is -1. The result is the image
        (channel + previous_labels, *patch) float32 and the label (*patch) int64, -1 turned into 0.
        """
        ...


class AugmentationFactory(Protocol):
    """Builds an augmentation: what `augment.kind=module:Name` names."""

    def __call__(
        self, configuration: Configuration, channels: int, mirror: Ints, previous_labels: int, /, **options: Any
    ) -> Augmentation:
        """`mirror` lists the axes of the configuration's patch that may be flipped; `options` are those of the record."""
        ...
