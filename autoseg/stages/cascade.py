"""Cascade: the segmentation of every case by the previous stage, made by a network that has not seen it, for the next stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.errors import RunError
from autoseg.files.preprocessed import StoredCase, digest, open_case, previous_key, remove_leftovers, write_previous
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace
from autoseg.logs import SILENT, Reporter
from autoseg.stages.predict import Options, load_model, network_hashes
from autoseg.stages.preprocess import data_folder, preprocessing_values
from autoseg.types.case import Preprocessed
from autoseg.types.plan import Plan

if TYPE_CHECKING:
    from autoseg.inference import Member


def case_folds(workspace: Workspace, previous: str, configuration: str, cases: Sequence[str] | None = None) -> dict[str, int]:
    """The fold of the run `previous` whose network segments each case (of all folds by default): the first that validates it.

    Raises RunError when no fold validates a case.
    """
    splits = workspace.splits()
    wanted = [case for split in splits for case in (*split.train, *split.val)] if cases is None else cases
    first: dict[str, int] = {}
    for fold, split in enumerate(splits):
        for case in split.val:
            first.setdefault(case, fold)
    lost = [case for case in dict.fromkeys(wanted) if case not in first]
    if lost:
        raise RunError(
            f"{configuration} takes the segmentation by {previous} as input, made by a network that has not seen the case, but "
            f"no fold of splits.json validates {', '.join(lost[:5])}{' and others' if len(lost) > 5 else ''}; put every case "
            f"into the validation cases of one fold, or train another configuration"
        )
    return {case: first[case] for case in wanted}


def prepare(
    workspace: Workspace,
    previous: str,
    configuration: str,
    cases: Sequence[str] | None = None,
    device: str = "auto",
    precision: str | None = None,
    reporter: Reporter = SILENT,
) -> None:
    """Make sure that the run `previous` has segmented every case (of all folds by default) on the grid of `configuration`.

    Each case is segmented by the network of the fold that validates it, in the precision it was trained with unless told
    otherwise. What is stored already, by the same network from the same preprocessed case, stays.

    Raises:
        RunError: a fold that is needed is not trained, or was trained with another plan, or has seen the case.
        RecordError: a case is not preprocessed for one of the two configurations.
    """
    plan = workspace.plan()
    homes = case_folds(workspace, previous, configuration, cases)
    _require_fit(workspace, plan, previous, configuration, homes)
    todo: dict[int, list[tuple[str, str]]] = {}
    for fold in sorted(set(homes.values())):
        remove_leftovers(_folder(workspace, previous, fold, configuration))
        networks = network_hashes(workspace, previous, (fold,))
        for case in (case for case, home in homes.items() if home == fold):
            key = digest([networks, _keys(workspace, plan, configuration, case)])
            if previous_key(_path(workspace, previous, fold, configuration, case)) != key:
                todo.setdefault(fold, []).append((case, key))
    if not todo:
        return
    with reporter.task(f"segment for {configuration}", sum(map(len, todo.values()))) as task:
        for fold, missing in todo.items():
            trained = RunFolder(workspace.fold(previous, fold)).record().spec.precision
            model = load_model(workspace, [previous], Options(folds=(fold,), device=device, precision=precision or trained))
            for case, key in missing:
                target = open_case(data_folder(workspace, plan, configuration) / case)
                stored = _stored(workspace, plan, model.members[0], case)
                label = model.segmentation(model.members[0], stored, target.placement)
                path = _path(workspace, previous, fold, configuration, case)
                write_previous(path, label, key, plan.configurations[configuration].patch_size)
                task.advance(note=case)


def open_cases(workspace: Workspace, previous: str, configuration: str, cases: Sequence[str]) -> list[StoredCase]:
    """Open preprocessed cases together with the segmentations that `prepare` stored.

    Raises RunError or RecordError when a case has none, or is not preprocessed.
    """
    folder = data_folder(workspace, workspace.plan(), configuration)
    homes = case_folds(workspace, previous, configuration, cases)
    return [open_case(folder / case, _path(workspace, previous, homes[case], configuration, case)) for case in cases]


def _folder(workspace: Workspace, previous: str, fold: int, configuration: str) -> Path:
    return workspace.fold(previous, fold) / "next_stage" / configuration


def _path(workspace: Workspace, previous: str, fold: int, configuration: str, case: str) -> Path:
    return _folder(workspace, previous, fold, configuration) / f"{case}.b2nd"


def _require_fit(workspace: Workspace, plan: Plan, previous: str, configuration: str, homes: dict[str, int]) -> None:
    """Refuse a previous run that is unfinished, of another configuration or plan, or was trained on what it shall segment."""
    stage = plan.configurations[configuration].previous_stage
    for fold in sorted(set(homes.values())):
        folder = RunFolder(workspace.fold(previous, fold))
        name = "" if previous == stage else f" --name {previous}"
        command = f"autoseg train {workspace.root} --config {stage}{name} --folds {fold}"
        if not folder.finished:
            raise RunError(
                f"{configuration} needs all folds of run {previous!r}, but fold {fold} is not trained to its end; run: {command}"
            )
        record = folder.record()
        if record.configuration != stage:
            raise RunError(
                f"the previous stage of {configuration} is {stage}, but run {previous!r} is one of {record.configuration}"
            )
        values = [preprocessing_values(p, p.configurations[record.configuration]) for p in (plan, record.plan)]
        if digest(values[0]) != digest(values[1]):
            raise RunError(
                f"run {previous!r} fold {fold} was trained with another plan than {workspace.plan_path} holds now; "
                f"train it again: {command} --restart"
            )
        seen = sorted(case for case, home in homes.items() if home == fold and case in record.split.train)
        if seen:
            raise RunError(
                f"run {previous!r} fold {fold} was trained with other splits and has seen {', '.join(seen[:5])}; "
                f"train it again: {command} --restart"
            )


def _keys(workspace: Workspace, plan: Plan, configuration: str | None, case: str) -> list[str]:
    """Keys of the case as preprocessed for a configuration and for all stages before it."""
    keys = []
    while configuration is not None:
        keys.append(open_case(data_folder(workspace, plan, configuration) / case).key)
        configuration = plan.configurations[configuration].previous_stage
    return keys


def _stored(workspace: Workspace, plan: Plan, member: Member, case: str) -> Preprocessed:
    """The case as preprocessed for a member and the stages before it."""
    stored = open_case(data_folder(workspace, plan, member.name) / case)
    ready = Preprocessed(stored.read_image(), None, stored.placement)
    if member.previous is None:
        return ready
    return dataclasses.replace(ready, previous=_stored(workspace, plan, member.previous, case))
