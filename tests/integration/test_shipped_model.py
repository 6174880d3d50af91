"""A model that is shipped as one file: packed, predicted with, exported; a hostile one is refused with one message."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk

import autoseg
from autoseg.errors import RecordError

FAST = ("--precision", "fp32", "--device", "cpu", "--no-mirror")


@pytest.fixture(scope="module")
def shipped(cli, trained, tmp_path_factory):
    """A model file far from its work folder."""
    path = tmp_path_factory.mktemp("shipped") / "chest.autoseg"
    cli.call("pack", trained, "--out", path, "--licence", "CC-BY-4.0").ok()
    return path


def voxels(out):
    return {p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in sorted(out.glob("*.nii.gz"))}


def test_a_model_file_predicts_what_its_work_folder_does(cli, shipped, trained, chest, tmp_path):
    images = chest / "unseen" / "images"
    cli.call("predict", trained, images, "--out", tmp_path / "a", *FAST).ok()
    ran = cli.call("predict", shipped, images, "--out", tmp_path / "b", *FAST).ok()
    assert "masks of 2 case(s)" in ran.out
    a, b = voxels(tmp_path / "a"), voxels(tmp_path / "b")
    assert len(a) == 2 and a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    assert any(mask.any() for mask in b.values())
    states = cli.states(tmp_path / "b")
    cli.call("predict", shipped, images, "--out", tmp_path / "b", *FAST).ok()
    assert cli.states(tmp_path / "b") == states  # what is finished stays
    cli.call("predict", shipped, images, "--out", tmp_path / "b", *FAST, "--folds", 0).refused("another model or other options")
    cli.call("predict", shipped, images, "--out", tmp_path / "c", *FAST, "--folds", 7).refused("holds fold(s) 0, 1 of run")


def test_one_line_of_python_loads_either(shipped, trained):
    image = np.random.default_rng(0).normal(-500, 300, (1, 12, 14, 16)).astype(np.float32)
    spacing = (4.0, 4.0, 4.0)
    masks = [autoseg.load(path, "cpu", "fp32", mirror=False).predict(image, spacing) for path in (trained, shipped, str(shipped))]
    assert np.array_equal(masks[0], masks[1]) and np.array_equal(masks[1], masks[2])


def test_packing_again_changes_nothing_and_other_content_is_not_written_over(cli, shipped, trained, tmp_path):
    path = tmp_path / "m.autoseg"
    shutil.copy(shipped, path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    cli.call("pack", trained, "--out", path, "--licence", "CC-BY-4.0").ok()
    cli.call("pack", trained, "--out", path, "--folds", 0).refused("exists and is not this model", "--overwrite")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    cli.call("pack", trained, "--out", path, "--folds", 0, "--weights", "bf16", "--overwrite").ok()
    with zipfile.ZipFile(path) as file:
        data = json.loads(file.read("model.json"))
    assert data["networks"]["3d_fullres"]["folds"] == [0] and data["weights"] == "bf16" and data["metrics"]["cases"] == 2
    cli.call("pack", trained, "--out", tmp_path / "n", "--weights", "int8").refused("unknown --weights 'int8'; choose from fp32")
    cli.call("pack", trained, "--out", tmp_path / "n", "--run", "2d").refused("run '2d' has no finished training")


def test_a_case_unlike_the_training_cases_is_told(cli, shipped, chest, tmp_path):
    source = sorted((chest / "unseen" / "images").iterdir())[0]
    image = sitk.ReadImage(str(source))
    image.SetSpacing([s * 3 for s in image.GetSpacing()])
    strange = tmp_path / "strange_0000.nii.gz"
    sitk.WriteImage(image, str(strange))
    ran = cli.call("predict", shipped, strange, "--out", tmp_path / "out", *FAST, "--folds", 0).ok()
    assert "case strange is unlike the training cases: field of view z" in " ".join((ran.out + ran.err).split())
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert "field of view x" in row["unusual"] and "4 training cases" in row["unusual"]


def test_an_altered_or_hostile_file_is_refused_before_anything_is_written(cli, shipped, chest, tmp_path):
    with zipfile.ZipFile(shipped) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    data = json.loads(parts["model.json"])
    data["plan"]["configurations"]["3d_fullres"]["features_per_stage"][0] = 10**9
    weights = next(name for name in parts if name.endswith(".safetensors"))
    spoiled = parts[weights][:-1] + bytes([parts[weights][-1] ^ 1])
    for number, (change, said) in enumerate([
        ({weights: spoiled}, "SHA-256"), ({"../../escaped": b"x"}, "does not belong"),
        ({"model.json": json.dumps(data).encode()}, "features_per_stage"), ({weights: b"\x80\x04."}, weights),
    ]):
        path = tmp_path / f"{number}.autoseg"
        with zipfile.ZipFile(path, "w") as file:
            for name, content in {**parts, **change}.items():
                file.writestr(name, content)
        cli.call("predict", path, chest / "unseen" / "images", "--out", tmp_path / "out", *FAST).refused("is refused", said)
        with pytest.raises(RecordError, match="is refused as a model file"):
            autoseg.load(path)
    assert not (tmp_path / "out").exists() and not list(tmp_path.parent.glob("escaped"))
    (tmp_path / "text.autoseg").write_text("hello")
    cli.call("predict", tmp_path / "text.autoseg", chest, "--out", tmp_path / "out").refused("is not a zip file")


def test_networks_are_exported_with_what_surrounds_them(cli, shipped, tmp_path):
    pytest.importorskip("onnx")
    ran = cli.call("export-onnx", shipped, "--out", tmp_path / "onnx", "--folds", 0).ok()
    names = ["3d_fullres_fold_0.onnx", "pipeline.json", "reference.py"]
    assert sorted(p.name for p in (tmp_path / "onnx").iterdir()) == names and all(name in ran.out for name in names)
