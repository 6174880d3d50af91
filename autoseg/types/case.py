"""Images in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.types.geometry import AxisMap, Grid, Shape, Vector


@dataclass(frozen=True)
class Image:
    """An image as read: array (channel, z, y, x) on its grid, and the file ending it came with (".nii.gz")."""

    array_czyx: NDArray[np.generic]
    grid: Grid
    ending: str


@dataclass(frozen=True)
class Placement:
    """How a preprocessed array lies in the image it was made from; all that restoring needs.

    stored grid --axis_map--> oriented --transpose--> transposed --crop box--> cropped --resample--> `shape`.
    `crop_zyx` are half-open slices bounds on the transposed array; spacings are z, y, x after the transpose.
    """

    stored: Grid
    axis_map: AxisMap
    transpose: tuple[int, int, int]
    crop_zyx: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    cropped_spacing_zyx_mm: Vector
    shape: Shape
    spacing_zyx_mm: Vector

    @property
    def cropped_shape(self) -> Shape:
        """Shape of the cropped array before resampling."""
        (a, b), (c, d), (e, f) = self.crop_zyx
        return (b - a, d - c, f - e)


@dataclass(frozen=True)
class Preprocessed:
    """A case ready for the network: float32 image, int16 inside labels (-1 outside the nonzero mask), and its placement.

    `previous` is the case made ready for the network of the previous stage, where the network takes its segmentation as input.
    """

    image_czyx: NDArray[np.float32]
    label_zyx: NDArray[np.int16] | None
    placement: Placement
    previous: Preprocessed | None = None
