"""The base of every record: frozen, strict about unknown fields, and saved as JSON with a format number."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen record; unknown fields are an error, so that a typing slip in an edited file is found."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Spec(Record):
    """A choice as data: which kind, with which options (`kind` is a built-in name or `module:Name`)."""

    kind: str
    options: dict[str, Any] = {}
