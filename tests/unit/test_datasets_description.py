from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoseg.datasets.description import channel_names, describe, labels_from_values, parse_labels
from autoseg.datasets.nnunet import read_fingerprint
from autoseg.errors import DatasetError


def test_plain_labels_in_any_order_are_sorted_by_value() -> None:
    labels = parse_labels({"liver": 7, "background": 0, "spleen": 3})
    assert labels.values == (0, 3, 7)
    assert [label.name for label in labels.foreground] == ["spleen", "liver"]


def test_the_value_zero_is_the_background_whatever_it_is_called() -> None:
    assert parse_labels({"background(intracellular)": 0, "membrane": 1}).background.name == "background(intracellular)"
    assert parse_labels({"a": 1}).values == (0, 1)


def test_decathlon_labels_map_value_to_name() -> None:
    labels = parse_labels({"0": "background", "1": "Anterior", "2": "Posterior"})
    assert [(label.name, label.value) for label in labels.foreground] == [("Anterior", 1), ("Posterior", 2)]


def test_regions_become_labels_of_their_union() -> None:
    labels = parse_labels({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}, [1, 2, 3])
    assert labels.values == (0, 1, 2, 3, 4)
    assert labels.ignore is not None and labels.ignore.value == 4
    assert [(r.name, r.values) for r in labels.regions] == [("whole", (1, 2, 3)), ("core", (2, 3)), ("enhancing", (3,))]
    assert labels.region_order == (1, 2, 3)
    assert [label.name for label in labels.foreground] == ["label_1", "label_2", "enhancing"]
    assert labels.declared_count == 5


def test_a_list_of_one_value_is_a_plain_label() -> None:
    labels = parse_labels({"background": 0, "a": [1], "b": [2]})
    assert labels.regions == () and labels.values == (0, 1, 2)


@pytest.mark.parametrize(("labels", "order", "message"), [
    ([1, 2], None, "labels: expected an object"),
    ({"background": 0, "a": "x"}, None, "labels.a: expected an integer"),
    ({"background": 0, "a": 1.5}, None, "labels.a: expected an integer"),
    ({"background": 0, "a": []}, None, "labels.a: expected an integer"),
    ({"background": 0, "a": 1, "b": 1}, None, "two labels share a value"),
    ({"background": 0}, None, "at least one foreground label"),
    ({"background": 0, "a": [1, 2], "b": 2}, None, "regions_class_order: expected one label value for each of 2 regions"),
    ({"background": 0, "a": [1, 2], "b": 2}, [1, 9], "region_order must hold declared"),
    ({"background": 0, "a": 1, "ignore": [2, 3]}, None, "labels.ignore: expected one integer"),
    ({"background": 0, "a": 1, "ignore": 1}, None, "must differ"),
    ({"0": "background", "1": "cyst", "2": "cyst"}, None, "'cyst' is used for several values"),
])
def test_wrong_labels_are_refused_with_their_path(labels: object, order: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        parse_labels(labels, order)


def test_channel_names_come_in_the_order_of_their_numbers() -> None:
    assert channel_names({str(i): f"c{i}" for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}) == tuple(f"c{i}" for i in range(11))
    for wrong in ({"0": "a", "2": "b"}, {"a": "b"}, {"0": 3}, 7):
        with pytest.raises(DatasetError, match="channel_names: expected"):
            channel_names(wrong)


def test_a_description_keeps_what_is_right_beside_what_is_wrong() -> None:
    found = describe({"name": "x", "channel_names": {"0": "CT"}, "labels": {"a": "?"}, "whatever": [1]})
    assert found.channels == ("CT",) and found.labels is None
    assert len(found.problems) == 1 and "labels.a" in found.problems[0]


def test_names_are_proposed_for_values_with_gaps() -> None:
    labels = labels_from_values({0, 255, 3, -1})
    assert labels.values == (0, -1, 3, 255)
    assert [label.name for label in labels.foreground] == ["label_-1", "label_3", "label_255"]
    assert labels_from_values({255}).values == (0, 255)


STATISTICS = {"mean": 1.0, "median": 1.0, "std": 2.0, "min": -3.0, "max": 9.0, "percentile_99_5": 8.0, "percentile_00_5": -2.0}


def write_fingerprint(folder: Path, dataset: dict | None = None, measured: dict | None = None) -> tuple[Path, Path]:
    described = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "a": 1, "b": 2}, "numTraining": 2,
                 "file_ending": ".nii.gz", **(dataset or {})}
    values = {"spacings": [[3, 1.0, 1], [2.5, 0.5, 0.7]], "shapes_after_crop": [[20, 100, 90], [30, 120, 110]],
              "foreground_intensity_properties_per_channel": {"0": STATISTICS, "1": STATISTICS},
              "median_relative_size_after_cropping": 0.8, **(measured or {})}
    first, second = folder / "dataset.json", folder / "dataset_fingerprint.json"
    first.write_text(json.dumps({k: v for k, v in described.items() if v is not None}))
    second.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return first, second


def test_the_files_of_nnunet_are_read_in_their_axis_order(tmp_path: Path) -> None:
    dataset, fingerprint = read_fingerprint(*write_fingerprint(tmp_path))
    assert dataset.source == "fingerprint" and dataset.channels == ("CT", "PET")
    assert [c.case for c in dataset.cases] == ["case_0000", "case_0001"] == [c.case for c in fingerprint.cases]
    assert fingerprint.cases[1].spacing == (2.5, 0.5, 0.7)
    assert fingerprint.cases[0].shape_after_crop == (20, 100, 90)
    assert len(fingerprint.intensities) == 2 and fingerprint.intensities[0].percentile_00_5 == -2.0
    assert fingerprint.median_relative_size_after_cropping == 0.8


def test_the_declared_number_of_cases_counts_whatever_was_measured(tmp_path: Path) -> None:
    dataset, fingerprint = read_fingerprint(*write_fingerprint(tmp_path, {"numTraining": 3}))
    assert len(dataset.cases) == 3 and len(fingerprint.cases) == 2


def test_old_names_and_listed_cases_are_accepted(tmp_path: Path) -> None:
    listed = {"zeta": {"images": ["a"], "label": "b"}, "alpha": {"images": ["a"], "label": "b"}}
    dataset, _ = read_fingerprint(*write_fingerprint(tmp_path, {"channel_names": None, "modality": {"0": "CT", "1": "PET"},
                                                                "dataset": listed, "numTraining": None}))
    assert [c.case for c in dataset.cases] == ["zeta", "alpha"]


@pytest.mark.parametrize(("dataset", "measured", "message"), [
    ({"channel_names": None}, {}, r"dataset\.json: channel_names is missing"),
    ({"labels": {"background": 0, "a": "x"}}, {}, r"dataset\.json: labels\.a"),
    ({}, {"spacings": None}, r"dataset_fingerprint\.json: spacings is missing"),
    ({}, {"spacings": [[1, 1, 1]]}, "shapes_after_crop: expected 1 entries"),
    ({}, {"spacings": [[1, 1], [1, 1, 1]]}, r"spacings\[0\]: expected three numbers"),
    ({}, {"spacings": [[1, 1, 1], [1, -1, 1]]}, r"spacings\[1\]: expected positive"),
    ({}, {"spacings": [[1, 1, 1], [1, "x", 1]]}, r"spacings\[1\]: expected a finite number, found x"),
    ({}, {"shapes_after_crop": [[1, 1, 1], [1, 1.5, 1]]}, r"shapes_after_crop\[1\]: expected whole numbers"),
    ({}, {"foreground_intensity_properties_per_channel": {"0": STATISTICS}}, "expected the keys 0, 1"),
    ({}, {"foreground_intensity_properties_per_channel": {"0": STATISTICS, "1": {**STATISTICS, "std": None}}}, r"\.1\.std"),
])
def test_a_wrong_fingerprint_is_refused_with_file_and_path(tmp_path: Path, dataset: dict, measured: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_fingerprint(*write_fingerprint(tmp_path, dataset, measured))


@pytest.mark.parametrize("content", [b"", b"[1]", b"\x00\xff\x00", b"{" * 50000, b"[" * 50000])
def test_a_damaged_fingerprint_file_is_refused(tmp_path: Path, content: bytes) -> None:
    first, second = write_fingerprint(tmp_path)
    second.write_bytes(content)
    with pytest.raises(DatasetError, match=r"dataset_fingerprint\.json"):
        read_fingerprint(first, second)
    first.unlink()
    with pytest.raises(DatasetError, match=r"dataset\.json cannot be read: No such file"):
        read_fingerprint(first, second)
