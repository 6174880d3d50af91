"""Doctor: what this machine offers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from autoseg import __version__
from autoseg.files.machine import cores, disk_free_bytes, memory_available_bytes, memory_limit_bytes

LIBRARIES = (
    "torch",
    "numpy",
    "scipy",
    "scikit-image",
    "SimpleITK",
    "batchgenerators",
    "pandas",
    "blosc2",
    "safetensors",
    "numba",
)


def examine(folder: Path) -> list[tuple[str, str]]:
    """Names and values, in the order in which they are shown; `folder` is where disk space is measured."""
    import torch

    from autoseg.networks.hardware import cpu_has_bf16, pick_device, pick_precision

    rows = [
        ("autoseg", __version__),
        ("python", platform.python_version()),
        ("system", f"{platform.system()} {platform.machine()}"),
        ("cores allowed", str(cores())),
        ("memory", f"{memory_limit_bytes() / 2**30:.1f} GiB allowed, {memory_available_bytes() / 2**30:.1f} GiB free"),
        ("disk free", f"{disk_free_bytes(folder) / 2**30:.0f} GiB at {folder}"),
        ("bf16 on CPU", "yes" if cpu_has_bf16() else "no"),
    ]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        rows.append(
            (
                f"GPU cuda:{index}",
                f"{card.name}, {card.total_memory / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free, "
                f"bf16 {'yes' if card.major >= 8 else 'no'}",
            )
        )
    if not torch.cuda.is_available():
        rows.append(("GPU", "Apple (mps)" if torch.backends.mps.is_available() else "none found"))
    device = pick_device("auto")
    rows.append(("would train on", f"{device} in {pick_precision(device)}"))
    for library in LIBRARIES:
        try:
            rows.append((library, version(library)))
        except PackageNotFoundError:
            rows.append((library, "missing"))
    return rows
