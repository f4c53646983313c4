"""What the tests share: shape checks, real data, a Ray cluster, an S3 server, models with random weights."""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

import jaxtyping
import numpy as np

# Every array that crosses a function of these modules is checked against its annotation.
_CHECKED = [
    *(
        "augment",
        "bandfile",
        "cog",
        "crf",
        "cut",
        "datasets",
        "decode",
        "demo",
        "labelmap",
        "learn",
        "loss",
        "onnxgraph",
        "pairs",
    ),
    *("picture", "polygons", "predict", "rgb", "scene", "statistics", "stitch", "tile"),
]
jaxtyping.install_import_hook([f"segray.{module}" for module in _CHECKED], "beartype.beartype")

import pytest
import torch
from filelock import FileLock

from segray import demo, model
from segray.classes import Classes
from segray.model import Checkpoint, Preprocessing
from tests.s3 import Server

_DATA = Path(os.environ.get("SEGRAY_TEST_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()


def real(name: str) -> Path:
    """Where these real data lie; skips the test where they do not."""
    path = _DATA / name
    if not path.exists():
        pytest.skip(f"there is no {path}; SEGRAY_TEST_DATA names the folder that holds {name}")
    return path


@pytest.fixture(scope="session")
def camvid() -> Path:
    """CamVid: `val` and `train` with 480×360 frames, `valannot` and `trainannot` with their targets."""
    return real("camvid")


@pytest.fixture(scope="session")
def field_photo() -> Path:
    """A photograph of a field, a JPEG of 3264×2448."""
    return real("field-3264x2448/IMG_3462.JPG")


@pytest.fixture(scope="session")
def landsat8() -> Path:
    """One Landsat 8 scene: a file a band, at 30 m but for band 8 at 15 m."""
    return real("landsat8-cloudy")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server with an empty bucket; the environment points s3fs, pyarrow and DuckDB at it."""
    # It looks for free ports by itself, but two that look at once find the same ones.
    with FileLock(tmp_path_factory.getbasetemp().parent / "s3.lock"):
        server = Server(str(tmp_path_factory.mktemp("s3")))
    os.environ |= server.environment
    yield server
    server.kill()


@pytest.fixture(scope="session")
def ray_cluster(s3: Server) -> Iterator[None]:
    """A real Ray cluster in this process, with more logical CPUs than the machine may have; it knows the S3 server."""
    import ray

    ray.init(
        "local",  # and not one that another process has started
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=1 << 30,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


CAMVID_CLASSES = Classes(
    ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    ignore_index=11,
)


def random_checkpoint(
    name: str,
    classes: Classes = CAMVID_CLASSES,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """A checkpoint of a named architecture with random weights, that sees every class in scenes and in noise.

    Batch norms and logits are brought to the statistics of such images: with those of a fresh
    module signals fade on their way through a deep network, and all label maps would be alike.
    """
    checkpoint = model.untrained(name, classes, arguments=arguments, preprocessing=preprocessing, seed=seed)
    module = model.build(checkpoint)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the plain mean over what it sees
    rng = np.random.default_rng(seed)
    noise = np.kron(rng.integers(0, 256, (2, 12, 16, 3), np.uint8), np.ones((1, 8, 8, 1), np.uint8))
    scenes = np.stack([demo.scene(index)[0][:192:2, :256:2] for index in range(2)])
    images = torch.from_numpy(np.concatenate([scenes, noise])).permute(0, 3, 1, 2)
    of_bands = images[:, [index % 3 for index in range(len(checkpoint.preprocessing.channels))]]
    values = (of_bands.float() - 128) / 64
    with torch.inference_mode():
        model.logits(module.train(), values)
        logits = model.logits(module.eval(), values)
    mean, scale = logits.mean((0, 2, 3)), logits.std((0, 2, 3)).clamp(min=1e-12)
    tensors = dict(module.state_dict())
    heads = [
        (layer_name, layer)
        for layer_name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Conv2d) and layer.out_channels == len(classes)
    ]
    for index, (layer_name, layer) in enumerate(heads):  # two in LR-ASPP, whose logits are their sum
        assert layer.bias is not None
        tensors[f"{layer_name}.weight"] = layer.weight.detach() / scale.view(-1, 1, 1, 1)
        tensors[f"{layer_name}.bias"] = (layer.bias.detach() - (mean if index == 0 else 0)) / scale
    return dataclasses.replace(checkpoint, tensors=tensors)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small models are slower on several threads, and far slower where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a checkpoint with random weights, once for each name."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def write(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            path.write_bytes(random_checkpoint(name).to_bytes())
        return path

    return write
