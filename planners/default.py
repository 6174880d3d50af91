"""The default planner: a plain U-Net, sized by nnU-Net's rules for one GPU (Isensee et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autoseg.errors import PlanError
from autoseg.planners import rules
from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Configuration, Plan
from autoseg.types.record import Spec

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
DEFAULT_CONFIGURATIONS = ("2d", "3d_fullres")
RECIPE = rules.Recipe("unet", memory_gb=8, elements_2d=85e6, elements_3d=560e6, batch_share=0.05, size_for_min_batch=True)
NORMALIZATION_OF_KIND = {"ct": ("CTNormalization", "its range of values (HU)"), "rgb": ("RGBTo01Normalization", "its colours")}


def plan(
    dataset: Dataset, fingerprint: Fingerprint, gpu_memory_gb: float | None = None, *,
    configurations: Sequence[str] = DEFAULT_CONFIGURATIONS,
) -> Plan:
    """Plan a plain U-Net for `gpu_memory_gb` (8 GB if None), keeping those `configurations` that suit the data.

    Raises PlanError for an empty fingerprint, a memory target or configuration name that makes no sense, or none left to plan.
    """
    return plan_with(RECIPE, "default", dataset, fingerprint, gpu_memory_gb, configurations)


def plan_with(
    recipe: rules.Recipe, planner: str, dataset: Dataset, fingerprint: Fingerprint, gpu_memory_gb: float | None,
    configurations: Sequence[str],
) -> Plan:
    """Apply the rules with a planner's own numbers; see `plan` for arguments and errors."""
    memory_gb = recipe.memory_gb if gpu_memory_gb is None else float(gpu_memory_gb)
    _check(dataset, fingerprint, memory_gb, configurations)
    spacings = np.array([case.spacing for case in fingerprint.cases], dtype=np.float64)
    shapes = np.array([case.shape_after_crop for case in fingerprint.cases], dtype=np.int64)
    spacing_zyx_mm = rules.target_spacing(spacings, shapes)
    transpose = rules.transpose_order(spacing_zyx_mm)
    median_zyx = rules.median_resampled_shape(spacings, shapes, spacing_zyx_mm)
    normalization, notes = _normalization(dataset, fingerprint)
    masks = rules.use_mask(normalization, fingerprint.median_relative_size_after_cropping)
    if any(masks):
        notes.append(f"cropping to nonzero leaves {fingerprint.median_relative_size_after_cropping:.0%} of the median image, "
                     "so z-scores are taken inside the nonzero mask")
    sizer = _Sizer(recipe, memory_gb, dataset.labels.declared_count, len(fingerprint.cases), normalization, masks)
    made, more = sizer.configurations(tuple(spacing_zyx_mm[a] for a in transpose), tuple(median_zyx[a] for a in transpose))
    kept = _keep(made, configurations)
    return Plan(
        dataset_name=dataset.name, planner=planner, gpu_memory_gb=memory_gb,
        orientation="as_stored" if dataset.source == "fingerprint" else "LPS",
        transpose_forward=transpose, channels=dataset.channels, labels=dataset.labels, intensities=fingerprint.intensities,
        configurations=kept, notes=(*notes, *more),
    )


def _check(dataset: Dataset, fingerprint: Fingerprint, memory_gb: float, configurations: Sequence[str]) -> None:
    if not fingerprint.cases:
        raise PlanError("the fingerprint holds no case: expected at least one training case with an image and a label")
    if not (math.isfinite(memory_gb) and memory_gb > 0):
        raise PlanError(f"the GPU memory target must be a positive number of GB, found {memory_gb}")
    if len(fingerprint.intensities) != len(dataset.channels):
        raise PlanError(f"the fingerprint holds intensities of {len(fingerprint.intensities)} channels, expected "
                        f"{len(dataset.channels)} ({', '.join(dataset.channels)}); make the fingerprint again")
    unknown = [name for name in configurations if name not in CONFIGURATIONS]
    if unknown:
        raise PlanError(f"unknown configuration {unknown[0]!r}; choose from {', '.join(CONFIGURATIONS)}")
    if "3d_cascade_fullres" in configurations and not {"3d_fullres", "3d_lowres"} <= set(configurations):
        raise PlanError("3d_cascade_fullres starts from 3d_fullres and 3d_lowres; ask for those configurations too")


def _normalization(dataset: Dataset, fingerprint: Fingerprint) -> tuple[tuple[str, ...], list[str]]:
    """Scheme of each channel by its name, or by what its voxels look like where nobody named it, with notes that say so."""
    schemes: list[str] = []
    notes: list[str] = []
    for index, channel in enumerate(dataset.channels):
        kind = fingerprint.channel_kinds[index] if index < len(fingerprint.channel_kinds) else ""
        if not dataset.channels_named and kind.casefold() in NORMALIZATION_OF_KIND:
            scheme, reason = NORMALIZATION_OF_KIND[kind.casefold()]
            notes.append(f"channel {index} ({channel}) has no name and was recognised as {kind} by {reason}: {scheme}")
        else:
            scheme = rules.normalization_for(channel)
            if scheme != rules.DEFAULT_NORMALIZATION:
                notes.append(f"channel {index} is named {channel}: {scheme}")
        schemes.append(scheme)
    return tuple(schemes), notes


def _keep(made: dict[str, Configuration], wanted: Sequence[str]) -> dict[str, Configuration]:
    """The wanted configurations among those the rules made; a link to one that is not kept is dropped."""
    kept = {name: configuration for name, configuration in made.items() if name in wanted}
    if not kept:
        raise PlanError(f"none of the configurations asked for ({', '.join(wanted) or 'none'}) suits the data; "
                        f"expected some of {', '.join(made)}")
    for name, configuration in kept.items():
        if configuration.next_stage not in kept:
            kept[name] = configuration.model_copy(update={"next_stage": None})
    return kept


class _Sizer:
    """Sizes configurations for one data set: what stays the same from configuration to configuration."""

    def __init__(
        self, recipe: rules.Recipe, memory_gb: float, outputs: int, cases: int, normalization: tuple[str, ...],
        masks: tuple[bool, ...],
    ) -> None:
        self.recipe, self.memory_gb, self.outputs, self.cases = recipe, memory_gb, outputs, cases
        self.normalization, self.masks = normalization, masks

    def configurations(self, spacing: rules.Floats, median_shape: rules.Floats) -> tuple[dict[str, Configuration], list[str]]:
        """Every configuration that suits the data, and notes; spacing and median shape are after the transpose."""
        recipe, memory_gb, outputs = self.recipe, self.memory_gb, self.outputs
        dataset_voxels = math.prod(median_shape) * self.cases
        notes: list[str] = []
        slice_patch = rules.fit_patch(spacing[1:], median_shape[1:], outputs, recipe, memory_gb)
        made = {"2d": self.configuration(slice_patch, spacing[1:], median_shape[1:], dataset_voxels, batch_dice=True)}
        if not slice_patch.fits:
            notes.append(_too_small("2d", slice_patch, memory_gb))
        if median_shape[0] == 1:
            notes.append("the images have one slice, so there is only a 2d configuration")
            return made, notes
        patch = rules.fit_patch(spacing, median_shape, outputs, recipe, memory_gb)
        if not patch.fits:
            notes.append(_too_small("3d_fullres", patch, memory_gb))
        coarse = rules.low_res(spacing, median_shape, patch, outputs, recipe, memory_gb)
        full = self.configuration(patch, spacing, median_shape, dataset_voxels, batch_dice=coarse is not None)
        made["3d_fullres"] = full
        if coarse is None:
            return made, notes
        share = patch.voxels / math.prod(median_shape)
        notes.append(f"a 3d_fullres patch covers {share:.0%} of the median image, so its Dice is taken over the batch as a whole")
        made["3d_lowres"] = self.configuration(
            coarse.fitted, coarse.spacing, coarse.median_shape, coarse.voxels * self.cases, batch_dice=False,
        ).model_copy(update={"next_stage": "3d_cascade_fullres"})
        made["3d_cascade_fullres"] = full.model_copy(update={"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"})
        return made, notes

    def configuration(
        self, fitted: rules.FittedPatch, spacing: rules.Floats, median_shape: rules.Floats, dataset_voxels: float,
        batch_dice: bool,
    ) -> Configuration:
        """The record of one sized patch."""
        layout, network = fitted.topology, self.recipe.network
        stages = len(layout.strides)
        return Configuration(
            patch_size=layout.patch_size,
            batch_size=rules.batch_size(fitted, dataset_voxels, self.recipe, self.memory_gb),
            spacing=spacing, median_shape=median_shape, network=Spec(kind=network),
            strides=layout.strides, kernel_sizes=layout.kernel_sizes,
            features_per_stage=rules.features_per_stage(stages, len(layout.patch_size)),
            blocks_per_stage=rules.blocks_per_stage(network, stages),
            decoder_blocks_per_stage=rules.decoder_blocks_per_stage(network, stages),
            batch_dice=batch_dice, normalization=self.normalization, use_mask_for_norm=self.masks,
        )


def _too_small(name: str, fitted: rules.FittedPatch, memory_gb: float) -> str:
    return f"{name}: even the smallest patch {fitted.topology.patch_size} is estimated above {memory_gb:g} GB"
