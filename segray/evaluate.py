"""Label maps against targets: one confusion matrix over the whole set."""

import functools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
from jaxtyping import UInt
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tyro.conf import Positional

from segray.classes import Classes
from segray.errors import Reject, RunError, SettingsError, SinkError, SourceError, extra
from segray.labelmap import decode_png
from segray.source import filesystem, look_up
from segray.statistics import ConfusionMatrix
from segray.store import LabelStore, image_name
from segray.tile import Window

if TYPE_CHECKING:
    from segray.scene import Scene

__all__ = ["Evaluate", "Evaluation", "Unmatched", "evaluate"]

# Targets of scenes are read with GDAL, of the extra `geo`; it is imported when there are any.

_NUM_THREADS = 8
_NUM_NAMED = 5
_MAX_CLASSES_SHOWN = 12
_PNG = (".png",)
_GEOTIFF = (".tif", ".tiff")
_PLACE = ("scene", "col_off", "row_off", "width", "height", "crs", *(f"transform_{letter}" for letter in "abcdef"))


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compares the label maps of a sink with targets: IoU of each class, mIoU, pixel accuracy."""

    sink: Positional[str]
    """The label store: a folder or prefix that `label` wrote."""

    targets: Positional[str]
    """A folder or prefix (recursive) of label PNGs, grey or palette; `a/7.png` is the target of the image `7.jpg`. Of
    scenes: of GeoTIFFs of class ids; `a/7.tif` is the target of `7.jp2`, and has its CRS, transform and size."""

    recipe: str | None = None
    """The recipe whose label maps are compared. Default: that of the newest run."""

    ignore_index: int | None = None
    """The id of void pixels in the targets (CamVid: 11). Default: the recipe's own, mostly 255. Nodata is void too."""

    json: str | None = None
    """Also write the result as JSON to this file or URI; `-`: to standard output, and the table to standard error."""

    def __post_init__(self) -> None:
        if self.ignore_index is not None and not 0 <= self.ignore_index <= 0xFFFF:
            raise SettingsError(
                f"--ignore-index {self.ignore_index}: ids in a PNG lie between 0 and 65535; "
                "leave the option out if the targets have no void pixels"
            )


@dataclass(frozen=True, slots=True)
class Unmatched:
    """Files on one side that have no counterpart of the same name on the other."""

    count: int = 0
    """How many."""

    first: tuple[str, ...] = ()
    """A few of them: the first in alphabetical order."""

    def plus(self, uri: str) -> "Unmatched":
        """These and one more."""
        return Unmatched(self.count + 1, tuple(sorted((*self.first, uri))[:_NUM_NAMED]))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a comparison found."""

    sink: str
    """The label store."""

    targets: str
    """Where the targets lie."""

    recipe: str
    """The recipe whose label maps were compared."""

    run_id: str | None
    """The newest run of that recipe; None where no run is recorded."""

    model: dict[str, Any]
    """The recipe's model: name, digest, architecture and its arguments."""

    classes: Classes
    """The model's classes, with the `ignore_index` that was used."""

    num_images: int
    """Pairs of a label map and its target; of scenes, windows."""

    confusion_matrix: ConfusionMatrix
    """Of all pairs."""

    images_without_target: Unmatched = field(default_factory=Unmatched)
    """Images in the sink that were not compared."""

    targets_without_image: Unmatched = field(default_factory=Unmatched)
    """Targets that were not used."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: what is not defined (the IoU of an absent class) is null."""
        counts, iou = self.confusion_matrix.counts, self.confusion_matrix.iou()
        return {
            "sink": self.sink,
            "targets": self.targets,
            "recipe": self.recipe,
            "run_id": self.run_id,
            "model": self.model,
            "ignore_index": self.classes.ignore_index,
            "num_images": self.num_images,
            "num_pixels": int(counts.sum()),
            "miou": _or_none(self.confusion_matrix.miou()),
            "pixel_accuracy": _or_none(self.confusion_matrix.pixel_accuracy()),
            "classes": [
                {
                    "class_id": class_id,
                    "class_name": name,
                    "iou": _or_none(float(iou[class_id])),
                    "num_target_pixels": int(counts[class_id].sum()),
                    "num_prediction_pixels": int(counts[:, class_id].sum()),
                }
                for class_id, name in enumerate(self.classes.names)
            ],
            "confusion_matrix": counts.tolist(),
            "images_without_target": _unmatched_dict(self.images_without_target),
            "targets_without_image": _unmatched_dict(self.targets_without_image),
        }


def evaluate(job: Evaluate) -> Evaluation:
    """Compares every label map of a recipe with the target of its name, and prints the result.

    Only a batch of label maps is in memory at a time, and the result does not depend on their order.
    An image that was labelled again after it had changed counts once, as last labelled; so does a scene, of whose
    target each window is compared with its part. Where a scene holds no data nothing is compared.

    Raises:
        SinkError: there is no such store or recipe, or it holds no label map, or a name twice.
        SourceError: the targets cannot be listed, match no image, or a name occurs twice.
        SettingsError: they are of scenes, and the extra `geo` is not installed.
        RunError: a target cannot be read, or its grid, size or ids are not those of the label map.
    """
    store = LabelStore.open(job.sink)
    recipe_id, run = store.choose(job.recipe)
    recipe = store.recipe(recipe_id)
    classes = Classes.from_dict(recipe["classes"])
    nodata = classes.ignore_index
    if job.ignore_index is not None:
        classes = replace(classes, ignore_index=job.ignore_index)

    window_size = recipe["scenes"]["size"] if "scenes" in recipe else None
    if window_size is not None:
        with extra("geo", "a target of a scene"):  # what is not installed shall be missed now
            import segray.scene  # noqa: F401
    fs, targets = _list_targets(job.targets, _PNG if window_size is None else _GEOTIFF)
    target_of, images_without_target, used = _match(store, recipe_id, targets)
    targets_without_image = Unmatched()
    for name in targets.keys() - used:
        for path in targets[name]:
            targets_without_image = targets_without_image.plus(path)
    if not target_of:
        raise SourceError(
            f"{job.targets}: none of {targets_without_image.count} targets has the name of one of the "
            f"{images_without_target.count} images in {job.sink} (recipe {recipe_id}); targets are called "
            f"{_examples(targets_without_image)}, images {_examples(images_without_target)}"
        )

    described = functools.cache(_describe)

    def compare(pair: tuple[str, dict[str, Any]]) -> ConfusionMatrix:
        path, row = pair
        prediction = decode_png(row["label_map"])
        if window_size is None:
            return _compare(_read_png(fs.cat_file(path), path), path, prediction, row["uri"], classes)
        target = _read_window(described(fs.unstrip_protocol(path)), row, window_size, classes.ignore_index)
        target[prediction == nodata] = classes.ignore_index
        return _compare(target, path, prediction, row["uri"], classes)

    total = ConfusionMatrix.zeros(len(classes))
    num_images = len(target_of)
    console = Console(markup=False, emoji=False, highlight=False, stderr=job.json == "-")
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        matrices = (
            matrix for pairs in _batches_of_pairs(store, recipe_id, target_of) for matrix in pool.map(compare, pairs)
        )
        for matrix in track(
            matrices,
            "Comparing",
            total=num_images,
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        ):
            total += matrix

    evaluation = Evaluation(
        sink=job.sink,
        targets=job.targets,
        recipe=recipe_id,
        run_id=run["run_id"] if run else None,
        model=recipe["model"],
        classes=classes,
        num_images=num_images,
        confusion_matrix=total,
        images_without_target=images_without_target,
        targets_without_image=targets_without_image,
    )
    _print(evaluation, console, chosen=job.recipe is None, what="images" if window_size is None else "windows")
    if job.json is not None:
        _write_json(evaluation, job.json)
    return evaluation


def _list_targets(uri: str, suffixes: tuple[str, ...]) -> tuple[Any, dict[str, list[str]]]:
    """The file system and, for each name, the paths of the files that bear it and one of these endings."""
    try:
        fs, root = filesystem(uri)
        paths = fs.find(root)
    except Exception as error:  # each store's client has exceptions of its own
        raise SourceError(f"{uri}: the targets cannot be listed: {error or type(error).__name__}") from error
    targets: dict[str, list[str]] = {}
    for path in paths:
        if path.lower().endswith(suffixes):
            targets.setdefault(PurePosixPath(path).stem, []).append(path)
    if not targets:
        kind, wanted = ("PNG", "label PNGs named like the images")
        if suffixes == _GEOTIFF:
            kind, wanted = ("GeoTIFF (*.tif)", "GeoTIFFs of class ids named like the scenes")
        raise SourceError(f"{uri}: there is no {kind}; give a folder or prefix of {wanted}")
    return fs, targets


def _match(
    store: LabelStore, recipe_id: str, targets: dict[str, list[str]]
) -> tuple[dict[str, str], Unmatched, set[str]]:
    """Finds the target of each image, and of each window of a scene.

    Returns:
        The target's path for each image_id that has one, the images and scenes that have none, and the
        names that are used.

    Raises:
        SinkError: nothing is labelled, or two images of a target's name.
        SourceError: two targets of an image's name.
    """
    named: dict[str, str] = {}
    newest: dict[str, tuple[str, str]] = {}
    image_ids: dict[tuple[str, str], list[str]] = {}
    unmatched, scenes_without = Unmatched(), set()
    for batch in store.batches("label_maps", recipe_id, ["uri", "scene", "version", "run_id", "image_id"]):
        for uri, scene, version, run_id, image_id in zip(
            *(column.to_pylist() for column in batch.columns), strict=True
        ):
            whole = scene or uri
            name = image_name(whole)
            if name not in targets:
                if whole not in scenes_without:
                    unmatched = unmatched.plus(whole)
                if scene is not None:
                    scenes_without.add(scene)
                continue
            if len(targets[name]) > 1:
                raise SourceError(
                    f"{targets[name][0]} and {targets[name][1]} are both called {name!r}, like the image {whole}; "
                    "give a TARGETS that holds only one of them"
                )
            other = named.setdefault(name, whole)
            if other != whole:
                raise SinkError(
                    f"{min(whole, other)} and {max(whole, other)} are both called {name!r}, like the target "
                    f"{targets[name][0]}; label them into sinks of their own"
                )
            state = image_id if scene is None else version  # which the windows of a scene share
            newest[name] = max((run_id, state), newest.get(name, ("", "")))
            image_ids.setdefault((name, state), []).append(image_id)
    if not named and not unmatched.count:
        raise SinkError(f"{store.uri}: recipe {recipe_id} has no label maps; {store.other_recipes(recipe_id)}")
    target_of = {
        image_id: targets[name][0] for name, (_, state) in newest.items() for image_id in image_ids[name, state]
    }
    return target_of, unmatched, set(named)


def _batches_of_pairs(
    store: LabelStore, recipe_id: str, target_of: dict[str, str]
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The target's path and the row of its image, a batch at a time."""
    waiting = dict(target_of)  # two runs at the same time may both have written an image
    for batch in store.batches("label_maps", recipe_id, ["image_id", "uri", "label_map", *_PLACE]):
        yield [(waiting.pop(row["image_id"]), row) for row in batch.to_pylist() if row["image_id"] in waiting]


def _read_png(data: bytes, path: str) -> UInt[np.ndarray, "height width"]:
    try:
        return decode_png(data)
    except Exception as error:  # a damaged PNG: Pillow raises whatever it stumbles over
        raise RunError(f"{path}: the target cannot be read: {error or type(error).__name__}") from error


def _describe(uri: str) -> "Scene":
    """The target of a scene.

    Raises:
        RunError: it is gone or damaged, lies nowhere, or has several bands.
    """
    from segray.scene import describe

    try:
        version = look_up({"uri": uri, "version": None})
        if isinstance(version, Reject):
            raise version
        target = describe(uri, version)
    except Reject as error:
        raise RunError(f"{uri}: the target cannot be read: {error.reason}") from error
    if len(target.bands) > 1:
        raise RunError(f"{uri}: the target has {len(target.bands)} bands; one with the class ids is wanted")
    return target


def _read_window(
    target: "Scene", row: Mapping[str, Any], window_size: int, ignore_index: int
) -> UInt[np.ndarray, "height width"]:
    """What a scene's target holds in the place of a window; void where that is nodata.

    Raises:
        RunError: it cannot be read, holds no ids, or has another grid than the scene.
    """
    from segray.scene import read_ids

    window = Window(*(row[name] for name in ("col_off", "row_off", "width", "height")))
    if wrong := _other_grid(target, row, window, window_size):
        raise RunError(f"{target.uri}: the target is on another grid than the scene {row['scene']}: {wrong}")
    try:
        return read_ids(target, window, ignore_index)
    except Reject as error:
        raise RunError(f"{target.uri}: the target cannot be read: {error.reason}") from error


def _other_grid(target: "Scene", row: Mapping[str, Any], window: Window, window_size: int) -> str | None:
    """How a target's grid differs from that of a window's scene; None: it does not."""
    from segray.scene import Grid
    from segray.scene.place import is_one_crs, is_one_grid

    if not is_one_crs(target.crs, row["crs"]):
        return f"{target.crs} and {row['crs']}"
    own = target.window_transform(window)
    other = tuple(row[f"transform_{letter}"] for letter in "abcdef")
    if not is_one_grid(own, Grid(window.height, window.width, other)):
        return f"its transform at column {window.col_off} and row {window.row_off} is {own} and {other}"
    for what, off, length, total in (
        ("columns", window.col_off, window.width, target.width),
        ("rows", window.row_off, window.height, target.height),
    ):
        # A window that is shorter than others ends with its scene.
        if off + length > total or (length < window_size and off + length != total):
            return f"{total} {what} and {'at least ' * (length == window_size)}{off + length}"
    return None


def _compare(
    target: UInt[np.ndarray, "height width"],
    path: str,
    prediction: UInt[np.ndarray, "prediction_height prediction_width"],
    uri: str,
    classes: Classes,
) -> ConfusionMatrix:
    try:
        return ConfusionMatrix.of(target, prediction, len(classes), classes.ignore_index)
    except ValueError as error:
        way_out = (
            "targets need the size of their image"
            if target.shape != prediction.shape
            else "if such an id stands for void pixels, give it as --ignore-index"
        )
        raise RunError(f"{path}: {error} (image {uri}); {way_out}") from error


def _print(evaluation: Evaluation, console: Console, *, chosen: bool, what: str) -> None:
    result = evaluation.to_dict()
    run = f", run {evaluation.run_id}" if evaluation.run_id else ""
    console.print(
        f"{evaluation.model['name']} (recipe {evaluation.recipe}{run}{', the newest' if chosen and run else ''}) "
        f"on {evaluation.num_images} {what}",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE)
    for column in ("id", "class", "IoU", "target pixels", "predicted pixels"):
        table.add_column(column, justify="left" if column == "class" else "right", overflow="fold")
    for row in result["classes"]:
        table.add_row(
            str(row["class_id"]),
            row["class_name"],
            _fixed(row["iou"]),
            f"{row['num_target_pixels']:,}",
            f"{row['num_prediction_pixels']:,}",
        )
    console.print(table)
    num_classes = len(evaluation.classes)
    if 1 < num_classes <= _MAX_CLASSES_SHOWN:
        console.print("Where each target's pixels went, in % (rows: targets, columns: predictions)", soft_wrap=True)
        matrix = Table(box=box.SIMPLE, padding=(0, 0, 0, 1))
        for heading in ("", *map(str, range(num_classes))):
            matrix.add_column(heading, justify="right")
        for class_id, counts in enumerate(result["confusion_matrix"]):
            total = sum(counts)
            matrix.add_row(str(class_id), *(f"{100 * count / total:.1f}" if total else "-" for count in counts))
        console.print(matrix)
    console.print(
        f"mIoU {_fixed(result['miou'])}   pixel accuracy {_fixed(result['pixel_accuracy'])}   "
        f"{result['num_pixels']:,} pixels, void (id {evaluation.classes.ignore_index}) left out",
        soft_wrap=True,
    )
    for what, unmatched in (
        ("Images without a target", evaluation.images_without_target),
        ("Targets without an image", evaluation.targets_without_image),
    ):
        if unmatched.count:
            console.print(f"{what}: {unmatched.count} ({_examples(unmatched)})", soft_wrap=True)


def _write_json(evaluation: Evaluation, uri: str) -> None:
    text = json.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False) + "\n"
    if uri == "-":
        sys.stdout.write(text)
        return
    try:
        with fsspec.open(uri, "wt", encoding="utf-8") as file:
            file.write(text)
    except Exception as error:  # each store's client has exceptions of its own
        raise RunError(f"{uri}: the JSON cannot be written: {error or type(error).__name__}") from error


def _unmatched_dict(unmatched: Unmatched) -> dict[str, Any]:
    return {"count": unmatched.count, "first": list(unmatched.first)}


def _examples(unmatched: Unmatched) -> str:
    return ", ".join(unmatched.first) + (", …" if unmatched.count > len(unmatched.first) else "")


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
