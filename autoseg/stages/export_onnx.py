"""Export networks to ONNX, with everything around them: a description for every language, and a reference in Python."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autoseg.errors import RunError
from autoseg.files.model import describe_run, open_model_file
from autoseg.files.workspace import Workspace, atomic_path, to_json, write_text
from autoseg.logs import SILENT, Reporter
from autoseg.networks.onnx_graph import onnx_model, onnx_package
from autoseg.types.model import ModelRecord, part_name

if TYPE_CHECKING:
    import torch

OPSET = 17
PIPELINE, REFERENCE = "pipeline.json", "reference.py"
MOST_BYTES = 1_900_000_000  # a protobuf message holds at most 2 GiB; beyond that the weights lie in a file beside it

Read = Callable[[str], "dict[str, torch.Tensor]"]


def export_onnx(
    model: Path,
    out: Path,
    opset: int = OPSET,
    folds: Sequence[int] | None = None,
    average: bool = False,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> list[Path]:
    """Write the networks of a model file or a work folder as ONNX, one file for each run and fold, and what surrounds them.

    With `average` a run's folds become one graph that gives their mean. Beside the networks lie pipeline.json, which describes
    every step from image to mask, and reference.py, which carries them out with ONNX Runtime. Returns the paths written.

    Raises:
        RunError: onnx is missing, a fold is not there, or `out` holds something else and `overwrite` is not set.
        RecordError: the model file cannot be used.
    """
    onnx = onnx_package()
    record, read = _source(model, folds, reporter)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise RunError(f"{out} is not an empty folder; choose another --out, or give --overwrite to write into it")
    files: dict[str, list[str]] = {}
    with reporter.task("export", len(record.part_names), "networks") as task:
        for run, network in record.networks.items():
            description, patch = describe_run(record, run), record.configuration_of(run).patch_size
            groups = [network.folds] if average else [(fold,) for fold in network.folds]
            for group in groups:
                name = f"{run}.onnx" if average else f"{run}_fold_{group[0]}.onnx"
                weights = [{key: value.numpy() for key, value in read(part_name(run, fold)).items()} for fold in group]
                facts = {"model": record.name, "licence": record.licence, "run": run, "folds": ",".join(map(str, group))}
                _save(onnx, onnx_model(description, weights, patch, opset, facts), out / name)
                files.setdefault(run, []).append(name)
                task.advance(len(group), note=name)
    write_text(out / PIPELINE, to_json(_pipeline(record, files, opset)) + "\n")
    write_text(out / REFERENCE, Path(__file__).with_name("onnx_reference.py").read_text(encoding="utf-8"))
    return [*(out / name for names in files.values() for name in names), out / PIPELINE, out / REFERENCE]


def _source(model: Path, folds: Sequence[int] | None, reporter: Reporter) -> tuple[ModelRecord, Read]:
    """What to export, and how to read the weights of a part."""
    from autoseg.files.runs import RunFolder, load_tensors
    from autoseg.stages.pack import collect

    if model.is_dir():
        workspace = Workspace(model)
        record = collect(workspace, folds, reporter=reporter)

        def read(part: str) -> dict[str, torch.Tensor]:
            _, run, fold = part.removesuffix(".safetensors").split("/")
            return load_tensors(RunFolder(workspace.runs / run / fold).weights_path)

        return record, read
    file = open_model_file(model)
    networks = dict(file.record.networks)
    for run, network in networks.items():
        missing = sorted(set(folds or ()) - set(network.folds))
        if missing:
            raise RunError(f"{model} holds fold(s) {', '.join(map(str, network.folds))} of run {run!r}, not {missing}")
        kept = network.folds if folds is None else tuple(sorted(set(folds)))
        networks[run] = network.model_copy(update={"folds": kept})
    return file.record.model_copy(update={"networks": networks}), lambda part: file.read([part])[part]


def _save(onnx: Any, made: Any, path: Path) -> None:
    """Check and write one graph; weights too many for one message go into a file of the same name with .data."""
    size = sum(len(tensor.raw_data) for tensor in made.graph.initializer)
    if size <= MOST_BYTES:
        onnx.checker.check_model(made, full_check=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(made.SerializeToString(deterministic=True))
        return
    beside = path.name + ".data"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        onnx.save_model(made, temporary, save_as_external_data=True, location=beside, size_threshold=1024)
        onnx.checker.check_model(str(temporary), full_check=True)
        for name in (beside, path.name):
            os.replace(Path(folder) / name, path.parent / name)


def _pipeline(record: ModelRecord, files: dict[str, list[str]], opset: int) -> dict[str, Any]:
    """Everything that someone who runs the networks has to know."""
    networks = {}
    for run, network in record.networks.items():
        c = record.configuration_of(run)
        networks[run] = {
            "files": files[run], "previous": network.previous, "dims": c.dims, "input_channels": record.input_channels(run),
            "output_channels": record.labels.output_count, "patch": c.patch_size, "spacing_mm": c.spacing,
            "normalization": c.normalization, "use_mask_for_norm": c.use_mask_for_norm, "mirror_axes": network.mirror_axes,
            "tile_step": 0.5, "blending": "gaussian, sigma = patch / 8",
        }
    shown = record.model_copy(update={"parts": {}})
    made = {
        "format": 1, "name": record.name, "licence": record.licence, "opset": opset,
        "input": "image: float32 (batch, channel, *patch), axes z, y, x after the transpose",
        "output": f"logits: float32 (batch, {'region' if record.labels.regions else 'class'}, *patch)",
        "decision": "sigmoid > 0.5, later regions overwrite earlier ones" if record.labels.regions else "argmax of softmax",
        "channels": record.channels, "orientation": record.plan.orientation, "transpose_forward": record.plan.transpose_forward,
        "intensities": [one.model_dump(mode="json") for one in record.plan.intensities],
        "members": [member.model_dump(mode="json") for member in record.members],
        "networks": networks, "model": shown.model_dump(mode="json"),
    }
    found: dict[str, Any] = json.loads(json.dumps(made, default=np.ndarray.tolist))
    return found
