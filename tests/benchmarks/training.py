"""Training: one step on one thread, and an epoch with the real loader on all cores, ours and nnU-Net's in alternation.

    python tests/benchmarks/training.py --data DATA --peer VENV --scratch DIR [--only step|epoch] [--repeats 5] [--steps 25]
        [--batch N] [--workers 1,2] [--threads 1]

Gate: the same network with the same weights gives the same fp32 loss (1e-5) and gradients (1e-4) for the same batch as nnU-Net's
network and loss. `step`: batch 2, one thread, loss, clipping and optimiser included; ours in the precision that `auto` picks.
`epoch`: 25 steps at the planned batch, reading and augmentation included, no validation; nnU-Net with each number of `workers` in
a process of its own that keeps its loader, so that it begins every epoch with full queues, as ours does. DATA: images/, labels/.
`VENV` is a virtual environment with nnunetv2 2.8.1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_in_time import CONFIGURATION, NAME, prepare_peer

from autoseg.files.allocator import memory_kept
from autoseg.files.preprocessed import open_case
from autoseg.files.workspace import Workspace
from autoseg.networks.describe import describe
from autoseg.networks.hardware import pick_precision
from autoseg.stages.nnunet_weights import foreign_names
from autoseg.stages.preprocess import data_folder, preprocess
from autoseg.trainers.default import Job, Training
from autoseg.trainers.sampling import TRAINING
from autoseg.types.run import TrainSpec

CPU = torch.device("cpu")
STEP_BATCH = 2


class Peer:
    """A process with nnU-Net's trainer."""

    def __init__(
        self, venv: Path, environment: dict[str, str], batch: int, threads: int, log: Path, workers: int = 1
    ) -> None:
        server = [str(venv / "bin" / "python"), str(Path(__file__).with_name("peer_trainer.py"))]
        self._process = subprocess.Popen(
            [*server, NAME, CONFIGURATION, "0", str(batch), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log.open("w"), text=True, start_new_session=True,
            env={**environment, "nnUNet_n_proc_DA": str(workers), "OMP_NUM_THREADS": str(threads)},
        )
        self._log = log
        self._answer()

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer's process ended; see {self._log}")
        return dict(json.loads(line))

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # its augmentation workers too
        self._process.wait()


def prepare_ours(data: Path, work: Path) -> Workspace:
    if not (work / "plan.json").exists():
        subprocess.run([sys.executable, "-m", "autoseg.cli", "plan", str(data), "--out", str(work)], check=True)
    workspace = Workspace(work)
    preprocess(workspace, [CONFIGURATION])
    return workspace


def make_training(workspace: Workspace, batch: int, steps: int, threads: int, precision: str = "auto") -> Training:
    plan, split = workspace.plan(), workspace.splits()[0]
    folder = data_folder(workspace, plan, CONFIGURATION)
    spec = TrainSpec(epochs=1000, steps_per_epoch=steps, val_steps=0, batch_size=batch)
    cases = [open_case(folder / name) for name in split.train]
    return Training(Job(
        plan.configurations[CONFIGURATION], plan.labels, len(plan.channels), spec, 0, cases, [], CPU,
        pick_precision(CPU, precision), threads,  # type: ignore[arg-type]
    ))


def gate(training: Training, peer: Peer, batch: Any, scratch: Path) -> None:
    """Our fp32 loss and gradients beside theirs."""
    description = describe(training.job.configuration, training.job.channels, training.job.labels.output_count)
    names = foreign_names(description)
    weights = {names[name]: value.numpy() for name, value in training.network.state_dict().items()}
    np.savez(scratch / "weights.npz", **weights)
    theirs = peer.ask("gate", weights=str(scratch / "weights.npz"), batch=str(scratch / "batch.npz"), out=str(scratch / "g.npz"))
    training.network.train()
    loss = training.loss(training.network(batch.image, training.heads), batch, 0.0)
    loss.backward()
    gradients = np.load(scratch / "g.npz")
    own = {names[name]: p.grad.numpy() for name, p in training.network.named_parameters() if p.grad is not None}
    largest = max(float(np.abs(gradients[name]).max()) for name in own)
    apart = max(float(np.abs(gradients[name] - value).max()) for name, value in own.items()) / largest
    training.network.zero_grad(set_to_none=True)
    print(f"gate: loss {float(loss.detach()):.7f} and {theirs['loss']:.7f}; gradients of {len(own)} tensors, of largest size "
          f"{largest:.3g}, differ by at most {apart:.1e} of that")
    assert abs(float(loss.detach()) - theirs["loss"]) < 1e-5 and apart < 1e-4


def step(workspace: Workspace, venv: Path, environment: dict[str, str], scratch: Path, repeats: int) -> None:
    torch.set_num_threads(1)
    training = make_training(workspace, STEP_BATCH, 1000, 0)
    loader = training._loader(training.job.training)
    batch = next(loader.batches(TRAINING, 0, 1))
    np.savez(scratch / "batch.npz", image=batch.image.numpy(), label=batch.label.numpy())
    peer = Peer(venv, environment, STEP_BATCH, 1, scratch / "peer.log")
    gate(make_training(workspace, STEP_BATCH, 1000, 0, "fp32"), peer, batch, scratch)
    peer.ask("batch", path=str(scratch / "batch.npz"))

    def ours() -> float:
        begin = time.perf_counter()
        training.train_step(batch)
        return time.perf_counter() - begin

    with memory_kept():  # as in training
        for _ in range(2):
            ours(), peer.ask("step")
        times = [(ours(), peer.ask("step")["seconds"]) for _ in range(repeats)]
    peer.close()
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"step, batch {STEP_BATCH}, 1 thread: ours in {training.job.precision} {mine:.3f} s, nnU-Net in fp32 {theirs:.3f} s, "
          f"ratio {mine / theirs:.3f} (limit 0.53); medians of {repeats}, ours {span(t for t, _ in times)}, nnU-Net's "
          f"{span(t for _, t in times)}")


def epoch(workspace: Workspace, venv: Path, environment: dict[str, str], given: argparse.Namespace) -> None:
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    batch = given.batch or workspace.plan().configurations[CONFIGURATION].batch_size
    training = make_training(workspace, batch, given.steps, given.threads)
    epochs = training.run()
    peers = {
        workers: Peer(venv, environment, batch, cores, given.scratch / f"peer_{workers}.log", workers)
        for workers in map(int, given.workers.split(","))
    }
    ours: list[float] = []
    waits: list[float] = []
    theirs: dict[int, list[dict[str, float]]] = {workers: [] for workers in peers}
    for _ in range(given.repeats + 1):  # the first warms up
        with memory_kept():  # as in training
            record = next(epochs)
        ours.append(record.seconds)
        waits.append(record.data_wait)
        for workers, peer in peers.items():
            theirs[workers].append(peer.ask("epoch", steps=given.steps))
            time.sleep(2 * batch / 7)  # its workers fill their queues, in nobody's time
    epochs.close()  # type: ignore[attr-defined]
    for peer in peers.values():
        peer.close()
    mine = statistics.median(ours[1:])
    print(f"epoch of {given.steps} steps, batch {batch}, {cores} cores, ours with {given.threads} loader thread(s) in "
          f"{training.job.precision}: {mine:.2f} s ({span(ours[1:])}), data wait {statistics.median(waits[1:]):.1%}")
    best = float("inf")
    for workers, found in theirs.items():
        seconds = statistics.median(e["seconds"] for e in found[1:])
        share = statistics.median(e["waited"] / e["seconds"] for e in found[1:])
        best = min(best, seconds)
        print(f"nnU-Net with {workers} worker(s): {seconds:.2f} s ({span(e['seconds'] for e in found[1:])}), "
              f"data wait {share:.1%}")
    print(f"ratio to nnU-Net's best {mine / best:.3f} (limit 0.50); medians of {given.repeats}")


def span(values: Any) -> str:
    found = list(values)
    return f"{min(found):.3f} to {max(found):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--only", choices=["step", "epoch"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25, help="of an epoch")
    parser.add_argument("--batch", type=int, help="of an epoch; the planned one unless given")
    parser.add_argument("--workers", default="1,2", help="augmentation processes of the peer, the best of which counts")
    parser.add_argument("--threads", type=int, default=1, help="of our loader")
    given = parser.parse_args()
    workspace = prepare_ours(given.data, given.scratch / "ours")
    environment = prepare_peer(given.data, given.peer, given.scratch / "peer", workspace.splits_path)
    if given.only != "epoch":
        step(workspace, given.peer, environment, given.scratch, given.repeats)
    if given.only != "step":
        epoch(workspace, given.peer, environment, given)


if __name__ == "__main__":
    main()
