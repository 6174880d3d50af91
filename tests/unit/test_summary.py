"""Records told in words."""

from __future__ import annotations

from autoseg.planners.registry import get_planner
from autoseg.stages.summary import describe_plan, describe_selection
from autoseg.types.dataset import CaseFiles, Dataset, Split
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan
from autoseg.types.record import Spec
from autoseg.types.selection import Candidate, Decision, Difference, Gain, PostprocessingTrial, Selection

LABELS = Labels(foreground=(Label(name="liver", value=1), Label(name="tumour", value=2)))
CONFIGURATION = Configuration(
    patch_size=(16, 32, 32), batch_size=2, spacing=(2.5, 0.78125, 0.78125), median_shape=(20.5, 60, 60),
    strides=((1, 1, 1), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 2, features_per_stage=(32, 64), blocks_per_stage=(2, 2),
    decoder_blocks_per_stage=(2,), batch_dice=False, normalization=("CTNormalization", "CTNormalization"),
    use_mask_for_norm=(False, False),
)


def dataset(grouped: bool) -> Dataset:
    cases = tuple(CaseFiles(case=f"c{i}", images=(f"/d/c{i}.nii.gz",), group=f"p{i // 2}" if grouped else None) for i in range(4))
    return Dataset(
        name="Livers", source="folder", root="/d", channels=("ct", "pet"), labels=LABELS, cases=cases,
        groups_from="names" if grouped else "none",
    )


def told(grouped: bool) -> tuple[list[str], list[list[str]]]:
    plan = Plan(
        dataset_name="Livers", planner="default", gpu_memory_gb=8, transpose_forward=(0, 1, 2), channels=("ct", "pet"),
        labels=LABELS, intensities=(), configurations={"3d_fullres": CONFIGURATION}, notes=("CT recognised by its range",),
    )
    splits = [Split(train=("c2", "c3"), val=("c0", "c1")), Split(train=("c0", "c1"), val=("c2", "c3"))]
    fingerprint = Fingerprint(cases=(), intensities=(), median_relative_size_after_cropping=1.0)
    return describe_plan(dataset(grouped), fingerprint, plan, splits)


def test_a_plan_is_told_with_its_data_folds_and_notes() -> None:
    facts, rows = told(grouped=False)
    assert facts == [
        "Livers: 4 cases, channels ct, pet, labels liver, tumour",
        "2 folds of 2 2 validation cases",
        "CT recognised by its range",
    ]
    assert rows[1] == ["3d_fullres", "16x32x32", "2", "2.5 x 0.781 x 0.781", "20x60x60", "2", "32 to 64", "CT", "0.0 GB"]
    assert len({len(row) for row in rows}) == 1


def facts(shape: tuple[int, int, int], cases: int, planner: str, memory_gb: float) -> list[str]:
    """What is said of the memory of a plan for CT volumes of one size."""
    names = [f"c{i}" for i in range(cases)]
    measured = tuple(
        CaseFingerprint(case=name, shape=shape, shape_after_crop=shape, spacing=(1.0, 1.0, 1.0), relative_size_after_crop=1.0)
        for name in names
    )
    intensities = Intensities(mean=1, median=1, std=1, min=0, max=2, percentile_99_5=2, percentile_00_5=0)
    fingerprint = Fingerprint(cases=measured, intensities=(intensities,) * 2, median_relative_size_after_cropping=1.0)
    data = dataset(grouped=False).model_copy(update={"cases": tuple(CaseFiles(case=name, images=()) for name in names)})
    plan = get_planner(planner)(data, fingerprint, memory_gb)
    return [fact for fact in describe_plan(data, fingerprint, plan, [])[0] if "predicted" in fact]


def test_memory_that_is_far_from_the_stated_is_told() -> None:
    large = (432, 512, 512)
    (below,) = facts(large, 100, "default", 8)
    assert below.startswith("planned for 8 GB, but training is predicted to need less in bf16: ") and "3d_fullres 4." in below
    (above,) = facts((200, 200, 200), 100, "residual-m", 0.5)
    assert above.startswith("warning: planned for 0.5 GB, but training is predicted to need more in bf16: ")


def test_memory_that_the_data_leave_unused_is_not_told() -> None:
    assert facts((36, 50, 35), 20, "default", 8) == []


def test_groups_are_shown_with_the_way_to_turn_them_off() -> None:
    facts, _ = told(grouped=True)
    assert facts[1] == "2 folds of 2 2 validation cases, 2 groups from names kept together"
    assert facts[-1] == "groups, for example p0: c0, c1; p1: c2, c3 (--groups none turns this off)"


def test_a_selection_is_told_with_its_candidates_decisions_and_trials() -> None:
    step = Spec(kind="largest_component", options={"labels": [1]})
    gain = Gain(mean=0.01, low=0.002, high=0.018, naive=0.012, p_value=0.003)
    behind = Difference(mean=0.02, low=0.01, high=0.03, p_value=0.004, cases=9)
    selection = Selection(
        runs=("2d", "3d_fullres"), weights=(1, 2), folds=(0, 1), cases=9, patients=7, note="Notes.", foreground_mean_dice=0.85,
        nested_dice=0.84,
        decisions=(Decision(question="which run", default="2d", best="3d_fullres", gain=gain, kept=True),),
        candidates=(
            Candidate(runs=("2d", "3d_fullres"), weights=(1, 2), foreground_mean_dice=0.85, low=0.8, high=0.9, per_label={},
                      networks=10, cost="10 networks", first=0.75),
            Candidate(runs=("2d",), foreground_mean_dice=0.81234, per_label={}, networks=5, cost="5 networks", behind=behind),
            Candidate(runs=("2d", "x"), foreground_mean_dice=None, per_label={}, networks=10, cost="not shown", behind=behind),
        ),
        postprocessing_tried=(
            PostprocessingTrial(step=step, name="largest liver", before=0.9, after=0.91, kept=True, gain=gain, seconds=0.002),
            PostprocessingTrial(step=step, name="largest tumour", before=0.5, after=0.4, kept=False),
            PostprocessingTrial(step=step, name="holes", before=0.5, after=0.5, kept=False),
            PostprocessingTrial(step=step, name="nothing to measure", before=None, after=0.5, kept=False),
        ),
    )
    facts, rows = describe_selection(selection)
    assert facts == [
        "selected: 2d + 3d_fullres x 2, by 9 validation cases of 7 patients of folds 0, 1",
        "which run: 3d_fullres over 2d: gain +0.0100 (at least +0.0020; naively +0.0120), kept",
        "tried without any effect: holes",
        "largest liver: Dice 0.9000 -> 0.9100, 0.002 s per case; gain +0.0100 (at least +0.0020; naively +0.0120), kept",
        "largest tumour: Dice 0.5000 -> 0.4000; dropped",
        "2d + 3d_fullres x 2: 10 networks",
        "2d: 5 networks",
        "foreground mean Dice of the selected masks 0.8500; without optimism 0.8400",
        "Notes.",
    ]
    assert rows[1:] == [
        ["2d + 3d_fullres x 2", "0.8500", "0.8000 to 0.9000", "-", "-", "75%", "10"],
        ["2d", "0.8123", "-", "+0.0200 (+0.0100 to +0.0300)", "0.004", "-", "5"],
        ["2d + x", "-", "-", "+0.0200 (+0.0100 to +0.0300)", "0.004", "-", "10"],
    ]
