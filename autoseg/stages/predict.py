"""Predict: images in, masks in the geometry of the images out."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoseg.errors import RunError
from autoseg.files.masks import MaskFolder
from autoseg.files.model import ModelFile
from autoseg.files.runs import RunFolder, load_tensors
from autoseg.files.workspace import Workspace, load_record
from autoseg.logs import SILENT, Reporter
from autoseg.stages.judge import find_judge
from autoseg.stages.models import Source, assemble, file_source, trained_network
from autoseg.stages.predict_cases import Work, predict_cases
from autoseg.types.dataset import CaseFiles
from autoseg.types.record import Spec
from autoseg.types.run import RunRecord
from autoseg.types.selection import Selection

if TYPE_CHECKING:
    from autoseg.inference import Member, Model

PREFERRED = ("3d_fullres", "3d_cascade_fullres", "2d", "3d_lowres")  # order of trust when nothing was selected


@dataclass(frozen=True)
class Options:
    """How to predict; `folds` None means all that are trained. `probabilities` and `uncertainty` ask for further files.

    `max_ram` is GB (2**30 bytes) of main memory for the whole process, `gpu_memory` GB on the card; None means what is free.
    """

    folds: tuple[int, ...] | None = None
    device: str = "auto"
    precision: str = "auto"
    mirror: bool = True
    probabilities: bool = False
    overwrite: bool = False
    uncertainty: bool = False
    max_ram: float | None = None
    gpu_memory: float | None = None


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

    finished = finished_folds(workspace, run, stopped=wanted is not None)
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
        weights_path = RunFolder(workspace.fold(run, record.fold)).network_path
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


def finished_folds(workspace: Workspace, run: str, stopped: bool = False) -> list[int]:
    """Folds of a run that have trained weights, or with `stopped` also those at which training was stopped."""
    found = [(re.fullmatch(r"fold_(\d+)", path.name), path) for path in (workspace.runs / run).glob("fold_*")]
    folders = [(int(match[1]), RunFolder(path)) for match, path in found if match]
    return sorted(k for k, one in folders if one.usable or (stopped and one.network_path.exists() and one.record_path.exists()))


def chosen(workspace: Workspace, reporter: Reporter = SILENT, stopped: bool = False) -> Selection:
    """The runs, weights and post-processing to use: selection.json, else the most trusted finished run alone.

    With `stopped`, where nothing is finished, a run that was stopped will do.

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
    if not finished and stopped:
        finished = sorted({p.parent.parent.name for p in workspace.runs.glob("*/fold_*/weights_so_far.safetensors")})
        if finished:
            reporter.warn("no training is finished; networks as they were when training was stopped are used")
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
    from autoseg.inference import Wishes

    wishes = Wishes(options.probabilities, options.uncertainty, source.judge is not None)
    predict_cases(Work(source.load(), folder, wishes, source.judge, source.training), todo, reporter, "predict")


def work_source(workspace: Workspace, options: Options, reporter: Reporter = SILENT) -> Source:
    """The selected model of a work folder as a source of masks. Raises RunError when nothing is trained."""
    selection = chosen(workspace.require(), reporter, stopped=options.folds is not None)
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
        from autoseg.inference import Wishes

        model = load_model(workspace, runs, options, (), weights)
        predict_cases(Work(model, folder, Wishes()), todo, reporter, f"validate fold {fold}")


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
    for fold in finished_folds(workspace, run, stopped=folds is not None):
        if folds is None or fold in folds:
            folder = RunFolder(workspace.fold(run, fold))
            with folder.network_path.open("rb") as file:
                found[f"{run}/fold_{fold}"] = hashlib.file_digest(file, "sha256").hexdigest()
            source = previous_run(folder.record())
    return found if source is None else {**found, **network_hashes(workspace, source, folds)}
