"""Intensity normalisation, by the names that plans use (nnU-Net's schemes)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.types.fingerprint import Intensities

STD_FLOOR = 1e-8  # nnU-Net

Scheme = Callable[[NDArray[np.float32], "NDArray[np.bool_] | None", "Intensities | None"], None]


def _z_score(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None, statistics: Intensities | None) -> None:
    values = channel if mask is None else channel[mask]
    if not values.size:
        return
    mean, std = np.float32(values.mean(dtype=np.float64)), np.float32(max(float(values.std(dtype=np.float64)), STD_FLOOR))
    if mask is None:
        channel -= mean
        channel /= std
    else:
        channel[mask] = (values - mean) / std


def _ct(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None, statistics: Intensities | None) -> None:
    if statistics is None:
        raise ValueError("CTNormalization needs the foreground intensities of the data set; the plan has none for this channel")
    np.clip(channel, statistics.percentile_00_5, statistics.percentile_99_5, out=channel)
    channel -= np.float32(statistics.mean)
    channel /= np.float32(max(statistics.std, STD_FLOOR))


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
    image_czyx: NDArray[np.float32], mask_zyx: NDArray[np.bool_], schemes: Sequence[str], use_mask: Sequence[bool],
    intensities: Sequence[Intensities],
) -> None:
    """Normalise each channel in place by its scheme.

    With its mask flag a z-score uses the voxels of `mask_zyx` (the filled nonzero mask) and leaves the others as they are;
    the other schemes treat the whole image. `intensities` are the data set's foreground statistics per channel, for CT.
    Raises ValueError when the number of channels or the value range does not suit the schemes.
    """
    if len(image_czyx) != len(schemes):
        raise ValueError(f"expected {len(schemes)} channels, found {len(image_czyx)}")
    for index, (channel, scheme, masked) in enumerate(zip(image_czyx, schemes, use_mask, strict=True)):
        _SCHEMES[scheme](channel, mask_zyx if masked else None, intensities[index] if index < len(intensities) else None)
