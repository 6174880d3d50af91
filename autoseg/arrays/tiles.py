"""Sliding windows: where the tiles lie is decided first, then a forward function is applied and blended."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

STEP = 0.5  # of the patch (nnU-Net's default)
SIGMA = 1 / 8  # of the patch


@dataclass(frozen=True)
class Tiling:
    """Tiles of one image: `padded` is the image's shape after centred padding to the patch, `before` the padding in front."""

    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    padded: tuple[int, int, int]
    before: tuple[int, int, int]
    starts: tuple[tuple[int, int, int], ...]


def starts_along(size: int, patch: int, step: float = STEP) -> list[int]:
    """Evenly spread tile starts along one axis, at most step x patch (at least 1) apart, first at 0, last flush with the end."""
    if size <= patch:
        return [0]
    count = math.ceil((size - patch) / max(1.0, patch * step)) + 1  # a patch one voxel thick (2D) visits every slice once
    return [round(i * (size - patch) / (count - 1)) for i in range(count)]


def make_tiling(shape: tuple[int, int, int], patch: tuple[int, int, int], step: float = STEP) -> Tiling:
    """Decide the tiles of an image of `shape`, z, y, x."""
    missing = [max(0, p - s) for s, p in zip(shape, patch, strict=True)]
    padded = [s + m for s, m in zip(shape, missing, strict=True)]
    axes = [starts_along(s, p, step) for s, p in zip(padded, patch, strict=True)]
    return Tiling(
        shape,
        patch,
        (padded[0], padded[1], padded[2]),
        (missing[0] // 2, missing[1] // 2, missing[2] // 2),
        tuple(itertools.product(axes[0], axes[1], axes[2])),
    )


@lru_cache(maxsize=16)
def gaussian_weight(patch: tuple[int, int, int]) -> torch.Tensor:
    """Blending weight (z, y, x) float32: a Gaussian of sigma = patch / 8 around the middle voxel, peak 1.

    It has no floor: at the image's border only edges of tiles meet, and there too the tile whose middle is nearer must win.
    """
    weight = torch.ones(1)
    for size in patch:
        offset = torch.arange(size, dtype=torch.float32) - size // 2
        weight = weight[..., None] * torch.exp(-0.5 * (offset / max(size * SIGMA, 1e-6)) ** 2)
    return weight[0]  # at the corners exp(-24), far from where float32 ends


@lru_cache(maxsize=16)
def half_weight(patch: tuple[int, int, int]) -> torch.Tensor:
    """The same Gaussian as nnU-Net keeps it: float16, peak 10, nowhere zero."""
    weight = (10 * gaussian_weight(patch)).half()
    return weight.clamp_min(weight[weight > 0].min().item())


def sliding_window(
    image: torch.Tensor,
    tiling: Tiling,
    forward: Callable[[torch.Tensor], torch.Tensor],
    batch: int,
    advance: Callable[[int], None] = lambda n: None,
    store: torch.device | None = None,
    half: bool = False,
) -> torch.Tensor:
    """Blend the logits of all tiles.

    Args:
        image: (channel, z, y, x) of `tiling.shape`.
        tiling: where the tiles lie.
        forward: (tile, channel, *patch) -> logits (tile, classes, *patch), any float dtype.
        batch: tiles at once.
        advance: called with the number of tiles done.
        store: where logits are collected; the image's device unless given.
        half: collect them in float16, rounding after every tile, as nnU-Net does.

    Returns:
        logits (classes, z, y, x) float32 (float16 with `half`) of `tiling.shape`, on `store`.
    """
    padding = [
        p for b, s, t in reversed(list(zip(tiling.before, tiling.shape, tiling.padded, strict=True))) for p in (b, t - s - b)
    ]
    padded = torch.nn.functional.pad(image, padding) if any(padding) else image
    store = image.device if store is None else store
    weight = (half_weight(tiling.patch) if half else gaussian_weight(tiling.patch)).to(store)
    total: torch.Tensor | None = None
    norm = torch.zeros(tiling.padded, device=store, dtype=weight.dtype)
    for first in range(0, len(tiling.starts), batch):
        boxes = [
            tuple(slice(s, s + p) for s, p in zip(start, tiling.patch, strict=True))
            for start in tiling.starts[first : first + batch]
        ]
        logits = forward(torch.stack([padded[(slice(None), *box)] for box in boxes]))
        if total is None:
            total = torch.zeros(logits.shape[1], *tiling.padded, device=store, dtype=weight.dtype)
        for tile, box in zip(logits.to(store), boxes, strict=True):
            total[(slice(None), *box)] += tile.float() * weight
            norm[box] += weight
        advance(len(boxes))
    assert total is not None
    total /= norm
    return total[(slice(None), *(slice(b, b + s) for b, s in zip(tiling.before, tiling.shape, strict=True)))]
