"""Check: look at every voxel of a data set once and list everything that is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.datasets.naming import missing_image, missing_label
from autoseg.datasets.read import PHOTOS, distinct_values
from autoseg.errors import AutosegError, DatasetError, GeometryError
from autoseg.files.images import ColourMaskError, NotWholeError, compare_grids, read_image, read_label
from autoseg.logs import SILENT, Reporter
from autoseg.types.dataset import CaseFiles, Dataset, Fault
from autoseg.types.faults import FAULTS, GRID_CODES, fault, sort_faults
from autoseg.types.geometry import NO_DEPTH_MM, Grid
from autoseg.types.labels import Labels

__all__ = ["FAULTS", "check", "require_clean"]

SHOWN = 5  # how many cases or values a fault names


@dataclass(frozen=True)
class _Finding:
    """What one case showed: its faults, its grid, a hash of its voxels and its label values (None where they are faulty)."""

    case: CaseFiles
    faults: tuple[Fault, ...]
    grid: Grid | None = None
    content: str | None = None
    values: frozenset[int] | None = None


def check(dataset: Dataset, faults: Sequence[Fault] = (), threads: int = 2, reporter: Reporter = SILENT) -> list[Fault]:
    """Every fault of a data set, sorted, those found while reading it (`faults`) included.

    Each thread holds one channel or label of one case at a time; `threads` 0 or 1 works without further threads.
    """
    look = partial(_look, dataset)
    findings: list[_Finding] = []
    with reporter.task("check", len(dataset.cases)) as task:
        for finding in _each(look, dataset.cases, threads):
            findings.append(finding)
            task.advance(note=finding.case.case)
    known = {(f.code, f.case) for f in faults if f.code in ("missing-partner", "wrong-channel-count")}
    found = [f for finding in findings for f in finding.faults if (f.code, f.case) not in known]
    return sort_faults([*faults, *found, *_mixed(findings), *_duplicates(findings), *_absent(findings, dataset.labels)])


def describe_faults(faults: Sequence[Fault]) -> str:
    """One paragraph per fault: severity, code, case, file, expected, found, what to do."""
    return "\n".join(
        f"{f.severity} {f.code}: {f'case {f.case}, ' if f.case else ''}{f.file or 'data set'}\n"
        f"    expected: {f.expected}\n    found:    {f.found}\n    to do:    {f.fix}" for f in faults)


def require_clean(faults: Sequence[Fault], source: object = "the data set") -> None:
    """Raise DatasetError that lists every error among `faults`; warnings pass."""
    errors = [f for f in faults if f.severity == "error"]
    if errors:
        raise DatasetError(f"{source} has {len(errors)} error(s); nothing was written\n{describe_faults(errors)}")


def _each(look: partial[_Finding], cases: Sequence[CaseFiles], threads: int) -> Iterable[_Finding]:
    if threads < 2:
        yield from map(look, cases)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(look, cases)


def _look(dataset: Dataset, case: CaseFiles) -> _Finding:
    """Read everything of one case, file after file."""
    faults: list[Fault] = []
    grid: Grid | None = None
    first = ""
    digests: list[str] = []
    channels = 0
    readable = True
    for file in case.images:
        try:
            image = read_image(Path(file))
        except AutosegError as error:
            faults.append(_refused(case.case, file, "a readable image", error))
            readable = False
            continue
        faults += _voxel_faults(case.case, file, image.array_czyx, dataset.channels[channels:])
        channels += image.array_czyx.shape[0]
        digests.append(_digest(image.array_czyx))
        if grid is None:
            grid, first = image.grid, file
        else:
            faults += _grid_faults(case.case, file, grid, image.grid, f"channel file {Path(first).name}", "channel-grids-differ")
    if not case.images:
        faults.append(missing_image(case.case, case.label or ""))
    elif readable and channels != len(dataset.channels):
        expected = f"{len(dataset.channels)} ({', '.join(dataset.channels)})"
        faults.append(fault("wrong-channel-count", case.case, case.images[0], expected,
                            f"{channels} in {len(case.images)} file{'s' if len(case.images) != 1 else ''}"))
    more, values = _label_faults(case, dataset.labels, grid, first)
    content = ":".join(digests) if digests and readable and all(digests) else None
    return _Finding(case, (*faults, *more), grid, content, values)


def _voxel_faults(case: str, file: str, image_czyx: NDArray[np.generic], names: Sequence[str]) -> list[Fault]:
    """NaN, infinite values and constant channels of one file; `names` are the channels from its first one on."""
    faults: list[Fault] = []
    constant: list[tuple[int, Any]] = []
    for c, channel_zyx in enumerate(image_czyx):
        wrong = sum(int((~np.isfinite(plane)).sum()) for plane in channel_zyx) if channel_zyx.dtype.kind in "fc" else 0
        if wrong:
            faults.append(fault("not-finite", case, file, "finite numbers",
                                f"{wrong} of {channel_zyx.size} voxels NaN or infinite{_channel(c, image_czyx, names)}"))
        elif channel_zyx.size and channel_zyx.min() == channel_zyx.max():
            constant.append((c, channel_zyx.flat[0]))
    # one empty colour of a photograph is ordinary, one empty sequence of an MRI is not
    if constant and not (file.lower().endswith(PHOTOS) and len(constant) < len(image_czyx)):
        faults += [fault("constant-image", case, file, "an image with contrast",
                         f"the value {value} in every voxel{_channel(c, image_czyx, names)}") for c, value in constant]
    return faults


def _channel(c: int, image_czyx: NDArray[np.generic], names: Sequence[str]) -> str:
    if len(image_czyx) == 1:
        return ""
    return f" of channel {c}" + (f" ({names[c]})" if c < len(names) else "")


def _digest(image_czyx: NDArray[np.generic]) -> str:
    """A hash of the voxels as float32, so that a copy in another format is recognised; "" for a constant image."""
    if image_czyx.size and image_czyx.min() == image_czyx.max():
        return ""
    state = hashlib.blake2b(str(image_czyx.shape).encode(), digest_size=16)
    for channel_zyx in image_czyx:
        for plane in channel_zyx:
            state.update(np.ascontiguousarray(plane, dtype=np.float32).data)
    return state.hexdigest()


def _grid_faults(case: str, file: str, expected: Grid, found: Grid, reference: str, code: str = "") -> list[Fault]:
    """How a grid differs from that of `reference`, one fault per field; rounding noise is one warning."""
    faults = []
    noise = []
    for difference in compare_grids(expected, found):
        if difference.noise:
            noise.append(difference)
        else:
            field = difference.field
            faults.append(fault(code or GRID_CODES[field], case, file, f"{field} zyx {difference.expected}, as in {reference}",
                                f"{field} zyx {difference.found}"))
    if noise and not faults:
        faults.append(fault("header-rounding", case, file,
                            ", ".join(f"{d.field} zyx {d.expected}" for d in noise) + f", as in {reference}",
                            ", ".join(f"{d.field} zyx {d.found}" for d in noise)))
    return faults


def _label_faults(case: CaseFiles, labels: Labels, grid: Grid | None, image: str) -> tuple[list[Fault], frozenset[int] | None]:
    """The faults of a case's label file, and the values it holds if these are right."""
    if case.label is None:
        return [missing_label(case.case, case.images[0] if case.images else "")], None
    try:
        label_zyx, label_grid = read_label(Path(case.label))
    except AutosegError as error:
        return [_refused(case.case, case.label, "a label map with one whole number per voxel", error)], None
    faults = _grid_faults(case.case, case.label, grid, label_grid, Path(image).name) if grid is not None else []
    values = distinct_values(label_zyx)
    strange = sorted(values - set(labels.values))
    ignore = {labels.ignore.value} if labels.ignore else set()
    if strange:
        shown = _some(strange)
        declared = ", ".join(map(str, sorted(labels.values)[:40])) + (", ..." if len(labels.values) > 40 else "")
        faults.append(fault("undeclared-label-values", case.case, case.label, f"only the declared values {declared}", shown))
        return faults, None
    if values <= {labels.background.value, *ignore}:
        faults.append(fault("empty-label", case.case, case.label, "at least one voxel of a foreground label",
                            f"only {', '.join(map(str, sorted(values)))}"))
        return faults, None
    besides = [label for label in labels.foreground
               if case.labelled is not None and label.name not in case.labelled and label.value in values]
    if besides:
        faults.append(fault("unannotated-label", case.case, case.label, f"only the labels {', '.join(case.labelled or ())}",
                            ", ".join(f"{label.value} ({label.name})" for label in besides)))
    return faults, values


def _some(items: Sequence[object]) -> str:
    """The first few items, and how many more there are."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more


def _refused(case: str, file: str, expected: str, error: AutosegError) -> Fault:
    """The fault of a file that its reader refuses, by the kind of error."""
    codes: dict[type[AutosegError], str] = {
        ColourMaskError: "rgb-mask", NotWholeError: "non-integer-labels", GeometryError: "unusable-geometry",
    }
    text = str(error).removeprefix(file).lstrip(": ")
    found, _, advice = text.rpartition("; ")  # readers end with what to do
    return fault(codes.get(type(error), "unreadable-file"), case, file, expected, (found or text)[:400], advice if found else "")


def _mixed(findings: Iterable[_Finding]) -> list[Fault]:
    """Faults for the cases whose dimension is the rarer one."""
    flat = {f.case.case: f.grid.shape[0] == 1 and f.grid.spacing[0] >= NO_DEPTH_MM for f in findings if f.grid is not None}
    if len(set(flat.values())) < 2:
        return []
    mostly_flat = 2 * sum(flat.values()) > len(flat)
    names = {True: "a 2D image", False: "a 3D volume"}
    return [fault("mixed-dimensions", f.case.case, f.case.images[0], f"{names[mostly_flat]}, as the other cases have",
                  f"{names[not mostly_flat]} of shape {f.grid.shape}")
            for f in findings if f.grid is not None and flat[f.case.case] != mostly_flat]


def _duplicates(findings: Iterable[_Finding]) -> list[Fault]:
    first: dict[str, CaseFiles] = {}
    faults = []
    for finding in findings:
        if finding.content is None:
            continue
        twin = first.setdefault(finding.content, finding.case)
        if twin is not finding.case:
            faults.append(fault("duplicate-image", finding.case.case, finding.case.images[0], "an image that no other case has",
                                f"the same voxels as case {twin.case} ({Path(twin.images[0]).name})"))
    return faults


def _absent(findings: Iterable[_Finding], labels: Labels) -> list[Fault]:
    """One warning per declared label that some cases lack, under the first of them."""
    held = [f for f in findings if f.values is not None]
    faults = []
    for label in labels.foreground:
        wanted = [f for f in held if f.case.labelled is None or label.name in f.case.labelled]
        without = [f.case for f in wanted if label.value not in (f.values or ())]
        if held and not wanted:
            expected = f"label {label.value} ({label.name}) annotated in some case"
            faults.append(fault("absent-label", held[0].case.case, "", expected, "annotated in none",
                                "annotate it in some cases, or do not declare it"))
        if not without:
            continue
        where = "every case" if len(wanted) == len(held) else "every case in which it is annotated"
        expected = f"label {label.value} ({label.name}) in {where}"
        faults.append(fault("absent-label", without[0].case, without[0].label or "", expected,
                            f"absent from {len(without)} of {len(wanted)} cases: {_some([c.case for c in without])}"))
    return faults
