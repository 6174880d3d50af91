"""A training step or a prediction played through on a description, without torch: which tensors are there, and when.

A network is played once: what is made and let go, and in which order, follows from its nodes. The sizes of all tensors are
sums of a few numbers per node (`Sizes`), so for another patch or batch only these are put in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.networks.describe import Description, Node, Segment, segments
from autoseg.types.plan import Ints

FLOAT, LABEL = 4, 8  # bytes of a float32 and of a label's int64
ROW_SUMS = 1  # bytes per element of a head for sums over rows of at least 4 voxels
CONVOLUTIONS = ("conv", "up", "head")

Int64s = NDArray[np.int64]
Bytes = tuple[tuple[int, int], ...]  # a size: the sum of factors times entries of Sizes, as pairs (entry, factor)


@dataclass(frozen=True)
class Setting:
    """What a step is played for: `itemsize` is the compute type's bytes (2 under autocast), `cpu` the device's peculiarities.

    `heads` is the number of heads that run. With `regions` or `ignore` the loss keeps other tensors.
    """

    itemsize: int
    cpu: bool
    heads: int
    regions: bool = False
    ignore: bool = False
    training: bool = True


class Value(NamedTuple):
    """A node's output: the storage it lies in, the node's number, and bytes per element."""

    key: str
    number: int
    itemsize: int

    @property
    def size(self) -> Bytes:
        """Its bytes."""
        return ((self.number, self.itemsize),)


class Peak(NamedTuple):
    """Bytes: what autograd keeps of the network, that and what it keeps of the loss, and the most there was at a time."""

    saved: int
    kept: int
    peak: int


@dataclass(frozen=True, eq=False)
class Tape:
    """Storages in the order they are made and freed, one number per event, and the storages that autograd keeps.

    A storage's bytes are the sum of `factors` times the entries of Sizes called `entries`, from its `starts` to the next's.
    """

    entries: Int64s
    factors: Int64s
    starts: Int64s
    storages: Int64s
    signs: Int64s
    saved: Int64s
    kept: Int64s

    def play(self, sizes: Int64s) -> Peak:
        """Play the step for these sizes."""
        each = np.add.reduceat(sizes[self.entries] * self.factors, self.starts)
        most = np.cumsum(each[self.storages] * self.signs).max()
        return Peak(int(each[self.saved].sum()), int(each[self.kept].sum()), int(most))


class Storages:
    """Storages by name with how many hold them, and the record of when they were made and freed."""

    def __init__(self) -> None:
        self.sizes: list[Bytes] = []  # of every storage that there ever was
        self.made: list[int] = []  # numbers of storages as they are made; as they are freed, less than 0: -1 - number
        self._numbers: dict[str, int] = {}
        self._holders: dict[str, int] = {}

    def hold(self, key: str, size: Bytes = ()) -> str:
        """Make the storage, or hold it once more."""
        if key in self._holders:
            self._holders[key] += 1
            return key
        self._holders[key] = 1
        self._numbers[key] = self._new(size)
        return key

    def release(self, keys: Iterable[str]) -> None:
        """Let go of storages; one that nobody holds is freed."""
        holders = self._holders
        for key in keys:
            if holders[key] > 1:
                holders[key] -= 1
            else:
                del holders[key]
                self.made.append(~self._numbers[key])

    def brief(self, size: Bytes) -> None:
        """So many bytes more, for a moment."""
        if size:
            self.made.append(~self._new(size))

    def numbers(self, keys: Iterable[str]) -> Int64s:
        """Numbers of the storages called `keys`, each once."""
        return np.array([self._numbers[key] for key in set(keys)], np.int64)

    def tape(self, saved: Int64s, kept: Int64s) -> Tape:
        """All that was recorded."""
        sizes = [size or ((0, 0),) for size in self.sizes]
        pairs = np.array([pair for size in sizes for pair in size], np.int64)
        starts = np.cumsum([0, *(len(size) for size in sizes[:-1])], dtype=np.int64)
        made = np.array(self.made, np.int64)
        freed = made < 0
        return Tape(pairs[:, 0], pairs[:, 1], starts, np.where(freed, ~made, made), np.where(freed, -1, 1), saved, kept)

    def _new(self, size: Bytes) -> int:
        self.sizes.append(size)
        self.made.append(len(self.sizes) - 1)
        return len(self.sizes) - 1


class Sizes:
    """The numbers of a network's nodes that sizes are made of, and its weights; one entry per node each, in this order:

    elements of the output, its voxels in all samples, its channels in all samples, weights of the convolution without bias.
    """

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        channels = {node.name: node.channels for node in nodes}
        self.weights = np.array([weights_of(node, channels[node.inputs[0]]) if node.inputs else 0 for node in nodes], np.int64)
        self.channels = np.array([node.channels for node in nodes], np.int64)
        self.scales = np.array([node.scale for node in nodes], np.int64)

    def at(self, patch: Ints, batch: int) -> Int64s:
        """The entries for a patch and a batch size."""
        voxels = batch * (np.array(patch, np.int64) // self.scales).prod(axis=1)
        return np.concatenate([voxels * self.channels, voxels, batch * self.channels, self.weights])


def weights_of(node: Node, inputs: int) -> int:
    """Weights of a node's convolution, without bias."""
    return inputs * node.channels * math.prod(node.kernel) if node.op in CONVOLUTIONS else 0


def play(description: Description, setting: Setting, patch: Ints, batch: int) -> Peak:
    """Play a step on `batch` patches, or a prediction where the setting is not for training."""
    nodes = description.nodes
    sizes, shape = _known(nodes)
    in_float = _detours(description, patch) if setting.cpu else frozenset()
    checkpointing = description.checkpointing if setting.training else 0
    return _tape(shape, description.heads, description.dims, checkpointing, setting, in_float).play(sizes.at(patch, batch))


@lru_cache(maxsize=128)
def _known(nodes: tuple[Node, ...]) -> tuple[Sizes, tuple[Node, ...]]:
    """The numbers of the nodes, and the nodes without any number, which many networks share."""
    return Sizes(nodes), tuple(node._replace(channels=0, scale=(), kernel=(), stride=()) for node in nodes)


@lru_cache(maxsize=128)
def _tape(
    nodes: tuple[Node, ...], heads: tuple[str, ...], dims: int, checkpointing: int, setting: Setting, in_float: frozenset[str]
) -> Tape:
    return Playback(Description(dims, 0, 0, nodes, heads, checkpointing), setting, in_float).tape()


def _detours(description: Description, patch: Ints) -> frozenset[str]:
    """Nodes that compute in float32 on a CPU whatever the precision: autocast pools so, and so does the network's own detour."""
    if description.dims < 3:
        return frozenset()
    slices = {node.name: patch[0] // node.scale[0] for node in description.nodes}
    return frozenset(
        node.name for node in description.nodes
        if node.op == "pool" or (node.op == "conv" and node.kernel[0] > 1 and slices[node.inputs[0]] == 2)
    )


class Playback:
    """Plays `forward`, then (in training) `loss` and `backward`, and records it."""

    def __init__(self, description: Description, setting: Setting, in_float: frozenset[str]) -> None:
        self.setting, self.in_float, self.count = setting, in_float, len(description.nodes)
        self.numbers = {node.name: number for number, node in enumerate(description.nodes)}
        self.segments = segments(description, setting.heads, description.checkpointing)
        self.heads = description.heads[: setting.heads]
        self.storages = Storages()
        self.values: dict[str, Value] = {}
        self.kept: dict[str, list[str]] = {}  # by node, what its backward pass needs
        self.inputs_kept: dict[str, list[str]] = {}  # by a recomputed segment's first node
        self.gradients: dict[str, list[str]] = {}
        self.run = ""  # tells storages of a recomputation from those of the first time
        image = self.values["input"] = Value("image", self.numbers["input"], FLOAT)
        self.storages.hold(image.key, image.size)
        if setting.training:
            self.storages.hold("label", self._voxels(image.number, LABEL))

    def tape(self) -> Tape:
        """Play everything."""
        self.forward()
        saved = kept = self.storages.numbers(self._kept())
        if self.setting.training:
            self.loss()
            kept = self.storages.numbers(self._kept())
            self.backward()
        return self.storages.tape(saved, kept)

    def forward(self) -> None:
        """Run every segment, dropping values after their last use."""
        for segment in self.segments:
            self._forward(segment, keep=self.setting.training and not segment.recompute)
            if segment.recompute:
                inputs = [self.values[name] for name in segment.inputs]
                self.inputs_kept[segment.nodes[0].name] = [self.storages.hold(value.key) for value in inputs]
            self.storages.release(self.values[name].key for name in segment.last_used if name != "input")

    def _kept(self) -> list[str]:
        """Storages that the backward pass will need."""
        return [key for table in (self.kept, self.inputs_kept) for keys in table.values() for key in keys]

    def loss(self) -> None:
        """Dice and cross-entropy at every head: what they keep, and what they need for a moment."""
        regions, ignore = self.setting.regions, self.setting.ignore
        for head in self.heads:
            value = self.values[head]
            kept = [] if regions or ignore else [self.storages.hold("label")]
            for name, size in self._loss_keeps(value.number).items():
                kept.append(self.storages.hold(f"{head}.{name}", size))
                if name == "probabilities" and value.itemsize < FLOAT:
                    self.storages.brief(self._elements(value.number, FLOAT))  # the logits, to float32
            self.kept[f"{head} loss"] = kept
            maps = self._elements(value.number, (2 + ignore) * FLOAT if regions else ROW_SUMS)
            self.storages.brief((*maps, *self._voxels(value.number, LABEL * ignore if regions else 2 * FLOAT)))

    def _loss_keeps(self, number: int) -> dict[str, Bytes]:
        """Bytes of what the loss of a head keeps, the label map itself apart."""
        maps, voxels, mask = self._elements(number, FLOAT), self._voxels(number, FLOAT), self._voxels(number, 1)
        keeps = {"probabilities": maps} | ({"mask": mask} if self.setting.ignore else {})
        if self.setting.regions:  # on a CPU the logarithm keeps an exponential
            return keeps | {"target": maps, "signs": maps, "margins": maps} | ({"exponential": maps} if self.setting.cpu else {})
        return keeps | {"picked": voxels} | ({"label": self._voxels(number, LABEL)} if self.setting.ignore else {})

    def _loss_takes(self, value: Value) -> Bytes:
        """Bytes that the gradient of a head's loss takes for a moment beside what is kept and itself."""
        if self.setting.regions:
            return self._elements(value.number, 2 * FLOAT)
        maps = (value.itemsize < FLOAT) + self.setting.ignore  # the gradient in float32; the classes' slopes where they count
        return (*self._elements(value.number, maps * FLOAT), *self._voxels(value.number, 4 * FLOAT))

    def backward(self) -> None:
        """Gradients of the losses, then of every node in reverse; what is no longer needed is freed."""
        for head in reversed(self.heads):
            value = self.values[head]
            self.gradients[head] = [self.storages.hold(f"{head}.gradient", value.size)]
            self.storages.brief(self._loss_takes(value))
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

        def hold(what: str, size: Bytes) -> None:
            made.append(self.storages.hold(f"{self.run}{node.name}.{what}", size))

        number, itemsize = self.numbers[node.name], self._itemsize(node, inputs)
        result = Value(f"{self.run}{node.name}.out", number, itemsize)
        if node.op in ("concat", "add"):
            if node.op == "add" and keep:
                hold("out", result.size)
        else:
            source = inputs[0]
            if source.itemsize != itemsize:
                hold("cast", self._elements(source.number, itemsize))
            else:
                made.append(self.storages.hold(source.key))
            if node.op in CONVOLUTIONS:
                if itemsize < FLOAT:
                    hold("weights", self._weights(number, itemsize))
                self.storages.brief(self._workspace(source.number, number, itemsize))
            if node.op == "conv" and node.norm:
                hold("conv", result.size)
                hold("statistics", self._channels(number, 3 * FLOAT))
                if node.activation and keep:
                    hold("out", result.size)
        self.storages.hold(result.key, result.size)
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

        def follow(what: str, size: Bytes, done: str = "", workspace: Bytes = ()) -> None:
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
        workspace: Bytes = ()
        if node.op in CONVOLUTIONS:
            workspace = self._workspace(source.number, own.number, own.itemsize)
            self.storages.hold(f"{node.name}.weight gradient", self._weights(own.number, FLOAT))
        if node.op in ("concat", "add"):  # slices of one storage, or the same storage, for both inputs
            for name in node.inputs:
                self.gradients.setdefault(name, []).append(self.storages.hold(gradient))
            self.storages.release([gradient])
        elif node.inputs[0] == "input":
            self.storages.brief(workspace)
            self.storages.release([gradient])
        else:
            follow("input", self._elements(source.number, own.itemsize), workspace=workspace)
            if source.itemsize != own.itemsize:
                follow("cast", source.size)
            self.gradients.setdefault(node.inputs[0], []).append(gradient)
        self.storages.release(kept)

    def _summed(self, name: str, size: Bytes) -> str:
        """The gradient of a value: what its users gave, added up."""
        parts = self.gradients.pop(name)
        if len(parts) == 1:
            return parts[0]
        total = self.storages.hold(f"{name}.sum", size)
        self.storages.release(parts)
        return total

    def _workspace(self, source: int, made: int, itemsize: int) -> Bytes:
        """Bytes that a convolution takes for copies in the layout it likes: channels last on a GPU, blocked on the CPU.

        On the CPU as the profiler shows it (torch 2.13); on a GPU an estimate, cuDNN does not say.
        """
        if self.setting.cpu:
            return (*self._elements(source, 2 * itemsize), *self._weights(made, 4 * FLOAT))
        return (*self._elements(source, itemsize), *self._elements(made, itemsize), *self._weights(made, 2 * FLOAT))

    def _elements(self, number: int, factor: int) -> Bytes:
        return ((number, factor),)

    def _voxels(self, number: int, factor: int) -> Bytes:
        return ((self.count + number, factor),)

    def _channels(self, number: int, factor: int) -> Bytes:
        return ((2 * self.count + number, factor),)

    def _weights(self, number: int, factor: int) -> Bytes:
        return ((3 * self.count + number, factor),)

    def _itemsize(self, node: Node, inputs: list[Value]) -> int:
        """Bytes per element that a node computes in."""
        if node.name in self.in_float:
            return FLOAT
        if node.op in ("concat", "add", "pool"):
            return max(value.itemsize for value in inputs)
        return self.setting.itemsize
