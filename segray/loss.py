"""The loss of training: a weighted sum of terms that adds up over the parts of a batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss, LovaszLoss
from torch import Tensor

from segray.classes import Classes
from segray.errors import SettingsError

__all__ = ["Loss", "balanced_weights"]

_OHEM_PROBABILITY = 0.7
_OHEM_FRACTION = 16

_Logits = Float32[Tensor, "batch num_classes height width"]
_Target = Int64[Tensor, "batch height width"]


@dataclass(frozen=True, slots=True)
class Loss:
    """A weighted sum of terms; `parse` makes one.

    Each term is a sum over pixels or images, divided by how many of them the whole batch holds. So
    the contributions of its parts (micro-batches, or what each rank holds) add up to the loss of
    the batch, and their gradients to its gradient, however it was divided. Where gradients are
    averaged over the ranks, as DDP does, each rank multiplies its contribution by their number.

    The terms:

    - `ce`: cross-entropy, the mean over pixels, weighted by their class.
    - `focal`: focal loss with gamma 2 (Lin et al. 2017), the mean over pixels. Each class against
      all others, on the sigmoid of its logit, and the mean over the classes.
    - `dice`: 1 - Dice of the probabilities (as Milletari et al. 2016, without their squares), the
      mean over the classes that an image's target holds, and over images.
    - `lovasz`: Lovász-softmax (Berman et al. 2018), the mean over the classes that an image's
      target holds, and over images.
    - `ohem`: cross-entropy of an image's hard pixels, their mean weighted by their class, and the
      mean over images (online hard example mining, Shrivastava et al. 2016). Hard are those whose
      target has a probability below 0.7, and in any case the hardest sixteenth.

    Void pixels count in no term, and images that hold nothing else in no mean. Where nothing
    counts, or only classes of weight 0, the contribution and its gradient are 0.
    """

    terms: tuple[tuple[str, float], ...]
    """Name and weight of each term."""

    ignore_index: int
    """The id of void pixels."""

    class_weights: tuple[float, ...] | None = None
    """Of each class in `ce` and `ohem`; None: 1."""

    label_smoothing: float = 0.0
    """In `ce` and `ohem`: the share of a pixel's target that is spread evenly over all classes."""

    @classmethod
    def parse(
        cls,
        text: str,
        classes: Classes,
        *,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> "Loss":
        """Reads terms with their weights, as in `ce`, `ce+0.5*dice` or `0.7*ohem + lovasz`.

        Args:
            text: the terms.
            classes: of the targets.
            class_weights: one for each class.
            label_smoothing: at least 0 and below 1.

        Raises:
            SettingsError: a term is unknown or given twice, a weight is no positive number, the class weights
                or the label smoothing are out of their bounds or there is no term that takes them.
        """
        terms = _parse_terms(text)
        if class_weights is not None:
            if len(class_weights) != len(classes):
                raise SettingsError(
                    f"class weights: {len(class_weights)} for {len(classes)} classes; give one for each, or none"
                )
            for name, weight in zip(classes.names, class_weights, strict=True):
                if not 0 <= weight < math.inf:
                    raise SettingsError(f"class weights: {weight} for {name!r} must be a number of at least 0")
            if not any(class_weights):
                raise SettingsError("class weights: all are 0, so that no pixel counts; give one above 0")
        if not 0 <= label_smoothing < 1:
            raise SettingsError(f"label smoothing {label_smoothing} must be at least 0 and below 1")
        if (class_weights is not None or label_smoothing) and not terms.keys() & {"ce", "ohem"}:
            what = "label smoothing" if class_weights is None else "class weights"
            raise SettingsError(f"loss {text!r}: only ce and ohem take {what}; add one of them, or give none")
        return cls(
            terms=tuple(terms.items()),
            ignore_index=classes.ignore_index,
            class_weights=None if class_weights is None else tuple(map(float, class_weights)),
            label_smoothing=label_smoothing,
        )

    def denominators(self, target: _Target) -> Float64[Tensor, " 3"]:
        """What the terms are divided by, as far as this part of a batch goes: add those of all parts up.

        Args:
            target: class ids or `ignore_index`.

        Returns:
            Valid pixels weighted by their class, valid pixels, images with a valid pixel; on the target's device.
        """
        valid = target != self.ignore_index
        weighted = self._pixel_weights(target).sum(dtype=torch.float64)
        return torch.stack([weighted, valid.sum(), valid.flatten(1).any(1).sum()])

    def __call__(
        self,
        logits: Float[Tensor, "batch num_classes height width"],
        target: _Target,
        denominators: Float64[Tensor, " 3"],
    ) -> Float32[Tensor, ""]:
        """The contribution of one part to the loss of its batch, computed in float32 under autocast too.

        Args:
            logits: of any floating-point dtype.
            target: class ids or `ignore_index`.
            denominators: of the whole batch, on the logits' device or a CPU.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            scales = _inverse(denominators).float()
            contributions = []
            for name, weight in self.terms:
                total, denominator = _TERMS[name]
                contributions.append(weight * scales[denominator] * total(self, logits, target))
            return torch.stack(contributions).sum()

    def _cross_entropy(self, logits: _Logits, target: _Target, reduction: Literal["none", "sum"]) -> Tensor:
        return F.cross_entropy(
            logits,
            target,
            weight=self._weight(target.device),
            ignore_index=self.ignore_index,
            reduction=reduction,
            label_smoothing=self.label_smoothing,
        )

    def _weight(self, device: torch.device) -> Float32[Tensor, " num_classes"] | None:
        if self.class_weights is None:
            return None
        return torch.tensor(self.class_weights).to(device, non_blocking=True)

    def _pixel_weights(self, target: _Target) -> Float32[Tensor, "batch height width"]:
        """The weight of each pixel's class; 0 for void."""
        valid = target != self.ignore_index
        weight = self._weight(target.device)
        return valid.float() if weight is None else weight[target.where(valid, 0)] * valid


def balanced_weights(num_pixels: Sequence[int]) -> tuple[float, ...]:
    """Class weights by median frequency balancing: the median of the classes' frequencies over a class's own.

    A class's frequency is its share of all valid pixels, as in SegNet (Badrinarayanan et al. 2017).
    Eigen & Fergus (2015), from whom the method is, take its share of the pixels of those images
    that hold it, so that a class in few images weighs less with them.

    Args:
        num_pixels: of each class, over all targets that are trained on.

    Returns:
        A weight for each class: 1 for one of the median frequency, and 0 for one without pixels, which
        then has no part in the median either. No finite weight would balance it, and where it has no
        pixel, its weight would only decide how far label smoothing raises it.

    Raises:
        SettingsError: no class has a pixel.
    """
    present = [count for count in num_pixels if count]
    if not present:
        raise SettingsError("balanced class weights: no target holds a pixel that is not void; check the ignore_index")
    typical = median(present)
    return tuple(typical / count if count else 0.0 for count in num_pixels)


def _parse_terms(text: str) -> dict[str, float]:
    """The weight of each term, in the order of the text."""
    terms: dict[str, float] = {}
    for part in text.split("+"):
        factor, star, name = (piece.strip() for piece in part.rpartition("*"))
        if name not in _TERMS:
            raise SettingsError(f"loss {text!r}: {name!r} is none of {', '.join(_TERMS)}; write terms as ce+0.5*dice")
        if name in terms:
            raise SettingsError(f"loss {text!r}: {name} is given twice; give it once, with a weight as in 2*{name}")
        try:
            terms[name] = float(factor) if star else 1.0
        except ValueError:
            terms[name] = math.nan
        if not 0 < terms[name] < math.inf:
            raise SettingsError(
                f"loss {text!r}: the weight {factor!r} of {name} must be a number above 0; "
                "leave out a term that is to count nothing"
            )
    return terms


def _inverse(counts: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 / counts, and 0 for a count of 0: a mean over nothing is 0."""
    return torch.where(counts > 0, 1 / counts, 0.0)


def _over_images(criterion: Callable[[Tensor, Tensor], Any], logits: _Logits, target: _Target) -> Tensor:
    """The sum of a criterion over images, each given as a batch of one."""
    # A sum of each: for an image without valid pixels LovaszLoss returns an empty tensor.
    return torch.stack([criterion(logits[i : i + 1], target[i : i + 1]).sum() for i in range(len(target))]).sum()


def _ce(loss: Loss, logits: _Logits, target: _Target) -> Tensor:
    return loss._cross_entropy(logits, target, "sum")


def _focal(loss: Loss, logits: _Logits, target: _Target) -> Tensor:
    total: Tensor = FocalLoss("multiclass", ignore_index=loss.ignore_index, reduction="sum")(logits, target)
    return total


def _dice(loss: Loss, logits: _Logits, target: _Target) -> Tensor:
    num_classes = logits.shape[1]
    mean_over_all = DiceLoss("multiclass", ignore_index=loss.ignore_index)

    def mean_over_present(logits: Tensor, target: Tensor) -> Tensor:
        # DiceLoss counts a class that the target lacks as 0 in its mean, which among many classes
        # would leave next to nothing of the loss of an image with few.
        ids = target.where(target != loss.ignore_index, num_classes).flatten()
        num_present = logits.new_zeros(num_classes + 1).index_fill_(0, ids, 1)[:-1].sum()
        value: Tensor = mean_over_all(logits, target) * num_classes * _inverse(num_present)
        return value

    return _over_images(mean_over_present, logits, target)


def _lovasz(loss: Loss, logits: _Logits, target: _Target) -> Tensor:
    return _over_images(LovaszLoss("multiclass", ignore_index=loss.ignore_index), logits, target)


def _ohem(loss: Loss, logits: _Logits, target: _Target) -> Tensor:
    with torch.no_grad():
        # -log of the target's probability, and 0 for void: never among the hardest unless all are 0.
        hardness = F.cross_entropy(logits, target, ignore_index=loss.ignore_index, reduction="none").flatten(1)
        num_valid = (target != loss.ignore_index).flatten(1).sum(1, keepdim=True)
        hardest = hardness.topk(math.ceil(hardness.shape[1] / _OHEM_FRACTION)).values
        last = (num_valid + _OHEM_FRACTION - 1) // _OHEM_FRACTION - 1
        bound = hardest.gather(1, last.clamp(min=0)).clamp(max=-math.log(_OHEM_PROBABILITY))
        is_hard = hardness >= bound
    total = (loss._cross_entropy(logits, target, "none").flatten(1) * is_hard).sum(1)
    weight = (loss._pixel_weights(target).flatten(1) * is_hard).sum(1)
    return (total * _inverse(weight)).sum()


_WEIGHTED_PIXELS, _PIXELS, _IMAGES = range(3)
_TERMS: dict[str, tuple[Callable[[Loss, _Logits, _Target], Tensor], int]] = {
    "ce": (_ce, _WEIGHTED_PIXELS),
    "focal": (_focal, _PIXELS),
    "dice": (_dice, _IMAGES),
    "lovasz": (_lovasz, _IMAGES),
    "ohem": (_ohem, _IMAGES),
}
"""Each term's sum over a part, and which of the denominators it is divided by."""
