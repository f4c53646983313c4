"""Pixel counts, of what was committed and of a confusion matrix: int64 until the last division."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, UInt

__all__ = ["ConfusionMatrix", "Receipt"]


@dataclass(frozen=True, slots=True, eq=False)
class ConfusionMatrix:
    """How often each target class was predicted as each class, over any number of images.

    Add the matrices of two sets to get that of their union.
    """

    counts: Int64[np.ndarray, "num_classes num_classes"]
    """Pixels, `[target, prediction]`."""

    @classmethod
    def zeros(cls, num_classes: int) -> "ConfusionMatrix":
        """The matrix of no pixels."""
        return cls(np.zeros((num_classes, num_classes), np.int64))

    @classmethod
    def of(
        cls,
        target: UInt[np.ndarray, "height width"],
        prediction: UInt[np.ndarray, "prediction_height prediction_width"],
        num_classes: int,
        ignore_index: int,
    ) -> "ConfusionMatrix":
        """The matrix of one pair of label maps; void pixels of the target count nowhere.

        Raises:
            ValueError: the sizes differ, or the target holds an id that is neither a class nor void.
        """
        if target.shape != prediction.shape:
            raise ValueError(
                f"the target has {target.shape[0]}×{target.shape[1]} pixels (height×width), "
                f"the prediction {prediction.shape[0]}×{prediction.shape[1]}"
            )
        valid = target != ignore_index
        target_ids = target[valid].astype(np.int64)
        beyond = np.unique(target_ids[target_ids >= num_classes])
        if beyond.size:
            raise ValueError(
                f"the target holds the ids {beyond.tolist()}, which are neither one of the {num_classes} "
                f"classes nor ignore_index {ignore_index}"
            )
        pairs = num_classes * target_ids + prediction[valid]
        counts = np.bincount(pairs, minlength=num_classes**2).astype(np.int64)
        return cls(counts.reshape(num_classes, num_classes))

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        return ConfusionMatrix(self.counts + other.counts)

    def iou(self) -> Float64[np.ndarray, " num_classes"]:
        """Intersection over union of each class; NaN where neither target nor prediction has it."""
        intersection = np.diagonal(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - intersection
        return np.where(union > 0, intersection / np.maximum(union, 1), np.nan)

    def miou(self) -> float:
        """The mean IoU of the classes that occur; NaN where none does."""
        iou = self.iou()
        present = ~np.isnan(iou)
        return float(iou[present].mean()) if present.any() else float("nan")

    def pixel_accuracy(self) -> float:
        """The share of pixels predicted as their target; NaN where there are none."""
        total = int(self.counts.sum())
        return int(np.trace(self.counts)) / total if total else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Receipt:
    """What was committed in one go."""

    key: str
    """What it is of; the same for the same images, however often they are written."""
    num_labelled: int
    """Images labelled."""
    rejects: Counter[tuple[str, str]]
    """Images rejected, by stage and kind."""
    num_images: Int64[np.ndarray, " num_classes"]
    """Images in which each class occurs."""
    num_pixels: Int64[np.ndarray, " num_classes"]
    """Pixels of each class."""
    confidence_sum: Float64[np.ndarray, " num_classes"]
    """Sum of the confidence over the pixels of each class."""
    area_sum: Float64[np.ndarray, " num_classes"]
    """Square metres of each class; 0 where images have no place on Earth."""
    parts: tuple[str, ...]
    """Its parts, as `label_maps/NAME` and `rejects/NAME`."""
