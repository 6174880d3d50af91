"""The report's worst, median and best cases: read, cut, drawn with both outlines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autoseg.errors import DatasetError
from autoseg.files.images import compare_grids, read_case, read_label, split_ending
from autoseg.stages.figures import PALETTE, colour
from autoseg.stages.report_overlays import Scene, View, ct_window, drawing_of_view, save_cases, views_of
from autoseg.stages.report_page import CaseCard, Cases, Section, Text
from autoseg.stages.report_results import case_score, number, ranked
from autoseg.types.labels import Labels
from autoseg.types.plan import Plan
from autoseg.types.report import CaseMetrics, Report

WHY = ("worst", "second worst", "third worst", "median", "best")
CT = "CTNormalization"
MOST_SCORES = 12
WIDE = 1.9  # width over height
REPEATED = " Colours occur several times: the name of a label appears when the mouse rests on it."
HOW = ("By mean Dice. Filled: the reference; outlined: the prediction. Where a filled area lies outside the outline, the "
       "prediction misses it. Slices are those that show most of the labels and of what is wrong")
SIDES = "; the patient's right is on the left in axial and coronal planes"


@dataclass(frozen=True)
class CaseSources:
    """Masks, references and images (channels; where known) by case, and how images are shown: a window, or as colours."""

    masks: Mapping[str, Path]
    references: Mapping[str, Path]
    images: Mapping[str, Sequence[Path]]
    labels: Labels
    shown: tuple[float, float] | None = None
    coloured: bool = False


def case_section(path: Path, sources: CaseSources, report: Report, done: Callable[[str], None]) -> Section | None:
    """The cases as a section, and as a figure for a paper at `path`; None where no case has a Dice."""
    names = [label.name for label in sources.labels.foreground]
    cards: list[CaseCard] = []
    rows: list[tuple[str, list[View]]] = []
    solid, seen = False, set[int]()
    for why, case in chosen_cases(report):
        if case.case not in sources.masks or case.case not in sources.references:
            continue
        scene = read_scene(sources, case.case)
        views = views_of(scene, range(1, len(names) + 1), sources.shown)
        has_image, solid = scene.image_zyx is not None, solid or len(views) > 1
        seen |= {one.label for view in views for one in view.outlines}
        drawings = [drawing_of_view(view, case.case, names, has_image) for view in views]
        if max(drawing.ratio for drawing in drawings) > WIDE:  # of one height, the others would be tiny
            drawings = [replace(drawing, ratio=1.0) for drawing in drawings]
        cards.append(CaseCard(case.case, why, _scores(case), drawings))
        rows.append((f"{case.case} ({why}), mean Dice {case_score(case):.3f}", views))
        done(case.case)
    if not cards:
        return None
    save_cases(path, rows, names)
    repeated = REPEATED if len(seen) > len(PALETTE) else ""
    legend = [(names[i], colour(i)) for i in sorted(seen)]
    blocks = [Text(f"{HOW}{SIDES if solid else ''}.{repeated}"), Cases(cards, legend)]
    return Section("cases", "Worst, median and best cases", blocks, short="Cases")


def chosen_cases(report: Report) -> list[tuple[str, CaseMetrics]]:
    """The cases to show with why: the three worst, the one in the middle, the best; fewer where there are few."""
    order = ranked(report)
    places = {place: why for place, why in ((0, WHY[0]), (1, WHY[1]), (2, WHY[2])) if place < len(order)}
    if order:
        places |= {len(order) // 2: WHY[3], len(order) - 1: WHY[4]} if len(order) > 1 else {0: "the only one"}
    return [(why, order[place]) for place, why in sorted(places.items())]


def _scores(case: CaseMetrics) -> list[tuple[str, str]]:
    dice = [(f"Dice {label}", number("dice", row.get("dice"))) for label, row in list(case.metrics.items())[:MOST_SCORES]]
    distance = case_score(case, "hd95")
    mean = [("mean Dice", f"{case_score(case):.3f}")] if len(case.metrics) > 1 else []
    return [*mean, *dice, *([("mean HD95", f"{distance:.2f} mm")] if math.isfinite(distance) else [])]


def read_scene(sources: CaseSources, case: str) -> Scene:
    """A case in LPS: labels as 1, 2, ... in their order, the ignore label as background.

    The first channel is shown; an image on another grid than the reference is left out.
    """
    reference, grid = read_label(sources.references[case])
    prediction, _ = read_label(sources.masks[case])
    count, turn = len(sources.labels.foreground), grid.to_lps()
    masks = []
    for mask in (reference, prediction):
        index = sources.labels.encode(mask)
        masks.append(turn.apply(np.where(index > count, 0, index)))
    image = None
    if case in sources.images:
        found = read_case(list(sources.images[case]))
        if found.array_czyx.shape[1:] == reference.shape and all(d.noise for d in compare_grids(grid, found.grid)):
            turned = turn.apply(found.array_czyx)
            image = np.moveaxis(turned[:3], 0, -1) if sources.coloured and len(turned) >= 3 else turned[0]
    return Scene(case, image, masks[0], masks[1], grid.mapped(turn).spacing)


def window_of(plan: Plan) -> tuple[float, float] | None:
    """For CT, the window that suits what is segmented; other images are shown by their own percentiles (None)."""
    own = next(iter(plan.configurations.values()), None)
    if own is None or own.normalization[0] != CT or not plan.intensities:
        return None
    return ct_window(plan.intensities[0].percentile_00_5, plan.intensities[0].percentile_99_5)


def is_coloured(plan: Plan) -> bool:
    """Whether the channels are the colours of a picture."""
    own = next(iter(plan.configurations.values()), None)
    return own is not None and len(plan.channels) == 3 and all(name.startswith("RGB") for name in own.normalization)


def find_images(folder: Path, cases: Mapping[str, Path]) -> dict[str, list[Path]]:
    """The image of each case in a folder: `CASE.ending`, or the first channel `CASE_0000.ending`.

    Raises DatasetError when there is no such folder.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder of images")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        stem, ending = split_ending(path.name)
        case = stem if stem in cases else stem.removesuffix("_0000")
        if ending and case in cases:
            found.setdefault(case, [path])
    return found
