"""nnU-Net's plans, dataset.json and weights in our words, and what cannot be imported by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoseg.arrays.resample import resample_image
from autoseg.arrays.restore import restore_ensemble
from autoseg.arrays.tiles import LogitStream, gather, gaussian_weight, half_weight, make_tiling
from autoseg.errors import AutosegError, DatasetError, PlanError, RunError
from autoseg.networks.describe import describe
from autoseg.networks.limits import tensor_shapes
from autoseg.stages.import_nnunet import import_nnunet
from autoseg.stages.nnunet_plan import Source, make_plan
from autoseg.stages.nnunet_weights import foreign_names
from autoseg.types.case import Placement
from autoseg.types.geometry import AxisMap, Grid
from autoseg.types.plan import Configuration, Plan

NETWORK: dict[str, Any] = {
    "n_stages": 3, "features_per_stage": [4, 8, 16], "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [2, 3, 2], "n_conv_per_stage_decoder": [1, 2], "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
}
CUBIC = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
ENTRY: dict[str, Any] = {
    "data_identifier": "nnUNetPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
    "patch_size": [8, 16, 16], "median_image_size_in_voxels": [20.0, 40.0, 40.0], "spacing": [3.0, 1.0, 1.0],
    "normalization_schemes": ["CTNormalization"],
    "use_mask_for_norm": [False], "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": CUBIC,
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {**CUBIC, "is_seg": True, "order": 1},
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape", "resampling_fn_probabilities_kwargs": {**CUBIC, "order": 1},
    "architecture": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet", "arch_kwargs": NETWORK,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    },
    "batch_dice": True,
}
STATISTICS = {
    "max": 900.0, "mean": 40.0, "median": 35.0, "min": -100.0, "percentile_00_5": -80.0, "percentile_99_5": 200.0, "std": 30.0
}
PLANS: dict[str, Any] = {
    "dataset_name": "Dataset007_Organ", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2], "experiment_planner_used": "ExperimentPlanner",
    "label_manager": "LabelManager", "foreground_intensity_properties_per_channel": {"0": STATISTICS},
    "configurations": {
        "3d_fullres": ENTRY, "wide": {"inherits_from": "3d_fullres", "batch_size": 5},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        "3d_lowres": {**ENTRY, "next_stage": "3d_cascade_fullres", "spacing": [3.0, 2.0, 2.0]},
    },
}
DATASET: dict[str, Any] = {
    "channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1, "tumour": 2}, "file_ending": ".nii.gz"
}


def source(plans: Any = PLANS, dataset: Any = DATASET) -> Source:
    return Source(Path("model"), plans, dataset)


def changed(data: Any, path: str, value: Any) -> Any:
    """A copy in which the entry at a dotted path has another value; without a value it is missing."""
    made = copy.deepcopy(data)
    *parents, last = path.split(".")
    entry = made
    for parent in parents:
        entry = entry[parent]
    if value is KeyError:
        del entry[last]
    else:
        entry[last] = value
    return made


def test_a_plan_says_in_our_words_what_theirs_says() -> None:
    plan = make_plan(source(), {"3d_fullres": (0, 2)})
    found = plan.configurations["3d_fullres"]
    assert plan.orientation == "as_stored" and plan.transpose_forward == (1, 0, 2) and plan.resampling == "cubic"
    assert plan.arithmetic == "nnunet" and plan.dataset_name == "Dataset007_Organ" and plan.channels == ("CT",)
    assert plan.intensities[0].mean == 40 and plan.intensities[0].percentile_99_5 == 200
    assert found.patch_size == (8, 16, 16) and found.spacing == (3, 1, 1) and found.mirror_axes == (0, 2)
    assert found.normalization == ("CTNormalization",) and found.use_mask_for_norm == (False,) and found.batch_dice
    assert found.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2)) and found.kernel_sizes == ((1, 3, 3), (3, 3, 3), (3, 3, 3))
    assert found.blocks_per_stage == (2, 3, 2) and found.network.kind == "unet"
    assert found.decoder_blocks_per_stage == (2, 1)  # theirs is counted from the bottom up
    assert set(plan.configurations) == {"3d_fullres"} and found.next_stage is None


def test_inherited_values_and_links_are_followed() -> None:
    assert make_plan(source(), {"wide": ()}).configurations["wide"].batch_size == 5
    cascade = make_plan(source(), {"3d_cascade_fullres": (0,), "3d_lowres": (1,)})
    assert cascade.configurations["3d_cascade_fullres"].previous_stage == "3d_lowres"
    assert cascade.configurations["3d_lowres"].next_stage == "3d_cascade_fullres"
    assert cascade.configurations["3d_lowres"].mirror_axes == (1,)
    alone = make_plan(source(), {"3d_lowres": (1,)})
    assert alone.configurations["3d_lowres"].next_stage is None


def test_the_residual_encoder_and_single_numbers_are_understood() -> None:
    network = {**NETWORK, "n_blocks_per_stage": [1, 3, 4], "strides": [1, 2, 2], "kernel_sizes": 3, "features_per_stage": 8}
    del network["n_conv_per_stage"]
    architecture = {"network_class_name": "ResidualEncoderUNet", "arch_kwargs": {**network, "stem_channels": None}}
    plans = changed(PLANS, "configurations.3d_fullres.architecture", architecture)
    found = make_plan(source(plans), {"3d_fullres": ()}).configurations["3d_fullres"]
    assert found.network.kind == "residual-unet" and found.blocks_per_stage == (1, 3, 4) and found.features_per_stage == (8, 8, 8)
    assert found.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2)) and found.kernel_sizes == ((3, 3, 3),) * 3


def test_plans_from_before_the_architecture_entry_are_understood() -> None:
    old = {key: value for key, value in ENTRY.items() if key != "architecture"} | {
        "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 32, "unet_max_num_features": 60,
        "n_conv_per_stage_encoder": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2], "num_pool_per_axis": [1, 2, 2],
        "pool_op_kernel_sizes": NETWORK["strides"], "conv_kernel_sizes": NETWORK["kernel_sizes"],
    }
    plans = changed(PLANS, "configurations.3d_fullres", old)
    plans["foreground_intensity_properties_by_modality"] = plans.pop("foreground_intensity_properties_per_channel")
    found = make_plan(source(plans, {**DATASET, "modality": {"0": "CT"}}), {"3d_fullres": ()}).configurations["3d_fullres"]
    assert found.features_per_stage == (32, 60, 60) and found.blocks_per_stage == (2, 2, 2)
    assert found.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2))


@pytest.mark.parametrize(("reader", "orientation"), [
    ("NibabelIO", "as_stored"), ("NaturalImage2DIO", "as_stored"), ("NibabelIOWithReorient", "RAS"),
    ("SimpleITKIOWithReorient", "RAS"),
])
def test_readers_decide_how_images_lie(reader: str, orientation: str) -> None:
    assert make_plan(source(changed(PLANS, "image_reader_writer", reader)), {"3d_fullres": ()}).orientation == orientation


def test_regions_and_the_ignore_label_are_kept() -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    plan = make_plan(source(PLANS, {**DATASET, "labels": labels, "regions_class_order": [1, 2]}), {"3d_fullres": ()})
    assert [region.values for region in plan.labels.regions] == [(1, 2), (2,)] and plan.labels.region_order == (1, 2)
    assert plan.labels.output_count == 2 and plan.labels.ignore is not None


@pytest.mark.parametrize(("function", "kind"), [("resample_torch_fornnunet", "linear"), ("no_resampling_hack", "none")])
def test_other_ways_of_resampling_are_known(function: str, kind: str) -> None:
    plans = copy.deepcopy(PLANS)
    for what in ("data", "probabilities"):
        entry = plans["configurations"]["3d_fullres"]
        entry[f"resampling_fn_{what}"] = function
        settings = {"is_seg": False, "force_separate_z": None, "memefficient_seg_resampling": False}
        entry[f"resampling_fn_{what}_kwargs"] = settings if kind == "linear" else {}
    assert make_plan(source(plans), {"3d_fullres": ()}).resampling == kind


ARCHITECTURE = "configurations.3d_fullres.architecture"


@pytest.mark.parametrize(("path", "value", "message"), [
    (f"{ARCHITECTURE}.network_class_name", "some.where.Primus", r"network_class_name: can be imported: PlainConvUNet.*Primus"),
    (f"{ARCHITECTURE}.network_class_name", "dynamic.ResidualUNet", "found 'ResidualUNet'"),
    (f"{ARCHITECTURE}.arch_kwargs.norm_op", "torch.nn.BatchNorm3d", "norm_op: only InstanceNorm3d can be imported.*BatchNorm3d"),
    (f"{ARCHITECTURE}.arch_kwargs.norm_op", None, "norm_op: only InstanceNorm3d"),
    (f"{ARCHITECTURE}.arch_kwargs.norm_op", KeyError, "norm_op is missing"),
    (f"{ARCHITECTURE}.arch_kwargs.norm_op_kwargs", {"eps": 1e-3}, r"norm_op_kwargs\.eps: only .*1e-05 can be imported, found 0"),
    (f"{ARCHITECTURE}.arch_kwargs.nonlin", "torch.nn.ReLU", "nonlin: only LeakyReLU can be imported, found torch.nn.ReLU"),
    (f"{ARCHITECTURE}.arch_kwargs.nonlin_kwargs", {"negative_slope": 0.2}, r"nonlin_kwargs\.negative_slope"),
    (f"{ARCHITECTURE}.arch_kwargs.nonlin_first", True, "nonlin_first"),
    (f"{ARCHITECTURE}.arch_kwargs.attention", True, "attention: unknown, cannot be imported"),
    (f"{ARCHITECTURE}.arch_kwargs.conv_op", "torch.nn.Conv2d", "conv_op: only Conv3d"),
    (f"{ARCHITECTURE}.arch_kwargs.stem_channels", 99, "stem_channels"),
    (f"{ARCHITECTURE}.arch_kwargs.n_stages", 99, "n_stages: expected 2 to 16, found 99"),
    (f"{ARCHITECTURE}.arch_kwargs.n_stages", 2, r"arch_kwargs\.strides: expected 2 entries, one for each of n_stages"),
    (f"{ARCHITECTURE}.arch_kwargs.features_per_stage", KeyError, "features_per_stage"),
    (f"{ARCHITECTURE}.arch_kwargs", None, "arch_kwargs: expected an object"),
    ("configurations.3d_fullres.normalization_schemes", ["Own"], "unknown normalization 'Own'"),
    ("configurations.3d_fullres.preprocessor_name", "Own", "preprocessor_name: can be imported: Default.*found 'Own'"),
    ("configurations.3d_fullres.resampling_fn_data", "own", "resampling_fn_data: can be imported"),
    ("configurations.3d_fullres.resampling_fn_data_kwargs.order", 1, r"fn_data_kwargs\.order: only 3 can be imported, found 1"),
    ("configurations.3d_fullres.resampling_fn_data_kwargs.force_separate_z", True, "force_separate_z: only None"),
    ("configurations.3d_fullres.resampling_fn_data", "no_resampling_hack", "only None can be imported|both be resampled"),
    ("configurations.3d_fullres.patch_size", [7, 16, 16], r"patch_size\[0\] is 7"),
    ("configurations.3d_fullres.patch_size", 7, "patch_size: expected 2 or 3 numbers"),
    ("configurations.3d_fullres.inherits_from", "3d_fullres", "expected the configuration '3d_fullres'"),
    ("configurations", None, "expected the configuration"),
    ("image_reader_writer", "OwnIO", "image_reader_writer: can be imported: SimpleITKIO.*found 'OwnIO'"),
    ("label_manager", "Own", "label_manager"),
    ("transpose_forward", [0, 0, 1], "transpose_forward must be a permutation"),
    ("foreground_intensity_properties_per_channel", {}, r"expected statistics of 1 channel\(s\)"),
])
def test_what_cannot_be_imported_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as error:
        make_plan(source(changed(PLANS, path, value)), {"3d_fullres": ()})
    assert "plans.json" in str(error.value)


@pytest.mark.parametrize(("labels", "message"), [
    ({"background": 0, "organ": 1, "tumour": 5}, r"expected the values 0 to 2.*found \[0, 1, 5\]"),
    ({"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order"),
    ({}, "foreground"),
])
def test_labels_that_nnunet_cannot_have_trained_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        make_plan(source(PLANS, {**DATASET, "labels": labels}), {"3d_fullres": ()})


def small(kind: str) -> Configuration:
    return Configuration.model_validate({
        "patch_size": [8, 8], "batch_size": 2, "spacing": [1, 1], "median_shape": [8, 8], "network": {"kind": kind},
        "strides": [[1, 1], [2, 2], [1, 2]], "kernel_sizes": [[3, 3]] * 3, "features_per_stage": [4, 8, 8],
        "blocks_per_stage": [1, 2, 1], "decoder_blocks_per_stage": [1, 1], "batch_dice": False,
        "normalization": ["NoNormalization"], "use_mask_for_norm": [False],
    })


def test_weights_of_a_plain_network_have_nnunets_names() -> None:
    """Names written down from a state dict of dynamic_network_architectures' PlainConvUNet."""
    names = foreign_names(describe(small("unet"), 1, 2))
    units = [*(f"encoder.stages.{stage}.0.convs.{block}" for stage, block in ((0, 0), (1, 0), (1, 1), (2, 0))),
             "decoder.stages.0.convs.0", "decoder.stages.1.convs.0"]
    expected = {f"{unit}.{part}.{kind}" for unit in units for part in ("conv", "norm") for kind in ("weight", "bias")}
    expected |= {f"decoder.{unit}.{level}.{kind}" for unit in ("transpconvs", "seg_layers") for level in (0, 1)
                 for kind in ("weight", "bias")}
    assert set(names.values()) == expected and len(names) == len(expected)
    assert names["units.head_0.weight"] == "decoder.seg_layers.1.weight"  # the finest head is their last
    assert names["units.up_1.bias"] == "decoder.transpconvs.0.bias"
    assert names["units.decoder_1_0.norm.bias"] == "decoder.stages.0.convs.0.norm.bias"


def test_weights_of_a_residual_network_have_nnunets_names() -> None:
    """Where a block only strides its skip has no weights; where it only widens, the convolution is number 0 instead of 1."""
    names = foreign_names(describe(small("residual-unet"), 1, 2))
    encoder = {name for name in names.values() if name.startswith("encoder.")}
    units = ["stem.convs.0", *(f"stages.{block}.conv{half}" for block in ("0.blocks.0", "1.blocks.0", "1.blocks.1", "2.blocks.0")
                               for half in (1, 2))]
    expected = {f"encoder.{unit}.{part}.{kind}" for unit in units for part in ("conv", "norm") for kind in ("weight", "bias")}
    expected |= {f"encoder.stages.1.blocks.0.skip.1.{name}" for name in ("conv.weight", "norm.weight", "norm.bias")}
    assert encoder == expected
    wide = small("residual-unet").model_copy(update={"strides": ((1, 1), (1, 1), (2, 2))})
    assert "encoder.stages.1.blocks.0.skip.0.conv.weight" in foreign_names(describe(wide, 1, 2)).values()
    assert set(names) == set(tensor_shapes(describe(small("residual-unet"), 1, 2)))


def test_an_array_is_turned_to_ras_as_nibabel_turns_it() -> None:
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    for axes, signs in (((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1)), ((1, 2, 0), (1, -1, -1))):
        affine = np.eye(4)
        affine[:3, :3] = np.diag(signs)[:, axes] * np.array([1.0, 2.0, 3.0])
        stored_xyz = rng.normal(size=(3, 4, 5))
        expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(stored_xyz, affine)).get_fdata().transpose(2, 1, 0)
        lps = np.diag([-1.0, -1.0, 1.0]) @ (affine[:3, :3] / np.array([1.0, 2.0, 3.0]))
        direction = tuple(tuple(float(v) for v in row) for row in lps[::-1, ::-1])
        grid = Grid.model_validate({"shape": (5, 4, 3), "spacing": (3.0, 2.0, 1.0), "direction": direction})
        np.testing.assert_array_equal(grid.turned("RAS").apply(stored_xyz.transpose(2, 1, 0)), expected)
        assert grid.turned("LPS") == grid.to_lps() and grid.turned("as_stored") == AxisMap((0, 1, 2), (False, False, False))


@pytest.mark.parametrize("spacing", [(1.0, 1.2, 0.7), (4.0, 1.0, 1.0)])
def test_linear_resampling_is_torchs(spacing: tuple[float, float, float]) -> None:
    volume = np.random.default_rng(0).normal(size=(2, 9, 14, 12)).astype(np.float32)
    shape = (7, 20, 9)
    found = resample_image(volume, shape, spacing, (1.0, 1.0, 1.0), linear=True)
    given = torch.from_numpy(volume)[None]
    if spacing[0] > 3:
        given = torch.nn.functional.interpolate(given, (9, *shape[1:]), mode="trilinear")
        expected = torch.nn.functional.interpolate(given, shape, mode="nearest-exact")
    else:
        expected = torch.nn.functional.interpolate(given, shape, mode="trilinear")
    np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-5)


def test_half_precision_is_rounded_after_every_tile() -> None:
    patch, shape = (4, 4, 4), (4, 4, 6)
    tiling = make_tiling(shape, patch)
    tiles = [torch.randn(2, *patch, generator=torch.Generator().manual_seed(i)) for i in range(len(tiling.starts))]
    said = iter(tiles)
    found = gather(LogitStream(torch.zeros(1, *shape), tiling, lambda t: next(said)[None], 1, half=True))
    weight = (10 * gaussian_weight(patch)).half()
    weight[weight == 0] = weight[weight > 0].min()
    total, norm = np.zeros((2, *shape), np.float16), np.zeros(shape, np.float16)
    for (_, _, x), tile in zip(tiling.starts, tiles, strict=True):
        box = (..., slice(x, x + 4))
        total[box] = (total[box].astype(np.float32) + tile.numpy() * weight.float().numpy()).astype(np.float16)
        norm[box] += weight.numpy()
    assert found.dtype == torch.float16
    np.testing.assert_array_equal(found.numpy(), total / norm)
    assert half_weight((64, 64, 64)).min() > 0


def test_logits_that_are_equal_in_half_precision_go_to_the_first_class() -> None:
    grid = Grid(shape=(1, 1, 4), spacing=(1.0, 1.0, 0.5), has_direction=False)
    place = Placement(
        stored=grid, axis_map=AxisMap((0, 1, 2), (False,) * 3), transpose=(0, 1, 2), crop_zyx=((0, 1), (0, 1), (0, 4)),
        cropped_spacing_zyx_mm=grid.spacing, shape=(1, 1, 2), spacing_zyx_mm=(1.0, 1.0, 1.0),
    )
    near = torch.tensor([[1000.0, 1000.0], [999.5, 1000.5]]).reshape(2, 1, 1, 2)  # between: 999.75 and 1000.25, both 1000 to half
    assert restore_ensemble([(near, place)])[0].ravel().tolist() == [0, 0, 1, 1]
    assert restore_ensemble([(near, place)], half=True)[0].ravel().tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("prepare", "message"), [
    (lambda folder: None, "is not the folder of a trained nnU-Net model: it holds no plans.json"),
    (lambda folder: (folder / "inner").mkdir() or (folder / "inner" / "plans.json").write_text("{}"), "did you mean .*inner"),
    (lambda folder: [(folder / name).write_text("{}") for name in ("plans.json", "dataset.json")],
     r"holds no checkpoint_final\.pth of fold\(s\) any; checkpoints there: none"),
])
def test_folders_that_are_no_models_are_refused(tmp_path: Path, prepare: Callable[[Path], object], message: str) -> None:
    prepare(tmp_path)
    with pytest.raises(RunError, match=message):
        import_nnunet(tmp_path, tmp_path / "model.autoseg")


def test_an_imported_plan_survives_a_round_trip() -> None:
    plan = make_plan(source(), {"3d_fullres": (0, 1, 2)})
    assert Plan.model_validate(json.loads(plan.model_dump_json())) == plan
    assert issubclass(PlanError, AutosegError)
