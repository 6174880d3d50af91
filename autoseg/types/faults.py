"""Every kind of fault a data set can have: one table of codes, severities and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from autoseg.types.dataset import Fault


@dataclass(frozen=True)
class FaultKind:
    """What a fault code means, how bad it is, and what to do about it unless the fault itself says something better."""

    severity: Literal["error", "warning"]
    meaning: str
    fix: str


_SAME_GRID = "if both hold the same voxels, copy the image's geometry into the label; else export the label on the image's grid"

FAULTS: dict[str, FaultKind] = {
    "missing-partner": FaultKind(
        "error", "an image has no label, a label has no image, or a listed file does not exist",
        "add the missing file under the same case name, or remove its partner"),
    "unreadable-file": FaultKind(
        "error", "a file is truncated, damaged or not of the kind its ending says", "copy or export the file again"),
    "unusable-geometry": FaultKind(
        "error", "a header gives a spacing or direction that no grid can have", "correct the header, or export the file again"),
    "invalid-description": FaultKind(
        "error", "the description of the data set (dataset.json, manifest) contradicts itself", "correct the entry named here"),
    "invalid-case-name": FaultKind(
        "error", "a case name cannot be used as a file name", "rename the case; leave out slashes and leading dots"),
    "colliding-case-names": FaultKind(
        "error", "several files claim the same case and channel", "keep one of the files, or rename the other"),
    "mixed-naming": FaultKind(
        "error", "some images have a channel suffix (_0000) and some have none",
        "give every image a channel suffix, or none of them"),
    "mixed-dimensions": FaultKind(
        "error", "the data set mixes 2D images and 3D volumes", "split it into a 2D and a 3D data set"),
    "wrong-channel-count": FaultKind(
        "error", "a case has more or fewer channels than the data set", "add the missing channel, or remove the extra one"),
    "channel-grids-differ": FaultKind(
        "error", "the channels of a case do not lie on one voxel grid",
        "resample the channel onto the grid of the first channel"),
    "shape-mismatch": FaultKind(
        "error", "label and image have different shapes", "export the label on the grid of its image"),
    "spacing-mismatch": FaultKind(
        "error", "label and image have different spacings", _SAME_GRID),
    "origin-mismatch": FaultKind(
        "error", "label and image have different origins", _SAME_GRID),
    "direction-mismatch": FaultKind(
        "error", "label and image have different directions", _SAME_GRID),
    "undeclared-label-values": FaultKind(
        "error", "a label file holds values that are not declared", "declare the values, or correct the label file"),
    "non-integer-labels": FaultKind(
        "error", "a label file holds values that are not whole numbers",
        "export the label again without interpolation; probabilities need a threshold first"),
    "rgb-mask": FaultKind(
        "error", "a label file has colour channels instead of one value per voxel",
        "save the label with one integer per voxel (grey, not colour)"),
    "empty-label": FaultKind(
        "error", "a label file holds no foreground at all", "segment the case, or leave it out"),
    "too-many-labels": FaultKind(
        "error", "the label files hold more distinct values than a label map would",
        "check that the label folder holds label maps and not images; declare the labels in dataset.json"),
    "not-finite": FaultKind(
        "error", "an image holds NaN or infinite values", "replace them with the value of the background, for example 0"),
    "constant-image": FaultKind(
        "error", "an image has the same value everywhere", "export the image again, or leave the case out"),
    "header-rounding": FaultKind(
        "warning", "headers differ by rounding noise only", "nothing to do: the geometry of the image is used"),
    "absent-label": FaultKind(
        "warning", "a declared label does not occur in some cases", "nothing to do if that is true of the anatomy"),
    "unannotated-label": FaultKind(
        "warning", "a label file holds a label that is not among those declared as annotated in its case (`labelled`)",
        "name the label in `labelled` if it is annotated completely; else nothing to do: training takes such voxels for "
        "background or any label that is not annotated there"),
    "duplicate-image": FaultKind(
        "warning", "the same image is there under two names",
        "remove one of the two, or give both the same group so that they share a fold"),
    "lossy-label": FaultKind(
        "warning", "a label is stored with lossy compression (JPEG), which changes values at edges",
        "save the label as PNG or NIfTI from its source"),
}

GRID_CODES = {
    "shape": "shape-mismatch", "spacing": "spacing-mismatch", "origin": "origin-mismatch", "direction": "direction-mismatch",
}


def fault(code: str, case: str, file: object, expected: str, found: str, fix: str = "") -> Fault:
    """A fault with the severity, and unless given the advice, of its kind in the table."""
    kind = FAULTS[code]
    return Fault(code=code, severity=kind.severity, case=case, file=str(file), expected=expected, found=found,
                 fix=fix or kind.fix)


def sort_faults(faults: Iterable[Fault]) -> list[Fault]:
    """Errors first, then by case, code and file; equal faults are kept once."""
    return sorted(dict.fromkeys(faults), key=lambda f: (f.severity != "error", f.case, f.code, f.file))


def fault_table_markdown() -> str:
    """The table of fault codes as Markdown, for the README."""
    rows = [f"| `{code}` | {kind.severity} | {kind.meaning} | {kind.fix} |" for code, kind in FAULTS.items()]
    return "\n".join(["| code | severity | meaning | what to do |", "|---|---|---|---|", *rows]) + "\n"
