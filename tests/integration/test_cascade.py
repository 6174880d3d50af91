"""The cascade from images to masks: two stages, killed in the middle, the second one trained on out-of-fold segmentations."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import autoseg
from autoseg.arrays.cascade import labels_on_grid
from autoseg.datasets.folder import read_inputs
from autoseg.datasets.phantom import write_dataset
from autoseg.errors import RunError
from autoseg.files.images import read_case
from autoseg.files.preprocessed import StoredCase, open_case
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace, load_record, save_record
from autoseg.logs import Silent
from autoseg.stages import cascade
from autoseg.stages.plan import plan
from autoseg.stages.predict import Options, load_model, network_hashes, predict
from autoseg.stages.preprocess import data_folder
from autoseg.stages.train import Options as Training
from autoseg.stages.train import train
from autoseg.types.case import Preprocessed
from autoseg.types.run import AugmentSpec, OptimizerSpec, TrainSpec

LOW, HIGH = "3d_lowres", "3d_cascade_fullres"
CASES = 3
KILLED_AT = 2  # segmentations that are stored when the process dies
SPEC = TrainSpec(
    epochs=1, steps_per_epoch=12, val_steps=1, augment=AugmentSpec(mirror=(2,)), optimizer=OptimizerSpec(kind="adamw", lr=0.01),
    precision="fp32",
)


class Telling(Silent):
    """Keeps warnings."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def warn(self, message: str) -> None:
        self.told.append(message)


CHILD = f"""
import os, signal, sys
from autoseg.files.workspace import Workspace, load_record
from autoseg.logs import Silent
from autoseg.stages.train import Options, train
from autoseg.types.run import TrainSpec
from pathlib import Path

class Dying(Silent):
    def task(self, name, total, unit="cases"):
        task, told = super().task(name, total, unit), [0]
        def advance(steps=1, note=""):
            told[0] += steps
            if name == "segment for {HIGH}" and told[0] == {KILLED_AT}:
                os.kill(os.getpid(), signal.SIGKILL)
        task.advance = advance
        return task

root = Path(sys.argv[1])
train(Workspace(root), ["{HIGH}"], [0], None, load_record(root / "spec.json", TrainSpec), Options("cpu", 0), Dying())
"""


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time: equal ones were not written again."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def segmentations(work: Workspace) -> list[Path]:
    return sorted((work.runs / LOW).glob(f"fold_*/next_stage/{HIGH}/*.b2nd"))


class Story:
    """What was there after the kill, and what was read in the training that went on."""

    def __init__(self, root: Path) -> None:
        self.data, self.work, self.masks = root / "data", Workspace(root / "work"), root / "masks"
        self.code = 0
        self.after_kill: dict[str, tuple[int, int]] = {}
        self.read: set[tuple[str, Path | None]] = set()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """From nothing to masks of an unseen image; the first training is killed while it segments for the second stage."""
    told = Story(tmp_path_factory.mktemp("cascade"))
    write_dataset(told.data, "chest", CASES, 1, 7, size=0.5)
    plan(told.data, told.work, gpu_memory_gb=0.01)
    planned = told.work.plan()
    assert planned.configurations[HIGH].previous_stage == LOW, "the phantom must be large enough for the memory"
    thin = {
        name: entry.model_copy(update={"features_per_stage": (8, 16, 16, 16)[: len(entry.features_per_stage)]})
        for name, entry in planned.configurations.items()
    }
    save_record(told.work.plan_path, planned.model_copy(update={"configurations": thin}))
    save_record(told.work.root / "spec.json", SPEC)
    child = subprocess.run([sys.executable, "-c", CHILD, str(told.work.root)], capture_output=True, text=True, check=False)
    told.code = child.returncode
    assert told.code == -signal.SIGKILL, child.stderr
    told.after_kill = files(told.work.runs)
    read = StoredCase.read_previous

    def watched(case: StoredCase, *arguments: object) -> object:
        told.read.add((case.name, case.previous))
        return read(case, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredCase, "read_previous", watched)
        train(told.work, [HIGH], [0], None, load_record(told.work.root / "spec.json", TrainSpec), Training("cpu", 0))
    predict(told.work, read_inputs([told.data / "unseen" / "images"], channels=1), told.masks, Options(device="cpu"))
    yield told


def own(story: Story, folder: Path) -> Workspace:
    """A copy of the work folder to spoil."""
    return Workspace(shutil.copytree(story.work.root, folder / "work"))


def test_the_first_stage_is_trained_in_all_folds_and_the_second_in_the_one_asked_for(story: Story) -> None:
    trained = sorted(f"{p.parent.parent.name}/{p.parent.name}" for p in story.work.runs.glob("*/fold_*/weights.safetensors"))
    assert trained == [f"{HIGH}/fold_0", *(f"{LOW}/fold_{k}" for k in range(CASES))]


def test_after_a_kill_it_goes_on_with_what_is_missing(story: Story) -> None:
    stored = [name for name in story.after_kill if name.endswith(".b2nd")]
    assert len(stored) == KILLED_AT and not any(name.startswith(HIGH) for name in story.after_kill)
    now = files(story.work.runs)
    kept = [name for name in story.after_kill if name.endswith((".b2nd", ".safetensors"))]
    assert len(kept) == KILLED_AT + 2 * CASES and all(now[name] == story.after_kill[name] for name in kept)
    assert len(segmentations(story.work)) == CASES
    before = files(story.work.runs / LOW)
    cascade.prepare(story.work, LOW, HIGH, device="cpu")
    assert files(story.work.runs / LOW) == before


def test_every_case_is_segmented_by_the_network_that_has_not_seen_it(story: Story) -> None:
    splits, made = story.work.splits(), story.work.plan()
    folds = cascade.case_folds(story.work, LOW, HIGH)
    assert set(folds) == {case.case for case in story.work.dataset().cases}
    models = [load_model(story.work, [LOW], Options(folds=(k,), device="cpu", precision="fp32")) for k in range(CASES)]
    for source in cascade.open_cases(story.work, LOW, HIGH, list(folds)):
        home = folds[source.name]
        assert source.name in splits[home].val and source.name not in splits[home].train
        low = open_case(data_folder(story.work, made, LOW) / source.name)
        found = []
        for model in models:
            logits = model.logits(model.members[0], Preprocessed(low.read_image(), None, low.placement))
            found.append(labels_on_grid(logits, low.placement, source.placement))
        assert found[home].any() and np.array_equal(source.read_previous(), found[home])
        assert all(not np.array_equal(source.read_previous(), other) for k, other in enumerate(found) if k != home)


def test_training_and_validation_batches_are_read_from_these_segmentations(story: Story) -> None:
    folds = cascade.case_folds(story.work, LOW, HIGH)
    root = story.work.runs / LOW
    assert story.read == {(case, root / f"fold_{k}" / "next_stage" / HIGH / f"{case}.b2nd") for case, k in folds.items()}


def test_the_network_of_the_second_stage_has_a_channel_for_each_label(story: Story) -> None:
    record = RunFolder(story.work.fold(HIGH, 0)).record()
    assert record.previous == LOW
    model = load_model(story.work, [HIGH], Options(folds=(0,), device="cpu"))
    first = next(iter(model.members[0].networks[0].parameters()))
    assert first.shape[1] == 1 + len(record.plan.labels.foreground)


def test_a_fold_is_validated_with_the_same_fold_of_the_first_stage_and_new_images_get_all_of_them(story: Story) -> None:
    for folds, count in (((0,), 1), (None, CASES)):
        member = load_model(story.work, [HIGH], Options(folds=folds, device="cpu")).members[0]
        assert member.previous is not None and member.previous.name == LOW and len(member.networks) == 1
        assert len(member.previous.networks) == count
        assert set(network_hashes(story.work, HIGH, folds)) == {f"{HIGH}/fold_0", *(f"{LOW}/fold_{k}" for k in range(count))}
    validation = story.work.fold(HIGH, 0) / "validation"
    assert {p.name for p in validation.glob("*.nii.gz")} == {f"{case}.nii.gz" for case in story.work.splits()[0].val}
    assert (validation / "report.json").exists()


def test_masks_of_unseen_images_come_from_both_stages_and_equal_those_of_arrays(story: Story) -> None:
    [path] = sorted(story.masks.glob("*.nii.gz"))
    [case] = read_inputs([story.data / "unseen" / "images"], channels=1)
    mask, image = sitk.ReadImage(str(path)), sitk.ReadImage(case.images[0])
    assert mask.GetSize() == image.GetSize() and np.allclose(mask.GetSpacing(), image.GetSpacing())
    model = autoseg.load(story.work.root, device="cpu")
    assert model.members[0].previous is not None
    scan = read_case([Path(name) for name in case.images])
    assert np.array_equal(model.predict_image(scan).label_zyx, sitk.GetArrayFromImage(mask))


def test_only_what_another_network_would_segment_is_made_anew(story: Story, tmp_path: Path) -> None:
    work = own(story, tmp_path)
    changed = RunFolder(work.fold(LOW, 1))
    weights = {name: value + 0.05 * torch.randn_like(value) for name, value in changed.load_weights().items()}
    changed.save_weights(weights, SPEC.epochs)
    damaged = next((work.fold(LOW, 2) / "next_stage" / HIGH).glob("*.b2nd"))
    damaged.write_bytes(damaged.read_bytes()[:50])
    before = files(work.runs / LOW)
    cascade.prepare(work, LOW, HIGH, device="cpu")
    after = files(work.runs / LOW)
    rewritten = {Path(name).parts[0] for name in before if before[name] != after[name]}
    assert rewritten == {"fold_1", "fold_2"} and set(before) == set(after)


def test_restarting_the_second_stage_leaves_what_the_first_has(story: Story, tmp_path: Path) -> None:
    work = Workspace(shutil.copytree(story.work.root, tmp_path / "work"))
    unfinished = RunFolder(work.fold(LOW, 1))
    record = unfinished.record()
    longer = record.spec.model_copy(update={"epochs": 2})
    train(work, [LOW], [1], spec=longer, options=Training("cpu", 0, longer=True))
    before = {fold: RunFolder(work.fold(LOW, fold)).weights_path.read_bytes() for fold in range(CASES)}
    told: list[str] = []
    train(work, [HIGH], [0], spec=SPEC, options=Training("cpu", 0, restart=True), reporter=Telling(told))
    assert {fold: RunFolder(work.fold(LOW, fold)).weights_path.read_bytes() for fold in range(CASES)} == before
    train(work, [LOW], [0], spec=SPEC.model_copy(update={"seed": 5}), options=Training("cpu", 0, restart=True))
    train(work, [HIGH], [0], spec=SPEC, options=Training("cpu", 0), reporter=Telling(told))
    assert any("trained on other cases or on other segmentations" in line for line in told)


def test_a_first_stage_that_is_not_finished_is_told_with_the_command(story: Story, tmp_path: Path) -> None:
    work = own(story, tmp_path)
    RunFolder(work.fold(LOW, 1)).weights_path.unlink()
    with pytest.raises(RunError, match=rf"fold 1 is not trained to its end; run: autoseg train .* --config {LOW} --folds 1"):
        cascade.prepare(work, LOW, HIGH, device="cpu")


def test_a_first_stage_with_another_plan_or_other_splits_is_refused(story: Story, tmp_path: Path) -> None:
    work = own(story, tmp_path)
    folder = RunFolder(work.fold(LOW, 1))
    record = folder.record()
    other = record.plan.configurations[LOW].model_copy(update={"spacing": (9.0, 9.0, 9.0)})
    folder.save_record(record.model_copy(update={"plan": record.plan.model_copy(update={"configurations": {LOW: other}})}))
    with pytest.raises(RunError, match="fold 1 was trained with another plan"):
        cascade.prepare(work, LOW, HIGH, device="cpu")
    folder.save_record(record.model_copy(update={"split": record.split.model_copy(update={"train": record.split.val})}))
    with pytest.raises(RunError, match=rf"with other splits and has seen {record.split.val[0]}"):
        cascade.prepare(work, LOW, HIGH, device="cpu")
    with pytest.raises(RunError, match=rf"previous stage of {HIGH} is {LOW}, but run '{HIGH}' is one of {HIGH}"):
        cascade.prepare(work, HIGH, HIGH, work.splits()[0].val, device="cpu")


def test_a_case_that_no_fold_validates_is_told(story: Story, tmp_path: Path) -> None:
    work = own(story, tmp_path)
    splits = work.splits()
    save_record(work.splits_path, splits[:1], list[type(splits[0])])  # type: ignore[misc]
    with pytest.raises(RunError, match=rf"no fold of splits.json validates {splits[0].train[0]}"):
        cascade.prepare(work, LOW, HIGH, device="cpu")
