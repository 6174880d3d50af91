"""Restoring: the compiled loops against torch, planes pulled one after another, types and layouts of logits."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from numba import njit
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from autoseg.arrays.restore import (
    RestoredPlane,
    WholeLogits,
    compiled,
    ensemble,
    restore_ensemble,
    restore_labels,
    restore_planes,
    scalars,
)
from autoseg.types.case import Placement
from autoseg.types.geometry import AxisMap, Grid, Shape

PLAIN = AxisMap((0, 1, 2), (False, False, False))


def placed(shape: Shape, new: Shape, spacing: tuple[float, float, float] = (1, 1, 1)) -> Placement:
    """Logits of `shape` for an uncropped image of shape `new`."""
    target = tuple(s * n / m for s, n, m in zip(spacing, new, shape, strict=True))
    return Placement(Grid(shape=new, spacing=spacing), PLAIN, (0, 1, 2), ((0, new[0]), (0, new[1]), (0, new[2])), spacing, shape,
                     (target[0], target[1], target[2]))


def blobs(classes: int, shape: Shape, seed: int = 0) -> torch.Tensor:
    """Logits of smooth regions, with some noise at their borders."""
    rng = np.random.default_rng(seed)
    values = gaussian_filter(rng.normal(size=(classes, *shape)), (0, 3, 3, 3)) * 30 + 0.1 * rng.normal(size=(classes, *shape))
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small volumes use the compiled loops too."""
    monkeypatch.setattr(ensemble, "COMPILED_FROM", 0)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Where numba cannot be had."""
    with monkeypatch.context() as patch:
        patch.setattr(ensemble, "kernels", lambda: None)
        yield patch


SCENES = [((24, 30, 26), (41, 33, 50), (1, 1, 1)), ((30, 30, 30), (12, 55, 11), (1, 1, 1)), ((1, 40, 40), (1, 90, 75), (1, 1, 1)),
          ((16, 20, 20), (16, 20, 20), (1, 1, 1)), ((6, 30, 28), (13, 45, 60), (10, 1, 1)), ((20, 5, 22), (31, 9, 30), (1, 9, 1)),
          ((20, 1, 1), (31, 1, 7), (1, 1, 1))]
Scene = tuple[Shape, Shape, tuple[float, float, float]]


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("regions", [None, (1, 2, 3, 1, 2)])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_compiled_labels_are_those_of_torch(
    scene: Scene, regions: tuple[int, ...] | None, kind: torch.dtype, plain: pytest.MonkeyPatch,
) -> None:
    shape, new, spacing = scene
    logits = blobs(5, shape).to(kind)
    expected = restore_labels(logits, placed(shape, new, spacing), regions)
    plain.undo()
    ours = restore_labels(logits, placed(shape, new, spacing), regions)
    assert ours.dtype == expected.dtype
    assert (ours != expected).sum() <= 2  # ties of rounded numbers


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("regions", [None, (1, 2, 3, 1, 2)])
@pytest.mark.parametrize("temperatures", [None, (2.0, 0.5)])
@pytest.mark.parametrize("dense", [False, True])
def test_compiled_ensembles_are_those_of_torch(
    count: int, regions: tuple[int, ...] | None, temperatures: tuple[float, ...] | None, dense: bool, plain: pytest.MonkeyPatch,
) -> None:
    new = (25, 31, 40)
    sizes = ((20, 18, 36), (30, 31, 20))[:count]
    members = [(blobs(5, size, seed) / 4, placed(size, new)) for seed, size in enumerate(sizes)]
    degrees = temperatures and temperatures[:count]
    expected, expected_mean = restore_ensemble(members, regions, dense, (2, 1)[:count], temperatures=degrees)
    plain.undo()
    labels, mean = restore_ensemble(members, regions, dense, (2, 1)[:count], temperatures=degrees)
    assert (labels != expected).sum() <= 2
    assert (mean is not None) == (expected_mean is not None) == dense
    if mean is not None and expected_mean is not None:
        np.testing.assert_allclose(mean, expected_mean, atol=3e-6)


def test_temperatures_change_probabilities_and_no_label() -> None:
    new = (15, 18, 21)
    sizes = ((10, 12, 14), (12, 12, 12))
    logits = [blobs(3, size, seed) / 5 for seed, size in enumerate(sizes)]
    members = [(values, placed(size, new)) for values, size in zip(logits, sizes, strict=True)]
    fine = [functional.interpolate(values[None].double(), size=new, mode="trilinear")[0] for values in logits]
    expected = ((fine[0] / 3).softmax(0) + (fine[1] / 0.25).softmax(0)) / 2
    labels, mean = restore_ensemble(members, None, True, temperatures=(3, 0.25))
    np.testing.assert_allclose(mean, expected.numpy(), atol=2e-5)
    np.testing.assert_array_equal(labels, restore_ensemble(members)[0])
    with pytest.raises(ValueError, match="one positive temperature for each of 2 members"):
        restore_ensemble(members, temperatures=(1, 0))


@pytest.mark.parametrize("compiled_loops", [False, True])
def test_rounding_to_half_precision_gives_ties_to_the_first_class(compiled_loops: bool, plain: pytest.MonkeyPatch) -> None:
    if compiled_loops:
        plain.undo()
    shape, new = (6, 20, 20), (9, 33, 31)
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(300 + rng.normal(size=(3, *shape)).astype(np.float32)).half()  # a step of float16 is 0.25 here
    fine = functional.interpolate(logits[None].double(), size=new, mode="trilinear")[0]
    rounded = fine.half().double().numpy().argmax(0)
    ours = restore_ensemble([(logits, placed(shape, new))], half=True)[0]
    assert (ours != fine.argmax(0).numpy()).mean() > 0.01
    assert (ours != rounded).mean() < 1e-3


class Stream:
    """A source that gives each plane once, in rising order, and knows how many of them are alive."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits, self._alive, self._next = logits, list[weakref.ref[torch.Tensor]](), 0
        self.classes, self.device, self.most = len(logits), logits.device, 0
        z, y, x = logits.shape[1:]
        self.shape: Shape = (z, y, x)

    def planes(self, low: int, high: int) -> torch.Tensor:
        assert self._next <= low < high <= self.shape[0]
        self._next = high
        found = self._logits[:, low:high].clone()
        self._alive.append(weakref.ref(found))
        self.most = max(self.most, sum(one.shape[1] for one in (ref() for ref in self._alive) if one is not None))
        return found


@pytest.mark.parametrize("compiled_loops", [False, True])
def test_planes_are_pulled_once_in_rising_order_and_let_go(compiled_loops: bool, plain: pytest.MonkeyPatch) -> None:
    if compiled_loops:
        plain.undo()
        plain.setattr(compiled, "_GROUP_BYTES", 200_000)
    shape, new = (40, 30, 20), (55, 45, 31)
    logits = [blobs(4, shape, seed) for seed in (0, 1)]
    place = placed(shape, new)
    for count in (1, 2):
        streams = [Stream(values) for values in logits[:count]]
        members = [(stream, place) for stream in streams]
        planes = list(restore_planes(members, None, True))
        assert [plane.z for plane in planes] == list(range(55))
        whole = restore_ensemble([(values, place) for values in logits[:count]], None, True)
        np.testing.assert_array_equal(np.stack([plane.label_yx for plane in planes]), whole[0])
        means = [plane.probability_cyx for plane in planes if plane.probability_cyx is not None]
        np.testing.assert_array_equal(np.stack(means, 1), whole[1])
        assert max(stream.most for stream in streams) <= 12


def test_planes_that_no_output_plane_needs_are_not_waited_for() -> None:
    logits = blobs(3, (60, 20, 20))
    place = placed((60, 20, 20), (7, 20, 20))
    planes: list[RestoredPlane] = list(restore_planes([(Stream(logits), place)]))
    np.testing.assert_array_equal(np.stack([plane.label_yx for plane in planes]), restore_labels(logits, place))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 2, 3, 0), (3, 2, 1, 0), (1, 0, 3, 2)])
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_any_layout_of_logits_gives_the_same_labels(order: tuple[int, ...], kind: torch.dtype) -> None:
    logits = blobs(6, (20, 24, 22)).to(kind)
    place = placed((20, 24, 22), (30, 30, 30))
    expected = restore_labels(logits, place)
    turned = logits.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
    assert turned.shape == logits.shape
    np.testing.assert_array_equal(restore_labels(turned, place), expected)
    wide = torch.zeros(8, 21, 26, 25, dtype=kind)
    wide[1:7, :20, 1:25, 2:24] = logits
    np.testing.assert_array_equal(restore_labels(wide[1:7, :20, 1:25, 2:24], place), expected)


def test_an_import_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fails, load = [True], importlib.import_module

    def sometimes(name: str) -> ModuleType:
        if fails:
            fails.pop()
            raise ImportError("another thread is amid the same one")
        return load(name)

    monkeypatch.setattr(compiled, "_loaded", [])
    monkeypatch.setattr(importlib, "import_module", sometimes)
    assert compiled.kernels() is None and compiled.kernels() is not None


def test_a_full_disk_does_not_stop_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    from numba.core.caching import Cache

    monkeypatch.setattr(Cache, "_save_overload", full)
    monkeypatch.setattr(Cache, "_load_overload", full)

    def twice(x: int) -> int:
        return 2 * x

    assert scalars.kernel(twice)(21) == 42


def test_threads_and_groups_of_planes_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    new = (21, 45, 50)
    members = [(blobs(4, size, seed) / 4, placed(size, new)) for seed, size in enumerate(((14, 30, 30), (30, 20, 50)))]
    alone = restore_ensemble(members[:1], None, True)
    together = restore_ensemble(members)[0]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for size in (1, 100_000, 1 << 30):
                monkeypatch.setattr(compiled, "_GROUP_BYTES", size)
                monkeypatch.setattr(compiled, "_MEAN_BYTES", size)
                for ours, expected in zip(restore_ensemble(members[:1], None, True), alone, strict=True):
                    np.testing.assert_array_equal(ours, expected)
                np.testing.assert_array_equal(restore_ensemble(members)[0], together)
    finally:
        torch.set_num_threads(before)


def test_a_job_that_is_dropped_half_way_ends_its_threads() -> None:
    planes = restore_planes([(WholeLogits(blobs(2, (10, 10, 10))), placed((10, 10, 10), (20, 20, 20)))])
    assert next(planes).z == 0
    planes.close()  # type: ignore[attr-defined]


def test_every_float16_is_read_exactly_and_ordered_as_it_compares() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.int16)
    values = bits.view(np.float16).astype(np.float32)
    value, order = scalars.as_float, scalars.as_order

    @njit
    def read(flat: NDArray[np.int16], out: NDArray[np.float32], rank: NDArray[np.int32]) -> None:
        for i in range(len(flat)):
            out[i], rank[i] = value(flat, i), order(flat, i, False)

    out, rank = np.empty(len(bits), np.float32), np.empty(len(bits), np.int32)
    read(bits, out, rank)
    np.testing.assert_array_equal(out, values)
    number = ~np.isnan(values)
    sorted_by_rank = values[number][np.argsort(rank[number], kind="stable")]
    assert (np.diff(sorted_by_rank[np.isfinite(sorted_by_rank)]) >= 0).all()
    assert rank[bits == 0] == rank[bits == np.int16(-32768)]


def test_rounding_to_float16_and_the_power_of_e_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=100_000) * 10.0 ** rng.uniform(-9, 6, 100_000)).astype(np.float32)
    halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    middles = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([values, halves, middles, [65519.0, 65520.0, -65521.0]])
    values = values.astype(np.float32)
    rounded, power = scalars.rounded, scalars.exp

    @njit
    def each(given: NDArray[np.float32], half: NDArray[np.float32], exp: NDArray[np.float32]) -> None:
        for i in range(len(given)):
            half[i], exp[i] = rounded(given[i]), power(given[i])

    half, exp = np.empty_like(values), np.empty_like(values)
    each(values, half, exp)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half, values.astype(np.float16).astype(np.float32))
    usual = np.abs(values) < 87
    np.testing.assert_allclose(exp[usual], np.exp(values[usual].astype(np.float64)), rtol=5e-7)


def test_small_volumes_do_without_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "COMPILED_FROM", 4_000_000)
    assert not ensemble.worth_compiling((35, 50, 35), 3) and ensemble.worth_compiling((120, 256, 256), 25)
