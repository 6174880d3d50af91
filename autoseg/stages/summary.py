"""Records told in words and tables, for the command line."""

from __future__ import annotations

from collections.abc import Sequence

from autoseg.types.dataset import Dataset, Split
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Plan
from autoseg.types.report import Selection

Rows = list[list[str]]


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def describe_plan(dataset: Dataset, fingerprint: Fingerprint, plan: Plan, splits: Sequence[Split]) -> tuple[list[str], Rows]:
    """Sentences about data and folds, and one table row per configuration."""
    groups = {case.group for case in dataset.cases if case.group is not None}
    grouped = f", {len(groups)} groups from {dataset.groups_from} kept together" if groups else ""
    facts = [
        f"{dataset.name}: {len(dataset.cases)} cases, channels {', '.join(dataset.channels)}, "
        f"labels {_listed([name for name, _ in dataset.labels.targets])}",
        f"{len(splits)} folds of {' '.join(str(len(split.val)) for split in splits)} validation cases{grouped}",
        *plan.notes,
    ]
    if groups:
        members = sorted(groups)[:3]
        shown = "; ".join(f"{g}: {', '.join(c.case for c in dataset.cases if c.group == g)}" for g in members)
        facts.append(f"groups, for example {shown} (--groups none turns this off)")
    rows = [["configuration", "patch", "batch", "spacing mm", "median size", "stages", "features", "normalization"]]
    for name, c in plan.configurations.items():
        rows.append(
            [
                name,
                "x".join(map(str, c.patch_size)),
                str(c.batch_size),
                " x ".join(f"{s:.3g}" for s in c.spacing),
                "x".join(f"{s:.0f}" for s in c.median_shape),
                str(len(c.strides)),
                f"{c.features_per_stage[0]} to {c.features_per_stage[-1]}",
                ", ".join(dict.fromkeys(n.removesuffix("Normalization") for n in c.normalization)),
            ]
        )
    return facts, rows


def describe_selection(selection: Selection) -> tuple[list[str], Rows]:
    """What was chosen and why, and one table row per candidate."""
    rows = [["runs", "foreground mean Dice", "networks", "cost"]]
    for candidate in selection.candidates:
        dice = "-" if candidate.foreground_mean_dice is None else f"{candidate.foreground_mean_dice:.4f}"
        rows.append([" + ".join(candidate.runs), dice, str(candidate.networks), candidate.cost])
    facts = [
        f"selected: {' + '.join(selection.runs)}, by {selection.cases} validation cases of folds "
        + ", ".join(map(str, selection.folds))
    ]
    for trial in selection.postprocessing_tried:
        if trial.before is not None and trial.after is not None:
            facts.append(f"{trial.name}: Dice {trial.before:.4f} -> {trial.after:.4f}, {'kept' if trial.kept else 'dropped'}")
    if selection.note:
        facts.append(selection.note)
    return facts, rows
