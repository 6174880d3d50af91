"""The memory plan: what is given up first, what is never given up, and what is said when nothing fits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from autoseg.arrays.tiles import make_tiling
from autoseg.files.allocator import give_back
from autoseg.files.machine import slurm_limit_bytes
from autoseg.inference import memory
from autoseg.inference.memory import (
    CaseLoad,
    Limits,
    MemoryPlan,
    StreamLoad,
    least_bytes,
    plan_memory,
    reading_bytes,
    resident_bytes,
)

MB = 2**20
STREAM = StreamLoad(make_tiling((100, 64, 64), (16, 64, 64)), 31, 50 * MB)
LOAD = CaseLoad((STREAM,), made_bytes=10 * MB, image_bytes=20 * MB)
TILE = 31 * 16 * 64 * 64 * 4  # logits of one tile
HELD = (16 + 3) * 64 * 64 * 32 * 4  # open planes and those being restored, channels and weight, float32


def test_with_room_for_everything_nothing_is_given_up() -> None:
    plan = plan_memory(LOAD, 2, 1 << 40, None, 7 * MB)
    assert plan == MemoryPlan(2, False, True, True, 10 * MB + 7 * MB + (HELD + 64 * 64 * 32 * 4 * 8) + 100 * MB, keep=True)
    assert STREAM.held_bytes(1, False) == HELD == 2 * STREAM.held_bytes(1, True)


def test_freed_memory_is_kept_where_twice_the_work_of_a_tile_fits_beside_it_and_never_on_a_card() -> None:
    most = plan_memory(LOAD, 2, 1 << 40)
    assert plan_memory(LOAD, 2, most.ram_bytes + 200 * MB) == most
    assert not plan_memory(LOAD, 2, most.ram_bytes + 200 * MB - 1).keep
    assert not plan_memory(LOAD, 2, 1 << 40, 1 << 40).keep


def test_tiles_at_once_go_first_then_reading_ahead_then_precision() -> None:
    steps: list[tuple[int, bool, bool]] = []
    free = 1 << 40
    while True:
        try:
            plan = plan_memory(LOAD, 4, free, None, 30 * MB)
        except MemoryError as error:
            assert "100 x 64 x 64 voxels with 31 outputs need at least 0.06 GiB of memory, 0.06 GiB are free" in str(error)
            break
        steps.append((plan.batch, plan.read_ahead, plan.half))
        free = plan.ram_bytes - 1
    assert steps == [(4, True, False), (2, True, False), (1, True, False), (1, False, False), (1, False, True)]


def test_on_a_card_logits_leave_it_last_and_its_memory_is_counted_apart() -> None:
    steps: list[tuple[bool, bool, int]] = []
    card = 1 << 40
    while True:
        try:
            plan = plan_memory(LOAD, 2, 1 << 40, card, 0)
        except MemoryError as error:
            assert "GiB on the GPU" in str(error)
            break
        steps.append((plan.on_device, plan.half, plan.batch))
        card = plan.gpu_bytes - 1
        assert plan.ram_bytes == 10 * MB + (0 if plan.on_device else STREAM.held_bytes(plan.batch, plan.half) + plan.batch * TILE)
    assert steps == [(True, False, 2), (True, False, 1), (True, True, 1), (False, False, 1)]
    lean = plan_memory(LOAD, 1, 10 * MB + STREAM.held_bytes(1, True) + TILE, 60 * MB)
    assert not lean.on_device and lean.half, "in main memory float16 when it is short there too"


def test_restoring_on_a_card_is_counted_there() -> None:
    plans = [plan_memory(CaseLoad((STREAM,), 0, 0, restoring), 2, 1 << 40, 1 << 40) for restoring in (0, 7 * MB)]
    assert plans[1].gpu_bytes - plans[0].gpu_bytes == 7 * MB and plans[0].ram_bytes == plans[1].ram_bytes == 0


def test_mirrored_copies_fill_a_batch_where_tiles_are_few() -> None:
    one = StreamLoad(make_tiling((16, 64, 64), (16, 64, 64)), 31, 50 * MB)
    assert plan_memory(CaseLoad((one,), 0, 0), 4, 1 << 40).ram_bytes == one.held_bytes(4, False) + 4 * 50 * MB


def test_the_least_memory_is_that_of_the_leanest_plan() -> None:
    least = least_bytes(LOAD, gpu=False)
    assert plan_memory(LOAD, 4, least, None, 30 * MB) == MemoryPlan(1, True, True, False, least)
    with pytest.raises(MemoryError):
        plan_memory(LOAD, 4, least - 1, None, 30 * MB)
    assert least_bytes(LOAD, gpu=True) == 10 * MB


def test_every_members_logits_are_held_but_one_network_works_at_a_time() -> None:
    two = CaseLoad((STREAM, STREAM), 0, 0)
    assert plan_memory(two, 1, 1 << 40).ram_bytes == 2 * HELD + 50 * MB
    assert plan_memory(CaseLoad((StreamLoad(STREAM.tiling, 31, 0, half=True),), 0, 0), 1, 1 << 40).ram_bytes == HELD // 2


def test_reading_takes_the_stored_voxels_and_floats_before_and_after_resampling() -> None:
    assert reading_bytes(1000, 1, 2, 1.0) == 2000 + 1000 + 4000 * 2.5
    assert reading_bytes(1000, 2, 2, 4.0) == 4000 + 1000 + 8000 * 7


def test_a_limit_counts_what_the_process_holds_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_available_bytes", lambda: 5000 * MB)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 400 * MB)
    assert Limits().free_ram() == 4500 * MB, "other processes take some meanwhile"
    assert Limits.of_gb(1, None) == Limits(1024 * MB, None) and Limits.of_gb(None, 0.5).gpu == 512 * MB
    assert Limits.of_gb(1, None).free_ram() == (1024 - 192 - 400) * MB
    monkeypatch.setattr(memory, "memory_available_bytes", lambda: 50000 * MB)
    assert Limits.of_gb(10, None).free_ram() == pytest.approx(0.96 * 10240 * MB - 400 * MB, abs=1)
    assert Limits.of_gb(0.25, None).free_ram() == 0 and Limits.of_gb(100, None).free_ram() == 45000 * MB


def test_tensors_that_lie_on_a_card_are_not_free_whatever_the_limit() -> None:
    assert Limits().free_gpu(1000 * MB, 300 * MB) == 660 * MB
    assert Limits.of_gb(None, 0.5).free_gpu(1000 * MB, 300 * MB) == pytest.approx((0.96 * 512 - 300) * MB, abs=1)
    assert Limits.of_gb(None, 0.25).free_gpu(1000 * MB, 300 * MB) == 0
    assert Limits.of_gb(None, 9).free_gpu(1000 * MB, 0) == 960 * MB


@pytest.mark.parametrize(("variables", "megabytes"), [
    ({}, None), ({"SLURM_MEM_PER_NODE": "8000"}, 8000), ({"SLURM_MEM_PER_NODE": "0"}, None), ({"SLURM_MEM_PER_NODE": "x"}, None),
    ({"SLURM_MEM_PER_CPU": "2000", "SLURM_CPUS_ON_NODE": "4"}, 8000), ({"SLURM_MEM_PER_CPU": "2000"}, 2000),
    ({"HOME": "/root", "SLURM_JOB_CPUS_PER_NODE": "2(x3)", "SLURM_MEM_PER_NODE": "512"}, 512),
])
def test_slurm_says_how_much_a_job_may_take(variables: dict[str, str], megabytes: int | None) -> None:
    assert slurm_limit_bytes(variables) == (None if megabytes is None else megabytes * MB)


def test_memory_held_is_told_and_can_be_given_back() -> None:
    before = resident_bytes()
    block = bytearray(64 * MB)
    assert resident_bytes() >= before + 60 * MB or before == 0
    del block
    give_back()


PEAK = """
import sys
import numpy as np, torch
from pathlib import Path
torch.set_num_threads(1)
from autoseg.inference import Limits, Member, Model, memory
from autoseg.inference.memory import resident_bytes
from autoseg.networks.build import build
from autoseg.networks.describe import describe
from autoseg.types.case import Image
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels
from autoseg.types.plan import Configuration, Plan

CLASSES, SHAPE = 40, (128, 96, 96)
configuration = Configuration(
    patch_size=(16, 64, 64), batch_size=2, spacing=(1.0,) * 3, median_shape=tuple(map(float, SHAPE)),
    strides=((1, 1, 1), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 2, features_per_stage=(4, 4), blocks_per_stage=(1, 1),
    decoder_blocks_per_stage=(1,), batch_dice=False, normalization=("NoNormalization",), use_mask_for_norm=(False,))
labels = Labels(foreground=tuple(Label(name=f"l{i}", value=i) for i in range(1, CLASSES)))
plan = Plan(dataset_name="x", planner="default", gpu_memory_gb=8, transpose_forward=(0, 1, 2), channels=("CT",), labels=labels,
            intensities=(), configurations={"c": configuration})
network = build(describe(configuration, 1, CLASSES), seed=0)
memory._LEAST_MARGIN = 0  # it would hide what is reckoned wrongly
def model(gb):
    return Model([Member(plan, "c", (network,), ())], torch.device("cpu"), "fp32", limits=Limits.of_gb(gb, None))
def image(size):
    values = np.random.default_rng(0).integers(0, 100, (1, *size)).astype(np.int16)
    return Image(values, Grid(shape=size, spacing=(1.0, 1.0, 1.0)), "")
model(None).predict_image(image((32, 64, 64)))  # loads and compiles, which the least margin is for
def peak():
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
limit = resident_bytes() + float(sys.argv[1]) * 2**20
try:
    found = model(limit / 2**30).predict_image(image(SHAPE))
    print("fits", len(np.unique(found.label_zyx)))
except MemoryError as error:
    print("refused", error)
print(peak() <= limit, round((peak() - limit) / 2**20), "MiB")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures with /proc")
@pytest.mark.parametrize(("room_mb", "says"), [(130, "fits"), (40, "refused")])
def test_a_case_stays_within_its_limit_or_is_refused(room_mb: int, says: str) -> None:
    """Whole logits of this case would take 180 MiB in float32."""
    done: Any = subprocess.run([sys.executable, "-c", PEAK, str(room_mb)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(says) and lines[1].startswith("True"), done.stdout
    assert says == "fits" or "GiB are free" in lines[0]
