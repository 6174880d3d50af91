"""Pictures: image, truth and prediction side by side, and the learning curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoseg.types.geometry import NO_DEPTH_MM, Vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart for colour-blind readers on grey images (after Okabe and Ito 2008, the darkest brightened)
PALETTE = ("#56B4E9", "#F0705A", "#F0E442", "#2EE6A8", "#E69F00", "#E58FD0", "#8C9EFF", "#B8E986")
DARK, PANEL, TEXT, FAINT = "#0e1116", "#161b22", "#e6edf3", "#8b949e"
DPI, LOWEST_DPI = 130, 40
FILL = 0.26  # opacity of a label's area
COLUMN_INCHES = 3.1


@dataclass(frozen=True)
class OverlayRow:
    """One row of an overlay figure: a case in LPS orientation.

    `image_zyx` is one channel of any number type; `truth_zyx` and `prediction_zyx` hold label values 0, 1, 2, ... on the same
    grid. `dice` (by label name) is shown beside the names when given.
    """

    case: str
    image_zyx: NDArray[Any]
    truth_zyx: NDArray[Any] | None
    prediction_zyx: NDArray[Any] | None
    spacing_zyx_mm: Vector
    caption: str = ""
    dice: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Cut:
    """One plane of a volume: the axis it is perpendicular to, its index, and the height of a pixel over its width."""

    axis: int
    index: int
    aspect: float
    name: str

    def of(self, volume_zyx: NDArray[Any]) -> NDArray[Any]:
        """The plane as a picture: in LPS, the patient's front or head up and left on the right."""
        plane: NDArray[Any] = np.take(volume_zyx, self.index, axis=self.axis)
        return plane[::-1] if self.axis == 1 else plane


def choose_cuts(row: OverlayRow) -> list[Cut]:
    """The slices to show: where the labels are best seen, axial and, when the volume is deep enough, coronal.

    A slice counts each label by the share of its largest slice that it shows, so that small structures are not missed.
    """
    marks = row.truth_zyx if row.truth_zyx is not None and np.any(row.truth_zyx) else row.prediction_zyx
    shape, (dz, dy, dx) = row.image_zyx.shape, row.spacing_zyx_mm
    cuts = [Cut(0, _best_slice(marks, 0, shape[0]), dy / dx, "axial")]
    if shape[0] > 1 and dz < NO_DEPTH_MM:
        height_mm, width_mm = shape[0] * dz, shape[2] * dx
        if shape[0] >= 16 and height_mm > 0.3 * width_mm:
            cuts.append(Cut(1, _best_slice(marks, 1, shape[1]), dz / dx, "coronal"))
    return cuts


def _best_slice(marks_zyx: NDArray[Any] | None, axis: int, length: int) -> int:
    if marks_zyx is None or not np.any(marks_zyx):
        return length // 2
    others = tuple(a for a in range(3) if a != axis)
    score = np.zeros(length)
    for value in np.unique(marks_zyx[marks_zyx > 0]):
        area = np.count_nonzero(marks_zyx == value, axis=others)
        score += np.sqrt(area / area.max())
    return int(np.argmax(score))


def window(image_zyx: NDArray[Any]) -> tuple[float, float]:
    """Darkest and brightest shown value: percentiles 1 and 99.5 of what is not background, whatever the unit."""
    finite = image_zyx[np.isfinite(image_zyx)]
    if not finite.size:
        return 0.0, 1.0
    values = finite[finite != finite.min()]
    low, high = (float(v) for v in np.percentile(values if values.size else finite, (1, 99.5)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def overlay_figure(
    path: Path, rows: Sequence[OverlayRow], label_names: Mapping[int, str] | Sequence[str], max_bytes: int = 200_000,
) -> None:
    """Write a PNG with one row per case: image, truth and prediction, each label in its own colour, with a legend.

    `label_names` names the label values (a sequence names 1, 2, ...). The resolution is lowered until the file has at most
    `max_bytes`. Raises ValueError when there are no rows or the arrays of a row differ in shape.
    """
    from matplotlib.figure import Figure

    names = dict(label_names) if isinstance(label_names, Mapping) else {i + 1: name for i, name in enumerate(label_names)}
    if not rows:
        raise ValueError("an overlay figure needs at least one row")
    for row in rows:
        for other in (row.truth_zyx, row.prediction_zyx):
            if row.image_zyx.ndim != 3 or (other is not None and other.shape != row.image_zyx.shape):
                raise ValueError(f"{row.case}: image, truth and prediction must be z, y, x arrays of one shape")
    lines = [(row, cut, i == 0) for row in rows for i, cut in enumerate(choose_cuts(row))]
    heights = [_height(row, cut) + (0.42 if first else 0.06) for row, cut, first in lines]
    used = {"image": True, "truth": any(r.truth_zyx is not None for r in rows),
            "prediction": any(r.prediction_zyx is not None for r in rows)}
    columns = [title for title, shown in used.items() if shown]
    legend_columns = 4 if len(columns) > 1 else 2
    footer = 0.3 + 0.24 * -(-len(names) // legend_columns)
    width, height = COLUMN_INCHES * len(columns), sum(heights) + footer + 0.3
    figure = Figure(figsize=(width, height), facecolor=DARK)
    top = height - 0.3
    for i, title in enumerate(columns):
        place = ((i + 0.5) / len(columns), 1 - 0.19 / height)
        figure.text(*place, title, color=TEXT, fontsize=12, ha="center", va="center", weight="bold")
    for (row, cut, first), tall in zip(lines, heights, strict=True):
        top -= tall
        if first:
            _caption(figure, row, names, (top + tall - 0.22) / height)
        arrays = {"image": None, "truth": row.truth_zyx, "prediction": row.prediction_zyx}
        for i, title in enumerate(columns):
            box = (i / len(columns) + 0.004, (top + 0.03) / height, 1 / len(columns) - 0.008, _height(row, cut) / height)
            missing = title != "image" and arrays[title] is None
            _panel(figure.add_axes(box), row, cut, arrays[title], missing, names)
    _legend(figure, names, legend_columns, 0.12 / height)
    _save(figure, path, max_bytes, _shades(len(names)))


def _height(row: OverlayRow, cut: Cut) -> float:
    plane = cut.of(row.image_zyx)
    return float(np.clip(COLUMN_INCHES * plane.shape[0] * cut.aspect / plane.shape[1], 0.25 * COLUMN_INCHES, 1.5 * COLUMN_INCHES))


def _caption(figure: Figure, row: OverlayRow, names: Mapping[int, str], y: float) -> None:
    figure.text(0.012, y, row.case, color=TEXT, fontsize=10.5, va="center", weight="bold")
    details = row.caption
    if row.dice:
        scores = [f"{name} {row.dice[name]:.2f}" for name in names.values() if name in row.dice and np.isfinite(row.dice[name])]
        others = [f"{name} {value:.2f}" for name, value in row.dice.items() if name not in names.values() and np.isfinite(value)]
        details = (details + "   " if details else "") + "Dice  " + "   ".join(scores + others)
    figure.text(0.988, y, details, color=FAINT, fontsize=9, va="center", ha="right")


def colour(position: int) -> str:
    """The colour of the label at `position` (0, 1, ...) of the names."""
    return PALETTE[position % len(PALETTE)]


def _panel(
    axes: Axes, row: OverlayRow, cut: Cut, labels_zyx: NDArray[Any] | None, missing: bool, values: Mapping[int, str],
) -> None:
    from matplotlib.colors import to_rgba

    axes.set_axis_off()
    plane = cut.of(row.image_zyx)
    low, high = window(row.image_zyx)
    height, width = plane.shape
    axes.imshow(plane, cmap="gray", vmin=low, vmax=high, aspect=cut.aspect, interpolation="bicubic")
    if missing:
        axes.text(0.5, 0.5, "none", color=FAINT, fontsize=11, ha="center", transform=axes.transAxes)
    if labels_zyx is not None:
        marks = cut.of(labels_zyx)
        for position, value in enumerate(values):
            mask = marks == value
            if not mask.any():
                continue
            tint = to_rgba(colour(position))
            filled = np.zeros((*mask.shape, 4))
            filled[mask] = (*tint[:3], FILL)
            axes.imshow(filled, aspect=cut.aspect, interpolation="nearest")
            outline = np.pad(mask.astype(float), 1)  # so that structures cut off by the border are closed
            axes.contour(np.arange(-1, width + 1), np.arange(-1, height + 1), outline, [0.5], colors=[tint], linewidths=1.3)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _legend(figure: Figure, names: Mapping[int, str], columns: int, y: float) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=to_rgba(colour(i), 0.45), edgecolor=colour(i), linewidth=1.5, label=name)
               for i, name in enumerate(names.values())]
    if handles:
        figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, y), ncol=min(columns, len(handles)),
                      frameon=False, fontsize=10, labelcolor=TEXT, handlelength=1.3, columnspacing=2.2, borderaxespad=0)


def _save(figure: Figure, path: Path, max_bytes: int, shades: NDArray[np.uint8] | None = None) -> None:
    """Save a PNG of at most `max_bytes`, at the highest resolution (from DPI down) that allows it, atomically.

    With `shades` (colours, RGB) every pixel takes the nearest of these colours, which makes the file a third as large.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    from autoseg.files.workspace import atomic_path

    FigureCanvasAgg(figure)
    dpi = float(DPI)
    while True:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="rgba", dpi=dpi)
        size_xy = (int(figure.get_figwidth() * dpi), int(figure.get_figheight() * dpi))
        picture = Image.frombuffer("RGBA", size_xy, buffer.getvalue()).convert("RGB")
        if shades is not None:
            palette = Image.new("P", (1, 1))
            palette.putpalette(shades.tobytes())
            picture = picture.quantize(palette=palette, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        picture.save(buffer, format="png", optimize=True, dpi=(dpi, dpi))
        size = buffer.tell()
        if size <= max_bytes or dpi <= LOWEST_DPI:
            break
        dpi = max(LOWEST_DPI, dpi * min(0.95, (max_bytes / size) ** 0.55))
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _shades(labels: int) -> NDArray[np.uint8]:
    """At most 256 colours (n, 3) that overlays consist of: greys, each label's colour, and that colour laid over greys."""
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(colour(i)) for i in range(min(labels, len(PALETTE)))]).reshape(-1, 1, 3)
    fixed = np.array([to_rgb(name) for name in (DARK, TEXT, FAINT)])
    finest = int(np.clip(190 // max(len(colours), 1) - 6, 14, 32))
    fills, edges = (np.linspace(0, 1, count).reshape(1, -1, 1) for count in (finest, 5))
    mixed = [FILL * colours + (1 - FILL) * fills, 0.62 * colours + 0.38 * edges, colours]
    mixtures = np.concatenate([part.reshape(-1, 3) for part in mixed])
    greys = np.linspace(0, 1, 256 - len(fixed) - len(mixtures))[:, None].repeat(3, 1)
    return np.asarray(np.round(255 * np.concatenate([fixed, mixtures, greys])), np.uint8)


def progress_figure(path: Path, epochs: Sequence[Mapping[str, object]], midway: Sequence[Mapping[str, object]] = ()) -> None:
    """Write a PNG with the learning curves of a run: loss, pseudo Dice per class, learning rate and seconds per epoch.

    `epochs` are rows of metrics.jsonl (`epoch, train_loss, val_loss, pseudo_dice, learning_rate, seconds`; missing or
    non-finite values leave gaps; `pseudo_dice` is a list, or a mapping from class names). `midway` are rows of midway.jsonl
    (`epoch, mean`), whose Dice over whole cases is drawn as diamonds in the colours of the classes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 9.0), facecolor=DARK)
    loss, dice, rate = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 3, 2]})
    at = [_number(row.get("epoch", i)) for i, row in enumerate(epochs)]
    style: dict[str, Any] = {"marker": "o" if len(epochs) < 15 else None, "markersize": 3}

    def column(key: str) -> list[float]:
        return [_number(row.get(key)) for row in epochs]

    for key, name, tint in (("train_loss", "training", PALETTE[0]), ("val_loss", "validation", PALETTE[1])):
        loss.plot(at, column(key), color=tint, label=name, linewidth=1.6, **style)
    for position, (name, values) in enumerate(_pseudo_dice(epochs).items()):
        noisy = len(at) > 30
        faint = {"alpha": 0.4} if noisy else {"label": name}
        dice.plot(at, values, color=colour(position), linewidth=1.0, **faint, **style)
        if noisy:
            dice.plot(at, _smoothed(values), color=colour(position), label=name, linewidth=1.8)
    looks = [_number(row.get("epoch")) for row in midway]
    for position, (name, values) in enumerate(_whole_case_dice(midway, list(_pseudo_dice(epochs))).items()):
        dice.plot(looks, values, color=colour(position), linestyle=":", marker="D", markersize=4, linewidth=1.0,
                  markeredgecolor=TEXT, markeredgewidth=0.5, label=f"{name}, whole cases")
    dice.set_ylim(-0.02, 1.02)
    rate.plot(at, column("learning_rate"), color=PALETTE[4], linewidth=1.6, label="learning rate", **style)
    seconds = rate.twinx()
    seconds.plot(at, column("seconds"), color=PALETTE[6], linewidth=1.1, alpha=0.8, label="seconds per epoch", **style)
    finite = [s for s in column("seconds") if np.isfinite(s)]
    seconds.set_ylim(0, 1.25 * max(finite, default=1) or 1)
    _dress(loss, "loss")
    _dress(dice, "pseudo Dice\n(over random patches,\nnot whole cases)")
    _dress(rate, "learning rate")
    _dress(seconds, "seconds per epoch", grid=False)
    rate.set_xlabel("epoch", color=TEXT)
    for axes, where in ((loss, "upper right"), (dice, "lower right")):
        if epochs:
            axes.legend(loc=where, frameon=False, fontsize=9, labelcolor=TEXT, ncol=1 + len(axes.get_lines()) // 12)
    lines = [*rate.get_lines(), *seconds.get_lines()]
    rate.legend(lines, [str(line.get_label()) for line in lines], loc="lower left", frameon=False, fontsize=9, labelcolor=TEXT)
    figure.subplots_adjust(left=0.13, right=0.9, top=0.975, bottom=0.065, hspace=0.09)
    figure.align_ylabels([loss, dice, rate])
    _save(figure, path, 200_000)


def _dress(axes: Axes, label: str, grid: bool = True) -> None:
    axes.set_facecolor(PANEL)
    axes.set_ylabel(label, color=TEXT, fontsize=9.5)
    axes.tick_params(colors=FAINT, labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_color("#30363d")
    if grid:
        axes.grid(color="#30363d", linewidth=0.6)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _pseudo_dice(epochs: Sequence[Mapping[str, object]]) -> dict[str, list[float]]:
    """Pseudo Dice by class name, one value (or NaN) per epoch."""
    table: dict[str, list[float]] = {}
    for place, row in enumerate(epochs):
        found = row.get("pseudo_dice")
        pairs: list[tuple[str, object]] = []
        if isinstance(found, Mapping):
            pairs = [(str(name), value) for name, value in found.items()]
        elif isinstance(found, Sequence) and not isinstance(found, str):
            pairs = [(f"class {i + 1}", value) for i, value in enumerate(found)]
        for name, value in pairs:
            table.setdefault(name, [float("nan")] * len(epochs))[place] = _number(value)
    return table


def _whole_case_dice(midway: Sequence[Mapping[str, object]], names: Sequence[str]) -> dict[str, list[float]]:
    """Mean Dice over whole cases by class name, one value (or NaN) per row; first the classes `names`, in their order."""
    rows = [_mapping(row.get("mean")) for row in midway]
    found = dict.fromkeys([*names, *(str(name) for row in rows for name in row)]) if rows else {}
    return {name: [_number(_mapping(row.get(name)).get("dice")) for row in rows] for name in found}


def _mapping(value: object) -> Mapping[Any, object]:
    return value if isinstance(value, Mapping) else {}


def _smoothed(values: Sequence[float]) -> NDArray[np.float64]:
    """Exponential moving average that holds its value over gaps (weight 0.9, as nnU-Net draws it)."""
    result = np.full(len(values), np.nan)
    last = float("nan")
    for i, value in enumerate(values):
        if np.isfinite(value):
            last = value if np.isnan(last) else 0.9 * last + 0.1 * value
        result[i] = last
    return result


