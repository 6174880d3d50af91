"""Resampling and restoring against the usual ways, in alternation, one thread, the agreement checked first.

    OMP_NUM_THREADS=1 python tests/benchmarks/arrays.py [--repeats 5]

Image: 200³ float32 -> 150³, cubic; beside it skimage.transform.resize(order=3, mode="edge", anti_aliasing=False) in float64,
which nnU-Net calls. Labels: 25 classes, float16 logits (classes, 128³) -> labels 200³, on organ-like logits (a few percent of
the cells have corners of different classes); beside it torch's trilinear interpolation of the whole tensor, then argmax.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from skimage.transform import resize

from autoseg.arrays.resample import resample_image
from autoseg.arrays.restore import restore_labels
from autoseg.types.case import Placement
from autoseg.types.geometry import AxisMap, Grid


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> None:
    ours()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, kept in zip((ours, theirs), times, strict=True):
            begin = time.perf_counter()
            function()
            kept.append(time.perf_counter() - begin)
    a, b = (statistics.median(kept) for kept in times)
    print(f"{name}: ours {a * 1000:.0f} ms, theirs {b * 1000:.0f} ms, ratio {a / b:.3f}")


def images(repeats: int) -> None:
    rng = np.random.default_rng(0)
    image = torch.nn.functional.avg_pool3d(torch.from_numpy(rng.normal(size=(1, 1, 200, 200, 200)).astype(np.float32)), 3, 1, 1)[
        0
    ].numpy()
    new = (150, 150, 150)
    spacing = (1.0, 1.0, 1.0), (200 / 150,) * 3

    def ours() -> np.ndarray:
        return resample_image(image, new, *spacing)

    def theirs() -> np.ndarray:
        return resize(image[0].astype(float), new, order=3, mode="edge", anti_aliasing=False)

    worst = np.abs(ours()[0] - theirs()).max() / image.std()
    assert worst < 1e-3, f"images differ by {worst} standard deviations"
    compare(f"cubic resampling 200³ -> 150³ (largest difference {worst:.1e} standard deviations)", ours, theirs, repeats)


def labels(repeats: int, classes: int = 25) -> None:
    rng = np.random.default_rng(1)
    points = np.indices((128, 128, 128)).reshape(3, -1).T.astype(np.float32)
    logits = np.full((classes, 128, 128, 128), -4, np.float32)
    logits[0] = 0
    for index in range(1, classes):
        centre, radius = rng.uniform(20, 108, 3), rng.uniform(6, 16)
        logits[index] = (radius - np.linalg.norm(points - centre, axis=1)).reshape(128, 128, 128).clip(-6, 6)
    tensor = torch.from_numpy(logits).half()
    grid = Grid(shape=(200, 200, 200), spacing=(1.0, 1.0, 1.0))
    whole = ((0, 200), (0, 200), (0, 200))
    axis_map = AxisMap((0, 1, 2), (False, False, False))
    placement = Placement(grid, axis_map, (0, 1, 2), whole, grid.spacing, (128, 128, 128), (200 / 128,) * 3)

    def ours() -> np.ndarray:
        return restore_labels(tensor, placement)

    def theirs() -> np.ndarray:
        dense = torch.nn.functional.interpolate(tensor[None].float(), size=(200, 200, 200), mode="trilinear", align_corners=False)
        return dense[0].argmax(0).numpy()

    different = float((ours() != theirs()).mean())
    assert different < 1e-6, f"{different} of the voxels differ"
    compare(f"{classes} classes 128³ -> labels 200³ ({different:.1e} of voxels differ)", ours, theirs, repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    images(given.repeats)
    labels(given.repeats)
