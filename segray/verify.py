"""A label store, read back and proved: every part, every label map, every count, as Ray tasks."""

import contextlib
import secrets
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64, Shaped
from rich.console import Console
from rich.progress import track
from tyro.conf import Positional

from segray.classes import Classes
from segray.errors import RunError, SegrayError, SettingsError, SinkError, SourceError, extra
from segray.labelmap import decode_png
from segray.lock import hold
from segray.preprocessing import Preprocessing
from segray.progress import note, print_table
from segray.session import root_cause, session
from segray.source import Source, fetch, image_id, is_shard, known
from segray.store import LabelStore
from segray.tile import Scenes

__all__ = ["Verify", "verify"]

# The sink's module imports Ray, and is imported when the job starts, so that `--help` answers at once.

_TABLES = ("label_maps", "statistics", "rejects")
_NUM_SHOWN = 50
_TASK_CPUS = 0.5  # a task waits for its part before it decodes
_TASKS_IN_FLIGHT = 256
_ENTRIES_PER_TASK = 32
_SCENES_PER_TASK = 4
_ROWS = 64
_PIXELS = 2**24  # counted at once: np.bincount wants 8 bytes a pixel


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Reads a label store back and proves that it is whole. Run it while nothing writes there."""

    sink: Positional[str]
    """The label store: a folder or prefix that `label` wrote."""

    source: Positional[str | None] = None
    """What was labelled, as `label` takes it: every image of it, or window of its scenes, has to be labelled or
    rejected, in each recipe."""

    column: str | None = None
    """The column of SOURCE's manifest or Parquet shards, as `label` takes it. Default: it is found."""

    recipe: str | None = None
    """The recipe that is verified. Default: all that are in the store."""

    repair: bool = False
    """Move the parts that are broken to SINK/quarantine, under the sink's lock: the next run of `label` does their
    images again."""

    def __post_init__(self) -> None:
        if self.column is not None and self.source is None:
            raise SettingsError(f"--column {self.column} is a column of SOURCE; give SOURCE behind SINK")


@dataclass(slots=True)
class _Problems:
    """What is wrong, a line each."""

    max_lines: int = _NUM_SHOWN
    """As many lines are kept; all are counted."""
    count: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, lines: Iterable[str], num_others: int = 0) -> None:
        """Adds these, and as many others that are not told."""
        for line in lines:
            self.count += 1
            if len(self.lines) < self.max_lines:
                self.lines.append(line)
        self.count += num_others

    def add_all(self, other: "_Problems") -> None:
        """Adds those of another."""
        self.add(other.lines, other.count - len(other.lines))


@dataclass(slots=True, eq=False)
class _Part:
    """What was found in a part and its twin."""

    paths: Sequence[str]
    """Relative to the sink; label_maps before statistics."""
    problems: _Problems = field(default_factory=_Problems)
    is_at_hand: bool = True
    """Whether the store gave its bytes. Where it did not, nothing is known of the part."""
    ids: Shaped[np.ndarray, " num_images"] = field(default_factory=lambda: np.array([], "S32"))
    num_pixels: int = 0


@dataclass(slots=True, eq=False)
class _Missing:
    """Images of the source that the store does not hold."""

    problems: _Problems = field(default_factory=lambda: _Problems(sys.maxsize))
    num_seen: int = 0
    """Images of the source, these and the others."""


def verify(job: Verify) -> None:
    """Proves a label store, and a source's place in it, and prints what was checked.

    Raises:
        SinkError: there is no such store or recipe, or it is empty.
        SourceError: the source cannot be listed or holds no image.
        SettingsError: the source is of scenes, and the extra `geo` is not installed.
        Locked: a run holds the sink's lock, and `repair` would write.
        RunError: there are problems; they were printed.
    """
    store = LabelStore.open(job.sink)
    if job.recipe is not None:
        store.recipe(job.recipe)  # or there is none
    recipe_ids = _recipe_ids(store) if job.recipe is None else [job.recipe]
    if job.source is not None:
        for recipe_id in recipe_ids:
            with contextlib.suppress(SinkError, KeyError):  # of which more is said below
                _source(job, store.recipe(recipe_id))  # or nothing is there
    if not recipe_ids:
        raise SinkError(f"{job.sink}: the label store is empty; `segray label SOURCE {job.sink}` fills it")

    problems, checked = _Problems(), Counter[str]()
    parts: list[_Part] = []
    num_missing = 0
    lost = threading.Event()
    name = f"verification-{secrets.token_hex(4)}"
    lock = hold(store.filesystem, store.path, name, wait_seconds=0, say=note, lost=lost.set)
    with session() as ray, lock if job.repair else contextlib.nullcontext():
        for recipe_id in recipe_ids:
            try:
                recipe = store.recipe(recipe_id)
                classes = Classes.from_dict(recipe["classes"])
            except (SegrayError, KeyError) as error:
                how = f"recipes/{recipe_id}.json does not tell the classes ({root_cause(error)})"
                problems.add([f"{how}, and its parts are not checked; the next run of its model writes it again"])
                continue
            paths = _paths(store, recipe_id)
            tasks = ((store, together, classes) for together in paths)
            found: list[_Part] = list(_in_order(ray, _check, tasks, "Verifying", len(paths)))
            _find_duplicates(found)
            for part in found:
                problems.add_all(part.problems)
            parts += found
            if job.source is not None:
                source = _source(job, recipe)
                done = np.sort(np.concatenate([np.array([], "S32"), *(part.ids for part in found)]))
                missing = _find_missing(ray, source, recipe, done)
                _show(missing.problems, "images that are missing")
                problems.add([], missing.problems.count)
                num_missing += missing.problems.count
                checked["images of SOURCE"] = missing.num_seen
            checked["recipes"] += 1
        checked["runs"] = _check_runs(store, job.recipe, problems)
        _show(problems, "problems")

        broken = [part for part in parts if part.problems.count and part.is_at_hand]
        moved = [path for part in broken for path in part.paths] if job.repair else []
        if num_missing and job.repair:  # what the sink knows of shards may have kept them from being read
            moved += [path.removeprefix(f"{store.path}/") for path in store.files("shards")]
        if lost.is_set():
            raise RunError(f"{job.sink}: the lock was lost to a run; nothing was moved, repair again when it has ended")
        _quarantine(store, moved)
    for part in parts:
        kind = part.paths[0].partition("/")[0]
        checked["parts"] += len(part.paths)
        checked["rejects" if kind == "rejects" else "label maps"] += len(part.ids)
        checked["pixels"] += part.num_pixels
    names = (
        "recipes",
        "runs",
        "parts",
        "label maps",
        "pixels",
        "rejects",
        *(["images of SOURCE"] if job.source else []),
    )
    rows = [*((name, checked[name]) for name in names), ("problems", problems.count)]
    rows += [("files moved to quarantine", len(moved))] if job.repair else []
    print_table(["checked", ""], [[name, f"{count:,}"] for name, count in rows])

    if problems.count:
        if moved:
            way_out = "what is broken lies in its quarantine/ now; label again, and those images are done again"
        elif broken:
            way_out = "--repair moves broken parts to quarantine, and labelling again does their images again"
        else:
            way_out = "no part is broken; label the same source again, and what is missing is done"
        number = "1 problem" if problems.count == 1 else f"{problems.count:,} problems"
        raise RunError(f"{job.sink}: {number}; {way_out}")


def _recipe_ids(store: LabelStore) -> list[str]:
    """The recipes that are described, and those that only have parts."""
    folders = [PurePosixPath(path).name for table in _TABLES for path in store.files(table)]
    with_parts = {name.removeprefix("recipe=") for name in folders if name.startswith("recipe=")}
    return sorted(with_parts | set(store.recipe_ids()))


def _paths(store: LabelStore, recipe_id: str) -> list[list[str]]:
    """The path of each part, that of label maps together with its twin; relative to the sink, rejects last."""
    together: dict[tuple[bool, str], list[str]] = defaultdict(list)
    for table in _TABLES:
        for name in store.parts(table, recipe_id, orphans=True):
            together[table == "rejects", name].append(f"{table}/recipe={recipe_id}/{name}")
    return [together[key] for key in sorted(together)]


def _in_order(
    ray: Any, function: Any, tasks: Iterable[tuple[Any, ...]], what: str, total: int | None = None
) -> Iterator[Any]:
    """What the function gives for each of the arguments, computed as Ray tasks, some of them at a time."""
    remote = ray.remote(num_cpus=_TASK_CPUS)(function)
    waiting: deque[Any] = deque()

    def results() -> Iterator[Any]:
        for arguments in tasks:
            if len(waiting) == _TASKS_IN_FLIGHT:
                yield ray.get(waiting.popleft())
            waiting.append(remote.remote(*arguments))
        while waiting:
            yield ray.get(waiting.popleft())

    console = Console(stderr=True)
    try:
        yield from track(results(), what, total=total, console=console, transient=True, disable=not sys.stderr.isatty())
    except ray.exceptions.RayError as error:
        raise RunError(f"the verification broke off: {root_cause(error)}; nothing was moved, run it again") from error


def _check(store: LabelStore, paths: Sequence[str], classes: Classes) -> _Part:
    """Reads a part, and its twin if it has one, and counts again."""
    from segray.sink import LABEL_MAPS, OPTIONAL, REJECTS, STATISTICS, part_name

    schemas = {"label_maps": LABEL_MAPS, "statistics": STATISTICS, "rejects": REJECTS}
    part, tables = _Part(paths), {}
    path, name, kinds = paths[0], PurePosixPath(paths[0]).name, [path.partition("/")[0] for path in paths]
    if kinds == ["label_maps"]:
        part.problems.add([f"{path}: there is no statistics part of its name"])
    if kinds == ["statistics"]:
        part.problems.add([f"{path}: an orphan, there is no label_maps part of its name"])
    for of_kind, kind in zip(paths, kinds, strict=True):
        try:
            data = store.filesystem.cat_file(f"{store.path}/{of_kind}")
        except Exception as error:  # each store's client has exceptions of its own
            part.problems.add([f"{of_kind}: the store does not give it: {root_cause(error)}"])
            part.is_at_hand = False
            continue
        try:
            table = pq.ParquetFile(pa.BufferReader(data)).read()
        except Exception as error:  # whatever pyarrow stumbles over
            part.problems.add([f"{of_kind}: cannot be read: {root_cause(error)}"])
            continue
        differing = {column.name for column in {*table.schema} ^ {*schemas[kind]}}
        # What an earlier version wrote lacks what tells of scenes.
        if differing := differing - (OPTIONAL - {*table.column_names}):
            part.problems.add([f"{of_kind}: not the columns of {kind}: {', '.join(sorted(differing))}"])
        else:
            tables[kind] = table

    rows = tables.get("rejects", tables.get("label_maps"))
    if rows is None:
        return part
    ids, uris, versions = (rows[column].to_pylist() for column in ("image_id", "uri", "version"))
    wrong = [uri for i, uri, version in zip(ids, uris, versions, strict=True) if i != image_id(uri, version)]
    part.problems.add(f"{path}: {uri}: its image_id is not the digest of its uri and version" for uri in wrong)
    if wrong:
        return part
    part.ids = np.array(ids, "S32")
    part.problems.add(f"{path}: {n} rows have the image_id {i}" for i, n in Counter(ids).items() if n > 1)
    if name != part_name(rows):
        part.problems.add([f"{path}: the name is not the digest of its image_ids, which is {part_name(rows)}"])
    if tables.keys() == {"label_maps", "statistics"}:
        _check_label_maps(part, rows, tables["statistics"], classes)
    return part


def _check_label_maps(part: _Part, label_maps: pa.Table, statistics: pa.Table, classes: Classes) -> None:
    """Decodes each label map and compares it with its row and its statistics."""
    path, statistics_path = part.paths
    part.num_pixels = pc.sum(statistics["num_pixels"]).as_py() or 0
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in statistics.to_pylist():
        found[row["image_id"], row["uri"]].append(row)
    for batch in label_maps.to_batches(_ROWS):
        for row in batch.to_pylist():
            wrong = _wrong_with(row, found.pop((row["image_id"], row["uri"]), []), classes)
            part.problems.add([f"{path}: {row['uri']}: {wrong}"] if wrong else [])
    part.problems.add(f"{statistics_path}: {uri}: statistics without a label map" for _, uri in found)


def _wrong_with(row: dict[str, Any], statistics: list[dict[str, Any]], classes: Classes) -> str | None:
    """What is wrong with a label map; None: nothing."""
    try:
        label_map = decode_png(row["label_map"])
    except Exception as error:  # a damaged PNG: Pillow raises whatever it stumbles over
        return f"the label map cannot be decoded: {root_cause(error)}"
    if label_map.shape != (row["height"], row["width"]):
        height, width = label_map.shape
        return f"the label map has {height}×{width} pixels (height×width), its row says {row['height']}×{row['width']}"
    if row.get("confidence") is not None:
        try:
            confidence = decode_png(row["confidence"])
        except Exception as error:  # as above
            return f"the confidence cannot be decoded: {root_cause(error)}"
        if confidence.shape != label_map.shape or ((confidence > 0) != (label_map != classes.ignore_index)).any():
            return "the confidence is not that of the pixels that have a class"
    if row.get("scene") is not None:  # where it holds no data there is no class
        label_map = label_map[label_map != classes.ignore_index]
    if (largest := int(label_map.max(initial=0))) >= len(classes):
        return f"the label map holds the id {largest}, and there are {len(classes)} classes"
    counts = _count(label_map, len(classes))
    counted = Counter(
        (int(i), classes.names[i], int(counts[i]), float(counts[i] / label_map.size)) for i in np.flatnonzero(counts)
    )
    told = Counter((s["class_id"], s["class_name"], s["num_pixels"], s["fraction"]) for s in statistics)
    if told != counted:
        first_told, first_counted = (next(iter(these), "no more") for these in (told - counted, counted - told))
        return f"the statistics say {first_told}, the label map {first_counted} (class, name, pixels, fraction)"
    for s in statistics:
        confidence = s["mean_confidence"]
        if confidence is None or not 0 < confidence <= 1:
            return f"the mean_confidence of class {s['class_id']} is {confidence}, not in (0, 1]"
    return None


def _count(label_map: np.ndarray, num_classes: int) -> Int64[np.ndarray, " num_classes"]:
    counts = np.zeros(num_classes, np.int64)
    pixels = label_map.ravel()
    for start in range(0, pixels.size, _PIXELS):
        counts += np.bincount(pixels[start : start + _PIXELS], minlength=num_classes)
    return counts


def _find_duplicates(parts: Sequence[_Part]) -> None:
    """Finds the parts whose image_ids are in another part too; of those, a sound one, the first by name, is right."""
    ids = np.sort(np.concatenate([np.array([], "S32"), *(part.ids for part in parts)]))
    twice = np.unique(ids[1:][ids[1:] == ids[:-1]])
    holders = np.full(len(twice), -1)
    for index in sorted(range(len(parts)), key=lambda index: parts[index].problems.count > 0):
        part = parts[index]
        positions = np.searchsorted(twice, part.ids[known(part.ids, twice)])
        taken = positions[holders[positions] >= 0]
        if not len(taken):
            holders[positions] = index
            continue
        holder, example = parts[holders[taken[0]]].paths[0], twice[taken[0]].decode()
        which = f"{len(taken)} of its image_ids are in other parts, such as {example} in {holder}"
        part.problems.add([f"{part.paths[0]}: {which}"])


def _source(job: Verify, recipe: Mapping[str, Any]) -> Any:
    """What SOURCE names, as `label` took it."""
    assert job.source is not None
    if "scenes" not in recipe:
        return Source(job.source, job.column)
    with extra("geo", "a SOURCE of scenes"):
        from segray.catalog import SceneSource

    bands = Scenes.from_dict(recipe["scenes"]).calls
    return SceneSource(job.source, job.column, bands=bands, area=recipe["scenes"]["area"])


def _find_missing(ray: Any, source: Any, recipe: Mapping[str, Any], done: np.ndarray) -> _Missing:
    """Finds the images of the source that are not done: loose ones from the listing alone, the others by tasks.

    Of scenes these are windows, which a look at each scene tells.
    """
    missing = _Missing()
    done_ref = ray.put(done)

    def looks_at_scenes() -> Iterator[tuple[Any, ...]]:
        for page in source.entries():
            for row in range(0, page.num_rows, _SCENES_PER_TASK):
                yield page.slice(row, _SCENES_PER_TASK), done_ref, recipe

    def looks_at_images() -> Iterator[tuple[Any, ...]]:
        for page in source.entries():
            uris, versions = page["uri"].to_pylist(), page["version"].to_pylist()
            shards = np.array([is_shard(uri) for uri in uris])
            listed = page["version"].is_valid().to_numpy() & ~shards
            ids = np.array([image_id(uri, version or "") for uri, version in zip(uris, versions, strict=True)], "S32")
            missing.num_seen += int(listed.sum())
            missing.problems.add(uris[row] for row in np.flatnonzero(listed & ~known(ids, done)))
            unlisted = page.filter(pa.array(~shards & ~listed))  # those of a manifest
            for row in range(0, unlisted.num_rows, _ENTRIES_PER_TASK):
                yield unlisted.slice(row, _ENTRIES_PER_TASK), done_ref, source.column
            for shard in np.flatnonzero(shards):
                yield page.slice(shard, 1), done_ref, source.column

    look, tasks = (_look_at_scenes, looks_at_scenes()) if "scenes" in recipe else (_look, looks_at_images())
    for some in _in_order(ray, look, tasks, "Looking for the images of SOURCE"):
        missing.num_seen += some.num_seen
        missing.problems.add_all(some.problems)
    if not missing.num_seen:
        raise SourceError(f"{source.uri} holds no images and no shards; give the SOURCE that was labelled")
    missing.problems.lines = [
        f"{line}: neither labelled nor rejected (recipe {recipe['recipe']})" for line in missing.problems.lines
    ]
    return missing


def _look(entries: pa.Table, done: np.ndarray, column: str | None) -> _Missing:
    """Reads entries as `label` would, which leaves what is not done."""
    missing = _Missing()
    for table, num_present in fetch(entries, done=done, column=column):
        missing.num_seen += table.num_rows + num_present
        told = zip(table["uri"].to_pylist(), table["reason"].to_pylist(), strict=True)
        missing.problems.add(f"{uri} ({reason})" if reason else uri for uri, reason in told)
    return missing


def _look_at_scenes(entries: pa.Table, done: np.ndarray, recipe: Mapping[str, Any]) -> _Missing:
    """Cuts scenes as `label` would, which gives windows, or rejects, that are done or not."""
    import shapely

    from segray.catalog import scene_version
    from segray.cut import Area, windows_of

    missing = _Missing()
    of_scenes, area = Scenes.from_dict(recipe["scenes"]), recipe["scenes"]["area"]
    wanted = None if area is None else Area(shapely.MultiPolygon(shapely.geometry.shape(area)))
    preprocessing = Preprocessing.from_dict(recipe["preprocessing"])
    for entry in entries.to_pylist():
        version = entry["version"] or scene_version(entry["uri"], of_scenes.calls)
        windows = windows_of(entry["uri"], version, of_scenes, wanted, preprocessing, entry["item"])
        missing.num_seen += windows.num_rows
        not_done = ~known(np.array(windows["image_id"].to_pylist(), "S32"), done)
        for window in windows.select(["uri", "reason"]).filter(pa.array(not_done)).to_pylist():
            reason = window["reason"]
            missing.problems.add([window["uri"] + (f" ({reason})" if reason else "")])
    return missing


def _check_runs(store: LabelStore, recipe_id: str | None, problems: _Problems) -> int:
    """Adds up the counts of every run that finished; returns how many records were read."""
    num_read = 0
    for path in store.files("runs", ".json"):
        name = f"runs/{PurePosixPath(path).name}"
        try:
            record = store.document(path)
            if recipe_id not in (None, record["recipe"]):
                continue
            counts = record["counts"]
            parts = [f"{what} {counts[what]}" for what in ("labelled", "rejected", "present")]
            total = counts["labelled"] + counts["rejected"] + counts["present"]
            if record["status"] == "finished" and counts["seen"] != total:
                way_out = "label its source again, verify, then delete this record"
                problems.add([f"{name}: seen {counts['seen']} is not {' + '.join(parts)}; {way_out}"])
        except (SinkError, KeyError, TypeError) as error:
            problems.add([f"{name}: not the record of a run: {root_cause(error)}"])
        num_read += 1
    return num_read


def _quarantine(store: LabelStore, paths: Iterable[str]) -> None:
    """Moves these aside, each to the same path below quarantine/."""
    for path in paths:
        there = f"{store.path}/quarantine/{path}"
        try:
            store.filesystem.makedirs(there.rpartition("/")[0], exist_ok=True)
            store.filesystem.mv(f"{store.path}/{path}", there)
        except Exception as error:  # each store's client has exceptions of its own
            raise RunError(f"{path} cannot be moved to {there}: {root_cause(error)}; move it by hand") from error


def _show(problems: _Problems, what: str) -> None:
    for line in problems.lines:
        print(line)
    if problems.count > len(problems.lines):
        print(f"… {problems.count:,} {what} in all")
