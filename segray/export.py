"""Labelled scenes for a GIS: of each a Cloud-Optimised GeoTIFF, polygons as GeoParquet, and a STAC item.

    DEST/recipe=<id>/<name>/<name>.tif           the label map, with palette and nodata (.aux.xml: names of the classes)
    DEST/recipe=<id>/<name>/<name>-confidence.tif  the confidence of each pixel, where the label store keeps it
    DEST/recipe=<id>/<name>/<name>.parquet       polygons
    DEST/recipe=<id>/<name>/<name>.json          the STAC item, written last

A name is that of the scene and the digest of its URI, so that no two scenes have one. The item holds the
digest of the windows that went in: what has not changed since is not written again.
"""

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem
from rich.console import Console
from rich.progress import track
from tyro.conf import Positional

from segray.classes import Classes
from segray.errors import Reject, RunError, SettingsError, SinkError, extra
from segray.labelmap import decode_png
from segray.progress import note, print_table
from segray.retry import is_refusal, retrying
from segray.source import filesystem
from segray.store import LabelStore, image_name
from segray.tile import Window, scene_and_window, window_uri

if TYPE_CHECKING:
    from segray.cog import Canvas
    from segray.polygons import Polygons

__all__ = ["Export", "export"]

# GDAL, GEOS and PROJ are of the extra `geo`; they are imported when the job starts.

_EXPORTING = 1  # to be raised with any change of code that changes what is written: it is written again then
_PLACE = ("col_off", "row_off", "width", "height")
_GRID = ("crs", "transform_a", "transform_b", "transform_d", "transform_e")  # what the windows of a scene share
_COLUMNS = ["image_id", "version", "run_id", "scene", *_PLACE, *_GRID, "transform_c", "transform_f"]
_STEM_LENGTH = 80
_REQUESTS_IN_FLIGHT = 32
_PUTS_IN_FLIGHT = 2  # of 50 MiB each
_NUM_NAMED = 5
_DEGREE_DECIMALS = 7
_ROUNDED_DEGREES = 1e-6
_EDGE_POINTS = 21  # of a footprint, as the sides of a map's rectangle are no straight lines on another


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes the labelled scenes of a sink as rasters, polygons and STAC items that any GIS opens.

    Raises:
        SettingsError: a setting is out of its bounds.
    """

    sink: Positional[str]
    """The label store: a folder or prefix that `label` wrote."""

    dest: Positional[str]
    """Folder or prefix for what is written; scenes that lie there and have not changed are skipped."""

    recipe: str | None = None
    """The recipe that is exported. Default: that of the newest run."""

    scene: str | None = None
    """The scene's URI, or a glob over URIs. Default: all that are in the store."""

    simplify: float | None = None
    """Simplify the polygons: corners of less than METRES × METRES are cut, without gaps or overlaps."""

    processes: int | None = None
    """Scenes at a time; None: one a CPU."""

    def __post_init__(self) -> None:
        if self.simplify is not None and not self.simplify > 0:
            raise SettingsError(
                f"--simplify {self.simplify}: must be more than 0 metres; leave it out for exact outlines"
            )
        if self.processes is not None and self.processes < 1:
            raise SettingsError(f"--processes {self.processes}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """A scene as the store knows it, in the newest version of which there are label maps."""

    uri: str
    version: str
    windows: pa.Table
    """A row each that is labelled, from top to bottom and from left to right: `part`, `image_id`, and `col_off`,
    `row_off`, `width` and `height` in the raster."""
    rejected: tuple[str, ...]
    """The URIs of those that were rejected."""
    num_missing: int
    """Windows without a label map, these and others."""
    runs: tuple[str, str]
    """The first run that labelled one of them, and the last."""
    height: int
    """Of the raster, which reaches from the first to the last of the windows that the store knows."""
    width: int
    crs: str
    transform: tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A scene that is to be written."""

    store: LabelStore
    recipe_id: str
    recipe: dict[str, Any]
    scene: _Scene
    dest: str
    """The URI of the scene's folder."""
    name: str
    digest: str
    simplify: float | None
    scratch: str
    """A folder on a local disk."""

    @property
    def keeps_confidence(self) -> bool:
        """Whether the store has the confidence of pixels."""
        keeps: bool = self.recipe["scenes"]["confidence"]
        return keeps


def export(job: Export) -> None:
    """Writes what has changed, and prints what was done.

    Only one window, one row group of polygons, and the polygons that reach into windows to come are in memory; a
    scene's raster lies on the local disk meanwhile, a byte a pixel (and one for its confidence), where TMPDIR says.

    Raises:
        SettingsError: the extra `geo` is not installed, or the classes' ignore_index cannot be nodata.
        SinkError: there is no such store, recipe or scene, or the destination cannot be used.
        RunError: scenes could not be exported; the others are.
    """
    with extra("geo", "exporting scenes"):  # what is not installed shall be missed now
        import pystac  # noqa: F401

        from segray import cog, polygons  # noqa: F401
    store = LabelStore.open(job.sink)
    recipe_id, _ = store.choose(job.recipe)
    recipe = store.recipe(recipe_id)
    cog.dtype_of(Classes.from_dict(recipe["classes"]))  # or no raster can hold them
    scenes, failures = [], []
    try:
        rejected = _rejected(store, recipe_id)
        for uri, rows in _windows(store, recipe_id, job.scene).items():
            try:
                scenes.append(_scene(uri, rows, rejected))
            except RunError as error:
                failures.append(error)
    except FileNotFoundError as error:
        raise RunError(f"{job.sink} was written while it was read ({error}); export again") from error
    with tempfile.TemporaryDirectory(prefix="segray-export-") as scratch:
        tasks = [
            _Task(
                store=store,
                recipe_id=recipe_id,
                recipe=recipe,
                scene=scene,
                dest=f"{job.dest.rstrip('/')}/recipe={recipe_id}/{_name(scene.uri)}",
                name=_name(scene.uri),
                digest=_digest(scene, recipe, job.simplify),
                simplify=job.simplify,
                scratch=scratch,
            )
            for scene in scenes
        ]
        try:
            with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
                is_there = list(pool.map(_is_there, tasks))
        except Exception as error:  # each store's client has exceptions of its own
            raise SinkError(f"{job.dest} cannot be read: {type(error).__name__}: {error}") from error
        changed = [task for task, there in zip(tasks, is_there, strict=True) if not there]
        num_written = num_polygons = 0
        how: dict[str, Any] = {"total": len(changed), "console": Console(stderr=True), "transient": True}
        try:
            results = _results(changed, job.processes or os.cpu_count() or 1)
            for result in track(results, "Exporting", **how, disable=not sys.stderr.isatty()):
                if isinstance(result, RunError):
                    failures.append(result)
                else:
                    num_written += 1
                    num_polygons += result
        except SinkError as error:
            raise RunError(f"broke off: {error}; what is written stays, and the same command goes on") from error
    _print_gaps([task.scene for task in changed], has_area=recipe["scenes"]["area"] is not None)
    rows = [
        ["scenes written", num_written],
        ["scenes that had not changed", len(tasks) - len(changed)],
        ["scenes that could not be exported", len(failures)],
        ["windows without a label map", sum(task.scene.num_missing for task in changed)],
        ["polygons", num_polygons],
    ]
    print_table([f"recipe {recipe_id}", ""], [[name, f"{count:,}"] for name, count in rows])
    print(f"written to {job.dest}")
    if failures:
        more = f", and so it is with {len(failures) - 1} scenes more" if len(failures) > 1 else ""
        raise RunError(f"{failures[0]}{more}; the others are in {job.dest}")


def _windows(store: LabelStore, recipe_id: str, pattern: str | None) -> dict[str, pa.Table]:
    """The windows of each scene, in all its versions: `_COLUMNS`, and `part`.

    Raises:
        SinkError: there is no scene, or none of that name.
    """
    parts = store.parts("label_maps", recipe_id)
    committed = set(store.parts("statistics", recipe_id))
    found: dict[str, list[pa.Table]] = defaultdict(list)
    with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
        tables = pool.map(lambda part: store.read("label_maps", recipe_id, part, _COLUMNS), parts)
        for part, table in zip(parts, tables, strict=True):
            table = table.append_column("part", pa.repeat(part, table.num_rows))
            for uri in pc.unique(table["scene"]).drop_null().to_pylist() if part in committed else ():
                found[uri].append(table.filter(pc.equal(table["scene"], uri)))
    if not found:
        raise SinkError(f"{store.uri}: recipe {recipe_id} has no labelled scenes; {store.other_recipes(recipe_id)}")
    chosen = [uri for uri in sorted(found) if pattern is None or uri == pattern or fnmatchcase(uri, pattern)]
    if not chosen:
        some = ", ".join(sorted(found)[:_NUM_NAMED])
        more = f" and {len(found) - _NUM_NAMED} more" if len(found) > _NUM_NAMED else ""
        raise SinkError(f"--scene {pattern}: is none of the scenes in {store.uri}, which are {some}{more}")
    return {uri: pa.concat_tables(found[uri]) for uri in chosen}


def _rejected(store: LabelStore, recipe_id: str) -> dict[tuple[str, str], set[Window]]:
    """The rejected windows, by the scene and its version."""
    found: dict[tuple[str, str], set[Window]] = defaultdict(set)
    for batch in store.batches("rejects", recipe_id, ["uri", "version"]):
        for uri, version in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if place := scene_and_window(uri):
                found[place[0], version].add(place[1])
    return found


def _scene(uri: str, rows: pa.Table, rejected: Mapping[tuple[str, str], set[Window]]) -> _Scene:
    """What the store knows of a scene.

    Args:
        uri: the scene's.
        rows: of its windows, in all versions of it, with `_COLUMNS` and `part`.
        rejected: the windows that were rejected, by scene and version.

    Raises:
        RunError: the windows do not fit each other.
    """
    # Of a scene that has changed, old windows are none of the new one's.
    newest = rows.sort_by([("run_id", "descending")])["version"][0]
    rows = rows.filter(pc.equal(rows["version"], newest))
    rows = rows.sort_by([("row_off", "ascending"), ("col_off", "ascending"), ("image_id", "ascending")])
    places = np.stack([rows["row_off"].to_numpy(), rows["col_off"].to_numpy()])
    is_first = np.append(True, (places[:, 1:] != places[:, :-1]).any(0))  # it may be there twice for a while
    rows = rows.filter(pa.array(is_first))
    labelled = [Window(*place) for place in zip(*(rows[name].to_pylist() for name in _PLACE), strict=True)]
    others = rejected.get((uri, newest.as_py()), set()) - set(labelled)

    known = [*labelled, *others]
    col_off, row_off = min(window.col_off for window in known), min(window.row_off for window in known)
    width = max(window.col_off + window.width for window in known) - col_off
    height = max(window.row_off + window.height for window in known) - row_off
    step_right, step_down = max(window.width for window in known), max(window.height for window in known)
    num_grids = rows.group_by(list(_GRID)).aggregate([]).num_rows
    is_grid = all(
        (window.col_off - col_off) % step_right == 0
        and (window.row_off - row_off) % step_down == 0
        and window.width == min(step_right, col_off + width - window.col_off)
        and window.height == min(step_down, row_off + height - window.row_off)
        for window in known
    )
    if num_grids > 1 or not is_grid:
        raise RunError(f"{uri}: its windows do not form one grid; `segray verify` tells whether the store is sound")
    first = rows.slice(0, 1).to_pylist()[0]
    a, b, c, d, e, f = (first[f"transform_{coefficient}"] for coefficient in "abcdef")
    right, down = first["col_off"] - col_off, first["row_off"] - row_off
    place = {"col_off": pc.subtract(rows["col_off"], col_off), "row_off": pc.subtract(rows["row_off"], row_off)}
    runs = pc.min_max(rows["run_id"])
    return _Scene(
        uri=uri,
        version=newest.as_py(),
        windows=pa.table({**{name: rows[name] for name in ("part", "image_id", "width", "height")}, **place}),
        rejected=tuple(sorted(window_uri(uri, window) for window in others)),
        num_missing=-(-width // step_right) * -(-height // step_down) - rows.num_rows,
        runs=(runs["min"].as_py(), runs["max"].as_py()),
        height=height,
        width=width,
        crs=first["crs"],
        transform=(a, b, c - a * right - b * down, d, e, f - d * right - e * down),
    )


def _name(uri: str) -> str:
    """The name of a scene, and the digest of all of its URI."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", image_name(uri.partition("?")[0]))[:_STEM_LENGTH]
    return f"{stem}-{hashlib.blake2b(uri.encode(), digest_size=6).hexdigest()}"


def _digest(scene: _Scene, recipe: dict[str, Any], simplify: float | None) -> str:
    """Changes with whatever changes what is written."""
    image_ids = sorted(scene.windows["image_id"].to_pylist())
    decisive = [_EXPORTING, image_ids, scene.rejected, recipe["classes"], simplify]
    return hashlib.blake2b(json.dumps(decisive).encode(), digest_size=16).hexdigest()


def _is_there(task: _Task) -> bool:
    """Whether the destination holds just this."""
    fs, path = filesystem(f"{task.dest}/{task.name}.json")
    try:
        item = json.loads(retrying(functools.partial(fs.cat_file, path)))
        return bool(item["properties"]["segray:digest"] == task.digest)
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or none of ours
        return False


def _results(tasks: Sequence[_Task], num_processes: int) -> Iterator[int | RunError]:
    """What `_attempt` gives for each, as they end."""
    if min(len(tasks), num_processes) < 2:
        yield from map(_attempt, tasks)
        return
    # Not forked, as file systems and GDAL have threads; and it is this process that hears of Ctrl-C.
    pool = ProcessPoolExecutor(
        min(len(tasks), num_processes),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        for future in as_completed([pool.submit(_attempt, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        way_out = "take fewer --processes; what is written stays, and the same command goes on"
        raise RunError(f"a process was killed, mostly for want of memory: {way_out}") from error
    except BaseException:  # Ctrl-C too: what they are at is not waited for
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(task: _Task) -> int | RunError:
    """Exports a scene.

    Returns:
        How many polygons it has, or what is wrong with it.

    Raises:
        SinkError: the destination cannot be written.
    """
    try:
        return _export(task)
    except SinkError:
        raise
    except FileNotFoundError as error:
        return RunError(f"{task.scene.uri}: the store was written while it was read ({error}); export again")
    except RunError as error:
        return RunError(f"{task.scene.uri} cannot be exported: {error}")
    except Exception as error:  # whatever GDAL, GEOS, PROJ and the store's client raise; a full disk
        return RunError(f"{task.scene.uri} cannot be exported: {type(error).__name__}: {' '.join(str(error).split())}")


def _export(task: _Task) -> int:
    """Writes a scene's files to the local disk and then to the destination; returns how many polygons it has."""
    import rasterio

    from segray.cog import CACHE_BYTES, Canvas, category_names
    from segray.polygons import GeoParquet

    scene, classes = task.scene, Classes.from_dict(task.recipe["classes"])
    model = task.recipe["model"]
    tags = {"SCENE": scene.uri, "RECIPE": task.recipe_id, "MODEL": model["name"], "MODEL_DIGEST": model["digest"]}
    totals = np.zeros((3, len(classes)))  # of each class: pixels, square metres, the sum of the confidence
    tolerance = 0.0
    if task.simplify is not None:
        middle = Window(scene.width // 2, scene.height // 2, 1, 1)
        tolerance = task.simplify / math.sqrt(_pixel_areas(scene, middle)[0, 0])
    with tempfile.TemporaryDirectory(dir=task.scratch) as folder, rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES):
        file = f"{folder}/{task.name}"
        grid: dict[str, Any] = {"height": scene.height, "width": scene.width}
        georeference: dict[str, Any] = {"crs": scene.crs, "transform": scene.transform}
        with contextlib.ExitStack() as stack:
            how: dict[str, Any] = {**grid, **georeference, "tags": tags}
            canvas = stack.enter_context(Canvas(f"{folder}/labels.tif", classes=classes, **how))
            confidence = None
            if task.keeps_confidence:
                confidence = stack.enter_context(Canvas(f"{folder}/confidence.tif", classes=None, **how))
            means = _paint(task, canvas, confidence, classes)
            with GeoParquet(f"{file}.parquet", scene=scene.uri, classes=classes, **georeference) as geoparquet:
                for polygons in _polygons(scene, canvas, confidence, means, classes, tolerance):
                    geoparquet.write(polygons)
                    for total, column in zip(totals, polygons.columns()[1:4], strict=True):
                        np.add.at(total, polygons.class_id, column)
            canvas.save(f"{file}.tif")
            if confidence is not None:
                confidence.save(f"{file}-confidence.tif")
        Path(f"{file}.tif.aux.xml").write_bytes(category_names(classes))
        item = _item(task, classes, totals)
        Path(f"{file}.json").write_text(json.dumps(item, indent=1))
        for suffix in (".tif", ".tif.aux.xml", *(["-confidence.tif"] if confidence else []), ".parquet", ".json"):
            _publish(f"{file}{suffix}", f"{task.dest}/{task.name}{suffix}")
    return geoparquet.num_polygons


def _paint(task: _Task, canvas: "Canvas", confidence: "Canvas | None", classes: Classes) -> np.ndarray:
    """Puts the label maps where they belong, in the order in which the store has them; the confidence likewise.

    Returns:
        The mean confidence of each class in each window, (num_windows, num_classes); NaN where it is not there.

    Raises:
        RunError: a label map is damaged.
    """
    columns = ["image_id", "label_map", *([] if confidence is None else ["confidence"])]
    store, recipe_id = task.store, task.recipe_id
    rows = task.scene.windows.to_pylist()
    means = np.full((len(rows), len(classes)), np.nan)
    of_part: dict[str, dict[str, int]] = defaultdict(dict)
    for number, row in enumerate(rows):
        of_part[row["part"]][row["image_id"]] = number
    for part, numbers in of_part.items():
        statistics = store.read("statistics", recipe_id, part, ["image_id", "class_id", "mean_confidence"])
        wanted = statistics.filter(pc.is_in(statistics["image_id"], pa.array(list(numbers))))
        places = [numbers[image_id] for image_id in wanted["image_id"].to_pylist()]
        means[places, wanted["class_id"].to_numpy()] = wanted["mean_confidence"].to_numpy()
        for batch in store.batches("label_maps", recipe_id, columns, [part]):
            for image_id, *pngs in zip(*(batch[name] for name in columns), strict=True):
                if image_id.as_py() not in numbers:
                    continue
                row = rows[numbers.pop(image_id.as_py())]
                window = Window(*(row[name] for name in _PLACE))
                label_map, *others = (decode_png(png.as_py()) for png in pngs)
                present = np.flatnonzero(np.bincount(label_map.ravel()))
                if label_map.shape != (window.height, window.width) or not set(present.tolist()) <= {
                    *range(len(classes)),
                    classes.ignore_index,
                }:
                    raise RunError(f"the label map of {window} is not what its row says; `segray verify` tells more")
                canvas.write(window, label_map)
                if confidence is not None:
                    confidence.write(window, *others)
    return means


def _polygons(
    scene: _Scene,
    canvas: "Canvas",
    confidence: "Canvas | None",
    means: np.ndarray,
    classes: Classes,
    tolerance: float,
) -> "Iterator[Polygons]":
    """The polygons of a scene; without the confidence of pixels theirs is the mean of their class in each window."""
    from segray.polygons import Joiner

    joiner = Joiner(scene.width, classes.ignore_index, tolerance)
    of_ids = np.full(max(len(classes), classes.ignore_index + 1), np.nan)
    for row, of_classes in zip(scene.windows.to_pylist(), means, strict=True):
        window = Window(*(row[name] for name in _PLACE))
        label_map = canvas.read(window)
        of_ids[: len(classes)] = of_classes
        of_pixels = of_ids[label_map] if confidence is None else confidence.read(window) / 255
        yield from joiner.add(window, label_map, _pixel_areas(scene, window), of_pixels)
    yield from joiner.finish()


def _pixel_areas(scene: _Scene, window: Window) -> np.ndarray:
    """Square metres of each pixel of a window, as the statistics have them: (height, width)."""
    from affine import Affine

    from segray.scene.place import Grid, pixel_areas, six

    transform = six(Affine(*scene.transform) @ Affine.translation(window.col_off, window.row_off))
    return pixel_areas(scene.crs, Grid(window.height, window.width, transform))


def _item(task: _Task, classes: Classes, totals: np.ndarray) -> dict[str, Any]:
    """The STAC item.

    Args:
        task: the scene.
        classes: the recipe's.
        totals: of each class its pixels, its area in square metres, the sum of its confidence: (3, num_classes).
    """
    import pyproj
    import pystac
    from pystac.extensions.classification import Classification, ClassificationExtension
    from pystac.extensions.projection import ProjectionExtension

    from segray.cog import classification, dtype_of
    from segray.scene.stac import is_item

    scene, model = task.scene, task.recipe["model"]
    geometry, bbox = _footprint(scene)
    labelled = [
        datetime.strptime(run_id.partition("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) for run_id in scene.runs
    ]
    digest: str | None = task.digest
    times: dict[str, Any] | None = None
    try:
        times = _acquired(scene)
    except RunError as error:
        note(f"{scene.uri}: when it was taken is not known now ({error}); its item has the time of labelling")
        digest = None  # so that the next export asks again
    times = times or {"datetime": None, "start_datetime": labelled[0], "end_datetime": labelled[1]}
    properties = {
        "created": pystac.utils.datetime_to_str(labelled[1]),
        "segray:scene": scene.uri,
        "segray:scene_version": scene.version,
        "segray:recipe": task.recipe_id,
        "segray:model": model["name"],
        "segray:model_digest": model["digest"],
        "segray:num_windows": scene.windows.num_rows,
        # Which of them an area left out nobody knows.
        "segray:num_missing_windows": scene.num_missing if task.recipe["scenes"]["area"] is None else None,
        "segray:num_rejected_windows": len(scene.rejected),
        "segray:classes": [
            {
                "class_id": class_id,
                "class_name": name,
                "num_pixels": int(num_pixels),
                "area_m2": area_m2,
                "mean_confidence": confidence_sum / num_pixels if num_pixels and confidence_sum > 0 else None,
            }
            for class_id, (name, (num_pixels, area_m2, confidence_sum)) in enumerate(
                zip(classes.names, totals.T.tolist(), strict=True)
            )
        ],
        "segray:simplify_metres": task.simplify,
        "segray:digest": digest,
    }
    item = pystac.Item(task.name, geometry, bbox, properties=properties, **times)
    code = scene.crs if re.fullmatch(r"\w+:\w+", scene.crs) else None
    ProjectionExtension.ext(item, add_if_missing=True).apply(
        code=code,
        projjson=None if code else pyproj.CRS.from_user_input(scene.crs).to_json_dict(),
        shape=[scene.height, scene.width],
        transform=list(scene.transform),
    )
    label_map = pystac.Asset(
        f"./{task.name}.tif",
        title="Label map",
        media_type=pystac.MediaType.COG,
        roles=["data"],
        extra_fields={"data_type": np.dtype(dtype_of(classes)).name, "nodata": classes.ignore_index},
    )
    item.add_asset("labels", label_map)
    if task.keeps_confidence:
        confidence = pystac.Asset(
            f"./{task.name}-confidence.tif",
            title="Confidence",
            media_type=pystac.MediaType.COG,
            roles=["data"],
            extra_fields={"data_type": "uint8", "nodata": 0, "raster:scale": 1 / 255},
        )
        item.add_asset("confidence", confidence)
    ClassificationExtension.ext(label_map, add_if_missing=True).classes = [
        Classification.create(**fields) for fields in classification(classes)
    ]
    for key, suffix, title, media_type, role in (
        ("class_names", ".tif.aux.xml", "Names of the classes, for GDAL", pystac.MediaType.XML, "metadata"),
        ("polygons", ".parquet", "Polygons", pystac.MediaType.PARQUET, "data"),
    ):
        asset = pystac.Asset(f"./{task.name}{suffix}", title=title, media_type=media_type, roles=[role])
        item.add_asset(key, asset)
    if is_item(scene.uri):
        item.add_link(pystac.Link(pystac.RelType.DERIVED_FROM, scene.uri, media_type=pystac.MediaType.JSON))
    else:
        item.add_asset("source", pystac.Asset(scene.uri, title="The scene", roles=["source"]))
    described: dict[str, Any] = item.to_dict(include_self_link=False, transform_hrefs=False)
    return described


def _footprint(scene: _Scene) -> tuple[dict[str, Any] | None, list[float] | None]:
    """The raster's outline and bounds in EPSG:4326, as GeoJSON has them; None where it has no place on Earth.

    What crosses the antimeridian is cut there, and its bounds' west is then east of their east. Where a pole lies
    within, the outline is the parallel that encloses it all.
    """
    import pyproj
    import shapely

    along = np.linspace(0, 1, _EDGE_POINTS)[:-1]
    cols = np.concatenate([along, np.ones_like(along), 1 - along, np.zeros_like(along)]) * scene.width
    rows = np.concatenate([np.zeros_like(along), along, np.ones_like(along), 1 - along]) * scene.height
    a, b, c, d, e, f = scene.transform
    to_degrees = pyproj.Transformer.from_crs(scene.crs, "EPSG:4326", always_xy=True)
    longitudes, latitudes = to_degrees.transform(a * cols + b * rows + c, d * cols + e * rows + f)
    if not np.isfinite(longitudes).all():
        return None, None
    around = np.unwrap(np.append(longitudes, longitudes[0]), period=360)
    # Where a CRS is torn, an outline may cross itself.
    outline = shapely.make_valid(shapely.Polygon(np.stack([around[:-1], latitudes], axis=1).round(_DEGREE_DECIMALS)))
    if abs(around[-1] - around[0]) > 180:
        furthest = latitudes[np.abs(latitudes).argmin()]
        south, north = sorted((furthest, math.copysign(90, furthest)))
        outline = shapely.box(-180, south, 180, north)
    pieces = []
    for turn in (-360, 0, 360):
        piece = outline.intersection(shapely.box(turn - 180, -90, turn + 180, 90))
        if piece.area:
            pieces.append(shapely.transform(piece, lambda xy, turn=turn: xy - (turn, 0)))
    west, _, _, _ = pieces[0].bounds
    _, _, east, _ = pieces[-1].bounds
    if sum(piece.bounds[2] - piece.bounds[0] for piece in pieces) >= 360 - _ROUNDED_DEGREES:
        west, east = -180.0, 180.0
    south, north = min(piece.bounds[1] for piece in pieces), max(piece.bounds[3] for piece in pieces)
    whole = shapely.union_all(
        [part for part in shapely.get_parts(pieces).tolist() if isinstance(part, shapely.Polygon)]
    )
    geometry: dict[str, Any] = json.loads(shapely.to_geojson(shapely.orient_polygons(whole)))
    return geometry, [west, south, east, north]


def _acquired(scene: _Scene) -> dict[str, Any] | None:
    """When a scene was taken, by its STAC item or its TIFF tag, as `pystac.Item` takes it.

    Returns:
        None: neither tells, or the scene is not there any more, or not for whoever exports.

    Raises:
        RunError: its store cannot be reached.
    """
    import pystac

    from segray.scene.gdal import gdal_path, with_dataset
    from segray.scene.stac import item_at

    try:
        fields = item_at(scene.uri)
        if fields is None:
            tags = with_dataset(gdal_path(scene.uri), scene.version, lambda raster: raster.tags())
            taken = datetime.strptime(tags["TIFFTAG_DATETIME"], "%Y:%m:%d %H:%M:%S")
            return {"datetime": taken.replace(tzinfo=UTC)}
        told = fields["properties"]
        times = {
            name: None if told.get(name) is None else pystac.utils.str_to_datetime(told[name])
            for name in ("datetime", "start_datetime", "end_datetime")
        }
        return times if any(times.values()) else None
    except (Reject, KeyError, ValueError, TypeError, AttributeError):  # gone or damaged; or it does not tell
        return None
    except RunError as error:
        if is_refusal(error):
            return None
        raise


def _publish(file: str, uri: str) -> None:
    """Puts a local file to its place, whole or not at all.

    Raises:
        SinkError: that cannot be written.
    """
    try:
        fs, path = filesystem(uri)
        if isinstance(fs, LocalFileSystem):
            folder, name = os.path.split(path)
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".segray-") as beside:
                copy = shutil.copy(file, f"{beside}/{name}")
                with open(copy, "rb") as copied:
                    os.fsync(copied.fileno())
                os.replace(copy, path)
        else:
            how = {"max_concurrency": _PUTS_IN_FLIGHT} if "s3" in fs.protocol else {}
            retrying(lambda: fs.put_file(file, path, **how))
    except Exception as error:  # each store's client has exceptions of its own
        raise SinkError(f"{uri} cannot be written: {type(error).__name__}: {error}") from error


def _print_gaps(scenes: Sequence[_Scene], *, has_area: bool) -> None:
    gaps = [scene for scene in scenes if scene.num_missing]
    for scene in gaps[:_NUM_NAMED]:
        which = f"{scene.num_missing:,} of {scene.num_missing + scene.windows.num_rows:,} windows are not labelled"
        which += ", or lie outside of the recipe's area" if has_area else ""
        number = len(scene.rejected)
        rejects = f" ({number:,} {'was' if number == 1 else 'were'} rejected)" if number else ""
        note(f"{scene.uri}: {which}{rejects}; they are nodata in its raster")
    if len(gaps) > _NUM_NAMED:
        note(f"so it is with {len(gaps) - _NUM_NAMED} scenes more")
