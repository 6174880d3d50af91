"""Whole validation cases segmented while a fold trains."""

from __future__ import annotations

from autoseg.types.record import Record
from autoseg.types.report import Values


class MidwayRecord(Record):
    """One line of midway.jsonl: metrics of a few fixed cases, by case and label, with the weights after `epoch`.

    One network without mirroring and without post-processing, so a little below what the fold's validation will say.
    """

    epoch: int
    step: int
    seconds: float
    cases: dict[str, dict[str, Values]]
    mean: dict[str, Values]
