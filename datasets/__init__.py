"""Readers that turn what is on disk into a Dataset record, the splits, and the built-in phantoms."""

import importlib
from typing import Any

if __name__ == "datasets":
    raise ImportError("this folder is the package autoseg.datasets; import it by that name")


def __getattr__(name: str) -> Any:
    """Import readers when they are first used, so that `autoseg.datasets.nnunet` works after `import autoseg`."""
    if name in ("folder", "manifest", "msd", "nnunet", "phantom", "read", "splits"):
        return importlib.import_module(f"autoseg.datasets.{name}")
    raise AttributeError(f"module 'autoseg.datasets' has no attribute {name!r}")
