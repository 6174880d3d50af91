"""A model in memory: trained networks that turn an image into labels, without files."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from autoseg.arrays.cascade import labels_on_grid, one_hot
from autoseg.arrays.crop import bounding_box, nonzero_mask
from autoseg.arrays.postprocess import apply_postprocessing, needs_probabilities
from autoseg.arrays.preprocess import preprocess
from autoseg.arrays.restore import restore_ensemble
from autoseg.arrays.tiles import make_tiling, sliding_window
from autoseg.arrays.uncertainty import MAPS, PassStatistics, uncertainty_maps
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
    """One configuration with the networks of its folds; `mirror_axes` are the patch axes it was trained to be mirrored along.

    With `previous` the networks take that member's segmentation as input, one channel per foreground label after the image's.
    `weight` is how much the member counts beside the others of an ensemble. `temperature` divides logits where probabilities or
    uncertainty are told; labels are those without it.
    """

    plan: Plan
    name: str
    networks: tuple[Network, ...]
    mirror_axes: tuple[int, ...]
    previous: Member | None = None
    weight: float = 1.0
    temperature: float = 1.0

    @property
    def configuration(self) -> Configuration:
        """The plan's configuration of that name."""
        return self.plan.configurations[self.name]


@dataclass(frozen=True)
class Prediction:
    """Labels (disk values) on the grid of the image as it was stored; probabilities (classes, z, y, x) float32 when asked for.

    So is `uncertainty_kzyx`, float32 in bits: the entropy of the prediction, and the disagreement of folds, mirrored copies and
    runs about it.
    """

    label_zyx: NDArray[np.integer]
    probabilities_czyx: NDArray[np.float32] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    uncertainty_kzyx: NDArray[np.float32] | None = None


class Model:
    """One or several members whose probabilities are averaged by weight, each the mean over its folds and mirrorings."""

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
        for member in self._stages():
            for network in member.networks:
                network.to(device).eval().requires_grad_(False)

    def _stages(self) -> Iterator[Member]:
        """All members, each followed by the previous stages it rests on."""
        for member in self.members:
            stage: Member | None = member
            while stage is not None:
                yield stage
                stage = stage.previous

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

    def predict_image(self, image: Image, probabilities: bool = False, uncertainty: bool = False) -> Prediction:
        """All steps for one image."""
        begin = time.perf_counter()
        prepared = self.prepare(image, uncertainty=uncertainty)
        middle = time.perf_counter()
        pairs = list(zip(self.members, prepared, strict=True))
        logits = [self.logits(member, case, uncertainty=uncertainty) for member, case in pairs]
        end = time.perf_counter()
        found = self.restore(logits, [case.placement for case in prepared], probabilities, image.array_czyx, uncertainty)
        seconds = {"preprocess": middle - begin, "network": end - middle, "restore": time.perf_counter() - end}
        return dataclasses.replace(found, seconds=seconds)

    def prepare(
        self, image: Image, label_zyx: NDArray[np.integer] | None = None, uncertainty: bool = False,
    ) -> list[Preprocessed]:
        """Preprocess an image, and a label map in inside indices where there is one, for every member.

        `uncertainty` says that logits will be made with it, which takes more memory.

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
        self._require_memory(image, uncertainty)
        return [_prepare(image, label_zyx, member) for member in self.members]

    def _require_memory(self, image: Image, uncertainty: bool) -> None:
        """Refuse an image whose spacing would blow it up beyond the machine's memory, before anything is allocated."""
        free = memory_available_bytes()
        if self._needed_bytes(image.grid, uncertainty) <= free:
            return
        box = bounding_box(nonzero_mask(image.array_czyx))  # only the part that is not zero is resampled
        shape = (box[0][1] - box[0][0], box[1][1] - box[1][0], box[2][1] - box[2][0])
        needed = self._needed_bytes(image.grid.model_copy(update={"shape": shape}), uncertainty)
        if needed > free:
            raise MemoryError(
                f"the image of {_times(shape)} voxels, {_times(image.grid.spacing)} mm each, resampled to the plan's spacing of "
                f"{_times(self.members[0].configuration.spacing)} mm, needs about {needed / 2**30:.1f} GiB of memory; "
                f"{free / 2**30:.1f} GiB are free. Is its spacing right?"
            )

    def _needed_bytes(self, grid: Grid, uncertainty: bool = False) -> float:
        """Float32 images, logits and weights of all members and previous stages at once, on their resampled grids."""
        total = 0.0
        for member in self._stages():
            oriented = grid.mapped(grid.turned(member.plan.orientation))
            spacing = [oriented.spacing[axis] for axis in member.plan.transpose_forward]
            voxels = float(math.prod(grid.shape))
            for old, new in zip(spacing[3 - member.configuration.dims :], member.configuration.spacing, strict=True):
                voxels *= 1 if member.plan.resampling == "none" else old / new
            outputs = self.labels.output_count + (len(MAPS) if uncertainty else 0)
            total += 4 * voxels * (2 * len(self.channels) + outputs + 1 + (member.previous is not None))
        return total

    def logits(
        self, member: Member, case: Preprocessed, advance: Callable[[int], None] = lambda n: None, uncertainty: bool = False,
    ) -> torch.Tensor:
        """Logits (classes, z, y, x) on the preprocessed grid: mean over folds and mirrorings, tiles blended.

        They are float32, in a plan with nnU-Net's arithmetic float16 unless `uncertainty` is asked for. With `uncertainty` the
        channels `MAPS` follow the classes.
        """
        before: NDArray[np.integer] | None = None
        if member.previous is not None:
            if case.previous is None:
                raise ValueError("the case was not prepared for the previous stage")
            before = self.segmentation(member.previous, case.previous, case.placement)
        return self.slide(member, case.image_czyx, before, advance, uncertainty)

    @torch.inference_mode()
    def slide(
        self,
        member: Member,
        image_czyx: NDArray[np.float32],
        previous_zyx: NDArray[np.integer] | None = None,
        advance: Callable[[int], None] = lambda n: None,
        uncertainty: bool = False,
    ) -> torch.Tensor:
        """Logits of a preprocessed image, as `logits`; `previous_zyx` is the previous stage's segmentation on its grid."""
        half = member.plan.arithmetic == "nnunet" and not uncertainty
        if half and len(member.networks) > 1:  # nnU-Net gathers each fold's logits on their own
            folds = [dataclasses.replace(member, networks=(network,)) for network in member.networks]
            total = self.slide(folds[0], image_czyx, previous_zyx, advance)
            for fold in folds[1:]:
                total += self.slide(fold, image_czyx, previous_zyx, advance)
            return total.div_(len(folds))
        configuration = member.configuration
        image = torch.from_numpy(image_czyx).to(self.device)
        if previous_zyx is not None:
            image = torch.cat([image, torch.from_numpy(previous_zyx).to(self.device)[None].float()])
        flat = configuration.dims == 2
        size = (1, *configuration.patch_size) if flat else configuration.patch_size
        _, z, y, x = image_czyx.shape
        tiling = make_tiling((z, y, x), (size[0], size[1], size[2]))

        def forward(tiles: torch.Tensor) -> torch.Tensor:
            if previous_zyx is not None:  # only now: channels for all labels of a whole volume would be large
                tiles = torch.cat([tiles[:, :-1], one_hot(tiles[:, -1], len(self.labels.foreground))], 1)
            result = self._passes(member, tiles[:, :, 0] if flat else tiles, uncertainty)
            return result[:, :, None] if flat else result

        try:
            return sliding_window(image, tiling, forward, configuration.batch_size, advance, half=half)
        except RuntimeError as error:
            if self.device.type == "cpu" or not is_out_of_memory(error):
                raise
        return sliding_window(image, tiling, forward, 1, advance, store=torch.device("cpu"), half=half)  # slower, but it fits

    def _passes(self, member: Member, tiles: torch.Tensor, uncertainty: bool) -> torch.Tensor:
        """Mean logits (tile, classes, ...) of all networks and mirrorings, followed by `MAPS` with `uncertainty`."""
        axes = member.mirror_axes if self.mirror else ()
        flips = [flip for count in range(len(axes) + 1) for flip in itertools.combinations([a + 2 for a in axes], count)]
        statistics = PassStatistics(member.temperature, bool(self.labels.regions)) if uncertainty else None
        total: torch.Tensor | None = None
        for network in member.networks:
            own: torch.Tensor | None = None
            for flip in flips:
                with autocast(self.device, self.precision):
                    result = network(tiles.flip(flip) if flip else tiles)[0].float()
                result = result.flip(flip) if flip else result
                if statistics is not None:
                    statistics.add_pass(result)
                own = result if own is None else own.add_(result)
            assert own is not None
            own /= len(flips)
            if statistics is not None:
                statistics.add_network(own)
            total = own if total is None else total.add_(own)
        assert total is not None
        total /= len(member.networks)
        return total if statistics is None else torch.cat([total, statistics.maps(total)], 1)

    def segmentation(self, member: Member, case: Preprocessed, target: Placement) -> NDArray[np.integer]:
        """What a member says, as inside indices (uint8 or int16) on another preprocessed grid of the same image."""
        return labels_on_grid(self.logits(member, case), case.placement, target, self._region_values)

    @property
    def _region_values(self) -> tuple[int, ...] | None:
        """The inside index that each region writes; None without regions."""
        if not self.labels.regions:
            return None
        index = {label.value: i + 1 for i, label in enumerate(self.labels.foreground)}
        return tuple(index[value] for value in self.labels.region_order)

    def restore(
        self,
        logits: Sequence[torch.Tensor],
        placements: Sequence[Placement],
        probabilities: bool = False,
        image_czyx: NDArray[np.generic] | None = None,
        uncertainty: bool = False,
    ) -> Prediction:
        """Bring the members' logits to the stored grid, average where there are several, decide labels, post-process.

        The image as stored is for post-processing that looks at it. The probabilities are those before post-processing, after
        division by the temperatures. `uncertainty` needs logits that were made with it.
        """
        classes = self.labels.output_count
        members = [(one[:classes], placement) for one, placement in zip(logits, placements, strict=True)]
        shares, temperatures = [m.weight for m in self.members], [m.temperature for m in self.members]
        tempered = probabilities and set(temperatures) != {1.0}
        dense = (probabilities and not tempered) or needs_probabilities(self.postprocessing)
        plans = [member.plan for member in self.members]  # nnU-Net's resampling with torch gives float32
        half = all(plan.arithmetic == "nnunet" and plan.resampling == "cubic" for plan in plans)
        inside, probable = restore_ensemble(members, self._region_values, dense, shares, half)
        if self.postprocessing:
            spacing = placements[0].stored.spacing
            inside = apply_postprocessing(inside, self.postprocessing, probable, image_czyx, spacing)
        label = self.labels.decode(inside)
        if tempered:
            del probable
            scaled = [(one / t, placement) for (one, placement), t in zip(members, temperatures, strict=True)]
            _, probable = restore_ensemble(scaled, self._region_values, True, shares)
        maps = None
        if uncertainty:
            gauged = [(one[:classes], one[classes:], placement) for one, placement in zip(logits, placements, strict=True)]
            maps = uncertainty_maps(gauged, temperatures, shares, self._region_values)
        return Prediction(label, probable if probabilities else None, uncertainty_kzyx=maps)


def _prepare(image: Image, label_zyx: NDArray[np.integer] | None, member: Member) -> Preprocessed:
    case = preprocess(image, label_zyx, member.plan, member.configuration)
    return case if member.previous is None else dataclasses.replace(case, previous=_prepare(image, None, member.previous))


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)
