"""Plans are what nnU-Net's own planners give, number for number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoseg.datasets.nnunet import read_fingerprint
from autoseg.planners.registry import get_planner
from autoseg.types.plan import Plan

HERE = Path(__file__).resolve()
SELECTION = HERE.parent / "plans_selection.json"
COMPLETE = HERE.parents[2] / "../shared/golden/plans.json"
FIELDS = (
    "patch_size", "batch_size", "spacing", "strides", "kernel_sizes", "features_per_stage", "batch_dice", "normalization",
    "use_mask_for_norm", "next_stage",
)


def expanded(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of the selection with its cases written out as nnU-Net does."""
    fingerprint = dict(entry["fingerprint"])
    cases = fingerprint.pop("cases")
    count = cases.get("count")
    fingerprint["spacings"] = [cases["spacing"]] * count if count else cases["spacings"]
    fingerprint["shapes_after_crop"] = [cases["shape"]] * count if count else cases["shapes"]
    return {**entry, "fingerprint": fingerprint}


ENTRIES = [expanded(entry) for entry in json.loads(SELECTION.read_text())["entries"]]
if COMPLETE.exists():
    taken = [(e["name"], e["planner"], e["gpu_memory_gb"]) for e in ENTRIES]
    ENTRIES += [e for e in json.loads(COMPLETE.read_text()) if (e["name"], e["planner"], e["gpu_memory_gb"]) not in taken]


def planned(entry: dict[str, Any], folder: Path, **options: Any) -> Plan:
    """The plan for an entry, read from nnU-Net's two files."""
    for name, key in (("dataset.json", "dataset"), ("dataset_fingerprint.json", "fingerprint")):
        (folder / name).write_text(json.dumps(entry[key]))
    dataset, fingerprint = read_fingerprint(folder / "dataset.json", folder / "dataset_fingerprint.json")
    plan: Plan = get_planner(entry["planner"])(dataset, fingerprint, entry["gpu_memory_gb"], **options)
    return plan


def summary(plan: Plan) -> dict[str, Any]:
    """The configurations in the stored answers' form."""
    result = {}
    for name, configuration in plan.configurations.items():
        values = configuration.model_dump(mode="json")
        values["spacing"] = [round(spacing, 6) for spacing in values["spacing"]]
        fields = ("inherits_from", "previous_stage") if configuration.inherits_from else FIELDS
        result[name] = {field: values[field] for field in fields}
    return result


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['name']}-{e['planner']}-{e['gpu_memory_gb']}")
def test_all_configurations_are_those_of_the_reference(entry: dict[str, Any], tmp_path: Path) -> None:
    plan = planned(entry, tmp_path)
    assert summary(plan) == entry["configurations"]
    assert list(plan.transpose_forward) == entry["transpose_forward"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['name']}-{e['planner']}-{e['gpu_memory_gb']}")
def test_asking_for_fewer_configurations_does_not_change_them(entry: dict[str, Any], tmp_path: Path) -> None:
    names = ("2d", "3d_fullres")
    expected = {name: entry["configurations"][name] for name in names if name in entry["configurations"]}
    assert summary(planned(entry, tmp_path, configurations=names)) == expected
