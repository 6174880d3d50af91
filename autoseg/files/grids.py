"""Comparing voxel grids: what is equal, what is rounding in a header, and what is a real difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from autoseg.types.geometry import NO_DEPTH_MM, Grid, Shape, Vector

# Two headers are equal up to what float32 keeps; the last three say what still counts as noise from rounding in a header.
EQUAL_RELATIVE = 1e-6
EQUAL_DIRECTION = 1e-5
NOISE_SPACING = 1e-3  # relative
NOISE_ORIGIN = 0.05  # of a voxel
NOISE_DIRECTION = 1e-3  # direction cosines


@dataclass(frozen=True)
class GridDifference:
    """One field in which two grids differ; `noise` when it is no more than rounding in a header."""

    field: Literal["shape", "spacing", "origin", "direction"]
    expected: str
    found: str
    noise: bool


def compare_grids(a: Grid, b: Grid) -> list[GridDifference]:
    """List how grid `b` (found) differs from grid `a` (expected); empty when they are equal up to float32.

    A difference within `NOISE_SPACING`, `NOISE_ORIGIN` or `NOISE_DIRECTION` is marked as noise. When one has no direction, only
    the shape counts, and the spacing where both carry one.
    """
    if a.shape != b.shape:
        return [GridDifference("shape", str(a.shape), str(b.shape), noise=False)]
    found: list[GridDifference] = []
    spacing = np.asarray(a.spacing)
    off = np.abs(np.asarray(b.spacing) - spacing) / spacing
    placed = a.has_direction and b.has_direction
    if not placed and not (_tells_spacing(a) and _tells_spacing(b)):
        return found
    if not placed and max(a.spacing[0], b.spacing[0]) >= NO_DEPTH_MM:
        off = off[1:]
    if off.max() > EQUAL_RELATIVE:
        found.append(GridDifference("spacing", _text(a.spacing), _text(b.spacing), noise=bool(off.max() <= NOISE_SPACING)))
    if not placed:
        return found
    shift = np.abs(np.asarray(b.origin) - np.asarray(a.origin))
    if (shift > EQUAL_RELATIVE * (np.abs(a.origin) + spacing.max())).any():
        voxels = np.abs(np.asarray(a.direction).T @ (np.asarray(b.origin) - np.asarray(a.origin))) / spacing
        found.append(GridDifference("origin", _text(a.origin), _text(b.origin), noise=bool(voxels.max() <= NOISE_ORIGIN)))
    turn = float(np.abs(np.asarray(b.direction) - np.asarray(a.direction)).max())
    if turn > EQUAL_DIRECTION:
        rows = [", ".join(_text(row) for row in g.direction) for g in (a, b)]
        found.append(GridDifference("direction", rows[0], rows[1], noise=turn <= NOISE_DIRECTION))
    return found


def _tells_spacing(grid: Grid) -> bool:
    """Whether the file gave a spacing, rather than the 1 mm put where there is none."""
    return grid.has_direction or any(s != 1.0 for s in grid.spacing[1:]) or grid.spacing[0] not in (1.0, NO_DEPTH_MM)


def _text(numbers: Sequence[float]) -> str:
    return "(" + ", ".join(f"{n:.8g}" for n in numbers) + ")"


def plain_grid(shape: Shape, spacing: Vector | None) -> Grid:
    """The grid of a format that carries no direction; `spacing` is z, y, x in mm, 1 where the file does not tell."""
    z, y, x = spacing or (1.0, 1.0, 1.0)
    return Grid(shape=shape, spacing=(no_depth(y, x) if shape[0] == 1 else z, y, x), has_direction=False)


def no_depth(y: float, x: float) -> float:
    """The through-plane spacing in mm given to a slice without one: far above its spacings in the plane."""
    return max(NO_DEPTH_MM, NO_DEPTH_MM * max(y, x))
