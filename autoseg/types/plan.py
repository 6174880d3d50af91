"""The plan: every number that preprocessing, the network and prediction need."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

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


_COUNTS = "positive whole numbers, one for each "


class Reason(Record):
    """Why a value of the plan is what it is: the value as planned, the rule in a sentence, and the numbers it was applied to."""

    value: Any
    rule: str
    inputs: dict[str, Any] = {}
    source: str = ""


class Configuration(Record):
    """One way to segment the data: axis order z, y, x after the plan's transpose; a 2D configuration has two axes."""

    patch_size: Annotated[Ints, Field(description="voxels that the network sees at once; multiples of the strides' products")]
    batch_size: Annotated[int, Field(ge=1, description="patches per training step")]
    spacing: Annotated[Floats, Field(description="voxel size in mm that every image is resampled to")]
    median_shape: Annotated[Floats, Field(description="median size of the training images in voxels of that spacing")]
    network: Annotated[Spec, Field(description="the kind of network, with its options")] = Spec(kind="unet")
    strides: Annotated[tuple[Ints, ...], Field(description="per stage, what each axis is divided by; ones at the first stage")]
    kernel_sizes: Annotated[tuple[Ints, ...], Field(description="per stage, the odd edges of its convolutions")]
    features_per_stage: Annotated[Ints, Field(description=_COUNTS + "stage: feature maps")]
    blocks_per_stage: Annotated[Ints, Field(description=_COUNTS + "stage: convolutions, or residual blocks, of the encoder")]
    decoder_blocks_per_stage: Annotated[Ints, Field(description=_COUNTS + "stage but the last: convolutions of the decoder")]
    batch_dice: Annotated[bool, Field(description="whether the Dice loss takes the batch as one image")]
    normalization: Annotated[tuple[str, ...], Field(description="per channel, how intensities are normalised")]
    use_mask_for_norm: Annotated[tuple[bool, ...], Field(description="per channel, whether zeros are left out of z-scores")]
    mirror_axes: Annotated[Ints | None, Field(description="axes of patch_size that may be flipped, from 0; null: all")] = None
    checkpointing: Annotated[
        int, Field(ge=0, description="so many of the finest stages are computed again in the backward pass, to save memory")
    ] = 0
    next_stage: Annotated[str | None, Field(description="the configuration that starts from this one's segmentation")] = None
    previous_stage: Annotated[str | None, Field(description="the configuration whose segmentation is part of the input")] = None
    inherits_from: Annotated[
        str | None, Field(description="the configuration that gives every value which is left out here")
    ] = None

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
        if len(self.normalization) != len(self.use_mask_for_norm):
            raise ValueError("normalization and use_mask_for_norm must have one entry per channel")
        if self.checkpointing > stages:
            raise ValueError(f"checkpointing must be at most {stages}, the number of stages, found {self.checkpointing}")
        mirror = self.mirror_axes or ()
        if len(set(mirror)) != len(mirror) or not set(mirror) <= set(range(dims)):
            raise ValueError(f"mirror_axes must be some of the patch's axes {', '.join(map(str, range(dims)))}, found {mirror}")
        self._fits()
        return self

    def _fits(self) -> None:
        """The patch must be divisible by the strides, and leave the lowest stage more than a single voxel."""
        divisors = [math.prod(row[axis] for row in self.strides) for axis in range(self.dims)]
        for axis, (edge, divisor) in enumerate(zip(self.patch_size, divisors, strict=True)):
            if edge % divisor:
                low = max(divisor, edge // divisor * divisor)
                raise ValueError(
                    f"patch_size[{axis}] is {edge}, but the strides need a multiple of {divisor}; "
                    f"nearest legal values: {low} and {low + divisor}"
                )
        if all(edge == divisor for edge, divisor in zip(self.patch_size, divisors, strict=True)):
            larger = [
                str(tuple(edge * 2 if axis == grown else edge for axis, edge in enumerate(self.patch_size)))
                for grown in range(self.dims)
            ]
            raise ValueError(
                f"patch_size {self.patch_size} is a single voxel at the lowest stage, which instance normalisation would turn to "
                f"zero; nearest legal values: {' or '.join(larger)}, or leave out the last stage"
            )

    @property
    def dims(self) -> int:
        """2 or 3."""
        return len(self.patch_size)


class Plan(Record):
    """Everything derived from a data set; with a configuration's weights it is all that prediction needs."""

    format: Literal[1] = 1
    dataset_name: str
    planner: Annotated[str, Field(description="the planner that made these values")]
    gpu_memory_gb: Annotated[float, Field(gt=0, description="the GPU memory planned for")]
    orientation: Annotated[
        Literal["LPS", "RAS", "as_stored"],
        Field(description="how images lie inside: turned to LPS (or RAS), or as their files store them"),
    ] = "LPS"
    transpose_forward: Annotated[
        tuple[int, int, int], Field(description="the order of the axes z, y, x (0, 1, 2) in which all other values count")
    ]
    channels: tuple[str, ...]
    labels: Labels
    intensities: Annotated[tuple[Intensities, ...], Field(description="per channel, statistics of voxels inside the labels")]
    configurations: dict[str, Configuration]
    notes: tuple[str, ...] = ()
    resampling: Annotated[
        Literal["cubic", "linear", "none"], Field(description="how images are interpolated; none: they keep their own spacing")
    ] = "cubic"
    arithmetic: Annotated[
        Literal["fp32", "nnunet"],
        Field(description="how prediction gathers logits: in fp32, or rounded to fp16 wherever nnU-Net does, for its very masks"),
    ] = "fp32"
    precision: Annotated[Literal["bf16", "fp16", "fp32"], Field(description="that the memory was planned for")] = "bf16"
    time_budget_s: Annotated[
        float | None, Field(gt=0, description="seconds that a train command may take; null: no limit")
    ] = None
    reasons: Annotated[
        dict[str, Reason], Field(description="why, by path, such as configurations.3d_fullres.patch_size; not read by any stage")
    ] = {}

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        """Fill fields that a configuration leaves out from the one it inherits from; `$schema` is for editors only."""
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if key != "$schema"}
        if not isinstance(data, dict) or not isinstance(data.get("configurations"), dict):
            return data
        given: dict[str, Any] = data["configurations"]

        def resolve(name: str, seen: tuple[str, ...] = ()) -> Any:
            entry = given[name]
            parent = entry.get("inherits_from") if isinstance(entry, dict) else None
            if parent is None:
                return entry
            if not isinstance(parent, str) or parent not in given or parent in (*seen, name):
                raise ValueError(
                    f"configurations.{name}.inherits_from: {parent!r} must name another configuration, without a circle"
                )
            base = resolve(parent, (*seen, name))
            base = base.model_dump() if isinstance(base, Configuration) else base
            return {**base, **entry} if isinstance(base, dict) else entry

        return {**data, "configurations": {name: resolve(name) for name in given}}

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if sorted(self.transpose_forward) != [0, 1, 2]:
            raise ValueError(f"transpose_forward must be a permutation of 0, 1, 2, found {self.transpose_forward}")
        for name, configuration in self.configurations.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"configurations: {name!r} names a folder; use letters, digits, dots, dashes and underscores")
            stage = self.configurations.get(configuration.previous_stage or "")
            if stage is not None and stage.previous_stage is not None:
                raise ValueError(
                    f"configurations.{name}.previous_stage: {configuration.previous_stage!r} has a previous stage itself; "
                    "a cascade has two stages"
                )
            if len(configuration.normalization) != len(self.channels):
                raise ValueError(
                    f"configurations.{name}.normalization must have one entry for each of {len(self.channels)} channels"
                )
            for link in (configuration.previous_stage, configuration.next_stage):
                if link is not None and link not in self.configurations:
                    raise ValueError(f"configurations.{name} refers to {link!r}, which the plan does not hold")
        return self


def plan_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of plan.json, in which a configuration that inherits may leave out anything."""
    made = Plan.model_json_schema()
    made["properties"] = {"$schema": {"type": "string"}, **made["properties"]}
    entry = made["$defs"]["Configuration"]
    required = entry.pop("required")
    entry["properties"]["normalization"]["items"]["enum"] = list(NORMALIZATIONS)
    inherits = {"required": ["inherits_from"], "properties": {"inherits_from": {"type": "string"}}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "$defs": {
        **made["$defs"], "Configuration": {**entry, "anyOf": [inherits, {"required": required}]},
    }}
