"""Temporary store of predicted probabilities: one compressed float16 array per case, cut to where there is foreground."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.components import bounding_box
from autoseg.files.workspace import atomic_path

Box = tuple[slice, ...]

UNLIKELY = 0.01  # foreground probability; voxels below it everywhere around lie outside the box
_STEPS = 1024.0  # probabilities are rounded to this part, which makes the many that are nearly 0 or 1 compress to nothing
_META = "autoseg"


@dataclass(frozen=True)
class StoredProbabilities:
    """Probabilities (outputs, z, y, x) float16 in `box` of an image of `shape`, and notes that were stored with them.

    Outside the box background is certain.
    """

    probabilities_czyx: NDArray[np.float16]
    box: Box
    shape: tuple[int, ...]
    notes: dict[str, Any]

    def on(self, box: Box, regions: bool) -> NDArray[np.float16]:
        """The probabilities on another box that holds this one."""
        if box == self.box:
            return self.probabilities_czyx
        size = [s.stop - s.start for s in box]
        whole = np.zeros((len(self.probabilities_czyx), *size), np.float16)
        if not regions:
            whole[0] = 1
        inner = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(self.box, box, strict=True))
        whole[(slice(None), *inner)] = self.probabilities_czyx
        return whole


def foreground_box(probabilities_czyx: NDArray[np.floating], regions: bool) -> Box:
    """The box of all voxels with some foreground; one voxel where there is none."""
    likely = probabilities_czyx.max(0) > UNLIKELY if regions else probabilities_czyx[0] < 1 - UNLIKELY
    return bounding_box(likely) or (slice(0, 1),) * likely.ndim


def joint_box(boxes: list[Box]) -> Box:
    """The smallest box that holds all boxes."""
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def with_margin(box: Box, shape: Sequence[int]) -> Box:
    """One voxel more on each side, within an image of `shape`."""
    return tuple(slice(max(s.start - 1, 0), min(s.stop + 1, n)) for s, n in zip(box, shape, strict=True))


def save_probabilities(path: Path, probabilities_czyx: NDArray[np.floating], regions: bool, key: str, notes: Any) -> None:
    """Store what lies in the foreground's box, atomically; `key` says what it was made with."""
    import blosc2

    box = foreground_box(probabilities_czyx, regions)
    inside = np.rint(probabilities_czyx[(slice(None), *box)] * _STEPS) / _STEPS
    meta = {"key": key, "box": [[s.start, s.stop] for s in box], "shape": list(probabilities_czyx.shape[1:]), "notes": notes}
    store: Any = blosc2.asarray  # its annotations leave numpy out
    cparams = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}
    with atomic_path(path) as temporary:
        temporary.unlink()
        store(np.ascontiguousarray(inside, np.float16), urlpath=str(temporary), mode="w", cparams=cparams,
              meta={_META: json.dumps(meta)})


def _open(path: Path) -> tuple[Any, dict[str, Any]] | None:
    import blosc2

    if not path.is_file():
        return None
    try:
        array: Any = blosc2.open(str(path), mode="r")
        return array, json.loads(array.schunk.meta[_META])
    except (RuntimeError, KeyError, ValueError, OSError):  # torn or foreign
        return None


def is_stored(path: Path, key: str) -> bool:
    """Whether the file holds what was made with `key`."""
    found = _open(path)
    return found is not None and found[1].get("key") == key


def load_notes(path: Path) -> dict[str, Any]:
    """Only the notes. Raises FileNotFoundError when nothing readable is stored there."""
    found = _open(path)
    if found is None:
        raise FileNotFoundError(path)
    return dict(found[1]["notes"])


def load_probabilities(path: Path) -> StoredProbabilities:
    """What was stored. Raises FileNotFoundError when nothing readable is stored there."""
    found = _open(path)
    if found is None:
        raise FileNotFoundError(path)
    array, meta = found
    box = tuple(slice(a, b) for a, b in meta["box"])
    return StoredProbabilities(np.asarray(array[:]), box, tuple(meta["shape"]), dict(meta["notes"]))
