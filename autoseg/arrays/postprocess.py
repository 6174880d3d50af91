"""Post-processing of label maps: steps as data, applied in order.

Steps that decide anew (`threshold`, `crf`) need the probabilities and come first; the others only look at the mask. Everything
speaks in inside indices, 0 is background.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from autoseg.arrays.components import CONNECTIVITY, bounding_box, keep_largest
from autoseg.arrays.crf import CrfOptions, dense_crf
from autoseg.errors import PluginError
from autoseg.types.record import Record, Spec

Ints = NDArray[np.integer]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """What steps may look at beside the label map: probabilities (C, z, y, x), image (channel, z, y, x), voxel size in mm."""

    probabilities_czyx: NDArray[np.floating] | None = None
    image_czyx: NDArray[np.generic] | None = None
    spacing_zyx_mm: tuple[float, ...] | None = None

    def spacing(self) -> tuple[float, float, float]:
        """Voxel size; raises ValueError where it was not given."""
        if self.spacing_zyx_mm is None:
            raise ValueError("this post-processing needs the image's spacing")
        z, y, x = self.spacing_zyx_mm
        return (z, y, x)

    def probabilities(self) -> NDArray[np.floating]:
        """Probabilities; raises ValueError where they were not given."""
        if self.probabilities_czyx is None:
            raise ValueError("this post-processing needs probabilities")
        return self.probabilities_czyx


class LabelOptions(Record):
    """The inside indices whose union a step works on."""

    labels: tuple[int, ...]


class SizeOptions(LabelOptions):
    """Components smaller than `mm3` go; in a single slice mm2 of its plane."""

    mm3: float = Field(gt=0)


class OpeningOptions(LabelOptions):
    """Radius of the ball in mm."""

    mm: float = Field(gt=0)


class ThresholdOptions(Record):
    """One threshold per output of the network, 0.5 changes nothing; `regions` are the indices written, for sigmoid outputs."""

    values: tuple[float, ...]
    regions: tuple[int, ...] | None = None


class FieldOptions(CrfOptions):
    """The random field's options, the image channel it looks at, and the indices written for sigmoid outputs."""

    channel: int = 0
    regions: tuple[int, ...] | None = None


def _union(index_zyx: Ints, options: LabelOptions) -> Mask:
    """Voxels of any of the step's labels."""
    return np.isin(index_zyx, np.asarray(options.labels, index_zyx.dtype))


def _without(index_zyx: Ints, removed: Mask) -> Ints:
    cleaned = index_zyx.copy()
    cleaned[removed] = 0
    return cleaned


def _largest_component(index_zyx: Ints, options: LabelOptions, scene: Scene) -> Ints:
    mask = _union(index_zyx, options)
    return _without(index_zyx, mask & ~keep_largest(mask))


def _minimum_size(index_zyx: Ints, options: SizeOptions, scene: Scene) -> Ints:
    import cc3d

    mask = _union(index_zyx, options)
    box = bounding_box(mask)
    if box is None:
        return index_zyx
    spacing = scene.spacing()
    voxel_mm3 = float(np.prod(spacing[1:] if mask.shape[0] == 1 else spacing))
    components = cc3d.connected_components(np.ascontiguousarray(mask[box]).view(np.uint8), connectivity=CONNECTIVITY)
    sizes = np.asarray(cc3d.statistics(components)["voxel_counts"]).astype(np.int64) * voxel_mm3
    small = sizes < options.mm3
    small[0] = False
    removed = np.zeros(mask.shape, bool)
    removed[box] = small[components]
    return _without(index_zyx, removed)


def _fill_holes(index_zyx: Ints, options: LabelOptions, scene: Scene) -> Ints:
    import fill_voids
    from scipy.ndimage import distance_transform_edt

    mask = _union(index_zyx, options)
    box = bounding_box(mask)
    if box is None:
        return index_zyx
    part = np.ascontiguousarray(mask[box])
    filled = fill_voids.fill(part[0])[None] if mask.shape[0] == 1 else fill_voids.fill(part)
    holes = np.asarray(filled, bool) & ~part & (index_zyx[box] == 0)
    if not holes.any():
        return index_zyx
    result = index_zyx.copy()
    inside = result[box]
    if len(options.labels) == 1:
        inside[holes] = options.labels[0]
    else:
        nearest: Any = distance_transform_edt(~part, return_distances=False, return_indices=True)
        inside[holes] = inside[tuple(nearest[:, holes])]
    return result


def _opening(index_zyx: Ints, options: OpeningOptions, scene: Scene) -> Ints:
    import edt

    mask = _union(index_zyx, options)
    box = bounding_box(mask)
    if box is None:
        return index_zyx
    box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)  # the background next to it, but not beyond the image
    part, spacing = np.ascontiguousarray(mask[box]), scene.spacing()
    core = part if part.all() else edt.edt(part, anisotropy=spacing, black_border=False) > options.mm
    kept = np.zeros(part.shape, bool)
    if core.any():
        kept = core if core.all() else edt.edt(~core, anisotropy=spacing, black_border=False) <= options.mm
    removed = np.zeros(mask.shape, bool)
    removed[box] = part & ~kept
    return _without(index_zyx, removed)


def decide(probabilities_czyx: NDArray[np.floating], options: ThresholdOptions, dtype: np.dtype[Any]) -> Ints:
    """Labels from probabilities under thresholds, (z, y, x) of `dtype`.

    Softmax outputs (`regions` None): class c with threshold t beats a class of threshold 0.5 where it has more than t of the
    two's probability, so each class counts (1 - t) / t times. Sigmoid outputs: region i where its probability exceeds t, later
    ones over earlier ones. Raises ValueError when there is not one threshold per output.
    """
    if len(options.values) != len(probabilities_czyx):
        raise ValueError(f"expected {len(probabilities_czyx)} thresholds, one per output, found {len(options.values)}")
    if options.regions is None:
        best = probabilities_czyx[0] * ((1 - options.values[0]) / options.values[0])
        labels = np.zeros(best.shape, dtype)
        for index in range(1, len(probabilities_czyx)):
            scaled = probabilities_czyx[index] * ((1 - options.values[index]) / options.values[index])
            better = scaled > best
            labels[better] = index
            np.maximum(best, scaled, out=best)
        return labels
    labels = np.zeros(probabilities_czyx.shape[1:], dtype)
    for values, threshold, region in zip(probabilities_czyx, options.values, options.regions, strict=True):
        labels[values > threshold] = region
    return labels


def _threshold(index_zyx: Ints, options: ThresholdOptions, scene: Scene) -> Ints:
    return decide(scene.probabilities(), options, index_zyx.dtype)


def _crf(index_zyx: Ints, options: FieldOptions, scene: Scene) -> Ints:
    probabilities, spacing = scene.probabilities(), scene.spacing()
    if scene.image_czyx is None:
        raise ValueError("this post-processing needs the image")
    image = scene.image_czyx[options.channel]
    if options.regions is None:
        refined = dense_crf(probabilities, image, spacing, options)
    else:
        refined = np.stack([dense_crf(np.stack([1 - p, p]), image, spacing, options)[1] for p in probabilities])
    return decide(refined, ThresholdOptions(values=(0.5,) * len(refined), regions=options.regions), index_zyx.dtype)


@dataclass(frozen=True)
class StepKind:
    """A kind of step: its options, what it does, and what it needs beside the mask."""

    options: type[Record]
    apply: Callable[[Ints, Any, Scene], Ints]
    probabilities: bool = False
    image: bool = False


POSTPROCESSING: dict[str, StepKind] = {
    "threshold": StepKind(ThresholdOptions, _threshold, probabilities=True),
    "crf": StepKind(FieldOptions, _crf, probabilities=True, image=True),
    "largest_component": StepKind(LabelOptions, _largest_component),
    "minimum_size": StepKind(SizeOptions, _minimum_size),
    "fill_holes": StepKind(LabelOptions, _fill_holes),
    "opening": StepKind(OpeningOptions, _opening),
}


def _kind(step: Spec) -> StepKind:
    if step.kind not in POSTPROCESSING:
        raise PluginError(f"unknown post-processing {step.kind!r}; choose from {', '.join(POSTPROCESSING)}")
    return POSTPROCESSING[step.kind]


def _options(step: Spec, kind: StepKind) -> Record:
    try:
        return kind.options.model_validate(step.options)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise PluginError(
            f"post-processing {step.kind} has options {', '.join(kind.options.model_fields)}; {faults} (found {step.options})"
        ) from None


def needs_probabilities(steps: Sequence[Spec]) -> bool:
    """Whether any step decides anew from probabilities. Raises PluginError for an unknown kind."""
    return any(_kind(step).probabilities for step in steps)


def needs_image(steps: Sequence[Spec]) -> bool:
    """Whether any step looks at the image. Raises PluginError for an unknown kind."""
    return any(_kind(step).image for step in steps)


def apply_postprocessing(
    index_zyx: Ints, steps: Sequence[Spec], probabilities: NDArray[np.floating] | None = None,
    image: NDArray[np.generic] | None = None, spacing: Sequence[float] | None = None,
) -> Ints:
    """Apply post-processing steps in order to a label map of inside indices, (z, y, x), which is not changed.

    probabilities: (C, z, y, x), for `threshold` and `crf`. image: (channel, z, y, x), for `crf`. spacing: z, y, x in mm, for
    `minimum_size`, `opening` and `crf`. Kinds and options:
    - `largest_component` (labels): only the largest component of the labels' union stays (26-connected; equal ones all stay);
    - `minimum_size` (labels, mm3): smaller components go; in a single slice mm2;
    - `fill_holes` (labels): background enclosed by the union takes the nearest of its labels;
    - `opening` (labels, mm): what a ball of that radius does not fit into goes;
    - `threshold` (values per output, regions): see `decide`; replaces the label map;
    - `crf` (see `CrfOptions`; channel, regions): a dense random field; replaces the label map.
    Removed voxels become background. Returns an array of the same shape and dtype.
    Raises PluginError for an unknown kind or wrong options, ValueError when a step lacks what it needs.
    """
    scene = Scene(probabilities, image, None if spacing is None else tuple(spacing))
    for step in steps:
        kind = _kind(step)
        try:
            index_zyx = kind.apply(index_zyx, _options(step, kind), scene)
        except ValueError as error:
            raise ValueError(f"post-processing {step.kind}: {error}") from error
    return index_zyx
