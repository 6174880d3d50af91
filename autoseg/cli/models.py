"""Commands that make something to ship of trained networks: pack, export-onnx and import-nnunet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from autoseg.cli.app import WorkArgument, app, fold_numbers, out, reporter
from autoseg.errors import RunError


@app.command()
def pack(
    work: WorkArgument,
    path: Annotated[Path, typer.Option("--out", help="The model file, such as model.autoseg.")],
    folds: Annotated[str, typer.Option(help="all, or numbers like 0,1.")] = "all",
    weights: Annotated[str, typer.Option(help="fp32, or half the size: fp16 or bf16.")] = "fp32",
    runs: Annotated[
        list[str] | None, typer.Option("--run", help="A run to pack instead of the selected ones; may be given several times.")
    ] = None,
    licence: Annotated[str, typer.Option(help="The licence's name or text, or a file that holds it.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write the selected networks and all that is known about them into one file, safe to open anywhere."""
    from autoseg.files.tensors import CODES
    from autoseg.files.workspace import Workspace
    from autoseg.stages.pack import pack as run_pack

    if weights not in CODES:
        raise RunError(f"unknown --weights {weights!r}; choose from {', '.join(CODES)}")
    is_file = bool(licence) and len(licence) < 255 and Path(licence).is_file()
    text = Path(licence).read_text(encoding="utf-8", errors="replace") if is_file else licence
    run_pack(Workspace(work), path, fold_numbers(folds), weights, runs, text, overwrite, reporter)  # type: ignore[arg-type]


@app.command("export-onnx")
def export_onnx(
    model: Annotated[Path, typer.Argument(help="A model file or a work folder.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the networks and what surrounds them.")],
    folds: Annotated[str, typer.Option(help="all, or numbers like 0,1.")] = "all",
    opset: Annotated[int, typer.Option(help="ONNX operator set, 16 to 21.")] = 17,
    average: Annotated[bool, typer.Option("--average", help="One graph for each run: the mean of its folds.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Write the networks as ONNX, with a description of every other step and a reference in Python that carries them out."""
    from autoseg.stages.export_onnx import export_onnx as run_export

    for path in run_export(model, folder, opset, fold_numbers(folds), average, overwrite, reporter):
        out.print(str(path), markup=False)


@app.command("import-nnunet")
def import_nnunet(
    folder: Annotated[Path, typer.Argument(help="A trained nnU-Net v2 folder: plans.json, dataset.json, fold_*/.")],
    path: Annotated[Path, typer.Option("--out", help="The model file, such as model.autoseg.")],
    folds: Annotated[str, typer.Option(help="all, or numbers like 0,1.")] = "all",
    checkpoint: Annotated[Literal["final", "best"], typer.Option(help="Which checkpoint of each fold.")] = "final",
    previous: Annotated[Path | None, typer.Option("--previous", help="The first stage's folder of a cascade.")] = None,
    postprocessing: Annotated[
        bool, typer.Option("--postprocessing/--no-postprocessing", help="Take over what nnU-Net found in cross-validation.")
    ] = True,
    licence: Annotated[str, typer.Option(help="The licence's name or text, or a file that holds it.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Make a model file of a trained nnU-Net v2 model, without running anything that its checkpoints hold."""
    from autoseg.stages.import_nnunet import import_nnunet as run_import

    found = run_import(
        folder, path, fold_numbers(folds), checkpoint, previous, postprocessing, licence, overwrite, reporter
    )
    out.print(f"model: {found}", markup=False)
