"""Bytes to an image, or to a reject that says what is wrong with them."""

import io
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from segray.errors import Reject

__all__ = ["FORMATS", "MAX_PIXELS", "Decoded", "decode", "decode_for"]

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")
"""What is tried, by Pillow's names. A phone's JPEG with further pictures behind it (MPO) is a JPEG."""

MAX_PIXELS = 178_956_970
"""That are decoded where nothing else is said: beyond them Pillow takes an image for an attack."""

_REDUCTIONS = (8, 4, 2)
_REDUCED_TO = 2  # times the side that is wanted, at least: what is averaged away is then too fine for it to show

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"II*\0", b"MM\0*", b"BM", b"GIF8")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_LYING = (5, 6, 7, 8)

# `decode_for` compares the header's size with its own limit before a pixel is allocated, for all
# formats alike; Pillow's limit would only warn up to twice its value.
Image.MAX_IMAGE_PIXELS = None


class Decoded(NamedTuple):
    """An image, perhaps in fewer pixels than it has."""

    pixels: UInt8[np.ndarray, "h w 3"]
    """Those that were made of it."""
    height: int
    """Its own, in pixels."""
    width: int
    """Likewise."""


def decode(data: bytes | memoryview, max_pixels: int) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes one image.

    EXIF orientation is applied. Grey, palette, CMYK and alpha become RGB (alpha is left out,
    not blended); 16-bit samples keep their upper 8 bits.

    Args:
        data: the file's bytes.
        max_pixels: images with more are rejected before they are decoded.

    Returns:
        (height, width, 3) uint8.

    Raises:
        Reject: empty, not an image, truncated or corrupt, animated, too many pixels, unsupported.
    """
    return decode_for(data, max_pixels, None).pixels


def decode_for(data: bytes | memoryview, max_pixels: int, side: int | None) -> Decoded:
    """Likewise, of an image whose shorter side is to be brought to a length.

    Of a JPEG of which a half, a quarter or an eighth is at least twice as long, and whole pixels, that is decoded: the
    inverse cosine transform then gives fewer pixels of each block, in a fraction of the time. Brought to the length,
    they differ from what all pixels give by less than a level of 255 in the mean.

    Args:
        data: as of `decode`.
        max_pixels: likewise, of the image itself.
        side: the length. None: it is to stay as it is.

    Raises:
        Reject: as `decode` does.
    """
    if not data:
        raise Reject("decode", "empty", "the file has 0 bytes")
    # What Pillow warns of (odd EXIF, text chunks, palettes) decides no pixel, and would come by the million.
    with warnings.catch_warnings(action="ignore"), _open(data) as image:
        num_pixels = image.width * image.height
        if num_pixels > max_pixels:
            raise Reject(
                "decode",
                "too many pixels",
                f"{image.width}×{image.height} is {num_pixels} pixels; --max-pixels is {max_pixels}",
            )
        try:
            num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if num_frames > 1:
                raise Reject("decode", "animated", f"a {image.format} of {num_frames} frames; give single images")
            pixels = _jpeg(data, image, side)
            if pixels is None:
                image.load()
                pixels = _to_rgb(_upright(image, _orientation(image)))
                return Decoded(pixels, *pixels.shape[:2])
            height, width, orientation = image.height, image.width, _orientation(image)
            if orientation in _UPRIGHT:
                pixels = np.asarray(_upright(Image.fromarray(pixels), orientation))
            return Decoded(pixels, *((width, height) if orientation in _LYING else (height, width)))
        except Reject:
            raise
        except Exception as error:  # as above: OSError, SyntaxError, struct.error, zlib.error, …
            raise _damaged(data, error) from error


def _open(data: bytes | memoryview) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        start = bytes(data[:8])
        if start.startswith(_SIGNATURES):
            raise Reject("decode", "corrupt", f"the header cannot be read; starts with {start!r}") from error
        raise Reject("decode", "not an image", f"none of {', '.join(FORMATS)}; starts with {start!r}") from error
    except Exception as error:  # a damaged header: Pillow's readers raise whatever they stumble over
        raise _damaged(data, error) from error


def _damaged(data: bytes | memoryview, error: Exception) -> Reject:
    # A RIFF file (WebP) says in its header how long it is; libwebp does not say that it is shorter.
    cut = bytes(data[:4]) == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little")
    kind = "truncated" if cut or "truncated" in str(error).lower() else "corrupt"
    return Reject("decode", kind, f"{type(error).__name__}: {error}")


def _jpeg(data: bytes | memoryview, image: Image.Image, side: int | None) -> UInt8[np.ndarray, "h w 3"] | None:
    """The pixels of a JPEG without a flaw, as Pillow gives them, in fewer copies, or fewer of them; None of others."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    octets = memoryview(data).cast("B")  # those of a column of Arrow are signed
    try:
        # A damaged one may tell its size twice.
        if simplejpeg.decode_jpeg_header(octets)[:2] != (image.height, image.width):
            return None
        by = _reduction(image.height, image.width, side)
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            octets, "RGB", min_height=image.height // by, min_width=image.width // by
        )
        return pixels
    except ValueError:  # what is wrong with it, and whether it can be decoded after all, Pillow says
        return None


def _reduction(height: int, width: int, side: int | None) -> int:
    """By how much an image may be smaller, of which the shorter side is to be brought to a length."""
    if side is not None:
        for by in _REDUCTIONS:
            # Of what is no whole number of pixels the last would be stretched, and all others moved a little.
            if height % by == width % by == 0 and min(height, width) >= by * _REDUCED_TO * side:
                return by
    return 1


def _orientation(image: Image.Image) -> int | None:
    try:
        orientation: int | None = image.getexif().get(ExifTags.Base.Orientation)
        return orientation
    except Exception:  # EXIF that cannot be read says nothing of orientation; the pixels are there
        return None


def _upright(image: Image.Image, orientation: int | None) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    if image.mode in ("F", "I"):
        numbers = "floating point" if image.mode == "F" else "32-bit or signed integers"
        raise Reject("decode", "unsupported", f"pixels are {numbers}; give 8 or 16-bit integers")
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    image.info.pop("transparency", None)  # left out like alpha; Pillow would warn that it is lost
    return np.asarray(image.convert("RGB"))
