"""Folders of images: `images/` beside `labels/` for training, and what is given to predict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from autoseg.datasets.description import describe_beside
from autoseg.datasets.manifest import MANIFEST_ENDINGS, read_manifest
from autoseg.datasets.naming import (
    Listing,
    bad_name,
    gather,
    gather_labels,
    image_files,
    missing_image,
    missing_label,
    mixed_naming,
    name_files,
    name_problem,
)
from autoseg.errors import AutosegError, DatasetError
from autoseg.types.dataset import CaseFiles

PAIRS = (("images", "labels"), ("imagesTr", "labelsTr"))


def find_pair(root: Path) -> tuple[Path, Path] | None:
    """The image and label folders inside `root`, or None."""
    for images, labels in PAIRS:
        if (root / images).is_dir() and (root / labels).is_dir():
            return root / images, root / labels
    return None


def read_folder(root: Path, images: Path, labels: Path, source: str = "folder") -> Listing:
    """List `images` and `labels` with names CASE.ext or CASE_0000.ext and CASE.ext, and dataset.json in `root` if it is there.

    Every image and label becomes part of a case, also one whose partner is missing, so that what is there can be checked.
    """
    label_files, faults = gather_labels(image_files(labels))
    named = name_files(image_files(images), label_files)
    faults += mixed_naming(named)
    image_sets, more = gather(named)
    description, problems = describe_beside(root / "dataset.json")
    cases = []
    for case in sorted({*image_sets, *label_files}):
        files = image_sets.get(case, ())
        label = label_files.get(case)
        cases.append(CaseFiles(case=case, images=files, label=str(label) if label else None))
        if label is None:
            more.append(missing_label(case, files[0], f"{labels / case}.*"))
        elif not files:
            more.append(missing_image(case, str(label), f"{images / case}.* or {images / case}_0000.*"))
        more += bad_name(case, files[0] if files else label)
    name = description.name or root.name or "dataset"
    return Listing(source, root, name, description, tuple(cases), (*faults, *more, *problems))


def read_inputs(paths: Sequence[Path], channels: int) -> list[CaseFiles]:
    """The cases to predict: files, folders of CASE.ext or CASE_0000.ext, or CSV/JSON manifests; labels are not needed.

    A case has one file per channel, or a single file that holds all `channels`. Raises DatasetError that lists every case
    with a wrong number of channels, every name that is given twice, and inputs that hold nothing readable.
    """
    from autoseg.files.images import ENDINGS

    loose: list[Path] = []
    cases: list[CaseFiles] = []
    problems: list[str] = []
    for path in (Path(p).absolute() for p in paths):
        if path.is_dir():
            found = image_files(path)
            loose += found
            if not found:
                problems.append(f"{path}: expected image files ({' '.join(ENDINGS)}), found none{_hint(path)}")
        elif not path.exists():
            problems.append(f"{path}: does not exist")
        elif path.name.lower().endswith(tuple(ENDINGS)):
            loose.append(path)
        elif path.suffix.lower() in MANIFEST_ENDINGS:
            listing = read_manifest(path, need_labels=False)
            cases += [c.model_copy(update={"label": None}) for c in listing.cases]
            problems += [f"{f.file}: expected {f.expected}, found {f.found}"
                         for f in listing.faults if f.code != "invalid-description"]
        else:
            problems.append(f"{path}: expected an image ({' '.join(ENDINGS)}), a folder or a .csv or .json manifest")
    image_sets, faults = gather(name_files(list(dict.fromkeys(loose))))
    problems += [f"case {f.case}: expected {f.expected}, found {f.found}" for f in faults]
    cases += [CaseFiles(case=case, images=files) for case, files in image_sets.items()]
    problems += [f"case {name}: given {count} times; each case needs its own name"
                 for name, count in sorted(Counter(c.case for c in cases).items()) if count > 1]
    for case in cases:
        problems += _count_problem(case, channels)
    if not cases and not problems:
        problems.append("no input was given")
    if problems:
        raise DatasetError("the input cannot be used:\n  " + "\n  ".join(problems))
    return sorted(cases, key=lambda c: c.case)


def _hint(folder: Path) -> str:
    inside = next((name for name in ("images", "imagesTs", "imagesTr") if (folder / name).is_dir()), None)
    return f"; did you mean {folder / inside}?" if inside else ""


def _count_problem(case: CaseFiles, channels: int) -> list[str]:
    from autoseg.files.images import read_header

    bad = name_problem(case.case)
    if bad:
        return [f"a case name must be usable as a file name, found {bad}"]
    try:
        held = sum(read_header(Path(file)).channels for file in case.images)
    except AutosegError:
        return []  # the prediction reports a damaged file by itself and goes on with the others
    if held == channels:
        return []
    names = ", ".join(Path(p).name for p in case.images)
    hint = "; if each file is a case of its own, list them in a manifest" if channels == 1 and len(case.images) > 1 else ""
    return [f"case {case.case}: expected {channels} channel{'s' if channels != 1 else ''}, found {held} ({names}){hint}"]
