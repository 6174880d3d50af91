"""The memory model against torch: what autograd keeps, what the CPU allocates, parameters and arithmetic."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from autoseg.contracts import Batch
from autoseg.networks.build import Network, build
from autoseg.networks.describe import describe
from autoseg.networks.hardware import autocast, free_gpu_gb, peak_memory_bytes, reset_peak
from autoseg.networks.memory import (
    Precision,
    inference_memory,
    multiply_adds,
    parameters,
    recomputed_share,
    saved_bytes,
    training_memory,
)
from autoseg.trainers.losses import head_count, make_loss
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.plan import Configuration
from autoseg.types.record import Spec
from autoseg.types.run import LossSpec

CPU = torch.device("cpu")
ANISOTROPIC = {"strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)), "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3))}


def configuration(
    patch: tuple[int, ...], features: tuple[int, ...], blocks: tuple[int, ...] | None = None, batch: int = 2,
    strides: tuple[tuple[int, ...], ...] | None = None, kernels: tuple[tuple[int, ...], ...] | None = None,
) -> Configuration:
    """A plain network, or a residual one where `blocks` are given."""
    dims, stages = len(patch), len(features)
    return Configuration(
        patch_size=patch, batch_size=batch, spacing=(1.0,) * dims, median_shape=tuple(float(edge) for edge in patch),
        network=Spec(kind="residual-unet" if blocks else "unet"),
        strides=strides or ((1,) * dims, *((2,) * dims,) * (stages - 1)),
        kernel_sizes=kernels or ((3,) * dims,) * stages, features_per_stage=features, blocks_per_stage=blocks or (2,) * stages,
        decoder_blocks_per_stage=(1 if blocks else 2,) * (stages - 1), batch_dice=False, normalization=("NoNormalization",),
        use_mask_for_norm=(False,),
    )


NETWORKS = [
    pytest.param(configuration((16, 24, 16), (8, 16, 16)), id="plain-3d"),
    pytest.param(configuration((4, 32, 32), (8, 16, 16), batch=3, **ANISOTROPIC), id="plain-3d-two-slices-below"),  # type: ignore[arg-type]
    pytest.param(configuration((64, 48), (8, 16, 16, 32), batch=5), id="plain-2d"),
    pytest.param(configuration((16, 16, 24), (8, 16, 16), (1, 2, 2)), id="residual-3d"),
    pytest.param(configuration((4, 32, 32), (8, 8, 16), (2, 2, 1), 1, **ANISOTROPIC), id="residual-3d-two-slices-below"),  # type: ignore[arg-type]
    pytest.param(configuration((48, 64), (8, 16, 16, 32), (1, 2, 2, 2), batch=4), id="residual-2d"),
]
WIDE = [
    pytest.param(configuration((24, 24, 24), (16, 32, 64)), id="plain-3d"),
    pytest.param(configuration((24, 24, 24), (16, 32, 64), (1, 2, 2)), id="residual-3d"),
    pytest.param(configuration((64, 64), (16, 32, 64), batch=6), id="plain-2d"),
]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def labels(classes: int = 3, regions: bool = False, ignore: bool = False) -> Labels:
    """Background and `classes` - 1 labels, or nested regions of them."""
    values = range(1, classes)
    return Labels(
        foreground=tuple(Label(name=f"c{value}", value=value) for value in values),
        ignore=Label(name="ignore", value=99) if ignore else None,
        regions=tuple(Region(name=f"r{value}", values=tuple(range(1, value + 1))) for value in values) if regions else (),
        region_order=tuple(values) if regions else (),
    )


def step_of(config: Configuration, kind: Labels, precision: Precision, channels: int = 2) -> tuple[Network, Callable[[], Any]]:
    """A network, and a function that runs it and its loss on a batch."""
    network = build(describe(config, channels, kind.output_count), seed=0)
    loss = make_loss(LossSpec(), kind, batch_dice=False)
    shape = (config.batch_size, *config.patch_size)
    image, label = torch.randn(shape[0], channels, *shape[1:]), torch.randint(0, 2, shape)

    def run() -> Any:
        with autocast(CPU, precision):
            outputs = network(image, head_count(len(network.description.heads), deep_supervision=True))
        return loss(outputs, Batch(image, label, ()), 0.0), outputs

    return network, run


def bytes_saved(network: Network, run: Callable[[], Any]) -> int:
    """Bytes of the storages that autograd saves while `run` runs, each counted once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    seen: dict[int, int] = {}
    alive = []  # so that no storage is freed and its address used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(seen.values())


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that torch's CPU allocator gave out while `run` ran: the most at a time, and those left while its result lives."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return peak, now


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", NETWORKS)
def test_what_autograd_saves_of_network_and_loss_is_predicted(config: Configuration, precision: Precision) -> None:
    network, run = step_of(config, labels(), precision)
    memory = training_memory(config, 2, 3, precision, device="cpu")
    assert memory.saved + memory.loss == pytest.approx(bytes_saved(network, run), rel=0.002)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("regions", "ignore"), [(True, False), (False, True), (True, True)])
def test_what_the_losses_of_other_kinds_of_labels_save_is_predicted(regions: bool, ignore: bool, precision: Precision) -> None:
    kind, config = labels(6, regions, ignore), configuration((16, 16, 16), (4, 8, 8))
    network, run = step_of(config, kind, precision)
    memory = training_memory(config, 2, kind.output_count, precision, device="cpu", regions=regions, ignore=ignore)
    assert memory.saved + memory.loss == pytest.approx(bytes_saved(network, run), rel=0.002)


@pytest.mark.parametrize("heads", [1, 2])
def test_only_what_leads_to_the_heads_that_run_is_counted(heads: int) -> None:
    config = configuration((32, 32), (8, 16, 16))
    description = describe(config, 1, 40)
    network, image = build(description, seed=0), torch.randn(2, 1, 32, 32)
    found = bytes_saved(network, lambda: network(image, heads))
    assert saved_bytes(description, (32, 32), 2, "fp32", heads=heads) == pytest.approx(found, rel=0.002)


@pytest.mark.parametrize("checkpointing", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", WIDE)
def test_what_is_held_between_the_passes_is_predicted_with_recomputing_too(
    config: Configuration, precision: Precision, checkpointing: int
) -> None:
    config = config.model_copy(update={"checkpointing": checkpointing})
    _, run = step_of(config, labels(), precision, channels=1)
    _, held = allocated(run)
    memory = training_memory(config, 1, 3, precision, device="cpu")
    voxels = math.prod(config.patch_size) * config.batch_size
    logits = voxels * 3 * (2 if precision == "bf16" else 4)
    image = voxels * 4 if precision == "fp32" or checkpointing else 0  # was there before, and is kept then
    expected = memory.saved + memory.loss + logits - image - voxels * 8  # and so was the label
    assert held == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", WIDE)
def test_the_peak_of_both_passes_is_about_what_the_cpu_allocates(
    config: Configuration, precision: Precision, checkpointing: int
) -> None:
    config = config.model_copy(update={"checkpointing": checkpointing})
    _, run = step_of(config, labels(), precision, channels=1)
    peak, _ = allocated(lambda: run()[0].backward())
    memory = training_memory(config, 1, 3, precision, device="cpu")
    before = math.prod(config.patch_size) * config.batch_size * (4 + 8)
    assert memory.saved + memory.loss + memory.workspace - before == pytest.approx(peak, rel=0.12)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("regions", "ignore"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("patch", [(16, 16, 16), (32, 64)], ids=["3d", "2d"])
def test_where_the_loss_has_the_peak_it_is_not_underestimated(
    patch: tuple[int, ...], regions: bool, ignore: bool, precision: Precision
) -> None:
    kind, config = labels(40, regions, ignore), configuration(patch, (4, 8, 8))
    _, run = step_of(config, kind, precision, channels=1)
    peak, _ = allocated(lambda: run()[0].backward())
    memory = training_memory(config, 1, kind.output_count, precision, device="cpu", regions=regions, ignore=ignore)
    found = (memory.saved + memory.loss + memory.workspace - math.prod(patch) * config.batch_size * (4 + 8)) / peak
    assert 0.999 < found < 1.35  # the logits are let go before the backward pass here, not where the batch is split


@pytest.mark.parametrize("config", WIDE)
def test_the_peak_of_a_prediction_is_about_what_the_cpu_allocates(config: Configuration) -> None:
    network = build(describe(config, 1, 3), seed=0)
    image = torch.randn(config.batch_size, 1, *config.patch_size)
    with torch.inference_mode():
        peak, _ = allocated(lambda: network(image))
    memory = inference_memory(config, 1, 3, "fp32", tiles=config.batch_size)
    assert memory.gradients == memory.optimizer == memory.saved == memory.loss == 0
    assert memory.workspace - image.nbytes == pytest.approx(peak, rel=0.25)  # layouts differ between CPU and GPU
    assert memory.total < training_memory(config, 1, 3, "fp32").total / 2


@pytest.mark.parametrize("config", [*NETWORKS, *WIDE])
def test_parameters_are_those_of_the_network(config: Configuration) -> None:
    description = describe(config, 2, 3)
    count = sum(parameter.numel() for parameter in build(description).parameters())
    assert parameters(description) == count
    memory = training_memory(config, 2, 3, optimizer="adamw")
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * count, 4 * count, 8 * count)


@pytest.mark.parametrize("config", NETWORKS)
def test_multiply_adds_are_half_of_what_torch_counts_as_operations(config: Configuration) -> None:
    network = build(describe(config, 2, 3), seed=0)
    heads = head_count(len(network.description.heads), deep_supervision=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 2, *config.patch_size), heads)
    assert 2 * multiply_adds(config, 2, 3) == counter.get_total_flops()


@pytest.mark.parametrize("config", WIDE)
def test_recomputing_saves_memory_and_costs_at_most_a_third_pass(config: Configuration) -> None:
    shares, kept = [], []
    for checkpointing in range(4):
        made = config.model_copy(update={"checkpointing": checkpointing})
        shares.append(recomputed_share(made, 1, 3))
        kept.append(training_memory(made, 1, 3).saved)
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] == pytest.approx(1 / 3)
    assert kept == sorted(kept, reverse=True) and kept[1] < 0.7 * kept[0]


def test_memory_grows_with_the_batch_and_halves_with_the_precision() -> None:
    config = configuration((64, 64, 64), (32, 64, 128, 128))
    one, two, three = (training_memory(config, 1, 3, batch_size=batch) for batch in (1, 2, 3))
    assert three.saved - two.saved == two.saved - one.saved > 0
    assert one.total < two.total < three.total
    full = training_memory(config, 1, 3, "fp32")
    assert full.saved == pytest.approx(2 * two.saved, rel=0.05)
    assert training_memory(config, 1, 3, "fp16") == two


def test_counting_needs_no_torch() -> None:
    code = "import sys, autoseg.networks.memory, autoseg.planners.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_device_without_a_measured_peak_says_so() -> None:
    reset_peak(CPU)
    assert peak_memory_bytes(CPU) is None and free_gpu_gb(CPU) is None
