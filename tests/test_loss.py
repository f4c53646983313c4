import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from segray.classes import Classes
from segray.errors import SettingsError
from segray.loss import Loss, balanced_weights

pytestmark = pytest.mark.usefixtures("one_thread")

TERMS = ("ce", "focal", "dice", "lovasz", "ohem")
EVERYTHING = "ce+0.5*focal+2*dice+0.3*lovasz+ohem"
WEIGHTS = (0.2, 3.0, 0.0, 1.5, 0.7)
CLASSES = Classes(("sky", "road", "tree", "car", "pole"))


@dataclass(frozen=True)
class Batch:
    logits: Tensor
    target: Tensor
    classes: Classes


def make_batch(
    seed: int,
    num_images: int = 4,
    height: int = 7,
    width: int = 9,
    num_classes: int = 5,
    void: float = 0.2,
    scale: float = 2.0,
    ignore_index: int = 255,
) -> Batch:
    """Random logits, larger with `scale`, and targets of which the share `void` is void."""
    rng = torch.Generator().manual_seed(seed)
    shape = (num_images, height, width)
    logits = scale * torch.randn(num_images, num_classes, height, width, generator=rng)
    target = torch.randint(num_classes, shape, generator=rng)
    target[torch.rand(shape, generator=rng) < void] = ignore_index
    classes = Classes(tuple(f"class {i}" for i in range(num_classes)), ignore_index=ignore_index)
    return Batch(logits, target, classes)


batches = st.builds(
    make_batch,
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(1, 4),
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    num_classes=st.integers(2, 8),
    void=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    ignore_index=st.sampled_from([255, 8, 65535, -1]),
)


def loss_and_gradient(loss: Loss, logits: Tensor, target: Tensor, denominators: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target, denominators)
    value.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def assert_same_gradient(gradient: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    """Up to rounding, which an element that is nearly 0 may have of the largest."""
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


# What the terms are, in plain numpy and float64: each a function of (classes, pixels) logits and
# the pixels' class ids, without void.


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(0)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(0))
    return result


def each_cross_entropy(
    logits: np.ndarray, ids: np.ndarray, weights: Sequence[float], smoothing: float
) -> tuple[list[float], list[float]]:
    """The cross-entropy of each pixel, times its weight, and its weight."""
    log_p = log_softmax(logits)
    losses = []
    for pixel, class_id in enumerate(ids):
        of_target = -weights[class_id] * log_p[class_id, pixel]
        of_all = -sum(weight * log_p[other, pixel] for other, weight in enumerate(weights)) / len(log_p)
        losses.append((1 - smoothing) * of_target + smoothing * of_all)
    return losses, [weights[class_id] for class_id in ids]


def each_focal(logits: np.ndarray, ids: np.ndarray) -> list[float]:
    losses = []
    for pixel, class_id in enumerate(ids):
        of_classes = []
        for other, logit in enumerate(logits[:, pixel]):
            towards = logit if other == class_id else -logit
            p = 1 / (1 + np.exp(-towards))
            of_classes.append((1 - p) ** 2 * np.log1p(np.exp(-towards)))
        losses.append(float(np.mean(of_classes)))
    return losses


def dice(logits: np.ndarray, ids: np.ndarray) -> float:
    p = np.exp(log_softmax(logits))
    return float(
        np.mean([1 - 2 * p[c, ids == c].sum() / (p[c].sum() + (ids == c).sum()) for c in np.unique(ids).tolist()])
    )


def lovasz(logits: np.ndarray, ids: np.ndarray) -> float:
    """The Lovász extension of the Jaccard loss, as a function of the set of pixels that are wrong."""

    def jaccard_loss(members: set[int], wrong: set[int]) -> float:
        return 1 - len(members - wrong) / len(members | wrong)

    p = np.exp(log_softmax(logits))
    of_classes = []
    for class_id in np.unique(ids).tolist():
        members = set(np.flatnonzero(ids == class_id).tolist())
        errors = np.abs((ids == class_id) - p[class_id])
        wrong: set[int] = set()
        total = 0.0
        for pixel in np.argsort(-errors).tolist():
            grown = wrong | {pixel}
            total += errors[pixel] * (jaccard_loss(members, grown) - jaccard_loss(members, wrong))
            wrong = grown
        of_classes.append(total)
    return float(np.mean(of_classes))


def ohem(logits: np.ndarray, ids: np.ndarray, weights: Sequence[float], smoothing: float) -> float:
    p = np.exp(log_softmax(logits))[ids, np.arange(len(ids))]
    hardest_first = np.argsort(p).tolist()
    chosen = [pixel for place, pixel in enumerate(hardest_first) if 16 * place < len(ids) or p[pixel] < 0.7]
    losses, pixel_weights = each_cross_entropy(logits[:, chosen], ids[chosen], weights, smoothing)
    return sum(losses) / sum(pixel_weights) if sum(pixel_weights) else 0.0


def reference(
    name: str, batch: Batch, logits: np.ndarray, weights: Sequence[float] | None = None, smoothing: float = 0.0
) -> float:
    weights = weights or [1.0] * len(batch.classes)
    images = []
    for image_logits, target in zip(logits.astype(np.float64), batch.target.numpy(), strict=True):
        valid = target != batch.classes.ignore_index
        if valid.any():
            images.append((image_logits[:, valid], target[valid]))
    if not images:
        return 0.0
    all_logits = np.concatenate([image_logits for image_logits, _ in images], 1)
    all_ids = np.concatenate([ids for _, ids in images])
    match name:
        case "ce":
            losses, pixel_weights = each_cross_entropy(all_logits, all_ids, weights, smoothing)
            return sum(losses) / sum(pixel_weights)
        case "focal":
            return float(np.mean(each_focal(all_logits, all_ids)))
        case "dice":
            return float(np.mean([dice(*image) for image in images]))
        case "lovasz":
            return float(np.mean([lovasz(*image) for image in images]))
    return float(np.mean([ohem(*image, weights, smoothing) for image in images]))


@pytest.mark.parametrize("name", TERMS)
@given(batches)
@example(make_batch(0, num_images=2, height=9, width=17, scale=10))
@settings(deadline=None, max_examples=25)
def test_a_term_is_what_its_paper_says(name: str, batch: Batch) -> None:
    loss = Loss.parse(name, batch.classes)
    value = loss(batch.logits, batch.target, loss.denominators(batch.target))
    assert (value.dtype, value.shape) == (torch.float32, ())
    assert value.item() == pytest.approx(reference(name, batch, batch.logits.numpy()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_gradient_is_that_of_the_reference(name: str, scale: float) -> None:
    batch = make_batch(3, num_images=2, scale=scale)
    loss = Loss.parse(name, batch.classes)
    _, gradient = loss_and_gradient(loss, batch.logits, batch.target, loss.denominators(batch.target))
    logits = batch.logits.double().numpy()
    for direction in np.random.default_rng(0).normal(size=(4, *logits.shape)):
        step = 1e-6 * direction
        slope = (reference(name, batch, logits + step) - reference(name, batch, logits - step)) / 2e-6
        assert (gradient.double().numpy() * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ce_is_torchs_mean(weights: tuple[float, ...] | None, smoothing: float) -> None:
    batch = make_batch(1)
    loss = Loss.parse("ce", batch.classes, class_weights=weights, label_smoothing=smoothing)
    value, gradient = loss_and_gradient(loss, batch.logits, batch.target, loss.denominators(batch.target))
    leaf = batch.logits.clone().requires_grad_()
    expected = F.cross_entropy(
        leaf,
        batch.target,
        weight=None if weights is None else torch.tensor(weights),
        ignore_index=255,
        label_smoothing=smoothing,
    )
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    assert leaf.grad is not None
    assert_same_gradient(gradient, leaf.grad)


@pytest.mark.parametrize("name", ["ce", "ohem"])
@given(batches, st.data(), st.sampled_from([0.0, 0.1]))
@settings(deadline=None, max_examples=25)
def test_class_weights_and_label_smoothing_are_those_of_the_reference(
    name: str, batch: Batch, data: st.DataObject, smoothing: float
) -> None:
    some = st.lists(st.floats(0.1, 10), min_size=len(batch.classes), max_size=len(batch.classes))
    weights = data.draw(some)
    loss = Loss.parse(name, batch.classes, class_weights=weights, label_smoothing=smoothing)
    value = loss(batch.logits, batch.target, loss.denominators(batch.target))
    expected = reference(name, batch, batch.logits.numpy(), weights, smoothing)
    assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("num_pixels", "num_hardest"), [(1, 1), (16, 1), (32, 2), (33, 3)])
def test_ohem_takes_the_hardest_sixteenth_where_all_pixels_are_easy(num_pixels: int, num_hardest: int) -> None:
    # Probabilities of the right one of two classes, all above 0.7.
    p = torch.linspace(0.98, 0.72, num_pixels)
    logits = torch.stack([torch.log(p), torch.log(1 - p)]).view(1, 2, 1, num_pixels)
    target = torch.zeros(1, 1, num_pixels, dtype=torch.int64)
    loss = Loss.parse("ohem", Classes(("sky", "road")))
    value, gradient = loss_and_gradient(loss, logits, target, loss.denominators(target))
    assert value.item() == pytest.approx(-torch.log(p[-num_hardest:]).mean().item(), rel=1e-5)
    chosen = gradient.abs().sum((0, 1, 2)).nonzero().flatten().tolist()
    assert chosen == list(range(num_pixels - num_hardest, num_pixels))


def test_ohem_takes_all_hard_pixels_and_then_no_easy_ones() -> None:
    p = torch.linspace(0.98, 0.02, 33)
    logits = torch.stack([torch.log(p), torch.log(1 - p)]).view(1, 2, 3, 11)
    target = torch.zeros(1, 3, 11, dtype=torch.int64)
    loss = Loss.parse("ohem", Classes(("sky", "road")))
    value = loss(logits, target, loss.denominators(target))
    assert value.item() == pytest.approx(-torch.log(p[p < 0.7]).mean().item(), rel=1e-5)


def test_ohem_does_not_choose_among_pixels_that_are_equally_hard() -> None:
    logits = torch.tensor([5.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    loss = Loss.parse("ohem", Classes(("sky", "road")))
    _, gradient = loss_and_gradient(loss, logits, target, loss.denominators(target))
    assert (gradient == gradient[:, :, :1, :1]).all() and gradient.any()


def test_dice_of_an_image_does_not_depend_on_how_many_classes_it_lacks() -> None:
    batch = make_batch(2, num_classes=3)
    absent = torch.full((4, 97, 7, 9), -torch.inf)
    few, many = (Loss.parse("dice", Classes(tuple(map(str, range(count))))) for count in (3, 100))
    denominators = few.denominators(batch.target)
    torch.testing.assert_close(
        many(torch.cat([batch.logits, absent], 1), batch.target, denominators),
        few(batch.logits, batch.target, denominators),
    )


def test_a_sum_of_terms_is_weighted() -> None:
    batch = make_batch(4)
    parts = {"ce": 1.0, "focal": 0.5, "dice": 2.0, "lovasz": 0.3, "ohem": 1.0}
    loss = Loss.parse(EVERYTHING, batch.classes, class_weights=WEIGHTS, label_smoothing=0.1)
    value, gradient = loss_and_gradient(loss, batch.logits, batch.target, loss.denominators(batch.target))
    expected, expected_gradient = 0.0, torch.zeros_like(gradient)
    for name, weight in parts.items():
        options = {"class_weights": WEIGHTS, "label_smoothing": 0.1} if name in ("ce", "ohem") else {}
        term = Loss.parse(name, batch.classes, **options)  # type: ignore[arg-type]
        of_term = loss_and_gradient(term, batch.logits, batch.target, term.denominators(batch.target))
        expected += weight * of_term[0].item()
        expected_gradient += weight * of_term[1]
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert_same_gradient(gradient, expected_gradient)


@pytest.mark.parametrize("name", [*TERMS, EVERYTHING])
@pytest.mark.parametrize("ignore_index", [255, 5, -100])
def test_logits_of_void_pixels_change_nothing(name: str, ignore_index: int) -> None:
    batch = make_batch(5, void=0.3, ignore_index=ignore_index)
    void = (batch.target == ignore_index).unsqueeze(1)
    loss = Loss.parse(name, batch.classes)
    denominators = loss.denominators(batch.target)
    value, gradient = loss_and_gradient(loss, batch.logits, batch.target, denominators)
    assert gradient.masked_select(void).abs().max() == 0
    assert gradient.masked_select(~void).abs().max() > 0
    for other in (torch.randn_like(batch.logits), torch.full_like(batch.logits, 1e4), -1e4 * batch.logits.sign()):
        changed = loss_and_gradient(loss, batch.logits.where(~void, other), batch.target, denominators)
        assert torch.equal(changed[0], value)
        assert torch.equal(changed[1], gradient)


@pytest.mark.parametrize("name", [*TERMS, EVERYTHING])
def test_void_images_change_nothing(name: str) -> None:
    batch = make_batch(6)
    void = make_batch(7, num_images=2, void=1.0)
    logits, target = torch.cat([batch.logits, void.logits]), torch.cat([batch.target, void.target])
    loss = Loss.parse(name, batch.classes)
    assert torch.equal(loss.denominators(target), loss.denominators(batch.target))
    with_void = loss_and_gradient(loss, logits, target, loss.denominators(target))
    without = loss_and_gradient(loss, batch.logits, batch.target, loss.denominators(batch.target))
    torch.testing.assert_close(with_void[0], without[0], rtol=1e-6, atol=0)
    assert_same_gradient(with_void[1][:4], without[1])
    assert not with_void[1][4:].any()


@pytest.mark.parametrize("name", [*TERMS, EVERYTHING])
@pytest.mark.parametrize("of_batch", [True, False])
def test_a_part_of_nothing_but_void_contributes_nothing(name: str, of_batch: bool) -> None:
    void, rest = make_batch(8, void=1.0), make_batch(9)
    loss = Loss.parse(name, void.classes)
    denominators = loss.denominators(void.target)
    assert denominators.tolist() == [0, 0, 0]
    if not of_batch:
        denominators = denominators + loss.denominators(rest.target)
    value, gradient = loss_and_gradient(loss, void.logits, void.target, denominators)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", ["ce", "ohem"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_of_nothing_but_classes_of_weight_0_has_no_loss(name: str, smoothing: float) -> None:
    logits, target = make_batch(10).logits, torch.full((4, 7, 9), 2)
    loss = Loss.parse(name, CLASSES, class_weights=WEIGHTS, label_smoothing=smoothing)
    value, gradient = loss_and_gradient(loss, logits, target, loss.denominators(target))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", [*TERMS, EVERYTHING])
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 3), min_size=6, max_size=6), st.booleans())
@settings(deadline=None, max_examples=15)
def test_the_contributions_of_parts_add_up_to_the_loss_of_the_batch(
    name: str, seed: int, part_of: list[int], weighted: bool
) -> None:
    batch = make_batch(seed, num_images=6)
    batch.target[seed % 6] = 255
    batch.target[(seed // 6) % 6, 1:] = 255
    if weighted and name in ("ce", "ohem", EVERYTHING):
        loss = Loss.parse(name, CLASSES, class_weights=WEIGHTS, label_smoothing=0.1)
    else:
        loss = Loss.parse(name, CLASSES)
    denominators = loss.denominators(batch.target)
    value, gradient = loss_and_gradient(loss, batch.logits, batch.target, denominators)

    parts = [torch.tensor([i for i in range(6) if part_of[i] == part]) for part in sorted(set(part_of))]
    summed = torch.stack([loss.denominators(batch.target[part]) for part in parts]).sum(0)
    torch.testing.assert_close(summed, denominators, rtol=1e-14, atol=0)
    total = 0.0
    for part in parts:
        of_part = loss_and_gradient(loss, batch.logits[part], batch.target[part], summed)
        total += of_part[0].item()
        assert_same_gradient(of_part[1], gradient[part])
    assert total == pytest.approx(value.item(), rel=1e-6)


def test_denominators_count_weighted_pixels_pixels_and_images() -> None:
    target = torch.tensor([[[0, 1, 255]], [[255, 255, 255]], [[3, 3, 2]]])
    plain = Loss.parse("ce", CLASSES).denominators(target)
    assert plain.dtype == torch.float64
    assert plain.tolist() == [5, 5, 2]
    weighted = Loss.parse("ce", CLASSES, class_weights=WEIGHTS).denominators(target)
    assert weighted.tolist() == pytest.approx([0.2 + 3 + 1.5 + 1.5 + 0, 5, 2])


@pytest.mark.parametrize("name", [*TERMS, EVERYTHING])
def test_is_computed_in_float32_under_autocast(name: str) -> None:
    batch = make_batch(11)
    logits = batch.logits.bfloat16()
    loss = Loss.parse(name, batch.classes)
    denominators = loss.denominators(batch.target)
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = loss_and_gradient(loss, logits, batch.target, denominators)
    expected, expected_gradient = loss_and_gradient(loss, logits.float(), batch.target, denominators)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient.bfloat16())


@pytest.mark.parametrize("options", [{}, {"class_weights": WEIGHTS, "label_smoothing": 0.1}])
@pytest.mark.parametrize("denominators_device", ["cuda", "cpu"])
def test_ce_ohem_and_dice_fetch_nothing_from_the_device(options: dict[str, object], denominators_device: str) -> None:
    # Tensors without data, so that whatever would fetch a value from the device raises.
    with FakeTensorMode():
        logits = torch.empty(4, 5, 7, 9, device="cuda")
        target = torch.empty(4, 7, 9, dtype=torch.int64, device="cuda")
        loss = Loss.parse("ce+ohem+dice", CLASSES, **options)  # type: ignore[arg-type]
        assert loss.denominators(target).device.type == "cuda"
        denominators = torch.empty(3, dtype=torch.float64, device=denominators_device)
        value = loss(logits, target, denominators)
        assert (value.dtype, value.device.type) == (torch.float32, "cuda")


def test_survives_pickling() -> None:
    loss = Loss.parse(EVERYTHING, CLASSES, class_weights=WEIGHTS, label_smoothing=0.1)
    assert pickle.loads(pickle.dumps(loss)) == loss


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("ce", (("ce", 1.0),)),
        ("ce+0.5*dice", (("ce", 1.0), ("dice", 0.5))),
        (" 0.7 * ohem + lovasz ", (("ohem", 0.7), ("lovasz", 1.0))),
        ("1e-2*focal+3*ce", (("focal", 0.01), ("ce", 3.0))),
    ],
)
def test_parse_reads_terms_with_their_weights(text: str, terms: tuple[tuple[str, float], ...]) -> None:
    loss = Loss.parse(text, Classes(("sky", "road"), ignore_index=7), label_smoothing=0.0)
    assert loss == Loss(terms, ignore_index=7)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "loss '': '' is none of ce, focal, dice, lovasz, ohem; write terms as ce+0.5*dice"),
        ("ce+dise", {}, "loss 'ce+dise': 'dise' is none of ce, focal,"),
        ("ce++dice", {}, "loss 'ce++dice': '' is none of"),
        ("ce-0.5*dice", {}, "loss 'ce-0.5*dice': the weight 'ce-0.5' of dice must be a number above 0"),
        ("dice*0.5", {}, "loss 'dice*0.5': '0.5' is none of"),
        ("0*ce", {}, "loss '0*ce': the weight '0' of ce must be a number above 0; leave out a term that is to count"),
        ("-1*ce", {}, "the weight '-1' of ce must be a number above 0"),
        ("nan*ce", {}, "the weight 'nan' of ce must be a number above 0"),
        ("inf*ce", {}, "the weight 'inf' of ce must be a number above 0"),
        ("*ce", {}, "the weight '' of ce must be a number above 0"),
        ("2*3*ce", {}, "the weight '2*3' of ce must be a number above 0"),
        ("ce+2*ce", {}, "loss 'ce+2*ce': ce is given twice; give it once, with a weight as in 2*ce"),
        ("ce", {"label_smoothing": 1.0}, "label smoothing 1.0 must be at least 0 and below 1"),
        ("ce", {"label_smoothing": -0.1}, "label smoothing -0.1 must be at least 0 and below 1"),
        ("ce", {"class_weights": [1.0, 2.0]}, "class weights: 2 for 5 classes; give one for each, or none"),
        (
            "ce",
            {"class_weights": [1.0, -2.0, 1.0, 1.0, 1.0]},
            "class weights: -2.0 for 'road' must be a number of at least 0",
        ),
        ("ce", {"class_weights": [1.0, 1.0, 1.0, 1.0, float("nan")]}, "class weights: nan for 'pole' must be a number"),
        ("ce", {"class_weights": [0.0] * 5}, "class weights: all are 0, so that no pixel counts; give one above 0"),
        (
            "dice+focal",
            {"class_weights": [1.0] * 5},
            "loss 'dice+focal': only ce and ohem take class weights; add one of them, or give none",
        ),
        ("dice", {"label_smoothing": 0.1}, "loss 'dice': only ce and ohem take label smoothing"),
    ],
)
def test_what_makes_no_loss_is_refused(text: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)) as caught:
        Loss.parse(text, CLASSES, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=20))
def test_balanced_weights_give_every_class_the_same_share(num_pixels: list[int]) -> None:
    weights = balanced_weights(num_pixels)
    assert [weight * count for weight, count in zip(weights, num_pixels, strict=True)] == pytest.approx(
        [float(np.median(num_pixels))] * len(num_pixels)
    )


def test_a_class_without_pixels_has_no_weight_and_no_part_in_the_median() -> None:
    assert balanced_weights([100, 0, 400, 200]) == (2.0, 0.0, 0.5, 1.0)


def test_no_pixels_at_all_cannot_be_balanced() -> None:
    with pytest.raises(SettingsError, match="no target holds a pixel that is not void; check the ignore_index"):
        balanced_weights([0, 0])
