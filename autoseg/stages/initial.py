"""Fine-tuning: open the model that a run starts from, take its topology, and write its weights as the run's first checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.errors import RunError
from autoseg.files.model import ModelFile, open_model_file
from autoseg.files.preprocessed import digest
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace, save_record
from autoseg.logs import Reporter
from autoseg.stages.predict import finished_folds
from autoseg.types.initial import InitRecord
from autoseg.types.model import part_name
from autoseg.types.plan import Configuration, Ints, Plan
from autoseg.types.run import RunRecord

if TYPE_CHECKING:
    import torch

    from autoseg.trainers.default import Job

TOPOLOGY = ("network", "strides", "kernel_sizes", "features_per_stage", "blocks_per_stage", "decoder_blocks_per_stage")
SHOWN_CASES = 5


@dataclass(frozen=True)
class Trained:
    """The networks of one run of a model, one for each fold.

    `seen` are the training cases of each fold, None where the model does not say.
    """

    run: str
    plan: Plan
    configuration: str
    folds: tuple[int, ...]
    seen: Mapping[int, frozenset[str]] | None
    hash_of: Callable[[int], str]
    load: Callable[[int], dict[str, torch.Tensor]]

    @property
    def shape(self) -> Configuration:
        """The configuration it was trained with."""
        return self.plan.configurations[self.configuration]


@dataclass(frozen=True)
class InitialModel:
    """A model to start from, seen from the work folder that is trained.

    `same_data` says that the model was trained on cases of this very data set. Then fold k starts from the model's fold k, whose
    training cases are the same if the splits are; else, and where the model has no such fold, every fold starts from the model's
    first one.
    """

    path: Path
    networks: tuple[Trained, ...]
    same_data: bool

    def network(self, name: str, own: Configuration) -> Trained:
        """The network for a configuration: that of the same name, else the only one of as many dimensions.

        Raises RunError when there is none, or more than one.
        """
        candidates = [one for one in self.networks if one.configuration == name]
        candidates = [one for one in candidates if one.run == name] or candidates
        candidates = candidates or [one for one in self.networks if one.shape.dims == own.dims]
        if len(candidates) == 1:
            return candidates[0]
        there = ", ".join(f"{one.run} ({one.shape.dims}D)" for one in self.networks)
        if not candidates:
            raise RunError(f"{self.path} has no network that {name} could start from; it has {there}; choose with --config")
        raise RunError(
            f"{self.path} has several networks that {name} could start from: {', '.join(one.run for one in candidates)}; "
            "pack the one that is meant with autoseg pack --run and give that file to --init"
        )

    def fold(self, network: Trained, fold: int) -> int:
        """The fold of the model that a fold starts from."""
        return fold if self.same_data and fold in network.folds else network.folds[0]

    def key(self, network: Trained) -> str:
        """The hash of the weights that folds start from."""
        used = network.folds if self.same_data else network.folds[:1]
        return digest([network.hash_of(fold) for fold in used])

    def warning(self, network: Trained, record: RunRecord) -> str:
        """What is to be said about validation cases that the model may have been trained on; empty where there are none."""
        source = self.fold(network, record.fold)
        if not self.same_data or (network.seen is None and source == record.fold):
            return ""
        start = f"{record.name} fold {record.fold} starts from fold {source} of {self.path}, which "
        if network.seen is None:
            return f"{start}may have been trained on this fold's validation cases: their Dice may be too good"
        seen = sorted(set(record.split.val) & network.seen[source])
        if not seen:
            return ""
        shown = ", ".join(seen[:SHOWN_CASES]) + (" and others" if len(seen) > SHOWN_CASES else "")
        return f"{start}was trained on validation cases of this fold ({shown}): their Dice will be too good"


def open_initial(path: Path, workspace: Workspace) -> InitialModel:
    """Open the model file or the work folder that runs of `workspace` shall start from.

    Raises:
        RecordError: neither of the two, or damaged. RunError: nothing in it is trained.
    """
    plan = workspace.plan()
    if path.is_dir():
        source = Workspace(path).require()
        networks = tuple(_of_folder(source))
        if not networks:
            raise RunError(f"{source.root} holds no finished training to start from; run: autoseg train {source.root}")
        return InitialModel(path, networks, _shares_data(source, workspace))
    file = open_model_file(path)
    networks = tuple(_of_file(file, run) for run in file.record.networks)
    return InitialModel(path, networks, any(one.plan.dataset_name == plan.dataset_name for one in networks))


def _of_folder(source: Workspace) -> list[Trained]:
    """The runs of a work folder that have a finished fold."""
    found = []
    for run in sorted({path.parent.parent.name for path in source.runs.glob("*/fold_*/weights.safetensors")}):
        folders = {fold: RunFolder(source.fold(run, fold)) for fold in finished_folds(source, run)}
        if not folders:
            continue
        records = {fold: folder.record() for fold, folder in folders.items()}
        first = next(iter(records.values()))
        seen = {fold: frozenset(one.split.train) for fold, one in records.items()}
        found.append(Trained(
            run, first.plan, first.configuration, tuple(folders), seen,
            lambda fold, folders=folders: _sha256(folders[fold].weights_path),  # type: ignore[misc]
            lambda fold, folders=folders: folders[fold].load_weights(),  # type: ignore[misc]
        ))
    return found


def _of_file(file: ModelFile, run: str) -> Trained:
    """One run of a model file."""
    network = file.record.networks[run]

    def load(fold: int) -> dict[str, torch.Tensor]:
        name = part_name(run, fold)
        return file.read([name])[name]

    return Trained(
        run, file.record.plan_of(run), network.configuration, tuple(sorted(network.folds)), None,
        lambda fold: file.record.parts[part_name(run, fold)].sha256, load,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shares_data(source: Workspace, own: Workspace) -> bool:
    """Whether two work folders are of the same data set: its name, or an image file that both have."""
    there, here = source.dataset(), own.dataset()
    images = {image for case in there.cases for image in case.images}
    return there.name == here.name or any(image in images for case in here.cases for image in case.images)


def take_topology(own: Configuration, model: Configuration) -> Configuration:
    """A configuration with the network of another; its patch is brought to the nearest edges that this network can take."""
    values = {name: getattr(model, name) for name in TOPOLOGY}
    patch = fit_patch(own.patch_size, model.strides)
    checkpointing = min(own.checkpointing, len(model.strides))
    return own.model_copy(update={**values, "patch_size": patch, "checkpointing": checkpointing})


def fit_patch(patch: Ints, strides: Sequence[Ints]) -> Ints:
    """The nearest patch whose edges are multiples of the strides' products, and not a single voxel at the lowest stage."""
    divisors = [math.prod(row[axis] for row in strides) for axis in range(len(patch))]
    edges = [max(divisor, math.ceil(edge / divisor - 0.5) * divisor) for edge, divisor in zip(patch, divisors, strict=True)]
    if edges == divisors:
        grown = min(range(len(edges)), key=lambda axis: edges[axis] / patch[axis])
        edges[grown] *= 2
    return tuple(edges)


def write_start(
    record: RunRecord, planned: Configuration, job: Job, folder: RunFolder, model: InitialModel, reporter: Reporter
) -> None:
    """Write the model's weights, adapted, as the checkpoint of step 0, and init.json; going on then does not need the model.

    Raises:
        RunError: the model's weights do not fit its own description.
    """
    from autoseg.trainers.default import Training
    from autoseg.trainers.initial import Ends, adapt

    configuration = record.plan.configurations[record.configuration]
    network = model.network(record.configuration, planned)
    fold = model.fold(network, record.fold)
    training = Training(job)
    ends = [
        Ends(plan.channels, plan.labels, one.previous_stage is not None)
        for plan, one in ((network.plan, network.shape), (record.plan, configuration))
    ]
    try:
        made = adapt(network.load(fold), ends[0], training.network.state_dict(), ends[1], training.network.description)
    except ValueError as error:
        raise RunError(f"{model.path} ({network.run} fold {fold}) cannot be started from: {error}") from None
    training.start_from(made.tensors, 0)
    warning = model.warning(network, record)
    report = InitRecord(
        model=str(model.path.absolute()), init=record.init or "", network=f"{network.run} fold {fold}",
        patch_size=configuration.patch_size, planned_patch=planned.patch_size, parts=made.parts, kept_weights=made.kept,
        adapted_weights=made.adapted, new_weights=made.new, notes=(warning,) if warning else (),
    )
    _tell(report, record, model, reporter)
    state = training.state()
    folder.save_record(record)  # first, so that a checkpoint of another topology never lies beside no record
    save_record(folder.path / "init.json", report)
    folder.save_checkpoint(0, state.tensors, state.numbers)


def _tell(report: InitRecord, record: RunRecord, model: InitialModel, reporter: Reporter) -> None:
    """The report as lines; the parts once for all folds of a run."""
    total = report.kept_weights + report.adapted_weights + report.new_weights
    shares = ", ".join(
        f"{100 * count / total:.3g} % {state}"
        for state, count in (("kept", report.kept_weights), ("adapted", report.adapted_weights), ("new", report.new_weights))
    )
    reporter.info(f"{record.name} fold {record.fold} starts from {model.path} ({report.network}); of {total} weights {shares}")
    if report.patch_size != report.planned_patch:
        reporter.info(f"  patch {_edges(report.patch_size)} instead of the planned {_edges(report.planned_patch)}, "
                      "which the model's network cannot take")
    width = max(len(taken.part) for taken in report.parts)
    for taken in report.parts:
        reporter.info(f"  {taken.part:<{width}}  {taken.state:<8}  {taken.how}".rstrip())
    for note in report.notes:
        reporter.warn(note)


def _edges(patch: Ints) -> str:
    return " x ".join(map(str, patch))
