"""Charts of the report: each is drawn once, and given as inline SVG in the page's colours and as PNG for a paper."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoseg.stages.figures import PALETTE
from autoseg.stages.report_page import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

INK, MUTED, LINE, PAPER = "#101418", "#5b6470", "#d3d9e0", "#fefefd"  # drawn with these; the page puts its own in their place
SERIES = ("#0072b2", "#c8452f", "#a07f00", "#00835c", "#b36b01", "#b0489a", "#4f5bd5", "#5b8a1e")
COLOURS_OF_PAGE = tuple(zip(SERIES, PALETTE, strict=True))  # the same hues for light and dark surroundings, as in overlays
WIDTH, DPI = 4.7, 300
MOST_POINTS = 1500  # in one chart; more become a picture inside the SVG
MOST_ROWS = 30
NAME_LENGTH = 24
SEED = 0


@dataclass(frozen=True)
class Chart:
    """A chart: file name, title, how it is read, what it shows, and how it is drawn into axes of `height` inches."""

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[Axes], None]
    height: float = 2.6


@dataclass(frozen=True)
class Strip:
    """One row of a strip chart: values with their mean and its interval, and the name of a point worth naming."""

    name: str
    values: Sequence[float]
    colour: int = 0
    interval: tuple[float, float] | None = None
    named: tuple[str, float] | None = None
    show_mean: bool = True


@dataclass(frozen=True)
class Curve:
    """A line: x and y, its name, its colour, and how it is drawn."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False
    dashed: bool = False
    points: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def series(position: int) -> str:
    """The colour of the series or label at `position`."""
    return SERIES[position % len(SERIES)]


def short(name: str, length: int = NAME_LENGTH) -> str:
    """A name that fits beside a chart."""
    return name if len(name) <= length else name[: length - 1] + "…"


def strip_chart(
    name: str, title: str, rows: Sequence[Strip], label: str, caption: str, log: bool = False,
    limits: tuple[float | None, float | None] = (None, None), zero: bool = False,
) -> Chart | None:
    """Values as points, with a box of the quartiles and the mean with its interval; None when there is no value."""
    kept = [row for row in rows if any(math.isfinite(v) and (v > 0 or not log) for v in row.values)][:MOST_ROWS]
    if not kept:
        return None
    left_out = len(rows) - len(kept)
    points = sum(len(row.values) for row in kept)
    rng = np.random.default_rng(SEED)

    def draw(axes: Axes) -> None:
        for place, row in enumerate(kept):
            values = np.array([v for v in row.values if math.isfinite(v) and (v > 0 or not log)])
            height = rng.uniform(-0.26, 0.26, len(values)) if len(values) > 3 else np.zeros(len(values))
            axes.scatter(values, place + height, s=7 if points < 300 else 4, color=series(row.colour), alpha=0.55, linewidths=0,
                         rasterized=points > MOST_POINTS, zorder=2)
            if len(values) > 3:
                low, middle, high = np.percentile(values, (25, 50, 75))
                axes.barh(place, high - low, 0.62, low, facecolor="none", edgecolor=INK, linewidth=0.9, zorder=3)
                axes.plot([middle, middle], [place - 0.31, place + 0.31], color=INK, linewidth=1.4, zorder=3)
            if row.interval is not None:
                axes.plot(row.interval, [place, place], color=INK, linewidth=2.6, solid_capstyle="butt", zorder=4)
            if row.show_mean and len(values):
                axes.plot([values.mean()], [place], "D", color=PAPER, markeredgecolor=INK, markersize=4.5, zorder=5)
            if row.named is not None:
                text, value = row.named
                side = "right" if value > (values.min() + values.max()) / 2 else "left"
                axes.annotate(short(text, 20), (value, place + 0.33), fontsize=7, color=MUTED, ha=side, va="top")
        if log:
            axes.set_xscale("log")
            plain_log(axes.xaxis)
        if zero:
            axes.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
        axes.set_xlim(*limits)
        axes.set_yticks(range(len(kept)), [short(row.name) for row in kept])
        axes.set_ylim(len(kept) - 0.45, -0.55)
        dress(axes, x=label)
        axes.grid(False, axis="y")

    alt = "; ".join(_strip_in_words(row) for row in kept[:12])
    note = f" {left_out} more rows are left out." if left_out and len(rows) > MOST_ROWS else ""
    return Chart(name, title, caption + note, f"{title}. {label}: {alt}.", draw, 0.9 + 0.42 * len(kept))


def _strip_in_words(row: Strip) -> str:
    values = np.array([v for v in row.values if math.isfinite(v)])
    low, middle, high = (f"{v:.3g}" for v in (values.min(), float(np.median(values)), values.max()))
    return f"{row.name} median {middle}, from {low} to {high}, {len(values)} values"


def line_chart(
    name: str, title: str, curves: Sequence[Curve], x: str, y: str, caption: str, limits: tuple[float, float] | None = None,
    height: float = 2.7, diagonal: bool = False,
) -> Chart | None:
    """Curves over a common axis; None when no curve has a finite value."""
    kept = [curve for curve in curves if np.isfinite(np.asarray(curve.y, np.float64)).any()]
    if not kept:
        return None

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        if diagonal:
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        for curve in kept:
            few = len(curve.x) < 15
            axes.plot(curve.x, curve.y, color=series(curve.colour), linewidth=1.0 if curve.faint else 1.7,
                      alpha=0.45 if curve.faint else 1.0, linestyle="--" if curve.dashed else "-",
                      marker="o" if few or curve.points else None, markersize=3, label=curve.name or None)
        if limits:
            axes.set_ylim(*limits)
        if x == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        dress(axes, x, y)
        named = [curve for curve in kept if curve.name]
        if len(named) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncol=1 + len(named) // 7, handlelength=1.4)

    ends = "; ".join(f"{curve.name or 'curve'} ends at {_last(curve.y):.3g}" for curve in kept if curve.name)
    return Chart(name, title, caption, f"{title}. {y} over {x}: {ends}.", draw, height)


def _last(values: Sequence[float]) -> float:
    return [v for v in values if math.isfinite(v)][-1]


def scatter_chart(
    name: str, title: str, groups: Sequence[tuple[str, Sequence[float], Sequence[float]]], x: str, y: str, caption: str,
    log: bool = False, height: float = 3.3,
) -> Chart | None:
    """Points of one quantity over another in the same unit, with the line on which they are equal; None without points."""
    kept = []
    for position, (label, xs, ys) in enumerate(groups):
        pairs = np.array([(a, b) for a, b in zip(xs, ys, strict=True) if math.isfinite(a) and math.isfinite(b) and
                          (not log or min(a, b) > 0)], np.float64).reshape(-1, 2)
        if len(pairs):
            kept.append((position, label, pairs))
    if not kept:
        return None
    every = np.concatenate([pairs for *_, pairs in kept])
    low, high = float(every.min()), float(every.max())

    def draw(axes: Axes) -> None:
        for position, label, pairs in kept:
            axes.scatter(pairs[:, 0], pairs[:, 1], s=9, color=series(position), alpha=0.6, linewidths=0, label=short(label, 18),
                         rasterized=len(every) > MOST_POINTS)
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            plain_log(axes.xaxis)
            plain_log(axes.yaxis)
        dress(axes, x, y)
        if 1 < len(kept) <= 8:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK, handletextpad=0.2)

    return Chart(name, title, caption, f"{title}. {len(every)} points, {y} over {x}.", draw, height)


def plain_log(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    wide = low > 0 and high / low > 30
    axis.set_major_locator(LogLocator(10, (1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def dress(axes: Axes, x: str = "", y: str = "") -> None:
    """The look that all charts share."""
    axes.set_facecolor("none")
    axes.set_xlabel(x, color=INK, fontsize=10)
    axes.set_ylabel(y, color=INK, fontsize=10)
    axes.tick_params(which="both", colors=MUTED, labelcolor=INK, labelsize=9.5, length=3, width=0.7)
    axes.tick_params(which="minor", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.7)
    axes.grid(color=LINE, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)


def drawing_of(chart: Chart) -> Drawing:
    """The chart as inline SVG in the page's colours: no fixed size, no fonts, no names that another chart may have."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, chart.height), facecolor="none", layout="constrained")
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name, "text.parse_math": False}):
        chart.draw(figure.subplots())
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Drawing(inline(buffer.getvalue(), chart.name, chart.alt), chart.title, chart.caption, chart.alt)


def inline(svg: str, prefix: str, alt: str) -> str:
    """An SVG file's text as an element of a page."""
    from html import escape

    body = svg[svg.index("<svg"):]
    box = re.search(r'viewBox="([^"]+)"', body)
    assert box is not None
    body = body[body.index(">") + 1:]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda match: f' id="{prefix}-{match[1]}"' if match[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", body).replace("xlink:href", "href")
    body = re.sub(r"font(?:-family)?: (?:([\d.]+px) )?'DejaVu Sans'[^;\"]*", lambda m: f"font-size: {m[1]}" if m[1] else "", body)
    body = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", body)
    body = re.sub(r"\n\s*", "\n", body)
    own = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--card)"}
    own |= {colour: f"var(--s{i})" for i, colour in enumerate(SERIES)}
    for drawn, wanted in own.items():
        body = body.replace(drawn, wanted)
    return f'<svg role="img" aria-label="{escape(alt, quote=True)}" viewBox="{box[1]}">{body}'.strip()


def save_png(path: Path, charts: Sequence[Chart], columns: int = 2) -> None:
    """Charts side by side as one PNG of 300 dpi on white, atomically, for a paper."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from autoseg.files.workspace import atomic_path

    columns = min(columns, len(charts))
    rows = [charts[i:i + columns] for i in range(0, len(charts), columns)]
    heights = [max(chart.height for chart in row) for row in rows]
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(WIDTH * columns, sum(heights) + 0.25 * len(rows)), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for r, row in enumerate(rows):
            for c, chart in enumerate(row):
                axes = figure.add_subplot(grid[r, c])
                chart.draw(axes)
                axes.set_title(chart.title, fontsize=10, color=INK, loc="left", weight="bold")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)
