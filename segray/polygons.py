"""The label maps of a scene's windows → polygons, joined across their borders, as GeoParquet.

A polygon is what is connected by the sides of pixels of one class, in the whole scene; pixels that touch at a corner
alone are two. Each window is traced by itself, and what goes on beyond its border is kept until a row of windows has
come into which it does not reach. Outlines are held in pixels, so that joining them is exact, and become coordinates
when they are written.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import rasterio.features
import shapely
from jaxtyping import Bool, Float64, Int32, Int64, Shaped, UInt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segray.classes import Classes
from segray.scene.place import Transform
from segray.tile import Window

__all__ = ["SCHEMA", "GeoParquet", "Joiner", "Polygons", "components", "trace"]

SCHEMA = pa.schema(
    {
        "scene": pa.string(),
        "class_id": pa.int32(),
        "class_name": pa.string(),
        "num_pixels": pa.int64(),
        "area_m2": pa.float64(),
        "mean_confidence": pa.float64(),
        "geometry": pa.binary(),
        "bbox": pa.struct({side: pa.float64() for side in ("xmin", "ymin", "xmax", "ymax")}),
    }
)
"""One row a polygon. `area_m2` is that of its pixels, also where the outline is simplified."""

_GROUP_ROWS = 16_384
_GROUP_BYTES = 32 * 2**20
_NUM_TRACED = 8192


@dataclass(frozen=True, slots=True, eq=False)
class Polygons:
    """Some polygons, a column an attribute."""

    class_id: Int64[np.ndarray, " n"]
    """The class of each."""
    num_pixels: Int64[np.ndarray, " n"]
    """Pixels of each."""
    area_m2: Float64[np.ndarray, " n"]
    """Their area in square metres."""
    confidence_sum: Float64[np.ndarray, " n"]
    """The sum of their confidence; NaN where it is not known."""
    outline: Shaped[np.ndarray, " n"]
    """Each as a polygon of shapely's, in pixels of the scene."""

    def columns(self) -> tuple[np.ndarray, ...]:
        """The attributes, in their order."""
        return self.class_id, self.num_pixels, self.area_m2, self.confidence_sum, self.outline

    def take(self, mask: Bool[np.ndarray, " n"]) -> "Polygons":
        """Those where the mask is true."""
        return Polygons(*(column[mask] for column in self.columns()))


def components(
    label_map: UInt[np.ndarray, "height width"],
) -> tuple[Int32[np.ndarray, "height width"], UInt[np.ndarray, " n"]]:
    """What is connected by the sides of pixels of one class.

    Returns:
        The number of each pixel's component, from 0, and the class of each component.
    """
    starts = np.ones(label_map.shape, bool)  # of runs, which are pixels of one class side by side
    starts[:, 1:] = label_map[:, 1:] != label_map[:, :-1]
    runs = np.cumsum(starts, dtype=np.int32).reshape(label_map.shape) - np.int32(1)
    # Where two runs of one class lie under each other, once each.
    touch = (label_map[1:] == label_map[:-1]) & (starts[1:] | starts[:-1])
    above, below = runs[:-1][touch], runs[1:][touch]
    size = int(runs[-1, -1]) + 1
    graph = coo_array((np.ones(len(above), bool), (above, below)), shape=(size, size))
    num_components, component_of_run = connected_components(graph, directed=False)
    class_ids = np.empty(num_components, label_map.dtype)
    class_ids[component_of_run] = label_map[starts]
    return component_of_run.astype(np.int32)[runs], class_ids


def trace(
    numbers: Int32[np.ndarray, "height width"], mask: Bool[np.ndarray, "height width"], tolerance: float = 0.0
) -> Shaped[np.ndarray, " n"]:
    """The outlines of components, in pixels of their window.

    Args:
        numbers: of the components, as `components` gives them.
        mask: True where there is a class.
        tolerance: what outlines are simplified by, in pixels: corners whose triangle is smaller than its square are
            cut, on both sides of an outline alike, so that neighbours neither overlap nor leave gaps. Points on the
            window's border stay.

    Returns:
        A polygon of shapely's for each component, None where there is no class.
    """
    outlines = np.full(int(numbers.max()) + 1, None, object)
    # What holds no data is simplified like everything else, and left out then.
    shapes = rasterio.features.shapes(numbers, mask=None if tolerance else mask, connectivity=4)
    while some := list(islice(shapes, _NUM_TRACED)):
        rings = [(row, ring) for row, (shape, _) in enumerate(some) for ring in shape["coordinates"]]
        points = np.array([point for _, ring in rings for point in ring])
        ring_of = np.repeat(np.arange(len(rings)), [len(ring) for _, ring in rings])
        lines = shapely.linearrings(points, indices=ring_of)
        outlines[[int(number) for _, number in some]] = shapely.polygons(lines, indices=[row for row, _ in rings])
    if tolerance:
        # Neighbours must have all points of a common side.
        dense = shapely.transform(shapely.segmentize(outlines, 1.0), np.rint)
        outlines = shapely.coverage_simplify(dense, tolerance, simplify_boundary=False)
        outlines[numbers[~mask]] = None
    return outlines


@dataclass(slots=True)
class _Open:
    """A polygon that may go on in windows to come."""

    class_id: int
    num_pixels: int
    area_m2: float
    confidence_sum: float
    pieces: list[Any]


@dataclass(slots=True, eq=False)
class _Line:
    """The pixels along a border: the polygon and the class of each."""

    polygon: Int64[np.ndarray, " length"]
    class_id: Int64[np.ndarray, " length"]


class Joiner:
    """Joins what the windows of a scene hold, which come row by row and from left to right in each.

    It holds what reaches the border below the newest row of windows, and of that row what reaches any border.
    """

    def __init__(self, width: int, nodata: int, tolerance: float = 0.0) -> None:
        """Starts above the first row.

        Args:
            width: the scene's, in pixels.
            nodata: the id of pixels that hold no data.
            tolerance: as `trace` takes it.
        """
        self._width = width
        self._nodata = nodata
        self._tolerance = tolerance
        self._row_off = self._next_row_off = self._next_col_off = 0
        self._above, self._below, self._left = self._blank(width), self._blank(width), self._blank(0)
        self._open: dict[int, _Open] = {}
        self._joined: dict[int, int] = {}  # the polygon that each became a part of, by their numbers
        self._num_polygons = 0

    def add(
        self,
        window: Window,
        label_map: UInt[np.ndarray, "height width"],
        areas: Float64[np.ndarray, "height width"],
        confidence: Float64[np.ndarray, "height width"],
    ) -> Iterator[Polygons]:
        """Takes a window.

        Args:
            window: where it lies in the scene.
            label_map: its class ids.
            areas: of its pixels, in square metres.
            confidence: of its pixels; NaN where it is not known.

        Yields:
            What is finished: what lies within the window, and what ended with the row before.
        """
        if window.row_off != self._row_off:
            yield from self._end_row() if window.row_off == self._next_row_off else self.finish()
        self._row_off, self._next_row_off = window.row_off, window.row_off + window.height

        numbers, class_ids = components(label_map)
        mask = label_map != self._nodata
        outlines = trace(numbers, mask, self._tolerance)
        is_class = class_ids != self._nodata
        offset = np.array([window.col_off, window.row_off])
        outlines[is_class] = shapely.transform(outlines[is_class], lambda xy: xy + offset)
        num_pixels = np.bincount(numbers.ravel())
        area_m2 = np.bincount(numbers.ravel(), areas.ravel())
        confidence_sum = np.bincount(numbers.ravel(), confidence.ravel())
        found = Polygons(class_ids.astype(np.int64), num_pixels, area_m2, confidence_sum, outlines)

        is_within = is_class.copy()
        is_within[np.concatenate([numbers[0], numbers[-1], numbers[:, 0], numbers[:, -1]])] = False
        if is_within.any():
            yield found.take(is_within)
        first = self._num_polygons
        self._num_polygons += len(class_ids)
        for number in np.flatnonzero(is_class & ~is_within).tolist():
            self._joined[first + number] = first + number
            self._open[first + number] = _Open(
                int(class_ids[number]),
                int(num_pixels[number]),
                float(area_m2[number]),
                float(confidence_sum[number]),
                [outlines[number]],
            )

        top, bottom, left, right = (
            _Line(number.astype(np.int64) + first, class_id.astype(np.int64))
            for number, class_id in (
                (numbers[0], label_map[0]),
                (numbers[-1], label_map[-1]),
                (numbers[:, 0], label_map[:, 0]),
                (numbers[:, -1], label_map[:, -1]),
            )
        )
        self._join(_Line(self._above.polygon[window.cols], self._above.class_id[window.cols]), top)
        if window.col_off == self._next_col_off and len(self._left.polygon):
            self._join(self._left, left)
        self._left, self._next_col_off = right, window.col_off + window.width
        self._below.polygon[window.cols], self._below.class_id[window.cols] = bottom.polygon, bottom.class_id

    def finish(self) -> Iterator[Polygons]:
        """Ends the newest row, and whatever it reaches.

        Yields:
            All that is not finished yet.
        """
        yield from self._end_row()
        yield from self._end_row()  # below a row of nothing

    def _end_row(self) -> Iterator[Polygons]:
        """What does not reach below the newest row of windows."""
        self._above, self._below, self._left = self._below, self._blank(self._width), self._blank(0)
        reaches = self._above.class_id != self._nodata
        reached, positions = np.unique(self._above.polygon[reaches], return_inverse=True)
        wholes = np.array([self._whole(polygon) for polygon in reached.tolist()], np.int64)
        self._above.polygon[reaches] = wholes[positions]
        self._joined = {polygon: polygon for polygon in wholes.tolist()}
        ended = [self._open.pop(polygon) for polygon in list(self._open) if polygon not in self._joined]
        if ended:
            yield Polygons(
                np.array([polygon.class_id for polygon in ended], np.int64),
                np.array([polygon.num_pixels for polygon in ended], np.int64),
                np.array([polygon.area_m2 for polygon in ended]),
                np.array([polygon.confidence_sum for polygon in ended]),
                _union([polygon.pieces for polygon in ended]),
            )

    def _join(self, one: _Line, other: _Line) -> None:
        """Makes one of the polygons that meet at a border."""
        meets = (one.class_id == other.class_id) & (one.class_id != self._nodata)
        for pair in np.unique(np.stack([one.polygon[meets], other.polygon[meets]]), axis=1).T.tolist():
            kept, gone = (self._whole(polygon) for polygon in pair)
            if kept == gone:
                continue
            if len(self._open[kept].pieces) < len(self._open[gone].pieces):
                kept, gone = gone, kept
            self._joined[gone] = kept
            part, whole = self._open.pop(gone), self._open[kept]
            whole.num_pixels += part.num_pixels
            whole.area_m2 += part.area_m2
            whole.confidence_sum += part.confidence_sum
            whole.pieces += part.pieces

    def _whole(self, polygon: int) -> int:
        """The polygon that one has become a part of."""
        while (into := self._joined[polygon]) != polygon:
            self._joined[polygon] = self._joined[into]
            polygon = into
        return polygon

    def _blank(self, length: int) -> _Line:
        return _Line(np.full(length, -1, np.int64), np.full(length, self._nodata, np.int64))


def _union(pieces: Sequence[Sequence[Any]]) -> Shaped[np.ndarray, " n"]:
    """Each group as one polygon, without the points on straight lines that were corners of its pieces."""
    outlines = np.array([_united(some) for some in pieces], object)
    rings, polygon_of = shapely.get_rings(outlines, return_index=True)
    points, ring_of = shapely.get_coordinates(rings, return_index=True)
    is_open = np.append(ring_of[1:] == ring_of[:-1], False)  # without the last, which is the first again
    points, ring_of = points[is_open], ring_of[is_open]
    lengths = np.bincount(ring_of)
    ends = np.cumsum(lengths)
    before, after = np.arange(-1, len(points) - 1), np.arange(1, len(points) + 1)
    before[ends - lengths], after[ends - 1] = ends - 1, ends - lengths
    into, out = points - points[before], points[after] - points
    is_corner = into[:, 0] * out[:, 1] != into[:, 1] * out[:, 0]
    rings = shapely.linearrings(points[is_corner], indices=ring_of[is_corner])
    return np.asarray(shapely.polygons(rings, indices=polygon_of))


def _united(pieces: Sequence[Any]) -> Any:
    """The pieces of a polygon as one.

    A hole of a piece lies within its window, so that no other piece reaches into it. Without them, what the union costs
    hangs on the outer rings alone, and a background has millions of holes.
    """
    if len(pieces) == 1:
        return pieces[0]
    rings, piece_of = shapely.get_rings(np.array(pieces, object), return_index=True)
    is_outer = np.append(True, piece_of[1:] != piece_of[:-1])
    outer, *between = shapely.get_rings(shapely.union_all(shapely.polygons(rings[is_outer])))
    holes = [*between, *rings[~is_outer]]
    return shapely.polygons(outer, holes) if holes else shapely.polygons(outer)


class GeoParquet:
    """A GeoParquet file (1.1) of a scene's polygons, written row group by row group.

    A context manager: what it leaves without an error is whole.
    """

    def __init__(self, path: str, *, scene: str, classes: Classes, crs: str, transform: Transform) -> None:
        """Begins the file.

        Args:
            path: on a local disk.
            scene: what the column `scene` holds.
            classes: what the ids stand for.
            crs: the scene's.
            transform: of the raster in whose pixels the polygons come.
        """
        self._scene = scene
        self._names = pa.array(classes.names)
        self._transform = transform
        self._crs = pyproj.CRS.from_user_input(crs).to_json_dict()
        # Without Arrow's own schema, what the file says of itself is all that its readers see.
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd", store_schema=False)
        self._waiting: list[pa.Table] = []
        self._num_waiting = self._waiting_bytes = 0
        self._bounds = np.array([np.inf, np.inf, -np.inf, -np.inf])
        self.num_polygons = 0

    def __enter__(self) -> "GeoParquet":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
            self._writer.add_key_value_metadata({"geo": json.dumps(self._description())})
        self._writer.close()

    def write(self, polygons: Polygons) -> None:
        """Adds polygons, whose outlines are in pixels."""
        a, b, c, d, e, f = self._transform
        placed = shapely.transform(polygons.outline, lambda xy: xy @ np.array([[a, d], [b, e]]) + (c, f))
        placed = shapely.orient_polygons(placed)
        bounds = shapely.bounds(placed)
        self._bounds[:2] = np.minimum(self._bounds[:2], bounds[:, :2].min(0))
        self._bounds[2:] = np.maximum(self._bounds[2:], bounds[:, 2:].max(0))
        geometry = pa.array(shapely.to_wkb(placed, byte_order=1, flavor="iso"), pa.binary())
        table = pa.table(
            [
                pa.repeat(self._scene, len(placed)),
                pa.array(polygons.class_id, pa.int32()),
                self._names.take(pa.array(polygons.class_id)),
                polygons.num_pixels,
                polygons.area_m2,
                pa.array(polygons.confidence_sum / polygons.num_pixels, from_pandas=True),  # which takes NaN for null
                geometry,
                pa.StructArray.from_arrays(list(bounds.T), fields=list(SCHEMA.field("bbox").type)),
            ],
            schema=SCHEMA,
        )
        self._waiting.append(table)
        self._num_waiting += table.num_rows
        self._waiting_bytes += table.nbytes
        if self._num_waiting >= _GROUP_ROWS or self._waiting_bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
            self.num_polygons += self._num_waiting
            self._waiting, self._num_waiting, self._waiting_bytes = [], 0, 0

    def _description(self) -> dict[str, Any]:
        """The metadata under the key `geo`."""
        column = {
            "encoding": "WKB",
            "geometry_types": ["Polygon"],
            "crs": self._crs,
            "orientation": "counterclockwise",
            "edges": "planar",
            "covering": {"bbox": {side: ["bbox", side] for side in ("xmin", "ymin", "xmax", "ymax")}},
        }
        if np.isfinite(self._bounds).all():
            column["bbox"] = self._bounds.tolist()
        return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
