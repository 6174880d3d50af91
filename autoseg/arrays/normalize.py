"""Intensity normalisation, by the names that plans use (nnU-Net's schemes)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.types.fingerprint import Intensities

STD_FLOOR = 1e-8  # nnU-Net
_BLOCK = 1 << 18  # voxels reckoned in float64 at once

Scheme = Callable[[NDArray[np.float32], "NDArray[np.bool_] | None", "Intensities | None"], None]


def _blocks(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> Iterator[NDArray[np.float32]]:
    """Yield the channel's voxels, or copies of those in the mask, in parts small enough for temporary arrays."""
    rows = max(1, _BLOCK // max(1, channel[0].size))
    for start in range(0, len(channel), rows):
        part = channel[start:start + rows]
        yield part if mask is None else part[mask[start:start + rows]]


def _mean_and_deviation(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> tuple[np.float32, np.float32] | None:
    """Return mean and standard deviation, reckoned in float64; None where there are no voxels."""
    count = channel.size if mask is None else int(np.count_nonzero(mask))
    if not count:
        return None
    mean = sum(float(part.sum(dtype=np.float64)) for part in _blocks(channel, mask)) / count
    squares = 0.0
    for part in _blocks(channel, mask):
        off = np.subtract(part, mean, dtype=np.float64).reshape(-1)
        squares += float(off @ off)
    return np.float32(mean), np.float32(max((squares / count) ** 0.5, STD_FLOOR))


def _z_score(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None, statistics: Intensities | None) -> None:
    found = _mean_and_deviation(channel, mask)
    if found is None:
        return
    mean, std = found
    for plane, inside in zip(channel, itertools.repeat(True) if mask is None else mask, strict=False):
        np.subtract(plane, mean, out=plane, where=inside)
        np.divide(plane, std, out=plane, where=inside)


def _ct(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None, statistics: Intensities | None) -> None:
    if statistics is None:
        raise ValueError("CTNormalization needs the foreground intensities of the data set; the plan has none for this channel")
    mean, std = np.float32(statistics.mean), np.float32(max(statistics.std, STD_FLOOR))
    for plane in channel:
        np.clip(plane, statistics.percentile_00_5, statistics.percentile_99_5, out=plane)
        plane -= mean
        plane /= std


def _none(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None, statistics: Intensities | None) -> None:
    return


def _rescale_to_01(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None, statistics: Intensities | None) -> None:
    channel -= channel.min()
    channel /= np.float32(max(float(channel.max()), STD_FLOOR))


def _rgb_to_01(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None, statistics: Intensities | None) -> None:
    low, high = float(channel.min()), float(channel.max())
    if low < 0 or high > 255:
        raise ValueError(f"RGBTo01Normalization expects values from 0 to 255, found {low:g} to {high:g}")
    channel /= np.float32(255)


_SCHEMES: dict[str, Scheme] = {
    "ZScoreNormalization": _z_score,
    "CTNormalization": _ct,
    "NoNormalization": _none,
    "RescaleTo01Normalization": _rescale_to_01,
    "RGBTo01Normalization": _rgb_to_01,
}


def normalize(
    image_czyx: NDArray[np.float32], mask_zyx: NDArray[np.bool_] | None, schemes: Sequence[str], use_mask: Sequence[bool],
    intensities: Sequence[Intensities],
) -> None:
    """Normalise each channel in place by its scheme.

    With its mask flag a z-score uses the voxels of `mask_zyx` (the filled nonzero mask; None where it holds every voxel) and
    leaves the others as they are; the other schemes treat the whole image. `intensities` are the data set's foreground
    statistics per channel, for CT.
    Raises ValueError when the number of channels or the value range does not suit the schemes.
    """
    if len(image_czyx) != len(schemes):
        raise ValueError(f"expected {len(schemes)} channels, found {len(image_czyx)}")
    for index, (channel, scheme, masked) in enumerate(zip(image_czyx, schemes, use_mask, strict=True)):
        _SCHEMES[scheme](channel, mask_zyx if masked else None, intensities[index] if index < len(intensities) else None)
