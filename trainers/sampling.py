"""Which patch is sample i, and reading it: recipes are pure functions of (seed, fold, i), threads only read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from autoseg.contracts import Batch
from autoseg.trainers.augment import AugmentParams, DefaultAugmentation, source_box
from autoseg.types.plan import Ints

TRAINING, VALIDATION = 0, 1  # streams of random numbers: a run's two kinds of samples never share any


class PatchSource(Protocol):
    """A preprocessed case that can be read in part."""

    @property
    def name(self) -> str:
        """The case."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """z, y, x."""
        ...

    @property
    def locations(self) -> Mapping[int, NDArray[np.integer]]:
        """Sampled voxels (n, 3), n > 0, of each target 1..K that is present; 0: annotated voxels where an ignore label exists."""
        ...

    def read_image(self, box: tuple[slice, slice, slice], /) -> NDArray[np.float32]:
        """(channel, z, y, x) of a box inside the case."""
        ...

    def read_label(self, box: tuple[slice, slice, slice], /) -> NDArray[np.int16]:
        """(z, y, x) of a box inside the case."""
        ...

    def read_previous(self, box: tuple[slice, slice, slice], /) -> NDArray[np.int16]:
        """(z, y, x) of a box inside the previous stage's segmentation; only asked for where the network takes it as input."""
        ...


@dataclass(frozen=True)
class Recipe:
    """Sample `index` of a stream: where its patch starts (may lie outside the case) and how it is augmented."""

    index: int
    case: int
    start: Ints
    params: AugmentParams


@dataclass(frozen=True)
class Sampler:
    """nnU-Net's sampler: cases uniformly, the last third of each batch centred on foreground."""

    cases: Sequence[PatchSource]
    patch: tuple[int, int, int]
    batch_size: int
    foreground: float
    augmentation: DefaultAugmentation
    seed: int
    fold: int

    def recipe(self, stream: int, index: int) -> Recipe:
        """Draw the recipe of sample `index`; augmentation only in the training stream."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.fold, stream, index])))
        case = int(rng.integers(len(self.cases)))
        forced = index % self.batch_size >= round(self.batch_size * (1 - self.foreground))
        start = self._start(rng, self.cases[case], forced)
        params = self.augmentation.make_params(rng) if stream == TRAINING else AugmentParams()
        return Recipe(index, case, start, params)

    def _start(self, rng: np.random.Generator, case: PatchSource, forced: bool) -> Ints:
        locations = case.locations
        present = sorted(target for target in locations if target > 0)
        voxels = None
        if forced and present:
            voxels = locations[present[int(rng.integers(len(present)))]]
        elif 0 in locations:
            voxels = locations[0]
        lows = [min(0, -((p - s) // 2)) if s < p else 0 for s, p in zip(case.shape, self.patch, strict=True)]
        if voxels is None:
            return tuple(
                low if s <= p else int(rng.integers(0, s - p + 1)) for s, p, low in zip(case.shape, self.patch, lows, strict=True)
            )
        voxel = voxels[int(rng.integers(len(voxels)))]
        return tuple(max(low, int(v) - p // 2) for v, p, low in zip(voxel, self.patch, lows, strict=True))


@dataclass(frozen=True)
class Crop:
    """What was read for one recipe: arrays that cover its patch, and where the patch centre lies in them.

    `previous_zyx` is the previous stage's segmentation, where the network takes it as input.
    """

    image_czyx: NDArray[np.float32]
    label_zyx: NDArray[np.int16]
    centre: NDArray[np.float64]
    recipe: Recipe
    previous_zyx: NDArray[np.int16] | None = None


def read_crop(case: PatchSource, patch: Ints, recipe: Recipe, with_previous: bool = False) -> Crop:
    """Read the box a recipe needs; outside the case the image and the previous segmentation are 0 and the label -1."""
    low, high = source_box(recipe.start, patch, recipe.params.matrix)
    inner = tuple(slice(min(max(a, 0), s), min(max(b, 0), s)) for a, b, s in zip(low, high, case.shape, strict=True))
    box = (inner[0], inner[1], inner[2])
    image, label = case.read_image(box), case.read_label(box)
    previous = case.read_previous(box) if with_previous else None
    padding = [
        (s.start - a if s.stop > s.start else b - a, b - s.stop if s.stop > s.start else 0)
        for s, a, b in zip(box, low, high, strict=True)
    ]
    if any(p != (0, 0) for p in padding):
        image = np.pad(image, [(0, 0), *padding])
        label = np.pad(label, padding, constant_values=-1)
        previous = None if previous is None else np.pad(previous, padding)
    centre = np.asarray(recipe.start) + (np.asarray(patch) - 1) / 2 - np.asarray(low)
    return Crop(image, label, centre, recipe, previous)


class Loader:
    """Batches of a stream in order, read ahead by threads; with `threads` 0 they are read when asked for."""

    def __init__(self, sampler: Sampler, masked: tuple[bool, ...], device: torch.device, threads: int, dims: int) -> None:
        self.sampler, self.masked, self.device, self.dims = sampler, masked, device, dims
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader") if threads else None
        self._ahead = 2 * threads

    def batches(self, stream: int, first: int, stop: int) -> Iterator[Batch]:
        """Yield batch `first`, `first + 1`, ... up to but not including `stop`."""
        for crops in self._crops(stream, first, stop):
            yield self._assemble(crops)

    def close(self) -> None:
        """Stop the threads."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _crops(self, stream: int, first: int, stop: int) -> Iterator[list[Crop]]:
        if self._pool is None:
            for batch in range(first, stop):
                yield self._read(stream, batch)
            return
        waiting: deque[Future[list[Crop]]] = deque()
        following = first
        try:
            while waiting or following < stop:
                while following < stop and len(waiting) < self._ahead:
                    waiting.append(self._pool.submit(self._read, stream, following))
                    following += 1
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _read(self, stream: int, batch: int) -> list[Crop]:
        size = self.sampler.batch_size
        recipes = [self.sampler.recipe(stream, index) for index in range(batch * size, (batch + 1) * size)]
        with_previous = self.sampler.augmentation.previous_labels > 0
        return [read_crop(self.sampler.cases[recipe.case], self.sampler.patch, recipe, with_previous) for recipe in recipes]

    def _assemble(self, crops: list[Crop]) -> Batch:
        move: Callable[[NDArray[np.generic]], torch.Tensor] = lambda a: torch.from_numpy(a).to(self.device, non_blocking=True)  # noqa: E731
        images, labels = [], []
        for crop in crops:
            previous = None if crop.previous_zyx is None else move(crop.previous_zyx)
            image, label = self.sampler.augmentation.apply(
                move(crop.image_czyx), move(crop.label_zyx), crop.centre, crop.recipe.params, self.masked, previous
            )
            images.append(image)
            labels.append(label)
        image_batch, label_batch = torch.stack(images), torch.stack(labels)
        if self.dims == 2:
            image_batch, label_batch = image_batch[:, :, 0], label_batch[:, 0]
        return Batch(image_batch, label_batch, tuple(self.sampler.cases[c.recipe.case].name for c in crops))
