"""Medical Segmentation Decathlon folders: dataset.json lists {image, label} pairs; 4D files hold the channels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoseg.datasets.description import describe_data
from autoseg.datasets.naming import Listing, bad_name, missing_image, missing_label, stem
from autoseg.types.dataset import CaseFiles, Fault
from autoseg.types.faults import fault


def is_msd(root: Path, data: Mapping[str, Any]) -> bool:
    """Whether `data`, from dataset.json in `root`, lists training pairs that are there under the listed names.

    Folders converted for the first nnU-Net list CASE.nii.gz but hold CASE_0000.nii.gz; those are not meant.
    """
    training = data.get("training")
    if not isinstance(training, list):
        return False
    pairs = [pair for pair in training if isinstance(pair, Mapping) and isinstance(pair.get("image"), str)]
    if any((root / pair["image"]).is_file() for pair in pairs):
        return True
    return not any((root / "imagesTr").glob("*_0000.*"))


def read_msd(root: Path, data: Mapping[str, Any]) -> Listing:
    """List the training pairs; hidden entries ("._name", left by macOS) are passed over, missing files are faults."""
    source = root / "dataset.json"
    description, faults = describe_data(data, source)
    cases: dict[str, CaseFiles] = {}
    for number, pair in enumerate(data["training"]):
        if not isinstance(pair, Mapping) or not all(isinstance(pair.get(key), str) for key in ("image", "label")):
            faults.append(fault("invalid-description", "", source, "an object with image and label",
                                f"training[{number}]: {str(pair)[:80]}"))
            continue
        image, label = root / pair["image"], root / pair["label"]
        if image.name.startswith("."):
            continue
        case = stem(image)
        if case in cases:
            faults.append(fault("colliding-case-names", case, image, f"one entry for case {case}",
                                f"a second one at training[{number}]"))
            continue
        cases[case], more = listed_case(case, (image,), label)
        faults += more
    name = description.name or root.name or "dataset"
    return Listing("msd", root, name, description, tuple(cases[c] for c in sorted(cases)), tuple(faults))


def listed_case(case: str, images: tuple[Path, ...], label: Path | None) -> tuple[CaseFiles, list[Fault]]:
    """A case from explicitly listed files; only existing files stay in it, the others are faults."""
    faults = []
    for image in images:
        if not image.is_file():
            faults.append(missing_image(case, str(image), f"the listed image {image}"))
    if label is not None and not label.is_file():
        faults.append(missing_label(case, str(label), f"the listed label {label}"))
    faults += bad_name(case, images[0] if images else "")
    held = tuple(str(image) for image in images if image.is_file())
    return CaseFiles(case=case, images=held, label=str(label) if label is not None and label.is_file() else None), faults
