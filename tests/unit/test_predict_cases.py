"""Running over cases: what the cases before have held is gone when one is tried alone, and when memory is given back."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from autoseg.arrays import unusual
from autoseg.errors import CasesFailed
from autoseg.inference import MemoryPlan, Prediction, Wishes
from autoseg.logs import SILENT
from autoseg.stages import predict_cases as stage
from autoseg.stages.predict_cases import Work, predict_cases
from autoseg.types.case import Image
from autoseg.types.dataset import CaseFiles
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels

GRID = Grid(shape=(2, 3, 4), spacing=(1.0, 1.0, 1.0))
CASES = [CaseFiles(case=name, images=(f"{name}.nii.gz",)) for name in ("a", "b", "c")]


class Held:
    """Something large that belongs to a case."""

    def __init__(self, case: str) -> None:
        self.case = case
        self.placement = None


class Fake:
    """A model that keeps count of what is held; every case fails once, when it is planned or decided as `where` says."""

    def __init__(self, where: str = "", read_ahead: bool = True) -> None:
        self.where, self.read_ahead = where, read_ahead
        self.prepared: weakref.WeakSet[Held] = weakref.WeakSet()
        self.decided: weakref.WeakSet[Held] = weakref.WeakSet()
        self.tried: list[str] = []
        self.alone: dict[str, list[str]] = {}
        self.device, self.postprocessing = SimpleNamespace(type="fake"), ()
        self.labels = Labels(foreground=(Label(name="lung", value=1),))
        self.dtypes: set[str] = set()

    def prepare(self, image: Image, wishes: Wishes) -> list[Held]:
        self.dtypes.add(image.array_czyx.dtype.name)
        found = Held(image.ending)
        self.prepared.add(found)
        return [found]

    def _maybe_fail(self, where: str, case: str) -> None:
        if where != self.where:
            return
        self.tried.append(case)
        if self.tried.count(case) == 1:
            raise MemoryError("short")
        self.alone[case] = [one.case for one in self.prepared]

    def plan_memory(self, prepared: list[Held], wishes: Wishes, next_bytes: int) -> MemoryPlan:
        self._maybe_fail("plan", prepared[0].case)
        return MemoryPlan(1, False, True, self.read_ahead, 0)

    def decide(self, prepared: list[Held], wishes: Wishes, plan: MemoryPlan) -> Held:
        self._maybe_fail("decide", prepared[0].case)
        found = Held(prepared[0].case)
        self.decided.add(found)
        return found

    def finish(self, decided: Held, image_czyx: Any) -> Prediction:
        return Prediction(np.ones(GRID.shape, np.uint8), seconds={"network": 0.0, "restore": 0.0})


class Folder:
    """A folder of masks that keeps nothing but their names."""

    def __init__(self) -> None:
        self.path = Path(__file__).parent
        self.done: list[str] = []
        self.rows: dict[str, dict[str, str]] = {}

    def begin(self, case: CaseFiles, row: dict[str, str]) -> None:
        pass

    def end(self, case: CaseFiles, row: dict[str, str]) -> None:
        self.rows[case.case] = row
        self.done.append(case.case)

    def fail(self, case: CaseFiles, why: str) -> None:
        self.rows[case.case] = {"error": why}

    def mask(self, case: CaseFiles) -> Path:
        return Path(case.case)


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(paths: list[Path], as_stored: bool = False) -> Image:
        array = np.zeros((1, *GRID.shape), np.int16 if as_stored else np.float32)
        return Image(array, GRID, paths[0].name.split(".")[0])

    def header(path: Path) -> None:
        raise ValueError("none")

    monkeypatch.setattr(stage, "read_case", read)
    monkeypatch.setattr(stage, "read_header", header)
    monkeypatch.setattr(stage, "write_label", lambda *arguments: None)


def run(model: Fake) -> Folder:
    folder = Folder()
    predict_cases(Work(cast(Any, model), cast(Any, folder), Wishes()), CASES, SILENT, "predict")
    return folder


@pytest.mark.parametrize("where", ["decide", "plan"])
@pytest.mark.parametrize("read_ahead", [True, False])
def test_a_case_that_was_short_of_memory_is_tried_again_when_nothing_else_is_held(where: str, read_ahead: bool) -> None:
    model = Fake(where, read_ahead)
    folder = run(model)
    assert sorted(folder.done) == ["a", "b", "c"] and sorted(model.tried) == ["a", "a", "b", "b", "c", "c"]
    assert model.alone == {"a": ["a"], "b": ["b"], "c": ["c"]}


def test_a_case_that_is_short_of_memory_twice_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fake()
    monkeypatch.setattr(model, "plan_memory", lambda *arguments: (_ for _ in ()).throw(MemoryError("too large")))
    with pytest.raises(CasesFailed, match="3 of 3 cases failed"):
        run(model)


@pytest.mark.parametrize("read_ahead", [True, False])
def test_memory_is_given_back_when_finished_cases_are_let_go(monkeypatch: pytest.MonkeyPatch, read_ahead: bool) -> None:
    model, folder, kept = Fake(read_ahead=read_ahead), Folder(), []

    def look() -> None:
        kept.append([one.case for one in model.decided if one.case in folder.done])

    monkeypatch.setattr("autoseg.stages.predict_cases.give_back", look)
    predict_cases(Work(cast(Any, model), cast(Any, folder), Wishes()), CASES, SILENT, "predict")
    assert folder.done == ["a", "b", "c"] and len(kept) >= 3 and not any(kept)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.int32])
@pytest.mark.parametrize("counted", [1, 50, 1 << 20])
def test_voxels_are_counted_as_sorting_all_would(kind: type[np.integer], counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unusual, "COUNTED", counted)
    values = np.random.default_rng(0).choice([0, 1, 7, 120] + ([300] if kind != np.uint8 else []), (5, 8, 9)).astype(kind)
    for label in (values, values.transpose(2, 0, 1), values[:, ::-2], values - (kind(1) if np.iinfo(kind).min < 0 else kind(0))):
        expected = {int(value): int((label == value).sum()) for value in np.unique(label)}
        assert unusual.voxel_counts(label) == expected


def test_images_stay_as_they_are_stored() -> None:
    model = Fake()
    folder = run(model)
    assert model.dtypes == {"int16"} and folder.rows["a"]["voxels_lung"] == "24"
