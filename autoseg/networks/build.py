"""Description -> torch module."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoseg.networks.describe import Description, Node, Segment, segments

SLOPE = 0.01  # of the leaky ReLU and of He initialisation (nnU-Net)


class ConvUnit(nn.Module):
    """Convolution, instance norm, leaky ReLU; the latter two where the node asks for them."""

    def __init__(self, node: Node, inputs: int, dims: int) -> None:
        super().__init__()
        conv: Any = nn.Conv3d if dims == 3 else nn.Conv2d
        norm = nn.InstanceNorm3d if dims == 3 else nn.InstanceNorm2d
        padding = tuple((k - 1) // 2 for k in node.kernel)
        self.conv: nn.Module = conv(inputs, node.channels, node.kernel, node.stride, padding, bias=node.bias)
        self.norm: Any = norm(node.channels, eps=1e-5, affine=True) if node.norm else None
        self.activation: nn.Module | None = nn.LeakyReLU(SLOPE, inplace=True) if node.activation else None
        self._across_slices = dims == 3 and node.kernel[0] > 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, inputs, *size) -> (batch, channels, *size / stride)."""
        if self._across_slices and x.shape[2] == 2 and x.device.type == "cpu":
            # with two slices, oneDNN's bf16 weight gradient holds uninitialised memory (torch 2.13): NaN every few steps
            with torch.autocast("cpu", enabled=False):
                x = self.conv(x.float())
        else:
            x = self.conv(x)
        if self.norm is None:
            return x if self.activation is None else self.activation(x)
        # instance norm as torch computes it (samples and channels together as the channels of one sample), but with the
        # activation before the shape is brought back: in place on a view, its backward pass would copy the gradient three times
        samples, shape = x.shape[0], x.shape
        weight, bias = self.norm.weight.repeat(samples), self.norm.bias.repeat(samples)
        x = nn.functional.batch_norm(
            x.reshape(1, -1, *shape[2:]), None, None, weight, bias, training=True, momentum=0, eps=self.norm.eps
        )
        return (x if self.activation is None else self.activation(x)).view(shape)


class Network(nn.Module):
    """Runs a description segment by segment; values are dropped after their last use."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        channels = {node.name: node.channels for node in description.nodes}
        self.units = nn.ModuleDict()
        for node in description.nodes:
            unit = _unit(node, channels[node.inputs[0]] if node.inputs else 0, description.dims)
            if unit is not None:
                self.units[node.name] = unit
        self._initialise()

    def _initialise(self) -> None:
        if next(self.parameters()).is_meta:  # there is nothing to initialise, and trying would import torch's compiler
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for node in self.description.nodes:
            if node.zero_norm:
                nn.init.zeros_(self.units[node.name].norm.weight)  # type: ignore[union-attr, arg-type]

    def forward(self, x: torch.Tensor, head_count: int = 1) -> list[torch.Tensor]:
        """(batch, channel, *patch) -> logits of the first `head_count` heads, finest first, each (batch, classes, *size)."""
        values: dict[str, torch.Tensor] = {"input": x}
        checkpointing = self.description.checkpointing if torch.is_grad_enabled() else 0
        for segment in segments(self.description, head_count, checkpointing):
            inputs = [values[name] for name in segment.inputs]
            for name in segment.last_used:
                del values[name]
            if segment.recompute:
                run = partial(self._run_segment, segment)
                results: list[torch.Tensor] = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                results = self._run_segment(segment, *inputs)
            values.update(zip(segment.outputs, results, strict=True))
            del inputs, results
        return [values[name] for name in self.description.heads[:head_count]]

    def _run_segment(self, segment: Segment, *inputs: torch.Tensor) -> list[torch.Tensor]:
        values = dict(zip(segment.inputs, inputs, strict=True))
        for node in segment.nodes:
            values[node.name] = self._run(node, [values[name] for name in node.inputs])
        return [values[name] for name in segment.outputs]

    def _run(self, node: Node, inputs: list[torch.Tensor]) -> torch.Tensor:
        if node.op == "concat":
            return torch.cat(inputs, dim=1)
        if node.op == "add":
            return nn.functional.leaky_relu(inputs[0] + inputs[1], SLOPE, inplace=True)  # of the sum nothing else is kept
        result: torch.Tensor = self.units[node.name](inputs[0])
        return result


def _unit(node: Node, inputs: int, dims: int) -> nn.Module | None:
    if node.op == "conv":
        return ConvUnit(node, inputs, dims)
    if node.op == "up":
        up: Any = nn.ConvTranspose3d if dims == 3 else nn.ConvTranspose2d
        return _module(up(inputs, node.channels, node.kernel, node.stride))
    if node.op == "pool":
        pool: Any = nn.AvgPool3d if dims == 3 else nn.AvgPool2d
        return _module(pool(node.stride, node.stride))
    if node.op == "head":
        head: Any = nn.Conv3d if dims == 3 else nn.Conv2d
        return _module(head(inputs, node.channels, 1))
    return None


def _module(made: Any) -> nn.Module:
    assert isinstance(made, nn.Module)
    return made


def build(description: Description, seed: int | None = None) -> Network:
    """Build the network; with a seed the initial weights depend on it alone and global random state is untouched."""
    if seed is None:
        return Network(description)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed every GPU too
        return Network(description)
