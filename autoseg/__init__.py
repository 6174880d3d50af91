"""autoseg: self-configuring medical image segmentation.

    plan = autoseg.plan(dataset, fingerprint, planner="default", gpu_memory_gb=8)
    model = autoseg.load("model.autoseg", device="cuda")
    labels = model.predict(image_czyx, spacing_zyx_mm=(1, 1, 1))

Everything heavy is imported when it is first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autoseg.inference import Model
    from autoseg.types.dataset import Dataset
    from autoseg.types.fingerprint import Fingerprint
    from autoseg.types.plan import Plan

_SUBPACKAGES = ("arrays", "datasets", "files", "networks", "planners", "stages", "trainers", "types")


def plan(dataset: Dataset, fingerprint: Fingerprint, planner: str = "default", gpu_memory_gb: float | None = None) -> Plan:
    """Plan from records, without files.

    Args:
        dataset: channels and labels (see autoseg.datasets.read and autoseg.datasets.nnunet).
        fingerprint: what was measured.
        planner: a planner's name.
        gpu_memory_gb: memory budget; None means the planner's own default.

    Raises:
        PlanError: no plan can be made; PluginError: unknown planner.
    """
    from autoseg.planners.registry import get_planner

    return get_planner(planner)(dataset, fingerprint, gpu_memory_gb)


def load(
    path: str | Path, device: str = "auto", precision: str = "auto", folds: Sequence[int] | None = None, mirror: bool = True,
    max_ram: float | None = None, gpu_memory: float | None = None,
) -> Model:
    """Load a model file, or the selected networks of a work folder, for prediction from Python.

    Threads that share it each plan with the memory that is free when they begin; where that is short they should take turns.

    Args:
        path: what `autoseg pack` wrote, or a work folder.
        device: auto, cpu, cuda, cuda:1 or mps.
        precision: auto, bf16, fp16 or fp32.
        folds: numbers of the folds to average; all that there are unless given.
        mirror: average over mirrored copies.
        max_ram: GB (2**30 bytes) of main memory that the whole process may take; what is free unless given.
        gpu_memory: GB on the card.

    Raises:
        RecordError: neither of the two, or a damaged or hostile file; RunError: nothing trained, or the device cannot be used.
    """
    from autoseg.stages.models import load as load_networks
    from autoseg.stages.predict import Options

    wanted = None if folds is None else tuple(folds)
    options = Options(
        folds=wanted, device=device, precision=precision, mirror=mirror, max_ram=max_ram, gpu_memory=gpu_memory
    )
    return load_networks(Path(path), options)


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"autoseg.{name}")
    raise AttributeError(f"module 'autoseg' has no attribute {name!r}")
