"""Trained networks as models in memory, from a model file or a work folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoseg.errors import RunError
from autoseg.files.model import ModelFile, describe_run, open_model_file
from autoseg.files.workspace import Workspace
from autoseg.logs import SILENT
from autoseg.stages.judge import Judge, find_judge, trust_path
from autoseg.types.model import part_name
from autoseg.types.trust import TrainingCases

if TYPE_CHECKING:
    import torch

    from autoseg.inference import Member, Model
    from autoseg.networks.build import Network
    from autoseg.networks.describe import Description
    from autoseg.stages.predict import Options


def load(path: Path, options: Options) -> Model:
    """Load a model file, or the selected networks of a work folder.

    Raises:
        RecordError: neither of the two; RunError: nothing trained, or the device cannot be used.
    """
    from autoseg.stages.predict import chosen, load_model, network_hashes

    if not path.is_dir():
        return open_model(path, options)
    workspace = Workspace(path).require()
    selection = chosen(workspace, stopped=options.folds is not None)
    temperatures: dict[str, float] = {}
    if trust_path(workspace).exists():
        hashes = {name: found for run in selection.runs for name, found in network_hashes(workspace, run, options.folds).items()}
        judge = find_judge(workspace, selection, hashes, options.mirror, SILENT)
        temperatures = judge.temperatures if judge else {}
    return load_model(workspace, selection.runs, options, selection.postprocessing, selection.run_weights, temperatures)


def open_model(path: Path, options: Options) -> Model:
    """Load the wanted folds of a model file.

    Raises:
        RecordError: not a sound model file; RunError: a wanted fold is not in it, or the device cannot be used.
    """
    return model_of(open_model_file(path), options)


def model_of(file: ModelFile, options: Options) -> Model:
    """The model of an opened file; where it is calibrated, probabilities are divided by its temperatures.

    Raises:
        RecordError: a part was altered; RunError: a wanted fold is not in it, or the device cannot be used.
    """
    record = file.record
    temperatures = {} if record.trust is None else {run: one.temperature for run, one in record.trust.calibration.items()}
    made: dict[str, Member] = {}
    tensors = file.read(_wanted_parts(file, options.folds))
    members = [
        replace(
            _member(file, one.run, options.folds, tensors, made), weight=one.weight, temperature=temperatures.get(one.run, 1.0)
        )
        for one in record.members
    ]
    return assemble(members, options, record.postprocessing)


def assemble(members: Sequence[Member], options: Options, postprocessing: Sequence[Any] = ()) -> Model:
    """A model of loaded members on the device and in the precision that are asked for."""
    from autoseg.inference import Limits, Model
    from autoseg.networks.hardware import pick_device, pick_precision

    device = pick_device(options.device)
    limits = Limits.of_gb(options.max_ram, options.gpu_memory)
    return Model(members, device, pick_precision(device, options.precision), options.mirror, postprocessing, limits)


def trained_network(description: Description, tensors: dict[str, torch.Tensor]) -> Network:
    """A network with given weights, which it takes as they are instead of copying them.

    Raises RuntimeError when they do not fit.
    """
    import torch

    from autoseg.networks.build import build

    with torch.device("meta"):  # initial weights would only be thrown away
        network = build(description)
    network.load_state_dict(tensors, assign=True)
    return network


@dataclass(frozen=True)
class Source:
    """A model that masks can be made with, before its weights are read.

    `identity` is what its masks depend on. `judge` tells how good masks are likely to be, `training` what is usual; None where
    that is not known.
    """

    identity: dict[str, Any]
    channels: tuple[str, ...]
    judge: Judge | None
    training: TrainingCases | None
    load: Callable[[], Model]


def file_source(file: ModelFile, options: Options) -> Source:
    """A model file as a source of masks."""
    record = file.record
    judge = None if record.trust is None else Judge(record.trust, options.mirror)
    training = None if record.training is None else record.training.ranges
    return Source(model_identity(file, options), record.channels, judge, training, lambda: model_of(file, options))


def model_hashes(file: ModelFile, folds: Sequence[int] | None = None) -> dict[str, str]:
    """The hash of every part that masks of these folds come from, by `run/fold_k`."""
    parts = file.record.parts
    return {
        f"{run}/fold_{fold}": parts[part_name(run, fold)].sha256
        for run, network in file.record.networks.items() for fold in network.folds if folds is None or fold in folds
    }


def model_identity(file: ModelFile, options: Options) -> dict[str, Any]:
    """What masks made with a model file depend on: networks, how they are weighted, mirroring and post-processing."""
    record = file.record
    identity: dict[str, Any] = {
        "weights": model_hashes(file, options.folds), "mirror": options.mirror,
        "postprocessing": [step.model_dump(mode="json") for step in record.postprocessing],
    }
    if len({member.weight for member in record.members}) > 1:
        identity["shares"] = {member.run: member.weight for member in record.members}
    return identity


def _wanted_parts(file: ModelFile, folds: Sequence[int] | None) -> list[str]:
    """The parts to read: all, or those of the wanted folds, which every run must have."""
    names: list[str] = []
    for run, network in file.record.networks.items():
        missing = sorted(set(folds or ()) - set(network.folds))
        if missing or (folds is not None and not folds):
            there = ", ".join(map(str, network.folds))
            raise RunError(f"{file.path} holds fold(s) {there} of run {run!r}, but not {missing or 'an empty list of them'}")
        names += [part_name(run, fold) for fold in (network.folds if folds is None else folds)]
    return names


def _member(
    file: ModelFile, run: str, folds: Sequence[int] | None, tensors: Mapping[str, dict[str, torch.Tensor]],
    made: dict[str, Member],
) -> Member:
    """One run's networks, with the member of the stage before; a run that several rest on is made once."""
    from autoseg.inference import Member

    if run not in made:
        network = file.record.networks[run]
        previous = None if network.previous is None else _member(file, network.previous, folds, tensors, made)
        description = describe_run(file.record, run)
        networks = tuple(
            trained_network(description, tensors[part_name(run, fold)]) for fold in (network.folds if folds is None else folds)
        )
        made[run] = Member(file.record.plan_of(run), network.configuration, networks, network.mirror_axes, previous)
    return made[run]
