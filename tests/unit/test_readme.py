"""The README says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from autoseg.types.faults import fault_table_markdown

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_fault_table_is_the_one_in_the_code() -> None:
    found = re.search(r"<!-- faults -->\n(.*?)\n<!-- /faults -->", README, re.DOTALL)
    assert found and found[1].strip() == fault_table_markdown().strip()


def test_both_commands_are_marked_for_ci() -> None:
    for name in ("demo", "test"):
        assert re.search(rf"<!-- command: {name} -->\n```bash\n.+\n```", README)


def test_pictures_exist_and_are_small() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert 0 < (ROOT / picture).stat().st_size < 200_000


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
