"""The catalogue of public benchmarks: loaded, looked up, listed."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

from autoseg.errors import DatasetError
from autoseg.files.workspace import load_record
from autoseg.types.benchmark import Benchmark, Published, Source

SHORT = 20  # letters of a licence that a table shows


@functools.cache
def load_catalogue() -> tuple[Benchmark, ...]:
    """Every benchmark that comes with the package, in the order of its files. Raises RecordError for an invalid one."""
    folder = Path(str(resources.files("autoseg") / "catalogue"))
    return tuple(load_record(path, Benchmark) for path in sorted(folder.glob("*.json")))


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name or alias, case and punctuation aside. Raises DatasetError that lists the names there are."""
    wanted = _plain(name)
    for benchmark in load_catalogue():
        if wanted in map(_plain, (benchmark.name, *benchmark.aliases)):
            return benchmark
    names = ", ".join(benchmark.name for benchmark in load_catalogue())
    raise DatasetError(f"there is no benchmark {name!r}; choose from {names}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def catalogue_table() -> list[list[str]]:
    """Rows of text, a heading first: what can be reproduced."""
    rows = [["name", "title", "cases", "channels", "targets", "licence", "published"]]
    for b in load_catalogue():
        targets = ", ".join(b.targets) if len(b.targets) <= 3 else f"{len(b.targets)} structures"
        licence = b.licence if len(b.licence) <= SHORT else "own terms"
        rows.append([b.name, b.title, str(b.cases), str(len(b.channels)), targets, licence, f"{len(b.published)} results"])
    return rows


def describe_benchmark(benchmark: Benchmark) -> list[str]:
    """What a person needs to know before the download, as lines of text."""
    b = benchmark
    labels = ", ".join(f"{name} {'+'.join(map(str, value)) if isinstance(value, tuple) else value}"
                       for name, value in b.labels.items())
    recipe = f"planner {b.recipe.planner}, {', '.join(b.recipe.configurations)}, {b.folds} folds, {b.recipe.epochs} epochs of " \
             f"{b.recipe.steps_per_epoch} steps"
    lines = [
        b.title, f"page:     {b.page}", f"licence:  {b.licence}", f"get it:   {b.access}", f"layout:   {b.layout}",
        f"holds:    {b.cases} labelled cases, {b.dimensions}D, channels {', '.join(b.channels)}; labels {labels}",
        f"splits:   {b.splits}", f"recipe:   {recipe}", f"cite:     {b.cite}",
    ]
    if b.note:
        lines.append(f"note:     {b.note}")
    lines += ["published results:"] if b.published else ["published results: none whose source was found"]
    lines += [f"  {row.method}: {values_text(row)} [{row.protocol}] {source_text(row.source)}" for row in b.published]
    return lines


def values_text(row: Published) -> str:
    """A published row's measure and values."""
    return f"{row.metric} " + ", ".join(f"{name} {value:g}" for name, value in row.values.items())


def source_text(source: Source) -> str:
    """A citation on one line."""
    return f"{source.authors}: {source.title}. {source.venue}, {source.year}. {source.where}. {source.url}"
