"""Turning whatever a decoder raises into one short sentence about a file."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoseg.errors import AutosegError, DatasetError
from autoseg.files.sizes import NoRoomError

# What Python code raises when a damaged structure trips it; these messages say nothing to a user.
_STUMBLES = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RecursionError, struct.error)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors begin with the path; anything a decoder raises becomes DatasetError."""
    try:
        yield
    except AutosegError as error:
        raise type(error)(f"{path} {error}") from None
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
    except MemoryError:
        raise NoRoomError(f"{path} cannot be read: there is not enough memory for it") from None
    except Exception as error:  # decoders that meet hostile data raise whatever they like
        raise DatasetError(f"{path} cannot be read: {_reason(error)}; copy or export it again") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors begin with the path; what the operating system refuses becomes AutosegError."""
    try:
        yield
    except AutosegError as error:
        raise type(error)(f"{path} {error}") from None
    except OSError as error:
        raise AutosegError(f"{path} cannot be written: {_reason(error)}; check permissions and free space") from None


def _reason(error: Exception) -> str:
    """The one line of a library's message that says what is wrong, without source paths and addresses."""
    if isinstance(error, _STUMBLES):
        return "its structure is damaged"
    text = str(error.strerror or error) if isinstance(error, OSError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Exception thrown")]
    lines = [re.sub(r"^ITK ERROR: |^\[nrrd\] |\w+\(0x[0-9a-f]+\): |^\S+\.[ch]xx:\d+:", "", line).strip() for line in lines]
    lines = [line for line in lines if line and not line.startswith(("Reason: Success", "File cannot be read"))]
    return (lines[-1] if lines else "its data are damaged")[:200].rstrip(".")
