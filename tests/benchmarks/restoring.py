"""Logits to labels against nnU-Net's resampling of logits and argmax, in alternation; agreement first, then time and memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/restoring.py --peer PEER/bin/python [--threads 1] [--repeats 3] [--many-peer]

25 classes, float16, (classes, z, y, x) as sliding windows accumulate them, 128³ -> 200³. "organs": ellipsoids of random axes,
their smoothed signed distances with noise, 2 to 5 % of the cells with corners of different classes; "noise": independent normal
numbers, nearly every cell mixed; "many": organs of 117 classes. The peer runs in one process of its own environment, which is
warm as ours is: `resample_data_or_seg_to_shape` (its default, order 1) and `resample_torch_fornnunet`, each followed by argmax.
The reference is torch's trilinear interpolation in float32, class after class. Extra memory is the peak of a process of ours
above what it held before, less the label map; the peer's likewise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = '''
import ctypes, json, sys, time
import numpy as np, torch
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
torch.set_num_threads(int(sys.argv[1]))
{memory}
def restore(kind, logits, new):
    spacing = [new[0] / logits.shape[1]] * 3
    if kind == "default":
        found = resample_data_or_seg_to_shape(logits, new, spacing, [1.0] * 3, is_seg=False, order=1, order_z=0,
                                              force_separate_z=None)
        found = torch.from_numpy(found)
    else:
        found = resample_torch_fornnunet(logits, new, spacing, [1.0] * 3, is_seg=False, num_threads=int(sys.argv[1]))
    return found.argmax(0).to(torch.uint8).numpy()
'''
OURS = '''
import ctypes, json, sys, time
import numpy as np, torch
from autoseg.arrays.restore import restore_labels
from autoseg.types.case import Placement
from autoseg.types.geometry import AxisMap, Grid
torch.set_num_threads(int(sys.argv[1]))
{memory}
def restore(kind, logits, new):
    grid = Grid(shape=tuple(new), spacing=(1.0, 1.0, 1.0))
    box = tuple((0, n) for n in new)
    spacing = tuple(n / m for n, m in zip(new, logits.shape[1:]))
    place = Placement(grid, AxisMap((0, 1, 2), (False,) * 3), (0, 1, 2), box, grid.spacing, tuple(logits.shape[1:]), spacing)
    return restore_labels(logits, place)
'''
MEMORY = '''
def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
'''
LOOP = '''
restore("default", torch.zeros(4, 8, 8, 8).half(), (12, 12, 12))
restore("torch", torch.zeros(4, 8, 8, 8).half(), (12, 12, 12))
loaded = None
for line in sys.stdin:
    kind, path, new, out = json.loads(line)
    if loaded != path:
        logits, loaded = torch.from_numpy(np.load(path)), path
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before, begin = resident("VmRSS"), time.perf_counter()
    label = restore(kind, logits, new)
    seconds = time.perf_counter() - begin
    extra = resident("VmHWM") - before - label.nbytes
    if out:
        np.save(out, label)
    del label
    print(json.dumps([seconds, extra / 2**20]), flush=True)
'''


class Worker:
    """A process that restores what it is told to."""

    def __init__(self, python: str, code: str, threads: int) -> None:
        text = code.replace("{memory}", MEMORY) + LOOP
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [python, "-c", text, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )

    def restore(self, kind: str, logits: Path, new: tuple[int, ...], out: Path | None = None) -> tuple[float, float]:
        """Seconds, and MiB beside input and output."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, str(logits), new, str(out) if out else ""]) + "\n")
        self._process.stdin.flush()
        while True:
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError("the worker ended")
            if line.startswith("["):
                seconds, extra = json.loads(line)
                return seconds, extra

    def end(self) -> None:
        """Let the process go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def organs(classes: int, size: int, path: Path) -> None:
    """Write logits of random ellipsoids to a file, and say how many cells are mixed."""
    import numpy as np

    rng = np.random.default_rng(0)
    axis = np.arange(size, dtype=np.float32)
    logits = np.lib.format.open_memmap(path, "w+", np.float16, (classes, size, size, size))
    noise = rng.normal(0, 0.05, (size, size, size)).astype(np.float32)
    logits[0] = noise
    best, winner = logits[0].astype(np.float32), np.zeros((size, size, size), np.int16)
    for c in range(1, classes):
        centre, radius = rng.uniform(0.15 * size, 0.85 * size, 3), rng.uniform(0.06 * size, 0.16 * size, 3)
        square = sum(((axis - centre[i]) / radius[i]).reshape([-1 if a == i else 1 for a in range(3)]) ** 2 for i in range(3))
        distance = ((1 - np.sqrt(square)) * radius.mean()).clip(-8, 8)
        logits[c] = distance + np.roll(noise, 7 * c, 0)
        better = logits[c] > best
        best[better], winner[better] = logits[c][better], c
    mixed = np.zeros((size - 1,) * 3, bool)
    for z, y, x in np.ndindex(2, 2, 2):
        mixed |= winner[z:size - 1 + z, y:size - 1 + y, x:size - 1 + x] != winner[:-1, :-1, :-1]
    logits.flush()
    print(f"  mixed cells: {100 * mixed.mean():.1f} %")


def noise(classes: int, size: int, path: Path) -> None:
    """Write independent normal numbers to a file."""
    import numpy as np

    rng = np.random.default_rng(0)
    np.save(path, rng.standard_normal((classes, size, size, size), dtype=np.float32).astype(np.float16))


def different(path: Path, new: tuple[int, ...], labels: Path, exact: bool) -> float:
    """Share of the voxels that differ from torch's trilinear interpolation and argmax in float32, or float64 when `exact`."""
    import numpy as np
    import torch

    logits, ours = np.load(path, mmap_mode="r"), np.load(labels)
    best = torch.full(new, -torch.inf, dtype=torch.float64 if exact else torch.float32)
    winner = torch.zeros(new, dtype=torch.uint8)
    for c, values in enumerate(logits):
        given = torch.from_numpy(np.array(values)).to(best.dtype)[None, None]
        fine = torch.nn.functional.interpolate(given, size=new, mode="trilinear", align_corners=False)[0, 0]
        winner[fine > best] = c
        torch.maximum(best, fine, out=best)
    return float((winner.numpy() != ours).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment with nnU-Net; without it only ours runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--scenes", nargs="+", default=["organs", "noise", "many"], choices=["organs", "noise", "many"])
    parser.add_argument("--many-peer", action="store_true", help="the peer with 117 classes too (minutes, and some 10 GB)")
    options = parser.parse_args()
    new = (options.new,) * 3
    ours = Worker(sys.executable, OURS, options.threads)
    theirs = Worker(options.peer, PEER, options.threads) if options.peer else None
    with tempfile.TemporaryDirectory() as folder:
        for scene in options.scenes:
            classes, path = 117 if scene == "many" else 25, Path(folder) / f"{scene}.npy"
            print(f"{scene}: {classes} x {options.size}³ -> {options.new}³ float16 (classes, z, y, x), {options.threads} threads")
            (noise if scene == "noise" else organs)(classes, options.size, path)
            label = Path(folder) / "label.npy"
            ours.restore("ours", path, new, label)
            shares = [different(path, new, label, exact) for exact in (False, True)]
            print(f"  voxels that differ: {shares[0]:.1e} from float32, {shares[1]:.1e} from float64 trilinear + argmax")
            kinds = ["default", "torch"] if theirs and (scene != "many" or options.many_peer) else []
            measure(ours, theirs, kinds, path, new, options.repeats)
            path.unlink()
    for worker in (ours, theirs):
        if worker is not None:
            worker.end()


def measure(ours: Worker, theirs: Worker | None, kinds: list[str], path: Path, new: tuple[int, ...], repeats: int) -> None:
    """Run all in turn and print medians."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in ["ours", *kinds]}
    for _ in range(repeats):
        for kind, kept in found.items():
            worker = ours if kind == "ours" or theirs is None else theirs
            kept.append(worker.restore(kind, path, new))
            time.sleep(0.1)
    own = statistics.median(seconds for seconds, _ in found["ours"])
    for kind, kept in found.items():
        seconds, extra = statistics.median(s for s, _ in kept), max(e for _, e in kept)
        ratio = "" if kind == "ours" else f", ours takes {own / seconds:.4f} of it"
        print(f"  {kind}: {seconds:.3f} s, {extra:.0f} MiB beside input and output{ratio}", flush=True)


if __name__ == "__main__":
    main()
