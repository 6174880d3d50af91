"""Grids: orientation changes permute and flip, and every voxel stays where it is in the world."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.spatial.transform import Rotation

from autoseg.types.geometry import IDENTITY, NO_DEPTH_MM, AxisMap, Grid, Matrix

PERMUTATIONS = [(a, f) for a in itertools.permutations(range(3)) for f in itertools.product((False, True), repeat=3)]
maps = st.sampled_from([AxisMap(axes, flips) for axes, flips in PERMUTATIONS])  # type: ignore[arg-type]
spacings = st.tuples(*[st.floats(0.1, 10)] * 3)
shapes = st.tuples(*[st.integers(1, 7)] * 3)
origins = st.tuples(*[st.floats(-500, 500)] * 3)


def rows(matrix: NDArray[np.float64]) -> Matrix:
    a, b, c = (tuple(float(v) for v in row) for row in matrix)
    return a, b, c  # type: ignore[return-value]


def axis_direction(axis_map: AxisMap) -> Matrix:
    """The direction of a grid that `axis_map` brings to LPS."""
    matrix = np.zeros((3, 3))
    for world, (axis, flip) in enumerate(zip(axis_map.axes, axis_map.flips, strict=True)):
        matrix[world, axis] = -1 if flip else 1
    return rows(matrix)


def world(grid: Grid, voxel: NDArray[np.integer]) -> NDArray[np.float64]:
    return np.asarray(grid.origin) + np.asarray(grid.direction) @ (np.asarray(grid.spacing) * voxel)


@given(axis_map=maps, shape=shapes, spacing=spacings, origin=origins)
def test_an_axis_aligned_grid_is_brought_to_lps_exactly_and_voxels_keep_their_place(
    axis_map: AxisMap, shape: tuple[int, int, int], spacing: tuple[float, float, float], origin: tuple[float, float, float]
) -> None:
    grid = Grid(shape=shape, spacing=spacing, origin=origin, direction=axis_direction(axis_map))
    found = grid.to_lps()
    assert found == axis_map
    lps = grid.mapped(found)
    assert lps.direction == IDENTITY
    stored = np.arange(np.prod(shape)).reshape(shape)
    oriented = found.apply(stored)
    assert oriented.shape == lps.shape
    for voxel in itertools.product(*[(0, n - 1) for n in lps.shape]):
        before = np.array(np.unravel_index(int(oriented[voxel]), shape))
        np.testing.assert_allclose(world(lps, np.array(voxel)), world(grid, before), atol=1e-9 * 5000)


@given(seed=st.integers(0, 10_000), shape=shapes, spacing=spacings)
def test_an_oblique_grid_gets_the_nearest_axes_each_once(
    seed: int, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    matrix = Rotation.random(random_state=seed).as_matrix()
    grid = Grid(shape=shape, spacing=spacing, direction=rows(matrix))
    found = grid.to_lps()
    assert sorted(found.axes) == [0, 1, 2]
    turned = np.asarray(grid.mapped(found).direction)
    assert (np.diag(turned) > 0).all()
    assert np.abs(np.asarray(grid.direction)).max() == pytest.approx(np.diag(turned).max())
    for voxel in itertools.product(*[(0, n - 1) for n in shape]):
        flag = np.zeros(shape)
        flag[voxel] = 1
        place = np.argwhere(found.apply(flag))[0]
        np.testing.assert_allclose(world(grid.mapped(found), place), world(grid, np.array(voxel)), atol=1e-6)


def test_bringing_to_lps_twice_changes_nothing_more() -> None:
    grid = Grid(shape=(2, 3, 4), spacing=(1.0, 2.0, 3.0), direction=axis_direction(AxisMap((1, 2, 0), (True, False, True))))
    lps = grid.mapped(grid.to_lps())
    assert lps.to_lps() == AxisMap((0, 1, 2), (False, False, False)) and lps.mapped(lps.to_lps()) == lps


def test_a_grid_without_direction_is_left_alone() -> None:
    matrix = axis_direction(AxisMap((2, 1, 0), (True, True, True)))
    grid = Grid(shape=(1, 4, 5), spacing=(999.0, 1.0, 1.0), direction=matrix, has_direction=False)
    assert grid.to_lps() == AxisMap((0, 1, 2), (False, False, False))


@given(axis_map=maps, shape=shapes, lead=st.integers(0, 2))
def test_an_axis_map_is_undone_exactly_and_leading_axes_stay(axis_map: AxisMap, shape: tuple[int, int, int], lead: int) -> None:
    array = np.arange(2**lead * np.prod(shape)).reshape(*(2,) * lead, *shape)
    moved = axis_map.apply(array)
    assert moved.shape == (*(2,) * lead, *(shape[a] for a in axis_map.axes))
    assert np.array_equal(axis_map.invert(moved), array)
    assert np.array_equal(axis_map.apply(axis_map.invert(array.reshape(*(2,) * lead, *shape))), array)
    assert np.shares_memory(moved, array)


def test_an_axis_map_permutes_first_and_flips_then() -> None:
    array = np.arange(6).reshape(1, 2, 3)
    assert AxisMap((2, 1, 0), (True, False, False)).apply(array)[:, :, 0].tolist() == [[2, 5], [1, 4], [0, 3]]


@pytest.mark.parametrize("spacing", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, float("nan")), (float("inf"), 1.0, 1.0)])
def test_impossible_spacings_are_refused(spacing: tuple[float, float, float]) -> None:
    with pytest.raises(ValidationError, match="spacing must be positive and finite"):
        Grid(shape=(1, 1, 1), spacing=spacing)


def test_a_voxels_volume_is_in_millilitres_and_pixels_count_one_millimetre_deep() -> None:
    assert Grid(shape=(1, 1, 1), spacing=(5.0, 2.0, 1.0)).voxel_volume_ml == pytest.approx(0.01)
    assert Grid(shape=(1, 9, 9), spacing=(NO_DEPTH_MM, 0.5, 0.5)).voxel_volume_ml == pytest.approx(0.00025)
