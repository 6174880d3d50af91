"""Predict: images in, masks in the geometry of the images out."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autoseg.errors import AutosegError, CasesFailed, RunError
from autoseg.files.images import mask_ending, read_case, split_ending, write_label, write_probabilities
from autoseg.files.runs import RunFolder, load_tensors
from autoseg.files.workspace import Workspace, load_record, write_text
from autoseg.logs import SILENT, Reporter
from autoseg.types.case import Image
from autoseg.types.dataset import CaseFiles
from autoseg.types.geometry import Grid
from autoseg.types.labels import Labels
from autoseg.types.record import Spec
from autoseg.types.report import Selection

if TYPE_CHECKING:
    import torch

    from autoseg.inference import Model, Prediction
    from autoseg.types.case import Preprocessed

PREFERRED = ("3d_fullres", "3d_cascade_fullres", "2d", "3d_lowres")  # order of trust when nothing was selected


@dataclass(frozen=True)
class Options:
    """How to predict; `folds` None means all that are trained."""

    folds: tuple[int, ...] | None = None
    device: str = "auto"
    precision: str = "auto"
    mirror: bool = True
    probabilities: bool = False
    overwrite: bool = False


def load_model(workspace: Workspace, runs: Sequence[str], options: Options, postprocessing: Sequence[Spec] = ()) -> Model:
    """Load the networks of `runs` and the wanted folds into one model.

    Raises:
        RunError: a run or fold is not trained, or its weights do not fit.
    """
    from autoseg.inference import Member, Model
    from autoseg.networks.build import build
    from autoseg.networks.describe import describe
    from autoseg.networks.hardware import pick_device, pick_precision

    members = []
    for run in runs:
        folds = sorted(int(p.name[5:]) for p in (workspace.runs / run).glob("fold_*") if RunFolder(p).finished)
        wanted = folds if options.folds is None else list(options.folds)
        missing = sorted(set(wanted) - set(folds))
        if missing or not wanted:
            raise RunError(
                f"run {run!r} has no finished training of fold(s) {missing or 'any'} (finished: {folds or 'none'}); "
                f"train with: autoseg train {workspace.root} --config {run}"
            )
        networks = []
        for fold in wanted:
            folder = RunFolder(workspace.fold(run, fold))
            record = folder.record()
            plan, spec = record.plan, record.spec
            network = build(describe(plan.configurations[record.configuration], len(plan.channels), plan.labels.output_count))
            try:
                network.load_state_dict(load_tensors(folder.weights_path))
            except RuntimeError as error:
                raise RunError(f"{folder.weights_path} does not fit its plan: {str(error).splitlines()[0]}") from None
            networks.append(network)
        axes = (
            tuple(range(plan.configurations[record.configuration].dims)) if spec.augment.mirror is None else spec.augment.mirror
        )
        members.append(Member(plan, record.configuration, tuple(networks), axes))
    device = pick_device(options.device)
    return Model(members, device, pick_precision(device, options.precision), options.mirror, postprocessing)


def chosen(workspace: Workspace, reporter: Reporter = SILENT) -> tuple[tuple[str, ...], tuple[Spec, ...]]:
    """The runs and post-processing to use: those of selection.json, else the most trusted finished run.

    Raises:
        RunError: nothing is trained.
    """
    if workspace.selection_path.exists():
        selection = load_record(workspace.selection_path, Selection)
        return tuple(selection.runs), tuple(selection.postprocessing)
    finished = sorted({p.parent.parent.name for p in workspace.runs.glob("*/fold_*/weights.safetensors")})
    if not finished:
        raise RunError(f"{workspace.root} holds no finished training; run: autoseg train {workspace.root}")
    run = min(finished, key=lambda name: (PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), name))
    if len(finished) > 1:
        reporter.info(
            f"no selection yet, so {run} is used out of {', '.join(finished)}; compare them with: autoseg select {workspace.root}"
        )
    return (run,), ()


def predict(
    workspace: Workspace, cases: Sequence[CaseFiles], out: Path, options: Options = Options(), reporter: Reporter = SILENT
) -> None:
    """Predict new cases with the selected model; finished outputs of the same model are skipped.

    Raises:
        CasesFailed: some cases failed; they are listed, the rest is done.
        RunError: nothing trained, or `out` holds another model's masks.
    """
    runs, postprocessing = chosen(workspace.require(), reporter)
    identity = _identity(workspace, runs, options, postprocessing)
    _guard(out, identity, options.overwrite)
    work = _Work.of(cases, out, options)
    if not work.todo:
        reporter.info(f"all {len(cases)} cases are predicted already; --overwrite makes them anew")
        return
    model = load_model(workspace, runs, options, postprocessing)
    write_text(out / "prediction.json", json.dumps(identity, indent=1) + "\n")
    _run(model, work, reporter)


def predict_validation(
    workspace: Workspace,
    runs: Sequence[str],
    fold: int,
    out: Path,
    reporter: Reporter = SILENT,
    device: str = "auto",
    precision: str = "auto",
) -> None:
    """Predict the validation cases of a fold with networks that have not seen them, without post-processing.

    Raises:
        CasesFailed: some cases failed.
    """
    split = RunFolder(workspace.fold(runs[0], fold)).record().split
    cases = [case for case in workspace.dataset().cases if case.case in set(split.val)]
    options = Options(folds=(fold,), device=device, precision=precision)
    identity = _identity(workspace, runs, options, ())
    try:
        _guard(out, identity, False)
    except RunError:
        options = Options(folds=(fold,), device=device, precision=precision, overwrite=True)
    work = _Work.of(cases, out, options)
    if work.todo:
        model = load_model(workspace, runs, options)
        write_text(out / "prediction.json", json.dumps(identity, indent=1) + "\n")
        _run(model, work, reporter, name=f"validate fold {fold}")


@dataclass(frozen=True)
class _Work:
    todo: tuple[CaseFiles, ...]
    all: tuple[CaseFiles, ...]
    out: Path
    probabilities: bool

    @classmethod
    def of(cls, cases: Sequence[CaseFiles], out: Path, options: Options) -> _Work:
        def finished(case: CaseFiles) -> bool:
            masks = _target(out, case).exists()
            return masks and (not options.probabilities or _probabilities(out, case).exists())

        todo = tuple(c for c in cases if options.overwrite or not finished(c))
        return cls(todo, tuple(cases), out, options.probabilities)


def _target(out: Path, case: CaseFiles) -> Path:
    return out / f"{case.case}{mask_ending(split_ending(case.images[0])[1])}"


def _probabilities(out: Path, case: CaseFiles) -> Path:
    return out / f"{case.case}_probabilities.nii.gz"


def _identity(workspace: Workspace, runs: Sequence[str], options: Options, postprocessing: Sequence[Spec]) -> dict[str, object]:
    """What the masks depend on: weights, folds, mirroring and post-processing."""
    weights = {}
    for run in runs:
        for path in sorted((workspace.runs / run).glob("fold_*/weights.safetensors")):
            if options.folds is None or int(path.parent.name[5:]) in options.folds:
                with path.open("rb") as file:
                    weights[f"{run}/{path.parent.name}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"weights": weights, "mirror": options.mirror, "postprocessing": [s.model_dump(mode="json") for s in postprocessing]}


def _guard(out: Path, identity: Mapping[str, object], overwrite: bool) -> None:
    path = out / "prediction.json"
    if overwrite or not path.exists():
        return
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        found = None
    if found != identity:
        raise RunError(
            f"{out} holds masks of another model or other options (see {path}); choose another --out, or give --overwrite"
        )


def _run(model: Model, work: _Work, reporter: Reporter, name: str = "predict") -> None:
    """Three threads, one case each: the next case is read while this one is computed and the last one is written."""
    rows = _read_summary(work.out / "summary.csv")
    failed: dict[str, str] = {}
    with (
        ThreadPoolExecutor(1, "reader") as reader,
        ThreadPoolExecutor(1, "writer") as writer,
        reporter.task(name, len(work.todo)) as task,
    ):
        reading: Future[_Ready] | None = reader.submit(_read, model, work.todo[0])
        writing: Future[None] | None = None
        for index, case in enumerate(work.todo):
            assert reading is not None
            current = reading
            try:
                ready = current.result()
                reading = reader.submit(_read, model, work.todo[index + 1]) if index + 1 < len(work.todo) else None
                begin = time.perf_counter()
                logits = [model.logits(m, p) for m, p in zip(model.members, ready.prepared, strict=True)]
                ready.seconds["network"] = time.perf_counter() - begin
                if writing is not None:
                    writing.result()
                writing = writer.submit(_finish, model, work, case, ready, logits, rows, failed)
            except (AutosegError, ValueError, OSError, MemoryError) as error:
                if current is reading:
                    reading = reader.submit(_read, model, work.todo[index + 1]) if index + 1 < len(work.todo) else None
                _fail(work, case, error, rows, failed)
            task.advance(note=case.case)
        if writing is not None:
            writing.result()
    if failed:
        lines = "\n".join(f"  {case}: {why}" for case, why in failed.items())
        raise CasesFailed(
            f"{len(failed)} of {len(work.todo)} cases failed, the rest is done (see {work.out / 'summary.csv'}):\n{lines}"
        )


@dataclass(frozen=True)
class _Ready:
    image_grid: Grid
    prepared: list[Preprocessed]
    seconds: dict[str, float]


def _read(model: Model, case: CaseFiles) -> _Ready:
    begin = time.perf_counter()
    image: Image = read_case([Path(p) for p in case.images])
    middle = time.perf_counter()
    prepared = model.prepare(image)
    return _Ready(image.grid, prepared, {"read": middle - begin, "preprocess": time.perf_counter() - middle})


def _finish(
    model: Model,
    work: _Work,
    case: CaseFiles,
    ready: _Ready,
    logits: list[torch.Tensor],
    rows: dict[str, dict[str, str]],
    failed: dict[str, str],
) -> None:
    try:
        begin = time.perf_counter()
        prediction: Prediction = model.restore(logits, [p.placement for p in ready.prepared], work.probabilities)
        middle = time.perf_counter()
        like = Path(case.images[0])
        if prediction.probabilities_czyx is not None:
            write_probabilities(_probabilities(work.out, case), prediction.probabilities_czyx, ready.image_grid, like)
        write_label(_target(work.out, case), prediction.label_zyx, ready.image_grid, like)
        ready.seconds.update({"restore": middle - begin, "write": time.perf_counter() - middle})
        rows[case.case] = _row(case, ready, prediction.label_zyx, model.labels)
        _write_summary(work, rows)
    except (AutosegError, ValueError, OSError, MemoryError) as error:
        _fail(work, case, error, rows, failed)


def _fail(work: _Work, case: CaseFiles, error: BaseException, rows: dict[str, dict[str, str]], failed: dict[str, str]) -> None:
    why = " ".join((str(error) or type(error).__name__).split())
    failed[case.case] = why
    rows[case.case] = {"case": case.case, "status": "failed", "error": why}
    _write_summary(work, rows)


def _row(
    case: CaseFiles, ready: _Ready, label_zyx: np.ndarray[tuple[int, ...], np.dtype[np.integer]], labels: Labels
) -> dict[str, str]:
    row = {"case": case.case, "status": "done", "error": ""}
    row.update({f"seconds_{stage}": f"{seconds:.3f}" for stage, seconds in ready.seconds.items()})
    values, counts = np.unique(label_zyx, return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    for label in labels.foreground:
        voxels = found.get(label.value, 0)
        row[f"voxels_{label.name}"] = str(voxels)
        row[f"ml_{label.name}"] = f"{voxels * ready.image_grid.voxel_volume_ml:.4f}"
    return row


def _read_summary(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["case"]: dict(row) for row in csv.DictReader(file) if row.get("case")}


def _write_summary(work: _Work, rows: dict[str, dict[str, str]]) -> None:
    columns: dict[str, None] = dict.fromkeys(["case", "status", "error"])
    for row in rows.values():
        columns.update(dict.fromkeys(row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), restval="")
    writer.writeheader()
    writer.writerows(rows[case] for case in sorted(rows))
    write_text(work.out / "summary.csv", buffer.getvalue())
