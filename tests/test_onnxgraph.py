import json
import sys
import warnings
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import ukis_csmask
from onnx import TensorProto, helper
from torch import Tensor
from ukis_csmask.mask import CSmask

from segray import model, onnxgraph
from segray.classes import Classes
from segray.errors import ModelError, SettingsError
from segray.model import Checkpoint, Preprocessing
from segray.onnxgraph import Graph
from segray.predict import Prediction, Predictor, Raster
from segray.tile import Tiling, Window
from tests.conftest import random_checkpoint
from tests.graphs import BANDS, convolutions, described, halving, write

PUBLISHED = Path(ukis_csmask.__file__).parent
LANDSAT = ("blue", "green", "red", "nir", "swir16", "swir22")

pytestmark = pytest.mark.usefixtures("one_thread")


def graph_of(proto: onnx.ModelProto, num_classes: int = 3, **settings: Any) -> Graph:
    return Graph(proto.SerializeToString(), num_classes=num_classes, **settings)


def counts(*shape: int, seed: int = 0) -> Tensor:
    """Whole numbers, of which `convolutions` makes others without rounding."""
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def reflectances(height: int, width: int, num_bands: int, seed: int = 0) -> np.ndarray:
    """Coarse and fine noise from 0 to 1, as (height, width, bands)."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.random((height // 32 + 1, width // 32 + 1, num_bands)), np.ones((32, 32, 1)))
    return (0.8 * coarse[:height, :width] + 0.2 * rng.random((height, width, num_bands))).astype(np.float32)


@pytest.fixture(scope="module")
def clouds() -> Checkpoint:
    return model.load(str(PUBLISHED / "model_4b_l1c.onnx"))


@pytest.mark.parametrize(("name", "num_bands"), [("4b_l1c", 4), ("4b_l2a", 4), ("6b_l1c", 6), ("6b_l2a", 6)])
def test_the_published_cloud_models_load_as_they_are(name: str, num_bands: int) -> None:
    path = PUBLISHED / f"model_{name}.onnx"
    statistics = json.loads(path.with_suffix(".json").read_text())["data"]["dataset_statistics"]
    loaded = model.load(str(path))
    assert loaded.architecture == "onnx"
    assert loaded.arguments == {"output": "logits", "tile_size": 256}
    assert loaded.preprocessing.bands == LANDSAT[:num_bands]
    assert [list(loaded.preprocessing.mean), list(loaded.preprocessing.std)] == statistics["img"]
    assert loaded.classes.names == ("class 0", "class 1", "class 2")
    assert loaded.origin == {"weights": str(path)}


def test_the_published_cloud_models_logits_are_those_of_their_own_session(clouds: Checkpoint) -> None:
    image = reflectances(256, 256, 4)
    theirs = CSmask(image.copy(), list(LANDSAT[:4]), intra_op_num_threads=1, batch_size=4)
    module = model.build(Checkpoint.from_bytes(clouds.to_bytes()))
    tile = torch.from_numpy(theirs.img).permute(2, 0, 1)[None]  # as their code normalises it
    expected = theirs.session.run(None, {theirs.input_names: tile.numpy()})[0]
    np.testing.assert_array_equal(module(tile).numpy(), expected)

    ours = model.normalised(torch.from_numpy(image).permute(2, 0, 1)[None], clouds.preprocessing)
    torch.testing.assert_close(ours, tile, rtol=0, atol=1e-6)
    torch.testing.assert_close(module(ours), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_the_published_cloud_models_label_windows(clouds: Checkpoint) -> None:
    image = reflectances(256, 300, 4).transpose(2, 0, 1)
    core = Window(30, 20, 200, 180)
    predictor = Predictor(clouds.to_bytes, tiling=Tiling(size=256, overlap=64))
    (prediction,) = predictor.predict_windows([Raster(values=image, valid=np.ones((256, 300), bool), core=core)])
    assert isinstance(prediction, Prediction)
    module = model.build(clouds)
    left = module(model.normalised(torch.from_numpy(image[None, :, :, :256]), clouds.preprocessing))
    alone = slice(30, 192)  # the columns that the second tile does not reach
    expected = left.argmax(1)[0, 20:200, alone].numpy()
    np.testing.assert_array_equal(prediction.label_map[:, : alone.stop - alone.start], expected)
    assert prediction.num_pixels.sum() == 200 * 180


def test_classes_may_be_named_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("clear\ncloud\ncloud shadow")
    loaded = model.load(str(PUBLISHED / "model_4b_l2a.onnx"), classes=str(path))
    assert loaded.classes.names == ("clear", "cloud", "cloud shadow")
    path.write_text("clear\ncloud")
    with pytest.raises(ModelError, match=r"model_4b_l2a\.onnx gives 3 classes, and there are names of 2: clear, cloud"):
        model.load(str(PUBLISHED / "model_4b_l2a.onnx"), classes=str(path))


def test_an_exported_model_gives_the_logits_of_the_one_that_it_was_made_from(tmp_path: Path) -> None:
    preprocessing = Preprocessing(channels=("a", "b", "c", "d", "e"), mean=(1, 2, 3, 4, 5), std=(1, 2, 1, 2, 1))
    arguments = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}
    made = random_checkpoint("unet_resnet18", Classes(("x", "y")), preprocessing, arguments=arguments)
    module, exported = model.build(made), tmp_path / "exported.onnx"
    axes = {0: "batch", 2: "height", 3: "width"}
    with warnings.catch_warnings(action="ignore"):  # the newer exporter would need one more package
        torch.onnx.export(
            module,
            (torch.zeros(1, 5, 64, 64),),
            exported,
            dynamo=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": axes, "logits": axes},
        )
    described = {"classes": ["x", "y"], "bands": list("abcde"), "mean": [1, 2, 3, 4, 5], "std": [1, 2, 1, 2, 1]}
    loaded = model.load(write(tmp_path / "unet.onnx", exported.read_bytes(), described))
    assert loaded.preprocessing == preprocessing
    images = torch.randn(2, 5, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model.build(loaded)(images), module(images), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_onnx_survives_its_bytes_and_its_digest_is_of_all_that_decides(tmp_path: Path) -> None:
    loaded = model.load(write(tmp_path / "m.onnx", convolutions(), described()))
    again = Checkpoint.from_bytes(loaded.to_bytes())
    assert again.digest() == loaded.digest()
    assert again.arguments == loaded.arguments
    images = counts(2, 4, 40, 50)
    assert torch.equal(model.build(again)(images), model.build(loaded)(images))
    others = [
        model.load(write(tmp_path / "seed.onnx", convolutions(seed=1), described())),
        model.load(write(tmp_path / "tile.onnx", convolutions(), described(tile_size=64))),
        model.load(write(tmp_path / "mean.onnx", convolutions(), described(mean=[1, 0, 0, 0]))),
        model.load(write(tmp_path / "bands.onnx", convolutions(), described(bands=["a", "b", "c", "d"]))),
    ]
    assert len({loaded.digest(), *(other.digest() for other in others)}) == 5
    assert model.load(write(tmp_path / "copy.onnx", convolutions(), described())).digest() == loaded.digest()


def test_descriptions_are_read_from_uris_and_in_toml() -> None:
    toml = """
        bands = ["red", "green", "blue", "nir"]
        mean = [0, 0.5, 1, 2]
        std = [1, 1, 2, 2]
        tile_size = 64
        [classes]
        names = ["soil", "crop", "weed"]
        palette = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        ignore_index = 99
    """
    for name, content in {"m.onnx": convolutions().SerializeToString(), "m.toml": toml.encode()}.items():
        with fsspec.open(f"memory://graphs/{name}", "wb") as file:
            file.write(content)
    loaded = model.load("memory://graphs/m.onnx")
    assert loaded.classes == Classes(("soil", "crop", "weed"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)), 99)
    assert loaded.preprocessing == Preprocessing(channels=tuple(BANDS), mean=(0, 0.5, 1, 2), std=(1, 1, 2, 2))
    assert loaded.arguments["tile_size"] == 64


def test_a_model_of_images_is_described_like_preprocessing(tmp_path: Path) -> None:
    fields = {"classes": 3, "bands": "BGR", "range": 255, "resize": 64, "mean": [1, 2, 3], "std": [4, 5, 6]}
    loaded = model.load(write(tmp_path / "m.onnx", convolutions(3), fields))
    assert loaded.preprocessing == Preprocessing(channels="BGR", range=255, resize=64, mean=(1, 2, 3), std=(4, 5, 6))
    plain = model.load(write(tmp_path / "plain.onnx", convolutions(3), {"classes": 3, "bands": "RGB"}))
    assert plain.preprocessing == Preprocessing()
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    (prediction,) = Predictor(plain.to_bytes).predict([image])
    assert isinstance(prediction, Prediction)
    values = model.normalised(torch.from_numpy(image).permute(2, 0, 1)[None], Preprocessing())
    np.testing.assert_array_equal(prediction.label_map, model.build(plain)(values).argmax(1)[0].numpy())


def test_photographs_of_any_size_are_padded_for_a_graph_that_halves_them(tmp_path: Path) -> None:
    loaded = model.load(write(tmp_path / "m.onnx", halving(5), {"classes": 3, "bands": "RGB"}))
    image = np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)
    (prediction,) = Predictor(loaded.to_bytes).predict([image])
    assert isinstance(prediction, Prediction)
    values = model.normalised(torch.from_numpy(image).permute(2, 0, 1)[None], Preprocessing())
    padded = F.pad(values, (0, 26, 0, 19), mode="replicate")
    np.testing.assert_array_equal(prediction.label_map, model.build(loaded)(padded).argmax(1)[0, :45, :70].numpy())


def test_a_graph_that_asks_for_more_than_multiples_of_32_says_so_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not run on 288×288 pixels .*; where it wants another size"):
        model.load(write(tmp_path / "m.onnx", halving(6), {"classes": 3, "bands": "RGB"}))
    assert model.load(write(tmp_path / "m.onnx", halving(6), {"classes": 3, "bands": "RGB", "tile_size": 128}))


def test_a_batch_of_a_fixed_number_is_filled_up() -> None:
    images = counts(5, 4, 20, 30)
    expected = graph_of(convolutions())(images)
    for number in (1, 2, 5, 7):
        assert torch.equal(graph_of(convolutions(batch=number))(images), expected)


@pytest.mark.parametrize("size", [(64, 64), ("height", 64), ("height", "width")])
def test_a_model_of_a_fixed_size_is_fed_that_size_alone(
    size: tuple[int | str, int | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = described(bands="RGB", mean=[0] * 3, std=[1 / 255] * 3) | ({} if 64 in size else {"tile_size": 64})
    loaded = model.load(write(tmp_path / "m.onnx", convolutions(3, size=size), fields))
    assert model.fitted_tiling(loaded, Tiling()) == Tiling(size=64, overlap=8)
    assert model.fitted_tiling(loaded, Tiling(size=64, overlap=20, blend="flat")).overlap == 20
    assert model.window_multiple(loaded, Tiling()) == 56

    shapes: list[tuple[int, ...]] = []
    run = Graph.run

    def watched(self: Graph, images: Tensor) -> Tensor:
        shapes.append(tuple(images.shape))
        return run(self, images)

    monkeypatch.setattr(Graph, "run", watched)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 4, (height, width, 3), np.uint8) for height, width in ((10, 100), (150, 70), (64, 1))]
    for image, prediction in zip(images, Predictor(loaded.to_bytes).predict(images), strict=True):
        assert isinstance(prediction, Prediction)
        assert prediction.label_map.shape == image.shape[:2]
    assert {shape[1:] for shape in shapes} == {(3, 64, 64)}
    # What is smaller is padded by its last rows and columns.
    padded = F.pad(torch.from_numpy(images[2]).permute(2, 0, 1)[None].float(), (0, 63, 0, 0), mode="replicate")
    (narrow,) = Predictor(loaded.to_bytes).predict([images[2]])
    assert isinstance(narrow, Prediction)
    np.testing.assert_array_equal(narrow.label_map, model.build(loaded)(padded).argmax(1)[0, :, :1].numpy())


def test_a_label_map_does_not_depend_on_what_it_was_batched_with(clouds: Checkpoint) -> None:
    module = model.build(clouds)
    assert model.batch_minimum(module) == 1
    image = torch.from_numpy(reflectances(256, 768, 4)).permute(2, 0, 1)
    tiles = torch.stack(torch.split(image, 256, dim=2))
    together = module(tiles)
    for index in range(3):
        assert torch.equal(module(tiles[index : index + 1]), together[index : index + 1])


def test_probabilities_say_the_same_as_the_logits_that_they_were_made_of() -> None:
    images = counts(1, 4, 30, 40)
    expected = graph_of(convolutions())(images / 100)
    given = graph_of(convolutions(after=["Softmax"]), output="probabilities")(images / 100)
    torch.testing.assert_close(given.softmax(1), expected.softmax(1), rtol=1e-4, atol=1e-6)
    certain = graph_of(convolutions(after=["Softmax"]), output="probabilities")(images * 100)
    assert certain.isfinite().all(), "a probability of 0 has a finite logarithm"


def test_one_channel_for_two_classes_is_the_seconds() -> None:
    images = counts(1, 4, 30, 40) / 100
    expected = graph_of(convolutions(num_classes=1), 1)(images).sigmoid()
    for after, output in (([], "logits"), (["Sigmoid"], "probabilities")):
        given = graph_of(convolutions(num_classes=1, after=after), 2, output=output)(images).softmax(1)
        torch.testing.assert_close(given[:, 1:], expected, rtol=1e-5, atol=1e-6)


def test_a_graph_in_half_precision_is_fed_so() -> None:
    images = counts(2, 4, 20, 30)
    given = graph_of(convolutions(dtype=TensorProto.FLOAT16))(images)
    assert given.dtype == torch.float32
    assert torch.equal(given, graph_of(convolutions())(images))


def test_a_graph_runs_in_as_many_threads_as_torch() -> None:
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            assert graph_of(convolutions())._session.get_session_options().intra_op_num_threads == number
        finally:
            torch.set_num_threads(1)


def test_a_graph_stays_where_it_is_when_it_is_moved_to_the_cpu() -> None:
    graph = graph_of(convolutions())
    session = graph._session
    assert graph.to(memory_format=torch.channels_last).to("cpu").float()._session is session


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_without_the_onnxruntime_for_gpus_a_graph_does_not_run_on_the_cpu_in_silence() -> None:
    with pytest.raises(ModelError, match="install onnxruntime-gpu in its place, or give --device cpu"):
        onnxgraph._session(convolutions().SerializeToString(), torch.device("cuda"), "m.onnx")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_logits_of_the_cpu(clouds: Checkpoint) -> None:
    tile = torch.from_numpy(reflectances(256, 256, 4)).permute(2, 0, 1)[None]
    on_gpu = model.build(clouds).to("cuda")(tile.to("cuda"))
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), model.build(clouds)(tile), rtol=1e-3, atol=1e-3)


def test_without_onnxruntime_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SettingsError, match=r"needs onnxruntime, which is not installed; pip install 'segray\[onnx\]'"):
        graph_of(convolutions())


def without(*names: str, **others: Any) -> dict[str, Any]:
    return {name: value for name, value in described(**others).items() if name not in names}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("no JSON", r"m\.json is not valid JSON: "),
        ("[1]", r"m\.json holds no object; expected {"),
        (without("classes"), "'classes' is missing"),
        (without("bands"), "'bands' is missing"),
        (without("mean"), "mean and std are missing"),
        (described(mean=["1", "2", "3", "4"]), r"mean \('1', .* must be finite numbers"),
        (described(mean=[1, 2]), "2 means and 4 stds for 4 channels"),
        (described(bands=["a", "b", "c", "A"]), "a band stands twice"),
        (described(bands="RGBN"), "channels 'RGBN' must be 'RGB', 'BGR' or 'L'"),
        (described(resize=64), "resize 64 are of images"),
        (described(classes=["a", "a"]), "names are given twice: a"),
        (described(classes=0), "there are no names"),
        (described(classes={"name": 1}), "expected"),
        (described(tiles=256), r"unknown fields \['tiles'\]; there are \['bands', 'classes'"),
        (described(tile_size=16), "tile_size 16 must be a number of pixels, at least 32"),
        (described(tile_size="64"), "tile_size '64' must be a number"),
        (described(output="softmax"), "output 'softmax' must be 'logits' or 'probabilities'"),
        ({"data": {"classes": 3}}, "'dataset_statistics' is missing"),
        (described(classes=["a", "b"]), "gives 3 classes, and there are names of 2: a, b; name as many"),
        (
            described(bands=["a", "b", "c"], mean=[0] * 3, std=[1] * 3),
            "takes 4 bands, and its description names 3: a, b, c",
        ),
        (described(output="probabilities"), 'gives logits, not probabilities; leave "output" out'),
    ],
)
def test_a_description_that_does_not_fit_is_refused(description: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", convolutions(), description)
    with pytest.raises(ModelError, match=message) as caught:
        model.load(path)
    assert str(tmp_path / "m.") in str(caught.value)
    assert "\n" not in str(caught.value)


def two_inputs() -> onnx.ModelProto:
    proto = convolutions()
    proto.graph.input.append(helper.make_tensor_value_info("threshold", TensorProto.FLOAT, [1]))
    return proto


def of_a_type(number: int, shape: list[str]) -> onnx.ModelProto:
    given, gives = (helper.make_tensor_value_info(name, number, shape) for name in ("x", "y"))
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "identity", [given], [gives])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


WHOLE = convolutions().SerializeToString()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an ONNX file, or a truncated one"),
        (b"<html>403 Forbidden</html>", "is not an ONNX file, or a truncated one"),
        (WHOLE[: len(WHOLE) // 2], "is not an ONNX file, or a truncated one"),
        (two_inputs(), r"has 2 inputs \(image, threshold\)"),
        (of_a_type(TensorProto.UINT8, list("bchw")), r"of tensor\(uint8\), and is to take"),
        (of_a_type(TensorProto.FLOAT, list("chw")), r"takes \(c, h, w\) of tensor\(float\), and is to take"),
        (convolutions(size=(64, 128)), r"takes images of \(64, 128\) pixels alone; export it for squares"),
        (convolutions(size=(16, 16)), r"takes images of \(16, 16\) pixels alone"),
        (convolutions(after=["Softmax"]), 'gives probabilities, not logits; say "output": "probabilities"'),
        (convolutions(after=["GlobalMaxPool", "Squeeze"]), r"gives \(1\), and is to give logits"),
        (convolutions(after=["ArgMax"]), r"gives tensor\(int64\), and is to give logits"),
        (convolutions(num_classes=1), "gives 1 classes, and there are names of 3"),
        (convolutions(after=["MatMulInteger"]), "is not an ONNX file"),
    ],
)
def test_a_file_that_is_no_model_of_ours_is_refused(
    content: onnx.ModelProto | bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.onnx", content, described())
    with pytest.raises(ModelError, match=message) as caught:
        model.load(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_graph_and_description_say_of_sizes_must_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", convolutions(size=(64, 64)), described(tile_size=128))
    with pytest.raises(ModelError, match="takes tiles of 64 pixels alone, and its description says 128"):
        model.load(path)
    assert model.load(write(tmp_path / "m.onnx", convolutions(size=(64, 64)), described(tile_size=64)))


def test_a_graph_that_wants_another_size_than_any_says_so_at_once(tmp_path: Path) -> None:
    proto = convolutions()
    proto.graph.node[-1].CopyFrom(helper.make_node("Add", ["step0", "grid"], ["logits"]))
    proto.graph.initializer.append(helper.make_tensor("grid", TensorProto.FLOAT, [96, 96], np.zeros(96 * 96)))
    with pytest.raises(
        ModelError, match=r"does not run on 288×288 pixels .*; where it wants another size, say so as tile_size"
    ):
        model.load(write(tmp_path / "m.onnx", proto, described()))
    assert model.load(write(tmp_path / "m.onnx", proto, described(tile_size=96)))


def test_weights_in_another_file_are_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(convolutions(), path, save_as_external_data=True, size_threshold=0, location="m.data")
    (tmp_path / "m.json").write_text(json.dumps(described()))
    monkeypatch.chdir(tmp_path)  # where onnxruntime would find it
    with pytest.raises(ModelError, match="keeps its weights in another file") as caught:
        model.load(str(path))
    onnx.save(onnx.load(path), tmp_path / "whole.onnx")  # as the message says
    assert "onnx.save(onnx.load(" in str(caught.value)
    assert model.load(write(tmp_path / "n.onnx", (tmp_path / "whole.onnx").read_bytes(), described()))


def test_a_model_without_description_or_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ModelError, match=r"m\.onnx cannot be read: FileNotFoundError"):
        model.load(str(path))
    path.write_bytes(WHOLE)
    with pytest.raises(ModelError, match=r"put m\.json or m\.toml beside it: expected {\"classes\""):
        model.load(str(path))
    (tmp_path / "m.toml").write_text("classes = [")
    with pytest.raises(ModelError, match=r"m\.toml is not valid TOML"):
        model.load(str(path))


def test_what_does_not_go_with_onnx_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", convolutions(), described())
    with pytest.raises(SettingsError, match="--weights goes with an architecture's name, not with the file"):
        model.load(path, "weights.pth")
    ours = tmp_path / "ours.safetensors"
    ours.write_bytes(model.load(path).to_bytes())
    for name in (path, str(ours)):
        with pytest.raises(ModelError, match="is an ONNX model, which cannot be trained"):
            model.start(name, Classes(("a", "b")))


def test_other_models_keep_the_tiling_that_was_asked_for() -> None:
    checkpoint = random_checkpoint("unet_resnet18")
    for tiling in (Tiling(), Tiling(size=96, overlap=16)):
        assert model.fitted_tiling(checkpoint, tiling) == tiling
    assert model.window_multiple(checkpoint, Tiling()) == 32
