"""Spec -> object: the one door through which user code enters."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from autoseg.errors import PluginError

T = TypeVar("T")


def resolve(kind: str, builtin: Mapping[str, T], family: str) -> T:
    """Find a choice by name: built in, registered under the entry point group `autoseg.<family>`, or `module:Name`.

    Only a user's own command line or record leads here; names found in model files are never resolved.

    Raises:
        PluginError: nothing of that name, with the names there are.
    """
    if kind in builtin:
        return builtin[kind]
    for point in importlib.metadata.entry_points(group=f"autoseg.{family}"):
        if point.name == kind:
            return _load(point.load, kind, family)  # type: ignore[no-any-return]
    if ":" in kind:
        module, _, name = kind.partition(":")
        return _load(lambda: getattr(importlib.import_module(module), name), kind, family)  # type: ignore[no-any-return]
    raise PluginError(f"unknown {family} {kind!r}; choose from {', '.join(sorted(builtin))}, or give module:Name")


def _load(load: Callable[[], Any], kind: str, family: str) -> Any:
    try:
        return load()
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: an empty or relative module name
        raise PluginError(f"{family} {kind!r} cannot be imported: {error}") from error
