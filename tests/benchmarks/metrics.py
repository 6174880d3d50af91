"""Evaluation against scipy label by label and against nnU-Net's, in alternation, equal values checked first.

    OMP_NUM_THREADS=1 python tests/benchmarks/metrics.py [--size 200] [--labels 25] [--repeats 1] [--peer PEER/bin/python]

Two scenes of `size`³ voxels of 1.5 x 0.8 x 0.9 mm: organs (ellipsoids apart from one another, small false ones beside them) and
parcels (the whole volume is divided among the labels, so that no voxel is background). All metrics: beside `metrics_baseline.py`.
Dice: beside nnU-Net's compute_metrics, which reads both files, masks every label and counts; ours reads the same files and
measures overlap. The second figure is without reading. PEER is an environment with nnunetv2; without it that part is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import metrics_baseline
import numpy as np
from scipy.ndimage import gaussian_filter

from autoseg.arrays.metrics import measure
from autoseg.files.images import read_label, write_label
from autoseg.types.geometry import Grid

SPACING = (1.5, 0.8, 0.9)
TOLERANCE = 1.0
CLOSE = 1e-6  # relative; our distances are float32

PEER = """
import json, sys, time
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, compute_tp_fp_fn_tn, region_or_label_to_mask
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
reference, prediction, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
labels, reader = list(range(1, count + 1)), SimpleITKIO()
arrays = [reader.read_seg(name)[0] for name in (reference, prediction)]
for line in sys.stdin:
    begin = time.perf_counter()
    if line.strip() == "files":
        found = compute_metrics(reference, prediction, reader, labels)["metrics"]
    else:
        found = {}
        for label in labels:
            tp, fp, fn, tn = compute_tp_fp_fn_tn(*(region_or_label_to_mask(array, label) for array in arrays))
            found[label] = {"Dice": 2 * tp / (2 * tp + fp + fn)}
    seconds = time.perf_counter() - begin
    print(json.dumps([seconds, {str(k): float(v["Dice"]) for k, v in found.items()}]), flush=True)
"""


def scene(kind: str, size: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """A reference and a prediction whose borders are shifted by smooth noise, uint8."""
    rng = np.random.default_rng(0)
    axes = [np.arange(size, dtype=np.float32) for _ in range(3)]
    wobble = [gaussian_filter(rng.normal(size=(size // 4,) * 3).astype(np.float32), 2) for _ in range(3)]
    shift = [np.kron(w, np.ones((4, 4, 4), np.float32)) * 25 for w in wobble]
    cells = int(np.ceil(labels ** (1 / 3)))
    places = np.stack(np.unravel_index(np.arange(labels), (cells,) * 3), 1)
    centres = (places + rng.uniform(0.4, 0.6, (labels, 3))) * size / cells
    radii = rng.uniform(0.25, 0.42, labels) * size / cells
    maps = []
    for moved in (False, True):
        best = np.full((size,) * 3, np.inf, np.float32)
        index = np.zeros((size,) * 3, np.uint8)
        z, y, x = (a.reshape(tuple(-1 if i == j else 1 for j in range(3))) + (s if moved else 0)
                   for i, (a, s) in enumerate(zip(axes, shift, strict=True)))
        for number, (centre, radius) in enumerate(zip(centres, radii, strict=True), start=1):
            distance = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2
            if kind == "organs":
                distance = np.where(distance < radius**2, distance, np.inf)
            index[distance < best] = number
            np.minimum(best, distance, out=best)
        maps.append(index)
    for array in maps:
        for corner in rng.integers(0, size - 3, (60, 3)):
            array[tuple(slice(c, c + 2) for c in corner)] = rng.integers(1, labels + 1)
    return maps[0], maps[1]


def timed(function: Callable[[], object]) -> tuple[float, object]:
    """Seconds and result."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def check(ours: dict, theirs: dict) -> float:
    """The largest relative difference of all values; exits when one is not equal."""
    worst = 0.0
    for name, values in theirs.items():
        for metric, value in values.items():
            found = ours[str(name)][metric]
            if (found is None) != (value is None):
                sys.exit(f"label {name}, {metric}: ours {found}, theirs {value}")
            if value is not None:
                difference = abs(found - value) / max(abs(value), 1e-9) if found != value else 0.0
                if difference > CLOSE:
                    sys.exit(f"label {name}, {metric}: ours {found}, theirs {value}")
                worst = max(worst, difference)
    return worst


def report(name: str, pairs: list[tuple[float, float]], note: str) -> None:
    """Print the medians and their ratio."""
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"{name}: ours {ours:.3f} s, theirs {theirs:.3f} s, ratio {ours / theirs:.4f} ({note})", flush=True)


def all_metrics(kind: str, reference: np.ndarray, prediction: np.ndarray, labels: int, repeats: int) -> None:
    """All metrics beside the baseline."""
    targets = [(str(value), (value,)) for value in range(1, labels + 1)]
    small = slice(0, 40)
    measure(reference[small], prediction[small], SPACING, targets, TOLERANCE)
    metrics_baseline.areas(SPACING)
    pairs, worst = [], 0.0
    for _ in range(repeats):
        mine, ours = timed(lambda: measure(reference, prediction, SPACING, targets, TOLERANCE))
        other, theirs = timed(
            lambda: metrics_baseline.measure(reference, prediction, SPACING, list(range(1, labels + 1)), TOLERANCE))
        worst = max(worst, check(ours, theirs))
        pairs.append((mine, other))
    report(f"{kind}, all metrics, {labels} labels, {reference.shape[0]}³", pairs, f"largest relative difference {worst:.0e}")


def dice_only(kind: str, reference: np.ndarray, prediction: np.ndarray, labels: int, repeats: int, peer: str) -> None:
    """Dice of files and of arrays beside nnU-Net's."""
    targets = [(str(value), (value,)) for value in range(1, labels + 1)]

    def overlap(pair: tuple[np.ndarray, np.ndarray]) -> dict:
        return measure(*pair, SPACING, targets, TOLERANCE, surfaces=False)

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.nii.gz" for name in ("reference", "prediction")]
        for path, array in zip(paths, (reference, prediction), strict=True):
            write_label(path, array, Grid(shape=array.shape, spacing=SPACING))
        command = [peer, "-c", PEER, *map(str, paths), str(labels)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            work = {"files": lambda: overlap((read_label(paths[0])[0], read_label(paths[1])[0])),
                    "arrays": lambda: overlap((reference, prediction))}
            for name, ours in work.items():
                pairs = []
                for number in range(repeats + 1):
                    mine, found = timed(ours)
                    process.stdin.write(f"{name}\n")
                    process.stdin.flush()
                    answer = next(line for line in process.stdout if line.startswith("["))
                    other, theirs = json.loads(answer)
                    check(found, {label: {"dice": value} for label, value in theirs.items()})
                    if number:  # the first time warms up
                        pairs.append((mine, other))
                report(f"{kind}, Dice of {name}, {labels} labels, {reference.shape[0]}³", pairs, "nnU-Net")
            process.stdin.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--labels", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peer")
    parser.add_argument("--scenes", nargs="+", default=["organs", "parcels"])
    given = parser.parse_args()
    for kind in given.scenes:
        maps = scene(kind, given.size, given.labels)
        if given.peer:
            dice_only(kind, *maps, given.labels, max(given.repeats, 5), given.peer)
        all_metrics(kind, *maps, given.labels, given.repeats)
