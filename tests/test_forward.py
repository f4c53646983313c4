from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segray import forward, kernel_cpu, model
from segray.forward import Choice, DType, Forward, fast_dtype, fast_tail
from segray.tail import blocked
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
    "unet_efficientnet-b0",
    "segformer_mit_b0",
    "unet_tu-davit_tiny",  # which looks at its convolutions' attributes
)


@pytest.fixture
def onednn_has_bfloat16() -> None:
    """Skips where this CPU's oneDNN does not convolve in bfloat16."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 in this CPU's oneDNN")


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
    # DenseNets normalise what was joined of several; a PSPNet and an EfficientNet leave their encoder's end out.
    if not name.startswith(("unet_densenet", "pspnet", "unet_efficientnet")):
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
    made, _ = of(module)
    torch.testing.assert_close(made(EXAMPLE), expected, rtol=1e-6, atol=1e-6)
    assert isinstance(made._module.norm, nn.BatchNorm2d)


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
    torch.manual_seed(0)
    module = Activated(kind).eval()
    assert module.fourth.bias is not None
    module.fourth.bias.data.fill_(-0.1)  # of positive numbers alone a ReLU makes nothing else
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
    assert any(isinstance(layer, forward._Convolution) for layer in made._module.modules()) == has_onednn


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


class Fails(Close):
    """Does not compute in anything but float32."""

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise NotImplementedError("not in this dtype")
        return super().forward(images)


@torch.inference_mode()
@pytest.mark.usefixtures("has_bfloat16")
def test_a_model_that_fails_in_bfloat16_goes_on_in_float32_and_says_why() -> None:
    made, choices = of(Fails(), "auto")
    images = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(made(images), Close()(images))
    assert choices == [
        Choice("float32", 1.0, None, "the model fails in bfloat16: NotImplementedError: not in this dtype")
    ]


@torch.inference_mode()
def test_where_no_other_dtype_is_left_a_model_that_fails_says_so() -> None:
    made, choices = of(Fails(), "bfloat16")
    with pytest.raises(NotImplementedError):
        made(EXAMPLE)
    assert choices == []


class Looks(nn.Module):
    """Looks for its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.activation = nn.Conv2d(3, 2, 1), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        assert isinstance(self.activation, nn.ReLU)
        result: Tensor = self.activation(self.convolution(images))
        return result


@torch.inference_mode()
def test_a_model_that_lacks_what_was_taken_from_it_stays_as_it_was() -> None:
    made, choices = of(Looks())
    assert made(EXAMPLE).shape[1] == 2
    assert choices == [Choice("float32", None)]


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


class Ladder(nn.Module):
    """Layers of so many channels each, the last of so many classes; by their side one that is used for nothing."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(*pair, 1) for pair in pairwise((3, *widths))))
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.layers(images)
        return result


@torch.inference_mode()
@pytest.mark.usefixtures("onednn_has_bfloat16")
@pytest.mark.parametrize(
    ("widths", "num_first", "num_last"),
    [
        ((8, 8, 32, 64, 64, 64, 2), 3, 1),  # 24, 64, 256, 2048, 4096, 4096, 128 multiplications a pixel
        ((1, 1, 1, 1, 1, 1, 64, 64, 2), 4, 0),  # 3, 1, 1, 1, 1, 1, 64, 4096, 128
        ((64, 64, 64, 64, 64), 1, 0),
    ],
)
def test_layers_at_both_ends_stay_in_float32_where_they_are_a_small_part_of_all(
    widths: tuple[int, ...], num_first: int, num_last: int
) -> None:
    made, _ = of(Ladder(widths), "bfloat16")
    made(EXAMPLE)
    layers = made._module.layers
    assert isinstance(layers, nn.Sequential)
    is_exact = [isinstance(layer, forward._Exact) for layer in layers]
    num_between = len(widths) - num_first - num_last
    assert is_exact == [True] * num_first + [False] * num_between + [True] * num_last
    # Biases cost nothing.
    between = layers[num_first : len(layers) - num_last]
    assert {parameter.dtype for parameter in between.parameters() if parameter.dim() == 1} == {torch.float32}


def test_of_a_gpus_layers_the_first_alone_stays_in_float32() -> None:
    ladder = Ladder((1, 1, 1, 64, 64, 2))
    first, last = forward._ends(ladder, EXAMPLE, *forward._EXACT_SHARES["cuda"])
    assert first == {ladder.layers[0]}
    assert last == set()


class Exhausted(Close):
    """Has no memory, for a while."""

    has_memory = True

    def forward(self, images: Tensor) -> Tensor:
        if not Exhausted.has_memory:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(images)


@torch.inference_mode()
def test_a_first_batch_that_fails_leaves_the_choice_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made, choices = of(Exhausted(), "bfloat16")
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(Exhausted, "has_memory", False)
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


def test_where_the_kernel_of_the_tail_cannot_be_compiled_there_is_another_and_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert fast_tail(torch.device("cpu"), 4) == (kernel_cpu.label, None)

    def fail(*of_tail: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(kernel_cpu, "label", fail)
    tail, error = fast_tail(torch.device("cpu"), 4)
    assert tail is blocked
    assert error == "the kernel of the network's tail could not be compiled: OSError: no compiler"
