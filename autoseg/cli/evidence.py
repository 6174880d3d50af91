"""Commands that judge: evaluate, select, diagnose, compare, report, reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli.app import (
    ConfigOption,
    DeviceOption,
    PrecisionOption,
    ThreadsOption,
    WorkArgument,
    app,
    compute_threads,
    fold_numbers,
    interrupts,
    out,
    print_table,
    reading_threads,
    reporter,
)
from autoseg.errors import RunError


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of masks.")],
    references: Annotated[Path, typer.Argument(help="Reference masks: a folder, a manifest or a work folder.")],
    report_path: Annotated[Path | None, typer.Option("--out", help="Write the report as JSON.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Tolerance of NSD in mm; default one voxel in-plane of each case.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with pictures into this folder.")] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Images for the page; a work folder's are known.")] = None,
    threads: ThreadsOption = None,
) -> None:
    """Compare masks with reference masks, case by case and label by label."""
    from autoseg.files.workspace import save_record
    from autoseg.stages.evaluate import definition_lines, evaluate_folder, group_table, lesion_table, report_table

    report = evaluate_folder(predictions, references, tolerance, max(1, reading_threads(threads)), reporter)
    print_table(report_table(report), f"{len(report.cases)} cases")
    if report.groups:
        print_table(group_table(report), "Dice by group")
    print_table(lesion_table(report), "lesions by size")
    out.print("\n".join(definition_lines(report)), markup=False)
    if report_path is not None:
        save_record(report_path, report)
    if html is not None:
        from autoseg.stages.report import report_masks

        out.print(f"report: {report_masks(report, predictions, references, html, images, reporter)}", markup=False)


@app.command()
def select(
    work: WorkArgument,
    masks_only: Annotated[
        bool, typer.Option("--masks-only", help="Compare the validation masks there are; no ensembles, no thresholds.")
    ] = False,
    crf: Annotated[bool, typer.Option("--crf", help="Also try a dense CRF as post-processing (slow).")] = False,
    trust: Annotated[
        bool, typer.Option("--trust/--no-trust", help="Then measure how far predictions can be trusted (predicts once more).")
    ] = True,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Choose run or ensemble and post-processing on the cross-validation; kept is what gains on folds it was not chosen on."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.select import Options
    from autoseg.stages.select import select as run_select
    from autoseg.stages.summary import describe_selection
    from autoseg.stages.trust import calibrate, describe_trust

    compute_threads()
    options = Options(not masks_only, crf, device, precision)
    workspace = Workspace(work).require()
    selection = run_select(workspace, reporter, max(1, reading_threads(threads)), options)
    facts, table = describe_selection(selection)
    print_table(table, "candidates")
    out.print("\n".join(facts), markup=False)
    if trust and not masks_only:
        facts, table = describe_trust(calibrate(workspace, reporter, device, precision))
        print_table(table, "trust")
        out.print("\n".join(facts), markup=False)


@app.command()
def diagnose(
    work: Annotated[Path, typer.Argument(help="The work folder, or a folder of masks with --reference.")],
    reference: Annotated[Path | None, typer.Option("--reference", help="Reference masks of a folder of masks.")] = None,
    run: Annotated[str | None, typer.Option("--name", help="A run; default: the selected one.")] = None,
    threads: ThreadsOption = None,
) -> None:
    """Name what is wrong with the results, the cases to look at, and a command to try."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.diagnose import describe_diagnosis, diagnose_masks
    from autoseg.stages.diagnose import diagnose as run_diagnose

    cores = max(1, reading_threads(threads))
    if reference is not None:
        found = diagnose_masks(work, reference, reporter=reporter, threads=cores)
    else:
        found = run_diagnose(Workspace(work).require(), run, reporter, cores)
    out.print("\n".join(describe_diagnosis(found)), markup=False)


@app.command()
def report(
    work: WorkArgument,
    folder: Annotated[Path | None, typer.Option("--out", help="Where to write; default: report/ in the work folder.")] = None,
    threads: ThreadsOption = None,
) -> None:
    """Write one page that tells how good the results are: data, plan, curves, results, worst cases, what to try."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.report import report as run_report

    page = run_report(Workspace(work).require(), folder, reporter, max(1, reading_threads(threads)))
    out.print(f"report: {page}", markup=False)


@app.command()
def compare(
    sources: Annotated[
        list[str], typer.Argument(help="Work folders, runs (WORK/runs/NAME) or folders of any tool's masks; NAME=PATH names one.")
    ],
    reference: Annotated[Path | None, typer.Option("--reference", help="References; default: those of a work folder.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where comparison.json and comparison.png go.")] = Path("comparison"),
    tolerance: Annotated[float | None, typer.Option(help="Tolerance of NSD in mm; default one voxel in-plane.")] = None,
    threads: ThreadsOption = None,
) -> None:
    """Compare masks of several models or tools on the same cases: paired differences, intervals, tests, how firm the order is."""
    from autoseg.stages.compare import compare as run_compare
    from autoseg.stages.compare import comparison_facts, comparison_table

    found = run_compare(sources, reference, folder, tolerance, max(1, reading_threads(threads)), reporter)
    print_table(comparison_table(found), "paired differences")
    out.print("\n".join(comparison_facts(found)), markup=False)


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="A benchmark of the catalogue; 'list' shows all.")],
    data: Annotated[Path | None, typer.Option("--data", help="The folder of the download.")] = None,
    work: Annotated[Path | None, typer.Option("--out", help="The work folder; default: reproduce-NAME.")] = None,
    planner: Annotated[str | None, typer.Option(help="Another planner than the recipe's; stated in the result.")] = None,
    config: ConfigOption = None,
    folds: Annotated[str, typer.Option(help="all, or numbers like 0,1.")] = "all",
    epochs: Annotated[int | None, typer.Option(min=1, help="Shorter or longer than the recipe; stated in the result.")] = None,
    time_budget: Annotated[str | None, typer.Option("--time-budget", help="Time for all training, like 6h.")] = None,
    device: DeviceOption = "auto",
    partial: Annotated[bool, typer.Option("--partial", help="Go on with an incomplete download; stated in the result.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value: any value of the training record.")] = None,
) -> None:
    """Run a public benchmark's protocol on its download and print the result beside the published ones."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages import catalogue
    from autoseg.stages import reproduce as stage
    from autoseg.stages.budget import parse_duration
    from autoseg.stages.records import Options
    from autoseg.stages.settings import apply_settings
    from autoseg.types.run import TrainSpec

    if name == "list":
        print_table(catalogue.catalogue_table())
        return
    benchmark = catalogue.find_benchmark(name)
    out.print("\n".join(catalogue.describe_benchmark(benchmark)), markup=False)
    if data is None:
        raise RunError(f"give the folder of the download: autoseg reproduce {name} --data DIR")
    recipe = benchmark.recipe
    given = [*(settings or []), *([f"epochs={epochs}"] if epochs is not None else [])]
    spec = apply_settings(TrainSpec(epochs=recipe.epochs, steps_per_epoch=recipe.steps_per_epoch), given)
    compute_threads()
    options = Options(device, time_budget_s=None if time_budget is None else parse_duration(time_budget))
    workspace = Workspace(work or Path(f"reproduce-{name}"))
    result = stage.reproduce(
        name, data, workspace, spec, planner=planner, configurations=config, folds=fold_numbers(folds), partial=partial,
        options=options, reporter=reporter, interrupts=interrupts,
    )
    print_table(stage.reproduction_table(result))
    out.print("\n".join(stage.reproduction_facts(result)), markup=False)
