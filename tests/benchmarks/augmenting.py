"""The default augmentation against nnU-Net's, in alternation, on one thread; equal results and distributions checked first.

    OMP_NUM_THREADS=1 python tests/benchmarks/augmenting.py --peer PEER/bin/python [--sizes 128,128,128 40,56,40] [--labels 5]
        [--rounds 5] [--samples 40] [--draws 10000] [--without-gate]

PEER is an environment with nnunetv2, whose `get_training_transforms` is what runs there (batchgeneratorsv2). Theirs is given the
crop that their loader cuts (205³ for 128³), ours the box that ours reads; neither's reading is counted. A round augments SAMPLES
samples with drawn parameters; the first round of both, in which things are compiled and tried out, is not counted. Parts: theirs
are timed inside the pipeline (spatial: resampling or cropping, and mirroring; intensity: the rest), ours by applying only one
part of the drawn parameters, so that copies count in both. Shown are medians over rounds of the mean time of a sample.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp

from autoseg.arrays.cascade import morph
from autoseg.trainers.augment import AugmentParams, DefaultAugmentation, Step, source_box
from autoseg.trainers.augment.default import rotation_about
from autoseg.trainers.augment.spatial import compiled

CLOSE, AGREE, ALPHA = 1e-4, 0.999, 1e-4
VALUES: dict[str, tuple[tuple[float, ...], ...]] = {
    "blur": ((0.5, 0.7, 1.0), (0.58, 0.59, 0.92)), "brightness": ((0.8,), (1.2,)), "contrast": ((0.8,), (1.2,)),
    "low_resolution": ((0.5,), (0.77,), (0.95,)), "gamma": ((0.7,), (1.5,)), "gamma_inverted": ((0.7,), (1.5,)),
}

PEER = """
import json, math, sys, time
import numpy as np, torch
torch.set_num_threads(1)
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import (binary_closing_torch, binary_dilation_torch,
    binary_erosion_torch, binary_opening_torch)
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from skimage.morphology import ball
folder, ANGLE = sys.argv[1], math.radians(30)
NAMES = ["spatial", "noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma", "mirror", "label"]

def pipeline(patch):
    composed = nnUNetTrainer.get_training_transforms(tuple(patch), (-ANGLE, ANGLE), None, (0, 1, 2), False)
    return dict(zip(NAMES, composed.transforms, strict=True))

def crop_size(patch):
    return [int(i) for i in get_patch_size(tuple(patch), *[(-ANGLE, ANGLE)] * 3, (0.85, 1.25))]

def bare(transform):
    return transform.transform if isinstance(transform, RandomTransform) else transform

def given(name, values):
    one, first = torch.tensor(values[:1]), torch.tensor([0])
    return {"blur": lambda: {"apply_to_channel": torch.tensor([True]), "sigmas": [values]},
            "low_resolution": lambda: {"apply_to_channel": first, "scales": one.expand(1, 3)},
            "gamma": lambda: {"apply_to_channel": first, "retain_stats": [True], "invert_image": [False], "gamma": one},
            "gamma_inverted": lambda: {"apply_to_channel": first, "retain_stats": [True], "invert_image": [True], "gamma": one},
            }.get(name, lambda: {"apply_to_channel": first, "multipliers": one})()

def apply(request):
    image = torch.from_numpy(np.load(folder + "/image.npy"))[None]
    name, values = request["name"], request["values"]
    if name == "spatial":
        label = torch.from_numpy(np.load(folder + "/label.npy"))[None]
        transform = SpatialTransform(tuple(request["patch"]), 0, False, p_rotation=1, p_scaling=1, scaling=values[-1],
            rotation=lambda image, dim: values[dim], p_synchronize_scaling_across_axes=1, border_mode_seg="constant",
            padding_value_seg=-1)
        params = transform.get_parameters(image=image)
        np.save(folder + "/new_label.npy", transform._apply_to_segmentation(label, **params)[0].numpy())
        result = transform._apply_to_image(image, **params)
    elif name == "noise":
        result = bare(pipeline(request["patch"])[name])._apply_to_image(
            image, apply_idx=torch.tensor([0]), num_apply=1, sigmas=values[0])
    elif name in ("dilate", "erode", "open", "close"):
        mask = torch.from_numpy(np.load(folder + "/label.npy")) == 1
        change = {"dilate": binary_dilation_torch, "erode": binary_erosion_torch, "open": binary_opening_torch,
                  "close": binary_closing_torch}[name]
        result = change(mask, torch.from_numpy(ball(values[0], dtype=bool)))[None]
    else:
        result = bare(pipeline(request["patch"])[name])._apply_to_image(image, **given(name, values))
    np.save(folder + "/result.npy", result[0].numpy())
    return {}

def draw(request):
    image, found = torch.zeros(2, 4, 4, 4), {}
    for name, transform in pipeline((4, 4, 4)).items():
        values = []
        for _ in range(request["draws"]):
            if isinstance(transform, RandomTransform) and not transform.get_parameters()["apply_transform"]:
                continue
            params = bare(transform).get_parameters(image=image)
            if name == "spatial" and params["affine"] is not None:
                values.append(params["affine"].ravel().tolist())
            elif name == "noise":
                values.append([float(params["sigmas"])])
            elif name == "blur":
                values.append([float(s) for row in params["sigmas"] for s in row])
            elif name == "low_resolution":
                values.append([float(row[0]) for row in params["scales"]])
            elif name == "mirror":
                values.append(list(params["axes"]))
            elif name not in ("spatial", "label"):
                values.append([float(v) for v in params["gamma" if "gamma" in name else "multipliers"]])
        found[name] = values
    return found

def timing(request):
    if request["patch"] != cached.get("patch"):
        cached.update(patch=request["patch"], transforms=pipeline(request["patch"]))
        for sigma in (0.5, 0.7, 1.0):  # it tries out two ways for every kernel when it first meets it
            bare(cached["transforms"]["blur"])._apply_to_image(torch.rand(1, *request["patch"]), **given("blur", [sigma] * 3))
    image, label = (np.load(folder + f"/{name}.npy", mmap_mode="r") for name in ("image", "label"))
    cut = tuple(slice((s - n) // 2, (s - n) // 2 + n) for s, n in zip(image.shape, crop_size(request["patch"])))
    parts = {"spatial": [], "intensity": []}
    for _ in range(request["samples"]):
        data = {"image": torch.from_numpy(image[cut].copy())[None], "segmentation": torch.from_numpy(label[cut].copy())[None]}
        spent = {"spatial": 0.0, "intensity": 0.0}
        for name, transform in cached["transforms"].items():
            begin = time.perf_counter()
            data = transform(**data)
            spent["spatial" if name in ("spatial", "mirror", "label") else "intensity"] += time.perf_counter() - begin
        for part, seconds in spent.items():
            parts[part].append(seconds)
    return parts

cached = {}
for line in sys.stdin:
    request = json.loads(line)
    answer = {"apply": apply, "draw": draw, "timing": timing, "crop": lambda r: crop_size(r["patch"])}[request["what"]](request)
    print("ANSWER " + json.dumps(answer), flush=True)
"""


class Peer:
    """The other side, one process that answers one request after the other."""

    def __init__(self, python: str, folder: Path) -> None:
        self.folder = folder
        (folder / "peer.py").write_text(PEER)
        command = ["env", "OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1", python, str(folder / "peer.py"), str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str, **request: Any) -> Any:
        """The answer to one request."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"what": what, **request}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line[7:])
        raise SystemExit("the peer ended")

    def apply(self, name: str, values: tuple[float, ...], patch: tuple[int, ...]) -> NDArray[Any]:
        """What it makes of the stored image."""
        self.ask("apply", name=name, values=values, patch=patch)
        return np.load(self.folder / "result.npy")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def scene(folder: Path, size: tuple[int, ...], labels: int) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """A smooth image with noise and a map of `labels` labels with background, stored for the peer as well."""
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.standard_normal(size).astype(np.float32), 4)
    cuts = np.quantile(smooth[(slice(None, None, 4),) * len(size)], [0.5 + 0.5 * (i + 0.4) / labels for i in range(labels)])
    label = np.digitize(smooth, cuts).astype(np.int16)
    image = smooth / smooth.std() + 0.3 * rng.standard_normal(size).astype(np.float32)
    np.save(folder / "image.npy", image)
    np.save(folder / "label.npy", label)
    return image, label


def make(patch: tuple[int, int, int], channels: int = 1) -> DefaultAugmentation:
    """The augmentation of an isotropic 3D configuration."""
    return DefaultAugmentation(patch, channels, False, np.radians(30), (0, 1, 2))


def check_transforms(peer: Peer, labels: int) -> bool:
    """Each transform with given parameters: prints the largest difference, or the share of labels that agree."""
    patch, good = (64, 64, 64), True
    size = tuple(peer.ask("crop", patch=patch))
    image, label = scene(peer.folder, size, labels)
    centre, augmentation = (np.asarray(size) - 1) / 2, make(patch)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        angles, factor = rng.uniform(-0.52, 0.52, 3), rng.uniform(0.7, 1.4)
        matrix = rotation_about(2, angles[2]) @ rotation_about(1, -angles[1]) @ rotation_about(0, angles[0]) * factor
        theirs = peer.apply("spatial", (*angles, factor), patch)
        ours = augmentation.apply(
            torch.from_numpy(image)[None], torch.from_numpy(label), centre, AugmentParams(matrix), (False,)
        )
        offsets = np.stack(np.meshgrid(*[np.arange(s) - (s - 1) / 2 for s in patch], indexing="ij"))
        points = np.einsum("ab,bzyx->azyx", matrix, offsets) + centre[:, None, None, None]
        inside = ((points >= 0) & (points <= np.reshape(np.asarray(size) - 1, (3, 1, 1, 1)))).all(0)
        difference = float(np.abs(theirs - ours[0][0].numpy())[inside].max())
        same = float((np.load(peer.folder / "new_label.npy") == ours[1].numpy())[inside].mean())
        print(f"  spatial, scaled by {factor:.2f}: image differs by {difference:.1e}, {same:.5%} of labels agree "
              f"({inside.mean():.1%} of the patch inside the crop)")
        good &= difference <= CLOSE and same >= AGREE
    good &= check_plane(peer, labels)
    image, _ = scene(peer.folder, patch, labels)
    theirs, given = peer.apply("noise", (0.08,), patch) - image, torch.from_numpy(image)[None]
    steps = (Step("noise", ((0.08,),), 1),)
    ours = augmentation.apply(given, torch.zeros(patch, dtype=torch.int16), centre, AugmentParams(steps=steps), (False,))[0]
    added = ours[0].numpy() - image
    test = ks_2samp(added.ravel(), theirs.ravel())
    print(f"  noise of 0.08: deviation {added.std():.4f} and {theirs.std():.4f}, KS p {test.pvalue:.3f}")
    good &= bool(test.pvalue > ALPHA)
    for name, several in VALUES.items():
        for values in several:
            step = Step(name, (values,))  # type: ignore[arg-type]
            nothing, params = torch.zeros(patch, dtype=torch.int16), AugmentParams(steps=(step,))
            ours = augmentation.apply(torch.from_numpy(image)[None], nothing, centre, params, (False,))
            difference = float(np.abs(peer.apply(name, values, patch) - ours[0][0].numpy()).max())
            print(f"  {name} {values}: differs by {difference:.1e}")
            good &= difference <= CLOSE
    mask = torch.from_numpy(np.load(peer.folder / "label.npy") == 1)
    for name in ("dilate", "erode", "open", "close"):
        for radius in (1, 3, 8):
            same = float((peer.apply(name, (radius,), patch) == morph(mask, name, radius).numpy())[8:-8, 8:-8, 8:-8].mean())
            print(f"  {name} by {radius}: {same:.5%} agree")
            good &= same >= AGREE
    return good


def check_plane(peer: Peer, labels: int) -> bool:
    """The same for a 2D patch."""
    size, patch, good = (120, 120), (96, 80), True
    image, label = scene(peer.folder, size, labels)
    augmentation = DefaultAugmentation((1, *patch), 1, True, np.pi, (1, 2))
    for angle, factor in ((0.4, 0.8), (-2.0, 1.0)):
        matrix = rotation_about(0, angle) @ np.diag([1, factor, factor])
        theirs = peer.apply("spatial", (angle, angle, factor), patch)
        crop, marks, centre = torch.from_numpy(image)[None, None], torch.from_numpy(label)[None], np.array([0, 59.5, 59.5])
        ours = augmentation.apply(crop, marks, centre, AugmentParams(matrix), (False,))
        rows, columns = np.meshgrid(*[np.arange(s) - (s - 1) / 2 for s in patch], indexing="ij")
        points = np.einsum("ab,byx->ayx", matrix[1:, 1:], np.stack([rows, columns])) + 59.5
        inside = ((points >= 0) & (points <= 119)).all(0)
        difference = float(np.abs(theirs - ours[0][0, 0].numpy())[inside].max())
        same = float((np.load(peer.folder / "new_label.npy") == ours[1][0].numpy())[inside].mean())
        print(f"  spatial in a plane: image differs by {difference:.1e}, {same:.5%} of labels agree")
        good &= difference <= CLOSE and same >= AGREE
    return good


def angles_and_scale(matrix: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Angles about the last, middle and first axis (the first's turned last), and the factor."""
    factor = float(np.cbrt(np.linalg.det(matrix)))
    turn = matrix / factor
    last, first = np.arctan2(turn[1, 0], turn[0, 0]), np.arctan2(turn[2, 1], turn[2, 2])
    return float(last), float(np.arcsin(-turn[2, 0])), float(first), factor


def check_draws(peer: Peer, draws: int) -> bool:
    """Rates of both sides, and Kolmogorov-Smirnov tests of every kind of value."""
    theirs, good = peer.ask("draw", draws=draws), True
    rng, augmentation = np.random.default_rng(1), make((64, 64, 64), channels=2)
    params = [augmentation.make_params(rng) for _ in range(draws)]
    matrices = [p.matrix.ravel().tolist() for p in params if p.matrix is not None]
    values: dict[str, list[list[float]]] = {"spatial": matrices, "mirror": [list(p.mirror) for p in params]}
    for name in ("noise", *VALUES):
        steps = [step for p in params for step in p.steps if step.name == name]
        values[name] = [list(s.values[0] if name == "noise" else [v for row in s.values for v in row]) for s in steps]

    def compare(text: str, one: list[float], other: list[float]) -> bool:
        test = ks_2samp(one, other)
        print(f"    {text}: {len(one)} and {len(other)} values, KS statistic {test.statistic:.3f}, p {test.pvalue:.3f}")
        return bool(test.pvalue > ALPHA)

    for name, ours in values.items():
        rates = [len([v for v in rows if v or name != "mirror"]) / draws for rows in (ours, theirs[name])]
        sigma = np.sqrt(2 * max(rates[0] * (1 - rates[0]), 1e-9) / draws)
        print(f"  {name}: rate {rates[0]:.4f} and {rates[1]:.4f}")
        good &= abs(rates[0] - rates[1]) < 4 * sigma
        if name == "spatial":
            both = [np.array([angles_and_scale(np.reshape(m, (3, 3))) for m in rows]) for rows in (ours, theirs[name])]
            turned = [np.abs(rows[:, :3]).max(1) > 1e-9 for rows in both]
            for i, text in enumerate(("angle about x", "angle about y", "angle about z")):
                good &= compare(text, *(rows[t, i].tolist() for rows, t in zip(both, turned, strict=True)))
            good &= compare("factor", *(rows[np.abs(rows[:, 3] - 1) > 1e-9, 3].tolist() for rows in both))
        else:
            good &= compare("values", *([v for row in rows for v in row] for rows in (ours, theirs[name])))
            good &= compare("values a sample", *([float(len(row)) for row in rows] for rows in (ours, theirs[name])))
    return good


def our_round(
    augmentation: DefaultAugmentation, image: NDArray[np.float32], label: NDArray[np.int16], samples: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Mean seconds of a sample, and of its parts alone."""
    spent = {"all": 0.0, "spatial": 0.0, "intensity": 0.0}
    start = tuple((s - p) // 2 for s, p in zip(image.shape, augmentation.patch, strict=True))
    for _ in range(samples):
        drawn = augmentation.make_params(rng)
        parts = {"all": drawn, "spatial": dataclasses.replace(drawn, steps=()), "intensity": AugmentParams(steps=drawn.steps)}
        for part, params in parts.items():
            low, high = source_box(start, augmentation.patch, params.matrix)
            low = tuple(max(a, 0) for a in low)
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            crop, marks = torch.from_numpy(image[box].copy())[None], torch.from_numpy(label[box].copy())
            centre = np.asarray(start) + (np.asarray(augmentation.patch) - 1) / 2 - np.asarray(low)
            begin = time.perf_counter()
            if part == "all":
                augmentation.make_params(np.random.default_rng(0))
            augmentation.apply(crop, marks, centre, params, (False,))
            spent[part] += time.perf_counter() - begin
    return {part: seconds / samples for part, seconds in spent.items()}


def measure(peer: Peer, patch: tuple[int, int, int], labels: int, rounds: int, samples: int) -> None:
    """Print times of both sides."""
    size = tuple(round(p * 2.3) for p in patch)
    image, label = scene(peer.folder, size, labels)
    augmentation, rng = make(patch), np.random.default_rng(2)
    ours, theirs = [], []
    for number in range(rounds + 1):
        mine = our_round(augmentation, image, label, samples, rng)
        answer = peer.ask("timing", patch=patch, samples=samples)
        other = {part: statistics.fmean(seconds) for part, seconds in answer.items()}
        other["all"] = other["spatial"] + other["intensity"]
        if number:
            ours.append(mine)
            theirs.append(other)
    print(f"{'x'.join(map(str, patch))}, {labels} labels (crop theirs {'x'.join(map(str, peer.ask('crop', patch=patch)))}), "
          f"{rounds} rounds of {samples} samples, ms a sample and samples per second and core")
    for part in ("all", "spatial", "intensity"):
        a, b = (statistics.median(r[part] for r in rows) for rows in (ours, theirs))
        print(f"  {part:10s} ours {a * 1e3:8.2f} ({1 / a:7.1f}/s)   theirs {b * 1e3:8.2f} ({1 / b:7.1f}/s)   ratio {b / a:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--sizes", nargs="+", default=["128,128,128", "40,56,40"])
    parser.add_argument("--labels", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--without-gate", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("resampling by", "compiled kernels" if compiled() else "torch")
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(arguments.peer, Path(folder))
        if not arguments.without_gate:
            good = check_transforms(peer, arguments.labels)
            good = check_draws(peer, arguments.draws) and good
            print("gate:", "passed" if good else "FAILED")
        for text in arguments.sizes:
            z, y, x = (int(value) for value in text.split(","))
            measure(peer, (z, y, x), arguments.labels, arguments.rounds, arguments.samples)
        peer.close()


if __name__ == "__main__":
    main()
