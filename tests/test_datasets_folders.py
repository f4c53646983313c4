"""The kinds that pair files of two folders by their names: Cityscapes, ADE20K, and folders of one's own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segray.datasets import open_dataset, read
from segray.datasets.ade20k import CLASSES
from segray.datasets.cityscapes import to_label_ids
from segray.errors import SettingsError, SourceError
from tests.conftest import real
from tests.test_datasets import encoded, photo, places, plant, reject, targets

# The ids in gtFine_labelIds.png of the 19 classes, in the order of their train ids.
LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def cityscapes_tree(root: Path) -> str:
    files: dict[str, bytes | str] = {}
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "frankfurt"), ("test", "berlin")):
        name = f"{split}/{city}/{city}_000000_000019"
        files[f"leftImg8bit/{name}_leftImg8bit.png"] = photo(2, 17)
        files[f"gtFine/{name}_gtFine_labelIds.png"] = encoded(np.arange(34).reshape(2, 17))
        files[f"gtFine/{name}_gtFine_color.png"] = photo(2, 17)
        files[f"gtFine/{name}_gtFine_polygons.json"] = "{}"
    return plant(root, files)


def test_cityscapes_label_ids_become_the_19_classes_and_all_others_void(tmp_path: Path) -> None:
    dataset = open_dataset("cityscapes", cityscapes_tree(tmp_path))
    names = ["aachen/aachen_000000_000019", "bochum/bochum_000000_000019", "frankfurt/frankfurt_000000_000019"]
    assert places(dataset) == [("train", names[0]), ("train", names[1]), ("val", names[2])]
    expected = [LABEL_IDS.index(i) if i in LABEL_IDS else 255 for i in range(34)]
    for target in targets(dataset).values():
        assert target.dtype == np.uint8
        assert target.ravel().tolist() == expected
    assert dataset.classes.names[:3] == ("road", "sidewalk", "building")
    assert dataset.classes.names[-1] == "bicycle"
    assert dataset.classes.palette[0] == (128, 64, 128)
    assert dataset.classes.palette[13] == (0, 0, 142)
    assert len(dataset.classes) == 19


def test_label_maps_go_back_to_cityscapes_label_ids_with_void_as_0(tmp_path: Path) -> None:
    label_map = np.array([[*range(19), 255, 19]], np.uint8)
    label_ids = to_label_ids(label_map)
    assert label_ids.dtype == np.uint8
    assert label_ids.tolist() == [[*LABEL_IDS, 0, 0]]
    np.testing.assert_array_equal(to_label_ids(label_map.astype(np.uint16)), label_ids)
    dataset = open_dataset("cityscapes", cityscapes_tree(tmp_path))
    again = dataset.to_target(dataset.pairs[0], encoded(label_ids), label_ids.shape)
    assert again.tolist() == [[*range(19), 255, 255]]


def test_faults_of_cityscapes_are_named(tmp_path: Path) -> None:
    root = Path(cityscapes_tree(tmp_path))
    name = "frankfurt/frankfurt_000000_000019"
    file = root / f"gtFine/val/{name}_gtFine_labelIds.png"
    file.write_bytes(encoded(np.full((2, 17), 34)))
    dataset = open_dataset("cityscapes", str(root))
    caught = reject(dataset, name)
    assert (caught.kind, f"{file}: the id 34 in row 0, column 0" in caught.detail) == ("unknown id", True)
    file.unlink()
    caught = reject(open_dataset("cityscapes", str(root)), name)
    assert (caught.kind, f"{file}: there is no such file" in caught.detail) == ("missing", True)
    shutil.rmtree(root / "gtFine")
    with pytest.raises(SourceError, match="no leftImg8bit/train with gtFine/train and no leftImg8bit/val with"):
        open_dataset("cityscapes", str(root))


def ade20k_tree(root: Path) -> str:
    files: dict[str, bytes | str] = {}
    for folder, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        files[f"images/{folder}/{name}.jpg"] = photo(2, 3, ".jpg")
        files[f"annotations/{folder}/{name}.png"] = encoded([[0, 1, 2], [149, 150, 0]])
    return plant(root, files)


@pytest.mark.parametrize("folder", ["", "ADEChallengeData2016"])
def test_ade20k_counts_from_1_and_its_0_is_void(tmp_path: Path, folder: str) -> None:
    ade20k_tree(tmp_path / folder)
    dataset = open_dataset("ade20k", str(tmp_path))
    assert places(dataset) == [("train", "ADE_train_00000001"), ("val", "ADE_val_00000001")]
    for target in targets(dataset).values():
        assert target.dtype == np.uint8
        assert target.tolist() == [[255, 0, 1], [148, 149, 255]]
    assert dataset.classes == CLASSES
    assert len(CLASSES) == 150
    assert [CLASSES.names[i] for i in (0, 12, 91, 149)] == ["wall", "person", "dirt track", "flag"]
    assert [CLASSES.palette[i] for i in (0, 2, 149)] == [(120, 120, 120), (6, 230, 230), (92, 0, 255)]


def test_ade20k_names_come_from_its_own_table_where_that_is_there(tmp_path: Path) -> None:
    root = ade20k_tree(tmp_path)
    rows = [f"{i} \t0.1\t5\t6\tclass {i}, called {i} \n" for i in range(1, 151)]
    plant(tmp_path, {"objectInfo150.txt": "Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows)})
    assert open_dataset("ade20k", root).classes.names == tuple(f"class {i}" for i in range(1, 151))
    plant(tmp_path, {"objectInfo150.txt": "Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows[:20])})
    with pytest.raises(SourceError, match=r"objectInfo150\.txt: there are 20 classes and not 150"):
        open_dataset("ade20k", root)


def test_an_unknown_id_of_ade20k_is_named(tmp_path: Path) -> None:
    plant(
        Path(ade20k_tree(tmp_path)), {"annotations/validation/ADE_val_00000001.png": encoded([[0, 1, 2], [151, 1, 1]])}
    )
    caught = reject(open_dataset("ade20k", str(tmp_path)), "ADE_val_00000001")
    assert caught.kind == "unknown id"
    assert "ADE_val_00000001.png: the id 151 in row 1, column 0" in caught.detail


CLASSES_JSON = json.dumps({"names": ["soil", "crop", "weed"], "palette": [[9, 9, 9], [0, 255, 0], [255, 0, 0]]})


def test_flat_folders_are_train_and_targets_may_be_grey_palette_or_colour(tmp_path: Path) -> None:
    colours = [[[255, 0, 0], [0, 255, 0]], [[9, 9, 9], [0, 0, 0]]]
    files: dict[str, bytes | str] = {
        "classes.json": CLASSES_JSON,
        "images/grey.jpg": photo(2, 2, ".jpg"),
        "images/field/colour.png": photo(2, 2),
        "images/field/palette.JPG": photo(2, 2, ".jpg"),
        "targets/grey.png": encoded([[2, 1], [0, 255]]),
        "targets/field/colour.png": encoded(colours),
        "targets/field/palette.png": encoded([[2, 1], [0, 255]], [(i, 7, 7) for i in range(256)]),
    }
    dataset = open_dataset("folders", plant(tmp_path, files))
    assert places(dataset) == [("train", "field/colour"), ("train", "field/palette"), ("train", "grey")]
    for target in targets(dataset).values():
        assert target.dtype == np.uint8
        assert target.tolist() == [[2, 1], [0, 255]]
    assert dataset.classes.names == ("soil", "crop", "weed")


def test_split_folders_are_their_splits_and_classes_may_lie_elsewhere(tmp_path: Path) -> None:
    for split in ("train", "test"):
        plant(tmp_path / split, {"images/a.png": photo(1, 2), "targets/a.png": encoded([[1, 11]])})
    plant(tmp_path / "val", {"images/a.png": photo(1, 2)})
    plant(tmp_path, {"names.txt": "\n".join("abcdefghijkl")})
    dataset = open_dataset("folders", str(tmp_path), classes=str(tmp_path / "names.txt"))
    assert places(dataset) == [("test", "a"), ("train", "a")]
    assert [target.tolist() for target in targets(dataset).values()] == [[[1, 11]]] * 2


def test_black_is_a_class_where_one_is_black(tmp_path: Path) -> None:
    palette = {"names": ["soil", "crop"], "palette": [[0, 0, 0], [0, 255, 0]], "ignore_index": 7}
    files: dict[str, bytes | str] = {
        "classes.json": json.dumps(palette),
        "images/a.png": photo(1, 2),
        "images/b.png": photo(1, 2),
        "targets/a.png": encoded([[[0, 0, 0], [0, 255, 0]]]),
        "targets/b.png": encoded([[7, 1]]),
    }
    found = targets(open_dataset("folders", plant(tmp_path, files)))
    assert [target.tolist() for target in found.values()] == [[[0, 1]], [[7, 1]]]


def test_more_than_255_classes_are_16_bit(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(300)]
    stored = np.array([[299, 0, 65535]], np.uint16)
    plant(
        tmp_path,
        {
            "classes.json": json.dumps({"names": names, "ignore_index": 65535}),
            **{f"images/{name}.png": photo(1, 3) for name in ("wide", "narrow")},
            "targets/narrow.png": encoded([[255, 0, 1]]),
        },
    )
    Image.fromarray(stored).save(tmp_path / "targets/wide.png")
    found = targets(open_dataset("folders", str(tmp_path)))
    assert {target.dtype for target in found.values()} == {np.dtype(np.uint16)}
    assert [target.tolist() for target in found.values()] == [[[255, 0, 1]], stored.tolist()]


def test_faults_of_folders_are_named(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "classes.json": CLASSES_JSON,
        **{f"images/{name}.png": photo(2, 2) for name in ("colour", "id", "size", "alone")},
        "targets/colour.png": encoded([[[9, 9, 9], [9, 9, 9]], [[0, 0, 0], [1, 2, 3]]]),
        "targets/id.png": encoded([[0, 1], [3, 2]]),
        "targets/size.png": encoded([[0, 1]]),
        "targets/only.png": encoded([[0, 1]]),
    }
    dataset = open_dataset("folders", plant(tmp_path, files))
    expected = {
        "colour": ("unknown colour", "targets/colour.png: the colour (1, 2, 3) in row 1, column 1 stands for no class"),
        "id": ("unknown id", "targets/id.png: the id 3 in row 1, column 0 stands for no class"),
        "size": ("size mismatch", "targets/size.png: the target has 1×2 pixels"),
        "alone": ("missing", "targets/alone.png: there is no such file"),
        "only": ("missing", "images/only.*: there is no such file"),
    }
    assert {pair.name for pair in dataset.pairs} == set(expected)
    for name, (kind, detail) in expected.items():
        caught = reject(dataset, name)
        assert caught.kind == kind
        assert f"{tmp_path}/{detail}" in caught.detail


def test_colours_that_several_classes_share_cannot_be_told_apart(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "classes.json": json.dumps({"names": ["a", "b"], "palette": [[1, 2, 3], [1, 2, 3]]}),
        **{f"images/{name}.png": photo(1, 1) for name in ("colour", "ids")},
        "targets/colour.png": encoded([[[1, 2, 3]]]),
        "targets/ids.png": encoded([[1]]),
    }
    dataset = open_dataset("folders", plant(tmp_path, files))
    caught = reject(dataset, "colour")
    assert (caught.kind, "targets/colour.png: (1, 2, 3) is of several classes" in caught.detail) == (
        "ambiguous colour",
        True,
    )
    assert read(dataset.pairs[1], dataset.to_target)[2].tolist() == [[1]]


def test_folders_need_classes_that_ids_of_a_png_can_hold(tmp_path: Path) -> None:
    plant(tmp_path, {"images/a.png": photo(1, 1), "targets/a.png": encoded([[0]])})
    with pytest.raises(SettingsError, match=r"classes\.json: there is no such file; .* --classes"):
        open_dataset("folders", str(tmp_path))
    with pytest.raises(SettingsError, match=r"elsewhere\.json: the classes file cannot be read"):
        open_dataset("folders", str(tmp_path), classes=str(tmp_path / "elsewhere.json"))
    plant(tmp_path, {"classes.json": '{"names": ["a"], "ignore_index": -1}'})
    with pytest.raises(SettingsError, match=r"classes\.json: ignore_index -1: ids in a PNG"):
        open_dataset("folders", str(tmp_path))


def test_real_crop_and_weed_targets_are_read_by_their_colours(tmp_path: Path) -> None:
    source = real("cwfid")
    palette = [[0, 0, 0], [0, 255, 0], [255, 0, 0]]
    plant(tmp_path, {"classes.json": json.dumps({"names": ["soil", "crop", "weed"], "palette": palette})})
    for folder, ending in (("images", "_image"), ("targets", "_annotation")):
        (tmp_path / folder).mkdir()
        for file in source.glob(f"*{ending}.png"):
            (tmp_path / folder / file.name.replace(ending, "")).symlink_to(file)
    dataset = open_dataset("folders", str(tmp_path))
    assert places(dataset) == [("train", f"{i:03}") for i in range(1, 9)]
    for pair in dataset.pairs[::3]:
        _, _, target = read(pair, dataset.to_target)
        drawn = np.array(Image.open(source / f"{pair.name}_annotation.png"))
        np.testing.assert_array_equal(np.array(palette)[target], drawn)
        assert set(np.unique(target)) == {0, 1, 2}
