"""Sliding windows: where the tiles lie is decided first, then a forward function is applied and blended, plane after plane."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from autoseg.errors import RunError

STEP = 0.5  # of the patch (nnU-Net's default)
SIGMA = 1 / 8  # of the patch
_GATHERED = 16  # planes asked for at a time when whole logits are wanted
_LEAN_LEAST = 2.0**-17  # times a logit, in float16's steps of 2**-24: about 0.01 is still told apart

Start = tuple[int, int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Tiling:
    """Tiles of one image: `padded` is the image's shape after centred padding to the patch, `before` the padding in front."""

    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    padded: tuple[int, int, int]
    before: tuple[int, int, int]
    starts: tuple[Start, ...]

    def batches(self, size: int) -> list[tuple[Start, ...]]:
        """The tiles in order of z, at most `size` at once and as evenly as can be.

        A batch holds tiles of one z only, so that few planes are open at a time; of several where that is one tile each or few.
        """
        layers = [tuple(group) for _, group in itertools.groupby(self.starts, key=lambda start: start[0])]
        together = max(1, size // len(layers[0]))
        groups = [tuple(itertools.chain(*some)) for some in _evenly(layers, together)]
        return [batch for group in groups for batch in _evenly(group, size)]

    def open_planes(self, size: int) -> int:
        """The most planes (z) that tiles of one batch cover: as many are held while logits are blended."""
        return max(batch[-1][0] + self.patch[0] - batch[0][0] for batch in self.batches(size))


def _evenly(items: Sequence[T], most: int) -> list[tuple[T, ...]]:
    """Cut a sequence into as few parts of at most `most` as can be, about equal ones."""
    parts = math.ceil(len(items) / most)
    edges = [len(items) * i // parts for i in range(parts + 1)]
    return [tuple(items[a:b]) for a, b in itertools.pairwise(edges)]


def starts_along(size: int, patch: int, step: float = STEP) -> list[int]:
    """Evenly spread tile starts along one axis, at most step x patch (at least 1) apart, first at 0, last flush with the end."""
    if size <= patch:
        return [0]
    count = math.ceil((size - patch) / max(1.0, patch * step)) + 1  # a patch one voxel thick (2D) visits every slice once
    distance = (size - patch) / (count - 1)  # divided first, so that halves are rounded as nnU-Net rounds them
    return [round(distance * i) for i in range(count)]


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
def gaussian_weight(patch: tuple[int, int, int]) -> Tensor:
    """Blending weight (z, y, x) float32: a Gaussian of sigma = patch / 8 around the middle voxel, peak 1.

    It has no floor: at the image's border only edges of tiles meet, and there too the tile whose middle is nearer must win.
    """
    weight = torch.ones(1)
    for size in patch:
        offset = torch.arange(size, dtype=torch.float32) - size // 2
        weight = weight[..., None] * torch.exp(-0.5 * (offset / max(size * SIGMA, 1e-6)) ** 2)
    return weight[0]  # at the corners exp(-24), far from where float32 ends


@lru_cache(maxsize=16)
def half_weight(patch: tuple[int, int, int]) -> Tensor:
    """The same Gaussian as nnU-Net keeps it: float16, peak 10, nowhere zero."""
    weight = (10 * gaussian_weight(patch)).half()
    return weight.clamp_min(weight[weight > 0].min().item())


@lru_cache(maxsize=16)
def lean_weight(patch: tuple[int, int, int]) -> Tensor:
    """The same Gaussian in float16 for any logits: peak 1, so that none overflow, nowhere so small that none are told apart."""
    return gaussian_weight(patch).clamp_min(_LEAN_LEAST).half()


class Planes(Protocol):
    """Something that gives logits plane by plane."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """z, y, x."""
        ...

    def planes(self, low: int, high: int) -> Tensor:
        """Planes (classes, high - low, y, x)."""
        ...


class LogitStream:
    """Blended logits of an image, computed as their planes are asked for: only planes that tiles still reach are held.

    A source of logits as restoring takes them: `classes`, `shape`, `device`, and `planes` in rising order. `seconds` is the time
    spent on tiles.
    """

    def __init__(
        self,
        image: Tensor,
        tiling: Tiling,
        forward: Callable[[Tensor], Tensor],
        batch: int,
        advance: Callable[[int], None] = lambda n: None,
        store: torch.device | None = None,
        half: bool = False,
        parts: int = 1,
        lean: bool = False,
    ) -> None:
        """Nothing is computed yet.

        Args:
            image: (channel, z, y, x) of `tiling.shape`.
            tiling: where the tiles lie.
            forward: (tile, channel, *patch) -> logits (tile, parts x classes, *patch), any float dtype and device.
            batch: tiles at once.
            advance: called with the number of tiles done.
            store: where logits are held; the image's device unless given.
            half: hold them in float16, rounding after every tile, as nnU-Net does.
            parts: each is blended on its own, and the mean of the blended ones is taken.
            lean: hold them in float16 to save memory, with a weight that leaves large logits room.
        """
        margins = [(b, t - s - b) for b, s, t in zip(tiling.before, tiling.shape, tiling.padded, strict=True)]
        padding = [amount for margin in reversed(margins) for amount in margin]
        self._image = torch.nn.functional.pad(image, padding) if any(padding) else image
        self._tiling, self._forward, self._advance, self._parts = tiling, forward, advance, parts
        self.device = image.device if store is None else store
        weight = half_weight if half else lean_weight if lean else gaussian_weight
        self._weight = weight(tiling.patch).to(self.device)
        self._batches = tiling.batches(batch)
        self._depth, self._next = tiling.open_planes(batch), 0
        self._ring: Tensor | None = None  # parts x classes, depth, y, x: padded plane z lies at z % depth
        self._norm = torch.zeros(self._depth, *tiling.padded[1:], dtype=self._weight.dtype, device=self.device)
        self._first = 0  # the first padded plane that the ring holds; those before `_kept` holds where still wanted
        self._kept: Tensor | None = None
        self._low = 0
        self.seconds = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """The image's, z, y, x."""
        return self._tiling.shape

    @property
    def classes(self) -> int:
        """Number of channels; the first tiles tell it."""
        if self._ring is None:
            self._step()
        assert self._ring is not None
        return len(self._ring) // self._parts

    def planes(self, low: int, high: int) -> Tensor:
        """Logits (classes, high - low, y, x), float32 (float16 with `half` or `lean`); those below `low` are then gone.

        Raises ValueError when they are asked for, and RunError when float16 does not hold the logits.
        """
        if not self._low <= low < high <= self.shape[0]:
            raise ValueError(f"planes {low} to {high} of {self.shape[0]} were asked for after planes from {self._low} on")
        before, self._low = self._tiling.before[0], low
        while self._closed < high + before:
            self._step()
        return self._finished(low + before, high + before)

    @property
    def _closed(self) -> int:
        """Padded planes below it are touched by no later tile."""
        return self._batches[self._next][0][0] if self._next < len(self._batches) else self._tiling.padded[0]

    def _step(self) -> None:
        """Forward the next batch and blend it in."""
        begin, boxes = time.perf_counter(), self._batches[self._next]
        self._move_to(boxes[0][0])
        z, y, x = self._tiling.patch
        logits = self._forward(torch.stack([self._image[:, a : a + z, b : b + y, c : c + x] for a, b, c in boxes]))
        if self._ring is None:
            size = (self._depth, *self._tiling.padded[1:])
            self._ring = torch.zeros(logits.shape[1], *size, dtype=self._weight.dtype, device=self.device)
        half = self._weight.dtype == torch.float16
        for tile, (a, b, c) in zip(logits.to(self.device), boxes, strict=True):
            for slot, part in self._slots(a, a + z):
                box, weight = (slot, slice(b, b + y), slice(c, c + x)), self._weight[part]
                if half:
                    self._ring[(slice(None), *box)] += tile[:, part].float() * weight
                else:
                    self._ring[(slice(None), *box)].addcmul_(tile[:, part].float(), weight)
                self._norm[box] += weight
        self._next += 1
        if logits.device.type == "cuda":  # else only the launch would be timed
            torch.cuda.synchronize(logits.device)
        self.seconds += time.perf_counter() - begin
        self._advance(len(boxes))

    def _slots(self, low: int, high: int) -> list[tuple[slice, slice]]:
        """Where padded planes lie in the ring, and which of them: one or two pieces."""
        start, count = low % self._depth, high - low
        whole = min(count, self._depth - start)
        pieces = [(slice(start, start + whole), slice(0, whole))]
        return pieces if whole == count else [*pieces, (slice(0, count - whole), slice(whole, count))]

    def _move_to(self, first: int) -> None:
        """Let the ring hold planes from `first` on; what is still wanted of those before is kept apart."""
        if first == self._first or self._ring is None:
            return
        low = self._low + self._tiling.before[0]
        self._kept = self._finished(low, first) if low < first else None
        for slot, _ in self._slots(self._first, min(first, self._first + self._depth)):
            self._ring[:, slot] = 0
            self._norm[slot] = 0
        self._first = first

    def _finished(self, low: int, high: int) -> Tensor:
        """Closed padded planes, divided by their weights and cut to the image. Raises RunError when float16 did not hold them."""
        assert self._ring is not None
        pieces: list[Tensor] = []
        if low < self._first:
            assert self._kept is not None
            end = self._kept.shape[1] - (self._first - low)  # what is kept ends where the ring begins
            pieces.append(self._kept[:, end : end + high - low])
        if high > self._first:
            rows, columns = (slice(b, b + s) for b, s in zip(self._tiling.before[1:], self.shape[1:], strict=True))
            for slot, _ in self._slots(max(low, self._first), high):
                pieces.append(self._mean(self._ring[:, slot, rows, columns] / self._norm[slot, rows, columns]))
                if pieces[-1].dtype == torch.float16 and not bool(pieces[-1].isfinite().all()):
                    raise RunError(
                        "the networks' logits are too large for float16, or no numbers; predict with --precision bf16, "
                        "or where memory was short with more of it"
                    )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def _mean(self, blended: Tensor) -> Tensor:
        if self._parts == 1:
            return blended
        total, *others = blended.chunk(self._parts)
        for other in others:
            total += other
        return total.div_(self._parts)


def gather(source: Planes) -> Tensor:
    """Whole logits (classes, z, y, x) of a source."""
    whole: Tensor | None = None
    for low in range(0, source.shape[0], _GATHERED):
        planes = source.planes(low, min(source.shape[0], low + _GATHERED))
        if whole is None:
            whole = planes.new_empty((len(planes), *source.shape))
        whole[:, low : low + _GATHERED] = planes
    assert whole is not None
    return whole
