"""A training step or a prediction played through on a description, without torch: which tensors are there, and when."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from autoseg.networks.describe import Description, Node, Segment, segments
from autoseg.types.plan import Ints

FLOAT, LABEL = 4, 8  # bytes of a float32 and of a label's int64
LOSS_MAPS = 2  # float32 maps of a head's size that the gradient of its loss takes beside what is kept


@dataclass(frozen=True)
class Setting:
    """What a step is played for: `itemsize` is the compute type's bytes (2 under autocast), `cpu` the device's peculiarities.

    `heads` is the number of heads that run. With `regions` or `ignore` the loss keeps other tensors.
    """

    patch: Ints
    batch: int
    itemsize: int
    cpu: bool
    heads: int
    regions: bool = False
    ignore: bool = False


class Value(NamedTuple):
    """A node's output: the storage it lies in, its elements and bytes per element."""

    key: str
    elements: int
    itemsize: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * self.itemsize


class Storages:
    """Storages by name with how many hold them; the bytes there now, and the most there were."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._holders: dict[str, int] = {}
        self.now = self.peak = 0

    def hold(self, key: str, size: int) -> str:
        """Make the storage, or hold it once more."""
        if key not in self._sizes:
            self._sizes[key] = size
            self._holders[key] = 0
            self.now += size
            self.brief(0)
        self._holders[key] += 1
        return key

    def release(self, keys: Iterable[str]) -> None:
        """Let go of storages; one that nobody holds is freed."""
        for key in keys:
            self._holders[key] -= 1
            if not self._holders[key]:
                self.now -= self._sizes.pop(key)
                del self._holders[key]

    def brief(self, size: int) -> None:
        """So many bytes more, for a moment."""
        self.peak = max(self.peak, self.now + size)

    def total(self, keys: Iterable[str]) -> int:
        """Bytes of the storages called `keys`, each counted once."""
        return sum(self._sizes[key] for key in set(keys))


def weights_of(node: Node, inputs: int) -> int:
    """Weights of a node's convolution, without bias."""
    return inputs * node.channels * math.prod(node.kernel) if node.op in ("conv", "up", "head") else 0


class Playback:
    """Plays `forward`, then (in training) `loss` and `backward`; `storages` says how much there is after each."""

    def __init__(self, description: Description, setting: Setting, training: bool = True) -> None:
        self.setting, self.training, self.dims = setting, training, description.dims
        self.nodes = {node.name: node for node in description.nodes}
        self.segments = segments(description, setting.heads, description.checkpointing if training else 0)
        self.heads = description.heads[: setting.heads]
        self.storages = Storages()
        self.values: dict[str, Value] = {}
        self.kept: dict[str, list[str]] = {}  # by node, what its backward pass needs
        self.inputs_kept: dict[str, list[str]] = {}  # by a recomputed segment's first node
        self.gradients: dict[str, list[str]] = {}
        self.run = ""  # tells storages of a recomputation from those of the first time
        image = math.prod(setting.patch) * setting.batch
        self.values["input"] = Value(self.storages.hold("image", image * description.input_channels * FLOAT),
                                     image * description.input_channels, FLOAT)
        if training:
            self.storages.hold("label", image * LABEL)

    def forward(self) -> None:
        """Run every segment, dropping values after their last use."""
        for segment in self.segments:
            self._forward(segment, keep=self.training and not segment.recompute)
            if segment.recompute:
                inputs = [self.values[name] for name in segment.inputs]
                self.inputs_kept[segment.nodes[0].name] = [self.storages.hold(value.key, value.size) for value in inputs]
            self.storages.release(self.values[name].key for name in segment.last_used if name != "input")

    def kept_bytes(self) -> int:
        """Bytes that the backward pass will need."""
        return self.storages.total(key for table in (self.kept, self.inputs_kept) for keys in table.values() for key in keys)

    def loss(self) -> None:
        """Dice and cross-entropy at every head: what they keep, and what they need for a moment."""
        for head in self.heads:
            value = self.values[head]
            maps, voxels = value.elements * FLOAT, value.elements // self.nodes[head].channels
            copy = maps if value.itemsize < FLOAT else 0  # of the logits, in float32
            self.storages.brief(copy + 3 * maps)
            kept = [] if self.setting.regions else [self.storages.hold("label", 0)]
            for name, size in self._loss_keeps(maps, voxels, copy, finest=head == self.heads[0]).items():
                kept.append(self.storages.hold(f"{head}.{name}", size))
            if self.setting.regions and not copy:
                kept.append(self.storages.hold(value.key, value.size))
            self.kept[f"{head} loss"] = kept
            self.storages.brief(copy + maps)

    def _loss_keeps(self, maps: int, voxels: int, copy: int, finest: bool) -> dict[str, int]:
        """Bytes of what the loss of a head keeps; `maps` is the size of its logits in float32."""
        regions, ignore = self.setting.regions, self.setting.ignore
        inner = maps if regions else maps - voxels * FLOAT  # without the background
        keeps = {"probabilities": maps, "target": maps}
        if ignore:
            keeps |= {"target": inner, "mask": voxels * FLOAT}
        if regions:
            keeps |= {"target again": maps, "logits": copy, "valid": voxels if ignore else 0}
        else:
            keeps |= {"log": maps, "label": voxels * LABEL if self.dims == 3 and not finest else 0}  # a strided copy
        return keeps

    def backward(self) -> None:
        """Gradients of the losses, then of every node in reverse; what is no longer needed is freed."""
        for head in reversed(self.heads):
            value = self.values[head]
            self.storages.brief(LOSS_MAPS * value.elements * FLOAT)
            self.gradients[head] = [self.storages.hold(f"{head}.gradient", value.size)]
            self.storages.release(self.kept.pop(f"{head} loss"))
        for segment in reversed(self.segments):
            if segment.recompute:
                self._recompute(segment)
            for node in reversed(segment.nodes):
                self._backward(node)
            if segment.recompute:
                self.storages.release(self.inputs_kept.pop(segment.nodes[0].name))

    def _forward(self, segment: Segment, keep: bool) -> None:
        for node in segment.nodes:
            self.values[node.name] = self._node(node, [self.values[name] for name in node.inputs], keep)
        outputs = set(segment.outputs)
        self.storages.release(self.values[node.name].key for node in segment.nodes if node.name not in outputs)

    def _recompute(self, segment: Segment) -> None:
        """Run the segment again, this time keeping what its backward pass needs."""
        self.run = "again "
        self._forward(segment, keep=True)
        self.storages.release(self.values[name].key for name in segment.outputs)
        self.run = ""

    def _node(self, node: Node, inputs: list[Value], keep: bool) -> Value:
        """Run one node: the storage of its result, held once, and those that its backward pass needs."""
        made: list[str] = []

        def hold(what: str, size: int) -> str:
            made.append(self.storages.hold(f"{self.run}{node.name}.{what}", size))
            return made[-1]

        elements = self._elements(node)
        itemsize = self._itemsize(node, inputs)
        if node.op in ("concat", "add"):
            if node.op == "add" and keep:
                hold("out", elements * itemsize)
        else:
            source = inputs[0]
            if source.itemsize != itemsize:
                hold("cast", source.elements * itemsize)
            else:
                made.append(self.storages.hold(source.key, source.size))
            weights = weights_of(node, self.nodes[node.inputs[0]].channels)
            if weights:
                if itemsize < FLOAT:
                    hold("weights", weights * itemsize)
                self.storages.brief(self._workspace(source.elements, elements, itemsize, weights))
            if node.op == "conv" and node.norm:
                hold("conv", elements * itemsize)
                hold("statistics", 3 * self.setting.batch * node.channels * FLOAT)
                if node.activation and keep:
                    hold("out", elements * itemsize)
        result = Value(self.storages.hold(f"{self.run}{node.name}.out", elements * itemsize), elements, itemsize)
        if keep:
            self.kept[node.name] = made
        else:
            self.storages.release(made)
        return result

    def _backward(self, node: Node) -> None:
        """Gradients of a node's inputs from that of its output."""
        own, kept = self.values[node.name], self.kept.pop(node.name)
        source = self.values[node.inputs[0]]
        made = own.key.rsplit(".", 1)[0]
        gradient = self._summed(node.name, own.size)

        def follow(what: str, size: int, done: str = "", workspace: int = 0) -> None:
            """The next gradient takes the last one's place; then what it was computed from can go."""
            nonlocal gradient
            following = self.storages.hold(f"{node.name}.{what} gradient", size)
            self.storages.brief(workspace)
            self.storages.release([gradient])
            gradient = following
            if done:
                kept.remove(done)
                self.storages.release([done])

        if node.op == "add" or (node.op == "conv" and node.activation):
            follow("activation", own.size, own.key)
        if node.op == "conv" and node.norm:
            follow("norm", own.size, f"{made}.conv")
        if node.op == "up":
            follow("contiguous", own.size)  # what comes is a slice of the concatenation's gradient
        weights = weights_of(node, self.nodes[node.inputs[0]].channels)
        workspace = 0
        if weights:
            workspace = self._workspace(source.elements, own.elements, own.itemsize, weights)
            self.storages.hold(f"{node.name}.weight gradient", weights * FLOAT)
        if node.op in ("concat", "add"):  # slices of one storage, or the same storage, for both inputs
            for name in node.inputs:
                self.gradients.setdefault(name, []).append(self.storages.hold(gradient, 0))
            self.storages.release([gradient])
        elif node.inputs[0] == "input":
            self.storages.brief(workspace)
            self.storages.release([gradient])
        else:
            follow("input", source.elements * own.itemsize, workspace=workspace)
            if source.itemsize != own.itemsize:
                follow("cast", source.size)
            self.gradients.setdefault(node.inputs[0], []).append(gradient)
        self.storages.release(kept)

    def _summed(self, name: str, size: int) -> str:
        """The gradient of a value: what its users gave, added up."""
        parts = self.gradients.pop(name)
        if len(parts) == 1:
            return parts[0]
        total = self.storages.hold(f"{name}.sum", size)
        self.storages.release(parts)
        return total

    def _workspace(self, inputs: int, outputs: int, itemsize: int, weights: int) -> int:
        """Bytes that a convolution takes for copies in the layout it likes: channels last on a GPU, blocked on the CPU.

        On the CPU as the profiler shows it (torch 2.13); on a GPU an estimate, cuDNN does not say.
        """
        if self.setting.cpu:
            return 2 * inputs * itemsize + 4 * weights * FLOAT
        return (inputs + outputs) * itemsize + 2 * weights * FLOAT

    def _elements(self, node: Node) -> int:
        edges = (edge // step for edge, step in zip(self.setting.patch, node.scale, strict=True))
        return self.setting.batch * node.channels * math.prod(edges)

    def _itemsize(self, node: Node, inputs: list[Value]) -> int:
        """Bytes per element that a node computes in."""
        widest = max(value.itemsize for value in inputs)
        if node.op in ("concat", "add"):
            return widest
        on_cpu = self.setting.cpu and self.dims == 3
        if node.op == "pool":
            return FLOAT if on_cpu else widest  # autocast on the CPU pools in float32
        slices = self.setting.patch[0] // self.nodes[node.inputs[0]].scale[0]
        if on_cpu and node.op == "conv" and node.kernel[0] > 1 and slices == 2:
            return FLOAT  # the detour that the network takes there
        return self.setting.itemsize
