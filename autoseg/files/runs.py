"""The folder of one fold of a run: its record, metrics, checkpoints and weights, written so that a kill leaves nothing torn."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from autoseg.errors import RecordError, RunError
from autoseg.files.workspace import atomic_path, load_record, save_record, write_text
from autoseg.types.run import EpochRecord, RunRecord

if TYPE_CHECKING:
    import torch

KEPT_CHECKPOINTS = 2
HEADER_BYTES = 100_000_000  # the largest header that safetensors itself accepts


class RunFolder:
    """`runs/<name>/fold_<k>`; nothing is created before something is saved."""

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
        """Write weights.safetensors, which marks the run as finished after `epochs`, and drop the checkpoints."""
        save_tensors(self.weights_path, tensors, {"epochs": str(epochs)})
        shutil.rmtree(self.path / "resume", ignore_errors=True)

    def load_weights(self) -> dict[str, torch.Tensor]:
        """Read weights.safetensors. Raises RunError when it is missing or damaged."""
        return load_tensors(self.weights_path)

    def save_checkpoint(self, step: int, tensors: dict[str, torch.Tensor], numbers: dict[str, float | int | list[float]]) -> None:
        """Write one checkpoint under a temporary name, then rename it; older ones beyond the last two are removed."""
        root = self.path / "resume"
        root.mkdir(parents=True, exist_ok=True)
        temporary, final = root / f".step_{step}", root / f"step_{step:09d}"
        for torn in root.glob(".step_*"):
            shutil.rmtree(torn, ignore_errors=True)
        temporary.mkdir()
        save_tensors(temporary / "tensors.safetensors", tensors)
        write_text(
            temporary / "state.json", json.dumps({"numbers": numbers, "sha256": _sha256(temporary / "tensors.safetensors")})
        )
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in sorted(root.glob("step_*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, float | int | list[float]]] | None:
        """The newest checkpoint whose hash is right, or None."""
        for folder in sorted((self.path / "resume").glob("step_*"), reverse=True):
            try:
                state = json.loads((folder / "state.json").read_text())
                if state["sha256"] == _sha256(folder / "tensors.safetensors"):
                    return load_tensors(folder / "tensors.safetensors"), state["numbers"]
            except (OSError, ValueError, KeyError, TypeError, RunError):  # torn or altered: an older one will do
                continue
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


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, atomically; `metadata` goes into its header."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
