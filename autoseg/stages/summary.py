"""Records told in words and tables, for the command line."""

from __future__ import annotations

from collections.abc import Sequence

from autoseg.stages.forecast import coverage, peak_gb
from autoseg.types.dataset import Dataset, Split
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Plan
from autoseg.types.selection import Gain, Selection

Rows = list[list[str]]

ABOVE, BELOW = 1.0, 0.8  # of the stated memory: outside, a training step's predicted peak is told


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
        *_memory_facts(plan),
    ]
    if groups:
        members = sorted(groups)[:3]
        shown = "; ".join(f"{g}: {', '.join(c.case for c in dataset.cases if c.group == g)}" for g in members)
        facts.append(f"groups, for example {shown} (--groups none turns this off)")
    rows = [["configuration", "patch", "batch", "spacing mm", "median size", "stages", "features", "normalization", "memory"]]
    for name, c in plan.configurations.items():
        peak = peak_gb(plan, c)
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
                "-" if peak is None else f"{peak:.1f} GB",
            ]
        )
    return facts, rows


def _memory_facts(plan: Plan) -> list[str]:
    """Where the predicted peak of a training step is far from the memory that the plan is said to be for."""
    stated = plan.gpu_memory_gb
    above, below = [], []
    for name, configuration in plan.configurations.items():
        peak = peak_gb(plan, configuration)
        if peak is None:
            continue
        if peak > stated * ABOVE:
            above.append(f"{name} {peak:.1f} GB")
        elif plan.planner != "fit" and peak < stated * BELOW and _limited_by_memory(plan, name):
            below.append(f"{name} {peak:.1f} GB")
    facts = []
    if above:
        facts.append(f"warning: planned for {stated:g} GB, but training is predicted to need more in {plan.precision}: "
                     f"{', '.join(above)}; give a smaller --gpu-memory, or --planner fit")
    if below:
        facts.append(f"planned for {stated:g} GB, but training is predicted to need less in {plan.precision}: "
                     f"{', '.join(below)}; --planner fit uses what there is")
    return facts


def _limited_by_memory(plan: Plan, name: str) -> bool:
    """Whether more memory would give a larger patch or batch, and not only the data limit them."""
    reason = plan.reasons.get(f"configurations.{name}.batch_size")
    if reason is None:
        return False
    return reason.inputs.get("limited by") == "memory" or coverage(plan.configurations[name]) < 1


def describe_selection(selection: Selection) -> tuple[list[str], Rows]:
    """What was chosen and why, what it costs, and one table row per candidate, best first."""
    rows = [["runs", "foreground mean Dice", "95 % interval", "behind the selected one", "p (Holm)", "leads in", "networks"]]
    for c in selection.candidates:
        behind = f"{c.behind.mean:+.4f} ({_range(c.behind.low, c.behind.high, '+.4f')})" if c.behind else "-"
        rows.append([
            c.title, _number(c.foreground_mean_dice), _range(c.low, c.high, ".4f"), behind,
            f"{c.behind.p_value:.2g}" if c.behind else "-", f"{c.first:.0%}" if c.first is not None else "-", str(c.networks)])
    patients = f" of {selection.patients} patients" if selection.patients not in (0, selection.cases) else ""
    weights = selection.weights or (1.0,) * len(selection.runs)
    chosen = " + ".join(f"{run} x {w:g}" if w != 1 else run for run, w in zip(selection.runs, weights, strict=True))
    facts = [
        f"selected: {chosen}, by {selection.cases} validation cases{patients} of folds "
        + ", ".join(map(str, selection.folds))
    ]
    for decision in selection.decisions:
        facts.append(f"{decision.question}: {decision.best} over {decision.default}: {_gain(decision.gain, decision.kept)}")
    idle = [trial.name for trial in selection.postprocessing_tried if trial.before == trial.after]
    if idle:
        facts.append(f"tried without any effect: {', '.join(idle)}")
    for trial in selection.postprocessing_tried:
        if trial.before is not None and trial.after is not None and trial.name not in idle:
            change = f"Dice {trial.before:.4f} -> {trial.after:.4f}"
            cost = "" if trial.seconds is None else f", {trial.seconds:.2g} s per case"
            gain = _gain(trial.gain, trial.kept) if trial.gain else "kept" if trial.kept else "dropped"
            facts.append(f"{trial.name}: {change}{cost}; {gain}")
    shown = [c for c in selection.candidates if len(c.runs) == 1 or c.behind is None or c is selection.candidates[0]]
    facts += [f"{c.title}: {c.cost}" for c in shown if c.cost]
    if selection.foreground_mean_dice is not None:
        nested = "" if selection.nested_dice is None else f"; without optimism {selection.nested_dice:.4f}"
        facts.append(f"foreground mean Dice of the selected masks {selection.foreground_mean_dice:.4f}{nested}")
    return [*facts, *([selection.note] if selection.note else [])], rows


def _gain(gain: Gain, kept: bool) -> str:
    naive = f"naively {gain.naive:+.4f}"
    return f"gain {gain.mean:+.4f} (at least {gain.low:+.4f}; {naive}), {'kept' if kept else 'dropped'}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _range(low: float | None, high: float | None, form: str) -> str:
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"
