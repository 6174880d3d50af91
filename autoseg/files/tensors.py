"""Tensors as safetensors bytes that come from anywhere: every number of the header is checked before a tensor is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from autoseg.errors import RunError
from autoseg.types.model import WeightsPrecision
from autoseg.types.plan import Ints

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
CODES: dict[str, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
MOST_HEADER_BYTES = 16 << 20
MOST_AXES = 5
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: bytes `begin` to `end` counted from the part's first byte."""

    dtype: str
    shape: Ints
    begin: int
    end: int


def read_header(read: Callable[[int], bytes], size: int) -> dict[str, TensorPlace]:
    """Read and check the header of a safetensors part of `size` bytes; `read` gives its next n bytes.

    The format: 8 bytes little-endian header length, a JSON object of dtype, shape and data_offsets, then the tensors' bytes
    (https://github.com/huggingface/safetensors). Only float tensors are accepted, and they must fill the data without gaps.
    Raises ValueError for anything else.
    """
    if size < 8:
        raise ValueError(f"it has {size} bytes, too few for a header")
    length = int.from_bytes(read(8), "little")
    if length > min(MOST_HEADER_BYTES, size - 8):
        raise ValueError(f"its header claims {length} bytes, but at most {min(MOST_HEADER_BYTES, size - 8)} are possible")
    data = parse_json(read(length))
    if not isinstance(data, dict):
        raise ValueError("its header is not an object")
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header's __metadata__ must hold texts")
    places = {name: _place(name, entry, 8 + length, size) for name, entry in data.items()}
    ordered = sorted(places.values(), key=lambda place: (place.begin, place.end))
    ends = [8 + length, *(place.end for place in ordered)]
    starts = [*(place.begin for place in ordered), size]
    if ends != starts:
        raise ValueError("its tensors overlap or leave gaps")
    return places


def parse_json(text: bytes) -> Any:
    """JSON without duplicate keys, NaN or infinite numbers. Raises ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = next(a for a, b in pairwise(sorted(key for key, _ in pairs)) if a == b)
            raise ValueError(f"the key {twice!r} is there twice")
        return made

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"the number {number[:40]} is not finite")
        return value

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None


def _place(name: str, entry: object, start: int, size: int) -> TensorPlace:
    """One checked entry of a header whose data begins at `start`."""
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise ValueError(f"tensor {name!r} must be described by {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} has type {str(dtype)[:40]!r}; accepted are {', '.join(ITEM_BYTES)}")
    if not _whole_numbers(shape) or len(shape) > MOST_AXES or not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has the impossible shape {str(shape)[:80]} or offsets {str(offsets)[:80]}")
    begin, end = offsets
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if not begin <= end <= size - start:
        raise ValueError(f"tensor {name!r} lies at bytes {begin} to {end} of {size - start} bytes of data")
    if end - begin != needed:
        raise ValueError(f"tensor {name!r} of shape {shape} needs {needed} bytes, but {end - begin} are given to it")
    return TensorPlace(dtype, tuple(shape), start + begin, start + end)


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def require_shapes(places: Mapping[str, TensorPlace], shapes: Mapping[str, Ints], dtype: str) -> None:
    """Raise ValueError unless there are exactly the tensors of `shapes`, all of type `dtype`."""
    missing, surplus = sorted(set(shapes) - set(places)), sorted(set(places) - set(shapes))
    if missing or surplus:
        first = f"lacks {missing[0]!r}" if missing else f"holds {surplus[0]!r}, which the network does not have"
        raise ValueError(f"it {first} ({len(missing)} tensors missing, {len(surplus)} too many)")
    for name, place in places.items():
        if place.shape != shapes[name]:
            raise ValueError(f"tensor {name!r} has shape {list(place.shape)}, the described network needs {list(shapes[name])}")
        if place.dtype != dtype:
            raise ValueError(f"tensor {name!r} has type {place.dtype}, expected {dtype}")


def make_tensors(data: bytearray, places: Mapping[str, TensorPlace]) -> dict[str, torch.Tensor]:
    """Float32 tensors of checked places; those stored as aligned float32 share memory with `data`."""
    import torch

    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    made: dict[str, torch.Tensor] = {}
    for name, place in places.items():
        count, kind = math.prod(place.shape), kinds[place.dtype]
        if not count:
            made[name] = torch.zeros(place.shape)
            continue
        aligned = place.begin % 4 == 0
        source = data if aligned else data[place.begin : place.end]
        flat = torch.frombuffer(source, dtype=kind, count=count, offset=place.begin if aligned else 0)
        made[name] = flat.reshape(place.shape).float()
    return made


def tensor_bytes(tensors: Mapping[str, torch.Tensor], precision: WeightsPrecision = "fp32") -> bytes:
    """Tensors as safetensors bytes, rounded to `precision`; equal tensors give equal bytes.

    Raises RunError where a number is not finite, or too large for the precision.
    """
    import torch
    from safetensors.torch import save

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    made: dict[str, torch.Tensor] = {}
    for name, tensor in sorted(tensors.items()):
        made[name] = tensor.detach().cpu().to(kind).contiguous()
        if not torch.isfinite(made[name]).all():
            fits = bool(torch.isfinite(tensor).all())
            raise RunError(f"{name} holds numbers that {'do not fit into ' + precision if fits else 'are NaN or infinite'}"
                           + ("; choose bf16 or fp32" if fits else ""))
    return bytes(save(made))
