"""How long prediction takes and how much memory, beside nnU-Net with the same weights and tiles, both from the command line.

    python tests/benchmarks/predicting.py --peer VENV --scratch DIR --model FOLDER --images DIR
        [--rows few,many,ct] [--mirror no,yes] [--repeats 3] [--precision auto] [--threads 2]

`VENV` is a virtual environment with nnunetv2 2.8.1, `FOLDER` a trained nnU-Net results folder and `DIR` with images for it
(`_0000` names): row few takes 10 of them, many takes 60. Row ct is one CT of 120 x 256 x 256 with 25 classes and a thin network
(8 to 64 features), trained here once on drawn organs. Both are started anew each time, in turn; every row is the median of
`--repeats`. Time is wall clock; memory is the peak over the run of the sum over all processes, as resident (RSS, which counts
shared pages in each process) and proportional (PSS) memory. The gate comes first: the lowest share of voxels of a case that are
equal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

GATE = 0.998
CLASSES = 25
SPACING = (3.0, 1.5, 1.5)
PATCH = (40, 56, 40)


@dataclass(frozen=True)
class Cost:
    """Of one run: seconds, and bytes at the peak."""

    seconds: float
    rss: int
    pss: int


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, ValueError):
            continue
    return found


def memory(pid: int) -> tuple[int, int]:
    """RSS and PSS of a process tree, bytes."""
    sums = {"Rss": 0, "Pss": 0}
    for one in tree(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, rest = line.partition(":")
            if name in sums:
                sums[name] += 1024 * int(rest.split()[0])
    return sums["Rss"], sums["Pss"]


def run(command: Sequence[str], environment: dict[str, str], log: Path) -> Cost:
    begin, rss, pss = time.perf_counter(), 0, 0
    with log.open("a") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        while process.poll() is None:
            now = memory(process.pid)
            rss, pss = max(rss, now[0]), max(pss, now[1])
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed, see {log}")
    return Cost(time.perf_counter() - begin, rss, pss)


class Race:
    """One model and one folder of images for both."""

    def __init__(self, given: argparse.Namespace, name: str, folder: Path, images: Path) -> None:
        self.given, self.name, self.folder, self.images = given, name, folder, images
        self.scratch = given.scratch / name
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ, "OMP_NUM_THREADS": str(given.threads),
            **dict.fromkeys(("nnUNet_raw", "nnUNet_results", "nnUNet_preprocessed"), str(self.scratch)),
        }
        self.file = self.scratch / "model.autoseg"
        if not self.file.exists():
            from autoseg.stages.import_nnunet import import_nnunet

            import_nnunet(folder, self.file)

    def out(self, who: str, mirror: bool) -> Path:
        return self.scratch / f"{who}_{'mirrored' if mirror else 'plain'}"

    def ours(self, mirror: bool) -> Cost:
        out = self.out("ours", mirror)
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "autoseg.cli", "predict", str(self.file), str(self.images), "--out", str(out)]
        if Path(sys.executable).with_name("autoseg").exists():
            command[:3] = [str(Path(sys.executable).with_name("autoseg"))]
        command += ["--device", "cpu", "--precision", self.given.precision, *([] if mirror else ["--no-mirror"])]
        return run(command, self.environment, self.scratch / "ours.log")

    def peers(self, mirror: bool) -> Cost:
        out = self.out("peer", mirror)
        shutil.rmtree(out, ignore_errors=True)
        folds = [path.name.removeprefix("fold_") for path in self.folder.glob("fold_*")]
        command = [str(self.given.peer / "bin" / "nnUNetv2_predict_from_modelfolder"), "-i", str(self.images), "-o", str(out),
                   "-m", str(self.folder), "-f", *folds, "-device", "cpu", *([] if mirror else ["--disable_tta"])]
        return run(command, self.environment, self.scratch / "peer.log")

    def agreement(self, mirror: bool) -> float:
        shares = []
        for path in sorted(self.out("peer", mirror).glob("*.nii.gz")):
            theirs, ours = (sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in (path, self.out("ours", mirror) / path.name))
            shares.append(float((theirs == ours).mean()))
        return min(shares)

    def row(self, mirror: bool) -> str:
        ours, peers = [], []
        for _ in range(self.given.repeats):
            ours.append(self.ours(mirror))
            peers.append(self.peers(mirror))
        equal = self.agreement(mirror)
        a, b = ([statistics.median(values) for values in zip(*((c.seconds, c.rss, c.pss) for c in costs), strict=True)]
                for costs in (ours, peers))
        gate = "passes" if equal >= GATE else "FAILS"
        parts = [f"{self.name:<6}{'yes' if mirror else 'no':>7}  {100 * equal:9.4f} {gate:>6}"]
        parts += [f"{x / unit:8.2f} {y / unit:8.2f} {x / y:6.2f}" for x, y, unit in zip(a, b, (1, 2**30, 2**30), strict=True)]
        return "  ".join(parts)


def draw_ct(shape: tuple[int, int, int], seed: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """A CT with 24 drawn organs, each with its own density, and their labels."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    coarse = rng.normal(size=(6, 8, 8)).astype(np.float32)
    bend = ndimage.zoom(coarse, [n / m for n, m in zip(shape, coarse.shape, strict=True)], order=1)
    label = np.zeros(shape, np.uint8)
    body = ((axes[1] / shape[1] - 0.5) / 0.42) ** 2 + ((axes[2] / shape[2] - 0.5) / 0.46) ** 2 < 1  # (1, y, x)
    for organ in range(1, CLASSES):
        centre = rng.uniform([0.05, 0.22, 0.2], [0.95, 0.78, 0.8]) * shape
        radius = rng.uniform(0.05, 0.11, 3) * [shape[0] * 2, shape[1], shape[2]]
        inside = sum(((a - float(c)) / float(r)) ** 2 for a, c, r in zip(axes, centre, radius, strict=True)) + 0.25 * bend < 1
        label[inside & body] = organ
    means = np.concatenate([[-30.0], -500 + 60.0 * np.arange(CLASSES - 1)])
    image = np.empty(shape, np.int16)
    for z in range(shape[0]):
        image[z] = np.clip(np.where(body[0], means[label[z]], -1000) + rng.normal(0, 12, shape[1:]), -1024, 2000)
    return image, label


def save(array: NDArray[Any], path: Path, spacing: tuple[float, float, float]) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(path))


def plans_for(model: Path, patch: Sequence[int], classes: int, spacing: Sequence[float], configuration: str) -> tuple[Any, Any]:
    """The plans and data set of a trained model, made those of a thin network for CT."""
    plans, dataset = (json.loads((model / name).read_text()) for name in ("plans.json", "dataset.json"))
    one = plans["configurations"][configuration]
    network, stages = one["architecture"]["arch_kwargs"], 4
    for key, value in network.items():
        if isinstance(value, list) and len(value) == network["n_stages"]:
            network[key] = value[:stages]
    network |= {"n_stages": stages, "features_per_stage": [8 * 2**stage for stage in range(stages)],
                "n_conv_per_stage_decoder": [2] * (stages - 1), "strides": [[1] * 3, *[[2] * 3] * (stages - 1)],
                "kernel_sizes": [[3] * 3] * stages}
    one |= {"patch_size": list(patch), "batch_size": 2, "spacing": list(spacing), "normalization_schemes": ["CTNormalization"],
            "use_mask_for_norm": [False]}
    plans["transpose_forward"] = plans["transpose_backward"] = [0, 1, 2]
    plans["foreground_intensity_properties_per_channel"] = {"0": {
        "max": 1000.0, "mean": 150.0, "median": 150.0, "min": -600.0, "percentile_00_5": -600.0, "percentile_99_5": 1000.0,
        "std": 400.0}}
    dataset |= {"channel_names": {"0": "CT"}, "labels": {"background": 0, **{f"organ{i}": i for i in range(1, classes)}}}
    dataset.pop("regions_class_order", None)
    return plans, dataset


def teach(network: Any, steps: int, classes: int, patch: tuple[int, int, int]) -> None:
    """Train on drawn organs, so that its answers are as decided as those of a network in use."""
    import torch

    image, label = draw_ct((96, 160, 160), 1)
    values = torch.from_numpy((image.astype(np.float32).clip(-600, 1000) - 150) / 400)
    truth = torch.from_numpy(label.astype(np.int64))
    optimizer, rng = torch.optim.Adam(network.parameters(), 3e-3), np.random.default_rng(0)
    weight = 1 / torch.bincount(truth.ravel(), minlength=classes).float().clamp_min(1).sqrt()
    for step in range(steps):
        corners = [rng.integers(0, [s - p + 1 for s, p in zip(truth.shape, patch, strict=True)]) for _ in range(2)]
        boxes = [tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True)) for corner in corners]
        x, y = torch.stack([values[box] for box in boxes])[:, None], torch.stack([truth[box] for box in boxes])
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)[0]
        loss = torch.nn.functional.cross_entropy(logits.float(), y, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for one in optimizer.param_groups:
            one["lr"] = 3e-3 * (1 - step / steps)
        if step % 50 == 0:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)


def thin_model(folder: Path, like: Path, steps: int, classes: int = CLASSES, patch: tuple[int, int, int] = PATCH,
               spacing: tuple[float, float, float] = SPACING) -> None:
    """A results folder as nnU-Net writes it, with a thin network; with steps > 0 it is trained on drawn organs."""
    import torch

    from autoseg.networks.build import build
    from autoseg.networks.describe import describe
    from autoseg.stages.import_nnunet import read_source
    from autoseg.stages.nnunet_plan import make_plan
    from autoseg.stages.nnunet_weights import foreign_names

    name = like.name.rpartition("__")[2]
    folder.mkdir(parents=True)
    plans, dataset = plans_for(like, patch, classes, spacing, name)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    configuration = make_plan(read_source(folder), {name: ()}).configurations[name]
    network = build(describe(configuration, 1, classes), seed=0)
    if steps:
        teach(network, steps, classes, patch)
    own, state = network.state_dict(), {}
    for ours, theirs in foreign_names(network.description).items():
        state[theirs] = own[ours]
        head, _, kind = theirs.rpartition(".")
        if head.endswith((".conv", ".norm")):
            state[f"{head[:-5]}.all_modules.{0 if head.endswith('.conv') else 1}.{kind}"] = own[ours]
    state |= {f"decoder.{key}": value for key, value in state.items() if key.startswith("encoder.")}
    (folder / "fold_0").mkdir()
    torch.save({
        "network_weights": state, "optimizer_state": {}, "grad_scaler_state": None, "logging": {}, "_best_ema": 0.0,
        "current_epoch": 1, "trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": (0, 1, 2),
        "init_args": {"plans": {}, "configuration": name, "fold": 0, "dataset_json": {}, "device": torch.device("cpu")},
    }, folder / "fold_0" / "checkpoint_final.pth")


def ct_race(given: argparse.Namespace) -> Race:
    folder = given.scratch / "thin" / given.model.name
    images = given.scratch / "ct_images"
    if not (folder / "fold_0" / "checkpoint_final.pth").exists():
        shutil.rmtree(folder, ignore_errors=True)
        thin_model(folder, given.model, given.steps)
    if not images.exists():
        images.mkdir(parents=True)
        save(draw_ct((120, 256, 256), 2)[0], images / "ct_0000.nii.gz", SPACING)
    return Race(given, "ct", folder, images)


def folder_race(given: argparse.Namespace, name: str, count: int) -> Race:
    images = given.scratch / f"{name}_images"
    if not images.exists():
        images.mkdir(parents=True)
        found = sorted(given.images.glob("*.nii.gz"))
        for path in found[:count]:
            stem = path.name.removesuffix(".nii.gz")
            shutil.copy(path, images / (path.name if stem.endswith("_0000") else f"{stem}_0000.nii.gz"))
    return Race(given, name, given.model, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rows", default="few,many,ct")
    parser.add_argument("--mirror", default="no,yes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", type=int, default=300, help="of training the thin network")
    given = parser.parse_args()
    heads = [f"{'ours ' + unit:>8} {'peer ' + unit:>8} {'ratio':>6}" for unit in ("s", "RSS", "PSS")]
    print("  ".join([f"{'row':<6}{'mirror':>7}  {'equal %':>9} {'gate':>6}", *heads]), "(memory in GiB)", flush=True)
    for row in given.rows.split(","):
        race = ct_race(given) if row == "ct" else folder_race(given, row, {"few": 10, "many": 60}[row])
        for mirror in given.mirror.split(","):
            print(race.row(mirror == "yes"), flush=True)


if __name__ == "__main__":
    main()
