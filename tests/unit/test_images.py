"""Reading and writing images: arrays, channels, and geometry as SimpleITK and nibabel see it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest
import SimpleITK
import tifffile

from autoseg.errors import DatasetError, GeometryError
from autoseg.files.images import (
    ENDINGS,
    ColourMaskError,
    NotWholeError,
    compare_grids,
    mask_ending,
    read_case,
    read_header,
    read_image,
    read_label,
    split_ending,
    write_label,
    write_probabilities,
)
from autoseg.types.geometry import NO_DEPTH_MM, Grid

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
SHAPE = (5, 6, 7)


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    total = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        total = total @ turn
    return total


DIRECTIONS = {
    "straight": np.eye(3),
    "flipped": np.diag([-1.0, 1.0, -1.0]),
    "mirrored": np.diag([1.0, 1.0, -1.0]),
    "permuted": np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "half turn": np.diag([-1.0, -1.0, 1.0]),
    "oblique": rotation((10, -25, 40)),
    "oblique, mirrored": rotation((170, 5, -88)) @ np.diag([1, -1, 1]),
}


def scene(shape=SHAPE, top=3, dtype=np.uint8):
    return np.random.default_rng(3).integers(0, top + 1, shape).astype(dtype)


def write_volume(path, array, direction=None, spacing=(0.7, 1.3, 2.9), origin=(-31.25, 117.1, 9.7)):
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection((np.eye(3) if direction is None else direction).ravel().tolist())
    SimpleITK.WriteImage(image, str(path))
    return path


def assert_same_geometry(found, expected):
    """As both readers see it, to 1e-6."""
    a, b = SimpleITK.ReadImage(str(found)), SimpleITK.ReadImage(str(expected))
    assert a.GetSize() == b.GetSize()
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(a, name)(), getattr(b, name)(), atol=1e-6, rtol=0)
    if ".nii" in found.name:
        first, second = nibabel.load(found), nibabel.load(expected)
        assert first.shape == second.shape
        np.testing.assert_allclose(first.affine, second.affine, atol=1e-6, rtol=0)
        np.testing.assert_allclose(first.header.get_zooms(), second.header.get_zooms(), atol=1e-6, rtol=0)


def test_endings_are_split_whatever_their_case():
    assert split_ending("case_0000.nii.gz") == ("case_0000", ".nii.gz")
    assert split_ending("Case.1.NII.GZ") == ("Case.1", ".nii.gz")
    assert split_ending("x.txt") == ("x.txt", "")
    assert split_ending("x.gz") == ("x.gz", "")
    assert split_ending(".nii.gz") == (".nii.gz", "")
    assert all(split_ending(f"a{ending}") == ("a", ending) for ending in ENDINGS)


def test_masks_of_jpeg_are_png_and_all_others_keep_their_ending():
    assert [mask_ending(e) for e in (".jpg", ".jpeg", ".JPG")] == [".png"] * 3
    assert all(mask_ending(e) == e for e in ENDINGS if e not in (".jpg", ".jpeg"))


@pytest.mark.parametrize("ending", VOLUMES)
@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_a_mask_has_the_geometry_of_its_image(tmp_path, ending, direction):
    path = write_volume(tmp_path / f"image{ending}", scene(dtype=np.int16), direction)
    image = read_image(path)
    label = scene(top=2)
    for name, like in (("mask", None), ("mask_like", path)):
        write_label(tmp_path / f"{name}{ending}", label, image.grid, like)
        assert_same_geometry(tmp_path / f"{name}{ending}", path)
        again, grid = read_label(tmp_path / f"{name}{ending}")
        np.testing.assert_array_equal(again, label)
        assert compare_grids(image.grid, grid) == []
    np.testing.assert_array_equal(image.array_czyx[0], scene())
    assert image.array_czyx.dtype == np.int16 and image.ending == ending
    assert image.array_czyx.flags.owndata or image.array_czyx.base.flags.owndata
    assert image.array_czyx.flags.c_contiguous and image.array_czyx.flags.writeable


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_world_positions_of_voxels_are_those_nibabel_computes(tmp_path, direction):
    path = write_volume(tmp_path / "image.nii.gz", scene(), direction)
    grid = read_image(path).grid
    index_zyx = np.array([3, 1, 4])
    lps_zyx = np.asarray(grid.origin) + np.asarray(grid.direction) @ (index_zyx * np.asarray(grid.spacing))
    ras_xyz = nibabel.load(path).affine @ [*index_zyx[::-1], 1]
    np.testing.assert_allclose(lps_zyx[::-1] * [-1, -1, 1], ras_xyz[:3], atol=1e-4)


@pytest.mark.parametrize("codes", [(0, 2), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (0, 0)], ids=str)
def test_nifti_forms_are_kept_when_qform_and_sform_differ(tmp_path, codes):
    q, s = np.diag([-0.7, -1.3, 2.9, 1.0]), np.eye(4)
    s[:3, :3] = rotation((3, 4, 5)) * [0.7, 1.3, 2.9]
    q[:3, 3], s[:3, 3] = (5, 6, 7), (50, 60.3, 70)
    image = nibabel.Nifti1Image(scene().T, s)
    image.set_qform(q, codes[0])
    image.set_sform(s, codes[1])
    path = tmp_path / "image.nii.gz"
    nibabel.save(image, path)
    mask = tmp_path / "mask.nii.gz"
    write_label(mask, scene(), read_image(path).grid, like=path)
    assert_same_geometry(mask, path)
    before, after = nibabel.load(path).header, nibabel.load(mask).header
    for field in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(before[field], after[field])


def test_a_header_to_copy_is_ignored_when_it_lies_on_another_grid(tmp_path):
    other = write_volume(tmp_path / "other.nii.gz", scene(), origin=(0, 0, 1))
    path = write_volume(tmp_path / "image.nii.gz", scene())
    write_label(tmp_path / "mask.nii.gz", scene(), read_image(path).grid, like=other)
    assert_same_geometry(tmp_path / "mask.nii.gz", path)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_nifti_voxels_are_those_nibabel_reads_in_either_byte_order(tmp_path, order, dtype):
    array = (np.random.default_rng(0).normal(0, 40, SHAPE)).clip(0).astype(dtype)
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(dtype)
    path = tmp_path / "image.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4), header), path)
    image = read_image(path)
    np.testing.assert_array_equal(image.array_czyx[0], array)
    assert image.array_czyx.dtype.isnative and image.array_czyx.dtype.name == read_header(path).dtype == np.dtype(dtype).name
    write_label(tmp_path / "mask.nii", scene(), image.grid, like=path)
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "mask.nii").dataobj).T, scene())


def test_nifti_slope_and_intercept_are_applied(tmp_path):
    image = nibabel.Nifti1Image(scene(dtype=np.int16).T, np.eye(4))
    image.header.set_slope_inter(2.5, -10)
    nibabel.save(image, tmp_path / "image.nii")
    raw = bytearray((tmp_path / "image.nii").read_bytes())
    raw[112:120] = np.array([2.5, -10], "<f4").tobytes()
    (tmp_path / "image.nii").write_bytes(raw)
    found = read_image(tmp_path / "image.nii")
    np.testing.assert_allclose(found.array_czyx[0], np.asarray(nibabel.load(tmp_path / "image.nii").dataobj).T)
    assert found.array_czyx.dtype == np.float32 and read_header(tmp_path / "image.nii").dtype == "float32"


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_fourth_axis_becomes_the_channels(tmp_path, ending):
    array = scene((4, *SHAPE), top=90, dtype=np.int16)
    image = SimpleITK.GetImageFromArray(array, isVector=False)
    image.SetSpacing((1, 2, 3, 1))
    SimpleITK.WriteImage(image, str(tmp_path / f"image{ending}"))
    found = read_image(tmp_path / f"image{ending}")
    np.testing.assert_array_equal(found.array_czyx, array)
    assert found.grid.spacing == (3, 2, 1) and found.grid.shape == SHAPE
    assert read_header(tmp_path / f"image{ending}").channels == 4
    write_label(tmp_path / f"mask{ending}", scene(), found.grid, like=tmp_path / f"image{ending}")
    assert read_label(tmp_path / f"mask{ending}")[1] == found.grid
    with pytest.raises(ColourMaskError, match="4 channels"):
        read_label(tmp_path / f"image{ending}")


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii.gz"])
def test_vector_voxels_become_channels(tmp_path, ending):
    array = scene((*SHAPE, 3), top=90, dtype=np.float32)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array, isVector=True), str(tmp_path / f"image{ending}"))
    found = read_image(tmp_path / f"image{ending}")
    np.testing.assert_array_equal(found.array_czyx, array.transpose(3, 0, 1, 2))
    assert read_header(tmp_path / f"image{ending}").channels == 3 and found.grid.shape == SHAPE


@pytest.mark.parametrize("ending", VOLUMES)
def test_a_flat_image_in_a_volume_format_stays_flat_with_its_origin_and_direction(tmp_path, ending):
    path = tmp_path / f"image{ending}"
    image = SimpleITK.GetImageFromArray(scene(SHAPE[1:]))
    image.SetSpacing((0.5, 2.5))
    image.SetOrigin((7.25, -3))
    image.SetDirection((0, -1, 1, 0))
    SimpleITK.WriteImage(image, str(path))
    found = read_image(path)
    assert found.array_czyx.shape == (1, 1, 6, 7) and not found.grid.has_direction
    assert found.grid.spacing == (2.5 * NO_DEPTH_MM, 2.5, 0.5)
    for like in (None, path):
        write_label(tmp_path / f"mask{ending}", scene((1, 6, 7), top=1), found.grid, like)
        assert_same_geometry(tmp_path / f"mask{ending}", path)


def test_a_flat_nifti_that_stands_upright_in_the_world_can_be_read_and_gets_its_header_back(tmp_path):
    affine = np.array([[0, 0, 1.0, 5], [2, 0, 0, 6], [0, 3, 0, 7], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(scene((7, 6)), affine), tmp_path / "image.nii")
    image = read_image(tmp_path / "image.nii")
    assert image.grid.shape == (1, 6, 7)
    write_label(tmp_path / "mask.nii", scene((1, 6, 7)), image.grid, like=tmp_path / "image.nii")
    np.testing.assert_allclose(nibabel.load(tmp_path / "mask.nii").affine, affine)


def test_a_volume_of_one_slice_stays_a_volume(tmp_path):
    path = write_volume(tmp_path / "image.nii.gz", scene((1, 6, 7)))
    grid = read_image(path).grid
    assert grid.has_direction and grid.spacing[0] == pytest.approx(2.9)
    write_label(tmp_path / "mask.nii.gz", scene((1, 6, 7)), grid)
    assert_same_geometry(tmp_path / "mask.nii.gz", path)


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_probabilities_hold_classes_in_the_last_axis_on_the_grid_of_the_image(tmp_path, direction):
    path = write_volume(tmp_path / "image.nii.gz", scene(), direction)
    probabilities = np.random.default_rng(0).random((3, *SHAPE), np.float32)
    for like in (None, path):
        write_probabilities(tmp_path / "p.nii.gz", probabilities, read_image(path).grid, like)
        found = nibabel.load(tmp_path / "p.nii.gz")
        assert found.get_data_dtype() == np.float32 and found.shape == (7, 6, 5, 3)
        np.testing.assert_array_equal(np.asarray(found.dataobj).T, probabilities)
        np.testing.assert_allclose(found.affine, nibabel.load(path).affine, atol=1e-6)
        assert SimpleITK.ReadImage(str(tmp_path / "p.nii.gz")).GetSize() == (7, 6, 5, 3)


def test_probabilities_of_a_picture_and_of_a_single_class_keep_four_axes(tmp_path):
    PIL.Image.fromarray(scene((6, 7))).save(tmp_path / "image.png")
    write_probabilities(tmp_path / "p.nii.gz", np.ones((1, 1, 6, 7), np.float32), read_image(tmp_path / "image.png").grid)
    assert nibabel.load(tmp_path / "p.nii.gz").shape == (7, 6, 1, 1)


def test_written_files_are_the_same_bytes_each_time(tmp_path):
    grid = Grid(shape=SHAPE, spacing=(1, 1, 1))
    for ending in (*VOLUMES, ".tif"):
        texts = []
        for _ in range(2):
            write_label(tmp_path / f"a{ending}", scene(), grid)
            texts.append((tmp_path / f"a{ending}").read_bytes())
        assert texts[0] == texts[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(f"a{e}" for e in (*VOLUMES, ".tif")), "a.zraw"])


@pytest.mark.parametrize(("top", "bottom", "dtype"),
                         [(255, 0, "uint8"), (300, 0, "uint16"), (5, -3, "int16"), (70000, 0, "int32")])
def test_labels_are_stored_in_the_smallest_type_that_holds_them(tmp_path, top, bottom, dtype):
    label = np.zeros(SHAPE, np.int64)
    label[0, 0, :2] = top, bottom
    for ending in (*VOLUMES, ".tif"):
        write_label(tmp_path / f"a{ending}", label, Grid(shape=SHAPE, spacing=(1, 1, 1)))
        found, _ = read_label(tmp_path / f"a{ending}")
        np.testing.assert_array_equal(found, label)
        assert found.dtype == dtype


def test_labels_that_are_whole_numbers_in_a_float_file_are_accepted_and_others_refused(tmp_path):
    values = scene(dtype=np.float32)
    write_volume(tmp_path / "a.nii.gz", values + np.float32(2e-4))
    np.testing.assert_array_equal(read_label(tmp_path / "a.nii.gz")[0], scene())
    for wrong in (0.5, np.nan, np.inf, 1e12):
        values[1, 2, 3] = wrong
        write_volume(tmp_path / "b.nii.gz", values)
        with pytest.raises(NotWholeError, match=r"b\.nii\.gz holds the value .* whole numbers"):
            read_label(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("ending", [".png", ".bmp", ".jpg", ".tif"])
def test_grey_and_colour_pictures_become_channels_of_one_slice(tmp_path, ending):
    smooth = np.tile(np.linspace(0, 200, 40, dtype=np.uint8), (30, 1))
    for name, pixels in (("grey", smooth), ("colour", np.stack([smooth, smooth[::-1] // 2, 255 - smooth], -1))):
        path = tmp_path / f"{name}{ending}"
        PIL.Image.fromarray(pixels).save(path)
        image, header = read_image(path), read_header(path)
        expected = pixels[..., None] if pixels.ndim == 2 else pixels
        found = image.array_czyx[:, 0].transpose(1, 2, 0).astype(int)
        np.testing.assert_allclose(found, expected, atol=12 if ending == ".jpg" else 0)
        assert image.grid == header.grid == Grid(shape=(1, 30, 40), spacing=(NO_DEPTH_MM, 1, 1), has_direction=False)
        assert (header.channels, header.dtype) == (len(image.array_czyx), "uint8")
        assert image.array_czyx.flags.c_contiguous
    with pytest.raises(ColourMaskError, match="RGB mask"):
        read_label(path)


def test_an_rgb_mask_of_equal_channels_is_still_refused(tmp_path):
    PIL.Image.fromarray(np.repeat(scene((6, 7))[..., None], 3, -1)).save(tmp_path / "a.png")
    with pytest.raises(ColourMaskError, match=r"RGB mask.*3 channels"):
        read_label(tmp_path / "a.png")


def test_an_alpha_channel_counts_only_where_it_varies(tmp_path):
    colours = scene((6, 7, 4), top=200)
    for ending in (".png", ".tif"):
        PIL.Image.fromarray(colours, "RGBA").save(tmp_path / f"varied{ending}")
        constant = colours.copy()
        constant[..., 3] = 255
        PIL.Image.fromarray(constant, "RGBA").save(tmp_path / f"constant{ending}")
        for name, count in (("varied", 4), ("constant", 3)):
            path = tmp_path / f"{name}{ending}"
            assert read_header(path).channels == len(read_image(path).array_czyx) == count
    PIL.Image.fromarray(constant[..., 2:], "LA").save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_label(tmp_path / "grey.png")[0][0], constant[..., 2])


def test_a_palette_gives_indices_as_label_and_colours_as_image(tmp_path):
    picture = PIL.Image.fromarray(scene((6, 7)), "P")
    picture.putpalette([10, 20, 30, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label(tmp_path / "a.png")[0][0], scene((6, 7)))
    image = read_image(tmp_path / "a.png")
    assert len(image.array_czyx) == read_header(tmp_path / "a.png").channels == 3
    assert (image.array_czyx[:, 0][:, scene((6, 7)) == 0].T == [10, 20, 30]).all()


def test_sixteen_bits_survive_in_png(tmp_path):
    deep = scene((6, 7), top=60000, dtype=np.uint16)
    PIL.Image.fromarray(deep).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png").array_czyx[0, 0], deep)
    colour = scene((6, 7, 3), top=60000, dtype=np.uint16)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(colour, isVector=True), str(tmp_path / "colour.png"))
    np.testing.assert_array_equal(read_image(tmp_path / "colour.png").array_czyx[:, 0], colour.transpose(2, 0, 1))
    header = read_header(tmp_path / "colour.png")
    assert (header.channels, header.dtype) == (3, "uint16")


def test_picture_masks_use_sixteen_bits_where_values_need_them_and_refuse_what_does_not_fit(tmp_path):
    grid = Grid(shape=(1, 6, 7), spacing=(NO_DEPTH_MM, 1, 1), has_direction=False)
    for top in (255, 1000):
        label = scene((1, 6, 7), top=top, dtype=np.int32)
        write_label(tmp_path / "a.png", label, grid)
        np.testing.assert_array_equal(read_label(tmp_path / "a.png")[0], label)
        np.testing.assert_array_equal(np.array(PIL.Image.open(tmp_path / "a.png")), label[0])
    write_label(tmp_path / "a.bmp", scene((1, 6, 7)), grid)
    np.testing.assert_array_equal(read_label(tmp_path / "a.bmp")[0], scene((1, 6, 7)))
    for ending, value in ((".png", -1), (".png", 65536), (".bmp", 256), (".jpg", 1)):
        with pytest.raises(DatasetError):
            write_label(tmp_path / f"b{ending}", np.full((1, 6, 7), value), grid)
    with pytest.raises(DatasetError, match="one slice"):
        write_label(tmp_path / "b.png", scene(), Grid(shape=SHAPE, spacing=(1, 1, 1)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bmp", "a.png"]


OME_SIZES = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2,
             "PhysicalSizeXUnit": "mm", "PhysicalSizeYUnit": "mm", "PhysicalSizeZUnit": "mm"}
STACKS = {
    "plain": ({}, None),
    "deflate": ({"compression": "zlib"}, None),
    "ImageJ in mm": ({"imagej": True, "resolution": (2, 4), "metadata": {"spacing": 1.5, "unit": "mm"}}, (1.5, 0.25, 0.5)),
    "ImageJ in um": ({"imagej": True, "resolution": (2, 4), "metadata": {"spacing": 3, "unit": "um"}}, (3e-3, 0.25e-3, 0.5e-3)),
    "OME": ({"ome": True, "metadata": {"axes": "ZYX", **OME_SIZES}}, (2, 0.25, 0.5)),
    "centimetres": ({"resolution": (20, 40), "resolutionunit": "CENTIMETER", "metadata": {"spacing": 2.5}}, (2.5, 0.25, 0.5)),
    "screen": ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
}


@pytest.mark.parametrize(("options", "spacing"), STACKS.values(), ids=STACKS)
def test_tiff_stacks_have_the_spacing_of_their_tags_and_masks_keep_it(tmp_path, options, spacing):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, scene(top=200), photometric="minisblack", **options)
    image = read_image(path)
    np.testing.assert_array_equal(image.array_czyx[0], scene(top=200))
    assert image.grid == read_header(path).grid
    assert not image.grid.has_direction and image.grid.spacing == pytest.approx(spacing or (1, 1, 1))
    for like in (None, path):
        write_label(tmp_path / "mask.tif", scene(), image.grid, like)
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "mask.tif"), scene())
        found, grid = read_label(tmp_path / "mask.tif")
        assert grid.spacing == pytest.approx(image.grid.spacing, rel=1e-6) and found.shape == SHAPE
    a, b = (SimpleITK.ReadImage(str(tmp_path / name)) for name in ("image.tif", "mask.tif"))
    assert a.GetSize() == b.GetSize()
    np.testing.assert_allclose(a.GetSpacing(), b.GetSpacing(), atol=1e-6)


def test_a_sidecar_gives_the_spacing_of_a_stack_and_the_mask_carries_it(tmp_path):
    tifffile.imwrite(tmp_path / "case_0000.tif", scene(), photometric="minisblack")
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [5, 0.5, 0.25]}))
    grid = read_image(tmp_path / "case_0000.tif").grid
    assert grid.spacing == (5, 0.5, 0.25)
    (tmp_path / "out").mkdir()
    write_label(tmp_path / "out" / "case.tif", scene(), grid, like=tmp_path / "case_0000.tif")
    assert compare_grids(grid, read_label(tmp_path / "out" / "case.tif")[1]) == []
    (tmp_path / "case.json").write_text('{"spacing": "wide"}')
    with pytest.raises(DatasetError, match=r"sidecar case\.json"):
        read_image(tmp_path / "case_0000.tif")
    (tmp_path / "case.json").write_text('{"spacing": [1, 0, 1]}')
    with pytest.raises(GeometryError, match="spacing"):
        read_header(tmp_path / "case_0000.tif")


def test_imagej_channels_with_a_distance_between_them_are_slices_and_others_are_channels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", scene(), imagej=True, metadata={"spacing": 2, "unit": "mm"})
    assert read_image(tmp_path / "a.tif").grid == Grid(shape=SHAPE, spacing=(2, 1, 1), has_direction=False)
    tifffile.imwrite(tmp_path / "b.tif", scene(), imagej=True)
    assert read_image(tmp_path / "b.tif").array_czyx.shape == (5, 1, 6, 7)
    tifffile.imwrite(tmp_path / "c.tif", scene((9, 6, 7)), imagej=True)
    assert read_header(tmp_path / "c.tif").grid.shape == (9, 6, 7)


def test_pages_written_one_by_one_are_a_stack_and_colour_pages_keep_their_channels(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in scene():
            file.write(page)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").array_czyx[0], scene())
    colours = scene((*SHAPE, 3), top=200)
    tifffile.imwrite(tmp_path / "b.tif", colours, photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif").array_czyx, colours.transpose(3, 0, 1, 2))
    tifffile.imwrite(tmp_path / "c.tif", colours[0].transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(tmp_path / "c.tif").array_czyx[:, 0], colours[0].transpose(2, 0, 1))
    tifffile.imwrite(tmp_path / "d.tif", scene((2, 3, 6, 7)), photometric="minisblack", metadata={"axes": "TZYX"})
    with pytest.raises(DatasetError, match="only one may hold slices"):
        read_image(tmp_path / "d.tif")


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "jpeg", "tiff_adobe_deflate"])
def test_tiff_compressions_are_read_with_or_without_further_libraries(tmp_path, compression):
    pages = [PIL.Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) + z, (30, 1))) for z in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression=compression)
    found = read_image(tmp_path / "a.tif").array_czyx
    expected = np.stack([np.array(p) for p in pages])
    np.testing.assert_allclose(found[0].astype(int), expected, atol=3 if compression == "jpeg" else 0)
    colour = np.stack([np.array(p) for p in pages], -1)
    PIL.Image.fromarray(colour).save(tmp_path / "b.tif", compression=compression)
    np.testing.assert_allclose(read_image(tmp_path / "b.tif").array_czyx[:, 0].astype(int), colour.transpose(2, 0, 1),
                               atol=60 if compression == "jpeg" else 0)


def test_labels_in_a_packed_tiff_with_a_palette_are_its_indices(tmp_path):
    picture = PIL.Image.fromarray(scene((6, 7)), "P")
    picture.putpalette([10, 20, 30, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    for compression in ("tiff_lzw", None):
        picture.save(tmp_path / "a.tif", compression=compression)
        np.testing.assert_array_equal(read_label(tmp_path / "a.tif")[0][0], scene((6, 7)))


def test_black_and_white_files_give_zero_and_one(tmp_path):
    mask = scene((6, 7), top=1)
    for ending in (".png", ".tif"):
        PIL.Image.fromarray(mask.astype(bool)).save(tmp_path / f"a{ending}")
        found, _ = read_label(tmp_path / f"a{ending}")
        np.testing.assert_array_equal(found[0], mask)
        assert found.dtype == np.uint8


def test_large_pictures_are_no_bombs(tmp_path):
    PIL.Image.new("1", (14000, 13500)).save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png").grid.shape == (1, 13500, 14000)


def test_the_channels_of_a_case_are_joined_as_float32(tmp_path):
    paths = [write_volume(tmp_path / f"c_000{i}.nii.gz", scene(top=50 * (i + 1), dtype=dtype))
             for i, dtype in enumerate((np.int16, np.float64))]
    four = SimpleITK.GetImageFromArray(np.stack([scene()] * 2), isVector=False)
    four.SetSpacing((0.7, 1.3, 2.9, 1))
    four.SetOrigin((-31.25, 117.1, 9.7, 0))
    SimpleITK.WriteImage(four, str(tmp_path / "more.nrrd"))
    case = read_case([*paths, tmp_path / "more.nrrd"])
    assert case.array_czyx.shape == (4, *SHAPE) and case.array_czyx.dtype == np.float32 and case.ending == ".nii.gz"
    np.testing.assert_array_equal(case.array_czyx[1], scene(top=100))
    np.testing.assert_array_equal(case.array_czyx[3], scene())


def test_channels_on_different_grids_are_refused_and_rounding_is_not(tmp_path):
    first = write_volume(tmp_path / "a.nii.gz", scene())
    near = write_volume(tmp_path / "b.nii.gz", scene(), spacing=(0.7001, 1.3, 2.9))
    far = write_volume(tmp_path / "c.nii.gz", scene(), origin=(-31.25, 119.1, 9.7))
    assert len(read_case([first, near]).array_czyx) == 2
    told = r"c\.nii\.gz lies on another grid than a\.nii\.gz: expected origin .*117\.1.*found.*119\.1"
    with pytest.raises(GeometryError, match=told):
        read_case([first, near, far])
    with pytest.raises(GeometryError, match="shape"):
        read_case([first, write_volume(tmp_path / "d.nii.gz", scene((5, 6, 8)))])


def test_grids_are_compared_field_by_field():
    grid = Grid(shape=SHAPE, spacing=(3, 1, 0.7), origin=(100, -50, 7), direction=tuple(map(tuple, rotation((5, 6, 7)).tolist())))
    assert compare_grids(grid, grid) == []
    rounded = grid.model_copy(update={
        "spacing": tuple(float(np.float32(s)) for s in grid.spacing), "origin": tuple(float(np.float32(o)) for o in grid.origin),
        "direction": tuple(tuple(float(np.float32(v)) for v in row) for row in grid.direction)})
    assert compare_grids(grid, rounded) == []

    def differences(**update):
        return [(d.field, d.noise) for d in compare_grids(grid, grid.model_copy(update=update))]

    assert differences(shape=(5, 6, 8), spacing=(1, 1, 1)) == [("shape", False)]
    assert differences(spacing=(3.0003, 1, 0.7)) == [("spacing", True)]
    assert differences(spacing=(3, 1, 0.71)) == [("spacing", False)]
    assert differences(origin=(100.01, -50, 7)) == [("origin", True)]
    assert differences(origin=(100, -50, 8)) == [("origin", False)]
    assert differences(direction=tuple(map(tuple, rotation((5, 6, 7.01)).tolist()))) == [("direction", True)]
    both = differences(direction=tuple(map(tuple, rotation((5, 6, 9)).tolist())), origin=(0, 0, 0))
    assert both == [("origin", False), ("direction", False)]


def test_grids_without_direction_compare_shape_and_the_spacing_that_both_carry():
    volume = Grid(shape=SHAPE, spacing=(3, 1, 0.7), origin=(1, 2, 3))
    untold = Grid(shape=SHAPE, spacing=(1, 1, 1), has_direction=False)
    told = Grid(shape=SHAPE, spacing=(3, 1, 0.8), has_direction=False)
    assert compare_grids(volume, untold) == compare_grids(untold, told) == []
    assert [d.field for d in compare_grids(volume, told)] == ["spacing"]
    assert [d.field for d in compare_grids(untold, untold.model_copy(update={"shape": (1, 6, 7)}))] == ["shape"]
    flat = Grid(shape=(1, 6, 7), spacing=(NO_DEPTH_MM, 0.5, 0.5), has_direction=False)
    upright = Grid(shape=(1, 6, 7), spacing=(2, 0.5, 0.5))
    assert compare_grids(flat, upright) == []


def test_shape_and_grid_must_agree_when_writing(tmp_path):
    with pytest.raises(ValueError, match="shape"):
        write_label(tmp_path / "a.nii.gz", scene((5, 6, 8)), Grid(shape=SHAPE, spacing=(1, 1, 1)))
    with pytest.raises(ValueError, match="shape"):
        write_probabilities(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.float32), Grid(shape=SHAPE, spacing=(1, 1, 1)))


def test_reading_and_writing_from_many_threads_gives_the_same(tmp_path):
    def work(i):
        ending = (*VOLUMES, ".png", ".tif")[i % 7]
        shape = (1, 6, 7) if ending == ".png" else SHAPE
        label = np.full(shape, i)
        depth = NO_DEPTH_MM if ending == ".png" else 1
        grid = Grid(shape=shape, spacing=(depth, 1, 1), has_direction=ending not in (".png", ".tif"))
        write_label(tmp_path / f"{i}{ending}", label, grid)
        return np.array_equal(read_label(tmp_path / f"{i}{ending}")[0], label)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(70)))


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="real data are not here")
def test_real_images_and_labels_share_their_grid_and_masks_go_back_into_it(tmp_path):
    pairs = {"hippocampus": "hippocampus_243", "em_vnc": "vnc_00", "acdc30": "patient001_frame01", "oasis_malf_2mm": "oasis_1003",
             "lungct_gtv": "lung_1", "totalseg_ct": "tsct", "ms3_2mm": "ms_07"}
    for folder, case in pairs.items():
        images = sorted((DATA / folder / "images").glob(f"{case}[._]*"))
        label_path = next((DATA / folder / "labels").glob(f"{case}.*"))
        image, (label, grid) = read_case(images), read_label(label_path)
        assert image.array_czyx.shape == (len(images), *label.shape)
        assert [d for d in compare_grids(image.grid, grid) if not d.noise] == []
        mask = tmp_path / f"{case}{mask_ending(image.ending)}"
        write_label(mask, label, image.grid, like=images[0])
        np.testing.assert_array_equal(read_label(mask)[0], label)
        assert_same_geometry(mask, images[0])


def test_short_integers_of_a_case_stay_where_asked_for_and_all_files_hold_the_same(tmp_path):
    short = [write_volume(tmp_path / f"c_000{i}.nii.gz", scene(top=50 * (i + 1), dtype=np.int16)) for i in range(2)]
    other = write_volume(tmp_path / "c_0002.nii.gz", scene(top=200, dtype=np.uint8))
    wide = write_volume(tmp_path / "wide.nii.gz", scene(dtype=np.int32))
    for paths, kind in (([short[0]], np.int16), (short, np.int16), ([*short, other], np.float32), ([wide], np.float32)):
        assert read_case(paths, as_stored=True).array_czyx.dtype == kind
        np.testing.assert_array_equal(read_case(paths, as_stored=True).array_czyx, read_case(paths).array_czyx)
        assert read_case(paths).array_czyx.dtype == np.float32
