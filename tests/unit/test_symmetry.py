"""Left and right: which labels are twins, along which axis they lie, and that no flip mixes them up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from autoseg.datasets.read import read_dataset
from autoseg.planners.symmetry import left_right, mirror_axes, pairs_by_name
from autoseg.stages.fingerprint import fingerprint
from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities, LabelFingerprint
from autoseg.types.labels import Label, Labels

OASIS = Path(__file__).resolve().parents[2] / "../shared/data/oasis_malf_2mm"
STATISTICS = Intensities(mean=0, median=0, std=1, min=0, max=1, percentile_99_5=1, percentile_00_5=0)
Centre = tuple[float, float, float]
Place = tuple[Centre | None, int]


def scene(names: Sequence[str], cases: Sequence[dict[str, Place]], source: str = "folder") -> tuple[Dataset, Fingerprint]:
    """A data set of 100 mm cubes of 1 mm voxels in which labels have these centres (z, y, x, shares) and volumes."""
    labels = Labels(foreground=tuple(Label(name=name, value=i + 1) for i, name in enumerate(names)))
    dataset = Dataset(name="d", source="folder", root="", channels=("a",), labels=labels, cases=())
    dataset = dataset.model_copy(update={"source": source})
    records = tuple(
        CaseFingerprint(
            case=f"c{i}", shape=(100, 100, 100), shape_after_crop=(100, 100, 100), spacing=(1, 1, 1), relative_size_after_crop=1,
            labels={name: LabelFingerprint(voxels=voxels, volume_ml=voxels / 1000, components=1, mean_intensity=(0,),
                                           std_intensity=(1,), centre=centre) for name, (centre, voxels) in case.items()},
        )
        for i, case in enumerate(cases)
    )
    return dataset, Fingerprint(cases=records, intensities=(STATISTICS,), median_relative_size_after_cropping=1)


def twins(left: str, right: str, x: float = 0.3, voxels: int = 1000) -> dict[str, Place]:
    """Two structures level with one another, left at higher x, as in LPS."""
    return {left: ((0.5, 0.5, 0.5 + x / 2), voxels), right: ((0.5, 0.5, 0.5 - x / 2), voxels)}


@pytest.mark.parametrize(("left", "right"), [
    ("Left-Hippocampus", "Right-Hippocampus"), ("kidney_left", "kidney_right"), ("LEFT KIDNEY", "right kidney"),
    ("Kidney (L)", "Kidney (R)"), ("kidney_L", "kidney_R"), ("L_Hippocampus", "R_Hippocampus"), ("KidneyL", "KidneyR"),
    ("LKidney", "RKidney"), ("leftKidney", "rightKidney"), ("leftlung", "rightlung"), ("lungleft", "lungright"),
    ("ctx-lh-bankssts", "ctx-rh-bankssts"), ("femur_sin", "femur_dex"), ("ren sinister", "ren dexter"), ("L", "R"),
    ("rib_left_1", "rib_right_1"), ("left", "right"), ("Left-Inf-Lat-Vent", "Right-Inf-Lat-Vent"), ("eye.lt", "eye.rt"),
    ("Niere links", "Niere rechts"),
])
def test_names_that_differ_only_in_the_side_are_a_pair(left: str, right: str) -> None:
    assert pairs_by_name(["tumour", right, left]) == [(left, right)]


@pytest.mark.parametrize("names", [
    ("LV", "RV"), ("L1", "R1"), ("vertebrae_L1", "rib_R1"), ("left kidney", "right lung"), ("left kidney", "spleen"),
    ("rib_left_1", "rib_right_2"), ("bright", "bleft"), ("left kidney", "left kidney tumour"), ("bulk", "burk"),
    ("class_1", "class_2"),
])
def test_other_names_are_no_pair(names: tuple[str, str]) -> None:
    assert pairs_by_name(names) == []


def test_twins_lying_apart_in_every_case_are_confirmed() -> None:
    found = left_right(*scene(["Left-Hippocampus", "Right-Hippocampus"], [twins("Left-Hippocampus", "Right-Hippocampus")] * 4))
    assert found is not None
    assert (found.axis, found.pairs, found.confirmed) == (2, (("Left-Hippocampus", "Right-Hippocampus"),), True)
    assert "along x in all 4 cases" in found.text
    assert "not mirrored along x" in found.text


def test_a_data_set_without_sides_has_none() -> None:
    assert left_right(*scene(["liver", "spleen"], [{"liver": ((0.5, 0.5, 0.4), 9), "spleen": ((0.5, 0.5, 0.6), 9)}])) is None


def test_the_axis_is_the_one_that_the_twins_lie_along() -> None:
    case: dict[str, Place] = {"lung_left": ((0.5, 0.7, 0.5), 900), "lung_right": ((0.52, 0.3, 0.49), 1000)}
    found = left_right(*scene(["lung_left", "lung_right"], [case] * 3))
    assert found is not None
    assert (found.axis, found.confirmed) == (1, True)
    assert "along y" in found.text


def test_distances_count_in_millimetres_not_in_shares_of_the_image() -> None:
    dataset, measured = scene(["eye_l", "eye_r"], [{"eye_l": ((0.6, 0.5, 0.55), 9), "eye_r": ((0.4, 0.5, 0.45), 9)}])
    flat = measured.cases[0].model_copy(update={"shape": (10, 100, 100), "spacing": (0.5, 2, 2)})
    found = left_right(dataset, measured.model_copy(update={"cases": (flat,)}))
    assert found is not None
    assert found.axis == 2


@pytest.mark.parametrize("source", ["folder", "fingerprint"])
def test_without_centres_names_alone_decide_and_the_text_says_so(source: str) -> None:
    cases: list[dict[str, Place]] = [{"kidney_left": (None, 9), "kidney_right": (None, 9)}, {}]
    found = left_right(*scene(["kidney_left", "kidney_right", "liver"], cases, source))
    assert found is not None
    assert (found.axis, found.pairs, found.confirmed) == (2, (("kidney_left", "kidney_right"),), False)
    assert "by name only" in found.text
    assert ("as stored" in found.text) == (source == "fingerprint")


def test_cases_whose_sides_look_swapped_are_named() -> None:
    cases = [twins("kidney_left", "kidney_right", x=-0.3 if i in (2, 5) else 0.3) for i in range(9)]
    found = left_right(*scene(["kidney_left", "kidney_right"], cases))
    assert found is not None
    assert (found.axis, found.confirmed) == (2, False)
    assert found.text.startswith("warning: ")
    assert "swapped in 2 of 9 cases (c2, c5)" in found.text


def test_one_crossed_pair_among_many_does_not_make_a_case_look_swapped() -> None:
    names = [f"{part}_{side}" for part in ("kidney", "lung", "vein") for side in ("left", "right")]
    both = {**twins("kidney_left", "kidney_right"), **twins("lung_left", "lung_right")}
    cases = [{**both, **twins("vein_left", "vein_right", x=-0.03)}, {**both, **twins("vein_left", "vein_right", x=0.03)}]
    found = left_right(*scene(names, cases))
    assert found is not None
    assert found.confirmed
    assert len(found.pairs) == 3


def test_twins_that_no_case_shows_apart_stay_unconfirmed() -> None:
    found = left_right(*scene(["knee_left", "knee_right"], [twins("knee_left", "knee_right", x=0.0)]))
    assert found is not None
    assert not found.confirmed
    one_sided: list[dict[str, Place]] = [{"knee_left": ((0.5, 0.5, 0.5), 9)}, {"knee_right": ((0.5, 0.5, 0.5), 9)}]
    found = left_right(*scene(["knee_left", "knee_right"], one_sided))
    assert found is not None
    assert (found.axis, found.confirmed) == (2, False)


HEART: dict[str, Place] = {
    "left ventricle": ((0.5, 0.6, 0.62), 1000), "right ventricle": ((0.5, 0.4, 0.38), 1100),
    "heart_atrium_left": ((0.6, 0.7, 0.55), 600), "heart_atrium_right": ((0.6, 0.5, 0.3), 700),
}


def test_chambers_of_the_heart_are_no_twins() -> None:
    assert left_right(*scene(list(HEART), [HEART] * 5)) is None
    unmeasured: dict[str, Place] = {name: (None, voxels) for name, (_, voxels) in HEART.items()}
    assert left_right(*scene(list(HEART), [unmeasured] * 5)) is None


def test_ventricles_of_the_brain_are_twins() -> None:
    names = ["Left-Lateral-Ventricle", "Right-Lateral-Ventricle"]
    found = left_right(*scene(names, [twins(names[0], names[1], x=0.2, voxels=500)] * 5))
    assert found is not None
    assert found.confirmed
    found = left_right(*scene(names, [{names[0]: (None, 500), names[1]: (None, 500)}]))
    assert found is not None
    level = left_right(*scene(["left ventricle", "right ventricle"], [twins("left ventricle", "right ventricle")] * 5))
    assert level is not None, "names leave it open, geometry shows twins"


def test_organs_beside_the_heart_are_found_without_its_chambers() -> None:
    names = ["lung_left", "lung_right", *HEART]
    found = left_right(*scene(names, [{**twins("lung_left", "lung_right"), **HEART}] * 3))
    assert found is not None
    assert found.pairs == (("lung_left", "lung_right"),)


def test_parts_of_unlike_size_are_no_mirror_images_but_lesions_are() -> None:
    liver: dict[str, Place] = {"liver left lobe": ((0.5, 0.4, 0.6), 300), "liver right lobe": ((0.5, 0.5, 0.3), 1300)}
    assert left_right(*scene(list(liver), [liver] * 4)) is None
    lesions: list[dict[str, Place]] = [
        {"lesion_left": ((0.5, 0.5, 0.7), size), "lesion_right": ((0.5, 0.5, 0.3), 1000)} for size in (10, 900, 20000)]
    assert left_right(*scene(["lesion_left", "lesion_right"], lesions)) is not None


TURN = math.pi  # the largest turn in the plane of 2D and thin 3D patches


@pytest.mark.parametrize(("patch", "transpose", "axis", "expected"), [
    ((96, 96, 96), (0, 1, 2), 2, (0, 1)), ((96, 96, 96), (0, 1, 2), 0, (1, 2)), ((96, 96, 96), (1, 0, 2), 0, (0, 2)),
    ((64, 64), (0, 1, 2), 2, ()), ((64, 64), (1, 0, 2), 0, ()), ((64, 64), (2, 0, 1), 2, None),
    ((16, 256, 256), (0, 1, 2), 2, (0,)), ((16, 256, 256), (2, 0, 1), 2, (1, 2)), ((64, 192, 192), (0, 1, 2), 1, (0, 2)),
])
def test_flips_that_would_swap_sides_are_left_out(
    patch: tuple[int, ...], transpose: tuple[int, int, int], axis: int, expected: tuple[int, ...] | None,
) -> None:
    found = left_right(*scene(["eye_l", "eye_r"], [twins("eye_l", "eye_r")]))
    assert found is not None
    found = type(found)(axis, found.pairs, found.confirmed, found.text)
    assert mirror_axes(found, transpose, patch) == expected
    assert mirror_axes(None, transpose, patch) is None


def test_a_half_turn_and_a_flip_are_the_other_flip() -> None:
    flip_y, flip_x = np.diag([-1, 1]), np.diag([1, -1])
    turn = np.array([[math.cos(TURN), -math.sin(TURN)], [math.sin(TURN), math.cos(TURN)]])
    assert np.allclose(turn @ flip_y, flip_x)


@pytest.mark.real_data
@pytest.mark.skipif(not OASIS.is_dir(), reason="the real data is not here")
def test_the_eleven_pairs_of_a_brain_atlas_are_found_and_confirmed() -> None:
    dataset, _ = read_dataset(OASIS)
    assert dataset is not None
    some = dataset.model_copy(update={"cases": dataset.cases[:6]})
    measured = fingerprint(some, threads=0)
    found = left_right(some, measured)
    assert found is not None
    assert (found.axis, found.confirmed, len(found.pairs)) == (2, True, 11)
    assert all(right == left.replace("Left", "Right") for left, right in found.pairs)
    centres = [case.labels for case in measured.cases]
    for labels, (left, right) in itertools.product(centres, found.pairs):
        if left in labels and right in labels:
            a, b = labels[left].centre, labels[right].centre
            assert a is not None
            assert b is not None
            assert a[2] > b[2]
