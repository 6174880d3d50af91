"""Predict on the command line: outputs, skipping, failing cases, kills."""

from __future__ import annotations

import csv
import re
import shutil
import signal

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

NAMES = ("lungs", "heart", "spine", "nodule")
SLOW = """
import time
import autoseg.inference
decide = autoseg.inference.Model.decide
def slow(self, *arguments, **options):
    time.sleep(0.8)
    return decide(self, *arguments, **options)
autoseg.inference.Model.decide = slow
"""

DIE = """
import os, signal
flush = os.fsync
def dying(handle):
    if "/.{name}" in os.readlink(f"/proc/self/fd/{{handle}}"):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(handle)
os.fsync = dying
"""


@pytest.fixture(scope="module")
def predicted(cli, trained, chest, tmp_path_factory):
    """Masks and probabilities of the unseen cases, with what the command said; not to be altered."""
    out = tmp_path_factory.mktemp("predicted") / "masks"
    ran = cli.call("predict", trained, chest / "unseen" / "images", "--out", out, "--probabilities").ok()
    return out, ran


@pytest.fixture(scope="module")
def many(chest, tmp_path_factory):
    """Six images in one folder, one file a case."""
    folder = tmp_path_factory.mktemp("many") / "images"
    folder.mkdir()
    for path in (*sorted((chest / "images").iterdir()), *sorted((chest / "unseen" / "images").iterdir())):
        shutil.copy(path, folder / path.name)
    return folder


def rows(out):
    with (out / "summary.csv").open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def voxels(out):
    """The label maps of a folder by file name."""
    return {p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in sorted(out.glob("*.nii.gz"))}


def test_every_image_gets_a_mask_on_its_own_grid_with_its_own_label_values(predicted, chest):
    out, ran = predicted
    assert f"masks of 2 case(s): {out}" in ran.out
    seen = set()
    for path in sorted((chest / "unseen" / "images").iterdir()):
        mask = nibabel.load(out / path.name.replace("_0000", ""))
        image = nibabel.load(path)
        assert mask.shape == image.shape and np.issubdtype(mask.get_data_dtype(), np.integer)
        np.testing.assert_allclose(mask.affine, image.affine, rtol=0, atol=1e-6)
        seen |= set(np.unique(np.asarray(mask.dataobj)).tolist())
    assert {0, 1} <= seen <= {0, 1, 2, 3, 4}


def test_probabilities_are_float32_with_the_classes_last_and_sum_to_one(predicted, chest):
    out, _ = predicted
    for path in sorted((chest / "unseen" / "images").iterdir()):
        case = path.name.removesuffix("_0000.nii.gz")
        image, found = nibabel.load(path), nibabel.load(out / f"{case}_probabilities.nii.gz")
        assert found.shape == (*image.shape, 5) and found.get_data_dtype() == np.float32
        np.testing.assert_allclose(found.affine, image.affine, rtol=0, atol=1e-6)
        probabilities = np.asarray(found.dataobj)
        assert probabilities.min() >= 0 and probabilities.max() <= 1
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
        best = np.sort(probabilities, -1)
        clear = best[..., -1] - best[..., -2] > 1e-5
        mask = np.asarray(nibabel.load(out / f"{case}.nii.gz").dataobj)
        assert clear.mean() > 0.9 and np.array_equal(probabilities.argmax(-1)[clear], mask[clear])


def test_the_summary_has_one_row_per_case_with_times_voxels_and_millilitres(predicted):
    out, _ = predicted
    table = rows(out)
    assert sorted(table) == ["chest1000", "chest1001"]
    for case, row in table.items():
        mask = nibabel.load(out / f"{case}.nii.gz")
        label = np.asarray(mask.dataobj)
        volume = abs(np.linalg.det(mask.affine)) / 1000
        assert row["status"] == "done" and row["error"] == ""
        seconds = {name: float(value) for name, value in row.items() if name.startswith("seconds_")}
        assert {"seconds_read", "seconds_preprocess", "seconds_network", "seconds_restore", "seconds_write"} <= set(seconds)
        assert all(value >= 0 for value in seconds.values())
        for value, name in enumerate(NAMES, start=1):
            assert int(row[f"voxels_{name}"]) == (label == value).sum()
            assert float(row[f"ml_{name}"]) == pytest.approx((label == value).sum() * volume, rel=1e-4, abs=1e-3)


def test_the_same_command_again_does_nothing_new(cli, predicted, trained, chest):
    out, _ = predicted
    before = cli.states(out)
    ran = cli.call("predict", trained, chest / "unseen" / "images", "--out", out, "--probabilities").ok()
    assert "predicted already" in ran.out and cli.states(out) == before


def test_a_lost_mask_is_made_again_alone_and_overwriting_gives_the_same_bytes(cli, predicted, trained, chest, tmp_path):
    out = tmp_path / "masks"
    shutil.copytree(predicted[0], out)
    before = {name: (out / name).read_bytes() for name in ("chest1000.nii.gz", "chest1001.nii.gz")}
    states = cli.states(out)
    (out / "chest1000.nii.gz").unlink()
    cli.call("predict", trained, chest / "unseen" / "images", "--out", out).ok()
    assert cli.states(out)["chest1001.nii.gz"] == states["chest1001.nii.gz"]
    assert {name: (out / name).read_bytes() for name in before} == before
    cli.call("predict", trained, chest / "unseen" / "images", "--out", out, "--overwrite").ok()
    assert cli.states(out)["chest1001.nii.gz"] != states["chest1001.nii.gz"]
    assert {name: (out / name).read_bytes() for name in before} == before


def test_probabilities_can_be_asked_for_afterwards(cli, predicted, trained, chest, tmp_path):
    out, images = tmp_path / "masks", chest / "unseen" / "images"
    cli.call("predict", trained, images, "--out", out).ok()
    assert not list(out.glob("*_probabilities.nii.gz"))
    cli.call("predict", trained, images, "--out", out, "--probabilities").ok()
    for name in ("chest1000", "chest1001"):
        path = f"{name}_probabilities.nii.gz"
        assert np.array_equal(np.asarray(nibabel.load(out / path).dataobj), np.asarray(nibabel.load(predicted[0] / path).dataobj))


def test_masks_of_another_model_or_other_options_are_not_mixed(cli, predicted, trained, chest, tmp_path):
    out, images = tmp_path / "masks", chest / "unseen" / "images"
    shutil.copytree(predicted[0], out)
    before = cli.states(out)
    for other in (("--folds", "0"), ("--no-mirror",)):
        ran = cli.call("predict", trained, images, "--out", out, *other)
        ran.refused(str(out), "another model or other options", "--overwrite")
    assert cli.states(out) == before
    cli.call("predict", trained, images, "--out", out, "--folds", "0", "--overwrite").ok()
    changed = [name for name, array in voxels(out).items() if not np.array_equal(array, voxels(predicted[0])[name])]
    assert changed
    cli.call("predict", trained, images, "--out", out).refused("--overwrite")


def test_overwriting_some_cases_never_passes_the_others_off_as_the_new_models(cli, predicted, trained, chest, tmp_path):
    out, images = tmp_path / "masks", chest / "unseen" / "images"
    shutil.copytree(predicted[0], out)
    cli.call("predict", trained, images / "chest1000_0000.nii.gz", "--out", out, "--folds", "0", "--overwrite").ok()
    cli.call("predict", trained, images, "--out", tmp_path / "fresh", "--folds", "0").ok()
    ran = cli.call("predict", trained, images, "--out", out, "--folds", "0")
    if ran.code == 0:  # refusing is right as well
        fresh = voxels(tmp_path / "fresh")
        assert all(np.array_equal(array, fresh[name]) for name, array in voxels(out).items() if name in fresh)


def test_other_options_change_what_they_say(cli, predicted, trained, chest, tmp_path):
    images = chest / "unseen" / "images"
    whole = np.asarray(nibabel.load(predicted[0] / "chest1000_probabilities.nii.gz").dataobj)
    single = {}
    for name, options in {"0": ("--folds", "0"), "1": ("--folds", "1"), "plain": ("--no-mirror",)}.items():
        cli.call("predict", trained, images / "chest1000_0000.nii.gz", "--out", tmp_path / name, "--probabilities", *options).ok()
        single[name] = np.asarray(nibabel.load(tmp_path / name / "chest1000_probabilities.nii.gz").dataobj)
    assert np.abs(single["0"] - single["1"]).max() > 1e-3 and np.abs(single["plain"] - whole).max() > 1e-4


@pytest.mark.parametrize(("arguments", "parts"), [
    (("--folds", "3"), ("no finished training of fold(s) [3]", "finished: [0, 1]", "autoseg train")),
    (("--folds", "x"), ("--folds", "'x'")),
    (("--device", "abacus"), ("abacus",)),
    (("--precision", "fp8"), ("fp8",)),
    (("--nonsense",), ("--nonsense",)),
])
def test_wrong_arguments_are_refused_and_leave_nothing(cli, trained, chest, tmp_path, arguments, parts):
    cli.call("predict", trained, chest / "unseen" / "images", "--out", tmp_path / "masks", *arguments).refused(*parts)
    assert not (tmp_path / "masks").exists()


def test_predicting_without_training_says_how_to_train(cli, planned, chest, tmp_path):
    cli.call("predict", planned, chest / "unseen" / "images", "--out", tmp_path / "masks").refused("autoseg train")
    cli.call("select", planned).refused("autoseg train")
    assert not (tmp_path / "masks").exists()


def test_inputs_that_cannot_be_used_are_listed_together(cli, trained, chest, tmp_path):
    image = chest / "unseen" / "images" / "chest1000_0000.nii.gz"
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "empty").mkdir()
    shutil.copy(image, tmp_path / "two_0000.nii.gz")
    shutil.copy(image, tmp_path / "two_0001.nii.gz")
    inputs = [tmp_path / name for name in ("nowhere", "notes.txt", "empty", "two_0000.nii.gz", "two_0001.nii.gz")]
    ran = cli.call("predict", trained, *inputs, "--out", tmp_path / "masks")
    ran.refused("nowhere: does not exist", "notes.txt: expected an image", "empty: expected image files", "case two",
                "expected 1 channel, found 2")
    cli.call("predict", trained, chest, "--out", tmp_path / "masks").refused("did you mean", "images")
    assert not (tmp_path / "masks").exists()


def test_files_folders_and_manifests_may_be_mixed(cli, predicted, trained, chest, tmp_path):
    images = chest / "unseen" / "images"
    (tmp_path / "list.csv").write_text(f"case,image\nlisted,{images / 'chest1001_0000.nii.gz'}\n")
    (tmp_path / "folder").mkdir()
    shutil.copy(images / "chest1000_0000.nii.gz", tmp_path / "folder" / "plain.nii.gz")
    out = tmp_path / "masks"
    cli.call("predict", trained, tmp_path / "list.csv", tmp_path / "folder", images / "chest1000_0000.nii.gz", "--out", out).ok()
    masks, known = voxels(out), voxels(predicted[0])
    assert sorted(masks) == ["chest1000.nii.gz", "listed.nii.gz", "plain.nii.gz"]
    assert sorted(rows(out)) == ["chest1000", "listed", "plain"]
    assert np.array_equal(masks["listed.nii.gz"], known["chest1001.nii.gz"])
    assert np.array_equal(masks["plain.nii.gz"], known["chest1000.nii.gz"])


def test_masks_are_never_written_over_the_images(cli, trained, many, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(many / "chest000_0000.nii.gz", folder / "a.nii.gz")
    before = (folder / "a.nii.gz").read_bytes()
    for more in ((), ("--overwrite",)):
        cli.call("predict", trained, folder, "--out", folder, *more).refused(str(folder), "--out")
    assert (folder / "a.nii.gz").read_bytes() == before


def test_masks_that_somebody_else_made_are_not_taken_for_finished_ones(cli, trained, chest, tmp_path):
    """A folder that holds masks and no record of a prediction may hold reference masks."""
    out = tmp_path / "labels"
    shutil.copytree(chest / "unseen" / "labels", out)
    before = cli.states(out)
    cli.call("predict", trained, chest / "unseen" / "images", "--out", out).refused(str(out), "--overwrite")
    assert cli.states(out) == before


def test_broken_cases_are_listed_and_the_others_are_done(cli, predicted, trained, chest, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "masks"
    shutil.copytree(chest / "unseen" / "images", folder)
    whole = (folder / "chest1000_0000.nii.gz").read_bytes()
    (folder / "aaa_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "chest1000b_0000.nii.gz").write_text("not an image")
    (folder / "zzz_0000.nii.gz").write_bytes(b"")
    ran = cli.spawn("predict", trained, folder, "--out", out).refused("3 of 5 cases failed", "the rest is done", code=3)
    for case in ("aaa", "chest1000b", "zzz"):
        assert re.search(rf"^  {case}: .*{case}_0000\.nii\.gz", ran.err, re.MULTILINE), ran.err
    table = rows(out)
    assert {case: row["status"] for case, row in table.items()} == {
        "aaa": "failed", "chest1000": "done", "chest1000b": "failed", "chest1001": "done", "zzz": "failed"}
    assert all(bool(row["error"]) == (row["status"] == "failed") for row in table.values())
    masks, known = voxels(out), voxels(predicted[0])
    assert sorted(masks) == ["chest1000.nii.gz", "chest1001.nii.gz"]
    assert all(np.array_equal(array, known[name]) for name, array in masks.items())
    states = cli.states(out)
    (folder / "aaa_0000.nii.gz").write_bytes(whole)
    cli.call("predict", trained, folder, "--out", out).refused("2 of 3 cases failed", code=3)
    assert cli.states(out)["chest1001.nii.gz"] == states["chest1001.nii.gz"]
    assert np.array_equal(voxels(out)["aaa.nii.gz"], known["chest1000.nii.gz"]) and rows(out)["aaa"]["error"] == ""


def test_one_broken_case_among_ten_leaves_nine_masks_and_one_error(cli, trained, many, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "masks"
    folder.mkdir()
    paths = sorted(many.glob("*_0000.nii.gz"))
    for index in range(10):
        shutil.copy(paths[index % len(paths)], folder / f"case{index}_0000.nii.gz")
    broken = folder / "case4_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:2000])
    ran = cli.call("predict", trained, folder, "--out", out, "--no-mirror")
    ran.refused("1 of 10 cases failed", "case4: ", "case4_0000.nii.gz", code=3)
    assert sorted(voxels(out)) == [f"case{index}.nii.gz" for index in range(10) if index != 4]
    assert [case for case, row in rows(out).items() if row["status"] == "failed"] == ["case4"]
    assert sum(line.startswith("  case") for line in ran.err.splitlines()) == 1


def test_a_case_that_cannot_fit_says_what_it_would_need(cli, trained, many, tmp_path):
    for flag in ("--max-ram", "--gpu-memory"):
        cli.call("predict", trained, many, "--out", tmp_path / "masks", flag, "0").refused(flag)
    ran = cli.call("predict", trained, many, "--out", tmp_path / "masks", "--max-ram", "0.1")
    ran.refused("6 of 6 cases failed", "need", "GiB of memory", "GiB are free", code=3)
    assert not list((tmp_path / "masks").glob("*.nii.gz"))
    cli.call("predict", trained, many, "--out", tmp_path / "masks", "--max-ram", "64").ok()


def test_an_image_with_a_value_that_is_no_number_is_a_failed_case(cli, trained, chest, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "masks"
    shutil.copytree(chest / "unseen" / "images", folder)
    image = nibabel.load(folder / "chest1000_0000.nii.gz")
    array = np.asarray(image.dataobj).astype(np.float32)
    array[3, 3, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(array, image.affine), folder / "chest1000_0000.nii.gz")
    cli.call("predict", trained, folder, "--out", out).refused("1 of 2 cases failed", "chest1000: ", "NaN", code=3)
    assert sorted(voxels(out)) == ["chest1001.nii.gz"] and rows(out)["chest1000"]["status"] == "failed"


@pytest.mark.parametrize("message", ["CUDA out of memory", "[enforce fail] DefaultCPUAllocator: can't allocate memory"])
def test_a_case_that_does_not_fit_into_memory_fails_alone(cli, trained, many, tmp_path, monkeypatch, message):
    import torch

    from autoseg.inference import Model

    count, fails, decide = [0], {2, 7}, Model.decide  # the second case, and once more when it is tried alone at the end

    def short(self, *arguments, **options):
        count[0] += 1
        if count[0] in fails:
            raise torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)
        return decide(self, *arguments, **options)

    monkeypatch.setattr(Model, "decide", short)
    ran = cli.call("predict", trained, many, "--out", tmp_path / "masks").refused("1 of 6 cases failed", "memory", code=3)
    assert "chest001" in ran.err and len(voxels(tmp_path / "masks")) == 5
    count[0], fails = 0, {2}
    cli.call("predict", trained, many, "--out", tmp_path / "again").ok()
    assert len(voxels(tmp_path / "again")) == 6


def test_a_killed_prediction_goes_on_and_ends_as_if_undisturbed(cli, trained, many, tmp_path):
    out, whole = tmp_path / "masks", tmp_path / "whole"
    cli.call("predict", trained, many, "--out", whole).ok()
    child = cli.start("predict", trained, many, "--out", out, before=SLOW)
    cli.wait_for(child, lambda: any(out.glob("chest*.nii.gz")))
    child.kill()
    assert cli.ended(child).code == -signal.SIGKILL
    done = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("chest*.nii.gz")}
    assert 0 < len(done) < 6
    assert cli.spawn("predict", trained, many, "--out", out, before=DIE.format(name="chest")).code == -signal.SIGKILL
    cli.call("predict", trained, many, "--out", out).ok()
    assert {name: state for name, state in cli.states(out).items() if name in done} == done
    masks = {p.name: p.read_bytes() for p in whole.glob("*.nii.gz")}
    assert len(masks) == 6 and {p.name: p.read_bytes() for p in out.glob("chest*.nii.gz")} == masks
    cli.call("evaluate", out, whole).ok()


def test_a_kill_between_a_mask_and_the_summary_loses_no_row(cli, predicted, trained, chest, tmp_path):
    command = ("predict", trained, chest / "unseen" / "images", "--out", tmp_path / "masks")
    assert cli.spawn(*command, before=DIE.format(name="summary")).code == -signal.SIGKILL
    cli.call(*command).ok()
    found, expected = rows(tmp_path / "masks"), rows(predicted[0])
    assert sorted(found) == sorted(expected)
    assert all(found[case]["voxels_lungs"] == row["voxels_lungs"] for case, row in expected.items())


def test_an_interrupted_prediction_says_how_to_go_on(cli, trained, many, tmp_path):
    out = tmp_path / "masks"
    child = cli.start("predict", trained, many, "--out", out, before=SLOW)
    cli.wait_for(child, lambda: any(out.glob("chest*.nii.gz")))
    child.send_signal(signal.SIGINT)
    ran = cli.ended(child)
    assert ran.code == 130 and "Traceback" not in ran.err
    assert f"Go on with: autoseg predict {trained} {many} --out {out}" in ran.err
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_damaged_weights_are_refused_with_their_file(cli, trained, chest, tmp_path):
    work = cli.copied(trained, tmp_path / "work")
    path = work / "runs" / "3d_fullres" / "fold_1" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    cli.call("predict", work, chest / "unseen" / "images", "--out", tmp_path / "masks").refused(str(path), "--restart")
    assert not (tmp_path / "masks").exists()


def test_a_damaged_selection_is_refused_with_its_exact_place(cli, trained, chest, tmp_path):
    work = cli.copied(trained, tmp_path / "work")
    cli.edit(work / "selection.json", lambda selection: selection.update(runs="3d_fullres"))
    cli.call("predict", work, chest / "unseen" / "images", "--out", tmp_path / "masks").refused("selection.json", "runs")
    cli.edit(work / "selection.json", lambda selection: selection.update(runs=["gone"]))
    cli.call("predict", work, chest / "unseen" / "images", "--out", tmp_path / "masks").refused("gone")
    assert not (tmp_path / "masks").exists()
