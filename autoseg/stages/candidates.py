"""Runs and ensembles of runs compared on out-of-fold predictions: Dice with intervals, tests, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.arrays.choice import Choice, choose_families, deal_parts
from autoseg.arrays.ensembles import (
    MAX_STEPS,
    CaseTable,
    Search,
    Weights,
    case_values,
    dice_of,
    greedy_search,
    pooled_dice,
)
from autoseg.arrays.intervals import mean_of_means_interval
from autoseg.arrays.statistics import Floats, holm, paired_difference, ranking_stability
from autoseg.files.machine import memory_available_bytes
from autoseg.files.workspace import load_record
from autoseg.logs import Reporter
from autoseg.stages.contest import Contest
from autoseg.stages.outoffold import OutOfFold, Pace, pace_of, validation_pace
from autoseg.stages.postprocessing import gain_of
from autoseg.types.dataset import CaseFiles
from autoseg.types.report import Report
from autoseg.types.selection import Candidate, Decision, Difference

SHOWN_ENSEMBLES = 8
_CACHE_SHARE = 0.3  # of the free memory that reduced cases may take


@dataclass(frozen=True)
class Cost:
    """A run's pace with one fold, the same without mirroring, and the foreground mean Dice of the latter; None if unknown."""

    pace: Pace | None
    plain: Pace | None = None
    plain_dice: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What was chosen: runs with weights, decisions, all candidates (best first), the default's Dice plus nested gains."""

    runs: tuple[str, ...]
    weights: tuple[float, ...]
    decisions: tuple[Decision, ...]
    candidates: tuple[Candidate, ...]
    nested_dice: float | None


class _Tables:
    """Cases reduced to where runs disagree, kept in memory while they fit."""

    def __init__(self, source: OutOfFold) -> None:
        self.source = source
        self.kept: dict[str, CaseTable] = {}
        self.room = _CACHE_SHARE * memory_available_bytes()

    def score(self, ensembles: Sequence[Weights]) -> Floats:
        """Dice (ensembles, cases, targets)."""
        return np.stack([self._case(fold, case, ensembles) for fold, case in self.source.contest.order], 1)

    def _case(self, fold: int, case: CaseFiles, ensembles: Sequence[Weights]) -> Floats:
        table = self.kept.get(case.case)
        if table is None:
            table = self.source.table(fold, case)
            size = table.probabilities.nbytes + table.truth.nbytes
            if size <= self.room:
                self.room -= size
                self.kept[case.case] = table
        targets = self.source.contest.targets(case)
        return np.stack([table.dice(weights, targets) for weights in ensembles])


def compare(contest: Contest, source: OutOfFold | None, tail: float, reporter: Reporter) -> Comparison:
    """Choose among runs, then between the run and ensembles that greedy search finds; without `source` only among runs.

    tail: one-sided error that one of the two choices leaves its default wrongly.
    """
    runs = list(contest.runs)
    costs = {run: _cost(contest, source, run) for run in runs}
    search = _search(contest, source, reporter)
    values, titles = case_values(search.dice), [_title(runs, e) for e in search.ensembles]
    base = runs.index(contest.default)
    others = [r for r in range(len(runs)) if r != base]
    singles = sorted(others, key=lambda r: (_seconds(contest, costs, runs[r:r + 1]) or 0.0, runs[r]))
    several = sorted(range(len(runs), len(search.ensembles)), key=lambda e: int(np.count_nonzero(search.ensembles[e])))
    selected, decisions, gained = base, [], 0.0
    for question, family in (("which run", singles), ("one run or an ensemble", several)):
        if family:
            choice = choose_families(
                values, contest.case_folds, [family], contest.patients, selected, search.allowed, tail)[0]
            decisions.append(_decision(question, choice, selected, values, family, titles))
            gained += choice.gain if choice.kept else 0.0
            selected = choice.chosen
    dice, _ = pooled_dice(search.dice[base])
    used = [r for r, weight in enumerate(search.ensembles[selected]) if weight]
    weights = tuple(float(search.ensembles[selected][r]) for r in used)
    return Comparison(
        runs=tuple(runs[r] for r in used), weights=weights if len(set(weights)) > 1 else (), decisions=tuple(decisions),
        candidates=_candidates(contest, search, values, selected, costs), nested_dice=None if dice is None else dice + gained)


def _search(contest: Contest, source: OutOfFold | None, reporter: Reporter) -> Search:
    """Greedy search on probabilities, or the single runs as their validation reports have them."""
    parts, count = deal_parts(contest.case_folds, contest.patients)
    runs = list(contest.runs)
    if source is not None:
        with reporter.task("ensembles", MAX_STEPS + 1, unit="rounds") as task:
            return greedy_search(len(runs), parts, count, _Tables(source).score, task.advance)
    singles = [tuple(int(i == r) for i in range(len(runs))) for r in range(len(runs))]
    dice = np.stack([_reported(contest, run) for run in runs])
    return Search(singles, dice, np.ones((len(runs), count), bool), singles[0])


def _reported(contest: Contest, run: str) -> Floats:
    """Dice (cases, targets) of a run as its validation measured it; NaN where undefined."""
    names = [name for name, _ in contest.labels.targets]
    rows: dict[str, list[float]] = {}
    for fold in contest.folds:
        for case in load_record(contest.validation(run, fold) / "report.json", Report).cases:
            found = [case.metrics.get(name, {}).get("dice") for name in names]
            rows[case.case] = [math.nan if value is None else float(value) for value in found]
    return np.array([rows[case.case] for _, case in contest.order])


def _title(runs: Sequence[str], weights: Weights) -> str:
    return " + ".join(f"{run} x {w}" if w > 1 else run for run, w in zip(runs, weights, strict=True) if w)


def _decision(
    question: str, choice: Choice, base: int, values: Floats, family: Sequence[int], titles: Sequence[str],
) -> Decision:
    best = choice.best if choice.best != base else family[int(values[family].mean(1).argmax())]
    return Decision(question=question, default=titles[base], best=titles[best], gain=gain_of(choice), kept=choice.kept)


def _cost(contest: Contest, source: OutOfFold | None, run: str) -> Cost:
    """What was measured of a run's time, and of the run without mirroring."""
    if source is None:
        return Cost(validation_pace(contest, run))
    notes = source.notes(run)
    pace = pace_of([note["seconds"] for note in notes])
    if not all("plain" in note for note in notes):
        return Cost(pace)
    dice = np.stack([dice_of(np.array(note["plain"]), np.array(note["totals"])) for note in notes])
    return Cost(pace, pace_of([note["plain_seconds"] for note in notes]), pooled_dice(dice)[0])


def _seconds(contest: Contest, costs: dict[str, Cost], runs: Sequence[str], all_folds: bool = True) -> float | None:
    """Seconds per case of runs together; of all folds the networks' time is multiplied."""
    total = 0.0
    for run in runs:
        pace = costs[run].pace
        if pace is None:
            return None
        total += pace.other + pace.network * (len(contest.runs[run]) if all_folds else 1)
    return total


def _candidates(
    contest: Contest, search: Search, values: Floats, selected: int, costs: dict[str, Cost],
) -> tuple[Candidate, ...]:
    """The single runs, the best ensembles and the selected one, best first, each compared with the selected one."""
    count = len(contest.runs)
    score = [pooled_dice(dice)[0] for dice in search.dice]

    def rank(e: int) -> tuple[float, int]:
        dice = score[e]
        return (1.0 if dice is None else -dice, int(np.count_nonzero(search.ensembles[e])))

    several = sorted(range(count, len(search.ensembles)), key=rank)[:SHOWN_ENSEMBLES]
    shown = sorted({*range(count), *several, selected}, key=rank)
    differences = {e: paired_difference(values[selected], values[e], contest.patients) for e in shown if e != selected}
    corrected = dict(zip(differences, holm([d.p_value for d in differences.values()]), strict=True))
    ranking = ranking_stability(values[shown].T, groups=contest.patients)
    found = []
    for position, e in enumerate(shown):
        behind = None
        if e in differences:
            d = differences[e]
            behind = Difference(mean=d.mean, low=_finite(d.low), high=_finite(d.high), p_value=corrected[e], cases=d.cases)
        found.append(_candidate(contest, search, e, costs).model_copy(
            update={"behind": behind, "first": float(ranking.shares[position, 0])}))
    return tuple(found)


def _candidate(contest: Contest, search: Search, index: int, costs: dict[str, Cost]) -> Candidate:
    names = list(contest.runs)
    used = [r for r, weight in enumerate(search.ensembles[index]) if weight]
    runs, weights = tuple(names[r] for r in used), tuple(float(search.ensembles[index][r]) for r in used)
    dice, by_target = pooled_dice(search.dice[index])
    low, high = mean_of_means_interval(search.dice[index], contest.patients)
    alone = costs[runs[0]] if len(runs) == 1 else Cost(None)
    candidate = Candidate(
        runs=runs, weights=weights if len(set(weights)) > 1 else (), foreground_mean_dice=dice, low=_finite(low),
        high=_finite(high), networks=sum(len(contest.runs[run]) for run in runs),
        per_label={name: value for (name, _), value in zip(contest.labels.targets, by_target, strict=True)},
        seconds=_seconds(contest, costs, runs), fold_seconds=_seconds(contest, costs, runs, all_folds=False),
        plain_dice=alone.plain_dice, plain_seconds=alone.plain and alone.plain.network + alone.plain.other)
    return candidate.model_copy(update={"cost": cost_line(candidate)})


def cost_line(candidate: Candidate) -> str:
    """What each way of using a candidate gives and costs, cheapest first, in one line.

    The Dice of several folds together cannot be measured out of fold: every fold's network has seen the other folds' cases.
    """
    dice, parts = candidate.foreground_mean_dice, []
    if candidate.plain_dice is not None and candidate.plain_seconds is not None:
        parts.append(f"one fold, no mirroring: {candidate.plain_dice:.3f} at {_time(candidate.plain_seconds)}")
    if dice is not None and candidate.fold_seconds is not None and candidate.seconds is not None:
        several = len(candidate.runs) > 1
        parts.append(f"one fold{' of each' if several else ''}: {dice:.3f} at {_time(candidate.fold_seconds)}")
        if candidate.networks > len(candidate.runs):
            what = f"all {candidate.networks} networks" if several else f"{candidate.networks} folds"
            parts.append(f"{what}: not less than about {dice:.3f}, at about {_time(candidate.seconds)}")
    return "; ".join(parts) or f"{candidate.networks} network{'s' if candidate.networks > 1 else ''} per image"


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
