"""Measuring a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from autoseg.errors import DatasetError
from autoseg.stages import fingerprint as stage
from autoseg.stages.fingerprint import fingerprint
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.labels import Label, Labels

LABELS = Labels(foreground=(Label(name="organ", value=1), Label(name="lesion", value=5)))
IGNORING = LABELS.model_copy(update={"ignore": Label(name="ignore", value=9)})


def save(path: Path, array_zyx: NDArray[np.generic], spacing_xyz: tuple[float, ...] = (1, 1, 1)) -> str:
    """Write a volume."""
    image = sitk.GetImageFromArray(array_zyx)
    image.SetSpacing(spacing_xyz)
    sitk.WriteImage(image, str(path))
    return str(path)


def data_set(root: Path, cases: list[tuple[NDArray[np.generic], NDArray[np.generic] | None]], labels: Labels = LABELS,
             spacing: tuple[float, ...] = (1, 1, 1)) -> Dataset:
    """A data set of volumes with one channel."""
    entries = []
    for i, (image, label) in enumerate(cases):
        files = None if label is None else save(root / f"l{i}.nii.gz", label, spacing)
        entries.append(CaseFiles(case=f"c{i}", images=(save(root / f"i{i}.nii.gz", image, spacing),), label=files))
    return Dataset(name="d", source="folder", root=str(root), channels=("channel_0",), channels_named=False, labels=labels,
                   cases=tuple(entries))


def scene() -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A 6 x 8 x 10 image with a zero border, an organ of 8 voxels at 10 and two lesions of 1 voxel at 20 and 40."""
    image = np.zeros((6, 8, 10), np.float32)
    image[1:5, 1:7, 2:8] = 1
    label = np.zeros((6, 8, 10), np.uint8)
    label[2:4, 2:4, 2:4] = 1
    image[2:4, 2:4, 2:4] = 10
    for where, value in (((1, 1, 7), 20), ((4, 6, 7), 40)):
        label[where], image[where] = 5, value
    return image, label


def test_a_hand_made_scene_is_measured_exactly(tmp_path: Path) -> None:
    found = fingerprint(data_set(tmp_path, [scene()], spacing=(2, 3, 4)))
    case = found.cases[0]
    assert (case.case, case.shape, case.shape_after_crop, case.spacing) == ("c0", (6, 8, 10), (4, 6, 6), (4, 3, 2))
    assert case.relative_size_after_crop == pytest.approx(144 / 480)
    organ, lesion = case.labels["organ"], case.labels["lesion"]
    assert (organ.voxels, organ.components, organ.mean_intensity, organ.std_intensity) == (8, 1, (10,), (0,))
    assert organ.volume_ml == pytest.approx(8 * 24 / 1000)
    assert (lesion.voxels, lesion.components, lesion.mean_intensity, lesion.std_intensity) == (2, 2, (30,), (10,))
    assert organ.centre == pytest.approx((3 / 6, 3 / 8, 3 / 10))  # of the whole image, not of the part that is not zero
    assert lesion.centre == pytest.approx((3 / 6, 4 / 8, 7.5 / 10))
    assert len(case.content) == 32
    assert found.median_relative_size_after_cropping == pytest.approx(0.3)
    statistics = found.intensities[0]
    assert (statistics.min, statistics.max, statistics.median) == (10, 40, 10)
    assert statistics.mean == pytest.approx((8 * 10 + 20 + 40) / 10, rel=0.01)
    assert statistics.percentile_99_5 == 40


def test_touching_corners_are_one_component_and_an_absent_label_is_left_out(tmp_path: Path) -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = 1
    found = fingerprint(data_set(tmp_path, [(np.ones((4, 4, 4), np.float32), label)]))
    assert found.cases[0].labels["organ"].components == 1
    assert "lesion" not in found.cases[0].labels


def test_voxels_of_the_ignore_label_do_not_count(tmp_path: Path) -> None:
    image, label = scene()
    label[4, 2:5, 2:5] = 9
    image[4, 2:5, 2:5] = 1000
    found = fingerprint(data_set(tmp_path, [(image, label)], IGNORING))
    assert found.intensities[0].max == 40
    assert set(found.cases[0].labels) == {"organ", "lesion"}


def test_neither_threads_nor_order_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SAMPLE_SIZE", 300)
    rng = np.random.default_rng(0)
    size = (8, 9, 10)
    cases = [(rng.normal(100, 20, size).astype(np.float32), rng.choice([0, 1, 5], size).astype(np.uint8)) for _ in range(4)]
    dataset = data_set(tmp_path, cases)
    alone = fingerprint(dataset, threads=0)
    assert fingerprint(dataset, threads=3) == alone
    turned = fingerprint(dataset.model_copy(update={"cases": dataset.cases[::-1]}), threads=2)
    assert turned.intensities[0].percentile_99_5 == alone.intensities[0].percentile_99_5
    assert turned.cases[::-1] == alone.cases
    values = np.concatenate([image[label > 0] for image, label in cases])
    assert alone.intensities[0].mean == pytest.approx(values.mean(), abs=4 * values.std() / np.sqrt(300))


def test_shapes_are_those_after_turning_to_lps(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).uniform(1, 2, (4, 5, 6)).astype(np.float32))
    image.SetSpacing((1, 2, 3))
    label = sitk.GetImageFromArray(np.ones((4, 5, 6), np.uint8))
    for i in (image, label):
        i.SetSpacing((1, 2, 3))
        i.SetDirection((0, 0, 1, -1, 0, 0, 0, 1, 0))
    sitk.WriteImage(image, str(tmp_path / "i.nii.gz"))
    sitk.WriteImage(label, str(tmp_path / "l.nii.gz"))
    dataset = Dataset(name="d", source="folder", root="", channels=("a",), labels=LABELS,
                      cases=(CaseFiles(case="c", images=(str(tmp_path / "i.nii.gz"),), label=str(tmp_path / "l.nii.gz")),))
    case = fingerprint(dataset).cases[0]
    assert (case.shape, case.spacing) == ((5, 6, 4), (2, 1, 3))


def test_centres_are_those_after_turning_to_lps(tmp_path: Path) -> None:
    label = np.zeros((4, 5, 6), np.uint8)
    label[1, 2, :2] = 1
    label[3, 4, 5] = 5
    for name, array in (("i", np.random.default_rng(0).uniform(1, 2, label.shape).astype(np.float32)), ("l", label)):
        image = sitk.GetImageFromArray(array)
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # RAS, as most NIfTI files
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    dataset = Dataset(name="d", source="folder", root="", channels=("a",), labels=LABELS,
                      cases=(CaseFiles(case="c", images=(str(tmp_path / "i.nii.gz"),), label=str(tmp_path / "l.nii.gz")),))
    labels = fingerprint(dataset).cases[0].labels
    assert labels["organ"].centre == pytest.approx((1.5 / 4, 2.5 / 5, 5 / 6))
    assert labels["lesion"].centre == pytest.approx((3.5 / 4, 0.5 / 5, 0.5 / 6))


def test_ct_is_recognised_by_its_hounsfield_units_and_mri_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ct = rng.normal(40, 30, (10, 10, 10)).astype(np.int16)
    ct[:4] = -1000
    label = np.zeros((10, 10, 10), np.uint8)
    label[5:] = 1
    (tmp_path / "ct").mkdir()
    (tmp_path / "mr").mkdir()
    assert fingerprint(data_set(tmp_path / "ct", [(ct, label)])).channel_kinds == ("CT",)
    mri = rng.normal(300, 100, (10, 10, 10)).astype(np.float32)
    assert fingerprint(data_set(tmp_path / "mr", [(ct, label), (mri, label)])).channel_kinds == ("",)


def test_colour_pictures_are_recognised(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (12, 14, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(tmp_path / "i.png"))
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((12, 14), np.uint8)), str(tmp_path / "l.png"))
    dataset = Dataset(name="d", source="folder", root="", channels=("r", "g", "b"), labels=LABELS,
                      cases=(CaseFiles(case="c", images=(str(tmp_path / "i.png"),), label=str(tmp_path / "l.png")),))
    found = fingerprint(dataset)
    assert found.channel_kinds == ("RGB",) * 3
    assert found.cases[0].shape == (1, 12, 14)


def test_every_case_that_fails_is_listed_with_its_reason(tmp_path: Path) -> None:
    dataset = data_set(tmp_path, [scene(), scene(), scene()])
    (tmp_path / "i1.nii.gz").write_bytes(b"not an image")
    save(tmp_path / "l2.nii.gz", np.full((6, 8, 10), 7, np.uint8))
    with pytest.raises(DatasetError) as caught:
        fingerprint(dataset, threads=2)
    text = str(caught.value)
    assert "2 of 3 cases could not be measured" in text
    assert "c1 (" in text
    assert "label values [7] are not declared" in text


def test_a_data_set_without_foreground_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no case of .* holds a voxel of a foreground label"):
        fingerprint(data_set(tmp_path, [(np.ones((3, 3, 3), np.float32), None)]))
