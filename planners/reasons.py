"""Why each value of a plan is what it is: the rule in plain words, and the numbers of the data that it was applied to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoseg.planners import rules
from autoseg.planners.symmetry import AXES, LeftRight
from autoseg.types.plan import Configuration, Plan, Reason

NNUNET = "nnU-Net (Isensee et al. 2021)"
PRESETS = "residual-encoder presets of nnU-Net (Isensee et al. 2024)"
MIRROR_SOURCE = "left/right rule of autoseg"
NETWORK_WORDS = {
    "unet": "a plain U-Net: convolutions with instance normalisation and leaky ReLU, and skip connections",
    "residual-unet": "a U-Net whose encoder consists of residual blocks, as the preset says",
}


@dataclass(frozen=True)
class Why:
    """A reason before it is tied to a value."""

    rule: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Sized:
    """A configuration as the rules sized it: after the transpose, and what share of the median image a patch covers."""

    fitted: rules.FittedPatch
    batch: rules.BatchLimits
    spacing: rules.Floats
    median_shape: rules.Floats

    @property
    def coverage(self) -> float:
        """Share of the median image that one patch sees, at most 1."""
        pairs = zip(self.fitted.topology.patch_size, self.median_shape, strict=True)
        return math.prod(min(edge / size, 1.0) for edge, size in pairs)


def attach(plan: Plan, whys: Mapping[str, Why]) -> Plan:
    """The plan with its reasons; each takes its value from the plan, `configurations.NAME` whether the plan holds it."""
    data = plan.model_dump(mode="json", exclude={"reasons"})
    reasons = {}
    for path, why in whys.items():
        value: Any = data
        parts = path.split(".", 2) if path.startswith("configurations.") else [path]
        if len(parts) == 2:
            value = parts[1] in data["configurations"]
        else:
            for part in parts:
                value = value[part]
        reasons[path] = Reason(value=value, rule=why.rule, inputs=dict(why.inputs), source=why.source)
    return plan.model_copy(update={"reasons": reasons})


def numbers(values: Iterable[float]) -> list[float | int]:
    """Numbers for a reason, to six digits."""
    return [number(value) for value in values]


def number(value: float) -> float | int:
    """A number to six digits; whole ones as integers."""
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() else rounded


def percent(share: float) -> str:
    """A share in percent, with a digit more where it is small."""
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"


def spacing_why(median: rules.Floats, low: rules.Floats, high: rules.Floats, target: rules.Floats, cases: int) -> Why:
    """Why images are resampled to `target`; all spacings in mm, after the transpose."""
    inputs: dict[str, Any] = {
        "cases": cases, "median spacing mm": numbers(median), "finest mm": numbers(low), "coarsest mm": numbers(high),
    }
    if tuple(median) == tuple(target):
        return Why("every image is resampled to the median voxel size of the training cases, axis by axis", inputs, NNUNET)
    return Why("every image is resampled to the median voxel size of the training cases, axis by axis; but the axis of thick "
               "slices (over 3 times as coarse as the others, with under a third as many voxels) takes the 10th percentile of "
               "its spacings, so that the cases with thinner slices are not blurred", inputs, NNUNET)


def sized_whys(
    sized: Sized, configuration: Configuration, recipe: rules.Recipe, memory_gb: float, cases: int, spacing: Why
) -> dict[str, Why]:
    """The reasons of what follows from spacing, size and memory."""
    dims = configuration.dims
    layout = sized.fitted.topology
    mm = numbers(sized.spacing)
    return {
        "spacing": spacing,
        "median_shape": Why(
            "the median size of the training images in voxels, cropped to where they are not zero and resampled to the spacing",
            {"cases": cases, "spacing mm": mm}, NNUNET),
        "patch_size": _patch_why(sized, recipe, memory_gb),
        "batch_size": _batch_why(sized, recipe, memory_gb, cases),
        "strides": _strides_why(layout, mm),
        "kernel_sizes": Why(
            "convolutions reach over 3 voxels along each axis, but over 1 along an axis whose voxels are, at that stage, still "
            "at least twice as long as the shortest", {"spacing mm": mm}, NNUNET),
        "features_per_stage": Why(
            f"{rules.BASE_FEATURES} feature maps at full size, twice as many at each further stage, at most "
            f"{rules.MAX_FEATURES[dims]} in {dims}D", {"stages": len(layout.strides)}, NNUNET),
        **network_whys(recipe.network, len(layout.strides)),
    }


def network_whys(network: rules.Network, stages: int) -> dict[str, Why]:
    """The reasons of the kind of network and the length of its stages."""
    if network == "unet":
        encoder, decoder, source = "two convolutions at every stage down", "two convolutions at every stage back up", NNUNET
    else:
        encoder = "residual blocks per stage: 1, 3, 4, then 6, since deep stages cost little"
        decoder, source = "one convolution at every stage back up; the encoder does most of the work", PRESETS
    return {
        "network": Why(NETWORK_WORDS[network], {}, source),
        "blocks_per_stage": Why(encoder, {"stages": stages}, source),
        "decoder_blocks_per_stage": Why(decoder, {"stages": stages}, source),
        "checkpointing": Why("everything that the backward pass needs is kept in memory; nothing is computed twice", {}, source),
    }


def _patch_why(sized: Sized, recipe: rules.Recipe, memory_gb: float) -> Why:
    fitted, layout = sized.fitted, sized.fitted.topology
    dims = len(layout.patch_size)
    shape = f"about {'cubic' if dims == 3 else 'square'} in mm and no larger than the median image"
    multiples = "edges are rounded up to what the network can halve"
    if fitted.steps:
        rule = (f"the largest patch that goes with the memory target: beginning with one that is {shape}, the axis that covers "
                f"most of the image is made shorter, step by step, until what training keeps in between (activations) fits; "
                f"{multiples}")
    else:
        rule = (f"the largest patch that is {shape}; what training keeps in between (activations) fits the memory target, so "
                f"that nothing had to be made shorter; {multiples}")
    if not fitted.fits:
        rule += "; even the smallest patch is above the target"
    return Why(rule, {
        "first patch": numbers(fitted.start), "steps": fitted.steps, "multiples of": list(layout.divisor),
        "activations in millions": number(round(fitted.elements / 1e6, 1)),
        "allowed in millions": number(round(recipe.largest(dims, memory_gb) / 1e6, 1)), "memory target GB": number(memory_gb),
        "share of the median image in a patch": percent(sized.coverage),
    }, NNUNET)


def _batch_why(sized: Sized, recipe: rules.Recipe, memory_gb: float, cases: int) -> Why:
    limits = sized.batch
    share = f"{recipe.batch_share:.0%} of all voxels of the training cases"
    rule = {
        "memory": f"as many patches as go with the memory target; {share} would allow more",
        "share": f"as many patches as together hold {share}, so that a step does not see the same images over and over; the "
                 "memory target would allow more",
        "minimum": f"the smallest useful batch, {rules.MIN_BATCH}: "
                   + ("the memory target" if limits.memory < rules.MIN_BATCH else share) + " would allow fewer",
    }[limits.limit]
    return Why(rule, {
        "memory allows": limits.memory, "data allow": limits.share, "at least": rules.MIN_BATCH, "limited by": limits.limit,
        "memory target GB": number(memory_gb), "cases": cases,
    }, NNUNET)


def _strides_why(layout: rules.Topology, mm: list[float | int]) -> Why:
    inputs = {"patch": list(layout.patch_size), "spacing mm": mm, "stages": len(layout.strides),
              "voxels at the lowest stage": list(layout.bottleneck)}
    if layout.tiny:
        return Why("the image is too small for the usual rule, so it is halved once: a network has at least two stages", inputs,
                   "rule of autoseg for tiny images")
    return Why("each stage halves the axes that have 8 voxels or more (12 where it is one axis) and whose voxels are under "
               "twice as long as the shortest of them, so that voxels become cubic on the way down; it ends where nothing can be "
               "halved so", inputs, NNUNET)


def normalization_whys(
    words: tuple[str, ...], relative_size: float, schemes: tuple[str, ...]
) -> dict[str, Why]:
    """The reasons of each channel's normalisation; `words` say per channel by what it was chosen."""
    meaning = []
    if "CTNormalization" in schemes:
        meaning.append("CT has a physical scale (HU), so all cases share one: clipped to the 0.5 and 99.5 percentiles of the "
                       "labelled voxels, less their mean, divided by their standard deviation")
    if "ZScoreNormalization" in schemes:
        meaning.append("images without a physical scale (MR and others) are each brought to mean 0 and standard deviation 1")
    if {"RescaleTo01Normalization", "RGBTo01Normalization"} & set(schemes):
        meaning.append("values are scaled to 0 to 1")
    if "NoNormalization" in schemes:
        meaning.append("values stay as they are")
    return {
        "normalization": Why("; ".join(meaning), {f"channel {i}": word for i, word in enumerate(words)}, NNUNET),
        "use_mask_for_norm": Why(
            "z-scores leave out the empty surroundings where cropping to nonzero leaves less than 75% of the median image; "
            "other normalisations never do", {"left after cropping": percent(relative_size), "threshold": "75%"}, NNUNET),
    }


def mirror_why(pair: LeftRight | None, axes: tuple[int, ...] | None, dims: int) -> Why:
    """Why patches may be flipped along `axes` of a configuration (None: all)."""
    every = "flipped copies along every axis are used in training and averaged in prediction"
    if pair is None:
        return Why(f"{every}: no label is the left or right twin of another", {}, NNUNET)
    inputs = {"pairs": [" / ".join(names) for names in pair.pairs], "axis from left to right": AXES[pair.axis],
              "confirmed by position": pair.confirmed}
    if axes is None:
        return Why(f"{every}: there are left and right labels, but its {dims}D patches do not extend along that axis", inputs,
                   MIRROR_SOURCE)
    return Why(f"a flipped image would show left labels on the right: {pair.text}", inputs, MIRROR_SOURCE)


def inherited_whys(parent: str, whys: Mapping[str, Why]) -> dict[str, Why]:
    """The reasons of a configuration that takes its values from another."""
    return {name: Why(f"as {parent}, from which it inherits", {}, why.source) for name, why in whys.items()}


def link_whys(configuration: Configuration) -> dict[str, Why]:
    """The reasons of the links between configurations."""
    following, before, parent = configuration.next_stage, configuration.previous_stage, configuration.inherits_from
    return {
        "next_stage": Why(f"{following} goes on from its result" if following else "no other configuration goes on from it"),
        "previous_stage": Why(f"the segmentation of {before} is part of its input, one channel per label"
                              if before else "its input is the image alone"),
        "inherits_from": Why(f"all but its input is as in {parent}" if parent else "every value is its own"),
    }


def presence_whys(
    full: Sized | None, coarse: rules.LowRes | None, slices: float, wanted: Iterable[str], names: Iterable[str]
) -> dict[str, Why]:
    """Why the plan holds each configuration, or does not; `full` is None where images have one slice."""
    whys = {"2d": Why("always planned: learning slice by slice is at its best where slices are much thicker than their pixels, "
                      "and cross-validation decides which configuration is used",
                      {"slices of the median image": number(slices)}, NNUNET)}
    if full is None:
        alone = Why("the images have one slice, so nothing is seen across slices", {"slices of the median image": 1}, NNUNET)
        whys |= dict.fromkeys(("3d_fullres", "3d_lowres", "3d_cascade_fullres"), alone)
    else:
        whys["3d_fullres"] = Why("the images have more than one slice, so a network that sees all three axes is planned",
                                 {"slices of the median image": number(slices)}, NNUNET)
        low, cascade = _low_res_why(full, coarse)
        whys |= {"3d_lowres": low, "3d_cascade_fullres": cascade}
    asked = set(wanted)
    return {name: whys[name] if name in asked else Why("not asked for", {"asked for": sorted(asked)}) for name in names}


def _low_res_why(full: Sized, coarse: rules.LowRes | None) -> tuple[Why, Why]:
    share = full.fitted.voxels / math.prod(full.median_shape)
    inputs: dict[str, Any] = {"share of the median image in a 3d_fullres patch": percent(min(share, 1.0)), "threshold": "25%"}
    if coarse is None:
        enough = "a 3d_fullres patch sees at least a quarter of the median image, so a coarser configuration would add little"
        return Why(enough, inputs, NNUNET), Why(f"needs 3d_lowres, which is not planned: {enough}", inputs, NNUNET)
    inputs["times fewer voxels at low resolution"] = number(round(coarse.gain, 2))
    if not coarse.worthwhile:
        close = ("a 3d_fullres patch sees less than a quarter of the median image, but the resolution at which it would see that "
                 "much has less than 2 times fewer voxels, too little to pay for a further network")
        return Why(close, inputs, NNUNET), Why(f"needs 3d_lowres, which is not planned: {close}", inputs, NNUNET)
    return (
        Why("a 3d_fullres patch sees less than a quarter of the median image, so a network that sees more of it, less sharply, "
            "is planned too", inputs, NNUNET),
        Why("a second network refines the result of 3d_lowres at full resolution, for both overview and detail", inputs, NNUNET),
    )


def low_res_spacing_why(full: Sized, coarse: rules.LowRes) -> Why:
    """Why images are resampled to the spacing of 3d_lowres."""
    factors = [b / a for a, b in zip(full.spacing, coarse.spacing, strict=True)]
    share = coarse.fitted.voxels / coarse.voxels
    return Why("the spacing of 3d_fullres, made coarser by 3% at a time (first the axes under half the coarsest spacing, then "
               "all), until a patch sees a quarter of the median image",
               {"3d_fullres spacing mm": numbers(full.spacing), "coarser by a factor of": numbers(round(f, 2) for f in factors),
                "share of the median image in a patch": percent(share), "threshold": "25%"}, NNUNET)


def batch_dice_why(name: str, full: Sized | None, coarse: rules.LowRes | None) -> Why:
    """Why the Dice loss is taken over the batch as a whole, or patch by patch."""
    if name == "2d":
        return Why("the Dice loss takes all slices of a step as one image, since a slice may hold nothing of a label", {}, NNUNET)
    assert full is not None  # there are 3D configurations
    share = {"share of the median image in a 3d_fullres patch": percent(full.coverage)}
    if name == "3d_lowres" or coarse is None or not coarse.worthwhile:
        return Why("the Dice loss is taken patch by patch, since a patch sees so much of the image that most labels are in it",
                   {} if name == "3d_lowres" else share, NNUNET)
    return Why("the Dice loss takes all patches of a step as one image, since a patch sees a small part of the image and may "
               "hold nothing of a label", share, NNUNET)


def general_whys(
    planner: str, recipe: rules.Recipe, asked_gb: float | None, as_stored: bool, named: bool,
    spacing_zyx_mm: rules.Floats, cases: int,
) -> dict[str, Why]:
    """The reasons of what all configurations share."""
    own = {"the planner's own target GB": number(recipe.memory_gb)}
    turned = ("images stay as their files store them: the fingerprint does not say how they lie in the body" if as_stored else
              "every image is turned so that its axes run towards head, back and left of the body (as far as its file says), and "
              "masks are turned back: what lies left in one case lies left in all")
    return {
        "dataset_name": Why("the name that the data set came with"),
        "planner": Why("the planner that was asked for; 'default' where none is", {"network": recipe.network}),
        "gpu_memory_gb": Why("the planner's own target, as no other was asked for" if asked_gb is None
                             else "the GPU memory that was asked for", own),
        "orientation": Why(turned, {}, NNUNET if as_stored else "rule of autoseg"),
        "transpose_forward": Why(
            "the axis with the longest voxels goes first and the others keep their order, so that slices are cut where images "
            "are sharp; of equal ones the first stays", {"spacing mm (z, y, x)": numbers(spacing_zyx_mm)}, NNUNET),
        "channels": Why("as the data set names them" if named else "the data set names none, so they are numbered"),
        "labels": Why("as the data set declares them, or as its label files hold them"),
        "intensities": Why("measured on voxels inside the labels, all training cases together; normalisation of CT uses them, "
                           "in training and on new images alike", {"cases": cases}, NNUNET),
        "resampling": Why("cubic splines keep images sharp; logits and labels are interpolated linearly", {}, NNUNET),
        "arithmetic": Why("logits of overlapping tiles are added up without rounding"),
        "precision": Why("memory is planned for 16-bit arithmetic, which training uses where the hardware has it"),
        "time_budget_s": Why("no time budget was given, so training has its full length"),
    }
