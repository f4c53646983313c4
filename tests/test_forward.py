from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segray import forward, model
from segray.forward import Choice, DType, Forward, fast_dtype
from tests.conftest import CAMVID_CLASSES, random_checkpoint

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*lazy")]

CPU = torch.device("cpu")
EXAMPLE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ARCHITECTURES = (
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "unet_resnet18",
    "unet_tu-mobilenetv3_small_050",
    "pspnet_mobilenet_v2",
    "unet_densenet121",
    "segformer_mit_b0",
)


@pytest.fixture
def has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that has its instructions, whatever this one has."""
    monkeypatch.setattr(forward, "fast_dtype", lambda device: torch.bfloat16)


def of(module: nn.Module, dtype: DType = "float32", example: Tensor = EXAMPLE) -> tuple[Forward, list[Choice]]:
    choices: list[Choice] = []
    return Forward(module.eval(), example, device=CPU, dtype=dtype, chosen=choices.append), choices


@torch.inference_mode()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_leaves_the_logits_as_they_are(name: str) -> None:
    module, _ = model.coarse(model.build(random_checkpoint(name, CAMVID_CLASSES)))
    images = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    expected = model.logits(module, images)
    made, _ = of(module)
    given = made(images)
    assert made._module is not module
    assert (given - expected).abs().max() < 1e-4 * expected.abs().max()
    num_norms = [sum(isinstance(layer, nn.BatchNorm2d) for layer in m.modules()) for m in (module, made._module)]
    assert num_norms[1] < num_norms[0]
    # DenseNets normalise what was joined of several, and a PSPNet leaves its encoder's deepest stages out.
    if not name.startswith(("unet_densenet", "pspnet")):
        assert num_norms[1] == 0


class Forked(nn.Module):
    """What its convolution gives goes to a batch norm, and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.norm.bias.data += 1

    def forward(self, images: Tensor) -> Tensor:
        there = self.convolution(images)
        result: Tensor = self.norm(there) + there
        return result


class Twice(nn.Module):
    """Uses its convolution twice, with a batch norm behind it once."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.norm.bias.data += 1

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.convolution(self.norm(self.convolution(images)))
        return result


@torch.inference_mode()
@pytest.mark.parametrize("kind", [Forked, Twice])
def test_a_batch_norm_that_cannot_be_folded_stays(kind: type[nn.Module]) -> None:
    module = kind().eval()
    expected = module(EXAMPLE)
    made, choices = of(module)
    torch.testing.assert_close(made(EXAMPLE), expected, rtol=1e-6, atol=1e-6)
    assert choices == [Choice("float32", None)]


class Activated(nn.Module):
    """Convolutions with activations behind them: one, one used twice, and one whose input may be seen besides."""

    sees_past = False

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.once, self.twice, self.past = kind(), kind(), kind()

    def forward(self, images: Tensor) -> Tensor:
        there = self.twice(self.third(self.twice(self.second(self.once(self.first(images))))))
        before = self.fourth(there)
        result: Tensor = self.past(before) + before if self.sees_past else self.past(before)
        return result


@torch.inference_mode()
@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
def test_an_activation_goes_with_its_convolution_where_nothing_else_sees_what_is_between(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Activated(kind).eval()
    expected = module(EXAMPLE)
    made, _ = of(module)
    torch.testing.assert_close(made(EXAMPLE), expected, rtol=1e-5, atol=1e-5)
    assert [type(layer) for layer in (made._module.once, made._module.twice, made._module.past)] == [
        nn.Identity,
        kind,
        nn.Identity,
    ]
    monkeypatch.setattr(Activated, "sees_past", True)
    expected = module(EXAMPLE)
    made, choices = of(module)
    torch.testing.assert_close(made(EXAMPLE), expected, rtol=1e-6, atol=1e-6)
    assert choices == [Choice("float32", None)]


@torch.inference_mode()
@pytest.mark.parametrize("has_onednn", [True, False])
def test_activations_stay_where_onednn_does_not_convolve(has_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_has_onednn", lambda dtype: has_onednn)
    made, _ = of(Activated(nn.ReLU))
    made(EXAMPLE)
    assert any(isinstance(layer, forward._Activated) for layer in made._module.modules()) == has_onednn


class Close(nn.Module):
    """Two classes whose logits differ by less than bfloat16 holds, but where pixels are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)
        self.first.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.second.weight.data = torch.tensor([1.0, 1.001]).view(2, 1, 1, 1).expand(2, 3, 1, 1).clone()

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(images))
        return result


@torch.inference_mode()
@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize(("num_rows", "taken"), [(40, "float32"), (1, "bfloat16")])
def test_bfloat16_is_taken_where_the_first_batch_agrees_and_else_not(num_rows: int, taken: str) -> None:
    images = torch.zeros(1, 3, 200, 50)
    images[:, :, :num_rows] = 1
    made, choices = of(Close(), "auto")
    first, second = made(images), made(images)
    share = 1 - num_rows / 200
    [choice] = choices
    assert choice.dtype == taken
    if taken == "float32":
        assert choice.refused == pytest.approx(share)
        assert choice.agreement == 1
        assert first.argmax(1).sum() == num_rows * 50
    else:
        assert choice.refused is None
        assert choice.agreement == pytest.approx(share)
        assert first.argmax(1).sum() == 0
    assert torch.equal(first, second)


@torch.inference_mode()
def test_a_dtype_that_was_asked_for_is_taken_however_it_agrees() -> None:
    made, choices = of(Close(), "bfloat16")
    assert made(torch.ones(1, 3, 8, 8)).argmax(1).sum() == 0
    assert choices == [Choice("bfloat16", 0.0)]


@torch.inference_mode()
@pytest.mark.usefixtures("has_bfloat16")
def test_float32_is_what_the_module_gives_where_folding_itself_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    wrong = nn.Sequential(nn.Conv2d(3, 3, 1))
    monkeypatch.setattr(forward, "_folded", lambda module, example: wrong)
    expected = module(EXAMPLE)
    made, choices = of(module, "auto")
    torch.testing.assert_close(made(EXAMPLE), expected)
    [choice] = choices
    assert choice.dtype == "float32"
    assert choice.agreement == 1
    assert choice.refused is not None


@torch.inference_mode()
def test_the_first_layer_stays_in_float32() -> None:
    layer = nn.Conv2d(3, 2, 1, bias=False)
    layer.weight.data = torch.tensor([0.9, 1.003]).view(2, 1, 1, 1).expand(2, 3, 1, 1).clone()
    made, _ = of(nn.Sequential(layer), "bfloat16")
    given = made(torch.full((1, 3, 8, 8), 1.003))
    assert (given[0, 1] == torch.tensor(1.003 * 3 * 1.003).bfloat16()).all()
    assert torch.tensor(1.003 * 3 * 1.003).bfloat16() != 3


class Exhausted(Close):
    """Has no memory the first time."""

    num_calls = 0

    def forward(self, images: Tensor) -> Tensor:
        Exhausted.num_calls += 1
        if Exhausted.num_calls == 1:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(images)


@torch.inference_mode()
def test_a_first_batch_that_fails_leaves_the_choice_to_the_next() -> None:
    made, choices = of(Exhausted(), "bfloat16")
    with pytest.raises(torch.OutOfMemoryError):
        made(EXAMPLE)
    assert choices == []
    made(EXAMPLE)
    assert len(choices) == 1


@torch.inference_mode()
@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "unet_resnet18", "segformer_mit_b0"])
def test_in_bfloat16_too_logits_do_not_depend_on_what_an_image_was_batched_with(name: str) -> None:
    module, _ = model.coarse(model.build(random_checkpoint(name, CAMVID_CLASSES)))
    images = torch.rand(5, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    made, _ = of(module, "bfloat16")
    together = made(images)
    assert torch.equal(made(images[:2]), together[:2])
    assert torch.equal(made(images[1:4]), together[1:4])


def test_a_cpu_is_fast_in_bfloat16_where_linux_says_that_it_has_the_instructions() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert (fast_dtype(CPU) == torch.bfloat16) == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def test_a_model_of_classes_that_it_was_trained_on_keeps_them_in_bfloat16() -> None:
    from segray import demo
    from segray.predict import Prediction, Predictor

    read = Path(demo.__file__).with_name("demo.safetensors").read_bytes
    images = [demo.scene(seed)[0] for seed in range(4)]
    choices: list[Choice] = []
    exact = Predictor(read).predict(images)
    fast = Predictor(read, dtype="bfloat16", chosen=choices.append).predict(images)
    agreements = []
    for expected, given in zip(exact, fast, strict=True):
        assert isinstance(expected, Prediction)
        assert isinstance(given, Prediction)
        agreements.append((expected.label_map == given.label_map).mean())
    assert np.mean(agreements) >= 0.999
    assert choices[0].agreement is not None
    assert choices[0].agreement >= 0.999
