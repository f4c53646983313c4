"""Label stores for tests, written with pyarrow alone: small, but of the shape that `label` writes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segray.classes import Classes
from segray.labelmap import encode_png
from segray.scene import describe
from segray.sink import LABEL_MAPS, REJECTS, STATISTICS
from segray.source import filesystem
from segray.tile import cores, window_uri


@dataclass(frozen=True, kw_only=True)
class Image:
    """One labelled image of a store."""

    uri: str
    label_map: np.ndarray
    confidence: float | Mapping[int, float | None] | None = 0.9
    image_id: str | None = None
    place: Mapping[str, Any] = field(default_factory=dict)
    """What `LABEL_MAPS` says of a window of a scene."""
    pixel_area_m2: float | None = None

    def id(self) -> str:
        """The given id, or one made from the URI."""
        return self.image_id or hashlib.sha256(self.uri.encode()).hexdigest()[:32]


def windows(raster: Path, label_map: np.ndarray, size: int, pixel_area_m2: float = 1.0) -> list[Image]:
    """The windows of a raster, each with its part of the label map."""
    scene = describe(f"file://{raster}", "")
    images = []
    for core in cores(scene.height, scene.width, size):
        transform, bounds = scene.window_transform(core), scene.bounds(core)
        place = {
            **{"scene": scene.uri, "col_off": core.col_off, "row_off": core.row_off, "crs": scene.crs},
            **{f"transform_{letter}": value for letter, value in zip("abcdef", transform, strict=True)},
            **dict(zip(("west", "south", "east", "north"), bounds, strict=True)),
        }
        uri = window_uri(scene.uri, core)
        part = label_map[core.rows, core.cols]
        images.append(Image(uri=uri, label_map=part, place=place, pixel_area_m2=pixel_area_m2))
    return images


def write_store(
    sink: Path,
    images: Sequence[Image],
    classes: Classes,
    *,
    recipe: str = "a1b2c3d4",
    run_id: str | None = "20261122T080301Z-1a2b3c4d",
    rejects: Sequence[tuple[str, str, str]] = (),
    per_part: int = 3,
    scenes: Mapping[str, Any] | None = None,
    **run: Any,
) -> None:
    """Writes label maps, statistics, rejects (uri, stage, reason), the recipe, and unless None the run.

    With `scenes` the recipe is one of those, cut like that.
    """
    for start in range(0, len(images), per_part):
        part = images[start : start + per_part]
        name = f"recipe={recipe}/part-{run_id}-{start:06d}.parquet"
        _write(sink / "statistics" / name, STATISTICS, [row for image in part for row in _statistics(image, classes)])
        _write(
            sink / "label_maps" / name,
            LABEL_MAPS,
            [
                {
                    "image_id": image.id(),
                    "uri": image.uri,
                    "version": "1",
                    "height": image.label_map.shape[0],
                    "width": image.label_map.shape[1],
                    "label_map": encode_png(image.label_map, classes.palette),
                    "run_id": run_id or "",
                    **image.place,
                }
                for image in part
            ],
        )
    if rejects:
        rows = [
            {"image_id": f"r{i}", "uri": uri, "version": "1", "stage": stage, "reason": reason, "run_id": run_id}
            for i, (uri, stage, reason) in enumerate(rejects)
        ]
        _write(sink / "rejects" / f"recipe={recipe}/part-{run_id}.parquet", REJECTS, rows)
    _json(
        sink / "recipes" / f"{recipe}.json",
        {
            "recipe": recipe,
            "model": {"name": "unet_resnet18", "digest": "0" * 64, "architecture": "unet", "arguments": {}},
            "classes": classes.to_dict(),
            "preprocessing": {"mean": [0.485, 0.456, 0.406]},
            "tiling": {"size": 1024, "overlap": 128},
            "dtype": "float32",
            "segray": "0.1.0",
            **({} if scenes is None else {"scenes": scenes}),
        },
    )
    if run_id is not None:
        counts = {"labelled": len(images), "rejected": len(rejects), "present": 0}
        record = {
            "run_id": run_id,
            "recipe": recipe,
            "status": "finished",
            "job": {"source": "photos", "sink": str(sink), "model": "unet_resnet18"},
            "started": "2026-11-22T08:03:01+00:00",
            "seconds": {"total": 12.3, "start": 4.5, "steady": 7.8},
            "counts": {"seen": sum(counts.values()), **counts},
            "rejects": [],
            "classes": [],
            "throughput": [[4.5 + i / 4, i] for i in range(len(images) + 1)],
            "images_per_second": 3.5,
        }
        _json(sink / "runs" / f"{run_id}.json", record | run)


def _statistics(image: Image, classes: Classes) -> list[dict[str, Any]]:
    ids, counts = np.unique(image.label_map[image.label_map < len(classes)], return_counts=True)
    confidence = image.confidence
    return [
        {
            "image_id": image.id(),
            "uri": image.uri,
            "class_id": class_id,
            "class_name": classes.names[class_id],
            "num_pixels": count,
            "fraction": count / counts.sum(),
            "mean_confidence": confidence.get(class_id) if isinstance(confidence, Mapping) else confidence,
            "run_id": "",
            "area_m2": None if image.pixel_area_m2 is None else count * image.pixel_area_m2,
        }
        for class_id, count in zip(ids.tolist(), counts.tolist(), strict=True)
    ]


def _write(path: Path, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def _json(path: Path, fields: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields))


def newest_run(sink: str) -> dict[str, Any]:
    """The record of the run that ended last."""
    fs, path = filesystem(sink)
    runs = [json.loads(fs.cat_file(run)) for run in fs.ls(f"{path}/runs", detail=False)]
    newest: dict[str, Any] = max(runs, key=lambda run: run["finished"])
    return newest
