"""Commands before training: demo, doctor, check, plan, preprocess."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from autoseg.cli.app import (
    ConfigOption,
    DeviceOption,
    ThreadsOption,
    WorkArgument,
    app,
    compute_threads,
    interrupts,
    out,
    print_table,
    reading_threads,
    reporter,
)
from autoseg.errors import RunError

if TYPE_CHECKING:
    from autoseg.types.plan import Configuration, Plan


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for data, work and masks.")] = Path("demo"),
    kind: Annotated[Literal["chest", "brain"], typer.Option(help="Chest CT or brain MRI phantoms.")] = "chest",
) -> None:
    """Run everything on built-in data: plan, five folds, selection, masks of unseen cases, a picture."""
    from autoseg.pipeline import demo as run_demo
    from autoseg.stages.evaluate import report_table

    compute_threads()
    begin = time.monotonic()
    result = run_demo(folder, kind, reporter=reporter, interrupts=interrupts)
    print_table(report_table(result.report), f"{len(result.report.cases)} unseen phantoms, ensemble of all folds")
    out.print(f"picture: {result.picture}\nmasks:   {result.masks}\ntook {time.monotonic() - begin:.0f} s", markup=False)


@app.command()
def doctor() -> None:
    """Show what this machine offers: cores, memory, GPU, bf16, disk, library versions."""
    from autoseg.stages.doctor import examine

    for name, value in examine(Path.cwd()):
        out.print(f"{name:<18} {value}", markup=False)


@app.command()
def check(
    dataset: Annotated[Path, typer.Argument(help="Folder or manifest.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the faults as JSON.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Verify a data set and list every fault; nothing is written."""
    from autoseg.logs import SILENT
    from autoseg.stages.check import describe_faults
    from autoseg.stages.plan import checked_dataset

    found, faults = checked_dataset(dataset, "auto", reading_threads(threads), SILENT if as_json else reporter)
    errors = sum(fault.severity == "error" for fault in faults)
    if as_json:
        sys.stdout.write(json.dumps([fault.model_dump(mode="json") for fault in faults], indent=1) + "\n")
    else:
        if faults:
            out.print(describe_faults(faults), markup=False)
        cases = (
            f"{len(found.cases)} cases, {len(found.channels)} channel(s), {len(found.labels.foreground)} label(s)"
            if found
            else "no usable case"
        )
        out.print(f"{cases}: {errors} error(s), {len(faults) - errors} warning(s)", markup=False)
    if errors:
        raise typer.Exit(2)


@app.command()
def plan(
    dataset: Annotated[Path, typer.Argument(help="Folder or manifest.")],
    work: Annotated[Path, typer.Option("--out", help="The work folder.")],
    planner: Annotated[str | None, typer.Option(help="default, residual-m, residual-l, residual-xl or fit.")] = None,
    gpu_memory: Annotated[float | None, typer.Option("--gpu-memory", min=0.01, help="GPU memory to plan for, in GB.")] = None,
    time_budget: Annotated[
        str | None, typer.Option("--time-budget", help="Time that a train command may take, like 90m or 6h.")
    ] = None,
    groups: Annotated[Literal["auto", "none"], typer.Option(help="Keep cases of one patient in one fold.")] = "auto",
    replan: Annotated[bool, typer.Option("--replan", help="Make a new plan and new folds, and print what changes.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Check and measure a data set, derive the plan and the folds."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.budget import expected_length, parse_duration
    from autoseg.stages.check import describe_faults
    from autoseg.stages.plan import plan as run_plan
    from autoseg.stages.summary import describe_plan

    planned = run_plan(
        dataset,
        Workspace(work),
        planner=planner,
        gpu_memory_gb=gpu_memory,
        groups=groups,
        replan=replan,
        time_budget_s=None if time_budget is None else parse_duration(time_budget),
        threads=reading_threads(threads),
        reporter=reporter,
    )
    if planned.warnings:
        out.print(describe_faults(planned.warnings), markup=False)
    facts, table = describe_plan(planned.dataset, planned.fingerprint, planned.plan, planned.splits)
    out.print("\n".join(facts), markup=False)
    print_table(table)
    if time_budget is not None:
        compute_threads()
        out.print(expected_length(planned.plan, len(planned.splits)), markup=False)
    for change in planned.changes:
        out.print(f"changed: {change}", markup=False)
    out.print(f"next: autoseg train {shlex.quote(str(work))}", markup=False)


@app.command()
def explain(
    work: WorkArgument,
    what_if: Annotated[
        str | None, typer.Option("--what-if", help="Memory budgets in GB, like 4,8,24: the plan with each.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure steps here, for --what-if.")] = True,
    device: DeviceOption = "auto",
) -> None:
    """Tell the plan in words: every number with its rule and the data it was applied to."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.budget import measure_configuration
    from autoseg.stages.explain import explain as run_explain
    from autoseg.stages.forecast import what_if as forecast
    from autoseg.types.run import TrainSpec

    workspace = Workspace(work).require()
    if what_if is None:
        out.print(run_explain(workspace), markup=False)
        return
    try:
        budgets = [float(part) for part in what_if.split(",")]
    except ValueError:
        raise RunError(f"--what-if takes numbers of GB like 4,8,24, found {what_if!r}") from None
    if measure:
        compute_threads()

    def seconds(configuration: Configuration, plan: Plan) -> float:
        return measure_configuration(plan, configuration, TrainSpec(), device).seconds

    made = workspace.plan()
    rows = forecast(workspace.dataset(), workspace.fingerprint(), made.planner, budgets, seconds if measure else None)
    print_table(rows, f"plans of the planner {made.planner}, full training of 1000 epochs of 250 steps; ~ marks estimates")


@app.command()
def diff(
    work_a: Annotated[Path, typer.Argument(help="A work folder.")],
    work_b: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Compare two plans, and the settings of runs both folders have, with the reasons of both sides."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.diff import diff as run_diff

    rows = run_diff(Workspace(work_a).require(), Workspace(work_b).require())
    if len(rows) == 1:
        out.print("the plans and the settings of shared runs are the same", markup=False)
    else:
        print_table(rows)


@app.command()
def preprocess(work: WorkArgument, config: ConfigOption = None, threads: ThreadsOption = None) -> None:
    """Crop, normalise and resample every case as the plan says; only what changed is redone."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.preprocess import preprocess as run_preprocess

    run_preprocess(Workspace(work).require(), config, threads=max(1, reading_threads(threads)), reporter=reporter)
