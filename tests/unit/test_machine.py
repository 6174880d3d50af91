"""Limits of the machine, on made-up system folders."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from autoseg.files import machine
from autoseg.files.machine import MemoryBudget, cores, disk_free_bytes, for_each, memory_available_bytes, memory_limit_bytes

GIB = 1 << 30
MEMINFO = "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:   16777216 kB\nHugePages_Total:       0\n"


def tree(root: Path, **files: str) -> Path:
    """Write files into a fake root; in names, __ stands for a slash."""
    for name, text in {"proc__meminfo": MEMINFO, **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def _sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def test_without_cgroups_affinity_and_meminfo_count(tmp_path: Path) -> None:
    root = tree(tmp_path)
    assert cores(root) == 16
    assert memory_limit_bytes(root) == 32 * GIB
    assert memory_available_bytes(root) == 16 * GIB


def test_cgroup_version_2_limits_bind_at_every_level_and_page_cache_does_not_count(tmp_path: Path) -> None:
    root = tree(tmp_path, **{
        "proc__self__cgroup": "0::/batch/job\n",
        "sys__fs__cgroup__batch__cpu.max": "250000 100000\n",
        "sys__fs__cgroup__batch__job__cpu.max": "max 100000\n",
        "sys__fs__cgroup__batch__job__memory.max": f"{8 * GIB}\n",
        "sys__fs__cgroup__batch__job__memory.current": f"{5 * GIB}\n",
        "sys__fs__cgroup__batch__job__memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
    })
    assert cores(root) == 2
    assert memory_limit_bytes(root) == 8 * GIB
    assert memory_available_bytes(root) == 5 * GIB


def test_in_a_container_the_limits_stand_at_the_mount(tmp_path: Path) -> None:
    root = tree(tmp_path, **{
        "proc__self__cgroup": "0::/../..\n", "sys__fs__cgroup__cpu.max": "50000 100000\n", "sys__fs__cgroup__memory.max": "max\n",
    })
    assert cores(root) == 1
    assert memory_limit_bytes(root) == 32 * GIB


def test_cgroup_version_1_limits_are_read_and_its_huge_number_means_none(tmp_path: Path) -> None:
    root = tree(tmp_path, **{
        "proc__self__cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n",
        "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_quota_us": "400000\n",
        "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_period_us": "100000\n",
        "sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712\n",
        "sys__fs__cgroup__memory__docker__abc__memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys__fs__cgroup__memory__docker__abc__memory.usage_in_bytes": f"{3 * GIB}\n",
        "sys__fs__cgroup__memory__docker__abc__memory.stat": f"total_inactive_file {1 * GIB}\n",
    })
    assert cores(root) == 4
    assert memory_limit_bytes(root) == 4 * GIB
    assert memory_available_bytes(root) == 2 * GIB


def test_an_unlimited_version_1_quota_and_damaged_files_are_ignored(tmp_path: Path) -> None:
    root = tree(tmp_path, **{
        "proc__self__cgroup": "4:cpu:/x\nnonsense\n", "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1\n",
        "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n", "sys__fs__cgroup__cpu.max": "what\n",
    })
    assert cores(root) == 16


def test_this_machine_has_cores_memory_and_disk(tmp_path: Path) -> None:
    assert cores() >= 1
    assert 0 < memory_available_bytes() <= memory_limit_bytes()
    assert disk_free_bytes(tmp_path / "not" / "there") > 0


def test_a_budget_lets_too_large_a_request_run_alone_and_never_gives_more_than_it_has() -> None:
    budget, held, most = MemoryBudget(10), [0], [0]
    lock = threading.Lock()

    def work(amount: int) -> None:
        with budget.take(amount):
            with lock:
                held[0] += min(amount, 10)
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= min(amount, 10)

    threads = [threading.Thread(target=work, args=(amount,)) for amount in (3, 4, 50, 6, 2, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert most[0] <= 10
    assert held[0] == 0


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_work_yields_results_and_expected_failures_for_every_item(threads: int) -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item * item

    results = dict(for_each(range(5), work, threads, failures=(ValueError,)))
    assert str(results.pop(2)) == "two"
    assert results == {0: 0, 1: 1, 3: 9, 4: 16}


@pytest.mark.parametrize("threads", [0, 3])
def test_an_unexpected_failure_ends_the_work(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(for_each(range(3), lambda item: 1 // item, threads))


def test_items_run_one_after_another_when_memory_allows_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_available_bytes", lambda: 100)
    running, most = [0], [0]

    def work(item: int) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.002)
        running[0] -= 1

    list(for_each(range(6), work, 4, lambda item: 60))
    assert most[0] == 1
