"""Predicted against measured memory of a training step.

    python tests/benchmarks/memory.py cpu
    python tests/benchmarks/memory.py cuda [--budgets 4,8,16,24,40] [--modes eager,compiled]

cpu: what autograd keeps of one forward pass and loss (unique storages, parameters left out), at realistic widths; and, as a note,
how much the process grew in a whole step. cuda: for each budget the planner fit plans an abdominal CT data set, and each of its
configurations takes five training steps in a process of its own, in which the allocator is capped at the budget. Within the
promise: `allocated` within 8 % of the prediction in eager mode, `reserved` never above the budget, no step out of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from autoseg.contracts import Batch
from autoseg.networks.build import build
from autoseg.networks.describe import describe
from autoseg.networks.hardware import Resolved, autocast
from autoseg.networks.memory import Memory, training_memory
from autoseg.planners import fit, rules
from autoseg.planners.search import ALLOCATOR_SHARE, CONTEXT_GB
from autoseg.trainers.losses import head_count, make_loss
from autoseg.trainers.optimizers import make_optimizer
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.fingerprint import CaseFingerprint, Fingerprint, Intensities
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan
from autoseg.types.record import Spec
from autoseg.types.run import LossSpec, OptimizerSpec

GB = 2**30
STEPS = 5
CPU_PATCHES: tuple[tuple[rules.Network, tuple[int, ...], int], ...] = (
    ("unet", (64, 64, 64), 2), ("unet", (48, 64, 96), 2), ("unet", (12, 128, 128), 2), ("unet", (256, 256), 4),
    ("residual-unet", (64, 64, 64), 2), ("residual-unet", (192, 224), 4),
)
LABELS = Labels(foreground=(Label(name="kidney", value=1), Label(name="tumour", value=2)))


def configuration(network: rules.Network, patch: tuple[int, ...], batch: int) -> Configuration:
    """What the planner's rules make of a patch; a first axis of 12 stands for thick slices."""
    spacing = tuple(5.0 if edge == 12 else 1.0 for edge in patch)
    layout = rules.topology(spacing, patch)
    stages = len(layout.strides)
    return Configuration(
        patch_size=layout.patch_size, batch_size=batch, spacing=spacing, median_shape=tuple(map(float, patch)),
        network=Spec(kind=network), strides=layout.strides, kernel_sizes=layout.kernel_sizes,
        features_per_stage=rules.features_per_stage(stages, len(patch)), blocks_per_stage=rules.blocks_per_stage(network, stages),
        decoder_blocks_per_stage=rules.decoder_blocks_per_stage(network, stages), batch_dice=False,
        normalization=("CTNormalization",), use_mask_for_norm=(False,),
    )


def abdomen(memory_gb: float) -> Plan:
    """The plan of a data set like KiTS19."""
    names = [f"case_{i}" for i in range(131)]
    shape = (432, 512, 512)
    dataset = Dataset(name="abdomen", source="folder", root="/", channels=("CT",), labels=LABELS,
                      cases=tuple(CaseFiles(case=name, images=()) for name in names))
    intensities = Intensities(mean=100, median=100, std=80, min=-1000, max=2000, percentile_99_5=300, percentile_00_5=-80)
    cases = tuple(CaseFingerprint(case=name, shape=shape, shape_after_crop=shape, spacing=(1.0, 0.767, 0.767),
                                  relative_size_after_crop=1.0) for name in names)
    fingerprint = Fingerprint(cases=cases, intensities=(intensities,), median_relative_size_after_cropping=1.0)
    return fit.plan(dataset, fingerprint, memory_gb)


class Step:
    """A training step as the trainer takes it, on random data."""

    def __init__(self, made: Configuration, precision: Resolved, device: torch.device, channels: int, compiled: bool) -> None:
        description = describe(made, channels, LABELS.output_count)
        self.network = build(description, seed=0).to(device)
        self.heads = head_count(len(description.heads), deep_supervision=True)
        self.run: Any = torch.compile(self.network) if compiled else self.network
        self.loss = make_loss(LossSpec(), LABELS, made.batch_dice)
        self.optimizer = make_optimizer(self.network, OptimizerSpec())
        size = (made.batch_size, *made.patch_size)
        self.batch = Batch(torch.randn(size[0], channels, *size[1:], device=device), torch.randint(0, 3, size, device=device), ())
        self.device, self.precision = device, precision

    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with autocast(self.device, self.precision):
            outputs = self.run(self.batch.image, self.heads)
        return self.loss(outputs, self.batch, 0.0), outputs

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss, outputs = self.forward()  # the logits live through the backward pass, as in the trainer
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12.0)
        self.optimizer.step()
        del outputs

    def saved(self) -> int:
        """Bytes that autograd saves in one forward pass and loss."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.network.parameters()}
        seen: dict[int, int] = {}
        alive = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward()
        return sum(seen.values())


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at the most (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def cpu_row(network: rules.Network, patch: tuple[int, ...], batch: int, precision: Resolved) -> str:
    """One line of the table, measured in this process, which should be a fresh one."""
    made = configuration(network, patch, batch)
    memory = training_memory(made, 1, LABELS.output_count, precision, device="cpu")
    before = resident("VmRSS")
    step = Step(made, precision, torch.device("cpu"), 1, compiled=False)
    step()
    grown = resident("VmHWM") - before
    found = step.saved()
    predicted = memory.saved + memory.loss
    return (f"| {network} | {' x '.join(map(str, made.patch_size))} | {batch} | {precision} | {predicted / 2**20:.1f} "
            f"| {found / 2**20:.1f} | {predicted / found - 1:+.2%} | {memory.total / 2**20:.0f} | {grown / 2**20:.0f} |")


def cuda_row(memory_gb: float, name: str, mode: str) -> str:
    """One line of the table, measured in this process, whose allocator is capped at the budget."""
    device = torch.device("cuda", 0)
    plan = abdomen(memory_gb)
    made = plan.configurations[name]
    channels = 1 + (len(LABELS.foreground) if made.previous_stage else 0)
    memory: Memory = training_memory(made, channels, LABELS.output_count, plan.precision)
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * GB / torch.cuda.get_device_properties(device).total_memory))
    row = [f"{memory_gb:g}", name, " x ".join(map(str, made.patch_size)), str(made.batch_size), str(made.checkpointing), mode,
           f"{memory.total / GB:.2f}"]
    try:
        step = Step(made, plan.precision, device, channels, compiled=mode == "compiled")
        for index in range(STEPS):
            if index == STEPS - 1:  # compiling, and choosing algorithms, are over
                torch.cuda.synchronize()
                begin = time.perf_counter()
            step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    except torch.OutOfMemoryError:
        return "| " + " | ".join([*row, "out of memory", "", "", "", ""]) + " |"
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free  # context included, and whatever else runs on the card
    row += [f"{allocated / GB:.2f}", f"{memory.total / allocated - 1:+.1%}", f"{reserved / GB:.2f}", f"{taken / GB:.2f}",
            f"{seconds * 1000:.0f}"]
    return "| " + " | ".join(row) + " |"


def alone(*arguments: str) -> str:
    """A row from a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        return f"| {' '.join(arguments)}: failed | {(done.stderr.strip().splitlines() or ['no message'])[-1]} |"
    return done.stdout.strip().splitlines()[-1]


def cpu() -> None:
    print(f"torch {torch.__version__}, CPU, one channel, {LABELS.output_count} classes; MiB\n")
    print("| network | patch | batch | precision | predicted kept | kept | difference | predicted peak | process grew by |")
    print("|---|---|---|---|---|---|---|---|---|")
    for index in range(len(CPU_PATCHES)):
        for precision in ("fp32", "bf16"):
            print(alone("cpu-row", str(index), precision), flush=True)


def cuda(budgets: list[float], modes: list[str]) -> None:
    card = torch.cuda.get_device_properties(0)
    print(f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {card.name}; GiB and ms")
    print(f"fit leaves {CONTEXT_GB} GiB for the context and {ALLOCATOR_SHARE:.0%} of the budget for the allocator\n")
    print("| budget | configuration | patch | batch | recomputed stages | mode | predicted | allocated | difference | reserved "
          "| taken of the card | step |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for budget in budgets:
        if budget * GB > card.total_memory:
            print(f"| {budget:g} | more than the card has |")
            continue
        for name in abdomen(budget).configurations:
            for mode in modes:
                print(alone("cuda-row", json.dumps([budget, name, mode])), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cpu", "cuda", "cpu-row", "cuda-row"])
    parser.add_argument("row", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--budgets", default="4,8,16,24,40")
    parser.add_argument("--modes", default="eager,compiled")
    given = parser.parse_args()
    if given.what == "cpu":
        cpu()
    elif given.what == "cpu-row":
        print(cpu_row(*CPU_PATCHES[int(given.row[0])], given.row[1]))
    elif given.what == "cuda-row":
        print(cuda_row(*json.loads(given.row[0])))
    elif torch.cuda.is_available():
        cuda([float(budget) for budget in given.budgets.split(",")], given.modes.split(","))
    else:
        print("there is no CUDA device here")


if __name__ == "__main__":
    main()
