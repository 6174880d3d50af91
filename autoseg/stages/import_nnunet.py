"""Import nnU-Net: a trained model's results folder in, a model file out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autoseg import __version__
from autoseg.datasets.description import load_json
from autoseg.errors import PlanError, RecordError, RunError
from autoseg.files.model import write_model_file
from autoseg.files.nnunet_checkpoint import Checkpoint, read_checkpoint
from autoseg.files.tensors import tensor_bytes
from autoseg.logs import SILENT, Reporter
from autoseg.networks.describe import describe
from autoseg.networks.limits import require_sane
from autoseg.stages.nnunet_plan import Source, make_plan, read_source
from autoseg.stages.nnunet_weights import read_weights
from autoseg.stages.pack import label_colours
from autoseg.types.labels import Labels
from autoseg.types.model import MemberRecord, ModelRecord, NetworkRecord, part_name
from autoseg.types.plan import Plan
from autoseg.types.record import Spec

Kind = Literal["final", "best"]
ALL = 0  # the number under which a network trained on all cases (fold_all) is kept
LARGEST_ONLY = "remove_all_but_largest_component_from_segmentation"


@dataclass(frozen=True)
class _Trained:
    """One trained configuration: its checkpoints by fold (fold_all as 0), and the patch axes it may be mirrored along."""

    source: Source
    configuration: str
    checkpoints: Mapping[int, Path]
    mirror_axes: tuple[int, ...]

    @property
    def previous(self) -> str | None:
        """The configuration whose segmentation is part of the input."""
        found = self.source.configuration(self.configuration).get("previous_stage")
        return found if isinstance(found, str) else None


def import_nnunet(
    folder: Path,
    out: Path,
    folds: Sequence[int] | None = None,
    checkpoint: Kind = "final",
    previous: Path | None = None,
    postprocessing: bool = True,
    licence: str = "",
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> Path:
    """Write a model file of a trained nnU-Net v2 model: the folder that holds plans.json, dataset.json and fold_0, fold_1, ...

    `folds` None means all that are trained; fold_all is taken where there is no other. For a cascade `previous` is the folder of
    its first stage, looked for beside this one unless given. Post-processing that cross-validation found is taken from
    postprocessing.json, never from the pickle beside it. Nothing in the checkpoints is run.

    Raises:
        RunError: nothing trained there, or `out` holds something else. PlanError: something that cannot be imported.
        RecordError: a damaged or refused checkpoint. DatasetError: dataset.json is inconsistent.
    """
    stages = [_find(folder, folds, checkpoint)]
    if stages[0].previous is not None:
        stages.append(_find(_previous_folder(stages[0], previous), folds, checkpoint))
        if stages[1].configuration != stages[0].previous:
            raise RunError(f"{stages[1].source.folder} holds {stages[1].configuration}; the previous stage of "
                           f"{stages[0].configuration} is {stages[0].previous}")
    elif previous is not None:
        raise RunError(f"{folder} holds {stages[0].configuration}, which has no previous stage; leave out {previous}")
    plan = make_plan(stages[0].source, {stage.configuration: stage.mirror_axes for stage in stages})
    if make_plan(stages[-1].source, {stage.configuration: stage.mirror_axes for stage in stages}) != plan:
        raise PlanError(f"{stages[0].source.plans_path} and {stages[-1].source.plans_path} are different plans")
    record = _record(plan, stages, _postprocessing(stages[0], plan.labels, reporter) if postprocessing else (), licence)
    content = {
        part_name(stage.configuration, fold): _content(path, record, stage.configuration)
        for stage in stages for fold, path in stage.checkpoints.items()
    }
    with reporter.task("import", 1, "files") as task:
        made = write_model_file(out, record, content, overwrite)
        task.advance(note=f"{len(content)} networks")
    reporter.info(f"{made.path}: {stages[0].configuration} of {plan.dataset_name}, "
                  f"fold(s) {', '.join(path.parent.name.removeprefix('fold_') for path in stages[0].checkpoints.values())}, "
                  f"{made.path.stat().st_size / 1e6:.1f} MB")
    return made.path


def _content(path: Path, record: ModelRecord, run: str) -> Callable[[], bytes]:
    """The bytes of a part; the checkpoint is read when they are asked for."""

    def make() -> bytes:
        configuration, inputs = record.configuration_of(run), record.input_channels(run)
        try:
            require_sane(configuration, inputs, record.labels.output_count)
        except ValueError as error:
            raise PlanError(f"{path.parent.parent / 'plans.json'}: configurations.{run}: {error}") from None
        weights = read_weights(read_checkpoint(path), describe(configuration, inputs, record.labels.output_count))
        try:
            return tensor_bytes(weights)
        except RunError as error:
            raise RunError(f"{path}: {error}; its training failed, leave this fold out") from None

    return make


def _find(folder: Path, folds: Sequence[int] | None, kind: Kind) -> _Trained:
    """The wanted checkpoints of a model's folder, with what they must agree in."""
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            inside = sorted(str(path.parent) for path in folder.glob("**/plans.json"))[:5] if folder.is_dir() else []
            hint = f"; did you mean {' or '.join(inside)}?" if inside else ""
            raise RunError(f"{folder} is not the folder of a trained nnU-Net model: it holds no {name}{hint}")
    name = f"checkpoint_{kind}.pth"
    there = {path.parent.name.removeprefix("fold_"): path for path in folder.glob(f"fold_*/{name}")}
    numbered = {int(fold): path for fold, path in there.items() if re.fullmatch(r"[0-9]{1,4}", fold)}
    wanted = sorted(numbered) if folds is None else list(dict.fromkeys(folds))
    missing = sorted(set(wanted) - set(numbered))
    if folds is None and not numbered and "all" in there:
        chosen = {ALL: there["all"]}
    elif missing or not wanted:
        found = ", ".join(sorted(str(path.relative_to(folder)) for path in folder.glob("fold_*/checkpoint_*.pth"))) or "none"
        raise RunError(f"{folder} holds no {name} of fold(s) {', '.join(map(str, missing)) or 'any'}; checkpoints there: {found}")
    else:
        chosen = {fold: numbered[fold] for fold in wanted}
    said = {path: _said(read_checkpoint(path)) for path in chosen.values()}
    (first, values), *others = said.items()
    for path, other in others:
        if other != values:
            raise RunError(f"{first} and {path} were trained with different settings ({values} and {other}); choose one fold")
    source = read_source(folder)
    configuration, axes = values
    source.configuration(configuration)
    return _Trained(source, configuration, chosen, axes)


def _said(checkpoint: Checkpoint) -> tuple[str, tuple[int, ...]]:
    """The configuration that a checkpoint was trained for, and the axes it may be mirrored along."""
    arguments = checkpoint.values.get("init_args")
    name = arguments.get("configuration") if isinstance(arguments, Mapping) else None
    if not isinstance(name, str):
        raise RecordError(f"{checkpoint.path} is not a checkpoint of nnU-Net v2: its init_args name no configuration")
    axes = checkpoint.values.get("inference_allowed_mirroring_axes")
    if axes is None:
        return name, ()
    if not isinstance(axes, tuple | list) or not all(type(axis) is int for axis in axes):
        raise RecordError(f"{checkpoint.path}: inference_allowed_mirroring_axes: expected a tuple of whole numbers")
    return name, tuple(sorted(set(axes)))


def _previous_folder(stage: _Trained, given: Path | None) -> Path:
    """The folder of the previous stage: as given, else the one beside that is called so."""
    folder = stage.source.folder.absolute()
    beside = folder.with_name(re.sub(rf"{re.escape(stage.configuration)}$", str(stage.previous), folder.name))
    if given is None and (beside == folder or not beside.is_dir()):
        raise RunError(f"{folder} holds {stage.configuration}, which starts from the segmentation of {stage.previous}; "
                       f"expected that model's folder at {beside}, found none: give it as the previous stage")
    return beside if given is None else given


def _record(plan: Plan, stages: Sequence[_Trained], steps: tuple[Spec, ...], licence: str) -> ModelRecord:
    networks = {
        stage.configuration: NetworkRecord(
            configuration=stage.configuration, folds=tuple(stage.checkpoints), mirror_axes=stage.mirror_axes,
            previous=stage.previous,
        )
        for stage in stages
    }
    trained = ", ".join(f"{stage.configuration} fold(s) {', '.join(p.parent.name[5:] for p in stage.checkpoints.values())}"
                        for stage in stages)
    return ModelRecord(
        name=plan.dataset_name, made_by=f"autoseg {__version__}", licence="\n".join(licence.splitlines()), labels=plan.labels,
        colours=label_colours(plan.labels), channels=plan.channels, plan=plan, networks=networks,
        members=(MemberRecord(run=stages[0].configuration),), postprocessing=steps,
        notes=(f"imported from nnU-Net v2: {trained}",),
    )


def _postprocessing(stage: _Trained, labels: Labels, reporter: Reporter) -> tuple[Spec, ...]:
    """The steps of postprocessing.json of these very folds' cross-validation; none where there is no such file."""
    folder = stage.source.folder
    folds = "_".join(map(str, sorted(stage.checkpoints)))
    places = (folder / f"crossval_results_folds_{folds}" / "postprocessing.json", folder / "postprocessing.json")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        pickles = sorted(folder.glob("**/postprocessing.pkl"))
        if pickles:
            reporter.warn(f"{pickles[0]} is not read, as pickles can run code; without a postprocessing.json of these folds the "
                          "model has no post-processing")
        return ()
    data = load_json(path)
    functions, settings = (data.get(f"postprocessing_{key}") if isinstance(data, Mapping) else None for key in ("fns", "kwargs"))
    if not isinstance(functions, list) or not isinstance(settings, list) or len(functions) != len(settings):
        raise PlanError(f"{path}: expected postprocessing_fns and postprocessing_kwargs of one length")
    index = {label.value: place + 1 for place, label in enumerate(labels.foreground)}
    steps = []
    for function, options in zip(functions, settings, strict=True):
        values = _values(options.get("labels_or_regions")) if isinstance(options, Mapping) else []
        known = function == LARGEST_ONLY and values and set(values) <= set(index)
        if not known or options.get("background_label", 0) != labels.background.value:
            raise PlanError(f"{path}: can be imported: {LARGEST_ONLY} of declared labels; found {str(function)[:80]!r} of "
                            f"{str(values)[:80]}; leave post-processing out")
        steps.append(Spec(kind="largest_component", options={"labels": sorted({index[value] for value in values})}))
    if steps:
        reporter.info(f"post-processing of {path}: only the largest component stays, {len(steps)} step(s)")
    return tuple(steps)


def _values(given: Any) -> list[int]:
    """All label values in a label, a region or a list of both."""
    if isinstance(given, list):
        return [value for part in given for value in _values(part)]
    return [given] if type(given) is int else [-1]
