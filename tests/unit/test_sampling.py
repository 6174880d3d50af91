"""Sampling: recipes are pure functions of seed, fold and number; crops hold what the case holds, and padding elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoseg.contracts import Batch
from autoseg.errors import RunError
from autoseg.trainers.augment import AugmentParams, DefaultAugmentation, NoAugmentation, source_box
from autoseg.trainers.growth import Phase, Sizes
from autoseg.trainers.loading import Loader, read_crop
from autoseg.trainers.sampling import TRAINING, VALIDATION, Recipe, Recipes, make_sampler
from autoseg.types.run import SamplerSpec


@dataclass
class FakeCase:
    name: str
    image_czyx: NDArray[np.float32]
    label_zyx: NDArray[np.int16]
    broken: bool = False
    reads: list[tuple[slice, slice, slice]] = field(default_factory=list)
    annotated: NDArray[np.integer] | None = None
    previous_zyx: NDArray[np.int16] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = self.label_zyx.shape
        return z, y, x

    @property
    def locations(self) -> Mapping[int, NDArray[np.integer]]:
        found = {int(v): np.argwhere(self.label_zyx == v) for v in np.unique(self.label_zyx) if v > 0}
        return found if self.annotated is None else {0: self.annotated, **found}

    def read_image(self, box: tuple[slice, slice, slice]) -> NDArray[np.float32]:
        if self.broken:
            raise OSError("gone")
        self.reads.append(box)
        return self.image_czyx[(slice(None), *box)]

    def read_label(self, box: tuple[slice, slice, slice]) -> NDArray[np.int16]:
        return self.label_zyx[box]

    def read_previous(self, box: tuple[slice, slice, slice]) -> NDArray[np.int16]:
        assert self.previous_zyx is not None, "nobody needs it"
        return self.previous_zyx[box]


def case(name: str, shape: tuple[int, int, int], seed: int = 0, channels: int = 1, labels: int = 2) -> FakeCase:
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.int16)
    for value in range(1, labels + 1):
        label[tuple(int(rng.integers(s)) for s in shape)] = value
    return FakeCase(name, rng.normal(size=(channels, *shape)).astype(np.float32), label)


def recipes(
    cases: Sequence[FakeCase], patch: tuple[int, int, int] = (8, 8, 8), batch: int = 2, foreground: float = 0.33, seed: int = 0,
    fold: int = 0, channels: int = 1, labels: int = 0, kind: str = "reference",
) -> Recipes:
    flat = patch[0] == 1
    axes = (1, 2) if flat else (0, 1, 2)
    planned = patch[1:] if flat else patch
    augmentation = DefaultAugmentation(patch, channels, flat, math.radians(30), axes, labels)
    plain = NoAugmentation(patch, channels, flat, 0.0, (), labels)
    sizes = Sizes((Phase(0.0, planned, batch),), 1000)
    sampler = make_sampler(SamplerSpec(kind=kind), cases)
    return Recipes(cases, sampler, {planned: augmentation}, plain, sizes, foreground, seed, fold)


def recipe(one: Recipes, stream: int, index: int) -> Recipe:
    size = one.sizes.phases[0].batch
    found = one.batch(stream, index // size)[index % size]
    assert found.index == index
    return found


def same(a: Recipe, b: Recipe) -> bool:
    matrices = (a.params.matrix, b.params.matrix)
    equal = all(m is None for m in matrices) or (None not in [type(m) for m in matrices] and np.array_equal(*matrices))  # type: ignore[arg-type]
    return equal and (a.index, a.case, a.start, a.params.steps, a.params.mirror) == (
        b.index, b.case, b.start, b.params.steps, b.params.mirror)


THREE = [case(f"case{i}", (20, 22, 24), i) for i in range(3)]


def test_a_recipe_does_not_depend_on_what_was_drawn_before() -> None:
    forward = [recipe(recipes(THREE), TRAINING, i) for i in range(40)]
    one = recipes(THREE)
    backward = [recipe(one, TRAINING, i) for i in reversed(range(40))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("change", [{"seed": 1}, {"fold": 1}])
def test_another_seed_or_fold_gives_other_samples(change: dict[str, int]) -> None:
    a = [recipe(recipes(THREE), TRAINING, i).start for i in range(20)]
    assert a != [recipe(recipes(THREE, **change), TRAINING, i).start for i in range(20)]  # type: ignore[arg-type]


def test_validation_samples_are_others_and_are_not_augmented() -> None:
    one = recipes(THREE)
    training, validation = ([recipe(one, stream, i) for i in range(60)] for stream in (TRAINING, VALIDATION))
    assert [r.start for r in training] != [r.start for r in validation]
    assert all(same(r, dataclasses.replace(r, params=AugmentParams())) for r in validation)
    assert any(r.params.matrix is not None for r in training) and any(r.params.steps for r in training)


def test_cases_are_drawn_uniformly() -> None:
    one = recipes(THREE)
    counts = Counter(recipe(one, VALIDATION, i).case for i in range(1500))
    assert all(count == pytest.approx(500, abs=80) for count in counts.values()) and len(counts) == 3


@pytest.mark.parametrize(("batch", "share", "forced"), [
    (2, 0.33, {1}), (3, 0.33, {2}), (7, 0.33, {5, 6}), (12, 0.33, {8, 9, 10, 11}), (4, 0.0, set()), (3, 1.0, {0, 1, 2}),
])
def test_the_last_third_of_each_batch_is_centred_on_foreground(batch: int, share: float, forced: set[int]) -> None:
    corner = case("corner", (60, 60, 60), labels=0)
    corner.label_zyx[30, 31, 32] = 1
    one = recipes([corner], batch=batch, foreground=share)
    centred = {
        k for number in range(12) for k, drawn in enumerate(one.batch(VALIDATION, number)) if drawn.start == (26, 27, 28)
    }
    assert centred == forced


def test_a_forced_patch_holds_a_voxel_of_its_class_and_classes_are_drawn_equally() -> None:
    one_case = case("many", (30, 30, 30), labels=0)
    one_case.label_zyx[2:12, 2:12, 2:12] = 1  # a thousand voxels
    one_case.label_zyx[28, 29, 27] = 2  # and one
    one = recipes([one_case], patch=(6, 6, 6), batch=1, foreground=1.0)
    holds_rare = 0
    for i in range(400):
        start = recipe(one, VALIDATION, i).start
        patch = one_case.label_zyx[tuple(slice(max(s, 0), s + 6) for s in start)]
        assert patch.any()
        holds_rare += bool((patch == 2).any())
    assert holds_rare == pytest.approx(200, abs=45)


def test_a_forced_patch_runs_past_the_far_border_but_not_past_the_near_one() -> None:
    for place, start in (((29, 29, 29), (26, 26, 26)), ((0, 0, 0), (0, 0, 0)), ((2, 15, 29), (0, 12, 26))):
        one_case = case("edge", (30, 30, 30), labels=0)
        one_case.label_zyx[place] = 1
        assert recipe(recipes([one_case], patch=(6, 6, 6), batch=1, foreground=1.0), VALIDATION, 0).start == start


def test_a_case_without_foreground_is_sampled_anywhere() -> None:
    empty = case("empty", (20, 20, 20), labels=0)
    one = recipes([empty], batch=1, foreground=1.0)
    starts = np.array([recipe(one, VALIDATION, i).start for i in range(200)])
    assert starts.min() == 0 and starts.max() == 12


def test_free_patches_fill_the_case_and_stay_inside_it() -> None:
    one = recipes([case("free", (20, 10, 8))], batch=1, foreground=0.0)
    starts = np.array([recipe(one, VALIDATION, i).start for i in range(400)])
    assert starts.min(0).tolist() == [0, 0, 0] and starts.max(0).tolist() == [12, 2, 0]


def test_a_case_smaller_than_the_patch_is_centred_in_it() -> None:
    one = recipes([case("small", (4, 5, 30), labels=0)], batch=1, foreground=0.0)
    starts = np.array([recipe(one, VALIDATION, i).start for i in range(50)])
    assert (starts[:, :2] == (-2, -1)).all() and starts[:, 2].min() >= 0 and starts[:, 2].max() <= 22


def test_with_an_ignore_label_free_patches_are_centred_on_annotated_voxels() -> None:
    one_case = case("sparse", (40, 40, 40), labels=0)
    one_case.annotated = np.array([[20, 21, 22]])
    one = recipes([one_case], batch=2)
    assert {recipe(one, VALIDATION, i).start for i in range(10)} == {(16, 17, 18)}


def test_nothing_is_read_to_draw_a_recipe() -> None:
    one_case = case("unread", (20, 20, 20))
    one = recipes([one_case])
    for i in range(20):
        recipe(one, TRAINING, i)
    assert one_case.reads == []


@pytest.mark.parametrize("shape", [(20, 22, 24), (5, 30, 7)])
@pytest.mark.parametrize("patch", [(8, 8, 8), (1, 12, 12)])
def test_a_crop_is_the_case_padded_with_zero_and_minus_one(shape: tuple[int, int, int], patch: tuple[int, int, int]) -> None:
    one_case = case("padded", shape, channels=2)
    one = recipes([one_case], patch, channels=2)
    far = 80
    image = np.pad(one_case.image_czyx, [(0, 0)] + [(far, far)] * 3)
    label = np.pad(one_case.label_zyx, far, constant_values=-1)
    for i in range(60):
        drawn = recipe(one, TRAINING, i)
        crop = read_crop(one_case, drawn)
        low, high = source_box(drawn.start, patch, drawn.params.matrix)
        box = tuple(slice(a + far, b + far) for a, b in zip(low, high, strict=True))
        assert np.array_equal(crop.image_czyx, image[(slice(None), *box)])
        assert np.array_equal(crop.label_zyx, label[box])
        middle = np.asarray(drawn.start) + (np.asarray(patch) - 1) / 2
        np.testing.assert_allclose(crop.centre + np.asarray(low), middle)
    assert all(0 <= s.start <= s.stop <= n for box in one_case.reads for s, n in zip(box, shape, strict=True))


def test_a_box_wholly_outside_the_case_is_all_padding() -> None:
    one_case = case("outside", (6, 6, 6))
    crop = read_crop(one_case, Recipe(0, 0, (10, -9, 2), AugmentParams(), NoAugmentation((4, 4, 4), 1, False, 0.0, ())))
    assert crop.image_czyx.shape == (1, 4, 4, 4) and not crop.image_czyx.any() and (crop.label_zyx == -1).all()


def load(
    threads: int, stream: int = TRAINING, first: int = 0, stop: int = 6, patch: tuple[int, int, int] = (8, 8, 8)
) -> list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]:
    loader = Loader(recipes(THREE, patch), (False,), torch.device("cpu"), threads, 2 if patch[0] == 1 else 3)
    try:
        return [(b.image, b.label, b.cases) for b in loader.batches(stream, first, stop)]
    finally:
        loader.close()


def test_threads_change_nothing_and_going_on_repeats_nothing() -> None:
    whole = load(0)
    assert len(whole) == 6 and len({name for _, _, names in whole for name in names}) == 3
    for other in (load(1), load(3), [*load(0, stop=2), *load(1, first=2)]):
        for (image, label, names), (image2, label2, names2) in zip(whole, other, strict=True):
            assert torch.equal(image, image2) and torch.equal(label, label2) and names == names2


def test_batches_have_the_promised_shapes_and_types() -> None:
    image, label, names = load(0, stop=1)[0]
    assert image.shape == (2, 1, 8, 8, 8) and image.dtype == torch.float32
    assert label.shape == (2, 8, 8, 8) and label.dtype == torch.int64 and label.min() == 0
    assert len(names) == 2
    image, label, _ = load(0, stop=1, patch=(1, 8, 8))[0]
    assert image.shape == (2, 1, 8, 8) and label.shape == (2, 8, 8)


def test_loading_leaves_the_cases_as_they_are() -> None:
    before = [(c.image_czyx.copy(), c.label_zyx.copy()) for c in THREE]
    load(0, stop=15)
    for one, (image, label) in zip(THREE, before, strict=True):
        assert np.array_equal(one.image_czyx, image) and np.array_equal(one.label_zyx, label)


def test_where_the_device_lacks_memory_beside_a_step_the_batch_is_made_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(recipes(THREE), (False,), torch.device("cpu"), 0, 3)
    expected = next(iter(loader.batches(TRAINING, 0, 1)))
    finish, failed = loader._finish, []

    def failing(made: Any) -> Any:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return finish(made)

    monkeypatch.setattr(loader, "_finish", failing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    reading: Future[Any] = Future()
    reading.set_result(loader._read(TRAINING, 0, None))
    batch = loader._received(loader._send(reading))
    assert failed and torch.equal(batch.image, expected.image) and batch.cases == expected.cases


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_while_reading_reaches_the_caller(threads: int) -> None:
    broken = case("broken", (20, 20, 20))
    broken.broken = True
    loader = Loader(recipes([broken]), (False,), torch.device("cpu"), threads, 3)
    with pytest.raises(RunError, match="case broken cannot be read any more: gone"):
        next(iter(loader.batches(TRAINING, 0, 3)))
    loader.close()


def test_stopping_early_leaves_no_thread_behind() -> None:
    import threading

    loader = Loader(recipes(THREE), (False,), torch.device("cpu"), 2, 3)
    batches = loader.batches(TRAINING, 0, 1000)
    next(iter(batches))
    loader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


def with_previous(patch: tuple[int, int, int], labels: int = 2) -> Recipes:
    """Cases whose previous segmentation is their label."""
    cases = []
    for i in range(3):
        one = case(f"case{i}", (20, 7, 24), i)
        one.label_zyx[5:15, 1:6, 4:12], one.label_zyx[8:12, 2:7, 8:20] = 1, 2
        cases.append(dataclasses.replace(one, previous_zyx=one.label_zyx))
    return recipes(cases, patch, labels=labels)


@pytest.mark.parametrize("patch", [(8, 8, 8), (1, 12, 12)])
def test_the_previous_segmentation_is_read_and_padded_with_background(patch: tuple[int, int, int]) -> None:
    one = with_previous(patch)
    for i in range(40):
        drawn = recipe(one, TRAINING, i)
        crop = read_crop(one.cases[drawn.case], drawn)
        assert crop.previous_zyx is not None and torch.equal(crop.previous_zyx, crop.label_zyx.clamp_min(0))


@pytest.mark.parametrize("patch", [(8, 8, 8), (1, 12, 12)])
@pytest.mark.parametrize("threads", [0, 2])
def test_the_network_gets_it_as_one_channel_per_label_and_only_training_alters_it(
    patch: tuple[int, int, int], threads: int
) -> None:
    loader = Loader(with_previous(patch), (False,), torch.device("cpu"), threads, 2 if patch[0] == 1 else 3)
    try:
        for batch in loader.batches(VALIDATION, 0, 10):
            assert batch.image.shape == (2, 3, *[p for p in patch if p > 1])
            assert torch.equal(batch.image[:, 1:], torch.stack([batch.label == 1, batch.label == 2], 1).float())
        altered = 0
        for number, batch in enumerate(loader.batches(TRAINING, 0, 20)):
            for k in range(2):
                params = recipe(loader.recipes, TRAINING, 2 * number + k).params
                expected = torch.stack([batch.label[k] == 1, batch.label[k] == 2]).float()
                share = float((batch.image[k, 1:] == expected).float().mean())
                if not params.morphs and not params.removals:
                    assert share == 1 if params.matrix is None else share > 0.97  # labels know an outside, that is rotated too
                altered += share < 0.97
            assert set(batch.image[:, 1:].unique().tolist()) <= {0.0, 1.0} and batch.image[:, 1:].sum(1).max() <= 1
        assert 3 < altered < 25
    finally:
        loader.close()


def test_each_rank_reads_its_own_part_of_every_batch_and_together_they_read_all_of_it() -> None:
    def read(part: Callable[[int], slice] | None) -> list[Batch]:
        loader = Loader(recipes(THREE, batch=5), (False,), torch.device("cpu"), 1, 3)
        try:
            return list(loader.batches(TRAINING, 2, 6, part))
        finally:
            loader.close()

    parts = [read(lambda size, rank=rank: slice(rank * size // 2, (rank + 1) * size // 2)) for rank in range(2)]  # type: ignore[misc]
    for whole, first, second in zip(read(None), *parts, strict=True):
        assert (len(first.image), len(second.image)) == (2, 3)
        assert torch.equal(whole.image, torch.cat([first.image, second.image]))
        assert torch.equal(whole.label, torch.cat([first.label, second.label])) and whole.cases == first.cases + second.cases


def test_torch_computes_in_as_many_threads_as_before() -> None:
    before = torch.get_num_threads()
    load(0), load(2)
    assert torch.get_num_threads() == before
