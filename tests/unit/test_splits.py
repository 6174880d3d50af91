from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.datasets.splits import check_splits, extend_splits, groups_from_names, make_splits
from autoseg.errors import DatasetError
from autoseg.types.dataset import CaseFiles, Split


def case(name: str, group: str | None = None, fold: int | None = None) -> CaseFiles:
    return CaseFiles(case=name, images=(f"/x/{name}.nii.gz",), label=f"/y/{name}.nii.gz", group=group, fold=fold)


def val_of(splits: list[Split]) -> dict[str, int]:
    return {name: k for k, split in enumerate(splits) for name in split.val}


def test_frames_of_a_patient_are_grouped() -> None:
    names = [f"patient{p:03d}_frame{f:02d}" for p in range(1, 7) for f in (1, 12)]
    groups = groups_from_names(names)
    assert groups is not None
    assert groups["patient003_frame12"] == groups["patient003_frame01"] == "patient003"
    assert len(set(groups.values())) == 6


@pytest.mark.parametrize("pattern", ["hippocampus_{:03d}", "vnc_{:02d}", "ms_{:02d}", "{}_3", "lung_{}", "case{}", "la_{:03d}_x",
                                     "BraTS20_Training_{:03d}"])
def test_names_without_a_patient_token_are_not_grouped(pattern: str) -> None:
    assert groups_from_names([pattern.format(i) for i in range(1000, 1020)]) is None


@pytest.mark.parametrize(("names", "patient"), [
    (["sub-01_ses-1", "sub-01_ses-2"], "sub-01"),
    (["acdc_patient001_frame01", "acdc_patient001_frame09"], "acdc_patient001"),
    (["P01-ct", "P01-mr"], "P01"),
    (["Pat1 left eye", "Pat1 right eye"], "Pat1"),
])
def test_other_spellings_of_patients_are_recognised(names: list[str], patient: str) -> None:
    rest = [f"solo{i}" for i in range(6)]
    groups = groups_from_names(names + rest)
    assert groups is not None
    assert {groups[n] for n in names} == {patient}
    assert len({groups[n] for n in rest}) == 6


def test_a_token_after_the_patient_that_never_varies_makes_no_group() -> None:
    assert groups_from_names([f"p{i}_ct" for i in range(10)]) is None


def test_names_are_not_grouped_when_fewer_groups_than_folds_would_be_left() -> None:
    names = [f"p{p}_t{t}" for p in range(4) for t in range(5)]
    assert groups_from_names(names) is None
    assert groups_from_names([*names, "p9_t1"]) is not None
    assert groups_from_names(names, folds=4) is not None


def test_five_balanced_folds_partition_the_cases() -> None:
    cases = [case(f"c{i:02d}") for i in range(23)]
    splits = make_splits(cases, {c.case: frozenset({1}) for c in cases})
    assert sorted(len(s.val) for s in splits) == [4, 4, 5, 5, 5]
    assert sorted(name for s in splits for name in s.val) == [c.case for c in cases]
    for split in splits:
        assert set(split.train) | set(split.val) == {c.case for c in cases}
        assert not set(split.train) & set(split.val)


def test_a_rare_label_is_spread_over_the_folds() -> None:
    cases = [case(f"c{i:02d}") for i in range(30)]
    rare = {f"c{i:02d}" for i in (0, 1, 2, 3, 4, 5, 6)}
    present = {c.case: frozenset({1, 2, 3} if c.case in rare else {1, 2}) for c in cases}
    splits = make_splits(cases, present)
    assert sorted(len(rare & set(s.val)) for s in splits) == [1, 1, 1, 2, 2]
    assert {len(s.val) for s in splits} == {6}


def test_two_disjoint_labels_are_both_spread() -> None:
    cases = [case(f"c{i:02d}") for i in range(20)]
    present = {c.case: frozenset({1} if i < 10 else {2}) for i, c in enumerate(cases)}
    for split in make_splits(cases, present):
        held = Counter(next(iter(present[c])) for c in split.val)
        assert held == {1: 2, 2: 2}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.frozensets(st.integers(1, 4))), min_size=2, max_size=40), st.integers(2, 6),
       st.randoms(use_true_random=False))
def test_any_cases_give_valid_grouped_folds_in_any_order(rows: list[tuple[int, frozenset[int]]], folds: int, random) -> None:
    cases = [case(f"c{i:02d}", f"g{g}") for i, (g, _) in enumerate(rows)]
    present = {c.case: labels for c, (_, labels) in zip(cases, rows, strict=True)}
    groups = {c.group for c in cases}
    if len(groups) < 2 and len(cases) > 1:
        with pytest.raises(DatasetError, match="at least 2 groups"):
            make_splits(cases, present, folds)
        return
    splits = make_splits(cases, present, folds)
    check_splits(splits, cases)
    assert len(splits) == min(folds, len(groups))
    assert sorted(name for s in splits for name in s.val) == [c.case for c in cases]
    shuffled = list(cases)
    random.shuffle(shuffled)
    assert make_splits(shuffled, present, folds) == splits


def test_the_seed_changes_who_is_with_whom() -> None:
    cases = [case(f"c{i:02d}") for i in range(20)]
    assert make_splits(cases, {}, seed=1) != make_splits(cases, {}, seed=2)
    assert make_splits(cases, {}, seed=1) == make_splits(cases, {}, seed=1)


def test_fewer_groups_than_folds_give_one_fold_per_group() -> None:
    assert len(make_splits([case(f"c{i}") for i in range(4)], {})) == 4
    assert len(make_splits([case(f"c{i}", f"g{i % 3}") for i in range(9)], {})) == 3


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_cases_are_left_out_one_at_a_time(count: int) -> None:
    names = [f"c{i}" for i in range(count)]
    splits = make_splits([case(name) for name in names], {})
    assert sorted(s.val for s in splits) == [(name,) for name in names]
    assert all(set(s.train) == set(names) - set(s.val) for s in splits)


def test_the_only_case_is_trained_and_validated_on_and_more_cases_make_proper_folds() -> None:
    only = [case("c0", "p0")]
    splits = make_splits(only, {})
    assert splits == [Split(train=("c0",), val=("c0",))]
    check_splits(splits, only)
    assert extend_splits(splits, only, known=["c0"]) == splits
    more = [*only, case("c1", "p1"), case("c2", "p2")]
    extended = extend_splits(splits, more, known=["c0"])
    check_splits(extended, more)
    assert len(extended) == 3
    with pytest.raises(DatasetError, match="c0 in train and in val"):
        extend_splits(splits, more, known=["c0", "c1", "c2"])


def test_several_cases_of_one_group_are_refused_with_the_minimum() -> None:
    with pytest.raises(DatasetError, match=r"at least 2 groups .* found 2 cases of 1"):
        make_splits([case("a", "p"), case("b", "p")], {})


def test_folds_of_the_manifest_are_respected() -> None:
    splits = make_splits([case("a", fold=0), case("b", fold=1), case("c", fold=1), case("d", fold=4)], {})
    assert [s.val for s in splits] == [("a",), ("b", "c"), ("d",)]


def test_folds_given_for_some_cases_only_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"2 of 3 cases.*without one: c"):
        make_splits([case("a", fold=0), case("b", fold=1), case("c")], {})


def test_folds_of_the_manifest_that_leak_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"fold 0: group p is in train and in val \(a, b\)"):
        make_splits([case("a", "p", 0), case("b", "p", 1), case("c", "q", 1)], {})


def test_check_lists_every_fault_of_edited_splits() -> None:
    cases = [case("a1", "a"), case("a2", "a"), case("b", "b"), case("c", "c")]
    splits = [Split(train=("a1", "b", "b"), val=("a2", "ghost")), Split(train=("c", "b"), val=("c",)),
              Split(train=("a1",), val=())]
    with pytest.raises(DatasetError) as info:
        check_splits(splits, cases)
    text = str(info.value)
    for part in ("fold 0: group a is in train and in val (a1, a2)", "fold 0: val holds ghost",
                 "fold 0: train lists b more than once", "fold 1: c in train and in val", "fold 2: val is empty"):
        assert part in text


def test_leaving_cases_out_is_allowed_and_no_fold_is_not() -> None:
    cases = [case(n) for n in "abc"]
    check_splits([Split(train=("a",), val=("b",))], cases)
    with pytest.raises(DatasetError, match="no fold"):
        check_splits([], cases)


def test_existing_assignments_stay_when_cases_are_added_and_removed() -> None:
    cases = [case(f"c{i:02d}") for i in range(12)]
    before = val_of(make_splits(cases, {}))
    changed = [c for c in cases if c.case != "c03"] + [case("new1"), case("new2"), case("new3")]
    splits = extend_splits(make_splits(cases, {}), changed)
    after = val_of(splits)
    assert {n: k for n, k in after.items() if n in before} == {n: k for n, k in before.items() if n != "c03"}
    assert {"new1", "new2", "new3"} <= set(after)
    assert max(len(s.val) for s in splits) - min(len(s.val) for s in splits) <= 1
    assert all(len(s.train) + len(s.val) == len(changed) for s in splits)


def test_nothing_changes_when_no_case_changes() -> None:
    cases = [case(f"c{i:02d}") for i in range(7)]
    splits = make_splits(cases, {})
    assert extend_splits(splits, cases) == splits


def test_a_new_case_of_a_known_patient_goes_where_the_patient_is() -> None:
    cases = [case(f"p{p}_t1", f"p{p}") for p in range(6)]
    splits = make_splits(cases, {})
    home = val_of(splits)["p2_t1"]
    extended = extend_splits(splits, [*cases, case("p2_t2", "p2"), case("p2_t3", "p2")])
    assert {val_of(extended)[n] for n in ("p2_t1", "p2_t2", "p2_t3")} == {home}


def test_cases_that_were_left_out_on_purpose_stay_out() -> None:
    cases = [case(n) for n in "abcd"]
    splits = [Split(train=("a",), val=("b",)), Split(train=("b",), val=("a",))]
    extended = extend_splits(splits, [*cases, case("new")], known=list("abcd"))
    assert {n for s in extended for n in (*s.train, *s.val)} == {"a", "b", "new"}


def test_a_fixed_hold_out_keeps_its_validation_cases() -> None:
    extended = extend_splits([Split(train=("a",), val=("b",))], [case(n) for n in "abc"])
    assert extended == [Split(train=("a", "c"), val=("b",))]
