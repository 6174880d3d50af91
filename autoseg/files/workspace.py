"""The work folder: where each record and each run lies, and how records are saved and loaded safely."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from autoseg.errors import RecordError
from autoseg.types.dataset import Dataset, Split
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Configuration, Plan, plan_schema

T = TypeVar("T")
PLAN_SCHEMA = "plan.schema.json"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same ending); on success it is flushed to disk and renamed, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head, dot, tail = path.name.partition(".")
    handle, name = tempfile.mkstemp(prefix=f".{head}-", suffix=f"{dot}{tail}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_record(path: Path, record: Any, kind: Any = None) -> None:
    """Save a record (or a list of records, with its type as `kind`) as indented JSON, atomically."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind if kind is not None else type(record))
    write_text(path, to_json(adapter.dump_python(record, mode="json")) + "\n")


def to_json(data: Any) -> str:
    """Indented JSON in which a list without nested objects takes one line, so that plans and folds can be read and edited."""
    text = json.dumps(data, indent=1, allow_nan=True)
    for rows in (r"[^\[\]{}]*", r"(?:\s*\[[^\[\]\n]*\],?)+"):  # lists of plain values, then lists of such lists
        text = re.sub(rf"\[\n({rows})\n\s*\]", lambda match: f"[{_one_line(match[1])}]", text)
    return text


def _one_line(items: str) -> str:
    return re.sub(r",\n\s*", ", ", items.strip())


def load_record(path: Path, kind: type[T]) -> T:
    """Load and validate a record.

    Raises RecordError with the file, the exact path inside it, and what is wrong.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist") from None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of thousands of digits
        raise RecordError(f"{path} is not valid JSON: {error}") from None
    return validate(data, kind, str(path))


def validate(data: Any, kind: type[T], where: str) -> T:
    """Validate plain data as `kind`; RecordError names `where` and every faulty path."""
    try:
        result: T = TypeAdapter(kind).validate_python(data, strict=False)
        return result
    except ValidationError as error:
        lines = []
        for item in error.errors():
            spot = ".".join(str(part) for part in item["loc"]) or "(top level)"
            message = item["msg"].removeprefix("Value error, ")
            found = "" if item["type"] in ("missing", "value_error") else f" (found {str(item['input'])[:80]})"
            lines.append(f"{spot}: {message}{found}")
        raise RecordError(f"{where} is not valid:\n  " + "\n  ".join(lines)) from None


class Workspace:
    """A work folder. Paths only; nothing is created until something is saved."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()

    @property
    def dataset_path(self) -> Path:
        """The Dataset record."""
        return self.root / "dataset.json"

    @property
    def fingerprint_path(self) -> Path:
        """The Fingerprint record."""
        return self.root / "fingerprint.json"

    @property
    def plan_path(self) -> Path:
        """The Plan record."""
        return self.root / "plan.json"

    @property
    def splits_path(self) -> Path:
        """The folds: a list of {train, val}."""
        return self.root / "splits.json"

    @property
    def selection_path(self) -> Path:
        """The Selection record."""
        return self.root / "selection.json"

    @property
    def preprocessed(self) -> Path:
        """The folder of preprocessed cases."""
        return self.root / "preprocessed"

    @property
    def runs(self) -> Path:
        """The folder of runs."""
        return self.root / "runs"

    def fold(self, run: str, fold: int) -> Path:
        """The folder of one fold of a run."""
        return self.runs / run / f"fold_{fold}"

    def require(self) -> Workspace:
        """Return self; raises RecordError when this is not a work folder."""
        if not self.plan_path.exists():
            raise RecordError(
                f"{self.root} is not a work folder: it holds no plan.json; make one with: autoseg plan DATASET --out {self.root}"
            )
        return self

    def dataset(self) -> Dataset:
        """Load dataset.json."""
        return load_record(self.dataset_path, Dataset)

    def fingerprint(self) -> Fingerprint:
        """Load fingerprint.json."""
        return load_record(self.fingerprint_path, Fingerprint)

    def plan(self) -> Plan:
        """Load plan.json."""
        return load_record(self.require().plan_path, Plan)

    def splits(self) -> list[Split]:
        """Load splits.json."""
        return load_record(self.splits_path, list[Split])

    def save_plan(self, plan: Plan) -> None:
        """Save plan.json, and beside it the JSON schema by which editors check it.

        A configuration that the file has in part (it inherits the rest) stays written that way as long as it means the same.
        """
        data = {"$schema": PLAN_SCHEMA, **plan.model_dump(mode="json", exclude={"reasons"})}
        entries: dict[str, Any] = data["configurations"]
        written = self.written_configurations()
        for name in set(written) & set(entries):
            if _means(written[name], plan.configurations[name], plan):
                entries[name] = written[name]
        text = to_json(data).removesuffix("\n}")
        lines = [f"  {json.dumps(path)}: {json.dumps(reason.model_dump(mode='json'))}" for path, reason in plan.reasons.items()]
        inside = "\n" + ",\n".join(lines) + "\n " if lines else ""
        write_text(self.root / PLAN_SCHEMA, to_json(plan_schema()) + "\n")
        write_text(self.plan_path, f'{text},\n "reasons": {{{inside}}}\n}}\n')

    def written_configurations(self) -> dict[str, Any]:
        """The configurations of plan.json as they are written there; none where it is missing or damaged."""
        try:
            data = json.loads(self.plan_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        found = data.get("configurations") if isinstance(data, dict) else None
        return found if isinstance(found, dict) else {}


def _means(entry: Any, configuration: Configuration, plan: Plan) -> bool:
    """Whether an entry that inherits, as a person wrote it, comes to this configuration of the plan."""
    parent = plan.configurations.get(str(entry.get("inherits_from"))) if isinstance(entry, dict) else None
    if parent is None:
        return False
    try:
        return Configuration.model_validate({**parent.model_dump(), **entry}) == configuration
    except ValidationError:
        return False
