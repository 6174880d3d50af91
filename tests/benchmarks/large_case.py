"""One large case with many classes under a limit on memory: does it finish, and what does it take?

    python tests/benchmarks/large_case.py --peer VENV --scratch DIR --model FOLDER
        [--shape 800,512,512] [--classes 40] [--limit 8] [--who ours,peer] [--timeout 3600] [--steps 40]

`FOLDER` is a trained nnU-Net results folder, whose plans are altered: a thin network (8 to 64 features, trained for
`steps` on drawn organs), patches of 64 x 128 x 128, no resampling. The limit is a control group inside this process's own, where
one can be made; else a watchman ends everything once the sum over the tree of resident memory passes it. Ours is told
`--max-ram`, the peer has no such flag. The peak is of the whole tree, sampled (RSS, and PSS, which counts shared pages once).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from predicting import draw_ct, memory, save, thin_model, tree

PATCH = (64, 128, 128)
SPACING = (1.5, 0.8, 0.8)
LIMITS = {"memory.max": "memory.swap.max", "memory.limit_in_bytes": "memory.memsw.limit_in_bytes"}


@contextmanager
def group(limit: int) -> Iterator[Path | None]:
    """A control group with a limit below the one this process is in, or None where none can be made."""
    made = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kind, inner = line.split(":", 2)
        if kind not in ("", "memory"):
            continue
        parent = Path("/sys/fs/cgroup") / kind / inner.strip("/")
        folder = parent / f"limited_{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        file = next((name for name in LIMITS if (folder / name).exists()), None)
        try:
            if file is None:
                raise OSError("no memory controller")
            (folder / file).write_text(str(limit))
            made = folder
            break
        except OSError:
            folder.rmdir()
    try:
        yield made
    finally:
        if made is not None:
            while left := (made / "cgroup.procs").read_text().split():  # helpers of one that was ended
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                time.sleep(0.2)
            made.rmdir()


def limited(command: Sequence[str], environment: dict[str, str], log: Path, limit: int, timeout: float) -> str:
    """Run under the limit; tells the outcome."""
    begin, rss, pss, why = time.monotonic(), 0, 0, ""
    with group(limit) as folder, log.open("w") as file:
        if folder is not None:  # a shell enters the group before it becomes the command
            command = ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh", *command]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        while process.poll() is None:
            now = memory(process.pid)
            rss, pss = max(rss, now[0]), max(pss, now[1])
            late = time.monotonic() - begin > timeout
            if late or (folder is None and now[1] > limit):
                why = "ended after the time allowed" if late else "ended at the limit"
                for pid in reversed(tree(process.pid)):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.5)
        guard = "watchman" if folder is None else "control group"
        if folder is not None:
            for name in ("memory.failcnt", "memory.events"):
                if (folder / name).exists():
                    guard += ", " + (folder / name).read_text().strip().replace("\n", " ")
            time.sleep(1)
    code = process.returncode
    outcome = why or ("finished" if code == 0 else f"failed with exit code {code}")
    return (f"{outcome} in {time.monotonic() - begin:.0f} s, peak RSS {rss / 2**30:.2f} GiB, PSS {pss / 2**30:.2f} GiB, "
            f"limit {limit / 2**30:.2f} GiB ({guard})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shape", default="800,512,512", help="z, y, x")
    parser.add_argument("--classes", type=int, default=40)
    parser.add_argument("--limit", type=float, default=8.0, help="GB of 2**30 bytes")
    parser.add_argument("--who", default="ours,peer")
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("--steps", type=int, default=40, help="of training, so that there is more than one class in the mask")
    given = parser.parse_args()
    from autoseg.stages.import_nnunet import import_nnunet

    folder, images = given.scratch / f"thin{given.classes}" / given.model.name, given.scratch / f"ct_{given.shape}"
    if not (folder / "fold_0" / "checkpoint_final.pth").exists():
        shutil.rmtree(folder, ignore_errors=True)
        thin_model(folder, given.model, given.steps, given.classes, PATCH, SPACING)
        import_nnunet(folder, given.scratch / f"thin{given.classes}" / "model.autoseg")
    if not images.exists():
        images.mkdir(parents=True)
        z, y, x = map(int, given.shape.split(","))
        save(draw_ct((z, y, x), 3)[0], images / "large_0000.nii.gz", SPACING)
    environment = {**os.environ, **dict.fromkeys(("nnUNet_raw", "nnUNet_results", "nnUNet_preprocessed"), str(given.scratch))}
    limit = int(given.limit * 2**30)
    for who in given.who.split(","):
        out = given.scratch / f"large_{who}"
        shutil.rmtree(out, ignore_errors=True)
        if who == "ours":
            model = folder.parent / "model.autoseg"
            command = [str(Path(sys.executable).with_name("autoseg")), "predict", str(model), str(images), "--out", str(out),
                       "--device", "cpu", "--no-mirror", "--max-ram", str(given.limit)]
        else:
            command = [str(given.peer / "bin" / "nnUNetv2_predict_from_modelfolder"), "-i", str(images), "-o", str(out), "-m",
                       str(folder), "-f", "0", "-device", "cpu", "--disable_tta"]
        print(f"{who}: {limited(command, environment, given.scratch / f'large_{who}.log', limit, given.timeout)}", flush=True)
        for path in out.glob("*.nii.gz"):
            mask = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
            print(f"  mask {mask.shape} with {len(np.unique(mask))} classes")


if __name__ == "__main__":
    main()
