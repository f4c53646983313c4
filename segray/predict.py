"""Predictor, the actor class: images or windows of scenes in, label maps and class counts out. Runs without Ray."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt, UInt8
from torch import Tensor

from segray import model
from segray.crf import Crf, refine
from segray.decode import Decoded
from segray.errors import Reject, SettingsError
from segray.forward import Choice, DType, Forward, fast_tail, lacks_memory
from segray.labelmap import dtype_for
from segray.model import Checkpoint
from segray.stitch import stitch, weight
from segray.tail import Grid
from segray.tile import Tiling, Window, windows, windows_into

__all__ = ["CPU_ENVIRONMENT", "Prediction", "Predictor", "Raster"]

CPU_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""Under which a process on a CPU should start that holds a `Predictor`, where its C library is glibc.

A batch's activations are large blocks, which glibc would map anew each time, and their page
faults take as long as the convolutions do. So it keeps up to 1 GiB of what was freed.
"""

T = TypeVar("T")
_Item = TypeVar("_Item", Decoded, "Raster")
_Batch = tuple[Sequence[int], bool]  # whose items, and whether it is for one thread beside others

_NUM_STREAMS = 2  # of a GPU: one computes, while the other's batch is copied to it or back
_MAX_PINNED_BYTES = 2**28  # which torch keeps for the next batch
_FULL_BATCH_SIDE = {"cuda": 640, "cpu": 360}  # a CPU gains little from more, and all share its memory
_MAX_ASPECT = 64
_NO_MEMORY = "out of memory"
_EXAMPLE_SIDE = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Raster:
    """A window of a scene: a core, with a halo around it as far as the scene goes."""

    values: Float32[np.ndarray, "bands height width"]
    """The bands that `match_bands` gives, in its order; for a model of images from 0 to 255."""
    valid: Bool[np.ndarray, "height width"]
    """Where there are data."""
    core: Window
    """Of these pixels those that are labelled."""
    wanted: Bool[np.ndarray, "_ _"] | None = None
    """Of the core's pixels those that are labelled if they have data; the model sees the others too. None: all."""

    @property
    def labelled(self) -> Bool[np.ndarray, "_ _"]:
        """Which of the core's pixels have data and are wanted."""
        valid: np.ndarray = self.valid[self.core.rows, self.core.cols]
        return valid if self.wanted is None else valid & self.wanted

    @classmethod
    def whole(cls, values: Float32[np.ndarray, "height width bands"]) -> "Raster":
        """One without a halo, of values that are NaN where there are no data."""
        height, width, _ = values.shape
        valid = np.isfinite(values).all(axis=2)
        filled = np.ascontiguousarray(np.where(valid, np.moveaxis(values, 2, 0), np.float32(0)))
        return cls(values=filled, valid=valid, core=Window(0, 0, width, height))


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What the model sees in one image, or in the core of a raster."""

    label_map: UInt[np.ndarray, "height width"]
    """The class of each pixel, uint8 (uint16 beyond 256 classes); `ignore_index` where there are no data."""
    num_pixels: Int64[np.ndarray, " num_classes"]
    """Pixels of each class."""
    confidence_sum: Float64[np.ndarray, " num_classes"]
    """Sum over each class's pixels of the probability that the model gave it."""
    confidence: UInt8[np.ndarray, "height width"] | None = None
    """That probability of each pixel, from 1 (1/255, or less) to 255; 0 where there are no data. None: not kept."""


class Predictor:
    """Holds a model in memory and labels batches of images, or of windows of scenes, with it.

    Images of any sizes may come together: those of one size share a batch, and those beyond
    `tiling.size` are cut into tiles, which are batched, blended and stitched. A CRF comes after that, and
    sees whole images at their own size. On a CPU a label map does not depend on what an image was batched
    with, once the dtype is chosen where that is auto; on a GPU it may, in pixels whose two largest logits
    are equal up to rounding.
    """

    def __init__(
        self,
        read_checkpoint: Callable[[], bytes],
        *,
        tiling: Tiling | None = None,
        crf: Crf | None = None,
        batch_size: int = 16,
        device: str = "cpu",
        dtype: DType = "float32",
        num_threads: int | None = None,
        keeps_confidence: bool = False,
        chosen: Callable[[Choice], object] = lambda choice: None,
        beat: Callable[[int], object] = lambda num_images: None,
        refined: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        """Builds the model on its device.

        Args:
            read_checkpoint: gives the bytes of a `Checkpoint`; called once, where the model will live.
            tiling: how large images are cut.
            crf: what refines the model's probabilities. None: nothing does.
            batch_size: images, or tiles, of up to 640×640 pixels (on a CPU 360×360) that share a
                forward pass; larger ones in proportion fewer.
            device: torch's name of a device.
            dtype: what the forward pass computes in (see `Forward`); logits are float32 from there on. An ONNX
                model's graph says that itself.
            num_threads: threads on a CPU, each with small images of its own, all with the same large one. None: torch's
                default.
            keeps_confidence: whether predictions have the confidence of each pixel.
            chosen: is told how the forward pass computes, at the first batch.
            beat: is called after each forward pass with the number of images, or tiles, in it.
            refined: is called after each image that the CRF refined, with the seconds that it took.

        Raises:
            ModelError: the model cannot be built, or not on this device.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        checkpoint = Checkpoint.from_bytes(read_checkpoint())
        self._classes = checkpoint.classes
        self._preprocessing = checkpoint.preprocessing
        self._tiling = model.fitted_tiling(checkpoint, tiling or Tiling())
        self._crf = crf
        self._batch_size = batch_size
        self._device = torch.device(device)
        # Which takes a second, at best.
        compiling = ThreadPoolExecutor(1).submit(fast_tail, self._device, len(self._classes))
        module = model.build(checkpoint)
        self._multiple = model.input_multiple(module)
        self._minimum = model.input_minimum(module)
        self._stride = model.stride(module)
        self._batch_minimum = model.batch_minimum(module) if self._device.type == "cpu" else 1
        side = _EXAMPLE_SIDE + self._padding(_EXAMPLE_SIDE, self._multiple)
        example = torch.rand(1, len(self._preprocessing.channels), side, side)
        module, self._aligns_corners = model.coarse(module)

        def tell(choice: Choice) -> None:
            chosen(replace(choice, error=choice.error or tail_error))

        self._forward = Forward(module, example, device=self._device, dtype=dtype, chosen=tell)
        self._tail, tail_error = compiling.result()
        self._keeps_confidence = keeps_confidence
        self._beat = beat
        self._tell_refined = refined
        has_own_threads = self._device.type != "cpu" or checkpoint.architecture == "onnx"
        self._num_threads = 1 if has_own_threads else torch.get_num_threads()
        if self._device.type == "cuda":
            self._threads = ThreadPoolExecutor(_NUM_STREAMS, initializer=_take_stream, initargs=(self._device,))
        else:
            # Threads that share a layer wait for the slowest at each, and other processes have a claim to the cores.
            self._threads = ThreadPoolExecutor(self._num_threads, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Labels the decoded images, or the rasters, of a batch; its other rows (rejects) pass through.

        Args:
            batch: columns `height`, `width`, `stage`, `reason` (null unless it is a reject), any others, and of images
                `pixels` (binary, HWC uint8 RGB) with their `num_rows`; of rasters `values` (binary, CHW float32),
                `valid` (binary, HW bool), `wanted` (binary, HW bool, of the core), `core_col_off`, `core_row_off`,
                `core_width`, `core_height`.

        Returns:
            The other columns, in their order, with these replaced by `label_map` (binary, the
            raw array), `num_pixels` and `confidence_sum` (lists, one value a class), and `confidence`
            (binary, the raw array) where it is kept; `stage` and `reason` are set in rows that were
            rejected here. Of rasters `height` and `width` are then the core's.
        """
        stages, reasons = batch["stage"].to_pylist(), batch["reason"].to_pylist()
        wanted = [row for row, reason in enumerate(reasons) if reason is None]
        of_scenes = "values" in batch.column_names
        found = (
            self.predict_windows([_raster(batch, row) for row in wanted])
            if of_scenes
            else self.predict_decoded([_image(batch, row) for row in wanted])
        )
        results: list[Prediction | Reject | None] = [None] * len(reasons)
        for row, result in zip(wanted, found, strict=True):
            results[row] = result

        predictions = [result if isinstance(result, Prediction) else None for result in results]
        rejects = [result if isinstance(result, Reject) else None for result in results]
        columns = {
            "label_map": pa.array([p and p.label_map.tobytes() for p in predictions], pa.binary()),
            "num_pixels": pa.array([p and p.num_pixels for p in predictions], pa.list_(pa.int64())),
            "confidence_sum": pa.array([p and p.confidence_sum for p in predictions], pa.list_(pa.float64())),
            "stage": pa.array([r.stage if r else s for r, s in zip(rejects, stages, strict=True)], pa.string()),
            "reason": pa.array([r.reason if r else s for r, s in zip(rejects, reasons, strict=True)], pa.string()),
        }
        if of_scenes:
            read = ["values", "valid", "wanted", "height", "width", "core_col_off", "core_row_off"]
            kept = batch.drop_columns([*read, "stage", "reason"])
            kept = kept.rename_columns([name.removeprefix("core_") for name in kept.column_names])
        else:
            kept = batch.drop_columns(["pixels", "num_rows", "stage", "reason"])
        if self._keeps_confidence:
            kept_maps = [None if p is None or p.confidence is None else p.confidence.tobytes() for p in predictions]
            columns["confidence"] = pa.array(kept_maps, pa.binary())
        for name, column in columns.items():
            kept = kept.append_column(name, column)
        return kept

    def predict(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"] | Float32[np.ndarray, "_ _ _"]]
    ) -> list[Prediction | Reject]:
        """Labels images of any sizes.

        Args:
            images: each (height, width, 3) uint8 RGB; for a model of bands windows of scenes without a halo, each
                (height, width, bands) float32, NaN where there are no data.

        Returns:
            In their order, a prediction of each image's own height and width, or the reject of
            one for which the model gave numbers that are not finite, or that is too elongated to resize.

        Raises:
            SettingsError: the model sees bands of scenes, and these are images.
        """
        if self._preprocessing.bands is not None:
            if any(image.dtype == np.uint8 for image in images):
                raise SettingsError(
                    f"the model sees the bands {', '.join(self._preprocessing.bands)} of scenes, and these are images"
                )
            return self.predict_windows([Raster.whole(values) for values in images])
        return self.predict_decoded([Decoded(image, *image.shape[:2]) for image in images])

    def predict_decoded(self, images: Sequence[Decoded]) -> list[Prediction | Reject]:
        """Labels images of any sizes, whose pixels may be fewer than they have.

        Args:
            images: of fewer pixels, where the model resizes them and no CRF refines what it says, some.

        Returns:
            As `predict` does; label maps are of the images' own heights and widths.
        """
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            alike[*image.pixels.shape[:2], image.height, image.width].append(index)
        results: list[Prediction | Reject] = [Reject("predict", "not predicted", "")] * len(images)
        batches: list[_Batch] = []
        for (_, _, height, width), indices in alike.items():
            if self._preprocessing.resize is not None and max(height, width) > _MAX_ASPECT * min(height, width):
                # Its shorter side, brought to `resize`, would make the longer one fill the memory.
                detail = f"{width}×{height}; where the model resizes, one side is at most {_MAX_ASPECT} times the other"
                for index in indices:
                    results[index] = Reject("predict", "too elongated", detail)
                continue
            batches += self._batches(indices, *self._input_size(height, width))
        way_out = "lower --tiling.size" + (" or leave out --crf" if self._crf else "")
        self._predict_batches(self._label_images, images, batches, way_out, results)
        return [_checked(result) for result in results]

    def predict_windows(self, rasters: Sequence[Raster]) -> list[Prediction | Reject]:
        """Labels windows of scenes.

        Put together, the label maps of a scene's cores are that of the scene in one piece, to the last pixel, where
        the offsets of rasters and cores in the scene are multiples of `model.window_multiple`, and

        - rasters are no larger than `tiling.size`, and their halos at least as wide as the model looks around a
          pixel (which no model does that pools over all that it sees);
        - or the model is an ONNX one of a fixed size, and halos are at least as wide as the tiling's overlap.

        Pixels without data are fed to the model as their band's mean. A core without a pixel that has data and is
        wanted is not fed at all.

        Args:
            rasters: of any sizes.

        Returns:
            In their order, a prediction of each raster's core, or the reject of one for which the model gave numbers
            that are not finite. Pixels without data, and those that are not wanted, have `ignore_index`, and count
            nowhere.

        Raises:
            SettingsError: the model's `ignore_index` does not fit a label map, its images are resized, or a CRF is
                to refine them.
        """
        dtype, void = dtype_for(len(self._classes)), self._classes.ignore_index
        if not 0 <= void <= np.iinfo(dtype).max:
            raise SettingsError(
                f"classes: ignore_index {void}, of pixels without data, must lie in [0, {np.iinfo(dtype).max}]"
            )
        if self._preprocessing.resize is not None or self._crf is not None:
            raise SettingsError("windows of scenes are neither resized nor refined; leave out --crf")
        results: list[Prediction | Reject] = [Reject("predict", "not predicted", "")] * len(rasters)
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, raster in enumerate(rasters):
            if raster.labelled.any():
                by_shape[raster.values.shape].append(index)
            else:
                results[index] = self._without_data(raster)
        batches = [
            batch for (_, height, width), indices in by_shape.items() for batch in self._batches(indices, height, width)
        ]
        self._predict_batches(self._label_rasters, rasters, batches, "take smaller windows", results)
        return [_checked(result) for result in results]

    def _batches(self, indices: Sequence[int], height: int, width: int) -> Iterator["_Batch"]:
        """Splits items of one input size. How depends on nothing else, so that no label map depends on the others."""
        together = self._num_together(height, width)
        if self._device.type == "cuda":
            # Or twice the memory of the largest would be needed.
            is_beside = not self._is_tiled(height, width) and self._crf is None
            return ((some, is_beside) for some in _split(indices, together))
        # One image alone costs as much as two; for two in each thread a third more may be in memory than a batch.
        if self._num_threads == 1 or 2 * self._num_threads > together * 4 / 3:
            return ((some, False) for some in _split(indices, together))
        # Twice as many batches as there are threads, and as many for each, or most would wait for the last.
        num_batches = math.ceil(len(indices) / max(2, together // self._num_threads // 2))
        num_batches = max(num_batches, min(num_batches + -num_batches % self._num_threads, len(indices) // 2))
        return ((indices[first::num_batches], True) for first in range(num_batches))

    def _predict_batches(
        self,
        label: Callable[[Sequence[_Item], int | None], Sequence[Prediction]],
        items: Sequence[_Item],
        batches: Sequence["_Batch"],
        way_out: str,
        results: list[Prediction | Reject],
    ) -> None:
        """Sets the results of all batches: first of those that are each one thread's, side by side.

        What lacked memory beside others is tried again alone.
        """

        def predict(some: Sequence[int]) -> Sequence[Prediction | Reject]:
            return self._predict_alike(label, [items[index] for index in some], way_out)

        beside, alone = ([some for some, is_beside in batches if is_beside == wanted] for wanted in (True, False))
        for apply, chosen in ((self._threads.map, beside), (map, alone)):
            for some, predictions in zip(chosen, apply(predict, chosen), strict=True):
                for index, prediction in zip(some, predictions, strict=True):
                    results[index] = prediction
                    lacked_memory = isinstance(prediction, Reject) and prediction.kind == _NO_MEMORY
                    if lacked_memory and chosen is beside:
                        alone.append([index])

    @torch.inference_mode()
    def _predict_alike(
        self,
        label: Callable[[Sequence[_Item], int | None], Sequence[Prediction]],
        items: Sequence[_Item],
        way_out: str,
        *,
        num_tiles: int | None = None,
    ) -> Sequence[Prediction | Reject]:
        """Items of one size, in one batch; where that fails, in halves, and at last one item and tile at a time.

        Args:
            label: labels some of them, with so many tiles together (None: as many as fit a batch).
            items: images or rasters.
            way_out: of too little memory.
            num_tiles: is given to `label`.
        """
        try:
            return label(items, num_tiles)
        except torch.AcceleratorError:  # the GPU's state is lost with it
            raise
        except Exception as error:  # a model may raise anything
            height, width = _size(items[0])
            reject = _failed(error, height, width, way_out)
        torch.cuda.empty_cache()  # outside of the handler, whose traceback would hold the batch
        if len(items) == 1:
            is_tiled = self._is_tiled(*self._input_size(height, width))
            return (
                self._predict_alike(label, items, way_out, num_tiles=1) if is_tiled and num_tiles is None else [reject]
            )
        halves = items[: len(items) // 2], items[len(items) // 2 :]
        return [result for half in halves for result in self._predict_alike(label, half, way_out)]

    def _label_images(self, images: Sequence[Decoded], num_tiles: int | None) -> list[Prediction]:
        given = self._stacked([image.pixels for image in images]).permute(0, 3, 1, 2)
        height, width = own_size = images[0].height, images[0].width
        pixels = self._resized(given, *self._input_size(*own_size))
        if self._is_tiled(*pixels.shape[-2:]):
            return [self._predict_tiled(*pair, own_size, num_tiles) for pair in zip(given, pixels, strict=True)]
        fed = model.normalised(pixels, self._preprocessing)
        if self._crf is not None or pixels.shape[-2:] != own_size:
            return self._label(self._logits(fed, self._multiple), given, own_size)
        logits, grid = self._coarse_logits(fed, self._multiple)
        return self._predictions(logits, grid, Window(0, 0, width, height))

    def _label_rasters(self, rasters: Sequence[Raster], num_tiles: int | None) -> list[Prediction]:
        values = self._stacked([raster.values for raster in rasters])
        valid = self._stacked([raster.valid for raster in rasters])
        fed = model.normalised(values, self._preprocessing).masked_fill_(~valid[:, None], 0)
        if self._is_tiled(*fed.shape[-2:]):
            return [self._label_raster_tiled(*pair, num_tiles) for pair in zip(rasters, fed, strict=True)]
        logits, grid = self._coarse_logits(fed, self._stride)
        predictions: list[Prediction] = []
        for core, some in groupby(rasters, lambda raster: raster.core):
            labelled = np.stack([raster.labelled for raster in some])
            first, end = len(predictions), len(predictions) + len(labelled)
            predictions += self._predictions(logits[first:end], grid, core, labelled)
        return predictions

    def _is_tiled(self, height: int, width: int) -> bool:
        return max(height, width) > self._tiling.size

    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        resize = self._preprocessing.resize
        if resize is None:
            return height, width
        return (resize, int(resize * width / height)) if height <= width else (int(resize * height / width), resize)

    def _num_together(self, height: int, width: int) -> int:
        side = self._tiling.size
        num_pixels = min(height, side) * min(width, side)
        return max(1, min(self._batch_size, self._batch_size * _FULL_BATCH_SIDE[self._device.type] ** 2 // num_pixels))

    def _stacked(self, arrays: Sequence[np.ndarray]) -> Tensor:
        """On the device; to a GPU from pinned memory, of which it takes the copy itself, unless that is large."""
        shape, dtype = (len(arrays), *arrays[0].shape), torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
        is_pinned = self._device.type == "cuda" and len(arrays) * arrays[0].nbytes <= _MAX_PINNED_BYTES
        stacked = torch.empty(shape, dtype=dtype, pin_memory=is_pinned)
        np.stack(arrays, out=stacked.numpy())
        return stacked.to(self._device, non_blocking=True)

    def _resized(
        self, pixels: UInt8[Tensor, "batch 3 height width"], h: int, w: int
    ) -> UInt8[Tensor, "batch 3 {h} {w}"]:
        if self._preprocessing.resize is None:
            return pixels
        from torchvision.transforms.functional import InterpolationMode, resize  # which takes a second to import

        resized: Tensor = resize(pixels, [h, w], InterpolationMode.BILINEAR, antialias=True)
        return resized

    def _logits(
        self, values: Float[Tensor, "batch channels h w"], multiple: int
    ) -> Float[Tensor, "batch num_classes h w"]:
        """Logits in float32, one for each pixel of the model's input, which is brought to a multiple of a length."""
        height, width = values.shape[-2:]
        logits, grid = self._coarse_logits(values, multiple)
        return _resized_to(logits, grid)[..., :height, :width]

    def _coarse_logits(
        self, values: Float[Tensor, "batch channels height width"], multiple: int
    ) -> tuple[Float[Tensor, "batch num_classes h w"], Grid]:
        """Likewise, as the model gives them, and the pixels for which they are meant: those, and what was padded."""
        num_images, (height, width) = len(values), values.shape[-2:]
        if num_images == 1 and self._num_together(height, width) > 1:
            values = values.expand(self._batch_minimum, -1, -1, -1)
        padding = (0, self._padding(width, multiple), 0, self._padding(height, multiple))
        if any(padding):
            values = F.pad(values, padding, mode="replicate")
        logits = self._forward(values)
        self._beat(num_images)
        return logits[:num_images], Grid(values.shape[2], values.shape[3], self._aligns_corners)

    def _padding(self, length: int, multiple: int) -> int:
        least = max(length, self._minimum)
        return least + -least % multiple - length

    def _predict_tiled(
        self,
        image: UInt8[Tensor, "3 _ _"],
        pixels: UInt8[Tensor, "3 h w"],
        own_size: tuple[int, int],
        num_together: int | None,
    ) -> Prediction:
        input_height, input_width = pixels.shape[-2:]
        together = num_together or self._num_together(input_height, input_width)
        cut = windows(input_height, input_width, self._tiling)

        def tiles() -> Iterator[tuple[Window, Tensor]]:
            for some in _split(cut, together):
                batch = torch.stack([pixels[:, window.rows, window.cols] for window in some])
                fed = model.normalised(batch, self._preprocessing)
                yield from zip(some, self._logits(fed, self._multiple), strict=True)

        bands = (band[None] for band in self._stitched(tiles(), cut[0], input_width))
        if self._crf is not None or pixels.shape[-2:] != own_size:
            return self._label(torch.cat(list(bands), dim=2), image[None], own_size)[0]
        return _joined([self._predictions(band, *_as_they_are(band))[0] for band in bands])

    def _label_raster_tiled(
        self, raster: Raster, fed: Float[Tensor, "channels height width"], num_together: int | None
    ) -> Prediction:
        height, width = fed.shape[-2:]
        together = num_together or self._num_together(height, width)
        core, cut = raster.core, windows_into(raster.core, height, width, self._tiling)
        first, last = cut[0], cut[-1]

        def tile(window: Window) -> Tensor:
            there = fed[:, window.rows, window.cols]
            beyond = (0, window.width - there.shape[2], 0, window.height - there.shape[1])
            return F.pad(there[None], beyond, mode="replicate")[0] if any(beyond) else there

        def tiles() -> Iterator[tuple[Window, Tensor]]:
            for some in _split(cut, together):
                batch = torch.stack([tile(window) for window in some])
                for window, logits in zip(some, self._logits(batch, self._stride), strict=True):
                    moved = Window(
                        window.col_off - first.col_off, window.row_off - first.row_off, window.width, window.height
                    )
                    yield moved, logits

        labelled = []
        left = core.col_off - first.col_off
        row = first.row_off - core.row_off  # of the core
        for band in self._stitched(tiles(), first, last.col_off + last.width - first.col_off):
            rows = slice(max(0, -row), min(core.height - row, band.shape[1]))
            if rows.stop > rows.start:
                logits = band[:, rows, left : left + core.width]
                labelled.append(self._label_core(logits, raster, row + rows.start))
            row += band.shape[1]
        return _joined(labelled)

    def _stitched(
        self, tiles: Iterator[tuple[Window, Tensor]], first: Window, width: int
    ) -> Iterator[Float[Tensor, "num_classes rows width"]]:
        """What the tiles give together, in bands of finished rows."""

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self._device)

        weights = torch.from_numpy(weight(first.height, first.width, self._tiling)).to(self._device)
        return (band.float() for band in stitch(tiles, width, weights, zeros))

    def _label_core(
        self, logits: Float[Tensor, "num_classes rows width"], raster: Raster, first_row: int
    ) -> Prediction:
        """The logits of some rows of a raster's core to their label map."""
        labelled = raster.labelled[first_row : first_row + logits.shape[1]]
        return self._predictions(logits[None], *_as_they_are(logits[None]), labelled[None])[0]

    def _without_data(self, raster: Raster) -> Prediction:
        num_classes, shape = len(self._classes), (raster.core.height, raster.core.width)
        return Prediction(
            label_map=np.full(shape, self._classes.ignore_index, dtype_for(num_classes)),
            num_pixels=np.zeros(num_classes, np.int64),
            confidence_sum=np.zeros(num_classes),
            confidence=np.zeros(shape, np.uint8) if self._keeps_confidence else None,
        )

    def _label(
        self,
        logits: Float[Tensor, "batch num_classes h w"],
        images: UInt8[Tensor, "batch 3 _ _"],
        own_size: tuple[int, int],
    ) -> list[Prediction]:
        """Logits, brought to the images' own size, to label maps."""
        height, width = own_size
        grid, window = Grid(height, width), Window(0, 0, width, height)
        if self._crf is None:
            # Images that are brought to a smaller size may have many more pixels than were fed.
            together = max(1, self._batch_size * _FULL_BATCH_SIDE[self._device.type] ** 2 // (height * width))
            some = (self._predictions(part, grid, window) for part in torch.split(logits, together))
            return [prediction for predictions in some for prediction in predictions]
        # One by one, as each stands at full size.
        return [
            self._predictions(self._refined(*pair, self._crf)[None], grid, window)[0]
            for pair in zip(logits, images, strict=True)
        ]

    def _refined(
        self, logits: Float[Tensor, "num_classes h w"], image: UInt8[Tensor, "3 height width"], crf: Crf
    ) -> Float[Tensor, "num_classes height width"]:
        """Those of the refined probabilities, at the image's own size."""
        self._synchronise()
        began = time.perf_counter()
        full = _resized_to(logits[None], Grid(*image.shape[-2:]))[0]
        probabilities = refine(full, image, crf)
        refined = probabilities.clamp_(min=torch.finfo(probabilities.dtype).tiny).log_()
        self._synchronise()
        self._tell_refined(time.perf_counter() - began)
        return refined

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _predictions(
        self,
        logits: Float[Tensor, "batch num_classes h w"],
        grid: Grid,
        window: Window,
        labelled: Bool[np.ndarray, "batch height width"] | None = None,
    ) -> list[Prediction]:
        """Labels a window of the grid for which the logits are meant, of all images together.

        On a GPU each step of an image of its own would take longer to ask for than to do.

        Args:
            logits: of images of one size.
            grid: the pixels of each.
            window: which of them.
            labelled: which of the window's pixels. None: all.
        """
        num_images, num_classes = len(logits), len(self._classes)
        label_maps, confidence = self._tail(logits, grid, window)
        valid = None if labelled is None else torch.tensor(labelled, device=self._device)
        found, probability = label_maps, confidence
        if num_images > 1:  # each image with bins of its own
            firsts = torch.arange(0, num_images * num_classes, num_classes, dtype=torch.int32, device=self._device)
            found = found + firsts[:, None, None]
        if valid is not None:
            found, probability = found[valid], probability[valid]
        found, num_bins = found.flatten(), num_images * num_classes
        num_pixels = torch.bincount(found, minlength=num_bins)
        confidence_sums = torch.bincount(found, probability.flatten().double(), num_bins)
        kept = None
        if self._keeps_confidence:
            # Not finite is no number of 8 bits; such an image is a reject, by its sums.
            kept = confidence.nan_to_num(0).mul_(255).round_().clamp_(min=1)
        if valid is not None:
            label_maps.masked_fill_(~valid, self._classes.ignore_index)
            if kept is not None:
                kept.masked_fill_(~valid, 0)
        columns = [
            label_maps.cpu().numpy().astype(dtype_for(num_classes), copy=False),
            num_pixels.view(num_images, num_classes).cpu().numpy(),
            confidence_sums.view(num_images, num_classes).double().cpu().numpy(),
            [None] * num_images if kept is None else kept.to(torch.uint8).cpu().numpy(),
        ]
        return [Prediction(*fields) for fields in zip(*columns, strict=True)]


def _take_stream(device: torch.device) -> None:
    """Gives this thread a stream of its own: while it computes, the copies of others go on."""
    torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def _as_they_are(logits: Float[Tensor, "batch num_classes height width"]) -> tuple[Grid, Window]:
    """The grid of logits of which each is meant for a pixel, and all of it."""
    height, width = logits.shape[-2:]
    return Grid(height, width), Window(0, 0, width, height)


def _resized_to(
    logits: Float[Tensor, "batch num_classes h w"], grid: Grid
) -> Float[Tensor, "batch num_classes height width"]:
    size = grid.height, grid.width
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=grid.align_corners)


def _image(batch: pa.Table, row: int) -> Decoded:
    num_rows, height, width = (batch[name][row].as_py() for name in ("num_rows", "height", "width"))
    pixels = np.frombuffer(batch["pixels"][row].as_buffer(), np.uint8).reshape(num_rows, -1, 3)
    return Decoded(pixels, height, width)


def _raster(batch: pa.Table, row: int) -> Raster:
    def of(name: str) -> int:
        number: int = batch[name][row].as_py()
        return number

    height, width = of("height"), of("width")
    core = Window(of("core_col_off"), of("core_row_off"), of("core_width"), of("core_height"))
    return Raster(
        values=np.frombuffer(batch["values"][row].as_buffer(), np.float32).reshape(-1, height, width),
        valid=np.frombuffer(batch["valid"][row].as_buffer(), np.bool_).reshape(height, width),
        core=core,
        wanted=np.frombuffer(batch["wanted"][row].as_buffer(), np.bool_).reshape(core.height, core.width),
    )


def _size(item: Decoded | Raster) -> tuple[int, int]:
    height, width = item.valid.shape if isinstance(item, Raster) else (item.height, item.width)
    return height, width


def _joined(parts: Sequence[Prediction]) -> Prediction:
    """One below the other."""
    confidences = [part.confidence for part in parts if part.confidence is not None]
    return Prediction(
        label_map=np.concatenate([part.label_map for part in parts]),
        num_pixels=np.sum([part.num_pixels for part in parts], axis=0),
        confidence_sum=np.sum([part.confidence_sum for part in parts], axis=0),
        confidence=np.concatenate(confidences) if confidences else None,
    )


def _failed(error: Exception, height: int, width: int, way_out: str) -> Reject:
    text = " ".join(str(error).split())[:300]
    if lacks_memory(error):
        return Reject("predict", _NO_MEMORY, f"{width}×{height} alone; {way_out}: {text}")
    return Reject("predict", "the model failed", f"{width}×{height}: {text}")


def _checked(result: Prediction | Reject) -> Prediction | Reject:
    if isinstance(result, Prediction) and not np.isfinite(result.confidence_sum).all():
        return Reject("predict", "not finite", "the model's logits hold NaN or infinity for this image")
    return result


def _split(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
