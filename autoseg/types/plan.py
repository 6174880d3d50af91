"""The plan: every number that preprocessing, the network and prediction need."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from autoseg.types.fingerprint import Intensities
from autoseg.types.labels import Labels
from autoseg.types.record import Record, Spec

Ints = tuple[int, ...]
Floats = tuple[float, ...]

NORMALIZATIONS = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)


class Configuration(Record):
    """One way to segment the data: axis order z, y, x after the plan's transpose; a 2D configuration has two axes."""

    patch_size: Ints
    batch_size: int = Field(ge=1)
    spacing: Floats
    median_shape: Floats
    network: Spec = Spec(kind="unet")
    strides: tuple[Ints, ...]
    kernel_sizes: tuple[Ints, ...]
    features_per_stage: Ints
    blocks_per_stage: Ints
    decoder_blocks_per_stage: Ints
    batch_dice: bool
    normalization: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    next_stage: str | None = None
    previous_stage: str | None = None
    inherits_from: str | None = None

    @field_validator("patch_size", "features_per_stage", "blocks_per_stage", "decoder_blocks_per_stage")
    @classmethod
    def _counts(cls, value: Ints) -> Ints:
        if not value or min(value) < 1:
            raise ValueError(f"must hold positive whole numbers, found {value}")
        return value

    @field_validator("spacing")
    @classmethod
    def _spacing(cls, value: Floats) -> Floats:
        if not value or min(value) <= 0:
            raise ValueError(f"must be positive millimetres, found {value}")
        return value

    @field_validator("normalization")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in NORMALIZATIONS:
                raise ValueError(f"unknown normalization {name!r}; choose from {', '.join(NORMALIZATIONS)}")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Configuration:
        dims, stages = len(self.patch_size), len(self.strides)
        if dims not in (2, 3):
            raise ValueError(f"patch_size must have 2 or 3 axes, found {self.patch_size}")
        for name in ("spacing", "median_shape"):
            if len(getattr(self, name)) != dims:
                raise ValueError(f"{name} must have {dims} axes like patch_size {self.patch_size}, found {getattr(self, name)}")
        for name in ("strides", "kernel_sizes"):
            rows = getattr(self, name)
            if len(rows) != stages or any(len(row) != dims or min(row) < 1 for row in rows):
                raise ValueError(f"{name} must hold {stages} entries of {dims} positive numbers, found {rows}")
        for name, count in (
            ("features_per_stage", stages),
            ("blocks_per_stage", stages),
            ("decoder_blocks_per_stage", stages - 1),
        ):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} must have {count} entries (one per stage), found {getattr(self, name)}")
        if set(self.strides[0]) != {1}:
            raise ValueError(f"strides must begin with ones (the first stage keeps the size), found {self.strides[0]}")
        if any(edge % 2 == 0 for row in self.kernel_sizes for edge in row):
            raise ValueError(f"kernel_sizes must be odd, found {self.kernel_sizes}")
        for axis in range(dims):
            divisor = 1
            for row in self.strides:
                divisor *= row[axis]
            if self.patch_size[axis] % divisor:
                low = max(divisor, self.patch_size[axis] // divisor * divisor)
                raise ValueError(
                    f"patch_size[{axis}] is {self.patch_size[axis]}, but the strides need a multiple of {divisor}; "
                    f"nearest legal values: {low} and {low + divisor}"
                )
        if len(self.normalization) != len(self.use_mask_for_norm):
            raise ValueError("normalization and use_mask_for_norm must have one entry per channel")
        return self

    @property
    def dims(self) -> int:
        """2 or 3."""
        return len(self.patch_size)


class Plan(Record):
    """Everything derived from a data set; with a configuration's weights it is all that prediction needs."""

    format: Literal[1] = 1
    dataset_name: str
    planner: str
    gpu_memory_gb: float = Field(gt=0)
    orientation: Literal["LPS", "as_stored"] = "LPS"
    transpose_forward: tuple[int, int, int]
    channels: tuple[str, ...]
    labels: Labels
    intensities: tuple[Intensities, ...]
    configurations: dict[str, Configuration]
    notes: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        """Fill fields that a configuration leaves out from the one it inherits from."""
        if not isinstance(data, dict) or not isinstance(data.get("configurations"), dict):
            return data
        given: dict[str, Any] = data["configurations"]

        def resolve(name: str, seen: tuple[str, ...] = ()) -> Any:
            entry = given[name]
            parent = entry.get("inherits_from") if isinstance(entry, dict) else None
            if parent is None:
                return entry
            if parent not in given or parent in (*seen, name):
                raise ValueError(
                    f"configurations.{name}.inherits_from: {parent!r} must name another configuration, without a circle"
                )
            base = resolve(parent, (*seen, name))
            base = base.model_dump() if isinstance(base, Configuration) else base
            return {**base, **entry}

        return {**data, "configurations": {name: resolve(name) for name in given}}

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if sorted(self.transpose_forward) != [0, 1, 2]:
            raise ValueError(f"transpose_forward must be a permutation of 0, 1, 2, found {self.transpose_forward}")
        for name, configuration in self.configurations.items():
            if len(configuration.normalization) != len(self.channels):
                raise ValueError(
                    f"configurations.{name}.normalization must have one entry for each of {len(self.channels)} channels"
                )
            for link in (configuration.previous_stage, configuration.next_stage):
                if link is not None and link not in self.configurations:
                    raise ValueError(f"configurations.{name} refers to {link!r}, which the plan does not hold")
        return self
