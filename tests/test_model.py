import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub.constants
import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from segray import model
from segray.classes import Classes
from segray.errors import ModelError, SettingsError
from segray.model import Checkpoint, Preprocessing
from tests.conftest import CAMVID_CLASSES, random_checkpoint

TORCHVISION = torchvision.models.list_models(torchvision.models.segmentation)
TORCHVISION_MOBILE = [name for name in TORCHVISION if "mobilenet" in name]
SMP = [
    "unet_resnet18",
    "unetplusplus_mobilenet_v2",
    "pspnet_mobilenet_v2",
    "deeplabv3plus_resnet18",
    "fpn_tu-mobilenetv3_small_050",
    "upernet_mit_b0",
    "dpt_tu-vit_tiny_patch16_224",
]
SMALL = "unet_tu-mobilenetv3_small_050"
LRASPP_FILE = "lraspp_mobilenet_v3_large-d234d4ea.pth"
NAMES = ("sky", "road", "tree")
BANDS = ("Blue", "green", "red", "nir", "swir16")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    return random_checkpoint(SMALL, Classes(NAMES))


@pytest.fixture
def classes_file(tmp_path: Path) -> str:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(NAMES))
    return str(path)


def assert_same_tensors(ours: Any, theirs: Any) -> None:
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", [*TORCHVISION, *SMP])
def test_a_checkpoint_survives_its_bytes_and_builds(name: str) -> None:
    checkpoint = model.untrained(name, CAMVID_CLASSES)
    checkpoint = dataclasses.replace(checkpoint, origin={"command": "train", "metrics": {"miou": 0.9}})
    again = Checkpoint.from_bytes(checkpoint.to_bytes())
    assert again.digest() == checkpoint.digest()
    assert (again.architecture, again.arguments) == (checkpoint.architecture, checkpoint.arguments)
    assert (again.classes, again.preprocessing) == (checkpoint.classes, checkpoint.preprocessing)
    assert again.origin == checkpoint.origin
    assert_same_tensors(again.tensors, checkpoint.tensors)

    module = model.build(again)
    assert not module.training
    assert_same_tensors(module.state_dict(), checkpoint.tensors)
    multiple = model.input_multiple(module)
    height, width = (max(multiple * times, 48) for times in (2, 3))
    with torch.inference_mode():
        logits = model.logits(module, torch.zeros(1, 3, height, width))
    assert logits.shape == (1, len(CAMVID_CLASSES), height, width)


def test_the_digest_changes_with_what_decides_a_label_and_with_nothing_else(small: Checkpoint) -> None:
    name = next(iter(small.tensors))
    changed = {**small.tensors, name: small.tensors[name].clone()}
    changed[name].view(-1)[0] += 1e-3
    others = [
        dataclasses.replace(small, tensors=changed),
        dataclasses.replace(small, classes=Classes(("sky", "road", "bush"))),
        dataclasses.replace(small, classes=Classes(NAMES, ((0, 0, 0), (1, 1, 1), (2, 2, 2)))),
        dataclasses.replace(small, preprocessing=Preprocessing(resize=520)),
        dataclasses.replace(small, preprocessing=Preprocessing(channels="BGR")),
        dataclasses.replace(small, arguments={**small.arguments, "encoder_depth": 5}),
        dataclasses.replace(small, tensors={k: v.half() if k == name else v for k, v in small.tensors.items()}),
    ]
    digests = {small.digest(), *(other.digest() for other in others)}
    assert len(digests) == len(others) + 1
    assert dataclasses.replace(small, origin={"metrics": {"miou": 1.0}}).digest() == small.digest()
    reordered = dict(reversed(list(small.tensors.items())))
    assert dataclasses.replace(small, tensors=reordered).digest() == small.digest()


def test_a_checkpoint_loads_from_a_path_and_from_uris(small: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "my model.safetensors"
    path.write_bytes(small.to_bytes())
    with fsspec.open("memory://models/small.safetensors", "wb") as file:
        file.write(small.to_bytes())
    for uri in (str(path), f"file://{path}", "memory://models/small.safetensors"):
        assert model.load(uri).digest() == small.digest()


def test_half_precision_tensors_run_in_float32(small: Checkpoint) -> None:
    halves = {name: t.half() if t.is_floating_point() else t for name, t in small.tensors.items()}
    module = model.build(dataclasses.replace(small, tensors=halves))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_tensors_that_share_memory_are_written() -> None:
    buffer = torch.arange(8.0)
    tensors = {"first": buffer[:4], "second": buffer[4:], "again": buffer[:4]}
    checkpoint = Checkpoint(architecture="unet", classes=Classes(NAMES), tensors=tensors)
    assert_same_tensors(Checkpoint.from_bytes(checkpoint.to_bytes()).tensors, tensors)


SAVED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda tensors: tensors,
    "model": lambda tensors: {"model": tensors, "epoch": 3, "optimizer": {"lr": 0.1}},
    "state_dict": lambda tensors: {"state_dict": tensors},
    "module.": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "aux_classifier": lambda tensors: tensors | {"aux_classifier.0.weight": torch.ones(2)},
    "module.aux_classifier": lambda tensors: (
        {f"module.{name}": tensor for name, tensor in tensors.items()} | {"module.aux_classifier.4.bias": torch.ones(2)}
    ),
}


@pytest.mark.parametrize("form", SAVED)
def test_a_state_dict_loads_in_the_forms_in_which_it_is_saved(
    form: str, small: Checkpoint, tmp_path: Path, classes_file: str
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(SAVED[form](dict(small.tensors)), path)
    loaded = model.load(SMALL, str(path), classes_file)
    assert loaded.digest() == small.digest()
    assert loaded.origin == {"weights": str(path)}


def test_a_state_dict_loads_from_safetensors_and_from_a_uri(small: Checkpoint, classes_file: str) -> None:
    uri = "memory://models/weights.safetensors"
    with fsspec.open(uri, "wb") as file:
        file.write(safetensors.torch.save({f"module.{name}": t for name, t in small.tensors.items()}))
    assert model.load(SMALL, uri, classes_file).digest() == small.digest()


def test_a_classes_file_may_hold_palette_and_preprocessing(small: Checkpoint, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(dict(small.tensors), weights)
    fields = {
        "names": list(NAMES),
        "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        "preprocessing": {"channels": "BGR", "range": 255, "resize": 520, "mean": [1, 2, 3], "std": [4, 5, 6]},
    }
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(fields))
    loaded = model.load(SMALL, str(weights), str(path))
    assert loaded.classes == Classes(NAMES, ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    assert loaded.preprocessing == Preprocessing(channels="BGR", range=255, resize=520, mean=(1, 2, 3), std=(4, 5, 6))
    path.write_text(json.dumps(NAMES))
    assert model.load(SMALL, str(weights), str(path)).preprocessing == Preprocessing()


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        ({"channels": "RGBA"}, "channels 'RGBA' must be 'RGB', 'BGR' or 'L', or the names of bands"),
        ({"channels": ["red", "nir"]}, "3 means and 3 stds for 2 channels"),
        ({"channels": "L"}, "3 means and 3 stds for 1 channels"),
        ({"std": [1, 1, 0]}, "must be positive"),
        ({"range": 2}, "range 2 must be 1 or 255"),
        ({"resize": 0}, "resize 0 must be at least 1 pixel, or null"),
        ({"resize": "520"}, "wrong form"),
        ({"size": 520}, r"unknown fields \['size'\]"),
        ([520], "expected an object"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(
    preprocessing: Any, message: str, small: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"names": NAMES, "preprocessing": preprocessing}))
    with pytest.raises(SettingsError, match=message):
        model.load(SMALL, str(tmp_path / "never-read.pth"), str(path))


def test_a_misfit_names_the_tensors_that_do_not_fit(small: Checkpoint, tmp_path: Path, classes_file: str) -> None:
    tensors = dict(small.tensors)
    tensors["head.extra"] = torch.ones(1)
    del tensors["segmentation_head.0.bias"]
    tensors["segmentation_head.0.weight"] = torch.ones(7, 16, 3, 3)
    path = tmp_path / "weights.pth"
    torch.save(tensors, path)
    with pytest.raises(ModelError) as caught:
        model.load(SMALL, str(path), classes_file)
    message = str(caught.value)
    assert "with 3 classes" in message
    assert "1 missing: segmentation_head.0.bias" in message
    assert "1 unknown: head.extra" in message
    assert "segmentation_head.0.weight (7, 16, 3, 3) instead of (3, 16, 3, 3)" in message
    assert "\n" not in message


def test_a_misfit_of_everything_stays_one_short_line(small: Checkpoint, tmp_path: Path, classes_file: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(dict(small.tensors), path)
    with pytest.raises(ModelError) as caught:
        model.load("unet_mobilenet_v2", str(path), classes_file)
    assert ", …; " in str(caught.value)
    assert len(str(caught.value)) < 1200


class Pickled:
    """Tells whether it was unpickled."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Pickled, "ran", True)


@pytest.mark.parametrize("under", [None, "args"])
def test_a_pth_with_a_pickled_object_is_refused_unread(tmp_path: Path, classes_file: str, under: str | None) -> None:
    path = tmp_path / "weights.pth"
    torch.save(Pickled() if under is None else {"state_dict": {}, under: Pickled()}, path)
    with pytest.raises(ModelError, match="not a file of tensors alone") as caught:
        model.load(SMALL, str(path), classes_file)
    assert not Pickled.ran
    assert "save a model's state_dict()" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no torch file at all", b"PK\x03\x04", b"\x80\x02"])
def test_a_pth_that_is_none_is_refused(tmp_path: Path, classes_file: str, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"weights\.pth is not a file of tensors alone, or a truncated one"):
        model.load(SMALL, str(path), classes_file)


def test_a_truncated_pth_is_refused(small: Checkpoint, tmp_path: Path, classes_file: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(dict(small.tensors), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="truncated"):
        model.load(SMALL, str(path), classes_file)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": {"a": "b"}}, torch.ones(3)])
def test_a_pth_without_a_state_dict_is_refused(tmp_path: Path, classes_file: str, content: Any) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ModelError, match="does not hold a state dict"):
        model.load(SMALL, str(path), classes_file)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_refused(small: Checkpoint, tmp_path: Path, share: float) -> None:
    data = small.to_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a safetensors file, or a truncated one"):
        model.load(str(path))
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(NAMES))
    with pytest.raises(ModelError, match=r"model\.safetensors is not a safetensors file, or a truncated one"):
        model.load(SMALL, str(path), str(classes))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "give the architecture: --model NAME --weights FILE --classes FILE"),
        ({"format": "pt"}, "holds tensors but not what they are"),
        ({"segray": "{}"}, "no 'architecture' in its metadata"),
        ({"segray": "no JSON"}, "metadata of the wrong form"),
        ({"segray": "[]"}, "metadata of the wrong form"),
    ],
)
def test_safetensors_without_segrays_metadata_are_refused(
    tmp_path: Path, metadata: dict[str, str] | None, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save({"weight": torch.ones(2)}, metadata))
    with pytest.raises(ModelError, match=message):
        model.load(str(path))


@pytest.mark.parametrize("name", ["resnet50", "UNET", "yolo_v8", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ModelError, match=f"there is no model '{name}'") as caught:
        model.load(name)
    assert "deeplabv3_resnet50" in str(caught.value)
    assert "unet_resnet34" in str(caught.value)


def test_an_unknown_encoder_is_refused(small: Checkpoint, tmp_path: Path, classes_file: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(dict(small.tensors), path)
    for encoder in ("nosuch", "tu-nosuch"):
        with pytest.raises(ModelError, match=f"unet .*{encoder}.* cannot be built") as caught:
            model.load(f"unet_{encoder}", str(path), classes_file)
        assert "\n" not in str(caught.value)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="needs --classes FILE"):
        model.load(SMALL, "weights.pth")
    with pytest.raises(SettingsError, match="--classes goes with --weights"):
        model.load(SMALL, None, "classes.txt")
    with pytest.raises(SettingsError, match="go with an architecture's name"):
        model.load("model.safetensors", "weights.pth", "classes.txt")
    with pytest.raises(ModelError, match=r"--model NAME --weights model\.pth --classes FILE"):
        model.load("model.pth")
    with pytest.raises(ModelError, match="has no published segmentation weights; give your own: --weights"):
        model.load("unet_resnet34")


@pytest.mark.parametrize("uri", ["/nosuch/model.safetensors", "memory://nosuch.safetensors", "nosuch://a.safetensors"])
def test_a_file_that_cannot_be_had_is_refused(uri: str) -> None:
    with pytest.raises(ModelError, match=f"{uri} cannot be read"):
        model.load(uri)


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps its downloads; nothing can be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", TORCHVISION)
def test_without_network_one_line_names_the_file_and_where_to_put_it(name: str, torch_home: Path) -> None:
    with pytest.raises(ModelError) as caught:
        model.load(name)
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    message = str(caught.value)
    assert f"the weights {url.rpartition('/')[2]} of {name} could not be had" in message
    assert f"download {url} elsewhere and put it into {torch_home}" in message
    assert "\n" not in message


def test_weights_handed_over_offline_are_used(torch_home: Path) -> None:
    name = "lraspp_mobilenet_v3_large"
    published = torchvision.models.get_model_weights(name).DEFAULT
    given = random_checkpoint(name, Classes(tuple(published.meta["categories"])))
    # As published, with the head that only training needs.
    torch.save({**given.tensors, "aux_classifier.0.weight": torch.ones(1)}, torch_home / LRASPP_FILE)
    loaded = model.load(name)
    assert_same_tensors(loaded.tensors, given.tensors)
    assert loaded.classes.names[:2] == ("background", "aeroplane")
    assert len(loaded.classes) == 21
    assert loaded.preprocessing == Preprocessing(resize=520)
    assert loaded.origin["url"].endswith(LRASPP_FILE)


@pytest.mark.parametrize("content", [b"", b"<html>403 Forbidden</html>", b"PK\x03\x04", Pickled(), [1], None])
def test_a_handed_over_file_that_is_something_else_is_refused_with_the_way_out(torch_home: Path, content: Any) -> None:
    path = torch_home / LRASPP_FILE
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ModelError) as caught:
        model.load("lraspp_mobilenet_v3_large")
    assert not Pickled.ran
    message = str(caught.value)
    assert str(path) in message
    assert "not the weights of lraspp_mobilenet_v3_large" in message
    assert f"download https://download.pytorch.org/models/{LRASPP_FILE}" in message
    assert "\n" not in message


def test_a_handed_over_file_of_another_model_says_what_does_not_fit(torch_home: Path, small: Checkpoint) -> None:
    torch.save(dict(small.tensors), torch_home / LRASPP_FILE)
    with pytest.raises(ModelError, match="the tensors do not fit lraspp_mobilenet_v3_large"):
        model.load("lraspp_mobilenet_v3_large")


def test_encoders_whose_weights_bar_commercial_use_say_so() -> None:
    def of(encoder: str) -> list[str]:
        arguments = {"encoder_name": encoder} if encoder else {}
        return model.notices(Checkpoint(architecture="unet", arguments=arguments, classes=Classes(NAMES), tensors={}))

    for encoder in ("mit_b0", "mit_b5", "tu-convnextv2_atto"):
        (notice,) = of(encoder)
        assert encoder in notice
        assert "bar commercial use" in notice
    for encoder in ("", "resnet34", "tu-resnet18", "tu-nosuch", "mobilenet_v2"):
        assert of(encoder) == []


def test_strides_are_those_of_the_deepest_features() -> None:
    strides = {
        "unet_mobilenet_v2": 32,
        "pspnet_mobilenet_v2": 8,
        "lraspp_mobilenet_v3_large": 32,
        SMALL: 32,
        SMP[-1]: 32,
    }
    for name, stride in strides.items():
        assert model.stride(model.build(model.untrained(name, CAMVID_CLASSES))) == stride


def test_input_multiples_are_those_that_the_libraries_demand() -> None:
    multiples = {"unetplusplus_mobilenet_v2": 32, "pspnet_mobilenet_v2": 8, "lraspp_mobilenet_v3_large": 1, SMALL: 1}
    for name, multiple in multiples.items():
        assert model.input_multiple(model.build(model.untrained(name, CAMVID_CLASSES))) == multiple


@pytest.mark.parametrize("name", ["fcn_resnet50", *TORCHVISION_MOBILE, *SMP])
def test_any_architecture_sees_as_many_channels_as_are_named(name: str) -> None:
    for channels in (BANDS, "L"):
        count = len(channels)
        fields = Preprocessing(channels=channels, mean=(0,) * count, std=(1,) * count)
        module = model.build(model.untrained(name, Classes(NAMES), preprocessing=fields))
        images = torch.zeros(2, count, 64, 64)
        images[1, -1] = 1e5  # as with random weights signals fade on their way through a deep network
        with torch.inference_mode():
            plain, other = model.logits(module, images)
        assert plain.shape == (3, 64, 64)
        assert not torch.equal(plain, other), "the last band plays no part"


def test_the_random_weights_of_an_rgb_model_do_not_change_with_what_other_models_see() -> None:
    for name in (SMALL, "lraspp_mobilenet_v3_large"):
        torch.manual_seed(0)
        bare = (
            torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
            if name in TORCHVISION
            else smp.create_model("unet", "tu-mobilenetv3_small_050", encoder_weights=None, classes=3)
        )
        assert_same_tensors(model.untrained(name, Classes(NAMES)).tensors, bare.state_dict())


def test_normalised_bands_are_their_values_less_the_mean_by_the_std() -> None:
    preprocessing = Preprocessing(channels=BANDS, mean=(1, 2, 3, 4, 5), std=(1, 2, 3, 4, 0.5))
    values = torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0)) * 3000
    before = values.clone()
    ours = model.normalised(values, preprocessing)
    expected = v2.Normalize([1, 2, 3, 4, 5], [1, 2, 3, 4, 0.5])(values)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)
    assert torch.equal(values, before)


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_floats_from_0_to_255_are_normalised_like_bytes(channels: Any, scale: Any) -> None:
    preprocessing = Preprocessing(channels=channels, range=scale, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16) * torch.tensor([1, 3, 5]).view(1, 3, 1, 1).byte()
    floats = pixels.float()
    assert torch.equal(model.normalised(floats, preprocessing), model.normalised(pixels, preprocessing))
    assert torch.equal(floats, pixels.float())


def test_luma_is_of_red_green_and_blue_or_of_one_band() -> None:
    preprocessing = Preprocessing(channels="L", range=255, mean=(10,), std=(2,))
    values = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 255
    luma = (values * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(model.normalised(values, preprocessing), (luma - 10) / 2, rtol=1e-3, atol=1e-2)
    assert torch.equal(model.normalised(values[:, :1], preprocessing), (values[:, :1] - 10) / 2)


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_normalised_pixels_are_those_of_torchvisions_transforms(
    channels: Any, scale: Any, order: torch.memory_format
) -> None:
    mean, std = tuple(0.1 * scale * (i + 1) for i in range(len(channels))), (0.2 * scale, 0.3 * scale, 0.4 * scale)
    preprocessing = Preprocessing(channels=channels, range=scale, mean=mean, std=std[: len(channels)])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 8, 9), dtype=torch.uint8, generator=generator).contiguous(memory_format=order)
    before = pixels.clone()
    ours = model.normalised(pixels, preprocessing)
    chosen = {"RGB": pixels, "BGR": pixels[:, [2, 1, 0]], "L": v2.Grayscale()(pixels)}[channels]
    values = v2.ToDtype(torch.float32, scale=scale == 1)(chosen)
    expected = v2.Normalize(list(preprocessing.mean), list(preprocessing.std))(values)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(pixels, before)


def start_from(
    checkpoint: Checkpoint, classes: Classes, tmp_path: Path, **options: Any
) -> tuple[Checkpoint, list[str], str]:
    path = tmp_path / "before.safetensors"
    path.write_bytes(checkpoint.to_bytes())
    return *model.start(str(path), classes, **options), str(path)


def test_a_random_start_is_an_untrained_model() -> None:
    arguments = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    for options in ({}, {"arguments": arguments, "preprocessing": preprocessing, "seed": 5}):
        begun, fresh = model.start(SMALL, Classes(NAMES), **options)  # type: ignore[arg-type]
        assert begun.digest() == model.untrained(SMALL, Classes(NAMES), **options).digest()  # type: ignore[arg-type]
        assert fresh == []


def test_a_checkpoint_of_the_same_classes_is_trained_further_as_it_is(small: Checkpoint, tmp_path: Path) -> None:
    fields = Preprocessing(channels="BGR", range=255, resize=520, mean=(1, 2, 3), std=(4, 5, 6))
    given = dataclasses.replace(small, preprocessing=fields)
    begun, fresh, path = start_from(given, Classes(NAMES), tmp_path)
    assert fresh == []
    assert_same_tensors(begun.tensors, small.tensors)
    assert begun.preprocessing == fields
    assert (begun.architecture, begun.arguments) == (small.architecture, small.arguments)
    assert begun.origin == {"weights": path}


def test_deeplabs_output_stride_and_atrous_rates_are_arguments() -> None:
    for stride, side in ((16, 4), (8, 8)):
        options = {"encoder_output_stride": stride, "decoder_atrous_rates": [2, 4, 6]}
        begun, _ = model.start("deeplabv3plus_resnet18", Classes(NAMES), arguments=options)
        module = model.build(begun)
        assert module.encoder(torch.zeros(1, 3, 64, 64))[-1].shape[-1] == side  # type: ignore[operator]
        rates = {layer.dilation[0] for layer in module.decoder.modules() if isinstance(layer, torch.nn.Conv2d)}  # type: ignore[union-attr]
        assert rates == {1, 2, 4, 6}


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        (SMALL, ["segmentation_head.0.bias", "segmentation_head.0.weight"]),
        (
            "lraspp_mobilenet_v3_large",
            [f"classifier.{head}_classifier.{what}" for head in ("high", "low") for what in ("bias", "weight")],
        ),
    ],
)
def test_for_other_classes_the_head_alone_is_random(name: str, heads: list[str], tmp_path: Path) -> None:
    given = random_checkpoint(name, Classes(NAMES), Preprocessing(channels="BGR", resize=100))
    classes = Classes(("a", "b", "c", "d", "e"), ignore_index=77)
    begun, fresh, _ = start_from(given, classes, tmp_path, seed=1)
    assert fresh == heads
    assert begun.classes == classes
    assert begun.preprocessing == given.preprocessing
    rest = given.tensors.keys() - set(heads)
    assert begun.tensors.keys() == given.tensors.keys()
    assert all(torch.equal(begun.tensors[tensor], given.tensors[tensor]) for tensor in rest)
    assert model.build(begun)(torch.zeros(2, 3, 64, 64)) is not None

    again, other = (start_from(given, classes, tmp_path, seed=seed)[0] for seed in (1, 2))
    assert again.digest() == begun.digest()
    assert not any(torch.equal(begun.tensors[head], other.tensors[head]) for head in heads if "weight" in head)


def test_what_does_not_go_with_a_checkpoint_is_refused(small: Checkpoint, tmp_path: Path) -> None:
    for options in ({"arguments": {"encoder_depth": 3}}, {"weights": "imagenet"}, {"weights": "published"}):
        with pytest.raises(SettingsError, match=r"--arguments and --weights go with a model's name; .*before\.safe"):
            start_from(small, Classes(NAMES), tmp_path, **options)
    with pytest.raises(ModelError, match="cannot be read"):
        model.start(str(tmp_path / "nosuch.safetensors"), Classes(NAMES))
    with pytest.raises(ModelError, match="there is no model 'yolo'"):
        model.start("yolo", Classes(NAMES))
    with pytest.raises(ModelError, match="cannot be built"):
        model.start(SMALL, Classes(NAMES), arguments={"nosuch": 1})


def test_a_start_from_published_weights_keeps_all_but_the_last_layers(torch_home: Path) -> None:
    name = "lraspp_mobilenet_v3_large"
    published = torchvision.models.get_model_weights(name).DEFAULT
    given = random_checkpoint(name, Classes(tuple(published.meta["categories"])))
    torch.save(dict(given.tensors), torch_home / LRASPP_FILE)
    begun, fresh = model.start(name, Classes(NAMES), weights="published")
    assert fresh == [f"classifier.{head}_classifier.{what}" for head in ("high", "low") for what in ("bias", "weight")]
    assert all(torch.equal(begun.tensors[tensor], given.tensors[tensor]) for tensor in given.tensors.keys() - fresh)
    assert begun.preprocessing == Preprocessing()
    assert begun.origin == {"weights": "published"}


def test_published_weights_that_cannot_be_had_or_do_not_fit_start_nothing(torch_home: Path, small: Checkpoint) -> None:
    name = "lraspp_mobilenet_v3_large"
    with pytest.raises(ModelError, match=rf"the weights {LRASPP_FILE} of {name} could not be had .* put it into"):
        model.start(name, Classes(NAMES), weights="published")
    torch.save(dict(small.tensors), torch_home / LRASPP_FILE)
    with pytest.raises(ModelError, match=f"the tensors do not fit {name}"):
        model.start(name, Classes(NAMES), weights="published")
    with pytest.raises(ModelError, match="unet_resnet34 has no published segmentation weights; --weights imagenet"):
        model.start("unet_resnet34", Classes(NAMES), weights="published")


@pytest.fixture
def backbone_file(torch_home: Path) -> Path:
    """Where LR-ASPP's backbone is looked for."""
    url = torchvision.models.get_model_weights("mobilenet_v3_large").DEFAULT.url
    return torch_home / str(url).rpartition("/")[2]


def test_imagenet_weights_of_torchvision_fill_the_backbone_as_torchvision_does(backbone_file: Path) -> None:
    torch.save(torchvision.models.mobilenet_v3_large().state_dict(), backbone_file)
    name = "lraspp_mobilenet_v3_large"
    theirs = torchvision.models.get_model(name, weights=None, weights_backbone="DEFAULT", num_classes=3).state_dict()
    begun, fresh = model.start(name, Classes(NAMES), weights="imagenet")
    of_backbone = {tensor for tensor in theirs if tensor.startswith("backbone.")}
    assert set(fresh) == theirs.keys() - of_backbone
    assert all(torch.equal(begun.tensors[tensor], theirs[tensor]) for tensor in of_backbone)
    assert begun.preprocessing == Preprocessing()
    assert begun.origin == {"weights": "imagenet"}
    model.build(begun)


def test_imagenet_weights_see_bands_by_their_names(backbone_file: Path) -> None:
    given = torchvision.models.mobilenet_v3_large().state_dict()
    torch.save(given, backbone_file)
    fields = Preprocessing(channels=BANDS, mean=(1, 2, 3, 4, 5), std=(5, 4, 3, 2, 1))
    begun, fresh = model.start("lraspp_mobilenet_v3_large", Classes(NAMES), weights="imagenet", preprocessing=fields)
    assert begun.preprocessing == fields
    assert {name.partition(".")[0] for name in fresh} == {"classifier"}
    theirs, ours = given["features.0.0.weight"], begun.tensors["backbone.0.0.weight"]
    mean = theirs.mean(1)
    expected = torch.stack([theirs[:, 2], theirs[:, 1], theirs[:, 0], mean, mean], dim=1) * 3 / 5
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(ours.sum(1), theirs.sum(1))  # the same where all bands are
    assert torch.equal(begun.tensors["backbone.1.block.0.0.weight"], given["features.1.block.0.0.weight"])
    model.build(begun)


def test_smps_imagenet_weights_see_bands_too(hub_cache: Path) -> None:
    described = smp.encoders.encoders["mobilenet_v2"]["pretrained_settings"]["imagenet"]
    folder = hub_cache / f"models--{described['repo_id'].replace('/', '--')}" / "snapshots" / described["revision"]
    folder.mkdir(parents=True)
    encoder = smp.encoders.get_encoder("mobilenet_v2").state_dict()
    safetensors.torch.save_file(encoder, folder / "model.safetensors")
    settings = {"input_space": "BGR", "input_range": [0, 255], "mean": [1, 2, 3], "std": [4, 5, 6]}
    (folder / "config.json").write_text(json.dumps(settings))
    fields = Preprocessing(channels=("red", "blue"), mean=(1, 2), std=(5, 4))
    begun, _ = model.start("unet_mobilenet_v2", Classes(NAMES), weights="imagenet", preprocessing=fields)
    theirs = encoder["features.0.0.weight"]
    torch.testing.assert_close(begun.tensors["encoder.features.0.0.weight"], theirs[:, [2, 0]] * 1.5)
    model.build(begun)


@pytest.mark.parametrize("content", [b"", b"<html>403 Forbidden</html>", Pickled(), [1], {"features.0": torch.ones(1)}])
def test_a_backbones_file_that_is_something_else_is_refused_unread(backbone_file: Path, content: Any) -> None:
    if isinstance(content, bytes):
        backbone_file.write_bytes(content)
    else:
        torch.save(content, backbone_file)
    with pytest.raises(ModelError, match=r"the ImageNet weights for lraspp_mobilenet_v3_large .* could not be had"):
        model.start("lraspp_mobilenet_v3_large", Classes(NAMES), weights="imagenet")
    assert not Pickled.ran


def test_without_network_the_backbones_file_is_named(backbone_file: Path) -> None:
    with pytest.raises(ModelError) as caught:
        model.start("lraspp_mobilenet_v3_large", Classes(NAMES), weights="imagenet")
    message = str(caught.value)
    assert "start with --weights random, or download https://download.pytorch.org/models/" in message
    assert backbone_file.name in message
    assert f"put it into {backbone_file.parent} " in message
    assert "\n" not in message


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Hugging Face's client keeps its downloads; nothing can be downloaded, and it tries only once."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("name", ["unet_mobilenet_v2", SMALL])
def test_without_network_the_cache_is_the_way_out(name: str, hub_cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        model.start(name, Classes(NAMES), weights="imagenet")
    message = str(caught.value)
    assert "the ImageNet weights for unet" in message
    assert "start with --weights random, or fetch them elsewhere and copy Hugging Face's cache" in message
    assert "\n" not in message


def test_an_encoder_with_imagenet_weights_is_fed_as_they_were_trained(hub_cache: Path) -> None:
    described = smp.encoders.encoders["mobilenet_v2"]["pretrained_settings"]["imagenet"]
    folder = hub_cache / f"models--{described['repo_id'].replace('/', '--')}" / "snapshots" / described["revision"]
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    encoder = smp.encoders.get_encoder("mobilenet_v2").state_dict()
    safetensors.torch.save_file(encoder, folder / "model.safetensors")
    fields = {"input_space": "BGR", "input_range": [0, 255], "mean": [1, 2, 3], "std": [4, 5, 6]}
    (folder / "config.json").write_text(json.dumps(fields))
    begun, fresh = model.start("unet_mobilenet_v2", Classes(NAMES), weights="imagenet")
    assert begun.preprocessing == Preprocessing(channels="BGR", range=255, mean=(1, 2, 3), std=(4, 5, 6))
    assert_same_tensors({f"encoder.{name}": tensor for name, tensor in encoder.items()}, of_encoder(begun))
    assert set(fresh) == begun.tensors.keys() - of_encoder(begun).keys()
    model.build(begun)


def test_timms_encoders_bring_their_weights_too(hub_cache: Path) -> None:
    folder = hub_cache / "models--timm--mobilenetv3_small_050.lamb_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    whole = timm.create_model("mobilenetv3_small_050")
    safetensors.torch.save_file(whole.state_dict(), folder / "snapshots" / ("a" * 40) / "model.safetensors")
    begun, fresh = model.start(SMALL, Classes(NAMES), weights="imagenet")
    assert_same_tensors(
        {f"encoder.model.{name}": tensor for name, tensor in whole.state_dict().items() if name.startswith("blocks.")},
        {name: tensor for name, tensor in begun.tensors.items() if name.startswith("encoder.model.blocks.")},
    )
    assert set(fresh) == begun.tensors.keys() - of_encoder(begun).keys()
    assert begun.preprocessing == Preprocessing()


def of_encoder(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("encoder.")}


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", SMALL])
def test_a_model_is_built_without_torchs_compiler_and_without_what_it_is_not_made_of(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(model.untrained(name, Classes(NAMES)).to_bytes())
    program = (
        "import sys, torch\n"
        "from segray import model\n"
        f"module = model.build(model.load({str(path)!r}))\n"
        "module(torch.zeros(2, 3, 64, 64))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        f"assert ('timm' in sys.modules) == {'tu-' in name}\n"
        "torch.compile(torch.nn.ReLU(), backend='eager')(torch.zeros(1))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
