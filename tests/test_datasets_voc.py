import io
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torchvision

from segray.datasets import open_dataset
from segray.datasets.voc import CLASSES
from segray.errors import SourceError
from tests.test_datasets import encoded, photo, places, plant, reject, targets

TRAIN, VAL = ["2007_000032", "2007_000039"], ["2007_000033"]


def label_map(name: str, shift: int = 0) -> list[list[int]]:
    """Of 2×3 pixels, another one for each name."""
    return [[0, int(name[-2:]) % 21 + shift, 20], [255, 1, 2]]


def voc_tree(root: Path, train: list[str] = TRAIN, val: list[str] = VAL) -> str:
    files: dict[str, bytes | str] = {
        "ImageSets/Segmentation/train.txt": "\n".join(train) + "\n",
        "ImageSets/Segmentation/val.txt": "\r\n".join(val) + "\r\n\r\n",
        "ImageSets/Segmentation/trainval.txt": "\n".join(train + val),
    }
    for name in train + val:
        files[f"JPEGImages/{name}.jpg"] = photo(2, 3, ".jpg")
        files[f"SegmentationClass/{name}.png"] = encoded(label_map(name), [*CLASSES.palette] + [(224, 224, 192)] * 235)
    return plant(root, files)


def sbd_mat(segmentation: list[list[int]]) -> bytes:
    """As SBD has it: a struct whose other fields are none of ours."""
    buffer = io.BytesIO()
    boundaries = np.empty((20, 1), object)
    for row in range(20):
        boundaries[row, 0] = scipy.sparse.csc_matrix((2, 3))
    fields = {"Segmentation": np.array(segmentation, np.uint8), "Boundaries": boundaries, "CategoriesPresent": [[1]]}
    scipy.io.savemat(buffer, {"GTcls": fields}, do_compression=True)
    return buffer.getvalue()


@pytest.mark.parametrize("folder", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_is_read_to_the_pixel_from_any_folder_around_it(tmp_path: Path, folder: str) -> None:
    voc_tree(tmp_path / folder)
    dataset = open_dataset("voc", str(tmp_path))
    assert places(dataset) == [("train", name) for name in TRAIN] + [("val", name) for name in VAL]
    found = targets(dataset)
    for (_, name), target in found.items():
        assert target.dtype == np.uint8
        assert target.tolist() == label_map(name)
    assert len({target.tobytes() for target in found.values()}) == 3


def test_voc_classes_have_their_published_names_and_colours() -> None:
    weights = torchvision.models.segmentation.FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1
    assert list(CLASSES.names[1:]) == weights.meta["categories"][1:]
    assert CLASSES.names[0] == "background"
    assert CLASSES.palette[15] == (192, 128, 128)  # person
    assert CLASSES.palette[20] == (0, 64, 128)  # tvmonitor
    assert CLASSES.ignore_index == 255


def test_voc_without_one_of_its_lists_is_the_other_split(tmp_path: Path) -> None:
    root = Path(voc_tree(tmp_path))
    (root / "ImageSets/Segmentation/train.txt").unlink()
    assert places(open_dataset("voc", str(root))) == [("val", name) for name in VAL]
    (root / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(SourceError, match=r"there is no name in ImageSets/Segmentation/train\.txt or val\.txt"):
        open_dataset("voc", str(root))


@pytest.mark.parametrize(("folder", "file"), [("JPEGImages", "{}.jpg"), ("SegmentationClass", "{}.png")])
def test_what_a_voc_list_names_and_is_not_there_is_named(tmp_path: Path, folder: str, file: str) -> None:
    root = Path(voc_tree(tmp_path))
    missing = root / folder / file.format(VAL[0])
    missing.unlink()
    caught = reject(open_dataset("voc", str(root)), VAL[0])
    assert caught.kind == "missing"
    assert f"{missing}: there is no such file" in caught.detail


def test_voc_without_targets_is_refused(tmp_path: Path) -> None:
    root = Path(voc_tree(tmp_path))
    (root / "SegmentationClass").rename(root / "SegmentationObject")
    with pytest.raises(SourceError, match="there is no SegmentationClass; VOC2012 "):
        open_dataset("voc", str(root))


def test_a_voc_target_of_another_size_or_with_an_unknown_id_is_named(tmp_path: Path) -> None:
    root = Path(voc_tree(tmp_path))
    plant(root / "SegmentationClass", {f"{TRAIN[0]}.png": encoded([[0]]), f"{TRAIN[1]}.png": encoded([[0, 1, 21]] * 2)})
    dataset = open_dataset("voc", str(root))
    caught = reject(dataset, TRAIN[0])
    assert (caught.kind, f"SegmentationClass/{TRAIN[0]}.png" in caught.detail) == ("size mismatch", True)
    caught = reject(dataset, TRAIN[1])
    assert caught.kind == "unknown id"
    assert f"SegmentationClass/{TRAIN[1]}.png: the id 21 in row 0, column 2" in caught.detail


# In SBD's own lists: an image that VOC's train has too, one that VOC's val has, and two of its own.
SBD = {"train": [TRAIN[0], VAL[0], "2008_000002"], "val": ["2008_000007"]}


def sbd_tree(root: Path, dataset: str) -> str:
    """VOC with SBD's `dataset` folder, or with SegmentationClassAug."""
    voc_tree(root / "VOCdevkit/VOC2012")
    files: dict[str, bytes | str] = {}
    for names in SBD.values():
        for name in names:
            files[f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg"] = photo(2, 3, ".jpg")
            segmentation = [[row % 21 for row in line] for line in label_map(name, shift=3)]
            if dataset == "SegmentationClassAug":
                files[f"VOCdevkit/VOC2012/{dataset}/{name}.png"] = encoded(segmentation)
            else:
                files[f"{dataset}/cls/{name}.mat"] = sbd_mat(segmentation)
    if dataset != "SegmentationClassAug":
        files |= {f"{dataset}/{split}.txt": "\n".join(names) for split, names in SBD.items()}
    return plant(root, files)


@pytest.mark.parametrize("dataset", ["dataset", "benchmark_RELEASE/dataset", "sbd", "SegmentationClassAug"])
def test_sbd_adds_to_train_what_is_not_in_val_and_vocs_targets_go_first(tmp_path: Path, dataset: str) -> None:
    opened = open_dataset("sbd", sbd_tree(tmp_path, dataset))
    added = ["2008_000002", "2008_000007"]
    assert places(opened) == [("train", name) for name in TRAIN + added] + [("val", name) for name in VAL]
    for (_, name), target in targets(opened).items():
        own = [[row % 21 for row in line] for line in label_map(name, shift=3)]
        assert target.dtype == np.uint8
        assert target.tolist() == (own if name in added else label_map(name))
    assert opened.classes == CLASSES


def test_segmentation_class_aug_may_lie_beside_the_devkit(tmp_path: Path) -> None:
    root = Path(sbd_tree(tmp_path, "SegmentationClassAug"))
    (root / "VOCdevkit/VOC2012/SegmentationClassAug").rename(root / "SegmentationClassAug")
    assert len(targets(open_dataset("sbd", str(root)))) == 5


def test_faults_of_sbd_are_named(tmp_path: Path) -> None:
    root = Path(sbd_tree(tmp_path, "dataset"))
    plant(root / "dataset/cls", {"2008_000002.mat": b"no MATLAB file", "2008_000007.mat": sbd_mat([[0, 21, 0]] * 2)})
    dataset = open_dataset("sbd", str(root))
    caught = reject(dataset, "2008_000002")
    assert (caught.kind, "dataset/cls/2008_000002.mat" in caught.detail) == ("unreadable target", True)
    caught = reject(dataset, "2008_000007")
    assert caught.kind == "unknown id"
    assert "dataset/cls/2008_000007.mat: the id 21 in row 0, column 1" in caught.detail
    (root / "dataset/cls/2008_000007.mat").unlink()
    assert reject(dataset, "2008_000007").kind == "missing"


def test_sbd_needs_both_lists_of_voc_and_targets_of_its_own(tmp_path: Path) -> None:
    root = Path(sbd_tree(tmp_path, "dataset"))
    (root / "dataset").rename(root / "elsewhere")
    with pytest.raises(SourceError, match="there is no dataset/cls and no SegmentationClassAug; beside VOC2012"):
        open_dataset("sbd", str(root))
    (root / "elsewhere").rename(root / "dataset")
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(SourceError, match=r"there is no name in both .*train\.txt and val\.txt"):
        open_dataset("sbd", str(root))
