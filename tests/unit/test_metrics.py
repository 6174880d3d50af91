"""Metrics against scenes small enough to work out by hand and against brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from autoseg.arrays import metrics
from autoseg.arrays.metrics import (
    Counts,
    confusion_matrix,
    default_tolerance_mm,
    element_sizes,
    hausdorff_mm,
    label_values,
    measure,
    overlap_metrics,
    surface_dice,
    surface_distances,
    target_counts,
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


def test_overlap_metrics_of_hand_counted_voxels():
    found = overlap_metrics(Counts(tp=6, fp=2, fn=4, tn=88))
    assert found == {
        "dice": 12 / 18, "iou": 0.5, "sensitivity": 0.6, "specificity": 88 / 90, "precision": 0.75, "volume_error": -0.2,
        "n_reference": 10, "n_prediction": 8,
    }


@pytest.mark.parametrize(("counts", "undefined"), [
    (Counts(0, 0, 0, 9), {"dice", "iou", "sensitivity", "precision", "volume_error"}),
    (Counts(0, 3, 0, 6), {"sensitivity", "volume_error"}),
    (Counts(0, 0, 3, 6), {"precision"}),
    (Counts(9, 0, 0, 0), {"specificity"}),
])
def test_ratios_without_a_denominator_are_undefined_and_never_nan(counts, undefined):
    found = overlap_metrics(counts)
    assert {name for name, value in found.items() if value is None} == undefined
    if counts.fp or counts.fn:
        assert found["dice"] == found["iou"] == 0


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_values_are_found_and_counted_in_every_integer_type(kind, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)
    rng = np.random.default_rng(0)
    limits = np.iinfo(kind)
    values = np.array([v for v in (0, 1, 5, 120, 255, -3, 40000, 3_000_000, -70000) if limits.min <= v <= limits.max])
    reference, prediction = (rng.choice(values, (3, 5, 6)).astype(kind) for _ in range(2))
    assert label_values(reference) == tuple(sorted({int(v) for v in np.unique(reference)}))
    targets = [(str(v), (int(v),)) for v in values if v != 0]
    found = measure(reference, prediction, (1, 1, 1), targets, 1, surfaces=False)
    for name, (value,) in targets:
        r, p = reference == value, prediction == value
        assert found[name]["n_reference"] == r.sum() and found[name]["n_prediction"] == p.sum()
        assert found[name]["dice"] == pytest.approx(2 * (r & p).sum() / (r.sum() + p.sum()))
        assert found[name]["specificity"] == pytest.approx((~r & ~p).sum() / (~r).sum())


def test_a_confusion_matrix_counts_pairs():
    matrix = confusion_matrix(np.array([0, 1, 2, 2, 1], np.uint8), np.array([0, 2, 2, 1, 1], np.uint8), 3)
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert target_counts(matrix, [1]) == Counts(1, 1, 1, 2)
    assert target_counts(matrix, [1, 2]) == Counts(4, 0, 0, 1)


def test_regions_count_the_union_of_their_values():
    reference = np.array([[[1, 1, 2, 0, 0, 0]]])
    prediction = np.array([[[1, 2, 2, 2, 0, 0]]])
    found = measure(reference, prediction, (1, 1, 1), [("whole", (1, 2)), ("core", (2,))], 1)
    assert found["whole"]["dice"] == 6 / 7 and found["core"]["dice"] == 0.5
    assert found["whole"]["volume_error"] == pytest.approx(1 / 3)


def test_ignored_voxels_are_in_neither_mask_and_not_counted():
    reference = np.array([[[1, 1, 9, 9, 0, 0]]], np.uint8)
    prediction = np.array([[[1, 1, 1, 1, 1, 0]]], np.uint8)
    found = measure(reference, prediction, (1, 1, 1), [("one", (1,))], 1, ignore=9)["one"]
    assert (found["n_reference"], found["n_prediction"]) == (2, 3)
    assert found["dice"] == 0.8 and found["specificity"] == 0.5
    everything = measure(reference, np.where(reference == 9, 1, reference), (1, 1, 1), [("one", (1,))], 1, ignore=9)["one"]
    assert everything["dice"] == 1 and everything["hd95"] == 0 and everything["nsd"] == 1


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"one shape, found \(1, 2, 2\) and \(1, 2, 3\)"):
        measure(np.zeros((1, 2, 2), int), np.zeros((1, 2, 3), int), (1, 1, 1), [("a", (1,))], 1)


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
    distances = metrics.SurfaceDistances(np.array([1.0, 2.0, 7.0]), np.array([90.0, 5.0, 5.0]), np.array([0.5]), np.array([1.0]))
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


def test_cropping_to_the_union_changes_nothing():
    rng = np.random.default_rng(3)
    labels = [(blob(rng, (10, 12, 11)) * rng.integers(1, 4, (10, 12, 11))).astype(np.uint8) for _ in range(2)]
    found = measure(*labels, (2.0, 1.0, 0.5), [(str(v), (v,)) for v in (1, 2, 3)], 0.7)
    for value in (1, 2, 3):
        whole = surface_distances(labels[0] == value, labels[1] == value, (2.0, 1.0, 0.5))
        assert found[str(value)]["hd95"] == pytest.approx(hausdorff_mm(whole))
        assert found[str(value)]["nsd"] == pytest.approx(surface_dice(whole, 0.7))


def test_a_distance_of_exactly_the_tolerance_is_within_it():
    for step in (0.1, 0.3, 0.7, 1 / 3, 1.5625):
        a, b = box((1, 20, 20), (0, 1), (5, 10), (5, 10)), box((1, 20, 20), (0, 1), (5, 10), (6, 11))
        assert surface_dice(surface_distances(a, b, (999, step, step)), step) == 1


def test_an_empty_mask_has_no_distance_and_no_surface_in_common():
    empty, full = np.zeros((4, 4, 4), np.uint8), np.ones((4, 4, 4), np.uint8)
    both = measure(empty, empty, (1, 1, 1), [("a", (1,))], 1)["a"]
    assert both["hd95"] is None and both["nsd"] is None and both["dice"] is None and both["specificity"] == 1
    for reference, prediction in ((empty, full), (full, empty)):
        one = measure(reference, prediction, (1, 1, 1), [("a", (1,))], 1)["a"]
        assert one["hd95"] is None and one["nsd"] == 0 and one["dice"] == 0
    assert hausdorff_mm(surface_distances(empty > 0, full > 0, (1, 1, 1))) is None


def test_the_default_tolerance_is_one_voxel_in_plane():
    assert default_tolerance_mm((20, 256, 256), (5.0, 0.8, 0.9)) == 0.9
    assert default_tolerance_mm((256, 20, 256), (0.8, 5.0, 0.8)) == 0.8
    assert default_tolerance_mm((1, 256, 256), (999.0, 0.5, 0.25)) == 0.5
