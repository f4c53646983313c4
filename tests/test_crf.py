import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segray import crf as crf_module
from segray import demo
from segray.crf import Crf, refine
from segray.errors import SettingsError
from segray.statistics import ConfusionMatrix

pytestmark = pytest.mark.usefixtures("one_thread")


def softmax(values: np.ndarray) -> np.ndarray:
    weights: np.ndarray = np.exp(values - values.max(0))
    weights /= weights.sum(0)
    return weights


def brute_force(logits: np.ndarray, image: np.ndarray, crf: Crf) -> np.ndarray:
    """The definition, with every pair of pixels and the whole Potts energy."""
    num_classes, height, width = logits.shape
    positions = np.indices((height, width)).reshape(2, -1).T.astype(float)
    colours = image.reshape(3, -1).T.astype(float)
    between = positions[:, None] - positions
    within = (np.abs(between) <= crf.radius).all(-1)
    near = (between**2).sum(-1)
    alike = ((colours[:, None] - colours) ** 2).sum(-1)

    def normalised(kernel: np.ndarray) -> np.ndarray:
        sums = (kernel * within).sum(1)
        kernel = kernel * within / np.sqrt(np.outer(sums, sums))
        np.fill_diagonal(kernel, 0)
        return kernel

    appearance = normalised(np.exp(-near / (2 * crf.theta_alpha**2) - alike / (2 * crf.theta_beta**2)))
    smoothness = normalised(np.exp(-near / (2 * crf.theta_gamma**2)))
    kernel = crf.appearance_weight * appearance + crf.smoothness_weight * smoothness
    unary = logits.reshape(num_classes, -1)
    probabilities = softmax(unary)
    for _ in range(crf.num_iterations):
        messages = probabilities @ kernel
        energy = messages.sum(0) - messages  # of each class, from neighbours with any other
        probabilities = softmax(unary - energy)
    return probabilities.reshape(logits.shape)


def blotchy(height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of three classes in float64, and an image of some colours with a little noise."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 240, (4, 3))
    image = colours[rng.integers(0, 4, (height, width))] + rng.integers(0, 12, (height, width, 3))
    return torch.from_numpy(rng.normal(0, 2, (3, height, width))), torch.from_numpy(
        image.transpose(2, 0, 1).astype(np.uint8)
    )


@st.composite
def crfs(draw: st.DrawFn) -> Crf:
    return Crf(
        num_iterations=draw(st.integers(1, 6)),
        appearance_weight=draw(st.floats(0, 6)),
        theta_alpha=draw(st.floats(1, 80)),
        theta_beta=draw(st.floats(1, 40)),
        smoothness_weight=draw(st.floats(0, 6)),
        theta_gamma=draw(st.floats(0.5, 5)),
        radius=draw(st.integers(1, 14)),
    )


@given(
    st.integers(1, 12), st.integers(1, 14), crfs(), st.integers(0, 99), st.booleans(), st.sampled_from([3000, 2**21])
)
@example(12, 14, Crf(radius=14, num_iterations=1), 0, True, 2**21)
@example(12, 14, Crf(radius=14, num_iterations=10), 0, True, 2**21)
@example(12, 14, Crf(), 0, False, 3000)
@settings(deadline=None, max_examples=30)
def test_equals_the_definition_in_whole_images_and_in_windows(
    height: int, width: int, crf: Crf, seed: int, holds_weights: bool, block_bytes: int
) -> None:
    logits, image = blotchy(height, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crf_module, "_CPU_BLOCK_BYTES", block_bytes)
        patch.setattr(crf_module, "_WEIGHTS_BYTES", 2**28 if holds_weights else 0)
        ours = refine(logits, image, crf)
    np.testing.assert_allclose(ours.numpy(), brute_force(logits.numpy(), image.numpy(), crf), rtol=0, atol=1e-9)


def test_float32_is_as_good() -> None:
    logits, image = blotchy(40, 50, 0)
    exact = refine(logits, image, Crf())
    single = refine(logits.float(), image, Crf())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_classes", [1, 2, 300])
def test_probabilities_sum_to_one_and_what_went_in_stays_as_it_was(num_classes: int) -> None:
    logits = torch.randn(num_classes, 21, 34, generator=torch.Generator().manual_seed(0)) * 20
    _, image = blotchy(21, 34, 0)
    before, image_before = logits.clone(), image.clone()
    probabilities = refine(logits, image, Crf())
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(0), torch.ones(21, 34))
    assert torch.equal(logits, before)
    assert torch.equal(image, image_before)


def test_a_plain_image_of_which_nothing_is_known_stays_so() -> None:
    probabilities = refine(torch.zeros(5, 30, 40), torch.full((3, 30, 40), 90, dtype=torch.uint8), Crf())
    torch.testing.assert_close(probabilities, torch.full((5, 30, 40), 0.2))


def test_a_constant_added_to_a_pixels_logits_changes_nothing() -> None:
    logits, image = blotchy(12, 14, 0)
    shifted = logits + torch.randn(1, 12, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9
    torch.testing.assert_close(refine(shifted, image, Crf()), refine(logits, image, Crf()))


def test_a_class_that_ends_beside_an_edge_is_drawn_to_it() -> None:
    image = torch.full((3, 40, 60), 60, dtype=torch.uint8)
    image[:, :, 30:] = 120
    logits = torch.zeros(2, 40, 60)
    logits[1, :, 32:] = 1
    logits[0, :, :32] = 1
    assert torch.equal(refine(logits, image, Crf()).argmax(0), (image[0] == 120).long())


def miou(label_maps: list[np.ndarray], targets: list[np.ndarray], num_classes: int, ignore_index: int) -> float:
    total = ConfusionMatrix.zeros(num_classes)
    for label_map, target in zip(label_maps, targets, strict=True):
        total += ConfusionMatrix.of(target, label_map, num_classes, ignore_index)
    return total.miou()


def assert_improves(images: list[np.ndarray], targets: list[np.ndarray], num_classes: int, ignore_index: int) -> None:
    """Noise on logits of the targets costs more mIoU than what is left of it after refining."""
    generator = torch.Generator().manual_seed(0)
    raw, refined = [], []
    for image, target in zip(images, targets, strict=True):
        known = torch.from_numpy(target.astype(np.int64))
        logits = torch.stack([(known == class_id) * 3.0 for class_id in range(num_classes)])
        logits += torch.randn(logits.shape, generator=generator) * 1.5
        raw.append(logits.argmax(0).numpy().astype(np.uint8))
        probabilities = refine(logits, torch.from_numpy(image.transpose(2, 0, 1).copy()), Crf())
        refined.append(probabilities.argmax(0).numpy().astype(np.uint8))
    before, after = (miou(label_maps, targets, num_classes, ignore_index) for label_maps in (raw, refined))
    assert before < 0.7
    assert after > before + 0.15, f"{before:.3f} → {after:.3f}"


def test_noisy_logits_of_drawn_scenes_gain_miou() -> None:
    scenes = [demo.scene(seed) for seed in range(1_000_000, 1_000_003)]
    images, targets = zip(*[(image[:200, :240], target[:200, :240]) for image, target in scenes], strict=True)
    assert_improves(list(images), list(targets), len(demo.CLASSES), demo.CLASSES.ignore_index)


def test_noisy_logits_of_real_frames_gain_miou(camvid: Path) -> None:
    frames = sorted((camvid / "val").glob("*.png"))[::50]
    images = [np.asarray(Image.open(frame))[100:300, 100:340] for frame in frames]
    targets = [np.asarray(Image.open(camvid / "valannot" / frame.name))[100:300, 100:340] for frame in frames]
    assert_improves(images, targets, 11, ignore_index=11)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the elements of the largest tensor that an operation gives."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_no_tensor_is_larger_than_the_logits_with_their_margin() -> None:
    _, image = blotchy(60, 80, 0)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        refine(torch.zeros(7, 60, 80), image, Crf())
    assert largest.num_elements == 7 * 70 * 90


BOUNDS = [
    *((name, value) for name in ("num_iterations", "radius") for value in (0, -1)),
    *((name, value) for name in ("appearance_weight", "smoothness_weight") for value in (-1.0, math.nan, math.inf)),
    *((name, value) for name in ("theta_alpha", "theta_beta", "theta_gamma") for value in (0.0, -1.0, math.nan)),
]


@pytest.mark.parametrize(("name", "value"), BOUNDS)
def test_bad_settings_are_refused_at_construction(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=re.escape(f"crf.{name} {value}: must be ")):
        dataclasses.replace(Crf(), **{name: value})  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_probabilities_of_the_cpu() -> None:
    for height, width in ((1, 1), (120, 150)):
        logits, image = blotchy(height, width, 0)
        on_gpu = refine(logits.float().cuda(), image.cuda(), Crf())
        torch.testing.assert_close(on_gpu.cpu().double(), refine(logits, image, Crf()), rtol=0, atol=1e-5)
