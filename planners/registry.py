"""Planners by the names that the command line and the plan use."""

from __future__ import annotations

from collections.abc import Sequence

from autoseg.contracts import Planner
from autoseg.planners import default, fit, residual
from autoseg.planners.default import CONFIGURATIONS
from autoseg.plugins import resolve
from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Plan


def _preset(preset: str) -> Planner:
    def plan(
        dataset: Dataset, fingerprint: Fingerprint, gpu_memory_gb: float | None = None, *,
        configurations: Sequence[str] = CONFIGURATIONS,
    ) -> Plan:
        return residual.plan(dataset, fingerprint, preset, gpu_memory_gb, configurations=configurations)

    return plan


PLANNERS: dict[str, Planner] = {
    "default": default.plan, **{preset: _preset(preset) for preset in residual.PRESETS}, "fit": fit.plan,
}


def get_planner(name: str) -> Planner:
    """The planner called `name`, built in or a plug-in; raises PluginError, listing the choices, when there is none."""
    return resolve(name, PLANNERS, "planner")
