"""The rules that compare cases with one another: a fold, a group of cases, or single cases that are much worse than the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

import numpy as np

from autoseg.arrays.symptoms import Kind
from autoseg.stages.symptom_rules import LEAST_CASES, Sample, rows_of, target_names
from autoseg.types.diagnosis import Evidence, Finding

WORSE_DICE, ALPHA = 0.05, 0.01
GROUP_LEAST = 2  # cases of a fold or group that is compared
OUTLIER_CASES, OUTLIER_DICE, OUTLIER_TARGET_DICE = 5, 0.1, 0.3
FENCES = 3.0  # interquartile ranges below the lower quartile (Tukey 1977: far out)


@dataclass(frozen=True)
class Cohorts:
    """What the comparison of cases found, what there were too few cases to tell, and the cases it explains."""

    findings: tuple[Finding, ...]
    untold: tuple[str, ...]
    explained: frozenset[str]


@dataclass(frozen=True)
class _Part:
    """A fold or a group: the column it is of ("fold", "site"), its value, and its cases."""

    column: str
    value: str
    cases: frozenset[str]


def compare_cases(samples: Sequence[Sample], mended: Mapping[str, Sequence[Kind]]) -> Cohorts:
    """Find bad folds, shifted groups and outlier cases; errors of the kinds in `mended` (by target) do not count.

    A case's score is the mean, over the labels it holds, of its Dice less the median Dice of that label.
    """
    residuals = _residuals(samples, mended)
    scores = {case: float(np.mean(list(by_target.values()))) for case, by_target in residuals.items() if by_target}
    columns, untold = _columns(samples, scores)
    worse = _worse_parts(columns, scores)
    inside = frozenset(case for part in worse for case in part.cases)
    rest = {case: score for case, score in scores.items() if case not in inside}
    findings = [_part_finding(part, scores, worse) for part in worse]
    outliers: list[str] = []
    if len(rest) < OUTLIER_CASES:
        untold.append(f"outlier cases: {len(rest)} cases, {OUTLIER_CASES} are needed")
    else:
        outliers = _outliers(rest, residuals)
        if outliers:
            findings.append(_outlier_finding(outliers, rest, samples))
    return Cohorts(tuple(findings), tuple(untold), inside | frozenset(outliers))


def _residuals(samples: Sequence[Sample], mended: Mapping[str, Sequence[Kind]]) -> dict[str, dict[str, float]]:
    residuals: dict[str, dict[str, float]] = {sample.case: {} for sample in samples}
    for target in target_names(samples):
        dice = {s.case: t.dice(mended.get(target, ())) or 0.0 for s, t in rows_of(samples, target)}
        if len(dice) >= LEAST_CASES:
            usual = median(dice.values())
            for case, value in dice.items():
                residuals[case][target] = value - usual
    return residuals


def _columns(samples: Sequence[Sample], scores: Mapping[str, float]) -> tuple[dict[str, list[_Part]], list[str]]:
    """Folds and the parts of each group column that can be compared, and what cannot."""
    values: dict[str, dict[str, str]] = {"fold": {s.case: str(s.fold) for s in samples if s.fold is not None}}
    for column in sorted({c for s in samples for c in s.groups}):
        values[column] = {s.case: s.groups[column] for s in samples if s.groups.get(column)}
    columns: dict[str, list[_Part]] = {}
    untold: list[str] = []
    for column, by_case in values.items():
        members: dict[str, set[str]] = {}
        for case, value in by_case.items():
            if case in scores:
                members.setdefault(value, set()).add(case)
        if len(members) < 2 or (column != "fold" and len(members) > len(by_case) / GROUP_LEAST):
            continue  # one value says nothing, and a column of names is no grouping
        known = sum(map(len, members.values()))
        parts = [_Part(column, value, frozenset(cases)) for value, cases in sorted(members.items())]
        able = [p for p in parts if len(p.cases) >= GROUP_LEAST and 1 / comb(known, len(p.cases)) <= ALPHA / len(parts)]
        if able:
            columns[column] = able
        if len(able) < len(parts):
            small = ", ".join(f"{p.value} ({len(p.cases)})" for p in parts if p not in able)
            untold.append(f"whether a {column} is worse than the others: too few cases in {small} of {known}")
    return columns, untold


def _gap(part: _Part, scores: Mapping[str, float], without: Iterable[str] = ()) -> float:
    """How much lower the median score of a part is than that of all other cases."""
    dropped = set(without)
    inside = [scores[c] for c in part.cases - dropped if c in scores]
    outside = [score for case, score in scores.items() if case not in part.cases and case not in dropped]
    return median(outside) - median(inside) if inside and outside else 0.0


def _is_worse(part: _Part, scores: Mapping[str, float], tests: int, without: Iterable[str] = ()) -> bool:
    """Whether a part is worse by 0.05 Dice and more than chance (Mann-Whitney, corrected for the parts compared)."""
    from scipy.stats import mannwhitneyu

    dropped = set(without)
    inside = [scores[c] for c in part.cases - dropped if c in scores]
    outside = [score for case, score in scores.items() if case not in part.cases and case not in dropped]
    if min(len(inside), len(outside)) < GROUP_LEAST or _gap(part, scores, dropped) < WORSE_DICE:
        return False
    return float(mannwhitneyu(inside, outside, alternative="less").pvalue) <= ALPHA / tests


def _worse_parts(columns: Mapping[str, Sequence[_Part]], scores: Mapping[str, float]) -> list[_Part]:
    """Folds and groups that are worse; of two that overlap only those that remain so without the other's cases.

    Two that explain one another equally (a fold that is a site) both stay.
    """
    worse = [(p, len(parts)) for parts in columns.values() for p in parts if _is_worse(p, scores, len(parts))]
    kept = []
    for part, tests in worse:
        rivals = [(other, n) for other, n in worse if other != part and other.column != part.column and other.cases & part.cases]
        beaten = any(
            not _is_worse(part, scores, tests, other.cases) and _is_worse(other, scores, n, part.cases) for other, n in rivals)
        if not beaten:
            kept.append(part)
    return kept


def _part_finding(part: _Part, scores: Mapping[str, float], worse: Sequence[_Part]) -> Finding:
    fold = part.column == "fold"
    causes = []
    for other in worse:
        shared = len(other.cases & part.cases)
        if other.column != part.column and shared:
            causes.append(f"{shared} of its {len(part.cases)} cases are of {other.column} {other.value}")
    ordered = sorted((c for c in part.cases if c in scores), key=lambda c: scores[c])
    return Finding(
        symptom="bad_fold" if fold else "shifted_group", target=f"{part.column} {part.value}", causes=tuple(causes),
        cases=tuple(ordered[:5]), evidence=(
            Evidence(quantity="Dice below that of all other cases, medians", value=_gap(part, scores),
                     rule=f"{WORSE_DICE} or more, by more than chance",
                     source=f"one-sided Mann-Whitney test, p at most {ALPHA} over the number of {part.column}s compared"),
            Evidence(quantity="cases in it", value=len(part.cases), rule=f"of {len(scores)}", source=""),
        ))


def _outliers(scores: Mapping[str, float], residuals: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Cases far below the others in the mean, or in one label, worst first."""
    found = dict.fromkeys(_below(scores, OUTLIER_DICE))
    for target in dict.fromkeys(t for by_target in residuals.values() for t in by_target):
        own = {case: residuals[case][target] for case in scores if target in residuals[case]}
        if len(own) >= OUTLIER_CASES:
            found |= dict.fromkeys(_below(own, OUTLIER_TARGET_DICE))
    return sorted(found, key=lambda case: (scores[case], case))


def _below(scores: Mapping[str, float], least: float) -> list[str]:
    values = np.asarray(list(scores.values()))
    quarter, middle, three = np.percentile(values, (25, 50, 75))
    fence = min(quarter - FENCES * (three - quarter), middle - least)
    return [case for case, score in scores.items() if score <= fence]


def _outlier_finding(outliers: Sequence[str], scores: Mapping[str, float], samples: Sequence[Sample]) -> Finding:
    usual = median(scores.values())
    return Finding(
        symptom="outlier_cases", cases=tuple(outliers), evidence=(
            Evidence(quantity="Dice below the median case, worst", value=usual - scores[outliers[0]],
                     rule=f"{OUTLIER_DICE} or more (in one label {OUTLIER_TARGET_DICE}) and far below the others",
                     source=f"{FENCES:g} interquartile ranges below the lower quartile (Tukey 1977: far out)"),
            Evidence(quantity="cases", value=len(outliers), rule=f"of {len(samples)}", source=""),
        ))
