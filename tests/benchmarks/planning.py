"""How long a plan takes, reasons included: median milliseconds per stored question, equality with the stored answer first.

    OMP_NUM_THREADS=1 python tests/benchmarks/planning.py [--repeats 20]

The questions were put to nnU-Net's own planners: those of tests/golden/plans_selection.json, and the complete collection where it
lies beside the checkout. Each plan is made from a fingerprint in memory, with the planner's caches emptied before. The planner
`fit` has no stored answer: it plans for the same fingerprints at several budgets, in bf16, and its times are of the processor.
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
from autoseg.networks import describe, memory, timeline
from autoseg.planners import rules
from autoseg.planners.registry import get_planner
from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint

FIT_GB = (2, 8, 24, 40)
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "test_golden_plans.py"


def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("test_golden_plans", GOLDEN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forget() -> None:
    """Empty every cache that a plan fills."""
    for module in (rules, describe, memory, timeline):
        for cached in vars(module).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()


def fit_times(questions: dict[str, tuple[Dataset, Fingerprint]], repeats: int) -> None:
    """Print how much processor time the planner fit takes for each fingerprint and budget."""
    planner, rows = get_planner("fit"), []
    for name, (dataset, fingerprint) in questions.items():
        for memory_gb in FIT_GB:
            times = []
            for _ in range(repeats):
                forget()
                begin = time.process_time()
                planner(dataset, fingerprint, memory_gb)
                times.append(1000 * (time.process_time() - begin))
            rows.append((statistics.median(times), f"{name} fit {memory_gb}", len(fingerprint.cases)))
    report(rows, "plans of the planner fit")


def report(rows: list[tuple[float, str, int]], what: str) -> None:
    for milliseconds, name, cases in sorted(rows, reverse=True):
        print(f"{milliseconds:8.2f} ms  {name} ({cases} cases)")
    middle = statistics.median(row[0] for row in rows)
    print(f"{len(rows)} {what}; slowest {max(rows)[0]:.1f} ms, median {middle:.1f} ms")


def main(repeats: int) -> None:
    answers = golden()
    rows = []
    questions: dict[str, tuple[Dataset, Fingerprint]] = {}
    for entry in answers.ENTRIES:
        with tempfile.TemporaryDirectory() as folder:
            plan = answers.planned(entry, Path(folder))
            dataset, fingerprint = read_fingerprint(Path(folder) / "dataset.json", Path(folder) / "dataset_fingerprint.json")
        assert answers.summary(plan) == entry["configurations"], f"{entry['name']}: the plan is not the reference's"
        questions[entry["name"]] = dataset, fingerprint
        planner, times = get_planner(entry["planner"]), []
        for _ in range(repeats):
            forget()
            begin = time.perf_counter()
            planner(dataset, fingerprint, entry["gpu_memory_gb"])
            times.append(1000 * (time.perf_counter() - begin))
        name = f"{entry['name']} {entry['planner']} {entry['gpu_memory_gb']}"
        rows.append((statistics.median(times), name, len(fingerprint.cases)))
    report(rows, "plans equal to the reference's")
    fit_times(questions, repeats)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    main(parser.parse_args().repeats)
