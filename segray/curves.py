"""A training as its page shows it: curves, the confusion matrix, and the images that the model gets most wrong."""

import base64
import functools
import io
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, UInt, UInt8
from PIL import Image

from segray import __version__, bandfile, pairs
from segray.classes import Classes
from segray.errors import ModelError, SinkError
from segray.labelmap import colourise
from segray.rgb import colours, stretched
from segray.source import filesystem, is_shard
from segray.statistics import ConfusionMatrix
from segray.store import image_name

__all__ = ["Training", "data_uri"]

_MAX_POINTS = 400
_MAX_IMAGES = 8
_SIDE = 640

_Image = UInt8[np.ndarray, "height width 3"] | Float32[np.ndarray, "height width bands"]
_LabelMap = UInt[np.ndarray, "height width"]
_Bands = tuple[str, ...] | None
_Pair = tuple[_Image, _Bands, _LabelMap]

# A loss that is not finite is no JSON that a browser reads; on the page it is a gap.
_parse = functools.partial(json.loads, parse_constant=lambda _: None)


@dataclass(frozen=True, slots=True)
class Training:
    """What `train` wrote into a sink, to read from."""

    uri: str
    """As the person gave it."""

    filesystem: Any
    """The fsspec file system that holds it."""

    path: str
    """Where it begins there."""

    record: dict[str, Any]
    """`training.json`."""

    @classmethod
    def open(cls, uri: str) -> Self | None:
        """Opens a sink that `train` writes or wrote; None where there is no `training.json`.

        Raises:
            SinkError: it cannot be read.
        """
        try:
            fs, path = filesystem(uri)
        except Exception as error:  # fsspec's, of a protocol that it does not know
            raise SinkError(f"{uri}: the sink cannot be read: {error or type(error).__name__}") from error
        training = cls(uri, fs, path.rstrip("/"), {})
        data = training._read("training.json")
        return None if data is None else cls(uri, fs, training.path, training._document("training.json", data))

    def page(self, num_images: int) -> dict[str, Any]:
        """All that the page shows, as JSON holds it.

        Args:
            num_images: how many of the images with the lowest mIoU are shown, at most 8.

        Raises:
            SinkError: a file of the sink cannot be read.
        """
        classes = Classes.from_dict(self.record["classes"])
        lines = self._metrics()
        steps, epochs = ([line for line in lines if line["kind"] == kind] for kind in ("steps", "epoch"))
        best = self._best_epoch(epochs)
        validation = self._validation(best)
        worst = validation["worst"][: min(num_images, _MAX_IMAGES)] if validation else []
        return {
            "title": PurePosixPath(self.record["settings"]["model"]).name,
            "sink": self.uri,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "segray": __version__,
            "training": self.record,
            "classes": [
                {"name": name, "colour": "#{:02x}{:02x}{:02x}".format(*colour)}
                for name, colour in zip(classes.names, classes.palette, strict=True)
            ],
            "steps": _thinned(steps),
            "images_per_second": float(np.median([line["images_per_second"] for line in steps])) if steps else None,
            "epochs": epochs,
            "best_epoch": best,
            "confusion": validation and validation["confusion"],
            "worst": self._images(worst, classes),
        }

    def _read(self, name: str) -> bytes | None:
        try:
            data: bytes = self.filesystem.cat_file(f"{self.path}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # each store's client has exceptions of its own
            raise SinkError(f"{self.uri}/{name} cannot be read: {error or type(error).__name__}") from error
        return data

    def _document(self, name: str, data: bytes) -> dict[str, Any]:
        try:
            document: dict[str, Any] = _parse(data)
        except ValueError as error:
            raise SinkError(f"{self.uri}/{name} is damaged, and no JSON: {error}") from error
        return document

    def _metrics(self) -> list[dict[str, Any]]:
        # What follows the last line's end is a line that is being written.
        lines = (self._read("metrics.jsonl") or b"").split(b"\n")[:-1]
        return [self._document(f"metrics.jsonl, line {number}", line) for number, line in enumerate(lines, 1)]

    def _best_epoch(self, epochs: list[dict[str, Any]]) -> int | None:
        """None where none has been validated yet."""
        best: int | None = self.record["best_epoch"]
        if best is None and epochs:
            # A training that runs does not tell yet; its checkpoint is that of the first epoch with the highest mIoU.
            best = max(epochs, key=lambda line: line["miou"] or 0.0)["epoch"]
        return best

    def _validation(self, epoch: int | None) -> dict[str, Any] | None:
        if epoch is None:
            return None
        name = f"validation/epoch-{epoch:04d}.json"
        data = self._read(name)
        return None if data is None else self._document(name, data)

    def _images(self, worst: list[dict[str, Any]], classes: Classes) -> list[dict[str, Any]]:
        """What the page shows of each image, in their order."""
        found = _find([entry["uri"] for entry in worst], classes)
        images = {uri: pair[0] for uri, pair in found.items() if not isinstance(pair, str)}
        predictions = dict(zip(images, self._predict(list(images.values())), strict=True))
        shown = []
        for entry in worst:
            uri = entry["uri"]
            shown.append({**entry, "name": image_name(uri), **_shown(found[uri], predictions.get(uri, ""), classes)})
        return shown

    def _predict(self, images: list[_Image]) -> list[_LabelMap | str]:
        """The best checkpoint's label maps, or why there is none."""
        from segray.predict import Prediction, Predictor  # torch takes seconds to import

        if not images:
            return []
        checkpoint = self._read("checkpoint.safetensors")
        if checkpoint is None:
            return ["checkpoint.safetensors is gone"] * len(images)
        try:
            predictor = Predictor(lambda: checkpoint)
        except ModelError as error:
            return [str(error)] * len(images)
        results = predictor.predict(images)
        return [result.label_map if isinstance(result, Prediction) else result.reason for result in results]


def _thinned(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most as many points as a screen can tell apart: of neighbours the mean loss, and where the last one stands."""
    together = max(-(-len(steps) // _MAX_POINTS), 1)
    points = []
    for start in range(0, len(steps), together):
        some = steps[start : start + together]
        losses = [line["loss"] for line in some if line["loss"] is not None]
        loss = float(np.mean(losses)) if losses else None
        points.append({"step": some[-1]["step"], "loss": loss, "learning_rate": some[-1]["learning_rate"]})
    return points


def _find(uris: Sequence[str], classes: Classes) -> dict[str, _Pair | str]:
    """The pair of each URI (`SHARD#NAME`), or why it cannot be had."""
    by_shard: dict[str, list[str]] = defaultdict(list)
    for uri in uris:
        shard, name = re.split(r"(?<=\.tar)#|(?<=\.parquet)#", uri, maxsplit=1)
        by_shard[shard].append(name)
    folder_index = functools.cache(_folder_index)
    found: dict[str, _Pair | str] = {}
    for shard, names in by_shard.items():
        reason = "the shard has no such pair any more"
        try:
            index = folder_index(shard.rpartition("/")[0])
            if index is None:
                index, _ = pairs.survey(shard, classes)
            is_wanted = pc.and_(pc.equal(index["shard"], shard), pc.is_in(index["name"], pa.array(names, pa.string())))
            for uri, image, target in pairs.read(index.filter(is_wanted)):
                values, label_map = pairs.decode_pair(uri, image, target, classes)
                found[uri] = values, bandfile.bands_of(image), label_map
        except Exception as error:  # each store's client has exceptions of its own
            reason = str(error) or type(error).__name__
        for name in names:
            found.setdefault(f"{shard}#{name}", reason)
    return found


def _folder_index(folder: str) -> pa.Table | None:
    """The index of all shards in a folder; None where it has none, or one of other shards."""
    try:
        fs, path = filesystem(folder)
        sizes = {PurePosixPath(entry["name"]).name: entry["size"] for entry in fs.ls(path, detail=True)}
    except Exception:  # as above; the shard may be readable all the same, and if not, its own error tells more
        return None
    shards = [name for name in sizes if is_shard(name) and name != pairs.INDEX_NAME]
    described = pairs.read_index(folder, {f"{folder}/{name}": sizes[name] for name in shards})
    return None if described is None else described[0]


def _shown(pair: _Pair | str, prediction: _LabelMap | str, classes: Classes) -> dict[str, Any]:
    """An image, its target and its prediction as data URIs, as far as they are there, and the IoU of its classes."""
    shown: dict[str, Any] = {"image": None, "target": None, "prediction": None, "iou": []}
    if isinstance(pair, str):
        return shown | {"missing": pair}
    image, bands, target = pair
    height, width = target.shape
    scale = min(1.0, _SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    photo = Image.fromarray(_photo(image, bands)).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    shown |= {"height": height, "width": width}
    shown |= {"image": data_uri(photo, "JPEG", quality=82), "target": _drawn(target, size, classes)}
    if isinstance(prediction, str):
        return shown | {"missing": f"there is no prediction: {prediction}"}
    iou = ConfusionMatrix.of(target, prediction, len(classes), classes.ignore_index).iou()
    present = [int(class_id) for class_id in np.argsort(iou) if not np.isnan(iou[class_id])]
    return shown | {
        "prediction": _drawn(prediction, size, classes),
        "iou": [{"class_id": class_id, "iou": float(iou[class_id])} for class_id in present],
        "missing": None,
    }


def _photo(image: _Image, bands: _Bands) -> UInt8[np.ndarray, "height width 3"]:
    if bands is None:
        return image
    valid = np.asarray(np.isfinite(image).all(axis=2))
    three = np.where(valid, np.moveaxis(image[:, :, colours(bands)], 2, 0), np.float32(0))
    return stretched(three, valid)


def _drawn(label_map: _LabelMap, size: tuple[int, int], classes: Classes) -> str:
    """A PNG of the size (width, height) in the classes' colours; void is transparent."""
    small = np.asarray(Image.fromarray(label_map).resize(size, Image.Resampling.NEAREST))
    opaque = np.where(small < len(classes), 255, 0).astype(np.uint8)
    return data_uri(Image.fromarray(np.dstack([colourise(small, classes.palette), opaque])), "PNG", optimize=True)


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """An image inside a page: as a file of this kind (JPEG, PNG), saved with Pillow's options, in its own URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
