"""What a model file says about itself: model.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from autoseg.types.fingerprint import Intensities
from autoseg.types.labels import Labels
from autoseg.types.plan import Configuration, Ints, Plan
from autoseg.types.record import Record, Spec
from autoseg.types.report import Values
from autoseg.types.trust import TrainingCases, Trust

WeightsPrecision = Literal["fp32", "fp16", "bf16"]
RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
SHARED = ("labels", "channels", "orientation", "transpose_forward")  # of a plan: what all networks of a model must agree in


def part_name(run: str, fold: int) -> str:
    """Where the weights of a run's fold lie in the file."""
    return f"weights/{run}/fold_{fold}.safetensors"


class Part(Record):
    """One part of the file: its length and the SHA-256 of its bytes."""

    size: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class NetworkRecord(Record):
    """The networks of one run, one for each fold: all that is needed to build them and to feed them.

    `previous` is the run whose segmentation is part of the input, `plan` the run's own where it is not the model's.
    """

    configuration: str
    folds: tuple[int, ...] = Field(min_length=1)
    mirror_axes: Ints
    previous: str | None = None
    plan: Plan | None = None


class MemberRecord(Record):
    """A run whose probabilities are averaged with those of the other members, and how much it counts."""

    run: str
    weight: float = Field(default=1.0, gt=0, le=1e6)


class ModelMetrics(Record):
    """Cross-validation of the selected masks: means by label and metric, and their 95 % intervals over patients.

    `folds` are those that the cases come from; every case was predicted by networks that had not seen it. `nested_dice` is the
    foreground mean Dice without the optimism of selection.
    """

    cases: int
    patients: int = 0
    folds: tuple[int, ...] = ()
    mean: dict[str, Values]
    foreground_mean: Values
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    foreground_intervals: dict[str, tuple[float, float]] = {}
    nested_dice: float | None = None
    tolerance_mm: float | None = None


class TrainingData(Record):
    """What the networks were trained on: kinds of channels, statistics of foreground voxels per channel, ranges of numbers."""

    channel_kinds: tuple[str, ...] = ()
    intensities: tuple[Intensities, ...] = ()
    ranges: TrainingCases


class ModelRecord(Record):
    """model.json: plan, labels with colours (#rrggbb), networks, how they are combined, what is known about them, and all parts.

    `networks` holds every run by name, those of previous stages included; `members` are the ones that are averaged. `weights` is
    the precision in which the parts hold numbers. Nothing in it names code.
    """

    format: Literal[1] = 1
    name: str
    made_by: str
    licence: str = ""
    labels: Labels
    colours: dict[str, str] = {}
    channels: tuple[str, ...] = Field(min_length=1)
    plan: Plan
    networks: dict[str, NetworkRecord] = Field(min_length=1)
    members: tuple[MemberRecord, ...] = Field(min_length=1)
    postprocessing: tuple[Spec, ...] = ()
    weights: WeightsPrecision = "fp32"
    metrics: ModelMetrics | None = None
    training: TrainingData | None = None
    trust: Trust | None = None
    notes: tuple[str, ...] = ()
    parts: dict[str, Part] = {}

    @model_validator(mode="after")
    def _consistent(self) -> ModelRecord:
        runs = [member.run for member in self.members]
        if len(set(runs)) != len(runs):
            raise ValueError(f"members must name each run once, found {runs}")
        used = {stage for run in runs for stage in self._stages(run)}
        if used != set(self.networks):
            raise ValueError(f"networks holds {sorted(set(self.networks) - used)}, which no member uses")
        for name, network in self.networks.items():
            self._require_fit(name, network)
        if (self.plan.labels, self.plan.channels) != (self.labels, self.channels):
            raise ValueError("labels and channels must be those of the plan")
        return self

    def _stages(self, run: str) -> list[str]:
        """A run and the runs of the stages before it."""
        chain: list[str] = []
        name: str | None = run
        while name is not None:
            if name not in self.networks or name in chain:
                raise ValueError(f"run {name!r} must be one of networks, and must not rest on itself")
            chain.append(name)
            name = self.networks[name].previous
        return chain

    def _require_fit(self, name: str, network: NetworkRecord) -> None:
        """The network's plan must hold its configuration and agree with the model's plan in what all networks share."""
        plan = network.plan or self.plan
        where = f"networks.{name}"
        if network.configuration not in plan.configurations:
            raise ValueError(f"{where}.configuration {network.configuration!r} is not in its plan")
        configuration = plan.configurations[network.configuration]
        if (configuration.previous_stage is None) != (network.previous is None):
            raise ValueError(f"{where}.previous must name a run if, and only if, the configuration has a previous stage")
        axes = network.mirror_axes
        if len(set(axes)) != len(axes) or not set(axes) <= set(range(configuration.dims)):
            raise ValueError(f"{where}.mirror_axes must be some of the patch's axes, found {axes}")
        if len(set(network.folds)) != len(network.folds) or not all(0 <= fold < 10_000 for fold in network.folds):
            raise ValueError(f"{where}.folds must be different numbers from 0, found {network.folds}")
        for field in SHARED:
            if getattr(plan, field) != getattr(self.plan, field):
                raise ValueError(f"{where}.plan.{field} must be that of the model's plan")

    def plan_of(self, run: str) -> Plan:
        """The plan of a run."""
        return self.networks[run].plan or self.plan

    def configuration_of(self, run: str) -> Configuration:
        """The configuration of a run."""
        return self.plan_of(run).configurations[self.networks[run].configuration]

    def input_channels(self, run: str) -> int:
        """Channels that a run's network takes: the image's, and one for each foreground label where it has a previous stage."""
        return len(self.channels) + (len(self.labels.foreground) if self.networks[run].previous is not None else 0)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of all parts that hold weights, in order."""
        return tuple(part_name(run, fold) for run, network in self.networks.items() for fold in network.folds)
