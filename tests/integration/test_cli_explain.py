"""The plan on the command line: told in words, compared with other budgets and other plans, and given a time."""

from __future__ import annotations

import json


def test_explain_tells_every_configuration_and_what_was_set_by_hand(cli, planned):
    out = cli.call("explain", planned).ok().out
    for name in json.loads((planned / "plan.json").read_text())["configurations"]:
        assert f"CONFIGURATION {name}" in out
    assert "(planned: 32 x 64" in out and "by hand" in out and "Why: " in out and "From: " in out  # the fixture edits features


def test_what_if_shows_budgets_side_by_side(cli, chest, tmp_path):
    cli.call("plan", chest, "--out", tmp_path / "work").ok()
    out = cli.call("explain", tmp_path / "work", "--what-if", "2,8", "--no-measure").ok().out
    assert "peak GB" in out and "3d_fullres" in out and "2d" in out
    cli.call("explain", tmp_path / "work", "--what-if", "2,much").refused("--what-if", "4,8,24")
    cli.call("explain", tmp_path / "work", "--what-if", "0").refused("positive number of GB")


def test_what_if_measures_steps_here_and_marks_the_others_as_estimates(cli, chest, tmp_path):
    cli.call("plan", chest, "--out", tmp_path / "work", "--gpu-memory", "0.02").ok()
    out = cli.call("explain", tmp_path / "work", "--what-if", "0.02,0.04", "--device", "cpu").ok().out
    assert "measured" in out and "~" in out and "estimate" in out


def test_diff_shows_both_values_and_both_reasons(cli, chest, tmp_path):
    for name, memory in (("one", 0.02), ("two", 2)):
        cli.call("plan", chest, "--out", tmp_path / name, "--gpu-memory", memory).ok()
    out = cli.call("diff", tmp_path / "one", tmp_path / "two").ok().out
    assert "gpu_memory_gb" in out and "patch_size" in out and "why in one" in out
    assert "are the same" in cli.call("diff", tmp_path / "one", tmp_path / "one").ok().out
    cli.call("diff", tmp_path / "one", tmp_path / "nowhere").refused("plan.json")


def test_fit_is_a_planner_like_the_others_and_prints_what_it_needs(cli, chest, tmp_path):
    out = cli.call("plan", chest, "--out", tmp_path / "work", "--planner", "fit", "--gpu-memory", 2).ok().out
    assert "memory" in out and json.loads((tmp_path / "work" / "plan.json").read_text())["planner"] == "fit"


def test_a_time_budget_of_the_plan_is_told_kept_and_used(cli, chest, tmp_path):
    work = tmp_path / "work"
    cli.call("plan", chest, "--out", work, "--gpu-memory", "0.05").ok()
    cli.thin(work, features=(2, 4, 4, 4, 4, 4), keep=("3d_fullres",))
    out = cli.call("plan", chest, "--out", work, "--time-budget", "10s").ok().out
    assert "time budget 10 s" in out and "epochs of" in out
    assert json.loads((work / "plan.json").read_text())["time_budget_s"] == 10
    out = cli.call("train", work, "--folds", "0", "--device", "cpu", "--precision", "fp32", "--threads", 0).ok().out
    assert "time budget 10 s" in out
    spec = json.loads((work / "runs" / "3d_fullres" / "fold_0" / "run.json").read_text())["spec"]
    assert spec["epochs"] < 1000
