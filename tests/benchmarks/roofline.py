"""What a model must do for an image, what the machine can do, and how far a forward pass is from that.

FLOPs are those of the convolutions, as torch counts them; bytes are each convolution's input, output and weights, once
(what lies between two of them may be fused into either). The ceilings are measured with the same threads: of a product
of large square matrices, and of a copy of a large tensor. A convolution takes at least the longer of its FLOPs at the
one and its bytes at the other; their sum is the floor. No law forbids to pass it, as caches keep a part of what moves.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import eager

NUM_ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """What one convolution does for an image."""

    num_flops: int
    """A product and a sum are two."""
    num_values: int
    """In its input, its output and, by the batch, its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the machine can do."""

    flops_per_second: float
    """Of a matrix product."""
    bytes_per_second: float
    """Read and written by a copy."""


def convolutions(name: str, height: int, width: int) -> list[Convolution]:
    """Of a model, for an image of this size."""
    with torch.device("meta"):
        model, images = eager.bare(name), torch.empty(1, 3, height, width)
    num_values: dict[str, int] = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):

            def count(layer: nn.Module, fed: tuple[Tensor], output: Tensor, layer_name: str = layer_name) -> None:
                weights = sum(parameter.numel() for parameter in layer.parameters())
                num_values[layer_name] = fed[0].numel() + output.numel() + weights // eager.BATCH_SIZE

            layer.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(images)
    flops = counter.get_flop_counts()
    return [
        Convolution(num_flops=sum(flops[f"{type(model).__name__}.{layer_name}"].values()), num_values=number)
        for layer_name, number in num_values.items()
    ]


def ceilings(device: str, threads: int, dtype: str) -> Ceilings:
    """Measures them."""
    torch.set_num_threads(threads)
    of_dtype = getattr(torch, dtype)
    side, num_bytes = (8192, 2**32) if device == "cuda" else (2048, 2**28)
    left, right = torch.randn(2, side, side, device=device).to(of_dtype)
    product = best_seconds(lambda: left @ right, device)
    there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    other = torch.empty_like(there)
    copy = best_seconds(lambda: other.copy_(there), device)
    return Ceilings(flops_per_second=2 * side**3 / product, bytes_per_second=2 * num_bytes / copy)


def eager_milliseconds(way: eager.Way, device: str, height: int, width: int) -> float:
    """Of the plain forward pass in float32 to its full-size logits, for an image."""
    model = eager.build(way).to(device)
    values = torch.randn(eager.BATCH_SIZE, 3, height, width, device=device)
    with torch.inference_mode():
        return 1000 * best_seconds(lambda: model(values), device) / eager.BATCH_SIZE


def floor_milliseconds(convolutions: list[Convolution], ceilings: Ceilings, dtype: str) -> float:
    """For an image."""
    size: int = getattr(torch, dtype).itemsize
    return 1000 * sum(
        max(one.num_flops / ceilings.flops_per_second, one.num_values * size / ceilings.bytes_per_second)
        for one in convolutions
    )


def best_seconds(work: Callable[[], object], device: str) -> float:
    """Of some rounds, after one that warms up."""

    def seconds() -> float:
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return min([seconds() for _ in range(NUM_ROUNDS + 1)][1:])
