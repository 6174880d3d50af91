"""What all commands share: the application, its consoles, common options, tables."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import autoseg
from autoseg.console import ConsoleReporter
from autoseg.errors import RunError
from autoseg.interrupts import Interrupts

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
clock = {"started": time.monotonic()}  # of the command at work, before the heavy imports: they count in a time budget

WorkArgument = Annotated[Path, typer.Argument(help="The work folder.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=0, help="Reading threads; default from cores and memory.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
PrecisionOption = Annotated[str, typer.Option("--precision", help="auto, bf16, fp16 or fp32.")]
ConfigOption = Annotated[
    list[str] | None, typer.Option("--config", help="A configuration of the plan; may be given several times.")
]


reporter = ConsoleReporter(out, err)


def reading_threads(wanted: int | None) -> int:
    from autoseg.files.machine import cores

    return cores() if wanted is None else wanted


def compute_threads() -> None:
    """Let torch use the cores this process may use, unless the environment says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        from autoseg.files.machine import cores

        torch.set_num_threads(cores())


def print_table(rows: Sequence[Sequence[str]], title: str = "") -> None:
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
    clock["started"] = time.monotonic()
    interrupts.install()


def fold_numbers(text: str) -> list[int] | None:
    if text.strip() == "all":
        return None
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise RunError(f"--folds takes all, or numbers like 0,1, found {text!r}") from None
