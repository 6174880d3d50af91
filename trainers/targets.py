"""What outputs are held against: label maps as softmax classes or regions, and the sums that losses are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from autoseg.contracts import Batch
from autoseg.types.labels import Labels


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

    def known(self, label: torch.Tensor) -> torch.Tensor:
        """The label map with ignored voxels as background."""
        return label if self.ignore_index is None else torch.where(label == self.ignore_index, 0, label)

    def dense(self, label: torch.Tensor) -> torch.Tensor:
        """(batch, *size) indices -> (batch, classes, *size) float32 in {0, 1}; ignored voxels count as background."""
        label = self.known(label)
        if self.regions:
            table = torch.zeros(len(self.regions), self.labels + 1, device=label.device)
            for row, region in enumerate(self.regions):
                table[row, list(region)] = 1
            return table[:, label].movedim(0, 1)
        classes = torch.arange(self.classes, device=label.device).view(1, -1, *[1] * (label.ndim - 1))
        return (label[:, None] == classes).float()


def with_labelled(batch: Batch, labelled: Mapping[str, tuple[int, ...]], targets: int) -> Batch:
    """The batch with its mask of annotated targets, from the indices of those that each partly annotated case has.

    A batch of completely annotated cases stays as it is.
    """
    if not any(case in labelled for case in batch.cases):
        return batch
    rows = [[target in labelled.get(case, range(targets)) for target in range(targets)] for case in batch.cases]
    return replace(batch, labelled=torch.tensor(rows).to(batch.label.device, non_blocking=True))


def strided(label: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Nearest-exact down-sampling by whole strides: index i takes voxel floor((i + 1/2) stride); a view, not a copy."""
    for axis, wanted in enumerate(size, start=1):
        stride = label.shape[axis] // wanted
        if stride > 1:
            index = [slice(None)] * label.ndim
            index[axis] = slice(stride // 2, None, stride)
            label = label[tuple(index)]
    return label


def count_overlap(
    logits: torch.Tensor, label: torch.Tensor, targets: Targets, labelled: torch.Tensor | None = None
) -> torch.Tensor:
    """Voxels in both, found, and true, of each target: (3, targets) float64 on the CPU; where it is not annotated nothing counts.

    logits (batch, classes, *size), label (batch, *size), labelled (batch, targets) bool or None.
    """
    valid = targets.valid(label)
    keep = torch.ones_like(label, dtype=torch.bool) if valid is None else valid
    if targets.regions:
        found, true, keep = logits > 0, targets.dense(label) > 0, keep[:, None]
        counts = torch.stack([(masks & keep).flatten(2).sum(2) for masks in (found & true, found, true)])
    else:
        found, classes = logits.argmax(1), targets.classes
        sample = torch.arange(len(label), device=label.device).view(-1, *[1] * (label.ndim - 1)) * classes
        pairs = ((sample + found)[keep & (found == label)], (sample + found)[keep], (sample + label)[keep])
        counts = torch.stack([torch.bincount(one, minlength=len(label) * classes) for one in pairs])
        counts = counts.view(3, len(label), classes)[:, :, 1:]
    if labelled is not None:
        counts = counts * labelled
    return counts.sum(1).cpu().double()


class Head:
    """One output and what it is held against; everything that several terms of a loss need is computed once, in float32.

    logits: (batch, classes, *size), any floating type. label: (batch, *size) int64. labelled: (batch, targets) bool, or None when
    every target is annotated in every sample. A softmax class that is not annotated in a sample is merged with its background:
    their probabilities are added, and the label map knows background only (Shi et al. 2021, marginal loss). A region that is not
    annotated in a sample is left out of all sums and means.
    """

    def __init__(
        self, logits: torch.Tensor, label: torch.Tensor, targets: Targets, batch_dice: bool,
        labelled: torch.Tensor | None = None, finest: bool = True,
    ) -> None:
        self.targets, self.batch_dice, self.labelled, self.finest = targets, batch_dice, labelled, finest
        self.valid = targets.valid(label)
        self.label = targets.known(label)
        self.logits = logits
        if labelled is not None and not targets.regions:
            self.logits, self.label = merge(logits.float(), self.label, labelled)

    @cached_property
    def keep(self) -> torch.Tensor | None:
        """Mask of what counts, shaped like or broadcast to `log_likelihood`; None when everything does."""
        if not self.targets.regions:
            return self.valid
        mask = None if self.valid is None else self.valid[:, None]
        if self.labelled is None:
            return mask
        columns = _column(self.labelled, self.logits)
        return columns if mask is None else mask & columns

    @cached_property
    def dense(self) -> torch.Tensor:
        """(batch, targets, *size) float32 in {0, 1}: foreground classes or regions."""
        return self.targets.dense(self.label)[:, 0 if self.targets.regions else 1 :]

    @cached_property
    def probabilities(self) -> torch.Tensor:
        """(batch, targets, *size) float32: of foreground classes or regions."""
        logits = self.logits.float()
        return logits.sigmoid() if self.targets.regions else logits.softmax(1)[:, 1:]

    @property
    def log_likelihood(self) -> torch.Tensor:
        """Log probability of what is true: (batch, *size), for regions (batch, regions, *size)."""
        return self._statistics[0]

    @cached_property
    def foreground(self) -> torch.Tensor:
        """Whether foreground is true, shaped like `log_likelihood`, float32."""
        return self.dense if self.targets.regions else (self.label > 0).float()

    @cached_property
    def overlap(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums of p t, p and t of each target over what counts: (batch, targets), with batch Dice (1, targets)."""
        _, both, predicted = self._statistics
        true = self._true
        if self.labelled is not None:
            both, predicted, true = (torch.where(self.labelled, sums, 0) for sums in (both, predicted, true))
        if self.batch_dice:
            return both.sum(0, keepdim=True), predicted.sum(0, keepdim=True), true.sum(0, keepdim=True)
        return both, predicted, true

    @cached_property
    def _true(self) -> torch.Tensor:
        if self.targets.regions:
            return _kept(self.dense, self.keep).flatten(2).sum(2)
        ones = torch.ones((), device=self.label.device).expand(self.label.shape) if self.valid is None else self.valid.float()
        return label_sums(self.label, ones, self.targets.classes)[:, 1:]

    @cached_property
    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.targets.regions:
            likelihood, both, predicted = _SoftmaxSums.apply(self.logits, self.label, self.valid)  # type: ignore[no-untyped-call]
            return likelihood, both[:, 1:], predicted[:, 1:]
        p = _kept(self.probabilities, self.keep)
        likelihood = logsigmoid(self.logits.float() * (2 * self.dense - 1))
        return likelihood, (p * self.dense).flatten(2).sum(2), p.flatten(2).sum(2)

    def mean_of_targets(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of (batch, targets), with batch Dice (1, targets), over the targets that are annotated; 0 where none is."""
        if self.labelled is None:
            return values.mean()
        counted = self.labelled.any(0, keepdim=True) if self.batch_dice else self.labelled
        return torch.where(counted, values, 0).sum() / counted.sum().clamp_min(1)

    def mean_of_voxels(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of what is shaped like `log_likelihood` over what counts; 0 where nothing does."""
        if self.keep is None:
            return values.mean()
        return _kept(values, self.keep).sum() / self.keep.expand(values.shape).sum().clamp_min(1)


def merge(logits: torch.Tensor, label: torch.Tensor, labelled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels in which each sample's not annotated classes have become part of its background.

    The background's logit becomes the log of the sum of exponentials over background and those classes, theirs minus infinity.
    """
    hidden = torch.cat([torch.zeros_like(labelled[:, :1]), ~labelled], 1)
    outside = torch.cat([torch.ones_like(labelled[:, :1]), ~labelled], 1)
    background = torch.where(_column(outside, logits), logits, -torch.inf).logsumexp(1, keepdim=True)
    others = torch.where(_column(hidden, logits), -torch.inf, logits)[:, 1:]
    unseen = hidden.gather(1, label.flatten(1)).view(label.shape)
    return torch.cat([background, others], 1), torch.where(unseen, 0, label)


def label_sums(label: torch.Tensor, values: torch.Tensor, classes: int) -> torch.Tensor:
    """Sums of float32 `values` (batch, *size) by label: (batch, classes); row by row, so that no sum becomes long."""
    rows = values.new_zeros(*label.shape[:-1], classes).scatter_add_(-1, label, values)
    return rows.flatten(1, -2).sum(1)


class _SoftmaxSums(torch.autograd.Function):
    """All that Dice and cross-entropy need of a softmax, with one tensor of the logits' size kept for the way back.

    Forward: the log probability of the true class at each voxel (batch, *size), and over the voxels that count the sums of
    p t and of p for each class, (batch, classes). Backward: for L with dL/dlog p_y = u, dL/dboth_c = b_c, dL/dpredicted_c = a_c,
    dL/dz_c = p_c (a_c - sum_k a_k p_k - b_y p_y - u) + [c = y] (b_y p_y + u), where a and b are 0 at voxels that do not count.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, label: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        p = torch.log_softmax(logits, 1, dtype=torch.float32)
        likelihood = p.gather(1, label[:, None])[:, 0]
        p.exp_()
        picked = likelihood.exp()
        if valid is None:
            predicted = p.flatten(2).sum(2)
        else:
            picked = picked * valid
            predicted = torch.bmm(p.flatten(2), valid.flatten(1)[:, :, None].float())[:, :, 0]
        ctx.save_for_backward(p, picked, label, valid)
        ctx.dtype = logits.dtype
        ctx.set_materialize_grads(False)
        return likelihood, label_sums(label, picked, p.shape[1]), predicted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator has no types)
        ctx: Any, *grad_outputs: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None]:
        likelihood, both, predicted = grad_outputs
        p, picked, label, valid = ctx.saved_tensors
        at_truth = torch.zeros_like(picked) if likelihood is None else likelihood
        if both is not None:
            at_truth = torch.addcmul(at_truth, both.gather(1, label.flatten(1)).view(label.shape), picked)
        if predicted is None:
            gradient = p * -at_truth[:, None]
        else:
            everywhere = torch.bmm(predicted[:, None], p.flatten(2)).view(at_truth.shape)
            slopes = _column(predicted, p)
            if valid is not None:
                everywhere, slopes = everywhere * valid, slopes * valid[:, None]
            gradient = (slopes - (everywhere + at_truth)[:, None]).mul_(p)
        gradient.scatter_add_(1, label[:, None], at_truth[:, None])
        return gradient.to(ctx.dtype), None, None


def _column(table: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(batch, classes) as it broadcasts over (batch, classes, *size)."""
    return table.view(*table.shape, *[1] * (like.ndim - 2))


def _kept(values: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return values if keep is None else values * keep
