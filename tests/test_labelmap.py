import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from segray.labelmap import class_mask, colourise, decode_png, dtype_for, encode_png

PALETTE = [(0, 0, 0), (200, 30, 40), (10, 220, 60), (90, 90, 255)]
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)


@settings(deadline=None)
@given(hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, 3)))
def test_roundtrip_of_8_bits(label_map: np.ndarray) -> None:
    decoded = decode_png(encode_png(label_map, PALETTE))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, label_map)


@settings(deadline=None)
@given(hnp.arrays(np.uint16, SHAPES))
def test_roundtrip_of_16_bits(label_map: np.ndarray) -> None:
    decoded = decode_png(encode_png(label_map, PALETTE))
    assert decoded.dtype == np.uint16
    np.testing.assert_array_equal(decoded, label_map)


@settings(deadline=None)
@given(hnp.arrays(np.uint8, SHAPES))
def test_ids_beyond_the_palette_survive(label_map: np.ndarray) -> None:
    """Void in a target is 255, whatever the number of colours."""
    np.testing.assert_array_equal(decode_png(encode_png(label_map, PALETTE)), label_map)


def test_the_png_opens_in_colour() -> None:
    label_map = np.array([[0, 1], [2, 3]], np.uint8)
    with Image.open(io.BytesIO(encode_png(label_map, PALETTE))) as image:
        assert image.format == "PNG"
        assert image.mode == "P"
        palette = image.getpalette("RGB")
        assert palette is not None
        assert palette[:12] == [channel for colour in PALETTE for channel in colour]
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colourise(label_map, PALETTE))


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_grey_and_palette_pngs_are_decoded(mode: str) -> None:
    ids = np.array([[0, 1, 1], [1, 0, 0]], np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(ids.astype(bool) if mode == "1" else ids)
    if mode == "P":
        image.putpalette(bytes(range(6)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    np.testing.assert_array_equal(decode_png(buffer.getvalue()), ids)


def test_colour_images_are_no_label_maps() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="mode RGB"):
        decode_png(buffer.getvalue())


def test_colourise_draws_ids_beyond_the_palette_black() -> None:
    colours = colourise(np.array([[1, 2, 9]], np.uint16), PALETTE)
    assert colours.dtype == np.uint8
    assert colours.tolist() == [[[200, 30, 40], [10, 220, 60], [0, 0, 0]]]


@settings(deadline=None)
@given(hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, 3)))
def test_masks_part_the_image(label_map: np.ndarray) -> None:
    masks = [class_mask(label_map, class_id) for class_id in range(4)]
    assert all(mask.dtype == np.bool_ for mask in masks)
    assert (np.sum(masks, axis=0) == 1).all()


def test_dtype_follows_the_number_of_classes() -> None:
    assert dtype_for(256) is np.uint8
    assert dtype_for(257) is np.uint16
