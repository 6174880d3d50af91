"""What goes into a prediction and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.inference.gauge import Gauge
from autoseg.networks.build import Network
from autoseg.types.geometry import Vector
from autoseg.types.plan import Configuration, Plan


@dataclass(frozen=True)
class Member:
    """One configuration with the networks of its folds; `mirror_axes` are the patch axes it was trained to be mirrored along.

    With `previous` the networks take that member's segmentation as input, one channel per foreground label after the image's.
    `weight` is how much the member counts beside the others of an ensemble. `temperature` divides logits where probabilities or
    uncertainty are told; labels are those without it.
    """

    plan: Plan
    name: str
    networks: tuple[Network, ...]
    mirror_axes: tuple[int, ...]
    previous: Member | None = None
    weight: float = 1.0
    temperature: float = 1.0

    @property
    def configuration(self) -> Configuration:
        """The plan's configuration of that name."""
        return self.plan.configurations[self.name]


@dataclass(frozen=True)
class Wishes:
    """What is asked for beside labels; `judged` says that the prediction will be judged without a reference."""

    probabilities: bool = False
    uncertainty: bool = False
    judged: bool = False

    @property
    def gauged(self) -> bool:
        """Whether networks must tell how much their passes disagree."""
        return self.uncertainty or self.judged


@dataclass(frozen=True)
class Prediction:
    """Labels (disk values) on the grid of the image as it was stored; probabilities (classes, z, y, x) float32 when asked for.

    So is `uncertainty_kzyx`, float32 in bits: the entropy of the prediction, and the disagreement of folds, mirrored copies and
    runs about it. `seconds` are those of each stage.
    """

    label_zyx: NDArray[np.integer]
    probabilities_czyx: NDArray[np.float32] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    uncertainty_kzyx: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class ImagePrediction:
    """The same for an image of SimpleITK or nibabel: every part is an image of that kind on its grid."""

    label: Any
    probabilities: Any = None
    uncertainty: Any = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decided:
    """A prediction before post-processing: inside indices on the stored grid, its spacing, and what was gathered on the way.

    `probable_czyx` are the probabilities that decided, `told_czyx` those after division by the temperatures.
    """

    inside_zyx: NDArray[np.integer]
    probable_czyx: NDArray[np.float32] | None
    told_czyx: NDArray[np.float32] | None
    uncertainty_kzyx: NDArray[np.float32] | None
    gauges: tuple[Gauge, ...]
    spacing_zyx_mm: Vector
    seconds: dict[str, float]
