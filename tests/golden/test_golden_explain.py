"""docs/explain.md is what explain says today of the plan that can be made without data."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs" / "explain.md"


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("explain_docs", HERE / "explain_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_abdominal_ct_in_the_docs_is_up_to_date(docs: ModuleType) -> None:
    assert docs.block("Abdominal CT", docs.abdominal_text()) in DOCS.read_text()


def test_the_what_if_table_in_the_docs_is_up_to_date(docs: ModuleType) -> None:
    assert docs.what_if_table() in DOCS.read_text()


def test_the_docs_hold_three_plans_with_a_reason_under_every_value() -> None:
    blocks = re.findall(r"```text\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for text in blocks:
        values = [line for line in text.splitlines() if re.match(r"  \w[^:]*: ", line)]
        known = ("Cases", "Images", "Cropping to nonzero", "Note")  # facts of the data, not choices
        choices = [line for line in values if not line.strip().startswith(known)]
        assert len(re.findall(r"^      Why: ", text, re.MULTILINE)) == len(choices) > 20
        assert "/work" not in text and "None" not in text and "set by hand" not in text.lower()
