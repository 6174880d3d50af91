"""Do imported nnU-Net models give nnU-Net's masks? Small models are trained with the peer and predicted by both.

    python tests/benchmarks/import_parity.py --peer VENV --scratch DIR [--only plain,flat,...] [--steps 200]

`VENV` is a virtual environment with nnunetv2 2.8.1 and a trainer `nnUNetTrainerBench`, whose length BENCH_EPOCHS, BENCH_STEPS
and BENCH_VAL set. What is there already in DIR (data, trained models, the peer's masks) is used. Every row says for one model,
with and without mirroring: voxels equal, the lowest Dice of classes of 10,000 voxels or more in a case, the largest number of
voxels that differ in smaller ones. Ours runs at fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.files.images import read_case
from autoseg.logs import Silent
from autoseg.stages.import_nnunet import import_nnunet
from autoseg.stages.models import open_model
from autoseg.stages.predict import Options

LARGE = 10_000  # voxels of a class in a case, from which on Dice is asked for
TRAINER = "nnUNetTrainerBench"
OBLIQUE = (0.9800665778, 0.1986693308, 0.0, -0.1986693308, 0.9800665778, 0.0, 0.0, 0.0, 1.0)
DIRECTIONS = ((1, 0, 0, 0, 1, 0, 0, 0, 1), (-1, 0, 0, 0, -1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 0, 1, 0), OBLIQUE)


@dataclass(frozen=True)
class Scene:
    """One data set and the model trained on it."""

    number: int
    configuration: str = "3d_fullres"
    planner: str = "ExperimentPlanner"
    plans: str = "nnUNetPlans"
    channels: tuple[str, ...] = ("MR",)
    labels: dict[str, Any] = field(default_factory=lambda: {"background": 0, "body": 1, "core": 2, "rim": 3})
    order: tuple[int, ...] = ()
    size: tuple[int, int, int] = (60, 72, 64)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    jitter: float = 0.0
    zero_outside: bool = False
    folds: tuple[int, ...] = (0,)
    patch: tuple[int, ...] = (32, 32, 32)
    edit: Callable[[dict[str, Any], dict[str, Any]], None] = lambda plans, configuration: None


def _torch_resampling(plans: dict[str, Any], configuration: dict[str, Any]) -> None:
    for name in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{name}"] = "resample_torch_fornnunet"
        configuration[f"resampling_fn_{name}_kwargs"] = {
            "is_seg": name == "seg", "force_separate_z": None, "memefficient_seg_resampling": False
        }


def _reoriented(plans: dict[str, Any], configuration: dict[str, Any]) -> None:
    plans["image_reader_writer"] = "NibabelIOWithReorient"


REGIONS = {"background": 0, "whole": [1, 2, 3], "inner": [2, 3], "rim": [3]}
SCENES = {
    "plain": Scene(1, size=(60, 72, 64), jitter=0.2),
    "flat": Scene(2, configuration="2d", patch=(64, 48), jitter=0.1),
    "residual": Scene(3, planner="nnUNetPlannerResEncM", plans="nnUNetResEncUNetMPlans", jitter=0.1, folds=(0, 1)),
    "regions": Scene(4, channels=("T1", "T2"), labels=REGIONS, order=(1, 2, 3), zero_outside=True),
    "ct": Scene(5, channels=("CT",), spacing=(2.0, 0.8, 0.8), size=(44, 96, 96), jitter=0.25),
    "anisotropic": Scene(6, spacing=(1.0, 5.0, 1.0), size=(80, 18, 90), jitter=0.15, patch=(8, 40, 40)),
    "rescaled": Scene(7, channels=("rescale_to_0_1", "noNorm"), jitter=0.1),
    "torch": Scene(8, jitter=0.3, edit=_torch_resampling),
    "reoriented": Scene(9, jitter=0.2, edit=_reoriented),
}


def draw(scene: Scene, index: int) -> tuple[list[sitk.Image], sitk.Image]:
    """A case: blobs inside one another with soft texture and noise, on a grid of its own."""
    rng = np.random.default_rng([scene.number, index])
    factor = rng.uniform(1 - scene.jitter, 1 + scene.jitter, 3)
    spacing = tuple(float(s * f) for s, f in zip(scene.spacing, factor, strict=True))
    shape = tuple(max(8, round(n / f)) for n, f in zip(scene.size, factor, strict=True))
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    bend = ndimage.zoom(rng.normal(size=(5, 5, 5)), [n / 5 for n in shape], order=3, grid_mode=True, mode="nearest")[
        : shape[0], : shape[1], : shape[2]]
    centre = rng.uniform(-0.15, 0.15, 3)
    radius = np.sqrt(sum((a - c) ** 2 / r**2 for a, c, r in zip(axes, centre, rng.uniform(0.6, 0.85, 3), strict=True)))
    radius = radius + 0.06 * bend
    small = np.sqrt(sum((a - c) ** 2 for a, c in zip(axes, centre + rng.uniform(-0.15, 0.15, 3), strict=True))) + 0.03 * bend
    label = np.where(radius < 1, 1, 0).astype(np.uint8)
    label[(radius < 0.62)] = 2
    label[small < 0.22] = 3
    images = []
    for channel, name in enumerate(scene.channels):
        means = np.array([20.0, 90.0, 150.0, 210.0]) if channel == 0 else np.array([30.0, 160.0, 100.0, 60.0])
        image = ndimage.gaussian_filter(means[label], 0.7) + 8 * bend + rng.normal(0, 14, shape)
        if name == "CT":
            image = image * 4 - 300
        if scene.zero_outside:
            image = np.where(radius < 1.25, np.maximum(image, 1), 0)
        images.append(_placed(image.astype(np.float32), spacing, index))
    return images, _placed(label, spacing, index)


def _placed(array: NDArray[Any], spacing: tuple[float, ...], index: int) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetDirection([float(v) for v in DIRECTIONS[index % len(DIRECTIONS)]])
    image.SetOrigin((11.0, -7.5 * index, 30.0))
    return image


class Peer:
    """nnU-Net's folders and commands for one scene."""

    def __init__(self, venv: Path, scratch: Path, scene: Scene, steps: int) -> None:
        self.scene, self.venv, self.root = scene, venv, scratch
        self.name = f"Dataset{scene.number:03d}_Parity"
        self.environment = {
            **os.environ, "nnUNet_raw": str(scratch / "raw"), "nnUNet_preprocessed": str(scratch / "preprocessed"),
            "nnUNet_results": str(scratch / "results"), "PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "nnUNet_n_proc_DA": "1",
            "OMP_NUM_THREADS": "1", "BENCH_EPOCHS": "2", "BENCH_STEPS": str(steps // 2), "BENCH_VAL": "1",
            "nnUNet_def_n_proc": "1",
        }

    @property
    def model(self) -> Path:
        return self.root / "results" / self.name / f"{TRAINER}__{self.scene.plans}__{self.scene.configuration}"

    @property
    def test_images(self) -> Path:
        return self.root / "raw" / self.name / "imagesTs"

    def _call(self, command: str, *arguments: str) -> None:
        log = self.root / f"{self.name}.log"
        with log.open("a") as file:
            done = subprocess.run([str(self.venv / "bin" / command), *arguments], env=self.environment, stdout=file, stderr=file)
        if done.returncode:
            raise SystemExit(f"{command} failed, see {log}")

    def make_data(self, training: int = 6, test: int = 2) -> None:
        raw = self.root / "raw" / self.name
        if (raw / "dataset.json").exists():
            return
        for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (raw / folder).mkdir(parents=True, exist_ok=True)
        for index in range(training + test):
            part = "Tr" if index < training else "Ts"
            images, label = draw(self.scene, index)
            for channel, image in enumerate(images):
                sitk.WriteImage(image, str(raw / f"images{part}" / f"case{index}_{channel:04d}.nii.gz"))
            sitk.WriteImage(label, str(raw / f"labels{part}" / f"case{index}.nii.gz"))
        (raw / "dataset.json").write_text(json.dumps({
            "channel_names": {str(i): name for i, name in enumerate(self.scene.channels)}, "labels": self.scene.labels,
            "numTraining": training, "file_ending": ".nii.gz",
            **({"regions_class_order": list(self.scene.order)} if self.scene.order else {}),
        }))

    def train(self) -> None:
        scene, number = self.scene, str(self.scene.number)
        if not (self.model / f"fold_{scene.folds[-1]}" / "checkpoint_final.pth").exists():
            self._call("nnUNetv2_plan_and_preprocess", "-d", number, "-pl", scene.planner, "--no_pp", "-npfp", "1")
            self._shrink(self.root / "preprocessed" / self.name / f"{scene.plans}.json")
            self._call("nnUNetv2_preprocess", "-d", number, "-plans_name", scene.plans, "-c", scene.configuration, "-np", "1")
            for fold in scene.folds:
                self._train_fold(fold)

    def _train_fold(self, fold: int) -> None:
        """Train, and end the command when it begins to predict the validation cases, which nobody asks for."""
        scene, begun = self.scene, self.model / f"fold_{fold}" / "validation"
        command = [str(self.venv / "bin" / "nnUNetv2_train"), str(scene.number), scene.configuration, str(fold), "-tr", TRAINER,
                   "-p", scene.plans, "-device", "cpu"]
        with (self.root / f"{self.name}.log").open("a") as file:
            process = subprocess.Popen(command, env=self.environment, stdout=file, stderr=file, start_new_session=True)
            while process.poll() is None and not begun.exists():
                time.sleep(0.5)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        if not (self.model / f"fold_{fold}" / "checkpoint_final.pth").exists():
            raise SystemExit(f"training failed, see {self.root / self.name}.log")

    def _shrink(self, path: Path) -> None:
        """Small patches and few features, so that training takes a minute."""
        plans = json.loads(path.read_text())
        configuration = plans["configurations"][self.scene.configuration]
        network = configuration["architecture"]["arch_kwargs"]
        depth = int(math.log2(min(size for size in self.scene.patch if size > 8))) - 2
        kept = min(depth + 1, network["n_stages"])
        for key, value in network.items():
            if isinstance(value, list) and len(value) == network["n_stages"]:
                network[key] = value[:kept]
        network |= {"n_stages": kept, "features_per_stage": [8 * 2**stage for stage in range(kept)],
                    "n_conv_per_stage_decoder": network["n_conv_per_stage_decoder"][: kept - 1]}
        configuration |= {"patch_size": list(self.scene.patch), "batch_size": 2 if len(self.scene.patch) == 3 else 8}
        self.scene.edit(plans, configuration)
        path.write_text(json.dumps(plans))

    def predict(self, mirror: bool) -> Path:
        out = self.root / "peer" / self.name / ("mirrored" if mirror else "plain")
        if not list(out.glob("*.nii.gz")):
            self._call(
                "nnUNetv2_predict", "-i", str(self.test_images), "-o", str(out), "-d", str(self.scene.number),
                "-c", self.scene.configuration, "-p", self.scene.plans, "-tr", TRAINER, "-f", *map(str, self.scene.folds),
                "-device", "cpu", "-npp", "0", "-nps", "0", *(() if mirror else ("--disable_tta",)))
        return out


@dataclass
class Agreement:
    """Of one model over all test cases."""

    equal: list[float] = field(default_factory=list)
    dice: list[float] = field(default_factory=list)
    small: list[int] = field(default_factory=list)
    truth: list[float] = field(default_factory=list)

    def add(self, ours: NDArray[Any], theirs: NDArray[Any], truth: NDArray[Any]) -> None:
        self.equal.append(float((ours == theirs).mean()))
        for label in np.union1d(np.unique(ours), np.unique(theirs)):
            a, b = ours == label, theirs == label
            if label and max(int(a.sum()), int(b.sum())) >= LARGE:
                self.dice.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()))
            elif label:
                self.small.append(int((a ^ b).sum()))
        for label in np.unique(truth)[1:]:
            a, b = theirs == label, truth == label
            self.truth.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()))

    def row(self) -> str:
        dice = f"{min(self.dice):.6f}" if self.dice else "-"
        small = f"{max(self.small)}" if self.small else "-"
        return f"{100 * min(self.equal):10.4f} {dice:>10} {small:>6} {np.mean(self.truth):8.3f}"


def compare(peer: Peer, file: Path, mirror: bool) -> Agreement:
    model = open_model(file, Options(device="cpu", precision="fp32", mirror=mirror))
    result, theirs = Agreement(), peer.predict(mirror)
    for path in sorted(theirs.glob("*.nii.gz")):
        stem = path.name.removesuffix(".nii.gz")
        images = sorted(peer.test_images.glob(f"{stem}_*.nii.gz"))
        ours = model.predict_image(read_case(images)).label_zyx
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(peer.test_images.parent / "labelsTs" / path.name)))
        result.add(ours, sitk.GetArrayFromImage(sitk.ReadImage(str(path))), truth)
    return result


class Printed(Silent):
    """Tells what the import says."""

    def info(self, message: str) -> None:
        print(f"    {message}")

    def warn(self, message: str) -> None:
        print(f"    warning: {message}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SCENES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prepare", action="store_true", help="only train, and predict with the peer")
    given = parser.parse_args()
    rows = []
    for name in given.only.split(","):
        peer = Peer(given.peer, given.scratch, SCENES[name], given.steps)
        peer.make_data()
        peer.train()
        if given.prepare:
            print(name, peer.predict(True), peer.predict(False), flush=True)
            continue
        print(name)
        file = given.scratch / "models" / f"{name}.autoseg"
        file.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        import_nnunet(peer.model, file, reporter=Printed())
        for mirror in (True, False):
            rows.append(f"{name:<14}{'yes' if mirror else 'no':>6} {compare(peer, file, mirror).row()}")
    if rows:
        print(f"{'model':<14}{'mirror':>6} {'equal %':>10} {'Dice':>10} {'small':>6} {'of truth':>8}")
        print("\n".join(rows))


if __name__ == "__main__":
    main()
