"""A training record's augmentation: its kind and options become an object that draws and applies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoseg.contracts import Augmentation, AugmentationFactory
from autoseg.errors import PluginError
from autoseg.plugins import resolve
from autoseg.trainers.augment.default import DefaultAugmentation, NoAugmentation
from autoseg.trainers.augment.options import read_options
from autoseg.types.plan import Configuration, Ints
from autoseg.types.run import AugmentSpec


def _default(configuration: Configuration, channels: int, mirror: Ints, previous_labels: int, /, **options: Any) -> Augmentation:
    return DefaultAugmentation.from_configuration(configuration, channels, mirror, previous_labels, read_options(options))


def _none(configuration: Configuration, channels: int, mirror: Ints, previous_labels: int, /, **options: Any) -> Augmentation:
    if options:
        raise PluginError(f"augmentation 'none' takes no options, found {', '.join(options)}")
    return NoAugmentation.from_configuration(configuration, channels, (), previous_labels)


def _batchgenerators(
    configuration: Configuration, channels: int, mirror: Ints, previous_labels: int, /, **options: Any
) -> Augmentation:
    from autoseg.trainers.batchgenerators_pipeline import make_pipeline

    return make_pipeline(configuration, channels, mirror, previous_labels, **options)


AUGMENTATIONS: Mapping[str, AugmentationFactory] = {"default": _default, "none": _none, "batchgenerators": _batchgenerators}


def make_augmentation(
    spec: AugmentSpec, configuration: Configuration, channels: int, mirror: Ints, previous_labels: int = 0
) -> Augmentation:
    """Build the augmentation of a training record; `mirror` lists the axes of the configuration's patch that may be flipped.

    Raises:
        PluginError: an unknown kind, or options that it does not take.
    """
    factory = resolve(spec.kind, AUGMENTATIONS, "augment")
    if factory in AUGMENTATIONS.values():
        return factory(configuration, channels, mirror, previous_labels, **spec.options)
    try:
        return factory(configuration, channels, mirror, previous_labels, **spec.options)
    except TypeError as error:
        raise PluginError(f"augmentation {spec.kind!r} does not take the options {spec.options}: {error}") from error
