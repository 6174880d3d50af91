"""One run over several processes: who this process is, as torchrun or SLURM say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autoseg.errors import RunError

if TYPE_CHECKING:
    from autoseg.trainers.ranks import Ranks

# rank, number of processes, number on this machine
LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


def join_ranks(environment: Mapping[str, str], device: str) -> tuple[Ranks | None, str]:
    """Join the processes that were started together, and name this one's device; None where this is the only process.

    SLURM's variables count only where MASTER_ADDR says that its tasks are meant to train together.

    Raises:
        RunError: the environment names processes but not where they meet.
    """
    from autoseg.networks.hardware import pick_device
    from autoseg.trainers.ranks import join

    for index, names in enumerate(LAUNCHERS):
        rank, world, local = (environment.get(name) for name in names)
        if not world or int(world) < 2 or (index and "MASTER_ADDR" not in environment):
            continue
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if rank is None or missing:
            raise RunError(
                f"{names[1]} says that {world} processes train together, but {', '.join(missing) or names[0]} is not set; start "
                "them with torchrun, or export what is missing in the job script"
            )
        import torch

        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{int(local or 0) % torch.cuda.device_count()}"
            torch.cuda.set_device(device)
        return join(int(rank), int(world), pick_device(device)), device
    return None, device
