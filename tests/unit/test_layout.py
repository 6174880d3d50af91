"""The shape of the repository: packages, links, guards, import costs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPLIT = ("planners", "trainers", "datasets")


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_on_disk_is_listed_for_the_wheel() -> None:
    listed = set(project()["tool"]["setuptools"]["packages"])  # type: ignore[index]
    found = [p for depth in ("", "*/", "*/*/", "*/*/*/") for p in (ROOT / "autoseg").glob(f"{depth}__init__.py")]
    inside = {".".join(p.parent.relative_to(ROOT).parts) for p in found}
    assert listed == inside


def test_the_three_folders_are_linked_and_hold_only_packages() -> None:
    for name in SPLIT:
        link = ROOT / "autoseg" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name
        folders = [p for p in (ROOT / name).iterdir() if p.is_dir() and p.name != "__pycache__"]
        assert [p for p in folders if not (p / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", SPLIT)
def test_a_bare_import_of_a_root_folder_is_refused(name: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "import it by that name" in run.stderr


def test_importing_the_package_and_the_planner_needs_no_torch() -> None:
    modules = "sys, autoseg, autoseg.planners.default, autoseg.networks.describe, autoseg.stages.plan"
    code = f"import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fingerprint_reading_is_reachable_as_documented() -> None:
    code = "import autoseg; autoseg.datasets.nnunet.read_fingerprint; autoseg.plan; autoseg.load"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_stated_once_to_the_world() -> None:
    import autoseg

    assert project()["project"]["version"] == autoseg.__version__  # type: ignore[index]


def test_only_the_command_line_prints_and_reads_the_environment() -> None:
    for path in [p for depth in ("", "*/", "*/*/") for p in ROOT.glob(f"autoseg/{depth}*.py")]:
        if path.parent.name != "cli":
            text = path.read_text()
            assert not re.search(r"^\s*print\(", text, re.MULTILINE), path
            assert "os.environ" not in text, path


def test_nothing_is_unpickled_or_evaluated() -> None:
    for path in [p for depth in ("", "*/", "*/*/") for p in ROOT.glob(f"autoseg/{depth}*.py")]:
        text = path.read_text()
        pattern = r"^\s*(import|from) pickle\b|torch\.load\(|allow_pickle=True|\beval\(\"|\bexec\("
        assert not re.search(pattern, text, re.MULTILINE), path


def test_no_test_folder_is_a_package_and_no_conftest_lies_at_the_root() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()
