"""What was measured of a data set before anything is decided."""

from __future__ import annotations

from typing import Literal

from autoseg.types.geometry import Shape, Vector
from autoseg.types.record import Record


class Intensities(Record):
    """Statistics of a sample of voxels, in the image's own units (HU for CT)."""

    mean: float
    median: float
    std: float
    min: float
    max: float
    percentile_99_5: float
    percentile_00_5: float


class LabelFingerprint(Record):
    """What a case holds of one label: volume, connected components, mean and std intensity per channel."""

    voxels: int
    volume_ml: float
    components: int
    mean_intensity: tuple[float, ...]
    std_intensity: tuple[float, ...]
    centre: Vector | None = None  # centroid as a share of the image's extent (0 to 1), z, y, x


class CaseFingerprint(Record):
    """One case, in the plan's orientation and before any transpose: axis order z, y, x."""

    case: str
    shape: Shape
    shape_after_crop: Shape
    spacing: Vector
    relative_size_after_crop: float
    labels: dict[str, LabelFingerprint] = {}
    content: str = ""


class Fingerprint(Record):
    """The whole data set: per-case geometry, pooled foreground intensities per channel, and what is present of each label."""

    format: Literal[1] = 1
    cases: tuple[CaseFingerprint, ...]
    intensities: tuple[Intensities, ...]
    median_relative_size_after_cropping: float
    channel_kinds: tuple[str, ...] = ()
