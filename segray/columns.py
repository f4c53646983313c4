"""Arrays as columns of Arrow tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

__all__ = ["binary"]


def binary(arrays: Sequence[np.ndarray[Any, Any]]) -> pa.Array:
    """The bytes of arrays of any shapes, one a row, as large_binary; contiguous ones with a single copy."""
    offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64)
    values = np.concatenate([np.array([], np.uint8), *(array.reshape(-1).view(np.uint8) for array in arrays)])
    return pa.Array.from_buffers(pa.large_binary(), len(arrays), [None, pa.py_buffer(offsets), pa.py_buffer(values)])
