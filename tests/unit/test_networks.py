"""Networks: what is described is what is built, counted and run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoseg.errors import PlanError, RunError
from autoseg.networks import hardware
from autoseg.networks.build import ConvUnit, build
from autoseg.networks.describe import Node, convolution_elements, describe, segments
from autoseg.networks.hardware import autocast, is_out_of_memory, pick_device, pick_precision
from autoseg.planners.rules import activation_elements, features_per_stage
from autoseg.types.plan import Configuration
from autoseg.types.record import Spec


def configuration(
    patch: tuple[int, ...],
    features: tuple[int, ...],
    kind: str = "unet",
    blocks: tuple[int, ...] | None = None,
    decoder: int = 2,
    strides: tuple[tuple[int, ...], ...] | None = None,
    kernels: tuple[tuple[int, ...], ...] | None = None,
) -> Configuration:
    dims, stages = len(patch), len(features)
    return Configuration(
        patch_size=patch,
        batch_size=2,
        spacing=(1.0,) * dims,
        median_shape=tuple(float(edge) for edge in patch),
        network=Spec(kind=kind),
        strides=strides or ((1,) * dims, *((2,) * dims,) * (stages - 1)),
        kernel_sizes=kernels or ((3,) * dims,) * stages,
        features_per_stage=features,
        blocks_per_stage=blocks or (2,) * stages,
        decoder_blocks_per_stage=(decoder,) * (stages - 1),
        batch_dice=False,
        normalization=("NoNormalization",),
        use_mask_for_norm=(False,),
    )


ANISOTROPIC = {"strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)), "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3))}
SMALL = [
    pytest.param(configuration((16, 16), (4, 8, 8)), id="plain-2d"),
    pytest.param(configuration((8, 8, 8), (4, 8)), id="plain-3d"),
    pytest.param(configuration((4, 16, 16), (4, 6, 8), **ANISOTROPIC), id="plain-anisotropic"),
    pytest.param(configuration((16, 16), (4, 8, 8), "residual-unet", (1, 2, 2), 1), id="residual-2d"),
    pytest.param(configuration((4, 16, 16), (4, 6, 6), "residual-unet", (1, 2, 1), 1, **ANISOTROPIC), id="residual-anisotropic"),
]


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_plain_network_has_as_many_parameters_as_the_reference() -> None:
    description = describe(configuration((16, 16, 16), (32, 64, 128, 256)), 1, 3)
    assert count_parameters(build(description)) == 5_603_177  # PlainConvUNet of dynamic-network-architectures 0.4.4


def test_the_residual_network_has_as_many_parameters_as_the_reference() -> None:
    description = describe(configuration((16, 16, 16), (32, 64, 128, 256), "residual-unet", (1, 3, 4, 6), 1), 1, 3)
    assert count_parameters(build(description)) == 25_895_593  # ResidualEncoderUNet of dynamic-network-architectures 0.4.4


def test_elements_of_the_plain_network_at_128_cubed_are_the_planners() -> None:
    patch = (128, 128, 128)
    config = configuration(patch, features_per_stage(6, 3))
    assert convolution_elements(describe(config, 1, 3), patch) == 452_796_416
    assert activation_elements("unet", patch, config.strides, 3) == 452_796_416


def test_the_planner_counts_one_skip_convolution_more_where_a_residual_stage_changes_the_stride_only() -> None:
    patch = (128, 128, 128)
    config = configuration(patch, features_per_stage(6, 3), "residual-unet", (1, 3, 4, 6, 6, 6), 1)
    assert activation_elements("residual-unet", patch, config.strides, 3) == 557_420_544
    last_stage = 320 * 4**3  # from 320 to 320 features
    assert convolution_elements(describe(config, 1, 3), patch) == 557_420_544 - last_stage


@pytest.mark.parametrize("config", SMALL)
def test_counted_elements_are_what_the_convolutions_really_put_out(config: Configuration) -> None:
    description = describe(config, 2, 3)
    network = build(description, seed=0)
    seen: list[int] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.numel()))
    network(torch.zeros(1, 2, *config.patch_size))
    assert sum(seen) == convolution_elements(description, config.patch_size)


@pytest.mark.parametrize("config", SMALL)
def test_heads_come_finest_first_and_asking_for_more_does_not_change_the_first(config: Configuration) -> None:
    network = build(describe(config, 1, 3), seed=0)
    image = torch.randn(2, 1, *config.patch_size)
    every = network(image, len(config.strides))
    assert len(every) == len(config.strides) - 1
    size = list(config.patch_size)
    for stride, logits in zip(config.strides, every, strict=False):
        size = [edge // step for edge, step in zip(size, stride, strict=True)]
        assert logits.shape == (2, 3, *size)
    (first,) = network(image)
    assert torch.equal(first, every[0])


@pytest.mark.parametrize("config", SMALL)
def test_every_parameter_on_the_way_to_all_heads_gets_a_gradient(config: Configuration) -> None:
    network = build(describe(config, 1, 3), seed=0)
    sum(logits.square().sum() for logits in network(torch.randn(2, 1, *config.patch_size), 9)).backward()
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert missing == []


@pytest.mark.parametrize("config", SMALL)
def test_bf16_gives_about_the_logits_of_fp32_and_finite_gradients(config: Configuration) -> None:
    network = build(describe(config, 1, 3), seed=0)
    image = torch.randn(2, 1, *config.patch_size)
    exact = network(image, 2)
    with autocast(torch.device("cpu"), "bf16"):
        rough = network(image, 2)
    for a, b in zip(exact, rough, strict=True):
        assert a.shape == b.shape
        assert (a - b.float()).abs().mean() < 0.05 * a.abs().mean() + 0.02
    rough[0].float().square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2)])
def test_bf16_gradients_of_a_few_slices_are_those_of_fp32(depth: int, stride: tuple[int, int, int]) -> None:
    node = Node("x", "conv", ("input",), 16, (1, 1, 1), (3, 3, 3), stride, norm=False, activation=False)
    torch.manual_seed(0)
    unit, image = ConvUnit(node, 16, 3), torch.randn(2, 16, depth, 12, 12)
    gradients = []
    for precision in ("fp32", "bf16", "bf16"):
        unit.zero_grad()
        del [torch.full((2000 * size,), float("nan")) for size in range(1, 13)][:]  # freed memory is no longer zero
        with autocast(torch.device("cpu"), precision):  # type: ignore[arg-type]
            logits = unit(image)
        logits.float().square().sum().backward()
        gradients.append(unit.conv.weight.grad.clone())
    exact, rough, again = gradients
    assert (rough - exact).norm() < 0.02 * exact.norm() and torch.equal(rough, again)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", SMALL)
def test_recomputed_activations_change_neither_outputs_nor_gradients(config: Configuration, precision: str) -> None:
    image = torch.randn(2, 1, *config.patch_size)

    def results(checkpointing: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None]]:
        made = config.model_copy(update={"checkpointing": checkpointing})
        network = build(describe(made, 1, 3), seed=0)
        with autocast(torch.device("cpu"), precision):  # type: ignore[arg-type]
            outputs = network(image, 2)
        sum(logits.float().square().sum() for logits in outputs).backward()
        return outputs, {name: parameter.grad for name, parameter in network.named_parameters()}

    outputs, gradients = results(0)
    for checkpointing in range(1, len(config.strides) + 1):
        again, others = results(checkpointing)
        assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
        for name, gradient in gradients.items():
            other = others[name]
            assert (gradient is None and other is None) or torch.equal(gradient, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", SMALL)
def test_segments_hold_every_node_once_and_hand_on_what_is_needed(config: Configuration) -> None:
    description = describe(config, 1, 3)
    for checkpointing in range(len(config.strides) + 1):
        made = segments(description, 1, checkpointing)
        names = [node.name for segment in made for node in segment.nodes]
        assert len(set(names)) == len(names) and "head_0" in names and "head_1" not in names
        known = {"input"}
        for segment in made:
            assert set(segment.inputs) <= known
            known = (known - set(segment.last_used)) | set(segment.outputs)
            assert segment.recompute == (segment.nodes[0].stage < checkpointing)
        assert known == {"head_0"}


@pytest.mark.parametrize("dims", [2, 3])
def test_norm_and_activation_are_those_of_torch(dims: int) -> None:
    ones, size = (1,) * dims, (6,) * dims
    unit = ConvUnit(Node("x", "conv", ("input",), 4, ones, (3,) * dims, ones), 3, dims)
    torch.nn.init.normal_(unit.norm.weight)
    torch.nn.init.normal_(unit.norm.bias)
    image = torch.randn(2, 3, *size)
    expected = nn.functional.leaky_relu(unit.norm(unit.conv(image)), 0.01)
    assert torch.equal(unit(image), expected)


def test_a_two_stage_network_is_the_u_net_written_out_by_hand() -> None:
    config = configuration((8, 8), (4, 6), blocks=(1, 1), decoder=1)
    network = build(describe(config, 1, 2), seed=3)
    weights = network.state_dict()

    def unit(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        x = nn.functional.conv2d(x, weights[f"units.{name}.conv.weight"], weights[f"units.{name}.conv.bias"], stride, 1)
        mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        x = x * weights[f"units.{name}.norm.weight"].view(1, -1, 1, 1) + weights[f"units.{name}.norm.bias"].view(1, -1, 1, 1)
        return torch.where(x > 0, x, 0.01 * x)

    image = torch.randn(2, 1, 8, 8)
    skip = unit(image, "encoder_0_0")
    low = unit(skip, "encoder_1_0", stride=2)
    up = nn.functional.conv_transpose2d(low, weights["units.up_0.weight"], weights["units.up_0.bias"], 2)
    merged = unit(torch.cat([up, skip], 1), "decoder_0_0")
    logits = nn.functional.conv2d(merged, weights["units.head_0.weight"], weights["units.head_0.bias"])
    torch.testing.assert_close(network(image)[0], logits, rtol=1e-4, atol=1e-5)


def test_residual_blocks_begin_as_their_skip_path() -> None:
    config = configuration((8, 8), (4, 4), "residual-unet", (2, 1), 1)
    network = build(describe(config, 1, 2), seed=0)
    norms = [network.units[node.name].norm.weight for node in network.description.nodes if node.zero_norm]
    assert len(norms) == 3 and all(not bool(weight.any()) for weight in norms)
    others = [m.weight for m in network.modules() if isinstance(m, nn.InstanceNorm2d) and bool(m.weight.any())]
    assert all(bool((weight == 1).all()) for weight in others)


def test_weights_follow_he_with_zero_bias() -> None:
    network = build(describe(configuration((8, 8, 8), (32, 64)), 1, 2), seed=0)
    conv = network.units["encoder_1_1"].conv
    assert conv.weight.std().item() == pytest.approx((2 / (1 + 0.01**2) / (64 * 27)) ** 0.5, rel=0.02)
    assert not conv.bias.any()


def test_the_seed_alone_decides_the_weights_and_the_global_state_stays() -> None:
    description = describe(configuration((8, 8), (4, 8)), 1, 2)
    before = torch.get_rng_state()
    first = build(description, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    again, other = build(description, seed=5).state_dict(), build(description, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["units.head_0.weight"], other["units.head_0.weight"])


def test_an_unknown_network_lists_the_known_ones() -> None:
    with pytest.raises(PlanError, match="unknown network 'transformer'; choose from unet, residual-unet"):
        describe(configuration((8, 8), (4, 8), "transformer"), 1, 2)


@pytest.mark.parametrize("name", ["cuda:99", "quantum", "meta", "", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(RunError, match=r"cannot be used here: .+; choose auto, cpu, cuda"):
        pick_device(name)


def test_auto_finds_a_device_and_cpu_is_cpu() -> None:
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("has", "precision"), [(True, "bf16"), (False, "fp32")])
def test_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch, has: bool, precision: str) -> None:
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: has)
    assert pick_precision(torch.device("cpu")) == precision
    assert pick_precision(torch.device("mps")) == "fp32"
    assert pick_precision(torch.device("cpu"), "bf16") == "bf16"


def test_precisions_that_cannot_be_are_refused() -> None:
    with pytest.raises(RunError, match="fp16 needs a CUDA device, found cpu"):
        pick_precision(torch.device("cpu"), "fp16")
    with pytest.raises(RunError, match="unknown precision 'int8'"):
        pick_precision(torch.device("cpu"), "int8")


def test_autocast_computes_in_the_precision_asked_for() -> None:
    a = torch.ones(2, 2)
    with autocast(torch.device("cpu"), "fp32"):
        assert (a @ a).dtype == torch.float32
    with autocast(torch.device("cpu"), "bf16"):
        assert (a @ a).dtype == torch.bfloat16


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("anything"), True),
    (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("GET was unable to find an engine to execute this computation"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
    (ValueError("out of memory"), False),
])
def test_a_lack_of_memory_is_known_by_what_torch_says(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
