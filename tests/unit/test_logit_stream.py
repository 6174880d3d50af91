"""Streams of logits: what comes plane by plane is what blending everything at once gives, and few planes are held."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.arrays.tiles import LogitStream, Tiling, gather, gaussian_weight, half_weight, lean_weight, make_tiling
from autoseg.errors import RunError

Shape = tuple[int, int, int]


def noise(tiles: torch.Tensor, classes: int = 3) -> torch.Tensor:
    """Logits that depend on where in the tile a voxel lies and on what the tile holds."""
    size = tiles.shape[2:]
    ramp = torch.arange(classes * size.numel(), dtype=torch.float32).reshape(classes, *size).sin()
    return tiles[:, :1] * (1 + ramp) + ramp + tiles.amax((1, 2, 3, 4), keepdim=True)


def all_at_once(image: torch.Tensor, tiling: Tiling, half: bool = False) -> torch.Tensor:
    """The same with accumulators of the whole volume."""
    weight = half_weight(tiling.patch) if half else gaussian_weight(tiling.patch)
    margins = [(b, t - s - b) for b, s, t in zip(tiling.before, tiling.shape, tiling.padded, strict=True)]
    padded = torch.nn.functional.pad(image, [amount for margin in reversed(margins) for amount in margin])
    total, norm = torch.zeros(3, *tiling.padded, dtype=weight.dtype), torch.zeros(tiling.padded, dtype=weight.dtype)
    for start in tiling.starts:
        box = tuple(slice(s, s + p) for s, p in zip(start, tiling.patch, strict=True))
        total[(slice(None), *box)] += noise(padded[(slice(None), *box)][None])[0] * weight
        norm[box] += weight
    inside = tuple(slice(b, b + s) for b, s in zip(tiling.before, tiling.shape, strict=True))
    return (total / norm)[(slice(None), *inside)]


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 14), st.integers(1, 14)), patch=st.tuples(*[st.integers(1, 10)] * 3),
    batch=st.integers(1, 7), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5), half=st.booleans(),
)
def test_planes_asked_for_in_any_steps_are_those_of_the_whole(
    shape: Shape, patch: Shape, batch: int, cuts: list[int], half: bool
) -> None:
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    tiling = make_tiling(shape, patch)
    expected = all_at_once(image, tiling, half)
    stream, low = LogitStream(image, tiling, noise, batch, half=half), 0
    for step in itertools.cycle(cuts):
        high = min(shape[0], low + step)
        planes = stream.planes(low, high)
        assert planes.dtype == (torch.float16 if half else torch.float32)
        if half:
            assert torch.equal(planes, expected[:, low:high])
        torch.testing.assert_close(planes.float(), expected[:, low:high].float(), rtol=1e-4, atol=1e-4)
        low = high
        if low == shape[0]:
            break
    assert torch.equal(gather(LogitStream(image, tiling, noise, batch, half=half)).half(), expected.half()) or not half


def test_planes_may_be_skipped_or_asked_for_again_but_not_once_they_are_behind() -> None:
    image, tiling = torch.randn(1, 30, 9, 9), make_tiling((30, 9, 9), (8, 8, 8))
    whole = gather(LogitStream(image, tiling, noise, 2))
    stream = LogitStream(image, tiling, noise, 2)
    for low, high in ((3, 5), (3, 12), (9, 11), (10, 26), (25, 30)):
        torch.testing.assert_close(stream.planes(low, high), whole[:, low:high])
    with pytest.raises(ValueError, match="planes 24 to 26 of 30 were asked for after planes from 25 on"):
        stream.planes(24, 26)
    for wrong in ((26, 31), (28, 28)):
        with pytest.raises(ValueError, match="were asked for"):
            stream.planes(*wrong)


def test_no_tile_is_forwarded_before_its_planes_are_wanted() -> None:
    done: list[int] = []
    stream = LogitStream(torch.zeros(1, 40, 8, 8), make_tiling((40, 8, 8), (8, 8, 8)), noise, 1, done.append)
    assert not done
    stream.planes(0, 4)
    assert sum(done) == 1, "the next tile begins at plane 4"
    stream.planes(4, 5)
    assert sum(done) == 2
    assert stream.classes == 3 and stream.shape == (40, 8, 8) and sum(done) == 2 and stream.seconds > 0
    stream.planes(36, 40)
    assert sum(done) == 9


def test_what_is_held_does_not_grow_with_the_number_of_planes() -> None:
    def held(depth: int) -> int:
        stream = LogitStream(torch.zeros(1, depth, 16, 16), make_tiling((depth, 16, 16), (8, 16, 16)), noise, 2)
        most = 0
        for z in range(depth):
            stream.planes(z, z + 1)
            most = max(most, sum(
                value.numel() for name, value in vars(stream).items() if isinstance(value, torch.Tensor) and name != "_image"))
        return most

    assert held(200) == held(40)


def test_planes_stay_as_they_were_given() -> None:
    stream = LogitStream(torch.randn(1, 30, 8, 8), make_tiling((30, 8, 8), (8, 8, 8)), noise, 2)
    first = stream.planes(0, 4)
    kept = first.clone()
    stream.planes(20, 30)
    assert torch.equal(first, kept)


def test_parts_are_blended_apart_and_their_mean_is_taken() -> None:
    image, tiling = torch.randn(1, 20, 9, 9), make_tiling((20, 9, 9), (8, 8, 8))
    folds = [lambda t: noise(t), lambda t: 2 * noise(t) - 1]
    for half in (False, True):
        together = LogitStream(image, tiling, lambda t: torch.cat([fold(t) for fold in folds], 1), 2, half=half, parts=2)
        total = gather(LogitStream(image, tiling, folds[0], 2, half=half))
        total += gather(LogitStream(image, tiling, folds[1], 2, half=half))
        assert together.classes == 3 and torch.equal(gather(together), total.div_(2))


@pytest.mark.parametrize("apart", [1, 2])
def test_logits_too_large_for_float16_are_refused_and_fit_better_where_memory_is_short(apart: int) -> None:
    image, tiling = torch.full((1, 20, 9, 9), 2e4), make_tiling((20, 9, 9), (8, 8, 8))
    forward = lambda tiles: tiles.repeat(1, apart, 1, 1, 1)  # noqa: E731
    with pytest.raises(RunError, match="too large for float16"):
        gather(LogitStream(image, tiling, forward, 2, half=True, parts=apart))
    lean = gather(LogitStream(image, tiling, forward, 2, parts=apart, lean=True))
    assert lean.dtype == torch.float16
    torch.testing.assert_close(lean, image.half(), rtol=5e-3, atol=0)
    with pytest.raises(RunError, match="or no numbers"):
        gather(LogitStream(image * torch.nan, tiling, forward, 2, lean=True, parts=apart))


def test_the_lean_weight_tells_small_logits_apart_even_at_corners() -> None:
    image, tiling = torch.randn(1, 40, 40, 40), make_tiling((40, 40, 40), (32, 32, 32))
    assert lean_weight((32, 32, 32)).max() == 1
    lean, whole = (gather(LogitStream(image, tiling, lambda tiles: tiles, 1, lean=lean)) for lean in (True, False))
    assert (lean.float() - whole).abs().max() < 0.02


@pytest.mark.parametrize(("shape", "patch", "size", "expected"), [
    ((20, 20, 20), (8, 8, 8), 5, [4] * 16),  # 16 tiles of each z
    ((20, 20, 20), (8, 8, 8), 16, [16] * 4),
    ((20, 8, 8), (8, 8, 8), 3, [2, 2]),  # one tile of each z: some together
    ((6, 8, 8), (1, 8, 8), 4, [3, 3]),  # slices
    ((6, 12, 8), (1, 8, 8), 4, [4, 4, 4]),
    ((8, 16, 8), (8, 8, 8), 2, [1, 2]),
])
def test_batches_are_even_and_hold_neighbours(shape: Shape, patch: Shape, size: int, expected: list[int]) -> None:
    tiling = make_tiling(shape, patch)
    batches = tiling.batches(size)
    assert [len(batch) for batch in batches] == expected
    assert tuple(itertools.chain(*batches)) == tiling.starts, "in order"
    spans = [max(z for z, _, _ in batch) + patch[0] - min(z for z, _, _ in batch) for batch in batches]
    assert tiling.open_planes(size) == max(spans) <= max(patch[0] + (size - 1) * patch[0], patch[0])
    assert np.all(np.diff([start[0] for start in tiling.starts]) >= 0)
