"""Fine-tuning: the weights of a trained network made to fit another one's channels and labels, with a report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from autoseg.networks.describe import Description
from autoseg.types.initial import Taken
from autoseg.types.labels import Labels

Tensors = Mapping[str, torch.Tensor]
UNNAMED = re.compile(r"(channel|image)?[ _-]?\d*", re.IGNORECASE)  # what channels are called whose kind nobody told


@dataclass(frozen=True)
class Ends:
    """What the first and the last layers of a network stand for.

    With `previous` there is one more input channel for each foreground label, the previous stage's segmentation of it.
    """

    channels: tuple[str, ...]
    labels: Labels
    previous: bool = False

    @property
    def previous_names(self) -> tuple[str, ...]:
        """Labels whose segmentation is part of the input."""
        return tuple(label.name for label in self.labels.foreground) if self.previous else ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the output channels are: regions, or the background and the foreground labels."""
        names = [name for name, _ in self.labels.targets]
        return tuple(names) if self.labels.regions else (self.labels.background.name, *names)


@dataclass(frozen=True)
class Adapted:
    """The new network's weights by name, what became of every part, and how many numbers were kept, adapted and are new."""

    tensors: dict[str, torch.Tensor]
    parts: tuple[Taken, ...]
    kept: int
    adapted: int
    new: int


@dataclass(frozen=True)
class _Channel:
    """How one output or input channel is made of the model's: of number `source`, or in another way."""

    taken: Taken
    source: int | None = None


def adapt(weights: Tensors, model: Ends, fresh: Tensors, own: Ends, description: Description) -> Adapted:
    """Weights for the network of `description` (its random ones are `fresh`) from a trained one of the same topology.

    Convolutions that read the image keep the kernels of channels of the same name; where a name is missing and the number of
    channels is the same, position counts. A channel without counterpart gets the sum of the model's kernels divided by the number
    of own channels: were all channels new and showed the same image, the answer would be the model's. Previous segmentations go
    by label, and one without counterpart begins at zero. Heads go by name of label or region; new ones are random, others are
    left out. A region takes a label's logit against the background's, and a label a region's against a background of zero, which
    for a single label means the same probability.

    Raises:
        ValueError: a tensor is missing, or has another shape though the topology is the same.
    """
    readers = {f"units.{node.name}.conv.weight" for node in description.nodes if node.op == "conv" and "input" in node.inputs}
    heads = {f"units.{name}.{kind}" for name in description.heads for kind in ("weight", "bias")}
    inputs, outputs = _inputs(model, own), _outputs(model, own)
    tensors: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(("kept", "adapted", "new"), 0)
    for name, random in fresh.items():
        if name not in weights:
            raise ValueError(f"the model has no {name}")
        old = weights[name].to(random)
        if name in readers:
            made, states = _read(old, inputs, len(model.channels), len(own.channels)), [one.taken.state for one in inputs]
        elif name in heads:
            made, states = _head(old, random, outputs, model, own), [one.taken.state for one in outputs]
        else:
            made, states = old, ["kept"]
        if made.shape != random.shape:
            raise ValueError(f"{name} has shape {tuple(made.shape)}, expected {tuple(random.shape)}")
        for state in states:
            counts[state] += made.numel() // len(states)
        tensors[name] = made.clone(memory_format=torch.contiguous_format)
    left = [*_left_out("channel", model.channels, inputs[: len(own.channels)]),
            *_left_out("previous segmentation of", model.previous_names, inputs[len(own.channels) :], len(model.channels)),
            *_left_out("output", model.outputs, outputs)]
    parts = (*(one.taken for one in inputs), *(one.taken for one in outputs), *left)
    return Adapted(tensors, parts, counts["kept"], counts["adapted"], counts["new"])


def _inputs(model: Ends, own: Ends) -> list[_Channel]:
    """Where each input channel comes from: the image's, then those of the previous stage."""
    names = _match(own.channels, [None if UNNAMED.fullmatch(name) else name for name in model.channels])
    made = []
    for index, name in enumerate(own.channels):
        source, how, part = names[index], "", f"channel {name}"
        if source is None and len(own.channels) == len(model.channels) and index not in names:
            other = model.channels[index]
            if UNNAMED.fullmatch(name) or UNNAMED.fullmatch(other):
                source, how = index, "" if name == other else f"by position: the model's {other}"
        if source is not None:
            made.append(_Channel(Taken(part=part, state="kept", how=how), source))
        else:
            how = f"sum of the model's kernels ({', '.join(model.channels)}) / {len(own.channels)}"
            made.append(_Channel(Taken(part=part, state="adapted", how=how)))
    for name, found in zip(own.previous_names, _match(own.previous_names, model.previous_names), strict=True):
        part = f"previous segmentation of {name}"
        if found is not None:
            made.append(_Channel(Taken(part=part, state="kept"), len(model.channels) + found))
        else:
            made.append(_Channel(Taken(part=part, state="new", how="begins at zero")))
    return made


def _outputs(model: Ends, own: Ends) -> list[_Channel]:
    """Where each channel of the heads comes from."""
    found = _match(own.outputs, model.outputs)
    from_labels, to_labels = not model.labels.regions, not own.labels.regions
    if from_labels:
        if to_labels:
            found[0] = 0  # the background, whatever it is called
        else:
            found = [None if source == 0 else source for source in found]
    matched = any(source is not None for source in found)
    made = []
    for index, (name, source) in enumerate(zip(own.outputs, found, strict=True)):
        part = f"output {name}"
        if source is not None and from_labels == to_labels:
            made.append(_Channel(Taken(part=part, state="kept"), source))
        elif source is not None:
            how = "the label's logit less the background's" if from_labels else "the region's logit"
            made.append(_Channel(Taken(part=part, state="adapted", how=how), source))
        elif matched and to_labels and not from_labels and index == 0:
            made.append(_Channel(Taken(part=part, state="adapted", how="zero, beside the regions' logits")))
        else:
            made.append(_Channel(Taken(part=part, state="new", how="random")))
    return made


def _match(own: Sequence[str], model: Sequence[str | None]) -> list[int | None]:
    """For every own name the model's first of the same name that is not taken yet; case does not count."""
    left = {index: name.strip().casefold() for index, name in enumerate(model) if name is not None}
    found: list[int | None] = []
    for name in own:
        source = next((index for index, other in left.items() if other == name.strip().casefold()), None)
        left.pop(-1 if source is None else source, None)
        found.append(source)
    return found


def _left_out(kind: str, names: Sequence[str], made: Sequence[_Channel], begin: int = 0) -> list[Taken]:
    """What the model has and nothing comes from."""
    used = {one.source for one in made}
    adapted = kind == "channel" and any(one.source is None for one in made)  # such a one is made of all of the model's
    return [
        Taken(part=f"{kind} {name}", state="left out", how="but for its part in adapted channels" if adapted else "")
        for index, name in enumerate(names) if begin + index not in used
    ]


def _read(old: torch.Tensor, inputs: Sequence[_Channel], model_channels: int, own_channels: int) -> torch.Tensor:
    """(features, model's inputs, *kernel) -> (features, own inputs, *kernel)."""
    shared = old[:, :model_channels].sum(1) / own_channels
    kernels = []
    for one in inputs:
        if one.source is not None:
            kernels.append(old[:, one.source])
        else:
            kernels.append(shared if one.taken.state == "adapted" else torch.zeros_like(shared))
    return torch.stack(kernels, 1)


def _head(old: torch.Tensor, random: torch.Tensor, outputs: Sequence[_Channel], model: Ends, own: Ends) -> torch.Tensor:
    """Rows of a head's weight or bias: (model's outputs, ...) -> (own outputs, ...)."""
    against_background = bool(own.labels.regions) and not model.labels.regions
    rows = []
    for index, one in enumerate(outputs):
        if one.source is not None:
            rows.append(old[one.source] - old[0] if against_background else old[one.source])
        else:
            rows.append(random[index] if one.taken.state == "new" else torch.zeros_like(random[index]))
    return torch.stack(rows)
