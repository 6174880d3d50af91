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

from autoseg.stages.figures import DARK, FILL, PALETTE, colour, window
from autoseg.stages.report_page import Drawing
from autoseg.types.geometry import NO_DEPTH_MM, Vector

Points = NDArray[np.float64]

EDGE_PIXELS = 480  # the longer side of a picture
JPEG_QUALITY = 86
SMOOTH = 0.35  # pixels that a simplified outline may be off
MARGIN = 0.5  # of what is marked, shown around it on each side
LEAST_SHARE = 0.45  # of the image that is always shown
CT_WIDTH = 400.0  # HU, the usual soft-tissue window; never narrower
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
    """One plane of a case: a picture (y, x) or (y, x, 3) uint8, the outlines on it, and where it lies."""

    plane: str
    slice: int
    slices: int
    picture: NDArray[np.uint8]
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
    """The slice that shows most of all labels and of what is wrong, each counted by its share of its fullest slice."""
    others = tuple(a for a in range(3) if a != axis)
    reference, prediction = scene.reference_zyx[box], scene.prediction_zyx[box]
    score = np.zeros(reference.shape[axis])
    for mark in [*((reference == v) | (prediction == v) for v in values), reference != prediction]:
        area = np.count_nonzero(mark, axis=others)
        if area.max():
            score += np.sqrt(area / area.max())
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
    scale = size[0] / reference.shape[0], size[1] / reference.shape[1]
    outlines = [Outline(position, kind, lines) for position, value in enumerate(values)
                for kind, mask in (("reference", reference == value), ("prediction", prediction == value))
                if (lines := outline(mask, scale))]
    name = PLANES[axis] if scene.reference_zyx.shape[0] > 1 else "image"
    return View(name, index + (box[axis].start or 0), scene.reference_zyx.shape[axis], picture, outlines)


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


def outline(mask_yx: NDArray[np.bool_], scale_yx: tuple[float, float]) -> list[Points]:
    """The borders of a mask as closed lines of (x, y), in pixels of a picture `scale_yx` times as large; [] when it is empty."""
    from skimage.measure import approximate_polygon, find_contours

    if not mask_yx.any():
        return []
    lines = []
    for line in find_contours(np.pad(mask_yx.astype(np.float32), 1), 0.5):
        pixels = (line - 0.5) * np.asarray(scale_yx)  # the centre of the first voxel lies at half a voxel
        lines.append(np.asarray(approximate_polygon(pixels, SMOOTH)[:, ::-1], np.float64))
    return lines


def drawing_of_view(view: View, case: str, names: Sequence[str], has_image: bool) -> Drawing:
    """A view as inline SVG: the picture, references filled, predictions outlined, each in its label's colour."""
    height, width = view.picture.shape[:2]
    parts = []
    for kind in ("reference", "prediction"):
        for one in (o for o in view.outlines if o.kind == kind):
            path = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line) + "Z" for line in one.lines)
            tint = colour(one.label)
            style = f'fill="{tint}" fill-opacity="{FILL + 0.1:.2f}" fill-rule="evenodd"' if kind == "reference" else (
                f'fill="none" stroke="{tint}" stroke-width="1.8"')
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

    columns = max(len(views) for _, views in rows)
    inches = 7.0 / 3
    heights = [inches * max(v.picture.shape[0] / v.picture.shape[1] for v in views) for _, views in rows]
    heights = [min(h, 1.6 * inches) + 0.25 for h in heights]
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(inches * columns, sum(heights) + 0.4), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for r, (title, views) in enumerate(rows):
            for c, view in enumerate(views):
                axes = figure.add_subplot(grid[r, c], facecolor=DARK)
                _draw_view(axes, view)
                if not c:
                    axes.set_title(title, fontsize=7, loc="left")
        used = sorted({o.label for _, views in rows for view in views for o in view.outlines})[: 2 * len(PALETTE)]
        handles = [Patch(facecolor=(*_rgb(colour(i)), 0.4), edgecolor=colour(i), label=names[i]) for i in used]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncol=min(4, len(handles)), frameon=False, fontsize=7)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=300)


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
        line = Line.make_compound_path(*(Line(points, closed=True) for points in one.lines))
        filled = one.kind == "reference"
        tint = _rgb(colour(one.label))
        axes.add_patch(PathPatch(line, facecolor=(*tint, FILL + 0.1) if filled else "none",
                                 edgecolor="none" if filled else tint, linewidth=0.9))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
