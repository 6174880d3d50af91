"""From logits on the network's grid to labels or probabilities on the grid of the image file.

Logits are interpolated linearly (half-pixel centres, the border repeats; the nearest slice along an axis that is too coarse),
plane by plane, and decided at once: no float array of classes times volume exists unless probabilities are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.arrays.crop import box_slices
from autoseg.arrays.resample import Taps, linear_taps, separate_axis
from autoseg.types.case import Placement

T = TypeVar("T")
Regions = tuple[int, ...] | None

_BLOCK_BYTES = 4 << 20  # interpolated rows worked on at once: they stay in the processor's cache
_DEVICE_BLOCK_BYTES = 64 << 20  # on an accelerator larger blocks cost fewer launches
_DENSE_FROM = 0.3  # share of voxels near a border above which computing every voxel is faster


def _decide(values: Tensor, regions: Regions, threshold: float) -> Tensor:
    """Return the winning class along the last axis, or with regions 1 + the last one above `threshold` (0 for none)."""
    if regions is None:
        return values.argmax(-1)
    place = torch.arange(1, values.shape[-1] + 1, device=values.device)
    return ((values > threshold) * place).amax(-1)


def _decide_rows(values: Tensor, regions: Regions, threshold: float) -> NDArray[np.integer]:
    """The same as `_decide`, as a numpy array; numpy's argmax over a short last axis is the faster one."""
    if regions is None and values.device.type == "cpu":
        result: NDArray[np.integer] = values.numpy().argmax(-1)
    else:
        result = _decide(values, regions, threshold).cpu().numpy()
    return result


class _Axis:
    """Interpolation taps of one axis, or of a part of it, on a device."""

    def __init__(self, taps: Taps, part: slice, device: torch.device) -> None:
        low, high = taps.low[part], taps.high[part]
        self.start, self.stop = int(low.min()), int(high.max()) + 1
        self.low = torch.as_tensor(low - self.start, device=device)
        self.high = torch.as_tensor(high - self.start, device=device)
        self.weight = torch.as_tensor(taps.weight[part].astype(np.float32), device=device)
        self.copies = bool(np.array_equal(low, np.arange(self.start, self.stop))) and not taps.weight[part].any()
        self.interpolates = bool(taps.weight[part].any())

    def apply(self, values: Tensor, axis: int) -> Tensor:
        """Interpolate `values`, which begin at this part's first source voxel, along `axis`."""
        if self.copies:
            return values
        low = values.index_select(axis, self.low)
        if not self.interpolates:
            return low
        weight = self.weight.reshape(*(-1 if a == axis else 1 for a in range(values.ndim)))
        return torch.lerp(low, values.index_select(axis, self.high), weight)


class _Recent(Generic[T]):
    """The results for the last two planes asked for, as neighbouring output planes share them."""

    def __init__(self) -> None:
        self._kept: dict[int, T] = {}

    def get(self, z: int, make: Callable[[int], T]) -> T:
        """Return what `make` gives for plane z, made once."""
        if z not in self._kept:
            if len(self._kept) == 2:
                del self._kept[next(iter(self._kept))]
            self._kept[z] = make(z)
        return self._kept[z]


class _Source:
    """Logits of one member, given as rows of planes on the cropped image grid, classes last."""

    def __init__(self, logits_czyx: Tensor, placement: Placement, half: bool = False) -> None:
        if logits_czyx.ndim != 4 or tuple(logits_czyx.shape[1:]) != tuple(placement.shape):
            raise ValueError(f"expected logits of shape (C, *{placement.shape}), found {tuple(logits_czyx.shape)}")
        self.logits, self.half = logits_czyx.detach(), half
        self.size = placement.cropped_shape
        coarse = separate_axis(placement.spacing_zyx_mm, placement.cropped_spacing_zyx_mm)
        pairs = enumerate(zip(placement.shape, self.size, strict=True))
        self.taps = [linear_taps(old, new, axis == coarse) for axis, (old, new) in pairs]
        self.columns = _Axis(self.taps[2], slice(None), self.logits.device)

    @property
    def classes(self) -> int:
        """Number of output channels."""
        return int(self.logits.shape[0])

    @property
    def on_cpu(self) -> bool:
        """Whether the logits lie in main memory."""
        return self.logits.device.type == "cpu"

    def decide(self, values: Tensor, regions: Regions) -> NDArray[np.integer]:
        """Return the decision for interpolated logits, classes last."""
        return _decide_rows(values.half().float() if self.half else values, regions, 0.0)

    def block(self, rows: slice, regions: Regions) -> _Block:
        """Return the planes cut to `rows` of the cropped image grid."""
        return _Block(self, rows, regions)


class _Block:
    """A range of rows of all planes of one source."""

    def __init__(self, source: _Source, rows: slice, regions: Regions) -> None:
        self.source, self.rows = source, _Axis(source.taps[1], rows, source.logits.device)
        self.regions = regions
        self._planes: _Recent[Tensor] = _Recent()
        self._dense_planes: _Recent[Tensor] = _Recent()
        self._decisions: _Recent[NDArray[np.integer]] = _Recent()

    def plane(self, z: int) -> Tensor:
        """Source plane z, float32 (rows, columns, classes)."""
        return self._planes.get(z, self._load)

    def dense_plane(self, z: int) -> Tensor:
        """Source plane z interpolated to the output's rows and columns."""
        return self._dense_planes.get(z, lambda k: self.source.columns.apply(self.rows.apply(self.plane(k), 0), 1))

    def coarse(self, z: int) -> NDArray[np.integer]:
        """Decision at each voxel of source plane z."""
        return self._decisions.get(z, lambda k: self.source.decide(self.plane(k), self.regions))

    def _load(self, z: int) -> Tensor:
        plane = self.source.logits[:, z, self.rows.start:self.rows.stop, self.source.columns.start:self.source.columns.stop]
        return plane.float().permute(1, 2, 0).contiguous()

    def dense(self, z: int) -> Tensor:
        """Logits of output plane z at every voxel, float32 (rows, columns, classes)."""
        taps = self.source.taps[0]
        low, high, weight = int(taps.low[z]), int(taps.high[z]), float(taps.weight[z])
        if not weight:
            return self.dense_plane(low)
        return torch.lerp(self.dense_plane(low), self.dense_plane(high), weight)

    def labels(self, z: int) -> NDArray[np.integer]:
        """Winning class of output plane z; interpolates only where the source voxels around disagree.

        Where all corners agree so does every point between them, since linear weights are convex.
        """
        taps = self.source.taps[0]
        low, high, weight = int(taps.low[z]), int(taps.high[z]), float(taps.weight[z])
        near = self.coarse(low)
        smallest, largest = near, near
        if weight:
            smallest, largest = np.minimum(near, self.coarse(high)), np.maximum(near, self.coarse(high))
        mixed = _spread(smallest, largest, self.rows.interpolates, self.source.columns.interpolates)
        rows, columns = self.rows.low.numpy(), self.source.columns.low.numpy()
        places = np.flatnonzero(mixed[rows][:, columns])
        if len(places) > _DENSE_FROM * len(rows) * len(columns):
            return self.source.decide(self.dense(z), self.regions)
        result: NDArray[np.integer] = np.ascontiguousarray(near[rows][:, columns])
        if len(places):
            y, x = np.divmod(places, len(columns))
            values = self._at(low, y, x)
            if weight:
                values = torch.lerp(values, self._at(high, y, x), weight)
            result.reshape(-1)[places] = self.source.decide(values, self.regions)
        return result

    def _at(self, z: int, y: NDArray[np.intp], x: NDArray[np.intp]) -> Tensor:
        """Logits of source plane z interpolated in the plane at output rows y and columns x, (points, classes)."""
        plane = self.plane(z)
        flat, width = plane.reshape(-1, plane.shape[-1]), plane.shape[1]
        rows, columns = torch.from_numpy(y), torch.from_numpy(x)
        left, right = self.source.columns.low[columns], self.source.columns.high[columns]
        across = self.source.columns.weight[columns, None]
        ends = []
        for row in (self.rows.low[rows] * width, self.rows.high[rows] * width):
            ends.append((flat.index_select(0, row + left), flat.index_select(0, row + right)))
        down = self.rows.weight[rows, None]
        return torch.lerp(torch.lerp(ends[0][0], ends[1][0], down), torch.lerp(ends[0][1], ends[1][1], down), across)


def _spread(
    smallest: NDArray[np.integer], largest: NDArray[np.integer], rows: bool, columns: bool,
) -> NDArray[np.bool_]:
    """Return at the low corner of each cell whether its corners hold different classes."""
    for axis, used in ((0, rows), (1, columns)):
        if used and smallest.shape[axis] > 1:
            low, high = smallest.copy(), largest.copy()
            here = (slice(None),) * axis + (slice(None, -1),)
            after = (slice(None),) * axis + (slice(1, None),)
            np.minimum(low[here], smallest[after], out=low[here])
            np.maximum(high[here], largest[after], out=high[here])
            smallest, largest = low, high
    mixed: NDArray[np.bool_] = smallest != largest
    return mixed


def _probabilities(values: Tensor, regions: Regions) -> Tensor:
    return torch.softmax(values, -1) if regions is None else torch.sigmoid(values)


def _cropped_view(array: NDArray[np.generic], placement: Placement) -> NDArray[np.generic]:
    """Return the view of an array on the stored grid (leading axes allowed) that is the transposed, cropped grid."""
    lead = array.ndim - 3
    view = placement.axis_map.apply(array).transpose(*range(lead), *(lead + a for a in placement.transpose))
    result: NDArray[np.generic] = view[(..., *box_slices(placement.crop_zyx))]
    return result


def _same_crop(a: Placement, b: Placement) -> bool:
    return (a.stored, a.axis_map, a.transpose, a.crop_zyx) == (b.stored, b.axis_map, b.transpose, b.crop_zyx)


def _blocks(members: Sequence[_Source]) -> list[slice]:
    """Cut the rows of a plane so that the interpolated logits of all members stay within the block size."""
    _, rows, columns = members[0].size
    row_bytes = 4 * columns * sum(member.classes for member in members)
    limit = _BLOCK_BYTES if members[0].on_cpu else _DEVICE_BLOCK_BYTES
    count = max(1, limit // row_bytes)
    return [slice(start, min(rows, start + count)) for start in range(0, rows, count)]


@torch.no_grad()
def restore_ensemble(
    members: Sequence[tuple[Tensor, Placement]], region_values: Regions = None, with_probabilities: bool = False,
    weights: Sequence[float] | None = None, half: bool = False,
) -> tuple[NDArray[np.integer], NDArray[np.float32] | None]:
    """Return labels (inside indices, uint8 or int16, z y x) on the stored grid, and float32 (C, z, y, x) probabilities if asked.

    Each member is logits (C, *placement.shape), any float type and device, with its placement; all must come from one image
    and plan (same crop), and their spacings may differ. Several members are averaged as probabilities after interpolation,
    each counted by its positive number in `weights` (equal ones when None; they need not add up to 1).
    `region_values` None: softmax and the largest class; else sigmoid, and region i writes `region_values[i]` where it exceeds
    0.5, later regions over earlier ones. Outside the crop background is certain. With `half` interpolated logits of a single
    member are rounded to float16 before the largest is taken, of equal ones the first, as nnU-Net does.
    Raises ValueError when members or weights do not fit.
    """
    placement = members[0][1]
    shares = _shares(len(members), weights)
    if any(not _same_crop(placement, other) for _, other in members[1:]):
        raise ValueError("members of an ensemble must share one crop of one image")
    sources = [_Source(logits, own, half) for logits, own in members]
    classes = sources[0].classes
    if any(source.classes != classes for source in sources) or (region_values is not None and len(region_values) != classes):
        raise ValueError(f"members and regions must agree in classes, found {[s.classes for s in sources]} and {region_values}")
    table = np.arange(classes) if region_values is None else np.array([0, *region_values])
    table = table.astype(np.uint8 if table.max() < 256 else np.int16)
    labels = np.zeros(placement.stored.shape, table.dtype)
    inside = _cropped_view(labels, placement)
    probabilities = probable = None
    if with_probabilities:
        probabilities = np.zeros((classes, *placement.stored.shape), np.float32)
        if region_values is None:
            probabilities[0] = 1
        probable = _cropped_view(probabilities, placement)
    for rows in _blocks(sources):
        blocks = [source.block(rows, region_values) for source in sources]
        for z in range(sources[0].size[0]):
            plane, mean = _combined(blocks, shares, z, region_values, with_probabilities)
            inside[z, rows] = table[plane]
            if probable is not None and mean is not None:
                probable[:, z, rows] = mean.permute(2, 0, 1).cpu().numpy()
    return labels, probabilities


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """One share per member; they add up to 1."""
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count or not all(0 < weight < math.inf for weight in given):
        raise ValueError(f"expected one positive weight for each of {count} members, found {given}")
    return [weight / sum(given) for weight in given]


def _combined(
    blocks: Sequence[_Block], shares: Sequence[float], z: int, regions: Regions, with_probabilities: bool,
) -> tuple[NDArray[np.integer], Tensor | None]:
    """Return the decision for output plane z of some rows, and the mean probabilities (rows, columns, classes) if they exist."""
    if len(blocks) == 1 and not with_probabilities:
        block = blocks[0]
        return (block.labels(z) if block.source.on_cpu else block.source.decide(block.dense(z), regions)), None
    if len(blocks) == 1:
        values = blocks[0].dense(z)
        return blocks[0].source.decide(values, regions), _probabilities(values, regions)
    mean = shares[0] * _probabilities(blocks[0].dense(z), regions)
    for block, share in zip(blocks[1:], shares[1:], strict=True):
        mean = mean + share * _probabilities(block.dense(z), regions).to(mean.device)
    return _decide_rows(mean, regions, 0.5), mean


def restore_labels(logits_czyx: Tensor, placement: Placement, region_values: Regions = None) -> NDArray[np.integer]:
    """Return the labels (inside indices, uint8 or int16) of one prediction on the stored grid; see `restore_ensemble`."""
    return restore_ensemble([(logits_czyx, placement)], region_values)[0]


def restore_probabilities(logits_czyx: Tensor, placement: Placement, regions: bool = False) -> NDArray[np.float32]:
    """Return float32 (C, z, y, x) probabilities on the stored grid: softmax, or sigmoid for regions, of interpolated logits.

    Outside the crop background is 1 and everything else 0.
    """
    values = tuple(range(1, logits_czyx.shape[0] + 1)) if regions else None
    probabilities = restore_ensemble([(logits_czyx, placement)], values, with_probabilities=True)[1]
    assert probabilities is not None
    return probabilities
