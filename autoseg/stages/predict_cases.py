"""Run a model over cases: the next one is read while one is computed and the last one is written; a bad one fails alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoseg.arrays.unusual import combined, describe_image, describe_mask, unusual, voxel_counts
from autoseg.errors import AutosegError, CasesFailed
from autoseg.files.allocator import give_back
from autoseg.files.images import read_case, read_header, write_label, write_probabilities
from autoseg.files.masks import MaskFolder
from autoseg.logs import Reporter
from autoseg.stages.judge import Judge
from autoseg.types.dataset import CaseFiles
from autoseg.types.geometry import Grid, Shape
from autoseg.types.labels import Labels
from autoseg.types.trust import CaseNumbers, TrainingCases

if TYPE_CHECKING:
    from autoseg.inference import MemoryPlan, Model, Wishes
    from autoseg.inference.records import Decided
    from autoseg.types.case import Placement, Preprocessed

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What is made of every case, and where it goes."""

    model: Model
    folder: MaskFolder
    wishes: Wishes
    judge: Judge | None = None
    training: TrainingCases | None = None


@dataclass(frozen=True)
class _Ready:
    """A case that is read; `prepared` is emptied once the networks have seen it."""

    grid: Grid
    prepared: list[Preprocessed]
    placements: list[Placement]
    seconds: dict[str, float]
    image_czyx: NDArray[np.generic] | None  # kept only for post-processing that looks at it
    numbers: CaseNumbers | None  # what the image is like, where that is judged


@dataclass(frozen=True)
class _Failed:
    """Why there is no result."""

    why: Exception


def predict_cases(work: Work, todo: Sequence[CaseFiles], reporter: Reporter, name: str) -> None:
    """Predict cases into the folder.

    Raises:
        CasesFailed: some cases failed; they are listed, the rest is done.
    """
    failed: dict[str, str] = {}
    short: list[CaseFiles] = []  # out of memory while others were in work: tried once more alone

    def settle(case: CaseFiles, outcome: object, alone: bool = False) -> None:
        if isinstance(outcome, str) and outcome:
            reporter.warn(f"case {case.case} is unlike the training cases: {outcome}")
        if not isinstance(outcome, _Failed):
            return
        if isinstance(outcome.why, MemoryError) and not alone:
            short.append(case)
            return
        failed[case.case] = " ".join((str(outcome.why) or type(outcome.why).__name__).split())
        work.folder.fail(case, failed[case.case])

    with (
        ThreadPoolExecutor(1, "reader") as reader,
        ThreadPoolExecutor(1, "writer") as writer,
        reporter.task(name, len(todo)) as task,
    ):
        writing: tuple[CaseFiles, Future[str | _Failed]] | None = None
        reading: Future[_Ready | _Failed] = reader.submit(_attempt, _read, work, todo[0])
        for case, upcoming in zip(todo, [*todo[1:], None], strict=True):
            ready = reading.result()
            if case is todo[0] and isinstance(ready, _Ready):
                writer.submit(_warm, work.model, ready.grid.shape)
            plan = ready if isinstance(ready, _Failed) else _attempt(_plan, work, ready, upcoming)
            ahead = isinstance(plan, _Failed) or plan.read_ahead
            if upcoming is not None and ahead:
                reading = reader.submit(_attempt, _read, work, upcoming)
            decided: Decided | _Failed | None = None
            if isinstance(ready, _Failed) or isinstance(plan, _Failed):
                settle(case, ready if isinstance(ready, _Failed) else plan)
            else:
                decided = _attempt(_compute, work, ready, plan)
                settle(case, decided)
            if writing is not None:
                settle(writing[0], writing[1].result())
                writing = None
                give_back()  # here, since the writer has let go of the case only now
            if not isinstance(ready, _Failed) and decided is not None and not isinstance(decided, _Failed):
                writing = case, writer.submit(_attempt, _finish, work, case, ready, [decided])
            del ready, decided
            if upcoming is not None and not ahead:
                if writing is not None:
                    wait([writing[1]])
                    give_back()
                reading = reader.submit(_attempt, _read, work, upcoming)
            task.advance(note=case.case)
        if writing is not None:
            settle(writing[0], writing[1].result())
        del reading, writing  # what they hold would make the cases that are tried alone fail again
        give_back()
        for case in short:
            settle(case, _attempt(_whole, work, case), alone=True)
            give_back()
    if failed:
        raise _cases_failed(work, failed, len(todo))


def _cases_failed(work: Work, failed: Mapping[str, str], count: int) -> CasesFailed:
    lines = "\n".join(f"  {case}: {why}" for case, why in failed.items())
    summary = work.folder.path / "summary.csv"
    return CasesFailed(f"{len(failed)} of {count} cases failed, the rest is done (see {summary}):\n{lines}")


def _warm(model: Model, shape: Shape) -> None:
    """Load what restoring is compiled with while the first case is computed, where it will be used."""
    from autoseg.arrays.restore.compiled import kernels
    from autoseg.arrays.restore.ensemble import worth_compiling

    if model.device.type == "cpu" and worth_compiling(shape, len(model.members) * model.labels.output_count):
        kernels()


def _attempt(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T | _Failed:
    """The result of one case's work, or the error that makes only this case fail."""
    from autoseg.networks.hardware import is_out_of_memory

    try:
        return work(*arguments, **options)
    except (AutosegError, ValueError, OSError, MemoryError) as error:
        error.__cause__ = error.__context__ = None
        return _Failed(error.with_traceback(None))  # a traceback would keep the case's arrays
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _Failed(MemoryError(f"out of memory: {str(error).splitlines()[0]}"))


def _read(work: Work, case: CaseFiles) -> _Ready:
    from autoseg.arrays.postprocess import needs_image

    begin = time.perf_counter()
    image = read_case([Path(p) for p in case.images], as_stored=True)
    middle = time.perf_counter()
    prepared = work.model.prepare(image, wishes=work.wishes)
    numbers: CaseNumbers | None = None
    if work.judge is not None:
        numbers = work.judge.look(work.model, image)
    elif work.training is not None:
        first = work.model.members[0]
        numbers = describe_image(image, first.plan, first.configuration)
    seconds = {"read": middle - begin, "preprocess": time.perf_counter() - middle}
    kept = image.array_czyx if needs_image(work.model.postprocessing) else None
    return _Ready(image.grid, prepared, [one.placement for one in prepared], seconds, kept, numbers)


def _plan(work: Work, ready: _Ready, upcoming: CaseFiles | None) -> MemoryPlan:
    """How a case is computed, and whether the one after it may be read meanwhile."""
    try:
        return work.model.plan_memory(ready.prepared, work.wishes, 0 if upcoming is None else _reading_bytes(work, upcoming))
    except MemoryError:
        ready.prepared.clear()
        raise


def _reading_bytes(work: Work, case: CaseFiles) -> int:
    """What reading a case takes, from its headers; 0 where they cannot be read, which is told when the case is at turn."""
    try:
        headers = [read_header(Path(path)) for path in case.images]
    except (AutosegError, ValueError, OSError):
        return 0
    kinds = {np.dtype(header.dtype) for header in headers}
    itemsize = max(kind.itemsize for kind in kinds)
    if len(kinds) > 1:  # they become float32
        itemsize = max(4, itemsize)
    return work.model.reading_bytes(headers[0].grid, sum(header.channels for header in headers), itemsize)


def _compute(work: Work, ready: _Ready, plan: MemoryPlan) -> Decided:
    try:
        return work.model.decide(ready.prepared, work.wishes, plan)
    finally:
        ready.prepared.clear()


def _whole(work: Work, case: CaseFiles) -> str:
    ready = _read(work, case)
    return _finish(work, case, ready, [_compute(work, ready, _plan(work, ready, None))])


def _finish(work: Work, case: CaseFiles, ready: _Ready, handed: list[Decided]) -> str:
    """Post-process, judge and write one case, which is taken out of `handed` so that nobody else keeps it.

    Returns in what it is unlike the training cases.
    """
    decided = handed.pop()
    model, folder, begin = work.model, work.folder, time.perf_counter()
    prediction = model.finish(decided, ready.image_czyx)
    ready.seconds.update(prediction.seconds)
    ready.seconds["restore"] += time.perf_counter() - begin
    row = _row(case, ready, prediction.label_zyx, model.labels)
    if work.judge is not None and ready.numbers is not None:
        row |= work.judge.columns(model, ready.placements, decided.gauges, prediction.label_zyx, ready.numbers)
    elif work.training is not None and ready.numbers is not None:
        whole = combined(ready.numbers, describe_mask(prediction.label_zyx, ready.grid, model.labels))
        row["unusual"] = "; ".join(unusual(whole, work.training))
    like = Path(case.images[0])
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.begin(case, row)
    begin = time.perf_counter()
    if prediction.probabilities_czyx is not None:
        write_probabilities(folder.probabilities(case), prediction.probabilities_czyx, ready.grid, like)
    if prediction.uncertainty_kzyx is not None:
        write_probabilities(folder.uncertainty(case), prediction.uncertainty_kzyx, ready.grid, like)
    write_label(folder.mask(case), prediction.label_zyx, ready.grid, like)
    folder.end(case, {**row, "seconds_write": f"{time.perf_counter() - begin:.3f}"})
    return row.get("unusual", "")


def _row(case: CaseFiles, ready: _Ready, label_zyx: NDArray[np.integer], labels: Labels) -> dict[str, str]:
    row = {"case": case.case, "status": "done", "error": ""}
    row.update({f"seconds_{stage}": f"{seconds:.3f}" for stage, seconds in ready.seconds.items()})
    found = voxel_counts(label_zyx)
    for label in labels.foreground:
        voxels = found.get(label.value, 0)
        row[f"voxels_{label.name}"] = str(voxels)
        row[f"ml_{label.name}"] = f"{voxels * ready.grid.voxel_volume_ml:.4f}"
    return row
