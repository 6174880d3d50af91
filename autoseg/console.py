"""How progress looks: bars with rate and time left on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text

PLAIN_SECONDS = 10.0  # between plain lines


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: RichTask) -> Text:
        """Show the recent speed."""
        return Text(f"{task.finished_speed or task.speed or 0:.2f}/s")


class _BarTask:
    def __init__(self, progress: Progress, handle: Any) -> None:
        self.progress, self.handle = progress, handle

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move the bar."""
        self.progress.update(self.handle, advance=steps, note=note)

    def resize(self, total: int) -> None:
        """Change the number of steps."""
        self.progress.update(self.handle, total=total)


class _LineTask:
    """Plain lines for logs: at most one every few seconds."""

    def __init__(self, out: Console, name: str, total: int, unit: str) -> None:
        self.out, self.name, self.total, self.unit = out, name, total, unit
        self.done, self.begin, self.last = 0, time.monotonic(), time.monotonic()
        self.first: int | None = None

    def resize(self, total: int) -> None:
        """Change the number of steps."""
        self.total = total

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count, and print a line when it is time."""
        if self.first is None and steps > 1:
            self.first = steps
        self.done += steps
        now = time.monotonic()
        if steps and (now - self.last >= PLAIN_SECONDS or self.done >= self.total):
            self.last = now
            fresh = self.done - (self.first or 0)
            rate = fresh / max(now - self.begin, 1e-9)
            left = (self.total - self.done) / rate if rate > 0 else 0
            self.out.print(
                f"{self.name}: {self.done}/{self.total} {self.unit}, {rate:.2f}/s, {left:.0f} s left  {note}".rstrip(),
                markup=False,
            )


class ConsoleReporter:
    """Draws progress bars on a terminal, plain lines elsewhere, on the consoles that the command line gives it."""

    def __init__(self, out: Console, err: Console) -> None:
        self.out, self.err = out, err

    def info(self, message: str) -> None:
        """Print one line."""
        self.out.print(message, markup=False)

    def warn(self, message: str) -> None:
        """Print one line to stderr."""
        self.err.print(f"warning: {message}", markup=False)

    @contextmanager
    def task(self, name: str, total: int, unit: str = "cases") -> Iterator[Any]:
        """A bar with count, rate, time left and a note; lines without a terminal."""
        if not self.out.is_terminal:
            yield _LineTask(self.out, name, total, unit)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self.out) as progress:
            yield _BarTask(progress, progress.add_task(escape(name), total=total, note=""))
