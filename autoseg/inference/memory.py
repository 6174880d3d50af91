"""How a prediction fits into memory: what a case takes is reckoned first, then how it is computed is chosen."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

from autoseg.arrays.tiles import Tiling
from autoseg.files.machine import memory_available_bytes

GB = 2**30
_MARGIN, _LEAST_MARGIN = 0.04, 192 << 20  # of a limit: what threads, allocators and libraries take beside what is reckoned
_SHARED = 0.1  # of free memory: other processes take some meanwhile
_SLAB = 3  # planes of logits beside the open ones, in the hands of restoring
_KEPT = 2  # times the network's work: what stays in pieces when freed memory is kept
_FLOAT, _HALF = 4, 2


@dataclass(frozen=True)
class Limits:
    """Bytes that may be used: `ram` by the whole process, `gpu` on the card; None means what is free."""

    ram: int | None = None
    gpu: int | None = None

    @classmethod
    def of_gb(cls, ram: float | None, gpu: float | None) -> Limits:
        """Limits in GB (2**30 bytes)."""
        return cls(*(None if one is None else int(one * GB) for one in (ram, gpu)))

    def free_ram(self) -> int:
        """Bytes that this process may still take now."""
        free = int(memory_available_bytes() * (1 - _SHARED))
        if self.ram is None:
            return free
        return max(0, min(free, self.ram - max(int(self.ram * _MARGIN), _LEAST_MARGIN) - resident_bytes()))

    def free_gpu(self, reachable: int, held: int) -> int:
        """Bytes of the card that may still be taken, of those that are free or this process's; its tensors, `held`, stay."""
        most = reachable if self.gpu is None else min(reachable, self.gpu)
        return max(0, int(most * (1 - _MARGIN)) - held)


@dataclass(frozen=True)
class StreamLoad:
    """What the logits of one member take: `channels` are held over the open planes, `tile_bytes` is the network's work on a tile.

    `half` says that they are held in float16 whatever the memory.
    """

    tiling: Tiling
    channels: int
    tile_bytes: int
    half: bool = False

    @property
    def logit_bytes(self) -> int:
        """Bytes of one tile's logits."""
        return _FLOAT * self.channels * math.prod(self.tiling.patch)

    def held_bytes(self, batch: int, half: bool) -> int:
        """Bytes of open planes, their weights, and the planes in the hands of restoring."""
        _, rows, columns = self.tiling.padded
        planes = self.tiling.open_planes(batch) + _SLAB
        return planes * rows * columns * (self.channels + 1) * (_HALF if half or self.half else _FLOAT)


@dataclass(frozen=True)
class CaseLoad:
    """What one case takes beside the networks.

    `streams` are computed side by side. `made_bytes` is what the result will hold. `image_bytes` is what the networks see, which
    is copied to an accelerator when it fits; there restoring takes `restoring_bytes`.
    """

    streams: tuple[StreamLoad, ...]
    made_bytes: int
    image_bytes: int
    restoring_bytes: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """How a case is computed: tiles at once, float16 or float32 logits, where they lie, whether the next case is read meanwhile.

    `ram_bytes` and `gpu_bytes` are what it takes beside what is held already. `keep` says that memory which a tile frees may stay
    with the process for the next tile, which is faster and takes more.
    """

    batch: int
    half: bool
    on_device: bool
    read_ahead: bool
    ram_bytes: int
    gpu_bytes: int = 0
    keep: bool = False


def plan_memory(load: CaseLoad, batch: int, free_ram: int, free_gpu: int | None = None, next_bytes: int = 0) -> MemoryPlan:
    """Choose the fastest way that fits: fewer tiles at once, then no reading ahead, then float16, then logits off the card.

    Args:
        load: what the case takes.
        batch: tiles wanted at once.
        free_ram: bytes of main memory that may still be taken.
        free_gpu: bytes on the card, when the networks are on one.
        next_bytes: what reading the next case takes.

    Raises:
        MemoryError: nothing fits; says what the leanest way would take.
    """
    sizes = sorted({max(1, batch >> i) for i in range(batch.bit_length())}, reverse=True)
    places = (True,) if free_gpu is None else (True, False)
    least: MemoryPlan | None = None
    for on_device, half, ahead, size in itertools.product(places, (False, True), (True, False), sizes):
        plan = _reckon(load, size, half, on_device, ahead, next_bytes, free_gpu is not None, free_ram)
        if plan.ram_bytes <= free_ram and (free_gpu is None or plan.gpu_bytes <= free_gpu):
            return plan
        least = plan
    assert least is not None
    parts = [f"{least.ram_bytes / GB:.2f} GiB of memory, {free_ram / GB:.2f} GiB are free"]
    if free_gpu is not None:
        parts.append(f"{least.gpu_bytes / GB:.2f} GiB on the GPU, {free_gpu / GB:.2f} GiB are free there")
    shape = " x ".join(map(str, load.streams[0].tiling.shape))
    raise MemoryError(f"{shape} voxels with {load.streams[0].channels} outputs need at least {'; '.join(parts)}")


def least_bytes(load: CaseLoad, gpu: bool) -> int:
    """Main memory of the leanest way: one tile at once, float16, nothing read ahead, logits on the card where there is one."""
    return _reckon(load, 1, half=True, on_device=True, ahead=False, next_bytes=0, gpu=gpu).ram_bytes


def _reckon(
    load: CaseLoad, batch: int, half: bool, on_device: bool, ahead: bool, next_bytes: int, gpu: bool, free_ram: int = 0
) -> MemoryPlan:
    held = sum(stream.held_bytes(batch, half) for stream in load.streams)
    work = max(stream.tile_bytes * batch for stream in load.streams)  # where tiles are few, mirrored copies fill the batch
    ram, card = load.made_bytes + (next_bytes if ahead else 0), 0
    if gpu:
        card = work + (held + load.image_bytes + load.restoring_bytes if on_device else 0)
        ram += 0 if on_device else held + batch * max(stream.logit_bytes for stream in load.streams)
    else:
        ram += held + work
    return MemoryPlan(batch, half, on_device, ahead, ram, card, not gpu and ram + _KEPT * work <= free_ram)


def reading_bytes(voxels: int, channels: int, itemsize: int, finer: float) -> int:
    """The most that reading and preprocessing an image takes; `finer` is how many voxels one becomes by resampling, in all."""
    stored = voxels * channels * itemsize
    as_float = voxels * channels * _FLOAT
    return int(stored + max(stored, voxels + as_float * (1 + 1.5 * max(1.0, finer))))


def resident_bytes() -> int:
    """Bytes of main memory that this process holds; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
