"""A public data set as it was downloaded, turned into a manifest that points at its files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg.datasets.description import parse_labels
from autoseg.datasets.isbi2012 import read_isbi2012
from autoseg.datasets.jsrt import SIZE, read_jsrt
from autoseg.datasets.patterns import Found, read_patterns
from autoseg.datasets.read import read_dataset
from autoseg.errors import DatasetError
from autoseg.logs import SILENT, Reporter
from autoseg.types.benchmark import Benchmark
from autoseg.types.dataset import CaseFiles, Dataset, Fault
from autoseg.types.faults import fault
from autoseg.types.labels import Labels

CONVERTED = "a data set in one of our own forms, not as it is downloaded"


@dataclass(frozen=True)
class Download:
    """The cases of a download, how they were recognised, what is wrong with them, and images that have no label."""

    read_as: str
    cases: tuple[CaseFiles, ...]
    faults: tuple[Fault, ...] = ()
    unlabelled: tuple[str, ...] = ()


def benchmark_labels(benchmark: Benchmark) -> Labels:
    """The labels that a benchmark's files hold. Raises DatasetError when the catalogue contradicts itself."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in benchmark.labels.items()}
    return parse_labels({"background": 0, **values}, list(benchmark.region_order) or None)


def read_download(benchmark: Benchmark, root: Path, work: Path, reporter: Reporter = SILENT) -> Download:
    """Recognise what lies in `root`: the benchmark's own layout, else any form that `read_dataset` knows.

    Files that have to be converted are written to `work`; all others stay where they are.
    Raises DatasetError when `root` is no folder or holds nothing that is recognised.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder; expected the unpacked download: {benchmark.layout}")
    kind, options = benchmark.reader.kind, benchmark.reader.options
    if kind == "msd":
        return _decathlon(benchmark, root, str(options["folder"]))
    if kind == "isbi2012":
        found = read_isbi2012(root, work, reporter)
    elif kind == "jsrt":
        found = read_jsrt(root, work, int(options.get("size", SIZE)), reporter)
    else:
        found = read_patterns(root, options["images"], options["label"])
    if found.cases or found.faults:
        return Download(benchmark.layout, found.cases, found.faults, found.unlabelled)
    return _converted(benchmark, root, found)


def _decathlon(benchmark: Benchmark, root: Path, folder: str) -> Download:
    """A task of the Decathlon: `root` is its folder or holds it."""
    task = next((path for path in (root / folder, root) if (path / "dataset.json").is_file()), root)
    read = _read(benchmark, task)
    if read is None:
        raise DatasetError(_unrecognised(benchmark, root))
    dataset, faults = read
    outside = [fault("invalid-description", c.case, file, f"files inside {task}", "a path that leads out of it")
               for c in dataset.cases for file in (*c.images, c.label or "") if file and not _inside(file, task)]
    return Download(benchmark.layout if dataset.source == "msd" else CONVERTED,
                    dataset.cases, (*faults, *outside, *_other_labels(benchmark, dataset, task)))


def _inside(file: str, root: Path) -> bool:
    return Path(os.path.normpath(file)).is_relative_to(os.path.normpath(root))


def _converted(benchmark: Benchmark, root: Path, found: Found) -> Download:
    read = _read(benchmark, root)
    if read is None:
        raise DatasetError(_unrecognised(benchmark, root, found))
    dataset, faults = read
    expected = [name for numbers in benchmark.names for name in numbers.names]
    if expected and not any(name in case.case for case in dataset.cases for name in expected):
        raise DatasetError(_unrecognised(benchmark, root) + f"; none of the cases is named like {expected[0]}")
    return Download(CONVERTED, dataset.cases, (*faults, *_other_labels(benchmark, dataset, root)))


def _read(benchmark: Benchmark, root: Path) -> tuple[Dataset, list[Fault]] | None:
    """The data set in `root` in a form that is not specific to a benchmark, with a fault for another number of channels."""
    try:
        dataset, faults = read_dataset(root, groups="none")
    except DatasetError:
        return None
    if dataset is None:
        return None
    if len(dataset.channels) != len(benchmark.channels):
        faults.append(fault("wrong-channel-count", "", root, f"{len(benchmark.channels)} channels ({_list(benchmark.channels)})",
                            f"{len(dataset.channels)} ({_list(dataset.channels)})", "give the data of this benchmark"))
    return dataset, faults


def _other_labels(benchmark: Benchmark, dataset: Dataset, root: Path) -> list[Fault]:
    expected = {label.value for label in benchmark_labels(benchmark).foreground}
    found = {label.value for label in dataset.labels.foreground}
    if expected == found:
        return []
    return [fault("undeclared-label-values", "", root, f"the label values {sorted(expected)}", f"{sorted(found)}",
                  "give the data of this benchmark with its original label values")]


def _unrecognised(benchmark: Benchmark, root: Path, found: Found | None = None) -> str:
    entries = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir() if not path.name.startswith("."))
    holds = _list(entries[:8]) + (f" and {len(entries) - 8} more" if len(entries) > 8 else "") if entries else "nothing"
    extra = f"; {len(found.unlabelled)} images were recognised, but none of their labels" if found and found.unlabelled else ""
    return f"{root} is not recognised as {benchmark.title}: expected {benchmark.layout}; found {holds}{extra}"


def _list(names: Any) -> str:
    return ", ".join(map(str, names))


def manifest_of(benchmark: Benchmark, cases: tuple[CaseFiles, ...]) -> str:
    """A JSON manifest of `cases` with the benchmark's channels and labels; paths are absolute."""
    rows: list[Mapping[str, object]] = []
    for case in cases:
        extra = {"group": case.group, "fold": case.fold}
        rows.append({"case": case.case, "images": list(case.images), "label": case.label,
                     **{key: value for key, value in extra.items() if value is not None}})
    labels: dict[str, object] = {"background": 0, **benchmark.labels}
    data = {
        "name": benchmark.name, "channels": list(benchmark.channels), "labels": labels,
        **({"regions_class_order": list(benchmark.region_order)} if benchmark.region_order else {}), "cases": rows,
    }
    return json.dumps(data, indent=1) + "\n"
