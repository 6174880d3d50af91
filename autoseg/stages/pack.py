"""Pack a work folder's trained networks, and all that is known about them, into one file that can be shipped."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autoseg import __version__
from autoseg.arrays.unusual import gather
from autoseg.errors import RunError
from autoseg.files.model import write_model_file
from autoseg.files.runs import RunFolder, load_tensors
from autoseg.files.tensors import CODES, tensor_bytes
from autoseg.files.workspace import Workspace, load_record, validate
from autoseg.logs import SILENT, Reporter
from autoseg.stages.figures import PALETTE
from autoseg.stages.judge import find_judge
from autoseg.stages.predict import chosen, finished_folds, network_hashes, previous_run
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint
from autoseg.types.geometry import NO_DEPTH_MM
from autoseg.types.labels import Labels
from autoseg.types.model import MemberRecord, ModelMetrics, ModelRecord, NetworkRecord, TrainingData, WeightsPrecision, part_name
from autoseg.types.plan import Plan
from autoseg.types.report import Report
from autoseg.types.run import RunRecord
from autoseg.types.selection import Selection
from autoseg.types.trust import CaseNumbers, Number, Trust

_NOT_SHARED = {"configurations", "reasons", "notes", "planner", "gpu_memory_gb", "precision", "time_budget_s"}
_GOLDEN_TURN = 0.618034  # of the colour wheel: hues that follow one another stay apart


def pack(
    workspace: Workspace,
    out: Path,
    folds: Sequence[int] | None = None,
    weights: WeightsPrecision = "fp32",
    runs: Sequence[str] | None = None,
    licence: str = "",
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> Path:
    """Write a model file with the selected runs (or `runs`, then equally weighted) and all of their finished folds (or `folds`).

    It holds plan, labels with colours, post-processing, cross-validation metrics of the selection, what the training cases were
    like, and what trust.json says. With fp32 the weights are those of the work folder byte by byte. Equal input, equal bytes.

    Raises:
        RunError: nothing is trained, a fold is missing, runs do not go together, or `out` holds something else.
    """
    if weights not in CODES:
        raise RunError(f"unknown precision {weights!r} of weights; choose from {', '.join(CODES)}")
    record = collect(workspace, folds, runs, reporter).model_copy(
        update={"weights": weights, "licence": "\n".join(licence.splitlines())}
    )
    content = {
        part_name(run, fold): _content(RunFolder(workspace.fold(run, fold)).weights_path, weights)
        for run, network in record.networks.items() for fold in network.folds
    }
    with reporter.task("pack", 1, "files") as task:
        made = write_model_file(out, record, content, overwrite)
        task.advance(note=f"{len(content)} networks")
    names, size = ", ".join(member.run for member in record.members), made.path.stat().st_size / 1e6
    reporter.info(f"{made.path}: {names}, {len(content)} networks in {weights}, {size:.1f} MB")
    return made.path


def collect(
    workspace: Workspace, folds: Sequence[int] | None = None, runs: Sequence[str] | None = None, reporter: Reporter = SILENT,
) -> ModelRecord:
    """What a model file of a work folder would say, apart from its parts.

    Raises:
        RunError: nothing is trained, a fold is missing, or runs do not go together.
    """
    selection = chosen(workspace.require(), reporter)
    wanted = selection.runs if runs is None else tuple(runs)
    if wanted != selection.runs:
        reporter.info(f"packed as asked for: {', '.join(wanted)}, not the selected {', '.join(selection.runs)}; "
                      "without post-processing and metrics, which belong to the selection")
        selection = Selection(runs=wanted, folds=(), cases=0)
    records: dict[str, list[RunRecord]] = {}
    for run in wanted:
        _collect(workspace, run, folds, records)
    plan = _shared_plan(records)
    trust = _trust(workspace, selection, folds, reporter)
    shares = zip(wanted, selection.weights or (1.0,) * len(wanted), strict=True)
    return validate({
        "name": plan.dataset_name, "made_by": f"autoseg {__version__}", "labels": plan.labels, "channels": plan.channels,
        "colours": label_colours(plan.labels), "plan": plan, "networks": {run: _network(r, plan) for run, r in records.items()},
        "members": [MemberRecord(run=run, weight=weight) for run, weight in shares],
        "postprocessing": selection.postprocessing, "metrics": _metrics(workspace, selection),
        "training": _training(workspace, plan.labels, trust), "trust": trust,
    }, ModelRecord, f"a model of {', '.join(wanted)}")


def _collect(workspace: Workspace, run: str, folds: Sequence[int] | None, found: dict[str, list[RunRecord]]) -> None:
    """The records of a run's folds, and of those that they rest on. Raises RunError where one is missing or they differ."""
    if run in found:
        return
    finished = finished_folds(workspace, run)
    missing = sorted(set(folds or ()) - set(finished))
    if missing or not finished:
        raise RunError(f"run {run!r} has no finished training of fold(s) {missing or 'any'} (finished: {finished or 'none'}); "
                       f"train with: autoseg train {workspace.root} --config {run}")
    records = [RunFolder(workspace.fold(run, fold)).record() for fold in (finished if folds is None else sorted(set(folds)))]
    if len({_essence(record) for record in records}) > 1:
        raise RunError(f"the folds of run {run!r} were trained with different plans, so they cannot be combined; "
                       "choose some with --folds, or train the others again with --restart")
    found[run] = records
    source = previous_run(records[0])
    if source is not None:
        _collect(workspace, source, folds, found)


def _essence(record: RunRecord) -> str:
    """What the folds of a run must have in common."""
    axes = record.spec.mirror_axes(record.plan.configurations[record.configuration])
    return repr((record.configuration, record.plan.model_dump_json(), record.previous, axes))


def _shared_plan(records: dict[str, list[RunRecord]]) -> Plan:
    """The first run's plan, with the configurations of all runs whose plans say the same otherwise."""
    plans = [found[0].plan.model_copy(update={"reasons": {}, "notes": ()}) for found in records.values()]
    first, configurations = plans[0], dict(plans[0].configurations)
    for plan in plans[1:]:
        if _rest(plan) == _rest(first):
            for name, configuration in plan.configurations.items():
                configurations.setdefault(name, configuration)
    return first.model_copy(update={"configurations": configurations})


def _rest(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(exclude=_NOT_SHARED)


def _network(records: Sequence[RunRecord], shared: Plan) -> NetworkRecord:
    """The networks of one run; its own plan is kept where the shared one says something else."""
    first = records[0]
    plan = first.plan.model_copy(update={"reasons": {}, "notes": ()})
    configuration = plan.configurations[first.configuration]
    same = _rest(plan) == _rest(shared) and shared.configurations.get(first.configuration) == configuration
    return NetworkRecord(
        configuration=first.configuration, folds=tuple(record.fold for record in records),
        mirror_axes=first.spec.mirror_axes(configuration), previous=previous_run(first), plan=None if same else plan,
    )


def _content(path: Path, weights: WeightsPrecision) -> Callable[[], bytes]:
    """The bytes of a part: the file as it is, or rounded."""
    return path.read_bytes if weights == "fp32" else lambda: tensor_bytes(load_tensors(path), weights)


def label_colours(labels: Labels) -> dict[str, str]:
    """A colour (#rrggbb) for every foreground label: the first ones as in the figures, further ones around the colour wheel."""
    colours: dict[str, str] = {}
    for index, label in enumerate(labels.foreground):
        red, green, blue = colorsys.hsv_to_rgb(index * _GOLDEN_TURN % 1, 0.55 + 0.15 * (index % 3), 0.95)
        around = f"#{round(red * 255):02X}{round(green * 255):02X}{round(blue * 255):02X}"
        colours[label.name] = PALETTE[index] if index < len(PALETTE) else around
    return colours


def _metrics(workspace: Workspace, selection: Selection) -> ModelMetrics | None:
    """The pooled report of the selected masks, without its cases; None where nothing was selected."""
    path = workspace.root / "report" / "report.json"
    if not selection.cases or not path.exists():
        return None
    report = load_record(path, Report)
    return ModelMetrics(
        cases=len(report.cases), patients=report.patients, folds=selection.folds, mean=report.mean,
        foreground_mean=report.foreground_mean, intervals=report.intervals, foreground_intervals=report.foreground_intervals,
        nested_dice=selection.nested_dice, tolerance_mm=report.tolerance_mm,
    )


def _trust(workspace: Workspace, selection: Selection, folds: Sequence[int] | None, reporter: Reporter) -> Trust | None:
    """What trust.json says, if it is about these very networks."""
    hashes: dict[str, str] = {}
    for run in selection.runs:
        hashes.update(network_hashes(workspace, run, folds))
    judge = find_judge(workspace, selection, hashes, True, reporter)
    return judge.trust if judge else None


def _training(workspace: Workspace, labels: Labels, trust: Trust | None) -> TrainingData | None:
    """What the training cases were like: as trust.json knows them, else what the fingerprint tells about geometry and volumes."""
    if not workspace.fingerprint_path.exists():
        return None
    fingerprint: Fingerprint = workspace.fingerprint()
    ranges = trust.training if trust else gather([case_numbers(case, labels) for case in fingerprint.cases])
    return TrainingData(channel_kinds=fingerprint.channel_kinds, intensities=fingerprint.intensities, ranges=ranges)


def case_numbers(case: CaseFingerprint, labels: Labels) -> CaseNumbers:
    """A case's spacing, field of view and labels' volumes, named as where new cases are described."""
    numbers: dict[str, Number] = {}
    for name, spacing, size in zip("zyx", case.spacing, case.shape, strict=True):
        if spacing < NO_DEPTH_MM:
            numbers[f"spacing {name}"] = Number(value=spacing, unit="mm", log=True)
            numbers[f"field of view {name}"] = Number(value=spacing * size, unit="mm", log=True)
    found = {label.name: case.labels[label.name] for label in labels.foreground if label.name in case.labels}
    numbers |= {f"volume of {name}": Number(value=label.volume_ml, unit="ml", log=True) for name, label in found.items()}
    return CaseNumbers(numbers=numbers, found=tuple(found))
