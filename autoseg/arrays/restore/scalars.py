"""Numbers as the compiled loops of restoring read, compare and round them.

int16 is float16 as bits and uint16 bfloat16 as bits, read without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])
Numbers = NDArray[Any]
Int = Any  # a whole number; numba gives each its own width
Real = Any

_SIGN, _ONE, _HALF = np.int16(15), np.float32(1), np.float32(0.5)
_REBIAS = np.float32(2.0**112)  # from float16's exponent to float32's
_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_SERIES = tuple(np.float32(1 / k) for k in (5040, 720, 120, 24, 6, 2, 1, 1))  # of exp, highest power first
_LEAST, _MOST = np.float32(-87), np.float32(88)


def kernel(function: F) -> F:
    """Compile a function when it is first called, and keep what was compiled on disk where that is possible."""
    compiled: Any = njit(cache=True, nogil=True)(function)
    cache = compiled._cache
    cache.save_overload, cache.load_overload = _or_nothing(cache.save_overload), _or_nothing(cache.load_overload)
    return cast(F, compiled)


def _or_nothing(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but a disk that is full or cannot be read is no reason to fail."""

    def attempt(*arguments: Any) -> Any:
        with suppress(OSError):
            return work(*arguments)
        return None

    return attempt


def as_float(flat: Numbers, i: Int) -> Real:
    """Number i as float32."""
    raise NotImplementedError


def as_order(flat: Numbers, i: Int, half: bool) -> Real:
    """A number that compares as number i does; with `half` as it does after rounding to float16."""
    raise NotImplementedError


def from_order(flat: Numbers, order: Int) -> Real:
    """The number, as float32, that has this order among numbers of the type of `flat`."""
    raise NotImplementedError


def _value_of(flat: Any, i: Any) -> Any:
    if flat.dtype == types.int16:
        return lambda flat, i: _from_half(flat[i])
    if flat.dtype == types.uint16:
        return lambda flat, i: np.int32(np.int32(flat[i]) << 16).view(np.float32)
    return lambda flat, i: flat[i]


def _order_of(flat: Any, i: Any, half: Any) -> Any:
    if flat.dtype == types.float32:
        return lambda flat, i, half: _order_single(rounded(flat[i]) if half else flat[i])
    return lambda flat, i, half: _order_half(np.int16(flat[i]))


def _ordered_of(flat: Any, order: Any) -> Any:
    if flat.dtype == types.int16:
        return lambda flat, order: _from_half(order ^ ((order >> _SIGN) & np.int16(0x7FFF)))
    if flat.dtype == types.uint16:
        return lambda flat, order: np.int32(np.int32(order ^ ((order >> _SIGN) & np.int16(0x7FFF))) << 16).view(np.float32)
    return lambda flat, order: np.int32(order ^ ((order >> 31) & 0x7FFFFFFF)).view(np.float32)


overload(as_float, strict=False)(_value_of)
overload(as_order, strict=False)(_order_of)
overload(from_order, strict=False)(_ordered_of)


@kernel
def _from_half(bits: Int) -> Real:
    wide = np.int32(bits)
    moved = np.int32((wide & 0x7FFF) << 13)
    size = moved.view(np.float32) * _REBIAS
    if moved >= 0x0F800000:  # infinite, or not a number
        size = np.int32(moved + 0x70000000).view(np.float32)
    return -size if wide < 0 else size


@kernel
def _order_half(bits: Int) -> Int:
    order = np.int16(bits ^ ((bits >> _SIGN) & np.int16(0x7FFF)))
    return np.int16(0) if order == -1 else order  # -0 is 0


@kernel
def _order_single(value: Real) -> Int:
    bits = np.float32(value).view(np.int32)
    order = np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return np.int32(0) if order == -1 else order  # -0 is 0


@kernel
def rounded(value: Real) -> Real:
    """Rounded to float16, ties to even."""
    size = abs(value)
    if size < np.float32(2.0**-14):
        near = (size + np.float32(0.75)) - np.float32(0.75)
    else:
        bits = np.float32(size).view(np.int32)
        near = np.int32((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(np.float32)
        if near > np.float32(65504):
            near = np.float32(np.inf)
    return -near if value < 0 else near


@kernel
def lerp(a: Real, b: Real, weight: Real) -> Real:
    if weight < _HALF:
        return a + weight * (b - a)
    return b - (b - a) * (_ONE - weight)


@kernel
def exp(value: Real) -> Real:
    """e to a power, to a few units in the last place."""
    value = min(max(value, _LEAST), _MOST)
    power = np.floor(value * _LOG2E + _HALF)
    rest = value - power * _LN2_HIGH - power * _LN2_LOW
    found = _SERIES[0]
    for k in range(1, 8):
        found = found * rest + _SERIES[k]
    return found * np.int32((np.int32(power) + 127) << 23).view(np.float32)


def order_type(flat: Numbers) -> Any:
    """The type of what `as_order` gives."""
    raise NotImplementedError


def _order_array_of(flat: Any) -> Any:
    if flat.dtype == types.float32:
        return lambda flat: np.int32
    return lambda flat: np.int16


overload(order_type, strict=False)(_order_array_of)
