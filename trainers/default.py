"""The training loop: a job goes in, epochs come out, and after every step its whole state can be saved."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from autoseg.contracts import Batch, Loss
from autoseg.errors import AutosegError
from autoseg.networks.build import Network, build
from autoseg.networks.describe import describe
from autoseg.networks.hardware import Resolved, autocast, is_out_of_memory
from autoseg.trainers.average import Average
from autoseg.trainers.forward import Forward, worth_compiling
from autoseg.trainers.loading import Loader, Wanted, make_loader
from autoseg.trainers.losses import Targets, head_count, make_loss
from autoseg.trainers.optimizers import make_optimizer
from autoseg.trainers.ranks import Ranks
from autoseg.trainers.sampling import TRAINING, VALIDATION, PatchSource
from autoseg.trainers.schedule import make_schedule
from autoseg.trainers.setbacks import NotFinite, Setbacks, cases_with_bad_images
from autoseg.trainers.state import NETWORK, State, Tally, capture, finite, on_cpu, restore
from autoseg.trainers.targets import count_overlap, with_labelled
from autoseg.types.labels import Labels
from autoseg.types.plan import Configuration
from autoseg.types.run import EpochRecord, TrainSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """Everything one fold's training needs; `validation` may be empty (then there is no pseudo Dice).

    With `previous_labels` K > 0 the network also sees the previous stage's segmentation, as K one-hot channels. `labelled` holds
    for each case in which not every target is annotated the indices of those that are.
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
    labelled: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    ranks: Ranks | None = None  # where several processes train together


class Training:
    """One fold in training; steps and samples are numbered, so going on from a saved state repeats and skips nothing.

    `notices` gathers what somebody should be told; whoever tells it empties the list.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        spec, configuration = job.spec, job.configuration
        self._factor = make_schedule(spec.schedule)
        description = describe(configuration, job.channels + job.previous_labels, job.labels.output_count)
        self.network = build(description, seed=(spec.seed * 1000 + job.fold) % 2**63).to(job.device)
        self.heads = head_count(len(description.heads), spec.deep_supervision)
        self.batch_size = self.micro_batch = spec.batch_size or configuration.batch_size
        self.loss: Loss = make_loss(spec.loss, job.labels, configuration.batch_dice)
        self.optimizer = make_optimizer(self.network, spec.optimizer)
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.precision == "fp16")
        self.targets = Targets.of(job.labels)
        self.average = Average(self.network, spec.ema) if spec.ema else None
        if job.device.type == "cuda" and spec.growth.kind == "none":
            torch.backends.cudnn.benchmark = True  # one shape, many steps: trying algorithms should pay off; not measured yet
        self.forward = Forward(self.network, worth_compiling(job.device, spec.compile, spec.total_steps))
        self.epoch, self.step_in_epoch = 0, 0
        self.tally = Tally()
        self.setbacks = Setbacks(self._folder_of)
        self.good = on_cpu(self.network.state_dict())  # weights to go back to
        self.notices: list[str] = []
        self._loader(job.training).close()  # settings that make no sense are told at once

    @property
    def step(self) -> int:
        """Training steps done."""
        return self.epoch * self.job.spec.steps_per_epoch + self.step_in_epoch

    def run(self, after_step: Callable[[], None] = lambda: None) -> Iterator[EpochRecord]:
        """Train to the end, yielding one record per epoch; `after_step` may save the state, or raise to stop.

        Steps whose loss or gradients are not finite are skipped, as `Setbacks` says.

        Raises:
            RunError: that happened too often; the message is a diagnosis.
        """
        loader = self._loader(self.job.training)
        validation_loader = self._loader(self.job.validation) if self.job.validation and self.job.spec.val_steps else None
        batches = self._batches(loader)
        try:
            while self.epoch < self.job.spec.epochs:
                while self.step_in_epoch < self.job.spec.steps_per_epoch:
                    begin = time.perf_counter()
                    batch = self._together("read its part of a batch", lambda: next(batches))
                    self.tally.waited += time.perf_counter() - begin
                    try:
                        self.tally.losses.append(self.train_step(batch))
                    except NotFinite as problem:
                        self._skip(batch, str(problem))
                    self.step_in_epoch += 1
                    self.tally.seconds += time.perf_counter() - begin
                    after_step()
                yield self._finish_epoch(validation_loader)
        finally:
            batches.close()
            loader.close()
            if validation_loader:
                validation_loader.close()

    def _batches(self, loader: Loader) -> Generator[Batch]:
        """Training batches from the present step on; reading ahead begins anew where a step is not the one after the last."""
        while True:
            begun, length = self.step, self.job.spec.total_steps
            loader.recipes = loader.recipes.over(length)
            part = None if self.job.ranks is None else self.job.ranks.part
            with contextlib.closing(loader.batches(TRAINING, begun, sys.maxsize, part)) as ahead:
                for following, batch in enumerate(ahead, start=begun + 1):
                    yield batch
                    if self.step != following or self.job.spec.total_steps != length:
                        break

    def set_length(self, epochs: int) -> None:
        """Make the run shorter or longer: from the next step on the schedule is that of a run of `epochs` epochs."""
        self.job = dataclasses.replace(self.job, spec=self.job.spec.model_copy(update={"epochs": epochs}))

    def train_step(self, batch: Batch) -> float:
        """One optimiser step; returns the loss. Out of memory splits the batch into micro-batches, with the same result.

        Raises:
            NotFinite: the loss or a gradient is not finite; nothing was changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        self.network.train()
        loss = self._gradients_that_fit(with_labelled(batch, self.job.labelled, len(self.job.labels.targets)))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.job.spec.gradient_clip)
        value, length = torch.stack([loss.float(), norm.float()]).tolist()  # here, and only here, a step waits for the device
        if not math.isfinite(value) or not (math.isfinite(length) or self._scale_was_too_large()):
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.update()
            raise NotFinite(f"the loss became {value}" if not math.isfinite(value) else "a gradient became NaN or infinite")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update(self.network)
        return float(value)

    def _scale_was_too_large(self) -> bool:
        """Whether infinite gradients only mean that fp16's scaling tried too much: then it skips the step itself."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def _skip(self, batch: Batch, problem: str) -> None:
        """Count a step that was not made; after too many of them go back to the last good weights, without momentum."""
        cases, bad = self._on_any_rank(batch.cases), self._on_any_rank(cases_with_bad_images(batch))
        go_back = self.setbacks.after(self.step, cases, bad, problem, self.notices.append)
        self.tally.skipped += 1
        if go_back:
            self.network.load_state_dict(self.good)
            self.optimizer.state.clear()
            if self.average:
                self.average.begin(self.good)

    def _on_any_rank(self, cases: Sequence[str]) -> Sequence[str]:
        """The cases that any of several processes names, so that all decide the same."""
        if self.job.ranks is None:
            return cases
        names = [one.name for one in self.job.training]
        named = self.job.ranks.every([int(name in cases) for name in names])
        return [name for name, there in zip(names, named, strict=True) if there]

    def _together(self, what: str, do: Callable[[], T]) -> T:
        """Do something that fails on all of several processes where it fails on one."""
        return do() if self.job.ranks is None else self.job.ranks.together(what, do)

    def _gradients_that_fit(self, batch: Batch) -> torch.Tensor:
        """Gradients of the batch, in halves of halves until they fit into memory; compiled until that fails."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._gradients(batch)
            except AutosegError:  # of the loss, say: no fault of a compiler
                raise
            except Exception as error:  # compilers fail in many ways
                without = self.forward.give_up(error)
                fits_in_parts = is_out_of_memory(error) and self.micro_batch > 1
                if not without and not fits_in_parts:
                    raise
            if without:
                self.notices.append(f"training goes on without compilation, which failed: {self.forward.failure}")
                continue
            self.micro_batch = (self.micro_batch + 1) // 2  # outside the handler, whose traceback holds the tensors
            if self.job.device.type == "cuda":
                torch.cuda.empty_cache()

    def _gradients(self, batch: Batch) -> torch.Tensor:
        """Leave the gradients of the loss in the parameters and return the loss.

        With micro-batches the loss is still that of the whole batch, so that Dice over the batch and the means over annotated
        voxels stay what they are: all outputs first, without a graph; the gradient of the loss with respect to them; then each
        micro-batch once more, with a graph, from that gradient back. No layer mixes samples, so the sum is the whole gradient.
        Several ranks do the same, each with the micro-batches of its own part; what each does alone fails on all or on none.
        """
        ranks, parts = self.job.ranks, torch.split(batch.image, self._at_once(batch))
        if len(parts) == 1 and ranks is None:
            return self._backward(self._loss(self._outputs(batch.image), batch))
        own = self._together("run its network forward", lambda: self._outputs_in_parts(parts))
        whole = batch if ranks is None else ranks.whole(batch, len(self.job.labels.targets))
        outputs = [(one.detach() if ranks is None else ranks.gather(one, len(whole.image))).requires_grad_() for one in own]
        loss = self._together("compute its loss", lambda: self._backward(self._loss(outputs, whole)))
        mine = slice(None) if ranks is None else ranks.part(len(whole.image))
        used = [(one, output.grad[mine]) for one, output in zip(own, outputs, strict=True) if output.grad is not None]
        self._together("run its network backward", lambda: self._carry_back(parts, used))
        if ranks is not None:
            ranks.add_gradients(self.network.parameters())
        return loss

    def _backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Gradients of a loss, as far back as its graph reaches; returns the loss without it."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _outputs_in_parts(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs for all micro-batches, with a graph where there is but one."""
        with torch.set_grad_enabled(len(parts) == 1):
            columns = list(zip(*(self._outputs(part) for part in parts), strict=True))
        return [column[0] if len(column) == 1 else torch.cat(column) for column in columns]

    def _carry_back(self, parts: Sequence[torch.Tensor], used: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """From pairs of an output and the gradient of the loss with respect to it back to the parameters."""
        if len(parts) == 1:
            torch.autograd.backward([one for one, _ in used], [slope for _, slope in used])
            return
        slopes = zip(*(torch.split(slope, len(parts[0])) for _, slope in used), strict=True)
        for part, slope in zip(parts, slopes, strict=True):
            torch.autograd.backward(self._outputs(part)[: len(slope)], slope)

    def _at_once(self, batch: Batch) -> int:
        """Samples of a batch that go through the network together: as many voxels as in a micro-batch of planned patches."""
        return self.micro_batch * math.prod(self.job.configuration.patch_size) // math.prod(batch.label.shape[1:])

    def _outputs(self, image: torch.Tensor, network: Network | None = None) -> list[torch.Tensor]:
        with autocast(self.job.device, self.job.precision):
            if network is None and image.shape[2:] != self.job.configuration.patch_size:
                network = self.network  # every size would be compiled for itself, and smaller patches soon grow
            outputs: list[torch.Tensor] = (network or self.forward)(image, self.heads)
        return outputs

    def _loss(self, outputs: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        return self.loss(outputs, batch, self.step / self.job.spec.total_steps)

    def state(self) -> State:
        """All that going on exactly here needs. Raises RunError when the weights are not finite."""
        return capture(self)

    def restore(self, state: State) -> None:
        """Go back to a saved state. Raises RunError when its tensors do not fit the network."""
        restore(self, state)

    def start_from(self, weights: dict[str, torch.Tensor], epochs: int) -> None:
        """Go on from weights trained for `epochs` epochs, in a longer run; the optimiser's momentum starts at zero.

        Raises:
            RunError: the weights do not fit the network.
        """
        self.restore(State({NETWORK + name: value for name, value in weights.items()}, {"epoch": epochs}))

    @property
    def result(self) -> Network:
        """The network whose weights are the run's result: the one in training, or the moving average."""
        return self.average.network if self.average else self.network

    def weights(self) -> dict[str, torch.Tensor]:
        """The result's parameters by name. Raises RunError when they are not finite, so that nothing ever saves such weights."""
        return finite(dict(self.result.state_dict()), self.step)

    def _learning_rate(self, step: int) -> float:
        spec = self.job.spec
        return spec.optimizer.lr * self._factor(step / spec.total_steps) * 0.5**self.setbacks.returns

    def _folder_of(self, case: str) -> str:
        """Where a preprocessed case lies, if it lies anywhere."""
        return next((str(getattr(one, "folder", "")) for one in self.job.training if one.name == case), "")

    def _loader(self, cases: Sequence[PatchSource]) -> Loader:
        job = self.job
        wanted = Wanted(job.spec, job.configuration, job.fold, job.channels, job.previous_labels)
        return make_loader(wanted, cases, job.device, job.threads)

    def _finish_epoch(self, loader: Loader | None) -> EpochRecord:
        begin = time.perf_counter()
        val_loss, pseudo_dice = self._validate(loader) if loader else (None, {})
        tally, self.tally = self.tally, Tally()
        tally.seconds += time.perf_counter() - begin
        record = EpochRecord(
            epoch=self.epoch,
            step=self.step,
            train_loss=sum(tally.losses) / len(tally.losses) if tally.losses else math.nan,
            val_loss=val_loss,
            pseudo_dice=pseudo_dice,
            learning_rate=self._learning_rate(self.step - 1),
            seconds=tally.seconds,
            data_wait=tally.waited / max(tally.seconds, 1e-9),
            skipped=tally.skipped,
        )
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        if not self.setbacks.just_before(self.step) and all(bool(p.isfinite().all()) for p in self.network.parameters()):
            self.good = on_cpu(self.weights())
        return record

    @torch.no_grad()
    def _validate(self, loader: Loader) -> tuple[float, dict[str, float | None]]:
        """Loss and pooled Dice per target over `val_steps` random validation batches."""
        job, steps = self.job, self.job.spec.val_steps
        network = self.result.eval()
        counts = torch.zeros(3, len(job.labels.targets), dtype=torch.float64)
        loss = 0.0
        for batch in loader.batches(VALIDATION, self.epoch * steps, (self.epoch + 1) * steps):
            batch = with_labelled(batch, job.labelled, len(job.labels.targets))
            columns = zip(*(self._outputs(part, network) for part in torch.split(batch.image, self.micro_batch)), strict=True)
            outputs = [torch.cat(column) for column in columns]
            loss += float(self.loss(outputs, batch, self.step / job.spec.total_steps)) / steps
            counts += count_overlap(outputs[0], batch.label, self.targets, batch.labelled)
        both, predicted, true = counts.tolist()
        dice = {
            name: (2 * both[i] / (predicted[i] + true[i]) if predicted[i] + true[i] else None)
            for i, (name, _) in enumerate(job.labels.targets)
        }
        return loss, dice
