"""What a fold that starts from a trained model took from it: init.json."""

from __future__ import annotations

from typing import Literal

from autoseg.types.plan import Ints
from autoseg.types.record import Record

State = Literal["kept", "adapted", "new", "left out"]


class Taken(Record):
    """One row of the report: a part of the network, where its weights come from, and how."""

    part: str
    state: State
    how: str = ""


class InitRecord(Record):
    """init.json: the model, its network that was taken, and for every part of the new network where it comes from.

    `init` is the hash in run.json; `planned_patch` is what the plan had before the topology was taken over.
    """

    format: Literal[1] = 1
    model: str
    init: str
    network: str
    patch_size: Ints
    planned_patch: Ints
    parts: tuple[Taken, ...]
    kept_weights: int
    adapted_weights: int
    new_weights: int
    notes: tuple[str, ...] = ()
