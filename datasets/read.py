"""The one door to data sets: recognises what is at a path and returns a Dataset with every fault of structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autoseg.datasets.description import labels_from_values, load_json, with_annotated
from autoseg.datasets.folder import find_pair, read_folder
from autoseg.datasets.manifest import MANIFEST_ENDINGS, read_manifest
from autoseg.datasets.msd import is_msd, read_msd
from autoseg.datasets.naming import LOSSY, Listing, image_files
from autoseg.datasets.nnunet import is_nnunet, read_nnunet
from autoseg.datasets.splits import groups_from_names
from autoseg.errors import AutosegError, DatasetError
from autoseg.types.dataset import CaseFiles, Dataset, Fault
from autoseg.types.faults import fault, sort_faults
from autoseg.types.labels import Labels

READER_THREADS = 4
MOST_VALUES = 1000  # more distinct values than the largest brain atlases have; beyond it the files are images, not label maps
COLOURS = ("red", "green", "blue")
PHOTOS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

FORMS = """a data set is one of
  a folder with images/ and labels/ (CASE.ext or CASE_0000.ext, and CASE.ext)
  an nnU-Net raw folder (dataset.json, imagesTr/ and labelsTr/)
  a Medical Segmentation Decathlon folder (dataset.json with a training list)
  a .csv or .json manifest (columns image or image_<channel name>, label; if wanted case, group, fold, labelled)"""


def read_dataset(path: Path, *, groups: Literal["auto", "none"] = "auto") -> tuple[Dataset | None, list[Fault]]:
    """Read a data set in any of the four accepted forms; nothing but the headers and, for undeclared labels, the label files.

    Faults of structure are returned, not raised, and cases with faults stay in the Dataset with the files they have, so that
    `check` can list everything in one run: train on it only when no fault is an error. With `groups` "none" every case stands
    for itself. Raises DatasetError when `path` holds no data set at all.
    """
    listing = _listing(Path(path).absolute())
    faults = list(listing.faults)
    if not listing.cases:
        if not faults:
            raise DatasetError(f"{path} holds no case; {FORMS}\nfound {_contents(Path(path))}")
        return None, sort_faults(faults)
    channels, named = _channels(listing)
    labels, more = _labels(listing)
    cases, groups_from = _grouped(listing.cases, groups)
    cases, unclear = with_annotated(cases, labels, listing.description, listing.root)
    faults += [*more, *unclear]
    faults += [fault("lossy-label", c.case, c.label, "a lossless format", Path(c.label).suffix)
               for c in cases if c.label and c.label.lower().endswith(LOSSY)]
    splits = next((listing.root / name for name in ("splits.json", "splits_final.json") if (listing.root / name).is_file()), None)
    dataset = Dataset.model_validate({
        "name": listing.name, "source": listing.source, "root": str(listing.root), "channels": channels, "channels_named": named,
        "labels": labels, "cases": cases, "groups_from": groups_from, "splits_file": str(splits) if splits else None,
    })
    return dataset, sort_faults(faults)


def _listing(path: Path) -> Listing:
    if path.is_file() and path.suffix.lower() in MANIFEST_ENDINGS:
        data = load_json(path) if path.name == "dataset.json" else None
        if isinstance(data, Mapping) and "cases" not in data:
            return _listing(path.parent)
        return read_manifest(path)
    if not path.is_dir():
        found = "a file of another kind" if path.exists() else "nothing at that path"
        raise DatasetError(f"{path} is not a data set: {FORMS}\nfound {found}")
    described = path / "dataset.json"
    data = None
    if described.is_file():
        try:
            data = load_json(described)
        except DatasetError:
            data = None  # the folder reader turns this into a fault and goes on without names
    if isinstance(data, Mapping):
        if is_msd(path, data):
            return read_msd(path, data)
        if is_nnunet(path, data):
            return read_nnunet(path, data)
    pair = find_pair(path)
    if pair is None:
        raise DatasetError(f"{path} is not a data set: {FORMS}\nfound {_contents(path)}")
    return read_folder(path, *pair)


def _contents(path: Path) -> str:
    if not path.is_dir():
        return path.name
    entries = sorted(path.iterdir())
    folders = [f"{p.name}/ ({len(image_files(p))} images)" for p in entries if p.is_dir()]
    records = [p.name for p in entries if p.suffix.lower() in MANIFEST_ENDINGS]
    parts = folders[:8] + records[:8] + [f"{len(image_files(path))} images in the folder itself"]
    return ", ".join(parts)


def _channels(listing: Listing) -> tuple[tuple[str, ...], bool]:
    """Channel names and whether somebody gave them; without names the number that most cases have counts."""
    counts: Counter[int] = Counter()
    photos: Counter[int] = Counter()
    with ThreadPoolExecutor(READER_THREADS) as pool:
        for case, count in zip(listing.cases, pool.map(_count, listing.cases), strict=True):
            if count:
                counts[count] += 1
                photos[count] += len(case.images) == 1 and case.images[0].lower().endswith(PHOTOS)
    declared = listing.description.channels
    usual = max(counts, key=lambda n: (counts[n], -n), default=len(declared or ("",)))
    colour = usual == len(COLOURS) and photos[usual] > 0
    if declared is not None and not (colour and len(declared) == 1 and counts[1] == 0):
        return declared, True
    if colour:
        return COLOURS, True
    return tuple(f"channel_{i}" for i in range(usual)), False


def _count(case: CaseFiles) -> int:
    """The channels that the files of a case hold together, 0 when they cannot be read."""
    from autoseg.files.images import read_header

    try:
        return sum(read_header(Path(file)).channels for file in case.images)
    except AutosegError:
        return 0


def _labels(listing: Listing) -> tuple[Labels, list[Fault]]:
    """The declared labels, or what the label files hold."""
    if listing.description.labels is not None:
        return listing.description.labels, []
    files = [case.label for case in listing.cases if case.label]
    with ThreadPoolExecutor(READER_THREADS) as pool:
        values: frozenset[int] = frozenset().union(*pool.map(_values_in, files))
    if len(values) <= MOST_VALUES:
        return labels_from_values(values), []
    found = f"{len(values)} distinct values in {len(files)} label files"
    expected = f"at most {MOST_VALUES} distinct values"
    return labels_from_values(values), [fault("too-many-labels", "", listing.root, expected, found)]


def _values_in(file: str) -> frozenset[int]:
    """Values in a label file; none when it cannot be read, which the check reports."""
    from autoseg.files.images import read_label

    try:
        return distinct_values(read_label(Path(file))[0])
    except AutosegError:
        return frozenset()


def distinct_values(label_zyx: NDArray[np.integer[Any]]) -> frozenset[int]:
    """The values that occur in an integer array, slice by slice so that memory stays far below that of sorting the whole."""
    found: set[int] = set()
    for plane in label_zyx if label_zyx.size else ():
        low, high = int(plane.min()), int(plane.max())
        if high - low < 1 << 16:
            counts = np.bincount((plane.astype(np.int64) - low).ravel())
            found.update((np.flatnonzero(counts) + low).tolist())
        else:
            found.update(np.unique(plane).tolist())
    return frozenset(found)


def _grouped(cases: Sequence[CaseFiles], groups: Literal["auto", "none"]) -> tuple[tuple[CaseFiles, ...], str]:
    """The cases with their groups, and where these come from; groups in a manifest win over names."""
    if groups == "none":
        return tuple(c.model_copy(update={"group": None}) for c in cases), "none"
    if any(c.group is not None for c in cases):
        return tuple(cases), "manifest"
    found = groups_from_names([c.case for c in cases])
    if found is None:
        return tuple(cases), "none"
    return tuple(c.model_copy(update={"group": found[c.case]}) for c in cases), "names"
