"""Train one fold: from its last checkpoint to its weights, with metrics, a picture and checkpoints on the way."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from autoseg.errors import AutosegError, RunError
from autoseg.files.allocator import memory_kept
from autoseg.files.runs import FULL, DiskFull, RunFolder, disk_is_full
from autoseg.interrupts import Interrupts
from autoseg.logs import Reporter
from autoseg.stages.alerts import Alerts, epoch_line, is_best
from autoseg.stages.figures import progress_figure
from autoseg.stages.midway import Midway
from autoseg.types.run import EpochRecord, RunRecord

if TYPE_CHECKING:
    import torch

    from autoseg.trainers.default import Job, Training

CHECKPOINT_SECONDS = 120.0  # between timed checkpoints, and at least
CHECKPOINT_COST = 50.0  # times what saving one takes, so that it never costs more than 2 %
FIGURE_SECONDS = 20.0  # between redraws of progress.png
STOP_SECONDS = 1.0  # between looks for a stop file

Adjust = Callable[["Training"], int | None]  # after an epoch: the new length of the run in epochs, if it changes
Track = Callable[[EpochRecord], None]


def train_fold(
    job: Job, folder: RunFolder, record: RunRecord, reporter: Reporter, interrupts: Interrupts,
    adjust: Adjust = lambda training: None, watch: Midway | None = None, track: Track = lambda epoch: None,
) -> None:
    """Train to the end, going on from the last checkpoint, or from finished weights when the run is made longer.

    After each epoch `track` is told of it, `watch` may look at whole cases, and `adjust` may change the length.

    Raises:
        AutosegError: the data changed or cannot be read, the disk is full, memory does not even suffice for one patch, or steps
            fail again and again. What can be saved is saved, and the same command goes on from there.
        Interrupted: a signal or a stop file asked for an end; the state is saved.
    """
    from autoseg.trainers.default import Training

    folder.remove_leftovers()
    training = Training(job)
    name = f"{record.name} fold {record.fold}"
    begun = _go_on_alike(training, folder, record, name)
    epochs = [e for e in folder.metrics() if e.epoch < training.epoch]
    if begun and record.extended[-1:] == (training.epoch,) and not training.step_in_epoch:
        reporter.info(
            f"{name}: made longer, from {training.epoch} to {job.spec.epochs} epochs; the learning rate is that of the longer run"
        )
    elif begun and training.step:
        reporter.info(f"{name}: going on from step {training.step} of {job.spec.total_steps}")
    folder.save_record(record)
    log = _Log(training, folder, epochs, watch)
    alerts = Alerts(name, job, reporter)
    alerts.before()
    with interrupts.deferred(), reporter.task(name, job.spec.total_steps, "steps") as task, _nothing_lost(log), memory_kept():
        task.advance(training.step, log.note())

        def after_step() -> None:
            log.tell(reporter, name)
            if log.stop_is_asked():
                reporter.info(f"{name}: stopped by a file named stop, which is removed")
                interrupts.signum = signal.SIGTERM
            if job.ranks is not None:  # all stop after the same step
                interrupts.signum = job.ranks.any(interrupts.signum or 0) or None
            if interrupts.signum is not None:
                log.stop(reporter, name)
                interrupts.raise_if_requested()
            log.checkpoint_if_due()
            task.advance(1, log.note())

        for epoch in training.run(after_step):
            log.add(epoch)
            reporter.info(f"{name}: {epoch_line(epoch, training.job.spec.epochs)}")
            alerts.after_epoch(log.epochs, training.job.spec.total_steps)
            track(epoch)
            if watch is not None:
                watch.after_epoch(training, log.epochs, reporter)
            length = adjust(training)
            if length is not None and length != training.job.spec.epochs:
                training.set_length(length)
                record = record.model_copy(update={"spec": training.job.spec})
                folder.save_record(record)
                task.resize(training.job.spec.total_steps)
            task.advance(0, log.note())
        log.finish()
    log.draw()
    interrupts.raise_if_requested()


@contextmanager
def _nothing_lost(log: _Log) -> Iterator[None]:
    """Whatever ends the training, its state is saved where that makes sense, and the message says how to go on."""
    from autoseg.networks.hardware import is_out_of_memory
    from autoseg.trainers.setbacks import Diverged

    training = log.training
    try:
        yield
    except (Diverged, DiskFull):  # what was saved before is better than what there is now, or there is no room for it
        raise
    except AutosegError as error:
        if not log.folder.writes:
            raise
        log.checkpoint()
        raise type(error)(f"{error}. Training is saved at step {training.step}: the same command goes on from there") from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise disk_is_full(log.folder.path) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory at step {training.step} even with one patch at a time on {training.job.device}; the last checkpoint "
            "is intact. Plan smaller patches: autoseg plan DATASET --out WORK --replan --planner fit --gpu-memory GB. "
            f"torch says: {str(error).splitlines()[0][:120]}"
        ) from None


def _go_on_alike(training: Training, folder: RunFolder, record: RunRecord, name: str) -> bool:
    """`_go_on`, by several processes at the same step and from the same weights.

    Raises:
        RunError: they found different checkpoints.
    """
    from autoseg.trainers.state import on_cpu

    ranks = training.job.ranks
    if ranks is None:
        return _go_on(training, folder, record, name)
    begun = ranks.together("go on from its checkpoint", lambda: _go_on(training, folder, record, name))
    last, first = ranks.every([training.step, -training.step])
    if last != -first:
        raise RunError(
            f"{name}: the processes would go on from different steps, {-first} and {last}, here {training.step}; the work folder "
            f"must be the same one for all of them, on a file system that all machines share, here it is {folder.path.parents[2]}"
        )
    ranks.copy_first(training.network.state_dict().values())
    if not begun:  # the rest of a checkpoint is the same file for all
        training.good = on_cpu(training.network.state_dict())
        if training.average:
            training.average.begin(training.good)
    return begun


def _go_on(training: Training, folder: RunFolder, record: RunRecord, name: str) -> bool:
    """Restore the last checkpoint, or finished weights of a shorter run; whether there was anything."""
    from autoseg.trainers.state import State

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
    """Keeps the metrics, the picture, the checkpoints and the weights of one fold up to date."""

    def __init__(self, training: Training, folder: RunFolder, epochs: list[EpochRecord], watch: Midway | None) -> None:
        self.training, self.folder, self.epochs, self.watch = training, folder, epochs, watch
        self._saved = self._drawn = self._looked = time.monotonic()
        self._cost = 0.0
        self._micro_batch = training.micro_batch
        self._best: tuple[int, dict[str, torch.Tensor]] | None = None  # epochs done and weights, not yet on disk

    def tell(self, reporter: Reporter, name: str) -> None:
        """Say what happened in the last step, if anything did."""
        training = self.training
        if training.micro_batch != self._micro_batch:
            self._micro_batch = training.micro_batch
            reporter.warn(f"{name}: out of memory, so each batch now goes in parts of {self._micro_batch}: same result, slower")
        for notice in training.notices:
            reporter.warn(f"{name}: {notice}")
        training.notices.clear()

    def add(self, epoch: EpochRecord) -> None:
        """Take in a finished epoch."""
        from autoseg.trainers.state import on_cpu

        self.epochs.append(epoch)
        self.folder.save_metrics(self.epochs)
        if is_best(self.epochs):
            self._best = epoch.epoch + 1, on_cpu(self.training.weights())
        if time.monotonic() - self._drawn > FIGURE_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Draw progress.png."""
        if not self.folder.writes:
            return
        looks = [look.model_dump() for look in self.watch.records] if self.watch is not None else []
        progress_figure(self.folder.path / "progress.png", [e.model_dump() for e in self.epochs], looks)
        self._drawn = time.monotonic()

    def checkpoint(self) -> None:
        """Save the state, and the best weights first, so that a checkpoint never knows of better ones than there are."""
        begin = time.monotonic()
        self._save_best()
        state = self.training.state()
        self.folder.save_checkpoint(self.training.step, state.tensors, state.numbers)
        self._saved = time.monotonic()
        self._cost = self._saved - begin

    def checkpoint_if_due(self) -> None:
        """Save the state every few minutes, but not while steps fail."""
        due = time.monotonic() - self._saved > max(CHECKPOINT_SECONDS, CHECKPOINT_COST * self._cost)
        if due and not self.training.setbacks.just_before(self.training.step):
            self.checkpoint()

    def stop_is_asked(self) -> bool:
        """Whether there is a stop file; it is removed."""
        if not self.folder.writes or time.monotonic() - self._looked < STOP_SECONDS:
            return False
        self._looked = time.monotonic()
        found = [path for path in self.folder.stop_files if path.exists()]
        for path in found:
            path.unlink(missing_ok=True)
        return bool(found)

    def stop(self, reporter: Reporter, name: str) -> None:
        """Save the state, and weights that can be used as they are."""
        self.checkpoint()
        path = self.folder.weights_so_far_path
        with suppress(DiskFull):
            self.folder.save_other_weights(path, self.training.weights(), self.training.epoch)
            reporter.info(
                f"{name}: stopped after step {self.training.step} of {self.training.job.spec.total_steps}; the network as it is "
                f"now can be used: autoseg predict WORK INPUT --folds {self.training.job.fold} --out DIR"
            )

    def finish(self) -> None:
        """Save the final weights, which ends the run."""
        self._save_best()
        if self.folder.writes:
            (self.folder.validation / "report.json").unlink(missing_ok=True)  # of shorter training, where the run was made longer
        self.folder.save_weights(self.training.weights(), self.training.job.spec.epochs)

    def _save_best(self) -> None:
        if self._best is not None:
            epochs, weights = self._best
            self.folder.save_other_weights(self.folder.best_weights_path, weights, epochs)
            self._best = None

    def note(self) -> str:
        spec = self.training.job.spec
        text = f"epoch {min(self.training.epoch + 1, spec.epochs)}/{spec.epochs}"
        if self.epochs:
            last = self.epochs[-1]
            dice = " ".join("-" if d is None else f"{d:.2f}" for d in list(last.pseudo_dice.values())[:6])
            text += f", loss {last.train_loss:.3f}, pseudo Dice {dice}" if last.pseudo_dice else f", loss {last.train_loss:.3f}"
        return text
