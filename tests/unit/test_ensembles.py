"""Ensembles scored on disputed voxels only, against scoring them whole, and the greedy search."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autoseg.arrays.ensembles import CaseTable, Targets, case_values, dice_of, greedy_search, pooled_dice, simplest
from autoseg.types.labels import Label, Labels, Region

PLAIN = Labels(foreground=(Label(name="a", value=10), Label(name="b", value=20)), ignore=Label(name="ignore", value=99))
REGIONS = Labels(
    foreground=(Label(name="edema", value=1), Label(name="core", value=2), Label(name="other", value=3)),
    regions=(Region(name="whole", values=(1, 2)), Region(name="core", values=(2,)), Region(name="other", values=(3,))),
    region_order=(1, 2, 1))
SHAPE = (4, 9, 10)


def random_probabilities(rng, outputs, regions):
    logits = rng.normal(0, 2, (outputs, *SHAPE))
    p = 1 / (1 + np.exp(-logits)) if regions else np.exp(logits) / np.exp(logits).sum(0)
    return p.astype(np.float16)


@pytest.mark.parametrize("labels", [PLAIN, REGIONS], ids=["labels", "regions"])
def test_ensembles_on_disputed_voxels_score_as_on_the_whole_case(labels):
    rng = np.random.default_rng(0)
    targets = Targets.of(labels)
    same = random_probabilities(rng, labels.output_count, bool(labels.regions))
    runs = [np.where(rng.random(SHAPE) < 0.3, random_probabilities(rng, labels.output_count, bool(labels.regions)), same)
            for _ in range(3)]
    truth = rng.integers(0, len(labels.values), SHAPE).astype(np.int16)
    totals = targets.totals(truth)
    table = CaseTable.of(runs, truth, totals, targets)
    assert 0 < len(table.truth) < truth.size
    for weights in ((1, 0, 0), (0, 1, 0), (1, 1, 1), (3, 1, 2), (0, 2, 5)):
        mean = sum(w * p.astype(np.float32) for w, p in zip(weights, runs, strict=True)) / sum(weights)
        if labels.regions:
            index = np.zeros(SHAPE, int)
            for value, p in zip(labels.region_order, mean, strict=True):
                index[p > 0.5] = value
        else:
            index = mean.argmax(0)
        expected = []
        counted = truth != 3 if labels is PLAIN else np.ones(SHAPE, bool)
        for _, members in labels.targets:
            a, b = np.isin(index, members) & counted, np.isin(truth, members) & counted
            expected.append(2 * (a & b).sum() / (a.sum() + b.sum()))
        np.testing.assert_allclose(table.dice(weights, targets), expected, atol=3e-3)  # ties of float16 sums


def test_dice_of_two_empty_masks_is_undefined():
    assert math.isnan(dice_of(np.array([[0], [0]]), np.array([0]))[0])
    assert dice_of(np.array([[0], [3]]), np.array([0]))[0] == 0
    assert dice_of(np.array([[2], [3]]), np.array([5]))[0] == pytest.approx(0.5)


def test_case_values_average_to_the_mean_over_targets_of_their_means():
    rng = np.random.default_rng(1)
    dice = rng.random((3, 10, 4))
    dice[:, 2:7, 1] = np.nan
    dice[:, :, 3] = np.nan
    values = case_values(dice)
    assert values.shape == (3, 10)
    np.testing.assert_allclose(values.mean(1), [pooled_dice(d)[0] for d in dice])


def test_a_rightly_empty_mask_is_better_than_a_false_one():
    dice = np.array([[[0.8], [np.nan]], [[0.8], [0.0]]])
    np.testing.assert_allclose(case_values(dice).mean(1), [0.9, 0.4])
    assert not case_values(np.full((2, 3, 1), np.nan)).any()
    assert pooled_dice(np.full((3, 2), np.nan)) == (None, [None, None])
    assert pooled_dice(np.array([[0.5, np.nan], [0.7, 0.2]])) == (pytest.approx(0.4), [pytest.approx(0.6), 0.2])


def test_weights_in_smallest_numbers():
    assert simplest((2, 0, 4)) == (1, 0, 2) and simplest((0, 3)) == (0, 1) and simplest((2, 3)) == (2, 3)


def quadratic(best):
    """A score that is highest where the shares are `best`; the same for each of 10 cases, with a little noise."""
    noise = np.random.default_rng(0).normal(0, 0.001, 10)

    def score(ensembles):
        shares = np.array([np.array(e) / sum(e) for e in ensembles])
        return (1 - ((shares - best) ** 2).sum(1))[:, None, None] + noise[None, :, None]
    return score


def test_greedy_search_finds_the_best_shares_and_asks_for_each_ensemble_once():
    asked = []

    def score(ensembles):
        asked.extend(ensembles)
        return quadratic(np.array([0.5, 0.25, 0.25, 0]))(ensembles)

    found = greedy_search(4, np.arange(10) % 5, 5, score)
    assert found.best == (2, 1, 1, 0)
    assert len(asked) == len(set(asked)) == len(found.ensembles) == len(found.dice) == len(found.allowed)
    assert found.ensembles[:4] == [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)] and found.allowed[:4].all()


def test_one_run_is_not_searched():
    found = greedy_search(1, np.arange(6) % 3, 3, lambda e: np.ones((len(e), 6, 1)))
    assert found.ensembles == [(1,)] and found.best == (1,)


def test_paths_without_a_part_do_not_see_its_cases():
    parts = np.repeat([0, 1, 2], 4)

    def score(ensembles, flip=0.0):
        rows = []
        for e in ensembles:
            row = np.array([0.7 if e[1] else 0.5] * 12) + 0.01 * len([w for w in e if w])
            row[parts == 2] += flip if e[0] else 0
            rows.append(row)
        return np.array(rows)[:, :, None]

    for flip in (0.0, 5.0):
        found = greedy_search(3, parts, 3, lambda e, f=flip: score(e, f))
        tried = {e for e, may in zip(found.ensembles, found.allowed[:, 2], strict=True) if may}
        if flip == 0.0:
            expected = tried
    assert tried == expected
