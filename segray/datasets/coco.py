"""COCO: stuff and things from its panoptic targets, or things from its instances.

T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014. A. Kirillov et al., "Panoptic Segmentation",
CVPR 2019.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt

from segray.classes import Classes
from segray.datasets.dataset import DataSet, Pair, packed_colours, to_class_ids, unreadable_is_a_reject
from segray.datasets.tree import Tree, safe_name
from segray.errors import Reject, SourceError

__all__ = ["FromInstances", "FromSegments", "coco", "coco_instances"]

_PANOPTIC_LAYOUT = (
    "COCO's panoptic layout is annotations/panoptic_{train,val}2017.json, panoptic_{train,val}2017/*.png and "
    "{train,val}2017/*.jpg, or else one NAME.json, NAME/*.png and a folder of images"
)
_INSTANCES_LAYOUT = "COCO's layout is annotations/instances_{train,val}2017.json with {train,val}2017/*.jpg"

_Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Where a split lies."""

    split: str
    """Its name."""
    file: str
    """The path of its JSON."""
    images: str
    """The folder of its images."""
    targets: str = ""
    """The folder of its PNGs."""


def coco(tree: Tree) -> DataSet:
    """COCO panoptic, as classes alone: all categories, stuff and things, by their ids; the splits train and val.

    What lies in no segment is void; a crowd is of its class like any other segment. In a folder that holds one
    NAME.json, with PNGs in the folder NAME and images in another, all is train.

    Raises:
        SourceError: there is no such layout.
    """
    parts, lacking = _official(tree, "panoptic", with_pngs=True)
    if not parts and not (parts := _lone(tree)):
        raise tree.absent(" and no ".join(lacking), _PANOPTIC_LAYOUT)

    def pair(part: _Part, image: _Fields, annotations: Sequence[_Fields]) -> Pair:
        segments = {segment["id"]: segment["category_id"] for a in annotations for segment in a["segments_info"]}
        return Pair(
            name=_name(image),
            split=part.split,
            image=tree.uri(f"{part.images}/{image['file_name']}"),
            target=tree.uri(f"{part.targets}/{annotations[0]['file_name']}") if annotations else None,
            annotations=_dumps(segments),
        )

    pairs, category_ids, names = _read(tree, parts, pair)
    void_and_others = _classes(["", *names])  # the first colour is black, which void looks like
    classes = dataclasses.replace(void_and_others, names=tuple(names), palette=void_and_others.palette[1:])
    class_ids = {category_id: class_id for class_id, category_id in enumerate(category_ids)}
    return DataSet(classes=classes, pairs=pairs, to_target=FromSegments(class_ids, classes.ignore_index))


def coco_instances(tree: Tree) -> DataSet:
    """COCO's instances, as classes alone: background, and the things by their category ids; the splits train and val.

    Where instances overlap, that of fewer pixels is in front, and of equally many the later one. What lies in a crowd
    and in no instance is void. An image without instances is all background.

    Raises:
        SourceError: there is no such layout.
    """
    import pycocotools.mask  # noqa: F401  # what is not installed shall be missed now, and not in each task

    parts, lacking = _official(tree, "instances", with_pngs=False)
    if not parts:
        raise tree.absent(" and no ".join(lacking), _INSTANCES_LAYOUT)

    def pair(part: _Part, image: _Fields, annotations: Sequence[_Fields]) -> Pair:
        kept = [{key: a[key] for key in ("category_id", "iscrowd", "segmentation")} for a in annotations]
        return Pair(
            name=_name(image),
            split=part.split,
            image=tree.uri(f"{part.images}/{image['file_name']}"),
            target=None,
            annotations=_dumps({"height": image["height"], "width": image["width"], "instances": kept}),
        )

    pairs, category_ids, names = _read(tree, parts, pair)
    classes = _classes(["background", *names])
    class_ids = {category_id: class_id for class_id, category_id in enumerate(category_ids, start=1)}
    return DataSet(classes=classes, pairs=pairs, to_target=FromInstances(class_ids, classes.ignore_index))


@dataclass(frozen=True, slots=True)
class FromSegments:
    """To the target, from a PNG whose colours are ids of segments: red + 256 green + 65536 blue."""

    class_ids: Mapping[int, int]
    """The class of each category."""

    ignore_index: int
    """Where there is no segment."""

    def __call__(self, pair: Pair, data: bytes | None, size: tuple[int, int]) -> UInt[np.ndarray, "height width"]:
        """As `ToTarget` has it; the annotations hold the category of each segment."""
        if pair.target is None or data is None:
            raise Reject("decode", "missing", f"{pair.image}: its JSON has no annotation of this image")
        class_of = {
            int(segment): _class_of(category_id, self.class_ids, pair.target)
            for segment, category_id in json.loads(pair.annotations).items()
        }
        with unreadable_is_a_reject(pair.target):
            segments = packed_colours(data)
        return to_class_ids(segments, class_of | {0: self.ignore_index}, pair.target, what="segment")


@dataclass(frozen=True, slots=True)
class FromInstances:
    """To the target, from instances as polygons or run lengths."""

    class_ids: Mapping[int, int]
    """The class of each category; 0 is the background's."""

    ignore_index: int
    """Where there is a crowd and no instance."""

    def __call__(self, pair: Pair, data: bytes | None, size: tuple[int, int]) -> UInt[np.ndarray, "height width"]:
        """As `ToTarget` has it; the annotations hold everything, and the height and width that they are of."""
        from pycocotools import mask

        fields = json.loads(pair.annotations)
        height, width = fields["height"], fields["width"]
        target = np.zeros((height, width), np.min_scalar_type(self.ignore_index))
        with unreadable_is_a_reject(pair.image):
            found = [
                (instance, run_lengths)
                for instance in fields["instances"]
                if (run_lengths := _run_lengths(instance["segmentation"], height, width))
            ]
            found.sort(key=lambda each: (not each[0]["iscrowd"], -int(mask.area(each[1]))))
            members = [mask.decode(run_lengths).astype(bool) for _, run_lengths in found]
        for (instance, _), member in zip(found, members, strict=True):
            class_id = _class_of(instance["category_id"], self.class_ids, pair.image)
            target[member] = self.ignore_index if instance["iscrowd"] else class_id
        return target


def _run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """As pycocotools has them; None where there is no area."""
    from pycocotools import mask

    if isinstance(segmentation, dict):
        packed = isinstance(segmentation["counts"], str)
        run_lengths: dict[str, Any] = segmentation if packed else mask.frPyObjects(segmentation, height, width)
        return run_lengths
    # pycocotools would take what has four numbers for a box.
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not polygons:
        return None
    merged: dict[str, Any] = mask.merge(mask.frPyObjects(polygons, height, width))
    return merged


def _class_of(category_id: int, class_ids: Mapping[int, int], uri: str) -> int:
    if category_id not in class_ids:
        raise Reject(
            "decode", "unknown category", f"{uri}: an annotation is of category {category_id}, which has no name"
        )
    return class_ids[category_id]


def _official(tree: Tree, what: str, *, with_pngs: bool) -> tuple[list[_Part], list[str]]:
    """The splits that are whole, and what is not there."""
    parts: list[_Part] = []
    lacking: list[str] = []
    for split in ("train", "val"):
        name = f"{what}_{split}2017"
        choices = {
            "file": (f"annotations/{name}.json", f"{name}.json"),
            "images": (f"{split}2017", f"images/{split}2017"),
        }
        if with_pngs:
            choices["targets"] = (name, f"annotations/{name}")
        found = {key: path for key, paths in choices.items() if (path := tree.first(*paths))}
        if len(found) == len(choices):
            parts.append(_Part(split=split, **found))
        lacking += [paths[0] for key, paths in choices.items() if key not in found]
    return parts, lacking


def _lone(tree: Tree) -> list[_Part]:
    """The JSON with a folder of its name beside it, as panopticapi has it; none if it is not the only one."""
    entries = tree.entries()
    files = [name for name in entries if name.endswith(".json") and name.removesuffix(".json") in entries]
    if len(files) != 1:
        return []
    [file] = files
    targets = file.removesuffix(".json")
    wanted = {image["file_name"] for image in _load(tree, file)["images"]}
    folders = (name for name in entries if "." not in name and name != targets)
    images = next((folder for folder in folders if wanted & set(tree.files(folder))), None)
    return [_Part(split="train", file=file, images=images, targets=targets)] if images else []


def _read(
    tree: Tree, parts: Sequence[_Part], pair: Callable[[_Part, _Fields, Sequence[_Fields]], Pair]
) -> tuple[list[Pair], list[int], list[str]]:
    """The pairs, and the ids and names of the categories, sorted by id."""
    pairs: list[Pair] = []
    categories: dict[int, str] = {}
    for part in parts:
        content = _load(tree, part.file)
        try:
            here = {category["id"]: category["name"] for category in content["categories"]}
            if categories and here != categories:
                raise SourceError(f"{tree.uri(part.file)}: its categories are others than those of {parts[0].file}")
            categories = here
            annotations_of = defaultdict(list)
            for annotation in content["annotations"]:
                annotations_of[annotation["image_id"]].append(annotation)
            pairs += [pair(part, image, annotations_of[image["id"]]) for image in content["images"]]
        except (KeyError, TypeError) as error:
            raise SourceError(f"{tree.uri(part.file)}: not annotations as COCO has them: {error!r}") from error
    category_ids = sorted(categories)
    return pairs, category_ids, [categories[category_id] for category_id in category_ids]


def _load(tree: Tree, file: str) -> Any:
    try:
        return json.loads(tree.read(file) or b"")
    except ValueError as error:
        raise SourceError(f"{tree.uri(file)}: not valid JSON: {error}") from error


def _classes(names: Sequence[str]) -> Classes:
    return Classes(tuple(names), ignore_index=255 if len(names) <= 255 else 0xFFFF)


def _name(image: _Fields) -> str:
    return safe_name(image["file_name"].rpartition(".")[0])


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
