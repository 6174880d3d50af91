"""Damaged, truncated and hostile files: one short error each, within seconds and bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest
import SimpleITK
import tifffile

from autoseg.errors import AutosegError, DatasetError, GeometryError
from autoseg.files import sizes
from autoseg.files.images import read_case, read_header, read_image, read_label, write_label
from autoseg.types.geometry import NO_DEPTH_MM, Grid

SHAPE = (5, 6, 7)
META = ("ObjectType = Image\nNDims = {dims}\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = {packed}\n"
        "TransformMatrix = {matrix}\nOffset = 0 0 0\nElementSpacing = {spacing}\nDimSize = {size}\n"
        "ElementType = MET_SHORT\nElementDataFile = {data}\n")
META_VALUES = {"dims": "3", "packed": "False", "matrix": "1 0 0 0 1 0 0 0 1", "spacing": "1 1 1", "size": "7 6 5",
               "data": "LOCAL"}
NRRD = ("NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: {size}\n"
        "space directions: {directions}\nkinds: domain domain domain\nendian: little\nencoding: {encoding}\n"
        "space origin: (0,0,0)\n{more}\n")
NRRD_VALUES = {"size": "7 6 5", "directions": "(1,0,0) (0,1,0) (0,0,1)", "encoding": "raw", "more": ""}


def scene():
    return np.random.default_rng(3).integers(0, 200, SHAPE).astype(np.int16)


def meta(path, **values):
    path.write_bytes(META.format(**{**META_VALUES, **values}).encode() + scene().tobytes())
    return path


def nrrd(path, **values):
    path.write_bytes(NRRD.format(**{**NRRD_VALUES, **values}).encode() + scene().tobytes())
    return path


def nifti(path, patches=(), array=None):
    """A plain NIfTI file with some header bytes overwritten: (offset, format, values)."""
    plain = path.with_suffix(".plain.nii")
    image = nibabel.Nifti1Image((scene() if array is None else array).T, np.eye(4))
    nibabel.save(image, plain)
    raw = bytearray(plain.read_bytes())
    plain.unlink()
    for offset, form, *values in patches:
        struct.pack_into(form, raw, offset, *values)
    path.write_bytes(gzip.compress(bytes(raw)) if path.name.endswith(".gz") else raw)
    return path


def good(folder, ending):
    path = folder / f"good{ending}"
    flat = ending in (".png", ".jpg", ".bmp")
    if ending == ".jpg":
        PIL.Image.fromarray(scene()[0].astype(np.uint8)).save(path)
        return path
    grid = Grid(shape=(1, 6, 7) if flat else SHAPE, spacing=(NO_DEPTH_MM if flat else 1, 1, 1), has_direction=not flat)
    write_label(path, scene()[:1] if flat else scene(), grid)
    return path


def error_of(path):
    """The message, which header, image, label and case readers must agree to refuse with."""
    messages = []
    for read in (read_image, read_label, lambda p: read_case([p])):
        with pytest.raises(AutosegError) as caught:
            read(path)
        messages.append(str(caught.value))
    for message in messages:
        assert message.startswith(str(path)) and len(message) < len(str(path)) + 250
        assert "\n" not in message and "0x" not in message and ".cxx" not in message
    return messages[0].removeprefix(str(path)).strip()


ALL = [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".png", ".jpg", ".bmp", ".tif"]


@pytest.mark.parametrize("ending", ALL)
def test_files_of_no_image_are_refused(tmp_path, ending):
    contents = {"empty": b"", "short": b"NR", "text": b"this is not an image\n" * 40,
                "random": np.random.default_rng(1).bytes(5000), "packed text": gzip.compress(b"still not an image" * 100)}
    for name, content in contents.items():
        path = tmp_path / f"{name}{ending}"
        path.write_bytes(content)
        error_of(path)
        with pytest.raises(DatasetError):
            read_header(path)
    assert "does not exist" in error_of(tmp_path / f"nowhere{ending}")
    (tmp_path / f"folder{ending}").mkdir()
    assert "is not a file" in error_of(tmp_path / f"folder{ending}")


def test_a_file_with_an_unknown_ending_is_refused_with_the_list_of_endings(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert ".nii.gz" in error_of(tmp_path / "a.txt")


@pytest.mark.parametrize("ending", ALL)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_truncated_files_are_refused(tmp_path, ending, share):
    path = good(tmp_path, ending)
    damaged = tmp_path / "good.zraw" if ending == ".mhd" else path
    content = damaged.read_bytes()
    damaged.write_bytes(content[:int(len(content) * share)])
    error_of(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".mhd", ".png", ".tif"])
def test_a_flipped_bit_in_packed_data_is_found(tmp_path, ending):
    path = good(tmp_path, ending)
    damaged = tmp_path / "good.zraw" if ending == ".mhd" else path
    content = bytearray(damaged.read_bytes())
    place = {".png": content.rfind(b"IDAT") + 30, ".tif": content.find(b"\x78") + 40}.get(ending, len(content) - 60)
    content[place] ^= 4
    damaged.write_bytes(content)
    error_of(path)


def test_nifti_headers_that_declare_too_much_are_refused(tmp_path):
    for ending in (".nii", ".nii.gz"):
        told = error_of(nifti(tmp_path / f"a{ending}", [(42, "<3h", 32000, 32000, 32000)]))
        assert "32000 x 32000 x 32000" in told and "65.5 TB" in told
        for patch in ((42, "<h", -5), (40, "<h", 99), (40, "<h", 1), (70, "<h", 32), (108, "<f", np.nan), (108, "<f", 1e30),
                      (344, "<4s", b"ni1"), (40, "<h", 25000), (40, "<8h", 6, 7, 6, 1, 1, 5, 2, 1)):
            error_of(nifti(tmp_path / f"a{ending}", [patch]))


def test_text_headers_that_declare_too_much_are_refused(tmp_path):
    for packed in ("True", "False"):
        assert "432.0 TB" in error_of(meta(tmp_path / "a.mha", size="60000 60000 60000", packed=packed))
    for encoding in ("gzip", "raw", "ascii"):
        assert "432.0 TB" in error_of(nrrd(tmp_path / "a.nrrd", size="60000 60000 60000", encoding=encoding))
    for size in ("-7 6 5", "0 6 5", "7 6", "7 6 5 4", "99999999999999999999 1 1", "a b c", ""):
        error_of(meta(tmp_path / "a.mha", size=size))
        error_of(nrrd(tmp_path / "a.nrrd", size=size))
    for dims in ("1000000", "-1", "0", "x"):
        assert "NDims" in error_of(meta(tmp_path / "a.mha", dims=dims))


def test_voxels_in_other_places_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for data in ("/dev/zero", "../secret.raw", "LIST", "a%03d.raw 1 3 1", "gone.raw", "pipe", ""):
        assert "voxel" in error_of(meta(tmp_path / "a.mhd", data=data))
    assert "another file" in error_of(nrrd(tmp_path / "a.nrrd", more="data file: /dev/zero\n"))
    os.mkfifo(tmp_path / "pipe.nii.gz")
    assert "is not a file" in error_of(tmp_path / "pipe.nii.gz")


def test_pictures_that_declare_too_much_are_refused(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    rest = chunk(b"IDAT", zlib.compress(b"x" * 99)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + start + rest)
    assert "60000 x 60000" in error_of(tmp_path / "a.png")
    jpeg = bytearray(good(tmp_path, ".jpg").read_bytes())
    frame = jpeg.find(b"\xff\xc0")
    jpeg[frame + 5:frame + 9] = struct.pack(">HH", 65500, 65500)
    (tmp_path / "a.jpg").write_bytes(jpeg)
    assert "65500 x 65500" in error_of(tmp_path / "a.jpg")
    bitmap = bytearray(good(tmp_path, ".bmp").read_bytes())
    bitmap[18:26] = struct.pack("<ii", 60000, 60000)
    (tmp_path / "a.bmp").write_bytes(bitmap)
    assert "60000 x 60000" in error_of(tmp_path / "a.bmp")


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiffs_that_declare_too_much_are_refused(tmp_path, compression):
    tifffile.imwrite(tmp_path / "a.tif", scene()[0], compression=compression, metadata=None)
    raw = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        tags = [file.pages[0].tags[name] for name in ("ImageWidth", "ImageLength")]
        places = [(tag.valueoffset, tag.dtype) for tag in tags]
    for place, kind in places:
        struct.pack_into("<H" if kind == 3 else "<I", raw, place, 60000)
    (tmp_path / "a.tif").write_bytes(raw)
    error_of(tmp_path / "a.tif")


def test_files_larger_than_the_free_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    paths = [good(tmp_path, ending) for ending in ALL]
    monkeypatch.setattr(sizes, "memory_available_bytes", lambda: 30)
    for path in paths:
        assert "of memory, but 30 bytes are free" in error_of(path)
        with pytest.raises(MemoryError):  # it may fit when other work is done
            read_image(path)


def test_a_gzip_bomb_behind_a_small_header_is_refused(tmp_path):
    path = nifti(tmp_path / "a.nii")
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes() + bytes(100_000_000), 1))
    assert "go on" in error_of(tmp_path / "a.nii.gz")


def test_a_few_bytes_behind_the_voxels_do_no_harm(tmp_path):
    raw = nifti(tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(raw + b"1234")
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(raw + b"1234"))
    for ending in (".nii", ".nii.gz"):
        np.testing.assert_array_equal(read_label(tmp_path / f"a{ending}")[0], scene())


@pytest.mark.parametrize("spacing", [0.0, -2.0, np.nan, np.inf])
def test_unusable_spacings_are_geometry_errors(tmp_path, spacing):
    paths = [nifti(tmp_path / "a.nii", [(80, "<3f", 1, spacing, 1)]), meta(tmp_path / "a.mha", spacing=f"1 {spacing} 1")]
    if not spacing < 0:
        paths.append(nrrd(tmp_path / "a.nrrd", directions=f"(1,0,0) (0,{spacing},0) (0,0,1)"))
    for path in paths:
        for read in (read_header, read_image, read_label):
            with pytest.raises(GeometryError, match="unusable"):
                read(path)


def test_sheared_directions_are_geometry_errors_that_say_what_to_do(tmp_path):
    paths = [nifti(tmp_path / "a.nii", [(252, "<2h", 0, 1), (280, "<12f", 1, 0.5, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)]),
             meta(tmp_path / "a.mha", matrix="1 0.5 0 0 1 0 0 0 1"),
             nrrd(tmp_path / "a.nrrd", directions="(1,0,0) (0.5,1,0) (0,0,1)")]
    for path in paths:
        for read in (read_header, read_image):
            with pytest.raises(GeometryError, match=r"perpendicular.*resample"):
                read(path)
    with pytest.raises(GeometryError):
        read_image(nifti(tmp_path / "b.nii", [(254, "<h", 1), (280, "<f", np.nan)]))


def test_the_other_nifti_version_and_packing_under_the_wrong_name_are_explained(tmp_path):
    nibabel.save(nibabel.Nifti2Image(scene().T, np.eye(4)), tmp_path / "a.nii")
    assert "NIfTI-2" in error_of(tmp_path / "a.nii")
    (tmp_path / "b.nii").write_bytes(nifti(tmp_path / "c.nii.gz").read_bytes())
    assert "rename" in error_of(tmp_path / "b.nii")
    (tmp_path / "d.nii.gz").write_bytes(nifti(tmp_path / "d.nii").read_bytes())
    np.testing.assert_array_equal(read_label(tmp_path / "d.nii.gz")[0], scene())


def test_plain_and_packed_big_and_little_endian_text_header_files_agree_with_simpleitk(tmp_path):
    packed = zlib.compress(scene().tobytes())
    size = f"True\nCompressedDataSize = {len(packed)}"
    (tmp_path / "a.mha").write_bytes(META.format(**{**META_VALUES, "packed": size}).encode() + packed)
    (tmp_path / "b.mha").write_bytes(META.format(**META_VALUES).replace("MSB = False", "MSB = True").encode()
                                     + scene().astype(">i2").tobytes())
    (tmp_path / "c.nrrd").write_bytes(NRRD.format(**NRRD_VALUES).replace("endian: little", "endian: big").encode()
                                      + scene().astype(">i2").tobytes())
    text = " ".join(map(str, scene().ravel()))
    (tmp_path / "d.nrrd").write_bytes(NRRD.format(**{**NRRD_VALUES, "encoding": "ascii"}).encode() + text.encode())
    (tmp_path / "e.mha").write_bytes(META.format(**META_VALUES).replace("BinaryData = True", "BinaryData = False").encode()
                                     + text.encode() + b"\n")
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(read_image(path).array_czyx[0], scene())
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))), scene())


def test_writing_to_an_impossible_place_says_so_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    for ending in (".nii.gz", ".mhd", ".tif"):
        with pytest.raises(AutosegError, match="cannot be written"):
            write_label(tmp_path / "file" / f"a{ending}", scene(), Grid(shape=SHAPE, spacing=(1, 1, 1)))
    with pytest.raises(DatasetError, match="unknown ending"):
        write_label(tmp_path / "a.xyz", scene(), Grid(shape=SHAPE, spacing=(1, 1, 1)))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_mutated_files_never_crash_the_process_nor_take_much_memory(tmp_path):
    """In a process of its own with 3 GB of address space, so that a crash or an allocation would end it."""
    for ending in ALL:
        good(tmp_path, ending)
    command = [sys.executable, str(Path(__file__).resolve()), str(tmp_path), "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "fine"


NUMBERS = [b"0", b"-1", b"nan", b"1e30", b"60000", b"4294967296", b"99999999999999999999", b"", b"abc"]


def mutated(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.2:
        return content[:chance.randrange(len(content))]
    data = bytearray(content)
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(min(len(data), 400))
        if chr(data[place]).isdigit() and chance.random() < 0.6:
            data[place:place + 1] = chance.choice(NUMBERS)
        else:
            data[place] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
    return bytes(data)


def read_mutated(folder: Path, rounds: int) -> None:
    """Read mutated copies of the images in a folder; only AutosegError may come out."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    chance = random.Random(5)
    for source in sorted(folder.glob("good.*")):
        content = source.read_bytes()
        for _ in range(rounds):
            if source.name.endswith(".gz"):
                changed = gzip.compress(mutated(gzip.decompress(content), chance))
            else:
                changed = mutated(content, chance)
            path = source.with_name("bad" + source.name.removeprefix("good"))
            path.write_bytes(changed)
            for read in (read_header, read_image, read_label):
                with contextlib.suppress(AutosegError):
                    read(path)
    print("fine")


if __name__ == "__main__":
    read_mutated(Path(sys.argv[1]), int(sys.argv[2]))
