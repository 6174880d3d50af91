"""The store of preprocessed cases."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from autoseg.errors import RecordError
from autoseg.files import preprocessed
from autoseg.files.preprocessed import (
    class_locations,
    content_hash,
    open_case,
    remove_case,
    remove_leftovers,
    stored_record,
    write_case,
)
from autoseg.types.case import Placement, Preprocessed
from autoseg.types.geometry import AxisMap, Grid, Shape

TARGETS = (("a", (1,)), ("ab", (1, 2)), ("c", (3,)))


def made(shape: Shape = (20, 40, 50), channels: int = 2, seed: int = 0, scale: float = 1.0) -> Preprocessed:
    """A case of random voxels and labels 0..2."""
    rng = np.random.default_rng(seed)
    image = (scale * rng.normal(size=(channels, *shape))).astype(np.float32)
    label = rng.integers(-1, 3, shape).astype(np.int16)
    place = Placement(Grid(shape=shape, spacing=(1, 1.5, 2)), AxisMap((2, 0, 1), (True, False, True)), (1, 0, 2),
                      ((0, shape[0]), (0, shape[1]), (0, shape[2])), (1.5, 2.0, 1.0), shape, (1.0, 1.0, 1.0))
    return Preprocessed(image, label, place)


def test_a_case_comes_back_as_it_was_written(tmp_path: Path) -> None:
    case = made()
    write_case(tmp_path / "x" / "case1", case, "key1", TARGETS, content="c", sources=(("/a", 1, 2),))
    stored = open_case(tmp_path / "x" / "case1")
    assert (stored.name, stored.key, stored.shape, stored.channels) == ("case1", "key1", (20, 40, 50), 2)
    assert stored.placement == case.placement
    assert stored.record.sources == (("/a", 1, 2),)
    image = stored.read_image()
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, case.image_czyx.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(stored.read_label(), case.label_zyx)


def test_any_part_can_be_read_alone_also_an_empty_one(tmp_path: Path) -> None:
    case = made((33, 65, 40))
    write_case(tmp_path / "c", case, "k", patch_size=(16, 32, 32))
    stored = open_case(tmp_path / "c")
    rng = np.random.default_rng(0)
    for _ in range(20):
        ends = [sorted(rng.integers(0, n + 1, 2)) for n in (33, 65, 40)]
        box = (slice(*map(int, ends[0])), slice(*map(int, ends[1])), slice(*map(int, ends[2])))
        np.testing.assert_allclose(stored.read_image(box), case.image_czyx[(slice(None), *box)], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(stored.read_label(box), case.label_zyx[box])
    assert stored.read_image((slice(3, 3), slice(0, 5), slice(0, 5))).shape == (2, 0, 5, 5)


@pytest.mark.parametrize(("scale", "kind"), [(1.0, np.float16), (1e5, np.float32), (1e-6, np.float32)])
def test_float16_is_used_only_where_it_keeps_the_values(tmp_path: Path, scale: float, kind: type) -> None:
    import blosc2

    case = made(scale=scale)
    write_case(tmp_path / "c", case, "k")
    assert blosc2.open(str(tmp_path / "c" / preprocessed.IMAGE)).dtype == kind
    np.testing.assert_allclose(open_case(tmp_path / "c").read_image(), case.image_czyx, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("patch", [(512, 512), (8, 8, 8), (128, 128, 128), (20, 256, 224)])
@pytest.mark.parametrize("shape", [(1, 300, 260), (5, 40, 33), (40, 40, 40)])
def test_every_patch_and_image_shape_can_be_stored(tmp_path: Path, shape: Shape, patch: tuple[int, ...]) -> None:
    case = made(shape, channels=1)
    write_case(tmp_path / "c", case, "k", patch_size=patch)
    np.testing.assert_array_equal(open_case(tmp_path / "c").read_label(), case.label_zyx)


def test_four_threads_can_read_one_case_at_once(tmp_path: Path) -> None:
    case = made((40, 64, 64))
    write_case(tmp_path / "c", case, "k", patch_size=(16, 16, 16))
    stored, wrong = open_case(tmp_path / "c"), []
    half = case.image_czyx.astype(np.float16).astype(np.float32)

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            z, y, x = rng.integers(0, 30, 3)
            box = (slice(z, z + 10), slice(y, y + 30), slice(x, x + 30))
            if not np.array_equal(stored.read_image(box), half[(slice(None), *box)]):
                wrong.append(box)
            if not np.array_equal(stored.read_label(box), case.label_zyx[box]):
                wrong.append(box)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_locations_hold_voxels_of_each_target_that_is_present(tmp_path: Path) -> None:
    case = made()
    write_case(tmp_path / "c", case, "k", TARGETS, ignore_index=2)
    locations = open_case(tmp_path / "c").locations
    assert sorted(locations) == [0, 1, 2]
    assert 3 not in locations
    assert case.label_zyx is not None
    for target, members in ((0, (-1, 0, 1)), (1, (1,)), (2, (1, 2))):
        found = locations[target]
        assert found.dtype == np.int32
        assert found.shape == (10_000 if target != 1 else min(10_000, (case.label_zyx == 1).sum()), 3)
        assert np.isin(case.label_zyx[tuple(found.T)], members).all()
        assert len(np.unique(found, axis=0)) == len(found)


def test_locations_are_all_voxels_of_a_small_target_and_one_percent_of_a_huge_one() -> None:
    label = np.ones((120, 120, 120), np.int16)
    label[0, 0, :7] = 2
    places = class_locations(label, (("big", (1,)), ("small", (2,))), None, "k")
    assert places[2].tolist() == list(range(7))
    assert len(places[1]) == int(0.01 * (120**3 - 7))


def test_locations_depend_on_the_key_alone() -> None:
    label = made((40, 40, 40)).label_zyx
    assert label is not None
    first, again, other = (class_locations(label, TARGETS, None, key)[1] for key in ("k", "k", "other"))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_case_without_labels_can_be_stored(tmp_path: Path) -> None:
    case = made()
    write_case(tmp_path / "c", Preprocessed(case.image_czyx, None, case.placement), "k", TARGETS)
    stored = open_case(tmp_path / "c")
    assert not stored.has_label
    assert not stored.locations
    with pytest.raises(RecordError, match=r"label\.b2nd"):
        stored.read_label()


def test_writing_again_replaces_and_a_failed_write_keeps_the_old_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case(tmp_path / "c", made(), "one")
    write_case(tmp_path / "c", made(seed=1), "two")
    assert open_case(tmp_path / "c").key == "two"

    def fail(path: Path, record: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(preprocessed, "save_record", fail)
    with pytest.raises(OSError, match="disk full"):
        write_case(tmp_path / "c", made(seed=2), "three")
    assert open_case(tmp_path / "c").key == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("name", ["image.b2nd", "label.b2nd", "locations.bin", "case.json"])
@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_a_damaged_case_is_an_error_that_names_it_and_what_to_do(tmp_path: Path, name: str, harm: str) -> None:
    write_case(tmp_path / "case7", made(), "k", TARGETS)
    path = tmp_path / "case7" / name
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RecordError, match=r"(?s)case7.*autoseg preprocess"):
        open_case(tmp_path / "case7")
    assert stored_record(tmp_path / "case7") is None


def test_damage_that_comes_after_opening_is_an_error_too(tmp_path: Path) -> None:
    write_case(tmp_path / "case7", made(), "k", TARGETS)
    stored = open_case(tmp_path / "case7")
    (tmp_path / "case7" / "image.b2nd").write_bytes(b"x" * 1000)
    (tmp_path / "case7" / "locations.bin").write_bytes(b"x" * 10)
    with pytest.raises(RecordError, match=r"case7.*autoseg preprocess"):
        stored.read_image()
    with pytest.raises(RecordError, match=r"case7.*truncated"):
        stored.locations[2]


def test_a_case_that_was_never_made_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"case nothing is not preprocessed.*autoseg preprocess"):
        open_case(tmp_path / "nothing")


def test_removing_leaves_nothing_and_leftovers_go_once_they_are_old(tmp_path: Path) -> None:
    write_case(tmp_path / "c", made(), "k")
    remove_case(tmp_path / "c")
    remove_case(tmp_path / "c")
    fresh, old = tmp_path / ".c-new", tmp_path / ".c-old"
    fresh.mkdir()
    old.mkdir()
    os.utime(old, (0, 0))
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".c-new"]


def test_content_depends_on_bytes_and_order_but_not_on_names(tmp_path: Path) -> None:
    def file(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    a, b, copy = file("a", "one"), file("b", "two"), file("copy", "one")
    assert content_hash([a, b]) == content_hash([copy, b])
    assert content_hash([a, b]) != content_hash([b, a])
    assert content_hash([file("c", "onet"), file("d", "wo")]) != content_hash([a, b])


def as_set(places: NDArray[np.int32]) -> set[tuple[int, ...]]:
    """Positions as a set."""
    return {tuple(map(int, row)) for row in places}


def test_locations_of_a_tiny_case_are_exact(tmp_path: Path) -> None:
    case = made((2, 3, 4), channels=1)
    assert case.label_zyx is not None
    write_case(tmp_path / "c", case, "k", TARGETS)
    expected = as_set(np.argwhere(case.label_zyx == 1).astype(np.int32))
    assert as_set(open_case(tmp_path / "c").locations[1]) == expected


def test_locations_do_not_depend_on_how_many_voxels_are_sorted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    label = made((12, 40, 50)).label_zyx
    assert label is not None
    targets = (*TARGETS, ("abc", (1, 2, 3)), ("none", (9,)))
    expected = class_locations(label, targets, None, "k")
    assert sorted(expected) == [1, 2, 4]
    monkeypatch.setattr(preprocessed, "_LOOKED_AT", 333)
    found = class_locations(label, targets, None, "k")
    for target, places in expected.items():
        np.testing.assert_array_equal(found[target], places)


def test_two_writers_of_one_case_leave_a_whole_one(tmp_path: Path) -> None:
    cases = [made((6, 8, 8), seed=seed) for seed in (0, 1)]
    errors: list[BaseException] = []

    def write(case: Preprocessed) -> None:
        try:
            for _ in range(40):
                write_case(tmp_path / "c", case, "k", TARGETS)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert open_case(tmp_path / "c").shape == (6, 8, 8)
