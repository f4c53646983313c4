"""Models by name. Knows no torch, so that a name that is wrong is refused at once."""

from typing import Any

from fsspec.core import url_to_fs

from segray.errors import ModelError, SettingsError

__all__ = ["SMP", "TORCHVISION", "check", "known_models", "parse"]

TORCHVISION = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet101",
    "deeplabv3_resnet50",
    "fcn_resnet101",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
)
"""The segmentation models of torchvision."""

SMP = (
    *("deeplabv3", "deeplabv3plus", "dpt", "fpn", "linknet", "manet", "pan", "pspnet", "segformer"),
    *("unet", "unetplusplus", "upernet"),
)
"""The architectures of segmentation-models-pytorch."""


def known_models() -> str:
    """The names that `parse` takes, for a person."""
    return f"{', '.join(TORCHVISION)}, or ARCHITECTURE_ENCODER with one of {', '.join(SMP)} (e.g. unet_resnet34)"


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """The architecture that a name stands for, and the arguments of its constructor.

    Raises:
        ModelError: the name is not known.
    """
    if name in TORCHVISION:
        return name, {}
    for architecture in sorted(SMP, key=len, reverse=True):
        # Without this a vision transformer takes images of one size alone.
        more = {"dynamic_img_size": True} if architecture == "dpt" else {}
        if name == architecture and architecture != "dpt":
            return architecture, {"encoder_name": "resnet34"}
        if name.startswith(f"{architecture}_"):
            return architecture, {"encoder_name": name.removeprefix(f"{architecture}_"), **more}
    raise ModelError(
        f"there is no model {name!r}; there are {known_models()}, and files ending in .safetensors or .onnx"
    )


def check(model: str, weights: str | None, classes: str | None) -> None:
    """Looks whether there can be such a model; the arguments are those of `model.load`.

    Raises:
        ModelError: the name is not known, no weights are published under it, or the file is not there.
        SettingsError: `weights` and `classes` do not go with `model`.
    """
    if model.endswith(".onnx") and weights:
        raise SettingsError(f"--weights goes with an architecture's name, not with the file {model}")
    if model.endswith((".safetensors", ".pth", ".pt")) and (weights or classes):
        raise SettingsError(f"--weights and --classes go with an architecture's name, not with the file {model}")
    if model.endswith((".pth", ".pt")):
        raise ModelError(
            f"{model} does not say what its tensors are; give the architecture: "
            f"--model NAME --weights {model} --classes FILE"
        )
    if model.endswith((".onnx", ".safetensors")):
        try:
            fs, path = url_to_fs(model)
            fs.info(path)
        except Exception as error:  # whatever the store's client raises
            raise ModelError(f"{model} cannot be read: {type(error).__name__}: {error}") from error
    else:
        architecture, _ = parse(model)
        if weights is not None and classes is None:
            raise SettingsError(f"--weights {weights} needs --classes FILE: the names of its classes")
        if weights is None and classes is not None:
            raise SettingsError("--classes goes with --weights; published weights bring their own classes")
        if weights is None and architecture not in TORCHVISION:
            raise ModelError(
                f"{model} has no published segmentation weights; give your own: --weights FILE --classes FILE, "
                "or --model FILE.safetensors"
            )
