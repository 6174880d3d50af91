"""The one door for user code: built-in names, entry points, module:Name, and clear errors for everything else."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from autoseg.errors import PluginError
from autoseg.plugins import resolve


def test_built_in_names_come_first() -> None:
    assert resolve("one", {"one": 1, "two": 2}, "number") == 1


def test_module_and_name_are_imported() -> None:
    import math

    assert resolve("math:sqrt", {}, "function") is math.sqrt


def test_an_entry_point_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        importlib.metadata.EntryPoint("root", "math:sqrt", "autoseg.function"),
        importlib.metadata.EntryPoint("broken", "no_such_module:x", "autoseg.function"),
    ]
    asked: list[str] = []

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        asked.append(group)
        return points

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    found: Any = resolve("root", {}, "function")
    assert found(9) == 3 and asked == ["autoseg.function"]
    with pytest.raises(PluginError, match="function 'broken' cannot be imported: No module named 'no_such_module'"):
        resolve("broken", {}, "function")


@pytest.mark.parametrize("kind", ["no_such_module:x", "math:no_such_name", ":x", "math:", ".relative:x", "math.nothing:x"])
def test_what_cannot_be_imported_is_a_plugin_error(kind: str) -> None:
    with pytest.raises(PluginError, match=r"loss '.*' cannot be imported: "):
        resolve(kind, {}, "loss")


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(PluginError, match="unknown loss 'c'; choose from a, b, or give module:Name"):
        resolve("c", {"b": 1, "a": 2}, "loss")


def test_a_bug_inside_a_plug_in_keeps_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_with_a_bug.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        resolve("plugin_with_a_bug:x", {}, "loss")
