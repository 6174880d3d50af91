"""Records on disk: written whole or not at all, read back equal, and faults named by their exact path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.errors import RecordError
from autoseg.files.workspace import Workspace, atomic_path, load_record, save_record, to_json, validate, write_text
from autoseg.types.dataset import Split
from autoseg.types.plan import Plan
from autoseg.types.run import TrainSpec

NASTY = st.text(alphabet=st.one_of(st.sampled_from('[]{},:"\\\n\r\t \u2028é'), st.characters(codec="utf-8")), max_size=12)
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), NASTY)
JSON = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NASTY, inner, max_size=4)), max_leaves=25
)


@settings(max_examples=400, deadline=None)
@given(JSON)
def test_compact_json_means_the_same_as_plain_json(data: Any) -> None:
    assert json.loads(to_json(data)) == data


def test_lists_of_numbers_and_lists_of_those_take_one_line() -> None:
    data = {"patch": [1, 2, 3], "strides": [[1, 1], [2, 2]], "folds": [{"train": ["a", "b"], "val": []}], "deep": [[[1], [2]]]}
    text = to_json(data)
    assert '"patch": [1, 2, 3]' in text and '"strides": [[1, 1], [2, 2]]' in text and '"train": ["a", "b"]' in text
    assert json.loads(text) == data


def test_a_long_list_of_awkward_names_is_written_in_no_time() -> None:
    data = {"cases": [f"case [{i}] " + "{" * (i % 3) for i in range(20_000)], "rows": [[i, i] for i in range(20_000)]}
    assert json.loads(to_json(data)) == data


def test_records_come_back_equal(tmp_path: Path) -> None:
    splits = [Split(train=("a [1]", "b,\n c"), val=("ü",)), Split(train=(), val=())]
    save_record(tmp_path / "splits.json", splits, list[Split])
    assert load_record(tmp_path / "splits.json", list[Split]) == splits
    spec = TrainSpec(seed=3, epochs=5)
    save_record(tmp_path / "deep" / "spec.json", spec)
    assert load_record(tmp_path / "deep" / "spec.json", TrainSpec) == spec


@pytest.mark.parametrize(("content", "message"), [
    (None, "does not exist"),
    (b"{", "is not valid JSON: "),
    (b"\xff\xfe{}", "is not valid JSON: "),
    (b"[" * 100_000, "is not valid JSON: "),
    (b'{"epochs": ' + b"9" * 5000 + b"}", "is not valid JSON: "),
    (b"", "is not valid JSON: "),
    (b"[]", r"is not valid:\n  \(top level\): "),
    (b'{"epochs": 0}', r"is not valid:\n  epochs: .*greater than or equal to 1 \(found 0\)"),
    (b'{"epoch": 5}', r"is not valid:\n  epoch: Extra inputs are not permitted \(found 5\)"),
    (b'{"optimizer": {"lr": "fast"}}', r"  optimizer\.lr: .*valid number.* \(found fast\)"),
    (b'{"augment": {"mirror": [0, "x"]}}', r"  augment\.mirror\.1: .*valid integer.* \(found x\)"),
    (b'{"format": 2}', r"  format: Input should be 1 \(found 2\)"),
])
def test_a_faulty_record_names_file_and_path(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecordError, match=rf"(?s)spec\.json .*{message}"):
        load_record(path, TrainSpec)


def test_a_folder_in_place_of_a_record_is_a_record_error(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(RecordError, match=r"plan\.json cannot be read: Is a directory"):
        load_record(tmp_path / "plan.json", Plan)


def test_every_fault_is_listed_with_its_path() -> None:
    with pytest.raises(RecordError) as caught:
        validate({"epochs": -1, "sampler": {"foreground": 2}, "extra": 1}, TrainSpec, "here")
    lines = str(caught.value).splitlines()
    assert lines[0] == "here is not valid:" and len(lines) == 4
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["epochs", "sampler.foreground", "extra"]


def plan_data() -> dict[str, Any]:
    configuration = {
        "patch_size": [16, 16], "batch_size": 2, "spacing": [1, 1], "median_shape": [20, 20], "strides": [[1, 1], [2, 2]],
        "kernel_sizes": [[3, 3], [3, 3]], "features_per_stage": [8, 16], "blocks_per_stage": [2, 2],
        "decoder_blocks_per_stage": [2], "batch_dice": True, "normalization": ["CTNormalization"], "use_mask_for_norm": [False],
    }
    return {
        "dataset_name": "x", "planner": "default", "gpu_memory_gb": 8, "transpose_forward": [0, 1, 2], "channels": ["ct"],
        "labels": {"foreground": [{"name": "a", "value": 1}]}, "intensities": [], "configurations": {"2d": configuration},
    }


@pytest.mark.parametrize(("where", "value", "message"), [
    (("patch_size",), [16, 17], r"configurations\.2d: patch_size\[1\] is 17, .* multiple of 2; nearest legal values: 16 and 18"),
    (("patch_size", 1), "wide", r"configurations\.2d\.patch_size\.1: .*\(found wide\)"),
    (("normalization",), ["ZScore"], r"configurations\.2d\.normalization: unknown normalization 'ZScore'; choose from ZScoreN"),
    (("batch_size",), 0, r"configurations\.2d\.batch_size: .*\(found 0\)"),
    (("strides",), [[1, 1]], r"configurations\.2d: kernel_sizes must hold 1 entries of 2 positive numbers"),
    (("spacing",), [0, 1], r"configurations\.2d\.spacing: must be positive millimetres, found \(0\.0, 1\.0\)"),
])
def test_an_edited_plan_is_refused_with_the_exact_path(where: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    data = plan_data()
    place: Any = data["configurations"]["2d"]
    for part in where[:-1]:
        place = place[part]
    place[where[-1]] = value
    write_text(tmp_path / "plan.json", json.dumps(data))
    with pytest.raises(RecordError, match=message):
        Workspace(tmp_path).plan()


def test_a_folder_without_a_plan_is_no_work_folder(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"is not a work folder: it holds no plan\.json; make one with: autoseg plan DATASET"):
        Workspace(tmp_path).plan()
    write_text(tmp_path / "plan.json", json.dumps(plan_data()))
    assert Workspace(tmp_path).require().plan().configurations["2d"].patch_size == (16, 16)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "record.nii.gz"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        assert temporary.parent == tmp_path and temporary.name.startswith(".") and temporary.name.endswith(".nii.gz")
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_written_file_can_be_read_by_others(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_nothing_is_created_before_something_is_saved(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work")
    assert workspace.fold("run", 3) == tmp_path / "work" / "runs" / "run" / "fold_3"
    assert not (tmp_path / "work").exists()
