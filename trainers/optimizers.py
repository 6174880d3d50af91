"""The optimiser of a run: SGD, AdamW, or one that the user brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autoseg.errors import PluginError, RunError
from autoseg.plugins import resolve
from autoseg.types.run import OptimizerSpec

MakeOptimizer = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: Mapping[str, MakeOptimizer] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def make_optimizer(network: nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, AdamW, or a plug-in, called as make(parameters, lr=, weight_decay=, **options).

    On CUDA torch's own are fused: all parameters in one kernel.

    Raises:
        PluginError: unknown kind.
        RunError: options that the optimiser does not take.
    """
    make = resolve(spec.kind, OPTIMIZERS, "optimizer")
    settings: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    if spec.kind == "sgd":
        settings |= {"momentum": spec.momentum, "nesterov": spec.momentum > 0}
    on_cuda = all(parameter.device.type == "cuda" for parameter in network.parameters())
    if spec.kind in OPTIMIZERS and on_cuda and not {"foreach", "fused"} & set(spec.options):
        settings["fused"] = True
    try:
        made = make(network.parameters(), **settings | spec.options)
    except (TypeError, ValueError) as error:
        raise RunError(f"optimizer {spec.kind} cannot be made with options {spec.options}: {error}") from None
    if not isinstance(made, torch.optim.Optimizer):
        raise PluginError(f"optimizer {spec.kind!r} gave a {type(made).__name__}, expected a torch.optim.Optimizer")
    return made


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What the optimiser keeps, as tensors named `key.parameter`; plain numbers become tensors of one number."""
    kept: dict[str, torch.Tensor] = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                kept[f"{key}.{name}"] = value
            elif isinstance(value, int | float) and not isinstance(value, bool):
                kept[f"{NUMBER}{key}.{name}"] = torch.tensor(value, dtype=_EXACT[type(value)])
    return kept


def restore_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, kept: Mapping[str, torch.Tensor]) -> None:
    """Give the optimiser back what `optimizer_state` took from it, as copies; parameters without any have none."""
    optimizer.state.clear()
    parameters = dict(network.named_parameters())
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for path, value in kept.items():
        key, name = path.split(".", 1)
        parameter = parameters[name]
        if key.startswith(NUMBER):
            optimizer.state[parameter][key.removeprefix(NUMBER)] = value.item()
        else:  # torch keeps step counts on the CPU unless the kernel counts them
            place = "cpu" if value.ndim == 0 and not on_device else parameter.device
            optimizer.state[parameter][key] = value.to(place, copy=True)


NUMBER = "number-"  # prefix of keys whose value is a plain number
_EXACT = {int: torch.int64, float: torch.float64}
