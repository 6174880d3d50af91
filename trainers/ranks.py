"""One run over several processes: each takes its part of every batch, and all take the same step.

The loss is that of the whole batch, whatever the loss: outputs and labels of all ranks are gathered, its gradient with respect to
the outputs is taken once on every rank, each rank carries its own part of that gradient back through its network, and the
gradients of the parameters are added up. So batch Dice, means over annotated voxels and losses of plug-ins are what they are on
one device, up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import distributed

from autoseg.contracts import Batch

BUCKET_BYTES = 32 << 20  # gradients are added up in pieces of this size
TIMEOUT = timedelta(days=2)  # the others wait while the first prepares data or validates


@dataclass(frozen=True)
class Ranks:
    """This process among all that train one run; the first one writes the files."""

    rank: int
    world: int

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and validates."""
        return self.rank == 0

    def part(self, batch_size: int) -> slice:
        """The samples of each batch that this rank reads: consecutive, none empty. Raises ValueError when there are too few."""
        if batch_size < self.world:
            raise ValueError(f"a batch of {batch_size} cannot be divided among {self.world} processes")
        return slice(self.rank * batch_size // self.world, (self.rank + 1) * batch_size // self.world)

    def whole(self, own: Batch, targets: int) -> Batch:
        """The whole batch of which every rank has its part; `cases` stays what this rank has."""
        size = torch.tensor([len(own.image), int(own.labelled is not None)], device=own.image.device)
        distributed.all_reduce(size)
        count, partly = (int(value) for value in size)
        labelled = own.labelled
        if partly and labelled is None:
            labelled = torch.ones(len(own.image), targets, dtype=torch.bool, device=own.image.device)
        every = None if labelled is None else self.gather(labelled.to(torch.uint8), count).bool()
        return replace(own, image=self.gather(own.image, count), label=self.gather(own.label, count), labelled=every)

    def gather(self, own: torch.Tensor, batch_size: int) -> torch.Tensor:
        """The whole batch (batch_size, ...) of what every rank has its part of, without gradients."""
        own = own.detach().contiguous()
        shapes = [Ranks(rank, self.world).part(batch_size) for rank in range(self.world)]
        pieces = [own.new_empty((part.stop - part.start, *own.shape[1:])) for part in shapes]
        if len({len(piece) for piece in pieces}) == 1:
            distributed.all_gather(pieces, own)
        else:  # not every backend gathers tensors of different sizes
            for rank, piece in enumerate(pieces):
                if rank == self.rank:
                    piece.copy_(own)
                distributed.broadcast(piece, rank)
        return torch.cat(pieces)

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by the sum over all ranks."""
        bucket: list[torch.Tensor] = []
        size = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            size += parameter.grad.numel() * parameter.grad.element_size()
            if size >= BUCKET_BYTES:
                _add(bucket)
                bucket, size = [], 0
        if bucket:
            _add(bucket)

    def any(self, number: int, device: torch.device) -> int:
        """The largest number that any rank says, so that all do the same: which signal came, for example."""
        value = torch.tensor([number], dtype=torch.int64, device=device)
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return int(value)

    def __enter__(self) -> Ranks:
        """Train together until the end of the context."""
        return self

    def __exit__(self, *ended: object) -> None:
        distributed.destroy_process_group()

    def wait(self) -> None:
        """Go on when every rank is here."""
        distributed.barrier()


def _add(tensors: list[torch.Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    totals = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, total in zip(tensors, totals, strict=True):
        tensor.copy_(total.view_as(tensor))


def join(rank: int, world: int, device: torch.device) -> Ranks:
    """Join the other processes; where they meet is in the environment (MASTER_ADDR, MASTER_PORT), as torchrun sets it."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, rank=rank, world_size=world, timeout=TIMEOUT)
    return Ranks(rank, world)
