"""What every sampler must do: the same places whatever was asked before, inside bounds, foreground where it is forced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.errors import PluginError
from autoseg.trainers.sampling import ROUNDS, SAMPLERS, Request, Sampler, make_sampler
from autoseg.types.run import SamplerSpec

PATCH = (8, 10, 12)
KEY = (0, 0, 0)


class Scene:
    """A case as samplers see it."""

    def __init__(self, label_zyx: NDArray[np.integer], annotated: NDArray[np.integer] | None = None) -> None:
        self.name, self.label, self.annotated = "scene", label_zyx, annotated
        self.shape = tuple(label_zyx.shape)

    @property
    def locations(self) -> Mapping[int, NDArray[np.integer]]:
        found = {int(v): np.argwhere(self.label == v) for v in np.unique(self.label) if v > 0}
        return found if self.annotated is None else {0: self.annotated, **found}

    @property
    def components(self) -> Mapping[int, Sequence[NDArray[np.integer]]]:
        def of(value: int) -> list[NDArray[np.integer]]:
            numbers, count = ndimage.label(self.label == value, np.ones((3, 3, 3)))
            return [np.argwhere(numbers == i + 1) for i in range(count)]

        return {int(v): of(int(v)) for v in np.unique(self.label) if v > 0}


def scenes() -> list[Scene]:
    """Three cases: an organ with a metastasis of a hundredth of its size, one with a second label, one with nothing."""
    first = np.zeros((30, 30, 30), np.int16)
    first[2:12, 2:12, 2:12] = 1
    first[25:27, 25:27, 25:27] = 1
    second = np.zeros((20, 9, 24), np.int16)
    second[1:15, 1:8, 1:20] = 1
    second[18, 8, 23] = 2
    return [Scene(first), Scene(second), Scene(np.zeros((16, 16, 16), np.int16))]


def place(sampler: Sampler, number: int, forced: bool = True, key: tuple[int, ...] = KEY) -> tuple[int, tuple[int, ...]]:
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, number])))
    return sampler.place(Request(PATCH, forced, number, key), rng)


def patch_of(case: Scene, start: Sequence[int]) -> NDArray[np.integer]:
    return case.label[tuple(slice(max(s, 0), max(s, 0) + p) for s, p in zip(start, PATCH, strict=True))]


@pytest.fixture(params=sorted(SAMPLERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_place_depends_on_its_number_alone(kind: str) -> None:
    forward = [place(make_sampler(SamplerSpec(kind=kind), scenes()), i) for i in range(40)]
    one = make_sampler(SamplerSpec(kind=kind), scenes())
    assert [place(one, i) for i in reversed(range(40))][::-1] == forward
    assert [place(one, i, key=(1, 0, 0)) for i in range(40)] != forward


def test_forced_patches_hold_foreground(kind: str) -> None:
    cases = scenes()[:2]
    one = make_sampler(SamplerSpec(kind=kind), cases)
    for i in range(200):
        number, start = place(one, i)
        assert patch_of(cases[number], start).any()


@pytest.mark.parametrize("forced", [True, False])
def test_patches_stay_in_bounds(kind: str, forced: bool) -> None:
    """None begins before the case, unless the case is smaller than the patch; free ones do not end beyond it either."""
    cases = scenes()
    one = make_sampler(SamplerSpec(kind=kind), cases)
    for i in range(200):
        number, start = place(one, i, forced)
        for s, p, n in zip(start, PATCH, cases[number].shape, strict=True):
            assert min(0, -((p - n) // 2)) <= s < n
            assert forced or s <= max(n - p, 0)


def test_free_patches_take_cases_equally_often(kind: str) -> None:
    one = make_sampler(SamplerSpec(kind=kind), scenes())
    counts = Counter(place(one, i, forced=False)[0] for i in range(900))
    assert all(count == pytest.approx(300, abs=70) for count in counts.values()) and len(counts) == 3


def test_without_any_foreground_there_are_patches_all_the_same(kind: str) -> None:
    one = make_sampler(SamplerSpec(kind=kind), scenes()[2:])
    assert all(place(one, i)[0] == 0 for i in range(10))


def test_free_patches_are_centred_on_annotated_voxels_where_some_are_not(kind: str) -> None:
    sparse = Scene(scenes()[0].label, annotated=np.array([[20, 21, 22]]))
    one = make_sampler(SamplerSpec(kind=kind), [sparse])
    assert {place(one, i, forced=False) for i in range(10)} == {(0, (16, 16, 16))}


def test_options_that_a_sampler_does_not_take_are_refused(kind: str) -> None:
    with pytest.raises(PluginError, match=rf"sampler '{kind}' does not take the options \{{'size': 3\}}"):
        make_sampler(SamplerSpec(kind=kind, options={"size": 3}), scenes())


def test_the_balanced_sampler_visits_every_target_as_often() -> None:
    cases = scenes()
    one = make_sampler(SamplerSpec(kind="balanced"), cases)
    for begin in range(0, 40, 2):  # two targets: any two in a row are one round
        found = [place(one, begin + i) for i in range(2)]
        assert any(number == 1 and (patch_of(cases[1], start) == 2).any() for number, start in found)


def test_the_balanced_sampler_takes_cases_and_components_in_turn() -> None:
    cases = scenes()
    one = make_sampler(SamplerSpec(kind="balanced"), [cases[0], cases[2]])  # one target, in one case, two components
    small = 0
    for begin in range(0, 60, 2):
        centres = [tuple(s + p // 2 for s, p in zip(place(one, begin + i)[1], PATCH, strict=True)) for i in range(2)]
        inside = [min(centre) >= 25 for centre in centres]
        assert sum(inside) == 1  # the component of 8 voxels comes as often as that of 1000
        small += inside[0]
    assert 5 < small < 25  # in an order that changes
    reference = make_sampler(SamplerSpec(), [cases[0]])
    assert sum(min(place(reference, i)[1]) >= 15 for i in range(300)) < 15


def test_turns_go_on_over_batches_of_any_size() -> None:
    """A round's order is drawn from numbers that no sample uses."""
    assert ROUNDS not in (0, 1)


def test_a_plug_in_is_called_with_the_cases_and_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    class Corner:
        def __init__(self, cases: Sequence[Any], far: int = 0) -> None:
            self.cases, self.far = cases, far

        def place(self, request: Request, rng: np.random.Generator) -> tuple[int, tuple[int, ...]]:
            return len(self.cases) - 1, (self.far,) * 3

    monkeypatch.setitem(SAMPLERS, "corner", Corner)
    one = make_sampler(SamplerSpec(kind="corner", options={"far": 4}), scenes())
    assert place(one, 7) == (2, (4, 4, 4))
