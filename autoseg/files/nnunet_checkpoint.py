"""Reading foreign torch checkpoints without running anything that they say.

A checkpoint is a zip of one pickle and one record per tensor storage. The pickle is walked opcode by opcode by the small stack
machine below: it builds plain values, notes where tensors lie, and looks nothing up by name. Of the names that a pickle may
refer to a fixed list is known by sight; any other name, and any opcode that plain values do not need, is refused.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import RecordError
from autoseg.files.archive import Archive, open_archive

MAX_PICKLE_BYTES = 64 << 20  # the logs of a thousand epochs with a hundred classes take a tenth of it
MAX_OPCODES = 5_000_000
MAX_AXES = 8
_PICKLE = "data.pkl"
_RECORD = re.compile(  # in the one folder that torch.save makes, called after the file it wrote
    r"(?!\.\.?/)[^/\\\x00-\x1f]+/(data\.pkl|data/[0-9]+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id)"
)

_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"
_BFLOAT16 = "bfloat16"

_STORAGES = {
    "torch FloatStorage": "<f4", "torch DoubleStorage": "<f8", "torch HalfStorage": "<f2", "torch BFloat16Storage": _BFLOAT16,
    "torch LongStorage": "<i8", "torch IntStorage": "<i4", "torch ShortStorage": "<i2", "torch CharStorage": "|i1",
    "torch ByteStorage": "|u1", "torch BoolStorage": "|b1",
}

_INERT = frozenset({
    "torch device", "torch Size", "torch float16", "torch float32", "torch float64", "torch bfloat16", "torch int64",
    "numpy dtype", "numpy ndarray", "numpy.core.multiarray scalar", "numpy._core.multiarray scalar",
    "numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct", "numpy.core.numeric _frombuffer",
    "numpy._core.numeric _frombuffer", "_codecs encode", "builtins set", "__builtin__ set", "builtins bytearray",
    "pathlib PosixPath", "pathlib WindowsPath", "pathlib PurePosixPath", "pathlib._local PosixPath",
    "pathlib._local WindowsPath", "datetime datetime",
})
"""Names met in training logs and settings: what is made of them stays unread."""


@dataclass(frozen=True)
class Opaque:
    """Something in a checkpoint that is not looked into; `name` is the module and name that it was made by."""

    name: str


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its storage's record, kind and number of elements, then offset, shape and strides in elements."""

    record: str
    kind: str
    count: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: plain values, with a `TensorEntry` for every tensor and `Opaque` for what is not looked into."""

    path: Path
    values: Mapping[Any, Any] = field(repr=False)  # what refers to itself many times over would print without end

    def tensors(self, entries: Mapping[str, TensorEntry]) -> dict[str, NDArray[Any]]:
        """Read tensors by name, as arrays that share memory where they share it in the file; bfloat16 becomes float32.

        Raises:
            RecordError: a record is missing, has another size than the pickle says, or is damaged.
        """
        loaded: dict[str, NDArray[Any]] = {}
        with _opened(self.path) as records:
            return {name: _view(records, entry, loaded, name) for name, entry in entries.items()}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint as `torch.save` writes it (torch 1.6 and later), without its tensors.

    Raises:
        RecordError: missing, damaged, of the old format, or it refers to anything that a trained network does not need.
    """
    with _opened(path) as records:
        values = _Machine(records).run(records.read(_PICKLE, MAX_PICKLE_BYTES))
    if not isinstance(values, dict):
        raise RecordError(f"{path} is not a training checkpoint: expected a dictionary in it, found {type(values).__name__}")
    return Checkpoint(path, values)


def _refuse(path: Path, why: str) -> NoReturn:
    raise RecordError(f"{path} is refused, and nothing in it was run: {why}")


class _Records:
    """The records of a checkpoint's zip."""

    def __init__(self, path: Path, archive: Archive) -> None:
        self.path = path
        self._archive = archive
        pickles = [name for name in archive.sizes if name.endswith(f"/{_PICKLE}")]
        if len(pickles) != 1:
            _refuse(path, f"it holds {len(pickles)} pickles, expected one: it was not written by torch.save")
        self._root = pickles[0].removesuffix(_PICKLE)
        if f"{self._root}byteorder" in archive.sizes and self.read("byteorder", 16).strip() != b"little":
            _refuse(path, "its numbers are not little-endian")

    def size(self, name: str) -> int:
        """Bytes of a record."""
        if self._root + name not in self._archive.sizes:
            raise RecordError(f"{self.path} is damaged: it has no record {name[:40]}")
        return self._archive.sizes[self._root + name]

    def read(self, name: str, limit: int) -> bytearray:
        """The bytes of a record, its checksum compared."""
        if self.size(name) > limit:
            _refuse(self.path, f"the record {name} has {self.size(name)} bytes; at most {limit} are read")
        return self._archive.read(self._root + name)


@contextmanager
def _opened(path: Path) -> Iterator[_Records]:
    """The records of a checkpoint; whatever is wrong with the file becomes RecordError."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                _refuse(path, "it is not a zip archive. Checkpoints of torch before 1.6 and other pickles cannot be read safely; "
                              "where you trust the file, load it with torch and save it again with torch.save")
        with open_archive(path, lambda name: _RECORD.fullmatch(name) is not None) as archive:
            yield _Records(path, archive)
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        _refuse(path, f"{error}; copy or download it again")


def _view(records: _Records, entry: TensorEntry, loaded: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    """A tensor's array; storages are read once and kept in `loaded`."""
    item = 2 if entry.kind == _BFLOAT16 else np.dtype(entry.kind).itemsize
    found = records.size(entry.record)
    if found != entry.count * item:
        raise RecordError(f"{records.path} is damaged: {name} needs {entry.count * item} bytes in record {entry.record}, "
                          f"which holds {found}")
    key = f"{entry.record} {entry.kind}"
    if key not in loaded:
        data = records.read(entry.record, found)
        if entry.kind == _BFLOAT16:
            loaded[key] = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            loaded[key] = np.frombuffer(data, entry.kind)
    storage = loaded[key]
    strides = tuple(step * storage.itemsize for step in entry.strides)
    made: NDArray[Any] = np.lib.stride_tricks.as_strided(storage[entry.offset:], entry.shape, strides, writeable=False)
    return made


class _Mark:
    """Where a list of arguments begins on the stack."""


_MARK = _Mark()
_STORAGE_ID = 5  # parts of a persistent id: "storage", its type, the record's key, the device, the number of elements
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
})
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SKIPPED = frozenset({"PROTO", "FRAME"})


@dataclass(repr=False)
class _Machine:
    """A stack machine for the opcodes that plain values, tensors and inert objects need."""

    records: _Records
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, pickled: bytes | bytearray) -> Any:
        """The value that the pickle describes."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(bytes(pickled))):
                if count >= MAX_OPCODES:
                    _refuse(self.records.path, f"its pickle has more than {MAX_OPCODES} steps")
                self._step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError, struct.error) as error:
            raise RecordError(f"{self.records.path} is damaged: its pickle cannot be followed ({error})") from None
        if len(self.stack) != 1:
            raise RecordError(f"{self.records.path} is damaged: its pickle leaves {len(self.stack)} values instead of one")
        return self.stack[0]

    def _step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _LITERALS:
            self.stack.append(_LITERALS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name in _TUPLES:
            values = [self._pop() for _ in range(_TUPLES[name])]
            self.stack.append(tuple(values[::-1]))
        elif name == "STOP":
            return
        elif name not in _SKIPPED:
            self._collect(name, argument)

    def _collect(self, name: str, argument: Any) -> None:
        """Opcodes that put several values together, or name something."""
        if name == "TUPLE":
            self.stack.append(tuple(self._marked()))
        elif name in ("APPEND", "APPENDS"):
            values = [self._pop()] if name == "APPEND" else self._marked()
            self._top(list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = [self._pop(), self._pop()][::-1] if name == "SETITEM" else self._marked()
            self._set(self.stack[-1], values)
        elif name == "ADDITEMS":
            self._top(set).update(self._key(value) for value in self._marked())
        elif name == "GLOBAL":
            self.stack.append(self._named(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            self.stack.append(self._named(f"{module} {attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = self._pop(), self._pop()
            self.stack.append(self._made(function, arguments))
        elif name == "BUILD":  # the state of an OrderedDict is metadata of its tensors; that of inert objects stays unread
            self._pop()
            if not isinstance(self.stack[-1], dict | Opaque):
                _refuse(self.records.path, f"it sets the state of a {type(self.stack[-1]).__name__}")
        elif name == "BINPERSID":
            self.stack.append(self._storage(self._pop()))
        else:
            _refuse(self.records.path, f"its pickle uses the step {name}, which the checkpoint of a network never needs")

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a value is missing")
        return value

    def _marked(self) -> list[Any]:
        """The values above the last mark, which goes."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("a mark is missing")
        values = self.stack[place + 1:]
        del self.stack[place:]
        return values

    def _top(self, kind: type[Any]) -> Any:
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"expected a {kind.__name__}, found {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def _key(self, value: Any) -> Any:
        """A value that may be looked up: plain, so that hashing it cannot go deep."""
        if isinstance(value, tuple) and all(isinstance(part, str | bytes | int | float | None) for part in value):
            return value
        if not isinstance(value, str | bytes | int | float | None):
            _refuse(self.records.path, f"it uses a {type(value).__name__} as a key")
        return value

    def _set(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Opaque):
            return
        if not isinstance(target, dict) or len(values) % 2:
            raise TypeError("values are set on something that is not a dictionary")
        target.update((self._key(key), value) for key, value in zip(values[::2], values[1::2], strict=True))

    def _named(self, name: str) -> Opaque:
        if name not in _INERT and name not in _STORAGES and name not in (_REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT):
            shown = name.replace(" ", ".")[:80]
            _refuse(self.records.path, f"it refers to {shown}, which the checkpoint of a network does not need; loaded the usual "
                                       "way it could run code")
        return Opaque(name)

    def _made(self, function: Any, arguments: Any) -> Any:
        """What calling a known name would give, worked out here; of inert names an inert object."""
        if not isinstance(function, Opaque) or not isinstance(arguments, tuple):
            _refuse(self.records.path, f"it calls a {type(function).__name__}")
        if function.name == _ORDERED_DICT:
            made: dict[Any, Any] = {}
            for pairs in arguments:
                self._set(made, [value for pair in pairs for value in pair])
            return made
        if function.name == _REBUILD_PARAMETER:
            return arguments[0]
        if function.name == _REBUILD_TENSOR:
            return self._tensor(*arguments[:4])
        return Opaque(function.name)

    def _storage(self, identity: Any) -> TensorEntry:
        """The whole of a storage, as one row."""
        if not isinstance(identity, tuple) or len(identity) != _STORAGE_ID or identity[0] != "storage":
            _refuse(self.records.path, "it refers to something outside of it that is not a tensor's storage")
        _, kind, key, _, count = identity
        if not isinstance(kind, Opaque) or kind.name not in _STORAGES or not isinstance(key, str) or not _is_count(count):
            _refuse(self.records.path, "it declares a storage of an unknown kind")
        return TensorEntry(f"data/{key}", _STORAGES[kind.name], count, 0, (count,), (1,))

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> TensorEntry:
        """A tensor in a storage: every element inside it, and no two in one place."""
        if not isinstance(storage, TensorEntry) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise TypeError("a tensor without storage, shape or strides")
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or len(shape) > MAX_AXES or not all(_is_count(n) for n in numbers):
            _refuse(self.records.path, "it declares a tensor of an impossible shape")
        last = offset
        if math.prod(shape):
            reach = 1
            for step, size in sorted((step, size) for step, size in zip(strides, shape, strict=True) if size > 1):
                if step < reach:
                    _refuse(self.records.path, f"it declares a tensor of shape {shape} whose elements overlap")
                reach = step * (size - 1) + reach
            last = offset + reach
        if last > storage.count:
            _refuse(self.records.path, f"it declares a tensor of shape {shape} in a storage of {storage.count} numbers")
        return TensorEntry(storage.record, storage.kind, storage.count, offset, shape, strides)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48
