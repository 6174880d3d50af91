"""The figure of a comparison: cases of all contenders, paired differences with intervals, and how often each takes each rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autoseg.stages.report_pictures import DPI, INK, LINE, MUTED, SEED, dress, series, short
from autoseg.types.comparison import MEAN, Comparison, PairedResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DISTANCES = ("hd", "hd95", "assd")
METRIC_NAMES = {"dice": "Dice", "nsd": "NSD", "hd95": "HD95, mm"}
MOST_LINES = 80  # cases that are joined by lines
MOST_PAIRS = 12
SURE = 0.05


def comparison_figure(path: Path, comparison: Comparison) -> None:
    """Write a PNG of 300 dpi with a column per metric: cases, differences, ranks."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from autoseg.files.workspace import atomic_path

    names = [one.name for one in comparison.contenders]
    metrics = [metric for metric in comparison.metrics if any(d.metric == metric and d.cases for d in comparison.differences)]
    metrics = metrics or list(comparison.metrics[:1])
    targets = list(dict.fromkeys(d.target for d in comparison.differences))
    pairs = [d for d in comparison.differences if d.target == MEAN or len(names) == 2]
    rows = min(MOST_PAIRS, len([d for d in pairs if d.metric == metrics[0]]))
    heights = [0.9 + 0.42 * len(names), 0.8 + 0.34 * rows, 0.7 + 0.34 * len(names)]
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(4.2 * len(metrics), sum(heights) + 0.9), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(_title(comparison), fontsize=10, color=INK, x=0.01, ha="left")
        grid = figure.add_gridspec(3, len(metrics), height_ratios=heights)
        for column, metric in enumerate(metrics):
            _cases(figure.add_subplot(grid[0, column]), comparison, metric, names, column == 0)
            own = [d for d in pairs if d.metric == metric]
            _differences(figure.add_subplot(grid[1, column]), own, len(targets) > 1, column == 0)
            _ranks(figure.add_subplot(grid[2, column]), comparison, metric, names, column == 0)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)


def _title(comparison: Comparison) -> str:
    who = f"{len(comparison.cases)} cases of {comparison.patients} patients, the same for all"
    return (f"{who}. Boxes: quartiles; diamonds: means;\nbars: 95 % intervals; p: corrected for all "
            "comparisons; black: told apart from zero.")


def _cases(axes: Axes, comparison: Comparison, metric: str, names: list[str], named: bool) -> None:
    """Every case of every contender, those of one case joined; box: quartiles, diamond: mean."""
    scores = comparison.scores[metric]
    table = np.array([[math.nan if (v := scores[name][case]) is None else v for case in comparison.cases] for name in names])
    jitter = np.random.default_rng(SEED).uniform(-0.16, 0.16, len(comparison.cases))
    places = np.arange(len(names))[:, None] + jitter
    if len(comparison.cases) <= MOST_LINES:
        axes.plot(table, places, color=LINE, linewidth=0.6, zorder=1)
    for place, row in enumerate(table):
        values = row[np.isfinite(row)]
        axes.scatter(row, places[place], s=8, color=series(place), alpha=0.7, linewidths=0, zorder=2)
        if len(values) > 3:
            low, middle, high = np.percentile(values, (25, 50, 75))
            axes.barh(place, high - low, 0.56, low, facecolor="none", edgecolor=INK, linewidth=0.9, zorder=3)
            axes.plot([middle, middle], [place - 0.28, place + 0.28], color=INK, linewidth=1.4, zorder=3)
        if len(values):
            axes.plot([values.mean()], [place], "D", color="white", markeredgecolor=INK, markersize=4.5, zorder=4)
    _rows(axes, names, named)
    _few_ticks(axes)
    dress(axes, x=f"{METRIC_NAMES.get(metric, metric)}, mean of the labels")
    axes.grid(False, axis="y")


def _differences(axes: Axes, pairs: list[PairedResult], targets: bool, named: bool) -> None:
    """Paired differences with their intervals; black where they are told from zero after correction."""
    shown = pairs[:MOST_PAIRS]
    labels = []
    for place, d in enumerate(shown):
        pair = f"{short(d.first, 14)} − {short(d.second, 14)}"
        labels.append(pair if len({(p.first, p.second) for p in shown}) > 1 else short(d.target, 20) if targets else pair)
        if d.mean is None:
            continue
        tint = INK if d.p_holm < SURE else MUTED
        if d.low is not None and d.high is not None:
            axes.plot([d.low, d.high], [place, place], color=tint, linewidth=2)
        axes.plot([d.mean], [place], "o", color=tint, markersize=5)
        axes.annotate(f"p {d.p_holm:.2g}", (d.mean, place - 0.16), fontsize=7, color=MUTED, ha="center", va="bottom")
    axes.axvline(0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    _rows(axes, labels, named)
    _few_ticks(axes)
    only = len({(p.first, p.second) for p in shown}) == 1
    which = f", {short(shown[0].first, 14)} − {short(shown[0].second, 14)}" if only else ""
    side = "below" if shown and shown[0].metric in DISTANCES else "above"
    dress(axes, x=f"difference{which} (first better: {side} 0)")
    axes.grid(False, axis="y")


def _ranks(axes: Axes, comparison: Comparison, metric: str, names: list[str], named: bool) -> None:
    """Share of bootstrap draws of patients in which each contender takes each rank."""
    ranking = next((r for r in comparison.rankings if r.metric == metric), None)
    if ranking is None:
        axes.set_axis_off()
        return
    for place, name in enumerate(names):
        left = 0.0
        for rank, share in enumerate(ranking.shares[name]):
            shade: Any = (0.06, 0.25, 0.42, max(0.08, 0.95 - 0.9 * rank / max(len(names) - 1, 1)))
            axes.barh(place, share, 0.6, left, color=shade, edgecolor="white", linewidth=0.6)
            if share > 0.08:
                axes.text(left + share / 2, place, f"{rank + 1}.", fontsize=8, ha="center", va="center",
                          color="white" if shade[3] > 0.5 else INK)
            left += share
    _rows(axes, names, named)
    dress(axes, x=f"share of draws at each rank (rank correlation {ranking.tau:.2f})")
    axes.set_xlim(0, 1)
    axes.grid(False)


def _few_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.use_sticky_edges = False
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _rows(axes: Axes, labels: list[str], named: bool) -> None:
    axes.set_yticks(range(len(labels)), [short(label, 30) for label in labels] if named else [])
    axes.set_ylim(len(labels) - 0.45, -0.62)
