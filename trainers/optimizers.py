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
    """What the optimiser keeps, as tensors named `key.parameter`; plain numbers become tensors of one number.

    Numbers of its parameter groups that are not those it was made with are named `key.number of the group`.

    Raises:
        PluginError: it keeps something that cannot be saved.
    """
    kept: dict[str, torch.Tensor] = {}
    counts_there = _counts_on_device(optimizer)
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                there = value.ndim == 0 and value.device.type != "cpu" and not counts_there
                kept[f"{THERE if there else ''}{key}.{name}"] = value
            elif isinstance(value, int | float):
                kept[f"{NUMBER}{key}.{name}"] = _exact(value)
            elif value is None:
                kept[f"{NOTHING}{key}.{name}"] = torch.zeros(0)
            else:
                raise PluginError(
                    f"the optimizer keeps a {type(value).__name__} as {key!r}, which cannot be saved, so that training could not "
                    "go on from a checkpoint; it may keep tensors, numbers and None"
                )
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key != "lr" and isinstance(value, int | float) and value != optimizer.defaults.get(key):
                kept[f"{GROUP}{key}.{index}"] = _exact(value)
    return kept


def _exact(value: int | float) -> torch.Tensor:
    """A bool, int or float as a tensor that gives it back as it was."""
    return torch.tensor(value, dtype=torch.bool if isinstance(value, bool) else _EXACT[isinstance(value, int)])


def _counts_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser's kernel counts steps; else torch keeps the counts on the CPU."""
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


def restore_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, kept: Mapping[str, torch.Tensor]) -> None:
    """Give the optimiser back what `optimizer_state` took from it, as copies; parameters without any have none."""
    optimizer.state.clear()
    parameters = dict(network.named_parameters())
    counts_there = _counts_on_device(optimizer)
    for path, value in kept.items():
        key, name = path.split(".", 1)
        if key.startswith(GROUP):
            optimizer.param_groups[int(name)][key.removeprefix(GROUP)] = value.item()
            continue
        parameter = parameters[name]
        state = optimizer.state[parameter]
        if key.startswith(NUMBER):
            state[key.removeprefix(NUMBER)] = value.item()
        elif key.startswith(NOTHING):
            state[key.removeprefix(NOTHING)] = None
        else:
            there = value.ndim > 0 or counts_there or key.startswith(THERE)
            state[key.removeprefix(THERE)] = value.to(parameter.device if there else "cpu", copy=True)


NUMBER, NOTHING = "number-", "none-"  # prefixes of keys whose value is a plain number, or None
THERE = "there-"  # of tensors of one number that lie on the parameter's device, though step counts do not
GROUP = "group-"  # of a parameter group's numbers
_EXACT = {True: torch.int64, False: torch.float64}  # whether it is an int
