"""Label maps as PNG that any viewer opens, in colour, and as masks of single classes."""

import io
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt, UInt8
from PIL import Image

from segray.classes import RGB

__all__ = ["class_mask", "colourise", "decode_png", "dtype_for", "encode_png"]


# Label maps are as large as the images were that `decode` let pass; Pillow would refuse large ones.
Image.MAX_IMAGE_PIXELS = None


def dtype_for(num_classes: int) -> type[np.uint8] | type[np.uint16]:
    """The dtype of label maps with so many classes: uint8 up to 256 of them, then uint16."""
    return np.uint8 if num_classes <= 256 else np.uint16


def encode_png(label_map: UInt[np.ndarray, "height width"], palette: Sequence[RGB] | None) -> bytes:
    """Encodes a label map, or a map of confidence, without loss.

    Args:
        label_map: (height, width) uint8, or uint16 beyond 256 classes.
        palette: a colour for each class; ids beyond it, such as void, are black. None: values are shades of grey.

    Returns:
        A palette PNG whose pixel values are the class ids; grey for uint16, and without a palette.
    """
    image = Image.fromarray(label_map)
    if palette is not None and label_map.dtype == np.uint8:
        # Pillow stores as few bits a pixel as the palette needs, and would fold ids beyond it (void) onto others.
        colours = np.zeros((max(len(palette), int(label_map.max(initial=0)) + 1), 3), np.uint8)
        colours[: len(palette)] = palette
        image.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    # Runs are what label maps are made of; to look for more takes three times as long and gains a fifth at most.
    image.save(buffer, "PNG", compress_type=-1 if palette is None else zlib.Z_RLE)
    return buffer.getvalue()


def decode_png(data: bytes) -> UInt[np.ndarray, "height width"]:
    """Decodes a label map: the pixel values of a grey or palette PNG, uint8 or uint16.

    Raises:
        ValueError: the image has colours instead of ids.
        OSError: the bytes are no image, or a truncated one.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.mode in ("L", "P", "1"):
            label_map = np.array(image)
            return label_map.astype(np.uint8)
        if image.mode.startswith("I"):
            return np.array(image).astype(np.uint16)
        raise ValueError(
            f"a label map is a grey or palette PNG whose pixel values are class ids, not one of mode {image.mode}"
        )


def colourise(
    label_map: UInt[np.ndarray, "height width"], palette: Sequence[RGB]
) -> UInt8[np.ndarray, "height width 3"]:
    """The label map in its classes' colours; ids beyond the palette are black."""
    lookup = np.zeros((np.iinfo(label_map.dtype).max + 1, 3), np.uint8)
    lookup[: len(palette)] = palette
    colours: np.ndarray = lookup[label_map]
    return colours


def class_mask(label_map: UInt[np.ndarray, "height width"], class_id: int) -> Bool[np.ndarray, "height width"]:
    """True where the label map holds this class."""
    return np.asarray(label_map == class_id)
