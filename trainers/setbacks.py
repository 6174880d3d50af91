"""Steps whose loss or gradients are not finite: when to skip one, when to go back, when to stop, and what to say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from autoseg.contracts import Batch
from autoseg.errors import RunError

IN_A_ROW = 3  # so many skipped steps one after another are too many,
WINDOW, OF_WINDOW = 100, 5  # and so are more than OF_WINDOW among WINDOW
TOLD_STEPS = 10  # warnings about single steps; later ones are only counted


class NotFinite(RunError):
    """A step would have spoiled the weights and was not made."""


class Diverged(RunError):
    """Training cannot go on from where it is."""


class Setbacks:
    """Decides after each skipped step, from what was skipped before, so that every run with these data decides the same.

    One bad step is skipped. Too many: training goes back to good weights, once, and goes on at half the learning rate; after
    that, or where the images themselves are not finite, it stops. `where` says in which folder a preprocessed case lies.
    """

    def __init__(self, where: Callable[[str], str] = lambda case: "") -> None:
        self.skipped: list[int] = []  # steps, of the last WINDOW
        self.returns = 0  # how often training went back
        self.bad_images: dict[str, None] = {}
        self.suspects: Counter[str] = Counter()  # how often a case was in a skipped step
        self._where, self._told = where, 0

    def after(self, step: int, cases: Sequence[str], bad: Sequence[str], problem: str, tell: Callable[[str], None]) -> bool:
        """Note that `step` on these cases was skipped, `bad` ones having bad images; whether training must go back.

        Raises:
            RunError: images are at fault; when they are mended training can go on from here.
            Diverged: going back did not help; the message is a diagnosis.
        """
        skipped = [*(old for old in self.skipped if old > step - WINDOW), step]
        self.suspects.update(set(cases))
        self._tell(step, problem, cases, bad, tell)
        in_a_row = skipped[-IN_A_ROW:] == list(range(step - IN_A_ROW + 1, step + 1))
        if not in_a_row and len(skipped) <= OF_WINDOW:
            self.skipped = skipped
            return False
        if bad:
            raise RunError(self._bad_images())
        if self.returns:
            raise Diverged(self._diagnosis(step, problem, cases))
        self.returns, self.skipped = 1, []
        tell(f"{problem} at step {step}, as in other steps just before: going back to the weights of the last good "
             "epoch, and on with half the learning rate")
        return True

    def just_before(self, step: int) -> bool:
        """Whether one of the last steps before this one was skipped, so that the weights may be bad already."""
        return any(step - IN_A_ROW <= old < step for old in self.skipped)

    def _tell(self, step: int, problem: str, cases: Sequence[str], bad: Sequence[str], tell: Callable[[str], None]) -> None:
        for case in bad:
            if case not in self.bad_images:
                self.bad_images[case] = None
                tell(f"case {case}: its preprocessed image holds NaN or infinite values; steps that draw them are skipped. "
                     f"To mend it, stop, remove {self._folder(case)}, and give the same command again")
        if not bad and self._told < TOLD_STEPS:
            self._told += 1
            last = "; further ones are only counted, in metrics.jsonl" if self._told == TOLD_STEPS else ""
            tell(f"{problem} at step {step} on cases {', '.join(cases)}; this step is skipped{last}")

    def _bad_images(self) -> str:
        folders = ", ".join(f"{case} ({self._folder(case)})" for case in self.bad_images)
        return (
            f"too many steps were skipped because preprocessed images hold NaN or infinite values: {folders}. Remove "
            f"{'these folders' if len(self.bad_images) > 1 else 'that folder'} and give the same command again: it preprocesses "
            "them anew and goes on. If they come back, the images themselves are at fault: autoseg check names them"
        )

    def _diagnosis(self, step: int, problem: str, cases: Sequence[str]) -> str:
        often = ", ".join(f"{case} ({count})" for case, count in self.suspects.most_common(5))
        return (
            f"{problem} at step {step} on cases {', '.join(cases)}, as in steps before it, even after going back to "
            "earlier weights with half the learning rate; the images are finite, and the last checkpoint is intact. Most often "
            f"in skipped steps: {often}. If a few cases stand out, look at their labels with autoseg check; else begin anew "
            "(--restart) with a lower --set optimizer.lr, or with --precision fp32"
        )

    def _folder(self, case: str) -> str:
        return self._where(case) or f"the preprocessed case {case}"


def cases_with_bad_images(batch: Batch) -> list[str]:
    """The cases, once each, whose samples hold NaN or infinite values."""
    finite = batch.image.flatten(1).isfinite().all(1).tolist()
    return list(dict.fromkeys(case for case, good in zip(batch.cases, finite, strict=True) if not good))
