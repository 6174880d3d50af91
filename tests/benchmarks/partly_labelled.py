"""Labels that half of the cases lack: a fold trained on partly annotated cases beside one trained on complete cases.

    python tests/benchmarks/partly_labelled.py --data DATA --scratch DIR [--steps 500] [--batch 2] [--seed 0]
        [--preset standard] [--untold]

DATA has images/, labels/ and a dataset.json with two labels. In the partly annotated data set every other case keeps the first
label and the others keep the second; what is taken away becomes background in the label file, and `labelled` in dataset.json says
what each case has. Both trainings have the same splits, steps, batch and seed; both are judged on the complete masks of the
validation cases of fold 0. With --untold a third training gets the same label files without being told what they lack.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from autoseg.datasets.description import describe_beside
from autoseg.files.images import read_label, split_ending, write_label
from autoseg.files.workspace import Workspace
from autoseg.stages.evaluate import evaluate
from autoseg.types.labels import Labels

STEPS_PER_EPOCH = 25
CONFIGURATION = "3d_fullres"
LIMIT = 0.03  # of Dice below complete annotation
LEARNED = 0.7  # Dice with complete annotation from which on a comparison says something


def make_partly(data: Path, out: Path, labels: Labels, told: bool) -> Path:
    """Write the partly annotated data set; its images are links."""
    (out / "labels").mkdir(parents=True)
    (out / "images").symlink_to((data / "images").resolve())
    kept = {}
    for number, path in enumerate(sorted((data / "labels").iterdir())):
        label = labels.foreground[number % 2]
        array, grid = read_label(path)
        write_label(out / "labels" / path.name, (array == label.value).astype(array.dtype) * label.value, grid)
        kept[split_ending(path.name)[0]] = [label.name]
    described = json.loads((data / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps({**described, **({"labelled": kept} if told else {})}))
    return out


def train(data: Path, work: Path, splits: Path | None, steps: int, batch: int, seed: int, preset: str) -> Path:
    """Plan and train fold 0; returns the folder of its validation masks."""
    autoseg = [sys.executable, "-m", "autoseg.cli"]
    subprocess.run([*autoseg, "plan", str(data), "--out", str(work)], check=True)
    if splits is not None:
        shutil.copy(splits, work / "splits.json")
    settings = [f"steps_per_epoch={STEPS_PER_EPOCH}", "val_steps=1", f"batch_size={batch}", f"seed={seed}"]
    epochs = str(max(1, steps // STEPS_PER_EPOCH))
    subprocess.run([
        *autoseg, "train", str(work), "--config", CONFIGURATION, "--folds", "0", "--epochs", epochs, "--preset", preset,
        *(part for setting in settings for part in ("--set", setting)),
    ], check=True)
    return work / "runs" / CONFIGURATION / "fold_0" / "validation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--untold", action="store_true")
    given = parser.parse_args()
    labels = describe_beside(given.data / "dataset.json")[0].labels
    assert labels is not None and len(labels.foreground) == 2, "dataset.json must declare two labels"
    shutil.rmtree(given.scratch, ignore_errors=True)
    work = {"complete": given.scratch / "complete"}
    options = (given.steps, given.batch, given.seed, given.preset)
    masks = {"complete": train(given.data, work["complete"], None, *options)}
    splits = work["complete"] / "splits.json"
    for name, told in (("partly", True), *((("untold", False),) if given.untold else ())):
        data = make_partly(given.data, given.scratch / f"data_{name}", labels, told)
        masks[name] = train(data, given.scratch / name, splits, *options)
    wanted = Workspace(given.scratch / "complete").splits()[0].val
    references = {split_ending(p.name)[0]: p for p in (given.data / "labels").iterdir()}
    found = {}
    for name, folder in masks.items():
        found[name] = evaluate(folder, {case: references[case] for case in wanted}, labels).mean
    length = f"{given.steps} steps at batch {given.batch}, preset {given.preset}"
    print(f"Dice of {len(wanted)} completely annotated validation cases after {length}")
    print(f"{'label':16}" + "".join(f"{name:>10}" for name in found) + f"{'difference':>12}")
    gaps, lowest = [], 1.0
    for label in labels.foreground:
        dice = [values[label.name]["dice"] or 0.0 for values in found.values()]
        gaps.append(dice[1] - dice[0])
        lowest = min(lowest, dice[0])
        print(f"{label.name:16}" + "".join(f"{value:10.4f}" for value in dice) + f"{gaps[-1]:+12.4f}")
    told = "trained too shortly to tell" if lowest < LEARNED else "yes" if min(gaps) >= -LIMIT else "no"
    print(f"each label within {LIMIT} of complete annotation: {told}")


if __name__ == "__main__":
    main()
