"""Hostile and damaged files: every command ends soon, in bounded memory, with one clear message."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest

SECONDS, MEGABYTES = 90, 1500  # generous: a file that is believed would take minutes, or many gigabytes
PEAK = """
import atexit, sys
def peak():
    with open("/proc/self/status") as file:
        sys.stderr.write(next(line for line in file if line.startswith("VmHWM")))
atexit.register(peak)
"""
META = ("ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = {packed}\nDimSize = 60000 60000 60000\n"
        "ElementType = MET_SHORT\nElementSpacing = 1 1 1\nElementDataFile = LOCAL\n")
NRRD = ("NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 60000 60000 60000\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nendian: little\nencoding: gzip\nspace origin: (0,0,0)\n\n")


def zeros(megabytes):
    """A gzip stream of that many megabytes of zeros: a thousandth of it on disk."""
    return gzip.compress(bytes(1 << 24)) * (megabytes // 16)


def nifti_header(*sizes):
    """The first 352 bytes of a NIfTI-1 file of 16-bit voxels that declares these sizes."""
    header = bytearray(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).header.binaryblock) + bytearray(4)
    struct.pack_into("<8h", header, 40, 3, *sizes, 1, 1, 1, 1)
    struct.pack_into("<f", header, 108, 352)
    return bytes(header)


def nifti2_header(side):
    """A NIfTI-2 header that declares a cube too large for NIfTI-1."""
    header = bytearray(nibabel.Nifti2Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).header.binaryblock) + bytearray(4)
    struct.pack_into("<8q", header, 16, 3, side, side, side, 1, 1, 1, 1)
    return bytes(header)


def png(side):
    """A PNG of one grey bit per pixel that declares a square of this side and holds nearly nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b""))


def hostile(whole):
    """Contents by file name; `whole` is the content of an ordinary file."""
    random = np.random.default_rng(0)
    plain = gzip.decompress(whole)
    return {
        "empty.nii.gz": b"",
        "random.nii.gz": random.bytes(20_000),
        "random_packed.nii.gz": gzip.compress(random.bytes(20_000)),
        "text.nii.gz": b"these are notes, not voxels\n" * 50,
        "zeros.nii.gz": gzip.compress(bytes(5000)),
        "truncated.nii.gz": whole[: len(whole) // 2],
        "truncated_plain.nii": plain[: len(plain) // 2],
        "headeronly.nii.gz": gzip.compress(plain[:352]),
        "huge.nii": nifti_header(32767, 32767, 32767) + bytes(1000),
        "huge_packed.nii.gz": gzip.compress(nifti_header(32767, 32767, 32767) + bytes(1000)),
        "huge_two.nii": nifti2_header(60000) + bytes(1000),
        "negative.nii": nifti_header(-5, 10, 10) + bytes(1000),
        "bomb.nii.gz": gzip.compress(nifti_header(32767, 32767, 32767)) + zeros(2048),
        "bomb_tail.nii.gz": gzip.compress(nifti_header(20, 20, 20)) + zeros(2048),
        "bomb_alone.nii.gz": zeros(2048),
        "huge.mha": META.format(packed="False").encode() + bytes(1000),
        "huge_packed.mha": META.format(packed="True").encode() + zlib.compress(bytes(1000)),
        "huge.nrrd": NRRD.encode() + gzip.compress(bytes(1000)),
        "random.nrrd": random.bytes(2000),
        "random.mha": random.bytes(2000),
        "huge.png": png(60000),
        "random.png": random.bytes(2000),
        "random.tif": b"II*\x00" + random.bytes(2000),
        "random.jpg": b"\xff\xd8\xff\xe0" + random.bytes(2000),
    }


TAILED = "bomb_tail_nii_gz"  # holds an ordinary image before its superfluous bytes: readable, but no image of contrast


@pytest.fixture(scope="module")
def attacked(chest, tmp_path_factory):
    """Three ordinary cases, and one case per hostile file with an ordinary label; returns the data set and the cases."""
    data = tmp_path_factory.mktemp("attacked") / "data"
    for side in ("images", "labels"):
        (data / side).mkdir(parents=True)
        for number in range(3):
            name = f"chest{number:03d}" + ("_0000" if side == "images" else "") + ".nii.gz"
            shutil.copy(chest / side / name, data / side / f"good{number}.nii.gz")
    whole = (chest / "images" / "chest000_0000.nii.gz").read_bytes()
    cases = {}
    for name, content in hostile(whole).items():
        case, _, ending = name.partition(".")
        case = f"{case}_{ending.replace('.', '_')}"
        (data / "images" / f"{case}.{ending}").write_bytes(content)
        shutil.copy(chest / "labels" / "chest000.nii.gz", data / "labels" / f"{case}.nii.gz")
        cases[case] = data / "images" / f"{case}.{ending}"
    shutil.copy(data / "images" / "good0.nii.gz", data / "images" / "label_random.nii.gz")
    (data / "labels" / "label_random.nii.gz").write_bytes(np.random.default_rng(1).bytes(5000))
    cases["label_random"] = data / "labels" / "label_random.nii.gz"
    return data, cases


def measured(cli, *arguments):
    """Run a command in a process of its own within the limits of time and memory."""
    ran = cli.ended(cli.start(*arguments, before=PEAK if Path("/proc/self/status").exists() else ""), seconds=SECONDS)
    peak = re.search(r"VmHWM:\s*(\d+) kB", ran.err)
    assert peak is None or int(peak[1]) / 1024 < MEGABYTES, peak[0]
    assert "Traceback" not in ran.err and "Traceback" not in ran.out
    return ran


def test_check_lists_every_hostile_file_and_goes_on(cli, attacked):
    data, cases = attacked
    ran = measured(cli, "check", data, "--json")
    assert ran.code == 2
    faults = {fault["case"]: fault for fault in json.loads(ran.out) if fault["severity"] == "error"}
    assert set(faults) == set(cases)
    for case, path in cases.items():
        fault = faults[case]
        if case != TAILED:
            assert fault["code"] == "unreadable-file", fault
        assert fault["file"] == str(path) and fault["found"] and fault["fix"] and len(fault["found"]) < 400
    assert "32767" in faults["huge_nii"]["found"] or "GB" in faults["huge_nii"]["found"]


def test_plan_refuses_and_writes_nothing(cli, attacked, tmp_path):
    data, cases = attacked
    ran = measured(cli, "plan", data, "--out", tmp_path / "work")
    ran.refused(*(str(path) for path in cases.values()), "nothing was written")
    assert not (tmp_path / "work").exists()


def test_predict_lists_every_hostile_file_and_does_the_others(cli, attacked, trained, tmp_path):
    data, cases = attacked
    images = {case: path for case, path in cases.items() if path.parent.name == "images"}
    ran = measured(cli, "predict", trained, data / "images", "--out", tmp_path / "masks")
    ran.refused("the rest is done", code=3)
    for case, path in images.items():
        if case == TAILED:
            continue
        line = re.search(rf"^  {case}: (.*)$", ran.err, re.MULTILINE)
        assert line and str(path) in line[1] and len(line[1]) < len(str(path)) + 300, ran.err
    made = {p.name.split(".")[0] for p in (tmp_path / "masks").glob("*.nii.gz")}
    assert {"good0", "good1", "good2", "label_random"} <= made <= {"good0", "good1", "good2", "label_random", TAILED}


def test_a_single_hostile_input_ends_with_one_message(cli, attacked, trained, tmp_path):
    _, cases = attacked
    for case in ("random_nii_gz", "huge_nii", "huge_png"):
        ran = cli.call("predict", trained, cases[case], "--out", tmp_path / "masks")
        assert ran.code in (2, 3) and str(cases[case]) in ran.err and "Traceback" not in ran.err
        assert not list((tmp_path / "masks").glob(f"{case}*"))


@pytest.mark.parametrize("content", [
    b"", b"[" * 100_000, b"\xff\xfe\x00garbage", b'{"format": 1}', b"null", b'{"format": ' + b"9" * 5000,
])
def test_spoiled_records_are_refused_with_their_file(cli, trained, chest, tmp_path, content):
    for name in ("plan.json", "splits.json", "dataset.json", "selection.json"):
        work = cli.copied(trained, tmp_path / name)
        (work / name).write_bytes(content)
        command = ("predict", work, chest / "unseen" / "images", "--out", tmp_path / "masks")
        if name != "selection.json":
            command = ("train", work, "--config", "3d_fullres")
        cli.call(*command).refused(name if name != "splits.json" else "splits")
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("text", [
    "", "image\n", "image,label\n", "label\nx.nii.gz\n", "image,image\na,b\n", "\0\0\0", "image,label\n../../etc,\n",
])
def test_spoiled_manifests_are_refused(cli, trained, tmp_path, text):
    path = tmp_path / "list.csv"
    path.write_text(text)
    cli.call("plan", path, "--out", tmp_path / "work").refused(str(path))
    cli.call("predict", trained, path, "--out", tmp_path / "masks").refused()
    assert not (tmp_path / "work").exists() and not (tmp_path / "masks").exists()


def test_an_output_that_cannot_be_written_is_one_message(cli, trained, chest, tmp_path):
    (tmp_path / "file").write_text("in the way")
    images = chest / "unseen" / "images"
    for command in (("plan", chest, "--out", tmp_path / "file"), ("predict", trained, images, "--out", tmp_path / "file"),
                    ("evaluate", chest / "labels", chest / "labels", "--out", tmp_path / "file" / "report.json")):
        ran = cli.call(*command)
        assert ran.code == 2 and "Traceback" not in ran.err and "file" in ran.err
    assert (tmp_path / "file").read_text() == "in the way"
