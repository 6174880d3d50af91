"""Augmentation: parameters are drawn first (all the randomness), then applied, on the batch's device.

Transforms, probabilities and ranges are those of nnU-Net v2's default trainer, in its order, but for mirroring, which happens
together with rotation and scaling. In main memory compiled kernels resample; elsewhere, and without them, torch does.
"""

from __future__ import annotations

from autoseg.trainers.augment.default import DefaultAugmentation, NoAugmentation
from autoseg.trainers.augment.factory import make_augmentation
from autoseg.trainers.augment.options import AugmentOptions
from autoseg.trainers.augment.params import AugmentParams, Elastic, Morph, Removal, Step, source_box

__all__ = [
    "AugmentOptions", "AugmentParams", "DefaultAugmentation", "Elastic", "Morph", "NoAugmentation", "Removal", "Step",
    "make_augmentation", "source_box",
]
