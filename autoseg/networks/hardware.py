"""Which device and which precision: decided from what the hardware has."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from autoseg.errors import RunError

Resolved = Literal["bf16", "fp16", "fp32"]


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; auto prefers CUDA, then Apple's GPU, then the CPU.

    Raises:
        RunError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type in ("cpu", "cuda", "mps"):
            return device
        reason = "it is not a device to train or predict on"
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise RunError(f"device {name!r} cannot be used here: {reason}; choose auto, cpu, cuda, cuda:1 or mps")


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # older releases of torch have neither
    return any(getattr(torch.cpu, name, bool)() for name in names)


def pick_precision(device: torch.device, wanted: str = "auto") -> Resolved:
    """The precision to compute in: bf16 where the hardware has it, fp16 on older CUDA cards, else fp32.

    Raises:
        RunError: unknown precision, or fp16 away from CUDA.
    """
    if wanted == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"
    if wanted not in ("bf16", "fp16", "fp32"):
        raise RunError(f"unknown precision {wanted!r}; choose auto, bf16, fp16 or fp32")
    if wanted == "fp16" and device.type != "cuda":
        raise RunError(f"precision fp16 needs a CUDA device, found {device.type}; choose bf16 or fp32")
    return wanted  # type: ignore[return-value]


# what torch and its libraries say for want of memory without the class for it; cuDNN finds no engine whose workspace fits
OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "unable to find an engine",
    "cudnn_status_alloc_failed", "cublas_status_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of the device's or the machine's memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)


def autocast(device: torch.device, precision: Resolved) -> AbstractContextManager[object]:
    """A context in which the network computes in `precision`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def free_gpu_gb(device: torch.device | None = None) -> float | None:
    """GB (2**30 bytes) that this process may still take or already holds on a CUDA card, the first unless given; else None."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / 2**30


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of the peak, where the device has one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that tensors took since `reset_peak`, None where the device does not say."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
