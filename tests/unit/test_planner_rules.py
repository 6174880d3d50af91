"""The planner's rules: hand-computed scenes, closed forms, and properties over many fingerprints."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.errors import PlanError, PluginError
from autoseg.planners import default, residual, rules
from autoseg.planners.registry import PLANNERS, get_planner
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Plan

ALL = default.CONFIGURATIONS
INTENSITIES = Intensities(mean=1, median=1, std=1, min=0, max=2, percentile_99_5=2, percentile_00_5=0)
Triples = Sequence[tuple[Any, Any, Any]]


def data(
    spacings: Triples, shapes: Triples, channels: tuple[str, ...] = ("MR",), named: bool = True, kinds: tuple[str, ...] = (),
    relative_size: float = 1.0, classes: int = 2,
) -> tuple[Dataset, Fingerprint]:
    """A data set of so many cases, and its fingerprint."""
    names = [f"case_{i}" for i in range(len(spacings))]
    dataset = Dataset(
        name="scene", source="folder", root="/", channels=channels, channels_named=named,
        labels=Labels(foreground=tuple(Label(name=f"c{i}", value=i) for i in range(1, classes + 1))),
        cases=tuple(CaseFiles(case=name, images=()) for name in names),
    )
    cases = tuple(
        CaseFingerprint(case=name, shape=shape, shape_after_crop=shape, spacing=spacing, relative_size_after_crop=relative_size)
        for name, spacing, shape in zip(names, spacings, shapes, strict=True)
    )
    fingerprint = Fingerprint(
        cases=cases, intensities=(INTENSITIES,) * len(channels), median_relative_size_after_cropping=relative_size,
        channel_kinds=kinds,
    )
    return dataset, fingerprint


def pooled(edges: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Edges at the bottleneck."""
    return tuple(edge // math.prod(row[axis] for row in strides) for axis, edge in enumerate(edges))


ABDOMEN = data([(1.0, 0.767, 0.767)] * 131, [(432, 512, 512)] * 131, ("CT",))


def test_target_spacing_is_the_median_per_axis() -> None:
    spacings = np.array([[3.0, 1.0, 0.5], [1.0, 2.0, 0.6], [2.0, 3.0, 0.9]])
    assert rules.target_spacing(spacings, np.full((3, 3), 100)) == (2.0, 2.0, 0.6)


def test_a_coarse_axis_with_few_slices_gets_the_tenth_percentile() -> None:
    slices = np.arange(5.0, 16.0)  # 5, 6, ..., 15: tenth percentile 6
    spacings = np.stack([slices, np.ones(11), np.ones(11)], axis=1)
    assert rules.target_spacing(spacings, np.tile([20, 200, 200], (11, 1))) == (6.0, 1.0, 1.0)
    many_slices = rules.target_spacing(spacings, np.tile([100, 200, 200], (11, 1)))
    assert many_slices == (10.0, 1.0, 1.0)


def test_a_coarse_axis_stays_the_coarsest() -> None:
    spacings = np.array([[0.5, 1.0, 1.0]] * 4 + [[5.0, 1.0, 1.0]] * 6)
    z, y, _ = rules.target_spacing(spacings, np.tile([20, 200, 200], (10, 1)))
    assert z == pytest.approx(1.00001) and z > y


@pytest.mark.parametrize(("spacing", "order"), [
    ((1.0, 1.0, 1.0), (0, 1, 2)), ((1.0, 3.0, 2.0), (1, 0, 2)), ((1.0, 2.0, 3.0), (2, 0, 1)), ((1.0, 3.0, 3.0), (1, 0, 2)),
])
def test_the_coarsest_axis_goes_first(spacing: tuple[float, ...], order: tuple[int, ...]) -> None:
    assert rules.transpose_order(spacing) == order


def test_median_shape_is_taken_after_resampling_and_may_end_in_a_half() -> None:
    spacings = np.array([[2.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    shapes = np.array([[10, 10, 5], [11, 10, 8]])
    assert rules.median_resampled_shape(spacings, shapes, (1.0, 1.0, 2.0)) == (15.5, 10.0, 3.0)  # 2.5 rounds to even: 2


def test_the_first_patch_is_about_cubic_in_millimetres_and_within_the_image() -> None:
    assert rules.initial_patch((1.0, 1.0, 1.0), (999.0, 999.0, 999.0)) == (256, 256, 256)
    assert rules.initial_patch((4.0, 1.0, 1.0), (999.0, 999.0, 100.5)) == (102, 406, 100.5)
    assert rules.initial_patch((1.0, 1.0), (9999.0, 600.0)) == (2048, 600.0)


def test_an_isotropic_patch_is_halved_on_all_axes_down_to_four_voxels() -> None:
    found = rules.topology((1.0, 1.0, 1.0), (128, 128, 128))
    assert found.strides == ((1, 1, 1),) + ((2, 2, 2),) * 5
    assert found.kernel_sizes == ((3, 3, 3),) * 6
    assert found.patch_size == (128, 128, 128) and found.divisor == (32, 32, 32)


def test_coarse_axes_wait_until_the_others_have_caught_up() -> None:
    found = rules.topology((10.0, 1.5625, 1.5625), (9, 256, 216))
    assert found.patch_size == (10, 256, 224)
    assert found.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
    assert found.kernel_sizes == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))


def test_a_single_remaining_axis_needs_twelve_voxels() -> None:
    assert rules.topology((1.0, 1.0), (7, 11)).divisor == (2, 2)  # halved once as a tiny image, not along one axis by the rule
    assert rules.topology((1.0, 1.0), (7, 12)).divisor == (1, 2)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 20), st.floats(0.5, 700)), min_size=2, max_size=3))
def test_every_topology_is_legal(axes: list[tuple[float, float]]) -> None:
    spacing, size = tuple(a for a, _ in axes), tuple(b for _, b in axes)
    found = rules.topology(spacing, size)
    assert len(found.strides) == len(found.kernel_sizes) >= 2
    assert found.strides[0] == (1,) * len(size) and found.kernel_sizes[-1] == (3,) * len(size)
    assert all(max(row) == 2 for row in found.strides[1:])
    for axis, edge in enumerate(found.patch_size):
        assert edge >= size[axis] and edge % found.divisor[axis] == 0
        assert edge - size[axis] < max(found.divisor[axis], rules.MIN_EDGE)
        kernels = [row[axis] for row in found.kernel_sizes]
        assert kernels == sorted(kernels)  # once 3, always 3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 20), st.integers(1, 700)), min_size=2, max_size=3), st.sampled_from([0.25, 2.0, 1024.0]))
def test_the_unit_of_spacing_does_not_matter(axes: list[tuple[float, int]], unit: float) -> None:
    spacing, size = tuple(a for a, _ in axes), tuple(float(b) for _, b in axes)
    other = tuple(a * unit for a in spacing)
    assert rules.fit_patch(spacing, size, 3, default.RECIPE, 8) == rules.fit_patch(other, size, 3, default.RECIPE, 8)


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 3), (7, 7), (8, 8), (14, 14), (1, 1, 1), (2, 3, 1), (7, 7, 7), (4, 1, 2), (15, 3, 9)]
)
def test_tiny_images_get_two_stages_and_a_bottleneck_of_more_than_one_voxel(shape: tuple[int, ...]) -> None:
    found = rules.topology((1.0,) * len(shape), tuple(map(float, shape)))
    assert len(found.strides) == 2
    assert math.prod(pooled(found.patch_size, found.strides)) > 1


@pytest.mark.parametrize(("network", "expected"), [("unet", 452_796_416), ("residual-unet", 557_420_544)])
def test_activation_elements_of_a_128_cube(network: rules.Network, expected: int) -> None:
    strides = ((1, 1, 1),) + ((2, 2, 2),) * 5
    assert rules.activation_elements(network, (128, 128, 128), strides, 3) == expected


@pytest.mark.parametrize(("network", "patch", "strides", "outputs", "expected"), [
    ("unet", (56, 40), "22 22 22", 3, 651_840),
    ("unet", (40, 56, 40), "222 222 222", 3, 19_174_400),
    ("unet", (160, 192, 160), "222 222 222 222 222", 3, 1_061_241_600),
    ("unet", (10, 256, 224), "122 122 222 122 122", 4, 170_562_560),
    ("unet", (20, 320, 256), "122 122 222 222 122 122", 3, 483_315_200),
    ("unet", (1024, 1024), "22 22 22 22 22 22 22 22", 2, 330_612_736),
    ("residual-unet", (56, 40), "22 22 22", 3, 1_001_280),
    ("residual-unet", (40, 56, 40), "222 222 222", 3, 23_609_600),
    ("residual-unet", (112, 256, 256), "222 222 222 222 122 122", 2, 1_945_316_352),
    ("residual-unet", (896, 768), "22 22 22 22 22 22 22", 2, 339_784_704),
])
def test_activation_elements_are_those_counted_on_nnunets_networks(
    network: rules.Network, patch: tuple[int, ...], strides: str, outputs: int, expected: int
) -> None:
    rows = ((1,) * len(patch), *(tuple(map(int, row)) for row in strides.split()))
    assert rules.activation_elements(network, patch, rows, outputs) == expected


def test_activation_elements_by_hand_for_two_stages() -> None:
    # 8 x 8 with one halving: V = 64, 16; F = 32, 64. Encoder 2 (32 64 + 64 16), decoder (2 + 1) 32 64, head 2 64
    assert rules.activation_elements("unet", (8, 8), ((1, 1), (2, 2)), 2) == 2 * (2048 + 1024) + 3 * 2048 + 128
    # stem 2048, first stage 2 convs, second 3 blocks of 2 and a shortcut, decoder up + 1 conv, head
    assert rules.activation_elements("residual-unet", (8, 8), ((1, 1), (2, 2)), 2) == 2048 + 2 * 2048 + 7 * 1024 + 2 * 2048 + 128


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.2, 8), st.floats(2, 900)), min_size=2, max_size=3), st.floats(2, 40), st.floats(1.0, 4.0),
    st.sampled_from([default.RECIPE, *residual.PRESETS.values()]),
)
def test_patches_stay_within_the_budget_and_grow_with_it(
    axes: list[tuple[float, float]], memory_gb: float, factor: float, recipe: rules.Recipe
) -> None:
    spacing, shape = tuple(a for a, _ in axes), tuple(b for _, b in axes)
    small = rules.fit_patch(spacing, shape, 3, recipe, memory_gb)
    large = rules.fit_patch(spacing, shape, 3, recipe, memory_gb * factor)
    patches = rules.MIN_BATCH / rules.REFERENCE_BATCH[len(axes)] if recipe.size_for_min_batch else 1
    assert small.fits and small.elements * patches <= recipe.budget(len(axes), memory_gb) * (1 + 1e-12)
    assert large.elements >= small.elements


def test_shrinking_does_not_skip_sizes_that_need_less_divisibility() -> None:
    found = rules.topology((1.0, 1.0), (256, 256))
    assert found.divisor == (64, 64)
    smaller = rules.smaller((1.0, 1.0), found, (256.0, 256.0))
    assert smaller is not None and smaller.patch_size == (256, 224)  # of equal axes the last gives way


def test_a_hopeless_memory_target_ends_with_the_smallest_patch_and_a_note() -> None:
    plan = default.plan(*data([(1.0, 1.0, 1.0)], [(60, 60, 60)]), 1e-6)
    assert max(plan.configurations["3d_fullres"].patch_size) <= 8
    assert sum("even the smallest patch" in note for note in plan.notes) == 2


def test_batches_are_capped_by_memory_and_by_a_share_of_the_data_and_never_below_two() -> None:
    fitted = rules.FittedPatch(rules.topology((1.0, 1.0, 1.0), (64, 64, 64)), elements=56_000_000)

    def batch(voxels: float, recipe: rules.Recipe = default.RECIPE) -> tuple[int, str]:
        found = rules.batch_limits(fitted, voxels, recipe, 8)
        return found.size, found.limit

    assert batch(1e12) == (20, "memory")  # 560e6 / 56e6 x 2
    assert batch(64**3 * 100) == (5, "share")  # 5 % of 100 patches
    assert batch(64**3) == (2, "minimum")
    assert batch(64**3 * 100, residual.PRESETS["residual-m"]) == (24, "memory")  # 680e6 / 56e6 x 2, no cap at 5 %


def test_residual_presets_size_2d_patches_for_the_whole_batch() -> None:
    scene = data([(999.0, 1.0, 1.0)] * 120, [(1, 1024, 1024)] * 120, classes=1)
    assert default.plan(*scene).configurations["2d"].patch_size == (1024, 1024)
    assert residual.plan(*scene, "residual-m").configurations["2d"].patch_size == (512, 512)


def test_all_configurations_that_suit_the_data_are_planned_unless_fewer_are_asked_for() -> None:
    assert list(default.plan(*ABDOMEN).configurations) == ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"]
    plan = default.plan(*ABDOMEN, configurations=("2d", "3d_fullres"))
    assert list(plan.configurations) == ["2d", "3d_fullres"]
    assert plan.configurations["3d_fullres"].batch_dice
    assert all(configuration.next_stage is None for configuration in plan.configurations.values())


def test_low_resolution_covers_a_quarter_of_the_image_and_leads_to_the_cascade() -> None:
    plan = default.plan(*ABDOMEN, configurations=ALL)
    low, cascade = plan.configurations["3d_lowres"], plan.configurations["3d_cascade_fullres"]
    assert 0.25 <= math.prod(low.patch_size) / math.prod(low.median_shape) < 0.3
    full = plan.configurations["3d_fullres"]
    exact = np.array(full.spacing) / low.spacing * full.median_shape
    assert low.median_shape == tuple(np.rint(exact)) != tuple(np.floor(exact))
    assert low.next_stage == "3d_cascade_fullres" and not low.batch_dice
    assert (cascade.previous_stage, cascade.inherits_from) == ("3d_lowres", "3d_fullres")
    alone = default.plan(*ABDOMEN, configurations=["3d_lowres"]).configurations["3d_lowres"]
    assert alone == low.model_copy(update={"next_stage": None})


def test_low_resolution_first_coarsens_only_the_fine_axes() -> None:
    fitted = rules.FittedPatch(rules.topology((4.0, 1.0, 1.0), (32, 128, 128)), elements=1)
    coarse = rules.low_res((4.0, 1.0, 1.0), (150.0, 500.0, 500.0), fitted, 3, default.RECIPE, 8)
    assert coarse is not None and coarse.spacing[0] == 4.0 and 1.0 < coarse.spacing[1] <= 2.1


def test_no_low_resolution_where_it_would_hardly_be_smaller() -> None:
    fitted = rules.fit_patch((1.0,) * 3, (220.0,) * 3, 3, default.RECIPE, 8)
    assert 0.125 < fitted.voxels / 220**3 < 0.25
    coarse = rules.low_res((1.0,) * 3, (220.0,) * 3, fitted, 3, default.RECIPE, 8)
    assert coarse is not None and 1 < coarse.gain < 2 and not coarse.worthwhile
    scene = data([(1.0, 1.0, 1.0)] * 9, [(220, 220, 220)] * 9)
    assert list(default.plan(*scene).configurations) == ["2d", "3d_fullres"]


def test_images_of_one_slice_get_a_2d_configuration_only_and_a_note() -> None:
    plan = default.plan(*data([(999.0, 1.0, 1.0)] * 5, [(1, 100, 120)] * 5), configurations=ALL)
    assert list(plan.configurations) == ["2d"]
    assert any("one slice" in note for note in plan.notes)


@pytest.mark.parametrize("axis", [1, 2])
def test_where_the_coarse_axis_is_stored_does_not_matter(axis: int) -> None:
    spacings, shapes = [(5.0, 0.8, 0.9), (4.0, 0.7, 1.0)], [(40, 300, 280), (50, 310, 270)]

    def moved(rows: Triples) -> Triples:
        return [tuple(row[order.index(place)] for place in range(3)) for row in rows]

    order = [axis, *(place for place in range(3) if place != axis)]
    plain = default.plan(*data(spacings, shapes), configurations=ALL)
    other = default.plan(*data(moved(spacings), moved(shapes)), configurations=ALL)
    assert plain.transpose_forward == (0, 1, 2) and other.transpose_forward[0] == axis
    assert plain.configurations == other.configurations


@pytest.mark.parametrize(("name", "scheme"), [
    ("CT", "CTNormalization"), ("ct", "CTNormalization"), ("noNorm", "NoNormalization"), ("zscore", "ZScoreNormalization"),
    ("rescale_to_0_1", "RescaleTo01Normalization"), ("RGB_to_0_1", "RGBTo01Normalization"), ("T1", "ZScoreNormalization"),
    ("CT contrast", "ZScoreNormalization"), ("", "ZScoreNormalization"),
])
def test_normalization_follows_the_channels_name(name: str, scheme: str) -> None:
    assert rules.normalization_for(name) == scheme


def test_only_z_scores_of_mostly_empty_images_use_the_mask() -> None:
    schemes = ("ZScoreNormalization", "CTNormalization", "NoNormalization")
    assert rules.use_mask(schemes, 0.74) == (True, False, False)
    assert rules.use_mask(schemes, 0.75) == (False, False, False)


def test_unnamed_channels_are_recognised_and_the_plan_says_so() -> None:
    channels, kinds = ("channel_0", "channel_1", "channel_2"), ("CT", "other", "RGB")
    plan = default.plan(*data([(1.0, 1.0, 1.0)] * 3, [(50, 50, 50)] * 3, channels, False, kinds))
    assert plan.configurations["2d"].normalization == ("CTNormalization", "ZScoreNormalization", "RGBTo01Normalization")
    assert [note for note in plan.notes if note.startswith("channel")] == list(plan.notes[:2])
    assert "recognised as CT by its range of values (HU)" in plan.notes[0]


def test_a_name_goes_before_what_the_voxels_look_like() -> None:
    plan = default.plan(*data([(1.0, 1.0, 1.0)] * 3, [(50, 50, 50)] * 3, ("MR",), True, ("CT",)))
    assert plan.configurations["2d"].normalization == ("ZScoreNormalization",)
    assert not any("channel" in note for note in plan.notes)


@pytest.mark.parametrize("name", PLANNERS)
@settings(max_examples=25, deadline=None)
@given(cases=st.lists(
    st.tuples(st.tuples(*[st.floats(0.05, 30)] * 3), st.tuples(*[st.one_of(st.integers(1, 16), st.integers(1, 800))] * 3)),
    min_size=1, max_size=6,
))
def test_every_data_set_gets_a_plan_that_survives_saving(name: str, cases: list[tuple[Any, Any]]) -> None:
    dataset, fingerprint = data([spacing for spacing, _ in cases], [shape for _, shape in cases])
    plan = PLANNERS[name](dataset, fingerprint, configurations=ALL)  # type: ignore[call-arg]
    assert Plan.model_validate(json.loads(plan.model_dump_json())) == plan
    for configuration in plan.configurations.values():
        assert configuration.batch_size >= 2
        assert len(configuration.strides) >= 2
        assert configuration.network.kind == ("unet" if name in ("default", "fit") else "residual-unet")
        assert math.prod(pooled(configuration.patch_size, configuration.strides)) > 1


def test_blocks_of_each_network() -> None:
    plain = default.plan(*ABDOMEN).configurations["3d_fullres"]
    assert plain.blocks_per_stage == (2,) * 6 and plain.decoder_blocks_per_stage == (2,) * 5
    deep = residual.plan(*ABDOMEN, "residual-m").configurations["3d_fullres"]
    assert deep.blocks_per_stage == (1, 3, 4, 6, 6, 6) and deep.decoder_blocks_per_stage == (1,) * 5
    assert deep.features_per_stage == (32, 64, 128, 256, 320, 320)
    assert default.plan(*ABDOMEN).configurations["2d"].features_per_stage == (32, 64, 128, 256, 512, 512, 512, 512)


@pytest.mark.parametrize(("name", "memory_gb"), [("default", 8), ("residual-m", 8), ("residual-l", 24), ("residual-xl", 40)])
def test_planners_are_found_by_name_and_have_their_own_memory_target(name: str, memory_gb: float) -> None:
    plan = get_planner(name)(*ABDOMEN)
    assert (plan.planner, plan.gpu_memory_gb) == (name, memory_gb)
    assert get_planner(name)(*ABDOMEN, memory_gb).configurations == plan.configurations


def test_an_unknown_planner_is_refused_with_the_choices() -> None:
    with pytest.raises(PluginError, match=r"'huge'.*default.*residual-l.*residual-m.*residual-xl"):
        get_planner("huge")
    with pytest.raises(PlanError, match="'huge'; choose from residual-m, residual-l, residual-xl"):
        residual.plan(*ABDOMEN, "huge")


@pytest.mark.parametrize(("options", "message"), [
    ({"gpu_memory_gb": 0}, "positive number of GB, found 0"),
    ({"gpu_memory_gb": float("nan")}, "positive number of GB, found nan"),
    ({"configurations": ["4d"]}, "unknown configuration '4d'; choose from 2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres"),
    ({"configurations": ["3d_cascade_fullres"]}, "starts from 3d_fullres and 3d_lowres"),
    ({"configurations": []}, r"none of the configurations asked for \(none\) suits the data"),
])
def test_senseless_requests_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        default.plan(*ABDOMEN, **options)


def test_an_empty_or_mismatched_fingerprint_is_refused() -> None:
    dataset, fingerprint = ABDOMEN
    with pytest.raises(PlanError, match="holds no case"):
        default.plan(dataset, fingerprint.model_copy(update={"cases": ()}))
    with pytest.raises(PlanError, match="intensities of 0 channels, expected 1"):
        default.plan(dataset, fingerprint.model_copy(update={"intensities": ()}))


def test_planning_does_not_load_torch() -> None:
    code = "import sys, autoseg.planners.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
