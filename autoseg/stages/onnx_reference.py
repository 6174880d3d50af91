"""Reference for running exported networks with ONNX Runtime: from images to a mask, every step outside of the networks included.

    python reference.py MASK IMAGE [IMAGE ...]        one image per channel, or one that holds all; the mask lies on their grid

`pipeline.json` beside this file says, for each run, the network files, patch, spacing, normalisation and mirror axes; whoever
writes these steps in another language needs nothing else:

1. Turn the image to `orientation` (LPS, RAS or as_stored), permute its axes by `transpose_forward`, cut away the border of
   zeros, normalise each channel, resample to `spacing` with cubic splines (see autoseg/arrays/preprocess.py).
2. Pad it with zeros, in the middle, to at least `patch`; lay tiles of that size, evenly spread, at most half a patch apart.
3. For each tile run every network (folds) on every mirrored copy, flip back, and take the mean of the logits.
4. Blend tiles by a Gaussian of sigma = patch / 8, peak 1: sum of weighted logits over sum of weights.
5. Interpolate the logits linearly to the image's own grid; softmax and the largest class, or sigmoid above 0.5 for regions, where
   later regions overwrite earlier ones. Several members are averaged as probabilities, by weight (see
   autoseg/arrays/restore/ensemble.py).
6. Post-process, and write the label values of the data set.

Where a run has a `previous` one, that one's labels (resampled to this run's grid) follow the image's channels, one per label.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autoseg.arrays.cascade import labels_on_grid, one_hot
from autoseg.arrays.postprocess import apply_postprocessing, needs_probabilities
from autoseg.arrays.preprocess import preprocess
from autoseg.arrays.restore import restore_ensemble
from autoseg.arrays.tiles import gaussian_weight, make_tiling
from autoseg.files.images import read_case, write_label
from autoseg.types.case import Image, Placement
from autoseg.types.model import ModelRecord

Logits = NDArray[np.float32]


class Pipeline:
    """The exported networks of a folder, with what lies around them."""

    def __init__(self, folder: Path, mirror: bool = True) -> None:
        import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]  # pyright: ignore[reportMissingImports]

        content = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
        self.record = ModelRecord.model_validate(content["model"])
        self.mirror = mirror
        self.sessions: dict[str, list[Any]] = {
            run: [onnxruntime.InferenceSession(str(folder / Path(name).name)) for name in entry["files"]]
            for run, entry in content["networks"].items()
        }
        index = {label.value: i + 1 for i, label in enumerate(self.record.labels.foreground)}
        self.regions = tuple(index[value] for value in self.record.labels.region_order) or None

    def predict(self, image: Image) -> NDArray[np.integer]:
        """Labels (z, y, x), as the data set numbers them, on the grid of the image."""
        found = [self.logits(member.run, image) for member in self.record.members]
        members = [(torch.from_numpy(logits), placement) for logits, placement in found]
        steps = self.record.postprocessing
        weights = [member.weight for member in self.record.members]
        index, probable = restore_ensemble(members, self.regions, needs_probabilities(steps), weights)
        index = apply_postprocessing(index, steps, probable, image.array_czyx, image.grid.spacing)
        return self.record.labels.decode(index)

    def logits(self, run: str, image: Image) -> tuple[Logits, Placement]:
        """Mean logits (classes, z, y, x) of a run on its own grid, and how that grid lies in the image."""
        configuration = self.record.configuration_of(run)
        case = preprocess(image, None, self.record.plan_of(run), configuration)
        channels = case.image_czyx
        previous = self.record.networks[run].previous
        if previous is not None:
            logits, placement = self.logits(previous, image)
            label = labels_on_grid(torch.from_numpy(logits), placement, case.placement, self.regions)
            before = one_hot(torch.from_numpy(label.astype(np.int64)), len(self.record.labels.foreground)).numpy()
            channels = np.concatenate([channels, before])
        patch = (1, *configuration.patch_size) if configuration.dims == 2 else configuration.patch_size
        return self.slide(run, channels, (patch[0], patch[1], patch[2])), case.placement

    def slide(self, run: str, channels_czyx: NDArray[np.float32], patch: tuple[int, int, int]) -> Logits:
        """Logits of a whole image: tiles, blended."""
        shape = channels_czyx.shape[1:]
        tiling = make_tiling((shape[0], shape[1], shape[2]), patch)
        margins = [(before, full - size - before) for before, full, size in zip(tiling.before, tiling.padded, shape, strict=True)]
        padded = np.pad(channels_czyx, [(0, 0), *margins])
        weight = gaussian_weight(patch).numpy()
        total = np.zeros((self.record.labels.output_count, *tiling.padded), np.float32)
        norm = np.zeros(tiling.padded, np.float32)
        for start in tiling.starts:
            box = tuple(slice(first, first + edge) for first, edge in zip(start, patch, strict=True))
            total[(slice(None), *box)] += self.tile(run, padded[(slice(None), *box)]) * weight
            norm[box] += weight
        inside = tuple(slice(before, before + size) for before, size in zip(tiling.before, shape, strict=True))
        result: Logits = (total / norm)[(slice(None), *inside)]
        return result

    def tile(self, run: str, tile_czyx: NDArray[np.float32]) -> Logits:
        """Mean logits (classes, z, y, x) of one tile over networks and mirrored copies; 2D networks see (channel, y, x)."""
        flat = self.record.configuration_of(run).dims == 2
        tile = tile_czyx[:, 0] if flat else tile_czyx
        axes = [axis + 1 for axis in self.record.networks[run].mirror_axes] if self.mirror else []
        flips = [flip for count in range(len(axes) + 1) for flip in itertools.combinations(axes, count)]
        results = []
        for session, flip in itertools.product(self.sessions[run], flips):
            mirrored = np.ascontiguousarray(np.flip(tile, flip))[None]
            results.append(np.flip(session.run(["logits"], {"image": mirrored})[0][0], flip))
        mean: Logits = np.stack(results).mean(axis=0, dtype=np.float32)
        return mean[:, None] if flat else mean


def main(arguments: list[str]) -> None:
    """MASK IMAGE [IMAGE ...]."""
    mask, images = Path(arguments[0]), [Path(argument) for argument in arguments[1:]]
    image = read_case(images)
    write_label(mask, Pipeline(Path(__file__).resolve().parent).predict(image), image.grid, images[0])


if __name__ == "__main__":
    main(sys.argv[1:])
