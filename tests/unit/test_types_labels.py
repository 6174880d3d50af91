"""Labels: any integers on disk, 0..K inside, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from autoseg.types.labels import Label, Labels, Region


def labels(*values: int, background: int = 0, ignore: int | None = None, **more: Any) -> Labels:
    return Labels(
        background=Label(name="background", value=background), foreground=tuple(Label(name=f"l{v}", value=v) for v in values),
        ignore=None if ignore is None else Label(name="ignore", value=ignore), **more,
    )


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=8, unique=True), st.integers(0, 100))
def test_what_is_encoded_is_decoded_to_the_same_values(values: list[int], seed: int) -> None:
    given_labels = labels(*values[1:], background=values[0])
    stored = np.random.default_rng(seed).choice(np.array(values, np.int64), (2, 3, 4))
    inside = given_labels.encode(stored)
    assert inside.dtype == np.int16 and inside.shape == stored.shape
    assert all(values[i] == v for i, v in zip(inside.ravel(), stored.ravel(), strict=True))
    back = given_labels.decode(inside)
    assert np.array_equal(back, stored)
    info = np.iinfo(back.dtype)
    assert info.min <= min(values) and max(values) <= info.max


@pytest.mark.parametrize(("values", "kind"), [
    ((255,), np.uint8), ((1, 256), np.uint16), ((70000,), np.int32), ((-1, 2), np.int8), ((-1, 200), np.int16),
    ((2**31,), np.int64),
])
def test_decoded_labels_have_the_smallest_type_that_holds_all_values(values: tuple[int, ...], kind: type[np.integer]) -> None:
    assert labels(*values).decode(np.array([0, 1])).dtype == kind


def test_the_ignore_label_comes_last_inside_and_is_never_predicted() -> None:
    given_labels = labels(5, 2, ignore=1)
    assert given_labels.values == (0, 5, 2, 1) and given_labels.ignore_index == 3
    assert given_labels.encode(np.array([1, 2, 5, 0])).tolist() == [3, 2, 1, 0]
    assert given_labels.output_count == 3 and given_labels.declared_count == 4
    assert labels(1).ignore_index is None


def test_an_undeclared_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"label values \[3, 9\] are not declared \(declared: \[0, 1, 7\]\)"):
        labels(1, 7).encode(np.array([[0, 1, 9], [3, 7, 9]]))


def test_targets_are_labels_or_regions_by_inside_index() -> None:
    assert labels(4, 9).targets == (("l4", (1,)), ("l9", (2,)))
    nested = labels(4, 9, regions=(Region(name="both", values=(9, 4)), Region(name="one", values=(9,))), region_order=(4, 9))
    assert nested.targets == (("both", (2, 1)), ("one", (2,)))
    assert nested.output_count == 2 and nested.declared_count == 3


@pytest.mark.parametrize(("make", "message"), [
    (lambda: labels(), "at least one foreground label"),
    (lambda: labels(1, 1), r"must differ from one another, found \[0, 1, 1\]"),
    (lambda: labels(1, 0), "must differ"),
    (lambda: labels(1, ignore=1), "must differ"),
    (lambda: labels(1, regions=(Region(name="r", values=(2,)),), region_order=(1,)), r"region 'r' must hold declared .*\(2,\)"),
    (lambda: labels(1, regions=(Region(name="r", values=()),), region_order=(1,)), "region 'r' must hold declared"),
    (lambda: labels(1, regions=(Region(name="r", values=(1,)),)), "region_order needs one value for each of 1 regions"),
    (lambda: labels(1, regions=(Region(name="r", values=(1,)),), region_order=(0,)), "region_order must hold declared"),
])
def test_labels_that_contradict_themselves_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64, np.uint64])
def test_values_of_every_integer_type_are_encoded(kind: type) -> None:
    given = labels(3, 100)
    assert given.encode(np.array([[0, 100, 3], [3, 0, 100]], kind)).tolist() == [[0, 2, 1], [1, 0, 2]]
    with pytest.raises(ValueError, match=r"\[4\] are not declared"):
        given.encode(np.array([0, 4], kind))


def test_values_far_apart_and_negative_ones_are_encoded() -> None:
    given = labels(-5, 7_000_000)
    index = given.encode(np.array([[0, -5], [7_000_000, 0]]))
    assert sorted(index.ravel().tolist()) == [0, 0, 1, 2] and index.dtype == np.int16
    np.testing.assert_array_equal(given.decode(index), [[0, -5], [7_000_000, 0]])
