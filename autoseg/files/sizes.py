"""How much memory an image may take: checked against its file and the machine before any voxel is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoseg.errors import DatasetError
from autoseg.files.machine import memory_available_bytes

# Deflate cannot pack more than 1032 bytes into one (zlib, technical details); a file that declares more is damaged or hostile.
DEFLATE_RATIO = 1100
# One bit per 8 x 8 block and component is the least a JPEG can spend, which is about 1400 with subsampled colours.
JPEG_RATIO = 4000
_SLACK_BYTES = 4096


class NoRoomError(DatasetError, MemoryError):
    """An image does not fit into the memory that is free now; it may when other work is done."""


def check_size(shape: Sequence[int], voxel_bytes: float, stored_bytes: int, ratio: float | None, copies: int = 1) -> None:
    """Refuse a declared shape that its file cannot hold or the memory cannot take.

    `voxel_bytes` is the size of one voxel with all its channels, `stored_bytes` what the file has for voxels, `ratio` the most
    that its compression can reach (1 for none, None when there is no bound), `copies` how many arrays reading needs at once.
    Raises DatasetError, and NoRoomError where it is the memory.
    """
    declared = math.prod(int(n) for n in shape) * voxel_bytes
    text = " x ".join(str(n) for n in shape)
    if ratio is not None and declared > stored_bytes * ratio + (_SLACK_BYTES if ratio > 1 else 0):
        raise DatasetError(f"is truncated or damaged: its header declares {text} voxels ({_human(declared)}), "
                           f"but the file holds {_human(stored_bytes)} of voxel data; copy or export it again")
    available = memory_available_bytes()
    if declared * copies > available:
        raise NoRoomError(f"declares {text} voxels, which need {_human(declared * copies)} of memory, "
                          f"but {_human(available)} are free; crop it or use a machine with more memory")


def _human(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
