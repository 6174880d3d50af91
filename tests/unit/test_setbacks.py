"""Skipped steps: what is decided depends on which steps they were, and what is said names the cases."""

from __future__ import annotations

import math

import pytest
import torch

from autoseg.contracts import Batch
from autoseg.errors import RunError
from autoseg.trainers.setbacks import TOLD_STEPS, Diverged, Setbacks, cases_with_bad_images


def batch(*cases: str, bad: tuple[int, ...] = ()) -> Batch:
    image = torch.zeros(len(cases), 1, 4, 4)
    for index in bad:
        image[index, 0, 1, 1] = math.inf
    return Batch(image, torch.zeros(len(cases), 4, 4, dtype=torch.int64), cases)


def skip(setbacks: Setbacks, steps: list[int], of: Batch | None = None) -> tuple[list[int], list[str]]:
    """Steps after which training goes back, and what was said."""
    said: list[str] = []
    drawn = of or batch("a", "b")
    bad = cases_with_bad_images(drawn)
    back = [step for step in steps if setbacks.after(step, drawn.cases, bad, "the loss became nan", said.append)]
    return back, said


def test_the_third_in_a_row_goes_back_and_others_do_not() -> None:
    assert skip(Setbacks(), [1, 2, 4, 5, 7])[0] == []
    assert skip(Setbacks(), [1, 2, 4, 5, 6])[0] == [6]


def test_more_than_five_among_a_hundred_go_back() -> None:
    assert skip(Setbacks(), [0, 10, 20, 30, 40, 99])[0] == [99]
    assert skip(Setbacks(), [0, 10, 20, 30, 40, 100])[0] == []
    assert skip(Setbacks(), list(range(0, 2000, 20)))[0] == []


def test_after_going_back_the_count_begins_anew_and_the_second_time_is_the_last() -> None:
    setbacks = Setbacks()
    assert skip(setbacks, [1, 2, 3, 4, 5, 900, 901])[0] == [3]
    with pytest.raises(Diverged, match=r"at step 902 on cases a, b.*a \(8\), b \(8\)|b \(8\), a \(8\)"):
        skip(setbacks, [902])


def test_images_at_fault_are_told_apart_with_their_folder() -> None:
    assert cases_with_bad_images(batch("a", "b", "a", bad=(0, 2))) == ["a"]
    setbacks = Setbacks(lambda case: f"/work/{case}")
    back, said = skip(setbacks, [1, 2], batch("a", "b", bad=(1,)))
    assert back == [] and len(said) == 1 and "case b" in said[0] and "remove /work/b," in said[0]
    with pytest.raises(RunError, match=r"NaN or infinite values: b \(/work/b\)\. Remove that folder") as caught:
        skip(setbacks, [3], batch("a", "b", bad=(1,)))
    assert not isinstance(caught.value, Diverged)


def test_a_stop_leaves_the_memory_as_it_was_so_that_the_repeated_step_counts_once() -> None:
    setbacks = Setbacks()
    skip(setbacks, [1, 2], batch("a", bad=(0,)))
    with pytest.raises(RunError):
        skip(setbacks, [3], batch("a", bad=(0,)))
    assert setbacks.skipped == [1, 2]


def test_warnings_about_single_steps_come_to_an_end() -> None:
    _, said = skip(Setbacks(), list(range(0, 4000, 40)))
    assert len(said) == TOLD_STEPS and "only counted" in said[-1]


def test_the_steps_just_before_are_remembered() -> None:
    setbacks = Setbacks()
    skip(setbacks, [7])
    assert [setbacks.just_before(step) for step in (7, 8, 10, 11)] == [False, True, True, False]
