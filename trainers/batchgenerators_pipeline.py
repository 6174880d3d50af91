"""A pipeline of batchgenerators' transforms as augmentation, made deterministic: sample i stays a function of its number.

Options of `augment.kind=batchgenerators`:

* `transforms`: a list of {name, options}; names are classes of batchgenerators.transforms. A transform that takes `patch_size`
  or `axes` (of mirroring) and is given none gets the patch's size, and the axes that may be flipped.
* or `pipeline`: "module:function", called with the patch's size and all other options; it returns one transform.
* `source_scale`: how much larger than the patch, along every axis, the region is that the pipeline gets (1 by default): a spatial
  transform then crops it without showing borders. What comes out larger than the patch is cropped to its centre.

Transforms are called with data (1, channel, *size) float32 and seg (1, 1, *size) float32, -1 where the image has no voxels; size
is that of a 2D patch in 2D. With a previous stage its segmentation is a second channel of seg.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autoseg.arrays.cascade import one_hot
from autoseg.errors import PluginError
from autoseg.plugins import resolve
from autoseg.types.plan import Configuration, Ints

Transform = Callable[..., Mapping[str, Any]]
_ONE_AT_A_TIME = threading.Lock()  # its transforms draw from numpy's global random numbers, which all threads share


@dataclass(frozen=True)
class BatchgeneratorsAugmentation:
    """A pipeline of transforms; in 2D it sees patches without their first axis, which is 1."""

    patch: tuple[int, int, int]
    previous_labels: int
    transform: Transform
    source: tuple[int, int, int]
    flat: bool
    in_main_memory: bool = True  # so that it is applied in the loader's threads, whatever the device

    def make_params(self, rng: np.random.Generator, /) -> int:
        """The seed of the sample, from which the transforms draw."""
        return int(rng.integers(2**32))

    def source_box(self, start: Ints, params: int, /) -> tuple[Ints, Ints]:
        """The region around the patch that the pipeline gets."""
        low = tuple(s - (size - p) // 2 for s, size, p in zip(start, self.source, self.patch, strict=True))
        return low, tuple(a + size for a, size in zip(low, self.source, strict=True))

    def apply(
        self, image: torch.Tensor, label: torch.Tensor, centre: NDArray[np.float64], params: int, masked: tuple[bool, ...],
        previous: torch.Tensor | None = None, /,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the pipeline, as `autoseg.contracts.Augmentation` says.

        Raises:
            PluginError: it returns other shapes than promised, or not-finite labels.
        """
        if (previous is not None) != (self.previous_labels > 0):
            raise ValueError("the previous stage's segmentation must be given exactly when the network takes it as input")
        maps = [label] if previous is None else [label, previous]
        data, seg = image.float().cpu().numpy()[None].copy(), np.stack([m.cpu().numpy() for m in maps]).astype(np.float32)[None]
        if self.flat:
            data, seg = data[:, :, 0], seg[:, :, 0]
        with _ONE_AT_A_TIME:
            made = self._seeded(data, seg, params)
        new_data, new_seg = (self._cropped(made[key], count) for key, count in (("data", len(image)), ("seg", len(maps))))
        new_image, new_maps = torch.from_numpy(new_data).float(), torch.from_numpy(new_seg).round().to(torch.int16)
        for channel, zero_outside in enumerate(masked):
            if zero_outside:
                new_image[channel][new_maps[0] < 0] = 0
        if previous is not None:
            new_image = torch.cat([new_image, one_hot(new_maps[1], self.previous_labels)])
        return new_image.to(image.device), new_maps[0].clamp_min(0).long().to(image.device)

    def _seeded(self, data: NDArray[np.float32], seg: NDArray[np.float32], seed: int) -> dict[str, Any]:
        """Run the transforms with the global random numbers that `seed` begins, which are then put back."""
        states = np.random.get_state(), random.getstate()
        np.random.seed(seed)
        random.seed(seed)
        try:
            return dict(self.transform(data=data, seg=seg))
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])

    def _cropped(self, array: Any, channels: int) -> NDArray[np.float32]:
        """What came out, (channel, *patch) from its centre."""
        found = np.asarray(array)
        size = self.patch[1:] if self.flat else self.patch
        fits = found.ndim == 2 + len(size) and found.shape[:2] == (1, channels)
        if not fits or any(a < b for a, b in zip(found.shape[2:], size, strict=True)):
            raise PluginError(
                f"the batchgenerators pipeline returned an array {found.shape}, expected {(1, channels, *size)} or more voxels; "
                "augment.options.source_scale gives it a larger region"
            )
        if not np.isfinite(found).all():
            found = np.nan_to_num(found)
        begins = [(a - b) // 2 for a, b in zip(found.shape[2:], size, strict=True)]
        part = found[0][(..., *(slice(b, b + s) for b, s in zip(begins, size, strict=True)))]
        return np.ascontiguousarray(part[:, None] if self.flat else part, np.float32)


def make_pipeline(
    configuration: Configuration, channels: int, mirror: Ints, previous_labels: int, /, *,
    transforms: Sequence[Mapping[str, Any]] | None = None, pipeline: str | None = None, source_scale: float = 1.0, **rest: Any,
) -> BatchgeneratorsAugmentation:
    """Build the augmentation of a record with `augment.kind=batchgenerators`; `mirror` lists the axes that may be flipped.

    Raises:
        PluginError: options that make no sense, or a transform that does not exist or cannot be built.
    """
    scales = isinstance(source_scale, int | float) and not isinstance(source_scale, bool) and source_scale >= 1
    if (transforms is None) == (pipeline is None) or (transforms is not None and rest) or not scales:
        raise PluginError(
            "augmentation 'batchgenerators' takes the options transforms (a list of {name, options}) or pipeline "
            f"(\"module:function\", with options of its own), and source_scale from 1; found transforms={transforms}, "
            f"pipeline={pipeline}, source_scale={source_scale}, {rest or 'no others'}"
        )
    size = configuration.patch_size
    if pipeline is not None:
        make: Callable[..., Transform] = resolve(pipeline, {}, "augment")
        try:
            transform = make(size, **rest)
        except (TypeError, ValueError) as error:
            raise PluginError(f"augmentation pipeline {pipeline!r} cannot be built with options {rest}: {error}") from error
    else:
        transform = _compose([_build(entry, size, mirror) for entry in transforms or ()])
    flat = configuration.dims == 2
    z, y, x = (1, *size) if flat else size
    source = tuple(p if flat and axis == 0 else math.ceil(p * source_scale) for axis, p in enumerate((z, y, x)))
    return BatchgeneratorsAugmentation((z, y, x), previous_labels, transform, (source[0], source[1], source[2]), flat)


def _compose(transforms: Sequence[Transform]) -> Transform:
    def run(**data: Any) -> Mapping[str, Any]:
        made: Mapping[str, Any] = data
        for transform in transforms:
            made = transform(**made)
        return made

    return run


def _build(entry: Mapping[str, Any], size: Ints, mirror: Ints) -> Transform:
    """One transform of a record."""
    known = _transforms()
    name, options = entry.get("name"), dict(entry.get("options", {}))
    if name not in known or set(entry) - {"name", "options"}:
        raise PluginError(f"unknown batchgenerators transform {dict(entry)}; give name and options, a name of {', '.join(known)}")
    parameters = inspect.signature(known[name]).parameters
    if "patch_size" in parameters:
        options.setdefault("patch_size", size)
    if name == "MirrorTransform":
        options.setdefault("axes", mirror)
    try:
        return known[name](**options)
    except (TypeError, ValueError) as error:
        raise PluginError(f"batchgenerators transform {name} cannot be built with options {options}: {error}") from error


def _transforms() -> dict[str, Callable[..., Transform]]:
    """All transforms of batchgenerators by class name."""
    try:
        package = importlib.import_module("batchgenerators.transforms")
    except ImportError as error:
        raise PluginError(f"augmentation 'batchgenerators' needs that package, which cannot be imported: {error}") from error
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(package.__path__):
        for name, value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).items():
            if inspect.isclass(value) and name.endswith("Transform") and callable(value):
                found[name] = value
    return dict(sorted(found.items()))
