"""The tail of a network: its coarse logits to classes and their probabilities, at full size.

Upsampled logits are a hundred times what is kept of them. So they are made a few rows at a time, in the cores'
caches, or on a GPU a pixel at a time in registers (`kernel`), and never stand in memory as a whole. Both compute in
float32 and in one order, and give the same classes to the last pixel:

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

__all__ = ["LOG2_E", "Grid", "Tail", "blocked", "neighbours"]

LOG2_E = math.log2(math.e)

_BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**26}  # on a CPU about what the caches hold


@dataclass(frozen=True, slots=True)
class Grid:
    """The pixels for which logits are meant, where these are coarser."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""
    align_corners: bool = False
    """Whether the outermost logits are the outermost pixels' own, as in `torch.nn.functional.interpolate`."""


Tail = Callable[[Float32[Tensor, "num_classes h w"], Grid, Window], tuple[Tensor, Tensor]]
"""Takes coarse logits, their grid, and a window of it; gives of the window's pixels the class (uint8, beyond 256
classes int32) and its probability (float32), both (height, width). A pixel with a logit that is NaN or infinite has the
probability NaN."""


def blocked(
    logits: Float32[Tensor, "num_classes h w"], grid: Grid, window: Window
) -> tuple[Int[Tensor, "height width"], Float32[Tensor, "height width"]]:
    """A `Tail` of torch's own operations, on any device."""
    num_classes, h, w = logits.shape
    device = logits.device
    dtype = torch.uint8 if num_classes <= 256 else torch.int32
    label_map = torch.empty(window.height, window.width, dtype=dtype, device=device)
    confidence = torch.empty(window.height, window.width, device=device)
    # The first of equals has the largest of these.
    falling = torch.arange(num_classes, 0, -1, dtype=torch.float32, device=device).view(-1, 1, 1)
    is_coarse = (h, w) != (grid.height, grid.width)
    if is_coarse:
        tops, row_weights = neighbours(h, grid.height, grid.align_corners, window.rows, device)
        lefts, column_weights = neighbours(w, grid.width, grid.align_corners, window.cols, device)
        rights, column_weights = (lefts + 1).clamp_(max=w - 1), column_weights.float()
        row_weights = row_weights.float()[:, None]
        first_tops = tops.tolist()
    num_rows = max(1, _BLOCK_BYTES[device.type] // (4 * num_classes * window.width))
    for first in range(0, window.height, num_rows):
        rows = slice(first, min(first + num_rows, window.height))
        if is_coarse:
            top, bottom = first_tops[rows.start], first_tops[rows.stop - 1] + 2
            some = logits[:, top:bottom].contiguous()
            left = some.index_select(2, lefts)
            some = some.index_select(2, rights).sub_(left).mul_(column_weights).add_(left)
            steps = torch.diff(some, dim=1, append=some[:, -1:])
            block = some.index_select(1, tops[rows] - top)
            block += steps.index_select(1, tops[rows] - top).mul_(row_weights[rows])
        else:
            block = logits[:, window.row_off + rows.start : window.row_off + rows.stop, window.cols]
            block = block.clone(memory_format=torch.contiguous_format)
        block -= block.amax(0)
        torch.reciprocal((block * LOG2_E).exp2_().sum(0), out=confidence[rows])
        # Of NaN none is equal to the largest.
        label_map[rows] = (num_classes - block.eq_(0).mul_(falling).amax(0)).clamp_(max=num_classes - 1)
    return label_map, confidence


def neighbours(
    num_coarse: int, num_pixels: int, align_corners: bool, pixels: slice, device: torch.device
) -> tuple[Int64[Tensor, " pixels"], Tensor]:
    """Of pixels along one axis the coarse position before each, and how far it is from there (float64, below 1).

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
    return before.long(), (position - before).clamp_(max=1)
