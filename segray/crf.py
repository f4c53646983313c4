"""The fully connected CRF: a label goes over to pixels near by that have the same colour. Runs without Ray."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from segray.errors import SettingsError

__all__ = ["Crf", "refine"]

_CPU_BLOCK_BYTES = 2 * 2**20  # what a core's own cache holds
_GPU_BLOCK_BYTES = 256 * 2**20
_WEIGHTS_BYTES = 256 * 2**20

_Weights = Callable[[int, int, int, int], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crf:
    """The CRF of Krähenbühl and Koltun (2011) as DeepLab uses it (Chen et al., 2015), within a window.

    Two pixels i ≠ j at the positions p, with the colours c, pay for different labels (Potts) what
    two Gaussian kernels say:

        appearance_weight · exp(−|pᵢ − pⱼ|² / 2 theta_alpha² − |cᵢ − cⱼ|² / 2 theta_beta²)
        + smoothness_weight · exp(−|pᵢ − pⱼ|² / 2 theta_gamma²)

    Each kernel is normalised symmetrically, as in the authors' code: divided by √(nᵢ nⱼ), where nᵢ
    is its sum over all j in reach, i among them. In reach are pixels within a square window, as in
    the ConvCRF of Teichmann and Cipolla (2018). The weights and widths are those of DeepLab's
    ResNet-101 on Pascal VOC (Chen et al., 2017).

    Raises:
        SettingsError: a value is out of its bounds.
    """

    num_iterations: int = 5
    """Mean-field updates. DeepLab made 10; the label maps hardly change after 5."""
    appearance_weight: float = 4.0
    """How much pixels near by and of like colour count: the appearance kernel."""
    theta_alpha: float = 67.0
    """Width of that kernel in position, in pixels."""
    theta_beta: float = 3.0
    """Its width in colour, in levels from 0 to 255."""
    smoothness_weight: float = 3.0
    """How much pixels near by count, of whatever colour: the smoothness kernel."""
    theta_gamma: float = 1.0
    """Width of that kernel in position, in pixels."""
    radius: int = 5
    """Of the window, in pixels: 11×11, as in ConvCRF.

    It holds all of the smoothness kernel. Of the appearance kernel in street scenes it holds some
    6 %, over which the normalisation spreads its weight; four times the work would make that 12 %.
    """

    def __post_init__(self) -> None:
        for name in ("num_iterations", "radius"):
            if getattr(self, name) < 1:
                raise SettingsError(f"crf.{name} {getattr(self, name)}: must be at least 1")
        for name in ("appearance_weight", "smoothness_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingsError(f"crf.{name} {getattr(self, name)}: must be finite and at least 0")
        for name in ("theta_alpha", "theta_beta", "theta_gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"crf.{name} {getattr(self, name)}: must be finite and above 0")


def refine(
    logits: Float[Tensor, "num_classes height width"], image: UInt8[Tensor, "3 height width"], crf: Crf
) -> Float[Tensor, "num_classes height width"]:
    """Mean-field inference, in the dtype and on the device of the logits.

    Needs memory for three more arrays of their size, and up to 256 MiB.

    Args:
        logits: the unary term; any constant may be added to a pixel's.
        image: the same pixels, RGB.
        crf: the parameters.

    Returns:
        Probabilities.
    """
    num_classes, height, width = logits.shape
    radius = min(crf.radius, max(height, width) - 1)

    def laid_out(planes: Tensor) -> Tensor:
        """Rows laid end to end, with nothing around the image: a neighbour is at one distance from all pixels."""
        return F.pad(planes, (radius,) * 4).flatten(1)

    row = width + 2 * radius
    # Of each pair of opposite neighbours the one that comes later.
    neighbours = [
        (dy * row + dx, dy * dy + dx * dx)
        for dy in range(radius + 1)
        for dx in range(-radius, radius + 1)
        if (dy, dx) > (0, 0)
    ]
    inside = laid_out(logits.new_ones(1, height, width))[0]
    colours = laid_out(image.to(logits.dtype) / (math.sqrt(2) * crf.theta_beta))
    first = radius * row + radius
    last = len(inside) - first
    block_bytes = _CPU_BLOCK_BYTES if logits.device.type == "cpu" else _GPU_BLOCK_BYTES
    block = max(1, block_bytes // (num_classes * logits.element_size()))
    blocks = [(start, min(start + block, last)) for start in range(first, last, block)]

    # Kernels of the pixels from `start` to `stop` with those that come `distance` later.

    def appearance(start: int, stop: int, distance: int, squared: int) -> Tensor:
        differences = (colours[:, start + distance : stop + distance] - colours[:, start:stop]).square_()
        exponent = differences[0].add_(differences[1]).add_(differences[2])
        return exponent.add_(squared / (2 * crf.theta_alpha**2)).neg_().exp_()

    def smoothness(start: int, stop: int, distance: int, squared: int) -> Tensor:
        return inside.new_tensor(math.exp(-squared / (2 * crf.theta_gamma**2))).expand(stop - start)

    def add_messages(totals: Tensor, planes: Tensor, kernel: _Weights, start: int, stop: int) -> Tensor:
        for distance, squared in neighbours:
            weights = kernel(start - distance, stop, distance, squared)
            totals.addcmul_(weights[distance:], planes[:, start + distance : stop + distance])
            totals.addcmul_(weights[: stop - start], planes[:, start - distance : stop - distance])
        return totals

    def share(kernel: _Weights, weight: float) -> Tensor:
        """What a pixel brings into the normalised and weighted kernel; 0 outside the image."""
        sums = torch.ones_like(inside)
        for start, stop in blocks:
            add_messages(sums[None, start:stop], inside[None], kernel, start, stop)
        return inside * math.sqrt(weight) / sums.sqrt()

    appearance_share = share(appearance, crf.appearance_weight)
    smoothness_share = share(smoothness, crf.smoothness_weight)

    def both(start: int, stop: int, distance: int, squared: int) -> Tensor:
        here, there = slice(start, stop), slice(start + distance, stop + distance)
        weights = appearance(start, stop, distance, squared)
        weights.mul_(appearance_share[here]).mul_(appearance_share[there])
        near = math.exp(-squared / (2 * crf.theta_gamma**2))
        return weights.addcmul_(smoothness_share[here], smoothness_share[there], value=near)

    # A block's weights begin a distance before it, for its messages from there.
    num_weights = sum(len(inside) + distance * len(blocks) for distance, _ in neighbours)
    kernel = functools.cache(both) if num_weights * logits.element_size() <= _WEIGHTS_BYTES else both
    unary = laid_out(logits)
    probabilities, updated = unary.softmax(0), torch.zeros_like(unary)
    for _ in range(crf.num_iterations):
        for start, stop in blocks:
            totals = add_messages(unary[:, start:stop].clone(), probabilities, kernel, start, stop)
            updated[:, start:stop] = totals.softmax(0)
        probabilities, updated = updated, probabilities
    planes = probabilities.view(num_classes, height + 2 * radius, row)
    return planes[:, radius : radius + height, radius : radius + width]
