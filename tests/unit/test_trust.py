"""What predictions are judged by: maps of uncertainty, an estimate of their Dice, and what is unusual about a case."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import entropy as entropy_of_one
from scipy.stats import spearmanr

from autoseg.arrays.preprocess import preprocess
from autoseg.arrays.quality import (
    DICE_RANGE,
    FEATURES,
    MIN_CASES,
    Beliefs,
    CaseFeatures,
    columns_of,
    estimate_quality,
    fit_quality,
    logit,
    mean_entropy,
    target_features,
    weighted,
)
from autoseg.arrays.restore import WholeLogits, restore_ensemble, restore_probabilities
from autoseg.arrays.uncertainty import (
    PassStatistics,
    entropy_bits,
    entropy_of,
    onto_grid,
    restore_maps,
)
from autoseg.arrays.unusual import combined, describe_image, describe_mask, gather, is_outside, orientation, unusual
from autoseg.inference import Wishes
from autoseg.inference.settle import Rules, settle
from autoseg.types.case import Image, Placement
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan
from autoseg.types.trust import CaseNumbers, Number, Spread

AB = Labels(foreground=(Label(name="a", value=1), Label(name="b", value=5)))


def configuration(normalization: str = "NoNormalization") -> Configuration:
    return Configuration(
        patch_size=(8, 8, 8), batch_size=2, spacing=(1.5, 1.0, 2.0), median_shape=(8.0, 8.0, 8.0),
        strides=((1,) * 3, (2,) * 3), kernel_sizes=((3,) * 3,) * 2, features_per_stage=(4, 8), blocks_per_stage=(1, 1),
        decoder_blocks_per_stage=(1,), batch_dice=False, normalization=(normalization,), use_mask_for_norm=(False,),
    )


def plan(normalization: str = "NoNormalization", orientation: str = "LPS", transpose: tuple[int, int, int] = (0, 1, 2)) -> Plan:
    return Plan(
        dataset_name="x", planner="default", gpu_memory_gb=8, transpose_forward=transpose, channels=("CT",), labels=AB,
        intensities=(), configurations={"c": configuration(normalization=normalization)}, orientation=orientation,
    )


def image(grid: Grid, seed: int = 0, border: int = 0) -> Image:
    array = np.random.default_rng(seed).normal(100, 20, (1, *grid.shape)).astype(np.float32)
    if border:
        array[:, :border] = 0
    return Image(array, grid, ".nii.gz")


def placed(seed: int = 0, made: Plan | None = None) -> Placement:
    turned = ((0.0, 0.0, -1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    scan = image(Grid(shape=(9, 12, 14), spacing=(2.0, 1.2, 0.9), direction=turned), seed, border=2)
    return preprocess(scan, None, made or plan(transpose=(1, 0, 2)), configuration()).placement


# Entropy and disagreement


def test_entropy_is_that_of_the_probabilities_in_bits():
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 3
    probable = softmax(logits.numpy(), 1)
    np.testing.assert_allclose(entropy_bits(logits, False).numpy(), entropy_of_one(probable, base=2, axis=1), atol=1e-5)
    yes = expit(logits.numpy())
    sums = sum(entropy_of_one(np.stack([y, 1 - y]), base=2, axis=0) for y in np.moveaxis(yes, 1, 0))
    np.testing.assert_allclose(entropy_bits(logits, True).numpy(), sums, atol=1e-5)
    np.testing.assert_allclose(entropy_of(torch.from_numpy(probable), False, 1).numpy(), entropy_bits(logits, False), atol=1e-5)
    np.testing.assert_allclose(entropy_of(torch.from_numpy(yes), True, 1).numpy(), entropy_bits(logits, True), atol=1e-5)
    tie = torch.tensor([[3.0, 3.0, -90.0], [90.0, -90.0, 0.0]])
    assert entropy_bits(tie, False).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_disagreement_is_the_mean_divergence_of_the_passes_from_the_answer(regions, temperature):
    generator = torch.Generator().manual_seed(1)
    passes = torch.randn(3, 4, 2, 5, 6, generator=generator).double() * 3  # networks, mirrors, tile, classes, voxels
    statistics = PassStatistics(temperature, regions)
    for network in passes:
        for one in network:
            statistics.add_pass(one)
        statistics.add_network(network.mean(0))
    member, mirrors, whole = statistics.maps(passes.mean((0, 1))).unbind(1)

    def divergence(answer: torch.Tensor, ones: torch.Tensor, scale: float) -> np.ndarray:
        if regions:
            p, q = torch.sigmoid(answer / scale), torch.sigmoid(ones / scale)
            each = p * (p / q).log2() + (1 - p) * ((1 - p) / (1 - q)).log2()
        else:
            p, q = torch.softmax(answer / scale, -2), torch.softmax(ones / scale, -2)
            each = p * (p / q).log2()
        return each.sum(-2).mean(0).numpy()

    flat = passes.flatten(0, 1)
    np.testing.assert_allclose(whole[0], divergence(flat.mean(0)[0], flat[:, 0], temperature), atol=1e-6)
    single = np.mean([divergence(network.mean(0)[1], network[:, 1], 1.0) for network in passes], 0)
    np.testing.assert_allclose(mirrors[1], single, atol=1e-6)
    np.testing.assert_allclose(member, torch.stack([entropy_bits(n.mean(0), regions) for n in passes]).mean(0), atol=1e-6)


def test_one_pass_disagrees_with_nobody():
    statistics, logits = PassStatistics(1.5, False), torch.randn(1, 3, 4, 4) * 20
    statistics.add_pass(logits)
    statistics.add_network(logits)
    member, mirrors, whole = statistics.maps(logits).unbind(1)
    assert not mirrors.any() and whole.abs().max() < 1e-5 and torch.allclose(member, entropy_bits(logits, False))


def test_maps_lie_in_the_image_as_probabilities_do():
    """An interpolated map is the interpolated probability of logits that are 0 and log(p / (1 - p)), where voxels only copy."""
    grid = Grid(shape=(9, 12, 14), spacing=(1.5, 1.0, 2.0))
    placement = preprocess(image(grid, border=2), None, plan(), configuration()).placement
    assert placement.shape == placement.cropped_shape
    share = torch.rand(1, *placement.shape, generator=torch.Generator().manual_seed(2)) * 0.9 + 0.05
    logits = torch.cat([torch.zeros_like(share), torch.logit(share)])
    np.testing.assert_allclose(restore_maps(share, placement)[0], restore_probabilities(logits, placement)[1], atol=1e-6)


def test_a_plane_of_values_stays_one_under_interpolation_flips_and_transposes():
    placement = placed()
    spots = [(torch.arange(n) + 0.5) / n * size for n, size in zip(placement.shape, placement.cropped_shape, strict=True)]
    ramp = spots[0][:, None, None] + 10 * spots[1][:, None] + 100 * spots[2]
    found = restore_maps(torch.stack([ramp, -ramp]), placement)
    assert found.shape == (2, *placement.stored.shape) and found.dtype == np.float32 and np.array_equal(found[0], -found[1])
    inside = placement.axis_map.apply(found[0]).transpose(placement.transpose)
    inside = inside[tuple(slice(*bounds) for bounds in placement.crop_zyx)]
    z, y, x = np.indices(placement.cropped_shape) + 0.5
    core = (slice(2, -2),) * 3
    np.testing.assert_allclose(inside[core], (z + 10 * y + 100 * x)[core], rtol=1e-5)
    assert not found[0, :2].any() and np.count_nonzero(found[0]) == np.prod(placement.cropped_shape)


class Asked(WholeLogits):
    """Logits that may be asked for once, in rising order."""

    def __init__(self, logits):
        super().__init__(logits)
        self.reached = 0

    def planes(self, low, high):
        assert low >= self.reached, "no plane is asked for twice"
        self.reached = high
        return super().planes(low, high)


def judged(members, temperatures, regions=None, **wishes):
    """What settling members' logits gives that were made with uncertainty: `logits, maps, placement` of each."""
    sources = [Asked(torch.cat([logits, maps])) for logits, maps, _ in members]
    rules = Rules(len(members[0][0]), regions, (1.0,) * len(members), tuple(temperatures))
    return settle(sources, [placement for _, _, placement in members], rules, Wishes(uncertainty=True, **wishes))


def test_one_members_maps_are_its_entropy_and_disagreement():
    placement = placed()
    logits = torch.randn(3, *placement.shape, generator=torch.Generator().manual_seed(3))
    maps = torch.rand(3, *placement.shape)
    found = judged([(logits, maps, placement)], [2.0])
    expected = torch.stack([entropy_bits(logits / 2, False, 0), maps[2]])
    np.testing.assert_allclose(found.uncertainty_kzyx, restore_maps(expected, placement), atol=1e-6)
    np.testing.assert_array_equal(found.inside_zyx, restore_ensemble([(logits, placement)])[0])


@pytest.mark.parametrize("regions", [None, (1, 2)])
def test_members_that_disagree_are_less_certain_than_each_alone(regions):
    placement = placed()
    sure = torch.zeros(2, *placement.shape)
    sure[0] = 20
    if regions:
        sure[1] = -20
    other, quiet = sure.flip(0), torch.zeros(3, *placement.shape)
    for second, expected in ((sure, 0.0), (other, 2.0 if regions else 1.0)):
        entropy, disagreement = judged(
            [(sure, quiet, placement), (second, quiet, placement)], [1.0, 1.0], regions).uncertainty_kzyx
        inside = restore_maps(torch.ones(1, *placement.shape), placement)[0] > 0.999
        assert inside.any() and entropy[inside] == pytest.approx(expected, abs=1e-4)
        assert disagreement[inside] == pytest.approx(expected, abs=1e-4)
        assert not entropy[~inside].any()


@pytest.mark.parametrize("regions", [None, (1, 2, 3)])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 0.5)])
def test_members_on_different_grids_are_judged_while_their_planes_go_by(regions, temperatures):
    first = placed()
    z, y, x = first.shape
    second = dataclasses.replace(first, shape=(z + 3, y - 1, x + 2))
    generator = torch.Generator().manual_seed(5)
    members = [(torch.randn(3, *p.shape, generator=generator), torch.rand(3, *p.shape, generator=generator), p)
               for p in (first, second)]
    found = judged(members, temperatures, regions, probabilities=True)
    pairs = [(logits, placement) for logits, _, placement in members]
    label, probable = restore_ensemble(pairs, regions, True, temperatures=temperatures)
    np.testing.assert_array_equal(found.inside_zyx, label)
    np.testing.assert_array_equal(found.told_czyx, probable)
    onto = [(logits, onto_grid(first, placement)) for logits, placement in pairs]
    mean = restore_ensemble(onto, regions, True, temperatures=temperatures)[1]
    entropy = entropy_of(torch.from_numpy(mean), regions is not None)
    np.testing.assert_allclose(found.uncertainty_kzyx[0], restore_maps(entropy[None], first)[0], atol=1e-5)
    assert [one.maps.shape[1:] for one in found.gauges] == [first.shape, second.shape]
    assert all(torch.equal(one.maps, maps) for one, (_, maps, _) in zip(found.gauges, members, strict=True))


# The quality estimate


@pytest.mark.parametrize("regions", [False, True])
def test_beliefs_are_the_decision_and_sums_of_probabilities(regions):
    logits = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(4)) * 2
    found = Beliefs(3, (4, 5, 6), regions)
    for z in range(4):
        found.look(z, logits[:, z])
    probable = (logits.sigmoid() if regions else logits.softmax(0)).numpy()
    inside = probable > 0.5 if regions else probable.argmax(0) == np.arange(3).reshape(3, 1, 1, 1)
    assert np.array_equal(found.decision, inside if regions else probable.argmax(0))
    np.testing.assert_allclose(found.everywhere, probable.sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found.own, (probable * inside).sum((1, 2, 3)), rtol=1e-5)


def cube(side: int = 6) -> np.ndarray:
    mask = np.zeros((16, 16, 16), bool)
    mask[4 : 4 + side, 4 : 4 + side, 4 : 4 + side] = True
    return mask


def test_features_of_a_cube_are_those_worked_out_by_hand():
    mask = cube()
    mask[0, 0, 0] = True
    entropy = np.where(mask, 0.5, 0.1)
    found = target_features(mask, entropy, np.full(mask.shape, 0.25), (240.0, 200.0), 0.001, (1.0, 1.0, 1.0))
    assert found is not None and set(found) == set(FEATURES)
    band = (8**3 - 4**3) + 8
    inside = 6**3 - 4**3 + 1
    assert found["expected_dice"] == pytest.approx(logit(400 / (217 + 240)))
    assert found["entropy_inside"] == pytest.approx(np.log(0.5 + 1e-3))
    assert found["entropy_boundary"] == pytest.approx(np.log((0.5 * inside + 0.1 * (band - inside)) / band + 1e-3))
    assert found["disagreement_boundary"] == pytest.approx(np.log(0.25 + 1e-4))
    assert found["log_volume"] == pytest.approx(np.log(0.217)) and found["log_components"] == pytest.approx(np.log(2))
    assert target_features(np.zeros((4, 4, 4), bool), entropy, entropy, (0.0, 0.0), 1.0, (1.0, 1.0, 1.0)) is None


def test_elongation_is_that_of_a_box_in_millimetres() -> None:
    """Variances of a box of sides a, b, c are a^2 / 12 and so on, its voxels' own extent included."""
    mask = np.zeros((16, 16, 16), bool)
    mask[2:14, 4:8, 5:11] = True
    found = target_features(mask, np.zeros(mask.shape), np.zeros(mask.shape), (1.0, 1.0), 1.0, (0.5, 1.0, 3.0))
    assert found is not None and found["log_elongation"] == pytest.approx(2 * np.log(18 / 4))
    mask[:] = False
    mask[3, 3, 3] = True
    found = target_features(mask, np.zeros(mask.shape), np.zeros(mask.shape), (1.0, 1.0), 1.0, (1.0, 1.0, 2.0))
    assert found is not None and found["log_elongation"] == pytest.approx(2 * np.log(2)), "one voxel"


def test_a_flat_band_stays_in_its_slices():
    mask, entropy = cube(), np.zeros((16, 16, 16))
    entropy[3] = 1
    deep, flat = (target_features(mask, entropy, entropy, (1.0, 1.0), 1.0, (1.0, 1.0, 1.0), flat) for flat in (False, True))
    assert deep is not None and flat is not None
    assert flat["entropy_boundary"] == pytest.approx(np.log(1e-3)) and deep["entropy_boundary"] > np.log(0.1)


def test_an_estimate_rests_on_what_was_found() -> None:
    one = dict.fromkeys(FEATURES, 1.0) | {"entropy_inside": np.log(0.5 + 1e-3)}
    other = dict.fromkeys(FEATURES, 3.0) | {"entropy_inside": np.log(0.1 + 1e-3)}
    case = {"a": one, "b": other, "c": None}
    mean, own = columns_of(case, None), columns_of(case, "b")
    assert mean is not None and mean["log_volume"] == 2 and mean["missing"] == pytest.approx(1 / 3)
    assert own is not None and own["log_volume"] == own["b: log_volume"] == 3 and own["a: log_volume"] == 1
    assert np.isnan(own["c: log_volume"])
    assert columns_of(case, "c") is None and columns_of({"a": None}, None) is None
    assert mean_entropy(case) == pytest.approx(0.3) and mean_entropy({"a": None}) is None
    both = weighted([one, other, None], [3.0, 1.0, 5.0])
    assert both is not None and both["log_volume"] == pytest.approx(1.5) and weighted([None], [1.0]) is None


def crossval(count: int, noise: float, seed: int = 0, folds: int = 5) -> tuple[list[CaseFeatures], list[float], list[int]]:
    """Cases with two structures, whose Dice depends on one feature of each, and noise."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(0, 1, (count, 2, len(FEATURES)))
    target = 1.5 + 0.8 * rows[:, 0, 0] - 0.6 * rows[:, 1, 3] + rng.normal(0, noise, count)
    named = [{n: dict(zip(FEATURES, map(float, one), strict=True)) for n, one in zip("ab", row, strict=True)} for row in rows]
    return named, [float(d) for d in expit(target)], [i % folds for i in range(count)]


@pytest.mark.parametrize("own", [None, "a"])
def test_the_estimate_follows_the_dice_on_cases_it_was_not_fitted_on(own: str | None) -> None:
    model = fit_quality(*crossval(150, 0.3), own)
    assert model is not None and model.cases == 150 and model.spearman is not None
    assert model.spearman > 0.9 and model.error < 0.5 * model.plain_error
    assert "b: disagreement_boundary" in model.features, "the other structure says something"
    features, dice, _ = crossval(400, 0.3, seed=1)
    found = np.array([estimate_quality(model, one, own) for one in features])
    assert spearmanr(found[:, 0], dice).statistic > 0.9
    assert (found[:, 1] < found[:, 0]).all() and (found[:, 0] < found[:, 2]).all()
    inside = ((found[:, 1] <= dice) & (dice <= found[:, 2])).mean()
    assert 0.84 < inside < 0.96 and model.coverage == pytest.approx(0.9, abs=0.06)


def test_volumes_far_from_the_usual_count_in_both_directions() -> None:
    features, _, parts = crossval(100, 0.1)
    volumes = np.array([case["a"]["log_volume"] for case in features])  # type: ignore[index]
    dice = expit(2 - np.abs(volumes)).tolist()
    model = fit_quality([{"a": case["a"]} for case in features], dice, parts, "a")
    assert model is not None and model.spearman is not None and model.spearman > 0.9
    assert model.features == (*FEATURES, "missing")


def test_with_few_cases_each_structure_is_judged_by_its_own_features() -> None:
    few, many = (fit_quality(*crossval(count, 0.1), "a") for count in (149, 150))
    assert few is not None and few.features == (*FEATURES, "missing")
    assert many is not None and len(many.features) == 15 and {"a: log_volume", "b: log_volume"} <= set(many.features)


def test_a_structure_that_was_not_found_in_a_case_is_left_to_the_others() -> None:
    features, dice, parts = crossval(154, 0.1)
    holes = [{**case, "b": None} if i % 7 == 0 else case for i, case in enumerate(features)]
    model = fit_quality(holes, dice, parts)
    assert model is not None and model.cases == 154 and model.spearman is not None and model.spearman > 0.8
    assert estimate_quality(model, holes[0]) is not None and estimate_quality(model, {"a": None, "b": None}) is None
    own = fit_quality(holes, dice, parts, "b")
    assert own is not None and own.cases == 132 and estimate_quality(own, holes[0], "b") is None


def test_features_that_say_nothing_are_not_believed() -> None:
    """Held back, an estimate from noise is no better than the mean, and says so."""
    ranks, ratios = [], []
    for seed in range(10):
        features, _, parts = crossval(60, 0.3, seed)
        dice = np.random.default_rng(100 + seed).uniform(0.5, 0.95, 60).tolist()
        model = fit_quality(features, dice, parts)
        assert model is not None
        ranks.append(model.spearman or 0.0)
        ratios.append(model.error / model.plain_error)
    assert abs(np.mean(ranks)) < 0.2 and 0.95 < np.mean(ratios) < 1.25


def test_too_few_cases_or_parts_give_no_estimate():
    features, dice, parts = crossval(MIN_CASES, 0.1)
    assert fit_quality(features, dice, parts) is not None
    assert fit_quality(features[1:], dice[1:], parts[1:]) is None
    assert fit_quality([{"a": None, "b": None}, *features[1:]], dice, parts) is None
    assert fit_quality(features, [None, *dice[1:]], parts) is None
    assert fit_quality(features, dice, [i % 2 for i in range(MIN_CASES)]) is None


def test_equal_dice_everywhere_has_no_rank_correlation():
    features, dice, parts = crossval(40, 0.1)
    model = fit_quality(features, [0.9] * len(dice), parts)
    assert model is not None and model.spearman is None and model.error == pytest.approx(0, abs=1e-6)


def test_a_case_beyond_all_training_cases_gets_an_estimate_within_bounds():
    model = fit_quality(*crossval(60, 0.3))
    assert model is not None
    for value in (-1e6, 1e6):
        found = estimate_quality(model, {"a": dict.fromkeys(FEATURES, value), "b": None})
        assert found is not None and 0 <= found[1] <= found[0] <= found[2] <= 1
    assert logit(0.0) == logit(DICE_RANGE[0]) and logit(1.0) == logit(DICE_RANGE[1])


# Unusual cases


def cohort(count: int, spacing: float = 1.0) -> list[CaseNumbers]:
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        grid = Grid(shape=(20, int(rng.integers(28, 36)), 30), spacing=(spacing * float(rng.uniform(0.8, 1.2)), 1.0, 1.0))
        label = np.zeros(grid.shape, np.uint8)
        label[5:12, 5 : int(rng.integers(12, 20)), 5:15] = 1
        label[14:16, 5:10, 5:10] = 5
        made.append(combined(describe_image(image(grid, seed), plan(), configuration()), describe_mask(label, grid, AB)))
    return made


def test_each_difference_is_told_with_its_number_and_the_range_of_the_training_cases():
    cases = cohort(60)
    training = gather(cases)
    assert training.cases == 60 and training.found == {"a": 60, "b": 60}
    grid = Grid(shape=(20, 32, 30), spacing=(5.0, 1.0, 1.0))
    scan = image(grid, 1)
    label = np.zeros(grid.shape, np.uint8)
    label[1:19, 1:30, 1:29] = 1
    strange = combined(
        describe_image(Image(scan.array_czyx + 500, grid, ""), plan(), configuration()), describe_mask(label, grid, AB)
    )
    lines = unusual(strange, training)
    spread = training.numbers["spacing z"]
    assert f"spacing z 5 mm is outside {spread.low:.4g} to {spread.high:.4g} mm of 60 training cases" in lines
    assert any(line.startswith("field of view z 100 mm is outside") for line in lines)
    assert any(line.startswith("CT mean ") for line in lines) and any(line.startswith("volume of a ") for line in lines)
    assert "no b found, which all 60 training cases have" in lines
    assert not any("spacing y" in line or "standard deviation " in line for line in lines)


def test_cases_like_the_training_cases_are_hardly_ever_unusual():
    cases = cohort(100)
    for count in (5, 20, 50):
        training = gather(cases[:count])
        flagged = sum(bool(unusual(case, training)) for case in cases[50:])
        assert flagged <= 2, f"{flagged} of 50 with {count} training cases"


def test_equal_numbers_allow_small_differences_only():
    same = Spread(low=2.0, high=2.0, mean=float(np.log(2)), deviation=0.0, cases=30, log=True)
    assert not is_outside(2.01, same) and is_outside(2.1, same) and is_outside(1.5, same) and is_outside(-1.0, same)
    tilt = Spread(low=0.0, high=0.0, mean=0.0, deviation=0.0, cases=30, slack=2.0)
    assert not is_outside(1.9, tilt) and is_outside(5.0, tilt)
    assert not is_outside(100.0, same.model_copy(update={"cases": 1})), "one case has no range"


def test_standardised_images_may_have_any_scale_and_offset_but_not_another_shape():
    made, config = plan("ZScoreNormalization"), configuration(normalization="ZScoreNormalization")
    grid = Grid(shape=(20, 30, 30), spacing=(1.0, 1.0, 1.0))
    training = gather([describe_image(image(grid, seed), made, config) for seed in range(20)])
    scan = image(grid, 99).array_czyx
    assert unusual(describe_image(Image(7 * scan + 3000, grid, ""), made, config), training) == []
    skewed = Image(np.exp(scan / 20), grid, "")
    assert any("99th percentile" in line for line in unusual(describe_image(skewed, made, config), training))


def test_the_orientation_counts_only_where_images_are_taken_as_stored():
    turned = Grid(shape=(20, 30, 30), spacing=(1.0, 1.0, 1.0), direction=((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0)))
    straight = Grid(shape=(20, 30, 30), spacing=(1.0, 1.0, 1.0))
    assert orientation(straight) == "LPS" and orientation(turned) == "RAS"
    swapped = Grid(shape=(4, 5, 6), spacing=(1, 1, 1), direction=((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)))
    assert orientation(swapped) == "SPL"
    for kind, expected in (("as_stored", ["orientation RAS occurs in no training case (LPS 12)"]), ("LPS", [])):
        made = plan(orientation=kind)
        training = gather([describe_image(image(straight, seed), made, configuration()) for seed in range(12)])
        assert unusual(describe_image(image(turned, 3), made, configuration()), training) == expected


def test_a_tilted_scan_is_told_by_its_angle():
    angle = np.radians(20)
    tilted = ((np.cos(angle), -np.sin(angle), 0.0), (np.sin(angle), np.cos(angle), 0.0), (0.0, 0.0, 1.0))
    training = gather(cohort(20))
    grid = Grid(shape=(20, 32, 30), spacing=(1.0, 1.0, 1.0), direction=tilted)
    lines = unusual(describe_image(image(grid, 5), plan(), configuration()), training)
    assert "tilt 20 degrees is outside 0 to 0 degrees of 20 training cases" in lines


def test_pictures_have_no_depth_and_empty_images_no_intensities():
    grid = Grid(shape=(1, 30, 40), spacing=(999.0, 1.0, 1.0), has_direction=False)
    found = describe_image(image(grid), plan(), configuration())
    assert not any(name.endswith(" z") for name in found.numbers) and "tilt" not in found.numbers
    empty = describe_image(Image(np.zeros((1, 1, 30, 40)), grid, ""), plan(), configuration())
    assert empty.numbers["CT share of zeros"] == Number(value=1.0, slack=0.05) and "CT mean" not in empty.numbers
    assert describe_mask(np.zeros((1, 30, 40), int), grid, AB) == CaseNumbers()
