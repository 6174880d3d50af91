"""Compare several sets of masks on the same cases: paired differences with intervals and tests, and how firm their order is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.intervals import mean_intervals
from autoseg.arrays.statistics import holm, paired_difference, ranking_stability
from autoseg.errors import DatasetError
from autoseg.files.workspace import Workspace, save_record
from autoseg.logs import SILENT, Reporter
from autoseg.stages.compare_figure import comparison_figure
from autoseg.stages.evaluate import References, evaluate, find_masks, find_references
from autoseg.stages.outcome import find_outcome
from autoseg.types.comparison import MEAN, Comparison, Contender, PairedResult, Ranking
from autoseg.types.report import Report

Floats = NDArray[np.float64]
Tables = Mapping[tuple[str, str], Floats]  # scores (contenders, cases) by label and metric

DISTANCES = ("hd", "hd95", "assd")  # lower is better
COMPARED = ("dice", "nsd", "hd95")
RULES = (
    "Only cases that every contender and the reference have are compared; differences are first less second, case by case.",
    "Where a label is in neither reference nor mask, Dice and NSD count as 1 if another contender found something there, else "
    "the case does not count for that label.",
    "HD95 is undefined where a mask is empty; such cases do not count in its differences, and are counted as undefined.",
    "A case's mean of the labels goes over the labels in which both compared contenders are defined, for the order all of them.",
    "Intervals: 95 % bootstrap over patients. Tests: sign flips of patients' differences, two-sided, corrected for their number "
    "(Holm) among the means of the labels, and among the single labels.",
)


@dataclass(frozen=True)
class Source:
    """Masks of one contender by case; a work folder brings its references."""

    name: str
    path: Path
    masks: dict[str, Path]
    references: References | None = None


def compare(
    sources: Sequence[Path | str], reference: Path | None = None, out: Path | None = None, nsd_tolerance_mm: float | None = None,
    threads: int = 2, reporter: Reporter = SILENT,
) -> Comparison:
    """Compare two or more sets of masks; with `out` comparison.json and comparison.png are written into that folder.

    sources: work folders (their selected out-of-fold masks), runs of a work folder (WORK/runs/NAME), or folders of masks of any
    tool; `NAME=PATH` gives one a name. reference: a folder of masks, a manifest or a work folder; None takes that of the first
    work folder. Raises DatasetError when fewer than two are given, references are missing or no case is common to all, and what
    `evaluate` raises.
    """
    found = find_sources(sources)
    truth = _truth(found, reference)
    common = [case for case in sorted(truth.masks) if all(case in one.masks for one in found)]
    if not common:
        counts = ", ".join(f"{one.name} {len(one.masks)}" for one in found)
        raise DatasetError(f"no case is common to all: references {len(truth.masks)}, {counts}; files belong together by name")
    wanted = {case: truth.masks[case] for case in common}
    reports = [
        evaluate({case: one.masks[case] for case in common}, wanted, truth.labels, nsd_tolerance_mm, threads, reporter,
                 cases=truth.cases)
        for one in found
    ]
    tables = _tables(reports, common)
    patients = [case.patient or case.case for case in reports[0].cases]
    comparison = Comparison(
        contenders=tuple(_contender(i, one, tables, patients) for i, one in enumerate(found)),
        reference=str(reference or next(one.path for one in found if one.references is not None)), cases=tuple(common),
        patients=len(set(patients)), metrics=COMPARED, rules=RULES,
        left_out={one.name: len(one.masks) - len(common) for one in found if len(one.masks) > len(common)},
        differences=_differences([one.name for one in found], tables, patients),
        rankings=_rankings([one.name for one in found], tables, patients),
        scores={metric: {one.name: _by_case(common, mean_of_labels(tables, metric, [i])[0]) for i, one in enumerate(found)}
                for metric in COMPARED})
    if out is not None:
        save_record(out / "comparison.json", comparison)
        comparison_figure(out / "comparison.png", comparison)
    return comparison


def find_sources(sources: Sequence[Path | str]) -> list[Source]:
    """The masks of each source, each with a name of its own. Raises DatasetError and RunError when there are none."""
    if len(sources) < 2:
        raise DatasetError(f"a comparison takes two or more work folders or folders of masks, found {len(sources)}")
    given = [_named(source) for source in sources]
    names = _names(given)
    found = []
    for name, (_, path) in zip(names, given, strict=True):
        if (path / "plan.json").is_file():
            outcome, references = find_outcome(Workspace(path)), find_references(path)
            found.append(Source(name, path, outcome.masks, references))
        elif path.parent.name == "runs" and (path.parent.parent / "plan.json").is_file():
            work = path.parent.parent
            found.append(Source(name, path, find_outcome(Workspace(work), path.name).masks, find_references(work)))
        else:
            masks = find_masks(path)
            if not masks:
                raise DatasetError(f"{path} holds no masks; expected a work folder, a run of one (WORK/runs/NAME), or masks")
            found.append(Source(name, path, masks))
    return found


def _named(source: Path | str) -> tuple[str, Path]:
    """The name that was given, if any, and the folder."""
    text = str(source)
    name, equals, rest = text.partition("=")
    if equals and name and not Path(text).exists():
        return name, Path(rest).absolute()
    return "", Path(text).absolute()


def _names(given: Sequence[tuple[str, Path]]) -> list[str]:
    """Names that differ: as given, else the shortest end of the path that tells a folder from all others."""
    names = []
    for position, (name, path) in enumerate(given):
        others = [other for i, (_, other) in enumerate(given) if i != position]
        length = 1
        while length < len(path.parts) and any(other.parts[-length:] == path.parts[-length:] for other in others):
            length += 1
        names.append(name or "/".join(path.parts[-length:]))
    if len(set(names)) < len(names):
        raise DatasetError(f"the same name or folder is given twice: {', '.join(names)}; give names: NAME=PATH")
    return names


def _truth(found: Sequence[Source], reference: Path | None) -> References:
    if reference is not None:
        given = find_references(reference)
        if given.labels is None:
            labels = next((one.references.labels for one in found if one.references is not None), None)
            return References(given.masks, labels, given.cases, given.part)
        return given
    for one in found:
        if one.references is not None:
            return one.references
    raise DatasetError("none of these is a work folder, so the references are not known; give them: --reference DIR")


def _tables(reports: Sequence[Report], cases: Sequence[str]) -> Tables:
    """The scores of all labels, NaN where undefined; see RULES."""
    labels = list(dict.fromkeys(label for report in reports for label in report.mean))
    rows = [{case.case: case.metrics for case in report.cases} for report in reports]
    tables: dict[tuple[str, str], Floats] = {}
    for metric in COMPARED:
        for label in labels:
            table = np.array([[_number(row[case].get(label, {}).get(metric)) for case in cases] for row in rows])
            if metric not in DISTANCES:
                told = np.isfinite(table).any(0)
                table = np.where(told & ~np.isfinite(table), 1.0, table)
            tables[label, metric] = table
    return tables


def mean_of_labels(tables: Tables, metric: str, chosen: Sequence[int]) -> Floats:
    """Scores (chosen, cases): the mean over the labels in which all chosen contenders are defined; NaN where there is none."""
    stack = np.stack([table[list(chosen)] for (_, name), table in tables.items() if name == metric])
    shared = np.isfinite(stack).all(1, keepdims=True)
    counts = shared.sum(0)
    means: Floats = np.where(counts > 0, np.where(shared, stack, 0.0).sum(0) / np.maximum(counts, 1), np.nan)
    return means


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _by_case(cases: Sequence[str], values: Floats) -> dict[str, float | None]:
    return {case: _value(value) for case, value in zip(cases, values.tolist(), strict=True)}


def _value(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _contender(position: int, source: Source, tables: Tables, patients: Sequence[str]) -> Contender:
    mean: dict[str, dict[str, float | None]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    own = {(MEAN, metric): mean_of_labels(tables, metric, [position])[0] for metric in COMPARED}
    own |= {key: table[position] for key, table in tables.items()}
    for (target, metric), row in own.items():
        mean.setdefault(target, {})[metric] = float(np.nanmean(row)) if np.isfinite(row).any() else None
        low, high = mean_intervals(row[:, None], patients)[0].tolist()
        if math.isfinite(low):
            intervals.setdefault(target, {})[metric] = (low, high)
    undefined = {}
    for metric in COMPARED:
        lacking = [np.isfinite(tables[label, "dice"]).any(0) & ~np.isfinite(table[position])
                   for (label, name), table in tables.items() if name == metric]
        if count := int(np.any(lacking, 0).sum()):
            undefined[metric] = count
    return Contender(name=source.name, source=str(source.path), masks=len(source.masks), mean=mean, intervals=intervals,
                     undefined=undefined)


def _differences(names: Sequence[str], tables: Tables, patients: Sequence[str]) -> tuple[PairedResult, ...]:
    """All pairs in all metrics and targets, p-values corrected among means and among labels."""
    results = []
    labels = list(dict.fromkeys(label for label, _ in tables))
    for target in [MEAN, *labels]:
        for metric in COMPARED:
            for a, b in combinations(range(len(names)), 2):
                pair = mean_of_labels(tables, metric, (a, b)) if target == MEAN else tables[target, metric][[a, b]]
                d = paired_difference(pair[0], pair[1], patients)
                gain = -d.mean if metric in DISTANCES else d.mean
                better = "" if not math.isfinite(gain) or gain == 0 else names[a] if gain > 0 else names[b]
                results.append(PairedResult(
                    first=names[a], second=names[b], target=target, metric=metric, mean=_value(d.mean), low=_value(d.low),
                    high=_value(d.high), p_value=d.p_value, p_holm=d.p_value, cases=d.cases, better=better))
    corrected: dict[int, float] = {}
    for kind in (True, False):
        places = [i for i, result in enumerate(results) if (result.target == MEAN) == kind]
        corrected |= dict(zip(places, holm([results[i].p_value for i in places]), strict=True))
    return tuple(result.model_copy(update={"p_holm": corrected[i]}) for i, result in enumerate(results))


def _rankings(names: Sequence[str], tables: Tables, patients: Sequence[str]) -> tuple[Ranking, ...]:
    rankings = []
    for metric in COMPARED:
        table = mean_of_labels(tables, metric, range(len(names)))
        if not np.isfinite(table).all(0).any():
            continue
        found = ranking_stability((-table if metric in DISTANCES else table).T, groups=patients)
        order = sorted(range(len(names)), key=lambda i: (int(found.ranks[i]), names[i]))
        rankings.append(Ranking(
            metric=metric, order=tuple(names[i] for i in order), tau=found.tau, tau_low=found.tau_low,
            shares={name: tuple(map(float, found.shares[i])) for i, name in enumerate(names)},
            cases=int(np.isfinite(table).all(0).sum())))
    return tuple(rankings)


def comparison_table(comparison: Comparison) -> list[list[str]]:
    """Paired differences as rows of text, a heading first: the means of the labels, then the single labels."""
    rows = [["first", "second", "metric", "target", "first less second", "95 % interval", "p (Holm)", "cases", "better"]]
    for d in comparison.differences:
        form = "+.2f" if d.metric in DISTANCES else "+.4f"
        mean = "-" if d.mean is None else f"{d.mean:{form}}" + (" mm" if d.metric in DISTANCES else "")
        interval = "-" if d.low is None or d.high is None else f"{d.low:{form}} to {d.high:{form}}"
        told = f"{d.better}" if d.p_holm < 0.05 else "not told apart"
        rows.append([d.first, d.second, d.metric, d.target, mean, interval, f"{d.p_holm:.2g}", str(d.cases), told])
    return rows


def comparison_facts(comparison: Comparison) -> list[str]:
    """The means of each contender, the order in each metric with how firm it is, and what had to be left out."""
    lines = [f"{len(comparison.cases)} cases of {comparison.patients} patients, references of {comparison.reference}"]
    for one in comparison.contenders:
        values = []
        for metric, value in one.mean.get(MEAN, {}).items():
            if value is not None:
                form = ".2f" if metric in DISTANCES else ".4f"
                bounds = one.intervals.get(MEAN, {}).get(metric)
                values.append(f"{metric} {value:{form}}" + (f" ({bounds[0]:{form}} to {bounds[1]:{form}})" if bounds else ""))
        undefined = "".join(f"; {metric} undefined in {count} cases" for metric, count in one.undefined.items())
        lines.append(f"{one.name}: {', '.join(values)}{undefined}")
    for ranking in comparison.rankings:
        first = ranking.order[0]
        leads = f"{first} leads in {ranking.shares[first][0]:.0%} of draws"
        lines.append(f"order by {ranking.metric}: {', '.join(ranking.order)}; {leads}, rank correlation {ranking.tau:.2f} "
                     f"(5th percentile {ranking.tau_low:.2f})")
    return [*lines, *(f"{name}: {count} further cases are not compared, since not all have them"
                      for name, count in comparison.left_out.items())]
