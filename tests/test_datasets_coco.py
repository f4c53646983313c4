import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask
from pycocotools.coco import COCO

from segray.datasets import DataSet, open_dataset, read
from segray.errors import SourceError
from tests.conftest import real
from tests.test_datasets import encoded, photo, places, plant, reject, targets

# pycocotools' decode does not know numpy 2's `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 200, "name": "rug-merged"}]


@pytest.fixture(scope="module")
def sample() -> Path:
    """Two COCO images with panoptic targets, and the same segments as instances."""
    return real("coco-panoptic")


def panoptic_png(ids: object) -> bytes:
    array = np.array(ids)
    return encoded(np.stack([array % 256, array // 256 % 256, array // 65536], axis=2))


def panoptic_json(name: str, segments: dict[int, int], **more: Any) -> str:
    """Of one image, with the category of each segment."""
    info = [{"id": i, "category_id": category, "iscrowd": int(i == 65536 * 7)} for i, category in segments.items()]
    annotation = {"image_id": 5, "file_name": f"{name}.png", "segments_info": info}
    images = [{"id": 5, "file_name": f"{name}.jpg", "height": 2, "width": 3}]
    return json.dumps({"images": images, "annotations": [annotation], "categories": CATEGORIES} | more)


def panoptic_tree(root: Path, split: str = "val", pngs: str = "panoptic_val2017") -> str:
    files: dict[str, bytes | str] = {
        f"annotations/panoptic_{split}2017.json": panoptic_json("1", {3: 90, 256 * 300: 1, 65536 * 7: 200, 9: 1}),
        f"{pngs}/1.png": panoptic_png([[3, 256 * 300, 0], [65536 * 7, 9, 3]]),
        f"{split}2017/1.jpg": photo(2, 3, ".jpg"),
    }
    return plant(root, files)


@pytest.mark.parametrize("pngs", ["panoptic_val2017", "annotations/panoptic_val2017"])
def test_panoptic_segments_become_their_classes_crowds_too_and_the_rest_void(tmp_path: Path, pngs: str) -> None:
    dataset = open_dataset("coco", panoptic_tree(tmp_path, pngs=pngs))
    assert dataset.classes.names == ("person", "toothbrush", "rug-merged")
    assert (0, 0, 0) not in dataset.classes.palette
    [(place, target)] = targets(dataset).items()
    assert place == ("val", "1")
    assert target.dtype == np.uint8
    assert target.tolist() == [[1, 0, 255], [2, 0, 1]]


def test_panoptic_splits_are_those_that_are_whole(tmp_path: Path) -> None:
    panoptic_tree(tmp_path, "train", "panoptic_train2017")
    panoptic_tree(tmp_path)
    assert places(open_dataset("coco", str(tmp_path))) == [("train", "1"), ("val", "1")]
    (tmp_path / "train2017/1.jpg").unlink()
    (tmp_path / "train2017").rmdir()
    assert places(open_dataset("coco", str(tmp_path))) == [("val", "1")]
    (tmp_path / "val2017").rename(tmp_path / "images")
    with pytest.raises(SourceError, match="there is no train2017 and no val2017; COCO's panoptic layout"):
        open_dataset("coco", str(tmp_path))


def test_faults_of_a_panoptic_target_are_named(tmp_path: Path) -> None:
    png, jpg = tmp_path / "panoptic_val2017/1.png", tmp_path / "val2017/1.jpg"

    def caught(**files: bytes | str) -> tuple[str, str]:
        panoptic_tree(tmp_path)
        plant(
            tmp_path,
            {
                {"png": "panoptic_val2017/1.png", "json": "annotations/panoptic_val2017.json"}[k]: v
                for k, v in files.items()
            },
        )
        found = reject(open_dataset("coco", str(tmp_path)), "1")
        return found.kind, found.detail

    kind, detail = caught(png=panoptic_png([[3, 3, 4], [4, 3, 3]]))
    assert (kind, f"{png}: the segment 4 in row 0, column 2 stands for no class" in detail) == ("unknown segment", True)
    kind, detail = caught(png=panoptic_png([[3, 3]]))
    assert (kind, f"{png}: the target has 1×2 pixels" in detail) == ("size mismatch", True)
    kind, detail = caught(json=panoptic_json("1", {3: 91}))
    assert (kind, f"{png}: an annotation is of category 91" in detail) == ("unknown category", True)
    kind, detail = caught(json=panoptic_json("1", {}, annotations=[]))
    assert (kind, f"{jpg}: its JSON has no annotation" in detail) == ("missing", True)
    kind, detail = caught(json=panoptic_json("2", {}, images=[{"id": 5, "file_name": "1.jpg"}]))
    assert (kind, f"{tmp_path}/panoptic_val2017/2.png: there is no such file" in detail) == ("missing", True)
    kind, detail = caught(png=b"\x89PNG")
    assert (kind, f"{png}: " in detail) == ("unreadable target", True)


def test_json_that_is_not_cocos_is_refused(tmp_path: Path) -> None:
    panoptic_tree(tmp_path)
    file = tmp_path / "annotations/panoptic_val2017.json"
    file.write_text("{")
    with pytest.raises(SourceError, match=r"panoptic_val2017\.json: not valid JSON"):
        open_dataset("coco", str(tmp_path))
    file.write_text('{"images": []}')
    with pytest.raises(SourceError, match=r"panoptic_val2017\.json: not annotations as COCO has them: KeyError"):
        open_dataset("coco", str(tmp_path))
    panoptic_tree(tmp_path)
    panoptic_tree(tmp_path, "train", "panoptic_train2017")
    file.write_text(panoptic_json("1", {}, categories=CATEGORIES[:2]))
    with pytest.raises(SourceError, match=r"panoptic_val2017\.json: its categories are others"):
        open_dataset("coco", str(tmp_path))


def test_the_panoptic_sample_has_133_classes_and_every_segment_its_own(sample: Path) -> None:
    dataset = open_dataset("coco", str(sample))
    assert places(dataset) == [("train", "000000142238"), ("train", "000000439180")]
    assert len(dataset.classes) == 133
    assert dataset.classes.names[0] == "person"
    assert dataset.classes.names[79:82] == ("toothbrush", "banner", "blanket")
    assert dataset.classes.names[-1] == "rug-merged"
    content = json.loads((sample / "panoptic_examples.json").read_text())
    name_of = {category["id"]: category["name"] for category in content["categories"]}
    for annotation, pair in zip(content["annotations"], dataset.pairs, strict=True):
        _, image, target = read(pair, dataset.to_target)
        assert image.shape[:2] == target.shape
        rgb = np.array(Image.open(sample / "panoptic_examples" / annotation["file_name"])).astype(int)
        ids = rgb @ [1, 256, 65536]
        np.testing.assert_array_equal(target == 255, ids == 0)
        for segment in annotation["segments_info"]:
            class_id = dataset.classes.names.index(name_of[segment["category_id"]])
            assert (target[ids == segment["id"]] == class_id).all()
            assert np.count_nonzero(ids == segment["id"]) == segment["area"]


def box(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    """The polygon of the pixels from (left, top) up to and without (right, bottom)."""
    return [[float(c) for c in (left, top, right, top, right, bottom, left, bottom)]]


def instances_tree(root: Path, annotations: list[dict[str, Any]], height: int = 8, width: int = 10, **more: Any) -> str:
    common = {"image_id": 7, "iscrowd": 0}
    content = {
        "images": [
            {"id": 7, "file_name": "000000000007.jpg", "height": height, "width": width},
            {"id": 8, "file_name": "000000000008.jpg", "height": 2, "width": 3},
        ],
        "annotations": [common | {"id": i + 1} | annotation for i, annotation in enumerate(annotations)],
        "categories": CATEGORIES[:2],
    }
    return plant(
        root,
        {
            "annotations/instances_val2017.json": json.dumps(content | more),
            "val2017/000000000007.jpg": photo(8, 10, ".jpg"),
            "val2017/000000000008.jpg": photo(2, 3, ".jpg"),
        },
    )


def instances_target(dataset: DataSet) -> np.ndarray:
    found = targets(dataset)
    assert list(found) == [("val", "000000000007"), ("val", "000000000008")]
    assert not found["val", "000000000008"].any()
    return found["val", "000000000007"]


def uncompressed(member: np.ndarray) -> dict[str, Any]:
    """Run lengths by columns, from a run of zeros on."""
    counts, value = [0], False
    for pixel in member.ravel(order="F"):
        if pixel != value:
            counts.append(0)
            value = bool(pixel)
        counts[-1] += 1
    return {"counts": counts, "size": list(member.shape)}


def test_instances_are_drawn_the_smaller_in_front_and_crowds_behind_all(tmp_path: Path) -> None:
    crowd = np.zeros((8, 10), bool)
    crowd[5:, :] = True
    packed = mask.encode(np.asfortranarray(np.pad([[1]], ((6, 1), (8, 1))).astype(np.uint8)))
    annotations: list[dict[str, Any]] = [
        {"category_id": 90, "segmentation": box(2, 2, 4, 4)},  # 2×2 pixels in front of what comes later
        {"category_id": 1, "segmentation": [*box(1, 1, 6, 6), [1.0, 1.0, 2.0, 2.0]]},
        {"category_id": 1, "iscrowd": 1, "segmentation": uncompressed(crowd)},
        {"category_id": 90, "segmentation": {"counts": packed["counts"].decode(), "size": packed["size"]}},
        {"category_id": 90, "segmentation": [[3.0, 3.0, 5.0, 5.0]]},  # no polygon, and for pycocotools a box
        {"category_id": 1, "segmentation": box(7, 0, 9, 2)},
        {"category_id": 90, "segmentation": box(8, 0, 10, 2)},  # as large: the later one is in front
    ]
    dataset = open_dataset("coco-instances", instances_tree(tmp_path, annotations))
    assert dataset.classes.names == ("background", "person", "toothbrush")
    expected = np.zeros((8, 10), np.uint8)
    expected[5:, :] = 255
    expected[1:6, 1:6] = 1
    expected[2:4, 2:4] = 2
    expected[6, 8] = 2
    expected[0:2, 7:8] = 1
    expected[0:2, 8:10] = 2
    target = instances_target(dataset)
    assert target.dtype == np.uint8
    np.testing.assert_array_equal(target, expected)


def test_instances_agree_with_pycocotools_own_reader(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    annotations = [
        {"category_id": int(rng.choice([1, 90])), "segmentation": [rng.uniform(0, 8, 8).tolist() for _ in range(2)]}
        for _ in range(6)
    ]
    target = instances_target(open_dataset("coco-instances", instances_tree(tmp_path, annotations)))
    api = COCO(str(tmp_path / "annotations/instances_val2017.json"))
    expected = np.zeros((8, 10), np.uint8)
    members = [
        (api.annToMask(annotation), annotation["category_id"]) for annotation in api.loadAnns([1, 2, 3, 4, 5, 6])
    ]
    for member, category_id in sorted(members, key=lambda each: -int(each[0].sum())):
        expected[member == 1] = {1: 1, 90: 2}[category_id]
    np.testing.assert_array_equal(target, expected)


def test_the_samples_instances_draw_its_panoptic_targets(sample: Path, tmp_path: Path) -> None:
    plant(
        tmp_path, {"annotations/instances_val2017.json": (sample / "panoptic_coco_detection_format.json").read_bytes()}
    )
    (tmp_path / "val2017").symlink_to(sample / "input_images")
    panoptic, instances = open_dataset("coco", str(sample)), open_dataset("coco-instances", str(tmp_path))
    assert instances.classes.names == ("background", *panoptic.classes.names)
    content = json.loads((sample / "panoptic_examples.json").read_text())
    num_crowds = 0
    for annotation, one, other in zip(content["annotations"], panoptic.pairs, instances.pairs, strict=True):
        segments, drawn = read(one, panoptic.to_target)[2], read(other, instances.to_target)[2]
        ids = np.array(Image.open(sample / "panoptic_examples" / annotation["file_name"])).astype(int) @ [1, 256, 65536]
        crowds = [segment["id"] for segment in annotation["segments_info"] if segment["iscrowd"]]
        expected = np.where(segments == 255, 0, segments + 1)
        expected[np.isin(ids, crowds)] = 255
        np.testing.assert_array_equal(drawn, expected)
        num_crowds += len(crowds)
    assert num_crowds > 0


def test_faults_of_instances_name_the_image(tmp_path: Path) -> None:
    jpg = tmp_path / "val2017/000000000007.jpg"

    def caught(*annotations: dict[str, Any], **more: Any) -> tuple[str, str]:
        found = reject(
            open_dataset("coco-instances", instances_tree(tmp_path, list(annotations), **more)), "000000000007"
        )
        return found.kind, found.detail

    kind, detail = caught({"category_id": 91, "segmentation": box(0, 0, 2, 2)})
    assert (kind, f"{jpg}: an annotation is of category 91" in detail) == ("unknown category", True)
    kind, detail = caught({"category_id": 1, "segmentation": [["x"] * 6]})
    assert (kind, f"{jpg}: " in detail) == ("unreadable target", True)
    kind, detail = caught(height=10, width=8)
    assert (kind, f"the target has 10×8 pixels (height×width), its image file://{jpg} 8×10" in detail) == (
        "size mismatch",
        True,
    )
    dataset = open_dataset("coco-instances", instances_tree(tmp_path, []))
    jpg.unlink()
    assert reject(dataset, "000000000007").kind == "missing"


def test_instances_without_their_images_are_refused(tmp_path: Path) -> None:
    root = Path(instances_tree(tmp_path, []))
    (root / "val2017").rename(root / "elsewhere")
    with pytest.raises(SourceError, match=r"no annotations/instances_train2017\.json and no train2017 and no val2017;"):
        open_dataset("coco-instances", str(root))
