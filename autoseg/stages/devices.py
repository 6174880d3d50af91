"""Folds on several devices at once: one process of `autoseg train` for each, and the next fold for the device that is free."""

from __future__ import annotations

import gc
import math
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoseg.errors import CasesFailed, RunError
from autoseg.files.machine import cores
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace
from autoseg.interrupts import Interrupts
from autoseg.logs import Reporter
from autoseg.stages import cascade
from autoseg.stages.records import Options
from autoseg.stages.remedies import given_settings
from autoseg.stages.together import LAUNCHERS
from autoseg.stages.train import Arranged, Key, arrange, train
from autoseg.types.run import RunRecord, TrainSpec

MEETING = {"MASTER_ADDR", "MASTER_PORT"}.union(*LAUNCHERS)  # variables of processes that train one fold together
LOOK_SECONDS = 0.2  # between looks for signals
LAST_SECONDS = 10.0  # that a process has after a second signal, before it is killed
MOST_READERS = 8  # threads that read for one device


@dataclass(frozen=True)
class Wanted:
    """What a train command asks for; `flags` are those of its arguments that every process gets as they are."""

    configurations: Sequence[str] | None
    folds: Sequence[int] | None
    name: str | None
    spec: TrainSpec
    options: Options
    flags: tuple[str, ...]


@dataclass
class _Process:
    """A fold at work: where, and the last line that told of an error, or the last of all."""

    key: Key
    device: str
    child: subprocess.Popen[str]
    last: str = ""


@dataclass
class _Line:
    """A line of a process; None: its output has ended."""

    process: _Process
    text: str | None


def pick_devices(text: str | None, device: str) -> list[str]:
    """Names of the devices to train on: numbers are CUDA devices; nothing given means all CUDA devices, or `device`.

    A device may be named more than once. Raises RunError when one cannot be used, or when `device` says something else.
    """
    from autoseg.networks.hardware import pick_device

    if text is None:
        if device == "auto":
            import torch

            return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or [device]
        return [device]
    if device != "auto":
        raise RunError(f"--devices {text} and --device {device} exclude each other; give --devices alone")
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise RunError(f"--devices takes numbers or names like 0,1 or cuda:0,cuda:1, found {text!r}")
    names = [f"cuda:{name}" if re.fullmatch(r"\d+", name) else name for name in names]
    for name in dict.fromkeys(names):
        if re.fullmatch(r"cuda:\d+", name):  # told by its number: to try one takes memory on it that this process then keeps
            _require_cuda(name)
        else:
            pick_device(name)
    return names


def _require_cuda(name: str) -> None:
    import torch

    count = torch.cuda.device_count()
    if int(name.removeprefix("cuda:")) >= count:
        there = "there is no CUDA device" if not count else f"there are {count} CUDA devices, numbered from 0"
        raise RunError(f"device {name!r} cannot be used here: {there}; choose others with --devices")


def train_on(
    workspace: Workspace, wanted: Wanted, devices: Sequence[str], environment: Mapping[str, str], reporter: Reporter,
    interrupts: Interrupts, started: float | None = None,
) -> None:
    """Train and validate as `train` does, folds side by side on `devices`; a fold that fails does not stop the others.

    All is checked and preprocessed here first. Configurations with a previous stage begin when all others are done. Of a time
    budget every fold gets what is left, divided by the rounds that are left. `environment` is what processes are given; threads
    of processors are divided among them.

    Raises:
        RunError, RecordError: as `train`, and when nothing but failures came of it.
        CasesFailed: some folds failed; the rest is done.
        Interrupted: after a signal; every process has saved its state.
    """
    world = environment.get("WORLD_SIZE", "")
    if len(devices) > 1 and world.isdigit() and int(world) > 1:
        raise RunError(
            f"--devices divides folds among devices, but WORLD_SIZE says that {world} processes train one fold together, and "
            "each would do so; leave --devices out, or start this command alone"
        )
    begun = time.monotonic() if started is None else started
    options = replace(wanted.options, device=devices[0])
    asked = (workspace, wanted.configurations, wanted.folds, wanted.name, wanted.spec, options, reporter)
    if len(devices) < 2:
        train(*asked, interrupts, begun)
        return
    arranged = arrange(*asked)
    todo = [key for key, record in arranged.records.items() if _is_due(workspace, key, record, arranged, options)]
    if len(todo) < 2:
        train(*asked, interrupts, begun)
        return
    reporter.info(f"{len(todo)} folds on {', '.join(devices)}, {min(len(devices), len(todo))} at a time")
    crew = _Crew(workspace, wanted, arranged, list(devices), _divided(environment, len(devices)), reporter, interrupts)
    deadline = None if options.time_budget_s is None else begun + options.time_budget_s
    first = [key for key in todo if arranged.records[key].previous is None]
    second = [key for key in todo if arranged.records[key].previous is not None]
    crew.work(first, deadline, rounds_after=math.ceil(len(second) / len(devices)))
    crew.work(crew.prepared(second), deadline)
    crew.tell()


def _is_due(workspace: Workspace, key: Key, record: RunRecord, arranged: Arranged, options: Options) -> bool:
    """Whether a fold is to be trained or validated."""
    folder = RunFolder(workspace.fold(*key))
    if (options.restart and key in arranged.asked) or not folder.finished:
        return True
    return folder.record().spec.epochs != record.spec.epochs or not (folder.validation / "report.json").exists()


def _divided(environment: Mapping[str, str], parts: int) -> dict[str, str]:
    """The environment of each of several processes, which share the processor's cores unless it says otherwise already.

    What a launcher says of processes that train one fold together is left out: each of these trains a fold alone.
    """
    alone = {name: value for name, value in environment.items() if name not in MEETING}
    return {"OMP_NUM_THREADS": str(max(1, cores() // parts)), **alone}


@dataclass
class _Crew:
    """The processes that train folds, at most one on each device at a time."""

    workspace: Workspace
    wanted: Wanted
    arranged: Arranged
    devices: list[str]
    environment: dict[str, str]
    reporter: Reporter
    interrupts: Interrupts
    failures: dict[Key, str] = field(default_factory=dict)
    done: int = 0
    partly: bool = False  # a fold whose training is done, and some of whose cases failed
    lines: queue.SimpleQueue[_Line] = field(default_factory=queue.SimpleQueue)

    def work(self, keys: Sequence[Key], deadline: float | None, rounds_after: int = 0) -> None:
        """Train folds until all are done or have failed.

        Raises Interrupted after a signal, when all processes have ended.
        """
        waiting, free = deque(keys), deque(self.devices)
        running: list[_Process] = []
        with self.interrupts.deferred():
            try:
                told = False
                while running or (waiting and self.interrupts.signum is None):
                    while waiting and free and self.interrupts.signum is None:
                        rounds = math.ceil(len(waiting) / len(self.devices)) + rounds_after
                        budget = None if deadline is None else (deadline - time.monotonic()) / rounds
                        running.append(self._start(waiting.popleft(), free.popleft(), budget))
                    if self.interrupts.signum is not None and not told:
                        told = True
                        for process in running:
                            process.child.send_signal(self.interrupts.signum)
                    ended = self._listen()
                    if ended is not None:
                        running.remove(ended)
                        free.append(ended.device)
                        self._count(ended)
            finally:
                self._end(running)
        self.interrupts.raise_if_requested()

    def prepared(self, keys: Sequence[Key]) -> list[Key]:
        """Those of the folds with a previous stage that can begin, after it has segmented all cases for them.

        Here and not in their processes, which would all do it at once.
        """
        ready: list[Key] = []
        for configuration in dict.fromkeys(self.arranged.records[key].configuration for key in keys):
            own = [key for key in keys if self.arranged.records[key].configuration == configuration]
            previous = self.arranged.records[own[0]].previous
            assert previous is not None
            lost = [key for key in self.failures if key[0] == previous and not RunFolder(self.workspace.fold(*key)).finished]
            if lost:
                why = f"not begun, since it needs {previous} fold {', '.join(str(fold) for _, fold in lost)}"
                self.failures.update(dict.fromkeys(own, why))
                continue
            cascade.prepare(self.workspace, previous, configuration, device=self.devices[0], reporter=self.reporter)
            _free_device_memory()
            ready += own
        return ready

    def tell(self) -> None:
        """Raise what is to be said of folds that failed: CasesFailed, or RunError when there is nothing else."""
        if not self.failures:
            return
        lines = [f"{key[0]} fold {key[1]}: {self.failures[key]}" for key in self.arranged.records if key in self.failures]
        message = "\n".join([f"{len(lines)} of {len(lines) + self.done} folds failed:", *lines])
        raise CasesFailed(message) if self.done or self.partly else RunError(message)

    def _start(self, key: Key, device: str, budget: float | None) -> _Process:
        command = self.command(key, device, budget)
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
            errors="replace", env=self.environment, start_new_session=True,  # a terminal's Ctrl-C reaches it once, through here
        )
        process = _Process(key, device, child)
        threading.Thread(target=_read, args=(process, self.lines.put), daemon=True).start()
        return process

    def command(self, key: Key, device: str, budget: float | None) -> list[str]:
        """The command that trains one fold."""
        run, fold = key
        record, wanted = self.arranged.records[key], self.wanted
        own = [*wanted.flags]
        if key not in self.arranged.asked and RunFolder(self.workspace.fold(*key)).record_path.exists():
            own = ["--threads", str(wanted.options.threads)] if wanted.options.threads is not None else []
            settings = [setting for setting in given_settings(record.spec) if budget is None or not setting.startswith("epochs=")]
            own += [part for setting in settings for part in ("--set", setting)]
            if record.init is not None and wanted.options.init is not None:
                own += ["--init", str(wanted.options.init)]
        if run != record.configuration:
            own += ["--name", run]
        if wanted.options.restart and key in self.arranged.asked:
            own.append("--restart")
        if wanted.options.threads is None and device.startswith("cuda"):
            own += ["--threads", str(max(1, min(MOST_READERS, cores() // len(self.devices))))]
        if budget is not None:
            own += ["--time-budget", f"{max(1.0, budget):.0f}s"]
        head = [sys.executable, "-m", "autoseg.cli", "train", str(self.workspace.root), "--config", record.configuration]
        return [*head, "--folds", str(fold), "--device", device, *own]

    def _listen(self) -> _Process | None:
        """Pass on one line, if one comes soon; the process when its output has ended."""
        try:
            line = self.lines.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            return None
        process, text = line.process, line.text
        if text is None:
            return process
        if text.strip():
            self.reporter.info(f"[{process.key[0]} {process.key[1]} {process.device}] {text}")
            if text.startswith("error: ") or not process.last.startswith("error: "):
                process.last = text.strip()
        return None

    def _count(self, process: _Process) -> None:
        """Note how a fold ended."""
        code = process.child.wait()
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) and self.interrupts.signum is None:
            self.interrupts.signum = code - 128  # somebody stopped it, by a stop file perhaps: all are meant
        if code == 0:
            self.done += 1
        elif self.interrupts.signum is None:
            self.partly |= code == 3
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            why = f"{how} on {process.device}: {process.last.removeprefix('error: ') or 'it said nothing'}"
            self.failures[process.key] = why
            self.reporter.warn(f"{process.key[0]} fold {process.key[1]} {self.failures[process.key]}")

    def _end(self, running: Sequence[_Process]) -> None:
        """End what still runs, after a second signal or an error here."""
        for process in running:
            process.child.terminate()
        limit = time.monotonic() + LAST_SECONDS
        for process in running:
            try:
                process.child.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.child.kill()
                process.child.wait()


def _free_device_memory() -> None:
    """Give back the device memory that this process no longer needs: another one trains there now."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _read(process: _Process, put: Callable[[_Line], None]) -> None:
    """Hand on the lines of a process, in a thread."""
    assert process.child.stdout is not None
    for line in process.child.stdout:
        put(_Line(process, line.rstrip("\r\n")))
    put(_Line(process, None))
