"""A model by name or checkpoint: architecture, classes, preprocessing and tensors.

Wherever weights come from (torchvision's published files, a state dict, an ONNX file, a segray checkpoint),
they become one `Checkpoint`. Its bytes are what a `.safetensors` file holds and what travels to
the actors, so that there is one way to build a model.
"""

import dataclasses
import hashlib
import importlib
import io
import json
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Literal, Self

import fsspec
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segray import architecture as architectures
from segray import onnxgraph
from segray.architecture import TORCHVISION
from segray.classes import Classes
from segray.errors import ModelError, SettingsError
from segray.preprocessing import Preprocessing
from segray.tile import Tiling

__all__ = [
    "Checkpoint",
    "Preprocessing",
    "batch_minimum",
    "build",
    "coarse",
    "fitted_tiling",
    "input_minimum",
    "input_multiple",
    "load",
    "logits",
    "normalised",
    "notices",
    "start",
    "stride",
    "tile_size",
    "untrained",
    "window_multiple",
]

_METADATA_KEY = "segray"
_ONNX = "onnx"
_STRIDE = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """A model at rest: all that is needed to build and feed it."""

    architecture: str
    """A model of torchvision (`deeplabv3_resnet50`), an architecture of smp (`unet`), or `onnx`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the architecture's constructor is given, e.g. smp's `encoder_name`; of ONNX `output` and `tile_size`."""
    classes: Classes
    """What the channels of its logits stand for."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    """What its images go through first."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from: data, split, command, metrics. Decides nothing."""
    tensors: Mapping[str, Tensor]
    """Its state dict, on the CPU; of ONNX the file's bytes (uint8) as `graph`."""

    def _decisive(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "arguments": dict(self.arguments),
            "classes": self.classes.to_dict(),
            "preprocessing": dataclasses.asdict(self.preprocessing),
        }

    def digest(self) -> str:
        """SHA-256 (hex) of everything in it that decides a label: all but `origin`."""
        sha = hashlib.sha256(json.dumps(self._decisive(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def to_bytes(self) -> bytes:
        """The `.safetensors` file; all but the tensors is JSON in its metadata, key `segray`."""
        metadata = json.dumps({**self._decisive(), "origin": dict(self.origin)})
        # Copies, as safetensors refuses tensors that share memory (tied weights, slices of one buffer).
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors.items()}
        return safetensors.torch.save(tensors, {_METADATA_KEY: metadata})

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "the checkpoint") -> Self:
        """The inverse of `to_bytes`; `name` stands for the file in errors.

        Raises:
            ModelError: not a segray checkpoint.
        """
        try:
            tensors = safetensors.torch.load(data)
        except SafetensorError as error:
            raise ModelError(f"{name} is not a safetensors file, or a truncated one: {error}") from error
        (header_bytes,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + header_bytes])
        try:
            fields = json.loads(header["__metadata__"][_METADATA_KEY])
            return cls(
                architecture=fields["architecture"],
                arguments=fields["arguments"],
                classes=Classes.from_dict(fields["classes"]),
                preprocessing=Preprocessing.from_dict(fields["preprocessing"]),
                origin=fields["origin"],
                tensors=tensors,
            )
        except KeyError as error:
            raise ModelError(
                f"{name} holds tensors but not what they are (no {error} in its metadata); "
                "give the architecture: --model NAME --weights FILE --classes FILE"
            ) from error
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ModelError(
                f"{name} has metadata of the wrong form ({error}); a segray checkpoint holds JSON under the key "
                f"{_METADATA_KEY!r}"
            ) from error


def build(checkpoint: Checkpoint) -> nn.Module:
    """The module with the checkpoint's tensors in float32, in evaluation mode, on the CPU.

    Raises:
        ModelError: the architecture is not known, or the tensors do not fit it.
        SettingsError: it is ONNX, and onnxruntime is not installed.
    """
    if checkpoint.architecture == _ONNX:
        graph = checkpoint.tensors["graph"].numpy().tobytes()
        return onnxgraph.Graph(graph, num_classes=len(checkpoint.classes), **checkpoint.arguments).eval()
    with _Unfilled():
        module = _bare_module(
            checkpoint.architecture, checkpoint.arguments, checkpoint.classes, checkpoint.preprocessing
        )
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    faults = {
        "missing": sorted(expected.keys() - given.keys()),
        "unknown": sorted(given.keys() - expected.keys()),
        "of another shape": [
            f"{name} {given[name]} instead of {expected[name]}"
            for name in sorted(expected.keys() & given.keys())
            if given[name] != expected[name]
        ],
    }
    if any(faults.values()):
        texts = [
            f"{len(names)} {fault}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
            for fault, names in faults.items()
            if names
        ]
        raise ModelError(
            f"the tensors do not fit {checkpoint.architecture} {dict(checkpoint.arguments)} "
            f"with {len(checkpoint.classes)} classes: {'; '.join(texts)}"
        )
    module.load_state_dict(dict(checkpoint.tensors))
    return module.float().eval()


def logits(
    module: nn.Module, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch num_classes h w"]:
    """The module's logits, at the resolution at which it gives them."""
    output = module(images)
    result: Tensor = output["out"] if isinstance(output, dict) else output
    return result


class _Coarse(nn.Module):
    """A model of torchvision without the upsampling at its end."""

    def __init__(self, backbone: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, classifier

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        result: Tensor = self.classifier(features.get("out", features))  # LR-ASPP takes both of its own
        return result


def coarse(module: nn.Module) -> tuple[nn.Module, bool]:
    """Takes the bilinear upsampling from a module's end, where it has one.

    Returns:
        The module, whose logits are then those from which that starts, and whether it aligns corners.
    """
    head = getattr(module, "segmentation_head", None)
    if isinstance(head, nn.Sequential) and isinstance(head[1], nn.Upsample):
        assert head[1].mode == "bilinear"
        aligns_corners = bool(head[1].align_corners)
        head[1] = nn.Identity()
        return module, aligns_corners
    backbone, classifier = (getattr(module, name, None) for name in ("backbone", "classifier"))
    if isinstance(backbone, nn.Module) and isinstance(classifier, nn.Module):
        return _Coarse(backbone, classifier), False
    return module, False


def normalised(
    values: UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch bands height width"],
    preprocessing: Preprocessing,
) -> Float[Tensor, "batch channels height width"]:
    """What a model is fed, in float32: its channels, less its mean, by its std.

    Args:
        values: for a model of images RGB from 0 to 255, uint8 or float32, or of L one band of such; for one of
            bands these, in its order.
        preprocessing: the model's.
    """
    if preprocessing.channels == "BGR":
        values = values.flip(1)
    elif preprocessing.channels == "L":
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        values = rgb_to_grayscale(values)
    fed = values.to(torch.float32, copy=True)
    if preprocessing.bands is None and preprocessing.range == 1:
        fed.div_(255)
    mean, std = (
        torch.tensor(numbers, dtype=torch.float32, device=values.device)
        for numbers in (preprocessing.mean, preprocessing.std)
    )
    # Where channels lie side by side, torch would go three numbers at a time: here it goes by rows of pixels.
    num_alike = fed.shape[3] if fed.stride(1) == 1 else 1
    mean, std = (numbers.repeat(num_alike, 1).T[:, None] for numbers in (mean, std))
    return fed.sub_(mean).div_(std)


def start(
    name: str,
    classes: Classes,
    *,
    arguments: Mapping[str, Any] | None = None,
    weights: Literal["random", "imagenet", "published"] = "random",
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
) -> tuple[Checkpoint, list[str]]:
    """Where a training begins.

    Args:
        name: a model's name, or a segray checkpoint (`.safetensors`), which is trained further.
        classes: what it is to tell apart.
        arguments: what else the constructor of a named one is given.
        weights: of a named one: random, with its library's ImageNet weights for the backbone, or the published ones.
        preprocessing: what a model with random weights is fed. None: ImageNet's mean and std. Where it names bands,
            a named model is fed these with other weights too: red, green and blue go through the weights' own, and
            each further band through the mean of those.
        seed: decides what is random.

    Returns:
        The checkpoint, of published weights without the size to which they would have images brought, and the names of
        those of its tensors that nothing was there for: the head's, where the classes are others.

    Raises:
        ModelError: the name is not known, the weights cannot be had, or the arguments do not fit.
        SettingsError: arguments or weights are given beside a checkpoint.
    """
    is_ours = name.endswith((".safetensors", ".onnx"))
    if is_ours:
        if arguments or weights != "random":
            raise SettingsError(f"--arguments and --weights go with a model's name; {name} brings its own")
        given = load(name)
        if given.architecture == _ONNX:
            raise ModelError(f"{name} is an ONNX model, which cannot be trained; give the model that it was made from")
        arguments, preprocessing = given.arguments, given.preprocessing
        fresh = _fresh(given.architecture, arguments, classes, preprocessing, seed)
    else:
        architecture, named = architectures.parse(name)
        merged = {**named, **(arguments or {})}
        if weights == "random":
            return _fresh(architecture, merged, classes, preprocessing or Preprocessing(), seed), []
        if weights == "published" and architecture not in TORCHVISION:
            raise ModelError(
                f"{name} has no published segmentation weights; --weights imagenet gives it those of its encoder, "
                "--weights random none"
            )
        given = load(name) if weights == "published" else _on_imagenet(architecture, merged)
        if preprocessing is not None and preprocessing.bands is not None:
            given = _for_bands(given, preprocessing)
        fresh = _fresh(architecture, merged, classes, given.preprocessing, seed)
    fitting = {tensor_name: tensor for tensor_name, tensor in given.tensors.items() if tensor_name in fresh.tensors}
    if given.classes.names != classes.names:
        # The head is what has another shape where there is one class more.
        larger = Classes((*classes.names, "\0"), ignore_index=len(classes) + 1)
        other = _fresh(fresh.architecture, fresh.arguments, larger, fresh.preprocessing, seed).tensors
        fitting = {key: tensor for key, tensor in fitting.items() if other[key].shape == fresh.tensors[key].shape}
    begun = dataclasses.replace(
        fresh,
        preprocessing=fresh.preprocessing if is_ours else dataclasses.replace(fresh.preprocessing, resize=None),
        origin={"weights": name if is_ours else weights},
        tensors={**fresh.tensors, **fitting},
    )
    return begun, sorted(fresh.tensors.keys() - fitting.keys())


def _for_bands(given: Checkpoint, preprocessing: Preprocessing) -> Checkpoint:
    """Weights of an image's three channels as those of bands: red, green, blue as they were, others by the mean."""
    bands, channels = preprocessing.bands or (), {"R": "red", "G": "green", "B": "blue"}
    own = {channels[channel]: index for index, channel in enumerate(given.preprocessing.channels)}

    def widened(weight: Tensor) -> Tensor:
        mean = weight.mean(1)
        columns = [weight[:, own[name.casefold()]] if name.casefold() in own else mean for name in bands]
        return torch.stack(columns, dim=1) * (len(own) / len(bands))

    bare = _bare_module(given.architecture, given.arguments, given.classes, preprocessing).state_dict()
    tensors = {
        name: widened(tensor) if tensor.ndim == 4 and bare[name].shape[1] != tensor.shape[1] else tensor
        for name, tensor in given.tensors.items()
    }
    return dataclasses.replace(given, preprocessing=preprocessing, tensors=tensors)


def input_multiple(module: nn.Module) -> int:
    """What the height and width of its input must be multiples of; of a graph, which does not say, that is assumed."""
    if isinstance(module, onnxgraph.Graph) and module.tile_size is None:
        return _STRIDE
    if not getattr(module, "requires_divisible_input_shape", False):
        return 1
    smp = _library("segmentation_models_pytorch")
    encoder: Any = module.encoder
    # DPT fuses the features of its stride with those of half as many pixels a side.
    return int(encoder.output_stride) * (2 if isinstance(module, smp.DPT) else 1)


def input_minimum(module: nn.Module) -> int:
    """What the height and width of its input must at least be."""
    if isinstance(module, onnxgraph.Graph):
        return module.tile_size or 1
    encoder: Any = getattr(module, "encoder", None)
    if encoder is None:
        return 1
    smp = _library("segmentation_models_pytorch")
    # PAN halves the deepest features, of stride 16, three times more.
    return 128 if isinstance(module, smp.PAN) else int(encoder.output_stride)


def batch_minimum(module: nn.Module) -> int:
    """How many images must share a forward pass on a CPU, that no label map depends on how many do.

    For one image alone torch takes other kernels than for two or more, which round otherwise.
    """
    return 1 if isinstance(module, onnxgraph.Graph) else 2


def stride(module: nn.Module) -> int:
    """What two images' offsets must differ by a multiple of, for the model to see their common pixels alike."""
    if isinstance(module, onnxgraph.Graph) and module.tile_size is not None:
        return 1  # it depends on the tiling alone
    encoder: Any = getattr(module, "encoder", None)
    # torchvision's strides are 8 and 16.
    return _STRIDE if encoder is None else max(int(encoder.output_stride), input_multiple(module))


def fitted_tiling(checkpoint: Checkpoint, tiling: Tiling) -> Tiling:
    """The tiling that a model is fed by: for one of a fixed size that size, and the overlap in proportion."""
    side = tile_size(checkpoint)
    if side is None:
        return tiling
    return dataclasses.replace(tiling, size=side, overlap=tiling.overlap * side // tiling.size)


def window_multiple(checkpoint: Checkpoint, tiling: Tiling) -> int:
    """What the cores and halos of a scene's windows must be multiples of, in pixels, to join without a seam."""
    if tile_size(checkpoint) is None:
        return stride(build(checkpoint))
    return fitted_tiling(checkpoint, tiling).stride


def tile_size(checkpoint: Checkpoint) -> int | None:
    """The side in pixels of the only input that the model takes. None: it takes any."""
    size: int | None = checkpoint.arguments.get("tile_size") if checkpoint.architecture == _ONNX else None
    return size


def notices(checkpoint: Checkpoint) -> list[str]:
    """What a person should know of the encoder's published weights before using them."""
    encoder = str(checkpoint.arguments.get("encoder_name", ""))
    licence = ""
    if encoder.startswith("mit_b"):
        licence = "NVIDIA Source Code License: research and evaluation only"
    elif encoder.startswith("tu-"):
        timm = _library("timm")
        if timm.models.is_model(encoder[3:]):
            terms = getattr(timm.models.get_pretrained_cfg(encoder[3:], allow_unregistered=True), "license", None) or ""
            licence = terms if "-nc" in terms.lower() else ""
    if not licence:
        return []
    return [
        f"the published weights of the encoder {encoder} bar commercial use ({licence}); "
        "so does what was trained from them"
    ]


def load(model: str, weights: str | None = None, classes: str | None = None) -> Checkpoint:
    """Reads a model's weights, once, on the driver.

    Args:
        model: the path or URI of a segray checkpoint (`.safetensors`) or of an ONNX file (`.onnx`) that has its
            description beside it (see `onnxgraph`), or a model's name.
        weights: with a name: a state dict, `.safetensors` or `.pth` (a plain one, or under
            the key `model` or `state_dict`). None: the published weights of the name's library.
        classes: with `weights`: a classes file (see `Classes.read`); its JSON may also hold
            `preprocessing`, with the fields of `Preprocessing`. With an ONNX file: in place of its own classes.

    Raises:
        ModelError: the name is not known, the weights cannot be had, or they do not fit.
        SettingsError: `weights` and `classes` do not go with `model`.
    """
    architectures.check(model, weights, classes)
    if model.endswith(".onnx"):
        return _of_onnx(model, classes)
    if model.endswith(".safetensors"):
        checkpoint = Checkpoint.from_bytes(_read(model), model)
    elif weights is None or classes is None:
        checkpoint = _published(model)
    else:
        architecture, arguments = architectures.parse(model)
        checkpoint = Checkpoint(
            architecture=architecture,
            arguments=arguments,
            classes=Classes.read(classes),
            preprocessing=_read_preprocessing(classes),
            origin={"weights": weights},
            tensors=_read_state_dict(weights),
        )
    build(checkpoint)  # on the driver, so that a misfit is one line before anything starts
    return checkpoint


def _of_onnx(model: str, classes: str | None) -> Checkpoint:
    data = _read(model)
    described = onnxgraph.describe(model)
    if classes is not None:
        described = dataclasses.replace(described, classes=Classes.read(classes))
    tile_size = onnxgraph.check(model, data, described)
    return Checkpoint(
        architecture=_ONNX,
        arguments={"output": described.output, "tile_size": tile_size},
        classes=described.classes,
        preprocessing=described.preprocessing,
        origin={"weights": model},
        tensors={"graph": torch.frombuffer(bytearray(data), dtype=torch.uint8)},
    )


def untrained(
    model: str,
    classes: Classes,
    *,
    arguments: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
) -> Checkpoint:
    """A named architecture with random weights.

    Args:
        model: the name, as `load` takes it.
        classes: what it is to tell apart.
        arguments: what else its constructor is given, e.g. smp's `decoder_channels`.
        preprocessing: what it is to be fed. None: ImageNet's mean and std.
        seed: decides the weights.

    Raises:
        ModelError: the name is not known, or the arguments do not fit.
    """
    architecture, named = architectures.parse(model)
    return _fresh(architecture, {**named, **(arguments or {})}, classes, preprocessing or Preprocessing(), seed)


def _fresh(
    architecture: str, arguments: Mapping[str, Any], classes: Classes, preprocessing: Preprocessing, seed: int
) -> Checkpoint:
    torch.manual_seed(seed)
    module = _bare_module(architecture, arguments, classes, preprocessing)
    return Checkpoint(
        architecture=architecture,
        arguments=arguments,
        classes=classes,
        preprocessing=preprocessing,
        tensors=module.state_dict(),
    )


def _on_imagenet(architecture: str, arguments: Mapping[str, Any]) -> Checkpoint:
    """A model whose backbone has the weights that its library publishes; its head is random, of one class."""
    way_out = "fetch them elsewhere and copy Hugging Face's cache (set by HF_HOME)"
    try:
        if architecture in TORCHVISION:
            torchvision = _library("torchvision")
            weights = torchvision.models.get_model_weights(architecture.partition("_")[2]).DEFAULT
            folder = Path(torch.hub.get_dir(), "checkpoints")
            way_out = f"download {weights.url} elsewhere and put it into {folder} (set by TORCH_HOME)"
            module: Any = torchvision.models.get_model(
                architecture, weights=None, weights_backbone=None, num_classes=1, **arguments
            )
            # Not by torchvision's own way, which would unpickle whatever file is there.
            given = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
            given = {name.removeprefix("features."): tensor for name, tensor in given.items()}
            if missing := module.backbone.load_state_dict(given, strict=False).missing_keys:
                raise ValueError(f"{len(missing)} tensors are missing, e.g. {missing[0]}")
            published = Preprocessing()
        else:
            smp = _library("segmentation_models_pytorch")
            encoder = arguments["encoder_name"]
            there = True if encoder.startswith("tu-") else "imagenet"  # timm's names say which
            module = smp.create_model(architecture, encoder_weights=there, classes=1, **arguments)
            described = smp.encoders.get_preprocessing_params(encoder, "imagenet")
            published = Preprocessing(
                channels=described["input_space"],
                range=1 if described["input_range"][1] == 1 else 255,
                mean=tuple(described["mean"]),
                std=tuple(described["std"]),
            )
    except Exception as error:  # of the network, the disk, the constructor, …
        raise ModelError(
            f"the ImageNet weights for {architecture} {dict(arguments)} could not be had ({_reason(error)}); "
            f"start with --weights random, or {way_out}"
        ) from error
    backbone = "backbone." if architecture in TORCHVISION else "encoder."
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(backbone)}
    return Checkpoint(
        architecture=architecture,
        arguments=arguments,
        classes=Classes(("class",)),
        preprocessing=published,
        tensors=tensors,
    )


def _bare_module(
    architecture: str, arguments: Mapping[str, Any], classes: Classes, preprocessing: Preprocessing
) -> nn.Module:
    if architecture in TORCHVISION and arguments:  # which it would swallow
        raise ModelError(
            f"{architecture} takes no arguments, and was given {dict(arguments)}; output stride and atrous rates are "
            "those of segmentation-models-pytorch's, e.g. deeplabv3_resnet34 with "
            '\'{"encoder_output_stride": 8, "decoder_atrous_rates": [6, 12, 18]}\''
        )
    try:
        if architecture in TORCHVISION:
            torchvision = _library("torchvision")
            module: nn.Module = torchvision.models.get_model(
                architecture, weights=None, weights_backbone=None, num_classes=len(classes), **arguments
            )
            _take_channels(module, len(preprocessing.channels))
        else:
            smp = _library("segmentation_models_pytorch")
            module = smp.create_model(
                architecture,
                encoder_weights=None,
                in_channels=len(preprocessing.channels),
                classes=len(classes),
                **arguments,
            )
    except Exception as error:  # the libraries' constructors raise KeyError, RuntimeError, TypeError, …
        raise ModelError(f"{architecture} {dict(arguments)} cannot be built: {_reason(error)}") from error
    return module


def _take_channels(module: nn.Module, num_channels: int) -> None:
    """Replaces the first convolution, where it is for another number of channels."""
    name, first = next((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d))
    if first.in_channels == num_channels:
        return
    # All of them begin a ResNet or a MobileNetV3, and have no bias.
    form: dict[str, Any] = {form: getattr(first, form) for form in ("kernel_size", "stride", "padding")}
    other = nn.Conv2d(num_channels, first.out_channels, bias=False, **form)
    nn.init.kaiming_normal_(other.weight, mode="fan_out", nonlinearity="relu")
    module.set_submodule(name, other)


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0][:300] or type(error).__name__


def _published(model: str) -> Checkpoint:
    torchvision = _library("torchvision")
    published = torchvision.models.get_model_weights(model).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(published.url).name)
    way_out = f"download {published.url} elsewhere and put it into {file.parent} (set by TORCH_HOME)"
    was_there = file.exists()
    try:
        # Of a file that is there already, torch checks no hash: it must not be trusted to be unpickled.
        tensors = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, the disk, the hash, the unpickler, …
        if was_there:
            raise ModelError(
                f"{file} is truncated, or not the weights of {model} ({_reason(error)}); {way_out}"
            ) from error
        raise ModelError(
            f"the weights {file.name} of {model} could not be had ({_reason(error)}); {way_out}"
        ) from error
    if not _is_state_dict(tensors):
        raise ModelError(f"{file} is not the weights of {model} (no state dict); {way_out}")
    transforms = published.transforms()
    names = [name.strip("_") for name in published.meta["categories"]]
    return Checkpoint(
        architecture=model,
        classes=Classes(tuple(names)),
        preprocessing=Preprocessing(
            resize=transforms.resize_size[0], mean=tuple(transforms.mean), std=tuple(transforms.std)
        ),
        origin={"weights": str(published), "url": published.url},
        tensors=_inference_tensors(tensors),
    )


def _is_state_dict(loaded: Any) -> bool:
    return isinstance(loaded, dict) and all(isinstance(value, Tensor) for value in loaded.values())


def _inference_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the auxiliary head, which only training needs, and without DDP's prefix."""
    return {
        name.removeprefix("module."): tensor
        for name, tensor in tensors.items()
        if not name.removeprefix("module.").startswith("aux_classifier.")
    }


def _read(uri: str) -> bytes:
    try:
        with fsspec.open(uri, "rb") as file:
            data: bytes = file.read()
            return data
    except Exception as error:  # whatever the store's client raises
        raise ModelError(f"{uri} cannot be read: {type(error).__name__}: {error}") from error


def _read_preprocessing(classes: str) -> Preprocessing:
    text = _read(classes).lstrip()
    fields = json.loads(text).get("preprocessing", {}) if text.startswith(b"{") else {}
    if not isinstance(fields, dict):
        raise SettingsError(f'{classes}: preprocessing is {fields!r}; expected an object, e.g. {{"resize": 520}}')
    return Preprocessing.from_dict(fields)


def _read_state_dict(uri: str) -> dict[str, Tensor]:
    data = _read(uri)
    if uri.endswith(".safetensors"):
        try:
            return _inference_tensors(safetensors.torch.load(data))
        except SafetensorError as error:
            raise ModelError(f"{uri} is not a safetensors file, or a truncated one: {error}") from error
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler stumbles over
        raise ModelError(
            f"{uri} is not a file of tensors alone, or a truncated one ({_reason(error)}); save a model's state_dict()"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not _is_state_dict(loaded):
        raise ModelError(f"{uri} does not hold a state dict (names to tensors); save a model's state_dict()")
    return _inference_tensors(loaded)


class _Unfilled(TorchFunctionMode):
    """Within it weights get no random values, which would take long and be overwritten."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def _library(name: str) -> Any:
    """torchvision, smp or timm, imported where a model of theirs is met, as they take long.

    Most of it would be torch's compiler, which they import for functions that no model here calls.
    """
    compiler = "torch._dynamo.utils"
    if compiler in sys.modules:
        return importlib.import_module(name)
    stub: Any = ModuleType(compiler)
    stub.is_compile_supported = None  # for the boxes of detection
    disable = torch.compiler.disable
    sys.modules[compiler] = stub
    torch.compiler.disable = lambda fn=None, **_: fn
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules[compiler]
        torch.compiler.disable = disable
