"""A folder of predicted masks: which model made each, from which input, and the table of what was found."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoseg.errors import RunError
from autoseg.files.images import mask_ending, split_ending
from autoseg.files.preprocessed import content_hash, digest
from autoseg.files.workspace import write_text
from autoseg.types.dataset import CaseFiles

LEDGER = "prediction.json"
SUMMARY = "summary.csv"


class MaskFolder:
    """Masks of one model; a case is finished when its mask is there and the ledger says this model made it from this input.

    A kill between the writes of a case leaves it unfinished, never wrongly finished. With `judgement`, a hash of what masks are
    judged by, it is finished only when it was judged by that.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], judgement: str = "") -> None:
        self.path, self.identity, self.judgement = path, dict(identity), judgement
        self.model = digest(self.identity)
        self._lock = threading.Lock()
        self._ledger = _read_ledger(path / LEDGER)
        self._rows = _read_rows(path / SUMMARY)

    def mask(self, case: CaseFiles) -> Path:
        """The mask's file: the case's name with the ending of its image (PNG for JPEG)."""
        return self.path / f"{case.case}{mask_ending(split_ending(case.images[0])[1])}"

    def probabilities(self, case: CaseFiles) -> Path:
        """The probabilities' file."""
        return self.path / f"{case.case}_probabilities.nii.gz"

    def uncertainty(self, case: CaseFiles) -> Path:
        """The file of the uncertainty maps."""
        return self.path / f"{case.case}_uncertainty.nii.gz"

    def is_finished(self, case: CaseFiles, probabilities: bool, replace: bool, uncertainty: bool = False) -> bool:
        """Whether this model's mask of this very input is there, with what else is wanted.

        Raises:
            RunError: the mask would overwrite an input, or, without `replace`, a file that this model did not make.
        """
        mask = self.mask(case)
        if mask.resolve() in {Path(image).resolve() for image in case.images}:
            raise RunError(f"the mask of case {case.case} would overwrite its image {mask}; choose another --out")
        if not mask.exists():
            return False
        entry = self._ledger["cases"].get(case.case, {})
        if entry.get("model") != self.model:
            if replace:
                return False
            maker = "another model or other options" if entry else "something else than this model"
            raise RunError(f"{mask} was made by {maker}; choose another --out, or give --overwrite to replace it")
        if (probabilities and not self.probabilities(case).exists()) or (uncertainty and not self.uncertainty(case).exists()):
            return False
        if self.judgement and entry.get("judgement") != self.judgement:
            return False
        return bool(entry.get("input") == content_hash([Path(image) for image in case.images]))

    def begin(self, case: CaseFiles, row: Mapping[str, str]) -> None:
        """Record a case just before its maps and, last, its mask are written; older ones are removed first."""
        with self._lock:
            for path in (self.mask(case), self.probabilities(case), self.uncertainty(case)):
                path.unlink(missing_ok=True)
            entry = {"model": self.model, "input": content_hash([Path(i) for i in case.images])}
            self._ledger["models"][self.model] = self.identity
            self._ledger["cases"][case.case] = {**entry, **({"judgement": self.judgement} if self.judgement else {})}
            used = {entry["model"] for entry in self._ledger["cases"].values()}
            self._ledger["models"] = {key: value for key, value in self._ledger["models"].items() if key in used}
            write_text(self.path / LEDGER, json.dumps(self._ledger, indent=1) + "\n")
            self._write_row(case.case, row)

    def end(self, case: CaseFiles, row: Mapping[str, str]) -> None:
        """Complete a case's row once its files are written."""
        with self._lock:
            self._write_row(case.case, row)

    def fail(self, case: CaseFiles, why: str) -> None:
        """Record that a case failed."""
        with self._lock:
            self._write_row(case.case, {"case": case.case, "status": "failed", "error": why})

    def _write_row(self, case: str, row: Mapping[str, str]) -> None:
        self._rows[case] = dict(row)
        columns: dict[str, None] = dict.fromkeys(["case", "status", "error"])
        for other in self._rows.values():
            columns.update(dict.fromkeys(other))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(columns), restval="")
        writer.writeheader()
        writer.writerows(self._rows[name] for name in sorted(self._rows))
        write_text(self.path / SUMMARY, buffer.getvalue())


def _read_ledger(path: Path) -> dict[str, dict[str, Any]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {"models": dict(data["models"]), "cases": {str(k): dict(v) for k, v in data["cases"].items()}}
    except (OSError, ValueError, KeyError, TypeError):
        return {"models": {}, "cases": {}}


def _read_rows(path: Path) -> dict[str, dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("case") and None not in row]
    except (OSError, csv.Error, UnicodeDecodeError):
        return {}
    return {row["case"]: {key: value or "" for key, value in row.items()} for row in rows}
