"""The folder of one fold of a run: its record, metrics, checkpoints and weights, written so that a kill leaves nothing torn."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from autoseg.errors import RecordError, RunError
from autoseg.files.workspace import atomic_path, load_record, save_record, write_text
from autoseg.types.run import EpochRecord, RunRecord

if TYPE_CHECKING:
    import torch

KEPT_CHECKPOINTS = 2
ASIDE = "-aside"  # how a checkpoint's name ends while another of the same step takes its place
SMALL_BYTES = 4 << 20  # for everything that is written beside tensors
FULL = {errno.ENOSPC, errno.EDQUOT}
HEADER_BYTES = 100_000_000  # the largest header that safetensors itself accepts


class DiskFull(RunError):
    """Something could not be saved for want of space."""


class RunFolder:
    """`runs/<name>/fold_<k>`; nothing is created before something is saved."""

    writes = True

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def record_path(self) -> Path:
        """run.json."""
        return self.path / "run.json"

    @property
    def weights_path(self) -> Path:
        """weights.safetensors: there when training is finished."""
        return self.path / "weights.safetensors"

    @property
    def best_weights_path(self) -> Path:
        """weights_best.safetensors: those of the epoch with the best smoothed pseudo Dice; for a person who wants them, nothing
        uses them by itself.
        """
        return self.path / "weights_best.safetensors"

    @property
    def weights_so_far_path(self) -> Path:
        """weights_so_far.safetensors: those at which training was stopped; gone when it is finished."""
        return self.path / "weights_so_far.safetensors"

    @property
    def network_path(self) -> Path:
        """The weights to segment with: those of finished training, else those at which it was stopped."""
        return self.weights_path if self.weights_path.exists() else self.weights_so_far_path

    @property
    def stop_files(self) -> tuple[Path, Path]:
        """Files by which a person stops this fold, or whatever trains in this work folder, after the step at work."""
        return self.path / "stop", self.path.parents[2] / "stop"

    @property
    def validation(self) -> Path:
        """Masks of the fold's validation cases, and their report.json."""
        return self.path / "validation"

    @property
    def usable(self) -> bool:
        """Whether there are trained weights."""
        return self.weights_path.exists() and self.record_path.exists()

    @property
    def finished(self) -> bool:
        """Whether training is finished: the weights are those of the recorded length, not of a run that is made longer."""
        if not self.usable:
            return False
        epochs = _metadata(self.weights_path).get("epochs")
        return epochs is None or epochs == str(self.record().spec.epochs)

    def record(self) -> RunRecord:
        """Load run.json."""
        return load_record(self.record_path, RunRecord)

    def save_record(self, record: RunRecord) -> None:
        """Write run.json."""
        save_record(self.record_path, record)

    def save_metrics(self, epochs: Iterable[EpochRecord]) -> None:
        """Write metrics.jsonl, one line per epoch."""
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(e.model_dump(mode="json")) + "\n" for e in epochs))

    def metrics(self) -> list[EpochRecord]:
        """Read metrics.jsonl; empty when there is none. Raises RecordError when a line is damaged."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        try:
            return [EpochRecord.model_validate_json(line) for line in lines]
        except ValidationError as error:
            raise RecordError(f"{path} is damaged: {str(error).splitlines()[0]}; mend or remove the line") from None

    def save_weights(self, tensors: dict[str, torch.Tensor], epochs: int) -> None:
        """Write weights.safetensors, which marks the run as finished after `epochs`, and drop the checkpoints.

        Raises DiskFull, or RunError when the disk does not give back what was written; the checkpoints are intact then.
        """
        temporary = self.path / ".weights-unchecked"
        try:
            with self._room(tensors):
                _require_written(temporary, save_tensors(temporary, tensors, {"epochs": str(epochs)}))
                os.replace(temporary, self.weights_path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush(self.path)
        self.weights_so_far_path.unlink(missing_ok=True)
        shutil.rmtree(self.path / "resume", ignore_errors=True)

    def save_other_weights(self, path: Path, tensors: dict[str, torch.Tensor], epoch: int) -> None:
        """Write the weights that there are after so many epochs to one of the other paths. Raises DiskFull."""
        with self._room(tensors):
            save_tensors(path, tensors, {"epoch": str(epoch)})

    def load_weights(self) -> dict[str, torch.Tensor]:
        """Read weights.safetensors. Raises RunError when it is missing or damaged."""
        return load_tensors(self.weights_path)

    def save_checkpoint(self, step: int, tensors: dict[str, torch.Tensor], numbers: dict[str, float | int | list[float]]) -> None:
        """Write one checkpoint under a temporary name, read it back, then rename it; of older ones the last is kept.

        Raises DiskFull, or RunError when the disk does not give back what was written; older checkpoints are intact then.
        """
        root = self.path / "resume"
        temporary, final = root / f".step_{step}", root / f"step_{step:09d}"
        try:
            with self._room(tensors):
                root.mkdir(parents=True, exist_ok=True)
                for torn in root.glob(".step_*"):
                    if not torn.name.endswith(ASIDE):
                        shutil.rmtree(torn, ignore_errors=True)
                temporary.mkdir()
                written = save_tensors(temporary / "tensors.safetensors", tensors)
                write_text(temporary / "state.json", json.dumps({"numbers": numbers, "sha256": written}))
                _require_written(temporary / "tensors.safetensors", written)
                if final.exists():  # of the same step; whole until the new one is there
                    os.replace(final, root / f".{final.name}{ASIDE}")
                os.replace(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _flush(root)
        for old in (*sorted(root.glob("step_*"))[:-KEPT_CHECKPOINTS], *root.glob(f".step_*{ASIDE}")):
            shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def _room(self, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        """Make room for tensors that are about to be written, and say what is missing where the disk is full all the same."""
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + SMALL_BYTES
        kept = sorted((self.path / "resume").glob("step_*"))
        if free_bytes(self.path) < needed and len(kept) > 1 and _whole(kept[-1]) is not None:
            for old in kept[:-1]:
                shutil.rmtree(old, ignore_errors=True)
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise disk_is_full(self.path, needed) from None

    def load_checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, float | int | list[float]]] | None:
        """The newest checkpoint whose hash is right, or None."""
        root = self.path / "resume"
        for folder in (*sorted(root.glob("step_*"), reverse=True), *sorted(root.glob(f".step_*{ASIDE}"), reverse=True)):
            numbers = _whole(folder)
            if numbers is not None:
                return load_tensors(folder / "tensors.safetensors"), numbers
        return None

    def checkpoint_step(self) -> int:
        """The step of the newest checkpoint; 0 when there is none."""
        return max((int(path.name.removeprefix("step_")) for path in (self.path / "resume").glob("step_*")), default=0)

    def clear(self) -> None:
        """Remove everything, for a fresh start; a kill in the middle leaves either all of it or nothing that counts."""
        trash = self.path.with_name(f".{self.path.name}-removed")
        shutil.rmtree(trash, ignore_errors=True)
        if self.path.exists():
            os.replace(self.path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove temporary files that a killed process left."""
        for path in self.path.glob(".*-*"):
            path.unlink(missing_ok=True)


class ReadOnlyRunFolder(RunFolder):
    """The same folder for a process that trains along but leaves writing to another one: what is saved here goes nowhere."""

    writes = False

    def save_record(self, record: RunRecord) -> None:
        """Leave it to the first process."""

    def save_metrics(self, epochs: Iterable[EpochRecord]) -> None:
        """Leave it to the first process."""

    def save_weights(self, tensors: dict[str, torch.Tensor], epochs: int) -> None:
        """Leave it to the first process."""

    def save_other_weights(self, path: Path, tensors: dict[str, torch.Tensor], epoch: int) -> None:
        """Leave it to the first process."""

    def save_checkpoint(self, step: int, tensors: dict[str, torch.Tensor], numbers: dict[str, float | int | list[float]]) -> None:
        """Leave it to the first process."""

    def remove_leftovers(self) -> None:
        """Leave it to the first process."""


def free_bytes(path: Path) -> int:
    """Free space where `path` lies or will lie."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def disk_is_full(path: Path, needed: int = SMALL_BYTES) -> DiskFull:
    """The error that says what is missing, and that nothing is lost."""
    return DiskFull(
        f"the disk of {path} is full: {needed / 1e6:.1f} MB are needed, {free_bytes(path) / 1e6:.1f} MB are free. What was saved "
        "before is intact; free some space and give the same command again: training goes on from there"
    )


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write tensors to a safetensors file, atomically and one after another; return the SHA-256 of what was to be written.

    The format: 8 bytes little-endian header length, a JSON object of dtype, shape and data_offsets with the texts of `metadata`,
    then the tensors' bytes (https://github.com/huggingface/safetensors), here those of larger numbers first.
    """
    import torch

    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with atomic_path(path) as temporary, temporary.open("wb") as file:

        def write(data: Any) -> None:
            sha256.update(data)
            file.write(data)

        write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


_CODES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int64": "I64",
    "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8", "torch.bool": "BOOL",
}


def _metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header, without reading its tensors; empty where there is none or it is damaged."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(size)).get("__metadata__", {}) if size < HEADER_BYTES else {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        RunError: missing or damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}; train this fold again with --restart") from None


def _whole(checkpoint: Path) -> dict[str, float | int | list[float]] | None:
    """The numbers of a checkpoint that is as it was written; None when it is torn or altered."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        numbers: dict[str, float | int | list[float]] = state["numbers"]
        return numbers if state["sha256"] == _sha256(checkpoint / "tensors.safetensors") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _require_written(path: Path, sha256: str) -> None:
    """Raise RunError when a file does not hold what was written to it."""
    if _sha256(path) != sha256:
        raise RunError(
            f"{path} does not hold what was just written to it: the disk is failing; older checkpoints are kept. Move the work "
            "folder to another disk"
        )


def _flush(folder: Path) -> None:
    """Flush a folder's entries, where the system can: a rename then survives a power cut."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sha256(path: Path) -> str:
    """Of what the disk holds, as far as the system can be told to forget what it remembers of the file."""
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()
