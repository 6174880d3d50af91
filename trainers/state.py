"""A training frozen between two steps, and brought back to it: going on from there is as if nothing had happened."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from autoseg.errors import RunError
from autoseg.trainers.optimizers import optimizer_state, restore_optimizer

if TYPE_CHECKING:
    from autoseg.trainers.default import Training

Numbers = dict[str, float | int | list[float]]
NETWORK, AVERAGE, GOOD, OPTIMIZER = "network.", "average.", "good.", "optimizer."  # kinds of tensors, by how their names begin


@dataclass(frozen=True)
class State:
    """A run frozen between two steps: tensors by name, and plain numbers for JSON."""

    tensors: dict[str, torch.Tensor]
    numbers: Numbers


@dataclass
class Tally:
    """What the epoch at work has brought so far."""

    losses: list[float] = field(default_factory=list)  # of the steps that were made
    skipped: int = 0
    waited: float = 0.0  # seconds for data
    seconds: float = 0.0


def capture(training: Training) -> State:
    """All that going on exactly here needs (shares memory with the training: save it before the next step).

    Raises:
        RunError: the weights are not finite.
    """
    parts = {
        NETWORK: finite(dict(training.network.state_dict()), training.step),
        AVERAGE: training.weights() if training.average else {},
        GOOD: training.good,
        OPTIMIZER: optimizer_state(training.network, training.optimizer),
    }
    numbers: Numbers = {
        "epoch": training.epoch,
        "step_in_epoch": training.step_in_epoch,
        "micro_batch": training.micro_batch,
        "scale": float(training.scaler.get_scale()),
        "scale_age": int(training.scaler.state_dict().get("_growth_tracker", 0)),
        "average_updates": training.average.updates if training.average else 0,
        "skipped_steps": [float(step) for step in training.setbacks.skipped],
        "returns": training.setbacks.returns,
        **dataclasses.asdict(training.tally),
    }
    return State({prefix + name: value for prefix, part in parts.items() for name, value in part.items()}, numbers)


def restore(training: Training, state: State) -> None:
    """Bring a training to a saved state; weights alone are enough, then all else is as at the beginning of an epoch.

    Raises:
        RunError: the tensors do not fit the network.
    """
    network = _part(state, NETWORK)
    numbers = {"step_in_epoch": 0, "micro_batch": training.batch_size, "average_updates": 0, "returns": 0, **state.numbers}
    whole = {key: value for key, value in numbers.items() if isinstance(value, int)}
    try:
        training.network.load_state_dict(network)
        if training.average:
            training.average.begin(_part(state, AVERAGE) or network, whole["average_updates"])
    except RuntimeError as error:
        raise RunError(f"the checkpoint does not fit the network: {str(error).splitlines()[0]}") from None
    restore_optimizer(training.network, training.optimizer, _part(state, OPTIMIZER))
    good = _part(state, GOOD) or network
    training.good = on_cpu({name: good[name] for name in training.network.state_dict()})
    training.epoch, training.step_in_epoch = whole["epoch"], whole["step_in_epoch"]
    training.micro_batch = whole["micro_batch"]
    training.setbacks.returns = whole["returns"]
    training.setbacks.skipped = [int(step) for step in _numbers(numbers.get("skipped_steps"))]
    training.tally = Tally(
        _numbers(numbers.get("losses")), whole.get("skipped", 0), *(_number(numbers.get(key)) for key in ("waited", "seconds"))
    )
    if training.scaler.is_enabled() and "scale" in numbers:
        saved = {"scale": _number(numbers["scale"]), "_growth_tracker": whole["scale_age"]}
        training.scaler.load_state_dict({**training.scaler.state_dict(), **saved})


def finite(weights: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """The weights themselves. Raises RunError when they are not finite, so that nothing ever saves such weights."""
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        raise RunError(
            f"the weights are no longer finite after step {step}; the last checkpoint is intact. "
            "Lower --set optimizer.lr, or train with --precision fp32"
        )
    return weights


def on_cpu(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy in the machine's memory."""
    return {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}


def _part(state: State, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.tensors.items() if name.startswith(prefix)}


def _numbers(value: float | int | list[float] | None) -> list[float]:
    return list(value) if isinstance(value, list) else []


def _number(value: float | int | list[float] | None) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
