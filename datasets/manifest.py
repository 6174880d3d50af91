"""CSV and JSON manifests: a table with one row per case and one image column per channel."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoseg.datasets.description import Description, describe_beside, describe_data, labelled_text, load_json
from autoseg.datasets.msd import listed_case
from autoseg.datasets.naming import Listing, stem
from autoseg.errors import DatasetError
from autoseg.types.dataset import CaseFiles, Fault
from autoseg.types.faults import fault

MANIFEST_ENDINGS = (".csv", ".json")
COLUMNS = ("image (or image_<channel name>, or image_0, image_1, ...), label; if wanted: case, group, fold, "
           "labelled (the labels annotated in that case), and more for results by site, scanner, ...")
KNOWN = ("case", "label", "group", "fold", "image", "labelled")


@dataclass(frozen=True)
class _Table:
    """A manifest in plain form: image columns in channel order, and rows of text."""

    images: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]
    description: Description
    faults: tuple[Fault, ...]


def read_manifest(path: Path, need_labels: bool = True) -> Listing:
    """Read a manifest; relative paths start at its folder, and the order of the image columns is the order of the channels.

    A JSON manifest is {"cases": [{"image" or "images", "label", ...}], "channels": [...], "labels": {...}} or the list alone;
    for a CSV, a dataset.json beside it may give names to labels and channels. Raises DatasetError when the file as a whole is
    not a manifest; what is wrong with single rows is returned as faults.
    """
    path = path.absolute()
    table = _read_csv(path) if path.suffix.lower() == ".csv" else _read_json(path)
    if not table.rows:
        raise DatasetError(f"{path} lists no case")
    if not table.images:
        raise DatasetError(f"{path} has no image column; expected the columns {COLUMNS}, found {_keys(table.rows)}")
    if need_labels and not any(row.get("label") for row in table.rows):
        raise DatasetError(f"{path} has no label column; expected the columns {COLUMNS}, found {_keys(table.rows)}")
    faults = list(table.faults)
    cases: dict[str, CaseFiles] = {}
    for number, row in enumerate(table.rows, start=1):
        case, more = _case(path, row, table.images, number, need_labels)
        faults += more
        if case is None:
            continue
        if case.case in cases:
            faults.append(fault("colliding-case-names", case.case, row.get(table.images[0]) or path,
                                f"one row for case {case.case}", f"a second one in row {number}",
                                "add a column `case` with a name of its own for each case"))
            continue
        cases[case.case] = case
    name = table.description.name or path.stem
    return Listing("manifest", path.parent, name, table.description, tuple(cases[c] for c in sorted(cases)), tuple(faults))


def _keys(rows: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(dict.fromkeys(key for row in rows for key in row)) or "none"


def _case(path: Path, row: Mapping[str, str], columns: Sequence[str], number: int,
          need_labels: bool) -> tuple[CaseFiles | None, list[Fault]]:
    """One row as a case with faults; no case when it names no image at all."""
    images = tuple(path.parent / row[column] for column in columns if row.get(column))
    name = row.get("case", "")
    if not name and images:
        base = stem(images[0])
        several = len(columns) > 1 or re.fullmatch(r".+_0000", base)
        name = re.sub(r"_\d{4}$", "", base) if several else base
    if not images:
        where = name or f"row {number}"
        return None, [fault("missing-partner", where, path, f"an image in row {number}", "none",
                            "fill in the image, or remove the row")]
    label = path.parent / row["label"] if row.get("label") else None
    case, faults = listed_case(name, images, label)
    if need_labels and label is None:
        faults.append(fault("missing-partner", name, images[0], f"a label in row {number}", "none",
                            "fill in the label, or remove the row"))
    if len(images) < len(columns):
        missing = ", ".join(column for column in columns if not row.get(column))
        faults.append(fault("wrong-channel-count", name, images[0], f"{len(columns)} channels",
                            f"nothing in {missing} (row {number})"))
    fold = row.get("fold", "")
    if fold and not re.fullmatch(r"\d+(\.0*)?", fold):
        faults.append(fault("invalid-description", name, path, "a fold number 0, 1, ...", f"fold {fold!r} in row {number}"))
        fold = ""
    more = {key: value for key, value in row.items() if key and value and not _is_known(key)}
    labelled = (row["labelled"],) if row.get("labelled") else None  # as it is written, until the labels are known
    update = {"group": row.get("group") or None, "fold": int(float(fold)) if fold else None, "attributes": more,
              "labelled": labelled}
    return case.model_copy(update=update), faults


def _is_known(column: str) -> bool:
    """Whether a column has a meaning of its own; all others become attributes of the case."""
    return column in KNOWN or column.startswith("image_")


def _read_csv(path: Path) -> _Table:
    try:
        text = path.read_text(encoding="utf-8-sig")
        sample = text.splitlines()[0] if text.strip() else ""
        delimiter = max(",;\t", key=sample.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        names = [(name or "").strip() for name in reader.fieldnames or []]
        reader.fieldnames = names
        rows = [{k: v.strip() for k, v in row.items() if isinstance(k, str) and isinstance(v, str)} for row in reader]
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is not a CSV table: {error}") from None
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise DatasetError(f"{path}: the column {twice[0]!r} is there twice; give each column its own name")
    description, faults = describe_beside(path.parent / "dataset.json")
    images, named = _image_columns(names, path)
    if named is not None:
        description = replace(description, channels=named)
    elif description.channels is not None and len(images) > 1 and len(description.channels) != len(images):
        description = replace(description, channels=None)
    return _Table(images, tuple(row for row in rows if any(row.values())), description, tuple(faults))


def _image_columns(names: Sequence[str], path: Path) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The image columns in channel order, and the channel names if the columns carry names and not numbers."""
    columns = [name for name in names if name == "image" or name.startswith("image_")]
    if "image" in columns and len(columns) > 1:
        raise DatasetError(f"{path}: expected either one column image or one image_<channel name> per channel, "
                           f"found {', '.join(columns)}")
    if columns == ["image"] or not columns:
        return tuple(columns), None
    channels = [name.removeprefix("image_") for name in columns]
    if all(re.fullmatch(r"\d+", channel) for channel in channels):
        ordered = sorted(columns, key=lambda name: int(name.removeprefix("image_")))
        return tuple(ordered), None
    return tuple(columns), tuple(channels)


def _read_json(path: Path) -> _Table:
    data = load_json(path)
    entries = data.get("cases") if isinstance(data, Mapping) else data
    if not isinstance(entries, list):
        raise DatasetError(f'{path} is not a manifest: expected {{"cases": [...]}} or a list of cases, found {str(data)[:80]}')
    description, faults = describe_data(data, path) if isinstance(data, Mapping) else (Description(), [])
    rows: list[dict[str, str]] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise DatasetError(f"{path}: cases[{number}]: expected an object, found {str(entry)[:80]}")
        rows.append(_json_row(entry, description.channels, f"{path}: cases[{number}]"))
    columns, named = _image_columns(list(dict.fromkeys(key for row in rows for key in row)), path)
    if named is not None and description.channels is None:
        description = replace(description, channels=named)
    elif named is not None and description.channels is not None and set(named) == set(description.channels):
        columns = tuple(f"image_{channel}" for channel in description.channels)
    return _Table(columns, tuple(rows), description, tuple(faults))


def _json_row(entry: Mapping[str, Any], channels: tuple[str, ...] | None, where: str) -> dict[str, str]:
    """A JSON entry as a row of text; `images` as a list or as channel -> file becomes one column per channel."""
    row: dict[str, str] = {}
    for key, value in entry.items():
        if key == "images" or (key == "image" and isinstance(value, list | Mapping)):
            if isinstance(value, Mapping):
                parts = [(str(name), item) for name, item in value.items()]
            elif isinstance(value, list):
                names = channels if channels is not None and len(channels) == len(value) else range(len(value))
                parts = [(str(name), item) for name, item in zip(names, value, strict=True)]
            else:
                raise DatasetError(f"{where}.images: expected a list or an object of files, found {str(value)[:80]}")
            single = len(parts) == 1 and not isinstance(value, Mapping)
            for name, item in parts:
                row["image" if single else f"image_{name}"] = _text(item, f"{where}.{key}")
        elif key == "labelled" and isinstance(value, list):
            row[key] = _labelled(value, f"{where}.{key}")
        elif _is_known(key):
            row[key] = _text(value, f"{where}.{key}")
        elif isinstance(value, str | int | float):
            row[key] = str(value).lower() if isinstance(value, bool) else str(value).strip()
    return row


def _labelled(value: list[Any], where: str) -> str:
    try:
        return labelled_text(value)
    except DatasetError as error:
        raise DatasetError(f"{where}: {error}") from None


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DatasetError(f"{where}: expected text or a number, found {str(value)[:80]}")
    return str(value).strip()
