"""Shards of image/target pairs: what is in them, and single pairs out of them by where they lie.

A tar holds NAME.jpg (or .jpeg, .png, .webp; .npz of a scene's window) with NAME.target.png, a Parquet shard the
columns `image` and `target` (and perhaps `name`). `survey` reads a shard once and proves it; from the index that it
gives, `read` then fetches any pairs in any order, which is what training in a new order each epoch asks for.
"""

import functools
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Float64, Int64, UInt, UInt8

from segray import bandfile
from segray.classes import Classes
from segray.decode import MAX_PIXELS, decode
from segray.errors import Reject, SourceError
from segray.labelmap import decode_png
from segray.retry import ShortRead, retrying
from segray.source import filesystem, tar_samples

__all__ = [
    "EXTENSIONS",
    "INDEX",
    "INDEX_NAME",
    "SHAPE",
    "TARGET_EXTENSION",
    "Census",
    "decode_pair",
    "read",
    "read_index",
    "shown",
    "survey",
    "write_index",
]

SHAPE = "a tar holds NAME.jpg with NAME.target.png, a Parquet shard the columns image and target"
"""What a shard is, for a person."""

EXTENSIONS = ("jpg", "jpeg", "png", "webp", bandfile.EXTENSION)
TARGET_EXTENSION = "target.png"
INDEX_NAME = "_index.parquet"
"""Lies beside the shards that it describes."""

INDEX = pa.schema(
    {
        "shard": pa.string(),
        "shard_bytes": pa.int64(),
        "name": pa.string(),
        "image_offset": pa.int64(),
        "image_bytes": pa.int64(),
        "target_offset": pa.int64(),
        "target_bytes": pa.int64(),
    }
)
"""A row a pair. Offsets are in bytes from a tar's begin, and in a Parquet shard both are the row's number."""

# What gzip, bzip2 and xz begin with.
_COMPRESSED = re.compile(rb"\x1f\x8b|BZh[1-9]1AY&SY|\xfd7zXZ\0")
_OPEN_SHARDS = 32
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())

_Image = UInt8[np.ndarray, "height width 3"] | Float32[np.ndarray, "height width bands"]
_Target = UInt[np.ndarray, "height width"]


@dataclass(frozen=True, slots=True, eq=False)
class Census:
    """What pairs hold in all. Add those of two sets to get that of both."""

    num_images: int
    """How many pairs."""
    num_pixels: Int64[np.ndarray, " num_classes"]
    """Pixels of each class in the targets."""
    num_void: int
    """Pixels of none."""
    channel_sum: Float64[np.ndarray, " channels"]
    """Of the images' red, green and blue, which lie in [0, 1]; or of the values of each band."""
    channel_square_sum: Float64[np.ndarray, " channels"]
    """Of their squares."""
    num_valid: int
    """Pixels that the sums are of: of scenes those that have data."""
    bands: tuple[str, ...] | None = None
    """What the channels are called, of windows of scenes. None: red, green and blue."""

    @classmethod
    def zeros(cls, num_classes: int) -> "Census":
        """That of nothing."""
        return cls(0, np.zeros(num_classes, np.int64), 0, np.zeros(3), np.zeros(3), 0)

    @classmethod
    def of(cls, image: _Image, target: _Target, classes: Classes, bands: tuple[str, ...] | None = None) -> "Census":
        """That of one pair whose ids are classes or void; of a window of a scene with the names of its bands."""
        valid = target[target != classes.ignore_index]
        if bands is None:
            shades = np.arange(256) / 255
            counts = np.stack([np.bincount(image[:, :, channel].ravel(), minlength=256) for channel in range(3)])
            channel_sum, channel_square_sum, num_valid = counts @ shades, counts @ shades**2, target.size
        else:
            values = image[np.isfinite(image).all(axis=2)].astype(np.float64)
            channel_sum, channel_square_sum, num_valid = values.sum(0), (values**2).sum(0), len(values)
        return cls(
            num_images=1,
            num_pixels=np.bincount(valid, minlength=len(classes)).astype(np.int64),
            num_void=target.size - valid.size,
            channel_sum=channel_sum,
            channel_square_sum=channel_square_sum,
            num_valid=num_valid,
            bands=bands,
        )

    def __add__(self, other: "Census") -> "Census":
        """Raises: SourceError: one is of other bands."""
        if not (self.num_images and other.num_images):  # that of nothing is of no bands either
            return self if self.num_images else other
        if self.bands != other.bands:
            raise SourceError(
                f"images of {shown(self.bands)} and of {shown(other.bands)} lie in the same shards; pack them apart"
            )
        return Census(
            self.num_images + other.num_images,
            self.num_pixels + other.num_pixels,
            self.num_void + other.num_void,
            self.channel_sum + other.channel_sum,
            self.channel_square_sum + other.channel_square_sum,
            self.num_valid + other.num_valid,
            self.bands,
        )

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of each channel over all pixels, void ones too; of bands over those that have data."""
        mean = self.channel_sum / self.num_valid
        std = np.sqrt(np.maximum(self.channel_square_sum / self.num_valid - mean**2, 0))
        return tuple(mean.tolist()), tuple(std.tolist())

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "num_images": self.num_images,
            "num_pixels": self.num_pixels.tolist(),
            "num_void": self.num_void,
            "channel_sum": self.channel_sum.tolist(),
            "channel_square_sum": self.channel_square_sum.tolist(),
            "num_valid": self.num_valid,
            "bands": self.bands,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Census":
        """The inverse of `to_dict`."""
        return cls(
            fields["num_images"],
            np.array(fields["num_pixels"], np.int64),
            fields["num_void"],
            np.array(fields["channel_sum"], np.float64),
            np.array(fields["channel_square_sum"], np.float64),
            # Before there were scenes, nobody wrote these two.
            fields.get("num_valid", sum(fields["num_pixels"]) + fields["num_void"]),
            None if fields.get("bands") is None else tuple(fields["bands"]),
        )


def shown(bands: tuple[str, ...] | None) -> str:
    """The bands of a census, for a person."""
    return "red, green and blue (images)" if bands is None else f"the bands {', '.join(bands)}"


def survey(shard: str, classes: Classes) -> tuple[pa.Table, Census]:
    """Reads every pair of a shard, once and front to back.

    Args:
        shard: URI of a tar or Parquet file.
        classes: what its targets are of.

    Returns:
        Its index, with the schema `INDEX`, and what its pairs hold.

    Raises:
        SourceError: the shard cannot be read, an image has no target, or one that does not fit.
    """
    rows: list[dict[str, Any]] = []
    census = Census.zeros(len(classes))
    try:
        fs, path = filesystem(shard)
        shard_bytes = fs.size(path)
        with fs.open(path, "rb") as file:
            for row, image_data, target_data in _pairs(shard, file):
                image, target = decode_pair(f"{shard}#{row['name']}", image_data, target_data, classes)
                census += Census.of(image, target, classes, bandfile.bands_of(image_data))
                rows.append({"shard": shard, "shard_bytes": shard_bytes, **row})
    except SourceError:
        raise
    except Exception as error:  # whatever the store's client raises, and damaged shards
        raise SourceError(f"{shard} cannot be read: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
    return pa.Table.from_pylist(rows, INDEX), census


def read(index: pa.Table) -> list[tuple[str, bytes, bytes]]:
    """Fetches pairs by where they lie.

    Args:
        index: rows with the schema `INDEX`.

    Returns:
        In their order, each pair's URI (`SHARD#NAME`), and the bytes of its image and of its target.

    Raises:
        Exception: whatever the store's client raises.
    """
    by_shard: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for place, row in enumerate(index.to_pylist()):
        by_shard[row["shard"]].append((place, row))
    found: list[tuple[str, bytes, bytes]] = [("", b"", b"")] * index.num_rows
    for shard, places in by_shard.items():
        rows = [row for _, row in places]
        fetched = retrying(functools.partial(_from_parquet if _is_parquet(shard) else _from_tar, shard, rows))
        for (place, row), (image, target) in zip(places, fetched, strict=True):
            found[place] = f"{shard}#{row['name']}", image, target
    return found


def decode_pair(uri: str, image_data: bytes, target_data: bytes, classes: Classes) -> tuple[_Image, _Target]:
    """Decodes a pair, and sees that its two fit.

    Args:
        uri: what it is called in errors.
        image_data: the bytes of the image.
        target_data: those of the target, a PNG of class ids.
        classes: what the ids stand for.

    Returns:
        (height, width, 3) uint8, or of a scene's window (height, width, bands) float32 with NaN where there are no
        data; and (height, width) class ids.

    Raises:
        SourceError: one of them cannot be decoded, they differ in size, or an id is no class and not void.
    """
    try:
        is_bandfile = bandfile.is_bandfile(image_data)
        image = bandfile.decode_values(image_data) if is_bandfile else decode(image_data, MAX_PIXELS)
    except Reject as error:
        raise SourceError(f"{uri}: the image cannot be decoded: {error.reason}") from error
    try:
        target = decode_png(target_data)
    except Exception as error:  # a damaged PNG: Pillow's readers raise whatever they stumble over
        raise SourceError(f"{uri}: the target cannot be decoded: {error}") from error
    if target.shape != image.shape[:2]:
        raise SourceError(
            f"{uri}: the target has {target.shape[0]}×{target.shape[1]} pixels (height×width), "
            f"the image {image.shape[0]}×{image.shape[1]}"
        )
    present = np.flatnonzero(np.bincount(target.ravel()))
    unknown = [int(i) for i in present if i >= len(classes) and i != classes.ignore_index]
    if unknown:
        raise SourceError(
            f"{uri}: the target holds the ids {unknown}, which are neither one of the {len(classes)} classes "
            f"nor ignore_index {classes.ignore_index}"
        )
    return image, target


def write_index(index: pa.Table, census: Census) -> bytes:
    """The file `_index.parquet` of a folder of shards; shards are named in it without their folder."""
    names = [str(shard).rpartition("/")[2] for shard in index["shard"].to_pylist()]
    local = index.set_column(0, INDEX.field("shard"), pa.array(names, pa.string()))
    buffer = io.BytesIO()
    metadata = {"segray": json.dumps({"census": census.to_dict()})}
    described = local.replace_schema_metadata(metadata)
    # With checksums, as a damaged offset looks like a whole one.
    pq.write_table(described, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def read_index(folder: str, shard_bytes: dict[str, int]) -> tuple[pa.Table, Census] | None:
    """What `write_index` wrote beside shards; None where there is none, or where it is of others.

    Args:
        folder: the shards' URI without their names.
        shard_bytes: the size of each by its URI.

    Raises:
        Exception: whatever the store's client raises and calls no OSError.
    """
    try:
        fs, path = filesystem(f"{folder}/{INDEX_NAME}")
        data = retrying(functools.partial(fs.cat_file, path))
        index = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        census = Census.from_dict(json.loads(index.schema.metadata[b"segray"])["census"])
        index = index.cast(INDEX)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    shards = [f"{folder}/{shard}" for shard in index["shard"].to_pylist()]
    described = dict(zip(shards, index["shard_bytes"].to_pylist(), strict=True))
    if described != shard_bytes:
        return None
    return index.set_column(0, INDEX.field("shard"), pa.array(shards, pa.string())), census


def _is_parquet(shard: str) -> bool:
    return shard.lower().endswith(".parquet")


def _pairs(shard: str, file: Any) -> Iterator[tuple[dict[str, Any], bytes, bytes]]:
    """The rows of its index, without the shard, each with the bytes of image and target; the file is fsspec's."""
    for row, image, target in _parquet_pairs(shard, file) if _is_parquet(shard) else _tar_pairs(shard, file):
        if image is None or target is None:
            have, lack = ("a target", "image") if image is None else ("an image", "target")
            raise SourceError(f"{shard}#{row['name']} is {have} without {lack}; {SHAPE}")
        yield {**row, "image_bytes": len(image), "target_bytes": len(target)}, image, target


def _tar_pairs(shard: str, file: Any) -> Iterator[tuple[dict[str, Any], bytes | None, bytes | None]]:
    begin = file.read(16)
    file.seek(0)
    if _COMPRESSED.match(begin):
        raise SourceError(f"{shard} is compressed, so that no single pair can be read out of it; give it as plain .tar")
    for name, members in tar_samples(file):
        image = next((members[extension] for extension in EXTENSIONS if extension in members), None)
        target = members.get(TARGET_EXTENSION)
        if image is not None or target is not None:
            offsets = {"image_offset": image and image.offset, "target_offset": target and target.offset}
            yield {"name": name, **offsets}, image and image.data, target and target.data


def _parquet_pairs(shard: str, file: Any) -> Iterator[tuple[dict[str, Any], bytes | None, bytes | None]]:
    opened = pq.ParquetFile(file)
    there = {field.name: field.type for field in opened.schema_arrow}
    if lacking := [name for name in ("image", "target") if there.get(name) not in _BYTES]:
        columns = ", ".join(f"{name} ({kind})" for name, kind in there.items())
        raise SourceError(f"{shard}: there is no column {' and no '.join(lacking)} of bytes among {columns}; {SHAPE}")
    number = 0
    for batch in opened.iter_batches(64, columns=[name for name in ("image", "target", "name") if name in there]):
        for row in batch.to_pylist():
            name = str(row.get("name") or number)
            yield {"name": name, "image_offset": number, "target_offset": number}, row["image"], row["target"]
            number += 1


def _from_tar(shard: str, rows: Sequence[dict[str, Any]]) -> list[tuple[bytes, bytes]]:
    fs, path = filesystem(shard)
    begins = [row[f"{what}_offset"] for row in rows for what in ("image", "target")]
    sizes = [row[f"{what}_bytes"] for row in rows for what in ("image", "target")]
    ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
    found: list[bytes] = fs.cat_ranges([path] * len(begins), begins, ends, on_error="raise")
    for data, size in zip(found, sizes, strict=True):
        if len(data) != size:
            raise ShortRead(shard, len(data), size)
    return list(zip(found[::2], found[1::2], strict=True))


def _from_parquet(shard: str, rows: Sequence[dict[str, Any]]) -> list[tuple[bytes, bytes]]:
    opened, firsts = _parquet(shard)
    numbers = np.array([row["image_offset"] for row in rows])
    groups = np.searchsorted(firsts, numbers, side="right") - 1
    found: dict[int, tuple[bytes, bytes]] = {}
    for group in np.unique(groups):
        wanted = numbers[groups == group]
        some = opened.read_row_group(int(group), columns=["image", "target"]).take(wanted - firsts[group])
        images, targets = some["image"].to_pylist(), some["target"].to_pylist()
        found |= dict(zip(wanted.tolist(), zip(images, targets, strict=True), strict=True))
    return [found[number] for number in numbers.tolist()]


@functools.lru_cache(_OPEN_SHARDS)
def _parquet(shard: str) -> tuple[Any, Int64[np.ndarray, " num_groups"]]:
    """The opened shard, and the number of each row group's first row."""
    fs, path = filesystem(shard)
    opened = pq.ParquetFile(fs.open(path, "rb"))
    num_rows = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
    return opened, np.cumsum([0, *num_rows[:-1]]).astype(np.int64)
