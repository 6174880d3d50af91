"""What a person should hear early about a training run: classes that are not learned, and time that is lost waiting for data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autoseg.files.machine import cores
from autoseg.logs import Reporter
from autoseg.types.run import EpochRecord

if TYPE_CHECKING:
    from autoseg.trainers.default import Job
    from autoseg.trainers.sampling import PatchSource

NOTHING, SOMETHING = 0.01, 0.1  # pseudo Dice below which a class has learned nothing, and above which one has learned something
EPOCHS = 3  # in which it must be so
SHARE, STEPS = 0.15, 200  # of the run, and steps at least, before anything is said
MUCH_WAITING = 0.1  # of the time
SOME_CASES = 20  # whose voxels are counted


class Alerts:
    """Looks at a run's records as they come, and warns once of each thing."""

    def __init__(self, name: str, job: Job, reporter: Reporter) -> None:
        self.name, self.job, self.reporter = name, job, reporter
        self._warned: set[str] = set()
        self._waiting_told = False
        self._looked = 0

    def before(self) -> None:
        """Tell the classes that no training case of the fold holds."""
        for index, (name, _) in enumerate(self.job.labels.targets):
            holding, annotated = self._occurrence(index)
            if not holding:
                self._warned.add(name)
                self.reporter.warn(
                    f"{self.name}: none of the {len(annotated)} training cases holds {name}, so this fold cannot learn it; look "
                    "at splits.json, or plan without this label"
                )

    def after_epoch(self, epochs: Sequence[EpochRecord], total_steps: int) -> None:
        """Tell what the latest of all epochs show."""
        self._looked += 1
        self._wait(epochs[-1])
        if epochs[-1].step < max(STEPS, SHARE * total_steps):
            return
        learned = [value for value in epochs[-1].pseudo_dice.values() if value is not None and value >= SOMETHING]
        for index, (name, _) in enumerate(self.job.labels.targets):
            if name in still_nothing(epochs) and name not in self._warned:
                self._warned.add(name)
                self.reporter.warn(f"{self.name}: {self._about(index, name, bool(learned))}")

    def _about(self, index: int, name: str, others_learn: bool) -> str:
        holding, annotated = self._occurrence(index)
        counted = holding[:SOME_CASES]
        voxels = sum(len(case.locations[index + 1]) for case in counted) / max(len(counted), 1)
        remedy = (
            "try --set sampler.kind=balanced, or --set loss.kind=dice_focal" if others_learn
            else "no other class has either: look at the labels with autoseg check, or try another --set optimizer.lr"
        )
        return (
            f"{name} has learned nothing so far (pseudo Dice below {NOTHING:g}): it occurs in {len(holding)} of {len(annotated)} "
            f"training cases, with about {voxels:.0f} voxels each; {remedy} (under another --name, or with --restart)"
        )

    def _occurrence(self, index: int) -> tuple[list[PatchSource], list[PatchSource]]:
        """Training cases that hold a target, and those in which it is annotated."""
        labelled: Mapping[str, tuple[int, ...]] = self.job.labelled
        annotated = [case for case in self.job.training if index in labelled.get(case.name, (index,))]
        return [case for case in annotated if index + 1 in case.locations], annotated

    def _wait(self, epoch: EpochRecord) -> None:
        """Say once what helps against waiting; not after the first epoch, whose first batch always waits."""
        if epoch.data_wait <= MUCH_WAITING or self._looked < 2 or self._waiting_told:
            return
        self._waiting_told = True
        threads, most = self.job.threads, cores()
        more = f"read with more threads (--threads {max(threads + 1, most)}), " if threads < most else ""
        self.reporter.warn(
            f"{self.name}: {epoch.data_wait:.0%} of the time is spent waiting for data with {threads} reading thread(s) on "
            f"{most} core(s); {more}put the work folder on a faster disk, or let fewer other processes run here"
        )


def still_nothing(epochs: Sequence[EpochRecord]) -> set[str]:
    """The classes whose pseudo Dice was as good as 0 in each of the latest epochs."""
    latest = epochs[-EPOCHS:]
    if len(latest) < EPOCHS:
        return set()
    low = [{name for name, value in epoch.pseudo_dice.items() if value is not None and value < NOTHING} for epoch in latest]
    return set.intersection(*low)


def smoothed_dice(epochs: Sequence[EpochRecord]) -> list[float | None]:
    """The mean pseudo Dice after each epoch, averaged over epochs as 0.9 of before and 0.1 of the latest (nnU-Net)."""
    smoothed: list[float | None] = []
    value: float | None = None
    for epoch in epochs:
        known = [dice for dice in epoch.pseudo_dice.values() if dice is not None]
        if known:
            mean = sum(known) / len(known)
            value = mean if value is None else 0.9 * value + 0.1 * mean
        smoothed.append(value)
    return smoothed


def is_best(epochs: Sequence[EpochRecord]) -> bool:
    """Whether the smoothed pseudo Dice is higher after the latest epoch than after all before."""
    *before, last = smoothed_dice(epochs)
    return last is not None and all(value is None or value < last for value in before)


def epoch_line(epoch: EpochRecord, epochs: int) -> str:
    """One line about an epoch."""
    dice = " ".join("-" if value is None else f"{value:.2f}" for value in epoch.pseudo_dice.values())
    parts = [f"epoch {epoch.epoch + 1}/{epochs}: loss {epoch.train_loss:.3f}"]
    if dice:
        parts.append(f"pseudo Dice {dice}")
    parts.append(f"{epoch.seconds:.3g} s (data wait {epoch.data_wait:.0%}, compute {1 - epoch.data_wait:.0%})")
    if epoch.skipped:
        parts.append(f"{epoch.skipped} steps skipped")
    return ", ".join(parts)
