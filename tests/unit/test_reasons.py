"""Reasons: every value of a plan has one, it holds the value, the rule and the numbers, and it tells the truth about them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.planners import default, residual
from autoseg.planners.default import CONFIGURATIONS
from autoseg.planners.registry import PLANNERS
from autoseg.stages.explain import edited
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan

INTENSITIES = Intensities(mean=1, median=1, std=1, min=0, max=2, percentile_99_5=2, percentile_00_5=0)
Size = tuple[int, int, int]
Spacing = tuple[float, float, float]


def data(
    spacing: Spacing, shape: Size, cases: int = 20, channels: tuple[str, ...] = ("MR",), names: tuple[str, ...] = ("a", "b"),
    relative_size: float = 1.0,
) -> tuple[Dataset, Fingerprint]:
    """A data set of equal cases, and its fingerprint."""
    dataset = Dataset(
        name="scene", source="folder", root="/", channels=channels,
        labels=Labels(foreground=tuple(Label(name=name, value=i + 1) for i, name in enumerate(names))),
        cases=tuple(CaseFiles(case=f"c{i}", images=()) for i in range(cases)),
    )
    measured = tuple(
        CaseFingerprint(case=f"c{i}", shape=shape, shape_after_crop=shape, spacing=spacing,
                        relative_size_after_crop=relative_size) for i in range(cases)
    )
    return dataset, Fingerprint(cases=measured, intensities=(INTENSITIES,) * len(channels),
                                median_relative_size_after_cropping=relative_size)


ABDOMEN = data((1.0, 0.767, 0.767), (432, 512, 512), 131, ("CT",))


def leaves(plan: Plan) -> dict[str, Any]:
    """Every value of a plan by its path; format, notes and reasons apart."""
    values = plan.model_dump(mode="json", exclude={"format", "notes", "reasons"})
    configurations = values.pop("configurations")
    for name, entry in configurations.items():
        values |= {f"configurations.{name}.{field}": value for field, value in entry.items()}
    return values


@pytest.mark.parametrize("planner", PLANNERS)
@settings(max_examples=12, deadline=None)
@given(
    spacing=st.tuples(*[st.floats(0.3, 8)] * 3), shape=st.tuples(*[st.integers(1, 500)] * 3), cases=st.integers(1, 300),
    memory_gb=st.sampled_from([None, 4.0, 11.0, 48.0]), sided=st.booleans(), relative_size=st.sampled_from([0.5, 1.0]),
)
def test_every_value_of_every_plan_has_a_reason_that_holds_it(
    planner: str, spacing: Spacing, shape: Size, cases: int, memory_gb: float | None, sided: bool, relative_size: float
) -> None:
    names = ("hippocampus_left", "hippocampus_right") if sided else ("a", "b")
    plan = PLANNERS[planner](*data(spacing, shape, cases, ("MR", "CT"), names, relative_size), memory_gb)
    values = leaves(plan)
    assert set(values) <= set(plan.reasons)
    for path, value in values.items():
        reason = plan.reasons[path]
        assert reason.value == value and len(reason.rule) > 20, path
    for name in CONFIGURATIONS:
        assert plan.reasons[f"configurations.{name}"].value is (name in plan.configurations)
    assert not edited(plan)
    assert Plan.model_validate(json.loads(plan.model_dump_json())) == plan


@pytest.mark.parametrize(("scene", "limit", "size"), [
    (data((1.0, 1.0, 1.0), (36, 50, 35), 4), "minimum", 2), (data((1.0, 1.0, 1.0), (36, 50, 35), 200), "share", 7),
    (ABDOMEN, "memory", 2),
])
def test_the_reason_of_a_batch_says_what_limits_it(scene: tuple[Dataset, Fingerprint], limit: str, size: int) -> None:
    plan = default.plan(*scene)
    given = plan.reasons["configurations.3d_fullres.batch_size"].inputs
    assert plan.configurations["3d_fullres"].batch_size == size == max(min(given["memory allows"], given["data allow"]), 2)
    assert given["limited by"] == limit and given["at least"] == 2


def test_the_numbers_of_a_reason_are_those_of_the_data() -> None:
    reasons = default.plan(*ABDOMEN).reasons
    assert reasons["configurations.3d_fullres.spacing"].inputs == {
        "cases": 131, "median spacing mm": [1, 0.767, 0.767], "finest mm": [1, 0.767, 0.767], "coarsest mm": [1, 0.767, 0.767],
    }
    patch = reasons["configurations.3d_fullres.patch_size"].inputs
    assert patch["first patch"] == [215, 280, 280] and patch["allowed in millions"] == 560
    assert patch["activations in millions"] == 452.8 and patch["share of the median image in a patch"] == "1.9%"
    assert reasons["configurations.2d.patch_size"].inputs["allowed in millions"] == 510  # 85 for a batch of 12, so 510 for 2
    assert reasons["configurations.3d_lowres.spacing"].inputs["coarser by a factor of"] == [2.43, 2.43, 2.43]
    assert reasons["configurations.3d_cascade_fullres.patch_size"].rule == "as 3d_fullres, from which it inherits"
    asked = residual.plan(*ABDOMEN, "residual-l", 11).reasons["gpu_memory_gb"]
    assert "asked for" in asked.rule and asked.inputs == {"the planner's own target GB": 24}


@pytest.mark.parametrize(("scene", "name", "words"), [
    (data((1.0, 1.0, 1.0), (36, 50, 35)), "3d_lowres", "at least a quarter"),
    (data((1.0, 1.0, 1.0), (220, 220, 220)), "3d_cascade_fullres", "less than 2 times fewer voxels"),
    (data((999.0, 1.0, 1.0), (1, 300, 300)), "3d_fullres", "one slice"),
])
def test_a_configuration_that_is_not_planned_has_a_reason(scene: tuple[Dataset, Fingerprint], name: str, words: str) -> None:
    plan = default.plan(*scene)
    assert name not in plan.configurations and words in plan.reasons[f"configurations.{name}"].rule


def test_a_configuration_that_was_not_asked_for_has_a_reason() -> None:
    plan = default.plan(*ABDOMEN, configurations=("2d", "3d_fullres"))
    assert plan.reasons["configurations.3d_lowres"].rule == "not asked for"


def test_thick_slices_of_differing_thickness_are_told_apart() -> None:
    dataset, fingerprint = data((5.0, 1.0, 1.0), (20, 200, 200))
    cases = tuple(case.model_copy(update={"spacing": (5.0 + i, 1.0, 1.0)}) for i, case in enumerate(fingerprint.cases))
    plan = default.plan(dataset, fingerprint.model_copy(update={"cases": cases}))
    reason = plan.reasons["configurations.3d_fullres.spacing"]
    assert "10th percentile" in reason.rule and reason.inputs["median spacing mm"] == [14.5, 1, 1]
    assert "10th percentile" not in plan.reasons["configurations.2d.spacing"].rule


def test_left_and_right_labels_turn_off_mirroring_with_a_reason_and_a_note() -> None:
    plan = default.plan(*data((1.0, 1.0, 1.0), (60, 60, 60), names=("kidney left", "kidney right")))
    assert plan.configurations["3d_fullres"].mirror_axes == (0, 1) and plan.configurations["2d"].mirror_axes == ()
    reason = plan.reasons["configurations.3d_fullres.mirror_axes"]
    assert reason.inputs["pairs"] == ["kidney left / kidney right"] and reason.inputs["axis from left to right"] == "x"
    assert any("not mirrored along x" in note for note in plan.notes)
    sagittal = default.plan(*data((1.0, 1.0, 4.0), (200, 200, 20), names=("kidney left", "kidney right")))
    assert sagittal.transpose_forward == (2, 0, 1)
    assert sagittal.configurations["3d_fullres"].mirror_axes == (1, 2) and sagittal.configurations["2d"].mirror_axes is None
    assert "do not extend along that axis" in sagittal.reasons["configurations.2d.mirror_axes"].rule


def test_reasons_cover_every_field_that_a_configuration_has() -> None:
    paths = default.plan(*ABDOMEN).reasons
    for name in CONFIGURATIONS:
        own = {path.split(".")[2] for path in paths if path.startswith(f"configurations.{name}.")}
        assert own == set(Configuration.model_fields)
