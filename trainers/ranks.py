"""One run over several processes: each takes its part of every batch, and all take the same step.

The loss is that of the whole batch, whatever the loss: outputs and labels of all ranks are gathered, its gradient with respect to
the outputs is taken once on every rank, each rank carries its own part of that gradient back through its network, and the
gradients of the parameters are added up. So batch Dice, means over annotated voxels and losses of plug-ins are what they are on
one device, up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from autoseg.contracts import Batch
from autoseg.errors import AutosegError, RunError
from autoseg.networks.hardware import is_out_of_memory

T = TypeVar("T")

BUCKET_BYTES = 32 << 20  # gradients are added up in pieces of this size
TIMEOUT = timedelta(days=2)  # the others wait while the first prepares data or validates


@dataclass(frozen=True)
class Ranks:
    """This process among all that train one run; the first one writes the files.

    `words` is the group in which numbers on the CPU are told, so that no word waits for a device.
    """

    rank: int
    world: int
    words: distributed.ProcessGroup | None = field(default=None, compare=False, repr=False)

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

    def any(self, number: int) -> int:
        """The largest number that any rank says, so that all do the same: which signal came, for example."""
        return self.every([number])[0]

    def every(self, numbers: Sequence[int]) -> list[int]:
        """`any` of each of several numbers."""
        values = torch.tensor(numbers, dtype=torch.int64)
        distributed.all_reduce(values, distributed.ReduceOp.MAX, group=self.words)
        return [int(value) for value in values]

    def together(self, what: str, do: Callable[[], T]) -> T:
        """Do something that needs no other rank; where it fails on one, it fails on all, so that none waits for another.

        The rank whose error is the worst raises it; `what` says what the others could not do. A user's error (AutosegError)
        counts more than other errors, and these more than a lack of memory.

        Raises:
            RunError, RuntimeError, OutOfMemoryError: another rank failed, with an error of this kind.
        """
        try:
            made = do()
        except Exception as error:
            kind = _kind(error)
            worst = self.any(kind)
            if worst == kind:
                raise
            raise _elsewhere(worst, what) from None
        worst = self.any(0)
        if worst:
            raise _elsewhere(worst, what)
        return made

    def copy_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank the first one's values."""
        for tensor in tensors:
            values = tensor.detach().contiguous()
            distributed.broadcast(values, 0)
            with torch.no_grad():
                tensor.copy_(values)

    def __enter__(self) -> Ranks:
        """Train together until the end of the context."""
        return self

    def __exit__(self, *ended: object) -> None:
        distributed.destroy_process_group()

    def wait(self) -> None:
        """Go on when every rank is here."""
        distributed.barrier()


def _kind(error: Exception) -> int:
    """How bad an error is: 3 the user can mend it, 2 any other, 1 memory."""
    return 3 if isinstance(error, AutosegError) else 1 if is_out_of_memory(error) else 2


def _elsewhere(kind: int, what: str) -> Exception:
    """What is raised where another rank had an error of this kind."""
    message = f"another process could not {what}; its message says why"
    if kind == 1:
        return torch.OutOfMemoryError(f"{message} (out of memory)")
    return RunError(message) if kind == 3 else RuntimeError(message)


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
    words = distributed.new_group(backend="gloo", timeout=TIMEOUT) if backend != "gloo" else None
    return Ranks(rank, world, words if isinstance(words, distributed.ProcessGroup) else None)
