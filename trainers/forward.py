"""Calling the network: compiled where that works, as it is otherwise."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autoseg.networks.hardware import is_out_of_memory

COMPILED_SHAPES = 64  # that all networks of a process may have together; torch's own limit is 8, too few for a few folds
WORTH_STEPS = 1000  # compiling takes a minute or more; a shorter run does not win that back

Outputs = list[torch.Tensor]


class Forward:
    """The network as a function of image and number of heads; weights and their names stay those of the network.

    On CUDA it is compiled at the first call. Whatever goes wrong then or later, in the forward or the backward pass, is no
    reason to lose a run: `give_up` says whether to try again without compilation. On a CPU nothing is compiled: measured, that
    gains nothing.
    """

    def __init__(self, network: nn.Module, compiled: bool) -> None:
        self._network = network
        self._call: Callable[..., Outputs] = network
        self.compiled = False
        self.failure = ""  # why compilation was given up
        if compiled:
            compile_: Any = torch.compile
            try:
                _allow_shapes()
                self._call, self.compiled = compile_(network, dynamic=False), True
            except Exception as error:  # compilers fail in many ways
                self.give_up(error)

    def __call__(self, image: torch.Tensor, heads: int) -> Outputs:
        """Run the network, (batch, channel, *patch) -> logits of the finest `heads` heads."""
        return self._call(image, heads)

    def give_up(self, error: Exception) -> bool:
        """Go on without compilation, if there was any and `error` may be its fault."""
        if is_out_of_memory(error):
            return False
        was, self.compiled, self._call = self.compiled, False, self._network
        if was or not self.failure:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.failure = lines[0][:160]
        return was


def _allow_shapes() -> None:
    """Let the process compile more shapes than torch does by itself, whatever the limit is called in this release."""
    settings = importlib.import_module("torch._dynamo").config
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(settings, name):
            setattr(settings, name, max(getattr(settings, name), COMPILED_SHAPES))


def worth_compiling(device: torch.device, wanted: str, steps: int) -> bool:
    """Whether a run of so many steps shall be compiled on this device; `wanted` is auto or never."""
    return wanted == "auto" and device.type == "cuda" and steps >= WORTH_STEPS
