"""How often a choice among candidates is fooled: simulated cross-validations with known true gains.

Run: python tests/benchmarks/nested_selection.py [--repeats 500] [--only NAME]

Every simulated case has a Dice of the baseline and, for each candidate, a difference to it: normal noise per case, lopsided noise
where a scene says so (many small gains, few large losses), and noise per fold, since each fold is another training. Shown are the
mean reported (nested) gain with its standard error, the naive gain (best mean on the very cases it was chosen on), how often the
usual interval of the nested gains would have kept something, and how often `choose` does.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from autoseg.arrays.choice import TAIL, Choice, choose, choose_families

FOLDS = 5
CASE_SD, FOLD_SD = 0.05, 0.005
STAGES = 3  # runs, ensembles, post-processing: each gets a third of the 5 % by which something may be kept wrongly


@dataclass(frozen=True)
class Scene:
    """One setting: candidates beside the baseline, cases per fold, true gain of the first candidate, kind of noise."""

    name: str
    candidates: int = 8
    cases: int = 30
    gain: float = 0.0
    case_sd: float = CASE_SD
    fold_sd: float = FOLD_SD
    shared: float = 0.5
    skewed: bool = False
    tail: float = TAIL


SCENES = (
    Scene("nothing to gain, 1 candidate", candidates=1),
    Scene("nothing to gain, 8 candidates"),
    Scene("nothing to gain, 30 candidates", candidates=30),
    Scene("nothing to gain, 8 unrelated candidates", shared=0.0),
    Scene("nothing to gain, folds differ twice as much", fold_sd=2 * FOLD_SD),
    Scene("nothing to gain, lopsided", skewed=True),
    Scene("nothing to gain, 8 cases per fold", cases=8),
    Scene("one gains 0.02, 30 cases per fold", gain=0.02),
    Scene("one gains 0.02, 30 cases per fold, a third of the 5 %", gain=0.02, tail=0.05 / STAGES),
    Scene("one gains 0.02, 20 cases per fold", gain=0.02, cases=20),
    Scene("one gains 0.02, folds differ twice as much", gain=0.02, fold_sd=2 * FOLD_SD),
    Scene("one gains 0.02, lopsided", gain=0.02, skewed=True),
)


def simulate(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores (1 + candidates, cases), the baseline first, and the fold of each case."""
    fold = np.repeat(np.arange(FOLDS), scene.cases)
    shape = (scene.candidates, len(fold))
    own = 1 - rng.exponential(size=shape) if scene.skewed else rng.normal(size=shape)
    noise = np.sqrt(1 - scene.shared) * own + np.sqrt(scene.shared) * rng.normal(size=shape[1])
    training = rng.normal(size=(scene.candidates, FOLDS))[:, fold]
    base = 0.85 + 0.1 * rng.normal(size=shape[1])
    true = np.zeros((scene.candidates, 1))
    true[0] = scene.gain
    return np.vstack([base, base + true + scene.case_sd * noise + scene.fold_sd * training]), fold


def usual_interval_keeps(scores: np.ndarray, fold: np.ndarray) -> bool:
    """Whether mean - 1.96 standard errors of the nested gains is above zero."""
    gains = scores - scores[0]
    total = gains.sum(1)
    nested = np.zeros(gains.shape[1])
    for f in range(FOLDS):
        here = fold == f
        nested[here] = gains[int((total - gains[:, here].sum(1)).argmax()), here]
    return bool(nested.mean() > 1.96 * nested.std(ddof=1) / np.sqrt(len(nested)))


def run(scene: Scene, repeats: int, seed: int = 0) -> dict[str, float]:
    """Means over simulated cross-validations."""
    rng = np.random.default_rng(seed)
    gains, naive, usual, kept, right = [], [], 0, 0, 0
    for _ in range(repeats):
        scores, fold = simulate(scene, rng)
        found = choose(scores, fold, tail=scene.tail, draws=1000)
        gains.append(found.gain)
        naive.append(found.naive)
        usual += usual_interval_keeps(scores, fold)
        kept += found.kept
        right += found.kept and found.best == 1
    return {
        "gain": float(np.mean(gains)), "error": float(np.std(gains, ddof=1) / np.sqrt(repeats)), "naive": float(np.mean(naive)),
        "usual": usual / repeats, "kept": kept / repeats, "right": right / repeats,
    }


def run_chain(repeats: int, seed: int = 0) -> dict[str, float]:
    """All three choices of one selection, nothing to gain in any: how often is anything kept?"""
    rng = np.random.default_rng(seed)
    tail = 0.05 / STAGES
    gains, naive, kept = [], [], 0
    for _ in range(repeats):
        runs, fold = simulate(Scene("runs", candidates=3), rng)
        ensembles, _ = simulate(Scene("ensembles", candidates=12, case_sd=0.02, shared=0.7), rng)
        steps, _ = simulate(Scene("steps", candidates=25, case_sd=0.01, fold_sd=0.0, shared=0.0), rng)
        families = [list(range(1 + 5 * family, 6 + 5 * family)) for family in range(5)]
        found: list[Choice] = [choose(table, fold, tail=tail, draws=1000) for table in (runs, ensembles)]
        found += choose_families(steps, fold, families, tail=tail, draws=1000)
        gains.append(sum(choice.gain for choice in found))
        naive.append(sum(max(choice.naive, 0.0) for choice in found))
        kept += any(choice.kept for choice in found)
    return {
        "gain": float(np.mean(gains)), "error": float(np.std(gains, ddof=1) / np.sqrt(repeats)), "naive": float(np.mean(naive)),
        "usual": float("nan"), "kept": kept / repeats, "right": float("nan"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--only", default="", help="scenes whose name holds this")
    given = parser.parse_args()
    print(f"{FOLDS} folds, differences of {CASE_SD} per case and {FOLD_SD} per fold, {given.repeats} repeats")
    print(f"{'scene':<56} {'reported gain':>18} {'naive':>8} {'usual keeps':>12} {'kept':>7} {'the right one':>14}")
    scenes = [(scene.name, scene) for scene in SCENES] + [("nothing to gain in runs, ensembles and 5 x 5 steps", None)]
    for name, scene in scenes:
        if given.only in name:
            found = run(scene, given.repeats) if scene else run_chain(given.repeats)
            print(f"{name:<56} {found['gain']:+.5f} +- {found['error']:.5f} {found['naive']:+.4f} {found['usual']:>12.1%} "
                  f"{found['kept']:>7.1%} {found['right']:>14.1%}", flush=True)


if __name__ == "__main__":
    main()
