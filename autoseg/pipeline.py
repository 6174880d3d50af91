"""The whole method, stage after stage: read this first.

A data set is checked and measured, a plan is derived from the measurements, every case is preprocessed as the plan says,
networks are trained in cross-validation, the best configuration or ensemble is chosen on the cases that each network has not
seen, and new images are segmented with the ensemble of all folds. Each stage reads records from the work folder and leaves
records there, so that each can be looked at, edited, interrupted and run again on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autoseg.datasets.folder import read_inputs
from autoseg.datasets.phantom import write_dataset
from autoseg.files.images import read_case, read_label
from autoseg.files.workspace import Workspace, save_record
from autoseg.interrupts import Interrupts
from autoseg.logs import SILENT, Reporter
from autoseg.stages import predict as prediction
from autoseg.stages import train as training
from autoseg.stages.evaluate import evaluate
from autoseg.stages.figures import OverlayRow, overlay_figure
from autoseg.stages.plan import plan
from autoseg.stages.preprocess import preprocess
from autoseg.stages.select import select
from autoseg.stages.trust import calibrate
from autoseg.types.plan import Configuration
from autoseg.types.report import Report
from autoseg.types.run import AugmentSpec, OptimizerSpec, SamplerSpec, TrainSpec


def segment(
    data: Path,
    workspace: Workspace,
    images: Sequence[Path],
    masks: Path,
    spec: TrainSpec = TrainSpec(),
    configurations: Sequence[str] | None = None,
    reporter: Reporter = SILENT,
    interrupts: Interrupts | None = None,
) -> None:
    """From a folder of images with masks to masks of new images."""
    plan(data, workspace, reporter=reporter)  # check, fingerprint, plan, splits
    preprocess(workspace, configurations, reporter=reporter)  # crop, normalise, resample; one store per case
    training.train(
        workspace, configurations, spec=spec, reporter=reporter, interrupts=interrupts
    )  # every fold, then its validation
    select(workspace, reporter=reporter)  # configuration or ensemble, post-processing
    calibrate(workspace, reporter=reporter)  # how far probabilities and masks of new cases can be trusted
    cases = read_inputs(images, channels=len(workspace.plan().channels))
    prediction.predict(workspace, cases, masks, reporter=reporter)  # the ensemble of all folds, in each image's own geometry


@dataclass(frozen=True)
class DemoResult:
    """Where the demo left its picture, and how good the masks of unseen cases are."""

    report: Report
    picture: Path
    masks: Path


DEMO_CASES, DEMO_UNSEEN, DEMO_SEED, DEMO_SIZE = 20, 4, 2026, 0.8
DEMO_MEMORY_GB = 0.2  # small patches, so that many steps fit into the time
DEMO_FEATURES = (16, 32, 64, 96, 96, 96)  # instead of 32 to 320: thin enough for a laptop's processor
DEMO_SPEC = TrainSpec(
    epochs=8,
    steps_per_epoch=40,
    val_steps=2,
    batch_size=2,
    augment=AugmentSpec(mirror=()),
    sampler=SamplerSpec(foreground=1.0),
    optimizer=OptimizerSpec(kind="adamw", lr=0.004),
)


def demo(
    out: Path,
    kind: Literal["chest", "brain"] = "chest",
    spec: TrainSpec = DEMO_SPEC,
    reporter: Reporter = SILENT,
    interrupts: Interrupts | None = None,
) -> DemoResult:
    """The whole method on built-in phantoms, with a thin network and a short training, then judged on unseen cases."""
    data, workspace, masks = out / "data", Workspace(out / "work"), out / "masks"
    write_dataset(data, kind, DEMO_CASES, DEMO_UNSEEN, DEMO_SEED, reporter, DEMO_SIZE)
    if not workspace.plan_path.exists():
        plan(data, workspace, gpu_memory_gb=DEMO_MEMORY_GB, reporter=reporter)
    made = workspace.plan()
    thin = made.model_copy(update={"configurations": {"3d_fullres": _thin(made.configurations["3d_fullres"])}})
    if thin != made:
        workspace.save_plan(thin)
    segment(data, workspace, [data / "unseen" / "images"], masks, spec, reporter=reporter, interrupts=interrupts)
    report = evaluate(masks, data / "unseen" / "labels", labels=workspace.plan().labels, reporter=reporter)
    save_record(out / "report.json", report)
    picture = out / "demo.png"
    _draw(picture, workspace, data, masks, report)
    return DemoResult(report, picture, masks)


def _thin(configuration: Configuration) -> Configuration:
    features = DEMO_FEATURES[: len(configuration.features_per_stage)]
    return configuration.model_copy(update={"features_per_stage": features, "batch_dice": True})


def _draw(picture: Path, workspace: Workspace, data: Path, masks: Path, report: Report) -> None:
    rows = []
    for case in read_inputs([data / "unseen" / "images"], channels=len(workspace.plan().channels))[:3]:
        image = read_case([Path(p) for p in case.images])
        axis_map = image.grid.to_lps()
        truth, _ = read_label(data / "unseen" / "labels" / f"{case.case}.nii.gz")
        found, _ = read_label(masks / f"{case.case}.nii.gz")
        scores = next(c.metrics for c in report.cases if c.case == case.case)
        caption = "Dice " + ", ".join(
            f"{name} {values['dice']:.2f}" for name, values in scores.items() if values.get("dice") is not None
        )
        rows.append(
            OverlayRow(
                case.case,
                axis_map.apply(image.array_czyx)[-1],
                axis_map.apply(truth),
                axis_map.apply(found),
                image.grid.mapped(axis_map).spacing,
                caption,
            )
        )
    names = {label.value: label.name for label in workspace.plan().labels.foreground}
    overlay_figure(picture, rows, names)
