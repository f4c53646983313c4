"""What it takes a driver to find the new images among ten million of which all but one in a hundred are done.

    python tests/benchmarks/skipping.py [NUM_IMAGES]

The parts are real, on the local disk, with empty label maps; the listing is made up on the fly, as fast
as a store could ever give it. Memory is the process's peak, its imports included.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segray.label import _image_pages
from segray.sink import LABEL_MAPS, Sink, part_name
from segray.source import ENTRIES, image_id

ROWS_PER_PART = 2048
ENTRIES_PER_PAGE = 10_000
ONE_IN = 100


def listing(num_images: int) -> Iterator[pa.Table]:
    """Entries of as many images as one likes, as `source.Source` gives them."""
    for first in range(0, num_images, ENTRIES_PER_PAGE):
        numbers = range(first, min(first + ENTRIES_PER_PAGE, num_images))
        uris, versions = zip(*map(name, numbers), strict=True)
        yield pa.table([uris, versions, np.full(len(uris), 100_000)], schema=ENTRIES)


def name(number: int) -> tuple[str, str]:
    """The URI and version of an image."""
    return f"s3://bucket/fields/2026/{number // 1000:06d}/{number:09d}.jpg", f"{number * 2654435761 % 2**64:032x}"


def write_part(folder: str, first: int, num_images: int) -> None:
    """A part of those that are done."""
    numbers = [n for n in range(first, min(first + ROWS_PER_PART, num_images)) if n % ONE_IN]
    uris, versions = zip(*map(name, numbers), strict=True)
    ids = [image_id(uri, version) for uri, version in zip(uris, versions, strict=True)]
    constants = [pa.repeat(value, len(ids)) for value in (0, 0, b"", "run")]
    constants += [pa.nulls(len(ids)) for _ in LABEL_MAPS.names[7:]]  # of plain images
    rows = pa.table([ids, uris, versions, *constants], names=LABEL_MAPS.names).cast(LABEL_MAPS)
    part = part_name(rows)
    pq.write_table(rows, f"{folder}/{part}", compression="zstd")
    Path(f"{folder.replace('label_maps', 'statistics')}/{part}").touch()


def main() -> None:
    """Writes the parts, then times and weighs what a run does before it begins."""
    num_images = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as root:
        sink = Sink(root, "r1")
        folder = f"{root}/label_maps/recipe=r1"
        for table in ("label_maps", "statistics"):
            sink.filesystem.makedirs(folder.replace("label_maps", table))
        firsts = range(0, num_images, ROWS_PER_PART)
        with multiprocessing.Pool() as pool:
            pool.starmap(write_part, ((folder, first, num_images) for first in firsts))

        before, began = peak_mib(), time.monotonic()
        done = sink.done()
        read = time.monotonic()
        pages = _image_pages(listing(num_images), None, sink, done)
        todo = [(page.loose.num_rows, page.num_present, page.loose.nbytes) for page in pages]
        ended = time.monotonic()
    num_new, num_present, num_bytes = (sum(column) for column in zip(*todo, strict=True))
    print(f"{len(firsts):,} parts, {len(done):,} images done: {read - began:.1f} s, {done.nbytes >> 20:,} MiB of keys")
    print(f"{num_images:,} listed, {num_present:,} there, {num_new:,} new: {ended - read:.1f} s")
    print(
        f"peak memory {before:,} → {peak_mib():,} MiB; a new image takes {num_bytes / num_new:.0f} bytes of the index"
    )


def peak_mib() -> int:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    main()
