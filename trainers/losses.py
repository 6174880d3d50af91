"""Losses on labels or regions, with an ignore label, partly labelled cases and deep supervision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, ValidationError

from autoseg.contracts import Batch, Loss
from autoseg.errors import PluginError
from autoseg.plugins import resolve
from autoseg.trainers.targets import Head, Targets, strided
from autoseg.types.labels import Labels
from autoseg.types.record import Record
from autoseg.types.run import LossSpec

__all__ = ["TERMS", "DeepSupervision", "Targets", "head_count", "make_loss", "signed_distance"]

SMOOTH = 1e-5  # nnU-Net's soft Dice
_LEAST = 1e-6  # below it a power's slope is not followed: it would become infinite


def soft_dice(head: Head) -> torch.Tensor:
    """Minus the mean soft Dice over targets (background left out for softmax), per sample or over the batch.

    Dice = (2 sum p t + s) / (sum p + sum t + s) with s = 1e-5 (Drozdzal et al. 2016, as in nnU-Net).
    """
    both, predicted, true = head.overlap
    return -head.mean_of_targets((2 * both + SMOOTH) / (predicted + true + SMOOTH).clamp_min(1e-8))


def entropy(head: Head) -> torch.Tensor:
    """Cross-entropy (softmax) or binary cross-entropy (regions), mean over annotated voxels; 0 where none is annotated."""
    return -head.mean_of_voxels(head.log_likelihood)


def focal_entropy(head: Head, gamma: float, alpha: float | None) -> torch.Tensor:
    """Mean of -w (1 - q)^gamma log q, q the probability of what is true (Lin et al. 2017).

    With `alpha` w is alpha for foreground and 1 - alpha for background, else 1.
    """
    likelihood = head.log_likelihood
    values = -((-likelihood.expm1()).clamp_min(_LEAST) ** gamma) * likelihood
    if alpha is not None:
        values = values * (1 - alpha + (2 * alpha - 1) * head.foreground)
    return head.mean_of_voxels(values)


def tversky_index(head: Head, alpha: float, beta: float) -> torch.Tensor:
    """T = (TP + s/2) / (TP + alpha FP + beta FN + s/2) of each target with soft counts (Salehi et al. 2017); s as in Dice."""
    both, predicted, true = head.overlap
    wrong = alpha * (predicted - both) + beta * (true - both)
    return (both + SMOOTH / 2) / (both + wrong + SMOOTH / 2).clamp_min(1e-8)


def worst_entropy(head: Head, k: float) -> torch.Tensor:
    """Cross-entropy, mean over the k % of the batch's annotated voxels in which it is largest (Wu et al. 2016, as in nnU-Net)."""
    values, keep = -head.log_likelihood, head.keep
    values = values.flatten() if keep is None else values[keep.expand(values.shape)]
    if not values.numel():
        return values.sum()
    return values.topk(max(1, int(values.numel() * k / 100)), sorted=False).values.mean()


class Term(Record):
    """A loss at one head; its fields are the options, and it is called with the head and the run's progress from 0 to 1."""

    model_config = ConfigDict(strict=True)

    def __call__(self, head: Head, progress: float) -> torch.Tensor:
        """Scalar loss of one head."""
        raise NotImplementedError


class DiceCE(Term):
    """dice * soft Dice + ce * cross-entropy (Isensee et al. 2021)."""

    dice: float = Field(default=1.0, ge=0)
    ce: float = Field(default=1.0, ge=0)

    def __call__(self, head: Head, progress: float) -> torch.Tensor:
        """Scalar loss of one head."""
        return self.dice * soft_dice(head) + self.ce * entropy(head)


class CE(Term):
    """Cross-entropy, for regions binary cross-entropy: the mean of -log q over annotated voxels."""

    def __call__(self, head: Head, progress: float) -> torch.Tensor:
        """Scalar loss of one head."""
        return entropy(head)


class Dice(Term):
    """Soft Dice alone (Milletari et al. 2016; with plain sums as Drozdzal et al. 2016)."""

    def __call__(self, head: Head, progress: float) -> torch.Tensor:
        """Scalar loss of one head."""
        return soft_dice(head)


class Focal(Term):
    """Focal loss: the mean of -w (1 - q)^gamma log q, w by `alpha` (Lin et al. 2017)."""

    gamma: float = Field(default=2.0, ge=0)
    alpha: float | None = Field(default=None, gt=0, lt=1)

    def __call__(self, head: Head, progress: float) -> torch.Tensor:
        """Scalar loss of one head."""
        return focal_entropy(head, self.gamma, self.alpha)


class DiceFocal(Term):
    """dice * soft Dice + focal * focal loss (Zhu et al. 2019, AnatomyNet)."""

    dice: float = Field(default=1.0, ge=0)
    focal: float = Field(default=1.0, ge=0)
    gamma: float = Field(default=2.0, ge=0)
    alpha: float | None = Field(default=None, gt=0, lt=1)

    def __call__(self, head: Head, progress: float) -> torch.Tensor:
        """Scalar loss of one head."""
        return self.dice * soft_dice(head) + self.focal * focal_entropy(head, self.gamma, self.alpha)


class Tversky(Term):
    """Minus the mean Tversky index + ce * cross-entropy (Salehi et al. 2017).

    `alpha` weighs what is found wrongly, `beta` what is missed: a larger beta finds more. Both 0.5: Dice.
    """

    alpha: float = Field(default=0.3, ge=0)
    beta: float = Field(default=0.7, ge=0)
    ce: float = Field(default=0.0, ge=0)

    def __call__(self, head: Head, progress: float) -> torch.Tensor:
        """Scalar loss of one head."""
        loss = -head.mean_of_targets(tversky_index(head, self.alpha, self.beta))
        return loss + self.ce * entropy(head) if self.ce else loss


class FocalTversky(Term):
    """The mean of (1 - T)^(1 / gamma) + ce * cross-entropy, T the Tversky index (Abraham and Khan 2019)."""

    alpha: float = Field(default=0.3, ge=0)
    beta: float = Field(default=0.7, ge=0)
    gamma: float = Field(default=4 / 3, gt=0)
    ce: float = Field(default=0.0, ge=0)

    def __call__(self, head: Head, progress: float) -> torch.Tensor:
        """Scalar loss of one head."""
        missing = (1 - tversky_index(head, self.alpha, self.beta)).clamp_min(_LEAST)
        loss = head.mean_of_targets(missing ** (1 / self.gamma))
        return loss + self.ce * entropy(head) if self.ce else loss


class TopK(Term):
    """Cross-entropy over the worst `k` % of the annotated voxels (Wu et al. 2016)."""

    k: float = Field(default=10.0, gt=0, le=100)

    def __call__(self, head: Head, progress: float) -> torch.Tensor:
        """Scalar loss of one head."""
        return worst_entropy(head, self.k)


class DiceTopK(Term):
    """dice * soft Dice + topk * cross-entropy over the worst `k` % of the annotated voxels (Isensee et al. 2021)."""

    dice: float = Field(default=1.0, ge=0)
    topk: float = Field(default=1.0, ge=0)
    k: float = Field(default=10.0, gt=0, le=100)

    def __call__(self, head: Head, progress: float) -> torch.Tensor:
        """Scalar loss of one head."""
        return self.dice * soft_dice(head) + self.topk * worst_entropy(head, self.k)


class Boundary(Term):
    """(1 - a) (dice * soft Dice + ce * cross-entropy) + a B, where B is the mean of p phi (Kervadec et al. 2019).

    phi is the signed distance of each voxel to the boundary of the target (`signed_distance`), in units of `spacing` along the
    patch's axes, else in voxels; it is measured on the augmented label, so no transform has to be applied to it. a rises
    linearly over the run from `start` to `stop`. Only the finest head has a boundary part, the others have the rest alone.
    """

    start: float = Field(default=0.01, ge=0, le=1)
    stop: float = Field(default=0.5, ge=0, le=1)
    dice: float = Field(default=1.0, ge=0)
    ce: float = Field(default=1.0, ge=0)
    spacing: tuple[float, ...] | None = Field(default=None, strict=False)

    def __call__(self, head: Head, progress: float) -> torch.Tensor:
        """Scalar loss of one head."""
        overlap = self.dice * soft_dice(head) + self.ce * entropy(head)
        share = self.start + (self.stop - self.start) * min(max(progress, 0.0), 1.0)
        if not head.finest or not share:
            return overlap
        return (1 - share) * overlap + share * self._boundary(head)

    def _boundary(self, head: Head) -> torch.Tensor:
        phi = torch.from_numpy(self.distances(head)).to(head.logits.device)
        keep = head.keep if head.targets.regions or head.keep is None else head.keep[:, None]
        values = head.probabilities * phi
        if keep is None:
            return values.mean()
        return (values * keep).sum() / keep.expand(values.shape).sum().clamp_min(1)

    def distances(self, head: Head) -> NDArray[np.float32]:
        """phi of every sample and target, (batch, targets, *size)."""
        dims = head.label.ndim - 1
        spacing = self.spacing or (1.0,) * dims
        if len(spacing) != dims or min(spacing) <= 0:
            raise PluginError(
                f"loss 'boundary': spacing needs {dims} positive numbers, one per axis of the patch, found {spacing}"
            )
        dense = head.dense.cpu().numpy() > 0
        return np.stack([np.stack([signed_distance(mask, spacing) for mask in sample]) for sample in dense])


def signed_distance(mask: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.float32]:
    """Signed distance to the boundary of a mask (2D or 3D), as in the boundary loss's reference code.

    Outside the distance to the nearest voxel inside; inside one voxel's edge (the smallest) less than the distance to the nearest
    voxel outside, negative; so 0 on the innermost boundary voxels. 0 everywhere when the mask is empty or full.
    """
    import edt

    if not mask.any() or mask.all():
        return np.zeros(mask.shape, np.float32)
    mask = np.ascontiguousarray(mask)
    outside, inside = (edt.edt(part, anisotropy=tuple(spacing), black_border=False, parallel=1) for part in (~mask, mask))
    distance: NDArray[np.float32] = np.where(mask, -np.maximum(inside - min(spacing), 0), outside).astype(np.float32)
    return distance


TERMS: dict[str, type[Term]] = {
    "dice_ce": DiceCE, "ce": CE, "dice": Dice, "focal": Focal, "dice_focal": DiceFocal, "tversky": Tversky,
    "focal_tversky": FocalTversky, "topk": TopK, "dice_topk": DiceTopK, "boundary": Boundary,
}


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
        for level, (weight, logits) in enumerate(zip(weights, outputs, strict=True)):
            label = strided(batch.label, logits.shape[2:])
            head = Head(logits, label, self.targets, self.batch_dice, batch.labelled, finest=level == 0)
            total = total + weight / sum(weights) * self.term(head, progress)
        return total


def head_count(heads: int, deep_supervision: bool) -> int:
    """How many heads are trained: all but the coarsest, whose weight is zero in the reference, and at least one."""
    return max(1, heads - 1) if deep_supervision else 1


def make_loss(spec: LossSpec, labels: Labels, batch_dice: bool) -> Loss:
    """Build the loss of a run: a built-in term, or a plug-in called as kind(labels=..., batch_dice=..., **options).

    Raises:
        PluginError: unknown kind, or options that it does not take.
    """
    if spec.kind not in TERMS:
        builtin: dict[str, Callable[..., Loss]] = dict.fromkeys(TERMS, make_loss)  # only their names are needed
        make = resolve(spec.kind, builtin, "loss")
        try:
            return make(labels=labels, batch_dice=batch_dice, **spec.options)
        except (TypeError, ValueError) as error:
            raise PluginError(f"loss {spec.kind!r} cannot be made with options {spec.options}: {error}") from error
    kind = TERMS[spec.kind]
    try:
        term = kind.model_validate(spec.options)
    except ValidationError as error:
        wrong = {str(item["loc"][0]): item for item in error.errors()}
        found = ", ".join(f"{key}={spec.options[key]!r}{_reason(item['type'], item['msg'])}" for key, item in wrong.items())
        options = f"these numbers as options: {', '.join(kind.model_fields)}" if kind.model_fields else "no options"
        raise PluginError(f"loss {spec.kind!r} takes {options}; found {found}") from None
    return DeepSupervision(term, Targets.of(labels), batch_dice)


def _reason(kind: str, message: str) -> str:
    """Why an option is refused, where its name is right."""
    return "" if kind == "extra_forbidden" else f" ({message.removeprefix('Input ')})"
