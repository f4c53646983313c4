import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchmetrics.classification import MulticlassJaccardIndex

from segray.statistics import ConfusionMatrix

VOID = 255


@st.composite
def pairs(draw: st.DrawFn, num_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A target, void here and there, and a prediction of the same size."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=8))
    target = draw(hnp.arrays(np.uint8, shape, elements=st.sampled_from([*range(num_classes), VOID])))
    prediction = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, num_classes - 1)))
    return target, prediction


@settings(deadline=None)
@given(st.lists(pairs(), min_size=1, max_size=4))
def test_adding_matrices_is_the_matrix_of_all_pixels(images: list[tuple[np.ndarray, np.ndarray]]) -> None:
    total = ConfusionMatrix.zeros(4)
    for target, prediction in images:
        total += ConfusionMatrix.of(target, prediction, 4, VOID)
    together = ConfusionMatrix.of(
        np.concatenate([target.ravel() for target, _ in images])[None],
        np.concatenate([prediction.ravel() for _, prediction in images])[None],
        4,
        VOID,
    )
    assert total.counts.dtype == np.int64
    np.testing.assert_array_equal(total.counts, together.counts)


@settings(deadline=None)
@given(pairs())
def test_void_pixels_count_nowhere(pair: tuple[np.ndarray, np.ndarray]) -> None:
    target, prediction = pair
    matrix = ConfusionMatrix.of(target, prediction, 4, VOID)
    assert matrix.counts.sum() == (target != VOID).sum()
    otherwise = np.where(target == VOID, (prediction + 1) % 4, prediction).astype(np.uint8)
    np.testing.assert_array_equal(matrix.counts, ConfusionMatrix.of(target, otherwise, 4, VOID).counts)


@settings(deadline=None)
@given(pairs())
def test_absent_classes_have_no_iou_and_leave_the_mean(pair: tuple[np.ndarray, np.ndarray]) -> None:
    target, prediction = pair
    valid = target != VOID
    matrix = ConfusionMatrix.of(target, prediction, 4, VOID)
    present = np.union1d(target[valid], prediction[valid])
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(matrix.iou())), present)
    if present.size:
        assert matrix.miou() == pytest.approx(np.mean(matrix.iou()[present]))
    else:
        assert np.isnan(matrix.miou())
        assert np.isnan(matrix.pixel_accuracy())


@settings(deadline=None)
@given(pairs())
def test_rows_are_targets_and_columns_predictions(pair: tuple[np.ndarray, np.ndarray]) -> None:
    target, prediction = pair
    counts = ConfusionMatrix.of(target, prediction, 4, VOID).counts
    for target_id in range(4):
        for prediction_id in range(4):
            assert counts[target_id, prediction_id] == ((target == target_id) & (prediction == prediction_id)).sum()


@pytest.mark.parametrize("num_classes", [2, 5, 21, 300])
@pytest.mark.parametrize("seed", range(3))
def test_iou_is_that_of_torchmetrics(num_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    target = rng.integers(0, num_classes, (4, 60, 80)).astype(np.uint16)
    prediction = np.where(rng.random(target.shape) < 0.7, target, rng.integers(0, num_classes, target.shape))
    target[rng.random(target.shape) < 0.1] = 999
    absent = num_classes - 1
    target[target == absent] = 0
    prediction[prediction == absent] = 0

    total = ConfusionMatrix.zeros(num_classes)
    each = MulticlassJaccardIndex(num_classes=num_classes, average=None, ignore_index=999)
    mean = MulticlassJaccardIndex(num_classes=num_classes, ignore_index=999)
    for one_target, one_prediction in zip(target, prediction, strict=True):
        total += ConfusionMatrix.of(one_target, one_prediction.astype(np.uint16), num_classes, 999)
        tensors = torch.from_numpy(one_prediction.astype(np.int64)), torch.from_numpy(one_target.astype(np.int64))
        each.update(*tensors)
        mean.update(*tensors)

    iou = total.iou()
    assert np.isnan(iou[absent])
    np.testing.assert_allclose(np.delete(iou, absent), np.delete(each.compute().numpy(), absent), rtol=1e-6)
    assert total.miou() == pytest.approx(float(mean.compute()), rel=1e-6)


def test_sizes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2×3 .*3×2"):
        ConfusionMatrix.of(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2, VOID)


def test_ids_beyond_the_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[7, 11\].* 2 classes"):
        ConfusionMatrix.of(np.array([[0, 7, 11, 255]], np.uint8), np.zeros((1, 4), np.uint8), 2, VOID)


def test_many_pixels_do_not_overflow() -> None:
    half = ConfusionMatrix(np.full((2, 2), 2**40, np.int64))
    assert (half + half).counts.tolist() == [[2**41, 2**41]] * 2
    assert (half + half).pixel_accuracy() == 0.5
