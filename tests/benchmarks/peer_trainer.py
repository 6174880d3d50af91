"""nnU-Net's trainer as a server: one JSON command a line on standard input, one JSON answer a line on standard output.

Run by training.py with the peer's Python: `python peer_trainer.py DATASET CONFIGURATION FOLD BATCH THREADS`. Commands: `gate`
(weights and batch in, loss and gradients out, as .npz), `batch` (what `step` trains on), `step` (seconds of one), `epoch`
(seconds of so many steps with its own loader and augmentation, and what of them was spent waiting for it).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class Server:
    def __init__(self, dataset: str, configuration: str, fold: int, batch: int) -> None:
        folder = Path(os.environ["nnUNet_preprocessed"]) / dataset  # noqa: SIM112
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        plans["configurations"][configuration]["batch_size"] = batch
        plans["continue_training"] = False
        self.trainer = nnUNetTrainer(
            plans, configuration, fold, json.loads((folder / "dataset.json").read_text()), torch.device("cpu")
        )
        self.trainer.initialize()
        self.batch: dict[str, Any] = {}
        self.loader: Any = None

    def read(self, path: str) -> dict[str, Any]:
        """A batch as its loader would give it: one target for each output of deep supervision."""
        arrays = np.load(path)
        label = torch.from_numpy(arrays["label"]).float()[:, None]
        scales = self.trainer._get_deep_supervision_scales()
        sizes = [[round(s * f) for s, f in zip(label.shape[2:], scale, strict=True)] for scale in scales]
        targets = [torch.nn.functional.interpolate(label, size=size, mode="nearest-exact") for size in sizes]
        return {"data": torch.from_numpy(arrays["image"]), "target": targets}

    def gate(self, weights: str, batch: str, out: str) -> dict[str, Any]:
        network, given = self.trainer.network, self.read(batch)
        state = network.state_dict()
        state.update({name: torch.from_numpy(value) for name, value in np.load(weights).items()})
        network.load_state_dict(state)
        network.train()
        loss = self.trainer.loss(network(given["data"]), given["target"])
        loss.backward()
        np.savez(out, **{name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None})
        return {"loss": float(loss.detach())}

    def step(self) -> dict[str, Any]:
        self.trainer.network.train()
        begin = time.perf_counter()
        self.trainer.train_step(self.batch)
        return {"seconds": time.perf_counter() - begin}

    def epoch(self, steps: int) -> dict[str, Any]:
        if self.loader is None:
            self.loader, _ = self.trainer.get_dataloaders()
        self.trainer.network.train()
        waited, begin = 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self.loader)
            waited += time.perf_counter() - asked
            self.trainer.train_step(batch)
        return {"seconds": time.perf_counter() - begin, "waited": waited}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        kind = command.pop("do")
        if kind == "batch":
            self.batch = self.read(command["path"])
            return {}
        return getattr(self, kind)(**command)


def main() -> None:
    dataset, configuration, fold, batch, threads = sys.argv[1:]
    answers = sys.stdout
    torch.set_num_threads(int(threads))
    with contextlib.redirect_stdout(sys.stderr):
        server = Server(dataset, configuration, int(fold), int(batch))
        answers.write(json.dumps({"ready": True}) + "\n")
        answers.flush()
        for line in sys.stdin:
            answers.write(json.dumps(server.answer(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
