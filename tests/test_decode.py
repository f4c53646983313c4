import io
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import resize

from segray.decode import Decoded, decode, decode_for
from segray.demo import scene
from segray.errors import Reject
from tests.awful import awful_files, encoded, noise, png

MAX_PIXELS = 178_956_970
AWFUL = awful_files()
JPEG, PNG = encoded(noise(20, 30), "JPEG"), encoded(noise(20, 30), "PNG")
WHOLE = {
    "JPEG": JPEG,
    "progressive": encoded(noise(20, 30), "JPEG", progressive=True),
    "PNG": PNG,
    "TIFF": encoded(noise(20, 30), "TIFF", compression="tiff_lzw"),
    "WEBP": encoded(noise(20, 30), "WEBP"),
    "BMP": encoded(noise(20, 30), "BMP"),
    "GIF": encoded(noise(20, 30), "GIF"),
}
sizes = st.integers(1, 40)


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def assert_is_image(pixels: np.ndarray, height: int, width: int) -> None:
    assert pixels.dtype == np.uint8
    assert pixels.shape == (height, width, 3)
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize("side", [None, 2])
@pytest.mark.parametrize("name", AWFUL)
def test_an_awful_file_is_a_reject_of_its_kind(name: str, side: int | None) -> None:
    data, kind = AWFUL[name]
    with warnings.catch_warnings(), pytest.raises(Reject) as caught:
        warnings.simplefilter("error")
        decode_for(data, MAX_PIXELS, side)
    assert (caught.value.stage, caught.value.kind) == ("decode", kind)
    assert caught.value.detail
    assert "\n" not in caught.value.reason


def test_awful_files_are_of_many_kinds() -> None:
    assert len(AWFUL) >= 30
    assert {kind for _, kind in AWFUL.values()} == {
        *("truncated", "empty", "not an image", "corrupt", "too many pixels", "animated", "unsupported")
    }


def test_too_many_pixels_says_how_many_and_what_the_limit_is() -> None:
    with pytest.raises(Reject, match="30×20 is 600 pixels; --max-pixels is 599"):
        decode(PNG, 599)
    assert_is_image(decode(PNG, 600), 20, 30)


@given(sizes, sizes, st.sampled_from(["PNG", "BMP", "TIFF"]))
@example(1, 1, "PNG")
@example(1, 40, "BMP")
@example(40, 1, "TIFF")
@settings(deadline=None, max_examples=40)
def test_lossless_formats_give_the_pixels_back_at_any_size(height: int, width: int, image_format: str) -> None:
    image = noise(height, width)
    pixels = decode(encoded(image, image_format), MAX_PIXELS)
    assert_is_image(pixels, height, width)
    np.testing.assert_array_equal(pixels, np.asarray(image))


@given(
    sizes,
    sizes,
    st.sampled_from(["RGB", "L"]),
    st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    st.booleans(),
    st.booleans(),
    st.integers(20, 100),
)
@settings(deadline=None, max_examples=60)
def test_jpeg_has_the_very_pixels_that_pillow_gives(
    height: int, width: int, mode: str, subsampling: str, progressive: bool, keep_rgb: bool, quality: int
) -> None:
    image = noise(height, width).resize((3 * width, 2 * height), Image.Resampling.BICUBIC).convert(mode)
    keeps = {"keep_rgb": True} if keep_rgb and mode == "RGB" else {"subsampling": subsampling}
    data = encoded(image, "JPEG", progressive=progressive, quality=quality, **keeps)
    pixels = decode(memoryview(data), MAX_PIXELS)
    assert_is_image(pixels, 2 * height, 3 * width)
    np.testing.assert_array_equal(pixels, rgb(Image.open(io.BytesIO(data))))


def test_a_jpeg_in_a_column_does_not_go_through_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decode(JPEG, MAX_PIXELS)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", pytest.fail)
    [scalar] = pa.array([JPEG], pa.large_binary())
    np.testing.assert_array_equal(decode(memoryview(scalar.as_buffer()), MAX_PIXELS), expected)


@given(sizes, sizes, st.booleans(), st.sampled_from(["RGB", "L"]))
@example(1, 1, True, "RGB")
@settings(deadline=None, max_examples=30)
def test_jpeg_is_decoded_at_any_size(height: int, width: int, progressive: bool, mode: str) -> None:
    # A ramp, which JPEG keeps almost as it is.
    ramp = np.add.outer(np.arange(height) * 2, np.arange(width) * 3).astype(np.uint8)
    image = Image.fromarray(np.repeat(ramp[:, :, None], 3, axis=2)).convert(mode)
    pixels = decode(encoded(image, "JPEG", quality=95, subsampling=0, progressive=progressive), MAX_PIXELS)
    assert_is_image(pixels, height, width)
    assert np.abs(pixels.astype(int) - rgb(image)).max() <= 8


@pytest.mark.parametrize("options", [{"lossless": True}, {"lossless": True, "method": 0}])
def test_lossless_webp_gives_the_pixels_back(options: dict[str, object]) -> None:
    image = noise(31, 17)
    np.testing.assert_array_equal(decode(encoded(image, "WEBP", **options), MAX_PIXELS), np.asarray(image))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA", "CMYK", "P"])
def test_tiff_of_8_bits_gives_the_pixels_back(compression: str | None, mode: str) -> None:
    image = noise(9, 13).convert(mode)
    pixels = decode(encoded(image, "TIFF", compression=compression), MAX_PIXELS)
    assert_is_image(pixels, 9, 13)
    np.testing.assert_array_equal(pixels, rgb(image))


@pytest.mark.parametrize("image_format", ["TIFF", "PNG"])
@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_16_bit_grey_keeps_its_upper_8_bits(image_format: str, byte_order: str) -> None:
    samples = np.random.default_rng(0).integers(0, 2**16, (9, 13)).astype(np.uint16)
    if image_format == "PNG":
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
        data = png(13, 9, zlib.compress(rows), depth=16, colour=0)
    else:
        image = Image.fromarray(samples.astype(byte_order))
        assert image.mode == {"<u2": "I;16", ">u2": "I;16B"}[byte_order]
        data = encoded(image, "TIFF")
    pixels = decode(data, MAX_PIXELS)
    assert_is_image(pixels, 9, 13)
    np.testing.assert_array_equal(pixels, np.repeat((samples >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_16_bit_colour_keeps_its_upper_8_bits() -> None:
    samples = np.random.default_rng(0).integers(0, 2**16, (9, 13, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    pixels = decode(png(13, 9, zlib.compress(rows), depth=16, colour=2), MAX_PIXELS)
    np.testing.assert_array_equal(pixels, (samples >> 8).astype(np.uint8))


def test_alpha_is_left_out_and_not_blended() -> None:
    image = noise(9, 13)
    alpha = Image.fromarray(np.random.default_rng(2).integers(0, 256, (9, 13), np.uint8))
    with_alpha = image.copy()
    with_alpha.putalpha(alpha)
    np.testing.assert_array_equal(decode(encoded(with_alpha, "PNG"), MAX_PIXELS), np.asarray(image))
    grey = image.convert("L")
    with_alpha = grey.copy()
    with_alpha.putalpha(alpha)
    assert with_alpha.mode == "LA"
    np.testing.assert_array_equal(decode(encoded(with_alpha, "PNG"), MAX_PIXELS), rgb(grey))


@pytest.mark.parametrize("transparency", [None, 3, bytes([0, 128, 255, 7])])
@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_a_palette_becomes_its_colours_with_transparency_left_out(
    transparency: int | bytes | None, image_format: str
) -> None:
    if isinstance(transparency, bytes) and image_format == "GIF":
        pytest.skip("GIF has one transparent colour")
    ids = np.random.default_rng(0).integers(0, 4, (9, 13), np.uint8)
    colours = np.array([(0, 0, 0), (255, 0, 0), (1, 2, 3), (200, 150, 100)], np.uint8)
    image = Image.fromarray(ids)
    image.putpalette(colours.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    data = encoded(image, image_format, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(data, MAX_PIXELS)
    assert_is_image(pixels, 9, 13)
    np.testing.assert_array_equal(pixels, colours[ids])


@pytest.mark.parametrize("transparency", [17, None])
def test_1_bit_and_grey_png_become_grey(transparency: int | None) -> None:
    options = {} if transparency is None else {"transparency": transparency}
    grey = noise(9, 13).convert("L")
    np.testing.assert_array_equal(decode(encoded(grey, "PNG", **options), MAX_PIXELS), rgb(grey))
    bits = noise(9, 13).convert("1")
    np.testing.assert_array_equal(decode(encoded(bits, "PNG"), MAX_PIXELS), rgb(bits))


def test_cmyk_jpeg_is_ink_even_though_adobe_writes_it_inverted() -> None:
    colours = {(255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 0): (255, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
    for ink, colour in colours.items():
        data = encoded(Image.new("CMYK", (16, 8), ink), "JPEG", quality=95)
        assert b"Adobe" in data
        pixels = decode(data, MAX_PIXELS)
        assert_is_image(pixels, 8, 16)
        assert np.abs(pixels.astype(int) - colour).max() <= 3, ink


# How an upright image was stored by a camera held in each of EXIF's eight ways.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_is_applied(orientation: int, image_format: str) -> None:
    upright = np.kron(np.asarray(noise(2, 3)), np.ones((16, 16, 1), np.uint8))
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, dict[str, Any]] = {
        "PNG": {},
        "TIFF": {},
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 100, "subsampling": 0},
    }
    pixels = decode(encoded(stored, image_format, exif=exif, **options[image_format]), MAX_PIXELS)
    assert_is_image(pixels, 32, 48)
    assert np.abs(pixels.astype(int) - upright).max() <= (4 if image_format == "JPEG" else 0)


def brought_to(pixels: np.ndarray, side: int) -> np.ndarray:
    """As a model is fed it."""
    resized: np.ndarray = resize(torch.from_numpy(pixels.copy()).permute(2, 0, 1), [side], antialias=True).numpy()
    return resized.astype(int)


def assert_reduced(reduced: Decoded, whole: np.ndarray, side: int) -> None:
    """That it has fewer pixels, and as many as it should, which give the model what all would."""
    assert (reduced.height, reduced.width) == whole.shape[:2]
    shorter = min(reduced.pixels.shape[:2])
    assert 2 * side <= shorter < min(whole.shape[:2])
    difference = np.abs(brought_to(reduced.pixels, side) - brought_to(whole, side))
    assert difference.mean() < 1


@pytest.mark.parametrize("orientation", STORED)
def test_a_jpeg_that_is_to_be_smaller_is_decoded_to_fewer_pixels(orientation: int) -> None:
    image = Image.fromarray(scene(0)[0]).resize((640, 480), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for options in ({"quality": 92}, {"quality": 75, "progressive": True}, {"quality": 92, "subsampling": 0}):
        data = encoded(image, "JPEG", exif=exif, **options)
        assert_reduced(decode_for(data, MAX_PIXELS, 96), decode(data, MAX_PIXELS), 96)


def test_grey_photographs_are_decoded_to_fewer_pixels_too() -> None:
    data = encoded(Image.fromarray(scene(0)[0]).resize((640, 480)).convert("L"), "JPEG")
    assert_reduced(decode_for(data, MAX_PIXELS, 60), decode(data, MAX_PIXELS), 60)


@pytest.mark.parametrize("side", [130, 520])
def test_a_real_photograph_is_decoded_to_fewer_pixels(side: int, field_photo: Path) -> None:
    data = field_photo.read_bytes()
    assert_reduced(decode_for(data, MAX_PIXELS, side), decode(data, MAX_PIXELS), side)


@pytest.mark.parametrize(
    ("image_format", "height", "side"),
    [("JPEG", 32, 9), ("JPEG", 32, 100), ("JPEG", 33, 2), ("PNG", 32, 2), ("WEBP", 32, 2)],
)
def test_what_would_be_too_small_or_moved_and_other_formats_keep_all_pixels(
    image_format: str, height: int, side: int
) -> None:
    data = encoded(noise(height, 40), image_format)
    decoded = decode_for(data, MAX_PIXELS, side)
    assert (decoded.height, decoded.width) == (height, 40)
    np.testing.assert_array_equal(decoded.pixels, decode(data, MAX_PIXELS))


def test_the_bound_of_pixels_is_of_those_that_an_image_has() -> None:
    with pytest.raises(Reject, match="too many pixels"):
        decode_for(encoded(noise(64, 64), "JPEG"), 64 * 64 - 1, 8)


@pytest.mark.parametrize("exif", [b"Exif\0\0no tags at all", b"Exif\0\0MM\0\x2a\xff\xff\xff\xff", b"Exif\0\0"])
def test_exif_that_cannot_be_read_costs_no_image(exif: bytes) -> None:
    np.testing.assert_array_equal(
        decode(encoded(noise(8, 8), "JPEG", exif=exif), MAX_PIXELS), decode(encoded(noise(8, 8), "JPEG"), MAX_PIXELS)
    )


def test_a_phones_jpeg_with_further_pictures_is_its_first() -> None:
    first = noise(24, 32)
    data = encoded(first, "MPO", save_all=True, append_images=[noise(24, 32, seed=1)])
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, getattr(image, "n_frames", 1)) == ("MPO", 2)
    np.testing.assert_array_equal(decode(data, MAX_PIXELS), decode(encoded(first, "JPEG"), MAX_PIXELS))


@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1, exclude_max=True))
@example("JPEG", 0.999)
@example("PNG", 0.999)
@settings(deadline=None, max_examples=100)
def test_a_file_cut_anywhere_is_a_reject_or_whole(name: str, where: float) -> None:
    data = WHOLE[name]
    try:
        pixels = decode(data[: int(where * len(data))], MAX_PIXELS)
    except Reject as reject:
        assert reject.kind in {"empty", "not an image", "corrupt", "truncated"}
    else:
        np.testing.assert_array_equal(pixels, decode(data, MAX_PIXELS))


@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_flipped_bytes_raise_nothing_but_rejects(name: str, flips: list[tuple[float, int]], in_header: bool) -> None:
    data = bytearray(WHOLE[name])
    reach = min(64, len(data)) if in_header else len(data)
    for where, value in flips:
        data[int(where * reach)] = value
    try:
        pixels = decode(bytes(data), 100_000)
    except Reject as reject:
        assert reject.kind and reject.detail
    else:
        assert_is_image(pixels, *pixels.shape[:2])
        assert pixels.shape[0] * pixels.shape[1] <= 100_000
