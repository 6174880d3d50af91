"""A model in memory: trained networks that turn an image into labels, without files."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from autoseg.arrays.components import apply_postprocessing
from autoseg.arrays.crop import bounding_box, nonzero_mask
from autoseg.arrays.preprocess import preprocess
from autoseg.arrays.restore import restore_ensemble
from autoseg.arrays.tiles import make_tiling, sliding_window
from autoseg.errors import DatasetError, GeometryError
from autoseg.files.machine import memory_available_bytes
from autoseg.networks.build import Network
from autoseg.networks.hardware import Resolved, autocast, is_out_of_memory
from autoseg.types.case import Image, Placement, Preprocessed
from autoseg.types.geometry import NO_DEPTH_MM, Grid, Vector
from autoseg.types.labels import Labels
from autoseg.types.plan import Configuration, Plan
from autoseg.types.record import Spec


@dataclass(frozen=True)
class Member:
    """One configuration with the networks of its folds; `mirror_axes` are the patch axes it was trained to be mirrored along."""

    plan: Plan
    name: str
    networks: tuple[Network, ...]
    mirror_axes: tuple[int, ...]

    @property
    def configuration(self) -> Configuration:
        """The plan's configuration of that name."""
        return self.plan.configurations[self.name]


@dataclass(frozen=True)
class Prediction:
    """Labels (disk values) on the grid of the image as it was stored; probabilities (classes, z, y, x) float32 when asked for."""

    label_zyx: NDArray[np.integer]
    probabilities_czyx: NDArray[np.float32] | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Model:
    """One or several members whose probabilities are averaged, each the mean over its folds and mirrorings."""

    def __init__(
        self,
        members: Sequence[Member],
        device: torch.device,
        precision: Resolved,
        mirror: bool = True,
        postprocessing: Sequence[Spec] = (),
    ) -> None:
        self.members, self.device, self.mirror = tuple(members), device, mirror
        self.precision: Resolved = precision
        self.postprocessing = tuple(postprocessing)
        for member in self.members:
            for network in member.networks:
                network.to(device).eval().requires_grad_(False)

    @property
    def labels(self) -> Labels:
        """The labels that are predicted."""
        return self.members[0].plan.labels

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels an image must have."""
        return self.members[0].plan.channels

    def predict(self, image_czyx: NDArray[np.generic], spacing_zyx_mm: Vector = (1.0, 1.0, 1.0)) -> NDArray[np.integer]:
        """Labels (z, y, x), disk values, of an array (channel, z, y, x) in the plan's orientation; (channel, y, x) gives (y, x).

        Raises:
            GeometryError: wrong number of axes or channels.
        """
        flat = image_czyx.ndim == 3
        array = image_czyx[:, None] if flat else image_czyx
        if array.ndim != 4:
            raise GeometryError(f"expected an array (channel, z, y, x) or (channel, y, x), found shape {image_czyx.shape}")
        spacing = (max(NO_DEPTH_MM, NO_DEPTH_MM * max(spacing_zyx_mm)), *spacing_zyx_mm[-2:]) if flat else spacing_zyx_mm
        _, z, y, x = array.shape
        grid = Grid(shape=(z, y, x), spacing=spacing, has_direction=not flat)
        label = self.predict_image(Image(np.ascontiguousarray(array), grid, "")).label_zyx
        return label[0] if flat else label

    def predict_image(self, image: Image, probabilities: bool = False) -> Prediction:
        """All steps for one image."""
        begin = time.perf_counter()
        prepared = self.prepare(image)
        middle = time.perf_counter()
        logits = [self.logits(member, case) for member, case in zip(self.members, prepared, strict=True)]
        end = time.perf_counter()
        prediction = self.restore(logits, [case.placement for case in prepared], probabilities)
        seconds = {"preprocess": middle - begin, "network": end - middle, "restore": time.perf_counter() - end}
        return Prediction(prediction.label_zyx, prediction.probabilities_czyx, seconds)

    def prepare(self, image: Image) -> list[Preprocessed]:
        """Preprocess an image for every member.

        Raises:
            GeometryError: wrong number of channels.
            DatasetError: NaN or infinite voxels.
            MemoryError: the resampled image cannot fit into the memory there is.
        """
        if len(image.array_czyx) != len(self.channels):
            raise GeometryError(
                f"the model was trained on {len(self.channels)} channel(s) ({', '.join(self.channels)}), "
                f"found {len(image.array_czyx)} in the image"
            )
        if not np.isfinite(image.array_czyx).all():
            raise DatasetError("the image holds NaN or infinite voxels; repair it (autoseg check lists such cases)")
        self._require_memory(image)
        return [preprocess(image, None, member.plan, member.configuration) for member in self.members]

    def _require_memory(self, image: Image) -> None:
        """Refuse an image whose spacing would blow it up beyond the machine's memory, before anything is allocated."""
        free = memory_available_bytes()
        if self._needed_bytes(image.grid) <= free:
            return
        box = bounding_box(nonzero_mask(image.array_czyx))  # only the part that is not zero is resampled
        shape = (box[0][1] - box[0][0], box[1][1] - box[1][0], box[2][1] - box[2][0])
        needed = self._needed_bytes(image.grid.model_copy(update={"shape": shape}))
        if needed > free:
            raise MemoryError(
                f"the image of {_times(shape)} voxels, {_times(image.grid.spacing)} mm each, resampled to the plan's spacing of "
                f"{_times(self.members[0].configuration.spacing)} mm, needs about {needed / 2**30:.1f} GiB of memory; "
                f"{free / 2**30:.1f} GiB are free. Is its spacing right?"
            )

    def _needed_bytes(self, grid: Grid) -> float:
        """Float32 images, logits and weights of all members at once, on their resampled grids."""
        total = 0.0
        for member in self.members:
            oriented = grid.mapped(grid.to_lps()) if member.plan.orientation == "LPS" else grid
            spacing = [oriented.spacing[axis] for axis in member.plan.transpose_forward]
            voxels = float(math.prod(grid.shape))
            for old, new in zip(spacing[3 - member.configuration.dims :], member.configuration.spacing, strict=True):
                voxels *= old / new
            total += 4 * voxels * (2 * len(self.channels) + self.labels.output_count + 1)
        return total

    @torch.inference_mode()
    def logits(self, member: Member, case: Preprocessed, advance: Callable[[int], None] = lambda n: None) -> torch.Tensor:
        """Logits (classes, z, y, x) float32 on the preprocessed grid: mean over folds and mirrorings, tiles blended."""
        configuration = member.configuration
        flat = configuration.dims == 2
        size = (1, *configuration.patch_size) if flat else configuration.patch_size
        _, z, y, x = case.image_czyx.shape
        tiling = make_tiling((z, y, x), (size[0], size[1], size[2]))
        axes = member.mirror_axes if self.mirror else ()
        flips = [flip for count in range(len(axes) + 1) for flip in itertools.combinations([a + 2 for a in axes], count)]

        def forward(tiles: torch.Tensor) -> torch.Tensor:
            tiles = tiles[:, :, 0] if flat else tiles
            total: torch.Tensor | None = None
            for flip in flips:
                flipped = tiles.flip(flip) if flip else tiles
                for network in member.networks:
                    with autocast(self.device, self.precision):
                        result = network(flipped)[0].float()
                    result = result.flip(flip) if flip else result
                    total = result if total is None else total.add_(result)
            assert total is not None
            total /= len(flips) * len(member.networks)
            return total[:, :, None] if flat else total

        image = torch.from_numpy(case.image_czyx).to(self.device)
        try:
            return sliding_window(image, tiling, forward, configuration.batch_size, advance)
        except RuntimeError as error:
            if self.device.type == "cpu" or not is_out_of_memory(error):
                raise
        return sliding_window(image, tiling, forward, 1, advance, store=torch.device("cpu"))  # slower, but it fits

    def restore(self, logits: Sequence[torch.Tensor], placements: Sequence[Placement], probabilities: bool = False) -> Prediction:
        """Bring the members' logits to the stored grid, average where there are several, decide labels, post-process."""
        labels = self.labels
        regions = None
        if labels.regions:
            index = {label.value: i + 1 for i, label in enumerate(labels.foreground)}
            regions = tuple(index[value] for value in labels.region_order)
        inside, dense = restore_ensemble(list(zip(logits, placements, strict=True)), regions, probabilities)
        if self.postprocessing:
            inside = apply_postprocessing(inside, self.postprocessing)
        return Prediction(labels.decode(inside), dense)


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)
