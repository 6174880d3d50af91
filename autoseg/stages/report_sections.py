"""The report's sections about everything but results: data, plan, training, trust, diagnosis, selection, published results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from autoseg.stages.explain import NETWORKS, NORMALIZATION_WORDS, TITLES, edited, overview_rows, shown, stage_rows, why
from autoseg.stages.report_page import Charts, Facts, Finding, Findings, Folded, Reasons, Section, Table, Text, trim
from autoseg.stages.report_pictures import Chart, Curve, Strip, drawing_of, line_chart, short, strip_chart
from autoseg.stages.report_results import counted, listed
from autoseg.stages.reproduce import reproduction_facts, reproduction_table
from autoseg.types.benchmark import Reproduction
from autoseg.types.dataset import Dataset
from autoseg.types.diagnosis import SYMPTOMS, Diagnosis
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.geometry import NO_DEPTH_MM
from autoseg.types.midway import MidwayRecord
from autoseg.types.plan import Configuration, Plan
from autoseg.types.run import EpochRecord, RunRecord
from autoseg.types.selection import Gain, Selection
from autoseg.types.trust import Calibration, QualityModel, Trust

Sketch = tuple[Section, list[Chart]]
MOST_LISTED = 12
SECONDS = "seconds per case"
GAINS = "Each gain is measured on folds that the choice was made without; kept is only what is above zero with certainty."
CALIBRATED = ("Do probabilities mean what they say? Of all voxels that are given a probability of 0.8, 80 % should be right. One "
              "number per run, its temperature, corrects them; by how much was measured on held-back folds.")
HIDDEN = ("previous_stage", "next_stage", "inherits_from", "checkpointing")  # shown only where there is one


def data(dataset: Dataset, fingerprint: Fingerprint, plan: Plan, source: str) -> Sketch:
    """What the training images are like."""
    cases = fingerprint.cases
    flat = bool(cases) and all(case.spacing[0] >= NO_DEPTH_MM for case in cases)
    axes = [(axis, name) for axis, name in enumerate(("z (slices)", "y (rows)", "x (columns)")) if not (flat and axis == 0)]
    names = [label.name for label in dataset.labels.foreground]
    scale = 10 if flat else 1  # a single slice counts as 1 mm thick
    held = {name: [c.labels[name] for c in cases if name in c.labels and c.labels[name].voxels] for name in names}
    found = {name: [scale * label.volume_ml for label in labels] for name, labels in held.items()}
    spacings = {name: [case.spacing[axis] for case in cases] for axis, name in axes}
    every = [v for values in spacings.values() for v in values]
    alike = bool(cases) and all(max(values) - min(values) < 1e-3 * max(values) for values in spacings.values())
    sizes = {name: [float(case.shape[axis]) for case in cases] for axis, name in axes}
    drawn = [
        None if alike else strip_chart(
            "spacings", "Voxel sizes", _rows(spacings), "mm", "Points are cases, boxes the middle half of them.",
            log=bool(every) and max(every) > 6 * min(every)),
        strip_chart("sizes", "Image sizes", _rows(sizes), "voxels", "Points are cases, boxes the middle half of them."),
        strip_chart("label-volumes", "Sizes of the labels", _rows(found, coloured=True), "cm2" if flat else "ml",
                    "Points are the cases that hold the label.", log=_wide([v for values in found.values() for v in values])),
    ]
    charts = [chart for chart in drawn if chart is not None]
    labelled = sum(case.label is not None for case in dataset.cases)
    patients = len({case.group or case.case for case in dataset.cases})
    facts = [
        ("Data set", dataset.name, ""), ("Cases", f"{len(dataset.cases)}, {labelled} of them labelled", ""),
        ("Patients", f"{patients}" + (f" (from {dataset.groups_from})" if dataset.groups_from != "none" else
                                      " (each case counts as a patient of its own)"), ""),
        ("Channels", ", ".join(dataset.channels), ""),
        ("Labels", listed(names, MOST_LISTED), ""),
    ]
    if alike:
        facts.append(("Voxel size", " x ".join(f"{values[0]:g}" for values in spacings.values()) + " mm in all cases", ""))
    if dataset.labels.regions:
        facts.append(("Regions", ", ".join(region.name for region in dataset.labels.regions), ""))
    unit = "cm2" if flat else "ml"
    rows = [["label", "cases that hold it", f"median size, {unit}", "smallest", "largest", "median number of parts"]]
    for name in names:
        parts = [label.components for label in held[name]]
        values = found[name]
        numbers = [f"{f(values):.3g}" for f in (median, min, max)] if values else ["-"] * 3
        rows.append([name, f"{len(values)} of {len(cases)}", *numbers, f"{median(parts):g}" if parts else "-"])
    notes = [Text(note, note=True) for note in plan.notes]
    blocks = [Facts(facts), *notes, Charts([drawing_of(c) for c in charts]), Folded("Labels in numbers", [Table(rows, "")])]
    return Section("data", "Data", blocks, source), charts


def _rows(values: Mapping[str, Sequence[float]], coloured: bool = False) -> list[Strip]:
    return [Strip(name, numbers, i if coloured else 0, show_mean=False) for i, (name, numbers) in enumerate(values.items())]


def _wide(values: Sequence[float]) -> bool:
    positive = [v for v in values if v > 0]
    return bool(positive) and max(positive) > 12 * min(positive)


def plan_section(plan: Plan, source: str) -> Section:
    """What was planned, each value with its reason folded below it."""
    changed = edited(plan)
    blocks: list[object] = [
        Text(f"Planner {plan.planner!r} for {plan.gpu_memory_gb:g} GB of GPU memory in {plan.precision}. "
             "Sizes are in the order z, y, x. Click a value for the rule and the numbers that it comes from."),
        Table(trim(overview_rows(plan)), "What each configuration sees at once, and what training it needs.")]
    if changed:
        told = "; ".join(f"{path}: {shown(now)} (planned: {shown(planned)})" for path, (planned, now) in changed.items())
        blocks.append(Text(f"Set by hand since planning: {told}.", note=True))
    for name, own in plan.configurations.items():
        blocks.append(Folded(f"Configuration {name}: every value, and why", [
            Reasons(_values(plan, name, own)), Table(stage_rows(own), "The network, stage by stage.", 0)]))
    return Section("plan", "Plan", blocks, source)


def _values(plan: Plan, name: str, own: Configuration) -> list[tuple[str, str, list[str]]]:
    rows = []
    for field, title in TITLES.items():
        value = getattr(own, field)
        if field in HIDDEN and not value:
            continue
        reason = plan.reasons.get(f"configurations.{name}.{field}")
        told = [] if reason is None else [why(reason), *([f"From: {shown(reason.inputs)}."] if reason.inputs else [])]
        rows.append((title, _in_words(field, value, plan), told))
    return rows


def _in_words(field: str, value: Any, plan: Plan) -> str:
    """A value of a configuration as a person would say it."""
    if field == "network":
        return f"{NETWORKS.get(value.kind, value.kind)}"
    if field == "normalization":
        pairs = zip(plan.channels, value, strict=True)
        return "; ".join(f"{channel}: {NORMALIZATION_WORDS.get(name, name)}" for channel, name in pairs)
    if field == "use_mask_for_norm":
        return "left out of z-scores" if any(value) else "not treated apart"
    if field == "batch_dice":
        return "over the whole batch" if value else "patch by patch"
    if field == "mirror_axes":
        return "along all axes" if value is None else f"along axes {', '.join(map(str, value))} of the patch" if value else "none"
    if field in ("strides", "kernel_sizes"):
        return ", ".join("x".join(map(str, row)) for row in value)
    return ", ".join(map(str, value)) if field.endswith("per_stage") else shown(value)


@dataclass(frozen=True)
class Learned:
    """What is recorded of one run's folds: epochs, and whole cases segmented now and then."""

    epochs: Mapping[int, Sequence[EpochRecord]]
    midway: Mapping[int, Sequence[MidwayRecord]]
    record: RunRecord | None = None


def training(runs: Mapping[str, Learned], source: str) -> Sketch:
    """Learning curves of all folds of some runs, and what they were trained with."""
    charts: list[Chart] = []
    blocks = []
    for number, (run, learned) in enumerate(runs.items()):
        loss, dice = [], []
        for fold, epochs in learned.epochs.items():
            at = [e.epoch + 1 for e in epochs]
            loss.append(Curve("", at, [e.train_loss for e in epochs], fold, faint=True, dashed=True))
            loss.append(Curve(f"fold {fold}", at, [_float(e.val_loss) for e in epochs], fold))
            means = [[v for v in e.pseudo_dice.values() if v is not None] for e in epochs]
            dice.append(Curve(f"fold {fold}", at, [fmean(m) if m else math.nan for m in means], fold))
        pair = [
            line_chart(f"loss-{number}", f"{run}: loss", loss, "epoch", "loss",
                       "Lines: on validation patches; dashed: on training patches. A widening gap is overfitting."),
            line_chart(f"pseudo-dice-{number}", f"{run}: pseudo Dice", dice, "epoch", "pseudo Dice",
                       "Mean over labels, on random validation patches pooled, not on whole cases.", limits=(-0.02, 1.02)),
            line_chart(f"midway-{number}", f"{run}: Dice of whole cases", _midway(learned), "epoch", "mean Dice",
                       "A few fixed validation cases of each fold, segmented whole every so often.", limits=(-0.02, 1.02))]
        charts += [chart for chart in pair if chart is not None]
        blocks.append(_trained(run, learned.epochs, learned.record))
    return Section("training", "Training", [Charts([drawing_of(c) for c in charts]), *blocks], source), charts


def _midway(learned: Learned) -> list[Curve]:
    """Mean Dice over labels of the whole cases of each fold."""
    curves = []
    for fold, looks in learned.midway.items():
        found = [[float(v) for row in look.mean.values() if (v := row.get("dice")) is not None] for look in looks]
        means = [fmean(values) if values else math.nan for values in found]
        curves.append(Curve(f"fold {fold}", [look.epoch + 1 for look in looks], means, fold))
    return curves


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _trained(run: str, folds: Mapping[int, Sequence[EpochRecord]], record: RunRecord | None) -> Facts:
    seconds = [sum(e.seconds for e in epochs) for epochs in folds.values()]
    told = counted(len(folds), "fold") + (f", {duration(fmean(seconds))} each" if seconds else "")
    if record is not None:
        spec = record.spec
        told += (f"; {counted(spec.epochs, 'epoch')} of {counted(spec.steps_per_epoch, 'step')}, {spec.optimizer.kind} with "
                 f"learning rate {spec.optimizer.lr:g}, loss {spec.loss.kind}, {spec.precision} on {record.device}, "
                 f"seed {spec.seed}")
    return Facts([(run, told, "")])


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def trust(record: Trust, source: str) -> Sketch:
    """Calibration before and after the temperature, and how well a prediction's quality can be told without a reference."""
    blocks: list[object] = [Text(CALIBRATED)]
    charts: list[Chart] = []
    rows = [["run", "voxels", "temperature", "ECE before", "ECE after", "Brier before", "Brier after"]]
    for number, (run, calibration) in enumerate(record.calibration.items()):
        for kind, before, after in (("at structures", calibration.near_before, calibration.near_after),
                                    ("all", calibration.whole_before, calibration.whole_after)):
            if before is not None and after is not None:
                rows.append([run, kind, f"{calibration.temperature:.3f}", f"{before.ece:.4f}", f"{after.ece:.4f}",
                             f"{before.brier:.4f}", f"{after.brier:.4f}"])
        chart = _reliability(f"reliability-{number}", run, calibration)
        charts += [chart] if chart else []
    blocks.append(Charts([drawing_of(c) for c in charts]))
    if len(rows) > 1:
        blocks.append(Table(rows, "Expected calibration error (ECE) and Brier score before and after; lower is better.", 2))
    models = {"mean of the labels": record.quality_mean, **record.quality}
    quality = [
        ["target", "rank correlation with the true Dice", "mean error", "error of always saying the mean", "coverage", "cases"],
        *(_quality(name, model) for name, model in models.items() if model is not None)]
    if len(quality) > 1:
        blocks.append(Text("predict estimates the Dice of every new mask. How well it does that was measured on cases that the "
                           "estimate was fitted without:"))
        blocks.append(Table(quality, "Coverage: the share of cases whose true Dice lies within the stated interval."))
    if record.quality_note:
        blocks.append(Text(record.quality_note, note=True))
    blocks += [Text(line, note=True) for line in record.missing]
    return Section("trust", "Calibration and trust", blocks, source, "Trust"), charts


def _quality(name: str, model: QualityModel) -> list[str]:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    return [name, cell(model.spearman), cell(model.error), cell(model.plain_error),
            "-" if model.coverage is None else f"{model.coverage:.0%} (aim {model.level:.0%})", str(model.cases)]


def _reliability(name: str, run: str, calibration: Calibration) -> Chart | None:
    scores = [(label, score) for label, score in (("before", calibration.near_before), ("after", calibration.near_after))
              if score is not None]
    curves = [Curve(label, [b.confidence for b in score.reliability if b.share > 0],
                    [b.accuracy for b in score.reliability if b.share > 0], 1 - i, points=True, dashed=label == "before")
              for i, (label, score) in enumerate(scores)]
    return line_chart(name, f"{run}: reliability", curves, "stated probability", "share that is right",
                      "Voxels at and in structures, of held-back folds. On the diagonal, probabilities mean what they say; "
                      "below, the network is too sure.", limits=(0, 1.02), height=3.2, diagonal=True) if curves else None


def diagnosis(record: Diagnosis, source: str) -> Section:
    """What is wrong, by which numbers, and what to try."""
    findings = [
        Finding(
            (f"{f.target}: " if f.target else "") + SYMPTOMS[f.symptom],
            [f"{e.quantity}: {e.value:.3g} ({'limit: ' if e.source else ''}{e.rule})" for e in f.evidence], f.causes,
            ", ".join(f.cases[:8]) + (f" and {len(f.cases) - 8} more" if len(f.cases) > 8 else ""),
            [(remedy.command, remedy.why) for remedy in f.remedies])
        for f in record.findings
    ]
    found = counted(len(findings), "finding") if findings else "Nothing stands out"
    blocks: list[object] = [Text(f"{found} on {record.cases} out-of-fold cases{f' of {record.run}' if record.run else ''}."),
                            Findings(findings)]
    if record.untold:
        blocks.append(Folded("What could not be told", [Text(line) for line in record.untold]))
    return Section("diagnosis", "Diagnosis", blocks, source)


def selection(record: Selection, source: str) -> Section:
    """What was chosen, what each choice gains and costs, what was dropped."""
    weights = record.weights or (1.0,) * len(record.runs)
    chosen = " + ".join(run if w == 1 else f"{run} x {w:g}" for run, w in zip(record.runs, weights, strict=True))
    tried = record.postprocessing_tried
    kept = [trial.name for trial in tried if trial.kept]
    blocks: list[object] = [Facts([
        ("Runs", chosen, ""), ("Post-processing", "; ".join(kept) or "none", ""),
        ("Rests on", f"{record.cases} validation cases of {record.patients or record.cases} patients, folds "
                     f"{', '.join(map(str, record.folds))}", ""),
        *([("Dice of the selected masks", f"{record.foreground_mean_dice:.4f}"
            + (f"; without the optimism of having chosen on the same cases {record.nested_dice:.4f}"
               if record.nested_dice is not None else ""), "")] if record.foreground_mean_dice is not None else []),
    ])]
    gains = [["choice", "instead of", "gain in Dice, without optimism", "at least", "naive gain", "p", SECONDS, "verdict"]]
    for decision in record.decisions:
        gains.append([f"{decision.question}: {decision.best}", decision.default, *_gain(decision.gain), "-",
                      "kept" if decision.kept else "dropped"])
    for trial in tried:
        cells = _gain(trial.gain) if trial.gain else ["-"] * 4
        gains.append([f"post-processing: {trial.name}", "nothing", *cells,
                      "-" if trial.seconds is None else f"{trial.seconds:.2g}", "kept" if trial.kept else "dropped"])
    if len(gains) > 1:
        few = [row for row in gains[1:] if row[-1] == "kept"]
        few += [row for row in gains[1:] if row[-1] != "kept"][: max(0, MOST_LISTED - len(few))]
        blocks.append(Table(trim([gains[0], *few]), GAINS, 2))
        if len(few) < len(gains) - 1:
            blocks.append(Folded(f"All {len(gains) - 1} choices", [Table(trim(gains), "", 2)]))
    rows = [["candidate", "mean Dice", "behind the selected one", "p (Holm)", "leads in", "networks", SECONDS]]
    for c in record.candidates:
        behind = "-" if c.behind is None else f"{c.behind.mean:+.4f}" + (
            f"\n{c.behind.low:+.4f} to {c.behind.high:+.4f}" if c.behind.low is not None and c.behind.high is not None else "")
        dice = "-" if c.foreground_mean_dice is None else f"{c.foreground_mean_dice:.4f}" + (
            f"\n{c.low:.4f} to {c.high:.4f}" if c.low is not None and c.high is not None else "")
        rows.append([short(c.title, 60), dice, behind, "-" if c.behind is None else f"{c.behind.p_value:.2g}",
                     "-" if c.first is None else f"{c.first:.0%}", str(c.networks),
                     "-" if c.seconds is None else f"{c.seconds:.2g}"])
    if len(rows) > 1:
        blocks.append(Table(trim(rows), "Leads in: the share of bootstrap draws of patients in which a candidate is the best."))
    costs = [(c.title, c.cost, "") for c in record.candidates if c.cost]
    if costs:
        blocks += [Text("What it costs, on the machine that selected:"), Facts(costs)]
    blocks += [Text(line, note=True) for line in record.missing]
    blocks += [Text(record.note)] if record.note else []
    return Section("selection", "What was selected, and what it costs", blocks, source, "Selection")


def _gain(gain: Gain) -> list[str]:
    return [f"{gain.mean:+.4f}", f"{gain.low:+.4f}", f"{gain.naive:+.4f}", f"{gain.p_value:.2g}"]


def published(record: Reproduction, source: str) -> Section:
    """Ours beside the results that were published on the same benchmark."""
    facts = reproduction_facts(record)
    return Section("published", "Beside published results", [
        Table(reproduction_table(record), record.benchmark.title),
        Folded("Protocols, citations, and what was shortened", [Text(line.strip()) for line in facts])], source, "Published")
