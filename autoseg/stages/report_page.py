"""The report's page: blocks of a few kinds, rendered as one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import autoseg

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Text:
    """A paragraph; `note` sets it apart as something to be aware of."""

    kind: ClassVar[str] = "text"
    text: str
    note: bool = False


@dataclass(frozen=True)
class Facts:
    """Names with their values; `tiles` shows them large, each with a line below."""

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, str, str]]
    tiles: bool = False


@dataclass(frozen=True)
class Table:
    """A heading and rows of text; the first `words` columns are words, the others numbers."""

    kind: ClassVar[str] = "table"
    rows: Sequence[Sequence[str]]
    caption: str
    words: int = 1


@dataclass(frozen=True)
class Reasons:
    """Values with the reason of each folded away: (title, value, reason)."""

    kind: ClassVar[str] = "reasons"
    rows: Sequence[tuple[str, str, Sequence[str]]]


@dataclass(frozen=True)
class Drawing:
    """A chart or picture: inline SVG, its title, how it is read, what it shows in words, and its width over its height."""

    svg: str
    title: str
    caption: str
    alt: str
    ratio: float = 1.0


@dataclass(frozen=True)
class Charts:
    """Charts side by side where there is room."""

    kind: ClassVar[str] = "charts"
    drawings: Sequence[Drawing]


@dataclass(frozen=True)
class CaseCard:
    """A case with its pictures: why it is shown, its numbers, and its planes as drawings."""

    case: str
    why: str
    scores: Sequence[tuple[str, str]]
    drawings: Sequence[Drawing]


@dataclass(frozen=True)
class Cases:
    """Cases as pictures; `legend` holds (label, colour)."""

    kind: ClassVar[str] = "cases"
    cards: Sequence[CaseCard]
    legend: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: evidence, causes, cases, and (command, why) to try."""

    title: str
    evidence: Sequence[str]
    causes: Sequence[str]
    cases: str
    remedies: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Findings:
    """Findings, one after the other."""

    kind: ClassVar[str] = "findings"
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Folded:
    """Blocks that are opened on demand."""

    kind: ClassVar[str] = "folded"
    summary: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Section:
    """A titled part of the page; `source` says which record it shows and what makes that."""

    key: str
    title: str
    blocks: Sequence[Any]
    source: str = ""
    short: str = ""


@dataclass(frozen=True)
class Page:
    """The whole page; `missing` are parts that are not there yet, each with the command that makes it."""

    title: str
    headline: str
    lead: Sequence[str]
    tiles: Facts
    sections: Sequence[Section]
    missing: Sequence[tuple[str, str]] = ()
    made: str = ""
    colours: Sequence[tuple[str, str]] = field(default_factory=tuple)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("autoseg", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True)


def render(page: Page) -> str:
    """The page as HTML; all text is escaped, only the drawings' SVG is taken as it is."""
    return _environment().get_template("report.html").render(page=page, version=autoseg.__version__)


def trim(values: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows of text without the columns in which every row but the heading is empty or a dash."""
    kept = [i for i in range(len(values[0])) if i == 0 or any(row[i] not in ("", "-") for row in values[1:])]
    return [[row[i] for i in kept] for row in values]
