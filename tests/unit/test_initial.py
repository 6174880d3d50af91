"""Fine-tuning: what of a trained network a new one takes, by name, and that nothing is lost where all is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autoseg.errors import RunError
from autoseg.networks.build import Network, build
from autoseg.networks.describe import describe
from autoseg.stages.initial import InitialModel, Trained, fit_patch, take_topology
from autoseg.trainers.initial import Adapted, Ends, adapt
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.plan import Configuration, Plan


def labels(*names: str, regions: tuple[tuple[str, tuple[int, ...]], ...] = ()) -> Labels:
    return Labels(
        foreground=tuple(Label(name=name, value=i + 1) for i, name in enumerate(names)),
        regions=tuple(Region(name=name, values=values) for name, values in regions), region_order=(1,) * len(regions),
    )


def configuration(patch: tuple[int, ...] = (16, 16), kind: str = "unet", stride: int = 2, **changes: Any) -> Configuration:
    dims = len(patch)
    return Configuration.model_validate({
        "patch_size": patch, "batch_size": 2, "spacing": (1.0,) * dims, "median_shape": patch, "network": {"kind": kind},
        "strides": ((1,) * dims, (stride,) * dims, (stride,) * dims), "kernel_sizes": ((3,) * dims,) * 3,
        "features_per_stage": (4, 6, 6), "blocks_per_stage": (1, 1, 1), "decoder_blocks_per_stage": (1, 1), "batch_dice": False,
        "normalization": ("NoNormalization",), "use_mask_for_norm": (False,), **changes,
    })


def inputs(ends: Ends) -> int:
    return len(ends.channels) + len(ends.previous_names)


def network(ends: Ends, seed: int, shape: Configuration) -> Network:
    made = build(describe(shape, inputs(ends), ends.labels.output_count), seed)
    with torch.no_grad():
        for parameter in made.parameters():  # heads and norms as trained ones, not all zeros and ones
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.05)
    return made


def start(model: Ends, own: Ends, shape: Configuration | None = None) -> tuple[Network, Network, Adapted, Network]:
    """A trained network, one that starts from it, what was done, and what the latter was before."""
    shape = shape or configuration()
    trained, fresh, before = network(model, 1, shape), network(own, 2, shape), network(own, 2, shape)
    made = adapt(trained.state_dict(), model, fresh.state_dict(), own, fresh.description)
    fresh.load_state_dict(made.tensors)
    return trained, fresh, made, before


def states(made: Adapted) -> dict[str, str]:
    return {taken.part: taken.state for taken in made.parts}


def image(channels: int, dims: int = 2) -> torch.Tensor:
    return torch.randn(2, channels, *(16,) * dims, generator=torch.Generator().manual_seed(9))


CT = Ends(("CT",), labels("liver", "tumour"))


@pytest.mark.parametrize("kind", ["unet", "residual-unet"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_same_channels_and_labels_give_the_same_outputs_to_the_bit(kind: str, dims: int) -> None:
    trained, fresh, made, _ = start(CT, CT, configuration((16,) * dims, kind))
    for one, other in zip(trained(image(1, dims), 2), fresh(image(1, dims), 2), strict=True):
        assert torch.equal(one, other)
    assert made.adapted == made.new == 0 and made.kept == sum(p.numel() for p in trained.parameters())
    assert set(states(made).values()) == {"kept"}


def test_labels_are_matched_by_name_whatever_their_order_and_case() -> None:
    own = Ends(("CT",), labels("vessel", "Tumour", "LIVER"))
    trained, fresh, made, before = start(CT, own)
    old, new = trained(image(1))[0], fresh(image(1))[0]
    assert torch.allclose(new[:, [0, 2, 3]], old[:, [0, 2, 1]], atol=1e-5)
    for name in fresh.description.heads:
        assert torch.equal(fresh.state_dict()[f"units.{name}.weight"][1], before.state_dict()[f"units.{name}.weight"][1])
    assert states(made)["output vessel"] == "new" and states(made)["output LIVER"] == "kept"
    assert made.new == len(fresh.description.heads) + sum(
        fresh.state_dict()[f"units.{name}.weight"][0].numel() for name in fresh.description.heads
    )


def test_labels_that_are_gone_are_left_out_and_told() -> None:
    trained, fresh, made, _ = start(CT, Ends(("CT",), labels("tumour")))
    assert torch.allclose(fresh(image(1))[0], trained(image(1))[0][:, [0, 2]], atol=1e-5)
    assert states(made)["output liver"] == "left out" and made.new == 0


def test_channels_are_matched_by_name_whatever_their_order() -> None:
    both = Ends(("T1", "FLAIR"), CT.labels)
    trained, fresh, made, _ = start(both, Ends(("flair", "T1"), CT.labels))
    x = image(2)
    assert torch.allclose(fresh(x)[0], trained(x.flip(1))[0], atol=1e-5)
    assert made.adapted == 0 and states(made)["channel flair"] == "kept"


def test_new_channels_that_show_the_same_image_give_the_models_answer() -> None:
    trained, fresh, made, _ = start(CT, Ends(("T1", "T2", "FLAIR"), CT.labels))
    x = image(1)
    assert torch.allclose(fresh(x.repeat(1, 3, 1, 1))[0], trained(x)[0], atol=1e-5)
    assert states(made)["channel T2"] == "adapted" and states(made)["channel CT"] == "left out"
    trained, fresh, made, _ = start(Ends(("T1", "T2", "FLAIR"), CT.labels), CT)
    assert torch.allclose(fresh(x)[0], trained(x.repeat(1, 3, 1, 1))[0], atol=1e-5)


def test_a_known_channel_keeps_its_kernels_beside_a_new_one() -> None:
    trained, fresh, made, _ = start(CT, Ends(("PET", "CT"), CT.labels))
    name = "units.encoder_0_0.conv.weight"
    old, new = trained.state_dict()[name], fresh.state_dict()[name]
    assert torch.equal(new[:, 1], old[:, 0]) and torch.allclose(new[:, 0], old[:, 0] / 2)
    assert states(made) == {"channel PET": "adapted", "channel CT": "kept", "output background": "kept", "output liver": "kept",
                            "output tumour": "kept"}


def test_channels_without_names_count_by_position() -> None:
    unnamed = Ends(("channel_0", "channel_1"), CT.labels)
    trained, fresh, made, _ = start(Ends(("T1", "T2"), CT.labels), unnamed)
    assert torch.equal(fresh(image(2))[0], trained(image(2))[0]) and made.adapted == 0
    *_, made, _ = start(unnamed, Ends(("T1",), CT.labels))
    assert states(made)["channel T1"] == "adapted"


def test_previous_segmentations_go_by_label_and_a_new_one_counts_for_nothing_yet() -> None:
    model = Ends(("CT",), labels("liver", "tumour"), previous=True)
    own = Ends(("CT",), labels("spleen", "liver"), previous=True)
    trained, fresh, made, _ = start(model, own)
    x = image(3)
    other = x.clone()
    other[:, 1] = 5
    assert torch.equal(fresh(x)[0], fresh(other)[0])
    same = torch.stack([x[:, 0], x[:, 2], torch.zeros_like(x[:, 0])], 1)
    x[:, 1] = 0
    assert torch.allclose(fresh(x)[0][:, 2], trained(same)[0][:, 1], atol=1e-5)
    assert states(made)["previous segmentation of spleen"] == "new"
    assert states(made)["previous segmentation of tumour"] == "left out"
    *_, made, _ = start(CT, Ends(("CT",), CT.labels, previous=True))
    assert states(made)["previous segmentation of liver"] == "new"


def test_regions_are_matched_with_regions() -> None:
    model = Ends(("CT",), labels("core", "oedema", regions=(("whole", (1, 2)), ("core", (1,)))))
    own = Ends(("CT",), labels("core", "oedema", regions=(("core", (1,)), ("whole", (1, 2)), ("rim", (2,)))))
    trained, fresh, made, _ = start(model, own)
    assert torch.allclose(fresh(image(1))[0][:, :2], trained(image(1))[0].flip(1), atol=1e-5)
    assert states(made) == {"channel CT": "kept", "output core": "kept", "output whole": "kept", "output rim": "new"}


def test_a_label_and_a_region_of_one_name_mean_the_same_probability() -> None:
    label, region = Ends(("CT",), labels("liver")), Ends(("CT",), labels("liver", regions=(("liver", (1,)),)))
    trained, fresh, made, _ = start(label, region)
    assert torch.allclose(fresh(image(1))[0][:, 0].sigmoid(), trained(image(1))[0].softmax(1)[:, 1], atol=1e-5)
    assert states(made)["output liver"] == "adapted" and made.adapted and not made.new
    trained, fresh, made, _ = start(region, label)
    assert torch.allclose(fresh(image(1))[0].softmax(1)[:, 1], trained(image(1))[0][:, 0].sigmoid(), atol=1e-5)
    assert states(made)["output background"] == "adapted" and not made.new


def test_nothing_in_common_keeps_the_body_and_begins_the_heads_anew() -> None:
    *_, fresh, made, before = start(Ends(("CT",), labels("a", regions=(("a", (1,)),))), Ends(("MRI",), labels("b")))
    for name in fresh.description.heads:
        assert torch.equal(fresh.state_dict()[f"units.{name}.weight"], before.state_dict()[f"units.{name}.weight"])
    assert states(made)["output background"] == "new" and made.kept > made.new > 0


def test_every_weight_is_counted_once() -> None:
    for own in (CT, Ends(("PET", "CT"), labels("x", "liver"), previous=True), Ends(("a", "b", "c"), labels("q"))):
        _, fresh, made, _ = start(Ends(("CT", "PET"), CT.labels), own)
        assert made.kept + made.adapted + made.new == sum(p.numel() for p in fresh.parameters())


def test_a_damaged_model_is_refused() -> None:
    trained = network(CT, 1, configuration())
    weights = trained.state_dict()
    name = "units.encoder_1_0.conv.weight"
    with pytest.raises(ValueError, match=f"{name} has shape"):
        adapt({**weights, name: weights[name][:1]}, CT, weights, CT, trained.description)
    with pytest.raises(ValueError, match=f"the model has no {name}"):
        adapt({key: value for key, value in weights.items() if key != name}, CT, weights, CT, trained.description)


@pytest.mark.parametrize(("patch", "factor", "expected"), [
    ((16, 16), 2, (16, 16)),
    ((40, 56, 40), 8, (40, 56, 40)),
    ((40, 56, 44), 8, (40, 56, 40)),
    ((40, 56, 45), 8, (40, 56, 48)),
    ((3, 56, 40), 8, (8, 56, 40)),
    ((3, 7), 8, (8, 16)),
    ((8, 8), 8, (16, 8)),
])
def test_a_patch_goes_to_the_nearest_edges_that_the_network_takes(
    patch: tuple[int, ...], factor: int, expected: tuple[int, ...]
) -> None:
    assert fit_patch(patch, ((1,) * len(patch), (factor,) * len(patch))) == expected


def test_topology_is_the_models_and_all_else_stays() -> None:
    own = configuration((20, 12), batch_size=7, checkpointing=3)
    model = configuration((64, 64), "residual-unet", stride=4, features_per_stage=(8, 9, 10))
    made = Configuration.model_validate(take_topology(own, model).model_dump())
    assert made.patch_size == (32, 16)
    assert made.network.kind == "residual-unet" and made.features_per_stage == (8, 9, 10) and made.strides == model.strides
    assert (made.batch_size, made.spacing, made.median_shape) == (7, own.spacing, own.median_shape)
    assert take_topology(own, configuration((64, 64))) == own


def trained(run: str, dims: int = 3, folds: tuple[int, ...] = (0, 1), configuration_name: str | None = None) -> Trained:
    plan = Plan(
        dataset_name="d", planner="default", gpu_memory_gb=8, transpose_forward=(0, 1, 2), channels=("CT",), labels=CT.labels,
        intensities=(), configurations={configuration_name or run: configuration((16,) * dims)},
    )
    seen = {fold: frozenset({f"case{number}" for number in range(4) if number % 2 != fold}) for fold in folds}
    return Trained(run, plan, configuration_name or run, folds, seen, lambda fold: f"hash {run} {fold}", lambda fold: {})


def model(*networks: Trained, same: bool = False) -> InitialModel:
    return InitialModel(Path("model.autoseg"), networks, same)


def test_the_network_of_the_same_name_is_taken_else_the_only_one_of_as_many_axes() -> None:
    full, flat, named = trained("3d_fullres"), trained("2d", 2), trained("mine", configuration_name="3d_fullres")
    own = configuration((16, 16, 16))
    assert model(flat, full, named).network("3d_fullres", own) is full
    assert model(flat, named).network("3d_fullres", own) is named
    assert model(flat, named).network("3d_lowres", own) is named
    with pytest.raises(RunError, match=r"no network that 3d_lowres could start from; it has 2d \(2D\)"):
        model(flat).network("3d_lowres", own)
    with pytest.raises(RunError, match="several networks that 3d_lowres could start from: 3d_fullres, mine"):
        model(full, named).network("3d_lowres", own)


def test_every_fold_starts_from_the_first_unless_the_model_knows_these_very_cases() -> None:
    network = trained("3d_fullres", folds=(1, 3))
    assert [model(network).fold(network, fold) for fold in (0, 1, 3)] == [1, 1, 1]
    assert [model(network, same=True).fold(network, fold) for fold in (0, 1, 3)] == [1, 1, 3]
    assert model(network).key(network) == model(trained("3d_fullres", folds=(1, 2))).key(network)
    assert model(network).key(network) != model(network, same=True).key(network)
