"""--set key=value: typed, path-exact edits of the training record, and presets, which are lists of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from autoseg.errors import RunError
from autoseg.files.workspace import validate
from autoseg.types.run import TrainSpec

# What each preset sets before --set does; run.json holds the resolved values
PRESETS: dict[str, tuple[str, ...]] = {
    "standard": (),
    "quick": (  # on hippocampus it begins to learn at once, where SGD waits for 50 to 250 steps (tests/benchmarks/LOG.md)
        "epochs=100", "optimizer.kind=adamw", "optimizer.lr=0.001", "optimizer.weight_decay=0.01", "schedule.kind=cosine",
        "schedule.warmup=0.05", "growth.kind=grow", "growth.options.start=0.6",
    ),
}


def preset(name: str) -> TrainSpec:
    """The training record of a preset. Raises RunError when there is none of that name."""
    if name not in PRESETS:
        raise RunError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    return apply_settings(TrainSpec(), PRESETS[name])


def apply_settings(spec: TrainSpec, settings: Sequence[str]) -> TrainSpec:
    """Set dotted paths of the training record; a value is JSON where it parses as such, else text.

    Raises:
        RunError: not key=value, or a path the record does not have (the message lists what there is).
        RecordError: a value of the wrong type or range.
    """
    data: dict[str, Any] = spec.model_dump()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise RunError(f"--set takes key=value, found {setting!r}")
        place, parts = data, key.strip().split(".")
        for depth, part in enumerate(parts[:-1]):
            _require(place, part, parts[:depth], setting)
            place = place[part]
        if parts[-2:-1] != ["options"] or not isinstance(place, dict):
            _require(place, parts[-1], parts[:-1], setting)
        place[parts[-1]] = _value(text)
    return validate(data, TrainSpec, "the training record (--set)")


def _require(place: Any, part: str, above: Sequence[str], setting: str) -> None:
    if not isinstance(place, dict) or part not in place:
        there = ", ".join(place) if isinstance(place, dict) else "no further parts"
        raise RunError(f"--set {setting}: {'.'.join(above) or 'the training record'} has no {part!r}; it has {there}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
