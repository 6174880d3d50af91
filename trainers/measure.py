"""How long a training step takes here, and how much memory it needs."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from autoseg.errors import RunError
from autoseg.files.allocator import memory_kept
from autoseg.networks.hardware import is_out_of_memory, peak_memory_bytes, reset_peak
from autoseg.trainers.default import Job, Training
from autoseg.trainers.sampling import TRAINING
from autoseg.trainers.setbacks import NotFinite


@dataclass(frozen=True)
class Measured:
    """A training step as measured: seconds (the mean over a run), reading and augmentation included, and at the patch's full size
    the peak of a GPU's memory and the micro-batch."""

    seconds: float
    peak_bytes: int | None
    micro_batch: int


def measure_step(job: Job, seconds: float = 0.0, steps: int = 3) -> Measured:
    """Run at least `steps` steps of this job, for at least `seconds`, on a network that is thrown away."""
    training = Training(job)
    loader = training._loader(job.training)
    times: list[float] = []
    reset_peak(job.device)
    begin = start = time.perf_counter()
    batches = loader.batches(TRAINING, job.spec.total_steps, sys.maxsize)  # patches may have grown by then
    try:
        with memory_kept():
            for batch in batches:
                with contextlib.suppress(NotFinite):  # training will say so, with the cases; it takes as long
                    training.train_step(batch)
                if job.device.type == "cuda":
                    torch.cuda.synchronize(job.device)
                now = time.perf_counter()
                times.append(now - begin)
                begin = now
                if len(times) > steps and now - start >= seconds:
                    break
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory on {job.device} even with one patch at a time; plan smaller patches: autoseg plan DATASET --out WORK "
            "--replan --planner fit --gpu-memory GB"
        ) from None
    finally:
        batches.close()
        loader.close()
    mean = statistics.median(times[1:]) * loader.recipes.sizes.work  # the first one warms up
    return Measured(mean, peak_memory_bytes(job.device), training.micro_batch)
