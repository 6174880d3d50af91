"""Voxels of every connected component of a stored case's labels, for samplers that visit each of them."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.components import component_locations
from autoseg.files.workspace import atomic_path

COMPONENTS = "components.npz"
Components = dict[int, list[NDArray[np.int16]]]


def case_components(
    folder: Path, read_label: Callable[[], NDArray[np.integer]], members: Mapping[int, tuple[int, ...]], seed: int
) -> Components:
    """Return voxels (n, 3) of each connected component of each target that is present, by its index in `members`.

    They are found in the label map that `read_label` returns, and kept in the case's folder for the next time, if it can be
    written to. Raises what `read_label` raises.
    """
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return _load(folder / COMPONENTS)
    found = component_locations(read_label(), list(members.values()), seed)
    components = {list(members)[number]: parts for number, parts in found.items()}
    with contextlib.suppress(OSError), atomic_path(folder / COMPONENTS) as temporary, temporary.open("wb") as file:
        np.savez(
            file, targets=np.array([target for target, parts in components.items() for _ in parts], np.int64),
            counts=np.array([len(part) for parts in components.values() for part in parts], np.int64),
            voxels=np.concatenate([np.empty((0, 3), np.int16), *(part for parts in components.values() for part in parts)]),
        )
    return components


def _load(path: Path) -> Components:
    with np.load(path, allow_pickle=False) as arrays:
        targets, counts, voxels = arrays["targets"], arrays["counts"], arrays["voxels"]
    if counts.sum() != len(voxels) or len(targets) != len(counts):
        raise ValueError("damaged")
    components: Components = {}
    for target, part in zip(targets.tolist(), np.split(voxels, np.cumsum(counts)[:-1]), strict=True):
        components.setdefault(target, []).append(part)
    return components
