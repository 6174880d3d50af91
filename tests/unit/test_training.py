"""The training loop: it learns, it stops on nonsense, and its state is all there is."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoseg.errors import AutosegError, PluginError, RunError
from autoseg.trainers.default import Job, Training
from autoseg.trainers.forward import worth_compiling
from autoseg.trainers.measure import measure_step
from autoseg.trainers.setbacks import Diverged
from autoseg.trainers.targets import Targets, count_overlap
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
    pytest.param({"optimizer": {"kind": "torch.optim:RMSprop", "lr": 0.001, "options": {"momentum": 0.5}}}, id="plug-in"),
    pytest.param({"ema": 0.9}, id="moving-average"),
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
    ({"augment": {"kind": "nonsense"}}, "unknown augment.* 'nonsense'; choose from .*default"),
    ({"augment": {"options": {"nonsense": 90}}}, "augment.*nonsense"),
    ({"sampler": {"kind": "curriculum"}}, "unknown sampler 'curriculum'; choose from balanced, reference"),
    ({"optimizer": {"kind": "lion"}}, "unknown optimizer 'lion'; choose from adamw, sgd, or give module:Name"),
    ({"optimizer": {"options": {"betas": [0.9, 0.99]}}}, "optimizer sgd cannot be made with options .*betas"),
    ({"loss": {"kind": "nonsense"}}, "unknown loss 'nonsense'"),
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
        assert count_overlap(logits, label, Targets.of(TWO)).tolist() == [[2, 0], [3, 0], [2, 1]]

    def test_ignored_voxels_do_not_count(self) -> None:
        label = torch.tensor([[[0, 1], [2, 3]]])
        logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1], [1, 1]]]), 3).movedim(-1, 1).float()
        assert count_overlap(logits, label, Targets.of(IGNORING)).tolist() == [[1, 0], [2, 0], [1, 1]]

    def test_regions_overlap(self) -> None:
        label = torch.tensor([[[0, 1], [2, 2]]])
        logits = torch.tensor([[[[1.0, 1], [1, -1]], [[-1, -1], [1, -1]]]])
        assert count_overlap(logits, label, Targets.of(REGIONS)).tolist() == [[2, 1], [3, 1], [3, 2]]


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


class TestMovingAverage:
    def test_it_is_the_average_by_hand_and_the_result(self) -> None:
        training = Training(job(ema=0.99, steps_per_epoch=4, epochs=1))
        name = next(iter(training.weights()))
        expected, seen = training.weights()[name].clone(), []
        for _ in training.run(lambda: seen.append(training.network.state_dict()[name].clone())):
            pass
        for updates, value in enumerate(seen):
            decay = (1 + updates) / (10 + updates)
            expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(training.weights()[name], expected)
        assert training.weights()[name].dtype == torch.float32 and not torch.equal(expected, seen[-1])

    def test_its_decay_grows_to_what_was_asked_for(self) -> None:
        training = Training(job(ema=0.2, steps_per_epoch=1, epochs=2))
        assert training.average is not None
        training.average.updates = 1000
        name = next(iter(training.weights()))
        before = training.weights()[name].clone()
        next(training.run())
        torch.testing.assert_close(training.weights()[name], 0.2 * before + 0.8 * training.network.state_dict()[name])

    def test_training_is_the_same_with_it_but_validation_judges_the_average(self) -> None:
        plain, averaged = (epochs(Training(job(ema=ema))) for ema in (0.0, 0.5))
        assert [r.train_loss for r in plain] == [r.train_loss for r in averaged]
        assert [r.val_loss for r in plain] != [r.val_loss for r in averaged]

    def test_a_restored_run_ends_with_the_same_bits(self) -> None:
        whole = Training(job(ema=0.9))
        expected = epochs(whole)
        first, second = Training(job(ema=0.9)), Training(job(ema=0.9))
        states = []
        next(first.run(lambda: states.append(copy.deepcopy(first.state()))))
        second.restore(states[1])
        assert [r.train_loss for r in epochs(second)] == [r.train_loss for r in expected]
        for name, value in whole.state().tensors.items():
            assert torch.equal(second.state().tensors[name], value), name

    def test_a_longer_run_begins_with_the_finished_weights(self) -> None:
        first, longer = Training(job(ema=0.9, epochs=1)), Training(job(ema=0.9, epochs=2))
        epochs(first)
        longer.start_from(first.weights(), 1)
        assert all(torch.equal(value, first.weights()[name]) for name, value in longer.weights().items())
        assert [r.epoch for r in epochs(longer)] == [1]


def spoiled(number: int) -> Squares:
    case = Squares(number)
    case.image[:] = np.nan
    return case


def spoil_losses(training: Training, steps: set[int], what: float = math.nan) -> None:
    """Let the loss of these steps not be finite."""
    loss = training.loss
    training.loss = lambda outputs, batch, progress: loss(outputs, batch, progress) * (  # type: ignore[method-assign]
        what if training.step in steps and torch.is_grad_enabled() else 1.0)


class TestStepsThatAreNotFinite:
    def test_one_is_skipped_named_and_counted_and_the_rest_goes_on(self) -> None:
        training = Training(job(steps_per_epoch=4))
        before: list[dict[str, torch.Tensor]] = []
        spoil_losses(training, {1})
        records = list(training.run(lambda: before.append({k: v.clone() for k, v in training.state().tensors.items()})))
        assert [r.skipped for r in records] == [1, 0] and all(math.isfinite(r.train_loss) for r in records)
        assert all(torch.equal(before[0][name], value) for name, value in before[1].items())
        name = "network." + next(iter(training.weights()))
        assert not torch.equal(before[2][name], before[1][name])
        assert len(training.notices) == 1
        expected = r"the loss became nan at step 1 on cases squares\d(, squares\d){3}; this step is skipped"
        assert re.match(expected, training.notices[0])

    def test_a_gradient_that_is_not_finite_is_skipped_too(self) -> None:
        training = Training(job())
        parameter = next(training.network.parameters())
        parameter.register_hook(lambda grad: grad * (math.inf if training.step == 2 else 1))
        records = epochs(training)
        assert [r.skipped for r in records] == [1, 0]
        assert "a gradient became NaN or infinite at step 2 on cases squares" in training.notices[0]
        assert all(value.isfinite().all() for value in training.weights().values())

    def test_an_image_that_is_not_finite_is_skipped_and_its_case_named_once_with_the_remedy(self) -> None:
        cases = [*(Squares(i) for i in range(59)), spoiled(59)]
        training = Training(job(cases=cases, steps_per_epoch=40, batch_size=1, epochs=2))
        records = epochs(training)
        assert sum(r.skipped for r in records) in range(1, 6) and training.setbacks.returns == 0
        assert all(value.isfinite().all() for value in training.weights().values())
        assert len(training.notices) == 1
        expected = "case squares59: its preprocessed image holds NaN .* remove .*, and give the same command"
        assert re.search(expected, training.notices[0])

    def test_many_images_that_are_not_finite_stop_the_run_with_their_names_and_finite_weights(self) -> None:
        training = Training(job(cases=[spoiled(0), Squares(1)], epochs=20))
        with pytest.raises(RunError, match=r"images hold NaN or infinite values: squares0 .*give the same command again"):
            epochs(training)
        assert all(value.isfinite().all() for value in training.weights().values())
        assert training.step < 20 * 3

    def test_three_in_a_row_go_back_to_the_last_good_epoch_with_half_the_learning_rate(self) -> None:
        training = Training(job(steps_per_epoch=4, epochs=3))
        spoil_losses(training, {5, 6, 7}, math.inf)
        good: dict[int, dict[str, torch.Tensor]] = {}
        weights = lambda: {name: value.clone() for name, value in training.weights().items()}  # noqa: E731
        records = list(training.run(lambda: good.setdefault(training.step, weights())))
        assert [r.skipped for r in records] == [0, 3, 0]
        assert all(torch.equal(good[8][name], value) for name, value in good[4].items())
        assert not all(torch.equal(good[7][name], value) for name, value in good[4].items())
        usual = epochs(Training(job(steps_per_epoch=4, epochs=3)))
        assert records[2].learning_rate == usual[2].learning_rate / 2 and records[0].learning_rate == usual[0].learning_rate
        assert "going back to the weights of the last good epoch" in training.notices[-1]

    def test_when_that_does_not_help_it_stops_with_a_diagnosis(self) -> None:
        training = Training(job(steps_per_epoch=4, epochs=9))
        spoil_losses(training, {4, 5, 6, 20, 21, 22})
        told = r"the loss became nan at step 22 on cases .* even after going back.* \(\d\).*optimizer.lr"
        with pytest.raises(Diverged, match=told):
            epochs(training)

    def test_a_run_restored_in_between_decides_the_same(self) -> None:
        spec = {"steps_per_epoch": 4, "epochs": 3, "ema": 0.5}
        bad = {2, 5, 6, 7}
        whole = Training(job(**spec))
        spoil_losses(whole, bad)
        expected = epochs(whole)
        for stop in (3, 6, 7, 8):
            first, second = Training(job(**spec)), Training(job(**spec))
            spoil_losses(first, bad)
            spoil_losses(second, bad)
            states = []
            for _ in first.run(lambda first=first, states=states: states.append(copy.deepcopy(first.state()))):  # type: ignore[misc]
                pass
            second.restore(states[stop - 1])
            begin = second.epoch
            assert [r.train_loss for r in epochs(second)] == [r.train_loss for r in expected[begin:]]
            for name, value in whole.state().tensors.items():
                assert torch.equal(second.state().tensors[name], value), (stop, name)

    def test_weights_that_a_step_itself_blew_up_are_left_behind(self) -> None:
        training = Training(job(steps_per_epoch=4, epochs=3, gradient_clip=1e9, optimizer={"kind": "adamw", "lr": 1e30}))
        with pytest.raises(Diverged, match="the loss became"):
            epochs(training)
        assert training.setbacks.returns == 1


class TestCompilation:
    """On a CPU nothing is compiled unless a test says so."""

    @pytest.fixture
    def forced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("autoseg.trainers.default.worth_compiling", lambda device, wanted, steps: True)

    def test_it_is_for_cuda_and_runs_that_are_long_enough(self) -> None:
        cuda, cpu = torch.device("cuda"), torch.device("cpu")
        assert worth_compiling(cuda, "auto", 1000)
        assert not worth_compiling(cuda, "auto", 999)
        assert not worth_compiling(cuda, "never", 5000)
        assert not worth_compiling(cpu, "auto", 5000)

    def test_a_compiled_network_trains_the_same_weights_under_the_same_names(
        self, forced: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []

        def wrap(network: torch.nn.Module, **options: Any) -> Any:
            class Wrapped(torch.nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self._orig_mod = network

                def forward(self, *given: Any) -> Any:
                    calls.append(1)
                    return self._orig_mod(*given)

            return Wrapped()

        monkeypatch.setattr(torch, "compile", wrap)
        training = Training(job())
        epochs(training)
        monkeypatch.undo()
        plain = Training(job())
        epochs(plain)
        assert len(calls) == 6 and training.forward.compiled and not training.notices
        assert list(training.state().tensors) == list(plain.state().tensors)
        assert all(torch.equal(value, plain.weights()[name]) for name, value in training.weights().items())

    @pytest.mark.parametrize("moment", ["at once", "forward", "backward", "later"])
    def test_whatever_fails_the_run_goes_on_as_if_it_had_not_been_tried(
        self, moment: str, forced: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Fails(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
                raise ImportError("no compiler here\nsecond line")

        count = [0]

        def wrap(network: torch.nn.Module, **options: Any) -> Any:
            def call(image: torch.Tensor, heads: int) -> list[torch.Tensor]:
                count[0] += 1
                if moment == "forward" or (moment == "later" and count[0] == 4):
                    raise ImportError("no compiler here")
                outputs = network(image, heads)
                return [Fails.apply(output) for output in outputs] if moment == "backward" else outputs  # type: ignore[no-untyped-call]

            if moment == "at once":
                raise ImportError("no compiler here")
            return call

        monkeypatch.setattr(torch, "compile", wrap)
        training = Training(job())
        epochs(training)
        monkeypatch.undo()
        plain = Training(job())
        epochs(plain)
        assert not training.forward.compiled and training.forward.failure == "no compiler here"
        assert training.notices == (
            [] if moment == "at once" else ["training goes on without compilation, which failed: no compiler here"])
        assert all(torch.equal(value, plain.weights()[name]) for name, value in training.weights().items())

    def test_growing_patches_are_compiled_only_at_their_planned_size(self, forced: None, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled: list[tuple[int, ...]] = []

        def wrap(network: torch.nn.Module, **options: Any) -> Any:
            return lambda image, heads: compiled.append(tuple(image.shape[2:])) or network(image, heads)

        monkeypatch.setattr(torch, "compile", wrap)
        growth = {"kind": "grow", "options": {"stages": 2}}
        training = Training(job(patch=(32, 32), growth=growth, steps_per_epoch=4))
        seen: list[tuple[int, ...]] = []
        training.network.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape[2:])))
        epochs(training)
        assert len(set(seen)) > 1 and set(compiled) == {(32, 32)}

    def test_a_process_may_compile_more_shapes_than_torch_would(self) -> None:
        from torch._dynamo import config

        from autoseg.trainers.forward import COMPILED_SHAPES, Forward

        Forward(torch.nn.Identity(), True)
        limits = [getattr(config, name, COMPILED_SHAPES) for name in ("recompile_limit", "cache_size_limit")]
        assert min(limits) >= COMPILED_SHAPES

    def test_a_users_error_in_the_loss_is_not_called_a_failed_compilation(
        self, forced: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def loss(*given: Any) -> torch.Tensor:
            calls.append(1)
            raise PluginError("spacing needs 2 positive numbers")

        calls: list[int] = []
        monkeypatch.setattr(torch, "compile", lambda network, **options: network)
        training = Training(job())
        training.loss = loss  # type: ignore[method-assign]
        with pytest.raises(PluginError, match="spacing needs 2"):
            epochs(training)
        assert len(calls) == 1 and training.forward.compiled and not training.notices

    def test_errors_of_an_uncompiled_network_are_not_swallowed(self) -> None:
        training = Training(job())
        training.network.forward = lambda *given: 1 / 0  # type: ignore[method-assign, assignment]
        with pytest.raises(ZeroDivisionError):
            epochs(training)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_loss(threads: int) -> None:
    rows = [epochs(Training(job(threads=count))) for count in (0, threads)]
    assert [(r.train_loss, r.val_loss) for r in rows[0]] == [(r.train_loss, r.val_loss) for r in rows[1]]
