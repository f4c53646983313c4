import dataclasses
import json
from typing import Any

import pytest

from segray.errors import SettingsError
from segray.preprocessing import Preprocessing, match_bands

BANDS = ("blue", "green", "red", "nir")
FOUR = Preprocessing(channels=BANDS, mean=(1, 2, 3, 4), std=(5, 6, 7, 8))


def test_the_names_of_bands_survive_json() -> None:
    again = Preprocessing.from_dict(json.loads(json.dumps(dataclasses.asdict(FOUR))))
    assert again == FOUR
    assert again.bands == BANDS
    assert hash(again) == hash(FOUR)


@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
def test_a_model_of_images_has_no_bands(channels: Any) -> None:
    count = len(channels)
    assert Preprocessing(channels=channels, mean=(0.5,) * count, std=(1,) * count).bands is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": (1, 2, 3)}, "3 means and 4 stds for 4 channels"),
        ({"std": (1, 2, 3, 0)}, "must be positive"),
        ({"std": (1, 2, 3, float("nan"))}, "std .* must be finite numbers"),
        ({"mean": (1, 2, 3, float("inf"))}, "mean .* must be finite numbers"),
        ({"mean": ("1", "2", "3", "4")}, "must be finite numbers"),
        (
            {"resize": 520},
            "range 1 and resize 520 are of images; leave them out beside the bands blue, green, red, nir",
        ),
        ({"range": 255}, "range 255 and resize None are of images"),
        ({"channels": ("blue", "red", "Blue", "nir")}, "a band stands twice in blue, red, Blue, nir"),
        ({"channels": ()}, "must be names of bands, at least one"),
        ({"channels": ("blue", "", "red", "nir")}, "must be names of bands"),
        ({"channels": (1, 2, 3, 4)}, "must be names of bands"),
    ],
)
def test_bands_that_cannot_be_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(FOUR, **fields)


@pytest.mark.parametrize(
    ("preprocessing", "names", "expected"),
    [
        (FOUR, ["coastal", "Blue", "GREEN", "red", "nir", "swir16"], ("Blue", "GREEN", "red", "nir")),
        (FOUR, ["nir", "red", "green", "blue"], BANDS),
        (Preprocessing(), ["nir", "Blue", "Green", "Red"], ("Red", "Green", "Blue")),
        (Preprocessing(channels="BGR"), ["red", "green", "blue"], ("red", "green", "blue")),
        (Preprocessing(channels="L", mean=(0.5,), std=(1,)), ["pan"], ("pan",)),
        (Preprocessing(channels="L", mean=(0.5,), std=(1,)), ["red", "nir", "green", "blue"], ("red", "green", "blue")),
    ],
)
def test_a_models_bands_are_found_among_a_scenes(
    preprocessing: Preprocessing, names: list[str], expected: tuple[str, ...]
) -> None:
    assert match_bands(preprocessing, names) == expected


@pytest.mark.parametrize(
    ("preprocessing", "names", "message"),
    [
        (FOUR, ["blue", "B8", "red"], "blue, green, red, nir, and the scene has blue, B8, red: green, nir are missing"),
        (FOUR, [], "blue, green, red, nir, and the scene has none"),
        (Preprocessing(), ["1", "2", "3"], "red, green, blue, and the scene has 1, 2, 3"),
        (Preprocessing(channels="L", mean=(0.5,), std=(1,)), ["nir", "red"], "green, blue are missing"),
        (Preprocessing(resize=520), ["red", "green", "blue"], "the model resizes images to 520 pixels"),
    ],
)
def test_bands_that_a_scene_lacks_are_told_beside_those_that_it_has(
    preprocessing: Preprocessing, names: list[str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        match_bands(preprocessing, names)
