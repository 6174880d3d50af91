"""What a described network may be at most, and the exact shapes of its weights: known before anything is built, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoseg.networks.describe import Description, Node
from autoseg.types.plan import Configuration, Ints

# Far beyond every network that is used, so that a small file cannot describe one that fills a machine
MOST_STAGES = 16
MOST_BLOCKS = 64
MOST_FEATURES = 8192
MOST_KERNEL = 31
MOST_STRIDE = 16
MOST_PATCH_EDGE = 16384
MOST_BATCH = 4096
MOST_INPUTS = 1024
MOST_OUTPUTS = 4096
MOST_WEIGHTS = 2**31
MOST_ACTIVATIONS = 2**33  # elements of the largest activation of one batch
SPACING_MM = (1e-9, 1e6)


def require_sane(configuration: Configuration, input_channels: int, output_channels: int) -> None:
    """Raise ValueError where a configuration describes a network that no machine should build."""
    c = configuration
    rows: list[tuple[str, Sequence[int], int]] = [
        ("strides: number of stages", (len(c.strides),), MOST_STAGES),
        ("blocks_per_stage", c.blocks_per_stage, MOST_BLOCKS),
        ("decoder_blocks_per_stage", c.decoder_blocks_per_stage, MOST_BLOCKS),
        ("features_per_stage", c.features_per_stage, MOST_FEATURES),
        ("kernel_sizes", [edge for row in c.kernel_sizes for edge in row], MOST_KERNEL),
        ("strides", [edge for row in c.strides for edge in row], MOST_STRIDE),
        ("patch_size", c.patch_size, MOST_PATCH_EDGE),
        ("batch_size", (c.batch_size,), MOST_BATCH),
        ("input channels", (input_channels,), MOST_INPUTS),
        ("output channels", (output_channels,), MOST_OUTPUTS),
    ]
    for name, values, most in rows:
        if values and max(values) > most:
            raise ValueError(f"{name}: at most {most} is accepted, found {max(values)}")
    if len(c.strides) < 2:
        raise ValueError("strides: a network needs at least 2 stages")
    if not all(SPACING_MM[0] <= edge <= SPACING_MM[1] for edge in c.spacing):
        raise ValueError(f"spacing: between {SPACING_MM[0]:g} and {SPACING_MM[1]:g} mm is accepted, found {c.spacing}")
    elements = largest_activation(c, output_channels)
    if elements > MOST_ACTIVATIONS:
        raise ValueError(f"patch_size {c.patch_size} with these features needs activations of {elements} elements, "
                         f"at most {MOST_ACTIVATIONS} are accepted")


def largest_activation(configuration: Configuration, output_channels: int) -> int:
    """Elements of the largest activation of one batch, the input's apart."""
    scale, largest = (1,) * configuration.dims, 0
    for stride, features in zip(configuration.strides, configuration.features_per_stage, strict=True):
        scale = tuple(a * b for a, b in zip(scale, stride, strict=True))
        voxels = math.prod(edge // divisor for edge, divisor in zip(configuration.patch_size, scale, strict=True))
        largest = max(largest, voxels * max(2 * features, output_channels))  # twice: the decoder's concatenation
    return largest * configuration.batch_size


def tensor_shapes(description: Description) -> dict[str, Ints]:
    """Names and shapes of all weights of the network that `build` makes of a description.

    Raises ValueError when they are more than `MOST_WEIGHTS` numbers.
    """
    channels = {node.name: node.channels for node in description.nodes}
    shapes: dict[str, Ints] = {}
    for node in description.nodes:
        shapes.update(_node_shapes(node, channels[node.inputs[0]] if node.inputs else 0))
    total = sum(math.prod(shape) for shape in shapes.values())
    if total > MOST_WEIGHTS:
        raise ValueError(f"the network would have {total} weights, at most {MOST_WEIGHTS} are accepted")
    return shapes


def _node_shapes(node: Node, inputs: int) -> dict[str, Ints]:
    head = f"units.{node.name}"
    if node.op in ("up", "head"):
        pair = (inputs, node.channels) if node.op == "up" else (node.channels, inputs)  # torch's own order
        return {f"{head}.weight": (*pair, *node.kernel), f"{head}.bias": (node.channels,)}
    if node.op != "conv":
        return {}
    shapes: dict[str, Ints] = {f"{head}.conv.weight": (node.channels, inputs, *node.kernel)}
    if node.bias:
        shapes[f"{head}.conv.bias"] = (node.channels,)
    if node.norm:
        shapes |= {f"{head}.norm.weight": (node.channels,), f"{head}.norm.bias": (node.channels,)}
    return shapes
