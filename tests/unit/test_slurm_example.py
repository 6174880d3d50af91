"""The example job script: it can be read by bash, and puts a job that was stopped back into the queue once its state is saved."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


def job(folder: Path, training: str) -> subprocess.Popen[str]:
    """Start the script where `autoseg` is a small script and `scontrol` notes its arguments."""
    for name, text in (("autoseg", training), ("scontrol", f'echo "$@" > {folder}/queue')):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    return subprocess.Popen(["bash", SCRIPT, "work", "--set", "a=b c"], env=environment, stdout=subprocess.PIPE, text=True)


def stop(child: subprocess.Popen[str], begun: Path) -> None:
    """Send SIGTERM once the launcher runs, and wait for the end."""
    limit = time.monotonic() + 20
    while not begun.exists() and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=20)


def test_bash_can_read_it() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_a_stopped_training_saves_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    child = job(tmp_path, f"""
trap 'sleep 0.3; echo saved > {tmp_path}/state; exit 143' TERM
echo "$3" > {tmp_path}/begun
while true; do sleep 0.05; done""")
    stop(child, tmp_path / "begun")
    assert child.returncode == 143 and (tmp_path / "state").exists()
    assert (tmp_path / "queue").read_text() == "requeue 42\n"


def test_a_launcher_that_ends_with_another_code_after_the_signal_goes_back_into_the_queue_too(tmp_path: Path) -> None:
    child = job(tmp_path, f"trap 'exit 1' TERM\ntouch {tmp_path}/begun\nwhile true; do sleep 0.05; done")
    stop(child, tmp_path / "begun")
    assert child.returncode == 1 and (tmp_path / "queue").read_text() == "requeue 42\n"


@pytest.mark.parametrize("code", [0, 2, 3])
def test_another_end_is_the_jobs_end(tmp_path: Path, code: int) -> None:
    child = job(tmp_path, f"exit {code}")
    child.communicate(timeout=20)
    assert child.returncode == code and not (tmp_path / "queue").exists()


def test_without_a_work_folder_it_tells_its_usage() -> None:
    ran = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert ran.returncode == 2 and "usage" in ran.stderr
