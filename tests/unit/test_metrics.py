"""Metrics against scenes small enough to work out by hand and against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from autoseg.arrays import metrics
from autoseg.arrays.metrics import (
    Counts,
    confusion_matrix,
    default_tolerance_mm,
    examine,
    label_values,
    measure,
    overlap_metrics,
    target_counts,
)
from autoseg.arrays.surfaces import hausdorff_mm, surface_dice, surface_distances
from autoseg.types.report import COUNTS, DEFINITIONS, METRICS


def blob(rng, shape):
    from scipy.ndimage import gaussian_filter
    return gaussian_filter(rng.normal(size=shape), 1.2) > 0.05


def test_overlap_metrics_of_hand_counted_voxels():
    found = overlap_metrics(Counts(tp=6, fp=2, fn=4, tn=88), voxel_ml=0.5)
    assert found == {
        "dice": 12 / 18, "iou": 0.5, "sensitivity": 0.6, "specificity": 88 / 90, "precision": 0.75, "volume_error": -0.2,
        "volume_error_abs": 0.2, "volume_error_ml": -1.0, "n_reference": 10, "n_prediction": 8,
    }


@pytest.mark.parametrize(("counts", "undefined"), [
    (Counts(0, 0, 0, 9), {"dice", "iou", "sensitivity", "precision", "volume_error", "volume_error_abs", "volume_error_ml"}),
    (Counts(0, 3, 0, 6), {"sensitivity", "volume_error", "volume_error_abs"}),
    (Counts(0, 0, 3, 6), {"precision"}),
    (Counts(9, 0, 0, 0), {"specificity"}),
])
def test_ratios_without_a_denominator_are_undefined_and_never_nan(counts, undefined):
    found = overlap_metrics(counts, voxel_ml=1.0)
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


def test_cropping_to_the_union_changes_nothing():
    rng = np.random.default_rng(3)
    labels = [(blob(rng, (10, 12, 11)) * rng.integers(1, 4, (10, 12, 11))).astype(np.uint8) for _ in range(2)]
    found = measure(*labels, (2.0, 1.0, 0.5), [(str(v), (v,)) for v in (1, 2, 3)], 0.7)
    for value in (1, 2, 3):
        whole = surface_distances(labels[0] == value, labels[1] == value, (2.0, 1.0, 0.5))
        assert found[str(value)]["hd95"] == pytest.approx(hausdorff_mm(whole))
        assert found[str(value)]["nsd"] == pytest.approx(surface_dice(whole, 0.7))


def test_an_empty_mask_has_no_distance_and_no_surface_in_common():
    empty, full = np.zeros((4, 4, 4), np.uint8), np.ones((4, 4, 4), np.uint8)
    both = measure(empty, empty, (1, 1, 1), [("a", (1,))], 1)["a"]
    defined = {name: value for name, value in both.items() if value is not None}
    assert defined == {**dict.fromkeys(COUNTS, 0), "specificity": 1, "lesion_false_positives": 0}
    missed = measure(full, empty, (1, 1, 1), [("a", (1,))], 1)["a"]
    assert {name for name in METRICS if missed[name] is None} == {
        "specificity", "precision", "hd", "hd95", "assd", "lesion_precision"}
    assert missed["dice"] == missed["nsd"] == missed["lesion_f1"] == missed["lesion_recall"] == 0
    assert missed["volume_error_ml"] == -0.064
    spurious = measure(empty, full, (1, 1, 1), [("a", (1,))], 1)["a"]
    assert {name for name in METRICS if spurious[name] is None} == {
        "sensitivity", "volume_error", "volume_error_abs", "hd", "hd95", "assd", "lesion_recall"}
    assert spurious["dice"] == spurious["nsd"] == spurious["lesion_f1"] == spurious["lesion_precision"] == 0
    assert spurious["lesion_false_positives"] == 1


def test_every_metric_and_count_is_measured_and_defined():
    found = measure(np.ones((2, 2, 2), int), np.ones((2, 2, 2), int), (1, 1, 1), [("a", (1,))], 1)["a"]
    assert set(found) == {*METRICS, *COUNTS} and set(found) <= set(DEFINITIONS)
    assert not any(isinstance(value, np.generic) for value in found.values())


def test_a_single_slice_has_areas_and_no_volume():
    label = np.zeros((1, 20, 20), np.uint8)
    label[0, 2:6, 2:7] = 1
    found = examine(label, label, (999.0, 2.0, 2.0), [("a", (1,))], 1)
    assert found.metrics["a"]["volume_error_ml"] is None and found.metrics["a"]["volume_error"] == 0
    assert list(found.lesions["a"]) == ["0.1-1 cm2"]  # 20 pixels of 4 mm2


def test_regions_that_overlap_are_measured_as_if_each_were_alone():
    rng = np.random.default_rng(5)
    labels = [(blob(rng, (8, 9, 10)) * rng.integers(1, 4, (8, 9, 10))).astype(np.uint8) for _ in range(2)]
    regions = [("whole", (1, 2, 3)), ("core", (2, 3)), ("edge", (1, 3)), ("one", (1,)), ("two", (2,))]
    found = examine(*labels, (2.0, 1.0, 0.5), regions, 0.7)
    for name, values in regions:
        alone = examine(*(np.isin(label, values).astype(np.uint8) for label in labels), (2.0, 1.0, 0.5), [("it", (1,))], 0.7)
        assert found.metrics[name] == alone.metrics["it"] and found.lesions[name] == alone.lesions["it"]


def test_the_default_tolerance_is_one_voxel_in_plane():
    assert default_tolerance_mm((20, 256, 256), (5.0, 0.8, 0.9)) == 0.9
    assert default_tolerance_mm((256, 20, 256), (0.8, 5.0, 0.8)) == 0.8
    assert default_tolerance_mm((1, 256, 256), (999.0, 0.5, 0.25)) == 0.5
