"""Optimisers: what the record says is what torch gets, and what they keep comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autoseg.errors import PluginError, RunError
from autoseg.trainers.optimizers import make_optimizer, optimizer_state, restore_optimizer
from autoseg.types.run import OptimizerSpec


class Counting(torch.optim.SGD):
    """Keeps plain numbers beside tensors, as a person's own optimiser may."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            kept = self.state[parameter]
            kept["count"], kept["share"] = kept.get("count", 0) + 1, kept.get("share", 0.0) + 0.1
        return super().step(closure)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)


def network() -> Pair:
    torch.manual_seed(0)
    return Pair()


def go(model: Pair, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        model.second(model.first(torch.full((1, 3), 1.0 + i))).square().sum().backward()
        optimizer.step()


def test_sgd_is_nesterovs_with_the_records_numbers() -> None:
    made = make_optimizer(network(), OptimizerSpec())
    group = made.param_groups[0]
    assert isinstance(made, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.01, 0.99, 3e-5, True)
    assert not group["fused"]  # on a CPU


def test_adamw_takes_torchs_options() -> None:
    made = make_optimizer(network(), OptimizerSpec(kind="adamw", lr=1e-3, options={"betas": [0.8, 0.9], "fused": False}))
    group = made.param_groups[0]
    assert isinstance(made, torch.optim.AdamW) and tuple(group["betas"]) == (0.8, 0.9) and group["lr"] == 1e-3


def test_a_persons_own_optimiser_gets_rate_decay_and_options() -> None:
    made = make_optimizer(network(), OptimizerSpec(kind="torch.optim:RMSprop", lr=0.5, options={"alpha": 0.7}))
    assert isinstance(made, torch.optim.RMSprop)
    assert [made.param_groups[0][key] for key in ("lr", "weight_decay", "alpha")] == [0.5, 3e-5, 0.7]


@pytest.mark.parametrize(("spec", "error", "message"), [
    ({"kind": "lion"}, PluginError, "unknown optimizer 'lion'; choose from adamw, sgd"),
    ({"options": {"betas": [1, 2]}}, RunError, "optimizer sgd cannot be made with options .*betas"),
    ({"kind": "collections:Counter"}, PluginError, r"gave a Counter, expected a torch.optim.Optimizer"),
    ({"kind": "builtins:sorted"}, RunError, "optimizer builtins:sorted cannot be made"),
])
def test_what_does_not_fit_is_refused(spec: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_optimizer(network(), OptimizerSpec.model_validate(spec))


class Keeping(torch.optim.SGD):
    """Keeps numbers in its group and odd things in its state, as schedule-free and learning-rate-free optimisers do."""

    kept: Any = None

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        group = self.param_groups[0]
        group |= {"k": group.get("k", 0) + 1, "weight_sum": group.get("weight_sum", 0.0) + 0.1, "warm": True, "lr": 0.1}
        group["weight_decay"] = 0.5 / group["k"]
        for parameter in group["params"]:
            self.state[parameter] |= {"first": group["k"] == 1, "nothing": None, "odd": self.kept}


def test_numbers_of_its_groups_and_nothing_and_truth_come_back() -> None:
    one, other = network(), network()
    first, second = (Keeping(model.parameters(), 0.1) for model in (one, other))
    go(one, first, 3)
    restore_optimizer(other, second, optimizer_state(one, first))
    own, given = ({key: value for key, value in group.items() if key != "params"} for group in
                  (second.param_groups[0], first.param_groups[0]))
    assert own == given and own["k"] == 3 and type(own["k"]) is int and own["warm"] is True
    assert second.state[other.first.weight] == {"first": False, "nothing": None, "odd": None}


def test_what_cannot_be_saved_is_told_at_the_first_checkpoint() -> None:
    model = network()
    optimizer = Keeping(model.parameters(), 0.1)
    optimizer.kept = ["a list"]
    go(model, optimizer, 1)
    with pytest.raises(PluginError, match="keeps a list as 'odd', which cannot be saved"):
        optimizer_state(model, optimizer)


def test_a_tensor_of_one_number_goes_back_to_where_it_was() -> None:
    model = network().to("meta")
    first, second = (torch.optim.SGD(model.parameters(), 0.1) for _ in range(2))
    parameter = model.first.weight
    first.state[parameter] = {"there": torch.zeros((), device="meta"), "here": torch.ones(())}
    restore_optimizer(model, second, optimizer_state(model, first))
    assert {key: value.device.type for key, value in second.state[parameter].items()} == {"there": "meta", "here": "cpu"}


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
    lambda p: torch.optim.SGD(p, 0.1), lambda p: Counting(p, 0.1, momentum=0.5),
    lambda p: torch.optim.RMSprop(p, 0.1, centered=True),
], ids=["sgd", "adamw", "plain", "counting", "rmsprop"])
def test_what_it_keeps_comes_back_exactly(make: Any) -> None:
    whole, half, other = network(), network(), network()
    optimizers = [make(model.parameters()) for model in (whole, half, other)]
    go(whole, optimizers[0], 5)
    go(half, optimizers[1], 3)
    kept = {name: value.clone() for name, value in optimizer_state(half, optimizers[1]).items()}
    other.load_state_dict(half.state_dict())
    go(other, optimizers[2], 1)  # leaves something that must not stay
    other.load_state_dict(half.state_dict())
    restore_optimizer(other, optimizers[2], kept)
    again = optimizer_state(other, optimizers[2])
    assert list(again) == list(kept) and all(torch.equal(again[name], value) for name, value in kept.items())
    for i in (3, 4):
        optimizers[2].zero_grad()
        other.second(other.first(torch.full((1, 3), 1.0 + i))).square().sum().backward()
        optimizers[2].step()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in whole.state_dict().items())
