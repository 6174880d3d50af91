"""Left and right: labels that are mirror images of one another, and the axis that must not be flipped because of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint

AXES = ("z", "y", "x")
LEFT_RIGHT_AXIS = 2  # x in LPS, and the usual one of images as stored
SIDES = (("left", "right"), ("l", "r"), ("lh", "rh"), ("lt", "rt"), ("sin", "dex"), ("sin", "dx"), ("sn", "dx"),
         ("sinister", "dexter"), ("sinistra", "dextra"), ("sinistrum", "dextrum"), ("links", "rechts"), ("gauche", "droite"))
HEART = frozenset({"ventricle", "ventricles", "ventricular", "ventriculus", "atrium", "atria", "atrial", "heart", "cardiac",
                   "myocardium", "myocardial"})
BRAIN = frozenset({"lateral", "inferior", "horn", "brain", "cerebral", "temporal", "occipital", "frontal"})
GLUED = 3  # letters beside left or right in one word that make it a name: not bright
MOST_UNLIKE = 3.0  # mirror images differ less in median volume; a liver's lobes differ more
MOST_UNLIKE_HEART = 1.5  # where names leave it open, twins must be this alike,
MOST_OBLIQUE = 0.25  # and level with one another: offset along the other axes as a share of the distance
LEAST_SEPARATION = 1.0  # voxels between the centres, below which a case says nothing about sides
TURNED_IN_PLANE = 3  # longest edge over the first one, above which 3D patches are turned in the plane only (nnU-Net)
NAMED = 5  # cases that a text lists


@dataclass(frozen=True)
class LeftRight:
    """Pairs (left, right) of label names, and the axis (0 to 2 for z, y, x, in the plan's orientation, before the transpose)
    along which they lie; `confirmed` when that was measured and all cases agree; `text` is one sentence for the plan."""

    axis: int
    pairs: tuple[tuple[str, str], ...]
    confirmed: bool
    text: str


@dataclass(frozen=True)
class _Measured:
    """From right to left in mm (cases, 3), with the cases and their voxel sizes, and the median ratio of volumes."""

    cases: tuple[str, ...]
    offsets_zyx_mm: NDArray[np.float64]
    spacings_zyx_mm: NDArray[np.float64]
    volume_ratio: float

    @property
    def axis(self) -> int:
        return int(np.argmax(np.median(np.abs(self.offsets_zyx_mm), axis=0)))


def left_right(dataset: Dataset, fingerprint: Fingerprint) -> LeftRight | None:
    """Return the left/right pairs among the labels and the axis that tells them apart; None where there is no such pair.

    Names propose pairs; centres and volumes drop those that are no mirror images (heart chambers, lobes of unlike size).
    Without centres in the fingerprint names alone decide, and the axis is x.
    """
    pairs = pairs_by_name([label.name for label in dataset.labels.foreground])
    measured = {pair: found for pair in pairs if (found := _measure(pair, fingerprint.cases)) is not None}
    pairs = [pair for pair in pairs if _mirror_images(pair, measured.get(pair))]
    if not pairs:
        return None
    seen = {pair: measured[pair] for pair in pairs if pair in measured}
    count = len(pairs)
    what = (f"{' and '.join(pairs[0])} are" if count == 1
            else f"{count} pairs of labels, such as {' and '.join(pairs[0])}, are") + " left and right of one another"
    if not seen:
        stored = " of the images as stored, taken to run from left to right" if dataset.source == "fingerprint" else ""
        return LeftRight(LEFT_RIGHT_AXIS, tuple(pairs), False, (
            f"{what} by name only (their places were not measured), so images are not mirrored along x{stored}"))
    axis, sides = _sides(seen)
    swapped = sorted(case for case, side in sides.items() if side < 0)
    told = f"images are not mirrored along {AXES[axis]}"
    if not sides:
        return LeftRight(axis, tuple(pairs), False, f"{what} by name, but their centres coincide, so {told} to be safe")
    if swapped:
        listed = ", ".join(swapped[:NAMED]) + (f" and {len(swapped) - NAMED} more" if len(swapped) > NAMED else "")
        return LeftRight(axis, tuple(pairs), False, (
            f"warning: {what} by name, but their sides look swapped in {len(swapped)} of {len(sides)} cases ({listed}): "
            f"check these label files and the headers; {told}"))
    agreed = "the only case" if len(sides) == 1 else f"all {len(sides)} cases"
    return LeftRight(axis, tuple(pairs), True, f"{what}, along {AXES[axis]} in {agreed} that show both, so {told}")


def mirror_axes(found: LeftRight | None, transpose_forward: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...] | None:
    """Return the axes of a 2D or 3D patch (after the transpose) that may be flipped, None for all of them.

    In the plane of a 2D patch, or of a thin 3D one, training turns images all the way round, and a half turn of an image that
    was flipped along one axis is that image flipped along the other; so there neither axis is flipped.
    """
    if found is None:
        return None
    dims = len(patch_size)
    own = list(transpose_forward).index(found.axis) - (3 - dims)
    turned = dims == 2 or max(patch_size) / patch_size[0] > TURNED_IN_PLANE
    plane = range(dims - 2, dims)
    if own < 0:
        return None  # slices do not cross the midline
    return tuple(axis for axis in range(dims) if axis != own and not (turned and own in plane and axis in plane))


def pairs_by_name(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return (left, right) for names that are equal but for one word for the side, whatever their case and separators.

    A single letter counts only where a word is left beside it (kidney_L; not L1, a vertebra) or as the whole name.
    """
    by_words: Mapping[tuple[str, ...], str] = {_words(name): name for name in reversed(names)}
    pairs = []
    for name in names:
        mirrored = next((by_words[other] for other in _mirrored(_words(name)) if other in by_words), None)
        if mirrored is not None and mirrored != name:
            pairs.append((name, mirrored))
    return pairs


def _words(name: str) -> tuple[str, ...]:
    """Lower-case words and numbers of a name, a capital inside starting a new word: LeftKidney, but not LV."""
    return tuple(word.casefold() for word in re.findall(r"[^\W\d_]+|\d+", _spaced(name)))


def _spaced(name: str) -> str:
    starts = [i for i in range(1, len(name)) if name[i].isupper() and (name[i - 1].islower() or name[i + 1 : i + 2].islower())]
    return " ".join(name[a:b] for a, b in pairwise([0, *starts, len(name)]))


def _mirrored(words: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What the name would be on the right, for each word of it that says left."""
    found = []
    for i, word in enumerate(words):
        rest = words[:i] + words[i + 1 :]
        for left, right in SIDES:
            if word == left and (len(left) > 1 or not rest or any(other.isalpha() for other in rest)):
                found.append((*words[:i], right, *words[i + 1 :]))
        if len(word) >= len("left") + GLUED and (word.startswith("left") or word.endswith("left")):  # leftkidney, kidneyleft
            turned = "right" + word[4:] if word.startswith("left") else word[:-4] + "right"
            found.append((*words[:i], turned, *words[i + 1 :]))
    return found


def _measure(pair: tuple[str, str], cases: Sequence[CaseFingerprint]) -> _Measured | None:
    """What the cases that hold both labels say; None when there is none."""
    names, offsets, spacings, ratios = [], [], [], []
    for case in cases:
        left, right = case.labels.get(pair[0]), case.labels.get(pair[1])
        if left is None or right is None or left.centre is None or right.centre is None or not (left.voxels and right.voxels):
            continue
        ends = zip(left.centre, right.centre, case.shape, case.spacing, strict=True)
        names.append(case.case)
        offsets.append([(a - b) * edge * mm for a, b, edge, mm in ends])
        spacings.append(case.spacing)
        ratios.append(left.voxels / right.voxels)
    if not names:
        return None
    return _Measured(tuple(names), np.array(offsets, np.float64), np.array(spacings, np.float64), float(np.median(ratios)))


def _mirror_images(pair: tuple[str, str], measured: _Measured | None) -> bool:
    """Whether two labels of one name but for the side are mirror images, by volume, and by position where names leave it open."""
    words = set(_words(pair[0]))
    chambers = bool(words & HEART) and not words & BRAIN
    if measured is None:
        return not chambers
    unlike = abs(math.log(measured.volume_ratio))
    if not chambers:
        return unlike <= math.log(MOST_UNLIKE)
    apart = np.abs(np.median(np.abs(measured.offsets_zyx_mm), axis=0))
    across = float(np.delete(apart, measured.axis).max())
    return unlike <= math.log(MOST_UNLIKE_HEART) and across <= MOST_OBLIQUE * float(apart[measured.axis])


def _sides(measured: Mapping[tuple[str, str], _Measured]) -> tuple[int, dict[str, int]]:
    """The axis that most pairs lie along, and per case 1, or -1 where the sides are against those of most cases."""
    votes = np.bincount([pair.axis for pair in measured.values()], minlength=3)
    axis = 2 - int(np.argmax(votes[::-1]))  # x before y before z where they are level
    balance: dict[str, int] = {}
    for pair in measured.values():
        apart = (pair.offsets_zyx_mm[:, axis] / pair.spacings_zyx_mm[:, axis]).tolist()
        for case, voxels in zip(pair.cases, apart, strict=True):
            if abs(voxels) >= LEAST_SEPARATION:
                balance[case] = balance.get(case, 0) + (1 if voxels > 0 else -1)
    signs = {case: 1 if count > 0 else -1 for case, count in balance.items() if count}
    usual = 1 if sum(signs.values()) >= 0 else -1
    return axis, {case: sign * usual for case, sign in signs.items()}
