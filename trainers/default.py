"""The training loop: a job goes in, epochs come out, and after every step its whole state can be saved."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoseg.contracts import Batch, Loss
from autoseg.errors import PluginError, RunError
from autoseg.networks.build import build
from autoseg.networks.describe import describe
from autoseg.networks.hardware import Resolved, autocast
from autoseg.trainers.augment import DefaultAugmentation
from autoseg.trainers.losses import Targets, head_count, make_loss
from autoseg.trainers.sampling import TRAINING, VALIDATION, Loader, PatchSource, Sampler
from autoseg.trainers.schedule import make_schedule
from autoseg.types.labels import Labels
from autoseg.types.plan import Configuration
from autoseg.types.run import EpochRecord, OptimizerSpec, TrainSpec


@dataclass(frozen=True)
class Job:
    """Everything one fold's training needs; `validation` may be empty (then there is no pseudo Dice)."""

    configuration: Configuration
    labels: Labels
    channels: int
    spec: TrainSpec
    fold: int
    training: Sequence[PatchSource]
    validation: Sequence[PatchSource]
    device: torch.device
    precision: Resolved
    threads: int


@dataclass(frozen=True)
class State:
    """A run frozen between two steps: tensors by name, and plain numbers for JSON."""

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, float | int | list[float]]


class Training:
    """One fold in training; steps and samples are numbered, so going on from a saved state repeats and skips nothing."""

    def __init__(self, job: Job) -> None:
        self.job = job
        spec, configuration = job.spec, job.configuration
        _require("augmentation", spec.augment.kind, "default", spec.augment.options)
        _require("sampler", spec.sampler.kind, "reference", spec.sampler.options)
        self._factor = make_schedule(spec.schedule)
        description = describe(configuration, job.channels, job.labels.output_count)
        self.network = build(description, seed=(spec.seed * 1000 + job.fold) % 2**63).to(job.device)
        self.heads = head_count(len(description.heads), spec.deep_supervision)
        self.batch_size = spec.batch_size or configuration.batch_size
        self.loss: Loss = make_loss(spec.loss, job.labels, configuration.batch_dice)
        self.optimizer = make_optimizer(self.network, spec.optimizer)
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.precision == "fp16")
        self.targets = Targets.of(job.labels)
        self.epoch, self.step_in_epoch = 0, 0
        self._losses: list[float] = []
        self._waited, self._seconds = 0.0, 0.0

    @property
    def step(self) -> int:
        """Training steps done."""
        return self.epoch * self.job.spec.steps_per_epoch + self.step_in_epoch

    def run(self, after_step: Callable[[], None] = lambda: None) -> Iterator[EpochRecord]:
        """Train to the end, yielding one record per epoch; `after_step` may save the state, or raise to stop.

        Raises:
            RunError: the loss became NaN or infinite; the message names the step and its cases.
        """
        spec = self.job.spec
        loader = self._loader(self.job.training)
        validation_loader = self._loader(self.job.validation) if self.job.validation and spec.val_steps else None
        batches = loader.batches(TRAINING, self.step, spec.total_steps)
        try:
            while self.epoch < spec.epochs:
                while self.step_in_epoch < spec.steps_per_epoch:
                    begin = time.perf_counter()
                    batch = next(batches)
                    waited = time.perf_counter() - begin
                    self._losses.append(self.train_step(batch))
                    self.step_in_epoch += 1
                    self._waited += waited
                    self._seconds += time.perf_counter() - begin
                    after_step()
                yield self._finish_epoch(validation_loader)
        finally:
            batches.close()  # type: ignore[attr-defined]
            loader.close()
            if validation_loader:
                validation_loader.close()

    def train_step(self, batch: Batch) -> float:
        """One optimiser step; returns the loss."""
        job, fraction = self.job, self.step / self.job.spec.total_steps
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(job.device, job.precision):
            outputs = self.network(batch.image, self.heads)
        loss = self.loss(outputs, batch, fraction)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RunError(
                f"the loss became {value} at step {self.step} on cases {', '.join(batch.cases)}; the last checkpoint is intact. "
                "Look at these cases with autoseg check, or lower --set optimizer.lr"
            )
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), job.spec.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value

    def state(self) -> State:
        """All that going on exactly here needs (shares memory with the training: save it before the next step).

        Raises:
            RunError: the weights are not finite.
        """
        tensors = {f"network.{name}": value for name, value in self.weights().items()}
        parameters = dict(self.network.named_parameters())
        for name, parameter in parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
        numbers: dict[str, float | int | list[float]] = {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "losses": list(self._losses),
            "waited": self._waited,
            "seconds": self._seconds,
            "scale": float(self.scaler.get_scale()),
            "scale_age": int(self.scaler.state_dict().get("_growth_tracker", 0)),
        }
        return State(tensors, numbers)

    def restore(self, state: State) -> None:
        """Go back to a saved state.

        Raises:
            RunError: the tensors do not fit the network.
        """
        network = {n.removeprefix("network."): t for n, t in state.tensors.items() if n.startswith("network.")}
        try:
            self.network.load_state_dict(network)
        except RuntimeError as error:
            raise RunError(f"the checkpoint does not fit the network: {str(error).splitlines()[0]}") from None
        slots: dict[str, dict[str, torch.Tensor]] = {}
        for path, value in state.tensors.items():
            if path.startswith("optimizer."):
                _, key, name = path.split(".", 2)
                slots.setdefault(name, {})[key] = value
        for name, parameter in self.network.named_parameters():
            if name in slots:
                self.optimizer.state[parameter] = {
                    key: value.to("cpu" if value.ndim == 0 else parameter.device, copy=True) for key, value in slots[name].items()
                }
        numbers = state.numbers
        self.epoch, self.step_in_epoch = int(numbers["epoch"]), int(numbers["step_in_epoch"])  # type: ignore[arg-type]
        self._losses = list(numbers["losses"])  # type: ignore[arg-type]
        self._waited, self._seconds = float(numbers["waited"]), float(numbers["seconds"])  # type: ignore[arg-type]
        if self.scaler.is_enabled():
            saved = {"scale": float(numbers["scale"]), "_growth_tracker": int(numbers["scale_age"])}  # type: ignore[arg-type]
            self.scaler.load_state_dict({**self.scaler.state_dict(), **saved})

    def weights(self) -> dict[str, torch.Tensor]:
        """The network's parameters by name.

        Raises:
            RunError: they are not finite, so that nothing ever saves such weights.
        """
        weights = dict(self.network.state_dict())
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise RunError(
                f"the weights are no longer finite after step {self.step}; the last checkpoint is intact. "
                "Lower --set optimizer.lr, or train with --precision fp32"
            )
        return weights

    def _learning_rate(self, step: int) -> float:
        spec = self.job.spec
        return spec.optimizer.lr * self._factor(step / spec.total_steps)

    def _loader(self, cases: Sequence[PatchSource]) -> Loader:
        job, configuration = self.job, self.job.configuration
        augmentation = DefaultAugmentation.from_configuration(configuration, job.channels, job.spec.augment.mirror)
        sampler = Sampler(
            cases, augmentation.patch, self.batch_size, job.spec.sampler.foreground, augmentation, job.spec.seed, job.fold
        )
        return Loader(sampler, configuration.use_mask_for_norm, job.device, job.threads, configuration.dims)

    def _finish_epoch(self, loader: Loader | None) -> EpochRecord:
        begin = time.perf_counter()
        val_loss, pseudo_dice = self._validate(loader) if loader else (None, {})
        self._seconds += time.perf_counter() - begin
        record = EpochRecord(
            epoch=self.epoch,
            step=self.step,
            train_loss=sum(self._losses) / len(self._losses),
            val_loss=val_loss,
            pseudo_dice=pseudo_dice,
            learning_rate=self._learning_rate(self.step - 1),
            seconds=self._seconds,
            data_wait=self._waited / max(self._seconds, 1e-9),
        )
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self._losses, self._waited, self._seconds = [], 0.0, 0.0
        return record

    @torch.no_grad()
    def _validate(self, loader: Loader) -> tuple[float, dict[str, float | None]]:
        """Loss and pooled Dice per target over `val_steps` random validation batches."""
        job, steps = self.job, self.job.spec.val_steps
        self.network.eval()
        counts = torch.zeros(3, len(job.labels.targets), dtype=torch.float64)
        loss = 0.0
        for batch in loader.batches(VALIDATION, self.epoch * steps, (self.epoch + 1) * steps):
            with autocast(job.device, job.precision):
                outputs = self.network(batch.image, self.heads)
            loss += float(self.loss(outputs, batch, self.step / job.spec.total_steps)) / steps
            counts += _overlap(outputs[0], batch.label, self.targets)
        both, predicted, true = counts.tolist()
        dice = {
            name: (2 * both[i] / (predicted[i] + true[i]) if predicted[i] + true[i] else None)
            for i, (name, _) in enumerate(job.labels.targets)
        }
        return loss, dice


def _overlap(logits: torch.Tensor, label: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Voxels in both, predicted, and true, for each target: (3, targets)."""
    valid = targets.valid(label)
    mask = torch.ones_like(label, dtype=torch.bool) if valid is None else valid
    if targets.regions:
        found, true = logits > 0, targets.dense(label) > 0
        axes = (0, *range(2, logits.ndim))
        keep = mask[:, None]
        return torch.stack([(found & true & keep).sum(axes), (found & keep).sum(axes), (true & keep).sum(axes)]).cpu().double()
    found, true, classes = logits.argmax(1)[mask], label[mask], targets.classes
    both = torch.bincount(true[found == true], minlength=classes)
    counts = torch.stack([both, torch.bincount(found, minlength=classes), torch.bincount(true, minlength=classes)])
    return counts[:, 1:classes].cpu().double()


def make_optimizer(network: nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; `options` go to torch's class of that name.

    Raises:
        RunError: unknown kind, or options that torch does not take.
    """
    kinds: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        "sgd": (torch.optim.SGD, {"momentum": spec.momentum, "nesterov": spec.momentum > 0}),
        "adamw": (torch.optim.AdamW, {}),
    }
    if spec.kind not in kinds:
        raise RunError(f"unknown optimizer {spec.kind!r}; choose from {', '.join(kinds)}")
    kind, own = kinds[spec.kind]
    try:
        return kind(network.parameters(), **{"lr": spec.lr, "weight_decay": spec.weight_decay, **own, **spec.options})
    except (TypeError, ValueError) as error:
        raise RunError(f"optimizer {spec.kind} cannot be made with options {spec.options}: {error}") from None


def _require(family: str, kind: str, known: str, options: Mapping[str, object]) -> None:
    """Refuse what would otherwise be ignored."""
    if kind != known:
        raise PluginError(f"unknown {family} {kind!r}; choose from {known}")
    if options:
        raise PluginError(f"{family} {kind!r} takes no options, found {', '.join(options)}")


def seconds_per_step(job: Job, steps: int = 3) -> float:
    """Seconds of a training step of this job, reading and augmentation included, on a network that is thrown away."""
    training = Training(dataclasses.replace(job, threads=0))
    loader = training._loader(job.training)
    times = []
    begin = time.perf_counter()
    for batch in loader.batches(TRAINING, 0, steps + 1):
        training.train_step(batch)
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return statistics.median(times[1:])  # the first one warms up
