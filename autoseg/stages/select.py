"""Choose the run or ensemble and the post-processing that did best on cases their networks had not seen, without optimism."""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg.arrays.postprocess import apply_postprocessing, needs_image
from autoseg.errors import RecordError
from autoseg.files.images import mask_ending, split_ending, write_label
from autoseg.files.preprocessed import digest, source_states
from autoseg.files.workspace import Workspace, load_record, save_record
from autoseg.logs import SILENT, Reporter
from autoseg.stages import outoffold
from autoseg.stages.candidates import Comparison, compare
from autoseg.stages.contest import Contest, find_contest
from autoseg.stages.evaluate import evaluate, merge_reports
from autoseg.stages.outoffold import Averaged, OutOfFold
from autoseg.stages.postprocessing import Load, Postprocessing, read_image, search_postprocessing
from autoseg.stages.predict import Options as PredictOptions
from autoseg.types.dataset import CaseFiles
from autoseg.types.report import Report
from autoseg.types.selection import Selection

QUESTIONS = 3  # which run, which ensemble, which post-processing
TAIL = 0.05 / QUESTIONS  # one-sided: together they keep something that gains nothing in at most 5 %
FEW_PATIENTS = 6  # with fewer, no test can tell a gain from luck
SELECTED = "selected"
VERSION = 1  # of the search; another one makes an earlier selection stale
NOTE = ("A choice leaves its default only if its gain, measured on folds it was made without, is above zero with 95 % certainty "
        "for all choices together; such gains are not optimistic.")
NOTE_FEW = "With fewer than 6 patients no gain can be told from luck, so nothing but the default is kept."
NOTE_ONE_FOLD = "With fewer than 3 folds patients were dealt into 5 parts; how much trainings differ could not be measured."


@dataclass(frozen=True)
class Options:
    """How to select: networks None or False compares masks only (no ensembles, no thresholds); `crf` tries the random field."""

    networks: bool = True
    crf: bool = False
    device: str = "auto"
    precision: str = "auto"


def select(
    workspace: Workspace, reporter: Reporter = SILENT, threads: int = 2, options: Options = Options(),
) -> Selection:
    """Compare all runs, build a weighted ensemble greedily and search post-processing, all on out-of-fold predictions.

    Every run predicts its validation cases once more for this, with probabilities. Writes selection.json, the pooled report of
    the selected masks to report/report.json and, where they are not those of a run's validation, the masks themselves. When
    nothing changed since the last time the selection is returned as it is.
    Raises RunError when no fold is finished in every compared run, and what reading and predicting raise.
    """
    contest = find_contest(workspace, options.networks)
    for line in contest.missing:
        reporter.warn(line)
    inputs = _inputs(contest, options)
    known = _known(workspace, inputs)
    if known is not None:
        reporter.info("the selection is up to date")
        return known
    source = OutOfFold(contest)
    if options.networks:
        source.predict(PredictOptions(device=options.device, precision=options.precision), reporter)
    chosen = compare(contest, source if options.networks else None, TAIL, reporter)
    weights = chosen.weights or (1.0,) * len(chosen.runs)

    def load(fold: int, case: CaseFiles) -> Averaged:
        return source.averaged(fold, case, chosen.runs, weights) if options.networks else source.mask(fold, case, chosen.runs[0])

    steps = search_postprocessing(contest, load, options.networks, options.crf, TAIL, reporter, threads)
    report = _selected_report(contest, chosen, steps, load, reporter, threads)
    selection = _selection(contest, chosen, steps, report, inputs)
    save_record(workspace.root / "report" / "report.json", report)
    save_record(workspace.selection_path, selection)
    source.close()
    return selection


def _known(workspace: Workspace, inputs: str) -> Selection | None:
    """The selection that is there, if it was made of the same things."""
    if not workspace.selection_path.exists() or not (workspace.root / "report" / "report.json").exists():
        return None
    try:
        selection = load_record(workspace.selection_path, Selection)
    except RecordError:
        return None  # it is made anew
    return selection if selection.inputs == inputs else None


def _inputs(contest: Contest, options: Options) -> str:
    """A hash of all that selection depends on: validation reports, networks, references, options."""
    parts: list[object] = [VERSION, options.networks, options.crf, contest.missing]
    for run in contest.runs:
        for fold in contest.folds:
            report = hashlib.sha256((contest.validation(run, fold) / "report.json").read_bytes()).hexdigest()
            parts.append([run, fold, contest.runs[run], report])
            if options.networks:
                parts.append(outoffold.network_key(contest, run, fold))
    parts += [source_states(list(contest.references.values())), contest.patients]
    return digest(parts)


def _selected_report(
    contest: Contest, chosen: Comparison, steps: Postprocessing, load: Load, reporter: Reporter, threads: int,
) -> Report:
    """The pooled report of the selected masks: those of validation where nothing was added, else made and measured."""
    folder = contest.folder / SELECTED
    shutil.rmtree(folder, ignore_errors=True)
    if len(chosen.runs) == 1 and not steps.steps:
        wanted = {case.case for _, case in contest.order}
        reports = [load_record(contest.validation(chosen.runs[0], fold) / "report.json", Report) for fold in contest.folds]
        return merge_reports(Report.of([c for c in one.cases if c.case in wanted], one.tolerance_mm) for one in reports)
    with reporter.task("selected masks", len(contest.order)) as task, ThreadPoolExecutor(max(threads, 1)) as pool:
        for case in pool.map(lambda one: _write_mask(contest, steps, load, folder, one[0], one[1]), contest.order):
            task.advance(note=case)
    cases = [case for _, case in contest.order]
    return evaluate(folder, contest.references, contest.labels, None, threads, reporter, cases=cases)


def _write_mask(contest: Contest, steps: Postprocessing, load: Load, folder: Path, fold: int, case: CaseFiles) -> str:
    """Write a case's mask as selected; returns the case's name."""
    found = load(fold, case)
    image = read_image(found, case) if needs_image(steps.steps) else None
    index = apply_postprocessing(found.index, steps.steps, found.probabilities, image, found.grid.spacing)
    whole = np.zeros(found.grid.shape, index.dtype)
    whole[found.box] = index
    path = folder / f"{case.case}{mask_ending(split_ending(case.images[0])[1])}"
    write_label(path, contest.labels.decode(whole), found.grid, Path(case.images[0]))
    return case.case


def _selection(
    contest: Contest, chosen: Comparison, steps: Postprocessing, report: Report, inputs: str,
) -> Selection:
    patients = len(set(contest.patients))
    notes = [NOTE]
    if patients < FEW_PATIENTS:
        notes.append(NOTE_FEW)
    if len(contest.folds) < 3:
        notes.append(NOTE_ONE_FOLD)
    nested = None if chosen.nested_dice is None else chosen.nested_dice + steps.gain
    return Selection(
        runs=chosen.runs, weights=chosen.weights, postprocessing=steps.steps, folds=contest.folds,
        run_folds={run: contest.runs[run] for run in chosen.runs}, cases=len(report.cases), patients=patients,
        foreground_mean_dice=report.foreground_mean.get("dice"), nested_dice=nested, decisions=chosen.decisions,
        candidates=chosen.candidates, postprocessing_tried=steps.trials, missing=contest.missing, note=" ".join(notes),
        inputs=inputs)
