"""Which cases train and which validate in each fold: grouped by patient, stratified by the labels a case holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from autoseg.errors import DatasetError
from autoseg.types.dataset import CaseFiles, Split

FOLDS = 5
SEED = 12345  # nnU-Net's, for the random order of equals


def groups_from_names(cases: Iterable[str], folds: int = FOLDS) -> dict[str, str] | None:
    """Patients recognised in case names: a token of letters and digits that a second token follows, as in patient001_frame01.

    Tokens are separated by "_", or by "-" or a space where a name has no "_". A case without such a token is a group of its own.
    None when no group holds two cases that differ in that second token, or when fewer groups than folds would be left.
    """
    names = sorted(set(cases))
    found = {name: _patient(name) for name in names}
    followers: dict[str, set[str]] = {}
    for patient, follower in found.values():
        followers.setdefault(patient, set()).add(follower)
    groups = {name: patient for name, (patient, _) in found.items()}
    if all(len(seen) < 2 for seen in followers.values()) or len(followers) < min(folds, len(names)):
        return None
    return groups


def _patient(name: str) -> tuple[str, str]:
    """The leading part of a name up to its first token with letters and digits, and the token after it."""
    separator = next((s for s in "_- " if s in name), "_")
    tokens = name.split(separator)
    for i, token in enumerate(tokens[:-1]):
        if re.search(r"[^\W\d_]", token) and re.search(r"\d", token):
            return separator.join(tokens[: i + 1]), tokens[i + 1]
    return name, ""


def make_splits(cases: Sequence[CaseFiles], labels_present: Mapping[str, frozenset[int]], folds: int = FOLDS,
                seed: int = SEED) -> list[Split]:
    """Folds for cross-validation: cases of a group stay together, sizes are balanced, and every label is spread over the folds.

    Groups holding the rarest label are placed first, each into the fold with the fewest cases of it (after Sechidis et al.
    2011, iterative stratification). With fewer groups than `folds` there is one fold per group, and a single case is both
    trained and validated on. When every case has a `fold` in the manifest, that is used instead. The same cases give the same
    folds in any order.
    Raises DatasetError when all of several cases belong to one group, or when the given folds are incomplete or leak.
    """
    cases = sorted(cases, key=lambda c: c.case)
    if len(cases) == 1:
        return [Split(train=(cases[0].case,), val=(cases[0].case,))]
    groups = _groups(cases)
    if len(groups) < 2:
        raise DatasetError(f"cross-validation needs cases of at least 2 groups (patients), found {len(cases)} cases of "
                           f"{len(groups)}; add cases, or correct the groups (--groups none treats every case as its own group)")
    given = [c for c in cases if c.fold is not None]
    if given:
        splits = _given_folds(cases, given)
    else:
        home = _place(groups, labels_present, min(folds, len(groups)), seed)
        count = min(folds, len(groups))
        splits = [_split(cases, [c.case for c in cases if home[_group(c)] == k]) for k in range(count)]
    check_splits(splits, cases)
    return splits


def _group(case: CaseFiles) -> str:
    # a case without a group must not meet a group that happens to bear its name
    return f"group:{case.group}" if case.group is not None else f"case:{case.case}"


def _groups(cases: Sequence[CaseFiles]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for case in cases:
        groups.setdefault(_group(case), []).append(case.case)
    return groups


def _split(cases: Sequence[CaseFiles], val: Iterable[str]) -> Split:
    held = set(val)
    return Split(train=tuple(c.case for c in cases if c.case not in held), val=tuple(c.case for c in cases if c.case in held))


def _given_folds(cases: Sequence[CaseFiles], given: Sequence[CaseFiles]) -> list[Split]:
    if len(given) < len(cases):
        without = [c.case for c in cases if c.fold is None]
        raise DatasetError(f"fold is given for {len(given)} of {len(cases)} cases, expected all or none; "
                           f"without one: {_some(without)}")
    numbers = sorted({c.fold for c in cases if c.fold is not None})
    if len(numbers) < 2:
        raise DatasetError(f"the manifest puts all {len(cases)} cases into fold {numbers[0]}; at least 2 folds are needed")
    return [_split(cases, [c.case for c in cases if c.fold == number]) for number in numbers]


def _place(groups: Mapping[str, Sequence[str]], present: Mapping[str, frozenset[int]], count: int, seed: int) -> dict[str, int]:
    """Fold of each group."""
    names = sorted(groups)
    order = {names[i]: rank for rank, i in enumerate(np.random.default_rng(seed).permutation(len(names)))}
    holds = {name: Counter(v for case in groups[name] for v in present.get(case, frozenset())) for name in names}
    floor, extra = divmod(sum(len(members) for members in groups.values()), count)
    size = [0] * count
    labels: list[Counter[int]] = [Counter() for _ in range(count)]
    home: dict[str, int] = {}

    def put(name: str, label: int | None) -> None:
        larger = sum(s > floor for s in size)
        weight = len(groups[name])

        def rank(k: int) -> tuple[bool, int, int, int]:
            room = floor + (1 if larger < extra else 0)
            return size[k] > 0 and size[k] + weight > room, labels[k][label] if label is not None else 0, size[k], k

        best = min(range(count), key=rank)
        home[name] = best
        size[best] += weight
        labels[best].update(holds[name])

    while len(home) < len(names):
        left = [name for name in names if name not in home]
        total: Counter[int] = Counter()
        for name in left:
            total.update(holds[name])
        if not total:
            for name in sorted(left, key=lambda n: (-len(groups[n]), order[n])):
                put(name, None)
            break
        rarest = min(total, key=lambda v: (total[v], v))
        for name in sorted((n for n in left if holds[n][rarest]), key=lambda n: (-holds[n][rarest], -len(groups[n]), order[n])):
            put(name, rarest)
    return home


def check_splits(splits: Sequence[Split], cases: Sequence[CaseFiles]) -> None:
    """Verify folds that were made, edited or provided: known cases, none on both sides, no group on both sides, no empty side.

    A case may be left out or never be validated; the only case there is may be on both sides. Raises DatasetError that lists
    everything that is wrong.
    """
    group_of = {c.case: c.group for c in cases}
    problems: list[str] = [] if splits else ["there is no fold"]
    for k, split in enumerate(splits):
        for side, members in (("train", split.train), ("val", split.val)):
            if not members:
                problems.append(f"fold {k}: {side} is empty")
            unknown = [c for c in members if c not in group_of]
            if unknown:
                problems.append(f"fold {k}: {side} holds {_some(unknown)}, which the data set does not hold")
            twice = [c for c, n in Counter(members).items() if n > 1]
            if twice:
                problems.append(f"fold {k}: {side} lists {_some(twice)} more than once")
        both = sorted(set(split.train) & set(split.val))
        if both and len(group_of) > 1:
            problems.append(f"fold {k}: {_some(both)} in train and in val")
        sides = [{group_of[c] for c in members if group_of.get(c) is not None} for members in (split.train, split.val)]
        for group in sorted(str(g) for g in sides[0] & sides[1]):
            inside = [c for c in (*split.train, *split.val) if group_of.get(c) == group]
            if len(set(inside)) > 1:
                problems.append(f"fold {k}: group {group} is in train and in val ({_some(inside)})")
    if problems:
        raise DatasetError("the splits are not usable:\n  " + "\n  ".join(problems)
                           + "\ncorrect the splits file, or remove it to get new splits")


def extend_splits(splits: Sequence[Split], cases: Sequence[CaseFiles], known: Iterable[str] = ()) -> list[Split]:
    """Fold assignments for a data set that changed: existing ones stay, removed cases disappear, new cases are added.

    Cases of `known` (what the data set held when the splits were made) that are in no fold were left out on purpose and stay out.

    A new case of a known group goes where its group is; a new group is validated in the fold with the fewest validation cases
    and trains in the others. A single fold is a fixed hold-out: new groups train; but folds of what was the only case, trained
    and validated on, are made anew. Raises DatasetError when a fold loses a side.
    """
    held = set(known)
    if len(held) == 1 < len(cases) and [s for s in splits if {*s.train} == {*s.val} == held]:
        return make_splits(cases, {})
    group_of = {c.case: _group(c) for c in cases}
    train = [[c for c in s.train if c in group_of] for s in splits]
    val = [[c for c in s.val if c in group_of] for s in splits]
    placed = {c for members in (*train, *val) for c in members} | held
    added: dict[str, list[str]] = {}
    for case in sorted(group_of):
        if case not in placed:
            added.setdefault(group_of[case], []).append(case)
    for group, members in sorted(added.items(), key=lambda item: (-len(item[1]), item[0])):
        in_val = [any(group_of[c] == group for c in side) for side in val]
        in_train = [any(group_of[c] == group for c in side) for side in train]
        if not any(in_val) and not any(in_train):
            smallest = min(range(len(splits)), key=lambda k: (len(val[k]), k), default=0)
            in_val = [k == smallest and len(splits) > 1 for k in range(len(splits))]
            in_train = [not here for here in in_val]
        for k in range(len(splits)):
            if in_val[k]:
                val[k] += members
            elif in_train[k]:
                train[k] += members
    result = [Split(train=tuple(t), val=tuple(v)) for t, v in zip(train, val, strict=True)]
    check_splits(result, cases)
    return result


def _some(names: Sequence[str], most: int = 5) -> str:
    names = sorted(set(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
