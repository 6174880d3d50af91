"""One page that tells how good a segmentation is: a work folder's, or that of any folder of masks beside its references."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from autoseg.errors import RecordError
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace, load_record, save_record, write_text
from autoseg.logs import SILENT, Reporter, Task
from autoseg.stages import report_results as results
from autoseg.stages import report_sections as sections
from autoseg.stages.evaluate import Masks, evaluate, find_masks, find_references, with_intervals
from autoseg.stages.midway import FILE as MIDWAY
from autoseg.stages.midway import load_midway
from autoseg.stages.outcome import Outcome, find_outcome, validated_folds
from autoseg.stages.report_cases import WHY, CaseSources, case_section, find_images, is_coloured, window_of
from autoseg.stages.report_page import Charts, Facts, Page, Section, render
from autoseg.stages.report_pictures import COLOURS_OF_PAGE, Chart, drawing_of, save_png
from autoseg.types.benchmark import Reproduction
from autoseg.types.diagnosis import Diagnosis
from autoseg.types.labels import Label, Labels
from autoseg.types.report import Report
from autoseg.types.selection import Selection
from autoseg.types.trust import Trust

PAGE = "index.html"
UNSEEN = ("Every case was segmented by networks that were trained without its patient, so the numbers say what to expect of new "
          "patients like these; other scanners, sites or diseases must be tested anew.")
UNTRAINED = "Planned, and not yet trained: there are no results."
LONGEST_TITLE = 24
T = TypeVar("T")
Told = Section | tuple[Section, Sequence[Chart]]


class _Book:
    """The page as it grows: sections, and the charts of each that are written as figures for a paper."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.sections: list[Section] = []
        self.missing: list[tuple[str, str]] = []

    def add(self, found: Told | None) -> None:
        """Take a section; its charts go to figures/<key>.png."""
        if found is None:
            return
        section, charts = found if isinstance(found, tuple) else (found, ())
        self.sections.append(section)
        if charts:
            save_png(self.out / "figures" / f"{section.key}.png", charts)

    def write(self, title: str, headline: str, lead: Sequence[str], tiles: Facts, made: str = "") -> Path:
        """Write index.html."""
        page = Page(title, headline, lead, tiles, self.sections, self.missing, made, COLOURS_OF_PAGE)
        write_text(self.out / PAGE, render(page))
        return self.out / PAGE


def report(workspace: Workspace, out: Path | None = None, reporter: Reporter = SILENT, threads: int = 2) -> Path:
    """Write the page of a work folder (default: report/index.html in it), report.json, report.csv and figures; returns the page.

    Results are those of the selected masks, else of the run with the most finished folds; parts whose records are not there are
    named with the command that makes them. Raises RecordError when this is no work folder or dataset, plan, folds or runs cannot
    be read, RunError when the selected masks are gone, and what reading images raises.
    """
    plan, dataset = workspace.require().plan(), workspace.dataset()
    book, work = _Book(out or workspace.root / "report"), shlex.quote(workspace.root.name)
    planned = f"made by: autoseg plan DATASET --out {work}"
    outcome = find_outcome(workspace) if validated_folds(workspace) else None
    record = None
    with reporter.task("report", 5 + len(WHY), unit="steps") as task:
        if outcome is not None:
            record = _measured(workspace, outcome, reporter, threads)
            task.advance(note="results")
            _results(book, workspace, outcome, record, work, task)
        _records(workspace, book, work, reporter)
        task.advance(note="records")
        if workspace.fingerprint_path.exists():
            book.add(sections.data(dataset, workspace.fingerprint(), plan, f"From fingerprint.json, {planned}"))
        book.add(sections.plan_section(plan, f"From plan.json, {planned}; in words: autoseg explain {work}"))
        task.advance(note="data and plan")
        runs = outcome.runs if outcome is not None else sorted({p.parent.name for p in workspace.runs.glob("[!._]*/fold_*")})
        if learned := _learned(workspace, runs):
            book.add(sections.training(learned, f"From runs/*/fold_*/metrics.jsonl, made by: autoseg train {work}"))
        task.advance(note="training")
    if record is None or outcome is None:
        book.missing.insert(0, ("Results", f"autoseg train {work}"))
        return book.write(f"{dataset.name}: report", UNTRAINED, [], Facts([], tiles=True))
    book.add(results.definitions(record))
    title = f"{dataset.name}: {outcome.title}"
    return book.write(title, results.headline(record, unseen=True), _lead(workspace, outcome, record, work),
                      results.tiles(record, _further(outcome)), _made(workspace))


def _results(book: _Book, workspace: Workspace, outcome: Outcome, record: Report, work: str, task: Task) -> None:
    """Everything that rests on the masks: report.json, report.csv, sections of results, groups and cases."""
    save_record(book.out / "report.json", record)
    write_csv(book.out / "report.csv", record, outcome.folds)
    source = f"report/report.json, made by: autoseg select {work}" if outcome.selection else f"the validation of {outcome.title}"
    section, charts = results.results(record, f"From {source}.")
    if (folds := results.by_fold(record, outcome.folds)) is not None:
        charts.append(folds)
        blocks = [Charts([*b.drawings, drawing_of(folds)]) if isinstance(b, Charts) else b for b in section.blocks]
        section = replace(section, blocks=blocks)
    book.add((section, charts))
    task.advance(note="charts")
    book.add(results.groups(record, "By the further columns of the data set's manifest."))
    plan = workspace.plan()
    images = {case: [Path(path) for path in outcome.cases[case].images] for case in outcome.masks}
    sources = CaseSources(outcome.masks, outcome.references, images, outcome.labels, window_of(plan), is_coloured(plan))
    book.add(case_section(book.out / "figures" / "cases.png", sources, record, lambda case: task.advance(note=case)))


def _lead(workspace: Workspace, outcome: Outcome, record: Report, work: str) -> list[str]:
    """What must be known at first sight, after the headline."""
    lines = results.lead(record)
    folds, planned = sorted(set(outcome.folds.values())), len(workspace.splits())
    if len(folds) < planned:
        counts = f"{len(record.cases)} of {len(outcome.cases)}"
        lines.append(f"{len(folds)} of {planned} folds are finished, so {counts} labelled cases are in these results.")
    if outcome.selection is not None and _outdated(workspace):
        lines.append(f"Runs have changed since the selection was made; make it again with: autoseg select {work}")
    return [*lines, UNSEEN]


def _further(outcome: Outcome) -> list[tuple[str, str, str]]:
    """Numbers at the top that are not metrics: what made the masks, and how long a case takes."""
    folds = len(set(outcome.folds.values()))
    rows = []
    if len(outcome.title) < LONGEST_TITLE:
        rows.append(("model", outcome.title, results.counted(folds, "fold")))
    if (selection := outcome.selection) is not None:
        chosen = next((c for c in selection.candidates if c.runs == selection.runs and c.weights == selection.weights), None)
        if chosen is not None and chosen.seconds is not None:
            count = results.counted(chosen.networks, "network")
            rows.append(("time per case", sections.duration(chosen.seconds), f"{count}, where it was selected"))
    return rows


def _made(workspace: Workspace) -> str:
    """When the results were made."""
    path = workspace.root / "report" / "report.json"
    return f"Results of {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d}." if path.exists() else ""


def _measured(workspace: Workspace, outcome: Outcome, reporter: Reporter, threads: int) -> Report:
    """The metrics of the outcome's masks: as selection or validation left them, else measured now."""
    path, wanted = workspace.root / "report" / "report.json", set(outcome.masks)
    if outcome.selection is not None and path.exists():
        found = load_record(path, Report)
        if {case.case for case in found.cases} == wanted:
            return found if found.intervals else with_intervals(Report.of(found.cases, found.tolerance_mm))
    if len(outcome.runs) == 1 and (outcome.selection is None or not outcome.selection.postprocessing):
        folds = [workspace.fold(outcome.runs[0], fold) for fold in sorted(set(outcome.folds.values()))]
        paths = [fold / "validation" / "report.json" for fold in folds]
        cases = [case for one in paths for case in load_record(one, Report).cases if case.case in wanted]
        if {case.case for case in cases} == wanted:
            return with_intervals(Report.of(cases))
    return evaluate(outcome.masks, outcome.references, outcome.labels, None, threads, reporter, cases=outcome.cases.values())


def _records(workspace: Workspace, book: _Book, work: str, reporter: Reporter) -> None:
    """Sections of the records that are there; the others are named with the command that makes them."""
    root, missing = workspace.root, []

    def tell(path: Path, kind: type[T], section: Callable[[T, str], Told], command: str, what: str) -> None:
        name = path.relative_to(root)
        if path.exists():
            try:
                book.add(section(load_record(path, kind), f"From {name}, made by: {command}"))
            except RecordError as error:  # of another version, or damaged: all of these can be made again
                reporter.warn(f"{str(error).splitlines()[0]}; make it again: {command}")
                missing.append((f"{what or name} ({name} cannot be read)", command))
        elif what:
            missing.append((what, command))

    tell(root / "trust.json", Trust, sections.trust, f"autoseg select {work}", "Calibration, and how far a mask can be trusted")
    reports = root / "report"
    tell(reports / "diagnosis.json", Diagnosis, sections.diagnosis, f"autoseg diagnose {work}", "What is wrong, what to try")
    tell(workspace.selection_path, Selection, sections.selection, f"autoseg select {work}", "The choice of runs and steps")
    tell(reports / "reproduction.json", Reproduction, sections.published, "autoseg reproduce NAME --data DIR", "")
    if validated_folds(workspace):
        book.missing += missing


def _outdated(workspace: Workspace) -> bool:
    """Whether a validation is newer than the selection."""
    made = workspace.selection_path.stat().st_mtime
    return any(path.stat().st_mtime > made for path in workspace.runs.glob("[!._]*/fold_*/validation/report.json"))


def _learned(workspace: Workspace, runs: Sequence[str]) -> dict[str, sections.Learned]:
    """What is recorded of the folds of some runs; runs without any epoch are left out."""
    found = {}
    for run in runs:
        folders = {path.name.removeprefix("fold_"): RunFolder(path) for path in sorted((workspace.runs / run).glob("fold_*"))}
        folds = {int(number): folder for number, folder in folders.items() if number.isdigit() and folder.metrics()}
        if folds:
            record = next((folder.record() for folder in folds.values() if folder.record_path.exists()), None)
            found[run] = sections.Learned(
                {fold: folder.metrics() for fold, folder in folds.items()},
                {fold: load_midway(folder.path / MIDWAY) for fold, folder in folds.items()}, record)
    return found


def write_csv(path: Path, record: Report, folds: Mapping[str, int] | None = None) -> None:
    """One row per case, label and metric; an undefined value is empty. Columns of the manifest stand behind."""
    columns = list(dict.fromkeys(name for case in record.cases for name in case.attributes))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "patient", "fold", "label", "metric", "value", *columns])
    for case in record.cases:
        more = [case.attributes.get(column, "") for column in columns]
        who = [case.case, case.patient or case.case, "" if folds is None else folds.get(case.case, "")]
        for label, row in case.metrics.items():
            writer.writerows([*who, label, name, "" if value is None else repr(value), *more] for name, value in row.items())
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
    files = known.masks if known is not None else find_masks(references)
    labels = known.labels if known is not None and known.labels is not None else _labels_of(record)
    given: Mapping[str, Sequence[Path]] = find_images(images, files) if isinstance(images, Path) else images or {}
    if not given and known is not None:
        given = {case.case: [Path(path) for path in case.images] for case in known.cases}
    book = _Book(out)
    with reporter.task("report", 1 + len(WHY), unit="steps") as task:
        save_record(out / "report.json", record)
        write_csv(out / "report.csv", record)
        book.add(results.results(record, "From report.json."))
        book.add(results.groups(record, "By the further columns of the manifest."))
        task.advance(note="results")
        sources = CaseSources(find_masks(predictions), files, given, labels)
        book.add(case_section(out / "figures" / "cases.png", sources, record, lambda case: task.advance(note=case)))
    book.add(results.definitions(record))
    name = predictions.name if isinstance(predictions, Path) else "masks"
    return book.write(f"{name}: report", results.headline(record, unseen=False), results.lead(record), results.tiles(record))


def _labels_of(record: Report) -> Labels:
    """The labels of a report that was made without any: their names are their values."""
    found = [Label(name=name, value=int(name)) for name in record.mean if name.lstrip("-").isdigit()]
    return Labels(foreground=tuple(found) or (Label(name="foreground", value=1),))
