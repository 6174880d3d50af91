"""What is drawn for one sample: all of the randomness, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.cascade import Operation
from autoseg.types.plan import Ints

StepName = Literal["noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma"]


@dataclass(frozen=True)
class Step:
    """One intensity change; `values[channel]` holds its parameters (empty: the channel stays), `seed` feeds the noise."""

    name: StepName
    values: tuple[tuple[float, ...], ...]
    seed: int = 0


@dataclass(frozen=True)
class Elastic:
    """A smooth random shift of every voxel, at most `strength * length * edge` along an axis whose edge is that of the patch.

    `length`, a share of the edge, is the distance between the knots of the cubic spline that the shifts follow.
    """

    length: float
    strength: float
    seed: int


@dataclass(frozen=True)
class Morph:
    """One label of the previous stage's segmentation is dilated, eroded, opened or closed by a ball, radius in voxels."""

    label: int
    operation: Operation
    radius: float


@dataclass(frozen=True)
class Removal:
    """A component of one label of the previous stage's segmentation is removed; `choice` in [0, 1) says which."""

    label: int
    choice: float


@dataclass(frozen=True)
class AugmentParams:
    """Everything drawn for one sample.

    `matrix` maps an offset from the patch centre to an offset in the stored case, z, y, x (None: the identity); `elastic` shifts
    the offsets before. `morphs` and `removals` alter the previous stage's segmentation, in their order.
    """

    matrix: NDArray[np.float64] | None = None
    steps: tuple[Step, ...] = ()
    mirror: tuple[int, ...] = ()
    morphs: tuple[Morph, ...] = ()
    removals: tuple[Removal, ...] = ()
    elastic: Elastic | None = None


def source_box(
    start: Ints, patch: Ints, matrix: NDArray[np.float64] | None, shift: Sequence[float] = (0, 0, 0)
) -> tuple[Ints, Ints]:
    """Half-open box (low, high) of stored voxels that a patch starting at `start` needs under `matrix`.

    `shift` is how far, in voxels, an elastic deformation moves points of the patch along each axis at most.
    """
    if matrix is None and not any(shift):
        return tuple(start), tuple(s + p for s, p in zip(start, patch, strict=True))
    half = (np.asarray(patch) - 1) / 2
    reach = np.abs(np.eye(3) if matrix is None else matrix) @ (half + np.asarray(shift))
    centre = np.asarray(start) + half
    low = np.floor(centre - reach + 1e-6).astype(int)
    high = np.ceil(centre + reach - 1e-6).astype(int) + 1
    return tuple(low.tolist()), tuple(high.tolist())
