"""nnU-Net's plans.json and dataset.json as a plan; what a network of ours cannot do is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg.datasets.description import channel_names, load_json, parse_labels
from autoseg.errors import DatasetError, PlanError, RecordError
from autoseg.files.workspace import validate
from autoseg.types.labels import Labels
from autoseg.types.plan import Plan

READERS = {
    "SimpleITKIO": "as_stored", "NibabelIO": "as_stored", "NaturalImage2DIO": "as_stored", "Tiff3DIO": "as_stored",
    "NibabelIOWithReorient": "RAS", "SimpleITKIOWithReorient": "RAS",
}
NETWORKS = {"PlainConvUNet": "unet", "ResidualEncoderUNet": "residual-unet"}
BLOCKS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
RESAMPLING = {"resample_data_or_seg_to_shape": "cubic", "resample_torch_fornnunet": "linear", "no_resampling_hack": "none"}
SETTINGS: dict[str, dict[str, Any]] = {  # of resampling, as nnU-Net's planners write them; an order counts for images only
    "cubic": {"is_seg": False, "order_z": 0, "force_separate_z": None, "separate_z_anisotropy_threshold": 3},
    "linear": {"is_seg": False, "force_separate_z": None, "separate_z_anisotropy_threshold": 3, "mode": "linear",
               "aniso_axis_mode": "nearest-exact"},
    "none": {},
}
ORDERS = {"data": 3, "probabilities": 1}
IGNORED = ("num_threads", "device", "memefficient_seg_resampling")  # settings that do not change images
GPU_MEMORY_GB = 8.0  # nnU-Net's default target; its plans do not say
LEGACY = {  # keys of plans before nnU-Net 2.4, by what they are called since
    "kernel_sizes": "conv_kernel_sizes", "strides": "pool_op_kernel_sizes",
    "n_conv_per_stage_decoder": "n_conv_per_stage_decoder",
}


@dataclass(frozen=True)
class Source:
    """plans.json and dataset.json of a trained model, with the folder that they lie in."""

    folder: Path
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]

    @property
    def plans_path(self) -> Path:
        """plans.json, for messages."""
        return self.folder / "plans.json"

    def configuration(self, name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
        """A configuration with what it inherits. Raises PlanError."""
        given = self.plans.get("configurations")
        entry = given.get(name) if isinstance(given, Mapping) else None
        if not isinstance(entry, Mapping) or name in seen:
            raise PlanError(f"{self.plans_path}: expected the configuration {name!r}, found {_names(given)}")
        parent = entry.get("inherits_from")
        return dict(entry) if parent is None else {**self.configuration(str(parent), (*seen, name)), **entry}


def read_source(folder: Path) -> Source:
    """Read plans.json and dataset.json. Raises PlanError or DatasetError."""
    found = []
    for name in ("plans.json", "dataset.json"):
        data = load_json(folder / name)
        if not isinstance(data, Mapping):
            raise PlanError(f"{folder / name}: expected an object, found {type(data).__name__}")
        found.append(data)
    return Source(folder, found[0], found[1])


def make_plan(source: Source, mirror_axes: Mapping[str, Sequence[int]]) -> Plan:
    """The plan of some configurations, each with the patch axes that it may be mirrored along.

    Raises:
        PlanError: something in plans.json that cannot be done; DatasetError: dataset.json is inconsistent.
    """
    labels, channels = _described(source)
    plans = source.plans
    reader = str(plans.get("image_reader_writer", "SimpleITKIO"))
    _require(source, "image_reader_writer", reader, READERS)
    _require(source, "label_manager", str(plans.get("label_manager", "LabelManager")), ("LabelManager",))
    made: dict[str, Any] = {}
    resampling = {_resampling(source, f"configurations.{name}", source.configuration(name)) for name in mirror_axes}
    if len(resampling) > 1:
        raise PlanError(f"{source.plans_path}: {' and '.join(mirror_axes)} are resampled differently, which cannot be imported")
    for name, axes in mirror_axes.items():
        configuration = _configuration(source, name)
        links = {key: source.configuration(name).get(key) for key in ("previous_stage", "next_stage")}
        made[name] = {
            **configuration, "mirror_axes": list(axes),
            **{key: link for key, link in links.items() if isinstance(link, str) and link in mirror_axes},
        }
    data = {
        "dataset_name": str(plans.get("dataset_name", source.folder.parent.name)),
        "planner": f"nnU-Net {plans.get('experiment_planner_used', 'planner')}", "gpu_memory_gb": GPU_MEMORY_GB,
        "orientation": READERS[reader], "transpose_forward": plans.get("transpose_forward"), "channels": channels,
        "labels": labels, "intensities": _intensities(source, len(channels)), "configurations": made,
        "resampling": resampling.pop(), "arithmetic": "nnunet",
        "notes": (f"imported from {plans.get('plans_name', 'plans')} of nnU-Net",), "precision": "fp32",
    }
    try:
        return validate(data, Plan, str(source.plans_path))
    except RecordError as error:
        raise PlanError(str(error)) from None


def _described(source: Source) -> tuple[Labels, tuple[str, ...]]:
    """Labels and channels of dataset.json."""
    path, data = source.folder / "dataset.json", source.dataset
    try:
        labels = parse_labels(data.get("labels"), data.get("regions_class_order"))
        channels = channel_names(data.get("channel_names", data.get("modality")))
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from None
    values = [labels.background.value, *(label.value for label in labels.foreground)]
    if values != list(range(len(values))) and not labels.regions:
        raise DatasetError(f"{path}: labels: expected the values 0 to {len(values) - 1}, which are what nnU-Net's networks "
                           f"predict, found {values}")
    return labels, channels


def _configuration(source: Source, name: str) -> dict[str, Any]:
    """A configuration in our words. Raises PlanError."""
    given = source.configuration(name)
    where = f"configurations.{name}"
    _require(source, f"{where}.preprocessor_name", str(given.get("preprocessor_name", "DefaultPreprocessor")),
             ("DefaultPreprocessor",))
    patch = given.get("patch_size")
    if not isinstance(patch, list) or len(patch) not in (2, 3):
        raise PlanError(f"{source.plans_path}: {where}.patch_size: expected 2 or 3 numbers, found {str(patch)[:80]}")
    masks = given.get("use_mask_for_norm")
    shape = given.get("median_image_size_in_voxels") or patch
    return {
        **_network(source, f"{where}.architecture", _architecture(given, len(patch)), len(patch)),
        "patch_size": patch, "batch_size": given.get("batch_size", 2), "spacing": given.get("spacing"),
        "median_shape": shape[-len(patch):], "batch_dice": bool(given.get("batch_dice", False)),
        "normalization": given.get("normalization_schemes"),
        "use_mask_for_norm": list(masks.values()) if isinstance(masks, Mapping) else masks,
    }


def _resampling(source: Source, where: str, given: Mapping[str, Any]) -> str:
    """How images are interpolated; logits always are linearly. Raises PlanError for anything that restoring does not do."""
    kinds = []
    for what, order in ORDERS.items():
        key = f"resampling_fn_{what}"
        function = str(given.get(key, "resample_data_or_seg_to_shape"))
        _require(source, f"{where}.{key}", function, RESAMPLING)
        kind = RESAMPLING[function]
        expected = {**SETTINGS[kind], **({"order": order} if kind == "cubic" else {})}
        settings = given.get(f"{key}_kwargs") or {}
        for name, value in settings.items() if isinstance(settings, Mapping) else ():
            if name not in IGNORED and (name not in expected or value != expected[name]):
                raise PlanError(f"{source.plans_path}: {where}.{key}_kwargs.{name}: only {expected.get(name)} can be imported, "
                                f"found {str(value)[:40]}")
        kinds.append(kind)
    if "none" in kinds and set(kinds) != {"none"}:
        raise PlanError(f"{source.plans_path}: {where}: images and probabilities must both be resampled, or neither of them")
    return kinds[0]


def _architecture(given: Mapping[str, Any], dims: int) -> Mapping[str, Any]:
    """The architecture entry; of plans before nnU-Net 2.4 what their keys come to."""
    found = given.get("architecture")
    if isinstance(found, Mapping):
        return found
    kind = str(given.get("UNet_class_name"))
    blocks = given.get("n_conv_per_stage_encoder") or []
    base, most = given.get("UNet_base_num_features", 32), given.get("unet_max_num_features", 320)
    return {"network_class_name": kind, "arch_kwargs": {
        **{now: given.get(before) for now, before in LEGACY.items()}, BLOCKS.get(kind, "blocks"): blocks,
        "n_stages": len(blocks), "features_per_stage": [min(base * 2**stage, most) for stage in range(len(blocks))],
        "conv_op": f"Conv{dims}d", "conv_bias": True, "norm_op": f"InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": "LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }}


def _network(source: Source, where: str, architecture: Mapping[str, Any], dims: int) -> dict[str, Any]:
    """The network's shape in our words, everything about it checked against what can be built."""
    kind = _last(architecture.get("network_class_name"))
    _require(source, f"{where}.network_class_name", kind, NETWORKS)
    given = architecture.get("arch_kwargs")
    if not isinstance(given, Mapping):
        raise PlanError(f"{source.plans_path}: {where}.arch_kwargs: expected an object, found {type(given).__name__}")
    stages, features = given.get("n_stages"), given.get("features_per_stage")
    if type(stages) is not int or not 2 <= stages <= 16:
        raise PlanError(f"{source.plans_path}: {where}.arch_kwargs.n_stages: expected 2 to 16, found {str(stages)[:40]}")
    features = _per_stage(features, stages)
    first = features[0] if isinstance(features, list) and features else None
    plain: dict[str, tuple[Any, ...]] = {  # what each keyword may be
        "conv_op": (f"Conv{dims}d",), "norm_op": (f"InstanceNorm{dims}d",), "nonlin": ("LeakyReLU",),
        "block": (None, "BasicBlockD"), "nonlin_first": (None, False), "bottleneck_channels": (None,),
        "stem_channels": (None, first), "pool": (None, "conv"), "pool_type": (None, "conv"), "squeeze_excitation": (None, False),
        "stochastic_depth_p": (None, 0), "norm_op_kwargs.eps": (None, 1e-5), "nonlin_kwargs.negative_slope": (None, 0.01),
        "norm_op_kwargs.track_running_stats": (None, False),
    }
    free = {"n_stages", "features_per_stage", "kernel_sizes", "strides", BLOCKS[kind], "n_conv_per_stage_decoder", "conv_bias",
            "dropout_op", "dropout_op_kwargs", "deep_supervision", "norm_op_kwargs", "nonlin_kwargs", "norm_op_kwargs.affine",
            "norm_op_kwargs.momentum", "nonlin_kwargs.inplace"}  # dropout does nothing in prediction
    for name, value in _flat(given):
        shown = _last(value) if isinstance(value, str) else value
        if name not in free and (name not in plain or shown not in plain[name]):
            can = f"only {' or '.join(map(str, plain[name]))} can be imported" if name in plain else "unknown, cannot be imported"
            raise PlanError(f"{source.plans_path}: {where}.arch_kwargs.{name}: {can}, found {str(value)[:80]}")
    missing = [name for name in ("conv_op", "norm_op", "nonlin") if given.get(name) is None]
    if missing:
        raise PlanError(f"{source.plans_path}: {where}.arch_kwargs.{missing[0]} is missing; without it nothing can be imported")
    strides = _rows(given.get("strides"), stages, dims)
    if not isinstance(strides, list) or len(strides) != stages:
        raise PlanError(f"{source.plans_path}: {where}.arch_kwargs.strides: expected {stages} entries, one for each of n_stages, "
                        f"found {str(strides)[:80]}")
    decoder = _per_stage(given.get("n_conv_per_stage_decoder"), stages - 1)
    return {
        "network": {"kind": NETWORKS[kind]}, "features_per_stage": features,
        "strides": strides, "kernel_sizes": _rows(given.get("kernel_sizes"), stages, dims),
        "blocks_per_stage": _per_stage(given.get(BLOCKS[kind]), stages),
        "decoder_blocks_per_stage": decoder[::-1] if isinstance(decoder, list) else decoder,  # theirs begins at the bottom
    }


def _flat(given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keywords with those of norm and nonlinearity named by their path."""
    rows = []
    for name, value in given.items():
        if name in ("norm_op_kwargs", "nonlin_kwargs") and isinstance(value, Mapping):
            rows += [(f"{name}.{key}", item) for key, item in value.items()]
        else:
            rows.append((str(name), value))
    return rows


def _last(name: Any) -> str:
    """The last part of a dotted name."""
    return str(name).rpartition(".")[2]


def _per_stage(value: Any, count: int) -> Any:
    return [value] * count if type(value) is int else value


def _rows(value: Any, stages: int, dims: int) -> Any:
    """A row of `dims` numbers per stage, where one number stands for equal ones."""
    rows = _per_stage(value, stages)
    return [_per_stage(row, dims) for row in rows] if isinstance(rows, list) else rows


def _intensities(source: Source, channels: int) -> list[dict[str, Any]]:
    """Foreground statistics of each channel; a median is not used and may be missing."""
    old, now = "foreground_intensity_properties_by_modality", "foreground_intensity_properties_per_channel"
    given = source.plans.get(now, source.plans.get(old))
    found = [given.get(str(index)) for index in range(channels)] if isinstance(given, Mapping) else []
    rows: list[Mapping[str, Any]] = [row for row in found if isinstance(row, Mapping) and "mean" in row]
    if len(rows) != channels:
        raise PlanError(f"{source.plans_path}: {now}: expected statistics of {channels} channel(s), found {_names(given)}")
    names = ("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5")
    return [{name: row.get(name, row["mean"]) if name == "median" else row.get(name) for name in names} for row in rows]


def _require(source: Source, where: str, found: str, known: Any) -> None:
    if found not in known:
        raise PlanError(f"{source.plans_path}: {where}: can be imported: {', '.join(known)}; found {found[:80]!r}")


def _names(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
