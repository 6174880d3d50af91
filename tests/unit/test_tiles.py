"""Sliding windows: tiles cover the image, and blending gives back what every tile agrees on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoseg.arrays.tiles import LogitStream, gather, gaussian_weight, make_tiling, starts_along

SHAPES = st.tuples(*[st.integers(1, 24)] * 3)


@pytest.mark.parametrize(("size", "patch", "starts"), [
    (110, 64, [0, 23, 46]), (64, 64, [0]), (10, 64, [0]), (65, 64, [0, 1]), (128, 64, [0, 32, 64]), (5, 1, [0, 1, 2, 3, 4]),
    (1, 1, [0]), (4, 3, [0, 1]),
])
def test_starts_are_evenly_spread(size: int, patch: int, starts: list[int]) -> None:
    assert starts_along(size, patch) == starts


@given(size=st.integers(1, 500), patch=st.integers(1, 130))
def test_starts_begin_at_zero_end_flush_and_leave_no_gap_and_no_tile_twice(size: int, patch: int) -> None:
    starts = starts_along(size, patch)
    assert starts[0] == 0 and starts[-1] == max(0, size - patch)
    steps = np.diff(starts)
    assert (steps >= 1).all() and (steps <= max(1, patch / 2 + 1)).all()


@given(size=st.integers(1, 2000), patch=st.integers(1, 130))
@example(size=897, patch=20)
def test_halves_are_rounded_as_nnunet_does(size: int, patch: int) -> None:
    starts = starts_along(size, patch)
    distance = max(0, size - patch) / max(1, len(starts) - 1)
    assert starts == [int(np.round(distance * i)) for i in range(len(starts))]


@given(shape=SHAPES, patch=SHAPES)
def test_the_padded_image_holds_the_image_in_its_middle_and_every_tile(
    shape: tuple[int, int, int], patch: tuple[int, int, int]
) -> None:
    tiling = make_tiling(shape, patch)
    for axis in range(3):
        after = tiling.padded[axis] - shape[axis] - tiling.before[axis]
        assert tiling.padded[axis] == max(shape[axis], patch[axis]) and 0 <= after - tiling.before[axis] <= 1
    covered = np.zeros(tiling.padded, int)
    for start in tiling.starts:
        assert all(s >= 0 and s + p <= n for s, p, n in zip(start, patch, tiling.padded, strict=True))
        covered[tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))] += 1
    assert covered.min() >= 1
    assert len(set(tiling.starts)) == len(tiling.starts)


def sliding_window(image, tiling, forward, batch, **options):
    """Whole blended logits (classes, z, y, x)."""
    return gather(LogitStream(image, tiling, forward, batch, **options))


def test_a_2d_patch_visits_each_slice_once() -> None:
    tiling = make_tiling((7, 16, 16), (1, 16, 16))
    assert [start[0] for start in tiling.starts] == list(range(7))


def test_the_weight_is_a_gaussian_of_an_eighth_of_the_patch() -> None:
    weight = gaussian_weight((16, 8, 1))
    assert weight.shape == (16, 8, 1) and weight.dtype == torch.float32 and weight[8, 4, 0] == 1
    assert weight[10, 4, 0].item() == pytest.approx(np.exp(-0.5), rel=1e-6)  # 2 voxels are one sigma of 16
    assert weight[8, 5, 0].item() == pytest.approx(np.exp(-0.5), rel=1e-6)
    assert weight.min().item() == pytest.approx(np.exp(-16), rel=1e-4)


def channel_sums(tiles: torch.Tensor) -> torch.Tensor:
    return torch.stack([tiles.sum(1), 2 * tiles[:, 0], tiles[:, -1].square()], 1)


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, patch=st.tuples(*[st.integers(1, 12)] * 3), batch=st.integers(1, 5))
def test_a_pointwise_function_gives_what_it_gives_on_the_whole_image(
    shape: tuple[int, int, int], patch: tuple[int, int, int], batch: int
) -> None:
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32))
    result = sliding_window(image, make_tiling(shape, patch), channel_sums, batch)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, channel_sums(image[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(30, 20, 17), (3, 20, 5)])
def test_blending_a_constant_is_exact(shape: tuple[int, int, int]) -> None:
    result = sliding_window(torch.zeros(1, *shape), make_tiling(shape, (8, 8, 8)), lambda t: torch.full_like(t, 3.25), 2)
    assert result.shape == (1, *shape)
    torch.testing.assert_close(result, torch.full_like(result, 3.25), rtol=1e-6, atol=0)


def test_tiles_are_weighted_by_their_distance_from_the_middle() -> None:
    """Two tiles that say 0 and 1: by hand, voxel by voxel."""
    said = itertools.count()
    tiling = make_tiling((1, 1, 12), (1, 1, 8))
    result = sliding_window(torch.zeros(1, 1, 1, 12), tiling, lambda t: torch.full_like(t, next(said)), 1)
    weight = np.exp(-0.5 * (np.arange(8) - 4.0) ** 2)
    expected = [0.0] * 4 + [weight[i - 4] / (weight[i] + weight[i - 4]) for i in range(4, 8)] + [1.0] * 4
    np.testing.assert_allclose(result[0, 0, 0].numpy(), expected, rtol=1e-5)


def test_padding_is_zero_and_is_cut_off_again() -> None:
    seen: list[torch.Tensor] = []

    def look(tiles: torch.Tensor) -> torch.Tensor:
        seen.append(tiles)
        return tiles

    image = torch.ones(1, 2, 3, 5)
    result = sliding_window(image, make_tiling((2, 3, 5), (4, 8, 5)), look, 1)
    assert torch.equal(result, image)
    assert seen[0].shape == (1, 1, 4, 8, 5) and seen[0].sum() == image.sum() and bool(seen[0][0, 0, 1:3, 2:5].all())


def test_progress_counts_every_tile_and_batches_are_no_larger_than_asked() -> None:
    counts: list[int] = []
    sizes: list[int] = []

    def forward(tiles: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tiles))
        return tiles

    tiling = make_tiling((20, 20, 20), (8, 8, 8))
    sliding_window(torch.zeros(1, 20, 20, 20), tiling, forward, 5, advance=counts.append)
    assert sum(counts) == len(tiling.starts) and counts == sizes and set(sizes) == {4}, "16 of each z, as evenly as can be"


def test_low_precision_logits_are_blended_in_single_precision() -> None:
    image = torch.rand(1, 9, 9, 9)
    result = sliding_window(image, make_tiling((9, 9, 9), (4, 4, 4)), lambda t: t.bfloat16(), 3)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, image.bfloat16().float(), rtol=1e-5, atol=1e-5)
