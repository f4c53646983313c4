"""A window of a scene as a file: the values of its bands, NaN where there are no data, and what the bands are called.

It is what numpy calls an .npz: the arrays `values` (bands, height, width), float32, and `bands`, their names.
"""

import io
import threading
import zipfile
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from segray.errors import Reject

__all__ = ["EXTENSION", "bands_of", "decode_values", "encode_values", "is_bandfile"]

EXTENSION = "npz"

_ZIP = b"PK\x03\x04"
_PARSING = threading.Lock()


def encode_values(values: Float32[np.ndarray, "height width bands"], bands: Sequence[str]) -> bytes:
    """The file of a window; the same window gives the same bytes."""
    buffer = io.BytesIO()
    # Band by band, as neighbours in one band are more alike.
    np.savez_compressed(buffer, values=np.moveaxis(values, 2, 0), bands=np.array(bands))
    return buffer.getvalue()


def is_bandfile(data: bytes) -> bool:
    """Whether these are the bytes of such a file; no image begins like it."""
    return data.startswith(_ZIP)


def decode_values(data: bytes) -> Float32[np.ndarray, "height width bands"]:
    """The values of a window, NaN where there are no data.

    Raises:
        Reject: the file is damaged, or holds other things.
    """
    values = _array(data, "values")
    if values.dtype != np.float32 or values.ndim != 3:
        raise Reject("decode", "no bands", f"values is {values.dtype} of {values.ndim} dimensions, not float32 of 3")
    return np.moveaxis(values, 0, 2)


def bands_of(data: bytes) -> tuple[str, ...] | None:
    """The names of the bands in a file. None: it is an image.

    Raises:
        Reject: the file is damaged, or holds other things.
    """
    return tuple(map(str, _array(data, "bands"))) if is_bandfile(data) else None


def _array(data: bytes, name: str) -> np.ndarray:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inflated = io.BytesIO(archive.read(f"{name}.npy"))
        with _PARSING:  # numpy parses a header as Python, at which CPython 3.11 fails in two threads at a time
            array: np.ndarray = np.lib.format.read_array(inflated, allow_pickle=False)
    except Exception as error:  # zipfile, zlib and numpy raise whatever they stumble over
        raise Reject("decode", "undecodable", f"{name}: {error or type(error).__name__}") from error
    return array
