"""Run folders: whatever is torn or missing, the newest whole checkpoint is found, and nothing half-written counts."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoseg.errors import RecordError, RunError
from autoseg.files import runs
from autoseg.files.runs import DiskFull, RunFolder, load_tensors, save_tensors
from autoseg.types.dataset import Split
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Plan
from autoseg.types.run import EpochRecord, RunRecord, TrainSpec


def tensors(step: int) -> dict[str, torch.Tensor]:
    value = float(step)
    return {"network.a": torch.full((3, 4), value), "optimizer.step.a": torch.tensor(value), "n": torch.tensor([step])}


def save(folder: RunFolder, *steps: int) -> None:
    for step in steps:
        folder.save_checkpoint(step, tensors(step), {"epoch": step, "losses": [0.1, 1 / 3], "seconds": 2.5})


def found(folder: RunFolder) -> int | None:
    checkpoint = folder.load_checkpoint()
    return None if checkpoint is None else int(checkpoint[1]["epoch"])  # type: ignore[arg-type]


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    save(folder, 7)
    checkpoint = folder.load_checkpoint()
    assert checkpoint is not None
    assert all(torch.equal(checkpoint[0][name], value) for name, value in tensors(7).items())
    assert checkpoint[0]["n"].dtype == torch.int64 and checkpoint[0]["optimizer.step.a"].shape == ()
    assert checkpoint[1] == {"epoch": 7, "losses": [0.1, 1 / 3], "seconds": 2.5}


def test_without_any_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "nowhere").load_checkpoint() is None
    assert not (tmp_path / "nowhere").exists()


def test_the_last_two_are_kept_in_the_order_of_their_steps(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 9, 10, 99, 100, 1000)
    assert sorted(p.name for p in (tmp_path / "resume").iterdir()) == ["step_000000100", "step_000001000"]
    assert found(folder) == 1000


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 5, 5)
    assert found(folder) == 5


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated tensors": lambda f: truncate(f / "tensors.safetensors"),
    "empty tensors": lambda f: (f / "tensors.safetensors").write_bytes(b""),
    "a flipped bit": lambda f: flip(f / "tensors.safetensors"),
    "missing tensors": lambda f: (f / "tensors.safetensors").unlink(),
    "missing state": lambda f: (f / "state.json").unlink(),
    "truncated state": lambda f: truncate(f / "state.json"),
    "binary state": lambda f: (f / "state.json").write_bytes(b"\xff\xfe\x00"),
    "another kind of state": lambda f: (f / "state.json").write_text("[1, 2]"),
    "state without hash": lambda f: (f / "state.json").write_text('{"numbers": {}}'),
    "wrong hash": lambda f: (f / "state.json").write_text('{"numbers": {}, "sha256": "00"}'),
    "no files": lambda f: (shutil.rmtree(f), f.mkdir()),
    "a file in its place": lambda f: (shutil.rmtree(f), f.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage: Callable[[Path], object], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 10, 20)
    damage(tmp_path / "resume" / "step_000000020")
    assert found(folder) == 10
    damage(tmp_path / "resume" / "step_000000010")
    assert found(folder) is None


@pytest.mark.parametrize("moment", ["save_tensors", "write_text", "replace"])
def test_a_kill_while_saving_leaves_the_older_checkpoint_and_the_next_save_clears_up(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 10)

    def kill(*_args: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runs.os if moment == "replace" else runs, moment, kill)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 20)
    assert found(folder) == 10
    save(folder, 30)
    assert found(folder) == 30
    assert sorted(p.name for p in (tmp_path / "resume").iterdir()) == ["step_000000010", "step_000000030"]


def test_a_disk_that_does_not_give_back_what_was_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 10)
    write = runs.save_tensors

    def forgetful(path: Path, *given: Any) -> str:
        written = write(path, *given)
        flip(path)
        return written

    with monkeypatch.context() as patched:
        patched.setattr(runs, "save_tensors", forgetful)
        with pytest.raises(RunError, match="does not hold what was just written to it: the disk is failing"):
            save(folder, 20)
    assert found(folder) == 10 and [p.name for p in (tmp_path / "resume").iterdir()] == ["step_000000010"]


@pytest.mark.parametrize("renames", range(4))
def test_a_kill_while_a_step_is_saved_again_leaves_its_first_checkpoint(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 10)
    rename, done = runs.os.replace, []

    def kill(*given: Any) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(rename(*given))

    with monkeypatch.context() as patched:
        patched.setattr(runs.os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 10)
    assert found(folder) == 10
    save(folder, 20)
    assert found(folder) == 20 and not list((tmp_path / "resume").glob(".*"))


def test_weights_that_the_disk_does_not_give_back_finish_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 10)
    folder.save_record(record())
    write = runs.save_tensors

    def forgetful(path: Path, *given: Any) -> str:
        written = write(path, *given)
        flip(path)
        return written

    monkeypatch.setattr(runs, "save_tensors", forgetful)
    with pytest.raises(RunError, match="does not hold what was just written to it: the disk is failing"):
        folder.save_weights(tensors(5), 1000)
    assert not folder.finished and found(folder) == 10 and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("moment", ["save_tensors", "write_text", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_torn(
    moment: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 10, 20)

    def full(*_args: Any, **_more: Any) -> None:
        raise OSError(code, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(Path if moment == "mkdir" else runs, moment, full)
        with pytest.raises(DiskFull, match=r"is full: 4\.2 MB are needed, [\d.]+ MB are free\..*same command"):
            save(folder, 30)
    assert found(folder) == 20
    assert sorted(p.name for p in (tmp_path / "resume").iterdir()) == ["step_000000010", "step_000000020"]


def test_other_errors_of_the_disk_are_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_args: Any, **_more: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(runs, "save_tensors", failing)
    with pytest.raises(OSError, match="broken"):
        save(RunFolder(tmp_path), 1)


@pytest.mark.parametrize("newest_whole", [True, False])
def test_where_room_is_short_the_older_checkpoint_goes_if_the_newest_is_whole(
    newest_whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 10, 20)
    if not newest_whole:
        flip(tmp_path / "resume" / "step_000000020" / "tensors.safetensors")
    monkeypatch.setattr(runs, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(runs, "save_tensors", lambda *given: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room")))
    with pytest.raises(DiskFull):
        save(folder, 30)
    assert found(folder) == (20 if newest_whole else 10)
    assert len(list((tmp_path / "resume").iterdir())) == (1 if newest_whole else 2)


def test_other_weights_lie_beside_and_finish_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "work" / "runs" / "r" / "fold_0")
    folder.save_record(record())
    for path in (folder.best_weights_path, folder.weights_so_far_path):
        folder.save_other_weights(path, tensors(4), 7)
        assert torch.equal(load_tensors(path)["n"], tensors(4)["n"])
    assert not folder.usable and not folder.finished
    folder.save_weights(tensors(5), 1000)
    assert folder.best_weights_path.exists() and not folder.weights_so_far_path.exists()
    assert folder.stop_files == (folder.path / "stop", tmp_path / "work" / "stop")


@pytest.mark.parametrize("kind", [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool,
], ids=str)
def test_files_are_those_of_the_safetensors_library(kind: torch.dtype, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    given = {"b": torch.arange(6).reshape(2, 3).to(kind), "a": torch.ones(()).to(kind), "none": torch.zeros(0, 3).to(kind),
             "c": torch.tensor([1.5, -2.5]), "d": torch.tensor([True])}
    digest = save_tensors(tmp_path / "ours", given, {"epochs": "3", "é": "ß"})
    assert digest == hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest()
    read = load_file(tmp_path / "ours")
    assert set(read) == set(given) and all(torch.equal(read[name], value) for name, value in given.items())
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"epochs": "3", "é": "ß"}
    save_file(given, tmp_path / "theirs")
    save_tensors(tmp_path / "plain", given)
    assert (tmp_path / "plain").stat().st_size == (tmp_path / "theirs").stat().st_size


def test_saving_weights_finishes_the_run_and_drops_the_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 10)
    folder.save_record(record())
    assert not folder.finished
    folder.save_weights(tensors(3), folder.record().spec.epochs)
    assert folder.finished and not (tmp_path / "resume").exists()
    assert torch.equal(load_tensors(folder.weights_path)["network.a"], tensors(3)["network.a"])
    folder.clear()
    assert not tmp_path.exists() and not folder.finished


def test_tensors_that_are_views_or_on_a_graph_can_be_saved(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    given = {"view": base.t(), "leaf": torch.ones(2, requires_grad=True), "slice": base[:, ::2]}
    save_tensors(tmp_path / "t.safetensors", given)
    read = load_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(read[name], value.detach()) for name, value in given.items())


@pytest.mark.parametrize("content", [None, b"", b"not tensors", b"\xff" * 100])
def test_weights_that_cannot_be_read_are_a_run_error_with_the_file(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=r"weights\.safetensors cannot be read: .*--restart"):
        load_tensors(path)


def epoch(number: int, loss: float = 0.5) -> EpochRecord:
    return EpochRecord(
        epoch=number, step=10 * number, train_loss=loss, val_loss=None, pseudo_dice={"Läsion": 0.25, "a,b": None},
        learning_rate=0.01, seconds=1.5, data_wait=0.1,
    )


def test_metrics_come_back_one_line_per_epoch(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.metrics() == []
    epochs = [epoch(0), epoch(1, 1 / 3)]
    folder.save_metrics(epochs)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert list(json.loads(lines[0])) == [
        "epoch", "step", "train_loss", "val_loss", "pseudo_dice", "learning_rate", "seconds", "data_wait", "skipped"]
    assert folder.metrics() == epochs


def test_a_validation_loss_that_is_not_a_number_can_be_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_metrics([epoch(0).model_copy(update={"val_loss": math.nan})])
    value = folder.metrics()[0].val_loss
    assert value is not None and math.isnan(value)


def test_damaged_metrics_are_a_record_error_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epoch": 0, "st\xff\n')
    with pytest.raises(RecordError, match=r"metrics\.jsonl is damaged"):
        RunFolder(tmp_path).metrics()


def record() -> RunRecord:
    labels = Labels(foreground=(Label(name="a", value=1),))
    plan = Plan(
        dataset_name="x", planner="default", gpu_memory_gb=8, transpose_forward=(0, 1, 2), channels=("ct",), labels=labels,
        intensities=(), configurations={},
    )
    return RunRecord(
        name="r", configuration="2d", fold=0, spec=TrainSpec(), plan=plan, split=Split(train=("a",), val=("b",)), data="",
        device="cpu",
    )


def test_the_record_comes_back_equal(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "fold_0")
    folder.save_record(record())
    assert folder.record() == record()
    with pytest.raises(RecordError, match=r"run\.json does not exist"):
        RunFolder(tmp_path / "fold_1").record()
