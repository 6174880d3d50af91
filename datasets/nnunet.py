"""nnU-Net's own files: the raw data set folder, dataset.json and dataset_fingerprint.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoseg.datasets.description import channel_names, describe_data, load_json, parse_labels
from autoseg.datasets.folder import find_pair, read_folder
from autoseg.datasets.msd import listed_case
from autoseg.datasets.naming import Listing
from autoseg.errors import DatasetError
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.faults import fault
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities


def is_nnunet(root: Path, data: Mapping[str, Any]) -> bool:
    """Whether `data`, from dataset.json in `root`, describes an nnU-Net raw folder."""
    return isinstance(data.get("dataset"), Mapping) or (root / "imagesTr").is_dir()


def read_nnunet(root: Path, data: Mapping[str, Any]) -> Listing:
    """List an nnU-Net raw folder: imagesTr and labelsTr, or the files that the `dataset` entry names, relative to `root`.

    Raises DatasetError when there is neither.
    """
    listed = data.get("dataset")
    if not isinstance(listed, Mapping):
        pair = find_pair(root)
        if pair is None:
            raise DatasetError(f"{root}: expected the folders imagesTr and labelsTr beside dataset.json, "
                               f"found {', '.join(sorted(p.name for p in root.iterdir() if p.is_dir())) or 'no folder'}")
        return read_folder(root, *pair, source="nnunet")
    source = root / "dataset.json"
    description, faults = describe_data(data, source)
    cases = []
    for case, entry in sorted(listed.items()):
        images = entry.get("images") if isinstance(entry, Mapping) else None
        label = entry.get("label") if isinstance(entry, Mapping) else None
        listable = isinstance(images, list) and images and all(isinstance(i, str) for i in images)
        if not isinstance(images, list) or not listable or not isinstance(label, str):
            faults.append(fault("invalid-description", case, source, "an object with images (a list) and label",
                                f"dataset.{case}: {str(entry)[:80]}"))
            continue
        files, more = listed_case(case, tuple(root / image for image in images), root / label)
        cases.append(files)
        faults += more
    return Listing("nnunet", root, description.name or root.name or "dataset", description, tuple(cases), tuple(faults))


def read_fingerprint(dataset_json: Path | str, dataset_fingerprint_json: Path | str) -> tuple[Dataset, Fingerprint]:
    """Read nnU-Net's dataset.json and dataset_fingerprint.json, enough to plan without the images.

    Spacings and cropped shapes are z, y, x in file order. nnU-Net does not store which case a row belongs to, so cases are
    named as in the `dataset` entry, in its order, when it has as many, else case_0000, case_0001, ...; they have no files.
    Raises DatasetError with the file and the path inside it.
    """
    described, measured = Path(dataset_json), Path(dataset_fingerprint_json)
    data, values = load_json(described), load_json(measured)
    if not isinstance(data, Mapping):
        raise DatasetError(f"{described}: expected an object, found {type(data).__name__}")
    if not isinstance(values, Mapping):
        raise DatasetError(f"{measured}: expected an object, found {type(values).__name__}")
    try:
        channels = channel_names(_entry(data, "channel_names", "modality"))
        labels = parse_labels(_entry(data, "labels"), data.get("regions_class_order"))
        listed = data.get("dataset")
        names = [str(key) for key in listed] if isinstance(listed, Mapping) else []
    except DatasetError as error:
        raise DatasetError(f"{described}: {error}") from None
    try:
        fingerprint = _fingerprint(values, len(channels), names)
    except DatasetError as error:
        raise DatasetError(f"{measured}: {error}") from None
    name, cases = data.get("name"), [case.case for case in fingerprint.cases]
    declared = data.get("numTraining")
    if isinstance(declared, int) and 0 < declared != len(cases):  # nnU-Net plans with this number of cases, whatever was measured
        cases = [f"case_{i:04d}" for i in range(declared)]
    dataset = Dataset(
        name=name if isinstance(name, str) and name else described.absolute().parent.name or "dataset", source="fingerprint",
        root=str(described.absolute().parent), channels=channels, labels=labels,
        cases=tuple(CaseFiles(case=case, images=()) for case in cases),
    )
    return dataset, fingerprint


def _entry(data: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        if key in data:
            return data[key]
    raise DatasetError(f"{keys[0]} is missing")


def _fingerprint(values: Mapping[str, Any], channels: int, names: list[str]) -> Fingerprint:
    spacings = [_triple(row, f"spacings[{i}]") for i, row in enumerate(_rows(values, "spacings"))]
    shapes = [_triple(row, f"shapes_after_crop[{i}]") for i, row in enumerate(_rows(values, "shapes_after_crop"))]
    if len(spacings) != len(shapes):
        raise DatasetError(f"shapes_after_crop: expected {len(spacings)} entries like spacings, found {len(shapes)}")
    for i, shape in enumerate(shapes):
        if any(not size.is_integer() for size in shape):
            raise DatasetError(f"shapes_after_crop[{i}]: expected whole numbers, found {list(shape)}")
    pooled = _entry(values, "foreground_intensity_properties_per_channel")
    relative = _number(values.get("median_relative_size_after_cropping", 1.0), "median_relative_size_after_cropping")
    if not isinstance(pooled, Mapping) or sorted(map(str, pooled)) != sorted(map(str, range(channels))):
        found = ", ".join(map(str, pooled)) if isinstance(pooled, Mapping) else str(pooled)[:80]
        raise DatasetError("foreground_intensity_properties_per_channel: "
                           f"expected the keys {', '.join(map(str, range(channels)))}, one per channel, found {found}")
    if len(names) != len(spacings):
        names = [f"case_{i:04d}" for i in range(len(spacings))]
    cases = []
    for name, spacing, size in zip(names, spacings, shapes, strict=True):
        shape = (int(size[0]), int(size[1]), int(size[2]))
        cases.append(CaseFingerprint(case=name, shape=shape, shape_after_crop=shape, spacing=spacing,
                                     relative_size_after_crop=relative))
    return Fingerprint(
        cases=tuple(cases), median_relative_size_after_cropping=relative,
        intensities=tuple(_intensities(pooled[str(i)], f"foreground_intensity_properties_per_channel.{i}")
                          for i in range(channels)),
    )


def _rows(values: Mapping[str, Any], key: str) -> list[Any]:
    rows = _entry(values, key)
    if not isinstance(rows, list) or not rows:
        raise DatasetError(f"{key}: expected a list with one entry per case, found {str(rows)[:80]}")
    return rows


def _triple(row: Any, where: str) -> tuple[float, float, float]:
    if not isinstance(row, list) or len(row) != 3:
        raise DatasetError(f"{where}: expected three numbers (z, y, x), found {str(row)[:80]}")
    z, y, x = (_number(value, where) for value in row)
    if min(z, y, x) <= 0:
        raise DatasetError(f"{where}: expected positive numbers, found {row}")
    return (z, y, x)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DatasetError(f"{where}: expected a finite number, found {str(value)[:80]}")
    return float(value)


def _intensities(value: Any, where: str) -> Intensities:
    if not isinstance(value, Mapping):
        raise DatasetError(f"{where}: expected an object, found {str(value)[:80]}")
    fields = Intensities.model_fields
    missing = [name for name in fields if name not in value]
    if missing:
        raise DatasetError(f"{where}.{missing[0]} is missing")
    return Intensities(**{name: _number(value[name], f"{where}.{name}") for name in fields})
