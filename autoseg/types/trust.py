"""What is known about how far predictions can be trusted: calibration, quality model, and what the training cases were like."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from autoseg.types.record import Record


class ReliabilityBin(Record):
    """Voxels whose confidence lies in (low, high]: their share, their mean confidence, and the share that is right."""

    low: float
    high: float
    share: float
    confidence: float
    accuracy: float


class CalibrationScore(Record):
    """How well probabilities agree with what is true.

    Expected calibration error, negative log-likelihood (nats per voxel), Brier score, and the table that the error comes from.
    """

    ece: float
    nll: float
    brier: float
    reliability: tuple[ReliabilityBin, ...]


class Calibration(Record):
    """The temperature that a run's logits are divided by, and what it does to voxels of held-back folds.

    `near` are voxels at a boundary or inside of a predicted structure, on which it is fitted, `whole` all voxels; `after` uses
    for each part the temperature of `part_temperatures`, fitted without it. Scores are None where there is only one part. `parts`
    says what was held back.
    """

    temperature: float = Field(gt=0)
    part_temperatures: dict[int, float] = {}
    parts: Literal["folds", "patients", "none"] = "none"
    voxels: int = 0
    cases: int = 0
    near_before: CalibrationScore | None = None
    near_after: CalibrationScore | None = None
    whole_before: CalibrationScore | None = None
    whole_after: CalibrationScore | None = None


class QualityModel(Record):
    """A ridge regression from features of a prediction to the logit of its Dice, and how it did on cases it was fitted without.

    `centres` and `scales` standardise the features; the absolute values of standardised volumes, less `deviations`, follow them.
    `low` and `high` are the quantiles of held-back residuals (logit) that hold `level` of them. Held back: `spearman` rank
    correlation of estimate and true Dice, `error` mean absolute error, `plain_error` that of always saying the mean of the
    others, `coverage` the share of cases within intervals made without their part.
    """

    features: tuple[str, ...]
    centres: tuple[float, ...]
    scales: tuple[float, ...]
    deviations: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float
    penalty: float
    low: float
    high: float
    level: float
    cases: int
    spearman: float | None = None
    error: float
    plain_error: float
    coverage: float | None = None


class Number(Record):
    """A number of one case; with `log` its ratio to others counts, not its difference; differences up to `slack` are nothing."""

    value: float
    unit: str = ""
    log: bool = False
    slack: float = 0.0


class CaseNumbers(Record):
    """What one case and its prediction are like; `found` names the labels in the prediction."""

    numbers: dict[str, Number] = {}
    orientation: str = ""
    found: tuple[str, ...] = ()


class Spread(Record):
    """One number over the training cases: its range, and mean and standard deviation (of its logarithm where `log`)."""

    low: float
    high: float
    mean: float
    deviation: float
    cases: int
    log: bool = False
    unit: str = ""
    slack: float = 0.0


class TrainingCases(Record):
    """What the training cases were like: numbers by name, orientation codes and how many cases each structure was found in."""

    cases: int
    numbers: dict[str, Spread] = {}
    orientations: dict[str, int] = {}
    found: dict[str, int] = {}


class Trust(Record):
    """trust.json: made from out-of-fold predictions of the selected runs, whose networks' hashes `networks` holds.

    `quality` holds a model for each target, and `quality_mean` that for the foreground mean; where there are none, `quality_note`
    says why. `inputs` stands for everything that it was made from.
    """

    format: Literal[1] = 1
    inputs: str
    runs: tuple[str, ...]
    weights: tuple[float, ...] = ()
    folds: tuple[int, ...]
    networks: dict[str, str]
    mirror: bool = True
    calibration: dict[str, Calibration]
    quality_mean: QualityModel | None = None
    quality: dict[str, QualityModel] = {}
    quality_note: str = ""
    training: TrainingCases
    cases: int
    missing: tuple[str, ...] = ()
