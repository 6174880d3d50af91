"""The rules that read learning curves: learned by heart, ended too early, or nothing learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from autoseg.types.diagnosis import Evidence, Finding, Symptom
from autoseg.types.run import EpochRecord

EPOCHS_LEAST = 5
RISE, STILL_FALLING, FLAT = 0.1, 0.05, 0.05
NOISE = 3.0
LEARNED_NOTHING, LEARNED_WELL = 0.05, 0.9  # pseudo Dice
OVERFIT_GAP = 0.2

Curve = NDArray[np.float64]


def curve_findings(folds: Mapping[int, Sequence[EpochRecord]], finished: Sequence[int] = ()) -> tuple[list[Finding], list[str]]:
    """Read the curves of each fold; a symptom is named when half of the folds show it.

    finished: folds whose training ended; only these can have ended too early. Returns findings and what could not be told.
    """
    seen: dict[tuple[Symptom, str], list[tuple[int, tuple[Evidence, ...]]]] = {}
    untold = []
    for fold, epochs in sorted(folds.items()):
        if broken := _broken(epochs):
            seen.setdefault(("nothing_learned", ""), []).append((fold, (broken,)))
        elif len(epochs) < EPOCHS_LEAST:
            untold.append(f"fold {fold}: over- and underfitting: {len(epochs)} epochs, {EPOCHS_LEAST} are needed")
        else:
            for symptom, target, evidence in _fold_findings(epochs, fold in finished):
                seen.setdefault((symptom, target), []).append((fold, evidence))
    findings = []
    for (symptom, target), found in seen.items():
        if symptom == "nothing_learned" or len(found) >= max(1, len(folds) / 2):
            where = "folds " + ", ".join(str(fold) for fold, _ in found)
            findings.append(Finding(symptom=symptom, target=target, evidence=_middle([e for _, e in found]),
                                    causes=(f"seen in {where} of {len(folds)} with curves",)))
    return findings, untold


def _middle(found: Sequence[tuple[Evidence, ...]]) -> tuple[Evidence, ...]:
    """The evidence of several folds as one, by medians."""
    if len({len(evidence) for evidence in found}) > 1:
        return found[0]
    return tuple(
        column[0].model_copy(update={"value": median(e.value for e in column)}) for column in zip(*found, strict=True))


def _broken(epochs: Sequence[EpochRecord]) -> Evidence | None:
    bad = [e.epoch for e in epochs if not np.isfinite(e.train_loss)]
    if not bad:
        return None
    return Evidence(quantity="epochs whose training loss is not a finite number", value=len(bad), rule="none",
                    source=f"the first is epoch {bad[0]}; weights do not recover from it")


def _fold_findings(epochs: Sequence[EpochRecord], finished: bool) -> list[tuple[Symptom, str, tuple[Evidence, ...]]]:
    train = np.asarray([e.train_loss for e in epochs])
    known = [(i, e.val_loss) for i, e in enumerate(epochs) if e.val_loss is not None and np.isfinite(e.val_loss)]
    dice = _last_dice(epochs)
    highest = max(dice.values(), default=None)
    smooth_train = _smooth(train)
    fallen = float(smooth_train[0] - smooth_train.min())
    if highest is not None and highest < LEARNED_NOTHING and fallen < FLAT * max(abs(float(smooth_train[0])), 1.0):
        return [("nothing_learned", "", (
            Evidence(quantity="fall of the training loss over the run", value=fallen,
                     rule=f"below {FLAT} of where it began", source="a flat curve"),
            Evidence(quantity="best label's pseudo Dice at the end", value=highest, rule=f"below {LEARNED_NOTHING}",
                     source="patches that are all background")))]
    found: list[tuple[Symptom, str, tuple[Evidence, ...]]] = []
    for name, value in dice.items():
        if value < LEARNED_NOTHING:
            learned = Evidence(quantity="pseudo Dice at the end", value=value, rule=f"below {LEARNED_NOTHING}",
                               source="other labels were learned")
            found.append(("nothing_learned", name, (learned,)))
    if len(known) >= EPOCHS_LEAST:
        curve = np.asarray([value for _, value in known])
        over = _overfit(smooth_train[[i for i, _ in known]], curve)
        under = None
        if not over and finished:
            under = _falling(curve) or _unspent(smooth_train[[i for i, _ in known]], curve, dice)
        if over:
            found.append(("overfitting", "", over))
        elif under:
            found.append(("underfitting", "", under))
    return found


def _last_dice(epochs: Sequence[EpochRecord]) -> dict[str, float]:
    """Median pseudo Dice of each label over the last tenth of the run; labels never seen there are left out."""
    last = epochs[-max(3, len(epochs) // 10):]
    values: dict[str, list[float]] = {}
    for epoch in last:
        for name, value in epoch.pseudo_dice.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: median(column) for name, column in values.items()}


def _window(length: int) -> int:
    return max(3, length // 10)


def _smooth(curve: Curve) -> Curve:
    """Running median over a tenth of the run; at the ends over what is there."""
    half = _window(len(curve)) // 2
    return np.asarray([np.median(curve[max(0, i - half):i + half + 1]) for i in range(len(curve))])


def _noise(curve: Curve) -> float:
    """How far single epochs lie from the smooth curve (median absolute deviation, scaled to a standard deviation)."""
    return float(1.4826 * np.median(np.abs(curve - _smooth(curve))))


def _overfit(train: Curve, curve: Curve) -> tuple[Evidence, ...] | None:
    """The validation loss rose by a tenth of its fall, and more than noise, while the training loss went on falling."""
    smooth = _smooth(curve)
    lowest = int(np.argmin(smooth))
    spread = float(smooth[0] - smooth[lowest])
    rise, gap = float(smooth[-1] - smooth[lowest]), float(smooth[-1] - train[-1])
    noise = NOISE * _noise(curve) / np.sqrt(_window(len(curve)))
    on = float(train[lowest] - train[-1])
    if spread <= 0 or rise < max(RISE * spread, noise) or on <= 0 or gap < OVERFIT_GAP * spread:
        return None
    return (
        Evidence(quantity="rise of the validation loss since its lowest point, as a share of its fall", value=rise / spread,
                 rule=f"{RISE} or more, and {NOISE:g} times the noise", source="running medians over a tenth of the run"),
        Evidence(quantity="validation loss above training loss at the end, as a share of its fall", value=gap / spread,
                 rule=f"{OVERFIT_GAP} or more", source="a network that only saw enough data shows hardly any"),
        Evidence(quantity="share of the run at which the validation loss was lowest", value=lowest / max(len(curve) - 1, 1),
                 rule="before the end", source=""),
    )


def _falling(curve: Curve) -> tuple[Evidence, ...] | None:
    """The validation loss was still falling in the last fifth of the run."""
    smooth = _smooth(curve)
    spread = float(smooth[0] - smooth.min())
    fifth = int(0.8 * (len(smooth) - 1))
    falling = float(smooth[fifth] - smooth[-1])
    noise = NOISE * _noise(curve) / np.sqrt(_window(len(curve)))
    if spread <= 0 or falling < max(STILL_FALLING * spread, noise):
        return None
    return (Evidence(quantity="fall of the validation loss in the last fifth of the run, as a share of its whole fall",
                     value=falling / spread, rule=f"{STILL_FALLING} or more, and {NOISE:g} times the noise",
                     source="a run of sufficient length has levelled off"),)


def _unspent(train: Curve, curve: Curve, dice: Mapping[str, float]) -> tuple[Evidence, ...] | None:
    """The training cases are not fitted better than new ones, and neither are fitted well; the learning rate just ran out."""
    gap = float(_smooth(curve)[-1] - train[-1])
    reached = float(np.mean(list(dice.values()))) if dice else 1.0
    if gap > 0 or reached >= LEARNED_WELL:
        return None
    return (
        Evidence(quantity="validation loss above training loss at the end", value=gap, rule="0 or less",
                 source="a network that has learned what its cases can teach fits them better than new ones"),
        Evidence(quantity="pseudo Dice at the end, mean of the labels", value=reached, rule=f"below {LEARNED_WELL}",
                 source="else there is little left to learn"),
    )
