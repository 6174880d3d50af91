"""What a data set is: channels, labels, and the files of each case."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from autoseg.types.labels import Labels
from autoseg.types.record import Record


class CaseFiles(Record):
    """The files of one case: one image per channel, or one file that holds all channels (4D, RGB)."""

    case: str
    images: tuple[str, ...]
    label: str | None = None
    group: str | None = None
    fold: int | None = None
    attributes: dict[str, str] = {}  # further manifest columns (site, scanner, ...), for results by group
    labelled: tuple[str, ...] | None = None  # names of the labels that are annotated in this case; None: all


class Dataset(Record):
    """A data set as found on disk; paths are absolute."""

    format: Literal[1] = 1
    name: str
    source: Literal["folder", "nnunet", "msd", "manifest", "fingerprint"]
    root: str
    channels: tuple[str, ...]
    channels_named: bool = True
    labels: Labels
    cases: tuple[CaseFiles, ...]
    groups_from: Literal["manifest", "names", "none"] = "none"
    splits_file: str | None = None

    @model_validator(mode="after")
    def _unique(self) -> Dataset:
        names = [c.case for c in self.cases]
        if len(set(names)) != len(names):
            raise ValueError("case names must be unique")
        return self


class Fault(Record):
    """One thing that is wrong with a data set."""

    code: str
    severity: Literal["error", "warning"]
    case: str
    file: str
    expected: str
    found: str
    fix: str


class Split(Record):
    """One fold: the cases to train on and the cases to validate on."""

    train: tuple[str, ...]
    val: tuple[str, ...]
