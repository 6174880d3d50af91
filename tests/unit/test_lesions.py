"""Lesions counted by hand and against scipy's labelling, label by label."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import generate_binary_structure, label

from autoseg.arrays import lesions
from autoseg.arrays.lesions import find_lesions, lesion_counts, lesion_metrics
from autoseg.types.report import LesionCount, lesion_classes


def line(*values):
    return np.array(values, np.uint8).reshape(1, 1, -1)


def test_found_missed_and_false_lesions_counted_by_hand():
    reference = line(1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1)
    prediction = line(0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0)
    found = lesion_metrics(*find_lesions(reference, prediction))  # one prediction meets two lesions, two meet the third
    assert found == {
        "lesion_recall": 0.75, "lesion_precision": 0.75, "lesion_f1": 0.75, "lesion_false_positives": 1,
        "lesions_reference": 4, "lesions_prediction": 4, "lesions_found": 3,
    }


def test_one_voxel_in_common_is_enough_and_touching_is_not():
    assert lesion_metrics(*find_lesions(line(1, 1, 1, 0, 0), line(0, 0, 1, 1, 1)))["lesion_f1"] == 1
    apart = lesion_metrics(*find_lesions(line(1, 1, 1, 0, 0), line(0, 0, 0, 1, 1)))
    assert apart["lesion_f1"] == apart["lesion_recall"] == apart["lesion_precision"] == 0 and apart["lesion_false_positives"] == 1


def test_voxels_of_another_target_do_not_make_a_lesion_found():
    reference, prediction = find_lesions(line(1, 1, 0, 2, 2), line(2, 2, 0, 2, 0))
    assert lesion_metrics(reference.of(1), prediction.of(1))["lesion_recall"] == 0
    two = lesion_metrics(reference.of(2), prediction.of(2))
    assert two["lesion_recall"] == 1 and two["lesion_precision"] == 0.5


def test_empty_masks_leave_undefined_what_has_no_denominator():
    nothing, something = line(0, 0, 0), line(0, 1, 0)
    both = lesion_metrics(*find_lesions(nothing, nothing))
    assert both["lesion_recall"] is both["lesion_precision"] is both["lesion_f1"] is None and both["lesion_false_positives"] == 0
    missed = lesion_metrics(*find_lesions(something, nothing))
    assert missed["lesion_recall"] == missed["lesion_f1"] == 0 and missed["lesion_precision"] is None
    spurious = lesion_metrics(*find_lesions(nothing, something))
    assert spurious["lesion_precision"] == spurious["lesion_f1"] == 0 and spurious["lesion_recall"] is None


def test_lesions_are_counted_in_the_class_of_their_own_size():
    reference = np.zeros((3, 12, 40), np.uint8)
    reference[1, 1:11, 1:11] = reference[1, 1, 20] = reference[1, 5, 30:40] = 1  # 100 voxels, 1 voxel, 10 voxels
    prediction = np.zeros_like(reference)
    prediction[1, 1, 1] = prediction[1, 10, 20:24] = prediction[1, 5, 30:40] = 1  # 4 voxels are false
    counts = lesion_counts(*find_lesions(reference, prediction), 0.01, "ml")
    assert counts == {
        "0.01-0.1 ml": LesionCount(reference=1, found=0, prediction=2, false=1),
        "0.1-1 ml": LesionCount(reference=1, found=1, prediction=1, false=0),
        "1-10 ml": LesionCount(reference=1, found=1, prediction=0, false=0),
    }
    assert list(counts) == [name for name in lesion_classes("ml") if name in counts]


def test_the_borders_of_the_classes_belong_to_the_larger_class():
    assert lesion_classes("ml") == ("<0.01 ml", "0.01-0.1 ml", "0.1-1 ml", "1-10 ml", ">=10 ml")
    for voxels, name in ((9, "<0.01 ml"), (10, "0.01-0.1 ml"), (99, "0.01-0.1 ml"), (100, "0.1-1 ml"), (10000, ">=10 ml")):
        row = np.ones((1, 1, voxels), np.uint8)
        assert list(lesion_counts(*find_lesions(row, row), 0.001, "ml")) == [name]


@pytest.mark.parametrize("shape", [(9, 10, 11), (1, 30, 30), (1, 1, 60)])
def test_all_targets_at_once_equal_scipy_label_by_label(shape, monkeypatch):
    monkeypatch.setattr(lesions, "CHUNK", 97)
    rng = np.random.default_rng(0)
    maps = [rng.choice(np.arange(6, dtype=np.uint8), shape, p=[0.7, 0.06, 0.06, 0.06, 0.06, 0.06]) for _ in range(2)]
    reference, prediction = find_lesions(*maps)
    for target in range(1, 6):
        masks = [array == target for array in maps]
        parts = [label(mask, generate_binary_structure(3, 3)) for mask in masks]
        for (numbers, count), other, found in zip(parts, masks[::-1], (reference.of(target), prediction.of(target)), strict=True):
            sizes = np.bincount(numbers.ravel(), minlength=count + 1)[1:]
            met = np.isin(np.arange(1, count + 1), numbers[other])
            assert sorted(zip(sizes, met, strict=True)) == sorted(zip(found.voxels, found.met, strict=True))
