"""Crop-field scenes, drawn, each with its exact target: something to try segray on without a download.

A camera looks down on rows of a young crop. Weeds of three shapes stand between and within the
rows, wheels have passed, something out of view casts its shadow, and the camera adds its own
faults. A scene is a function of its seed alone.

    python -m segray.demo SINK --num-scenes 96 --format tar
"""

import io
import json
import math
import shlex
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import fsspec
import numpy as np
import tyro
from jaxtyping import Bool, Complex128, Float32, UInt8
from PIL import Image, ImageDraw, ImageFilter
from tyro.conf import Positional

from segray.classes import Classes
from segray.errors import SettingsError, SinkError, extra
from segray.labelmap import encode_png

__all__ = ["CLASSES", "Draw", "draw", "encoded", "mosaic", "scene"]

CLASSES = Classes(
    names=("soil", "crop", "weed", "track"),
    palette=((225, 205, 160), (0, 158, 115), (213, 94, 0), (0, 114, 178)),
)
"""What the scenes show. The colours stay apart for colour-blind eyes (after Okabe and Ito)."""

_SOIL, _CROP, _WEED, _TRACK = range(4)
_SIZES = ((288, 384), (288, 384), (288, 384), (320, 320), (360, 480))
"""Height and width; what a size occurs with is how often it is listed."""
_CELL = (288, 320)
"""Height and width that every scene has."""
_CRS = "EPSG:32633"
_ORIGIN = (500_000, 5_400_000)
_PIXEL_METRES = 0.5
_SLANT = 0.25

_Field = Float32[np.ndarray, "height width"]
_Points = Complex128[np.ndarray, " num_points"]
_Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Draws scenes with their targets, and the classes file that training asks for.

    Raises:
        SettingsError: a number is out of its bounds.
    """

    sink: Positional[str]
    """Folder or prefix (any fsspec URI) that receives the scenes."""
    num_scenes: int = 96
    """How many."""
    first_seed: int = 1_000_000
    """The seed of the first scene; the others count on from it."""
    format: Literal["loose", "tar", "parquet", "raster"] = "loose"
    """images/*.jpg and targets/*.png, or shards of both: WebDataset tar or Parquet. Or all of them side by side, as one
    raster with a place on Earth and four bands: rasters/fields.tif and targets/fields.tif (needs segray[geo])."""
    shard_scenes: int = 256
    """Scenes in a shard."""

    def __post_init__(self) -> None:
        for name, least in (("num_scenes", 1), ("first_seed", 0), ("shard_scenes", 1)):
            if getattr(self, name) < least:
                raise SettingsError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is out of bounds; give at least {least}"
                )

    def command(self) -> str:
        """The command line that gives these settings."""
        options = (
            f"--num-scenes {self.num_scenes} --first-seed {self.first_seed} "
            f"--format {self.format} --shard-scenes {self.shard_scenes}"
        )
        return f"python -m segray.demo {shlex.quote(self.sink)} {options}"


def draw(job: Draw) -> None:
    """Draws the scenes into the job's sink.

    The same seeds give the same bytes, whatever the format.

    Raises:
        SinkError: the sink cannot be written.
        SettingsError: rasters are to be drawn, and the extra `geo` is not installed.
    """
    seeds = range(job.first_seed, job.first_seed + job.num_scenes)
    sink = job.sink.rstrip("/")
    try:
        _write(f"{sink}/classes.json", json.dumps({**CLASSES.to_dict(), "command": job.command()}).encode())
        if job.format == "loose":
            for seed in seeds:
                name, image, target = encoded(seed)
                _write(f"{sink}/images/{name}.jpg", image)
                _write(f"{sink}/targets/{name}.png", target)
            return
        if job.format == "raster":
            for folder, raster in zip(("rasters", "targets"), _rasters(*mosaic(seeds)), strict=True):
                _write(f"{sink}/{folder}/fields.tif", raster)
            return
        pack, extension = (_tar, "tar") if job.format == "tar" else (_parquet, "parquet")
        for index, start in enumerate(range(0, len(seeds), job.shard_scenes)):
            shard = (encoded(seed) for seed in seeds[start : start + job.shard_scenes])
            _write(f"{sink}/shard-{index:06d}.{extension}", pack(shard))
    except OSError as error:
        raise SinkError(f"{job.sink} cannot be written: {error}") from error


def encoded(seed: int) -> tuple[str, bytes, bytes]:
    """A scene's name, its image as JPEG and its target as palette PNG."""
    image, target = scene(seed)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=92)
    return f"scene-{seed:07d}", buffer.getvalue(), encode_png(target, CLASSES.palette)


def scene(seed: int) -> tuple[UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]:
    """Draws one scene.

    Returns:
        The image, (height, width, 3) uint8 RGB, and its target, (height, width) uint8 class ids.
    """
    rng = np.random.default_rng(seed)
    camera = _Camera.random(rng)
    ground, target = _draw_ground(rng, camera)
    plants, plant_ids = _draw_plants(rng, camera)
    is_plant = plant_ids != _SOIL
    lit = ground * _plant_shadows(rng, is_plant, camera.spacing)[:, :, None]
    lit[is_plant] = plants[is_plant]
    lit *= _cast_shadow(rng, camera)
    return _expose(rng, lit), np.where(is_plant, plant_ids, target)


def mosaic(
    seeds: Sequence[int],
) -> tuple[UInt8[np.ndarray, "height width 4"], UInt8[np.ndarray, "height width"], Bool[np.ndarray, "height width"]]:
    """Draws scenes side by side, as an instrument sees them that passes over at a slant.

    Returns:
        The image, (height, width, 4) uint8: red, green, blue, near infrared; its target, (height, width) uint8 class
        ids; and a mask of the same shape, False outside of the swath, where both are without meaning.
    """
    cell_height, cell_width = _CELL
    num_cols = math.ceil(math.sqrt(len(seeds)))
    num_rows = math.ceil(len(seeds) / num_cols)
    image = np.zeros((num_rows * cell_height, num_cols * cell_width, 4), np.uint8)
    target, is_seen = np.zeros(image.shape[:2], np.uint8), np.zeros(image.shape[:2], bool)
    for index, seed in enumerate(seeds):
        top, left = index // num_cols * cell_height, index % num_cols * cell_width
        cell = slice(top, top + cell_height), slice(left, left + cell_width)
        colours, ids = (whole[:cell_height, :cell_width] for whole in scene(seed))
        red = colours[:, :, 0]
        infrared = np.where(np.isin(ids, (_CROP, _WEED)), 255 - red // 2, red)  # which leaves reflect
        image[cell], target[cell], is_seen[cell] = np.dstack([colours, infrared]), ids, True
    height, width = target.shape
    across = np.arange(width) + _SLANT * np.arange(height)[:, None]
    return image, target, is_seen & (across >= _SLANT * height) & (across < width)


@dataclass(frozen=True, slots=True)
class _Camera:
    """Where the rows lie in the image, all in pixels at its centre.

    On the ground, u runs across the rows and v along them. A tilted camera sees the ground at
    the top of the image from farther away.
    """

    height: int
    width: int
    heading: float
    tilt: float
    spacing: float
    phase: float

    @classmethod
    def random(cls, rng: np.random.Generator) -> "_Camera":
        height, width = _SIZES[rng.integers(len(_SIZES))]
        return cls(
            height,
            width,
            heading=rng.normal(0, 0.15),
            tilt=rng.uniform(0, 0.4) / height if rng.random() < 0.6 else 0.0,
            spacing=height * rng.uniform(0.30, 0.48),
            phase=rng.uniform(0, 1),
        )

    def to_ground(self) -> tuple[_Field, _Field]:
        """Where each pixel lies: u and v."""
        dy = np.arange(self.height, dtype=np.float32)[:, None] - self.height / 2
        dx = np.arange(self.width, dtype=np.float32)[None, :] - self.width / 2
        far = 1 / (1 + self.tilt * dy)
        x, y = dx * far, dy * far
        cos, sin = np.float32(math.cos(self.heading)), np.float32(math.sin(self.heading))
        return x * cos + y * sin, y * cos - x * sin

    def to_image(self, u: float, v: float) -> tuple[float, float, float]:
        """Column, row, and scale of a point of the ground."""
        x = u * math.cos(self.heading) - v * math.sin(self.heading)
        y = u * math.sin(self.heading) + v * math.cos(self.heading)
        scale = 1 / max(1 - self.tilt * y, 0.2)
        return x * scale + self.width / 2, y * scale + self.height / 2, scale

    def reach(self) -> float:
        """No pixel lies farther from the centre, in u or v."""
        return math.hypot(self.height, self.width) / 2 / (1 - self.tilt * self.height / 2)

    def rows(self) -> list[float]:
        """Where the rows that may be in view lie: u."""
        last = math.ceil(self.reach() / self.spacing) + 1
        return [(index + self.phase) * self.spacing for index in range(-last, last)]


def _noise(rng: np.random.Generator, camera: _Camera, *cells: int) -> _Field:
    """Smooth noise of about unit variance, the sum of octaves with cells of these sizes in pixels."""
    total = np.zeros((camera.height, camera.width), np.float32)
    for cell in cells:
        coarse = (math.ceil(camera.height / cell) + 3, math.ceil(camera.width / cell) + 3)
        octave = Image.fromarray(rng.standard_normal(coarse, np.float32))
        box = (1, 1, 1 + camera.width / cell, 1 + camera.height / cell)
        total += np.asarray(octave.resize((camera.width, camera.height), Image.Resampling.BICUBIC, box))
    return total * np.float32(1.4 / math.sqrt(len(cells)))


def _draw_ground(
    rng: np.random.Generator, camera: _Camera
) -> tuple[Float32[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]:
    """Soil and wheel tracks: linear RGB in [0, 1], and the class ids of both."""
    u, v = camera.to_ground()
    clay, loam = np.array([0.36, 0.24, 0.16]), np.array([0.30, 0.26, 0.21])
    colour = (clay + (loam - clay) * rng.random()) * rng.uniform(0.65, 1.25)
    crumbs = rng.standard_normal((camera.height, camera.width), np.float32)
    relief = 0.10 * _noise(rng, camera, 3, 9) + rng.uniform(0.03, 0.10) * crumbs
    moisture = np.clip(0.5 + 0.8 * _noise(rng, camera, 90), 0, 1) * rng.uniform(0, 0.4)
    furrows = rng.uniform(0, 0.07) * np.cos(2 * math.pi * (u / camera.spacing - camera.phase))
    light = (1 + relief + furrows) * (1 - moisture)

    target = np.full(u.shape, _SOIL, np.uint8)
    if rng.random() < 0.7:
        is_track, tread = _track(rng, camera, u, v)
        target[is_track] = _TRACK
        # A wheel closes the pores: less relief, another brightness, the pattern of its lugs.
        pressed = (0.35 * relief + tread) + rng.uniform(0.78, 1.18)
        light = np.where(is_track, pressed * (1 - 0.8 * moisture), light)

    hue = 0.02 * _noise(rng, camera, 40)
    tint = np.stack([1 + hue, np.ones_like(hue), 1 - hue], axis=2)
    ground = light[:, :, None] * tint * colour.astype(np.float32)
    return _add_stones(rng, camera, ground), target


def _track(
    rng: np.random.Generator, camera: _Camera, u: _Field, v: _Field
) -> tuple[Bool[np.ndarray, "height width"], _Field]:
    """Where a wheel ran between two rows, and the light on its tread."""
    middles = [row + camera.spacing / 2 for row in camera.rows() if abs(row + camera.spacing / 2) < 0.4 * camera.width]
    middle = middles[rng.integers(len(middles))] + rng.normal(0, 0.04) * camera.spacing
    half_width = camera.spacing * rng.uniform(0.17, 0.28)
    wander = camera.spacing * 0.03 * np.sin(v / camera.spacing + rng.uniform(0, 6))
    across = (u - middle - wander) / half_width
    edge = 1 + 0.07 * _noise(rng, camera, 8)
    pitch = camera.spacing * rng.uniform(0.16, 0.26)
    lugs = np.sin(2 * math.pi * (v + half_width * np.abs(across)) / pitch)  # chevrons, as tractor tyres have
    tread = rng.uniform(0.05, 0.16) * np.clip(2.5 * lugs, -1, 1)
    rim = -0.25 * np.exp(-(((np.abs(across) - 1) / 0.08) ** 2))
    return np.abs(across) < edge, (tread + rim).astype(np.float32)


def _add_stones(
    rng: np.random.Generator, camera: _Camera, ground: Float32[np.ndarray, "height width 3"]
) -> Float32[np.ndarray, "height width 3"]:
    canvas = Image.fromarray((np.clip(ground, 0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 50)):
        middle = complex(rng.uniform(0, camera.width), rng.uniform(0, camera.height))
        radius = min(1 + rng.exponential(1.3), 6)
        stone = middle + radius * rng.uniform(0.7, 1.2, 8) * np.exp(2j * math.pi * np.arange(8) / 8)
        pen.polygon(_flat(stone + radius * (0.3 + 0.4j)), fill=(40, 32, 26))
        pen.polygon(_flat(stone), fill=_rgb((1.06, 1.0, 0.9), rng.uniform(70, 135)))
    return np.asarray(canvas).astype(np.float32) / 255


def _draw_plants(
    rng: np.random.Generator, camera: _Camera
) -> tuple[Float32[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]:
    """All plants, from the lowest up: linear RGB in [0, 1], and their class ids; soil where there is none."""
    colours = Image.new("RGB", (camera.width, camera.height))
    ids = Image.new("L", (camera.width, camera.height), _SOIL)
    pens = ImageDraw.Draw(colours), ImageDraw.Draw(ids)
    sun = rng.uniform(0, 2 * math.pi)
    crop_hue = rng.uniform(-1, 1)
    plants = _weeds(rng, camera) + _crops(rng, camera)
    for index in rng.permutation(len(plants)):
        kind, u, v, radius = plants[index]
        x, y, scale = camera.to_image(u, v)
        reach = radius * scale
        if -reach < x < camera.width + reach and -reach < y < camera.height + reach:
            _KINDS[kind](rng, pens, x, y, reach, sun, crop_hue)
    texture = 1 + 0.07 * _noise(rng, camera, 4)
    drawn = np.asarray(colours).astype(np.float32) / 255
    return drawn * texture[:, :, None], np.asarray(ids)


def _crops(rng: np.random.Generator, camera: _Camera) -> list[tuple[str, float, float, float]]:
    """Kind, u, v and radius of each crop plant: evenly sown, unevenly come up."""
    growth = rng.uniform(0.20, 0.40) * camera.spacing
    pitch = growth * rng.uniform(1.1, 1.7)
    gaps = rng.uniform(0, 0.25)
    plants = []
    for row in camera.rows():
        for v in np.arange(-camera.reach() + rng.uniform(0, pitch), camera.reach(), pitch):
            if rng.random() >= gaps:
                across, along = rng.normal(0, 0.03 * camera.spacing), rng.normal(0, 0.1 * pitch)
                plants.append(("crop", row + across, float(v) + along, growth * rng.uniform(0.7, 1.15)))
    return plants


def _weeds(rng: np.random.Generator, camera: _Camera) -> list[tuple[str, float, float, float]]:
    """Kind, u, v and radius of each weed: in patches of a kind, anywhere."""
    reach = camera.reach()
    plants = []
    for _ in range(rng.integers(3, 12)):
        kind = ("grass", "broadleaf", "thistle")[rng.integers(3)]
        u, v = rng.uniform(-0.8, 0.8) * reach, rng.uniform(-0.8, 0.8) * reach
        for _ in range(rng.integers(1, 6)):
            du, dv = rng.normal(0, 0.3 * camera.spacing, 2)
            radius = camera.spacing * rng.uniform(0.09, 0.24)
            plants.append((kind, u + float(du), v + float(dv), radius))
    return plants


_Pens = tuple[ImageDraw.ImageDraw, ImageDraw.ImageDraw]


def _draw_crop(
    rng: np.random.Generator, pens: _Pens, x: float, y: float, radius: float, sun: float, hue: float
) -> None:
    """A rosette of long leaves with a pale midrib, bluish green."""
    green = _shaded((60 + 12 * hue, 106.0, 56 - 10 * hue), rng.uniform(0.8, 1.15))
    start = rng.uniform(0, 2 * math.pi)
    num_leaves = int(rng.integers(5, 9))
    for index in range(num_leaves):
        angle = start + index * 2.4 + rng.normal(0, 0.15)  # the golden angle, as leaves really stand
        length = radius * (1 - 0.5 * index / num_leaves) * rng.uniform(0.85, 1.1)
        _draw_leaf(rng, pens, _CROP, x, y, angle, length, 0.22 * length + 1, green, sun, rib=1.35, waist=0.7)


def _draw_grass(
    rng: np.random.Generator, pens: _Pens, x: float, y: float, radius: float, sun: float, hue: float
) -> None:
    """A tuft of narrow, bent blades, yellowish green."""
    green = _shaded((100.0, 124.0, 52.0), rng.uniform(0.8, 1.1))
    for _ in range(int(rng.integers(6, 12))):
        length = radius * rng.uniform(0.7, 1.25)
        angle = rng.uniform(0, 2 * math.pi)
        _draw_leaf(
            rng, pens, _WEED, x, y, angle, length, 1.3 + 0.055 * radius, green, sun, rib=1.0, waist=0.3, bend=0.5
        )


def _draw_broadleaf(
    rng: np.random.Generator, pens: _Pens, x: float, y: float, radius: float, sun: float, hue: float
) -> None:
    """Round leaves on stalks, in pairs that cross."""
    green = _shaded((72.0, 114.0, 48.0), rng.uniform(0.8, 1.2))
    start = rng.uniform(0, math.pi)
    for index in range(int(rng.integers(4, 7))):
        angle = start + index * math.pi + (index // 2) * math.pi / 2 + rng.normal(0, 0.2)
        length = radius * (1.1 - 0.12 * index)
        _draw_leaf(rng, pens, _WEED, x, y, angle, length, 0.36 * length, green, sun, rib=1.0, waist=2.2)


def _draw_thistle(
    rng: np.random.Generator, pens: _Pens, x: float, y: float, radius: float, sun: float, hue: float
) -> None:
    """A rosette of toothed leaves, greyish green."""
    green = _shaded((82.0, 106.0, 80.0), rng.uniform(0.75, 1.05))
    start = rng.uniform(0, 2 * math.pi)
    for index in range(int(rng.integers(6, 9))):
        angle = start + index * 2.4 + rng.normal(0, 0.15)
        length = radius * (1.15 - 0.06 * index)
        _draw_leaf(
            rng, pens, _WEED, x, y, angle, length, 0.27 * length + 0.5, green, sun, rib=1.5, waist=1.0, teeth=0.45
        )


_KINDS = {"crop": _draw_crop, "grass": _draw_grass, "broadleaf": _draw_broadleaf, "thistle": _draw_thistle}

_ALONG = np.linspace(0, 1, 13)


def _draw_leaf(
    rng: np.random.Generator,
    pens: _Pens,
    class_id: int,
    x: float,
    y: float,
    angle: float,
    length: float,
    half_width: float,
    colour: _Colour,
    sun: float,
    *,
    rib: float,
    waist: float,
    bend: float = 0.15,
    teeth: float = 0.0,
) -> None:
    """One leaf from its base at (x, y): two halves, of which the one turned to the sun is lighter.

    `waist` moves the widest place from the base (below 1) to the tip (above 1), `rib` is the
    midrib's brightness, `bend` curves the leaf, `teeth` cuts into its margin.
    """
    # Points are complex numbers, column + row·i: turning is multiplying.
    direction = np.exp(1j * (angle + rng.normal(0, bend) * _ALONG))
    spine = complex(x, y) + length * _ALONG * direction
    half_widths = half_width * np.sin(math.pi * _ALONG**waist) ** 0.8
    half_widths[1::2] *= 1 - teeth
    shade = rng.uniform(0.88, 1.12)
    for side in (-1, 1):
        margin = spine + side * 1j * half_widths * direction
        light = shade * (1 + 0.16 * math.cos(angle + side * math.pi / 2 - sun))
        outline = _flat(np.concatenate([spine, margin[::-1]]))
        pens[0].polygon(outline, fill=_rgb(colour, light))
        pens[1].polygon(outline, fill=class_id)
    if rib != 1 and half_width > 2.5:
        pens[0].line(_flat(spine[:-2]), fill=_rgb(colour, rib))


def _flat(points: _Points) -> list[float]:
    flat: list[float] = points.view(np.float64).tolist()
    return flat


def _shaded(colour: _Colour, light: float) -> _Colour:
    red, green, blue = colour
    return red * light, green * light, blue * light


def _rgb(colour: _Colour, light: float) -> tuple[int, int, int]:
    red, green, blue = (min(int(channel * light), 255) for channel in colour)
    return red, green, blue


def _plant_shadows(rng: np.random.Generator, is_plant: Bool[np.ndarray, "height width"], spacing: float) -> _Field:
    """What is left of the light beside the plants: their own shape, moved away from the sun."""
    angle, length = rng.uniform(0, 2 * math.pi), spacing * rng.uniform(0.02, 0.09)
    offset = round(length * math.sin(angle)), round(length * math.cos(angle))
    moved = Image.fromarray(np.roll(is_plant, offset, axis=(0, 1)).astype(np.uint8) * 255)
    soft = np.asarray(moved.filter(ImageFilter.BoxBlur(rng.uniform(1, 3)))).astype(np.float32) / 255
    return 1 - np.float32(rng.uniform(0.25, 0.6)) * soft


def _cast_shadow(rng: np.random.Generator, camera: _Camera) -> Float32[np.ndarray, "height width 3"]:
    """What is left of the light under the shadow of a mast, a machine or a person; the sky's blue stays longest."""
    light = np.ones((camera.height, camera.width, 3), np.float32)
    if rng.random() < 0.4:
        canvas = Image.new("L", (camera.width, camera.height))
        near = complex(rng.uniform(0, camera.width), rng.uniform(0, camera.height))
        along = np.exp(1j * rng.uniform(0, 2 * math.pi))
        far = near + 2 * camera.width * along
        side = camera.width * rng.uniform(0.05, 0.35) * 1j * along
        ImageDraw.Draw(canvas).polygon(_flat(np.array([near - side, near + side, far + side, far - side])), fill=255)
        soft = canvas.filter(ImageFilter.BoxBlur(rng.uniform(1, 10)))
        depth = rng.uniform(0.3, 0.55) * np.array([1.0, 0.96, 0.88])
        light -= (np.asarray(soft).astype(np.float32) / 255)[:, :, None] * depth.astype(np.float32)
    return light


def _expose(
    rng: np.random.Generator, light: Float32[np.ndarray, "height width 3"]
) -> UInt8[np.ndarray, "height width 3"]:
    """What the camera makes of the light: white balance, exposure, tone, vignette, lens blur, sensor noise."""
    height, width = light.shape[:2]
    warmth = rng.normal(0, 0.06)
    balance = np.array([1 + warmth, 1.0, 1 - warmth], np.float32)
    # An automatic exposure half makes up for dark and bright fields, and errs a little.
    exposure = np.float32(rng.uniform(0.8, 1.2) * math.sqrt(0.33 / float(light.mean())) * 1.5)
    dy, dx = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette = (1 - rng.uniform(0, 0.12) * (dx**2 + dy**2)).astype(np.float32)
    exposed = light * (balance * exposure) * vignette[:, :, None]
    seen = Image.fromarray((np.clip(exposed, 0, 1) * 255).astype(np.uint8))
    blurred = np.asarray(seen.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.1)))).astype(np.float32)
    noise = rng.standard_normal(light.shape, np.float32) * np.float32(rng.uniform(1, 5))
    return np.clip(blurred + noise, 0, 255).astype(np.uint8)


def _tar(scenes: Iterator[tuple[str, bytes, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as shard:
        for name, image, target in scenes:
            for member, data in ((f"{name}.jpg", image), (f"{name}.target.png", target)):
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _parquet(scenes: Iterator[tuple[str, bytes, bytes]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, images, targets = zip(*scenes, strict=True)
    table = pa.table(
        {
            "name": pa.array(names, pa.string()),
            "image": pa.array(images, pa.binary()),
            "target": pa.array(targets, pa.binary()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none")  # JPEG and PNG are compressed already
    return buffer.getvalue()


def _rasters(
    image: UInt8[np.ndarray, "height width 4"],
    target: UInt8[np.ndarray, "height width"],
    is_seen: Bool[np.ndarray, "height width"],
) -> tuple[bytes, bytes]:
    """Cloud-Optimised GeoTIFFs of a mosaic: as an instrument delivers it, in 16 bits with 0 for no data; its target."""
    with extra("geo", "--format raster"):
        import rasterio
        from rasterio.enums import ColorInterp

    height, width = target.shape
    transform = rasterio.Affine(_PIXEL_METRES, 0, _ORIGIN[0], 0, -_PIXEL_METRES, _ORIGIN[1])
    form = {
        "driver": "COG",
        "height": height,
        "width": width,
        "crs": _CRS,
        "transform": transform,
        "compress": "deflate",
    }
    with rasterio.MemoryFile() as fields, rasterio.MemoryFile() as targets:
        with fields.open(**form, count=4, dtype=np.uint16, nodata=0) as raster:
            raster.write(np.where(is_seen[:, :, None], 256 * image.astype(np.uint16) + 1, 0).transpose(2, 0, 1))
            raster.descriptions = ("red", "green", "blue", "nir")
            raster.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined)
            raster.scales, raster.offsets = (1 / 256,) * 4, (-1 / 256,) * 4
        with targets.open(**form, count=1, dtype=np.uint8, nodata=CLASSES.ignore_index) as raster:
            raster.write(np.where(is_seen, target, CLASSES.ignore_index).astype(np.uint8), 1)
            raster.write_colormap(1, dict(enumerate(CLASSES.palette)))
        return fields.read(), targets.read()


def _write(uri: str, data: bytes) -> None:
    with fsspec.open(uri, "wb") as file:
        file.write(data)


if __name__ == "__main__":
    draw(tyro.cli(Draw, description=__doc__))
