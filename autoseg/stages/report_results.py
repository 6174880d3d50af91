"""The report's sections about results: the headline, values per label with intervals, spread over cases, groups, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median

from autoseg.stages.evaluate import lesion_table
from autoseg.stages.report_page import Charts, Facts, Folded, Section, Table, Text, trim
from autoseg.stages.report_pictures import Chart, Strip, drawing_of, scatter_chart, short, strip_chart
from autoseg.types.report import METRICS, NOT_STATED, CaseMetrics, Report, Value

MAIN = ("dice", "nsd", "hd95", "assd", "sensitivity", "precision", "volume_error")
SHOWN_CHARTS = ("dice", "nsd", "hd95", "volume_error")
TITLES = {
    "dice": "Dice", "iou": "IoU", "sensitivity": "sensitivity", "specificity": "specificity", "precision": "precision",
    "volume_error": "volume error", "volume_error_abs": "volume error, absolute", "volume_error_ml": "volume error, ml",
    "hd": "HD, mm", "hd95": "HD95, mm", "assd": "ASSD, mm", "nsd": "NSD", "lesion_recall": "lesion recall",
    "lesion_precision": "lesion precision", "lesion_f1": "lesion F1", "lesion_false_positives": "false lesions per case",
}
EXPLAINED = {
    "dice": "Overlap with the reference, from 0 (none) to 1 (identical).",
    "nsd": "Share of the surfaces that lie within the tolerance of one another.",
    "hd95": "95 % of the surfaces lie nearer to one another than this.",
    "volume_error": "Too large on the right, too small on the left of zero.",
}
READ = "In the charts, points are cases, boxes the middle half of them with the median, diamonds the mean with its 95 % interval."
MOST_CASES = 400
SEVERAL = 1.5  # lesions per case and label, on average, from which on lesions are told first
MILLIMETRES = ("hd", "hd95", "assd")


def number(name: str, value: Value) -> str:
    """A metric's value as text."""
    if value is None or not math.isfinite(value):
        return "-"
    if name in MILLIMETRES or name == "volume_error_ml":
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:+.1%}" if name == "volume_error" else f"{value:.2f}" if name.endswith("positives") else f"{value:.3f}"


def between(name: str, interval: tuple[float, float] | None) -> str:
    """An interval as text; empty without one."""
    return "" if interval is None else f"{number(name, interval[0])} to {number(name, interval[1])}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names in a sentence."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def case_score(case: CaseMetrics, name: str = "dice") -> float:
    """A case's mean over the labels in which the metric is defined; NaN where it is in none."""
    values = [float(v) for row in case.metrics.values() if (v := row.get(name)) is not None]
    return fmean(values) if values else math.nan


def ranked(report: Report) -> list[CaseMetrics]:
    """The cases that have a Dice, worst first."""
    return sorted((c for c in report.cases if math.isfinite(case_score(c))), key=lambda c: (case_score(c), c.case))


def counted(count: int, name: str) -> str:
    """A number of things: `1 case`, `2 cases`."""
    return f"{count} {name}{'' if count == 1 else 's'}"


def headline(report: Report, unseen: bool) -> str:
    """The result in one sentence: what, how good, with its interval, on how many patients."""
    labels, dice = list(report.mean), report.foreground_mean.get("dice")
    whom = counted(report.patients, "patient")
    if report.patients != len(report.cases):
        whom = f"{counted(len(report.cases), 'case')} of {whom}"
    that = " that the networks had not seen" if unseen else ""
    if dice is None:
        return f"On {whom}{that} no Dice is defined: neither masks nor references hold {listed(labels) or 'any label'}."
    interval = between("dice", report.foreground_intervals.get("dice"))
    bounds = f"95 % interval {interval}" if interval else "no interval: it takes two patients"
    return (f"On {whom}{that}, the masks of {listed(labels)} reach a mean Dice of {dice:.3f} ({bounds}).")


def lead(report: Report) -> list[str]:
    """What else must be known at first sight: the spread, what was missed."""
    scores = [case_score(case) for case in ranked(report)]
    lines = []
    if len(scores) > 3:
        worst = ranked(report)[0]
        low, high = scores[len(scores) // 4], scores[(3 * len(scores)) // 4]
        lines.append(f"Half of the cases lie between {low:.3f} and {high:.3f}, the median is {median(scores):.3f}; the worst, "
                     f"{worst.case}, has {scores[0]:.3f}.")
    missed = {label: count for label, count in report.empty.items() if count.missed}
    spurious = {label: count for label, count in report.empty.items() if count.spurious}
    if missed:
        lines.append("Missed altogether: " + "; ".join(
            f"{label} in {count.missed} of the {counted(count.missed + _present(report, label), 'case')} that hold it"
            for label, count in list(missed.items())[:6]) + ".")
    elif report.cases:
        lines.append("No structure was missed altogether in any case.")
    if spurious:
        lines.append("Found where there is none: " + "; ".join(
            f"{label} in {counted(count.spurious, 'case')}" for label, count in list(spurious.items())[:6]) + ".")
    return lines


def _present(report: Report, label: str) -> int:
    return sum(bool(c.metrics.get(label, {}).get("n_reference")) and bool(c.metrics[label].get("n_prediction"))
               for c in report.cases)


def tiles(report: Report, further: Sequence[tuple[str, str, str]] = ()) -> Facts:
    """The numbers at the top."""
    names = {"dice": "mean Dice", "nsd": "mean NSD", "hd95": "mean HD95"}
    rows = []
    for name, title in names.items():
        value = report.foreground_mean.get(name)
        if value is not None:
            unit = " mm" if name in MILLIMETRES else ""
            interval = between(name, report.foreground_intervals.get(name))
            rows.append((title, number(name, value) + unit, f"95 %: {interval}" if interval else "no interval"))
    rows.append(("patients", str(report.patients), counted(len(report.cases), "case")))
    return Facts([*rows, *further], tiles=True)


def results(report: Report, source: str) -> tuple[Section, list[Chart]]:
    """Values per label with their intervals, the spread over cases as charts, lesions, and all metrics folded away."""
    charts = [chart for name in SHOWN_CHARTS if (chart := _spread(report, name)) is not None]
    if (volumes := _volumes(report)) is not None:
        charts.append(volumes)
    lesions = lesion_table(report)
    several = _several(report)
    table = Table(lesions, "Lesions by size over all cases: in the reference, found, in the prediction, false.", 2)
    blocks: list[object] = [
        Table(trim(_per_label(report)), "Means over cases; below each its 95 % interval over patients."),
        Text(_undefined(report)), Text(READ), Charts([drawing_of(chart) for chart in charts])]
    if several:
        blocks.append(table)
    blocks.append(Folded("All metrics", [Table(_all_metrics(report), "Mean of each metric, with its 95 % interval.")]))
    if len(lesions) > 1 and not several:
        blocks.append(Folded("Connected components by size", [table]))
    blocks.append(Folded(f"All cases ({len(report.cases)}), worst first", [_case_table(report)]))
    return Section("results", "Results", blocks, source), charts


def _several(report: Report) -> bool:
    """Whether cases hold several lesions of some label, so that counting them says something."""
    counts = (sum(size.reference for size in classes.values()) for classes in report.lesions.values())
    return any(count > SEVERAL * len(report.cases) for count in counts)


def _per_label(report: Report) -> list[list[str]]:
    names = [name for name in MAIN if report.foreground_mean.get(name) is not None]
    if _several(report) and report.foreground_mean.get("lesion_f1") is not None:
        names.append("lesion_f1")
    rows = [["label", *(TITLES[name] for name in names), "absent", "missed", "spurious"]]
    for label, values in report.mean.items():
        empty = report.empty.get(label)
        counts = [str(n) for n in (empty.absent, empty.missed, empty.spurious)] if empty else ["-"] * 3
        cells = [_with_interval(name, values.get(name), report.intervals.get(label, {}).get(name)) for name in names]
        rows.append([label, *cells, *counts])
    if len(report.mean) > 1:
        cells = [_with_interval(name, report.foreground_mean.get(name), report.foreground_intervals.get(name)) for name in names]
        rows.append(["mean of the labels", *cells, "-", "-", "-"])
    return rows


def _with_interval(name: str, value: Value, interval: tuple[float, float] | None) -> str:
    return number(name, value) + (f"\n{between(name, interval)}" if interval and value is not None else "")


def _undefined(report: Report) -> str:
    """What the last columns say, and over how many cases a mean goes that is not over all."""
    count = len(report.cases)
    few = [f"{label} {TITLES[name]} {report.defined[label][name]}" for label in report.mean for name in ("dice", "hd95")
           if 0 < report.defined.get(label, {}).get(name, count) < count]
    told = f" Means over fewer than all {count} cases: {'; '.join(few[:8])}{'; ...' if len(few) > 8 else ''}." if few else ""
    return ("Absent: cases in which a label is in neither mask; missed: in the reference only; spurious: in the prediction only. "
            "A surface distance is undefined where either mask is empty, and such cases are counted here instead." + told)


def _all_metrics(report: Report) -> list[list[str]]:
    labels = list(report.mean)
    rows = [["metric", *labels, "mean of the labels"]]
    for name in METRICS:
        if name in report.foreground_mean:
            cells = [_with_interval(name, report.mean[label].get(name), report.intervals.get(label, {}).get(name))
                     for label in labels]
            whole = _with_interval(name, report.foreground_mean[name], report.foreground_intervals.get(name))
            rows.append([TITLES.get(name, name), *cells, whole])
    return rows


def _case_table(report: Report) -> Table:
    cases = ranked(report)[:MOST_CASES]
    labels = list(report.mean)[:12]
    rows = [["case", *(["mean Dice"] if len(labels) > 1 else []), *(f"{short(label)} Dice" for label in labels), "HD95, mm"]]
    for case in cases:
        dice = [number("dice", case.metrics.get(label, {}).get("dice")) for label in labels]
        rows.append([case.case, *([f"{case_score(case):.3f}"] if len(labels) > 1 else []), *dice,
                     number("hd95", case_score(case, "hd95"))])
    more = f" The other {len(report.cases) - len(cases)} cases are in report.csv." if len(cases) < len(report.cases) else ""
    return Table(rows, f"report.csv holds every metric of every case and label.{more}")


def _values(report: Report, label: str, name: str) -> list[float]:
    return [math.nan if (v := case.metrics.get(label, {}).get(name)) is None else float(v) for case in report.cases]


def _spread(report: Report, name: str) -> Chart | None:
    """One metric's spread over cases, label by label; of Dice the worst case is named."""
    rows = []
    for position, label in enumerate(report.mean):
        factor = 100 if name == "volume_error" else 1
        values = [factor * v for v in _values(report, label, name)]
        found = [(v, case.case) for v, case in zip(values, report.cases, strict=True) if math.isfinite(v)]
        named = (min(found)[1], min(found)[0]) if name == "dice" and len(found) > 3 and len(report.mean) <= 6 else None
        interval = report.intervals.get(label, {}).get(name)
        rows.append(Strip(label, values, position, interval and (factor * interval[0], factor * interval[1]), named))
    upper = 1.02 if name in ("dice", "nsd") else None
    title = TITLES[name].removesuffix(", mm")
    label = "volume error, % of the reference" if name == "volume_error" else TITLES[name]
    return strip_chart(f"spread-{name}", title[:1].upper() + title[1:], rows, label, EXPLAINED[name], limits=(None, upper),
                       zero=name == "volume_error")


def _volumes(report: Report) -> Chart | None:
    """Predicted over true volume, in ml."""
    groups = []
    for label in list(report.mean)[:8]:
        true, found = [], []
        for case in report.cases:
            row, size = case.metrics.get(label, {}), voxel_ml(case)
            if size is not None and row.get("n_reference") and row.get("n_prediction"):
                true.append(float(row["n_reference"] or 0) * size)
                found.append(float(row["n_prediction"] or 0) * size)
        groups.append((label, true, found))
    every = [v for _, true, _ in groups for v in true]
    wide = len(every) > 1 and max(every) > 12 * min(every)
    return scatter_chart(
        "volumes", "Volumes", groups, "reference, ml", "prediction, ml",
        "On the dashed line the volumes are equal; above it, too much was segmented.", log=wide)


def voxel_ml(case: CaseMetrics) -> float | None:
    """Millilitres per voxel, from a label whose volumes differ; None where there is none."""
    for row in case.metrics.values():
        error = row.get("volume_error_ml")
        voxels = (row.get("n_prediction") or 0) - (row.get("n_reference") or 0)
        if error is not None and voxels:
            return float(error) / float(voxels)
    return None


def by_fold(report: Report, folds: Mapping[str, int]) -> Chart | None:
    """Dice of each fold's cases."""
    rows = [Strip(f"fold {fold}", [case_score(c) for c in report.cases if folds.get(c.case) == fold], fold)
            for fold in sorted(set(folds.values()))]
    return strip_chart("folds", "Dice by fold", rows, "mean Dice of a case",
                       "Folds differ by their training cases and by what they are tested on.") if len(rows) > 1 else None


def groups(report: Report, source: str) -> tuple[Section, list[Chart]] | None:
    """Results by site, scanner or any further column; None without such columns."""
    if not report.groups:
        return None
    labels = list(report.mean)
    rows = [["column", "value", "cases", *(f"{label} Dice" for label in labels)]]
    charts: list[Chart] = []
    for column, values in report.groups.items():
        for value, means in values.items():
            rows.append([column, value, str(report.group_cases.get(column, {}).get(value, "")),
                         *(number("dice", means.get(label, {}).get("dice")) for label in labels)])
        parts = [Strip(value, [case_score(c) for c in report.cases if c.attributes.get(column, NOT_STATED) == value])
                 for value in values]
        chart = strip_chart(f"group-{len(charts)}", f"Dice by {column}", parts, "mean Dice of a case",
                            "Points are cases, the diamond is their mean.")
        charts += [chart] if chart else []
    blocks = [Charts([drawing_of(chart) for chart in charts]), Table(rows, "Mean Dice by group of cases.", 2)]
    return Section("groups", "By group", blocks, source), charts


def definitions(report: Report) -> Section:
    """The definitions of all metrics, and the tolerances that were used."""
    used = sorted({case.tolerance_mm for case in report.cases if case.tolerance_mm is not None})
    spread = f"{used[0]:g} mm" if len(used) == 1 else f"{used[0]:g} to {used[-1]:g} mm, by case" if used else "none"
    rows = [(TITLES.get(name, name.replace("_", " ")), text, "") for name, text in report.definitions.items()]
    return Section("definitions", "Definitions", [
        Text(f"Tolerance of NSD: {spread}. Intervals rest on {counted(report.patients, 'patient')}."),
        Folded("How each number is computed", [Facts(rows)])])
