"""What this machine allows: cores, memory and disk, with the limits that containers and batch systems set."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

ROOT = Path("/")
_NO_LIMIT = 1 << 60  # cgroup v1 writes a huge number where there is no limit


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text and text.lstrip("-").isdigit() else None


def _cgroup_folders(root: Path, controller: str) -> tuple[list[Path], list[Path]]:
    """Return the cgroup folders that bind this process, innermost first: of version 2, and of version 1's `controller`."""
    mount = root / "sys/fs/cgroup"
    inner2, inner1 = "/", "/"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            inner2 = path
        elif controller in controllers.split(","):
            inner1 = path
    mounts1 = [mount / controller, *sorted(mount.glob(f"*{controller}*"))]
    mount1 = next((m for m in mounts1 if m.is_dir() and controller in m.name.split(",")), mount / controller)

    def chain(base: Path, inner: str) -> list[Path]:
        parts = [part for part in inner.split("/") if part and part != ".."]
        return [base.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]

    return chain(mount, inner2), chain(mount1, inner1)


def cores(root: Path = ROOT) -> int:
    """Return how many cores this process may use: its affinity, cut by the cgroup's quota (versions 1 and 2); at least 1."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    version2, version1 = _cgroup_folders(root, "cpu")
    for folder in version2:
        quota, _, period = (_read(folder / "cpu.max") or "max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            count = min(count, int(quota) / int(period))
    for folder in version1:
        quota1, period1 = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota1 and period1 and quota1 > 0 and period1 > 0:
            count = min(count, quota1 / period1)
    return max(1, int(count))


def _meminfo(root: Path) -> dict[str, int]:
    fields = {}
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        amount = rest.split()
        if amount and amount[0].isdigit():
            fields[name] = int(amount[0]) * (1024 if amount[-1] == "kB" else 1)
    return fields


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use that cannot be reclaimed) of every cgroup with a memory limit above this process."""
    version2, version1 = _cgroup_folders(root, "memory")
    names = [(version2, "memory.max", "memory.current", ("inactive_file", "active_file")),
             (version1, "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))]
    for folders, limit_name, used_name, cache_names in names:
        for folder in folders:
            limit = _number(folder / limit_name)
            if limit is None or not 0 < limit < _NO_LIMIT:
                continue
            used = _number(folder / used_name) or 0
            for line in (_read(folder / "memory.stat") or "").splitlines():
                name, _, amount = line.partition(" ")
                if name in cache_names and amount.isdigit():
                    used = max(0, used - int(amount))
            yield limit, used


def _physical_bytes() -> int:
    try:
        return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 8 << 30  # systems that do not say: a small machine is the safe guess


def memory_limit_bytes(root: Path = ROOT) -> int:
    """Return the memory this process may use in all: the machine's, cut by cgroup limits (versions 1 and 2)."""
    total = _meminfo(root).get("MemTotal") or _physical_bytes()
    return min([total, *(limit for limit, _ in _memory_groups(root))])


def memory_available_bytes(root: Path = ROOT) -> int:
    """Return the memory that is free now: what the kernel says is available, cut by what cgroup limits leave; at least 0."""
    fields = _meminfo(root)
    free = fields.get("MemAvailable", fields.get("MemFree", _physical_bytes() // 2))
    return max(0, min([free, *(limit - used for limit, used in _memory_groups(root))]))


def slurm_limit_bytes(variables: Mapping[str, str]) -> int | None:
    """Return the memory that SLURM gives a job on this node, from its variables (in MB of 2**20 bytes); None where none is set.

    SLURM_MEM_PER_NODE, or SLURM_MEM_PER_CPU times SLURM_CPUS_ON_NODE; 0 means all of the node.
    """
    numbers = {name: int(value) for name, value in variables.items() if name.startswith("SLURM_") and value.isdigit()}
    each = numbers.get("SLURM_MEM_PER_CPU", 0) * numbers.get("SLURM_CPUS_ON_NODE", 1)
    return (numbers.get("SLURM_MEM_PER_NODE", 0) or each) * 2**20 or None


def disk_free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that holds `path`, which need not exist yet."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


class MemoryBudget:
    """Lets threads take and give back a share of memory; one that asks for more than there is waits until it is alone."""

    def __init__(self, total: int) -> None:
        self._free, self._total = total, total
        self._changed = threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Hold `amount` bytes of the budget for the length of the context."""
        held = min(amount, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= held)
            self._free -= held
        try:
            yield
        finally:
            with self._changed:
                self._free += held
                self._changed.notify_all()


def for_each(
    items: Sequence[T], work: Callable[[T], R], threads: int, bytes_of: Callable[[T], int] = lambda item: 0,
    failures: tuple[type[Exception], ...] = (), budget: int | None = None,
) -> Iterator[tuple[T, R | Exception]]:
    """Yield (item, result) as the items get done, in `threads` threads (0 or 1: here, in order).

    An error listed in `failures` is yielded in place of a result; others end the work. `bytes_of` says what an item needs at
    most, so that only as many run at once as `budget` bytes allow (default: 80 % of what is free now).
    """
    memory = MemoryBudget(max(1, int(0.8 * memory_available_bytes()) if budget is None else budget))

    def attempt(item: T) -> R | Exception:
        try:
            with memory.take(bytes_of(item)):
                return work(item)
        except failures as error:
            return error

    if threads <= 1 or len(items) <= 1:
        for item in items:
            yield item, attempt(item)
        return
    pool = ThreadPoolExecutor(min(threads, len(items)))
    try:
        futures: dict[Future[R | Exception], T] = {pool.submit(attempt, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
