"""A chest CT drawn from smooth shapes: body, lungs with vessels, heart, spine, ribs, and nodules that are hard to find."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.datasets.phantom_space import (
    Boxes,
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
    paint,
    point,
    rotation,
    scan_grid,
    tube,
    waves,
)
from autoseg.types.geometry import Grid

LABELS = {"background": 0, "lungs": 1, "heart": 2, "spine": 3, "nodule": 4}
CHANNELS = ("CT",)

# Typical Hounsfield units (Hounsfield scale: air -1000, water 0)
AIR, LUNG, FAT, WATER, MUSCLE, BLOOD, LIVER, DISC, MARROW, CORTEX = -1000, -860, -100, 5, 50, 42, 58, 85, 190, 620
RIB_PITCH_MM = 25.0
SPINE_Y_MM = 48.0
FIRST_BRANCHES = (  # back (y) and up (z), as the vessels leave the hilum
    (-0.8, 0.5), (-0.7, -0.5), (0.5, 0.9), (0.8, -0.4), (0.5, -1.2), (-0.2, -1.1), (0.1, 1.0), (-0.5, 1.1), (0.2, -0.2),
)


@dataclass(frozen=True)
class Subject:
    """What differs from person to person: lengths in mm of the shapes, contrast agent in HU of the blood above BLOOD."""

    fat_mm: float
    contrast_hu: float
    diaphragm_mm: float
    heart: Point
    heart_radii: Point
    heart_axes: NDArray[np.float64]
    chest_radii: tuple[float, float]
    kyphosis_mm: float
    vertebra_mm: float
    vertebra_start_mm: float
    nodules: int

    @staticmethod
    def draw(rng: np.random.Generator) -> Subject:
        """Draw a person."""
        grow = rng.uniform(0.98, 1.2)
        return Subject(
            fat_mm=rng.uniform(4, 20),
            contrast_hu=float(rng.choice([0.0, rng.uniform(60, 190)], p=[0.4, 0.6])),
            diaphragm_mm=rng.uniform(-14, 10),
            heart=(rng.uniform(10, 22), rng.uniform(-26, -16), rng.uniform(-38, -26)),
            heart_radii=(56 * grow, 42 * grow, 41 * grow),
            heart_axes=rotation((rng.uniform(-10, 10), rng.uniform(15, 38), rng.uniform(-48, -25))),
            chest_radii=(rng.uniform(100, 116), rng.uniform(72, 84)),
            kyphosis_mm=rng.uniform(4, 18),
            vertebra_mm=rng.uniform(22, 27),
            vertebra_start_mm=rng.uniform(0, 25),
            nodules=int(rng.choice(5, p=[0.1, 0.25, 0.25, 0.2, 0.2])),
        )


@dataclass(frozen=True)
class Trunk:
    """Signed distances in mm, (z, y, x), of the organs that bound one another."""

    body: Field
    cavity: Field
    diaphragm: Field
    heart: Field
    lungs: Field
    spine_y: Field


def draw_grid(rng: np.random.Generator, size: float) -> Grid:
    """A scan of the chest: about 84 x 62 x 53 voxels (x, y, z) of 3.2 x 3.2 x 3.8 mm at size 1."""
    in_plane, between = rng.uniform(2.9, 3.5) / size, rng.uniform(3.3, 4.4) / size
    half_width, depth = rng.uniform(128, 144), rng.uniform(96, 106)
    low = (-half_width + rng.uniform(-6, 6), -depth, rng.uniform(-104, -84))
    high = (half_width, depth + rng.uniform(4, 14), rng.uniform(88, 112))
    return scan_grid(rng, low, high, (in_plane, in_plane, between), oblique=rng.random() < 0.25)


def render(grid: Grid, anatomy: np.random.Generator, noise: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Draw one person on a grid: image in HU (1, z, y, x) and labels (z, y, x)."""
    space = body_space(grid, anatomy, tilt_degrees=4, scale=(0.9, 1.06))
    person = Subject.draw(anatomy)
    space = deformed(space, anatomy, amplitude_mm=3.0, wavelength_mm=200)
    boxes, edge = Boxes(space), space.edge_mm
    trunk = _trunk(space, person)
    image = _soft_tissue(space, person, trunk, anatomy)
    _heart_and_vessels(image, boxes, person, trunk, anatomy)
    _ribs(image, space, trunk)
    spine = _spine(image, boxes, person, trunk)
    lungs = coverage(trunk.lungs, edge)
    _lungs(image, space, trunk, anatomy)
    _vessel_trees(image, boxes, lungs, person, anatomy)
    _airways(image, boxes)
    nodules = _nodules(image, boxes, trunk, person, anatomy)
    label = np.zeros(space.shape, np.uint8)
    label[lungs > 0.5] = LABELS["lungs"]
    label[trunk.heart < 0] = LABELS["heart"]
    label[spine < 0] = LABELS["spine"]
    label[nodules > 0.5] = LABELS["nodule"]
    return _scanned(image, space, noise)[None], label


def _trunk(space: Space, person: Subject) -> Trunk:
    a, b = person.chest_radii
    top = np.where(space.z > -10, (space.z + 10) / np.float32(122), 0)  # the chest narrows towards its apex
    bullet = Space(space.x, space.y - 2, top * np.float32(min(a, b)), space.edge_mm)
    cavity = ellipsoid(bullet, (0, 0, 0), (a, b, min(a, b)), 2.3)
    wall = 17 + person.fat_mm
    body = ellipsoid(space, (0, 2, 0), (a + wall + 2, b + wall, np.inf), 2.5)
    body = join(body, ellipsoid(space, (0, 14, 118), (150, 62 + person.fat_mm, 62), 2.5), 30)
    spine_y = (np.float32(SPINE_Y_MM) + person.kyphosis_mm * (1 - ((space.z - 5) / 95) ** 2)).astype(np.float32)
    right, left = (np.exp(-(((space.x - cx) / 62) ** 2) - (((space.y + 2) / 74) ** 2)) for cx in (-58, 60))
    dome = -100 + person.diaphragm_mm + 52 * right + 43 * left
    diaphragm = ((dome - space.z) * np.float32(0.7)).astype(np.float32)  # positive below: divided by a typical slope
    rx, ry, rz = person.heart_radii
    apex = person.heart_axes @ (0.5 * rx, -0.22 * ry, 0.0) + person.heart
    heart = join(ellipsoid(space, person.heart, (0.82 * rx, ry, rz), 2, person.heart_axes),
                 ellipsoid(space, point(apex), (0.58 * rx, 0.68 * ry, 0.74 * rz), 2, person.heart_axes), 14)
    heart = meet(meet(heart, cavity + 7, 10), diaphragm + 4, 8)
    high = np.clip((space.z - 10) / 60, 0, 1)
    centre = ellipsoid(Space(space.x / (1 - 0.2 * high), space.y - 6, space.z, space.edge_mm), (2, 0, 0), (27, 46, np.inf), 2.4)
    front = np.maximum(np.abs(space.x - 4) - 5, space.y)
    keep_out = join(join(centre, front, 14), heart - 3, 6)
    column = np.hypot(space.x, space.y - spine_y - 10) - 25
    keep_out = join(keep_out, column, 10)
    lungs = meet(meet(cavity, diaphragm, 6), -keep_out, 5)
    return Trunk(body, cavity, diaphragm, heart, lungs.astype(np.float32), spine_y)


def _soft_tissue(space: Space, person: Subject, trunk: Trunk, rng: np.random.Generator) -> Field:
    edge = space.edge_mm
    image = np.full(space.shape, AIR, np.float32)
    couch = np.abs(np.hypot(space.x, space.y + 270) - (270 + 24 + person.fat_mm + person.chest_radii[1])) - 1.5
    paint(image, couch, -350, edge)
    paint(image, trunk.body, FAT - 10, edge)
    paint(image, np.abs(trunk.body + 1) - 1, 20, edge)
    muscle = trunk.cavity - 13
    for side in (-1, 1):
        muscle = join(muscle, ellipsoid(space, (side * 30, person.chest_radii[1] + 6, 0), (24, 15, np.inf)), 6)
        turn = rotation((0, 0, side * 35))
        shoulder_blade = ellipsoid(space, (side * 84, 66, 62), (12, 42, 56), 2, turn)
        muscle = join(muscle, join(shoulder_blade, ellipsoid(space, (side * 62, -76, 52), (42, 13, 46)), 4), 5)
    paint(image, meet(muscle, trunk.body + 4, 4), MUSCLE, edge)
    for side in (-1, 1):
        paint(image, ellipsoid(space, (side * 86, 69, 66), (3.2, 26, 40), 2, rotation((0, 0, side * 35))), 480, edge)
        paint(image, capsule(space, (side * 14, -76, 84), (side * 120, -10, 108), 5), 520, edge)
    paint(image, trunk.cavity - 1, FAT + 12, edge)
    abdomen = np.maximum(trunk.cavity + 3, -trunk.diaphragm)  # what lies inside the ribs and below the lungs
    enhanced = 0.3 * person.contrast_hu
    organs = ((-48, 0, -118, 78, 76, 70, LIVER + enhanced), (62, 44, -112, 34, 34, 48, 50 + 1.4 * enhanced),
              (48, -22, -118, 40, 46, 46, 30))
    for x, y, z, rx, ry, rz, value in organs:
        paint(image, meet(ellipsoid(space, (x, y, z), (rx, ry, rz), 2.3), abdomen, 5), value, edge)
    paint(image, np.maximum(ellipsoid(space, (50, -44, -108), (26, 18, 20)), abdomen + 4), AIR + 40, edge)
    paint(image, np.maximum(np.abs(trunk.diaphragm - 2) - 2, trunk.cavity + 2), MUSCLE, edge)
    return image + 6 * waves(space, rng, 45, 4) * (image > -200)


def _heart_and_vessels(image: Field, boxes: Boxes, person: Subject, trunk: Trunk, rng: np.random.Generator) -> None:
    (hx, hy, hz), (rx, ry, rz), axes = person.heart, person.heart_radii, person.heart_axes
    box, near = boxes.around((-70, -80, -110), (95, 80, 100))
    view, edge, heart = image[box], near.edge_mm, trunk.heart[box]
    blood, muscle = BLOOD + person.contrast_hu, MUSCLE + 0.35 * person.contrast_hu
    arch = ((hx - 10, hy + 8, hz + 20), (-12, -22, 28), (-6, -8, 52), (14, 20, 54), (22, 40, 36), (24, 46, -110))
    aorta = tube(near, arch, 12.5)
    lung_artery = tube(near, ((hx + 8, hy - 6, hz + 24), (14, -18, 22), (20, 4, 26), (36, 14, 20)), 11)
    right_artery = tube(near, ((14, -12, 24), (-14, 4, 16), (-38, 10, 10)), 9)
    cava = tube(near, ((hx - 44, hy + 14, hz + 12), (-32, -8, 30), (-26, -16, 80)), 8.5)
    neck = join(tube(near, ((-8, -10, 52), (-24, -4, 100)), 6), tube(near, ((12, 12, 54), (22, 10, 105)), 5), 3)
    for vessel, gain in ((cava, 1.1), (right_artery, 1.0), (lung_artery, 1.0), (neck, 0.9), (aorta, 0.95)):
        paint(view, vessel, BLOOD + gain * person.contrast_hu, edge)
    paint(view, tube(near, ((4, 30, 100), (6, 36, -100)), 6), MUSCLE - 10, edge)  # oesophagus
    paint(view, heart - 3, FAT + 5, edge)
    paint(view, heart, muscle, edge)
    chambers = (  # centre and size along, across and up the heart's own axes, as shares of its radii
        ((0.28, 0.28, 0.05), (0.55, 0.52, 0.55)), ((0.2, -0.52, -0.1), (0.6, 0.36, 0.62)),
        ((-0.52, 0.42, 0.1), (0.36, 0.42, 0.5)), ((-0.55, -0.42, 0.0), (0.34, 0.42, 0.55)),
    )
    for place, share in chambers:
        centre = point(axes @ (np.asarray(place) * (rx, ry, rz)) + (hx, hy, hz))
        chamber = ellipsoid(near, centre, (share[0] * rx, share[1] * ry, share[2] * rz), 2, axes)
        paint(view, meet(chamber, heart + 3, 4), blood * rng.uniform(0.93, 1.05), edge)


def _ribs(image: Field, space: Space, trunk: Trunk) -> None:
    shell = np.abs(trunk.cavity - 6) < 9
    depth, x, y, z = (field[shell] for field in (trunk.cavity, space.x, space.y, space.z))
    forward = np.arctan2(np.abs(x) / 1.4, y) / np.pi  # 0 at the spine, 1 at the breastbone
    slot = (z + 92 * forward - 8) / RIB_PITCH_MM
    across = (slot - np.round(slot)) * RIB_PITCH_MM
    rib = ((np.hypot((depth - 6) / 4.2, across / 6.2) - 1) * 4.2).astype(np.float32)
    rib = np.maximum(rib, 26 - np.abs(x))
    cartilage = np.clip((forward - 0.84) / 0.06, 0, 1)
    marrow = np.clip(-rib / 3, 0, 1)
    value = (1 - cartilage) * (CORTEX - 20 - 330 * marrow) + cartilage * 130
    line = image[shell]
    paint(line, rib, value.astype(np.float32), space.edge_mm)
    image[shell] = line
    breastbone = ellipsoid(space, (0, -_front(trunk, space) - 7, 22), (17, 5.5, 74), 3)
    paint(image, breastbone, (330 + 160 * np.clip(1 + breastbone / 3, 0, 1)).astype(np.float32), space.edge_mm)


def _front(trunk: Trunk, space: Space) -> float:
    """How far in front of the body's middle (mm) the chest wall begins, behind the breastbone."""
    middle = (np.abs(space.x) < 12) & (np.abs(space.z) < 30) & (np.abs(trunk.cavity) < 4) & (space.y < 0)
    return float(-np.median(space.y[middle])) if middle.any() else 75.0


def _spine(image: Field, boxes: Boxes, person: Subject, trunk: Trunk) -> Field:
    """Draw vertebrae, discs and canal; returns the signed distance of the whole column, arches and canal included."""
    box, near = boxes.around((-42, 12, -1e3), (42, 130, 1e3))
    view, edge = image[box], near.edge_mm
    y = near.y - trunk.spine_y[box]
    slot = (near.z - person.vertebra_start_mm) / person.vertebra_mm
    along = (slot - np.round(slot)) * np.float32(person.vertebra_mm)  # height above the middle of the nearest vertebra
    waist = 1 + 0.09 * np.cos(2 * np.pi * slot + np.pi)
    straight = Space(near.x / waist, y / waist, np.zeros_like(y), edge)
    column = ellipsoid(straight, (0, 0, 0), (18, 14.5, np.inf), 2.4)
    body = meet(column, np.abs(along) - (person.vertebra_mm / 2 - 2.6), 2)
    local = Space(near.x, y, along, edge)
    canal = ellipsoid(local, (0, 22, 0), (10, 8, np.inf))
    arch = np.maximum(np.maximum(np.abs(canal - 3.2) - 3.2, np.abs(along + 1) - 8.5), 13 - y)
    tail = (y - 32) * np.float32(0.55)  # spinous processes slope down
    spinous = np.maximum(np.maximum(np.abs(near.x) - 5.5, np.abs(along + 3 + np.clip(tail, 0, 9)) - 8), np.abs(y - 37) - 8)
    wings = [capsule(local, (side * 10, 20, 1), (side * 21, 26, 1), 8.5, 7.0) for side in (-1, 1)]
    back = join(join(arch, spinous, 4), np.minimum(wings[0], wings[1]), 4)
    bone = join(body, back, 2)
    paint(view, column + 0.6, DISC, edge)
    marrow = np.clip(-bone / 3.2, 0, 1)
    paint(view, bone, (CORTEX - (CORTEX - MARROW) * marrow).astype(np.float32), edge)
    paint(view, canal + 0.8, 25, edge)
    spine = np.full(image.shape, 99, np.float32)
    spine[box] = np.minimum(join(column + 0.6, bone, 2), canal)
    return spine


def _lungs(image: Field, space: Space, trunk: Trunk, rng: np.random.Generator) -> None:
    blood_sinks = 28 * space.y / 70  # people lie on their backs
    air = LUNG + rng.uniform(-25, 35) + blood_sinks + 14 * waves(space, rng, 30, 5) + 10 * waves(space, rng, 14, 4)
    paint(image, trunk.lungs, air.astype(np.float32), space.edge_mm)
    inside = coverage(trunk.lungs + 1, space.edge_mm)
    slope = rng.uniform(0.7, 1.0)
    above = space.z + slope * space.y - 12 + 5 * np.sin(space.x / 25)  # height above the oblique fissure, times a constant
    flat = np.maximum(np.abs(space.z - 4 - 4 * np.sin(space.y / 28)), above)  # only the right lung has a middle lobe
    fissure = np.minimum(np.abs(above) / (1 + slope**2) ** 0.5, np.where(space.x < 0, flat, 9)) - 0.3
    image += inside * coverage(fissure, 2 * space.edge_mm) * 260


def _vessel_trees(image: Field, boxes: Boxes, lungs: Field, person: Subject, rng: np.random.Generator) -> None:
    """Arteries and veins that branch from each hilum outwards; inside the lungs only."""
    value = BLOOD + 0.9 * person.contrast_hu
    for side in (-1, 1):
        hilum = np.array((side * 30.0, 10.0, 12.0))
        buds = [(hilum + rng.normal(0, 3, 3), np.array((side * rng.uniform(0.5, 1), dy, dz)), rng.uniform(3.4, 4.6), 21.0)
                for dy, dz in FIRST_BRANCHES]
        while buds:
            start, direction, radius, length = buds.pop()
            unit = direction / (direction @ direction) ** 0.5
            end = start + unit * length * rng.uniform(0.75, 1.25)
            inside = _vessel(image, boxes, lungs, point(start), point(end), radius, value)
            if radius < 1.0 or not inside:
                continue
            sideways = rng.normal(size=3)
            sideways -= (sideways @ unit) * unit
            outward = (end - hilum) / max(((end - hilum) @ (end - hilum)) ** 0.5, 1.0)
            for turn in (-1, 1):
                heading = unit + turn * rng.uniform(0.35, 0.8) / (sideways @ sideways) ** 0.5 * sideways + 0.35 * outward
                buds.append((end, heading, radius * rng.uniform(0.68, 0.86), length * rng.uniform(0.76, 0.94)))


def _vessel(image: Field, boxes: Boxes, lungs: Field, start: Point, end: Point, radius: float, value: float) -> bool:
    """Draw one piece of a vessel; false when it lies outside the lungs."""
    low = point([min(a, b) - radius for a, b in zip(start, end, strict=True)])
    high = point([max(a, b) + radius for a, b in zip(start, end, strict=True)])
    box, near = boxes.around(low, high)
    if not near.x.size or lungs[box].max() <= 0:
        return False
    share = coverage(capsule(near, start, end, radius, radius * 0.85), near.edge_mm) * lungs[box]
    if radius < near.edge_mm / 2:  # a thin vessel fills only its cross-section's share of a voxel
        share *= min(1.0, np.pi * radius**2 / near.edge_mm**2 * 1.6)
    image[box] += share * (value - image[box])
    return True


def _airways(image: Field, boxes: Boxes) -> None:
    box, near = boxes.around((-60, -20, -10), (60, 60, 200))
    view, edge = image[box], near.edge_mm
    carina: Point = (-1, 18, 30)
    air = capsule(near, (-1, 6, 130), carina, 8.5, 8)
    for branch in (((-26, 16, 12), (-46, 18, 0)), ((30, 20, 10), (48, 22, -2))):
        air = join(air, join(capsule(near, carina, branch[0], 6.8, 5.8), capsule(near, branch[0], branch[1], 5.5, 4), 2), 4)
    paint(view, air - 1.6, MUSCLE - 15, edge)
    paint(view, air, AIR + 25, edge)


def _nodules(image: Field, boxes: Boxes, trunk: Trunk, person: Subject, rng: np.random.Generator) -> Field:
    """Draw the nodules; returns the share of each voxel that they fill."""
    share = np.zeros(image.shape, np.float32)
    inner, border = (np.argwhere((trunk.lungs > low) & (trunk.lungs < high)) for low, high in ((-40, -9), (-3.5, -1)))
    space = boxes.space
    for _ in range(person.nodules):
        radius = 6.0 + 5.0 * rng.beta(1.2, 1.6)
        places = border if rng.random() < 0.35 and len(border) else inner
        if not len(places):
            continue
        spot = tuple(places[rng.integers(len(places))])
        centre = np.array((space.x[spot], space.y[spot], space.z[spot]), np.float64)
        box, near = boxes.around(point(centre - 2 * radius), point(centre + 2 * radius))
        uneven = rng.uniform(0.82, 1.22, 3)
        radii = radius * uneven / np.cbrt(uneven.prod())
        axes = rotation(point(rng.uniform(0, 180, 3)))
        shape = ellipsoid(near, point(centre), point(radii), 2, axes)
        shape = shape + np.float32(0.13 * radius) * waves(near, rng, 2.2 * radius, 4)
        mine = coverage(meet(shape, trunk.lungs[box] - 0.5, 1), near.edge_mm)
        solid = rng.random() < 0.8
        image[box] += mine * ((rng.uniform(20, 110) if solid else rng.uniform(-480, -250)) - image[box])
        share[box] = np.maximum(share[box], mine)
    return share


def _scanned(image: Field, space: Space, rng: np.random.Generator) -> NDArray[np.int16]:
    """Add what the scanner does: blur, noise that is correlated in the slice, and sometimes a round field of view."""
    blurred = ndimage.gaussian_filter(image, (0.15, 0.35, 0.35))
    fine = ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), (0.2, 0.55, 0.55))
    coarse = ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), (0.3, 0.8, 1.8))
    shoulders = 1 + 1.2 * np.clip((space.z - 60) / 50, 0, 1)  # fewer photons pass the shoulders
    sigma = rng.uniform(10, 26)
    scanned = blurred + sigma * fine / fine.std() + 0.45 * sigma * shoulders * coarse / coarse.std()
    if rng.random() < 0.25:
        _, height, width = image.shape
        y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        reach = np.hypot(x, y * height / width)
        scanned[:, reach > 1.0] = -1024
    return np.asarray(np.clip(np.round(scanned), -1024, 3071), np.int16)
