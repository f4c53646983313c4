"""CamVid, the 11 classes and three splits that came with SegNet.

G. J. Brostow, J. Fauqueur, R. Cipolla, "Semantic object classes in video", Pattern Recognition Letters 2009.
V. Badrinarayanan, A. Kendall, R. Cipolla, "SegNet", PAMI 2017.
"""

from segray.classes import Classes
from segray.datasets.dataset import DataSet, StoredIds
from segray.datasets.tree import Tree, match

__all__ = ["CLASSES", "camvid"]

_LAYOUT = "CamVid in SegNet's layout is {train,val,test}/*.png with {train,val,test}annot/*.png"

CLASSES = Classes(
    ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    (
        *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0)),
        *((192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
    ),
)
"""In the order of SegNet's ids. Void, 11 in the files, becomes 255."""


def camvid(tree: Tree) -> DataSet:
    """CamVid: the splits train, val and test.

    Raises:
        SourceError: there is no such layout.
    """
    pairs = match(tree, {split: (split, f"{split}annot") for split in ("train", "val", "test")}, _LAYOUT)
    class_ids = {class_id: class_id for class_id in range(len(CLASSES))} | {len(CLASSES): CLASSES.ignore_index}
    return DataSet(classes=CLASSES, pairs=pairs, to_target=StoredIds(class_ids))
