"""Writes docs/explain.md: `python tests/golden/explain_docs.py HIPPOCAMPUS_WORK ACDC_WORK`, two planned work folders.

The third plan in it needs no data: it is made from the fingerprint of the abdominal CT in plans_selection.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from autoseg.datasets.nnunet import read_fingerprint
from autoseg.files.workspace import Workspace
from autoseg.planners.registry import get_planner
from autoseg.stages.explain import explain, explain_plan
from autoseg.stages.forecast import what_if
from autoseg.types.dataset import Dataset
from autoseg.types.fingerprint import Fingerprint

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "docs" / "explain.md"
HEAD = """# What `autoseg explain` says

`autoseg explain WORK` tells a plan in words: what is trained, each number of it, the rule that made the number and the numbers
of the data that the rule was applied to. Three plans, as it prints them. Values that a person has edited in plan.json since are
told as *set by hand*, with the planned value beside them.

- [Abdominal CT](#abdominal-ct): large images, so there is a low-resolution network and a cascade
- [Hippocampus](#hippocampus): images so small that a patch holds them whole
- [Cardiac cine MRI](#cardiac-cine-mri): thick slices

Voxels are the picture elements of a volume. A patch is the block of voxels that a network sees at once, a batch the number of
patches in one training step. Memory is predicted by playing a training step through on paper.

The data sets: hippocampus is Task04 of the Medical Segmentation Decathlon (CC-BY-SA 4.0); the cardiac MRI is ACDC (CC BY-NC-SA
4.0), in a copy whose spacing is nominal; of the abdominal CT there is only a fingerprint, of the size of the Decathlon's liver
CTs.
"""
WHAT_IF = """
## What other memory would give

`autoseg explain WORK --what-if 4,8,11,24,48` makes the plan for each budget. Here it is for the abdominal CT, without a device to
measure times on:
"""


def abdominal_ct() -> tuple[Dataset, Fingerprint]:
    """A data set as large as the liver CTs of the Medical Segmentation Decathlon, from its fingerprint alone."""
    entries = json.loads((HERE / "plans_selection.json").read_text())["entries"]
    entry = next(e for e in entries if e["name"] == "abdominal_ct" and e["planner"] == "default")
    cases = entry["fingerprint"].pop("cases")
    fingerprint = {**entry["fingerprint"], "spacings": [cases["spacing"]] * cases["count"],
                   "shapes_after_crop": [cases["shape"]] * cases["count"]}
    dataset = {**entry["dataset"], "name": "Abdominal CT"}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("dataset.json", "dataset_fingerprint.json")]
        for path, data in zip(paths, (dataset, fingerprint), strict=True):
            path.write_text(json.dumps(data))
        return read_fingerprint(*paths)


def abdominal_text() -> str:
    """What explain says of it."""
    dataset, fingerprint = abdominal_ct()
    return explain_plan(get_planner("default")(dataset, fingerprint, 8), dataset, fingerprint)


def what_if_table() -> str:
    """The what-if table of it, as Markdown."""
    heading, *rows = what_if(*abdominal_ct(), "default", [4, 8, 11, 24, 48])
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def block(title: str, text: str) -> str:
    """A titled block of plain text."""
    return f"\n## {title}\n\n```text\n{text}```\n"


def main(hippocampus: str, acdc: str) -> None:
    text = HEAD + block("Abdominal CT", abdominal_text()) + WHAT_IF + "\n" + what_if_table()
    text += block("Hippocampus", explain(Workspace(hippocampus))) + block("Cardiac cine MRI", explain(Workspace(acdc)))
    TARGET.write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
