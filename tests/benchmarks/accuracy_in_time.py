"""Accuracy in equal time: ours and nnU-Net train one fold of a data set for the same minutes and are judged by one evaluator.

    python tests/benchmarks/accuracy_in_time.py --data DATA --peer VENV --scratch DIR [--minutes 20] [--only ours|peer]

Same splits file, patch and batch, on the same cores, one after the other; both schedules end at the last step. The number of
steps comes from a short measurement before each run. `VENV` is a virtual environment with nnunetv2 2.8.1 and a trainer
`nnUNetTrainerBench` whose length BENCH_EPOCHS, BENCH_STEPS, BENCH_VAL and BENCH_BATCH set. Data set: images/ and labels/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from autoseg.files.workspace import Workspace, save_record
from autoseg.stages.evaluate import evaluate, report_table

STEPS_PER_EPOCH = 25
CONFIGURATION = "3d_fullres"
NAME = "Dataset001_Bench"


def ours(data: Path, scratch: Path, minutes: float, batch: int) -> tuple[Path, int, float]:
    work = scratch / "ours"
    autoseg = [sys.executable, "-m", "autoseg.cli"]
    subprocess.run([*autoseg, "plan", str(data), "--out", str(work)], check=True)
    settings = ["--set", f"steps_per_epoch={STEPS_PER_EPOCH}", "--set", "val_steps=1", "--set", f"batch_size={batch}"]
    command = [*autoseg, "train", str(work), "--config", CONFIGURATION, "--folds", "0", *settings]

    def run(name: str, epochs: int) -> list[float]:
        subprocess.run([*command, "--name", name, "--epochs", str(epochs), "--restart"], check=True)
        lines = (work / "runs" / name / "fold_0" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["seconds"] for line in lines]

    epoch = statistics.median(run("calibration", 4)[1:])
    epochs = int(minutes * 60 / epoch)
    seconds = sum(run("measured", epochs))
    return work / "runs" / "measured" / "fold_0" / "validation", epochs * STEPS_PER_EPOCH, seconds


def prepare_peer(data: Path, venv: Path, root: Path, splits: Path) -> dict[str, str]:
    """Preprocess the data set with nnU-Net, unless it is; check that patches agree; return the environment it runs in."""
    raw, preprocessed, results = root / "raw", root / "preprocessed", root / "results"
    environment = {
        **os.environ, "nnUNet_raw": str(raw), "nnUNet_preprocessed": str(preprocessed), "nnUNet_results": str(results),
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
    }
    if not (preprocessed / NAME / "nnUNetPlans.json").exists():
        (raw / NAME / "imagesTr").mkdir(parents=True, exist_ok=True)
        (raw / NAME / "labelsTr").mkdir(parents=True, exist_ok=True)
        for image in sorted((data / "images").iterdir()):
            shutil.copy(image, raw / NAME / "imagesTr" / image.name.replace(".nii.gz", "_0000.nii.gz"))
            shutil.copy(data / "labels" / image.name, raw / NAME / "labelsTr" / image.name)
        description = json.loads((data / "dataset.json").read_text())
        wanted = ("channel_names", "labels", "file_ending", "numTraining")
        (raw / NAME / "dataset.json").write_text(json.dumps({key: description[key] for key in wanted}))
        command = [str(venv / "bin" / "nnUNetv2_plan_and_preprocess"), "-d", "1", "-c", CONFIGURATION, "-np", "2"]
        subprocess.run(command, check=True, env=environment)
    theirs = json.loads((preprocessed / NAME / "nnUNetPlans.json").read_text())["configurations"][CONFIGURATION]["patch_size"]
    planned = Workspace(splits.parent).plan().configurations[CONFIGURATION].patch_size
    assert tuple(theirs) == planned, f"the plans differ: {theirs} and {planned}"
    shutil.copy(splits, preprocessed / NAME / "splits_final.json")
    return environment


def peer(
    data: Path, venv: Path, scratch: Path, minutes: float, batch: int, splits: Path, workers: int
) -> tuple[Path, int, float]:
    environment = {
        **prepare_peer(data, venv, scratch / "peer", splits), "nnUNet_n_proc_DA": str(workers), "BENCH_BATCH": str(batch),
        "BENCH_STEPS": str(STEPS_PER_EPOCH), "BENCH_VAL": "1",
    }
    fold = scratch / "peer" / "results" / NAME / f"nnUNetTrainerBench__nnUNetPlans__{CONFIGURATION}" / "fold_0"

    def run(epochs: int) -> list[float]:
        shutil.rmtree(fold, ignore_errors=True)
        command = [str(venv / "bin" / "nnUNetv2_train"), "1", CONFIGURATION, "0", "-tr", "nnUNetTrainerBench", "-device", "cpu"]
        subprocess.run(command, check=True, env={**environment, "BENCH_EPOCHS": str(epochs)})
        log = next(fold.glob("training_log_*.txt")).read_text()
        return [float(found) for found in re.findall(r"Epoch time: ([0-9.]+) s", log)]

    epoch = statistics.median(run(4)[1:])
    epochs = int(minutes * 60 / epoch)
    seconds = sum(run(epochs))
    return fold / "validation", epochs * STEPS_PER_EPOCH, seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="augmentation workers of the peer (1 is best on 2 cores)")
    parser.add_argument("--only", choices=["ours", "peer"])
    given = parser.parse_args()
    results = {}
    if given.only != "peer":
        results["ours"] = ours(given.data, given.scratch, given.minutes, given.batch)
    if given.only != "ours":
        splits = Workspace(given.scratch / "ours").splits_path
        results["peer"] = peer(given.data, given.peer, given.scratch, given.minutes, given.batch, splits, given.workers)
    split = Workspace(given.scratch / "ours").splits()[0]
    references = {case: given.data / "labels" / f"{case}.nii.gz" for case in split.val}
    labels = Workspace(given.scratch / "ours").plan().labels
    for name, (masks, steps, seconds) in results.items():
        report = evaluate({case: masks / f"{case}.nii.gz" for case in split.val}, references, labels)
        save_record(given.scratch / f"{name}.json", report)
        print(f"\n{name}: {steps} steps in {seconds:.0f} s ({seconds / steps:.3f} s per step), {len(split.val)} validation cases")
        for row in report_table(report):
            print("  " + "  ".join(f"{cell:>14}" for cell in row))


if __name__ == "__main__":
    main()
