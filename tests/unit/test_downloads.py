"""Public downloads, each as a small stand-in in its own layout: recognised, checked, turned into a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image as Pictures

from autoseg.datasets.downloads import CONVERTED, read_download
from autoseg.datasets.jsrt import STRUCTURES, merge, read_mask, read_radiograph
from autoseg.errors import DatasetError
from autoseg.files.images import read_image, read_label
from autoseg.files.workspace import Workspace
from autoseg.logs import SILENT
from autoseg.stages.catalogue import find_benchmark, load_catalogue
from autoseg.stages.plan import checked_dataset
from autoseg.stages.reproduce import prepare
from autoseg.types.benchmark import Benchmark
from autoseg.types.dataset import Dataset

SIDE = 16
RNG = np.random.default_rng(7)


def volume(path: Path, channels: int = 1) -> None:
    """A noisy image; several channels in the fourth axis."""
    shape = (SIDE, SIDE, SIDE) if channels == 1 else (SIDE, SIDE, SIDE, channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(RNG.integers(-500, 500, shape).astype(np.int16), np.diag([1.0, 1.0, 2.0, 1.0])), path)


def mask(path: Path, values: list[int]) -> None:
    """A label map in which every value has a slab."""
    label = np.zeros((SIDE, SIDE, SIDE), np.uint8)
    for place, value in enumerate(values):
        label[place % SIDE, 2:9, 3:12] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(label, np.diag([1.0, 1.0, 2.0, 1.0])), path)


def raw_values(benchmark: Benchmark) -> list[int]:
    return sorted({v for value in benchmark.labels.values() for v in ([value] if isinstance(value, int) else value)})


def decathlon(root: Path, benchmark: Benchmark) -> list[str]:
    folder = root / benchmark.reader.options["folder"]
    stem = folder.name.split("_")[1].lower()
    names = [f"{stem}_{number:03d}" for number in (1, 4, 6)]
    for name in names:
        volume(folder / "imagesTr" / f"{name}.nii.gz", len(benchmark.channels))
        mask(folder / "labelsTr" / f"{name}.nii.gz", raw_values(benchmark))
        (folder / "imagesTr" / f"._{name}.nii.gz").write_bytes(b"finder")
    volume(folder / "imagesTs" / f"{stem}_002.nii.gz", len(benchmark.channels))
    description = {
        "name": folder.name, "modality": {str(i): name for i, name in enumerate(benchmark.channels)},
        "labels": {"0": "background", **{str(value): name for name, value in benchmark.labels.items()}}, "numTraining": 3,
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names],
        "test": [f"./imagesTs/{stem}_002.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return names


def acdc(root: Path, benchmark: Benchmark) -> list[str]:
    names = []
    for part, patients in (("training", (1, 2)), ("testing", (101,))):
        for number in patients:
            for frame in (1, 12):
                name = f"patient{number:03d}_frame{frame:02d}"
                volume(root / "database" / part / name[:10] / f"{name}.nii.gz")
                mask(root / "database" / part / name[:10] / f"{name}_gt.nii.gz", raw_values(benchmark))
                names += [name] if part == "training" else []
            volume(root / "database" / part / f"patient{number:03d}" / f"patient{number:03d}_4d.nii.gz", 3)
            (root / "database" / part / f"patient{number:03d}" / "Info.cfg").write_text("ED: 1\nES: 12\n")
    return names


def amos(root: Path, benchmark: Benchmark) -> list[str]:
    for part, name in (("Tr", "amos_0001"), ("Tr", "amos_0507"), ("Va", "amos_0008"), ("Ts", "amos_0002")):
        volume(root / "amos22" / f"images{part}" / f"{name}.nii.gz")
        if part != "Ts":
            mask(root / "amos22" / f"labels{part}" / f"{name}.nii.gz", raw_values(benchmark))
    (root / "amos22" / "dataset.json").write_text(json.dumps({"name": "AMOS", "modality": {"0": "CT"}, "training": []}))
    return ["amos_0001", "amos_0008", "amos_0507"]


def btcv(root: Path, benchmark: Benchmark) -> list[str]:
    for number in (1, 2, 21):
        volume(root / "RawData" / "Training" / "img" / f"img{number:04d}.nii.gz")
        mask(root / "RawData" / "Training" / "label" / f"label{number:04d}.nii.gz", raw_values(benchmark))
    volume(root / "RawData" / "Testing" / "img" / "img0061.nii.gz")
    return ["0001", "0002", "0021"]


def kits(root: Path, benchmark: Benchmark) -> list[str]:
    for number in (0, 7, 400):
        volume(root / "dataset" / f"case_{number:05d}" / "imaging.nii.gz")
        mask(root / "dataset" / f"case_{number:05d}" / "segmentation.nii.gz", raw_values(benchmark))
        mask(root / "dataset" / f"case_{number:05d}" / "instances" / "kidney_instance-1_annotation-1.nii.gz", [1])
    return ["case_00000", "case_00007", "case_00400"]


def lits(root: Path, benchmark: Benchmark) -> list[str]:
    for batch, numbers in ((1, (0, 5)), (2, (28,))):
        for number in numbers:
            volume(root / f"Training Batch {batch}" / f"volume-{number}.nii")
            mask(root / f"Training Batch {batch}" / f"segmentation-{number}.nii", raw_values(benchmark))
    return ["0", "28", "5"]


def brats(root: Path, benchmark: Benchmark) -> list[str]:
    for folder, number in (("TrainingData", 0), ("TrainingData", 2), ("ValidationData", 1)):
        name = f"BraTS2021_{number:05d}"
        case = root / f"RSNA_ASNR_MICCAI_BraTS2021_{folder}" / name
        for channel in ("t1", "t1ce", "t2", "flair"):
            volume(case / f"{name}_{channel}.nii.gz")
        if folder == "TrainingData":
            mask(case / f"{name}_seg.nii.gz", raw_values(benchmark))
    return ["BraTS2021_00000", "BraTS2021_00002"]


def isbi(root: Path, _: Benchmark, slices: int = 10) -> list[str]:
    root.mkdir(parents=True, exist_ok=True)
    cells = np.full((slices, SIDE, SIDE), 255, np.uint8)
    cells[:, :, 5] = 0
    tifffile.imwrite(root / "train-volume.tif", RNG.integers(0, 256, cells.shape).astype(np.uint8))
    tifffile.imwrite(root / "train-labels.tif", cells)
    tifffile.imwrite(root / "test-volume.tif", cells)
    return [f"slice_{z:02d}" for z in range(slices)]


def jsrt(root: Path, benchmark: Benchmark) -> list[str]:
    size = int(benchmark.reader.options.get("size", 1024))
    names = {1: ("JPCLN001", "JPCNN002"), 2: ("JPCLN002", "JPCNN001")}
    (root / "All247images").mkdir(parents=True, exist_ok=True)
    for fold, cases in names.items():
        for name in cases:
            RNG.integers(0, 4096, (2 * size, 2 * size)).astype(">u2").tofile(root / "All247images" / f"{name}.IMG")
            for place, structure in enumerate(STRUCTURES):
                picture = np.zeros((size, size), np.uint8)
                picture[size // 8: size // 2, size * place // 6: size * (place + 2) // 6] = 255
                target = root / "scratch" / f"fold{fold}" / "masks" / structure / f"{name}.gif"
                target.parent.mkdir(parents=True, exist_ok=True)
                Pictures.fromarray(picture).save(target)
    return sorted(name for cases in names.values() for name in cases)


BUILDERS: dict[str, Callable[[Path, Benchmark], list[str]]] = {
    "acdc": acdc, "amos": amos, "btcv": btcv, "kits23": kits, "lits": lits, "brats21": brats, "isbi2012": isbi, "jsrt": jsrt,
}


def small(name: str) -> Benchmark:
    """The benchmark, with the size of its pictures reduced where that is an option."""
    benchmark = find_benchmark(name)
    if benchmark.reader.kind != "jsrt":
        return benchmark
    return benchmark.model_copy(update={"reader": benchmark.reader.model_copy(update={"options": {"size": 48}})})


def built(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Benchmark, list[str]]:
    benchmark = small(name)
    monkeypatch.setattr("autoseg.stages.reproduce.find_benchmark", lambda _: benchmark)
    return benchmark, (BUILDERS.get(name) or decathlon)(root, benchmark)


def checked(manifest: Path) -> Dataset:
    dataset, faults = checked_dataset(manifest, "none", 0, SILENT)
    assert dataset is not None and not [f for f in faults if f.severity == "error"], faults
    return dataset


@pytest.mark.parametrize("name", [benchmark.name for benchmark in load_catalogue()])
def test_each_layout_is_recognised_and_passes_the_full_check(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, names = built(tmp_path / "down", name, monkeypatch)
    prepared = prepare(name, tmp_path / "down", Workspace(tmp_path / "work"), partial=True)
    assert prepared.read_as == benchmark.layout and prepared.cases == len(names)
    assert f"cases: expected {benchmark.cases}, found {len(names)}" in prepared.lacks
    dataset = checked(prepared.manifest)
    assert [case.case for case in dataset.cases] == sorted(names)
    assert dataset.channels == benchmark.channels and [t for t, _ in dataset.labels.targets] == list(benchmark.labels)
    converted = benchmark.reader.kind in ("isbi2012", "jsrt")
    home = tmp_path / ("work/data" if converted else "down")
    files = [file for case in dataset.cases for file in (*case.images, case.label)]
    assert all(file is not None and Path(file).is_relative_to(home) for file in files)
    if not converted:
        assert [p.name for p in (tmp_path / "work" / "data").iterdir()] == ["manifest.json"], "nothing is copied"


def test_an_incomplete_download_is_refused_with_a_list_of_what_is_missing(tmp_path: Path) -> None:
    btcv(tmp_path, find_benchmark("btcv"))
    with pytest.raises(DatasetError) as error:
        prepare("btcv", tmp_path, Workspace(tmp_path / "work"))
    for part in ("cases: expected 30, found 3", "missing: 0003, 0004", "and 7 more", "--partial", "RawData.zip", "synapse.org"):
        assert part in str(error.value)
    assert not (tmp_path / "work").exists()
    assert prepare("btcv", tmp_path, Workspace(tmp_path / "work"), partial=True).notes == (
        "1 images without a label are left out: 0061",)


def test_another_number_of_cases_is_refused_both_ways(tmp_path: Path) -> None:
    lits(tmp_path, find_benchmark("lits"))
    mask(tmp_path / "x" / "segmentation-500.nii", [1, 2])
    volume(tmp_path / "x" / "volume-500.nii")
    with pytest.raises(DatasetError, match="not part of it: 500"):
        prepare("lits", tmp_path, Workspace(tmp_path / "work"))


def test_frames_of_a_patient_are_grouped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tmp_path / "down", "acdc", monkeypatch)
    prepared = prepare("acdc", tmp_path / "down", Workspace(tmp_path / "work"), partial=True)
    dataset, _ = checked_dataset(prepared.manifest, "auto", 0, SILENT)
    assert dataset is not None and prepared.grouped
    assert {case.case: case.group for case in dataset.cases}["patient002_frame12"] == "patient002"


def test_regions_keep_the_original_label_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tmp_path / "down", "brats21", monkeypatch)
    dataset = checked(prepare("brats21", tmp_path / "down", Workspace(tmp_path / "work"), partial=True).manifest)
    assert {r.name: r.values for r in dataset.labels.regions} == {
        "whole tumour": (1, 2, 4), "tumour core": (1, 4), "enhancing tumour": (4,)}
    assert dataset.labels.region_order == (2, 1, 4)
    channels = [Path(file).name.split("_")[2].split(".")[0] for file in dataset.cases[0].images]
    assert channels == ["t1", "t1ce", "t2", "flair"]


def test_a_missing_channel_and_a_second_copy_are_faults(tmp_path: Path) -> None:
    brats(tmp_path / "a", find_benchmark("brats21"))
    next(tmp_path.rglob("BraTS2021_00002_t2.nii.gz")).unlink()
    with pytest.raises(DatasetError, match=r"(?s)missing-partner.*BraTS2021_00002.*channel 2"):
        prepare("brats21", tmp_path, Workspace(tmp_path / "work"), partial=True)
    brats(tmp_path / "b", find_benchmark("brats21"))
    with pytest.raises(DatasetError, match="colliding-case-names"):
        prepare("brats21", tmp_path, Workspace(tmp_path / "work"), partial=True)


def test_converted_folders_are_accepted_and_said_to_be(tmp_path: Path) -> None:
    for number in range(3):
        volume(tmp_path / "d" / "images" / f"hippocampus_{number:03d}.nii.gz")
        mask(tmp_path / "d" / "labels" / f"hippocampus_{number:03d}.nii.gz", [1, 2])
    prepared = prepare("hippocampus", tmp_path / "d", Workspace(tmp_path / "work"), partial=True)
    assert prepared.read_as == CONVERTED and "cannot be told" in prepared.notes[0]
    assert checked(prepared.manifest).channels == ("MRI",)
    with pytest.raises(DatasetError, match=r"(?s)label values \[1\].*\[1, 2\]"):
        prepare("msd-spleen", tmp_path / "d", Workspace(tmp_path / "other"), partial=True)
    with pytest.raises(DatasetError, match=r"(?s)2 channels \(T2, ADC\).*1 \("):
        prepare("msd-prostate", tmp_path / "d", Workspace(tmp_path / "other"), partial=True)


def test_another_data_set_with_the_same_label_values_is_told_by_its_names(tmp_path: Path) -> None:
    for number in range(2):
        volume(tmp_path / "d" / "images" / f"patient{number:03d}.nii.gz")
        mask(tmp_path / "d" / "labels" / f"patient{number:03d}.nii.gz", [1, 2, 3])
    with pytest.raises(DatasetError, match="none of the cases is named like case_00000"):
        prepare("kits23", tmp_path / "d", Workspace(tmp_path / "work"), partial=True)


def test_what_is_not_the_benchmark_is_told_with_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    for name in ("kits23", "isbi2012", "jsrt", "msd-colon"):
        with pytest.raises(DatasetError, match=r"(?s)is not recognised as .*: expected .*; found holiday.jpg"):
            prepare(name, tmp_path, Workspace(tmp_path / "work"))
    with pytest.raises(DatasetError, match="is not a folder"):
        prepare("lits", tmp_path / "nowhere", Workspace(tmp_path / "work"))


def test_a_description_cannot_lead_out_of_the_download(tmp_path: Path) -> None:
    benchmark = find_benchmark("msd-heart")
    decathlon(tmp_path / "down", benchmark)
    volume(tmp_path / "private.nii.gz")
    path = tmp_path / "down" / "Task02_Heart" / "dataset.json"
    data = json.loads(path.read_text())
    data["training"][0]["image"] = "../../private.nii.gz"
    path.write_text(json.dumps(data))
    with pytest.raises(DatasetError, match=r"(?s)private.*a path that leads out of it"):
        prepare("msd-heart", tmp_path / "down", Workspace(tmp_path / "work"), partial=True)


def test_stacks_become_slices_with_blocks_as_folds(tmp_path: Path) -> None:
    benchmark = find_benchmark("isbi2012")
    isbi(tmp_path / "down", benchmark)
    download = read_download(benchmark, tmp_path / "down", tmp_path / "work")
    assert [case.fold for case in download.cases] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    stack = tifffile.imread(tmp_path / "down" / "train-volume.tif")
    for z, case in enumerate(download.cases):
        assert (read_image(Path(case.images[0])).array_czyx[0, 0] == stack[z]).all()
        label_zyx, _ = read_label(Path(str(case.label)))
        assert (label_zyx[0][:, 5] == 1).all() and label_zyx.sum() == SIDE
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "work").rglob("*.png"))]
    read_download(benchmark, tmp_path / "down", tmp_path / "work")
    assert before == [path.stat().st_mtime_ns for path in sorted((tmp_path / "work").rglob("*.png"))]


def test_stacks_that_do_not_belong_together_or_were_changed_are_refused(tmp_path: Path) -> None:
    benchmark = find_benchmark("isbi2012")
    isbi(tmp_path, benchmark)
    good = tifffile.imread(tmp_path / "train-labels.tif")
    for label, problem in ((good[:7], r"found \(7, 16, 16\)"), (good // 2, r"found \[0, 127\]")):
        tifffile.imwrite(tmp_path / "train-labels.tif", label)
        with pytest.raises(DatasetError, match=problem):
            read_download(benchmark, tmp_path, tmp_path / "work")
    (tmp_path / "train-labels.tif").write_bytes(b"II*\0 not a picture")
    with pytest.raises(DatasetError, match=r"train-labels\.tif"):
        read_download(benchmark, tmp_path, tmp_path / "work")


def test_radiographs_are_halved_and_masks_keep_their_overlap(tmp_path: Path) -> None:
    benchmark = small("jsrt")
    names = jsrt(tmp_path / "down", benchmark)
    download = read_download(benchmark, tmp_path / "down", tmp_path / "work")
    assert {case.case: case.fold for case in download.cases} == {"JPCLN001": 0, "JPCNN002": 0, "JPCLN002": 1, "JPCNN001": 1}
    raw = np.fromfile(tmp_path / "down" / "All247images" / f"{names[0]}.IMG", ">u2").reshape(96, 96).astype(float)
    expected = np.rint(raw.reshape(48, 2, 48, 2).mean(axis=(1, 3)))
    assert (read_image(Path(download.cases[0].images[0])).array_czyx[0, 0] == expected).all()
    label_yx = read_label(Path(str(download.cases[0].label)))[0][0]
    row = label_yx[10]  # left lung 0-16, right lung 8-24, heart 16-32, left clavicle 24-40, right clavicle 32-48
    assert row.tolist() == [1] * 16 + [2] * 8 + [3] * 24
    crossing = {name: np.array([[name in ("left lung", "left clavicle")]]) for name in STRUCTURES}
    assert merge(crossing).tolist() == [[4]]


def test_damaged_radiographs_and_masks_are_told_by_case(tmp_path: Path) -> None:
    benchmark = small("jsrt")
    jsrt(tmp_path, benchmark)
    short = tmp_path / "All247images" / "JPCLN001.IMG"
    short.write_bytes(short.read_bytes()[:-2])
    large = next(tmp_path.rglob("fold2/masks/heart/JPCLN002.gif"))
    Pictures.fromarray(np.zeros((50, 48), np.uint8)).save(large)
    next(tmp_path.rglob("fold2/masks/left lung/JPCNN001.gif")).unlink()
    (tmp_path / "scratch" / "fold1" / "masks" / "heart" / "JPCNN002.gif").write_bytes(b"GIF89a")
    download = read_download(benchmark, tmp_path, tmp_path / "work")
    found = {fault.case: fault.found for fault in download.faults}
    assert "18430 bytes, expected 18432" in found["JPCLN001"] and "48 x 50 pixels, expected 48 x 48" in found["JPCLN002"]
    assert found["JPCNN001"] == "none" and "JPCNN002.gif" in found["JPCNN002"] and not download.cases
    with pytest.raises(DatasetError, match="expected a grey picture of 24 or 48"):
        Pictures.fromarray(np.zeros((7, 7), np.uint8)).save(tmp_path / "JPCLN009.png")
        read_radiograph(tmp_path / "JPCLN009.png", 24)
    honest = (tmp_path / "scratch" / "fold2" / "masks" / "heart" / "JPCNN001.gif").read_bytes()
    (tmp_path / "bomb.gif").write_bytes(honest[:6] + (60000).to_bytes(2, "little") * 2 + honest[10:])
    with pytest.raises(DatasetError, match="60000 x 60000"):
        read_mask(tmp_path / "bomb.gif", 48)
