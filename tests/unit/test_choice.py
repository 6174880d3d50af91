"""Choosing among candidates: bounds that hold where there is nothing to gain, and gains that are found where there are some."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from autoseg.arrays.choice import choose, choose_families, deal_parts

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "nested_selection.py"
FOLDS = np.repeat(np.arange(5), 6)


@pytest.fixture(scope="module")
def simulation():
    found = importlib.util.spec_from_file_location("nested_selection", SCRIPT)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def test_where_nothing_is_to_be_gained_the_reported_gain_is_zero_and_little_is_kept(simulation):
    found = simulation.run(simulation.Scene("null", candidates=8, cases=20), repeats=120)
    assert abs(found["gain"]) <= 2.5 * found["error"] < found["naive"]
    assert found["kept"] <= 0.05 < found["usual"]


def test_a_true_gain_is_found(simulation):
    found = simulation.run(simulation.Scene("gain", candidates=8, cases=30, gain=0.02), repeats=60)
    assert found["right"] >= 0.8 and found["gain"] == pytest.approx(0.02, abs=0.003)


def test_all_questions_of_a_selection_together_keep_little_by_luck(simulation):
    found = simulation.run_chain(repeats=40)
    assert found["kept"] <= 0.1 and found["gain"] <= 2 * found["error"] < found["naive"]


def test_the_gain_is_that_of_choices_made_without_the_fold_by_hand():
    scores = np.zeros((3, 6))
    scores[1] = [3, 3, 0, 0, 0, 0]
    scores[2] = [0, 0, 1, 1, 1, 1]
    found = choose(scores, [0, 0, 1, 1, 2, 2])
    # without fold 0 candidate 2 leads (gain 0 there); without folds 1 and 2 candidate 1 leads (gain 0 there)
    assert found.gain == 0 and not found.kept and found.chosen == 0 and found.best == 1 and found.naive == 1


def test_a_candidate_that_always_wins_is_kept_from_six_patients_on():
    for cases, kept in ((5, False), (6, True)):
        scores = np.zeros((2, cases))
        scores[1] = 0.1
        found = choose(scores, np.arange(cases) % 3)
        assert found.kept is kept and found.gain == pytest.approx(0.1) and (found.low > 1e-6) is kept
        assert found.p_value == 2.0**-cases


def test_cases_of_one_patient_are_not_independent_evidence():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(10), 6)
    scores = np.zeros((2, 60))
    scores[1] = rng.normal(0.05, 0.1, 10)[patient]
    folds = np.zeros(60, int)
    assert choose(scores, folds).low > choose(scores, folds, groups=list(patient)).low


def test_ties_go_to_the_baseline_and_then_to_the_first_of_a_family():
    scores = np.ones((4, 30)) * np.array([0, 0, 0.1, 0.1])[:, None]
    assert choose(scores[:2], FOLDS).best == 0
    assert choose_families(scores, FOLDS, [[3, 2]])[0].best == 3
    assert choose_families(scores, FOLDS, [[1, 2, 3]])[0].best == 2


def test_the_baseline_may_be_any_candidate():
    rng = np.random.default_rng(1)
    scores = rng.normal(0.8, 0.02, (3, 30)) + np.array([0.2, 0, 0])[:, None]
    assert choose(scores, FOLDS, baseline=0).chosen == 0
    found = choose(scores, FOLDS, baseline=2)
    assert found.chosen == found.best == 0 and found.kept and found.low < found.gain < found.high


def test_a_candidate_that_was_made_from_a_fold_is_not_chosen_for_it():
    rng = np.random.default_rng(2)
    scores = rng.normal(0, 0.01, (2, 30))
    scores[1] += 0.1
    allowed = np.ones((2, 5), bool)
    allowed[1, :2] = False
    whole, part = choose(scores, FOLDS), choose(scores, FOLDS, allowed=allowed)
    assert part.gain == pytest.approx((scores[1] - scores[0])[FOLDS >= 2].sum() / 30) and whole.gain > part.gain
    with pytest.raises(ValueError, match=r"expected `allowed` of shape \(2, 5\), found \(2, 4\)"):
        choose(scores, FOLDS, allowed=allowed[:, :4])


def test_more_families_ask_for_stronger_evidence():
    rng = np.random.default_rng(3)
    scores = np.vstack([np.zeros(60), rng.normal(0.02, 0.05, (1, 60)), rng.normal(0, 0.05, (20, 60))])
    folds = np.repeat(np.arange(5), 12)
    alone = choose_families(scores, folds, [[1]])[0]
    among = choose_families(scores, folds, [[i] for i in range(1, 22)])[0]
    assert among.gain == alone.gain and among.low < alone.low and among.p_value > alone.p_value


def test_a_family_with_one_rare_loss_does_not_mask_the_others():
    rng = np.random.default_rng(4)
    scores = np.zeros((3, 60))
    scores[1] = rng.normal(0.03, 0.05, 60)
    scores[2, 7] = -0.1
    folds = np.repeat(np.arange(5), 12)
    good, rare = choose_families(scores, folds, [[1], [2]])
    assert good.kept and not rare.kept and rare.best == 0


def test_few_folds_are_replaced_by_parts_of_patients():
    patients = np.repeat(np.arange(20), 2)
    part, count = deal_parts(np.zeros(40, int), list(patients))
    assert count == 5 and all(len(set(part[patients == p])) == 1 for p in range(20))
    assert sorted(np.bincount(part)) == [8] * 5
    np.testing.assert_array_equal(deal_parts([4, 1, 7, 1])[0], [1, 0, 2, 0])
    rng = np.random.default_rng(5)
    scores = rng.normal(0, 0.02, (2, 40))
    scores[1] += 0.05
    assert choose(scores, np.zeros(40, int)).kept


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="scores must be defined"):
        choose([[0.0, 1.0], [np.nan, 1.0]], [0, 1])
    with pytest.raises(ValueError, match="one fold for each of 3 cases, found 2"):
        choose(np.zeros((2, 3)), [0, 1])
