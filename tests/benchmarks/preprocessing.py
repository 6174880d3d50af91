"""Preprocessing as whole commands: `autoseg preprocess` and `nnUNetv2_preprocess` on the same cases, to the same spacing.

    python tests/benchmarks/preprocessing.py --peer VENV --scratch DIR [--cases 1,4] [--threads 1,2] [--repeats 5]

Made-up CTs of 128 x 320 x 320 int16 (.nii.gz, 1.5 x 0.75 x 0.75 mm, 25 organs) are brought to 1 mm. First the gates: before it is
stored the image against skimage's cubic resize, the labels against one resize per label, then what storing adds. Then both
commands in turn, from a cold start each: wall time, processor time, and the peak resident memory of the whole process tree
(sampled from /proc; pages that processes share count in each). Last, the stages in process. `VENV` is a virtual environment with
nnunetv2 2.8.1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.arrays.preprocess import preprocess
from autoseg.files.preprocessed import open_case, write_case
from autoseg.files.workspace import Workspace, save_record
from autoseg.stages.fingerprint import load_case

SHAPE, SPACING, TARGET, ORGANS = (128, 320, 320), (1.5, 0.75, 0.75), (1.0, 1.0, 1.0), 25
CONFIGURATION, NAME, DONE = "3d_fullres", "Dataset001_Bench", "made"
_SAMPLED_EVERY = 0.01  # seconds

PEER_STAGES = """
import inspect, json, sys, time
from pathlib import Path
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.preprocessors import default_preprocessor as module
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
spent = {}
def timed(owner, attribute, title, function=None):
    static = function is not None or isinstance(inspect.getattr_static(owner, attribute), staticmethod)
    function = function or getattr(owner, attribute)
    def call(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[title] = spent.get(title, 0) + time.perf_counter() - begin
    setattr(owner, attribute, staticmethod(call) if static and inspect.isclass(owner) else call)
root, name, configuration, case = sys.argv[1:]
plans = PlansManager(f"{root}/preprocessed/{name}/nnUNetPlans.json")
dataset = json.loads(Path(f"{root}/raw/{name}/dataset.json").read_text())
chosen = plans.get_configuration(configuration)
processor = module.DefaultPreprocessor
timed(SimpleITKIO, "read_images", "read image")
timed(SimpleITKIO, "read_seg", "read label")
timed(module, "crop_to_nonzero", "crop")
timed(processor, "_normalize", "normalise")
timed(processor, "_sample_foreground_locations", "locations")
timed(module.nnUNetDatasetBlosc2, "save_case", "write")
for attribute, title in (("resampling_fn_data", "resample image"), ("resampling_fn_seg", "resample label")):
    timed(ConfigurationManager, attribute, title, getattr(chosen, attribute))
begin = time.perf_counter()
processor(verbose=False).run_case_save(
    f"{root}/stages_{case}", [f"{root}/raw/{name}/imagesTr/{case}_0000.nii.gz"], f"{root}/raw/{name}/labelsTr/{case}.nii.gz",
    plans, chosen, dataset)
spent["all"] = time.perf_counter() - begin
print(json.dumps(spent))
"""


def scene(seed: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """A body with 25 organs in air, blurred and noisy like a CT, and its labels."""
    rng = np.random.default_rng(seed)
    extent = np.multiply(SHAPE, SPACING)
    z, y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) * s for n, s in zip(SHAPE, SPACING, strict=True)), indexing="ij",
                          sparse=True)
    waves = ndimage.zoom(rng.standard_normal((6, 8, 8)).astype(np.float32), np.divide(SHAPE, (6, 8, 8)), order=1)
    image, label = np.full(SHAPE, -1000, np.float32), np.zeros(SHAPE, np.uint8)
    for share, height, value in ((0.46, 0.38, -90), (0.4, 0.32, 45)):  # skin and fat, then what lies inside
        off = ((y - extent[1] / 2) / (extent[1] * height)) ** 2 + ((x - extent[2] / 2) / (extent[2] * share)) ** 2
        body = off < 1 + 0.05 * waves
        image[body] = value
    for organ in range(1, ORGANS + 1):
        centre = [rng.uniform(low, high) * size for (low, high), size in zip(((0.12, 0.88), (0.26, 0.74), (0.2, 0.8)), extent,
                                                                             strict=True)]
        radius = rng.uniform(8, 28, 3)
        inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip((z, y, x), centre, radius, strict=True)) < 1 + 0.25 * waves
        inside &= body
        label[inside] = organ
        image[inside] = rng.uniform(-50, 250) if organ % 6 else rng.uniform(-900, -700)
    image = ndimage.gaussian_filter(image, (0.4, 0.7, 0.7)) + 18 * rng.standard_normal(SHAPE, np.float32)
    return np.clip(np.rint(image), -1024, 3000).astype(np.int16), label


def write(path: Path, array: NDArray[Any]) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(path), True)


def make_ours(data: Path, work: Path) -> None:
    """A work folder whose only configuration has the target spacing."""
    subprocess.run([sys.executable, "-m", "autoseg.cli", "plan", str(data), "--out", str(work)], check=True, capture_output=True)
    workspace = Workspace(work)
    plan = workspace.plan()
    chosen = plan.configurations[CONFIGURATION].model_copy(update={"spacing": TARGET})
    save_record(workspace.plan_path, plan.model_copy(update={"configurations": {CONFIGURATION: chosen}}))


def peer_environment(venv: Path, root: Path) -> dict[str, str]:
    """What the peer's commands read from the environment."""
    return {**os.environ, "nnUNet_raw": str(root / "raw"), "nnUNet_preprocessed": str(root / "preprocessed"),
            "nnUNet_results": str(root / "results"), "OMP_NUM_THREADS": "1", "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}


def make_theirs(data: Path, venv: Path, root: Path) -> None:
    """The same for the peer."""
    raw, preprocessed = root / "raw", root / "preprocessed"
    for folder in ("imagesTr", "labelsTr"):
        (raw / NAME / folder).mkdir(parents=True, exist_ok=True)
    for image in sorted((data / "images").iterdir()):
        shutil.copy(image, raw / NAME / "imagesTr" / image.name.replace(".nii.gz", "_0000.nii.gz"))
        shutil.copy(data / "labels" / image.name, raw / NAME / "labelsTr" / image.name)
    shutil.copy(data / "dataset.json", raw / NAME)
    subprocess.run([str(venv / "bin" / "nnUNetv2_plan_and_preprocess"), "-d", "1", "--no_pp", "-np", "1"], check=True,
                   env=peer_environment(venv, root), capture_output=True)
    path = preprocessed / NAME / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"][CONFIGURATION]["spacing"] = list(TARGET)
    path.write_text(json.dumps(plans))


def make(count: int, venv: Path, scratch: Path) -> tuple[Path, dict[str, str]]:
    """Data, our work folder and the peer's folders for a number of cases; whole ones of an earlier run are used."""
    root = scratch / f"cases_{count}"
    if (root / DONE).exists():
        return root, peer_environment(venv, root / "peer")
    shutil.rmtree(root, ignore_errors=True)
    data = root / "data"
    for folder in ("images", "labels"):
        (data / folder).mkdir(parents=True)
    for number in range(count):
        image, label = scene(number)
        write(data / "images" / f"case_{number}.nii.gz", image)
        write(data / "labels" / f"case_{number}.nii.gz", label)
    labels = {"background": 0, **{f"organ {number}": number for number in range(1, ORGANS + 1)}}
    (data / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": count}))
    make_ours(data, root / "work")
    make_theirs(data, venv, root / "peer")
    (root / DONE).touch()
    return root, peer_environment(venv, root / "peer")


def gate(root: Path) -> bool:
    """Whether the first case agrees with the oracles, before storing and by what storing adds."""
    from batchgenerators.augmentations.utils import resize_segmentation
    from skimage.transform import resize

    workspace = Workspace(root / "work")
    plan, case = workspace.plan(), workspace.dataset().cases[0]
    image, label = load_case(case, plan.labels)
    assert label is not None
    made = preprocess(image, label, plan, plan.configurations[CONFIGURATION])
    assert made.label_zyx is not None
    ct = plan.intensities[0]
    normal = (np.clip(image.array_czyx[0].astype(float), ct.percentile_00_5, ct.percentile_99_5) - ct.mean) / ct.std
    wanted = resize(normal, made.placement.shape, 3, mode="edge", anti_aliasing=False)
    off = np.abs(made.image_czyx[0] - wanted).max() / normal.std()
    inside = made.label_zyx.copy()
    inside[inside < 0] = 0
    equal = (inside == resize_segmentation(label, made.placement.shape, 1)).mean()
    folder = root / "gate" / case.case
    write_case(folder, made, "gate", plan.labels.targets)
    stored = open_case(folder)
    added = (np.abs(stored.read_image() - made.image_czyx) / np.maximum(np.abs(made.image_czyx), 2.0**-14)).max()
    kept = np.array_equal(stored.read_label(), made.label_zyx)
    passed = bool(off < 1e-3 and equal >= 0.9999 and added <= 2.0**-11 and kept)
    print(f"gate: image within {off:.1e} standard deviations of skimage (1e-3), labels {equal:.4%} equal (99.99 %), storing adds "
          f"{added * 2**11:.2f} x 2^-11 (1), stored labels equal: {kept}: {'passed' if passed else 'FAILED'}")
    return passed


class Measured(NamedTuple):
    """One run of a command: seconds of wall and of processors, and MiB."""

    wall: float
    processor: float
    memory: float


def tree_bytes(root: int) -> int:
    """Resident memory of a process and all below it."""
    parents, pages = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                pages[int(folder.name)] = int((folder / "statm").read_text().split()[1])
            except (OSError, IndexError):
                continue  # it has ended meanwhile
    family, more = {root}, {root}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - family
        family |= more
    return sum(pages.get(member, 0) for member in family) * resource.getpagesize()


def measured(command: list[str], environment: dict[str, str]) -> Measured:
    """Run a command to its end."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SAMPLED_EVERY)
        wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read().decode()[-2000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(wall, used, peak / 2**20)


def compare(root: Path, venv: Path, environment: dict[str, str], count: int, threads: int, repeats: int) -> None:
    """Both commands in turn; medians and ratios."""
    ours = [sys.executable, "-m", "autoseg.cli", "preprocess", str(root / "work"), "--threads", str(threads)]
    theirs = [str(venv / "bin" / "nnUNetv2_preprocess"), "-d", "1", "-c", CONFIGURATION, "-np", str(threads)]
    rows: dict[str, list[Measured]] = {"autoseg": [], "nnU-Net": []}
    for _ in range(repeats):
        shutil.rmtree(root / "work" / "preprocessed", ignore_errors=True)
        rows["autoseg"].append(measured(ours, {**os.environ, "OMP_NUM_THREADS": "1"}))
        shutil.rmtree(root / "peer" / "preprocessed" / NAME / f"nnUNetPlans_{CONFIGURATION}", ignore_errors=True)
        rows["nnU-Net"].append(measured(theirs, environment))
    print(f"\n{count} case(s), {threads} worker(s), medians of {repeats}: wall s, processor s, peak MiB of the tree")
    medians = {name: Measured(*map(statistics.median, zip(*found, strict=True))) for name, found in rows.items()}
    for name, one in medians.items():
        walls = ", ".join(f"{row.wall:.2f}" for row in rows[name])
        print(f"  {name:8s} {one.wall:7.2f} {one.processor:7.2f} {one.memory:7.0f}   walls {walls}")
    shares = [a / b for a, b in zip(medians["autoseg"], medians["nnU-Net"], strict=True)]
    print(f"  ratio    {shares[0]:7.3f} {shares[1]:7.3f} {shares[2]:7.3f}   (asked for: time 0.12, memory 0.5)")


def our_stages(root: Path) -> dict[str, float]:
    """Seconds of each stage of one case in this process, second time of two."""
    import autoseg.arrays.preprocess as arrays
    import autoseg.files.preprocessed as store
    import autoseg.stages.fingerprint as reading

    spent: dict[str, float] = {}

    def timed(title: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[title] = spent.get(title, 0) + time.perf_counter() - begin

        return call

    for module, name, title in ((reading, "read_case", "read image"), (reading, "read_label", "read label"),
                                (arrays, "nonzero_mask", "crop"), (arrays, "normalize", "normalise"),
                                (arrays, "resample_image", "resample image"), (arrays, "resample_label", "resample label"),
                                (store, "class_locations", "locations")):
        setattr(module, name, timed(title, getattr(module, name)))
    workspace = Workspace(root / "work")
    plan, case = workspace.plan(), workspace.dataset().cases[0]
    for _ in range(2):
        spent.clear()
        begin = time.perf_counter()
        image, label = reading.load_case(case, plan.labels)
        made = arrays.preprocess(image, label, plan, plan.configurations[CONFIGURATION])
        middle = time.perf_counter()
        write_case(root / "stages" / case.case, made, "k", plan.labels.targets, None,
                   plan.configurations[CONFIGURATION].patch_size)
        spent["write"] = time.perf_counter() - middle
        spent["all"] = time.perf_counter() - begin
    return spent


def stages(root: Path, venv: Path, environment: dict[str, str]) -> None:
    """Where the time goes, in process."""
    ours = our_stages(root)
    command = [str(venv / "bin" / "python"), "-c", PEER_STAGES, str(root / "peer"), NAME, CONFIGURATION, "case_0"]
    told = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    theirs = json.loads(told.strip().splitlines()[-1])
    print("\nstages of one case in process, ms (our writing holds the locations): autoseg, nnU-Net")
    for title in dict.fromkeys([*ours, *theirs]):
        cells = [f"{1e3 * row[title]:9.1f}" if title in row else f"{'-':>9s}" for row in (ours, theirs)]
        print(f"  {title:16s} {'  '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--cases", default="1,4", help="numbers of cases")
    parser.add_argument("--threads", default="1,2", help="numbers of workers")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    counts, workers = ([int(number) for number in text.split(",")] for text in (given.cases, given.threads))
    for number, count in enumerate(counts):
        root, environment = make(count, given.peer, given.scratch)
        if not number:
            if not gate(root):
                raise SystemExit(1)
            stages(root, given.peer, environment)
        for threads in workers:
            compare(root, given.peer, environment, count, threads, given.repeats)


if __name__ == "__main__":
    main()
