"""Whole folders as nnU-Net leaves them are imported, and the model file predicts what the networks themselves predict."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoseg.errors import PlanError, RecordError, RunError
from autoseg.files.model import open_model_file
from autoseg.inference import Member, Model
from autoseg.logs import Silent
from autoseg.networks.build import Network, build
from autoseg.networks.describe import describe
from autoseg.stages.import_nnunet import import_nnunet
from autoseg.stages.models import open_model
from autoseg.stages.nnunet_plan import make_plan, read_source
from autoseg.stages.nnunet_weights import foreign_names
from autoseg.stages.predict import Options
from autoseg.types.plan import Configuration

CPU = torch.device("cpu")
LABELS = {"background": 0, "organ": 1, "tumour": 2}
STATISTICS = {"max": 900.0, "mean": 0.2, "median": 0.1, "min": -3.0, "percentile_00_5": -2.0, "percentile_99_5": 2.0, "std": 0.9}


class Told(Silent):
    """Keeps what was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str) -> None:
        """Keep it."""
        self.lines.append(message)

    def warn(self, message: str) -> None:
        """Keep it."""
        self.lines.append(f"warning: {message}")


def entry(dims: int, residual: bool = False, **values: Any) -> dict[str, Any]:
    resampling = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    network = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    return {
        "preprocessor_name": "DefaultPreprocessor", "batch_size": 2, "patch_size": [8] * dims, "spacing": [1.5] * dims,
        "median_image_size_in_voxels": [12.0] * dims, "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": {**resampling, "order": 3},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1}, "batch_dice": False,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
            "arch_kwargs": {
                "n_stages": 3, "features_per_stage": [4, 6, 8], "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[3] * dims] * 3, "strides": [[1] * dims, [2] * dims, [1] * (dims - 1) + [2]],
                ("n_blocks_per_stage" if residual else "n_conv_per_stage"): [1, 2, 1], "n_conv_per_stage_decoder": [1, 2],
                "conv_bias": True, "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
            },
        },
        **values,
    }


def model_folder(
    tmp_path: Path, name: str, configurations: dict[str, Any], labels: dict[str, Any] = LABELS, **dataset: Any
) -> Path:
    folder = tmp_path / "Dataset001_X" / f"nnUNetTrainer__nnUNetPlans__{name}"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps({
        "dataset_name": "Dataset001_X", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager", "configurations": configurations,
        "foreground_intensity_properties_per_channel": {"0": STATISTICS},
    }))
    (folder / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 5, "file_ending": ".nii.gz", **dataset}))
    return folder


def foreign_state(network: Network, prefix: str = "") -> OrderedDict[str, torch.Tensor]:
    """A state dict as nnU-Net's network has it, with everything that it holds twice."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    own = network.state_dict()
    for ours, theirs in foreign_names(network.description).items():
        state[prefix + theirs] = own[ours]
        head, _, kind = theirs.rpartition(".")
        if head.endswith((".conv", ".norm")):
            number = 0 if head.endswith(".conv") else 1
            state[f"{prefix}{head[:-5]}.all_modules.{number}.{kind}"] = own[ours]
        if theirs.startswith("encoder."):
            state[f"{prefix}decoder.{theirs}"] = own[ours]
    return state


def save_fold(
    folder: Path, configuration: str, fold: int | str, inputs: int = 1, outputs: int = 3, axes: Sequence[int] | None = (0, 1),
    kind: str = "final", prefix: str = "", **changes: Any,
) -> Network:
    """Write one fold's checkpoint with random weights, and return the network that they are of."""
    described = _configuration(folder, configuration)
    seed = fold if isinstance(fold, int) else 99
    network = build(describe(described, inputs, outputs), seed=seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.add_((0.2 if parameter.ndim > 1 else 0.05) * torch.randn(parameter.shape, generator=generator))
        for name in network.description.heads:  # so that no label is everywhere
            weight = network.get_parameter(f"units.{name}.weight")
            weight.sub_(weight.mean(1, keepdim=True))
    (folder / f"fold_{fold}").mkdir(exist_ok=True)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    torch.save({
        "network_weights": foreign_state(network, prefix), "optimizer_state": optimizer.state_dict(), "grad_scaler_state": None,
        "logging": {"train_losses": [np.float32(1.0)]}, "_best_ema": np.float64(0.5), "current_epoch": 3,
        "init_args": {"plans": {}, "configuration": configuration, "fold": fold, "dataset_json": {}, "device": CPU},
        "trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": axes, **changes,
    }, folder / f"fold_{fold}" / f"checkpoint_{kind}.pth")
    return network


def _configuration(folder: Path, name: str) -> Configuration:
    source = read_source(folder)
    previous = source.configuration(name).get("previous_stage")
    return make_plan(source, {name: (), **({previous: ()} if previous else {})}).configurations[name]


def image() -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    return np.kron(rng.normal(size=(1, 7, 6, 8)), np.ones((1, 2, 2, 2))).astype(np.float32)


@pytest.mark.parametrize(("name", "dims", "residual", "axes"), [
    ("3d_fullres", 3, False, (0, 1, 2)), ("2d", 2, False, (1,)), ("3d_fullres", 3, True, None), ("2d", 2, True, (0, 1)),
])
def test_an_imported_model_predicts_what_its_networks_predict(
    tmp_path: Path, name: str, dims: int, residual: bool, axes: tuple[int, ...] | None
) -> None:
    folder = model_folder(tmp_path, name, {name: entry(dims, residual)})
    networks = tuple(save_fold(folder, name, fold, axes=axes) for fold in (0, 3))
    out = import_nnunet(folder, tmp_path / "model.autoseg")
    record = open_model_file(out).record
    assert record.networks[name].folds == (0, 3) and record.networks[name].mirror_axes == (axes or ())
    imported = open_model(out, Options(device="cpu", precision="fp32"))
    expected = Model([Member(record.plan, name, networks, axes or ())], CPU, "fp32")
    labels = imported.predict(image(), (1.0, 1.3, 2.0))
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(labels, expected.predict(image(), (1.0, 1.3, 2.0)))


def test_the_networks_numbers_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "3d_fullres", {"3d_fullres": entry(3)})
    network = save_fold(folder, "3d_fullres", 0)
    imported = open_model(import_nnunet(folder, tmp_path / "model.autoseg"), Options(device="cpu", precision="fp32"))
    found = imported.members[0].networks[0].state_dict()
    assert all(torch.equal(found[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrapped_networks_are_imported(tmp_path: Path, prefix: str) -> None:
    folder = model_folder(tmp_path, "2d", {"2d": entry(2)})
    network = save_fold(folder, "2d", 0, prefix=prefix)
    imported = open_model(import_nnunet(folder, tmp_path / "model.autoseg"), Options(device="cpu", precision="fp32"))
    found = imported.members[0].networks[0].state_dict()
    assert all(torch.equal(found[key], value) for key, value in network.state_dict().items())


def test_networks_without_biases_and_affine_normalisation_compute_the_same(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "2d", {"2d": entry(2)})
    network = save_fold(folder, "2d", 0)
    for name, parameter in network.named_parameters():
        if ".norm." in name:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias") and "head" not in name:
            parameter.data.zero_()
    left_out = (".norm.", ".all_modules.1.")
    state = OrderedDict(
        (name, value) for name, value in foreign_state(network).items()
        if not any(part in name for part in left_out) and ("seg_layers" in name or not name.endswith("bias"))
    )
    save_fold(folder, "2d", 0, network_weights=state)
    imported = open_model(import_nnunet(folder, tmp_path / "model.autoseg"), Options(device="cpu", precision="fp32"))
    tile = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(imported.members[0].networks[0](tile)[0], network(tile)[0])


def test_regions_and_post_processing_are_imported(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    folder = model_folder(tmp_path, "2d", {"2d": entry(2)}, labels, regions_class_order=[1, 2])
    for fold in (0, 1):
        save_fold(folder, "2d", fold, outputs=2)
    results = folder / "crossval_results_folds_0_1"
    results.mkdir()
    steps = {"postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"] * 2, "postprocessing_kwargs": [
        {"labels_or_regions": [[1, 2], 2], "background_label": 0}, {"labels_or_regions": 2, "background_label": 0}]}
    (results / "postprocessing.json").write_text(json.dumps(steps))
    record = open_model_file(import_nnunet(folder, tmp_path / "model.autoseg")).record
    assert [step.options["labels"] for step in record.postprocessing] == [[1, 2], [2]]
    assert {step.kind for step in record.postprocessing} == {"largest_component"}
    assert not open_model_file(import_nnunet(folder, tmp_path / "plain.autoseg", postprocessing=False)).record.postprocessing
    assert not open_model_file(import_nnunet(folder, tmp_path / "one.autoseg", folds=[1])).record.postprocessing  # of other folds
    (results / "postprocessing.json").write_text(json.dumps({**steps, "postprocessing_fns": ["os.system", "x"]}))
    with pytest.raises(PlanError, match=r"postprocessing\.json: can be imported: remove_all.*found 'os\.system'"):
        import_nnunet(folder, tmp_path / "bad.autoseg")


def test_a_pickle_of_post_processing_is_not_opened_and_that_is_said(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "2d", {"2d": entry(2)})
    save_fold(folder, "2d", 0)
    (folder / "postprocessing.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    told = Told()
    import_nnunet(folder, tmp_path / "model.autoseg", reporter=told)
    assert any("postprocessing.pkl is not read" in line for line in told.lines) and not Path("ran").exists()


def test_a_cascade_is_imported_with_its_first_stage_beside_it(tmp_path: Path) -> None:
    configurations = {
        "3d_lowres": entry(3, next_stage="3d_cascade_fullres", spacing=[2.0, 2.0, 2.0]),
        "3d_cascade_fullres": entry(3, previous_stage="3d_lowres"),
    }
    folder = model_folder(tmp_path, "3d_cascade_fullres", configurations)
    save_fold(folder, "3d_cascade_fullres", 0, inputs=3)
    with pytest.raises(RunError, match=r"starts from the segmentation of 3d_lowres; expected that model's .*__3d_lowres"):
        import_nnunet(folder, tmp_path / "model.autoseg")
    first = model_folder(tmp_path, "3d_lowres", configurations)
    save_fold(first, "3d_lowres", 0)
    record = open_model_file(import_nnunet(folder, tmp_path / "model.autoseg")).record
    assert record.networks["3d_cascade_fullres"].previous == "3d_lowres"
    assert [member.run for member in record.members] == ["3d_cascade_fullres"]
    model = open_model(tmp_path / "model.autoseg", Options(device="cpu", precision="fp32"))
    assert model.predict(image()).shape == (14, 12, 16)
    elsewhere = first.rename(tmp_path / "elsewhere")
    import_nnunet(folder, tmp_path / "given.autoseg", previous=elsewhere)
    with pytest.raises(RunError, match="has no previous stage; leave out"):
        import_nnunet(elsewhere, tmp_path / "low.autoseg", previous=folder)
    with pytest.raises(RunError, match="the previous stage of 3d_cascade_fullres is 3d_lowres"):
        other = model_folder(tmp_path / "other", "2d", {"2d": entry(2)})
        save_fold(other, "2d", 0)
        import_nnunet(folder, tmp_path / "x.autoseg", previous=other)


def test_folds_and_kinds_of_checkpoints_are_chosen(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "2d", {"2d": entry(2)})
    save_fold(folder, "2d", "all")
    out = import_nnunet(folder, tmp_path / "all.autoseg")
    assert open_model_file(out).record.networks["2d"].folds == (0,) and "all" in open_model_file(out).record.notes[0]
    save_fold(folder, "2d", 2, kind="best")
    save_fold(folder, "2d", 4)
    assert open_model_file(import_nnunet(folder, tmp_path / "4.autoseg")).record.networks["2d"].folds == (4,)
    best = import_nnunet(folder, tmp_path / "best.autoseg", checkpoint="best")
    assert open_model_file(best).record.networks["2d"].folds == (2,)
    with pytest.raises(RunError, match=r"no checkpoint_final\.pth of fold\(s\) 1, 2; checkpoints there: fold_2/check"):
        import_nnunet(folder, tmp_path / "none.autoseg", folds=[1, 2, 4])


def test_importing_twice_changes_nothing_and_another_file_is_not_replaced(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "2d", {"2d": entry(2)})
    save_fold(folder, "2d", 0)
    out = import_nnunet(folder, tmp_path / "model.autoseg")
    before = out.stat().st_mtime_ns
    assert import_nnunet(folder, out) == out and out.stat().st_mtime_ns == before
    save_fold(folder, "2d", 1)
    with pytest.raises(RunError, match="exists and is not this model"):
        import_nnunet(folder, out)
    import_nnunet(folder, out, overwrite=True)


class Command:
    """Pickles as a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_folder_with_a_hostile_checkpoint_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "2d", {"2d": entry(2)})
    save_fold(folder, "2d", 0)
    save_fold(folder, "2d", 1, logging=[Command(tmp_path / "ran")])
    with pytest.raises(RecordError, match=r"fold_1/checkpoint_final\.pth is refused, and .* it refers to [a-z]+\.system"):
        import_nnunet(folder, tmp_path / "model.autoseg")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "model.autoseg").exists()


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"network_weights": {}}, RecordError, "expected network_weights, found"),
    ({"network_weights": {"a": 1}}, RecordError, r"network_weights\.a is not a tensor"),
    ({"init_args": {}}, RecordError, "init_args name no configuration"),
    ({"init_args": {"configuration": "2d_own"}}, PlanError, "expected the configuration '2d_own', found 2d"),
    ({"inference_allowed_mirroring_axes": (0, 7)}, PlanError, "mirror_axes must be some of the patch's axes 0, 1"),
    ({"inference_allowed_mirroring_axes": "01"}, RecordError, "expected a tuple of whole numbers"),
])
def test_checkpoints_that_are_no_models_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = model_folder(tmp_path, "2d", {"2d": entry(2)})
    save_fold(folder, "2d", 0, **changes)
    with pytest.raises(error, match=message):
        import_nnunet(folder, tmp_path / "model.autoseg")


def test_networks_that_a_trainer_altered_are_refused_by_name(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "2d", {"2d": entry(2)})
    state = foreign_state(save_fold(folder, "2d", 0))
    norm, bias, head = "encoder.stages.0.0.convs.0.norm.running_mean", "decoder.transpconvs.0.bias", "decoder.seg_layers.0.bias"
    cases: tuple[tuple[dict[str, torch.Tensor], str], ...] = (
        ({**state, norm: torch.zeros(4)}, f"its network has {norm}, which the network that"),
        ({name: value for name, value in state.items() if "seg_layers" not in name}, f"its network lacks {head}"),
        ({name: value for name, value in state.items() if name != bias}, f"its network lacks {bias}"),
        ({**state, head: torch.zeros(9)}, r"seg_layers\.0\.bias has shape \(9,\), in the network .* \(3,\)"),
    )
    for changed, message in cases:
        save_fold(folder, "2d", 0, network_weights=OrderedDict(changed))
        with pytest.raises(PlanError, match=message):
            import_nnunet(folder, tmp_path / "model.autoseg")


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "2d", {"2d": entry(2)})
    state = foreign_state(save_fold(folder, "2d", 0))
    broken = OrderedDict((name, value * float("nan")) for name, value in state.items())
    save_fold(folder, "2d", 0, network_weights=broken)
    with pytest.raises(RunError, match="NaN or infinite; its training failed, leave this fold out"):
        import_nnunet(folder, tmp_path / "model.autoseg")


def test_folds_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "2d", {"2d": entry(2)})
    save_fold(folder, "2d", 0, axes=(0, 1))
    save_fold(folder, "2d", 1, axes=None)
    with pytest.raises(RunError, match="were trained with different settings"):
        import_nnunet(folder, tmp_path / "model.autoseg")
