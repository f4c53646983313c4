from collections.abc import Sequence

import numpy as np
import pytest

from segray.rgb import colours, stretched


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["blue", "green", "red", "nir"], [2, 1, 0]),
        (["nir", "Red", "Green", "Blue"], [1, 2, 3]),
        (["B8", "B4", "B3", "B2"], [0, 1, 2]),
        (["red", "nir"], [0, 0, 0]),
        (["pan"], [0, 0, 0]),
    ],
)
def test_bands_are_shown_in_their_colours_where_they_have_such_names(names: Sequence[str], expected: list[int]) -> None:
    assert colours(names) == expected


def test_the_middle_of_the_values_is_spread_and_what_is_not_valid_is_black() -> None:
    values = np.stack([np.arange(100.0).reshape(10, 10), np.full((10, 10), 7.0), 1000 * np.arange(100).reshape(10, 10)])
    valid = np.ones((10, 10), bool)
    valid[0, :2] = False
    seen = stretched(values.astype(np.float32), valid)
    assert (seen[~valid] == 0).all()
    assert (seen[valid][:, 1] == 128).all(), "a band of one value has no contrast"
    np.testing.assert_array_equal(seen[..., 0], seen[..., 2])
    assert (seen[valid][0, 0], seen[valid][-1, 0]) == (0, 255)
    assert (stretched(values.astype(np.float32), np.zeros((10, 10), bool)) == 0).all()
