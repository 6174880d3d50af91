from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from autoseg.datasets.phantom import KINDS, Kind, PhantomCase, make_case, write_dataset
from autoseg.datasets.phantom_space import Boxes, Space, capsule, coverage, ellipsoid, join, meet, point, storage
from autoseg.errors import DatasetError
from autoseg.types.geometry import Grid

SMALL = 0.5


@pytest.fixture(scope="module")
def chests() -> list[PhantomCase]:
    return [make_case("chest", 0, index) for index in range(6)]


@pytest.fixture(scope="module")
def brains() -> list[PhantomCase]:
    return [make_case("brain", 0, index) for index in range(8)]


def in_lps(case: PhantomCase) -> tuple[np.ndarray, np.ndarray, Grid]:
    axis_map = case.grid.to_lps()
    return axis_map.apply(case.image_czyx), axis_map.apply(case.label_zyx), case.grid.mapped(axis_map)


def lattice(low: float, high: float, count: int) -> Space:
    axis = np.linspace(low, high, count, dtype=np.float32)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    return Space(x, y, z, float(axis[1] - axis[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_is_a_pure_function_of_its_arguments(kind: Kind) -> None:
    first, again, other = (make_case(kind, 3, index, SMALL) for index in (1, 1, 2))
    assert np.array_equal(first.image_czyx, again.image_czyx) and np.array_equal(first.label_zyx, again.label_zyx)
    assert first.grid == again.grid and first.name == again.name
    assert first.image_czyx.shape != other.image_czyx.shape or not np.array_equal(first.image_czyx, other.image_czyx)
    assert make_case(kind, 4, 1, SMALL).grid != first.grid


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_fit_their_grid_and_types(kind: Kind) -> None:
    case = make_case(kind, 1, 0, SMALL)
    assert case.image_czyx.dtype == np.int16 and case.label_zyx.dtype == np.uint8
    assert case.image_czyx.shape == ((1 if kind == "chest" else 4), *case.grid.shape) and case.label_zyx.shape == case.grid.shape
    assert case.image_czyx.flags.c_contiguous and case.label_zyx.flags.c_contiguous


def test_volumes_are_small_enough_for_a_laptop(chests: list[PhantomCase], brains: list[PhantomCase]) -> None:
    assert 200_000 < np.median([case.label_zyx.size for case in chests]) < 330_000
    assert max(case.label_zyx.size for case in chests) < 420_000
    assert max(case.label_zyx.size for case in brains) < 250_000


def test_size_changes_the_resolution_and_not_the_anatomy() -> None:
    large, small = make_case("chest", 0, 2), make_case("chest", 0, 2, SMALL)
    assert np.allclose(np.array(small.grid.spacing), 2 * np.array(large.grid.spacing))
    for label in (1, 2, 3):
        volumes = [np.count_nonzero(case.label_zyx == label) * case.grid.voxel_volume_ml for case in (large, small)]
        assert volumes[0] == pytest.approx(volumes[1], rel=0.12)


def test_directions_are_orthonormal_and_storage_varies() -> None:
    grids = [make_case("brain", 0, index, 0.25).grid for index in range(24)]
    for grid in grids:
        direction = np.array(grid.direction)
        assert np.allclose(direction @ direction.T, np.eye(3), atol=1e-9)
    maps = {grid.to_lps() for grid in grids}
    oblique = sum(np.abs(np.array(grid.direction)).max(axis=0).min() < 0.9999 for grid in grids)
    assert len(maps) > 8 and 1 <= oblique <= 14
    assert len({round(grid.spacing[0], 3) for grid in grids}) > 16


def test_storage_moves_the_array_and_its_grid_together() -> None:
    grid = Grid(shape=(4, 5, 6), spacing=(3.0, 2.0, 1.0), origin=(10.0, 20.0, 30.0))
    array = np.arange(120).reshape(4, 5, 6)
    for seed in range(10):
        axis_map = storage(np.random.default_rng(seed))
        moved, stored = axis_map.apply(array), grid.mapped(axis_map)
        spot = np.argwhere(moved == 77)[0]
        world = np.array(stored.origin) + np.array(stored.direction) @ (spot * stored.spacing)
        assert np.allclose(world, np.array([10.0, 20.0, 30.0]) + np.argwhere(array == 77)[0] * grid.spacing)


def test_chest_has_the_hounsfield_units_of_its_tissues(chests: list[PhantomCase]) -> None:
    for case in chests:
        image, label = case.image_czyx[0], case.label_zyx
        assert image.min() >= -1024 and image.max() <= 3071
        assert -900 < np.median(image[label == 1]) < -780
        assert 20 < np.median(image[label == 2]) < 260
        assert 100 < np.median(image[label == 3]) < 420
        assert (image < -950).any() and np.percentile(image, 99.5) > 300


def test_chest_organs_have_human_volumes_and_places(chests: list[PhantomCase]) -> None:
    for case in chests:
        _, label, grid = in_lps(case)
        litres = [np.count_nonzero(label == value) * grid.voxel_volume_ml / 1000 for value in (1, 2, 3)]
        assert 1.5 < litres[0] < 5.5 and 0.2 < litres[1] < 1.0 and 0.1 < litres[2] < 0.6
        (_, lung_y, lung_x), (_, heart_y, heart_x), (_, spine_y, spine_x) = (np.argwhere(label == v).mean(0) for v in (1, 2, 3))
        assert heart_y < lung_y < spine_y  # y grows towards the back
        assert heart_x > spine_x and abs(spine_x - lung_x) * grid.spacing[2] < 25  # x grows to the patient's left


def test_chest_organs_are_in_one_piece_and_lungs_in_two(chests: list[PhantomCase]) -> None:
    for case in chests:
        for value, pieces in ((1, 2), (2, 1)):
            parts, _ = ndimage.label(case.label_zyx == value)
            sizes = np.sort(np.bincount(parts.ravel())[1:])[::-1]
            assert sizes[:pieces].sum() > 0.99 * sizes.sum() and sizes[:pieces].min() > 0.2 * sizes.sum()


def test_nodules_are_small_lie_in_the_lungs_and_differ_in_number() -> None:
    counts = []
    for index in range(12):
        case = make_case("chest", 1, index)
        parts, count = ndimage.label(case.label_zyx == 4, np.ones((3, 3, 3)))
        counts.append(count)
        lungs = ndimage.binary_closing(np.isin(case.label_zyx, (1, 4)), iterations=1)
        near_lungs = ndimage.binary_dilation(lungs, iterations=1)
        assert near_lungs[case.label_zyx == 4].all()
        for part in range(1, count + 1):
            assert np.count_nonzero(parts == part) * case.grid.voxel_volume_ml < 8.0
    assert min(counts) < max(counts) <= 4 and sum(count > 0 for count in counts) >= 7


def test_brain_is_zero_outside_and_positive_inside(brains: list[PhantomCase]) -> None:
    for case in brains:
        assert case.image_czyx.min() == 0
        share = np.count_nonzero(case.image_czyx.any(axis=0)) / case.label_zyx.size
        assert 0.2 < share < 0.7
        assert case.image_czyx.any(axis=0)[case.label_zyx > 0].all()


def test_tumour_regions_are_nested_and_look_as_they_should(brains: list[PhantomCase]) -> None:
    for case in brains:
        whole, core = case.label_zyx >= 1, case.label_zyx >= 2
        assert 0 < np.count_nonzero(core) < np.count_nonzero(whole)
        around = ndimage.binary_dilation(core, iterations=1) & ~core
        assert whole[around].mean() > 0.6
    seen = [case for case in brains if (case.image_czyx != 0).reshape(4, -1).any(axis=1).all() and np.any(case.label_zyx == 3)]
    brighter = 0
    for case in seen:
        t1ce, flair = case.image_czyx[1], case.image_czyx[3]
        rest = (case.label_zyx == 0) & (case.image_czyx.min(axis=0) > 0)
        brighter += np.median(t1ce[case.label_zyx == 3]) > np.median(t1ce[rest]) and (
            np.median(flair[case.label_zyx == 1]) > np.median(flair[rest]))
    assert brighter >= len(seen) - 1 >= 4


def test_some_brains_miss_tissue_at_the_edge_of_the_scan() -> None:
    missing = []
    for index in range(24):
        image, _, _ = in_lps(make_case("brain", 0, index, 0.3))
        filled = [(channel != 0) for channel in image]
        missing.append(any(not np.array_equal(filled[0], other) for other in filled[1:]))
    assert 1 <= sum(missing) <= 10


def test_sequences_have_their_own_scale_in_each_case(brains: list[PhantomCase]) -> None:
    medians = np.array([[np.median(channel[channel > 0]) for channel in case.image_czyx] for case in brains])
    assert medians.max() / medians.min() > 4


def test_signed_distance_of_a_ball_is_exact_and_of_an_ellipsoid_near_its_surface() -> None:
    space = lattice(-10, 10, 21)
    radius = np.sqrt(space.x**2 + space.y**2 + space.z**2)
    assert np.allclose(ellipsoid(space, (0, 0, 0), (6, 6, 6)), radius - 6, atol=1e-2)
    assert np.allclose(capsule(space, (0, 0, 0), (0, 0, 0), 6), radius - 6, atol=1e-4)
    tip = Space(*(np.full((1, 1, 1), v, np.float32) for v in (8.5, 0, 0)), 1.0)
    assert ellipsoid(tip, (0, 0, 0), (8, 4, 3))[0, 0, 0] == pytest.approx(0.5, abs=0.05)
    assert ellipsoid(tip, (0, 0, 0), (8, 4, np.inf), 3.0)[0, 0, 0] == pytest.approx(0.5, abs=0.05)


def test_coverage_keeps_the_volume_of_a_ball_smaller_than_a_few_voxels() -> None:
    space = lattice(-12, 12, 9)
    for radius in (5.0, 7.0, 9.0):
        share = coverage(ellipsoid(space, (0.7, -0.4, 0.3), (radius, radius, radius)), space.edge_mm)
        assert share.sum() * 3**3 == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.12)


def test_smooth_union_and_intersection_agree_with_the_sharp_ones_away_from_the_seam() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-9, 9, (5, 5, 5)).astype(np.float32) for _ in range(2))
    far = np.abs(a - b) > 2
    assert np.allclose(join(a, b, 2)[far], np.minimum(a, b)[far]) and np.allclose(meet(a, b, 2)[far], np.maximum(a, b)[far])
    assert (join(a, b, 2) <= np.minimum(a, b) + 1e-5).all() and (meet(a, b, 2) >= np.maximum(a, b) - 1e-5).all()


def test_boxes_hold_every_voxel_of_the_range_asked_for() -> None:
    space = lattice(-10, 10, 21)
    box, near = Boxes(space).around(point((-3, 1, 4)), point((2, 5, 30)))
    asked = (space.x >= -3) & (space.x <= 2) & (space.y >= 1) & (space.y <= 5) & (space.z >= 4)
    assert np.count_nonzero(asked[box]) == np.count_nonzero(asked) and near.x.size < space.x.size / 4
    _, nothing = Boxes(space).around(point((50, 50, 50)), point((60, 60, 60)))
    assert nothing.x.size == 0


@pytest.mark.parametrize("arguments", [("heart", 0, 0, 1.0), ("chest", -1, 0, 1.0), ("chest", 0, -1, 1.0), ("brain", 0, 0, 0.0)])
def test_wrong_arguments_are_refused(arguments: tuple[Kind, int, int, float]) -> None:
    with pytest.raises(ValueError, match="found"):
        make_case(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_data_set_reads_back_as_it_was_made(kind: Kind, tmp_path: Path) -> None:
    import nibabel

    write_dataset(tmp_path, kind, cases=2, unseen=1, seed=5, size=0.4)
    channels = 1 if kind == "chest" else 4
    for folder, names in ((tmp_path, (f"{kind}000", f"{kind}001")), (tmp_path / "unseen", (f"{kind}1000",))):
        assert sorted(p.name for p in (folder / "labels").iterdir()) == [f"{name}.nii.gz" for name in names]
        assert len(list((folder / "images").iterdir())) == channels * len(names)
    case = make_case(kind, 5, 1, 0.4)
    label = nibabel.load(tmp_path / "labels" / f"{kind}001.nii.gz")
    assert np.array_equal(np.asanyarray(label.dataobj).T, case.label_zyx)
    for channel in range(channels):
        image = nibabel.load(tmp_path / "images" / f"{kind}001_{channel:04d}.nii.gz")
        assert np.array_equal(np.asanyarray(image.dataobj).T, case.image_czyx[channel])
        to_ras = np.diag([-1.0, -1.0, 1.0])
        expected = to_ras @ (np.array(case.grid.direction) * np.array(case.grid.spacing))[::-1, ::-1]
        assert np.allclose(image.affine[:3, :3], expected, atol=1e-5)
        assert np.allclose(image.affine[:3, 3], to_ras @ np.array(case.grid.origin)[::-1], atol=1e-3)


def test_brain_labels_are_described_as_nested_regions(tmp_path: Path) -> None:
    write_dataset(tmp_path, "brain", cases=1, unseen=0, seed=0, size=0.3)
    record = json.loads((tmp_path / "dataset.json").read_text())
    assert record["channel_names"] == {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}
    assert record["labels"] == {"background": 0, "whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing tumour": [3]}
    assert record["regions_class_order"] == [1, 2, 3] and record["numTraining"] == 1


def test_writing_again_adds_only_what_is_missing(tmp_path: Path) -> None:
    write_dataset(tmp_path, "chest", cases=2, unseen=0, seed=0, size=0.3)
    kept, redone = (tmp_path / "labels" / f"chest00{i}.nii.gz" for i in range(2))
    kept.write_bytes(b"edited")
    before = redone.read_bytes()
    redone.unlink()
    write_dataset(tmp_path, "chest", cases=3, unseen=0, seed=0, size=0.3)
    assert kept.read_bytes() == b"edited" and redone.read_bytes() == before
    assert (tmp_path / "labels" / "chest002.nii.gz").exists()


def test_another_data_set_is_never_mixed_with_phantoms(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", "chest", cases=1, unseen=0, seed=0, size=0.3)
    with pytest.raises(DatasetError, match=r"expected phantoms made from.*'seed': 1.*found phantoms made from.*'seed': 0"):
        write_dataset(tmp_path / "a", "chest", cases=1, unseen=0, seed=1, size=0.3)
    (tmp_path / "b" / "images").mkdir(parents=True)
    with pytest.raises(DatasetError, match="choose another"):
        write_dataset(tmp_path / "b", "chest", cases=1, unseen=0, seed=0, size=0.3)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "dataset.json").write_text('{"labels": {}}')
    with pytest.raises(DatasetError, match="found another data set"):
        write_dataset(tmp_path / "c", "chest", cases=1, unseen=0, seed=0, size=0.3)
    assert (tmp_path / "c" / "dataset.json").read_text() == '{"labels": {}}'
