"""Write metrics_peers.json: what two well-known packages measure on scenes made from a seed.

    python -m venv peers && peers/bin/pip install "numpy<2" "scipy<1.15" surface-distance==0.1 medpy==0.5.2
    peers/bin/python tests/golden/make_metrics_peers.py
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np

TOLERANCES_MM = (0.45, 1.3, 2.9)
SPACINGS = ((1.0, 1.0, 1.0), (5.0, 0.7, 0.8), (0.6, 2.0, 1.1))


def balls(rng, shape, spacing, count):
    """Ellipsoids at random places, as (count, z y x radius) in mm."""
    extent = np.multiply(shape, spacing)
    radii = rng.uniform(0.08, 0.22, count) * extent.min() + 0.5 * max(spacing)
    return np.column_stack([rng.uniform(0.15, 0.85, (count, len(shape))) * extent, radii])


def draw(shape, spacing, centres):
    """A mask of the voxels whose centre lies in a ball."""
    axes = np.meshgrid(*((np.arange(n) + 0.5) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    mask = np.zeros(shape, bool)
    for *centre, radius in centres:
        mask |= sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) < radius**2
    return mask


def scene(seed):
    """Spacing, reference and prediction of scene `seed`: the prediction's balls are moved, one is lost and one is new."""
    rng = np.random.default_rng(seed)
    spacing = SPACINGS[seed % 3]
    flat = seed >= 6
    shape = tuple(int(n) for n in rng.integers(18, 30, 3))[flat:]
    spacing = spacing[flat:]
    truth = balls(rng, shape, spacing, 4)
    moved = truth + rng.normal(scale=0.6, size=truth.shape)
    return spacing, draw(shape, spacing, truth), draw(shape, spacing, np.vstack([moved[1:], balls(rng, shape, spacing, 1)]))


def surface_distance_values(spacing, reference, prediction):
    """What surface-distance 0.1 measures."""
    import surface_distance

    found = surface_distance.compute_surface_distances(reference, prediction, spacing)
    forth, back = surface_distance.compute_average_surface_distance(found)
    areas = [float(found[name].sum()) for name in ("surfel_areas_gt", "surfel_areas_pred")]
    return {
        "area_reference": areas[0], "area_prediction": areas[1], "average_from_reference": float(forth),
        "average_from_prediction": float(back), "hd": float(surface_distance.compute_robust_hausdorff(found, 100)),
        "hd95": float(surface_distance.compute_robust_hausdorff(found, 95)),
        "nsd": [float(surface_distance.compute_surface_dice_at_tolerance(found, mm)) for mm in TOLERANCES_MM],
        "dice": float(surface_distance.compute_dice_coefficient(reference, prediction)),
    }


def medpy_values(spacing, reference, prediction):
    """What MedPy 0.5.2 measures; objects share a corner at least, as ours do.

    Its obj_tpr divides by the objects of the prediction and its obj_fpr by those of the reference (three lesions, one of them
    found, nothing else: obj_tpr 1, obj_fpr 2/3), so that they are a precision and a missed share.
    """
    from medpy.metric import binary

    objects = {"connectivity": reference.ndim}
    return {
        "dice": float(binary.dc(prediction, reference)), "iou": float(binary.jc(prediction, reference)),
        "sensitivity": float(binary.sensitivity(prediction, reference)),
        "specificity": float(binary.specificity(prediction, reference)),
        "precision": float(binary.precision(prediction, reference)), "volume_error": float(binary.ravd(prediction, reference)),
        "hd": float(binary.hd(prediction, reference, spacing)), "hd95": float(binary.hd95(prediction, reference, spacing)),
        "assd": float(binary.assd(prediction, reference, spacing)),
        "lesion_recall": 1 - float(binary.obj_fpr(prediction, reference, **objects)),
        "lesion_precision": float(binary.obj_tpr(prediction, reference, **objects)),
    }


def main():
    """Measure every scene with both packages."""
    from importlib.metadata import version

    scenes = []
    for seed in range(9):
        spacing, reference, prediction = scene(seed)
        scenes.append({
            "seed": seed, "spacing_mm": spacing, "voxels": [int(reference.sum()), int(prediction.sum())],
            "surface_distance": surface_distance_values(spacing, reference, prediction),
            "medpy": medpy_values(spacing, reference, prediction),
        })
    sources = {name: version(name) for name in ("surface-distance", "medpy", "numpy", "scipy")}
    text = json.dumps({"sources": sources, "tolerances_mm": TOLERANCES_MM, "scenes": scenes}, indent=1)
    Path(__file__).with_name("metrics_peers.json").write_text(text + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    main()
