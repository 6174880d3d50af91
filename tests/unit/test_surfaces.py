"""Surface distances against scenes small enough to work out by hand and against brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from autoseg.arrays import surfaces
from autoseg.arrays.metrics import measure
from autoseg.arrays.surfaces import (
    element_sizes,
    hausdorff_mm,
    mean_distance_mm,
    surface_dice,
    surface_distances,
    surface_metrics,
    surfaces_of,
)

ROOT2, ROOT3 = np.sqrt(2), np.sqrt(3)


def box(shape, *sides):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


def blob(rng, shape):
    from scipy.ndimage import gaussian_filter
    return gaussian_filter(rng.normal(size=shape), 1.2) > 0.05


def corner_points(mask, spacing):
    """Positions and neighbourhood codes of all mixed voxel corners, by plain loops."""
    padded = np.pad(mask, 1)
    points, codes = [], []
    for corner in np.ndindex(*(n - 1 for n in padded.shape)):
        values = [padded[tuple(np.add(corner, offset))] for offset in product((0, 1), repeat=mask.ndim)]
        if 0 < sum(values) < len(values):
            points.append(np.multiply(corner, spacing))
            codes.append(sum(int(v) << bit for bit, v in enumerate(values)))
    return np.array(points), np.array(codes)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.7, 0.8)])
def test_the_surface_of_a_box_is_faces_bevelled_edges_and_cut_corners(spacing):
    sz, sy, sx = spacing
    mask = box((8, 9, 10), (1, 6), (2, 8), (3, 7))
    z, y, x = 4 * sz, 5 * sy, 3 * sx
    faces = 2 * (y * x + z * x + z * y)
    edges = 4 * (z * np.hypot(sy, sx) + y * np.hypot(sz, sx) + x * np.hypot(sz, sy)) / 2
    corners = 8 * np.sqrt((sy * sx) ** 2 + (sz * sx) ** 2 + (sz * sy) ** 2) / 8
    found = surface_distances(mask, mask, spacing)
    assert found.reference_size.sum() == pytest.approx(faces + edges + corners, rel=1e-6)
    assert not found.reference_mm.any() and not found.prediction_mm.any()


def test_element_sizes_at_unit_spacing():
    sizes = element_sizes((1.0, 1.0, 1.0))
    assert sizes[0] == sizes[255] == 0
    assert sizes[0b00000001] == pytest.approx(ROOT3 / 8)
    assert sizes[0b00000011] == pytest.approx(ROOT2 / 2)
    assert sizes[0b00001111] == pytest.approx(1)
    np.testing.assert_allclose(sizes, sizes[::-1])
    contour = element_sizes((3.0, 4.0))
    assert contour.tolist() == [0, 2.5, 2.5, 4, 2.5, 3, 5, 2.5, 2.5, 5, 3, 2.5, 4, 2.5, 2.5, 0]


@pytest.mark.parametrize(("axis", "expected"), [(0, 3 * 2.5), (1, 3 * 0.5), (2, 3 * 1.25)])
def test_a_box_that_is_three_voxels_longer_is_three_spacings_away(axis, expected):
    sides = [(2, 6), (2, 6), (2, 6)]
    reference = box((12, 12, 12), *sides)
    sides[axis] = (2, 9)
    prediction = box((12, 12, 12), *sides)
    distances = surface_distances(reference, prediction, (2.5, 0.5, 1.25))
    assert hausdorff_mm(distances) == pytest.approx(expected)
    assert hausdorff_mm(distances, 100) == pytest.approx(expected)
    found = measure(reference.astype(int), prediction.astype(int), (2.5, 0.5, 1.25), [("box", (1,))], 1.0)["box"]
    assert found["hd95"] == pytest.approx(expected) and found["dice"] == pytest.approx(2 * 64 / (64 + 112))


def test_normalised_surface_distance_of_two_strips_worked_out_by_hand():
    reference, prediction = box((1, 10, 60), (0, 1), (0, 4), (0, 50)), box((1, 10, 60), (0, 1), (0, 6), (0, 50))
    distances = surface_distances(reference, prediction, (999.0, 1.0, 1.0))
    whole = (104 + 2 * ROOT2) + (108 + 2 * ROOT2)
    outside = 47 + (49 + ROOT2)  # the reference's long edge away from its ends, the prediction's long edge with its corners
    assert surface_dice(distances, 1.0) == pytest.approx((whole - outside) / whole)
    assert surface_dice(distances, 2.0) == 1
    assert hausdorff_mm(distances) == 2


def test_a_single_slice_is_measured_in_plane_whatever_its_depth():
    rng = np.random.default_rng(1)
    a, b = blob(rng, (1, 30, 30)), blob(rng, (1, 30, 30))
    flat = surface_distances(a[0], b[0], (0.5, 2.0))
    for depth in (0.1, 999.0):
        deep = surface_distances(a, b, (depth, 0.5, 2.0))
        assert hausdorff_mm(deep) == hausdorff_mm(flat) and surface_dice(deep, 1) == surface_dice(flat, 1)


def test_the_percentile_weighs_surface_elements_by_their_size():
    distances = surfaces.SurfaceDistances(np.array([1.0, 2.0, 7.0]), np.array([90.0, 5.0, 5.0]), np.array([0.5]), np.array([1.0]))
    assert hausdorff_mm(distances) == 2 and hausdorff_mm(distances, 96) == 7 and hausdorff_mm(distances, 50) == 1


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.6, 1.1)])
def test_surface_distances_equal_those_between_all_pairs_of_points(spacing):
    rng = np.random.default_rng(2)
    for _ in range(3):
        a, b = blob(rng, (6, 8, 7)), blob(rng, (6, 8, 7))
        (points_a, codes_a), (points_b, codes_b) = corner_points(a, spacing), corner_points(b, spacing)
        between = cdist(points_a, points_b)
        found = surface_distances(a, b, spacing)
        np.testing.assert_allclose(found.reference_mm, np.sort(between.min(1)), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.prediction_mm, np.sort(between.min(0)), rtol=1e-6, atol=1e-6)
        sizes = element_sizes(spacing)
        near = sizes[codes_a][between.min(1) <= 1.3].sum() + sizes[codes_b][between.min(0) <= 1.3].sum()
        assert surface_dice(found, 1.3) == pytest.approx(near / (sizes[codes_a].sum() + sizes[codes_b].sum()), rel=1e-6)


def test_a_distance_of_exactly_the_tolerance_is_within_it():
    for step in (0.1, 0.3, 0.7, 1 / 3, 1.5625):
        a, b = box((1, 20, 20), (0, 1), (5, 10), (5, 10)), box((1, 20, 20), (0, 1), (5, 10), (6, 11))
        assert surface_dice(surface_distances(a, b, (999, step, step)), step) == 1


def test_two_single_voxels_are_eight_corners_each():
    reference, prediction = box((9, 5, 5), (2, 3), (2, 3), (2, 3)), box((9, 5, 5), (5, 6), (2, 3), (2, 3))
    found = surface_metrics(surface_distances(reference, prediction, (2.0, 0.7, 0.9)), 4.5)
    assert found["hd"] == found["hd95"] == 6.0  # the far corners of either voxel are three steps away, the near ones two
    assert found["assd"] == pytest.approx(5.0) and found["nsd"] == pytest.approx(0.5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_that_are_shifted_by_four_voxels(axis):
    """Slabs that fill the image in-plane, three and seven voxels thick; masks are closed at the image's border."""
    shape, spacing = (12, 12, 12), (2.5, 0.5, 1.25)
    sides = [(0, n) for n in shape]
    sides[axis] = (0, 3)
    reference = box(shape, *sides)
    sides[axis] = (0, 7)
    prediction = box(shape, *sides)
    found = surface_distances(reference, prediction, spacing)
    across = [spacing[i] for i in range(3) if i != axis]
    inner = min(3 * spacing[axis], *(6 * s for s in across))  # to the face that both share, or to the nearest border
    assert found.reference_mm.max() == pytest.approx(inner)
    assert found.prediction_mm.max() == hausdorff_mm(found, 100) == pytest.approx(4 * spacing[axis])


def test_average_distance_of_two_strips_worked_out_by_hand():
    reference, prediction = box((10, 60), (0, 4), (0, 50)), box((10, 60), (0, 6), (0, 50))
    found = surface_distances(reference, prediction, (1.0, 1.0))
    from_reference = 47 * 2 + 2 * 1  # the long edge, but for its ends where the prediction's short edges are nearer
    from_prediction = 49 * 2 + 2 * (ROOT2 / 2) * 2 + 2 * 1  # the long edge, its two corners, one point of each short edge
    lengths = (104 + 2 * ROOT2) + (108 + 2 * ROOT2)
    assert mean_distance_mm(found) == pytest.approx((from_reference + from_prediction) / lengths)


def test_concentric_spheres_are_apart_by_the_difference_of_their_radii():
    spacing = (1.5, 1.0, 0.8)
    points = np.stack(np.meshgrid(*((np.arange(n) + 0.5) * s for n, s in zip((40, 56, 70), spacing, strict=True)), indexing="ij"))
    radius = np.sqrt(((points - np.array([30, 28, 28])[:, None, None, None]) ** 2).sum(0))
    found = surface_distances(radius < 15, radius < 21, spacing)
    diagonal = float(np.linalg.norm(spacing))
    assert hausdorff_mm(found, 100) == pytest.approx(6, abs=diagonal)
    assert hausdorff_mm(found) == pytest.approx(6, abs=diagonal / 2)
    assert mean_distance_mm(found) == pytest.approx(6, abs=diagonal / 2)
    assert surface_dice(found, 6 + diagonal) == 1 and surface_dice(found, 6 - diagonal) == 0
    counts = [float((radius < r).sum() * np.prod(spacing)) for r in (15, 21)]
    np.testing.assert_allclose(counts, [4 / 3 * np.pi * r**3 for r in (15, 21)], rtol=0.01)
    both = measure((radius < 15).astype(int), (radius < 21).astype(int), spacing, [("s", (1,))], 1, surfaces=False)["s"]
    assert both["dice"] == pytest.approx(2 * 15**3 / (15**3 + 21**3), rel=0.01)
    assert both["volume_error_ml"] == pytest.approx(4 / 3 * np.pi * (21**3 - 15**3) / 1000, rel=0.01)


def test_distances_do_not_depend_on_which_mask_is_the_reference():
    rng = np.random.default_rng(7)
    a, b = blob(rng, (9, 14, 12)), blob(rng, (9, 14, 12))
    one, other = (surface_metrics(surface_distances(*pair, (2.0, 0.9, 1.1)), 1.0) for pair in ((a, b), (b, a)))
    assert one == pytest.approx(other)


def test_without_any_surface_every_distance_is_undefined():
    empty, full = np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)
    neither = surface_metrics(surface_distances(empty, empty, (1.0, 1.0, 1.0)), 1.0)
    assert neither == {"hd": None, "hd95": None, "assd": None, "nsd": None}
    for pair in ((empty, full), (full, empty)):
        found = surface_distances(*pair, (1.0, 1.0, 1.0))
        assert surface_metrics(found, 1.0) == {"hd": None, "hd95": None, "assd": None, "nsd": 0.0}


@pytest.mark.parametrize("shape", [(7, 9, 8), (11, 13)])
def test_all_targets_at_once_have_the_surfaces_that_loops_find(shape, monkeypatch):
    monkeypatch.setattr(surfaces, "CHUNK", 150)
    rng = np.random.default_rng(4)
    index = np.where(rng.random(shape) < 0.5, rng.integers(1, 5, shape), 0).astype(np.uint8)
    index[index == 3] = 0
    for number, found in enumerate(surfaces_of(index, 4), start=1):
        if number == 3:
            assert len(found.codes) == found.corners.size == 0
            continue
        points, codes = corner_points(index == number, (1,) * len(shape))
        order = np.lexsort(found.corners[::-1])
        np.testing.assert_array_equal(found.corners[:, order].T, points)
        np.testing.assert_array_equal(found.codes[order], codes)


def test_the_ways_to_a_distance_agree(monkeypatch):
    rng = np.random.default_rng(6)
    for shape, spacing in (((12, 15, 14), (2.5, 0.7, 0.9)), ((40, 50), (0.3, 1.7))):
        a, b = blob(rng, shape), blob(rng, shape)
        found = []
        for limit, places in ((0, 1), (np.inf, 1), (0, 1000)):  # a tree, a transform, looking places up
            monkeypatch.setattr(surfaces, "VOXELS_PER_POINT", limit)
            monkeypatch.setattr(surfaces, "NEAR_PLACES", places)
            surfaces._near_offsets.cache_clear()
            found.append(surface_distances(a, b, spacing))
        surfaces._near_offsets.cache_clear()
        for name in ("reference_mm", "prediction_mm"):
            for other in found[1:]:
                np.testing.assert_allclose(getattr(found[0], name), getattr(other, name), rtol=1e-6)
