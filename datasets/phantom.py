"""Built-in data: phantoms with anatomy, made from numbers alone, for demonstrations and tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autoseg.datasets import phantom_brain, phantom_chest
from autoseg.datasets.phantom_space import on_table, storage
from autoseg.errors import DatasetError
from autoseg.logs import SILENT, Reporter
from autoseg.types.geometry import Grid

Kind = Literal["chest", "brain"]
KINDS: tuple[Kind, ...] = ("chest", "brain")
UNSEEN_FROM = 1000  # index of the first unseen case, so that adding training cases never makes an unseen one seen


@dataclass(frozen=True)
class PhantomCase:
    """One phantom as a scanner would have stored it.

    `image_czyx` is int16 (chest: one channel, HU; brain: T1, T1ce, T2, FLAIR in arbitrary units), `label_zyx` uint8 on the same
    grid. `grid` has the spacing, origin, direction and axis order of the storage, which differ from case to case.
    """

    name: str
    image_czyx: NDArray[np.int16]
    label_zyx: NDArray[np.uint8]
    grid: Grid


def make_case(kind: Kind, seed: int, index: int, size: float = 1.0) -> PhantomCase:
    """Make one phantom: a pure function of its arguments.

    `size` scales the number of voxels along every axis (the anatomy stays the same). Raises ValueError for an unknown kind, a
    negative seed or index, or a size outside 0.2 to 4.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, found {kind!r}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, found {seed} and {index}")
    if not 0.2 <= size <= 4:
        raise ValueError(f"size must lie between 0.2 and 4, found {size}")
    streams = np.random.SeedSequence([seed, index, KINDS.index(kind)]).spawn(4)
    view, anatomy, noise, writer = (np.random.default_rng(stream) for stream in streams)
    module = phantom_chest if kind == "chest" else phantom_brain
    grid = module.draw_grid(view, size)
    image, label = module.render(grid, anatomy, noise)
    axis_map = storage(writer)
    stored = on_table(grid, writer).mapped(axis_map)
    return PhantomCase(
        name=f"{kind}{index:03d}", grid=stored,
        image_czyx=np.ascontiguousarray(axis_map.apply(image)), label_zyx=np.ascontiguousarray(axis_map.apply(label)),
    )


def describe(kind: Kind, cases: int) -> dict[str, Any]:
    """The content of dataset.json: channel names, labels (the brain's as nested regions, in nnU-Net's form), file ending."""
    channels = phantom_chest.CHANNELS if kind == "chest" else phantom_brain.CHANNELS
    content: dict[str, Any] = {
        "name": f"phantom {kind}",
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": dict(phantom_chest.LABELS),
        "file_ending": ".nii.gz",
        "numTraining": cases,
        "license": "CC0-1.0 (made by autoseg from random numbers: no patient data)",
    }
    if kind == "brain":
        content["labels"] = {"background": 0, "whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing tumour": [3]}
        content["regions_class_order"] = [1, 2, 3]
    return content


def write_dataset(
    folder: Path, kind: Kind, cases: int, unseen: int, seed: int, reporter: Reporter = SILENT, size: float = 1.0,
) -> None:
    """Write `cases` phantoms to `folder` (images/, labels/, dataset.json) and `unseen` more, made alike, to `folder`/unseen.

    Cases that are there already stay as they are. Raises DatasetError when the folder holds something else, or phantoms made
    from other choices.
    """
    from autoseg.files.images import write_label
    from autoseg.files.workspace import write_text

    made_from = {"kind": kind, "seed": seed, "size": size}
    _check_folder(folder, made_from)
    content = {**describe(kind, cases), "phantom": made_from}
    with reporter.task(f"making {kind} phantoms", cases + unseen) as task:
        write_text(folder / "dataset.json", json.dumps(content, indent=1) + "\n")
        for place, index in _places(folder, cases, unseen):
            name = f"{kind}{index:03d}"
            label_path = place / "labels" / f"{name}.nii.gz"
            if not label_path.exists():
                case = make_case(kind, seed, index, size)
                for channel, image in enumerate(case.image_czyx):
                    write_label(place / "images" / f"{name}_{channel:04d}.nii.gz", image, case.grid)
                write_label(label_path, case.label_zyx, case.grid)  # last, so that a label means a complete case
            task.advance(note=name)


def _places(folder: Path, cases: int, unseen: int) -> Iterator[tuple[Path, int]]:
    yield from ((folder, index) for index in range(cases))
    yield from ((folder / "unseen", UNSEEN_FROM + index) for index in range(unseen))


def _check_folder(folder: Path, made_from: dict[str, Any]) -> None:
    record = folder / "dataset.json"
    if not record.exists():
        if (folder / "images").exists() or (folder / "labels").exists():
            raise DatasetError(f"{folder}: expected a new folder, found images or labels and no dataset.json: choose another one")
        return
    try:
        found = json.loads(record.read_text(encoding="utf-8")).get("phantom")
    except (ValueError, AttributeError):
        found = None
    if found != made_from:
        what = f"phantoms made from {found}" if found else "another data set"
        raise DatasetError(f"{record}: expected phantoms made from {made_from}, found {what}: choose another folder or remove it")
