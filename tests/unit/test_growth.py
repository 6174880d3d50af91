"""Growing patches: legal sizes at every step, the planned one at the end, and a run that goes on as if undisturbed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from autoseg.errors import PluginError
from autoseg.trainers.default import Job, Training
from autoseg.trainers.growth import Phase, Sizes, divisors, make_sizes, patch_at, patch_sizes
from autoseg.trainers.loading import Wanted, make_loader
from autoseg.trainers.sampling import TRAINING, VALIDATION, WIDE
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration
from autoseg.types.run import GrowthSpec, TrainSpec

PATCHES = [((40, 56, 40), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))), ((10, 64, 48), ((1, 1, 1), (1, 2, 2), (2, 2, 2))),
           ((64, 48), ((1, 1), (2, 2), (2, 2))), ((8, 8, 16), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)))]


def configuration(patch: tuple[int, ...] = PATCHES[0][0], strides: tuple[tuple[int, ...], ...] = PATCHES[0][1]) -> Configuration:
    dims, stages = len(patch), len(strides)
    return Configuration.model_validate({
        "patch_size": patch, "batch_size": 2, "spacing": (1.0,) * dims, "median_shape": patch, "strides": strides,
        "kernel_sizes": ((3,) * dims,) * stages, "features_per_stage": (4,) * stages, "blocks_per_stage": (1,) * stages,
        "decoder_blocks_per_stage": (1,) * (stages - 1), "batch_dice": False, "normalization": ("NoNormalization",),
        "use_mask_for_norm": (False,),
    })


def growing(**options: Any) -> GrowthSpec:
    return GrowthSpec(kind="grow", options=options)


@pytest.mark.parametrize(("patch", "strides"), PATCHES)
@pytest.mark.parametrize("options", [{}, {"stages": 3}, {"stages": 1}, {"start": 0.5, "batch": "inverse"}, {"batch": 0.5}])
def test_every_size_is_one_that_the_network_can_take_and_the_last_is_the_planned_one(
    patch: tuple[int, ...], strides: tuple[tuple[int, ...], ...], options: dict[str, Any]
) -> None:
    one = configuration(patch, strides)
    sizes = make_sizes(growing(**options), one, 2, 1000)
    for phase in sizes.phases:
        one.model_copy(update={"patch_size": phase.patch}).model_validate(
            {**one.model_dump(), "patch_size": phase.patch})  # the plan's own rules
    assert sizes.phases[-1].patch == patch and sizes.phases[-1].batch == 2 and sizes.phases[0].begin == 0
    voxels = [math.prod(phase.patch) for phase in sizes.phases]
    assert voxels == sorted(voxels) and len(set(voxels)) == len(voxels)
    for a, b in itertools.pairwise(sizes.phases):
        assert all(x <= y for x, y in zip(a.patch, b.patch, strict=True)) and a.batch >= b.batch


def test_it_begins_with_two_voxels_at_the_lowest_stage_and_one_axis_grows_at_a_time() -> None:
    sizes = patch_sizes(configuration())
    assert divisors(configuration()) == (8, 8, 8)
    assert sizes[0] == (16, 16, 16) and sizes[-1] == (40, 56, 40) and len(sizes) == 1 + 3 + 5 + 3
    assert all(sum(b) - sum(a) == 8 for a, b in itertools.pairwise(sizes))
    assert all(abs((size[0] - 16) / 24 - (size[1] - 16) / 40) <= 0.34 for size in sizes)  # axes arrive together


def test_stages_are_as_many_as_wanted_and_as_far_apart_as_can_be() -> None:
    assert patch_sizes(configuration(), stages=3) == [(16, 16, 16), (32, 32, 32), (40, 56, 40)]
    assert patch_sizes(configuration(), stages=1) == [(40, 56, 40)]
    assert patch_sizes(configuration(), start=0.6, stages=2) == [(24, 32, 24), (40, 56, 40)]


def test_sizes_are_a_function_of_the_fraction_of_the_run() -> None:
    spec = growing(stages=3, until=0.5)
    found = [patch_at(spec, configuration(), fraction) for fraction in (0.0, 0.24, 0.25, 0.49, 0.5, 1.0)]
    assert [patch[1] for patch, _ in found] == [16, 16, 32, 32, 56, 56] and {batch for _, batch in found} == {2}
    for total in (10, 1000, 250_000):
        sizes = make_sizes(spec, configuration(), 2, total)
        assert [sizes.at(round(f * total)).patch[1] for f in (0.0, 0.1, 0.3, 0.5, 0.9)] == [16, 16, 32, 56, 56]
        assert sizes.at(total + 7).patch == (40, 56, 40)
        assert [sizes.first_step(phase) for phase in sizes.phases] == [0, math.ceil(total / 4), total // 2]


def test_the_batch_grows_as_the_patch_shrinks_or_stays() -> None:
    voxels = {phase.patch: math.prod(phase.patch) * phase.batch
              for phase in make_sizes(growing(batch="inverse"), configuration(), 4, 100).phases}
    planned = 4 * 40 * 56 * 40
    assert all(planned - math.prod(patch) < total <= planned for patch, total in voxels.items())
    assert {phase.batch for phase in make_sizes(growing(), configuration(), 4, 100).phases} == {4}
    between = make_sizes(growing(batch=0.5, stages=2), configuration(), 4, 100).phases[0].batch
    assert between == int(4 * math.sqrt(40 * 56 * 40 / 16**3))


def test_the_work_of_a_run_is_told_as_a_share() -> None:
    assert make_sizes(GrowthSpec(), configuration(), 2, 10).work == 1
    two = Sizes((Phase(0.0, (16, 16, 16), 2), Phase(0.5, (32, 16, 16), 2)), 10)
    assert two.work == pytest.approx(0.75)
    assert [two.mean_steps(step) for step in (0, 5, 10)] == pytest.approx([0, 10 / 3, 10])
    assert 0.4 < make_sizes(growing(), configuration(), 2, 1000).work < 0.55
    assert make_sizes(growing(batch="inverse"), configuration(), 7, 1000).work == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("spec", "message"), [
    (GrowthSpec(kind="shrink"), "unknown growth 'shrink'; choose from grow, none, or give module:Name"),
    (GrowthSpec(options={"start": 1}), "growth 'none' does not take the options"),
    (growing(speed=1), "growth 'grow' does not take the options"),
    (growing(batch="double"), "batch must be constant, inverse or a number from 0 to 1, found 'double'"),
    (growing(batch=2.0), "batch must be"),
    (growing(until=1.5), "start and until from 0 to 1"),
    (growing(stages=0), "stages from 1"),
])
def test_what_makes_no_sense_is_refused(spec: GrowthSpec, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        make_sizes(spec, configuration(), 2, 100)


def test_a_plug_ins_phases_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from autoseg.trainers import growth

    good = Phase(0.0, (16, 16, 16), 2)
    for phases in ([], [Phase(0.5, (16, 16, 16), 2)], [Phase(0.0, (12, 16, 16), 2)], [Phase(0.0, (64, 64, 64), 2)],
                   [Phase(0.0, (8, 8, 8), 2)], [good, Phase(0.5, (16, 16, 16), 0)], [Phase(0.0, (16, 16), 2)]):
        monkeypatch.setitem(growth.GROWTHS, "own", lambda *given, phases=phases: phases)  # type: ignore[arg-type]
        with pytest.raises(PluginError, match="must give phases from fraction 0 on, with patches in multiples of"):
            make_sizes(GrowthSpec(kind="own"), configuration(), 2, 100)


class Cube:
    """A case of noise with a label in its middle."""

    def __init__(self, number: int) -> None:
        self.name, self.shape = f"cube{number}", (40, 40, 40)
        self.image = np.random.default_rng(number).normal(size=(1, 40, 40, 40)).astype(np.float32)
        self.label = np.zeros(self.shape, np.int16)
        self.label[15:25, 15:25, 15:25] = 1
        self.locations = {1: np.argwhere(self.label == 1)}

    def read_image(self, box: tuple[slice, slice, slice]) -> Any:
        return self.image[(slice(None), *box)]

    def read_label(self, box: tuple[slice, slice, slice]) -> Any:
        return self.label[box]


SMALL = configuration((32, 32, 32), PATCHES[1][1])


def batches(growth: GrowthSpec, first: int, stop: int, stream: int = TRAINING, threads: int = 0, epochs: int = 2) -> list[Any]:
    spec = TrainSpec(epochs=epochs, steps_per_epoch=6, growth=growth)
    loader = make_loader(Wanted(spec, SMALL, 0, 1, 0), [Cube(i) for i in range(3)], torch.device("cpu"), threads)
    try:
        return list(loader.batches(stream, first, stop))
    finally:
        loader.close()


@pytest.mark.parametrize("batch", ["constant", "inverse"])
def test_batches_have_the_sizes_of_their_step_whatever_the_threads_and_restarts(batch: str) -> None:
    spec = growing(batch=batch, stages=3)
    whole = batches(spec, 0, 12)
    shapes = [tuple(b.image.shape) for b in whole]
    assert shapes[0][2:] == (4, 8, 8) and shapes[-1] == (2, 1, 32, 32, 32) and shapes[0][0] == (2 if batch == "constant" else 256)
    for other in (batches(spec, 0, 12, threads=2), [*batches(spec, 0, 5), *batches(spec, 5, 12, threads=1)]):
        assert all(torch.equal(a.image, b.image) and torch.equal(a.label, b.label) for a, b in zip(whole, other, strict=True))
    assert all(tuple(b.label.shape) == tuple(s[i] for i in (0, 2, 3, 4)) for b, s in zip(whole, shapes, strict=True))


def test_validation_patches_are_the_planned_ones() -> None:
    assert {tuple(b.image.shape) for b in batches(growing(), 0, 3, VALIDATION)} == {(2, 1, 32, 32, 32)}


def test_the_last_third_of_each_batch_holds_foreground_whatever_its_size() -> None:
    for batch in batches(growing(batch="inverse", stages=4), 0, 12):
        size = len(batch.label)
        forced = batch.label[round(size * 0.67):]
        assert bool((forced.flatten(1) > 0).any(1).all())


def test_samples_are_numbered_by_batch_and_place() -> None:
    spec = TrainSpec(epochs=2, steps_per_epoch=6, growth=growing(batch="inverse", stages=3))
    one = make_loader(Wanted(spec, SMALL, 0, 1, 0), [Cube(0)], torch.device("cpu"), 0).recipes
    assert [r.index for r in one.batch(TRAINING, 3)][:3] == [3 * WIDE, 3 * WIDE + 1, 3 * WIDE + 2]
    constant = TrainSpec(epochs=2, steps_per_epoch=6, growth=growing(stages=3))
    other = make_loader(Wanted(constant, SMALL, 0, 1, 0), [Cube(0)], torch.device("cpu"), 0).recipes
    assert [r.index for r in other.batch(TRAINING, 3)] == [6, 7]
    assert [r.index for r in one.batch(VALIDATION, 3)] == [6, 7]


def test_turns_of_forced_samples_are_counted_over_batches_of_all_sizes() -> None:
    spec = TrainSpec(epochs=2, steps_per_epoch=6, growth=growing(batch="inverse", stages=4))
    one = make_loader(Wanted(spec, SMALL, 0, 1, 0), [Cube(0)], torch.device("cpu"), 0).recipes
    before = 0
    for number in range(14):
        assert one._forced_before(TRAINING, number) == before
        batch = one.phase(TRAINING, number).batch
        before += batch - round(batch * 0.67)


TINY = configuration((16, 16, 16), PATCHES[1][1])


def losses(growth: GrowthSpec, threads: int, length: int | None = None, stop: int | None = None) -> tuple[list[float], list[Any]]:
    """Losses of a run of two epochs of three steps, and the shapes of its batches; after the first it may get another length.

    After `stop` steps it is taken up by another training.
    """
    spec = TrainSpec(epochs=2, steps_per_epoch=3, val_steps=1, growth=growth)
    cases: Any = [Cube(i) for i in range(3)]
    labels = Labels(foreground=(Label(name="cube", value=1),))
    job = Job(TINY, labels, 1, spec, 0, cases, cases, torch.device("cpu"), "fp32", threads)
    found: list[float] = []
    shapes: list[Any] = []

    def watched() -> Training:
        training = Training(job)
        train_step = training.train_step

        def step(batch: Any) -> float:
            shapes.append(tuple(batch.image.shape))
            found.append(train_step(batch))
            return found[-1]

        training.train_step = step  # type: ignore[method-assign]
        return training

    training = watched()
    if stop is not None:
        class Stopped(Exception):
            pass

        def after_step() -> None:
            if training.step == stop:
                raise Stopped

        with pytest.raises(Stopped):
            list(training.run(after_step))
        first, training = training, watched()
        training.restore(first.state())
    for record in training.run():
        if length is not None and record.epoch == 0:
            training.set_length(length)
    return found, shapes


def test_a_run_with_growing_patches_goes_on_after_an_interruption_as_if_there_were_none() -> None:
    spec = growing(batch="inverse", stages=3, start=0.4)
    whole, shapes = losses(spec, 0)
    assert shapes[0][2:] == (6, 8, 8) and shapes[-1] == (2, 1, 16, 16, 16) and shapes[0][0] > 2
    assert losses(spec, 2) == (whole, shapes) == losses(spec, 1, stop=2)


def test_a_new_length_changes_sizes_at_once_however_much_was_read_ahead() -> None:
    spec = growing(stages=3, start=0.4)
    found, shapes = losses(spec, 0, length=4)
    assert len(found) == 12 and losses(spec, 3, length=4) == (found, shapes)
    assert [s[2] for s in shapes] == [s[2] for s in losses(spec, 0)[1]][:3] + [
        patch_at(spec, TINY, step / 12)[0][0] for step in range(3, 12)]


def test_batches_that_grow_as_patches_shrink_go_through_the_network_at_once() -> None:
    spec = TrainSpec(epochs=2, steps_per_epoch=3, growth=growing(batch="inverse", stages=3, start=0.4))
    cases: Any = [Cube(i) for i in range(3)]
    job = Job(TINY, Labels(foreground=(Label(name="cube", value=1),)), 1, spec, 0, cases, [], torch.device("cpu"), "fp32", 0)
    training = Training(job)
    seen: list[int] = []
    training.network.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    sizes = make_sizes(spec.growth, TINY, 2, 6)
    for _ in training.run():
        pass
    assert seen == [sizes.at(step).batch for step in range(6)]
