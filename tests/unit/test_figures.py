from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoseg.stages.figures import PALETTE, OverlayRow, choose_cuts, colour, overlay_figure, progress_figure, window


def scene(shape: tuple[int, int, int] = (24, 40, 48)) -> tuple[np.ndarray, np.ndarray]:
    z, y, x = np.indices(shape)
    label = np.zeros(shape, np.uint8)
    label[(z - 6) ** 2 + (y - 20) ** 2 + (x - 14) ** 2 < 30] = 1
    label[(z - 7) ** 2 + (y - 20) ** 2 + (x - 34) ** 2 < 9] = 2
    image = np.random.default_rng(0).normal(40, 5, shape) + 60 * (label > 0)
    return image.astype(np.float32), label


def row(**changes: object) -> OverlayRow:
    image, label = scene()
    fields: dict[str, object] = {"case": "case01", "image_zyx": image, "truth_zyx": label, "prediction_zyx": label,
                                 "spacing_zyx_mm": (2.0, 1.0, 1.0), "caption": "T1"}
    return OverlayRow(**{**fields, **changes})  # type: ignore[arg-type]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def has_colour(picture: np.ndarray, name: str) -> bool:
    wanted = np.array([int(name[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(picture - wanted).max(axis=-1) <= 6).sum() > 20)


def test_the_slice_that_shows_all_labels_is_chosen() -> None:
    axial, coronal = choose_cuts(row())
    assert (axial.axis, coronal.axis) == (0, 1)
    assert axial.index in (6, 7) and coronal.index == 20
    assert axial.aspect == 1.0 and coronal.aspect == 2.0


def test_without_truth_the_prediction_decides_and_without_both_the_middle_is_shown() -> None:
    assert choose_cuts(row(truth_zyx=None))[0].index in (6, 7)
    assert choose_cuts(row(truth_zyx=None, prediction_zyx=None))[0].index == 12
    _, label = scene()
    assert choose_cuts(row(truth_zyx=np.zeros_like(label)))[0].index in (6, 7)


def test_flat_images_and_thin_stacks_have_one_cut() -> None:
    flat = row(image_zyx=np.ones((1, 30, 40)), truth_zyx=None, prediction_zyx=None, spacing_zyx_mm=(999.0, 1.0, 1.0))
    thin = row(image_zyx=np.ones((9, 30, 40)), truth_zyx=None, prediction_zyx=None, spacing_zyx_mm=(10.0, 1.0, 1.0))
    assert len(choose_cuts(flat)) == len(choose_cuts(thin)) == 1


def test_coronal_pictures_have_the_head_up() -> None:
    image = np.arange(24.0)[:, None, None] * np.ones((24, 40, 48))
    coronal = choose_cuts(row(image_zyx=image))[1]
    assert coronal.of(image)[0, 0] == 23


def test_the_window_ignores_background_outliers_and_non_finite_values() -> None:
    values = np.full((10, 10, 10), -1024.0)
    values[2:8] = np.random.default_rng(0).uniform(0, 100, (6, 10, 10))
    values[5, 5, 5], values[5, 5, 6] = 1e6, np.nan
    low, high = window(values)
    assert -1 < low < 5 and 90 < high < 101
    low, high = window(np.full((2, 2, 2), 7))
    assert low < 7 < high
    assert window(np.full((2, 2, 2), np.nan)) == (0.0, 1.0)


def test_colours_of_the_palette_differ_for_colour_blind_readers() -> None:
    # protanopia in linear RGB (Vienot, Brettel and Mollon 1999)
    linear = np.array([[int(name[i : i + 2], 16) / 255 for i in (1, 3, 5)] for name in PALETTE[:5]]) ** 2.2
    seen = linear @ np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]).T
    shown = np.clip(seen, 0, 1) ** (1 / 2.2)
    for i in range(4):
        for j in range(i + 1, 4):
            assert np.linalg.norm(shown[i] - shown[j]) > 0.2
    assert colour(len(PALETTE)) == colour(0)


def test_an_overlay_shows_every_label_in_its_colour(tmp_path: Path) -> None:
    path = tmp_path / "new" / "overlay.png"
    overlay_figure(path, [row(dice={"organ": 0.91, "lesion": float("nan")})], ("organ", "lesion"))
    picture = pixels(path)
    assert has_colour(picture, PALETTE[0]) and has_colour(picture, PALETTE[1]) and not has_colour(picture, PALETTE[2])
    assert picture[2, 2].max() < 40  # dark background
    assert [p.name for p in path.parent.iterdir()] == ["overlay.png"]


def test_an_overlay_stays_under_the_size_asked_for(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(24, 40, 48))
    sizes = []
    for limit in (300_000, 40_000):
        overlay_figure(tmp_path / "o.png", [row(image_zyx=noise)] * 2, ("organ", "lesion"), max_bytes=limit)
        assert (tmp_path / "o.png").stat().st_size <= limit
        sizes.append(pixels(tmp_path / "o.png").shape[1])
    assert sizes[1] < sizes[0]


def test_an_overlay_without_predictions_has_two_columns_and_without_labels_one(tmp_path: Path) -> None:
    widths = []
    for changes in ({}, {"prediction_zyx": None}, {"prediction_zyx": None, "truth_zyx": None}):
        overlay_figure(tmp_path / "o.png", [row(**changes)], {1: "organ", 2: "lesion"})
        widths.append(pixels(tmp_path / "o.png").shape[1])
    assert widths[0] / widths[2] == pytest.approx(3, abs=0.3) and widths[1] / widths[2] == pytest.approx(2, abs=0.2)


def test_many_labels_flat_images_and_rows_without_truth_are_drawn(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 255, (1, 64, 64))
    flat = OverlayRow("flat", grey, None, np.full((1, 64, 64), 255), (999.0, 1.0, 1.0))
    overlay_figure(tmp_path / "flat.png", [flat, row()], {255: "object"})
    overlay_figure(tmp_path / "many.png", [row()], [f"label {i}" for i in range(1, 27)])
    assert all((tmp_path / name).stat().st_size < 200_000 for name in ("flat.png", "many.png"))


def test_wrong_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        overlay_figure(tmp_path / "o.png", [], ("organ",))
    with pytest.raises(ValueError, match="case01: image, truth and prediction"):
        overlay_figure(tmp_path / "o.png", [row(truth_zyx=np.zeros((2, 2, 2), np.uint8))], ("organ",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [0, 1, 5, 60])
@pytest.mark.parametrize("named", [True, False])
def test_learning_curves_are_drawn_for_any_number_of_epochs(count: int, named: bool, tmp_path: Path) -> None:
    epochs: list[dict[str, object]] = [
        {"epoch": i, "train_loss": -0.01 * i, "val_loss": -0.009 * i, "learning_rate": 0.01 * (1 - i / 100), "seconds": 3.0,
         "pseudo_dice": {"organ": 0.01 * i, "lesion": float("nan")} if named else [0.01 * i, None]} for i in range(count)]
    progress_figure(tmp_path / "progress.png", epochs)
    picture = pixels(tmp_path / "progress.png")
    assert (tmp_path / "progress.png").stat().st_size < 200_000
    assert has_colour(picture, PALETTE[1]) == (count > 0)


def test_curves_with_gaps_and_missing_columns_are_drawn(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"epoch": 0}, {"epoch": 1, "train_loss": None, "pseudo_dice": [0.1]},
                                     {"train_loss": float("inf")}]
    progress_figure(tmp_path / "progress.png", rows)
    assert (tmp_path / "progress.png").exists()
