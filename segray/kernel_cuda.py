"""The tail of a network as a kernel of Triton, for GPUs: each pixel's logits in registers."""

import triton
import triton.language as tl
from jaxtyping import Float32, Int
from torch import Tensor

from segray.tail import LOG2_E, Grid, empty_maps, neighbours
from segray.tile import Window

__all__ = ["label"]

_BLOCK = 128


def label(
    logits: Float32[Tensor, "batch num_classes h w"], grid: Grid, window: Window
) -> tuple[Int[Tensor, "batch height width"], Float32[Tensor, "batch height width"]]:
    """A `tail.Tail`."""
    num_images, num_classes, h, w = logits.shape
    label_maps, confidence = empty_maps(num_images, num_classes, window, logits.device)
    _label[(window.height, triton.cdiv(window.width, _BLOCK), num_images)](
        logits,
        label_maps,
        confidence,
        *neighbours(h, grid.height, grid.align_corners, window.rows, logits.device),
        *neighbours(w, grid.width, grid.align_corners, window.cols, logits.device),
        num_classes,
        # Else one that is not finite would reach its neighbour, at weight 0.
        0 if (h, w) == (grid.height, grid.width) else 1,
        h,
        w,
        window.width,
        *logits.stride(),
        LOG2_E=LOG2_E,
        BLOCK=_BLOCK,
        enable_fp_fusion=False,  # a fused multiply-add would round otherwise than torch does
    )
    return label_maps, confidence


@triton.jit  # type: ignore[untyped-decorator]
def _label(  # type: ignore[no-untyped-def]
    logits,
    label_maps,
    confidence,
    tops,
    row_weights,
    lefts,
    column_weights,
    num_classes,
    step,
    h,
    w,
    width,
    image_stride,
    class_stride,
    row_stride,
    column_stride,
    LOG2_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    top = tl.load(tops + row)
    bottom = tl.minimum(top + step, h - 1)
    row_weight = tl.load(row_weights + row)
    left = tl.load(lefts + columns, mask=inside, other=0)
    right = tl.minimum(left + step, w - 1)
    column_weight = tl.load(column_weights + columns, mask=inside, other=0.0)
    logits += image * image_stride
    corners = (
        logits + top * row_stride + left * column_stride,
        logits + top * row_stride + right * column_stride,
        logits + bottom * row_stride + left * column_stride,
        logits + bottom * row_stride + right * column_stride,
    )
    best = _value(corners, 0, row_weight, column_weight)
    first = tl.zeros([BLOCK], dtype=tl.int32)
    for class_id in range(1, num_classes):
        value = _value(corners, tl.cast(class_id, tl.int64) * class_stride, row_weight, column_weight)
        first = tl.where(value > best, class_id, first)
        best = tl.maximum(value, best, propagate_nan=tl.PropagateNan.ALL)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for class_id in range(num_classes):
        value = _value(corners, tl.cast(class_id, tl.int64) * class_stride, row_weight, column_weight)
        total += tl.exp2((value - best) * LOG2_E)
    pixels = (image * tl.num_programs(0) + row) * width + columns
    tl.store(label_maps + pixels, first.to(label_maps.dtype.element_ty), mask=inside)
    tl.store(confidence + pixels, 1.0 / total, mask=inside)


@triton.jit
def _value(corners, offset, row_weight, column_weight):  # type: ignore[no-untyped-def]
    upper_left = tl.load(corners[0] + offset)
    upper = upper_left + column_weight * (tl.load(corners[1] + offset) - upper_left)
    lower_left = tl.load(corners[2] + offset)
    lower = lower_left + column_weight * (tl.load(corners[3] + offset) - lower_left)
    return upper + row_weight * (lower - upper)
