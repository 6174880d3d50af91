"""Predict: images in, masks in the geometry of the images out."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autoseg.errors import AutosegError, CasesFailed, RunError
from autoseg.files.images import read_case, write_label, write_probabilities
from autoseg.files.masks import MaskFolder
from autoseg.files.runs import RunFolder, load_tensors
from autoseg.files.workspace import Workspace, load_record
from autoseg.logs import SILENT, Reporter
from autoseg.types.case import Image
from autoseg.types.dataset import CaseFiles
from autoseg.types.geometry import Grid
from autoseg.types.labels import Labels
from autoseg.types.record import Spec
from autoseg.types.report import Selection

if TYPE_CHECKING:
    import torch

    from autoseg.inference import Model, Prediction
    from autoseg.types.case import Preprocessed

PREFERRED = ("3d_fullres", "3d_cascade_fullres", "2d", "3d_lowres")  # order of trust when nothing was selected


@dataclass(frozen=True)
class Options:
    """How to predict; `folds` None means all that are trained."""

    folds: tuple[int, ...] | None = None
    device: str = "auto"
    precision: str = "auto"
    mirror: bool = True
    probabilities: bool = False
    overwrite: bool = False


def load_model(workspace: Workspace, runs: Sequence[str], options: Options, postprocessing: Sequence[Spec] = ()) -> Model:
    """Load the networks of `runs` and the wanted folds into one model.

    Raises:
        RunError: a run or fold is not trained, or its weights do not fit.
    """
    from autoseg.inference import Member, Model
    from autoseg.networks.build import build
    from autoseg.networks.describe import describe
    from autoseg.networks.hardware import pick_device, pick_precision

    members = []
    for run in runs:
        folds = finished_folds(workspace, run)
        wanted = folds if options.folds is None else list(options.folds)
        missing = sorted(set(wanted) - set(folds))
        if missing or not wanted:
            raise RunError(
                f"run {run!r} has no finished training of fold(s) {missing or 'any'} (finished: {folds or 'none'}); "
                f"train with: autoseg train {workspace.root} --config {run}"
            )
        first = RunFolder(workspace.fold(run, wanted[0])).record()
        plan, mirror = first.plan, first.spec.augment.mirror
        configuration = plan.configurations[first.configuration]
        networks = []
        for fold in wanted:
            folder = RunFolder(workspace.fold(run, fold))
            record = folder.record()
            if (record.configuration, record.plan, record.spec.augment.mirror) != (first.configuration, plan, mirror):
                raise RunError(
                    f"the folds of run {run!r} were trained with different plans, so they cannot be combined; "
                    f"choose some with --folds, or train fold {fold} again with --restart"
                )
            network = build(describe(configuration, len(plan.channels), plan.labels.output_count))
            try:
                network.load_state_dict(load_tensors(folder.weights_path))
            except RuntimeError as error:
                raise RunError(f"{folder.weights_path} does not fit its plan: {str(error).splitlines()[0]}") from None
            networks.append(network)
        axes = tuple(range(configuration.dims)) if mirror is None else mirror
        members.append(Member(plan, first.configuration, tuple(networks), axes))
    device = pick_device(options.device)
    return Model(members, device, pick_precision(device, options.precision), options.mirror, postprocessing)


def finished_folds(workspace: Workspace, run: str) -> list[int]:
    """Folds of a run whose training is finished."""
    found = [(re.fullmatch(r"fold_(\d+)", path.name), path) for path in (workspace.runs / run).glob("fold_*")]
    return sorted(int(match[1]) for match, path in found if match and RunFolder(path).finished)


def chosen(workspace: Workspace, reporter: Reporter = SILENT) -> tuple[tuple[str, ...], tuple[Spec, ...]]:
    """The runs and post-processing to use: those of selection.json, else the most trusted finished run.

    Raises:
        RunError: nothing is trained.
    """
    if workspace.selection_path.exists():
        selection = load_record(workspace.selection_path, Selection)
        for run in selection.runs:
            if set(selection.run_folds.get(run, ())) - set(finished_folds(workspace, run)):
                reporter.warn(f"run {run} has fewer finished folds than when it was selected: autoseg select {workspace.root}")
        return tuple(selection.runs), tuple(selection.postprocessing)
    finished = sorted({p.parent.parent.name for p in workspace.runs.glob("*/fold_*/weights.safetensors")})
    if not finished:
        raise RunError(f"{workspace.root} holds no finished training; run: autoseg train {workspace.root}")
    run = min(finished, key=lambda name: (PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), name))
    if len(finished) > 1:
        reporter.info(
            f"no selection yet, so {run} is used out of {', '.join(finished)}; compare them with: autoseg select {workspace.root}"
        )
    return (run,), ()


def predict(
    workspace: Workspace, cases: Sequence[CaseFiles], out: Path, options: Options = Options(), reporter: Reporter = SILENT
) -> None:
    """Predict new cases with the selected model; finished outputs of the same model and input are skipped.

    Raises:
        CasesFailed: some cases failed; they are listed, the rest is done.
        RunError: nothing trained, or `out` holds masks that this model did not make.
    """
    runs, postprocessing = chosen(workspace.require(), reporter)
    folder = MaskFolder(out, _identity(workspace, runs, options, postprocessing))
    todo = [case for case in cases if not folder.is_finished(case, options.probabilities, options.overwrite) or options.overwrite]
    if not todo:
        reporter.info(f"all {len(cases)} cases are predicted already; --overwrite makes them anew")
        return
    model = load_model(workspace, runs, options, postprocessing)
    _run(model, todo, folder, options.probabilities, reporter, "predict")


def predict_validation(
    workspace: Workspace,
    runs: Sequence[str],
    fold: int,
    out: Path,
    reporter: Reporter = SILENT,
    device: str = "auto",
    precision: str = "auto",
) -> None:
    """Predict the validation cases of a fold with networks that have not seen them, without post-processing.

    Raises:
        CasesFailed: some cases failed.
    """
    split = RunFolder(workspace.fold(runs[0], fold)).record().split
    cases = [case for case in workspace.dataset().cases if case.case in set(split.val)]
    options = Options(folds=(fold,), device=device, precision=precision)
    folder = MaskFolder(out, _identity(workspace, runs, options, ()))
    todo = [case for case in cases if not folder.is_finished(case, False, replace=True)]
    if todo:
        _run(load_model(workspace, runs, options), todo, folder, False, reporter, f"validate fold {fold}")


def _identity(workspace: Workspace, runs: Sequence[str], options: Options, postprocessing: Sequence[Spec]) -> dict[str, object]:
    """What the masks depend on: weights, folds, mirroring and post-processing."""
    weights = {}
    for run in runs:
        for fold in finished_folds(workspace, run):
            if options.folds is None or fold in options.folds:
                with RunFolder(workspace.fold(run, fold)).weights_path.open("rb") as file:
                    weights[f"{run}/fold_{fold}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"weights": weights, "mirror": options.mirror, "postprocessing": [s.model_dump(mode="json") for s in postprocessing]}


def _run(model: Model, todo: Sequence[CaseFiles], folder: MaskFolder, probabilities: bool, reporter: Reporter, name: str) -> None:
    """Three threads, one case each: the next case is read while this one is computed and the last one is written."""
    failed: dict[str, str] = {}
    short: list[CaseFiles] = []  # out of memory while others were in work: tried once more alone
    with (
        ThreadPoolExecutor(1, "reader") as reader,
        ThreadPoolExecutor(1, "writer") as writer,
        reporter.task(name, len(todo)) as task,
    ):
        reading = [reader.submit(_attempt, _read, model, todo[0])]
        writing: list[Future[object]] = []

        def settle(case: CaseFiles, outcome: object, alone: bool = False) -> bool:
            if isinstance(outcome, MemoryError) and not alone:
                short.append(case)
            elif isinstance(outcome, Exception):
                failed[case.case] = " ".join((str(outcome) or type(outcome).__name__).split())
                folder.fail(case, failed[case.case])
            return not isinstance(outcome, Exception)

        for index, case in enumerate(todo):
            ready = reading.pop().result()
            if index + 1 < len(todo):
                reading.append(reader.submit(_attempt, _read, model, todo[index + 1]))
            logits = _attempt(_compute, model, ready) if settle(case, ready) else None
            if writing:
                settle(todo[index - 1], writing.pop().result())
            if logits is not None and settle(case, logits):
                writing.append(writer.submit(_attempt, _finish, model, case, ready, logits, folder, probabilities))
            task.advance(note=case.case)
        if writing:
            settle(todo[-1], writing.pop().result())
        for case in short:
            settle(case, _attempt(_whole, model, case, folder, probabilities), alone=True)
    if failed:
        lines = "\n".join(f"  {case}: {why}" for case, why in failed.items())
        raise CasesFailed(
            f"{len(failed)} of {len(todo)} cases failed, the rest is done (see {folder.path / 'summary.csv'}):\n{lines}"
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


def _read(model: Model, case: CaseFiles) -> _Ready:
    begin = time.perf_counter()
    image: Image = read_case([Path(p) for p in case.images])
    middle = time.perf_counter()
    prepared = model.prepare(image)
    return _Ready(image.grid, prepared, {"read": middle - begin, "preprocess": time.perf_counter() - middle})


def _compute(model: Model, ready: _Ready) -> list[torch.Tensor]:
    begin = time.perf_counter()
    logits = [model.logits(member, case) for member, case in zip(model.members, ready.prepared, strict=True)]
    ready.seconds["network"] = time.perf_counter() - begin
    return logits


def _whole(model: Model, case: CaseFiles, folder: MaskFolder, probabilities: bool) -> None:
    ready = _read(model, case)
    _finish(model, case, ready, _compute(model, ready), folder, probabilities)


def _finish(
    model: Model, case: CaseFiles, ready: _Ready, logits: list[torch.Tensor], folder: MaskFolder, probabilities: bool
) -> None:
    begin = time.perf_counter()
    prediction: Prediction = model.restore(logits, [p.placement for p in ready.prepared], probabilities)
    ready.seconds["restore"] = time.perf_counter() - begin
    like = Path(case.images[0])
    folder.path.mkdir(parents=True, exist_ok=True)
    row = _row(case, ready, prediction.label_zyx, model.labels)
    folder.begin(case, row)
    begin = time.perf_counter()
    if prediction.probabilities_czyx is not None:
        write_probabilities(folder.probabilities(case), prediction.probabilities_czyx, ready.image_grid, like)
    write_label(folder.mask(case), prediction.label_zyx, ready.image_grid, like)
    folder.end(case, {**row, "seconds_write": f"{time.perf_counter() - begin:.3f}"})


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
