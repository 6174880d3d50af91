"""Plan: check the data, measure it, decide everything, split it into folds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autoseg.datasets.read import read_dataset
from autoseg.datasets.splits import check_splits, extend_splits, make_splits
from autoseg.errors import DatasetError, PlanError, RecordError
from autoseg.files.workspace import Workspace, load_record, save_record, validate
from autoseg.logs import SILENT, Reporter
from autoseg.planners.default import CONFIGURATIONS
from autoseg.planners.registry import get_planner
from autoseg.stages.check import check, require_clean
from autoseg.stages.fingerprint import fingerprint
from autoseg.types.dataset import Dataset, Fault, Split
from autoseg.types.faults import sort_faults
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Plan


@dataclass(frozen=True)
class Planned:
    """What planning made; `changes` lists what a new plan altered."""

    dataset: Dataset
    fingerprint: Fingerprint
    plan: Plan
    splits: list[Split]
    warnings: list[Fault]
    changes: tuple[str, ...] = ()


def checked_dataset(
    path: Path, groups: Literal["auto", "none"], threads: int, reporter: Reporter
) -> tuple[Dataset | None, list[Fault]]:
    """Read and check a data set; every fault found, errors first."""
    dataset, faults = read_dataset(path, groups=groups)
    if dataset is not None:
        faults = check(dataset, faults, threads=threads, reporter=reporter)
    return dataset, sort_faults(faults)


def plan(
    path: Path,
    workspace: Workspace,
    *,
    planner: str | None = None,
    gpu_memory_gb: float | None = None,
    groups: Literal["auto", "none"] = "auto",
    replan: bool = False,
    time_budget_s: float | None = None,
    threads: int = 2,
    reporter: Reporter = SILENT,
) -> Planned:
    """Check the data, then write dataset.json, fingerprint.json, plan.json and splits.json.

    An existing plan and existing fold assignments are kept unless `replan`; new cases join the folds. A time budget is written
    into the plan, new or old, and training keeps to it.

    Raises:
        DatasetError: the check found errors (all of them in the message); nothing is written.
        PlanError: the existing plan no longer suits the data.
    """
    old = _old_plan(workspace, planner, gpu_memory_gb, replan)
    old_splits = workspace.splits() if replan and workspace.splits_path.exists() else None
    dataset, faults = checked_dataset(path, groups, threads, reporter)
    require_clean(faults, path)
    assert dataset is not None  # without one there is an error
    keep = old is not None and not replan
    if keep and old is not None:
        _suits(old, dataset)
    measured = fingerprint(dataset, threads=threads, reporter=reporter)
    changes: list[str] = []
    if keep and old is not None:
        made = old
    else:
        made, changes = _with_handmade(workspace, _make(planner or "default", dataset, measured, gpu_memory_gb), old)
    if time_budget_s is not None:
        made = made.model_copy(update={"time_budget_s": time_budget_s})
    splits = _splits(workspace, dataset, measured, fresh=replan)
    if old is not None and replan:
        before, after = (plan.model_dump(mode="json", exclude={"reasons"}) for plan in (old, made))
        changes += _differences(before, after)
    if old_splits is not None and old_splits != splits:
        folds = {case: fold for fold, split in enumerate(old_splits) for case in split.val}
        moved = sum(folds.get(case) != fold for fold, split in enumerate(splits) for case in split.val)
        changes.append(f"splits: {len(old_splits)} folds -> {len(splits)} folds, {moved} cases are validated in another fold")
    save_record(workspace.fingerprint_path, measured)
    save_record(workspace.splits_path, splits, list[Split])  # before the cases it is made for: a kill in between loses none
    save_record(workspace.dataset_path, dataset)
    if made is not old:
        workspace.save_plan(made)
    return Planned(dataset, measured, made, splits, [f for f in faults if f.severity == "warning"], tuple(changes))


def _make(planner: str, dataset: Dataset, measured: Fingerprint, gpu_memory_gb: float | None) -> Plan:
    """The plan; `fit` is told what this machine has: the free memory of its GPU where none is given, and its precision."""
    if planner != "fit":
        return get_planner(planner)(dataset, measured, gpu_memory_gb)
    from autoseg.networks.hardware import free_gpu_gb, pick_device, pick_precision
    from autoseg.planners.fit import plan as fit

    precision = pick_precision(pick_device())
    return fit(dataset, measured, free_gpu_gb() if gpu_memory_gb is None else gpu_memory_gb, precision=precision)


def _old_plan(workspace: Workspace, planner: str | None, gpu_memory_gb: float | None, replan: bool) -> Plan | None:
    """The plan there is; other wishes than those it was made for need `replan`, which also gets past a damaged one."""
    if not workspace.plan_path.exists():
        return None
    try:
        old = workspace.plan()
    except RecordError:
        if replan:
            return None
        raise
    if not replan and (planner not in (None, old.planner) or gpu_memory_gb not in (None, old.gpu_memory_gb)):
        raise PlanError(
            f"{workspace.plan_path} was made by planner {old.planner!r} for {old.gpu_memory_gb:g} GB; "
            "give --replan to make a new one, or another --out"
        )
    return old


def _with_handmade(workspace: Workspace, made: Plan, old: Plan | None) -> tuple[Plan, list[str]]:
    """The new plan with those configurations of the old one that a person made, as they are written; and what to know of them.

    Made by a person is what neither planner made.
    """
    written = workspace.written_configurations()
    mine = [name for name in written if (name not in CONFIGURATIONS if old is None else not _planned(old, name))]
    kept = {name: written[name] for name in mine if name not in made.configurations}
    if not kept:
        return made, []
    data = made.model_dump()
    try:
        both = validate({**data, "configurations": {**data["configurations"], **kept}}, Plan, "the new plan with them")
    except RecordError as error:
        raise PlanError(
            f"{workspace.plan_path} holds configurations made by hand ({', '.join(kept)}) that do not go with the new plan; "
            f"change or remove them first. {error}"
        ) from None
    told = [f"configurations.{name}: made by hand, kept" for name in kept]
    if old is not None and old.transpose_forward != made.transpose_forward:
        told.append(f"transpose_forward: the axes of {', '.join(kept)} (made by hand) now count in another order; look at them")
    return both, told


def _planned(plan: Plan, name: str) -> bool:
    reason = plan.reasons.get(f"configurations.{name}")
    return bool(reason.value) if reason is not None else not plan.reasons and name in CONFIGURATIONS


def _suits(plan: Plan, dataset: Dataset) -> None:
    for what, planned, found in (("channels", plan.channels, dataset.channels), ("labels", plan.labels, dataset.labels)):
        if planned != found:
            raise PlanError(
                f"the existing plan was made for other {what} than the data set now has (planned: {planned}; found: {found}); "
                "give --replan to make a new plan, or another --out"
            )


def _splits(workspace: Workspace, dataset: Dataset, measured: Fingerprint, fresh: bool) -> list[Split]:
    """Existing folds extended by new cases, the folds that came with the data, or new ones."""
    names = {label.name: i + 1 for i, label in enumerate(dataset.labels.foreground)}
    present = {
        case.case: frozenset(names[name] for name, label in case.labels.items() if label.voxels and name in names)
        for case in measured.cases
    }
    kept = workspace.splits_path.exists() and not fresh
    try:
        if kept:
            splits = workspace.splits()
            if workspace.dataset_path.exists():  # without it the folds were provided, and a case left out stays out
                splits = extend_splits(splits, dataset.cases, [case.case for case in workspace.dataset().cases])
        elif dataset.splits_file:
            splits = load_record(Path(dataset.splits_file), list[Split])
        else:
            splits = make_splits(dataset.cases, present)
        check_splits(splits, dataset.cases)
    except DatasetError as error:
        if not kept and not dataset.splits_file:
            raise
        raise RecordError(f"{workspace.splits_path if kept else dataset.splits_file}: {error}") from None
    return splits


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """`path: old -> new` for every leaf that differs (rows of numbers count as leaves)."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)]
    return [] if old == new else [f"{where}: {json.dumps(old)[:120]} -> {json.dumps(new)[:120]}"]
