"""Augmentation: parameters are drawn first (all the randomness), then applied (pure torch code on the batch's device).

Transforms, probabilities and ranges are those of nnU-Net v2's default trainer, in its order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import affine_grid, grid_sample, interpolate, pad

from autoseg.arrays.cascade import OPERATIONS, Operation, morph_label, one_hot, remove_component
from autoseg.types.plan import Configuration, Ints

P_ROTATION, P_SCALING, SCALING = 0.2, 0.2, (0.7, 1.4)
ROTATION_3D = math.radians(30)
ROTATION_2D, ROTATION_2D_ELONGATED, ELONGATED = math.pi, math.radians(15), 1.5
DUMMY_2D_ANISOTROPY = 3
P_NOISE, NOISE_STD = 0.1, (0.0, 0.1)
P_BLUR, BLUR_SIGMA, P_BLUR_CHANNEL = 0.2, (0.5, 1.0), 0.5
P_BRIGHTNESS, BRIGHTNESS = 0.15, (0.75, 1.25)
P_CONTRAST, CONTRAST = 0.15, (0.75, 1.25)
P_LOW_RESOLUTION, LOW_RESOLUTION, P_LOW_RESOLUTION_CHANNEL = 0.25, (0.5, 1.0), 0.5
P_GAMMA_INVERTED, P_GAMMA, GAMMA = 0.1, 0.3, (0.7, 1.5)
P_MIRROR = 0.5
P_MORPH, P_MORPH_LABEL, MORPH_RADIUS = 0.4, 0.5, (1.0, 8.0)
P_REMOVAL, P_REMOVAL_LABEL, LARGEST_REMOVED = 0.2, 0.5, 0.15
LABELS_AT_ONCE = 8  # labels resampled together: bounds the memory of label maps with many structures

StepName = Literal["noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma"]


@dataclass(frozen=True)
class Step:
    """One intensity change; `values[channel]` holds its parameters (empty: the channel stays), `seed` feeds the noise."""

    name: StepName
    values: tuple[tuple[float, ...], ...]
    seed: int = 0


@dataclass(frozen=True)
class Morph:
    """One label of the previous stage's segmentation is dilated, eroded, opened or closed by a ball, radius in voxels."""

    label: int
    operation: Operation
    radius: float


@dataclass(frozen=True)
class Removal:
    """A component of one label of the previous stage's segmentation is removed; `choice` in [0, 1) says which."""

    label: int
    choice: float


@dataclass(frozen=True)
class AugmentParams:
    """Everything drawn for one sample.

    `matrix` maps an offset from the patch centre to an offset in the stored case, z, y, x (None: the identity). `morphs` and
    `removals` alter the previous stage's segmentation, in their order.
    """

    matrix: NDArray[np.float64] | None = None
    steps: tuple[Step, ...] = ()
    mirror: tuple[int, ...] = ()
    morphs: tuple[Morph, ...] = ()
    removals: tuple[Removal, ...] = ()


@dataclass(frozen=True)
class DefaultAugmentation:
    """nnU-Net's default augmentation for one configuration; patch axes are always three (2D: the first is 1).

    `channels` are those of the image; with `previous_labels` K > 0 the previous stage's segmentation follows as K more.
    """

    patch: tuple[int, int, int]
    channels: int
    in_plane: bool
    rotation: float
    mirror_axes: Ints
    previous_labels: int = 0

    @classmethod
    def from_configuration(
        cls, configuration: Configuration, channels: int, mirror: Ints | None, previous_labels: int = 0
    ) -> DefaultAugmentation:
        """`mirror` lists patch axes of the configuration that may be flipped; None means all."""
        size = configuration.patch_size
        patch = (1, *size) if configuration.dims == 2 else size
        lead = 3 - configuration.dims
        axes = tuple(range(configuration.dims)) if mirror is None else mirror
        dummy_2d = configuration.dims == 3 and max(size) / size[0] > DUMMY_2D_ANISOTROPY
        if configuration.dims == 2:
            rotation = ROTATION_2D_ELONGATED if max(size) / min(size) > ELONGATED else ROTATION_2D
        else:
            rotation = ROTATION_2D if dummy_2d else ROTATION_3D
        in_plane = configuration.dims == 2 or dummy_2d
        return cls(
            (patch[0], patch[1], patch[2]), channels, in_plane, rotation, tuple(a + lead for a in axes), previous_labels
        )

    def make_params(self, rng: np.random.Generator) -> AugmentParams:
        """Draw the parameters of one sample; those of the previous stage's segmentation come last, if there is one."""
        matrix = self._matrix(rng)
        steps = self._steps(rng)
        mirror = tuple(axis for axis in self.mirror_axes if rng.random() < P_MIRROR)
        if not self.previous_labels:
            return AugmentParams(matrix, steps, mirror)
        return AugmentParams(matrix, steps, mirror, self._morphs(rng), self._removals(rng))

    def _morphs(self, rng: np.random.Generator) -> tuple[Morph, ...]:
        labels = self._some_labels(rng, P_MORPH, P_MORPH_LABEL)
        return tuple(Morph(label, OPERATIONS[int(rng.integers(len(OPERATIONS)))], rng.uniform(*MORPH_RADIUS)) for label in labels)

    def _removals(self, rng: np.random.Generator) -> tuple[Removal, ...]:
        return tuple(Removal(label, rng.random()) for label in self._some_labels(rng, P_REMOVAL, P_REMOVAL_LABEL))

    def _some_labels(self, rng: np.random.Generator, probability: float, share: float) -> list[int]:
        """With `probability` each label by chance `share`, in random order; else none."""
        if rng.random() >= probability:
            return []
        order = rng.permutation(self.previous_labels) + 1
        return [int(label) for label in order if rng.random() < share]

    def _matrix(self, rng: np.random.Generator) -> NDArray[np.float64] | None:
        rotate, scale = rng.random() < P_ROTATION, rng.random() < P_SCALING
        if not rotate and not scale:
            return None
        matrix = np.eye(3)
        if rotate:
            for axis in (0,) if self.in_plane else (0, 1, 2):
                matrix = matrix @ _rotation(axis, rng.uniform(-self.rotation, self.rotation))
        if scale:
            factor = rng.uniform(*SCALING)
            matrix = matrix @ np.diag([1.0 if self.in_plane else factor, factor, factor])
        return matrix

    def _steps(self, rng: np.random.Generator) -> tuple[Step, ...]:
        every = range(self.channels)
        steps: list[Step] = []
        if rng.random() < P_NOISE:
            std = rng.uniform(*NOISE_STD)
            steps.append(Step("noise", tuple((std,) for _ in every), int(rng.integers(2**62))))
        if rng.random() < P_BLUR:
            steps.append(
                Step(
                    "blur",
                    tuple(
                        tuple(rng.uniform(*BLUR_SIGMA) for _ in range(3)) if rng.random() < P_BLUR_CHANNEL else () for _ in every
                    ),
                )
            )
        if rng.random() < P_BRIGHTNESS:
            steps.append(Step("brightness", tuple((_around_one(rng, *BRIGHTNESS),) for _ in every)))
        if rng.random() < P_CONTRAST:
            steps.append(Step("contrast", tuple((_around_one(rng, *CONTRAST),) for _ in every)))
        if rng.random() < P_LOW_RESOLUTION:
            steps.append(
                Step(
                    "low_resolution",
                    tuple((rng.uniform(*LOW_RESOLUTION),) if rng.random() < P_LOW_RESOLUTION_CHANNEL else () for _ in every),
                )
            )
        if rng.random() < P_GAMMA_INVERTED:
            steps.append(Step("gamma_inverted", tuple((_around_one(rng, *GAMMA),) for _ in every)))
        if rng.random() < P_GAMMA:
            steps.append(Step("gamma", tuple((_around_one(rng, *GAMMA),) for _ in every)))
        return tuple(steps)

    def apply(
        self,
        image: torch.Tensor,
        label: torch.Tensor,
        offset: NDArray[np.float64],
        params: AugmentParams,
        masked: tuple[bool, ...],
        previous: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply drawn parameters to one crop.

        Args:
            image: (channel, z, y, x) float32 crop that covers the transformed patch.
            label: (z, y, x) int16 crop, -1 outside the nonzero mask.
            offset: where the patch centre lies in the crop, z, y, x, in voxels.
            params: what was drawn.
            masked: per channel, whether voxels outside the nonzero mask must be 0.
            previous: (z, y, x) int16 crop of the previous stage's segmentation; needed with `previous_labels` and only then.

        Returns:
            image (channel + previous_labels, *patch) float32 and label (*patch) int64 with -1 turned into background.
        """
        if (previous is not None) != (self.previous_labels > 0):
            raise ValueError("the previous stage's segmentation must be given exactly when the network takes it as input")
        if params.matrix is not None:
            sample = _sampler((label.shape[0], label.shape[1], label.shape[2]), offset, params.matrix, self.patch, image.device)
            image, label = sample(image.float()), _sample_label(label, sample, self.patch)
            previous = None if previous is None else _sample_label(previous, sample, self.patch)
        if image.dtype != torch.float32:
            image = image.float()
        elif params.matrix is None and params.steps:
            image = image.clone()
        for step in params.steps:
            for channel, values in enumerate(step.values):
                if values:
                    image[channel] = _INTENSITY[step.name](image[channel], values, step.seed + channel, self.in_plane)
        if params.mirror:
            image, label = torch.flip(image, [a + 1 for a in params.mirror]), torch.flip(label, list(params.mirror))
        if any(masked):
            outside = label < 0
            channels = torch.tensor(masked, device=image.device).view(-1, 1, 1, 1)
            image = torch.where(channels & outside, torch.zeros((), device=image.device), image)
        if previous is not None:
            image = torch.cat([image, self._previous_channels(previous, params)])
        return image, label.clamp_min(0).long()

    def _previous_channels(self, previous: torch.Tensor, params: AugmentParams) -> torch.Tensor:
        """The previous stage's segmentation on the patch, mirrored, altered, and as one channel per label."""
        previous = torch.flip(previous, list(params.mirror)) if params.mirror else previous
        for morph in params.morphs:
            previous = morph_label(previous, morph.label, morph.operation, morph.radius)
        for removal in params.removals:
            previous = remove_component(previous, removal.label, removal.choice, LARGEST_REMOVED)
        return one_hot(previous, self.previous_labels)


def source_box(start: Ints, patch: Ints, matrix: NDArray[np.float64] | None) -> tuple[Ints, Ints]:
    """Half-open box (low, high) of stored voxels that a patch starting at `start` needs under `matrix`."""
    if matrix is None:
        return tuple(start), tuple(s + p for s, p in zip(start, patch, strict=True))
    half = (np.asarray(patch) - 1) / 2
    reach = np.abs(matrix) @ half
    centre = np.asarray(start) + half
    low = np.floor(centre - reach + 1e-6).astype(int)
    high = np.ceil(centre + reach - 1e-6).astype(int) + 1
    return tuple(low.tolist()), tuple(high.tolist())


def _rotation(axis: int, angle: float) -> NDArray[np.float64]:
    cos, sin = math.cos(angle), math.sin(angle)
    a, b = [i for i in range(3) if i != axis]
    matrix = np.eye(3)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = cos, -sin, sin, cos
    return matrix


def _around_one(rng: np.random.Generator, low: float, high: float) -> float:
    """Half of the draws lie below 1, half above."""
    return float(rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high))


Sample = Callable[[torch.Tensor], torch.Tensor]


def _sampler(
    shape: tuple[int, int, int],
    centre: NDArray[np.float64],
    matrix: NDArray[np.float64],
    patch: tuple[int, int, int],
    device: torch.device,
) -> Sample:
    """One affine resampling, linear: turns float crops (channel, *shape) into patches (channel, *patch)."""
    size = np.asarray(shape, float)
    out = np.asarray(patch, float)
    step = np.divide(2.0, size - 1, out=np.zeros(3), where=size > 1)
    theta = np.concatenate([np.diag(step) @ matrix @ np.diag((out - 1) / 2), (step * centre - (size > 1))[:, None]], axis=1)
    flat = bool(matrix[0, 0] == 1.0 and not matrix[0, 1:].any() and not matrix[1:, 0].any()) and shape[0] == patch[0]
    axes = [2, 1] if flat else [2, 1, 0]
    affine = torch.tensor(theta[axes][:, [*axes, 3]], dtype=torch.float32, device=device)[None]
    size_out = [1, 1, *patch[1:]] if flat else [1, 1, *patch]
    grid = affine_grid(affine, size_out, align_corners=True)

    def sample(values: torch.Tensor) -> torch.Tensor:
        lead = values.shape[0]
        source = values.reshape(1, -1, *values.shape[2:]) if flat else values[None]
        sampled = grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=True)
        return sampled.reshape(lead, *patch)

    return sample


def _sample_label(label: torch.Tensor, sample: Sample, patch: tuple[int, int, int]) -> torch.Tensor:
    """A label map (values from -1) resampled: each label's indicator linearly, and the largest takes the voxel."""
    present = torch.bincount((label.flatten() + 1).int()).nonzero().flatten() - 1
    if len(present) == 1:
        return torch.full(patch, int(present[0]), dtype=label.dtype, device=label.device)
    best = torch.full(patch, -1.0, device=label.device)
    winner = torch.zeros(patch, dtype=torch.long, device=label.device)
    for group in torch.split(present, LABELS_AT_ONCE):
        score, index = sample((label[None] == group.view(-1, 1, 1, 1)).float()).max(0)
        winner = torch.where(score > best, group[index], winner)
        best = torch.maximum(best, score)
    return winner.to(label.dtype)


def _noise(x: torch.Tensor, values: tuple[float, ...], seed: int, in_plane: bool) -> torch.Tensor:
    generator = torch.Generator(device=x.device).manual_seed(seed)
    return x + torch.randn(x.shape, generator=generator, device=x.device) * values[0]


def _blur(x: torch.Tensor, values: tuple[float, ...], seed: int, in_plane: bool) -> torch.Tensor:
    for axis, sigma in enumerate(values):
        size = x.shape[axis]
        if size == 1:
            continue
        radius = math.ceil(4 * sigma)
        taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2)
        taps = taps / taps.sum()
        lead = [i for i in range(3) if i != axis]
        rows = x.permute(*lead, axis).reshape(-1, 1, size)
        rows = torch.nn.functional.conv1d(pad(rows, (radius, radius), mode="replicate"), taps.view(1, 1, -1))
        shape = [x.shape[i] for i in lead] + [size]
        back = [[*lead, axis].index(i) for i in range(3)]
        x = rows.reshape(shape).permute(*back)
    return x


def _brightness(x: torch.Tensor, values: tuple[float, ...], seed: int, in_plane: bool) -> torch.Tensor:
    return x * values[0]


def _contrast(x: torch.Tensor, values: tuple[float, ...], seed: int, in_plane: bool) -> torch.Tensor:
    mean, low, high = x.mean(), x.min(), x.max()
    return ((x - mean) * values[0] + mean).clamp(low, high)


def _low_resolution(x: torch.Tensor, values: tuple[float, ...], seed: int, in_plane: bool) -> torch.Tensor:
    keep = 1 if in_plane else 0
    small = [s if axis < keep else max(1, round(s * values[0])) for axis, s in enumerate(x.shape)]
    down = interpolate(x[None, None], size=small, mode="nearest-exact")
    return interpolate(down, size=list(x.shape), mode="trilinear", align_corners=False)[0, 0]


def _gamma(x: torch.Tensor, values: tuple[float, ...], seed: int, in_plane: bool) -> torch.Tensor:
    mean, std, low = x.mean(), x.std(), x.min()
    span = x.max() - low
    y = ((x - low) / (span + 1e-7)).clamp_min(0) ** values[0] * span + low
    return (y - y.mean()) / y.std().clamp_min(1e-7) * std + mean


def _gamma_inverted(x: torch.Tensor, values: tuple[float, ...], seed: int, in_plane: bool) -> torch.Tensor:
    return -_gamma(-x, values, seed, in_plane)


_INTENSITY = {
    "noise": _noise,
    "blur": _blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "low_resolution": _low_resolution,
    "gamma_inverted": _gamma_inverted,
    "gamma": _gamma,
}
