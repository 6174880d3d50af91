"""A four-sequence brain MRI drawn from smooth shapes: folded cortex, ventricles, and a tumour whose regions are nested."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.datasets.phantom_space import (
    Field,
    Point,
    Space,
    body_space,
    capsule,
    coverage,
    deformed,
    ellipsoid,
    join,
    meet,
    point,
    rotation,
    scan_grid,
    tube,
    waves,
)
from autoseg.types.geometry import Grid

LABELS = {"background": 0, "edema": 1, "core": 2, "enhancing": 3}
CHANNELS = ("T1", "T1ce", "T2", "FLAIR")
GREY_MM = 3.0
GYRUS_MM = 21.0

# Brightness by sequence (T1, T1 with contrast agent, T2, FLAIR), white matter of T1 = 1
FLUID, GREY, WHITE = (0.28, 0.28, 1.35, 0.2), (0.72, 0.74, 0.78, 0.74), (1.0, 1.0, 0.55, 0.6)
DEEP_GREY, EDEMA = (0.82, 0.84, 0.68, 0.7), (0.68, 0.68, 1.1, 1.12)
NECROSIS, ENHANCING = (0.45, 0.42, 1.2, 0.72), (0.7, 1.5, 0.9, 0.98)
VESSEL = (0.35, 1.3, 0.2, 0.3)


@dataclass(frozen=True)
class Tumour:
    """A tumour: centre and mean radius of its core, width of the edema, thickness of the enhancing rim, in mm."""

    centre: Point
    radius_mm: float
    edema_mm: float
    rim_mm: float

    @staticmethod
    def draw(rng: np.random.Generator, scale: float) -> Tumour:
        """Draw a tumour in the white matter of one half of the brain; a smaller `scale` makes a satellite."""
        side = rng.choice((-1.0, 1.0))
        radius = rng.uniform(11, 21) * scale
        return Tumour(
            centre=(side * rng.uniform(20, 38), rng.uniform(-46, 42), rng.uniform(2, 36)),
            radius_mm=radius, edema_mm=rng.uniform(5, 15) * scale,
            rim_mm=0.0 if rng.random() < 0.08 else rng.uniform(0.2, 0.4) * radius,
        )


@dataclass(frozen=True)
class Tissue:
    """Share of each voxel that is grey matter, deep grey matter or fluid (the rest is white), and depth in the brain in mm."""

    grey: Field
    deep: Field
    fluid: Field
    sinus: Field
    hull: Field


def draw_grid(rng: np.random.Generator, size: float) -> Grid:
    """A scan of the head after skull stripping: about 56 x 66 x 52 voxels (x, y, z) of 2.8 mm at size 1."""
    in_plane, between = rng.uniform(2.55, 3.0) / size, rng.uniform(2.6, 3.3) / size
    low = (-77 + rng.uniform(-4, 4), -96 + rng.uniform(-5, 5), -71 + rng.uniform(-2, 10))
    high = (77 + rng.uniform(-4, 4), 94 + rng.uniform(-5, 5), 79 + rng.uniform(-2, 4))
    return scan_grid(rng, low, high, (in_plane, in_plane, between), oblique=rng.random() < 0.25)


def render(grid: Grid, anatomy: np.random.Generator, noise: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Draw one person on a grid: images (4, z, y, x) in arbitrary units, zero outside the brain, and labels (z, y, x)."""
    space = deformed(body_space(grid, anatomy, tilt_degrees=5, scale=(0.93, 1.05)), anatomy, 3.0, 130)
    tumours = [Tumour.draw(anatomy, 1.0)]
    if anatomy.random() < 0.25:
        tumours.append(Tumour.draw(anatomy, 0.55))
    hull = _hull(space)
    pushed = space
    for tumour in tumours:
        pushed = _pushed(pushed, tumour, hull)
    tissue = _tissue(pushed, hull, anatomy)
    brain = hull < 0
    whole, core, rim = _tumour_regions(space, tumours, tissue, anatomy)
    spots = _white_matter_spots(pushed, anatomy) * (1 - tissue.grey) * (1 - tissue.fluid)
    images = [_sequence(channel, tissue, (whole, core, rim, spots), space.shape) for channel in range(4)]
    label = np.zeros(space.shape, np.uint8)
    for share, name in ((whole, "edema"), (core, "core"), (rim, "enhancing")):
        label[(share > 0.5) & brain] = LABELS[name]
    image = np.stack([_scanned(tissue_image, space, brain, noise) for tissue_image in images])
    _missing_tissue(image, label, noise)
    return image, label


def _hull(space: Space) -> Field:
    """Signed distance in mm to the outer surface of the brain."""
    base = (-16 - 0.12 * space.y - space.z)
    upper = meet(ellipsoid(space, (0, -2, 6), (67, 85, 63), 2.2), base, 14)
    for side in (-1, 1):
        upper = join(upper, ellipsoid(space, (side * 43, -12, -22), (23, 42, 24)), 8)
    back = join(ellipsoid(space, (-22, 46, -36), (32, 28, 23)), ellipsoid(space, (22, 46, -36), (32, 28, 23)), 8)
    stem = capsule(space, (0, 14, -12), (0, 27, -80), 15, 9)
    return join(join(upper, back, 4), stem, 8)


def _pushed(space: Space, tumour: Tumour, hull: Field) -> Space:
    """Mass effect: the tissue around a tumour is pushed outwards, less so near the skull."""
    dx, dy, dz = (field - np.float32(c) for field, c in zip((space.x, space.y, space.z), tumour.centre, strict=True))
    away = np.sqrt(dx**2 + dy**2 + dz**2) + np.float32(1e-3)
    reach = np.float32(1.5 * tumour.radius_mm)
    push = -np.float32(0.35 * tumour.radius_mm) * np.exp(-((away / reach - 0.7) ** 2)) * np.clip(-hull / 15, 0, 1) / away
    return space.shifted(push * dx, push * dy, push * dz)


def _tissue(space: Space, hull: Field, rng: np.random.Generator) -> Tissue:
    edge = space.edge_mm
    folds = waves(space, rng, GYRUS_MM, 14)
    furrow: Field = np.abs(folds) * (GYRUS_MM / (2 * np.pi)) - 0.9  # sulci lie where the field is zero, scaled to millimetres
    furrow = meet(furrow, -hull - (17 + 4 * waves(space, rng, 60, 3)), 3)
    callosum = ellipsoid(space, (0, -2, 8), (np.inf, 44, 26))
    gap = np.maximum(np.abs(space.x) - 1.2, np.maximum(-callosum, -16 - space.z))
    lateral = [ellipsoid(space, (side * 47, -12, -3), (18, 32, 1.7), 2, rotation((-25, side * 24, 0))) for side in (-1, 1)]
    tent = np.maximum(np.abs(space.z + 14 + 0.1 * space.y - 0.006 * space.x**2) - 1.2, 14 - space.y)
    crevice = np.minimum(np.minimum(np.minimum(furrow, gap), np.minimum(lateral[0], lateral[1])), tent)
    small_brain = np.maximum(ellipsoid(space, (0, 46, -36), (56, 30, 24)), -tent)
    stem = capsule(space, (0, 12, -8), (0, 27, -80), 13, 8)
    leaves = np.abs(np.sin(2 * np.pi * np.hypot(space.y - 20, space.z + 30) / 9)) * 2 - 0.4
    crevice = np.where(stem < 2, 9, np.where(small_brain < 2, np.maximum(leaves, small_brain + 1), crevice))
    surface = join(-hull - 1.2, crevice, 2.5)  # distance to the fluid around the cortex, positive in the tissue
    surface = np.where(stem < 0, 9, surface)
    grey = coverage(surface - GREY_MM, edge)
    deep = np.full(space.shape, 99, np.float32)
    for side in (-1, 1):
        for (x, y, z), radii in (((11, 8, 8), (8, 14, 9)), ((25, -4, 4), (6, 16, 9)), ((13, -22, 14), (5, 12, 9))):
            deep = np.minimum(deep, ellipsoid(space, (side * x, y, z), radii))
    fluid = np.maximum(coverage(surface, edge) * (hull < 0), coverage(_ventricles(space, rng), edge))
    sinus = coverage(np.abs(np.hypot(space.y, space.z - 4) - 78) - 2.5 + 4 * np.clip(np.abs(space.x) - 2, 0, 9), edge)
    return Tissue(grey, coverage(deep, edge), fluid, sinus * (hull < 0), hull)


def _ventricles(space: Space, rng: np.random.Generator) -> Field:
    """Signed distance in mm to the four ventricles; their width varies with age."""
    width = rng.uniform(3.2, 7.0)
    distance = np.maximum(np.abs(space.x) - 0.25 * width, ellipsoid(space, (0, 4, 2), (np.inf, 13, 10)))
    for side in (-1, 1):
        horn = tube(space, ((side * 8, -32, 12), (side * 8, -12, 20), (side * 12, 12, 21), (side * 23, 30, 10)), width)
        tails = np.minimum(tube(space, ((side * 23, 30, 10), (side * 17, 50, 7)), 0.6 * width),
                           tube(space, ((side * 23, 30, 8), (side * 32, 12, -10), (side * 32, -6, -16)), 0.55 * width))
        distance = np.minimum(distance, join(horn, tails, 3))
    return np.minimum(distance, ellipsoid(space, (0, 32, -34), (6, 5, 9)))


def _tumour_regions(space: Space, tumours: list[Tumour], tissue: Tissue, rng: np.random.Generator) -> tuple[Field, Field, Field]:
    """Share of each voxel in the whole tumour, in its core, and in the enhancing part of the core (each within the last)."""
    edge = space.edge_mm
    whole, core, rim = (np.zeros(space.shape, np.float32) for _ in range(3))
    for tumour in tumours:
        radius = tumour.radius_mm
        lobes = waves(space, rng, 1.6 * radius, 5)
        fingers = waves(space, rng, 26, 6)
        turn = rotation(point(rng.uniform(-30, 30, 3)))
        uneven = rng.uniform(0.85, 1.2, 3)
        ball = ellipsoid(space, tumour.centre, point(radius * uneven), 2, turn)
        mass = ball + np.float32(0.16 * radius) * lobes
        swelling = meet(ball - np.float32(tumour.edema_mm) + np.float32(0.45 * tumour.edema_mm) * fingers, tissue.hull + 3, 4)
        swelling = swelling + 7 * tissue.grey * (mass > 3) + 3 * tissue.deep  # edema follows the white matter
        swelling = np.minimum(swelling, mass - 1)
        wall = tumour.rim_mm * np.clip(1 + 0.45 * waves(space, rng, 2.2 * radius, 4), 0, 2) if tumour.rim_mm else np.float32(-99)
        here_core = coverage(meet(mass, tissue.hull + 1.5, 2), edge)
        here_rim = np.clip(here_core - coverage((mass + wall), edge), 0, 1) if tumour.rim_mm else 0 * here_core
        here_whole = np.maximum(coverage(swelling, edge) * (1 - tissue.fluid), here_core)
        whole, core, rim = np.maximum(whole, here_whole), np.maximum(core, here_core), np.maximum(rim, here_rim)
    return whole, core, np.minimum(rim, core)


def _white_matter_spots(space: Space, rng: np.random.Generator) -> Field:
    """Small bright spots of age near the ventricles: not tumour."""
    spots = np.zeros(space.shape, np.float32)
    for _ in range(int(rng.integers(0, 7))):
        side = rng.choice((-1.0, 1.0))
        centre = (side * rng.uniform(16, 32), rng.uniform(-36, 36), rng.uniform(12, 34))
        distance = capsule(space, centre, centre, rng.uniform(1.5, 3.5))
        spots = np.maximum(spots, coverage(distance, 1.5 * space.edge_mm))
    return spots


def _sequence(channel: int, tissue: Tissue, lesions: tuple[Field, Field, Field, Field], shape: tuple[int, ...]) -> Field:
    """Blend the tissues of one sequence."""
    whole, core, rim, spots = lesions
    image = np.full(shape, WHITE[channel], np.float32)
    layers = (
        (tissue.grey, GREY), (tissue.deep, DEEP_GREY), (tissue.fluid, FLUID), (0.6 * spots, EDEMA), (0.9 * whole, EDEMA),
        (core, NECROSIS), (rim, ENHANCING), (0.7 * tissue.sinus, VESSEL),
    )
    for share, brightness in layers:
        image += share * (brightness[channel] - image)
    return image


def _scanned(tissue_image: Field, space: Space, brain: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int16]:
    """Add what the scanner does: a bias field, blur, Rician noise, arbitrary units; zero outside the brain."""
    bias = np.exp(0.13 * waves(space, rng, 260, 3))
    signal = ndimage.gaussian_filter(tissue_image * bias * rng.uniform(0.92, 1.08) ** 2, rng.uniform(0.25, 0.45))
    sigma = rng.uniform(0.025, 0.055)
    real, imaginary = (sigma * rng.standard_normal(space.shape, np.float32) for _ in range(2))
    scale = np.exp(rng.uniform(np.log(180), np.log(1600)))
    measured = np.clip(np.round(scale * np.hypot(signal + real, imaginary)), 1, 32767)
    return np.where(brain, measured, 0).astype(np.int16)


def _missing_tissue(image: NDArray[np.int16], label: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Now and then the top or bottom slices were not scanned: zeros in every sequence (then unlabelled) or in one alone."""
    chance, top, depth = rng.random(), rng.random() < 0.5, image.shape[1]
    count = round(depth * rng.uniform(0.14, 0.26))
    slab = slice(depth - count, None) if top else slice(0, count)
    if chance < 0.16:
        image[:, slab] = 0
        label[slab] = 0
    elif chance < 0.32:
        image[int(rng.integers(4)), slab] = 0
