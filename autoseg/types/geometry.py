"""Where voxels lie in the world, and how an image is brought to a given orientation and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import field_validator

from autoseg.types.record import Record

Vector = tuple[float, float, float]
Shape = tuple[int, int, int]
Matrix = tuple[Vector, Vector, Vector]

IDENTITY: Matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
NO_DEPTH_MM = 999.0  # through-plane spacing given to 2D images, as the reference planner expects it (nnU-Net, NaturalImage2DIO)


class Grid(Record):
    """A voxel grid: shape, spacing in mm, origin in mm and direction, every axis order z, y, x.

    World axes are LPS (x to the left, y to the back, z to the head, as in DICOM), listed z, y, x like the array axes.
    Column j of `direction` is the unit vector of array axis j. A 2D image has shape (1, y, x), the identity as direction and
    `has_direction` false; its through-plane spacing is `NO_DEPTH_MM` or more.
    """

    shape: Shape
    spacing: Vector
    origin: Vector = (0.0, 0.0, 0.0)
    direction: Matrix = IDENTITY
    has_direction: bool = True

    @field_validator("spacing")
    @classmethod
    def _positive(cls, spacing: Vector) -> Vector:
        if not all(np.isfinite(s) and s > 0 for s in spacing):
            raise ValueError(f"spacing must be positive and finite, found {spacing}")
        return spacing

    @property
    def voxel_volume_ml(self) -> float:
        """Millilitres per voxel; for a 2D image the through-plane spacing counts as 1 mm."""
        depth = self.spacing[0] if self.spacing[0] < NO_DEPTH_MM else 1.0
        return depth * self.spacing[1] * self.spacing[2] / 1000.0

    def to_lps(self) -> AxisMap:
        """The permutation and flips that bring an array on this grid closest to LPS (the identity without a direction)."""
        if not self.has_direction:
            return AxisMap((0, 1, 2), (False, False, False))
        direction = np.asarray(self.direction)
        axes: list[int] = [-1, -1, -1]
        remaining = np.abs(direction)
        for _ in range(3):  # greedy on the largest cosine, so that oblique grids get the nearest axis and none twice
            world, axis = np.unravel_index(int(np.argmax(remaining)), remaining.shape)
            axes[int(world)] = int(axis)
            remaining[world, :] = -1
            remaining[:, axis] = -1
        flips = tuple(bool(direction[world, axes[world]] < 0) for world in range(3))
        return AxisMap((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))

    def turned(self, orientation: str) -> AxisMap:
        """What brings an array on this grid to a plan's orientation: LPS, RAS (nnU-Net's reorienting readers) or as_stored."""
        if orientation == "as_stored" or not self.has_direction:
            return AxisMap((0, 1, 2), (False, False, False))
        lps = self.to_lps()
        head, back, left = lps.flips
        return lps if orientation == "LPS" else AxisMap(lps.axes, (head, not back, not left))

    def mapped(self, axis_map: AxisMap) -> Grid:
        """The grid of an array after `axis_map.apply`."""
        direction, spacing, shape = np.asarray(self.direction, float), np.asarray(self.spacing), np.asarray(self.shape)
        order = list(axis_map.axes)
        origin = np.asarray(self.origin, float)
        new_direction = direction[:, order].copy()
        for new_axis, (old_axis, flip) in enumerate(zip(axis_map.axes, axis_map.flips, strict=True)):
            if flip:
                origin = origin + direction[:, old_axis] * spacing[old_axis] * (shape[old_axis] - 1)
                new_direction[:, new_axis] *= -1
        return self.model_copy(
            update={
                "shape": tuple(int(shape[a]) for a in order),
                "spacing": tuple(float(spacing[a]) for a in order),
                "origin": tuple(float(o) for o in origin),
                "direction": tuple(tuple(float(v) for v in row) for row in new_direction),
            }
        )


@dataclass(frozen=True)
class AxisMap:
    """An axis permutation followed by flips, for the last three axes of an array; undone exactly by `invert`."""

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @property
    def _turned(self) -> Any:
        return (..., *(slice(None, None, -1 if flip else 1) for flip in self.flips))

    def apply(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Permute then flip the last three axes; leading axes stay. Returns a view."""
        lead = array.ndim - 3
        moved = array.transpose(*range(lead), *(lead + a for a in self.axes))
        turned: np.ndarray[Any, Any] = moved[self._turned]
        return turned

    def invert(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Undo `apply`. Returns a view."""
        lead = array.ndim - 3
        flipped: np.ndarray[Any, Any] = array[self._turned]
        back = [self.axes.index(a) for a in range(3)]
        return np.transpose(flipped, (*range(lead), *(lead + a for a in back)))
