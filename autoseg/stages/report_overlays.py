"""Cases as pictures: slices through image, reference and prediction, with outlines that stay sharp at any size."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.stages.figures import FILL, PALETTE, colour, window
from autoseg.stages.report_page import Drawing
from autoseg.types.geometry import NO_DEPTH_MM, Vector

Points = NDArray[np.float64]

EDGE_PIXELS = 480  # the longer side of a picture
JPEG_QUALITY = 86
STRAIGHT = 1e-6
MOST_POINTS = 4000  # of a view's outlines; more are painted, which is smaller and faster
MARGIN = 0.5  # of what is marked, shown around it on each side
LEAST_SHARE = 0.45  # of the image that is always shown
ERROR_WEIGHT = 0.5  # of what is wrong, in choosing a slice, beside a label
CT_WIDTH = 400.0  # HU, the usual soft-tissue window; never narrower
PAPER_INCHES, TALLEST_INCHES, TITLE_INCHES, PAPER_DPI = 7.0, 3.2, 0.3, 300
GAP = 0.02  # between planes, of their height
PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Scene:
    """A case in LPS orientation: image (z, y, x) or with colours last (None where unknown), label values of both masks."""

    case: str
    image_zyx: NDArray[Any] | None
    reference_zyx: NDArray[Any]
    prediction_zyx: NDArray[Any]
    spacing_zyx_mm: Vector


@dataclass(frozen=True)
class Outline:
    """The outline of one label in one mask: closed lines of (x, y) in pixels of the picture."""

    label: int
    kind: str
    lines: Sequence[Points]


@dataclass(frozen=True)
class View:
    """One plane of a case: a picture (y, x) or (y, x, 3) uint8, both masks (0, or 1 + label) of its size, their outlines."""

    plane: str
    slice: int
    slices: int
    picture: NDArray[np.uint8]
    masks: dict[str, NDArray[np.intp]]
    outlines: Sequence[Outline]


def views_of(scene: Scene, values: Sequence[int], shown: tuple[float, float] | None = None) -> list[View]:
    """The best slices of a case: one of a 2D image, else three planes.

    values: the label values in the order of their colours. shown: darkest and brightest value; None takes percentiles.
    """
    flat = scene.reference_zyx.shape[0] == 1 or scene.spacing_zyx_mm[0] >= NO_DEPTH_MM
    box = _box(scene)
    lows = shown
    if lows is None and scene.image_zyx is not None and scene.image_zyx.ndim == 3:
        lows = window(np.asarray(scene.image_zyx[box]))
    return [_view(scene, axis, box, values, lows) for axis in ((0,) if flat else (0, 1, 2))]


def ct_window(foreground_low: float, foreground_high: float) -> tuple[float, float]:
    """A window in HU that holds what is segmented (its 0.5 and 99.5 percentiles) with some surroundings."""
    width = max(CT_WIDTH, 1.5 * (foreground_high - foreground_low))
    centre = (foreground_low + foreground_high) / 2
    return centre - width / 2, centre + width / 2


def _box(scene: Scene) -> tuple[slice, slice, slice]:
    """What is shown of the volume: the marked part with a margin, never much less than half of each axis."""
    marked = (scene.reference_zyx != 0) | (scene.prediction_zyx != 0)
    cuts = []
    for axis, length in enumerate(marked.shape):
        hit = np.flatnonzero(marked.any(axis=tuple(a for a in range(3) if a != axis)))
        if not len(hit):
            cuts.append(slice(0, length))
            continue
        low, high = int(hit[0]), int(hit[-1]) + 1
        half = max((high - low) * (0.5 + MARGIN), LEAST_SHARE * length / 2)
        centre = float(np.clip((low + high) / 2, half, max(length - half, half)))
        cuts.append(slice(max(0, int(centre - half)), min(length, int(np.ceil(centre + half)))))
    return cuts[0], cuts[1], cuts[2]


def _best_slice(scene: Scene, axis: int, box: tuple[slice, slice, slice], values: Sequence[int]) -> int:
    """The slice that shows most of all labels, and then of what is wrong, each counted by its share of its fullest slice."""
    others = tuple(a for a in range(3) if a != axis)
    reference, prediction = scene.reference_zyx[box], scene.prediction_zyx[box]
    shown = reference if reference.any() else prediction
    score = np.zeros(reference.shape[axis])
    for mark, weight in [*((shown == v, 1.0) for v in values), (reference != prediction, ERROR_WEIGHT)]:
        area = np.count_nonzero(mark, axis=others)
        if area.max():
            score += weight * np.sqrt(area / area.max())
    return int(np.argmax(score)) if score.any() else len(score) // 2


def _view(
    scene: Scene, axis: int, box: tuple[slice, slice, slice], values: Sequence[int], shown: tuple[float, float] | None,
) -> View:
    index = _best_slice(scene, axis, box, values)

    def plane(volume: NDArray[Any]) -> NDArray[Any]:
        cut: NDArray[Any] = np.take(volume[box], index, axis=axis)
        return cut[::-1] if axis else cut  # head up

    reference, prediction = plane(scene.reference_zyx), plane(scene.prediction_zyx)
    down, across = (scene.spacing_zyx_mm[a] for a in range(3) if a != axis)
    height_mm, width_mm = reference.shape[0] * down, reference.shape[1] * across
    zoom = EDGE_PIXELS / max(height_mm, width_mm)
    size = max(8, round(height_mm * zoom)), max(8, round(width_mm * zoom))
    picture = _picture(None if scene.image_zyx is None else plane(scene.image_zyx), size, shown)
    masks = {"reference": _positions(reference, values), "prediction": _positions(prediction, values)}
    outlines = [Outline(label - 1, kind, lines) for kind, mask in masks.items() for label in np.unique(mask[mask > 0]).tolist()
                if (lines := outline(_at_most(mask, size) == label, size))]
    name = PLANES[axis] if scene.reference_zyx.shape[0] > 1 else "image"
    large = {kind: _resized(mask, size) for kind, mask in masks.items()}
    return View(name, index + (box[axis].start or 0), scene.reference_zyx.shape[axis], picture, large, outlines)


def _positions(mask_yx: NDArray[Any], values: Sequence[int]) -> NDArray[np.intp]:
    """1 + the position of each label value, 0 for all others."""
    found = np.zeros(mask_yx.shape, np.intp)
    for position, value in enumerate(values):
        found[mask_yx == value] = position + 1
    return found


def _resized(mask_yx: NDArray[np.intp], size: tuple[int, int]) -> NDArray[np.intp]:
    """The nearest voxel at each pixel of a picture."""
    rows, columns = ((np.arange(count) + 0.5) * length / count for count, length in zip(size, mask_yx.shape, strict=True))
    return mask_yx[np.ix_(rows.astype(np.intp), columns.astype(np.intp))]


def _at_most(mask_yx: NDArray[np.intp], size: tuple[int, int]) -> NDArray[np.intp]:
    """The mask, no finer than the picture."""
    return _resized(mask_yx, (min(size[0], mask_yx.shape[0]), min(size[1], mask_yx.shape[1])))


def _picture(plane: NDArray[Any] | None, size: tuple[int, int], shown: tuple[float, float] | None) -> NDArray[np.uint8]:
    from PIL import Image

    if plane is None:
        return np.full(size, 24, np.uint8)
    if plane.ndim == 3:
        grey = np.asarray(np.clip(plane, 0, 255), np.uint8)
    else:
        low, high = shown or window(plane)
        finite = np.nan_to_num(np.asarray(plane, np.float32), nan=low, posinf=high, neginf=low)
        grey = np.asarray(np.round(255 * np.clip((finite - low) / (high - low), 0, 1)), np.uint8)
    image = Image.fromarray(np.ascontiguousarray(grey))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def outline(mask_yx: NDArray[np.bool_], size: tuple[int, int]) -> list[Points]:
    """The borders of a mask as closed lines of (x, y), in pixels of a picture of `size` (y, x); [] when it is empty."""
    from skimage import measure

    if not mask_yx.any():
        return []
    library: Any = measure
    lines = []
    for line in library.find_contours(np.pad(mask_yx.astype(np.float32), 1), 0.5):
        steps = np.diff(line, axis=0)
        turns = np.any(np.abs(np.roll(steps, 1, 0) - steps) > STRAIGHT, axis=1)  # points inside a straight part say nothing
        corners = line[:-1][turns] if turns.any() else line[:-1]
        scale = np.asarray(size) / np.asarray(mask_yx.shape)
        lines.append(((corners - 0.5) * scale)[:, ::-1])  # the centre of the first voxel lies at half a voxel
    return lines


def drawing_of_view(view: View, case: str, names: Sequence[str], has_image: bool) -> Drawing:
    """A view as inline SVG: the picture, references filled, predictions outlined, each in its label's colour."""
    height, width = view.picture.shape[:2]
    parts = []
    painted = sum(len(line) for o in view.outlines for line in o.lines) > MOST_POINTS
    for kind in ("reference", "prediction"):
        if painted:
            data = base64.b64encode(_painted(view.masks[kind], kind == "reference")).decode("ascii")
            parts.append(f'<image class="{kind}" width="{width}" height="{height}" href="data:image/png;base64,{data}"/>')
            continue
        for one in (o for o in view.outlines if o.kind == kind):
            path = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line) + "Z" for line in one.lines)
            tint = colour(one.label)
            style = f'fill="{tint}" fill-opacity="{FILL + 0.1:.2f}" fill-rule="evenodd"' if kind == "reference" else (
                f'fill="none" stroke="{tint}" stroke-width="1.7" vector-effect="non-scaling-stroke"')
            parts.append(f'<path class="{kind}" d="{path}" {style}><title>{escape(names[one.label])}, {kind}</title></path>')
    where = f"{view.plane}, slice {view.slice + 1} of {view.slices}" if view.plane != "image" else "image"
    seen = sorted({names[o.label] for o in view.outlines})
    alt = f"{case}, {where}: {', '.join(seen) or 'no label'}; reference filled, prediction outlined"
    label = escape(alt, quote=True)
    if has_image:
        picture = f'<img alt="{label}" width="{width}" height="{height}" src="data:image/jpeg;base64,{_jpeg(view.picture)}">'
        named = 'aria-hidden="true"'
    else:
        picture = f'<span class="blank" style="aspect-ratio: {width} / {height}"></span>'
        named = f'role="img" aria-label="{label}"'
    svg = f'<span class="view">{picture}<svg {named} viewBox="0 0 {width} {height}">{"".join(parts)}</svg></span>'
    return Drawing(svg, where, "", alt, width / height)


def _painted(mask_yx: NDArray[np.intp], filled: bool) -> bytes:
    """A mask as a transparent PNG: its areas, or the pixels along its inner borders, in the labels' colours."""
    from PIL import Image

    shown = mask_yx
    if not filled:
        padded = np.pad(mask_yx, 1)
        around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        shown = np.where(np.any([side != mask_yx for side in around], axis=0), mask_yx, 0)
    alpha = round(255 * (FILL + 0.1)) if filled else 255
    table = [(0, 0, 0, 0), *((*(round(255 * c) for c in _rgb(tint)), alpha) for tint in PALETTE)]
    colours = np.asarray(table, np.uint8)[np.where(shown > 0, (shown - 1) % len(PALETTE) + 1, 0)]
    buffer = io.BytesIO()
    Image.fromarray(colours).quantize(2 * len(PALETTE)).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _jpeg(picture: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="jpeg", quality=JPEG_QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def save_cases(path: Path, rows: Sequence[tuple[str, Sequence[View]]], names: Sequence[str]) -> None:
    """Cases below one another, planes side by side, as one PNG of 300 dpi for a paper, atomically."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from autoseg.files.workspace import atomic_path

    heights = [min(PAPER_INCHES / sum(_ratio(view) + GAP for view in views), TALLEST_INCHES) for _, views in rows]
    used = sorted({o.label for _, views in rows for view in views for o in view.outlines})[: 2 * len(PALETTE)]
    footer = 0.15 + 0.2 * -(-len(used) // 4)
    total = sum(heights) + TITLE_INCHES * len(rows) + footer
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(PAPER_INCHES, total), facecolor="white")
        FigureCanvasAgg(figure)
        top = total
        for (title, views), height in zip(rows, heights, strict=True):
            figure.text(0.004, (top - TITLE_INCHES + 0.06) / total, title, fontsize=7.5, va="bottom")
            top -= TITLE_INCHES + height
            left = 0.0
            for view in views:
                width = height * _ratio(view)
                _draw_view(figure.add_axes((left / PAPER_INCHES, top / total, width / PAPER_INCHES, height / total)), view)
                left += width + GAP * height
        handles = [Patch(facecolor=(*_rgb(colour(i)), 0.4), edgecolor=colour(i), label=names[i]) for i in used]
        if handles:
            figure.legend(handles=handles, loc="lower center", ncol=min(4, len(handles)), frameon=False, fontsize=7.5)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=PAPER_DPI)


def _ratio(view: View) -> float:
    return float(view.picture.shape[1] / view.picture.shape[0])


def _rgb(name: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(name)
    return red, green, blue


def _draw_view(axes: Any, view: View) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Line

    height, width = view.picture.shape[:2]
    axes.imshow(view.picture, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    for one in view.outlines:
        line = Line.make_compound_path(*(Line([*points, points[0]], closed=True) for points in one.lines))
        filled = one.kind == "reference"
        tint = _rgb(colour(one.label))
        face, edge = ((*tint, FILL + 0.1), "none") if filled else ("none", tint)
        patch = PathPatch(line, facecolor=face, edgecolor=edge, linewidth=0.9)
        axes.add_artist(patch).set_clip_path(axes.patch)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
