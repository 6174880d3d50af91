"""Where phantoms are drawn: voxel centres in body coordinates, smooth shapes with partial volume, and random scan geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.types.geometry import AxisMap, Grid, Matrix

Field = NDArray[np.floating[Any]]  # one number per voxel, shape (z, y, x); float32 unless a formula widens it
Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]


def point(values: Sequence[float] | NDArray[np.floating[Any]]) -> Point:
    """Three numbers as a point."""
    a, b, c = (float(v) for v in values)
    return (a, b, c)


@dataclass(frozen=True)
class Space:
    """Body coordinates of every voxel, float32 mm, each of shape (z, y, x): x to the left, y to the back, z to the head.

    `edge_mm` is the width over which an edge is blurred by the voxel size. Points are given as (x, y, z).
    """

    x: Field
    y: Field
    z: Field
    edge_mm: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (z, y, x)."""
        return self.x.shape

    def part(self, box: Box) -> Space:
        """The same space inside `box` (views)."""
        return Space(self.x[box], self.y[box], self.z[box], self.edge_mm)

    def shifted(self, dx: Field, dy: Field, dz: Field) -> Space:
        """The space with displaced coordinates."""
        return Space(self.x + dx, self.y + dy, self.z + dz, self.edge_mm)


class Boxes:
    """Finds the part of a space that holds a range of body coordinates, so that small shapes cost little."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._ranges = tuple(
            (field.min(axis=others), field.max(axis=others))
            for field, others in ((space.z, (1, 2)), (space.y, (0, 2)), (space.x, (0, 1)))
        )

    def around(self, low: Point, high: Point) -> tuple[Box, Space]:
        """The smallest box of voxels that holds all points between `low` and `high` (x, y, z), and the space in it."""
        slices = []
        margin = self.space.edge_mm
        for (least, most), a, b in zip(self._ranges, low[::-1], high[::-1], strict=True):
            inside = np.flatnonzero((most >= a - margin) & (least <= b + margin))
            slices.append(slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0))
        box = (slices[0], slices[1], slices[2])
        return box, self.space.part(box)


def coverage(distance_mm: Field, edge_mm: float) -> Field:
    """The share of each voxel (0 to 1) that lies inside a shape, from signed distance in mm (negative inside)."""
    share: Field = np.clip(0.5 - distance_mm / edge_mm, 0, 1).astype(np.float32)
    return share


def paint(image: Field, distance_mm: Field, value: float | Field, edge_mm: float) -> None:
    """Blend `value` into `image`, in place, where the shape is."""
    image += coverage(distance_mm, edge_mm) * (value - image)


def ellipsoid(space: Space, centre: Point, radii: Point, power: float = 2.0, axes: NDArray[np.float64] | None = None) -> Field:
    """Signed distance in mm to a (super)ellipsoid, first-order exact near its surface; an infinite radius makes a cylinder.

    The columns of `axes` are the directions of the radii (the body's own axes when None).
    """
    x, y, z = space.x - np.float32(centre[0]), space.y - np.float32(centre[1]), space.z - np.float32(centre[2])
    if axes is not None:
        a = axes.astype(np.float32)
        x, y, z = (a[0, i] * x + a[1, i] * y + a[2, i] * z for i in range(3))
    total, slope = np.zeros(space.shape, np.float32), np.zeros(space.shape, np.float32)
    for field, radius in zip((x, y, z), radii, strict=True):
        if np.isinf(radius):
            continue
        unit = np.abs(field) / np.float32(radius) + np.float32(1e-6)
        raised = unit if power == 2 else unit ** np.float32(power - 1)
        total += raised * unit
        slope += (raised / np.float32(radius)) ** 2
    level = np.sqrt(total) if power == 2 else total ** np.float32(1 / power)
    return np.asarray((level - 1) * (total / level) / np.sqrt(slope), np.float32)


def capsule(space: Space, start: Point, end: Point, radius_start: float, radius_end: float | None = None) -> Field:
    """Signed distance in mm to a rod with round ends whose radius runs from `radius_start` to `radius_end`."""
    radius_end = radius_start if radius_end is None else radius_end
    dx, dy, dz = (np.float32(b - a) for a, b in zip(start, end, strict=True))
    x, y, z = space.x - np.float32(start[0]), space.y - np.float32(start[1]), space.z - np.float32(start[2])
    along = np.clip((x * dx + y * dy + z * dz) / max(float(dx * dx + dy * dy + dz * dz), 1e-6), 0, 1).astype(np.float32)
    distance = np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2 + (z - along * dz) ** 2)
    return np.asarray(distance - np.float32(radius_start) - along * np.float32(radius_end - radius_start), np.float32)


def tube(space: Space, points: Sequence[Point], radius: float) -> Field:
    """Signed distance in mm to a chain of rods through `points`."""
    distance = capsule(space, points[0], points[1], radius)
    for start, end in pairwise(points):
        distance = np.minimum(distance, capsule(space, start, end, radius))
    return distance


def join(first: Field, second: Field, round_mm: float) -> Field:
    """Union of two shapes with a rounded seam (polynomial smooth minimum, I. Quilez)."""
    h = np.maximum(np.float32(round_mm) - np.abs(first - second), 0)
    return np.asarray(np.minimum(first, second) - h * h / np.float32(4 * round_mm), np.float32)


def meet(first: Field, second: Field, round_mm: float) -> Field:
    """Intersection of two shapes with a rounded edge."""
    return -join(-first, -second, round_mm)


def waves(space: Space, rng: np.random.Generator, wavelength_mm: float, count: int) -> Field:
    """A smooth random field of unit variance: `count` plane waves of random direction, 0.75 to 1.25 times the wavelength."""
    field = np.zeros(space.shape, np.float32)
    for _ in range(count):
        direction = rng.normal(size=3)
        k = direction / np.linalg.norm(direction) * 2 * np.pi / (wavelength_mm * rng.uniform(0.75, 1.25))
        field += np.sin(space.x * np.float32(k[0]) + space.y * np.float32(k[1]) + space.z * np.float32(k[2])
                        + np.float32(rng.uniform(0, 2 * np.pi)))
    return field * np.float32(np.sqrt(2 / count))


def deformed(space: Space, rng: np.random.Generator, amplitude_mm: float, wavelength_mm: float) -> Space:
    """The space seen by another subject: each coordinate bent by a smooth random field."""
    bend = [np.float32(amplitude_mm) * waves(space, rng, wavelength_mm, 3) for _ in range(3)]
    return space.shifted(*bend)


def rotation(degrees_xyz: Point) -> NDArray[np.float64]:
    """Rotation matrix (x, y, z order): about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad(degrees_xyz)), np.sin(np.deg2rad(degrees_xyz))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)


def scan_grid(rng: np.random.Generator, low_mm: Point, high_mm: Point, spacing_xyz_mm: Point, oblique: bool) -> Grid:
    """A grid (axes z, y, x) over the box `low_mm` to `high_mm` (x, y, z) of the body; `oblique` tilts it by up to 7 degrees."""
    spacing = np.asarray(spacing_xyz_mm)[::-1]
    low, high = np.asarray(low_mm)[::-1], np.asarray(high_mm)[::-1]
    shape = np.maximum(np.round((high - low) / spacing), 8).astype(int)
    tilt = rotation(point(rng.uniform(-7, 7, 3)) if oblique else (0.0, 0.0, 0.0))[::-1, ::-1]
    origin = (low + high) / 2 - tilt @ ((shape - 1) * spacing / 2)
    direction: Matrix = (point(tilt[0]), point(tilt[1]), point(tilt[2]))
    depth, height, width = (int(n) for n in shape)
    return Grid(shape=(depth, height, width), spacing=point(spacing), origin=point(origin), direction=direction)


def on_table(grid: Grid, rng: np.random.Generator) -> Grid:
    """The grid in the scanner's coordinates, whose zero is not in the body."""
    table = rng.uniform((-900.0, -150.0, -60.0), (900.0, 150.0, 60.0))
    return grid.model_copy(update={"origin": point(np.round(np.asarray(grid.origin) + table, 3))})


def storage(rng: np.random.Generator) -> AxisMap:
    """How a writer stored the axes: half of the time slices of rows as usual, else any order, and always any flips."""
    first, second, third = range(3) if rng.random() < 0.5 else (int(axis) for axis in rng.permutation(3))
    flips = rng.random(3) < 0.5
    return AxisMap((first, second, third), (bool(flips[0]), bool(flips[1]), bool(flips[2])))


def body_space(grid: Grid, rng: np.random.Generator, tilt_degrees: float, scale: tuple[float, float]) -> Space:
    """Body coordinates of the voxels of a grid for a subject who lies a little askew and is a little smaller or larger."""
    turn = rotation(point(rng.uniform(-tilt_degrees, tilt_degrees, 3)))
    stretch = rng.uniform(*scale) * rng.uniform(0.97, 1.03, 3)
    body_of_world = turn / stretch[:, None]
    world_of_index = (np.asarray(grid.direction) * np.asarray(grid.spacing))[::-1, ::-1]
    matrix = body_of_world @ world_of_index
    start = body_of_world @ np.asarray(grid.origin)[::-1]
    k, j, i = (axis.astype(np.float32) for axis in np.ogrid[tuple(slice(n) for n in grid.shape)])
    x, y, z = (np.float32(row[0]) * i + np.float32(row[1]) * j + np.float32(row[2]) * k + np.float32(offset)
               for row, offset in zip(matrix, start, strict=True))
    return Space(x, y, z, float(np.mean(grid.spacing)))
