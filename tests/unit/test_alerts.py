"""Early words about a run: classes that learn nothing, cases that lack them, time lost for data, and what the best epoch is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from autoseg.logs import Silent
from autoseg.stages.alerts import Alerts, epoch_line, is_best, smoothed_dice, still_nothing
from autoseg.types.labels import Label, Labels
from autoseg.types.run import EpochRecord

LABELS = Labels(foreground=(Label(name="organ", value=1), Label(name="lesion", value=2)))


class Hearing(Silent):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


def epoch(number: int, organ: float | None, lesion: float | None, wait: float = 0.0, skipped: int = 0) -> EpochRecord:
    return EpochRecord(
        epoch=number, step=100 * (number + 1), train_loss=-0.5, val_loss=None, pseudo_dice={"organ": organ, "lesion": lesion},
        learning_rate=0.01, seconds=12.3, data_wait=wait, skipped=skipped,
    )


def case(name: str, organ: int, lesion: int) -> Any:
    found = {index: np.zeros((count, 3)) for index, count in ((1, organ), (2, lesion)) if count}
    return SimpleNamespace(name=name, locations=found)


def alerts(cases: list[Any], threads: int = 1, labelled: dict[str, tuple[int, ...]] | None = None) -> tuple[Alerts, list[str]]:
    reporter = Hearing()
    job: Any = SimpleNamespace(labels=LABELS, training=cases, threads=threads, labelled=labelled or {})
    return Alerts("run fold 0", job, reporter), reporter.warned


CASES = [case("a", 50, 4), case("b", 60, 0), case("c", 70, 8)]


def look(made: Alerts, epochs: list[EpochRecord], total_steps: int = 1000) -> None:
    for count in range(1, len(epochs) + 1):
        made.after_epoch(epochs[:count], total_steps)


def test_a_class_that_learns_nothing_while_another_does_is_told_once_with_what_helps() -> None:
    made, said = alerts(CASES)
    look(made, [epoch(i, 0.6, 0.0) for i in range(6)])
    assert len(said) == 1
    for part in ("lesion has learned nothing so far", "2 of 3 training cases", "about 6 voxels", "sampler.kind=balanced",
                 "loss.kind=dice_focal"):
        assert part in said[0]


def test_when_no_class_learns_the_labels_and_the_rate_are_suspected() -> None:
    made, said = alerts(CASES)
    look(made, [epoch(i, 0.0, 0.001) for i in range(4)])
    assert len(said) == 2 and all("autoseg check" in line and "optimizer.lr" in line for line in said)


@pytest.mark.parametrize("epochs", [
    [epoch(i, 0.6, 0.2) for i in range(6)],
    [epoch(i, 0.6, None) for i in range(6)],
    [epoch(i, 0.6, 0.0 if i % 3 else 0.02) for i in range(6)],
    [epoch(i, 0.6, 0.0) for i in range(2)],
])
def test_classes_that_learn_or_are_not_judged_or_judged_too_briefly_are_not_told(epochs: list[EpochRecord]) -> None:
    made, said = alerts(CASES)
    look(made, epochs)
    assert said == []


def test_nothing_is_said_before_a_share_of_the_run_is_done() -> None:
    made, said = alerts(CASES)
    look(made, [epoch(i, 0.6, 0.0) for i in range(14)], total_steps=10_000)
    assert said == []
    look(made, [epoch(i, 0.6, 0.0) for i in range(15)], total_steps=10_000)
    assert len(said) == 1


def test_a_class_that_no_training_case_holds_is_told_before_and_only_then() -> None:
    made, said = alerts([case("a", 5, 0), case("b", 6, 0)])
    made.before()
    assert len(said) == 1 and "none of the 2 training cases holds lesion" in said[0]
    look(made, [epoch(i, 0.6, 0.0) for i in range(6)])
    assert len(said) == 1


def test_cases_in_which_a_class_is_not_annotated_do_not_count() -> None:
    made, said = alerts(CASES, labelled={"a": (0,), "b": (0,)})
    made.before()
    assert said == []
    look(made, [epoch(i, 0.6, 0.0) for i in range(6)])
    assert "1 of 1 training cases, with about 8 voxels" in said[0]


def test_waiting_for_data_is_told_once_with_what_helps_but_not_after_the_first_epoch() -> None:
    made, said = alerts(CASES, threads=0)
    look(made, [epoch(0, 0.6, 0.5, wait=0.9)])
    assert said == []
    look(made, [epoch(i, 0.6, 0.5, wait=0.25) for i in range(4)])
    assert len(said) == 1 and "25%" in said[0] and "--threads" in said[0] and "disk" in said[0]


def test_little_waiting_is_no_matter() -> None:
    made, said = alerts(CASES)
    look(made, [epoch(i, 0.6, 0.5, wait=0.1) for i in range(4)])
    assert said == []


def test_the_smoothed_dice_is_the_references_average() -> None:
    rows = [epoch(0, None, None), epoch(1, 0.5, 0.3), epoch(2, 0.8, None), epoch(3, None, None)]
    assert smoothed_dice(rows) == [None, pytest.approx(0.4), pytest.approx(0.44), pytest.approx(0.44)]
    assert [is_best(rows[: i + 1]) for i in range(4)] == [False, True, True, False]


def test_the_best_is_by_the_average_not_by_a_single_epoch() -> None:
    rows = [epoch(0, 0.9, 0.9), epoch(1, 0.1, 0.1), epoch(2, 0.91, 0.91)]
    assert [is_best(rows[: i + 1]) for i in range(3)] == [True, False, False]


def test_still_nothing_needs_three_epochs_in_a_row() -> None:
    assert still_nothing([epoch(0, 0.0, 0.0), epoch(1, 0.0, 0.0)]) == set()
    assert still_nothing([epoch(0, 0.5, 0.0), epoch(1, 0.0, 0.0), epoch(2, 0.0, 0.0)]) == {"lesion"}


def test_an_epochs_line_says_where_the_time_went() -> None:
    line = epoch_line(epoch(4, 0.612, None, wait=0.034, skipped=2), 10)
    assert line == "epoch 5/10: loss -0.500, pseudo Dice 0.61 -, 12.3 s (data wait 3%, compute 97%), 2 steps skipped"
