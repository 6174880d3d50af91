"""How long a plan takes, reasons included: median milliseconds per stored question, equality with the stored answer first.

    OMP_NUM_THREADS=1 python tests/benchmarks/planning.py [--repeats 20]

The questions were put to nnU-Net's own planners: those of tests/golden/plans_selection.json, and the complete collection where it
lies beside the checkout. Each plan is made from a fingerprint in memory, with the planner's caches emptied before.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

from autoseg.datasets.nnunet import read_fingerprint
from autoseg.planners import rules
from autoseg.planners.registry import get_planner

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "test_golden_plans.py"


def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("test_golden_plans", GOLDEN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(repeats: int) -> None:
    answers = golden()
    rows = []
    for entry in answers.ENTRIES:
        with tempfile.TemporaryDirectory() as folder:
            plan = answers.planned(entry, Path(folder))
            dataset, fingerprint = read_fingerprint(Path(folder) / "dataset.json", Path(folder) / "dataset_fingerprint.json")
        assert answers.summary(plan) == entry["configurations"], f"{entry['name']}: the plan is not the reference's"
        planner, times = get_planner(entry["planner"]), []
        for _ in range(repeats):
            rules.topology.cache_clear()
            begin = time.perf_counter()
            planner(dataset, fingerprint, entry["gpu_memory_gb"])
            times.append(1000 * (time.perf_counter() - begin))
        name = f"{entry['name']} {entry['planner']} {entry['gpu_memory_gb']}"
        rows.append((statistics.median(times), name, len(fingerprint.cases)))
    assert "torch" not in sys.modules
    for milliseconds, name, cases in sorted(rows, reverse=True):
        print(f"{milliseconds:8.2f} ms  {name} ({cases} cases)")
    middle = statistics.median(row[0] for row in rows)
    print(f"{len(rows)} plans equal to the reference's; slowest {max(rows)[0]:.1f} ms, median {middle:.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    main(parser.parse_args().repeats)
