"""Image files that cannot be labelled, each with the kind of its reject."""

import io
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """The image as a file of that format, by Pillow's name."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """An RGB image in which every pixel is unlike its neighbours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG with any header, around bytes that stand for its zlib stream."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _patched(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


def awful_files() -> dict[str, tuple[bytes, str]]:
    """Each file's name, its bytes, and the kind of the reject that it must become (stage `decode`)."""
    image = noise(48, 64)
    other = noise(48, 64, seed=1)
    frames: dict[str, Any] = {"save_all": True, "append_images": [other]}
    jpeg, bmp = encoded(image, "JPEG"), encoded(image, "BMP")
    size_in_jpeg = jpeg.index(b"\xff\xc0") + 5
    whole_png = encoded(image, "PNG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("photo.jpg", jpeg)
    grey = np.full((48, 64), 200)
    files: dict[str, tuple[bytes, str]] = {
        f"truncated.{extension}": (data[: len(data) * 2 // 3], "truncated")
        for extension, data in {
            "jpg": jpeg,
            "png": whole_png,
            "tif": encoded(image, "TIFF"),
            "webp": encoded(image, "WEBP"),
            "bmp": bmp,
            "gif": encoded(image, "GIF"),
        }.items()
    }
    return files | {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"This was to be a photograph.\n" * 9, "not an image"),
        "page.png": (b"<!doctype html><title>403 Forbidden</title>", "not an image"),
        "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image"),
        "document.jpg": (encoded(image, "PDF"), "not an image"),
        "archive.jpg": (archive.getvalue(), "not an image"),
        "random.jpg": (np.random.default_rng(1).bytes(4096), "not an image"),
        "zeros.jpg": (bytes(4096), "not an image"),
        "portable.jpg": (encoded(image, "PPM"), "not an image"),
        "header-only.jpg": (jpeg[:20], "corrupt"),
        "without-scan.jpg": (jpeg[: jpeg.index(b"\xff\xda")], "corrupt"),
        "zero-size.jpg": (_patched(jpeg, size_in_jpeg, bytes(4)), "corrupt"),
        "bomb.jpg": (_patched(jpeg, size_in_jpeg, b"\xff\xff\xff\xff"), "too many pixels"),
        "flipped-byte.png": (_patched(whole_png, len(whole_png) // 2, b"\0\1\2\3\4\5\6\7"), "corrupt"),
        "bad-checksum.png": (_patched(whole_png, 29, b"\0\0\0\0"), "corrupt"),
        "not-deflated.png": (png(64, 48, b"no zlib stream at all"), "corrupt"),
        "without-pixels.png": (png(64, 48, zlib.compress(b"")), "truncated"),
        "zero-size.png": (png(0, 0, zlib.compress(b"")), "corrupt"),
        "bomb.png": (png(60_000, 60_000, zlib.compress(bytes(60_000))), "too many pixels"),
        "animated.gif": (encoded(image, "GIF", **frames), "animated"),
        "animated.png": (encoded(image, "PNG", **frames), "animated"),
        "animated.webp": (encoded(image, "WEBP", **frames), "animated"),
        "pages.tif": (encoded(image, "TIFF", **frames), "animated"),
        "float.tif": (encoded(Image.fromarray(grey.astype(np.float32)), "TIFF"), "unsupported"),
        "int32.tif": (encoded(Image.fromarray(grey.astype(np.int32)), "TIFF"), "unsupported"),
        "bomb.bmp": (_patched(bmp, 18, struct.pack("<ii", 2**30, 2**30)), "too many pixels"),
        "zero-size.bmp": (_patched(bmp, 18, bytes(8)), "corrupt"),
        "13-bits.bmp": (_patched(bmp, 28, struct.pack("<H", 13)), "corrupt"),
    }
