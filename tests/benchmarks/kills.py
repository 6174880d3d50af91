"""A training run that is killed at random moments ends with the very weights of a run that is left alone.

    python tests/benchmarks/kills.py [--kills 20] [--epochs 6] [--steps 40] [--seed 0] [--folder DIR]

A chest phantom is planned with a tiny network and trained on the CPU by the command line, fp32, one compute thread. First left
alone, with 0, 1 and 3 reading threads: losses and weights must be the same to the bit. Then with SIGKILL at random moments, each
time followed by the same command, until it has been killed so often; the last one is left alone. One kill in five falls anywhere
into the start of the process, the others anywhere into its training. A run that ends between two kills is compared and begun
anew. Checkpoints are written every few steps, so that kills fall into saving too. Prints for every kill how many steps were
saved, then whether the weights are the same; the exit code is 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = "runs/3d_fullres/fold_0"
OFTEN = """
import autoseg.stages.fold as fold
fold.CHECKPOINT_SECONDS, fold.CHECKPOINT_COST = 0.1, 0.0
import autoseg.cli
autoseg.cli.main()
"""


def command(work: Path, given: argparse.Namespace, threads: int) -> list[str]:
    """The training command, as a process that saves often."""
    settings = {"steps_per_epoch": given.steps, "val_steps": 2, "ema": 0.9}
    return [
        sys.executable, "-c", OFTEN, "train", str(work), "--config", "3d_fullres", "--folds", "0", "--epochs", str(given.epochs),
        "--threads", str(threads), "--precision", "fp32", "--device", "cpu",
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
    ]


def prepare(folder: Path) -> Path:
    """A planned and preprocessed phantom with a tiny network."""
    from autoseg.datasets.phantom import write_dataset

    write_dataset(folder / "data", "chest", 4, 2, 7, size=0.3)
    work = folder / "planned"
    autoseg = [sys.executable, "-m", "autoseg.cli"]
    subprocess.run([*autoseg, "plan", folder / "data", "--out", work], check=True, stdout=subprocess.DEVNULL)
    plan = json.loads((work / "plan.json").read_text())
    for entry in plan["configurations"].values():
        entry["features_per_stage"] = [4, 8, 16, 16, 16, 16][: len(entry["features_per_stage"])]
        entry["batch_size"] = 2
    (work / "plan.json").write_text(json.dumps(plan))
    subprocess.run([*autoseg, "preprocess", work], check=True, stdout=subprocess.DEVNULL)
    return work


def result(work: Path) -> tuple[bytes, list[object]]:
    """Final weights, and all rows of the metrics apart from times."""
    rows = [json.loads(line) for line in (work / RUN / "metrics.jsonl").read_text().splitlines()]
    told = [{key: value for key, value in row.items() if key not in ("seconds", "data_wait")} for row in rows]
    return (work / RUN / "weights.safetensors").read_bytes(), list(told)


def saved_step(work: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in (work / RUN / "resume").glob("step_*")), default=0)


def wait_for_training(child: subprocess.Popen[bytes], work: Path) -> None:
    """Wait until the process has saved a state of its own."""
    before = saved_step(work)
    while saved_step(work) == before and child.poll() is None:
        time.sleep(0.002)


def main() -> None:
    """Run it all; ends with exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40, help="steps of an epoch")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    planned = prepare(folder)
    alone: dict[int, tuple[bytes, list[object]]] = {}
    for threads in (0, 1, 3):
        work = Path(shutil.copytree(planned, folder / f"threads_{threads}"))
        begin = time.monotonic()
        child = subprocess.Popen(command(work, given, threads), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_training(child, work)
        start, first = time.monotonic() - begin, saved_step(work)
        while not (work / RUN / "weights.safetensors").exists() and child.poll() is None:
            time.sleep(0.01)
        pace = (time.monotonic() - begin - start) / (given.epochs * given.steps - first)
        assert child.wait() == 0, "the run that was left alone failed"
        alone[threads] = result(work)
    same_threads = all(found == alone[0] for found in alone.values())
    print(f"threads 0, 1, 3: {'the same' if same_threads else 'DIFFERENT'} losses and weights; "
          f"start {start:.1f} s, then {pace:.3f} s a step")

    work = Path(shutil.copytree(planned, folder / "killed"))
    moments = random.Random(given.seed)
    share = pace * given.epochs * given.steps / given.kills  # seconds of training between two kills, on average
    killed, same = 0, True
    while killed < given.kills:
        child = subprocess.Popen(command(work, given, killed % 3), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if killed % 5 == 0:
            time.sleep(moments.uniform(0, start))
            where = "starting"
        else:
            wait_for_training(child, work)
            time.sleep(moments.uniform(0, 2 * share))
            where = "training"
        child.kill()
        if child.wait() == -signal.SIGKILL:
            killed += 1
            print(f"kill {killed:2d} while {where}: {saved_step(work)} of {given.epochs * given.steps} steps saved")
        if (work / RUN / "weights.safetensors").exists():  # trained to the end between two kills: compared, then begun anew
            same = same and result(work) == alone[0]
            print(f"trained to the end after {killed} kills: {'the same' if same else 'DIFFERENT'}")
            shutil.rmtree(work / "runs")
    subprocess.run(command(work, given, 1), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    same = same and result(work) == alone[0]
    print(f"{killed} kills: weights and metrics {'bit-identical' if same else 'DIFFERENT'}")
    if not given.folder:
        shutil.rmtree(folder)
    sys.exit(0 if same and same_threads else 1)


if __name__ == "__main__":
    main()
