"""Data sets as they lie on disks and in object storage → pairs of image and target, and the classes of the targets.

`dataset.py` says what a data set is and reads its pairs, `tree.py` lists what is there, and each other module knows
one layout, or a few of one family. Files are fetched by `read` alone; what makes class ids of them takes bytes.
"""

from collections.abc import Callable, Mapping

from segray.datasets.ade20k import ade20k
from segray.datasets.camvid import camvid
from segray.datasets.cityscapes import cityscapes
from segray.datasets.coco import coco, coco_instances
from segray.datasets.dataset import DataSet, Pair, ToTarget, read
from segray.datasets.folders import folders
from segray.datasets.tree import Tree
from segray.datasets.voc import sbd, voc
from segray.errors import SettingsError, extra

__all__ = ["KINDS", "DataSet", "Pair", "ToTarget", "open_dataset", "read"]

KINDS: Mapping[str, Callable[..., DataSet]] = {
    "voc": voc,
    "sbd": sbd,
    "coco": coco,
    "coco-instances": coco_instances,
    "cityscapes": cityscapes,
    "ade20k": ade20k,
    "camvid": camvid,
    "folders": folders,
}
"""The readers by the names of `--dataset`. Each takes a `Tree`; that of folders a classes file too."""


def open_dataset(kind: str, source: str, *, classes: str | None = None) -> DataSet:
    """Lists a data set; no image or target is opened.

    Args:
        kind: one of `KINDS`.
        source: URI of the folder or prefix that it lies in.
        classes: URI of a classes file, for `folders`.

    Raises:
        SettingsError: there is no such kind, its package is not installed, or the classes file does not fit.
        SourceError: the source does not have the kind's layout, or cannot be read.
    """
    if kind not in KINDS:
        raise SettingsError(f"--dataset {kind}: there is no such kind; choose one of {', '.join(KINDS)}")
    if classes is not None and kind != "folders":
        raise SettingsError(f"--classes {classes}: {kind} has classes of its own; leave the option out")
    with extra("datasets", f"--dataset {kind}"):
        return KINDS[kind](Tree(source), **({"classes": classes} if kind == "folders" else {}))
