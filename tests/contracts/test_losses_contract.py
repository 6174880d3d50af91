"""What every built-in loss promises, whatever the labels, the dimensions and the number of heads."""

from __future__ import annotations

import itertools

import pytest
import torch

from autoseg.contracts import Batch, Loss
from autoseg.trainers.losses import TERMS, Targets, make_loss, strided
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.run import LossSpec

PATCH = {2: (8, 8), 3: (4, 8, 8)}
CONFIGURATIONS = [
    pytest.param(kind, regions, ignore, dims, heads, batch_dice, id="-".join([
        kind, "regions" if regions else "labels", "ignore" if ignore else "all", f"{dims}d", f"{heads}heads",
        "batch" if batch_dice else "sample",
    ]))
    for kind, regions, ignore, dims, heads, batch_dice in itertools.product(
        TERMS, (False, True), (False, True), (2, 3), (1, 3), (False, True)
    )
]


class Scene:
    """A label map with every class, a loss for it, and logits that are right, wrong, or random."""

    def __init__(self, kind: str, regions: bool, ignore: bool, dims: int, heads: int, batch_dice: bool) -> None:
        self.labels = Labels(
            foreground=(Label(name="a", value=1), Label(name="b", value=5)),
            ignore=Label(name="ignore", value=9) if ignore else None,
            regions=(Region(name="both", values=(1, 5)), Region(name="b", values=(5,))) if regions else (),
            region_order=(1, 5) if regions else (),
        )
        self.targets = Targets.of(self.labels)
        self.loss: Loss = make_loss(LossSpec(kind=kind), self.labels, batch_dice)
        generator = torch.Generator().manual_seed(dims * 10 + heads)
        shape = (2, *PATCH[dims])
        self.label = torch.randint(0, 3, shape, generator=generator)
        self.annotated = torch.rand(shape, generator=generator) < 0.7
        if ignore:
            self.label = torch.where(self.annotated, self.label, 3)
        self.batch = Batch(torch.zeros(2, 1, *PATCH[dims]), self.label, ("x", "y"))
        self.sizes = [torch.Size(n // 2**level for n in PATCH[dims]) for level in range(heads)]
        self.random = [torch.randn(2, self.targets.classes, *size, generator=generator) for size in self.sizes]

    def logits(self, strength: float) -> list[torch.Tensor]:
        """Certain of the truth, or with negative strength of its contrary."""
        return [(self.targets.dense(strided(self.label, size)) * 2 - 1) * strength for size in self.sizes]

    def value(self, outputs: list[torch.Tensor]) -> float:
        return float(self.loss(outputs, self.batch, 0.5))


@pytest.fixture
def scene(kind: str, regions: bool, ignore: bool, dims: int, heads: int, batch_dice: bool) -> Scene:
    return Scene(kind, regions, ignore, dims, heads, batch_dice)


NAMES = ("kind", "regions", "ignore", "dims", "heads", "batch_dice")
every_loss = pytest.mark.parametrize(NAMES, CONFIGURATIONS)
every_loss_with_an_ignore_label = pytest.mark.parametrize(NAMES, [p for p in CONFIGURATIONS if p.values[2]])


@every_loss
def test_a_perfect_prediction_is_best_and_its_contrary_worst(scene: Scene) -> None:
    perfect, slightly, unsure, wrong = (scene.value(scene.logits(s)) for s in (20.0, 1.0, 0.0, -20.0))
    assert perfect < slightly < unsure < wrong


@every_loss
def test_a_perfect_prediction_reaches_the_least_value_there_is(kind: str, scene: Scene) -> None:
    least = {"dice": -1.0, "ce": 0.0, "dice_ce": -1.0}[kind]
    assert scene.value(scene.logits(30.0)) == pytest.approx(least, abs=1e-4)


@every_loss
def test_gradients_are_finite_and_reach_every_head(scene: Scene) -> None:
    outputs = [logits.clone().requires_grad_() for logits in scene.random]
    loss = scene.loss(outputs, scene.batch, 0.0)
    assert loss.ndim == 0 and loss.dtype == torch.float32
    loss.backward()
    for output in outputs:
        assert output.grad is not None and bool(output.grad.isfinite().all()) and bool(output.grad.any())


@every_loss
def test_a_step_against_the_gradient_lowers_the_loss(scene: Scene) -> None:
    outputs = [logits.clone().requires_grad_() for logits in scene.random]
    scene.loss(outputs, scene.batch, 0.0).backward()
    moved = [output.detach() - 0.1 * output.grad for output in outputs if output.grad is not None]
    assert scene.value(moved) < scene.value(scene.random)


@every_loss_with_an_ignore_label
def test_what_is_predicted_where_nothing_is_annotated_does_not_matter(scene: Scene) -> None:
    changed = []
    for logits, size in zip(scene.random, scene.sizes, strict=True):
        ignored = (strided(scene.label, size) == 3)[:, None]
        changed.append(torch.where(ignored, 50 * torch.randn_like(logits), logits))
    assert scene.value(changed) == pytest.approx(scene.value(scene.random), abs=1e-6)


@every_loss
def test_half_precision_logits_are_summed_in_single_precision(scene: Scene) -> None:
    rough = scene.loss([logits.bfloat16() for logits in scene.random], scene.batch, 0.0)
    assert rough.dtype == torch.float32
    rounded = scene.value([logits.bfloat16().float() for logits in scene.random])
    assert float(rough) == pytest.approx(rounded, abs=1e-6)


@every_loss
@pytest.mark.parametrize("strength", [1.0, 80.0])
def test_patches_of_background_or_ignored_voxels_only_stay_finite(ignore: bool, scene: Scene, strength: float) -> None:
    for value in (0, 3) if ignore else (0,):
        batch = Batch(scene.batch.image, torch.full_like(scene.label, value), ("x", "y"))
        outputs = [(strength * logits).requires_grad_() for logits in scene.random]
        loss = scene.loss(outputs, batch, 0.0)
        loss.backward()
        assert bool(loss.isfinite()) and all(o.grad is not None and bool(o.grad.isfinite().all()) for o in outputs)
