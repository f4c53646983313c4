import copy
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms._presets import SemanticSegmentation

from segray import demo, model
from segray.classes import Classes
from segray.crf import Crf, refine
from segray.decode import MAX_PIXELS, decode, decode_for
from segray.errors import Reject, SettingsError
from segray.forward import Choice, DType, Forward
from segray.model import Preprocessing
from segray.predict import Prediction, Predictor, Raster
from segray.tail import Grid, blocked
from segray.tile import Tiling, Window
from tests.awful import encoded
from tests.conftest import CAMVID_CLASSES, random_checkpoint
from tests.graphs import convolutions, described, write

SMALL = "unet_tu-mobilenetv3_small_050"
ABC = Classes(("a", "b", "c"))
DEMO = Path(demo.__file__).with_name("demo.safetensors")
IDENTITY = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def checkpoint_bytes(name: str, preprocessing: Preprocessing, classes: Classes = CAMVID_CLASSES) -> bytes:
    return random_checkpoint(name, classes, preprocessing).to_bytes()


def predictor(name: str = SMALL, preprocessing: Preprocessing | None = None, **settings: Any) -> Predictor:
    return Predictor(lambda: checkpoint_bytes(name, preprocessing or Preprocessing()), **settings)


@cache
def _of_three_classes(preprocessing: Preprocessing) -> Predictor:
    return Predictor(lambda: checkpoint_bytes(SMALL, preprocessing, ABC))


def with_module(
    module: nn.Module,
    preprocessing: Preprocessing = IDENTITY,
    *,
    tiling: Tiling | None = None,
    batch_size: int = 16,
    crf: Crf | None = None,
    stride: int = 1,
    keeps_confidence: bool = False,
) -> Predictor:
    """A predictor of three classes whose model is this one."""
    made = copy.copy(_of_three_classes(preprocessing))
    made._forward = Forward(module, torch.zeros(1, 3, 8, 8), device=torch.device("cpu"), dtype="float32")
    made._minimum, made._multiple, made._stride = 1, 1, stride
    made._aligns_corners = False
    made._tiling, made._batch_size, made._crf = tiling or Tiling(), batch_size, crf
    made._keeps_confidence = keeps_confidence
    return made


class PerPixel(nn.Module):
    """Looks at single pixels."""

    def forward(self, images: Tensor) -> Tensor:
        red, green, blue = images[:, 0], images[:, 1], images[:, -1]
        return torch.stack([red * 3 - green, green * blue * 4 - red, (blue - 0.3) * 2 + red * red], dim=1)


class Neighbourhood(nn.Module):
    """Looks at 3×3 pixels, and gives half the resolution."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(PerPixel()(images), 3, stride=2, padding=1)


class Constant(nn.Module):
    """Gives each pixel the same logits."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[None, :, None, None].expand(len(images), -1, *images.shape[-2:])


def photos(*sizes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """Noise, coarse and fine."""
    rng = np.random.default_rng(seed)
    images = []
    for height, width in sizes:
        coarse = rng.integers(0, 200, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
        coarse = np.kron(coarse, np.ones((16, 16, 1), np.uint8))[:height, :width]
        images.append(coarse + rng.integers(0, 56, (height, width, 3), np.uint8))
    return images


def only(results: Sequence[Prediction | Reject]) -> list[Prediction]:
    assert not [result for result in results if isinstance(result, Reject)]
    return [result for result in results if isinstance(result, Prediction)]


def assert_consistent(prediction: Prediction, image: np.ndarray, num_classes: int = 3) -> None:
    assert prediction.label_map.shape == image.shape[:2]
    assert prediction.label_map.dtype == (np.uint8 if num_classes <= 256 else np.uint16)
    np.testing.assert_array_equal(
        prediction.num_pixels, np.bincount(prediction.label_map.ravel(), minlength=num_classes)
    )
    assert (prediction.confidence_sum <= prediction.num_pixels * (1 + 1e-6)).all()
    assert (prediction.confidence_sum >= prediction.num_pixels / num_classes * (1 - 1e-6)).all()


def assert_same(ours: Sequence[Prediction], theirs: Sequence[Prediction], exactly: bool = True) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.label_map, yours.label_map)
        np.testing.assert_array_equal(mine.num_pixels, yours.num_pixels)
        np.testing.assert_allclose(mine.confidence_sum, yours.confidence_sum, rtol=0 if exactly else 1e-7)


def assert_is_argmax(label_map: np.ndarray, module: nn.Module, batch: Tensor, height: int, width: int) -> None:
    """The label map is that of the library's own forward pass, but for pixels whose best two logits nearly equal."""
    with torch.inference_mode():
        output = module(batch)
        if isinstance(output, dict):
            logits = F.interpolate(output["out"], (height, width), mode="bilinear", align_corners=False)
        else:
            logits = output[..., :height, :width]
    best = logits.topk(2, dim=1).values[0]
    clear = (best[0] - best[1] > 1e-3 * logits.std()).numpy()
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(label_map[clear], logits.argmax(1)[0].numpy()[clear])
    assert len(np.unique(label_map)) > 1


@pytest.mark.parametrize("resize", [None, 64])
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_torchvisions_own_forward_pass_gives_the_same_label_map(name: str, resize: int | None) -> None:
    data = checkpoint_bytes(name, Preprocessing(resize=resize))
    images = photos((48, 64), (57, 41), (48, 64))
    module = model.build(model.Checkpoint.from_bytes(data))
    transforms = SemanticSegmentation(resize_size=resize)
    for image, prediction in zip(images, only(Predictor(lambda: data).predict(images)), strict=True):
        batch = transforms(torch.from_numpy(image).permute(2, 0, 1))[None]
        assert_is_argmax(prediction.label_map, module, batch, *image.shape[:2])
        assert_consistent(prediction, image, len(CAMVID_CLASSES))


def test_an_image_decoded_to_fewer_pixels_gets_the_label_map_of_all_of_them_at_its_own_size() -> None:
    checkpoint = model.Checkpoint.from_bytes(DEMO.read_bytes())
    resizing = dataclasses.replace(checkpoint, preprocessing=dataclasses.replace(checkpoint.preprocessing, resize=128))
    large = [Image.fromarray(demo.scene(seed)[0]).resize((960, 640), Image.Resampling.BICUBIC) for seed in range(2)]
    files = [encoded(image, "JPEG", quality=95) for image in large]
    for tiling in (Tiling(), Tiling(size=96, overlap=16)):
        predictor = Predictor(resizing.to_bytes, tiling=tiling)
        whole = only(predictor.predict([decode(data, MAX_PIXELS) for data in files]))
        decoded = [decode_for(data, MAX_PIXELS, 128) for data in files]
        assert all(len(image.pixels) == 320 for image in decoded)
        for expected, given_ in zip(whole, only(predictor.predict_decoded(decoded)), strict=True):
            assert given_.label_map.shape == (640, 960)
            assert (given_.label_map == expected.label_map).mean() > 0.99


def test_at_torchvisions_own_size_the_label_map_is_the_same_too() -> None:
    data = checkpoint_bytes("lraspp_mobilenet_v3_large", Preprocessing(resize=520))
    (image,) = photos((180, 240))
    batch = SemanticSegmentation(resize_size=520)(torch.from_numpy(image).permute(2, 0, 1))[None]
    assert batch.shape[-2:] == (520, 693)
    (ours,) = only(Predictor(lambda: data).predict([image]))
    assert_is_argmax(ours.label_map, model.build(model.Checkpoint.from_bytes(data)), batch, 180, 240)


@pytest.mark.parametrize(
    ("name", "multiple"),
    [(SMALL, 1), ("unetplusplus_mobilenet_v2", 32), ("pspnet_mobilenet_v2", 8), ("fpn_mobilenet_v2", 32)],
)
def test_smps_own_forward_pass_gives_the_same_label_map(name: str, multiple: int) -> None:
    data = checkpoint_bytes(name, Preprocessing())
    images = photos((64, 96), (70, 45), (64, 96))
    module = model.build(model.Checkpoint.from_bytes(data))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (Preprocessing().mean, Preprocessing().std))
    for image, prediction in zip(images, only(Predictor(lambda: data).predict(images)), strict=True):
        height, width = image.shape[:2]
        values = ((torch.from_numpy(image).permute(2, 0, 1).float() / 255 - mean) / std)[None]
        if height % multiple or width % multiple:
            values = F.pad(values, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        assert_is_argmax(prediction.label_map, module, values, height, width)


@pytest.mark.parametrize("name", [SMALL, "lraspp_mobilenet_v3_large", "pspnet_mobilenet_v2"])
def test_a_label_map_does_not_depend_on_what_it_was_batched_with(name: str) -> None:
    data = checkpoint_bytes(name, Preprocessing())
    images = photos((64, 96), (96, 64), (64, 96), (64, 96), (33, 47), (64, 96), (96, 64))
    few, many = Predictor(lambda: data, batch_size=3), Predictor(lambda: data)
    alone = [only(many.predict([image]))[0] for image in images]
    assert_same(only(many.predict(images)), alone)
    assert_same(only(few.predict(images[::-1]))[::-1], alone)


@pytest.mark.parametrize("name", [SMALL, "upernet_mit_b0", "unet_mit_b0", "lraspp_mobilenet_v3_large"])
@pytest.mark.parametrize("resize", [None, 24])
def test_the_smallest_and_thinnest_images_are_labelled(name: str, resize: int | None) -> None:
    images = photos((1, 1), (1, 40), (40, 1), (7, 9))
    predictions = predictor(name, Preprocessing(resize=resize)).predict(images)
    for image, prediction in zip(images, only(predictions), strict=True):
        assert_consistent(prediction, image, len(CAMVID_CLASSES))


def test_an_image_too_elongated_to_resize_is_a_reject_and_costs_no_other() -> None:
    images = photos((1, 9_000), (20, 30), (9_000, 1))
    first, second, third = with_module(PerPixel(), dataclasses.replace(IDENTITY, resize=520)).predict(images)
    assert isinstance(second, Prediction)
    for result in (first, third):
        assert isinstance(result, Reject)
        assert (result.stage, result.kind) == ("predict", "too elongated")
    assert "9000×1" in str(first)
    assert len(only(with_module(PerPixel()).predict(images))) == 3


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    size = draw(st.integers(32, 64))
    return Tiling(size=size, overlap=draw(st.integers(0, size // 2)), blend=draw(st.sampled_from(["cosine", "flat"])))


@given(st.integers(1, 150), st.integers(1, 150), tilings(), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_tiling_equals_labelling_the_whole_for_a_model_that_looks_at_pixels(
    height: int, width: int, tiling: Tiling, batch_size: int, seed: int
) -> None:
    images = photos((height, width), (height, width), seed=seed)
    whole = only(with_module(PerPixel()).predict(images))
    tiled = only(with_module(PerPixel(), tiling=tiling, batch_size=batch_size).predict(images))
    assert_same(tiled, whole, exactly=False)
    for image, prediction in zip(images, tiled, strict=True):
        assert_consistent(prediction, image)


@given(st.integers(20, 60), st.integers(20, 160), tilings())
@settings(deadline=None, max_examples=20)
def test_tiling_after_resizing_equals_resizing_alone(height: int, width: int, tiling: Tiling) -> None:
    images = photos((height, width))
    resized = dataclasses.replace(IDENTITY, resize=70)
    whole = only(with_module(PerPixel(), resized).predict(images))
    tiled = only(with_module(PerPixel(), resized, tiling=tiling).predict(images))
    assert_same(tiled, whole, exactly=False)


def test_tiles_of_a_model_that_looks_around_agree_away_from_their_edges() -> None:
    tiling = Tiling(size=64, overlap=16)
    (image,) = photos((64, 160))
    (whole,) = only(with_module(Neighbourhood()).predict([image]))
    (tiled,) = only(with_module(Neighbourhood(), tiling=tiling).predict([image]))
    assert (whole.label_map == tiled.label_map).mean() > 0.97
    np.testing.assert_array_equal(whole.label_map[:, :40], tiled.label_map[:, :40])


class Rows(PerPixel):
    """Per pixel; remembers the shapes that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        return super().forward(images)


def test_images_of_one_size_share_forward_passes_and_tiles_do_too() -> None:
    rows = Rows()
    with_module(rows, batch_size=2).predict(photos((40, 50), (50, 40), (40, 50), (40, 50)))
    assert rows.shapes == [(2, 3, 40, 50), (2, 3, 40, 50), (2, 3, 50, 40)]  # one alone is taken twice
    rows = Rows()
    with_module(rows, batch_size=4, tiling=Tiling(size=32, overlap=0)).predict(photos((32, 160)))
    assert rows.shapes == [(4, 3, 32, 32), (2, 3, 32, 32)]
    rows = Rows()
    with_module(rows, batch_size=16).predict(photos((1020, 1020), (1020, 1020)))
    assert rows.shapes == [(1, 3, 1020, 1020)] * 2


def test_of_equal_logits_the_first_class_wins() -> None:
    (image,) = photos((8, 8))
    (prediction,) = only(with_module(Constant(1, 2, 2)).predict([image]))
    assert prediction.num_pixels.tolist() == [0, 64, 0]
    expected = 64 / (np.exp(-1) + 2)
    np.testing.assert_allclose(prediction.confidence_sum, [0, expected, 0], rtol=1e-6)


def test_confidence_is_the_softmax_of_the_label() -> None:
    images = photos((31, 45), (64, 64))
    made = with_module(PerPixel())
    for image, prediction in zip(images, only(made.predict(images)), strict=True):
        probabilities = PerPixel()(torch.from_numpy(image).permute(2, 0, 1)[None] / 255).softmax(1)[0]
        best, label = probabilities.max(0)
        sums = torch.bincount(label.flatten(), best.flatten().double(), minlength=3)
        np.testing.assert_allclose(prediction.confidence_sum, sums.numpy(), rtol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    (prediction,) = only(with_module(Constant(-3e38, 3e38, -1e38)).predict(photos((4, 4))))
    assert prediction.confidence_sum.tolist() == [0, 16, 0]


class Fragile(PerPixel):
    """Gives a number that is not finite where an image is bright."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        logits[images.mean((1, 2, 3)) > 0.5, 1, 0, 0] = self.number
        return logits


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [(40, 40), (40, 100)])
def test_numbers_that_are_not_finite_reject_their_image_alone(number: float, size: tuple[int, int]) -> None:
    dark = np.full((*size, 3), 20, np.uint8)
    images = [dark, dark + 200, dark + 1, dark + 210]
    results = with_module(Fragile(number), tiling=Tiling(size=64, overlap=8)).predict(images)
    for result in (results[1], results[3]):
        assert isinstance(result, Reject)
        assert (result.stage, result.kind) == ("predict", "not finite")
    whole = only(with_module(PerPixel()).predict([images[0], images[2]]))
    assert_same(only([results[0], results[2]]), whole, exactly=False)


CHANNELS: list[tuple[Literal["RGB", "BGR", "L"], Literal[1, 255]]] = [("RGB", 255), ("BGR", 1), ("BGR", 255), ("L", 1)]


@pytest.mark.parametrize(("channels", "white"), CHANNELS)
def test_the_model_sees_what_its_preprocessing_says(channels: Any, white: Any) -> None:
    seen: list[Tensor] = []

    class Seen(PerPixel):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.clone())
            return super().forward(images.expand(-1, 3, -1, -1))

    mean, std = ((0.4,), (2.0,)) if channels == "L" else ((0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    (image,) = photos((5, 6))
    with_module(Seen(), Preprocessing(channels=channels, range=white, mean=mean, std=std)).predict([image])
    if channels == "L":
        planes = (image.astype(np.float64) @ [0.299, 0.587, 0.114])[None]
    else:
        planes = image.transpose(2, 0, 1).astype(np.float64)[:: -1 if channels == "BGR" else 1]
    expected = (planes * white / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    tolerance = 1 / 255 if channels == "L" else 1e-4
    np.testing.assert_allclose(seen[0][0].numpy(), expected, atol=tolerance)


def test_beyond_256_classes_label_maps_are_16_bit() -> None:
    classes = Classes(tuple(map(str, range(300))), ignore_index=999)
    data = checkpoint_bytes("lraspp_mobilenet_v3_large", Preprocessing(), classes)
    made = Predictor(lambda: data)
    made._forward = Forward(Constant(*range(300)), torch.zeros(1, 3, 8, 8), device=torch.device("cpu"), dtype="float32")
    (image,) = photos((6, 7))
    (prediction,) = only(made.predict([image]))
    assert_consistent(prediction, image, 300)
    assert (prediction.label_map == 299).all()


def batch_of(images: Sequence[np.ndarray | None]) -> pa.Table:
    """Rows as the decoder gives them; None is an image that it rejected."""
    return pa.table(
        {
            "image_id": pa.array([str(index) for index in range(len(images))], pa.string()),
            "pixels": pa.array([None if i is None else i.tobytes() for i in images], pa.large_binary()),
            "num_rows": pa.array([None if i is None else i.shape[0] for i in images], pa.int32()),
            "height": pa.array([None if i is None else i.shape[0] for i in images], pa.int32()),
            "width": pa.array([None if i is None else i.shape[1] for i in images], pa.int32()),
            "stage": pa.array(["decode" if i is None else None for i in images], pa.string()),
            "reason": pa.array(["empty: the file has 0 bytes" if i is None else None for i in images], pa.string()),
            "other": pa.array([[index, index] for index in range(len(images))], pa.list_(pa.int64())),
        }
    )


def test_a_table_keeps_its_rows_and_other_columns_and_gains_label_maps() -> None:
    dark = np.full((9, 7, 3), 20, np.uint8)
    images = [dark, None, dark + 200, photos((5, 8))[0] // 2]
    batch = batch_of(images)
    labelled = with_module(Fragile(float("nan")))(batch)
    assert labelled.schema.names == [
        *("image_id", "height", "width", "other", "label_map", "num_pixels", "confidence_sum", "stage", "reason")
    ]
    for name in ("image_id", "height", "width", "other"):
        assert labelled[name] == batch[name]
    assert labelled["stage"].to_pylist() == [None, "decode", "predict", None]
    assert labelled["reason"][1].as_py() == "empty: the file has 0 bytes"
    assert labelled["reason"][2].as_py().startswith("not finite: ")
    for row, image in enumerate(images):
        if row in (1, 2):
            assert labelled["label_map"][row].as_py() is None
            assert labelled["num_pixels"][row].as_py() is None
            assert labelled["confidence_sum"][row].as_py() is None
            continue
        assert image is not None
        (expected,) = only(with_module(PerPixel()).predict([image]))
        label_map = np.frombuffer(labelled["label_map"][row].as_py(), np.uint8).reshape(image.shape[:2])
        np.testing.assert_array_equal(label_map, expected.label_map)
        assert sum(labelled["num_pixels"][row].as_py()) == image.shape[0] * image.shape[1]
        np.testing.assert_allclose(labelled["confidence_sum"][row].as_py(), expected.confidence_sum)


@pytest.mark.parametrize("images", [[], [None], [None, None]])
def test_a_table_without_images_keeps_its_columns_and_types(images: list[None]) -> None:
    made = with_module(PerPixel())
    labelled = made(batch_of(images))
    assert labelled.num_rows == len(images)
    assert labelled.schema == made(batch_of(photos((3, 4)))).schema


def test_a_table_of_several_chunks_is_labelled() -> None:
    images = photos((5, 6), (7, 8), (5, 6))
    made = with_module(PerPixel())
    chunked = pa.concat_tables([batch_of(images[:1]), batch_of(images[1:])])
    assert made(chunked)["label_map"].to_pylist() == made(batch_of(images))["label_map"].to_pylist()


def test_bfloat16_runs_and_mostly_agrees_with_float32() -> None:
    images = photos((64, 96), (33, 150))
    tiling = Tiling(size=96, overlap=32)
    full = only(predictor(tiling=tiling).predict(images))
    half = only(predictor(tiling=tiling, dtype="bfloat16").predict(images))
    for image, mine, theirs in zip(images, half, full, strict=True):
        assert_consistent(mine, image, len(CAMVID_CLASSES))
        assert (mine.label_map == theirs.label_map).mean() > 0.7


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as a predictor that is made here sets."""
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_small_images_have_a_thread_each_and_a_large_one_has_all() -> None:
    made = predictor(num_threads=2)
    forward, told = made._forward, set()

    def telling(values: Tensor) -> Tensor:
        told.add((values.shape[2:], threading.get_ident(), torch.get_num_threads()))
        time.sleep(0.1)  # or one thread might do it all
        return forward(values)

    made._forward = telling  # type: ignore[assignment]
    only(made.predict(photos((32, 64), (48, 64), (800, 992), (64, 64))))
    large = ((800, 992), threading.get_ident(), 2)
    assert large in told
    assert {num_threads for _, _, num_threads in told - {large}} == {1}
    assert len({thread for _, thread, _ in told - {large}}) == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_label_maps_of_several_threads_are_those_of_one(dtype: DType) -> None:
    images = [image for seed in range(4) for image in photos((48, 64), (64, 48), (33, 150), (40, 40), seed=seed)]
    settings: dict[str, Any] = {"tiling": Tiling(size=96, overlap=32), "dtype": dtype}
    alone = only(predictor(num_threads=1, **settings).predict(images))
    assert_same(only(predictor(num_threads=2, **settings).predict(images)), alone)


class Exhausted(nn.Module):
    """Has memory for so many images, and none for one with a white corner."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        if len(images) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if (images[:, :, 0, 0] == 1).all(1).any():
            raise ValueError("an odd image")
        result: Tensor = PerPixel()(images)
        return result


def test_a_batch_too_large_for_the_memory_is_halved_until_it_fits() -> None:
    images = photos(*[(32, 48)] * 8)
    expected = only(with_module(PerPixel()).predict(images))
    module = Exhausted(2)
    for ours, theirs in zip(only(with_module(module).predict(images)), expected, strict=True):
        np.testing.assert_array_equal(ours.label_map, theirs.label_map)
    assert module.sizes[:3] == [8, 4, 2]


def test_an_image_that_fails_alone_is_a_reject_and_the_batchs_others_are_labelled() -> None:
    images = photos(*[(32, 48)] * 5)
    images[3][0, 0] = 255
    results = with_module(Exhausted(16)).predict(images)
    assert [isinstance(result, Reject) for result in results] == [False, False, False, True, False]
    [reject] = [result for result in results if isinstance(result, Reject)]
    assert (reject.stage, reject.kind) == ("predict", "the model failed")
    assert "an odd image" in reject.detail
    assert "48×32" in reject.detail


def test_tiles_that_do_not_fit_together_go_one_at_a_time_and_then_the_image_is_a_reject() -> None:
    (image,) = photos((96, 96))
    tiling = Tiling(size=32, overlap=8)
    (expected,) = only(with_module(PerPixel(), tiling=tiling).predict([image]))
    (ours,) = only(with_module(Exhausted(2), tiling=tiling).predict([image]))  # a lone tile runs as two
    np.testing.assert_array_equal(ours.label_map, expected.label_map)
    (result,) = with_module(Exhausted(0), tiling=tiling).predict([image])
    assert isinstance(result, Reject)
    assert result.kind == "out of memory"
    assert "--tiling.size" in result.detail


@pytest.mark.parametrize("resize", [None, 24])
def test_a_crf_refines_images_at_their_own_size(resize: int | None) -> None:
    crf = Crf(theta_beta=20.0)
    preprocessing = dataclasses.replace(IDENTITY, resize=resize)
    images = photos((40, 50), (33, 61), (40, 50))
    predictions = only(with_module(PerPixel(), preprocessing, crf=crf).predict(images))
    plain = only(with_module(PerPixel(), preprocessing).predict(images))
    for image, ours, unrefined in zip(images, predictions, plain, strict=True):
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        seen = SemanticSegmentation(resize_size=resize, mean=IDENTITY.mean, std=IDENTITY.std)(pixels)
        logits = F.interpolate(PerPixel()(seen[None]), image.shape[:2], mode="bilinear", align_corners=False)
        best, label = refine(logits[0], pixels, crf).max(0)
        np.testing.assert_array_equal(ours.label_map, label.numpy())
        sums = torch.bincount(label.flatten(), best.flatten().double(), minlength=3)
        np.testing.assert_allclose(ours.confidence_sum, sums.numpy(), rtol=1e-5)
        assert_consistent(ours, image)
        assert (ours.label_map != unrefined.label_map).any()


@pytest.mark.parametrize("resize", [None, 70])
@pytest.mark.parametrize("tiling", [Tiling(size=32, overlap=0), Tiling(size=48, overlap=20)])
def test_a_crf_sees_no_seams_between_tiles(resize: int | None, tiling: Tiling) -> None:
    images = photos((50, 90), (50, 90), (101, 33))
    preprocessing = dataclasses.replace(IDENTITY, resize=resize)
    whole = only(with_module(PerPixel(), preprocessing, crf=Crf()).predict(images))
    tiled = only(with_module(PerPixel(), preprocessing, tiling=tiling, crf=Crf()).predict(images))
    assert_same(tiled, whole, exactly=False)


def test_a_class_that_a_crf_rules_out_costs_no_confidence() -> None:
    (prediction,) = only(with_module(Constant(-500, 500, -200), crf=Crf()).predict(photos((8, 8))))
    assert prediction.confidence_sum.tolist() == [0, 64, 0]


def test_what_goes_wrong_with_a_crf_rejects_its_image_alone() -> None:
    dark = np.full((40, 40, 3), 20, np.uint8)
    first, second, third = with_module(Fragile(float("nan")), crf=Crf()).predict([dark, dark + 200, dark + 1])
    assert isinstance(first, Prediction)
    assert isinstance(third, Prediction)
    assert isinstance(second, Reject)
    assert second.kind == "not finite"
    (result,) = with_module(Exhausted(0), crf=Crf()).predict([dark])
    assert isinstance(result, Reject)
    assert "lower --tiling.size or leave out --crf" in result.detail


def test_a_predictor_tells_what_the_crf_took_for_each_image() -> None:
    seconds: list[float] = []
    images = [np.zeros((32, 32, 3), np.uint8)] * 3
    data = checkpoint_bytes(SMALL, Preprocessing())
    Predictor(lambda: data, crf=Crf(), refined=seconds.append).predict(images)
    assert len(seconds) == 3
    assert min(seconds) > 0
    Predictor(lambda: data, refined=seconds.append).predict(images)
    assert len(seconds) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_crf_on_a_gpu_gives_the_label_maps_of_the_cpu() -> None:
    images = [demo.scene(seed)[0] for seed in range(3)]
    for tiling in (Tiling(), Tiling(size=160, overlap=32)):
        on_cpu = only(Predictor(DEMO.read_bytes, tiling=tiling, crf=Crf()).predict(images))
        on_gpu = only(Predictor(DEMO.read_bytes, tiling=tiling, crf=Crf(), device="cuda").predict(images))
        for expected, given_ in zip(on_cpu, on_gpu, strict=True):
            assert (expected.label_map == given_.label_map).mean() >= 0.9999


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_each_image_of_many_batches_gets_its_own_label_map() -> None:
    images = [demo.scene(seed)[0] for seed in range(24)]
    predictor = Predictor(DEMO.read_bytes, batch_size=2, device="cuda")
    for _ in range(5):  # batches of two streams pass each other differently
        for image, given_ in zip(images, only(predictor.predict(images)), strict=True):
            (alone,) = only(predictor.predict([image]))
            assert (alone.label_map == given_.label_map).mean() >= 0.9999


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("dtype", "agreeing"), [("float32", 0.9999), ("float16", 0.999), ("bfloat16", 0.99)])
def test_a_gpu_gives_the_label_maps_of_the_cpu(
    dtype: Literal["float32", "float16", "bfloat16"], agreeing: float
) -> None:
    images = [demo.scene(seed)[0] for seed in range(3)]
    whole, tiled = Tiling(), Tiling(size=160, overlap=32)
    for tiling in (whole, tiled):
        on_cpu = only(Predictor(DEMO.read_bytes, tiling=tiling).predict(images))
        on_gpu = only(Predictor(DEMO.read_bytes, tiling=tiling, device="cuda", dtype=dtype).predict(images))
        for expected, given_ in zip(on_cpu, on_gpu, strict=True):
            assert (expected.label_map == given_.label_map).mean() >= agreeing
            assert given_.num_pixels.sum() == given_.label_map.size


class Crowded(PerPixel):
    """Has memory for one thread."""

    def forward(self, values: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("memory")
        return super().forward(values)


def test_what_lacks_memory_beside_others_is_labelled_alone() -> None:
    images = photos((20, 30), (20, 30), (20, 30), (8, 9))
    crowded, roomy = with_module(Crowded()), with_module(PerPixel())
    crowded._num_threads = 2
    for expected, given_ in zip(only(roomy.predict(images)), only(crowded.predict(images)), strict=True):
        np.testing.assert_array_equal(given_.label_map, expected.label_map)


def test_a_predictor_tells_why_its_tail_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "segray.predict.fast_tail", lambda device, num_classes: (blocked, f"no kernel of {num_classes}")
    )
    choices: list[Choice] = []
    made = predictor(chosen=choices.append)
    only(made.predict([np.zeros((32, 32, 3), np.uint8)]))
    assert [choice.error for choice in choices] == [f"no kernel of {len(CAMVID_CLASSES)}"]


def test_what_is_fed_small_is_labelled_at_its_own_size_a_few_at_a_time() -> None:
    made = with_module(PerPixel(), dataclasses.replace(IDENTITY, resize=8))
    tail, shapes = made._tail, []

    def remember(logits: Tensor, grid: Grid, window: Window) -> tuple[Tensor, Tensor]:
        shapes.append((len(logits), window.height, window.width))
        return tail(logits, grid, window)

    made._tail = remember
    only(made.predict([np.zeros((1000, 1000, 3), np.uint8)] * 5 + [np.zeros((100, 100, 3), np.uint8)] * 5))
    assert shapes == [(2, 1000, 1000)] * 2 + [(1, 1000, 1000), (5, 100, 100)]


@pytest.mark.parametrize("num_images", [2, 3, 4, 9, 10, 64])
def test_threads_get_as_many_batches_each_and_no_image_is_alone(num_images: int) -> None:
    made = with_module(PerPixel())
    made._num_threads = 2
    batches = list(made._batches(range(num_images), 360, 480))
    assert sorted(index for some, _ in batches for index in some) == list(range(num_images))
    assert all(len(some) >= 2 and is_beside for some, is_beside in batches)
    assert len(batches) % 2 == 0 or num_images < 4


def test_a_predictor_tells_how_many_images_each_forward_pass_was_for() -> None:
    signs: list[int] = []
    predictor = Predictor(random_checkpoint("unet_resnet18").to_bytes, batch_size=2, beat=signs.append)
    predictor.predict([np.zeros((32, 32, 3), np.uint8)] * 5)
    assert signs == [2, 2, 1]


FOUR_BANDS = Preprocessing(channels=("red", "green", "blue", "nir"), mean=(1, 2, 3, 4), std=(1, 2, 1, 4))


class Strided(nn.Module):
    """Looks some pixels around and gives fewer pixels; whole numbers in and out, so that nothing is ever rounded."""

    def __init__(self, stride: int, num_bands: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(stride)
        first, second = (
            torch.randint(-2, 3, shape, generator=generator).float() for shape in ((6, num_bands, 5, 5), (3, 6, 3, 3))
        )
        self.first, self.second, self.stride = first, second, stride

    def forward(self, images: Tensor) -> Tensor:
        features = F.conv2d(images, self.first, stride=self.stride, padding=2).relu()
        return F.conv2d(features, self.second, padding=1)


def scene(height: int, width: int, num_bands: int = 4, seed: int = 0) -> np.ndarray:
    """Whole numbers that FOUR_BANDS makes whole numbers of."""
    rng = np.random.default_rng(seed)
    values: np.ndarray = rng.integers(-2, 3, (num_bands, height, width)).astype(np.float32)
    return values * 4


def data_mask(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of pixels with and without data, and a corner without."""
    rng = np.random.default_rng(seed)
    valid: np.ndarray = np.kron(rng.random((height // 8 + 1, width // 8 + 1)) < 0.7, np.ones((8, 8), bool))
    valid = valid[:height, :width]
    valid[: height // 3, : width // 3] = False
    return valid


def whole(values: np.ndarray, valid: np.ndarray | None = None) -> Raster:
    """A scene in one piece."""
    _, height, width = values.shape
    everywhere = np.ones((height, width), bool)
    core = Window(0, 0, width, height)
    return Raster(values=values, valid=everywhere if valid is None else valid, core=core)


def in_windows(predictor: Predictor, values: np.ndarray, valid: np.ndarray, *, core: int, halo: int) -> Prediction:
    """A scene in windows, and what they say together."""
    _, height, width = values.shape
    rasters, places = [], []
    for row in range(0, height, core):
        for col in range(0, width, core):
            rows, cols = slice(row, min(row + core, height)), slice(col, min(col + core, width))
            top, left = max(0, row - halo), max(0, col - halo)
            there = slice(top, rows.stop + halo), slice(left, cols.stop + halo)
            own = Window(col - left, row - top, cols.stop - col, rows.stop - row)
            rasters.append(Raster(values=values[:, *there], valid=valid[there], core=own))
            places.append((rows, cols))
    predictions = only(predictor.predict_windows(rasters))
    label_map = np.zeros((height, width), predictions[0].label_map.dtype)
    for place, prediction in zip(places, predictions, strict=True):
        label_map[place] = prediction.label_map
    return Prediction(
        label_map=label_map,
        num_pixels=np.sum([prediction.num_pixels for prediction in predictions], axis=0),
        confidence_sum=np.sum([prediction.confidence_sum for prediction in predictions], axis=0),
    )


@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_windows_with_a_halo_equal_the_whole_scene_to_the_last_pixel(
    height: int, width: int, stride: int, times: int, seed: int
) -> None:
    halo = 24  # 2 pixels and 2 strides around each are looked at, and a stride of those when it is upsampled
    values, valid = scene(height, width, seed=seed), data_mask(height, width, seed)
    made = with_module(Strided(stride), FOUR_BANDS, stride=stride)
    (expected,) = only(made.predict_windows([whole(values, valid)]))
    given_ = in_windows(made, values, valid, core=16 * times, halo=halo)
    assert_same([given_], [expected], exactly=False)


def test_without_a_halo_windows_do_not_equal_the_whole_scene() -> None:
    values, valid = scene(96, 96), np.ones((96, 96), bool)
    made = with_module(Strided(4), FOUR_BANDS, stride=4)
    (expected,) = only(made.predict_windows([whole(values)]))
    assert (in_windows(made, values, valid, core=32, halo=0).label_map != expected.label_map).any()


def test_windows_of_a_real_architecture_equal_the_whole_scene() -> None:
    arguments = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}  # stride 8; looks less than 80 pixels around
    bands = Preprocessing(channels=("a", "b", "c", "d", "e"), mean=(0.5,) * 5, std=(0.25,) * 5)
    made = random_checkpoint("unet_resnet18", ABC, bands, arguments=arguments)
    assert model.window_multiple(made, Tiling()) == 8
    predictor = Predictor(made.to_bytes)
    rng = np.random.default_rng(0)
    coarse = np.kron(rng.random((5, 14, 18)), np.ones((1, 16, 16)))[:, :211, :275]
    values = (coarse + 0.2 * rng.random((5, 211, 275))).astype(np.float32)
    valid = data_mask(211, 275)
    (expected,) = only(predictor.predict_windows([whole(values, valid)]))
    assert (expected.num_pixels > 1000).all()
    given_ = in_windows(predictor, values, valid, core=96, halo=80)
    assert_same([given_], [expected], exactly=False)
    near = in_windows(predictor, values, valid, core=96, halo=32)
    assert (near.label_map != expected.label_map).any(), "a halo that is too narrow does as well"


@pytest.mark.parametrize(("size", "overlap", "blend"), [(32, 8, "cosine"), (48, 24, "cosine"), (40, 0, "flat")])
@pytest.mark.parametrize("num_strides", [1, 2])
def test_windows_of_a_model_of_a_fixed_size_equal_the_whole_scene(
    size: int, overlap: int, blend: Literal["cosine", "flat"], num_strides: int, tmp_path: Path
) -> None:
    fields = described(mean=[0, 0, 0, 0], std=[4, 4, 4, 4])
    loaded = model.load(write(tmp_path / "m.onnx", convolutions(size=(size, size)), fields))
    tiling = Tiling(size=size, overlap=overlap, blend=blend)
    predictor = Predictor(loaded.to_bytes, tiling=tiling)
    multiple = model.window_multiple(loaded, tiling)
    assert multiple == size - overlap
    # Short last windows, up to one that ends within the overlap of the tile before it.
    for height, width in ((3 * multiple + 5, 4 * multiple + overlap + 3), (2 * multiple + 1, 3 * multiple), (20, 130)):
        values, valid = scene(height, width), data_mask(height, width)
        (expected,) = only(predictor.predict_windows([whole(values, valid)]))
        given_ = in_windows(predictor, values, valid, core=num_strides * multiple, halo=multiple if overlap else 0)
        assert_same([given_], [expected], exactly=False)
        assert len(np.unique(expected.label_map)) > 2


def test_tiles_of_a_fixed_size_are_blended_as_those_of_images_are(tmp_path: Path) -> None:
    fields = {"classes": ["a", "b", "c"], "bands": "RGB", "mean": [0] * 3, "std": [1] * 3}
    loaded = model.load(write(tmp_path / "m.onnx", convolutions(3, size=(64, 64)), fields))
    predictor = Predictor(loaded.to_bytes, tiling=Tiling(size=64, overlap=16))
    (image,) = photos((112, 160))  # both begin and end with a tile
    (expected,) = only(predictor.predict([image]))
    values = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)
    (given_,) = only(predictor.predict_windows([whole(values)]))
    assert_same([given_], [expected], exactly=False)


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(size=32, overlap=8)])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_a_raster_of_bytes_is_labelled_like_the_image(channels: Any, tiling: Tiling) -> None:
    preprocessing = Preprocessing(channels=channels)
    (image,) = photos((64, 96))
    values = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)
    made = with_module(PerPixel(), preprocessing, tiling=tiling)
    (given_,) = only(made.predict_windows([whole(values)]))
    assert_same([given_], only(made.predict([image])), exactly=False)


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(size=32, overlap=8)])
def test_pixels_without_data_are_void_and_count_nowhere(tiling: Tiling) -> None:
    values, valid = scene(40, 60), data_mask(40, 60)
    made = with_module(Strided(1), FOUR_BANDS, tiling=tiling, keeps_confidence=True)
    raster = Raster(values=values, valid=valid, core=Window(10, 5, 45, 30))
    (prediction,) = only(made.predict_windows([raster]))
    inside = valid[5:35, 10:55]
    np.testing.assert_array_equal(prediction.label_map == 255, ~inside)
    np.testing.assert_array_equal(
        prediction.num_pixels, [(prediction.label_map == class_id).sum() for class_id in range(3)]
    )
    assert prediction.num_pixels.sum() == inside.sum()
    assert prediction.confidence is not None
    np.testing.assert_array_equal(prediction.confidence == 0, ~inside)
    sums = [prediction.confidence[prediction.label_map == class_id].sum() / 255 for class_id in range(3)]
    np.testing.assert_allclose(prediction.confidence_sum, sums, atol=0.5 / 255 * inside.sum())


@pytest.mark.parametrize("number", [0, 1e30, np.nan, np.inf])
def test_what_stands_in_pixels_without_data_makes_no_difference(number: float) -> None:
    values, valid = scene(40, 60), data_mask(40, 60)
    (expected,) = only(with_module(Strided(2), FOUR_BANDS, stride=2).predict_windows([whole(values, valid)]))
    values[:, ~valid] = number
    (given_,) = only(with_module(Strided(2), FOUR_BANDS, stride=2).predict_windows([whole(values, valid)]))
    assert_same([given_], [expected])


def test_pixels_without_data_are_fed_as_the_mean_of_their_band() -> None:
    seen: list[Tensor] = []

    class Seen(Strided):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.clone())
            return super().forward(images)

    values, valid = scene(16, 24), data_mask(16, 24)
    with_module(Seen(1), FOUR_BANDS).predict_windows([whole(values, valid)])
    mean, std = (np.array(numbers)[:, None, None] for numbers in (FOUR_BANDS.mean, FOUR_BANDS.std))
    expected = np.where(valid, (values - mean) / std, 0)
    np.testing.assert_allclose(seen[0][0].numpy(), expected, rtol=1e-6)


def test_a_core_without_data_is_never_fed() -> None:
    rows = Rows()
    values = np.zeros((3, 20, 30), np.float32)
    valid = np.zeros((20, 30), bool)
    valid[:, :10] = True  # beside the core
    raster = Raster(values=values, valid=valid, core=Window(10, 0, 20, 15))
    (prediction,) = only(with_module(rows).predict_windows([raster]))
    assert rows.shapes == []
    assert (prediction.label_map == 255).all()
    assert prediction.label_map.shape == (15, 20)
    assert prediction.num_pixels.tolist() == [0, 0, 0]
    assert prediction.confidence_sum.tolist() == [0, 0, 0]


def test_a_raster_with_numbers_that_are_not_finite_is_a_reject_alone() -> None:
    dark = np.full((3, 20, 30), 20, np.float32)
    results = with_module(Fragile(float("nan"))).predict_windows([whole(dark), whole(dark + 200), whole(dark + 1)])
    assert [isinstance(result, Reject) for result in results] == [False, True, False]
    assert isinstance(results[1], Reject)
    assert (results[1].stage, results[1].kind) == ("predict", "not finite")


def test_numbers_in_the_halo_that_are_not_finite_reject_nothing() -> None:
    bright = np.full((3, 20, 30), 220, np.float32)
    raster = Raster(values=bright, valid=np.ones((20, 30), bool), core=Window(1, 1, 10, 10))
    assert only(with_module(Fragile(float("nan"))).predict_windows([raster]))  # it has them in the first pixel


def test_rasters_that_do_not_fit_the_memory_together_are_halved_and_then_rejects() -> None:
    rasters = [whole(np.full((3, 32, 48), index, np.float32)) for index in range(8)]
    expected = only(with_module(PerPixel()).predict_windows(rasters))
    module = Exhausted(2)
    assert_same(only(with_module(module).predict_windows(rasters)), expected)
    assert module.sizes[:3] == [8, 4, 2]
    (reject,) = with_module(Exhausted(0)).predict_windows(rasters[:1])
    assert isinstance(reject, Reject)
    assert reject.kind == "out of memory"
    assert "48×32 alone; take smaller windows" in reject.detail


def test_rasters_of_several_shapes_come_back_in_their_order() -> None:
    rasters = [whole(scene(height, width, seed=height)) for height, width in ((20, 30), (30, 20), (20, 30), (5, 1))]
    made = with_module(Strided(1), FOUR_BANDS)
    alone = [only(made.predict_windows([raster]))[0] for raster in rasters]
    assert_same(only(made.predict_windows(rasters)), alone)


def test_rasters_of_one_shape_with_cores_of_several_are_labelled_each_by_its_own() -> None:
    cores = [Window(2, 2, 20, 10), Window(2, 2, 20, 10), Window(0, 2, 22, 18), Window(2, 2, 20, 10)]
    rasters = []
    for seed, core in enumerate(cores):
        values, valid = scene(20, 30, seed=seed), data_mask(20, 30)
        rasters.append(Raster(values=values, valid=valid & (values[0] < values[0].mean() + seed), core=core))
    made = with_module(Strided(1), FOUR_BANDS, keeps_confidence=True)
    alone = [only(made.predict_windows([raster]))[0] for raster in rasters]
    together = only(made.predict_windows(rasters))
    assert_same(together, alone)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.confidence is not None
        assert theirs.confidence is not None
        np.testing.assert_array_equal(ours.confidence, theirs.confidence)
    assert len({tuple(prediction.num_pixels) for prediction in together}) == len(rasters)


@pytest.mark.parametrize("size", [1024, 48])
def test_what_is_not_wanted_is_seen_and_not_labelled(size: int) -> None:
    values, valid = scene(60, 90), data_mask(60, 90)
    core = Window(10, 5, 70, 50)
    wanted = np.arange(50)[:, None] < np.arange(70) - 5
    predictor = with_module(Strided(1), FOUR_BANDS, tiling=Tiling(size=size, overlap=16))
    (of_all,) = only(predictor.predict_windows([Raster(values=values, valid=valid, core=core)]))
    (given_,) = only(predictor.predict_windows([Raster(values=values, valid=valid, core=core, wanted=wanted)]))
    expected = np.where(wanted, of_all.label_map, 255)
    np.testing.assert_array_equal(given_.label_map, expected)
    num_pixels = np.bincount(expected[expected != 255], minlength=len(given_.num_pixels))
    np.testing.assert_array_equal(given_.num_pixels, num_pixels)
    assert 0 < num_pixels.sum() < of_all.num_pixels.sum()


def test_a_window_of_which_nothing_is_wanted_is_not_fed() -> None:
    raster = Raster(
        values=scene(20, 30), valid=np.ones((20, 30), bool), core=Window(2, 2, 9, 8), wanted=np.zeros((8, 9), bool)
    )
    (prediction,) = only(with_module(Exhausted(0)).predict_windows([raster]))  # it would fail
    assert (prediction.label_map == 255).all() and prediction.num_pixels.sum() == 0


def test_what_does_not_go_with_windows_is_refused() -> None:
    raster = whole(np.zeros((3, 8, 8), np.float32))
    with pytest.raises(SettingsError, match="neither resized nor refined"):
        with_module(PerPixel(), dataclasses.replace(IDENTITY, resize=64)).predict_windows([raster])
    with pytest.raises(SettingsError, match="leave out --crf"):
        with_module(PerPixel(), crf=Crf()).predict_windows([raster])
    with pytest.raises(SettingsError, match="sees the bands red, green, blue, nir of scenes, and these are images"):
        with_module(Strided(1), FOUR_BANDS).predict(photos((8, 8)))
    made = with_module(PerPixel())
    for ignore_index in (-1, 256):
        made._classes = Classes(ABC.names, ignore_index=ignore_index)
        with pytest.raises(SettingsError, match=rf"ignore_index {ignore_index}, of pixels without data, must lie in"):
            made.predict_windows([raster])


def table_of(rasters: Sequence[Raster | None]) -> pa.Table:
    """Rows as the reader of scenes gives them; None is a window that it rejected."""

    def column(value: Any, kind: pa.DataType) -> pa.Array:
        return pa.array([None if raster is None else value(raster) for raster in rasters], kind)

    return pa.table(
        {
            "image_id": pa.array([str(index) for index in range(len(rasters))], pa.string()),
            "values": column(lambda r: r.values.tobytes(), pa.large_binary()),
            "valid": column(lambda r: r.valid.tobytes(), pa.large_binary()),
            "wanted": column(lambda r: np.ones((r.core.height, r.core.width), bool).tobytes(), pa.large_binary()),
            "height": column(lambda r: r.valid.shape[0], pa.int32()),
            "width": column(lambda r: r.valid.shape[1], pa.int32()),
            **{
                f"core_{name}": column(lambda r, name=name: getattr(r.core, name), pa.int32())
                for name in ("col_off", "row_off", "width", "height")
            },
            "col_off": column(lambda r: 7, pa.int32()),
            "stage": pa.array(["fetch" if raster is None else None for raster in rasters], pa.string()),
            "reason": pa.array(["missing: it is gone" if raster is None else None for raster in rasters], pa.string()),
        }
    )


def test_a_table_of_rasters_gains_label_maps_of_their_cores() -> None:
    values, valid = scene(40, 60), data_mask(40, 60)
    rasters: list[Raster | None] = [
        Raster(values=values, valid=valid, core=Window(10, 5, 45, 30)),
        None,
        Raster(values=values, valid=valid, core=Window(0, 12, 50, 20)),
        whole(values),
        whole(values, np.zeros((40, 60), bool)),
        whole(values * np.float32("nan")),
    ]
    batch = table_of(rasters)
    made = with_module(Strided(1), FOUR_BANDS)
    for table in (batch, pa.concat_tables([batch.slice(0, 2), batch.slice(2)])):
        labelled = made(table)
        assert sorted(labelled.schema.names) == sorted(
            ["image_id", "height", "width", "col_off", "label_map", "num_pixels", "confidence_sum", "stage", "reason"]
        )
        assert labelled["image_id"] == table["image_id"]
        assert labelled["height"].to_pylist() == [30, None, 20, 40, 40, 40]
        assert labelled["width"].to_pylist() == [45, None, 50, 60, 60, 60]
        assert labelled["col_off"].to_pylist() == [7, None, 7, 7, 7, 7]
        assert labelled["stage"].to_pylist() == [None, "fetch", None, None, None, "predict"]
        assert labelled["reason"][1].as_py() == "missing: it is gone"
        for row in (0, 2, 3, 4):
            raster = rasters[row]
            assert raster is not None
            (expected,) = only(made.predict_windows([raster]))
            assert labelled["label_map"][row].as_py() == expected.label_map.tobytes()
            assert labelled["num_pixels"][row].as_py() == expected.num_pixels.tolist()
            assert labelled["confidence_sum"][row].as_py() == pytest.approx(expected.confidence_sum.tolist())
        for name in ("label_map", "num_pixels", "confidence_sum"):
            assert labelled[name][1].as_py() is None
            assert labelled[name][5].as_py() is None


@pytest.mark.parametrize("rasters", [[], [None], [None, None]])
def test_a_table_without_rasters_keeps_its_columns_and_types(rasters: list[None]) -> None:
    made = with_module(Strided(1), FOUR_BANDS)
    labelled = made(table_of(rasters))
    assert labelled.num_rows == len(rasters)
    assert labelled.schema == made(table_of([whole(scene(3, 4))])).schema
