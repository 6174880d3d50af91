"""Train one fold: from its last checkpoint to its weights, with metrics, a picture and checkpoints on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from autoseg.errors import RunError
from autoseg.files.runs import RunFolder
from autoseg.interrupts import Interrupts
from autoseg.logs import Reporter
from autoseg.stages.figures import progress_figure
from autoseg.stages.midway import Midway
from autoseg.types.run import EpochRecord, RunRecord

if TYPE_CHECKING:
    from autoseg.trainers.default import Job, Training

CHECKPOINT_SECONDS = 120.0  # between timed checkpoints
FIGURE_SECONDS = 20.0  # between redraws of progress.png

Adjust = Callable[["Training"], int | None]  # after an epoch: the new length of the run in epochs, if it changes


def train_fold(
    job: Job, folder: RunFolder, record: RunRecord, reporter: Reporter, interrupts: Interrupts,
    adjust: Adjust = lambda training: None, watch: Midway | None = None,
) -> None:
    """Train to the end, going on from the last checkpoint, or from finished weights when the run is made longer.

    After each epoch `watch` may look at whole cases, and `adjust` may change the length.

    Raises:
        RunError: the data changed since training began, memory does not even suffice for one patch, or the loss is not finite.
        Interrupted: a signal asked for an end; the state is saved.
    """
    from autoseg.networks.hardware import is_out_of_memory
    from autoseg.trainers.default import Training

    folder.remove_leftovers()
    training = Training(job)
    name = f"{record.name} fold {record.fold}"
    begun = _go_on(training, folder, record, name)
    epochs = [e for e in folder.metrics() if e.epoch < training.epoch]
    if begun and record.extended[-1:] == (training.epoch,) and not training.step_in_epoch:
        reporter.info(
            f"{name}: made longer, from {training.epoch} to {job.spec.epochs} epochs; the learning rate is that of the longer run"
        )
    elif begun:
        reporter.info(f"{name}: going on from step {training.step} of {job.spec.total_steps}")
    folder.save_record(record)
    log = _Log(training, folder, epochs, watch)
    micro_batch = training.micro_batch
    with interrupts.deferred(), reporter.task(name, job.spec.total_steps, "steps") as task:
        task.advance(training.step, log.note())

        def after_step() -> None:
            nonlocal micro_batch
            if training.micro_batch != micro_batch:
                micro_batch = training.micro_batch
                reporter.warn(f"{name}: out of memory, so each batch now goes in parts of {micro_batch}: same result, slower")
            if interrupts.signum is not None:
                log.checkpoint()
                interrupts.raise_if_requested()
            log.checkpoint_if_due()
            task.advance(1, log.note())

        try:
            for epoch in training.run(after_step):
                log.add(epoch)
                if watch is not None:
                    watch.after_epoch(training, log.epochs, reporter)
                length = adjust(training)
                if length is not None and length != training.job.spec.epochs:
                    training.set_length(length)
                    record = record.model_copy(update={"spec": training.job.spec})
                    folder.save_record(record)
                    task.resize(training.job.spec.total_steps)
                task.advance(0, log.note())
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"out of memory at step {training.step} even with one patch at a time on {job.device}; the last checkpoint is "
                "intact. Plan smaller patches: autoseg plan DATASET --out WORK --replan --planner fit --gpu-memory GB. "
                f"torch says: {str(error).splitlines()[0][:120]}"
            ) from None
        (folder.validation / "report.json").unlink(missing_ok=True)  # of shorter training, where the run was made longer
        folder.save_weights(training.weights(), training.job.spec.epochs)
    log.draw()
    interrupts.raise_if_requested()


def _go_on(training: Training, folder: RunFolder, record: RunRecord, name: str) -> bool:
    """Restore the last checkpoint, or finished weights of a shorter run; whether there was anything."""
    from autoseg.trainers.default import State

    checkpoint = folder.load_checkpoint()
    longer = checkpoint is None and bool(record.extended) and folder.usable
    if checkpoint is None and not longer:
        return False
    if folder.record_path.exists() and folder.record().data != record.data:
        raise RunError(
            f"the images or labels of run {record.name!r} fold {record.fold} changed since its training began; "
            "give --restart to begin anew with them, or --name NEW to train beside it"
        )
    if checkpoint is not None:
        training.restore(State(*checkpoint))
    else:
        training.start_from(folder.load_weights(), record.extended[-1])
    return True


class _Log:
    """Keeps the metrics, the picture and the checkpoints of one fold up to date."""

    def __init__(self, training: Training, folder: RunFolder, epochs: list[EpochRecord], watch: Midway | None) -> None:
        self.training, self.folder, self.epochs, self.watch = training, folder, epochs, watch
        self._saved = self._drawn = time.monotonic()
        self._cost = 0.0

    def add(self, epoch: EpochRecord) -> None:
        self.epochs.append(epoch)
        self.folder.save_metrics(self.epochs)
        if time.monotonic() - self._drawn > FIGURE_SECONDS:
            self.draw()

    def draw(self) -> None:
        looks = [look.model_dump() for look in self.watch.records] if self.watch is not None else []
        progress_figure(self.folder.path / "progress.png", [e.model_dump() for e in self.epochs], looks)
        self._drawn = time.monotonic()

    def checkpoint(self) -> None:
        begin = time.monotonic()
        state = self.training.state()
        self.folder.save_checkpoint(self.training.step, state.tensors, state.numbers)
        self._saved = time.monotonic()
        self._cost = self._saved - begin

    def checkpoint_if_due(self) -> None:
        if time.monotonic() - self._saved > max(CHECKPOINT_SECONDS, 50 * self._cost):
            self.checkpoint()

    def note(self) -> str:
        spec = self.training.job.spec
        text = f"epoch {min(self.training.epoch + 1, spec.epochs)}/{spec.epochs}"
        if self.epochs:
            last = self.epochs[-1]
            dice = " ".join("-" if d is None else f"{d:.2f}" for d in list(last.pseudo_dice.values())[:6])
            text += f", loss {last.train_loss:.3f}, pseudo Dice {dice}" if last.pseudo_dice else f", loss {last.train_loss:.3f}"
        return text
