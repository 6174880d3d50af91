"""What a network consists of, without torch: planning, memory and building all walk this one description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from autoseg.errors import PlanError
from autoseg.types.plan import Configuration, Ints

Op = Literal["input", "conv", "up", "concat", "pool", "add", "head"]


class Node(NamedTuple):
    """One operation. `scale` is the cumulative stride of its output against the patch, `stage` its resolution stage.

    Nodes of one `block` follow one another and are computed again together where activations are checkpointed.
    conv: convolution, then instance norm and leaky ReLU where `norm` and `activation` say so. up: transposed convolution with
    kernel = stride. pool: average pooling with kernel = stride. add: sum of the inputs, then leaky ReLU. head: 1x1 convolution.
    """

    name: str
    op: Op
    inputs: tuple[str, ...]
    channels: int
    scale: Ints
    kernel: Ints = ()
    stride: Ints = ()
    norm: bool = True
    activation: bool = True
    bias: bool = True
    zero_norm: bool = False
    stage: int = 0
    block: str = ""


@dataclass(frozen=True)
class Description:
    """A whole network: nodes in the order they run, and the heads, finest first.

    Inner activations of the `checkpointing` finest stages are not kept for the backward pass but computed again in it.
    """

    dims: int
    input_channels: int
    output_channels: int
    nodes: tuple[Node, ...]
    heads: tuple[str, ...]
    checkpointing: int = 0


@dataclass(frozen=True)
class Segment:
    """Nodes that run together: values they need from outside, the ones needed no more after them, and what they hand on."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    last_used: tuple[str, ...]
    outputs: tuple[str, ...]
    recompute: bool = False


class _Layout(NamedTuple):
    """What of a configuration its nodes follow from."""

    kind: str
    dims: int
    strides: tuple[Ints, ...]
    kernel_sizes: tuple[Ints, ...]
    features_per_stage: Ints
    blocks_per_stage: Ints
    decoder_blocks_per_stage: Ints


@dataclass
class _Sketch:
    """Collects nodes while a network is described; each belongs to the block that was begun last."""

    nodes: list[Node] = field(default_factory=list)
    stage: int = 0
    block: str = ""

    def begin(self, stage: int, block: str) -> None:
        self.stage, self.block = stage, block

    def add(self, node: Node) -> Node:
        self.nodes.append(node._replace(stage=self.stage, block=self.block))
        return self.nodes[-1]


def describe(configuration: Configuration, input_channels: int, output_channels: int) -> Description:
    """Describe the network of a configuration.

    Raises:
        PlanError: unknown network kind.
    """
    kind, made = configuration.network.kind, configuration
    if kind not in ENCODERS:
        raise PlanError(f"unknown network {kind!r}; choose from {', '.join(ENCODERS)}")
    if made.network.options:
        raise PlanError(f"network {kind!r} takes no options, found {', '.join(made.network.options)}")
    layout = _Layout(kind, made.dims, made.strides, made.kernel_sizes, made.features_per_stage, made.blocks_per_stage,
                     made.decoder_blocks_per_stage)
    nodes, heads = _nodes(layout, input_channels, output_channels)
    return Description(made.dims, input_channels, output_channels, nodes, heads, made.checkpointing)


@lru_cache(maxsize=128)
def _nodes(layout: _Layout, input_channels: int, output_channels: int) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """The nodes and the heads, the same objects each time: whoever goes through budgets asks for few networks many times."""
    sketch = _Sketch()
    start = sketch.add(Node("input", "input", (), input_channels, (1,) * layout.dims))
    skips = ENCODERS[layout.kind](sketch, layout, start)
    heads = _decoder(sketch, layout, skips, output_channels)
    return tuple(sketch.nodes), tuple(heads)


def _scaled(scale: Ints, stride: Ints) -> Ints:
    return tuple(a * b for a, b in zip(scale, stride, strict=True))


def _plain_encoder(sketch: _Sketch, layout: _Layout, node: Node) -> list[Node]:
    """Stages of convolution units; the first unit of a stage carries its stride (nnU-Net's PlainConvUNet)."""
    skips = []
    ones = (1,) * layout.dims
    for stage, features in enumerate(layout.features_per_stage):
        kernel = layout.kernel_sizes[stage]
        sketch.begin(stage, f"encoder_{stage}")
        for block in range(layout.blocks_per_stage[stage]):
            stride = layout.strides[stage] if block == 0 else ones
            node = sketch.add(
                Node(f"encoder_{stage}_{block}", "conv", (node.name,), features, _scaled(node.scale, stride), kernel, stride)
            )
        skips.append(node)
    return skips


def _residual_encoder(sketch: _Sketch, layout: _Layout, node: Node) -> list[Node]:
    """A stem, then stages of residual blocks of two convolutions; the skip is average pooling and 1x1 convolution (ResNet-D)."""
    skips = []
    ones = (1,) * layout.dims
    sketch.begin(0, "encoder_0_0")
    node = sketch.add(
        Node("stem", "conv", (node.name,), layout.features_per_stage[0], node.scale, layout.kernel_sizes[0], ones)
    )
    for stage, features in enumerate(layout.features_per_stage):
        kernel = layout.kernel_sizes[stage]
        for block in range(layout.blocks_per_stage[stage]):
            stride = layout.strides[stage] if block == 0 else ones
            scale, name, source = _scaled(node.scale, stride), f"encoder_{stage}_{block}", node
            sketch.begin(stage, name)
            first = sketch.add(Node(f"{name}_a", "conv", (source.name,), features, scale, kernel, stride))
            second = sketch.add(
                Node(f"{name}_b", "conv", (first.name,), features, scale, kernel, ones, activation=False, zero_norm=True)
            )
            if max(stride) > 1:
                source = sketch.add(Node(f"{name}_pool", "pool", (source.name,), source.channels, scale, stride=stride))
            if source.channels != features:
                source = sketch.add(
                    Node(f"{name}_skip", "conv", (source.name,), features, scale, ones, ones, activation=False, bias=False)
                )
            node = sketch.add(Node(name, "add", (second.name, source.name), features, scale))
        skips.append(node)
    return skips


def _decoder(sketch: _Sketch, layout: _Layout, skips: list[Node], output_channels: int) -> list[str]:
    """Up-sample, concatenate the skip, convolve; a head at every level. Returns the heads, finest first."""
    node, heads = skips[-1], []
    ones = (1,) * layout.dims
    for stage in range(len(skips) - 2, -1, -1):
        skip, stride, kernel = skips[stage], layout.strides[stage + 1], layout.kernel_sizes[stage]
        sketch.begin(stage, f"decoder_{stage}_0")
        node = sketch.add(Node(f"up_{stage}", "up", (node.name,), skip.channels, skip.scale, stride, stride))
        node = sketch.add(Node(f"concat_{stage}", "concat", (node.name, skip.name), 2 * skip.channels, skip.scale))
        for block in range(layout.decoder_blocks_per_stage[stage]):
            sketch.begin(stage, f"decoder_{stage}_{block}")
            node = sketch.add(Node(f"decoder_{stage}_{block}", "conv", (node.name,), skip.channels, skip.scale, kernel, ones))
        heads.append(sketch.add(Node(f"head_{stage}", "head", (node.name,), output_channels, skip.scale, ones, ones)).name)
    return heads[::-1]


ENCODERS: dict[str, Callable[[_Sketch, _Layout, Node], list[Node]]] = {"unet": _plain_encoder, "residual-unet": _residual_encoder}


def segments(description: Description, head_count: int, checkpointing: int = 0) -> list[Segment]:
    """The nodes that the first `head_count` heads depend on, in order: one by one, in the `checkpointing` finest stages by block.

    The value "input" is the image.
    """
    heads = description.heads[:head_count]
    needed = set(heads)
    for node in reversed(description.nodes):
        if node.name in needed:
            needed.update(node.inputs)
    groups: list[list[Node]] = []
    for node in description.nodes:
        if node.op == "input" or node.name not in needed:
            continue
        if groups and node.stage < checkpointing and groups[-1][-1].block == node.block:
            groups[-1].append(node)
        else:
            groups.append([node])
    later, made = set(heads), []
    for group in reversed(groups):
        own = {node.name for node in group}
        inputs = tuple(dict.fromkeys(name for node in group for name in node.inputs if name not in own))
        outputs = tuple(node.name for node in group if node.name in later)
        last_used = tuple(name for name in inputs if name not in later)
        made.append(Segment(tuple(group), inputs, last_used, outputs, recompute=group[0].stage < checkpointing))
        later.update(inputs)
    return made[::-1]


def convolution_elements(description: Description, patch: Ints) -> int:
    """Output elements of every convolution for one sample, deep-supervision heads apart."""
    total = 0
    for node in description.nodes:
        if node.op in ("conv", "up") or node.name == description.heads[0]:
            volume = node.channels
            for size, scale in zip(patch, node.scale, strict=True):
                volume *= size // scale
            total += volume
    return total
