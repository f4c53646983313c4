"""The model as torchvision's guide has it: eager, float32, the argmax of logits at full size. The peers run it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torchvision
import torchvision.transforms.functional as TF
from torch import Tensor, nn

NUM_CLASSES = 21
BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Way:
    """What a peer's script is given."""

    frames: Path
    """A folder of JPEG files of one size."""
    sink: Path
    """A folder for the label maps."""
    model: str
    """torchvision's name of it."""
    weights: Path
    """Its state dict, as safetensors."""
    threads: int
    """Of the model."""


def build(way: Way) -> nn.Module:
    """The model, and its threads for this process."""
    torch.set_num_threads(way.threads)
    model = bare(way.model)
    model.load_state_dict(safetensors.torch.load_file(way.weights))
    return model


def bare(name: str) -> nn.Module:
    """The model with random weights, the same each time."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    return model.eval()


def prepare(pixels: Tensor) -> Tensor:
    """(…, 3, height, width) uint8 → float32, normalised."""
    values = TF.convert_image_dtype(pixels, torch.float32)
    normalised: Tensor = TF.normalize(values, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return normalised


@torch.inference_mode()
def label(model: nn.Module, values: Tensor) -> np.ndarray:
    """(batch, 3, height, width) float32, normalised → (batch, height, width) uint8 class ids."""
    label_maps: np.ndarray = model(values)["out"].argmax(1).byte().cpu().numpy()
    return label_maps


def label_images(model: nn.Module, images: Sequence[np.ndarray]) -> np.ndarray:
    """Images (height, width, 3) of one size → (batch, height, width) uint8 class ids."""
    pixels = torch.from_numpy(np.stack(images)).to(next(model.parameters()).device)
    return label(model, prepare(pixels.permute(0, 3, 1, 2)))


def tell(at: Sequence[float]) -> None:
    """Prints for each image when its label map was there, in seconds since the epoch."""
    json.dump(sorted(at), sys.stdout)
