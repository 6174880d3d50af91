"""Ctrl-C and termination signals: at once where that is harmless, after the current step where state must be saved first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The user or the system asked to stop; what was done is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


class Interrupts:
    """Remembers the first signal; inside `deferred` the code asks for it, elsewhere it raises at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._deferring = False

    def install(self) -> None:
        """Handle SIGINT and SIGTERM from now on (main thread only)."""
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the first signal only sets `signum`; a second one raises."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def raise_if_requested(self) -> None:
        """Raise Interrupted when a signal came."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.signum = self.signum is not None, signum
        if again or not self._deferring:
            raise Interrupted(signum)
