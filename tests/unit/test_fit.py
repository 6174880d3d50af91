"""The planner fit: within the budget, monotone in it, sensible for odd data, and explained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoseg.errors import PlanError
from autoseg.networks.memory import recomputed_share, training_memory
from autoseg.planners import default, fit, search
from autoseg.planners.registry import get_planner
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.plan import Configuration, Plan

INTENSITIES = Intensities(mean=1, median=1, std=1, min=0, max=2, percentile_99_5=2, percentile_00_5=0)
THREE = ("2d", "3d_fullres", "3d_lowres")


def data(
    spacing: tuple[float, ...], shape: tuple[int, ...], cases: int, channels: Sequence[str] = ("MR",), classes: int = 2,
    regions: bool = False,
) -> tuple[Dataset, Fingerprint]:
    """A data set of equal cases, and its fingerprint."""
    names = [f"case_{i}" for i in range(cases)]
    values = tuple(range(1, classes + 1))
    labels = Labels(
        foreground=tuple(Label(name=f"c{i}", value=i) for i in values),
        regions=tuple(Region(name=f"r{i}", values=values[:i]) for i in values) if regions else (),
        region_order=values if regions else (),
    )
    dataset = Dataset(name="scene", source="folder", root="/", channels=tuple(channels), labels=labels,
                      cases=tuple(CaseFiles(case=name, images=()) for name in names))
    measured: Any = {"shape": shape, "shape_after_crop": shape, "spacing": spacing, "relative_size_after_crop": 1.0}
    fingerprint = Fingerprint(
        cases=tuple(CaseFingerprint(case=name, **measured) for name in names), intensities=(INTENSITIES,) * len(channels),
        median_relative_size_after_cropping=1.0,
    )
    return dataset, fingerprint


ABDOMEN = data((1.0, 0.767, 0.767), (432, 512, 512), 131, ("CT",))
HIPPOCAMPUS = data((1.0, 1.0, 1.0), (36, 50, 35), 260)
BRAIN = data((1.0, 1.0, 1.0), (138, 170, 137), 484, ("T1", "T2", "T1c", "FLAIR"), 3, regions=True)
HEART = data((10.0, 1.5625, 1.5625), (9, 256, 216), 200, classes=3)
ORGANS = data((1.5, 1.5, 1.5), (240, 250, 250), 100, ("CT",), 60)
SCENES = {"abdomen": ABDOMEN, "hippocampus": HIPPOCAMPUS, "brain": BRAIN, "heart": HEART, "organs": ORGANS}


def predicted(plan: Plan, configuration: Configuration) -> int:
    """Predicted peak of a training step in bytes; the cascade's second stage also sees one channel per label."""
    extra = len(plan.labels.foreground) if configuration.previous_stage else 0
    return training_memory(configuration, len(plan.channels) + extra, plan.labels.output_count, plan.precision,
                           regions=bool(plan.labels.regions), ignore=plan.labels.ignore is not None).total


def voxels(configuration: Configuration) -> int:
    return configuration.batch_size * math.prod(configuration.patch_size)


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
@pytest.mark.parametrize("memory_gb", [4, 8, 24])
def test_every_configuration_stays_within_the_budget_and_fills_it(scene: tuple[Dataset, Fingerprint], memory_gb: float) -> None:
    plan = fit.plan(*scene, memory_gb)
    for name, configuration in plan.configurations.items():
        peak = predicted(plan, configuration) / 2**30
        assert peak < 0.9 * memory_gb - 0.5, name
        limit = plan.reasons[f"configurations.{name}.batch_size"].inputs.get("limited by")
        if limit == "memory":
            assert peak > 0.6 * memory_gb, name  # the next patch is a step away, and each takes a good part of the budget
            one_more = configuration.model_copy(update={"batch_size": configuration.batch_size + 1})
            assert predicted(plan, one_more) / 2**30 > 0.9 * memory_gb - 0.5, name


@pytest.mark.parametrize("scene", [ABDOMEN, BRAIN, HEART], ids=["abdomen", "brain", "heart"])
def test_a_larger_budget_gives_no_smaller_patch_and_no_fewer_voxels(scene: tuple[Dataset, Fingerprint]) -> None:
    names = ("2d", "3d_fullres")
    before: Plan | None = None
    for quarter in range(6, 60, 3):
        plan = fit.plan(*scene, quarter / 4, configurations=names)
        for name in names:
            if before is not None:
                old, new = before.configurations[name], plan.configurations[name]
                assert all(a <= b for a, b in zip(old.patch_size, new.patch_size, strict=True)), (quarter, name)
                assert voxels(old) <= voxels(new), (quarter, name)
        before = plan


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(*[st.sampled_from([0.5, 0.8, 1.0, 2.5, 5.0])] * 3), st.tuples(st.integers(1, 300), *[st.integers(8, 600)] * 2),
    st.integers(1, 200), st.floats(1, 48), st.floats(1, 2), st.sampled_from(["bf16", "fp32"]),
)
def test_any_data_set_gets_a_legal_plan_that_grows_with_the_budget(
    spacing: tuple[float, ...], shape: tuple[int, ...], cases: int, memory_gb: float, factor: float, precision: Any
) -> None:
    scene = data(spacing, shape, cases)
    small, large = (fit.plan(*scene, gb, configurations=("2d", "3d_fullres"), precision=precision)
                    for gb in (memory_gb, memory_gb * factor))
    dataset_voxels = cases * math.prod(large.configurations.get("3d_fullres", large.configurations["2d"]).median_shape)
    for name, old in small.configurations.items():
        new = large.configurations[name]
        assert all(a <= b for a, b in zip(old.patch_size, new.patch_size, strict=True)) and voxels(old) <= voxels(new)
        for configuration in (old, new):
            assert configuration.batch_size == 2 or voxels(configuration) <= 0.05 * dataset_voxels + 1
            divisors = [math.prod(row[axis] for row in configuration.strides) for axis in range(configuration.dims)]
            for edge, size, divisor in zip(configuration.patch_size, configuration.median_shape, divisors, strict=True):
                assert edge < max(size, 4) + divisor


def test_half_precision_affords_twice_the_patches_of_full() -> None:
    half, full = (fit.plan(*HEART, 8, precision=precision) for precision in ("bf16", "fp32"))  # type: ignore[arg-type]
    assert fit.plan(*HEART, 8, precision="fp16").configurations == half.configurations
    assert half.precision == "bf16" and full.precision == "fp32"
    ratio = voxels(half.configurations["2d"]) / voxels(full.configurations["2d"])
    assert ratio == pytest.approx(2, abs=0.2)


def test_activations_are_computed_twice_only_where_the_patch_becomes_much_larger_by_it() -> None:
    plan = fit.plan(*ABDOMEN, 8)
    configuration = plan.configurations["3d_fullres"]
    why = plan.reasons["configurations.3d_fullres.checkpointing"]
    assert configuration.checkpointing == why.value > 0 and configuration.batch_size == 2
    plain = configuration.model_copy(update={"checkpointing": 0})
    assert predicted(plan, plain) / 2**30 > 0.9 * 8 - 0.5
    assert math.prod(configuration.patch_size) >= 1.5 * math.prod(why.inputs["patch without"])
    assert recomputed_share(configuration, 1, 3) <= search.RECOMPUTE_COST
    assert all(c.checkpointing == 0 for c in fit.plan(*HIPPOCAMPUS, 4).configurations.values())


def test_a_patch_that_sees_little_is_joined_by_a_coarser_one_and_a_cascade() -> None:
    plan = fit.plan(*ABDOMEN, 8)
    assert set(plan.configurations) == {*THREE, "3d_cascade_fullres"}
    low, cascade = plan.configurations["3d_lowres"], plan.configurations["3d_cascade_fullres"]
    assert math.prod(low.patch_size) >= 0.25 * math.prod(low.median_shape)
    assert low.next_stage == "3d_cascade_fullres" and cascade.previous_stage == "3d_lowres"
    assert cascade.patch_size == plan.configurations["3d_fullres"].patch_size
    assert set(fit.plan(*BRAIN, 8).configurations) == {"2d", "3d_fullres"}
    without = fit.plan(*ABDOMEN, 8, configurations=("3d_fullres",))
    assert set(without.configurations) == {"3d_fullres"}


ODD = {
    "all edges under 16": (data((1.0, 1.0, 1.0), (12, 14, 10), 30), {"2d": (14, 10), "3d_fullres": (12, 14, 10)}),
    "all edges under 8": (data((1.0, 1.0, 1.0), (7, 7, 7), 20), {"2d": (8, 8), "3d_fullres": (8, 8, 8)}),
    "one slice": (data((5.0, 1.0, 1.0), (1, 256, 200), 40), {"2d": (256, 224)}),
    "three slices": (data((5.0, 1.0, 1.0), (3, 256, 256), 30), {"2d": (256, 256), "3d_fullres": (3, 256, 256)}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_images_get_sensible_patches(name: str) -> None:
    scene, patches = ODD[name]
    plan = fit.plan(*scene, 8)
    assert {name: configuration.patch_size for name, configuration in plan.configurations.items()} == patches
    assert all(2 <= configuration.batch_size <= 20 for configuration in plan.configurations.values())


def test_few_small_images_never_get_a_batch_of_hundreds() -> None:
    plan = fit.plan(*data((1.0, 1.0, 1.0), (10, 12, 12), 20), 24)
    assert plan.configurations["3d_fullres"].batch_size == 2
    assert voxels(plan.configurations["2d"]) <= 0.05 * 20 * 10 * 12 * 12


def test_pictures_of_ten_thousand_pixels_get_a_patch_that_two_of_fit() -> None:
    plan = fit.plan(*data((999.0, 1.0, 1.0), (1, 10000, 10000), 20, ("R", "G", "B")), 8)
    configuration = plan.configurations["2d"]
    assert set(plan.configurations) == {"2d"}
    assert min(configuration.patch_size) >= 1024 and configuration.batch_size >= 2


def test_a_budget_that_holds_nothing_is_said_to() -> None:
    plan = fit.plan(*ABDOMEN, 0.4)
    configuration = plan.configurations["3d_fullres"]
    assert 16**3 <= math.prod(configuration.patch_size) < 24**3 and configuration.batch_size == 2
    assert any("even the smallest patch" in note and "predicted to need" in note for note in plan.notes)


def test_without_a_budget_the_plan_says_what_it_took() -> None:
    plan = fit.plan(*BRAIN)
    assert plan.gpu_memory_gb == 8 and plan.planner == "fit"
    assert any("no GPU memory was given" in note for note in plan.notes)
    assert plan.configurations == get_planner("fit")(*BRAIN, 8).configurations


def test_nothing_that_the_default_planner_says_of_its_own_sizes_is_left() -> None:
    scene, budget = ABDOMEN, 0.9
    theirs, ours = default.plan(*scene, budget), fit.plan(*scene, budget)
    assert any("estimated above" in note or "patch covers" in note for note in default.plan(*scene, 0.01).notes)
    full = ours.configurations["3d_fullres"]
    share = math.prod(full.patch_size) / math.prod(full.median_shape)
    (covers,) = (note for note in ours.notes if note.startswith("a 3d_fullres patch covers"))
    assert covers.startswith(f"a 3d_fullres patch covers {share:.1%} of the median image")
    assert not any("estimated above" in note for note in ours.notes)
    assert {path for path in ours.reasons if "lowres" not in path} >= {path for path in theirs.reasons if "." not in path}


@pytest.mark.parametrize("scene", [ABDOMEN, HEART], ids=["abdomen", "heart"])
def test_every_value_has_a_reason_with_that_value(scene: tuple[Dataset, Fingerprint]) -> None:
    plan = fit.plan(*scene, 8)
    values = plan.model_dump(mode="json")
    for name, configuration in plan.configurations.items():
        assert plan.reasons[f"configurations.{name}"].value is True
        for key in type(configuration).model_fields:
            reason = plan.reasons[f"configurations.{name}.{key}"]
            assert reason.value == values["configurations"][name][key] and reason.rule
    for name in set(default.CONFIGURATIONS) - set(plan.configurations):
        assert plan.reasons[f"configurations.{name}"].value is False
    peak = plan.reasons["configurations.2d.batch_size"].inputs["predicted peak GB"]
    assert peak == pytest.approx(predicted(plan, plan.configurations["2d"]) / 2**30, abs=0.01)


def test_the_residual_network_is_sized_by_its_own_memory() -> None:
    plain, residual = (fit.plan(*BRAIN, 12, network=kind) for kind in ("unet", "residual-unet"))  # type: ignore[arg-type]
    configuration = residual.configurations["3d_fullres"]
    assert configuration.network.kind == "residual-unet" and configuration.blocks_per_stage[:3] == (1, 3, 4)
    assert voxels(configuration) <= voxels(plain.configurations["3d_fullres"])
    assert predicted(residual, configuration) / 2**30 < 0.9 * 12 - 0.5


@pytest.mark.parametrize("memory_gb", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_that_makes_no_sense_is_refused(memory_gb: float) -> None:
    with pytest.raises(PlanError, match="must be a positive number of GB"):
        fit.plan(*BRAIN, memory_gb)
    with pytest.raises(PlanError, match="unknown configuration '4d'"):
        fit.plan(*BRAIN, 8, configurations=("4d",))
