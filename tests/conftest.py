"""What the tests of the command line share: ways to call it, tiny phantoms, work folders that are planned and trained once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: arrays are tiny, and test processes may run side by side

CHILD_SECONDS = 240  # a child that takes longer hangs
SEED, SIZE = 7, 0.3
TRAINING = (
    "--set", "steps_per_epoch=15", "--set", "val_steps=1", "--set", "optimizer.kind=adamw", "--set", "optimizer.lr=0.01",
    "--precision", "fp32", "--device", "cpu",
)


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str

    def ok(self) -> Ran:
        """Return self; the command must have succeeded."""
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, *parts: str, code: int = 2) -> Ran:
        """Return self; the command must have ended with `code` and one message without a traceback that holds all `parts`."""
        assert self.code == code, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err and "Traceback" not in self.out
        for part in parts:
            assert part in self.err, f"{part!r} is not in:\n{self.err}"
        return self


def call(*arguments: object) -> Ran:
    """Run a command in this process, through the same `main` as the script."""
    from autoseg import cli

    out, err = io.StringIO(), io.StringIO()
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    argv, code = sys.argv, 0
    sys.argv = ["autoseg", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
    return Ran(code, out.getvalue(), err.getvalue())


def start(*arguments: object, before: str = "") -> subprocess.Popen[str]:
    """Start a command in a process of its own; `before` is Python code that runs in it first."""
    head = [sys.executable, "-m", "autoseg.cli"]
    if before:
        head = [sys.executable, "-c", f"{before}\nimport autoseg.cli\nautoseg.cli.main()"]
    return subprocess.Popen([*head, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(child: subprocess.Popen[str], seconds: float = CHILD_SECONDS) -> Ran:
    """Wait for a child; it is killed when it hangs."""
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        pytest.fail(f"the command hangs\n{out}\n{err}")
    return Ran(child.returncode, out, err)


def spawn(*arguments: object, before: str = "") -> Ran:
    """Run a command in a process of its own."""
    return ended(start(*arguments, before=before))


def wait_for(child: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    """Wait until something is there that a running child makes; fail when it ends without."""
    limit = time.monotonic() + CHILD_SECONDS
    while not there():
        if child.poll() is not None or time.monotonic() > limit:
            child.kill()
            pytest.fail(f"the command ended too early\n{child.communicate()}")
        time.sleep(0.005)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Edit a JSON file by hand."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def thin(work: Path, features: Sequence[int] = (4, 8, 16, 16, 16, 16), keep: Sequence[str] = ()) -> Path:
    """Make the networks of a planned work folder tiny, and keep only the named configurations."""

    def change(plan: dict) -> None:
        for name, entry in list(plan["configurations"].items()):
            if keep and name not in keep:
                del plan["configurations"][name]
                continue
            entry["features_per_stage"] = list(features[: len(entry["features_per_stage"])])
            entry["batch_size"] = 2

    edit(work / "plan.json", change)
    return work


def train(work: Path, *arguments: object, epochs: int = 4) -> Ran:
    """Train a work folder briefly, in this process."""
    return call("train", work, "--epochs", epochs, "--threads", 0, *TRAINING, *arguments)


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file below a folder: equal ones were not written again."""
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def copied(work: Path, target: Path, runs: bool = True) -> Path:
    """A copy of a work folder to spoil, with or without its runs."""
    drop = shutil.ignore_patterns() if runs else shutil.ignore_patterns("runs", "selection.json", "report")
    return Path(shutil.copytree(work, target, ignore=drop))


@pytest.fixture(scope="session")
def cli() -> SimpleNamespace:
    """The helpers above, for tests that cannot import this file."""
    return SimpleNamespace(
        call=call, start=start, ended=ended, spawn=spawn, wait_for=wait_for, edit=edit, thin=thin, train=train, states=states,
        copied=copied, TRAINING=TRAINING, SEED=SEED, SIZE=SIZE,
    )


@pytest.fixture(scope="session")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tiny chest phantoms and two unseen ones; not to be altered."""
    from autoseg.datasets.phantom import write_dataset

    folder = tmp_path_factory.mktemp("chest") / "data"
    write_dataset(folder, "chest", 4, 2, SEED, size=SIZE)
    return folder


@pytest.fixture(scope="session")
def planned(chest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned and preprocessed work folder of the chest phantoms with tiny networks; not to be altered."""
    work = tmp_path_factory.mktemp("planned") / "work"
    call("plan", chest, "--out", work).ok()
    thin(work)
    call("preprocess", work).ok()
    return work


@pytest.fixture(scope="session")
def trained(planned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planned folder with folds 0 and 1 of 3d_fullres trained, and the selection made; not to be altered."""
    work = copied(planned, tmp_path_factory.mktemp("trained") / "work")
    train(work, "--config", "3d_fullres", "--folds", "0,1").ok()
    call("select", work, "--no-trust").ok()
    return work
