"""The default planner: a plain U-Net, sized by nnU-Net's rules for one GPU (Isensee et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autoseg.errors import PlanError
from autoseg.planners import reasons, rules
from autoseg.planners.oddities import data_oddities, size_oddities
from autoseg.planners.symmetry import LeftRight, left_right, mirror_axes
from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Configuration, Plan
from autoseg.types.record import Spec

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
RECIPE = rules.Recipe("unet", memory_gb=8, elements_2d=85e6, elements_3d=560e6, batch_share=0.05, size_for_min_batch=True)
NORMALIZATION_OF_KIND = {"ct": ("CTNormalization", "its range of values (HU)"), "rgb": ("RGBTo01Normalization", "its colours")}


def plan(
    dataset: Dataset, fingerprint: Fingerprint, gpu_memory_gb: float | None = None, *,
    configurations: Sequence[str] = CONFIGURATIONS,
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
    check_inputs(dataset, fingerprint, memory_gb, configurations)
    spacings = np.array([case.spacing for case in fingerprint.cases], dtype=np.float64)
    shapes = np.array([case.shape_after_crop for case in fingerprint.cases], dtype=np.int64)
    spacing_zyx_mm = rules.target_spacing(spacings, shapes)
    transpose = rules.transpose_order(spacing_zyx_mm)
    median_zyx = rules.median_resampled_shape(spacings, shapes, spacing_zyx_mm)
    normalization, words, notes = _normalization(dataset, fingerprint)
    relative_size = fingerprint.median_relative_size_after_cropping
    masks = rules.use_mask(normalization, relative_size)
    if any(masks):
        notes.append(f"cropping to nonzero leaves {relative_size:.0%} of the median image, "
                     "so z-scores are taken inside the nonzero mask")
    sides = left_right(dataset, fingerprint)
    if sides is not None:
        notes.append(sides.text)
    moved = spacings[:, transpose]
    measured = tuple(tuple(row.tolist()) for row in (np.percentile(moved, 50, axis=0), moved.min(axis=0), moved.max(axis=0)))
    cases = case_count(dataset, fingerprint)
    sizer = _Sizer(recipe, memory_gb, dataset.labels.declared_count, cases, normalization, masks, transpose, sides, measured)
    sizer.size(tuple(spacing_zyx_mm[a] for a in transpose), tuple(median_zyx[a] for a in transpose), configurations)
    as_stored = dataset.source == "fingerprint"
    kept = keep(sizer.made, configurations)
    odd = [*data_oddities(dataset, fingerprint), *size_oddities(kept, math.prod(median_zyx) * cases)]
    made = Plan(
        dataset_name=dataset.name, planner=planner, gpu_memory_gb=memory_gb, orientation="as_stored" if as_stored else "LPS",
        transpose_forward=transpose, channels=dataset.channels, labels=dataset.labels, intensities=fingerprint.intensities,
        configurations=kept, notes=(*notes, *sizer.notes, *odd),
    )
    shared = reasons.normalization_whys(words, relative_size, normalization)
    whys = reasons.general_whys(planner, recipe, gpu_memory_gb, as_stored, dataset.channels_named, spacing_zyx_mm, cases)
    for name, presence in sizer.presence.items():
        whys[f"configurations.{name}"] = presence
        if name in made.configurations:
            own = {**sizer.whys[name], **shared, **reasons.link_whys(made.configurations[name])}
            whys |= {f"configurations.{name}.{field}": own[field] for field in Configuration.model_fields}
    return reasons.attach(made, whys)


def case_count(dataset: Dataset, fingerprint: Fingerprint) -> int:
    """Training cases: those that were measured; for nnU-Net's own files the number that they declare."""
    return len(dataset.cases) if dataset.source == "fingerprint" and dataset.cases else len(fingerprint.cases)


def check_inputs(dataset: Dataset, fingerprint: Fingerprint, memory_gb: float, configurations: Sequence[str]) -> None:
    """Raise PlanError for inputs that no plan can be made from; see `plan`."""
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


def _normalization(dataset: Dataset, fingerprint: Fingerprint) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """Scheme of each channel by its name, or by what its voxels look like where nobody named it; by what, in words; and notes."""
    schemes: list[str] = []
    words: list[str] = []
    notes: list[str] = []
    for index, channel in enumerate(dataset.channels):
        kind = fingerprint.channel_kinds[index] if index < len(fingerprint.channel_kinds) else ""
        if not dataset.channels_named and kind.casefold() in NORMALIZATION_OF_KIND:
            scheme, seen = NORMALIZATION_OF_KIND[kind.casefold()]
            notes.append(f"channel {index} ({channel}) has no name and was recognised as {kind} by {seen}: {scheme}")
            words.append(f"recognised as {kind} by {seen}")
        else:
            scheme = rules.normalization_for(channel)
            if scheme != rules.DEFAULT_NORMALIZATION:
                notes.append(f"channel {index} is named {channel}: {scheme}")
            words.append(f"named {channel}" if dataset.channels_named else f"{channel}, of no special kind")
        schemes.append(scheme)
    return tuple(schemes), tuple(words), notes


def keep(made: dict[str, Configuration], wanted: Sequence[str]) -> dict[str, Configuration]:
    """The wanted configurations among those the rules made; a link to one that is not kept is dropped."""
    kept = {name: configuration for name, configuration in made.items() if name in wanted}
    if not kept:
        raise PlanError(f"none of the configurations asked for ({', '.join(wanted) or 'none'}) suits the data; "
                        f"expected some of {', '.join(made)}")
    for name, configuration in kept.items():
        if configuration.next_stage not in kept:
            kept[name] = configuration.model_copy(update={"next_stage": None})
    return kept


@dataclass
class _Sizer:
    """Sizes configurations for one data set: what stays the same from one to the next, and what `size` has made."""

    recipe: rules.Recipe
    memory_gb: float
    outputs: int
    cases: int
    normalization: tuple[str, ...]
    masks: tuple[bool, ...]
    transpose: tuple[int, int, int]
    sides: LeftRight | None
    measured: tuple[rules.Floats, ...]  # median, smallest and largest spacing, after the transpose
    made: dict[str, Configuration] = field(default_factory=dict)
    whys: dict[str, dict[str, reasons.Why]] = field(default_factory=dict)
    presence: dict[str, reasons.Why] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def size(self, spacing: rules.Floats, median_shape: rules.Floats, wanted: Sequence[str]) -> None:
        """Make every configuration that suits the data; spacing and median shape are after the transpose."""
        dataset_voxels = math.prod(median_shape) * self.cases
        full: reasons.Sized | None = None
        coarse: rules.LowRes | None = None
        flat = self._fitted("2d", spacing[1:], median_shape[1:], dataset_voxels)
        self._add("2d", flat, self._spacing_why(flat), batch_dice=True, dice_why=reasons.batch_dice_why("2d", None, None))
        if median_shape[0] == 1:
            self.notes.append("the images have one slice, so there is only a 2d configuration")
        else:
            full = self._fitted("3d_fullres", spacing, median_shape, dataset_voxels)
            coarse = rules.low_res(spacing, median_shape, full.fitted, self.outputs, self.recipe, self.memory_gb)
            cascaded = coarse is not None and coarse.worthwhile
            self._add("3d_fullres", full, self._spacing_why(full), batch_dice=cascaded,
                      dice_why=reasons.batch_dice_why("3d_fullres", full, coarse))
            if coarse is not None and cascaded:
                self._add_cascade(full, coarse)
        self.presence = reasons.presence_whys(full, coarse, median_shape[0], wanted, CONFIGURATIONS)

    def _fitted(self, name: str, spacing: rules.Floats, median_shape: rules.Floats, dataset_voxels: float) -> reasons.Sized:
        fitted = rules.fit_patch(spacing, median_shape, self.outputs, self.recipe, self.memory_gb)
        if not fitted.fits:
            smallest = fitted.topology.patch_size
            self.notes.append(f"{name}: even the smallest patch {smallest} is estimated above {self.memory_gb:g} GB")
        return self._batched(fitted, spacing, median_shape, dataset_voxels)

    def _batched(
        self, fitted: rules.FittedPatch, spacing: rules.Floats, median_shape: rules.Floats, dataset_voxels: float
    ) -> reasons.Sized:
        limits = rules.batch_limits(fitted, dataset_voxels, self.recipe, self.memory_gb)
        return reasons.Sized(fitted, limits, spacing, median_shape)

    def _spacing_why(self, sized: reasons.Sized) -> reasons.Why:
        median, low, high = (row[-len(sized.spacing) :] for row in self.measured)
        return reasons.spacing_why(median, low, high, sized.spacing, self.cases)

    def _add_cascade(self, full: reasons.Sized, coarse: rules.LowRes) -> None:
        share = full.fitted.voxels / math.prod(full.median_shape)
        self.notes.append(f"a 3d_fullres patch covers {share:.0%} of the median image, "
                          "so its Dice is taken over the batch as a whole")
        low = self._batched(coarse.fitted, coarse.spacing, coarse.median_shape, coarse.voxels * self.cases)
        self._add("3d_lowres", low, reasons.low_res_spacing_why(full, coarse), batch_dice=False,
                  dice_why=reasons.batch_dice_why("3d_lowres", full, coarse))
        self.made["3d_lowres"] = self.made["3d_lowres"].model_copy(update={"next_stage": "3d_cascade_fullres"})
        links = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        self.made["3d_cascade_fullres"] = self.made["3d_fullres"].model_copy(update=links)
        self.whys["3d_cascade_fullres"] = reasons.inherited_whys("3d_fullres", self.whys["3d_fullres"])

    def _add(self, name: str, sized: reasons.Sized, spacing_why: reasons.Why, *, batch_dice: bool, dice_why: reasons.Why) -> None:
        layout, network = sized.fitted.topology, self.recipe.network
        stages, dims = len(layout.strides), len(layout.patch_size)
        mirror = mirror_axes(self.sides, self.transpose, layout.patch_size)
        made = Configuration(
            patch_size=layout.patch_size, batch_size=sized.batch.size,
            spacing=sized.spacing, median_shape=sized.median_shape, network=Spec(kind=network),
            strides=layout.strides, kernel_sizes=layout.kernel_sizes,
            features_per_stage=rules.features_per_stage(stages, dims),
            blocks_per_stage=rules.blocks_per_stage(network, stages),
            decoder_blocks_per_stage=rules.decoder_blocks_per_stage(network, stages),
            batch_dice=batch_dice, normalization=self.normalization, use_mask_for_norm=self.masks, mirror_axes=mirror,
        )
        self.made[name] = made
        self.whys[name] = {
            **reasons.sized_whys(sized, made, self.recipe, self.memory_gb, self.cases, spacing_why),
            "batch_dice": dice_why, "mirror_axes": reasons.mirror_why(self.sides, mirror, dims),
        }
