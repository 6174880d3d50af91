"""What is out of the ordinary about a data set, and what the plan does about it: one note for each thing."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint
from autoseg.types.plan import Configuration

FOLDS = 5
LARGEST_SHARE = 0.2  # of all voxels in one batch, above which a step sees the same images over and over
USUAL_SHARE = 0.05  # the default planner's limit
SMALL_COVERAGE = 0.25  # of the median image in a 2D patch
NAMED = 5  # labels that a note lists


def data_oddities(dataset: Dataset, fingerprint: Fingerprint) -> list[str]:
    """Return notes on few cases and rare labels."""
    return [*_few_cases(dataset, fingerprint), *_rare_labels(dataset, fingerprint)]


def size_oddities(configurations: Mapping[str, Configuration], dataset_voxels: float) -> list[str]:
    """Return notes, each beginning with a configuration's name, on images that are tiny or huge and on batches that are huge.

    `dataset_voxels` are those of all cases together at the plan's spacing.
    """
    own = {name: made for name, made in configurations.items() if made.inherits_from is None}
    return [note for name, made in own.items() for note in _sizes(name, made, dataset_voxels)]


def _few_cases(dataset: Dataset, fingerprint: Fingerprint) -> list[str]:
    cases = len(fingerprint.cases)
    groups = len({("group", c.group) if c.group is not None else ("case", c.case) for c in dataset.cases}) or cases
    if cases == 1:
        return ["there is one case, which is trained and validated on: its Dice says nothing about other images"]
    if groups >= FOLDS:
        return []
    what = f"{cases} cases" if groups == cases else f"{cases} cases of {groups} patients"
    return [f"{what} make {groups} folds instead of {FOLDS}, each leaving one out: a Dice over so few is uncertain"]


def _rare_labels(dataset: Dataset, fingerprint: Fingerprint) -> list[str]:
    if not any(case.labels for case in fingerprint.cases):
        return []
    total = len(fingerprint.cases)
    held = {label.name: sum(label.name in case.labels for case in fingerprint.cases) for label in dataset.labels.foreground}
    rare = [f"{name} in {count}" for name, count in held.items() if count < min(FOLDS, total / 2)]
    if not rare:
        return []
    more = f" and {len(rare) - NAMED} more" if len(rare) > NAMED else ""
    return [f"of {total} cases hold {', '.join(rare[:NAMED])}{more}: such labels are learned from little, or from nothing in "
            "folds that validate on the cases that hold them"]


def _sizes(name: str, configuration: Configuration, voxels: float) -> list[str]:
    patch, batch = configuration.patch_size, configuration.batch_size
    notes = []
    if len(configuration.strides) == 2:
        notes.append(f"{name}: the images are so small that the network halves them once only")
    coverage = math.prod(min(edge / size, 1.0) for edge, size in zip(patch, configuration.median_shape, strict=True))
    if configuration.dims == 2 and coverage < SMALL_COVERAGE:
        notes.append(f"{name}: a patch covers {coverage:.0%} of the median image, which is segmented in overlapping tiles")
    share = batch * math.prod(patch) / voxels
    enough = max(2, round(USUAL_SHARE * voxels / math.prod(patch)))
    if share > LARGEST_SHARE and batch > enough:
        notes.append(f"{name}: {batch} patches a batch hold as many voxels as {share:.0%} of all cases together, more than "
                     f"training gains from; it is this planner's rule, train with --set batch_size={enough} for shorter steps")
    return notes
