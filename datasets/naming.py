"""From file names to cases: what is a case name, what is a channel suffix, and what collides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.datasets.description import Description
from autoseg.types.dataset import CaseFiles, Fault
from autoseg.types.faults import fault

_SUFFIX = re.compile(r"(.+)_(\d{4})", re.DOTALL)  # exactly four digits, as nnU-Net names channels
LOSSY = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Named:
    """An image file, the case it belongs to, and its channel (None without a suffix)."""

    path: Path
    case: str
    channel: int | None


@dataclass(frozen=True)
class Listing:
    """What a reader found before any image is opened: the cases, the description beside them, and faults of structure."""

    source: str
    root: Path
    name: str
    description: Description
    cases: tuple[CaseFiles, ...]
    faults: tuple[Fault, ...]


def stem(path: Path) -> str:
    """The file name without its image ending (".nii.gz" is one ending)."""
    from autoseg.files.images import split_ending

    return split_ending(path.name)[0]


def image_files(folder: Path) -> list[Path]:
    """The readable image files of a folder, sorted; hidden files, subfolders and other endings are passed over."""
    from autoseg.files.images import ENDINGS

    endings = tuple(ENDINGS)
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower().endswith(endings) and p.is_file())


def name_files(files: Sequence[Path], labels: Iterable[str] = ()) -> list[Named]:
    """Tell channel suffixes from case names that merely end in four digits.

    A name that a label bears as it stands has no suffix; one that a label bears without the suffix has one. Where the labels
    decide nothing, it is a suffix when the files that share the name count 0000, 0001, ... without a gap.
    """
    known = set(labels)
    numbers: dict[str, set[int]] = {}
    matches = [_SUFFIX.fullmatch(stem(path)) for path in files]
    for match in matches:
        if match:
            numbers.setdefault(match[1], set()).add(int(match[2]))
    result = []
    for path, match in zip(files, matches, strict=True):
        whole = stem(path)
        suffixed = False
        if match:
            as_suffix, as_name = match[1] in known, whole in known
            counts_up = numbers[match[1]] == set(range(len(numbers[match[1]])))
            suffixed = as_suffix if as_suffix != as_name else counts_up
        result.append(Named(path, match[1], int(match[2])) if match and suffixed else Named(path, whole, None))
    return result


def mixed_naming(named: Sequence[Named]) -> list[Fault]:
    """Faults for the files that follow the rarer of the two naming schemes; none when all follow one."""
    suffixed = [n for n in named if n.channel is not None]
    plain = [n for n in named if n.channel is None]
    if not suffixed or not plain:
        return []
    if len(plain) <= len(suffixed):
        return [fault("mixed-naming", n.case, n.path, f"a channel suffix such as {n.case}_0000, as the other images have",
                      f"{n.path.name} without one") for n in plain]
    return [fault("mixed-naming", n.case, n.path, "no channel suffix, as the other images have", f"{n.path.name} with one")
            for n in suffixed]


def gather(named: Sequence[Named]) -> tuple[dict[str, tuple[str, ...]], list[Fault]]:
    """The image files of each case in channel order, with faults for collisions and for gaps in the channel numbers."""
    faults: list[Fault] = []
    held: dict[str, dict[int, Path]] = {}
    for item in named:
        channels = held.setdefault(item.case, {})
        number = item.channel or 0
        if number in channels:
            first = channels[number].name
            expected = f"one file for channel {number} of case {item.case}"
            faults.append(fault("colliding-case-names", item.case, item.path, expected, f"{first} and {item.path.name}"))
        else:
            channels[number] = item.path
    result: dict[str, tuple[str, ...]] = {}
    for case, channels in sorted(held.items()):
        order = sorted(channels)
        result[case] = tuple(str(channels[n]) for n in order)
        if order != list(range(len(order))):
            found = ", ".join(f"{n:04d}" for n in order)
            faults.append(fault("wrong-channel-count", case, channels[order[0]],
                                f"the channels 0000 to {order[-1]:04d} without a gap", found))
    return result, faults


def gather_labels(files: Sequence[Path]) -> tuple[dict[str, Path], list[Fault]]:
    """The label file of each case, with faults for collisions."""
    faults: list[Fault] = []
    held: dict[str, Path] = {}
    for path in files:
        case = stem(path)
        if case in held:
            faults.append(fault("colliding-case-names", case, path, f"one label for case {case}",
                                f"{held[case].name} and {path.name}"))
        else:
            held[case] = path
    return held, faults


def missing_label(case: str, file: str, expected: str = "") -> Fault:
    """The fault of an image without a label."""
    return fault("missing-partner", case, file, expected or f"a label file for case {case}", "none",
                 "add the label under the same case name, or remove the image")


def missing_image(case: str, file: str, expected: str = "") -> Fault:
    """The fault of a label without an image."""
    return fault("missing-partner", case, file, expected or f"an image file for case {case}", "none",
                 "add the image under the same case name, or remove the label")


def bad_name(case: str, file: object) -> list[Fault]:
    """The fault of a case name that cannot become a file name, if it cannot."""
    problem = name_problem(case)
    return [fault("invalid-case-name", case, file, "a name that can be a file name", problem)] if problem else []


def name_problem(case: str) -> str | None:
    """Why a case name cannot become a file name, or None."""
    if not case.strip():
        return "an empty name"
    if "/" in case or "\\" in case or "\0" in case:
        return f"{case!r} with a slash or null character"
    if case.startswith("."):
        return f"{case!r} with a leading dot"
    if len(case.encode("utf-8", "replace")) > 200:
        return f"a name of {len(case)} characters"
    return None
