"""Losses by hand: soft Dice and cross-entropy on scenes of a few voxels."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from autoseg.contracts import Batch
from autoseg.errors import PluginError
from autoseg.trainers.losses import SMOOTH, Targets, entropy, head_count, make_loss, soft_dice, strided
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.run import LossSpec

TWO = Labels(foreground=(Label(name="a", value=1), Label(name="b", value=2)))
IGNORING = TWO.model_copy(update={"ignore": Label(name="ignore", value=9)})
NESTED = Labels(
    foreground=(Label(name="edema", value=1), Label(name="core", value=2)),
    regions=(Region(name="whole", values=(1, 2)), Region(name="core", values=(2,))), region_order=(1, 2),
)

PROBABILITIES = torch.tensor([[  # (1, classes 3, 2, 2)
    [[0.7, 0.1], [0.2, 0.5]],
    [[0.2, 0.8], [0.3, 0.2]],
    [[0.1, 0.1], [0.5, 0.3]],
]])
LABEL = torch.tensor([[[0, 1], [2, 1]]])


def logits_of(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.log()


def dice_by_hand(both: float, predicted: float, true: float) -> float:
    return (2 * both + SMOOTH) / (predicted + true + SMOOTH)


def test_soft_dice_of_four_voxels_by_hand() -> None:
    a = dice_by_hand(0.8 + 0.2, 0.2 + 0.8 + 0.3 + 0.2, 2)
    b = dice_by_hand(0.5, 0.1 + 0.1 + 0.5 + 0.3, 1)
    found = soft_dice(logits_of(PROBABILITIES), LABEL, Targets.of(TWO), batch_dice=False)
    assert found.item() == pytest.approx(-(a + b) / 2, abs=1e-6)


def test_ignored_voxels_count_in_neither_part_of_dice() -> None:
    label = LABEL.clone()
    label[0, 1, 1] = 3
    a = dice_by_hand(0.8, 0.2 + 0.8 + 0.3, 1)
    b = dice_by_hand(0.5, 0.1 + 0.1 + 0.5, 1)
    found = soft_dice(logits_of(PROBABILITIES), label, Targets.of(IGNORING), batch_dice=False)
    assert found.item() == pytest.approx(-(a + b) / 2, abs=1e-6)


def test_batch_dice_pools_voxels_and_sample_dice_averages_samples() -> None:
    logits = logits_of(torch.cat([PROBABILITIES, PROBABILITIES.flip(1)]))
    label = torch.cat([LABEL, torch.zeros_like(LABEL)])
    targets = Targets.of(TWO)
    second = PROBABILITIES.flip(1)[0]
    singles = [soft_dice(logits[i : i + 1], label[i : i + 1], targets, False).item() for i in range(2)]
    assert soft_dice(logits, label, targets, False).item() == pytest.approx(sum(singles) / 2, abs=1e-6)
    a = dice_by_hand(1.0, 1.5 + second[1].sum().item(), 2)
    b = dice_by_hand(0.5, 1.0 + second[2].sum().item(), 1)
    assert soft_dice(logits, label, targets, True).item() == pytest.approx(-(a + b) / 2, abs=1e-6)
    assert singles[1] == pytest.approx(0, abs=1e-4)  # nothing is there, something is predicted


def test_region_dice_counts_every_region_on_its_own() -> None:
    logits = torch.logit(PROBABILITIES[:, :2])
    whole = dice_by_hand(0.1 + 0.2 + 0.5, 1.5, 3)
    core = dice_by_hand(0.3, 1.5, 1)
    found = soft_dice(logits, LABEL, Targets.of(NESTED), False)
    assert found.item() == pytest.approx(-(whole + core) / 2, abs=1e-6)


def test_cross_entropy_is_the_mean_over_annotated_voxels() -> None:
    every = [-math.log(p) for p in (0.7, 0.8, 0.5, 0.2)]
    assert entropy(logits_of(PROBABILITIES), LABEL, Targets.of(TWO)).item() == pytest.approx(np.mean(every), abs=1e-6)
    label = LABEL.clone()
    label[0, 1, 1] = 3
    found = entropy(logits_of(PROBABILITIES), label, Targets.of(IGNORING))
    assert found.item() == pytest.approx(np.mean(every[:3]), abs=1e-6)


def test_binary_cross_entropy_of_regions_is_the_mean_over_annotated_voxels_and_regions() -> None:
    ignoring = NESTED.model_copy(update={"ignore": Label(name="ignore", value=9)})
    label = LABEL.clone()
    label[0, 0, 0] = 3
    p = PROBABILITIES[0, :2].double()
    terms = [-math.log(p[0, 0, 1]), -math.log(p[0, 1, 0]), -math.log(p[0, 1, 1])]  # whole tumour: all three
    terms += [-math.log(1 - p[1, 0, 1]), -math.log(p[1, 1, 0]), -math.log(1 - p[1, 1, 1])]  # core: one
    found = entropy(torch.logit(PROBABILITIES[:, :2]), label, Targets.of(ignoring))
    assert found.item() == pytest.approx(np.mean(terms), abs=1e-6)


def test_a_patch_without_annotated_voxels_has_no_entropy() -> None:
    nothing = torch.full_like(LABEL, 3)
    assert entropy(logits_of(PROBABILITIES), nothing, Targets.of(IGNORING)).item() == 0


def test_dense_targets_are_one_hot_or_regions() -> None:
    dense = Targets.of(TWO).dense(LABEL)
    assert dense.shape == (1, 3, 2, 2) and dense.dtype == torch.float32
    assert torch.equal(dense.argmax(1), LABEL) and bool((dense.sum(1) == 1).all())
    regions = Targets.of(NESTED).dense(LABEL)
    assert torch.equal(regions[:, 0], (LABEL > 0).float()) and torch.equal(regions[:, 1], (LABEL == 2).float())


def test_a_label_in_no_region_is_background_of_all() -> None:
    partial = Labels(
        foreground=tuple(Label(name=n, value=v) for v, n in enumerate("abc", 1)),
        regions=(Region(name="a", values=(1,)),), region_order=(1,),
    )
    assert Targets.of(partial).dense(torch.tensor([[0, 1, 2, 3]])).tolist() == [[[0, 1, 0, 0]]]


@pytest.mark.parametrize("strides", [(1, 1, 1), (2, 2, 2), (1, 2, 4), (1, 8, 8), (3, 2, 1)])
def test_deep_targets_are_nearest_exact(strides: tuple[int, int, int]) -> None:
    label = torch.randint(0, 5, (2, 6, 16, 16))
    size = torch.Size([n // s for n, s in zip(label.shape[1:], strides, strict=True)])
    expected = interpolate(label[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
    assert torch.equal(strided(label, size), expected)


@pytest.mark.parametrize(("heads", "deep", "trained"), [(5, True, 4), (2, True, 1), (1, True, 1), (5, False, 1)])
def test_the_coarsest_head_is_not_trained_unless_it_is_the_only_one(heads: int, deep: bool, trained: int) -> None:
    assert head_count(heads, deep) == trained


def test_heads_are_weighted_by_halves_that_sum_to_one() -> None:
    loss = make_loss(LossSpec(kind="ce"), TWO, False)
    label = torch.randint(0, 3, (1, 8, 8))
    batch = Batch(torch.zeros(1, 1, 8, 8), label, ("x",))
    outputs = [torch.randn(1, 3, n, n) for n in (8, 4, 2)]
    alone = [entropy(o, strided(label, o.shape[2:]), Targets.of(TWO)).item() for o in outputs]
    assert loss(outputs, batch, 0.0).item() == pytest.approx((4 * alone[0] + 2 * alone[1] + alone[2]) / 7, abs=1e-6)


def test_dice_ce_is_the_sum_and_its_weights_can_be_set() -> None:
    batch = Batch(torch.zeros(1, 1, 2, 2), LABEL, ("x",))
    outputs = [logits_of(PROBABILITIES)]
    parts = [make_loss(LossSpec(kind=kind), TWO, False)(outputs, batch, 0).item() for kind in ("dice", "ce")]
    both = make_loss(LossSpec(), TWO, False)(outputs, batch, 0).item()
    assert both == pytest.approx(sum(parts), abs=1e-6)
    weighted = make_loss(LossSpec(options={"dice": 0.5, "ce": 2}), TWO, False)(outputs, batch, 0).item()
    assert weighted == pytest.approx(0.5 * parts[0] + 2 * parts[1], abs=1e-6)


@pytest.mark.parametrize(("spec", "message"), [
    (LossSpec(kind="dicey"), "unknown loss 'dicey'; choose from ce, dice, dice_ce, or give module:Name"),
    (LossSpec(options={"gamma": 2}), "loss 'dice_ce' takes these numbers as options: dice, ce; found gamma=2"),
    (LossSpec(options={"dice": "much"}), "found dice='much'"),
    (LossSpec(kind="ce", options={"ce": 1.0}), "loss 'ce' takes no options; found ce=1.0"),
    (LossSpec(kind="no_such_package:Loss"), "loss 'no_such_package:Loss' cannot be imported"),
])
def test_a_loss_that_cannot_be_made_is_a_clear_error(spec: LossSpec, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        make_loss(spec, TWO, False)


def test_a_plug_in_gets_labels_batch_dice_and_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_losses.py").write_text(
        "class Mine:\n"
        "    def __init__(self, labels, batch_dice, alpha):\n"
        "        self.given = (labels.output_count, batch_dice, alpha)\n"
        "    def __call__(self, outputs, batch, progress):\n"
        "        return outputs[0].mean() + progress\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = make_loss(LossSpec(kind="my_losses:Mine", options={"alpha": 0.3}), TWO, True)
    assert loss.given == (3, True, 0.3)  # type: ignore[attr-defined]
    assert loss([torch.ones(1, 3, 2)], Batch(torch.zeros(1, 1, 2), torch.zeros(1, 2).long(), ("x",)), 0.5).item() == 1.5
    sys.modules.pop("my_losses", None)
