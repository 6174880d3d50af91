"""The residual-encoder presets: one U-Net with a residual encoder, sized for 8, 24 or 40 GB (Isensee et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from autoseg.errors import PlanError
from autoseg.planners.default import CONFIGURATIONS, plan_with
from autoseg.planners.rules import Recipe
from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Plan


def _recipe(memory_gb: float, elements_2d: float, elements_3d: float) -> Recipe:
    return Recipe("residual-unet", memory_gb, elements_2d, elements_3d, batch_share=1.0, size_for_min_batch=False)


PRESETS = {
    "residual-m": _recipe(8, 135e6, 680e6),
    "residual-l": _recipe(24, 380e6, 2.1e9),
    "residual-xl": _recipe(40, 560e6, 3.6e9),
}


def plan(
    dataset: Dataset, fingerprint: Fingerprint, preset: str, gpu_memory_gb: float | None = None, *,
    configurations: Sequence[str] = CONFIGURATIONS,
) -> Plan:
    """Plan a residual-encoder U-Net by `preset` for `gpu_memory_gb` (the preset's own if None).

    Raises PlanError for an unknown preset and as the default planner does.
    """
    if preset not in PRESETS:
        raise PlanError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    return plan_with(PRESETS[preset], preset, dataset, fingerprint, gpu_memory_gb, configurations)
