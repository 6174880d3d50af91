"""One page that tells how good a segmentation is: a work folder's, or that of any folder of masks beside its references."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import numpy as np

from autoseg.errors import AutosegError
from autoseg.files.images import compare_grids, read_case, read_label, split_ending
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace, load_record, save_record, write_text
from autoseg.logs import SILENT, Reporter
from autoseg.stages import report_results as results
from autoseg.stages import report_sections as sections
from autoseg.stages.evaluate import Masks, evaluate, find_masks, find_references, with_intervals
from autoseg.stages.figures import colour
from autoseg.stages.outcome import Outcome, find_outcome, validated_folds
from autoseg.stages.report_overlays import Scene, View, ct_window, drawing_of_view, save_cases, views_of
from autoseg.stages.report_page import CaseCard, Cases, Facts, Page, Section, Text, render
from autoseg.stages.report_pictures import DARK_SERIES, SERIES, Chart, drawing_of, save_png
from autoseg.types.benchmark import Reproduction
from autoseg.types.diagnosis import Diagnosis
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Plan
from autoseg.types.report import CaseMetrics, Report
from autoseg.types.run import EpochRecord, RunRecord
from autoseg.types.trust import Trust

PAGE = "index.html"
WHY = ("worst", "second worst", "third worst", "median", "best")
CT = "CTNormalization"
COLOURS = tuple(zip(SERIES, DARK_SERIES, strict=True))
T = TypeVar("T")


@dataclass(frozen=True)
class _Files:
    """Where the pictures of cases come from: masks and references by case, images (channels) where known, and how to show them."""

    masks: Mapping[str, Path]
    references: Mapping[str, Path]
    images: Mapping[str, Sequence[Path]]
    labels: Labels
    shown: tuple[float, float] | None = None
    colours: bool = False


class _Book:
    """The page as it grows: sections, and the charts of each that are written as figures for a paper."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.sections: list[Section] = []
        self.missing: list[tuple[str, str]] = []

    def add(self, found: Section | tuple[Section, Sequence[Chart]] | None) -> None:
        """Take a section; its charts go to figures/<key>.png."""
        if found is None:
            return
        section, charts = found if isinstance(found, tuple) else (found, ())
        self.sections.append(section)
        if charts:
            save_png(self.out / "figures" / f"{section.key}.png", charts)

    def write(self, title: str, headline: str, lead: Sequence[str], tiles: Facts, made: str) -> Path:
        """Write index.html."""
        page = Page(title, headline, lead, tiles, self.sections, self.missing, made, COLOURS)
        write_text(self.out / PAGE, render(page))
        return self.out / PAGE


def report(workspace: Workspace, out: Path | None = None, reporter: Reporter = SILENT, threads: int = 2) -> Path:
    """Write the page of a work folder (default: report/index.html in it), report.json, report.csv and figures; returns the page.

    Results are those of the selected masks, else of the run with the most finished folds; parts whose records are not there are
    named with the command that makes them. Raises RecordError when this is no work folder or a record is damaged, RunError when
    the selected masks are gone, and what reading images raises.
    """
    plan, dataset = workspace.require().plan(), workspace.dataset()
    folder, book = out or workspace.root / "report", _Book(out or workspace.root / "report")
    work = shlex.quote(workspace.root.name)
    outcome = find_outcome(workspace) if validated_folds(workspace) else None
    with reporter.task("report", 8 + len(WHY), unit="steps") as task:
        record = None if outcome is None else _measured(workspace, outcome, reporter, threads)
        task.advance(note="results")
        if outcome is not None and record is not None:
            save_record(folder / "report.json", record)
            write_csv(folder / "report.csv", record, outcome.folds)
            source = f"From report/report.json, made by: autoseg select {work}" if outcome.selection else "From the runs' validation."
            section, charts = results.results(record, source)
            if (folds := results.by_fold(record, outcome.folds)) is not None:
                charts.append(folds)
                section = _with_drawing(section, folds)
            book.add((section, charts))
            task.advance(note="charts")
            book.add(results.groups(record, "Columns of the data set's manifest, as in report/report.json."))
            files = _Files(outcome.masks, outcome.references, _images(outcome), outcome.labels, _window(plan), _coloured(plan))
            book.add(_pictures(book.out, files, record, lambda case: task.advance(note=case)))
        _told(workspace, book, work)
        task.advance(note="records")
        if workspace.fingerprint_path.exists():
            book.add(sections.data(dataset, workspace.fingerprint(), plan, f"From fingerprint.json, made by: autoseg plan DATASET --out {work}"))
        task.advance(note="data")
        book.add(sections.plan_section(plan, f"From plan.json, made by: autoseg plan DATASET --out {work}; in words: autoseg explain {work}"))
        runs = outcome.runs if outcome is not None else tuple(sorted({p.parent.name for p in workspace.runs.glob("[!._]*/fold_*")}))
        curves, records = _curves(workspace, runs)
        if curves:
            book.add(sections.training(curves, records, f"From runs/*/fold_*/metrics.jsonl, made by: autoseg train {work}"))
        task.advance(note="training")
        if record is not None:
            book.add(results.definitions(record))
        return _write(workspace, book, record, outcome, dataset.name, work)


def _write(
    workspace: Workspace, book: _Book, record: Report | None, outcome: Outcome | None, name: str, work: str,
) -> Path:
    """Headline, first lines and numbers of a work folder's page."""
    if record is None or outcome is None:
        book.missing.insert(0, ("Results and learning curves", f"autoseg train {work}"))
        return book.write(f"{name}: report", "Planned, and not yet trained: there are no results.", [], Facts([], tiles=True), "")
    lines = results.lead(record)
    folds, splits = sorted(set(outcome.folds.values())), workspace.splits()
    lines += sections.trained_note(record, len(outcome.cases), folds, len(splits))
    if outcome.selection is not None and _outdated(workspace):
        lines.append(f"Runs have changed since the selection was made; make it again with: autoseg select {work}")
    further = [("model", outcome.title, f"{len(folds)} fold{'s' if len(folds) != 1 else ''}")] if len(outcome.title) < 24 else []
    chosen = None if outcome.selection is None else next(
        (c for c in outcome.selection.candidates if c.runs == outcome.runs and c.weights == outcome.selection.weights), None)
    if chosen is not None and chosen.seconds is not None:
        further.append(("time per case", sections.duration(chosen.seconds), f"{chosen.networks} networks, where it was selected"))
    lines.append("Every case was segmented by networks that were trained without its patient, so the numbers say what to expect of new "
                 "patients like these; other scanners, sites or diseases must be tested anew.")
    made = datetime.fromtimestamp((workspace.root / "report" / "report.json").stat().st_mtime) if (
        workspace.root / "report" / "report.json").exists() else datetime.now()
    return book.write(f"{name}: {outcome.title}", results.headline(record, unseen=True), lines, results.tiles(record, further),
                      f"Results of {made:%Y-%m-%d}.")


def _with_drawing(section: Section, chart: Chart) -> Section:
    """The section with one more chart beside its others."""
    from dataclasses import replace

    from autoseg.stages.report_page import Charts

    blocks = [Charts([*b.drawings, drawing_of(chart)]) if isinstance(b, Charts) else b for b in section.blocks]
    return replace(section, blocks=blocks)


def _measured(workspace: Workspace, outcome: Outcome, reporter: Reporter, threads: int) -> Report:
    """The metrics of the outcome's masks: as selection or validation left them, else measured now."""
    path, wanted = workspace.root / "report" / "report.json", set(outcome.masks)
    if outcome.selection is not None and path.exists():
        found = load_record(path, Report)
        if {case.case for case in found.cases} == wanted:
            return found if found.intervals else with_intervals(Report.of(found.cases, found.tolerance_mm))
    if outcome.selection is None or not outcome.selection.postprocessing:
        paths = [workspace.fold(run, fold) / "validation" / "report.json" for run in outcome.runs[:1] for fold in set(outcome.folds.values())]
        cases = [case for one in paths for case in load_record(one, Report).cases if case.case in wanted]
        if len(outcome.runs) == 1 and {case.case for case in cases} == wanted:
            return with_intervals(Report.of(cases))
    return evaluate(outcome.masks, outcome.references, outcome.labels, None, threads, reporter, cases=outcome.cases.values())


def _told(workspace: Workspace, book: _Book, work: str) -> None:
    """Sections of the records that are there; the others are named with the command that makes them."""
    root, missing = workspace.root, []

    def told(path: Path, kind: type[T], tell: Callable[[T, str], Section | tuple[Section, Sequence[Chart]]], command: str, what: str) -> None:
        if path.exists():
            name = path.relative_to(root)
            book.add(tell(load_record(path, kind), f"From {name}, made by: {command}"))
        elif what:
            missing.append((what, command))

    from autoseg.types.selection import Selection

    told(root / "trust.json", Trust, sections.trust, f"autoseg select {work}", "Calibration, and how far a mask can be trusted")
    told(root / "report" / "diagnosis.json", Diagnosis, sections.diagnosis, f"autoseg diagnose {work}", "What is wrong and what to try")
    told(workspace.selection_path, Selection, sections.selection, f"autoseg select {work}", "The choice of runs and post-processing")
    told(root / "report" / "reproduction.json", Reproduction, sections.published, "autoseg reproduce NAME --data DIR", "")
    if validated_folds(workspace):
        book.missing += missing


def _outdated(workspace: Workspace) -> bool:
    """Whether a validation is newer than the selection."""
    made = workspace.selection_path.stat().st_mtime
    return any(path.stat().st_mtime > made for path in workspace.runs.glob("[!._]*/fold_*/validation/report.json"))


def _curves(workspace: Workspace, runs: Sequence[str]) -> tuple[dict[str, dict[int, list[EpochRecord]]], dict[str, RunRecord]]:
    """Metrics of every fold of some runs, and one record of each run."""
    curves: dict[str, dict[int, list[EpochRecord]]] = {}
    records: dict[str, RunRecord] = {}
    for run in runs:
        for path in sorted((workspace.runs / run).glob("fold_*")):
            folder = RunFolder(path)
            if (epochs := folder.metrics()) and path.name.removeprefix("fold_").isdigit():
                curves.setdefault(run, {})[int(path.name.removeprefix("fold_"))] = epochs
                if folder.record_path.exists():
                    records[run] = folder.record()
    return curves, records


def _images(outcome: Outcome) -> dict[str, list[Path]]:
    return {case: [Path(path) for path in outcome.cases[case].images] for case in outcome.masks}


def _window(plan: Plan) -> tuple[float, float] | None:
    """For CT, the window that suits what is segmented; other images are shown by their own percentiles."""
    own = next(iter(plan.configurations.values()), None)
    if own is None or own.normalization[0] != CT or not plan.intensities:
        return None
    return ct_window(plan.intensities[0].percentile_00_5, plan.intensities[0].percentile_99_5)


def _coloured(plan: Plan) -> bool:
    own = next(iter(plan.configurations.values()), None)
    return own is not None and len(plan.channels) == 3 and all(name.startswith("RGB") for name in own.normalization)


def _chosen(record: Report) -> list[tuple[str, CaseMetrics]]:
    """The cases to show with why: the worst, the one in the middle, the best."""
    order = results.ranked(record)
    if not order:
        return []
    places = {0: WHY[0], 1: WHY[1], 2: WHY[2], len(order) // 2: WHY[3], len(order) - 1: WHY[4]}
    return [(why, order[place]) for place, why in sorted(places.items()) if place < len(order)]


def _pictures(out: Path, files: _Files, record: Report, done: Callable[[str], None]) -> Section | None:
    """Worst, median and best cases as overlays."""
    names = [label.name for label in files.labels.foreground]
    cards, rows, images = [], [], True
    for why, case in _chosen(record):
        if case.case not in files.masks or case.case not in files.references:
            continue
        scene, views = _views(files, case.case)
        images &= scene.image_zyx is not None
        dice = [(f"Dice {label}", results.number("dice", row.get("dice"))) for label, row in list(case.metrics.items())[:12]]
        distance = results.case_score(case, "hd95")
        scores = [*dice, *([("mean HD95", f"{distance:.2f} mm")] if math.isfinite(distance) else [])]
        cards.append(CaseCard(case.case, why, scores, [drawing_of_view(v, case.case, names, scene.image_zyx is not None) for v in views]))
        rows.append((f"{case.case} ({why}), mean Dice {results.case_score(case):.3f}", views))
        done(case.case)
    if not cards:
        return None
    save_cases(out / "figures" / "cases.png", rows, names)
    legend = [(name, colour(i)) for i, name in enumerate(names)]
    blocks = [Text("By mean Dice. Filled: the reference; outlined: the prediction. Where a filled area lies outside the outline, the "
                   "prediction misses it. Slices are those that show most of the labels and of what is wrong; the patient's right is "
                   "on the left in axial and coronal planes."), Cases(cards, legend, images)]
    return Section("cases", "Worst, median and best cases", blocks, "", "Cases")


def _views(files: _Files, case: str) -> tuple[Scene, list[View]]:
    """Read a case and cut it."""
    reference, grid = read_label(files.references[case])
    prediction, _ = read_label(files.masks[case])
    count = len(files.labels.foreground)
    turn = grid.to_lps()
    masks = []
    for mask in (reference, prediction):
        index = files.labels.encode(mask)
        masks.append(turn.apply(np.where(index > count, 0, index)))
    image = None
    if case in files.images:
        found = read_case(list(files.images[case]))
        if found.array_czyx.shape[1:] == reference.shape and not any(not d.noise for d in compare_grids(grid, found.grid)):
            turned = turn.apply(found.array_czyx)
            image = np.moveaxis(turned[:3], 0, -1) if files.colours and len(turned) >= 3 else turned[0]
    scene = Scene(case, image, masks[0], masks[1], grid.mapped(turn).spacing)
    return scene, views_of(scene, range(1, count + 1), files.shown)


def write_csv(path: Path, record: Report, folds: Mapping[str, int] | None = None) -> None:
    """One row per case, label and metric; an undefined value is empty. Columns of the manifest stand behind."""
    columns = list(dict.fromkeys(name for case in record.cases for name in case.attributes))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "patient", "fold", "label", "metric", "value", *columns])
    for case in record.cases:
        fold = "" if folds is None else folds.get(case.case, "")
        for label, row in case.metrics.items():
            for name, value in row.items():
                writer.writerow([case.case, case.patient or case.case, fold, label, name, "" if value is None else repr(value),
                                 *(case.attributes.get(column, "") for column in columns)])
    write_text(path, text.getvalue())


def report_masks(
    record: Report, predictions: Masks, references: Masks, out: Path, images: Path | Mapping[str, Sequence[Path]] | None = None,
    reporter: Reporter = SILENT,
) -> Path:
    """Write the page of a folder of masks beside its references into the folder `out`; returns the page.

    record: what `evaluate` or `evaluate_folder` found. references: a folder, a manifest, a work folder, or files by case.
    images: a folder (`CASE.ending` or `CASE_0000.ending`), or the channels of each case; a manifest's or work folder's are known.
    Without images masks are drawn on a plain ground. Raises what reading images raises.
    """
    known = find_references(references) if isinstance(references, Path) else None
    files = dict(references) if not isinstance(references, Path) else known.masks if known else {}
    labels = known.labels if known is not None and known.labels is not None else _labels_of(record)
    given = _found_images(images, files) if isinstance(images, Path) else dict(images or {})
    if not given and known is not None:
        given = {case.case: [Path(path) for path in case.images] for case in known.cases}
    book = _Book(out)
    with reporter.task("report", 3 + len(WHY), unit="steps") as task:
        save_record(out / "report.json", record)
        write_csv(out / "report.csv", record)
        book.add(results.results(record, "From report.json."))
        task.advance(note="results")
        book.add(results.groups(record, "Columns of the manifest."))
        shown = _Files(find_masks(predictions), files, given, labels)
        book.add(_pictures(out, shown, record, lambda case: task.advance(note=case)))
        book.add(results.definitions(record))
        name = predictions.name if isinstance(predictions, Path) else "masks"
        return book.write(f"{name}: report", results.headline(record, unseen=False), results.lead(record), results.tiles(record), "")


def _labels_of(record: Report) -> Labels:
    """The labels of a report whose values are their names."""
    return Labels(foreground=tuple(Label(name=name, value=int(name)) for name in record.mean if name.lstrip("-").isdigit()) or (
        Label(name="foreground", value=1),))


def _found_images(folder: Path, cases: Mapping[str, Path]) -> dict[str, list[Path]]:
    """The first channel of each case in a folder of images."""
    found: dict[str, list[Path]] = {}
    if not folder.is_dir():
        raise AutosegError(f"{folder} is not a folder of images")
    for path in sorted(folder.iterdir()):
        stem, ending = split_ending(path.name)
        case = stem if stem in cases else stem.removesuffix("_0000")
        if ending and case in cases:
            found.setdefault(case, [path])
    return found
