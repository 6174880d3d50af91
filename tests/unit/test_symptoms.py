"""What kind of errors a mask has, on scenes whose numbers are counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from autoseg.arrays.misfits import explain_misfit
from autoseg.arrays.symptoms import measure_symptoms

A, B = ("a", (1,)), ("b", (2,))


def box(shape, *boxes):
    """A label map with boxes (value, low, high)."""
    array = np.zeros(shape, np.uint8)
    for value, low, high in boxes:
        array[tuple(slice(i, j) for i, j in zip(low, high, strict=True))] = value
    return array


CUBE = box((30, 30, 30), (1, (10, 10, 10), (20, 20, 20)))


def one(reference, prediction, spacing=(1.0, 1.0, 1.0), **options):
    return measure_symptoms(reference, prediction, spacing, [A], **options).targets["a"]


def test_a_perfect_mask_has_no_errors():
    found = one(CUBE, CUBE)
    assert (found.tp, found.fp, found.fn) == (1000, 0, 0)
    assert set(found.explained.values()) == {(0, 0)}
    assert found.bias_voxels == 0 and found.balance == 0 and found.nsd == 1 and found.hd95_voxels == 0
    assert found.jumps == 0 and found.far_voxels is None
    assert [(o.voxels, o.depth_voxels, o.found) for o in found.objects] == [(1000, 5.0, True)]


def test_a_cube_that_grew_by_a_voxel_has_a_boundary_one_voxel_outside():
    grown = box(CUBE.shape, (1, (9, 9, 9), (21, 21, 21)))
    found = one(CUBE, grown)
    assert found.balance == 1 and found.near == 1
    assert found.bias_voxels == pytest.approx((12**3 - 1000) / 600, rel=0.15)  # edges are cut off: the area is below 600
    assert one(grown, CUBE).balance == -1 and one(grown, CUBE).bias_voxels < -0.7


@pytest.mark.parametrize("scale", [0.1, 1.0, 25.0])
def test_shifts_are_in_voxels_whatever_the_voxel_size(scale):
    grown = box(CUBE.shape, (1, (9, 9, 9), (21, 21, 21)))
    once, again = one(CUBE, grown), one(CUBE, grown, (scale, scale, scale))
    assert again.bias_voxels == pytest.approx(once.bias_voxels) and again.hd95_voxels == pytest.approx(once.hd95_voxels)


def test_an_object_that_was_not_touched_is_missed_and_does_not_shift_the_boundary():
    reference = box((30, 30, 40), (1, (10, 10, 10), (20, 20, 20)), (1, (2, 2, 32), (5, 5, 35)))
    found = one(reference, CUBE_WIDE)
    assert found.explained["missed"] == (0, 27) and found.bias_voxels == 0
    assert sorted((o.voxels, o.depth_voxels, o.found) for o in found.objects) == [(27, 2.0, False), (1000, 5.0, True)]
    assert found.dice() == pytest.approx(2000 / 2027) and found.dice(["missed"]) == 1


CUBE_WIDE = box((30, 30, 40), (1, (10, 10, 10), (20, 20, 20)))


def test_an_object_of_which_less_than_a_tenth_is_found_is_missed():
    touched = np.zeros_like(CUBE)
    touched[10, 10:20, 10:19] = 1
    assert not one(CUBE, touched).objects[0].found
    touched[10, 10:20, 19] = 1
    assert one(CUBE, touched).objects[0].found


def test_a_false_object_is_far_beyond_five_voxels_and_belongs_to_the_boundary_nearer():
    far = CUBE.copy()
    far[10:12, 10:12, 26:28] = 1
    found = one(CUBE, far)
    assert found.explained["far"] == (8, 0) and found.far_voxels == 7 and found.dice(["far"]) == 1
    near = CUBE.copy()
    near[10:12, 10:12, 23:25] = 1
    assert one(CUBE, near).explained["far"] == (0, 0)


def test_a_false_object_where_there_is_none_is_far_at_no_distance():
    found = one(np.zeros_like(CUBE), CUBE)
    assert found.explained["far"] == (1000, 0) and found.far_voxels is None and found.reference == 0 and found.dice() == 0


def test_swapped_voxels_are_counted_beyond_the_border_of_the_two_labels():
    reference = box((10, 10, 20), (1, (0, 0, 0), (10, 10, 10)), (2, (0, 0, 10), (10, 10, 20)))
    prediction = reference.copy()
    prediction[:5, :, :10] = 2
    found = measure_symptoms(reference, prediction, (1, 1, 1), [A, B], [(A, B)])
    assert found.swaps == {("a", "b"): pytest.approx(5 * 10 * 8 / 2000)}  # two columns at the border do not count
    assert found.targets["a"].explained["swapped"] == (0, 400) and found.targets["b"].explained["swapped"] == (400, 0)


def test_labels_exchanged_altogether_are_nothing_but_swapped():
    reference = box((12, 12, 30), (1, (2, 2, 2), (10, 10, 10)), (2, (2, 2, 20), (10, 10, 28)))
    exchanged = np.choose(reference, [0, 2, 1]).astype(np.uint8)
    exchanged[1, 1, 1:11] = 2  # one voxel too far, in the wrong name
    found = measure_symptoms(reference, exchanged, (1, 1, 1), [A, B], [(A, B)])
    assert found.swaps["a", "b"] == 1
    assert all(t.explained["far"] == (0, 0) and t.dice(["swapped"]) > 0.98 for t in found.targets.values())


def test_without_a_pair_nothing_is_swapped():
    reference = box((12, 12, 30), (1, (2, 2, 2), (10, 10, 10)), (2, (2, 2, 20), (10, 10, 28)))
    assert measure_symptoms(reference, reference, (1, 1, 1), [A, B]).swaps == {}


def test_a_slice_that_is_moved_or_left_out_jumps_and_is_mended():
    moved, left_out = CUBE.copy(), CUBE.copy()
    moved[14] = np.roll(CUBE[14], 3, 1)
    left_out[14] = 0
    for prediction in (moved, left_out):
        found = one(CUBE, prediction, slice_axis=0)
        assert found.jumps == pytest.approx(1 / 6) and found.jumps_in_plane == 0  # 10 slices, two at each end cannot be told
        assert found.dice() < 1 and found.dice(["jumps"]) == 1 and found.nsd == 1


def test_a_slanted_mask_does_not_jump():
    slanted = np.stack([np.roll(plane, z // 2, 1) for z, plane in enumerate(CUBE)])
    assert one(CUBE, slanted, slice_axis=0).jumps == 0


def test_the_slice_axis_is_the_coarsest_unless_given():
    moved = CUBE.copy()
    moved[:, 14] = np.roll(CUBE[:, 14], 3, 1)
    assert one(CUBE, moved, (1.0, 1.5, 1.0)).jumps > 0 and one(CUBE, moved, (1.5, 1.0, 1.0)).jumps == 0


def test_two_dimensional_masks_are_measured_in_the_plane():
    found = measure_symptoms(CUBE[14:15], CUBE[14:15], (999.0, 1.0, 1.0), [A])
    target = found.targets["a"]
    assert found.dims == 2 and target.nsd == 1 and target.jumps is None and target.objects[0].voxels == 100
    grown = box((1, 30, 30), (1, (0, 9, 9), (1, 21, 21)))
    assert one(CUBE[14:15], grown, (999.0, 1.0, 1.0)).bias_voxels == pytest.approx(44 / 40, rel=0.1)


def test_an_object_of_one_slice_in_a_volume_is_a_volume():
    flat = box((9, 20, 20), (1, (4, 5, 5), (5, 15, 15)))
    found = one(flat, flat, (5.0, 1.0, 1.0))
    assert found.nsd == 1 and found.bias_voxels == 0


def test_ignored_voxels_are_no_errors():
    reference, prediction = CUBE.copy(), CUBE.copy()
    reference[:5] = 9
    prediction[:5, :5, :5] = 1
    found = one(reference, prediction, ignore=9)
    assert (found.fp, found.fn) == (0, 0)


def test_nothing_in_both_masks_leaves_everything_undefined():
    found = one(np.zeros_like(CUBE), np.zeros_like(CUBE))
    assert found.dice() is None and found.sensitivity() is None and found.precision() is None and found.nsd is None


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        one(CUBE, CUBE[1:])


@pytest.mark.parametrize("seed", range(8))
def test_mending_never_removes_more_errors_than_there_are(seed):
    rng = np.random.default_rng(seed)
    coarse = [rng.integers(0, 3, (5, 5, 5)) * (rng.random((5, 5, 5)) < 0.4) for _ in range(2)]
    reference, prediction = (np.kron(c, np.ones((4, 4, 4), int)).astype(np.uint8) for c in coarse)
    found = measure_symptoms(reference, prediction, (2.0, 1.0, 1.0), [A, B], [(A, B)])
    for name, target in found.targets.items():
        value = dict([A, B])[name]
        assert target.tp == ((reference == value) & (prediction == value)).sum()
        assert target.fp + target.tp == (prediction == value).sum() and target.reference == (reference == value).sum()
        kinds = tuple(target.explained)
        tp, fp, fn = target.counts(kinds)
        assert min(fp, fn) >= 0 and tp + fn == target.reference
        assert (target.dice(kinds) or 0) >= (target.dice() or 0)


def test_a_misfit_is_explained_by_what_undoes_it():
    reference = box((20, 20, 24), (1, (2, 3, 4), (9, 12, 20)), (2, (12, 4, 3), (18, 9, 12)))
    values = (1, 2)
    assert explain_misfit(reference, np.zeros_like(reference), values) == "the prediction is empty"
    assert "flipped along z" in explain_misfit(reference, reference[::-1], values)
    assert "flipped along y and x" in explain_misfit(reference, reference[:, ::-1, ::-1], values)
    assert "moved by about 2 along z, 4 along x voxels" in explain_misfit(reference, np.roll(reference, (2, 4), (0, 2)), values)
    assert "2 stands for 1, 1 stands for 2" in explain_misfit(reference, np.choose(reference, [0, 2, 1]), values)
    assert explain_misfit(reference, reference, values) == ""
    assert explain_misfit(np.zeros_like(reference), reference, values) == ""
