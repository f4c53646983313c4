import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from segray.augment import Augmentation, augment
from segray.errors import SettingsError

STILL = Augmentation(crop=32, scale=(1.0, 1.0), class_share=1.0, flip=0.0, rotation=0.0, colour=0.0, blur=0.0)
"""Nothing happens but the cut."""

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(height: int, width: int, num_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (height, width, 3)).astype(np.uint8)
    return image, rng.integers(0, num_classes, (height, width)).astype(np.uint8)


def fields(height: int, width: int, ids: np.ndarray, side: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Squares of one id each, each id with a shade of its own in every channel."""
    rng = np.random.default_rng(0)
    places = rng.integers(0, len(ids), (height // side + 1, width // side + 1))
    places = np.kron(places, np.ones((side, side), int))[:height, :width]
    shades = np.stack([rng.permutation(len(ids)) for _ in range(3)], axis=1) * 200 // (len(ids) - 1) + 40
    return shades.astype(np.uint8)[places], ids[places]


def inside(target: np.ndarray, side: int) -> np.ndarray:
    """Where all ids are equal within a square of this (odd) side; not at the border, beyond which nothing is known."""
    around = sliding_window_view(target, (side, side))
    return np.pad(around.min((2, 3)) == around.max((2, 3)), side // 2)


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_image_and_target_move_together(blur: float) -> None:
    image, target = fields(300, 360, np.arange(6, dtype=np.uint8), side=60)
    shade = {class_id: image[target == class_id][0].astype(int) for class_id in range(6)}
    moves = Augmentation(crop=128, class_share=1.0, rotation=180.0, colour=0.0, blur=blur)
    cuts = set()
    for seed in range(25):
        cut, ids = augment(image, target, moves, 255, seed)
        deep = inside(ids, 19 if blur else 9)
        for class_id in np.unique(ids[deep]):
            found = cut[deep & (ids == class_id)].astype(int)
            assert np.abs(found - shade[class_id]).max() <= 3, f"seed {seed}, class {class_id}"
        assert deep.mean() > 0.02
        cuts.add(ids.tobytes())
    assert len(cuts) == 25


def test_recolouring_treats_all_pixels_alike_and_leaves_the_target() -> None:
    image, target = fields(200, 200, np.arange(6, dtype=np.uint8))
    still = dataclasses.replace(STILL, crop=150)
    seen = set()
    for seed in range(10):
        cut, ids = augment(image, target, dataclasses.replace(still, colour=0.5), 255, seed)
        _, same = augment(image, target, still, 255, seed)
        np.testing.assert_array_equal(ids, same)
        colours = [np.unique(cut[ids == class_id], axis=0) for class_id in range(6)]
        assert all(len(of_class) == 1 for of_class in colours)
        seen.add(cut.tobytes())
    assert len(seen) == 10


def test_the_seed_decides_all() -> None:
    image, target = noise(120, 160)
    every = Augmentation(crop=48, blur=0.5)
    first = [augment(image, target, every, 255, seed) for seed in range(20)]
    again = [augment(image.copy(), target.copy(), every, 255, seed) for seed in range(20)]
    for (cut, ids), (same_cut, same_ids) in zip(first, again, strict=True):
        np.testing.assert_array_equal(cut, same_cut)
        np.testing.assert_array_equal(ids, same_ids)
    assert len({cut.tobytes() for cut, _ in first}) == 20


def test_what_goes_in_is_left_as_it_is() -> None:
    image, target = noise(40, 50)
    image.flags.writeable = target.flags.writeable = False  # as Ray's store gives them
    for seed in range(5):
        for crop in (16, 64):
            cut, ids = augment(image, target, Augmentation(crop=crop), 255, seed)
            assert cut.flags.writeable and ids.flags.writeable


@given(
    st.one_of(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.sampled_from([(1, 1), (1, 900), (900, 1)])),
    st.integers(1, 70),
    st.floats(0, 180),
    st.sampled_from([(0.5, 2.0), (0.1, 0.1), (7.0, 7.0)]),
    st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=80)
def test_every_image_gives_a_crop_of_its_ids_and_void(
    shape: tuple[int, int], crop: int, rotation: float, scale: tuple[float, float], seed: int
) -> None:
    image, target = noise(*shape)
    cut, ids = augment(image, target, Augmentation(crop=crop, rotation=rotation, scale=scale, blur=0.5), 255, seed)
    assert cut.shape == (crop, crop, 3) and cut.dtype == np.uint8
    assert ids.shape == (crop, crop) and ids.dtype == np.uint8
    assert set(np.unique(ids).tolist()) <= {*np.unique(target).tolist(), 255}


@given(st.integers(1, 50), st.sampled_from([0.0, 5.0, 45.0, 180.0]), st.booleans(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=150)
def test_of_an_image_larger_than_its_window_nothing_is_void_or_black(
    crop: int, rotation: float, scaled: bool, seed: int
) -> None:
    side = math.ceil(3 * crop) + 2  # twice as much for a scale of a half, and half as much again for what is turned
    image, target = np.full((side, side, 3), 200, np.uint8), np.ones((side, side), np.uint8)
    moves = dataclasses.replace(STILL, crop=crop, rotation=rotation, scale=(0.5, 2.0) if scaled else (1.0, 1.0))
    cut, ids = augment(image, target, moves, 255, seed)
    assert (ids == 1).all()
    assert (cut == 200).all()


@pytest.mark.parametrize(("height", "width"), [(20, 70), (70, 20), (20, 20), (1, 1)])
def test_what_lies_beyond_a_small_image_is_black_and_void(height: int, width: int) -> None:
    image, target = noise(height, width)
    places = set()
    for seed in range(10):
        cut, ids = augment(image, target, STILL, 255, seed)
        seen = ids != 255
        assert seen.sum() == min(height, 32) * min(width, 32)
        assert (cut[~seen] == 0).all()
        assert (cut[seen] > 0).all()
        places.add(seen.tobytes())
    assert len(places) > 5, "a small image does not always lie in the same place"


def test_beyond_a_turned_image_black_and_void_agree() -> None:
    image, target = np.full((40, 40, 3), 200, np.uint8), np.ones((40, 40), np.uint8)
    for seed in range(10):
        moves = dataclasses.replace(STILL, crop=80, rotation=180.0, scale=(0.5, 1.5))
        cut, ids = augment(image, target, moves, 255, seed)
        deep = inside(ids, 9)
        np.testing.assert_array_equal((cut == 200).all(axis=2)[deep], ids[deep] == 1)
        np.testing.assert_array_equal((cut == 0).all(axis=2)[deep], ids[deep] == 255)
        assert len(np.unique(ids[deep])) == 2


def test_void_of_the_target_is_kept() -> None:
    image, target = noise(32, 32)
    target[5:9] = 255
    _, ids = augment(image, target, STILL, 255, 0)
    np.testing.assert_array_equal(ids, target)


def test_where_nothing_may_happen_pixels_are_the_sources_own() -> None:
    image, target = noise(32, 32)
    cut, ids = augment(image, target, STILL, 255, 0)
    np.testing.assert_array_equal(cut, image)
    np.testing.assert_array_equal(ids, target)

    rows, cols = np.mgrid[:100, :120].astype(np.uint8)
    image, target = np.stack([rows, cols, rows], axis=2), rows ^ cols
    corners = set()
    for seed in range(20):
        cut, ids = augment(image, target, STILL, 255, seed)
        row, col, _ = map(int, cut[0, 0])
        np.testing.assert_array_equal(cut, image[row : row + 32, col : col + 32])
        np.testing.assert_array_equal(ids, target[row : row + 32, col : col + 32])
        corners.add((row, col))
    assert len(corners) > 15


def test_a_flip_mirrors_left_to_right() -> None:
    image, target = noise(80, 90)
    for seed in range(10):
        cut, ids = augment(image, target, STILL, 255, seed)
        mirrored, mirrored_ids = augment(image, target, dataclasses.replace(STILL, flip=1.0), 255, seed)
        np.testing.assert_array_equal(mirrored, cut[:, ::-1])
        np.testing.assert_array_equal(mirrored_ids, ids[:, ::-1])
    halfway = dataclasses.replace(STILL, flip=0.5)
    num_flipped = sum(
        not np.array_equal(augment(image, target, halfway, 255, seed)[1], augment(image, target, STILL, 255, seed)[1])
        for seed in range(200)
    )
    assert 70 < num_flipped < 130


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_a_scale_is_that_of_pillow(scale: float) -> None:
    side = round(64 / scale)
    image, target = noise(side, side)
    cut, ids = augment(image, target, dataclasses.replace(STILL, crop=64, scale=(scale, scale)), 255, 0)
    expected = Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(cut, np.asarray(expected))
    repeated = np.kron(target, np.ones((2, 2), np.uint8)) if scale == 2 else target[1::2, 1::2]
    np.testing.assert_array_equal(ids, repeated)


@pytest.mark.parametrize(("height", "width"), [(200, 300), (300, 200)])
def test_an_image_is_brought_to_a_size_before_it_is_cut(height: int, width: int) -> None:
    image, target = fields(height, width, np.arange(6, dtype=np.uint8))
    cut, ids = augment(image, target, dataclasses.replace(STILL, crop=100, class_share=1.0), 255, 0, resize=100)
    assert 255 not in ids, "its shorter side is as long as the crop"
    double = dataclasses.replace(STILL, crop=100, class_share=1.0, scale=(0.5, 0.5))
    for one, other in zip(augment(image, target, double, 255, 0), (cut, ids), strict=True):
        np.testing.assert_array_equal(one, other)


def test_scales_reach_from_the_least_to_the_largest_as_often_halved_as_doubled() -> None:
    image, target = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), np.uint8)
    target[30:70, 30:70] = 1
    moves = dataclasses.replace(STILL, crop=180, scale=(0.2, 1.8))  # the whole image is in the window
    factors = [math.sqrt((augment(image, target, moves, 255, seed)[1] == 1).sum()) / 40 for seed in range(80)]
    assert 0.18 < min(factors) < 0.25
    assert 1.6 < max(factors) < 1.82
    assert abs(np.log(factors).mean() - np.log([0.2, 1.8]).mean()) < 0.2


def test_angles_reach_from_one_bound_to_the_other() -> None:
    image, target = np.zeros((110, 110, 3), np.uint8), np.zeros((110, 110), np.uint8)
    target[:, 55:] = 1
    angles = []
    for seed in range(40):
        _, ids = augment(image, target, dataclasses.replace(STILL, crop=64, rotation=20.0), 255, seed)
        slope = np.polyfit(np.arange(64), (ids == 0).sum(axis=1), 1)[0]
        angles.append(math.degrees(math.atan(slope)))
    assert -20.5 < min(angles) < -14
    assert 14 < max(angles) < 20.5


def test_a_blur_smooths_the_image_alone() -> None:
    image, target = noise(64, 64)
    for seed in range(5):
        cut, ids = augment(image, target, STILL, 255, seed)
        blurred, same = augment(image, target, dataclasses.replace(STILL, blur=1.0), 255, seed)
        np.testing.assert_array_equal(ids, same)
        assert blurred.std() < cut.std() - 1


def test_crops_that_one_class_fills_are_cut_anew() -> None:
    image, target = np.zeros((200, 200, 3), np.uint8), np.zeros((200, 200), np.uint8)
    target[80:140, 80:140] = 1

    def shares(class_share: float) -> list[float]:
        cut = dataclasses.replace(STILL, class_share=class_share)
        targets = [augment(image, target, cut, 255, seed)[1] for seed in range(200)]
        return [np.bincount(ids.ravel()).max() / ids.size for ids in targets]

    taken = np.array(shares(1.0))
    for bound in (0.95, 0.75):
        found = np.array(shares(bound))
        assert found.mean() < taken.mean() - 0.05
        # The first cut and ten more are too uniform as often as one is, to the power of eleven.
        assert abs((found > bound).mean() - (taken > bound).mean() ** 11) < 0.1
        assert (found > bound).mean() < (taken > bound).mean() - 0.4


def test_void_is_no_class_that_fills_a_crop() -> None:
    image, target = noise(100, 100, num_classes=2)
    target[np.random.default_rng(1).random(target.shape) < 0.8] = 255
    for seed in range(10):
        first = augment(image, target, STILL, 255, seed)
        picky = augment(image, target, dataclasses.replace(STILL, class_share=0.7), 255, seed)
        np.testing.assert_array_equal(picky[0], first[0])


def test_an_image_of_one_class_or_of_void_still_gives_a_crop() -> None:
    image, _ = noise(50, 60)
    for value in (0, 255):
        _, ids = augment(image, np.full((50, 60), value, np.uint8), dataclasses.replace(STILL, class_share=0.1), 255, 0)
        assert (ids == value).all()


@pytest.mark.parametrize(
    ("ids", "ignore_index"),
    [
        (np.array([0, 7, 200], np.uint8), 255),
        (np.array([0, 1, 250], np.uint8), 11),
        (np.array([0, 300, 40_000], np.uint16), 65535),
        (np.array([0, 300, 40_000], np.uint16), 255),
    ],
)
def test_ids_never_mix(ids: np.ndarray, ignore_index: int) -> None:
    image, target = fields(60, 90, ids, side=3)
    for seed in range(20):
        _, found = augment(image, target, Augmentation(crop=64, rotation=45.0), ignore_index, seed)
        assert found.dtype == ids.dtype
        assert set(np.unique(found).tolist()) <= {*ids.tolist(), ignore_index}


@pytest.mark.parametrize("ignore_index", [300, 65535, -1])
def test_void_that_8_bits_do_not_hold_stays_void(ignore_index: int) -> None:
    image, target = noise(16, 16)
    _, ids = augment(image, target, STILL, ignore_index, 0)
    assert (ids == ignore_index).sum() == 32 * 32 - 16 * 16
    assert set(np.unique(ids).tolist()) == {0, 1, 2, ignore_index}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 0}, "--crop 0 must be at least 1"),
        ({"scale": (0.0, 1.0)}, r"--scale 0\.0 1\.0: give the least and the largest factor, finite and above 0"),
        ({"scale": (2.0, 1.0)}, r"--scale 2\.0 1\.0"),
        ({"scale": (1.0, math.inf)}, r"--scale 1\.0 inf"),
        ({"scale": (math.nan, 1.0)}, r"--scale nan 1\.0"),
        ({"class_share": 0.0}, r"--class-share 0\.0 must be above 0"),
        ({"class_share": 1.1}, r"--class-share 1\.1 must lie between 0 and 1"),
        ({"flip": -0.1}, r"--flip -0\.1 must lie between 0 and 1"),
        ({"flip": 1.5}, r"--flip 1\.5"),
        ({"rotation": 181.0}, r"--rotation 181\.0 must lie between 0 and 180"),
        ({"rotation": -1.0}, r"--rotation -1\.0"),
        ({"colour": 1.1}, r"--colour 1\.1 must lie between 0 and 1"),
        ({"colour": math.nan}, "--colour nan"),
        ({"blur": 2.0}, r"--blur 2\.0 must lie between 0 and 1"),
    ],
)
def test_settings_out_of_bounds_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Augmentation(**options)  # type: ignore[arg-type]


def test_settings_at_their_bounds_are_taken_and_work() -> None:
    image, target = noise(20, 20)
    most = Augmentation(crop=1, scale=(1.0, 1.0), class_share=1.0, flip=1.0, rotation=180.0, colour=1.0, blur=1.0)
    assert augment(image, target, most, 255, 0)[0].shape == (1, 1, 3)


def test_settings_are_read_without_torch_or_ray() -> None:
    code = "import sys, segray.augment; sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def bands(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Four bands about 300, the last of them all twice the first."""
    values = np.random.default_rng(seed).normal(300, 5, (height, width, 4)).astype(np.float32)
    values[:, :, 3] = 2 * values[:, :, 0]
    return values


def test_bands_that_stay_are_the_window_itself() -> None:
    image, target = bands(48, 48), np.random.default_rng(1).integers(0, 3, (48, 48), np.uint8)
    image[5:9, 7] = np.nan
    cut, ids = augment(image, target, dataclasses.replace(STILL, crop=48), 255, 0)
    np.testing.assert_array_equal(cut, image)
    np.testing.assert_array_equal(ids, np.where(np.isnan(image[:, :, 0]), 255, target))


def test_bands_move_with_their_target_and_no_data_is_mixed_into_none() -> None:
    target = np.kron(np.random.default_rng(0).integers(0, 3, (6, 6), np.uint8), np.ones((20, 20), np.uint8))
    image = np.repeat(target[:, :, None].astype(np.float32) * 100 + 1000, 2, axis=2)
    image[:, 70:90] = np.nan
    moves = Augmentation(crop=64, scale=(0.5, 2.0), rotation=180.0, colour=0.0, blur=0.5, class_share=1.0)
    for seed in range(20):
        cut, ids = augment(image, target, moves, 255, seed)
        assert cut.shape == (64, 64, 2)
        assert cut.dtype == np.float32
        there = np.isfinite(cut[:, :, 0])
        assert (ids[~there] == 255).all()
        # Zeros of what holds no data would pull a mean below what any pixel holds.
        assert cut[there].min() >= 999.9
        assert cut[there].max() <= 1200.1
        inner = there & (ids != 255)
        alike = np.abs(cut[:, :, 0][inner] - (ids[inner] * 100.0 + 1000)) < 50
        assert alike.mean() > 0.8, "values and ids went the same way"


def test_light_changes_all_bands_alike_whatever_their_unit() -> None:
    image, target = bands(32, 32), np.zeros((32, 32), np.uint8)
    image[0, 0] = np.nan
    lit = dataclasses.replace(STILL, crop=32, colour=0.5)
    cuts = [augment(image, target, lit, 255, seed)[0] for seed in range(10)]
    for cut in cuts:
        np.testing.assert_allclose(cut[:, :, 3], 2 * cut[:, :, 0], rtol=1e-5)
        assert np.nanmax(np.abs(cut[:, :, 0] - 300)) < 40, "by a share of the spread, not of the value"
        assert np.isnan(cut[0, 0]).all()
    assert len({float(cut[1, 1, 0]) for cut in cuts}) == 10
