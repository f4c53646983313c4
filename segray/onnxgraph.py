"""ONNX models: what describes them, and the module that runs them through onnxruntime.

Beside `m.onnx` lies its description, `m.json` or `m.toml`:

    {
      "classes": ["clear", "cloud", "cloud shadow"],
      "bands": ["blue", "green", "red", "nir"],
      "mean": [0.276, 0.256, 0.270, 0.334],
      "std": [0.245, 0.228, 0.254, 0.232],
      "tile_size": 256,
      "output": "logits"
    }

- `classes`: their names in the order of the graph's output; or an object with names, palette and ignore_index as in a
  classes file; or how many there are, which are then called `class 0`, `class 1`, ….
- `bands`: names of a scene's bands in the order of the graph's input; or "RGB", "BGR" or "L" for a model of images.
- `mean`, `std`: one of each band; the graph is fed (value − mean) / std. For images they may be left out, and are
  ImageNet's then. `range` and `resize` are for images too, and mean what they do in `Preprocessing`.
- `tile_size`: the side in pixels of the squares that the graph is fed, where it would take others; it may be left out.
- `output`: "logits" (which may be left out) or "probabilities".

The JSON files of the package ukis-csmask are read as they are: `data.dataset_statistics.img` holds mean and std,
`data.dataset_statistics.band_names` the bands, `data.target_size` the tile size, and `data.classes` the number of
classes.

The graph has one input, (batch, bands, height, width) in float32 or float16, and its first output is (batch, classes,
h, w). Height and width may be fixed to one size, and the batch to one number. Where the output has a single channel
and there are two classes, it is the second class's.
"""

import json
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import fsspec
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from segray.classes import Classes
from segray.errors import ModelError, SettingsError, extra
from segray.preprocessing import Preprocessing

__all__ = ["Description", "Graph", "Output", "check", "describe"]

Output = Literal["logits", "probabilities"]

_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
_PROBE_SIDE = 9 * 32  # images are padded to multiples of 32; 256 would suit graphs that ask for multiples of 64 too
_LEAST_TILE = 32
_ROUNDING = 1e-2  # of half precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What an ONNX file does not say of itself."""

    classes: Classes
    """What the channels of its output stand for."""
    preprocessing: Preprocessing
    """What it is fed."""
    tile_size: int | None
    """Side in pixels of the squares that it is fed. None: any size, unless the graph says otherwise."""
    output: Output
    """What it gives."""


def describe(uri: str) -> Description:
    """Reads the description beside an ONNX file; the module's docstring tells its forms.

    Raises:
        ModelError: there is none, or it is of the wrong form.
    """
    beside, text = _read_beside(uri)
    try:
        fields = tomllib.loads(text.decode()) if beside.endswith(".toml") else json.loads(text)
    except ValueError as error:  # of the decoder too
        raise ModelError(f"{beside} is not valid {beside[-4:].upper()}: {error}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{beside} holds no object; {_EXPECTED}")
    try:
        return _parsed(_of_csmask(fields) if "data" in fields else fields)
    except (SettingsError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"{beside}: {reason}; {_EXPECTED}") from error


_EXPECTED = 'expected {"classes": [...], "bands": [...], "mean": [...], "std": [...]}, and maybe "tile_size", "output"'


def _read_beside(uri: str) -> tuple[str, bytes]:
    name = uri.removesuffix(".onnx")
    for beside in (f"{name}.json", f"{name}.toml"):
        try:
            with fsspec.open(beside, "rb") as file:
                data: bytes = file.read()
            return beside, data
        except FileNotFoundError:
            continue
        except Exception as error:  # whatever the store's client raises
            raise ModelError(f"{beside} cannot be read: {type(error).__name__}: {error}") from error
    file_name = PurePosixPath(name).name
    raise ModelError(
        f"{uri} does not say what it is fed and what it gives; put {file_name}.json or {file_name}.toml beside it: "
        f"{_EXPECTED}"
    )


def _of_csmask(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same, in our form."""
    data = fields["data"]
    statistics = data["dataset_statistics"]
    mean, std = statistics["img"]
    height, width = data["target_size"]
    if height != width:
        raise ValueError(f"target_size {height}×{width} is no square")
    return {
        "classes": data["classes"],
        "bands": statistics["band_names"],
        "mean": mean,
        "std": std,
        "tile_size": height,
    }


def _parsed(fields: Mapping[str, Any]) -> Description:
    known = {"classes", "bands", "mean", "std", "range", "resize", "tile_size", "output"}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown fields {unknown}; there are {sorted(known)}")
    bands = fields["bands"]
    if isinstance(bands, list) and not {"mean", "std"} <= set(fields):  # ImageNet's say nothing of bands
        raise ValueError("mean and std are missing, a number for each band")
    tile_size, output = fields.get("tile_size"), fields.get("output", "logits")
    if tile_size is not None and (not isinstance(tile_size, int) or tile_size < _LEAST_TILE):
        raise ValueError(f"tile_size {tile_size!r} must be a number of pixels, at least {_LEAST_TILE}")
    if output not in ("logits", "probabilities"):
        raise ValueError(f"output {output!r} must be 'logits' or 'probabilities'")
    given = {name: fields[name] for name in ("mean", "std", "range", "resize") if name in fields}
    return Description(
        classes=_classes(fields["classes"]),
        preprocessing=Preprocessing.from_dict({"channels": bands, **given}),
        tile_size=tile_size,
        output=output,
    )


def _classes(given: Any) -> Classes:
    if isinstance(given, int):
        return Classes(tuple(f"class {class_id}" for class_id in range(given)))
    return Classes.from_dict(given if isinstance(given, dict) else {"names": given})


class Graph(nn.Module):
    """An ONNX model as a module: normalised images in, logits out.

    On a CPU it runs in as many threads as torch does when it is made. On a GPU, where `to` brings it, what it is fed
    and what it gives go through the CPU's memory.
    """

    _place: Tensor

    def __init__(
        self,
        data: bytes,
        *,
        num_classes: int,
        output: Output = "logits",
        tile_size: int | None = None,
        name: str = "the ONNX model",
    ) -> None:
        """Opens it on the CPU.

        Args:
            data: the file's bytes.
            num_classes: how many classes there are.
            output: what the graph gives.
            tile_size: height and width of all that it is fed. None: any.
            name: stands for the file in errors.

        Raises:
            SettingsError: onnxruntime is not installed.
            ModelError: onnxruntime cannot open it, or the graph is not of a form that is known.
        """
        super().__init__()
        self.tile_size = tile_size
        self._data, self._name = data, name
        self._num_classes = num_classes
        self._gives: Output = output
        self.register_buffer("_place", torch.empty(0), persistent=False)  # goes where the module goes
        self._device = torch.device("cpu")
        self._session = _session(data, self._device, name)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(given.name for given in inputs)
            raise ModelError(
                f"{name} has {len(inputs)} inputs ({names}), and is to have one, (batch, bands, height, width); "
                "export it with the images alone"
            )
        (self._input,) = inputs
        if self._input.type not in _TYPES or len(self._input.shape) != 4:
            raise ModelError(
                f"{name} takes {_shape(self._input.shape)} of {self._input.type}, and is to take "
                f"(batch, bands, height, width) of {' or '.join(_TYPES)}; export it so"
            )
        if (gives := self._session.get_outputs()[0].type) not in _TYPES:
            raise ModelError(
                f"{name} gives {gives}, and is to give logits or probabilities, {' or '.join(_TYPES)}; "
                "export it without its last steps"
            )

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Batch, bands, height and width that the graph takes. None: any."""
        return tuple(length if isinstance(length, int) and length > 0 else None for length in self._input.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Graph":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self._place.device
        if device != self._device:
            self._session, self._device = _session(self._data, device, self._name), device
        return self

    def forward(self, images: Float[Tensor, "batch bands height width"]) -> Float[Tensor, "batch num_classes h w"]:
        """Logits in float32, on the device of the images, at the resolution at which the graph gives them."""
        result = self.run(images).to(images.device)
        if result.shape[1] == 1 and self._num_classes == 2:
            other = 1 - result if self._gives == "probabilities" else torch.zeros_like(result)
            result = torch.cat([other, result], dim=1)
        if self._gives == "probabilities":
            result = result.clamp(min=torch.finfo(result.dtype).tiny).log()
        return result

    def run(self, images: Float[Tensor, "batch bands height width"]) -> Float[Tensor, "batch ..."]:
        """What the graph gives, as it is, in float32 on the CPU."""
        given = images.to("cpu", _TYPES[self._input.type]).contiguous()
        together = self.input_shape[0] or len(given)
        outputs = []
        for some in torch.split(given, together):
            num_missing = together - len(some)
            whole = torch.cat([some, some[-1:].expand(num_missing, -1, -1, -1)]) if num_missing else some
            outputs.append(self._session.run(None, {self._input.name: whole.numpy()})[0][: len(some)])
        return torch.from_numpy(np.concatenate(outputs)).float()


def check(name: str, data: bytes, described: Description) -> int | None:
    """Opens an ONNX file and runs it once, on noise.

    Args:
        name: stands for the file in errors.
        data: its bytes.
        described: what it should be.

    Returns:
        The side in pixels of the squares that it is fed. None: any size.

    Raises:
        ModelError: it cannot be opened, or is not what the description says.
    """
    graph = Graph(data, num_classes=len(described.classes), output=described.output, name=name)
    _, num_bands, *sizes = graph.input_shape
    channels = described.preprocessing.channels
    if num_bands not in (None, len(channels)):
        listed = f"{len(channels)}: {', '.join(channels)}"
        raise ModelError(f"{name} takes {num_bands} bands, and its description names {listed}; name as many there")
    fixed = {size for size in sizes if size is not None}
    if len(fixed) > 1 or (fixed and min(fixed) < _LEAST_TILE):
        raise ModelError(
            f"{name} takes images of {_shape(sizes)} pixels alone; export it for squares of at least {_LEAST_TILE}, "
            "or for any size"
        )
    tile_size = fixed.pop() if fixed else described.tile_size
    if described.tile_size not in (None, tile_size):
        raise ModelError(
            f"{name} takes tiles of {tile_size} pixels alone, and its description says {described.tile_size}; "
            "leave tile_size out there"
        )
    side = tile_size or _PROBE_SIDE
    try:
        noise = torch.randn(1, len(channels), side, side, generator=torch.Generator().manual_seed(0))
        given = graph.run(noise)
    except Exception as error:  # of onnxruntime, or a graph that gives no tensor
        raise ModelError(
            f"{name} does not run on {side}×{side} pixels ({_reason(error)}); where it wants another size, "
            "say so as tile_size in its description"
        ) from error
    _check_given(name, given, described)
    return tile_size


def _check_given(name: str, given: Tensor, described: Description) -> None:
    """Whether what a graph gave is what the description says."""
    num_classes = len(described.classes)
    if given.ndim != 4:
        raise ModelError(
            f"{name} gives {_shape(given.shape)}, and is to give logits or probabilities, (batch, classes, h, w); "
            "export it without its last steps"
        )
    num_channels = given.shape[1]
    if num_channels != num_classes and (num_channels, num_classes) != (1, 2):
        listed = f"{num_classes}: {', '.join(described.classes.names[:20])}"
        raise ModelError(f"{name} gives {num_channels} classes, and there are names of {listed}; name as many")
    is_bounded = bool(((given >= 0) & (given <= 1 + _ROUNDING)).all())
    # What sums to one in every pixel comes from a softmax. One channel may do so by chance.
    is_normed = is_bounded and num_channels > 1 and bool(((given.sum(1) - 1).abs() < _ROUNDING).all())
    if described.output == "logits" and is_normed:
        raise ModelError(f'{name} gives probabilities, not logits; say "output": "probabilities" in its description')
    if described.output == "probabilities" and not is_bounded:
        raise ModelError(f'{name} gives logits, not probabilities; leave "output" out of its description')


def _session(data: bytes, device: torch.device, name: str) -> Any:
    with extra("onnx", name):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what it logs it raises too
    # Threads that wait for work in a loop would take the CPUs of the stages beside the model.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # What lies in the working directory by the name of a file of weights would be taken for it.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    provider, its_options = "CPUExecutionProvider", {}
    if device.type == "cuda":
        provider = "CUDAExecutionProvider"
        # Left alone, it would round its input to the 10 bits of TF32.
        its_options = {"device_id": str(device.index or 0), "use_tf32": "0"}
        if provider not in onnxruntime.get_available_providers():
            raise ModelError(
                f"{name} is to run on a GPU, and the onnxruntime that is installed runs on CPUs alone; "
                "install onnxruntime-gpu in its place, or give --device cpu"
            )
    try:
        session = onnxruntime.InferenceSession(data, options, providers=[(provider, its_options)])
    except Exception as error:  # its own classes, one for each of its codes
        if "external data" in str(error).lower():
            raise ModelError(
                f"{name} keeps its weights in another file, which is not read; write it as one: "
                f"torch.onnx.export(…, external_data=False), or onnx.save(onnx.load({name!r}), FILE)"
            ) from error
        raise ModelError(
            f"{name} is not an ONNX file, or a truncated one, or not for onnxruntime {onnxruntime.__version__}: "
            f"{_reason(error)}"
        ) from error
    if session.get_providers()[0] != provider:  # it only logs that
        raise ModelError(
            f"{name} is to run on a GPU, and onnxruntime {onnxruntime.__version__} does not find the CUDA or cuDNN "
            "that it was built for; install those, or give --device cpu"
        )
    return session


def _shape(lengths: Any) -> str:
    return f"({', '.join(str(length) for length in lengths)})"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
