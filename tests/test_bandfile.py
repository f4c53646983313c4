"""Windows of scenes as files: what is read is what was written, and what is damaged is a reject."""

import io

import numpy as np
import pytest

from segray.bandfile import bands_of, decode_values, encode_values, is_bandfile
from segray.errors import Reject

BANDS = ("red", "nir", "swir 1")


def window() -> np.ndarray:
    values = np.random.default_rng(0).normal(300, 5, (7, 11, 3)).astype(np.float32)
    values[2, 3] = np.nan
    return values


def test_values_and_names_come_back_as_they_were() -> None:
    data = encode_values(window(), BANDS)
    assert is_bandfile(data)
    assert bands_of(data) == BANDS
    np.testing.assert_array_equal(decode_values(data), window())
    assert data == encode_values(window(), BANDS), "the same window is the same bytes"


def test_an_image_has_no_bands() -> None:
    assert bands_of(b"\x89PNG\r\n\x1a\n") is None


def test_a_damaged_file_is_a_reject() -> None:
    data = encode_values(window(), BANDS)
    with pytest.raises(Reject, match="decode: undecodable"):
        decode_values(data[: len(data) // 2])
    other = io.BytesIO()
    np.savez(other, values=np.zeros((2, 3), np.float64))
    with pytest.raises(Reject, match="float64 of 2 dimensions"):
        decode_values(other.getvalue())
    with pytest.raises(Reject, match="bands"):
        bands_of(other.getvalue())
