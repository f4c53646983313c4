"""A module's forward pass, as fast as its device allows, and held to what it gives as it stands in float32.

Batch norms are folded into the convolutions before them, and on a CPU activations too; convolutions and matrix products
are in the dtype in which the device is fast, but for a few at both ends that decide about labels more than others. The
first batch goes both ways, and where the two disagree in too many pixels, the slower way is taken from there on.
"""

import copy
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from segray import model
from segray.tail import Grid, Tail, blocked
from segray.tile import Window

__all__ = ["MIN_AGREEMENT", "Choice", "DType", "Forward", "fast_dtype", "fast_tail", "lacks_memory"]

DType = Literal["auto", "float32", "bfloat16", "float16"]

MIN_AGREEMENT = 0.99
"""The share of the first batch's pixels that must have the class of eager float32 where a dtype is chosen here."""

_NUM_CHECKED = 2
_FOLDED_WITHIN = 1e-3
_MAX_EXACT = 4
# Of all multiplications, by the first layers and by the last. In float32 a CPU takes four times as long, a GPU sixteen.
_EXACT_SHARES = {"cpu": (1 / 16, 1 / 64), "cuda": (0.0, 0.0)}
_ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {  # as oneDNN calls them, with its arguments
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Hardswish: ("hardswish", []),
    nn.SiLU: ("swish", []),
    nn.Identity: ("none", []),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What a forward pass computes in, and why."""

    dtype: str
    """Of convolutions and matrix products: float32, bfloat16 or float16."""
    agreement: float | None
    """The share of the first batch's pixels whose class is that of eager float32; None where it is that itself."""
    refused: float | None = None
    """That of the device's fast dtype, where it was too low to be taken."""
    error: str | None = None
    """What raised where a faster way was tried: the fast dtype, or the compilation of the tail's kernel."""


class Forward:
    """Coarse logits of batches, in float32, by the fastest way that agrees."""

    def __init__(
        self,
        module: nn.Module,
        example: Float32[Tensor, "1 channels height width"],
        *,
        device: torch.device,
        dtype: DType,
        chosen: Callable[[Choice], object] = lambda choice: None,
    ) -> None:
        """Takes over the module and moves it to the device.

        Args:
            module: in evaluation mode, on the CPU.
            example: some input, by which is found what layers follow one another, and how much each has to do.
            device: where it is to run.
            dtype: what convolutions and matrix products are to be in; auto: bfloat16 where the device is fast in it
                and the first batch agrees, else float32. Any other is taken as it is said, and so is that of a
                graph of ONNX.
            chosen: is told after the first batch.
        """
        # Left alone, convolutions of float32 round their input to the 10 bits of TF32.
        torch.backends.cudnn.allow_tf32 = False
        self._device = device
        self._chosen = chosen
        has_own_dtype = next(module.parameters(), None) is None
        self._example = example
        fast = torch.float32 if has_own_dtype else fast_dtype(device) if dtype == "auto" else getattr(torch, dtype)
        folded = module if has_own_dtype else _folded(module, example)
        if device.type == "cpu" and not has_own_dtype and _has_onednn(fast):
            folded = _activated(folded, example)
        self._ways = [(folded, fast)] if folded is not module or fast != torch.float32 else []
        if dtype == "auto" and self._ways:
            self._ways += [(folded, torch.float32), (module, torch.float32)]
        self._is_chosen = False
        self._choosing = threading.Lock()
        self._dtype = torch.float32
        self._module = self._placed(module, self._dtype)

    def __call__(self, values: Float32[Tensor, "batch channels height width"]) -> Float32[Tensor, "batch _ h w"]:
        """The module's logits of a batch."""
        with self._choosing:  # threads may call at once
            if not self._is_chosen:
                self._choose(values)
                self._is_chosen = True
        return self._logits(self._module, self._dtype, values)

    def _placed(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        return module.to(memory_format=self._memory_format(dtype)).to(self._device)

    def _memory_format(self, dtype: torch.dtype) -> torch.memory_format:
        # Without TF32 cuDNN is made for channels-first order; in the other some layers take thirty times as long.
        is_plain = self._device.type == "cuda" and dtype == torch.float32
        return torch.contiguous_format if is_plain else torch.channels_last

    def _logits(self, module: nn.Module, dtype: torch.dtype, values: Tensor) -> Tensor:
        values = values.contiguous(memory_format=self._memory_format(dtype))
        # The cache of weights is one of all threads and streams, and each is used once.
        with torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            return model.logits(module, values).float()

    def _choose(self, values: Tensor) -> None:
        """Goes through the ways until one agrees with the module as it stands."""
        some = values[:_NUM_CHECKED]
        taken, agreement, refused, failure = (self._module, self._dtype), None, None, None
        expected = self._classes(*taken, some) if self._ways else torch.empty(0)
        for number, (module, dtype) in enumerate(self._ways, 1):
            taken = self._placed(_lowered(module, dtype, self._example, self._device), dtype), dtype
            try:
                classes = self._classes(*taken, some)
            except torch.AcceleratorError:  # the GPU's state is lost with it
                raise
            except Exception as error:  # a model may raise anything
                if number == len(self._ways) or lacks_memory(error):  # of which the next batch may want less
                    raise
                failure = failure or f"the model fails in {_name(dtype)}: {_told(error)}"
                continue
            agreement = float(torch.eq(classes, expected).double().mean())
            if agreement >= MIN_AGREEMENT:
                break
            refused = agreement if refused is None and len(self._ways) > 1 else refused
        self._module, self._dtype = taken
        self._ways = []
        self._chosen(Choice(_name(self._dtype), agreement, refused, failure))

    def _classes(self, module: nn.Module, dtype: torch.dtype, values: Tensor) -> Int64[Tensor, "batch height width"]:
        logits = self._logits(module, dtype, values)
        return F.interpolate(logits, values.shape[-2:], mode="bilinear").argmax(1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lacks_memory(error: Exception) -> bool:
    """Whether that is what it says."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "memory" in str(error)


def _told(error: Exception) -> str:
    """In one line, which may be cut."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it, else float32."""
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        is_fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if is_fast else torch.float32


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves in it on this CPU; where it does not, torch does."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    knows_bfloat16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or (dtype == torch.bfloat16 and knows_bfloat16)


def fast_tail(device: torch.device, num_classes: int) -> tuple[Tail, str | None]:
    """The device's kernel, where it can be compiled (Triton needs a C compiler for it), else `blocked`, and why."""
    try:
        if device.type == "cuda":
            from segray.kernel_cuda import label
        else:
            from segray.kernel_cpu import label
        logits = torch.zeros(1, num_classes, 2, 2, device=device)
        label(logits.contiguous(memory_format=torch.channels_last), Grid(4, 4), Window(0, 0, 4, 4))
    except Exception as error:  # no compiler, an unknown GPU, …: what Triton and Numba raise has no common base
        return blocked, f"the kernel of the network's tail could not be compiled: {_told(error)}"
    return label, None


class _Convolution(nn.Conv2d):
    """A convolution of oneDNN, and the activation after it before its output goes to memory.

    Its bias stays in float32, whatever its weights are in: torch's own rounds it, for nothing.
    """

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(convolution))  # a model may look at it
        self._activation = _ACTIVATIONS[type(activation)]

    def forward(self, values: Tensor) -> Tensor:
        values = values.to(self.weight.dtype)  # autocast does not know this one
        shape = self.padding, self.stride, self.dilation, self.groups
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            values, self.weight, self.bias, *shape, *self._activation, ""
        )
        return result


_LOWERED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class _Exact(nn.Module):
    """A layer in float32, with an output in this dtype."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self._dtype = layer, dtype

    def forward(self, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            result: Tensor = self.layer(values.float())
        return result.to(self._dtype)


def _lowered(module: nn.Module, dtype: torch.dtype, example: Tensor, device: torch.device) -> nn.Module:
    """A copy, with the weights in this dtype that autocast would bring to it at each pass anew."""
    lowered = copy.deepcopy(module)
    if dtype == torch.float32:
        return lowered
    first, last = _ends(lowered, example, *_EXACT_SHARES[device.type])
    for name, layer in [(name, layer) for name, layer in lowered.named_modules() if isinstance(layer, _LOWERED)]:
        if layer in first or layer in last:
            lowered.set_submodule(name, _Exact(layer, dtype if layer in first else torch.float32))
        elif isinstance(layer, _Convolution):
            layer.weight.data = layer.weight.data.to(dtype)
        else:
            layer.to(dtype)
    return lowered


@torch.no_grad()
def _ends(
    module: nn.Module, example: Tensor, first_share: float, last_share: float
) -> tuple[set[nn.Module], set[nn.Module]]:
    """The first layers, which see pixels through few weights, and the last, which say what the logits are.

    Rounded, the first alone move more labels than all that come after them.

    Args:
        module: of them.
        example: some input.
        first_share: of all multiplications, that the first layers may do; there is always one, and never more than
            four.
        last_share: that the last may do.
    """
    numbers: dict[nn.Module, int] = {}  # of multiplications, in the order in which layers are used

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        values = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        numbers[layer] = numbers.get(layer, 0) + values.numel() * layer.weight[0].numel()

    handles = [layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, _LOWERED)]
    model.logits(module, example.to(next(module.parameters()).device))
    for handle in handles:
        handle.remove()

    def num_within(share: float, layers: Iterable[nn.Module]) -> int:
        return sum(done <= share * sum(numbers.values()) for done in accumulate(numbers[layer] for layer in layers))

    layers = list(numbers)
    num_first = max(1, min(_MAX_EXACT, num_within(first_share, layers)))
    num_last = num_within(last_share, reversed(layers[num_first:]))
    return set(layers[:num_first]), set(layers[len(layers) - num_last :])


@torch.no_grad()
def _folded(module: nn.Module, example: Tensor) -> nn.Module:
    """A copy without the batch norms that follow a convolution; the module itself where it gives other logits."""
    folded, logits, names, _, pairs = _found(module, (nn.BatchNorm2d,), example)
    for convolution, norm in pairs.items():
        assert isinstance(norm, nn.BatchNorm2d)
        folded.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, norm))
        # Those of timm hold their activation.
        folded.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))
    return folded if pairs and _gives(folded, logits, example) else module


@torch.no_grad()
def _activated(module: nn.Module, example: Tensor) -> nn.Module:
    """A copy whose convolutions are oneDNN's, with the activations that follow them; the module itself likewise."""
    activated, logits, names, convolutions, pairs = _found(module, tuple(_ACTIVATIONS), example)
    for convolution in convolutions:
        is_plain = type(convolution) is nn.Conv2d  # others, such as those that pad by themselves, have their own ways
        if is_plain and convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str):
            activation = pairs.get(convolution, nn.Identity())
            activated.set_submodule(names[convolution], _Convolution(convolution, activation))
            if convolution in pairs:
                activated.set_submodule(names[activation], nn.Identity())
    return activated if convolutions and _gives(activated, logits, example) else module


def _gives(module: nn.Module, expected: Tensor, example: Tensor) -> bool:
    """Whether it gives these logits up to rounding. It does not where a convolution's output is used elsewhere too."""
    try:
        given = model.logits(module, example)
    except Exception:  # a model may look for what is no longer there, and raise whatever it does then
        return False
    return bool((expected - given).abs().max() <= _FOLDED_WITHIN * expected.abs().max())


def _found(
    module: nn.Module, kinds: tuple[type[nn.Module], ...], example: Tensor
) -> tuple[nn.Module, Tensor, dict[nn.Module, str], set[nn.Conv2d], dict[nn.Conv2d, nn.Module]]:
    """A copy, its logits, the names of its layers, its convolutions, and by them the layers of these kinds.

    Only such as are used once, behind a convolution.
    """
    copied = copy.deepcopy(module)
    given: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    found: dict[nn.Module, list[nn.Conv2d | None]] = defaultdict(list)

    def remember(layer: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        given[id(output)] = layer, output  # which is kept, as ids are used again

    def look_up(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[layer].append(given[id(inputs[0])][0] if id(inputs[0]) in given else None)

    names = {layer: name for name, layer in copied.named_modules()}
    handles = [layer.register_forward_pre_hook(look_up) for layer in names if isinstance(layer, kinds)]
    handles += [layer.register_forward_hook(remember) for layer in names if isinstance(layer, nn.Conv2d)]
    logits = model.logits(copied, example)
    for handle in handles:
        handle.remove()
    pairs = {used[0]: layer for layer, used in found.items() if len(used) == 1 and used[0] is not None}
    return copied, logits, names, {convolution for convolution, _ in given.values()}, pairs
