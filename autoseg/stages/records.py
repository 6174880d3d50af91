"""What a fold is trained with, as a record; an existing one must agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoseg.errors import RunError
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace
from autoseg.stages.initial import InitialModel, take_topology
from autoseg.types.plan import Configuration, Plan
from autoseg.types.run import RunRecord, TrainSpec

if TYPE_CHECKING:
    from autoseg.trainers.ranks import Ranks

_UNIMPORTANT = {
    "device", "versions", "data", "extended", "plan.notes", "plan.planner", "plan.gpu_memory_gb", "plan.reasons",
    "plan.precision", "plan.time_budget_s",
}


@dataclass(frozen=True)
class Options:
    """Where and how long to train, and from what; apart from the length and `init` nothing here changes more than rounding.

    `longer` lets a finished run go on to a larger number of epochs; `time_budget_s` lets the time decide on the number. `init` is
    a model file or a work folder to start from. `trackers` are names of `autoseg.stages.trackers`, and `tracker_mode` is how
    those that could use the network do. `ranks` is this process among several that train one run.
    """

    device: str = "auto"
    threads: int | None = None
    restart: bool = False
    longer: bool = False
    time_budget_s: float | None = None
    init: Path | None = None
    trackers: tuple[str, ...] = ()
    tracker_mode: str = "offline"
    ranks: Ranks | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes files: the only one, or the first of those that train together."""
        return self.ranks is None or self.ranks.first

    def wait(self) -> None:
        """Go on when all processes that train together are here."""
        if self.ranks is not None:
            self.ranks.wait()


def make_record(
    workspace: Workspace, plan: Plan, configuration: str, run: str, fold: int, spec: TrainSpec, options: Options,
    initial: InitialModel | None = None,
) -> RunRecord:
    """The record of a fold that is about to be trained; `data` is still empty.

    A finished run is made longer where that is asked for; with a time budget the length of an existing run is taken over, since
    the budget decides. The network's topology is that of the model the fold starts from, or once did. Raises RunError when a fold
    of that run was made with other settings.
    """
    from autoseg.networks.hardware import pick_device, pick_precision

    folder = RunFolder(workspace.fold(run, fold))
    old = folder.record() if folder.record_path.exists() and not options.restart else None
    chosen = pick_device(options.device)
    wanted = old.spec.precision if old is not None and spec.precision == "auto" else spec.precision
    resolved = spec.model_copy(update={"precision": pick_precision(chosen, wanted)})
    if old is not None and options.time_budget_s is not None:
        lengths = ("epochs", "steps_per_epoch", "val_steps")
        resolved = resolved.model_copy(update={name: getattr(old.spec, name) for name in lengths})
    extended = old.extended if old is not None else ()
    if old is not None and options.longer and folder.finished and resolved.epochs > old.spec.epochs:
        extended = (*extended, old.spec.epochs)
    shape, init = _start(workspace, plan, configuration, run, old, initial)
    plan = plan.model_copy(update={"configurations": {**plan.configurations, configuration: shape}})
    record = RunRecord(
        name=run, configuration=configuration, fold=fold, spec=resolved, plan=own_plan(plan, configuration),
        split=workspace.splits()[fold], data="", device=str(chosen), previous=plan.configurations[configuration].previous_stage,
        init=init, extended=extended, versions=_versions(),
    )
    _require_agreement(workspace, record, old, options.restart)
    return record


def _start(
    workspace: Workspace, plan: Plan, configuration: str, run: str, old: RunRecord | None, initial: InitialModel | None
) -> tuple[Configuration, str | None]:
    """The configuration as the fold trains it, and the hash of the model that it starts from, or started from before."""
    own = plan.configurations[configuration]
    if initial is not None:
        network = initial.network(configuration, own)
        if network.run == run and initial.path.resolve() == workspace.root.resolve():
            raise RunError(f"run {run!r} would start from itself; give --name NEW to train another one beside it")
        return take_topology(own, network.shape), initial.key(network)
    if old is not None and old.init is not None and old.configuration == configuration:
        return take_topology(own, old.plan.configurations[configuration]), old.init
    return own, None


def own_plan(plan: Plan, configuration: str) -> Plan:
    """The part of a plan that one run needs: its configuration, and that of the previous stage if it has one."""
    own = plan.configurations[configuration]
    kept = {configuration: own.model_copy(update={"next_stage": None, "inherits_from": None})}
    if own.previous_stage is not None:
        previous = plan.configurations[own.previous_stage]
        kept[own.previous_stage] = previous.model_copy(update={"next_stage": None, "previous_stage": None, "inherits_from": None})
    return plan.model_copy(update={"configurations": kept, "reasons": {}})


def _require_agreement(workspace: Workspace, record: RunRecord, old: RunRecord | None, restart: bool) -> None:
    """Compare with what the fold, and its sibling folds, were trained with."""
    own = workspace.fold(record.name, record.fold)
    others = [] if restart else [path for path in (workspace.runs / record.name).glob("fold_*") if path != own]
    siblings = [sibling.record() for sibling in map(RunFolder, others) if sibling.record_path.exists()]
    longer = {"spec.epochs"} if record.extended and old is not None and record.extended != old.extended else set()
    for other in [*([old] if old is not None else []), *siblings]:
        ignored = _UNIMPORTANT | longer
        if other is not old:  # folds are combined at prediction: what shapes images and network must agree
            ignored = ignored | {"fold", "split", *(f"spec.{key}" for key in TrainSpec.model_fields if key != "augment")}
        found = differences(other.model_dump(mode="json"), record.model_dump(mode="json"), ignored)
        if found:
            raise RunError(
                f"run {record.name!r} fold {other.fold} exists already and was made with other settings:\n  "
                + "\n  ".join(found[:12])
                + "\ngive --name NEW to train beside it, or --restart to replace it"
                + _longer(other, record) + _begun(other, record)
            )


def _longer(old: RunRecord, new: RunRecord) -> str:
    if old.fold == new.fold and old.spec.epochs < new.spec.epochs:
        return f"; --epochs {new.spec.epochs} makes a finished run longer"
    return ""


def _begun(old: RunRecord, new: RunRecord) -> str:
    if old.init is not None and new.init is None:
        return f"; run {old.name!r} starts from a model, so give the same --init"
    return ""


def differences(old: Any, new: Any, ignored: set[str] | frozenset[str] = frozenset(), where: str = "") -> Sequence[str]:
    """A line for every leaf in which two dumped records differ, ignored paths left out."""
    if where in ignored:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        inside = [(key, f"{where}.{key}" if where else key) for key in keys]
        return [line for key, path in inside for line in differences(old.get(key), new.get(key), ignored, path)]
    return [] if old == new else [f"{where}: {str(old)[:100]} (in run.json), {str(new)[:100]} (wanted)"]


def _versions() -> dict[str, str]:
    found = {}
    for package in ("autoseg-framework", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
