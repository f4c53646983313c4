"""The tail of a network: its coarse logits to classes and their probabilities, at full size.

Upsampled logits are a hundred times what is kept of them. So they are made a row at a time, in a core's first caches
(`kernel_cpu`), or on a GPU a pixel at a time in registers (`kernel_cuda`), or where neither can be compiled some rows
at a time (`blocked`), and never stand in memory as a whole. All compute in float32 and in one order, and give the same
classes to the last pixel:

- between neighbours a and b at weight w lies a + w (b - a), along columns first, then along rows; positions are
  those of `torch.nn.functional.interpolate`, bilinear, with or without aligned corners;
- the class is that of the largest, the first of equals;
- its probability is 1 / Σ 2^((logit - largest) log₂ e).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from segray.tile import Window

__all__ = ["LOG2_E", "Grid", "Tail", "blocked", "empty_maps", "neighbours"]

LOG2_E = math.log2(math.e)

_BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**26}  # on a CPU about what the caches hold


@dataclass(frozen=True, slots=True)
class Grid:
    """The pixels for which logits are meant, where these are coarser."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""
    align_corners: bool = False
    """Whether the outermost logits are the outermost pixels' own, as in `torch.nn.functional.interpolate`."""


Tail = Callable[[Float32[Tensor, "batch num_classes h w"], Grid, Window], tuple[Tensor, Tensor]]
"""Takes coarse logits of images of one size, their grid, and a window of it; gives of the window's pixels the class
(uint8, beyond 256 classes int32) and its probability (float32), both (batch, height, width). A pixel with a logit that
is NaN or infinite has the probability NaN."""


def blocked(
    logits: Float32[Tensor, "batch num_classes h w"], grid: Grid, window: Window
) -> tuple[Int[Tensor, "batch height width"], Float32[Tensor, "batch height width"]]:
    """A `Tail` of torch's own operations, on any device."""
    num_images, num_classes, h, w = logits.shape
    device = logits.device
    label_maps, confidence = empty_maps(num_images, num_classes, window, device)
    # The first of equals has the largest of these.
    falling = torch.arange(num_classes, 0, -1, dtype=torch.float32, device=device)[:, None]
    is_coarse = (h, w) != (grid.height, grid.width)
    if is_coarse:
        tops, row_weights = neighbours(h, grid.height, grid.align_corners, window.rows, device)
        lefts, column_weights = neighbours(w, grid.width, grid.align_corners, window.cols, device)
        row_weights, column_weights = (weights[:, None, None] for weights in (row_weights, column_weights))
        top, end = int(tops[0]), int(tops[-1]) + 2
        tops -= top
    num_rows = max(1, _BLOCK_BYTES[device.type] // (4 * num_classes * window.width))
    for of_image, label_map, probability in zip(logits, label_maps, confidence, strict=True):
        # Rows come first from here on, then classes: what is taken together then lies together.
        if is_coarse:
            some = of_image[:, top:end].permute(2, 1, 0).contiguous()
            steps = torch.diff(some, dim=0, append=some[-1:])
            some = steps.index_select(0, lefts).mul_(column_weights).add_(some.index_select(0, lefts))
            some = some.permute(1, 2, 0).contiguous()
            steps = torch.diff(some, dim=0, append=some[-1:])
        else:
            some = of_image[:, window.rows, window.cols].transpose(0, 1)
        for first in range(0, window.height, num_rows):
            rows = slice(first, min(first + num_rows, window.height))
            if is_coarse:
                block = some.index_select(0, tops[rows])
                block += steps.index_select(0, tops[rows]).mul_(row_weights[rows])
            else:
                block = some[rows].clone(memory_format=torch.contiguous_format)
            block -= block.amax(1, keepdim=True)
            torch.reciprocal((block * LOG2_E).exp2_().sum(1), out=probability[rows])
            # Of NaN none is equal to the largest.
            label_map[rows] = (num_classes - block.eq_(0).mul_(falling).amax(1)).clamp_(max=num_classes - 1)
    return label_maps, confidence


def empty_maps(
    num_images: int, num_classes: int, window: Window, device: torch.device
) -> tuple[Int[Tensor, "batch height width"], Float32[Tensor, "batch height width"]]:
    """What a `Tail` gives, to be filled."""
    shape = num_images, window.height, window.width
    dtype = torch.uint8 if num_classes <= 256 else torch.int32
    return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, device=device)


def neighbours(
    num_coarse: int, num_pixels: int, align_corners: bool, pixels: slice, device: torch.device
) -> tuple[Int64[Tensor, " pixels"], Float32[Tensor, " pixels"]]:
    """Of pixels along one axis the coarse position before each, and how far it is from there (at most 1).

    Args:
        num_coarse: positions.
        num_pixels: of the whole axis.
        align_corners: as in `Grid`.
        pixels: which.
        device: of what is given.
    """
    position = torch.arange(pixels.start, pixels.stop, dtype=torch.float64, device=device)
    if align_corners:
        position *= (num_coarse - 1) / max(num_pixels - 1, 1)
    else:
        position = ((position + 0.5) * (num_coarse / num_pixels) - 0.5).clamp_(min=0)
    before = position.floor().clamp_(max=num_coarse - 1)
    return before.long(), (position - before).clamp_(max=1).float()
