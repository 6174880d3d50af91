"""Records told in words."""

from __future__ import annotations

from autoseg.stages.summary import describe_plan, describe_selection
from autoseg.types.dataset import CaseFiles, Dataset, Split
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan
from autoseg.types.record import Spec
from autoseg.types.report import Candidate, PostprocessingTrial, Selection

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
    assert rows[1] == ["3d_fullres", "16x32x32", "2", "2.5 x 0.781 x 0.781", "20x60x60", "2", "32 to 64", "CT"]
    assert len({len(row) for row in rows}) == 1


def test_groups_are_shown_with_the_way_to_turn_them_off() -> None:
    facts, _ = told(grouped=True)
    assert facts[1] == "2 folds of 2 2 validation cases, 2 groups from names kept together"
    assert facts[-1] == "groups, for example p0: c0, c1; p1: c2, c3 (--groups none turns this off)"


def test_a_selection_is_told_with_its_candidates_and_trials() -> None:
    step = Spec(kind="largest_component", options={"labels": [1]})
    selection = Selection(
        runs=("2d", "3d_fullres"), folds=(0, 1), cases=9, note="3d_lowres is not finished",
        candidates=(
            Candidate(runs=("2d",), foreground_mean_dice=0.81234, per_label={}, networks=5, cost="1x"),
            Candidate(runs=("2d", "3d_fullres"), foreground_mean_dice=None, per_label={}, networks=10),
        ),
        postprocessing_tried=(
            PostprocessingTrial(step=step, name="largest liver", before=0.9, after=0.91, kept=True),
            PostprocessingTrial(step=step, name="largest tumour", before=0.5, after=0.4, kept=False),
            PostprocessingTrial(step=step, name="nothing to measure", before=None, after=None, kept=False),
        ),
    )
    facts, rows = describe_selection(selection)
    assert facts[0].startswith("selected: 2d + 3d_fullres") and "9 validation cases of folds 0, 1" in facts[0]
    assert facts[1:] == [
        "largest liver: Dice 0.9000 -> 0.9100, kept",
        "largest tumour: Dice 0.5000 -> 0.4000, dropped",
        "3d_lowres is not finished",
    ]
    assert rows[1:] == [["2d", "0.8123", "5", "1x"], ["2d + 3d_fullres", "-", "10", ""]]
