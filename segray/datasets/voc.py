"""Pascal VOC 2012, and SBD, which labels most of the other images of it.

M. Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective", IJCV 2015. B. Hariharan et al.,
"Semantic Contours from Inverse Detectors", ICCV 2011.
"""

import io

import numpy as np
from jaxtyping import UInt

from segray.classes import Classes
from segray.datasets.dataset import DataSet, Pair, StoredIds, own_ids, to_class_ids, unreadable_is_a_reject
from segray.datasets.tree import Tree, safe_name

__all__ = ["CLASSES", "sbd", "voc"]

CLASSES = Classes(
    (
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
        *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    )
)
"""In VOC's order and colours; 255, the outline around objects, is void."""

_VOC_LAYOUT = (
    "VOC2012 (or a folder with VOC2012 or VOCdevkit/VOC2012 in it) holds ImageSets/Segmentation/{train,val}.txt, "
    "JPEGImages/*.jpg and SegmentationClass/*.png"
)
_SBD_LAYOUT = (
    "beside VOC2012 lies SBD's dataset/{cls/*.mat,train.txt,val.txt} (in benchmark_RELEASE, or named sbd, too), or "
    "SegmentationClassAug/*.png"
)
_LISTS = "ImageSets/Segmentation"
_PNG = StoredIds(own_ids(CLASSES))


def voc(tree: Tree) -> DataSet:
    """Pascal VOC 2012: the splits train and val. Its test split has no targets, and trainval is those two again.

    Raises:
        SourceError: there is no such layout.
    """
    root = _voc_root(tree)
    pairs = [_pair(root, split, name) for split in ("train", "val") for name in _names(root, f"{_LISTS}/{split}.txt")]
    if not pairs:
        raise tree.absent(f"name in {_LISTS}/train.txt or val.txt", _VOC_LAYOUT)
    return DataSet(classes=CLASSES, pairs=pairs, to_target=_PNG)


def sbd(tree: Tree) -> DataSet:
    """VOC 2012 with SBD, known as "trainaug".

    The split train is VOC's and all that SBD labels, without VOC's val: 10,582 images. The split val is VOC's. Where
    VOC has a target it is taken; SBD's have no void. All images are VOC's.

    Raises:
        SourceError: there is no such layout.
    """
    import scipy.io  # noqa: F401  # what is not installed shall be missed now, and not in each task

    root = _voc_root(tree)
    train, val = (_names(root, f"{_LISTS}/{split}.txt") for split in ("train", "val"))
    if not (train and val):
        raise tree.absent(f"name in both {_LISTS}/train.txt and val.txt", _VOC_LAYOUT)
    of_voc = {*train, *val}
    target_of = {name: uri for name, uri in _sbd_targets(tree, root).items() if name not in of_voc}
    pairs = [_pair(root, split, name) for split, names in (("train", train), ("val", val)) for name in names]
    pairs += [_pair(root, "train", name, uri) for name, uri in target_of.items()]
    return DataSet(classes=CLASSES, pairs=pairs, to_target=_to_target)


def _to_target(pair: Pair, data: bytes | None, size: tuple[int, int]) -> UInt[np.ndarray, "height width"]:
    """From VOC's PNG, or from SBD's MATLAB file: the matrix `Segmentation` in the struct `GTcls`."""
    assert pair.target is not None and data is not None
    if not pair.target.endswith(".mat"):
        return _PNG(pair, data, size)
    from scipy.io import loadmat

    with unreadable_is_a_reject(pair.target):
        stored = loadmat(io.BytesIO(data), variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
    return to_class_ids(stored, _PNG.class_ids, pair.target)


def _voc_root(tree: Tree) -> Tree:
    for folder in ("", "VOC2012", "VOCdevkit/VOC2012"):
        root = tree.below(folder) if folder else tree
        if root.has(_LISTS):
            for needed in ("JPEGImages", "SegmentationClass"):
                if not root.has(needed):
                    raise root.absent(needed, _VOC_LAYOUT)
            return root
    raise tree.absent(_LISTS, _VOC_LAYOUT)


def _sbd_targets(tree: Tree, root: Tree) -> dict[str, str]:
    """The URI of each target of SBD, by its name."""
    for folder in ("dataset", "benchmark_RELEASE/dataset", "sbd", "SBD"):
        dataset = tree.below(folder)
        if dataset.has("cls"):
            names = [name for split in ("train", "val") for name in _names(dataset, f"{split}.txt")]
            if not names:
                raise dataset.absent("name in train.txt or val.txt", _SBD_LAYOUT)
            return {name: dataset.uri(f"cls/{name}.mat") for name in names}
    folder = "SegmentationClassAug"
    for where in (root, tree):
        files = [file for file in where.files(folder) if file.endswith(".png")]
        if files:
            return {file.removesuffix(".png"): where.uri(f"{folder}/{file}") for file in files}
    raise tree.absent(f"dataset/cls and no {folder}", _SBD_LAYOUT)


def _names(tree: Tree, path: str) -> list[str]:
    """The lines of a list; none if there is no such list."""
    lines = (line.strip() for line in (tree.read(path) or b"").decode().splitlines())
    return list(dict.fromkeys(line for line in lines if line))


def _pair(root: Tree, split: str, name: str, target: str | None = None) -> Pair:
    return Pair(
        name=safe_name(name),
        split=split,
        image=root.uri(f"JPEGImages/{name}.jpg"),
        target=target or root.uri(f"SegmentationClass/{name}.png"),
    )
