"""Public benchmarks: what a download holds, how it is trained, what has been published on it, and a reproduction beside that."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from autoseg.types.record import Record, Spec
from autoseg.types.report import METRICS, Value

MEAN = "mean"  # in tables of results: the mean over the targets


class Source(Record):
    """Where a number was published; `where` is the table, section or comment, `url` the page on which it can be read."""

    authors: str
    title: str
    venue: str
    year: int
    where: str
    url: str


class Published(Record):
    """One published row: a method's values by target (or `mean`), as fractions of 1.

    `metric` is one of the report's metrics, or the name of another measure, whose values are shown but not compared.
    `comparable` says whether the protocol is the benchmark's own: the same cases, and out-of-fold predictions.
    """

    method: str
    metric: str = "dice"
    values: dict[str, float]
    protocol: str
    comparable: bool
    source: Source
    note: str = ""


class Recipe(Record):
    """What the published protocol trains; the other values of the training record are the defaults."""

    planner: str = "default"
    gpu_memory_gb: float = 8.0
    configurations: tuple[str, ...]
    epochs: int = Field(default=1000, ge=1)
    steps_per_epoch: int = Field(default=250, ge=1)


class NameRange(Record):
    """Names that the complete download holds: `template` filled with every number from `first` to `last`."""

    template: str
    first: int
    last: int

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(self.template.format(number) for number in range(self.first, self.last + 1))


class Benchmark(Record):
    """One public benchmark, as the catalogue describes it.

    `labels` and `region_order` read as in a dataset.json. `measured` names unions of label values that the published results
    are about, where these are not the labels themselves. `names` are cases, or patients where cases have groups.
    """

    format: Literal[1] = 1
    name: str
    title: str
    aliases: tuple[str, ...] = ()
    page: str
    licence: str
    access: str
    layout: str
    cite: str
    reader: Spec
    dimensions: Literal[2, 3]
    channels: tuple[str, ...]
    labels: dict[str, int | tuple[int, ...]]
    region_order: tuple[int, ...] = ()
    measured: dict[str, tuple[int, ...]] = {}
    metric: str = "dice"
    cases: int = Field(ge=2)
    names: tuple[NameRange, ...] = ()
    splits: str
    folds: int = Field(default=5, ge=2)
    recipe: Recipe
    published: tuple[Published, ...] = ()
    note: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Benchmark:
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, found {self.metric!r}")
        for row in self.published:
            unknown = sorted(set(row.values) - {*self.targets, MEAN}) if row.metric in METRICS else []
            if unknown:
                raise ValueError(f"{row.method} has values for {unknown}, which are not targets ({', '.join(self.targets)})")
            if not row.values or not all(0 <= value <= 1 for value in row.values.values()):
                raise ValueError(f"the values of {row.method} must be fractions of 1, found {row.values}")
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """What results are given for."""
        return tuple(self.measured or self.labels)


class Result(Record):
    """Ours: one run, or what selection made of several, over its finished folds; values by target and `mean`."""

    method: str
    folds: tuple[int, ...]
    cases: int
    values: dict[str, Value]
    protocol: str


class Reproduction(Record):
    """report/reproduction.json: ours beside the published table, and everything in which ours was shortened or differs."""

    format: Literal[1] = 1
    benchmark: Benchmark
    data: str
    read_as: str
    cases: int
    metric: str
    ours: tuple[Result, ...]
    deviations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
