"""Find out from out-of-fold predictions how far the selected networks can be trusted: calibration, quality, usual cases."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from autoseg.arrays.calibration import VoxelSample, calibrate_sample, draw, strata
from autoseg.arrays.metrics import measure
from autoseg.arrays.unusual import combined, describe_image, describe_mask, gather
from autoseg.errors import RecordError, RunError
from autoseg.files.preprocessed import digest, source_states
from autoseg.files.runs import RunFolder
from autoseg.files.workspace import Workspace, atomic_path, load_record, save_record
from autoseg.logs import SILENT, Reporter
from autoseg.stages.fingerprint import load_case
from autoseg.stages.judge import prediction_features, trust_path
from autoseg.stages.predict import Options, chosen, finished_folds, load_model, network_hashes
from autoseg.types.dataset import CaseFiles
from autoseg.types.record import Record
from autoseg.types.selection import Selection
from autoseg.types.trust import CalibrationScore, CaseNumbers, QualityModel, Trust

if TYPE_CHECKING:
    from autoseg.inference import Model
    from autoseg.types.case import Preprocessed

VERSION = 1  # of what is measured: another one makes everything anew
SAMPLE_NUMBERS = 40_000_000  # logits kept of all cases together
MOST_VOXELS = 4000  # of a case
PATIENT_PARTS = 5  # where there are too few folds to hold back
CACHE = "_trust"
_IMPOSSIBLE = -1e4  # a logit whose probability is 0 at any temperature
_FIELDS = ("logits", "truth", "weights", "near")  # of a VoxelSample

Parts = tuple[list[int], Literal["folds", "patients", "none"]]


class _Facts(Record):
    """What was found out about one case, apart from the sampled voxels; `dice` is undefined where both masks are empty."""

    dice: dict[str, float | None]
    features: dict[str, dict[str, float] | None]
    numbers: CaseNumbers


@dataclass(frozen=True)
class _Evidence:
    """One case: its fold, its facts, and sampled voxels for each run."""

    case: CaseFiles
    fold: int
    facts: _Facts
    samples: tuple[VoxelSample, ...]


def calibrate(
    workspace: Workspace, reporter: Reporter = SILENT, device: str = "auto", precision: str = "auto",
) -> Trust:
    """Predict every validation case of the selected runs with the networks that have not seen it, and write trust.json.

    What was made of the same networks and cases stays; a case that was done before an interruption is not done again.
    Raises RunError when nothing is trained or memory does not suffice for a case.
    """
    selection = chosen(workspace.require(), reporter)
    folds, missing = _folds(workspace, selection)
    order = _order(workspace, selection, folds)
    networks: dict[str, str] = {}
    for run in selection.runs:
        networks.update(network_hashes(workspace, run, None))
    steps = [step.model_dump(mode="json") for step in selection.postprocessing]
    shared = digest([VERSION, networks, selection.runs, selection.run_weights, steps, folds])
    keys = {case.case: digest([shared, fold, source_states([Path(p) for p in (*case.images, str(case.label))]),
                               *([case.labelled] if case.labelled is not None else [])])
            for fold, case in order}
    path, inputs = trust_path(workspace), digest(keys)
    known = _known(path)
    if known is not None and known.inputs == inputs:
        reporter.info(f"{path} is up to date")
        return known
    evidence = _collect(workspace, selection, order, keys, Options(device=device, precision=precision), reporter)
    trust = _conclude(selection, evidence, networks, inputs).model_copy(update={"folds": folds, "missing": missing})
    save_record(path, trust)
    shutil.rmtree(workspace.runs / CACHE, ignore_errors=True)
    return trust


def _known(path: Path) -> Trust | None:
    try:
        return load_record(path, Trust) if path.exists() else None
    except RecordError:  # damaged, or of another version: it is made anew
        return None


def _folds(workspace: Workspace, selection: Selection) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Folds finished in all selected runs, and what is missing."""
    finished = {run: set(finished_folds(workspace, run)) for run in selection.runs}
    shared = sorted(set.intersection(*finished.values()))
    if not shared:
        raise RunError(
            f"no fold is finished in all of {', '.join(selection.runs)}; train one: autoseg train {workspace.root} --folds 0"
        )
    missing = [f"run {run} lacks fold {fold}" for run in selection.runs for fold in range(len(workspace.splits()))
               if fold not in finished[run]]
    return tuple(shared), tuple(missing)


def _order(workspace: Workspace, selection: Selection, folds: Sequence[int]) -> list[tuple[int, CaseFiles]]:
    """Each labelled case with the first fold that validates it in all runs and trains on it in none."""
    known = {case.case: case for case in workspace.dataset().cases if case.label is not None}
    order: dict[str, tuple[int, CaseFiles]] = {}
    for fold in folds:
        splits = [RunFolder(workspace.fold(run, fold)).record().split for run in selection.runs]
        for name in splits[0].val:
            if name in known and all(name in split.val and name not in split.train for split in splits):
                order.setdefault(name, (fold, known[name]))
    return sorted(order.values(), key=lambda item: item[0])


def _collect(
    workspace: Workspace, selection: Selection, order: Sequence[tuple[int, CaseFiles]], keys: dict[str, str], options: Options,
    reporter: Reporter,
) -> list[_Evidence]:
    """Evidence of all cases, from the cache where it is there."""
    cache = workspace.runs / CACHE
    found: list[_Evidence] = []
    model: tuple[int, Model] | None = None
    outputs = workspace.dataset().labels.output_count
    count = max(200, min(MOST_VOXELS, SAMPLE_NUMBERS // (outputs * max(1, len(order)))))
    with reporter.task("calibrate", len(order)) as task:
        for fold, case in order:
            path = cache / f"{case.case}.npz"
            evidence = _load(path, keys[case.case], fold, case)
            if evidence is None:
                if model is None or model[0] != fold:
                    one = Options((fold,), options.device, options.precision)
                    model = fold, load_model(workspace, selection.runs, one, selection.postprocessing, selection.run_weights)
                try:
                    evidence = _examine(model[1], fold, case, count)
                except MemoryError as error:
                    raise RunError(f"case {case.case}: {error or 'out of memory'}") from error
                _save(path, keys[case.case], evidence)
            found.append(evidence)
            task.advance(note=case.case)
    return found


def _examine(model: Model, fold: int, case: CaseFiles, count: int) -> _Evidence:
    """Predict one case and compare it with its reference."""
    from autoseg.inference import Wishes

    image, truth = load_case(case, model.labels)
    assert truth is not None
    judged = Wishes(judged=True)
    prepared = model.prepare(image, truth, judged)
    pairs = list(zip(model.members, prepared, strict=True))
    logits = [model.logits(member, one, uncertainty=True) for member, one in pairs]
    placements = [one.placement for one in prepared]
    decided = model.settle(logits, placements, judged)
    label = model.finish(decided, image.array_czyx).label_zyx
    labels = model.labels
    found = measure(truth, labels.encode(label), image.grid.spacing, labels.targets, 0.0, labels.ignore_index, surfaces=False)
    plan, configuration = model.members[0].plan, model.members[0].configuration
    annotated = labels.annotated(case.labelled)
    facts = _Facts(
        dice={name: values["dice"] if i in annotated else None for i, (name, values) in enumerate(found.items())},
        features=prediction_features(model, placements, decided.gauges),
        numbers=combined(describe_image(image, plan, configuration), describe_mask(label, image.grid, labels)),
    )
    seed = int.from_bytes(hashlib.blake2b(case.case.encode(), digest_size=8).digest(), "little")
    samples = [_sample(model, one, prediction.cpu().numpy()[: labels.output_count], annotated, count, np.random.default_rng(seed))
               for one, prediction in zip(prepared, logits, strict=True)]
    return _Evidence(case, fold, facts, tuple(samples))


def _sample(
    model: Model, prepared: Preprocessed, logits_czyx: NDArray[np.float32], annotated: Sequence[int], count: int,
    rng: np.random.Generator,
) -> VoxelSample:
    """Voxels of one run's prediction on the preprocessed grid, with what is true of them.

    Where not every target is `annotated`, the others are merged with the background, in which they are in the reference.
    """
    labels, truth = model.labels, prepared.label_zyx
    assert truth is not None
    decided = (logits_czyx > 0).sum(0) if labels.regions else logits_czyx.argmax(0)
    found = decided.astype(np.int16)
    kind, near = strata(truth, found, labels.ignore_index), strata(found, found) < 3
    places, weights = draw(kind, count, rng)
    values = np.maximum(truth.reshape(-1)[places], 0)
    if labels.regions:
        values = np.stack([np.isin(values, indices) for _, indices in labels.targets], 1).astype(np.int16)
    kept = logits_czyx.reshape(len(logits_czyx), -1)[:, places].T.astype(np.float32)
    hidden = [i + (not labels.regions) for i in range(len(labels.targets)) if i not in annotated]
    if hidden and labels.regions:
        values[:, hidden] = 0
    elif hidden:
        kept[:, 0] = np.logaddexp.reduce(kept[:, [0, *hidden]], axis=1)
        values = np.where(np.isin(values, hidden), 0, values)
    kept[:, hidden] = _IMPOSSIBLE
    return VoxelSample(kept, values, weights, near.reshape(-1)[places])


def _save(path: Path, key: str, evidence: _Evidence) -> None:
    text = json.dumps({"key": key, "facts": evidence.facts.model_dump(mode="json")})
    arrays = {f"{field}_{i}": getattr(sample, field) for i, sample in enumerate(evidence.samples) for field in _FIELDS}
    with atomic_path(path) as temporary:
        np.savez(temporary, text=np.frombuffer(text.encode(), np.uint8), **arrays)


def _load(path: Path, key: str, fold: int, case: CaseFiles) -> _Evidence | None:
    """What was kept of a case; None when there is nothing of this key."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            data = json.loads(file["text"].tobytes())
            if data["key"] != key:
                return None
            count = sum(name.startswith("logits_") for name in file.files)
            samples = tuple(VoxelSample(*(file[f"{field}_{i}"] for field in _FIELDS)) for i in range(count))
            return _Evidence(case, fold, TypeAdapter(_Facts).validate_python(data["facts"]), samples)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # torn by a kill: made anew
        return None


def _conclude(selection: Selection, evidence: Sequence[_Evidence], networks: dict[str, str], inputs: str) -> Trust:
    """Everything that follows from the evidence."""
    from autoseg.arrays.quality import MIN_CASES, fit_quality

    by_fold, by_three = _parts(evidence, 2), _parts(evidence, 3)
    calibration = {
        run: calibrate_sample([e.samples[i] for e in evidence], *by_fold) for i, run in enumerate(selection.runs)
    }
    features = [e.facts.features for e in evidence]
    mean = fit_quality(features, [_mean_dice(e) for e in evidence], by_three[0])
    names = list(features[0]) if features else []
    fitted = {name: fit_quality(features, [e.facts.dice[name] for e in evidence], by_three[0], name) for name in names}
    quality = {name: model for name, model in fitted.items() if model is not None}
    usable = sum(any(one is not None for one in case.values()) for case in features)
    note = "" if mean is not None else f"too few cases for an estimate of quality: {usable}, at least {MIN_CASES} are needed"
    return Trust(
        inputs=inputs, runs=selection.runs, weights=selection.run_weights, folds=(), networks=networks, calibration=calibration,
        quality_mean=mean, quality=quality if len(names) > 1 else {}, quality_note=note,
        training=gather([e.facts.numbers for e in evidence]), cases=len(evidence),
    )


def _mean_dice(evidence: _Evidence) -> float | None:
    known = [value for value in evidence.facts.dice.values() if value is not None]
    return float(np.mean(known)) if known else None


def _parts(evidence: Sequence[_Evidence], folds: int) -> Parts:
    """What is held back in turn: folds where there are at least so many, else groups of patients."""
    numbers = [e.fold for e in evidence]
    if len(set(numbers)) >= folds:
        return numbers, "folds"
    patients = {name: i for i, name in enumerate(sorted({e.case.group or e.case.case for e in evidence}))}
    if len(patients) < 2:
        return [0] * len(evidence), "none"
    return [patients[e.case.group or e.case.case] % PATIENT_PARTS for e in evidence], "patients"


def describe_trust(trust: Trust) -> tuple[list[str], list[list[str]]]:
    """What trust.json says, in sentences, and a table of calibration on held-back parts."""
    facts = [f"calibrated on {trust.cases} cases by networks that have not seen them, folds {', '.join(map(str, trust.folds))}"]
    facts += [_told(name, model) for name, model in {"foreground mean": trust.quality_mean, **trust.quality}.items() if model]
    facts += [trust.quality_note] if trust.quality_note else []
    rows = [["run", "temperature", "held back", "near structures: ECE", "after", "NLL", "after", "all voxels: ECE", "after"]]
    for run, one in trust.calibration.items():
        near, whole = (one.near_before, one.near_after), (one.whole_before, one.whole_after)
        cells = [_cell(score, "ece") for score in near] + [_cell(score, "nll") for score in near]
        cells += [_cell(score, "ece") for score in whole]
        rows.append([run, f"{one.temperature:.3f}", one.parts, *cells])
    return facts, rows


def _told(name: str, model: QualityModel) -> str:
    rank = "not defined" if model.spearman is None else f"{model.spearman:.2f}"
    covered = "" if model.coverage is None else f"; {model.level:.0%} intervals hold {model.coverage:.0%}"
    return (
        f"estimated Dice, {name}: rank correlation with the true Dice {rank} on {model.cases} held-back cases, mean error "
        f"{model.error:.4f} (always saying the mean: {model.plain_error:.4f}){covered}"
    )


def _cell(score: CalibrationScore | None, field: Literal["ece", "nll"]) -> str:
    return "-" if score is None else f"{getattr(score, field):.5f}"


