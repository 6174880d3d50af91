"""Losses on labels or regions, with an ignore label, with deep supervision."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from autoseg.contracts import Batch, Loss
from autoseg.errors import PluginError
from autoseg.plugins import resolve
from autoseg.types.labels import Labels
from autoseg.types.run import LossSpec

SMOOTH = 1e-5  # nnU-Net's soft Dice


@dataclass(frozen=True)
class Targets:
    """How inside label indices (0 to `labels`) become targets: softmax classes, or one sigmoid output per region."""

    classes: int
    ignore_index: int | None
    regions: tuple[tuple[int, ...], ...]
    labels: int

    @classmethod
    def of(cls, labels: Labels) -> Targets:
        """Targets of a label record."""
        regions = tuple(indices for _, indices in labels.targets) if labels.regions else ()
        return cls(labels.output_count, labels.ignore_index, regions, len(labels.foreground))

    def valid(self, label: torch.Tensor) -> torch.Tensor | None:
        """Mask of voxels that are annotated, or None when all are."""
        return None if self.ignore_index is None else label != self.ignore_index

    def dense(self, label: torch.Tensor) -> torch.Tensor:
        """(batch, *size) indices -> (batch, classes, *size) float32 in {0, 1}; ignored voxels count as background."""
        if self.ignore_index is not None:
            label = torch.where(label == self.ignore_index, 0, label)
        if self.regions:
            table = torch.zeros(len(self.regions), self.labels + 1, device=label.device)
            for row, region in enumerate(self.regions):
                table[row, list(region)] = 1
            return table[:, label].movedim(0, 1)
        classes = torch.arange(self.classes, device=label.device).view(1, -1, *[1] * (label.ndim - 1))
        return (label[:, None] == classes).float()


def soft_dice(logits: torch.Tensor, label: torch.Tensor, targets: Targets, batch_dice: bool) -> torch.Tensor:
    """Minus the mean soft Dice over classes (background left out for softmax), per sample or over the batch.

    Dice = (2 sum p t + s) / (sum p + sum t + s) with s = 1e-5 (Drozdzal et al. 2016, as in nnU-Net).
    """
    probabilities = logits.sigmoid() if targets.regions else logits.softmax(1)
    dense = targets.dense(label)
    if not targets.regions:
        probabilities, dense = probabilities[:, 1:], dense[:, 1:]
    valid = targets.valid(label)
    if valid is not None:
        mask = valid[:, None].float()
        probabilities, dense = probabilities * mask, dense * mask
    axes = tuple(range(2, logits.ndim)) if not batch_dice else (0, *range(2, logits.ndim))
    both, predicted, true = (probabilities * dense).sum(axes), probabilities.sum(axes), dense.sum(axes)
    return -((2 * both + SMOOTH) / (predicted + true + SMOOTH).clamp_min(1e-8)).mean()


def entropy(logits: torch.Tensor, label: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Cross-entropy (softmax) or binary cross-entropy (regions), mean over annotated voxels; 0 where none is annotated."""
    valid = targets.valid(label)
    if targets.regions:
        loss = binary_cross_entropy_with_logits(logits, targets.dense(label), reduction="none")
        if valid is None:
            return loss.mean()
        return (loss * valid[:, None]).sum() / (valid.sum() * loss.shape[1]).clamp_min(1)
    if valid is None:
        return cross_entropy(logits, label)
    loss = cross_entropy(logits, label, ignore_index=targets.ignore_index or 0, reduction="sum")
    return loss / valid.sum().clamp_min(1)


Term = Callable[[torch.Tensor, torch.Tensor, Targets, bool], torch.Tensor]


def _dice_ce(
    logits: torch.Tensor, label: torch.Tensor, targets: Targets, batch_dice: bool, dice: float = 1.0, ce: float = 1.0
) -> torch.Tensor:
    return dice * soft_dice(logits, label, targets, batch_dice) + ce * entropy(logits, label, targets)


def _ce(logits: torch.Tensor, label: torch.Tensor, targets: Targets, batch_dice: bool) -> torch.Tensor:
    return entropy(logits, label, targets)


TERMS: dict[str, Term] = {"dice_ce": _dice_ce, "dice": soft_dice, "ce": _ce}


@dataclass(frozen=True)
class DeepSupervision:
    """A term at every head, weights 1, 1/2, 1/4, ... normalised to sum 1; the label map is strided, not copied."""

    term: Term
    targets: Targets
    batch_dice: bool

    def __call__(self, outputs: list[torch.Tensor], batch: Batch, progress: float) -> torch.Tensor:
        """Scalar loss of logits at falling resolutions, finest first, against one full-resolution label map."""
        weights = [0.5**level for level in range(len(outputs))]
        total = outputs[0].new_zeros((), dtype=torch.float32)
        for weight, logits in zip(weights, outputs, strict=True):
            label = strided(batch.label, logits.shape[2:])
            total = total + weight / sum(weights) * self.term(logits.float(), label, self.targets, self.batch_dice)
        return total


def strided(label: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Nearest-exact down-sampling by whole strides: index i takes voxel floor((i + 1/2) stride)."""
    for axis, wanted in enumerate(size, start=1):
        stride = label.shape[axis] // wanted
        if stride > 1:
            index = [slice(None)] * label.ndim
            index[axis] = slice(stride // 2, None, stride)
            label = label[tuple(index)]
    return label


def head_count(heads: int, deep_supervision: bool) -> int:
    """How many heads are trained: all but the coarsest, whose weight is zero in the reference, and at least one."""
    return max(1, heads - 1) if deep_supervision else 1


def make_loss(spec: LossSpec, labels: Labels, batch_dice: bool) -> Loss:
    """Build the loss of a run: a built-in term, or a plug-in called as kind(labels=..., batch_dice=..., **options).

    Raises:
        PluginError: unknown kind, or options that a built-in one does not have.
    """
    if spec.kind not in TERMS:
        builtin: dict[str, Callable[..., Loss]] = dict.fromkeys(TERMS, make_loss)  # only their names are needed
        return resolve(spec.kind, builtin, "loss")(labels=labels, batch_dice=batch_dice, **spec.options)
    term = TERMS[spec.kind]
    known = [p.name for p in inspect.signature(term).parameters.values() if p.default is not p.empty]
    wrong = [f"{key}={value!r}" for key, value in spec.options.items() if key not in known or not isinstance(value, int | float)]
    if wrong:
        options = f"these numbers as options: {', '.join(known)}" if known else "no options"
        raise PluginError(f"loss {spec.kind!r} takes {options}; found {', '.join(wrong)}")
    return DeepSupervision(partial(term, **spec.options), Targets.of(labels), batch_dice)
