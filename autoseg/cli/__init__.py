"""The command line: one command per stage. Only here is anything printed, logging set up, the environment read."""

from __future__ import annotations

import errno
import shlex
import signal
import sys
from typing import NoReturn

# isort: off
from autoseg.cli import blas  # noqa: F401  (before numpy)
from autoseg.cli import planning, networks, evidence, models  # noqa: F401  (they add their commands, in this order)

# isort: on
from autoseg.cli.app import app, err
from autoseg.errors import AutosegError, CasesFailed
from autoseg.interrupts import Interrupted

__all__ = ["app", "main"]
FILE_PROBLEMS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST,
}


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
