"""The rules that turn spacings and shapes into a plan's numbers: pure functions on plain numbers, one rule each.

All rules and constants are nnU-Net's (Isensee et al. 2021, methods and supplementary note on heuristic rules; version 2.8.1).
Axis order is z, y, x, before the transpose in `target_spacing` and `transpose_order`, after it everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = tuple[int, ...]
Floats = tuple[float, ...]

BASE_FEATURES = 32
MAX_FEATURES = {2: 512, 3: 320}
MIN_EDGE = 4  # voxels an axis keeps at the bottleneck
MIN_BATCH = 2
REFERENCE_BATCH = {2: 12, 3: 2}
INITIAL_VOXELS = {2: 2048**2, 3: 256**3}  # volume of the patch that shrinking starts from
ANISOTROPY = 3.0
SPACING_GAP = 2.0  # axes whose spacings differ by this factor are neither pooled nor convolved together
LOW_RES_COVERAGE = 0.25
LOW_RES_STEP = 1.03
LOW_RES_MIN_GAIN = 2.0
MASK_BELOW = 0.75  # median share of the image left after cropping, below which z-scores are taken inside the nonzero mask
ENCODER_CONVS = DECODER_CONVS = 2
RESIDUAL_BLOCKS = (1, 3, 4, 6)  # the last entry repeats
NORMALIZATION_OF = {
    "ct": "CTNormalization", "nonorm": "NoNormalization", "zscore": "ZScoreNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization", "rgb_to_0_1": "RGBTo01Normalization",
}
DEFAULT_NORMALIZATION = "ZScoreNormalization"

Network = Literal["unet", "residual-unet"]


@dataclass(frozen=True)
class Recipe:
    """The numbers in which the planners differ.

    `elements_2d` and `elements_3d` are how many activation elements per patch go with `memory_gb`, at a batch of 12 (2D) and
    2 (3D). `batch_share` is the largest part of the data set's voxels one batch may hold. With `size_for_min_batch` the patch
    is sized so that the smallest batch fits, else so that the reference batch does.
    """

    network: Network
    memory_gb: float
    elements_2d: float
    elements_3d: float
    batch_share: float
    size_for_min_batch: bool

    def budget(self, dims: int, memory_gb: float) -> float:
        """Activation elements allowed per patch of the reference batch at `memory_gb`; memory is taken as proportional."""
        return (self.elements_2d if dims == 2 else self.elements_3d) * (memory_gb / self.memory_gb)

    def largest(self, dims: int, memory_gb: float) -> float:
        """Activation elements that one patch may have at most at `memory_gb`."""
        return self.budget(dims, memory_gb) * (REFERENCE_BATCH[dims] / MIN_BATCH if self.size_for_min_batch else 1)


@dataclass(frozen=True)
class Topology:
    """A legal patch with the strides and kernels of each stage; the first stage has stride 1.

    `tiny` where the image is too small for the usual rule and is halved once all the same.
    """

    patch_size: Ints
    strides: tuple[Ints, ...]
    kernel_sizes: tuple[Ints, ...]
    divisor: Ints
    tiny: bool = False

    @property
    def bottleneck(self) -> Ints:
        """Voxels per axis at the lowest stage."""
        return tuple(edge // step for edge, step in zip(self.patch_size, self.divisor, strict=True))


@dataclass(frozen=True)
class FittedPatch:
    """The largest patch within the memory target, and its activation elements; `fits` is false when even the smallest is not.

    `start` is the patch it was found from, in so many `steps`.
    """

    topology: Topology
    elements: int
    fits: bool = True
    start: Floats = ()
    steps: int = 0

    @property
    def voxels(self) -> int:
        """Voxels of the patch."""
        return math.prod(self.topology.patch_size)


@dataclass(frozen=True)
class BatchLimits:
    """How many patches the memory target holds, and how many the allowed share of the data set comes to."""

    memory: int
    share: int

    @property
    def size(self) -> int:
        """The smaller of the two, but at least 2."""
        return max(min(self.memory, self.share), MIN_BATCH)

    @property
    def limit(self) -> Literal["memory", "share", "minimum"]:
        """Which of them decides."""
        if min(self.memory, self.share) < MIN_BATCH:
            return "minimum"
        return "memory" if self.memory <= self.share else "share"


@dataclass(frozen=True)
class LowRes:
    """A coarser 3D spacing at which the patch covers a quarter of the median image; `gain` is how many times fewer voxels."""

    spacing: Floats
    median_shape: Floats
    voxels: float
    fitted: FittedPatch
    gain: float

    @property
    def worthwhile(self) -> bool:
        """Whether the image becomes so much smaller that a configuration of its own pays."""
        return self.gain >= LOW_RES_MIN_GAIN


def target_spacing(spacings: NDArray[np.float64], shapes: NDArray[np.int64]) -> tuple[float, float, float]:
    """Spacing in mm that all cases are resampled to, from per-case spacings and cropped shapes, both (cases, 3).

    The median per axis, except that a far coarser axis with far fewer slices gets the 10th percentile of its spacings, so that
    the finer cases of an anisotropic data set are not blurred.
    """
    target = np.percentile(spacings, 50, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    size = np.median(shapes, axis=0)
    coarsest_other = float(target[others].max())
    if target[worst] > ANISOTROPY * coarsest_other and size[worst] * ANISOTROPY < size[others].min():
        fine = float(np.percentile(spacings[:, worst], 10))
        # the axis stays the coarsest one, so that the transpose does not change
        target[worst] = fine if fine >= coarsest_other else coarsest_other + 1e-5
    return float(target[0]), float(target[1]), float(target[2])


def transpose_order(spacing: Floats) -> tuple[int, int, int]:
    """The axis permutation that puts the coarsest axis first and keeps the order of the others."""
    worst = int(np.argmax(spacing))
    first, second = (axis for axis in range(3) if axis != worst)
    return worst, first, second


def median_resampled_shape(spacings: NDArray[np.float64], shapes: NDArray[np.int64], spacing: Floats) -> Floats:
    """Median over cases of the shapes (cases, 3) after resampling to `spacing`; may end in .5."""
    return tuple(float(edge) for edge in np.median(np.rint(spacings / np.asarray(spacing) * shapes), axis=0))


def initial_patch(spacing: Floats, median_shape: Floats) -> Floats:
    """The patch that shrinking starts from: about cubic in mm, of fixed volume, no larger than the median image."""
    dims = len(spacing)
    extent = 1 / np.asarray(spacing)
    edges = extent * (INITIAL_VOXELS[dims] / np.prod(extent)) ** (1 / dims)
    return tuple(min(round(float(edge)), size) for edge, size in zip(edges, median_shape, strict=True))


def _poolable_axes(spacing: Sequence[float], edges: Sequence[float]) -> list[int]:
    """Axes to halve next: long enough, and of about the finest spacing among those."""
    long_enough = [axis for axis, edge in enumerate(edges) if edge >= 2 * MIN_EDGE]
    if not long_enough:
        return []
    finest = min(spacing[axis] for axis in long_enough)
    axes = [axis for axis in long_enough if spacing[axis] / finest < SPACING_GAP]
    if len(axes) == 1 and edges[axes[0]] < 3 * MIN_EDGE:
        return []
    return axes


def _axes_of_a_tiny_image(spacing: Sequence[float], edges: Sequence[float]) -> list[int]:
    """Axes to halve once where the usual rule halves none, so that a tiny image still gets a network with two stages."""
    candidates = [axis for axis, edge in enumerate(edges) if edge >= MIN_EDGE] or list(range(len(edges)))
    finest = min(spacing[axis] for axis in candidates)
    return [axis for axis in candidates if spacing[axis] / finest < SPACING_GAP]


@lru_cache(maxsize=4096)
def topology(spacing: Floats, size: Floats) -> Topology:
    """Strides and kernels for a patch of about `size` at `spacing`, and the patch padded to what the strides divide.

    A stage halves the axes of about the finest spacing, as long as 4 voxels remain; kernels have edge 1 along an axis until its
    spacing has been caught up with. There are always at least two stages: an image with every edge under 8 is halved once.
    """
    dims = len(size)
    edges, current = list(size), list(spacing)
    kernel = [1] * dims
    divisor = [1] * dims
    strides: list[Ints] = [(1,) * dims]
    kernels: list[Ints] = []
    axes = _poolable_axes(current, edges)
    smallest = [1.0] * dims
    tiny = not axes
    if tiny:
        axes = _axes_of_a_tiny_image(current, edges)
        smallest = [float(MIN_EDGE if axis in axes else 1) for axis in range(dims)]
    while axes:
        finest = min(current)
        kernel = [3 if edge == 3 or mm / finest < SPACING_GAP else 1 for edge, mm in zip(kernel, current, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in axes else 1 for axis in range(dims)))
        for axis in axes:
            divisor[axis] *= 2
            edges[axis] = math.ceil(edges[axis] / 2)
            current[axis] *= 2
        axes = _poolable_axes(current, edges)
    kernels.append((3,) * dims)
    patch = tuple(math.ceil(max(edge, low) / step) * step for edge, low, step in zip(size, smallest, divisor, strict=True))
    return Topology(patch, tuple(strides), tuple(kernels), tuple(divisor), tiny)


def features_per_stage(stages: int, dims: int) -> Ints:
    """Feature maps per stage: 32, doubled at each stage up to 512 (2D) or 320 (3D)."""
    return tuple(min(BASE_FEATURES * 2**stage, MAX_FEATURES[dims]) for stage in range(stages))


def blocks_per_stage(network: Network, stages: int) -> Ints:
    """Encoder stages' lengths: convolutions ("unet") or residual blocks ("residual-unet")."""
    if network == "unet":
        return (ENCODER_CONVS,) * stages
    return tuple(RESIDUAL_BLOCKS[min(stage, len(RESIDUAL_BLOCKS) - 1)] for stage in range(stages))


def decoder_blocks_per_stage(network: Network, stages: int) -> Ints:
    """Convolutions of each decoder stage, one entry less than there are encoder stages."""
    return (DECODER_CONVS if network == "unet" else 1,) * (stages - 1)


def activation_elements(network: Network, patch_size: Ints, strides: Sequence[Ints], outputs: int) -> int:
    """Output elements of all convolutions for one patch, without deep-supervision heads; `outputs` is the declared label count.

    Stage s has F_s features and V_s voxels. Plain: sum n_enc F_s V_s, over decoder stages (n_dec + 1) F_s V_s, and
    outputs V_0. Residual: a stem F_0 V_0, sum (2 b_s + k_s) F_s V_s with k_s = 1 where a block changes the channels or has a
    stride, over decoder stages 2 F_s V_s, and outputs V_0.
    """
    stages = len(strides)
    maps: list[int] = []
    edges = list(patch_size)
    for features, stride in zip(features_per_stage(stages, len(patch_size)), strides, strict=True):
        edges = [edge // step for edge, step in zip(edges, stride, strict=True)]
        maps.append(features * math.prod(edges))
    decoder_convs = decoder_blocks_per_stage(network, stages)
    total = outputs * math.prod(patch_size)
    total += sum((convs + 1) * size for convs, size in zip(decoder_convs, maps[:-1], strict=True))
    blocks = blocks_per_stage(network, stages)
    if network == "unet":
        return total + sum(count * size for count, size in zip(blocks, maps, strict=True))
    shortcuts = (0,) + (1,) * (stages - 1)
    return total + maps[0] + sum((2 * b + k) * size for b, k, size in zip(blocks, shortcuts, maps, strict=True))


def smaller(spacing: Floats, current: Topology, median_shape: Floats) -> Topology | None:
    """The patch one step smaller along the axis that covers most of the median image; None when no axis can give more."""
    patch = current.patch_size
    by_coverage = sorted(range(len(patch)), key=lambda axis: (patch[axis] / median_shape[axis], axis), reverse=True)
    for axis in by_coverage:
        trial = list(patch)
        trial[axis] -= current.divisor[axis]
        if trial[axis] < 1:
            continue
        # the smaller patch may need less divisibility, so the step is the one of the patch it leads to (256 gives 224, not 192)
        trial[axis] = patch[axis] - topology(spacing, tuple(trial)).divisor[axis]
        if trial[axis] >= 1:
            return topology(spacing, tuple(trial))
    return None


def fit_patch(spacing: Floats, median_shape: Floats, outputs: int, recipe: Recipe, memory_gb: float) -> FittedPatch:
    """The largest patch whose activation elements stay within the memory target, with its topology."""
    dims = len(spacing)
    budget = recipe.budget(dims, memory_gb)

    def elements(layout: Topology) -> int:
        return activation_elements(recipe.network, layout.patch_size, layout.strides, outputs)

    def too_large(count: int) -> bool:
        return (count / REFERENCE_BATCH[dims] * MIN_BATCH if recipe.size_for_min_batch else count) > budget

    start = initial_patch(spacing, median_shape)
    layout = topology(spacing, start)
    count = elements(layout)
    tried = {layout.patch_size}
    while too_large(count):
        less = smaller(spacing, layout, median_shape)
        if less is None or less.patch_size in tried:  # padding brings the smallest patches back to where they came from
            return FittedPatch(layout, count, fits=False, start=start, steps=len(tried) - 1)
        layout, count = less, elements(less)
        tried.add(layout.patch_size)
    return FittedPatch(layout, count, start=start, steps=len(tried) - 1)


def batch_limits(fitted: FittedPatch, dataset_voxels: float, recipe: Recipe, memory_gb: float) -> BatchLimits:
    """Patches per batch: what the memory target holds, no more than the allowed share of the data set, at least 2."""
    dims = len(fitted.topology.patch_size)
    in_memory = round(recipe.budget(dims, memory_gb) / fitted.elements * REFERENCE_BATCH[dims])
    return BatchLimits(in_memory, round(dataset_voxels * recipe.batch_share / fitted.voxels))


def low_res(
    spacing: Floats, median_shape: Floats, full_res: FittedPatch, outputs: int, recipe: Recipe, memory_gb: float
) -> LowRes | None:
    """The coarser spacing at which a patch sees a quarter of the image; None where full resolution does so already."""
    full_spacing, full_shape = np.asarray(spacing, np.float64), np.asarray(median_shape, np.float64)
    full_voxels = math.prod(median_shape)
    if full_res.voxels / full_voxels >= LOW_RES_COVERAGE:
        return None
    # two or more stages hold at least 5 maps of the patch's size, beside the outputs, in either network
    most = recipe.budget(3, memory_gb) / (5 * BASE_FEATURES + outputs)
    coarse, shape, voxels, fitted = full_spacing.copy(), full_shape, full_voxels, full_res
    while fitted.voxels / voxels < LOW_RES_COVERAGE:
        finer = coarse.max() / coarse > SPACING_GAP
        coarse[finer if finer.any() else slice(None)] *= LOW_RES_STEP
        exact = full_spacing / coarse * full_shape
        shape, voxels = np.maximum(np.rint(exact), 1), float(np.prod(exact))
        if most / voxels < LOW_RES_COVERAGE:
            continue  # whatever patch fits here, it is too small: saves most of the search
        fitted = fit_patch(tuple(coarse.tolist()), tuple(shape.tolist()), outputs, recipe, memory_gb)
    return LowRes(tuple(coarse.tolist()), tuple(shape.tolist()), voxels, fitted, full_voxels / voxels)


def normalization_for(channel: str) -> str:
    """The normalisation that a channel's name asks for; any name outside the table (MR, T1, ...) means z-score."""
    return NORMALIZATION_OF.get(channel.casefold(), DEFAULT_NORMALIZATION)


def use_mask(normalizations: Sequence[str], relative_size_after_crop: float) -> tuple[bool, ...]:
    """Per channel, whether it is normalised inside the nonzero mask only: z-scores of images that are mostly empty."""
    return tuple(name == "ZScoreNormalization" and relative_size_after_crop < MASK_BELOW for name in normalizations)
