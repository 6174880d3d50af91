"""What is wrong with the predictions of a cross-validation, by which numbers, and what to do about it."""

from __future__ import annotations

from typing import Literal

from autoseg.types.record import Record

Symptom = Literal[
    "over_predicted_background", "over_predicted_foreground", "blurred_boundary", "far_false_positives", "small_objects_missed",
    "left_right_swap", "slice_jumps", "overfitting", "underfitting", "nothing_learned", "bad_fold", "shifted_group",
    "outlier_cases",
]

SYMPTOMS: dict[Symptom, str] = {
    "over_predicted_background": "too little is segmented",
    "over_predicted_foreground": "too much is segmented",
    "blurred_boundary": "the boundary is imprecise",
    "far_false_positives": "false objects far from the true ones",
    "small_objects_missed": "small objects are missed",
    "left_right_swap": "left and right are mixed up",
    "slice_jumps": "the masks jump from slice to slice",
    "overfitting": "the network learns its training cases by heart",
    "underfitting": "training ended too early",
    "nothing_learned": "nothing was learned",
    "bad_fold": "one fold is much worse than the others",
    "shifted_group": "a group of cases is much worse than the others",
    "outlier_cases": "single cases fail",
}
"""What each symptom is called in plain words, in the order in which findings are told."""


class Evidence(Record):
    """One measured quantity: its value, the limit it is held against (`rule`), and where that limit comes from."""

    quantity: str
    value: float
    rule: str
    source: str


class Remedy(Record):
    """One thing to try: a command to run, and why it should help."""

    command: str
    why: str


class Finding(Record):
    """One symptom of one target (a label, a pair of labels, a fold, a group; empty where it is about the run as a whole)."""

    symptom: Symptom
    target: str = ""
    evidence: tuple[Evidence, ...]
    causes: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()


class Diagnosis(Record):
    """All findings over the out-of-fold masks of one run (or two folders), and what there were too few cases to tell."""

    format: Literal[1] = 1
    run: str = ""
    folds: tuple[int, ...] = ()
    cases: int
    findings: tuple[Finding, ...]
    untold: tuple[str, ...] = ()

    @property
    def symptoms(self) -> tuple[Symptom, ...]:
        """The symptoms that were found, each once."""
        return tuple(dict.fromkeys(finding.symptom for finding in self.findings))
