"""The training loop: a job goes in, epochs come out, and after every step its whole state can be saved."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
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
from autoseg.networks.hardware import Resolved, autocast, is_out_of_memory, peak_memory_bytes, reset_peak
from autoseg.trainers.augment import DefaultAugmentation
from autoseg.trainers.losses import Targets, head_count, make_loss
from autoseg.trainers.sampling import TRAINING, VALIDATION, Loader, PatchSource, Sampler
from autoseg.trainers.schedule import make_schedule
from autoseg.types.labels import Labels
from autoseg.types.plan import Configuration
from autoseg.types.run import EpochRecord, OptimizerSpec, TrainSpec


@dataclass(frozen=True)
class Job:
    """Everything one fold's training needs; `validation` may be empty (then there is no pseudo Dice).

    With `previous_labels` K > 0 the network also sees the previous stage's segmentation, as K one-hot channels.
    """

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
    previous_labels: int = 0


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
        description = describe(configuration, job.channels + job.previous_labels, job.labels.output_count)
        self.network = build(description, seed=(spec.seed * 1000 + job.fold) % 2**63).to(job.device)
        self.heads = head_count(len(description.heads), spec.deep_supervision)
        self.batch_size = self.micro_batch = spec.batch_size or configuration.batch_size
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
        loader = self._loader(self.job.training)
        validation_loader = self._loader(self.job.validation) if self.job.validation and self.job.spec.val_steps else None
        batches = loader.batches(TRAINING, self.step, sys.maxsize)
        try:
            while self.epoch < self.job.spec.epochs:
                while self.step_in_epoch < self.job.spec.steps_per_epoch:
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

    def set_length(self, epochs: int) -> None:
        """Make the run shorter or longer: from the next step on the schedule is that of a run of `epochs` epochs."""
        self.job = dataclasses.replace(self.job, spec=self.job.spec.model_copy(update={"epochs": epochs}))

    def train_step(self, batch: Batch) -> float:
        """One optimiser step; returns the loss. Out of memory splits the batch into micro-batches, with the same result."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        self.network.train()
        value = self._gradients_that_fit(batch)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.job.spec.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value

    def _gradients_that_fit(self, batch: Batch) -> float:
        """Gradients of the batch, in halves of halves until they fit into memory."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._gradients(batch)
            except RuntimeError as error:
                if self.micro_batch == 1 or not is_out_of_memory(error):
                    raise
            self.micro_batch = (self.micro_batch + 1) // 2  # outside the handler, whose traceback holds the tensors
            if self.job.device.type == "cuda":
                torch.cuda.empty_cache()

    def _gradients(self, batch: Batch) -> float:
        """Leave the gradients of the loss in the parameters and return the loss.

        With micro-batches the loss is still that of the whole batch, so that Dice over the batch and the means over annotated
        voxels stay what they are: all outputs first, without a graph; the gradient of the loss with respect to them; then each
        micro-batch once more, with a graph, from that gradient back. No layer mixes samples, so the sum is the whole gradient.
        """
        parts = torch.split(batch.image, self.micro_batch)
        if len(parts) == 1:
            loss = self._loss(self._outputs(batch.image), batch)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())
        with torch.no_grad():
            columns = zip(*(self._outputs(part) for part in parts), strict=True)
            outputs = [torch.cat(column).requires_grad_() for column in columns]
        loss = self._loss(outputs, batch)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        slopes = zip(*(torch.split(output.grad, self.micro_batch) for output in outputs if output.grad is not None), strict=True)
        for part, slope in zip(parts, slopes, strict=True):
            torch.autograd.backward(self._outputs(part), slope)
        return float(loss.detach())

    def _outputs(self, image: torch.Tensor) -> list[torch.Tensor]:
        with autocast(self.job.device, self.job.precision):
            outputs: list[torch.Tensor] = self.network(image, self.heads)
        return outputs

    def _loss(self, outputs: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        loss = self.loss(outputs, batch, self.step / self.job.spec.total_steps)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RunError(
                f"the loss became {value} at step {self.step} on cases {', '.join(batch.cases)}; the last checkpoint is intact. "
                "Look at these cases with autoseg check, or lower --set optimizer.lr"
            )
        return loss

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
            "micro_batch": self.micro_batch,
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
        numbers = {"step_in_epoch": 0, "losses": [], "waited": 0.0, "seconds": 0.0, **state.numbers}
        self.epoch, self.step_in_epoch = int(numbers["epoch"]), int(numbers["step_in_epoch"])  # type: ignore[arg-type]
        self._losses = list(numbers["losses"])  # type: ignore[arg-type]
        self._waited, self._seconds = float(numbers["waited"]), float(numbers["seconds"])  # type: ignore[arg-type]
        self.micro_batch = int(numbers.get("micro_batch", self.batch_size))  # type: ignore[arg-type]
        if self.scaler.is_enabled() and "scale" in numbers:
            saved = {"scale": float(numbers["scale"]), "_growth_tracker": int(numbers["scale_age"])}  # type: ignore[arg-type]
            self.scaler.load_state_dict({**self.scaler.state_dict(), **saved})

    def start_from(self, weights: dict[str, torch.Tensor], epochs: int) -> None:
        """Go on from weights trained for `epochs` epochs, in a longer run; the optimiser's momentum starts at zero.

        Raises:
            RunError: the weights do not fit the network.
        """
        self.restore(State({f"network.{name}": value for name, value in weights.items()}, {"epoch": epochs}))

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
        axes = job.spec.mirror_axes(configuration)
        augmentation = DefaultAugmentation.from_configuration(configuration, job.channels, axes, job.previous_labels)
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
            columns = zip(*(self._outputs(part) for part in torch.split(batch.image, self.micro_batch)), strict=True)
            outputs = [torch.cat(column) for column in columns]
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


@dataclass(frozen=True)
class Measured:
    """A training step as measured: seconds, reading and augmentation included, the peak of a GPU's memory, the micro-batch."""

    seconds: float
    peak_bytes: int | None
    micro_batch: int


def measure_step(job: Job, seconds: float = 0.0, steps: int = 3) -> Measured:
    """Run at least `steps` steps of this job, for at least `seconds`, on a network that is thrown away."""
    training = Training(job)
    loader = training._loader(job.training)
    times: list[float] = []
    reset_peak(job.device)
    begin = start = time.perf_counter()
    batches = loader.batches(TRAINING, 0, sys.maxsize)
    try:
        for batch in batches:
            training.train_step(batch)
            if job.device.type == "cuda":
                torch.cuda.synchronize(job.device)
            now = time.perf_counter()
            times.append(now - begin)
            begin = now
            if len(times) > steps and now - start >= seconds:
                break
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory on {job.device} even with one patch at a time; plan smaller patches: autoseg plan DATASET --out WORK "
            "--replan --planner fit --gpu-memory GB"
        ) from None
    finally:
        batches.close()  # type: ignore[attr-defined]
        loader.close()
    return Measured(statistics.mean(times[1:]), peak_memory_bytes(job.device), training.micro_batch)  # the first one warms up
