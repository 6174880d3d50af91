"""The model: from an image to labels on its grid, plane by plane."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.arrays.cascade import labels_on_grid
from autoseg.arrays.crop import nonzero_bounds, nonzero_mask
from autoseg.arrays.postprocess import apply_postprocessing, needs_probabilities
from autoseg.arrays.preprocess import preprocess
from autoseg.arrays.restore import LogitSource, WholeLogits
from autoseg.arrays.tiles import LogitStream, gather
from autoseg.errors import DatasetError, GeometryError
from autoseg.files.allocator import memory_kept
from autoseg.inference.foreign import from_foreign, is_foreign, to_foreign
from autoseg.inference.loads import case_load, is_exact, network_grid, tiling_of
from autoseg.inference.memory import CaseLoad, Limits, MemoryPlan, least_bytes, plan_memory, reading_bytes
from autoseg.inference.passes import Passes
from autoseg.inference.records import Decided, ImagePrediction, Member, Prediction, Wishes
from autoseg.inference.settle import Rules, settle
from autoseg.networks.hardware import Resolved, free_gpu_gb
from autoseg.types.case import Image, Placement, Preprocessed
from autoseg.types.geometry import NO_DEPTH_MM, Grid, Vector
from autoseg.types.labels import Labels
from autoseg.types.record import Spec

NOTHING_MORE = Wishes()


class Model:
    """One or several members whose probabilities are averaged by weight, each the mean over its folds and mirrorings.

    Several threads may use one model at the same time; each plans with the memory that is free when it begins, so where that is
    short they should take turns.
    """

    def __init__(
        self,
        members: Sequence[Member],
        device: torch.device,
        precision: Resolved,
        mirror: bool = True,
        postprocessing: Sequence[Spec] = (),
        limits: Limits = Limits(),
    ) -> None:
        self.members, self.device, self.mirror, self.limits = tuple(members), device, mirror, limits
        self.precision: Resolved = precision
        self.postprocessing = tuple(postprocessing)
        for member in self.stages():
            for network in member.networks:
                network.to(device).eval().requires_grad_(False)

    def stages(self) -> Iterator[Member]:
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

    # From Python

    @overload
    def predict(self, image: NDArray[np.generic], spacing_zyx_mm: Vector = ...) -> NDArray[np.integer]: ...
    @overload
    def predict(
        self, image: Any, spacing_zyx_mm: Vector = ..., *, probabilities: bool = ..., uncertainty: bool = ...,
        timings: bool = ...,
    ) -> Any: ...

    def predict(
        self, image: Any, spacing_zyx_mm: Vector = (1.0, 1.0, 1.0), *, probabilities: bool = False, uncertainty: bool = False,
        timings: bool = False,
    ) -> Any:
        """Labels, disk values, of an array or image; a record with them when anything more is asked for.

        Args:
            image: an array (channel, z, y, x) in the plan's orientation, which gives labels (z, y, x), or (channel, y, x), which
                gives (y, x); or a SimpleITK or nibabel image in any orientation, or a list of them, one per channel, which gives
                an image of the same kind on the same grid.
            spacing_zyx_mm: of an array; images know theirs.
            probabilities: also tell probabilities, float32, classes first (in images: last).
            uncertainty: also tell entropy and disagreement in bits.
            timings: also tell the seconds of each stage.

        Returns:
            Labels; with probabilities, uncertainty or timings a `Prediction`, or an `ImagePrediction` for images.

        Raises:
            GeometryError: wrong number of axes or channels, or channels on different grids.
            DatasetError: NaN or infinite voxels.
            MemoryError: it cannot fit into the memory there is, or that the limits leave.
        """
        more = probabilities or uncertainty or timings
        if is_foreign(image):
            whole = self.predict_image(from_foreign(image), probabilities, uncertainty)
            label = to_foreign(whole.label_zyx, image)
            parts = (whole.probabilities_czyx, whole.uncertainty_kzyx)
            maps = [None if part is None else to_foreign(part, image) for part in parts]
            return ImagePrediction(label, maps[0], maps[1], whole.seconds) if more else label
        array = np.asarray(image)
        flat = array.ndim == 3
        array = array[:, None] if flat else array
        if array.ndim != 4:
            raise GeometryError(f"expected an array (channel, z, y, x) or (channel, y, x), found shape {np.shape(image)}")
        spacing = (max(NO_DEPTH_MM, NO_DEPTH_MM * max(spacing_zyx_mm)), *spacing_zyx_mm[-2:]) if flat else spacing_zyx_mm
        _, z, y, x = array.shape
        grid = Grid(shape=(z, y, x), spacing=spacing, has_direction=False)  # it lies as the plan wants it
        found = self.predict_image(Image(np.ascontiguousarray(array), grid, ""), probabilities, uncertainty)
        if flat:
            found = _flat(found)
        return found if more else found.label_zyx

    def predict_image(self, image: Image, probabilities: bool = False, uncertainty: bool = False) -> Prediction:
        """All steps for one image."""
        begin = time.perf_counter()
        wishes = Wishes(probabilities, uncertainty)
        prepared = self.prepare(image, wishes=wishes)
        seconds = {"preprocess": time.perf_counter() - begin}
        found = self.finish(self.decide(prepared, wishes), image.array_czyx)
        return dataclasses.replace(found, seconds=seconds | found.seconds)

    # Step by step

    def prepare(
        self, image: Image, label_zyx: NDArray[np.integer] | None = None, wishes: Wishes = NOTHING_MORE,
    ) -> list[Preprocessed]:
        """Preprocess an image, and a label map in inside indices where there is one, for every member.

        Raises:
            GeometryError: wrong number of channels.
            DatasetError: NaN or infinite voxels.
            MemoryError: what is wished for cannot fit into the memory there is.
        """
        if len(image.array_czyx) != len(self.channels):
            raise GeometryError(
                f"the model was trained on {len(self.channels)} channel(s) ({', '.join(self.channels)}), "
                f"found {len(image.array_czyx)} in the image"
            )
        if not _is_finite(image.array_czyx):
            raise DatasetError("the image holds NaN or infinite voxels; repair it (autoseg check lists such cases)")
        self._require_memory(image, wishes)
        return [_prepare(image, label_zyx, member) for member in self.members]

    def _require_memory(self, image: Image, wishes: Wishes) -> None:
        """Refuse an image whose spacing would blow it up beyond the machine's memory, before anything is allocated."""
        free = self.limits.free_ram()
        if self.needed_bytes(image.grid, wishes) <= free:
            return
        box = nonzero_bounds(nonzero_mask(image.array_czyx))  # only the part that is not zero is resampled
        shape = (box[0][1] - box[0][0], box[1][1] - box[1][0], box[2][1] - box[2][0])
        needed = self.needed_bytes(image.grid.model_copy(update={"shape": shape}), wishes)
        if needed > free:
            raise MemoryError(
                f"the image of {_times(shape)} voxels, {_times(image.grid.spacing)} mm each, resampled to the plan's spacing of "
                f"{_times(self.members[0].configuration.spacing)} mm, needs at least {needed / 2**30:.2f} GiB of memory; "
                f"{free / 2**30:.2f} GiB are free. Is its spacing right?"
            )

    def needed_bytes(self, grid: Grid, wishes: Wishes = NOTHING_MORE) -> int:
        """The least memory that an image which is read already takes: its copies for all members, and logits of open planes."""
        load = self._load([network_grid(grid, member) for member in self.stages()], grid.shape, wishes)
        prepared = sum(4 * math.prod(stream.tiling.shape) for stream in load.streams) * len(self.channels)
        cropped = 4 * math.prod(grid.shape) * len(self.channels)  # gone before the networks begin
        return prepared + max(cropped, least_bytes(load, self.device.type == "cuda"))

    def reading_bytes(self, grid: Grid, channels: int, itemsize: int) -> int:
        """What reading and preprocessing an image takes at most, from its header."""
        voxels = math.prod(grid.shape)
        finer = sum(math.prod(network_grid(grid, member)) / max(1, voxels) for member in self.stages())
        return reading_bytes(voxels, channels, itemsize, finer)

    def plan_memory(self, prepared: Sequence[Preprocessed], wishes: Wishes = NOTHING_MORE, next_bytes: int = 0) -> MemoryPlan:
        """How a case is computed in the memory that is free now, when reading the next one takes `next_bytes`.

        Raises:
            MemoryError: it cannot fit.
        """
        shapes = [case.placement.shape for case in _with_previous(prepared)]
        load = self._load(shapes, prepared[0].placement.stored.shape, wishes)
        gpu = free_gpu_gb(self.device)
        free_gpu = None if gpu is None else self.limits.free_gpu(int(gpu * 2**30), torch.cuda.memory_allocated(self.device))
        return plan_memory(load, self._batch(), self.limits.free_ram(), free_gpu, next_bytes)

    def _load(self, shapes: Sequence[tuple[int, int, int]], stored: tuple[int, int, int], wishes: Wishes) -> CaseLoad:
        return case_load(list(self.stages()), shapes, stored, wishes, self.precision, self.postprocessing)

    def _batch(self) -> int:
        """Tiles at once: on a CPU larger ones leave the cache, and in float32 single ones take a slow path of torch's."""
        if self.device.type == "cpu":
            flat = all(member.configuration.dims == 2 for member in self.stages())
            return max(4 if flat else 0, 2 if self.precision == "bf16" else 3)
        return max(member.configuration.batch_size for member in self.stages())

    def decide(
        self, prepared: Sequence[Preprocessed], wishes: Wishes = NOTHING_MORE, plan: MemoryPlan | None = None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Decided:
        """Run the networks and decide labels, plane by plane as they get known.

        Raises:
            MemoryError: it cannot fit.
        """
        begin = time.perf_counter()
        chosen = self.plan_memory(prepared, wishes) if plan is None else plan
        with memory_kept() if chosen.keep else nullcontext():
            streams = [self.stream(member, case, chosen, wishes.gauged, advance)
                       for member, case in zip(self.members, prepared, strict=True)]
            before = time.perf_counter() - begin  # the previous stages
            found = self.settle(streams, [case.placement for case in prepared], wishes)
        network = before + sum(stream.seconds for stream in streams)
        return dataclasses.replace(found, seconds={"network": network, "restore": time.perf_counter() - begin - network})

    def stream(
        self, member: Member, case: Preprocessed, plan: MemoryPlan | None = None, uncertainty: bool = False,
        advance: Callable[[int], None] = lambda n: None,
    ) -> LogitStream:
        """Logits (classes, z, y, x) on the preprocessed grid, plane by plane: mean over folds and mirrorings, tiles blended.

        They are float32; float16 where memory is short, or in fp32 in a plan with nnU-Net's arithmetic. With `uncertainty` the
        channels `MAPS` follow the classes.
        """
        previous: NDArray[np.integer] | None = None
        if member.previous is not None:
            if case.previous is None:
                raise ValueError("the case was not prepared for the previous stage")
            previous = self.segmentation(member.previous, case.previous, case.placement, plan)
        return self.slide(member, case.image_czyx, previous, plan, uncertainty, advance)

    def slide(
        self, member: Member, image_czyx: NDArray[np.float32], previous_zyx: NDArray[np.integer] | None = None,
        plan: MemoryPlan | None = None, uncertainty: bool = False, advance: Callable[[int], None] = lambda n: None,
    ) -> LogitStream:
        """The stream of a preprocessed image; `previous_zyx` is the previous stage's segmentation on its grid."""
        chosen = MemoryPlan(self._batch(), False, True, True, 0) if plan is None else plan
        exact = is_exact(member, self.precision, uncertainty)
        image = torch.from_numpy(image_czyx)
        if previous_zyx is not None:
            image = torch.cat([image, torch.from_numpy(previous_zyx)[None].float()])
        store = self.device if chosen.on_device else torch.device("cpu")
        passes = Passes(
            member.networks, member.mirror_axes if self.mirror else (), self.device, self.precision,
            flat=member.configuration.dims == 2, previous_labels=0 if previous_zyx is None else len(self.labels.foreground),
            temperature=member.temperature, regions=bool(self.labels.regions), uncertainty=uncertainty,
            apart=exact and len(member.networks) > 1,  # nnU-Net gathers each fold's logits on their own
            copies=chosen.batch,
        )
        _, z, y, x = image_czyx.shape
        tiling = tiling_of((z, y, x), member.configuration)
        parts = len(member.networks) if passes.apart else 1
        return LogitStream(
            image.to(store), tiling, passes.forward, chosen.batch, advance, store, exact, parts, lean=chosen.half and not exact)

    def logits(self, member: Member, case: Preprocessed, uncertainty: bool = False) -> Tensor:
        """Whole logits of a member, as `stream`."""
        return gather(self.stream(member, case, None, uncertainty))

    def segmentation(
        self, member: Member, case: Preprocessed, target: Placement, plan: MemoryPlan | None = None
    ) -> NDArray[np.integer]:
        """What a member says, as inside indices (uint8 or int16) on another preprocessed grid of the same image."""
        return labels_on_grid(self.stream(member, case, plan), case.placement, target, self._region_values)

    @property
    def _region_values(self) -> tuple[int, ...] | None:
        """The inside index that each region writes; None without regions."""
        if not self.labels.regions:
            return None
        index = {label.value: i + 1 for i, label in enumerate(self.labels.foreground)}
        return tuple(index[value] for value in self.labels.region_order)

    def settle(
        self, logits: Sequence[LogitSource | Tensor], placements: Sequence[Placement], wishes: Wishes = NOTHING_MORE
    ) -> Decided:
        """Bring the members' logits to the stored grid, average where there are several, decide labels.

        With uncertainty or judgement wished for, they must have been made with uncertainty.
        """
        plans = [member.plan for member in self.members]  # nnU-Net's resampling with torch gives float32
        rules = Rules(
            self.labels.output_count, self._region_values, tuple(member.weight for member in self.members),
            tuple(member.temperature for member in self.members),
            half=all(plan.arithmetic == "nnunet" and plan.resampling == "cubic" for plan in plans),
            raw=needs_probabilities(self.postprocessing),
        )
        sources = [WholeLogits(one) if isinstance(one, Tensor) else one for one in logits]
        return settle(sources, placements, rules, wishes)

    def finish(self, decided: Decided, image_czyx: NDArray[np.generic] | None = None) -> Prediction:
        """Post-process, and write disk values; the image as stored is for post-processing that looks at it."""
        inside = decided.inside_zyx
        if self.postprocessing:
            inside = apply_postprocessing(inside, self.postprocessing, decided.probable_czyx, image_czyx, decided.spacing_zyx_mm)
        return Prediction(self.labels.decode(inside), decided.told_czyx, decided.seconds, decided.uncertainty_kzyx)


def _prepare(image: Image, label_zyx: NDArray[np.integer] | None, member: Member) -> Preprocessed:
    case = preprocess(image, label_zyx, member.plan, member.configuration)
    return case if member.previous is None else dataclasses.replace(case, previous=_prepare(image, None, member.previous))


def _with_previous(prepared: Sequence[Preprocessed]) -> Iterator[Preprocessed]:
    for case in prepared:
        stage: Preprocessed | None = case
        while stage is not None:
            yield stage
            stage = stage.previous


def _is_finite(array: NDArray[np.generic]) -> bool:
    """Whether all voxels are finite; plane by plane, because a mask of everything would be large."""
    return not np.issubdtype(array.dtype, np.inexact) or all(bool(np.isfinite(plane).all()) for part in array for plane in part)


def _flat(found: Prediction) -> Prediction:
    """The prediction of an array without z."""
    kept = [None if part is None else part[:, 0] for part in (found.probabilities_czyx, found.uncertainty_kzyx)]
    return dataclasses.replace(found, label_zyx=found.label_zyx[0], probabilities_czyx=kept[0], uncertainty_kzyx=kept[1])


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)
