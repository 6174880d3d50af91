"""Downloads whose files are told by their paths: one pattern for each channel and one for the label."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.datasets.naming import missing_image
from autoseg.errors import DatasetError
from autoseg.types.dataset import CaseFiles, Fault
from autoseg.types.faults import fault

MOST_FILES = 500_000  # a folder with more is not a single download


@dataclass(frozen=True)
class Found:
    """What was recognised: labelled cases, faults, and the cases whose images have no label (test images)."""

    cases: tuple[CaseFiles, ...]
    faults: tuple[Fault, ...] = ()
    unlabelled: tuple[str, ...] = ()


def files_below(root: Path) -> Iterator[tuple[Path, str]]:
    """Every file below `root` with its path relative to it ("/" between parts), sorted; hidden ones and macOS's copies left out.

    Linked folders are not followed. Raises DatasetError when there are more files than any download has.
    """
    count = 0
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            if name.startswith("."):
                continue
            count += 1
            if count > MOST_FILES:
                raise DatasetError(f"{root} holds more than {MOST_FILES} files; give the folder of the download itself")
            path = Path(folder) / name
            yield path, path.relative_to(root).as_posix()


def read_patterns(root: Path, images: Sequence[str], label: str) -> Found:
    """List the cases below `root`, at any depth.

    `images` has one regular expression for each channel, `label` one; each must match the end of a file's path below `root`,
    from the start of a folder or file name, with a group `case` and, if wanted, a group `group` (the patient).
    """
    expressions = [re.compile(rf"(?:.*/)?{pattern}") for pattern in (*images, label)]
    held: dict[str, dict[int, Path]] = {}
    groups: dict[str, str] = {}
    faults: list[Fault] = []
    for path, relative in files_below(root):
        for number, expression in enumerate(expressions):
            match = expression.fullmatch(relative)
            if match is None:
                continue
            case = match["case"]
            files = held.setdefault(case, {})
            if number in files:
                what = "one label" if number == len(images) else f"one image for channel {number}"
                faults.append(fault("colliding-case-names", case, path, f"{what} of case {case}", f"also {files[number]}",
                                    "keep one copy of the download in the folder"))
            files.setdefault(number, path)
            if "group" in expression.groupindex:
                groups[case] = match["group"]
    cases, unlabelled = [], []
    for case, files in sorted(held.items()):
        if len(images) not in files:
            unlabelled.append(case)
            continue
        missing = [str(number) for number in range(len(images)) if number not in files]
        if missing:
            faults.append(missing_image(case, str(files[len(images)]), f"images of channel {', '.join(missing)}"))
        cases.append(CaseFiles(case=case, images=tuple(str(files[n]) for n in range(len(images)) if n in files),
                               label=str(files[len(images)]), group=groups.get(case)))
    return Found(tuple(cases), tuple(faults), tuple(unlabelled))
