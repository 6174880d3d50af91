"""The previous stage's segmentation: on the next stage's grid, altered in training, stored, and handed on at prediction."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import ball
from torch import nn

from autoseg.arrays.cascade import OPERATIONS, labels_on_grid, morph, morph_label, one_hot, remove_component
from autoseg.arrays.preprocess import preprocess
from autoseg.errors import RecordError
from autoseg.files.preprocessed import open_case, previous_key, write_case, write_previous
from autoseg.inference import Member, Model
from autoseg.types.case import Image, Preprocessed
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.plan import Configuration, Plan

CPU = torch.device("cpu")
AB = Labels(foreground=(Label(name="a", value=3), Label(name="b", value=300)))
NESTED = Labels(
    foreground=(Label(name="edema", value=1), Label(name="core", value=4)),
    regions=(Region(name="whole", values=(1, 4)), Region(name="core", values=(4,))), region_order=(1, 4),
)


def blobs(shape: tuple[int, ...], seed: int = 0, share: float = 0.5) -> NDArray[np.bool_]:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5, mode="wrap")
    return np.asarray(noise > np.quantile(noise, 1 - share))


def by_scipy(mask: NDArray[np.bool_], operation: str, radius: int) -> NDArray[np.bool_]:
    """Morphology by a structuring element; what lies beyond the border changes nothing."""
    def dilate(m: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.asarray(ndimage.binary_dilation(m, ball(radius)))

    def erode(m: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.asarray(ndimage.binary_erosion(m, ball(radius), border_value=1))

    if operation in ("dilate", "erode"):
        return dilate(mask) if operation == "dilate" else erode(mask)
    return dilate(erode(mask)) if operation == "open" else erode(dilate(mask))


class TestMorphology:
    @pytest.mark.parametrize("shape", [(18, 20, 22), (1, 24, 25), (3, 30, 7)])
    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize("radius", [1, 2, 3, 5, 8])
    def test_it_equals_that_of_a_ball_as_structuring_element(
        self, shape: tuple[int, int, int], operation: Any, radius: int
    ) -> None:
        for seed, share in enumerate((0.03, 0.5, 0.97)):
            mask = blobs(shape, seed, share)
            found = morph(torch.from_numpy(mask), operation, radius).numpy()
            assert found.dtype == np.bool_ and np.array_equal(found, by_scipy(mask, operation, radius))

    @pytest.mark.parametrize("radius", [1.0, 1.4, 1.5, 2.3, 4.7, 7.99, 11.0])
    def test_a_radius_between_whole_numbers_reaches_every_voxel_up_to_that_distance(self, radius: float) -> None:
        mask = np.zeros((25, 25, 25), bool)
        mask[12, 12, 12] = True
        expected = ndimage.distance_transform_edt(~mask) <= radius
        assert np.array_equal(morph(torch.from_numpy(mask), "dilate", radius).numpy(), expected)

    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize("value", [True, False])
    def test_empty_and_full_masks_stay(self, operation: Any, value: bool) -> None:
        mask = torch.full((5, 6, 7), value)
        assert torch.equal(morph(mask, operation, 8.0), mask)

    def test_a_radius_that_cannot_be_counted_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at most 11 voxels, found 12"):
            morph(torch.zeros(3, 3, 3, dtype=torch.bool), "dilate", 12)

    def test_a_label_that_grows_takes_voxels_from_others_and_one_that_shrinks_leaves_background(self) -> None:
        line = torch.zeros(1, 1, 9, dtype=torch.int16)
        line[0, 0, 2:5], line[0, 0, 5:8] = 1, 2
        assert morph_label(line, 1, "dilate", 2).flatten().tolist() == [1, 1, 1, 1, 1, 1, 1, 2, 0]
        assert morph_label(line, 1, "erode", 1).flatten().tolist() == [0, 0, 0, 1, 0, 2, 2, 2, 0]
        assert morph_label(line, 2, "open", 2).flatten().tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0]
        assert morph_label(line, 3, "dilate", 2).flatten().tolist() == line.flatten().tolist()
        assert morph_label(line, 1, "dilate", 2).dtype == torch.int16 and line[0, 0, 2:8].tolist() == [1, 1, 1, 2, 2, 2]


class TestRemoval:
    def scene(self) -> torch.Tensor:
        label = torch.zeros(10, 10, 10, dtype=torch.int16)
        label[0, 0, :3], label[5, 5, 5:7], label[8, 8, 8], label[2, 2, 2] = 1, 1, 1, 2
        return label

    @pytest.mark.parametrize(("choice", "left"), [(0.0, 3), (0.32, 3), (0.34, 4), (0.66, 4), (0.67, 5), (0.999, 5)])
    def test_one_component_of_the_label_goes_and_the_choice_says_which(self, choice: float, left: int) -> None:
        before = self.scene()
        after = remove_component(before, 1, choice, 0.15)
        assert int((after == 1).sum()) == left and int((after == 2).sum()) == 1
        assert torch.equal(before, self.scene()) and after.dtype == before.dtype

    def test_voxels_that_touch_by_a_corner_go_together(self) -> None:
        label = torch.zeros(6, 6, 6, dtype=torch.int16)
        label[1, 1, 1] = label[2, 2, 2] = label[3, 3, 2] = 1
        assert not remove_component(label, 1, 0.5, 0.15).any()

    def test_components_of_15_percent_of_the_patch_or_more_stay(self) -> None:
        label = torch.zeros(10, 10, 10, dtype=torch.int16)
        label[0], label[1, :5] = 1, 1
        assert torch.equal(remove_component(label, 1, 0.0, 0.15), label)
        label[1, 4, 9] = 0
        assert not remove_component(label, 1, 0.0, 0.15).any()

    def test_only_small_components_are_candidates(self) -> None:
        label = torch.zeros(10, 10, 10, dtype=torch.int16)
        label[:3], label[8, 8, 8] = 1, 1
        assert int(remove_component(label, 1, 0.0, 0.15).sum()) == 300

    def test_a_label_that_is_not_there_changes_nothing(self) -> None:
        assert torch.equal(remove_component(self.scene(), 3, 0.5, 0.15), self.scene())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.float32])
def test_one_hot_has_a_channel_for_each_label_and_none_for_background(kind: torch.dtype) -> None:
    label = torch.randint(0, 4, (2, 3, 4, 5)).to(kind)
    channels = one_hot(label, 3)
    assert channels.shape == (2, 3, 3, 4, 5) and channels.dtype == torch.float32
    for value in (1, 2, 3):
        assert torch.equal(channels[:, value - 1], (label == value).float())
    assert torch.equal(one_hot(label[0], 3), channels[0])


def configuration(patch: tuple[int, ...], spacing: float = 1.0, previous: str | None = None) -> Configuration:
    dims = len(patch)
    return Configuration(
        patch_size=patch, batch_size=3, spacing=(spacing,) * dims, median_shape=tuple(map(float, patch)),
        strides=((1,) * dims, (2,) * dims), kernel_sizes=((3,) * dims,) * 2, features_per_stage=(4, 8), blocks_per_stage=(1, 1),
        decoder_blocks_per_stage=(1,), batch_dice=False, normalization=("NoNormalization",), use_mask_for_norm=(False,),
        previous_stage=previous,
    )


def plan(labels: Labels = AB, spacing: float = 2.0, patch: tuple[int, int, int] = (8, 8, 8)) -> Plan:
    return Plan(
        dataset_name="x", planner="default", gpu_memory_gb=8, transpose_forward=(1, 0, 2), channels=("c",), labels=labels,
        intensities=(), configurations={"low": configuration(patch, spacing), "high": configuration(patch, 1.0, "low")},
    )


def image(shape: tuple[int, int, int] = (13, 18, 16), seed: int = 0) -> Image:
    array = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2).astype(np.float32)
    array = array / array.std() + 1
    array[:2], array[:, :, -3:] = 0, 0
    grid = Grid(shape=shape, spacing=(1.0, 1.0, 1.0), direction=((1.0, 0, 0), (0, -1.0, 0), (0, 0, 1.0)))
    return Image(array[None], grid, ".nii.gz")


def stages(scan: Image, made: Plan) -> tuple[Preprocessed, Preprocessed]:
    low, high = (preprocess(scan, None, made, made.configurations[name]) for name in ("low", "high"))
    return low, high


class TestGrid:
    def test_labels_are_the_largest_of_the_interpolated_logits(self) -> None:
        low, high = stages(image(), plan())
        logits = torch.randn(3, *low.placement.shape, generator=torch.Generator().manual_seed(0))
        wide = torch.nn.functional.interpolate(logits[None], high.placement.shape, mode="trilinear", align_corners=False)[0]
        found = labels_on_grid(logits, low.placement, high.placement)
        assert found.shape == high.placement.shape and found.dtype == np.uint8
        assert (found == wide.argmax(0).numpy()).mean() > 0.999

    def test_regions_write_their_labels_later_ones_over_earlier_ones(self) -> None:
        low, high = stages(image(), plan())
        logits = torch.randn(2, *low.placement.shape, generator=torch.Generator().manual_seed(0))
        wide = torch.nn.functional.interpolate(logits[None], high.placement.shape, mode="trilinear", align_corners=False)[0]
        found = labels_on_grid(logits, low.placement, high.placement, (1, 2))
        assert (found == np.where(wide[1] > 0, 2, np.where(wide[0] > 0, 1, 0))).mean() > 0.999

    def test_nothing_is_interpolated_on_an_equal_grid(self) -> None:
        low, high = stages(image(), plan(spacing=1.0))
        logits = torch.randn(3, *low.placement.shape)
        assert np.array_equal(labels_on_grid(logits, low.placement, high.placement), logits.argmax(0).numpy())

    def test_another_image_is_refused(self) -> None:
        (low, _), (_, other) = stages(image(), plan()), stages(image((13, 18, 17)), plan())
        with pytest.raises(ValueError, match="from one crop of one image"):
            labels_on_grid(torch.zeros(3, *low.placement.shape), low.placement, other.placement)


class Levels(nn.Module):
    """a where the image is about 1 or more, b where it is about 2 or more."""

    def forward(self, x: torch.Tensor, head_count: int = 1) -> list[torch.Tensor]:
        return [torch.stack([torch.full_like(x[:, 0], 0.25), x[:, 0] - 0.5, 2 * x[:, 0] - 2.0], 1)]


class TwoRegions(nn.Module):
    """Two regions: the first where the channel exceeds 0.5, the second where it exceeds 1.5."""

    def forward(self, x: torch.Tensor, head_count: int = 1) -> list[torch.Tensor]:
        return [torch.stack([x[:, 0] - 0.5, x[:, 0] - 1.5], 1)]


class Echo(nn.Module):
    """Says what the channels of the previous stage say; with `swap` a for b and b for a."""

    def __init__(self, swap: bool = False, regions: bool = False) -> None:
        super().__init__()
        self.swap, self.regions = swap, regions
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, head_count: int = 1) -> list[torch.Tensor]:
        self.seen.append(x.clone())
        a, b = (x[:, 2], x[:, 1]) if self.swap else (x[:, 1], x[:, 2])
        rest = torch.full_like(a, 0.5)
        return [torch.stack([a + b - 0.5, b - 0.5], 1) if self.regions else torch.stack([rest, a, b], 1)]


def cascade(made: Plan, first: nn.Module, second: Any, mirror: bool = True) -> Model:
    networks: Any = second if isinstance(second, tuple) else (second,)
    low = Member(made, "low", (first,), (0, 1, 2))  # type: ignore[arg-type]
    return Model([Member(made, "high", networks, (0, 1, 2), low)], CPU, "fp32", mirror)


class TestPrediction:
    @pytest.mark.parametrize("mirror", [True, False])
    @pytest.mark.parametrize("spacing", [1.0, 2.0])
    def test_the_second_network_sees_what_the_first_says(self, mirror: bool, spacing: float) -> None:
        made, scan = plan(spacing=spacing), image()
        model = cascade(made, Levels(), Echo(), mirror)
        low, high = stages(scan, made)
        logits = Model([Member(made, "low", (Levels(),), ())], CPU, "fp32").logits(model.members[0].previous, low)  # type: ignore[arg-type]
        expected = labels_on_grid(logits, low.placement, high.placement)
        assert set(np.unique(expected)) == {0, 1, 2}
        [case] = model.prepare(scan)
        assert np.array_equal(model.logits(model.members[0], case).argmax(0).numpy(), expected)
        assert set(np.unique(model.predict_image(scan).label_zyx)) == {0, 3, 300}

    def test_its_channels_are_flipped_and_cut_with_the_image(self) -> None:
        echo = Echo()
        cascade(plan(spacing=1.0), Levels(), echo).predict_image(image())
        assert len(echo.seen) > 8
        for tile in echo.seen:
            assert tile.shape[1:] == (3, 8, 8, 8)
            said = Levels()(tile[:, :1])[0].argmax(1)
            assert torch.equal(tile[:, 1:], one_hot(said, 2))

    def test_regions_become_one_channel_per_label(self) -> None:
        echo = Echo(regions=True)
        scan = image()
        model = cascade(plan(NESTED, spacing=1.0), TwoRegions(), echo)
        label = model.predict_image(scan).label_zyx
        inside = scan.array_czyx[0] != 0
        assert np.array_equal(label[inside], np.select([scan.array_czyx[0] > 1.5, scan.array_czyx[0] > 0.5], [4, 1], 0)[inside])
        assert all(set(np.unique(tile[:, 1:].sum(1))) <= {0.0, 1.0} for tile in echo.seen)

    def test_the_folds_of_the_second_stage_are_averaged_over_one_segmentation(self) -> None:
        made, scan = plan(spacing=1.0), image()
        model = cascade(made, Levels(), (Echo(), Echo(swap=True), Echo(swap=True)))
        straight, swapped = (cascade(made, Levels(), Echo(swap)).predict_image(scan).label_zyx for swap in (False, True))
        assert not np.array_equal(straight, swapped)
        assert np.array_equal(model.predict_image(scan).label_zyx, swapped)

    def test_arrays_are_predicted_through_both_stages(self) -> None:
        made = plan(spacing=1.0).model_copy(update={"transpose_forward": (0, 1, 2)})
        array = np.random.default_rng(0).integers(1, 3, (1, 9, 10, 11)).astype(np.float32)
        assert np.array_equal(cascade(made, Levels(), Echo()).predict(array), np.where(array[0] == 2, 300, 3))

    def test_a_case_that_was_not_prepared_for_the_first_stage_is_refused(self) -> None:
        made = plan()
        model = cascade(made, Levels(), Echo())
        [case] = model.prepare(image())
        with pytest.raises(ValueError, match="not prepared for the previous stage"):
            model.logits(model.members[0], dataclasses.replace(case, previous=None))

    def test_memory_is_counted_for_both_stages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made, scan = plan(spacing=0.5), image()
        alone = Model([Member(made, "high", (Echo(),), ())], CPU, "fp32")  # type: ignore[arg-type]
        both = cascade(made, Levels(), Echo())
        assert both.needed_bytes(scan.grid) > 2 * alone.needed_bytes(scan.grid)
        monkeypatch.setattr("autoseg.inference.memory.memory_available_bytes", lambda: 2 * alone.needed_bytes(scan.grid))
        with pytest.raises(MemoryError, match="GiB are free"):
            both.prepare(scan)


class TestStore:
    def stored(self, folder: Path) -> NDArray[np.uint8]:
        low, _ = stages(image(), plan(spacing=1.0))
        case = dataclasses.replace(low, label_zyx=np.zeros(low.placement.shape, np.int16))
        write_case(folder / "case", case, "key", AB.targets)
        label = np.random.default_rng(0).integers(0, 3, low.placement.shape).astype(np.uint8)
        write_previous(folder / "next" / "case.b2nd", label, "abc", (8, 8, 8))
        return label

    def test_what_is_written_is_read_whole_and_in_part(self, tmp_path: Path) -> None:
        label = self.stored(tmp_path)
        path = tmp_path / "next" / "case.b2nd"
        case = open_case(tmp_path / "case", path)
        assert previous_key(path) == "abc"
        assert case.read_previous().dtype == np.int16 and np.array_equal(case.read_previous(), label)
        box = (slice(2, 9), slice(0, 4), slice(5, 5))
        assert np.array_equal(case.read_previous(box), label[box]) and case.read_label(box).shape == label[box].shape
        assert [p.name for p in path.parent.iterdir()] == ["case.b2nd"], "no temporary file is left"

    def test_the_key_of_the_case_changes_with_it(self, tmp_path: Path) -> None:
        label = self.stored(tmp_path)
        path = tmp_path / "next" / "case.b2nd"
        keys = [open_case(tmp_path / "case").key, open_case(tmp_path / "case", path).key]
        write_previous(path, label, "other", (8, 8, 8))
        keys.append(open_case(tmp_path / "case", path).key)
        assert len(set(keys)) == 3 and keys[0] == "key"

    @pytest.mark.parametrize("content", [None, b"", b"not an array"])
    def test_a_damaged_or_missing_segmentation_has_no_key_and_is_told_when_read(
        self, tmp_path: Path, content: bytes | None
    ) -> None:
        self.stored(tmp_path)
        path = tmp_path / "next" / "case.b2nd"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert previous_key(path) is None
        with pytest.raises(RecordError, match=r"segmentation of case case, .*case.b2nd, is damaged or missing; remove it"):
            open_case(tmp_path / "case", path).read_previous()

    def test_a_segmentation_of_another_shape_is_told_when_read(self, tmp_path: Path) -> None:
        self.stored(tmp_path)
        path = tmp_path / "next" / "case.b2nd"
        write_previous(path, np.zeros((3, 4, 5), np.uint8), "abc", (8, 8, 8))
        with pytest.raises(RecordError, match="is damaged or missing"):
            open_case(tmp_path / "case", path).read_previous()

    def test_a_case_opened_without_one_says_so(self, tmp_path: Path) -> None:
        self.stored(tmp_path)
        with pytest.raises(RecordError, match="case was opened without a segmentation"):
            open_case(tmp_path / "case").read_previous()
