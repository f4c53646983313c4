import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segray import kernel_cpu, tail
from segray.tail import Grid, Tail, blocked, neighbours
from segray.tile import Window

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def upsampled(logits: Tensor, grid: Grid, window: Window) -> Tensor:
    """All logits of the window, by the arithmetic that the module states."""
    top, row_weight = neighbours(logits.shape[2], grid.height, grid.align_corners, window.rows, CPU)
    left, column_weight = neighbours(logits.shape[3], grid.width, grid.align_corners, window.cols, CPU)
    bottom, right = (top + 1).clamp(max=logits.shape[2] - 1), (left + 1).clamp(max=logits.shape[3] - 1)
    columns = logits[..., left] + column_weight * (logits[..., right] - logits[..., left])
    return columns[:, :, top] + row_weight[:, None] * (columns[:, :, bottom] - columns[:, :, top])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Grid, Window]:
    num_images, num_classes = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    is_coarse = draw(st.booleans())
    height, width = (draw(st.integers(n, 8 * n)) if is_coarse else n for n in (h, w))
    row_off, col_off = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    window = Window(col_off, row_off, draw(st.integers(1, width - col_off)), draw(st.integers(1, height - row_off)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    # Few values, so that many classes are equal.
    logits = torch.randint(-2, 3, (num_images, num_classes, h, w), generator=generator).float()
    layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    return logits.contiguous(memory_format=layout), Grid(height, width, draw(st.booleans())), window


def check(given: Tail, case: tuple[Tensor, Grid, Window]) -> None:
    logits = upsampled(*case)
    label_maps, confidence = given(*case)
    assert label_maps.dtype == torch.uint8
    np.testing.assert_array_equal(label_maps.numpy(), logits.numpy().argmax(1))  # numpy's is the first of equals
    torch.testing.assert_close(confidence, logits.softmax(1).amax(1), rtol=1e-6, atol=0)


@given(cases(), st.sampled_from([1, 2000, 2**20]))
@settings(deadline=None, max_examples=150)
def test_blocks_of_rows_give_what_all_logits_at_full_size_give(
    case: tuple[Tensor, Grid, Window], block_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "_BLOCK_BYTES", {"cpu": block_bytes})
        check(blocked, case)


@given(cases(), st.sampled_from([1, 2, 3]))
@settings(deadline=None, max_examples=150)
def test_the_loop_gives_what_all_logits_at_full_size_give_on_any_number_of_threads(
    case: tuple[Tensor, Grid, Window], num_threads: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: num_threads)
        check(kernel_cpu.label, case)


def test_the_loop_rounds_as_the_blocks_do() -> None:
    generator = torch.Generator().manual_seed(0)
    case = Grid(180, 240), Window(0, 0, 240, 180)
    # Four classes of a difference that rounding makes or breaks.
    logits = (
        100
        + torch.randn(1, 1, 23, 30, generator=generator)
        + torch.randint(0, 3, (1, 4, 23, 30), generator=generator) * 2**-16
    )
    expected, expected_confidence = blocked(logits, *case)
    label_maps, confidence = kernel_cpu.label(logits, *case)
    assert torch.equal(label_maps, expected)
    torch.testing.assert_close(confidence, expected_confidence, rtol=1e-6, atol=0)


def test_the_loop_is_compiled_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.dispatcher import Dispatcher

    def enable_caching(dispatcher: Dispatcher) -> None:
        raise RuntimeError("no locator available")

    monkeypatch.setattr(Dispatcher, "enable_caching", enable_caching)
    kernel_cpu._compiled.cache_clear()
    logits = torch.stack([1 - torch.eye(3), torch.eye(3)])[None]
    label_maps, _ = kernel_cpu.label(logits, Grid(3, 3), Window(0, 0, 3, 3))
    assert label_maps[0].tolist() == torch.eye(3).tolist()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("coarse", "size"), [((45, 60), (360, 480)), ((33, 21), (130, 50)), ((1, 5), (7, 5))])
def test_positions_are_those_of_torchs_interpolation(
    coarse: tuple[int, int], size: tuple[int, int], align_corners: bool
) -> None:
    logits = torch.randn(1, 4, *coarse, generator=torch.Generator().manual_seed(0))
    ours = upsampled(logits, Grid(*size, align_corners), Window(0, 0, size[1], size[0]))
    theirs = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # torch's own positions are float32


@pytest.mark.parametrize("given", [blocked, kernel_cpu.label])
def test_beyond_256_classes_they_are_of_more_bits(given: Tail) -> None:
    logits = torch.zeros(1, 300, 2, 2)
    logits[:, 299] = 1
    label_maps, _ = given(logits, Grid(4, 4), Window(0, 0, 4, 4))
    assert (label_maps == 299).all()


@pytest.mark.parametrize("given", [blocked, kernel_cpu.label])
@pytest.mark.parametrize("class_id", [0, 1, 2])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_leaves_a_class_and_a_confidence_that_is_nan(
    number: float, class_id: int, given: Tail
) -> None:
    logits = torch.zeros(2, 3, 4, 4)
    logits[1, class_id, 2, 2] = number
    label_maps, confidence = given(logits, Grid(4, 4), Window(0, 0, 4, 4))
    assert label_maps.max() < 3
    assert confidence.isnan().nonzero().tolist() == [[1, 2, 2]]


INTERPRETED = """
import torch
from segray import kernel_cuda
from segray.tail import Grid, blocked
from segray.tile import Window

torch.manual_seed(0)
for shape, grid in [((3, 5, 6, 4), Grid(40, 21)), ((1, 300, 3, 3), Grid(5, 6, True)), ((2, 4, 6, 6), Grid(6, 6))]:
    window = Window(1, 2, grid.width - 1, grid.height - 3)
    for logits in (torch.randn(shape), torch.randint(-2, 3, shape).float()):
        case = logits.contiguous(memory_format=torch.channels_last), grid, window
        ours, theirs = kernel_cuda.label(*case), blocked(*case)
        assert ours[0].dtype == theirs[0].dtype and torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=0)
logits = torch.zeros(2, 3, 4, 4)
logits[0, 0, 1, 1], logits[1, 2, 3, 3] = float("nan"), float("inf")
_, confidence = kernel_cuda.label(logits, Grid(4, 4), Window(0, 0, 4, 4))
assert confidence.isnan().nonzero().tolist() == [[0, 1, 1], [1, 3, 3]], confidence
"""


def test_the_kernel_of_gpus_gives_what_the_blocks_give() -> None:
    # Triton's interpreter runs it where there is no GPU; it is switched on before the kernel is defined.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_kernel_gives_what_the_blocks_give_on_a_cpu() -> None:
    from segray import kernel_cuda

    logits = torch.randn(3, 21, 65, 65, generator=torch.Generator().manual_seed(0))
    case = Grid(520, 520), Window(0, 0, 520, 520)
    label_maps, confidence = kernel_cuda.label(logits.cuda(), *case)
    expected, expected_confidence = blocked(logits, *case)
    assert torch.equal(label_maps.cpu(), expected)
    torch.testing.assert_close(confidence.cpu(), expected_confidence, rtol=1e-5, atol=0)
