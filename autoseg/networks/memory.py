"""How much memory a training step and a prediction take, and how much arithmetic, from the description alone (no torch).

What autograd keeps is counted tensor by tensor as torch keeps it; the peak comes from playing the step through (timeline.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from autoseg.networks.describe import Description, Node, describe, segments
from autoseg.networks.timeline import FLOAT, Setting, play, weights_of
from autoseg.types.plan import Configuration, Ints

Precision = Literal["bf16", "fp16", "fp32"]
Device = Literal["cuda", "cpu"]
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
OPTIMIZER_STATES = {"sgd": 1, "adamw": 2}  # float32 tensors per weight: momentum; two moments


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for.

    `saved` is what autograd keeps of the network for the backward pass, `loss` what it keeps of the loss, labels included.
    `workspace` is the most that the passes take beside these: image, logits, gradients, copies inside operations.
    """

    weights: int
    gradients: int
    optimizer: int
    saved: int
    loss: int
    workspace: int

    @property
    def total(self) -> int:
        """The peak: in the passes, or in the optimiser's step, which copies all gradients when the rest is gone."""
        return self.weights + self.optimizer + max(self.saved + self.loss + self.workspace, 2 * self.gradients)


def training_memory(
    configuration: Configuration, input_channels: int, output_channels: int, precision: Precision = "bf16", *,
    batch_size: int | None = None, optimizer: str = "sgd", device: Device = "cuda", regions: bool = False, ignore: bool = False,
) -> Memory:
    """Memory of one training step of the Dice and cross-entropy loss with deep supervision.

    `batch_size` is the configuration's unless given; `regions` and `ignore` say what kind of labels the loss is for. Not
    counted: the CUDA context, what the allocator keeps beyond what is asked for, and augmentation, which runs between steps.
    """
    description = describe(configuration, input_channels, output_channels)
    batch = configuration.batch_size if batch_size is None else batch_size
    heads = _trained(description)
    setting = Setting(ITEMSIZE[precision], device == "cpu", heads, regions, ignore)
    saved, kept, peak = play(description, setting, configuration.patch_size, batch)
    weights = parameters(description) * FLOAT
    states = OPTIMIZER_STATES.get(optimizer, 0)
    return Memory(weights, weights, weights * states, saved, kept - saved, peak - kept)


def saved_bytes(
    description: Description, patch: Ints, batch: int, precision: Precision, checkpointing: int = 0, heads: int | None = None,
    device: Device = "cpu",
) -> int:
    """Bytes that autograd keeps of the network's forward pass, parameters apart; `heads`: all but the coarsest unless given."""
    described = replace(description, checkpointing=checkpointing)
    return play(described, Setting(ITEMSIZE[precision], device == "cpu", heads or _trained(description)), patch, batch).saved


def inference_memory(
    configuration: Configuration, input_channels: int, output_channels: int, precision: Precision, tiles: int = 1
) -> Memory:
    """Memory of predicting `tiles` tiles at once on a GPU; the image and its blended logits come on top.

    `loss` is 0; `workspace` holds activations, and the float32 logits of a tile, flipped, and their sum over mirrorings.
    """
    description = describe(configuration, input_channels, output_channels)
    setting = Setting(ITEMSIZE[precision], cpu=False, heads=1, training=False)
    peak = play(description, setting, configuration.patch_size, tiles).peak
    weights = parameters(description)
    copies = weights * ITEMSIZE[precision] if precision != "fp32" else 0  # autocast keeps them until the end of the pass
    logits = math.prod(configuration.patch_size) * tiles * output_channels * FLOAT
    return Memory(weights * FLOAT, 0, 0, 0, 0, copies + max(peak + logits, 3 * logits))


def parameters(description: Description) -> int:
    """Parameters of the network, weights and biases."""
    return _parameters(description.nodes)


@lru_cache(maxsize=128)
def _parameters(nodes: tuple[Node, ...]) -> int:
    channels = {node.name: node.channels for node in nodes}
    total = 0
    for node in nodes:
        weights = weights_of(node, channels[node.inputs[0]]) if node.inputs else 0
        biases = node.channels if weights and node.bias else 0
        total += weights + biases + (2 * node.channels if node.op == "conv" and node.norm else 0)
    return total


def multiply_adds(configuration: Configuration, input_channels: int, output_channels: int) -> int:
    """Multiply-adds of all convolutions in one forward pass of one sample in training."""
    return _multiply_adds(describe(configuration, input_channels, output_channels), configuration.patch_size, recomputed=False)


def recomputed_share(configuration: Configuration, input_channels: int, output_channels: int) -> float:
    """Multiply-adds that checkpointing adds to a training step, as a share of the step without (three forward passes)."""
    description = describe(configuration, input_channels, output_channels)
    again, once = (_multiply_adds(description, configuration.patch_size, recomputed=part) for part in (True, False))
    return again / (3 * once)


def _multiply_adds(description: Description, patch: Ints, recomputed: bool) -> int:
    channels = {node.name: node.channels for node in description.nodes}
    total = 0
    for segment in segments(description, _trained(description), description.checkpointing):
        for node in segment.nodes:
            weights = weights_of(node, channels[node.inputs[0]])
            if node.op == "up":
                weights //= math.prod(node.kernel)  # each output voxel is reached through one entry of the kernel
            if segment.recompute or not recomputed:
                total += weights * math.prod(edge // step for edge, step in zip(patch, node.scale, strict=True))
    return total


def _trained(description: Description) -> int:
    """Heads that are trained: all but the coarsest, at least one."""
    return max(1, len(description.heads) - 1)
