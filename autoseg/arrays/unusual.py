"""Numbers that describe a case and its prediction, and which of them lie outside what the training cases had."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.types.case import Image
from autoseg.types.geometry import NO_DEPTH_MM, Grid
from autoseg.types.labels import Labels
from autoseg.types.plan import Configuration, Plan
from autoseg.types.trust import CaseNumbers, Number, Spread, TrainingCases

RARE = 0.001  # probability that a case like the training cases lies beyond a limit
TOLERANCE = 0.01  # of a value: what spacings and sizes may differ by when all training cases have the same
FOUND_IN = 10  # training cases that all must have a structure before its absence is unusual
LOOKED_AT = 500_000  # voxels of an image that intensities are taken from
COUNTED = 1 << 20  # voxels of a mask that are counted at a time
_AXES = ("z", "y", "x")
_CODES = (("I", "S"), ("A", "P"), ("R", "L"))  # what an axis runs towards when flipped and when not, by world axis z, y, x


def describe_image(image: Image, plan: Plan, configuration: Configuration) -> CaseNumbers:
    """Spacing, field of view, tilt, and the intensities of voxels that are not zero, as far as they matter to the network.

    Intensities that are standardised case by case are described by the shape of their distribution only. The orientation is told
    where images are taken as they are stored.
    """
    grid = image.grid
    oriented = grid.mapped(grid.to_lps()) if plan.orientation == "LPS" else grid
    numbers: dict[str, Number] = {}
    for axis, name in enumerate(_AXES):
        spacing, size = oriented.spacing[axis], oriented.shape[axis]
        if spacing < NO_DEPTH_MM:
            numbers[f"spacing {name}"] = Number(value=spacing, unit="mm", log=True)
            numbers[f"field of view {name}"] = Number(value=spacing * size, unit="mm", log=True)
    if grid.has_direction:
        numbers["tilt"] = Number(value=_tilt(grid), unit="degrees", slack=2.0)
    for index, (name, channel) in enumerate(zip(plan.channels, image.array_czyx, strict=True)):
        relative = configuration.normalization[index] in ("ZScoreNormalization", "RescaleTo01Normalization")
        numbers |= {f"{name} {key}": number for key, number in _intensities(channel, relative).items()}
    code = orientation(grid) if plan.orientation != "LPS" and grid.has_direction else ""
    return CaseNumbers(numbers=numbers, orientation=code)


def orientation(grid: Grid) -> str:
    """Where the axes x, y, z run to, as three letters such as LPS."""
    axis_map = grid.to_lps()
    letters = {axis_map.axes[world]: _CODES[world][0 if axis_map.flips[world] else 1] for world in range(3)}
    return "".join(letters[axis] for axis in (2, 1, 0))


def _tilt(grid: Grid) -> float:
    """The largest angle between an axis of the image and the world axis nearest to it, degrees."""
    cosines = np.abs(np.asarray(grid.mapped(grid.to_lps()).direction)).diagonal()
    return float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1)))) if cosines.min() < 1 - 1e-6 else 0.0


def _intensities(channel_zyx: NDArray[np.generic], relative: bool) -> dict[str, Number]:
    flat = channel_zyx.reshape(-1)
    values = flat[::max(1, flat.size // LOOKED_AT)].astype(np.float64)
    shares = {"share of zeros": Number(value=float((values == 0).mean()), slack=0.05)}
    values = values[values != 0]
    if not values.size:
        return shares
    low, middle, high = np.percentile(values, (1, 50, 99))
    mean, deviation = float(values.mean()), float(values.std())
    if relative:
        scale = max(deviation, 1e-12)
        named = {"1st percentile": low, "median": middle, "99th percentile": high}
        unit = "standard deviations"
        return shares | {name: Number(value=(float(v) - mean) / scale, unit=unit, slack=0.1) for name, v in named.items()}
    return shares | {
        "mean": Number(value=mean), "standard deviation": Number(value=deviation), "1st percentile": Number(value=float(low)),
        "99th percentile": Number(value=float(high)),
    }


def voxel_counts(label_zyx: NDArray[np.integer]) -> dict[int, int]:
    """How many voxels hold each value that occurs; few at a time, because sorting all would take a multiple of the mask."""
    if label_zyx.dtype not in (np.uint8, np.uint16):
        values, counts = np.unique(label_zyx, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))
    found = np.zeros(np.iinfo(label_zyx.dtype).max + 1, np.int64)
    rows = max(1, COUNTED // max(1, label_zyx.shape[2]))
    for plane in label_zyx:
        for first in range(0, len(plane), rows):
            found += np.bincount(plane[first:first + rows].ravel(), minlength=len(found))
    return {int(value): int(found[value]) for value in np.flatnonzero(found)}


def describe_mask(label_zyx: NDArray[np.integer], grid: Grid, labels: Labels) -> CaseNumbers:
    """Volumes of a prediction's labels (disk values), ml; in a picture without size, voxels."""
    voxels = voxel_counts(label_zyx)
    found = [label for label in labels.foreground if voxels.get(label.value)]
    return CaseNumbers(
        numbers={
            f"volume of {one.name}": Number(value=voxels[one.value] * grid.voxel_volume_ml, unit="ml", log=True) for one in found
        },
        found=tuple(label.name for label in found),
    )


def gather(cases: Sequence[CaseNumbers]) -> TrainingCases:
    """The range and spread of every number over the training cases."""
    names = dict.fromkeys(name for case in cases for name in case.numbers)
    orientations = [case.orientation for case in cases if case.orientation]
    structures = [name for case in cases for name in case.found]
    return TrainingCases(
        cases=len(cases), numbers={name: _spread([c.numbers[name] for c in cases if name in c.numbers]) for name in names},
        orientations={code: orientations.count(code) for code in dict.fromkeys(orientations)},
        found={name: structures.count(name) for name in dict.fromkeys(structures)},
    )


def _spread(numbers: Sequence[Number]) -> Spread:
    values = np.array([number.value for number in numbers])
    log = numbers[0].log and bool((values > 0).all())
    scaled = np.log(values) if log else values
    return Spread(
        low=float(values.min()), high=float(values.max()), mean=float(scaled.mean()),
        deviation=float(scaled.std(ddof=1)) if len(values) > 1 else 0.0, cases=len(values), log=log, unit=numbers[0].unit,
        slack=numbers[0].slack,
    )


def is_outside(value: float, spread: Spread) -> bool:
    """Whether a value is both outside the training cases' range and rarer than `RARE` for a normal variable like theirs.

    The limit of rarity is that of a prediction interval (Student's t), so that few training cases flag little.
    """
    from scipy import stats

    slack = max(spread.slack, TOLERANCE * max(abs(spread.low), abs(spread.high)))
    if spread.low - slack <= value <= spread.high + slack or spread.cases < 2:
        return False
    if spread.log and value <= 0:
        return True
    scaled = math.log(value) if spread.log else value
    limit = stats.t.ppf(1 - RARE / 2, spread.cases - 1) * spread.deviation * math.sqrt(1 + 1 / spread.cases)
    return bool(abs(scaled - spread.mean) > limit)


def unusual(case: CaseNumbers, training: TrainingCases) -> list[str]:
    """Everything in which a case differs from the training cases, each in words with its number and their range."""
    lines = []
    for name, number in case.numbers.items():
        spread = training.numbers.get(name)
        if spread is not None and is_outside(number.value, spread):
            unit = f" {number.unit}" if number.unit else ""
            lines.append(
                f"{name} {number.value:.4g}{unit} is outside {spread.low:.4g} to {spread.high:.4g}{unit} "
                f"of {spread.cases} training cases"
            )
    if case.orientation and training.orientations and case.orientation not in training.orientations:
        known = ", ".join(f"{code} {count}" for code, count in training.orientations.items())
        lines.append(f"orientation {case.orientation} occurs in no training case ({known})")
    for name, count in training.found.items():
        if name not in case.found and count == training.cases >= FOUND_IN:
            lines.append(f"no {name} found, which all {count} training cases have")
    return lines


def combined(*parts: CaseNumbers) -> CaseNumbers:
    """Image and prediction of a case together."""
    numbers: dict[str, Number] = {}
    for part in parts:
        numbers.update(part.numbers)
    return CaseNumbers(
        numbers=numbers, orientation=next((p.orientation for p in parts if p.orientation), ""),
        found=tuple(name for p in parts for name in p.found),
    )

