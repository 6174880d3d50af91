"""Data sets of other kinds from plan to masks: pictures, gaps in label values, regions with an ignore label, 4D files."""

from __future__ import annotations

import json
import math
import shutil

import nibabel
import numpy as np
import PIL.Image
import pytest
import SimpleITK as sitk
import tifffile

SIZE = (48, 64)


def scene(number, values):
    """A map (y, x) with a bright disk of the second value and, if there is a third, a bar of that one."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    label = np.full(SIZE, values[0])
    if len(values) > 2:
        start = int(random.integers(4, 40))
        label[:, start:start + 12] = values[2]
    label[(y - random.integers(14, 34)) ** 2 + (x - random.integers(14, 50)) ** 2 < random.integers(8, 13) ** 2] = values[1]
    return label


def colours(label, values, number):
    """An RGB picture (y, x, 3) of a map."""
    palette = np.array([[60, 90, 70], [200, 60, 80], [40, 60, 200]])
    picture = palette[np.searchsorted(values, label)] + np.random.default_rng(100 + number).normal(0, 12, (*SIZE, 3))
    return picture.clip(0, 255).astype(np.uint8)


def trained_work(cli, data, work, epochs, *arguments):
    """Plan, make thin, and train one fold."""
    cli.call("check", data).ok()
    cli.call("plan", data, "--out", work).ok()
    cli.thin(work, features=(8, 16, 16, 16, 16, 16))
    ran = cli.train(work, "--folds", "0", *arguments, epochs=epochs).ok()
    name = next(p.name for p in (work / "runs").iterdir())
    lines = (work / "runs" / name / "fold_0" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert len(metrics) == epochs
    assert all(math.isfinite(m["train_loss"]) and math.isfinite(m["val_loss"]) for m in metrics)
    return ran, metrics


@pytest.fixture(scope="module")
def photos(cli, tmp_path_factory):
    """Six RGB pictures with masks of 0 and 255 as PNG, trained in 2D."""
    data, work = tmp_path_factory.mktemp("photos") / "data", tmp_path_factory.mktemp("photos") / "work"
    (data / "images").mkdir(parents=True)
    (data / "labels").mkdir()
    for number in range(6):
        label = scene(number, (0, 255))
        PIL.Image.fromarray(colours(label, (0, 255), number)).save(data / "images" / f"photo{number}.png")
        PIL.Image.fromarray(label.astype(np.uint8)).save(data / "labels" / f"photo{number}.png")
    _, metrics = trained_work(cli, data, work, 3)
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    return data, work


def test_pictures_are_planned_in_2d_with_one_channel_per_colour(photos):
    _, work = photos
    plan = json.loads((work / "plan.json").read_text())
    assert list(plan["configurations"]) == ["2d"] and plan["channels"] == ["red", "green", "blue"]
    entry = plan["configurations"]["2d"]
    assert len(entry["patch_size"]) == 2 and len(entry["spacing"]) == 2
    assert entry["normalization"][0] in ("RGBTo01Normalization", "ZScoreNormalization")
    assert entry["normalization"] == entry["normalization"][:1] * 3
    assert [label["value"] for label in plan["labels"]["foreground"]] == [255]


def test_masks_of_pictures_are_png_of_the_same_size_with_0_and_255(cli, photos, tmp_path):
    data, work = photos
    (tmp_path / "new").mkdir()
    truth = {}
    for number, ending in ((20, "png"), (21, "jpg"), (22, "bmp"), (23, "jpeg"), (24, "tif")):
        label = truth[f"new{number}"] = scene(number, (0, 255))
        PIL.Image.fromarray(colours(label, (0, 255), number)).save(tmp_path / "new" / f"new{number}.{ending}")
    cli.call("predict", work, tmp_path / "new", "--out", tmp_path / "masks").ok()
    found = {p.name for p in (tmp_path / "masks").iterdir()} - {"prediction.json", "summary.csv"}
    assert found == {"new20.png", "new21.png", "new22.bmp", "new23.png", "new24.tif"}
    for name in sorted(found):
        with PIL.Image.open(tmp_path / "masks" / name) as picture:
            assert picture.size == SIZE[::-1] and picture.mode == "L"
            mask, label = np.asarray(picture), truth[name.split(".")[0]]
        assert set(np.unique(mask)) == {0, 255}
        assert 2 * ((mask == 255) & (label == 255)).sum() / ((mask == 255).sum() + (label == 255).sum()) > 0.7
    cli.call("predict", work, data / "images", "--out", tmp_path / "again").ok()
    cli.call("evaluate", tmp_path / "again", data / "labels", "--out", tmp_path / "report.json").ok()
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["mean"]) == ["255"] and report["foreground_mean"]["dice"] > 0.7


def test_probabilities_of_a_picture_are_nifti_with_the_classes_last(cli, photos, tmp_path):
    data, work = photos
    cli.call("predict", work, data / "images" / "photo0.png", "--out", tmp_path / "masks", "--probabilities").ok()
    probabilities = nibabel.load(tmp_path / "masks" / "photo0_probabilities.nii.gz")
    assert probabilities.shape == (*SIZE[::-1], 1, 2) and probabilities.get_data_dtype() == np.float32
    mask = np.asarray(PIL.Image.open(tmp_path / "masks" / "photo0.png"))
    array = np.asarray(probabilities.dataobj)[:, :, 0].transpose(2, 1, 0)
    np.testing.assert_allclose(array.sum(0), 1, atol=1e-5)
    assert ((array[1] > array[0]) == (mask == 255)).mean() > 0.999


def test_a_grey_picture_does_not_suit_a_model_of_colours(cli, photos, tmp_path):
    _, work = photos
    PIL.Image.fromarray(scene(1, (0, 255)).astype(np.uint8)).save(tmp_path / "grey.png")
    cli.call("predict", work, tmp_path / "grey.png", "--out", tmp_path / "masks").refused("grey", "expected 3 channels, found 1")


def test_grey_tiff_with_gaps_in_the_label_values_comes_back_with_them(cli, tmp_path):
    data, work, values = tmp_path / "data", tmp_path / "work", (0, 5, 200)
    (data / "images").mkdir(parents=True)
    (data / "labels").mkdir()
    for number in range(5):
        label = scene(number, values)
        grey = np.array([100, 700, 1500])[np.searchsorted(values, label)] + np.random.default_rng(number).normal(0, 60, SIZE)
        tifffile.imwrite(data / "images" / f"slice{number}.tif", grey.clip(0, None).astype(np.uint16))
        PIL.Image.fromarray(label.astype(np.uint8)).save(data / "labels" / f"slice{number}.png")
    _, metrics = trained_work(cli, data, work, 4)
    plan = json.loads((work / "plan.json").read_text())
    names = [label["name"] for label in plan["labels"]["foreground"]]
    assert [label["value"] for label in plan["labels"]["foreground"]] == [5, 200] and list(metrics[0]["pseudo_dice"]) == names
    cli.call("predict", work, data / "images", "--out", tmp_path / "masks").ok()
    seen = set()
    for number in range(5):
        mask = tifffile.imread(tmp_path / "masks" / f"slice{number}.tif")
        assert mask.shape == SIZE and mask.dtype == np.uint8
        seen |= set(np.unique(mask).tolist())
    assert seen == {0, 5, 200}


@pytest.fixture(scope="module")
def brains(cli, tmp_path_factory):
    """Brain phantoms (four channels, nested regions) in which a slab of each label is set to an ignore label, trained."""
    from autoseg.datasets.phantom import write_dataset

    data, work = tmp_path_factory.mktemp("brains") / "data", tmp_path_factory.mktemp("brains") / "work"
    write_dataset(data, "brain", 3, 1, cli.SEED, size=cli.SIZE)
    cli.edit(data / "dataset.json", lambda d: d["labels"].update(ignore=4))
    for path in (data / "labels").iterdir():
        image = sitk.ReadImage(str(path))
        array = sitk.GetArrayFromImage(image)
        array[:2] = 4
        ignored = sitk.GetImageFromArray(array)
        ignored.CopyInformation(image)
        sitk.WriteImage(ignored, str(path))
    _, metrics = trained_work(cli, data, work, 3, "--config", "3d_fullres")
    assert list(metrics[0]["pseudo_dice"]) == ["whole tumour", "tumour core", "enhancing tumour"]
    return data, work


def test_regions_with_an_ignore_label_are_trained_and_predicted(cli, brains, tmp_path):
    data, work = brains
    plan = json.loads((work / "plan.json").read_text())
    assert plan["labels"]["ignore"]["value"] == 4 and len(plan["labels"]["regions"]) == 3
    images = data / "unseen" / "images"
    cli.call("predict", work, images, "--out", tmp_path / "masks", "--probabilities").ok()
    case = sorted(images.iterdir())[0].name.removesuffix("_0000.nii.gz")
    mask, image = nibabel.load(tmp_path / "masks" / f"{case}.nii.gz"), nibabel.load(images / f"{case}_0000.nii.gz")
    assert mask.shape == image.shape and set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2, 3}
    np.testing.assert_allclose(mask.affine, image.affine, rtol=0, atol=1e-6)
    probabilities = nibabel.load(tmp_path / "masks" / f"{case}_probabilities.nii.gz")
    assert probabilities.shape == (*image.shape, 3) and probabilities.get_data_dtype() == np.float32
    array = np.asarray(probabilities.dataobj)
    assert array.min() >= 0 and array.max() <= 1
    header = (tmp_path / "masks" / "summary.csv").read_text().splitlines()[0]
    assert "voxels_" in header and "ignore" not in header
    report = json.loads((work / "runs" / "3d_fullres" / "fold_0" / "validation" / "report.json").read_text())
    assert set(report["mean"]) == {"whole tumour", "tumour core", "enhancing tumour"}


def test_channels_may_lie_in_one_4d_file_or_in_one_file_each(cli, brains, tmp_path):
    data, work = brains
    images = data / "unseen" / "images"
    case = sorted(images.iterdir())[0].name.removesuffix("_0000.nii.gz")
    parts = [nibabel.load(images / f"{case}_{c:04d}.nii.gz") for c in range(4)]
    (tmp_path / "images").mkdir()
    whole = np.stack([np.asarray(part.dataobj) for part in parts], -1)
    nibabel.save(nibabel.Nifti1Image(whole, parts[0].affine, parts[0].header), tmp_path / "images" / f"{case}.nii.gz")
    cli.call("predict", work, tmp_path / "images", "--out", tmp_path / "one").ok()
    cli.call("predict", work, images, "--out", tmp_path / "each").ok()
    one, each = (nibabel.load(tmp_path / name / f"{case}.nii.gz") for name in ("one", "each"))
    assert np.array_equal(np.asarray(one.dataobj), np.asarray(each.dataobj))
    np.testing.assert_allclose(one.affine, each.affine, rtol=0, atol=1e-6)


def test_a_missing_channel_is_named_before_anything_is_predicted(cli, brains, tmp_path):
    data, work = brains
    shutil.copytree(data / "unseen" / "images", tmp_path / "images")
    sorted((tmp_path / "images").glob("*_0003.nii.gz"))[0].unlink()
    cli.call("predict", work, tmp_path / "images", "--out", tmp_path / "masks").refused("expected 4 channels, found 3")
    assert not (tmp_path / "masks").exists()


def test_decathlon_nnunet_and_manifest_folders_give_the_plan_of_the_plain_folder(cli, chest, planned, tmp_path):
    cases = [f"chest{number:03d}" for number in range(4)]
    description = json.loads((chest / "dataset.json").read_text())
    msd, raw, table = tmp_path / "msd", tmp_path / "raw", tmp_path / "table"
    for folder in (msd / "imagesTr", msd / "labelsTr", raw / "imagesTr", raw / "labelsTr", table):
        folder.mkdir(parents=True)
    rows = ["case,image,label"]
    for case in cases:
        image, label = chest / "images" / f"{case}_0000.nii.gz", chest / "labels" / f"{case}.nii.gz"
        shutil.copy(image, msd / "imagesTr" / f"{case}.nii.gz")
        shutil.copy(label, msd / "labelsTr" / f"{case}.nii.gz")
        shutil.copy(image, raw / "imagesTr" / image.name)
        shutil.copy(label, raw / "labelsTr" / label.name)
        rows.append(f"{case},{image},{label}")
    (table / "data.csv").write_text("\n".join(rows) + "\n")
    (table / "dataset.json").write_text(json.dumps(description))
    (raw / "dataset.json").write_text(json.dumps(description))
    (msd / "dataset.json").write_text(json.dumps({
        "name": description["name"], "modality": {"0": "CT"}, "tensorImageSize": "3D",
        "labels": {str(value): name for name, value in description["labels"].items()},
        "training": [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in cases]}))
    cli.call("plan", chest, "--out", tmp_path / "plain").ok()
    expected = json.loads((tmp_path / "plain" / "plan.json").read_text())
    for path in (msd, raw, table / "data.csv"):
        work = tmp_path / f"work_{path.name}"
        cli.call("plan", path, "--out", work).ok()
        found = json.loads((work / "plan.json").read_text())
        assert {**found, "dataset_name": ""} == {**expected, "dataset_name": ""}, path
        assert json.loads((work / "splits.json").read_text()) == json.loads((planned / "splits.json").read_text())
