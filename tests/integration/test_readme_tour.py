"""The README's tour runs as it is written, on tiny phantoms."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_tour_runs_line_by_line(cli, chest, tmp_path, monkeypatch) -> None:
    block = re.search(r"```bash tour\n(.*?)```", README, re.DOTALL)
    assert block
    monkeypatch.chdir(tmp_path)
    shutil.copytree(chest, "data", ignore=shutil.ignore_patterns("unseen"))
    shutil.copytree(chest / "unseen" / "images", "new_images")
    shutil.copytree(chest / "unseen" / "labels", "references")
    for line in block[1].strip().splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "autoseg"
        if words[1] == "train":
            cli.thin(Path("work"))
            cli.train(Path("work"), *words[3:], epochs=1).ok()
        else:
            cli.call(*words[1:]).ok()
    assert Path("report.json").exists() and len(list(Path("masks").glob("*.nii.gz"))) == len(list(Path("new_images").iterdir()))
