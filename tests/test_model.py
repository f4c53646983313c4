import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from segray import model
from segray.classes import Classes
from segray.errors import ModelError, SettingsError
from segray.model import Checkpoint, Preprocessing
from tests.conftest import CAMVID_CLASSES, random_checkpoint

TORCHVISION = torchvision.models.list_models(torchvision.models.segmentation)
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


def test_the_known_models_are_torchvisions_and_smps() -> None:
    text = model.known_models()
    assert len(TORCHVISION) >= 6
    assert all(name in text for name in TORCHVISION)
    assert all(name in text for name in ("unet", "unetplusplus", "pspnet", "deeplabv3plus", "fpn", "upernet"))


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
        ({"channels": "RGBA"}, "channels 'RGBA' must be 'RGB', 'BGR' or 'L'"),
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


def test_input_multiples_are_those_that_the_libraries_demand() -> None:
    multiples = {"unetplusplus_mobilenet_v2": 32, "pspnet_mobilenet_v2": 8, "lraspp_mobilenet_v3_large": 1, SMALL: 1}
    for name, multiple in multiples.items():
        assert model.input_multiple(model.build(model.untrained(name, CAMVID_CLASSES))) == multiple
