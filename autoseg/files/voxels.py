"""Voxels from a stream, plain or packed, with every early end and failed checksum told; and label values as integers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DatasetError

_BLOCK = 1 << 22
_MOST_EXTRA = 1 << 24
WHOLE = 1e-3  # how far label values stored as floats may be from whole numbers


class NotWholeError(DatasetError):
    """A label file holds values that are not whole numbers."""


def igzip() -> Any:
    """The fast gzip module."""
    from isal import igzip

    return igzip


@contextmanager
def unpacking() -> Iterator[None]:
    """Turn what gzip and zlib raise for damaged data into DatasetError."""
    from isal import isal_zlib

    damage: Any = (igzip().BadGzipFile, isal_zlib.error, zlib.error)
    try:
        yield
    except EOFError:
        raise DatasetError("is truncated: its packed data end early; copy or export it again") from None
    except damage as error:
        raise DatasetError(f"has damaged packed data ({error}); copy or export it again") from None


class Deflated:
    """A zlib stream read like a file, checked against its checksum at the end."""

    def __init__(self, stream: BinaryIO) -> None:
        from isal import isal_zlib

        self._stream: Any = stream
        self._decoder: Any = isal_zlib.decompressobj()

    def readinto(self, target: memoryview) -> int:
        """Fill as much of `target` as one block gives; 0 at the end. Raises EOFError when the stream ends early."""
        while not self._decoder.eof:
            packed = self._decoder.unconsumed_tail or self._stream.read(_BLOCK)
            data = self._decoder.decompress(packed, len(target))
            if data:
                target[:len(data)] = data
                return len(data)
            if not packed:
                raise EOFError
        return 0


def fill(stream: Any, dtype: np.dtype[Any], count: int, packed: bool) -> NDArray[Any]:
    """Read exactly `count` numbers; a packed stream is read to its end, where it compares its checksum.

    Raises DatasetError when the stream ends early, or goes on for long.
    """
    flat = np.empty(count, dtype)
    view = memoryview(flat.view(np.uint8))  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        got = stream.readinto(view[done:done + _BLOCK])
        if not got:
            raise DatasetError(f"is truncated: expected {len(view)} bytes of voxels, found {done}; copy or export it again")
        done += got
    rest = memoryview(bytearray(1 << 16))
    extra = 0
    while packed and (got := stream.readinto(rest)):
        extra += got
        if extra > _MOST_EXTRA:
            raise DatasetError(f"is damaged: its data go on after the {len(view)} bytes of voxels that its header declares")
    return flat


def whole(array: NDArray[Any]) -> NDArray[np.integer[Any]]:
    """Label values (z, y, x) as integers; NotWholeError when one is farther than `WHOLE` from a whole number."""
    if array.dtype.kind in "ui":
        return array
    result = np.empty(array.shape, np.int32)
    for index, plane in enumerate(array):  # plane by plane, so that no second float array is needed
        with np.errstate(invalid="ignore"):  # infinite minus infinite
            rounded = np.rint(plane)
            wrong = ~(np.abs(plane - rounded) <= WHOLE) | (np.abs(rounded) > np.iinfo(np.int32).max)
        if wrong.any():
            raise NotWholeError(f"holds the value {plane[wrong][0]:.6g}: expected whole numbers as labels; "
                                "export it again without interpolation")
        result[index] = rounded
    return result


def smallest(label: NDArray[np.integer[Any]]) -> type[np.integer[Any]]:
    """The smallest integer type that holds all values."""
    low, high = int(label.min()), int(label.max())
    for dtype in (np.uint8, np.uint16, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    return np.int64
