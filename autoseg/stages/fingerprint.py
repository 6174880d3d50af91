"""Measure a data set: geometry, intensities and what is present of each label."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.crop import Bounds, box_slices, nonzero_bounds, nonzero_mask
from autoseg.errors import AutosegError, DatasetError
from autoseg.files.images import read_case, read_header, read_label
from autoseg.files.machine import cores, for_each
from autoseg.files.preprocessed import content_hash
from autoseg.logs import SILENT, Reporter
from autoseg.types.case import Image
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities, LabelFingerprint
from autoseg.types.geometry import Grid
from autoseg.types.labels import Labels

CASE_ERRORS = (AutosegError, ValueError, OSError, MemoryError)

SAMPLE_SIZE = 2_000_000  # foreground voxels per channel for the whole data set
_AIR_HU, _LOWEST_HU = -900.0, -5000.0  # a CT reaches air; scanners pad with values down to about -4000
_SOFT_TISSUE_HU, _SOFT_TISSUE_SHARE = (-150.0, 250.0), 0.02
_KIND_SHARE = 0.9  # share of cases that must look like CT (or a colour picture) for a channel to be called that
_LOOKED_AT = 200_000  # voxels looked at to recognise a CT


@dataclass(frozen=True)
class _Measured:
    """What one case gives: its record, a sample of its foreground (channels, n), and per channel what it looks like."""

    record: CaseFingerprint
    sample: NDArray[np.float32]
    kinds: tuple[str, ...]


def load_case(case: CaseFiles, labels: Labels) -> tuple[Image, NDArray[np.int16] | None]:
    """Read a case: its image (short integers as stored, else float32) and its label map as inside indices (int16, z y x).

    The label map is None without a label file.

    Raises AutosegError for files that cannot be read, ValueError for undeclared label values or a label of another shape.
    """
    image = read_case([Path(path) for path in case.images], as_stored=True)
    if case.label is None:
        return image, None
    stored, _ = read_label(Path(case.label))
    if stored.shape != image.grid.shape:
        raise ValueError(f"the label has shape {stored.shape}, its image {image.grid.shape}")
    label = np.empty(stored.shape, np.int16)
    for index, plane in enumerate(stored):  # plane by plane: looking values up takes four times the memory of the result
        label[index] = labels.encode(plane)
    return image, label


def case_files(case: CaseFiles) -> list[Path]:
    """Return all files of a case, images first."""
    return [Path(path) for path in (*case.images, *([case.label] if case.label else []))]


def failed_cases(failures: Sequence[tuple[CaseFiles, Exception]], total: int, verb: str) -> DatasetError:
    """Return the error that lists every case that failed, its files and why."""
    lines = sorted(f"{case.case} ({', '.join(map(str, case_files(case)))}): {str(error) or type(error).__name__}"
                   for case, error in failures)
    return DatasetError(f"{len(failures)} of {total} cases could not be {verb}:\n  " + "\n  ".join(lines)
                        + "\ncorrect these files or remove the cases, then run it again")


def _case_bytes(case: CaseFiles) -> int:
    headers = [read_header(Path(path)) for path in case.images]
    voxels = max(math.prod(header.grid.shape) for header in headers)
    return voxels * (4 * sum(header.channels for header in headers) + 24)


def _kind(channel: NDArray[Any], image: Image) -> str:
    """Return "CT", "RGB" or "" by what a channel looks like."""
    colours = len(image.array_czyx) == 3 and not image.grid.has_direction
    low, high = float(channel.min()), float(channel.max())
    flat = channel.reshape(-1)
    some = flat[::max(1, flat.size // _LOOKED_AT)]
    if colours and low >= 0 and 1 < high <= 255 and bool((some == np.rint(some)).all()):
        return "RGB"
    tissue = np.mean((some >= _SOFT_TISSUE_HU[0]) & (some <= _SOFT_TISSUE_HU[1]))
    if _LOWEST_HU <= low <= _AIR_HU and tissue >= _SOFT_TISSUE_SHARE:
        return "CT"
    return ""


def _label_statistics(
    image_czyx: NDArray[Any], label_zyx: NDArray[np.int16], box: Bounds, grid: Grid, labels: Labels,
    where: NDArray[np.intp],
) -> dict[str, LabelFingerprint]:
    """Return volume, place, components and intensities of each foreground label that is present.

    Image and label are the `box` of an image on `grid`; `where` are the flat positions of foreground in the box.
    """
    import cc3d

    count = len(labels.foreground) + 1
    values = label_zyx.reshape(-1)[where]
    voxels = np.bincount(values, minlength=count)
    parts = cc3d.connected_components(label_zyx, connectivity=26).reshape(-1)[where]
    label_of_part = np.zeros(int(parts.max(initial=0)) + 1, np.int64)
    label_of_part[parts] = values
    components = np.bincount(label_of_part[1:], minlength=count)
    start = np.array([low for low, _ in box])
    centres = (cc3d.statistics(label_zyx.view(np.uint16))["centroids"] + start + 0.5) / grid.shape
    means, deviations = [], []
    for channel in image_czyx:
        intensities = channel.reshape(-1)[where].astype(np.float64)
        mean = np.bincount(values, intensities, minlength=count) / np.maximum(voxels, 1)
        square = np.bincount(values, (intensities - mean[values]) ** 2, minlength=count) / np.maximum(voxels, 1)
        means.append(mean)
        deviations.append(np.sqrt(square))
    return {
        label.name: LabelFingerprint(
            voxels=int(voxels[i]), volume_ml=float(voxels[i] * grid.voxel_volume_ml), components=int(components[i]),
            mean_intensity=tuple(float(m[i]) for m in means), std_intensity=tuple(float(d[i]) for d in deviations),
            centre=(float(centres[i][0]), float(centres[i][1]), float(centres[i][2])),
        )
        for i, label in enumerate(labels.foreground, start=1) if voxels[i]
    }


def _measure(case: CaseFiles, dataset: Dataset, sample_size: int) -> _Measured:
    image, label = load_case(case, dataset.labels)
    if len(image.array_czyx) != len(dataset.channels):
        names = ", ".join(dataset.channels)
        raise ValueError(f"expected {len(dataset.channels)} channel(s) ({names}), found {len(image.array_czyx)}")
    array: NDArray[Any] = image.array_czyx
    axis_map = image.grid.to_lps()
    grid = image.grid.mapped(axis_map)
    kinds = tuple(_kind(channel, image) for channel in array)
    oriented = axis_map.apply(array)
    box = nonzero_bounds(nonzero_mask(oriented))
    cropped = np.ascontiguousarray(oriented[(slice(None), *box_slices(box))])
    _, z, y, x = cropped.shape
    statistics: dict[str, LabelFingerprint] = {}
    sample = np.empty((len(array), 0), np.float32)
    if label is not None:
        inside = np.ascontiguousarray(axis_map.apply(label)[box_slices(box)])
        if dataset.labels.ignore_index is not None:
            inside[inside == dataset.labels.ignore_index] = 0
        where = np.flatnonzero(inside)
        if where.size:
            statistics = _label_statistics(cropped, inside, box, grid, dataset.labels, where)
            seed = int.from_bytes(hashlib.blake2b(case.case.encode(), digest_size=8).digest(), "little")
            drawn = where[np.random.default_rng(seed).integers(0, len(where), sample_size)]
            sample = cropped.reshape(len(array), -1)[:, drawn].astype(np.float32)
    record = CaseFingerprint(
        case=case.case, shape=grid.shape, shape_after_crop=(z, y, x), spacing=grid.spacing,
        relative_size_after_crop=z * y * x / math.prod(grid.shape), labels=statistics, content=content_hash(case_files(case)),
    )
    return _Measured(record, sample, kinds)


def _intensities(values: NDArray[np.float32]) -> Intensities:
    low, middle, high = np.percentile(values, (0.5, 50.0, 99.5))
    return Intensities(
        mean=float(values.mean(dtype=np.float64)), median=float(middle), std=float(values.std(dtype=np.float64)),
        min=float(values.min()), max=float(values.max()), percentile_99_5=float(high), percentile_00_5=float(low),
    )


def fingerprint(dataset: Dataset, threads: int | None = None, reporter: Reporter = SILENT) -> Fingerprint:
    """Measure every case, brought to LPS and cropped to nonzero (nnU-Net), in `threads` threads (all cores by default).

    Foreground is every label but the ignore label. Each case gives equally many foreground voxels, drawn with replacement by a
    generator seeded with its name, to a sample of fixed size for the global statistics; so neither the order nor the number of
    threads matters, and memory stays bounded. Raises DatasetError that lists every case that cannot be measured.
    """
    share = max(1, SAMPLE_SIZE // max(1, len(dataset.cases)))
    done: dict[str, _Measured] = {}
    failures: list[tuple[CaseFiles, Exception]] = []
    with reporter.task("fingerprint", len(dataset.cases)) as task:
        for case, result in for_each(dataset.cases, lambda case: _measure(case, dataset, share),
                                     cores() if threads is None else threads, _case_bytes, CASE_ERRORS):
            if isinstance(result, Exception):
                failures.append((case, result))
            else:
                done[case.case] = result
            task.advance(note=case.case)
    if failures:
        raise failed_cases(failures, len(dataset.cases), "measured")
    measured = [done[case.case] for case in dataset.cases]
    pooled = [np.concatenate([m.sample[c] for m in measured]) for c in range(len(dataset.channels))] if measured else []
    if not pooled or not pooled[0].size:
        raise DatasetError(f"no case of {dataset.root} holds a voxel of a foreground label; check the label files")
    kinds = []
    for c in range(len(dataset.channels)):
        votes = {kind: sum(m.kinds[c] == kind for m in measured) for kind in ("CT", "RGB")}
        kinds.append(next((kind for kind, count in votes.items() if count >= _KIND_SHARE * len(measured)), ""))
    return Fingerprint(
        cases=tuple(m.record for m in measured), intensities=tuple(_intensities(values) for values in pooled),
        median_relative_size_after_cropping=float(np.median([m.record.relative_size_after_crop for m in measured])),
        channel_kinds=tuple(kinds),
    )
