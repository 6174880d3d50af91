"""What-if: a row per budget and configuration, with times that are measured once and scaled by arithmetic."""

from __future__ import annotations

import pytest

from autoseg.errors import PluginError, RunError
from autoseg.networks.memory import multiply_adds
from autoseg.planners import default
from autoseg.stages.forecast import coverage, network_channels, peak_gb, what_if
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan
from autoseg.types.record import Spec

CT = Intensities(mean=1, median=1, std=1, min=0, max=2, percentile_99_5=2, percentile_00_5=0)


def scene(shape: tuple[int, int, int], cases: int = 100) -> tuple[Dataset, Fingerprint]:
    """CT volumes of one size at 1 mm."""
    names = [f"c{i}" for i in range(cases)]
    labels = Labels(foreground=tuple(Label(name=f"l{i}", value=i) for i in range(1, 4)))
    dataset = Dataset(name="d", source="folder", root="/", channels=("CT",), labels=labels,
                      cases=tuple(CaseFiles(case=name, images=()) for name in names))
    measured = tuple(CaseFingerprint(case=name, shape=shape, shape_after_crop=shape, spacing=(1.0, 1.0, 1.0),
                                     relative_size_after_crop=1.0) for name in names)
    return dataset, Fingerprint(cases=measured, intensities=(CT,), median_relative_size_after_cropping=1.0)


LARGE = scene((400, 400, 400))


def test_there_is_a_row_for_every_budget_and_configuration() -> None:
    heading, *rows = what_if(*LARGE, "default", [4, 24])
    assert all(len(row) == len(heading) for row in rows)
    names = ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"]
    assert [(row[0], row[1]) for row in rows] == [(budget, name) for budget in ("4", "24") for name in names]
    for row in rows:
        own = default.plan(*LARGE, float(row[0])).configurations[row[1]]
        assert row[2] == "x".join(map(str, own.patch_size)) and row[4] == str(own.batch_size)
    assert {row[8] for row in rows} == {"not measured"}
    assert float(rows[5][5]) > float(rows[1][5]) > 0  # more memory is used where more is given


def test_each_kind_of_step_is_measured_once_and_the_others_are_estimated_by_arithmetic() -> None:
    asked: list[Configuration] = []

    def seconds(configuration: Configuration, plan: Plan) -> float:
        asked.append(configuration)
        return 0.1 if configuration.dims == 2 else 0.5

    _, *rows = what_if(*LARGE, "default", [4, 24], seconds, epochs=10, steps_per_epoch=100)
    assert [own.dims for own in asked] == [2, 3]
    assert [row[8] for row in rows[:2]] == ["measured", "measured"]
    assert rows[1][6:8] == ["0.5", f"{0.5 * 1000 / 3600:.3g}"]
    small, large = (default.plan(*LARGE, budget) for budget in (4, 24))

    def work(plan: Plan) -> float:
        own = plan.configurations["3d_fullres"]
        return own.batch_size * multiply_adds(own, *network_channels(plan, own))

    assert rows[5][6] == f"~{0.5 * work(large) / work(small):.3g}" and rows[5][7].startswith("~") and rows[5][8] == "estimate"
    assert rows[2][8] == ("measured" if small.configurations["3d_lowres"].patch_size == asked[1].patch_size else "estimate")


def test_a_step_that_cannot_be_measured_leaves_times_out() -> None:
    def seconds(configuration: Configuration, plan: Plan) -> float:
        raise RunError("out of memory")

    assert {tuple(row[6:]) for row in what_if(*LARGE, "default", [4], seconds)[1:]} == {("-", "-", "not measured")}


def test_an_unknown_planner_is_refused() -> None:
    with pytest.raises(PluginError, match="huge"):
        what_if(*LARGE, "huge", [4])


def test_a_cascade_has_an_input_channel_for_each_label() -> None:
    plan = default.plan(*LARGE)
    assert network_channels(plan, plan.configurations["3d_fullres"]) == (1, 4)
    assert network_channels(plan, plan.configurations["3d_cascade_fullres"]) == (4, 4)


def test_coverage_counts_no_padding() -> None:
    own = default.plan(*scene((36, 50, 35))).configurations["3d_fullres"]
    assert coverage(own) == 1 and own.patch_size == (40, 56, 40)
    assert coverage(own.model_copy(update={"median_shape": (80.0, 56.0, 20.0)})) == 0.5


def test_a_network_that_nobody_described_has_no_prediction() -> None:
    plan = default.plan(*LARGE)
    own = plan.configurations["2d"]
    assert (peak_gb(plan, own) or 0) > 0
    assert peak_gb(plan, own.model_copy(update={"network": Spec(kind="mine:Net")})) is None
