"""Folders of masks compared: matching files, faults told clearly, and means that hide nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from autoseg.errors import DatasetError, GeometryError
from autoseg.files.images import write_label
from autoseg.files.workspace import Workspace, load_record, save_record
from autoseg.stages.evaluate import (
    definition_lines,
    evaluate,
    evaluate_folder,
    find_masks,
    group_table,
    lesion_table,
    merge_reports,
    report_table,
)
from autoseg.types.dataset import CaseFiles, Dataset
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.report import CaseMetrics, Report

SHAPE = (6, 7, 8)
LABELS = Labels(foreground=(Label(name="liver", value=3), Label(name="tumour", value=7)))


def write(folder, case, array, ending=".nii.gz", spacing=(2.0, 1.0, 0.5)):
    folder.mkdir(parents=True, exist_ok=True)
    write_label(folder / f"{case}{ending}", np.asarray(array, np.uint8), Grid(shape=np.shape(array), spacing=spacing))


def scene(*boxes):
    array = np.zeros(SHAPE, np.uint8)
    for value, z, y, x in boxes:
        array[slice(*z), slice(*y), slice(*x)] = value
    return array


class Log:
    """A reporter that remembers its warnings."""

    def __init__(self):
        self.warnings = []

    def info(self, message):
        pass

    def warn(self, message):
        self.warnings.append(message)

    def task(self, name, total, unit="cases"):
        from autoseg.logs import SILENT
        return SILENT.task(name, total, unit)


@pytest.fixture
def folders(tmp_path):
    """Three cases: a perfect one, a label missed and a box shifted, and a label found where there is none."""
    truth, found = tmp_path / "truth", tmp_path / "found"
    liver, tumour = (3, (1, 5), (1, 5), (1, 5)), (7, (2, 3), (2, 4), (5, 7))
    write(truth, "a", scene(liver, tumour))
    write(found, "a", scene(liver, tumour))
    write(truth, "b", scene(liver, tumour))
    write(found, "b", scene((3, (1, 5), (1, 5), (3, 7))))
    write(truth, "c", scene(liver))
    write(found, "c", scene(liver, tumour))
    return found, truth


@pytest.mark.parametrize("threads", [0, 3])
def test_a_report_holds_each_case_and_label_worked_out_by_hand(folders, threads):
    report = evaluate(*folders, LABELS, threads=threads)
    assert [case.case for case in report.cases] == ["a", "b", "c"]
    a, b, c = (case.metrics for case in report.cases)
    assert a["liver"]["dice"] == a["tumour"]["dice"] == a["tumour"]["nsd"] == 1 and a["liver"]["hd95"] == 0
    assert b["liver"]["dice"] == 0.5 and b["liver"]["hd95"] == pytest.approx(1.0)
    assert b["tumour"]["dice"] == b["tumour"]["nsd"] == b["tumour"]["sensitivity"] == 0 and b["tumour"]["volume_error"] == -1
    assert b["tumour"]["hd95"] is None and b["tumour"]["precision"] is None
    assert c["tumour"]["dice"] == 0 and c["tumour"]["sensitivity"] is None and c["tumour"]["n_prediction"] == 4
    assert report.mean["liver"]["dice"] == pytest.approx(2.5 / 3) and report.mean["tumour"]["dice"] == pytest.approx(1 / 3)
    assert report.foreground_mean["dice"] == pytest.approx((2.5 / 3 + 1 / 3) / 2)
    assert report.mean["tumour"]["hd95"] == 0 and report.defined["tumour"]["hd95"] == 1 and report.defined["tumour"]["dice"] == 3
    assert report.empty["tumour"].model_dump() == {"absent": 0, "missed": 1, "spurious": 1}
    assert report.cases[0].tolerance_mm == 1.0 and report.tolerance_mm is None


def test_the_json_has_the_promised_keys_and_no_nan(folders, tmp_path):
    report = evaluate(*folders, LABELS)
    save_record(tmp_path / "report.json", report)
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    data = json.loads(text)
    assert set(data) >= {"cases", "mean", "foreground_mean", "definitions", "tolerance_mm", "format"}
    assert set(data["cases"][0]) >= {"case", "metrics"}
    names = {"dice", "iou", "sensitivity", "specificity", "precision", "hd", "hd95", "assd", "nsd", "volume_error",
             "volume_error_abs", "volume_error_ml", "lesion_recall", "lesion_precision", "lesion_f1", "lesion_false_positives"}
    counts = {"n_reference", "n_prediction", "lesions_reference", "lesions_prediction", "lesions_found"}
    assert set(data["cases"][0]["metrics"]["liver"]) == names | counts
    assert set(data["mean"]["tumour"]) == set(data["foreground_mean"]) == names
    assert load_record(tmp_path / "report.json", Report) == report
    assert names <= set(data["definitions"])


def test_a_given_tolerance_is_used_and_stated(folders):
    report = evaluate(*folders, LABELS, nsd_tolerance_mm=0.4)
    assert report.tolerance_mm == 0.4 and {case.tolerance_mm for case in report.cases} == {0.4}
    assert report.cases[1].metrics["liver"]["nsd"] < evaluate(*folders, LABELS).cases[1].metrics["liver"]["nsd"]
    with pytest.raises(DatasetError, match="0 mm or more, found -1"):
        evaluate(*folders, LABELS, nsd_tolerance_mm=-1)


def test_without_labels_every_value_found_anywhere_is_a_label(folders):
    named, bare = evaluate(*folders, LABELS), evaluate(*folders)
    assert list(bare.mean) == ["3", "7"]
    assert bare.mean["3"] == named.mean["liver"] and bare.mean["7"] == named.mean["tumour"]


def test_a_label_that_a_case_lacks_altogether_does_not_change_its_mean(tmp_path):
    truth, found = tmp_path / "truth", tmp_path / "found"
    for case, boxes in (("a", [(3, (0, 2), (0, 2), (0, 2)), (7, (3, 5), (3, 5), (3, 5))]), ("b", [(3, (0, 2), (0, 2), (0, 2))])):
        write(truth, case, scene(*boxes))
        write(found, case, scene(*boxes))
    for labels, name in ((LABELS, "tumour"), (None, "7")):
        report = evaluate(found, truth, labels)
        assert report.mean[name]["dice"] == 1 and report.defined[name]["dice"] == 1 and report.empty[name].absent == 1
        assert report.cases[1].metrics[name]["dice"] is None and report.cases[1].metrics[name]["specificity"] == 1


def test_a_label_defined_in_no_case_leaves_the_foreground_mean_alone(tmp_path):
    write(tmp_path / "truth", "a", scene((3, (0, 2), (0, 2), (0, 2))))
    report = evaluate(tmp_path / "truth", tmp_path / "truth", LABELS)
    assert report.mean["tumour"]["dice"] is None and report.foreground_mean["dice"] == 1
    rows = {row[0]: row for row in report_table(report)}
    assert rows["tumour"][1] == "-" and rows["tumour"][rows["label"].index("absent")] == "1"


def test_regions_and_the_ignore_label_are_respected(tmp_path):
    labels = Labels(
        foreground=(Label(name="oedema", value=1), Label(name="core", value=2)), ignore=Label(name="ignore", value=9),
        regions=(Region(name="whole", values=(1, 2)), Region(name="core", values=(2,))), region_order=(1, 2))
    write(tmp_path / "truth", "a", scene((1, (0, 4), (0, 4), (0, 4)), (2, (1, 2), (1, 3), (1, 3)), (9, (5, 6), (0, 7), (0, 8))))
    write(tmp_path / "found", "a", scene((1, (0, 4), (0, 4), (0, 4)), (2, (1, 2), (1, 3), (1, 2)), (2, (5, 6), (0, 7), (0, 8))))
    report = evaluate(tmp_path / "found", tmp_path / "truth", labels)
    assert report.mean["whole"]["dice"] == 1 and report.mean["core"]["dice"] == pytest.approx(4 / 6)


def test_endings_may_differ_and_probabilities_are_no_masks(folders, tmp_path):
    found, truth = folders
    write(found, "a_probabilities", scene())
    (found / "summary.csv").write_text("case\n")
    other = tmp_path / "other"
    for path in truth.iterdir():
        from autoseg.files.images import read_label
        array, grid = read_label(path)
        other.mkdir(exist_ok=True)
        write_label(other / path.name.replace(".nii.gz", ".mha"), array, grid)
    assert list(find_masks(found)) == ["a", "b", "c"]
    assert evaluate(found, other, LABELS) == evaluate(found, truth, LABELS)


def test_missing_predictions_are_an_error_that_lists_them(folders):
    found, truth = folders
    (found / "b.nii.gz").unlink()
    (found / "c.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"2 of 3 cases have a reference and no prediction: b, c\."):
        evaluate(found, truth, LABELS)
    with pytest.raises(DatasetError, match="the predictions given: 3 of 3 cases"):
        evaluate({}, truth, LABELS)


def test_predictions_without_a_reference_are_told(folders):
    found, truth = folders
    (truth / "b.nii.gz").unlink()
    log = Log()
    assert [case.case for case in evaluate(found, truth, LABELS, reporter=log).cases] == ["a", "c"]
    assert log.warnings == ["1 predictions have no reference and are not measured: b"]


def test_masks_on_another_grid_are_refused_all_at_once(folders):
    found, truth = folders
    write(found, "a", scene(), spacing=(2.0, 1.0, 0.6))
    write(found, "c", np.zeros((6, 7, 9), np.uint8))
    with pytest.raises(GeometryError) as error:
        evaluate(found, truth, LABELS)
    text = str(error.value)
    assert "case a" in text and "case c" in text and "case b" not in text and "spacing" in text and "shape" in text
    assert str(found / "a.nii.gz") in text and str(truth / "a.nii.gz") in text


def test_values_that_are_not_declared_are_refused(folders):
    found, truth = folders
    write(found, "b", scene((5, (0, 1), (0, 1), (0, 1))))
    with pytest.raises(DatasetError, match=r"case b: .*found.*b\.nii\.gz holds label values \[5\], expected only \[0, 3, 7\]"):
        evaluate(found, truth, LABELS)


def test_a_folder_that_holds_a_case_twice_or_nothing_is_refused(folders, tmp_path):
    found, truth = folders
    write(found, "a", scene(), ending=".mha")
    with pytest.raises(DatasetError, match=r"case a twice: a\.mha and a\.nii\.gz"):
        evaluate(found, truth)
    with pytest.raises(DatasetError, match="is not a folder"):
        evaluate(tmp_path / "nowhere", truth)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no reference masks"):
        evaluate(truth, tmp_path / "empty")


def test_2d_masks_are_measured_in_pixels(tmp_path):
    for folder, shift in (("truth", 0), ("found", 2)):
        array = np.zeros((1, 30, 30), np.uint8)
        array[0, 5:15, 5 + shift:15 + shift] = 255
        (tmp_path / folder).mkdir()
        write_label(tmp_path / folder / "a.png", array, Grid(shape=(1, 30, 30), spacing=(999.0, 1.0, 1.0), has_direction=False))
    report = evaluate(tmp_path / "found", tmp_path / "truth")
    assert report.mean["255"]["dice"] == pytest.approx(0.8) and report.mean["255"]["hd95"] == 2
    assert report.cases[0].tolerance_mm == 1


def test_merged_folds_are_the_report_of_all_cases(folders):
    found, truth = folders
    paths = find_masks(truth)
    parts = [evaluate(found, {case: path for case, path in paths.items() if case in fold}, LABELS) for fold in ("bc", "a")]
    assert merge_reports(parts) == evaluate(found, truth, LABELS)
    with pytest.raises(ValueError, match="occurs in two"):
        merge_reports([parts[0], parts[0]])
    with pytest.raises(ValueError, match="different tolerances"):
        merge_reports([parts[0], Report.of([], 3.0)])


def test_the_table_says_over_how_many_cases_a_mean_goes(folders):
    rows = report_table(evaluate(*folders, LABELS))
    assert [row[0] for row in rows] == ["label", "liver", "tumour", "foreground mean"]
    assert {len(row) for row in rows} == {len(rows[0])}
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert table["liver"]["dice"] == "0.8333" and table["tumour"]["hd95"] == "0.00 mm (1)"
    assert table["tumour"]["missed"] == table["tumour"]["spurious"] == "1"
    assert table["foreground mean"]["dice"] == "0.5833"


def test_a_report_without_cases_has_no_values():
    report = Report.of([])
    assert report.mean == {} and report.foreground_mean == {} and report_table(report)[0][0] == "label"
    assert Report.of([CaseMetrics(case="a", metrics={"x": {"dice": None}})]).foreground_mean == {"dice": None}


def cases_of(*groups, **columns):
    """CaseFiles a, b, ... with a patient and a value of each column."""
    found = []
    for i, (name, group) in enumerate(zip("abc", groups, strict=True)):
        attributes = {column: values[i] for column, values in columns.items() if values[i]}
        found.append(CaseFiles(case=name, images=(), group=group, attributes=attributes))
    return found


def test_intervals_go_over_patients_and_hold_the_mean(folders):
    report = evaluate(*folders, LABELS)
    assert report.patients == 3
    low, high = report.intervals["liver"]["dice"]
    assert low <= report.mean["liver"]["dice"] <= high and low < high
    assert "hd95" not in report.intervals["tumour"]  # one case defines it
    low, high = report.foreground_intervals["dice"]
    assert low <= report.foreground_mean["dice"] <= high
    together = evaluate(*folders, LABELS, cases=cases_of("p", "p", "q"))
    assert together.patients == 2 and together.cases[0].patient == "p"
    assert together.intervals["liver"]["dice"] != report.intervals["liver"]["dice"]
    assert evaluate(*folders, LABELS, cases=cases_of("p", "p", "p")).intervals == {"liver": {}, "tumour": {}}


def test_patients_are_recognised_in_names_when_nothing_else_is_known(tmp_path):
    for number in range(12):
        write(tmp_path / "truth", f"patient{number // 2:02d}_frame{number % 2}", scene((3, (0, 2), (0, 2), (0, 2))))
    report = evaluate(tmp_path / "truth", tmp_path / "truth", LABELS)
    assert report.patients == 6 and report.cases[3].patient == "patient01"


def test_results_are_given_for_each_value_of_a_manifest_column(folders):
    cases = cases_of("p", "q", "r", site=("Basel", "Basel", ""), age=("61", "62", "63"), one=("x", "x", "x"))
    report = evaluate(*folders, LABELS, cases=cases)
    assert list(report.groups) == ["site"]  # a column with a value of its own for each case, or only one, makes no groups
    assert report.group_cases == {"site": {"Basel": 2, "(not stated)": 1}}
    assert report.groups["site"]["Basel"]["liver"]["dice"] == pytest.approx(0.75)
    assert report.groups["site"]["(not stated)"]["tumour"]["dice"] == 0
    assert group_table(report)[1:] == [
        ["site", "Basel", "2", "0.7500", "0.5000"], ["site", "(not stated)", "1", "1.0000", "0.0000"]]
    assert report.cases[0].attributes == {"site": "Basel", "age": "61", "one": "x"}
    assert group_table(evaluate(*folders, LABELS)) == [["column", "value", "cases", "liver", "tumour"]]


def test_lesions_are_counted_by_size_over_all_cases(folders):
    report = evaluate(*folders, LABELS)  # a tumour has 4 voxels of 0.001 ml
    assert report.lesions["tumour"]["<0.01 ml"].model_dump() == {"reference": 2, "found": 1, "prediction": 2, "false": 1}
    assert report.lesions["liver"]["0.01-0.1 ml"].model_dump() == {"reference": 3, "found": 3, "prediction": 3, "false": 0}
    assert lesion_table(report)[1:] == [["liver", "0.01-0.1 ml", "3", "3", "3", "0"], ["tumour", "<0.01 ml", "2", "1", "2", "1"]]
    assert report.mean["tumour"]["lesion_false_positives"] == pytest.approx(1 / 3)
    assert report.cases[1].lesions["tumour"]["<0.01 ml"].found == 0


def test_definitions_are_printed_with_the_tolerances_that_were_used(folders):
    lines = definition_lines(evaluate(*folders, LABELS))
    assert any(line.startswith("nsd: ") and "surface Dice" in line for line in lines)
    assert lines[-1] == "tolerance of NSD: 1 mm; intervals over 3 patients"
    assert definition_lines(Report.of([]))[-1] == "tolerance of NSD: none mm; intervals over 0 patients"


def test_a_dataset_json_beside_or_above_the_references_names_the_labels(folders):
    found, truth = folders
    (truth.parent / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 3, "tumour": 7}}))
    assert evaluate_folder(found, truth) == evaluate(found, truth, LABELS)
    (truth / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": [3, 7], "tumour": 7},
                                                    "regions_class_order": [3, 7]}))
    assert list(evaluate_folder(found, truth).mean) == ["organ", "tumour"]


def test_a_manifest_brings_references_patients_and_columns(folders, tmp_path):
    found, _ = folders
    rows = [f"{c},truth/{c}.nii.gz,truth/{c}.nii.gz,p{c},{site}" for c, site in zip("abc", "xyx", strict=True)]
    (tmp_path / "cases.csv").write_text("\n".join(["case,image,label,group,site", *rows]))
    report = evaluate_folder(found, tmp_path / "cases.csv")
    assert list(report.mean) == ["3", "7"] and report.cases[2].patient == "pc"
    assert report.group_cases == {"site": {"x": 2, "y": 1}}
    (found / "b.nii.gz").unlink()
    log = Log()
    assert [case.case for case in evaluate_folder(found, tmp_path / "cases.csv", reporter=log).cases] == ["a", "c"]
    assert "2 of 3 labelled cases" in log.warnings[0]
    for path in found.iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match="3 of 3 cases have a reference and no prediction"):
        evaluate_folder(found, tmp_path / "cases.csv")
    (tmp_path / "bare.csv").write_text("case,image,label\na,truth/a.nii.gz,\n")
    with pytest.raises(DatasetError, match="label column"):
        evaluate_folder(found, tmp_path / "bare.csv")


def test_a_work_folder_brings_references_and_declared_labels(folders, tmp_path):
    found, truth = folders
    cases = tuple(case.model_copy(update={"label": str(truth / f"{case.case}.nii.gz")}) for case in cases_of("p", "p", "q"))
    work = Workspace(tmp_path / "work")
    dataset = Dataset(name="d", source="folder", root=str(tmp_path), channels=("CT",), labels=LABELS, cases=cases)
    save_record(work.dataset_path, dataset)
    work.plan_path.write_text("{}")
    assert evaluate_folder(found, work.root) == evaluate(found, truth, LABELS, cases=cases)


def test_merged_folds_keep_patients_and_columns(folders):
    found, truth = folders
    paths, cases = find_masks(truth), cases_of("p", "p", "q", site=("x", "y", "x"))
    folds = [{case: path for case, path in paths.items() if case in fold} for fold in ("bc", "a")]
    parts = [evaluate(found, fold, LABELS, cases=cases) for fold in folds]
    assert merge_reports(parts) == evaluate(found, truth, LABELS, cases=cases)
