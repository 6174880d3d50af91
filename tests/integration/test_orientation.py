"""How an image is stored does not matter: flipped, permuted and rotated copies give the same arrays, plans and masks."""

from __future__ import annotations

import itertools
import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

STORAGES = [(order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((False, True), repeat=3)]
SOME = [  # as is, a flip, a permutation, two rotations by 90 degrees, and a mirrored rotation
    ((0, 1, 2), (False, False, False)), ((0, 1, 2), (True, False, False)), ((2, 0, 1), (False, False, False)),
    ((1, 0, 2), (True, False, False)), ((0, 2, 1), (False, True, False)), ((2, 1, 0), (True, True, True)),
]
FORMATS = (".nii.gz", ".nrrd", ".mha")


def stored_otherwise(image, order, flips):
    """The same voxels at the same places in the world, listed along permuted and flipped axes (x, y, z)."""
    array = sitk.GetArrayFromImage(image).T.transpose(order)
    corner = [0, 0, 0]
    direction = np.reshape(image.GetDirection(), (3, 3))[:, list(order)].copy()
    for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
        if flip:
            array = np.flip(array, new)
            direction[:, new] *= -1
            corner[old] = image.GetSize()[old] - 1
    stored = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    stored.SetOrigin(image.TransformIndexToPhysicalPoint(corner))
    stored.SetSpacing([image.GetSpacing()[old] for old in order])
    stored.SetDirection(direction.ravel())
    return stored


def stored_back(image, order, flips):
    """The array (x, y, z) of an image made by `stored_otherwise`, along the original axes."""
    array = sitk.GetArrayFromImage(image).T
    for axis, flip in enumerate(flips):
        array = np.flip(array, axis) if flip else array
    return array.transpose(np.argsort(order))


def oblique():
    """A small image whose axes lie askew in the world, with different spacings, and its label."""
    random = np.random.default_rng(5)
    array = random.normal(40, 30, (9, 12, 14)).astype(np.float32)
    array[:2] = array[:, -3:] = 0
    angle = np.radians(17)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    tilt = np.array([[1.0, 0, 0], [0, np.cos(0.3), -np.sin(0.3)], [0, np.sin(0.3), np.cos(0.3)]])
    label = ((array > 60) + 2 * (array < -5)).astype(np.uint8)
    images = [sitk.GetImageFromArray(a) for a in (array, label)]
    for image in images:
        image.SetSpacing((0.75, 1.25, 3.5))
        image.SetOrigin((-31.25, 12.5, 103.125))
        image.SetDirection((turn @ tilt).ravel())
    return images


@pytest.mark.parametrize(("name", "transpose"), [("2d", (0, 1, 2)), ("3d_fullres", (0, 1, 2)), ("3d_fullres", (2, 0, 1))])
def test_preprocessing_is_the_same_for_all_48_ways_to_store_an_image(planned, tmp_path, name, transpose):
    from autoseg.arrays.preprocess import preprocess
    from autoseg.files.images import read_image, read_label
    from autoseg.files.workspace import Workspace

    plan = Workspace(planned).plan().model_copy(update={"transpose_forward": transpose})
    change = {"spacing": (1.0, 1.0) if name == "2d" else (2.5, 1.0, 1.0)}
    configuration = plan.configurations[name].model_copy(update=change)
    image, label = oblique()
    expected = None
    for number, (order, flips) in enumerate(STORAGES):
        paths = [tmp_path / f"{side}{number}.mha" for side in ("image", "label")]
        for path, given in zip(paths, (image, label), strict=True):
            sitk.WriteImage(stored_otherwise(given, order, flips), str(path))
        made = preprocess(read_image(paths[0]), read_label(paths[1])[0], plan, configuration)
        if expected is None:
            expected = made
            assert set(np.unique(made.label_zyx)) == {0, 1, 2} and made.image_czyx.shape[1:] == made.label_zyx.shape
        assert np.array_equal(made.image_czyx, expected.image_czyx), (order, flips)
        assert np.array_equal(made.label_zyx, expected.label_zyx), (order, flips)


def test_a_data_set_stored_otherwise_gives_the_same_plan_and_the_same_preprocessed_cases(cli, chest, planned, tmp_path):
    from autoseg.files.preprocessed import open_case

    data, work = tmp_path / "data", tmp_path / "work"
    for side in ("images", "labels"):
        (data / side).mkdir(parents=True)
        for number, path in enumerate(sorted((chest / side).iterdir())):
            sitk.WriteImage(stored_otherwise(sitk.ReadImage(str(path)), *SOME[1 + number]), str(data / side / path.name))
    (data / "dataset.json").write_bytes((chest / "dataset.json").read_bytes())
    cli.call("plan", data, "--out", work).ok()
    cli.thin(work)
    assert (work / "splits.json").read_bytes() == (planned / "splits.json").read_bytes()
    found, expected = (json.loads((folder / "plan.json").read_text()) for folder in (work, planned))
    for plan in (found, expected):
        for entry in plan["configurations"].values():
            entry["spacing"] = [round(s, 5) for s in entry["spacing"]]  # NIfTI holds spacing as float32
    assert found == expected
    (work / "plan.json").write_bytes((planned / "plan.json").read_bytes())
    cli.call("preprocess", work).ok()
    for name in ("2d", "3d_fullres"):
        for folder in sorted((planned / "preprocessed" / name).iterdir()):
            case, other = open_case(folder), open_case(work / "preprocessed" / name / folder.name)
            assert np.array_equal(case.read_image(), other.read_image()) and np.array_equal(case.read_label(), other.read_label())


@pytest.fixture(scope="module")
def stored(cli, trained, chest, tmp_path_factory):
    """One unseen image stored in some ways and all formats that carry a direction, and the masks predicted for each."""
    folder, out = tmp_path_factory.mktemp("stored") / "images", tmp_path_factory.mktemp("stored") / "masks"
    folder.mkdir()
    image = sitk.ReadImage(str(chest / "unseen" / "images" / "chest1000_0000.nii.gz"))
    made = {}
    for ending, (number, (order, flips)) in itertools.product(FORMATS, enumerate(SOME)):
        name = f"{ending[1:3]}{number}"
        sitk.WriteImage(stored_otherwise(image, order, flips), str(folder / f"{name}{ending}"))
        made[name] = (ending, order, flips)
    cli.call("predict", trained, folder, "--out", out).ok()
    return folder, out, made


def test_the_mask_is_the_same_in_the_world_however_the_image_is_stored(stored):
    _, out, made = stored
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "ni0.nii.gz"))).T
    assert len(np.unique(expected)) > 1
    for name, (ending, order, flips) in made.items():
        mask = stored_back(sitk.ReadImage(str(out / f"{name}{ending}")), order, flips)
        assert np.array_equal(mask, expected), name


def test_each_mask_has_the_geometry_of_its_own_image(stored):
    folder, out, made = stored
    for name, (ending, _, _) in made.items():
        image, mask = (sitk.ReadImage(str(place / f"{name}{ending}")) for place in (folder, out))
        assert mask.GetSize() == image.GetSize() and mask.GetNumberOfComponentsPerPixel() == 1
        for read in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(mask, read)(), getattr(image, read)(), rtol=0, atol=1e-6, err_msg=f"{name} {read}")
        if ending == ".nii.gz":
            other, own = (nibabel.load(place / f"{name}{ending}") for place in (folder, out))
            assert own.shape == other.shape
            np.testing.assert_allclose(own.affine, other.affine, rtol=0, atol=1e-6)
            np.testing.assert_allclose(own.header.get_zooms(), other.header.get_zooms(), rtol=0, atol=1e-6)
            assert all(own.header[code] == other.header[code] for code in ("qform_code", "sform_code"))


def test_a_nifti_without_sform_or_with_an_unusual_header_gets_it_back(cli, trained, chest, tmp_path):
    image = nibabel.load(chest / "unseen" / "images" / "chest1000_0000.nii.gz")
    (tmp_path / "images").mkdir()
    affine = image.affine
    voxels = np.asarray(image.dataobj)
    kinds = {"qform": (1, 0), "sform": (0, 2), "both": (1, 4), "template": (3, 3)}
    for name, (qform, sform) in kinds.items():
        made = nibabel.Nifti1Image(voxels, affine)
        made.set_qform(affine, qform)
        made.set_sform(affine, sform)
        nibabel.save(made, tmp_path / "images" / f"{name}.nii.gz")
    big = nibabel.Nifti1Image(voxels.astype(">i2"), affine, nibabel.Nifti1Header(endianness=">"))
    nibabel.save(big, tmp_path / "images" / "big.nii")
    cli.call("predict", trained, tmp_path / "images", "--out", tmp_path / "masks").ok()
    expected = None
    for path in sorted((tmp_path / "images").iterdir()):
        given, mask = nibabel.load(path), nibabel.load(tmp_path / "masks" / path.name)
        np.testing.assert_allclose(mask.affine, given.affine, rtol=0, atol=1e-6)
        for code in ("qform_code", "sform_code"):
            assert mask.header[code] == given.header[code], path.name
        a, b = sitk.ReadImage(str(path)), sitk.ReadImage(str(tmp_path / "masks" / path.name))
        for read in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(b, read)(), getattr(a, read)(), rtol=0, atol=1e-6)
        label = np.asarray(mask.dataobj)
        expected = label if expected is None else expected
        assert np.array_equal(label, expected)
