"""Models in memory: with networks that compute something simple, the labels can be worked out by hand."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import nn

from autoseg.errors import GeometryError
from autoseg.inference import Member, Model, Wishes
from autoseg.inference.loads import case_load
from autoseg.inference.memory import CaseLoad
from autoseg.inference.passes import Passes
from autoseg.networks.build import build
from autoseg.networks.describe import describe
from autoseg.types.case import Image
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.plan import Configuration, Plan
from autoseg.types.record import Spec

CPU = torch.device("cpu")
ABC = Labels(foreground=(Label(name="a", value=3), Label(name="b", value=300)))
NESTED = Labels(
    foreground=(Label(name="edema", value=1), Label(name="core", value=4)),
    regions=(Region(name="whole", values=(1, 4)), Region(name="core", values=(4,))), region_order=(1, 4),
)


def configuration(patch: tuple[int, ...], channels: int = 1, spacing: float = 1.0) -> Configuration:
    dims = len(patch)
    return Configuration(
        patch_size=patch, batch_size=3, spacing=(spacing,) * dims, median_shape=tuple(map(float, patch)),
        strides=((1,) * dims, (2,) * dims), kernel_sizes=((3,) * dims,) * 2, features_per_stage=(4, 8), blocks_per_stage=(1, 1),
        decoder_blocks_per_stage=(1,), batch_dice=False, normalization=("NoNormalization",) * channels,
        use_mask_for_norm=(False,) * channels,
    )


def plan(labels: Labels = ABC, transpose: tuple[int, int, int] = (0, 1, 2), **configurations: Configuration) -> Plan:
    channels = len(next(iter(configurations.values())).normalization)
    return Plan(
        dataset_name="x", planner="default", gpu_memory_gb=8, transpose_forward=transpose,
        channels=tuple(f"channel{i}" for i in range(channels)), labels=labels, intensities=(), configurations=configurations,
    )


class Pointwise(nn.Module):
    """Logits of background, a and b from the first channel: a where it is about 1, b where it is about 2 or more."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = bias
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor, head_count: int = 1) -> list[torch.Tensor]:
        self.seen.append(tuple(x.shape))
        value = x[:, 0] + self.bias
        return [torch.stack([torch.full_like(value, 0.25), value - 0.25, 2 * value - 2.0], 1)]


class Slope(nn.Module):
    """Says a where a voxel is brighter than its right neighbour in the tile: flips change its answer."""

    def forward(self, x: torch.Tensor, head_count: int = 1) -> list[torch.Tensor]:
        value = x[:, 0] - torch.roll(x[:, 0], -1, -1)
        return [torch.stack([torch.zeros_like(value), value, torch.full_like(value, -9.0)], 1)]


class Regions(nn.Module):
    """Two regions: the first where the channel exceeds 0.5, the second where it exceeds 1.5."""

    def forward(self, x: torch.Tensor, head_count: int = 1) -> list[torch.Tensor]:
        return [torch.stack([x[:, 0] - 0.5, x[:, 0] - 1.5], 1)]


def model(network: Any, patch: tuple[int, ...], labels: Labels = ABC, mirror: bool = True, **options: Any) -> Model:
    networks = network if isinstance(network, tuple) else (network,)
    channels = options.pop("channels", 1)
    member = Member(plan(labels, c=configuration(patch, channels)), "c", networks, tuple(range(len(patch))))
    return Model([member], CPU, "fp32", mirror, **options)


def steps_image(shape: tuple[int, ...], seed: int = 0, high: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.float32)


def by_hand(channel: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.select([channel >= 2, channel >= 1], [300, 3], 0)


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize(("patch", "shape"), [
    ((8, 8, 8), (1, 13, 9, 20)), ((8, 8, 8), (1, 3, 4, 5)), ((8, 8), (1, 5, 13, 9)), ((8, 8), (1, 13, 9)), ((8, 8), (1, 3, 2)),
])
def test_a_pointwise_network_labels_every_voxel_by_its_value(
    patch: tuple[int, ...], shape: tuple[int, ...], mirror: bool
) -> None:
    image = steps_image(shape)
    label = model(Pointwise(), patch, mirror=mirror).predict(image)
    assert label.shape == shape[1:] and label.dtype == np.uint16
    assert np.array_equal(label, by_hand(image[0]))


def test_the_networks_see_whole_patches_in_batches() -> None:
    network = Pointwise()
    model(network, (8, 8), mirror=False).predict(steps_image((1, 4, 8, 8)) + 1)
    assert network.seen == [(4, 1, 8, 8)]
    network = Pointwise()
    model(network, (8, 8, 8)).predict(steps_image((1, 8, 8, 8)) + 1)
    assert network.seen == [(3, 1, 8, 8, 8)] * 2 + [(2, 1, 8, 8, 8)], "eight mirrored copies"


def test_mirroring_averages_over_flips() -> None:
    image = np.arange(1, 9, dtype=np.float32)[None, None].repeat(8, 1)  # brighter to the right, everywhere
    straight = model(Slope(), (8, 8), mirror=False).predict(image)
    assert not straight[:, :-1].any() and (straight[:, -1] == 3).all()
    member = model(Slope(), (8, 8)).members[0]
    full = Model([member], CPU, "fp32", mirror=True)
    (case,) = full.prepare(Image(image[:, None], Grid(shape=(1, 8, 8), spacing=(999.0, 1.0, 1.0), has_direction=False), ""))
    logits = full.logits(member, case)[1, 0]
    one = torch.from_numpy(image[0]) - torch.roll(torch.from_numpy(image[0]), -1, -1)
    other = (torch.from_numpy(image[0]).flip(-1) - torch.roll(torch.from_numpy(image[0]).flip(-1), -1, -1)).flip(-1)
    torch.testing.assert_close(logits, (one + other) / 2)


def test_folds_are_averaged() -> None:
    image = np.full((1, 8, 8, 8), 1.0, np.float32)
    assert (model((Pointwise(0.0), Pointwise(0.0)), (8, 8, 8)).predict(image) == 3).all()
    assert (model((Pointwise(0.0), Pointwise(3.0)), (8, 8, 8)).predict(image) == 300).all()
    assert (model((Pointwise(-1.0), Pointwise(-0.8)), (8, 8, 8)).predict(image) == 0).all()
    both = model((Pointwise(0.0), Pointwise(3.0)), (8, 8, 8))
    (case,) = both.prepare(Image(image, Grid(shape=(8, 8, 8), spacing=(1.0, 1.0, 1.0)), ""))
    logits = both.logits(both.members[0], case)
    assert logits[:, 4, 4, 4].tolist() == pytest.approx([0.25, 2.25, 3.0])  # means of 0.25 and 0.25, 0.75 and 3.75, 0 and 6


def test_no_more_than_two_folds_logits_of_a_tile_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    made: list[weakref.ref[torch.Tensor]] = []
    mirrored = Passes._mirrored

    def watch(self: Passes, *arguments: Any) -> torch.Tensor:
        alive.append(sum(one() is not None for one in made))
        made.append(weakref.ref(found := mirrored(self, *arguments)))
        return found

    monkeypatch.setattr(Passes, "_mirrored", watch)
    image = Image(np.ones((1, 8, 8, 8), np.float32), Grid(shape=(8, 8, 8), spacing=(1.0, 1.0, 1.0)), "")
    for uncertainty in (False, True):
        alive.clear()
        made.clear()
        model(tuple(Pointwise(bias) for bias in (0.0, 1.0, 2.0, 3.0)), (8, 8, 8)).predict_image(image, uncertainty=uncertainty)
        assert alive == [0, 1, 1, 1]


def test_a_case_that_fits_in_the_leanest_way_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Labels(foreground=tuple(Label(name=f"l{i}", value=i) for i in range(1, 40)))
    config = configuration((16, 16, 16))
    one = Model([Member(plan(many, c=config), "c", (build(describe(config, 1, 40), seed=0),), ())], CPU, "fp32")
    image = steps_image((1, 40, 32, 32)) + 1
    grid = Grid(shape=(40, 32, 32), spacing=(1.0, 1.0, 1.0))
    needed = one.needed_bytes(grid)
    (case,) = one.prepare(Image(image, grid, ""))
    plans = [one.plan_memory([case])]
    monkeypatch.setattr("autoseg.inference.memory.memory_available_bytes", lambda: int(needed / 0.9) + 1)
    plans.append(one.plan_memory(one.prepare(Image(image, grid, ""))))
    assert plans[1].half and plans[1].batch == 1 and plans[1].ram_bytes < 0.7 * plans[0].ram_bytes
    assert one.predict(image).shape == image.shape[1:]


def test_reading_is_reckoned_for_every_member() -> None:
    grid = Grid(shape=(20, 24, 28), spacing=(1.0, 1.0, 1.0))
    one = model(Pointwise(), (8, 8, 8))
    two = Model([*one.members, *one.members], CPU, "fp32")
    assert two.reading_bytes(grid, 1, 2) - one.reading_bytes(grid, 1, 2) == 6 * 20 * 24 * 28


def test_what_a_prediction_holds_is_reckoned_by_what_is_asked_for() -> None:
    stored, shape = (10, 20, 30), (4, 5, 6)
    voxels, small = 6000, 120

    def made(
        labels: Labels = ABC, wishes: Wishes = Wishes(), *steps: str, temperature: float = 1.0, networks: int = 1
    ) -> CaseLoad:
        member = Member(plan(labels, c=configuration((8, 8, 8))), "c", (Pointwise(),) * networks, (), temperature=temperature)  # type: ignore[arg-type]
        return case_load([member], [shape], stored, wishes, "fp32", [Spec(kind=step) for step in steps])

    assert made().made_bytes == voxels * (1 + 2), "disk values up to 300"
    assert made(NESTED).made_bytes == voxels * (1 + 1)
    assert made(ABC, Wishes(probabilities=True)).made_bytes == voxels * (3 + 12)
    assert made(ABC, Wishes(uncertainty=True)).made_bytes == voxels * (3 + 8) + small * (16 + 1)
    assert made(NESTED, Wishes(judged=True)).made_bytes == voxels * 2 + small * (16 + 2)
    assert made(ABC, Wishes(), "largest_component").made_bytes == voxels * (3 + 10)
    assert made(ABC, Wishes(), "largest_component", "crf").made_bytes == voxels * (3 + 12 + 12 + 60)
    both = made(ABC, Wishes(probabilities=True), "threshold", temperature=2.0)
    assert both.made_bytes == voxels * (3 + 12 + 12 + 10) + small * 12, "probabilities with and without the temperature"
    assert made().restoring_bytes == (2 + 5) * 4 * 3 * 20 * 30
    tiles = [made(networks=networks).streams[0].tile_bytes for networks in (1, 2, 5)]
    assert tiles[1] == tiles[2] == tiles[0] + 4 * 3 * 8**3


def test_members_of_different_dimensions_are_averaged() -> None:
    both = plan(ABC, flat=configuration((8, 8)), full=configuration((8, 8, 8)))
    image = steps_image((1, 9, 10, 11))
    members = [Member(both, "flat", (Pointwise(),), (0, 1)), Member(both, "full", (Pointwise(),), (0, 1, 2))]  # type: ignore[arg-type]
    assert np.array_equal(Model(members, CPU, "fp32").predict(image), by_hand(image[0]))


def test_later_regions_overwrite_earlier_ones() -> None:
    image = steps_image((1, 6, 7, 8))
    label = model(Regions(), (8, 8, 8), NESTED).predict(image)
    assert np.array_equal(label, np.select([image[0] >= 2, image[0] >= 1], [4, 1], 0))


def test_labels_come_back_in_the_images_own_axes_after_a_transpose() -> None:
    member = Member(plan(ABC, (2, 0, 1), c=configuration((8, 8, 8))), "c", (Pointwise(),), (0, 1, 2))  # type: ignore[arg-type]
    image = steps_image((1, 5, 9, 12))
    assert np.array_equal(Model([member], CPU, "fp32").predict(image), by_hand(image[0]))


def test_the_result_lies_on_the_images_grid_whatever_the_networks_spacing() -> None:
    image = np.zeros((1, 20, 24, 28), np.float32)
    image[0, 5:15, 6:18, 7:21] = 1
    member = Member(plan(ABC, c=configuration((8, 8, 8), spacing=1.5)), "c", (Pointwise(),), (0, 1, 2))  # type: ignore[arg-type]
    label = Model([member], CPU, "fp32").predict(image, (1.0, 1.0, 1.0))
    assert label.shape == image.shape[1:]
    assert 2 * ((label == 3) & (image[0] == 1)).sum() / ((label == 3).sum() + (image[0] == 1).sum()) > 0.97


def test_probabilities_are_those_of_the_mean_logits_and_times_are_told() -> None:
    image = steps_image((1, 5, 6, 7), high=2) + 1
    prediction = model(Pointwise(), (8, 8, 8)).predict_image(
        Image(image, Grid(shape=(5, 6, 7), spacing=(1.0, 1.0, 1.0)), ".nii.gz"), probabilities=True
    )
    assert prediction.probabilities_czyx is not None
    logits = Pointwise()(torch.from_numpy(image)[None])[0][0]
    np.testing.assert_allclose(prediction.probabilities_czyx, logits.softmax(0).numpy(), atol=1e-5)
    assert set(prediction.seconds) == {"preprocess", "network", "restore"}


def test_post_processing_is_applied_to_inside_labels() -> None:
    image = np.zeros((1, 8, 8, 8), np.float32)
    image[0, :3], image[0, 6, 6, 6] = 1, 1
    image[0, 7, 0, 0] = 2
    steps = [Spec(kind="largest_component", options={"labels": [1]})]
    label = model(Pointwise(), (8, 8, 8), postprocessing=steps).predict(image)
    expected = by_hand(image[0])
    expected[6, 6, 6] = 0
    assert np.array_equal(label, expected)


def test_members_count_by_their_weight() -> None:
    image = steps_image((1, 5, 6, 7), high=2) + 1
    made = plan(ABC, c=configuration((8, 8, 8)))
    parts = [softmax(Pointwise(bias)(torch.from_numpy(image)[None])[0][0].numpy(), axis=0) for bias in (0.0, -1.0)]
    for weights in ((1.0, 3.0), (0.2, 0.6), (5.0, 1.0)):
        members = [Member(made, "c", (Pointwise(b),), (), weight=w) for b, w in zip((0.0, -1.0), weights, strict=True)]  # type: ignore[arg-type]
        found = Model(members, CPU, "fp32").predict_image(Image(image, Grid(shape=(5, 6, 7), spacing=(1, 1, 1)), ""), True)
        mean = (weights[0] * parts[0] + weights[1] * parts[1]) / sum(weights)
        assert found.probabilities_czyx is not None
        np.testing.assert_allclose(found.probabilities_czyx, mean, atol=1e-5)
        assert np.array_equal(found.label_zyx, np.array([0, 3, 300])[mean.argmax(0)])


def test_temperatures_change_what_probabilities_are_told_and_never_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    image, grid = steps_image((1, 5, 6, 7), high=2) + 1, Grid(shape=(5, 6, 7), spacing=(1, 1, 1))
    made = plan(ABC, c=configuration((8, 8, 8)))
    logits = [Pointwise(bias)(torch.from_numpy(image)[None])[0][0].numpy() for bias in (0.0, -1.0)]
    given: list[Any] = []
    monkeypatch.setattr("autoseg.inference.model.apply_postprocessing", lambda label, *rest: given.append(rest) or label)
    for temperatures in ((1.0,), (2.5,), (0.5, 4.0)):
        biases = (0.0, -1.0)[: len(temperatures)]
        members = [
            Member(made, "c", (Pointwise(b),), (), temperature=t)  # type: ignore[arg-type]
            for b, t in zip(biases, temperatures, strict=True)
        ]
        one = Model(members, CPU, "fp32", postprocessing=[Spec(kind="threshold")])
        found = one.predict_image(Image(image, grid, ""), probabilities=True)
        pairs = list(zip(logits, temperatures, strict=False))
        raw = sum(softmax(values, axis=0) for values, _ in pairs) / len(pairs)
        told = sum(softmax(values / t, axis=0) for values, t in pairs) / len(pairs)
        assert found.probabilities_czyx is not None
        np.testing.assert_allclose(found.probabilities_czyx, told, atol=1e-5)
        np.testing.assert_allclose(given.pop()[1], raw, atol=1e-5)
        assert np.array_equal(found.label_zyx, np.array([0, 3, 300])[raw.argmax(0)])


@pytest.mark.parametrize("labels", [ABC, NESTED])
def test_uncertainty_of_folds_and_mirrors_is_told_and_changes_no_label(labels: Labels) -> None:
    image, grid = steps_image((1, 9, 10, 11)), Grid(shape=(9, 10, 11), spacing=(1, 1, 1))
    networks = (Regions(), Regions()) if labels is NESTED else (Pointwise(0.0), Pointwise(0.0))
    same = model(networks, (8, 8, 8), labels).predict_image(Image(image, grid, ""), uncertainty=True)
    plain = model(networks, (8, 8, 8), labels).predict_image(Image(image, grid, ""))
    assert np.array_equal(same.label_zyx, plain.label_zyx) and plain.uncertainty_kzyx is None
    assert same.uncertainty_kzyx is not None and same.uncertainty_kzyx.shape == (2, 9, 10, 11)
    assert same.uncertainty_kzyx[0].min() > 0 and same.uncertainty_kzyx[1].max() < 1e-5, "all passes agree"
    if labels is ABC:
        apart = model((Pointwise(0.0), Pointwise(3.0)), (8, 8, 8)).predict_image(Image(image, grid, ""), uncertainty=True)
        assert apart.uncertainty_kzyx is not None and apart.uncertainty_kzyx[1].min() > 0.01
    slope = model(Slope(), (8, 8, 8)).predict_image(Image(image, grid, ""), uncertainty=True)
    assert slope.uncertainty_kzyx is not None and slope.uncertainty_kzyx[1].max() > 0.01, "mirrored copies disagree"
    straight = model(Slope(), (8, 8, 8), mirror=False).predict_image(Image(image, grid, ""), uncertainty=True)
    assert straight.uncertainty_kzyx is not None and straight.uncertainty_kzyx[1].max() < 1e-5


def test_post_processing_gets_the_probabilities_the_image_and_the_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("autoseg.inference.model.apply_postprocessing", lambda label, *rest: given.append(rest) or label)
    image, grid = steps_image((1, 5, 6, 7), high=2) + 1, Grid(shape=(5, 6, 7), spacing=(2.0, 1.0, 1.0))
    for kind, with_probabilities in (("threshold", True), ("largest_component", False)):
        steps = [Spec(kind=kind)]
        found = model(Pointwise(), (8, 8, 8), postprocessing=steps).predict_image(Image(image, grid, ""))
        assert found.probabilities_czyx is None, "they were not asked for"
        seen_steps, probabilities, seen_image, spacing = given.pop()
        assert list(seen_steps) == steps and seen_image is image and spacing == grid.spacing
        assert (probabilities is not None) == with_probabilities
        assert probabilities is None or np.allclose(probabilities.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize(("shape", "message"), [
    ((2, 8, 8, 8), r"the model was trained on 1 channel\(s\) \(channel0\), found 2 in the image"),
    ((9, 8, 8), r"trained on 1 channel\(s\) \(channel0\), found 9"),
    ((8, 8), r"expected an array \(channel, z, y, x\) or \(channel, y, x\), found shape \(8, 8\)"),
    ((1, 1, 8, 8, 8), r"found shape \(1, 1, 8, 8, 8\)"),
])
def test_arrays_of_another_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        model(Pointwise(), (8, 8, 8)).predict(np.zeros(shape, np.float32))


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float64, np.bool_])
def test_any_type_of_number_can_be_predicted_and_the_input_stays(kind: type[np.generic]) -> None:
    image = steps_image((1, 6, 7, 8), high=2).astype(kind)
    before = image.copy()
    assert np.array_equal(model(Pointwise(), (8, 8, 8)).predict(image[:, ::-1]), by_hand(image[0, ::-1].astype(np.float32)))
    assert np.array_equal(image, before)


@pytest.mark.parametrize(("patch", "shape"), [((8, 8, 8), (2, 9, 10, 11)), ((8, 8), (2, 9, 10)), ((8, 8), (2, 3, 9, 10))])
def test_a_real_network_in_bf16_says_about_the_same_as_in_fp32(patch: tuple[int, ...], shape: tuple[int, ...]) -> None:
    config = configuration(patch, channels=2)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    labels = []
    for precision in ("fp32", "bf16"):
        network = build(describe(config, 2, 3), seed=0)
        labels.append(Model([Member(plan(ABC, c=config), "c", (network,), (0,))], CPU, precision).predict(image))  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in network.parameters()) and not network.training
    assert len(np.unique(labels[0])) > 1 and (labels[0] == labels[1]).mean() > 0.95
