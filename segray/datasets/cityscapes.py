"""Cityscapes, the 19 classes of its benchmark.

M. Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016.
"""

import functools

import numpy as np
from jaxtyping import UInt, UInt8

from segray.classes import Classes
from segray.datasets.dataset import DataSet, StoredIds
from segray.datasets.tree import Tree, match

__all__ = ["cityscapes", "to_label_ids"]

_LAYOUT = (
    "Cityscapes is leftImg8bit/{train,val}/CITY/*_leftImg8bit.png with gtFine/{train,val}/CITY/*_gtFine_labelIds.png"
)


def cityscapes(tree: Tree) -> DataSet:
    """Cityscapes' fine targets: the splits train and val. Those of test are dummies without a class.

    Raises:
        SourceError: there is no such layout.
    """
    folders = {split: (f"leftImg8bit/{split}", f"gtFine/{split}") for split in ("train", "val")}
    pairs = match(tree, folders, _LAYOUT, ["_leftImg8bit.png"], ["_gtFine_labelIds.png"])
    classes, class_ids = _official()
    return DataSet(classes=classes, pairs=pairs, to_target=StoredIds(class_ids))


def to_label_ids(label_map: UInt[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width"]:
    """Makes a label map what Cityscapes' evaluation server takes.

    Args:
        label_map: ids of the 19 classes; any other id is void.

    Returns:
        The ids of `gtFine_labelIds.png`; 0 (unlabeled) where the label map is void.
    """
    classes, class_ids = _official()
    lookup = np.zeros(np.iinfo(label_map.dtype).max + 1, np.uint8)
    for label_id, class_id in class_ids.items():
        if class_id < len(classes):
            lookup[class_id] = label_id
    label_ids: np.ndarray = lookup[label_map]
    return label_ids


@functools.cache
def _official() -> tuple[Classes, dict[int, int]]:
    """The classes, and the class (or 255) of each id in `gtFine_labelIds.png`."""
    from torchvision.datasets import Cityscapes  # takes seconds

    evaluated = sorted((c for c in Cityscapes.classes if not c.ignore_in_eval), key=lambda c: c.train_id)
    classes = Classes(tuple(c.name for c in evaluated), tuple(c.color for c in evaluated))
    return classes, {c.id: c.train_id for c in Cityscapes.classes if c.id >= 0}
