"""The rules that turn the measured errors of many cases into named symptoms of a label: when a quantity is too large."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from autoseg.arrays.symptoms import (
    FAR_VOXELS,
    NEAR_VOXELS,
    SLICE_AREA,
    SLICE_VOXELS,
    CaseSymptoms,
    Kind,
    TargetSymptoms,
    TrueObject,
)
from autoseg.types.diagnosis import Evidence, Finding

LEAST_CASES = 3
MOST = 0.6  # share of cases that must show what is called a habit of the network
SOME = 0.25  # share of cases that must show an error which comes and goes
SHIFT_VOXELS, ONE_SIDED = 0.5, 0.5
LOW, HIGH = 0.6, 0.8  # sensitivity against precision
NSD_LEAST, NEAR_LEAST = 0.85, 0.7
SWAP_SHARE, FAR_SHARE = 0.05, 0.01
JUMP_SHARE, JUMP_FACTOR, JUMPING_CASES = 0.1, 3.0, 0.5
SMALL_RECALL, LARGE_RECALL, SMALL_OBJECTS, SMALL_MISSED, SMALL_P = 0.5, 0.8, 8, 4, 0.001
SWALLOWED = 1.9  # a ball this many shrinkages deep keeps a tenth of its volume: 1 / (1 - 0.1 ** (1 / 3))
SMALL_EDGE = 4  # voxels of an edge below which an object vanishes in two down-samplings

ALL_LABELS = "all labels"
HABIT = f"seen in {MOST:.0%} of the cases or more"
ROUNDING = "half a voxel is the rounding of a label map: a shift beyond it in one direction is no noise"
GRID = "normal errors of half a voxel (standard deviation) stay within one voxel in 95 % of places, of 0.7 voxels in 85 %"
SCATTER = f"seen in {SOME:.0%} of the cases or more, and not in one fold or group alone"


@dataclass(frozen=True)
class Sample:
    """One out-of-fold case: its errors, its fold (None if unknown), and what groups it is in (site, scanner, ...)."""

    case: str
    found: CaseSymptoms
    fold: int | None = None
    groups: Mapping[str, str] = field(default_factory=dict)


Row = tuple[Sample, TargetSymptoms]


def rows_of(samples: Iterable[Sample], target: str) -> list[Row]:
    """The cases whose reference holds a target."""
    return [(s, s.found.targets[target]) for s in samples if target in s.found.targets and s.found.targets[target].reference]


def target_findings(samples: Sequence[Sample]) -> list[Finding]:
    """What is wrong with each label or pair of labels over `samples`; labels with fewer than three cases are left out."""
    findings = [finding for pair in _pairs(samples) if (finding := _swap(samples, pair)) is not None]
    swapped = {name for finding in findings for name in finding.target.split(" and ")}
    by_target = {target: rows for target in target_names(samples) if len(rows := rows_of(samples, target)) >= LEAST_CASES}
    for target, rows in by_target.items():
        findings += _findings_of(samples, rows, target, target in swapped)
    if len(by_target) > 1 and not any(f.symptom == "far_false_positives" for f in findings):
        far = _far(samples, list(by_target), ALL_LABELS)  # too rare in each label, and yet common
        findings += [far] if far else []
    shrunk = max((_shrinkage(by_target[f.target]) for f in findings if f.symptom == "over_predicted_background"), default=0.0)
    blurred = {f.target for f in findings if f.symptom == "blurred_boundary"}
    for target, rows in by_target.items():
        swallowed = max(SWALLOWED * shrunk + 1 if shrunk else 0.0, NEAR_VOXELS if target in blurred else 0.0)
        if (small := _small(rows, target, swallowed)) is not None:
            findings.append(small)
    return findings


def target_names(samples: Iterable[Sample]) -> list[str]:
    """All targets, in the order in which they appear."""
    return list(dict.fromkeys(name for sample in samples for name in sample.found.targets))


def kinds_of(findings: Iterable[Finding], targets: Iterable[str]) -> dict[str, tuple[Kind, ...]]:
    """By target, the kinds of error that findings explain; `targets` are all there are."""
    kinds: dict[str, tuple[Kind, ...]] = {}
    listed = list(targets)
    mended: dict[str, Kind] = {"left_right_swap": "swapped", "far_false_positives": "far", "small_objects_missed": "missed",
                               "slice_jumps": "jumps"}
    for finding in findings:
        if finding.symptom in mended:
            names = finding.target.split(" and ") if finding.symptom == "left_right_swap" else [finding.target]
            for name in listed if finding.target == ALL_LABELS else names:
                kinds[name] = (*kinds.get(name, ()), mended[finding.symptom])
    return kinds


def _findings_of(samples: Sequence[Sample], rows: Sequence[Row], target: str, swapped: bool) -> list[Finding]:
    """All findings of a target but small objects missed, which depend on those of the others."""
    far, jumps = _far([s for s in samples if target in s.found.targets], [target], target), _jumps(rows, target)
    small = _small(rows, target, 0.0)
    named: list[tuple[Kind, object]] = [("far", far), ("jumps", jumps), ("swapped", swapped), ("missed", small)]
    shift = _shift(rows, target, [kind for kind, finding in named if finding])
    blur = None if shift or jumps else _blur(rows, target)
    return [finding for finding in (far, jumps, shift, blur) if finding is not None]


def _shrinkage(rows: Sequence[Row]) -> float:
    """By how many voxels the boundary lies too far inside, median."""
    return max(0.0, -(_median(t.bias_voxels for _, t in rows) or 0.0))


def _pairs(samples: Iterable[Sample]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pair for sample in samples for pair in sample.found.swaps))


def _worst(rows: Iterable[tuple[Sample, float]], most: int = 5) -> tuple[str, ...]:
    """Cases by falling badness."""
    return tuple(sample.case for sample, _ in sorted(rows, key=lambda row: (-row[1], row[0].case))[:most])


def concentrated(flagged: Sequence[Sample], samples: Sequence[Sample]) -> bool:
    """Whether all flagged cases are of one fold or one group that holds less than 60 % of the cases."""
    keys: list[Callable[[Sample], object]] = [lambda s: s.fold]
    keys += [lambda s, c=column: s.groups.get(c) for column in sorted({c for s in samples for c in s.groups})]  # type: ignore[misc]
    for key in keys:
        places = {key(sample) for sample in flagged}
        place = places.pop() if len(places) == 1 else None
        if place is not None and sum(key(sample) == place for sample in samples) < MOST * len(samples):
            return True
    return False


def _common(flagged: Sequence[Sample], rows: Sequence[Sample], share: float) -> bool:
    return len(flagged) >= max(2, share * len(rows)) and not concentrated(flagged, rows)


def _swap(samples: Sequence[Sample], pair: tuple[str, str]) -> Finding | None:
    rows = [(sample, sample.found.swaps[pair]) for sample in samples if pair in sample.found.swaps]
    flagged = [(sample, share) for sample, share in rows if share >= SWAP_SHARE]
    if len(rows) < LEAST_CASES or not _common([s for s, _ in flagged], [s for s, _ in rows], SOME):
        return None
    return Finding(symptom="left_right_swap", target=" and ".join(pair), cases=_worst(flagged), evidence=(
        Evidence(quantity="voxels of the two labels that carry the other's name, median of the cases that show it",
                 value=median(share for _, share in flagged), rule=f"{SWAP_SHARE} or more",
                 source=f"counted only beyond {NEAR_VOXELS:g} voxels from the border between the two, where none should be"),
        Evidence(quantity="share of cases that show it", value=len(flagged) / len(rows), rule=f"{SOME} or more", source=SCATTER),
    ))


def _false_objects(samples: Sequence[Sample], target: str) -> dict[str, float]:
    """Voxels of far false objects of a target, in the cases where they are worth naming."""
    rows = [(s, s.found.targets[target]) for s in samples if target in s.found.targets]
    usual = median(t.reference for _, t in rows)
    return {s.case: float(voxels) for s, t in rows
            if (voxels := t.explained["far"][0]) >= max(2 ** s.found.dims, FAR_SHARE * usual)}


def _far(samples: Sequence[Sample], targets: Sequence[str], name: str) -> Finding | None:
    """Far false objects of one target, or of several together, called `name`."""
    voxels: dict[str, float] = {}
    for target in targets:
        for case, found in _false_objects(samples, target).items():
            voxels[case] = voxels.get(case, 0.0) + found
    flagged = [sample for sample in samples if sample.case in voxels]
    if not _common(flagged, samples, SOME):
        return None
    known = [t.far_voxels for s in flagged for target in targets if (t := s.found.targets.get(target)) is not None]
    distances = [distance for distance in known if distance is not None]
    evidence = [Evidence(
        quantity="voxels of false objects that touch no true one, median of the cases that show it",
        value=median(voxels.values()), rule=f"{FAR_SHARE:.0%} of the label's usual size or more",
        source=f"objects more than {FAR_VOXELS:g} voxels from any true one; smaller ones hardly change any measure")]
    if distances:
        evidence.append(Evidence(quantity="distance of the farthest such object in voxels, median", value=median(distances),
                                 rule=f"above {FAR_VOXELS:g}", source="beyond what a wrong boundary can explain"))
    evidence.append(Evidence(quantity="share of cases that show it", value=len(flagged) / len(samples), rule=f"{SOME} or more",
                             source=SCATTER))
    return Finding(symptom="far_false_positives", target=name, evidence=tuple(evidence),
                   cases=_worst([(s, voxels[s.case]) for s in flagged]))


def _jumps(rows: Sequence[Row], target: str) -> Finding | None:
    looked = [(s, t, t.jumps) for s, t in rows if t.jumps is not None]
    flagged = [(s, share) for s, t, share in looked if share >= max(JUMP_SHARE, JUMP_FACTOR * t.jumps_in_plane)]
    if len(looked) < max(LEAST_CASES, len(rows) / 2):  # small or scattered objects hardly have slices that can be judged
        return None
    if not _common([s for s, _ in flagged], [s for s, *_ in looked], JUMPING_CASES):
        return None
    return Finding(symptom="slice_jumps", target=target, cases=_worst(flagged), evidence=(
        Evidence(quantity="share of slices off the line of their neighbours, median of the cases that show it",
                 value=median(share for _, share in flagged), rule=f"{JUMP_SHARE} or more",
                 source=f"anatomy does not move by {SLICE_VOXELS:g} voxels or {SLICE_AREA:.0%} of the area in one slice alone"),
        Evidence(quantity="the same across the other two axes", value=median(t.jumps_in_plane for _, t, _ in looked),
                 rule=f"at most a {JUMP_FACTOR:g}rd of it", source="a rough boundary is rough in every direction"),
        Evidence(quantity="share of cases that show it", value=len(flagged) / len(looked), rule=f"{JUMPING_CASES} or more",
                 source="slices that are segmented alone jump in all cases"),
    ))


def _small(rows: Sequence[Row], target: str, depth_voxels: float) -> Finding | None:
    """Objects below a size are missed while larger ones are found; objects no deeper than `depth_voxels` do not count.

    Cases whose sides are swapped do not count either: what carries the other side's name there was found.
    """
    rows = [(s, t) for s, t in rows if not any(target in pair and share >= SWAP_SHARE for pair, share in s.found.swaps.items())]
    pooled = [(s, o) for s, t in rows for o in t.objects if o.voxels >= 2 ** s.found.dims and o.depth_voxels > depth_voxels]
    missed = [(s, o) for s, o in pooled if not o.found]
    cases = list({s.case: s for s, _ in missed}.values())
    if len(pooled) < SMALL_OBJECTS or len(missed) < SMALL_MISSED or len(cases) < 2 or concentrated(cases, [s for s, _ in rows]):
        return None
    limit = _size_limit([o for _, o in pooled], max(s.found.dims for s, _ in rows))
    if limit is None:
        return None
    below, above = [o for _, o in pooled if o.voxels <= limit], [o for _, o in pooled if o.voxels > limit]
    evidence = [Evidence(quantity=f"share found of {len(below)} objects of {limit} voxels or less", value=_recall(below),
                         rule=f"at most {SMALL_RECALL}", source="sizes are split where the found share differs most")]
    if above:
        evidence.append(Evidence(quantity=f"share found of {len(above)} larger objects", value=_recall(above),
                                 rule=f"{LARGE_RECALL} or more",
                                 source=f"a difference that chance makes with p < {SMALL_P} (Fisher's exact test)"))
    lost = {s.case: 0.0 for s, _ in missed}
    for sample, _ in missed:
        lost[sample.case] += 1
    return Finding(symptom="small_objects_missed", target=target, evidence=tuple(evidence),
                   cases=_worst([(s, lost[s.case]) for s in cases]))


def _recall(objects: Sequence[TrueObject]) -> float:
    return sum(o.found for o in objects) / len(objects)


def _size_limit(objects: Sequence[TrueObject], dims: int) -> int | None:
    """The size in voxels up to which most objects are missed and above which most are found; None where there is none."""
    from scipy.stats import hypergeom

    best: tuple[float, int] | None = None
    for limit in sorted({o.voxels for o in objects}):
        below, above = [o for o in objects if o.voxels <= limit], [o for o in objects if o.voxels > limit]
        if min(len(below), len(above)) < SMALL_MISSED or _recall(below) > SMALL_RECALL or _recall(above) < LARGE_RECALL:
            continue
        found = sum(o.found for o in below)
        p = float(hypergeom.cdf(found, len(objects), sum(o.found for o in objects), len(below)))
        gap = _recall(above) - _recall(below)
        if p < SMALL_P and (best is None or gap > best[0]):
            best = (gap, limit)
    if best is not None:
        return best[1]
    largest = max(o.voxels for o in objects)
    return largest if largest <= SMALL_EDGE ** dims and _recall(objects) <= SMALL_RECALL else None


def _shift(rows: Sequence[Row], target: str, explained: Sequence[Kind]) -> Finding | None:
    """Too little or too much, by the boundary's mean shift or by sensitivity against precision."""
    def towards(sign: int) -> list[tuple[Sample, TargetSymptoms]]:
        flagged = []
        for sample, t in rows:
            bias, balance = (t.bias_voxels or 0.0) * sign, (t.balance or 0.0) * sign
            low, high = t.sensitivity(explained), t.precision(explained)
            low, high = (low, high) if sign < 0 else (high, low)
            nothing = sign < 0 and low is not None and not low and high is None
            if (bias >= SHIFT_VOXELS and balance >= ONE_SIDED) or nothing or (
                    low is not None and high is not None and low < LOW and high >= HIGH):
                flagged.append((sample, t))
        return flagged

    for sign in (-1, 1):
        flagged = towards(sign)
        if _common([s for s, _ in flagged], [s for s, _ in rows], MOST):
            return _shifted(rows, target, explained, sign, flagged)
    return None


def _shifted(rows: Sequence[Row], target: str, explained: Sequence[Kind], sign: int, flagged: Sequence[Row]) -> Finding:
    evidence = [
        Evidence(quantity=name, value=value, rule=rule, source=source) for name, value, rule, source in (
            ("mean shift of the boundary outward in voxels, median", _median(t.bias_voxels for _, t in rows),
             f"{'below -' if sign < 0 else 'above '}{SHIFT_VOXELS}, {HABIT}", ROUNDING),
            ("sensitivity, median", _median(t.sensitivity(explained) for _, t in rows),
             f"too little if below {LOW} at a precision of {HIGH}", "the usual reading of a lopsided pair"),
            ("precision, median", _median(t.precision(explained) for _, t in rows),
             f"too much if below {LOW} at a sensitivity of {HIGH}", "the usual reading of a lopsided pair"),
            ("share of cases that show it", len(flagged) / len(rows), f"{MOST} or more", "a habit shows in most cases"),
        ) if value is not None
    ]
    bad = [(s, 1 - (t.dice(explained) or 0.0)) for s, t in flagged]
    return Finding(symptom="over_predicted_background" if sign < 0 else "over_predicted_foreground", target=target,
                   evidence=tuple(evidence), cases=_worst(bad))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _blur(rows: Sequence[Row], target: str) -> Finding | None:
    flagged = [(s, 1 - t.nsd) for s, t in rows if t.nsd is not None and t.nsd < NSD_LEAST]
    near, balance = _median(t.near for _, t in rows), _median(t.balance for _, t in rows)
    if near is None or balance is None or near < NEAR_LEAST or abs(balance) >= ONE_SIDED:
        return None
    if not _common([s for s, _ in flagged], [s for s, _ in rows], MOST):
        return None
    evidence = [
        Evidence(quantity=name, value=value, rule=rule, source=source) for name, value, rule, source in (
            ("surface Dice at one voxel, median", _median(t.nsd for _, t in rows), f"below {NSD_LEAST}, {HABIT}", GRID),
            (f"share of errors within {NEAR_VOXELS:g} voxels of the true edge, median", near, f"{NEAR_LEAST} or more",
             "errors farther away are no matter of precision"),
            ("HD95 in voxels, median", _median(t.hd95_voxels for _, t in rows), "shown for comparison", ""),
            ("Dice, median", _median(t.dice() for _, t in rows), "shown for comparison", ""),
        ) if value is not None
    ]
    return Finding(symptom="blurred_boundary", target=target, evidence=tuple(evidence), cases=_worst(flagged))
