"""The report: what the page says, what it escapes, how cases are cut and drawn, and what stands beside it."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from autoseg.errors import DatasetError, RecordError
from autoseg.files.images import write_label
from autoseg.files.workspace import Workspace, load_record
from autoseg.logs import Silent
from autoseg.stages import report_results as results
from autoseg.stages import report_sections as sections
from autoseg.stages.evaluate import evaluate, evaluate_folder
from autoseg.stages.report import report, report_masks, write_csv
from autoseg.stages.report_cases import CaseSources, chosen_cases, find_images, read_scene
from autoseg.stages.report_overlays import Scene, ct_window, drawing_of_view, outline, views_of
from autoseg.stages.report_page import Facts, Page, Section, Table, Text, render, trim
from autoseg.stages.report_pictures import (
    COLOURS_OF_PAGE,
    Curve,
    Strip,
    drawing_of,
    line_chart,
    save_png,
    scatter_chart,
    strip_chart,
)
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels
from autoseg.types.report import CaseMetrics, Report
from autoseg.types.trust import Calibration, CalibrationScore, QualityModel, ReliabilityBin, Trust

HOSTILE = '"><script>alert(1)</script>'
VOID = {"meta", "link", "input", "img", "br", "hr"}


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of few pixels, which are drawn faster."""
    monkeypatch.setattr("autoseg.stages.report_pictures.DPI", 40)
    monkeypatch.setattr("autoseg.stages.report_overlays.PAPER_DPI", 40)


class Reader(HTMLParser):
    """What a page is made of: tags with attributes, and whether they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def assert_self_contained(page: str) -> None:
    """Nothing outside the file is named by the page, tags close, ids are unique, and links lead somewhere."""
    reader = read(page)
    assert not reader.open
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    for tag, attrs in reader.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            target = attrs.get(name)
            if target is not None:
                assert target.startswith(("data:", "#")), (tag, target[:80])
                assert not target.startswith("#") or target[1:] in ids, (tag, target)
        assert not any(name.startswith("on") for name in attrs)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert "@import" not in page and not re.search(r"url\(\s*['\"]?(?!#)", page)


def case(name: str, dice: float | None, **more: float) -> CaseMetrics:
    row = {"dice": dice, "nsd": dice, "hd95": None if dice is None else 10 * (1 - dice), "n_reference": 100, "n_prediction": 90,
           "volume_error": -0.1, "volume_error_ml": -0.01, **more}
    return CaseMetrics(case=name, metrics={"organ": row}, tolerance_mm=1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six references with predictions of falling quality, and images; the grids are flipped and permuted."""
    root = tmp_path_factory.mktemp("masks")
    rng = np.random.default_rng(0)
    for number in range(6):
        truth = np.zeros((12, 20, 24), np.uint8)
        truth[3:9, 5:13, 6:14] = 1
        truth[4:8, 14:18, 15:22] = 2
        found = np.roll(truth, number, axis=2)
        grid = Grid(shape=truth.shape, spacing=(2.0, 1.0, 1.0), direction=((1, 0, 0), (0, -1, 0), (0, 0, -1)))
        write_label(root / "references" / f"case_{number}.nii.gz", truth, grid)
        write_label(root / "predictions" / f"case_{number}.nii.gz", found, grid)
        image = (80 * truth + rng.integers(0, 40, truth.shape)).astype(np.int16)
        write_label(root / "images" / f"case_{number}_0000.nii.gz", image, grid)
    return root


def test_the_page_of_two_folders_needs_nothing_but_itself(folders, tmp_path) -> None:
    found = evaluate_folder(folders / "predictions", folders / "references")
    page = report_masks(found, folders / "predictions", folders / "references", tmp_path / "out", folders / "images")
    text = page.read_text()
    assert_self_contained(text)
    assert page.stat().st_size < 2_000_000
    assert "On 6 patients, the masks of 1 and 2 reach a mean Dice of" in text
    assert text.count('src="data:image/jpeg;base64,') == 3 * 5  # five cases in three planes
    assert load_record(tmp_path / "out" / "report.json", Report) == found
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} == {"results.png", "cases.png"}


def test_without_images_masks_are_drawn_on_a_plain_ground(folders, tmp_path) -> None:
    found = evaluate_folder(folders / "predictions", folders / "references")
    text = report_masks(found, folders / "predictions", folders / "references", tmp_path).read_text()
    assert_self_contained(text)
    assert "data:image/jpeg" not in text and text.count('class="blank"') == 15 and 'class="reference"' in text


def test_images_are_found_with_and_without_a_channel_number(folders, tmp_path) -> None:
    cases = {f"case_{i}": Path() for i in range(6)}
    assert find_images(folders / "images", cases)["case_3"][0].name == "case_3_0000.nii.gz"
    assert set(find_images(folders / "references", cases)) == set(cases)
    with pytest.raises(DatasetError, match="is not a folder of images"):
        find_images(tmp_path / "nowhere", cases)


def test_what_people_typed_is_escaped(tmp_path) -> None:
    found = Report.of([CaseMetrics(case=f"{HOSTILE}{i}", attributes={HOSTILE: f"{HOSTILE}{i % 2}"}, metrics={
        f"$\\frac{HOSTILE}": {"dice": 0.1 * i, "hd95": 1.0}}) for i in range(5)])
    section, charts = results.results(found, HOSTILE)
    groups = results.groups(found, HOSTILE)
    assert groups is not None
    page = render(Page(HOSTILE, results.headline(found, True), results.lead(found), results.tiles(found), [
        section, groups[0], results.definitions(found)], [(HOSTILE, HOSTILE)], HOSTILE, COLOURS_OF_PAGE))
    assert "<script" not in page
    assert_self_contained(page)
    save_png(tmp_path / "charts.png", charts)  # a name that is no formula is no reason to stop
    assert (tmp_path / "charts.png").stat().st_size > 1000


def test_the_headline_says_what_how_good_and_on_how_many() -> None:
    pairs = [(f"p{i}", f"p{i}_{k}", 0.8 + 0.01 * i) for i in range(4) for k in (1, 2)]
    several = evaluate_like([case(name, dice).model_copy(update={"patient": patient}) for patient, name, dice in pairs])
    text = results.headline(several, unseen=True)
    assert text.startswith("On 8 cases of 4 patients that the networks had not seen, the masks of organ reach a mean Dice of 0.8")
    assert "95 % interval 0.7" in text or "95 % interval 0.8" in text
    single = results.headline(evaluate_like([case("one", 0.5)]), unseen=False)
    assert single == "On 1 patient, the masks of organ reach a mean Dice of 0.500 (no interval: it takes two patients)."
    assert "no Dice is defined" in results.headline(evaluate_like([case("none", None)]), unseen=False)


def evaluate_like(cases: list[CaseMetrics]) -> Report:
    from autoseg.stages.evaluate import with_intervals

    return with_intervals(Report.of(cases))


def test_structures_that_were_missed_are_told_first() -> None:
    cases = [case("a", 0.9), case("b", 0.0, n_prediction=0), case("c", 0.0, n_reference=0), case("d", 0.8)]
    lines = results.lead(Report.of(cases))
    assert "Missed altogether: organ in 1 of the 3 cases that hold it." in lines
    assert "Found where there is none: organ in 1 case." in lines
    assert any("the worst, b, has 0.000" in line for line in lines)


def test_worst_median_and_best_cases_are_chosen_once_each() -> None:
    record = Report.of([case(f"c{i}", i / 10) for i in range(9)])
    assert [(why, c.case) for why, c in chosen_cases(record)] == [
        ("worst", "c0"), ("second worst", "c1"), ("third worst", "c2"), ("median", "c4"), ("best", "c8")]
    two = Report.of([case("b", 0.9), case("a", 0.2)])
    assert [(why, c.case) for why, c in chosen_cases(two)] == [("worst", "a"), ("best", "b")]
    assert [why for why, _ in chosen_cases(Report.of([case("a", 0.2)]))] == ["the only one"]
    assert chosen_cases(Report.of([case("a", None)])) == []


def test_the_table_of_cases_has_a_row_for_each_value(tmp_path) -> None:
    cases = [case("a", 0.5).model_copy(update={"attributes": {"site": "x"}}), case("b", None)]
    write_csv(tmp_path / "report.csv", Report.of(cases), {"a": 0, "b": 1})
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert len(rows) == 2 * 7
    assert rows[0] == {"case": "a", "patient": "a", "fold": "0", "label": "organ", "metric": "dice", "value": "0.5", "site": "x"}
    assert next(r for r in rows if r["case"] == "b" and r["metric"] == "dice")["value"] == ""


def test_an_outline_runs_between_voxels() -> None:
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    (line,) = outline(mask, (40, 60))
    assert line[:, 0].min() == pytest.approx(20, abs=0.1) and line[:, 0].max() == pytest.approx(50, abs=0.1)
    assert line[:, 1].min() == pytest.approx(10, abs=0.1) and line[:, 1].max() == pytest.approx(30, abs=0.1)
    assert len(line) == 8  # straight parts have no points inside
    assert outline(np.zeros((3, 3), bool), (9, 9)) == []


def test_cuts_go_through_what_is_marked() -> None:
    reference = np.zeros((20, 30, 40), np.int16)
    reference[14:16, 5:8, 30:34] = 1
    views = views_of(Scene("a", None, reference, np.zeros_like(reference), (2.0, 1.0, 1.0)), [1])
    assert [(v.plane, v.slice in hit) for v, hit in zip(views, ((14, 15), (5, 6, 7), (30, 31, 32, 33)), strict=True)] == [
        ("axial", True), ("coronal", True), ("sagittal", True)]
    assert all(any(o.kind == "reference" for o in v.outlines) for v in views)
    flat = views_of(Scene("b", None, reference[14:15], reference[14:15], (999.0, 1.0, 1.0)), [1])
    assert [v.plane for v in flat] == ["image"]


def test_a_noisy_mask_is_painted_instead_of_outlined() -> None:
    rng = np.random.default_rng(1)
    noise = (rng.random((1, 200, 200)) < 0.5).astype(np.int16)
    (view,) = views_of(Scene("noise", rng.random((1, 200, 200)), noise, 1 - noise, (999.0, 1.0, 1.0)), [1])
    drawing = drawing_of_view(view, "noise", ["organ"], True)
    assert "<image" in drawing.svg and "<path" not in drawing.svg and len(drawing.svg) < 300_000


def test_scenes_are_brought_to_one_orientation(folders) -> None:
    files = {f"case_{i}": folders / "references" / f"case_{i}.nii.gz" for i in range(6)}
    images = find_images(folders / "images", files)
    labels = Labels(foreground=(Label(name="a", value=1), Label(name="b", value=2)))
    scene = read_scene(CaseSources(files, files, images, labels), "case_0")
    stored = np.zeros((12, 20, 24), np.int16)
    stored[3:9, 5:13, 6:14] = 1
    stored[4:8, 14:18, 15:22] = 2
    assert np.array_equal(scene.reference_zyx, stored[:, ::-1, ::-1])
    assert scene.image_zyx is not None and scene.image_zyx[scene.reference_zyx == 2].min() >= 160
    other = read_scene(CaseSources(files, files, {"case_0": [folders / "images" / "case_0_0000.nii.gz"]}, labels), "case_1")
    assert other.image_zyx is None  # no image of its own


def test_the_window_of_ct_holds_what_is_segmented() -> None:
    assert ct_window(0, 100) == (-150, 250)
    low, high = ct_window(-900, 200)
    assert low < -900 and high > 200


def test_charts_use_the_colours_of_the_page_and_no_names_twice() -> None:
    charts = [
        strip_chart("one", "One", [Strip("a", [1, 2, 3, 4, float("nan")], 0, (2, 3)), Strip("b", [5.0], 9)], "mm", "text"),
        line_chart("two", "Two", [Curve("a", [1, 2, 3], [0.1, float("nan"), 0.3]), Curve("b", [1], [0.5], 1)], "x", "y", ""),
        scatter_chart("three", "Three", [("a", [1, 10, 100], [2, 9, 90])], "x", "y", "", log=True),
    ]
    page = "".join(drawing_of(chart).svg for chart in charts if chart)
    assert all(name in page for name in ("currentColor", "var(--s0)", "var(--s1)", "var(--line)"))
    assert "DejaVu" not in page and "<!DOCTYPE" not in page and "http" not in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert 'role="img" aria-label="One. mm: a median 2.5, from 1 to 4, 4 values; b median 5' in page


def test_nothing_to_draw_gives_no_chart() -> None:
    assert strip_chart("x", "X", [Strip("a", [float("nan")])], "mm", "") is None
    assert strip_chart("x", "X", [Strip("a", [0.0, -1.0])], "mm", "", log=True) is None
    assert line_chart("x", "X", [Curve("a", [1], [float("nan")])], "epoch", "loss", "") is None
    assert scatter_chart("x", "X", [("a", [], [])], "x", "y", "") is None


def test_many_points_become_a_picture_inside_the_chart() -> None:
    rows = [Strip(f"label {i}", list(np.linspace(0, 1, 400)), i) for i in range(8)]
    chart = strip_chart("many", "Many", rows, "Dice", "")
    assert chart is not None and len(drawing_of(chart).svg) < 400_000


def test_columns_without_values_are_left_out() -> None:
    assert trim([["a", "b", "c"], ["1", "-", "2"], ["3", "", "-"]]) == [["a", "c"], ["1", "2"], ["3", "-"]]


def test_blocks_of_each_kind_are_shown() -> None:
    page = render(Page("t", "h", ["lead"], Facts([("Dice", "0.9", "95 %")], tiles=True), [
        Section("one", "One", [Text("note me", note=True), Table([["a", "b"], ["x", "1\n0 to 2"]], "below")], "from somewhere")],
        [("Diagnosis", "autoseg diagnose work")], "Results of today.", COLOURS_OF_PAGE))
    assert_self_contained(page)
    for part in ("note me", "<small>0 to 2</small>", "from somewhere", "autoseg diagnose work", "of today.", "default-src"):
        assert part in page


def test_calibration_is_shown_before_and_after() -> None:
    edges = [(i / 10, (i + 1) / 10) for i in range(10)]
    bins = tuple(ReliabilityBin(low=low, high=high, share=0.1, confidence=low + 0.05, accuracy=0.8 * high) for low, high in edges)
    score = CalibrationScore(ece=0.0512, nll=0.2, brier=0.11, reliability=bins)
    better = score.model_copy(update={"ece": 0.0123})
    model = QualityModel.model_construct(level=0.9, cases=40, spearman=0.71, error=0.03, plain_error=0.05, coverage=0.88)
    calibration = Calibration(temperature=1.3, parts="folds", near_before=score, near_after=better)
    trust = Trust.model_construct(calibration={"2d": calibration}, quality_mean=model, quality={}, quality_note="", missing=())
    section, charts = sections.trust(trust, "From trust.json")
    text = render(Page("t", "h", [], Facts([]), [section], colours=COLOURS_OF_PAGE))
    assert [chart.name for chart in charts] == ["reliability-0"]
    for part in ("0.0512", "0.0123", "1.300", "0.710", "88% (aim 90%)"):
        assert part in text


def test_a_planned_folder_says_what_is_missing(planned, tmp_path) -> None:
    page = report(Workspace(planned), tmp_path / "out")
    text = page.read_text()
    assert_self_contained(text)
    assert "Planned, and not yet trained" in text and "autoseg train work" in text
    assert "Configuration 3d_fullres" in text and "From fingerprint.json" in text
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_folder_that_is_no_work_folder_is_refused(tmp_path) -> None:
    with pytest.raises(RecordError, match="is not a work folder"):
        report(Workspace(tmp_path))


def test_references_of_a_mapping_are_used(folders, tmp_path) -> None:
    names = [f"case_{i}" for i in range(3)]
    predictions = {name: folders / "predictions" / f"{name}.nii.gz" for name in names}
    references = {name: folders / "references" / f"{name}.nii.gz" for name in names}
    found = evaluate(predictions, references)
    page = report_masks(found, predictions, references, tmp_path, {names[0]: [folders / "images" / f"{names[0]}_0000.nii.gz"]})
    assert page.read_text().count("data:image/jpeg") == 3 and "masks: report" in page.read_text()


def test_a_record_of_another_version_is_told_and_made_again(planned, cli, tmp_path) -> None:
    work = cli.copied(planned, tmp_path / "work")
    (work / "selection.json").write_text('{"format": 99}')
    notes: list[str] = []

    class Notes(Silent):
        def warn(self, message: str) -> None:
            notes.append(message)

    text = report(Workspace(work), reporter=Notes()).read_text()
    assert "What was selected" not in text
    assert len(notes) == 1 and "selection.json is not valid" in notes[0] and "autoseg select work" in notes[0]
