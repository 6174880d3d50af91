"""Metrics beside those of surface-distance and MedPy on the same scenes: equal where the definitions are, explained where not.

surface-distance (Nikolov et al. 2018) measures as we do: points on voxel corners, weighted by marching cubes area. Everything
agrees; it gives the two directed averages, of which ASSD is the mean weighted by area. A distance equal to the tolerance counts
as within it in both, but distances there are compared exactly, so the scenes' tolerances avoid ties.

MedPy counts voxels as we do (Dice to volume error agree). Its surface is the set of border voxels' centres, each of the same
weight, so its distances are others. HD differs by at most one voxel diagonal: each border voxel has a surface corner within half
a diagonal and each surface corner a border voxel. HD95 there is the interpolated 95th percentile of both directions pooled, here
the larger of the two directed ones, weighted by area. ASSD there is the mean over border voxels, here over surface area. Its
objects are mapped one to one, so that of two lesions that meet the same object one is missed, here both are found; without such
cases they agree (its names for the two shares are swapped, see make_metrics_peers.py).
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import generate_binary_structure, label

from autoseg.arrays.metrics import measure
from autoseg.arrays.surfaces import surface_dice, surface_distances

HERE = Path(__file__).parent
PEERS = json.loads((HERE / "metrics_peers.json").read_text())
MAKE = runpy.run_path(str(HERE / "make_metrics_peers.py"))
CLOSE = 1e-6  # relative

scenes = pytest.mark.parametrize("kept", PEERS["scenes"], ids=lambda kept: f"scene-{kept['seed']}")


def drawn(kept):
    spacing, reference, prediction = MAKE["scene"](kept["seed"])
    assert [int(reference.sum()), int(prediction.sum())] == kept["voxels"] and list(spacing) == kept["spacing_mm"]
    return spacing, reference, prediction


def ours(spacing, reference, prediction):
    if reference.ndim == 2:
        spacing, reference, prediction = (7.0, *spacing), reference[None], prediction[None]
    return measure(reference.astype(np.uint8), prediction.astype(np.uint8), spacing, [("it", (1,))], 1.0)["it"]


@scenes
def test_surface_distance_agrees_in_everything(kept):
    spacing, reference, prediction = drawn(kept)
    peer, found = kept["surface_distance"], ours(spacing, reference, prediction)
    distances = surface_distances(reference, prediction, spacing)
    areas = distances.reference_size.sum(), distances.prediction_size.sum()
    assert areas == pytest.approx((peer["area_reference"], peer["area_prediction"]), rel=CLOSE)
    assert found["hd"] == pytest.approx(peer["hd"], rel=CLOSE) and found["hd95"] == pytest.approx(peer["hd95"], rel=CLOSE)
    assert found["dice"] == pytest.approx(peer["dice"], rel=CLOSE)
    averages = peer["average_from_reference"], peer["average_from_prediction"]
    assert found["assd"] == pytest.approx(np.dot(areas, averages) / sum(areas), rel=CLOSE)
    assert [surface_dice(distances, mm) for mm in PEERS["tolerances_mm"]] == pytest.approx(peer["nsd"], rel=CLOSE)


@scenes
def test_medpy_agrees_in_what_counts_voxels(kept):
    found = ours(*drawn(kept))
    for name in ("dice", "iou", "sensitivity", "specificity", "precision", "volume_error"):
        assert found[name] == pytest.approx(kept["medpy"][name], rel=CLOSE)


@scenes
def test_medpys_hausdorff_distance_is_within_a_voxel_diagonal(kept):
    spacing, reference, prediction = drawn(kept)
    assert abs(ours(spacing, reference, prediction)["hd"] - kept["medpy"]["hd"]) <= np.linalg.norm(spacing) * (1 + CLOSE)


@scenes
def test_medpys_lesions_agree_where_no_two_meet_the_same_one(kept):
    spacing, reference, prediction = drawn(kept)
    peer, found = kept["medpy"], ours(spacing, reference, prediction)
    parts = [label(mask, generate_binary_structure(mask.ndim, mask.ndim))[0] for mask in (reference, prediction)]
    pairs = np.unique(np.stack([part[reference & prediction] for part in parts]), axis=1)
    one_to_one = all(len(np.unique(side)) == pairs.shape[1] for side in pairs)
    for name in ("lesion_recall", "lesion_precision"):
        assert found[name] >= peer[name] - CLOSE
        if one_to_one:
            assert found[name] == pytest.approx(peer[name])


def test_a_shifted_box_is_as_far_away_as_medpy_says():
    """Where surfaces are the same up to a shift along an axis, centres and corners of voxels are equally far apart."""
    reference, prediction = np.zeros((2, 14, 14, 14), np.uint8)
    reference[3:7, 4:9, 4:9] = prediction[6:10, 4:9, 4:9] = 1
    assert measure(reference, prediction, (2.5, 1, 1), [("it", (1,))], 1)["it"]["hd"] == 7.5  # MedPy 0.5.2: 7.5


def test_the_distance_of_two_voxels_runs_between_centres_there_and_between_faces_here():
    reference, prediction = np.zeros((2, 9, 5, 5), np.uint8)
    reference[2, 2, 2] = prediction[5, 2, 2] = 1
    found = measure(reference, prediction, (2, 1, 1), [("it", (1,))], 1)["it"]
    assert (found["hd"], found["assd"]) == (6.0, pytest.approx(5.0))  # MedPy 0.5.2: hd 6.0, assd 6.0


@scenes
def test_the_packages_still_say_what_was_kept(kept):
    pytest.importorskip("surface_distance")
    pytest.importorskip("medpy")
    scene = drawn(kept)
    assert MAKE["surface_distance_values"](*scene) == pytest.approx(kept["surface_distance"], rel=CLOSE)
    assert MAKE["medpy_values"](*scene) == pytest.approx(kept["medpy"], rel=CLOSE)
