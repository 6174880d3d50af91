"""Diff: two plans, and the training records of runs that both work folders have, value by value with the reasons of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace
from autoseg.stages.explain import edited, shown, why
from autoseg.types.plan import Plan, Reason
from autoseg.types.run import TrainSpec

Rows = list[list[str]]

APART = ("format", "notes", "reasons")
THERE, MISSING = "there", "-"


def diff(a: Workspace, b: Workspace) -> Rows:
    """What differs between two work folders: a heading, and per value both values and why; the heading alone when nothing does.

    Plans are compared whole; runs of the same name by their training record.

    Raises:
        RecordError: a folder without a valid plan, or a damaged run record.
    """
    names = (a.root.name, b.root.name) if a.root.name != b.root.name else (str(a.root), str(b.root))
    return diff_plans(a.plan(), b.plan(), names) + _run_rows(_specs(a), _specs(b))


def diff_plans(a: Plan, b: Plan, names: tuple[str, str] = ("A", "B")) -> Rows:
    """What differs between two plans, as `diff` gives it, without files."""
    rows = [["value", *names, f"why in {names[0]}", f"why in {names[1]}"]]
    data = [plan.model_dump(mode="json", exclude=set(APART)) for plan in (a, b)]
    configurations = [entry.pop("configurations") for entry in data]
    sides = _Side(a), _Side(b)
    rows += _leaf_rows(*data, sides=sides)
    for name in dict.fromkeys([*configurations[0], *configurations[1]]):
        path = f"configurations.{name}"
        there = [name in entries for entries in configurations]
        if all(there):
            rows += _leaf_rows(*(entries[name] for entries in configurations), sides=sides, above=f"{path}.")
        else:
            rows.append([path, *(THERE if found else MISSING for found in there), *_whys(path, sides)])
    return rows


class _Side:
    """One plan's reasons, and what was set by hand in it."""

    def __init__(self, plan: Plan) -> None:
        self.reasons = plan.reasons
        self.edited = edited(plan)

    def reason(self, path: str) -> Reason | None:
        """The reason of a value, or of the value that it is part of."""
        parts = path.split(".")
        least = min(len(parts), 3) if parts[0] == "configurations" else 1  # that it is there explains none of its values
        for count in range(len(parts), least - 1, -1):
            if (reason := self.reasons.get(".".join(parts[:count]))) is not None:
                return reason
        return None

    def told(self, path: str) -> str:
        """The reason in words."""
        if path in self.edited:
            return f"set by hand (planned: {shown(self.edited[path][0])})"
        reason = self.reason(path)
        if reason is None:
            return "set by hand" if self.reasons and path.startswith("configurations.") else ""
        return why(reason)


def _whys(path: str, sides: tuple[_Side, _Side]) -> list[str]:
    """The reasons of both sides: rules where they differ, and the numbers in which they differ."""
    reasons = [side.reason(path) for side in sides]
    words = [side.told(path) for side in sides]
    a, b = reasons
    if a is None or b is None or any(path in side.edited for side in sides):
        return words
    if a.rule == b.rule:
        words[1] = "the same rule"
    return [_joined(text, _differing(mine, other)) for text, mine, other in ((words[0], a, b), (words[1], b, a))]


def _differing(mine: Reason, other: Reason) -> str:
    return shown({key: value for key, value in mine.inputs.items() if other.inputs.get(key) != value})


def _joined(words: str, numbers: str) -> str:
    return f"{words.removesuffix('.')}. From: {numbers}" if numbers else words


def _leaf_rows(a: Mapping[str, Any], b: Mapping[str, Any], *, sides: tuple[_Side, _Side], above: str = "") -> Rows:
    left, right = dict(_leaves(a, above)), dict(_leaves(b, above))
    return [
        [path, *(shown(side[path]) if path in side else MISSING for side in (left, right)), *_whys(path, sides)]
        for path in dict.fromkeys([*left, *right]) if left.get(path) != right.get(path) or (path in left) != (path in right)
    ]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Dotted paths with plain values; a list of plain values, or of lists of them, is one value."""
    inside: Any = None
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        inside = enumerate(value)
    if inside is None:
        yield path.removesuffix("."), value
        return
    for key, entry in inside:
        yield from _leaves(entry, f"{path}{key}.")


def _specs(workspace: Workspace) -> dict[str, TrainSpec]:
    """The training record of each run, by name, from its first fold."""
    found = {}
    for folder in sorted(workspace.runs.glob("*/fold_*")):
        run = RunFolder(folder)
        if folder.parent.name not in found and run.record_path.exists():
            found[folder.parent.name] = run.record().spec
    return found


def _run_rows(a: Mapping[str, TrainSpec], b: Mapping[str, TrainSpec]) -> Rows:
    rows = []
    for name in sorted({*a, *b}):
        if name in a and name in b:
            left, right = (dict(_leaves(side[name].model_dump(mode="json"), f"runs/{name}: ")) for side in (a, b))
            rows += [[path, shown(left.get(path)), shown(right.get(path)), "", ""]
                     for path in dict.fromkeys([*left, *right]) if left.get(path) != right.get(path)]
        else:
            rows.append([f"runs/{name}", *(THERE if name in side else MISSING for side in (a, b)), "", ""])
    return rows
