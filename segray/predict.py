"""Predictor, the actor class: images in, label maps and class counts out. Runs without Ray."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from jaxtyping import Float, Float64, Int64, UInt, UInt8
from torch import Tensor

from segray import model
from segray.crf import Crf, refine
from segray.errors import Reject
from segray.labelmap import dtype_for
from segray.model import Checkpoint
from segray.stitch import stitch, weight
from segray.tile import Tiling, Window, windows

__all__ = ["CPU_ENVIRONMENT", "DType", "Prediction", "Predictor"]

CPU_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""Under which a process on a CPU should start that holds a `Predictor`, where its C library is glibc.

A batch's activations are large blocks, which glibc would map anew each time, and their page
faults take as long as the convolutions do. So it keeps up to 1 GiB of what was freed.
"""

DType = Literal["float32", "bfloat16", "float16"]
T = TypeVar("T")

_FULL_BATCH_SIDE = 640
_MAX_ASPECT = 64
_LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What the model sees in one image."""

    label_map: UInt[np.ndarray, "height width"]
    """The class of each pixel, uint8 (uint16 beyond 256 classes)."""
    num_pixels: Int64[np.ndarray, " num_classes"]
    """Pixels of each class."""
    confidence_sum: Float64[np.ndarray, " num_classes"]
    """Sum over each class's pixels of the probability that the model gave it."""


class Predictor:
    """Holds a model in memory and labels batches of images with it.

    Images of any sizes may come together: those of one size share a batch, and those beyond
    `tiling.size` are cut into tiles, which are batched, blended and stitched. A CRF comes after that, and
    sees whole images at their own size. On a CPU a label map does not depend on what an image was
    batched with; on a GPU it may, in pixels whose two largest logits are equal up to rounding.
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
        beat: Callable[[int], object] = lambda num_images: None,
        refined: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        """Builds the model on its device.

        Args:
            read_checkpoint: gives the bytes of a `Checkpoint`; called once, where the model will live.
            tiling: how large images are cut.
            crf: what refines the model's probabilities. None: nothing does.
            batch_size: images, or tiles, of up to 640×640 pixels that share a forward pass;
                larger ones in proportion fewer.
            device: torch's name of a device.
            dtype: what the forward pass computes in; logits are float32 from there on.
            num_threads: threads of the forward pass on a CPU. None: torch's default.
            beat: is called after each forward pass with the number of images, or tiles, in it.
            refined: is called after each image that the CRF refined, with the seconds that it took.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        checkpoint = Checkpoint.from_bytes(read_checkpoint())
        self._classes = checkpoint.classes
        self._preprocessing = checkpoint.preprocessing
        self._tiling = tiling or Tiling()
        self._crf = crf
        self._batch_size = batch_size
        self._device = torch.device(device)
        self._dtype = getattr(torch, dtype)
        # Left alone, convolutions of float32 round their input to the 10 bits of TF32. Without it
        # cuDNN is made for channels-first order; in the other some take thirty times as long.
        torch.backends.cudnn.allow_tf32 = False
        is_plain = self._device.type == "cuda" and dtype == "float32"
        self._memory_format = torch.contiguous_format if is_plain else torch.channels_last
        module = model.build(checkpoint)
        self._multiple = model.input_multiple(module)
        self._minimum = model.input_minimum(module)
        self._module = module.to(memory_format=self._memory_format).to(self._device)
        self._beat = beat
        self._tell_refined = refined

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Labels the decoded images of a batch; its other rows (rejects) pass through.

        Args:
            batch: columns `pixels` (binary, HWC uint8 RGB), `height`, `width`, `stage`, `reason`
                (null unless it is a reject), and any others.

        Returns:
            The other columns, in their order, with `pixels` replaced by `label_map` (binary, the
            raw array), `num_pixels` and `confidence_sum` (lists, one value a class); `stage` and
            `reason` are set in rows that were rejected here.
        """
        stages, reasons = batch["stage"].to_pylist(), batch["reason"].to_pylist()
        heights, widths = batch["height"].to_pylist(), batch["width"].to_pylist()
        wanted = [row for row, reason in enumerate(reasons) if reason is None]
        images = [
            np.frombuffer(batch["pixels"][row].as_buffer(), np.uint8).reshape(heights[row], widths[row], 3)
            for row in wanted
        ]
        results: list[Prediction | Reject | None] = [None] * len(reasons)
        for row, result in zip(wanted, self.predict(images), strict=True):
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
        kept = batch.drop_columns(["pixels", "stage", "reason"])
        for name, column in columns.items():
            kept = kept.append_column(name, column)
        return kept

    @torch.inference_mode()
    def predict(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[Prediction | Reject]:
        """Labels images of any sizes.

        Args:
            images: each (height, width, 3) uint8 RGB.

        Returns:
            In their order, a prediction of each image's own height and width, or the reject of
            one for which the model gave numbers that are not finite, or that is too elongated to resize.
        """
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            by_shape[image.shape].append(index)
        results: list[Prediction | Reject] = [Reject("predict", "not predicted", "")] * len(images)
        for (height, width, _), indices in by_shape.items():
            if self._preprocessing.resize is not None and max(height, width) > _MAX_ASPECT * min(height, width):
                # Its shorter side, brought to `resize`, would make the longer one fill the memory.
                detail = f"{width}×{height}; where the model resizes, one side is at most {_MAX_ASPECT} times the other"
                for index in indices:
                    results[index] = Reject("predict", "too elongated", detail)
                continue
            for some in _split(indices, self._num_together(*self._input_size(height, width))):
                predictions = self._predict_alike([images[index] for index in some])
                for index, prediction in zip(some, predictions, strict=True):
                    results[index] = prediction
        return [_checked(result) for result in results]

    def _predict_alike(
        self, images: Sequence[UInt8[np.ndarray, "height width 3"]], *, num_tiles: int | None = None
    ) -> Sequence[Prediction | Reject]:
        """Images of one size, in one batch; where that fails, in halves, and at last one image and tile at a time."""
        height, width = images[0].shape[:2]
        is_tiled = max(self._input_size(height, width)) > self._tiling.size
        try:
            own = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
            pixels = self._resized(own)
            if is_tiled:
                return [self._predict_tiled(*pair, num_tiles) for pair in zip(own, pixels, strict=True)]
            return self._label(self._logits(pixels), own)
        except torch.AcceleratorError:  # the GPU's state is lost with it
            raise
        except Exception as error:  # a model may raise anything
            reject = _failed(error, height, width, "lower --tiling.size" + (" or leave out --crf" if self._crf else ""))
        torch.cuda.empty_cache()  # outside of the handler, whose traceback would hold the batch
        if len(images) == 1:
            return self._predict_alike(images, num_tiles=1) if is_tiled and num_tiles is None else [reject]
        half = len(images) // 2
        return [*self._predict_alike(images[:half]), *self._predict_alike(images[half:])]

    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        resize = self._preprocessing.resize
        if resize is None:
            return height, width
        return (resize, int(resize * width / height)) if height <= width else (int(resize * height / width), resize)

    def _num_together(self, height: int, width: int) -> int:
        side = self._tiling.size
        num_pixels = min(height, side) * min(width, side)
        return max(1, min(self._batch_size, self._batch_size * _FULL_BATCH_SIDE**2 // num_pixels))

    def _resized(self, images: UInt8[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch 3 h w"]:
        pixels = images.to(self._device)
        if self._preprocessing.resize is None:
            return pixels
        bilinear = TF.InterpolationMode.BILINEAR
        resized: Tensor = TF.resize(pixels, [self._preprocessing.resize], bilinear, antialias=True)
        return resized

    def _logits(self, pixels: UInt8[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch num_classes h w"]:
        """Logits in float32, one for each pixel of the model's input."""
        num_images, (height, width) = len(pixels), pixels.shape[-2:]
        if num_images == 1 and self._num_together(height, width) > 1 and self._device.type == "cpu":
            # For one image alone a CPU takes other kernels than for two or more, which round otherwise.
            pixels = pixels.expand(2, -1, -1, -1)
        padding = (0, self._padding(width), 0, self._padding(height))
        values = model.normalised(pixels, self._preprocessing)
        if any(padding):
            values = F.pad(values, padding, mode="replicate")
        values = values.contiguous(memory_format=self._memory_format)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits = model.logits(self._module, values).float()
        self._beat(num_images)
        logits = logits[:num_images]
        return _resized_to(logits, *values.shape[-2:])[..., :height, :width]

    def _padding(self, length: int) -> int:
        least = max(length, self._minimum)
        return least + -least % self._multiple - length

    def _predict_tiled(
        self, image: UInt8[Tensor, "3 height width"], pixels: UInt8[Tensor, "3 h w"], num_together: int | None
    ) -> Prediction:
        input_height, input_width = pixels.shape[-2:]
        together = num_together or self._num_together(input_height, input_width)
        cut = windows(input_height, input_width, self._tiling)

        def tiles() -> Iterator[tuple[Window, Tensor]]:
            for some in _split(cut, together):
                batch = torch.stack([pixels[:, window.rows, window.cols] for window in some])
                yield from zip(some, self._logits(batch), strict=True)

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self._device)

        weights = torch.from_numpy(weight(cut[0].height, cut[0].width, self._tiling)).to(self._device)
        bands = (band.float()[None] for band in stitch(tiles(), input_width, weights, zeros))
        if self._crf is not None or pixels.shape != image.shape:
            return self._label(torch.cat(list(bands), dim=2), image[None])[0]
        labelled = [self._prediction(band, band.shape[2], input_width) for band in bands]
        return Prediction(
            label_map=np.concatenate([band.label_map for band in labelled]),
            num_pixels=np.sum([band.num_pixels for band in labelled], axis=0),
            confidence_sum=np.sum([band.confidence_sum for band in labelled], axis=0),
        )

    def _label(
        self, logits: Float[Tensor, "batch num_classes h w"], images: UInt8[Tensor, "batch 3 height width"]
    ) -> list[Prediction]:
        """Logits, brought to the images' own size, to label maps."""
        height, width = images.shape[-2:]
        # One at a time stays in the CPU's caches.
        pairs = zip(torch.split(logits, 1), images, strict=True)
        return [self._prediction(self._refined(of_image, image), height, width) for of_image, image in pairs]

    def _refined(
        self, logits: Float[Tensor, "1 num_classes h w"], image: UInt8[Tensor, "3 height width"]
    ) -> Float[Tensor, "1 num_classes _ _"]:
        """The logits as they are, or with a CRF those of the refined probabilities, at the image's own size."""
        if self._crf is None:
            return logits
        self._synchronise()
        began = time.perf_counter()
        probabilities = refine(_resized_to(logits, *image.shape[-2:])[0], image.to(self._device), self._crf)
        refined = probabilities.clamp_(min=torch.finfo(probabilities.dtype).tiny).log_()
        self._synchronise()
        self._tell_refined(time.perf_counter() - began)
        return refined[None]

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _prediction(self, logits: Float[Tensor, "1 num_classes h w"], height: int, width: int) -> Prediction:
        """One image's logits, brought to height × width, to the class of the largest, the first of equals."""
        num_classes = len(self._classes)
        label_map, confidence = (of_batch.flatten() for of_batch in self._argmax(logits, height, width))
        num_pixels = torch.bincount(label_map, minlength=num_classes)
        confidence_sum = torch.bincount(label_map, weights=confidence.double(), minlength=num_classes)
        return Prediction(
            label_map=label_map.view(height, width).cpu().numpy().astype(dtype_for(num_classes)),
            num_pixels=num_pixels.cpu().numpy(),
            confidence_sum=confidence_sum.cpu().numpy(),
        )

    def _argmax(self, logits: Float[Tensor, "batch num_classes h w"], height: int, width: int) -> tuple[Tensor, Tensor]:
        """The class (int64) and the probability of the largest logit, both (batch, height, width).

        Classes are upsampled a few at a time, so that a large photograph with many classes
        needs some hundred megabytes and not its whole volume of logits.
        """

        def upsampled(first: int, last: int) -> Tensor:
            return _resized_to(logits[:, first:last], height, width)

        num_classes = logits.shape[1]
        together = max(1, _LOGITS_BYTES // (4 * logits.shape[0] * height * width))
        some = upsampled(0, together)
        best, label_map = some.max(1)
        total = (some - best[:, None]).exp_().sum(1)
        for first in range(together, num_classes, together):
            some = upsampled(first, first + together)
            largest, index = some.max(1)
            new_best = torch.maximum(best, largest)
            total = total * (best - new_best).exp_() + (some - new_best[:, None]).exp_().sum(1)
            label_map = torch.where(largest > best, index + first, label_map)
            best = new_best
        return label_map, 1 / total


def _resized_to(
    logits: Float[Tensor, "batch num_classes h w"], height: int, width: int
) -> Float[Tensor, "batch num_classes height width"]:
    if logits.shape[-2:] == (height, width):
        return logits
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)


def _failed(error: Exception, height: int, width: int, way_out: str) -> Reject:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "memory" in text:
        return Reject("predict", "out of memory", f"{width}×{height} alone; {way_out}: {text}")
    return Reject("predict", "the model failed", f"{width}×{height}: {text}")


def _checked(result: Prediction | Reject) -> Prediction | Reject:
    if isinstance(result, Prediction) and not np.isfinite(result.confidence_sum).all():
        return Reject("predict", "not finite", "the model's logits hold NaN or infinity for this image")
    return result


def _split(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
