"""Losses by hand: soft Dice and cross-entropy on scenes of a few voxels."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from torch.nn.functional import interpolate

from autoseg.contracts import Batch
from autoseg.errors import PluginError
from autoseg.trainers.losses import SMOOTH, entropy, head_count, make_loss, signed_distance, soft_dice
from autoseg.trainers.targets import Head, Targets, count_overlap, merge, strided, with_labelled
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


def dice_of(logits: torch.Tensor, label: torch.Tensor, targets: Targets, batch_dice: bool = False) -> torch.Tensor:
    return soft_dice(Head(logits, label, targets, batch_dice))


def entropy_of(logits: torch.Tensor, label: torch.Tensor, targets: Targets) -> torch.Tensor:
    return entropy(Head(logits, label, targets, False))


def value(spec: LossSpec, logits: torch.Tensor, label: torch.Tensor, labels: Labels, labelled: torch.Tensor | None = None,
          batch_dice: bool = False, progress: float = 0.0) -> float:
    batch = Batch(torch.zeros(1), label, ("x",) * len(label), labelled)
    return float(make_loss(spec, labels, batch_dice)([logits], batch, progress).detach())


def logits_of(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.log()


def dice_by_hand(both: float, predicted: float, true: float) -> float:
    return (2 * both + SMOOTH) / (predicted + true + SMOOTH)


def test_soft_dice_of_four_voxels_by_hand() -> None:
    a = dice_by_hand(0.8 + 0.2, 0.2 + 0.8 + 0.3 + 0.2, 2)
    b = dice_by_hand(0.5, 0.1 + 0.1 + 0.5 + 0.3, 1)
    found = dice_of(logits_of(PROBABILITIES), LABEL, Targets.of(TWO), batch_dice=False)
    assert found.item() == pytest.approx(-(a + b) / 2, abs=1e-6)


def test_ignored_voxels_count_in_neither_part_of_dice() -> None:
    label = LABEL.clone()
    label[0, 1, 1] = 3
    a = dice_by_hand(0.8, 0.2 + 0.8 + 0.3, 1)
    b = dice_by_hand(0.5, 0.1 + 0.1 + 0.5, 1)
    found = dice_of(logits_of(PROBABILITIES), label, Targets.of(IGNORING), batch_dice=False)
    assert found.item() == pytest.approx(-(a + b) / 2, abs=1e-6)


def test_batch_dice_pools_voxels_and_sample_dice_averages_samples() -> None:
    logits = logits_of(torch.cat([PROBABILITIES, PROBABILITIES.flip(1)]))
    label = torch.cat([LABEL, torch.zeros_like(LABEL)])
    targets = Targets.of(TWO)
    second = PROBABILITIES.flip(1)[0]
    singles = [dice_of(logits[i : i + 1], label[i : i + 1], targets, False).item() for i in range(2)]
    assert dice_of(logits, label, targets, False).item() == pytest.approx(sum(singles) / 2, abs=1e-6)
    a = dice_by_hand(1.0, 1.5 + second[1].sum().item(), 2)
    b = dice_by_hand(0.5, 1.0 + second[2].sum().item(), 1)
    assert dice_of(logits, label, targets, True).item() == pytest.approx(-(a + b) / 2, abs=1e-6)
    assert singles[1] == pytest.approx(0, abs=1e-4)  # nothing is there, something is predicted


def test_region_dice_counts_every_region_on_its_own() -> None:
    logits = torch.logit(PROBABILITIES[:, :2])
    whole = dice_by_hand(0.1 + 0.2 + 0.5, 1.5, 3)
    core = dice_by_hand(0.3, 1.5, 1)
    found = dice_of(logits, LABEL, Targets.of(NESTED), False)
    assert found.item() == pytest.approx(-(whole + core) / 2, abs=1e-6)


def test_cross_entropy_is_the_mean_over_annotated_voxels() -> None:
    every = [-math.log(p) for p in (0.7, 0.8, 0.5, 0.2)]
    assert entropy_of(logits_of(PROBABILITIES), LABEL, Targets.of(TWO)).item() == pytest.approx(np.mean(every), abs=1e-6)
    label = LABEL.clone()
    label[0, 1, 1] = 3
    found = entropy_of(logits_of(PROBABILITIES), label, Targets.of(IGNORING))
    assert found.item() == pytest.approx(np.mean(every[:3]), abs=1e-6)


def test_binary_cross_entropy_of_regions_is_the_mean_over_annotated_voxels_and_regions() -> None:
    ignoring = NESTED.model_copy(update={"ignore": Label(name="ignore", value=9)})
    label = LABEL.clone()
    label[0, 0, 0] = 3
    p = PROBABILITIES[0, :2].double()
    terms = [-math.log(p[0, 0, 1]), -math.log(p[0, 1, 0]), -math.log(p[0, 1, 1])]  # whole tumour: all three
    terms += [-math.log(1 - p[1, 0, 1]), -math.log(p[1, 1, 0]), -math.log(1 - p[1, 1, 1])]  # core: one
    found = entropy_of(torch.logit(PROBABILITIES[:, :2]), label, Targets.of(ignoring))
    assert found.item() == pytest.approx(np.mean(terms), abs=1e-6)


def test_a_patch_without_annotated_voxels_has_no_entropy() -> None:
    nothing = torch.full_like(LABEL, 3)
    assert entropy_of(logits_of(PROBABILITIES), nothing, Targets.of(IGNORING)).item() == 0


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
    alone = [entropy_of(o, strided(label, o.shape[2:]), Targets.of(TWO)).item() for o in outputs]
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
    (LossSpec(kind="dicey"), "unknown loss 'dicey'; choose from boundary, ce, dice, dice_ce, .*, tversky, or give module:Name"),
    (LossSpec(options={"gamma": 2}), "loss 'dice_ce' takes these numbers as options: dice, ce; found gamma=2"),
    (LossSpec(options={"dice": "much"}), "found dice='much' \\(should be a valid number\\)"),
    (LossSpec(kind="focal", options={"gamma": True}), "these numbers as options: gamma, alpha; found gamma=True"),
    (LossSpec(kind="topk", options={"k": 0}), "found k=0 \\(should be greater than 0\\)"),
    (LossSpec(kind="ce", options={"ce": 1.0}), "loss 'ce' takes no options; found ce=1.0"),
    (LossSpec(kind="no_such_package:Loss"), "loss 'no_such_package:Loss' cannot be imported"),
    (LossSpec(kind="builtins:sorted", options={"much": 1}), "loss 'builtins:sorted' cannot be made with options {'much': 1}: "),
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


def by_hand(logits: torch.Tensor, label: torch.Tensor, targets: Targets, batch_dice: bool) -> torch.Tensor:
    """Dice plus cross-entropy as the formulas say, without any of the shortcuts."""
    valid = targets.valid(label)
    mask = torch.ones_like(label).float() if valid is None else valid.float()
    p, t = logits.softmax(1) * mask[:, None], targets.dense(label) * mask[:, None]
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    dice = (2 * (p * t).sum(axes) + SMOOTH) / (p.sum(axes) + t.sum(axes) + SMOOTH)
    dice = dice[1:] if batch_dice else dice[:, 1:]
    ce = -(logits.log_softmax(1) * t).sum() / mask.sum()
    return ce - dice.mean()


@pytest.mark.parametrize("labels", [TWO, IGNORING])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_value_and_gradient_are_those_of_the_plain_formula(labels: Labels, batch_dice: bool) -> None:
    torch.manual_seed(0)
    label = torch.randint(0, 3 + (labels.ignore is not None), (2, 7, 16, 18))
    logits = (5 * torch.randn(2, 3, 7, 16, 18)).requires_grad_()
    batch = Batch(torch.zeros(1), label, ("x", "y"))
    ours = make_loss(LossSpec(), labels, batch_dice)([logits], batch, 0.0)
    plain = by_hand(logits, label, Targets.of(labels), batch_dice)
    assert float(ours.detach()) == pytest.approx(float(plain.detach()), abs=1e-6)
    (first,), (second,) = torch.autograd.grad(ours, logits), torch.autograd.grad(plain, logits)
    assert torch.allclose(first, second, atol=1e-8, rtol=1e-4)


def test_cross_entropy_of_a_certain_error_is_finite_and_exact() -> None:
    logits = torch.tensor([0.0, 300.0, 0.0]).view(1, 3, 1, 1)
    assert value(LossSpec(kind="ce"), logits, torch.zeros(1, 1, 1).long(), TWO) == pytest.approx(300)


def test_the_deep_label_is_a_view() -> None:
    label = torch.zeros(2, 8, 8).long()
    assert strided(label, torch.Size((4, 2)))._base is label


TRUE = [0.7, 0.8, 0.5, 0.2]  # what the scene gives to what is true


def test_focal_loss_by_hand() -> None:
    expected = np.mean([-((1 - p) ** 2) * math.log(p) for p in TRUE])
    assert value(LossSpec(kind="focal"), logits_of(PROBABILITIES), LABEL, TWO) == pytest.approx(expected, abs=1e-6)
    spec = LossSpec(kind="focal", options={"gamma": 1.5, "alpha": 0.25})
    weights = [0.75, 0.25, 0.25, 0.25]
    expected = np.mean([-w * (1 - p) ** 1.5 * math.log(p) for w, p in zip(weights, TRUE, strict=True)])
    assert value(spec, logits_of(PROBABILITIES), LABEL, TWO) == pytest.approx(expected, abs=1e-6)


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    for labels, logits in ((TWO, logits_of(PROBABILITIES)), (NESTED, torch.logit(PROBABILITIES[:, :2]))):
        plain = value(LossSpec(kind="ce"), logits, LABEL, labels)
        assert value(LossSpec(kind="focal", options={"gamma": 0}), logits, LABEL, labels) == pytest.approx(plain, abs=1e-6)


def test_tversky_by_hand() -> None:
    def index(tp: float, fp: float, fn: float) -> float:
        return tp / (tp + 0.3 * fp + 0.7 * fn)

    a, b = index(1.0, 0.2 + 0.3, 0.2 + 0.8), index(0.5, 0.1 + 0.1 + 0.3, 0.5)
    assert value(LossSpec(kind="tversky"), logits_of(PROBABILITIES), LABEL, TWO) == pytest.approx(-(a + b) / 2, abs=1e-5)
    expected = ((1 - a) ** 0.75 + (1 - b) ** 0.75) / 2
    assert value(LossSpec(kind="focal_tversky"), logits_of(PROBABILITIES), LABEL, TWO) == pytest.approx(expected, abs=1e-5)
    ce = value(LossSpec(kind="ce"), logits_of(PROBABILITIES), LABEL, TWO)
    both = value(LossSpec(kind="tversky", options={"ce": 0.5}), logits_of(PROBABILITIES), LABEL, TWO)
    assert both == pytest.approx(-(a + b) / 2 + 0.5 * ce, abs=1e-5)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_tversky_with_equal_weights_is_dice(batch_dice: bool) -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 8, 8), torch.randint(0, 2, (2, 8, 8))
    equal = LossSpec(kind="tversky", options={"alpha": 0.5, "beta": 0.5})
    dice = value(LossSpec(kind="dice"), logits, label, TWO, batch_dice=batch_dice)
    assert value(equal, logits, label, TWO, batch_dice=batch_dice) == pytest.approx(dice, abs=1e-6)


def test_top_k_is_the_mean_of_the_worst_annotated_voxels() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 10, 10), torch.randint(0, 4, (2, 10, 10))
    losses = -logits.log_softmax(1).gather(1, label.clamp(max=2)[:, None])[:, 0][label < 3].numpy()
    for k in (1, 10, 100):
        worst = np.sort(losses)[-max(1, int(len(losses) * k / 100)):]
        spec = LossSpec(kind="topk", options={"k": k})
        assert value(spec, logits, label, IGNORING) == pytest.approx(worst.mean(), abs=1e-5)
    dice, topk = (value(LossSpec(kind=kind), logits, label, IGNORING) for kind in ("dice", "topk"))
    assert value(LossSpec(kind="dice_topk"), logits, label, IGNORING) == pytest.approx(dice + topk, abs=1e-6)
    assert value(LossSpec(kind="dice_focal"), logits, label, IGNORING) == pytest.approx(
        dice + value(LossSpec(kind="focal"), logits, label, IGNORING), abs=1e-6)


@pytest.mark.parametrize(("shape", "spacing"), [((9, 11), (1.0, 1.0)), ((9, 11), (2.0, 0.5)), ((6, 9, 8), (3.0, 1.0, 1.0))])
def test_signed_distance_is_what_scipy_measures(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.3
    mask[tuple(slice(2, 6) for _ in shape)] = True
    expected = distance_transform_edt(~mask, spacing) - np.maximum(distance_transform_edt(mask, spacing) - min(spacing), 0)
    assert signed_distance(mask, spacing) == pytest.approx(expected, abs=1e-5)
    assert not signed_distance(np.zeros(shape, bool), spacing).any() and not signed_distance(np.ones(shape, bool), spacing).any()


def test_the_boundary_part_weighs_probabilities_by_distance_and_gains_share_over_the_run() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(1, 3, 8, 9), torch.zeros(1, 8, 9).long()
    label[0, 2:5, 2:5], label[0, 6:, 6:] = 1, 2
    p = logits.softmax(1)[0, 1:].numpy()
    phi = np.stack([signed_distance((label[0] == i).numpy(), (1.0, 1.0)) for i in (1, 2)])
    rest = value(LossSpec(), logits, label, TWO)
    spec = LossSpec(kind="boundary", options={"start": 0.1, "stop": 0.7})
    for progress, share in ((0.0, 0.1), (0.5, 0.4), (1.0, 0.7)):
        expected = (1 - share) * rest + share * (p * phi).mean()
        assert value(spec, logits, label, TWO, progress=progress) == pytest.approx(expected, abs=1e-5)


def test_only_the_finest_head_has_a_boundary_part() -> None:
    torch.manual_seed(0)
    label = torch.randint(0, 3, (1, 8, 8))
    batch, outputs = Batch(torch.zeros(1), label, ("x",)), [torch.randn(1, 3, n, n) for n in (8, 4)]
    both = make_loss(LossSpec(kind="boundary"), TWO, False)(outputs, batch, 1.0)
    finest = value(LossSpec(kind="boundary"), outputs[0], label, TWO, progress=1.0)
    coarse = value(LossSpec(), outputs[1], strided(label, torch.Size((4, 4))), TWO)
    assert float(both) == pytest.approx((2 * finest + coarse) / 3, abs=1e-5)


def test_a_spacing_with_another_number_of_axes_is_refused() -> None:
    spec = LossSpec(kind="boundary", options={"spacing": [1, 1, 1]})
    with pytest.raises(PluginError, match="spacing needs 2 positive numbers, one per axis of the patch"):
        value(spec, logits_of(PROBABILITIES), LABEL, TWO)


def test_what_is_not_annotated_is_merged_with_background_by_hand() -> None:
    labelled = torch.tensor([[True, False]])
    label = torch.where(LABEL == 2, 0, LABEL)
    ce = np.mean([-math.log(p) for p in (0.7 + 0.1, 0.8, 0.2 + 0.5, 0.2)])
    assert value(LossSpec(kind="ce"), logits_of(PROBABILITIES), label, TWO, labelled) == pytest.approx(ce, abs=1e-6)
    a = dice_by_hand(0.8 + 0.2, 0.2 + 0.8 + 0.3 + 0.2, 2)
    assert value(LossSpec(kind="dice"), logits_of(PROBABILITIES), label, TWO, labelled) == pytest.approx(-a, abs=1e-6)


def test_a_label_that_is_there_although_not_annotated_counts_as_background() -> None:
    labelled = torch.tensor([[True, False]])
    given = [value(LossSpec(), logits_of(PROBABILITIES), label, TWO, labelled) for label in (LABEL, LABEL * (LABEL < 2))]
    assert given[0] == pytest.approx(given[1], abs=1e-7)


def test_batch_dice_pools_only_the_samples_in_which_a_target_is_annotated() -> None:
    logits = logits_of(torch.cat([PROBABILITIES, PROBABILITIES.roll(1, 2)]))
    label, labelled = torch.cat([LABEL, LABEL]), torch.tensor([[True, True], [True, False]])
    merged, known = merge(logits, label, labelled)
    p = merged.softmax(1)
    a = dice_by_hand((p[:, 1] * (known == 1)).sum().item(), p[:, 1].sum().item(), 4)
    b = dice_by_hand(0.5, 1.0, 1)  # of the first sample alone
    assert value(LossSpec(kind="dice"), logits, label, TWO, labelled, batch_dice=True) == pytest.approx(-(a + b) / 2, abs=1e-6)
    sample = [dice_by_hand(1.0, 1.5, 2), b, dice_by_hand((p[1, 1] * (known[1] == 1)).sum().item(), 1.5, 2)]
    assert value(LossSpec(kind="dice"), logits, label, TWO, labelled) == pytest.approx(-np.mean(sample), abs=1e-6)


def test_a_region_that_is_not_annotated_is_left_out() -> None:
    logits, labelled = torch.logit(PROBABILITIES[:, :2]), torch.tensor([[False, True]])
    core = [-math.log(p) for p in (1 - 0.2, 1 - 0.8, 0.3, 1 - 0.2)]
    assert value(LossSpec(kind="ce"), logits, LABEL, NESTED, labelled) == pytest.approx(np.mean(core), abs=1e-6)
    dice = dice_by_hand(0.3, 1.5, 1)
    assert value(LossSpec(kind="dice"), logits, LABEL, NESTED, labelled) == pytest.approx(-dice, abs=1e-6)


def test_a_region_is_annotated_where_all_its_labels_are() -> None:
    assert [NESTED.annotated(names) for names in (None, ("core",), ("edema",), ("edema", "core"))] == [(0, 1), (1,), (), (0, 1)]
    assert TWO.annotated(("b",)) == (1,)


def test_a_batch_knows_which_of_its_cases_are_partly_annotated() -> None:
    batch = Batch(torch.zeros(1), LABEL, ("x", "y", "z"))
    assert with_labelled(batch, {}, 2) is batch and with_labelled(batch, {"w": (0,)}, 2) is batch
    found = with_labelled(batch, {"y": (1,), "w": (0,)}, 2).labelled
    assert found is not None and found.tolist() == [[True, True], [False, True], [True, True]]


def test_overlap_counts_a_target_only_where_it_is_annotated() -> None:
    found = torch.tensor([[[1, 1], [2, 2]], [[1, 2], [2, 0]]])
    logits = torch.nn.functional.one_hot(found, 3).movedim(-1, 1).float()
    label = torch.tensor([[[1, 1], [0, 0]], [[1, 2], [2, 1]]])
    labelled = torch.tensor([[True, False], [True, True]])
    assert count_overlap(logits, label, Targets.of(TWO), labelled).tolist() == [[3, 2], [3, 2], [4, 2]]
    sigmoid = torch.where(torch.stack([found > 0, found == 2], 1), 1.0, -1.0)
    assert count_overlap(sigmoid, label, Targets.of(NESTED), labelled).tolist() == [[5, 2], [7, 2], [6, 2]]


def noisy_scene(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose two channels say what is there, with noise, and its label map (4 samples of 16 x 16)."""
    label = torch.zeros(4, 16, 16).long()
    label[:, 2:8, 2:8], label[:, 9:14, 6:14] = 1, 2
    image = torch.stack([label == 1, label == 2], 1).float()
    return image + 0.3 * torch.randn(image.shape, generator=generator), label


def learn(kind: str, told: bool, complete: bool = False) -> list[float]:
    """Dice of both labels after a linear network was trained on samples of which each has one label annotated."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = torch.nn.Conv2d(2, 3, 1)
    optimizer, loss = torch.optim.Adam(network.parameters(), 0.1), make_loss(LossSpec(kind=kind), TWO, True)
    labelled = torch.tensor([[True, False], [False, True]] * 2)
    for _ in range(60):
        image, label = noisy_scene(generator)
        if not complete:
            hidden = torch.where(labelled, 0, torch.tensor([1, 2])).sum(1).view(-1, 1, 1)
            label = torch.where(label == hidden, 0, label)
        optimizer.zero_grad()
        batch = Batch(image, label, ("x",) * 4, labelled if told and not complete else None)
        loss([network(image)], batch, 0.5).backward()
        optimizer.step()
    image, label = noisy_scene(generator)
    with torch.no_grad():
        both, found, true = count_overlap(network(image), label, Targets.of(TWO))
    return [float(2 * b / (f + t)) for b, f, t in zip(both, found, true, strict=True)]


@pytest.mark.parametrize("kind", ["dice_ce", "ce", "dice_focal", "boundary"])
def test_a_label_that_half_of_the_cases_lack_is_learned_as_if_all_had_it(kind: str) -> None:
    complete, partly = learn(kind, True, complete=True), learn(kind, told=True)
    assert all(p > c - 0.03 > 0.8 for p, c in zip(partly, complete, strict=True))


def test_untold_the_missing_labels_are_learned_as_background() -> None:
    assert max(learn("ce", told=False)) < 0.7
