"""Which runs and post-processing are used for predicting, and what speaks for them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from autoseg.types.record import Record, Spec
from autoseg.types.report import Values


class Gain(Record):
    """A gain in foreground mean Dice over not making a choice, on cases that the choice was made without.

    `mean` is nested: on each fold the choice is scored that was made without it. `low` is its lower 95 % bound, that holds for
    all choices of a selection together, `high` the bound above. `naive` is the gain on the very cases that the choice was made
    on, `p_value` one-sided.
    """

    mean: float
    low: float
    high: float
    naive: float
    p_value: float


class Difference(Record):
    """A paired difference in foreground mean Dice: mean, 95 % interval over patients, two-sided p-value, number of cases.

    The p-value is corrected for the number of candidates (Holm). Bounds are None for a single patient.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float
    cases: int


class Candidate(Record):
    """One run or weighted ensemble of runs that was compared: its cross-validation Dice and what it costs.

    `low` and `high` are the 95 % interval of the Dice over patients. `seconds` are those per case with all `networks`, estimated
    from those with one fold, `fold_seconds`, in which the Dice was measured; `plain_dice` and `plain_seconds` are measured with
    one fold and no mirroring. `behind` is the selected candidate's Dice less this one's. `first` is the share of bootstrap draws
    in which this candidate leads.
    """

    runs: tuple[str, ...]
    weights: tuple[float, ...] = ()
    foreground_mean_dice: float | None
    low: float | None = None
    high: float | None = None
    per_label: Values
    networks: int
    seconds: float | None = None
    fold_seconds: float | None = None
    plain_dice: float | None = None
    plain_seconds: float | None = None
    cost: str = ""
    behind: Difference | None = None
    first: float | None = None

    @property
    def title(self) -> str:
        """Its runs with their shares, such as `2d + 3d_fullres x 2`."""
        weights = self.weights or (1.0,) * len(self.runs)
        return " + ".join(f"{run} x {w:g}" if w != 1 else run for run, w in zip(self.runs, weights, strict=True))


class Decision(Record):
    """One question that selection answered: the best answer is kept if its lower bound is above zero, else the default stays."""

    question: str
    default: str
    best: str
    gain: Gain
    kept: bool


class PostprocessingTrial(Record):
    """A post-processing step that was tried: Dice (of its label, or the foreground mean) before and after; does it stay.

    Of several settings the best is shown. `seconds` are those per case.
    """

    step: Spec
    name: str
    before: float | None
    after: float | None
    kept: bool
    gain: Gain | None = None
    seconds: float | None = None


class Selection(Record):
    """What `predict` uses of a work folder: runs whose probabilities are averaged, and the post-processing steps in order.

    `weights` are those of the runs, equal ones when empty. `folds` are those finished in every compared run, on which the
    comparison rests; `run_folds` are all finished folds of each selected run. `foreground_mean_dice` is that of the selected
    masks, `nested_dice` the default run's Dice plus the nested gains of what was kept. `inputs` stands for all that was compared.
    """

    format: Literal[1] = 1
    runs: tuple[str, ...] = Field(min_length=1)
    weights: tuple[float, ...] = ()
    postprocessing: tuple[Spec, ...] = ()
    folds: tuple[int, ...]
    run_folds: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    cases: int
    patients: int = 0
    foreground_mean_dice: float | None = None
    nested_dice: float | None = None
    decisions: tuple[Decision, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    postprocessing_tried: tuple[PostprocessingTrial, ...] = ()
    missing: tuple[str, ...] = ()
    note: str = ""
    inputs: str = ""

    @model_validator(mode="after")
    def _weighted(self) -> Selection:
        if self.weights and (len(self.weights) != len(self.runs) or min(self.weights) <= 0):
            raise ValueError(f"weights needs one positive number for each of {len(self.runs)} runs, found {list(self.weights)}")
        return self

    @property
    def run_weights(self) -> tuple[float, ...]:
        """One weight per run; they add up to 1."""
        given = self.weights or (1.0,) * len(self.runs)
        return tuple(weight / sum(given) for weight in given)
