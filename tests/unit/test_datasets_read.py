from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.datasets.folder import read_inputs
from autoseg.datasets.read import distinct_values, read_dataset
from autoseg.errors import DatasetError
from autoseg.types.dataset import Dataset, Fault

RANDOM = np.random.default_rng(0)


def image(path: Path, shape: Sequence[int] = (4, 6, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = len(shape) == 3 and shape[-1] == 3
    dtype = np.uint8 if path.suffix in (".png", ".jpg", ".bmp") else np.int16
    sitk.WriteImage(sitk.GetImageFromArray(RANDOM.integers(0, 200, shape).astype(dtype), isVector=colour), str(path))
    return path


def label(path: Path, shape: Sequence[int] = (4, 6, 5), values: Sequence[int] = (0, 1, 2)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.resize(np.asarray(values), tuple(shape)).astype(np.int16 if min(values) < 0 or max(values) > 255 else np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    return path


def read(path: Path, **options: object) -> tuple[Dataset, list[Fault]]:
    dataset, faults = read_dataset(path, **options)  # type: ignore[arg-type]
    assert dataset is not None
    return dataset, faults


def codes(faults: Sequence[Fault]) -> list[str]:
    return [f.code for f in faults]


def test_a_plain_folder_needs_nothing_but_images_and_labels(tmp_path: Path) -> None:
    for name in ("b", "a", "scan_0001", "hippocampus_001"):
        image(tmp_path / "images" / f"{name}.nii.gz")
        label(tmp_path / "labels" / f"{name}.nrrd", values=(0, 255))
    (tmp_path / "images" / "._a.nii.gz").write_bytes(b"mac")
    (tmp_path / "images" / "notes.txt").write_text("hello")
    dataset, faults = read(tmp_path)
    assert faults == []
    assert [c.case for c in dataset.cases] == ["a", "b", "hippocampus_001", "scan_0001"]
    assert dataset.source == "folder" and dataset.name == tmp_path.name
    assert dataset.channels == ("channel_0",) and not dataset.channels_named
    assert dataset.labels.values == (0, 255) and dataset.labels.foreground[0].name == "label_255"
    assert all(Path(c.images[0]).is_absolute() and c.label and c.label.endswith(".nrrd") for c in dataset.cases)


def test_four_digits_are_a_channel_only_when_the_label_says_so(tmp_path: Path) -> None:
    for i in range(3):
        image(tmp_path / "images" / f"slice_{i:04d}.png", (6, 5))
        label(tmp_path / "labels" / f"slice_{i:04d}.png", (6, 5))
    dataset, faults = read(tmp_path)
    assert faults == [] and len(dataset.cases) == 3 and len(dataset.channels) == 1


def test_channels_are_found_by_suffix_and_named_by_the_description(tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        for c in range(3):
            image(tmp_path / "images" / f"{name}_{c:04d}.mha")
        label(tmp_path / "labels" / f"{name}.nii.gz", values=(0, 4, 9))
    dataset, faults = read(tmp_path)
    assert dataset.channels == ("channel_0", "channel_1", "channel_2") and faults == []
    (tmp_path / "dataset.json").write_text(json.dumps(
        {"name": "Heads", "channel_names": {"0": "T1", "1": "T2", "2": "FLAIR"},
         "labels": {"background": 0, "x": 4, "y": 9, "z": 11}, "anything": {"else": 1}}))
    dataset, faults = read(tmp_path)
    assert dataset.name == "Heads" and dataset.channels == ("T1", "T2", "FLAIR") and dataset.channels_named
    assert dataset.labels.values == (0, 4, 9, 11)
    assert [Path(p).name for p in dataset.cases[0].images] == ["p1_0000.mha", "p1_0001.mha", "p1_0002.mha"]


def test_colour_pictures_have_the_channels_red_green_blue(tmp_path: Path) -> None:
    for name in ("a", "b"):
        image(tmp_path / "images" / f"{name}.jpg", (8, 9, 3))
        label(tmp_path / "labels" / f"{name}.png", (8, 9))
    dataset, faults = read(tmp_path)
    assert dataset.channels == ("red", "green", "blue") and faults == []


def test_faults_of_structure_are_listed_together_and_what_is_usable_is_kept(tmp_path: Path) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    for name in ("ok1", "ok2", "ok3"):
        image(images / f"{name}_0000.nii.gz")
        label(labels / f"{name}.nii.gz")
    image(images / "twice_0000.nii.gz")
    image(images / "twice_0000.nrrd")
    label(labels / "twice.nii.gz")
    image(images / "lonely_0000.nii.gz")
    label(labels / "orphan.nii.gz")
    image(images / "plain.nii.gz")
    label(labels / "plain.nii.gz")
    image(images / "gap_0000.nii.gz")
    image(images / "gap_0002.nii.gz")
    label(labels / "gap.nii.gz")
    dataset, faults = read(tmp_path)
    assert {(f.code, f.case) for f in faults} == {
        ("colliding-case-names", "twice"), ("missing-partner", "lonely"), ("missing-partner", "orphan"),
        ("mixed-naming", "plain"), ("wrong-channel-count", "gap"),
    }
    assert all(f.severity == "error" and f.file and f.expected and f.found and f.fix for f in faults)
    assert len(dataset.cases) == 8


def test_colliding_labels_are_found(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.nii.gz")
    label(tmp_path / "labels" / "a.nii.gz")
    label(tmp_path / "labels" / "a.mha")
    assert codes(read(tmp_path)[1]) == ["colliding-case-names"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"labels": {"background": 0, "a": "?"}}', '{"channel_names": {"1": "CT"}}'])
def test_a_wrong_description_is_a_fault_and_the_rest_is_read(tmp_path: Path, text: str) -> None:
    image(tmp_path / "images" / "a.nii.gz")
    label(tmp_path / "labels" / "a.nii.gz")
    (tmp_path / "dataset.json").write_text(text)
    dataset, faults = read(tmp_path)
    assert codes(faults) == ["invalid-description"]
    assert dataset.labels.values == (0, 1, 2)


def test_unreadable_labels_do_not_stop_the_reading(tmp_path: Path) -> None:
    for name in "ab":
        image(tmp_path / "images" / f"{name}.nii.gz")
    label(tmp_path / "labels" / "a.nii.gz", values=(0, 3))
    (tmp_path / "labels" / "b.nii.gz").write_bytes(b"nothing of the kind")
    dataset, _ = read(tmp_path)
    assert dataset.labels.values == (0, 3)


def nnunet_folder(root: Path, **more: object) -> None:
    for name in ("x_1", "x_2"):
        for c in range(2):
            image(root / "imagesTr" / f"{name}_{c:04d}.nii.gz")
        label(root / "labelsTr" / f"{name}.nii.gz", values=(0, 1, 2, 3))
    (root / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "regions_class_order": [1, 2], "numTraining": 2, "file_ending": ".nii.gz", **more}))


def test_a_raw_folder_of_nnunet_with_regions_and_an_ignore_label(tmp_path: Path) -> None:
    nnunet_folder(tmp_path)
    (tmp_path / "splits_final.json").write_text("[]")
    dataset, faults = read(tmp_path)
    assert faults == [] and dataset.source == "nnunet" and dataset.channels == ("CT", "PET")
    assert [c.case for c in dataset.cases] == ["x_1", "x_2"]
    assert dataset.labels.regions[0].values == (1, 2) and dataset.labels.ignore is not None
    assert dataset.splits_file == str(tmp_path / "splits_final.json")
    (tmp_path / "splits.json").write_text("[]")
    assert read(tmp_path)[0].splits_file == str(tmp_path / "splits.json")
    assert read(tmp_path / "dataset.json")[0] == read(tmp_path)[0]


def test_files_listed_in_the_description_replace_the_folders(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    nnunet_folder(tmp_path, dataset={
        "one": {"images": [str(image(elsewhere / "a.nrrd")), "elsewhere/b.nrrd"], "label": str(label(elsewhere / "l.nrrd"))},
        "two": {"images": ["elsewhere/b.nrrd", "elsewhere/missing.nrrd"], "label": "elsewhere/l.nrrd"},
        "three": {"images": "b.nrrd"},
    })
    image(elsewhere / "b.nrrd")
    dataset, faults = read(tmp_path)
    assert [c.case for c in dataset.cases] == ["one", "two"]
    assert dataset.cases[0].images == (str(elsewhere / "a.nrrd"), str(elsewhere / "b.nrrd"))
    assert {(f.code, f.case) for f in faults} == {("missing-partner", "two"), ("invalid-description", "three")}


def decathlon(root: Path) -> None:
    for name in ("liver_0", "liver_1", "liver_2"):
        image(root / "imagesTr" / f"{name}.nii.gz", (2, 4, 6, 5))
        label(root / "labelsTr" / f"{name}.nii.gz")
    (root / "imagesTr" / "._liver_0.nii.gz").write_bytes(b"mac")
    pairs = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
             for n in ("liver_0", "liver_1", "liver_2", "._liver_0", "liver_9")]
    (root / "dataset.json").write_text(json.dumps({
        "name": "Task", "modality": {"0": "FLAIR", "1": "T1"}, "labels": {"0": "background", "1": "edema", "2": "tumour"},
        "numTraining": 4, "training": pairs, "test": ["./imagesTs/x.nii.gz"]}))


def test_a_decathlon_folder_holds_channels_in_4d_files(tmp_path: Path) -> None:
    decathlon(tmp_path)
    dataset, faults = read(tmp_path)
    assert dataset.source == "msd" and dataset.channels == ("FLAIR", "T1")
    assert [label.name for label in dataset.labels.foreground] == ["edema", "tumour"]
    assert [c.case for c in dataset.cases] == ["liver_0", "liver_1", "liver_2", "liver_9"]
    assert {(f.code, f.case) for f in faults} == {("missing-partner", "liver_9")}
    assert len(faults) == 2


def test_a_decathlon_folder_converted_for_nnunet_is_read_as_such(tmp_path: Path) -> None:
    nnunet_folder(tmp_path, training=[{"image": "./imagesTr/x_1.nii.gz", "label": "./labelsTr/x_1.nii.gz"}])
    dataset, faults = read(tmp_path)
    assert dataset.source == "nnunet" and len(dataset.cases) == 2 and faults == []


def manifest_files(root: Path, count: int = 3) -> None:
    for i in range(count):
        image(root / "data" / f"t1-{i}.nii.gz")
        image(root / "data" / f"t2-{i}.nrrd")
        label(root / "masks" / f"m{i}.nii.gz", values=(0, 5))


def test_a_csv_manifest_names_channels_groups_and_folds(tmp_path: Path) -> None:
    manifest_files(tmp_path)
    table = tmp_path / "cases.csv"
    rows = [f"c{i},data/t2-{i}.nrrd,data/t1-{i}.nii.gz,masks/m{i}.nii.gz,p{i // 2},{i % 2},50" for i in range(3)]
    table.write_text("\n".join(["case,image_T2,image_T1,label,group,fold,age", *rows]))
    dataset, faults = read(table)
    assert faults == [] and dataset.source == "manifest" and dataset.channels == ("T2", "T1")
    assert [(c.case, c.group, c.fold) for c in dataset.cases] == [("c0", "p0", 0), ("c1", "p0", 1), ("c2", "p1", 0)]
    assert dataset.groups_from == "manifest" and dataset.name == "cases"
    assert Path(dataset.cases[1].images[1]).name == "t1-1.nii.gz"
    ungrouped = read(table, groups="none")[0]
    assert ungrouped.groups_from == "none" and {c.group for c in ungrouped.cases} == {None}


def test_a_small_csv_manifest_needs_two_columns_only(tmp_path: Path) -> None:
    manifest_files(tmp_path)
    table = tmp_path / "small.csv"
    rows = [f"data/t1-{i}.nii.gz;{tmp_path}/masks/m{i}.nii.gz" for i in range(3)]
    table.write_text("\r\n".join(["\ufeffimage;label", *rows]), "utf-8")
    dataset, faults = read(table)
    assert faults == [] and [c.case for c in dataset.cases] == ["t1-0", "t1-1", "t1-2"]
    assert dataset.labels.values == (0, 5)


def test_numbered_image_columns_are_ordered_by_number(tmp_path: Path) -> None:
    manifest_files(tmp_path, 1)
    table = tmp_path / "t.csv"
    table.write_text("image_1,label,image_0\ndata/t2-0.nrrd,masks/m0.nii.gz,data/t1-0.nii.gz\n")
    dataset, _ = read(table)
    assert [Path(p).name for p in dataset.cases[0].images] == ["t1-0.nii.gz", "t2-0.nrrd"] and not dataset.channels_named


@pytest.mark.parametrize("form", ["list", "object", "named"])
def test_json_manifests_hold_the_same_in_several_spellings(tmp_path: Path, form: str) -> None:
    manifest_files(tmp_path)
    files = [["data/t1-0.nii.gz", "data/t2-0.nrrd"], ["data/t1-1.nii.gz", "data/t2-1.nrrd"]]
    entries: list[dict[str, object]] = [
        {"case": f"c{i}", "images": f, "label": f"masks/m{i}.nii.gz", "group": i} for i, f in enumerate(files)]
    if form == "named":
        entries = [{**e, "images": {"T2": f[1], "T1": f[0]}} for e, f in zip(entries, files, strict=True)]
    data: object = entries if form == "list" else {"name": "J", "cases": entries, "channels": ["T1", "T2"], "labels": {"cyst": 5}}
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(data))
    dataset, faults = read(path)
    assert faults == []
    assert [c.images for c in dataset.cases] == [tuple(str(tmp_path / f) for f in row) for row in files]
    assert dataset.channels == (("channel_0", "channel_1") if form == "list" else ("T1", "T2"))
    assert dataset.labels.foreground[0].name == ("label_5" if form == "list" else "cyst")
    assert [c.group for c in dataset.cases] == ["0", "1"]


def test_faults_of_single_rows_are_listed(tmp_path: Path) -> None:
    manifest_files(tmp_path)
    table = tmp_path / "t.csv"
    table.write_text("case,image_0,image_1,label,fold\n"
                     "ok,data/t1-0.nii.gz,data/t2-0.nrrd,masks/m0.nii.gz,0\n"
                     "ok,data/t1-1.nii.gz,data/t2-1.nrrd,masks/m1.nii.gz,0\n"
                     "half,data/t1-1.nii.gz,,masks/m1.nii.gz,1\n"
                     "gone,data/t1-1.nii.gz,data/nowhere.nrrd,masks/m1.nii.gz,1\n"
                     "bare,data/t1-1.nii.gz,data/t2-1.nrrd,,1\n"
                     "none,,,masks/m1.nii.gz,1\n"
                     "../up,data/t1-2.nii.gz,data/t2-2.nrrd,masks/m2.nii.gz,1\n"
                     "fold,data/t1-2.nii.gz,data/t2-2.nrrd,masks/m2.nii.gz,first\n")
    _, faults = read(table)
    assert {(f.code, f.case) for f in faults} == {
        ("colliding-case-names", "ok"), ("wrong-channel-count", "half"), ("missing-partner", "gone"), ("missing-partner", "bare"),
        ("missing-partner", "none"), ("invalid-case-name", "../up"), ("invalid-description", "fold"),
    }


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.csv", "", "lists no case"),
    ("a.csv", "picture,label\na.png,b.png\n", "no image column; expected the columns image"),
    ("a.csv", "image,mask\na.png,b.png\n", "no label column"),
    ("a.csv", "image,label,label\na,b,c\n", "the column 'label' is there twice"),
    ("a.csv", "image,image_1,label\na,b,c\n", "either one column image or one"),
    ("a.json", "{}", "is not a manifest"),
    ("a.json", '{"cases": [3]}', r"cases\[0\]: expected an object"),
    ("a.json", '[{"images": 3}]', r"cases\[0\].images: expected a list"),
    ("a.json", '[{"image": true}]', r"cases\[0\].image: expected text"),
    ("a.json", "{", "not valid JSON"),
    ("a.csv", b"\xff\xfe\x00", "is not a CSV table"),
    ("a.txt", "x", "a data set is one of"),
])
def test_files_that_are_no_manifest_are_refused(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DatasetError, match=message):
        read_dataset(tmp_path / name)


def test_what_is_no_data_set_lists_the_accepted_forms_and_what_was_found(tmp_path: Path) -> None:
    image(tmp_path / "pictures" / "a.nii.gz")
    with pytest.raises(DatasetError) as info:
        read_dataset(tmp_path)
    text = str(info.value)
    for part in ("images/ and labels/", "nnU-Net raw", "Medical Segmentation Decathlon", "manifest", "pictures/ (1 images)"):
        assert part in text
    with pytest.raises(DatasetError, match="nothing at that path"):
        read_dataset(tmp_path / "nowhere")
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    with pytest.raises(DatasetError, match="holds no case"):
        read_dataset(tmp_path)


def test_patients_in_the_names_become_groups(tmp_path: Path) -> None:
    for p in range(5):
        for f in (1, 2):
            image(tmp_path / "images" / f"patient{p:03d}_frame{f}.nii.gz")
            label(tmp_path / "labels" / f"patient{p:03d}_frame{f}.nii.gz")
    dataset, _ = read(tmp_path)
    assert dataset.groups_from == "names" and len({c.group for c in dataset.cases}) == 5
    assert read(tmp_path, groups="none")[0].groups_from == "none"


def test_jpeg_labels_are_warned_about(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png", (16, 16))
    label(tmp_path / "labels" / "a.jpg", (16, 16), (0, 255))
    assert [(f.code, f.severity) for f in read(tmp_path)[1]] == [("lossy-label", "warning")]


def test_images_in_place_of_labels_are_recognised_by_their_many_values(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.nii.gz")
    label(tmp_path / "labels" / "a.nii.gz", (4, 20, 20), range(1500))
    assert codes(read(tmp_path)[1]) == ["too-many-labels"]


@pytest.mark.parametrize("values", [(0, 1), (-5, 0, 300), (0, 70000, -70000), (2**40, 7), (255,)])
def test_distinct_values_are_those_of_numpy(values: tuple[int, ...]) -> None:
    array = RANDOM.choice(np.asarray(values), (3, 7, 9))
    assert distinct_values(array) == frozenset(np.unique(array).tolist())


def names(cases: Sequence[object]) -> dict[str, list[str]]:
    return {c.case: [Path(p).name for p in c.images] for c in cases}  # type: ignore[attr-defined]


def test_inputs_are_files_folders_and_manifests(tmp_path: Path) -> None:
    first, second = image(tmp_path / "one.nii.gz"), image(tmp_path / "new" / "two_0000.nrrd")
    image(tmp_path / "new" / "scan_0007.nii.gz")
    image(tmp_path / "three.mha")
    table = tmp_path / "more.csv"
    table.write_text("case,image\nthird,three.mha\n")
    assert names(read_inputs([first, second.parent, table], 1)) == {
        "one": ["one.nii.gz"], "scan_0007": ["scan_0007.nii.gz"], "third": ["three.mha"], "two": ["two_0000.nrrd"]}


def test_channels_of_an_input_are_files_or_one_file(tmp_path: Path) -> None:
    for c in (1, 0):
        image(tmp_path / f"a_{c:04d}.nii.gz")
    whole = image(tmp_path / "b.nii.gz", (2, 4, 6, 5))
    assert names(read_inputs([tmp_path], 2)) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"], "b": ["b.nii.gz"]}
    assert names(read_inputs([whole], 2)) == {"b": ["b.nii.gz"]}
    picture = image(tmp_path / "c.png", (8, 9, 3))
    assert names(read_inputs([picture], 3)) == {"c": ["c.png"]}
    with pytest.raises(DatasetError, match=r"case c: expected 1 channel, found 3 \(c.png\)"):
        read_inputs([picture], 1)
    with pytest.raises(DatasetError) as info:
        read_inputs([tmp_path], 4)
    for part in ("case a: expected 4 channels, found 2 (a_0000.nii.gz, a_0001.nii.gz)",
                 "case b: expected 4 channels, found 2 (b.nii.gz)", "case c: expected 4 channels, found 3"):
        assert part in str(info.value)


def test_a_damaged_input_is_left_to_the_prediction(tmp_path: Path) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"junk")
    image(tmp_path / "good.nii.gz")
    assert [c.case for c in read_inputs([tmp_path], 1)] == ["bad", "good"]


def test_inputs_that_cannot_be_told_apart_or_hold_nothing_are_listed(tmp_path: Path) -> None:
    one = image(tmp_path / "x" / "same.nii.gz")
    image(tmp_path / "y" / "same.nrrd")
    image(tmp_path / "z" / "images" / "a.nii.gz")
    (tmp_path / "note.pdf").write_text("x")
    with pytest.raises(DatasetError) as info:
        read_inputs([tmp_path / "x", tmp_path / "y", tmp_path / "z", tmp_path / "note.pdf", tmp_path / "gone.nii.gz"], 1)
    text = str(info.value)
    for part in ("case same: expected one file for channel 0", "z: expected image files", "did you mean",
                 "note.pdf: expected an image", "gone.nii.gz: does not exist"):
        assert part in text
    assert len(read_inputs([one, one.parent], 1)) == 1
    with pytest.raises(DatasetError, match="no input was given"):
        read_inputs([], 1)
