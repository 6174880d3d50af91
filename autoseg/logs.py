"""How stages tell what they are doing: a small protocol that the command line draws and that is silent by default."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol


class Task(Protocol):
    """One piece of long work with a known number of steps."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` as done; `note` is a short text shown beside the bar (losses, the case at work)."""
        ...

    def resize(self, total: int) -> None:
        """Change the number of steps."""
        ...


class Reporter(Protocol):
    """Receives progress and messages from the stages."""

    def info(self, message: str) -> None:
        """Tell something worth knowing, one line."""
        ...

    def warn(self, message: str) -> None:
        """Tell something that may need the user's attention, one line."""
        ...

    def task(self, name: str, total: int, unit: str = "cases") -> AbstractContextManager[Task]:
        """Open a task of `total` steps; it closes with the context."""
        ...


class _SilentTask:
    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count nothing."""

    def resize(self, total: int) -> None:
        """Change nothing."""

    def __enter__(self) -> _SilentTask:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


class Silent:
    """A reporter that says nothing: the default when stages are called from Python."""

    def info(self, message: str) -> None:
        """Drop the message."""

    def warn(self, message: str) -> None:
        """Drop the message."""

    def task(self, name: str, total: int, unit: str = "cases") -> AbstractContextManager[Task]:
        """Return a task that counts nothing."""
        return _SilentTask()


SILENT = Silent()
