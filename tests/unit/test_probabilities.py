"""The temporary store of probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from autoseg.files.probabilities import (
    foreground_box,
    is_stored,
    joint_box,
    load_notes,
    load_probabilities,
    save_probabilities,
    with_margin,
)

SHAPE = (5, 8, 9)


def scene(outputs: int = 3) -> np.ndarray:
    """Softmax probabilities with foreground in a box only."""
    rng = np.random.default_rng(0)
    p = np.zeros((outputs, *SHAPE), np.float32)
    p[0] = 1
    p[:, 1:3, 2:6, 4:9] = rng.dirichlet(np.ones(outputs), (2, 4, 5)).transpose(3, 0, 1, 2)
    p[:, 1, 2, 4] = p[:, 2, 5, 8] = np.array([0.4, 0.3, 0.3])
    return p


def test_what_is_stored_comes_back_cut_to_the_foreground_with_its_notes(tmp_path) -> None:
    path, p = tmp_path / "a" / "case.b2nd", scene()
    save_probabilities(path, p, False, "key", {"seconds": {"network": 1.5}})
    assert is_stored(path, "key") and not is_stored(path, "other") and load_notes(path) == {"seconds": {"network": 1.5}}
    found = load_probabilities(path)
    assert found.box == (slice(1, 3), slice(2, 6), slice(4, 9)) and found.shape == SHAPE
    np.testing.assert_allclose(found.probabilities_czyx, p[:, 1:3, 2:6, 4:9], atol=1e-3)
    whole = found.on(tuple(slice(0, n) for n in SHAPE), regions=False)
    np.testing.assert_allclose(whole, p, atol=1e-3)
    assert [f.name for f in path.parent.iterdir()] == ["case.b2nd"]


def test_regions_have_no_background_output_and_an_empty_case_keeps_one_voxel(tmp_path) -> None:
    p = np.zeros((2, *SHAPE), np.float32)
    p[1, 2, 3, 4] = 0.7
    assert foreground_box(p, True) == (slice(2, 3), slice(3, 4), slice(4, 5))
    save_probabilities(tmp_path / "x.b2nd", p * 0, True, "k", {})
    found = load_probabilities(tmp_path / "x.b2nd")
    assert found.box == (slice(0, 1),) * 3 and not found.on((slice(0, 3),) * 3, regions=True).any()


def test_boxes_are_joined_and_get_a_margin_inside_the_image() -> None:
    box = joint_box([(slice(0, 2), slice(3, 4)), (slice(1, 3), slice(5, 8))])
    assert box == (slice(0, 3), slice(3, 8)) and with_margin(box, (3, 12)) == (slice(0, 3), slice(2, 9))


def test_a_torn_file_counts_as_missing(tmp_path) -> None:
    path = tmp_path / "case.b2nd"
    save_probabilities(path, scene(), False, "key", {})
    path.write_bytes(path.read_bytes()[:40])
    assert not is_stored(path, "key") and not is_stored(tmp_path / "none", "key")
    with pytest.raises(FileNotFoundError):
        load_probabilities(path)
    with pytest.raises(FileNotFoundError):
        load_notes(path)
