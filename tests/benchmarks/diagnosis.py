"""Which symptoms are named for which planted cause: prints a confusion table.

    python tests/benchmarks/diagnosis.py [--repeats 5] [--first 0] [--cases 20] [--size 0.7] [--hippocampus DATA]

Masks are made from phantoms (left and right lung, heart, spine, lesions of many sizes) or real hippocampus labels: first every
boundary is moved by smooth noise of half a voxel, as a good network would, then one cause is planted. Learning curves are made
from formulas. A cell counts the repeats (other cases, other noise) in which a symptom was named for any label.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from autoseg.arrays.symptoms import measure_symptoms
from autoseg.datasets.phantom import make_case
from autoseg.stages.curve_rules import curve_findings
from autoseg.stages.diagnose import judge
from autoseg.stages.symptom_rules import Sample
from autoseg.types.diagnosis import SYMPTOMS, Symptom
from autoseg.types.run import EpochRecord

LUNG_LEFT, LUNG_RIGHT, HEART, SPINE, LESION = 1, 2, 3, 4, 5
CHEST = (("lung_left", (1,)), ("lung_right", (2,)), ("heart", (3,)), ("spine", (4,)), ("lesion", (5,)))
CHEST_PAIRS = ((CHEST[0], CHEST[1]),)
HIPPOCAMPUS = (("Anterior", (1,)), ("Posterior", (2,)))
FOLDS = 5
SMALL = 40  # voxels of a lesion below which the planted network finds none


@dataclass(frozen=True)
class Truth:
    """A reference label map (z, y, x) in LPS with its spacing in mm."""

    name: str
    label_zyx: np.ndarray
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class Planted:
    """A planted cause: what it makes of a healthy mask, what must be named, and whether it needs the chest's labels.

    `change(truth, healthy_zyx, index, rng)` returns the changed mask.
    """

    name: str
    expected: tuple[Symptom, ...]
    change: Callable[[Truth, np.ndarray, int, np.random.Generator], np.ndarray]
    chest_only: bool = False


def chest_truth(index: int, size: float = 0.7) -> Truth:
    """A chest phantom with its lungs told apart and lesions of radius 1.7 to 5 voxels."""
    case = make_case("chest", 11, index, size)
    axis_map = case.grid.to_lps()
    stored = np.ascontiguousarray(axis_map.apply(case.label_zyx))
    rng = np.random.default_rng([11, index])
    label = np.zeros_like(stored)
    lungs = (stored == 1) | (stored == 4)
    middle = int(np.argwhere(stored == 3)[:, 2].mean())
    right = lungs & (np.arange(stored.shape[2]) < middle)  # LPS: x runs to the left, so the right lung comes first
    label[lungs], label[right], label[stored == 2], label[stored == 3] = LUNG_LEFT, LUNG_RIGHT, HEART, SPINE
    room = np.argwhere(ndimage.binary_erosion(lungs, iterations=2))
    for radius in rng.uniform(1.7, 5, 7):
        centre = room[rng.integers(len(room))]
        grid = np.ogrid[tuple(slice(0, n) for n in label.shape)]
        label[(sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2) & lungs] = LESION
    return Truth(case.name, label, case.grid.mapped(axis_map).spacing)


def hippocampus_truths(folder: Path, indices: Sequence[int]) -> list[Truth]:
    """Real labels of the hippocampus (MSD Task04)."""
    from autoseg.files.images import read_label

    truths = []
    paths = sorted((folder / "labels").glob("*.nii.gz"))
    for index in indices:
        label, grid = read_label(paths[index % len(paths)])
        axis_map = grid.to_lps()
        truths.append(Truth(paths[index % len(paths)].name.split(".")[0], axis_map.apply(label).astype(np.uint8),
                            grid.mapped(axis_map).spacing))
    return truths


def warped(truth: Truth, rms_voxels: float, rng: np.random.Generator) -> np.ndarray:
    """The label map with its boundaries moved by a smooth random field; lengths in voxels of the plane."""
    label, voxel_mm = truth.label_zyx, sorted(truth.spacing)[1]
    places = np.indices(label.shape).astype(np.float32)
    smooth = [1.5 * voxel_mm / spacing for spacing in truth.spacing]
    for axis in range(3):
        noise = ndimage.gaussian_filter(rng.standard_normal(label.shape, np.float32), smooth)
        places[axis] += noise / noise.std() * rms_voxels * voxel_mm / truth.spacing[axis]
    return ndimage.map_coordinates(label, places, order=0, mode="nearest")


def eroded(truth, mask, index, rng):
    """Every label loses one voxel of the plane all round."""
    out = mask.copy()
    for value in np.unique(mask[mask > 0]):
        depth = ndimage.distance_transform_edt(mask == value, truth.spacing)
        out[(mask == value) & (depth <= sorted(truth.spacing)[1])] = 0
    return out


def dilated(truth, mask, index, rng):
    """Every label grows by one voxel into the background."""
    grown = ndimage.grey_dilation(mask, footprint=ndimage.generate_binary_structure(3, 1))
    return np.where(mask == 0, grown, mask)


def jittered(truth, mask, index, rng):
    """Boundaries wobble by 1.8 voxels."""
    return warped(truth, 1.8, rng)


def coarse(truth, mask, index, rng):
    """Segmented with voxels five times as large (lesions left as they were)."""
    places = [np.clip(np.arange(n) // 5 * 5 + 2, 0, n - 1) for n in mask.shape]
    blocks = mask[np.ix_(*places)]
    return np.where((mask == LESION) | (blocks == LESION), mask, blocks)


def blobs(truth, mask, index, rng):
    """In every second case a ball of one label far from it, in the background."""
    if index % 2 == 0:
        return mask
    out = mask.copy()
    value = int(rng.choice(np.unique(truth.label_zyx[truth.label_zyx > 0])))
    room = np.argwhere((truth.label_zyx == 0) & (ndimage.distance_transform_edt(truth.label_zyx != value) > 10))
    if len(room):
        centre = room[rng.integers(len(room))]
        grid = np.ogrid[tuple(slice(0, n) for n in mask.shape)]
        out[(sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= 3.0**2) & (truth.label_zyx == 0)] = value
    return out


def small_dropped(truth, mask, index, rng):
    """Lesions below a size are not found."""
    parts, count = ndimage.label(truth.label_zyx == LESION, np.ones((3, 3, 3)))
    sizes = np.bincount(parts.reshape(-1), minlength=count + 1)
    small = ndimage.binary_dilation((sizes < SMALL)[parts] & (parts > 0), iterations=2) & (mask == LESION)
    large = ndimage.binary_dilation((sizes >= SMALL)[parts] & (parts > 0))
    return np.where(small & ~large, np.where(np.arange(mask.shape[2]) < mask.shape[2] // 2, LUNG_RIGHT, LUNG_LEFT), mask)


def label_lost(truth, mask, index, rng):
    """The heart is found only as a small core."""
    core = ndimage.distance_transform_edt(truth.label_zyx == HEART)
    return np.where((mask == HEART) & (core < 0.45 * core.max()), 0, mask)


def mirrored(truth, mask, index, rng):
    """Patches of the two lungs carry the other's name, as after training with mirrored patches."""
    noise = ndimage.gaussian_filter(rng.standard_normal(mask.shape), 4)
    wrong = noise > np.quantile(noise, 0.75)
    return _exchanged(mask, wrong)


def sides_swapped(truth, mask, index, rng):
    """In every third case left and right are exchanged altogether."""
    return _exchanged(mask, np.ones(mask.shape, bool)) if index % 3 == 0 else mask


def _exchanged(mask, where):
    out = mask.copy()
    out[where & (mask == LUNG_LEFT)] = LUNG_RIGHT
    out[where & (mask == LUNG_RIGHT)] = LUNG_LEFT
    return out


def slices_jump(truth, mask, index, rng):
    """One slice in six is moved by three voxels along both axes, or left out."""
    out = mask.copy()
    for z in np.flatnonzero(rng.random(len(mask)) < 1 / 6):
        out[z] = 0 if rng.random() < 0.4 else ndimage.shift(mask[z], rng.choice([-3, 3], 2), order=0)
    return out


def bad_fold(truth, mask, index, rng):
    """Fold 2 has a failed network."""
    return _failed(truth, mask, rng) if index % FOLDS == 2 else mask


def shifted_site(truth, mask, index, rng):
    """Masks of site B are much worse."""
    return _failed(truth, mask, rng) if site_of(index) == "B" else mask


def _failed(truth, mask, rng):
    moved = np.roll(warped(truth, 2.0, rng), rng.choice([-2, 2], 3), (0, 1, 2))
    return np.where(ndimage.gaussian_filter(rng.standard_normal(mask.shape), 2) > 0.08, 0, moved)


def one_turned(truth, mask, index, rng):
    """One case was stored upside down."""
    return np.ascontiguousarray(mask[::-1]) if index == 4 else mask


def one_moved(truth, mask, index, rng):
    """One case lies six voxels off."""
    return np.roll(mask, (6, 6), (1, 2)) if index == 4 else mask


def healthy(truth, mask, index, rng):
    """Nothing is wrong."""
    return mask


PLANTED = (
    Planted("healthy", (), healthy),
    Planted("eroded labels", ("over_predicted_background",), eroded),
    Planted("a label mostly lost", ("over_predicted_background",), label_lost, True),
    Planted("dilated labels", ("over_predicted_foreground",), dilated),
    Planted("jittered boundary", ("blurred_boundary",), jittered),
    Planted("coarse voxels", ("blurred_boundary",), coarse, True),
    Planted("distant blobs", ("far_false_positives",), blobs, True),
    Planted("small lesions dropped", ("small_objects_missed",), small_dropped, True),
    Planted("mirrored training", ("left_right_swap",), mirrored, True),
    Planted("swapped sides", ("left_right_swap",), sides_swapped, True),
    Planted("slice jumps", ("slice_jumps",), slices_jump, True),
    Planted("one bad fold", ("bad_fold",), bad_fold),
    Planted("a shifted site", ("shifted_group",), shifted_site),
    Planted("one case turned", ("outlier_cases",), one_turned),
    Planted("one case moved", ("outlier_cases",), one_moved),
)


def site_of(index: int) -> str:
    """Sites run across folds: site B has two of five cases, in every fold."""
    return "B" if (index // FOLDS + index) % 5 < 2 else "A"


def sample(truth: Truth, mask: np.ndarray, index: int, targets, pairs) -> Sample:
    """One measured case with its fold and site."""
    found = measure_symptoms(truth.label_zyx, mask, truth.spacing, targets, pairs, slice_axis=0)
    return Sample(f"case{index:03d}", found, index % FOLDS, {"site": site_of(index)})


def healthy_samples(truths: Sequence[Truth], seed: int, targets=CHEST, pairs=CHEST_PAIRS) -> list[tuple[np.ndarray, Sample]]:
    """What a good network would have made of every case, and its measured errors."""
    masks = [warped(truth, 0.5, np.random.default_rng([seed, index, 77])) for index, truth in enumerate(truths)]
    return [(mask, sample(truths[i], mask, i, targets, pairs)) for i, mask in enumerate(masks)]


def planted_samples(
    planted: Planted, truths: Sequence[Truth], start: Sequence[tuple[np.ndarray, Sample]], seed: int, targets=CHEST,
    pairs=CHEST_PAIRS,
) -> list[Sample]:
    """Plant a cause in healthy masks and measure those that it changes."""
    samples = []
    for index, (truth, (mask, before)) in enumerate(zip(truths, start, strict=True)):
        changed = planted.change(truth, mask, index, np.random.default_rng([seed, index, 78]))
        samples.append(before if changed is mask else sample(truth, changed, index, targets, pairs))
    return samples


def named(samples: Sequence[Sample]) -> set[Symptom]:
    """The symptoms that are named."""
    return {finding.symptom for finding in judge(samples)[0]}


def curves(kind: str, rng: np.random.Generator, epochs: int = 100) -> list[EpochRecord]:
    """Learning curves of one fold: healthy, overfit, underfit, flat, or with a loss that is no number."""
    t = np.linspace(0, 1, epochs)
    fall = {"underfit": 0.6 * t, "flat": 0 * t}.get(kind, 1 - np.exp(-8 * t))
    train = 0.4 - 1.2 * fall + 0.01 * rng.standard_normal(epochs)
    val = 0.45 - 1.15 * fall + 0.02 * rng.standard_normal(epochs)
    if kind == "overfit":
        val, train = val + 0.6 * np.clip(t - 0.3, 0, 1), train - 0.2 * t
    if kind == "nan":
        train[70:] = np.nan
    dice = np.clip(fall, 0.01, 0.95)
    return [EpochRecord(epoch=i, step=i, train_loss=float(train[i]), val_loss=float(val[i]), pseudo_dice={"a": float(dice[i])},
                        learning_rate=0.01, seconds=1.0, data_wait=0.0) for i in range(epochs)]


CURVES: dict[str, tuple[str, tuple[Symptom, ...]]] = {
    "healthy curves": ("healthy", ()), "overfit curves": ("overfit", ("overfitting",)),
    "curves still falling": ("underfit", ("underfitting",)), "flat curves": ("flat", ("nothing_learned",)),
    "a loss of NaN": ("nan", ("nothing_learned",)),
}


def named_by_curves(kind: str, seed: int) -> set[Symptom]:
    """The symptoms that three folds of curves show."""
    folds = {fold: curves(kind, np.random.default_rng([seed, fold])) for fold in range(3)}
    return {finding.symptom for finding in curve_findings(folds, list(folds))[0]}


def table(rows: dict[str, tuple[tuple[Symptom, ...], Counter]], repeats: int) -> list[str]:
    """Markdown; a dot is zero, the expected cells are in bold."""
    lines = ["| planted | " + " | ".join(s.replace("_", " ") for s in SYMPTOMS) + " |", "|---" * (len(SYMPTOMS) + 1) + "|"]
    for name, (expected, counts) in rows.items():
        cells = [f"**{counts[s]}/{repeats}**" if s in expected else str(counts[s] or ".") for s in SYMPTOMS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print the table of the chest phantoms, and of the hippocampus where its data is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="number of the first repeat; each has cases of its own")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--size", type=float, default=0.7)
    parser.add_argument("--hippocampus", type=Path)
    options = parser.parse_args()
    begin = time.perf_counter()
    scenes = {"chest phantoms": (CHEST, CHEST_PAIRS, list(PLANTED))}
    if options.hippocampus:
        scenes["hippocampus labels"] = (HIPPOCAMPUS, (), [p for p in PLANTED if not p.chest_only])
    for scene, (targets, pairs, planted) in scenes.items():
        rows: dict[str, tuple[tuple[Symptom, ...], Counter]] = {p.name: (p.expected, Counter()) for p in planted}
        for repeat in range(options.first, options.first + options.repeats):
            indices = range(repeat * options.cases, (repeat + 1) * options.cases)
            truths = ([chest_truth(i, options.size) for i in indices] if targets is CHEST
                      else hippocampus_truths(options.hippocampus, indices))
            start = healthy_samples(truths, repeat, targets, pairs)
            for p in planted:
                rows[p.name][1].update(named(planted_samples(p, truths, start, repeat, targets, pairs)))
        if targets is CHEST:
            for name, (kind, expected) in CURVES.items():
                seeds = range(options.first, options.first + options.repeats)
                rows[name] = (expected, Counter(symptom for seed in seeds for symptom in named_by_curves(kind, seed)))
        print(f"\n{scene}, {options.cases} cases, {options.repeats} repeats\n")
        print("\n".join(table(rows, options.repeats)))
    print(f"\n{time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
