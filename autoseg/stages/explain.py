"""Explain: the plan told in words, section by section, each value with the rule and the numbers that made it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from autoseg.files.workspace import Workspace
from autoseg.planners.reasons import NNUNET, percent
from autoseg.stages.forecast import coverage, peak_gb
from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.geometry import NO_DEPTH_MM
from autoseg.types.plan import Configuration, Plan, Reason

WIDTH = 118
NO_REASON = "no reason was recorded for it; autoseg plan --replan makes a plan with reasons"
MOST_LABELS = 12
ASKED_LATER = "time_budget_s"  # may be set by a command after planning, which is no edit
TITLES = {
    "inherits_from": "Inherits from", "previous_stage": "Input from", "next_stage": "Continued by",
    "spacing": "Voxel size", "median_shape": "Image size", "patch_size": "Patch", "batch_size": "Batch",
    "normalization": "Intensities", "use_mask_for_norm": "Empty surroundings", "mirror_axes": "Mirroring",
    "batch_dice": "Dice loss", "network": "Network", "strides": "Halving", "kernel_sizes": "Kernels",
    "features_per_stage": "Feature maps", "blocks_per_stage": "Way down", "decoder_blocks_per_stage": "Way up",
    "checkpointing": "Recomputing",
}
SHARED = ("normalization", "use_mask_for_norm")  # told once, and again where a configuration differs
QUIET = ("previous_stage", "next_stage", "inherits_from", "checkpointing")  # told only where there is one
ORIENTATIONS = {
    "LPS": "turned to one orientation (head, back, left)", "RAS": "turned to one orientation (head, front, right)",
    "as_stored": "as stored",
}
NETWORKS = {"unet": "U-Net", "residual-unet": "U-Net with residual encoder"}
NORMALIZATION_WORDS = {
    "ZScoreNormalization": "z-score of each image", "CTNormalization": "CT scale, the same for all images",
    "NoNormalization": "left as they are", "RescaleTo01Normalization": "scaled to 0 to 1 by each image's range",
    "RGBTo01Normalization": "colours scaled to 0 to 1",
}


def explain(workspace: Workspace) -> str:
    """The plan of a work folder in words. Raises RecordError when there is no valid plan; data are told where they are known."""
    plan = workspace.plan()
    dataset = workspace.dataset() if workspace.dataset_path.exists() else None
    fingerprint = workspace.fingerprint() if workspace.fingerprint_path.exists() else None
    return explain_plan(plan, dataset, fingerprint)


def explain_plan(plan: Plan, dataset: Dataset | None = None, fingerprint: Fingerprint | None = None) -> str:
    """A plan in words, without files: plain text, at most 118 characters wide but for tables."""
    teller = _Teller(plan)
    sections = [
        [*_wrapped(f"The plan for {plan.dataset_name}, by the planner {plan.planner!r} for {plan.gpu_memory_gb:g} GB of GPU "
                   "memory", ""), "",
         *_wrapped(f"Rules are those of {NNUNET} unless [another source] is named. Sizes are in the order z, y, x (slices, rows, "
                   "columns)" + ("." if plan.transpose_forward == (0, 1, 2) else ", after the axes were put into the order told "
                                 "below."), "")],
        ["THE DATA", *_data(plan, dataset, fingerprint, teller)],
        ["WHAT IS TRAINED", *text_table(overview_rows(plan), "  "), "", *teller.presence()],
        ["FOR ALL CONFIGURATIONS", *teller.shared()],
        *([f"CONFIGURATION {name}", *teller.configuration(name)] for name in plan.configurations),
    ]
    if changed := edited(plan):
        sections.append(["SET BY HAND SINCE PLANNING", *(f"  {path}: {shown(now)} (planned: {shown(planned)})"
                                                         for path, (planned, now) in changed.items())])
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def edited(plan: Plan) -> dict[str, tuple[Any, Any]]:
    """Paths whose value is no longer the planned one, with (planned, now); a configuration that was removed is now False."""
    data = plan.model_dump(mode="json", exclude={"reasons"})
    found = {}
    for path, reason in plan.reasons.items():
        head, _, rest = path.partition(".")
        name, _, field = rest.partition(".")
        if head == "configurations" and not field:
            now: Any = name in plan.configurations
        elif head == "configurations":
            if name not in plan.configurations:
                continue
            now = data[head][name].get(field)
        else:
            now = data.get(path)
        if now != reason.value and path != ASKED_LATER:
            found[path] = (reason.value, now)
    return found


def shown(value: Any) -> str:
    """A value of a plan or of a reason in a line of text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {shown(inside)}" for key, inside in value.items())
    if isinstance(value, list | tuple):
        if value and all(isinstance(inside, int | float) and not isinstance(inside, bool) for inside in value):
            return (" x " if len(value) <= 3 else ", ").join(shown(inside) for inside in value)
        return ", ".join(shown(inside) for inside in value) or "none"
    return str(value)


def why(reason: Reason) -> str:
    """The rule of a reason, with its source where that is not the usual one, as a sentence."""
    source = f" [{reason.source}]" if reason.source not in ("", NNUNET) else ""
    return f"{reason.rule}{source}."


def text_table(rows: Sequence[Sequence[str]], indent: str) -> list[str]:
    """Rows of text, the first a heading, as aligned lines."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _wrapped(text: str, indent: str, first: str | None = None) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent if first is None else first, subsequent_indent=indent,
                         break_long_words=False, break_on_hyphens=False)


def _item(title: str, value: str, reasons: Iterable[str]) -> list[str]:
    lines = _wrapped(f"{title}: {value}", " " * 6, " " * 2)
    for reason in reasons:
        lines += _wrapped(reason, " " * 6)
    return lines


class _Teller:
    """Tells the values of one plan; a rule that was told before is referred to, with the numbers it has this time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.edited = edited(plan)
        self.told: dict[str, str] = {}

    def reasons(self, path: str) -> list[str]:
        """What is to be said below a value."""
        reason = self.plan.reasons.get(path)
        if path in self.edited:
            return [f"Set by hand (planned: {shown(self.plan.reasons[path].value)})."]
        if path == ASKED_LATER and self.plan.time_budget_s is not None:
            return ["Why: it was asked for."]
        if reason is None:
            handmade = self.plan.reasons and path.startswith("configurations.")
            return ["Set by hand."] if handmade else [f"Why: {NO_REASON}."]
        numbers = [f"From: {shown(reason.inputs)}."] if reason.inputs else []
        name = path.split(".")[1] if path.count(".") == 2 else ""
        before = self.told.setdefault(reason.rule, name)
        if name and before not in ("", name):
            return [f"Why: as for {before}.", *numbers]
        return [f"Why: {why(reason)}", *numbers]

    def presence(self) -> list[str]:
        """Which configurations there are, and why the others are not; those of one reason together."""
        known = [path.split(".")[1] for path in self.plan.reasons if path.count(".") == 1 and path.startswith("configurations.")]
        told: list[tuple[str, str, tuple[str, ...]]] = []
        for name in dict.fromkeys([*self.plan.configurations, *known]):
            there, path = name in self.plan.configurations, f"configurations.{name}"
            if path in self.edited:
                told.append((name, "added by hand" if there else "removed by hand", ()))
            elif path not in self.plan.reasons and self.plan.reasons:
                told.append((name, "made by hand", ()))
            else:
                told.append((name, "yes" if there else "no", tuple(self.reasons(path))))
        lines = []
        for (value, reasons), rows in groupby(told, key=lambda row: row[1:]):
            lines += _item(", ".join(row[0] for row in rows), value, reasons)
        return lines

    def shared(self) -> list[str]:
        """What does not differ from one configuration to the next."""
        plan = self.plan
        kept = "kept as z, y, x" if plan.transpose_forward == (0, 1, 2) else ", ".join("zyx"[a] for a in plan.transpose_forward)
        turned = ORIENTATIONS[plan.orientation]
        lines = _item("Memory planned for", f"{plan.gpu_memory_gb:g} GB", self.reasons("gpu_memory_gb"))
        lines += _item("Arithmetic", plan.precision, self.reasons("precision"))
        lines += _item("Orientation", turned, self.reasons("orientation"))
        lines += _item("Order of the axes", kept, self.reasons("transpose_forward"))
        for name in list(plan.configurations)[:1]:
            for field in SHARED:
                lines += self.field(name, field)
        if "CTNormalization" in {scheme for c in plan.configurations.values() for scheme in c.normalization}:
            for channel, measured in zip(plan.channels, plan.intensities, strict=False):
                lines += _item(f"Measured in {channel}", (
                    f"mean {measured.mean:.5g}, standard deviation {measured.std:.5g}, 0.5 and 99.5 percentiles "
                    f"{measured.percentile_00_5:.5g} and {measured.percentile_99_5:.5g}"), self.reasons("intensities"))
        hours = "none" if plan.time_budget_s is None else f"{plan.time_budget_s / 3600:.3g} hours for all folds"
        return lines + _item("Time budget", hours, self.reasons("time_budget_s"))

    def configuration(self, name: str) -> list[str]:
        """All values of one configuration; of one that inherits, those that differ or were set by hand."""
        own = self.plan.configurations[name]
        parent = self.plan.configurations.get(own.inherits_from or "")
        first = next(iter(self.plan.configurations.values()))
        lines: list[str] = []
        for field in TITLES:
            value = getattr(own, field)
            by_hand = f"configurations.{name}.{field}" in self.edited
            inherited = parent is not None and getattr(parent, field) == value
            as_first = field in SHARED and value == getattr(first, field)
            empty = field in QUIET and not value
            if by_hand or not (inherited or as_first or empty):
                lines += self.field(name, field)
            if field == "network" and not inherited:
                lines += text_table(stage_rows(own), " " * 6)
        return lines

    def field(self, name: str, field: str) -> list[str]:
        """One value of a configuration with its reason."""
        own = self.plan.configurations[name]
        return _item(TITLES[field], _value(own, field, self.plan), self.reasons(f"configurations.{name}.{field}"))


def _value(own: Configuration, field: str, plan: Plan) -> str:
    value = getattr(own, field)
    stages = len(own.strides)
    mm = [edge * size for edge, size in zip(own.patch_size, own.spacing, strict=True)]
    words: dict[str, Callable[[], str]] = {
        "spacing": lambda: f"{' x '.join(f'{size:.5g}' for size in own.spacing)} mm",
        "median_shape": lambda: f"{shown(value)} voxels in the median case",
        "patch_size": lambda: (f"{shown(value)} voxels ({' x '.join(f'{edge:.0f}' for edge in mm)} mm), "
                               f"{percent(coverage(own))} of the median image"),
        "batch_size": lambda: f"{value} patches per training step",
        "network": lambda: f"{NETWORKS.get(value.kind, value.kind)} with {stages} stages",
        "strides": lambda: f"from {shown(own.patch_size)} voxels at stage 1 to {shown(_edges(own)[-1])} at stage {stages}",
        "kernel_sizes": lambda: ", ".join(dict.fromkeys(_times(row) for row in value)) + " (see the table)",
        "features_per_stage": lambda: f"{value[0]} to {value[-1]}",
        "blocks_per_stage": lambda: ", ".join(map(str, value)),
        "decoder_blocks_per_stage": lambda: ", ".join(map(str, value)),
        "batch_dice": lambda: "over the whole batch" if value else "patch by patch",
        "normalization": lambda: "; ".join(f"{channel}: {NORMALIZATION_WORDS.get(scheme, scheme)}"
                                           for channel, scheme in zip(plan.channels, value, strict=True)),
        "use_mask_for_norm": lambda: "left out of z-scores" if any(value) else "not treated apart",
        "mirror_axes": lambda: ("along all axes" if value is None else
                                f"along {' and '.join(_axis(axis, own, plan) for axis in value) or 'no axis'} only"),
        "checkpointing": lambda: f"{value} finest stages are computed again in the backward pass" if value else "nothing",
    }
    return words[field]() if field in words else shown(value)


def _axis(axis: int, own: Configuration, plan: Plan) -> str:
    return "zyx"[plan.transpose_forward[axis + 3 - own.dims]]


def _times(edges: Iterable[int]) -> str:
    return "x".join(map(str, edges))


def _edges(own: Configuration) -> list[list[int]]:
    edges, rows = list(own.patch_size), []
    for stride in own.strides:
        edges = [edge // step for edge, step in zip(edges, stride, strict=True)]
        rows.append(edges)
    return rows


def stage_rows(own: Configuration) -> list[list[str]]:
    """The stages of a network as a table: size and number of feature maps, what is halved, kernels, and units down and up."""
    unit = "residual blocks" if own.network.kind == "residual-unet" else "convolutions"
    rows = [["stage", "size of the maps", "divided by", "kernel", "feature maps", f"{unit} down", "convolutions up"]]
    for stage, edges in enumerate(_edges(own)):
        up = str(own.decoder_blocks_per_stage[stage]) if stage < len(own.decoder_blocks_per_stage) else "-"
        rows.append([str(stage + 1), _times(edges), _times(own.strides[stage]), _times(own.kernel_sizes[stage]),
                     str(own.features_per_stage[stage]), str(own.blocks_per_stage[stage]), up])
    return rows


def overview_rows(plan: Plan) -> list[list[str]]:
    """A heading and one row per configuration: what it sees at once, and what it needs."""
    rows = [["configuration", "voxel size mm", "patch", "of the median image", "batch", "stages", "peak memory in training"]]
    for name, own in plan.configurations.items():
        peak = peak_gb(plan, own)
        rows.append([name, " x ".join(f"{size:.3g}" for size in own.spacing), _times(own.patch_size), percent(coverage(own)),
                     str(own.batch_size), str(len(own.strides)), "-" if peak is None else f"{peak:.1f} GB predicted"])
    return rows


def _data(plan: Plan, dataset: Dataset | None, fingerprint: Fingerprint | None, teller: _Teller) -> list[str]:
    names = [name for name, _ in plan.labels.targets]
    listed = ", ".join(names[:MOST_LABELS]) + (f" and {len(names) - MOST_LABELS} more" if len(names) > MOST_LABELS else "")
    lines = _item("Cases", str(len(dataset.cases)), []) if dataset is not None else []
    lines += _item("Channels", ", ".join(plan.channels), teller.reasons("channels"))
    lines += _item("Regions" if plan.labels.regions else "Labels", f"{len(names)} ({listed})", teller.reasons("labels"))
    if fingerprint is not None and fingerprint.cases:
        lines += _measured(fingerprint)
    for note in plan.notes:
        lines += _item("Note", note, [])
    return lines


def _measured(fingerprint: Fingerprint) -> list[str]:
    cases = fingerprint.cases
    flat = all(case.spacing[0] >= NO_DEPTH_MM for case in cases)
    axes = range(1, 3) if flat else range(3)
    ranges = []
    for values in ([case.shape for case in cases], [case.spacing for case in cases]):
        low, high = ([edge(row[axis] for row in values) for axis in axes] for edge in (min, max))
        ranges.append(shown(low) if low == high else f"{shown(low)} to {shown(high)}")
    sizes, spacings = ranges
    share = fingerprint.median_relative_size_after_cropping
    return [
        *_item("Images", f"{sizes} voxels of {spacings} mm, axis by axis", []),
        *_item("Cropping to nonzero", f"leaves {share:.0%} of the median image", []),
    ]
