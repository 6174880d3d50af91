"""The JSRT chest radiographs with the SCR masks: headerless images and five overlapping masks a case, written as PNG.

The images are 2048 x 2048 big-endian 16-bit values without a header (12 bits used); the masks are GIF files of half that size,
one for each structure, in the two folds of the SCR protocol (van Ginneken et al. 2006). Images are brought to the size of the
masks by averaging 2 x 2 pixels. Since clavicles lie in front of the lungs, a clavicle has two values: over lung and beside it.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.datasets.patterns import Found, files_below
from autoseg.errors import AutosegError, DatasetError
from autoseg.files.damage import reading
from autoseg.files.grids import plain_grid
from autoseg.files.images import read_image, write_label
from autoseg.logs import SILENT, Reporter
from autoseg.types.dataset import CaseFiles, Fault
from autoseg.types.faults import fault

SIZE = 1024  # edge of the masks
LUNG, HEART, CLAVICLE, CLAVICLE_OVER_LUNG = 1, 2, 3, 4
STRUCTURES = ("left lung", "right lung", "heart", "left clavicle", "right clavicle")
_IMAGE = re.compile(r"(?:.*/)?(?P<case>JPC[LN]N\d{3})\.(?:IMG|png|tif)", re.IGNORECASE)
_MASK = re.compile(rf"(?:.*/)?fold(?P<fold>[12])/masks/(?P<name>{'|'.join(STRUCTURES)})/(?P<case>JPC[LN]N\d{{3}})\.gif",
                   re.IGNORECASE)


def read_jsrt(root: Path, work: Path, size: int = SIZE, reporter: Reporter = SILENT) -> Found:
    """Find images and masks below `root`, write both to `work` as PNG of `size` x `size`, and take the folds from the folders.

    A case that cannot be read becomes a fault. Images that are neither `size` nor twice `size` wide are refused.
    """
    images: dict[str, Path] = {}
    masks: dict[str, dict[str, Path]] = {}
    folds: dict[str, int] = {}
    faults: list[Fault] = []
    for path, relative in files_below(root):
        if match := _MASK.fullmatch(relative):
            case, fold = match["case"].upper(), int(match["fold"]) - 1
            if folds.setdefault(case, fold) != fold or match["name"].lower() in masks.get(case, {}):
                faults.append(fault("colliding-case-names", case, path, f"the masks of {case} once", f"also in fold{fold + 1}",
                                    "keep one copy of the download in the folder"))
            masks.setdefault(case, {})[match["name"].lower()] = path
        elif match := _IMAGE.fullmatch(relative):
            images.setdefault(match["case"].upper(), path)
    cases = []
    with reporter.task("convert", len(masks)) as task:
        for case, parts in sorted(masks.items()):
            problem = _convert(case, images.get(case), parts, work, size)
            if problem is not None:
                faults.append(problem)
            else:
                cases.append(CaseFiles(case=case, images=(str(work / "images" / f"{case}.png"),),
                                       label=str(work / "labels" / f"{case}.png"), fold=folds[case]))
            task.advance(note=case)
    return Found(tuple(cases), tuple(faults), tuple(sorted(set(images) - set(masks))))


def _convert(case: str, image: Path | None, parts: dict[str, Path], work: Path, size: int) -> Fault | None:
    """Write one case; a fault when something of it is missing or damaged."""
    missing = [name for name in STRUCTURES if name not in parts]
    if image is None or missing:
        expected = "an image" if image is None else f"masks of {', '.join(missing)}"
        return fault("missing-partner", case, image or next(iter(parts.values())), expected, "none", "complete the download")
    newest = max(path.stat().st_mtime_ns for path in (image, *parts.values()))
    targets = [work / folder / f"{case}.png" for folder in ("images", "labels")]
    if all(target.exists() and target.stat().st_mtime_ns >= newest for target in targets):
        return None
    grid = plain_grid((1, size, size), None)
    try:
        image_yx = read_radiograph(image, size)
        label_yx = merge({name: read_mask(path, size) for name, path in parts.items()})
    except AutosegError as error:
        return fault("unreadable-file", case, image, "the files as they were downloaded", str(error))
    write_label(targets[0], image_yx[None], grid)
    write_label(targets[1], label_yx[None], grid)
    return None


def merge(masks_yx: dict[str, NDArray[np.bool_]]) -> NDArray[np.uint8]:
    """One label map of the five masks: heart over lung, clavicle over both, with a value of its own where it crosses a lung."""
    lung_yx = masks_yx["left lung"] | masks_yx["right lung"]
    clavicle_yx = masks_yx["left clavicle"] | masks_yx["right clavicle"]
    label_yx = np.where(lung_yx, LUNG, 0)
    label_yx[masks_yx["heart"]] = HEART
    label_yx[clavicle_yx] = CLAVICLE
    label_yx[clavicle_yx & lung_yx] = CLAVICLE_OVER_LUNG
    return label_yx.astype(np.uint8)


def read_radiograph(path: Path, size: int) -> NDArray[np.uint16]:
    """An image as (y, x) of `size` x `size`: a headerless one of twice that, or a picture of either size.

    Raises DatasetError when the file has another size.
    """
    with reading(path):
        if path.suffix.lower() == ".img":
            expected = (2 * size) ** 2 * 2
            found = path.stat().st_size
            if found != expected:
                raise DatasetError(f"has {found} bytes, expected {expected} ({2 * size} x {2 * size} values of 16 bits); "
                                   "download it again")
            array_yx = np.fromfile(path, dtype=">u2").reshape(2 * size, 2 * size)
            return _halved(array_yx)
    array_czyx = read_image(path).array_czyx
    if array_czyx.shape not in ((1, 1, size, size), (1, 1, 2 * size, 2 * size)) or array_czyx.dtype not in (np.uint8, np.uint16):
        raise DatasetError(f"{path}: expected a grey picture of {size} or {2 * size} pixels a side, "
                           f"found {array_czyx.shape} (channel, z, y, x) of {array_czyx.dtype}")
    plane_yx = array_czyx[0, 0]
    return plane_yx.astype(np.uint16) if plane_yx.shape[0] == size else _halved(plane_yx)


def _halved(array_yx: NDArray[np.generic]) -> NDArray[np.uint16]:
    """The mean of every 2 x 2 pixels, rounded."""
    y, x = array_yx.shape
    blocks = array_yx.reshape(y // 2, 2, x // 2, 2).astype(np.float32)
    halved: NDArray[np.uint16] = np.rint(blocks.mean(axis=(1, 3))).astype(np.uint16)
    return halved


def read_mask(path: Path, size: int) -> NDArray[np.bool_]:
    """A GIF mask as (y, x), true where it is not black; raises DatasetError when it is no GIF of `size` x `size`."""
    from PIL.GifImagePlugin import GifImageFile

    with reading(path):
        try:
            picture = GifImageFile(path)
        except SyntaxError:
            raise DatasetError("is not a GIF picture, whatever its name says, or its header is damaged") from None
        with picture:
            if picture.size != (size, size):  # before a pixel is decoded
                raise DatasetError(f"is {picture.size[0]} x {picture.size[1]} pixels, expected {size} x {size}")
            mask: NDArray[np.bool_] = np.asarray(picture.convert("L")) > 0
            return mask
