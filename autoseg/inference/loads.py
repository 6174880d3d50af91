"""What a case takes of memory, from its grids and the networks that it meets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoseg.arrays.preprocess import target_spacing
from autoseg.arrays.resample import resampled_shape
from autoseg.arrays.tiles import Tiling, make_tiling
from autoseg.arrays.uncertainty import MAPS
from autoseg.inference.memory import CaseLoad, StreamLoad
from autoseg.inference.records import Member, Wishes
from autoseg.networks.hardware import Resolved
from autoseg.networks.memory import inference_memory
from autoseg.types.geometry import Grid, Shape
from autoseg.types.plan import Configuration

_REORDERED = 1.5  # CPU convolutions copy their input into blocks of channels


def tiling_of(shape: Shape, configuration: Configuration) -> Tiling:
    """The tiles of a preprocessed image."""
    patch = (1, *configuration.patch_size) if configuration.dims == 2 else configuration.patch_size
    return make_tiling(shape, (patch[0], patch[1], patch[2]))


def is_exact(member: Member, precision: Resolved, uncertainty: bool) -> bool:
    """Whether logits are gathered exactly as nnU-Net does, in float16 and each fold on its own.

    Only in fp32: in another precision the network's own rounding is larger, and float32 sums are faster.
    """
    return member.plan.arithmetic == "nnunet" and precision == "fp32" and not uncertainty


def network_grid(grid: Grid, member: Member) -> Shape:
    """The shape of a stored image for a member's networks, when all of it counts."""
    turned = grid.mapped(grid.turned(member.plan.orientation))
    order = member.plan.transpose_forward
    shape = (turned.shape[order[0]], turned.shape[order[1]], turned.shape[order[2]])
    spacing = (turned.spacing[order[0]], turned.spacing[order[1]], turned.spacing[order[2]])
    return resampled_shape(shape, spacing, target_spacing(spacing, member.configuration, member.plan.resampling))


def case_load(
    stages: Sequence[Member], shapes: Sequence[Shape], stored: Shape, wishes: Wishes, precision: Resolved, dense: bool,
    outputs: int,
) -> CaseLoad:
    """What a case takes when the stages (members and previous stages) see images of `shapes`.

    `dense` says that probabilities of `outputs` classes are made on the stored grid.
    """
    voxels = math.prod(stored)
    label_bytes = 2 if outputs > 255 else 1
    made = voxels * 2 * label_bytes  # inside indices, and disk values
    made += voxels * 4 * outputs if dense else 0
    made += voxels * 8 if wishes.uncertainty else 0
    streams: list[StreamLoad] = []
    images = 0
    for member, shape in zip(stages, shapes, strict=True):
        channels = len(member.plan.channels)
        inputs = channels + (member.previous is not None)
        images += 4 * math.prod(shape) * channels
        made += math.prod(shape) * (4 * inputs + label_bytes) if member.previous is not None else 0
        made += math.prod(shape) * (4 * (len(MAPS) + 1) + 1) if wishes.gauged else 0
        exact = is_exact(member, precision, wishes.gauged)
        parts = len(member.networks) if exact else 1
        held = outputs * parts + (len(MAPS) if wishes.gauged else 0)
        streams.append(StreamLoad(tiling_of(shape, member.configuration), held, _tile_bytes(member, outputs, precision), exact))
    return CaseLoad(tuple(streams), made, images)


def _tile_bytes(member: Member, outputs: int, precision: Resolved) -> int:
    inputs = len(member.plan.channels)
    if member.previous is not None:
        inputs += len(member.plan.labels.foreground)
    memory = inference_memory(member.configuration, inputs, outputs, precision)
    return int(_REORDERED * memory.workspace)
