"""A sink as one HTML page, and the label maps and masks of a label store as PNG."""

import hashlib
import heapq
import html
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from importlib.resources import files
from itertools import islice
from pathlib import PurePosixPath
from string import Template
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import UInt, UInt8
from PIL import Image
from tyro.conf import Positional

from segray.classes import RGB, Classes
from segray.curves import Training, data_uri
from segray.decode import decode
from segray.errors import Reject, RunError, SegrayError, SettingsError, SinkError, extra
from segray.labelmap import class_mask, colourise, decode_png
from segray.preprocessing import Preprocessing
from segray.source import read_images
from segray.store import LabelStore, image_name
from segray.tile import Scenes

__all__ = ["Report", "report"]

# Windows of scenes are read with GDAL, of the extra `geo`; it is imported when there is one to show.

_THUMBNAIL_SIDE = 640
_SINGLE_SIDE = 1600
_NUM_THREADS = 4
_NUM_EXAMPLES = 5
_NUM_RUNS = 20
_NUM_NIGHTS = 60
_NUM_AT_ONCE = 64
_SIDES = ("west", "south", "east", "north")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Makes one HTML page of a sink.

    Of a label store: numbers, classes, rejects, and images under their label maps. Of a training: its curves, the
    confusion matrix, and the images that it gets most wrong.
    """

    sink: Positional[str]
    """A folder or prefix that `label` wrote, or `train`."""

    html: str | None = None
    """The page's file or URI. Default: `report.html` in a local sink (`image-ID.html` with --image-id)."""

    recipe: str | None = None
    """The recipe that is shown. Default: that of the newest run."""

    run: str | None = None
    """The run whose numbers are shown. Default: the newest of the recipe."""

    num_images: int = 24
    """Images on the page: one half the least confident, the other half drawn at random. Of a training, the worst,
    at most 8."""

    seed: int = 0
    """Draws another random half."""

    image_id: str | None = None
    """Show this image alone, larger."""

    export: str | None = None
    """Also write PNGs here, of all images of the recipe (or --image-id): NAME-ID.png is the label map in its classes'
    colours; NAME-ID/CLASS_ID-CLASS_NAME.png is the mask (white: member) of each class that occurs in it."""

    def __post_init__(self) -> None:
        if not 0 <= self.num_images <= 1000:
            raise SettingsError(
                f"--num-images {self.num_images}: give 0 to 1000; the page holds every image that it shows, "
                "about 0.2 MB each"
            )
        if self.html is None and "://" in self.sink and not self.sink.startswith(("file://", "local://")):
            raise SettingsError(f"{self.sink} is not on this machine's disk: say with --html where the page goes")


@dataclass(frozen=True, slots=True, order=True)
class _Found:
    """An image of the store, in the order of its key."""

    key: float | bytes
    image_id: str
    part: str = field(compare=False)
    confidence: float | None = field(compare=False)


def report(job: Report) -> str:
    """Writes the page, and with `export` the PNGs, and prints where they are.

    Returns:
        The page's file or URI.

    Raises:
        SinkError: there is no such store, recipe, run or image, or nothing in it to show.
        SettingsError: an option asks of a training what only a label store has.
        RunError: the page or a PNG cannot be written.
    """
    training = Training.open(job.sink)
    if training is not None:
        return _report_training(job, training)
    try:
        store = LabelStore.open(job.sink)
    except SinkError as error:
        way_out = f"there is no training.json either, which `segray train SOURCE {job.sink}` writes"
        raise SinkError(f"{error}; {way_out}") from error
    recipe_id, run = _choose(store, job.recipe, job.run)
    recipe = store.recipe(recipe_id)
    classes = Classes.from_dict(recipe["classes"])
    page: dict[str, Any] = {
        "title": PurePosixPath(recipe["model"]["name"]).name,
        "sink": job.sink,
        "recipe": recipe,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": run,
    }
    if job.image_id is None:
        statistics = _Statistics.read(store, recipe_id, classes, job.num_images, job.seed)
        rejects = _rejects(store, recipe_id)
        if not statistics.num_images and not rejects:
            raise SinkError(
                f"{job.sink}: recipe {recipe_id} has neither label maps nor rejects, so there is nothing to show; "
                f"run `segray label SOURCE {job.sink}`, or choose another: {store.other_recipes(recipe_id)}"
            )
        least, sample = statistics.gallery(job.num_images)
        images = {image["image_id"]: image for image in _images(store, recipe, [*least, *sample])}
        runs = [run for run in store.runs() if run["recipe"] == recipe_id]
        page |= {
            "runs": runs[:_NUM_RUNS],
            "nights": _nights(runs),
            "num_images": statistics.num_images,
            "classes": statistics.classes(classes),
            "rejects": rejects,
            "galleries": [
                {"title": title, "images": [images[found.image_id] for found in group]}
                for title, group in (("Least confident first", least), ("A random sample of the others", sample))
                if group
            ],
        }
        chosen = None
    else:
        chosen = _find(store, recipe_id, job.image_id)
        (image,) = _images(store, recipe, [chosen], side=_SINGLE_SIDE)
        page |= {"title": image["name"], "classes": [], "galleries": [{"title": None, "images": [image]}]}

    path = job.html or f"{store.path}/{'report' if chosen is None else f'image-{job.image_id}'}.html"
    _write(path, _fill(page, "report.html").encode())
    print(f"Page: {path}")
    if job.export is not None:
        num_images = _export(store, recipe_id, classes, job.export, chosen)
        print(f"PNGs: {job.export} ({num_images} label maps, and a mask of each class in them)")
    return path


def _report_training(job: Report, training: Training) -> str:
    for option in ("recipe", "run", "image_id", "export"):
        if getattr(job, option) is not None:
            raise SettingsError(
                f"--{option.replace('_', '-')} is for label stores, and {job.sink} holds a training; leave it out"
            )
    path = job.html or f"{training.path}/report.html"
    _write(path, _fill(training.page(job.num_images), "curves.html").encode())
    print(f"Page: {path}")
    return path


def _choose(store: LabelStore, recipe_id: str | None, run_id: str | None) -> tuple[str, dict[str, Any] | None]:
    if run_id is None:
        return store.choose(recipe_id)
    for run in store.runs():
        if run["run_id"] == run_id and recipe_id in (None, run["recipe"]):
            return run["recipe"], run
    of_recipe = f" of recipe {recipe_id}" if recipe_id else ""
    newest = ", ".join([run["run_id"] for run in store.runs()][:_NUM_EXAMPLES])
    raise SinkError(f"{store.uri}: there is no run {run_id}{of_recipe}; the newest are {newest or 'none'}")


def _nights(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the runs of each day (UTC) did, up to the newest, with the days in between on which there was none."""
    by_day: dict[date, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        by_day[datetime.fromisoformat(run["started"]).date()].append(run)
    if not by_day:
        return []
    newest, oldest = max(by_day), min(by_day)
    days = [newest - timedelta(days) for days in range(min(_NUM_NIGHTS, (newest - oldest).days + 1))]
    nights = []
    for day in reversed(days):
        timed = [run for run in by_day[day] if run["images_per_second"]]
        steady_seconds = sum(run["seconds"]["steady"] for run in timed)
        num_timed = sum(run["images_per_second"] * run["seconds"]["steady"] for run in timed)
        counts = {name: sum(run["counts"][name] for run in by_day[day]) for name in ("labelled", "rejected")}
        rate = num_timed / steady_seconds if steady_seconds else None
        nights.append({"day": day.isoformat(), "num_runs": len(by_day[day]), **counts, "images_per_second": rate})
    return nights


@dataclass(slots=True)
class _Statistics:
    """A recipe's statistics table, read once, a part at a time."""

    num_pixels: np.ndarray[Any, Any]
    num_images_with: np.ndarray[Any, Any]
    known_pixels: np.ndarray[Any, Any]
    confidence_sum: np.ndarray[Any, Any]
    areas_m2: np.ndarray[Any, Any]
    """NaN where not all are known: images have none."""
    num_images: int = 0
    least: list[_Found] = field(default_factory=list)
    sample: list[_Found] = field(default_factory=list)

    @classmethod
    def read(cls, store: LabelStore, recipe_id: str, classes: Classes, num_kept: int, seed: int) -> "_Statistics":
        num_pixels, num_images_with, known_pixels = np.zeros((3, len(classes)), np.int64)
        confidence_sum, areas_m2 = np.zeros((2, len(classes)))
        statistics = cls(num_pixels, num_images_with, known_pixels, confidence_sum, areas_m2)
        for part in store.parts("statistics", recipe_id):
            statistics._add(_weighted(store, recipe_id, part), part, num_kept, seed)
        return statistics

    def _add(self, table: pa.Table, part: str, num_kept: int, seed: int) -> None:
        by_class = table.group_by("class_id").aggregate(
            [
                *(("num_pixels", "sum"), ("num_pixels", "count"), ("known", "sum"), ("weighted", "sum")),
                ("area_m2", "sum"),
            ]
        )
        ids = by_class["class_id"].to_numpy()
        self.num_pixels[ids] += by_class["num_pixels_sum"].to_numpy()
        self.num_images_with[ids] += by_class["num_pixels_count"].to_numpy()
        self.known_pixels[ids] += by_class["known_sum"].to_numpy()
        self.confidence_sum[ids] += by_class["weighted_sum"].to_numpy()
        self.areas_m2[ids] += by_class["area_m2_sum"].to_numpy()
        confidences = _confidences(table)
        self.num_images += len(confidences)
        for image_id, confidence in confidences.items():
            # The draw hangs on the image and the seed alone, not on how the store is cut into parts.
            draw = hashlib.sha256(f"{seed}/{image_id}".encode()).digest()
            self.least.append(_Found(math.inf if confidence is None else confidence, image_id, part, confidence))
            self.sample.append(_Found(draw, image_id, part, confidence))
        self.least = heapq.nsmallest(num_kept, self.least)
        self.sample = heapq.nsmallest(num_kept, self.sample)

    def gallery(self, num_images: int) -> tuple[list[_Found], list[_Found]]:
        """The least confident images, least confident first, and as many of the others, drawn at random."""
        least = self.least[: -(-num_images // 2)]
        shown = {found.image_id for found in least}
        others = [found for found in self.sample if found.image_id not in shown]
        return least, others[: num_images - len(least)]

    def classes(self, classes: Classes) -> list[dict[str, Any]]:
        total = int(self.num_pixels.sum())
        return [
            {
                "name": name,
                "colour": _hex(classes.palette[class_id]),
                "num_pixels": int(self.num_pixels[class_id]),
                "fraction": int(self.num_pixels[class_id]) / total if total else 0.0,
                "num_images": int(self.num_images_with[class_id]),
                "hectares": None if np.isnan(self.areas_m2[class_id]) else float(self.areas_m2[class_id]) / 10_000,
                "mean_confidence": float(self.confidence_sum[class_id] / self.known_pixels[class_id])
                if self.known_pixels[class_id]
                else None,
            }
            for class_id, name in enumerate(classes.names)
        ]


def _rejects(store: LabelStore, recipe_id: str) -> list[dict[str, Any]]:
    """Rejects by stage and kind, most frequent first, with the first few images of each."""
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for batch in store.batches("rejects", recipe_id, ["stage", "reason", "uri"]):
        for stage, reason, uri in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            kind, _, detail = reason.partition(": ")
            entry = kinds.setdefault((stage, kind), {"stage": stage, "kind": kind, "num_images": 0, "examples": []})
            entry["num_images"] += 1
            if len(entry["examples"]) < _NUM_EXAMPLES:
                entry["examples"].append({"uri": uri, "detail": detail})
    return sorted(kinds.values(), key=lambda entry: (-entry["num_images"], entry["stage"], entry["kind"]))


def _weighted(store: LabelStore, recipe_id: str, part: str) -> pa.Table:
    """A part of the statistics, with what a pixel-weighted mean of its confidences needs.

    `known` is the pixels whose confidence is known, `weighted` the confidence summed over them.
    """
    columns = ["image_id", "class_id", "num_pixels", "mean_confidence", "area_m2"]
    table = store.read("statistics", recipe_id, part, columns)
    known = pc.if_else(pc.is_valid(table["mean_confidence"]), table["num_pixels"], 0)
    weighted = pc.fill_null(pc.multiply(table["mean_confidence"], table["num_pixels"]), 0.0)
    areas_m2 = table["area_m2"].cast(pa.float64())  # of no type where the part has no such column
    table = table.set_column(columns.index("area_m2"), "area_m2", areas_m2)
    return table.append_column("known", known).append_column("weighted", weighted)


def _confidences(table: pa.Table) -> dict[str, float | None]:
    """The mean confidence of each image; None where it is not known."""
    sums = table.group_by("image_id").aggregate([("known", "sum"), ("weighted", "sum")])
    return {
        row["image_id"]: row["weighted_sum"] / row["known_sum"] if row["known_sum"] else None
        for row in sums.to_pylist()
    }


def _find(store: LabelStore, recipe_id: str, image_id: str) -> _Found:
    for part in store.parts("statistics", recipe_id):
        confidences = _confidences(_weighted(store, recipe_id, part))
        if image_id in confidences:
            return _Found(0.0, image_id, part, confidences[image_id])
    for batch in store.batches("rejects", recipe_id, ["image_id", "stage", "reason", "uri"]):
        for row in batch.filter(pc.equal(batch["image_id"], image_id)).to_pylist():
            raise SinkError(f"{row['uri']}: rejected, so there is no label map: {row['stage']}: {row['reason']}")
    raise SinkError(
        f"{store.uri}: no image {image_id} in recipe {recipe_id}; the page of the whole sink shows ids under "
        f"Details, and so does the column image_id of {store.uri}/label_maps"
    )


def _images(
    store: LabelStore, recipe: Mapping[str, Any], found: list[_Found], side: int = _THUMBNAIL_SIDE
) -> list[dict[str, Any]]:
    """What the page shows of each image, in no particular order."""
    confidences = {image.image_id: image.confidence for image in found}
    rows = _rows(store, recipe["recipe"], sorted({image.part for image in found}), confidences)
    images: list[dict[str, Any]] = []
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        while batch := list(islice(rows, _NUM_AT_ONCE)):
            originals = read_images({row["uri"] for row in batch if row["scene"] is None})

            def show(row: dict[str, Any], originals: dict[str, bytes | Reject] = originals) -> dict[str, Any]:
                return _image(row, originals.get(row["uri"]), confidences[row["image_id"]], recipe, side)

            images += pool.map(show, batch)
    return images


def _rows(
    store: LabelStore, recipe_id: str, parts: Iterable[str] | None = None, image_ids: Iterable[str] | None = None
) -> Iterator[dict[str, Any]]:
    place = ("col_off", "row_off", "crs", *(f"transform_{letter}" for letter in "abcdef"), *_SIDES)
    columns = ["image_id", "uri", "version", "height", "width", "label_map", "scene", *place]
    wanted = None if image_ids is None else pa.array(image_ids, pa.string())
    for batch in store.batches("label_maps", recipe_id, columns, parts):
        if wanted is not None:
            batch = batch.filter(pc.is_in(batch["image_id"], wanted))
        yield from batch.to_pylist()


def _image(
    row: dict[str, Any],
    original: bytes | Reject | None,
    confidence: float | None,
    recipe: Mapping[str, Any],
    side: int,
) -> dict[str, Any]:
    """What the page shows of an image; the original of a window of a scene is None."""
    classes = Classes.from_dict(recipe["classes"])
    label_map = decode_png(row["label_map"])
    height, width = label_map.shape
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    counts = np.bincount(label_map.ravel(), minlength=len(classes))
    num_pixels = label_map.size if row["scene"] is None else int(counts[: len(classes)].sum()) or 1
    shares = {class_id: int(counts[class_id]) / num_pixels for class_id in range(len(classes)) if counts[class_id]}
    photo, missing, name = None, None, image_name(row["uri"])
    try:
        if original is not None:
            photo = _jpeg(_photo(original, height, width), size)
        else:
            name = f"{image_name(row['scene'])} at {row['col_off']}, {row['row_off']}"
            photo = _jpeg(_window(row, recipe), size)
    except SegrayError as error:
        missing = error.reason if isinstance(error, Reject) else str(error)
    return {
        "image_id": row["image_id"],
        "uri": row["uri"],
        "name": name,
        "height": height,
        "width": width,
        "bounds": None if row["scene"] is None else [row[side] for side in _SIDES],
        "confidence": confidence,
        "classes": [
            {"name": classes.names[class_id], "colour": _hex(classes.palette[class_id]), "fraction": share}
            for class_id, share in sorted(shares.items(), key=lambda item: -item[1])
        ],
        "photo": photo,
        "missing": missing,
        "label_map": _overlay(label_map, size, classes.palette),
    }


def _photo(original: bytes | Reject, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of an image, which was of that size when it was labelled.

    Raises:
        Reject: it is gone, damaged, or of another size now.
    """
    if isinstance(original, Reject):
        raise original
    try:
        pixels = decode(original, max_pixels=height * width)
    except Reject as error:
        if error.kind != "too many pixels":
            raise
        raise Reject("decode", "changed", "it has more pixels now than when labelled") from error
    if pixels.shape[:2] != (height, width):
        detail = f"{pixels.shape[0]}×{pixels.shape[1]} pixels now, {height}×{width} when labelled"
        raise Reject("decode", "changed", detail)
    return pixels


def _window(row: Mapping[str, Any], recipe: Mapping[str, Any]) -> UInt8[np.ndarray, "height width 3"]:
    """The picture of a window of a scene.

    Raises:
        SegrayError: there is none; it says why.
    """
    with extra("geo", "a picture of a scene"):
        from segray.picture import picture
    return picture(row, Preprocessing.from_dict(recipe["preprocessing"]), Scenes.from_dict(recipe["scenes"]))


def _jpeg(pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]) -> str:
    small = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return data_uri(small, "JPEG", quality=82)


def _overlay(label_map: UInt[np.ndarray, "height width"], size: tuple[int, int], palette: tuple[RGB, ...]) -> str:
    """A palette PNG of the size (width, height); ids that are no class are transparent.

    The palette holds only the ids that occur: small files, and more than 256 classes fit as long as
    no single image has them all (the rarest are transparent then).
    """
    small = np.asarray(Image.fromarray(label_map).resize(size, Image.Resampling.NEAREST))
    ids, local, counts = np.unique(small, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rank = np.argsort(order)
    shown = [int(class_id) for class_id in ids[order][:255]]
    colours = [palette[class_id] if class_id < len(palette) else (0, 0, 0) for class_id in shown]
    alpha = bytes(255 if class_id < len(palette) else 0 for class_id in shown)
    image = Image.fromarray(np.minimum(rank[local.reshape(small.shape)], 255).astype(np.uint8))
    image.putpalette(np.asarray([*colours, (0, 0, 0)], np.uint8).tobytes())
    return data_uri(image, "PNG", transparency=alpha + b"\0", optimize=True)


def _hex(colour: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _fill(page: dict[str, Any], part: str) -> str:
    shell, drawing = ((files("segray") / name).read_text(encoding="utf-8") for name in ("page.html", part))
    # Inside a script element "<" could end it or open a comment; the escape is the same JSON.
    data = json.dumps(page, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template(shell).substitute(title=html.escape(page["title"]), part=drawing, data=data)


def _export(store: LabelStore, recipe_id: str, classes: Classes, folder: str, chosen: _Found | None) -> int:
    def export(row: dict[str, Any]) -> None:
        label_map = decode_png(row["label_map"])
        # Images of one name differ in their id.
        name = f"{folder.rstrip('/')}/{_file_name(image_name(row['uri']))}-{row['image_id'][:16]}"
        colours = row["label_map"] if label_map.dtype == np.uint8 else _png(colourise(label_map, classes.palette))
        _write(f"{name}.png", colours)
        for class_id in np.unique(label_map).tolist():
            if class_id < len(classes):
                mask = class_mask(label_map, class_id)
                _write(f"{name}/{class_id:03d}-{_file_name(classes.names[class_id])}.png", _png(mask))

    rows = _rows(store, recipe_id, *(([chosen.part], [chosen.image_id]) if chosen else ()))
    num_images = 0
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        while batch := list(islice(rows, _NUM_AT_ONCE)):
            num_images += len(list(pool.map(export, batch)))
    return num_images


def _file_name(name: str) -> str:
    """The name with whatever a file system might refuse or take for a folder replaced, and not too long."""
    return re.sub(r"[^\w.-]+", "_", name)[:50]


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _write(uri: str, data: bytes) -> None:
    try:
        with fsspec.open(uri, "wb") as file:
            file.write(data)
    except Exception as error:  # each store's client has exceptions of its own
        raise RunError(f"{uri}: cannot be written: {error or type(error).__name__}") from error
