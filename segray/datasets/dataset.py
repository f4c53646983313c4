"""What a reader gives: pairs of image and target, and what makes class ids of a target's file."""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt, UInt8, UInt32
from PIL import Image

from segray.classes import Classes
from segray.decode import MAX_PIXELS, decode
from segray.errors import Reject, RunError
from segray.labelmap import decode_png
from segray.retry import is_refusal, is_transient, retrying
from segray.source import filesystem

__all__ = [
    "DataSet",
    "Pair",
    "StoredIds",
    "ToTarget",
    "own_ids",
    "packed_colours",
    "read",
    "to_class_ids",
    "unreadable_is_a_reject",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An image, and where its target comes from."""

    name: str
    """Unique in its split, of letters, digits, `_`, `-` and `/`."""

    split: str
    """`train`, `val`, `test`, …: as the data set names it, in lower case."""

    image: str
    """URI of the image."""

    target: str | None
    """URI of the file that holds the target. None: the annotations alone do."""

    annotations: str = ""
    """What that file does not say, as JSON."""


ToTarget = Callable[[Pair, bytes | None, tuple[int, int]], UInt[np.ndarray, "height width"]]
"""Makes a target's file a target.

Takes a pair, the bytes of its target (None where it has no such file), and height and width of its image. Returns
class ids, void as the ignore_index of the classes: uint8, or uint16 where that or a class needs it. Raises a Reject
that names the file. Can be pickled.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """Pairs, and how their targets are read."""

    classes: Classes
    """What the ids of its targets stand for."""

    pairs: Sequence[Pair]
    """By split and name, whatever their order was."""

    to_target: ToTarget
    """Makes a target's file a target."""

    def __post_init__(self) -> None:
        pairs = sorted(self.pairs, key=lambda pair: (pair.split, pair.name))
        assert len({(pair.split, pair.name) for pair in pairs}) == len(pairs)
        object.__setattr__(self, "pairs", pairs)


def read(
    pair: Pair, to_target: ToTarget
) -> tuple[bytes, UInt8[np.ndarray, "height width 3"], UInt[np.ndarray, "height width"]]:
    """Fetches a pair and decodes it.

    Args:
        pair: one of a data set.
        to_target: that of the data set.

    Returns:
        The image file's own bytes, the image, and the class ids of its pixels, void as ignore_index.

    Raises:
        Reject: a file is missing or cannot be decoded, the two differ in size, or what a pixel of the target holds
            stands for no class; it names the file.
        RunError: the store does not answer, or refuses whoever asks.
    """
    data = _fetch(pair.image)
    target_data = None if pair.target is None else _fetch(pair.target)
    try:
        image = decode(data, MAX_PIXELS)
    except Reject as reject:
        raise Reject(reject.stage, reject.kind, f"{pair.image}: {reject.detail}") from reject
    height, width = image.shape[:2]
    target = to_target(pair, target_data, (height, width))
    if target.shape != (height, width):
        raise Reject(
            "decode",
            "size mismatch",
            f"{pair.target or 'the annotations'}: the target has {target.shape[0]}×{target.shape[1]} pixels "
            f"(height×width), its image {pair.image} {height}×{width}",
        )
    return data, image, target


def _fetch(uri: str) -> bytes:
    fs, path = filesystem(uri)
    try:
        return bytes(retrying(functools.partial(fs.cat_file, path)))
    except FileNotFoundError as error:
        raise Reject("fetch", "missing", f"{uri}: there is no such file") from error
    except Exception as error:  # whatever the store's client raises
        if is_transient(error) or is_refusal(error):
            raise RunError(f"{uri}: the store does not give it: {error or type(error).__name__}") from error
        raise Reject("fetch", "unreadable", f"{uri}: {error or type(error).__name__}") from error


@dataclass(frozen=True, slots=True)
class StoredIds:
    """To the target, from a grey or palette PNG whose pixel values are ids of the data set's own."""

    class_ids: Mapping[int, int]
    """For each of these ids the class it stands for, or ignore_index."""

    def __call__(self, pair: Pair, data: bytes | None, size: tuple[int, int]) -> UInt[np.ndarray, "height width"]:
        """As `ToTarget` has it."""
        assert pair.target is not None and data is not None
        with unreadable_is_a_reject(pair.target):
            stored = decode_png(data)
        return to_class_ids(stored, self.class_ids, pair.target)


def own_ids(classes: Classes) -> dict[int, int]:
    """The `class_ids` of targets that hold class ids and ignore_index already."""
    return {class_id: class_id for class_id in (*range(len(classes)), classes.ignore_index)}


def to_class_ids(
    stored: UInt[np.ndarray, "height width"],
    class_ids: Mapping[int, int],
    uri: str,
    *,
    what: str = "id",
    show: Callable[[int], object] = int,
) -> UInt[np.ndarray, "height width"]:
    """Replaces what pixels hold by what it stands for.

    Args:
        stored: ids, or other numbers of up to 32 bits.
        class_ids: for each of them that may occur the class, or ignore_index.
        uri: the file that they come from.
        what: what the numbers are, for the reject.
        show: makes such a number what a person knows it by.

    Returns:
        Class ids: uint8, or uint16 where a value of `class_ids` needs it.

    Raises:
        Reject: a pixel holds what is not in `class_ids`.
    """
    keys = np.array(sorted(class_ids), np.uint32)
    values = np.array([class_ids[int(key)] for key in keys], np.min_scalar_type(max(class_ids.values())))
    places = np.minimum(np.searchsorted(keys, stored.astype(np.uint32)), len(keys) - 1)
    unknown = keys[places] != stored
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        raise Reject(
            "decode",
            f"unknown {what}",
            f"{uri}: the {what} {show(int(stored[row, column]))} in row {row}, column {column} stands for no class "
            f"(counted from 0; {np.count_nonzero(unknown)} of {unknown.size} pixels are such)",
        )
    target: np.ndarray = values[places]
    return target


@contextlib.contextmanager
def unreadable_is_a_reject(uri: str) -> Iterator[None]:
    """Turns what decoders raise over a target into a Reject that names its file."""
    try:
        yield
    except Exception as error:  # a damaged file: Pillow, scipy and pycocotools raise whatever they stumble over
        raise Reject("decode", "unreadable target", f"{uri}: {error or type(error).__name__}") from error


def packed_colours(data: bytes) -> UInt32[np.ndarray, "height width"]:
    """The colours of a PNG, each as one number: red + 256 green + 65536 blue."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = np.asarray(image.convert("RGB")).astype(np.uint32)
    packed: np.ndarray = rgb[:, :, 0] | rgb[:, :, 1] << 8 | rgb[:, :, 2] << 16
    return packed
