"""A training run as data: everything that shapes the result, and what a run folder records of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from autoseg.types.dataset import Split
from autoseg.types.plan import Configuration, Ints, Plan
from autoseg.types.record import Record

Precision = Literal["auto", "bf16", "fp16", "fp32"]


class LossSpec(Record):
    """The loss; `kind` is a built-in name or `module:Name`."""

    kind: str = "dice_ce"
    options: dict[str, Any] = {}


class AugmentSpec(Record):
    """The augmentation; `mirror` lists the patch's axes that may be flipped, in training and at prediction.

    None means those that the plan allows. They count from 0 in the order of `patch_size`: in 2D 0 and 1 are the last two axes of
    the volume.
    """

    kind: str = "default"
    mirror: tuple[int, ...] | None = None
    options: dict[str, Any] = {}


class SamplerSpec(Record):
    """How patches are drawn; `foreground` is the share of each batch that must hold foreground (nnU-Net: 0.33)."""

    kind: str = "reference"
    foreground: float = Field(default=0.33, ge=0, le=1)
    options: dict[str, Any] = {}


class OptimizerSpec(Record):
    """The optimiser; `momentum` is Nesterov's for sgd and unused by adamw."""

    kind: str = "sgd"
    lr: float = Field(default=0.01, gt=0)
    weight_decay: float = Field(default=3e-5, ge=0)
    momentum: float = Field(default=0.99, ge=0, lt=1)
    options: dict[str, Any] = {}


class ScheduleSpec(Record):
    """The learning rate over the run, as a function of the fraction done; `warmup` is the fraction spent rising to it."""

    kind: str = "polynomial"
    power: float = Field(default=0.9, gt=0)
    warmup: float = Field(default=0.0, ge=0, lt=1)
    options: dict[str, Any] = {}


class GrowthSpec(Record):
    """How the patch grows during training; `none` trains on the planned patch from the first step to the last."""

    kind: str = "none"
    options: dict[str, Any] = {}


class TrainSpec(Record):
    """Everything that shapes a training run, apart from the plan and the data (defaults: nnU-Net v2's recipe)."""

    format: Literal[1] = 1
    epochs: int = Field(default=1000, ge=1)
    steps_per_epoch: int = Field(default=250, ge=1)
    val_steps: int = Field(default=50, ge=0)
    batch_size: int | None = Field(default=None, ge=1)
    loss: LossSpec = LossSpec()
    augment: AugmentSpec = AugmentSpec()
    sampler: SamplerSpec = SamplerSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    growth: GrowthSpec = GrowthSpec()
    ema: float = Field(default=0.0, ge=0, lt=1)  # decay of the moving average of weights that is kept as the result; 0: none
    gradient_clip: float = Field(default=12.0, gt=0)
    deep_supervision: bool = True
    precision: Precision = "auto"
    compile: Literal["auto", "never"] = "auto"
    seed: int = Field(default=0, ge=0)

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def mirror_axes(self, configuration: Configuration) -> Ints:
        """Axes of the patch that are flipped: what the user says, else the plan, else all of them; without augmentation none."""
        if self.augment.kind == "none":
            return ()
        for axes in (self.augment.mirror, configuration.mirror_axes):
            if axes is not None:
                return axes
        return tuple(range(configuration.dims))


class RunRecord(Record):
    """run.json: what a fold was trained with. Two runs with equal records (versions and device apart) are the same run."""

    format: Literal[1] = 1
    name: str
    configuration: str
    fold: int
    spec: TrainSpec
    plan: Plan
    split: Split
    data: str
    device: str
    previous: str | None = None  # the run of the configuration's previous stage, whose segmentation is part of the input
    init: str | None = None  # hash of the model whose weights training began with
    extended: tuple[int, ...] = ()  # epochs at which the run had been finished before it was made longer
    versions: dict[str, str] = {}


class EpochRecord(Record):
    """One line of metrics.jsonl; pseudo Dice is over random patches pooled, not over whole cases."""

    epoch: int
    step: int
    train_loss: float
    val_loss: float | None
    pseudo_dice: dict[str, float | None]
    learning_rate: float
    seconds: float
    data_wait: float
    skipped: int = 0  # steps whose loss or gradients were not finite
