"""The catalogue of benchmarks: complete, consistent, cited."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from autoseg.datasets.downloads import benchmark_labels
from autoseg.errors import DatasetError
from autoseg.stages.catalogue import catalogue_table, describe_benchmark, find_benchmark, load_catalogue
from autoseg.types.benchmark import MEAN, Benchmark
from autoseg.types.report import METRICS

ALL = load_catalogue()
NAMES = [benchmark.name for benchmark in ALL]
DECATHLON = ("brain-tumour", "heart", "liver", "hippocampus", "prostate", "lung", "pancreas", "hepatic-vessel", "spleen", "colon")


def test_the_catalogue_holds_the_decathlon_and_the_other_benchmarks_once() -> None:
    others = {"acdc", "amos", "btcv", "kits23", "lits", "brats21", "isbi2012", "jsrt"}
    assert set(NAMES) == {f"msd-{task}" for task in DECATHLON} | others
    known = [name for benchmark in ALL for name in (benchmark.name, *benchmark.aliases)]
    assert len({re.sub(r"\W", "", name.casefold()) for name in known}) == len(known)


@pytest.mark.parametrize("benchmark", ALL, ids=NAMES)
def test_every_entry_says_where_the_data_come_from_and_on_what_terms(benchmark: Benchmark) -> None:
    for text in (benchmark.title, benchmark.licence, benchmark.access, benchmark.layout, benchmark.cite, benchmark.splits):
        assert len(text) > 2
    assert benchmark.page.startswith("http")
    labels = benchmark_labels(benchmark)
    assert [name for name, _ in labels.targets] == list(benchmark.labels)
    assert {value for union in benchmark.measured.values() for value in union} <= {label.value for label in labels.foreground}
    assert set(benchmark.recipe.configurations) == {"2d"} if benchmark.dimensions == 2 else {"3d_fullres"}


@pytest.mark.parametrize("benchmark", ALL, ids=NAMES)
def test_every_published_number_has_a_protocol_and_a_citation(benchmark: Benchmark) -> None:
    for row in benchmark.published:
        assert row.protocol and row.source.where and row.source.title and row.source.url.startswith("https://")
        assert 2010 <= row.source.year <= 2026
        assert not row.comparable or row.metric in METRICS, "another measure cannot be compared"
    if not benchmark.published:
        assert "No cross-validation result" in benchmark.note


@pytest.mark.parametrize("benchmark", ALL, ids=NAMES)
def test_listed_names_are_as_many_as_the_cases_or_the_patients(benchmark: Benchmark) -> None:
    names = [name for numbers in benchmark.names for name in numbers.names]
    assert len(set(names)) == len(names)
    assert len(names) in (0, benchmark.cases, 100 if benchmark.name == "acdc" else 0)


@pytest.mark.parametrize("benchmark", [b for b in ALL if b.reader.kind == "patterns"], ids=lambda b: b.name)
def test_patterns_compile_and_name_the_case(benchmark: Benchmark) -> None:
    patterns = [*benchmark.reader.options["images"], benchmark.reader.options["label"]]
    assert len(patterns) == len(benchmark.channels) + 1
    assert all("case" in re.compile(pattern).groupindex for pattern in patterns)


@pytest.mark.parametrize(("name", "original", "large"), [
    ("btcv", 0.8308, 0.8335), ("acdc", 0.9154, 0.9169), ("lits", 0.8009, 0.8160),
    ("brats21", 0.9124, 0.9113), ("kits23", 0.8604, 0.8817), ("amos", 0.8864, 0.8941),
])
def test_the_revisited_table_stands_as_printed(name: str, original: float, large: float) -> None:
    rows = {row.method: row for row in find_benchmark(name).published}
    assert rows["nnU-Net (original U-Net)"].values[MEAN] == original
    assert rows["nnU-Net ResEnc L"].values[MEAN] == large
    assert rows["nnU-Net ResEnc L"].comparable and "2404.09556" in rows["nnU-Net ResEnc L"].source.venue


def test_a_benchmark_is_found_by_name_task_folder_or_alias() -> None:
    for name in ("msd-hippocampus", "MSD_Hippocampus", "Task04", "task04_hippocampus", "hippocampus"):
        assert find_benchmark(name).name == "msd-hippocampus"
    with pytest.raises(DatasetError, match=r"no benchmark 'mnist'; choose from msd-brain-tumour, .*, jsrt"):
        find_benchmark("mnist")


def test_values_for_unknown_targets_and_percentages_are_refused() -> None:
    data = find_benchmark("acdc").model_dump(mode="json")
    for values, problem in (({"LA": 0.9}, "not targets"), ({MEAN: 91.5}, "fractions of 1")):
        spoiled = {**data, "published": [{**data["published"][0], "values": values}]}
        with pytest.raises(ValueError, match=problem):
            Benchmark.model_validate(spoiled)


def test_the_list_and_the_description_are_plain_text() -> None:
    table = catalogue_table()
    assert len(table) == len(ALL) + 1 and {len(row) for row in table} == {len(table[0])}
    text = "\n".join(describe_benchmark(find_benchmark("brats")))
    for part in ("page:     https://www.synapse.org", "1251 labelled cases", "whole tumour 1+2+4", "mean 0.9124", "2404.09556"):
        assert part in text
    assert "none whose source was found" in "\n".join(describe_benchmark(find_benchmark("msd-heart")))


def test_the_catalogue_is_part_of_the_wheel() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())
    assert "catalogue/*.json" in project["tool"]["setuptools"]["package-data"]["autoseg"]
