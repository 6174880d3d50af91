"""All metrics the plain way, with scipy, label by label on the whole volume: what `metrics.py` measures against.

It shares no code with the package; the definitions are those of `autoseg.types.report.DEFINITIONS`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy.ndimage import correlate, distance_transform_edt, generate_binary_structure, label
from skimage.measure import marching_cubes, mesh_surface_area

KERNEL = np.array([[[1, 2], [4, 8]], [[16, 32], [64, 128]]], np.uint8)
CORNERS = generate_binary_structure(3, 3)


@cache
def areas(spacing: tuple[float, float, float]) -> np.ndarray:
    """Surface area in mm2 of each 2x2x2 neighbourhood."""
    table = np.zeros(256)
    for code in range(1, 255):
        block = np.array([(code >> bit) & 1 for bit in range(8)], np.float32).reshape(2, 2, 2)
        if code.bit_count() > 4:
            block = 1 - block
        vertices, faces, _, _ = marching_cubes(block, 0.5, spacing=spacing, method="lorensen")
        table[code] = mesh_surface_area(vertices, faces)
    return table


def percentile(distances: np.ndarray, weights: np.ndarray, percent: float) -> float:
    """The smallest distance within which `percent` of the weight lies."""
    order = np.argsort(distances)
    reached = np.cumsum(weights[order])
    return float(distances[order][np.searchsorted(reached, reached[-1] * percent / 100 * (1 - 1e-12))])


def surface(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, float, float], tolerance: float) -> dict:
    """HD, HD95, ASSD and NSD of two masks."""
    if not (reference.any() and prediction.any()):
        nsd = 0.0 if reference.any() or prediction.any() else None
        return {"hd": None, "hd95": None, "assd": None, "nsd": nsd}
    codes = [correlate(np.pad(mask, ((0, 1),) * 3).astype(np.uint8), KERNEL, mode="constant") for mask in (reference, prediction)]
    borders = [(code > 0) & (code < 255) for code in codes]
    sides = []
    for code, border, other in zip(codes, borders, borders[::-1], strict=True):
        sides.append((distance_transform_edt(~other, sampling=spacing)[border], areas(spacing)[code[border]]))
    whole = sum(weights.sum() for _, weights in sides)
    return {
        "hd": max(float(distances.max()) for distances, _ in sides), "hd95": max(percentile(*side, 95) for side in sides),
        "assd": float(sum((distances * weights).sum() for distances, weights in sides) / whole),
        "nsd": float(sum(weights[distances <= tolerance * (1 + 1e-6)].sum() for distances, weights in sides) / whole),
    }


def lesions(reference: np.ndarray, prediction: np.ndarray) -> dict:
    """Lesion-wise recall, precision, F1 and counts of two masks."""
    (true, wanted), (given, predicted) = (label(mask, CORNERS) for mask in (reference, prediction))
    found = len(np.setdiff1d(np.unique(true[prediction]), [0]))
    right = len(np.setdiff1d(np.unique(given[reference]), [0]))
    return {
        "lesion_recall": found / wanted if wanted else None, "lesion_precision": right / predicted if predicted else None,
        "lesion_f1": 2 * found / (found + wanted + predicted - right) if wanted or predicted else None,
        "lesion_false_positives": predicted - right, "lesions_reference": wanted, "lesions_prediction": predicted,
        "lesions_found": found,
    }


def measure(
    reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, float, float], values: list[int], tolerance: float,
) -> dict[int, dict]:
    """All metrics of each label of two label maps (z, y, x)."""
    results = {}
    for value in values:
        r, p = reference == value, prediction == value
        tp, fp, fn, tn = (int(mask.sum()) for mask in (r & p, ~r & p, r & ~p, ~r & ~p))
        results[value] = {
            "dice": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None, "iou": tp / (tp + fp + fn) if tp + fp + fn else None,
            "sensitivity": tp / (tp + fn) if tp + fn else None, "specificity": tn / (tn + fp) if tn + fp else None,
            "precision": tp / (tp + fp) if tp + fp else None, "volume_error": (fp - fn) / (tp + fn) if tp + fn else None,
            "volume_error_abs": abs(fp - fn) / (tp + fn) if tp + fn else None,
            "volume_error_ml": (fp - fn) * float(np.prod(spacing)) / 1000 if tp + fp + fn else None,
            "n_reference": tp + fn, "n_prediction": tp + fp, **surface(r, p, spacing, tolerance), **lesions(r, p),
        }
    return results
