"""Make the preprocessed cases that training reads, and redo only what changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg.arrays.preprocess import preprocess as preprocess_arrays
from autoseg.errors import PlanError
from autoseg.files.machine import cores, for_each
from autoseg.files.preprocessed import (
    FORMAT,
    content_hash,
    digest,
    remove_case,
    remove_leftovers,
    source_states,
    stored_record,
    write_case,
)
from autoseg.files.workspace import Workspace
from autoseg.logs import SILENT, Reporter
from autoseg.stages.fingerprint import CASE_ERRORS, case_files, failed_cases, load_case
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint
from autoseg.types.plan import Configuration, Plan

_COPIES = 3  # float32 arrays of a case that exist at once: as read (less for short integers), cropped, and resampled


def preprocessing_values(plan: Plan, configuration: Configuration) -> dict[str, Any]:
    """Return the plan values that preprocessing reads, as plain data; two configurations that agree in them share their cases."""
    ct = [name == "CTNormalization" for name in configuration.normalization]
    return {
        "format": FORMAT,
        "orientation": plan.orientation,
        "transpose_forward": plan.transpose_forward,
        "labels": plan.labels.model_dump(mode="json"),
        "dims": configuration.dims,
        "spacing": configuration.spacing,
        "normalization": configuration.normalization,
        "use_mask_for_norm": configuration.use_mask_for_norm,
        "intensities": [s.model_dump() if used else None for s, used in zip(plan.intensities, ct, strict=False)],
        **({} if plan.resampling == "cubic" else {"resampling": plan.resampling}),
    }


def data_id(plan: Plan, configuration: str) -> str:
    """Return the name of the first configuration of the plan whose preprocessing is the same."""
    wanted = digest(preprocessing_values(plan, plan.configurations[configuration]))
    return next(name for name, other in plan.configurations.items() if digest(preprocessing_values(plan, other)) == wanted)


def data_folder(workspace: Workspace, plan: Plan, configuration: str) -> Path:
    """Return the folder that holds the preprocessed cases of a configuration, one sub-folder per case."""
    return workspace.preprocessed / data_id(plan, configuration)


@dataclass(frozen=True, eq=False)
class _Target:
    """One folder of preprocessed cases to bring up to date."""

    folder: Path
    configuration: Configuration
    values: str


def _case_bytes(case: CaseFingerprint | None, plan: Plan, targets: Sequence[_Target]) -> int:
    """Memory a case needs at most, by its shape before and after; 0 (unknown) for a case that was not measured."""
    if case is None:
        return 0
    largest = math.prod(case.shape)
    for target in targets:
        spacing = target.configuration.spacing
        order = plan.transpose_forward[3 - len(spacing):]
        ratio = math.prod(case.spacing[axis] / new for axis, new in zip(order, spacing, strict=True))
        largest = max(largest, int(math.prod(case.shape_after_crop) * ratio))
    return 4 * largest * (_COPIES * len(plan.channels) + 2)


def _prepare(case: CaseFiles, plan: Plan, targets: Sequence[_Target]) -> None:
    """Bring one case up to date in every target; the files are read only if something has to be made."""
    files = case_files(case)
    sources = source_states(files)
    stored = {target: stored_record(target.folder / case.case) for target in targets}
    known = [record.content for record in stored.values() if record is not None and record.sources == sources]
    content = known[0] if known else content_hash(files)
    keys = {target: digest([content, target.values]) for target in targets}
    stale = [target for target, record in stored.items() if record is None or record.key != keys[target]]
    if not stale:
        return
    image, label = load_case(case, plan.labels)
    for target in stale:
        made = preprocess_arrays(image, label, plan, target.configuration)
        write_case(target.folder / case.case, made, keys[target], plan.labels.targets, plan.labels.ignore_index,
                   target.configuration.patch_size, content, sources)


def _remove_others(folder: Path, dataset: Dataset) -> None:
    """Remove stored cases that the data set no longer holds, and what a killed process left."""
    remove_leftovers(folder)
    names = {case.case for case in dataset.cases}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and not path.name.startswith(".") and path.name not in names:
            remove_case(path)


def preprocess(
    workspace: Workspace, names: Sequence[str] | None = None, threads: int | None = None, reporter: Reporter = SILENT,
) -> None:
    """Preprocess every case for the named configurations (all of the plan without names), in `threads` threads (all cores).

    A case is made anew only when its files, or a plan value that preprocessing reads, changed. Cases that fit into memory
    together run at once. Raises PlanError for an unknown configuration; DatasetError that lists every case that failed and
    why, after the others are done.
    """
    plan, dataset = workspace.plan(), workspace.dataset()
    unknown = [name for name in names or () if name not in plan.configurations]
    if unknown:
        raise PlanError(f"the plan has no configuration {unknown[0]!r}; it has {', '.join(plan.configurations)}")
    folders = {data_folder(workspace, plan, name): plan.configurations[name] for name in names or plan.configurations}
    targets = [_Target(folder, configuration, digest(preprocessing_values(plan, configuration)))
               for folder, configuration in folders.items()]
    for target in targets:
        _remove_others(target.folder, dataset)
    measured: Fingerprint | None = workspace.fingerprint() if workspace.fingerprint_path.exists() else None
    shapes = {case.case: case for case in measured.cases} if measured else {}
    failures: list[tuple[CaseFiles, Exception]] = []
    with reporter.task("preprocess", len(dataset.cases)) as task:
        for case, result in for_each(
            dataset.cases, lambda case: _prepare(case, plan, targets), cores() if threads is None else threads,
            lambda case: _case_bytes(shapes.get(case.case), plan, targets), CASE_ERRORS,
        ):
            if isinstance(result, Exception):
                failures.append((case, result))
            task.advance(note=case.case)
    if failures:
        raise failed_cases(failures, len(dataset.cases), "preprocessed")
