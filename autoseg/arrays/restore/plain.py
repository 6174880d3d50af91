"""Restoring with torch: on an accelerator, and in main memory where nothing can be compiled."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.arrays.restore.sources import Job, Member, RestoredPlane

_BLOCK_BYTES = 4 << 20  # interpolated rows worked on at once: they stay in the processor's cache
_DEVICE_BLOCK_BYTES = 256 << 20  # on an accelerator larger blocks cost fewer launches
_KEPT_BYTES = 64 << 20  # interpolated planes are kept for the next output plane where they are no larger than this
_DENSE_FROM = 0.3  # share of voxels near a border above which computing every voxel is faster


def plain_planes(job: Job) -> Iterator[RestoredPlane]:
    """Restore a job plane after plane; the work is done where the first member's logits lie."""
    members = [_PlainMember(member, job) for member in job.members]
    depth, height, width = job.size
    device = members[0].device
    table = torch.as_tensor(job.table, device=device)
    limit = _BLOCK_BYTES if device.type == "cpu" else _DEVICE_BLOCK_BYTES
    rows = max(1, limit // (4 * width * job.classes * len(members)))
    for z in range(depth):
        with torch.no_grad():
            for member in members:
                member.move_to(z)
            label = np.empty((height, width), job.table.dtype)
            mean = np.empty((job.classes, height, width), np.float32) if job.with_probabilities else None
            for start in range(0, height, rows):
                block = slice(start, min(height, start + rows))
                decided, probable = _block(job, members, z, block)
                label[block] = table[decided].cpu().numpy()
                if mean is not None and probable is not None:
                    mean[:, block] = probable.cpu().numpy()
        yield RestoredPlane(z, label, mean)


def _block(job: Job, members: list[_PlainMember], z: int, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Decisions (rows, columns) of output plane z, and mean probabilities (classes, rows, columns) where asked for."""
    if len(members) == 1 and not job.with_probabilities:
        return members[0].decisions(z, rows), None
    device = members[0].device
    values = [member.dense(z, rows) for member in members]
    tempered = _mean(job, members, values, True, device) if job.with_probabilities else None
    if len(members) == 1:
        return members[0].decide(values[0]), tempered
    mean = tempered if tempered is not None and job.dense else _mean(job, members, values, False, device)
    return _decide(mean, job.regions, 0.5), tempered


def _mean(job: Job, members: list[_PlainMember], values: list[Tensor], tempered: bool, device: torch.device) -> Tensor:
    total = torch.zeros((), device=device)
    for member, logits in zip(members, values, strict=True):
        own = logits * member.member.scale if tempered and member.member.scale != 1 else logits
        total = total + member.member.share * (torch.sigmoid(own) if job.regions else torch.softmax(own, 0)).to(device)
    return total


def _decide(values: Tensor, regions: bool, threshold: float) -> Tensor:
    """The winning class along the first axis, or with regions 1 + the last one above `threshold` (0 for none)."""
    if not regions:
        return values.argmax(0)
    place = torch.arange(1, len(values) + 1, device=values.device).view(-1, *(1,) * (values.ndim - 1))
    return ((values > threshold) * place).amax(0)


class _Axis:
    """Interpolation taps of one axis, on a device."""

    def __init__(self, member: Member, axis: int) -> None:
        taps, device = member.taps[axis], member.source.device
        self.low, self.high = torch.as_tensor(taps.low, device=device), torch.as_tensor(taps.high, device=device)
        self.weight = torch.as_tensor(taps.weight.astype(np.float32), device=device)
        self.interpolates = member.interpolates[axis]
        self.copies = not self.interpolates and bool(np.array_equal(taps.low, np.arange(member.shape[axis])))

    def apply(self, values: Tensor, axis: int, part: slice = slice(None), start: int = 0) -> Tensor:
        """Interpolate `values`, which begin at source voxel `start`, at some output places along `axis`."""
        low = values if self.copies and part == slice(None) else values.index_select(axis, self.low[part] - start)
        if not self.interpolates:
            return low
        weight = self.weight[part].view(*(-1 if a == axis else 1 for a in range(values.ndim)))
        return torch.lerp(low, values.index_select(axis, self.high[part] - start), weight)


class _PlainMember:
    """One member's planes, interpolated and decided."""

    def __init__(self, member: Member, job: Job) -> None:
        self.member, self.regions, self.half = member, job.regions, job.half
        self.device = member.source.device
        self.rows, self.columns = _Axis(member, 1), _Axis(member, 2)
        plane = 4 * job.classes * job.size[1] * job.size[2]
        self._keeps = plane <= (_KEPT_BYTES if self.device.type == "cpu" else 16 * _KEPT_BYTES)
        self._planes: dict[int, Tensor] = {}
        self._dense: dict[tuple[int, int], Tensor] = {}
        self._decided: dict[int, Tensor] = {}

    def move_to(self, z: int) -> None:
        """Hold what output plane z needs, and drop what lies before it."""
        self._planes = self.member.fetch(z, z)
        low = self.member.ends(z)[0]
        self._dense = {key: values for key, values in self._dense.items() if key[0] >= low}
        self._decided = {key: values for key, values in self._decided.items() if key >= low}

    def dense(self, z: int, rows: slice) -> Tensor:
        """Logits of some rows of output plane z, float32 (classes, rows, columns)."""
        low, high, weight = self.member.ends(z)
        first = self._dense_plane(low, rows)
        return torch.lerp(first, self._dense_plane(high, rows), weight) if weight else first

    def _dense_plane(self, k: int, rows: slice) -> Tensor:
        key = (k, rows.start)
        if key in self._dense:
            return self._dense[key]
        begin, end = int(self.rows.low[rows][0]), int(self.rows.high[rows][-1]) + 1
        values = self._planes[k][:, begin:end].float()
        values = self.columns.apply(self.rows.apply(values, 1, rows, begin), 2)
        if self._keeps:
            self._dense[key] = values
        return values

    def decide(self, values: Tensor) -> Tensor:
        """The decision along the first axis of interpolated logits."""
        return _decide(values.half().float() if self.half else values, self.regions, 0.0)

    def _coarse(self, k: int) -> Tensor:
        """The decision at each voxel of source plane k."""
        if k not in self._decided:
            plane = self._planes[k]
            rows = max(1, _BLOCK_BYTES // (4 * plane[:, 0].numel()))
            self._decided[k] = torch.cat([self.decide(part.float()) for part in torch.split(plane, rows, 1)])
        return self._decided[k]

    def decisions(self, z: int, rows: slice) -> Tensor:
        """Decisions at some rows of output plane z; in main memory only those next to a border are computed."""
        if self.device.type != "cpu":
            return self.decide(self.dense(z, rows))
        low, high, weight = self.member.ends(z)
        begin, end = int(self.rows.low[rows][0]), int(self.rows.high[rows][-1]) + 1
        near = self._coarse(low)[begin:end].numpy()
        smallest = largest = near
        if weight:
            far = self._coarse(high)[begin:end].numpy()
            smallest, largest = np.minimum(near, far), np.maximum(near, far)
        mixed = _spread(smallest, largest, self.rows.interpolates, self.columns.interpolates)
        y_low, x_low = self.rows.low[rows].numpy() - begin, self.columns.low.numpy()
        places = np.flatnonzero(mixed[y_low][:, x_low])
        if len(places) > _DENSE_FROM * len(y_low) * len(x_low):
            return self.decide(self.dense(z, rows))
        result = torch.from_numpy(np.ascontiguousarray(near[y_low][:, x_low]))
        if len(places):
            y, x = (torch.from_numpy(index) for index in np.divmod(places, len(x_low)))
            values = self._at(low, y + rows.start, x)
            if weight:
                values = torch.lerp(values, self._at(high, y + rows.start, x), weight)
            result.view(-1)[torch.from_numpy(places)] = self.decide(values)
        return result

    def _at(self, k: int, y: Tensor, x: Tensor) -> Tensor:
        """Logits of source plane k interpolated in the plane at output rows y and columns x, (classes, points)."""
        plane, down, across = self._planes[k], self.rows.weight[y], self.columns.weight[x]
        ends = []
        for column in (self.columns.low[x], self.columns.high[x]):
            upper, lower = (plane[:, row, column].float() for row in (self.rows.low[y], self.rows.high[y]))
            ends.append(torch.lerp(upper, lower, down))
        return torch.lerp(ends[0], ends[1], across)


def _spread(
    smallest: NDArray[np.integer], largest: NDArray[np.integer], rows: bool, columns: bool,
) -> NDArray[np.bool_]:
    """Return at the low corner of each cell whether its corners hold different decisions."""
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
