"""Any folder of images with a folder of targets and a file of classes."""

import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt
from PIL import Image

from segray.classes import RGB, Classes
from segray.datasets.dataset import (
    DataSet,
    Pair,
    StoredIds,
    own_ids,
    packed_colours,
    to_class_ids,
    unreadable_is_a_reject,
)
from segray.datasets.tree import Tree, match
from segray.errors import Reject, SettingsError

__all__ = ["IdsOrColours", "folders", "read_classes"]

_LAYOUT = (
    "folders is images/ with targets/*.png, or {train,val,test}/{images,targets}/, where an image and its target "
    "differ in their endings alone"
)


def folders(tree: Tree, classes: str | None = None) -> DataSet:
    """Images and targets of the same names: all as the split train, or the splits train, val and test.

    Args:
        tree: holds `images` and `targets`, or else folders `train`, `val`, `test` that do.
        classes: URI of a file as `Classes.read` takes it. Default: `classes.json` beside those folders.

    Raises:
        SettingsError: there are no classes, or ids of PNGs cannot hold their ignore_index.
        SourceError: there is no such layout.
    """
    splits = {split: (f"{split}/images", f"{split}/targets") for split in ("train", "val", "test")}
    pairs = match(tree, {"train": ("images", "targets")} if tree.has("images") else splits, _LAYOUT)
    own = read_classes(tree, classes)
    return DataSet(classes=own, pairs=pairs, to_target=IdsOrColours(own))


def read_classes(tree: Tree, classes: str | None) -> Classes:
    """The classes in a file, by default in `classes.json`.

    Raises:
        SettingsError: there are none, or ids of PNGs cannot hold their ignore_index.
    """
    if classes is None:
        classes = tree.uri("classes.json")
        if not tree.has("classes.json"):
            raise SettingsError(
                f"{classes}: there is no such file; write the names of the classes into it, as a JSON list, "
                "or name another with --classes"
            )
    read = Classes.read(classes)
    if not 0 <= read.ignore_index <= 0xFFFF:
        raise SettingsError(f"{classes}: ignore_index {read.ignore_index}: ids in a PNG lie between 0 and 65535")
    return read


@dataclass(frozen=True, slots=True)
class IdsOrColours:
    """To the target, from a grey or palette PNG of class ids, or from one in the colours of the classes."""

    classes: Classes
    """Ids, with their ignore_index, or colours. Black is void where no class is black."""

    def __call__(self, pair: Pair, data: bytes | None, size: tuple[int, int]) -> UInt[np.ndarray, "height width"]:
        """As `ToTarget` has it."""
        assert pair.target is not None and data is not None
        with unreadable_is_a_reject(pair.target), Image.open(io.BytesIO(data)) as image:
            is_coloured = image.mode in ("RGB", "RGBA")
        if not is_coloured:
            return StoredIds(own_ids(self.classes))(pair, data, size)
        palette = self.classes.palette
        twice = next((colour for colour in palette if palette.count(colour) > 1), None)
        if twice:
            raise Reject(
                "decode", "ambiguous colour", f"{pair.target}: {twice} is of several classes; give each its own colour"
            )
        with unreadable_is_a_reject(pair.target):
            packed = packed_colours(data)
        class_ids = {0: self.classes.ignore_index} | {_packed(colour): i for i, colour in enumerate(palette)}
        return to_class_ids(packed, class_ids, pair.target, what="colour", show=_unpacked)


def _packed(colour: RGB) -> int:
    red, green, blue = colour
    return red | green << 8 | blue << 16


def _unpacked(packed: int) -> RGB:
    return packed & 0xFF, packed >> 8 & 0xFF, packed >> 16
