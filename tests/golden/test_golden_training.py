"""A fixed tiny run: the same samples, losses and weights however it is threaded, stopped and resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoseg.files.runs import RunFolder
from autoseg.trainers.default import Job, Training
from autoseg.trainers.loading import Wanted, make_loader
from autoseg.trainers.sampling import TRAINING, VALIDATION, Recipe
from autoseg.trainers.state import State
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration
from autoseg.types.run import EpochRecord, TrainSpec

EPOCHS, STEPS = 3, 4
CONFIGURATION = Configuration(
    patch_size=(16, 16), batch_size=3, spacing=(1.0, 1.0), median_shape=(24.0, 24.0), strides=((1, 1), (2, 2), (2, 2)),
    kernel_sizes=((3, 3),) * 3, features_per_stage=(8, 8, 8), blocks_per_stage=(2, 2, 2), decoder_blocks_per_stage=(2, 2),
    batch_dice=True, normalization=("ZScoreNormalization",), use_mask_for_norm=(True,),
)
LABELS = Labels(foreground=(Label(name="disc", value=1), Label(name="ring", value=7)))


class Disc:
    """A disc with a ring around it, partly outside the nonzero mask."""

    def __init__(self, number: int) -> None:
        rng = np.random.default_rng(number)
        self.name, self.shape = f"disc{number}", (4, 24, 20 + number)
        y, x = np.mgrid[:24, : 20 + number]
        radius = np.hypot(y - rng.integers(8, 16), x - rng.integers(8, 14))
        label = np.where(radius < 4, 1, np.where(radius < 6, 2, 0))
        label[:3] = -1
        self.label = np.stack([label] * 4).astype(np.int16)
        self.image = (self.label.clip(0) + rng.normal(0, 0.4, self.shape))[None].astype(np.float32)

    @property
    def locations(self) -> Mapping[int, NDArray[np.integer]]:
        return {value: np.argwhere(self.label == value) for value in (1, 2)}

    def read_image(self, box: tuple[slice, slice, slice]) -> NDArray[np.float32]:
        return self.image[(slice(None), *box)]

    def read_label(self, box: tuple[slice, slice, slice]) -> NDArray[np.int16]:
        return self.label[box]


class Stop(BaseException):
    """Ends a run between two steps, as a signal does."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(threads: int = 0, **spec: Any) -> Training:
    record = TrainSpec.model_validate(
        {"epochs": EPOCHS, "steps_per_epoch": STEPS, "val_steps": 2, "seed": 3, "precision": "fp32", **spec}
    )
    cases = [Disc(i) for i in range(5)]
    return Training(Job(CONFIGURATION, LABELS, 1, record, 1, cases[:4], cases[4:], torch.device("cpu"), "fp32", threads))


def finish(training: Training) -> list[dict[str, Any]]:
    return [told(record) for record in training.run()]


def told(record: EpochRecord) -> dict[str, Any]:
    """All of a record but the times."""
    return record.model_dump(exclude={"seconds", "data_wait"})


def assert_same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


@pytest.fixture(scope="module")
def undisturbed() -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    training = start()
    return finish(training), training.state().tensors


@pytest.mark.parametrize("threads", [1, 3])
def test_reader_threads_change_no_bit(
    threads: int, undisturbed: tuple[list[dict[str, Any]], dict[str, torch.Tensor]]
) -> None:
    training = start(threads)
    assert finish(training) == undisturbed[0]
    assert_same_tensors(training.state().tensors, undisturbed[1])


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 8, 11, 12])
def test_a_run_stopped_after_any_step_and_resumed_from_disk_ends_with_the_same_bits(
    stop: int, undisturbed: tuple[list[dict[str, Any]], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, first, records = RunFolder(tmp_path), start(threads=1), []

    def after_step() -> None:
        if first.step == stop:
            state = first.state()
            folder.save_checkpoint(first.step, state.tensors, state.numbers)
            raise Stop

    with pytest.raises(Stop):
        for record in first.run(after_step):
            records.append(told(record))
    checkpoint = folder.load_checkpoint()
    assert checkpoint is not None
    second = start()
    second.restore(State(*checkpoint))
    assert second.step == stop
    records = [r for r in records if r["epoch"] < second.epoch] + finish(second)
    assert records == undisturbed[0]
    assert_same_tensors(second.state().tensors, undisturbed[1])


def test_a_state_in_memory_goes_on_like_the_run_it_came_from() -> None:
    options = {"kind": "adamw", "lr": 0.002}
    whole, first = start(optimizer=options), start(optimizer=options)
    expected = finish(whole)
    generator = first.run()
    records = [told(next(generator))]
    generator.close()
    second = start(optimizer=options)
    second.restore(first.state())
    assert records + finish(second) == expected
    assert_same_tensors(second.state().tensors, whole.state().tensors)


def test_losses_are_the_stored_ones(undisturbed: tuple[list[dict[str, Any]], dict[str, torch.Tensor]]) -> None:
    """A change that is not meant to alter results keeps these; processors differ in the last digits only."""
    records = undisturbed[0]
    assert [record["train_loss"] for record in records] == pytest.approx([0.95256, 0.67556, 0.51918], rel=5e-3)
    assert [record["val_loss"] for record in records] == pytest.approx([0.73986, 0.54049, 0.43843], rel=5e-3)
    assert [record["learning_rate"] for record in records] == pytest.approx([0.00771890, 0.00454789, 0.00106841], rel=1e-5)


def outline(recipe: Recipe) -> tuple[Any, ...]:
    matrix = recipe.params.matrix
    return (
        recipe.index, recipe.case, recipe.start, None if matrix is None else matrix.tobytes(), recipe.params.steps,
        recipe.params.mirror,
    )


def recipes(seed: int, fold: int, stream: int, order: list[int], batch: int = 3) -> dict[int, tuple[Any, ...]]:
    wanted = Wanted(TrainSpec(seed=seed, batch_size=batch), CONFIGURATION, fold, 1, 0)
    made = make_loader(wanted, [Disc(i) for i in range(4)], torch.device("cpu"), 0).recipes
    return {i: outline(made.batch(stream, i // batch)[i % batch]) for i in order}


def test_samples_are_functions_of_seed_fold_and_number_alone() -> None:
    forward = recipes(3, 1, TRAINING, list(range(60)))
    assert recipes(3, 1, TRAINING, list(reversed(range(60)))) == forward
    assert recipes(3, 1, TRAINING, [41]) == {41: forward[41]}
    others = [recipes(4, 1, TRAINING, [41]), recipes(3, 0, TRAINING, [41]), recipes(3, 1, VALIDATION, [41])]
    assert all(other[41] != forward[41] for other in others)


def test_the_first_samples_are_the_stored_ones() -> None:
    """Case and start of each: a change of these means that every run in progress goes on with other samples."""
    drawn = [recipe[1:3] for recipe in recipes(3, 1, TRAINING, list(range(6))).values()]
    assert drawn == [(0, (3, 7, 4)), (3, (3, 6, 0)), (0, (1, 1, 6)), (3, (3, 2, 2)), (3, (1, 0, 1)), (2, (2, 6, 2))]
