"""What `augment.options` may set: probabilities and ranges, with those of nnU-Net v2's default trainer where nothing is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from autoseg.errors import PluginError
from autoseg.types.record import Record


def _ordered(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("the first number must not be above the second")
    return values


Probability = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amounts = Annotated[tuple[Amount, Amount], AfterValidator(_ordered)]
Factors = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]
Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]], AfterValidator(_ordered)]


class AugmentOptions(Record):
    """Probabilities are per sample, those with `channel` or `label` per channel or label of a sample that is chosen.

    Ranges are (low, high) of a uniform draw; of brightness, contrast and gamma half lies below 1, half above. `rotation` is the
    largest angle in degrees (None: 30 in 3D, 180 in a plane, 15 in an elongated plane); of `scaling` values above 1 make things
    smaller; `blur` is a standard deviation in voxels, `noise` one of the image's values, `low_resolution` the size that is left,
    `previous_radius` a ball's in voxels. `elastic_length` is how far apart things move independently, as a share of each edge of
    the patch, and `elastic_strength` the largest shift as a share of that.
    """

    rotation_probability: Probability = 0.2
    rotation: Annotated[float, Field(ge=0, le=180)] | None = None
    scaling_probability: Probability = 0.2
    scaling: Factors = (0.7, 1.4)
    elastic_probability: Probability = 0.0
    elastic_length: Shares = (0.1, 0.25)
    elastic_strength: Annotated[tuple[Probability, Probability], AfterValidator(_ordered)] = (0.1, 0.4)
    noise_probability: Probability = 0.1
    noise: Amounts = (0.0, 0.1)
    blur_probability: Probability = 0.2
    blur_channel_probability: Probability = 0.5
    blur: Factors = (0.5, 1.0)
    brightness_probability: Probability = 0.15
    brightness: Factors = (0.75, 1.25)
    contrast_probability: Probability = 0.15
    contrast: Factors = (0.75, 1.25)
    low_resolution_probability: Probability = 0.25
    low_resolution_channel_probability: Probability = 0.5
    low_resolution: Shares = (0.5, 1.0)
    gamma_inverted_probability: Probability = 0.1
    gamma_probability: Probability = 0.3
    gamma: Factors = (0.7, 1.5)
    mirror_probability: Probability = 0.5
    previous_morph_probability: Probability = 0.4
    previous_morph_label_probability: Probability = 0.5
    previous_radius: Annotated[
        tuple[Annotated[float, Field(ge=1, le=11)], Annotated[float, Field(ge=1, le=11)]], AfterValidator(_ordered)
    ] = (1.0, 8.0)
    previous_removal_probability: Probability = 0.2
    previous_removal_label_probability: Probability = 0.5
    previous_removal_largest: Probability = 0.15


def read_options(options: Mapping[str, Any]) -> AugmentOptions:
    """The options of a training record, checked.

    Raises:
        PluginError: an unknown name, with the names there are, or a value out of range.
    """
    try:
        return AugmentOptions.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if name not in AugmentOptions.model_fields:
            known = ", ".join(AugmentOptions.model_fields)
            raise PluginError(f"augmentation 'default' has no option {name!r}; choose from {known}") from None
        raise PluginError(f"augment.options.{name}: {first['msg']} (found {options[name]!r})") from None
