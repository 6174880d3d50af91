"""What a foreign dataset.json says about channels and labels, read tolerantly and validated."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autoseg.errors import DatasetError
from autoseg.types.dataset import CaseFiles, Fault
from autoseg.types.faults import fault
from autoseg.types.labels import Label, Labels, Region


@dataclass(frozen=True)
class Description:
    """Name, channel names and labels as declared, None where nothing is said; what could not be understood is in `problems`."""

    name: str | None = None
    channels: tuple[str, ...] | None = None
    labels: Labels | None = None
    problems: tuple[str, ...] = ()
    labelled: tuple[tuple[str, str], ...] = ()  # case, and the labels that are annotated in it, as they are written


def load_json(path: Path) -> Any:
    """Read a foreign JSON file. Raises DatasetError when it is missing, not text, or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not valid JSON: {error}") from None


def describe_beside(path: Path) -> tuple[Description, list[Fault]]:
    """The description in `path` if it exists; what cannot be understood is returned as faults."""
    if not path.is_file():
        return Description(), []
    try:
        data = load_json(path)
    except DatasetError as error:
        found = str(error).removeprefix(f"{path} ")
        return Description(), [fault("invalid-description", "", path, "a JSON object", found)]
    if not isinstance(data, Mapping):
        return Description(), [fault("invalid-description", "", path, "a JSON object", type(data).__name__)]
    return describe_data(data, path)


def describe_data(data: Mapping[str, object], path: Path) -> tuple[Description, list[Fault]]:
    """The description that `data`, read from `path`, holds; what cannot be understood is returned as faults."""
    description = describe(data)
    faults = [fault("invalid-description", "", path, *_halves(problem)) for problem in description.problems]
    return description, faults


def _halves(problem: str) -> tuple[str, str]:
    """Split "where: expected a, found b" into what was expected and what was found."""
    expected, comma, found = problem.partition(", found ")
    return (expected, found) if comma else ("a valid entry", problem)


def describe(data: Mapping[str, Any]) -> Description:
    """Take name, `channel_names` (or `modality`, or `channels`), `labels` and `labelled` from a dataset.json or JSON manifest.

    What is wrong goes into `problems`, so that the rest stays usable.
    """
    problems: list[str] = []
    channels: tuple[str, ...] | None = None
    labels: Labels | None = None
    for key in ("channel_names", "modality", "channels"):
        if data.get(key):
            try:
                channels = channel_names(data[key], key)
            except DatasetError as error:
                problems.append(str(error))
            break
    if data.get("labels"):
        try:
            labels = parse_labels(data["labels"], data.get("regions_class_order"))
        except DatasetError as error:
            problems.append(str(error))
    named, more = _labelled_cases(data.get("labelled"))
    name = data.get("name")
    return Description(
        name if isinstance(name, str) and name.strip() else None, channels, labels, (*problems, *more), named
    )


def _labelled_cases(value: Any) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """Cases with the labels annotated in them, from {case: [name or value, ...]}, and what cannot be understood."""
    if value is None:
        return (), []
    if not isinstance(value, Mapping):
        return (), [f'labelled: expected an object such as {{"case": ["name"]}}, found {str(value)[:80]}']
    named, problems = [], []
    for case, items in value.items():
        try:
            named.append((str(case), labelled_text(items)))
        except DatasetError as error:
            problems.append(f"labelled.{case}: {error}")
    return tuple(named), problems


def labelled_text(value: Any) -> str:
    """Annotated labels as one text, separated by semicolons. Raises DatasetError unless given names or values, or a list."""
    items = value if isinstance(value, list) else [value]
    if not items or any(isinstance(item, bool) or not isinstance(item, str | int) or not str(item).strip() for item in items):
        raise DatasetError(f"expected names or values of labels, found {str(value)[:80]}")
    return ";".join(str(item).strip() for item in items)


def annotated(text: str, labels: Labels) -> tuple[str, ...] | None:
    """Names of the foreground labels that `text` names, None when these are all.

    It names labels or regions, or has values as on disk, separated by semicolons, commas, bars or spaces; names that hold such
    characters are recognised. Raises DatasetError for what is not declared.
    """
    known = {str(label.value): {label.value} for label in labels.foreground}
    known |= {region.name.casefold(): set(region.values) for region in labels.regions}
    known |= {label.name.casefold(): {label.value} for label in labels.foreground}
    pieces = _pieces(text, known)
    unknown = [piece for piece in pieces if piece.casefold() not in known]
    if unknown or not pieces:
        raise DatasetError(f"expected some of {', '.join(label.name for label in labels.foreground)}, "
                           f"found {', '.join(unknown) or 'none'}")
    values = set().union(*(known[piece.casefold()] for piece in pieces))
    names = tuple(label.name for label in labels.foreground if label.value in values)
    return None if len(names) == len(labels.foreground) else names


def _pieces(text: str, known: Mapping[str, object]) -> list[str]:
    text = text.strip()
    for separator in (r"[;,|]", r"\s+"):
        parts = [part for part in re.split(separator, text) if part.strip()]
        if len(parts) > 1 and text.casefold() not in known:
            return [piece for part in parts for piece in _pieces(part, known)]
    return [text.strip(";,| ")] if text.strip(";,| ") else []


def with_annotated(
    cases: Sequence[CaseFiles], labels: Labels, description: Description, source: object
) -> tuple[tuple[CaseFiles, ...], list[Fault]]:
    """The cases with the names of their annotated labels; what a manifest's own column says goes before the description.

    Until then `CaseFiles.labelled` holds the text of that column. What cannot be understood is returned as faults of `source`.
    """
    said = dict(description.labelled)
    faults = [fault("invalid-description", case, source, "a case of the data set", f"labelled.{case}")
              for case in said.keys() - {case.case for case in cases}]
    result = []
    for case in cases:
        text = case.labelled[0] if case.labelled else said.get(case.case)
        names = None
        if text is not None:
            try:
                names = annotated(text, labels)
            except DatasetError as error:
                faults.append(fault("invalid-description", case.case, source, *_halves(f"labelled: {error}"),
                                    "name the labels that are annotated in this case as they are declared"))
        result.append(case.model_copy(update={"labelled": names}))
    return tuple(result), faults


def channel_names(value: Any, where: str = "channel_names") -> tuple[str, ...]:
    """Channel names in order, from a list or from an index -> name object. Raises DatasetError."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping):
        try:
            order = sorted(value, key=int)
        except (TypeError, ValueError):
            raise DatasetError(f"{where}: expected the keys 0, 1, ..., found {sorted(map(str, value))}") from None
        if [int(key) for key in order] != list(range(len(order))):
            raise DatasetError(f"{where}: expected the keys 0 to {len(order) - 1}, found {', '.join(map(str, order))}")
        value = [value[key] for key in order]
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise DatasetError(f'{where}: expected names such as {{"0": "T1"}}, found {str(value)[:80]}')
    return tuple(value)


def parse_labels(value: Any, order: Any = None) -> Labels:
    """Labels from name -> integer, name -> list of integers (a region) or integer -> name, as nnU-Net and the MSD write them.

    The background is the entry called so, else the value 0. Any region makes every other label a region of one value, and
    `order` (regions_class_order) is then needed. Raises DatasetError with the path inside the file.
    """
    entries = _entries(value)
    ignore = [(name, values) for name, values in entries if name.casefold() == "ignore"]
    rest = [(name, values) for name, values in entries if name.casefold() != "ignore"]
    if any(len(values) != 1 for _, values in ignore) or len(ignore) > 1:
        raise DatasetError(f"labels.ignore: expected one integer, found {[values for _, values in ignore]}")
    background = next((e for e in rest if e[0].casefold() == "background"), None) or next((e for e in rest if e[1] == (0,)), None)
    if background is not None and len(background[1]) != 1:
        raise DatasetError(f"labels.{background[0]}: expected one integer, found {list(background[1])}")
    foreground = [e for e in rest if e is not background]
    singles = {values[0]: name for name, values in reversed(foreground) if len(values) == 1}
    union = sorted({v for _, values in foreground for v in values})
    regions: tuple[Region, ...] = ()
    region_order: tuple[int, ...] = ()
    if any(len(values) > 1 for _, values in foreground):
        regions = tuple(Region(name=name, values=values) for name, values in foreground)
        region_order = _region_order(order, len(regions))
    elif len(union) != len(foreground):
        raise DatasetError(f"labels: two labels share a value: {sorted(v[0] for _, v in foreground)}")
    try:
        return Labels(
            background=Label(name=background[0], value=background[1][0]) if background else Label(name="background", value=0),
            foreground=tuple(Label(name=singles.get(v, f"label_{v}"), value=v) for v in union),
            ignore=Label(name=ignore[0][0], value=ignore[0][1][0]) if ignore else None,
            regions=regions, region_order=region_order,
        )
    except ValidationError as error:
        reasons = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise DatasetError(f"labels: {reasons}") from None


def _region_order(order: Any, count: int) -> tuple[int, ...]:
    if not isinstance(order, list) or len(order) != count or not all(_is_int(v) for v in order):
        raise DatasetError(f"regions_class_order: expected one label value for each of {count} regions, found {order}")
    return tuple(int(v) for v in order)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()


def _entries(value: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Every label as (name, values), in file order."""
    if not isinstance(value, Mapping):
        raise DatasetError(f"labels: expected an object of names and values, found {str(value)[:80]}")
    entries: list[tuple[str, tuple[int, ...]]] = []
    for key, item in value.items():
        name, number = str(key), item
        if isinstance(item, str) and _numeric(name):
            name, number = item, int(name)
        elif isinstance(item, str) and _numeric(item):
            number = int(item)
        values = number if isinstance(number, list) else [number]
        if not values or not all(_is_int(v) for v in values):
            raise DatasetError(f"labels.{key}: expected an integer or a list of integers, found {str(item)[:80]}")
        entries.append((name, tuple(dict.fromkeys(int(v) for v in values))))
    names = [name for name, _ in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DatasetError(f"labels: the name {twice[0]!r} is used for several values; give each label its own name")
    return entries


def _numeric(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()


def labels_from_values(values: frozenset[int] | set[int]) -> Labels:
    """Proposed labels for the values found in label files: background 0, every other value as `label_<value>`.

    Without any value but 0 there is still one label, so that the other checks can go on.
    """
    found = sorted(v for v in values if v != 0) or [1]
    return Labels(foreground=tuple(Label(name=f"label_{v}", value=v) for v in found))
