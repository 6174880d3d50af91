"""Comparison of several tools' masks on the same cases, with hand-made masks whose differences are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from autoseg.errors import DatasetError
from autoseg.files.images import write_label
from autoseg.files.workspace import load_record
from autoseg.stages.compare import compare, comparison_facts, comparison_table, find_sources
from autoseg.types.comparison import MEAN, Comparison
from autoseg.types.geometry import Grid

SHAPE = (6, 24, 24)
GRID = Grid(shape=SHAPE, spacing=(1.0, 1.0, 1.0))


def cube(shift: int = 0, label: int = 1) -> np.ndarray:
    """A cuboid 2 x 8 x 8, moved along x: its Dice with the unmoved one is (8 - shift) / 8."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:4, 8:16, 8 + shift : 16 + shift] = label
    return mask


def write(folder: Path, masks: dict[str, np.ndarray]) -> Path:
    for name, mask in masks.items():
        write_label(folder / f"{name}.nii.gz", mask, GRID)
    return folder


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of few pixels, which are drawn faster."""
    monkeypatch.setattr("autoseg.stages.compare_figure.DPI", 40)


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    return write(tmp_path / "truth", {f"c{i}": cube() for i in range(8)})


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path / "good", {f"c{i}": cube(i % 2) for i in range(8)})  # Dice 1 and 7/8


@pytest.fixture
def poor(tmp_path: Path) -> Path:
    return write(tmp_path / "poor", {f"c{i}": cube(2 + i % 2) for i in range(8)})  # Dice 6/8 and 5/8


def row(comparison: Comparison, metric: str, target: str = MEAN, first: str = "good"):
    return next(d for d in comparison.differences if (d.metric, d.target, d.first) == (metric, target, first))


def test_paired_differences_are_those_of_the_cases(truth, good, poor, tmp_path) -> None:
    found = compare([good, poor], truth, tmp_path / "out", threads=1)
    dice = row(found, "dice")
    assert (dice.mean, dice.low, dice.high) == pytest.approx((0.25, 0.25, 0.25))
    assert dice.cases == 8 and dice.better == "good"
    assert dice.p_value == pytest.approx(2 / 2**8)  # all eight signs agree
    assert row(found, "hd95").mean == pytest.approx(-2.0) and row(found, "hd95").better == "good"
    means = {one.name: one.mean[MEAN]["dice"] for one in found.contenders}
    assert means == pytest.approx({"good": 15 / 16, "poor": 11 / 16})
    assert load_record(tmp_path / "out" / "comparison.json", Comparison) == found
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_p_values_are_corrected_for_their_number(truth, good, poor) -> None:
    found = compare([good, poor], truth, threads=1)
    means = [d for d in found.differences if d.target == MEAN]
    assert len(means) == 3 and [d.p_holm for d in means] == pytest.approx([3 * 2 / 2**8] * 3)
    assert all(d.p_holm >= d.p_value for d in found.differences)


def test_the_order_is_firm_when_every_patient_agrees(truth, good, poor) -> None:
    found = compare([poor, good], truth, threads=1)
    for ranking in found.rankings:
        assert ranking.order == ("good", "poor") and ranking.shares["good"] == (1.0, 0.0) and ranking.tau == 1.0
    assert "order by dice: good, poor; good leads in 100% of draws" in "\n".join(comparison_facts(found))


def test_equal_masks_are_not_told_apart(truth, good, tmp_path) -> None:
    other = write(tmp_path / "copy", {f"c{i}": cube(i % 2) for i in range(8)})
    found = compare([good, other], truth, threads=1)
    assert all(d.mean == 0 and d.p_holm == 1 and d.better == "" for d in found.differences)
    assert {line[-1] for line in comparison_table(found)[1:]} == {"not told apart"}


def test_only_cases_that_all_have_are_compared(truth, good, tmp_path) -> None:
    part = write(tmp_path / "part", {f"c{i}": cube(2) for i in (1, 3, 5, 9)})
    found = compare([good, part], truth, threads=1)
    assert found.cases == ("c1", "c3", "c5") and found.left_out == {"good": 5, "part": 1}
    assert "good: 5 further cases are not compared, since not all have them" in comparison_facts(found)
    nothing = write(tmp_path / "nothing", {"x": cube()})
    with pytest.raises(DatasetError, match="no case is common to all: references 8, good 8, nothing 1"):
        compare([good, nothing], truth, threads=1)


def test_false_objects_count_against_those_who_found_nothing_wrongly(tmp_path) -> None:
    empty = np.zeros(SHAPE, np.uint8)
    truth = write(tmp_path / "truth", {"a": cube(), "b": empty, "c": cube(), "d": empty})
    right = write(tmp_path / "right", {"a": cube(), "b": empty, "c": cube(), "d": empty})
    eager = write(tmp_path / "eager", {"a": cube(), "b": cube(), "c": cube(), "d": empty})
    found = compare([right, eager], truth, threads=1)
    dice = row(found, "dice", first="right")
    assert dice.cases == 3 and dice.mean == pytest.approx(1 / 3)  # 1 - 0 in b; nobody finds anything in d
    assert row(found, "hd95", first="right").cases == 2
    assert {one.name: one.undefined for one in found.contenders} == {"right": {"hd95": 1}, "eager": {"hd95": 1}}


def test_a_hopeless_contender_does_not_hide_the_others(truth, good, poor, tmp_path) -> None:
    blank = write(tmp_path / "blank", {f"c{i}": np.zeros(SHAPE, np.uint8) for i in range(8)})
    found = compare([good, poor, blank], truth, tmp_path / "out", threads=1)
    assert row(found, "hd95").cases == 8
    assert [r.metric for r in found.rankings] == ["dice", "nsd"]
    assert next(d for d in found.differences if d.second == "blank" and d.metric == "hd95").mean is None


def test_patients_are_what_is_drawn(tmp_path) -> None:
    names = [f"patient{i:03d}_frame{k:02d}" for i in range(6) for k in (1, 2)]
    truth = write(tmp_path / "truth", {name: cube() for name in names})
    a = write(tmp_path / "a", {name: cube(1) for name in names})
    b = write(tmp_path / "b", {name: cube(2) for name in names})
    found = compare([a, b], truth, threads=1)
    assert found.patients == 6 and row(found, "dice", first="a").p_value == pytest.approx(2 / 2**6)


def test_names_tell_folders_apart(good, poor, tmp_path) -> None:
    inner = write(tmp_path / "other" / "good", {"c0": cube()})
    assert [one.name for one in find_sources([good, inner])] == [f"{tmp_path.name}/good", "other/good"]
    assert [one.name for one in find_sources([f"ours={good}", poor])] == ["ours", "poor"]
    with pytest.raises(DatasetError, match="given twice"):
        find_sources([f"a={good}", f"a={poor}"])


def test_what_cannot_be_compared_is_refused(good, tmp_path) -> None:
    with pytest.raises(DatasetError, match="takes two or more"):
        compare([good])
    with pytest.raises(DatasetError, match="--reference DIR"):
        compare([good, f"again={good}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no masks"):
        compare([good, tmp_path / "empty"], good)


def test_rules_and_scores_are_written_down(truth, good, poor, tmp_path) -> None:
    compare([good, poor], truth, tmp_path, threads=1)
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["scores"]["dice"]["poor"]["c1"] == pytest.approx(5 / 8)
    assert any("Holm" in rule for rule in data["rules"])
