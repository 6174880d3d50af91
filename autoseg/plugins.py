"""Spec -> object: the one door through which user code enters."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
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
            loaded: Any = point.load()
            return loaded  # type: ignore[no-any-return]
    if ":" in kind:
        module, _, name = kind.partition(":")
        try:
            found: Any = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise PluginError(f"{family} {kind!r} cannot be imported: {error}") from error
        return found  # type: ignore[no-any-return]
    raise PluginError(f"unknown {family} {kind!r}; choose from {', '.join(sorted(builtin))}, or give module:Name")
