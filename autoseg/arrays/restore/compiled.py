"""Restoring in main memory with compiled loops, on several threads."""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.arrays.restore.sources import Job, Member, RestoredPlane

_GROUP_BYTES = 4 << 20  # source planes read together, and output planes made together, where single planes are smaller
_MEAN_BYTES = 4 << 20  # mean probabilities of some rows, while only labels are wanted
_PARTS = 4  # pieces of work for each thread

Task = Callable[[], None]


_loading = threading.Lock()
_loaded: list[ModuleType] = []  # only what was loaded is kept: an import can fail while another thread is amid the same one


def kernels() -> ModuleType | None:
    """The compiled loops, or None where they cannot be had."""
    with _loading:
        if not _loaded:
            try:
                _loaded.append(importlib.import_module("autoseg.arrays.restore.kernels"))
            except (ImportError, RuntimeError, OSError):  # no numba, or no folder for what it compiles
                return None
        return _loaded[0]


def compiled_planes(job: Job, threads: int) -> Iterator[RestoredPlane]:
    """Restore a job plane after plane, on `threads` threads."""
    module = kernels()
    assert module is not None
    members = [_CompiledMember(member, job, module) for member in job.members]
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    try:
        first = 0
        while first < job.size[0]:
            last = _group_end(job, first)
            _run([task for member in members for task in member.fetch(first, last, threads)], pool)
            planes = [_Plane(job, members, module, z) for z in range(first, last + 1)]
            _run([task for plane in planes for task in plane.tasks(threads, len(planes))], pool)
            yield from (RestoredPlane(plane.z, plane.label, plane.mean) for plane in planes)
            first = last + 1
    finally:
        if pool is not None:
            pool.shutdown()


def _run(tasks: Sequence[Task], pool: ThreadPoolExecutor | None) -> None:
    if pool is None or len(tasks) == 1:
        for task in tasks:
            task()
    else:
        for _ in pool.map(_call, tasks):
            pass


def _call(task: Task) -> None:
    task()


def _group_end(job: Job, first: int) -> int:
    """The last output plane that is made together with plane `first`."""
    _, height, width = job.size
    made = height * width * (job.table.itemsize + (4 * job.classes if job.with_probabilities else 0))
    last = first
    while last + 1 < job.size[0] and made * (last + 2 - first) <= _GROUP_BYTES:
        read = 0
        for member in job.members:
            low, high = member.span(first, last + 1)
            read += 4 * (high - low) * member.classes * member.shape[1] * member.shape[2]
        if read > _GROUP_BYTES:
            break
        last += 1
    return last


class _View(NamedTuple):
    """A source plane as the compiled loops read it: `layout` is offset, stride of class and stride of row.

    `decided` and `peaks`, the largest logit of each class in each row, are written later.
    """

    flat: NDArray[Any]
    layout: NDArray[np.int64]
    decided: NDArray[np.int16]
    peaks: NDArray[np.float32]


def _view(plane_cyx: Tensor) -> _View:
    """A plane without a copy where its type is read as it is and columns are adjacent."""
    plane = plane_cyx.detach()
    if plane.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        plane = plane.float()
    if plane.shape[2] > 1 and plane.stride(2) != 1:
        plane = plane.contiguous()
    array = plane.numpy() if plane.dtype == torch.float32 else plane.view(torch.int16).numpy()
    if plane.dtype == torch.bfloat16:
        array = array.view(np.uint16)
    strides = plane.stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(plane.shape, strides, strict=True))
    flat = np.lib.stride_tricks.as_strided(array, (span,), (array.itemsize,))
    layout = np.array([0, strides[0], strides[1]], np.int64)
    classes, height, width = plane.shape
    return _View(flat, layout, np.empty((height, width), np.int16), np.empty((height, classes), np.float32))


class _CompiledMember:
    """One member's planes as the loops read them, and its taps."""

    def __init__(self, member: Member, job: Job, module: ModuleType) -> None:
        self.member, self._job, self._module = member, job, module
        self.low, self.high, self.weight = [], [], []
        for taps in member.taps:
            self.low.append(taps.low.astype(np.uint32))
            self.high.append(taps.high.astype(np.uint32))
            self.weight.append(taps.weight.astype(np.float32))
        self._views: dict[int, _View] = {}

    def fetch(self, first: int, last: int, threads: int) -> list[Task]:
        """Hold what output planes `first` to `last` need; return what decides the new planes."""
        planes = self.member.fetch(first, last)
        self._views = {z: view for z, view in self._views.items() if z in planes}
        used = {z for output in range(first, last + 1) for z in self.member.ends(output)[:2]}
        fresh = sorted(used - self._views.keys())
        self._views.update((z, _view(planes[z])) for z in fresh)
        if self._job.dense:
            return []
        height = self.member.shape[1]
        pieces = _pieces(height, threads if len(fresh) < _PARTS * threads else 1)
        return [partial(self._decide, self._views[z], *piece) for z in fresh for piece in pieces]

    def _decide(self, view: _View, first: int, last: int) -> None:
        offset, by_class, by_row = view.layout
        self._module.decide_source(
            view.decided, view.peaks, first, last, view.flat, offset, by_class, by_row, self.member.classes, self._job.regions,
            self._job.half,
        )

    def ends(self, z: int) -> tuple[_View, _View, np.float32]:
        """The source planes on both sides of output plane z, and the weight of the second."""
        low, high, weight = self.member.ends(z)
        return self._views[low], self._views[high], np.float32(weight)


class _Plane:
    """One output plane."""

    def __init__(self, job: Job, members: Sequence[_CompiledMember], module: ModuleType, z: int) -> None:
        self.z, self._job, self._members, self._module = z, job, members, module
        _, height, width = job.size
        self.label = np.empty((height, width), job.table.dtype)
        self.mean = np.zeros((job.classes, height, width), np.float32) if job.with_probabilities else None
        self._settled = np.empty((height, width) if len(members) > 1 else (1, width), np.int16)

    def tasks(self, threads: int, planes: int) -> list[Task]:
        """The work, in pieces that several threads can do; `planes` are made together."""
        height = self._job.size[1]
        pieces = 1 if threads == 1 or planes >= _PARTS * threads else _PARTS * threads
        return [partial(self._rows, *piece) for piece in _pieces(height, pieces)]

    def _rows(self, first: int, last: int) -> None:
        if len(self._members) == 1:
            self._label_alone(first, last)
        else:
            self._label_together(first, last)
        if self.mean is not None and not self._job.dense:
            self._add(self.mean, 0, first, last, everywhere=True, tempered=True)

    def _label_alone(self, first: int, last: int) -> None:
        member, job = self._members[0], self._job
        near, far, deep = member.ends(self.z)
        self._module.label_rows(
            self.label, first, last, job.table, job.classes, job.regions, job.half, near.decided, far.decided,
            member.low[1], member.high[1], member.weight[1], member.low[2], member.high[2], member.weight[2],
            member.member.interpolates[2], deep, near.flat, near.layout, near.peaks, far.flat, far.layout, far.peaks,
        )

    def _label_together(self, first: int, last: int) -> None:
        """Labels by mean probabilities; where all corners of all members agree these need not be computed."""
        job, module = self._job, self._module
        if job.dense and self.mean is not None:
            self._add(self.mean, 0, first, last, everywhere=True, tempered=False)
            module.decide_rows(self.label, 0, first, last, job.table, self._settled, True, self.mean, job.regions)
            return
        for i, member in enumerate(self._members):
            near, far, deep = member.ends(self.z)
            module.settle_rows(
                self._settled, first, last, i == 0, near.decided, far.decided, member.low[1], member.high[1], member.low[2],
                member.member.interpolates[2], deep,
            )
        step = max(1, _MEAN_BYTES // (4 * job.classes * job.size[2]))
        for begin in range(first, last, step):
            end = min(last, begin + step)
            mean = np.zeros((job.classes, end - begin, job.size[2]), np.float32)
            self._add(mean, begin, begin, end, everywhere=False, tempered=False)
            module.decide_rows(self.label, begin, begin, end, job.table, self._settled, False, mean, job.regions)

    def _add(self, mean: NDArray[np.float32], top: int, first: int, last: int, everywhere: bool, tempered: bool) -> None:
        for member in self._members:
            near, far, deep = member.ends(self.z)
            scale = np.float32(member.member.scale if tempered else 1)
            self._module.add_rows(
                mean, top, first, last, self._settled, everywhere, np.float32(member.member.share), scale, self._job.regions,
                member.low[1], member.high[1], member.weight[1], member.low[2], member.high[2], member.weight[2], deep,
                near.flat, near.layout, far.flat, far.layout,
            )


def _pieces(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut a range into at most `parts` about equal pieces."""
    parts = max(1, min(parts, count))
    edges = [count * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(edges))
