"""The ISBI 2012 electron microscopy challenge: two TIFF stacks, written slice by slice as PNG.

A stack is one volume, which cannot be cross-validated, and the challenge's methods work on slices. Blocks of neighbouring slices
share a fold, because slices 50 nm apart are nearly the same image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autoseg.datasets.patterns import Found, files_below
from autoseg.errors import DatasetError
from autoseg.files.grids import plain_grid
from autoseg.files.images import read_image, read_label, write_label
from autoseg.logs import SILENT, Reporter
from autoseg.types.dataset import CaseFiles

VOLUME, LABELS = "train-volume.tif", "train-labels.tif"
MEMBRANE = 1  # in the written masks; black (0) in the download, whose cells are white
FOLDS = 5


def read_isbi2012(root: Path, work: Path, reporter: Reporter = SILENT) -> Found:
    """Find the training stacks below `root` and write their slices to `work`; slices that are there already are kept.

    Images and masks are 8-bit PNG of the stacks' own shape (y, x); masks are 1 on membranes and 0 in cells.
    Raises DatasetError when a stack is damaged, or the two do not belong together.
    """
    stacks: dict[str, Path] = {}
    for path, _ in files_below(root):
        if path.name.lower() in (VOLUME, LABELS):
            stacks.setdefault(path.name.lower(), path)
    if len(stacks) < 2:
        return Found(())
    image_czyx = read_image(stacks[VOLUME]).array_czyx
    label_zyx, _ = read_label(stacks[LABELS])
    if len(image_czyx) != 1 or image_czyx.dtype != np.uint8:
        raise DatasetError(f"{stacks[VOLUME]}: expected 8-bit grey slices, "
                           f"found {len(image_czyx)} channels of {image_czyx.dtype}; download the file again")
    if image_czyx.shape[1:] != label_zyx.shape:
        raise DatasetError(f"{stacks[LABELS]}: expected {image_czyx.shape[1:]} voxels (z, y, x) as in {VOLUME}, "
                           f"found {label_zyx.shape}; download both files again")
    values = np.unique(label_zyx).tolist()
    if not set(values) <= {0, 255}:
        raise DatasetError(f"{stacks[LABELS]}: expected the values 0 (membrane) and 255 (cell), found {values[:10]}; "
                           "use the file as it was downloaded")
    newest = max(path.stat().st_mtime_ns for path in stacks.values())
    grid = plain_grid((1, *label_zyx.shape[1:]), None)
    cases = []
    with reporter.task("convert", len(label_zyx), "slices") as task:
        for z, (image_yx, label_yx) in enumerate(zip(image_czyx[0], label_zyx, strict=True)):
            name = f"slice_{z:02d}"
            planes = {"images": image_yx, "labels": np.where(label_yx == 0, MEMBRANE, 0)}
            for folder, plane in planes.items():
                target = work / folder / f"{name}.png"
                if not target.exists() or target.stat().st_mtime_ns < newest:
                    write_label(target, plane[None].astype(np.uint8), grid)
            cases.append(CaseFiles(case=name, images=(str(work / "images" / f"{name}.png"),),
                                   label=str(work / "labels" / f"{name}.png"), fold=z * FOLDS // len(label_zyx)))
            task.advance(note=name)
    return Found(tuple(cases))
