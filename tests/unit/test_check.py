from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.datasets.read import read_dataset
from autoseg.errors import DatasetError
from autoseg.stages.check import check, require_clean
from autoseg.types.dataset import Fault
from autoseg.types.faults import FAULTS, fault, fault_table_markdown, sort_faults

SHAPE = (6, 9, 8)


class Folder:
    """Writes a small two-channel data set and plants faults in it."""

    def __init__(self, root: Path, channels: int = 2) -> None:
        self.root, self.channels = root, channels
        self.random = np.random.default_rng(0)
        (root / "images").mkdir(parents=True)
        (root / "labels").mkdir()

    def write(self, name: str, array: np.ndarray[Any, Any], spacing: Sequence[float] = (1, 1, 2),
              origin: Sequence[float] = (3, 4, 5), direction: Sequence[float] = (1, 0, 0, 0, 1, 0, 0, 0, 1)) -> Path:
        picture = sitk.GetImageFromArray(array, isVector=array.ndim == 3 and array.shape[-1] == 3)
        if array.ndim == 3 and array.shape[-1] != 3:
            picture.SetSpacing(spacing)
            picture.SetOrigin(origin)
            picture.SetDirection(direction)
        if array.ndim == 4:
            picture.SetSpacing((*spacing, 1))
            picture.SetOrigin((*origin, 0))
        path = self.root / name
        sitk.WriteImage(picture, str(path))
        return path

    def voxels(self, shape: Sequence[int] = SHAPE) -> np.ndarray[Any, Any]:
        return self.random.normal(100, 20, shape).astype(np.float32)

    def mask(self, values: Sequence[float] = (0, 1, 3), shape: Sequence[int] = SHAPE) -> np.ndarray[Any, Any]:
        return np.resize(np.asarray(values), tuple(shape)).astype(np.uint8)

    def case(self, name: str, **label_geometry: Any) -> str:
        for c in range(self.channels):
            self.write(f"images/{name}_{c:04d}.nii.gz", self.voxels())
        self.write(f"labels/{name}.nii.gz", self.mask(), **label_geometry)
        return name

    def describe(self, **more: object) -> None:
        (self.root / "dataset.json").write_text(json.dumps({
            "channel_names": {str(c): f"MR{c}" for c in range(self.channels)}, "labels": {"background": 0, "a": 1, "b": 3},
            **more}))

    def check(self, threads: int = 2) -> list[Fault]:
        dataset, faults = read_dataset(self.root)
        assert dataset is not None
        return check(dataset, faults, threads=threads)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "data")
    made.describe()
    return made


def plant(folder: Folder) -> set[tuple[str, str]]:
    """One case per kind of fault; returns what the check must list."""
    write, images, labels = folder.write, folder.root / "images", folder.root / "labels"
    for i in range(3):
        folder.case(f"clean{i}")
    (labels / f"{folder.case('unlabelled')}.nii.gz").unlink()
    write("labels/orphan.nii.gz", folder.mask())
    whole = (images / f"{folder.case('truncated')}_0001.nii.gz").read_bytes()
    (images / "truncated_0001.nii.gz").write_bytes(whole[: len(whole) // 2])
    (labels / f"{folder.case('text')}.nii.gz").write_text("this is not an image")
    (labels / f"{folder.case('noise')}.nii.gz").write_bytes(folder.random.bytes(5000))
    write(f"labels/{folder.case('shape')}.nii.gz", folder.mask(shape=(6, 9, 7)))
    folder.case("spacing", spacing=(1, 1, 2.5))
    folder.case("origin", origin=(3, 4, 25))
    folder.case("direction", direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    folder.case("rounding", spacing=(1.00001, 1, 2), origin=(3.00001, 4, 5))
    write(f"images/{folder.case('grids')}_0001.nii.gz", folder.voxels((6, 9, 7)))
    write(f"labels/{folder.case('undeclared')}.nii.gz", folder.mask((0, 1, 2)))
    write(f"labels/{folder.case('fractions')}.nii.gz", folder.mask().astype(np.float32) * 0.3)
    spoiled = folder.voxels()
    spoiled[1, 2, 3], spoiled[0, 0, 0] = np.nan, np.inf
    write(f"images/{folder.case('infinite')}_0000.nii.gz", spoiled)
    write(f"labels/{folder.case('empty')}.nii.gz", folder.mask((0,)))
    write(f"images/{folder.case('constant')}_0001.nii.gz", np.full(SHAPE, 7, np.float32))
    (images / f"{folder.case('onechannel')}_0001.nii.gz").unlink()
    (labels / f"{folder.case('colours')}.nii.gz").unlink()
    write("labels/colours.png", folder.random.integers(0, 200, (9, 8, 3)).astype(np.uint8))
    folder.case("twin")
    for c in range(2):
        sitk.WriteImage(sitk.ReadImage(str(images / f"clean1_{c:04d}.nii.gz")), str(images / f"twin_{c:04d}.nii.gz"))
    write(f"images/{folder.case('collision')}_0000.nrrd", folder.voxels())
    for c in range(2):
        write(f"images/flat_{c:04d}.png", folder.random.integers(0, 200, (9, 8)).astype(np.uint8))
    write("labels/flat.png", folder.mask(shape=(9, 8)))
    write(f"labels/{folder.case('half')}.nii.gz", folder.mask((0, 3)))
    write("images/unsuffixed.nii.gz", folder.voxels((2, *SHAPE)))
    write("labels/unsuffixed.nii.gz", folder.mask())
    return {
        ("missing-partner", "unlabelled"), ("missing-partner", "orphan"), ("unreadable-file", "truncated"),
        ("unreadable-file", "text"), ("unreadable-file", "noise"),
        ("shape-mismatch", "shape"), ("spacing-mismatch", "spacing"), ("origin-mismatch", "origin"),
        ("direction-mismatch", "direction"), ("header-rounding", "rounding"), ("channel-grids-differ", "grids"),
        ("undeclared-label-values", "undeclared"), ("non-integer-labels", "fractions"), ("not-finite", "infinite"),
        ("empty-label", "empty"), ("constant-image", "constant"), ("wrong-channel-count", "onechannel"), ("rgb-mask", "colours"),
        ("duplicate-image", "twin"), ("colliding-case-names", "collision"), ("mixed-dimensions", "flat"),
        ("absent-label", "half"), ("mixed-naming", "unsuffixed"),
    }


def test_one_run_lists_every_kind_of_fault_planted_at_once(folder: Folder) -> None:
    expected = plant(folder)
    faults = folder.check()
    found = {(f.code, f.case) for f in faults}
    assert found == expected
    assert len({code for code, _ in found}) >= 20
    for item in faults:
        assert item.severity == FAULTS[item.code].severity
        assert item.file and item.expected and item.found and item.fix
    assert [f.severity for f in faults] == sorted((f.severity for f in faults), key=lambda s: s != "error")


def test_threads_do_not_change_the_result(folder: Folder) -> None:
    plant(folder)
    assert folder.check(threads=0) == folder.check(threads=3)


def test_faults_say_what_was_expected_and_found(folder: Folder) -> None:
    plant(folder)
    faults = {(f.code, f.case): f for f in folder.check()}
    assert faults["spacing-mismatch", "spacing"].expected == "spacing zyx (2, 1, 1), as in spacing_0000.nii.gz"
    assert faults["spacing-mismatch", "spacing"].found == "spacing zyx (2.5, 1, 1)"
    assert faults["undeclared-label-values", "undeclared"].found == "2"
    assert faults["not-finite", "infinite"].found == "2 of 432 voxels NaN or infinite"
    assert faults["wrong-channel-count", "onechannel"].expected == "2 (MR0, MR1)"
    assert faults["wrong-channel-count", "onechannel"].found == "1 in 1 file"
    assert "clean1" in faults["duplicate-image", "twin"].found
    assert faults["absent-label", "half"].expected == "label 1 (a) in every case"
    assert "0.3" in faults["non-integer-labels", "fractions"].found
    assert faults["unreadable-file", "truncated"].fix == "copy or export it again"


def test_a_clean_data_set_has_no_faults(folder: Folder) -> None:
    for i in range(4):
        folder.case(f"case{i}")
    assert folder.check() == []
    require_clean([])


def test_errors_are_raised_together_and_warnings_pass(folder: Folder) -> None:
    plant(folder)
    faults = folder.check()
    with pytest.raises(DatasetError) as info:
        require_clean(faults)
    errors = [f for f in faults if f.severity == "error"]
    assert f"the data set has {len(errors)} error(s)" in str(info.value)
    assert all(f.file in str(info.value) for f in errors)
    assert "duplicate-image" not in str(info.value)
    require_clean([f for f in faults if f.severity == "warning"])


def test_a_label_absent_from_many_cases_is_one_warning(folder: Folder) -> None:
    for i in range(8):
        folder.write(f"labels/{folder.case(f'case{i}')}.nii.gz", folder.mask((0, 1) if i else (0, 1, 3)))
    faults = folder.check()
    assert [(f.code, f.case) for f in faults] == [("absent-label", "case1")]
    assert faults[0].found == "absent from 7 of 8 cases: case1, case2, case3, case4, case5 and 2 more"


def test_a_copy_in_another_format_and_type_is_a_duplicate(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data", channels=1)
    array = folder.random.integers(0, 200, SHAPE).astype(np.int16)
    folder.write("images/a.nii.gz", array)
    folder.write("images/b.nrrd", array.astype(np.float64))
    for name in "ab":
        folder.write(f"labels/{name}.nii.gz", folder.mask())
    assert [(f.code, f.case) for f in folder.check()] == [("duplicate-image", "b")]


def test_one_empty_colour_is_not_a_constant_image(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data", channels=1)
    for name in "ab":
        picture = folder.random.integers(0, 200, (9, 8, 3)).astype(np.uint8)
        picture[..., 2] = 0
        folder.write(f"images/{name}.png", picture if name == "a" else np.full_like(picture, 9))
        folder.write(f"labels/{name}.png", folder.mask(shape=(9, 8)))
    assert {(f.code, f.case) for f in folder.check()} == {("constant-image", "b")}


def test_ignored_voxels_are_no_foreground(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data")
    folder.describe(labels={"background": 0, "a": 1, "ignore": 2})
    folder.write(f"labels/{folder.case('only')}.nii.gz", folder.mask((0, 2)))
    folder.write(f"labels/{folder.case('fine')}.nii.gz", folder.mask((0, 1, 2)))
    assert [(f.code, f.case) for f in folder.check()] == [("empty-label", "only")]


def test_undeclared_labels_are_collected_so_that_none_is_strange(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data", channels=1)
    folder.write(f"labels/{folder.case('a')}.nii.gz", folder.mask((0, 255)))
    folder.write(f"labels/{folder.case('b')}.nii.gz", folder.mask((0, 255)))
    assert folder.check() == []


def test_a_data_set_of_nothing_but_broken_files_is_still_checked_to_the_end(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data", channels=1)
    for i, content in enumerate([b"", b"\x1f\x8b\x08\x00", b"\x5c\x01\x00\x00" * 200, folder.random.bytes(3000)]):
        for side in ("images", "labels"):
            (folder.root / side / f"c{i}.nii.gz").write_bytes(content)
    faults = folder.check()
    assert [f.code for f in faults] == ["unreadable-file"] * 8


def test_progress_is_counted_case_by_case(folder: Folder) -> None:
    class Counter:
        def __init__(self) -> None:
            self.notes: list[str] = []
            self.total = 0

        def info(self, message: str) -> None: ...

        def warn(self, message: str) -> None: ...

        def task(self, name: str, total: int, unit: str = "cases") -> Any:
            self.total = total
            return self

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.notes.append(note)

        def __enter__(self) -> Counter:
            return self

        def __exit__(self, *rest: object) -> None: ...

    for i in range(3):
        folder.case(f"case{i}")
    dataset, _ = read_dataset(folder.root)
    assert dataset is not None
    reporter = Counter()
    check(dataset, reporter=reporter)
    assert reporter.total == 3 and reporter.notes == ["case0", "case1", "case2"]


def test_equal_faults_are_listed_once_and_errors_come_first() -> None:
    first, second = fault("absent-label", "a", "f", "x", "y"), fault("empty-label", "b", "f", "x", "y", "do this")
    assert sort_faults([first, second, first]) == [second, first]
    assert first.fix == FAULTS["absent-label"].fix and second.fix == "do this"


def test_the_table_lists_every_code_with_its_severity() -> None:
    table = fault_table_markdown()
    for code, kind in FAULTS.items():
        assert f"| `{code}` | {kind.severity} |" in table
    warnings = {code for code, kind in FAULTS.items() if kind.severity == "warning"}
    assert warnings == {"header-rounding", "absent-label", "unannotated-label", "duplicate-image", "lossy-label"}
