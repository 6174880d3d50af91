"""Memory that was freed: kept while wanted, by several threads, and given back after it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from autoseg.files import allocator
from autoseg.inference.memory import resident_bytes

SIZE = 64 << 20
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


@pytest.fixture
def fresh() -> Iterator[None]:
    allocator._library.cache_clear()
    yield
    allocator._library.cache_clear()


def use() -> float:
    return float(np.ones(SIZE // 8).sum())


@glibc
def test_what_is_freed_stays_inside_and_is_given_back_at_the_end() -> None:
    use()
    allocator.give_back()
    before = resident_bytes()
    with allocator.memory_kept():
        assert use() == SIZE // 8
        kept = resident_bytes() - before
    assert kept > 0.9 * SIZE
    assert resident_bytes() - before < 0.1 * SIZE


@glibc
def test_outside_large_blocks_are_given_back_at_once() -> None:
    with allocator.memory_kept():
        use()
    before = resident_bytes()
    use()
    assert resident_bytes() - before < 0.1 * SIZE


@glibc
def test_the_last_thread_to_leave_ends_it() -> None:
    both, left = Barrier(2), Barrier(2)

    def work(first: bool) -> int:
        with allocator.memory_kept():
            both.wait()
            if first:
                inside = allocator._inside[0]
            else:
                left.wait()
                inside = allocator._inside[0]
        if first:
            left.wait()
        return inside

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (True, False))) == [2, 1]
    assert allocator._inside[0] == 0


def test_another_c_library_changes_nothing(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    with allocator.memory_kept():
        assert use() == SIZE // 8 and allocator._inside[0] == 0
    allocator.give_back()
