"""nnU-Net's default augmentation: what is drawn for a sample, and how it is applied."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from autoseg.arrays.cascade import OPERATIONS, morph_label, one_hot, remove_component
from autoseg.trainers.augment.intensity import CHANGES
from autoseg.trainers.augment.options import AugmentOptions
from autoseg.trainers.augment.params import AugmentParams, Elastic, Morph, Removal, Step, StepName, source_box
from autoseg.trainers.augment.spatial import displacement, resample
from autoseg.types.plan import Configuration, Ints

ROTATION_3D = math.radians(30)
ROTATION_2D, ROTATION_2D_ELONGATED, ELONGATED = math.pi, math.radians(15), 1.5
DUMMY_2D_ANISOTROPY = 3
STANDARD = AugmentOptions()


@dataclass(frozen=True)
class DefaultAugmentation:
    """nnU-Net's default augmentation for one configuration; patch axes are always three (2D: the first is 1).

    `channels` are those of the image; with `previous_labels` K > 0 the previous stage's segmentation follows as K more.
    `rotation` is the largest angle in radians, about the first axis alone if `in_plane`.
    """

    patch: tuple[int, int, int]
    channels: int
    in_plane: bool
    rotation: float
    mirror_axes: Ints
    previous_labels: int = 0
    options: AugmentOptions = STANDARD

    @classmethod
    def from_configuration(
        cls, configuration: Configuration, channels: int, mirror: Ints | None, previous_labels: int = 0,
        options: AugmentOptions | None = None,
    ) -> DefaultAugmentation:
        """`mirror` lists patch axes of the configuration that may be flipped; None means all."""
        options = options or STANDARD
        size = configuration.patch_size
        patch = (1, *size) if configuration.dims == 2 else size
        lead = 3 - configuration.dims
        axes = tuple(range(configuration.dims)) if mirror is None else mirror
        dummy_2d = configuration.dims == 3 and max(size) / size[0] > DUMMY_2D_ANISOTROPY
        if options.rotation is not None:
            rotation = math.radians(options.rotation)
        elif configuration.dims == 2:
            rotation = ROTATION_2D_ELONGATED if max(size) / min(size) > ELONGATED else ROTATION_2D
        else:
            rotation = ROTATION_2D if dummy_2d else ROTATION_3D
        in_plane = configuration.dims == 2 or dummy_2d
        mirrored = tuple(a + lead for a in axes)
        return cls((patch[0], patch[1], patch[2]), channels, in_plane, rotation, mirrored, previous_labels, options)

    def source_box(self, start: Ints, params: AugmentParams) -> tuple[Ints, Ints]:
        """Half-open box (low, high) of stored voxels that the patch starting at `start` needs."""
        elastic = params.elastic
        if elastic is None:
            return source_box(start, self.patch, params.matrix)
        shift = [elastic.strength * elastic.length * s for s in self.patch]
        return source_box(start, self.patch, params.matrix, [0.0, *shift[1:]] if self.in_plane else shift)

    def make_params(self, rng: np.random.Generator) -> AugmentParams:
        """Draw the parameters of one sample; those of the previous stage's segmentation come last, if there is one."""
        matrix = self._matrix(rng)
        elastic = self._elastic(rng) if self.options.elastic_probability else None
        steps = self._steps(rng)
        mirror = tuple(axis for axis in self.mirror_axes if rng.random() < self.options.mirror_probability)
        if not self.previous_labels:
            return AugmentParams(matrix, steps, mirror, elastic=elastic)
        return AugmentParams(matrix, steps, mirror, self._morphs(rng), self._removals(rng), elastic)

    def _morphs(self, rng: np.random.Generator) -> tuple[Morph, ...]:
        options = self.options
        labels = self._some_labels(rng, options.previous_morph_probability, options.previous_morph_label_probability)
        radii = options.previous_radius
        return tuple(Morph(label, OPERATIONS[int(rng.integers(len(OPERATIONS)))], rng.uniform(*radii)) for label in labels)

    def _removals(self, rng: np.random.Generator) -> tuple[Removal, ...]:
        options = self.options
        labels = self._some_labels(rng, options.previous_removal_probability, options.previous_removal_label_probability)
        return tuple(Removal(label, rng.random()) for label in labels)

    def _some_labels(self, rng: np.random.Generator, probability: float, share: float) -> list[int]:
        """With `probability` each label by chance `share`, in random order; else none."""
        if rng.random() >= probability:
            return []
        order = rng.permutation(self.previous_labels) + 1
        return [int(label) for label in order if rng.random() < share]

    def _matrix(self, rng: np.random.Generator) -> NDArray[np.float64] | None:
        options = self.options
        rotate, scale = rng.random() < options.rotation_probability, rng.random() < options.scaling_probability
        if not rotate and not scale:
            return None
        matrix = np.eye(3)
        if rotate:
            for axis in (0,) if self.in_plane else (0, 1, 2):
                matrix = rotation_about(axis, rng.uniform(-self.rotation, self.rotation)) @ matrix
        if scale:
            factor = rng.uniform(*options.scaling)
            matrix = matrix @ np.diag([1.0 if self.in_plane else factor, factor, factor])
        return matrix

    def _elastic(self, rng: np.random.Generator) -> Elastic | None:
        if rng.random() >= self.options.elastic_probability:
            return None
        length, strength = rng.uniform(*self.options.elastic_length), rng.uniform(*self.options.elastic_strength)
        return Elastic(length, strength, int(rng.integers(2**62)))

    def _steps(self, rng: np.random.Generator) -> tuple[Step, ...]:
        options, every = self.options, range(self.channels)
        steps: list[Step] = []

        def add(name: StepName, probability: float, low_high: tuple[float, float]) -> None:
            if rng.random() < probability:
                steps.append(Step(name, tuple((_around_one(rng, *low_high),) for _ in every)))

        if rng.random() < options.noise_probability:
            std = rng.uniform(*options.noise)
            steps.append(Step("noise", tuple((std,) for _ in every), int(rng.integers(2**62))))
        if rng.random() < options.blur_probability:
            share = options.blur_channel_probability
            values = (tuple(rng.uniform(*options.blur) for _ in range(3)) if rng.random() < share else () for _ in every)
            steps.append(Step("blur", tuple(values)))
        add("brightness", options.brightness_probability, options.brightness)
        add("contrast", options.contrast_probability, options.contrast)
        if rng.random() < options.low_resolution_probability:
            share = options.low_resolution_channel_probability
            zooms = ((rng.uniform(*options.low_resolution),) if rng.random() < share else () for _ in every)
            steps.append(Step("low_resolution", tuple(zooms)))
        add("gamma_inverted", options.gamma_inverted_probability, options.gamma)
        add("gamma", options.gamma_probability, options.gamma)
        return tuple(steps)

    def apply(
        self,
        image: torch.Tensor,
        label: torch.Tensor,
        centre: NDArray[np.float64],
        params: AugmentParams,
        masked: tuple[bool, ...],
        previous: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply drawn parameters to one crop, as `autoseg.contracts.Augmentation` says."""
        if (previous is not None) != (self.previous_labels > 0):
            raise ValueError("the previous stage's segmentation must be given exactly when the network takes it as input")
        maps = [label] if previous is None else [label, previous]
        image, maps = self._place(image, maps, centre, params)
        for step in params.steps:
            for channel, values in enumerate(step.values):
                if values:
                    CHANGES[step.name](image[channel], values, step.seed + channel, self.in_plane)
        label = maps[0]
        if any(masked):
            channels = torch.tensor(masked, device=image.device).view(-1, 1, 1, 1)
            image = image.masked_fill(channels & (label < 0), 0)
        if previous is not None:
            image = torch.cat([image, self._previous_channels(maps[1], params)])
        return image, label.clamp_min(0).long()

    def _place(
        self, image: torch.Tensor, maps: list[torch.Tensor], centre: NDArray[np.float64], params: AugmentParams
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The image and label maps on the patch, mirrored; the image is a copy where it will be changed."""
        if params.matrix is not None or params.elastic is not None:
            matrix = np.eye(3) if params.matrix is None else params.matrix
            shifts = None
            if params.elastic is not None:
                shifts = displacement(params.elastic, self.patch, self.in_plane, image.device)
            return resample(image.float(), maps, centre, matrix, params.mirror, shifts, self.patch)
        if params.mirror:
            axes = list(params.mirror)
            return torch.flip(image.float(), [a + 1 for a in axes]), [torch.flip(values, axes) for values in maps]
        return (image.float().clone(memory_format=torch.contiguous_format) if params.steps else image.float()), maps

    def _previous_channels(self, previous: torch.Tensor, params: AugmentParams) -> torch.Tensor:
        """The previous stage's segmentation on the patch altered, and as one channel per label."""
        for morph in params.morphs:
            previous = morph_label(previous, morph.label, morph.operation, morph.radius)
        for removal in params.removals:
            previous = remove_component(previous, removal.label, removal.choice, self.options.previous_removal_largest)
        return one_hot(previous, self.previous_labels)


class NoAugmentation(DefaultAugmentation):
    """Patches as they are stored, not even mirrored."""

    def make_params(self, rng: np.random.Generator) -> AugmentParams:
        """Nothing is drawn."""
        return AugmentParams()


def rotation_about(axis: int, angle: float) -> NDArray[np.float64]:
    """The matrix of a rotation about an axis, angle in radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    a, b = [i for i in range(3) if i != axis]
    matrix = np.eye(3)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = cos, -sin, sin, cos
    return matrix


def _around_one(rng: np.random.Generator, low: float, high: float) -> float:
    """Half of the draws lie below 1, half above, where the range has both."""
    if (rng.random() < 0.5 and low < 1) or high <= 1:
        return float(rng.uniform(low, min(high, 1.0)))
    return float(rng.uniform(max(low, 1.0), high))
