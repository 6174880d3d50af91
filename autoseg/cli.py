"""The command line: one command per stage. Only this module prints, sets up logging and reads environment variables."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import autoseg
from autoseg.console import ConsoleReporter
from autoseg.errors import AutosegError, CasesFailed, RunError
from autoseg.interrupts import Interrupted, Interrupts

app = typer.Typer(
    name="autoseg",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Self-configuring medical image segmentation: plan, train, predict.",
)
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)
interrupts = Interrupts()

FILE_PROBLEMS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EISDIR, errno.ENOTDIR, errno.EEXIST}

WorkArgument = Annotated[Path, typer.Argument(help="The work folder.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=0, help="Reading threads; default from cores and memory.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
PrecisionOption = Annotated[str, typer.Option("--precision", help="auto, bf16, fp16 or fp32.")]
ConfigOption = Annotated[
    list[str] | None, typer.Option("--config", help="A configuration of the plan; may be given several times.")
]


reporter = ConsoleReporter(out, err)


def _threads(wanted: int | None) -> int:
    from autoseg.files.machine import cores

    return cores() if wanted is None else wanted


def _compute_threads() -> None:
    """Let torch use the cores this process may use, unless the environment says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        from autoseg.files.machine import cores

        torch.set_num_threads(cores())


def _print_table(rows: Sequence[Sequence[str]], title: str = "") -> None:
    table = Table(title=title or None, title_justify="left")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*(escape(cell) for cell in row))
    width = None if out.is_terminal else 200
    Console(width=width, highlight=False).print(table)


def _version(value: bool) -> None:
    if value:
        out.print(f"autoseg {autoseg.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    interrupts.install()


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for data, work and masks.")] = Path("demo"),
    kind: Annotated[Literal["chest", "brain"], typer.Option(help="Chest CT or brain MRI phantoms.")] = "chest",
) -> None:
    """Run everything on built-in data: plan, five folds, selection, masks of unseen cases, a picture."""
    from autoseg.pipeline import demo as run_demo
    from autoseg.stages.evaluate import report_table

    _compute_threads()
    begin = time.monotonic()
    result = run_demo(folder, kind, reporter=reporter, interrupts=interrupts)
    _print_table(report_table(result.report), f"{len(result.report.cases)} unseen phantoms, ensemble of all folds")
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

    found, faults = checked_dataset(dataset, "auto", _threads(threads), SILENT if as_json else reporter)
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
    planner: Annotated[str | None, typer.Option(help="default, residual-m, residual-l or residual-xl.")] = None,
    gpu_memory: Annotated[float | None, typer.Option("--gpu-memory", min=0.5, help="GPU memory to plan for, in GB.")] = None,
    groups: Annotated[Literal["auto", "none"], typer.Option(help="Keep cases of one patient in one fold.")] = "auto",
    replan: Annotated[bool, typer.Option("--replan", help="Make a new plan and new folds, and print what changes.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Check and measure a data set, derive the plan and the folds."""
    from autoseg.files.workspace import Workspace
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
        threads=_threads(threads),
        reporter=reporter,
    )
    if planned.warnings:
        out.print(describe_faults(planned.warnings), markup=False)
    facts, table = describe_plan(planned.dataset, planned.fingerprint, planned.plan, planned.splits)
    out.print("\n".join(facts), markup=False)
    _print_table(table)
    for change in planned.changes:
        out.print(f"changed: {change}", markup=False)
    out.print(f"next: autoseg train {shlex.quote(str(work))}", markup=False)


@app.command()
def preprocess(work: WorkArgument, config: ConfigOption = None, threads: ThreadsOption = None) -> None:
    """Crop, normalise and resample every case as the plan says; only what changed is redone."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.preprocess import preprocess as run_preprocess

    run_preprocess(Workspace(work).require(), config, threads=max(1, _threads(threads)), reporter=reporter)


@app.command()
def train(
    work: WorkArgument,
    config: ConfigOption = None,
    folds: Annotated[str, typer.Option(help="all, or numbers like 0,1.")] = "all",
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the configuration.")] = None,
    device: DeviceOption = "auto",
    epochs: Annotated[int | None, typer.Option(min=1, help="Length in epochs; the schedule follows.")] = None,
    precision: PrecisionOption = "auto",
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    threads: ThreadsOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what these folds have and begin anew.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value: any value of the training record.")] = None,
) -> None:
    """Train and validate folds; a run that was interrupted goes on where it stopped."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.settings import apply_settings
    from autoseg.stages.train import Options
    from autoseg.stages.train import train as run_train
    from autoseg.types.run import TrainSpec

    given = [*(settings or [])]
    flags = {"epochs": epochs, "seed": seed, "precision": None if precision == "auto" else precision}
    given += [f"{key}={value}" for key, value in flags.items() if value is not None]
    spec = apply_settings(TrainSpec(), given)
    _compute_threads()
    run_train(
        Workspace(work).require(), config, _folds(folds), name, spec, Options(device, threads, restart), reporter, interrupts
    )


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A work folder.")],
    inputs: Annotated[list[Path], typer.Argument(help="Images, folders of images, or a manifest.")],
    masks: Annotated[Path, typer.Option("--out", help="Folder for the masks.")],
    folds: Annotated[str, typer.Option(help="all, or numbers like 0,1.")] = "all",
    mirror: Annotated[bool, typer.Option("--mirror/--no-mirror", help="Average over mirrored copies.")] = True,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write probabilities.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict finished cases again.")] = False,
) -> None:
    """Segment new images with the selected networks; each mask lies on the grid of its image."""
    from autoseg.datasets.folder import read_inputs
    from autoseg.files.workspace import Workspace
    from autoseg.stages.predict import Options
    from autoseg.stages.predict import predict as run_predict

    workspace = Workspace(model).require()
    cases = read_inputs(inputs, channels=len(workspace.plan().channels))
    chosen_folds = _folds(folds)
    options = Options(None if chosen_folds is None else tuple(chosen_folds), device, precision, mirror, probabilities, overwrite)
    _compute_threads()
    run_predict(workspace, cases, masks, options, reporter)
    out.print(f"masks of {len(cases)} case(s): {masks}", markup=False)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of masks.")],
    references: Annotated[Path, typer.Argument(help="Folder of reference masks.")],
    report_path: Annotated[Path | None, typer.Option("--out", help="Write the report as JSON.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Tolerance of NSD in mm; default one voxel in-plane of each case.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Compare masks with reference masks, case by case and label by label."""
    from autoseg.files.workspace import save_record
    from autoseg.stages.evaluate import evaluate as run_evaluate
    from autoseg.stages.evaluate import labels_beside, report_table

    labels = labels_beside(references)
    report = run_evaluate(predictions, references, labels, tolerance, max(1, _threads(threads)), reporter)
    _print_table(report_table(report), f"{len(report.cases)} cases")
    if report_path is not None:
        save_record(report_path, report)


@app.command()
def select(work: WorkArgument, threads: ThreadsOption = None) -> None:
    """Choose the best configuration or ensemble and its post-processing on the cross-validation."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.select import select as run_select
    from autoseg.stages.summary import describe_selection

    _compute_threads()
    selection = run_select(Workspace(work).require(), reporter=reporter, threads=max(1, _threads(threads)))
    facts, table = describe_selection(selection)
    _print_table(table, "candidates")
    out.print("\n".join(facts), markup=False)


def _folds(text: str) -> list[int] | None:
    if text.strip() == "all":
        return None
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise RunError(f"--folds takes all, or numbers like 0,1, found {text!r}") from None


def _interrupted(signum: int) -> NoReturn:
    command = shlex.join(["autoseg", *(a for a in sys.argv[1:] if a != "--restart")])
    err.print(f"interrupted; what was done is saved. Go on with: {command}", markup=False)
    sys.exit(128 + signum)


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 a bug, 2 the user can fix it, 3 some cases failed, 130 or 143 interrupted."""
    try:
        app()
    except CasesFailed as error:
        err.print(str(error), markup=False)
        sys.exit(3)
    except AutosegError as error:
        err.print(f"error: {error}", markup=False)
        sys.exit(2)
    except OSError as error:
        if error.errno not in FILE_PROBLEMS:
            raise
        err.print(f"error: {error.strerror}: {error.filename or 'a file'}; nothing was left half-written", markup=False)
        sys.exit(2)
    except Interrupted as error:
        _interrupted(error.signum)
    except KeyboardInterrupt:
        _interrupted(signal.SIGINT)


if __name__ == "__main__":
    main()
