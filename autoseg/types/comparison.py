"""How several tools compare on the same cases."""

from __future__ import annotations

from typing import Literal

from autoseg.types.record import Record
from autoseg.types.report import Value

MEAN = "mean of the labels"


class Contender(Record):
    """One of the compared: its name, where its masks come from, how many it has, and its means by target and metric.

    Targets are the labels and `mean of the labels`; `intervals` are 95 % over patients, left out where undefined. `undefined`
    counts the compared cases in which a metric is undefined for at least one label that is in the reference or in some
    contender's mask.
    """

    name: str
    source: str
    masks: int
    mean: dict[str, dict[str, Value]]
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    undefined: dict[str, int] = {}


class PairedResult(Record):
    """The mean of `first` less `second` in one metric of one target over `cases` cases in which both are defined.

    `low` and `high` bound it with 95 % over patients; None with a single patient. `p_value` is two-sided, `p_holm` corrected for
    all comparisons of the target's kind (labels, or their mean). `better` is the contender that the difference speaks for, empty
    where they are equal.
    """

    first: str
    second: str
    target: str
    metric: str
    mean: float | None
    low: float | None
    high: float | None
    p_value: float
    p_holm: float
    cases: int
    better: str = ""


class Ranking(Record):
    """The order by the mean of one metric over the labels, best first, and how firm it is when patients are drawn anew.

    `shares` holds for each contender the share of draws in which it took each rank. `tau` is the mean rank correlation
    (Kendall's tau-b) of the draws' orders with this one, `tau_low` its 5th percentile.
    """

    metric: str
    order: tuple[str, ...]
    shares: dict[str, tuple[float, ...]]
    tau: float
    tau_low: float
    cases: int


class Comparison(Record):
    """comparison.json: the contenders, all paired differences, rankings, and the scores by metric, contender and case.

    `left_out` counts the cases of each contender that not all others (and the references) have.
    """

    format: Literal[1] = 1
    contenders: tuple[Contender, ...]
    reference: str
    cases: tuple[str, ...]
    patients: int
    left_out: dict[str, int] = {}
    metrics: tuple[str, ...]
    differences: tuple[PairedResult, ...]
    rankings: tuple[Ranking, ...] = ()
    scores: dict[str, dict[str, dict[str, Value]]] = {}
    rules: tuple[str, ...] = ()
