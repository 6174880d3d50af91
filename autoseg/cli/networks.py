"""Commands that run networks: train and predict."""

from __future__ import annotations

import os
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
    clock,
    compute_threads,
    fold_numbers,
    interrupts,
    out,
    reporter,
)
from autoseg.errors import RunError
from autoseg.logs import SILENT


@app.command()
def train(
    work: WorkArgument,
    config: ConfigOption = None,
    folds: Annotated[str, typer.Option(help="all, or numbers like 0,1.")] = "all",
    name: Annotated[str | None, typer.Option(help="Name of the run; default: the configuration.")] = None,
    device: DeviceOption = "auto",
    devices: Annotated[
        str | None, typer.Option(help="Devices that train folds side by side, like 0,1 or cpu,cpu; default: all CUDA devices.")
    ] = None,
    preset: Annotated[str, typer.Option(help="standard or quick: what --set starts from.")] = "standard",
    epochs: Annotated[int | None, typer.Option(min=1, help="Length in epochs; the schedule follows.")] = None,
    precision: PrecisionOption = "auto",
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    threads: ThreadsOption = None,
    time_budget: Annotated[
        str | None, typer.Option("--time-budget", help="Time for everything asked for, like 90m or 6h; sets the epochs.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option("--init", help="A model file or work folder to start from; its network is taken over.")
    ] = None,
    tracker: Annotated[
        list[str] | None, typer.Option("--tracker", help="tensorboard, mlflow or wandb; may be given several times.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what these folds have and begin anew.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value: any value of the training record.")] = None,
) -> None:
    """Train and validate folds; a run that was interrupted goes on where it stopped."""
    from autoseg.files.workspace import Workspace
    from autoseg.stages.budget import parse_duration
    from autoseg.stages.devices import Wanted, pick_devices, train_on
    from autoseg.stages.records import Options
    from autoseg.stages.settings import apply_settings
    from autoseg.stages.settings import preset as preset_spec
    from autoseg.stages.together import join_ranks
    from autoseg.stages.train import train as run_train

    given = [*(settings or [])]
    sized = epochs is not None or any(setting.partition("=")[0].strip() == "epochs" for setting in given)
    if time_budget is not None and sized:
        raise RunError("--time-budget chooses the number of epochs; give either it or --epochs")
    own = {"epochs": epochs, "seed": seed, "precision": None if precision == "auto" else precision}
    given += [f"{key}={value}" for key, value in own.items() if value is not None]
    spec = apply_settings(preset_spec(preset), given)
    compute_threads()
    workspace = Workspace(work).require()
    planned = None if sized else workspace.plan().time_budget_s
    budget = planned if time_budget is None else parse_duration(time_budget)
    mode = os.environ.get("WANDB_MODE", "offline")
    ranks, device = join_ranks(os.environ, device) if devices is None else (None, device)
    if ranks is not None and budget is not None:
        raise RunError("a time budget and several processes for one run do not go together yet; give --epochs")
    options = Options(device, threads, restart, sized, budget, init, tuple(tracker or ()), mode, ranks)
    flags = _flags("--preset", preset) + _flags("--set", *given) + _flags("--tracker", *(tracker or ()))
    flags += _flags("--init", init) + _flags("--threads", threads)
    if ranks is not None:
        teller = reporter if ranks.first else SILENT
        with ranks:
            run_train(workspace, config, fold_numbers(folds), name, spec, options, teller, interrupts)
        return
    wanted = Wanted(config, fold_numbers(folds), name, spec, options, flags)
    places = pick_devices(devices, device)
    train_on(workspace, wanted, places, dict(os.environ), reporter, interrupts, clock["started"])


def _flags(name: str, *values: object) -> tuple[str, ...]:
    """A flag as it is written on a command line, once for every value that there is."""
    return tuple(part for value in values if value is not None for part in (name, str(value)))


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A model file or a work folder.")],
    inputs: Annotated[list[Path], typer.Argument(help="Images, folders of images, or a manifest.")],
    masks: Annotated[Path, typer.Option("--out", help="Folder for the masks.")],
    folds: Annotated[str, typer.Option(help="all, or numbers like 0,1.")] = "all",
    mirror: Annotated[bool, typer.Option("--mirror/--no-mirror", help="Average over mirrored copies.")] = True,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write probabilities.")] = False,
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Also write maps of entropy and disagreement.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    max_ram: Annotated[
        float | None, typer.Option("--max-ram", min=0.1, help="GB of memory for the whole process; default: what is free.")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option("--gpu-memory", min=0.1, help="GB to use on the GPU; default: what is free.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict finished cases again.")] = False,
) -> None:
    """Segment new images with the selected networks; each mask lies on the grid of its image."""
    from autoseg.datasets.folder import read_inputs
    from autoseg.files.machine import slurm_limit_bytes
    from autoseg.files.model import open_model_file
    from autoseg.files.workspace import Workspace
    from autoseg.stages.predict import Options
    from autoseg.stages.predict import predict as run_predict

    source = open_model_file(model) if model.is_file() else Workspace(model).require()
    channels = source.plan().channels if isinstance(source, Workspace) else source.record.channels
    cases = read_inputs(inputs, channels=len(channels))
    chosen_folds = fold_numbers(folds)
    wanted = None if chosen_folds is None else tuple(chosen_folds)
    allowed = slurm_limit_bytes(os.environ)
    limits = [limit for limit in (max_ram, None if allowed is None else allowed / 2**30) if limit is not None]
    options = Options(
        wanted, device, precision, mirror, probabilities, overwrite, uncertainty, min(limits, default=None), gpu_memory
    )
    compute_threads()
    run_predict(source, cases, masks, options, reporter)
    out.print(f"masks of {len(cases)} case(s): {masks}", markup=False)
