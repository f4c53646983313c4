"""What an image and its target go through in training: a crop of another scale, mirrored, turned and recoloured."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer, UInt8
from PIL import Image, ImageFilter

from segray.errors import SettingsError

__all__ = ["Augmentation", "augment"]

_TRIES = 10
_MIN_BLUR, _MAX_BLUR = 0.1, 2.0
_BLUR_SIDE = 11  # of the kernel, in pixels; 5 on either side are two and a half of the largest deviation
_MIN_COVER = 0.499

_Image = UInt8[np.ndarray, "height width 3"] | Float32[np.ndarray, "height width bands"]
_Target = Integer[np.ndarray, "height width"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """How pairs are varied, anew in each epoch.

    Raises:
        SettingsError: a setting is out of its bounds.
    """

    crop: int = 256
    """Side in pixels of the square that the model is shown."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Least and largest factor by which an image is scaled; 1 1 leaves it as it is."""
    class_share: float = 0.75
    """A crop of whose valid pixels one class has more is cut anew, up to ten times. 1: the first is taken."""
    flip: float = 0.5
    """Probability of being mirrored left to right."""
    rotation: float = 10.0
    """Largest angle in degrees by which it is turned, either way; 180 for what has no upright, as seen from above."""
    colour: float = 0.3
    """Largest change of brightness, contrast and saturation, as a share. Of bands, whose units may be any: contrast,
    and brightness as a share of each band's spread in the crop, alike in all of them."""
    blur: float = 0.1
    """Probability of a Gaussian blur, of 0.1 to 2 pixels."""

    def __post_init__(self) -> None:
        if self.crop < 1:
            raise SettingsError(f"--crop {self.crop} must be at least 1")
        least, largest = self.scale
        if not 0 < least <= largest < math.inf:
            raise SettingsError(f"--scale {least} {largest}: give the least and the largest factor, finite and above 0")
        for name, value, bound in (
            ("class-share", self.class_share, 1.0),
            ("flip", self.flip, 1.0),
            ("rotation", self.rotation, 180.0),
            ("colour", self.colour, 1.0),
            ("blur", self.blur, 1.0),
        ):
            if not 0 <= value <= bound:
                raise SettingsError(f"--{name} {value} must lie between 0 and {bound:g}")
        if self.class_share == 0:
            raise SettingsError("--class-share 0.0 must be above 0")


def augment(
    image: _Image, target: _Target, settings: Augmentation, ignore_index: int, seed: int, resize: int | None = None
) -> tuple[UInt8[np.ndarray, "crop crop 3"] | Float32[np.ndarray, "crop crop bands"], Integer[np.ndarray, "crop crop"]]:
    """Cuts a square out of an image and its target, and changes both.

    Only the window that the crop needs is scaled. What lies beyond the image is black, before it is recoloured, or of
    bands without data; and void in the target.

    Args:
        image: (height, width, 3) uint8 RGB; of a scene's window (height, width, bands) float32, NaN where there are no
            data, which is not mixed into what lies beside.
        target: (height, width) class ids.
        settings: what may happen.
        ignore_index: the id of void.
        seed: decides what does.
        resize: pixels of the shorter side to which an image is brought first. None: it stays as it is.

    Returns:
        (crop, crop, channels) of the image's dtype, and (crop, crop) of the target's, or of a wider one where void does
        not fit it; targets are scaled and turned without mixing ids.
    """
    # torch takes seconds to import, and `--help` of the job that has these settings waits for none of them.
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as TF

    # Void may be an id for which the target's own dtype has no room.
    target = target.astype(np.promote_types(target.dtype, np.min_scalar_type(ignore_index)), copy=False)
    rng = np.random.default_rng(seed)
    least, largest = settings.scale
    scale = math.exp(rng.uniform(math.log(least), math.log(largest)))
    if resize is not None:
        scale *= resize / min(target.shape)
    angle = rng.uniform(-settings.rotation, settings.rotation)
    turned = math.radians(angle)
    # So much is cut out that after turning no corner of the crop is empty.
    side = math.ceil(settings.crop * (abs(math.cos(turned)) + abs(math.sin(turned))) - 1e-9)
    window = max(1, round(side / scale))
    image, target = _window(image, target, window, settings.class_share, ignore_index, rng)

    is_of_bands = image.dtype == np.float32
    # Pillow's images, as torchvision turns and recolours them several times faster than tensors on one core.
    pixels: Any = _planes(image) if is_of_bands else Image.fromarray(image)
    ids: Any = Image.fromarray(target.astype(np.int32))
    if window != side:
        pixels = TF.resize(pixels, [side, side], v2.InterpolationMode.BILINEAR, antialias=True)
        ids = TF.resize(ids, [side, side], v2.InterpolationMode.NEAREST)
    if angle:
        pixels = TF.rotate(pixels, angle, v2.InterpolationMode.BILINEAR)
        ids = TF.rotate(ids, angle, v2.InterpolationMode.NEAREST, fill=ignore_index)
    pixels, ids = (TF.center_crop(some, [settings.crop, settings.crop]) for some in (pixels, ids))
    if rng.random() < settings.flip:
        pixels, ids = TF.horizontal_flip(pixels), TF.horizontal_flip(ids)
    changes = [rng.uniform(1 - settings.colour, 1 + settings.colour) for _ in range(3)] if settings.colour else []
    sigma = rng.uniform(_MIN_BLUR, _MAX_BLUR) if rng.random() < settings.blur else None
    label_map = np.array(ids).astype(target.dtype)
    if is_of_bands:
        values = _values(pixels if sigma is None else TF.gaussian_blur(pixels, _BLUR_SIDE, sigma))
        label_map[np.isnan(values[:, :, 0])] = ignore_index
        return _relit(values, *changes[:2]) if changes else values, label_map
    for adjust, factor in zip((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation), changes, strict=False):
        pixels = adjust(pixels, factor)
    if sigma is not None:
        pixels = pixels.filter(ImageFilter.GaussianBlur(sigma))
    return np.array(pixels), label_map


def _planes(values: Float32[np.ndarray, "height width bands"]) -> Any:
    """A tensor: each band, 0 where there are no data, and where there are any; both may be averaged."""
    import torch

    valid = np.isfinite(values).all(axis=2, keepdims=True)
    planes = np.concatenate([np.where(valid, values, np.float32(0)), valid.astype(np.float32)], axis=2)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(planes, 2, 0)))


def _values(planes: Any) -> Float32[np.ndarray, "height width bands"]:
    """The inverse of `_planes`; of what was averaged at least half has to have data."""
    array = np.moveaxis(planes.numpy(), 0, 2)
    values, cover = array[:, :, :-1], array[:, :, -1:]
    restored: np.ndarray = np.divide(values, cover, out=np.full_like(values, np.nan), where=cover >= _MIN_COVER)
    return restored


def _relit(
    values: Float32[np.ndarray, "height width bands"], brightness: float, contrast: float
) -> Float32[np.ndarray, "height width bands"]:
    """Values about their band's mean in the crop, which moves by so much of the band's standard deviation."""
    there = values[np.isfinite(values[:, :, 0])]
    if not len(there):
        return values
    mean, std = there.mean(axis=0, dtype=np.float64), there.std(axis=0, dtype=np.float64)
    relit: np.ndarray = ((values - mean) * contrast + mean + (brightness - 1) * std).astype(np.float32)
    return relit


def _window(
    image: _Image, target: _Target, size: int, class_share: float, ignore_index: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "size size 3"] | Float32[np.ndarray, "size size bands"], Integer[np.ndarray, "size size"]]:
    """A square of an image and its target; where they are smaller, they lie somewhere in it."""
    height, width = target.shape

    def cut() -> tuple[int, int, _Target]:
        # Negative where the image is smaller than the window.
        row, col = (int(rng.integers(min(0, length - size), max(0, length - size) + 1)) for length in (height, width))
        return row, col, target[max(row, 0) : row + size, max(col, 0) : col + size]

    row, col, part = cut()
    for _ in range(_TRIES if class_share < 1 else 0):
        coarse = part[:: max(1, size // 64), :: max(1, size // 64)]
        counts = np.bincount(coarse[coarse != ignore_index])
        if counts.size and counts.max() <= class_share * counts.sum():
            break
        row, col, part = cut()
    image = image[max(row, 0) : row + size, max(col, 0) : col + size]
    before = max(-row, 0), max(-col, 0)
    padding = [(first, size - length - first) for first, length in zip(before, part.shape, strict=True)]
    if any(map(any, padding)):
        image = np.pad(image, [*padding, (0, 0)], constant_values=np.nan if image.dtype == np.float32 else 0)
        part = np.pad(part, padding, constant_values=ignore_index)
    return np.ascontiguousarray(image), part
