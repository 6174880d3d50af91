"""The model file: one zip of model.json and the weights, written whole and read with suspicion.

Opening one checks everything before a tensor is made: the zip, model.json, the networks it describes, the headers of all weights
against them, and the hash of every part that is read. Nothing in it is imported, evaluated or unpickled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from autoseg.arrays.postprocess import POSTPROCESSING
from autoseg.errors import AutosegError, PlanError, RecordError, RunError
from autoseg.files.archive import Archive, open_archive, write_archive
from autoseg.files.tensors import CODES, TensorPlace, make_tensors, parse_json, read_header, require_shapes
from autoseg.files.workspace import atomic_path, to_json, validate
from autoseg.networks.describe import Description, describe
from autoseg.networks.limits import require_sane, tensor_shapes
from autoseg.types.model import RUN_NAME, ModelRecord, Part

if TYPE_CHECKING:
    import torch

MODEL = "model.json"
ENDING = ".autoseg"
MOST_RECORD_BYTES = 16 << 20
MOST_STEPS = 100
SHOWN_LINES = 8  # of what is wrong with a record
_PART = re.compile(rf"weights/{RUN_NAME}/fold_(0|[1-9][0-9]{{0,3}})\.safetensors")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control and half characters, but tab and newline

Tensors = dict[str, "torch.Tensor"]
Weights = Mapping[str, Callable[[], bytes]]  # safetensors bytes by part name; asked for more than once


@dataclass(frozen=True)
class ModelFile:
    """A model file that has been checked; `key` is the SHA-256 of its model.json, which holds those of all other parts."""

    path: Path
    record: ModelRecord
    key: str

    def read(self, parts: Sequence[str]) -> dict[str, Tensors]:
        """The weights of some parts as float32 tensors; all hashes are compared before the first tensor is made.

        Raises RecordError when the file has changed or is damaged.
        """
        raw: dict[str, tuple[bytearray, dict[str, TensorPlace]]] = {}
        with _opened(self.path) as archive:
            for name in parts:
                with _part(self.path, name):
                    places = _places(archive, self.record, name)
                    data = archive.read(name)
                    _require_hash(hashlib.sha256(data).hexdigest(), self.record.parts[name].sha256)
                    raw[name] = data, places
        return {name: make_tensors(data, places) for name, (data, places) in raw.items()}

    def verify(self) -> None:
        """Compare the hash of every part. Raises RecordError when one is wrong."""
        with _opened(self.path) as archive:
            for name, part in self.record.parts.items():
                with _part(self.path, name):
                    _require_hash(archive.sha256(name), part.sha256)


def open_model_file(path: Path) -> ModelFile:
    """Open and check a model file; hashes are compared when parts are read (or by `verify`).

    Raises:
        RecordError: not a model file, damaged, inconsistent, of a newer format, or describing what no machine should build.
    """
    with _opened(path) as archive:
        with _part(path, MODEL):
            if archive.sizes.get(MODEL, 0) > MOST_RECORD_BYTES:
                raise ValueError(f"it has {archive.sizes[MODEL]} bytes, at most {MOST_RECORD_BYTES} are accepted")
            if MODEL not in archive.sizes:
                raise ValueError("it is missing")
            text = bytes(archive.read(MODEL))
            record = _record(parse_json(text))
            _require_parts(record, archive)
            _require_networks(record)
            _require_steps(record)
        for name in record.part_names:
            with _part(path, name):
                _places(archive, record, name)
    return ModelFile(path, record, hashlib.sha256(text).hexdigest())


def write_model_file(path: Path, record: ModelRecord, weights: Weights, overwrite: bool = False) -> ModelFile:
    """Write a model file, atomically, and open it again as a check; the record's `parts` are filled in.

    A file that holds this very model stays as it is.

    Raises:
        RunError: the path holds something else and `overwrite` is not set, or is a folder.
        RecordError: the record and the weights do not make a model file that could be opened.
    """
    if path.is_dir():
        raise RunError(f"{path} is a folder; give the name of a file, such as {path / ('model' + ENDING)}")
    names = record.part_names
    if set(names) != set(weights):
        raise ValueError(f"expected weights for {sorted(names)}, found {sorted(weights)}")
    parts = {name: _measured(weights[name]()) for name in names}
    whole = record.model_copy(update={"parts": parts})
    text = (to_json(whole.model_dump(mode="json")) + "\n").encode()
    if path.exists():
        known = _known(path)
        if known is not None and known.key == hashlib.sha256(text).hexdigest():
            return known
        if not overwrite:
            raise RunError(f"{path} exists and is not this model; choose another --out, or give --overwrite to replace it")
    with atomic_path(path) as temporary:
        write_archive(temporary, {MODEL: lambda: text, **{name: weights[name] for name in names}})
        try:
            open_model_file(temporary).verify()
        except RecordError as error:
            raise RecordError(str(error).replace(str(temporary), str(path))) from None
    return open_model_file(path)


def _measured(data: bytes) -> Part:
    return Part(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _known(path: Path) -> ModelFile | None:
    """The whole and sound model file that is there; None where there is none."""
    try:
        known = open_model_file(path)
        known.verify()
    except AutosegError:
        return None
    return known


@contextmanager
def _opened(path: Path) -> Iterator[Archive]:
    """The archive; whatever is wrong with it becomes RecordError."""
    if not path.exists():
        raise RecordError(f"{path} does not exist")
    if not path.is_file():
        raise RecordError(f"{path} is not a file")
    try:
        with open_archive(path, lambda name: name == MODEL or _PART.fullmatch(name) is not None) as archive:
            yield archive
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise _refusal(path, "the zip file", error) from None


@contextmanager
def _part(path: Path, name: str) -> Iterator[None]:
    """Whatever is wrong with one part becomes RecordError that names it."""
    try:
        yield
    except (ValueError, RecordError, PlanError, TypeError, ArithmeticError, RecursionError) as error:
        raise _refusal(path, name, error) from None


def _refusal(path: Path, part: str, error: Exception) -> RecordError:
    lines = (str(error) or type(error).__name__).splitlines()
    shown = "\n".join(line[:400] for line in lines[:SHOWN_LINES])
    more = f"\n  and {len(lines) - SHOWN_LINES} more" if len(lines) > SHOWN_LINES else ""
    return RecordError(f"{path} is refused as a model file: {part}: {_UNPRINTABLE.sub('?', shown)}{more}\n"
                       "get the file again from where it came, or pack the model anew")


def _require_hash(found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"its SHA-256 is {found}, but {MODEL} says {expected}: it is damaged or was altered")


def _record(data: Any) -> ModelRecord:
    """The validated record. Raises RecordError or ValueError."""
    if not isinstance(data, dict):
        raise ValueError("it is not an object")
    number = data.get("format")
    if type(number) is int and number > 1:
        raise ValueError(f"it is of format {number}, this version of autoseg reads format 1; update autoseg")
    _require_clean_texts(data)
    return validate(data, ModelRecord, "it")


def _require_clean_texts(data: Any) -> None:
    """Refuse control characters in any text or key: they would reach terminals and rewrite their lines."""
    pending = [data]
    while pending:
        item = pending.pop()
        if isinstance(item, str) and _UNPRINTABLE.search(item):
            raise ValueError(f"the text {_UNPRINTABLE.sub('?', item)[:60]!r} holds control characters")
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item


def _require_parts(record: ModelRecord, archive: Archive) -> None:
    """What the record says there is, what its networks need and what there is must be the same."""
    for run in record.networks:
        if not re.fullmatch(RUN_NAME, run):
            raise ValueError(f"networks: {run[:100]!r} is not a name for a run")
    listed, there = set(record.parts), set(archive.sizes) - {MODEL}
    for what, names in (("its networks need", set(record.part_names)), ("the zip file holds", there)):
        if listed != names:
            wrong = sorted(listed ^ names)
            raise ValueError(f"parts: {len(listed)} are listed, {what} {len(names)}; they differ in {wrong[0][:120]!r}")
    for name, part in record.parts.items():
        if part.size != archive.sizes[name]:
            raise ValueError(f"parts: {name} should have {part.size} bytes, found {archive.sizes[name]}")


def _require_networks(record: ModelRecord) -> None:
    """Every described network must be one that can be built, and labels must fit into the masks' integers."""
    for value in record.labels.values:
        if not -(2**31) <= value < 2**31:
            raise ValueError(f"labels: the value {value} does not fit into a mask")
    for run in record.networks:
        try:
            tensor_shapes(describe_run(record, run))
        except (ValueError, PlanError) as error:
            raise ValueError(f"networks.{run}: {error}") from None


def describe_run(record: ModelRecord, run: str) -> Description:
    """The network of a run. Raises ValueError or PlanError where it is not one that can be built."""
    configuration, inputs, outputs = record.configuration_of(run), record.input_channels(run), record.labels.output_count
    require_sane(configuration, inputs, outputs)
    return describe(configuration, inputs, outputs)


def _require_steps(record: ModelRecord) -> None:
    """Post-processing must consist of built-in steps with their own options."""
    if len(record.postprocessing) > MOST_STEPS:
        raise ValueError(f"postprocessing: at most {MOST_STEPS} steps are accepted, found {len(record.postprocessing)}")
    for index, step in enumerate(record.postprocessing):
        if step.kind not in POSTPROCESSING:
            raise ValueError(f"postprocessing.{index}: unknown step {step.kind[:60]!r}; known are {', '.join(POSTPROCESSING)}")
        try:
            options = POSTPROCESSING[step.kind].options.model_validate(step.options)
        except ValidationError as error:
            first = error.errors()[0]
            spot = ".".join(map(str, first["loc"]))
            raise ValueError(f"postprocessing.{index}.options.{spot}: {first['msg']}") from None
        _require_known_labels(f"postprocessing.{index}.options", options, record)


def _require_known_labels(where: str, options: Any, record: ModelRecord) -> None:
    """Labels, outputs and channels that a step names must be there."""
    count = len(record.labels.foreground)
    for name in ("labels", "regions"):
        values = getattr(options, name, None) or ()
        if not all(1 <= value <= count for value in values):
            raise ValueError(f"{where}.{name}: expected numbers of labels from 1 to {count}, found {str(values)[:80]}")
    outputs = record.labels.output_count
    if len(getattr(options, "values", ())) not in (0, outputs):
        raise ValueError(f"{where}.values: expected {outputs} thresholds, one for each output, found {len(options.values)}")
    if not 0 <= getattr(options, "channel", 0) < len(record.channels):
        raise ValueError(f"{where}.channel: expected 0 to {len(record.channels) - 1}, found {options.channel}")


def _places(archive: Archive, record: ModelRecord, name: str) -> dict[str, TensorPlace]:
    """The tensors of a part, which must be exactly those of the described network. Raises ValueError."""
    run = name.split("/")[1]
    with archive.stream(name) as part:
        places = read_header(part.read, archive.sizes[name])
    require_shapes(places, tensor_shapes(describe_run(record, run)), CODES[record.weights])
    return places
