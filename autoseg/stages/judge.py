"""Judge predictions without a reference: by trust.json, how good a mask is likely to be, and in what its case is unusual."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.unusual import combined, describe_image, describe_mask, unusual
from autoseg.files.preprocessed import digest
from autoseg.files.workspace import Workspace, load_record
from autoseg.logs import Reporter
from autoseg.types.case import Image, Placement
from autoseg.types.geometry import NO_DEPTH_MM, Vector
from autoseg.types.selection import Selection
from autoseg.types.trust import CaseNumbers, Trust

if TYPE_CHECKING:
    from autoseg.arrays.quality import Features
    from autoseg.inference import Member, Model
    from autoseg.inference.gauge import Gauge

FILE = "trust.json"


def trust_path(workspace: Workspace) -> Path:
    """Where the Trust record lies."""
    return workspace.root / FILE


def find_judge(
    workspace: Workspace, selection: Selection, networks: Mapping[str, str], mirror: bool, reporter: Reporter,
) -> Judge | None:
    """The judge of masks made by these networks (hashes by run and fold); None without trust.json, or when it is of others.

    Raises RecordError when trust.json is damaged.
    """
    path = trust_path(workspace)
    if not path.exists():
        return None
    trust = load_record(path, Trust)
    same = (trust.runs, trust.weights) == (selection.runs, selection.run_weights)
    if not same or any(trust.networks.get(name) != found for name, found in networks.items()):
        reporter.warn(f"{path} is about other runs or networks and is not used; make it anew: autoseg select {workspace.root}")
        return None
    return Judge(trust, mirror)


@dataclass(frozen=True)
class Judge:
    """What predictions are judged by; `mirror` says whether they average over mirrored copies."""

    trust: Trust
    mirror: bool = True

    @property
    def key(self) -> str:
        """Stands for everything that the judgement depends on."""
        return digest(self.trust.inputs)

    @property
    def temperatures(self) -> dict[str, float]:
        """The temperature of each run."""
        return {run: calibration.temperature for run, calibration in self.trust.calibration.items()}

    def look(self, model: Model, image: Image) -> CaseNumbers:
        """What an image is like."""
        return describe_image(image, model.members[0].plan, model.members[0].configuration)

    def columns(
        self, model: Model, placements: Sequence[Placement], gauges: Sequence[Gauge], label_zyx: NDArray[np.integer],
        image: CaseNumbers,
    ) -> dict[str, str]:
        """Columns of summary.csv, empty where nothing can be told.

        `quality` (likely foreground mean Dice) with the bounds of its interval, `quality_<structure>`, `unusual` in words, and
        `entropy`: bits per voxel of the structures found, as single networks say.
        """
        from autoseg.arrays.quality import estimate_quality, mean_entropy

        features = prediction_features(model, placements, gauges)
        row = dict.fromkeys(["quality", "quality_low", "quality_high"], "")
        comparable = self._comparable(model)
        if self.trust.quality_mean is not None and comparable:
            found = estimate_quality(self.trust.quality_mean, features)
            row |= zip(row, (f"{value:.3f}" for value in found), strict=True) if found else {}
        for name, regression in self.trust.quality.items():
            found = estimate_quality(regression, features, name) if comparable else None
            row[f"quality_{name}"] = f"{found[0]:.3f}" if found else ""
        case = combined(image, describe_mask(label_zyx, placements[0].stored, model.labels))
        entropy = mean_entropy(features)
        row["unusual"] = "; ".join(unusual(case, self.trust.training))
        row["entropy"] = "" if entropy is None else f"{entropy:.4f}"
        return row

    def _comparable(self, model: Model) -> bool:
        """Whether predictions are mirrored as those were that the estimate was fitted on."""
        return self.mirror == self.trust.mirror or not any(member.mirror_axes for member in model.members)


def prediction_features(model: Model, placements: Sequence[Placement], gauges: Sequence[Gauge]) -> dict[str, Features | None]:
    """Features of a prediction by structure, from what its members are judged by; members of an ensemble are averaged."""
    from autoseg.arrays.quality import weighted

    members = list(zip(model.members, placements, gauges, strict=True))
    each = [_member_features(model, member, placement, one) for member, placement, one in members]
    shares = [member.weight for member in model.members]
    return {name: weighted([one[name] for one in each], shares) for name, _ in model.labels.targets}


def _member_features(model: Model, member: Member, placement: Placement, gauge: Gauge) -> dict[str, Features | None]:
    """Features of one member's prediction, on its own grid."""
    from autoseg.arrays.quality import target_features

    labels, beliefs = model.labels, gauge.beliefs
    assert beliefs is not None, "the prediction was not made to be judged"
    entropy, disagreement = (gauge.maps[i].numpy() for i in (0, 1))
    voxel_ml = _voxel_ml(placement)
    found: dict[str, Features | None] = {}
    for index, (name, _) in enumerate(labels.targets):
        place = index if labels.regions else index + 1
        mask: NDArray[np.bool_] = beliefs.decision[place] > 0 if labels.regions else beliefs.decision == place
        sums = (float(beliefs.everywhere[place]), float(beliefs.own[place]))
        flat = member.configuration.dims == 2
        found[name] = target_features(mask, entropy, disagreement, sums, voxel_ml, _spacing(placement), flat)
    return found


def _spacing(placement: Placement) -> Vector:
    """Spacing of the preprocessed grid in mm; slices of a picture count as 1 mm."""
    z, y, x = placement.spacing_zyx_mm
    return (z if z < NO_DEPTH_MM else 1.0, y if y < NO_DEPTH_MM else 1.0, x if x < NO_DEPTH_MM else 1.0)


def _voxel_ml(placement: Placement) -> float:
    """Volume of a voxel of the preprocessed grid: the image's voxels share the volume that they had."""
    return placement.stored.voxel_volume_ml * math.prod(placement.cropped_shape) / math.prod(placement.shape)

