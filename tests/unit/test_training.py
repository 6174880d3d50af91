"""The training loop: it learns, it stops on nonsense, and its state is all there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoseg.errors import AutosegError, PluginError, RunError
from autoseg.trainers.default import Job, Training, _overlap, measure_step
from autoseg.trainers.losses import Targets
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.plan import Configuration
from autoseg.types.run import EpochRecord, TrainSpec

TWO = Labels(foreground=(Label(name="square", value=1), Label(name="dot", value=2)))
REGIONS = TWO.model_copy(update={
    "regions": (Region(name="all", values=(1, 2)), Region(name="dot", values=(2,))), "region_order": (1, 2)})
IGNORING = TWO.model_copy(update={"ignore": Label(name="ignore", value=9)})


class Squares:
    """A case with a bright square and a dark dot, whose place depends on its number."""

    def __init__(self, number: int, shape: tuple[int, int, int] = (3, 32, 32), ignore: bool = False) -> None:
        rng = np.random.default_rng(number)
        self.name, self.shape = f"squares{number}", shape
        _, y, x = shape
        self.label = np.zeros(shape, np.int16)
        top, left = int(rng.integers(2, y - 14)), int(rng.integers(2, x - 14))
        self.label[:, top : top + 10, left : left + 10] = 1
        self.label[:, top + 3 : top + 6, left + 3 : left + 6] = 2
        values = np.array([0.0, 2.0, -2.0])[self.label]
        self.image = (values + rng.normal(0, 0.3, shape))[None].astype(np.float32)
        if ignore:
            self.label[:, :, : x // 2] = 3

    @property
    def locations(self) -> Mapping[int, NDArray[np.integer]]:
        found: dict[int, NDArray[np.integer]] = {v: np.argwhere(self.label == v) for v in (1, 2) if (self.label == v).any()}
        if (self.label == 3).any():
            found[0] = np.argwhere(self.label != 3)
        return found

    def read_image(self, box: tuple[slice, slice, slice]) -> NDArray[np.float32]:
        return self.image[(slice(None), *box)]

    def read_label(self, box: tuple[slice, slice, slice]) -> NDArray[np.int16]:
        return self.label[box]


def configuration(patch: tuple[int, ...] = (24, 24), kind: str = "unet") -> Configuration:
    dims = len(patch)
    strides = ((1,) * dims, *(tuple(2 if n >= 16 else 1 for n in patch),) * 2)
    return Configuration.model_validate({
        "patch_size": patch, "batch_size": 4, "spacing": (1.0,) * dims, "median_shape": patch, "network": {"kind": kind},
        "strides": strides, "kernel_sizes": ((3,) * dims,) * 3, "features_per_stage": (8, 8, 8), "blocks_per_stage": (1, 1, 1),
        "decoder_blocks_per_stage": (1, 1), "batch_dice": dims == 2, "normalization": ("NoNormalization",),
        "use_mask_for_norm": (False,),
    })


def job(
    labels: Labels = TWO, patch: tuple[int, ...] = (24, 24), kind: str = "unet", precision: str = "fp32", threads: int = 0,
    validation: bool = True, ignore: bool = False, cases: list[Any] | None = None, **spec: Any,
) -> Job:
    record = TrainSpec.model_validate({"epochs": 2, "steps_per_epoch": 3, "val_steps": 2, **spec})
    return Job(
        configuration(patch, kind), labels, 1, record, 0, cases or [Squares(i, ignore=ignore) for i in range(4)],
        [Squares(9, ignore=ignore)] if validation else [], torch.device("cpu"), precision, threads,  # type: ignore[arg-type]
    )


def epochs(training: Training) -> list[EpochRecord]:
    return list(training.run())


def test_it_learns_squares_and_dots_in_a_few_steps() -> None:
    records = epochs(Training(job(epochs=3, steps_per_epoch=25)))
    assert records[-1].train_loss < records[0].train_loss - 0.2
    assert records[-1].val_loss is not None and records[-1].val_loss < 0
    assert (records[-1].pseudo_dice["square"] or 0) > 0.8


@pytest.mark.parametrize("changes", [
    pytest.param({"labels": REGIONS}, id="regions"),
    pytest.param({"labels": IGNORING, "ignore": True}, id="ignore"),
    pytest.param({"deep_supervision": False}, id="no-deep-supervision"),
    pytest.param({"precision": "bf16"}, id="bf16"),
    pytest.param({"precision": "bf16", "patch": (2, 24, 24), "kind": "residual-unet"}, id="3d-residual-bf16"),
    pytest.param({"optimizer": {"kind": "adamw", "lr": 0.001, "options": {"amsgrad": True}}}, id="adamw"),
    pytest.param({"optimizer": {"momentum": 0}}, id="no-momentum"),
    pytest.param({"schedule": {"kind": "cosine", "warmup": 0.3}}, id="cosine"),
    pytest.param({"loss": {"kind": "ce"}}, id="ce"),
    pytest.param({"threads": 2}, id="threads"),
])
def test_every_kind_of_run_goes_to_its_end(changes: dict[str, Any]) -> None:
    wanted = job(**changes)
    records = epochs(Training(wanted))
    assert [(r.epoch, r.step) for r in records] == [(0, 3), (1, 6)]
    for record in records:
        assert math.isfinite(record.train_loss) and record.val_loss is not None and math.isfinite(record.val_loss)
        assert list(record.pseudo_dice) == [name for name, _ in wanted.labels.targets]
        assert record.seconds > 0 and 0 <= record.data_wait <= 1


def test_without_validation_cases_or_steps_there_is_no_pseudo_dice() -> None:
    for training in (Training(job(validation=False)), Training(job(val_steps=0))):
        assert [(r.val_loss, r.pseudo_dice) for r in epochs(training)] == [(None, {})] * 2


def test_the_batch_size_of_the_record_goes_before_the_plans() -> None:
    assert Training(job()).batch_size == 4
    assert Training(job(batch_size=3)).batch_size == 3


def test_the_learning_rate_falls_with_the_steps_and_is_told() -> None:
    training = Training(job())
    seen: list[float] = []
    records = list(training.run(lambda: seen.append(training.optimizer.param_groups[0]["lr"])))
    assert seen == pytest.approx([0.01 * (1 - i / 6) ** 0.9 for i in range(6)])
    assert [r.learning_rate for r in records] == [seen[2], seen[5]]


def test_gradients_are_clipped_to_the_records_norm() -> None:
    plain = {"momentum": 0, "weight_decay": 0, "lr": 1}
    training = Training(job(steps_per_epoch=1, epochs=1, gradient_clip=1e-3, optimizer=plain))
    before = {name: value.clone() for name, value in training.weights().items()}
    epochs(training)
    moved = sum(float((value - before[name]).double().square().sum()) for name, value in training.weights().items())
    assert moved**0.5 == pytest.approx(1e-3, rel=0.02)


def test_validation_draws_nothing_from_the_trainings_random_numbers() -> None:
    with_validation, without = (epochs(Training(job(validation=v))) for v in (True, False))
    assert [r.train_loss for r in with_validation] == [r.train_loss for r in without]


def test_training_is_a_function_of_the_seed() -> None:
    first, again, other = (epochs(Training(job(seed=seed))) for seed in (0, 0, 1))
    assert [r.train_loss for r in first] == [r.train_loss for r in again] != [r.train_loss for r in other]


def test_any_seed_will_do() -> None:
    first, other = (epochs(Training(job(seed=seed))) for seed in (10**30, 10**30 + 1))
    assert [r.train_loss for r in first] != [r.train_loss for r in other]


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_and_cases() -> None:
    bad = Squares(0)
    bad.image[:] = np.nan
    with pytest.raises(RunError, match=r"the loss became nan at step 0 on cases squares0, squares0, squares0, squares0"):
        epochs(Training(job(cases=[bad])))


def test_weights_that_are_not_finite_are_never_saved() -> None:
    training = Training(job())
    next(iter(training.network.parameters())).data.fill_(float("nan"))
    for save in (training.state, training.weights):
        with pytest.raises(RunError, match=r"weights are no longer finite after step 0; .*--set optimizer.lr"):
            save()


def test_a_state_of_another_network_is_refused() -> None:
    state = Training(job()).state()
    with pytest.raises(RunError, match="the checkpoint does not fit the network"):
        Training(job(patch=(2, 24, 24))).restore(state)


def test_a_restored_training_shares_nothing_with_the_one_it_came_from() -> None:
    training = Training(job())
    for _ in zip(range(1), training.run(), strict=False):
        pass
    other = Training(job())
    other.restore(training.state())
    before = {name: value.clone() for name, value in other.state().tensors.items()}
    assert any(name.startswith("optimizer.momentum_buffer.") for name in before)
    with torch.no_grad():
        for value in training.state().tensors.values():
            value.add_(1)
    assert all(torch.equal(before[name], value) for name, value in other.state().tensors.items())


@pytest.mark.parametrize(("spec", "message"), [
    ({"augment": {"kind": "none"}}, "unknown augmentation 'none'; choose from default"),
    ({"augment": {"options": {"rotation": 90}}}, "augmentation 'default' takes no options, found rotation"),
    ({"sampler": {"kind": "curriculum"}}, "unknown sampler 'curriculum'; choose from reference"),
    ({"optimizer": {"kind": "lion"}}, "unknown optimizer 'lion'; choose from sgd, adamw"),
    ({"optimizer": {"options": {"betas": [0.9, 0.99]}}}, "optimizer sgd cannot be made with options .*betas"),
    ({"loss": {"kind": "focal"}}, "unknown loss 'focal'"),
])
def test_what_the_record_asks_for_is_never_ignored(spec: dict[str, Any], message: str) -> None:
    with pytest.raises((PluginError, RunError), match=message):
        Training(job(**spec))


def test_reading_errors_end_the_run_and_its_threads() -> None:
    class Gone(Squares):
        def read_image(self, box: tuple[slice, slice, slice]) -> NDArray[np.float32]:
            raise AutosegError("case squares1 is damaged")

    with pytest.raises(AutosegError, match="squares1 is damaged"):
        epochs(Training(job(cases=[Gone(1)], threads=2)))


def test_a_steps_duration_is_measured_on_a_network_of_its_own() -> None:
    measured = measure_step(job())
    assert 0 < measured.seconds < 60 and measured.peak_bytes is None and measured.micro_batch == 4


class TestOverlap:
    def test_counts_of_labels_by_hand(self) -> None:
        label = torch.tensor([[[0, 1], [2, 1]]])
        found = torch.tensor([[[0, 1], [1, 1]]])
        logits = torch.nn.functional.one_hot(found, 3).movedim(-1, 1).float()
        assert _overlap(logits, label, Targets.of(TWO)).tolist() == [[2, 0], [3, 0], [2, 1]]

    def test_ignored_voxels_do_not_count(self) -> None:
        label = torch.tensor([[[0, 1], [2, 3]]])
        logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1], [1, 1]]]), 3).movedim(-1, 1).float()
        assert _overlap(logits, label, Targets.of(IGNORING)).tolist() == [[1, 0], [2, 0], [1, 1]]

    def test_regions_overlap(self) -> None:
        label = torch.tensor([[[0, 1], [2, 2]]])
        logits = torch.tensor([[[[1.0, 1], [1, -1]], [[-1, -1], [1, -1]]]])
        assert _overlap(logits, label, Targets.of(REGIONS)).tolist() == [[2, 1], [3, 1], [3, 2]]


def out_of_memory_above(training: Training, samples: int) -> None:
    """Let the network run out of memory for more samples than these, when it keeps what a backward pass needs."""
    forward = training.network.forward

    def failing(x: torch.Tensor, head_count: int = 1) -> list[torch.Tensor]:
        if len(x) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(x, head_count)

    training.network.forward = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("labels, patch, ignore", [(TWO, (24, 24), False), (TWO, (3, 24, 24), False), (REGIONS, (24, 24), False),
                                                   (IGNORING, (24, 24), True)])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_out_of_memory_splits_the_batch_and_changes_nothing(labels, patch, ignore, samples):
    # Dice over the batch and means over annotated voxels do not split: the test would see a naive sum of parts
    whole, split = (Training(job(labels, patch, ignore=ignore)) for _ in range(2))
    out_of_memory_above(split, samples)
    rows = [epochs(training) for training in (whole, split)]
    assert split.micro_batch == {1: 1, 2: 2, 3: 2}[samples]
    for one, other in zip(*rows, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, abs=1e-5)
        assert one.val_loss == pytest.approx(other.val_loss, abs=1e-5)
    for name, value in whole.weights().items():
        torch.testing.assert_close(split.weights()[name], value, atol=2e-5, rtol=2e-4)


def test_one_patch_that_does_not_fit_is_an_error():
    training = Training(job())
    out_of_memory_above(training, 0)
    with pytest.raises(torch.OutOfMemoryError):
        epochs(training)
    assert training.micro_batch == 1


def test_a_step_that_cannot_even_be_measured_is_told_in_one_sentence(monkeypatch):
    def failing(self: Training, batch: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Training, "_gradients", failing)
    with pytest.raises(RunError, match="one patch at a time; plan smaller patches"):
        measure_step(job())


def test_the_micro_batch_is_part_of_the_state():
    first, second = Training(job()), Training(job())
    out_of_memory_above(first, 2)
    next(first.run())
    second.restore(first.state())
    assert second.micro_batch == 2


def test_a_run_can_be_made_longer_or_shorter_while_it_runs():
    training, reference = Training(job(epochs=2)), Training(job(epochs=3))
    seen = []
    for record in training.run():
        seen.append(record)
        if record.epoch == 0:
            training.set_length(3)
    expected = epochs(reference)
    assert [r.epoch for r in seen] == [0, 1, 2] and seen[-1].learning_rate == expected[-1].learning_rate
    assert seen[1].learning_rate == expected[1].learning_rate


def test_finished_weights_start_a_longer_run_where_they_ended():
    first = Training(job(epochs=1))
    epochs(first)
    longer = Training(job(epochs=2))
    longer.start_from(first.weights(), 1)
    assert longer.step == 3
    rows = epochs(longer)
    assert [r.epoch for r in rows] == [1]
    assert rows[0].learning_rate == epochs(Training(job(epochs=2)))[1].learning_rate
