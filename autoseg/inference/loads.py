"""What a case takes of memory, from its grids and the networks that it meets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autoseg.arrays.postprocess import needs_probabilities
from autoseg.arrays.preprocess import target_spacing
from autoseg.arrays.resample import resampled_shape
from autoseg.arrays.tiles import Tiling, make_tiling
from autoseg.arrays.uncertainty import MAPS
from autoseg.inference.memory import CaseLoad, StreamLoad
from autoseg.inference.records import Member, Wishes
from autoseg.networks.hardware import Resolved
from autoseg.networks.memory import inference_memory
from autoseg.types.geometry import Grid, Shape
from autoseg.types.labels import Labels
from autoseg.types.plan import Configuration
from autoseg.types.record import Spec

_REORDERED = 1.5  # CPU convolutions copy their input into blocks of channels
_PLANES, _TEMPORARIES, _BLOCK_BYTES = 2, 5, 256 << 20  # restoring on a card: planes kept per member, and blocks amid computing
# bytes per voxel that a step of post-processing takes beside the mask and its result
_BESIDE = {"largest_component": 10, "minimum_size": 10, "fill_holes": 20, "opening": 14, "threshold": 10, "crf": 60}


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
    stages: Sequence[Member], shapes: Sequence[Shape], stored: Shape, wishes: Wishes, precision: Resolved, steps: Sequence[Spec],
) -> CaseLoad:
    """What a case takes when the stages (members and previous stages) see images of `shapes`; `steps` are its post-processing."""
    labels, planes = stages[0].plan.labels, sorted(stored)[1:]
    outputs = labels.output_count
    made = math.prod(stored) * _made_per_voxel(stages, labels, wishes, steps)
    streams: list[StreamLoad] = []
    images = 0
    for member, shape in zip(stages, shapes, strict=True):
        inputs = len(member.plan.channels) + (member.previous is not None)
        images += 4 * math.prod(shape) * inputs
        made += math.prod(shape) * _made_per_network_voxel(stages, member, wishes, steps)
        exact = is_exact(member, precision, wishes.gauged)
        parts = len(member.networks) if exact else 1
        held = outputs * parts + (len(MAPS) if wishes.gauged else 0)
        work = _tile_bytes(member, outputs, precision, exact)
        streams.append(StreamLoad(tiling_of(shape, member.configuration), held, work, exact))
    plane = 4 * outputs * math.prod(planes)
    members = len(stages) - sum(stage.previous is not None for stage in stages)
    return CaseLoad(tuple(streams), made, images, members * _PLANES * plane + _TEMPORARIES * min(plane, _BLOCK_BYTES))


def _made_per_voxel(stages: Sequence[Member], labels: Labels, wishes: Wishes, steps: Sequence[Spec]) -> int:
    """Bytes per stored voxel: inside indices, disk values, probabilities, maps, and what post-processing takes."""
    outputs, decides = labels.output_count, needs_probabilities(steps)
    values = labels.decode(np.zeros(1, np.uint8)).itemsize
    dense = (wishes.probabilities or decides) + _is_twice(stages, wishes, steps)
    beside = max((_BESIDE.get(step.kind, 0) + (4 * outputs if step.kind == "crf" else 0) for step in steps), default=0)
    return _index_bytes(labels) + values + 4 * outputs * dense + (8 if wishes.uncertainty else 0) + beside


def _made_per_network_voxel(stages: Sequence[Member], member: Member, wishes: Wishes, steps: Sequence[Spec]) -> int:
    """Bytes per voxel that a member's networks see: the previous stage's labels, gauges, and whole logits where they are kept."""
    labels, made = member.plan.labels, 0
    outputs = labels.output_count
    if member.previous is not None:
        made += 4 * (len(member.plan.channels) + 1) + _index_bytes(labels)
    if wishes.gauged:
        made += 4 * (len(MAPS) + 1) + (outputs if labels.regions else _index_bytes(labels))
    return made + (4 * outputs if _is_twice(stages, wishes, steps) else 0)


def _index_bytes(labels: Labels) -> int:
    return 2 if labels.output_count > 255 else 1


def _is_twice(stages: Sequence[Member], wishes: Wishes, steps: Sequence[Spec]) -> bool:
    """Whether probabilities are made both with and without temperatures."""
    return wishes.probabilities and any(stage.temperature != 1 for stage in stages) and needs_probabilities(steps)


def _tile_bytes(member: Member, outputs: int, precision: Resolved, exact: bool) -> int:
    """Bytes of a pass of one tile: the network's, and beside it the logits of the networks before."""
    inputs, networks = len(member.plan.channels), len(member.networks)
    if member.previous is not None:
        inputs += len(member.plan.labels.foreground)
    memory = inference_memory(member.configuration, inputs, outputs, precision)
    logits = 4 * outputs * math.prod(member.configuration.patch_size)
    others = 0 if networks == 1 else 2 * networks * logits if exact else logits
    return int(_REORDERED * memory.workspace) + others
