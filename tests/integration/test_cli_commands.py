"""The commands themselves: which there are, their flags and help, the machine's report, and the demonstration."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import autoseg

COMMANDS = {
    "evaluate": {"PREDICTIONS", "REFERENCES", "--out", "--tolerance", "--html", "--images", "--threads"},
    "select": {"WORK", "--masks-only", "--crf", "--trust", "--no-trust", "--device", "--precision", "--threads"},
    "diagnose": {"WORK", "--reference", "--name", "--threads"},
    "report": {"WORK", "--out", "--threads"},
    "compare": {"SOURCES...", "--reference", "--out", "--tolerance", "--threads"},
    "reproduce": {"NAME", "--data", "--out", "--planner", "--config", "--folds", "--epochs", "--time-budget", "--device",
        "--partial", "--set"},
    "pack": {"WORK", "--out", "--folds", "--weights", "--run", "--licence", "--overwrite"},
    "export-onnx": {"MODEL", "--out", "--folds", "--opset", "--average", "--overwrite"},
    "import-nnunet": {"FOLDER", "--out", "--folds", "--checkpoint", "--previous", "--postprocessing", "--no-postprocessing",
        "--licence", "--overwrite"},
    "train": {"WORK", "--config", "--folds", "--name", "--device", "--devices", "--preset", "--epochs", "--precision", "--seed",
        "--threads", "--time-budget", "--init", "--tracker", "--restart", "--set"},
    "predict": {"MODEL", "INPUTS...", "--out", "--folds", "--mirror", "--no-mirror", "--probabilities", "--uncertainty",
        "--device", "--precision", "--max-ram", "--gpu-memory", "--overwrite"},
    "demo": {"--out", "--kind"},
    "doctor": set(),
    "check": {"DATASET", "--json", "--threads"},
    "plan": {"DATASET", "--out", "--planner", "--gpu-memory", "--time-budget", "--groups", "--replan", "--threads"},
    "explain": {"WORK", "--what-if", "--measure", "--no-measure", "--device"},
    "diff": {"WORK_A", "WORK_B"},
    "preprocess": {"WORK", "--config", "--threads"},
}


def listed():
    """The flags and arguments of every command, from the definitions themselves."""
    import typer

    from autoseg.cli import app

    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        flags = set()
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                flags.add(parameter.name.upper() + ("..." if parameter.nargs == -1 else ""))
            else:
                flags |= {*parameter.opts, *parameter.secondary_opts}
        found[name] = flags
    return found


def test_commands_and_flags_are_the_ones_listed_here():
    assert listed() == COMMANDS


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_every_command_explains_itself(cli, command):
    ran = cli.call(*([command] if command else []), "--help").ok()
    assert "Usage:" in ran.out
    for flag in COMMANDS.get(command, COMMANDS):
        assert flag.removesuffix("...").lower() in ran.out.lower()


def test_wrong_commands_end_with_code_2(cli):
    for arguments in ((), ("nonsense",), ("plan",), ("plan", "somewhere"), ("train",), ("check", "a", "b")):
        ran = cli.call(*arguments)
        assert ran.code == 2 and "Traceback" not in ran.err and "Usage" in ran.err + ran.out


def test_the_script_and_the_module_tell_the_same_version(cli):
    assert cli.spawn("--version").ok().out == f"autoseg {autoseg.__version__}\n"
    script = Path(sys.executable).with_name("autoseg")
    if script.exists():
        ran = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
        assert ran.stdout == f"autoseg {autoseg.__version__}\n"


def test_doctor_tells_what_the_machine_offers(cli):
    out = cli.call("doctor").ok().out.lower()
    for word in ("cores", "memory", "gpu", "bf16", "disk", "torch", "numpy", "python", autoseg.__version__):
        assert word in out


@pytest.mark.parametrize("kind", ["chest", "brain"])
def test_the_demonstration_runs_from_nothing_to_a_picture(cli, monkeypatch, tmp_path, kind):
    from autoseg import pipeline

    monkeypatch.setattr(pipeline, "DEMO_CASES", 6 if kind == "chest" else 3)
    monkeypatch.setattr(pipeline, "DEMO_UNSEEN", 1)
    monkeypatch.setattr(pipeline, "DEMO_SIZE", cli.SIZE)
    spec = pipeline.DEMO_SPEC.model_copy(update={"epochs": 2, "steps_per_epoch": 5, "val_steps": 1})
    monkeypatch.setattr(pipeline, "demo", functools.partial(pipeline.demo, spec=spec))
    ran = cli.call("demo", "--out", tmp_path / "demo", "--kind", kind).ok()
    assert "1 unseen phantoms, ensemble of all folds" in ran.out and "foreground mean" in ran.out
    assert str(tmp_path / "demo" / "demo.png") in ran.out
    with PIL.Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert min(picture.size) > 300 and np.asarray(picture.convert("L")).std() > 10
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    names = {"chest": {"lungs", "heart", "spine", "nodule"}, "brain": {"whole tumour", "tumour core", "enhancing tumour"}}[kind]
    assert [case["case"] for case in report["cases"]] == [f"{kind}1000"] and set(report["mean"]) == names
    folds = sorted(p.name for p in (tmp_path / "demo" / "work" / "runs" / "3d_fullres").iterdir())
    assert folds == [f"fold_{k}" for k in range(5 if kind == "chest" else 3)]
    before = cli.states(tmp_path / "demo" / "masks") | cli.states(tmp_path / "demo" / "work" / "runs")
    cli.call("demo", "--out", tmp_path / "demo", "--kind", kind).ok()
    assert cli.states(tmp_path / "demo" / "masks") | cli.states(tmp_path / "demo" / "work" / "runs") == before


def test_numpy_is_told_to_use_one_thread_before_it_is_imported():
    code = "import autoseg.cli, os, sys; names = list(sys.modules); print(os.environ['OPENBLAS_NUM_THREADS'], " \
        "'numpy' not in names or names.index('autoseg.cli.blas') < names.index('numpy'))"
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "True"]
