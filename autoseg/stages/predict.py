"""Predict: images in, masks in the geometry of the images out."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autoseg.arrays.unusual import combined, describe_image, describe_mask, unusual
from autoseg.errors import AutosegError, CasesFailed, RunError
from autoseg.files.images import read_case, write_label, write_probabilities
from autoseg.files.masks import MaskFolder
from autoseg.files.model import ModelFile
from autoseg.files.runs import RunFolder, load_tensors
from autoseg.files.workspace import Workspace, load_record
from autoseg.logs import SILENT, Reporter
from autoseg.stages.judge import Judge, find_judge
from autoseg.stages.models import Source, assemble, file_source, trained_network
from autoseg.types.case import Image
from autoseg.types.dataset import CaseFiles
from autoseg.types.geometry import Grid
from autoseg.types.labels import Labels
from autoseg.types.record import Spec
from autoseg.types.run import RunRecord
from autoseg.types.selection import Selection
from autoseg.types.trust import CaseNumbers, TrainingCases

if TYPE_CHECKING:
    import torch

    from autoseg.inference import Member, Model, Prediction
    from autoseg.types.case import Preprocessed

PREFERRED = ("3d_fullres", "3d_cascade_fullres", "2d", "3d_lowres")  # order of trust when nothing was selected


@dataclass(frozen=True)
class Options:
    """How to predict; `folds` None means all that are trained. `probabilities` and `uncertainty` ask for further files."""

    folds: tuple[int, ...] | None = None
    device: str = "auto"
    precision: str = "auto"
    mirror: bool = True
    probabilities: bool = False
    overwrite: bool = False
    uncertainty: bool = False


def load_model(
    workspace: Workspace,
    runs: Sequence[str],
    options: Options,
    postprocessing: Sequence[Spec] = (),
    weights: Sequence[float] = (),
    temperatures: Mapping[str, float] | None = None,
) -> Model:
    """Load the networks of `runs` and the wanted folds into one model, with the runs whose segmentation they take as input.

    `weights` has one number per run; without it all count the same. `temperatures`, by run, are 1 where there are none.

    Raises:
        RunError: a run or fold is not trained, or its weights do not fit.
    """
    known = temperatures or {}
    members = [
        dataclasses.replace(_load_member(workspace, run, options.folds), weight=weight, temperature=known.get(run, 1.0))
        for run, weight in _weighted(runs, weights)
    ]
    return assemble(members, options, postprocessing)


def _weighted(runs: Sequence[str], weights: Sequence[float]) -> list[tuple[str, float]]:
    return list(zip(runs, weights or [1.0] * len(runs), strict=True))


def _load_member(workspace: Workspace, run: str, wanted: Sequence[int] | None) -> Member:
    """Folds of one run; of the previous stage's run the same folds, so that a fold's validation cases are new to both."""
    from autoseg.inference import Member
    from autoseg.networks.describe import describe

    finished = finished_folds(workspace, run)
    folds = finished if wanted is None else list(wanted)
    missing = sorted(set(folds) - set(finished))
    if missing or not folds:
        raise RunError(
            f"run {run!r} has no finished training of fold(s) {missing or 'any'} (finished: {finished or 'none'}); "
            f"train with: autoseg train {workspace.root} --config {run}"
        )
    records = [RunFolder(workspace.fold(run, fold)).record() for fold in folds]
    first = records[0]
    plan, configuration = first.plan, first.plan.configurations[first.configuration]
    axes = first.spec.mirror_axes(configuration)
    channels = len(plan.channels) + (len(plan.labels.foreground) if configuration.previous_stage is not None else 0)
    networks = []
    for record in records:
        same = (record.configuration, record.plan, record.previous) == (first.configuration, plan, first.previous)
        if not same or record.spec.mirror_axes(configuration) != axes:
            raise RunError(
                f"the folds of run {run!r} were trained with different plans, so they cannot be combined; "
                f"choose some with --folds, or train fold {record.fold} again with --restart"
            )
        weights_path = RunFolder(workspace.fold(run, record.fold)).weights_path
        description = describe(configuration, channels, plan.labels.output_count)
        try:
            networks.append(trained_network(description, load_tensors(weights_path)))
        except RuntimeError as error:
            raise RunError(f"{weights_path} does not fit its plan: {str(error).splitlines()[0]}") from None
    source = previous_run(first)
    previous = None if source is None else _load_member(workspace, source, wanted)
    return Member(plan, first.configuration, tuple(networks), axes, previous)


def previous_run(record: RunRecord) -> str | None:
    """The run whose segmentation a run takes as input; None when its configuration has no previous stage."""
    stage = record.plan.configurations[record.configuration].previous_stage
    return None if stage is None else record.previous or stage


def finished_folds(workspace: Workspace, run: str) -> list[int]:
    """Folds of a run that have trained weights."""
    found = [(re.fullmatch(r"fold_(\d+)", path.name), path) for path in (workspace.runs / run).glob("fold_*")]
    return sorted(int(match[1]) for match, path in found if match and RunFolder(path).usable)


def chosen(workspace: Workspace, reporter: Reporter = SILENT) -> Selection:
    """The runs, weights and post-processing to use: selection.json, else the most trusted finished run alone.

    Raises:
        RunError: nothing is trained.
    """
    if workspace.selection_path.exists():
        selection = load_record(workspace.selection_path, Selection)
        for run in selection.runs:
            if set(selection.run_folds.get(run, ())) - set(finished_folds(workspace, run)):
                reporter.warn(f"run {run} has fewer finished folds than when it was selected: autoseg select {workspace.root}")
        return selection
    finished = sorted({p.parent.parent.name for p in workspace.runs.glob("*/fold_*/weights.safetensors")})
    if not finished:
        raise RunError(f"{workspace.root} holds no finished training; run: autoseg train {workspace.root}")
    run = min(finished, key=lambda name: (PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), name))
    if len(finished) > 1:
        reporter.info(
            f"no selection yet, so {run} is used out of {', '.join(finished)}; compare them with: autoseg select {workspace.root}"
        )
    return Selection(runs=(run,), folds=(), cases=0)


def predict(
    model: Workspace | ModelFile, cases: Sequence[CaseFiles], out: Path, options: Options = Options(), reporter: Reporter = SILENT
) -> None:
    """Predict new cases with a model file or the selected model of a work folder; what the same model finished is skipped.

    Raises:
        CasesFailed: some cases failed; they are listed, the rest is done.
        RunError: nothing trained, or `out` holds masks that this model did not make.
    """
    source = file_source(model, options) if isinstance(model, ModelFile) else work_source(model, options, reporter)
    folder = MaskFolder(out, source.identity, source.judge.key if source.judge else "")
    wanted = (options.probabilities, options.overwrite, options.uncertainty)
    todo = [case for case in cases if not folder.is_finished(case, *wanted) or options.overwrite]
    if not todo:
        reporter.info(f"all {len(cases)} cases are predicted already; --overwrite makes them anew")
        return
    work = _Work(source.load(), folder, options.probabilities, options.uncertainty, source.judge, source.training)
    _run(work, todo, reporter, "predict")


def work_source(workspace: Workspace, options: Options, reporter: Reporter = SILENT) -> Source:
    """The selected model of a work folder as a source of masks. Raises RunError when nothing is trained."""
    selection = chosen(workspace.require(), reporter)
    made_with = (selection.runs, options, selection.postprocessing, selection.run_weights)
    identity = _identity(workspace, *made_with)
    judge = find_judge(workspace, selection, identity["weights"], options.mirror, reporter)
    temperatures = judge.temperatures if judge else None
    channels = workspace.plan().channels
    return Source(identity, channels, judge, None, lambda: load_model(workspace, *made_with, temperatures=temperatures))


def predict_validation(
    workspace: Workspace,
    runs: Sequence[str],
    fold: int,
    out: Path,
    reporter: Reporter = SILENT,
    device: str = "auto",
    precision: str = "auto",
    weights: Sequence[float] = (),
) -> None:
    """Predict the validation cases of a fold with networks that have not seen them, without post-processing.

    Raises:
        CasesFailed: some cases failed.
    """
    split = RunFolder(workspace.fold(runs[0], fold)).record().split
    cases = [case for case in workspace.dataset().cases if case.case in set(split.val)]
    options = Options(folds=(fold,), device=device, precision=precision)
    folder = MaskFolder(out, _identity(workspace, runs, options, (), weights))
    todo = [case for case in cases if not folder.is_finished(case, False, replace=True)]
    if todo:
        _run(_Work(load_model(workspace, runs, options, (), weights), folder), todo, reporter, f"validate fold {fold}")


def _identity(
    workspace: Workspace, runs: Sequence[str], options: Options, postprocessing: Sequence[Spec], weights: Sequence[float] = ()
) -> dict[str, Any]:
    """What the masks depend on: networks, how they are weighted, folds, mirroring and post-processing."""
    networks: dict[str, str] = {}
    for run in runs:
        networks.update(network_hashes(workspace, run, options.folds))
    identity: dict[str, Any] = {
        "weights": networks, "mirror": options.mirror, "postprocessing": [s.model_dump(mode="json") for s in postprocessing]
    }
    if len(set(weights)) > 1:
        identity["shares"] = dict(_weighted(runs, weights))
    return identity


def network_hashes(workspace: Workspace, run: str, folds: Sequence[int] | None) -> dict[str, str]:
    """The hash of every network that a run's masks come from, those of the previous stage included."""
    found: dict[str, str] = {}
    source = None
    for fold in finished_folds(workspace, run):
        if folds is None or fold in folds:
            folder = RunFolder(workspace.fold(run, fold))
            with folder.weights_path.open("rb") as file:
                found[f"{run}/fold_{fold}"] = hashlib.file_digest(file, "sha256").hexdigest()
            source = previous_run(folder.record())
    return found if source is None else {**found, **network_hashes(workspace, source, folds)}


@dataclass(frozen=True)
class _Work:
    """What is made of every case, and where it goes."""

    model: Model
    folder: MaskFolder
    probabilities: bool = False
    uncertainty: bool = False
    judge: Judge | None = None
    training: TrainingCases | None = None

    @property
    def gauged(self) -> bool:
        """Whether logits are made with uncertainty."""
        return self.uncertainty or self.judge is not None


def _run(work: _Work, todo: Sequence[CaseFiles], reporter: Reporter, name: str) -> None:
    """Three threads, one case each: the next case is read while this one is computed and the last one is written."""
    failed: dict[str, str] = {}
    short: list[CaseFiles] = []  # out of memory while others were in work: tried once more alone
    with (
        ThreadPoolExecutor(1, "reader") as reader,
        ThreadPoolExecutor(1, "writer") as writer,
        reporter.task(name, len(todo)) as task,
    ):
        reading = [reader.submit(_attempt, _read, work, todo[0])]
        writing: list[Future[object]] = []

        def settle(case: CaseFiles, outcome: object, alone: bool = False) -> bool:
            if isinstance(outcome, MemoryError) and not alone:
                short.append(case)
            elif isinstance(outcome, Exception):
                failed[case.case] = " ".join((str(outcome) or type(outcome).__name__).split())
                work.folder.fail(case, failed[case.case])
            elif isinstance(outcome, str) and outcome:
                reporter.warn(f"case {case.case} is unlike the training cases: {outcome}")
            return not isinstance(outcome, Exception)

        for index, case in enumerate(todo):
            ready = reading.pop().result()
            if index + 1 < len(todo):
                reading.append(reader.submit(_attempt, _read, work, todo[index + 1]))
            logits = _attempt(_compute, work, ready) if settle(case, ready) else None
            if writing:
                settle(todo[index - 1], writing.pop().result())
            if logits is not None and settle(case, logits):
                writing.append(writer.submit(_attempt, _finish, work, case, ready, logits))
            task.advance(note=case.case)
        if writing:
            settle(todo[-1], writing.pop().result())
        for case in short:
            settle(case, _attempt(_whole, work, case), alone=True)
    if failed:
        lines = "\n".join(f"  {case}: {why}" for case, why in failed.items())
        raise CasesFailed(
            f"{len(failed)} of {len(todo)} cases failed, the rest is done (see {work.folder.path / 'summary.csv'}):\n{lines}"
        )


def _attempt(work: Callable[..., object], *arguments: object) -> object:
    """The result of one case's work, or the error that makes only this case fail."""
    from autoseg.networks.hardware import is_out_of_memory

    try:
        return work(*arguments)
    except (AutosegError, ValueError, OSError, MemoryError) as error:
        return error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return MemoryError(f"out of memory: {str(error).splitlines()[0]}")


@dataclass(frozen=True)
class _Ready:
    image_grid: Grid
    prepared: list[Preprocessed]
    seconds: dict[str, float]
    image_czyx: np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None  # kept only for post-processing that looks at it
    numbers: CaseNumbers | None  # what the image is like, where that is judged


def _read(work: _Work, case: CaseFiles) -> _Ready:
    from autoseg.arrays.postprocess import needs_image

    begin = time.perf_counter()
    image: Image = read_case([Path(p) for p in case.images])
    middle = time.perf_counter()
    prepared = work.model.prepare(image, uncertainty=work.gauged)
    numbers: CaseNumbers | None = None
    if work.judge is not None:
        numbers = work.judge.look(work.model, image)
    elif work.training is not None:
        first = work.model.members[0]
        numbers = describe_image(image, first.plan, first.configuration)
    seconds = {"read": middle - begin, "preprocess": time.perf_counter() - middle}
    kept = image.array_czyx if needs_image(work.model.postprocessing) else None
    return _Ready(image.grid, prepared, seconds, kept, numbers)


def _compute(work: _Work, ready: _Ready) -> list[torch.Tensor]:
    begin = time.perf_counter()
    pairs = zip(work.model.members, ready.prepared, strict=True)
    logits = [work.model.logits(member, case, uncertainty=work.gauged) for member, case in pairs]
    ready.seconds["network"] = time.perf_counter() - begin
    return logits


def _whole(work: _Work, case: CaseFiles) -> str:
    ready = _read(work, case)
    return _finish(work, case, ready, _compute(work, ready))


def _finish(work: _Work, case: CaseFiles, ready: _Ready, logits: list[torch.Tensor]) -> str:
    """Restore, judge and write one case; returns in what it is unlike the training cases."""
    begin = time.perf_counter()
    model, folder = work.model, work.folder
    placements = [p.placement for p in ready.prepared]
    prediction: Prediction = model.restore(logits, placements, work.probabilities, ready.image_czyx, work.uncertainty)
    ready.seconds["restore"] = time.perf_counter() - begin
    row = _row(case, ready, prediction.label_zyx, model.labels)
    if work.judge is not None and ready.numbers is not None:
        row |= work.judge.columns(model, placements, logits, prediction.label_zyx, ready.numbers)
    elif work.training is not None and ready.numbers is not None:
        whole = combined(ready.numbers, describe_mask(prediction.label_zyx, ready.image_grid, model.labels))
        row["unusual"] = "; ".join(unusual(whole, work.training))
    like = Path(case.images[0])
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.begin(case, row)
    begin = time.perf_counter()
    if prediction.probabilities_czyx is not None:
        write_probabilities(folder.probabilities(case), prediction.probabilities_czyx, ready.image_grid, like)
    if prediction.uncertainty_kzyx is not None:
        write_probabilities(folder.uncertainty(case), prediction.uncertainty_kzyx, ready.image_grid, like)
    write_label(folder.mask(case), prediction.label_zyx, ready.image_grid, like)
    folder.end(case, {**row, "seconds_write": f"{time.perf_counter() - begin:.3f}"})
    return row.get("unusual", "")


def _row(
    case: CaseFiles, ready: _Ready, label_zyx: np.ndarray[tuple[int, ...], np.dtype[np.integer]], labels: Labels
) -> dict[str, str]:
    row = {"case": case.case, "status": "done", "error": ""}
    row.update({f"seconds_{stage}": f"{seconds:.3f}" for stage, seconds in ready.seconds.items()})
    values, counts = np.unique(label_zyx, return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    for label in labels.foreground:
        voxels = found.get(label.value, 0)
        row[f"voxels_{label.name}"] = str(voxels)
        row[f"ml_{label.name}"] = f"{voxels * ready.image_grid.voxel_volume_ml:.4f}"
    return row
