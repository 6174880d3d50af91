"""The planner `fit`: patch and batch so that the predicted peak memory of a training step fills a stated budget.

Spacing, topology, normalisation and mirroring are the default planner's. What differs: memory is predicted byte by byte
(networks/memory.py) instead of compared with a reference, so that a card of any size is used as far as it goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from autoseg.networks.memory import Precision
from autoseg.planners import default, reasons, rules
from autoseg.planners.oddities import size_oddities
from autoseg.planners.reasons import Why
from autoseg.planners.search import (
    ALLOCATOR_SHARE,
    CONTEXT_GB,
    DATA_SHARE,
    GB,
    RECOMPUTE_COST,
    RECOMPUTE_COVERAGE,
    RECOMPUTE_GAIN,
    Card,
    Choice,
    Search,
)
from autoseg.planners.symmetry import left_right, mirror_axes
from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Configuration, Plan

FALLBACK_GB = 8.0
SIZING_NOTES = ("2d: ", "3d_fullres: ", "3d_lowres: ", "a 3d_fullres patch")  # of the default planner, on its own sizes
LOW_RES_HEADROOM = 1.2  # over the voxels expected from memory per voxel, where the search for a coarser spacing begins
SOURCE = "memory model of autoseg"


def plan(
    dataset: Dataset, fingerprint: Fingerprint, gpu_memory_gb: float | None = None, *,
    configurations: Sequence[str] = default.CONFIGURATIONS, precision: Precision = "bf16", network: rules.Network = "unet",
) -> Plan:
    """Plan for a GPU with `gpu_memory_gb` (2**30 bytes each; 8 if None) on which training computes in `precision`.

    A larger budget never gives a configuration a smaller patch, nor its batch fewer voxels; `3d_lowres` apart, whose spacing
    changes too. Raises PlanError as the default planner does.
    """
    memory_gb = FALLBACK_GB if gpu_memory_gb is None else float(gpu_memory_gb)
    default.check_inputs(dataset, fingerprint, memory_gb, configurations)
    base = default.plan_with(default.RECIPE, "fit", dataset, fingerprint, memory_gb, default.CONFIGURATIONS)
    labels = dataset.labels
    card = Card(memory_gb, precision, network, len(dataset.channels), labels.output_count, bool(labels.regions),
                labels.ignore is not None)
    sizer = _Sizer(base, card, default.case_count(dataset, fingerprint))
    sizer.size(configurations)
    notes = [note for note in base.notes if not note.startswith(SIZING_NOTES)]
    if gpu_memory_gb is None:
        notes.append(f"no GPU memory was given or found, so this plan is for {FALLBACK_GB:g} GB")
    sides = left_right(dataset, fingerprint)
    kept = {name: made.model_copy(update={"mirror_axes": mirror_axes(sides, base.transpose_forward, made.patch_size)})
            for name, made in default.keep(sizer.made, configurations).items()}
    odd = size_oddities(kept, sizer.dataset_voxels)
    made = base.model_copy(update={"configurations": kept, "notes": (*notes, *sizer.notes, *odd), "precision": precision})
    return reasons.attach(made, sizer.every_why(made, gpu_memory_gb))


class _Sizer:
    """Sizes every configuration that suits the data of a plan, and knows why."""

    def __init__(self, base: Plan, card: Card, cases: int) -> None:
        self.base, self.card, self.cases = base, card, cases
        self.made: dict[str, Configuration] = {}
        self.whys: dict[str, dict[str, Why]] = {}
        self.presence: dict[str, Why] = {}
        self.notes: list[str] = []
        self.dataset_voxels = 0.0

    def size(self, wanted: Sequence[str]) -> None:
        """Make the configurations; those that are not wanted are made too where others depend on them."""
        flat, template = self.base.configurations["2d"], self.base.configurations.get("3d_fullres")
        shape = template.median_shape if template is not None else (1.0, *flat.median_shape)
        dataset_voxels = self.dataset_voxels = math.prod(shape) * self.cases
        choice = Search(self.card, flat).choose(dataset_voxels)
        self._add("2d", choice, self._spacing_why("2d"), True, reasons.batch_dice_why("2d", None, None))
        full: reasons.Sized | None = None
        coarse: tuple[rules.LowRes, Choice] | None = None
        if template is not None:
            choice = Search(self.card, template).choose(dataset_voxels)
            coarse = self._low_res(template, choice)
            cascaded = coarse is not None and coarse[0].worthwhile
            if cascaded and "3d_cascade_fullres" in wanted:  # it inherits the patch, and sees one more channel per label
                seen = replace(self.card, channels=self.card.channels + len(self.base.labels.foreground))
                choice = Search(seen, template).choose(dataset_voxels)
            full = _sized(choice)
            low = coarse[0] if coarse is not None else None
            self._add("3d_fullres", choice, self._spacing_why("3d_fullres"), cascaded,
                      reasons.batch_dice_why("3d_fullres", full, low))
            if coarse is not None and cascaded:
                self._add_cascade(full, *coarse)
        self.presence = reasons.presence_whys(full, coarse[0] if coarse is not None else None, shape[0], wanted,
                                              default.CONFIGURATIONS)

    def every_why(self, made: Plan, asked_gb: float | None) -> dict[str, Why]:
        """The reasons of the whole plan by path."""
        mine = [path for path in self.base.reasons if not path.startswith("configurations.")]
        whys = {path: self._base_why(path) for path in mine}
        given = "the GPU memory that was given, or was free on this machine's card"
        whys["gpu_memory_gb"] = Why(
            (given if asked_gb is not None else f"no GPU memory was given or found, so {FALLBACK_GB:g} GB are taken")
            + "; tensors may take what is left after the CUDA context and a share for the allocator's gaps",
            {"context GB": CONTEXT_GB, "allocator's share": reasons.percent(ALLOCATOR_SHARE),
             "for tensors GB": _gb(self.card.usable)}, SOURCE)
        whys["precision"] = Why("activations are counted in this precision; in fp32 they take twice as much as in bf16 or fp16",
                                {}, SOURCE)
        whys["planner"] = Why("the planner that was asked for", {"network": self.card.network})
        for name, presence in self.presence.items():
            whys[f"configurations.{name}"] = presence
            if name in made.configurations:
                own = {**self.whys[name], **reasons.link_whys(made.configurations[name])}
                whys |= {f"configurations.{name}.{field}": own[field] for field in Configuration.model_fields}
        return whys

    def _low_res(self, template: Configuration, full: Choice) -> tuple[rules.LowRes, Choice] | None:
        """The coarser spacing at which a patch sees a quarter of the image; None where full resolution does so already."""
        if full.share >= rules.LOW_RES_COVERAGE or not full.fits:
            return None
        spacing, shape = np.asarray(template.spacing, np.float64), np.asarray(template.median_shape, np.float64)
        full_voxels, coarse = float(np.prod(shape)), spacing.copy()
        most = LOW_RES_HEADROOM * Search(self.card, template).expected_voxels
        while True:
            finer = coarse.max() / coarse > rules.SPACING_GAP
            coarse[finer if finer.any() else slice(None)] *= rules.LOW_RES_STEP
            exact = spacing / coarse * shape
            voxels = float(np.prod(exact))
            if most / voxels < rules.LOW_RES_COVERAGE:
                continue  # whatever patch fits here, it is too small: saves most of the search
            rounded = tuple(np.maximum(np.rint(exact), 1).tolist())
            search = Search(self.card, template.model_copy(update={"spacing": tuple(coarse.tolist()), "median_shape": rounded}))
            if search.covers(voxels, rules.LOW_RES_COVERAGE):
                break
        choice = search.choose(voxels * self.cases, recompute=False)
        fitted = rules.FittedPatch(choice.layout, 0, choice.fits)
        return rules.LowRes(tuple(coarse.tolist()), rounded, voxels, fitted, full_voxels / voxels), choice

    def _add_cascade(self, full: reasons.Sized, coarse: rules.LowRes, choice: Choice) -> None:
        share = reasons.percent(full.fitted.voxels / math.prod(full.median_shape))
        self.notes.append(f"a 3d_fullres patch covers {share} of the median image, "
                          "so its Dice is taken over the batch as a whole")
        self._add("3d_lowres", choice, reasons.low_res_spacing_why(full, coarse), False,
                  reasons.batch_dice_why("3d_lowres", full, coarse))
        self.made["3d_lowres"] = self.made["3d_lowres"].model_copy(update={"next_stage": "3d_cascade_fullres"})
        links = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        self.made["3d_cascade_fullres"] = self.made["3d_fullres"].model_copy(update=links)
        self.whys["3d_cascade_fullres"] = reasons.inherited_whys("3d_fullres", self.whys["3d_fullres"])

    def _add(self, name: str, choice: Choice, spacing_why: Why, batch_dice: bool, dice_why: Why) -> None:
        made = choice.configuration.model_copy(update={"batch_dice": batch_dice})
        recipe = rules.Recipe(self.card.network, self.card.memory_gb, 1, 1, DATA_SHARE, size_for_min_batch=True)
        source = "3d_fullres" if made.dims == 3 else "2d"
        as_planned = ("normalization", "use_mask_for_norm", "mirror_axes")
        self.made[name] = made
        self.whys[name] = {
            **reasons.sized_whys(_sized(choice), made, recipe, self.card.memory_gb, self.cases, spacing_why),
            **{field: self._base_why(f"configurations.{source}.{field}") for field in as_planned},
            "batch_dice": dice_why, "patch_size": _patch_why(choice, self.card),
            "batch_size": _batch_why(choice, self.card), "checkpointing": _checkpointing_why(choice),
        }
        if not choice.fits:
            self.notes.append(
                f"{name}: even the smallest patch {made.patch_size} is predicted to need {_gb(choice.peak)} GB in training, more "
                f"than the {_gb(self.card.usable)} GB that {self.card.memory_gb:g} GB leave for tensors"
            )

    def _spacing_why(self, name: str) -> Why:
        return self._base_why(f"configurations.{name}.spacing")

    def _base_why(self, path: str) -> Why:
        reason = self.base.reasons[path]
        return Why(reason.rule, reason.inputs, reason.source)


def _sized(choice: Choice) -> reasons.Sized:
    """The choice as the shared reasons take it."""
    made = choice.configuration
    limits = rules.BatchLimits(made.batch_size, choice.data_allows)
    return reasons.Sized(rules.FittedPatch(choice.layout, 0, choice.fits), limits, made.spacing, made.median_shape)


def _gb(size: float) -> float | int:
    return reasons.number(round(size / GB, 2))


def _memory_inputs(choice: Choice, card: Card) -> dict[str, Any]:
    return {"predicted peak GB": _gb(choice.peak), "for tensors GB": _gb(card.usable),
            "GPU memory GB": reasons.number(card.memory_gb), "precision": card.precision}


def _patch_why(choice: Choice, card: Card) -> Why:
    dims = choice.configuration.dims
    rule = (f"the largest patch, about {'cubic' if dims == 3 else 'square'} in mm and no larger than the median image (edges are "
            f"rounded up to what the network can halve), of which a training step with {rules.MIN_BATCH} is predicted to fit the "
            "memory")
    if choice.cost:
        rule += ", with the activations of the finest stages computed twice instead of kept"
    if not choice.fits:
        rule = "the smallest patch that the network can take; even this is predicted to need more memory than there is"
    return Why(rule, {
        **_memory_inputs(choice, card), "multiples of": list(choice.layout.divisor),
        "share of the median image in a patch": reasons.percent(_sized(choice).coverage),
    }, SOURCE)


def _batch_why(choice: Choice, card: Card) -> Why:
    data = f"{DATA_SHARE:.0%} of all voxels of the training cases"
    rule = {
        "memory": "as many patches as a training step is predicted to fit into the memory",
        "data": f"as many patches as together hold {data}, so that a step does not see the same images over and over; the memory "
                "would take more",
        "larger patch": "memory goes into a larger patch before it goes into a larger batch",
        "minimum": f"the smallest useful batch, {rules.MIN_BATCH}: {'the memory' if not choice.fits else data} would allow fewer",
    }[choice.limit]
    return Why(rule, {
        **_memory_inputs(choice, card), "data allow": choice.data_allows, "at least": rules.MIN_BATCH, "limited by": choice.limit,
    }, SOURCE)


def _checkpointing_why(choice: Choice) -> Why:
    gain, threshold = f"{RECOMPUTE_GAIN:g} times as large", f"{RECOMPUTE_COVERAGE:.0%} of the median image"
    if not choice.configuration.checkpointing:
        return Why("everything that the backward pass needs is kept in memory; nothing is computed twice, since the patch sees "
                   f"at least {threshold}, or would not become {gain} by it", {}, SOURCE)
    before = math.prod(choice.plain_patch) if choice.plain_patch else 0
    times = {"times the voxels": reasons.number(round(choice.voxels / before, 2))} if before else {}
    return Why("the activations of so many of the finest stages are not kept but computed again in the backward pass: the patch "
               f"would see less than {threshold}, and becomes at least {gain} by it, for at most {RECOMPUTE_COST:.0%} more "
               "arithmetic per voxel; in between, larger budgets keep the patch that this gave",
               {"patch without": list(choice.plain_patch), **times, "more arithmetic per voxel": reasons.percent(choice.cost)},
               SOURCE)
