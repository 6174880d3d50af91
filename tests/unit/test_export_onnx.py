"""Exported networks compute what ours do, and the reference around them makes the masks that `predict` makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoseg.errors import RunError
from autoseg.files.images import read_label, write_label
from autoseg.files.model import write_model_file
from autoseg.files.tensors import tensor_bytes
from autoseg.networks.build import build
from autoseg.networks.describe import describe
from autoseg.networks.onnx_graph import onnx_model
from autoseg.stages import export_onnx as stage
from autoseg.stages.export_onnx import export_onnx
from autoseg.stages.models import open_model
from autoseg.stages.onnx_reference import Pipeline
from autoseg.stages.predict import Options
from autoseg.types.case import Image
from autoseg.types.geometry import Grid
from autoseg.types.labels import Label, Labels, Region
from autoseg.types.model import MemberRecord, ModelRecord, NetworkRecord
from autoseg.types.plan import Configuration, Plan
from autoseg.types.record import Spec

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

CPU = Options(device="cpu", precision="fp32")
PLAIN = Labels(foreground=(Label(name="a", value=1), Label(name="b", value=300)))
NESTED = Labels(
    foreground=(Label(name="edema", value=1), Label(name="core", value=4)),
    regions=(Region(name="whole", values=(1, 4)), Region(name="core", values=(4,))), region_order=(1, 4),
)


def configuration(patch: tuple[int, ...], kind: str = "unet", spacing: float = 1.0, **options: Any) -> Configuration:
    dims = len(patch)
    first = (1,) * (dims - 2)  # anisotropic in 3D
    return Configuration(
        patch_size=patch, batch_size=2, spacing=(spacing,) * dims, median_shape=(8.0,) * dims, network=Spec(kind=kind),
        strides=((1,) * dims, (*first, 2, 2), (2,) * dims), features_per_stage=(4, 6, 8), blocks_per_stage=(1, 2, 2),
        kernel_sizes=((*first, 3, 3), (3,) * dims, (3,) * dims), decoder_blocks_per_stage=(1, 2), batch_dice=False,
        normalization=("ZScoreNormalization",), use_mask_for_norm=(False,), **options,
    )


KINDS = {
    "flat": configuration((16, 12)), "plain": configuration((8, 12, 12)), "residual": configuration((8, 12, 12), "residual-unet"),
    "coarse": configuration((8, 12, 12), spacing=1.6, next_stage="fine"),
    "fine": configuration((8, 12, 12), previous_stage="coarse"),
}


def network(run: str, inputs: int, outputs: int, seed: int) -> Any:
    """Random weights, with heads that make all classes compete."""
    made = build(describe(KINDS[run], inputs, outputs), seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made.eval()


def packed(path: Path, runs: dict[str, str | None], labels: Labels = PLAIN, members: tuple[str, ...] | None = None) -> Path:
    """A model file of these runs (with their previous stages), two folds each."""
    plan = Plan(
        dataset_name="x", planner="default", gpu_memory_gb=8, transpose_forward=(1, 0, 2), channels=("MRI",), labels=labels,
        intensities=(), configurations=KINDS,
    )
    record = ModelRecord(
        name="x", made_by="a test", licence="MIT", labels=labels, channels=("MRI",), plan=plan,
        networks={run: NetworkRecord(configuration=run, folds=(0, 2), mirror_axes=(1,), previous=previous)
                  for run, previous in runs.items()},
        members=tuple(MemberRecord(run=run, weight=i + 1) for i, run in enumerate(members or runs)),
        postprocessing=(Spec(kind="fill_holes", options={"labels": [1]}),),
    )
    weights = {}
    for seed, name in enumerate(record.part_names):
        run = name.split("/")[1]
        made = network(run, record.input_channels(run), labels.output_count, seed).state_dict()
        weights[name] = lambda made=made: tensor_bytes(made)
    return write_model_file(path, record, weights).path


def image(seed: int = 0) -> Image:
    array = np.random.default_rng(seed).normal(0, 1, (1, 11, 15, 14)).astype(np.float32)
    return Image(array, Grid(shape=(11, 15, 14), spacing=(1.0, 1.2, 0.9)), ".nii.gz")


def session(made: Any) -> Any:
    return runtime.InferenceSession(made.SerializeToString())


@pytest.mark.parametrize("opset", [16, 17, 18, 21])
@pytest.mark.parametrize("run", ["flat", "plain", "residual"])
def test_a_graph_gives_the_networks_logits_for_any_batch(run: str, opset: int) -> None:
    ours = network(run, 2, 3, 5)
    weights = {name: tensor.numpy() for name, tensor in ours.state_dict().items()}
    made = onnx_model(ours.description, [weights], KINDS[run].patch_size, opset, {"licence": "MIT"})
    onnx.checker.check_model(made, full_check=True)
    assert [(p.key, p.value) for p in made.metadata_props] == [("licence", "MIT")]
    theirs = session(made)
    for batch in (1, 3):
        tiles = torch.randn(batch, 2, *KINDS[run].patch_size, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = ours(tiles)[0].numpy()
        (found,) = theirs.run(["logits"], {"image": tiles.numpy()})
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        ordered = np.sort(expected, axis=1)
        sure = ordered[:, -1] - ordered[:, -2] > 1e-3
        assert sure.mean() > 0.97 and len(np.unique(expected.argmax(1))) > 1
        assert np.array_equal(found.argmax(1)[sure], expected.argmax(1)[sure])


def test_an_averaged_graph_gives_the_mean_and_holds_no_unused_weights() -> None:
    ours = [network("plain", 1, 3, seed) for seed in (1, 2, 3)]
    weights = [{name: tensor.numpy() for name, tensor in one.state_dict().items()} for one in ours]
    made = onnx_model(ours[0].description, weights, KINDS["plain"].patch_size, 17, {})
    tile = torch.randn(1, 1, *KINDS["plain"].patch_size)
    with torch.inference_mode():
        expected = torch.stack([one(tile)[0] for one in ours]).mean(0).numpy()
    np.testing.assert_allclose(session(made).run(None, {"image": tile.numpy()})[0], expected, rtol=1e-3, atol=1e-4)
    used = {name for step in made.graph.node for name in step.input}
    assert {tensor.name for tensor in made.graph.initializer} <= used
    assert not any("head_1" in tensor.name for tensor in made.graph.initializer)  # deep supervision


@pytest.mark.parametrize(("runs", "labels", "members"), [
    ({"plain": None}, PLAIN, None), ({"flat": None, "residual": None}, PLAIN, None), ({"plain": None}, NESTED, None),
    ({"fine": "coarse", "coarse": None}, PLAIN, ("fine",)),
], ids=["plain", "ensemble", "regions", "cascade"])
@pytest.mark.parametrize("average", [False, True])
def test_the_reference_makes_the_masks_that_predict_makes(
    tmp_path: Path, runs: dict[str, str | None], labels: Labels, members: tuple[str, ...] | None, average: bool
) -> None:
    path = packed(tmp_path / "m.autoseg", runs, labels, members)
    found = export_onnx(path, tmp_path / "onnx", average=average)
    assert len(found) == len(runs) * (1 if average else 2) + 2 and all(p.is_file() for p in found)
    for mirror in (True, False):
        expected = open_model(path, Options(device="cpu", precision="fp32", mirror=mirror)).predict_image(image()).label_zyx
        mask = Pipeline(tmp_path / "onnx", mirror).predict(image())
        assert mask.dtype == expected.dtype and len(np.unique(expected)) > 1
        assert (mask == expected).mean() > 0.999


def test_the_reference_beside_the_networks_runs_as_a_script(tmp_path: Path) -> None:
    path = packed(tmp_path / "m.autoseg", {"plain": None})
    export_onnx(path, tmp_path / "onnx", folds=[2])
    assert sorted(p.name for p in (tmp_path / "onnx").iterdir()) == ["pipeline.json", "plain_fold_2.onnx", "reference.py"]
    source = tmp_path / "case.nii.gz"
    picture = np.random.default_rng(0).integers(0, 1000, (11, 15, 14)).astype(np.int16)
    write_label(source, picture, image().grid, source)
    mask = tmp_path / "mask.nii.gz"
    subprocess.run([sys.executable, tmp_path / "onnx" / "reference.py", mask, source], check=True)
    found, grid = read_label(mask)
    one = open_model(path, Options(device="cpu", precision="fp32", folds=(2,)))
    expected = one.predict_image(Image(picture[None], image().grid, ".nii.gz")).label_zyx
    assert grid.shape == expected.shape and (found == expected).mean() > 0.999


def test_the_description_names_all_that_surrounds_the_networks(tmp_path: Path) -> None:
    export_onnx(packed(tmp_path / "m.autoseg", {"plain": None}), tmp_path / "onnx")
    told = json.loads((tmp_path / "onnx" / "pipeline.json").read_text())
    entry = told["networks"]["plain"]
    assert entry["files"] == ["plain_fold_0.onnx", "plain_fold_2.onnx"] and entry["patch"] == [8, 12, 12]
    assert entry["spacing_mm"] == [1, 1, 1] and entry["normalization"] == ["ZScoreNormalization"] and entry["mirror_axes"] == [1]
    assert told["transpose_forward"] == [1, 0, 2] and told["orientation"] == "LPS" and told["licence"] == "MIT"


def test_weights_too_many_for_one_message_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path / "m.autoseg", {"plain": None})
    export_onnx(path, tmp_path / "whole", folds=[0])
    monkeypatch.setattr(stage, "MOST_BYTES", 100)
    export_onnx(path, tmp_path / "split", folds=[0])
    assert (tmp_path / "split" / "plain_fold_0.onnx.data").stat().st_size > 1000
    tile = np.random.default_rng(0).normal(size=(1, 1, 8, 12, 12)).astype(np.float32)
    results = [runtime.InferenceSession(str(tmp_path / name / "plain_fold_0.onnx")).run(None, {"image": tile})[0]
               for name in ("whole", "split")]
    assert np.array_equal(*results)


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    path = packed(tmp_path / "m.autoseg", {"plain": None})
    for options, said in (
        ({"opset": 9}, "opset 9 is not supported; choose 16 to 21"), ({"folds": [1]}, r"fold\(s\) 0, 2 of run 'plain'"),
    ):
        with pytest.raises(RunError, match=said):
            export_onnx(path, tmp_path / "onnx", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(RunError, match=r"not an empty folder.*--overwrite"):
        export_onnx(path, tmp_path / "full")
    export_onnx(path, tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "mine.txt").exists() and (tmp_path / "full" / "plain_fold_0.onnx").exists()
