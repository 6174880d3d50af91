"""One resampling for rotation, scaling, mirroring and elastic deformation; images linearly, labels by the largest weight.

A label map is resampled as if each label's indicator were resampled linearly and the largest taken, which needs no indicators:
the weights of equal corners of a voxel's cell are added, and only where the 8 corners differ.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import grid_sample

from autoseg.trainers.augment.params import Elastic

TIE = 1e-6  # scores this close are a tie, which the nearest voxel settles
Patch = tuple[int, int, int]


@functools.cache
def compiled() -> ModuleType | None:
    """The compiled kernels, or None where numba or a place for its cache is missing."""
    try:
        from autoseg.trainers.augment import kernels

        kernels.warm_up()
    except (ImportError, RuntimeError, OSError):
        return None
    return kernels


def displacement(elastic: Elastic, patch: Patch, in_plane: bool, device: torch.device) -> torch.Tensor:
    """Shifts (3, *patch) float32 in voxels: a cubic B-spline over random knots, of mean 0 and of the drawn largest size."""
    rng = np.random.Generator(np.random.Philox(elastic.seed))
    free = (1, 2) if in_plane else (0, 1, 2)
    weights = [_spline(size, elastic.length if axis in free else 0.0, device) for axis, size in enumerate(patch)]
    knots = torch.from_numpy(rng.standard_normal((len(free), *(w.shape[1] for w in weights)), np.float32)).to(device)
    field = torch.zeros((3, *patch), device=device)
    for row, axis in enumerate(free):
        values = torch.einsum("abc,za,yb,xc->zyx", knots[row], *weights)
        values = values - values.mean()
        field[axis] = values * (elastic.strength * elastic.length * patch[axis] / values.abs().max().clamp_min(1e-12))
    return field


def _spline(size: int, length: float, device: torch.device) -> torch.Tensor:
    """Weights (size, knots) of a uniform cubic B-spline with knots every `length * size` voxels; of one knot for length 0."""
    if size == 1 or length == 0:
        return torch.ones(size, 1, device=device)
    position = np.arange(size) / max(length * size, 1.0)
    first = position.astype(int)
    t = position - first
    weights = np.zeros((size, int(first[-1]) + 4), np.float32)
    basis = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    for k, values in enumerate(basis):
        weights[np.arange(size), first + k] = values / 6
    return torch.from_numpy(weights).to(device)


def resample(
    image: torch.Tensor, labels: Sequence[torch.Tensor], centre: NDArray[np.float64], matrix: NDArray[np.float64],
    mirror: tuple[int, ...], shifts: torch.Tensor | None, patch: Patch,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Resample an image (channel, z, y, x) float32 and label maps (z, y, x) int16 of one crop into a patch.

    Patch voxel p, an offset from the patch's centre, is read at `centre + matrix @ (p + shifts[p])`; then the patch is mirrored.
    Points beyond the crop take the value of its border.
    """
    field = None
    if shifts is not None:
        field = torch.einsum("ab,bzyx->azyx", torch.from_numpy(matrix).to(shifts), shifts)
        field = torch.flip(field, [a + 1 for a in mirror]) if mirror else field
    matrix = matrix @ np.diag([-1.0 if axis in mirror else 1.0 for axis in range(3)])
    kernels = compiled() if image.device.type == "cpu" else None
    if kernels is None:
        return resample_anywhere(image, labels, centre, matrix, field, patch)
    shape = (int(image.shape[1]), int(image.shape[2]), int(image.shape[3]))
    maps = (torch.stack(list(labels)) if len(labels) > 1 else labels[0][None]).to(torch.int16)
    bend = np.empty((3, 0, 0, 0), np.float32) if field is None else field.contiguous().numpy()
    new_image, new_labels = torch.empty((len(image), *patch)), torch.empty((len(labels), *patch), dtype=torch.int16)
    kernels.resample(
        image.contiguous().view(len(image), -1).numpy(), maps.contiguous().view(len(labels), -1).numpy(), shape,
        np.ascontiguousarray(matrix), np.ascontiguousarray(centre, np.float64),
        bend, new_image.numpy(), new_labels.numpy(),
    )
    return new_image, list(new_labels)


def resample_anywhere(
    image: torch.Tensor, labels: Sequence[torch.Tensor], centre: NDArray[np.float64], matrix: NDArray[np.float64],
    field: torch.Tensor | None, patch: Patch, everywhere: bool | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same in torch, on any device; `matrix` includes the mirroring and `field` (3, *patch) is along the crop's axes.

    `everywhere`: also cells whose corners agree are voted in. By default only on a GPU, where to count the others would mean to
    wait for it; on a CPU voting in all of them takes longer.
    """
    everywhere = image.is_cuda if everywhere is None else everywhere
    sizes = image.shape[1:]
    place = torch.meshgrid([torch.arange(s, device=image.device) - (s - 1) / 2 for s in patch], indexing="ij")
    points = []
    for axis in range(3):
        at = sum(float(matrix[axis, i]) * place[i] for i in range(3)) + float(centre[axis])
        at = at if field is None else at + field[axis]
        points.append(torch.as_tensor(at).clamp(0, sizes[axis] - 1))
    grid = torch.stack([points[a] * (2 / max(sizes[a] - 1, 1)) - (1 if sizes[a] > 1 else 0) for a in (2, 1, 0)], -1)
    new_image = grid_sample(image[None], grid[None], mode="bilinear", padding_mode="border", align_corners=True)[0]
    lows = [p.floor().clamp_max(max(s - 2, 0)) for p, s in zip(points, sizes, strict=True)]
    shares = [p - low for p, low in zip(points, lows, strict=True)]
    flat = [x.reshape(-1) for x in shares]
    steps = [math.prod(sizes[a + 1 :]) if sizes[a] > 1 else 0 for a in range(3)]
    base = sum(low.long() * math.prod(sizes[a + 1 :]) for a, low in enumerate(lows))
    corner = torch.as_tensor(base).reshape(-1)
    return new_image, [_vote(label.reshape(-1), corner, steps, flat, everywhere).view(patch) for label in labels]


def _vote(
    label: torch.Tensor, corner: torch.Tensor, steps: Sequence[int], shares: Sequence[torch.Tensor], everywhere: bool
) -> torch.Tensor:
    """Per point the label with the largest sum of weights, among the 8 corners of its cell whose low corner is given."""
    offsets = [sum(s * h for s, h in zip(steps, high, strict=True)) for high in itertools.product((0, 1), repeat=3)]
    values = torch.stack([label[corner + offset] for offset in offsets])
    result = values[0].clone()
    mixed = slice(None) if everywhere else (values != values[:1]).any(0).nonzero().flatten()
    values, (fz, fy, fx) = values[:, mixed], [f[mixed] for f in shares]
    weights = torch.stack([
        (fz if z else 1 - fz) * (fy if y else 1 - fy) * (fx if x else 1 - fx) for z, y, x in itertools.product((0, 1), repeat=3)
    ])
    nearest = (fz > 0.5) * 4 + (fy > 0.5) * 2 + (fx > 0.5) * 1
    winner = values.gather(0, nearest[None])[0]
    best = (weights * (values == winner)).sum(0)
    for k in range(8):
        score = (weights * (values == values[k])).sum(0)
        better = score > best + TIE
        winner, best = torch.where(better, values[k], winner), torch.where(better, score, best)
    result[mixed] = winner
    return result
