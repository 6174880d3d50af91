"""What every built-in loss promises, whatever the labels, the dimensions, the number of heads and what is annotated."""

from __future__ import annotations

import itertools

import pytest
import torch

from autoseg.contracts import Batch, Loss
from autoseg.trainers.losses import TERMS, make_loss
from autoseg.trainers.targets import Targets, strided
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.run import LossSpec

PATCH = {2: (8, 8), 3: (4, 8, 8)}
HEADS = {2: 1, 3: 3}
CONFIGURATIONS = [
    pytest.param(kind, regions, ignore, partly, dims, batch_dice, id="-".join([
        kind, "regions" if regions else "labels", "ignore" if ignore else "all", "partly" if partly else "wholly", f"{dims}d",
        "batch" if batch_dice else "sample",
    ]))
    for kind, regions, ignore, partly, dims, batch_dice in itertools.product(
        TERMS, (False, True), (False, True), (False, True), (2, 3), (False, True)
    )
]


class Scene:
    """A label map with every class, a loss for it, and logits that are right, wrong, or random.

    With `partly` the first sample's second target is not annotated: its voxels are background in the label map.
    """

    def __init__(self, kind: str, regions: bool, ignore: bool, partly: bool, dims: int, batch_dice: bool) -> None:
        self.labels = Labels(
            foreground=(Label(name="a", value=1), Label(name="b", value=5)),
            ignore=Label(name="ignore", value=9) if ignore else None,
            regions=(Region(name="a", values=(1,)), Region(name="b", values=(5,))) if regions else (),
            region_order=(1, 5) if regions else (),
        )
        self.targets = Targets.of(self.labels)
        self.loss: Loss = make_loss(LossSpec(kind=kind), self.labels, batch_dice)
        generator = torch.Generator().manual_seed(dims)
        shape = (2, *PATCH[dims])
        self.label = torch.randint(0, 3, shape, generator=generator)
        if partly:
            self.label[0][self.label[0] == 2] = 0
        self.annotated = torch.rand(shape, generator=generator) < 0.7
        if ignore:
            self.label = torch.where(self.annotated, self.label, 3)
        labelled = torch.tensor([[True, False], [True, True]]) if partly else None
        self.batch = Batch(torch.zeros(2, 1, *PATCH[dims]), self.label, ("x", "y"), labelled)
        self.sizes = [torch.Size(n // 2**level for n in PATCH[dims]) for level in range(HEADS[dims])]
        self.random = [torch.randn(2, self.targets.classes, *size, generator=generator) for size in self.sizes]

    def logits(self, strength: float) -> list[torch.Tensor]:
        """Certain of the truth, or with negative strength of its contrary."""
        return [(self.targets.dense(strided(self.label, size)) * 2 - 1) * strength for size in self.sizes]

    def value(self, outputs: list[torch.Tensor], progress: float = 0.5) -> float:
        return float(self.loss(outputs, self.batch, progress))


@pytest.fixture
def scene(kind: str, regions: bool, ignore: bool, partly: bool, dims: int, batch_dice: bool) -> Scene:
    return Scene(kind, regions, ignore, partly, dims, batch_dice)


NAMES = ("kind", "regions", "ignore", "partly", "dims", "batch_dice")
every_loss = pytest.mark.parametrize(NAMES, CONFIGURATIONS)
every_loss_with_an_ignore_label = pytest.mark.parametrize(NAMES, [p for p in CONFIGURATIONS if p.values[2]])
every_loss_of_partly_annotated_cases = pytest.mark.parametrize(NAMES, [p for p in CONFIGURATIONS if p.values[3]])


@every_loss
def test_a_perfect_prediction_is_best_and_its_contrary_worst(scene: Scene) -> None:
    perfect, slightly, unsure, wrong = (scene.value(scene.logits(s)) for s in (20.0, 1.0, 0.0, -20.0))
    assert perfect < slightly < unsure < wrong


@every_loss
def test_a_perfect_prediction_reaches_the_least_value_there_is(kind: str, scene: Scene) -> None:
    least = {"ce": 0.0, "focal": 0.0, "focal_tversky": 0.0, "topk": 0.0}.get(kind, -1.0)
    if kind != "boundary":
        assert scene.value(scene.logits(30.0)) == pytest.approx(least, abs=1e-4)
    perfect = scene.value(scene.logits(30.0))
    assert all(scene.value([logits * scale for logits in scene.random]) > perfect for scale in (0.1, 1.0, 30.0))


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
    scene.loss(outputs, scene.batch, 0.5).backward()
    moved = [output.detach() - 0.1 * output.grad for output in outputs if output.grad is not None]
    assert scene.value(moved) < scene.value(scene.random)


@every_loss_with_an_ignore_label
def test_voxels_that_are_not_annotated_have_no_gradient_and_no_influence(scene: Scene) -> None:
    outputs = [logits.clone().requires_grad_() for logits in scene.random]
    scene.loss(outputs, scene.batch, 0.5).backward()
    changed = []
    for logits, size in zip(outputs, scene.sizes, strict=True):
        ignored = (strided(scene.label, size) == 3)[:, None]
        assert logits.grad is not None and not (logits.grad * ignored).any()
        changed.append(torch.where(ignored, 50 * torch.randn_like(logits), logits.detach()))
    assert scene.value(changed) == pytest.approx(scene.value(scene.random), abs=1e-6)


@every_loss_of_partly_annotated_cases
def test_background_and_what_is_not_annotated_are_told_apart_by_nothing(regions: bool, scene: Scene) -> None:
    outputs = [logits.clone().requires_grad_() for logits in scene.random]
    scene.loss(outputs, scene.batch, 0.5).backward()
    changed = [logits.clone() for logits in scene.random]
    for logits, output in zip(changed, outputs, strict=True):
        assert output.grad is not None
        if regions:
            assert not output.grad[0, 1].any()
            logits[0, 1] = 20.0
        else:  # they share one gradient in proportion to their probabilities
            assert torch.allclose(output.grad[0, 0] * logits[0, 2].exp(), output.grad[0, 2] * logits[0, 0].exp(), atol=1e-6)
            logits[0, 0], logits[0, 2] = logits[0, 2].clone(), logits[0, 0].clone()
    assert scene.value(changed) == pytest.approx(scene.value(scene.random), abs=1e-5)


@every_loss_of_partly_annotated_cases
def test_annotated_everywhere_is_the_same_as_saying_nothing(scene: Scene) -> None:
    whole = [
        scene.loss(scene.random, Batch(scene.batch.image, scene.label, ("x", "y"), labelled), 0.5)
        for labelled in (None, torch.ones(2, 2, dtype=torch.bool))
    ]
    assert float(whole[0]) == pytest.approx(float(whole[1]), abs=1e-6)


@every_loss
def test_half_precision_logits_are_summed_in_single_precision(scene: Scene) -> None:
    rough = scene.loss([logits.bfloat16() for logits in scene.random], scene.batch, 0.0)
    assert rough.dtype == torch.float32
    rounded = scene.value([logits.bfloat16().float() for logits in scene.random], 0.0)
    assert float(rough) == pytest.approx(rounded, abs=1e-6)


@every_loss
def test_patches_of_background_or_ignored_voxels_only_stay_finite(ignore: bool, scene: Scene) -> None:
    for strength, value in itertools.product((1.0, 80.0), (0, 3) if ignore else (0,)):
        batch = Batch(scene.batch.image, torch.full_like(scene.label, value), ("x", "y"), scene.batch.labelled)
        outputs = [(strength * logits).requires_grad_() for logits in scene.random]
        loss = scene.loss(outputs, batch, 0.0)
        loss.backward()
        assert bool(loss.isfinite()) and all(o.grad is not None and bool(o.grad.isfinite().all()) for o in outputs)


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("batch_dice", [False, True])
def test_a_batch_in_which_nothing_is_annotated_teaches_nothing_about_regions(kind: str, batch_dice: bool) -> None:
    scene = Scene(kind, True, False, True, 2, batch_dice)
    batch = Batch(scene.batch.image, scene.label, ("x", "y"), torch.zeros(2, 2, dtype=torch.bool))
    outputs = [logits.clone().requires_grad_() for logits in scene.random]
    loss = scene.loss(outputs, batch, 0.5)
    loss.backward()
    assert float(loss.detach()) == 0 and not any(bool(o.grad.any()) for o in outputs if o.grad is not None)
