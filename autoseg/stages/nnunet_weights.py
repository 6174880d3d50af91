"""The weights of nnU-Net's networks under the names of ours (dynamic_network_architectures 0.2 to 0.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoseg.errors import PlanError, RecordError
from autoseg.files.nnunet_checkpoint import Checkpoint, TensorEntry
from autoseg.networks.describe import Description, Node
from autoseg.networks.limits import tensor_shapes

if TYPE_CHECKING:
    import torch

_WRAPPERS = ("module.", "_orig_mod.")  # of data-parallel and compiled networks
SHOWN = 3  # names in a message


def foreign_names(description: Description) -> dict[str, str]:
    """What each weight of a described network is called in nnU-Net's, by our name.

    The encoder's convolutions are numbered within their stage, the decoder's levels from the bottom up.
    """
    levels = len(description.heads)
    names: dict[str, str] = {}
    for node in description.nodes:
        theirs = _foreign_unit(node, levels)
        if not theirs:
            continue
        parts = ("conv", "norm") if node.op == "conv" else ("",)
        for part in parts:
            for kind in ("weight", "bias"):
                ours = ".".join(filter(None, (f"units.{node.name}", part, kind)))
                names[ours] = ".".join(filter(None, (theirs, part, kind)))
    return {name: names[name] for name in tensor_shapes(description)}


def _foreign_unit(node: Node, levels: int) -> str:
    """The module that a node is in nnU-Net's network; empty for nodes without weights."""
    kind, *numbers = node.name.split("_")
    level = levels - 1 - node.stage
    if node.op == "up":
        return f"decoder.transpconvs.{level}"
    if node.op == "head":
        return f"decoder.seg_layers.{level}"
    if node.op != "conv":
        return ""
    if kind == "stem":
        return "encoder.stem.convs.0"
    if kind == "decoder":
        return f"decoder.stages.{level}.convs.{numbers[1]}"
    stage, block = numbers[:2]
    if len(numbers) == 2:
        return f"encoder.stages.{stage}.0.convs.{block}"
    head = f"encoder.stages.{stage}.blocks.{block}"
    if numbers[2] == "skip":  # in their skip the average pooling, where there is one, is number 0
        return f"{head}.skip.{1 if node.inputs[0].endswith('_pool') else 0}"
    return f"{head}.conv{1 if numbers[2] == 'a' else 2}"


def read_weights(checkpoint: Checkpoint, description: Description) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint as float32 tensors under our names.

    Where their network has no bias or no affine normalisation, zeros and ones stand in, which compute the same.

    Raises:
        PlanError: the checkpoint's network is another one than plans.json describes; RecordError: it is damaged.
    """
    import torch

    given = _network_entries(checkpoint)
    names, shapes = foreign_names(description), tensor_shapes(description)
    _require_same(checkpoint.path, given, names)
    entries = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    for name, entry in entries.items():
        if entry.shape != shapes[name]:
            raise PlanError(f"{checkpoint.path}: {names[name]} has shape {entry.shape}, in the network that plans.json describes "
                            f"{shapes[name]}")
    arrays = checkpoint.tensors(entries)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name in arrays:
            weights[name] = torch.from_numpy(arrays[name].astype("float32"))
        else:
            weights[name] = torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    return weights


def _network_entries(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Where the network's tensors lie, without the names that its modules have twice."""
    found = checkpoint.values.get("network_weights")
    if not isinstance(found, Mapping) or not found:
        keys = ", ".join(str(key)[:40] for key in list(checkpoint.values)[:8])
        raise RecordError(f"{checkpoint.path} is not a checkpoint of nnU-Net v2: expected network_weights, found {keys}")
    entries: dict[str, TensorEntry] = {}
    for key, entry in found.items():
        name = str(key)
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        if not isinstance(entry, TensorEntry):
            raise RecordError(f"{checkpoint.path}: network_weights.{name[:80]} is not a tensor")
        if ".all_modules." not in name and not name.startswith("decoder.encoder."):
            entries[name] = entry
    return entries


def _require_same(path: Path, given: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Every weight has its place and every place its weight, biases and affine normalisation apart."""
    surplus = sorted(set(given) - set(names.values()))
    missing = set(names.values()) - set(given)
    for group in _optional(names.values()):
        if group <= missing:  # all or none: conv_bias and affine are said for the network as a whole
            missing -= group
    if surplus:
        raise PlanError(f"{path}: its network has {_some(surplus)}, which the network that plans.json describes has not; "
                        "networks that a trainer alters (other normalisation, attention, transformers) cannot be imported")
    if missing:
        raise PlanError(f"{path}: its network lacks {_some(sorted(missing))} of the network that plans.json describes")


def _optional(names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Biases of convolutions, and weights and biases of normalisation: networks may do without either."""
    norms = {name for name in names if ".norm." in name}
    biases = {name for name in names if name.endswith(".bias") and "seg_layers" not in name}
    return biases - norms, norms


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:80] for name in names[:SHOWN]) + more
