"""Voxels of every connected component of a stored case."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from autoseg.arrays import components
from autoseg.arrays.components import component_locations
from autoseg.errors import RecordError
from autoseg.files import component_store
from autoseg.files.component_store import COMPONENTS
from autoseg.files.preprocessed import CASE, StoredCase, open_case, write_case
from autoseg.types.case import Placement, Preprocessed
from autoseg.types.geometry import AxisMap, Grid

LABELS, REGIONS = [(1,), (2,), (3,)], [(1, 2), (2,), (3,)]


def blobs(seed: int = 0, shape: tuple[int, int, int] = (40, 44, 48)) -> np.ndarray:
    """Smooth blobs of labels 1 and 2, one single voxel of label 2, -1 in a corner, no label 3."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    label = np.digitize(field, [field.std(), 1.6 * field.std()]).astype(np.int16)
    label[:6, :6, :6] = -1
    label[2, 2, 2] = 2
    return label


@pytest.mark.parametrize("targets", [LABELS, REGIONS])
def test_every_component_of_every_target_is_there_and_small_ones_are_whole(targets: list[tuple[int, ...]]) -> None:
    label = blobs()
    found = component_locations(label, targets, 0)
    assert sorted(found) == [0, 1]
    for number, parts in found.items():
        numbers, count = ndimage.label(np.isin(label, targets[number]), np.ones((3, 3, 3)))
        sizes = np.bincount(numbers.reshape(-1))
        assert len(parts) == count > 2
        seen = []
        for part in parts:
            which = np.unique(numbers[tuple(part.T)])
            assert len(which) == 1 and which[0] > 0
            assert len(part) == len(np.unique(part, axis=0)) == min(200, sizes[which[0]])
            seen.append(sizes[which[0]])
        assert seen == sorted(seen, reverse=True)
    assert any((part == [[2, 2, 2]]).all() for part in found[1])


def test_voxels_of_a_large_component_are_drawn_all_over_it_with_the_seed() -> None:
    label = np.zeros((30, 30, 60), np.int16)
    label[5:25, 5:25, 5:55] = 1
    first, again, other = (component_locations(label, [(1,)], seed)[0][0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.allclose(first.mean(0), [14.5, 14.5, 29.5], atol=3.5) and np.ptp(first[:, 2]) > 40


def test_of_very_many_components_the_largest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "COMPONENTS_KEPT", 3)
    label = np.zeros((3, 3, 60), np.int16)
    for i in range(10):
        label[1, 1, 6 * i : 6 * i + 1 + i // 2] = 1
    assert [len(part) for part in component_locations(label, [(1,)], 0)[0]] == [5, 5, 4]


@pytest.mark.parametrize("label", [np.zeros((4, 4, 4), np.int16), np.full((4, 4, 4), -1, np.int16)])
def test_without_foreground_there_are_none(label: np.ndarray) -> None:
    assert component_locations(label, LABELS, 0) == {} == component_locations(label, REGIONS, 0)


def stored(folder: Path) -> StoredCase:
    label = blobs()
    z, y, x = label.shape
    place = Placement(Grid(shape=(z, y, x), spacing=(1, 1, 1)), AxisMap((0, 1, 2), (False, False, False)), (0, 1, 2),
                      ((0, z), (0, y), (0, x)), (1.0, 1.0, 1.0), (z, y, x), (1.0, 1.0, 1.0))
    targets = [(str(number), group) for number, group in enumerate(REGIONS)]
    write_case(folder, Preprocessed(np.zeros((1, z, y, x), np.float32), label, place), "key", targets)
    return open_case(folder)


def same(a: StoredCase, b: StoredCase) -> bool:
    pairs = [(x, y) for target in (1, 2) for x, y in zip(a.components[target], b.components[target], strict=True)]
    return list(a.components) == list(b.components) == [1, 2] and all(np.array_equal(x, y) for x, y in pairs)


def test_a_stored_case_finds_them_once_and_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = stored(tmp_path / "case")
    assert not (tmp_path / "case" / COMPONENTS).exists()
    assert list(case.components) == [1, 2]
    monkeypatch.setattr(component_store, "component_locations", lambda *given: pytest.fail("found again"))
    assert same(open_case(tmp_path / "case"), case)


def test_a_damaged_file_is_made_again_and_a_folder_that_cannot_be_written_to_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = stored(tmp_path / "case")
    assert case.components
    data = (tmp_path / "case" / COMPONENTS).read_bytes()
    for harmed in (b"", data[: len(data) // 2], b"nonsense"):
        (tmp_path / "case" / COMPONENTS).write_bytes(harmed)
        assert same(open_case(tmp_path / "case"), case)

    def full(path: Path) -> None:
        raise OSError("no space left")

    (tmp_path / "case" / COMPONENTS).unlink()
    monkeypatch.setattr(component_store, "atomic_path", full)
    assert same(open_case(tmp_path / "case"), case)


def test_a_case_from_before_is_told_to_be_made_again(tmp_path: Path) -> None:
    stored(tmp_path / "case")
    record = json.loads((tmp_path / "case" / CASE).read_text())
    del record["members"]
    (tmp_path / "case" / CASE).write_text(json.dumps(record))
    with pytest.raises(RecordError, match=r"case case in .* does not say which labels .*; remove that folder and run autoseg"):
        open_case(tmp_path / "case").components  # noqa: B018
